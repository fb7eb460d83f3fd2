"""Measures forced plans on a GPU and fits both cost models to their times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np

from fasttree_cupy.execution import arrays, streams
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.schedule import BalancedSchedule, Schedule, SubtreeSchedule
from fasttree_cupy.planning.machine import Constants
from fasttree_cupy.tree import KVTree
from fasttree_cupy.tuning.fit import Fit, Measured, fit
from fasttree_cupy.tuning.samples import HEAD_DIM, Problem, item_samples, worker_samples
from fasttree_cupy.tuning.timing import time_cold

__all__ = ["problems", "tune"]

S = TypeVar("S")

_TREES = (
    ([1, 10], [4000, 400]),
    ([1, 16, 64], [1024, 256, 32]),
    ([1, 256], [256, 32]),
    ([1, 4, 16], [2048, 512, 256]),
    ([1, 2, 64], [8, 256, 32]),
    ([1, 4, 16, 512], [1024, 256, 128, 32]),
    ([1, 2, 4, 8, 16, 32, 64, 128], [16, 16, 16, 16, 16, 16, 16, 16]),
    ([1, 40], [0, 500]),
)
"""Nodes of each level and their tokens: shallow and deep, shared by all or by few, a few workers' work and many's."""
_HEADS = ((16, 1), (32, 8), (32, 32))
_QUICK_TREES, _QUICK_HEADS = 3, 2
_REPEATS, _QUICK_REPEATS = 11, 5
_BLOCK = 2**20
"""Random values that fill K and V, over and over."""


def problems(quick: bool) -> list[Problem]:
    """Trees and head layouts to be measured, fewer where it must be quick."""
    trees = [KVTree.from_levels(*levels) for levels in _TREES[: _QUICK_TREES if quick else None]]
    heads = _HEADS[: _QUICK_HEADS if quick else None]
    return [Problem(tree, *layout) for tree in trees for layout in heads]


def tune(device: int, start: Constants, quick: bool = False) -> dict[str, Fit[Any]]:
    """Measure a GPU and fit the constants of the cost models of the planners that serve it.

    Parameters
    ----------
    device : int
        The CUDA device, idle but for this.
    start : Constants
        What the fits begin with.
    quick : bool
        Whether to measure less.

    Returns
    -------
    dict
        Field of `Constants` -> its fit.

    Raises
    ------
    ValueError
        If no planner with a cost model serves the GPU.
    """
    place = f"cuda:{device}"
    problem = SubtreeSchedule.problem(place, 1, HEAD_DIM)
    if problem is not None:
        raise ValueError(f"there is nothing to tune: {problem}")
    with streams.use_device(device):
        timer = Timer(device, _QUICK_REPEATS if quick else _REPEATS)
        items = time_all(
            problems(quick),
            lambda problem: item_samples(problem, start.items),
            lambda problem, sample: SubtreeSchedule(sample.plan, problem.num_qo_heads, HEAD_DIM, place),
            timer,
        )
        fits: dict[str, Fit[Any]] = {"items": fit(start.items, *items)}
        if BalancedSchedule.problem(place, 1, HEAD_DIM) is None:
            workers = time_all(
                problems(quick),
                lambda problem: worker_samples(problem, int(start.items.multiprocessors), start.workers),
                lambda _, sample: BalancedSchedule(sample.plan, HEAD_DIM, place),
                timer,
            )
            fits["workers"] = fit(start.workers, *workers)
    return fits


def time_all(
    given: Sequence[Problem],
    samples_of: Callable[[Problem], Iterable[S]],
    schedule_of: Callable[[Problem, S], Schedule],
    timer: Timer,
) -> tuple[list[S], list[Measured]]:
    """Samples of each problem, and the times of their plans."""
    samples: list[S] = []
    times: list[Measured] = []
    for number, problem in enumerate(given):
        made = list(samples_of(problem))
        samples += made
        schedules = [schedule_of(problem, each) for each in made]
        times += [Measured(number, us) for us in timer.times_us(problem, schedules)]
    return samples, times


class Timer:
    """Times schedules on CuPy's current device and stream."""

    def __init__(self, device: int, repeats: int) -> None:
        import cupy

        self._repeats = repeats
        self._stream = streams.WorkStream(streams.current_stream("cupy", device), device)
        normal = np.random.default_rng(0).standard_normal(_BLOCK, np.float32)
        self._block = cupy.asarray(normal.astype(np.float16))

    def times_us(self, problem: Problem, schedules: Sequence[Schedule]) -> list[float]:
        """Median microseconds of each schedule on random Q, K and V, L2 cold."""
        tree, heads, kv_heads = problem
        q, out = (self._filled(name, tree.batch_size, heads) for name in ("q", "out"))
        k, v = (self._filled(name, tree.unique_tokens, kv_heads) for name in ("k", "v"))
        operands = Operands(q, k, v, out, HEAD_DIM**-0.5, -1.0)
        runs = {
            str(i): partial(schedule.run, operands, schedule.needs.place(None, self._stream), self._stream)
            for i, schedule in enumerate(schedules)
        }
        return [each["median_us"] for each in time_cold(runs, self._repeats).values()]

    def _filled(self, name: str, rows: int, heads: int) -> arrays.ArrayView:
        import cupy

        return arrays.view(name, cupy.resize(self._block, (rows, heads, HEAD_DIM)), self._stream)
