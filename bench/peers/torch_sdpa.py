"""torch's own attention over one KV cache a request, as a server without a tree holds them.

The caches are gathered before the clock starts: what shared tokens cost here is reading them once a request.
"""

from __future__ import annotations

from typing import Any

from bench.contestants import Contestant, Run
from bench.peers._caches import cache_rows, check_cache_size
from bench.peers._torch import tensor, torch_problem
from bench.workloads import Workload

__all__ = ["TorchSdpa"]


class TorchSdpa(Contestant):
    """``scaled_dot_product_attention``, one call for all requests of the same length."""

    name = "torch_sdpa"

    def problem(self) -> str | None:
        """Why torch cannot run."""
        return torch_problem()

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run."""
        import torch

        check_cache_size(workload)
        q, k, v = (tensor(array) for array in (workload.q, workload.k, workload.v))
        batches = []
        for requests, rows in cache_rows(workload):
            where = torch.as_tensor(rows, device=q.device)
            chosen = torch.as_tensor(requests, device=q.device)
            query = q[chosen].unsqueeze(2)  # (requests, heads, 1, head_dim)
            batches.append((chosen, query, k[where].transpose(1, 2), v[where].transpose(1, 2)))
        shared_heads = workload.case.num_qo_heads > workload.case.num_kv_heads
        output = torch.empty_like(q).fill_(torch.nan)

        def attend(query: Any, keys: Any, values: Any) -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                query, keys, values, scale=workload.sm_scale, enable_gqa=shared_heads
            ).squeeze(2)

        def call() -> Any:
            if len(batches) == 1:
                return attend(*batches[0][1:])
            for chosen, *operands in batches:
                output[chosen] = attend(*operands)
            return output

        return {f"{len(batches)} calls": Run(call)}
