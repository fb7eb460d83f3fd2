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
from fasttree_cupy.planning.machine import Machine
from fasttree_cupy.tree import KVTree

__all__ = ["ITEM_FIELDS", "SubtreePlan", "TileShape", "depth_first", "lay_out", "plan", "tile_shapes"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

WARP_ROWS = 16
STEP_TOKENS = 16
"""A warp's step: 16 query rows against 16 tokens, as in cuda_src/tree_decode.cu."""

ITEM_FIELDS = ("first_position", "num_requests", "partial", "row_warps") + 3 * ("shared",) + 5 * ("own",)
"""Columns of `SubtreePlan.items`: struct Item of cuda_src/include/plan.cuh."""

_INT32_MAX = 2**31 - 1
_LONGEST = (4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 1 << 30)
"""Candidate limits of an item's length, in steps of a warp."""


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
        Query heads a KV head, at most 64.
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
    if tree.unique_tokens > _INT32_MAX:
        raise ValueError(
            f"tree_info holds {tree.unique_tokens} tokens, but int32 row numbers reach {_INT32_MAX} at most"
        )
    request_order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, kv_indices)
    chosen, longest, estimate = _choose(
        layout, tree.batch_size, tree.unique_tokens, group, num_kv_heads, head_dim,
        np.array(shapes, np.int64), np.array(_LONGEST if limits is None else limits, np.int64),
        np.array(machine, np.float64),
    )  # fmt: skip
    shape = shapes[chosen]
    items, segments, merge = _build(layout, request_order, group, longest, *shape)
    return SubtreePlan(items, segments, request_order, *merge, shape.block_warps, shape.row_warps, longest, estimate)


def depth_first(tree: KVTree) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Requests in depth-first order, (B,), and each node's as positions ``[begins, ends)`` in it, (N,) each."""
    request_order = np.empty(tree.batch_size, np.int32)
    begins, ends = _positions(tree.parent, tree.breadth_first, tree.request_node, request_order)
    return request_order, begins, ends


def lay_out(tree: KVTree, begins: Int64Array, ends: Int64Array, kv_indices: Int32Array | None) -> _Layout:
    """Runs of consecutive rows of K and V, and the requests that attend to each: a run a node, or more from a pool."""
    layout = _Layout(tree.breadth_first, tree.seqlen, tree.kv_ptrs, begins, ends)
    return layout if kv_indices is None else _pool_runs(layout, kv_indices)


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


class _Layout(NamedTuple):
    """The tree's arrays of these names, and each node's requests as positions ``[begins, ends)``: (N,) each.

    Of a tree whose tokens lie in a pool, each run of consecutive rows counts as a node.
    """

    breadth_first: Int32Array
    seqlen: Int64Array
    kv_ptrs: Int64Array
    begins: Int64Array
    ends: Int64Array


@njit
def _pool_runs(layout: _Layout, kv_indices: Int32Array) -> _Layout:
    """The layout of the runs of consecutive rows that the nodes' tokens have in a pool, in the nodes' order."""
    runs = 0
    for fill in range(2):
        if fill == 1:
            order = np.arange(runs).astype(np.int32)
            seqlen, kv_ptrs = np.zeros(runs, np.int64), np.empty(runs, np.int64)
            begins, ends = np.empty(runs, np.int64), np.empty(runs, np.int64)
            runs = 0
        for node in layout.breadth_first:
            first = layout.kv_ptrs[node]
            for token in range(first, first + layout.seqlen[node]):
                if token == first or kv_indices[token] != kv_indices[token - 1] + 1:
                    if fill == 1:
                        kv_ptrs[runs] = kv_indices[token]
                        begins[runs] = layout.begins[node]
                        ends[runs] = layout.ends[node]
                    runs += 1
                if fill == 1:
                    seqlen[runs - 1] += 1
    return _Layout(order, seqlen, kv_ptrs, begins, ends)


