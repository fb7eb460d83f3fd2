"""Beam search on one plan: hypotheses fork and end, K and V stay where they are in a pool.

::

    python docs/examples/beam_search.py [--framework numpy|torch|jax|cupy] [--device cpu|cuda]

Each step runs the plan once a layer and lets the best hypotheses go on; two may go on from one, so that one forks and
another ends. A hypothesis has a slot of the plan: its row of queries and outputs. Beside it stands a list of its
tokens' rows in the pool, to know which rows are free again and to check results. Prints the largest error of all steps
and layers against dense attention.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from frameworks import chosen, host, put

import fasttree_cupy as ft

PROMPT_TOKENS = 200
BEAMS, STEPS, LAYERS = 4, 12, 2
POOL_ROWS = PROMPT_TOKENS + BEAMS * (STEPS + 1)
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 8, 2, 64
TOLERANCE = 5e-4
"""Relative Frobenius norm, float16."""

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float64]
Hypotheses = dict[int, list[int]]
"""Slot -> rows of the pool."""


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
        return put(array, self.framework, self.device)

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

    def release(self, before: Iterable[Sequence[int]], after: Iterable[Sequence[int]]) -> None:
        """Take back the rows that no hypothesis holds any more."""
        self.free += sorted(set().union(*before) - set().union(*after))


def dense_attention(q: Halves, pool: npt.NDArray[Any], rows: Sequence[int]) -> Floats:
    """A hypothesis' attention to its own rows, in float64."""
    keys, values = np.repeat(pool[:, list(rows)].astype(np.float64), NUM_QO_HEADS // NUM_KV_HEADS, axis=2)
    scores = np.einsum("hd,khd->hk", q.astype(np.float64), keys) * HEAD_DIM**-0.5
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    return np.einsum("hk,khd->hd", weights / weights.sum(axis=1, keepdims=True), values)


def decode(
    plan: ft.DecodePlan, pool: Pool, hypotheses: Hypotheses, rng: np.random.Generator
) -> tuple[dict[int, Floats], float]:
    """The last layer's output of each hypothesis, and the largest error of all layers."""
    errors = []
    for layer in range(LAYERS):
        q = rng.standard_normal((BEAMS, NUM_QO_HEADS, HEAD_DIM)).astype(np.float16)
        out = plan.run(pool.put(q), *pool.arrays[layer])
        found = host(out)
        for slot, rows in hypotheses.items():
            expected = dense_attention(q[slot], pool.host[layer], rows)
            errors.append(float(np.linalg.norm(found[slot] - expected) / np.linalg.norm(expected)))
    return {slot: found[slot] for slot in hypotheses}, float(np.max(errors))  # NaN stays NaN


def survivors(outputs: dict[int, Floats]) -> list[int]:
    """The slot that each of the next hypotheses goes on from: the best BEAMS of two continuations of each."""
    scores = [(float(out.sum()), slot) for slot, out in outputs.items()]
    scores += [(float(out[0].sum()), slot) for slot, out in outputs.items()]
    return [slot for _, slot in sorted(scores, reverse=True)[:BEAMS]]


def step_on(plan: ft.DecodePlan, hypotheses: Hypotheses, parents: Sequence[int]) -> tuple[Hypotheses, int]:
    """End what nobody goes on from, and fork what several do; returns the hypotheses, and how many forked."""
    ended = sorted(set(hypotheses) - set(parents))
    forked = [parent for number, parent in enumerate(parents) if parent in parents[:number]]
    plan.finish(ended)
    children = plan.fork(forked).tolist()
    kept = {slot: rows for slot, rows in hypotheses.items() if slot not in ended}
    return kept | {child: list(kept[parent]) for child, parent in zip(children, forked, strict=True)}, len(forked)


def main(arguments: Sequence[str] | None = None) -> int:
    """Search; returns the exit status, 1 where a result is wrong."""
    framework, device = chosen("Beam search over a growing tree.", arguments)
    rng = np.random.default_rng(0)
    pool = Pool(framework, device)
    prompt = pool.store(rng, PROMPT_TOKENS)
    hypotheses: Hypotheses = {0: prompt}
    plan = ft.plan_decode(
        ft.KVTree(parent=[-1], seqlen=[PROMPT_TOKENS]), NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM,
        kv_indices=prompt, device=device, capacity=ft.Capacity(BEAMS, POOL_ROWS),
    )  # fmt: skip
    errors, forks = [], 0
    for _ in range(STEPS):
        outputs, error = decode(plan, pool, hypotheses, rng)
        errors.append(error)
        before = list(map(list, hypotheses.values()))
        hypotheses, forked = step_on(plan, hypotheses, survivors(outputs))
        forks += forked
        pool.release(before, hypotheses.values())
        rows = pool.store(rng, len(hypotheses))
        plan.append(rows, list(hypotheses))
        for path, row in zip(hypotheses.values(), rows, strict=True):
            path.append(row)
    worst = float(np.max(errors))
    held, stored = POOL_ROWS - len(pool.free), plan.tree.unique_tokens
    print(
        f"{STEPS} steps, {forks} forks: {len(hypotheses)} hypotheses of {PROMPT_TOKENS + STEPS} tokens, "
        f"{stored} stored in {held} rows: relative error {worst:.1e}"
    )
    return 0 if worst < TOLERANCE and held == stored else 1


if __name__ == "__main__":
    sys.exit(main())
