"""What `DecodePlan` does when its tree grows: changes are checked, made in the tree, and followed by the schedule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.capacity import Capacity
from fasttree_cupy.compiled import njit
from fasttree_cupy.execution import cuda, streams
from fasttree_cupy.execution.growing import GrowingSchedule
from fasttree_cupy.execution.plan_memory import PlanMemory
from fasttree_cupy.execution.schedule import BalancedSchedule, Schedule
from fasttree_cupy.execution.turns import Turns
from fasttree_cupy.integers import INT32_MAX, host_array, int_vector
from fasttree_cupy.planning.append_call import REFUSED, TO_PLAN, AppendCall
from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.growing_tree import GrowingTree
from fasttree_cupy.tree import KVTree
from fasttree_cupy.tuning.chosen import constants_of

__all__ = ["Growth", "grow"]

Int32Array = npt.NDArray[np.int32]
MakeSchedule = Callable[[KVTree, Int32Array, Int32Array], Schedule]
Placed = Callable[[], PlanMemory]

MOST_ROWS = INT32_MAX
"""Rows of a pool that int32 row numbers tell apart."""


def grow(
    tree: KVTree,
    kv_indices: Int32Array | None,
    capacity: Capacity,
    layout: tuple[int, int, int],
    device: str,
    make: MakeSchedule,
    turns: Turns,
) -> Growth:
    """A tree that can grow and what runs it.

    Parameters
    ----------
    tree, kv_indices, capacity, device
        See `fasttree_cupy.plan_decode`; checked.
    layout : (int, int, int)
        Query heads, KV heads, head_dim.
    make : callable
        Makes a schedule of a tree, the rows of its tokens and the slots of its requests, where schedules do not follow
        changes.
    turns : Turns
        Of the plan's runs.
    """
    rows = np.arange(tree.unique_tokens, dtype=np.int32) if kv_indices is None else kv_indices
    growing = GrowingTree(tree, rows, capacity)
    heads, kv_heads, head_dim = layout
    if device == "cpu" or BalancedSchedule.problem(device, heads // kv_heads, head_dim) is not None:
        return Growth(growing, device, make, turns)
    index = int(device.removeprefix("cuda:"))
    machine = constants_of(index).workers
    plan = GrowingPlan(growing, heads // kv_heads, kv_heads, head_dim, cuda.multiprocessors(index), machine)
    with streams.use_device(index):  # where its events and its page-locked memory belong
        following = GrowingSchedule(plan, head_dim, device)
    return Growth(growing, device, make, turns, following)


class Growth:
    """A tree that grows on a device.

    Attributes
    ----------
    tree : GrowingTree
    framework : str
        Whose current stream changes are queued on where the caller names none.

    Notes
    -----
    Changes are given what returns the plan's memory, and call it in their turn: another thread may place the plan anew
    until then.
    """

    def __init__(
        self,
        tree: GrowingTree,
        device: str,
        make: MakeSchedule,
        turns: Turns,
        following: GrowingSchedule | None = None,
    ) -> None:
        self.tree = tree
        self.framework = "cupy"
        self._device = None if device == "cpu" else int(device.removeprefix("cuda:"))
        self._make = make
        self._turns = turns
        self._following = following
        self._made: Schedule | None = following
        self._append_call: AppendCall | None = None
        self._is_behind = False  # whether the arrays on the GPU may lack a change of the tree: following it failed

    @property
    def follows(self) -> bool:
        """Whether the schedule follows changes; else each change makes another one necessary."""
        return self._following is not None

    def schedule(self) -> Schedule:
        """What runs the tree as it stands; made here where it does not follow changes."""
        if self._made is None:
            self._made = self._make(*self.tree.snapshot(), self.tree.live)
        return self._made

    def append(self, rows: Any, requests: Any, stream: Any, placed: Placed, need: Callable[[int], None]) -> None:
        """See `DecodePlan.append`; says how many rows are needed from then on, before any run may read them."""
        if requests is None and stream is None and self._append_again(rows, placed, need):
            return
        slots = self.tree.live if requests is None else self._slots(requests, once=True)
        added, most = checked_new_rows(rows, len(slots))
        tokens = self.tree.tokens + added.size
        if tokens > self.tree.capacity.tokens:
            raise ValueError(
                f"rows adds {added.size} tokens to {self.tree.tokens}, "
                f"expected at most {self.tree.capacity.tokens} in all, as capacity.tokens says"
            )

        def change() -> bool:
            need(most + 1)
            self.tree.append(slots, added)
            return self._following is not None and self._following.plan.append(slots, added)

        self._change(change, stream, placed)
        if self._append_call is None and self._following is not None and self._device is not None:
            plan, edits = self._following.plan, self._following.edits.next
            self._append_call = AppendCall(self.tree, plan, edits, MOST_ROWS)

    def _append_again(self, rows: Any, placed: Placed, need: Callable[[int], None]) -> bool:
        """Append a token to each live request as before, in one call; False where that cannot be: nothing has changed.

        It can where a run or a change on the default stream came last and this is the same stream, by a thread with the
        same CUDA context.
        """
        call, following = self._append_call, self._following
        if call is None or following is None or self._device is None or self._is_behind:
            return False
        if type(rows) is not np.ndarray or rows.shape != call.rows.shape or rows.dtype.char not in "ilq":
            return False
        handle = streams.current_stream(self.framework, self._device)
        with self._turns.lock:
            memory = placed()
            if handle != memory.home or not self._turns.has_none(handle):
                return False
            if not following.edits.can_edit_again(memory.pointers[0]):
                return False
            call.rows[:] = rows
            edits, highest = call()
            if edits == REFUSED:
                return False
            need(highest + 1)
            self._is_behind = True
            if edits != TO_PLAN:
                following.edits.edit_again(edits, following.plan.state.edits, handle)
            else:
                following.plan.plan_anew()
                following.follow(False, memory, streams.WorkStream.of(None, self.framework, self._device))
            self._is_behind = False
        return True

    def fork(self, requests: Any, stream: Any, placed: Placed) -> Int32Array:
        """See `DecodePlan.fork`."""
        parents = self._slots(requests, once=False)
        free = self.tree.capacity.requests - len(self.tree.live)
        if len(parents) > free:
            raise ValueError(
                f"requests names {len(parents)} parents, expected at most {free}, as many as slots are free "
                f"of capacity.requests, {self.tree.capacity.requests}"
            )
        made = np.empty(len(parents), np.int32)

        def change() -> bool:
            self._append_call = None
            made[:] = self.tree.fork(parents)
            return self._following is not None and self._following.plan.fork(parents, made)

        self._change(change, stream, placed)
        return made

    def finish(self, requests: Any, stream: Any, placed: Placed) -> None:
        """See `DecodePlan.finish`."""
        slots = self._slots(requests, once=True)
        if len(slots) == len(self.tree.live):
            raise ValueError(f"requests names all {len(slots)} live requests, expected one at least to stay")

        def change() -> bool:
            self._append_call = None
            self.tree.finish(slots)
            return self._following is not None and self._following.plan.finish(slots)

        self._change(change, stream, placed)

    def _change(self, change: Callable[[], bool], stream: Any, placed: Placed) -> None:
        """Change the tree, and let what lies in the plan's memory follow on a stream, in turn with runs."""
        if self._device is None:
            if stream is not None:
                raise ValueError(f"stream is {stream!r}, but the plan's device is the CPU, expected stream left out")
            self._change_tree(change, placed)
            return
        with streams.use_device(self._device):
            work = streams.WorkStream.of(stream, self.framework, self._device)
            if work.is_capturing:
                raise ValueError("stream is being captured, expected changes of the tree between a graph's replays")
            if self._following is None:
                self._change_tree(change, placed)
            else:
                self._follow(self._following, change, work, placed)

    def _change_tree(self, change: Callable[[], bool], placed: Placed) -> None:
        """Change the tree; the next run makes what runs it."""
        with self._turns.lock:
            placed()  # raises where it is not yet
            change()
            self._made = None

    def _follow(
        self, following: GrowingSchedule, change: Callable[[], bool], work: streams.WorkStream, placed: Placed
    ) -> None:
        """Change the tree, and queue what follows from that."""
        with self._turns.lock:
            memory = placed()
            self._turns.wait(work)
            was_behind = self._is_behind
            if was_behind:
                following.plan.plan_anew()
            self._is_behind = True
            fits = change()
            following.follow(fits and not was_behind, memory, work)
            self._is_behind = False
            self._turns.readers.add(work, memory, self._turns.end(work))
        if memory.borrowed:
            work.keep_borrowed((memory.workspace,))

    def _slots(self, requests: Any, once: bool) -> Int32Array:
        """`requests` as int32, live slots; each named once if so asked."""
        slots = int_vector(requests, "requests")
        wrong = (slots < 0) | (slots >= self.tree.capacity.requests)
        if not wrong.any():
            wrong = ~np.isin(slots, self.tree.live)
        if wrong.any():
            i = int(np.argmax(wrong))
            raise ValueError(f"requests[{i}] is {slots[i]}, expected the slot of a live request")
        if once and len(np.unique(slots)) < len(slots):
            raise ValueError("requests names a slot twice, expected each once")
        return slots.astype(np.int32)


def checked_new_rows(rows: Any, num_requests: int) -> tuple[Int32Array, int]:
    """`rows` as int32 of two dimensions, a row for each request; and the highest, -1 where there is none."""
    array = host_array(rows, "rows")
    if array.ndim not in (1, 2) or len(array) != num_requests:
        raise ValueError(
            f"rows has shape {array.shape}, expected ({num_requests},) or ({num_requests}, n): one row for each request"
        )
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"rows is {array.dtype}, expected integers")
    whole = np.ascontiguousarray(array, np.int32 if array.dtype == np.int32 else np.int64)
    most = highest_row(whole.reshape(-1))
    if most >= MOST_ROWS:
        raise ValueError(f"rows goes from {array.min()} to {array.max()}, expected rows from 0 to {MOST_ROWS - 1}")
    return whole.astype(np.int32, copy=False).reshape(num_requests, *array.shape[1:] or (1,)), most


@njit
def highest_row(rows: npt.NDArray[Any]) -> int:
    """The highest of `rows`, -1 where there is none, `MOST_ROWS` where one is negative, as uint64 may have become."""
    most = -1
    for row in rows:
        most = max(most, row if row >= 0 else MOST_ROWS)
    return most
