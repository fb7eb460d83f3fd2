"""The greedy planner against a slow, obvious one, on random trees."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.planning.greedy import GreedyPlan, plan
from fasttree_cupy.tree import KVTree

TILES = [
    ([64, 16], [32, 128]),
    ([16, 4], [32, 32]),
    ([48, 12], [32, 96]),
    ([4, 1], [32, 128]),
    ([3, 2], [7, 5]),
]
SPLITS = [[1024, 128], [64, 16], [5, 3], [100, 100]]


class Oracle:
    """The heuristic in plain Python: one small method a step, lists and sets, no attention to speed."""

    def __init__(self, tree: KVTree, settings: Settings) -> None:
        self.settings = settings
        self.parent = tree.parent.tolist()
        self.seqlen = tree.seqlen.tolist()
        self.nodes = range(len(self.parent))
        self.children = [[c for c in self.nodes if self.parent[c] == n] for n in self.nodes]
        self.ending = [[r for r, e in enumerate(tree.request_node.tolist()) if e == n] for n in self.nodes]
        self.batch_size = tree.batch_size
        self.q_tiles, self.kv_tiles = list(settings.TSQs), list(settings.TSKs)
        self.splits = [settings.kv_split_sizes[0]] * 2

    def subtree(self, node: int) -> list[int]:
        below = [r for child in self.children[node] for r in self.subtree(child)]
        return sorted(self.ending[node] + below)

    def phase(self, num_q: int) -> int:
        return 0 if num_q > self.q_tiles[1] else 1

    def cost(self, num_q: int, num_kv: int) -> float:
        s, phase = self.settings, self.phase(num_q)
        pad_q = self.q_tiles[phase] - ((num_q - 1) % self.q_tiles[phase] + 1)
        pad_kv = max(0, self.kv_tiles[phase] - num_kv)
        return s.alpha * pad_q * s.kv_group_num * num_kv + s.beta * pad_kv * num_q * s.kv_group_num

    def assign(self) -> None:
        self.assigned = [0 for _ in self.nodes]
        length = list(self.seqlen)
        queue = [self.parent.index(-1)]
        while queue:
            node = queue.pop(0)
            num_q = len(self.subtree(node))
            for child in self.children[node]:
                n = len(self.subtree(child))
                split_k = self.cost(num_q, length[node]) + self.cost(n, length[child]) + self.settings.gamma * n
                split_q = self.cost(num_q - n, length[node]) + self.cost(n, length[child] + length[node])
                if split_k > split_q:
                    self.assigned[child] = 1
                    num_q -= n
                    length[child] += length[node]
                queue.append(child)

    def completion_order(self) -> list[int]:
        open_children = [len(c) for c in self.children]
        queue = [n for n in self.nodes if not self.children[n]]
        for node in queue:
            above = self.parent[node]
            if above >= 0:
                open_children[above] -= 1
                if open_children[above] == 0:
                    queue.append(above)
        return queue

    def requests(self, node: int) -> list[int]:
        taken = list(self.ending[node])
        for child in self.completion_order():
            if self.parent[child] == node and self.assigned[child] == 0:
                taken += self.subtree(child)
        return taken

    def rows(self, node: int) -> list[int]:
        first = sum(self.seqlen[:node])
        own = list(range(first, first + self.seqlen[node]))
        return self.rows(self.parent[node]) + own if self.assigned[node] else own

    def parallelism(self) -> list[int]:
        blocks = [0, 0]
        for node in self.nodes:
            num_q, num_kv = len(self.requests(node)), len(self.rows(node))
            if num_q:
                p = self.phase(num_q)
                blocks[p] += -(-num_kv // self.splits[p]) * -(-num_q // self.q_tiles[p])
        return [b * self.settings.num_kv_heads for b in blocks]

    def run(self) -> dict[str, Any]:
        rounds = []
        for k in range(3):
            self.assign()
            rounds.append(self.parallelism())
            if k == 2 or not (self.reduce(rounds[-1]) if k == 0 else self.unify(rounds[-1])):
                break
        return {**self.layout(), "parallelism": rounds}

    def reduce(self, blocks: list[int]) -> bool:
        low = [p for p in (0, 1) if 0 < blocks[p] < self.settings.para_threshs1[p]]
        for p in low:
            self.splits[p] = self.settings.kv_split_sizes[1]
        return bool(low)

    def unify(self, blocks: list[int]) -> bool:
        for p in (0, 1):
            if 0 < blocks[p] < self.settings.para_threshs2[p]:
                self.q_tiles = [self.q_tiles[1 - p]] * 2
                self.kv_tiles = [self.kv_tiles[1 - p]] * 2
                return True
        return False

    def layout(self) -> dict[str, Any]:
        kv_entries: list[int] = []
        q_entries: list[int] = []
        vnodes = []
        for node in self.nodes:
            requests, rows = self.requests(node), self.rows(node)
            if not requests:
                continue
            split = self.splits[self.phase(len(requests))]
            for start in range(0, len(rows), split):
                for tile in range(0, len(requests), self.q_tiles[0]):
                    kv = len(kv_entries) + start, len(rows[start : start + split])
                    q = len(q_entries) + tile, len(requests[tile : tile + self.q_tiles[0]])
                    vnodes.append((*kv, *q))
                q_entries += requests
            kv_entries += rows
        first = [v for v in vnodes if v[3] > self.q_tiles[1]]
        second = [v for v in vnodes if v[3] <= self.q_tiles[1]]
        columns = list(zip(*(first + second), strict=True)) or [(), (), (), ()]
        places = [[k for k, r in enumerate(q_entries) if r == request] for request in range(self.batch_size)]
        lens = [len(p) for p in places]
        return {
            "vnode_to_kv_entries": kv_entries,
            "vnode_to_kv_offs": list(columns[0]),
            "vnode_to_kv_lens": list(columns[1]),
            "vnode_to_q_entries": q_entries,
            "vnode_to_q_offs": list(columns[2]),
            "vnode_to_q_lens": list(columns[3]),
            "req_to_vnode_entries": [k for p in places for k in p],
            "req_to_vnode_offs": [sum(lens[:r]) for r in range(self.batch_size)],
            "req_to_vnode_lens": lens,
            "phase_node_nums": [len(first), len(second)],
            "phase_node_offsets": [0, len(first)],
            "node_assignments": self.assigned,
            "q_tile_sizes": self.q_tiles,
            "kv_tile_sizes": self.kv_tiles,
            "kv_split_sizes": self.splits,
        }


@dataclass(frozen=True)
class Settings:
    """The arguments of ``plan`` after the tree."""

    kv_split_sizes: list[int]
    para_threshs1: list[int]
    para_threshs2: list[int]
    num_kv_heads: int
    alpha: float
    beta: float
    gamma: float
    TSQs: list[int]
    TSKs: list[int]
    kv_group_num: int


DEFAULTS = Settings([1024, 128], [132, 528], [132, 132], 8, 0.66, 0.33, 0.1, [16, 4], [32, 128], 4)


def make_plan(tree: KVTree, settings: Settings = DEFAULTS) -> GreedyPlan:
    return plan(tree, **vars(settings))


def random_tree(rng: np.random.Generator) -> KVTree:
    """Shuffled ids, empty nodes, requests that end at inner nodes, several at one node."""
    num_nodes = int(rng.integers(1, 30))
    reach = int(rng.integers(1, 30))
    shuffled = rng.permutation(num_nodes)
    parent = np.full(num_nodes, -1)
    for k in range(1, num_nodes):
        parent[shuffled[k]] = shuffled[rng.integers(max(0, k - reach), k)]
    seqlen = rng.integers(0, rng.choice([4, 40, 400]), num_nodes) * (rng.random(num_nodes) < 0.8)
    leaves = np.setdiff1d(np.arange(num_nodes), parent)
    more = rng.integers(0, num_nodes, int(rng.integers(0, 40)))
    return KVTree(parent, seqlen, rng.permutation(np.concatenate([leaves, more])))


def random_settings(rng: np.random.Generator) -> Settings:
    TSQs, TSKs = TILES[rng.integers(len(TILES))]
    return Settings(
        kv_split_sizes=SPLITS[rng.integers(len(SPLITS))],
        para_threshs1=rng.choice([0, 20, 132, 528], 2).tolist(),
        para_threshs2=rng.choice([0, 20, 132, 528], 2).tolist(),
        num_kv_heads=int(rng.choice([1, 2, 8, 32])),
        alpha=float(rng.choice([0.0, 0.33, 0.66])),
        beta=float(rng.choice([0.0, 0.33])),
        gamma=float(rng.choice([-10.0, 0.0, 0.1, 10.0])),
        TSQs=TSQs,
        TSKs=TSKs,
        kv_group_num=int(rng.choice([1, 3, 4, 16])),
    )


@pytest.mark.parametrize("seed", range(120))
def test_equals_the_oracle(seed: int) -> None:
    rng = np.random.default_rng(seed)
    tree, settings = random_tree(rng), random_settings(rng)
    got = make_plan(tree, settings)
    for name, expected in Oracle(tree, settings).run().items():
        value = getattr(got, name)
        assert (value.tolist() if isinstance(value, np.ndarray) else value) == expected, name


@pytest.mark.parametrize("seed", range(40))
def test_each_request_reads_its_path_once(seed: int) -> None:
    """The property that attention rests on, checked without any planner's help."""
    rng = np.random.default_rng(1000 + seed)
    tree, settings = random_tree(rng), random_settings(rng)
    got = make_plan(tree, settings)
    rows_read: list[list[int]] = [[] for _ in range(tree.batch_size)]
    for v in range(len(got.vnode_to_kv_offs)):
        rows = got.vnode_to_kv_entries[got.vnode_to_kv_offs[v] :][: got.vnode_to_kv_lens[v]].tolist()
        for r in got.vnode_to_q_entries[got.vnode_to_q_offs[v] :][: got.vnode_to_q_lens[v]]:
            rows_read[r] += rows
    for request, node in enumerate(tree.request_node.tolist()):
        path: list[int] = []
        while node >= 0:
            path += range(tree.kv_ptrs[node], tree.kv_ptrs[node + 1])
            node = tree.parent[node]
        assert sorted(rows_read[request]) == sorted(path)


