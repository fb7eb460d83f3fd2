"""A model of the warps of ``tree_decode_sm90`` with float8 K and V and one row group: who waits for whom.

Warps are generators that a seeded scheduler lets go on in any order, some much faster than others. What is modelled is
what the barriers of cuda_src/include/worker*.cuh protect: places of raw and of widened tiles, and of their views.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import NamedTuple

GROUPS = 2
"""Warpgroups that take turns at the tiles, and pairs of producer warps that do: tile t is of group t % 2."""
GROUP_WARPS = 2
"""Warps of a warpgroup: two are enough to drift apart."""
PATIENCE = 20_000
"""Turns in which nothing happens, after which nothing ever will."""

Steps = Iterator[None]


class Rings(NamedTuple):
    """Places of widened keys and values, of raw tiles, and of views."""

    keys: int
    values: int
    raw: int
    views: int


class Barrier:
    """A barrier of so many arrivals, which is asked for the parity of a phase."""

    def __init__(self, arrivals: int) -> None:
        self.arrivals = self.left = arrivals
        self.over = 0

    def arrive(self, count: int = 1) -> None:
        self.left -= count
        if self.left < 0:
            raise AssertionError("more arrivals than a phase has")
        if self.left == 0:
            self.left, self.over = self.arrivals, self.over + 1

    def wait(self, phase: int) -> Steps:
        """Until the phase is over, by its parity; an AssertionError where that was another one's."""
        while self.over % 2 == phase % 2:
            yield
        if self.over != phase + 1:
            raise AssertionError(f"phase {phase} is taken for another: {self.over} are over")


def barriers(places: int, arrivals: int) -> list[Barrier]:
    return [Barrier(arrivals) for _ in range(places)]


