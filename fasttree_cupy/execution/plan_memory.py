"""A plan's memory: its index arrays, and the workspace that its runs write to; sized before anything is allocated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.alignment import next_start
from fasttree_cupy.execution.arrays import ArrayView, aligned_empty, view
from fasttree_cupy.execution.streams import WorkStream
from fasttree_cupy.execution.upload import packed_size, upload

__all__ = ["WORKSPACE_ALIGNMENT", "MemoryNeeds", "PlanMemory", "clear"]

WORKSPACE_ALIGNMENT = 16
"""Bytes: a workspace starts at a multiple of this, as the kernels read partial outputs in pieces of this size."""
ELEMENT_BYTES = 4
"""Of float32 and int32, which everything here is."""


@dataclass(frozen=True)
class PlanMemory:
    """Where a plan's memory lies on its device.

    Attributes
    ----------
    lists : tuple of ArrayView
        The index arrays.
    pointers : tuple of int
        Where these start.
    workspace : ArrayView
        The workspace, which holds what follows.
    mid_o, mid_lse : ArrayView, float32
        Partial outputs and their LSE.
    counters : ArrayView, int32, one dimension
        0 before the first run; each leaves them as the next one needs them.
    shared : bool
        Whether runs write to the workspace, and so must take turns.
    borrowed : bool
        Whether the workspace is the caller's.
    home : int
        The stream in whose order CuPy reuses, once it is freed, what is not borrowed.
    """

    lists: tuple[ArrayView, ...]
    pointers: tuple[int, ...]
    workspace: ArrayView
    mid_o: ArrayView
    mid_lse: ArrayView
    counters: ArrayView
    shared: bool
    borrowed: bool
    home: int


class MemoryNeeds:
    """The memory that a schedule needs.

    Parameters
    ----------
    arrays : sequence of int32 array
        Its index arrays, in host memory.
    mid_shape : (int, int, int)
        Shape of the partial outputs; that of their LSE lacks the last axis.
    device : str
        "cpu" or "cuda:<n>".
    counters : int
        Number of counters.
    used : callable, optional
        How many elements of the index arrays, one after the other, mean anything when they are placed; by default all.

    Attributes
    ----------
    workspace_bytes, schedule_bytes : int
        Size of the workspace, and of the index arrays.
    """

    def __init__(
        self,
        arrays: Sequence[npt.NDArray[np.int32]],
        mid_shape: tuple[int, int, int],
        device: str,
        counters: int = 0,
        used: Callable[[], int] | None = None,
    ) -> None:
        self._used = used
        self._arrays = arrays
        self._parts: list[tuple[int, tuple[int, ...], str]] = []  # offset, shape, dtype
        self.workspace_bytes = 0
        for shape, dtype in ((mid_shape, "float32"), (mid_shape[:2], "float32"), ((counters,), "int32")):
            offset = next_start(self.workspace_bytes)
            self._parts.append((offset, shape, dtype))
            if prod(shape):
                self.workspace_bytes = offset + ELEMENT_BYTES * prod(shape)
        on_cpu = device == "cpu"
        self.schedule_bytes = sum(a.nbytes for a in arrays) if on_cpu else ELEMENT_BYTES * packed_size(arrays)

    def place(self, workspace: ArrayView | None, stream: WorkStream | None) -> PlanMemory:
        """Place the index arrays, and make a workspace ready.

        Parameters
        ----------
        workspace : ArrayView or None
            The caller's, checked; None: a new one.
        stream : WorkStream or None
            CUDA stream that sets the counters to 0: CuPy's current one for a new workspace. None on the CPU.
        """
        space = workspace or view("workspace", self._new_workspace(stream))
        mid_o, mid_lse, counters = (part_of(space, *part) for part in self._parts)
        lists, home = self._arrays, 0
        if stream is not None:
            if counters.shape[0]:
                clear(counters, stream)
            # Waits for CuPy's current stream: any other may then use what was allocated on it.
            used = None if self._used is None else self._used()
            lists, home = upload(self._arrays, stream.device, used), stream.current("cupy")
        views = tuple(view("schedule", array) for array in lists)
        pointers = tuple(each.pointer for each in views)
        shared, borrowed = self.workspace_bytes > 0, workspace is not None
        return PlanMemory(views, pointers, space, mid_o, mid_lse, counters, shared, borrowed, home)

    def _new_workspace(self, stream: WorkStream | None) -> Any:
        if stream is None:
            return aligned_empty((self.workspace_bytes,), np.dtype(np.uint8))
        import cupy

        return cupy.empty(self.workspace_bytes, np.uint8)


def clear(counters: ArrayView, stream: WorkStream) -> None:
    """Set counters to 0; the host does not wait."""
    import cupy

    cupy.cuda.runtime.memsetAsync(counters.pointer, 0, ELEMENT_BYTES * counters.shape[0], stream.handle)


def part_of(workspace: ArrayView, offset: int, shape: tuple[int, ...], dtype: str) -> ArrayView:
    """The row-major array that begins `offset` bytes into a workspace."""
    strides = tuple(prod(shape[axis + 1 :]) for axis in range(len(shape)))
    # The workspace's framework knows its owner, not this part of it.
    return ArrayView(
        workspace.pointer + offset, shape, strides, dtype, workspace.device, True, "other", workspace.owner
    )
