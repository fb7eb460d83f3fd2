"""Planner for persistent workers: multiprocessors get equal work, and partial outputs arise only where tiles are cut.

Requests are numbered in depth-first order, so that each node's requests are one range. Consecutive requests form a
*tile* of up to 64 or 128 query rows of one KV head; a tile attends in one pass to every node that one of its requests
goes through, each with the range of rows that may see it. The tiles of all KV heads are the work, measured in *steps*
of 64 or 128 tokens. It is dealt out in the way that the cost model finds cheapest: in equal stretches, so that a tile
is cut only where one worker's stretch ends and the next begins (stream-K, Osama et al. 2023,
https://arxiv.org/abs/2301.03598); in whole tiles, where cuts would cost more than they balance; or, where there are
fewer tiles than workers, with each tile cut evenly.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.dealing import MERGE_TOGETHER, Work, deal
from fasttree_cupy.planning.layout import Layout, check_row_numbers, depth_first, lay_out
from fasttree_cupy.planning.machine import WorkerMachine, WorkerRates
from fasttree_cupy.planning.row_tiles import READ_ONCE, tile_segments, tile_tokens
from fasttree_cupy.tree import KVTree

__all__ = [
    "GROUP_ROWS",
    "ITEM_FIELDS",
    "MOST_ROW_GROUPS",
    "STEP_TOKENS",
    "BalancedPlan",
    "bytes_moved",
    "plan",
    "plan_layout",
]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

GROUP_ROWS = 64
"""Query rows of a warpgroup, as in cuda_src/include/warpgroup_rows.cuh."""
STEP_TOKENS = {1: 64, 2: 128}
"""Row groups -> tokens of a tile in shared memory, as in kernels.py."""
READ_ONCE_BYTES = {1: 450e6, 2: 300e6}
"""Row groups -> bytes of K, V, Q and O up to which what one tile alone reads leaves the L2 cache first.

That keeps what other tiles read where there is little else; where there is more than a few caches full, device memory
delivers 2 to 4% less so (measured on an H200, whose cache has 63 MB: bench/NOTES.md).
"""
MOST_ROW_GROUPS = 2
"""Warpgroups among which a tile's rows may be split."""
_LEAST_GAIN = 0.02
"""Share of the estimate that tiles of half the requests must save, or they are left as they are.

Of 46 trees that an H200 ran with tiles of every size, the choice then loses 0.4% (bench/NOTES.md).
"""

ITEM_FIELDS = (
    "first_position", "num_requests", "kv_head", "tokens", "next", "next_segment", "piece", "pieces",
    "first_partial", "counter", "first_request", "together", "kv_begin", "kv_len", "row_begin", "row_end",
)  # fmt: skip
"""Columns of `BalancedPlan.items`: struct WorkItem of cuda_src/include/work.cuh."""
(
    FIRST_POSITION, NUM_REQUESTS, KV_HEAD, TOKENS, NEXT, NEXT_SEGMENT, PIECE, PIECES,
    FIRST_PARTIAL, COUNTER, FIRST_REQUEST, TOGETHER, KV_BEGIN, KV_LEN, ROW_BEGIN, ROW_END,
) = range(len(ITEM_FIELDS))  # fmt: skip
"""The columns' numbers."""


class BalancedPlan(NamedTuple):
    """A schedule for ``tree_decode_sm90``.

    I is the number of items, S of segments, B of requests.

    Attributes
    ----------
    items : int32 (I, 16)
        Work of one worker on one tile; columns `ITEM_FIELDS`. Worker w begins with item w and goes on with its next.
    segments : int32 (S, 4)
        Runs of tokens: first row of K and V, length, first and end row of the tile that see it, the latter with
        `READ_ONCE` added where no other tile reads the tokens and that is worth a hint to the cache.
    request_order : int32 (B,)
        Requests in depth-first order.
    row_groups : int
        Warpgroups among which a tile's rows are split, 64 rows each: 1 or 2.
    workers : int
        Blocks of the launch.
    partials, merges : int
        Items that write partial outputs, and tiles that are merged from these.
    counters : int
        Counters that the merges need, for each row group.
    estimate_us : float
        The cost model's estimate of a run's time.
    """

    items: Int32Array
    segments: Int32Array
    request_order: Int32Array
    row_groups: int
    workers: int
    partials: int
    merges: int
    counters: int
    estimate_us: float


