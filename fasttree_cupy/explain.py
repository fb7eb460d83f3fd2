"""What the documented heuristic did with a tree: at each node, the tokens, requests and vnodes that came of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.params import FastTreeParams, checked_heads, preset
from fasttree_cupy.planning.greedy import GreedyPlan, plan
from fasttree_cupy.tree import KVTree

__all__ = ["ExplainedPlan", "VnodeGrid", "explain_plan", "sum_subtrees"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class VnodeGrid(NamedTuple):
    """A node's vnodes: each of its KV splits, of `split_tokens` but for the last, with each of its query tiles."""

    splits: int
    split_tokens: int
    tiles_phase0: int
    tiles_phase1: int

    @property
    def tiles(self) -> int:
        return self.tiles_phase0 + self.tiles_phase1


@dataclass(frozen=True, eq=False)
class ExplainedPlan:
    """A plan, and what it means for each node.

    Attributes
    ----------
    tree : KVTree
    plan : GreedyPlan
    gpu : str
        Name of the preset whose tile sizes and thresholds the plan began with.
    num_qo_heads, num_kv_heads : int
    through : int64 (N,)
        Requests whose path goes through or ends at the node.
    served : int64 (N,)
        Requests that the node's own vnodes serve: not those that went over to a Split-Q child.
    covered : int64 (N,)
        Tokens that the node's own vnodes cover: its own, and those that Split-Q takes along from above.
    vnodes : int64 (N, 2)
        Vnodes of each phase; none where no request or no token is left.
    """

    tree: KVTree
    plan: GreedyPlan
    gpu: str
    num_qo_heads: int
    num_kv_heads: int
    through: Int64Array
    served: Int64Array
    covered: Int64Array
    vnodes: Int64Array

    @property
    def num_split_q(self) -> int:
        """Number of nodes assigned Split-Q; the others, the root among them, are Split-K."""
        return int(self.plan.node_assignments.sum())

    def grid(self, node: int) -> VnodeGrid | None:
        """The vnodes of a node; None where it has none."""
        vnodes, served = self.vnodes[node].tolist(), int(self.served[node])
        if sum(vnodes) == 0:
            return None
        split_tokens = self.plan.kv_split_sizes[0 if served > self.plan.q_tile_sizes[1] else 1]
        splits = -(-int(self.covered[node]) // split_tokens)
        return VnodeGrid(splits, split_tokens, vnodes[0] // splits, vnodes[1] // splits)


def explain_plan(tree: KVTree, num_qo_heads: int, num_kv_heads: int, gpu: str = "H100") -> ExplainedPlan:
    """Plan a tree as ``fasttree_preparation`` does, on the CPU and with a preset's values, and explain the plan.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or the plan's offsets do not fit in int32.
    """
    heads, kv_heads = checked_heads(num_qo_heads, num_kv_heads)
    values, params = preset(gpu), FastTreeParams.for_gpu(gpu, heads // kv_heads)
    made = plan(
        tree, values.kv_split_sizes, values.para_threshs1, values.para_threshs2, kv_heads,
        params.alpha, params.beta, params.gamma, params.TSQs, params.TSKs, params.kv_group_num,
    )  # fmt: skip
    ending = np.bincount(tree.request_node, minlength=tree.num_nodes)
    through = sum_subtrees(tree, ending[:, None])[:, 0]
    served = through.copy()
    split_q = np.flatnonzero(made.node_assignments)
    np.subtract.at(served, tree.parent[split_q], through[split_q])
    covered = _covered(tree.parent, tree.seqlen, tree.breadth_first, made.node_assignments)
    vnodes = _vnodes(made, np.where(served > 0, covered, 0))
    return ExplainedPlan(tree, made, values.name, heads, kv_heads, through, served, covered, vnodes)


def sum_subtrees(tree: KVTree, values: npt.ArrayLike) -> Int64Array:
    """Sums over each node and all below it; `values` and the result have the shape (N, columns)."""
    sums = np.array(values, np.int64)
    _sum_subtrees(tree.parent, tree.breadth_first, sums)
    return sums


def _vnodes(made: GreedyPlan, rows: Int64Array) -> Int64Array:
    """Vnodes a node and phase, counted in the plan: nodes' KV entries follow one another in id order."""
    first_row = np.cumsum(rows) - rows
    owner = np.searchsorted(first_row, made.vnode_to_kv_offs, side="right") - 1
    num_phase0 = made.phase_node_nums[0]
    phases = [np.bincount(part, minlength=len(rows)) for part in (owner[:num_phase0], owner[num_phase0:])]
    return np.stack(phases, axis=1).astype(np.int64)


@njit
def _sum_subtrees(parent: Int32Array, order: Int32Array, sums: Int64Array) -> None:
    for node in order[:0:-1]:
        for column in range(sums.shape[1]):
            sums[parent[node], column] += sums[node, column]


@njit
def _covered(parent: Int32Array, seqlen: Int64Array, order: Int32Array, assigned: Int32Array) -> Int64Array:
    covered = seqlen.copy()
    for node in order[1:]:
        if assigned[node] == 1:
            covered[node] += covered[parent[node]]
    return covered
