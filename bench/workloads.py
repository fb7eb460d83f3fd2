"""The trees and head layouts that the benchmarks run: FastTree's and PAT's published lists."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["SUITES", "Case", "suite"]

FASTTREE_TREES = (
    ("1,2,64", "8,256,32"),
    ("1,4,256", "8,256,32"),
    ("1,4,8,256", "8,256,256,32"),
    ("1,256", "256,32"),
    ("1,1024", "2048,32"),
    ("1,16,64", "1024,256,32"),
    ("1,4,16,512", "1024,256,128,32"),
    ("1,4,16,64,256,1024", "256,8,256,64,32,256"),
    ("1,10", "4000,400"),
    ("1,2,4,8,16,32,64,128,1024", "16,16,16,16,16,16,16,16,16"),
    ("1,2,4,8,16,32,64,128,1024", "256,128,64,16,16,16,16,16,16"),
    ("1,8,16,32,64,128,1024", "256,128,64,16,16,16,16"),
    ("1,8,16,32,64,256,1024", "256,128,64,16,16,16,16"),
    ("1,16,32,64,128,1024", "256,128,64,16,16,16"),
    ("1,16,32,64,256,1024", "256,128,64,16,16,16"),
)
"""Nodes a level and tokens a node of that level (FastTree, MLSys'25, its kernel benchmark)."""

SUITES = {"fasttree15": (FASTTREE_TREES, ((16, 1), (32, 8), (32, 32)))}
"""Name -> (trees, (query heads, KV heads))."""


@dataclass(frozen=True)
class Case:
    """One tree under one head layout."""

    nodes_per_level: str
    tokens_per_level: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str

    @property
    def name(self) -> str:
        """Short unique label."""
        return f"{self.nodes_per_level} x {self.tokens_per_level} ({self.num_qo_heads}/{self.num_kv_heads})"


def suite(name: str, head_dim: int = 128, dtype: str = "float16") -> list[Case]:
    """Return the cases of a named suite.

    Raises
    ------
    ValueError
        If there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {sorted(SUITES)}, got {name!r}")
    trees, heads = SUITES[name]
    return [Case(n, t, q, kv, head_dim, dtype) for q, kv in heads for n, t in trees]
