"""qkv_preparation: shapes, contents of the caches, kinds of arrays, requests of the tree."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.execution.arrays import as_numpy, view
from fasttree_cupy.flash_attn_wrap import qkv_preparation as reference_name
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree
from fasttree_cupy.workload import qkv_preparation

HEADS = (6, 2, 16)  # query heads, KV heads, head_dim
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def leafy_tree() -> list[KVTreeNode]:
    """Node 0 (5 tokens) above 1 (3) and 2 (0); 1 above 3 (2) and 4 (7). Without requests."""
    rows = [(-1, 5, 2), (0, 3, 2), (0, 0, 0), (1, 2, 0), (1, 7, 0)]
    return [KVTreeNode(parent, i, seqlen, children) for i, (parent, seqlen, children) in enumerate(rows)]


def prepared(tree: Any, dtype: Any = "float16", device: Any = "cpu", seed: int | None = 7) -> tuple[Any, ...]:
    return qkv_preparation(tree, *HEADS, device, dtype, seed=seed)


def paths(tree: KVTree) -> list[list[int]]:
    """Each request's nodes, root first."""
    result = []
    for node in tree.request_node.tolist():
        path = []
        while node >= 0:
            path.insert(0, node)
            node = tree.parent[node]
        result.append(path)
    return result


def check_caches(tree: KVTree, made: tuple[Any, ...]) -> None:
    _, k_cache, v_cache, lengths, k, v, ptrs = (np.asarray(part) for part in made)
    for request, path in enumerate(paths(tree)):
        rows = np.concatenate([np.arange(ptrs[node], ptrs[node + 1]) for node in path])
        assert lengths[request] == len(rows)
        for cache, tokens in ((k_cache, k), (v_cache, v)):
            np.testing.assert_array_equal(cache[request, : len(rows)], tokens[rows])
            assert not cache[request, len(rows) :].any()


def test_shapes_and_contents() -> None:
    nodes = leafy_tree()
    made = prepared(nodes)
    q, k_cache, v_cache, lengths, k, v, ptrs = made
    assert q.shape == (3, 6, 16)
    assert k_cache.shape == v_cache.shape == (3, 15, 2, 16)
    assert k.shape == v.shape == (17, 2, 16)
    assert (lengths.dtype, lengths.tolist()) == (np.int32, [5, 10, 15])
    assert (type(ptrs), ptrs) == (list, [0, 5, 8, 8, 10, 17])
    assert all(type(p) is int for p in ptrs)
    assert {a.dtype for a in (q, k_cache, v_cache, k, v)} == {np.dtype(np.float16)}
    check_caches(as_tree(nodes), made)


@pytest.mark.parametrize(
    "tree",
    [
        KVTree([-1], [4]),
        KVTree([-1, 0, 1, 2], [3, 1, 4, 1]),
        KVTree.from_levels([1, 3, 6], [8, 5, 2]),
        KVTree([2, 2, -1, 0], [1, 2, 3, 4]),  # the root is node 2
        KVTree([-1, 0, 0], [4, 2, 3], [1, 2, 0, 1]),  # an inner node's request, two at one leaf
    ],
)
def test_caches_hold_each_path(tree: KVTree) -> None:
    made = prepared(tree)
    assert made[0].shape[0] == tree.batch_size
    check_caches(tree, made)


def test_values_are_standard_normal_and_all_different() -> None:
    tree = KVTree([-1], [4000])
    q, k, v = (prepared(tree)[i].astype(np.float32) for i in (0, 4, 5))
    for values in (k, v):
        assert abs(values.mean()) < 0.02
        assert abs(values.std() - 1) < 0.02
    assert not np.array_equal(k, v)
    assert np.isfinite(q).all()


