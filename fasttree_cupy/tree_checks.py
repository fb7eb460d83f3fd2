"""Checks that nodes, or the arrays of a tree, form one tree, whose requests end at each of its leaves.

Messages name what is wrong as the caller gave it: see `Where`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import INT32_MAX, flat_int64

__all__ = [
    "ARRAYS",
    "NODES",
    "NODE_FIELDS",
    "Where",
    "check_ids",
    "check_requests",
    "check_structure",
    "check_table",
    "listed_requests",
    "path_ends",
    "read_nodes",
]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

NODE_FIELDS = ("parent", "id", "seqlen", "num_children")
"""Of a node, in the order of a line of a tree file."""


class Where(NamedTuple):
    """How messages name the tree and one field of one of its nodes."""

    whole: str
    field: Callable[[str, int], str]


ARRAYS = Where("parent", lambda name, i: f"{name}[{i}]")
"""Of a tree given as arrays."""
NODES = Where("tree_info", lambda name, i: f"tree_info[{i}].{name}")
"""Of a tree given as node objects."""


def read_nodes(nodes: Sequence[Any]) -> tuple[Int64Array, Int64Array, Int32Array, Int32Array]:
    """Check all of node objects but their requests; returns parent, seqlen, breadth_first, num_children."""
    if not isinstance(nodes, Sequence) or isinstance(nodes, (str, bytes)):
        raise TypeError(f"{NODES.whole} is {type(nodes).__name__}, expected a KVTree or a sequence of KVTreeNode")
    if len(nodes) == 0:
        raise ValueError(f"{NODES.whole} is empty, a tree needs at least one node")
    try:
        flat = list(chain.from_iterable(map(attrgetter(*NODE_FIELDS), nodes)))
    except AttributeError:
        _raise_not_a_node(nodes)
    width = len(NODE_FIELDS)
    table = flat_int64(flat, lambda k: NODES.field(NODE_FIELDS[k % width], k // width)).reshape(-1, width)
    return check_table(table, NODES)


def _raise_not_a_node(nodes: Sequence[object]) -> NoReturn:
    for i, node in enumerate(nodes):
        missing = [name for name in (*NODE_FIELDS, "requests") if not hasattr(node, name)]
        if missing:
            raise TypeError(
                f"{NODES.whole}[{i}] is {type(node).__name__} without {', '.join(missing)}, expected a KVTreeNode"
            )
    raise TypeError(f"{NODES.whole} holds nodes whose fields cannot be read")


def check_table(table: Int64Array, where: Where) -> tuple[Int64Array, Int64Array, Int32Array, Int32Array]:
    """Check nodes, (N, 4) with columns `NODE_FIELDS`; returns parent, seqlen, breadth_first, num_children."""
    parent, ids, seqlen, declared = np.ascontiguousarray(table.T)
    if (wrong := np.flatnonzero(ids != np.arange(len(ids)))).size:
        i = int(wrong[0])
        raise ValueError(f"{where.field('id', i)} is {ids[i]}, expected {i}: ids are 0 to {len(ids) - 1} in list order")
    order, num_children = check_structure(parent, seqlen, where)
    if (wrong := np.flatnonzero(declared != num_children)).size:
        i = int(wrong[0])
        named = "1 node names" if num_children[i] == 1 else f"{num_children[i]} nodes name"
        raise ValueError(f"{where.field('num_children', i)} is {declared[i]}, but {named} it as its parent")
    return parent, seqlen, order, num_children


def check_ids(name: str, ids: Int64Array, least: int, end: int, expected: str) -> None:
    """Check that `ids` go from `least` to below `end`."""
    wrong = np.flatnonzero((ids < least) | (ids >= end))
    if len(wrong) > 0:
        raise ValueError(f"{name}[{wrong[0]}] is {ids[wrong[0]]}, expected {expected} from 0 to {end - 1}")


def check_structure(parent: Int64Array, seqlen: Int64Array, where: Where) -> tuple[Int32Array, Int32Array]:
    """Check that `parent` forms one tree; returns breadth_first and num_children."""
    order = np.empty(len(parent), np.int32)
    num_children = np.zeros(len(parent), np.int32)
    code, node, value = _scan_structure(parent, seqlen, order, num_children)
    if code == _OK:
        return order, num_children
    if code == _BAD_PARENT:
        what = f"is {value}, expected -1 (the root) or a node id from 0 to {len(parent) - 1}"
        raise ValueError(f"{where.field('parent', node)} {what}")
    if code == _BAD_SEQLEN:
        raise ValueError(f"{where.field('seqlen', node)} is {value}, expected 0 to {INT32_MAX} tokens")
    if code == _NO_ROOT:
        raise ValueError(f"{where.whole}: no node has parent -1, expected one root")
    if code == _TWO_ROOTS:
        raise ValueError(f"{where.field('parent', node)} is -1, but node {value} is a root already, expected one root")
    raise ValueError(f"{where.field('parent', node)} is {value}: node {node} is its own ancestor, a cycle")


def listed_requests(nodes: Sequence[Any]) -> tuple[Int64Array, list[int]]:
    """How many requests each node lists, and these, one list after the other; checks no more than that."""
    try:
        lists = [node.requests for node in nodes]
    except AttributeError:
        _raise_not_a_node(nodes)
    try:
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        flat = list(chain.from_iterable(lists))
    except TypeError:
        i = next(i for i, r in enumerate(lists) if not isinstance(r, Iterable) or not hasattr(r, "__len__"))
        raise TypeError(f"tree_info[{i}].requests is {type(lists[i]).__name__}, expected a list of integers") from None
    return lengths, flat


def path_ends(nodes: Sequence[Any], parent: Int64Array, order: Int32Array) -> Int64Array:
    """Check the nodes' requests; returns the node at which each ends, empty where no node lists any."""
    lengths, flat = listed_requests(nodes)
    offsets = np.zeros(len(nodes) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    requests = flat_int64(flat, lambda k: f"an entry of tree_info[{np.searchsorted(offsets, k, 'right') - 1}].requests")
    last = np.full(len(requests), -1, np.int64)
    code, node, value, other = _scan_requests(parent, order, offsets, requests, last)
    if code == _OK:
        ends: Int64Array = last[:value]
        return ends
    name = f"tree_info[{node}].requests"
    if code == _BAD_REQUEST:
        raise ValueError(f"{name} holds {value}, but request ids are 0, 1, ... without gaps")
    if code == _REQUEST_GAP:
        raise ValueError(f"{name} (the root) misses request {value}, but request ids are 0, 1, ... without gaps")
    if code == _DOUBLED:
        raise ValueError(f"{name} lists request {value} twice")
    if code == _TWO_PATHS:
        raise ValueError(f"{name} lists request {value}, as does tree_info[{other}].requests, which is on another path")
    raise ValueError(f"tree_info[{other}].requests misses request {value}, which its child {node} lists")


def check_requests(request_node: Int64Array, num_children: Int32Array, where: Where) -> None:
    """Check that requests end at nodes there are, and at every leaf."""
    check_ids("request_node", request_node, 0, len(num_children), "a node id")
    ended = np.zeros(len(num_children), np.bool_)
    ended[request_node] = True
    without = np.flatnonzero((num_children == 0) & ~ended)
    if without.size:
        i = int(without[0])
        name = "request_node" if where is ARRAYS else where.field("requests", i)
        raise ValueError(f"{name}: leaf {i} has no request, expected at least one a leaf")


# Compiled passes. Errors go out as a code with the node and values that a message needs.

_OK = 0
_BAD_PARENT = 1
_BAD_SEQLEN = 2
_NO_ROOT = 3
_TWO_ROOTS = 4
_CYCLE = 5
_BAD_REQUEST = 6
_REQUEST_GAP = 7
_DOUBLED = 8
_TWO_PATHS = 9
_MISSING = 10


@njit
def _scan_structure(
    parent: Int64Array, seqlen: Int64Array, order: Int32Array, num_children: Int32Array
) -> tuple[int, int, int]:
    """Fill `order` and `num_children` (zeros before); returns code, node, value."""
    n = len(parent)
    root = -1
    for i in range(n):
        p = parent[i]
        if p < -1 or p >= n:
            return _BAD_PARENT, i, p
        if seqlen[i] < 0 or seqlen[i] > INT32_MAX:
            return _BAD_SEQLEN, i, seqlen[i]
        if p >= 0:
            num_children[p] += 1
        elif root >= 0:
            return _TWO_ROOTS, i, root
        else:
            root = i
    if root < 0:
        return _NO_ROOT, 0, 0

    # Children grouped by parent, each group in id order.
    children = np.empty(n, np.int64)
    ends = np.empty(n, np.int64)
    total = 0
    for i in range(n):
        ends[i] = total
        total += num_children[i]
    for i in range(n):
        if parent[i] >= 0:
            children[ends[parent[i]]] = i
            ends[parent[i]] += 1

    order[0] = root
    reached = 1
    position = 0
    while position < reached:
        v = order[position]
        for c in children[ends[v] - num_children[v] : ends[v]]:
            order[reached] = c
            reached += 1
        position += 1
    if reached == n:
        return _OK, 0, 0

    # With one root, a node that is not reached leads into a cycle: n steps up end on it.
    seen = np.zeros(n, np.bool_)
    seen[order[:reached]] = True
    node = 0
    while seen[node]:
        node += 1
    for _ in range(n):
        node = parent[node]
    return _CYCLE, node, parent[node]


@njit
def _scan_requests(
    parent: Int64Array, order: Int32Array, offsets: Int64Array, requests: Int64Array, last: Int64Array
) -> tuple[int, int, int, int]:
    """Follow each request down: `last` (-1 before) holds the node reached so far, at the end the path's end.

    Returns code, node, value, other; with code _OK the value is the number of requests.
    """
    batch_size = 0
    for node in order:
        above = parent[node]
        for k in range(offsets[node], offsets[node + 1]):
            r = requests[k]
            if r < 0 or r >= len(last):
                return _BAD_REQUEST, node, r, 0
            if last[r] != above:
                if last[r] == node:
                    return _DOUBLED, node, r, 0
                if last[r] >= 0 and parent[last[r]] == above:
                    return _TWO_PATHS, node, r, last[r]
                return _MISSING, node, r, above
            last[r] = node
            batch_size = max(batch_size, r + 1)
    for r in range(batch_size):
        if last[r] < 0:
            return _REQUEST_GAP, order[0], r, 0
    return _OK, 0, batch_size, 0
