"""CUDA streams: which one to work on, and what waits for what."""

from __future__ import annotations

import functools
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttree_cupy.execution.arrays import ArrayView

__all__ = [
    "DEFAULT_STREAM",
    "ForeignStream",
    "WorkStream",
    "current_stream",
    "current_stream_of",
    "keep_alive",
    "record_event",
    "stream_handle",
    "use_device",
    "use_stream",
    "wait_for",
]

DEFAULT_STREAM = 0
"""Handle of the legacy default stream, which every process has; 1 is another name of it."""


def stream_handle(stream: Any, framework: str, device_index: int) -> int:
    """The handle (``cudaStream_t`` as an int) of the stream to work on.

    Parameters
    ----------
    stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, or None
        None stands for the caller's current stream: torch's for torch tensors, CuPy's for all others.
    framework : str
        Whose arrays the work is for, as in ``ArrayView.framework``.
    device_index : int
        The GPU on which the work runs.

    Raises
    ------
    TypeError
        If `stream` is none of these.
    ValueError
        If the handle is negative.
    """
    if stream is None:
        return current_stream(framework, device_index)
    handle = _explicit_handle(stream)
    if not isinstance(handle, int) or isinstance(handle, bool):
        raise TypeError(
            f"stream is {stream!r}, expected None, an int, a CuPy stream, "
            "or an object with __cuda_stream__ or cuda_stream"
        )
    if handle < 0:
        raise ValueError(f"stream is {handle}, expected the handle of a CUDA stream, which is not negative")
    return handle


def _explicit_handle(stream: Any) -> Any:
    if isinstance(stream, (int, type)):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        answer = protocol() if callable(protocol) else protocol
        return answer[1] if isinstance(answer, tuple) and len(answer) == 2 else None
    if hasattr(stream, "cuda_stream"):  # torch.cuda.Stream before it had __cuda_stream__
        return stream.cuda_stream
    return None


def current_stream(framework: str, device_index: int) -> int:
    """The handle of the stream on which `framework` queues work for this GPU; CuPy's for all but torch."""
    return current_stream_of(framework)(device_index)


@functools.cache
def current_stream_of(framework: str) -> Callable[[int], int]:
    """What gives the handle of the stream on which `framework` queues work for a GPU, by its index."""
    if framework != "torch":
        import cupy

        return lambda device_index: int(cupy.cuda.get_current_stream(device_index).ptr)
    torch = sys.modules["torch"]
    # What Triton and Inductor call for each launch; torch.cuda.current_stream builds an object each time.
    raw_stream: Callable[[int], int] | None = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw_stream or (lambda device_index: int(torch.cuda.current_stream(device_index).cuda_stream))


