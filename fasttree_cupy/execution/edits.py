"""Arrays on a GPU that the host edits while the GPU works on: small changes in one launch, large ones in one copy.

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

from fasttree_cupy.execution.cuda import Launch, prepare
from fasttree_cupy.execution.kernels import edit_config
from fasttree_cupy.execution.streams import WorkStream, is_capturing

__all__ = ["EDIT_PLAN_PARAMS", "EditableArray", "PinnedRing"]

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

    def take(self, elements: int) -> tuple[int, PinnedBuffer]:
        """The number of the next buffer, and the buffer, with room for so many elements."""
        number = self._turn
        buffer = self._buffers[number]
        self._turn = (number + 1) % len(self._buffers)
        buffer.event.synchronize()
        buffer.make(elements)
        return number, buffer


def _wait_for(events: Iterable[Any]) -> None:
    for event in events:
        event.synchronize()


class EditableArray:
    """An int32 array on a GPU, of zeros at first, that keeps its place while the host changes it.

    Parameters
    ----------
    elements, most_edits : int
        Elements of the array, and most edits of a change.
    device : int
        Index of the GPU, which must be CuPy's current device.
    """

    def __init__(self, elements: int, most_edits: int, device: int) -> None:
        import cupy

        self.array = cupy.zeros(elements, np.int32)
        cupy.cuda.get_current_stream().synchronize()  # any stream may use it
        self._device = device
        self._most_edits = most_edits
        self._edits, self._copies = PinnedRing(EDIT_BUFFERS), PinnedRing(COPY_BUFFERS)
        self._params: dict[int, Any] = {}  # of each buffer of edits: its address never changes
        self._changed: tuple[int, Any] | None = None  # the last change's stream, and the event after it

    def edit(self, write: Callable[[Int32Array], int], stream: WorkStream) -> None:
        """Queue a change of some elements.

        Parameters
        ----------
        write : callable
            Writes index and value of each edit into an int32 array, no index twice, and returns their number.
        stream : WorkStream
            CUDA stream to work on.
        """
        number, buffer = self._edits.take(2 * self._most_edits)
        count = write(buffer.array)
        if count == 0:
            return
        params = self._params.get(number)
        if params is None:
            params = np.array((self.array.data.ptr, buffer.pointer, 0, 0), EDIT_PLAN_PARAMS)
            self._params[number] = params
        params["count"] = count
        launch = edit_launch(self._device)
        with stream.launches():
            launch((EDIT_BLOCKS, 1, 1), params)
        buffer.sent(stream.handle)
        self._changed = (stream.handle, buffer.event)

    def replace(self, values: Int32Array, stream: WorkStream) -> None:
        """Queue a copy of `values` to the array's beginning."""
        import cupy

        _, buffer = self._copies.take(len(values))
        buffer.array[: len(values)] = values
        cupy.cuda.runtime.memcpyAsync(
            self.array.data.ptr, buffer.pointer, 4 * len(values), HOST_TO_DEVICE, stream.handle
        )
        buffer.sent(stream.handle)
        self._changed = (stream.handle, buffer.event)

    def let_wait(self, stream: WorkStream) -> None:
        """Make a stream wait for the last change, where that is on another one and the stream is not being captured."""
        if self._changed is None or self._changed[0] == stream.handle or is_capturing(stream.handle):
            return
        import cupy

        cupy.cuda.runtime.streamWaitEvent(stream.handle, self._changed[1].ptr)


@functools.cache
def edit_launch(_device: int) -> Launch:
    """``edit_plan``, ready to launch."""
    return prepare(edit_config())
