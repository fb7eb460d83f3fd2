"""Honest GPU timing: L2 flushed before every run, CUDA events, contestants interleaved, median and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["WARM_UP_ROUNDS", "elapsed_us", "summarise", "time_cold"]

Call = Callable[[], Any]

FLUSH_BYTES = 512 * 2**20
"""Several times the largest L2."""
WARM_UP_ROUNDS = 2
MOST_FLUSHES = 64
HEAD_START = 1.5
"""The flushes before a run last this many times as long as the host needs to queue it. So the run waits in the stream
when the GPU gets there, and what stands between the two events is the GPU's time alone."""


def time_cold(runs: Mapping[str, Call], repeats: int) -> dict[str, dict[str, float]]:
    """Time each run with a cold L2 on CuPy's current stream.

    Parameters
    ----------
    runs : mapping of str to callable
        What to time; each queues its work on the current stream and returns. Every round runs all of them in turn, so
        that a drift of the clock hits all.
    repeats : int
        Timed rounds, at least 2.

    Returns
    -------
    dict
        Name -> ``median_us``, ``p10_us``, ``p90_us``, and ``host_us``, the median time to queue the run.
    """
    import cupy

    flush = cupy.empty(FLUSH_BYTES, dtype=cupy.uint8)
    flush_us = min(elapsed_us(lambda: flush.fill(1)) for _ in range(5))
    flushes = dict.fromkeys(runs, 1)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    host: dict[str, list[float]] = {name: [] for name in runs}
    for this_round in range(WARM_UP_ROUNDS + repeats):
        for name, run in runs.items():
            for _ in range(flushes[name]):
                flush.fill(this_round % 251)
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            queued = time.perf_counter()
            run()
            host_us = 1e6 * (time.perf_counter() - queued)
            stop.record()
            if this_round < WARM_UP_ROUNDS:
                flushes[name] = min(MOST_FLUSHES, 1 + int(HEAD_START * host_us / flush_us))
            else:
                events[name].append((start, stop))
                host[name].append(host_us)
        cupy.cuda.get_current_stream().synchronize()
    times = {name: [1000 * cupy.cuda.get_elapsed_time(*pair) for pair in pairs] for name, pairs in events.items()}
    return {name: summarise(values) | {"host_us": statistics.median(host[name])} for name, values in times.items()}


def summarise(values: list[float]) -> dict[str, float]:
    """Median and spread of two or more times."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {"median_us": statistics.median(values), "p10_us": deciles[0], "p90_us": deciles[-1]}


def elapsed_us(run: Call) -> float:
    """Time of one run between two events on the current stream, waiting for it."""
    import cupy

    start, stop = cupy.cuda.Event(), cupy.cuda.Event()
    start.record()
    run()
    stop.record()
    stop.synchronize()
    return float(1000 * cupy.cuda.get_elapsed_time(start, stop))
