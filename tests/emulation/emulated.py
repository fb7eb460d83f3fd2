"""Kernels on the machine of ``machine.h``, in place of those that CuPy would load."""

from __future__ import annotations

import ctypes
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest

from fasttree_cupy.execution import cuda, kernels, launch, merge_kernel, plan_kernels, stages, tensor_map
from tests.emulation.translate import ENTRY, translate

__all__ = ["Edits", "EmulatedKernel", "EmulatedStream", "build_ahead", "emulated_gpu", "needs_compiler"]

OLDEST_COMPILER = 12
"""g++ that has _Float16."""
OPTIONS = ("-std=c++17", "-O1", "-w", "-Wno-psabi", "-fno-strict-aliasing", "-shared", "-fPIC") + (
    ("-mf16c",) if platform.machine() == "x86_64" else ()
)
TENSOR_MAP = struct.Struct("=6Q")
"""struct TensorMap of instructions.h."""
PARAMETER_ALIGNMENT = 64
MULTIPROCESSORS = 4

Edits = tuple[tuple[str, str], ...]
"""Changes of a kernel's text, to see that what they break is found: what stands there once, and what instead."""

_builders = ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1))  # a core is left to the tests
_builds: dict[tuple[kernels.KernelConfig, Edits], Future[ctypes.CDLL]] = {}


def compiler_problem() -> str | None:
    """Say why kernels cannot be built here; None where they can."""
    if shutil.which("g++") is None:
        return "no g++, which builds emulated kernels"
    version = subprocess.run(["g++", "-dumpversion"], check=True, capture_output=True, text=True).stdout
    if int(version.split(".")[0]) < OLDEST_COMPILER:
        return f"g++ is {version.strip()}, emulated kernels need {OLDEST_COMPILER}"
    return None


_problem = compiler_problem()
needs_compiler = pytest.mark.skipif(_problem is not None, reason=str(_problem))
"""Of tests that build emulated kernels."""


class EmulatedKernel:
    """A kernel as CuPy's RawKernel: called with its grid, block, parameters and shared memory.

    Parameters
    ----------
    config : KernelConfig
        What to build.
    seed : int
        Decides who goes on when.
    edits : Edits
        Changes of its text.
    """

    def __init__(self, config: kernels.KernelConfig, seed: int, edits: Edits = ()) -> None:
        self._launch = getattr(build_ahead(config, edits).result(), ENTRY)
        self._launch.restype = ctypes.c_char_p
        self._launch.argtypes = [ctypes.c_void_p, *4 * [ctypes.c_uint], ctypes.c_ulong, ctypes.c_ulong]
        self._seed = seed

    def __call__(
        self, grid: tuple[int, ...], block: tuple[int, ...], args: tuple[Any, ...], *, shared_mem: int
    ) -> None:
        """Run to the end; raises RuntimeError where the machine finds a fault."""
        (params,) = args
        memory = ctypes.create_string_buffer(params.nbytes + PARAMETER_ALIGNMENT)
        at = -(-ctypes.addressof(memory) // PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT
        ctypes.memmove(at, params.tobytes(), params.nbytes)
        fault = self._launch(at, *grid, block[0], shared_mem, self._seed).decode()
        if fault:
            raise RuntimeError(fault)


def build_ahead(config: kernels.KernelConfig, edits: Edits = ()) -> Future[ctypes.CDLL]:
    """Have a kernel built, once, while other things go on."""
    key = (config, edits)
    if key not in _builds:
        _builds[key] = _builders.submit(build, config, edits)
    return _builds[key]


def build(config: kernels.KernelConfig, edits: Edits) -> ctypes.CDLL:
    """Translate and compile a kernel."""
    architecture = 90 if config.name in kernels.WARPGROUP_KERNELS else 80
    folder = kernels.cuda_src()
    text = translate(config.name, folder / f"{config.name}.cu", folder / "include", config.defines(), architecture)
    for before, after in edits:
        if text.count(before) != 1:
            raise ValueError(f"{before!r} stands {text.count(before)} times in {config.name}, expected once")
        text = text.replace(before, after)
    with tempfile.TemporaryDirectory(prefix="emulated-") as place:
        source, library = Path(place, "kernel.cpp"), Path(place, "kernel.so")
        source.write_text(text, encoding="utf-8")
        subprocess.run(["g++", *OPTIONS, "-o", str(library), str(source)], check=True)
        return ctypes.CDLL(str(library))


class EmulatedStream:
    """What launches need of a `WorkStream`."""

    handle = 0

    def launches(self) -> AbstractContextManager[None]:
        """Nothing is to be made current."""
        return nullcontext()


def encode_tiled(
    at: ctypes.c_void_p, _type: int, _rank: int, address: ctypes.c_void_p, _sizes: Any, strides: Any, box: Any, *_: Any
) -> int:
    """In place of cuTensorMapEncodeTiled: what the machine needs to know."""
    values = (address.value, tensor_map.BOX_BYTES // box[0], strides[0], strides[1], tensor_map.BOX_BYTES, box[2])
    ctypes.memmove(at, TENSOR_MAP.pack(*values), TENSOR_MAP.size)
    return 0


@contextmanager
def emulated_gpu(seed: int, edits: Edits = (), compute_capability: int = 90, boxes: bool = True) -> Iterator[None]:
    """Inside, kernels that are launched on arrays in the CPU's memory run on the machine.

    Parameters
    ----------
    seed : int
        Decides who goes on when.
    edits : Edits
        Changes of the kernels' text.
    compute_capability : int
        Of the GPU, times ten: which kernels are chosen.
    boxes : bool
        Whether its driver makes tensor maps, without which nothing comes in boxes.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "load_kernel", lambda config: EmulatedKernel(config, seed, edits))
        patch.setattr(tensor_map, "make_current", lambda device: None)
        patch.setattr(tensor_map, "_encoder", lambda: encode_tiled if boxes else None)
        for module in (cuda, stages):
            patch.setattr(module, "compute_capability", lambda device: compute_capability)
        patch.setattr(stages, "multiprocessors", lambda device: MULTIPROCESSORS)
        patch.setattr(stages, "launch_dependent", lambda *_: False)
        _forget_launches()
        try:
            yield
        finally:
            _forget_launches()


def _forget_launches() -> None:
    """Empty the caches that hold kernels and tensor maps."""
    caches: list[Callable[..., Any]] = [
        plan_kernels.worker_launch, plan_kernels.tree_decode_launch, stages.stage1_launch, stages.stage2_launch,
        merge_kernel.merge_states_launch, tensor_map._pair, tensor_map._tensor_map,
    ]  # fmt: skip
    for cache in caches:
        cache.cache_clear()  # type: ignore[attr-defined]
