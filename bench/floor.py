"""The floor: the least time that a GPU of known bandwidth and matrix rate needs for a case."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.workloads import Case
    from fasttree_cupy.tree import KVTree

__all__ = ["H200", "LAUNCH_US", "Rates"]

LAUNCH_US = 4.0
"""An empty launch between two events."""
ELEMENT_BYTES = 2
FLOAT8_BYTES = 1


@dataclass(frozen=True)
class Rates:
    """What a GPU can do.

    Attributes
    ----------
    bandwidth : float
        Bytes a second read from memory.
    matrix_rate : float
        float16 operations a second on tensor cores.
    """

    bandwidth: float
    matrix_rate: float

    def bytes_us(self, case: Case, tree: KVTree) -> float:
        """Microseconds to move every byte of K, V, Q and O once."""
        kv = 2 * tree.unique_tokens * case.num_kv_heads * (FLOAT8_BYTES if case.kv_dtype else ELEMENT_BYTES)
        qo = 2 * tree.batch_size * case.num_qo_heads * ELEMENT_BYTES
        return 1e6 * (kv + qo) * case.head_dim / self.bandwidth

    def matrix_us(self, case: Case, tree: KVTree) -> float:
        """Microseconds for the two products with all tokens on all paths."""
        return 1e6 * 4 * int(tree.path_tokens.sum()) * case.num_qo_heads * case.head_dim / self.matrix_rate

    def floor_us(self, case: Case, tree: KVTree) -> float:
        """The longer of the two, and a launch."""
        return max(self.bytes_us(case, tree), self.matrix_us(case, tree)) + LAUNCH_US


H200 = Rates(4.5e12, 665e12)
"""The rates seen on the H200 of the published figures."""