def test_arrays_are_int32_and_contiguous() -> None:
    got = make_plan(KVTree.from_levels([1, 4, 16], [10, 20, 30]))
    for name, value in zip(got._fields, got, strict=True):
        if isinstance(value, np.ndarray):
            assert value.dtype == np.int32, name
            assert value.flags.c_contiguous, name


def test_request_that_ends_at_an_inner_node_is_served() -> None:
    tree = KVTree([-1, 0, 0], [8, 8, 8], [0, 1, 2])
    got = make_plan(tree)
    assert got.req_to_vnode_lens.min() > 0


def test_tree_without_tokens_has_no_vnodes() -> None:
    got = make_plan(KVTree([-1, 0], [0, 0]))
    assert got.phase_node_nums == [0, 0]
    assert got.req_to_vnode_lens.tolist() == [0]
    assert got.vnode_to_kv_entries.size == 0


def test_deep_chain() -> None:
    """Nothing recurses."""
    tree = KVTree(np.arange(-1, 4999), np.ones(5000, int))
    got = make_plan(tree)
    assert got.vnode_to_kv_lens.sum() >= 5000


def test_too_many_tokens() -> None:
    with pytest.raises(ValueError, match=r"tree_info holds 2147483648 tokens"):
        make_plan(KVTree([-1, 0], [2**31 - 1, 1]))


def test_kv_entries_beyond_int32() -> None:
    """Each of many leaves takes the root's tokens along."""
    tree = KVTree.from_levels([1, 40], [10**8, 1])
    settings = Settings([1024, 128], [0, 0], [0, 0], 1, 0.0, 0.0, 10.0, [16, 4], [32, 32], 1)
    with pytest.raises(ValueError, match=r"vnode_to_kv_entries would hold 4000000040 entries"):
        make_plan(tree, settings)


def test_query_entries_beyond_int32() -> None:
    tree = KVTree([-1], [2**31 - 1], [0, 0])
    settings = Settings([1, 1], [0, 0], [0, 0], 1, 0.0, 0.0, 0.0, [16, 4], [32, 32], 1)
    with pytest.raises(ValueError, match=r"vnode_to_q_entries would hold 4294967294 entries"):
        make_plan(tree, settings)
