"""A schedule for ``tree_decode_sm90`` whose arrays follow a growing plan in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fasttree_cupy.execution.edits import Edits
from fasttree_cupy.execution.kernels import WORKER_GROUP_ROWS
from fasttree_cupy.execution.plan_memory import MemoryNeeds, PlanMemory, clear
from fasttree_cupy.execution.schedule import BalancedSchedule
from fasttree_cupy.execution.streams import WorkStream

if TYPE_CHECKING:
    from fasttree_cupy.planning.growing import GrowingPlan

__all__ = ["GrowingSchedule"]


class GrowingSchedule(BalancedSchedule):
    """Needs memory for all that the plan may become: what a launch is given never changes.

    Attributes
    ----------
    plan : GrowingPlan
    edits : Edits
        Of the plan's arrays on the GPU.
    """

    def __init__(self, plan: GrowingPlan, head_dim: int, device: str) -> None:
        self.plan = plan
        self.row_groups, self.workers, self.num_segments = plan.row_groups, plan.workers, plan.sizes.segments
        mid_shape = (plan.sizes.partials, plan.row_groups * WORKER_GROUP_ROWS, head_dim)
        self.needs = MemoryNeeds((plan.packed,), mid_shape, device, plan.sizes.counters, lambda: plan.used)
        self.edits = Edits()

    def __str__(self) -> str:
        made = self.plan.made
        return (
            f"{len(made.items)} items of up to {WORKER_GROUP_ROWS * self.row_groups} rows for {self.workers} workers "
            f"as last planned, {made.merges} tiles merged, {self.needs.workspace_bytes} bytes of workspace"
        )

    def lists(self, memory: PlanMemory) -> tuple[int, ...]:
        """Where items, segments and the order of the requests lie in the one array that holds them."""
        sizes = self.plan.sizes
        return tuple(memory.pointers[0] + 4 * at for at in (sizes.items_at, sizes.segments_at, sizes.order_at))

    def follow(self, fits: bool, memory: PlanMemory, stream: WorkStream) -> None:
        """Queue the plan's last change: edits where these `fits`, else all of it, with counters of 0."""
        if fits:
            self.edits.edit(memory.pointers[0], self.plan.edits, stream)
        else:
            self.edits.replace(memory.pointers[0], self.plan.packed[: self.plan.used], stream)
            clear(memory.counters, stream)
