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
from numba import njit

from fasttree_cupy.planning.machine import WorkerMachine
from fasttree_cupy.planning.subtree import _Layout, depth_first, lay_out
from fasttree_cupy.tree import KVTree

__all__ = ["GROUP_ROWS", "ITEM_FIELDS", "MOST_ROW_GROUPS", "STEP_TOKENS", "BalancedPlan", "plan", "plan_layout"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

GROUP_ROWS = 64
"""Query rows of a warpgroup, as in cuda_src/include/warpgroup_rows.cuh."""
STEP_TOKENS = {1: 64, 2: 128}
"""Row groups -> tokens of a tile in shared memory, as in kernels.py."""
MOST_ROW_GROUPS = 2
"""Warpgroups among which a tile's rows may be split."""

ITEM_FIELDS = (
    "first_position", "num_requests", "kv_head", "tokens", "next", "next_segment", "piece", "pieces",
    "first_partial", "counter", "first_request", "together", "kv_begin", "kv_len", "row_begin", "row_end",
)  # fmt: skip
"""Columns of `BalancedPlan.items`: struct WorkItem of cuda_src/include/work.cuh."""

_INT32_MAX = 2**31 - 1
_SHORTEST_PIECE = 2
"""Steps that a cut leaves on either side, at least."""
_FEW_STEPS = 10
"""Steps a worker from which on fewer workers are not worth a thought."""
_MERGE_TOGETHER = 5
"""Pieces of a tile from which on workers merge together, where that is all that they do."""
_SLICE_COLUMNS = 16
"""Columns that one of them merges at a time: kSliceOutputs in worker_output.cuh, in both rows of a thread."""
_MANY_TILES = 32
"""Tiles a worker from which on it does not matter whether any are cut."""
_SHARES = (1.0, 0.67, 0.5, 0.33, 0.25, 0.18, 0.12)
"""Shares of the multiprocessors that small work may be given: fewer pieces are merged faster."""


class BalancedPlan(NamedTuple):
    """A schedule for ``tree_decode_sm90``.

    I is the number of items, S of segments, B of requests.

    Attributes
    ----------
    items : int32 (I, 16)
        Work of one worker on one tile; columns `ITEM_FIELDS`. Worker w begins with item w and goes on with its next.
    segments : int32 (S, 4)
        Runs of tokens: first row of K and V, length, first and end row of the tile that see it.
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
    if tree.unique_tokens > _INT32_MAX:
        raise ValueError(
            f"tree_info holds {tree.unique_tokens} tokens, but int32 row numbers reach {_INT32_MAX} at most"
        )
    request_order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, kv_indices)
    return plan_layout(layout, request_order, group, num_kv_heads, head_dim, multiprocessors, machine)


def plan_layout(
    layout: _Layout,
    request_order: Int32Array,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    multiprocessors: int,
    machine: WorkerMachine,
    row_groups: int | None = None,
) -> BalancedPlan:
    """Plan a tree whose runs of tokens are laid out, for as many row groups as are given, or as are cheapest.

    Parameters
    ----------
    layout : _Layout
        Runs of tokens, ancestors first.
    request_order : int32 (B,)
        Requests in depth-first order.
    group, num_kv_heads, head_dim, multiprocessors, machine
        See `plan`, which has checked them.
    row_groups : int, optional
        1 or 2.
    """
    batch = len(request_order)
    size = 2.0 * head_dim * num_kv_heads * (2.0 * layout.seqlen.sum() + 2.0 * batch * group)
    candidates = []
    least, most = (-(-group // GROUP_ROWS), MOST_ROW_GROUPS) if row_groups is None else (row_groups, row_groups)
    for row_groups in range(least, most + 1):
        requests = row_groups * GROUP_ROWS // group
        tokens = _tile_tokens(layout, batch, requests)
        step, item_us = (machine.step, machine.item) if row_groups == 1 else (machine.double_step, machine.double_item)
        step_us = step * head_dim / 128
        steps = -(-tokens // STEP_TOKENS[row_groups])
        estimate, pieces = _deal(steps, num_kv_heads, multiprocessors, step_us, item_us, size, machine)
        candidates.append((estimate, row_groups, requests, tokens, pieces))
    estimate, row_groups, requests, tokens, pieces = min(candidates, key=lambda candidate: candidate[0])
    bounds, segments = _segments(layout, batch, group, requests)
    step_tokens = STEP_TOKENS[row_groups]
    items, partials, merges, counters = _items(
        pieces, bounds, segments, tokens, request_order, requests, step_tokens, head_dim
    )
    workers = int(pieces[-1, 3]) + 1
    return BalancedPlan(items, segments, request_order, row_groups, workers, partials, merges, counters, estimate)


def _deal(
    steps: Int64Array,
    num_kv_heads: int,
    multiprocessors: int,
    step_us: float,
    item_us: float,
    size: float,
    machine: WorkerMachine,
) -> tuple[float, Int64Array]:
    """The estimate of the cheapest way to deal tiles out, in microseconds, and that way, as `_in_line` returns it."""
    total = int(steps.sum()) * num_kv_heads
    memory_us = size / machine.hbm
    item_steps = item_us / step_us
    shares = _SHARES if total < _FEW_STEPS * multiprocessors else _SHARES[:1]
    candidates = []
    for workers in sorted({max(1, int(multiprocessors * share)) for share in shares}):
        dealt = [_in_line(steps, num_kv_heads, workers, item_steps)]
        tiles = len(steps) * num_kv_heads
        if tiles <= workers:
            dealt.append(_each(steps, num_kv_heads, workers))
        elif tiles <= _MANY_TILES * workers:
            dealt.append(_whole(steps, num_kv_heads, workers, item_steps))
        for pieces in dealt:
            work, most_pieces = _longest(pieces, item_steps)
            cost = machine.start + ((work * step_us) ** 4 + memory_us**4) ** 0.25
            if most_pieces >= _MERGE_TOGETHER and len(pieces) == pieces[-1, 3] + 1:
                cost += machine.merge_together + machine.merge_together_piece * most_pieces
            elif most_pieces > 1:
                cost += machine.merge + machine.merge_piece * most_pieces
            candidates.append((float(cost), pieces))
    return min(candidates, key=lambda candidate: candidate[0])


# Compiled passes.


@njit(cache=True)
def _tile_tokens(layout: _Layout, batch: int, requests: int) -> Int64Array:
    """Tokens that each tile attends to."""
    tokens = np.zeros(-(-batch // requests), np.int64)
    for node in layout.breadth_first:
        if layout.seqlen[node] > 0 and layout.begins[node] < layout.ends[node]:
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                tokens[tile] += layout.seqlen[node]
    return tokens


@njit(cache=True)
def _segments(layout: _Layout, batch: int, group: int, requests: int) -> tuple[Int64Array, Int32Array]:
    """Segments of each tile, ``segments[bounds[i] : bounds[i + 1]]``, ancestors first."""
    num_tiles = -(-batch // requests)
    bounds = np.zeros(num_tiles + 1, np.int64)
    for node in layout.breadth_first:
        if layout.seqlen[node] > 0 and layout.begins[node] < layout.ends[node]:
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                bounds[tile + 1] += 1
    for tile in range(num_tiles):
        bounds[tile + 1] += bounds[tile]
    segments = np.zeros((max(1, bounds[-1]), 4), np.int32)
    cursor = bounds[:-1].copy()
    for node in layout.breadth_first:
        if layout.seqlen[node] > 0 and layout.begins[node] < layout.ends[node]:
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                first = tile * requests
                segment = segments[cursor[tile]]
                segment[0] = layout.kv_ptrs[node]
                segment[1] = layout.seqlen[node]
                segment[2] = (max(layout.begins[node], first) - first) * group
                segment[3] = (min(layout.ends[node], first + requests) - first) * group
                cursor[tile] += 1
    return bounds, segments


@njit(cache=True)
def _shares(steps: Int64Array, longest: int, shares: Int64Array) -> int:
    """Fill `shares` with the pieces of each tile when none is longer than `longest` steps, and return their sum."""
    total = 0
    for tile in range(len(steps)):
        shares[tile] = max(1, -(-steps[tile] // longest))
        total += shares[tile]
    return total


@njit(cache=True)
def _each(steps: Int64Array, num_kv_heads: int, workers: int) -> Int64Array:
    """Cut every tile evenly, into pieces as short as the workers allow, one a worker; rows as of `_in_line`."""
    num_tiles = len(steps)
    shares = np.ones(num_tiles, np.int64)
    low, high = _SHORTEST_PIECE, max(_SHORTEST_PIECE, steps.max())  # steps of the longest piece
    while low < high:
        middle = (low + high) // 2
        if num_kv_heads * _shares(steps, middle, shares) <= workers:
            high = middle
        else:
            low = middle + 1
    _shares(steps, high, shares)
    pieces = np.empty((num_kv_heads * shares.sum(), 4), np.int64)
    at = 0
    for head in range(num_kv_heads):
        for tile in range(num_tiles):
            for share in range(shares[tile]):
                pieces[at, 0] = head * num_tiles + tile
                pieces[at, 1] = steps[tile] * share // shares[tile]
                pieces[at, 2] = steps[tile] * (share + 1) // shares[tile]
                pieces[at, 3] = at
                at += 1
    return pieces


@njit(cache=True)
def _whole(steps: Int64Array, num_kv_heads: int, workers: int, item_steps: float) -> Int64Array:
    """Give every worker whole tiles that follow one another, so that the busiest has least; rows as of `_in_line`."""
    num_tiles = len(steps)
    units = num_kv_heads * num_tiles
    total = num_kv_heads * (steps.sum() + item_steps * num_tiles)
    low = total / workers
    high = low + steps.max() + item_steps
    pieces = np.empty((units, 4), np.int64)
    while high - low > 0.5:
        middle = (low + high) / 2
        if _fill(steps, middle, item_steps, pieces) <= workers:
            high = middle
        else:
            low = middle
    _fill(steps, high, item_steps, pieces)
    return pieces


@njit(cache=True)
def _fill(steps: Int64Array, limit: float, item_steps: float, pieces: Int64Array) -> int:
    """Fill `pieces` with whole tiles, at most `limit` steps a worker, and return the number of workers."""
    num_tiles = len(steps)
    worker, load = 0, 0.0
    for unit in range(len(pieces)):
        cost = steps[unit % num_tiles] + item_steps
        if load > 0 and load + cost > limit:
            worker += 1
            load = 0.0
        load += cost
        pieces[unit, 0] = unit
        pieces[unit, 1] = 0
        pieces[unit, 2] = steps[unit % num_tiles]
        pieces[unit, 3] = worker
    return worker + 1


@njit(cache=True)
def _in_line(steps: Int64Array, num_kv_heads: int, workers: int, item_steps: float) -> Int64Array:
    """Lay the tiles of all KV heads end to end and cut the line into equal stretches.

    Returns
    -------
    int64 (P, 4)
        In the order of the line: head * tiles + tile, its first and end step, worker.
    """
    num_tiles = len(steps)
    units = num_kv_heads * num_tiles
    total = num_kv_heads * (steps.sum() + item_steps * num_tiles)
    pieces = np.empty((units + workers, 4), np.int64)
    at, used = 0, 0
    unit, first, position = 0, 0, 0.0
    for worker in range(workers):
        goal = total * (worker + 1) / workers
        begun = at
        while unit < units:
            length = steps[unit % num_tiles]
            end = min(length, int(np.floor(goal - position - item_steps + 0.5)))
            if length - end < _SHORTEST_PIECE or worker == workers - 1:
                end = length
            if end < length and end - first < _SHORTEST_PIECE:
                break
            pieces[at, 0] = unit
            pieces[at, 1] = first
            pieces[at, 2] = end
            pieces[at, 3] = used
            at += 1
            first = end
            if end < length:
                break
            unit, first, position = unit + 1, 0, position + item_steps + length
        if at > begun:  # else the worker's stretch was too short to cut
            used += 1
    return pieces[:at]


@njit(cache=True)
def _longest(pieces: Int64Array, item_steps: float) -> tuple[float, int]:
    """Steps of the busiest worker, items included, and the pieces of the tile that has most."""
    most, busiest = 1, 0.0
    count, work = 0, 0.0
    for i in range(len(pieces)):
        count = count + 1 if i > 0 and pieces[i, 0] == pieces[i - 1, 0] else 1
        work = work if i > 0 and pieces[i, 3] == pieces[i - 1, 3] else 0.0
        work += item_steps + pieces[i, 2] - pieces[i, 1]
        most = max(most, count)
        busiest = max(busiest, work)
    return busiest, most


@njit(cache=True)
def _first_of_run(requests: Int32Array) -> int:
    """The first of requests that follow one another, else -1."""
    for i in range(1, len(requests)):
        if requests[i] != requests[0] + i:
            return -1
    return int(requests[0])


@njit(cache=True)
def _items(
    pieces: Int64Array,
    bounds: Int64Array,
    segments: Int32Array,
    tokens: Int64Array,
    request_order: Int32Array,
    requests: int,
    step_tokens: int,
    head_dim: int,
) -> tuple[Int32Array, int, int, int]:
    """Items in the order that workers need, and the numbers of partial outputs, merges and counters."""
    num_tiles = len(tokens)
    workers = pieces[-1, 3] + 1
    items = np.zeros((len(pieces), 16), np.int32)
    previous = np.full(workers, -1, np.int64)
    more = workers
    partials, merges, counters = 0, 0, 0
    i = 0
    while i < len(pieces):
        unit = pieces[i, 0]
        count = 1
        while i + count < len(pieces) and pieces[i + count, 0] == unit:
            count += 1
        tile = unit % num_tiles
        together = count >= _MERGE_TOGETHER and workers == len(pieces)
        segment = bounds[tile]
        begin = 0  # of the segment, in the tile's tokens
        for piece in range(count):
            _, first_step, end_step, worker = pieces[i + piece]
            first = first_step * step_tokens
            index = worker
            if previous[worker] >= 0:
                index = more
                more += 1
                items[previous[worker], 4] = index
            previous[worker] = index
            item = items[index]
            item[0] = tile * requests
            item[1] = min(requests, len(request_order) - tile * requests)
            item[2] = unit // num_tiles
            item[3] = min(tokens[tile], end_step * step_tokens) - first
            item[4] = -1
            item[6] = piece
            item[7] = count
            if count > 1:
                item[8] = partials
                item[9] = counters
                item[11] = together
            item[10] = _first_of_run(request_order[item[0] : item[0] + item[1]])
            if item[3] > 0:
                while begin + segments[segment, 1] <= first:
                    begin += segments[segment, 1]
                    segment += 1
                item[5] = segment + 1
                item[12] = segments[segment, 0] + first - begin
                item[13] = segments[segment, 1] - (first - begin)
                item[14] = segments[segment, 2]
                item[15] = segments[segment, 3]
        if count > 1:
            partials += count
            merges += 1
            counters += 2 + head_dim // _SLICE_COLUMNS if together else 1
        i += count
    return items, partials, merges, counters
