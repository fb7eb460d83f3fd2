"""Tiles of query rows for the balanced planner: which tokens a tile attends to, and in which order.

The kernel attends tokens that most of a tile's rows see with products of a whole warpgroup, and tokens that few rows
see in chunks of 16, with products of the warps whose rows see them (``cuda_src/include/chunk_products.cuh``). Whole
steps (tiles in shared memory) of either kind take turns: tokens seen *together* come from the L2 cache, where other
tiles have brought them, and cost products; those seen *apart* come from memory, and cost few. The latter are dealt out
among the tile's warps in turn, a chunk at a time, so that all warps get the same share of every step.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from fasttree_cupy.planning.subtree import WARP_ROWS, _Layout

__all__ = ["CHUNK_TOKENS", "is_together", "tile_segments", "tile_tokens"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

CHUNK_TOKENS = 16
"""Tokens that a warp attends at a time where few rows see them, as in chunk_products.cuh."""
GROUP_WARPS = 4
"""Warps of a warpgroup."""


@njit(cache=True)
def tile_tokens(
    layout: _Layout, batch: int, group: int, requests: int, row_groups: int
) -> tuple[Int64Array, Int64Array]:
    """Tokens that each tile attends to, and how many of them are seen together."""
    num_tiles = -(-batch // requests)
    tokens, together = np.zeros(num_tiles, np.int64), np.zeros(num_tiles, np.int64)
    for node in layout.breadth_first:
        if layout.seqlen[node] > 0 and layout.begins[node] < layout.ends[node]:
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                begin, end = _rows(layout, node, tile, group, requests)
                tokens[tile] += layout.seqlen[node]
                if is_together(begin, end, row_groups):
                    together[tile] += layout.seqlen[node]
    return tokens, together


@njit(cache=True)
def _rows(layout: _Layout, node: int, tile: int, group: int, requests: int) -> tuple[int, int]:
    """The tile's rows that see a node."""
    first = tile * requests
    begin = max(layout.begins[node], first) - first
    end = min(layout.ends[node], first + requests) - first
    return begin * group, end * group


