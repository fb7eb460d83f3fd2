"""`plan_decode` and `DecodePlan`: right on every tree, printable, and strict about what does not fit."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution.streams import keep_alive, record_event
from fasttree_cupy.planning import subtree
from fasttree_cupy.planning.machine import H200
from tests.cases import CASES, TREES, Case, Tree
from tests.plans import poison_partials, without_workers
from tests.reference import dense_attention, path_rows
from tests.test_decode import DTYPES, make_inputs, namespace, reference, result_bits
from tests.test_interop import spin_then_fill
from tests.tolerances import assert_close

# On the CPU a plan runs what test_decode.py tests case by case: a few are enough.
RUNS = [pytest.param(case, "cpu", id=f"{case.id}-cpu") for case in CASES[::16]]
RUNS += [pytest.param(case, "gpu", id=f"{case.id}-gpu", marks=pytest.mark.gpu) for case in CASES]
# What GPUs without warpgroup products run, on those that have them.
RUNS += [pytest.param(case, "gpu_tiles", id=f"{case.id}-gpu_tiles", marks=pytest.mark.gpu) for case in CASES[::3]]


def as_kv_tree(tree: Tree) -> ft.KVTree:
    return ft.KVTree(tree.parent, tree.seqlen, tree.request_node)


def make_plan(case: Case, backend: str) -> ft.DecodePlan:
    heads = case.num_kv_heads * case.group
    device = "cpu" if backend == "cpu" else "cuda"
    return ft.plan_decode(as_kv_tree(case.tree), heads, case.num_kv_heads, case.head_dim, device=device)


@pytest.mark.parametrize(("case", "backend"), RUNS)
def test_case(case: Case, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend == "gpu_tiles":
        without_workers(monkeypatch)
        backend = "gpu"
    xp = namespace(backend)
    inputs = make_inputs(case, xp, 1.0)
    plan = make_plan(case, backend)
    sm_scale = case.head_dim**-0.5
    if backend == "gpu" and case.layout == "odd_strides":
        with pytest.raises(ValueError, match="multiple of 16 bytes"):
            plan.run(inputs.q, inputs.k, inputs.v)
        return
    if backend == "gpu":
        poison_partials(plan)
    out = plan.run(inputs.q, inputs.k, inputs.v, inputs.o, logit_cap=case.logit_cap)
    assert out is inputs.o
    expected, _ = reference(case, inputs.values, sm_scale, xp)
    assert_close(result_bits(inputs, backend).view(DTYPES[case.dtype]), expected, DTYPES[case.dtype])


def covered_tokens(made: subtree.SubtreePlan, group: int) -> np.ndarray[Any, Any]:
    """Tokens that each request sees through the items, counted with repeats."""
    tokens = np.zeros(len(made.request_order), np.int64)
    for item in made.items:
        assert item[1] * group <= 16 * item[3]
        runs = [*range(item[4], item[6]), *range(item[7], item[11])]
        for length, row_begin, row_end in made.segments[runs, 1:]:
            assert length > 0
            assert row_begin % group == 0
            assert row_end % group == 0
            first = item[0] + row_begin // group
            tokens[made.request_order[first : item[0] + row_end // group]] += length
    return tokens


@pytest.mark.parametrize("tree", TREES, ids=lambda tree: tree.name)
@pytest.mark.parametrize("group", [1, 3, 4, 16])
def test_items_hold_each_path_once(tree: Tree, group: int) -> None:
    kv_tree = as_kv_tree(tree)
    made = subtree.plan(kv_tree, group, 2, 128, H200)
    np.testing.assert_array_equal(covered_tokens(made, group), kv_tree.path_tokens)
    np.testing.assert_array_equal(np.sort(made.request_order), np.arange(kv_tree.batch_size))
    assert sorted(made.merge_entries.tolist()) == list(range(len(made.merge_entries)))
    assert made.merge_lens.sum() == len(made.merge_entries)


def rows_seen(made: subtree.SubtreePlan, group: int) -> tuple[list[list[int]], set[int]]:
    """Rows of K and V that each request attends to, through items and merges; and which requests the items finish.

    Walks the schedule as ``tree_decode`` does: warp by warp, so that a row that no warp or two warps hold is noticed.
    """
    batch = len(made.request_order)
    seen: list[list[int]] = [[] for _ in range(batch)]
    partials: dict[int, tuple[int, list[int]]] = {}
    finished: set[int] = set()
    for first, count, partial, row_warps, *bounds in made.items.tolist():
        shared, own = bounds[:3], bounds[3:]
        rows: list[list[int]] = [[] for _ in range(count * group)]
        runs = [(w, made.segments[own[w] : own[w + 1]]) for w in range(made.block_warps)]
        for g in range(made.block_warps // row_warps if row_warps > 1 else 0):
            runs += [(w, made.segments[shared[g] : shared[g + 1]]) for w in range(row_warps)]
        for warp, segments in runs:
            for begin, length, row_begin, row_end in segments.tolist():
                low = max(row_begin, warp % row_warps * 16)
                for row in range(low, min(row_end, warp % row_warps * 16 + 16, len(rows))):
                    rows[row] += range(begin, begin + length)
        for i in range(count):
            request = int(made.request_order[first + i])
            heads = [sorted(rows[i * group + h]) for h in range(group)]
            assert heads == heads[:1] * group
            if partial < 0:
                assert request not in finished
                finished.add(request)
                seen[request] += heads[0]
            else:
                assert partial + i not in partials
                partials[partial + i] = (request, heads[0])
    for request, offset, length in zip(made.merge_requests, made.merge_offs, made.merge_lens, strict=True):
        assert request not in finished
        finished.add(int(request))
        for entry in made.merge_entries[offset : offset + length].tolist():
            owner, found = partials.pop(entry)
            assert owner == request
            seen[owner] += found
    assert not partials
    return seen, finished


@pytest.mark.parametrize("longest", [1, 3, 1 << 30])
@pytest.mark.parametrize(
    ("group", "head_dim"), [(1, 128), (3, 128), (7, 256), (16, 64), (32, 256), (33, 128), (64, 64)]
)
def test_every_shape_reads_each_path_once(
    group: int, head_dim: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subtree, "_LONGEST", (longest,))
    for shape in subtree.tile_shapes(group, head_dim):
        monkeypatch.setattr(subtree, "tile_shapes", lambda *_, shape=shape: [shape])
        for tree in TREES[:5] + TREES[20::20]:
            kv_tree = as_kv_tree(tree)
            seen, finished = rows_seen(subtree.plan(kv_tree, group, 1, head_dim, H200), group)
            assert finished == set(range(kv_tree.batch_size))
            for request, rows in enumerate(seen):
                expected = path_rows(tree.parent, tree.seqlen, tree.request_node[request])
                np.testing.assert_array_equal(sorted(rows), np.sort(expected))
        monkeypatch.undo()
        monkeypatch.setattr(subtree, "_LONGEST", (longest,))


SHAPES = [
    (1, 64, 128),
    (2, 32, 128),
    (3, 5, 64),
    (4, 4, 32),
    (8, 8, 16),
    (17, 1, 128),
    (33, 1, 64),
    (64, 1, 128),
    (32, 1, 256),
]


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "kv_heads", "head_dim"), [(g, min(h, 2), d) for g, h, d in SHAPES])
@pytest.mark.parametrize("longest", [2, 1 << 30])
def test_every_shape_is_right_on_the_gpu(
    group: int, kv_heads: int, head_dim: int, longest: int, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = subtree.tile_shapes(group, head_dim)
    without_workers(monkeypatch)
    monkeypatch.setattr(subtree, "_LONGEST", (longest,))
    for levels, tokens in (([1, 3, 40], [130, 33, 17]), ([1, 90], [100, 5])):
        tree = ft.KVTree.from_levels(levels, tokens)
        q, _, _, _, k, v, _ = ft.qkv_preparation(tree, group * kv_heads, kv_heads, head_dim, "cuda", "bfloat16")
        inputs = [array.get().astype(np.float32) for array in (q, k, v)]
        expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, head_dim**-0.5)
        for shape in shapes:
            monkeypatch.setattr(subtree, "tile_shapes", lambda *_, shape=shape: [shape])
            plan = ft.plan_decode(tree, group * kv_heads, kv_heads, head_dim, device="cuda")
            out = cupy.full(q.shape, np.nan, np.float32).astype(q.dtype)
            plan.run(q, k, v, out)
            assert_close(out.get(), expected, DTYPES["bfloat16"])


def test_a_long_prefix_of_few_requests_is_cut() -> None:
    made = subtree.plan(ft.KVTree.from_levels([1, 2], [20000, 100]), 4, 1, 128, H200)
    assert len(made.items) > 16
    assert made.merge_requests.tolist() == [0, 1]
    assert made.merge_lens.tolist() == [len(made.items)] * 2


def test_more_tokens_than_int32_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="tree_info holds 4294967294 tokens"):
        subtree.plan(ft.KVTree([-1, 0], [2**31 - 1, 2**31 - 1]), 1, 1, 128, H200)


def test_many_short_requests_need_no_merge() -> None:
    made = subtree.plan(ft.KVTree.from_levels([1, 1024], [64, 64]), 1, 32, 128, H200)
    assert len(made.merge_requests) == 0


def test_group_beyond_a_block_is_refused_by_the_planner_and_served_by_the_plan() -> None:
    tree = ft.KVTree.from_levels([1, 3], [5, 6])
    with pytest.raises(ValueError, match="group is 65"):
        subtree.plan(tree, 65, 1, 128, H200)
    q = np.ones((3, 65, 128), np.float16)
    kv = np.ones((23, 1, 128), np.float16)
    assert np.all(ft.plan_decode(tree, 65, 1, 128, device="cpu").run(q, kv, kv) == 1)


TREE = ft.KVTree.from_levels([1, 4], [9, 5])


def small() -> tuple[ft.DecodePlan, dict[str, Any]]:
    rng = np.random.default_rng(7)
    shapes = {"q": (4, 6, 32), "k": (29, 2, 32), "v": (29, 2, 32)}
    arrays = {name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}
    return ft.plan_decode(TREE, 6, 2, 32, device="cpu"), arrays


def test_defaults_and_new_output() -> None:
    plan, arrays = small()
    out = plan.run(**arrays)
    expected, _ = dense_attention(TREE.parent, TREE.seqlen, TREE.request_node, *arrays.values(), 32**-0.5)
    assert_close(out, expected, np.float16)
    assert "4 requests, 29 tokens, heads 6/2, head_dim 32, cpu" in repr(plan)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("q", lambda a: a[:3], ValueError, r"q has shape \(3, 6, 32\), expected \(4, 6, 32\)"),
        ("q", lambda a: a[:, :4], ValueError, r"q has shape \(4, 4, 32\), expected"),
        ("q", lambda a: a.astype(np.float32), TypeError, "q has dtype float32"),
        ("k", lambda a: a[:-1], ValueError, "v has shape"),
        ("v", lambda a: a[..., ::-1], ValueError, "v has strides"),
        ("v", lambda a: a.tolist(), TypeError, "v: expected an array"),
        ("out", lambda a: np.zeros((4, 6, 16), np.float16), ValueError, "out has shape"),
        ("sm_scale", lambda a: float("nan"), ValueError, "sm_scale is nan"),
        ("logit_cap", lambda a: "2", TypeError, "logit_cap is '2'"),
        ("stream", lambda a: 3, ValueError, "stream is 3, but q lies on the CPU"),
    ],
)
@pytest.mark.parametrize("after", ["first", "a run that fits"])
def test_what_does_not_fit_is_refused(after: str, name: str, change: Any, error: type[Exception], message: str) -> None:
    plan, arrays = small()
    if after != "first":
        plan.run(**arrays, out=np.empty((4, 6, 32), np.float16))
    out = np.full((4, 6, 32), 7, np.float16)
    arguments: dict[str, Any] = {**arrays, "out": out}
    arguments[name] = change(arguments.get(name))
    with pytest.raises(error, match=message):
        plan.run(**arguments)
    assert np.all(out == 7)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_jax_arrays_without_memory_are_refused_by_name(jax: Any, name: str) -> None:
    plan, arrays = small()
    out = np.full((4, 6, 32), 7, np.float16)
    deleted = jax.numpy.zeros_like(out if name == "out" else arrays[name])
    traced = deleted + 1
    deleted.delete()

    def refused(array: Any) -> Any:
        with pytest.raises(TypeError, match=rf"^{name}: "):
            plan.run(**{**arrays, "out": out, name: array})
        return array

    refused(deleted)
    jax.jit(refused)(traced)
    assert np.all(out == 7)


def test_both_buffers_of_another_tree_are_refused() -> None:
    plan, arrays = small()
    arrays["k"], arrays["v"] = arrays["k"][:-1], arrays["v"][:-1]
    with pytest.raises(ValueError, match=r"k has shape \(28, 2, 32\), expected \(29, 2, 32\)"):
        plan.run(**arrays)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((5, 2, 32), "num_qo_heads"), ((6, 0, 32), "num_kv_heads"), ((6, 2, 24), "head_dim")],
)
def test_plan_decode_names_the_wrong_argument(arguments: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ft.plan_decode(TREE, *arguments, device="cpu")


@pytest.mark.gpu
def test_a_graph_replays_and_runs_agree_to_the_bit(cupy: Any) -> None:
    tree = ft.KVTree.from_levels([1, 4, 16], [700, 40, 9])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 8, 2, 64, "cuda")
    plan = ft.plan_decode(tree, 8, 2, 64)
    out = cupy.full_like(q, np.nan)
    plan.run(q, k, v, out)
    first = out.copy()
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    with stream:
        stream.begin_capture()
        plan.run(q, k, v, out)
        graph = stream.end_capture()
    for factor in (1, 2, 1):
        q *= factor
        out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, q.get(), k.get(), v.get(), 64**-0.5)
        assert_close(out.get(), expected, np.float16)
        if factor == 2:
            q /= 2
    assert (out.view(np.uint16) == first.view(np.uint16)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("how", ["named", "current"])
def test_a_dropped_plans_memory_is_held_for_the_stream_that_reads_it(how: str, cupy: Any) -> None:
    """Whether the run is told the stream, or CuPy's current one is another than when the plan was made."""
    tree = ft.KVTree.from_levels([1, 4, 16], [700, 40, 9])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 8, 2, 64, "cuda")
    plan = ft.plan_decode(tree, 8, 2, 64)
    expected = plan.run(q, k, v).get()
    scratch = cupy.zeros(96, np.uint16)
    out = cupy.full_like(q, np.nan)
    stream = cupy.cuda.Stream(non_blocking=True)
    spin_then_fill(cupy, scratch.data.ptr, 1, stream.ptr)  # compiles
    stream.synchronize()
    cupy.cuda.Device().synchronize()

    spin_then_fill(cupy, scratch.data.ptr, 1, stream.ptr, times=40)  # longer than a collection of all garbage
    with stream if how == "current" else nullcontext():
        plan.run(q, k, v, out, stream=stream if how == "named" else None)
    memory = weakref.ref(plan.memory)
    del plan
    gc.collect()
    assert not stream.done
    assert memory() is not None
    stream.synchronize()
    keep_alive(record_event(stream.ptr), [])
    assert memory() is None
    np.testing.assert_array_equal(out.get().view(np.uint16), expected.view(np.uint16))
