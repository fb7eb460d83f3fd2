"""The plan that follows a growing tree: after every change its arrays mean the tree, and edits carry them over."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from unittest import mock

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.planning import balanced, growing, growing_passes
from fasttree_cupy.planning.balanced import ITEM_FIELDS, STEP_TOKENS
from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.growing_tree import GrowingTree
from fasttree_cupy.planning.machine import H200_WORKERS
from tests.growing_walk import KINDS, Device, Model, rows_attended
from tests.test_balanced import ROW_GROUPS

hypothesis = pytest.importorskip("hypothesis", reason="no hypothesis")
st = hypothesis.strategies

CHANGES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1)), min_size=25, max_size=25)
TREES = (
    ft.KVTree.from_levels([1, 3, 12], [130, 33, 17]),
    ft.KVTree.from_levels([1, 90], [700, 3]),
    ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0, 1, 2, 3, 3]),
    ft.KVTree([-1], [0], [0]),
)
"""Long prefixes, many leaves, requests without tokens, nothing at all."""


class Growing:
    """A tree, its plan, what a GPU would hold, and the model, which all change together."""

    def __init__(
        self, tree: ft.KVTree, group: int, kv_heads: int, workers: int, row_groups: int, shuffle: bool
    ) -> None:
        rng = np.random.default_rng(0)
        pool_rows = tree.unique_tokens + 150
        rows = (rng.permutation(pool_rows) if shuffle else np.arange(pool_rows))[: tree.unique_tokens].astype(np.int32)
        capacity = ft.Capacity(tree.batch_size + 7, pool_rows)
        self.tree = GrowingTree(tree, rows, capacity)
        self.layout = (group, kv_heads, 128)
        self.plan = GrowingPlan(self.tree, group, kv_heads, 128, workers, ROW_GROUPS[row_groups])
        assert self.plan.row_groups == row_groups or tree.unique_tokens == 0  # where both cost the same
        self.device = Device(self.plan)
        self.model = Model([rows[tree.request_rows(i)] for i in range(tree.batch_size)], capacity.requests, pool_rows)
        self.planned = 0

    def change(self, kind: str, seed: int) -> None:
        arguments = [np.asarray(argument, np.int32) for argument in self.model.choose(kind, seed)]
        name = kind.removesuffix("_some")
        made = getattr(self.tree, name)(*arguments)
        assert (None if made is None else made.tolist()) == getattr(self.model, name)(*arguments)
        if name == "fork":
            arguments.append(made)
        fits = getattr(self.plan, name)(*arguments)
        self.planned += not fits
        self.device.follow(fits)

    def check(self) -> None:
        expected = {slot: sorted(rows) for slot, rows in self.model.paths.items()}
        for attended in rows_attended(self.plan, self.device.packed, *self.layout[:2]):
            assert attended == expected
        tree, rows = self.tree.snapshot()
        assert tree.unique_tokens == self.tree.tokens == len(self.model.held())
        assert self.tree.live.tolist() == sorted(self.model.paths)
        for request, slot in enumerate(self.tree.live.tolist()):
            assert rows[tree.request_rows(request)].tolist() == self.model.paths[slot]


@pytest.mark.parametrize(
    ("plan_us", "cut_us"),
    [(0.1, 1e9), (growing.PLAN_US, growing.CUT_US), (1e9, 1e9), (1e9, 0.1)],
    ids=["planned", "usual", "edited", "cut"],
)
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    changes=CHANGES,
    tree=st.sampled_from(TREES),
    layout=st.sampled_from([(1, 2), (3, 1), (16, 1), (64, 2)]),
    workers=st.sampled_from([1, 5, 132]),
    row_groups=st.sampled_from([1, 2]),
    shuffle=st.booleans(),
)
def test_random_changes(
    changes: list[tuple[str, int]],
    tree: ft.KVTree,
    layout: tuple[int, int],
    workers: int,
    row_groups: int,
    shuffle: bool,
    plan_us: float,
    cut_us: float,
) -> None:
    with mock.patch.object(growing, "PLAN_US", plan_us), mock.patch.object(growing, "CUT_US", cut_us):
        grown = Growing(tree, *layout, workers, row_groups, shuffle)
    grown.check()
    for kind, seed in changes:
        grown.change(kind, seed)
        grown.check()


def test_tiles_are_filled_where_other_plans_leave_rows_empty() -> None:
    tree = ft.KVTree.from_levels([1, 2, 64], [8, 256, 32])
    rows = np.arange(tree.unique_tokens, dtype=np.int32)
    plan = GrowingPlan(GrowingTree(tree, rows, ft.Capacity(64, tree.unique_tokens)), 1, 32, 128, 132, H200_WORKERS)
    assert balanced.plan(tree, 1, 32, 128, 132, H200_WORKERS).items[:, 1].max() == 16
    assert plan.made.items[:, 1].max() == 64
    expected = {slot: sorted(rows[tree.request_rows(slot)]) for slot in range(64)}
    for attended in rows_attended(plan, Device(plan).packed, 1, 32):
        assert attended == expected


def growing_tree_and_plan(tree: ft.KVTree, more_tokens: int) -> tuple[GrowingTree, GrowingPlan]:
    rows = np.arange(tree.unique_tokens, dtype=np.int32)
    growing_tree = GrowingTree(tree, rows, ft.Capacity(tree.batch_size, tree.unique_tokens + more_tokens))
    return growing_tree, GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS)


def appends(growing_tree: GrowingTree, plan: GrowingPlan, requests: int, steps: int) -> Iterator[bool]:
    """The first requests gain a token each step, in runs of rows of their own; yields whether edits were enough."""
    first_row, slots = growing_tree.tokens, np.arange(requests, dtype=np.int32)
    for step in range(steps):
        new = (first_row + steps * np.arange(requests) + step).astype(np.int32)[:, None]
        growing_tree.append(slots, new)
        yield plan.append(slots, new)


def test_a_step_edits_a_number_a_request_and_a_number_a_tile_and_head() -> None:
    growing_tree, plan = growing_tree_and_plan(ft.KVTree.from_levels([1, 16, 64], [1024, 256, 32]), 64 * 10)
    tiles = 64 * 4 // (64 * plan.row_groups)
    for step, fits in enumerate(islice(appends(growing_tree, plan, 64, 10), 2)):  # the third moves cuts too
        assert fits
        assert len(plan.edits) == 8 * tiles + (64 if step else 4 * 64)


def append_a_token_a_step(tree: ft.KVTree, requests: int, steps: int) -> tuple[GrowingTree, GrowingPlan, list[int]]:
    """A tree whose first requests have gained a token each step, and the steps in which it was planned anew."""
    growing_tree, plan = growing_tree_and_plan(tree, requests * steps)
    device, planned = Device(plan), []
    for step, fits in enumerate(appends(growing_tree, plan, requests, steps)):
        device.follow(fits)
        if not fits:
            planned.append(step)
    for attended in rows_attended(plan, device.packed, 4, 8):
        for slot, found in attended.items():
            own = tree.unique_tokens + steps * slot + np.arange(steps if slot < requests else 0)
            assert found == [*tree.request_rows(slot).tolist(), *own.tolist()]
    return growing_tree, plan, planned


def test_drift_is_cut_away() -> None:
    """Without a new plan the busiest worker has no more to do than with one, but for what whole steps leave."""
    growing_tree, plan, planned = append_a_token_a_step(ft.KVTree.from_levels([1, 16, 64], [1024, 256, 32]), 64, 100)
    assert planned == []
    growing_passes._weigh(plan.state)
    anew = GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS)
    assert plan.state.loads.max() <= anew.state.loads.max() + 2


def test_cuts_leave_the_piece_that_grows_less() -> None:
    """So that they last: each step's appends come to a quarter of a step, and 8 pieces are cut at whole ones."""
    growing_tree, plan = growing_tree_and_plan(ft.KVTree.from_levels([1, 16, 64], [1024, 256, 32]), 64 * 256)
    moved, spare, uneven_before = 0, [], 0.0
    for fits in appends(growing_tree, plan, 64, 256):
        assert fits
        uneven = plan.state.costs[growing_passes._UNEVEN]
        is_moved, uneven_before = uneven < uneven_before, uneven
        if is_moved:
            moved += 1
            last = plan.state.units[: plan.made.merges].sum(axis=1) - 1
            loads = plan.state.loads[plan.state.pieces[last, 1]]
            spare.append(float(plan.state.loads.max() - loads.max()))
    assert 16 <= moved <= 32
    assert np.mean(spare) > 0.5


