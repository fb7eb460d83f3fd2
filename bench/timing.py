"""Honest GPU timing: L2 flushed before every run, CUDA events, medians, contestants interleaved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

__all__ = ["time_cold"]

FLUSH_BYTES = 512 * 2**20
"""Several times the largest L2. Writing it also takes longer than the host needs to queue a run, so that what stands
between the two events is the GPU's time and not the host's."""


def time_cold(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
    """Time each run with a cold L2, in turn, on CuPy's current stream.

    Parameters
    ----------
    runs : mapping of str to callable
        What to time; each queues its work on the current stream and returns.
    repeats : int
        Timed rounds, after two warm-up rounds.

    Returns
    -------
    dict
        Name -> ``median_us``, ``p10_us``, ``p90_us``.
    """
    import cupy

    flush = cupy.empty(FLUSH_BYTES, dtype=cupy.uint8)
    events: dict[str, list[tuple[Any, Any]]] = {name: [] for name in runs}
    for repeat in range(repeats + 2):
        for name, run in runs.items():
            flush.fill(repeat % 251)
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            run()
            stop.record()
            if repeat >= 2:
                events[name].append((start, stop))
        cupy.cuda.get_current_stream().synchronize()
    times = {name: [1000 * cupy.cuda.get_elapsed_time(*pair) for pair in pairs] for name, pairs in events.items()}
    return {name: summarise(values) for name, values in times.items()}


def summarise(values: list[float]) -> dict[str, float]:
    """Median and spread of a list of times."""
    deciles = statistics.quantiles(values, n=10)
    return {"median_us": statistics.median(values), "p10_us": deciles[0], "p90_us": deciles[-1]}
