"""Compiled passes that keep the arrays of a growing plan: see `growing`, which has checked what they are given."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.balanced import (
    FIRST_POSITION,
    FIRST_REQUEST,
    ITEM_FIELDS,
    KV_BEGIN,
    KV_HEAD,
    KV_LEN,
    NEXT,
    NEXT_SEGMENT,
    NUM_REQUESTS,
    PIECE,
    PIECES,
    ROW_BEGIN,
    ROW_END,
    TOKENS,
)
from fasttree_cupy.planning.layout import WARP_ROWS
from fasttree_cupy.planning.row_tiles import READ_ONCE, is_together

__all__ = [
    "FORKS",
    "SLACK",
    "PlanState",
    "append",
    "append_and_count",
    "edits_made",
    "finish",
    "fork",
    "make_state",
    "spread",
    "used_segments",
]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

FORKS = 16
"""Requests that may fork between two plans."""
SLACK = 32
"""New segments of each request between two plans."""
JOINED_RUNS = 8
"""Segments of a forked request among which one is looked for that ends where the next begins."""
MOST_EDITS = 8192
"""Elements that one change may edit; more are planned anew."""
WHOLE_STEPS = 1.0
"""Steps that a worker may have too many because cuts are made at whole steps: a new plan would not do better."""
STEPS_AHEAD = 1.0
"""Steps that a unit's last piece, which gains what is appended, gets less than the others.

