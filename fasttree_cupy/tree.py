"""KV trees: the node objects of the API, and the checked arrays that planning reads.

A KV tree has one node for each shared run of tokens. A request attends to every token on the path from the
root to the node at which it ends. A list of :class:`KVTreeNode` describes such a tree, one object a node;
:class:`KVTree` holds it as arrays. What makes a tree is checked in ``tree_checks``, files are read and written by
``tree_file``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import checked_int, int_vector
from fasttree_cupy.tree_building import tree_of_block_tables, tree_of_sequences
from fasttree_cupy.tree_checks import (
    ARRAYS,
    NODES,
    Where,
    check_ids,
    check_requests,
    check_structure,
    check_table,
    listed_requests,
    path_ends,
    read_nodes,
)
from fasttree_cupy.tree_file import read_file, write_file

__all__ = ["KVTree", "KVTreeNode", "as_tree", "fill_requests", "retrive_from_file", "write_tree_to_file"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


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
        order, num_children = check_structure(parents, lengths, ARRAYS)
        ends = np.flatnonzero(num_children == 0) if request_node is None else int_vector(request_node, "request_node")
        self._set(parents, lengths, ends, order, num_children, ARRAYS)

    def _set(
        self,
        parent: Int64Array,
        seqlen: Int64Array,
        request_node: Int64Array,
        order: Int32Array,
        num_children: Int32Array,
        where: Where,
    ) -> None:
        check_requests(request_node, num_children, where)
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
        parent, seqlen, order, num_children = read_nodes(nodes)
        ends = path_ends(nodes, parent, order)
        if len(ends) == 0:
            raise ValueError(
                "tree_info: no node lists any requests; fill_requests(tree_info) gives each leaf one "
                "(retrive_from_file and qkv_preparation do so too)"
            )
        tree = object.__new__(cls)
        tree._set(parent, seqlen, ends, order, num_children, NODES)
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
        check_ids("parent", parents, -1, above, "-1 (a root) or a node id")
        if request_node is not None:
            request_node = int_vector(request_node, "request_node")
            check_ids("request_node", request_node, 0, above, "a node id")
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
        parent, seqlen, _, _ = check_table(*read_file(path))
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
        columns = self.parent, np.arange(self.num_nodes), self.seqlen, self.num_children
        write_file(path, np.stack(columns, axis=1))

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
    parent, seqlen, _, _ = read_nodes(tree_info)
    if listed_requests(tree_info)[1]:
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
        parent, seqlen, _, _ = read_nodes(tree_info)
        filled = listed_requests(tree_info)[1]
        tree_info = KVTree.from_nodes(tree_info) if filled else KVTree(parent, seqlen)
    tree_info.to_file(filepath)


# Compiled passes.


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
