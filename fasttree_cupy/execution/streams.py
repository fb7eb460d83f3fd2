"""CUDA streams: which one to work on, and what waits for what."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fasttree_cupy.execution.arrays import ArrayView

__all__ = [
    "DEFAULT_STREAM",
    "ForeignStream",
    "WorkStream",
    "current_stream",
    "keep_alive",
    "record_event",
    "stream_handle",
    "use_device",
    "use_stream",
    "wait_for",
    "work_stream",
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
    if framework != "torch":
        import cupy

        return int(cupy.cuda.get_current_stream(device_index).ptr)
    torch = sys.modules["torch"]
    # What Triton and Inductor call for each launch; torch.cuda.current_stream builds an object each time.
    raw_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    if raw_stream is None:
        return int(torch.cuda.current_stream(device_index).cuda_stream)
    return int(raw_stream(device_index))


class WorkStream:
    """The CUDA stream that one call works on, and the frameworks' current streams beside it.

    A look at a current stream costs about a microsecond: one a framework and call is enough.

    Parameters
    ----------
    handle, device : int
        See below.
    current_of : str, optional
        Framework whose current stream this is.

    Attributes
    ----------
    handle : int
        The stream's handle.
    device : int
        Index of its GPU, which must be CuPy's current device.
    is_default : bool
        Whether this is the legacy default stream.
    """

    __slots__ = ("_capturing", "_current", "_followed", "_mark", "device", "handle", "is_default")

    def __init__(self, handle: int, device: int, current_of: str | None = None) -> None:
        self.handle = handle
        self.device = device
        self.is_default = handle <= 1
        self._current: dict[str, int] = {} if current_of is None else {current_of: handle}
        self._followed: set[str] = set()
        self._capturing: bool | None = None
        self._mark: Any = None

    @property
    def is_capturing(self) -> bool:
        """Whether the stream is being captured into a CUDA graph; the legacy default stream cannot be."""
        if self._capturing is None:
            self._capturing = not self.is_default and is_capturing(self.handle)
        return self._capturing

    def mark(self) -> Any:
        """The event behind what the stream had queued when first asked for it."""
        if self._mark is None:
            self._mark = record_event(self.handle)
        return self._mark

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

    def keep_borrowed(self, views: Iterable[ArrayView], own: object = None, home: int = 0) -> None:
        """Hold what could be reused before the stream has read it (see `keep_alive`).

        That is, what belongs to a framework that frees memory in another order than that of the stream: torch and CuPy
        where their current stream is another one, all others always. Under a capture nothing is held: a graph's memory
        is its caller's to keep.

        Parameters
        ----------
        views : iterable of ArrayView
            The caller's arrays.
        own : object, optional
            Holder of our own memory.
        home : int
            The stream in whose order CuPy reuses that: the one that was its current one when it was allocated.
        """
        views = tuple(views)
        others = {name for name in {view.framework for view in views} if not self._reused_in_order(name)}
        owners: list[object] = [view.owner for view in views if view.framework in others] if others else []
        if own is not None and home != self.handle:
            owners.append(own)
        if owners and not self.is_capturing:
            keep_alive(self.mark(), owners)

    def _reused_in_order(self, framework: str) -> bool:
        return framework in ("torch", "cupy") and self.current(framework) == self.handle


def work_stream(stream: Any, framework: str, device_index: int) -> WorkStream:
    """The stream that a call works on; parameters and errors as of `stream_handle`."""
    handle = stream_handle(stream, framework, device_index)
    return WorkStream(handle, device_index, framework if stream is None else None)


_in_use: deque[tuple[Any, tuple[object, ...]]] = deque()
_in_use_lock = threading.Lock()


def keep_alive(event: Any, owners: Iterable[object]) -> None:
    """Hold `owners` until an event has passed; the host does not wait.

    A framework reuses freed memory in the order of a stream of its own. Where that is not ours, an input dropped or
    donated after our call could be overwritten while the kernels still read it. What is done is let go of by the next
    call.
    """
    with _in_use_lock:
        _in_use.append((event, tuple(owners)))
        done = []  # dropped outside the lock: what an owner's end runs may come back here
        while _in_use and _in_use[0][0].done:
            done.append(_in_use.popleft())
    del done


def record_event(stream: int) -> Any:
    """A new event behind what a stream has queued."""
    import cupy

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