def test_cuts_are_at_whole_steps() -> None:
    """Of short tiles in many pieces, whose cuts move whenever they can."""
    tree = ft.KVTree.from_levels([1, 3], [700, 90])
    growing_tree = GrowingTree(tree, np.arange(tree.unique_tokens, dtype=np.int32), ft.Capacity(3, 2000))
    with mock.patch.object(growing, "PLAN_US", 1e9), mock.patch.object(growing, "CUT_US", 0.1):
        plan = GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS)
    state, cuts = plan.state, set()
    for step in range(200):
        new = (1000 + 200 * np.arange(3) + step).astype(np.int32)[:, None]
        growing_tree.append(growing_tree.live, new)
        assert plan.append(growing_tree.live, new)
        for first, count in state.units[: state.numbers[growing_passes._USED_TILES] * 8]:
            items = state.pieces[first : first + count - 1, 0]
            tokens = plan.packed[plan.sizes.items_at + 16 * items + ITEM_FIELDS.index("tokens")]
            assert not (tokens % STEP_TOKENS[plan.row_groups]).any()
            cuts.add(tuple(tokens.tolist()))
    assert len(cuts) > 1  # they have moved


def test_drift_that_no_cut_ends_is_paid_for_and_ends_in_a_new_plan() -> None:
    """Tiles that are not cut, of which one alone grows."""
    growing_tree, plan, planned = append_a_token_a_step(ft.KVTree.from_levels([1, 4, 256], [8, 256, 32]), 16, 128)
    assert 1 <= len(planned) <= 20
    anew = GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS).made.estimate_us
    assert plan.made.estimate_us <= anew <= 1.1 * plan.made.estimate_us