class Worker:
    """One worker and its tiles.

    Parameters
    ----------
    rings : Rings
    widened : list of bool
        For each tile whether most rows see it, so that it is widened; else consumers read it as it came.
    """

    def __init__(self, rings: Rings, widened: list[bool]) -> None:
        self.rings, self.widened = rings, widened
        self.raw_k_full, self.raw_v_full = barriers(rings.raw, 1), barriers(rings.raw, 1)
        self.raw_k_empty, self.raw_v_empty = (barriers(rings.raw, 1 + GROUP_WARPS) for _ in range(2))
        self.view_full = barriers(rings.views, 1)
        self.k_full, self.v_full = barriers(rings.keys, 1), barriers(rings.values, 1)
        self.k_empty, self.v_empty = barriers(rings.keys, GROUP_WARPS), barriers(rings.values, GROUP_WARPS)
        self.views_left = [1 + GROUP_WARPS] * len(widened)
        """Warps that still need a tile's view: all that widen as one, and each of its warpgroup."""
        self.at_product = [0] * len(widened)

    def warps(self) -> list[Steps]:
        consumers = [self.consumer(group) for group in range(GROUPS) for _ in range(GROUP_WARPS)]
        return [self.producer(0), self.producer(1), self.widener(), *consumers]

    def widened_place(self, group: int, number: int, places: int) -> tuple[int, int]:
        """Place and phase of a warpgroup's so many-th widened tile."""
        own = places // GROUPS
        return group + GROUPS * (number % own), number // own

    def producer(self, pair: int) -> Steps:
        for tile in range(pair, len(self.widened), GROUPS):
            phase, place = divmod(tile, self.rings.raw)
            if phase > 0:
                yield from self.raw_k_empty[place].wait(phase - 1)
            before = tile - self.rings.views
            if before >= 0 and self.views_left[before] > 0:
                raise AssertionError(f"the view of tile {before} is overwritten")
            yield
            self.raw_k_full[place].arrive()
            yield
            self.view_full[tile % self.rings.views].arrive()
            if phase > 0:
                yield from self.raw_v_empty[place].wait(phase - 1)
            yield
            self.raw_v_full[place].arrive()

    def widener(self) -> Steps:
        numbers = [0] * GROUPS
        for tile, is_widened in enumerate(self.widened):
            yield from self.view_full[tile % self.rings.views].wait(tile // self.rings.views)
            self.views_left[tile] -= 1
            yield
            phase, place = divmod(tile, self.rings.raw)
            if not is_widened:
                self.raw_k_empty[place].arrive()
                self.raw_v_empty[place].arrive()
                continue
            for full, empty in ((self.raw_k_full, self.raw_k_empty), (self.raw_v_full, self.raw_v_empty)):
                yield from full[place].wait(phase)
                yield
                empty[place].arrive(1 + GROUP_WARPS)  # for the consumers, too
            group = tile % GROUPS
            for full, empty in ((self.k_full, self.k_empty), (self.v_full, self.v_empty)):
                own, own_phase = self.widened_place(group, numbers[group], len(full))
                if own_phase > 0:
                    yield from empty[own].wait(own_phase - 1)
                yield
                full[own].arrive()
            numbers[group] += 1

    def consumer(self, group: int) -> Steps:
        number = 0
        behind: int | None = None  # the number of the widened tile whose values are still to be added
        for tile in range(group, len(self.widened), GROUPS):
            yield from self.view_full[tile % self.rings.views].wait(tile // self.rings.views)
            if self.widened[tile]:
                yield from self.attend_together(group, tile, number, behind)
                behind, number = number, number + 1
            else:
                yield from self.add_values(group, behind)
                behind = None
                yield from self.attend_raw(tile)
        yield from self.add_values(group, behind)

    def attend_together(self, group: int, tile: int, number: int, behind: int | None) -> Steps:
        place, phase = self.widened_place(group, number, self.rings.keys)
        yield from self.k_full[place].wait(phase)
        self.at_product[tile] += 1
        while self.at_product[tile] < GROUP_WARPS:  # a product of the whole warpgroup
            yield
        yield
        self.k_empty[place].arrive()
        yield
        self.views_left[tile] -= 1
        yield from self.add_values(group, behind)

    def add_values(self, group: int, number: int | None) -> Steps:
        if number is not None:
            place, phase = self.widened_place(group, number, self.rings.values)
            yield from self.v_full[place].wait(phase)
            yield
            self.v_empty[place].arrive()

    def attend_raw(self, tile: int) -> Steps:
        phase, place = divmod(tile, self.rings.raw)
        yield from self.raw_k_full[place].wait(phase)
        yield
        yield from self.raw_v_full[place].wait(phase)
        self.raw_k_empty[place].arrive()
        yield
        self.views_left[tile] -= 1
        yield
        self.raw_v_empty[place].arrive()

    def progress(self) -> int:
        """What changes whenever something happens that others may wait for."""
        rings = (
            *(self.raw_k_full, self.raw_v_full, self.raw_k_empty, self.raw_v_empty, self.view_full),
            *(self.k_full, self.v_full, self.k_empty, self.v_empty),
        )
        arrived = sum(barrier.over * barrier.arrivals - barrier.left for ring in rings for barrier in ring)
        return arrived + sum(self.at_product) - sum(self.views_left)


def run(rings: Rings, seed: int, tiles: int = 60) -> None:
    """Run a worker under a random schedule; an AssertionError where its barriers do not hold, or nothing goes on."""
    rng = random.Random(seed)
    run_length = rng.randint(1, 9)
    widened = [rng.random() < 0.5 if seed % 3 else tile // run_length % 2 == 0 for tile in range(tiles)]
    worker = Worker(rings, widened)
    warps = worker.warps()
    idle, progress = 0, worker.progress()
    while warps:
        speeds = [rng.choice((1, 1, 3, 10, 40)) for _ in warps]
        for warp in rng.choices(warps, speeds, k=200):
            if warp in warps and next(warp, "done") == "done":
                warps.remove(warp)
        before, progress = progress, worker.progress()
        idle = idle + 200 if progress == before and warps else 0
        if idle > PATIENCE:
            raise AssertionError("nothing goes on")
