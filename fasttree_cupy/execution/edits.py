"""An array on a GPU that the host edits while the GPU works on: small changes in a launch, large ones in a copy.

The parameters of a launch are its own, so the host is free to write the next ones. What is copied waits in page-locked
memory until the GPU gets there, in buffers that are used in turn: the host waits for the GPU only where it has come so
far ahead that all of them are still to be read.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.execution.kernels import edit_config
from fasttree_cupy.execution.launch import POINTER_BYTES, Launch, LaunchAgain, prepare
from fasttree_cupy.execution.streams import WorkStream

__all__ = ["EDIT_PLAN_PARAMS", "Edits", "PinnedRing"]

Int32Array = npt.NDArray[np.int32]

EDITS_A_LAUNCH = 510
# Field by field struct EditPlanParams of cuda_src/edit_plan.cu.
EDIT_PLAN_PARAMS = np.dtype(
    [("packed", np.uint64), ("count", np.int32), ("padding", np.int32), ("edits", np.int32, (EDITS_A_LAUNCH, 2))]
)
COPY_BUFFERS = 2
"""Copies that the host may be ahead of the GPU."""
HOST_TO_DEVICE = 1
"""cudaMemcpyHostToDevice."""


class PinnedRing:
    """Buffers of page-locked host memory that are used in turn, each again when the GPU has read it.

    Parameters
    ----------
    count : int
        Number of buffers.
    """

    def __init__(self, count: int) -> None:
        import cupy

        self._events = [cupy.cuda.Event(disable_timing=True) for _ in range(count)]
        self._buffers = np.empty((count, 0), np.int32)
        self._turn = 0
        # Memory that is let go of may be reused at once: first it must have been read.
        finalizer = weakref.finalize(self, _wait_for, self._events)
        finalizer.atexit = False

    def take(self, elements: int) -> Int32Array:
        """The next buffer, int32, with room for so many elements."""
        self._turn = (self._turn + 1) % len(self._events)
        if self._buffers.shape[1] < elements:
            self._grow(elements)
        self._events[self._turn].synchronize()
        return self._buffers[self._turn, :elements]

    def sent(self, stream: int) -> None:
        """Note that all that reads the buffer last taken is queued on a stream."""
        import cupy

        cupy.cuda.runtime.eventRecord(self._events[self._turn].ptr, stream)

    def _grow(self, elements: int) -> None:
        """Make all buffers anew: to allocate page-locked memory takes some 0.2 ms, so it is done once for all."""
        import cupy

        _wait_for(self._events)
        size = 1 << (elements - 1).bit_length()
        memory = cupy.cuda.alloc_pinned_memory(4 * size * len(self._events))
        self._buffers = np.frombuffer(memory, np.int32, size * len(self._events)).reshape(-1, size)


def _wait_for(events: list[Any]) -> None:
    for event in events:
        event.synchronize()


class Edits:
    """Changes of an int32 array on a GPU, each queued on a stream.

    Attributes
    ----------
    next : int32 (EDITS_A_LAUNCH, 2)
        Where the first edits of `edit_again` lie: index and new value of each element.
    """

    def __init__(self) -> None:
        self._copies = PinnedRing(COPY_BUFFERS)
        self._parameters = bytearray(POINTER_BYTES + EDIT_PLAN_PARAMS.itemsize)
        fields = np.frombuffer(self._parameters, EDIT_PLAN_PARAMS, offset=POINTER_BYTES)
        self._packed, self._count, self.next = fields["packed"], fields["count"], fields["edits"][0]
        # Without fields: see `launch.packed`.
        plain = np.dtype((np.void, EDIT_PLAN_PARAMS.itemsize))
        self._params = np.ndarray((), plain, self._parameters, POINTER_BYTES)
        self._edited = 0
        self._again: LaunchAgain | None = None

    def edit(self, pointer: int, edits: Int32Array, stream: WorkStream) -> None:
        """Queue a change of some elements.

        Parameters
        ----------
        pointer : int
            Where the array begins.
        edits : int32 (n, 2)
            Index and new value of each element, no index twice.
        stream : WorkStream
            CUDA stream to work on.
        """
        if len(edits) == 0:
            return
        launch = edit_launch(stream.device)
        self._packed[0] = self._edited = pointer
        with stream.launches():
            for first in range(0, len(edits), EDITS_A_LAUNCH):
                part = edits[first : first + EDITS_A_LAUNCH]
                self._count[0] = len(part)
                self.next[: len(part)] = part
                launch((-(-len(part) // launch.block[0]), 1, 1), self._params)
        if self._again is None:
            self._again = LaunchAgain(launch, (-(-EDITS_A_LAUNCH // launch.block[0]), 1, 1), self._parameters)

    def can_edit_again(self, pointer: int) -> bool:
        """Whether the array at `pointer` is the one that was last edited, and the calling thread can `edit_again`."""
        return self._again is not None and self._edited == pointer and self._again.is_possible()

    def edit_again(self, count: int, edits: Int32Array, stream: int) -> None:
        """Queue the first `count` of `edits`, of which `next` has what fits, on a stream given by its handle."""
        if self._again is None:
            raise RuntimeError("edit_again does again what edit has done, expected it to have done something")
        for first in range(0, count, EDITS_A_LAUNCH):
            taken = min(EDITS_A_LAUNCH, count - first)
            if first > 0:
                self.next[:taken] = edits[first : first + taken]
            self._count[0] = taken
            self._again.launch(stream)

    def replace(self, pointer: int, values: Int32Array, stream: WorkStream) -> None:
        """Queue a copy of `values` to the beginning of the array at `pointer`."""
        import cupy

        buffer = self._copies.take(len(values))
        buffer[:] = values
        cupy.cuda.runtime.memcpyAsync(pointer, buffer.ctypes.data, buffer.nbytes, HOST_TO_DEVICE, stream.handle)
        self._copies.sent(stream.handle)


@functools.cache
def edit_launch(_device: int) -> Launch:
    """``edit_plan``, ready to launch."""
    return prepare(edit_config())
