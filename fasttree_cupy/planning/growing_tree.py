"""A tree whose requests gain tokens, fork and finish: each change costs what it changes.

Requests have *slots*, numbers that stay theirs from the fork that makes them to their end. Nodes and runs of
consecutive rows are linked lists in arrays of a fixed size, whose free places are linked up too.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.capacity import Capacity
from fasttree_cupy.compiled import njit
from fasttree_cupy.planning.layout import Layout
from fasttree_cupy.tree import KVTree

__all__ = ["GrowingTree", "TreeNodes", "append_if_room"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class GrowingTree:
    """The tree as it stands. The callers check what they pass, `tokens` against the capacity too.

    Parameters
    ----------
    tree : KVTree
        The tree to begin with; its requests have slots 0, 1, ...
    kv_indices : int32 (unique_tokens,)
        Rows of K and V of its tokens.
    capacity : Capacity
        Slots and tokens, at most.

    Attributes
    ----------
    capacity : Capacity
    nodes : TreeNodes
        Its arrays, which stay where they are.
    tokens : int
        Tokens held, each counted once.
    live : int32 (B,)
        Slots of the requests, ascending; read-only.
    """

    def __init__(self, tree: KVTree, kv_indices: Int32Array, capacity: Capacity) -> None:
        self.capacity = capacity
        nodes, runs = tree.num_nodes + capacity.tokens, max(1, capacity.tokens)
        self.nodes = TreeNodes(
            parent=np.empty(nodes, np.int32),
            tokens=np.empty(nodes, np.int32),
            ends=np.empty(nodes, np.int32),
            children=np.empty(nodes, np.int32),
            first_run=np.empty(nodes, np.int32),
            last_run=np.empty(nodes, np.int32),
            run_row=np.empty(runs, np.int32),
            run_tokens=np.empty(runs, np.int32),
            run_next=np.empty(runs, np.int32),
            slot_node=np.full(capacity.requests, -1, np.int32),
            numbers=np.array([-1, tree.num_nodes, -1, 0, 0, tree.breadth_first[0]], np.int64),
        )
        _load(self.nodes, tree.parent, tree.num_children, tree.kv_ptrs, tree.request_node, kv_indices)
        self._find_live()

    @property
    def tokens(self) -> int:
        """Tokens held, each counted once."""
        return int(self.nodes.numbers[_TOKENS])

    def _find_live(self) -> None:
        self.live = np.flatnonzero(self.nodes.slot_node >= 0).astype(np.int32)
        self.live.flags.writeable = False

    def append(self, slots: Int32Array, rows: Int32Array) -> None:
        """Add tokens in `rows` (len(slots), n) to the ends of the paths of different live requests."""
        _append(self.nodes, slots, rows)

    def fork(self, parents: Int32Array) -> Int32Array:
        """Give each of `parents`, live slots, one more request that shares its tokens so far; returns their slots."""
        slots = np.flatnonzero(self.nodes.slot_node < 0)[: len(parents)].astype(np.int32)
        _fork(self.nodes, parents, slots)
        self._find_live()
        return slots

    def finish(self, slots: Int32Array) -> None:
        """Take live requests away, and the tokens that no other has."""
        _finish(self.nodes, slots)
        self._find_live()

    def snapshot(self) -> tuple[KVTree, Int32Array]:
        """The tree and the rows of its tokens; its requests are `live`, in this order.

        A node that one other alone continues is one with it.
        """
        parent, seqlen, request_node, rows = _snapshot(self.nodes, self.live, self.tokens)
        return KVTree(parent, seqlen, request_node), rows

    def layout(self) -> tuple[Layout, Int32Array]:
        """What `balanced.plan_layout` takes: runs of rows, and the slots in depth-first order."""
        order, *runs = _runs(self.nodes, self.live)
        return Layout(np.arange(len(runs[0]), dtype=np.int32), *runs), order


# Compiled passes.


class TreeNodes(NamedTuple):
    """Arrays of the tree: int32, `numbers` int64.

    Attributes
    ----------
    parent : (nodes,)
        Parent of each node, or, where the node is free, the next free one; or -1.
    tokens : (nodes,)
        Tokens of each node, -1 where it is free.
    ends : (nodes,)
        Requests that end at each node.
    children : (nodes,)
        Nodes that have each node as their parent.
    first_run, last_run : (nodes,)
        First and last run of each node's tokens, or -1.
    run_row, run_tokens : (runs,)
        First row of each run, and its tokens.
    run_next : (runs,)
        The node's next run after each, or, where the run is free, the next free one; or -1.
    slot_node : (slots,)
        Last node of each slot's request, or -1.
    numbers : (6,)
        Named below.
    """

    parent: Int32Array
    tokens: Int32Array
    ends: Int32Array
    children: Int32Array
    first_run: Int32Array
    last_run: Int32Array
    run_row: Int32Array
    run_tokens: Int32Array
    run_next: Int32Array
    slot_node: Int32Array
    numbers: Int64Array


(
    _FREE_NODE,  # the first one, or -1
    _USED_NODES,  # places that have ever been used
    _FREE_RUN,  # as of nodes
    _USED_RUNS,
    _TOKENS,  # that the tree holds
    _ROOT,
) = range(6)


@njit(inline="always")
def _take(numbers: Int64Array, first: int, links: Int32Array) -> int:
    """A free place: one that was given back, or the next that was never used."""
    place = numbers[first]
    if place >= 0:
        numbers[first] = links[place]
    else:
        place = numbers[first + 1]
        numbers[first + 1] += 1
    return int(place)


@njit
def _give_back(numbers: Int64Array, first: int, links: Int32Array, place: int) -> None:
    links[place] = numbers[first]
    numbers[first] = place


@njit
def _set_node(nodes: TreeNodes, node: int, parent: int) -> None:
    nodes.parent[node] = parent
    nodes.tokens[node] = 0
    nodes.ends[node] = 0
    nodes.children[node] = 0
    nodes.first_run[node] = -1
    nodes.last_run[node] = -1


@njit(inline="always")
def _begin_run(nodes: TreeNodes, node: int, row: int) -> None:
    """Add a run of one token."""
    run = _take(nodes.numbers, _FREE_RUN, nodes.run_next)
    nodes.run_row[run] = row
    nodes.run_tokens[run] = 1
    nodes.run_next[run] = -1
    if nodes.last_run[node] >= 0:
        nodes.run_next[nodes.last_run[node]] = run
    else:
        nodes.first_run[node] = run
    nodes.last_run[node] = run


@njit
def _load(
    nodes: TreeNodes,
    parent: Int32Array,
    num_children: Int32Array,
    kv_ptrs: Int64Array,
    request_node: Int32Array,
    kv_indices: Int32Array,
) -> None:
    for node in range(len(parent)):
        _set_node(nodes, node, parent[node])
        nodes.children[node] = num_children[node]
        nodes.tokens[node] = kv_ptrs[node + 1] - kv_ptrs[node]
        for token in range(kv_ptrs[node], kv_ptrs[node + 1]):
            if token > kv_ptrs[node] and kv_indices[token] == kv_indices[token - 1] + 1:
                nodes.run_tokens[nodes.last_run[node]] += 1
            else:
                _begin_run(nodes, node, kv_indices[token])
    nodes.numbers[_TOKENS] = kv_ptrs[-1]
    for slot in range(len(request_node)):
        nodes.slot_node[slot] = request_node[slot]
        nodes.ends[request_node[slot]] += 1


@njit
def _append(nodes: TreeNodes, slots: Int32Array, rows: Int32Array) -> None:
    if rows.shape[1] == 0:
        return
    for i in range(len(slots)):
        node = nodes.slot_node[slots[i]]
        if nodes.ends[node] > 1 or nodes.children[node] > 0:  # others have its tokens, but not the new ones
            child = _take(nodes.numbers, _FREE_NODE, nodes.parent)
            _set_node(nodes, child, node)
            nodes.ends[node] -= 1
            nodes.children[node] += 1
            nodes.ends[child] = 1
            nodes.slot_node[slots[i]] = child
            node = child
        for j in range(rows.shape[1]):
            last = nodes.last_run[node]
            if last >= 0 and nodes.run_row[last] + nodes.run_tokens[last] == rows[i, j]:  # the usual case
                nodes.run_tokens[last] += 1
            else:
                _begin_run(nodes, node, rows[i, j])
        nodes.tokens[node] += rows.shape[1]
        nodes.numbers[_TOKENS] += rows.shape[1]


@njit
def append_if_room(nodes: TreeNodes, slots: Int32Array, rows: Int32Array, most_tokens: int) -> bool:
    """Add tokens as `GrowingTree.append` does; False, and nothing else, where they would be more than `most_tokens`."""
    if nodes.numbers[_TOKENS] + rows.size > most_tokens:
        return False
    _append(nodes, slots, rows)
    return True


@njit
def _fork(nodes: TreeNodes, parents: Int32Array, slots: Int32Array) -> None:
    for i in range(len(parents)):
        node = nodes.slot_node[parents[i]]
        nodes.slot_node[slots[i]] = node
        nodes.ends[node] += 1


@njit
def _finish(nodes: TreeNodes, slots: Int32Array) -> None:
    for slot in slots:
        node = nodes.slot_node[slot]
        nodes.slot_node[slot] = -1
        nodes.ends[node] -= 1
        while node != nodes.numbers[_ROOT] and nodes.ends[node] == 0 and nodes.children[node] == 0:
            parent = nodes.parent[node]
            nodes.numbers[_TOKENS] -= nodes.tokens[node]
            run = nodes.first_run[node]
            while run >= 0:
                following = nodes.run_next[run]
                _give_back(nodes.numbers, _FREE_RUN, nodes.run_next, run)
                run = following
            nodes.tokens[node] = -1
            _give_back(nodes.numbers, _FREE_NODE, nodes.parent, node)
            nodes.children[parent] -= 1
            node = parent


@njit
def _depth_first(nodes: TreeNodes) -> Int32Array:
    """The nodes, each before its children."""
    used, root = nodes.numbers[_USED_NODES], nodes.numbers[_ROOT]
    child, sibling = np.full(used, -1, np.int32), np.full(used, -1, np.int32)
    count = 0
    for node in range(used - 1, -1, -1):
        if nodes.tokens[node] >= 0:
            count += 1
            if node != root:
                sibling[node] = child[nodes.parent[node]]
                child[nodes.parent[node]] = node
    order, stack = np.empty(count, np.int32), np.empty(count + 1, np.int32)
    stack[0] = root
    height = 1
    for i in range(count):
        height -= 1
        node = stack[height]
        order[i] = node
        if sibling[node] >= 0:
            stack[height] = sibling[node]
            height += 1
        if child[node] >= 0:
            stack[height] = child[node]
            height += 1
    return order


@njit
def _continues(nodes: TreeNodes, node: int) -> bool:
    """Whether a node is the only way on from its parent, so that the two could be one."""
    parent = nodes.parent[node]
    return bool(parent >= 0 and nodes.ends[parent] == 0 and nodes.children[parent] == 1)


@njit
def _snapshot(
    nodes: TreeNodes, live: Int32Array, num_tokens: int
) -> tuple[Int32Array, Int64Array, Int32Array, Int32Array]:
    """Parents, tokens, the requests' last nodes, rows."""
    order = _depth_first(nodes)
    number = np.empty(nodes.numbers[_USED_NODES], np.int32)
    parent, seqlen = np.empty(len(order), np.int32), np.empty(len(order), np.int64)
    rows = np.empty(num_tokens, np.int32)
    count, token = 0, 0
    for node in order:
        if _continues(nodes, node):
            number[node] = number[nodes.parent[node]]
            seqlen[number[node]] += nodes.tokens[node]
        else:
            number[node] = count
            parent[count] = -1 if count == 0 else number[nodes.parent[node]]
            seqlen[count] = nodes.tokens[node]
            count += 1
        run = nodes.first_run[node]
        while run >= 0:
            for i in range(nodes.run_tokens[run]):
                rows[token] = nodes.run_row[run] + i
                token += 1
            run = nodes.run_next[run]
    request_node = np.empty(len(live), np.int32)
    for i in range(len(live)):
        request_node[i] = number[nodes.slot_node[live[i]]]
    return parent[:count], seqlen[:count], request_node, rows


