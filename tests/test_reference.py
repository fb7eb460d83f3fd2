"""The oracle and the comparison, checked by hand-made numbers: nothing else checks them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tests.cases import PAPER_LEVELS, levels_tree
from tests.reference import dense_attention, path_rows
from tests.tolerances import assert_close


def test_paths_go_from_the_root_to_the_node() -> None:
    # Node 2 is the root, 0 hangs under it, 1 under 0. Rows: node 0 has 0-1, node 1 has 2, node 2 has 3-5.
    parent, seqlen = [2, 0, -1], [2, 1, 3]
    assert path_rows(parent, seqlen, 2).tolist() == [3, 4, 5]
    assert path_rows(parent, seqlen, 0).tolist() == [3, 4, 5, 0, 1]
    assert path_rows(parent, seqlen, 1).tolist() == [3, 4, 5, 0, 1, 2]


def test_levels_spread_children_evenly() -> None:
    tree = levels_tree("t", [1, 2, 5], [7, 6, 5])
    assert tree.parent == [-1, 0, 0, 1, 1, 1, 2, 2]
    assert tree.seqlen == [7, 6, 6, 5, 5, 5, 5, 5]
    assert tree.request_node == [3, 4, 5, 6, 7]


def test_paper_trees_have_the_published_sizes() -> None:
    trees = [levels_tree("t", *levels) for levels in PAPER_LEVELS]
    batches = [64, 256, 256, 256, 1024, 64, 512, 1024, 10, 1024, 1024, 1024, 1024, 1024, 1024]
    tokens = [2568, 9224, 11272, 8448, 34816, 7168, 20480, 278816, 8000, 20464, 21120, 22272, 24320, 23808, 25856]
    assert [len(tree.request_node) for tree in trees] == batches
    assert [sum(tree.seqlen) for tree in trees] == tokens


def test_one_token_gives_its_value() -> None:
    q = np.array([[[2.0, 1.0]]])
    k, v = np.array([[[3.0, 5.0]]]), np.array([[[-7.0, 8.0]]])
    o, lse = dense_attention([-1], [1], [0], q, k, v, 0.5)
    assert o.tolist() == [[[-7.0, 8.0]]]
    assert lse.tolist() == [[5.5]]


def test_softmax_over_two_nodes() -> None:
    q = np.array([[[1.0]]])
    k, v = np.log([[[1.0]], [[3.0]]]), np.array([[[4.0]], [[8.0]]])
    o, lse = dense_attention([-1, 0], [1, 1], [1], q, k, v, 1.0)
    assert o[0, 0, 0] == pytest.approx(0.25 * 4 + 0.75 * 8)
    assert lse[0, 0] == pytest.approx(math.log(4))


def test_query_heads_share_kv_heads_in_blocks() -> None:
    q = np.zeros((1, 4, 1))
    k, v = np.zeros((1, 2, 1)), np.array([[[10.0], [20.0]]])
    o, _ = dense_attention([-1], [1], [0], q, k, v, 1.0)
    assert o[0, :, 0].tolist() == [10, 10, 20, 20]


def test_the_cap_is_a_tanh() -> None:
    q, k, v = np.array([[[6.0]]]), np.array([[[1.0]]]), np.array([[[1.0]]])
    _, lse = dense_attention([-1], [1], [0], q, k, v, 0.5, logit_cap=2.0)
    assert lse[0, 0] == pytest.approx(2 * math.tanh(1.5))


def test_no_tokens_give_zero() -> None:
    q = np.ones((2, 1, 1))
    k = v = np.ones((1, 1, 1))
    o, lse = dense_attention([-1, 0], [0, 1], [0, 1], q, k, v, 1.0)
    assert o[:, 0, 0].tolist() == [0, 1]
    assert lse[:, 0].tolist() == [-math.inf, 1]


def test_close_values_pass() -> None:
    expected = np.linspace(-1, 1, 50)
    assert_close((expected * (1 + 4e-4)).astype(np.float32), expected, np.float16)
    assert_close(np.array([np.inf, 1.0]), np.array([np.inf, 1.0]), np.float16)
    assert_close(np.zeros(3), np.zeros(3), np.float16)
    assert_close(np.zeros((0, 2)), np.zeros((0, 2)), np.float16)


@pytest.mark.parametrize(
    ("actual", "expected", "message"),
    [
        ([1.0, 1.001], [1.0, 1.0], "worst at .1,."),
        ([1.0, np.nan], [1.0, 1.0], "o is NaN at 1 of 2 positions, the first .1,."),
        ([1.0, np.nan], [1.0, np.nan], "the expected o is NaN"),
        ([1.0, np.inf], [1.0, 1.0], "inf"),
        ([1.0, np.inf], [1.0, -np.inf], "inf"),
        ([1.0, 1.0], [1.0, np.inf], "inf"),
        ([1e-3, 0.0], [0.0, 0.0], "error"),
        ([1.0], [1.0, 1.0], "shape"),
    ],
)
def test_anything_else_fails(actual: Any, expected: Any, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        assert_close(np.array(actual), np.array(expected), np.float16)
