"""Random Q, K and V for a tree, in the layout of this package and in that of per-request KV caches."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.checks import ELEMENT_DTYPES
from fasttree_cupy.execution.arrays import DTYPES
from fasttree_cupy.execution.device import resolve_device
from fasttree_cupy.integers import checked_int
from fasttree_cupy.params import checked_heads
from fasttree_cupy.tree import KVTree, KVTreeNode, as_tree, fill_requests

__all__ = ["qkv_preparation"]


def qkv_preparation(
    tree_info: KVTree | Sequence[KVTreeNode],
    num_qo_heads: int,
    num_kv_heads: int,
    head_dim: int,
    device: Any = None,
    dtype: Any = "float16",
    *,
    seed: int | None = None,
) -> tuple[Any, Any, Any, Any, Any, Any, list[int]]:
    """Random normal Q, K and V for a tree, and the same K and V copied out into one cache a request.

    Parameters
    ----------
    tree_info : KVTree or sequence of KVTreeNode
        Requests are filled in when no node has any (see :func:`fasttree_cupy.tree.fill_requests`), else kept.
    num_qo_heads, num_kv_heads : int
        Query heads and KV heads; the first a multiple of the second.
    head_dim : int
        Elements of a head.
    device : str or torch.device, optional
        "cpu", "cuda" or "cuda:<index>"; by default the GPU where one is usable, else the CPU.
    dtype : str or dtype
        float16 or bfloat16. A torch dtype gives torch tensors, a JAX scalar type JAX arrays; names and NumPy
        dtypes give CuPy arrays on a GPU and NumPy arrays on the CPU.
    seed : int, optional
        Seed of the random values; the same on every device.

    Returns
    -------
    Q : dtype (batch_size, num_qo_heads, head_dim)
        One query a request.
    K_cache, V_cache : dtype (batch_size, max_seqlen, num_kv_heads, head_dim)
        Each request's tokens from the root down; zeros beyond its length.
    cache_seqlens : int32 (batch_size,)
        Tokens of each request.
    K_tree_tensor, V_tree_tensor : dtype (total_tokens, num_kv_heads, head_dim)
        Node i's tokens are the rows ``KV_ptrs[i]:KV_ptrs[i + 1]``.
    KV_ptrs : list of int, length num_nodes + 1
        First row of each node's tokens, and their total.

    Raises
    ------
    TypeError
        If `tree_info` is no tree, a number no integer, or `dtype` neither float16 nor bfloat16.
    ValueError
        If the tree is malformed, the numbers of heads do not fit, `seed` is negative, or `device` is unknown or not
        usable.
    """
    num_qo_heads, num_kv_heads = checked_heads(num_qo_heads, num_kv_heads)
    head_dim = checked_int(head_dim, "head_dim")
    dtype_name, framework = _dtype_and_framework(dtype)
    place = resolve_device(device)
    # NumPy's generator for GPUs as well: CuPy's own need cuRAND, which our minimal installation lacks.
    rng = np.random.default_rng(None if seed is None else checked_int(seed, "seed", least=0))
    if not isinstance(tree_info, KVTree):  # last: it changes the nodes
        fill_requests(tree_info)
    tree = as_tree(tree_info)

    def normal(*shape: int) -> npt.NDArray[Any]:
        return rng.standard_normal(shape, np.float32).astype(DTYPES[dtype_name])

    Q = normal(tree.batch_size, num_qo_heads, head_dim)
    K = normal(tree.unique_tokens, num_kv_heads, head_dim)
    V = normal(tree.unique_tokens, num_kv_heads, head_dim)
    lengths = tree.path_tokens.astype(np.int32)
    arrays = (Q, _caches(tree, K), _caches(tree, V), lengths, K, V)
    q, k_cache, v_cache, cache_seqlens, k, v = (_placed(array, place, framework) for array in arrays)
    return q, k_cache, v_cache, cache_seqlens, k, v, tree.kv_ptrs.tolist()


def _dtype_and_framework(dtype: Any) -> tuple[str, str]:
    """The dtype's name, and "torch", "jax" or "" for the framework whose dtype it is."""
    origin = type(dtype).__module__.partition(".")[0]
    framework = origin if origin in ("torch", "jax") else ""
    if framework == "torch":
        name = str(dtype).removeprefix("torch.")
    elif dtype is None:  # np.dtype takes it for float64
        name = "None"
    else:
        try:
            name = np.dtype(dtype).name  # ml_dtypes, loaded with arrays, makes "bfloat16" known
        except TypeError:
            name = repr(dtype)
    if name not in ELEMENT_DTYPES:
        raise TypeError(f"dtype is {name}, expected float16 or bfloat16 (a name or a NumPy, torch or JAX dtype)")
    return name, framework


def _caches(tree: KVTree, rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Copy each request's path out of `rows` (total_tokens, ...) into (batch_size, max_seqlen, ...)."""
    caches = np.zeros((tree.batch_size, int(tree.path_tokens.max()), *rows.shape[1:]), rows.dtype)
    parent, ptrs = tree.parent.tolist(), tree.kv_ptrs.tolist()
    for cache, end, node in zip(caches, tree.path_tokens.tolist(), tree.request_node.tolist(), strict=True):
        while node >= 0:  # from the path's end up to the root
            start = end - (ptrs[node + 1] - ptrs[node])
            cache[start:end] = rows[ptrs[node] : ptrs[node + 1]]
            node, end = parent[node], start
    return caches


def _placed(array: npt.NDArray[Any], place: str, framework: str) -> Any:
    """`array` on the device `place` ("cpu" or "cuda:<index>"), of the framework's kind."""
    if framework == "torch":
        torch = sys.modules["torch"]
        if array.dtype == DTYPES["bfloat16"]:  # travels as integers: from_numpy does not know it
            tensor = torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
        return tensor.to(place)
    if framework == "jax":
        return sys.modules["jax"].device_put(array, _jax_device(place))
    if place == "cpu":
        return array
    import cupy

    with cupy.cuda.Device(int(place.removeprefix("cuda:"))):
        return cupy.asarray(array)


def _jax_device(place: str) -> Any:
    jax = sys.modules["jax"]
    if place == "cpu":
        return jax.local_devices(backend="cpu")[0]
    index = int(place.removeprefix("cuda:"))
    return next(d for d in jax.local_devices(backend="gpu") if d.local_hardware_id == index)
