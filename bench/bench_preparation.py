"""Time of planning and size of the plan, from 10 to 1,000,000 nodes. Needs no GPU.

::

    python -m bench.bench_preparation --output bench/results/preparation.json

Two kinds of trees: ``random``, each node under any earlier one, and ``levels``, four children a node. Four ways to
plan them: by FastTree's heuristic from arrays (`KVTree` is built and checked, then planned) and from `KVTreeNode`
objects, by the tests' oracle of it, in plain Python, as far as that gets, and by the planner of `plan_decode` for an
H200 from a `KVTree`. Uploading the plan to a GPU is not part of it. First comes ``paper``, the largest tree of
FastTree's paper, through the whole of `fasttree_preparation`. The size is that of the arrays of the heuristic's plan,
work space not counted.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, records
from bench.names import readable_size
from fasttree_cupy import FastTreeParams, KVTree, MetadataTuple, fasttree_preparation, preset
from fasttree_cupy.planning import balanced
from fasttree_cupy.planning.greedy import GreedyPlan, plan
from fasttree_cupy.planning.machine import H200_WORKERS
from fasttree_cupy.tree import as_tree

__all__ = ["main"]

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
GPU_PRESET = "H100"
H200_MULTIPROCESSORS = 132
CHILDREN = 4
MOST_TOKENS = 64
ORACLE_SECONDS = 2.0
"""The oracle is not tried on a tree larger than the first on which it takes longer than this."""
REPEAT_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(arguments)
    document: dict[str, Any] = {"machine": machine.describe("bench.bench_preparation", arguments), "cases": []}
    started = time.monotonic()
    print(
        f"{'tree':<8}{'nodes':>10}{'requests':>10}{'vnodes':>10}{'arrays':>12}{'nodes':>12}{'oracle':>12}"
        f"{'plan_decode':>12}{'size':>11}"
    )
    for row in measured(args.most_nodes):
        document["cases"].append(row)
        print(line(row), flush=True)
        if args.output is not None:
            records.save(args.output, document)
        if args.limit_seconds is not None and time.monotonic() - started > args.limit_seconds:
            print(f"stopped after {args.limit_seconds:g} s")
            break
    return 0


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="bench_preparation", description="Time of planning and size of the plan, without GPU."
    )
    parser.add_argument("--most-nodes", type=int, default=1_000_000, help="size of the largest tree")
    parser.add_argument("--limit-seconds", type=float, help="start no further tree after this time")
    parser.add_argument("--output", type=Path, metavar="JSON", help="written after every tree")
    return parser.parse_args(arguments)


def measured(most_nodes: int) -> Iterator[dict[str, Any]]:
    """One row a tree, the smallest first."""
    oracles = {kind: plain_python_planner() for kind in TREES}
    make_plan(TREES["levels"](10))  # compiles
    make_balanced_plan(TREES["levels"](10))
    yield whole_preparation(PAPER_TREE)
    for size in sizes(most_nodes):
        for kind, make_tree in TREES.items():
            tree = make_tree(size)
            row, oracle = measure(kind, tree), oracles[kind]
            if oracle is not None:
                row["oracle_ms"] = median_ms(lambda: oracle(tree), most=1)  # noqa: B023  # called at once
                if row["oracle_ms"] > 1000 * ORACLE_SECONDS:
                    oracles[kind] = None
            yield row


def sizes(most: int) -> list[int]:
    """10, 30, 100, ... up to `most`."""
    steps = [10**exponent * factor for exponent in range(1, 10) for factor in (1, 3)]
    return [size for size in steps if size <= most]


def random_tree(size: int) -> KVTree:
    """Each node under any earlier one; 1 to 64 tokens a node."""
    rng = np.random.default_rng(size)
    parent = np.concatenate([[-1], rng.integers(0, np.arange(1, size))])
    return KVTree(parent, rng.integers(1, MOST_TOKENS + 1, size))


def level_tree(size: int) -> KVTree:
    """Four children a node, the last level cut off at `size` nodes; 1 to 64 tokens a node."""
    parent = (np.arange(size) - 1) // CHILDREN
    return KVTree(parent, np.random.default_rng(size).integers(1, MOST_TOKENS + 1, size))


TREES = {"random": random_tree, "levels": level_tree}
PAPER_TREE = KVTree.from_levels([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256])
"""The largest tree of FastTree's paper: 1,365 nodes."""


