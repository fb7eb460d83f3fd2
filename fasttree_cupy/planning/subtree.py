"""Our own planner: subtrees as work items, partial outputs only where parallelism needs them.

Requests are numbered in depth-first order, so that each node's requests are one range. Consecutive requests form a
*tile* of up to ``16 * row_warps`` query rows. A tile attends in one pass to every node that one of its requests goes
through, each with the range of rows that may see it. Its outputs are final unless the tile is cut along its tokens into
several *items*; then each writes partial outputs, to be merged by log-sum-exp.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from fasttree_cupy.planning.machine import Machine
from fasttree_cupy.tree import KVTree

__all__ = ["ITEM_FIELDS", "SubtreePlan", "plan"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

WARP_ROWS = 16
STEP_TOKENS = 16
"""A warp's step: 16 query rows against 16 tokens, as in cuda_src/tree_decode.cu."""

ITEM_FIELDS = ("first_position", "num_requests", "partial", "row_warps") + 3 * ("shared",) + 5 * ("own",)
"""Columns of `SubtreePlan.items`: struct Item of cuda_src/include/plan.cuh."""

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
    row_warps : int
        Warps that split a tile's rows.
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
    row_warps: int
    longest: int
    estimate_us: float


def plan(tree: KVTree, group: int, num_kv_heads: int, head_dim: int, machine: Machine) -> SubtreePlan:
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

    Raises
    ------
    ValueError
        If `group` is larger than the kernel's tiles.
    """
    block_warps = 4 if head_dim <= 128 else 2
    choices = [warps for warps in (1, 2, 4) if warps <= block_warps and warps * WARP_ROWS >= group]
    if not choices:
        raise ValueError(f"group is {group}, expected at most {block_warps * WARP_ROWS} at head_dim {head_dim}")
    begins, ends, request_order = _positions(
        tree.parent, tree.breadth_first, tree.request_node, np.empty(tree.batch_size, np.int32)
    )
    layout = (tree.breadth_first, tree.seqlen, tree.kv_ptrs, begins, ends, tree.batch_size, group)
    best = None
    for row_warps in choices:
        bounds, segments, steps = _tiles(*layout, row_warps, block_warps)
        costs = _costs(
            steps, row_warps, group, tree.batch_size, tree.unique_tokens, num_kv_heads, head_dim,
            np.array(_LONGEST, np.int64), _token_reads(segments), np.array(machine, np.float64), block_warps,
        )  # fmt: skip
        cheapest = int(np.argmin(costs))
        if best is None or costs[cheapest] < best[0]:
            best = (float(costs[cheapest]), row_warps, _LONGEST[cheapest], bounds, segments, steps)
    assert best is not None  # choices is not empty
    estimate, row_warps, longest, bounds, segments, steps = best
    pieces = np.maximum(1, -(-steps // longest))
    items, cut_segments, lengths = _cut(
        bounds, segments, pieces, row_warps, block_warps // row_warps, tree.batch_size, row_warps * WARP_ROWS // group
    )
    items = items[np.argsort(-lengths, kind="stable")]
    merge = _merge_lists(request_order, pieces, row_warps * WARP_ROWS // group)
    return SubtreePlan(items, cut_segments, request_order, *merge, row_warps, longest, estimate)


@njit(cache=True)
def _positions(
    parent: Int32Array, order: Int32Array, request_node: Int32Array, request_order: Int32Array
) -> tuple[Int64Array, Int64Array, Int32Array]:
    """Depth-first positions of each node's requests, ``[begins, ends)``, and the requests in that order."""
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
    return begins, begins + total, request_order


