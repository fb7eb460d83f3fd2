"""The documented heuristic: Split-K or Split-Q at each node, then vnodes laid out a phase.

A node assigned 0 (Split-K) is attended to on its own, and its requests' partial outputs are reduced later. A
node assigned 1 (Split-Q) takes its parent's tokens along: its requests leave the parent's vnodes and read
those tokens again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import INT32_MAX
from fasttree_cupy.planning.layout import check_row_numbers
from fasttree_cupy.tree import KVTree

__all__ = ["GreedyPlan", "plan"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]
_ThreeArrays = tuple[Int32Array, Int32Array, Int32Array]

_MAX_ROUNDS = 3


class GreedyPlan(NamedTuple):
    """A plan. The nine arrays and the two phase lists are those of ``MetadataTuple``.

    Attributes
    ----------
    node_assignments : int32 (N,)
        0 Split-K, 1 Split-Q, a node.
    q_tile_sizes, kv_tile_sizes : list of 2 int
        Tile sizes adopted, a phase.
    kv_split_sizes : list of 2 int
        KV split sizes adopted, a phase.
    parallelism : list of [int, int]
        Thread blocks of stage 1 estimated a phase, one entry a round.
    """

    vnode_to_kv_entries: Int32Array
    vnode_to_kv_offs: Int32Array
    vnode_to_kv_lens: Int32Array
    vnode_to_q_entries: Int32Array
    vnode_to_q_offs: Int32Array
    vnode_to_q_lens: Int32Array
    req_to_vnode_entries: Int32Array
    req_to_vnode_offs: Int32Array
    req_to_vnode_lens: Int32Array
    phase_node_nums: list[int]
    phase_node_offsets: list[int]
    node_assignments: Int32Array
    q_tile_sizes: list[int]
    kv_tile_sizes: list[int]
    kv_split_sizes: list[int]
    parallelism: list[list[int]]

    @property
    def longest_vnodes(self) -> tuple[int, int]:
        """Most tokens of a vnode of each phase; 0 where there is none."""
        first, second = (
            self.vnode_to_kv_lens[offset : offset + count]
            for offset, count in zip(self.phase_node_offsets, self.phase_node_nums, strict=True)
        )
        return int(first.max(initial=0)), int(second.max(initial=0))


def plan(
    tree: KVTree,
    kv_split_sizes: Sequence[int],
    para_threshs1: Sequence[int],
    para_threshs2: Sequence[int],
    num_kv_heads: int,
    alpha: float,
    beta: float,
    gamma: float,
    TSQs: Sequence[int],
    TSKs: Sequence[int],
    kv_group_num: int,
) -> GreedyPlan:
    """Plan a tree; ``fasttree_preparation`` describes and checks the arguments.

    Raises
    ------
    ValueError
        The plan needs offsets that do not fit in int32.
    """
    check_row_numbers(tree)
    q_tiles, kv_tiles = np.array(TSQs, np.int64), np.array(TSKs, np.int64)
    splits = np.array([kv_split_sizes[0], kv_split_sizes[0]], np.int64)  # a phase
    thresholds = np.array([para_threshs1, para_threshs2], np.int64)
    weights = np.array([alpha, beta, gamma], np.float64)
    nodes = _Nodes(*np.zeros((4, tree.num_nodes), np.int64))
    assigned = np.empty(tree.num_nodes, np.int32)
    parallelism = np.empty((_MAX_ROUNDS, 2), np.int64)
    topology = _Topology(tree.parent, tree.seqlen, tree.breadth_first, tree.num_children)

    rounds, num_kv, num_q, num_phase0, num_phase1 = _decide(
        topology, tree.request_node, weights, kv_group_num, num_kv_heads, thresholds, kv_split_sizes[1],
        q_tiles, kv_tiles, splits, nodes, assigned, parallelism,
    )  # fmt: skip
    for name, size in (("vnode_to_kv_entries", num_kv), ("vnode_to_q_entries", num_q)):
        if size > INT32_MAX:
            raise ValueError(
                f"tree_info: {name} would hold {size} entries, but int32 offsets reach {INT32_MAX} at most"
            )
    num_vnodes = num_phase0 + num_phase1
    kv_arrays = _int32_arrays(num_kv, num_vnodes, num_vnodes)
    q_arrays = _int32_arrays(num_q, num_vnodes, num_vnodes)
    req_arrays = _int32_arrays(num_q, tree.batch_size, tree.batch_size)
    _fill(
        topology, tree.kv_ptrs, tree.request_node, nodes, assigned, q_tiles, splits, num_phase0,
        kv_arrays, q_arrays, req_arrays,
    )  # fmt: skip
    return GreedyPlan(
        *kv_arrays,
        *q_arrays,
        *req_arrays,
        phase_node_nums=[num_phase0, num_phase1],
        phase_node_offsets=[0, num_phase0],
        node_assignments=assigned,
        q_tile_sizes=q_tiles.tolist(),
        kv_tile_sizes=kv_tiles.tolist(),
        kv_split_sizes=splits.tolist(),
        parallelism=parallelism[:rounds].tolist(),
    )


def _int32_arrays(first: int, second: int, third: int) -> _ThreeArrays:
    return np.empty(first, np.int32), np.empty(second, np.int32), np.empty(third, np.int32)


# Compiled passes.


class _Topology(NamedTuple):
    """The tree's arrays of these names: (N,) each."""

    parent: Int32Array
    seqlen: Int64Array
    breadth_first: Int32Array
    num_children: Int32Array


