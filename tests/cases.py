"""Trees and decode cases that every backend is tested on; plain data, no package code.

220 trees: five plain shapes, the 15 trees of the FastTree paper and 200 small random ones. Each tree gets
eight cases, enough for it to meet every value of every factor; together they meet every pair of values of
two factors (`tests/test_decode.py` proves both).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["CASES", "FACTORS", "PAPER_LEVELS", "TREES", "Case", "Tree", "levels_tree"]

# Nodes and tokens a level.
PAPER_LEVELS: list[tuple[list[int], list[int]]] = [
    ([1, 2, 64], [8, 256, 32]),
    ([1, 4, 256], [8, 256, 32]),
    ([1, 4, 8, 256], [8, 256, 256, 32]),
    ([1, 256], [256, 32]),
    ([1, 1024], [2048, 32]),
    ([1, 16, 64], [1024, 256, 32]),
    ([1, 4, 16, 512], [1024, 256, 128, 32]),
    ([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256]),
    ([1, 10], [4000, 400]),
    ([1, 2, 4, 8, 16, 32, 64, 128, 1024], [16, 16, 16, 16, 16, 16, 16, 16, 16]),
    ([1, 2, 4, 8, 16, 32, 64, 128, 1024], [256, 128, 64, 16, 16, 16, 16, 16, 16]),
    ([1, 8, 16, 32, 64, 128, 1024], [256, 128, 64, 16, 16, 16, 16]),
    ([1, 8, 16, 32, 64, 256, 1024], [256, 128, 64, 16, 16, 16, 16]),
    ([1, 16, 32, 64, 128, 1024], [256, 128, 64, 16, 16, 16]),
    ([1, 16, 32, 64, 256, 1024], [256, 128, 64, 16, 16, 16]),
]

FACTORS: dict[str, list[Any]] = {
    "dtype": ["float16", "bfloat16"],
    "head_dim": [16, 32, 64, 128, 256],
    "group": [1, 2, 3, 4, 5, 7, 8, 16],
    "num_kv_heads": [1, 2, 3],
    "TSQs": [(64, 16), (16, 4), (8, 2), (48, 12), (32, 8), (4, 1)],
    "TSKs": [(32, 128), (32, 96), (32, 32)],
    "layout": ["contiguous", "wide_heads", "interleaved", "head_major", "odd_strides"],
    "logit_cap": [-1.0, 30.0, 2.0],
}
CASES_PER_TREE = 8

# Paper trees have up to 1,024 requests: wide heads go with few of them, which keeps the reference quick.
_PAPER_COLUMNS = {
    "head_dim": [256, 128, 64, 32, 16, 16, 16, 16],
    "group": [1, 2, 3, 4, 5, 7, 8, 16],
    "num_kv_heads": [1, 1, 1, 1, 2, 3, 1, 1],
}


@dataclass(frozen=True)
class Tree:
    """Node i: parent[i] (-1 for the root), seqlen[i]; request r's path ends at node request_node[r]."""

    name: str
    parent: list[int]
    seqlen: list[int]
    request_node: list[int]
    # Small trees need small splits to be split at all.
    kv_split_sizes: tuple[int, int] = (1024, 128)


@dataclass(frozen=True)
class Case:
    tree: Tree
    dtype: str
    head_dim: int
    group: int
    num_kv_heads: int
    TSQs: tuple[int, int]
    TSKs: tuple[int, int]
    layout: str
    logit_cap: float

    @property
    def id(self) -> str:
        heads = f"{self.group * self.num_kv_heads}q{self.num_kv_heads}kv{self.head_dim}d"
        tiles = f"TSQ{self.TSQs[0]},{self.TSQs[1]}-TSK{self.TSKs[0]},{self.TSKs[1]}"
        return f"{self.tree.name}-{self.dtype}-{heads}-{tiles}-{self.layout}-cap{self.logit_cap:g}"


def levels_tree(name: str, nodes: list[int], tokens: list[int]) -> Tree:
    """Child j of a level hangs under node j * above // size of the level above; one request a leaf."""
    parent, seqlen, first_above = [-1], [tokens[0]], 0
    for above, size, length in zip(nodes, nodes[1:], tokens[1:], strict=False):
        first = len(parent)
        parent += [first_above + j * above // size for j in range(size)]
        seqlen += [length] * size
        first_above = first
    return Tree(name, parent, seqlen, list(range(first_above, len(parent))))


def _plain_trees() -> list[Tree]:
    deep = [-1, *range(59)]
    return [
        Tree("one_node", [-1], [77], [0]),
        Tree("chain", [-1, 0, 1, 2, 3], [40, 1, 130, 7, 33], [4]),
        Tree("star", [-1] + [0] * 90, [50] + [5] * 90, list(range(1, 91)), (64, 16)),
        # Sixty nodes deep, a side leaf at every tenth.
        Tree("deep", [*deep, *range(0, 60, 10)], [3] * 60 + [9] * 6, [59, *range(60, 66)], (64, 16)),
        Tree("ragged", [-1, 0, 0, 1, 1, 1, 2, 6, 6], [300, 1, 64, 129, 2, 31, 0, 200, 33], [3, 4, 5, 7, 8]),
    ]


def _random_tree(index: int) -> Tree:
    """A small tree; among 200 there are inner ends, shared ends, shuffled ids and nodes without tokens."""
    rng = np.random.default_rng(index)
    num_nodes = int(rng.integers(1, 14))
    # 0: any earlier node, 1: mostly the last one (deep), 2: mostly the root (wide).
    habit = rng.integers(3)
    parent = [-1]
    for node in range(1, num_nodes):
        usual = {0: int(rng.integers(node)), 1: node - 1, 2: 0}[int(habit)]
        parent.append(usual if rng.random() < 0.8 else int(rng.integers(node)))
    seqlen = rng.integers(1, rng.choice([4, 40, 150]), size=num_nodes)
    seqlen[rng.random(num_nodes) < rng.choice([0.0, 0.3])] = 0

    leaves = sorted(set(range(num_nodes)) - set(parent))
    ends = leaves + rng.integers(num_nodes, size=rng.choice([0, 3])).tolist()
    ends += [int(rng.choice(leaves))] * int(rng.choice([0, 0, 20]))
    ids = rng.permutation(num_nodes) if index % 2 else np.arange(num_nodes)
    place = np.argsort(ids)
    return Tree(
        f"random{index}",
        [-1 if parent[i] < 0 else int(ids[parent[i]]) for i in place],
        [int(seqlen[i]) for i in place],
        [int(ids[node]) for node in rng.permutation(ends)],
        ((1024, 128), (64, 16))[index % 2],
    )


def _column(rng: np.random.Generator, values: list[Any]) -> list[Any]:
    """Eight values in random order, each of `values` among them."""
    repeated = [*values, *(values[i] for i in rng.integers(len(values), size=CASES_PER_TREE - len(values)))]
    return [repeated[i] for i in rng.permutation(CASES_PER_TREE)]


def _cases(tree: Tree, index: int) -> list[Case]:
    rng = np.random.default_rng([1, index])
    columns = {name: _column(rng, values) for name, values in FACTORS.items()}
    if tree.name.startswith("paper"):
        columns |= _PAPER_COLUMNS
    return [Case(tree, *row) for row in zip(*columns.values(), strict=True)]


PAPER_TREES = [levels_tree(f"paper{i}", *levels) for i, levels in enumerate(PAPER_LEVELS)]
TREES = [*_plain_trees(), *PAPER_TREES, *map(_random_tree, range(200))]
CASES = [case for index, tree in enumerate(TREES) for case in _cases(tree, index)]
