"""Programmatic dependent launch: a kernel that may begin before the one ahead of it in the stream has ended."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

from fasttree_cupy.execution.driver import driver_function

__all__ = ["launch_dependent"]

# Of cuda.h: CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.
_MAY_BEGIN_EARLY = 6
_DRIVER_VERSION = 12030
"""CUDA 12.3, whose graphs have edges for launches of this kind: from then on they can be captured."""


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute, whose value takes 64 bytes."""

    _fields_ = [("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_char * 60)]


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


_ATTRIBUTE = _Attribute(_MAY_BEGIN_EARLY, 0, 1, b"")


def launch_dependent(
    kernel: Any, block: tuple[int, int, int], shared_bytes: int, grid: tuple[int, int, int], params: Any, stream: int
) -> bool:
    """Launch a kernel that waits by itself, in ``wait_for_launcher``, for the end of the one ahead of it in a stream.

    Parameters
    ----------
    kernel : cupy.RawKernel
        What to launch, on the current device, of compute capability 9.0 or higher.
    block, shared_bytes, grid
        As for any launch.
    params : numpy.ndarray
        The kernel's parameter struct, passed by value.
    stream : int
        The stream's handle.

    Returns
    -------
    bool
        False where the driver has no such launches: nothing was launched.

    Raises
    ------
    RuntimeError
        CUDA refuses the launch.
    """
    launch = _launcher()
    if launch is None:
        return False
    config = _Config(grid, block, shared_bytes, stream, ctypes.pointer(_ATTRIBUTE), 1)
    pointers = (ctypes.c_void_p * 1)(params.ctypes.data)
    error = launch(ctypes.byref(config), ctypes.c_void_p(kernel.kernel.ptr), pointers, None)
    if error:
        raise RuntimeError(f"cuLaunchKernelEx failed with CUDA error {error}")
    return True


@functools.cache
def _launcher() -> Callable[..., int] | None:
    """cuLaunchKernelEx; None where there is no driver, or one whose graphs do not hold such launches."""
    from cupy.cuda import runtime

    return driver_function("cuLaunchKernelEx") if runtime.driverGetVersion() >= _DRIVER_VERSION else None
