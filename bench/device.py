"""What the benchmark asks of the machine it runs on; tests put a fake in place of the GPU."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from bench import timing
from fasttree_cupy.execution.arrays import DTYPES

__all__ = ["Device", "Gpu"]

PROBES = Path(__file__).with_name("probes.cu")


class Device(Protocol):
    """Arrays, memory and clocks of one device."""

    xp: Any
    """The namespace of its arrays: numpy or cupy."""

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """Standard normal values, float16 or bfloat16."""

    def time_cold(self, runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
        """As `bench.timing.time_cold`."""

    def time_graph(self, run: Callable[[], Any], repeats: int) -> float:
        """As `bench.timing.time_graph`."""

    def synchronize(self) -> None:
        """Wait for all work; raises where the device is lost."""

    def free_bytes(self) -> int:
        """Memory that a contestant may still take."""

    def release(self) -> None:
        """Give cached memory back."""


class Gpu:
    """CuPy's current GPU."""

    def __init__(self) -> None:
        import cupy

        self.xp = cupy
        self.multiprocessors = int(cupy.cuda.Device().attributes["MultiProcessorCount"])
        self.time_cold = timing.time_cold
        self.time_graph = timing.time_graph
        self._probes = cupy.RawModule(code=PROBES.read_text(encoding="utf-8"))

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        """Standard normal values, float16 or bfloat16: no cuRAND needed, and 17 GB take a moment."""
        out = self.xp.empty(shape, DTYPES[dtype])
        arguments = (out.view(np.uint16), np.int64(out.size), np.uint64(seed), np.int32(dtype == "bfloat16"))
        self._probes.get_function("normal16")((self.multiprocessors * 16,), (256,), arguments)
        return out

    def read_bandwidth(self) -> float:
        """Rate in bytes a second at which a kernel that does nothing else reads memory far larger than the L2."""
        blocks, threads = self.multiprocessors * 8, 256
        piece = blocks * threads * 4 * 16  # what all threads read in one step
        size = min(4 * 2**30, self.free_bytes() // 2) // piece * piece
        data, sink = self.xp.zeros(size, np.uint8), self.xp.zeros(1, np.uint32)
        read_all = self._probes.get_function("read_all")
        arguments = (data, np.int64(size // 16), sink)
        times = self.time_cold({"read": lambda: read_all((blocks,), (threads,), arguments)}, repeats=15)
        return 1e6 * size / times["read"]["median_us"]

    def synchronize(self) -> None:
        """Wait for all work; raises where the device is lost."""
        self.xp.cuda.runtime.deviceSynchronize()

    def free_bytes(self) -> int:
        """Free memory of the GPU."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])

    def release(self) -> None:
        """Give the memory that CuPy and torch keep for later back to the GPU."""
        gc.collect()
        self.xp.get_default_memory_pool().free_all_blocks()
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            torch.cuda.empty_cache()
