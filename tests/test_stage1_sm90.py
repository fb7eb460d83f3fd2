"""stage1_sm90 and stage2 in every way that launches choose between, against float64 dense attention. Needs a GPU of
compute capability 9.0; test_decode.py has their cases as launches choose them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import cuda, stages
from fasttree_cupy.execution.device import gpu_problem
from tests.reference import dense_attention
from tests.test_decode import DTYPES
from tests.tolerances import assert_close

pytestmark = pytest.mark.gpu

TREES = {
    "levels": ft.KVTree.from_levels([1, 4, 70], [300, 33, 17]),
    "leaves": ft.KVTree.from_levels([1, 200], [65, 16]),
    "few": ft.KVTree.from_levels([1, 3], [700, 130]),
    "inner": ft.KVTree([-1, 0, 0, 1], [0, 0, 70, 65], [0, 1, 2, 3, 3]),
}
LAYOUTS = [(32, 8, 128, "float16"), (16, 1, 128, "bfloat16"), (8, 8, 64, "float16"), (12, 4, 64, "bfloat16")]
CHOICES = [
    {"STAGE1_SM90_FEW": 10**6, "STAGE1_SM90_SHORT": 0},  # a block takes each vnode together
    {"STAGE1_SM90_SHORT": 10**6, "STAGE1_SM90_UNITS": 1e-6},  # a warp takes all heads of a vnode of few rows
    {"STAGE1_SM90_SHORT": 10**6, "STAGE1_SM90_UNITS": 10**6, "STAGE1_SM90_SPREAD": 1.0},
    {"STAGE2_FEW": 0, "STAGE1_SM90_SPREAD": 0.0},  # a warp merges several heads
    {"STAGE2_FEW": 10**6, "STAGE1_SM90_READ_ONCE": 0},  # no hints to the cache
]


@pytest.fixture(autouse=True)
def hopper() -> None:
    if gpu_problem() is None and cuda.compute_capability(0) != 90:
        pytest.skip("stage1_sm90 needs compute capability 9.0")


def arrays_of(tree: ft.KVTree, heads: int, kv_heads: int, head_dim: int, dtype: str) -> list[Any]:
    """Q, K and V on the host."""
    rng = np.random.default_rng(0)
    shapes = ((tree.batch_size, heads), (tree.unique_tokens, kv_heads), (tree.unique_tokens, kv_heads))
    return [rng.standard_normal((*shape, head_dim), np.float32).astype(DTYPES[dtype]) for shape in shapes]


def prepared(tree: ft.KVTree, heads: int, kv_heads: int, head_dim: int) -> tuple[ft.MetadataTuple, ft.FastTreeParams]:
    params = ft.FastTreeParams.for_gpu("H100", heads // kv_heads)
    metadata, _ = ft.fasttree_preparation(
        tree, tree.kv_ptrs, tree.batch_size, heads, kv_heads, head_dim,
        [256, 64], [132, 528], [132, 132], params, device="cuda", verbose=False,
    )  # fmt: skip
    return metadata, params


def decode(arrays: list[Any], metadata: ft.MetadataTuple, params: ft.FastTreeParams) -> Any:
    """The output on the host, from poisoned partial outputs."""
    metadata.mid_o.fill(np.nan)
    metadata.mid_lse.fill(np.nan)
    scale = arrays[0].shape[2] ** -0.5
    return ft.fasttree_decode(*arrays, None, *metadata, params.TSQs, params.TSKs, scale).get()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: "-".join(map(str, layout)))
@pytest.mark.parametrize("name", TREES)
def test_every_way(name: str, layout: tuple[int, int, int, str], cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES[name]
    host = arrays_of(tree, *layout)
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *host, layout[2] ** -0.5)
    arrays = [cupy.asarray(array) for array in host]
    metadata, params = prepared(tree, *layout[:3])
    for choice in CHOICES:
        with monkeypatch.context() as patch:
            for constant, value in choice.items():
                patch.setattr(stages, constant, value)
            assert_close(decode(arrays, metadata, params), expected, host[0].dtype)


def test_without_tensor_maps(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES["levels"]
    host = arrays_of(tree, *LAYOUTS[0])
    arrays = [cupy.asarray(array) for array in host]
    metadata, params = prepared(tree, *LAYOUTS[0][:3])
    expected = decode(arrays, metadata, params)
    monkeypatch.setattr(stages, "tensor_maps", lambda *_: None)
    np.testing.assert_array_equal(decode(arrays, metadata, params), expected)


def test_stage_2_where_the_driver_cannot_start_it_early(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = TREES["levels"]
    arrays = [cupy.asarray(array) for array in arrays_of(tree, *LAYOUTS[0])]
    metadata, params = prepared(tree, *LAYOUTS[0][:3])
    expected = decode(arrays, metadata, params)
    monkeypatch.setattr(stages, "launch_dependent", lambda *_: False)
    np.testing.assert_array_equal(decode(arrays, metadata, params), expected)


def test_a_plain_list_of_phases_does(cupy: Any) -> None:
    """What preparation knows of the vnodes' lengths chooses a kernel, not the result."""
    tree = TREES["few"]
    host = arrays_of(tree, *LAYOUTS[1])
    arrays = [cupy.asarray(array) for array in host]
    metadata, params = prepared(tree, *LAYOUTS[1][:3])
    plain = metadata._replace(phase_node_nums=list(metadata.phase_node_nums))
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *host, LAYOUTS[1][2] ** -0.5)
    assert_close(decode(arrays, plain, params), expected, host[0].dtype)