@njit
def _positions(
    parent: Int32Array, order: Int32Array, request_node: Int32Array, request_order: Int32Array
) -> tuple[Int64Array, Int64Array]:
    """Depth-first positions of each node's requests, ``[begins, ends)``; fills `request_order`."""
    n = len(parent)
    own = np.zeros(n, np.int64)
    for node in request_node:
        own[node] += 1
    total = own.copy()
    for i in range(n - 1, 0, -1):
        total[parent[order[i]]] += total[order[i]]
    begins = np.zeros(n, np.int64)
    cursor = np.zeros(n, np.int64)
    cursor[order[0]] = own[order[0]]
    for i in range(1, n):
        node = order[i]
        begins[node] = cursor[parent[node]]
        cursor[parent[node]] += total[node]
        cursor[node] = begins[node] + own[node]
    slot = begins.copy()
    for r in range(len(request_node)):
        node = request_node[r]
        request_order[slot[node]] = r
        slot[node] += 1
    return begins, begins + total


@njit
def _list_of(layout: _Layout, node: int, tile: int, group: int, row_warps: int, requests: int) -> tuple[int, int, int]:
    """Which of a tile's lists a node's tokens go to, and the rows of the tile that see them.

    List 0 is for what the row warps share, list 1 + w for what row warp w has to itself.
    """
    first = tile * requests
    row_begin = (max(layout.begins[node], first) - first) * group
    row_end = (min(layout.ends[node], first + requests) - first) * group
    warp = row_begin // WARP_ROWS
    own = row_warps == 1 or warp == (row_end - 1) // WARP_ROWS
    return (1 + warp if own else 0), row_begin, row_end


