"""What the benchmarks run: the published lists of trees and head layouts, and random Q, K and V for one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from bench.float8 import quantise
from fasttree_cupy.tree import KVTree

if TYPE_CHECKING:
    from bench.device import Device

__all__ = ["SUITES", "Case", "Workload", "levels_tree", "make_workload", "suite"]

Heads = tuple[int, int]

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
"""Nodes a level and tokens of each node of that level: the kernel benchmark of FastTree (MLSys'25)."""

PAT_TREES = (
    ("1,10", "4096,416"),
    ("1,256", "256,32"),
    ("1,1024", "2048,32"),
    ("1,2,64", "1024,256,256"),
    ("1,4,256", "32,256,32"),
    ("1,8,512", "32,512,256"),
    ("1,8,512", "32,2048,256"),
    ("1,8,512", "512,512,256"),
    ("1,4,8,256", "32,256,256,32"),
    ("1,4,16,512", "1024,256,128,32"),
    ("1,4,16,64,256,1024", "256,32,256,64,32,256"),
    ("1,16,32,64,128,1024", "256,128,64,32,32,32"),
    ("1,16,32,64,256,1024", "256,128,64,32,32,32"),
    ("1,8,16,32,64,128,1024", "256,128,64,32,32,32,32"),
    ("1,8,16,32,64,256,1024", "256,128,64,32,32,32,32"),
    ("2,8,16,256", "256,256,32,32"),
    ("4,16,256,512", "512,32,128,32"),
    ("8,16,32,256", "512,512,256,32"),
    ("256", "1024"),
    ("256", "4096"),
)
"""The same of PAT (ASPLOS'26); its last five are forests."""

SUITES: dict[str, tuple[tuple[tuple[str, str], ...], tuple[Heads, ...]]] = {
    "fasttree15": (FASTTREE_TREES, ((16, 1), (32, 8), (32, 32))),
    "pat20": (PAT_TREES, ((32, 32), (16, 8), (32, 8), (64, 8))),
}
"""Name -> trees and (query heads, KV heads)."""


@dataclass(frozen=True)
class Case:
    """One tree under one head layout; ``tree_file`` stands in for the levels where it is not empty."""

    suite: str
    nodes_per_level: str
    tokens_per_level: str
    num_qo_heads: int
    num_kv_heads: int
    head_dim: int = 128
    dtype: str = "float16"
    tree_file: str = ""
    kv_dtype: str = ""
    """Of K and V where it is another one than `dtype`: a float8 type."""

    @property
    def tree_name(self) -> str:
        """Short name of the tree."""
        if self.tree_file:
            return Path(self.tree_file).name
        return f"{self.nodes_per_level} x {self.tokens_per_level}"

    @property
    def name(self) -> str:
        """Name of the case, unique in its suite for one dtype and head_dim."""
        return f"{self.tree_name} ({self.num_qo_heads}/{self.num_kv_heads})"

    def tree(self) -> KVTree:
        """Build the tree."""
        if self.tree_file:
            return KVTree.from_file(self.tree_file)
        return levels_tree(_integers(self.nodes_per_level), _integers(self.tokens_per_level))


def suite(
    name: str,
    heads: Sequence[Heads] | None = None,
    head_dim: int = 128,
    dtype: str = "float16",
    kv_dtype: str = "",
) -> list[Case]:
    """Return the cases of a named suite, head layout by head layout (the suite's own where `heads` is None).

    Raises
    ------
    ValueError
        If there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"suite is {name!r}, expected one of {', '.join(SUITES)}")
    trees, layouts = SUITES[name]
    return [Case(name, n, t, q, kv, head_dim, dtype, kv_dtype=kv_dtype) for q, kv in heads or layouts for n, t in trees]


def levels_tree(nodes_per_level: Sequence[int], tokens_per_level: Sequence[int]) -> KVTree:
    """Build a tree from levels; a first level of several nodes gets a root of 0 tokens above it.

    A KV tree has one root. The empty root holds no rows of K and V and changes no result.
    """
    if nodes_per_level[0] != 1:
        nodes_per_level, tokens_per_level = (1, *nodes_per_level), (0, *tokens_per_level)
    return KVTree.from_levels(nodes_per_level, tokens_per_level)


@dataclass(frozen=True)
class Workload:
    """Random Q, K and V of one case, on the device.

    Attributes
    ----------
    q : (batch_size, num_qo_heads, head_dim)
    k, v : (unique_tokens, num_kv_heads, head_dim)
    k_scale, v_scale : (num_kv_heads,) or None
        Factors of float8 K and V.
    original : Workload or None
        The one that float8 K and V were quantised from.
    """

    case: Case
    tree: KVTree
    device: Device
    q: Any
    k: Any
    v: Any
    k_scale: Any = None
    v_scale: Any = None
    original: Workload | None = None

    @property
    def sm_scale(self) -> float:
        """Factor of the scores."""
        return float(self.case.head_dim**-0.5)

    @cached_property
    def paths(self) -> list[npt.NDArray[np.int64]]:
        """Nodes on each request's path, the root first, nodes without tokens left out."""
        parent, seqlen = self.tree.parent.tolist(), self.tree.seqlen.tolist()
        paths = []
        for node in self.tree.request_node.tolist():
            path: list[int] = []
            while node >= 0:
                if seqlen[node]:
                    path.append(node)
                node = parent[node]
            paths.append(np.array(path[::-1], np.int64))
        return paths

    def rows(self, nodes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Rows of K and V that hold the nodes' tokens, node after node."""
        ptrs = self.tree.kv_ptrs
        return np.concatenate([np.arange(ptrs[n], ptrs[n + 1]) for n in nodes] or [np.arange(0)])

    def requests_by_length(self) -> dict[int, npt.NDArray[np.int64]]:
        """Requests that attend to the same number of tokens, by that number."""
        lengths = self.tree.path_tokens
        return {int(length): np.flatnonzero(lengths == length) for length in np.unique(lengths)}

    def new_output(self) -> Any:
        """An array like ``q``, full of NaN: what a run does not write cannot pass for a result."""
        output = self.device.xp.empty(self.q.shape, self.q.dtype)
        output.view(np.uint16)[...] = 0x7FFF  # NaN in float16 and in bfloat16
        return output


def make_workload(case: Case, device: Device, seed: int = 0) -> Workload:
    """Build a case's tree, and normal Q, K and V on the device; float8 K and V are quantised from them."""
    tree = case.tree()
    kv_shape = (tree.unique_tokens, case.num_kv_heads, case.head_dim)
    shapes = ((tree.batch_size, case.num_qo_heads, case.head_dim), kv_shape, kv_shape)
    q, k, v = (device.normal(shape, case.dtype, 3 * seed + i) for i, shape in enumerate(shapes))
    workload = Workload(case, tree, device, q, k, v)
    if not case.kv_dtype:
        return workload
    (k, k_scale), (v, v_scale) = (quantise(array, case.kv_dtype, device.xp) for array in (k, v))
    return Workload(case, tree, device, q, k, v, k_scale, v_scale, workload)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]