class WorkStream:
    """The CUDA stream that one call works on, and the frameworks' current streams beside it.

    A look at a current stream costs about a microsecond: one a framework and call is enough.

    Attributes
    ----------
    handle : int
        The stream's handle.
    device : int
        Index of its GPU, which must be CuPy's current device.
    is_default : bool
        Whether this is the legacy default stream.
    """

    __slots__ = ("_capturing", "_current", "_followed", "device", "handle", "is_default")

    def __init__(self, handle: int, device: int) -> None:
        self.handle = handle
        self.device = device
        self.is_default = handle <= 1
        self._current: dict[str, int] = {}
        self._followed: set[str] = set()
        self._capturing: bool | None = None

    @classmethod
    def of(cls, stream: Any, framework: str, device: int) -> WorkStream:
        """The stream of a call: see `stream_handle`."""
        work = cls(stream_handle(stream, framework, device), device)
        if stream is None:
            work._current[framework] = work.handle
        return work

    @property
    def is_capturing(self) -> bool:
        """Whether the stream is being captured into a CUDA graph; the legacy default stream cannot be."""
        if self._capturing is None:
            self._capturing = not self.is_default and is_capturing(self.handle)
        return self._capturing

    def current(self, framework: str) -> int:
        """The handle of the stream that was `framework`'s current one when first asked for."""
        current = self._current.get(framework)
        if current is None:
            current = self._current[framework] = current_stream(framework, self.device)
        return current

    def follow(self, framework: str) -> None:
        """Make the stream wait for what `framework` has queued on its current stream, where these are two."""
        if framework in self._followed:
            return
        self._followed.add(framework)
        current = self.current(framework)
        if current != self.handle:
            wait_for(self.handle, record_event(current))

    def launches(self) -> AbstractContextManager[Any]:
        """Make the stream CuPy's current one, the one that RawKernel launches on."""
        if self.current("cupy") == self.handle:
            return nullcontext()
        return use_stream(self.handle, self.device)

    def keep_borrowed(self, views: Sequence[ArrayView]) -> None:
        """Hold the caller's arrays that could be reused before the stream has read them (see `keep_alive`).

        That is, what belongs to a framework that frees memory in another order than that of the stream: torch and CuPy
        where their current stream is another one, all others always. Under a capture nothing is held: a graph's memory
        is its caller's to keep.
        """
        others = {name for name in {view.framework for view in views} if not self._reused_in_order(name)}
        owners = [view.owner for view in views if view.framework in others]
        if owners and not self.is_capturing:
            keep_alive(record_event(self.handle), owners)

    def _reused_in_order(self, framework: str) -> bool:
        return framework in ("torch", "cupy") and self.current(framework) == self.handle


_in_use: deque[tuple[Any, tuple[object, ...]]] = deque()
_in_use_lock = threading.RLock()
"""A collection of garbage may come at any line, and a plan that it finds may have something to hold."""


def keep_alive(event: Any, owners: Iterable[object]) -> None:
    """Hold `owners` until an event has passed; the host does not wait.

    A framework reuses freed memory in the order of a stream of its own. Where that is not ours, an input dropped or
    donated after our call could be overwritten while the kernels still read it. What is done is let go of by the next
    call.
    """
    with _in_use_lock:
        _in_use.append((event, tuple(owners)))
        done = _take_done()
    del done  # outside the lock: what an owner's end runs may come back here


def _take_done() -> list[Any]:
    """Take out what is held for events that have passed, up to the first that has not."""
    done = []
    while _in_use:
        first = _in_use.popleft()  # before its event is asked: a collection of garbage meanwhile may lead here, too
        is_done = False
        try:
            is_done = first[0].done
        finally:  # also where CUDA refuses to say
            if not is_done:
                _in_use.appendleft(first)
        if not is_done:
            break
        done.append(first)
    return done


def record_event(stream: int, event: Any = None) -> Any:
    """The event, or a new one, behind what a stream has queued; a wait that was queued stays for what it was before."""
    import cupy

    if event is None:
        event = cupy.cuda.Event(disable_timing=True)
    cupy.cuda.runtime.eventRecord(event.ptr, stream)
    return event


def wait_for(stream: int, event: Any) -> None:
    """Make a stream wait for an event; the host does not."""
    import cupy

    cupy.cuda.runtime.streamWaitEvent(stream, event.ptr)


def is_capturing(stream: int) -> bool:
    """Whether a stream is being captured into a CUDA graph."""
    import cupy

    return bool(cupy.cuda.runtime.streamIsCapturing(stream))


class ForeignStream:
    """A stream handle in the form that CuPy adopts: an object with ``__cuda_stream__``."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        """Return the protocol's version and the handle."""
        return (0, self.handle)


def use_device(index: int) -> AbstractContextManager[Any]:
    """Make a GPU the current device."""
    import cupy

    if cupy.cuda.runtime.getDevice() == index:
        return nullcontext()
    return cupy.cuda.Device(index)  # type: ignore[no-any-return]


def use_stream(handle: int, device: int) -> AbstractContextManager[Any]:
    """Make a stream CuPy's current one, the one that RawKernel launches on."""
    import cupy

    if cupy.cuda.get_current_stream(device).ptr == handle:
        return nullcontext()
    return cupy.cuda.Stream.from_external(ForeignStream(handle))  # type: ignore[no-any-return]