@njit
def _measure(layout: _Layout, batch: int, group: int, row_warps: int, requests: int) -> tuple[Int64Array, Int64Array]:
    """Steps that a warp of each tile takes in one token group, and over all: own and shared warp steps, tokens read."""
    num_tiles = -(-batch // requests)
    lists = row_warps + 1
    count = np.zeros(num_tiles * lists, np.int64)  # of tiles of tokens
    work = np.zeros(3, np.int64)
    for node in layout.breadth_first:
        if layout.seqlen[node] == 0 or layout.begins[node] == layout.ends[node]:
            continue
        own_count = -(-layout.seqlen[node] // STEP_TOKENS)
        shared_count = -(-layout.seqlen[node] // (STEP_TOKENS * row_warps))
        for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
            which, _, _ = _list_of(layout, node, tile, group, row_warps, requests)
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
def _runs(steps: Int64Array, groups: int, batch: int, requests: int) -> Int64Array:
    """Runs of tiles alike: steps shared by the token groups, number of tiles, requests in them."""
    runs = np.empty((len(steps), 3), np.int64)
    last = -1
    for tile in range(len(steps)):
        part = -(-steps[tile] // groups)
        if last < 0 or runs[last, 0] != part:
            last += 1
            runs[last] = (part, 0, 0)
        runs[last, 1] += 1
        runs[last, 2] += min(requests, batch - tile * requests)
    return runs[: last + 1]


@njit
def _choose(
    layout: _Layout,
    batch: int,
    unique_tokens: int,
    group: int,
    num_kv_heads: int,
    head_dim: int,
    shapes: Int64Array,
    limits: Int64Array,
    machine: npt.NDArray[np.float64],
) -> tuple[int, int, float]:
    """The shape and the limit of an item's length with the lowest estimate, and that, in microseconds."""
    hbm, l2 = machine[1], machine[2]
    token_bytes = 4.0 * head_dim * num_kv_heads
    row_bytes = 2.0 * head_dim * num_kv_heads * group
    memory = (unique_tokens * token_bytes + 2.0 * batch * row_bytes) / hbm
    best = (0, 0, np.inf)
    steps, work = _measure(layout, batch, group, shapes[0, 1], shapes[0, 2])
    for index in range(len(shapes)):
        block_warps, row_warps, requests = shapes[index]
        if index > 0 and (row_warps != shapes[index - 1, 1] or requests != shapes[index - 1, 2]):
            steps, work = _measure(layout, batch, group, row_warps, requests)
        runs = _runs(steps, block_warps // row_warps, batch, requests)
        cache = work[2] * token_bytes / l2
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
    machine: npt.NDArray[np.float64],
) -> float:
    """Estimated microseconds of a run; `memory` and `cache` are those of the two alone."""
    multiprocessors, _, l2, own_step, shared_step, warp_start, step_latency, start, merge = machine
    scale = head_dim / 128.0
    items, longest, partials = 0, 0, 0
    for steps, tiles, requests in runs:
        pieces = max(1, -(-steps // limit))
        items += tiles * pieces
        longest = max(longest, -(-steps // pieces))
        if pieces > 1:
            partials += requests * pieces
    blocks = items * num_kv_heads
    busy_steps = (work[0] * own_step + work[1] * shared_step) * scale
    busy = num_kv_heads * (busy_steps + items * block_warps * warp_start) / multiprocessors
    # Resources overlap, but not wholly where two are near their limits.
    throughput = (memory**4 + cache**4 + busy**4) ** 0.25
    # Blocks that do not fill the multiprocessors evenly leave some idle.
    waves = blocks / multiprocessors
    if waves < 4.0:
        throughput *= np.ceil(waves) / waves
    if blocks <= multiprocessors * 12.0 / block_warps:
        cost = start + max(throughput, longest * step_latency * scale)
    else:
        # The last blocks to start run on while the others are done: half a block's time in a full house.
        cost = start + throughput + 0.5 * longest * 12.0 * own_step * scale
    if partials > 0:
        cost += merge + 4.0 * partials * row_bytes / l2
    return float(cost)


@njit
def _build(
    layout: _Layout,
    request_order: Int32Array,
    group: int,
    longest: int,
    block_warps: int,
    row_warps: int,
    requests: int,
) -> tuple[Int32Array, Int32Array, tuple[Int32Array, Int32Array, Int32Array, Int32Array]]:
    """Items, the longest first, their segments, and the lists of the merge."""
    batch = len(request_order)
    steps, _ = _measure(layout, batch, group, row_warps, requests)
    groups = block_warps // row_warps
    pieces = np.maximum(1, -(-steps // (groups * longest)))
    bounds, segments = _tiles(layout, batch, group, row_warps, requests)
    items, cut_segments, lengths = _cut(bounds, segments, pieces, batch, block_warps, row_warps, requests)
    order = np.argsort(-lengths, kind="mergesort")
    return items[order], cut_segments, _merge_lists(request_order, pieces, requests)


@njit
def _tiles(layout: _Layout, batch: int, group: int, row_warps: int, requests: int) -> tuple[Int64Array, Int32Array]:
    """Segments of each tile: ``segments[bounds[i] : bounds[i + 1]]`` with ``i = tile * (row_warps + 1) + which``."""
    num_tiles = -(-batch // requests)
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
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                which, row_begin, row_end = _list_of(layout, node, tile, group, row_warps, requests)
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
    requests: int,
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
        num_requests = min(requests, batch - t * requests)
        for piece in range(pieces[t]):
            items[item, 0] = t * requests
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
                    bounds, segments, t * lists, STEP_TOKENS * row_warps, piece * groups + g, parts, out, at
                )
                shared = max(shared, length * row_warps)
            items[item, 4 + (groups if row_warps > 1 else 0) : 7] = at
            own = 0
            for w in range(groups * row_warps):
                items[item, 7 + w] = at
                which = t * lists + 1 + w % row_warps
                at, length = _part(
                    bounds, segments, which, STEP_TOKENS, piece * groups + w // row_warps, parts, out, at
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
    request_order: Int32Array, pieces: Int64Array, requests: int
) -> tuple[Int32Array, Int32Array, Int32Array, Int32Array]:
    """Which requests have partial outputs, and where these lie."""
    batch = len(request_order)
    count = 0
    total = 0
    for t in range(len(pieces)):
        if pieces[t] > 1:
            num_requests = min(requests, batch - t * requests)
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
        num_requests = min(requests, batch - t * requests)
        for j in range(num_requests):
            merge_requests[i] = request_order[t * requests + j]
            offs[i] = at
            lens[i] = pieces[t]
            for piece in range(pieces[t]):
                entries[at] = base + piece * num_requests + j
                at += 1
            i += 1
        base += num_requests * pieces[t]
    return merge_requests, entries, offs, lens
