"""Small runs of every kernel for compute-sanitizer.

::

    compute-sanitizer --tool memcheck python -m tests.sanitize
    FASTTREE_CUPY_RACECHECK=1 compute-sanitizer --tool racecheck python -m tests.sanitize

racecheck does not follow ``__syncwarp`` from the lanes of a warp to the one that arrives at a barrier for all, and
reports what the others have read as overwritten; the variable builds kernels whose lanes each arrive.
Results are not looked at here; test_decode.py and test_plan.py do that. Exit status 2 where there is no GPU.
"""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import stages
from fasttree_cupy.execution.device import gpu_problem

LAYOUTS = (
    (2, 2, 16, "float16"),
    (6, 2, 128, "bfloat16"),
    (16, 1, 256, "float16"),
    (100, 1, 64, "float16"),
    (8, 2, 64, "bfloat16"),
)
TREES = (
    ft.KVTree.from_levels([1, 2, 20], [70, 33, 9]),
    ft.KVTree.from_levels([1, 3], [900, 17]),
    ft.KVTree.from_levels([1, 2], [2600, 17]),  # cut so often that workers merge together
    ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0] * 70 + [1, 2, 3, 3]),  # tiles that attend to nothing
)


def run_documented(kernel: str, *arguments: Any) -> None:
    """One run of the documented functions; "ampere" is "mma" without the kernel of compute capability 9.0."""
    with pytest.MonkeyPatch.context() as patch:
        if kernel == "ampere":
            patch.setattr(stages, "stage1_sm90_serves", lambda _: False)
            kernel = "mma"
        ft.fasttree_decode(*arguments, kernel=kernel)


def run_growing(tree: ft.KVTree, heads: int, kv_heads: int, head_dim: int, q: Any, k: Any, v: Any) -> int:
    """Runs of a plan that grows, after changes of each kind; returns their number."""
    capacity = ft.Capacity(tree.batch_size, tree.unique_tokens + 1)
    plan = ft.plan_decode(tree, heads, kv_heads, head_dim, device="cuda", capacity=capacity)
    last = plan.live[-1:]
    plan.run(q, k, v)
    plan.finish(last)
    plan.run(q, k, v)
    plan.fork(plan.live[:1])
    plan.run(q, k, v, return_lse=True)
    plan.append([tree.unique_tokens - 1], last)  # a row that another request may read as well
    plan.run(q, k, v)
    return 4


def main() -> int:
    """Run every kernel at several head dims, groups and dtypes."""
    problem = gpu_problem()
    if problem is not None:
        print(f"no GPU: {problem}", file=sys.stderr)
        return 2
    import cupy

    runs = 0
    for tree in TREES:
        for heads, kv_heads, head_dim, dtype in LAYOUTS:
            q, _, _, _, k, v, kv_ptrs = ft.qkv_preparation(tree, heads, kv_heads, head_dim, "cuda", dtype, seed=1)
            for params in (ft.FastTreeParams.for_gpu("H100", heads // kv_heads), ft.FastTreeParams()):
                params.set_kv_group_num(heads // kv_heads)
                metadata, _ = ft.fasttree_preparation(
                    tree, kv_ptrs, tree.batch_size, heads, kv_heads, head_dim,
                    [256, 64], [132, 528], [132, 132], params, device="cuda", verbose=False,
                )  # fmt: skip
                for kernel in ("mma", "ampere", "plain"):
                    run_documented(kernel, q, k, v, None, *metadata, params.TSQs, params.TSKs, head_dim**-0.5)
                    runs += 1
            plan = ft.plan_decode(tree, heads, kv_heads, head_dim, device="cuda")
            for cap in (-1, 20.0):
                plan.run(q, k, v, logit_cap=cap, return_lse=True)
            zeros = cupy.zeros(k.shape, "uint8").view(ml_dtypes.float8_e4m3fn)
            plan.run(q, zeros, zeros, k_scale=0.5, v_scale=cupy.ones(kv_heads, "float32"))
            runs += 2 + run_growing(tree, heads, kv_heads, head_dim, q, k, v)
    cupy.cuda.Device().synchronize()
    print(f"{runs} runs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
