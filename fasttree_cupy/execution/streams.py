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
    "ForeignStream",
    "WorkStream",
    "current_stream",
    "keep_alive",
    "stream_handle",
    "use_device",
    "use_stream",
]


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

    Attributes
    ----------
    handle : int
        The stream's handle.
    device : int
        Index of its GPU, which must be CuPy's current device.
    """

    __slots__ = ("_current", "_followed", "device", "handle")

    def __init__(self, handle: int, device: int) -> None:
        self.handle = handle
        self.device = device
        self._current: dict[str, int] = {}
        self._followed: set[str] = set()

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
        if current == self.handle:
            return
        import cupy

        event = cupy.cuda.Event(disable_timing=True)
        cupy.cuda.runtime.eventRecord(event.ptr, current)
        cupy.cuda.runtime.streamWaitEvent(self.handle, event.ptr)

    def launches(self) -> AbstractContextManager[Any]:
        """Make the stream CuPy's current one, the one that RawKernel launches on."""
        if self.current("cupy") == self.handle:
            return nullcontext()
        return use_stream(self.handle, self.device)

    def keep_borrowed(self, views: Iterable[ArrayView], own: object = None) -> None:
        """Hold what could be reused before the stream has read it (see `keep_alive`).

        That is, what belongs to a framework that frees memory in another order than that of the stream: torch and CuPy
        where their current stream is another one, all others always. Under a capture nothing is held: a graph's memory
        is its caller's to keep.

        Parameters
        ----------
        views : iterable of ArrayView
            The caller's arrays.
        own : object, optional
            Holder of our own memory, which is CuPy's.
        """
        owners = [view.owner for view in views if not self._reused_in_order(view.framework)]
        if own is not None and not self._reused_in_order("cupy"):
            owners.append(own)
        if owners and not is_capturing(self.handle):
            keep_alive(self.handle, owners)

    def _reused_in_order(self, framework: str) -> bool:
        return framework in ("torch", "cupy") and self.current(framework) == self.handle


_in_use: deque[tuple[Any, tuple[object, ...]]] = deque()
_in_use_lock = threading.Lock()


def keep_alive(stream: int, owners: Iterable[object]) -> None:
    """Hold `owners` until what `stream` has queued so far is done; the host does not wait.

    A framework reuses freed memory in the order of a stream of its own. Where that is not ours, an input dropped or
    donated after our call could be overwritten while the kernels still read it. What is done is let go of by the next
    call.
    """
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    cupy.cuda.runtime.eventRecord(event.ptr, stream)
    with _in_use_lock:
        _in_use.append((event, tuple(owners)))
        while _in_use and _in_use[0][0].done:
            _in_use.popleft()


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
