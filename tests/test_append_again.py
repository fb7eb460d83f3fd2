"""Appends that are done again as the last one was: to the same bits, and never where something else has changed."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import edits
from fasttree_cupy.execution.launch import Launch
from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.machine import H200, H200_WORKERS, Constants
from tests.growing_walk import rows_attended
from tests.test_repeat import FakeCuda

TREE = ft.KVTree.from_levels([1, 4, 20], [300, 90, 21])
STEPS = 150


class EditedCuda(FakeCuda):
    """A GPU that keeps what is edited, by the address of the array.

    Attributes
    ----------
    arrays : dict of int to array
    edits : list of str
        How each change came: "anew", "again" or "whole".
    """

    def __init__(self, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(cupy, monkeypatch)
        self.arrays: dict[int, Any] = {}
        self.edits: list[str] = []
        kernel = SimpleNamespace(kernel=SimpleNamespace(ptr=0xED))
        launch = Launch(lambda *args, **_: self.edit("anew", args[2][0].tobytes()), (128, 1, 1), 0)
        launch.kernel.kernel = kernel.kernel
        monkeypatch.setattr(edits, "edit_launch", lambda _device: launch)
        monkeypatch.setattr(edits, "PinnedRing", lambda _count: None)
        monkeypatch.setattr(edits.Edits, "replace", lambda _, *change: self.replace(*change))
        monkeypatch.setattr(cupy.cuda.driver, "launchKernel", self.edit_again)
        monkeypatch.setattr("fasttree_cupy.growth.constants_of", lambda _: Constants(H200, H200_WORKERS))
        monkeypatch.setattr("fasttree_cupy.execution.growing.clear", lambda _counters, _stream: None)

    def edit_again(self, function: int, *numbers: int) -> None:
        assert (function, numbers[:6], numbers[7]) == (0xED, (4, 1, 1, 128, 1, 1), self.stream)
        (struct,) = (ctypes.c_uint64 * 1).from_address(numbers[8])
        self.edit("again", ctypes.string_at(struct, edits.EDIT_PLAN_PARAMS.itemsize))

    def edit(self, how: str, params: bytes) -> None:
        given = np.frombuffer(params, edits.EDIT_PLAN_PARAMS)[0]
        at, values = given["edits"][: given["count"]].T
        self.arrays[int(given["packed"])][at] = values
        self.edits.append(how)

    def replace(self, pointer: int, values: Any, _stream: Any) -> None:
        self.arrays[pointer][: len(values)] = values
        self.edits.append("whole")

    def plan(self, tree: ft.KVTree = TREE, capacity: int = 10**5, kv_heads: int = 2) -> ft.DecodePlan:
        """A plan that grows, whose array on the GPU is kept."""
        made = ft.plan_decode(tree, 8, kv_heads, 64, device="cuda", capacity=ft.Capacity(tree.batch_size + 8, capacity))
        made.place()
        self.arrays[made.memory.pointers[0]] = made.schedule.plan.packed.copy()  # type: ignore[union-attr]
        return made

    def held(self, plan: ft.DecodePlan) -> Any:
        """What of the plan's array means anything, on the GPU; as the host has it."""
        mine, used = plan.schedule.plan, plan.schedule.plan.used  # type: ignore[union-attr]
        held = self.arrays[plan.memory.pointers[0]][:used]
        np.testing.assert_array_equal(held, mine.packed[:used])
        return held


@pytest.fixture
def gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> EditedCuda:
    return EditedCuda(cupy, monkeypatch)


