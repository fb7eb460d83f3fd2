"""An array on a GPU that the host edits while the GPU works on: small changes in one launch, large ones in one copy.

What the host writes waits in page-locked memory until the GPU gets there, in buffers that are used in turn. The host
waits for the GPU only where it has come so far ahead that all of them are still to be read.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.execution.cuda import Launch, packed, prepare
from fasttree_cupy.execution.kernels import edit_config
from fasttree_cupy.execution.streams import WorkStream

__all__ = ["EDIT_PLAN_PARAMS", "Edits", "PinnedRing"]

Int32Array = npt.NDArray[np.int32]

# Field by field struct EditPlanParams of cuda_src/edit_plan.cu.
EDIT_PLAN_PARAMS = np.dtype([("packed", np.uint64), ("edits", np.uint64), ("count", np.int32), ("padding", np.int32)])
EDIT_BLOCKS = 4
"""Blocks of the launch: enough threads for the edits of a step of some hundred requests."""
EDIT_BUFFERS, COPY_BUFFERS = 16, 2
"""Changes that the host may be ahead of the GPU."""
HOST_TO_DEVICE = 1
"""cudaMemcpyHostToDevice."""


class PinnedBuffer:
    """Page-locked host memory that a stream reads.

    Attributes
    ----------
    array : int32
        The memory.
    pointer : int
        Its address, the same for host and GPU.
    """

    def __init__(self) -> None:
        import cupy

        self.event = cupy.cuda.Event(disable_timing=True)
        self.array = np.empty(0, np.int32)
        self.pointer = 0

    def make(self, elements: int) -> None:
        """Have room for so many elements."""
        if len(self.array) >= elements:
            return
        import cupy

        size = 1 << (elements - 1).bit_length()
        memory = cupy.cuda.alloc_pinned_memory(4 * size)
        self.array = np.frombuffer(memory, np.int32, size)
        self.pointer = int(memory.ptr)

    def sent(self, stream: int) -> None:
        """Note that all that reads the buffer is queued on a stream."""
        import cupy

        cupy.cuda.runtime.eventRecord(self.event.ptr, stream)


class PinnedRing:
    """Buffers that are used in turn, each again when the GPU has read it."""

    def __init__(self, count: int) -> None:
        self._buffers = [PinnedBuffer() for _ in range(count)]
        self._turn = 0
        # Memory that is let go of may be reused at once: first it must have been read.
        finalizer = weakref.finalize(self, _wait_for, [buffer.event for buffer in self._buffers])
        finalizer.atexit = False

    def take(self, elements: int) -> PinnedBuffer:
        """The next buffer, with room for so many elements."""
        buffer = self._buffers[self._turn]
        self._turn = (self._turn + 1) % len(self._buffers)
        buffer.event.synchronize()
        buffer.make(elements)
        return buffer


def _wait_for(events: Iterable[Any]) -> None:
    for event in events:
        event.synchronize()


class Edits:
    """Changes of an int32 array on a GPU, each queued on a stream.

    Parameters
    ----------
    most_edits : int
        Most elements that `edit` changes.
    """

    def __init__(self, most_edits: int) -> None:
        self._most_edits = most_edits
        self._edits, self._copies = PinnedRing(EDIT_BUFFERS), PinnedRing(COPY_BUFFERS)

    def edit(self, pointer: int, write: Callable[[Int32Array], int], stream: WorkStream) -> None:
        """Queue a change of some elements.

        Parameters
        ----------
        pointer : int
            Where the array begins.
        write : callable
            Writes index and value of each edit into an int32 array, no index twice, and returns their number.
        stream : WorkStream
            CUDA stream to work on.
        """
        buffer = self._edits.take(2 * self._most_edits)
        count = write(buffer.array)
        if count == 0:
            return
        params = packed((pointer, buffer.pointer, count, 0), EDIT_PLAN_PARAMS)
        with stream.launches():
            edit_launch(stream.device)((EDIT_BLOCKS, 1, 1), params)
        buffer.sent(stream.handle)

    def replace(self, pointer: int, values: Int32Array, stream: WorkStream) -> None:
        """Queue a copy of `values` to the beginning of the array at `pointer`."""
        import cupy

        buffer = self._copies.take(len(values))
        buffer.array[: len(values)] = values
        cupy.cuda.runtime.memcpyAsync(pointer, buffer.pointer, 4 * len(values), HOST_TO_DEVICE, stream.handle)
        buffer.sent(stream.handle)


@functools.cache
def edit_launch(_device: int) -> Launch:
    """``edit_plan``, ready to launch."""
    return prepare(edit_config())
