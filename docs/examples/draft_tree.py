"""A speculative draft tree needs nothing new: each draft token is a node of the tree, and a query of its own.

::

    python docs/examples/draft_tree.py [--framework numpy|torch|jax|cupy] [--device cpu|cuda]

A draft model proposes a tree of tokens after a prompt, and the target model verifies all of them in one step: each
attends to the prompt, to the draft tokens before it on its branch, and to itself. Prints the error against dense
attention under a causal tree mask.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from frameworks import chosen, host, put

import fasttree_cupy as ft

PROMPT_TOKENS = 500
DRAFT_PARENTS = (-1, -1, 0, 0, 1, 2, 2, 4, 5, 8)
"""Of each draft token the one before it on its branch; -1: it follows the prompt."""
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
TOLERANCE = 5e-4
"""Relative Frobenius norm, float16."""

Floats = npt.NDArray[np.float64]


def draft_tree(prompt_tokens: int, parents: Sequence[int]) -> ft.KVTree:
    """Node 0 holds the prompt, node i + 1 draft token i; request i is draft token i's query."""
    nodes = np.arange(1, len(parents) + 1)
    return ft.KVTree(
        parent=np.concatenate([[-1], np.array(parents) + 1]),
        seqlen=np.concatenate([[prompt_tokens], np.ones(len(parents), np.int64)]),
        request_node=nodes,
    )


def causal_tree_mask(prompt_tokens: int, parents: Sequence[int]) -> npt.NDArray[np.bool_]:
    """Which rows of K and V each draft token attends to: (draft tokens, prompt and draft tokens)."""
    mask = np.zeros((len(parents), prompt_tokens + len(parents)), bool)
    mask[:, :prompt_tokens] = True
    for token in range(len(parents)):
        ancestor = token
        while ancestor >= 0:
            mask[token, prompt_tokens + ancestor] = True
            ancestor = parents[ancestor]
    return mask


def masked_attention(q: Floats, k: Floats, v: Floats, mask: npt.NDArray[np.bool_]) -> Floats:
    """Dense attention of all queries to all rows, under a mask; grouped heads."""
    group = q.shape[1] // k.shape[1]
    keys, values = np.repeat(k, group, axis=1), np.repeat(v, group, axis=1)
    scores = np.einsum("qhd,khd->hqk", q, keys) * q.shape[2] ** -0.5
    scores = np.where(mask, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    return np.einsum("hqk,khd->qhd", weights, values)


def main(arguments: Sequence[str] | None = None) -> int:
    """Verify a draft tree; returns the exit status, 1 where the result is wrong."""
    framework, device = chosen("Attention of a speculative draft tree.", arguments)
    tree = draft_tree(PROMPT_TOKENS, DRAFT_PARENTS)
    rng = np.random.default_rng(0)
    rows = PROMPT_TOKENS + len(DRAFT_PARENTS)  # K and V: the prompt's, then one of each draft token
    shapes = [(len(DRAFT_PARENTS), NUM_QO_HEADS, HEAD_DIM), *2 * [(rows, NUM_KV_HEADS, HEAD_DIM)]]
    arrays = [rng.standard_normal(shape).astype(np.float16) for shape in shapes]
    q, k, v = (put(array, framework, device) for array in arrays)

    plan = ft.plan_decode(tree, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, device=device)
    out = plan.run(q, k, v)

    found = host(out)
    mask = causal_tree_mask(PROMPT_TOKENS, DRAFT_PARENTS)
    expected = masked_attention(*(array.astype(np.float64) for array in arrays), mask)
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    print(f"{plan}\n{len(DRAFT_PARENTS)} draft tokens after {PROMPT_TOKENS}: relative error {error:.1e}")
    return 0 if error < TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
