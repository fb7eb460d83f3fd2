"""What tests do to a plan's memory."""

from __future__ import annotations

import numpy as np

import fasttree_cupy as ft

__all__ = ["poison_partials"]


def poison_partials(plan: ft.DecodePlan) -> None:
    """Fill the partial outputs in a plan's own workspace on a GPU with NaN; counters stay."""
    assert plan.memory is not None
    workspace, counters = plan.memory.workspace, plan.memory.counters
    if plan.workspace_bytes:
        workspace.owner[: counters.pointer - workspace.pointer].view(np.float32).fill(np.nan)