def settings() -> dict[str, Any]:
    """The arguments of ``plan`` after the tree: the preset's."""
    sizes, params = preset(GPU_PRESET), FastTreeParams.for_gpu(GPU_PRESET, NUM_QO_HEADS // NUM_KV_HEADS)
    return {
        "kv_split_sizes": list(sizes.kv_split_sizes),
        "para_threshs1": list(sizes.para_threshs1),
        "para_threshs2": list(sizes.para_threshs2),
        "num_kv_heads": NUM_KV_HEADS,
        "alpha": params.alpha,
        "beta": params.beta,
        "gamma": params.gamma,
        "TSQs": params.TSQs,
        "TSKs": params.TSKs,
        "kv_group_num": params.kv_group_num,
    }


def make_plan(tree: KVTree) -> GreedyPlan:
    """Our plan of a tree."""
    return plan(tree, **settings())


def make_balanced_plan(tree: KVTree) -> Any:
    """The plan that `plan_decode` makes of a tree for an H200."""
    group = NUM_QO_HEADS // NUM_KV_HEADS
    return balanced.plan(tree, group, NUM_KV_HEADS, HEAD_DIM, H200_MULTIPROCESSORS, H200_WORKERS)


def plain_python_planner() -> Callable[[KVTree], Any] | None:
    """The tests' oracle; None where the tests or pytest are not there."""
    try:
        from tests.oracle import Oracle, Settings
    except ImportError as error:
        print(f"no oracle: {error}")
        return None
    return lambda tree: Oracle(tree, Settings(**settings())).run()


def measure(kind: str, tree: KVTree) -> dict[str, Any]:
    """Times of planning one tree, and the size of the plan."""
    parent, seqlen, request_node = np.array(tree.parent), np.array(tree.seqlen), np.array(tree.request_node)

    def from_arrays() -> GreedyPlan:
        return make_plan(KVTree(parent, seqlen, request_node))

    made = from_arrays()
    nodes = tree.to_nodes()
    return {
        "kind": kind,
        "nodes": tree.num_nodes,
        "requests": tree.batch_size,
        "unique_tokens": tree.unique_tokens,
        "vnodes": sum(made.phase_node_nums),
        "plan_bytes": plan_bytes(made),
        "arrays_ms": median_ms(from_arrays),
        "nodes_ms": median_ms(lambda: make_plan(as_tree(nodes))),
        "plan_decode_ms": median_ms(lambda: make_balanced_plan(tree)),
    }


def plan_bytes(made: GreedyPlan) -> int:
    """Bytes of the arrays that execution reads: the metadata but for its work space."""
    parts = (part for name, part in made._asdict().items() if name in MetadataTuple._fields)
    return sum(part.nbytes for part in parts if isinstance(part, np.ndarray))


def whole_preparation(tree: KVTree) -> dict[str, Any]:
    """A row for one tree through ``fasttree_preparation``, work spaces included, on the CPU: nothing is uploaded."""
    row = measure("paper", tree)
    sizes, nodes = preset(GPU_PRESET), tree.to_nodes()
    kv_ptrs = tree.kv_ptrs.tolist()
    params = FastTreeParams.for_gpu(GPU_PRESET, NUM_QO_HEADS // NUM_KV_HEADS)

    def prepare(tree_info: Any, ptrs: Any) -> Any:
        return fasttree_preparation(
            tree_info, ptrs, tree.batch_size, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM,
            sizes.kv_split_sizes, sizes.para_threshs1, sizes.para_threshs2, params, device="cpu", verbose=False,
        )  # fmt: skip

    parent, seqlen, request_node = np.array(tree.parent), np.array(tree.seqlen), np.array(tree.request_node)
    row["arrays_ms"] = median_ms(lambda: prepare(KVTree(parent, seqlen, request_node), tree.kv_ptrs), most=200)
    row["nodes_ms"] = median_ms(lambda: prepare(nodes, kv_ptrs), most=200)
    return row


def median_ms(call: Callable[[], Any], most: int = 15) -> float:
    """Median time of up to `most` calls, fewer of a slow one."""
    times: list[float] = []
    while len(times) < most and sum(times) < 1000 * REPEAT_SECONDS:
        start = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def line(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    times = [row.get(f"{name}_ms", math.nan) for name in ("arrays", "nodes", "oracle", "plan_decode")]
    columns = "".join(f"{'-' if math.isnan(ms) else f'{ms:.2f} ms':>12}" for ms in times)
    size = readable_size(row["plan_bytes"])
    return f"{row['kind']:<8}{row['nodes']:>10}{row['requests']:>10}{row['vnodes']:>10}{columns}{size:>11}"


if __name__ == "__main__":
    sys.exit(main())