@njit(cache=True)
def is_together(begin: int, end: int, row_groups: int) -> bool:
    """Whether rows lie in more than half of a tile's warps."""
    return ((end - 1) // WARP_ROWS - begin // WARP_ROWS + 1) * 2 > GROUP_WARPS * row_groups


class _Dealer(NamedTuple):
    """Deals out the tokens of one tile after the other.

    Attributes
    ----------
    nodes : int32
        Nodes of all queues.
    left : int64 (queues,)
        Tokens of each of the tile's queues that are still to be dealt.
    heads : int64 (queues, 5)
        Each queue's first node: where it stands in `nodes`, its next token's row of K and V, its tokens that are
        left, and the tile's rows that see it, first and end.
    segments : int32 (S, 4)
        What has been dealt; columns as of `BalancedPlan.segments`.
    starts : int32 (S,)
        Tokens of the tile before each of them.
    """

    layout: _Layout
    group: int
    requests: int
    nodes: Int32Array
    left: Int64Array
    heads: Int64Array
    segments: Int32Array
    starts: Int32Array


@njit(cache=True)
def tile_segments(
    layout: _Layout, batch: int, group: int, requests: int, row_groups: int, step_tokens: int
) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Segments of each tile, ``segments[bounds[i] : bounds[i + 1]]``: columns as of `BalancedPlan.segments`.

    The third array holds the tile's tokens before each of them.
    """
    num_tiles = -(-batch // requests)
    queues = GROUP_WARPS * row_groups + 1  # of a tile: what is seen together, then what begins in each warp's rows
    firsts, nodes, room = _queue(layout, num_tiles, group, requests, row_groups, queues)
    left, heads = np.empty(queues, np.int64), np.empty((queues, 5), np.int64)
    segments, starts = np.empty((max(1, room), 4), np.int32), np.empty(max(1, room), np.int32)
    dealer = _Dealer(layout, group, requests, nodes, left, heads, segments, starts)
    bounds = np.zeros(num_tiles + 1, np.int64)
    for tile in range(num_tiles):
        left[:] = 0
        for queue in range(queues):
            first, end = firsts[tile * queues + queue], firsts[tile * queues + queue + 1]
            for i in range(first, end):
                left[queue] += layout.seqlen[nodes[i]]
            if first < end:
                _go_on(dealer, tile, queue, first)
        bounds[tile + 1] = _deal_tile(dealer, tile, bounds[tile], step_tokens)
    total = max(1, bounds[-1])
    return bounds, segments[:total], starts[:total]


@njit(cache=True)
def _go_on(dealer: _Dealer, tile: int, queue: int, place: int) -> None:
    """Make the node at a place of `nodes` the queue's first one."""
    head, node = dealer.heads[queue], dealer.nodes[place]
    head[0], head[1], head[2] = place, dealer.layout.kv_ptrs[node], dealer.layout.seqlen[node]
    head[3], head[4] = _rows(dealer.layout, node, tile, dealer.group, dealer.requests)


@njit(cache=True)
def _deal_tile(dealer: _Dealer, tile: int, first: int, step_tokens: int) -> int:
    """Write the tile's segments from `first` on, and return their end."""
    left = dealer.left
    at = first
    # Whole steps of either kind take turns: while one is computed, the other comes from memory.
    together, apart = left[0] // step_tokens, (left[1:] // CHUNK_TOKENS).sum() * CHUNK_TOKENS // step_tokens
    done, queue, last = 0, 1, len(left) - 1
    for step in range(together + apart):
        if done * (together + apart) <= step * together and done < together:
            at = _take(dealer, tile, 0, step_tokens, first, at)
            done += 1
            continue
        for _ in range(step_tokens // CHUNK_TOKENS):
            while left[queue] < CHUNK_TOKENS:
                queue = queue + 1 if queue < last else 1
            at = _take(dealer, tile, queue, CHUNK_TOKENS, first, at)
            queue = queue + 1 if queue < last else 1
    # Then what is left, in whole chunks as far as possible.
    to_whole_chunk = -left[0] % CHUNK_TOKENS
    at = _take(dealer, tile, 0, left[0], first, at)
    for queue in range(1, len(left)):
        count = min(to_whole_chunk, left[queue])
        at = _take(dealer, tile, queue, count, first, at)
        to_whole_chunk -= count
    while left.max() >= CHUNK_TOKENS:
        for queue in range(1, len(left)):
            if left[queue] >= CHUNK_TOKENS:
                at = _take(dealer, tile, queue, CHUNK_TOKENS, first, at)
    for queue in range(1, len(left)):
        at = _take(dealer, tile, queue, left[queue], first, at)
    return at


@njit(cache=True)
def _queue(
    layout: _Layout, num_tiles: int, group: int, requests: int, row_groups: int, queues: int
) -> tuple[Int64Array, Int32Array, int]:
    """Nodes of each tile's queues, ancestors first: ``nodes[starts[i] : starts[i + 1]]``, i = tile * queues + queue.

    The third is a bound of the segments.
    """
    starts = np.zeros(num_tiles * queues + 1, np.int64)
    nodes = np.empty(0, np.int32)
    room = 0
    for fill in range(2):
        if fill == 1:
            for i in range(num_tiles * queues):
                starts[i + 1] += starts[i]
            nodes = np.empty(starts[-1], np.int32)
            cursor = starts[:-1].copy()
        for node in layout.breadth_first:
            if layout.seqlen[node] == 0 or layout.begins[node] >= layout.ends[node]:
                continue
            for tile in range(layout.begins[node] // requests, (layout.ends[node] - 1) // requests + 1):
                begin, end = _rows(layout, node, tile, group, requests)
                together = is_together(begin, end, row_groups)
                queue = tile * queues + (0 if together else 1 + begin // WARP_ROWS)
                if fill == 0:
                    starts[queue + 1] += 1
                    # A cut costs a segment; a step seen together may be cut by one that is not.
                    room += 3 + layout.seqlen[node] // CHUNK_TOKENS
                else:
                    nodes[cursor[queue]] = node
                    cursor[queue] += 1
    return starts, nodes, room


@njit(cache=True)
def _take(dealer: _Dealer, tile: int, queue: int, count: int, first: int, at: int) -> int:
    """Append a queue's next `count` tokens to the tile's segments, which begin at `first`, and return their end."""
    head, segments, starts = dealer.heads[queue], dealer.segments, dealer.starts
    dealer.left[queue] -= count
    while count > 0:
        taken = min(count, head[2])
        last = segments[max(at - 1, 0)]
        if at > first and last[0] + last[1] == head[1] and last[2] == head[3] and last[3] == head[4]:
            last[1] += taken
        else:
            segment = segments[at]
            segment[0], segment[1], segment[2], segment[3] = head[1], taken, head[3], head[4]
            starts[at] = starts[at - 1] + last[1] if at > first else 0
            at += 1
        count -= taken
        head[1] += taken
        head[2] -= taken
        if head[2] == 0 and dealer.left[queue] + count > 0:
            _go_on(dealer, tile, queue, head[0] + 1)
    return at
