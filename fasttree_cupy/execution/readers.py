"""Which streams may still use a plan's memory, so that it is held for them once the plan lets go of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fasttree_cupy.execution import streams
from fasttree_cupy.execution.streams import WorkStream

if TYPE_CHECKING:
    from fasttree_cupy.execution.plan_memory import PlanMemory

__all__ = ["Readers"]

MOST_EVENTS = 8
"""Streams from which on it is looked which of them are done."""


class Readers:
    """The streams beside its own that use a plan's memory.

    CuPy reuses freed memory in the order of the stream that was its current one when the memory was allocated. On any
    other stream an event follows each run: the same one each time, as a new one would have to be kept, asked and
    dropped.

    Attributes
    ----------
    memory : PlanMemory or None
        What is held.
    """

    def __init__(self) -> None:
        self.memory: PlanMemory | None = None
        self._events: dict[int, Any] = {}  # by the handle of their stream

    def add(self, stream: WorkStream, memory: PlanMemory, behind: Any = None) -> None:
        """Note that a stream uses a memory, which may have been let go of meanwhile. By one thread at a time.

        Parameters
        ----------
        stream : WorkStream
            Not held for where it is being captured: a graph's memory is its caller's to keep.
        memory : PlanMemory
            What it uses.
        behind : event, optional
            One that follows all that other streams have queued with this memory, too.
        """
        if stream.handle == memory.home or stream.is_capturing:
            return
        if memory is not self.memory:  # let go of in another thread since the run was given it
            streams.keep_alive(streams.record_event(stream.handle), [memory])
            return
        if behind is not None:
            self._events[memory.home] = behind  # a place that no stream takes: on its own one, none is needed
            return
        event = self._events.get(stream.handle)
        if event is not None:
            # The handle may be another stream's by now: what the event stood for comes first.
            streams.wait_for(stream.handle, event)
        self._events[stream.handle] = streams.record_event(stream.handle, event)
        if len(self._events) > MOST_EVENTS:
            self._events = {handle: event for handle, event in self._events.items() if not event.done}

    def let_go(self) -> None:
        """Hold the memory until all these streams are done, and no longer."""
        events, self._events = self._events, {}
        for event in events.values():
            streams.keep_alive(event, [self.memory])
        self.memory = None
