"""Who is timed: what the benchmark asks of a contestant, and our own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.timing import time_plan
from bench.workloads import Workload
from fasttree_cupy import FastTreeParams, MetadataTuple, fasttree_decode, fasttree_preparation, plan_decode, preset

__all__ = ["KV_TILES", "OWN", "Contestant", "Documented", "Planned", "Run", "UnsuitedError", "documented_plan"]

KV_TILES = ((32, 128), (32, 32))
"""The published benchmark's settings of ``TSKs``; the first is the preset's."""
GPU_PRESET = "H100"


class UnsuitedError(Exception):
    """A contestant cannot run this case; the message says why."""


@dataclass(frozen=True)
class Run:
    """One decode, ready to be timed.

    Attributes
    ----------
    call : callable
        Queues the decode on the current stream; returns the output, of any framework.
    plan_ms : float or None
        Time to plan the tree, which serves any number of decodes; None where the contestant plans nothing, or where
        what it plans with is not its own.
    graph : bool
        Whether a CUDA graph can capture the call.
    """

    call: Callable[[], Any]
    plan_ms: float | None = None
    graph: bool = False


class Contestant(ABC):
    """A way to decode."""

    name: str
    own = False

    def problem(self) -> str | None:
        """Why it cannot run at all; None where it can."""
        return None

    @abstractmethod
    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run a variant, by the variant's label; the best counts. The first is the default.

        Raises
        ------
        UnsuitedError
            If it cannot run this case.
        """


class Documented(Contestant):
    """The documented functions: ``fasttree_preparation``, then ``fasttree_decode`` on CuPy arrays."""

    name = "fasttree_cupy"
    own = True

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run for each of ``KV_TILES``."""
        return {tiles_label(tiles): self._run(workload, tiles) for tiles in KV_TILES}

    def _run(self, workload: Workload, tiles: Sequence[int]) -> Run:
        (metadata, params), plan_ms = time_plan(lambda: documented_plan(workload, tiles), workload.device.synchronize)
        output = workload.new_output()
        arguments = (workload.q, workload.k, workload.v, output, *metadata, params.TSQs, params.TSKs)

        def call() -> Any:
            fasttree_decode(*arguments, workload.sm_scale)
            return output

        return Run(call, plan_ms, graph=True)


class Planned(Contestant):
    """Plan once, run often: ``plan_decode``, then ``DecodePlan.run`` on CuPy arrays."""

    name = "fasttree_cupy_plan"
    own = True

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run: the plan chooses its tiles itself."""
        case = workload.case
        plan, plan_ms = time_plan(
            lambda: plan_decode(workload.tree, case.num_qo_heads, case.num_kv_heads, case.head_dim),
            workload.device.synchronize,
        )
        output = workload.new_output()

        def call() -> Any:
            return plan.run(
                workload.q,
                workload.k,
                workload.v,
                output,
                sm_scale=workload.sm_scale,
                k_scale=workload.k_scale,
                v_scale=workload.v_scale,
            )

        return {"auto": Run(call, plan_ms, graph=True)}


def documented_plan(workload: Workload, kv_tiles: Sequence[int]) -> tuple[MetadataTuple, FastTreeParams]:
    """Metadata on the device, and the parameters with the tile sizes adopted."""
    case, tree, sizes = workload.case, workload.tree, preset(GPU_PRESET)
    params = FastTreeParams.for_gpu(GPU_PRESET, case.num_qo_heads // case.num_kv_heads)
    params.set_kv_tile_sizes(kv_tiles)
    metadata, _ = fasttree_preparation(
        tree,
        tree.kv_ptrs,
        tree.batch_size,
        case.num_qo_heads,
        case.num_kv_heads,
        case.head_dim,
        sizes.kv_split_sizes,
        sizes.para_threshs1,
        sizes.para_threshs2,
        params,
        verbose=False,
    )
    return metadata, params


def tiles_label(kv_tiles: Sequence[int]) -> str:
    """Label of a setting of ``TSKs``."""
    return "TSKs " + ",".join(map(str, kv_tiles))


OWN: tuple[type[Contestant], ...] = (Planned, Documented)
"""Our contestants; another planner or call path of ours gets a class of its own here."""