def plan(
    tree: KVTree,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    multiprocessors: int,
    machine: WorkerMachine,
    kv_indices: Int32Array | None = None,
) -> BalancedPlan:
    """Plan a tree.

    Parameters
    ----------
    tree : KVTree
        The tree.
    group : int
        Query heads a KV head, at most 128.
    num_kv_heads, head_dim : int
        Head layout; K and V elements take two bytes.
    multiprocessors : int
        Workers to plan for, at most.
    machine : WorkerMachine
        Constants of the GPU.
    kv_indices : int32 (unique_tokens,), optional
        Rows of K and V of the tree's tokens; by default in the tree's order.

    Raises
    ------
    ValueError
        If `group` is larger than the kernel's tiles, or tokens are too many.
    """
    if group > MOST_ROW_GROUPS * GROUP_ROWS:
        raise ValueError(f"group is {group}, expected at most {MOST_ROW_GROUPS * GROUP_ROWS}")
    check_row_numbers(tree)
    request_order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, kv_indices)
    return plan_layout(layout, request_order, group, num_kv_heads, head_dim, multiprocessors, machine)


def plan_layout(
    layout: Layout,
    request_order: Int32Array,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    multiprocessors: int,
    machine: WorkerMachine,
    row_groups: int | None = None,
    filled: bool = False,
) -> BalancedPlan:
    """Plan a tree whose runs of tokens are laid out, for as many row groups as are given, or as are cheapest.

    Parameters
    ----------
    layout : Layout
        Runs of tokens, ancestors first.
    request_order : int32 (B,)
        Requests in depth-first order.
    group, num_kv_heads, head_dim, multiprocessors, machine
        See `plan`, which has checked them.
    row_groups : int, optional
        1 or 2.
    filled : bool
        Whether all tiles but the last have as many requests as rows for them, as with given row groups.
    """
    batch = len(request_order)
    heads = (group, num_kv_heads, head_dim)
    size = bytes_moved(layout.seqlen.sum(), batch, heads)
    if row_groups is None:
        sizes = _tile_sizes(batch, group, num_kv_heads, multiprocessors, filled)
    else:
        sizes = [_TileSize(row_groups, row_groups * GROUP_ROWS // group)]
    estimate, (row_groups, tile_requests), tokens, pieces = _cheapest(
        sizes, layout, batch, heads, size, multiprocessors, machine
    )
    step_tokens = STEP_TOKENS[row_groups]
    mark = READ_ONCE if size <= READ_ONCE_BYTES[row_groups] else 0
    bounds, segments, starts = tile_segments(layout, batch, group, tile_requests, row_groups, step_tokens, mark)
    items, partials, merges, counters = _items(
        pieces, bounds, segments, starts, tokens, request_order, tile_requests, step_tokens
    )
    workers = int(pieces[-1, 3]) + 1
    return BalancedPlan(items, segments, request_order, row_groups, workers, partials, merges, counters, estimate)


class _TileSize(NamedTuple):
    """Row groups of tiles, and their requests."""

    row_groups: int
    requests: int


def _tile_sizes(batch: int, group: int, num_kv_heads: int, multiprocessors: int, filled: bool) -> list[_TileSize]:
    """Sizes that are worth a thought, each half right behind its whole.

    Where whole tiles are fewer than the multiprocessors, those of one row group may leave rows empty: more tiles, each
    of which attends to fewer tokens, keep more of them busy, and need not be cut.
    """
    sizes = [_TileSize(MOST_ROW_GROUPS, MOST_ROW_GROUPS * GROUP_ROWS // group)]
    if group > GROUP_ROWS:
        return sizes
    sizes.append(_TileSize(1, GROUP_ROWS // group))
    requests = min(GROUP_ROWS // group, batch)
    while not filled and requests > 1 and -(-batch // requests) * num_kv_heads < multiprocessors:
        requests = -(-requests // 2)
        sizes.append(_TileSize(1, requests))
    return sizes


def _cheapest(
    sizes: list[_TileSize],
    layout: Layout,
    batch: int,
    heads: tuple[int, int, int],
    size: float,
    multiprocessors: int,
    machine: WorkerMachine,
) -> tuple[float, _TileSize, Int64Array, Int64Array]:
    """The cheapest of `_tile_sizes` with its estimate, tokens and pieces, see `_deal`.

    Tiles of one row group are halved as long as that is worth it.
    """
    dealt: list[tuple[float, _TileSize, Int64Array, Int64Array]] = []
    for tile in sizes:
        rates = machine.one_group if tile.row_groups == 1 else machine.two_groups
        estimate, tokens, pieces = _deal(
            layout, batch, heads, size, tile.requests, STEP_TOKENS[tile.row_groups], multiprocessors, rates, machine
        )
        if len(dealt) > 1 and estimate > (1 - _LEAST_GAIN) * dealt[-1][0]:  # than those of twice the requests
            break
        dealt.append((estimate, tile, tokens, pieces))
    return min(dealt, key=lambda one: one[:2])


# Compiled passes.


@njit
def bytes_moved(tokens: int, batch: int, heads: tuple[int, int, int]) -> float:
    """Bytes of K, V, Q and O, for query heads a KV head, KV heads and head_dim."""
    group, num_kv_heads, head_dim = heads
    return 2.0 * head_dim * num_kv_heads * (2.0 * tokens + 2.0 * batch * group)


@njit
def _deal(
    layout: Layout,
    batch: int,
    heads: tuple[int, int, int],
    size: float,
    tile_requests: int,
    step_tokens: int,
    multiprocessors: int,
    rates: WorkerRates,
    machine: WorkerMachine,
) -> tuple[float, Int64Array, Int64Array]:
    """The cheapest way to deal out tiles of so many requests: its estimate, tokens of the tiles, pieces."""
    group, num_kv_heads, head_dim = heads
    tokens, together = tile_tokens(layout, batch, group, tile_requests)
    step_us = rates.step * head_dim / 128
    apart = rates.apart_step / rates.step
    step_costs = apart + (1 - apart) * together / np.maximum(tokens, 1)
    work = Work(-(-tokens // step_tokens), step_costs, num_kv_heads, rates.item / step_us)
    estimate, pieces = deal(work, multiprocessors, step_us, size, machine)
    return estimate, tokens, pieces


@njit
def _first_requests(request_order: Int32Array, tile_requests: int) -> Int32Array:
    """The first request of each tile whose requests follow one another, else -1."""
    firsts = request_order[::tile_requests].copy()
    for position in range(len(request_order)):
        tile = position // tile_requests
        if request_order[position] != request_order[tile * tile_requests] + position - tile * tile_requests:
            firsts[tile] = -1
    return firsts


@njit
def _items(
    pieces: Int64Array,
    bounds: Int64Array,
    segments: Int32Array,
    starts: Int32Array,
    tokens: Int64Array,
    request_order: Int32Array,
    tile_requests: int,
    step_tokens: int,
) -> tuple[Int32Array, int, int, int]:
    """Items in the order that workers need, and the numbers of partial outputs, merges and counters."""
    num_tiles = len(tokens)
    workers = pieces[-1, 3] + 1
    items = np.zeros((len(pieces), len(ITEM_FIELDS)), np.int32)
    previous = np.full(workers, -1, np.int64)
    more = workers
    partials, merges, counters = 0, 0, 0
    first_requests = _first_requests(request_order, tile_requests)
    i = 0
    while i < len(pieces):
        unit = pieces[i, 0]
        count = 1
        while i + count < len(pieces) and pieces[i + count, 0] == unit:
            count += 1
        tile = unit % num_tiles
        together = count >= MERGE_TOGETHER and workers == len(pieces)
        for piece in range(count):
            _, first_step, end_step, worker = pieces[i + piece]
            index = worker
            if previous[worker] >= 0:
                index = more
                more += 1
                items[previous[worker], NEXT] = index
            previous[worker] = index
            item = items[index]
            item[FIRST_POSITION] = tile * tile_requests
            item[NUM_REQUESTS] = min(tile_requests, len(request_order) - tile * tile_requests)
            item[KV_HEAD] = unit // num_tiles
            item[NEXT] = -1
            item[PIECE] = piece
            item[PIECES] = count
            if count > 1:
                item[FIRST_PARTIAL] = partials
                item[COUNTER] = counters
                item[TOGETHER] = together
            item[FIRST_REQUEST] = first_requests[tile]
            end = min(tokens[tile], end_step * step_tokens)
            _set_tokens(item, first_step * step_tokens, end, bounds[tile], bounds[tile + 1], segments, starts)
        if count > 1:
            partials += count
            merges += 1
            counters += count if together else 1  # a word for each piece, or their number
        i += count
    return items, partials, merges, counters


@njit(inline="always")
def _set_tokens(
    item: Int32Array,
    first: int,
    end: int,
    segment: int,
    segments_end: int,
    segments: Int32Array,
    starts: Int32Array,
) -> None:
    """Have an item attend to the tokens from `first` to `end` of its tile, whose first and end segment are given.

    Inline: a call takes longer than what it does.
    """
    item[TOKENS] = end - first
    if end <= first:
        return
    if first > 0:
        segment += int(np.searchsorted(starts[segment:segments_end], first, side="right")) - 1
    gone = first - starts[segment]  # of the segment, to the piece before
    item[NEXT_SEGMENT] = segment + 1
    item[KV_BEGIN] = segments[segment, 0] + gone
    item[KV_LEN] = segments[segment, 1] - gone
    item[ROW_BEGIN] = segments[segment, 2]
    item[ROW_END] = segments[segment, 3]
