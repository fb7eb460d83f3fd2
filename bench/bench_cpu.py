"""CPU decode against dense NumPy attention, one request after the other.

Two baselines: `dense`, whose K and V were widened to float32 before the clock started, and `dense, casting`,
which widens what it gathers, as a caller with 16-bit K and V has to.

    python -m bench.bench_cpu --levels 1,16,64 --tokens 1024,256,32 --json result.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from bench import machine
from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree

Array = npt.NDArray[Any]
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BOUNDS = {"float16": 5e-4, "bfloat16": 4e-3}


def main() -> None:
    args = parse_args()
    tree = KVTree.from_levels(args.levels, args.tokens)
    num_heads, num_kv_heads = args.heads
    rng = np.random.default_rng()
    kv_shape = (tree.unique_tokens, num_kv_heads, args.head_dim)
    shapes = ((tree.batch_size, num_heads, args.head_dim), kv_shape, kv_shape)
    q, k, v = (rng.standard_normal(shape, np.float32).astype(DTYPES[args.dtype]) for shape in shapes)
    paths = request_paths(tree)
    decode, o = make_decode(tree, q, k, v)

    decode()
    expected = dense(paths, q, k, v, np.float64)
    error = float(np.linalg.norm(o.astype(np.float64) - expected) / np.linalg.norm(expected))
    if not error < BOUNDS[args.dtype]:
        sys.exit(f"relative error {error:.2e}, expected below {BOUNDS[args.dtype]:.0e}")

    k32, v32 = k.astype(np.float32), v.astype(np.float32)
    times = {
        "fasttree": median_ms(decode, args.repeat),
        "dense": median_ms(lambda: dense(paths, q, k32, v32, np.float32), args.repeat),
        "dense, casting": median_ms(lambda: dense(paths, q, k, v, np.float32), args.repeat),
    }
    report(args, tree, error, times)


def parse_args() -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description="CPU decode against dense NumPy attention.")
    parser.add_argument("--levels", type=ints, default=[1, 16, 64], help="nodes a level")
    parser.add_argument("--tokens", type=ints, default=[1024, 256, 32], help="tokens a node of each level")
    parser.add_argument("--heads", type=ints, default=[32, 8], help="query heads, KV heads")
    parser.add_argument("--dtype", choices=DTYPES, default="float16")
    parser.add_argument("--head_dim", type=int, default=128)
    parser.add_argument("--repeat", type=int, default=9, help="runs of which the median counts")
    parser.add_argument("--json", metavar="PATH", help="write the result to this file")
    return parser.parse_args()


def make_decode(tree: KVTree, q: Array, k: Array, v: Array) -> tuple[Callable[[], None], Array]:
    """The call to time, prepared, and the output that it writes."""
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    params = FastTreeParams.for_gpu("H100", num_heads // num_kv_heads)
    metadata, _ = fasttree_preparation(
        tree,
        tree.kv_ptrs,
        tree.batch_size,
        num_heads,
        num_kv_heads,
        head_dim,
        [1024, 128],
        [132, 528],
        [132, 132],
        params,
        device="cpu",
        verbose=False,
    )
    o = np.full(q.shape, np.nan, q.dtype)
    scale = head_dim**-0.5
    return lambda: fasttree_decode(q, k, v, o, *metadata, params.TSQs, params.TSKs, scale), o


def request_paths(tree: KVTree) -> list[Array]:
    """Rows of K and V that each request attends to, root first."""
    paths = []
    for node in tree.request_node.tolist():
        runs: list[Array] = []
        while node >= 0:
            runs.insert(0, np.arange(tree.kv_ptrs[node], tree.kv_ptrs[node + 1]))
            node = int(tree.parent[node])
        paths.append(np.concatenate(runs))
    return paths


def dense(paths: list[Array], q: Array, k: Array, v: Array, dtype: type[np.floating[Any]]) -> Array:
    """Gather each request's tokens, then scores, softmax, values: for all heads at once, through BLAS."""
    num_kv_heads = k.shape[1]
    scale = dtype(q.shape[2] ** -0.5)
    out = np.empty(q.shape, dtype)
    for request, rows in enumerate(paths):
        query = q[request].astype(dtype).reshape(num_kv_heads, -1, q.shape[2]) * scale
        keys = k[rows].astype(dtype, copy=False).transpose(1, 2, 0)
        values = v[rows].astype(dtype, copy=False).transpose(1, 0, 2)
        weights = query @ keys
        weights -= weights.max(axis=2, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=2, keepdims=True)
        out[request] = (weights @ values).reshape(q.shape[1:])
    return out


def median_ms(call: Callable[[], object], repeat: int) -> float:
    call()
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1000 * statistics.median(seconds)


def report(args: argparse.Namespace, tree: KVTree, error: float, times: dict[str, float]) -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{tree.batch_size} requests, {tree.unique_tokens} tokens ({int(tree.path_tokens.sum())} summed), "
        f"heads {args.heads[0]}/{args.heads[1]}, head_dim {args.head_dim}, {args.dtype}, {cores} cores, "
        f"relative error {error:.1e}"
    )
    for name, ms in times.items():
        print(f"{name:<16}{ms:10.2f} ms{ms / times['fasttree']:8.2f}x")
    if args.json is None:
        return
    result = {
        "machine": machine.describe("bench.bench_cpu", sys.argv[1:]) | {"cores": cores},
        "case": {name: getattr(args, name) for name in ("levels", "tokens", "heads", "dtype", "head_dim", "repeat")},
        "relative_error": error,
        "median_ms": times,
    }
    with open(args.json, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1)
        file.write("\n")


if __name__ == "__main__":
    main()
