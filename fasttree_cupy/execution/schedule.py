"""What a `DecodePlan` runs: a planned tree, and what memory it needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from fasttree_cupy.execution import cpu, cuda, plan_kernels, stages
from fasttree_cupy.execution.arrays import ArrayView, as_numpy
from fasttree_cupy.execution.kernels import MMA_COMPUTE_CAPABILITY, WORKER_GROUP_ROWS, block_warps, worker_problem
from fasttree_cupy.execution.launch import Relaunch
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.plan_memory import MemoryNeeds, PlanMemory
from fasttree_cupy.execution.streams import WorkStream
from fasttree_cupy.metadata import MetadataTuple, Phase, PhaseNodeNums

if TYPE_CHECKING:
    from fasttree_cupy.planning.balanced import BalancedPlan
    from fasttree_cupy.planning.greedy import GreedyPlan
    from fasttree_cupy.planning.subtree import SubtreePlan

__all__ = ["BalancedSchedule", "HeuristicSchedule", "Schedule", "SubtreeSchedule"]


class Schedule(Protocol):
    """Something that decodes checked arrays."""

    needs: MemoryNeeds

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where this schedule cannot run on the arrays."""

    def run(self, operands: Operands, memory: PlanMemory, stream: WorkStream | None) -> Callable[[], Relaunch] | None:
        """Decode into ``o`` with the memory that was placed; on a GPU the work is queued on a stream.

        Returns what makes a `Relaunch` of it, or None where that is not one launch.
        """


class BalancedSchedule:
    """Equal shares for persistent workers, run by ``tree_decode_sm90``: one launch, which merges what was cut."""

    def __init__(self, made: BalancedPlan, head_dim: int, device: str) -> None:
        self.num_items = len(made.items)
        self.num_segments = len(made.segments)
        self.row_groups = made.row_groups
        self.workers = made.workers
        self.num_merges = made.merges
        mid_shape = (made.partials, made.row_groups * WORKER_GROUP_ROWS, head_dim)
        self.needs = MemoryNeeds(made[:3], mid_shape, device, made.counters * made.row_groups)

    @staticmethod
    def problem(device: str, group: int, head_dim: int) -> str | None:
        """Say why ``tree_decode_sm90`` cannot serve a device and head layout; None where it can."""
        return worker_problem(cuda.compute_capability(int(device.removeprefix("cuda:"))), group, head_dim)

    def __str__(self) -> str:
        return (
            f"{self.num_items} items of up to {WORKER_GROUP_ROWS * self.row_groups} rows for {self.workers} workers, "
            f"{self.num_merges} tiles merged, {self.needs.workspace_bytes} bytes of workspace"
        )

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where rows are not aligned."""
        check_rows(q, k, v)

    def lists(self, memory: PlanMemory) -> tuple[int, ...]:
        """Where items, segments and the order of the requests lie."""
        return memory.pointers

    def run(self, operands: Operands, memory: PlanMemory, stream: WorkStream | None) -> Callable[[], Relaunch]:
        """Queue one launch."""
        if stream is None:
            raise ValueError("stream is None, expected a CUDA stream")
        mid = (memory.mid_o.pointer, memory.mid_lse.pointer)
        lists = (memory.counters.pointer, *self.lists(memory))
        return plan_kernels.run_workers(operands, mid, lists, self.num_segments, self.row_groups, self.workers, stream)


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
        self.needs = MemoryNeeds(made[:7], mid_shape, device)

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
            f"{self.needs.workspace_bytes} bytes of workspace"
        )

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Raise ValueError where rows are not aligned."""
        check_rows(q, k, v)

    def run(self, operands: Operands, memory: PlanMemory, stream: WorkStream | None) -> None:
        """Queue one launch, or two where requests are merged."""
        if stream is None:
            raise ValueError("stream is None, expected a CUDA stream")
        mid = (memory.mid_o.pointer, memory.mid_lse.pointer)
        items, segments, order, requests, entries, offs, lens = memory.pointers
        merge = ((entries, offs, lens), self.num_merges, requests)
        plan_kernels.run_items(operands, mid, (items, segments, order), self.num_items, self.block_warps, merge, stream)


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
        self.nums = PhaseNodeNums(made.phase_node_nums, num_tokens, made.longest_vnodes)
        self.offsets = made.phase_node_offsets
        mid_shape = (len(made.vnode_to_q_entries), num_qo_heads, head_dim)
        # Of growing plans: whose outputs are written, where these are not all.
        self.num_requests = None if requests is None else len(requests)
        whose = () if requests is None else (requests,)
        self.needs = MemoryNeeds((*made[:9], *whose), mid_shape, device)

    def __str__(self) -> str:
        return f"{self.nums[0]} + {self.nums[1]} vnodes, {self.needs.workspace_bytes} bytes of workspace"

    def check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Any arrays will do."""

    def run(self, operands: Operands, memory: PlanMemory, stream: WorkStream | None) -> None:
        """Run stage 1 and stage 2."""
        views = (*memory.lists[:9], memory.mid_o, memory.mid_lse)
        if stream is None:
            requests = None if self.num_requests is None else as_numpy(memory.lists[9])
            cpu.run(operands, MetadataTuple._make([*map(as_numpy, views), self.nums, self.offsets]), requests)
            return
        choice = "auto" if operands.kv_dtype is None else "plain"
        kernel = cuda.check_kernel(choice, {"q": operands.q, "k": operands.k, "v": operands.v})
        whose = None if self.num_requests is None else (memory.pointers[9], self.num_requests)
        phases = map(Phase, self.offsets, self.nums, self.q_tile_sizes, self.nums.longest_vnodes)
        stages.decode(operands, views, list(phases), kernel, stream, whose)
