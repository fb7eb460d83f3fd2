"""`DecodePlan.append`, `fork` and `finish`: equal to a plan anew after every change, captured graphs included."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import edits
from fasttree_cupy.execution.growing import GrowingSchedule
from fasttree_cupy.execution.schedule import BalancedSchedule
from fasttree_cupy.planning import growing
from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.growing_tree import GrowingTree
from fasttree_cupy.planning.machine import H200_WORKERS
from tests.growing_walk import KINDS, Model, rows_attended
from tests.reference import dense_attention
from tests.test_decode import DTYPES, namespace
from tests.test_float8 import on_gpu
from tests.test_serving import device_of, host
from tests.tolerances import assert_close

hypothesis = pytest.importorskip("hypothesis", reason="no hypothesis")
st = hypothesis.strategies

CHANGES = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 2**32 - 1)), min_size=25, max_size=25)
TREES = (ft.KVTree.from_levels([1, 3, 12], [130, 33, 17]), ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0, 1, 2, 3, 3]))
LONG_TREE = ft.KVTree.from_levels([1, 2, 8], [2000, 300, 20])
"""Cut into many pieces on a GPU."""
UNTOUCHED = 7.0
GPU = pytest.mark.gpu
BACKENDS = pytest.mark.parametrize(
    ("backend", "plan_us"),
    [
        pytest.param("cpu", 1e9, id="cpu"),
        pytest.param("gpu", 0.1, id="gpu-planned", marks=GPU),
        pytest.param("gpu", growing.PLAN_US, id="gpu", marks=GPU),
        pytest.param("gpu", 1e9, id="gpu-edited", marks=GPU),
        pytest.param("gpu_tiles", 1e9, id="gpu-tiles", marks=GPU),
        pytest.param("gpu_heuristic", 1e9, id="gpu-heuristic", marks=GPU),
    ],
)


@contextmanager
def planners(backend: str, plan_us: float) -> Iterator[None]:
    """Leave out the kernels that a backend is not about, and let new plans seem to cost so much.

    Where they are never worth it, cuts are moved whenever they can be.
    """
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(growing, "PLAN_US", plan_us))
        stack.enter_context(mock.patch.object(growing, "CUT_US", 0.1 if plan_us == 1e9 else growing.CUT_US))
        if backend in ("gpu_tiles", "gpu_heuristic"):
            names = ["BalancedSchedule", "SubtreeSchedule"][: 1 if backend == "gpu_tiles" else 2]
            for name in names:
                where = f"fasttree_cupy.execution.schedule.{name}.problem"
                stack.enter_context(mock.patch(where, return_value="switched off"))
        yield


class Decoder:
    """A plan that grows, the model beside it, and pools in which every row that nobody holds is NaN."""

    def __init__(self, tree: ft.KVTree, backend: str, layout: tuple[int, int, int, str], spare: int = 6) -> None:
        heads, kv_heads, head_dim, dtype = layout
        self.rng = np.random.default_rng(1)
        self.xp = namespace("cpu" if backend == "cpu" else "gpu")
        self.device = device_of("cpu" if backend == "cpu" else "gpu")
        self.dtype = DTYPES[dtype]
        rows = self.rng.permutation(tree.unique_tokens + 120)[: tree.unique_tokens]
        paths = [rows[tree.request_rows(i)] for i in range(tree.batch_size)]
        self.model = Model(paths, tree.batch_size + spare, tree.unique_tokens + 120)
        self.heads = (heads, kv_heads, head_dim)
        self.plan = ft.plan_decode(
            tree, *self.heads, kv_indices=rows, device=self.device,
            capacity=ft.Capacity(tree.batch_size + spare, self.model.pool_rows),
        )  # fmt: skip
        self.q = self.rng.standard_normal((self.model.slots, heads, head_dim)).astype(self.dtype)
        self.kv = self.rng.standard_normal((2, self.model.pool_rows, kv_heads, head_dim)).astype(self.dtype)
        self.q_there, self.k, self.v = (self.xp.array(array) for array in (self.q, *self.kv))
        self.out = self.xp.array(self.q)
        self.hide()

    def put(self, there: Any, values: np.ndarray[Any, Any]) -> None:
        """Write to an array, for any stream to read."""
        if self.xp is np:
            there[...] = values
        else:
            there.set(values)
            self.xp.cuda.Device().synchronize()

    def clear(self) -> None:
        """Fill the output with what no run writes."""
        self.put(self.out, np.full(self.q.shape, UNTOUCHED, self.dtype))

    def hide(self) -> None:
        """Put NaN into the rows that no request holds, and back into others what belongs there."""
        free = np.ones(self.model.pool_rows, bool)
        free[list(self.model.held())] = False
        for array, values in zip((self.k, self.v), self.kv, strict=True):
            hidden = values.copy()
            hidden[free] = np.nan
            self.put(array, hidden)

    def change(self, kind: str, seed: int) -> None:
        arguments = self.model.choose(kind, seed)
        name = kind.removesuffix("_some")
        if name == "append":
            slots, rows = arguments
            self.model.append(slots, rows)
            self.plan.append(rows, None if kind == "append" else slots)
        else:
            made = getattr(self.plan, name)(*arguments)
            assert (None if made is None else made.tolist()) == getattr(self.model, name)(*arguments)
        self.hide()
        assert self.plan.live.tolist() == sorted(self.model.paths)

    def run(self) -> Any:
        self.clear()
        _, lse = self.plan.run(self.q_there, self.k, self.v, self.out, return_lse=True)
        return lse

    def check_against_a_plan_anew(self, lse: Any = None) -> None:
        """The output of live slots is that of a new plan's; that of others is as it was."""
        live = self.plan.live
        anew = ft.plan_decode(self.plan.tree, *self.heads, kv_indices=self.plan.kv_indices, device=self.device)
        expected, expected_lse = anew.run(self.xp.asarray(self.q[live]), self.k, self.v, return_lse=True)
        out = host(self.out)
        assert_close(out[live], host(expected), self.dtype)
        free = np.setdiff1d(np.arange(self.model.slots), live)
        assert (out[free].astype(np.float32) == UNTOUCHED).all()
        if lse is not None:
            np.testing.assert_allclose(host(lse)[live], host(expected_lse), rtol=0, atol=3e-4)
        self.check_arrays()

    def check_arrays(self) -> None:
        """What lies on the GPU means the tree."""
        schedule = self.plan.schedule
        if isinstance(schedule, GrowingSchedule):
            heads, kv_heads, _ = self.heads
            expected = {slot: sorted(rows) for slot, rows in self.model.paths.items()}
            packed = self.plan.memory.lists[0].owner.get()
            for attended in rows_attended(schedule.plan, packed, heads // kv_heads, kv_heads):
                assert attended == expected

    def check_against_the_reference(self) -> None:
        live = self.plan.live.tolist()
        paths = [self.model.paths[slot] for slot in live]
        rows = np.array([row for path in paths for row in path], np.int64)
        tree = ([-1] + [0] * len(live), [0, *map(len, paths)], range(1, len(live) + 1))
        expected, _ = dense_attention(*tree, self.q[live], *self.kv[:, rows], self.heads[2] ** -0.5)
        assert_close(host(self.out)[live], expected, self.dtype)


@BACKENDS
@hypothesis.settings(max_examples=20, deadline=None, derandomize=True, database=None)
@hypothesis.given(
    changes=CHANGES,
    tree=st.sampled_from(TREES),
    layout=st.sampled_from([(8, 2, 64, "float16"), (16, 1, 128, "bfloat16")]),
)
def test_random_changes(
    changes: list[tuple[str, int]], tree: ft.KVTree, layout: tuple[int, int, int, str], backend: str, plan_us: float
) -> None:
    with planners(backend, plan_us):
        decoder = Decoder(tree, backend, layout)
        for number, (kind, seed) in enumerate(changes):
            decoder.change(kind, seed)
            decoder.check_against_a_plan_anew(decoder.run())
            if number % 5 == 0:
                decoder.check_against_the_reference()


@GPU
@pytest.mark.parametrize("plan_us", [0.1, growing.PLAN_US, 1e9], ids=["planned", "usual", "edited"])
@pytest.mark.parametrize("layout", [(32, 8, 128, "float16"), (16, 1, 64, "bfloat16")])
def test_a_graph_captured_once_follows_every_change(
    layout: tuple[int, int, int, str], plan_us: float, cupy: Any
) -> None:
    with planners("gpu", plan_us):
        decoder = Decoder(LONG_TREE, "gpu", layout)
        if not isinstance(decoder.plan.schedule, BalancedSchedule):
            pytest.skip("this GPU has no warpgroup products")
        stream = cupy.cuda.Stream(non_blocking=True)
        decoder.run()  # compiles
        cupy.cuda.Device().synchronize()
        with stream:
            stream.begin_capture()
            decoder.plan.run(decoder.q_there, decoder.k, decoder.v, decoder.out)
            graph = stream.end_capture()
            stream.begin_capture()
            with pytest.raises(ValueError, match="stream is being captured"):
                decoder.plan.append(np.zeros(len(decoder.plan.live), np.int64))
            stream.end_capture()
            for seed in range(40):
                decoder.change(KINDS[seed % len(KINDS)], seed)
                decoder.clear()
                graph.launch(stream)
                stream.synchronize()
                decoder.check_against_a_plan_anew()
                if seed % 8 == 0:
                    decoder.check_against_the_reference()


def slow_decoder(cupy: Any) -> tuple[Decoder, Any, Any]:
    """A decoder of three requests whose pools hold all values, free rows, and what fills a stream for some 10 ms."""
    decoder = Decoder(ft.KVTree.from_levels([1, 3], [200, 5]), "gpu", (8, 2, 64, "float16"))
    rows = np.setdiff1d(np.arange(decoder.model.pool_rows), list(decoder.model.held()))
    for array, values in zip((decoder.k, decoder.v), decoder.kv, strict=True):
        decoder.put(array, values)
    decoder.run()  # compiles, as does a change
    decoder.plan.finish(decoder.plan.fork([0]))
    decoder.plan.append(np.empty((3, 0), np.int64))
    flush = cupy.empty(2**29, np.uint8)
    cupy.cuda.Device().synchronize()

    def fill() -> None:
        for _ in range(50):
            flush.fill(1)

    return decoder, rows, fill


@GPU
def test_changes_far_ahead_of_the_gpu_are_kept_apart(cupy: Any) -> None:
    """The host runs 40 steps ahead of a stream that waits: every run sees the tree as it was when it was queued."""
    decoder, rows, fill = slow_decoder(cupy)
    outs = [cupy.full_like(decoder.out, np.nan) for _ in range(40)]
    fill()
    for step, out in enumerate(outs):
        decoder.plan.append(rows[3 * step : 3 * step + 3])
        decoder.plan.run(decoder.q_there, decoder.k, decoder.v, out)
    for step, out in enumerate(outs):
        decoder.model.append([0, 1, 2], rows[3 * step : 3 * step + 3, None])
        decoder.out = out
        decoder.check_against_the_reference()


@GPU
def test_a_run_on_another_stream_waits_for_the_change(cupy: Any) -> None:
    decoder, rows, fill = slow_decoder(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        fill()
    decoder.plan.append(rows[:3], stream=stream)
    decoder.plan.run(decoder.q_there, decoder.k, decoder.v, decoder.out)
    decoder.model.append([0, 1, 2], rows[:3, None])
    decoder.check_against_the_reference()


@pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=GPU)])
def test_float8_pools_serve_a_tree_that_grows(backend: str) -> None:
    rng, tree, heads = np.random.default_rng(3), ft.KVTree.from_levels([1, 6], [150, 40]), (8, 2, 64)
    pool = rng.standard_normal((2, 600, *heads[1:])).astype(ml_dtypes.float8_e4m3fn)
    k, v = (array if backend == "cpu" else on_gpu(namespace("gpu"), array) for array in pool)
    plan = ft.plan_decode(tree, *heads, device=device_of(backend), capacity=ft.Capacity(8, 600))
    plan.append(np.arange(390, 510).reshape(6, 20))
    plan.finish([2])
    plan.append(np.arange(510, 517), plan.live.tolist() + plan.fork([0, 3]).tolist())
    q = rng.standard_normal((8, *heads[::2])).astype(np.float16)
    scales = {"k_scale": 0.5, "v_scale": 2.0}
    out = host(plan.run(namespace(backend).asarray(q), k, v, **scales))[plan.live]
    rows = plan.kv_indices
    parts = (array[rows].astype(np.float64) * scale for array, scale in zip(pool, scales.values(), strict=True))
    tree = plan.tree
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, q[plan.live], *parts, 64**-0.5)
    assert_close(out, expected, np.float16)


