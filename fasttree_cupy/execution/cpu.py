"""Stage 1 and stage 2 on the CPU: the metadata of the CUDA kernels, NumPy arrays, float32 inside, all cores.

One work item is a vnode and a KV head. It reads K and V in tiles of `_TILE_TOKENS` rows, widens them from
their 8 or 16 bits to float32 and keeps one online softmax a query row, so that its buffers stay in the L2 cache
whatever the vnode's size.
"""

from __future__ import annotations

import math
import threading
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from numba import get_num_threads, prange

from fasttree_cupy.compiled import njit
from fasttree_cupy.execution.arrays import as_numpy
from fasttree_cupy.execution.cpu_rows import Rows, float8_values, load_row, load_tokens, rows_of, store_row
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.metadata import MetadataTuple

__all__ = ["check_indices", "decode", "run"]

Array = npt.NDArray[Any]
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_TILE_TOKENS = 128
_TILE_ROWS = 256

# Numba's threading layer `workqueue`, the one that is always there, crashes when two threads enter it.
_LOCK = threading.Lock()


def decode(
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    metadata: MetadataTuple,
    sm_scale: float,
    logit_cap: float = -1.0,
    lse: Float32Array | None = None,
    requests: Int32Array | None = None,
    k_scale: float | Float32Array = 1.0,
    v_scale: float | Float32Array = 1.0,
) -> None:
    """Attention of every request over its path; a request without a vnode gets 0. The arguments are trusted.

    Parameters
    ----------
    q, o
        (batch_size, num_qo_heads, head_dim), float16 or bfloat16. `o` is written; it may be `q` itself.
    k, v
        (num_tokens, num_kv_heads, head_dim), dtype of `q` or both of one of ml_dtypes' float8 types. These four may
        have any strides, also negative, that are multiples of an element's size, but a contiguous last axis.
    metadata
        The documented 13 values as contiguous NumPy arrays: int32, `mid_o` and `mid_lse` float32. Those two
        are written: the normalised partial outputs and their natural-log LSE. All vnodes run, whatever their
        phase.
    sm_scale
        Factor of the scores ``q . k``.
    logit_cap
        Soft cap ``logit_cap * tanh(score / logit_cap)`` where positive, otherwise none.
    lse
        (batch_size, num_qo_heads), float32: written where given, the natural-log LSE.
    requests
        int32: the requests of the lists of partial outputs, whose rows alone are written; by default 0, 1, ...
    k_scale, v_scale
        Factor of `k` or `v`, or an array of one for each KV head.
    """
    m = metadata
    k_scales, v_scales = (np.full(k.shape[1], scale, np.float32) for scale in (k_scale, v_scale))
    numbers = (q.dtype != np.float16, float8_values(k.dtype), k_scales, v_scales, float(sm_scale), float(logit_cap))
    inputs = _Inputs(rows_of(q), rows_of(k), rows_of(v), *numbers)
    kv_lists = _Lists(m.vnode_to_kv_entries, m.vnode_to_kv_offs, m.vnode_to_kv_lens)
    q_lists = _Lists(m.vnode_to_q_entries, m.vnode_to_q_offs, m.vnode_to_q_lens)
    mid_lists = _Lists(m.req_to_vnode_entries, m.req_to_vnode_offs, m.req_to_vnode_lens)
    whose = np.arange(len(mid_lists.offs), dtype=np.int32) if requests is None else requests
    with _LOCK:
        _stage1(*inputs, k.shape[1], kv_lists, q_lists, get_num_threads(), m.mid_o, m.mid_lse)
        merged_lse = np.empty(o.shape[:2], np.float32) if lse is None else lse
        _stage2(mid_lists, whose, m.mid_o, m.mid_lse, inputs.bfloat16, rows_of(o, writeable=True), merged_lse)


