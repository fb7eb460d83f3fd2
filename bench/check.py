"""Is an output right? Dense attention in float64, on the device, of a sample of the requests.

Written with products and sums alone: CuPy's matrix product needs cuBLAS, which our installation does not bring.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from bench import float8
from bench.workloads import Workload

__all__ = ["BOUNDS", "PEER_FACTOR", "Reference", "sample_requests"]

BOUNDS = {"float16": 5e-4, "bfloat16": 4e-3}
"""Relative Frobenius error below which our outputs count as right."""
PEER_FACTOR = 2
"""Peers may round more often than we do: their bounds are this many times as wide."""


def sample_requests(batch_size: int, count: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """Requests to check, ascending: all, or `count` of them, the first and the last included."""
    if count <= 0 or count >= batch_size:
        return np.arange(batch_size)
    inner = np.random.default_rng(seed).permutation(np.arange(1, batch_size - 1))
    return np.sort(np.concatenate([[0, batch_size - 1], inner[: max(0, count - 2)]]))


class Reference:
    """Dense attention of some requests of a workload.

    Parameters
    ----------
    workload : Workload
    requests : int array
        The requests to compare; ``sample_requests`` makes such a sample.
    """

    def __init__(self, workload: Workload, requests: npt.NDArray[np.int64]) -> None:
        self.workload = workload
        self.requests = requests
        xp = workload.device.xp
        self.expected = xp.stack([self._attend(int(request)) for request in requests])

    def _attend(self, request: int) -> Any:
        work, xp = self.workload, self.workload.device.xp
        rows = xp.asarray(work.rows(work.paths[request]))
        keys, values = (  # (tokens, kv heads, head_dim)
            _widened(_taken(array, rows), xp) * (1 if scale is None else scale[:, None].astype(xp.float64))
            for array, scale in ((work.k, work.k_scale), (work.v, work.v_scale))
        )
        num_kv_heads, head_dim = keys.shape[1:]
        query = _widened(work.q[request], xp).reshape(num_kv_heads, -1, head_dim) * work.sm_scale
        heads = []
        for i in range(query.shape[1]):  # one head of each group at a time: bounds the temporary arrays
            scores = (keys * query[:, i]).sum(axis=2)
            weights = xp.exp(scores - scores.max(axis=0))
            weights /= weights.sum(axis=0)
            heads.append((values * weights[:, :, None]).sum(axis=0))
        return xp.stack(heads, axis=1).reshape(-1, head_dim)

    def error(self, output: Any) -> float:
        """Relative Frobenius error of an output (any framework's array); NaN where any element is not finite."""
        xp = self.workload.device.xp
        actual = xp.from_dlpack(output)
        if actual.shape != self.workload.q.shape or not bool(xp.isfinite(_widened(actual, xp)).all()):
            return float("nan")
        difference = _widened(actual[xp.asarray(self.requests)], xp) - self.expected
        return float(xp.sqrt((difference**2).sum() / (self.expected**2).sum()))

    def quantisation_error(self) -> float | None:
        """Relative Frobenius error that float8 K and V bring; None where they are not float8."""
        original = self.workload.original
        if original is None:
            return None
        exact = Reference(original, self.requests).expected
        return float(self.workload.device.xp.sqrt(((self.expected - exact) ** 2).sum() / (exact**2).sum()))

    def problem(self, output: Any, own: bool) -> tuple[float, str | None]:
        """The error, and what is wrong with the output; None where it is right."""
        bound = BOUNDS[self.workload.case.dtype] * (1 if own else PEER_FACTOR)
        error = self.error(output)
        # NaN is not below any bound.
        return error, None if error <= bound else f"relative error {error:.2e}, expected at most {bound:.0e}"


def _taken(array: Any, rows: Any) -> Any:
    """Rows of an array; of a float8 one by its bytes, because CuPy does not index float8."""
    return array[rows] if array.dtype.itemsize > 1 else array.view(np.uint8)[rows].view(array.dtype)


def _widened(array: Any, xp: Any) -> Any:
    """An array of 16 or 8 bits an element as float64."""
    if array.dtype.itemsize == 1:
        return float8.widened(array, xp)
    if str(array.dtype) == "bfloat16":  # by its bits: not every CuPy casts it
        array = (array.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32)
    return array.astype(xp.float64)
