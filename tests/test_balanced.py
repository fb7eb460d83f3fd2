"""The planner for persistent workers, and its kernel: every path once, equal shares, right however a tile is cut."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution.kernels import WORKER_GROUP_ROWS, WORKER_TILE_TOKENS
from fasttree_cupy.execution.schedule import BalancedSchedule
from fasttree_cupy.planning import balanced
from fasttree_cupy.planning.balanced import BalancedPlan
from fasttree_cupy.planning.dealing import MERGE_TOGETHER
from fasttree_cupy.planning.layout import depth_first, lay_out
from fasttree_cupy.planning.machine import H200, H200_WORKERS, Constants, WorkerMachine, WorkerRates
from fasttree_cupy.planning.row_tiles import READ_ONCE, tile_tokens
from tests.cases import TREES, Tree
from tests.plans import poison_partials
from tests.reference import dense_attention, path_rows
from tests.test_decode import DTYPES
from tests.tolerances import assert_close

SLOW = WorkerRates(1e6, 1e6, 1e6)
ROW_GROUPS = {1: H200_WORKERS._replace(two_groups=SLOW), 2: H200_WORKERS._replace(one_group=SLOW)}
"""Machines for which two row groups, or one, look too slow."""


def as_kv_tree(tree: Tree) -> ft.KVTree:
    return ft.KVTree(tree.parent, tree.seqlen, tree.request_node)


def rows_seen(made: BalancedPlan, group: int, kv_heads: int) -> list[list[list[int]]]:
    """Rows of K and V that each KV head of each request attends to, walked worker by worker as the kernel does."""
    seen: list[list[list[int]]] = [[[] for _ in made.request_order] for _ in range(kv_heads)]
    visited: list[int] = []
    pieces: dict[tuple[int, int], list[tuple[int, int, int, int, int]]] = {}
    for worker in range(made.workers):
        index = worker
        while index >= 0:
            visited.append(index)
            first, count, head, left, index, following, *cut = made.items[index].tolist()
            piece, of, partial, counter, first_request, together = cut[:6]
            segment = made.items[visited[-1], 12:].tolist()
            assert 0 < count * group <= WORKER_GROUP_ROWS * made.row_groups
            pieces.setdefault((head, first), []).append((piece, of, partial, counter, together))
            requests = made.request_order[first : first + count]
            follow = np.array_equal(requests, requests[0] + np.arange(count))
            assert first_request == (requests[0] if follow else -1)
            while left > 0:
                begin, length, row_begin, row_end = segment
                row_end %= READ_ONCE
                assert length > 0
                assert 0 <= row_begin < row_end <= count * group
                assert row_begin % group == row_end % group == 0
                taken = min(length, left)
                for i in range(row_begin // group, row_end // group):
                    seen[head][made.request_order[first + i]] += range(begin, begin + taken)
                left -= taken
                if left > 0:
                    segment = made.segments[following].tolist()
                    following += 1
    assert sorted(visited) == list(range(len(made.items)))
    check_pieces(made, pieces)
    return seen


def check_pieces(made: BalancedPlan, pieces: dict[tuple[int, int], list[tuple[int, int, int, int, int]]]) -> None:
    """Pieces of a tile are numbered, share their counters, and own one partial output each.

    Workers merge together only where each has one item: then they all end with the same rows.
    """
    partials: list[int] = []
    counters: list[int] = []
    merges = 0
    for found in pieces.values():
        assert sorted(piece for piece, *_ in found) == list(range(len(found)))
        assert {of for _, of, *_ in found} == {len(found)}
        if len(found) > 1:
            ((first, counter, together),) = {tuple(rest) for _, _, *rest in found}
            partials += range(first, first + len(found))
            assert not together or len(made.items) == made.workers
            counters += range(counter, counter + (len(found) if together else 1))
            merges += 1
    assert sorted(partials) == list(range(made.partials))
    assert sorted(counters) == list(range(made.counters))
    assert merges == made.merges


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
@pytest.mark.parametrize(("group", "kv_heads"), [(1, 2), (3, 1), (16, 1), (100, 1)])
def test_each_path_is_read_once(tree: Tree, group: int, kv_heads: int) -> None:
    kv_tree = as_kv_tree(tree)
    made = balanced.plan(kv_tree, group, kv_heads, 128, 132, H200_WORKERS)
    np.testing.assert_array_equal(np.sort(made.request_order), np.arange(kv_tree.batch_size))
    for rows in rows_seen(made, group, kv_heads):
        for request, found in enumerate(rows):
            expected = path_rows(tree.parent, tree.seqlen, tree.request_node[request])
            np.testing.assert_array_equal(np.sort(found), np.sort(expected))


@pytest.mark.parametrize("workers", [1, 2, 7, 40])
@pytest.mark.parametrize("row_groups", [1, 2])
@pytest.mark.parametrize("group", [1, 5, 64])
def test_each_path_is_read_once_however_it_is_cut(group: int, row_groups: int, workers: int) -> None:
    for tree in TREES[:5] + TREES[20::20]:
        made = balanced.plan(as_kv_tree(tree), group, 2, 128, workers, ROW_GROUPS[row_groups])
        assert made.row_groups == row_groups
        assert made.workers <= workers
        for rows in rows_seen(made, group, 2):
            for request, found in enumerate(rows):
                expected = path_rows(tree.parent, tree.seqlen, tree.request_node[request])
                np.testing.assert_array_equal(np.sort(found), np.sort(expected))


def test_tiles_are_cut_only_where_that_pays() -> None:
    many = balanced.plan(ft.KVTree.from_levels([1, 16, 1024], [256, 64, 32]), 4, 8, 128, 132, H200_WORKERS)
    assert many.partials == many.merges == many.counters == 0  # whole tiles, some more than there are workers
    few = balanced.plan(ft.KVTree.from_levels([1, 10], [4000, 400]), 16, 1, 128, 132, H200_WORKERS)
    assert few.items[:, 11].all()  # each tile's workers end together, and merge together
    assert len(few.items) == few.workers == few.partials
    one = balanced.plan(ft.KVTree.from_levels([1, 2], [1, 20]), 16, 1, 128, 132, H200_WORKERS)
    assert one.workers == len(one.items) == 1  # too little to share


def test_workers_with_other_items_do_not_merge_together() -> None:
    """Though a tile has as many pieces as pay for that."""
    made = balanced.plan(ft.KVTree.from_levels([1, 300], [9000, 40]), 8, 2, 128, 132, H200_WORKERS)
    assert len(made.items) > made.workers
    assert made.items[:, balanced.ITEM_FIELDS.index("pieces")].max() >= MERGE_TOGETHER
    rows_seen(made, 8, 2)


@pytest.mark.parametrize(("levels", "tokens"), [([1, 1024], [2048, 32]), ([256], [4096]), ([1, 3], [90000, 7])])
def test_workers_get_equal_shares(levels: list[int], tokens: list[int]) -> None:
    if len(levels) == 1:
        levels, tokens = [1, *levels], [0, *tokens]
    made = balanced.plan(ft.KVTree.from_levels(levels, tokens), 4, 8, 128, 132, H200_WORKERS)
    loads = []
    for worker in range(made.workers):
        loads.append(0)
        index = worker
        while index >= 0:
            loads[-1] += -(-int(made.items[index, 3]) // WORKER_TILE_TOKENS[made.row_groups]) + 2
            index = int(made.items[index, 4])
    assert made.workers >= 120
    assert max(loads) <= 1.1 * np.mean(loads) + 4


def test_tokens_of_one_tile_are_marked_as_read_once() -> None:
    # Tiles of 64 requests: the root is read by two, a child of 40 by one of them, one of 60 by both.
    parents, requests = [-1, 0, 0], np.repeat([1, 2], [40, 60]).astype(np.int32)
    tree = ft.KVTree.from_parents(parents, [100, 80, 48], requests)
    made = balanced.plan(tree, 1, 1, 128, 1, ROW_GROUPS[1])
    marks: dict[int, set[bool]] = {0: set(), 1: set(), 2: set()}
    for begin, length, _, end in made.segments.tolist():
        node = int(np.searchsorted(tree.kv_ptrs, begin, side="right")) - 1
        assert begin + length <= tree.kv_ptrs[node + 1]
        marks[node].add(end >= READ_ONCE)
    assert marks == {0: {False}, 1: {True}, 2: {False}}
    much = balanced.plan(ft.KVTree.from_levels([1, 2], [0, 10**6]), 1, 8, 128, 132, H200_WORKERS)
    assert (much.segments[:, 3] < READ_ONCE).all()  # more than the cache holds many times over


def test_enough_tiles_for_all_are_cut_at_workers_borders_only() -> None:
    made = balanced.plan(ft.KVTree.from_levels([1, 1024], [64, 640]), 1, 32, 128, 132, H200_WORKERS)
    assert made.counters < made.workers
    assert made.partials <= 2 * made.counters + 1


def test_little_work_goes_to_few_workers() -> None:
    made = balanced.plan(ft.KVTree.from_levels([1], [100]), 4, 1, 128, 132, H200_WORKERS)
    assert (made.workers, made.partials, len(made.items)) == (1, 0, 1)


def test_tokens_that_all_warps_with_rows_see_come_first() -> None:
    # Ten rows lie in one warp of a tile, which sees every token: to deal these out warp by warp would keep three idle.
    tree = ft.KVTree.from_levels([1, 10], [400, 40])
    made = balanced.plan(tree, 1, 1, 128, 1, ROW_GROUPS[1])
    assert made.segments[:, 1].tolist() == [400] + [32] * 10 + [8] * 10
    _, begins, ends = depth_first(tree)
    tokens, together = tile_tokens(lay_out(tree, begins, ends, None), 10, 1, 64)
    assert tokens.tolist() == together.tolist() == [800]
    # With 64 rows each leaf is seen by one warp of four, and whole steps of leaves are dealt out in chunks of 16.
    made = balanced.plan(ft.KVTree.from_levels([1, 64], [64, 32]), 1, 1, 128, 1, ROW_GROUPS[1])
    first_leaves = made.segments[made.segments[:, 3] % READ_ONCE - made.segments[:, 2] == 1][:4]
    assert first_leaves[:, 1].tolist() == [16] * 4
    assert (first_leaves[:, 2] // 16).tolist() == [0, 1, 2, 3]


def test_whole_chunks_of_every_node_come_before_what_is_left() -> None:
    # A chunk that lies in one node comes as a box, and no other node's rows see it.
    made = balanced.plan(ft.KVTree.from_levels([1, 3], [8, 100]), 4, 1, 128, 1, ROW_GROUPS[1])
    assert made.segments[:, 1].tolist() == [96] * 3 + [8] + [4] * 3
    assert made.segments[:, 0].tolist() == [8, 108, 208, 0, 104, 204, 304]


def test_tiles_have_fewer_requests_where_they_need_not_be_cut_then() -> None:
    tree = ft.KVTree.from_levels([1, 2, 64], [8, 256, 32])
    made = balanced.plan(tree, 1, 32, 128, 132, H200_WORKERS)
    assert (made.workers, made.partials) == (128, 0)
    assert (made.items[:, 1] == 16).all()
    order, begins, ends = depth_first(tree)
    layout = lay_out(tree, begins, ends, None)
    filled = balanced.plan_layout(layout, order, 1, 32, 128, 132, H200_WORKERS, row_groups=1)
    assert (filled.items[:, 1] == 64).all()
    assert filled.partials == 128
    # Nor need whole ones be cut where half of the workers would have none.
    made = balanced.plan(ft.KVTree.from_levels([1, 256], [256, 32]), 16, 1, 128, 132, H200_WORKERS)
    assert (made.items[:, 1] == 2).all()
    assert (made.workers, made.partials) == (128, 0)
    # With one tile for each worker there is nothing to gain.
    made = balanced.plan(ft.KVTree.from_levels([1, 256], [256, 32]), 4, 8, 128, 128, H200_WORKERS)
    assert (made.items[:, 1] == 16).all()


def test_what_is_too_large_is_refused() -> None:
    with pytest.raises(ValueError, match="tree_info holds 4294967294 tokens"):
        balanced.plan(ft.KVTree([-1, 0], [2**31 - 1, 2**31 - 1]), 1, 1, 128, 132, H200_WORKERS)
    with pytest.raises(ValueError, match="group is 129, expected at most 128"):
        balanced.plan(ft.KVTree.from_levels([1], [5]), 129, 1, 128, 132, H200_WORKERS)


CUT_TREES = (
    ft.KVTree.from_levels([1, 3, 40], [130, 33, 17]),
    ft.KVTree.from_levels([1, 90], [700, 3]),
    ft.KVTree.from_levels([1, 2, 30], [0, 300, 0]),
    ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0, 1, 2, 3, 3]),
)
"""Long prefixes, short leaves, nodes without tokens, and requests that attend to nothing."""


def force(monkeypatch: pytest.MonkeyPatch, machine: WorkerMachine, workers: int) -> None:
    """Make plan_decode plan for another machine."""
    monkeypatch.setattr("fasttree_cupy.plan.constants_of", lambda _: Constants(H200, machine))
    monkeypatch.setattr("fasttree_cupy.execution.cuda.multiprocessors", lambda _: workers)


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [1, 5, 132])
@pytest.mark.parametrize("row_groups", [1, 2])
@pytest.mark.parametrize(("group", "kv_heads", "head_dim"), [(1, 3, 128), (3, 2, 64), (16, 1, 128), (64, 2, 64)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_cut_is_right_on_the_gpu(
    dtype: str,
    group: int,
    kv_heads: int,
    head_dim: int,
    row_groups: int,
    workers: int,
    cupy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    force(monkeypatch, ROW_GROUPS[row_groups], workers)
    for tree in CUT_TREES:
        q, _, _, _, k, v, _ = ft.qkv_preparation(tree, group * kv_heads, kv_heads, head_dim, "cuda", dtype)
        inputs = [array.get().astype(np.float32) for array in (q, k, v)]
        plan = ft.plan_decode(tree, group * kv_heads, kv_heads, head_dim, device="cuda")
        if not isinstance(plan.schedule, BalancedSchedule):
            pytest.skip("this GPU has no warpgroup products")
        assert plan.schedule.row_groups == row_groups
        poison_partials(plan)
        for cap in (-1.0, 1.5, -1.0):
            expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, head_dim**-0.5, cap)
            out = cupy.full(q.shape, np.nan, np.float32).astype(q.dtype)
            plan.run(q, k, v, out, logit_cap=cap)
            assert_close(out.get(), expected, DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("polls", [0, 1, 128])
@pytest.mark.parametrize("row_groups", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_workers_merge_together_and_need_nobody_to_stay(
    head_dim: int, row_groups: int, polls: int, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However early workers stop waiting for the last one, all columns are merged, and to the same bits."""
    force(monkeypatch, ROW_GROUPS[row_groups], 132)
    tree = ft.KVTree.from_levels([1, 10], [3000, 400])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 16, 1, head_dim, "cuda")
    plan = ft.plan_decode(tree, 16, 1, head_dim, device="cuda")
    if not isinstance(plan.schedule, BalancedSchedule):
        pytest.skip("this GPU has no warpgroup products")
    assert plan.memory.lists[0].owner[:, 11].all()
    inputs = [array.get() for array in (q, k, v)]
    expected, expected_lse = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, head_dim**-0.5)
    first = plan.run(q, k, v).view(np.uint16)
    monkeypatch.setattr("fasttree_cupy.execution.plan_kernels.MERGE_POLLS", polls)
    for _ in range(20):
        poison_partials(plan)
        out = cupy.full(q.shape, np.nan, np.float32).astype(q.dtype)
        _, lse = plan.run(q, k, v, out, return_lse=True)
        assert (out.view(np.uint16) == first).all()
        np.testing.assert_allclose(lse.get(), expected_lse, rtol=0, atol=3e-4)
    assert_close(out.get(), expected, np.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("row_groups", [1, 2])
def test_hints_to_the_cache_change_no_bit(row_groups: int, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    force(monkeypatch, ROW_GROUPS[row_groups], 132)
    tree = ft.KVTree.from_levels([1, 3, 90], [300, 90, 21])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 8, 2, 128, "cuda")
    results = []
    for most in (0.0, 1e12):
        monkeypatch.setattr(balanced, "READ_ONCE_BYTES", {1: most, 2: most})
        plan = ft.plan_decode(tree, 8, 2, 128, device="cuda")
        if not isinstance(plan.schedule, BalancedSchedule):
            pytest.skip("this GPU has no warpgroup products")
        assert (plan.memory.lists[1].owner[:, 3] >= READ_ONCE).any() == (most > 0)
        results.append(plan.run(q, k, v).get().view(np.uint16))
    np.testing.assert_array_equal(*results)


@pytest.mark.gpu
@pytest.mark.parametrize("group", [65, 128])
def test_groups_up_to_two_warpgroups_rows(group: int, cupy: Any) -> None:
    tree = CUT_TREES[0]
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, group, 1, 64, "cuda")
    out = ft.plan_decode(tree, group, 1, 64, device="cuda").run(q, k, v)
    inputs = [array.get() for array in (q, k, v)]
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, 0.125)
    assert_close(out.get(), expected, np.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("sm_scale", [0.0, -0.125, 3.0])
def test_any_scale_is_right_on_the_gpu(sm_scale: float, cupy: Any) -> None:
    tree = CUT_TREES[0]
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 8, 2, 64, "cuda")
    out = ft.plan_decode(tree, 8, 2, 64, device="cuda").run(q, k, v, sm_scale=sm_scale)
    inputs = [array.get() for array in (q, k, v)]
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, sm_scale)
    assert_close(out.get(), expected, np.float16)


@pytest.mark.gpu
def test_many_runs_agree_to_the_bit(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = ft.KVTree.from_levels([1, 16, 64], [1024, 256, 32])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 32, 8, 128, "cuda")
    plan = ft.plan_decode(tree, 32, 8, 128, device="cuda")
    first = plan.run(q, k, v).view(np.uint16)
    for _ in range(200):
        assert (plan.run(q, k, v).view(np.uint16) == first).all()