class _Nodes(NamedTuple):
    """What the passes know of each node: int64 (N,) each."""

    ending: Int64Array  # requests whose path ends here
    through: Int64Array  # requests whose path ends here or below
    served: Int64Array  # requests that the node's own vnodes serve
    length: Int64Array  # tokens that the node's vnodes cover


@njit
def _decide(
    topology: _Topology,
    request_node: Int32Array,
    weights: Float64Array,
    group: int,
    num_kv_heads: int,
    thresholds: Int64Array,
    reduced_split: int,
    q_tiles: Int64Array,
    kv_tiles: Int64Array,
    splits: Int64Array,
    nodes: _Nodes,
    assigned: Int32Array,
    parallelism: Int64Array,
) -> tuple[int, int, int, int, int]:
    """Assign the nodes in up to three rounds, adapting tiles and splits.

    Returns the number of rounds and what `_sizes` returns.
    """
    _count_requests(topology, request_node, nodes)
    for this_round in range(_MAX_ROUNDS):
        if this_round != 1:  # the first round adapts the splits alone, which no cost depends on
            _assign(topology, weights, group, q_tiles, kv_tiles, nodes, assigned)
        blocks = parallelism[this_round]
        _estimate(nodes, q_tiles, splits, num_kv_heads, blocks)
        if this_round == 0:
            adapted = _reduce_splits(blocks, thresholds[0], reduced_split, splits)
        elif this_round == 1:
            adapted = _unify_tiles(blocks, thresholds[1], q_tiles, kv_tiles)
        else:
            adapted = False
        if not adapted:
            break
    num_kv, num_q, num_phase0, num_phase1 = _sizes(nodes, q_tiles, splits)
    return this_round + 1, num_kv, num_q, num_phase0, num_phase1


@njit
def _count_requests(topology: _Topology, request_node: Int32Array, nodes: _Nodes) -> None:
    parent, order = topology.parent, topology.breadth_first
    for node in request_node:
        nodes.ending[node] += 1
    nodes.through[:] = nodes.ending
    for node in order[:0:-1]:
        nodes.through[parent[node]] += nodes.through[node]


@njit
def _cost(
    num_q: int, num_kv: int, weights: Float64Array, group: int, q_tiles: Int64Array, kv_tiles: Int64Array
) -> float:
    """Cost of the padding when `num_q` requests attend to `num_kv` tokens."""
    phase = _phase(num_q, q_tiles)
    pad_q = q_tiles[phase] - ((num_q - 1) % q_tiles[phase] + 1)
    pad_kv = max(0, kv_tiles[phase] - num_kv)
    # Ties decide: keep this order of operations.
    cost: float = weights[0] * pad_q * group * num_kv + weights[1] * pad_kv * num_q * group
    return cost


