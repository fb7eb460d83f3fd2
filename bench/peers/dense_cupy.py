"""Dense attention in CuPy: two matrix products and a softmax over one KV cache a request."""

from __future__ import annotations

from typing import Any

from bench.contestants import Contestant, Run, UnsuitedError
from bench.peers._caches import cache_rows, check_cache_size
from bench.workloads import Workload

__all__ = ["DenseCupy"]


class DenseCupy(Contestant):
    """float16 products through cuBLAS, softmax in float32, one batch for all requests of the same length."""

    name = "dense_cupy"

    def problem(self) -> str | None:
        """Why CuPy's matrix product cannot run."""
        import cupy

        try:
            cupy.matmul(cupy.ones((1, 2, 2), cupy.float16), cupy.ones((1, 2, 2), cupy.float16))
        except Exception as error:  # CuPy raises whatever its loader met
            return f"CuPy's matrix product cannot run ({error})"
        return None

    def prepare(self, workload: Workload) -> dict[str, Run]:
        """One run."""
        if workload.case.dtype != "float16":
            raise UnsuitedError(f"CuPy has no matrix product of {workload.case.dtype}")
        check_cache_size(workload)
        xp, case = workload.device.xp, workload.case
        batches = []
        for requests, rows in cache_rows(workload):
            where, chosen = xp.asarray(rows), xp.asarray(requests)
            query = workload.q[chosen].reshape(len(requests), case.num_kv_heads, -1, case.head_dim)
            keys = xp.ascontiguousarray(workload.k[where].transpose(0, 2, 3, 1))
            values = xp.ascontiguousarray(workload.v[where].transpose(0, 2, 1, 3))
            batches.append((chosen, query, keys, values))
        output = workload.new_output()

        def call() -> Any:
            for chosen, query, keys, values in batches:
                scores = xp.matmul(query, keys).astype(xp.float32) * xp.float32(workload.sm_scale)
                weights = xp.exp(scores - scores.max(axis=3, keepdims=True))
                weights /= weights.sum(axis=3, keepdims=True)
                product = xp.matmul(weights.astype(xp.float16), values)
                output[chosen] = product.reshape(len(chosen), case.num_qo_heads, case.head_dim)
            return output

        return {f"{len(batches)} batches": Run(call)}
