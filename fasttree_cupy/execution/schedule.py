"""What a `DecodePlan` runs: a planned tree on its device, with its workspace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fasttree_cupy.execution import cpu, cuda
from fasttree_cupy.execution.arrays import ArrayView, view
from fasttree_cupy.execution.kernels import MMA_COMPUTE_CAPABILITY, WORKER_GROUP_ROWS, block_warps, worker_problem
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.streams import WorkStream
from fasttree_cupy.execution.upload import place_schedule
from fasttree_cupy.metadata import MetadataTuple, PhaseNodeNums

if TYPE_CHECKING:
    from fasttree_cupy.planning.balanced import BalancedPlan
    from fasttree_cupy.planning.greedy import GreedyPlan
    from fasttree_cupy.planning.subtree import SubtreePlan

__all__ = ["BalancedSchedule", "HeuristicSchedule", "Schedule", "SubtreeSchedule"]


class Schedule(Protocol):
    """Something that decodes checked arrays."""

    workspace_bytes: int

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where this schedule cannot run on the arrays."""

    def run(self, operands: Operands, stream: WorkStream | None) -> None:
        """Decode into ``o``; on a GPU the work is queued on a stream."""


class BalancedSchedule:
    """Equal shares for persistent workers, run by ``tree_decode_sm90``: one launch, which merges what was cut."""

    def __init__(self, made: BalancedPlan, head_dim: int, device: str) -> None:
        self.num_items = len(made.items)
        self.num_segments = len(made.segments)
        self.row_groups = made.row_groups
        self.workers = made.workers
        self.num_merges = made.merges
        counters = np.zeros(max(1, made.counters * made.row_groups), np.int32)  # left as the next launch needs them
        mid_shape = (made.partials, made.row_groups * WORKER_GROUP_ROWS, head_dim)
        # Held here: the kernel gets bare pointers.
        self.arrays, self.mid_o, self.mid_lse = place_schedule((counters, *made[:3]), mid_shape, device)
        self.workspace_bytes = int(self.mid_o.nbytes + self.mid_lse.nbytes)
        self.mid = (self.mid_o.data.ptr, self.mid_lse.data.ptr)
        self.lists = tuple(array.data.ptr for array in self.arrays)

    @staticmethod
    def problem(device: str, group: int, head_dim: int) -> str | None:
        """Say why ``tree_decode_sm90`` cannot serve a device and head layout; None where it can."""
        return worker_problem(cuda.compute_capability(int(device.removeprefix("cuda:"))), group, head_dim)

    def __str__(self) -> str:
        return (
            f"{self.num_items} items of up to {WORKER_GROUP_ROWS * self.row_groups} rows for {self.workers} workers, "
            f"{self.num_merges} tiles merged, {self.workspace_bytes} bytes of workspace"
        )

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where rows are not aligned."""
        check_rows(q, k, v)

    def run(self, operands: Operands, stream: WorkStream | None) -> None:
        """Queue one launch."""
        if stream is None:
            raise ValueError("stream is None, expected a CUDA stream")
        cuda.run_workers(operands, self.mid, self.lists, self.num_segments, self.row_groups, self.workers, stream)


def check_rows(q: ArrayView, k: ArrayView, v: ArrayView) -> None:
    """Raise ValueError where rows are not aligned as the tensor-core kernels need it."""
    problem = cuda.mma_problem({"q": q, "k": k, "v": v})
    if problem is not None:
        raise ValueError(f"the plan's kernel {problem}")


class SubtreeSchedule:
    """Items of our own planner, run by ``tree_decode``; a merge follows where tokens were cut."""

    def __init__(self, made: SubtreePlan, num_qo_heads: int, head_dim: int, device: str) -> None:
        self.num_items = len(made.items)
        self.num_merges = len(made.merge_requests)
        self.row_warps = made.row_warps
        self.block_warps = made.block_warps
        mid_shape = (len(made.merge_entries), num_qo_heads, head_dim)
        # Held here: the kernels get bare pointers.
        self.arrays, self.mid_o, self.mid_lse = place_schedule(made[:7], mid_shape, device)
        self.workspace_bytes = int(self.mid_o.nbytes + self.mid_lse.nbytes)
        items, segments, order, requests, entries, offs, lens = (array.data.ptr for array in self.arrays)
        self.mid = (self.mid_o.data.ptr, self.mid_lse.data.ptr)
        self.lists = (items, segments, order)
        self.merge_lists = (entries, offs, lens)
        self.merge_requests = requests

    @staticmethod
    def problem(device: str, group: int, head_dim: int) -> str | None:
        """Say why ``tree_decode`` cannot serve a device and head layout; None where it can."""
        capability = cuda.compute_capability(int(device.removeprefix("cuda:")))
        if capability < MMA_COMPUTE_CAPABILITY:
            return f"compute capability {capability / 10} has no bfloat16 tensor cores"
        if group > 16 * max(block_warps(head_dim)):
            return f"{group} query heads a KV head are more than a block's rows"
        return None

    def __str__(self) -> str:
        return (
            f"{self.num_items} items a KV head of up to {16 * self.row_warps} rows, {self.num_merges} requests merged, "
            f"{self.workspace_bytes} bytes of workspace"
        )

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where rows are not aligned."""
        check_rows(q, k, v)

    def run(self, operands: Operands, stream: WorkStream | None) -> None:
        """Queue one launch, or two where requests are merged."""
        if stream is None:
            raise ValueError("stream is None, expected a CUDA stream")
        merge = (self.merge_lists, self.num_merges, self.merge_requests)
        cuda.run_items(operands, self.mid, self.lists, self.num_items, self.block_warps, merge, stream)


class HeuristicSchedule:
    """The documented heuristic's metadata: for the CPU, and for what ``tree_decode`` does not serve."""

    def __init__(
        self,
        made: GreedyPlan,
        num_tokens: int,
        num_qo_heads: int,
        head_dim: int,
        device: str,
        requests: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.q_tile_sizes = made.q_tile_sizes
        mid_shape = (len(made.vnode_to_q_entries), num_qo_heads, head_dim)
        # Held here: whose outputs are written, where these are not all.
        whose = () if requests is None else (requests,)
        placed, mid_o, mid_lse = place_schedule((*made[:9], *whose), mid_shape, device)
        lists, self.requests = placed[:9], placed[9] if whose else None
        nums = PhaseNodeNums(made.phase_node_nums, num_tokens)
        self.metadata = MetadataTuple._make([*lists, mid_o, mid_lse, nums, made.phase_node_offsets])
        self.views = [view(name, self.metadata[i]) for i, name in enumerate(MetadataTuple._fields[:11])]
        self.workspace_bytes = int(mid_o.nbytes + mid_lse.nbytes)

    def __str__(self) -> str:
        nums = self.metadata.phase_node_nums
        return f"{nums[0]} + {nums[1]} vnodes, {self.workspace_bytes} bytes of workspace"

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Any arrays will do."""

    def run(self, operands: Operands, stream: WorkStream | None) -> None:
        """Run stage 1 and stage 2."""
        if stream is None:
            cpu.run(operands, self.metadata, self.requests)
            return
        nums, offsets = self.metadata.phase_node_nums, self.metadata.phase_node_offsets
        kernel = cuda.check_kernel("auto", {"q": operands.q, "k": operands.k, "v": operands.v})
        whose = None if self.requests is None else (self.requests.data.ptr, len(self.requests))
        cuda.decode(operands, self.views, nums, offsets, self.q_tile_sizes, kernel, stream, whose)