@njit
def _assign(
    topology: _Topology,
    weights: Float64Array,
    group: int,
    q_tiles: Int64Array,
    kv_tiles: Int64Array,
    nodes: _Nodes,
    assigned: Int32Array,
) -> None:
    """Choose Split-K (0) or Split-Q (1) for each node, from the root down."""
    order, num_children = topology.breadth_first, topology.num_children
    gamma = weights[2]
    nodes.length[:] = topology.seqlen
    assigned[order[0]] = 0
    position = 1  # of the next child: children follow one another in breadth-first order
    for node in order:
        num_q, length = nodes.through[node], nodes.length[node]
        for child in order[position : position + num_children[node]]:
            child_q, child_length = nodes.through[child], nodes.length[child]
            split_k = (
                _cost(num_q, length, weights, group, q_tiles, kv_tiles)
                + _cost(child_q, child_length, weights, group, q_tiles, kv_tiles)
                + gamma * child_q
            )
            split_q = _cost(num_q - child_q, length, weights, group, q_tiles, kv_tiles) + _cost(
                child_q, child_length + length, weights, group, q_tiles, kv_tiles
            )
            if split_k > split_q:
                assigned[child] = 1
                num_q -= child_q
                nodes.length[child] += length
            else:
                assigned[child] = 0
        position += num_children[node]
        nodes.served[node] = num_q


@njit
def _ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


@njit
def _phase(num_q: int, q_tiles: Int64Array) -> int:
    return 0 if num_q > q_tiles[1] else 1


@njit
def _estimate(nodes: _Nodes, q_tiles: Int64Array, splits: Int64Array, num_kv_heads: int, blocks: Int64Array) -> None:
    """Thread blocks of stage 1 a phase."""
    blocks[:] = 0
    for num_q, length in zip(nodes.served, nodes.length):  # noqa: B905  # Numba's zip has no strict
        if num_q > 0:
            phase = _phase(num_q, q_tiles)
            blocks[phase] += _ceil_div(length, splits[phase]) * _ceil_div(num_q, q_tiles[phase])
    blocks *= num_kv_heads


@njit
def _reduce_splits(blocks: Int64Array, thresholds: Int64Array, reduced_split: int, splits: Int64Array) -> bool:
    """Shorter KV splits for the phases that leave the GPU idle; returns whether any was."""
    adapted = False
    for phase in range(2):
        if 0 < blocks[phase] < thresholds[phase]:
            splits[phase] = reduced_split
            adapted = True
    return adapted


@njit
def _unify_tiles(blocks: Int64Array, thresholds: Int64Array, q_tiles: Int64Array, kv_tiles: Int64Array) -> bool:
    """Give a phase that still leaves the GPU idle the other's tiles; returns whether any did."""
    for phase in range(2):
        if 0 < blocks[phase] < thresholds[phase]:
            q_tiles[phase] = q_tiles[1 - phase]
            kv_tiles[phase] = kv_tiles[1 - phase]
            return True
    return False


@njit
def _sizes(nodes: _Nodes, q_tiles: Int64Array, splits: Int64Array) -> tuple[int, int, int, int]:
    """Number of KV entries, of query entries, and of vnodes a phase."""
    num_kv, num_q, num_phase0, num_phase1 = 0, 0, 0, 0
    for node in range(len(nodes.served)):
        served, length = nodes.served[node], nodes.length[node]
        if served == 0 or length == 0:
            continue
        num_splits = _ceil_div(length, splits[_phase(served, q_tiles)])
        num_kv += length
        num_q += num_splits * served
        # Tiles hold q_tiles[0] requests, the last one what remains: each goes to the phase of its own number.
        remainder = served % q_tiles[0]
        full = served // q_tiles[0]
        if q_tiles[0] > q_tiles[1]:
            num_phase0 += num_splits * full
        else:
            num_phase1 += num_splits * full
        if remainder > q_tiles[1]:
            num_phase0 += num_splits
        elif remainder > 0:
            num_phase1 += num_splits
    return num_kv, num_q, num_phase0, num_phase1


