"""A plan that grows stays right where memory runs out, where other threads use it meanwhile, and on any stream."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import cuda, plan_memory, streams, turns
from fasttree_cupy.execution.plan_memory import MemoryNeeds
from tests.test_append_again import TREE, EditedCuda, rows_of
from tests.test_repeat import passes
from tests.tolerances import assert_close

HEAD_DIM = 16


def a_plan(tokens: int) -> ft.DecodePlan:
    tree = ft.KVTree([-1], [tokens])
    return ft.plan_decode(tree, 2, 2, HEAD_DIM, device="cpu", capacity=ft.Capacity(4, 500))


def arrays(rows: int) -> tuple[npt.NDArray[np.float16], npt.NDArray[np.float16]]:
    rng = np.random.default_rng(rows)
    q = rng.standard_normal((4, 2, HEAD_DIM)).astype(np.float16)
    return q, rng.standard_normal((rows, 2, HEAD_DIM)).astype(np.float16)


def test_a_run_after_one_that_found_no_memory_makes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (q, kv) = a_plan(40), arrays(100)
    plan.run(q, kv, kv)
    plan.append([range(40, 90)], requests=[0])
    with monkeypatch.context() as patch:

        def no_memory(*_: Any) -> None:
            raise MemoryError("none left")

        patch.setattr(MemoryNeeds, "place", no_memory)
        for _ in range(2):
            with pytest.raises(MemoryError, match="none left"):
                plan.run(q, kv, kv)
    anew = ft.plan_decode(plan.tree, 2, 2, HEAD_DIM, device="cpu", kv_indices=plan.kv_indices)
    assert_close(plan.run(q, kv, kv)[:1], anew.run(q[:1], kv, kv), np.float16)


def test_a_run_during_which_the_tree_outgrows_k_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, (q, kv) = a_plan(40), arrays(40)
    ready = ft.DecodePlan._ready

    def grow_meanwhile(self: ft.DecodePlan, work: Any) -> Any:
        self.append([40])
        return ready(self, work)

    monkeypatch.setattr(ft.DecodePlan, "_ready", grow_meanwhile)
    with pytest.raises(ValueError, match="k has 40 rows, expected 41 at least"):
        plan.run(q, kv, kv)


def test_a_tree_can_be_looked_at_while_another_thread_changes_it() -> None:
    plan, over = a_plan(1), threading.Event()

    def change() -> None:
        while not over.is_set():
            added = plan.fork([0] * 3)
            plan.append(np.arange(120).reshape(3, 40), added)
            plan.finish(added)

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(2000):
            assert plan.tree.batch_size in (1, 4)
            assert len(plan.kv_indices) in (1, 121)
    finally:
        over.set()
        thread.join()


Change = Callable[[ft.DecodePlan], object]
CHANGES: list[Change] = [
    lambda plan: plan.append(rows_of(2, 20)),
    lambda plan: plan.append(rows_of(2, 20), plan.live),
    lambda plan: plan.fork([3]),
    lambda plan: plan.finish([3]),
]


@pytest.fixture
def gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> EditedCuda:
    return EditedCuda(cupy, monkeypatch)


@pytest.mark.parametrize("change", CHANGES, ids=["append again", "append", "fork", "finish"])
def test_a_change_that_another_thread_overtakes_by_placing_the_plan(
    change: Change, gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_memory, "upload", lambda made, *_: [array.copy() for array in made])
    plan = gpu.plan()
    for step in range(2):
        plan.append(rows_of(step, 20))
    placed = plan._placed

    def place_meanwhile() -> Any:
        memory = placed()
        if not plan._turns.lock.locked():  # else the other thread waits for the change
            plan.place()
            gpu.arrays[plan.memory.pointers[0]] = plan.schedule.plan.packed.copy()  # type: ignore[union-attr]
        return memory

    with monkeypatch.context() as patch:
        patch.setattr(plan, "_placed", place_meanwhile)
        change(plan)
    gpu.held(plan)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("stream", "error", "message"),
    [("x", TypeError, "stream is 'x', expected None"), (5, ValueError, "stream is being captured")],
)
def test_a_stream_that_does_not_serve_is_refused(
    stream: Any, error: type[Exception], message: str, capability: int, gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda _device: capability)
    monkeypatch.setattr(streams, "is_capturing", lambda handle: handle == 5)
    plan = ft.plan_decode(TREE, 8, 2, 64, capacity=ft.Capacity(24, 10**4))
    changes: list[Change] = [
        lambda plan: plan.append(rows_of(0, 20), stream=stream),
        lambda plan: plan.fork([3], stream=stream),
        lambda plan: plan.finish([3], stream=stream),
    ]
    for change in changes:
        with pytest.raises(error, match=message):
            change(plan)
    assert plan.tree.unique_tokens == TREE.unique_tokens
    assert plan.live.tolist() == list(range(20))
    assert plan.num_tokens == TREE.unique_tokens
    assert gpu.edits == []


def test_changes_go_to_the_current_stream_of_the_last_runs_framework(
    gpu: EditedCuda, cupy: Any, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def current_stream_of(framework: str) -> Callable[[int], int]:
        asked.append(framework)
        return lambda _device: gpu.stream

    monkeypatch.setattr(streams, "current_stream_of", current_stream_of)
    monkeypatch.setattr(cupy.cuda.driver, "launchKernel", lambda *_: None)
    plan = gpu.plan()
    q, kv, out = (torch.zeros(shape, dtype=torch.float16) for shape in ((28, 8, 64), (3000, 2, 64), (28, 8, 64)))
    for _ in range(2):  # the second repeats the first
        plan._growth.framework = "cupy"  # type: ignore[union-attr]  # as a run on CuPy's arrays leaves it
        plan.run(q, kv, kv, out)
        asked.clear()
        plan.append(rows_of(0, 20))
        assert asked[0] == "torch"


def test_memory_is_held_for_a_change_on_another_stream(gpu: EditedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    event = SimpleNamespace(done=False)
    for place in (streams, turns):
        monkeypatch.setattr(place, "record_event", lambda _stream, _event=None: event)
    monkeypatch.setattr(streams, "use_stream", lambda *_: nullcontext())
    plan = gpu.plan()
    plan.append(rows_of(0, 20), stream=5)
    memory = weakref.ref(plan.memory)
    del plan
    gc.collect()
    assert memory() is not None
    passes(event)
    assert memory() is None
