"""A plan that grows, decoded on the emulated GPU after every change of its arrays in place."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import plan_kernels
from fasttree_cupy.execution.arrays import view
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.planning import growing
from tests.emulation.emulated import EmulatedStream, emulated_gpu, needs_compiler
from tests.growing_walk import KINDS
from tests.reference import dense_attention
from tests.test_growing import Growing
from tests.tolerances import assert_close

pytestmark = needs_compiler

HEADS, KV_HEADS, HEAD_DIM, WORKERS = 8, 2, 128, 6
UNTOUCHED = 7.0


class Decoder:
    """A growing plan and its memory, which stays where it is."""

    def __init__(self, tree: ft.KVTree, row_groups: int) -> None:
        self.grown = Growing(tree, HEADS // KV_HEADS, KV_HEADS, WORKERS, row_groups, shuffle=True)
        rng, model = np.random.default_rng(0), self.grown.model
        self.q = rng.standard_normal((model.slots, HEADS, HEAD_DIM)).astype(np.float16)
        self.k, self.v = rng.standard_normal((2, model.pool_rows, KV_HEADS, HEAD_DIM)).astype(np.float16)
        sizes = self.grown.plan.sizes
        self.counters = np.zeros(sizes.counters, np.int32)
        self.mid_o = np.full((sizes.partials, 64 * row_groups, HEAD_DIM), np.nan, np.float32)
        self.mid_lse = np.full(self.mid_o.shape[:2], np.nan, np.float32)

    def change(self, kind: str, seed: int) -> None:
        planned = self.grown.planned
        self.grown.change(kind, seed)
        if self.grown.planned != planned:
            self.counters[:] = 0

    def run(self, seed: int) -> np.ndarray[Any, Any]:
        """The outputs of all slots; rows of K and V that no request has are NaN."""
        plan, packed = self.grown.plan, self.grown.device.packed
        o = np.full_like(self.q, UNTOUCHED)
        free = np.ones(len(self.k), bool)
        free[list(self.grown.model.held())] = False
        hidden = [np.where(free[:, None, None], np.float16(np.nan), array) for array in (self.k, self.v)]
        q, k, v, out = (view(name, array) for name, array in zip("qkvo", (self.q, *hidden, o), strict=True))
        lists = [
            packed.ctypes.data + 4 * at for at in (plan.sizes.items_at, plan.sizes.segments_at, plan.sizes.order_at)
        ]
        with emulated_gpu(seed):
            plan_kernels.run_workers(
                Operands(q, k, v, out, HEAD_DIM**-0.5, -1.0),
                (self.mid_o.ctypes.data, self.mid_lse.ctypes.data),
                (self.counters.ctypes.data, *lists),
                plan.sizes.segments,
                plan.row_groups,
                plan.workers,
                EmulatedStream(),  # type: ignore[arg-type]
            )
        return o

    def expected(self) -> np.ndarray[Any, Any]:
        o = np.full(self.q.shape, UNTOUCHED)
        for slot, rows in self.grown.model.paths.items():
            own = self.q[slot : slot + 1], self.k[rows], self.v[rows]
            o[slot] = dense_attention([-1], [len(rows)], [0], *own, HEAD_DIM**-0.5)[0]
        return o


@pytest.mark.parametrize("row_groups", [1, 2])
def test_right_after_every_change(row_groups: int) -> None:
    with mock.patch.object(growing, "PLAN_US", 1e9), mock.patch.object(growing, "CUT_US", 0.1):
        decoder = Decoder(ft.KVTree.from_levels([1, 3, 12], [330, 33, 17]), row_groups)
        for step, kind in enumerate(4 * KINDS):
            decoder.change(kind, step)
            assert_close(decoder.run(step), decoder.expected(), np.float16)
    assert decoder.grown.planned < len(4 * KINDS)  # most changes were edits