@njit
def _fill(
    topology: _Topology,
    kv_start: Int64Array,
    request_node: Int32Array,
    nodes: _Nodes,
    assigned: Int32Array,
    q_tiles: Int64Array,
    splits: Int64Array,
    num_phase0: int,
    kv_arrays: _ThreeArrays,
    q_arrays: _ThreeArrays,
    req_arrays: _ThreeArrays,
) -> None:
    """Write the nine arrays: node by node in id order, vnodes of phase 0 before those of phase 1."""
    kv_entries, kv_offs, kv_lens = kv_arrays
    q_entries, q_offs, q_lens = q_arrays
    requests, first_request = _served_requests(topology, request_node, nodes, assigned)
    next_vnode = np.array([0, num_phase0])
    kv_position, q_position = 0, 0
    for node in range(len(assigned)):
        served, length = nodes.served[node], nodes.length[node]
        if served == 0 or length == 0:
            continue
        _fill_rows(topology, kv_start, assigned, node, kv_entries[kv_position : kv_position + length])
        own_requests = requests[first_request[node] : first_request[node] + served]
        split = splits[_phase(served, q_tiles)]
        for start in range(0, length, split):
            q_entries[q_position : q_position + served] = own_requests
            for tile in range(0, served, q_tiles[0]):
                tile_q = min(q_tiles[0], served - tile)
                phase = _phase(tile_q, q_tiles)
                vnode = next_vnode[phase]
                next_vnode[phase] += 1
                kv_offs[vnode] = kv_position + start
                kv_lens[vnode] = min(split, length - start)
                q_offs[vnode] = q_position + tile
                q_lens[vnode] = tile_q
            q_position += served
        kv_position += length
    _group_by_request(q_entries, *req_arrays)


@njit
def _fill_rows(topology: _Topology, kv_start: Int64Array, assigned: Int32Array, node: int, rows: Int32Array) -> None:
    """Rows of a node's tokens, preceded by those it takes along from its ancestors."""
    seqlen = topology.seqlen
    end = len(rows)
    while True:
        run = rows[end - seqlen[node] : end]
        first = np.int32(kv_start[node])
        for k in range(len(run)):
            run[k] = first + np.int32(k)
        end -= seqlen[node]
        if assigned[node] == 0:
            break
        node = topology.parent[node]


@njit
def _served_requests(
    topology: _Topology, request_node: Int32Array, nodes: _Nodes, assigned: Int32Array
) -> tuple[Int32Array, Int64Array]:
    """The requests that each node's vnodes serve, and where each node's begin.

    A node serves the requests that end at it, then all those of each child assigned 0. Children come in the
    order in which their subtrees complete when leaves are taken in id order and a parent follows its last
    child.
    """
    parent, num_children = topology.parent, topology.num_children
    num_nodes = len(assigned)
    first = np.empty(num_nodes, np.int64)
    total = 0
    for node in range(num_nodes):
        first[node] = total
        total += nodes.served[node]

    free = first + nodes.ending  # where the next child's requests go, a parent
    cursor = np.zeros(num_nodes, np.int64)  # where the next request of a child goes, in its parent's list
    open_children = num_children.copy()
    queue = np.empty(num_nodes, np.int64)
    queued = 0
    for node in range(num_nodes):
        if num_children[node] == 0:
            queue[queued] = node
            queued += 1
    for position in range(num_nodes):
        node = queue[position]
        above = parent[node]
        if above < 0:
            continue
        if assigned[node] == 0:
            cursor[node] = free[above]
            free[above] += nodes.through[node]
        open_children[above] -= 1
        if open_children[above] == 0:
            queue[queued] = above
            queued += 1

    requests = np.empty(total, np.int32)
    own = first.copy()
    for request in range(len(request_node)):  # ascending, hence each group is ascending too
        node = request_node[request]
        requests[own[node]] = request
        own[node] += 1
        while parent[node] >= 0:
            if assigned[node] == 0:
                requests[cursor[node]] = request
                cursor[node] += 1
            node = parent[node]
    return requests, first


@njit
def _group_by_request(q_entries: Int32Array, positions: Int32Array, offs: Int32Array, lens: Int32Array) -> None:
    """The positions in `q_entries` at which each request stands, ascending."""
    lens[:] = 0
    for request in q_entries:
        lens[request] += 1
    total = 0
    for request in range(len(lens)):
        offs[request] = total
        total += lens[request]
    cursor = offs.copy()
    for position in range(len(q_entries)):
        request = q_entries[position]
        positions[cursor[request]] = position
        cursor[request] += 1
