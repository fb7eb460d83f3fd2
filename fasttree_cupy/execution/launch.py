"""Kernels that are ready to launch, and the structs that they take as parameters."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .kernels import KernelConfig, load_kernel
from .tensor_map import TENSOR_MAP_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .streams import WorkStream

__all__ = ["POINTER_BYTES", "Launch", "LaunchAgain", "Relaunch", "packed", "prepare"]

_POINTER = struct.Struct("=Q")
POINTER_BYTES = _POINTER.size
_OPERAND_ADDRESSES = struct.Struct("=4Q")
"""Those of Q, K, V and O, with which the struct of a `Relaunch` begins."""


class Launch(NamedTuple):
    """A kernel that is ready to launch on a device, its block and its dynamic shared memory in bytes."""

    kernel: Any
    block: tuple[int, int, int]
    shared_bytes: int

    def __call__(self, grid: tuple[int, int, int], params: Any) -> None:
        """Launch on CuPy's current stream with the kernel's parameter struct, from `packed`, passed by value."""
        self.kernel(grid, self.block, (params,), shared_mem=self.shared_bytes)


class LaunchAgain:
    """A launch to be done again and again, with a struct of parameters that its owner changes in place.

    `Launch` asks for the device, its kernel, the stream and the type of the parameters each time. Here these stay, and
    the struct too: the caller lets no two threads in at once.

    Parameters
    ----------
    launch, grid
        The kernel, and its blocks.
    parameters : bytearray
        `POINTER_BYTES` bytes, which are filled here, and behind them the struct.
    """

    __slots__ = ("_context", "_current_context", "_function", "_launch", "_parameters", "_parameters_at")

    def __init__(self, launch: Launch, grid: tuple[int, int, int], parameters: bytearray) -> None:
        from cupy.cuda import driver

        self._current_context = driver.ctxGetCurrent
        self._context = driver.ctxGetCurrent()
        # What cuLaunchKernel takes: a pointer to each parameter. There is one, and it lies right behind its pointer.
        self._parameters = parameters
        self._parameters_at = np.frombuffer(parameters, np.uint8).ctypes.data
        _POINTER.pack_into(parameters, 0, self._parameters_at + POINTER_BYTES)
        self._function = launch.kernel.kernel  # keeps its module loaded
        self._launch = functools.partial(
            driver.launchKernel, self._function.ptr, *grid, *launch.block, launch.shared_bytes
        )

    def is_possible(self) -> bool:
        """Whether the calling thread's CUDA context is the launch's, and so its device; a new thread has none yet."""
        return self._current_context() == self._context  # type: ignore[no-any-return]

    def launch(self, stream: int) -> None:
        """Launch on a stream, given by its handle."""
        self._launch(stream, self._parameters_at, 0)


class Relaunch(LaunchAgain):
    """A launch that was done, to be done again with other addresses of Q, K, V and O, with which its struct begins.

    It ends with the tensor maps of K and V, which `maps` gives for their addresses where there are any.
    """

    __slots__ = ("_maps",)

    def __init__(
        self, launch: Launch, grid: tuple[int, int, int], params: Any, maps: Callable[[int, int], bytes] | None
    ) -> None:
        super().__init__(launch, grid, bytearray(POINTER_BYTES) + params.tobytes())
        self._maps = maps

    def __call__(self, addresses: Sequence[int], stream: WorkStream) -> None:
        """Launch on a stream."""
        _OPERAND_ADDRESSES.pack_into(self._parameters, POINTER_BYTES, *addresses)
        if self._maps is not None:
            self._parameters[-2 * TENSOR_MAP_BYTES :] = self._maps(addresses[1], addresses[2])
        self._launch(stream.handle, self._parameters_at, 0)


def packed(values: Sequence[float], fields: np.dtype[Any]) -> Any:
    """A parameter struct as an array without dimensions or fields.

    CuPy asks NumPy for a description of the type, which takes longer for fields than the launch; and NumPy fills fields
    four times slower.
    """
    layout, plain = struct_of(fields)
    return np.ndarray((), plain, bytearray(layout.pack(*values)))


@functools.cache
def struct_of(fields: np.dtype[Any]) -> tuple[struct.Struct, np.dtype[Any]]:
    """The struct of these fields, which leave no gaps, and a dtype of its size without fields."""
    codes = {"u8": "Q", "i8": "q", "i4": "i", "f4": "f"}
    layout = struct.Struct("=" + "".join(codes[fields[name].str[1:]] for name in fields.names or ()))
    return layout, np.dtype((np.void, layout.size))


def prepare(config: KernelConfig) -> Launch:
    """Compile and load a kernel for the current device.

    A configuration takes longer to build and to hash than its kernel to launch: what is launched each layer is kept by
    what decides it, the device among that.
    """
    return Launch(load_kernel(config), (config.threads, 1, 1), config.shared_bytes)
