"""Radix trees of requests: what their token ids, or the pages of a paged KV cache, have in common.

Both are one problem: request r is a list of keys, one a page of tokens (a token id is the key of a page of one
token), and two requests share their tokens up to the first page in which their keys differ, or to the end of the
shorter one. That end may lie inside a page. Requests are inserted one after the other; a hash table finds the child
of a node by its next key, so the work grows with the keys, not with the width of the tree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit
from fasttree_cupy.integers import checked_int, host_array, int_matrix, int_vector

__all__ = ["RadixTree", "tree_of_block_tables", "tree_of_sequences"]

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


class RadixTree(NamedTuple):
    """The arrays that a ``KVTree`` is built from; a node's children have larger ids than the node.

    Attributes
    ----------
    parent, seqlen : int64 (N,)
    request_node : int64 (B,)
    """

    parent: Int64Array
    seqlen: Int64Array
    request_node: Int64Array


def tree_of_sequences(token_ids: Iterable[npt.ArrayLike]) -> RadixTree:
    """The tree of ``KVTree.from_sequences``, which says what it holds and raises."""
    if hasattr(token_ids, "__array__"):
        token_ids = host_array(token_ids, "token_ids")
        if token_ids.ndim == 0:
            raise ValueError("token_ids has shape (), expected a row of integers a request")
    elif isinstance(token_ids, (str, bytes)) or not isinstance(token_ids, Iterable):
        raise TypeError(f"token_ids is {type(token_ids).__name__}, expected a sequence of integer sequences")
    sequences = [int_vector(ids, f"token_ids[{r}]") for r, ids in enumerate(token_ids)]
    if not sequences:
        raise ValueError("token_ids is empty, expected a sequence a request")
    lengths = np.array([len(ids) for ids in sequences], np.int64)
    keys = _Keys(np.concatenate(sequences), np.cumsum(lengths) - lengths, lengths, 1)
    tree, _ = _number(*_insert(keys))
    return tree


def tree_of_block_tables(
    block_tables: npt.ArrayLike, seq_lens: npt.ArrayLike, page_size: int
) -> tuple[RadixTree, Int32Array]:
    """The tree and rows of ``KVTree.from_block_tables``, which says what they hold and raises."""
    page_size = checked_int(page_size, "page_size")
    table = int_matrix(block_tables, "block_tables")
    lengths = int_vector(seq_lens, "seq_lens")
    _check_lengths(lengths, table, page_size)
    columns = -(-int(lengths.max()) // page_size)  # a table may be much wider than its longest request
    # Always a copy: Numba would compile the passes once more for an array that is read-only.
    pages = table[:, :columns].astype(np.int64)
    first = np.arange(len(pages), dtype=np.int64) * columns
    keys = _Keys(pages.ravel(), first, lengths, page_size)
    tree, runs = _number(*_insert(keys))
    num_pages = 2**31 // page_size  # all of their rows fit in 32 bits
    rows, wrong = _pool_rows(keys, runs, num_pages)
    if wrong >= 0:
        r, j = divmod(wrong, columns)
        raise ValueError(f"block_tables[{r}, {j}] is {table[r, j]}, expected a page number from 0 to {num_pages - 1}")
    return tree, rows


def _check_lengths(lengths: Int64Array, table: npt.NDArray[Any], page_size: int) -> None:
    batch_size, columns = table.shape
    if batch_size == 0:
        raise ValueError("block_tables is empty, expected a row a request")
    if len(lengths) != batch_size:
        raise ValueError(f"seq_lens has {len(lengths)} entries, expected one a row of block_tables: {batch_size}")
    most = columns * page_size
    wrong = np.flatnonzero((lengths < 0) | (lengths > most))
    if wrong.size:
        r = int(wrong[0])
        raise ValueError(
            f"seq_lens[{r}] is {lengths[r]}, expected 0 to {most}: {columns} pages of {page_size} tokens a row"
        )


# Compiled passes.


class _Keys(NamedTuple):
    """Request r has ``lengths[r]`` tokens, the page of token t the key ``values[first[r] + t // page_size]``."""

    values: Int64Array
    first: Int64Array
    lengths: Int64Array
    page_size: int


class _Nodes(NamedTuple):
    """Node i holds tokens ``[begin[i], end[i])`` of request ``owner[i]``: int64 each."""

    parent: Int64Array
    owner: Int64Array
    begin: Int64Array
    end: Int64Array


@njit
def _insert(keys: _Keys) -> tuple[_Nodes, Int64Array]:
    """Insert the requests in order; returns the nodes, the first an empty root, and the node at which each ends."""
    most = 2 * len(keys.lengths) + 1  # a request adds a leaf and splits a node at most
    fields = np.empty((4, most), np.int64)
    nodes = _Nodes(fields[0], fields[1], fields[2], fields[3])
    _set_node(nodes, 0, -1, 0, 0, 0)
    count = 1
    slots = _empty_slots(most)
    request_node = np.zeros(len(keys.lengths), np.int64)
    for r in range(len(keys.lengths)):
        node = 0
        position = 0
        while position < keys.lengths[r]:
            slot = _find(keys, nodes, slots, node, r, position)
            if slots[slot] < 0:
                _set_node(nodes, count, node, r, position, keys.lengths[r])
                slots[slot] = count
                count += 1
            position = _shared_end(keys, nodes, slots[slot], r)
            if position < nodes.end[slots[slot]]:
                _split(keys, nodes, slots, slot, position, count)
                count += 1
            node = slots[slot]
        request_node[r] = node
    return _Nodes(fields[0, :count], fields[1, :count], fields[2, :count], fields[3, :count]), request_node


@njit
def _set_node(nodes: _Nodes, node: int, parent: int, owner: int, begin: int, end: int) -> None:
    nodes.parent[node] = parent
    nodes.owner[node] = owner
    nodes.begin[node] = begin
    nodes.end[node] = end


@njit
def _split(keys: _Keys, nodes: _Nodes, slots: Int64Array, slot: int, position: int, upper: int) -> None:
    """Move the tokens before `position` of the node in `slot` to a new node above it, `upper`."""
    # The lower part keeps its id, so its children keep their parent and their slots.
    lower = slots[slot]
    _set_node(nodes, upper, nodes.parent[lower], nodes.owner[lower], nodes.begin[lower], position)
    _set_node(nodes, lower, upper, nodes.owner[lower], position, nodes.end[lower])
    slots[slot] = upper
    slots[_find(keys, nodes, slots, upper, nodes.owner[lower], position)] = lower


@njit
def _empty_slots(most: int) -> Int64Array:
    """A hash table at most half full with `most` nodes; its size is a power of two."""
    size = 1
    while size < 2 * most:
        size *= 2
    return np.full(size, -1, np.int64)


@njit
def _find(keys: _Keys, nodes: _Nodes, slots: Int64Array, parent: int, request: int, position: int) -> int:
    """Slot of the child of `parent` whose first page is that of `request` at `position`, or an empty slot for it."""
    page = position // keys.page_size
    key = keys.values[keys.first[request] + page]
    mixed = (key ^ (key >> 32)) + parent * 0x1E3779B97F4A7C15
    mixed = (mixed ^ (mixed >> 29)) * 0x3F58476D1CE4E5B9
    slot: int = (mixed >> 32) & (len(slots) - 1)
    while slots[slot] >= 0:
        child = slots[slot]
        if nodes.parent[child] == parent and keys.values[keys.first[nodes.owner[child]] + page] == key:
            break
        slot = (slot + 1) & (len(slots) - 1)
    return slot


@njit
def _shared_end(keys: _Keys, nodes: _Nodes, node: int, request: int) -> int:
    """Position up to which `request` shares the tokens of `node`, whose first page it is known to share."""
    end = min(nodes.end[node], keys.lengths[request])
    first, other = keys.first[nodes.owner[node]], keys.first[request]
    page = nodes.begin[node] // keys.page_size + 1
    while page * keys.page_size < end and keys.values[first + page] == keys.values[other + page]:
        page += 1
    shared: int = min(end, page * keys.page_size)
    return shared


@njit
def _number(nodes: _Nodes, request_node: Int64Array) -> tuple[RadixTree, _Nodes]:
    """Number the nodes as the requests, one after the other, first reach them.

    Returns the tree and its nodes. The empty root goes where it has one child and no request of its own.
    """
    parent = nodes.parent.copy()
    top = np.flatnonzero(parent == 0)
    if len(top) == 1 and np.all(request_node != 0):
        parent[top[0]] = -1
    number = np.full(len(parent), -1, np.int64)
    order = np.empty(len(parent), np.int64)
    count = 0
    for end in request_node:
        node = end
        begin = count
        while node >= 0 and number[node] < 0:
            order[count] = node
            count += 1
            node = parent[node]
        order[begin:count] = order[begin:count][::-1].copy()
        for i in range(begin, count):
            number[order[i]] = i
    order = order[:count]
    above = parent[order]
    for i in range(count):
        if above[i] >= 0:
            above[i] = number[above[i]]
    made = _Nodes(above, nodes.owner[order], nodes.begin[order], nodes.end[order])
    return RadixTree(above, made.end - made.begin, number[request_node]), made


@njit
def _pool_rows(keys: _Keys, nodes: _Nodes, num_pages: int) -> tuple[Int32Array, int]:
    """Row of the pool for each token, node after node, and where in ``keys.values`` a page is wrong, else -1."""
    size = keys.page_size
    rows = np.empty(np.sum(nodes.end - nodes.begin), np.int32)
    count = 0
    for i in range(len(nodes.owner)):
        position = nodes.begin[i]
        while position < nodes.end[i]:
            place = keys.first[nodes.owner[i]] + position // size
            page = keys.values[place]
            if page < 0 or page >= num_pages:
                return rows, place
            offset = position % size
            run = min(size - offset, nodes.end[i] - position)
            for k in range(run):
                rows[count + k] = page * size + offset + k
            count += run
            position += run
    return rows, -1
