"""Deals tiles out to workers: in equal stretches, whole, or each cut evenly, as the cost model finds cheapest."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.machine import WorkerMachine

__all__ = ["MERGE_TOGETHER", "Work", "deal", "estimate_us"]

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

_SHORTEST_PIECE = 2
"""Steps that a cut leaves on either side, at least."""
_FEW_STEPS = 10
"""Steps a worker from which on fewer workers are not worth a thought."""
MERGE_TOGETHER = 5
"""Pieces of a tile from which on workers merge together, where that is all that they do."""
_MANY_TILES = 32
"""Tiles a worker from which on it does not matter whether any are cut."""
_SHARES = (1.0, 0.67, 0.5, 0.33, 0.25, 0.18, 0.12)
"""Shares of the multiprocessors that small work may be given: fewer pieces are merged faster."""


class Work(NamedTuple):
    """What is to be dealt out: T tiles for each KV head.

    Attributes
    ----------
    steps : int64 (T,)
        Tiles in shared memory that each takes.
    step_costs : float64 (T,)
        Mean cost of one of these, a step whose tokens most rows see being 1.
    num_kv_heads : int
        KV heads.
    item_steps : float
        Cost of an item beside its steps.
    """

    steps: Int64Array
    step_costs: Float64Array
    num_kv_heads: int
    item_steps: float


@njit
def deal(
    work: Work, multiprocessors: int, step_us: float, size: float, machine: WorkerMachine
) -> tuple[float, Int64Array]:
    """Deal tiles out in the way that the cost model finds cheapest.

    Parameters
    ----------
    work : Work
        The tiles.
    multiprocessors : int
        Workers, at most.
    step_us : float
        Microseconds of a step whose tokens are seen together.
    size : float
        Bytes of K, V, Q and O.
    machine : WorkerMachine
        Constants of the GPU.

    Returns
    -------
    estimate : float
        Microseconds.
    pieces : int64 (P, 4)
        Tile by tile: head * tiles + tile, its first and end step, worker.
    """
    costs = work.steps * work.step_costs
    tiles = len(costs) * work.num_kv_heads
    memory_us = size / machine.hbm
    is_small = costs.sum() * work.num_kv_heads < _FEW_STEPS * multiprocessors
    best, cheapest, fewest = np.empty((0, 4), np.int64), np.inf, 0
    for share in _SHARES:
        workers = max(1, int(multiprocessors * share))
        if share < 1 and not is_small:
            break
        for way in range(2):
            if way == 1 and tiles > _MANY_TILES * workers:
                continue
            if way == 0:
                pieces = _in_line(work, costs, workers)
            elif tiles <= workers:
                pieces = _each(work, costs, workers)
            else:
                pieces = _whole(work, costs, workers)
            busiest, most_pieces = _longest(work, pieces)
            alone = len(pieces) == pieces[-1, 3] + 1
            estimate = estimate_us(busiest * step_us, memory_us, most_pieces, alone, machine)
            if len(best) == 0 or estimate < cheapest or (estimate == cheapest and workers < fewest):
                best, cheapest, fewest = pieces, estimate, workers
    return cheapest, best


@njit
def estimate_us(busiest_us: float, memory_us: float, most_pieces: int, alone: bool, machine: WorkerMachine) -> float:
    """Estimated microseconds of a run.

    Parameters
    ----------
    busiest_us, memory_us : float
        Microseconds of the busiest worker's items, and of the bytes of K, V, Q and O.
    most_pieces : int
        Pieces of the tile that has most.
    alone : bool
        Whether every worker has one item.
    machine : WorkerMachine
        Constants of the GPU.
    """
    # The two overlap, but not wholly where they are alike.
    cost = machine.start + (busiest_us**4 + memory_us**4) ** 0.25
    if most_pieces >= MERGE_TOGETHER and alone:
        cost += machine.merge_together + machine.merge_together_piece * most_pieces
    elif most_pieces > 1:
        cost += machine.merge + machine.merge_piece * most_pieces
    return float(cost)


@njit
def _pieces_of_tiles(costs: Float64Array, longest: int, shares: Int64Array) -> int:
    """Fill `shares` with the pieces of each tile when none costs more than `longest`, and return their sum."""
    total = 0
    for tile in range(len(costs)):
        shares[tile] = max(1, int(np.ceil(costs[tile] / longest)))
        total += shares[tile]
    return total


@njit
def _each(work: Work, costs: Float64Array, workers: int) -> Int64Array:
    """Cut every tile evenly, into pieces as short as the workers allow, one a worker."""
    num_tiles = len(costs)
    shares = np.ones(num_tiles, np.int64)
    low, high = _SHORTEST_PIECE, max(_SHORTEST_PIECE, int(np.ceil(costs.max())))  # cost of the longest piece
    while low < high:
        middle = (low + high) // 2
        if work.num_kv_heads * _pieces_of_tiles(costs, middle, shares) <= workers:
            high = middle
        else:
            low = middle + 1
    _pieces_of_tiles(costs, high, shares)
    pieces = np.empty((work.num_kv_heads * shares.sum(), 4), np.int64)
    at = 0
    for head in range(work.num_kv_heads):
        for tile in range(num_tiles):
            end = 0
            for share in range(1, shares[tile] + 1):
                pieces[at, 0] = head * num_tiles + tile
                pieces[at, 1] = end
                end = work.steps[tile] * share // shares[tile]
                pieces[at, 2] = end
                pieces[at, 3] = at
                at += 1
    return pieces


@njit
def _whole(work: Work, costs: Float64Array, workers: int) -> Int64Array:
    """Give every worker whole tiles that follow one another, so that the busiest has least."""
    num_tiles = len(costs)
    units = work.num_kv_heads * num_tiles
    total = work.num_kv_heads * (costs.sum() + work.item_steps * num_tiles)
    low = total / workers
    high = low + costs.max() + work.item_steps
    pieces = np.empty((units, 4), np.int64)
    while high - low > 0.5:
        middle = (low + high) / 2
        if _fill(work, costs, middle, pieces) <= workers:
            high = middle
        else:
            low = middle
    _fill(work, costs, high, pieces)
    return pieces


@njit
def _fill(work: Work, costs: Float64Array, limit: float, pieces: Int64Array) -> int:
    """Fill `pieces` with whole tiles that cost a worker at most `limit`, and return the number of workers."""
    worker, load, unit = 0, 0.0, 0
    for _ in range(work.num_kv_heads):
        for tile in range(len(costs)):
            cost = costs[tile] + work.item_steps
            if load > 0 and load + cost > limit:
                worker += 1
                load = 0.0
            load += cost
            pieces[unit, 0] = unit
            pieces[unit, 1] = 0
            pieces[unit, 2] = work.steps[tile]
            pieces[unit, 3] = worker
            unit += 1
    return worker + 1


@njit
def _in_line(work: Work, costs: Float64Array, workers: int) -> Int64Array:
    """Lay the tiles of all KV heads end to end and cut the line into equal stretches."""
    num_tiles = len(costs)
    units = work.num_kv_heads * num_tiles
    total = work.num_kv_heads * (costs.sum() + work.item_steps * num_tiles)
    pieces = np.empty((units + workers, 4), np.int64)
    at, used = 0, 0
    unit, first, position = 0, 0, 0.0
    for worker in range(workers):
        goal = total * (worker + 1) / workers
        begun = at
        while unit < units:
            tile = unit % num_tiles
            length = work.steps[tile]
            reach = max(0.0, goal - position - work.item_steps)
            end = min(length, int(np.floor(reach / work.step_costs[tile] + 0.5)))
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
            unit, first, position = unit + 1, 0, position + work.item_steps + costs[tile]
        if at > begun:  # else the worker's stretch was too short to cut
            used += 1
    return pieces[:at]


@njit
def _longest(work: Work, pieces: Int64Array) -> tuple[float, int]:
    """Cost of the busiest worker's items, and the pieces of the tile that has most."""
    num_tiles = len(work.steps)
    most, busiest = 1, 0.0
    count, load = 0, 0.0
    for i in range(len(pieces)):
        unit, first, end, worker = pieces[i]
        tile = unit % num_tiles
        count = count + 1 if i > 0 and unit == pieces[i - 1, 0] else 1
        load = load if i > 0 and worker == pieces[i - 1, 3] else 0.0
        load += work.item_steps + work.step_costs[tile] * (end - first)
        most = max(most, count)
        busiest = max(busiest, load)
    return busiest, most
