"""One KV cache a request: what the peers without a tree work on."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bench.contestants import UnsuitedError
from bench.workloads import Workload

__all__ = ["cache_rows", "check_cache_size"]


def cache_rows(workload: Workload) -> list[tuple[npt.NDArray[Any], npt.NDArray[Any]]]:
    """Requests of one length, int64 (n,), and the rows of K and V each attends to, int64 (n, length)."""
    return [
        (requests, np.stack([workload.rows(workload.paths[r]) for r in requests]))
        for length, requests in workload.requests_by_length().items()
        if length
    ]


def check_cache_size(workload: Workload) -> None:
    """Raise `UnsuitedError` where one cache a request would take more than a quarter of the free memory."""
    case = workload.case
    size = 4 * int(workload.tree.path_tokens.sum()) * case.num_kv_heads * case.head_dim  # K and V, two bytes each
    if 4 * size > workload.device.free_bytes():
        raise UnsuitedError(f"one cache a request takes {size / 1e9:.0f} GB, too much for this GPU")
