"""What serving asks of a plan: K and V anywhere in a pool, the LSE of every output, and states that merge."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fasttree_cupy as ft
from tests.reference import dense_attention
from tests.test_decode import DTYPES, namespace
from tests.tolerances import assert_close

BACKENDS = pytest.mark.parametrize("backend", ["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
TREES = (
    ft.KVTree.from_levels([1, 3, 40], [130, 33, 17]),
    ft.KVTree.from_levels([1, 2], [900, 3]),
    ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0, 1, 2, 3, 3]),
)
LAYOUTS = [(4, 4, 64, "float16"), (6, 2, 128, "bfloat16"), (16, 1, 32, "float16"), (65, 1, 64, "float16")]


def random_arrays(tree: ft.KVTree, layout: tuple[int, int, int, str], rows: int) -> list[np.ndarray[Any, Any]]:
    heads, kv_heads, head_dim, dtype = layout
    rng = np.random.default_rng(3)
    shapes = [(tree.batch_size, heads, head_dim), (rows, kv_heads, head_dim), (rows, kv_heads, head_dim)]
    return [rng.standard_normal(shape).astype(DTYPES[dtype]) for shape in shapes]


def expected(tree: ft.KVTree, q: Any, k: Any, v: Any) -> tuple[Any, Any]:
    return dense_attention(tree.parent, tree.seqlen, tree.request_node, q, k, v, q.shape[2] ** -0.5)


def host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array


def device_of(backend: str) -> str:
    return "cpu" if backend == "cpu" else "cuda"


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tree", TREES, ids=["levels", "prefix", "empty"])
def test_lse_is_returned(tree: ft.KVTree, layout: tuple[int, int, int, str], backend: str) -> None:
    arrays = random_arrays(tree, layout, tree.unique_tokens)
    q, k, v = (namespace(backend).asarray(array) for array in arrays)
    out, lse = ft.plan_decode(tree, *layout[:3], device=device_of(backend)).run(q, k, v, return_lse=True)
    right_out, right_lse = expected(tree, *arrays)
    assert_close(host(out), right_out, DTYPES[layout[3]])
    empty = np.isneginf(right_lse)
    np.testing.assert_array_equal(np.isneginf(host(lse)), empty)
    np.testing.assert_allclose(host(lse)[~empty], right_lse[~empty], rtol=0, atol=2e-5 * 16)
    assert host(lse).dtype == np.float32


@BACKENDS
@pytest.mark.parametrize("page_size", [1, 5, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_lie_anywhere_in_a_pool(layout: tuple[int, int, int, str], page_size: int, backend: str) -> None:
    tree = TREES[0]
    rng = np.random.default_rng(page_size)
    pages = rng.permutation(2 * (tree.unique_tokens // page_size + 1))
    kv_indices = np.repeat(pages, page_size) * page_size + np.tile(np.arange(page_size), len(pages))
    kv_indices = kv_indices[: tree.unique_tokens]
    arrays = random_arrays(tree, layout, int(pages.max() + 1) * page_size)
    q, k, v = (namespace(backend).asarray(array) for array in arrays)
    plan = ft.plan_decode(tree, *layout[:3], kv_indices=kv_indices, device=device_of(backend))
    right, _ = expected(tree, arrays[0], arrays[1][kv_indices], arrays[2][kv_indices])
    assert_close(host(plan.run(q, k, v)), right, DTYPES[layout[3]])


@BACKENDS
def test_block_tables_to_outputs(backend: str) -> None:
    tables = np.array([[3, 9, 0], [3, 9, 4], [3, 1, 7], [8, 0, 0]])
    lengths = np.array([20, 24, 19, 5])
    tree, kv_indices = ft.KVTree.from_block_tables(tables, lengths, page_size=8)
    arrays = random_arrays(tree, (8, 2, 64, "float16"), 80)
    q, k, v = (namespace(backend).asarray(array) for array in arrays)
    out = ft.plan_decode(tree, 8, 2, 64, kv_indices=kv_indices, device=device_of(backend)).run(q, k, v)
    for request, length in enumerate(lengths):
        rows = (tables[request][:, None] * 8 + np.arange(8)).ravel()[:length]
        one, _ = expected(ft.KVTree([-1], [length]), arrays[0][request : request + 1], arrays[1][rows], arrays[2][rows])
        assert_close(host(out)[request : request + 1], one, np.dtype(np.float16))


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        ([0, 1], ValueError, "kv_indices holds 2 rows, expected 3, one for each token"),
        ([0, 1, -1], ValueError, "kv_indices goes from -1 to 1, expected rows from 0"),
        ([0, 1, 2**31 - 1], ValueError, "kv_indices goes from 0 to 2147483647"),
        ([0.0, 1.0, 2.0], TypeError, "kv_indices"),
        (7, TypeError, "kv_indices is int"),
    ],
)
def test_wrong_rows_are_refused(indices: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ft.plan_decode(ft.KVTree([-1], [3]), 2, 1, 16, kv_indices=indices, device="cpu")


def test_rows_that_are_no_integers_of_the_caller_are_refused(torch: Any) -> None:
    plan = ft.plan_decode(ft.KVTree([-1], [3], [0, 0]), 2, 1, 16, device="cpu", capacity=ft.Capacity(8, 20))
    grad = torch.zeros(2, requires_grad=True)
    for rows, message in (
        ([True, 5], "rows holds a bool, expected integers"),
        ([[4, 5], [6, True]], "rows holds a bool, expected integers"),
        (np.ma.array([4, 5], mask=[0, 1]), "rows is masked, expected an array without a mask"),
        (grad, "rows is Tensor, expected an array in host memory .*requires grad"),
    ):
        with pytest.raises(TypeError, match=message):
            plan.append(rows)
    for change in (plan.fork, plan.finish):
        with pytest.raises(TypeError, match=r"requests is Tensor, expected an array in .*requires grad"):
            change(grad)
    assert (plan.live.tolist(), plan.tree.unique_tokens) == ([0, 1], 3)


def test_a_pool_too_small_is_refused() -> None:
    plan = ft.plan_decode(ft.KVTree([-1], [3]), 2, 1, 16, kv_indices=[5, 6, 9], device="cpu")
    q, kv = np.zeros((1, 2, 16), np.float16), np.zeros((9, 1, 16), np.float16)
    with pytest.raises(ValueError, match="k has 9 rows, expected 10 at least, as the rows of the plan's"):
        plan.run(q, kv, kv)
    assert plan.run(q, np.zeros((12, 1, 16), np.float16), np.zeros((12, 1, 16), np.float16)).shape == (1, 2, 16)


@BACKENDS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_halves_merge_to_the_whole(layout: tuple[int, int, int, str], backend: str) -> None:
    tree = TREES[0]
    arrays = random_arrays(tree, layout, tree.unique_tokens)
    q, k, v = (namespace(backend).asarray(array) for array in arrays)
    seqlen, device = np.array(tree.seqlen), device_of(backend)
    prefix = seqlen[0]
    first = ft.KVTree(tree.parent, np.where(np.arange(len(seqlen)) == 0, prefix, 0), tree.request_node)
    second = ft.KVTree(tree.parent, np.where(np.arange(len(seqlen)) == 0, 0, seqlen), tree.request_node)
    state_a = ft.plan_decode(first, *layout[:3], device=device).run(q, k[:prefix], v[:prefix], return_lse=True)
    state_b = ft.plan_decode(second, *layout[:3], device=device).run(q, k[prefix:], v[prefix:], return_lse=True)
    out, lse = ft.merge_states(*state_a, *state_b)
    _, right_lse = expected(tree, *arrays)
    np.testing.assert_allclose(host(lse), right_lse, rtol=0, atol=5e-4)
    parts = [host(part).astype(np.float64) for part in (*state_a, *state_b)]
    shares = [np.exp(part - right_lse)[..., None] for part in parts[1::2]]
    assert_close(host(out), parts[0] * shares[0] + parts[2] * shares[1], DTYPES[layout[3]])


@BACKENDS
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_empty_states_change_nothing(dtype: str, backend: str) -> None:
    xp = namespace(backend)
    rng = np.random.default_rng(5)
    o = xp.asarray(rng.standard_normal((3, 2, 32)).astype(DTYPES[dtype]))
    lse = xp.asarray(rng.standard_normal((3, 2)).astype(np.float32))
    nothing = xp.asarray(np.full((3, 2, 32), np.nan, np.float32).astype(DTYPES[dtype]))
    none = xp.asarray(np.full((3, 2), -np.inf, np.float32))
    for state in (ft.merge_states(o, lse, nothing, none), ft.merge_states(nothing, none, o, lse)):
        np.testing.assert_array_equal(host(state[0]), host(o))
        np.testing.assert_allclose(host(state[1]), host(lse), rtol=1e-6, atol=1e-6)
    both = ft.merge_states(nothing, none, nothing, none)
    assert not host(both[0]).astype(np.float32).any()
    assert np.isneginf(host(both[1])).all()


@BACKENDS
def test_what_empty_states_hold_is_not_looked_at(backend: str) -> None:
    xp = namespace(backend)
    o, lse = xp.ones((3, 2, 32), np.float16), xp.ones((3, 2), np.float32)
    none = xp.full_like(lse, -np.inf)
    for wild in (np.inf, -np.inf, np.nan):
        nothing = xp.full_like(o, wild)
        for state in (ft.merge_states(o, lse, nothing, none), ft.merge_states(nothing, none, o, lse)):
            np.testing.assert_array_equal(host(state[0]), host(o))
        assert not host(ft.merge_states(nothing, none, nothing, none)[0]).any()


@BACKENDS
@pytest.mark.parametrize("lse_b", [0.0, -3.0, 7.0])
def test_the_largest_outputs_merge(lse_b: float, backend: str) -> None:
    xp = namespace(backend)
    largest = {"float16": 65504.0, "bfloat16": 3.3895e38}
    for dtype, value in largest.items():
        o = xp.asarray(np.full((3, 2, 32), value, np.float32).astype(DTYPES[dtype]))
        lse = xp.zeros((3, 2), np.float32)
        np.testing.assert_array_equal(host(ft.merge_states(o, lse, o, lse + np.float32(lse_b))[0]), host(o))


def test_states_of_a_head_dim_that_no_kernel_has_are_refused() -> None:
    o, lse = np.zeros((3, 2, 48), np.float16), np.zeros((3, 2), np.float32)
    with pytest.raises(ValueError, match=r"^o_a has head_dim 48, expected one of 16, 32, 64, 128, 256"):
        ft.merge_states(o, lse, o, lse)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("o_a", lambda a: a.astype(np.float32), TypeError, "o_a has dtype float32"),
        ("o_b", lambda a: a[:2], ValueError, r"o_b has shape \(2, 2, 32\), expected \(3, 2, 32\)"),
        ("o_b", lambda a: a.astype(ml_dtypes.bfloat16), TypeError, "o_b has dtype bfloat16, expected float16"),
        ("lse_a", lambda a: a.astype(np.float16), TypeError, "lse_a has dtype float16, expected float32"),
        ("lse_b", lambda a: a[:, :1], ValueError, r"lse_b has shape \(3, 1\), expected \(3, 2\)"),
        ("lse_b", lambda a: np.asfortranarray(a), ValueError, "lse_b has strides .* in elements, expected"),
        ("stream", lambda a: 3, ValueError, "stream is 3, but o_a lies on the CPU"),
    ],
)
def test_states_that_do_not_fit_are_refused(name: str, change: Any, error: type[Exception], message: str) -> None:
    states: dict[str, Any] = {"o_a": np.zeros((3, 2, 32), np.float16), "lse_a": np.zeros((3, 2), np.float32)}
    states |= {"o_b": states["o_a"], "lse_b": states["lse_a"]}
    states[name] = change(states.get(name))
    with pytest.raises(error, match=message):
        ft.merge_states(**states)
