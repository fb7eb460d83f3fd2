"""A tree as our planners take it: requests in depth-first order, and runs of rows with the requests that see them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import INT32_MAX
from fasttree_cupy.tree import KVTree

__all__ = ["WARP_ROWS", "Layout", "check_row_numbers", "depth_first", "lay_out"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

WARP_ROWS = 16
"""Query rows that a warp attends at a time, as in the CUDA kernels."""


class Layout(NamedTuple):
    """The tree's arrays of these names, and each node's requests as positions ``[begins, ends)``: (N,) each.

    Of a tree whose tokens lie in a pool, each run of consecutive rows counts as a node.
    """

    breadth_first: Int32Array
    seqlen: Int64Array
    kv_ptrs: Int64Array
    begins: Int64Array
    ends: Int64Array


def check_row_numbers(tree: KVTree) -> None:
    """Raise ValueError where a tree has more tokens than int32 numbers rows."""
    if tree.unique_tokens > INT32_MAX:
        raise ValueError(
            f"tree_info holds {tree.unique_tokens} tokens, but int32 row numbers reach {INT32_MAX} at most"
        )


def depth_first(tree: KVTree) -> tuple[Int32Array, Int64Array, Int64Array]:
    """Requests in depth-first order, (B,), and each node's as positions ``[begins, ends)`` in it, (N,) each."""
    request_order = np.empty(tree.batch_size, np.int32)
    begins, ends = _positions(tree.parent, tree.breadth_first, tree.request_node, request_order)
    return request_order, begins, ends


def lay_out(tree: KVTree, begins: Int64Array, ends: Int64Array, kv_indices: Int32Array | None) -> Layout:
    """Runs of consecutive rows of K and V, and the requests that attend to each: a run a node, or more from a pool."""
    layout = Layout(tree.breadth_first, tree.seqlen, tree.kv_ptrs, begins, ends)
    return layout if kv_indices is None else _pool_runs(layout, kv_indices)


# Compiled passes.


@njit
def _pool_runs(layout: Layout, kv_indices: Int32Array) -> Layout:
    """The layout of the runs of consecutive rows that the nodes' tokens have in a pool, in the nodes' order."""
    runs = 0
    for fill in range(2):
        if fill == 1:
            order = np.arange(runs).astype(np.int32)
            seqlen, kv_ptrs = np.zeros(runs, np.int64), np.empty(runs, np.int64)
            begins, ends = np.empty(runs, np.int64), np.empty(runs, np.int64)
            runs = 0
        for node in layout.breadth_first:
            first = layout.kv_ptrs[node]
            for token in range(first, first + layout.seqlen[node]):
                if token == first or kv_indices[token] != kv_indices[token - 1] + 1:
                    if fill == 1:
                        kv_ptrs[runs] = kv_indices[token]
                        begins[runs] = layout.begins[node]
                        ends[runs] = layout.ends[node]
                    runs += 1
                if fill == 1:
                    seqlen[runs - 1] += 1
    return Layout(order, seqlen, kv_ptrs, begins, ends)


@njit
def _positions(
    parent: Int32Array, order: Int32Array, request_node: Int32Array, request_order: Int32Array
) -> tuple[Int64Array, Int64Array]:
    """Depth-first positions of each node's requests, ``[begins, ends)``; fills `request_order`."""
    n = len(parent)
    own = np.zeros(n, np.int64)
    for node in request_node:
        own[node] += 1
    total = own.copy()
    for i in range(n - 1, 0, -1):
        total[parent[order[i]]] += total[order[i]]
    begins = np.zeros(n, np.int64)
    cursor = np.zeros(n, np.int64)
    cursor[order[0]] = own[order[0]]
    for i in range(1, n):
        node = order[i]
        begins[node] = cursor[parent[node]]
        cursor[parent[node]] += total[node]
        cursor[node] = begins[node] + own[node]
    slot = begins.copy()
    for r in range(len(request_node)):
        node = request_node[r]
        request_order[slot[node]] = r
        slot[node] += 1
    return begins, begins + total
