"""The package's honest GPU timing, a CUDA graph's time beside it, replayed with a warm L2, and planning's.

`time_cold` gives the host's time too, which is what a caller without a CUDA graph waits for where it is the longer one.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from fasttree_cupy.tuning.timing import WARM_UP_ROUNDS, elapsed_us, summarise, time_cold

__all__ = ["WARM_UP_ROUNDS", "summarise", "time_cold", "time_graph", "time_plan"]

Call = Callable[[], Any]

CALLS_IN_GRAPH = 10


def time_graph(run: Call, repeats: int) -> float:
    """Median time of a run in microseconds when a CUDA graph of several runs is replayed, L2 warm.

    Raises
    ------
    Exception
        Whatever CUDA or the run says where it cannot be captured.
    """
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    with stream, _torch_stream(stream):
        run()
        stream.synchronize()
        stream.begin_capture()
        try:
            for _ in range(CALLS_IN_GRAPH):
                run()
        finally:
            graph = stream.end_capture()
        graph.launch(stream)
        times = [elapsed_us(lambda: graph.launch(stream)) for _ in range(repeats)]
        stream.synchronize()
    return statistics.median(times) / CALLS_IN_GRAPH


def time_plan(plan: Call, synchronize: Call, repeats: int = 3) -> tuple[Any, float]:
    """What ``plan()`` returns, and its median time in milliseconds after a first call that compiles."""
    result = plan()
    times = []
    for _ in range(repeats):
        synchronize()
        start = time.perf_counter()
        result = plan()
        synchronize()
        times.append(1000 * (time.perf_counter() - start))
    return result, statistics.median(times)


def _torch_stream(stream: Any) -> AbstractContextManager[Any]:
    """Make a CuPy stream torch's current one as well, where torch is loaded."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return nullcontext()
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))  # type: ignore[no-any-return]
