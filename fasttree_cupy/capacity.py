"""How far the tree of a plan may grow: `Capacity`."""

from __future__ import annotations

from typing import NamedTuple

from fasttree_cupy.integers import checked_int
from fasttree_cupy.tree import KVTree

__all__ = ["Capacity", "checked_capacity"]


class Capacity(NamedTuple):
    """What a growing plan makes room for, once and for all: its arrays never move.

    Attributes
    ----------
    requests : int
        Request slots: rows of Q, of the output and of the LSE. At least the tree's requests.
    tokens : int
        Tokens that the tree may hold at a time, each stored once, as `KVTree.unique_tokens` counts them. At least the
        tree's own.
    """

    requests: int
    tokens: int


def checked_capacity(capacity: object, tree: KVTree) -> Capacity:
    """`capacity`, which must hold the tree; TypeError or ValueError in its name."""
    if not isinstance(capacity, Capacity):
        raise TypeError(f"capacity is {type(capacity).__name__}, expected a Capacity")
    requests = checked_int(capacity.requests, "capacity.requests")
    tokens = checked_int(capacity.tokens, "capacity.tokens", least=0)
    if requests < tree.batch_size:
        raise ValueError(f"capacity.requests is {requests}, expected {tree.batch_size} at least, as the tree has")
    if tokens < tree.unique_tokens:
        raise ValueError(f"capacity.tokens is {tokens}, expected {tree.unique_tokens} at least, as the tree has")
    return Capacity(requests, tokens)
