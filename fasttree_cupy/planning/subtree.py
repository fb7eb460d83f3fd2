"""Our own planner: subtrees as work items, partial outputs only where parallelism needs them.

Requests are numbered in depth-first order, so that each node's requests are one range. Consecutive requests form a
*tile* of up to ``16 * row_warps`` query rows. A tile attends in one pass to every node that one of its requests goes
through, each with the range of rows that may see it. Its outputs are final unless the tile is cut along its tokens into
several *items*; then each writes partial outputs, to be merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.layout import WARP_ROWS, Layout, check_row_numbers, depth_first, lay_out
from fasttree_cupy.planning.machine import Machine
from fasttree_cupy.tree import KVTree

__all__ = ["ITEM_FIELDS", "SubtreePlan", "TileShape", "most_warps", "plan", "tile_shapes"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

WARP_STEP_TOKENS = 16
"""Tokens of a warp's step, which takes `WARP_ROWS` query rows against them, as in cuda_src/tree_decode.cu."""

ITEM_FIELDS = ("first_position", "num_requests", "partial", "row_warps") + 3 * ("shared",) + 5 * ("own",)
"""Columns of `SubtreePlan.items`: struct Item of cuda_src/include/plan.cuh."""

_LONGEST = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 1 << 30)
"""Candidate limits of an item's length, in steps of a warp."""

_Layout = Layout
"""What Numba's caches on disk from before `layout` was a file of its own ask for: see compiled.py."""


class SubtreePlan(NamedTuple):
    """A schedule for ``tree_decode``, and the merge that follows it.

    I is the number of items, S of segments, B of requests, M of requests whose tokens are cut, P of partial outputs.

    Attributes
    ----------
    items : int32 (I, 12)
        One block's work for one KV head, the longest first; columns `ITEM_FIELDS`.
    segments : int32 (S, 4)
        Runs of tokens: first row of K and V, length, first and end row of the item that see it.
    request_order : int32 (B,)
        Requests in depth-first order.
    merge_requests : int32 (M,)
        Requests with partial outputs.
    merge_entries : int32 (P,)
        Rows of the partial outputs, a request's together.
    merge_offs, merge_lens : int32 (M,)
        Request ``merge_requests[i]`` merges ``merge_entries[offs[i] : offs[i] + lens[i]]``.
    block_warps, row_warps : int
        Warps of a block, and those that split a tile's rows.
    longest : int
        Limit of an item's length, in steps of a warp.
    estimate_us : float
        The cost model's estimate of a run's time.
    """

    items: Int32Array
    segments: Int32Array
    request_order: Int32Array
    merge_requests: Int32Array
    merge_entries: Int32Array
    merge_offs: Int32Array
    merge_lens: Int32Array
    block_warps: int
    row_warps: int
    longest: int
    estimate_us: float


def plan(
    tree: KVTree,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    machine: Machine,
    kv_indices: Int32Array | None = None,
    shapes: Sequence[TileShape] | None = None,
    limits: Sequence[int] | None = None,
) -> SubtreePlan:
    """Plan a tree.

    Parameters
    ----------
    tree : KVTree
        The tree.
    group : int
        Query heads a KV head, at most 64, at head_dim 256 at most 32.
    num_kv_heads, head_dim : int
        Head layout; K and V elements take two bytes.
    machine : Machine
        Constants of the GPU.
    kv_indices : int32 (unique_tokens,), optional
        Rows of K and V of the tree's tokens; by default in the tree's order.
    shapes : sequence of TileShape, optional
        Shapes to choose from; by default all.
    limits : sequence of int, optional
        Limits of an item's length to choose from, in steps of a warp; by default those in use.

    Raises
    ------
    ValueError
        If `group` is larger than the kernel's tiles.
    """
    shapes = tile_shapes(group, head_dim) if shapes is None else shapes
    if not shapes:
        raise ValueError(
            f"group is {group}, expected at most {WARP_ROWS * most_warps(head_dim)} at head_dim {head_dim}"
        )
    check_row_numbers(tree)
    request_order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, kv_indices)
    chosen, longest, estimate = _choose(
        layout, tree.batch_size, tree.unique_tokens, group, num_kv_heads, head_dim,
        np.array(shapes, np.int64), np.array(_LONGEST if limits is None else limits, np.int64),
        Machine(*map(float, machine)),  # floats alone, or Numba compiles again
    )  # fmt: skip
    shape = shapes[chosen]
    items, segments, merge = _build(layout, request_order, group, longest, *shape)
    return SubtreePlan(items, segments, request_order, *merge, shape.block_warps, shape.row_warps, longest, estimate)