@GPU
def test_a_change_waits_for_the_run_on_another_stream(cupy: Any) -> None:
    decoder, rows, fill = slow_decoder(cupy)
    stream = cupy.cuda.Stream(non_blocking=True)
    decoder.clear()
    with stream:
        fill()
        decoder.plan.run(decoder.q_there, decoder.k, decoder.v, decoder.out)
    decoder.plan.append(rows[:3])
    cupy.cuda.Device().synchronize()
    decoder.check_against_the_reference()


def make_plan() -> ft.DecodePlan:
    tree = ft.KVTree.from_levels([1, 2], [10, 3])
    return ft.plan_decode(tree, 4, 2, 16, device="cpu", capacity=ft.Capacity(4, 20))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda plan: plan.append([20]), ValueError, r"rows has shape \(1,\), expected \(2,\) or \(2, n\)"),
        (lambda plan: plan.append([[[1]], [[2]]]), ValueError, "rows has shape"),
        (lambda plan: plan.append([1.5, 2.5]), TypeError, "rows is float64, expected integers"),
        (lambda plan: plan.append([-1, 2]), ValueError, "rows goes from -1 to 2"),
        (lambda plan: plan.append([1, 2**31 - 1]), ValueError, "rows goes from 1 to 2147483647"),
        (lambda plan: plan.append(np.zeros((2, 3), int)), ValueError, "rows adds 6 tokens to 16, expected at most 20"),
        (lambda plan: plan.append([1], [2]), ValueError, r"requests\[0\] is 2, expected the slot of a live request"),
        (lambda plan: plan.append([1, 2], [0, 0]), ValueError, "requests names a slot twice"),
        (lambda plan: plan.append([1, 2], stream=3), ValueError, "stream is 3, but the plan's device is the CPU"),
        (lambda plan: plan.fork([4]), ValueError, r"requests\[0\] is 4, expected the slot of a live request"),
        (lambda plan: plan.fork([-1]), ValueError, r"requests\[0\] is -1"),
        (lambda plan: plan.fork([0, 0, 1]), ValueError, "requests names 3 parents, expected at most 2"),
        (lambda plan: plan.fork(0), TypeError, "requests is"),
        (lambda plan: plan.fork([0.0]), TypeError, "requests"),
        (lambda plan: plan.finish([0, 1]), ValueError, "requests names all 2 live requests"),
        (lambda plan: plan.finish([1, 1]), ValueError, "requests names a slot twice"),
        (lambda plan: plan.finish([3]), ValueError, r"requests\[0\] is 3"),
    ],
)
def test_a_wrong_change_is_refused_and_changes_nothing(call: Any, error: type[Exception], message: str) -> None:
    plan = make_plan()
    with pytest.raises(error, match=message):
        call(plan)
    assert plan.live.tolist() == [0, 1]
    assert plan.kv_indices.tolist() == list(range(16))
    assert plan.num_tokens == 16


