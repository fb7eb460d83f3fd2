"""A decode loop on one plan: each step appends a token to every request, then runs the plan once a layer.

::

    python docs/examples/decode_loop.py [--framework numpy|torch|jax|cupy] [--device cpu|cuda]

Requests share a system prompt, and pairs of them a document. K and V lie in pages of a pool, a new page for each
request whose last one is full. Prints the largest error of all steps and layers against dense attention.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from frameworks import chosen, host, put

import fasttree_cupy as ft

TREE = ft.KVTree(parent=[-1, 0, 0, 1, 1, 2, 2], seqlen=[120, 60, 45, 9, 7, 12, 1])
"""System prompt, two documents, four requests with questions of their own."""
STEPS, LAYERS, PAGE_SIZE = 40, 2, 16
POOL_ROWS = TREE.unique_tokens + TREE.batch_size * -(-STEPS // PAGE_SIZE) * PAGE_SIZE
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
TOLERANCE = 5e-4
"""Relative Frobenius norm, float16."""

Halves = npt.NDArray[np.float16]


def stored(pool: Any, rows: npt.NDArray[np.int64], new: Any) -> Any:
    """The pool with new tokens in its rows: the same array, but of JAX."""
    if hasattr(pool, "at"):
        return pool.at[rows].set(new)
    pool[rows] = new
    return pool


def dense_attention(q: Halves, pool: Halves, paths: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Each request's attention to its own rows, in float64."""
    outputs = []
    for query, rows in zip(q.astype(np.float64), paths, strict=True):
        keys, values = np.repeat(pool[:, list(rows)].astype(np.float64), NUM_QO_HEADS // NUM_KV_HEADS, axis=2)
        scores = np.einsum("hd,khd->hk", query, keys) * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), values))
    return np.array(outputs)


def new_rows(step: int) -> npt.NDArray[np.int64]:
    """The pool's rows of a step's tokens: pages of each request's own after the tree's tokens."""
    page = step // PAGE_SIZE * TREE.batch_size + np.arange(TREE.batch_size)
    return TREE.unique_tokens + page * PAGE_SIZE + step % PAGE_SIZE


def main(arguments: Sequence[str] | None = None) -> int:
    """Decode; returns the exit status, 1 where a result is wrong."""
    framework, device = chosen("A decode loop on a plan whose tree grows.", arguments)
    rng = np.random.default_rng(0)
    batch, token = TREE.batch_size, (NUM_KV_HEADS, HEAD_DIM)
    pools = rng.standard_normal((LAYERS, 2, POOL_ROWS, *token)).astype(np.float16)
    pools[:, :, TREE.unique_tokens :] = np.nan  # what nobody wrote shows in every result that uses it
    caches = [[put(part, framework, device) for part in layer] for layer in pools]
    capacity = ft.Capacity(requests=batch, tokens=TREE.unique_tokens + batch * STEPS)
    plan = ft.plan_decode(TREE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, device=device, capacity=capacity)
    paths = [TREE.request_rows(request).tolist() for request in range(batch)]
    errors = []
    for step in range(STEPS):
        rows = new_rows(step)
        plan.append(rows)
        for path, row in zip(paths, rows.tolist(), strict=True):
            path.append(row)
        for layer in range(LAYERS):
            # What a model computes from its hidden states: here random.
            pools[layer][:, rows] = rng.standard_normal((2, batch, *token))
            q = rng.standard_normal((batch, NUM_QO_HEADS, HEAD_DIM)).astype(np.float16)
            for part in range(2):
                new = put(pools[layer, part, rows], framework, device)
                caches[layer][part] = stored(caches[layer][part], rows, new)
            out = plan.run(put(q, framework, device), *caches[layer])
            expected = dense_attention(q, pools[layer], paths)
            errors.append(float(np.linalg.norm(host(out) - expected) / np.linalg.norm(expected)))
    worst = float(np.max(errors))  # NaN stays NaN
    print(
        f"{STEPS} steps of {LAYERS} layers: {batch} requests, {plan.tree.unique_tokens} tokens stored: "
        f"relative error {worst:.1e}"
    )
    return 0 if worst < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
