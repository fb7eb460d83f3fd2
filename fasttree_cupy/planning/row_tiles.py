"""Tiles of query rows for the balanced planner: which tokens a tile attends to, and in which order.

The kernel attends tokens that most of a tile's rows see with products of a whole warpgroup, and tokens that few rows
see in chunks of 16, with products of the warps whose rows see them (``cuda_src/include/chunk_products.cuh``). Whole
steps (tiles in shared memory) of either kind take turns: tokens seen *together* come from the L2 cache, where other
tiles have brought them, and cost products; those seen *apart* come from memory, and cost few. The latter are dealt out
among the tile's warps in turn, a chunk at a time, so that all warps get the same share of every step.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.layout import WARP_ROWS, Layout

__all__ = ["CHUNK_TOKENS", "READ_ONCE", "is_together", "tile_segments", "tile_tokens"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

CHUNK_TOKENS = 16
"""Tokens that a warp attends at a time where few rows see them, as in chunk_products.cuh."""
GROUP_WARPS = 4
"""Warps of a warpgroup."""
READ_ONCE = 1 << 16
"""Added to a segment's end row where no other tile reads its tokens: kReadOnce of cuda_src/include/plan.cuh."""


@njit
def tile_tokens(layout: Layout, batch: int, group: int, tile_requests: int) -> tuple[Int64Array, Int64Array]:
    """Tokens that each tile attends to, and how many of them are seen together."""
    num_tiles = -(-batch // tile_requests)
    tokens, together = np.zeros(num_tiles, np.int64), np.zeros(num_tiles, np.int64)
    tile_of, warps = _tile_of(batch, tile_requests), _tile_warps(batch, group, tile_requests)
    for node in layout.breadth_first:
        if layout.seqlen[node] > 0 and layout.begins[node] < layout.ends[node]:
            for tile in range(tile_of[layout.begins[node]], tile_of[layout.ends[node] - 1] + 1):
                begin, end = _rows(layout, node, tile, group, tile_requests)
                tokens[tile] += layout.seqlen[node]
                if is_together(begin, end, warps[tile]):
                    together[tile] += layout.seqlen[node]
    return tokens, together


@njit
def _tile_of(batch: int, tile_requests: int) -> Int32Array:
    """The tile of each position: to look it up takes a tenth of the time of a division."""
    tiles = np.empty(batch, np.int32)
    for position in range(batch):
        tiles[position] = position // tile_requests
    return tiles


@njit
def _rows(layout: Layout, node: int, tile: int, group: int, tile_requests: int) -> tuple[int, int]:
    """The tile's rows that see a node."""
    first = tile * tile_requests
    begin = max(layout.begins[node], first) - first
    end = min(layout.ends[node], first + tile_requests) - first
    return begin * group, end * group


@njit
def _tile_warps(batch: int, group: int, tile_requests: int) -> Int32Array:
    """Warps that have rows of each tile: all but the last tile have `tile_requests` requests."""
    num_tiles = -(-batch // tile_requests)
    warps = np.full(num_tiles, -(-tile_requests * group // WARP_ROWS), np.int32)
    if num_tiles > 0:
        warps[-1] = -(-(batch - (num_tiles - 1) * tile_requests) * group // WARP_ROWS)
    return warps


@njit
def is_together(begin: int, end: int, warps: int) -> bool:
    """Whether rows `begin` to `end` of a tile lie in more than half of the `warps` that have some of its rows."""
    return ((end - 1) // WARP_ROWS - begin // WARP_ROWS + 1) * 2 > warps


@njit
def tile_segments(
    layout: Layout, batch: int, group: int, tile_requests: int, row_groups: int, step_tokens: int, mark: int
) -> tuple[Int64Array, Int32Array, Int32Array]:
    """Segments of each tile, ``segments[bounds[i] : bounds[i + 1]]``: columns as of `BalancedPlan.segments`.

    The third array holds the tile's tokens before each of them. `mark`, `READ_ONCE` or 0, is added to the end rows of
    what no other tile reads.
    """
    num_tiles = -(-batch // tile_requests)
    queues = GROUP_WARPS * row_groups + 1  # of a tile: what is seen together, then what begins in each warp's rows
    ends, runs, room = _queue(layout, num_tiles, batch, group, tile_requests, queues, mark)
    segments, starts = np.empty((max(1, room), 4), np.int32), np.empty(max(1, room), np.int32)
    segments[0] = 0  # where no tile has a token
    first, left = np.empty(queues, np.int64), np.empty(queues, np.int64)
    bounds = np.zeros(num_tiles + 1, np.int64)
    begin = 0
    for tile in range(num_tiles):
        for queue in range(queues):
            end = ends[2 * (tile * queues + queue) + 1]
            first[queue], left[queue] = begin, runs[begin:end, 1].sum()
            begin = end
        bounds[tile + 1] = _deal_out(left, first, runs, segments, starts, bounds[tile], step_tokens)
    total = max(1, bounds[-1])
    return bounds, segments[:total], starts[:total]


@njit
def _queue(
    layout: Layout, num_tiles: int, batch: int, group: int, tile_requests: int, queues: int, mark: int
) -> tuple[Int64Array, Int32Array, int]:
    """Runs of each tile's queues, whole chunks of nodes, ancestors first, before what these leave.

    Chunks that are dealt out from the front of a queue are then each of one node, but for the last few: they come as a
    box, and no other node's rows see them. Queue i's runs end before ``ends[2 i + 1]``, i = tile * queues + queue, its
    whole chunks before ``ends[2 i]``. The third is a bound of the segments.
    """
    ends = np.zeros(2 * num_tiles * queues, np.int64)
    tile_of, warps = _tile_of(batch, tile_requests), _tile_warps(batch, group, tile_requests)
    runs = np.empty((0, 4), np.int32)
    room = 0
    for fill in range(2):
        if fill == 1:
            total = 0
            for i in range(len(ends)):  # as yet where it begins
                ends[i], total = total, total + ends[i]
            runs = np.empty((total, 4), np.int32)
        for node in layout.breadth_first:
            tokens = layout.seqlen[node]
            if tokens == 0 or layout.begins[node] >= layout.ends[node]:
                continue
            whole, first_row = tokens - tokens % CHUNK_TOKENS, layout.kv_ptrs[node]
            first_tile, last_tile = tile_of[layout.begins[node]], tile_of[layout.ends[node] - 1]
            read_once = mark if first_tile == last_tile else 0
            for tile in range(first_tile, last_tile + 1):
                begin, end = _rows(layout, node, tile, group, tile_requests)
                queue = tile * queues
                if not is_together(begin, end, warps[tile]):
                    queue += 1 + begin // WARP_ROWS
                if fill == 0:
                    # A cut costs a segment; a step seen together may be cut by one that is not.
                    room += 4 + tokens // CHUNK_TOKENS
                    ends[2 * queue] += whole > 0
                    ends[2 * queue + 1] += whole < tokens
                    continue
                if whole > 0:
                    run = runs[ends[2 * queue]]
                    run[0], run[1], run[2], run[3] = first_row, whole, begin, end + read_once
                    ends[2 * queue] += 1
                if whole < tokens:
                    run = runs[ends[2 * queue + 1]]
                    run[0], run[1], run[2], run[3] = first_row + whole, tokens - whole, begin, end + read_once
                    ends[2 * queue + 1] += 1
    return ends, runs, room


@njit
def _deal_out(
    left: Int64Array, first: Int64Array, runs: Int32Array, segments: Int32Array, starts: Int32Array, at: int, step: int
) -> int:
    """Write a tile's segments from `at` on, and return their end.

    Parameters
    ----------
    left, first : int64 (queues,)
        Of each of the tile's queues its tokens, and the first of its `runs`.
    step : int
        Tokens of a step.
    """
    begin, dealt = at, 0
    # Whole steps of either kind take turns: while one is computed, the other comes from memory.
    together, apart = left[0] // step, (left[1:] // CHUNK_TOKENS).sum() * CHUNK_TOKENS // step
    done, queue, previous, last = 0, 1, 0, len(left) - 1
    for turn in range(together + apart):
        if done * (together + apart) <= turn * together and done < together:
            at = _take_tokens(first, runs, 0, step, segments, starts, begin, at, dealt)
            dealt += step
            done += 1
            previous = 0
            continue
        for _ in range(step // CHUNK_TOKENS):
            while left[queue] < CHUNK_TOKENS:
                queue = queue + 1 if queue < last else 1
            place = first[queue]
            if runs[place, 1] > CHUNK_TOKENS and queue != previous:  # the usual case; a call would take thrice as long
                segments[at, 0], segments[at, 1] = runs[place, 0], CHUNK_TOKENS
                segments[at, 2], segments[at, 3] = runs[place, 2], runs[place, 3]
                starts[at] = dealt
                runs[place, 0] += CHUNK_TOKENS
                runs[place, 1] -= CHUNK_TOKENS
                at += 1
            else:
                at = _take_tokens(first, runs, queue, CHUNK_TOKENS, segments, starts, begin, at, dealt)
            left[queue] -= CHUNK_TOKENS
            dealt += CHUNK_TOKENS
            previous = queue
            queue = queue + 1 if queue < last else 1
    left[0] -= together * step
    return _deal_rest(left, first, runs, segments, starts, begin, at, dealt)


@njit
def _deal_rest(
    left: Int64Array,
    first: Int64Array,
    runs: Int32Array,
    segments: Int32Array,
    starts: Int32Array,
    begin: int,
    at: int,
    dealt: int,
) -> int:
    """Deal out what whole steps leave of a tile, in whole chunks as far as possible; returns the segments' end."""
    to_whole_chunk = -left[0] % CHUNK_TOKENS
    for queue in range(len(left)):
        count = left[0] if queue == 0 else min(to_whole_chunk, left[queue])
        at = _take_tokens(first, runs, queue, count, segments, starts, begin, at, dealt)
        left[queue] -= count
        dealt += count
        to_whole_chunk -= count if queue > 0 else 0
    while left.max() > 0:
        count = CHUNK_TOKENS if left.max() >= CHUNK_TOKENS else 0
        for queue in range(1, len(left)):
            if left[queue] >= count:
                taken = count if count > 0 else left[queue]
                at = _take_tokens(first, runs, queue, taken, segments, starts, begin, at, dealt)
                left[queue] -= taken
                dealt += taken
    return at


@njit
def _take_tokens(
    first: Int64Array,
    runs: Int32Array,
    queue: int,
    count: int,
    segments: Int32Array,
    starts: Int32Array,
    begin: int,
    at: int,
    dealt: int,
) -> int:
    """Append a queue's next `count` tokens to the tile's segments, from `begin` to `at`, and return their end.

    Before them came `dealt` tokens of the tile.
    """
    place = first[queue]
    while count > 0:
        row, tokens, first_row, end_row = runs[place, 0], runs[place, 1], runs[place, 2], runs[place, 3]
        taken = min(count, tokens)
        last = max(at - 1, 0)
        if (
            at > begin
            and segments[last, 0] + segments[last, 1] == row
            and segments[last, 2] == first_row
            and segments[last, 3] == end_row
        ):
            segments[last, 1] += taken
        else:
            segments[at, 0], segments[at, 1], segments[at, 2], segments[at, 3] = row, taken, first_row, end_row
            starts[at] = dealt
            at += 1
        runs[place, 0] = row + taken
        runs[place, 1] = tokens - taken
        place += taken == tokens
        count -= taken
        dealt += taken
    first[queue] = place
    return at
