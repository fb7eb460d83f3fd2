"""Beam search over a growing tree: hypotheses fork and end, K and V stay where they are in a pool.

::

    python docs/examples/beam_search.py numpy|torch|jax [--device cpu|cuda]

Each step plans the tree of the hypotheses anew, runs the plan once a layer, and lets the best hypotheses go on; two may
go on from one. A hypothesis is the list of its tokens' rows in the pool. Hypotheses share the rows that they have in
common, so that the tree is found in these lists, and a row is free again when no hypothesis holds it. Prints the
largest error of all steps and layers against dense attention.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import fasttree_cupy as ft

PROMPT_TOKENS = 200
BEAMS, STEPS, LAYERS = 4, 12, 2
POOL_ROWS = PROMPT_TOKENS + BEAMS * (STEPS + 1)
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
TOLERANCE = 5e-4
"""Relative Frobenius norm, float16."""

Halves = npt.NDArray[np.float16]


class Pool:
    """K and V of a layer each, in host memory and as a framework's arrays on a device."""

    def __init__(self, framework: str, device: str) -> None:
        self.framework, self.device = framework, device
        shape = (LAYERS, 2, POOL_ROWS, NUM_KV_HEADS, HEAD_DIM)
        self.host = np.full(shape, np.nan, np.float16)  # what nobody wrote shows in every result that uses it
        self.arrays = [[self.put(part) for part in layer] for layer in self.host]
        self.free = list(range(POOL_ROWS))[::-1]

    def put(self, array: Halves) -> Any:
        """A copy of an array as the framework's, on the device."""
        if self.framework == "torch":
            import torch

            return torch.from_numpy(array.copy()).to(self.device)
        if self.framework == "jax":
            import jax

            return jax.device_put(array.copy(), jax.devices("gpu" if self.device == "cuda" else "cpu")[0])
        return array.copy()

    def store(self, rng: np.random.Generator, tokens: int) -> list[int]:
        """Write new tokens' K and V, as a model would that had just computed them; returns their rows."""
        rows = [self.free.pop() for _ in range(tokens)]
        self.host[:, :, rows] = rng.standard_normal((LAYERS, 2, tokens, NUM_KV_HEADS, HEAD_DIM))
        for layer in range(LAYERS):
            for part in range(2):
                new, array = self.put(self.host[layer, part, rows]), self.arrays[layer][part]
                if self.framework == "jax":  # whose arrays cannot be written
                    self.arrays[layer][part] = array.at[np.array(rows)].set(new)
                else:
                    array[rows] = new
        return rows

    def release(self, before: Sequence[Sequence[int]], after: Sequence[Sequence[int]]) -> None:
        """Take back the rows that no hypothesis holds any more."""
        self.free += sorted(set().union(*before) - set().union(*after))


def find_tree(hypotheses: Sequence[Sequence[int]]) -> tuple[ft.KVTree, npt.NDArray[np.int64]]:
    """The tree of the hypotheses, and the rows of the pool that hold its tokens."""
    tree = ft.KVTree.from_sequences(hypotheses)
    kv_indices = np.empty(tree.unique_tokens, np.int64)
    for request, rows in enumerate(hypotheses):
        kv_indices[tree.request_rows(request)] = rows
    return tree, kv_indices


def dense_attention(q: Halves, pool: npt.NDArray[Any], hypotheses: Sequence[Sequence[int]]) -> npt.NDArray[np.float64]:
    """Each hypothesis' attention to its own rows, in float64."""
    outputs = []
    for query, rows in zip(q.astype(np.float64), hypotheses, strict=True):
        keys, values = np.repeat(pool[:, list(rows)].astype(np.float64), NUM_QO_HEADS // NUM_KV_HEADS, axis=2)
        scores = np.einsum("hd,khd->hk", query, keys) * HEAD_DIM**-0.5
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        outputs.append(np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), values))
    return np.array(outputs)


def decode(pool: Pool, hypotheses: Sequence[Sequence[int]], rng: np.random.Generator) -> tuple[Halves, float]:
    """The last layer's output of each hypothesis, and the largest error of all layers."""
    tree, kv_indices = find_tree(hypotheses)
    plan = ft.plan_decode(tree, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, kv_indices=kv_indices, device=pool.device)
    errors = []
    for layer in range(LAYERS):
        q = rng.standard_normal((len(hypotheses), NUM_QO_HEADS, HEAD_DIM)).astype(np.float16)
        out = plan.run(pool.put(q), *pool.arrays[layer])
        found = np.asarray(out.cpu() if pool.framework == "torch" else out)
        expected = dense_attention(q, pool.host[layer], hypotheses)
        errors.append(float(np.linalg.norm(found - expected) / np.linalg.norm(expected)))
    return found, float(np.max(errors))  # NaN stays NaN


def survivors(output: Halves) -> npt.NDArray[np.intp]:
    """Which hypothesis each of the next ones goes on from: the best BEAMS of two continuations of each."""
    scores = np.concatenate([output.astype(np.float64).sum(axis=(1, 2)), output[:, 0].astype(np.float64).sum(axis=1)])
    return np.argsort(-scores, kind="stable")[:BEAMS] % len(output)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search; returns the exit status, 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description="Beam search over a growing tree.")
    parser.add_argument("framework", choices=("numpy", "torch", "jax"))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    args = parser.parse_args(arguments)

    rng = np.random.default_rng(0)
    pool = Pool(args.framework, args.device)
    hypotheses = [pool.store(rng, PROMPT_TOKENS)]
    errors, forks = [], 0
    for _ in range(STEPS):
        output, error = decode(pool, hypotheses, rng)
        errors.append(error)
        parents = survivors(output)
        forks += len(parents) - len(set(parents.tolist()))
        before = hypotheses
        hypotheses = [before[parent] + pool.store(rng, 1) for parent in parents]
        pool.release(before, hypotheses)
    worst = float(np.max(errors))
    tree, _ = find_tree(hypotheses)
    held = POOL_ROWS - len(pool.free)
    print(
        f"{STEPS} steps, {forks} forks: {len(hypotheses)} hypotheses of {len(hypotheses[0])} tokens, "
        f"{tree.unique_tokens} stored in {held} rows: relative error {worst:.1e}"
    )
    return 0 if worst < TOLERANCE and held == tree.unique_tokens else 1


if __name__ == "__main__":
    sys.exit(main())
