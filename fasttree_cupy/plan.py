"""Plan once a tree, run once a layer: `plan_decode` and `DecodePlan`."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from fasttree_cupy.checks import check_inputs, check_output, check_same, checked_cap, checked_float, checked_head_dim
from fasttree_cupy.execution import arrays, cuda, streams
from fasttree_cupy.execution.arrays import ArrayView
from fasttree_cupy.execution.device import resolve_device
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.schedule import BalancedSchedule, HeuristicSchedule, Schedule, SubtreeSchedule
from fasttree_cupy.params import FastTreeParams, checked_heads, preset
from fasttree_cupy.planning import balanced, greedy, subtree
from fasttree_cupy.planning.machine import H200_WORKERS, machine_of
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree

__all__ = ["DecodePlan", "plan_decode"]


def plan_decode(
    tree_info: KVTree | Sequence[KVTreeNode],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    device: str | None = None,
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
    device : str, optional
        "cpu", "cuda" or "cuda:<n>"; by default the GPU where one is usable, else the CPU.

    Returns
    -------
    DecodePlan
        Owns its arrays and its workspace on the device.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """
    tree = as_tree(tree_info)
    heads, kv_heads = checked_heads(num_qo_heads, num_kv_heads)
    head_dim = checked_head_dim(head_dim)
    return DecodePlan(tree, heads, kv_heads, head_dim, resolve_device(device))


class DecodePlan:
    """A tree planned for one head layout and device; made by `plan_decode`.

    Attributes
    ----------
    batch_size, num_tokens : int
        Requests, and rows that K and V must have.
    num_qo_heads, num_kv_heads, head_dim : int
        Head layout.
    device : str
        "cpu" or "cuda:<n>".
    schedule : Schedule
        What runs: printable, with its tile sizes and counts.
    workspace_bytes : int
        Bytes of the workspace for partial outputs.

    Notes
    -----
    Nothing but `run` writes to the plan's memory, and only to its workspace: two runs of one plan must not overlap.
    On a GPU a tile holds several requests, and what a request must not see is weighted by 0: an infinity or NaN in V
    then reaches the other requests of its tile.
    """

    def __init__(self, tree: KVTree, num_qo_heads: int, num_kv_heads: int, head_dim: int, device: str) -> None:
        self.batch_size = tree.batch_size
        self.num_tokens = tree.unique_tokens
        self.num_qo_heads = num_qo_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        self.schedule = make_schedule(tree, num_qo_heads, num_kv_heads, head_dim, device)

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the workspace for partial outputs."""
        return self.schedule.workspace_bytes

    def __repr__(self) -> str:
        return (
            f"DecodePlan({self.batch_size} requests, {self.num_tokens} tokens, heads {self.num_qo_heads}/"
            f"{self.num_kv_heads}, head_dim {self.head_dim}, {self.device}: {self.schedule})"
        )

    def run(
        self,
        q: Any,
        k: Any,
        v: Any,
        out: Any = None,
        *,
        sm_scale: float | None = None,
        logit_cap: float = -1,
        stream: Any = None,
    ) -> Any:
        """Attend every request to the tokens on its path.

        Parameters
        ----------
        q : array, float16 or bfloat16, shape (batch_size, num_qo_heads, head_dim)
            One query a request, on the plan's device, from NumPy, CuPy, torch, JAX or any library with
            ``__dlpack__``. The last axis is contiguous, here and below; on a GPU rows start at multiples of 16 bytes.
        k, v : array, dtype of q, shape (num_tokens, num_kv_heads, head_dim)
            Node i's tokens in rows ``tree.kv_ptrs[i]`` to ``tree.kv_ptrs[i + 1]``.
        out : array, dtype and shape of q, optional
            Written in place. By default a new array of q's framework is returned.
        sm_scale : float, optional
            Factor of the scores; by default ``head_dim ** -0.5``.
        logit_cap : float
            Soft cap where positive: a score becomes ``logit_cap * tanh(score / logit_cap)``.
        stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, optional
            CUDA stream to work on; by default the caller's current one: torch's for torch tensors, else CuPy's. Another
            one first waits for the current one; that the current one waits for it before it uses the output is the
            caller's part.

        Returns
        -------
        array
            ``out``, or the new array.

        Raises
        ------
        TypeError, ValueError
            An argument is wrong or does not fit the plan; the message names it, and nothing was written.
        """
        scale = self.head_dim**-0.5 if sm_scale is None else checked_float(sm_scale, "sm_scale")
        cap = checked_cap(logit_cap)
        kind, _, index = self.device.partition(":")
        place = (kind, int(index or 0))
        check_same("q", "device", arrays.device_of("q", q), place)
        if kind == "cpu" and stream is not None:
            raise ValueError(f"stream is {stream!r}, but q lies on the CPU, expected stream left out")
        with nullcontext() if kind == "cpu" else streams.use_device(place[1]):
            work = None
            if kind == "cuda":
                work = streams.WorkStream(streams.stream_handle(stream, arrays.framework_of(q), place[1]), place[1])
            q_view, k_view, v_view = (arrays.view(name, array, work) for name, array in (("q", q), ("k", k), ("v", v)))
            self._check(q_view, k_view, v_view)
            result = arrays.empty(q_view.shape, q_view.dtype, q_view) if out is None else out
            o_view = arrays.view("out", result, work)
            check_output(o_view, q_view, "out")
            self.schedule.run(Operands(q_view, k_view, v_view, o_view, scale, cap), work)
            if work is not None:
                work.keep_borrowed((q_view, k_view, v_view, o_view), own=self.schedule)
            if out is not None:
                return out
            with nullcontext() if work is None else work.launches():
                return arrays.hand_back(result, q_view)

    def _check(self, q: ArrayView, k: ArrayView, v: ArrayView) -> None:
        """Check the inputs against one another and against the plan."""
        check_inputs({"q": q, "k": k, "v": v})
        check_same("q", "shape", q.shape, (self.batch_size, self.num_qo_heads, self.head_dim))
        check_same("k", "shape", k.shape, (self.num_tokens, self.num_kv_heads, self.head_dim))
        self.schedule.check(q, k, v)


def make_schedule(tree: KVTree, num_qo_heads: int, num_kv_heads: int, head_dim: int, device: str) -> Schedule:
    """Plan a tree for a device: our own planners where their kernels can run, else the documented heuristic."""
    group = num_qo_heads // num_kv_heads
    if device != "cpu":
        multiprocessors = cuda.multiprocessors(int(device.removeprefix("cuda:")))
        if BalancedSchedule.problem(device, group, head_dim) is None:
            equal = balanced.plan(tree, group, num_kv_heads, head_dim, multiprocessors, H200_WORKERS)
            # At an item without tokens consumers wait for nothing: they could lap the producers at a barrier, whose
            # parity does not tell a phase from the one after the next.
            if not equal.has_empty_items:
                return BalancedSchedule(equal, head_dim, device)
        if SubtreeSchedule.problem(device, group, head_dim) is None:
            made = subtree.plan(tree, group, num_kv_heads, head_dim, machine_of(multiprocessors))
            return SubtreeSchedule(made, num_qo_heads, head_dim, device)
    chosen = preset("H100")
    params = FastTreeParams.for_gpu("H100", group)
    heuristic = greedy.plan(
        tree, chosen.kv_split_sizes, chosen.para_threshs1, chosen.para_threshs2, num_kv_heads,
        params.alpha, params.beta, params.gamma, params.TSQs, params.TSKs, group,
    )  # fmt: skip
    return HeuristicSchedule(heuristic, tree.unique_tokens, num_qo_heads, head_dim, device)
