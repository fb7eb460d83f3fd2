"""A plan for ``tree_decode_sm90`` that follows a growing tree: small edits of its arrays, now and then a new plan.

All arrays lie in one, of a fixed size and layout: items, order of requests, segments. What the planner of
`balanced` makes is spread out in it, so that every tile's list of segments has room behind it:

- A new token lengthens its request's last new segment, or begins one in this room, and the last piece of the tile's
  tokens becomes longer, for each KV head.
- A forked request gets a tile to itself, with the segments of its parent's path, which the workers with least to do
  take.
- A finished request's row of its tile is no request's any more, and segments that no other row sees become empty.

So the plan drifts from what the planner would make. What that costs is summed up; when the sum exceeds what it costs to
move the cuts between the pieces of tiles, these are moved, so that workers have equally much to do again, but for the
pieces that grow: these get less, so that the cuts last. Where that does not help, and the sum exceeds what a new plan
costs, or where there is no room left, the tree is planned anew into the same arrays.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.alignment import next_start
from fasttree_cupy.capacity import Capacity
from fasttree_cupy.integers import INT32_MAX
from fasttree_cupy.planning import growing_passes as passes
from fasttree_cupy.planning.balanced import GROUP_ROWS, ITEM_FIELDS, STEP_TOKENS, plan_layout
from fasttree_cupy.planning.growing_tree import GrowingTree
from fasttree_cupy.planning.machine import WorkerMachine

__all__ = ["GrowingPlan", "Sizes"]

Int32Array = npt.NDArray[np.int32]

PLAN_US = 380.0
"""Host time of a new plan on an H200's host, in microseconds: that of the planner and the copy (bench/NOTES.md)."""
CUT_US = 60.0
"""Host time of moving the cuts between pieces, in microseconds: on an H200's host 48 to 70 (bench/NOTES.md)."""


class Sizes(NamedTuple):
    """Elements of what a growing plan needs at most, and where its arrays begin.

    With R requests, R_t to a tile, T tokens, W workers and H KV heads there are at most C = ceil(R / R_t) planned
    tiles. Each is H units of work, which W - 1 borders between workers cut into at most C H + W pieces; of the units
    that are cut, the pieces are 2 W at most. Fewer than W units are cut, and need one counter each; or one for each
    piece where workers merge together, which have a piece each. A tile's segments have a token or more each.

    Attributes
    ----------
    items_at, order_at, segments_at : int
        Where the arrays begin in the one that holds them all.
    total : int
        Its elements.
    tiles : int
        Tiles: planned ones, and those of forked requests.
    items, segments : int
        Rows of these arrays. The first items are those that the workers begin with, whether they have work or not.
    partials, counters : int
        Pieces of units that are cut, and counters that merging them needs, of all row groups.
    """

    items_at: int
    order_at: int
    segments_at: int
    total: int
    tiles: int
    items: int
    segments: int
    partials: int
    counters: int


def sizes(capacity: Capacity, tile_requests: int, num_kv_heads: int, workers: int, row_groups: int) -> Sizes:
    """Sizes for a capacity.

    Raises
    ------
    ValueError
        If the arrays had more elements than int32 counts.
    """
    planned = -(-capacity.requests // tile_requests)
    segments = capacity.tokens * planned + passes.SLACK * (capacity.requests + passes.FORKS)
    items = (planned + passes.FORKS) * num_kv_heads + 2 * workers
    counters = row_groups * workers
    lengths = (items * len(ITEM_FIELDS), capacity.requests + passes.FORKS, segments * 4)
    ends = np.cumsum([next_start(length, 4) for length in lengths]).tolist()
    if ends[-1] > INT32_MAX:
        raise ValueError(
            f"capacity is {capacity}: {planned} tiles of {tile_requests} requests with {capacity.tokens} tokens each "
            f"take {ends[-1]} elements, expected at most {INT32_MAX}"
        )
    return Sizes(0, ends[0], ends[1], ends[2], planned + passes.FORKS, items, segments, 2 * workers, counters)


class GrowingPlan:
    """A balanced plan of a `GrowingTree`, in arrays that stay where they are.

    Parameters
    ----------
    tree : GrowingTree
        The tree; it changes before the plan does.
    group, num_kv_heads, head_dim, workers, machine
        See `balanced.plan`; the grid has this many workers, though some may have nothing to do.

    Attributes
    ----------
    row_groups : int
        As the planner chose for the tree as it was at first.
    workers : int
        Blocks of the launch.
    sizes : Sizes
    packed : int32 (sizes.total,)
        All arrays.
    used : int
        Elements of `packed` up to which it means anything.
    made : BalancedPlan
        What the planner last made.
    state : PlanState
        Its arrays, which stay where they are, `packed` among them.
    """

    def __init__(
        self, tree: GrowingTree, group: int, num_kv_heads: int, head_dim: int, workers: int, machine: WorkerMachine
    ) -> None:
        self.tree = tree
        self.workers = workers
        self._planned = partial(
            plan_layout,
            group=group,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            multiprocessors=workers,
            machine=machine,
            filled=True,
        )
        self.made = self._planned(*tree.layout())
        self.row_groups = self.made.row_groups
        tile_requests = self.row_groups * GROUP_ROWS // group
        self.sizes = sizes(tree.capacity, tile_requests, num_kv_heads, workers, self.row_groups)
        rates = machine.one_group if self.row_groups == 1 else machine.two_groups
        step_us = rates.step * head_dim / 128
        self.state = passes.make_state(
            (self.sizes.total, *self.sizes[:3]),
            tree.capacity.requests,
            self.sizes.tiles,
            workers,
            (group, num_kv_heads, tile_requests, STEP_TOKENS[self.row_groups]),
            (step_us, rates.item / step_us, rates.apart_step / rates.step, PLAN_US, CUT_US),
        )
        self.packed = self.state.packed
        self._spread()

    def plan_anew(self) -> None:
        """Plan the tree anew."""
        self.made = self._planned(*self.tree.layout(), row_groups=self.row_groups)
        self._spread()

    def _spread(self) -> None:
        made = self.made
        passes.spread(self.state, made.items, made.segments, made.request_order, made.workers)

    @property
    def used(self) -> int:
        """Elements of `packed` up to which it means anything."""
        return self.sizes.segments_at + 4 * passes.used_segments(self.state)

    @property
    def edits(self) -> Int32Array:
        """What the last change has edited, (n, 2): the index in `packed` and the value, no index twice."""
        return passes.edits_made(self.state)

    def append(self, slots: Int32Array, rows: Int32Array) -> bool:
        """Follow `GrowingTree.append`; returns whether edits were enough, else all of `packed` is new."""
        return self._done(passes.append(self.state, slots, rows))

    def fork(self, parents: Int32Array, slots: Int32Array) -> bool:
        """Follow `GrowingTree.fork`, which gave the children `slots`; returns as `append` does."""
        return self._done(passes.fork(self.state, parents, slots))

    def finish(self, slots: Int32Array) -> bool:
        """Follow `GrowingTree.finish`; returns as `append` does."""
        return self._done(passes.finish(self.state, slots))

    def _done(self, fits: bool) -> bool:
        if not fits:
            self.plan_anew()
        return fits
