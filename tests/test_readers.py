"""What a plan's memory is held for: streams that still use it, and no longer."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

import pytest

from fasttree_cupy.execution import streams
from fasttree_cupy.execution.readers import MOST_EVENTS, Readers


@dataclass(eq=False)
class Event:
    """One behind what a stream has queued."""

    stream: int
    done: bool = False


class Gpu:
    """Events and waits, written down."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made: list[Event] = []
        self.waits: list[tuple[int, Event]] = []
        monkeypatch.setattr(streams, "record_event", self.record)
        monkeypatch.setattr(streams, "wait_for", lambda stream, event: self.waits.append((stream, event)))

    def record(self, stream: int, event: Event | None = None) -> Event:
        if event is None:
            self.made.append(Event(stream))
            return self.made[-1]
        event.stream, event.done = stream, False
        return event


@dataclass
class Stream:
    """What `Readers` asks of a WorkStream."""

    handle: int
    is_capturing: bool = False


@dataclass(eq=False)
class Memory:
    """Something to hold, and the handle of its own stream."""

    home: int = 0


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


def readers_of(memory: Any) -> Readers:
    readers = Readers()
    readers.memory = memory
    return readers


def add(readers: Readers, stream: int, memory: Any = None, behind: Any = None, capturing: bool = False) -> None:
    work: Any = Stream(stream, capturing)
    readers.add(work, memory or readers.memory, behind)


def dropped(readers: Readers) -> weakref.ref[Any]:
    """What is left of the memory that the readers are told to let go of."""
    memory = weakref.ref(readers.memory)
    readers.let_go()
    return memory


def test_memory_is_not_held_for_its_own_stream_or_a_captured_one(gpu: Gpu) -> None:
    readers = readers_of(Memory(5))
    for memory in (None, Memory(5)):
        add(readers, 5, memory)
        add(readers, 7, memory, capturing=True)
    assert dropped(readers)() is None
    assert gpu.made == []


def test_one_event_follows_a_streams_runs(gpu: Gpu) -> None:
    readers = readers_of(Memory())
    for stream in (5, 5, 6, 5):
        add(readers, stream)
    first, second = gpu.made
    assert (first.stream, second.stream) == (5, 6)
    assert gpu.waits == [(5, first), (5, first)]  # the handle may be another stream's by now


def test_memory_is_held_until_all_its_streams_are_done(gpu: Gpu) -> None:
    readers = readers_of(Memory())
    add(readers, 5)
    add(readers, 6)
    memory = dropped(readers)
    for event in gpu.made:
        assert memory() is not None
        event.done = True
        streams.keep_alive(Event(0, done=True), [])
    assert memory() is None
    readers.memory = Memory()  # type: ignore[assignment]
    assert dropped(readers)() is None  # what comes next is not held for them


def test_a_memory_that_was_let_go_of_before_the_run_is_held_for_it(gpu: Gpu) -> None:
    readers, memory = readers_of(Memory()), Memory()
    before = weakref.ref(memory)
    add(readers, 5, memory, behind=Event(5))  # which newer work may move on
    del memory
    assert before() is not None
    (event,) = gpu.made
    event.done = True
    streams.keep_alive(Event(0, done=True), [])
    assert before() is None
    assert dropped(readers)() is None


def test_the_event_of_a_turn_is_enough(gpu: Gpu) -> None:
    readers, behind = readers_of(Memory()), Event(6)
    for stream in (5, 6, 5):
        add(readers, stream, behind=behind)
    memory = dropped(readers)
    assert memory() is not None
    behind.done = True
    streams.keep_alive(Event(0, done=True), [])
    assert memory() is None
    assert gpu.made == []


def test_streams_that_are_done_are_forgotten(gpu: Gpu) -> None:
    readers = readers_of(Memory())
    for stream in range(1, 100):
        add(readers, stream)
        if stream < 99:
            gpu.made[-1].done = True
    assert len(readers._events) <= MOST_EVENTS
    memory = dropped(readers)
    assert memory() is not None
    gpu.made[-1].done = True
    streams.keep_alive(Event(0, done=True), [])
    assert memory() is None


def test_what_cuda_does_not_tell_of_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused:
        capturing = True

        @property
        def done(self) -> bool:
            if self.capturing:
                raise RuntimeError("a stream is being captured")
            return True

    monkeypatch.setattr(streams, "_in_use", deque())
    event, owner = Refused(), Memory()
    gone = weakref.ref(owner)
    with pytest.raises(RuntimeError, match="being captured"):
        streams.keep_alive(event, [owner])
    del owner
    gc.collect()
    assert gone() is not None
    event.capturing = False
    streams.keep_alive(Event(0, done=True), [])
    assert gone() is None


def test_what_an_owners_end_holds_is_no_trouble(gpu: Gpu) -> None:
    class Owner:
        def __del__(self) -> None:
            streams.keep_alive(Event(0, done=True), [])

    owner = Owner()
    streams.keep_alive(Event(0, done=True), [owner])
    gone = weakref.ref(owner)
    del owner
    streams.keep_alive(Event(0, done=True), [])
    assert gone() is None
