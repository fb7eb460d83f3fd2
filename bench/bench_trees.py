"""Time of finding the tree of requests in what an engine has: block tables, token ids. Needs no GPU, uses one core.

::

    python -m bench.bench_trees --output bench/results/trees.json

``shared``: a quarter of each request is every request's, the next is that of one in 16, of one in 128, its own.
``private``: no two requests share anything.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import machine, records
from bench.bench_preparation import median_ms
from fasttree_cupy import KVTree

__all__ = ["main"]

GROUPS = {"shared": (1, 16, 128, None), "private": (None,)}
"""Groups of requests that share a stretch, stretch after stretch; None: each request is its own."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(arguments)
    rows = [block_tables(kind, args.requests, args.pages, size) for kind in GROUPS for size in args.page_sizes]
    rows += [sequences(kind, args.requests, args.tokens) for kind in GROUPS]
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if args.output is not None:
        records.save(args.output, {"machine": machine.describe("bench.bench_trees", arguments), "cases": rows})
    return 0


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_trees", description="Time of finding trees, without GPU.")
    parser.add_argument("--requests", type=int, default=1024)
    parser.add_argument("--pages", type=int, default=128, help="pages a request")
    parser.add_argument("--page-sizes", type=int, nargs="+", default=[1, 16], help="tokens a page")
    parser.add_argument("--tokens", type=int, default=2048, help="tokens a request, where token ids are given")
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args(arguments)


def keys(kind: str, requests: int, length: int) -> npt.NDArray[np.int32]:
    """A row of `length` numbers a request: equal where requests share, else different everywhere."""
    groups = [count or requests for count in GROUPS[kind]]
    stretches, first = [], 0
    for count, columns in zip(groups, np.array_split(np.arange(length), len(groups)), strict=True):
        own = first + np.arange(count * len(columns)).reshape(count, len(columns))
        stretches.append(own[np.arange(requests) * count // requests])
        first += own.size
    return np.random.default_rng(0).permutation(first).astype(np.int32)[np.concatenate(stretches, axis=1)]


def block_tables(kind: str, requests: int, pages: int, page_size: int) -> dict[str, Any]:
    """A row of results for `KVTree.from_block_tables`, which also finds the rows of the pool."""
    table, lengths = keys(kind, requests, pages), np.full(requests, pages * page_size)
    tree, _ = KVTree.from_block_tables(table, lengths, page_size)
    ms = median_ms(lambda: KVTree.from_block_tables(table, lengths, page_size), most=200)
    return {"from": "block tables", "kind": kind, "page_size": page_size, "keys": pages} | found(tree, ms)


def sequences(kind: str, requests: int, tokens: int) -> dict[str, Any]:
    """A row of results for `KVTree.from_sequences`."""
    ids = list(keys(kind, requests, tokens))
    tree = KVTree.from_sequences(ids)
    ms = median_ms(lambda: KVTree.from_sequences(ids), most=50)
    return {"from": "token ids", "kind": kind, "keys": tokens} | found(tree, ms)


def found(tree: KVTree, ms: float) -> dict[str, Any]:
    """What every row says."""
    return {"requests": tree.batch_size, "nodes": tree.num_nodes, "unique_tokens": tree.unique_tokens, "median_ms": ms}


if __name__ == "__main__":
    sys.exit(main())