def run(operands: Operands, metadata: MetadataTuple, requests: Int32Array | None = None) -> None:
    """Decode arrays of any framework that lie on the CPU; `metadata` holds NumPy arrays. `requests`: see `decode`."""
    q, k, v, o = as_numpy(operands.q), as_numpy(operands.k), as_numpy(operands.v), as_numpy(operands.o)
    lse = None if operands.lse is None else as_numpy(operands.lse)
    k_scale, v_scale = (
        scale if isinstance(scale, float) else as_numpy(scale) for scale in (operands.k_scale, operands.v_scale)
    )
    decode(q, k, v, o, metadata, operands.sm_scale, operands.logit_cap, lse, requests, k_scale, v_scale)


def check_indices(metadata: MetadataTuple, num_tokens: int, batch_size: int) -> None:
    """Look at every index of the metadata.

    Parameters
    ----------
    metadata
        The documented 13 values as NumPy arrays of the documented shapes.
    num_tokens
        Rows of K and V.
    batch_size
        Rows of Q and O.

    Raises
    ------
    ValueError
        An index leads outside the array that it points into.
    """
    _check_lists(metadata, "vnode_to_kv", num_tokens, "k_buffer and v_buffer")
    _check_lists(metadata, "vnode_to_q", batch_size, "q")
    _check_lists(metadata, "req_to_vnode", len(metadata.mid_o), "mid_o")


def _check_lists(metadata: MetadataTuple, name: str, num_rows: int, target: str) -> None:
    entries, offs, lens = (getattr(metadata, f"{name}_{part}") for part in ("entries", "offs", "lens"))
    i = _first_bad_range(_Lists(entries, offs, lens))
    if i >= 0:
        raise ValueError(
            f"{name}_offs[{i}] is {offs[i]} and {name}_lens[{i}] is {lens[i]}, "
            f"expected a range of the {len(entries)} {name}_entries"
        )
    i = _first_bad_entry(_Lists(entries, offs, lens), num_rows)
    if i >= 0:
        raise ValueError(f"{name}_entries[{i}] is {entries[i]}, expected a row of {target}, which has {num_rows}")


class _Lists(NamedTuple):
    """List i is entries[offs[i] : offs[i] + lens[i]]."""

    entries: Int32Array
    offs: Int32Array
    lens: Int32Array


class _Inputs(NamedTuple):
    q: Rows
    k: Rows
    v: Rows
    bfloat16: bool
    float8: Float32Array  # the 256 values of float8 K and V; empty: they have the type of Q
    k_scales: Float32Array
    v_scales: Float32Array
    sm_scale: float
    logit_cap: float


@njit
def _first_bad_range(lists: _Lists) -> int:
    for i in range(len(lists.offs)):
        first, count = np.int64(lists.offs[i]), np.int64(lists.lens[i])
        if first < 0 or count < 0 or first + count > len(lists.entries):
            return i
    return -1


@njit
def _first_bad_entry(lists: _Lists, num_rows: int) -> int:
    """Position of an entry outside 0 to num_rows - 1, else -1; entries that no list reaches are padding."""
    for i in range(len(lists.offs)):
        for position in range(lists.offs[i], lists.offs[i] + lists.lens[i]):
            if lists.entries[position] < 0 or lists.entries[position] >= num_rows:
                return position
    return -1


