"""Plan once a tree, run once a layer: `plan_decode` and `DecodePlan`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.checks import (
    check_inputs,
    check_output,
    check_same,
    check_workspace,
    checked_cap,
    checked_float,
    checked_head_dim,
)
from fasttree_cupy.execution import arrays, cuda, streams
from fasttree_cupy.execution.arrays import ArrayView
from fasttree_cupy.execution.device import resolve_device
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.plan_memory import PlanMemory
from fasttree_cupy.execution.schedule import BalancedSchedule, HeuristicSchedule, Schedule, SubtreeSchedule
from fasttree_cupy.execution.turns import Turns
from fasttree_cupy.integers import int_vector
from fasttree_cupy.params import FastTreeParams, checked_heads, preset
from fasttree_cupy.planning import balanced, greedy, subtree
from fasttree_cupy.planning.machine import H200_WORKERS, machine_of
from fasttree_cupy.scales import checked_scale
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree

__all__ = ["DecodePlan", "plan_decode"]

MOST_ROWS = 2**31 - 1
"""Rows of a pool that int32 row numbers tell apart."""


def plan_decode(
    tree_info: KVTree | Sequence[KVTreeNode],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    kv_indices: Any = None,
    device: str | None = None,
    place: bool = True,
) -> DecodePlan:
    """Plan the decoding of a tree.

    Parameters
    ----------
    tree_info : KVTree or sequence of KVTreeNode
        The tree, ``requests`` filled.
    num_qo_heads, num_kv_heads : int
        Query and KV heads; the first is a multiple of the second.
    head_dim : int
        One of 16, 32, 64, 128, 256.
    kv_indices : array of int, shape (unique_tokens,), optional
        Rows of K and V that hold the tree's tokens, in host memory: token ``tree.kv_ptrs[i] + j`` is node i's j-th.
        By default K and V hold them in that order. From a paged cache `KVTree.from_block_tables` gives them.
    device : str, optional
        "cpu", "cuda" or "cuda:<n>"; by default the GPU where one is usable, else the CPU.
    place : bool
        Whether to place the plan on the device, in memory of its own. Else nothing is allocated there: the plan knows
        what it needs, and `DecodePlan.place` takes the caller's workspace.

    Returns
    -------
    DecodePlan
        Ready to `run` where it was placed.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """
    tree = as_tree(tree_info)
    heads, kv_heads = checked_heads(num_qo_heads, num_kv_heads)
    head_dim = checked_head_dim(head_dim)
    plan = DecodePlan(tree, heads, kv_heads, head_dim, resolve_device(device), checked_rows(kv_indices, tree))
    if place:
        plan.place()
    return plan


class DecodePlan:
    """A tree planned for one head layout and device; made by `plan_decode`.

    Attributes
    ----------
    batch_size, num_tokens : int
        Requests, and rows that K and V must have, or in a pool have at least.
    from_pool : bool
        Whether the plan was made with ``kv_indices``.
    num_qo_heads, num_kv_heads, head_dim : int
        Head layout.
    device : str
        "cpu" or "cuda:<n>".
    schedule : Schedule
        What runs: printable, with its tile sizes and counts.
    workspace_bytes, schedule_bytes : int
        Bytes of device memory that runs write to, and of the index arrays that they read. Nothing else is allocated.
    memory : PlanMemory or None
        Where these lie; None before the plan is placed.

    Notes
    -----
    Runs of one plan may come from several threads and on several streams. As they share its workspace, each waits on
    the GPU for the one before it, unless the plan needs none. The replays of a CUDA graph that captured a run are the
    caller's to order, among each other and with runs. Two plans share nothing.

    On a GPU a tile holds several requests, and what a request must not see is weighted by 0: an infinity or NaN in V
    then reaches the other requests of its tile.
    """

    def __init__(
        self,
        tree: KVTree,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        device: str,
        kv_indices: npt.NDArray[np.int32] | None = None,
    ) -> None:
        self.batch_size = tree.batch_size
        self.from_pool = kv_indices is not None
        self.num_tokens = tree.unique_tokens if kv_indices is None else int(kv_indices.max(initial=-1)) + 1
        self.num_qo_heads = num_qo_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        kind, _, index = device.partition(":")
        self._place = (kind, int(index or 0))
        self.schedule = make_schedule(tree, num_qo_heads, num_kv_heads, head_dim, device, kv_indices)
        self.workspace_bytes = self.schedule.needs.workspace_bytes
        self.schedule_bytes = self.schedule.needs.schedule_bytes
        self.memory: PlanMemory | None = None
        self._turns = Turns()
        self._checked_inputs: tuple[Any, ...] = ()
        self._checked_output: tuple[Any, ...] = ()

    def __repr__(self) -> str:
        return (
            f"DecodePlan({self.batch_size} requests, {self.num_tokens} tokens, heads {self.num_qo_heads}/"
            f"{self.num_kv_heads}, head_dim {self.head_dim}, {self.device}: {self.schedule})"
        )

    def place(self, workspace: Any = None) -> None:
        """Place the plan on its device: copy the index arrays there, and make a workspace ready.

        Parameters
        ----------
        workspace : array of any known dtype, at least `workspace_bytes` long, optional
            The caller's contiguous buffer, on the plan's device, from a multiple of 16 bytes on. What it holds does not
            matter. Until the last run is done it is the plan's alone; where another plan was given it meanwhile, place
            anew. By default a new one is allocated.

        Raises
        ------
        TypeError, ValueError
            The workspace does not serve; the message says why, and nothing was written.
        """
        kind, index = self._place
        framework = "cupy"
        if workspace is not None:
            check_same("workspace", "device", arrays.device_of("workspace", workspace), self._place)
            framework = arrays.framework_of(workspace)
        with nullcontext() if kind == "cpu" else streams.use_device(index):
            work = None if kind == "cpu" else streams.WorkStream(streams.current_stream(framework, index), index)
            space = None if workspace is None else arrays.view("workspace", workspace, work)
            if space is not None:
                check_workspace(space, self.workspace_bytes)
            with self._turns.lock:
                if work is not None:
                    self._turns.wait(work)
                self.memory = self.schedule.needs.place(space, work)
                if work is not None:
                    self._turns.end(work)

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any = None,
        *,
        sm_scale: float | None = None,
        logit_cap: float = -1,
        return_lse: bool = False,
        stream: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
    ) -> Any:
        """Attend every request to the tokens on its path.

        Parameters
        ----------
        q : array, float16 or bfloat16, shape (batch_size, num_qo_heads, head_dim)
            One query a request, on the plan's device, from NumPy, CuPy, torch, JAX or any library with
            ``__dlpack__``. The last axis is contiguous, here and below; on a GPU rows start at multiples of 16 bytes.
        k, v : array, dtype of q or float8, shape (num_tokens, num_kv_heads, head_dim)
            Node i's tokens in rows ``tree.kv_ptrs[i]`` to ``tree.kv_ptrs[i + 1]``, or in the rows that the plan's
            ``kv_indices`` said, of a pool of any size. Float8 is float8_e4m3fn or float8_e5m2 (OCP OFP8), both arrays
            of the same.
        out : array, dtype and shape of q, optional
            Written in place. By default a new array of q's framework is returned.
        sm_scale : float, optional
            Factor of the scores; by default ``head_dim ** -0.5``.
        logit_cap : float
            Soft cap where positive: a score becomes ``logit_cap * tanh(score / logit_cap)``.
        return_lse : bool
            Whether to return the LSE too, with which outputs merge (`merge_states`).
        stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, optional
            CUDA stream to work on; by default the caller's current one: torch's for torch tensors, else CuPy's. Another
            one first waits for the current one; that the current one waits for it before it uses the output is the
            caller's part.
        k_scale, v_scale : float or float32 array of shape (num_kv_heads,), optional
            Positive factors of float8 K and V, by default 1: the keys are ``k_scale * k``. An array holds one factor
            for each KV head and lies on the plan's device.

        Returns
        -------
        out : array
            ``out``, or the new array. 0 for a request that attends to nothing.
        lse : array, float32, shape (batch_size, num_qo_heads)
            With `return_lse`: the natural logarithm of the sum of each row's exponentiated scores, a new array of q's
            framework. -inf for a request that attends to nothing.

        Raises
        ------
        TypeError, ValueError
            An argument is wrong or does not fit the plan; the message names it, and nothing was written.
        RuntimeError
            The plan was made with ``place=False`` and is not placed yet.
        """
        scale = self.head_dim**-0.5 if sm_scale is None else checked_float(sm_scale, "sm_scale")
        cap = checked_cap(logit_cap)
        kind, index = self._place
        check_same("q", "device", arrays.device_of("q", q), self._place)
        if kind == "cpu" and stream is not None:
            raise ValueError(f"stream is {stream!r}, but q lies on the CPU, expected stream left out")
        with nullcontext() if kind == "cpu" else streams.use_device(index):
            work = None
            if kind == "cuda":
                work = streams.WorkStream(streams.stream_handle(stream, arrays.framework_of(q), index), index)
            q_view, k_view, v_view = arrays.view("q", q, work), arrays.view("k", k, work), arrays.view("v", v, work)
            self._check(q_view, k_view, v_view)
            k_factor = checked_scale("k_scale", k_scale, k_view, work)
            v_factor = checked_scale("v_scale", v_scale, v_view, work)
            if isinstance(k_factor, float):
                checked_float(scale * k_factor, "sm_scale times k_scale")
            result = arrays.empty(q_view.shape, q_view.dtype, q_view) if out is None else out
            o_view = arrays.view("out", result, work)
            if out is not None:
                self._check_output(o_view, q_view)
            lse = arrays.empty(q_view.shape[:2], "float32", q_view) if return_lse else None
            lse_view = None if lse is None else arrays.view("lse", lse, work)
            self._queue(Operands(q_view, k_view, v_view, o_view, scale, cap, lse_view, k_factor, v_factor), work)
            if out is not None and lse is None:
                return out
            with nullcontext() if work is None else work.launches():
                made = out if out is not None else arrays.hand_back(result, q_view)
                return made if lse is None else (made, arrays.hand_back(lse, q_view))

    def _queue(self, operands: Operands, work: streams.WorkStream | None) -> None:
        """Run the schedule on checked arrays, in turn with the plan's other runs."""
        memory = self.memory
        if memory is None:
            raise RuntimeError("the plan was made with place=False, expected a call of place before run")
        if work is None:
            self.schedule.run(operands, memory, None)
            return
        if self.workspace_bytes == 0:
            self.schedule.run(operands, memory, work)
        else:
            with self._turns.lock:
                self._turns.wait(work)
                self.schedule.run(operands, memory, work)
                self._turns.end(work)
        borrowed = operands.views()
        work.keep_borrowed((*borrowed, memory.workspace) if memory.borrowed else borrowed, memory, memory.home)

    def _check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Check the inputs against one another and against the plan, unless the last run's were like them."""
        inputs = (layout_of(q), layout_of(k), layout_of(v))
        if inputs == self._checked_inputs:
            return
        check_inputs({"q": q, "k": k, "v": v}, float8=True)
        check_same("q", "shape", q.shape, (self.batch_size, self.num_qo_heads, self.head_dim))
        if self.from_pool and k.shape[0] < self.num_tokens:
            raise ValueError(f"k has {k.shape[0]} rows, expected {self.num_tokens} at least, as kv_indices asks for")
        rows = k.shape[0] if self.from_pool else self.num_tokens
        check_same("k", "shape", k.shape, (rows, self.num_kv_heads, self.head_dim))
        self.schedule.check(q, k, v)
        self._checked_inputs = inputs

    def _check_output(self, out: ArrayView, q: ArrayView) -> None:
        """Check the caller's output against the queries, unless the last run's were like them."""
        layouts = (layout_of(out), layout_of(q))
        if layouts != self._checked_output:
            check_output(out, q, "out")
            self._checked_output = layouts