def test_seed() -> None:
    tree = KVTree.from_levels([1, 3], [5, 4])
    first, again, other = prepared(tree), prepared(tree), prepared(tree, seed=8)
    unseeded = prepared(tree, seed=None), prepared(tree, seed=None)
    for i in (0, 1, 2, 4, 5):
        np.testing.assert_array_equal(first[i], again[i])
        assert not np.array_equal(first[i], other[i])
        assert not np.array_equal(unseeded[0][i], unseeded[1][i])


def test_rounding_is_the_only_difference_between_dtypes() -> None:
    tree = KVTree([-1], [50])
    half, brain = (prepared(tree, dtype)[4].astype(np.float32) for dtype in ("float16", "bfloat16"))
    np.testing.assert_allclose(half, brain, rtol=2**-8)


def test_requests_are_filled_once() -> None:
    nodes = leafy_tree()
    prepared(nodes)
    filled = deepcopy(nodes)
    assert [node.requests for node in nodes] == [[0, 1, 2], [1, 2], [0], [1], [2]]
    prepared(nodes)
    assert nodes == filled


def test_requests_already_set_are_honoured() -> None:
    nodes = leafy_tree()
    for node, requests in zip(nodes, [[0, 1, 2, 3], [0, 1, 3], [2], [3], [0]], strict=True):
        node.requests = requests  # request 1 ends at inner node 1
    before = deepcopy(nodes)
    made = prepared(nodes)
    assert nodes == before
    assert made[3].tolist() == [15, 8, 5, 10]
    check_caches(as_tree(nodes), made)


def test_a_tree_without_tokens() -> None:
    made = prepared(KVTree([-1, 0], [0, 0]))
    assert made[1].shape == (1, 0, 2, 16)
    assert made[4].shape == (0, 2, 16)
    assert made[6] == [0, 0, 0]


def test_reference_module_and_defaults() -> None:
    assert reference_name is qkv_preparation
    made = qkv_preparation(leafy_tree(), 4, 4, 32)
    assert tuple(made[0].shape) == (3, 4, 32)
    assert view("Q", made[0]).dtype == "float16"


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        ("float16", np.float16),
        ("bfloat16", BFLOAT16),
        (np.float16, np.float16),
        (np.dtype(np.float16), np.float16),
        (ml_dtypes.bfloat16, BFLOAT16),
        (BFLOAT16, BFLOAT16),
    ],
)
def test_names_and_numpy_dtypes_give_numpy_on_the_cpu(dtype: Any, expected: Any) -> None:
    made = prepared(leafy_tree(), dtype)
    assert all(type(part) is np.ndarray for part in made[:6])
    assert {made[i].dtype for i in (0, 1, 2, 4, 5)} == {np.dtype(expected)}


