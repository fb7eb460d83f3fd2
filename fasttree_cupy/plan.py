"""Plan once a tree, run once a layer: `plan_decode` and `DecodePlan`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from fasttree_cupy.capacity import Capacity, checked_capacity
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
from fasttree_cupy.execution.launch import Relaunch
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.plan_memory import PlanMemory
from fasttree_cupy.execution.repeat import Repeat
from fasttree_cupy.execution.schedule import BalancedSchedule, HeuristicSchedule, Schedule, SubtreeSchedule
from fasttree_cupy.execution.turns import Turns
from fasttree_cupy.growth import MOST_ROWS, Growth, grow
from fasttree_cupy.integers import int_vector
from fasttree_cupy.params import FastTreeParams, checked_heads, preset
from fasttree_cupy.planning import balanced, greedy, subtree
from fasttree_cupy.scales import checked_scale, largest
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree
from fasttree_cupy.tuning.chosen import constants_of

__all__ = ["DecodePlan", "plan_decode"]

Made = TypeVar("Made")


def plan_decode(
    tree_info: KVTree | Sequence[KVTreeNode],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    *,
    kv_indices: Any = None,
    device: str | None = None,
    capacity: Capacity | None = None,
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
    capacity : Capacity, optional
        Makes a plan whose tree can grow up to it: see `DecodePlan.append`, `fork` and `finish`.
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
    room = None if capacity is None else checked_capacity(capacity, tree)
    rows = checked_rows(kv_indices, tree)
    plan = DecodePlan(tree, heads, kv_heads, head_dim, resolve_device(device), rows, room)
    if place:
        plan.place()
    return plan


class DecodePlan:
    """A tree planned for one head layout and device; made by `plan_decode`.

    Attributes
    ----------
    batch_size, num_tokens : int
        Requests, and rows that K and V must have, or in a pool have at least. Where the tree can grow, the requests are
        the slots of its capacity.
    from_pool : bool
        Whether K and V are a pool of any size: the plan was made with ``kv_indices``, or with a capacity.
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
    A plan made with a capacity grows by `append`, `fork` and `finish`. Its requests have slots, 0 to
    ``capacity.requests - 1``: row i of Q, of the output and of the LSE is that of the request in slot i, and stays so.
    Rows of slots that are free are neither read nor written: in an output that `run` makes they hold anything. The
    tree's requests have slots 0, 1, ... at first.

    On compute capability 9.0 such a plan's memory keeps its place and size, and its arrays are edited there: a CUDA
    graph of `run` stays right through every change between its replays. On other devices the tree is planned and placed
    anew by the next `run` after a change, so that graphs must be captured anew too, and `workspace_bytes` and
    `schedule_bytes` are those of the last time.

    Runs of one plan may come from several threads and on several streams. As they share its workspace, each waits on
    the GPU for the one before it, unless the plan needs none. Changes of the tree take their turns among them, and come
    from one thread at a time. The replays of a CUDA graph that captured a run are the caller's to order, among each
    other and with runs and changes. Two plans share nothing.

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
        capacity: Capacity | None = None,
    ) -> None:
        self.batch_size = tree.batch_size if capacity is None else capacity.requests
        self.from_pool = kv_indices is not None or capacity is not None
        self.num_tokens = tree.unique_tokens if kv_indices is None else int(kv_indices.max(initial=-1)) + 1
        self.num_qo_heads = num_qo_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.device = device
        kind, _, index = device.partition(":")
        self._place = (kind, int(index or 0))
        self.memory: PlanMemory | None = None
        self._turns = Turns()
        weakref.finalize(self, self._turns.let_go).atexit = False
        self._checked_inputs: tuple[Any, ...] = ()
        self._checked_output: tuple[Any, ...] = ()
        self._last: Repeat | None = None
        make = partial(make_schedule, num_qo_heads, num_kv_heads, head_dim, device)
        self._growth: Growth | None = None
        if capacity is None:
            self.schedule: Schedule = make(tree, kv_indices)
        else:
            layout = (num_qo_heads, num_kv_heads, head_dim)
            self._growth = grow(tree, kv_indices, capacity, layout, device, make, self._turns)
            self.schedule = self._growth.schedule()

    @property
    def workspace_bytes(self) -> int:
        """Bytes of device memory that runs write to."""
        return self.schedule.needs.workspace_bytes

    @property
    def schedule_bytes(self) -> int:
        """Bytes of the index arrays that runs read."""
        return self.schedule.needs.schedule_bytes

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
            anew. By default a new one is allocated. Where a plan that grows is planned anew after a change, its
            workspace is not the same for long: there none can be given.

        Raises
        ------
        TypeError, ValueError
            The workspace does not serve; the message says why, and nothing was written.
        """
        kind, index = self._place
        framework = "cupy"
        if workspace is not None:
            if self._growth is not None and not self._growth.follows:
                raise ValueError(
                    f"workspace is given, but a plan that grows on {self.device} needs another one after a change, "
                    "expected workspace left out"
                )
            check_same("workspace", "device", arrays.device_of("workspace", workspace), self._place)
            framework = arrays.framework_of(workspace)
        with nullcontext() if kind == "cpu" else streams.use_device(index):
            work = None if kind == "cpu" else streams.WorkStream.of(None, framework, index)
            space = None if workspace is None else arrays.view("workspace", workspace, work)
            if space is not None:
                check_workspace(space, self.workspace_bytes)
            with self._turns.lock:
                if work is not None:
                    self._turns.wait(work)
                self._use(self.schedule.needs.place(space, work))
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
        """Attend every request to the tokens on its path: ``softmax(cap(sm_scale * q k^T)) v`` over these.

        Parameters
        ----------
        q : array, float16 or bfloat16, shape (batch_size, num_qo_heads, head_dim)
            One query a request, on the plan's device, from NumPy, CuPy, torch, JAX or any library with
            ``__dlpack__``. The last axis is contiguous, here and below; on a GPU rows start at multiples of 16 bytes.
        k, v : array, dtype of q or float8, shape (num_tokens, num_kv_heads, head_dim)
            Node i's tokens in rows ``tree.kv_ptrs[i]`` to ``tree.kv_ptrs[i + 1]``, or in the rows that the plan's
            ``kv_indices`` said, of a pool of any size. Float8 is float8_e4m3fn or float8_e5m2 (OCP OFP8), both arrays
            of the same. On compute capability 9.0, head_dim 64 or 128, bfloat16 queries are rounded to float16 then:
            beyond 65504 they count as that.
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
        plain = out is not None and not return_lse and stream is None and k_scale is None and v_scale is None
        if plain and self._run_again(q, k, v, out, scale, cap):
            return out
        kind, index = self._place
        check_same("q", "device", arrays.device_of("q", q), self._place)
        if kind == "cpu" and stream is not None:
            raise ValueError(f"stream is {stream!r}, but q lies on the CPU, expected stream left out")
        with nullcontext() if kind == "cpu" else streams.use_device(index):
            work = None
            if kind == "cuda":
                framework = arrays.framework_of(q)
                if self._growth is not None:
                    self._growth.framework = framework
                work = streams.WorkStream.of(stream, framework, index)
            q_view, k_view, v_view = arrays.view("q", q, work), arrays.view("k", k, work), arrays.view("v", v, work)
            num_tokens = self.num_tokens  # once: a change in another thread may raise it
            self._check(q_view, k_view, v_view, num_tokens)
            k_factor = checked_scale("k_scale", k_scale, k_view, work)
            v_factor = checked_scale("v_scale", v_scale, v_view, work)
            checked_float(scale * largest(k_factor), "sm_scale times k_scale")
            result = arrays.empty(q_view.shape, q_view.dtype, q_view) if out is None else out
            o_view = arrays.view("out", result, work)
            if out is not None:
                self._check_output(o_view, q_view)
            lse = arrays.empty(q_view.shape[:2], "float32", q_view) if return_lse else None
            lse_view = None if lse is None else arrays.view("lse", lse, work)
            operands = Operands(q_view, k_view, v_view, o_view, scale, cap, lse_view, k_factor, v_factor)
            make, memory = self._run_operands(operands, work)
            self._last = None
            if plain and make is not None:
                self._last = Repeat.of(operands, (q, k, v, out), memory, make)
            if out is not None and lse is None:
                return out
            with nullcontext() if work is None else work.launches():
                made = out if out is not None else arrays.hand_back(result, q_view)
                return made if lse is None else (made, arrays.hand_back(lse, q_view))

    @property
    def live(self) -> npt.NDArray[np.int32]:
        """Slots of the requests of a tree that can grow, ascending: int32 (B,), read-only.

        Raises
        ------
        ValueError
            The plan was made without a capacity.
        """
        return self._growing().tree.live

    @property
    def tree(self) -> KVTree:
        """The tree that can grow as it stands; request i is the one in slot ``live[i]``.

        Raises
        ------
        ValueError
            The plan was made without a capacity.
        """
        return self._snapshot()[0]

    @property
    def kv_indices(self) -> npt.NDArray[np.int32]:
        """Rows of K and V of the tokens of `tree`, as `plan_decode` takes them: int32 (unique_tokens,).

        Raises
        ------
        ValueError
            The plan was made without a capacity.
        """
        return self._snapshot()[1]

    def append(self, rows: Any, requests: Any = None, *, stream: Any = None) -> None:
        """Add tokens to the ends of requests' paths.

        Parameters
        ----------
        rows : array of int, shape (n_requests,) or (n_requests, n), in host memory
            Rows of K and V of each request's new tokens, one or n. No run may read them before they are written.
        requests : array of int, shape (n_requests,), optional
            Slots of the requests, each named once; by default all of `live`.
        stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, optional
            CUDA stream on which to edit the plan's arrays; by default the current one of CuPy, or of torch where the
            plan has last run on its tensors.

        Raises
        ------
        TypeError, ValueError
            The plan was made without a capacity or its capacity is exceeded, an argument is wrong, or the stream is
            being captured. Nothing has changed.
        RuntimeError
            The plan was made with ``place=False`` and is not placed yet.
        """
        self._growing().append(rows, requests, stream, self._placed, self._need)

    def fork(self, requests: Any, *, stream: Any = None) -> npt.NDArray[np.int32]:
        """Make requests that share every token so far of their parents; what is appended later is each one's own.

        Parameters
        ----------
        requests : array of int, shape (n,)
            Slots of the parents. One may be named several times. A request with no tokens, which the tree may have from
            the beginning, is a parent for requests that share nothing.
        stream
            See `append`.

        Returns
        -------
        int32 (n,)
            Slots of the new requests, in the order of their parents.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            See `append`.
        """
        return self._growing().fork(requests, stream, self._placed)

    def finish(self, requests: Any, *, stream: Any = None) -> None:
        """End requests: their slots are free for later forks, and what no other request has is not read any more.

        Parameters
        ----------
        requests : array of int, shape (n,)
            Slots of the requests, each named once. One at least must stay live.
        stream
            See `append`.

        Raises
        ------
        TypeError, ValueError, RuntimeError
            See `append`.
        """
        self._growing().finish(requests, stream, self._placed)

    def _snapshot(self) -> tuple[KVTree, npt.NDArray[np.int32]]:
        growth = self._growing()
        with self._turns.lock:  # no other thread changes the tree meanwhile
            return growth.tree.snapshot()

    def _need(self, rows: int) -> None:
        self.num_tokens = max(self.num_tokens, rows)

    def _growing(self) -> Growth:
        if self._growth is None:
            raise ValueError("the plan's tree cannot grow, expected a plan made by plan_decode(..., capacity=...)")
        return self._growth

    def _ready(self, work: streams.WorkStream | None) -> tuple[Schedule, PlanMemory]:
        """What runs the tree as it stands, and its memory; made here where the schedule does not follow changes."""
        memory = self._placed()
        if self._growth is None:
            return self.schedule, memory
        with self._turns.lock:
            schedule = self._growth.schedule()
            if schedule is not self.schedule:
                memory = schedule.needs.place(None, work)  # which may fail: then the next run tries again
                self.schedule = schedule
                self._use(memory)
            return schedule, self._placed()

    def _use(self, memory: PlanMemory) -> None:
        """Have the plan's next runs use this memory; streams that still use what it had before keep that."""
        self._turns.let_go()
        self.memory = self._turns.readers.memory = memory
        self._last = None

    def _placed(self) -> PlanMemory:
        if self.memory is None:
            raise RuntimeError("the plan was made with place=False, expected a call of place first")
        return self.memory

    def _run_again(self, q: Any, k: Any, v: Any, out: Any, scale: float, cap: float) -> bool:
        """Run like the last time if all but the addresses is as it was then; else nothing is done."""
        last = self._last
        if last is None or last.memory is not self.memory or last.rows < self.num_tokens:
            return False
        if last.sm_scale != scale or last.logit_cap != cap or (addresses := last.addresses(q, k, v, out)) is None:
            return False
        if self._growth is not None:
            self._growth.framework = last.framework
        work = streams.WorkStream.of(None, last.framework, self._place[1])
        self._queue(partial(last.launch, addresses), last.rows, last.memory, (), work)
        return True

    def _run_operands(
        self, operands: Operands, work: streams.WorkStream | None
    ) -> tuple[Callable[[], Relaunch] | None, PlanMemory]:
        """Run the schedule on checked arrays; returns how to do it again (see `Schedule.run`), and its memory."""
        schedule, memory = self._ready(work)
        if work is None:
            self._check_rows(operands.k.shape[0], self.num_tokens)  # another thread may have grown the tree meanwhile
            return schedule.run(operands, memory, None), memory
        rows, queue = operands.k.shape[0], partial(schedule.run, operands, memory)
        return self._queue(queue, rows, memory, operands.views(), work), memory

    def _queue(
        self,
        queue: Callable[[streams.WorkStream], Made],
        rows: int,
        memory: PlanMemory,
        borrowed: Sequence[ArrayView],
        work: streams.WorkStream,
    ) -> Made:
        """Queue a run, in turn with the plan's other runs and changes, and hold what it reads as long as needed.

        K's `rows` are enough unless the tree has grown in another thread meanwhile.
        """
        with self._turns.lock:
            self._check_rows(rows, self.num_tokens)
            if memory.shared:
                self._turns.wait(work)
            made = queue(work)
            behind = self._turns.end(work) if memory.shared else None
            self._turns.readers.add(work, memory, behind)
        if borrowed or memory.borrowed:
            work.keep_borrowed((*borrowed, memory.workspace) if memory.borrowed else borrowed)
        return made

    def _check(self, q: ArrayView, k: ArrayView, v: ArrayView, num_tokens: int) -> None:
        """Check the inputs against one another and against the plan, unless the last run's were like them."""
        inputs = (num_tokens, layout_of(q), layout_of(k), layout_of(v))
        if inputs == self._checked_inputs:
            return
        check_inputs({"q": q, "k": k, "v": v}, float8=True)
        check_same("q", "shape", q.shape, (self.batch_size, self.num_qo_heads, self.head_dim))
        self._check_rows(k.shape[0], num_tokens)
        rows = k.shape[0] if self.from_pool else num_tokens
        check_same("k", "shape", k.shape, (rows, self.num_kv_heads, self.head_dim))
        self.schedule.check(q, k, v)
        self._checked_inputs = inputs

    def _check_rows(self, rows: int, num_tokens: int) -> None:
        if self.from_pool and rows < num_tokens:
            raise ValueError(
                f"k has {rows} rows, expected {num_tokens} at least, as the rows of the plan's tokens ask for"
            )

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
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: str,
    tree: KVTree,
    kv_indices: npt.NDArray[np.int32] | None,
    requests: npt.NDArray[np.int32] | None = None,
) -> Schedule:
    """Plan a tree for a device: our own planners where their kernels can run, else the documented heuristic.

    `requests` are the rows of Q and of the output of the tree's requests; by default 0, 1, ...
    """
    group = num_qo_heads // num_kv_heads
    if device != "cpu":
        index = int(device.removeprefix("cuda:"))
        multiprocessors, constants = cuda.multiprocessors(index), constants_of(index)
        if BalancedSchedule.problem(device, group, head_dim) is None:
            equal = balanced.plan(tree, group, num_kv_heads, head_dim, multiprocessors, constants.workers, kv_indices)
            return BalancedSchedule(equal, head_dim, device)
        if SubtreeSchedule.problem(device, group, head_dim) is None:
            made = subtree.plan(tree, group, num_kv_heads, head_dim, constants.items, kv_indices)
            if requests is not None:
                order, merged = requests[made.request_order], requests[made.merge_requests]
                made = made._replace(request_order=order, merge_requests=merged)
            return SubtreeSchedule(made, num_qo_heads, head_dim, device)
    chosen = preset("H100")
    params = FastTreeParams.for_gpu("H100", group)
    heuristic = greedy.plan(
        tree, chosen.kv_split_sizes, chosen.para_threshs1, chosen.para_threshs2, num_kv_heads,
        params.alpha, params.beta, params.gamma, params.TSQs, params.TSKs, group,
    )  # fmt: skip
    if kv_indices is not None:
        heuristic = heuristic._replace(vnode_to_kv_entries=kv_indices[heuristic.vnode_to_kv_entries])
    if requests is not None:
        heuristic = heuristic._replace(vnode_to_q_entries=requests[heuristic.vnode_to_q_entries])
    return HeuristicSchedule(heuristic, tree.unique_tokens, num_qo_heads, head_dim, device, requests)
