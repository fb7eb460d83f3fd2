"""Plans with row groups, workers, tile shapes or cuts that are forced, and what a cost model says of each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.planning import balanced, subtree
from fasttree_cupy.planning.balanced import GROUP_ROWS, STEP_TOKENS, BalancedPlan
from fasttree_cupy.planning.dealing import estimate_us
from fasttree_cupy.planning.layout import depth_first, lay_out
from fasttree_cupy.planning.machine import Machine, WorkerMachine
from fasttree_cupy.planning.row_tiles import tile_tokens
from fasttree_cupy.planning.subtree import SubtreePlan, TileShape
from fasttree_cupy.tree import KVTree

__all__ = ["HEAD_DIM", "ItemSample", "Problem", "WorkerSample", "item_samples", "worker_samples"]

Float64Array = npt.NDArray[np.float64]

HEAD_DIM = 128
"""Of all samples: the cost models scale a step by it."""
_SHARES = (1.0, 0.5, 0.25, 0.12)
"""Shares of the multiprocessors that get work."""
_LIMITS = (6, 24, 96, 1 << 30)
"""Limits of an item's length, in steps of a warp."""


class Problem(NamedTuple):
    """A tree, and its query heads and KV heads."""

    tree: KVTree
    num_qo_heads: int
    num_kv_heads: int


class WorkerSample(NamedTuple):
    """A plan of ``balanced``, and what its time depends on.

    Attributes
    ----------
    plan : BalancedPlan
    loads : float64 (W, 3)
        Steps of each worker whose tokens are seen together, steps whose tokens are not, and items.
    size : float
        Bytes of K, V, Q and O.
    """

    plan: BalancedPlan
    loads: Float64Array
    size: float

    def estimate_us(self, machine: WorkerMachine) -> float:
        """The cost model's estimate."""
        rates = machine.one_group if self.plan.row_groups == 1 else machine.two_groups
        busiest_us = float((self.loads @ np.array(rates)).max())
        pieces = int(self.plan.items[:, balanced.ITEM_FIELDS.index("pieces")].max())
        alone = len(self.plan.items) == self.plan.workers
        return estimate_us(busiest_us, self.size / machine.hbm, pieces, alone, machine)


class ItemSample(NamedTuple):
    """A plan of ``subtree``, and what was forced."""

    plan: SubtreePlan
    problem: Problem
    shape: TileShape
    limit: int

    def estimate_us(self, machine: Machine) -> float:
        """The cost model's estimate."""
        return item_plan(self.problem, machine, self.shape, self.limit).estimate_us


def worker_samples(problem: Problem, multiprocessors: int, machine: WorkerMachine) -> Iterator[WorkerSample]:
    """Plans for one row group and two, for many workers and few, cut as is cheapest and as if merging cost nothing.

    Parameters
    ----------
    problem : Problem
        With at most 64 query heads a KV head.
    multiprocessors : int
        Workers, at most.
    machine : WorkerMachine
        Constants by which plans are cut.
    """
    tree, heads, kv_heads = problem
    group = heads // kv_heads
    request_order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, None)
    size = balanced.bytes_moved(tree.unique_tokens, tree.batch_size, (group, kv_heads, HEAD_DIM))
    free = machine._replace(merge=0.0, merge_piece=0.0, merge_together=0.0, merge_together_piece=0.0)
    known = set()
    for row_groups, step_tokens in STEP_TOKENS.items():
        tile_requests = row_groups * GROUP_ROWS // group
        tokens, together = tile_tokens(layout, tree.batch_size, group, tile_requests)
        shares = together / np.maximum(tokens, 1)
        for workers in sorted({max(1, int(share * multiprocessors)) for share in _SHARES}):
            for cuts in (machine, free):
                plan = balanced.plan_layout(layout, request_order, group, kv_heads, HEAD_DIM, workers, cuts, row_groups)
                key = plan.items.tobytes()
                if key not in known:
                    known.add(key)
                    yield WorkerSample(plan, loads_of(plan, shares, tile_requests, step_tokens), size)


def loads_of(plan: BalancedPlan, shares: Float64Array, tile_requests: int, step_tokens: int) -> Float64Array:
    """See `WorkerSample.loads`; `shares` of each tile's tokens are seen together."""
    columns = {name: plan.items[:, i] for i, name in enumerate(balanced.ITEM_FIELDS)}
    steps = -(-columns["tokens"] // step_tokens)
    seen = shares[columns["first_position"] // tile_requests]
    # A worker begins with the item of its number, and each item names its next.
    worker = np.full(len(plan.items), -1)
    worker[: plan.workers] = np.arange(plan.workers)
    for item, following in enumerate(columns["next"].tolist()):
        if following >= 0:
            worker[following] = worker[item]
    loads = np.zeros((plan.workers, 3))
    np.add.at(loads, worker, np.stack([steps * seen, steps * (1 - seen), np.ones(len(steps))], axis=1))
    return loads


def item_samples(problem: Problem, machine: Machine) -> Iterator[ItemSample]:
    """Plans with each shape of tiles, cut short, long and not at all.

    Parameters
    ----------
    problem : Problem
        With at most 64 query heads a KV head.
    machine : Machine
        The GPU.
    """
    known = set()
    for shape in subtree.tile_shapes(problem.num_qo_heads // problem.num_kv_heads, HEAD_DIM):
        for limit in _LIMITS:
            plan = item_plan(problem, machine, shape, limit)
            key = (shape, plan.items.tobytes(), plan.segments.tobytes())
            if key not in known:
                known.add(key)
                yield ItemSample(plan, problem, shape, limit)


def item_plan(problem: Problem, machine: Machine, shape: TileShape, limit: int) -> SubtreePlan:
    """The plan of `subtree` for one tile shape and limit."""
    tree, heads, kv_heads = problem
    return subtree.plan(tree, heads // kv_heads, kv_heads, HEAD_DIM, machine, shapes=[shape], limits=[limit])
