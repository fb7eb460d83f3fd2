"""Preparation: check the arguments, plan the tree, place the metadata on the device."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.checks import checked_head_dim
from fasttree_cupy.execution.device import resolve_device
from fasttree_cupy.execution.upload import place_schedule
from fasttree_cupy.integers import checked_int, checked_pair, int_vector
from fasttree_cupy.metadata import MetadataTuple, PhaseNodeNums
from fasttree_cupy.params import FastTreeParams, checked_heads
from fasttree_cupy.planning.greedy import GreedyPlan, plan
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree

__all__ = ["fasttree_preparation"]


def fasttree_preparation(
    tree_info: KVTree | Sequence[KVTreeNode],
    KV_ptrs: Sequence[int] | npt.NDArray[Any],
    batch_size: int,
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    KV_SPLIT_SIZES: Sequence[int],
    para_threshs1: Sequence[int],
    para_threshs2: Sequence[int],
    params: FastTreeParams,
    *,
    device: str | None = None,
    verbose: bool = True,
) -> tuple[MetadataTuple, list[int]]:
    """Plan tree attention: decide Split-K or Split-Q at each node and lay out the vnodes.

    Call it once a tree; the metadata serves any number of decodes, until the tree changes.

    Parameters
    ----------
    tree_info : KVTree or sequence of KVTreeNode
        The tree, ``requests`` filled.
    KV_ptrs : sequence of int, length number of nodes + 1
        First row of each node's tokens in the K and V buffers, and their total.
    batch_size : int
        Number of requests of the tree.
    num_qo_heads, num_kv_heads : int
        Query and KV heads; the first is a multiple of the second.
    head_dim : int
        One of 16, 32, 64, 128, 256.
    KV_SPLIT_SIZES : sequence of 2 int
        Most tokens of a vnode: to begin with, and where parallelism is low.
    para_threshs1, para_threshs2 : sequence of 2 int
        A phase whose parallelism, an estimated number of thread blocks, is positive and below its first
        threshold gets the reduced split size; if it then is below its second, it gets the other phase's tile
        sizes.
    params : FastTreeParams
        Cost weights and tile sizes. ``TSQs`` and ``TSKs`` are replaced by the tile sizes adopted.
    device : str, optional
        "cpu", "cuda" or "cuda:<n>"; by default the GPU where one is usable, else the CPU.
    verbose : bool
        Print the parallelism of each round, what was adopted, and the number of vnodes.

    Returns
    -------
    metadata : MetadataTuple
        The arguments of ``fasttree_decode`` between `o` and the tile sizes: NumPy arrays or CuPy arrays.
    node_assignments : list of int
        A node, 0 for Split-K and 1 for Split-Q.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it, and `params` is as before.

    Warns
    -----
    UserWarning
        ``params.kv_group_num`` is not ``num_qo_heads // num_kv_heads``.
    """
    tree = as_tree(tree_info)
    _check_rows(tree, KV_ptrs, checked_int(batch_size, "batch_size"))
    num_heads, num_kv_heads = checked_heads(num_qo_heads, num_kv_heads)
    head_dim = checked_head_dim(head_dim)
    splits = checked_pair(KV_SPLIT_SIZES, "KV_SPLIT_SIZES")
    threshs1 = checked_pair(para_threshs1, "para_threshs1", least=0)
    threshs2 = checked_pair(para_threshs2, "para_threshs2", least=0)
    if not isinstance(params, FastTreeParams):
        raise TypeError(f"params is {type(params).__name__}, expected FastTreeParams")
    params.check()
    place = resolve_device(device)
    if params.kv_group_num != num_heads // num_kv_heads:
        warnings.warn(
            f"params.kv_group_num is {params.kv_group_num}, but num_qo_heads // num_kv_heads is "
            f"{num_heads // num_kv_heads}: the costs are those of another group",
            UserWarning,
            stacklevel=2,
        )

    made = plan(
        tree, splits, threshs1, threshs2, num_kv_heads, params.alpha, params.beta, params.gamma,
        params.TSQs, params.TSKs, params.kv_group_num,
    )  # fmt: skip
    mid_shape = (len(made.vnode_to_q_entries), num_heads, head_dim)
    arrays, mid_o, mid_lse = place_schedule(made[:9], mid_shape, place)
    nums = PhaseNodeNums(made.phase_node_nums, tree.unique_tokens, made.longest_vnodes)
    metadata = MetadataTuple._make([*arrays, mid_o, mid_lse, nums, made.phase_node_offsets])
    assignments = made.node_assignments.tolist()
    if verbose:
        print(_statistics(tree, made, place))
    if (made.q_tile_sizes, made.kv_tile_sizes) != (params.TSQs, params.TSKs):
        params.adopt_tile_sizes(made.q_tile_sizes, made.kv_tile_sizes)
    return metadata, assignments


def _check_rows(tree: KVTree, KV_ptrs: Sequence[int] | npt.NDArray[Any], batch_size: int) -> None:
    if batch_size != tree.batch_size:
        raise ValueError(f"batch_size is {batch_size}, but tree_info has {tree.batch_size} requests, expected as many")
    if KV_ptrs is tree.kv_ptrs:
        return
    ptrs = int_vector(KV_ptrs, "KV_ptrs")
    if len(ptrs) != tree.num_nodes + 1:
        raise ValueError(
            f"KV_ptrs has {len(ptrs)} entries, expected {tree.num_nodes + 1}: one a node of tree_info and their total"
        )
    wrong = np.flatnonzero(ptrs != tree.kv_ptrs)
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"KV_ptrs[{i}] is {ptrs[i]}, expected {tree.kv_ptrs[i]}: the tokens of the nodes before node {i}"
        )


def _statistics(tree: KVTree, made: GreedyPlan, device: str) -> str:
    lines = [
        f"FastTree preparation on {device}: {tree.num_nodes} nodes, {tree.batch_size} requests, "
        f"{tree.unique_tokens} tokens"
    ]
    lines += [
        f"  round {k}: parallelism {phase0} in phase 0, {phase1} in phase 1"
        for k, (phase0, phase1) in enumerate(made.parallelism)
    ]
    lines += [
        f"  adopted: TSQs {made.q_tile_sizes}, TSKs {made.kv_tile_sizes}, KV splits {made.kv_split_sizes}",
        f"  vnodes: {made.phase_node_nums[0]} in phase 0, {made.phase_node_nums[1]} in phase 1",
    ]
    return "\n".join(lines)