def test_more_forks_than_there_is_room_for_are_planned() -> None:
    tree = ft.KVTree.from_levels([1, 2], [300, 20])
    capacity = ft.Capacity(2 + growing_passes.FORKS + 1, 400)
    growing_tree = GrowingTree(tree, np.arange(340, dtype=np.int32), capacity)
    with mock.patch.object(growing, "PLAN_US", 1e9):
        plan = GrowingPlan(growing_tree, 4, 1, 64, 132, H200_WORKERS)
    parents = np.zeros(growing_passes.FORKS, np.int32)
    assert plan.fork(parents, growing_tree.fork(parents))
    assert not plan.fork(parents[:1], growing_tree.fork(parents[:1]))


def test_a_change_of_more_elements_than_there_is_room_for_is_planned() -> None:
    tree = ft.KVTree.from_levels([1, 20], [300, 20])
    growing_tree = GrowingTree(tree, np.arange(tree.unique_tokens, dtype=np.int32), ft.Capacity(20, 2000))
    with mock.patch.object(growing_passes, "MOST_EDITS", 40), mock.patch.object(growing, "PLAN_US", 1e9):
        plan = GrowingPlan(growing_tree, 4, 1, 128, 132, H200_WORKERS)
    fits = []
    for slots in (growing_tree.live, growing_tree.live[:1]):
        rows = np.arange(1000, 1000 + len(slots), dtype=np.int32)[:, None]
        growing_tree.append(slots, rows)
        fits.append(plan.append(slots, rows))
    assert fits == [False, True]


def test_a_fork_joins_what_was_dealt_out() -> None:
    """The planner cuts a node's tokens into chunks; a forked request has a segment for each node of its path."""
    tree = ft.KVTree.from_levels([1, 16, 64], [1024, 256, 320])
    growing_tree = GrowingTree(tree, np.arange(tree.unique_tokens, dtype=np.int32), ft.Capacity(65, tree.unique_tokens))
    with mock.patch.object(growing, "PLAN_US", 1e9):  # else the fork is planned
        plan = GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS)
    device, tiles = Device(plan), plan.state.numbers[growing_passes._USED_TILES]
    parents = np.array([5], np.int32)
    (slot,) = slots = growing_tree.fork(parents)
    assert plan.fork(parents, slots)
    device.follow(True)
    for attended in rows_attended(plan, device.packed, 4, 8):
        assert attended[slot] == attended[5] == tree.request_rows(5).tolist()
    tile = plan.state.tiles[tiles]
    assert tile[growing_passes._END] - tile[growing_passes._BEGIN] == 3


def test_what_workers_have_to_do_follows_the_changes() -> None:
    """Sums of edit after edit are those of all tokens, but for a step of each piece that is not full."""
    tree = ft.KVTree.from_levels([1, 16, 64], [1024, 256, 320])
    growing_tree = GrowingTree(tree, np.arange(tree.unique_tokens, dtype=np.int32), ft.Capacity(70, 10**5))
    with mock.patch.object(growing, "PLAN_US", 1e9):
        plan = GrowingPlan(growing_tree, 4, 8, 128, 132, H200_WORKERS)
    parents = np.array([0, 5], np.int32)
    assert plan.fork(parents, growing_tree.fork(parents))
    rows = (50000 + np.arange(66 * 40, dtype=np.int32)).reshape(66, 40)
    slots = growing_tree.live
    growing_tree.append(slots, rows)
    assert plan.append(slots, rows)
    finished = np.arange(3, 9, dtype=np.int32)
    growing_tree.finish(finished)
    assert plan.finish(finished)
    loads = plan.state.loads.copy()
    growing_passes._weigh(plan.state)
    used = plan.state.numbers[growing_passes._USED_PIECES]
    pieces = np.bincount(plan.state.pieces[:used, growing_passes._WORKER], minlength=len(loads))
    assert (np.abs(loads - plan.state.loads) <= pieces).all()


def test_a_capacity_too_large_for_int32_is_refused() -> None:
    tree = ft.KVTree.from_levels([1], [5])
    with pytest.raises(ValueError, match=r"capacity is Capacity.*expected at most 2147483647"):
        growing.sizes(ft.Capacity(10**5, 10**6), 16, 8, 132, 1)
    with pytest.raises(ValueError, match="capacity is Capacity"):
        GrowingPlan(
            GrowingTree(tree, np.arange(5, dtype=np.int32), ft.Capacity(10**5, 10**6)), 4, 1, 64, 132, H200_WORKERS
        )
