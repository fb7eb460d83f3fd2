"""The contract between planning and execution: the thirteen documented values, in their documented order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from fasttree_cupy.integers import INT32_MAX

__all__ = ["UNKNOWN_LENGTHS", "MetadataTuple", "Phase", "PhaseNodeNums"]

UNKNOWN_LENGTHS = (INT32_MAX, INT32_MAX)
"""Of the longest vnodes of two phases."""


class PhaseNodeNums(list[int]):
    """Number of vnodes of each phase, as ``[phase 0, phase 1]``.

    Attributes
    ----------
    num_tokens : int
        Rows that the K and V buffers must have: decoding checks them without reading device memory.
    longest_vnodes : tuple of 2 int
        Most tokens of a vnode of each phase: which kernel is fastest depends on it, the result does not.
    """

    def __init__(self, nums: Iterable[int], num_tokens: int, longest_vnodes: tuple[int, int] = UNKNOWN_LENGTHS) -> None:
        super().__init__(nums)
        self.num_tokens = num_tokens
        self.longest_vnodes = longest_vnodes

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.num_tokens, self.longest_vnodes)


class Phase(NamedTuple):
    """The vnodes of a phase.

    Attributes
    ----------
    first_vnode, vnodes : int
        Which they are.
    q_tile_size : int
        Most requests of one, as a rule.
    longest : int
        Most tokens of one; the largest int32 where that is not known.
    """

    first_vnode: int
    vnodes: int
    q_tile_size: int
    longest: int


class MetadataTuple(NamedTuple):
    """What ``fasttree_preparation`` returns and ``fasttree_decode`` takes.

    A *vnode* is a unit of work: the attention of some requests (a query tile) to some tokens (a KV split).
    Arrays are contiguous and lie on the device of the preparation: NumPy arrays for the CPU, CuPy arrays for
    a GPU.

    V is the number of vnodes, N of KV entries, Q of query entries, B of requests, H of query heads, D the
    head dimension. All ranges are half-open.

    Attributes
    ----------
    vnode_to_kv_entries : int32 (N,)
        Rows of the K and V buffers, 0 to ``phase_node_nums.num_tokens`` - 1. The rows that a tree node's
        vnodes attend to stand here once; all its vnodes refer to them.
    vnode_to_kv_offs, vnode_to_kv_lens : int32 (V,)
        Vnode v attends to the rows ``vnode_to_kv_entries[offs[v] : offs[v] + lens[v]]``; lens are positive.
    vnode_to_q_entries : int32 (Q,)
        Request ids. Position p belongs to one pair of a request and a KV split: its partial output is
        ``mid_o[p]``.
    vnode_to_q_offs, vnode_to_q_lens : int32 (V,)
        Vnode v serves the requests ``vnode_to_q_entries[offs[v] : offs[v] + lens[v]]``; lens are positive and
        at most the query tile size of the vnode's phase.
    req_to_vnode_entries : int32 (Q,)
        Positions in ``vnode_to_q_entries``, grouped by request, ascending in a group.
    req_to_vnode_offs, req_to_vnode_lens : int32 (B,)
        Request r's partial outputs are ``req_to_vnode_entries[offs[r] : offs[r] + lens[r]]``; a request
        without any tokens has none.
    mid_o : float32 (Q, H, D)
        Work space for partial outputs, not initialised.
    mid_lse : float32 (Q, H)
        Work space for the natural logarithms of the partial softmax sums, not initialised.
    phase_node_nums : PhaseNodeNums, a list of 2 int
        Number of vnodes of each phase.
    phase_node_offsets : list of 2 int
        First vnode of each phase: vnodes of phase 0 (many queries) come first.
    """

    vnode_to_kv_entries: Any
    vnode_to_kv_offs: Any
    vnode_to_kv_lens: Any
    vnode_to_q_entries: Any
    vnode_to_q_offs: Any
    vnode_to_q_lens: Any
    req_to_vnode_entries: Any
    req_to_vnode_offs: Any
    req_to_vnode_lens: Any
    mid_o: Any
    mid_lse: Any
    phase_node_nums: list[int]
    phase_node_offsets: list[int]
