"""A tree that grows, in plain Python: lists of rows, random changes, and a walk of a plan's arrays as the kernel's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.row_tiles import READ_ONCE

__all__ = ["KINDS", "Device", "Model", "rows_attended"]

KINDS = ("append", "append", "append_some", "fork", "finish")
"""Changes to choose from, the first ones more often."""


class Model:
    """Each live slot's rows of K and V, of a pool whose free rows are used again.

    Its `append`, `fork` and `finish` take and return what those of `DecodePlan` do.
    """

    def __init__(self, paths: Sequence[Sequence[int]], slots: int, pool_rows: int) -> None:
        self.paths = {slot: [int(row) for row in rows] for slot, rows in enumerate(paths)}
        self.slots = slots
        self.pool_rows = pool_rows

    def held(self) -> set[int]:
        """Rows that some request has."""
        return set().union(*self.paths.values())

    def choose(self, kind: str, seed: int) -> tuple[Any, ...]:
        """Arguments of a random change of a kind that fits: slots, and for an append rows too."""
        rng = np.random.default_rng(seed)
        live = np.array(sorted(self.paths))
        if kind == "fork":
            return (rng.choice(live, min(self.slots - len(live), int(rng.integers(4)))),)
        if kind == "finish":
            return (rng.permutation(live)[: min(len(live) - 1, int(rng.integers(4)))],)
        slots = live if kind == "append" else rng.permutation(live)[: int(rng.integers(len(live) + 1))]
        free = sorted(set(range(self.pool_rows)) - self.held())
        tokens = min(int(rng.integers(4)), len(free) // max(1, len(slots)))
        if rng.integers(2):  # else rows that follow one another, often
            rng.shuffle(free)
        rows = np.array(free[: len(slots) * tokens], np.int64).reshape(len(slots), tokens)
        return slots, rows

    def append(self, slots: Sequence[int], rows: Any) -> None:
        for slot, new in zip(slots, rows, strict=True):
            self.paths[int(slot)] += [int(row) for row in new]

    def fork(self, parents: Sequence[int]) -> list[int]:
        free = [slot for slot in range(self.slots) if slot not in self.paths]
        for slot, parent in zip(free, parents, strict=False):
            self.paths[slot] = list(self.paths[int(parent)])
        return free[: len(parents)]

    def finish(self, slots: Sequence[int]) -> None:
        for slot in slots:
            del self.paths[int(slot)]


class Device:
    """The arrays as a GPU would hold them: what was copied, then edit after edit."""

    def __init__(self, plan: GrowingPlan) -> None:
        self.plan = plan
        # What was never written may hold anything.
        self.packed = np.random.default_rng(0).integers(1, 1000, plan.sizes.total).astype(np.int32)
        self.copy()

    def copy(self) -> None:
        self.packed[: self.plan.used] = self.plan.packed[: self.plan.used]

    def follow(self, fits: bool) -> None:
        if not fits:
            self.copy()
            return
        where, values = self.plan.edits.T
        assert len(set(where.tolist())) == len(where)  # threads write them in any order
        self.packed[where] = values


def rows_attended(plan: GrowingPlan, packed: Any, group: int, kv_heads: int) -> list[dict[int, list[int]]]:
    """Rows of K and V that each KV head of each slot attends to, sorted; checks what the kernel relies on."""
    s = plan.sizes
    items = packed[s.items_at : s.items_at + 16 * s.items].reshape(-1, 16)
    order = packed[s.order_at :]
    segments = packed[s.segments_at : s.segments_at + 4 * s.segments].reshape(-1, 4)
    attended: list[dict[int, list[int]]] = [{} for _ in range(kv_heads)]
    visited: set[int] = set()
    pieces: dict[tuple[int, int], list[tuple[int, ...]]] = {}
    for worker in range(plan.workers):
        index = worker
        while index >= 0:
            assert index not in visited
            visited.add(index)
            item = items[index].tolist()
            first, count, head, left, index, following = item[:6]
            assert left >= 0
            assert 0 <= count * group <= 64 * plan.row_groups
            if count == 0:
                assert left == 0
                continue
            slots = order[first : first + count].tolist()
            if item[10] >= 0:
                assert slots == list(range(item[10], item[10] + count))
            pieces.setdefault((head, first), []).append((*item[6:10], item[11]))
            if item[6] == 0:
                for slot in slots:
                    assert slot < 0 or slot not in attended[head]
                    if slot >= 0:
                        attended[head][slot] = []
            segment = item[12:]
            while left > 0:
                begin, length, row_begin, row_end = segment
                row_end %= READ_ONCE
                assert length >= 0
                taken = min(length, left)
                if taken > 0:
                    assert 0 <= row_begin < row_end <= count * group
                    assert row_begin % group == row_end % group == 0
                    seen_by = [slot for slot in slots[row_begin // group : row_end // group] if slot >= 0]
                    assert seen_by, "rows are read that no request sees"
                    for slot in seen_by:
                        attended[head].setdefault(slot, []).extend(range(begin, begin + taken))
                left -= taken
                if left > 0:
                    assert following < s.segments
                    segment = segments[following].tolist()
                    following += 1
    check_pieces(plan, pieces)
    return [{slot: sorted(rows) for slot, rows in found.items()} for found in attended]


def check_pieces(plan: GrowingPlan, pieces: dict[tuple[int, int], list[tuple[int, ...]]]) -> None:
    """Pieces are numbered, share a counter, and own one partial output each, within the arrays' sizes."""
    partials: list[int] = []
    counters: list[int] = []
    for found in pieces.values():
        assert sorted(piece for piece, *_ in found) == list(range(len(found)))
        assert {of for _, of, *_ in found} == {len(found)}
        if len(found) > 1:
            ((partial, counter, together),) = {tuple(rest) for _, _, *rest in found}
            partials += range(partial, partial + len(found))
            counters += range(counter, counter + (len(found) if together else 1))
    assert len(set(partials)) == len(partials)
    assert max(partials, default=-1) < plan.sizes.partials
    assert len(set(counters)) == len(counters)
    assert (max(counters, default=-1) + 1) * plan.row_groups <= plan.sizes.counters