@njit
def _runs(nodes: TreeNodes, live: Int32Array) -> tuple[Int32Array, Int64Array, Int64Array, Int64Array, Int64Array]:
    """Slots in depth-first order; of each run its tokens, its first row, and who has it, as positions in that order."""
    order = _depth_first(nodes)
    used = nodes.numbers[_USED_NODES]
    total = np.zeros(used, np.int64)
    num_runs = 0
    for i in range(len(order) - 1, -1, -1):
        node = order[i]
        total[node] += nodes.ends[node]
        if i > 0:
            total[nodes.parent[node]] += total[node]
        run = nodes.first_run[node]
        while run >= 0:
            num_runs += 1
            run = nodes.run_next[run]
    seqlen, first = np.empty(num_runs, np.int64), np.empty(num_runs, np.int64)
    begins, ends = np.empty(num_runs, np.int64), np.empty(num_runs, np.int64)
    cursor = np.empty(used, np.int64)
    position, count = 0, 0
    for node in order:
        cursor[node] = position
        end = position + total[node]
        run = nodes.first_run[node]
        while run >= 0:
            row = nodes.run_row[run]
            last = count - 1
            if count > 0 and begins[last] == position and ends[last] == end and first[last] + seqlen[last] == row:
                seqlen[last] += nodes.run_tokens[run]
            else:
                seqlen[count] = nodes.run_tokens[run]
                first[count] = row
                begins[count] = position
                ends[count] = end
                count += 1
            run = nodes.run_next[run]
        position += nodes.ends[node]
    slots = np.empty(len(live), np.int32)
    for slot in live:
        node = nodes.slot_node[slot]
        slots[cursor[node]] = slot
        cursor[node] += 1
    return slots, seqlen[:count], first[:count], begins[:count], ends[:count]