@njit(cache=True)
def _tiles(
    order: Int32Array,
    seqlen: Int64Array,
    kv_ptrs: Int64Array,
    begins: Int64Array,
    ends: Int64Array,
    batch: int,
    group: int,
    row_warps: int,
    block_warps: int,
) -> tuple[Int64Array, Int32Array, Int64Array]:
    """Segments of each tile and the steps that a warp of its block takes.

    List ``t * (row_warps + 1)`` holds what tile t's row warps share, the lists after it what each has to itself; list i
    is ``segments[bounds[i] : bounds[i + 1]]``.
    """
    requests = row_warps * WARP_ROWS // group
    num_tiles = -(-batch // requests)
    lists = row_warps + 1
    bounds = np.zeros(num_tiles * lists + 1, np.int64)
    for fill in range(2):
        if fill == 1:
            for i in range(len(bounds) - 1):
                bounds[i + 1] += bounds[i]
            segments = np.empty((bounds[-1], 4), np.int32)
            cursor = bounds[:-1].copy()
            tokens = np.zeros(num_tiles * lists, np.int64)
        for node in order:
            if seqlen[node] == 0 or begins[node] == ends[node]:
                continue
            for t in range(begins[node] // requests, (ends[node] - 1) // requests + 1):
                first = t * requests
                row_begin = (max(begins[node], first) - first) * group
                row_end = (min(ends[node], first + requests) - first) * group
                warp = row_begin // WARP_ROWS
                own = row_warps == 1 or warp == (row_end - 1) // WARP_ROWS
                index = t * lists + (1 + warp if own else 0)
                if fill == 0:
                    bounds[index + 1] += 1
                else:
                    at = cursor[index]
                    segments[at, 0] = kv_ptrs[node]
                    segments[at, 1] = seqlen[node]
                    segments[at, 2] = row_begin
                    segments[at, 3] = row_end
                    cursor[index] += 1
                    tile = STEP_TOKENS if own else STEP_TOKENS * row_warps
                    tokens[index] += -(-seqlen[node] // tile) * tile
    groups = block_warps // row_warps
    steps = np.empty(num_tiles, np.int64)
    for t in range(num_tiles):
        longest = 0
        for w in range(row_warps):
            longest = max(longest, tokens[t * lists + 1 + w])
        steps[t] = -(-(tokens[t * lists] + longest) // (STEP_TOKENS * groups))
    return bounds, segments, steps


@njit(cache=True)
def _token_reads(segments: Int32Array) -> int:
    """Tokens that all tiles together read."""
    total = 0
    for i in range(len(segments)):
        total += segments[i, 1]
    return total


@njit(cache=True)
def _costs(
    steps: Int64Array,
    row_warps: int,
    group: int,
    batch: int,
    unique_tokens: int,
    num_kv_heads: int,
    head_dim: int,
    limits: Int64Array,
    token_reads: int,
    machine: npt.NDArray[np.float64],
    block_warps: int,
) -> npt.NDArray[np.float64]:
    """Estimated microseconds of a run for each limit of an item's length."""
    multiprocessors, hbm, l2, step_busy, step_latency, start, merge = machine
    requests = row_warps * WARP_ROWS // group
    token_bytes = 4.0 * head_dim * num_kv_heads
    io_bytes = 4.0 * head_dim * num_kv_heads * group * batch
    scale = head_dim / 128.0
    total = steps.sum() * num_kv_heads * block_warps
    throughput = max(
        (unique_tokens * token_bytes + io_bytes) / hbm,
        token_reads * token_bytes / l2,
        total * step_busy * scale / multiprocessors,
    )
    slots = multiprocessors * 3.0
    costs = np.empty(len(limits), np.float64)
    for i in range(len(limits)):
        blocks = 0
        longest = 0
        partials = 0
        for t in range(len(steps)):
            pieces = max(1, -(-steps[t] // limits[i]))
            blocks += pieces
            longest = max(longest, -(-steps[t] // pieces))
            if pieces > 1:
                partials += pieces * min(requests, batch - t * requests)
        blocks *= num_kv_heads
        # The last wave is half full on average; a block alone cannot go faster than its chain of steps.
        waves = max(1.0, blocks / slots)
        tail = longest * step_latency * scale * (1.0 if waves <= 1.0 else 0.5)
        cost = start + max(throughput, tail) if waves <= 1.0 else start + throughput + tail
        # Few blocks leave multiprocessors idle: throughput then belongs to those that work.
        busy = min(1.0, blocks / multiprocessors)
        cost += throughput * (1.0 / busy - 1.0)
        if partials > 0:
            cost += merge + 8.0 * partials * num_kv_heads * group * head_dim / l2
        costs[i] = cost
    return costs


@njit(cache=True)
def _cut(
    bounds: Int64Array,
    segments: Int32Array,
    pieces: Int64Array,
    row_warps: int,
    groups: int,
    batch: int,
    requests: int,
) -> tuple[Int32Array, Int32Array, Int64Array]:
    """Items, their segments, and their lengths: each list of a tile is cut evenly, over pieces and token groups."""
    lists = row_warps + 1
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


@njit(cache=True)
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


@njit(cache=True)
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
