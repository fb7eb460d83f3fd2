"""fasttree_preparation: golden vectors, checks of each argument, devices, and what it leaves behind."""

from __future__ import annotations

import copy
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.execution.device import gpu_problem
from fasttree_cupy.execution.upload import pack
from fasttree_cupy.kv_tree_simple import KVTreeNode
from fasttree_cupy.metadata import MetadataTuple, PhaseNodeNums
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree

CASES: list[dict[str, Any]] = json.loads(
    (Path(__file__).parent / "data" / "golden_preparation.json").read_text(encoding="utf-8")
)
METADATA_ARRAYS = MetadataTuple._fields[1:9]
GOLDEN_FIELDS = (
    "vnode_to_kv_entries_runs",
    *METADATA_ARRAYS,
    "mid_o_shape",
    "mid_lse_shape",
    "phase_node_nums",
    "phase_node_offsets",
    "node_assignments",
    "params_TSQs_after",
    "params_TSKs_after",
)


def quiet_params(values: dict[str, Any]) -> FastTreeParams:
    """Golden cases go beyond the recommended ranges on purpose."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FastTreeParams(**values)


def prepare_case(case: dict[str, Any], nodes: bool) -> dict[str, Any]:
    """What preparation makes of a golden case, under the names of the golden fields."""
    tree = KVTree(case["tree"]["parent"], case["tree"]["seqlen"])
    params = quiet_params(case["params"])
    names = ("batch_size", "num_qo_heads", "num_kv_heads", "head_dim")
    names += ("KV_SPLIT_SIZES", "para_threshs1", "para_threshs2")
    metadata, assignments = fasttree_preparation(
        tree.to_nodes() if nodes else tree,
        tree.kv_ptrs.tolist() if nodes else tree.kv_ptrs,
        **{name: case[name] for name in names},
        params=params,
        device="cpu",
        verbose=False,
    )
    entries = metadata.vnode_to_kv_entries
    starts = np.flatnonzero(np.diff(entries, prepend=entries[0] - 2) != 1)
    runs = [[int(entries[a]), int(n)] for a, n in zip(starts, np.diff([*starts, len(entries)]), strict=True)]
    return {
        "vnode_to_kv_entries_runs": runs,
        **{name: getattr(metadata, name).tolist() for name in METADATA_ARRAYS},
        "mid_o_shape": list(metadata.mid_o.shape),
        "mid_lse_shape": list(metadata.mid_lse.shape),
        "phase_node_nums": metadata.phase_node_nums,
        "phase_node_offsets": metadata.phase_node_offsets,
        "node_assignments": assignments,
        "params_TSQs_after": params.TSQs,
        "params_TSKs_after": params.TSKs,
    }


def compare(got: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    assert got[name] == expected[name], f"{name} differs"


@pytest.fixture(scope="module", params=[False, True], ids=["arrays", "nodes"])
def prepared(request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    return {case["name"]: prepare_case(case, request.param) for case in CASES}


def test_golden_file_is_whole() -> None:
    assert len(CASES) == 28
    assert all(set(case["expected"]) == set(GOLDEN_FIELDS) for case in CASES)


@pytest.mark.parametrize("field", GOLDEN_FIELDS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_golden(case: dict[str, Any], field: str, prepared: dict[str, dict[str, Any]]) -> None:
    compare(prepared[case["name"]], case["expected"], field)


@pytest.mark.parametrize("field", GOLDEN_FIELDS)
def test_comparison_detects_a_broken_field(field: str, prepared: dict[str, dict[str, Any]]) -> None:
    """The golden tests can fail: one changed number in any field is seen."""
    case = CASES[-1]
    broken = copy.deepcopy(prepared[case["name"]])
    first = broken[field][0]
    if isinstance(first, list):
        first[0] += 1
    else:
        broken[field][0] += 1
    with pytest.raises(AssertionError, match=f"{field} differs"):
        compare(broken, case["expected"], field)


# What it takes, returns and leaves behind.

TREE = KVTree.from_levels([1, 2, 4], [8, 16, 32])


def prepare(**changes: Any) -> tuple[MetadataTuple, list[int]]:
    arguments: dict[str, Any] = {
        "tree_info": TREE,
        "KV_ptrs": TREE.kv_ptrs.tolist(),
        "batch_size": 4,
        "num_qo_heads": 8,
        "num_kv_heads": 2,
        "head_dim": 64,
        "KV_SPLIT_SIZES": [1024, 128],
        "para_threshs1": [132, 528],
        "para_threshs2": [132, 132],
        "params": FastTreeParams(TSQs=[16, 4], kv_group_num=4),
        "device": "cpu",
        "verbose": False,
    }
    return fasttree_preparation(**arguments | changes)


def test_metadata_kinds() -> None:
    metadata, assignments = prepare()
    assert isinstance(metadata, MetadataTuple)
    assert len(metadata) == 13
    for name, value in zip(metadata._fields[:9], metadata, strict=False):
        assert value.dtype == np.int32, name
        assert value.ndim == 1, name
    num_entries = len(metadata.vnode_to_q_entries)
    assert metadata.mid_o.shape == (num_entries, 8, 64)
    assert metadata.mid_lse.shape == (num_entries, 8)
    assert metadata.mid_o.dtype == metadata.mid_lse.dtype == np.float32
    assert all(type(value) is int for value in assignments)
    assert len(assignments) == TREE.num_nodes


def test_phase_node_nums_know_the_number_of_tokens() -> None:
    nums = prepare()[0].phase_node_nums
    assert isinstance(nums, PhaseNodeNums)
    assert isinstance(nums, list)
    assert nums.num_tokens == TREE.unique_tokens
    for copied in (copy.deepcopy(nums), pickle.loads(pickle.dumps(nums))):
        assert copied == nums
        assert copied.num_tokens == nums.num_tokens


def test_params_get_the_adopted_tiles_without_a_warning() -> None:
    params = FastTreeParams(TSQs=[16, 1], TSKs=[32, 256], kv_group_num=4)
    TSQs = params.TSQs
    prepare(params=params)  # warnings are errors here
    assert (params.TSQs, params.TSKs) == ([1, 1], [256, 256])
    assert TSQs == [16, 1]


def test_params_keep_tiles_that_suit() -> None:
    params = FastTreeParams(TSQs=[16, 4], kv_group_num=4)
    TSQs = params.TSQs
    prepare(params=params, para_threshs1=[0, 0])
    assert params.TSQs is TSQs


def test_second_preparation_gives_the_same() -> None:
    nodes = TREE.to_nodes()
    first, second = (prepare(tree_info=nodes)[0] for _ in range(2))
    for name, a, b in zip(first._fields[:9], first, second, strict=False):
        np.testing.assert_array_equal(a, b, err_msg=name)
    assert nodes == TREE.to_nodes()


def test_numpy_integers_and_arrays_are_fine() -> None:
    prepare(
        batch_size=np.int64(4),
        head_dim=np.int32(64),
        KV_ptrs=TREE.kv_ptrs.astype(np.int32),
        KV_SPLIT_SIZES=np.array([1024, 128]),
        para_threshs1=(132, 528),
    )


def test_verbose_prints_and_quiet_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    prepare()
    assert capsys.readouterr().out == ""
    prepare(verbose=True)
    printed = capsys.readouterr().out
    for part in ("7 nodes, 4 requests", "parallelism", "TSQs", "KV splits", "vnodes"):
        assert part in printed


def test_group_mismatch_warns_at_the_caller() -> None:
    with pytest.warns(UserWarning, match=r"params\.kv_group_num is 1, but .* is 4") as caught:
        prepare(params=FastTreeParams(TSQs=[16, 4]))
    assert caught[0].filename == __file__


def test_default_device_without_a_gpu_is_the_cpu() -> None:
    if gpu_problem() is None:
        pytest.skip("a GPU is usable here")
    assert isinstance(prepare(device=None)[0].mid_o, np.ndarray)
    with pytest.raises(ValueError, match="device"):
        prepare(device="cuda")


def test_pack_aligns_each_array() -> None:
    arrays = [np.arange(n, dtype=np.int32) for n in (33, 0, 32, 1)]
    packed, starts = pack(arrays)
    assert starts == [0, 64, 64, 96]
    assert len(packed) == 128
    for start, a in zip(starts, arrays, strict=True):
        np.testing.assert_array_equal(packed[start : start + len(a)], a)


@pytest.mark.gpu
@pytest.mark.skipif(gpu_problem() is not None, reason=f"no usable GPU: {gpu_problem()}")
def test_on_the_gpu() -> None:
    import cupy

    on_cpu, on_gpu = prepare()[0], prepare(device="cuda")[0]
    for name, a, b in zip(on_cpu._fields[:9], on_cpu, on_gpu, strict=False):
        assert isinstance(b, cupy.ndarray), name
        assert b.data.ptr % 128 == 0, name
        np.testing.assert_array_equal(a, b.get(), err_msg=name)
    assert on_gpu.mid_o.shape == on_cpu.mid_o.shape
    assert on_gpu.mid_lse.dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"tree_info": []}, ValueError, "tree_info is empty"),
        ({"tree_info": 3}, TypeError, "tree_info is int"),
        ({"tree_info": [KVTreeNode(-1, 0, 8, 0)]}, ValueError, "no node lists any requests"),
        ({"KV_ptrs": [0, 8]}, ValueError, "KV_ptrs has 2 entries, expected 8"),
        ({"KV_ptrs": [1, 8, 24, 40, 72, 104, 136, 168]}, ValueError, r"KV_ptrs\[0\] is 1, expected 0"),
        ({"KV_ptrs": [0, 8, 24, 41, 72, 104, 136, 168]}, ValueError, r"KV_ptrs\[3\] is 41, expected 40"),
        ({"KV_ptrs": [0.0] * 8}, TypeError, r"KV_ptrs\[0\] is 0.0"),
        ({"KV_ptrs": np.zeros((2, 4), int)}, ValueError, r"KV_ptrs has shape \(2, 4\), expected one dimension"),
        ({"KV_ptrs": None}, TypeError, "KV_ptrs is NoneType"),
        ({"batch_size": 5}, ValueError, "batch_size is 5, but tree_info has 4 requests"),
        ({"batch_size": 4.0}, TypeError, "batch_size is 4.0"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"num_qo_heads": 0}, ValueError, "num_qo_heads is 0"),
        ({"num_kv_heads": -1}, ValueError, "num_kv_heads is -1"),
        ({"num_qo_heads": True}, TypeError, "num_qo_heads is True"),
        ({"num_qo_heads": 9}, ValueError, "num_qo_heads is 9, expected a multiple of num_kv_heads, 2"),
        ({"head_dim": 80}, ValueError, "head_dim is 80, expected one of 16, 32, 64, 128, 256"),
        ({"head_dim": "64"}, TypeError, "head_dim is '64'"),
        ({"KV_SPLIT_SIZES": [1024]}, ValueError, "KV_SPLIT_SIZES has 1 entries"),
        ({"KV_SPLIT_SIZES": [1024, 0]}, ValueError, r"KV_SPLIT_SIZES\[1\] is 0"),
        ({"KV_SPLIT_SIZES": 1024}, TypeError, "KV_SPLIT_SIZES is 1024"),
        ({"para_threshs1": [132, -1]}, ValueError, r"para_threshs1\[1\] is -1"),
        ({"para_threshs1": [1, 2, 3]}, ValueError, "para_threshs1 has 3 entries"),
        ({"para_threshs2": [132, 1.5]}, TypeError, r"para_threshs2\[1\] is 1.5"),
        ({"para_threshs2": "ab"}, TypeError, "para_threshs2 is 'ab'"),
        ({"params": {"alpha": 1}}, TypeError, "params is dict"),
        ({"device": "tpu"}, ValueError, "device"),
    ],
)
def test_wrong_argument(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        prepare(**changes)


def test_tiles_changed_in_place_are_checked_again() -> None:
    params = FastTreeParams()
    params.TSQs[0] = -3
    with pytest.raises(ValueError, match=r"TSQs\[0\] is -3"):
        prepare(params=params)


def test_refused_preparation_leaves_params_alone() -> None:
    params = FastTreeParams(TSQs=[16, 4], kv_group_num=4)
    with pytest.raises(ValueError, match="head_dim"):
        prepare(params=params, head_dim=80)
    assert params == FastTreeParams(TSQs=[16, 4], kv_group_num=4)