@pytest.mark.parametrize("own_stream", [False, True])
def test_launches_behind_one_another_keep_their_order(own_stream: bool, cupy: Any) -> None:
    """Stage 2 may begin early, but not before stage 1 ends, nor the next stage 1 before this stage 2."""
    tree = ft.KVTree.from_levels([1, 8, 512], [512, 64, 16])
    layout = LAYOUTS[0]
    metadata, params = prepared(tree, *layout[:3])
    inputs = [[cupy.asarray(array) for array in arrays_of(tree, *layout)] for _ in range(4)]
    expected = [decode(arrays, metadata, params) for arrays in inputs]
    stream = cupy.cuda.Stream(non_blocking=True) if own_stream else cupy.cuda.Stream.null
    cupy.cuda.Device().synchronize()
    outputs = [cupy.full_like(arrays[0], np.nan) for arrays in inputs]
    cupy.cuda.Device().synchronize()
    with stream:
        for _, (arrays, out) in itertools.product(range(5), zip(inputs, outputs, strict=True)):
            ft.fasttree_decode(*arrays, out, *metadata, params.TSQs, params.TSKs, layout[2] ** -0.5)
    stream.synchronize()
    for out, right in zip(outputs, expected, strict=True):
        np.testing.assert_array_equal(out.get(), right)


def test_a_graph_of_the_documented_call_replays(cupy: Any) -> None:
    tree = TREES["levels"]
    layout = LAYOUTS[0]
    host = arrays_of(tree, *layout)
    arrays = [cupy.asarray(array) for array in host]
    metadata, params = prepared(tree, *layout[:3])
    out = cupy.empty_like(arrays[0])
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        run = (*arrays, out, *metadata, params.TSQs, params.TSKs, layout[2] ** -0.5)
        ft.fasttree_decode(*run)
        stream.synchronize()
        stream.begin_capture()
        ft.fasttree_decode(*run)
        ft.fasttree_decode(*run)
        graph = stream.end_capture()
        for seed in (1, 2):
            arrays[0][...] = cupy.random.default_rng(seed).standard_normal(arrays[0].shape, dtype=np.float32)
            out.fill(np.nan)
            metadata.mid_o.fill(np.nan)
            graph.launch(stream)
            stream.synchronize()
            q = arrays[0].get()
            expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, q, *host[1:], layout[2] ** -0.5)
            assert_close(out.get(), expected, np.float16)