class TileShape(NamedTuple):
    """Warps of a block, warps among which its rows are split, and requests of a tile."""

    block_warps: int
    row_warps: int
    requests: int


def most_warps(head_dim: int) -> int:
    """Warps of the largest block of ``tree_decode``: at head_dim 256 more would need too much shared memory."""
    return 4 if head_dim <= 128 else 2


def tile_shapes(group: int, head_dim: int) -> list[TileShape]:
    """Shapes to choose from: blocks of one warp, with fewer requests too, and of several."""
    shapes = []
    if group <= WARP_ROWS:
        full = WARP_ROWS // group
        shapes += [TileShape(1, 1, requests) for requests in sorted({full, max(1, full // 2)})]
    for row_warps in (1, 2, 4):
        if row_warps <= most_warps(head_dim) and row_warps * WARP_ROWS >= group:
            shapes.append(TileShape(most_warps(head_dim), row_warps, row_warps * WARP_ROWS // group))
    return shapes


# Compiled passes.


@njit
def _list_of(
    layout: Layout, node: int, tile: int, group: int, row_warps: int, tile_requests: int
) -> tuple[int, int, int]:
    """Which of a tile's lists a node's tokens go to, and the rows of the tile that see them.

    List 0 is for what the row warps share, list 1 + w for what row warp w has to itself.
    """
    first = tile * tile_requests
    row_begin = (max(layout.begins[node], first) - first) * group
    row_end = (min(layout.ends[node], first + tile_requests) - first) * group
    warp = row_begin // WARP_ROWS
    own = row_warps == 1 or warp == (row_end - 1) // WARP_ROWS
    return (1 + warp if own else 0), row_begin, row_end


@njit
def _measure(
    layout: Layout, batch: int, group: int, row_warps: int, tile_requests: int
) -> tuple[Int64Array, Int64Array]:
    """Steps that a warp of each tile takes in one token group, and over all: own and shared warp steps, tokens read."""
    num_tiles = -(-batch // tile_requests)
    lists = row_warps + 1
    count = np.zeros(num_tiles * lists, np.int64)  # of tiles of tokens
    work = np.zeros(3, np.int64)
    for node in layout.breadth_first:
        if layout.seqlen[node] == 0 or layout.begins[node] == layout.ends[node]:
            continue
        own_count = -(-layout.seqlen[node] // WARP_STEP_TOKENS)
        shared_count = -(-layout.seqlen[node] // (WARP_STEP_TOKENS * row_warps))
        for tile in range(layout.begins[node] // tile_requests, (layout.ends[node] - 1) // tile_requests + 1):
            which, _, _ = _list_of(layout, node, tile, group, row_warps, tile_requests)
            count[tile * lists + which] += shared_count if which == 0 else own_count
            work[2] += layout.seqlen[node]
    steps = np.empty(num_tiles, np.int64)
    for tile in range(num_tiles):
        shared = count[tile * lists] * row_warps
        longest = 0
        for w in range(row_warps):
            own = count[tile * lists + 1 + w]
            longest = max(longest, own)
            work[0] += own
        work[1] += shared * row_warps
        steps[tile] = shared + longest
    return steps, work


@njit
def _runs(steps: Int64Array, groups: int, batch: int, tile_requests: int) -> Int64Array:
    """Runs of tiles alike: steps shared by the token groups, number of tiles, requests in them."""
    runs = np.empty((len(steps), 3), np.int64)
    last = -1
    for tile in range(len(steps)):
        part = -(-steps[tile] // groups)
        if last < 0 or runs[last, 0] != part:
            last += 1
            runs[last] = (part, 0, 0)
        runs[last, 1] += 1
        runs[last, 2] += min(tile_requests, batch - tile * tile_requests)
    return runs[: last + 1]


@njit
def _choose(
    layout: Layout,
    batch: int,
    unique_tokens: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    shapes: Int64Array,
    limits: Int64Array,
    machine: Machine,
) -> tuple[int, int, float]:
    """The shape and the limit of an item's length with the lowest estimate, and that, in microseconds."""
    token_bytes = 4.0 * head_dim * num_kv_heads
    row_bytes = 2.0 * head_dim * num_kv_heads * group
    memory = (unique_tokens * token_bytes + 2.0 * batch * row_bytes) / machine.hbm
    best = (0, 0, np.inf)
    steps, work = _measure(layout, batch, group, shapes[0, 1], shapes[0, 2])
    for index in range(len(shapes)):
        block_warps, row_warps, tile_requests = shapes[index]
        if index > 0 and (row_warps != shapes[index - 1, 1] or tile_requests != shapes[index - 1, 2]):
            steps, work = _measure(layout, batch, group, row_warps, tile_requests)
        runs = _runs(steps, block_warps // row_warps, batch, tile_requests)
        cache = work[2] * token_bytes / machine.l2
        for limit in limits:
            cost = _cost(runs, work, limit, block_warps, memory, cache, row_bytes, num_kv_heads, head_dim, machine)
            if cost < best[2]:
                best = (index, limit, cost)
    return best


@njit
def _cost(
    runs: Int64Array,
    work: Int64Array,
    limit: int,
    block_warps: int,
    memory: float,
    cache: float,
    row_bytes: float,
    num_kv_heads: int,
    head_dim: int,
    machine: Machine,
) -> float:
    """Estimated microseconds of a run; `memory` and `cache` are those of the two alone."""
    scale = head_dim / 128.0
    items, longest, partials = 0, 0, 0
    for steps, tiles, requests in runs:
        pieces = max(1, -(-steps // limit))
        items += tiles * pieces
        longest = max(longest, -(-steps // pieces))
        if pieces > 1:
            partials += requests * pieces
    blocks = items * num_kv_heads
    busy_steps = (work[0] * machine.own_step + work[1] * machine.shared_step) * scale
    busy = num_kv_heads * (busy_steps + items * block_warps * machine.warp_start) / machine.multiprocessors
    # Resources overlap, but not wholly where two are near their limits.
    throughput = (memory**4 + cache**4 + busy**4) ** 0.25
    # Blocks that do not fill the multiprocessors evenly leave some idle.
    waves = blocks / machine.multiprocessors
    if waves < 4.0:
        throughput *= np.ceil(waves) / waves
    if blocks <= machine.multiprocessors * 12.0 / block_warps:
        cost = machine.start + max(throughput, longest * machine.step_latency * scale)
    else:
        # The last blocks to start run on while the others are done: half a block's time in a full house.
        cost = machine.start + throughput + 0.5 * longest * 12.0 * machine.own_step * scale
    if partials > 0:
        cost += machine.merge + 4.0 * partials * row_bytes / machine.l2
    return float(cost)


@njit
def _build(
    layout: Layout,
    request_order: Int32Array,
    group: int,
    longest: int,
    block_warps: int,
    row_warps: int,
    tile_requests: int,
) -> tuple[Int32Array, Int32Array, tuple[Int32Array, Int32Array, Int32Array, Int32Array]]:
    """Items, the longest first, their segments, and the lists of the merge."""
    batch = len(request_order)
    steps, _ = _measure(layout, batch, group, row_warps, tile_requests)
    groups = block_warps // row_warps
    pieces = np.maximum(1, -(-steps // (groups * longest)))
    bounds, segments = _tiles(layout, batch, group, row_warps, tile_requests)
    items, cut_segments, lengths = _cut(bounds, segments, pieces, batch, block_warps, row_warps, tile_requests)
    order = np.argsort(-lengths, kind="mergesort")
    return items[order], cut_segments, _merge_lists(request_order, pieces, tile_requests)


@njit
def _tiles(layout: Layout, batch: int, group: int, row_warps: int, tile_requests: int) -> tuple[Int64Array, Int32Array]:
    """Segments of each tile: ``segments[bounds[i] : bounds[i + 1]]`` with ``i = tile * (row_warps + 1) + which``."""
    num_tiles = -(-batch // tile_requests)
    lists = row_warps + 1
    bounds = np.zeros(num_tiles * lists + 1, np.int64)
    for fill in range(2):
        if fill == 1:
            for i in range(len(bounds) - 1):
                bounds[i + 1] += bounds[i]
            segments = np.empty((bounds[-1], 4), np.int32)
            cursor = bounds[:-1].copy()
        for node in layout.breadth_first:
            if layout.seqlen[node] == 0 or layout.begins[node] == layout.ends[node]:
                continue
            for tile in range(layout.begins[node] // tile_requests, (layout.ends[node] - 1) // tile_requests + 1):
                which, row_begin, row_end = _list_of(layout, node, tile, group, row_warps, tile_requests)
                index = tile * lists + which
                if fill == 0:
                    bounds[index + 1] += 1
                    continue
                segment = segments[cursor[index]]
                segment[0] = layout.kv_ptrs[node]
                segment[1] = layout.seqlen[node]
                segment[2] = row_begin
                segment[3] = row_end
                cursor[index] += 1
    return bounds, segments


@njit
def _cut(
    bounds: Int64Array,
    segments: Int32Array,
    pieces: Int64Array,
    batch: int,
    block_warps: int,
    row_warps: int,
    tile_requests: int,
) -> tuple[Int32Array, Int32Array, Int64Array]:
    """Items, their segments, and their lengths: each list of a tile is cut evenly, over pieces and token groups."""
    lists = row_warps + 1
    groups = block_warps // row_warps
    most = 0
    for i in range(len(bounds) - 1):
        most += bounds[i + 1] - bounds[i] + pieces[i // lists] * groups - 1
    items = np.empty((pieces.sum(), 12), np.int32)
    out = np.empty((most, 4), np.int32)
    lengths = np.zeros(len(items), np.int64)
    item = 0
    at = 0
    partial = 0
    for t in range(len(pieces)):
        num_requests = min(tile_requests, batch - t * tile_requests)
        for piece in range(pieces[t]):
            items[item, 0] = t * tile_requests
            items[item, 1] = num_requests
            items[item, 2] = partial if pieces[t] > 1 else -1
            items[item, 3] = row_warps
            if pieces[t] > 1:
                partial += num_requests
            parts = pieces[t] * groups
            shared = 0
            for g in range(groups if row_warps > 1 else 0):
                items[item, 4 + g] = at
                at, length = _part(
                    bounds, segments, t * lists, WARP_STEP_TOKENS * row_warps, piece * groups + g, parts, out, at
                )
                shared = max(shared, length * row_warps)
            items[item, 4 + (groups if row_warps > 1 else 0) : 7] = at
            own = 0
            for w in range(groups * row_warps):
                items[item, 7 + w] = at
                which = t * lists + 1 + w % row_warps
                at, length = _part(
                    bounds, segments, which, WARP_STEP_TOKENS, piece * groups + w // row_warps, parts, out, at
                )
                own = max(own, length)
            items[item, 7 + groups * row_warps :] = at
            lengths[item] = shared + own
            item += 1
    return items, out[:at], lengths


@njit
def _part(
    bounds: Int64Array, segments: Int32Array, which: int, tile: int, part: int, parts: int, out: Int32Array, at: int
) -> tuple[int, int]:
    """Copy part `part` of `parts` of a list to ``out[at:]``; returns the new end and the part's length in tiles."""
    total = 0
    for s in range(bounds[which], bounds[which + 1]):
        total += -(-segments[s, 1] // tile)
    first, last = total * part // parts, total * (part + 1) // parts
    position = 0
    for s in range(bounds[which], bounds[which + 1]):
        count = -(-segments[s, 1] // tile)
        low, high = max(first - position, 0), min(last - position, count)
        if low < high:
            out[at, 0] = segments[s, 0] + low * tile
            out[at, 1] = min(segments[s, 1], high * tile) - low * tile
            out[at, 2] = segments[s, 2]
            out[at, 3] = segments[s, 3]
            at += 1
        position += count
    return at, last - first


@njit
def _merge_lists(
    request_order: Int32Array, pieces: Int64Array, tile_requests: int
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """Which requests have partial outputs, and where these lie."""
    batch = len(request_order)
    count = 0
    total = 0
    for t in range(len(pieces)):
        if pieces[t] > 1:
            num_requests = min(tile_requests, batch - t * tile_requests)
            count += num_requests
            total += num_requests * pieces[t]
    merge_requests = np.empty(count, np.int32)
    entries = np.empty(total, np.int32)
    offs = np.empty(count, np.int32)
    lens = np.empty(count, np.int32)
    i = 0
    at = 0
    base = 0
    for t in range(len(pieces)):
        if pieces[t] == 1:
            continue
        num_requests = min(tile_requests, batch - t * tile_requests)
        for j in range(num_requests):
            merge_requests[i] = request_order[t * tile_requests + j]
            offs[i] = at
            lens[i] = pieces[t]
            for piece in range(pieces[t]):
                entries[at] = base + piece * num_requests + j
                at += 1
            i += 1
        base += num_requests * pieces[t]
    return merge_requests, entries, offs, lens
