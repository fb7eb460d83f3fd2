"""FlashInfer's cascade: attention level by level, one launch and one merge a level."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bench.contestants import Contestant, Run, UnsuitedError
from bench.peers._torch import int32_tensor, paged_cache, tensor
from bench.peers.flashinfer_decode import WORKSPACE_BYTES, flashinfer_problem
from bench.timing import time_plan
from bench.workloads import Workload

__all__ = ["FlashInferCascade", "level_runs"]


class FlashInferCascade(Contestant):
    """Page size 1, one cascade level a level of the tree."""

    name = "flashinfer_cascade"

    def problem(self) -> str | None:
        """Why FlashInfer cannot run."""
        return flashinfer_problem()

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run, for trees whose requests all end on the same level."""
        import flashinfer
        import torch

        case, seqlen = workload.case, workload.tree.seqlen
        levels = level_runs(workload.paths)
        q, cache = tensor(workload.q), paged_cache(workload)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), workspace, "NHD")
        qo_indptr = [int32_tensor(starts, q) for starts, _ in levels]
        kv_indptr = [int32_tensor(np.concatenate([[0], np.cumsum(seqlen[nodes])]), q) for _, nodes in levels]
        kv_indices = [int32_tensor(workload.rows(nodes), q) for _, nodes in levels]
        last_page = [int32_tensor(np.ones(len(nodes)), q) for _, nodes in levels]

        def plan() -> None:
            wrapper.plan(
                qo_indptr,
                kv_indptr,
                kv_indices,
                last_page,
                case.num_qo_heads,
                case.num_kv_heads,
                case.head_dim,
                page_size=1,
                sm_scale=workload.sm_scale,
                q_data_type=q.dtype,
            )

        def call() -> Any:
            return wrapper.run(q, cache)

        _, plan_ms = time_plan(plan, workload.device.synchronize)
        return {f"{len(levels)} levels": Run(call, plan_ms)}


Ints = npt.NDArray[np.int64]


def level_runs(paths: list[Ints]) -> list[tuple[Ints, Ints]]:
    """A level: where each node's requests start (and the number of requests), and the nodes, in request order.

    Raises
    ------
    UnsuitedError
        If paths differ in length, have one level only, or a node's requests do not follow one another.
    """
    if len({len(path) for path in paths}) != 1 or len(paths[0]) < 2:
        raise UnsuitedError("it needs paths of the same number of levels, two or more")
    levels = []
    for column in np.stack(paths, axis=1):
        starts = np.flatnonzero(np.concatenate([[True], column[1:] != column[:-1]]))
        nodes = column[starts]
        if len(np.unique(nodes)) != len(nodes):
            raise UnsuitedError("it needs the requests of each node to follow one another")
        levels.append((np.append(starts, len(paths)), nodes))
    return levels