def rows_of(step: int, requests: int) -> Any:
    """Pages of 16 rows."""
    return (1000 + (step // 16 * requests + np.arange(requests)) * 16 + step % 16).astype(np.int32)


def test_the_same_as_one_by_one(gpu: EditedCuda) -> None:
    again, anew, highest = gpu.plan(), gpu.plan(), 0
    for step in range(STEPS):
        rows = rows_of(step, len(again.live))
        if step % 3 == 1:
            rows = rows.astype(np.int64)
        gpu.edits.clear()
        again.append(rows)
        first = list(gpu.edits)
        anew.append(rows, anew.live)
        assert "again" not in gpu.edits[len(first) :]
        if "whole" not in first:
            assert first == ["anew" if step in (0, 71, 101) else "again"]
        np.testing.assert_array_equal(gpu.held(again), gpu.held(anew))
        highest = max(highest, int(rows.max()))
        assert again.num_tokens == anew.num_tokens == highest + 1
        if step == 70:
            for plan in (again, anew):
                plan.fork([3, 3, 9])
        if step == 100:
            for plan in (again, anew):
                plan.finish([2, 20])


def test_more_edits_than_a_launch_takes_and_a_plan_anew(gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fasttree_cupy.planning.growing.PLAN_US", 40.0)
    tree = ft.KVTree.from_levels([1, 16, 64], [1024, 256, 32])
    again, anew = (gpu.plan(tree, kv_heads=8) for _ in range(2))
    hows: set[tuple[str, ...]] = set()
    for step in range(STEPS):
        rows = rows_of(step, 64) + 10**5
        gpu.edits.clear()
        again.append(rows)
        hows.add(tuple(gpu.edits))
        anew.append(rows, anew.live)
        np.testing.assert_array_equal(gpu.held(again), gpu.held(anew))
    assert {("again",), ("whole",)} < hows
    assert any(how[:2] == ("again", "again") for how in hows)


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (np.full(20, -1), ValueError, "rows goes from -1"),
        (np.full(20, 2**31 - 1), ValueError, "rows goes from"),
        (np.zeros(19, np.int32), ValueError, "rows has shape"),
        (np.zeros(20), TypeError, "rows is float64"),
    ],
)
def test_wrong_rows_change_nothing(gpu: EditedCuda, rows: Any, error: type[Exception], message: str) -> None:
    plan = gpu.plan()
    plan.append(rows_of(0, 20))
    before, tokens = gpu.held(plan).copy(), plan.num_tokens
    with pytest.raises(error, match=message):
        plan.append(rows)
    np.testing.assert_array_equal(gpu.held(plan), before)
    assert plan.num_tokens == tokens


def test_no_more_tokens_than_the_capacity(gpu: EditedCuda) -> None:
    plan = gpu.plan(capacity=TREE.unique_tokens + 50)
    for step in range(2):
        plan.append(rows_of(step, 20))
    with pytest.raises(ValueError, match="rows adds 20 tokens"):
        plan.append(rows_of(2, 20))
    assert gpu.edits == ["anew", "again"]


def test_only_on_the_default_stream_by_a_thread_with_the_context_in_the_same_memory(gpu: EditedCuda) -> None:
    plan = gpu.plan()
    steps = iter(range(100))

    def append(**given: Any) -> str:
        gpu.edits.clear()
        plan.append(rows_of(next(steps), 20), **given)
        (how,) = gpu.edits
        return how

    assert [append() for _ in range(3)] == ["anew", "again", "again"]
    assert append(stream=0) == "anew"
    assert append() == "again"
    gpu.stream = 5
    assert append() == "anew"
    gpu.stream = 0
    assert [append(), append()] == ["anew", "again"]  # the first waits for what stream 5 had
    gpu.context += 1
    assert append() == "anew"
    gpu.context -= 1
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(append).result() == "again"


def test_only_on_the_stream_that_the_memory_is_of(gpu: EditedCuda) -> None:
    gpu.stream = 5
    plan = gpu.plan()
    gpu.stream = 0
    for step in range(3):
        plan.append(rows_of(step, 20))
    assert gpu.edits == ["anew"] * 3


def test_events_and_page_locked_memory_are_of_the_plans_device(
    gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    current, made = [0], []

    @contextmanager
    def use_device(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr("fasttree_cupy.plan.resolve_device", lambda _: "cuda:1")
    monkeypatch.setattr("fasttree_cupy.execution.streams.use_device", use_device)
    monkeypatch.setattr(edits, "PinnedRing", lambda _count: made.append(current[-1]))
    ft.plan_decode(TREE, 8, 2, 64, capacity=ft.Capacity(40, 10**4), place=False)
    assert made == [1]


Change = Callable[[ft.DecodePlan], object]
FAILURES: list[tuple[Any, str, Change]] = [
    (edits.Edits, "edit_again", lambda plan: plan.append(rows_of(5, 20))),
    (edits.Edits, "edit", lambda plan: plan.append(rows_of(5, 20), plan.live)),
    (edits.Edits, "edit", lambda plan: plan.fork([2, 7])),
    (GrowingPlan, "fork", lambda plan: plan.fork([2, 7])),
    (GrowingPlan, "finish", lambda plan: plan.finish([2, 7])),
]


@pytest.mark.parametrize(("owner", "name", "change"), FAILURES)
@pytest.mark.parametrize("after", [lambda plan: plan.append(rows_of(9, len(plan.live))), lambda plan: plan.fork([3])])
def test_the_change_after_one_that_failed_replaces_all(
    owner: Any, name: str, change: Change, after: Change, gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cleared = gpu.plan(), []
    monkeypatch.setattr("fasttree_cupy.execution.growing.clear", lambda counters, _stream: cleared.append(counters))
    for step in range(2):
        plan.append(rows_of(step, 20))

    def out_of_memory(*_: Any) -> None:
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, out_of_memory)
        with pytest.raises(MemoryError):
            change(plan)
    gpu.edits.clear()
    after(plan)
    assert gpu.edits == ["whole"]
    assert cleared == [plan.memory.counters]  # type: ignore[union-attr]
    plan.append(rows_of(10, len(plan.live)))
    assert "whole" not in gpu.edits[1:]
    rows = [plan.kv_indices[plan.tree.request_rows(i)].tolist() for i in range(len(plan.live))]
    expected = dict(zip(plan.live.tolist(), map(sorted, rows), strict=True))
    gpu.held(plan)
    held = gpu.arrays[plan.memory.pointers[0]]  # type: ignore[union-attr]
    assert rows_attended(plan.schedule.plan, held, 4, 2) == [expected] * 2  # type: ignore[union-attr]


def test_nothing_is_compiled_on_import(tmp_path: Path) -> None:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    program = "import fasttree_cupy.growth"
    subprocess.run([sys.executable, "-W", "error", "-c", program], env=environment, check=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
