"""The last run of a plan, for the next one on arrays laid out alike: what was checked and derived is not done again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fasttree_cupy.execution import cuda
from fasttree_cupy.execution.arrays import address_of_alike
from fasttree_cupy.execution.launch import Relaunch
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.plan_memory import PlanMemory

__all__ = ["Repeat"]

AddressOf = Callable[[Any], int | None]


class Repeat(NamedTuple):
    """A launch on arrays of one framework, all at multiples of 16 bytes, and all that it depended on.

    Made by `of`.
    """

    memory: PlanMemory
    rows: int
    """Of K and V."""
    framework: str
    """Of the arrays, on whose current stream it was queued."""
    sm_scale: float
    logit_cap: float
    looks: tuple[AddressOf, AddressOf, AddressOf, AddressOf]
    """See `address_of_alike`: for Q, K, V and O."""
    launch: Relaunch

    @classmethod
    def of(
        cls,
        operands: Operands,
        given: Sequence[Any],
        memory: PlanMemory,
        make: Callable[[], Relaunch],
    ) -> Repeat | None:
        """Remember a run.

        Parameters
        ----------
        operands : Operands
            What ran: without LSE and scales, on the current stream.
        given : sequence of 4 array
            The arrays of which Q, K, V and O are views.
        memory : PlanMemory
            The plan's.
        make : callable
            From the schedule, see `Schedule.run`.

        Returns
        -------
        Repeat or None
            None for what cannot be repeated.
        """
        views = operands[:4]
        framework = operands.q.framework
        looks = [address_of_alike(array) for array in given]
        one_framework = all(view.framework == framework for view in views)
        if None in looks or not one_framework or any(v.pointer % cuda.VECTOR_BYTES for v in views):
            return None
        return cls(
            memory, operands.k.shape[0], framework, operands.sm_scale, operands.logit_cap,
            tuple(looks), make(),  # type: ignore[arg-type]  # there are four, and none is None
        )  # fmt: skip

    def addresses(self, q: Any, k: Any, v: Any, out: Any) -> tuple[int, int, int, int] | None:
        """Where arrays lie on which the calling thread can launch this again; None for others."""
        look_q, look_k, look_v, look_out = self.looks
        if (
            (at_q := look_q(q)) is None
            or (at_k := look_k(k)) is None
            or (at_v := look_v(v)) is None
            or (at_out := look_out(out)) is None
            or (at_q | at_k | at_v | at_out) % cuda.VECTOR_BYTES
            or not self.launch.is_possible()
        ):
            return None
        return at_q, at_k, at_v, at_out
