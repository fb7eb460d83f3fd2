"""Runs that share a workspace take turns on the GPU, whatever their streams; the host never waits."""

from __future__ import annotations

import threading
from typing import Any

from fasttree_cupy.execution.readers import Readers
from fasttree_cupy.execution.streams import DEFAULT_STREAM, WorkStream, record_event, wait_for

__all__ = ["Turns"]


class Turns:
    """The order of the runs that share a workspace: each waits, on the GPU, for the one before it.

    Runs on the default stream alone cost nothing: that stream never ends, so an event is recorded on it only when
    another stream is to wait for it. Any other stream may be gone by then, and its handle may be another one's: an
    event follows each run, mostly the same one, as each run waits for the one before. A capture neither waits nor is
    waited for, which CUDA forbids: a graph's replays are its caller's to order.

    Attributes
    ----------
    lock : Lock
        To be held from `wait` to `end`, and for `readers`.
    readers : Readers
        The streams that use the plan's memory.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.readers = Readers()
        self._last: Any = None  # the event behind the last run
        self._again: Any = None  # that event, if it may be recorded again
        self._on_default = False  # or that run was on the default stream, and there is no event yet

    def has_none(self, stream: int) -> bool:
        """Whether work on a stream, given by its handle, has nothing to wait for and nothing to leave behind."""
        return self._on_default and stream == DEFAULT_STREAM

    def wait(self, stream: WorkStream) -> None:
        """Make `stream` wait for the last run."""
        if (self._on_default and stream.is_default) or stream.is_capturing:
            return
        if self._on_default:
            self._record(DEFAULT_STREAM)
        if self._last is not None:
            wait_for(stream.handle, self._last)

    def end(self, stream: WorkStream) -> Any:
        """Have the next run wait for what `stream` has queued; returns the event behind it, if there is one yet."""
        if stream.is_default:
            self._on_default = True
            return None
        if stream.is_capturing:
            return None
        self._record(stream.handle)
        return self._last

    def let_go(self) -> None:
        """Have the readers let go of the memory; newer work must not move on the event that it is held for."""
        self.readers.let_go()
        self._again = None

    def _record(self, stream: int) -> None:
        self._last = self._again = record_event(stream, self._again)
        self._on_default = False