@njit(parallel=True)
def _stage1(
    q: Rows,
    k: Rows,
    v: Rows,
    bfloat16: bool,
    float8: Float32Array,
    k_scales: Float32Array,
    v_scales: Float32Array,
    sm_scale: float,
    logit_cap: float,
    num_kv_heads: int,
    kv_lists: _Lists,
    q_lists: _Lists,
    num_threads: int,
    mid_o: Float32Array,
    mid_lse: Float32Array,
) -> None:
    """Partial output and LSE of each vnode, for each of its queries and heads."""
    group = mid_o.shape[1] // num_kv_heads
    queries = max(1, _TILE_ROWS // group)
    # Numba gives each thread a contiguous share, and long vnodes come first: deal the items out in turn.
    for thread in prange(num_threads):
        # Built inside: Numba passes no nested tuple into a parallel loop.
        inputs = _Inputs(q, k, v, bfloat16, float8, k_scales, v_scales, sm_scale, logit_cap)
        for item in range(thread, num_kv_heads * len(kv_lists.offs), num_threads):
            vnode, kv_head = item // num_kv_heads, item % num_kv_heads
            tokens = _members(kv_lists, vnode)
            heads = slice(kv_head * group, (kv_head + 1) * group)
            first, end = q_lists.offs[vnode], q_lists.offs[vnode] + q_lists.lens[vnode]
            for begin in range(first, end, queries):
                mid = slice(begin, min(begin + queries, end))
                requests = q_lists.entries[mid]
                _attend(inputs, kv_head, requests, tokens, mid_o[mid, heads], mid_lse[mid, heads])


@njit
def _members(lists: _Lists, i: int) -> Int32Array:
    return lists.entries[lists.offs[i] : lists.offs[i] + lists.lens[i]]


@njit
def _attend(
    inputs: _Inputs,
    kv_head: int,
    requests: Int32Array,
    tokens: Int32Array,
    out: Float32Array,
    lse: Float32Array,
) -> None:
    """Attention of the query heads of one KV head to some tokens.

    `out` is (requests, group, head_dim), `lse` (requests, group). The buffers' rows are rounded up to what
    `_multiply_add` takes.
    """
    group, head_dim = out.shape[1], out.shape[2]
    rows = len(requests) * group
    query = np.zeros((_round_up(rows), head_dim), np.float32)
    for row in range(rows):
        head = kv_head * group + row % group
        load_row(inputs.q, inputs.bfloat16, requests[row // group], head, query[row])
        query[row] *= np.float32(inputs.sm_scale) * inputs.k_scales[kv_head]
    acc = np.zeros_like(query)
    top = np.full(rows, -np.inf, np.float32)
    total = np.zeros(rows, np.float32)

    tile = np.empty((_TILE_TOKENS, head_dim), np.float32)
    keys = np.empty((head_dim, _TILE_TOKENS), np.float32)
    scores = np.empty((len(query), _TILE_TOKENS), np.float32)
    for first in range(0, len(tokens), _TILE_TOKENS):
        chosen = tokens[first : first + _TILE_TOKENS]
        count, padded = len(chosen), _round_up(len(chosen))
        load_tokens(inputs.k, inputs.bfloat16, inputs.float8, chosen, kv_head, tile)
        for d in range(head_dim):
            for i in range(count):
                keys[d, i] = tile[i, d]
        scores[:, :padded] = 0
        _multiply_add(query, keys, scores, head_dim, count)
        for row in range(rows):
            fold = _fold(scores[row, :count], inputs.logit_cap, total[row], top[row], acc[row])
            total[row], top[row] = fold
        load_tokens(inputs.v, inputs.bfloat16, inputs.float8, chosen, kv_head, tile)
        tile[count:padded] = 0
        _multiply_add(scores, tile, acc, padded, head_dim)

    for row in range(rows):
        i, g = row // group, row % group
        out[i, g] = acc[row] / (total[row] if total[row] != 0 else np.float32(1)) * inputs.v_scales[kv_head]
        lse[i, g] = top[row] + np.log(total[row])  # -inf where there was no token


@njit
def _round_up(n: int) -> int:
    return (n + 3) // 4 * 4


@njit(fastmath={"contract"})
def _multiply_add(a: Float32Array, b: Float32Array, out: Float32Array, depth: int, width: int) -> None:
    """out[:, :width] += a[:, :depth] @ b[:depth, :width]; registers hold a 4 x 4 block of `a`.

    The rows of `out` and `depth` must be multiples of four. Slices in place of the two numbers would hide
    from LLVM that the last axis is contiguous.
    """
    for r in range(0, out.shape[0], 4):
        for j in range(0, depth, 4):
            a00, a01, a02, a03 = a[r, j], a[r, j + 1], a[r, j + 2], a[r, j + 3]
            a10, a11, a12, a13 = a[r + 1, j], a[r + 1, j + 1], a[r + 1, j + 2], a[r + 1, j + 3]
            a20, a21, a22, a23 = a[r + 2, j], a[r + 2, j + 1], a[r + 2, j + 2], a[r + 2, j + 3]
            a30, a31, a32, a33 = a[r + 3, j], a[r + 3, j + 1], a[r + 3, j + 2], a[r + 3, j + 3]
            for x in range(width):
                b0, b1, b2, b3 = b[j, x], b[j + 1, x], b[j + 2, x], b[j + 3, x]
                out[r, x] += a00 * b0 + a01 * b1 + a02 * b2 + a03 * b3
                out[r + 1, x] += a10 * b0 + a11 * b1 + a12 * b2 + a13 * b3
                out[r + 2, x] += a20 * b0 + a21 * b1 + a22 * b2 + a23 * b3
                out[r + 3, x] += a30 * b0 + a31 * b1 + a32 * b2 + a33 * b3


@njit
def _fold(
    scores: Float32Array, logit_cap: float, total: np.float32, top: np.float32, acc: Float32Array
) -> tuple[np.float32, np.float32]:
    """Online softmax: scores become weights relative to the new maximum; `acc` is rescaled to it.

    Returns the new sum of weights and the new maximum.
    """
    if logit_cap > 0:
        cap = np.float32(logit_cap)
        for i in range(len(scores)):
            scores[i] = cap * math.tanh(scores[i] / cap)
    new_top = top
    for i in range(len(scores)):
        if scores[i] > new_top:
            new_top = scores[i]
    if new_top > top:
        rescale = _exp(top - new_top)
        acc *= rescale
        total *= rescale
    shift = new_top if new_top != -np.inf else np.float32(0)  # -inf - -inf would be NaN
    return total + _exponentials(scores, shift), new_top


@njit(fastmath={"contract", "reassoc"})
def _exponentials(scores: Float32Array, shift: np.float32) -> np.float32:
    """Replace scores by exp(score - shift) and return the sum."""
    total = np.float32(0)
    for i in range(len(scores)):
        scores[i] = _exp(scores[i] - shift)
        total += scores[i]
    return total


@njit(fastmath={"contract"})
def _exp(x: np.float32) -> np.float32:
    """Exponential of x <= 0 or NaN, in arithmetic that LLVM vectorises, unlike a call of the C library's."""
    y = np.float32(1.4426950408889634) * (np.float32(-87) if x < -87 else x)
    whole = np.floor(y + np.float32(0.5))
    f = np.float32(0.6931471805599453) * (y - whole)
    # The Taylor series up to f**7 / 7!; |f| <= ln(2) / 2, so its error is below float32's.
    series = np.float32(1 / 720) + f * np.float32(1 / 5040)
    series = np.float32(1 / 24) + f * (np.float32(1 / 120) + f * series)
    series = np.float32(1 / 2) + f * (np.float32(1 / 6) + f * series)
    series = np.float32(1) + f * (np.float32(1) + f * series)
    power = np.uint32((np.int32(whole) + np.int32(127)) << np.int32(23)).view(np.float32)
    return np.float32(0) if x < -87 else series * power


@njit(parallel=True)
def _stage2(
    mid_lists: _Lists,
    requests: Int32Array,
    mid_o: Float32Array,
    mid_lse: Float32Array,
    bfloat16: bool,
    o: Rows,
    lse: Float32Array,
) -> None:
    """Merge the partial outputs of each request and head by their LSE."""
    num_heads = mid_o.shape[1]
    for item in prange(len(mid_lists.offs) * num_heads):
        request, head = requests[item // num_heads], item % num_heads
        rows = _members(mid_lists, item // num_heads)
        top = np.float32(-np.inf)
        for row in rows:
            if mid_lse[row, head] > top:
                top = mid_lse[row, head]
        shift = top if top != -np.inf else np.float32(0)
        acc = np.zeros(mid_o.shape[2], np.float32)
        total = np.float32(0)
        for row in rows:
            weight = _exp(mid_lse[row, head] - shift)
            total += weight
            acc += weight * mid_o[row, head]
        if total != 0:
            acc /= total
        store_row(acc, bfloat16, o, request, head)
        lse[request, head] = top + np.log(total)  # -inf where there was no token