def layout_of(view: ArrayView) -> tuple[Any, ...]:
    """What of an array checks depend on: all but its owner, and the address but for its alignment."""
    return (view.pointer % cuda.VECTOR_BYTES, *view[1:-1])


def checked_rows(kv_indices: Any, tree: KVTree) -> npt.NDArray[np.int32] | None:
    """`kv_indices` as int32, one row for each of the tree's tokens."""
    if kv_indices is None:
        return None
    rows = int_vector(kv_indices, "kv_indices")
    if len(rows) != tree.unique_tokens:
        raise ValueError(f"kv_indices holds {len(rows)} rows, expected {tree.unique_tokens}, one for each token")
    if len(rows) and not 0 <= rows.min() <= rows.max() < MOST_ROWS:
        raise ValueError(f"kv_indices goes from {rows.min()} to {rows.max()}, expected rows from 0 to {MOST_ROWS - 1}")
    return rows.astype(np.int32)


def make_schedule(
    tree: KVTree,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: str,
    kv_indices: npt.NDArray[np.int32] | None,
) -> Schedule:
    """Plan a tree for a device: our own planners where their kernels can run, else the documented heuristic."""
    group = num_qo_heads // num_kv_heads
    if device != "cpu":
        multiprocessors = cuda.multiprocessors(int(device.removeprefix("cuda:")))
        if BalancedSchedule.problem(device, group, head_dim) is None:
            equal = balanced.plan(tree, group, num_kv_heads, head_dim, multiprocessors, H200_WORKERS, kv_indices)
            return BalancedSchedule(equal, head_dim, device)
        if SubtreeSchedule.problem(device, group, head_dim) is None:
            made = subtree.plan(tree, group, num_kv_heads, head_dim, machine_of(multiprocessors), kv_indices)
            return SubtreeSchedule(made, num_qo_heads, head_dim, device)
    chosen = preset("H100")
    params = FastTreeParams.for_gpu("H100", group)
    heuristic = greedy.plan(
        tree, chosen.kv_split_sizes, chosen.para_threshs1, chosen.para_threshs2, num_kv_heads,
        params.alpha, params.beta, params.gamma, params.TSQs, params.TSKs, group,
    )  # fmt: skip
    if kv_indices is not None:
        heuristic = heuristic._replace(vnode_to_kv_entries=kv_indices[heuristic.vnode_to_kv_entries])
    return HeuristicSchedule(heuristic, tree.unique_tokens, num_qo_heads, head_dim, device)
