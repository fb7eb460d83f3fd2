"""The oracle: dense attention of one request after the other in float64, from plain arrays.

Obvious, not clever, and independent: it shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["dense_attention", "path_rows"]

Ints = Sequence[int] | npt.NDArray[np.integer[Any]]


def path_rows(parent: Ints, seqlen: Ints, node: int) -> npt.NDArray[np.int64]:
    """Rows of K and V from the root to `node`; node i's rows follow those of the nodes before it."""
    ends = np.cumsum(seqlen)
    runs: list[npt.NDArray[np.int64]] = []
    while node >= 0:
        runs.insert(0, np.arange(ends[node] - seqlen[node], ends[node]))
        node = int(parent[node])
    return np.concatenate(runs)


def dense_attention(
    parent: Ints,
    seqlen: Ints,
    request_node: Ints,
    q: Any,
    k: Any,
    v: Any,
    sm_scale: float,
    logit_cap: float = -1.0,
    xp: Any = np,
) -> tuple[Any, Any]:
    """Attention of every request to all tokens on its path.

    Parameters
    ----------
    parent, seqlen
        A node each: its parent (-1 for the root) and its number of tokens.
    request_node
        A request each: the node at which its path ends.
    q
        (batch_size, num_qo_heads, head_dim).
    k, v
        (num_tokens, num_kv_heads, head_dim).
    sm_scale
        Factor of the scores ``q . k``.
    logit_cap
        Soft cap ``logit_cap * tanh(score / logit_cap)`` where positive.
    xp
        The namespace of the arrays: numpy or cupy.

    Returns
    -------
    o
        float64 (batch_size, num_qo_heads, head_dim); 0 for a request without tokens.
    lse
        float64 (batch_size, num_qo_heads), natural logarithm; -inf for a request without tokens.
    """
    parent, seqlen = np.asarray(parent), np.asarray(seqlen)
    batch_size, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    o = xp.zeros((batch_size, num_heads, head_dim), xp.float64)
    lse = xp.full((batch_size, num_heads), -xp.inf, xp.float64)
    for request, node in enumerate(request_node):
        rows = xp.asarray(path_rows(parent, seqlen, int(node)))
        if len(rows) == 0:
            continue
        keys = k[rows].astype(xp.float64).transpose(1, 2, 0)  # (num_kv_heads, head_dim, tokens)
        values = v[rows].astype(xp.float64).transpose(1, 0, 2)  # (num_kv_heads, tokens, head_dim)
        # Query heads h * group to (h + 1) * group - 1 use KV head h.
        query = q[request].astype(xp.float64).reshape(num_kv_heads, -1, head_dim)
        scores = sm_scale * (query @ keys)
        if logit_cap > 0:
            scores = logit_cap * xp.tanh(scores / logit_cap)
        top = scores.max(axis=2, keepdims=True)
        weights = xp.exp(scores - top)
        total = weights.sum(axis=2, keepdims=True)
        o[request] = ((weights / total) @ values).reshape(num_heads, head_dim)
        lse[request] = (top + xp.log(total)).reshape(num_heads)
    return o, lse
