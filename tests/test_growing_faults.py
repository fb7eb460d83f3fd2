"""A plan that grows stays right where memory runs out, and where other threads run it or look at it meanwhile."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution.plan_memory import MemoryNeeds
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
