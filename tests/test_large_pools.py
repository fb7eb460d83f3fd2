"""Pools of K and V with more than 2**31 elements each: no index wraps."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from tests.plans import KERNELS, choose_kernel
from tests.reference import dense_attention
from tests.tolerances import assert_close

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
ROWS = 2**31 // (KV_HEADS * HEAD_DIM) + 300
RUN = 50
FIRSTS = [0, 50, 950, ROWS // 2 - 25, ROWS - 300, ROWS - 250, ROWS - 100, ROWS - 50]
"""Runs of rows that are used: at both ends, across 2**30 elements and on either side of 2**31."""
TREE = ft.KVTree.from_levels([1, 3, 6], [130, 70, 10])


def rows_in_use() -> np.ndarray[Any, Any]:
    """A row of the pool for each token of the tree, runs in random order."""
    order = np.random.default_rng(1).permutation(FIRSTS)
    return (order[:, None] + np.arange(RUN)).ravel()


def check(xp: Any, device: str) -> None:
    rng = np.random.default_rng(0)
    kv_indices = rows_in_use()
    assert len(kv_indices) == TREE.unique_tokens
    assert ROWS * KV_HEADS * HEAD_DIM > 2**31
    q = rng.standard_normal((TREE.batch_size, HEADS, HEAD_DIM)).astype(np.float16)
    pools, gathered = [], []
    for _ in range(2):
        # Rows that nobody uses are never touched: on a CPU they take no memory.
        pool = xp.empty((ROWS, KV_HEADS, HEAD_DIM), np.float16)
        values = rng.standard_normal((len(kv_indices), KV_HEADS, HEAD_DIM)).astype(np.float16)
        for at in range(0, len(kv_indices), RUN):
            pool[int(kv_indices[at]) : int(kv_indices[at]) + RUN] = xp.asarray(values[at : at + RUN])
        pools.append(pool)
        gathered.append(values)
    plan = ft.plan_decode(TREE, HEADS, KV_HEADS, HEAD_DIM, kv_indices=kv_indices, device=device)
    out = plan.run(xp.asarray(q), *pools)
    expected, _ = dense_attention(TREE.parent, TREE.seqlen, TREE.request_node, q, *gathered, HEAD_DIM**-0.5)
    assert_close(out.get() if device == "cuda" else out, expected, np.float16)


def test_rows_at_both_ends_on_the_cpu() -> None:
    try:
        check(np, "cpu")
    except MemoryError:
        pytest.skip("no 9 GB of address space")


@pytest.mark.gpu
@KERNELS
def test_rows_at_both_ends_on_the_gpu(kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cupy.get_default_memory_pool().free_all_blocks()
    if cupy.cuda.runtime.memGetInfo()[0] < 10 * 2**30:
        pytest.skip("less than 10 GB of GPU memory free")
    choose_kernel(kernel, monkeypatch)
    check(cupy, "cuda")
    cupy.get_default_memory_pool().free_all_blocks()