Cuts then last twice as long, and runs take as long by the cost model (bench/NOTES.md).
"""
RUNS_A_CHANGE = 32
"""Runs that a change is taken to be followed by: one a layer of the model."""


class PlanState(NamedTuple):
    """Arrays of a plan, whose columns are named below.

    Attributes
    ----------
    packed : int32 (n,)
        The plan: items, order of requests, segments.
    edited : int32 (n,)
        The number of the last change that edited each element of `packed`.
    edits : int32 (MOST_EDITS, 2)
        Elements of `packed` that the last change edited, and in the end their values.
    numbers, costs : int64 (15,), float64 (10,)
    slots, tiles : int32 (requests, 4), int32 (tiles, 5)
    units : int32 (tiles * KV heads, 2)
        Of each unit, KV heads of a tile together: its first piece and their number.
    pieces : int32 (units + workers, 2)
    loads : float64 (workers,)
        Each worker's steps.
    tails : int32 (workers,)
        Each worker's last item.
    """

    packed: Int32Array
    edited: Int32Array
    edits: Int32Array
    numbers: Int64Array
    costs: Float64Array
    slots: Int32Array
    tiles: Int32Array
    units: Int32Array
    pieces: Int32Array
    loads: Float64Array
    tails: Int32Array


_NUMBERS = range(15)
(
    _GROUP,  # query heads a KV head
    _HEADS,  # KV heads
    _TILE_REQUESTS,
    _STEP_TOKENS,
    _ITEMS_AT,  # where the items begin in `packed`
    _ORDER_AT,  # where the order of the requests does
    _SEGMENTS_AT,  # where the segments do
    _CHANGE,  # number of this change
    _EDITS,  # elements that it has edited
    _FULL,  # 1 where these are too many
    _USED_TILES,
    _USED_ITEMS,
    _USED_PIECES,
    _USED_POSITIONS,
    _USED_SEGMENTS,
) = _NUMBERS
(
    _BUSIEST,  # steps of the busiest worker when planned
    _GROWN,  # steps that have come since, wherever
    _LOST,  # microseconds lost since to `_EVEN` steps
    _EVEN,  # steps by which the busiest worker had too many after the last cuts
    _UNEVEN,  # microseconds lost since these to steps beyond `_EVEN`
    _STEP_US,  # microseconds of a step
    _ITEM_STEPS,  # steps that an item costs beside its tokens'
    _APART,  # what a step of tokens costs that few rows see
    _PLAN_US,  # microseconds of a new plan
    _CUT_US,  # microseconds of new cuts
) = range(10)
"""Steps are counted as of tokens that most rows see."""
(
    _TILE,
    _PLACE,  # in the tile
    _SEGMENT,  # the slot's last new segment, or -1
    _NEXT_ROW,  # row of K and V that would follow in it
) = range(4)
(
    _FIRST,  # position in the order of the requests
    _BEGIN,  # first of the tile's segments
    _END,  # end of them
    _LIMIT,  # how far they may go
    _GAINED,  # tokens
) = range(5)
_ITEM, _WORKER = range(2)
_FIELDS = len(ITEM_FIELDS)


def make_state(
    sizes: tuple[int, int, int, int],
    requests: int,
    tiles: int,
    workers: int,
    tile: tuple[int, int, int, int],
    costs: tuple[float, float, float, float, float],
) -> PlanState:
    """Arrays for a plan.

    Parameters
    ----------
    sizes : 4 int
        Elements of `packed`, and where items, order and segments begin in it.
    requests, tiles, workers : int
        Slots, tiles and workers, at most.
    tile : 4 int
        Query heads a KV head, KV heads, requests of a tile, tokens of a step.
    costs : 5 float
        Microseconds of a step, steps of an item and of a step of tokens that few rows see, microseconds of a new plan
        and of new cuts.
    """
    numbers = np.zeros(len(_NUMBERS), np.int64)
    numbers[:_CHANGE] = (*tile, *sizes[1:])
    return PlanState(
        packed=np.zeros(sizes[0], np.int32),
        edited=np.zeros(sizes[0], np.int32),
        edits=np.empty((MOST_EDITS, 2), np.int32),
        numbers=numbers,
        costs=np.array([0.0, 0.0, 0.0, 0.0, 0.0, *costs]),
        slots=np.full((requests, 4), -1, np.int32),
        tiles=np.zeros((tiles, 5), np.int32),
        units=np.zeros((tiles * tile[1], 2), np.int32),
        pieces=np.zeros((tiles * tile[1] + workers, 2), np.int32),
        loads=np.zeros(workers),
        tails=np.zeros(workers, np.int32),
    )


def used_segments(s: PlanState) -> int:
    """Segments up to which they mean anything."""
    return int(s.numbers[_USED_SEGMENTS])


def edits_made(s: PlanState) -> Int32Array:
    """Indices and values of the last change."""
    return s.edits[: s.numbers[_EDITS]]


@njit(inline="always")
def _put(packed: Int32Array, edited: Int32Array, edits: Int32Array, n: Int64Array, at: int, value: int) -> None:
    """Edit an element of `packed`. Of inner loops, hence inline and without `PlanState`: to pass it on costs 0.1 us."""
    packed[at] = value
    if edited[at] != n[_CHANGE]:
        edited[at] = n[_CHANGE]
        if n[_EDITS] == len(edits):
            n[_FULL] = 1
        else:
            edits[n[_EDITS], 0] = at
            n[_EDITS] += 1


@njit(inline="always")
def _begin_change(n: Int64Array) -> None:
    n[_EDITS] = 0
    n[_CHANGE] += 1


@njit
def _item_at(n: Int64Array, index: int) -> int:
    return int(n[_ITEMS_AT] + _FIELDS * index)


@njit
def spread(s: PlanState, items: Int32Array, segments: Int32Array, request_order: Int32Array, workers: int) -> None:
    """Fill the arrays with what the planner made."""
    n = s.numbers
    for position in range(len(request_order)):
        slot = request_order[position]
        s.slots[slot, _TILE], s.slots[slot, _PLACE] = position // n[_TILE_REQUESTS], position % n[_TILE_REQUESTS]
        s.slots[slot, _SEGMENT], s.slots[slot, _NEXT_ROW] = -1, -1
        s.packed[n[_ORDER_AT] + position] = slot
    n[_USED_POSITIONS] = len(request_order)
    n[_USED_TILES] = -(-len(request_order) // n[_TILE_REQUESTS])
    s.tiles[:, _GAINED] = 0
    _spread_items(s, items, workers)
    _spread_segments(s, segments)
    _weigh(s)
    s.costs[:_STEP_US] = 0.0
    s.costs[_BUSIEST] = s.loads.max()
    n[_FULL] = 0
    _begin_change(n)


@njit
def _spread_items(s: PlanState, items: Int32Array, workers: int) -> None:
    """Copy the items; those that no worker begins with come after the empty ones of idle workers."""
    n = s.numbers
    moved = len(s.loads) - workers
    for item in range(len(items)):
        unit = items[item, FIRST_POSITION] // n[_TILE_REQUESTS] * n[_HEADS] + items[item, KV_HEAD]
        s.units[unit, 1] = items[item, PIECES]
    n[_USED_PIECES] = 0
    for unit in range(n[_USED_TILES] * n[_HEADS]):
        s.units[unit, 0] = n[_USED_PIECES]
        n[_USED_PIECES] += s.units[unit, 1]
    for worker in range(len(s.loads)):
        s.tails[worker] = worker
        if worker >= workers:
            at = _item_at(n, worker)
            s.packed[at : at + _FIELDS] = 0
            s.packed[at + NEXT] = -1
            continue
        index = worker
        while index >= 0:
            to = index if index < workers else index + moved
            at = _item_at(n, to)
            for field in range(_FIELDS):
                s.packed[at + field] = items[index, field]
            unit = items[index, FIRST_POSITION] // n[_TILE_REQUESTS] * n[_HEADS] + items[index, KV_HEAD]
            piece = s.units[unit, 0] + items[index, PIECE]
            s.pieces[piece, _ITEM], s.pieces[piece, _WORKER] = to, worker
            s.tails[worker] = to
            index = items[index, NEXT]
            if index >= 0:
                s.packed[at + NEXT] += moved
    n[_USED_ITEMS] = len(items) + moved


@njit
def _spread_segments(s: PlanState, segments: Int32Array) -> None:
    """Copy the segments, tile after tile with room behind each.

    A tile's follow one another, and its KV heads share them; an item's first is the one before its next.
    """
    n = s.numbers
    free = 0
    for index in range(n[_USED_TILES]):
        tile = s.tiles[index]
        first_piece, num_pieces = s.units[index * n[_HEADS]]
        tokens = 0
        for piece in range(first_piece, first_piece + num_pieces):
            tokens += s.packed[_item_at(n, s.pieces[piece, _ITEM]) + TOKENS]
        first = s.packed[_item_at(n, s.pieces[first_piece, _ITEM]) + NEXT_SEGMENT] - 1
        tile[_FIRST] = index * n[_TILE_REQUESTS]
        tile[_BEGIN] = tile[_END] = free
        while tokens > 0:
            segment, at = first + tile[_END] - free, n[_SEGMENTS_AT] + 4 * tile[_END]
            for column in range(4):
                s.packed[at + column] = segments[segment, column]
            tokens -= segments[segment, 1]
            tile[_END] += 1
        for unit in range(index * n[_HEADS], (index + 1) * n[_HEADS]):
            for piece in range(s.units[unit, 0], s.units[unit, 0] + s.units[unit, 1]):
                at = _item_at(n, s.pieces[piece, _ITEM])
                if tile[_END] > free:
                    s.packed[at + NEXT_SEGMENT] += free - first
                else:
                    s.packed[at + NEXT_SEGMENT] = free
        tile[_LIMIT] = tile[_END] + SLACK * min(n[_TILE_REQUESTS], n[_USED_POSITIONS] - tile[_FIRST])
        free = tile[_LIMIT]
    n[_USED_SEGMENTS] = free


@njit
def _tile_warps(s: PlanState, tile: int) -> int:
    """Warps that a tile's rows take."""
    n = s.numbers
    rows = min(n[_TILE_REQUESTS], n[_USED_POSITIONS] - s.tiles[tile, _FIRST]) * n[_GROUP]
    return int(-(-rows // WARP_ROWS))


@njit
def _token_steps(s: PlanState, tile: int, first_row: int, end_row: int) -> float:
    """What a token costs which these rows of a tile see, in steps of tokens that most rows see."""
    cost = 1.0 if is_together(first_row, end_row, _tile_warps(s, tile)) else s.costs[_APART]
    return float(cost / s.numbers[_STEP_TOKENS])


@njit
def _step_cost(s: PlanState, tile: int) -> float:
    """Mean cost of a step of a tile's tokens, one that most rows see costing 1."""
    packed, first, warps = s.packed, s.numbers[_SEGMENTS_AT], _tile_warps(s, tile)
    together, apart = 0, 0
    for segment in range(s.tiles[tile, _BEGIN], s.tiles[tile, _END]):
        at = first + 4 * segment
        if is_together(packed[at + 2], packed[at + 3] % READ_ONCE, warps):
            together += packed[at + 1]
        else:
            apart += packed[at + 1]
    return float(together + apart * s.costs[_APART]) / max(1, together + apart)


@njit
def _weigh(s: PlanState) -> None:
    """Sum up what workers have to do: a tile's pieces cost as its tokens do on average, as in `dealing`."""
    n = s.numbers
    s.loads[:] = 0.0
    for tile in range(n[_USED_TILES]):
        step_cost = _step_cost(s, tile)
        for unit in range(tile * n[_HEADS], (tile + 1) * n[_HEADS]):
            for piece in range(s.units[unit, 0], s.units[unit, 0] + s.units[unit, 1]):
                count = s.packed[_item_at(n, s.pieces[piece, _ITEM]) + TOKENS]
                s.loads[s.pieces[piece, _WORKER]] += s.costs[_ITEM_STEPS] + step_cost * -(-count // n[_STEP_TOKENS])


@njit
def _segment(s: PlanState, segment: int) -> tuple[int, int, int, int]:
    """First row of K and V of a segment, its tokens, and first and end row of the tile that see them."""
    at = s.numbers[_SEGMENTS_AT] + 4 * segment
    return s.packed[at], s.packed[at + 1], s.packed[at + 2], s.packed[at + 3] % READ_ONCE


@njit
def _put_segment(s: PlanState, segment: int, row: int, tokens: int, first_row: int, end_row: int) -> None:
    n = s.numbers
    at = n[_SEGMENTS_AT] + 4 * segment
    _put(s.packed, s.edited, s.edits, n, at, row)
    _put(s.packed, s.edited, s.edits, n, at + 1, tokens)
    _put(s.packed, s.edited, s.edits, n, at + 2, first_row)
    _put(s.packed, s.edited, s.edits, n, at + 3, end_row)


@njit
def append(s: PlanState, slots: Int32Array, rows: Int32Array) -> bool:
    """Add new tokens, rows of the pool for each slot; False where the tree must be planned anew."""
    n = s.numbers
    packed, edited, edits = s.packed, s.edited, s.edits
    _begin_change(n)
    for i in range(len(slots)):
        slot = slots[i]
        tile = s.slots[slot, _TILE]
        s.tiles[tile, _GAINED] += rows.shape[1]
        at = n[_SEGMENTS_AT] + 4 * s.slots[slot, _SEGMENT] + 1
        for j in range(rows.shape[1]):
            if s.slots[slot, _SEGMENT] < 0 or s.slots[slot, _NEXT_ROW] != rows[i, j]:  # a new segment
                segment = s.tiles[tile, _END]
                if segment == s.tiles[tile, _LIMIT]:
                    return False
                s.tiles[tile, _END] += 1
                s.slots[slot, _SEGMENT] = segment
                first_row = s.slots[slot, _PLACE] * n[_GROUP]
                at = n[_SEGMENTS_AT] + 4 * segment + 1
                _put(packed, edited, edits, n, at - 1, rows[i, j])
                _put(packed, edited, edits, n, at, 0)
                _put(packed, edited, edits, n, at + 1, first_row)
                _put(packed, edited, edits, n, at + 2, first_row + n[_GROUP])
            _put(packed, edited, edits, n, at, packed[at] + 1)
            s.slots[slot, _NEXT_ROW] = rows[i, j] + 1
    _lengthen(s)
    return _ends_well(s)


@njit
def append_and_count(s: PlanState, slots: Int32Array, rows: Int32Array) -> int:
    """Add new tokens as `append` does; returns how many elements that edits, -1 where the tree must be planned anew."""
    return int(s.numbers[_EDITS]) if append(s, slots, rows) else -1


@njit
def _lengthen(s: PlanState) -> None:
    """Add the tokens that tiles gained, seen by a request each, to the last piece of each of their units."""
    n = s.numbers
    for tile in range(n[_USED_TILES]):
        gained = s.tiles[tile, _GAINED]
        if gained == 0:
            continue
        token_steps = _token_steps(s, tile, 0, n[_GROUP])
        s.tiles[tile, _GAINED] = 0
        s.costs[_GROWN] += gained * token_steps * n[_HEADS]
        for unit in range(tile * n[_HEADS], (tile + 1) * n[_HEADS]):
            piece = s.units[unit, 0] + s.units[unit, 1] - 1
            at = _item_at(n, s.pieces[piece, _ITEM]) + TOKENS
            _put(s.packed, s.edited, s.edits, n, at, s.packed[at] + gained)
            s.loads[s.pieces[piece, _WORKER]] += gained * token_steps


@njit
def _ends_well(s: PlanState) -> bool:
    """Whether edits say all, and what has been lost since the plan was made is less than a new one costs.

    Where the tiles' last workers have too much to do, cuts between pieces are moved first: a cheaper way than planning.
    """
    run_us = RUNS_A_CHANGE * s.costs[_STEP_US]
    s.costs[_UNEVEN] += run_us * max(0.0, _too_many(s) - s.costs[_EVEN])
    if s.costs[_UNEVEN] >= s.costs[_CUT_US]:
        for tile in range(s.numbers[_USED_TILES]):
            _cut(s, tile)
        s.costs[_EVEN], s.costs[_UNEVEN] = max(0.0, _too_many(s)), 0.0
    s.costs[_LOST] += run_us * max(0.0, s.costs[_EVEN] - WHOLE_STEPS)
    for i in range(s.numbers[_EDITS]):
        s.edits[i, 1] = s.packed[s.edits[i, 0]]
    return bool(s.numbers[_FULL] == 0 and s.costs[_LOST] + s.costs[_UNEVEN] < s.costs[_PLAN_US])


@njit
def _too_many(s: PlanState) -> float:
    """Steps that the busiest worker has more than when the plan was made, beyond what each would have."""
    return float(s.loads.max() - s.costs[_BUSIEST] - s.costs[_GROWN] / len(s.loads))


@njit
def _cut(s: PlanState, tile: int) -> None:
    """Cut a tile's units anew, at whole steps: soon the workers of each unit's pieces have equally much to do."""
    n, packed, edited, edits = s.numbers, s.packed, s.edited, s.edits
    ends = _segment_ends(s, tile)
    step_tokens, step_cost, tokens, last_cut = n[_STEP_TOKENS], _step_cost(s, tile), ends[-1] if len(ends) else 0, -1
    for unit in range(tile * n[_HEADS], (tile + 1) * n[_HEADS]):
        first, count = s.units[unit, 0], s.units[unit, 1]
        if count == 1 or tokens < count * step_tokens:
            continue
        goal = STEPS_AHEAD / count  # of all workers but the last
        for piece in range(first, first + count):
            goal += s.loads[s.pieces[piece, _WORKER]] / count
        begin, end, exact = 0, 0, 0.0  # of the piece, in the tile's tokens
        place = 0  # of the segment that it begins in, among the tile's
        for i in range(count):
            worker, at = s.pieces[first + i, _WORKER], _item_at(n, s.pieces[first + i, _ITEM])
            exact += packed[at + TOKENS] + (goal - s.loads[worker]) / step_cost * step_tokens
            end = int(np.rint(exact / step_tokens)) * step_tokens
            most = (tokens // step_tokens - (count - 1 - i)) * step_tokens
            end = max(begin + step_tokens, min(end, most)) if i < count - 1 else tokens
            s.loads[worker] += (end - begin - packed[at + TOKENS]) * step_cost / step_tokens
            while ends[place] <= begin:
                place += 1
            segment = s.tiles[tile, _BEGIN] + place
            _put(packed, edited, edits, n, at + TOKENS, end - begin)
            _put_first_segment(packed, edited, edits, n, at, segment, ends[place] - begin)
            last_cut = max(last_cut, segment)
            begin = end
    for slot in range(len(s.slots)):  # a segment can become longer only where no piece begins behind it or in it
        if s.slots[slot, _TILE] == tile and s.slots[slot, _SEGMENT] <= last_cut:
            s.slots[slot, _SEGMENT], s.slots[slot, _NEXT_ROW] = -1, -1


@njit
def _segment_ends(s: PlanState, tile: int) -> Int64Array:
    """Ends of a tile's segments, in its tokens."""
    first = s.tiles[tile, _BEGIN]
    ends = np.empty(s.tiles[tile, _END] - first, np.int64)
    tokens = 0
    for i in range(len(ends)):
        tokens += s.packed[s.numbers[_SEGMENTS_AT] + 4 * (first + i) + 1]
        ends[i] = tokens
    return ends


@njit(inline="always")
def _put_first_segment(
    packed: Int32Array, edited: Int32Array, edits: Int32Array, n: Int64Array, at: int, segment: int, left: int
) -> None:
    """Have the item at `at` begin in a segment of which `left` tokens are left."""
    source = n[_SEGMENTS_AT] + 4 * segment
    _put(packed, edited, edits, n, at + NEXT_SEGMENT, segment + 1)
    _put(packed, edited, edits, n, at + KV_BEGIN, packed[source] + packed[source + 1] - left)
    _put(packed, edited, edits, n, at + KV_LEN, left)
    _put(packed, edited, edits, n, at + ROW_BEGIN, packed[source + 2])
    _put(packed, edited, edits, n, at + ROW_END, packed[source + 3])


@njit
def fork(s: PlanState, parents: Int32Array, slots: Int32Array) -> bool:
    """Give each new slot a tile with its parent's path; False where the tree must be planned anew."""
    _begin_change(s.numbers)
    for i in range(len(parents)):
        if s.numbers[_USED_TILES] == len(s.tiles) or not _fork_one(s, parents[i], slots[i]):
            return False
    return _ends_well(s)


@njit
def _fork_one(s: PlanState, parent: int, slot: int) -> bool:
    """A tile for one request, with all segments that its parent sees; False where there is no room for them."""
    n = s.numbers
    source = s.tiles[s.slots[parent, _TILE]]
    row = s.slots[parent, _PLACE] * n[_GROUP]
    tile = s.tiles[n[_USED_TILES]]
    tile[_FIRST] = n[_USED_POSITIONS]
    tile[_BEGIN] = tile[_END] = n[_USED_SEGMENTS]
    room = (len(s.packed) - n[_SEGMENTS_AT]) // 4 - SLACK
    tokens = 0
    for segment in range(source[_BEGIN], source[_END]):
        first, count, first_row, end_row = _segment(s, segment)
        if count > 0 and first_row <= row < end_row:
            if not _join(s, tile, first, count):
                if tile[_END] >= room:
                    return False
                _put_segment(s, tile[_END], first, count, 0, n[_GROUP])
                tile[_END] += 1
            tokens += count
    tile[_LIMIT] = tile[_END] + SLACK
    _put(s.packed, s.edited, s.edits, n, n[_ORDER_AT] + n[_USED_POSITIONS], slot)
    for head in range(n[_HEADS]):
        _add_item(s, head, tokens, slot)
    s.slots[slot, _TILE], s.slots[slot, _PLACE] = n[_USED_TILES], 0
    s.slots[slot, _SEGMENT], s.slots[slot, _NEXT_ROW] = -1, -1
    n[_USED_TILES] += 1
    n[_USED_POSITIONS] += 1
    n[_USED_SEGMENTS] = tile[_LIMIT]
    return True


@njit
def _join(s: PlanState, tile: Int32Array, first: int, count: int) -> bool:
    """Lengthen a segment of a request's own tile that ends at row `first`, if one of the last does.

    The planner has dealt out runs of rows in chunks, in turn with one another; here each is whole again.
    """
    n = s.numbers
    for segment in range(max(tile[_BEGIN], tile[_END] - JOINED_RUNS), tile[_END]):
        at = n[_SEGMENTS_AT] + 4 * segment
        if s.packed[at] + s.packed[at + 1] == first:
            _put(s.packed, s.edited, s.edits, n, at + 1, s.packed[at + 1] + count)
            return True
    return False


@njit
def _add_item(s: PlanState, head: int, tokens: int, slot: int) -> None:
    """An item for all tokens of one head of the newest tile, a request's own; the worker with least to do takes it."""
    n = s.numbers
    tile = s.tiles[n[_USED_TILES]]
    at = _item_at(n, n[_USED_ITEMS])
    for field in range(_FIELDS):
        _put(s.packed, s.edited, s.edits, n, at + field, 0)
    _put(s.packed, s.edited, s.edits, n, at + FIRST_POSITION, tile[_FIRST])
    _put(s.packed, s.edited, s.edits, n, at + NUM_REQUESTS, 1)
    _put(s.packed, s.edited, s.edits, n, at + KV_HEAD, head)
    _put(s.packed, s.edited, s.edits, n, at + TOKENS, tokens)
    _put(s.packed, s.edited, s.edits, n, at + NEXT, -1)
    _put(s.packed, s.edited, s.edits, n, at + NEXT_SEGMENT, tile[_BEGIN])
    _put(s.packed, s.edited, s.edits, n, at + PIECES, 1)
    _put(s.packed, s.edited, s.edits, n, at + FIRST_REQUEST, slot)
    if tokens > 0:
        _put(s.packed, s.edited, s.edits, n, at + NEXT_SEGMENT, tile[_BEGIN] + 1)
        for field in range(4):
            _put(
                s.packed,
                s.edited,
                s.edits,
                n,
                at + KV_BEGIN + field,
                s.packed[n[_SEGMENTS_AT] + 4 * tile[_BEGIN] + field],
            )
    worker = s.loads.argmin()
    _put(s.packed, s.edited, s.edits, n, _item_at(n, s.tails[worker]) + NEXT, n[_USED_ITEMS])
    s.tails[worker] = n[_USED_ITEMS]
    s.loads[worker] += s.costs[_ITEM_STEPS] + tokens / n[_STEP_TOKENS]  # all of the tile's rows see them
    unit = n[_USED_TILES] * n[_HEADS] + head
    s.units[unit, 0], s.units[unit, 1] = n[_USED_PIECES], 1
    s.pieces[n[_USED_PIECES], _ITEM], s.pieces[n[_USED_PIECES], _WORKER] = n[_USED_ITEMS], worker
    n[_USED_ITEMS] += 1
    n[_USED_PIECES] += 1


@njit
def finish(s: PlanState, slots: Int32Array) -> bool:
    """Take slots out of their tiles; False where the tree must be planned anew."""
    n = s.numbers
    _begin_change(n)
    for slot in slots:  # its row is nobody's
        tile, place = s.slots[slot, _TILE], s.slots[slot, _PLACE]
        _put(s.packed, s.edited, s.edits, n, n[_ORDER_AT] + s.tiles[tile, _FIRST] + place, -1)
        for unit in range(tile * n[_HEADS], (tile + 1) * n[_HEADS]):
            for piece in range(s.units[unit, 0], s.units[unit, 0] + s.units[unit, 1]):
                _put(s.packed, s.edited, s.edits, n, _item_at(n, s.pieces[piece, _ITEM]) + FIRST_REQUEST, -1)
    for slot in slots:  # and what nobody sees is not read: its rows may have been given back
        tile = s.slots[slot, _TILE]
        row = s.slots[slot, _PLACE] * n[_GROUP]
        begin = 0
        for segment in range(s.tiles[tile, _BEGIN], s.tiles[tile, _END]):
            _, count, first_row, end_row = _segment(s, segment)
            if first_row <= row < end_row and _nobody_sees(s, tile, first_row, end_row):
                _empty(s, tile, segment, begin, begin + count, _token_steps(s, tile, first_row, end_row))
            else:
                begin += count
        s.slots[slot] = -1
    return _ends_well(s)


@njit
def _nobody_sees(s: PlanState, tile: int, first_row: int, end_row: int) -> bool:
    n = s.numbers
    first = n[_ORDER_AT] + s.tiles[tile, _FIRST]
    return bool(np.all(s.packed[first + first_row // n[_GROUP] : first + end_row // n[_GROUP]] < 0))


@njit
def _empty(s: PlanState, tile: int, segment: int, begin: int, end: int, token_steps: float) -> None:
    """Take the tokens of a segment, [begin, end) of its tile's, out of the pieces."""
    n = s.numbers
    _put(s.packed, s.edited, s.edits, n, n[_SEGMENTS_AT] + 4 * segment + 1, 0)
    for unit in range(tile * n[_HEADS], (tile + 1) * n[_HEADS]):
        first = 0  # of the piece, in the tile's tokens
        for piece in range(s.units[unit, 0], s.units[unit, 0] + s.units[unit, 1]):
            item, worker = s.pieces[piece]
            at = _item_at(n, item)
            tokens = s.packed[at + TOKENS]
            taken = max(0, min(end, first + tokens) - max(begin, first))
            if s.packed[at + NEXT_SEGMENT] - 1 == segment:
                _put(s.packed, s.edited, s.edits, n, at + KV_LEN, 0)
            _put(s.packed, s.edited, s.edits, n, at + TOKENS, tokens - taken)
            s.loads[worker] -= taken * token_steps
            s.costs[_GROWN] -= taken * token_steps
            first += tokens
