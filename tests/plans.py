"""What tests do to a plan: which kernel it runs, what its memory holds."""

from __future__ import annotations

import numpy as np
import pytest

import fasttree_cupy as ft

__all__ = ["KERNELS", "choose_kernel", "poison_partials", "without_workers"]

KERNELS = pytest.mark.parametrize("kernel", ["workers", "tiles", "vnodes"])


def without_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plan_decode pass over the kernel that needs compute capability 9.0."""
    monkeypatch.setattr("fasttree_cupy.execution.schedule.BalancedSchedule.problem", lambda *_: "switched off")


def choose_kernel(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make plan_decode pass over the kernels before this one."""
    if kernel != "workers":
        without_workers(monkeypatch)
    if kernel == "vnodes":
        monkeypatch.setattr("fasttree_cupy.execution.schedule.SubtreeSchedule.problem", lambda *_: "switched off")


def poison_partials(plan: ft.DecodePlan) -> None:
    """Fill the partial outputs in a plan's own workspace on a GPU with NaN; counters stay."""
    assert plan.memory is not None
    workspace, counters = plan.memory.workspace, plan.memory.counters
    if plan.workspace_bytes:
        workspace.owner[: counters.pointer - workspace.pointer].view(np.float32).fill(np.nan)
