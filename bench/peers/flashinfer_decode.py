"""FlashInfer's batch decode over pages that requests share: every request lists all pages on its path."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.contestants import Contestant, Run
from bench.peers._torch import int32_tensor, paged_cache, tensor, torch_problem
from bench.timing import time_plan
from bench.workloads import Workload

__all__ = ["WORKSPACE_BYTES", "FlashInferDecode", "flashinfer_problem"]

WORKSPACE_BYTES = 512 * 2**20


def flashinfer_problem() -> str | None:
    """Why FlashInfer cannot run; None where it can."""
    problem = torch_problem()
    if problem is not None:
        return problem
    try:
        import flashinfer  # noqa: F401
    except ImportError as error:
        return f"flashinfer cannot be imported ({error})"
    return None


class FlashInferDecode(Contestant):
    """Page size 1; tensor cores where heads share KV heads, as its documentation advises."""

    name = "flashinfer_decode"

    def problem(self) -> str | None:
        """Why FlashInfer cannot run."""
        return flashinfer_problem()

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run."""
        import flashinfer
        import torch

        case, tree = workload.case, workload.tree
        q, cache = tensor(workload.q), paged_cache(workload)
        output = torch.empty_like(q).fill_(torch.nan)
        workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "NHD", use_tensor_cores=case.num_qo_heads > case.num_kv_heads
        )
        indptr = int32_tensor(np.concatenate([[0], np.cumsum(tree.path_tokens)]), q)
        indices = int32_tensor(np.concatenate([workload.rows(path) for path in workload.paths]), q)
        last_page = int32_tensor(np.ones(tree.batch_size), q)

        def plan() -> None:
            wrapper.plan(
                indptr,
                indices,
                last_page,
                case.num_qo_heads,
                case.num_kv_heads,
                case.head_dim,
                page_size=1,
                q_data_type=q.dtype,
                sm_scale=workload.sm_scale,
            )

        def call() -> Any:
            wrapper.run(q, cache, out=output)
            return output

        _, plan_ms = time_plan(plan, workload.device.synchronize)
        return {"page size 1": Run(call, plan_ms)}
