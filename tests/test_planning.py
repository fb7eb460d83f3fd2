"""The greedy planner against a slow, obvious one, on random trees; and in which order items are handed out."""

from __future__ import annotations

import numpy as np
import pytest

from fasttree_cupy.planning import subtree
from fasttree_cupy.planning.greedy import GreedyPlan, plan
from fasttree_cupy.planning.machine import H200
from fasttree_cupy.tree import KVTree
from tests.oracle import Oracle, Settings

TILES = [
    ([64, 16], [32, 128]),
    ([16, 4], [32, 32]),
    ([48, 12], [32, 96]),
    ([4, 1], [32, 128]),
    ([3, 2], [7, 5]),
]
SPLITS = [[1024, 128], [64, 16], [5, 3], [100, 100]]
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


def test_the_longest_items_come_first() -> None:
    tree = KVTree([-1, 0, 0, 0], [0, 100, 3000, 700])
    made = subtree.plan(tree, 16, 1, 128, H200, shapes=[subtree.TileShape(1, 1, 1)], limits=[1 << 30])
    assert made.items[:, subtree.ITEM_FIELDS.index("first_position")].tolist() == [1, 2, 0]
