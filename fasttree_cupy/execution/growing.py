"""A schedule for ``tree_decode_sm90`` whose arrays follow a growing plan in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fasttree_cupy.execution.edits import EditableArray
from fasttree_cupy.execution.kernels import WORKER_GROUP_ROWS
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.schedule import BalancedSchedule
from fasttree_cupy.execution.streams import WorkStream, use_device

if TYPE_CHECKING:
    from fasttree_cupy.planning.growing import GrowingPlan

__all__ = ["GrowingSchedule"]


class GrowingSchedule(BalancedSchedule):
    """Arrays and work spaces for all that the plan may become: what a launch is given never changes."""

    def __init__(self, plan: GrowingPlan, head_dim: int, device: str) -> None:
        import cupy

        self.plan = plan
        self.row_groups, self.workers, self.num_segments = plan.row_groups, plan.workers, plan.sizes.segments
        sizes, index = plan.sizes, int(device.removeprefix("cuda:"))
        with use_device(index):
            self.mid_o = cupy.empty((sizes.partials, self.row_groups * WORKER_GROUP_ROWS, head_dim), np.float32)
            self.mid_lse = cupy.empty(self.mid_o.shape[:2], np.float32)
            self.packed = EditableArray(sizes.total, plan.most_edits, index)
            stream = cupy.cuda.get_current_stream()
            self.follow(False, WorkStream(stream.ptr, index))
            stream.synchronize()
        self.workspace_bytes = int(self.mid_o.nbytes + self.mid_lse.nbytes)
        self.mid = (self.mid_o.data.ptr, self.mid_lse.data.ptr)
        starts = (sizes.counters_at, sizes.items_at, sizes.segments_at, sizes.order_at)
        self.lists = tuple(self.packed.array.data.ptr + 4 * start for start in starts)

    def __str__(self) -> str:
        made = self.plan.made
        return (
            f"{len(made.items)} items of up to {WORKER_GROUP_ROWS * self.row_groups} rows for {self.workers} workers "
            f"as last planned, {made.merges} tiles merged, {self.workspace_bytes} bytes of workspace"
        )

    def run(self, operands: Operands, stream: WorkStream | None) -> None:
        """Queue one launch, after the last change."""
        if stream is not None:
            self.packed.let_wait(stream)
        super().run(operands, stream)

    def follow(self, fits: bool, stream: WorkStream) -> None:
        """Queue the plan's last change: edits where these `fits`, else all of it, with counters of 0."""
        if fits:
            self.packed.edit(self.plan.write_edits, stream)
        else:
            self.packed.replace(self.plan.packed[: self.plan.used], stream)