@pytest.mark.parametrize(
    "call", [lambda plan: plan.append([1, 2]), lambda plan: plan.fork([0]), lambda plan: plan.finish([0]),
             lambda plan: plan.live, lambda plan: plan.tree, lambda plan: plan.kv_indices]
)  # fmt: skip
def test_a_plan_without_capacity_says_so(call: Any) -> None:
    plan = ft.plan_decode(ft.KVTree.from_levels([1, 2], [10, 3]), 4, 2, 16, device="cpu")
    with pytest.raises(ValueError, match="cannot grow, expected a plan made by plan_decode"):
        call(plan)


@pytest.mark.parametrize(
    ("capacity", "error", "message"),
    [
        ((4, 20), TypeError, "capacity is tuple, expected a Capacity"),
        (ft.Capacity(1, 20), ValueError, "capacity.requests is 1, expected 2 at least"),
        (ft.Capacity(4, 15), ValueError, "capacity.tokens is 15, expected 16 at least"),
        (ft.Capacity(4.0, 20), TypeError, "capacity.requests is 4.0, expected an integer"),  # type: ignore[arg-type]
        (ft.Capacity(4, -1), ValueError, "capacity.tokens is -1"),
    ],
)
def test_a_wrong_capacity_is_refused(capacity: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ft.plan_decode(ft.KVTree.from_levels([1, 2], [10, 3]), 4, 2, 16, device="cpu", capacity=capacity)


def test_a_plan_grows_once_it_is_placed() -> None:
    tree = ft.KVTree.from_levels([1, 2], [10, 3])
    plan = ft.plan_decode(tree, 4, 2, 16, device="cpu", capacity=ft.Capacity(4, 20), place=False)
    for change in (lambda: plan.append([16, 17]), lambda: plan.fork([0]), lambda: plan.finish([0])):
        with pytest.raises(RuntimeError, match="made with place=False"):
            change()
    with pytest.raises(ValueError, match="workspace is given, but a plan that grows on cpu"):
        plan.place(np.empty(plan.workspace_bytes, np.uint8))
    assert plan.kv_indices.tolist() == list(range(16))
    plan.place()
    assert plan.fork([0]).tolist() == [2]


def test_sizes_of_a_growing_schedule_are_exact() -> None:
    """Its index arrays are one, and the lists that the kernel reads lie in it."""
    tree = ft.KVTree.from_levels([1, 90], [700, 3])
    rows = np.arange(tree.unique_tokens, dtype=np.int32)
    plan = GrowingPlan(GrowingTree(tree, rows, ft.Capacity(100, 2000)), 4, 2, 128, 132, H200_WORKERS)
    with mock.patch("fasttree_cupy.execution.growing.Edits"):
        assert GrowingSchedule(plan, 128, "cuda:0").needs.schedule_bytes == plan.packed.nbytes
        schedule = GrowingSchedule(plan, 128, "cpu")
    memory = schedule.needs.place(None, None)
    assert memory.workspace.shape == (schedule.needs.workspace_bytes,)
    assert memory.mid_o.shape == (264, 64 * plan.row_groups, 128)
    assert memory.counters.shape == (plan.sizes.counters,)
    items, segments, order = schedule.lists(memory)
    assert [items, segments, order] == [
        memory.pointers[0] + 4 * at for at in (0, plan.sizes.segments_at, plan.sizes.order_at)
    ]


def test_many_edits_are_several_launches() -> None:
    """Each with its own part of them, and the array's address, where struct EditPlanParams has them."""
    seen: list[tuple[Any, int, Any]] = []

    def launch(grid: Any, params: Any) -> None:
        packed, count, padding = np.frombuffer(params.tobytes()[:16], "<u8,<i4,<i4")[0]
        part = np.frombuffer(params.tobytes()[16:], np.int32).reshape(-1, 2)
        assert len(part) == 510
        assert padding == 0
        seen.append((grid, int(packed), part[:count].copy()))

    wanted = np.arange(2 * 1100, dtype=np.int32).reshape(-1, 2)
    launch.block = (128, 1, 1)  # type: ignore[attr-defined]
    stream = SimpleNamespace(device=0, launches=nullcontext)
    with mock.patch.multiple(edits, edit_launch=lambda _: launch, PinnedRing=mock.DEFAULT, LaunchAgain=mock.DEFAULT):
        changes = edits.Edits()
        changes.edit(0x1000, wanted[:0], stream)
        assert not seen
        changes.edit(0x1000, wanted, stream)
    assert [grid for grid, _, _ in seen] == [(4, 1, 1), (4, 1, 1), (1, 1, 1)]
    assert {packed for _, packed, _ in seen} == {0x1000}
    np.testing.assert_array_equal(np.concatenate([part for _, _, part in seen]), wanted)


@GPU
def test_a_plan_grows_in_the_callers_workspace(cupy: Any) -> None:
    """It is placed anew between changes, and nothing around the buffer is written."""
    with planners("gpu", 200.0):
        decoder = Decoder(LONG_TREE, "gpu", (8, 2, 64, "float16"))
        if not isinstance(decoder.plan.schedule, BalancedSchedule):
            pytest.skip("this GPU has no warpgroup products")
        size, schedule_bytes = decoder.plan.workspace_bytes, decoder.plan.schedule_bytes
        buffers = [cupy.full(size + 512, 0xFF, np.uint8) for _ in range(2)]
        for seed in range(20):
            if seed % 5 == 0:
                decoder.plan.place(buffers[seed // 5 % 2][256:-256])
            decoder.change(KINDS[seed % len(KINDS)], seed)
            decoder.check_against_a_plan_anew(decoder.run())
        assert (decoder.plan.workspace_bytes, decoder.plan.schedule_bytes) == (size, schedule_bytes)
        for buffer in buffers:
            assert (buffer[:256] == 0xFF).all()
            assert (buffer[-256:] == 0xFF).all()


def test_k_and_v_must_reach_the_highest_row_ever_used() -> None:
    plan = make_plan()
    plan.append([30, 18])
    q, kv = np.zeros((4, 4, 16), np.float16), np.zeros((30, 2, 16), np.float16)
    with pytest.raises(ValueError, match="k has 30 rows, expected 31 at least"):
        plan.run(q, kv, kv)
    with pytest.raises(ValueError, match="q has shape"):
        plan.run(q[:2], kv, kv)
    kv = np.zeros((35, 2, 16), np.float16)
    assert plan.run(q, kv, kv).shape == q.shape
    plan.append([19, 35])  # arrays that were checked once are looked at again
    with pytest.raises(ValueError, match="k has 35 rows, expected 36 at least"):
        plan.run(q, kv, kv)


def test_slots_are_used_again_and_tokens_given_back() -> None:
    plan = make_plan()
    assert plan.fork([1, 1]).tolist() == [2, 3]
    plan.append([16, 17, 18, 19])
    with pytest.raises(ValueError, match="rows adds 1 tokens to 20"):
        plan.append([1], [0])
    plan.finish([1, 3])
    assert plan.live.tolist() == [0, 2]
    assert plan.tree.unique_tokens == 18
    assert plan.fork([2]).tolist() == [1]
    assert plan.tree.path_tokens.tolist() == [14, 14, 14]


def test_a_request_without_tokens_is_a_parent_for_what_shares_nothing() -> None:
    tree = ft.KVTree([-1, 0], [0, 10], [0, 1])
    plan = ft.plan_decode(tree, 4, 2, 16, device="cpu", capacity=ft.Capacity(3, 40))
    (slot,) = plan.fork([0])
    plan.append(np.arange(20, 30)[None], [slot])
    request = plan.live.tolist().index(slot)
    assert plan.kv_indices[plan.tree.request_rows(request)].tolist() == list(range(20, 30))