@pytest.mark.parametrize("dtype", [None, "float32", np.float64, "int32", "no dtype", 16, [np.float16], np.zeros(3)])
def test_other_dtypes_are_refused(dtype: Any) -> None:
    nodes = leafy_tree()
    with pytest.raises(TypeError, match=r"^dtype is .*, expected float16 or bfloat16"):
        prepared(nodes, dtype)
    assert nodes == leafy_tree()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_qo_heads": 5}, ValueError, "num_qo_heads is 5, expected a multiple of num_kv_heads, 2"),
        ({"num_qo_heads": 0}, ValueError, "num_qo_heads is 0"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads is -1"),
        ({"num_kv_heads": True}, TypeError, "num_kv_heads is True"),
        ({"head_dim": 16.0}, TypeError, "head_dim is 16.0"),
        ({"device": "tpu"}, ValueError, "device is 'tpu', expected None, 'cpu', 'cuda' or"),
        ({"device": "cpu:1"}, ValueError, "device is 'cpu:1', expected None, 'cpu'"),
        ({"tree_info": None}, TypeError, "tree_info is NoneType"),
        ({"tree_info": []}, ValueError, "tree_info is empty"),
        ({"tree_info": [KVTreeNode(0, 0, 1, 1)]}, ValueError, "tree_info"),
        ({"tree_info": [KVTreeNode(-1, 0, 1, 0, None)]}, TypeError, r"tree_info\[0\].requests is NoneType"),  # type: ignore[arg-type]
        ({"seed": -1}, ValueError, "seed is -1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    nodes = leafy_tree()
    arguments = {
        "tree_info": nodes, "num_qo_heads": 6, "num_kv_heads": 2, "head_dim": 16, "device": "cpu"
    }  # fmt: skip
    with pytest.raises(error, match=message):
        qkv_preparation(**{**arguments, **change})
    assert nodes == leafy_tree()


def test_the_one_cpu_has_a_number(torch: Any) -> None:
    for device in ("cpu:0", torch.device("cpu", 0)):
        made = qkv_preparation(leafy_tree(), 4, 4, 16, device, seed=0)
        np.testing.assert_array_equal(made[0], qkv_preparation(leafy_tree(), 4, 4, 16, "cpu", seed=0)[0])


# Other frameworks


def bits(array: Any) -> np.ndarray[Any, Any]:
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_dtype_gives_the_same_as_tensors(torch: Any, dtype: str) -> None:
    made = prepared(leafy_tree(), getattr(torch, dtype), torch.device("cpu"))
    for tensor, array in zip(made[:6], prepared(leafy_tree(), dtype), strict=False):
        assert isinstance(tensor, torch.Tensor)
        assert tensor.device.type == "cpu"
        np.testing.assert_array_equal(bits(as_numpy(view("x", tensor))), bits(array))
    assert (made[0].dtype, made[3].dtype) == (getattr(torch, dtype), torch.int32)


def test_other_torch_dtypes_are_refused(torch: Any) -> None:
    with pytest.raises(TypeError, match="dtype is float32, expected float16 or bfloat16"):
        prepared(leafy_tree(), torch.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax_dtype_gives_the_same_as_jax_arrays(jax: Any, dtype: str) -> None:
    made = prepared(leafy_tree(), getattr(jax.numpy, dtype))
    for array, expected in zip(made[:6], prepared(leafy_tree(), dtype), strict=False):
        assert isinstance(array, jax.Array)
        assert {device.platform for device in array.devices()} == {"cpu"}
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(bits(array), bits(expected))


# GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("device", [None, "cuda", "cuda:0"])
def test_cupy_arrays_on_a_gpu(dtype: str, device: str | None) -> None:
    cupy = pytest.importorskip("cupy")
    for array, expected in zip(prepared(leafy_tree(), dtype, device), prepared(leafy_tree(), dtype), strict=False):
        if isinstance(expected, list):
            assert array == expected
            continue
        assert isinstance(array, cupy.ndarray)
        assert array.dtype == expected.dtype
        np.testing.assert_array_equal(bits(cupy.asnumpy(array)), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_torch_tensors_on_a_gpu(torch: Any, dtype: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    made = prepared(leafy_tree(), getattr(torch, dtype), torch.device("cuda:0"))
    for tensor, expected in zip(made[:6], prepared(leafy_tree(), dtype), strict=False):
        assert tensor.device == torch.device("cuda:0")
        np.testing.assert_array_equal(bits(as_numpy(view("x", tensor.cpu()))), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax_arrays_on_a_gpu(jax: Any, dtype: str) -> None:
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX sees no GPU ({error})")
    made = prepared(leafy_tree(), getattr(jax.numpy, dtype), "cuda:0")
    for array, expected in zip(made[:6], prepared(leafy_tree(), dtype), strict=False):
        assert array.devices() == {device}
        np.testing.assert_array_equal(bits(array), bits(expected))


@pytest.mark.parametrize(("seed", "error"), [(-1, ValueError), ("x", TypeError), (1.5, TypeError)])
def test_wrong_seed_is_named(seed: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="seed is"):
        qkv_preparation(KVTree.from_levels([1], [2]), 1, 1, 16, "cpu", seed=seed)
