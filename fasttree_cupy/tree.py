"""KV trees: the node objects of the API, the checked arrays that planning reads, and tree files.

A KV tree has one node for each shared run of tokens. A request attends to every token on the path from the
root to the node at which it ends. A list of :class:`KVTreeNode` describes such a tree, one object a node;
:class:`KVTree` holds it as arrays. ``docs/TREE_FORMAT.md`` describes the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, pairwise
from operator import attrgetter
from typing import Any, NamedTuple, NoReturn

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import flat_int64, int_vector
from fasttree_cupy.params import checked_int
from fasttree_cupy.tree_building import tree_of_block_tables, tree_of_sequences

__all__ = ["KVTree", "KVTreeNode", "as_tree", "fill_requests", "retrive_from_file", "write_tree_to_file"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]

_INT32_MAX = 2**31 - 1
_NODE_FIELDS = ("parent", "id", "seqlen", "num_children")


@dataclass
class KVTreeNode:
    """One node of a KV tree; compared by its fields, hashed by identity.

    Attributes
    ----------
    parent : int
        Id of the parent node, -1 for the root.
    id : int
        Position of the node in its list, 0 to number of nodes - 1.
    seqlen : int
        Number of tokens that the node itself holds (its ancestors' are not counted).
    num_children : int
        Number of nodes that name this one as their parent.
    requests : list of int
        Every request whose path goes through or ends at this node.
    """

    parent: int = -1
    id: int = -1
    seqlen: int = 0
    num_children: int = 0
    requests: list[int] = field(default_factory=list)

    __hash__ = object.__hash__


@dataclass(frozen=True, init=False, eq=False)
class KVTree:
    """A KV tree as read-only arrays, checked when built.

    Parameters
    ----------
    parent : array_like of int, shape (N,)
        Id of each node's parent; -1 for the root, of which there is one. Any order of nodes is fine.
    seqlen : array_like of int, shape (N,)
        Tokens that each node itself holds.
    request_node : array_like of int, shape (B,), optional
        Node at which each request's path ends; inner nodes and repeats are fine, but every leaf needs a
        request. By default each leaf, in node order, gets one.

    Attributes
    ----------
    parent : int32 (N,)
        Id of each node's parent, -1 for the root.
    seqlen : int64 (N,)
        Tokens that each node itself holds.
    request_node : int32 (B,)
        Node at which each request's path ends.
    breadth_first : int32 (N,)
        Node ids, the root first, level by level, siblings in id order.
    num_children : int32 (N,)
        Nodes that name each node as their parent.

    Raises
    ------
    TypeError
        An array holds something other than integers.
    ValueError
        The arrays do not form one tree, or a leaf has no request.
    """

    parent: Int32Array
    seqlen: Int64Array
    request_node: Int32Array
    breadth_first: Int32Array = field(repr=False)
    num_children: Int32Array = field(repr=False)

    def __init__(self, parent: npt.ArrayLike, seqlen: npt.ArrayLike, request_node: npt.ArrayLike | None = None) -> None:
        parents = int_vector(parent, "parent")
        lengths = int_vector(seqlen, "seqlen")
        if len(parents) == 0:
            raise ValueError("parent is empty, a tree needs at least one node")
        if len(parents) != len(lengths):
            raise ValueError(f"seqlen has {len(lengths)} entries, expected one a node as in parent: {len(parents)}")
        order, num_children = _structure(parents, lengths, _ARRAYS)
        ends = np.flatnonzero(num_children == 0) if request_node is None else int_vector(request_node, "request_node")
        self._set(parents, lengths, ends, order, num_children, _ARRAYS)

    def _set(
        self,
        parent: Int64Array,
        seqlen: Int64Array,
        request_node: Int64Array,
        order: Int32Array,
        num_children: Int32Array,
        where: _Where,
    ) -> None:
        _check_requests(request_node, num_children, where)
        arrays: dict[str, npt.NDArray[np.signedinteger[Any]]] = {
            "parent": parent.astype(np.int32),
            "seqlen": seqlen,
            "request_node": request_node.astype(np.int32),
            "breadth_first": order,
            "num_children": num_children,
        }
        for name, values in arrays.items():
            values.flags.writeable = False
            object.__setattr__(self, name, values)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copied or pickled tree, whose arrays NumPy has made writable."""
        for values in state.values():
            if isinstance(values, np.ndarray):
                values.flags.writeable = False
        self.__dict__.update(state)

    @classmethod
    def from_nodes(cls, nodes: Sequence[KVTreeNode]) -> KVTree:
        """Build from node objects whose ``requests`` are filled.

        Parameters
        ----------
        nodes : sequence of KVTreeNode
            One object a node, in the order of their ids. Any objects with the same attributes serve.

        Raises
        ------
        TypeError
            `nodes` is no sequence of node objects, or one of their fields is no integer.
        ValueError
            The nodes do not form a tree, or their ``requests`` contradict it; the message names node and
            field.
        """
        parent, seqlen, order, num_children = _read_nodes(nodes, _NODES)
        ends = _path_ends(nodes, parent, order)
        if len(ends) == 0:
            raise ValueError(
                "tree_info: no node lists any requests; fill_requests(tree_info) gives each leaf one "
                "(retrive_from_file and qkv_preparation do so too)"
            )
        tree = object.__new__(cls)
        tree._set(parent, seqlen, ends, order, num_children, _NODES)
        return tree

    @classmethod
    def from_parents(
        cls, parent: npt.ArrayLike, seqlen: npt.ArrayLike, request_node: npt.ArrayLike | None = None
    ) -> KVTree:
        """Build from each node's parent, as the class itself does, but with any number of roots.

        Several roots make a forest, whose requests share nothing across its trees. A node of 0 tokens is then put above
        the roots, with the id N: rows of K and V, requests and the given nodes keep their numbers.

        Parameters
        ----------
        parent : array_like of int, shape (N,)
            Id of each node's parent; -1 for each root.
        seqlen, request_node
            See `KVTree`.

        Raises
        ------
        TypeError, ValueError
            As `KVTree` does, but for several roots.
        """
        parents, lengths = int_vector(parent, "parent"), int_vector(seqlen, "seqlen")
        roots = parents == -1
        if np.count_nonzero(roots) < 2 or len(parents) != len(lengths):
            return cls(parents, lengths, request_node)
        above = len(parents)
        # The class would take the node that is put above the roots for one of the caller's.
        _check_ids("parent", parents, -1, above, "-1 (a root) or a node id")
        if request_node is not None:
            request_node = int_vector(request_node, "request_node")
            _check_ids("request_node", request_node, 0, above, "a node id")
        return cls(np.append(np.where(roots, above, parents), -1), np.append(lengths, 0), request_node)

    @classmethod
    def from_levels(cls, nodes_per_level: Sequence[int], tokens_per_level: Sequence[int]) -> KVTree:
        """Build a tree level by level.

        Child j of a level of `size` nodes hangs under node ``j * above // size`` of the level before, which
        has `above` nodes.

        Parameters
        ----------
        nodes_per_level : sequence of int
            Number of nodes of each level; the first is 1.
        tokens_per_level : sequence of int
            Tokens of each node of a level.

        Raises
        ------
        TypeError
            An argument holds something other than integers.
        ValueError
            The first level has not 1 node, a level has none, a number of tokens is negative, or the arguments are not
            equally long.
        """
        sizes = int_vector(nodes_per_level, "nodes_per_level")
        tokens = int_vector(tokens_per_level, "tokens_per_level")
        if len(sizes) == 0 or sizes[0] != 1:
            raise ValueError(f"nodes_per_level is {sizes.tolist()}, expected a first level of 1 node, the root")
        if np.any(sizes < 1):
            raise ValueError(f"nodes_per_level is {sizes.tolist()}, expected at least 1 node a level")
        if len(sizes) != len(tokens):
            raise ValueError(f"tokens_per_level has {len(tokens)} entries, expected one a level: {len(sizes)}")
        if np.any(tokens < 0):
            raise ValueError(f"tokens_per_level is {tokens.tolist()}, expected no negative number")
        firsts = np.cumsum(sizes) - sizes
        parents = [np.array([-1])]
        for level in range(1, len(sizes)):
            above, size = sizes[level - 1], sizes[level]
            parents.append(firsts[level - 1] + np.arange(size) * above // size)
        return cls(np.concatenate(parents), np.repeat(tokens, sizes))

    @classmethod
    def from_sequences(cls, token_ids: Iterable[npt.ArrayLike]) -> KVTree:
        """Build the tree of what requests have in common: tokens that several begin with are held once.

        A request may end at an inner node, and equal requests end at the same one. Where the requests share no
        first token, or one of them is empty, the root holds no tokens.

        Token t of request r has row ``tree.request_rows(r)[t]`` of K and V. Rows, and nodes, are in the order in
        which the requests, one after the other, first bring them: request 0 has rows 0 to its length - 1, request
        1 adds its tokens after the prefix that the two share, and so on.

        Parameters
        ----------
        token_ids : sequence of B array_like of int, one dimension each
            Token ids of each request.

        Raises
        ------
        TypeError
            `token_ids` is no sequence of integer sequences.
        ValueError
            There is no request.
        """
        return cls(*tree_of_sequences(token_ids))

    @classmethod
    def from_block_tables(
        cls, block_tables: npt.ArrayLike, seq_lens: npt.ArrayLike, page_size: int
    ) -> tuple[KVTree, Int32Array]:
        """Build the tree of the requests of a paged KV cache, and list the rows of the pool that hold its tokens.

        Requests share the pages that their tables begin with alike, as far as both are long. The last shared page
        may be partly filled, and by one request further than by the other: a node then ends inside it. A page that
        follows different pages in two tables is no shared prefix; each of them has it in nodes of its own.

        Parameters
        ----------
        block_tables : array_like of int, shape (B, pages)
            Page numbers of each request, first to last; entries past those that `seq_lens` needs are not read.
        seq_lens : array_like of int, shape (B,)
            Tokens of each request.
        page_size : int
            Tokens of a page: page p holds rows ``p * page_size`` to ``(p + 1) * page_size - 1`` of the pool.

        Returns
        -------
        tree : KVTree
        kv_indices : int32 (unique_tokens,)
            Row of the pool for each row of the tree's K and V: ``pool[kv_indices]`` is the K or V that goes with
            the tree, and node i has ``kv_indices[tree.kv_ptrs[i]:tree.kv_ptrs[i + 1]]``.

        Raises
        ------
        TypeError
            An argument holds something other than integers, or is not in host memory.
        ValueError
            A shape is wrong, a length is negative or exceeds the table, or a page number that is needed is negative
            or its rows do not fit in 32 bits.
        """
        tree, kv_indices = tree_of_block_tables(block_tables, seq_lens, page_size)
        return cls(*tree), kv_indices

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> KVTree:
        """Read a tree file; each leaf, in node order, gets one request.

        Parameters
        ----------
        path : str or path-like
            The file; ``docs/TREE_FORMAT.md`` describes it.

        Raises
        ------
        OSError
            The file cannot be read; FileNotFoundError: there is none.
        ValueError
            The file is malformed or holds no tree; the message names file and line.
        """
        nodes, where = _read_file(path)
        parent, seqlen, _, _ = _read_nodes(nodes, where)
        return cls(parent, seqlen)

    def to_nodes(self) -> list[KVTreeNode]:
        """The tree as node objects, ``requests`` filled."""
        parents, lengths = self.parent.tolist(), self.seqlen.tolist()
        children, requests = self.num_children.tolist(), self._request_lists()
        return [KVTreeNode(parents[i], i, lengths[i], children[i], requests[i]) for i in range(self.num_nodes)]

    def to_file(self, path: str | os.PathLike[str]) -> None:
        """Write a tree file.

        Parameters
        ----------
        path : str or path-like
            The file, which is replaced if there is one.

        Raises
        ------
        OSError
            The file cannot be written.
        ValueError
            The requests are not the leaves in node order: a tree file cannot say so.
        """
        if not np.array_equal(self.request_node, np.flatnonzero(self.num_children == 0)):
            raise ValueError(
                "requests: a tree file holds none, so a reader gives each leaf, in node order, one; "
                "this tree's requests differ and would be lost"
            )
        lines = [str(self.num_nodes)]
        columns = (
            self.parent.tolist(),
            range(self.num_nodes),
            self.seqlen.tolist(),
            self.num_children.tolist(),
        )
        lines += [f"{p} {i} {s} {c}" for p, i, s, c in zip(*columns, strict=True)]
        with open(path, "w", encoding="utf-8", newline="\n") as file:
            file.write("\n".join(lines) + "\n")

    @property
    def num_nodes(self) -> int:
        """Number of nodes N."""
        return len(self.parent)

    @property
    def batch_size(self) -> int:
        """Number of requests B."""
        return len(self.request_node)

    @cached_property
    def kv_ptrs(self) -> Int64Array:
        """First row of each node's tokens in the K and V buffers, and their total: int64 (N + 1,)."""
        ptrs = np.zeros(self.num_nodes + 1, np.int64)
        np.cumsum(self.seqlen, out=ptrs[1:])
        ptrs.flags.writeable = False
        return ptrs

    @property
    def unique_tokens(self) -> int:
        """Tokens stored: each node's counted once."""
        return int(self.kv_ptrs[-1])

    @cached_property
    def path_tokens(self) -> Int64Array:
        """Tokens each request attends to: int64 (B,)."""
        tokens: Int64Array = _path_tokens(self.parent, self.seqlen, self.breadth_first)[self.request_node]
        tokens.flags.writeable = False
        return tokens

    def node_requests(self) -> tuple[Int64Array, Int32Array]:
        """Requests whose path goes through each node.

        Returns
        -------
        offsets : int64 (N + 1,)
            Node i's requests are ``requests[offsets[i]:offsets[i + 1]]``, ascending.
        requests : int32 (offsets[N],)
        """
        offsets, requests = _node_requests(self.parent, self.request_node)
        return offsets, requests

    def request_rows(self, request: int) -> Int64Array:
        """Rows of K and V that a request attends to, in the order of its tokens: int64 (path_tokens[request],).

        Parameters
        ----------
        request : int
            0 to batch_size - 1.

        Raises
        ------
        TypeError, ValueError
            `request` is no integer from 0 to batch_size - 1.
        """
        request = checked_int(request, "request", least=0)
        if request >= self.batch_size:
            raise ValueError(f"request is {request}, expected 0 to {self.batch_size - 1}")
        runs: list[Int64Array] = []
        node = int(self.request_node[request])
        while node >= 0:
            runs.append(np.arange(self.kv_ptrs[node], self.kv_ptrs[node + 1]))
            node = int(self.parent[node])
        return np.concatenate(runs[::-1])

    def _request_lists(self) -> list[list[int]]:
        offsets, requests = self.node_requests()
        bounds, flat = offsets.tolist(), requests.tolist()
        return [flat[a:b] for a, b in pairwise(bounds)]


def as_tree(tree_info: KVTree | Sequence[KVTreeNode]) -> KVTree:
    """`tree_info` as a :class:`KVTree`: itself, or built from its nodes (see :meth:`KVTree.from_nodes`)."""
    return tree_info if isinstance(tree_info, KVTree) else KVTree.from_nodes(tree_info)


def fill_requests(tree_info: Sequence[KVTreeNode]) -> None:
    """Give the leaves, in node order, requests 0, 1, ... and each ancestor those of its subtree.

    Nothing changes where any node lists requests already, so a second call is harmless.

    Parameters
    ----------
    tree_info : sequence of KVTreeNode
        One object a node, in the order of their ids.

    Raises
    ------
    TypeError, ValueError
        The nodes do not form a tree, or one has no list of requests.
    """
    parent, seqlen, _, _ = _read_nodes(tree_info, _NODES)
    if _listed_requests(tree_info)[1]:
        return
    for node, requests in zip(tree_info, KVTree(parent, seqlen)._request_lists(), strict=True):
        node.requests = requests


def retrive_from_file(filepath: str | os.PathLike[str]) -> list[KVTreeNode]:
    """Read a tree file into nodes, sorted by id, ``requests`` filled (see :func:`fill_requests`).

    Parameters
    ----------
    filepath : str or path-like
        See `KVTree.from_file`.

    Raises
    ------
    OSError
        The file cannot be read; FileNotFoundError: there is none.
    ValueError
        The file is malformed or holds no tree; the message names file and line.
    """
    return KVTree.from_file(filepath).to_nodes()


def write_tree_to_file(tree_info: KVTree | Sequence[KVTreeNode], filepath: str | os.PathLike[str]) -> None:
    """Write a tree file; ``requests`` may be unfilled.

    Parameters
    ----------
    tree_info : KVTree or sequence of KVTreeNode
        The tree.
    filepath : str or path-like
        The file, which is replaced if there is one.

    Raises
    ------
    OSError
        The file cannot be written.
    TypeError, ValueError
        `tree_info` is no tree, or its requests are not the leaves in node order (a file cannot say so).
    """
    if not isinstance(tree_info, KVTree):
        parent, seqlen, _, _ = _read_nodes(tree_info, _NODES)
        filled = _listed_requests(tree_info)[1]
        tree_info = KVTree.from_nodes(tree_info) if filled else KVTree(parent, seqlen)
    tree_info.to_file(filepath)


# Checks in Python: they turn the codes of the compiled passes below into messages.


class _Where(NamedTuple):
    """How messages name the tree and one field of one of its nodes."""

    whole: str
    field: Callable[[str, int], str]


_ARRAYS = _Where("parent", lambda name, i: f"{name}[{i}]")
_NODES = _Where("tree_info", lambda name, i: f"tree_info[{i}].{name}")


def _read_nodes(nodes: Sequence[KVTreeNode], where: _Where) -> tuple[Int64Array, Int64Array, Int32Array, Int32Array]:
    """Check all but the requests; returns parent, seqlen, breadth_first, num_children."""
    if not isinstance(nodes, Sequence) or isinstance(nodes, (str, bytes)):
        raise TypeError(f"{where.whole} is {type(nodes).__name__}, expected a KVTree or a sequence of KVTreeNode")
    if len(nodes) == 0:
        raise ValueError(f"{where.whole} is empty, a tree needs at least one node")
    try:
        flat = list(chain.from_iterable(map(attrgetter(*_NODE_FIELDS), nodes)))
    except AttributeError:
        _raise_not_a_node(nodes, where)
    width = len(_NODE_FIELDS)
    table = flat_int64(flat, lambda k: where.field(_NODE_FIELDS[k % width], k // width)).reshape(-1, width)
    parent, ids, seqlen, declared = np.ascontiguousarray(table.T)
    if (wrong := np.flatnonzero(ids != np.arange(len(ids)))).size:
        i = int(wrong[0])
        raise ValueError(f"{where.field('id', i)} is {ids[i]}, expected {i}: ids are 0 to {len(ids) - 1} in list order")
    order, num_children = _structure(parent, seqlen, where)
    if (wrong := np.flatnonzero(declared != num_children)).size:
        i = int(wrong[0])
        named = "1 node names" if num_children[i] == 1 else f"{num_children[i]} nodes name"
        raise ValueError(f"{where.field('num_children', i)} is {declared[i]}, but {named} it as its parent")
    return parent, seqlen, order, num_children


def _raise_not_a_node(nodes: Sequence[object], where: _Where) -> NoReturn:
    for i, node in enumerate(nodes):
        missing = [name for name in (*_NODE_FIELDS, "requests") if not hasattr(node, name)]
        if missing:
            raise TypeError(
                f"{where.whole}[{i}] is {type(node).__name__} without {', '.join(missing)}, expected a KVTreeNode"
            )
    raise TypeError(f"{where.whole} holds nodes whose fields cannot be read")


def _check_ids(name: str, ids: Int64Array, least: int, end: int, expected: str) -> None:
    """Check that `ids` go from `least` to below `end`."""
    wrong = np.flatnonzero((ids < least) | (ids >= end))
    if len(wrong) > 0:
        raise ValueError(f"{name}[{wrong[0]}] is {ids[wrong[0]]}, expected {expected} from 0 to {end - 1}")


def _structure(parent: Int64Array, seqlen: Int64Array, where: _Where) -> tuple[Int32Array, Int32Array]:
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
        raise ValueError(f"{where.field('seqlen', node)} is {value}, expected 0 to {_INT32_MAX} tokens")
    if code == _NO_ROOT:
        raise ValueError(f"{where.whole}: no node has parent -1, expected one root")
    if code == _TWO_ROOTS:
        raise ValueError(f"{where.field('parent', node)} is -1, but node {value} is a root already, expected one root")
    raise ValueError(f"{where.field('parent', node)} is {value}: node {node} is its own ancestor, a cycle")


def _listed_requests(nodes: Sequence[KVTreeNode]) -> tuple[Int64Array, list[int]]:
    """How many requests each node lists, and these, one list after the other; checks no more than that."""
    try:
        lists = [node.requests for node in nodes]
    except AttributeError:
        _raise_not_a_node(nodes, _NODES)
    try:
        lengths = np.fromiter(map(len, lists), np.int64, len(lists))
        flat = list(chain.from_iterable(lists))
    except TypeError:
        i = next(i for i, r in enumerate(lists) if not isinstance(r, Iterable) or not hasattr(r, "__len__"))
        raise TypeError(f"tree_info[{i}].requests is {type(lists[i]).__name__}, expected a list of integers") from None
    return lengths, flat


def _path_ends(nodes: Sequence[KVTreeNode], parent: Int64Array, order: Int32Array) -> Int64Array:
    """Check the nodes' requests; returns the node at which each ends, empty where no node lists any."""
    lengths, flat = _listed_requests(nodes)
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


def _check_requests(request_node: Int64Array, num_children: Int32Array, where: _Where) -> None:
    wrong = np.flatnonzero((request_node < 0) | (request_node >= len(num_children)))
    if wrong.size:
        r = int(wrong[0])
        raise ValueError(
            f"request_node[{r}] is {request_node[r]}, expected a node id from 0 to {len(num_children) - 1}"
        )
    ended = np.zeros(len(num_children), np.bool_)
    ended[request_node] = True
    without = np.flatnonzero((num_children == 0) & ~ended)
    if without.size:
        i = int(without[0])
        name = "request_node" if where is _ARRAYS else where.field("requests", i)
        raise ValueError(f"{name}: leaf {i} has no request, expected at least one a leaf")


# Tree files.


def _read_file(path: str | os.PathLike[str]) -> tuple[list[KVTreeNode], _Where]:
    """Nodes of a tree file in id order, and how messages name them."""
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not a text file, expected a tree file") from None
    rows = [(k, words) for k, line in enumerate(text.split("\n"), start=1) if (words := line.split())]
    if not rows:
        raise ValueError(f"{name}, line 1: the file is empty, expected the number of nodes")
    count = _read_count(name, *rows[0])
    records = [(_read_record(name, line, words), line) for line, words in rows[1 : count + 1]]
    if len(rows) > count + 1:
        raise ValueError(
            f"{name}, line {rows[count + 1][0]}: expected the end, line {rows[0][0]} promises {count} nodes"
        )
    if len(records) < count:
        raise ValueError(
            f"{name}, line {rows[-1][0]}: the file ends after {len(records)} nodes, line {rows[0][0]} promises {count}"
        )
    records.sort(key=lambda record: record[0].id)
    for i, (node, line) in enumerate(records):
        if node.id != i:
            raise ValueError(f"{name}, line {line}: id is {node.id}, expected each of 0 to {count - 1} once")
    lines = [line for _, line in records]
    return [node for node, _ in records], _Where(name, lambda what, i: f"{name}, line {lines[i]}: {what}")


def _read_ints(words: list[str]) -> list[int] | None:
    """The words as integers, None where one is not."""
    # int() alone would also take "1_0" and the digits of other scripts.
    if not all(re.fullmatch(r"[+-]?[0-9]{1,18}", word) for word in words):
        return None
    return [int(word) for word in words]


def _read_count(name: str, line: int, words: list[str]) -> int:
    values = _read_ints(words)
    if values is None or len(values) != 1 or values[0] < 1:
        raise ValueError(f"{name}, line {line}: {' '.join(words)!r}, expected the number of nodes")
    return values[0]


def _read_record(name: str, line: int, words: list[str]) -> KVTreeNode:
    expected = "expected 4 integers: parent id seqlen num_children"
    if len(words) != len(_NODE_FIELDS):
        raise ValueError(f"{name}, line {line}: {len(words)} fields, {expected}")
    values = _read_ints(words)
    if values is None:
        raise ValueError(f"{name}, line {line}: {' '.join(words)!r}, {expected}")
    parent, node_id, seqlen, num_children = values
    return KVTreeNode(parent, node_id, seqlen, num_children)


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
        if seqlen[i] < 0 or seqlen[i] > _INT32_MAX:
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


@njit
def _node_requests(parent: Int32Array, request_node: Int32Array) -> tuple[Int64Array, Int32Array]:
    offsets = np.zeros(len(parent) + 1, np.int64)
    for end in request_node:
        node = end
        while node >= 0:
            offsets[node + 1] += 1
            node = parent[node]
    for i in range(len(parent)):
        offsets[i + 1] += offsets[i]
    cursor = offsets[:-1].copy()
    requests = np.empty(offsets[-1], np.int32)
    for r in range(len(request_node)):  # ascending, hence each node's list is ascending too
        node = request_node[r]
        while node >= 0:
            requests[cursor[node]] = r
            cursor[node] += 1
            node = parent[node]
    return offsets, requests


@njit
def _path_tokens(parent: Int32Array, seqlen: Int64Array, order: Int32Array) -> Int64Array:
    tokens = seqlen.copy()
    for node in order[1:]:
        tokens[node] += tokens[parent[node]]
    return tokens
