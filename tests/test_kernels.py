"""Kernel configurations: what the host computes agrees with what the CUDA sources assert."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.execution import cuda, kernels, launch, merge_kernel, plan_kernels, stages
from fasttree_cupy.execution.edits import EDIT_PLAN_PARAMS
from fasttree_cupy.execution.kernels import HEAD_DIMS, KernelConfig, all_configs, choose_tile, tiles
from fasttree_cupy.metadata import Phase
from fasttree_cupy.planning import balanced
from fasttree_cupy.planning.row_tiles import READ_ONCE
from fasttree_cupy.planning.subtree import ITEM_FIELDS, most_warps

HOPPER_SHARED_MEMORY = 227 * 1024
SMALLEST_SHARED_MEMORY = 99 * 1024
"""Most that a block gets on compute capability 8.6, 8.9 and 12.0."""


def test_parameter_structs_have_the_size_that_the_sources_assert() -> None:
    header = (kernels.cuda_src() / "include" / "stage1_params.cuh").read_text()
    assert f"static_assert(sizeof(Stage1Params) == {stages.STAGE1_PARAMS.itemsize}" in header
    vnode = (kernels.cuda_src() / "include" / "stage1_vnode.cuh").read_text()
    assert f"static_assert(sizeof(Stage1Sm90Params) == {stages.STAGE1_SM90_PARAMS.itemsize}" in vnode
    plan = (kernels.cuda_src() / "include" / "plan.cuh").read_text()
    assert f"static_assert(sizeof(TreeDecodeParams) == {plan_kernels.TREE_DECODE_PARAMS.itemsize}" in plan
    assert f"static_assert(sizeof(Item) == {4 * len(ITEM_FIELDS)}" in plan
    assert f"constexpr int kReadOnce = {READ_ONCE:#x};" in plan
    work = (kernels.cuda_src() / "include" / "work.cuh").read_text()
    assert f"static_assert(sizeof(WorkParams) == {plan_kernels.WORK_PARAMS.itemsize}" in work
    assert f"static_assert(sizeof(WorkItem) == {4 * len(balanced.ITEM_FIELDS)}" in work
    merge = kernels.source_text("merge_states")
    assert f"static_assert(sizeof(MergeStatesParams) == {merge_kernel.MERGE_STATES_PARAMS.itemsize}" in merge
    edit = kernels.source_text("edit_plan")
    assert f"static_assert(sizeof(EditPlanParams) == {EDIT_PLAN_PARAMS.itemsize}" in edit
    assert f"static_assert(sizeof(Stage2Params) == {stages.STAGE2_PARAMS.itemsize}" in kernels.source_text("stage2")


def test_no_source_includes_a_toolkit_header() -> None:
    for path in kernels.cuda_src().rglob("*.cu*"):
        for line in path.read_text().splitlines():
            if line.startswith("#include"):
                assert (kernels.cuda_src() / "include" / line.split('"')[1]).is_file(), f"{path.name}: {line}"


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_every_kernel_fits_every_gpu(head_dim: int) -> None:
    configs = [config for config in all_configs(80) if config.head_dim == head_dim]
    assert len(configs) == 2 * (2 + 2 * (len(tiles(head_dim)) + 3 * (1 + 2)))  # of three types of K and V, but for mma
    for config in configs:
        assert config.shared_bytes <= SMALLEST_SHARED_MEMORY
        assert config.threads <= 1024


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_the_tile_chosen_is_one_that_is_compiled(head_dim: int) -> None:
    chosen = {choose_tile(rows, blocks, 132, head_dim) for rows in range(1, 1025, 5) for blocks in (1, 600, 700, 10**6)}
    assert chosen == set(tiles(head_dim))


def test_more_rows_than_a_block_holds_take_the_largest_tile() -> None:
    assert choose_tile(1024, 1, 132, 128).rows == 64
    assert choose_tile(33, 1, 132, 128).rows == 64
    assert choose_tile(17, 1, 132, 128).rows == 32
    assert choose_tile(16, 1, 132, 128).rows == 16


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_planner_and_kernels_agree_on_the_largest_block(head_dim: int) -> None:
    assert most_warps(head_dim) == max(kernels.block_warps(head_dim))


def test_planner_and_worker_kernel_agree_on_tiles() -> None:
    assert balanced.GROUP_ROWS == kernels.WORKER_GROUP_ROWS
    assert balanced.STEP_TOKENS == kernels.WORKER_TILE_TOKENS
    assert all(step % kernels.WORKER_FLOAT8_TILE_TOKENS == 0 for step in balanced.STEP_TOKENS.values())
    assert max(kernels.WORKER_ROW_GROUPS) == balanced.MOST_ROW_GROUPS
    header = (kernels.cuda_src() / "include" / "warpgroup_rows.cuh").read_text()
    assert f"constexpr int kGroupRows = {kernels.WORKER_GROUP_ROWS};" in header
    assert f"constexpr int kThreads = {kernels.edit_config().threads};" in kernels.source_text("edit_plan")


def test_the_worker_kernel_fits_a_multiprocessor() -> None:
    configs = [config for config in all_configs(90) if config.name == "tree_decode_sm90"]
    assert len(configs) == 2 * 3 * 2 * 2 * 2  # dtypes, those of K and V, head dims, row groups, soft cap or none
    assert max(config.shared_bytes for config in configs) <= HOPPER_SHARED_MEMORY
    header = (kernels.cuda_src() / "include" / "worker.cuh").read_text()
    assert "constexpr int kConsumerWarps = 8;\nconstexpr int kProducerWarps = 4;" in header
    assert "constexpr int kWidenWarps = kFloat8 ? 4 : 0;" in header
    assert {(config.kv_dtype is not None, config.threads) for config in configs} == {(False, 384), (True, 512)}


def test_host_and_stage_1_for_hopper_agree() -> None:
    configs = [config for config in all_configs(90) if config.name == "stage1_sm90"]
    assert len(configs) == 2 * 2 * 2  # dtypes, head dims, soft cap or none
    assert max(3 * (config.shared_bytes + 1024) for config in configs) <= HOPPER_SHARED_MEMORY + 1024
    assert {config.threads for config in configs} == {32 * stages.STAGE1_SM90_WARPS}
    header = (kernels.cuda_src() / "include" / "stage1_vnode.cuh").read_text()
    assert f"constexpr int kWarps = {stages.STAGE1_SM90_WARPS};" in header
    assert f"constexpr int kStages = {kernels.STAGE1_SM90_STAGES};" in header
    rows = (kernels.cuda_src() / "include" / "warpgroup_rows.cuh").read_text()
    assert f"constexpr int kGroupRows = {kernels.STAGE1_SM90_ROWS};" in rows
    chunks = (kernels.cuda_src() / "include" / "chunk_products.cuh").read_text()
    assert f"constexpr int kChunkRows = {stages.STAGE1_SM90_WARP_ROWS};" in chunks


def test_host_and_stage_2_agree_on_heads() -> None:
    text = kernels.source_text("stage2")
    assert f"constexpr int kHeads = kLaneDims <= 4 ? {stages.STAGE2_HEADS} : {stages.STAGE2_HEADS // 2};" in text
    assert f"constexpr int kWarps = {cuda.MERGING_WARPS};" in text
    assert f"constexpr int kWarps = {cuda.MERGING_WARPS};" in kernels.source_text("merge_states")


@pytest.mark.parametrize(
    ("merges", "heads", "head_dim", "expected"),
    [(1024, 16, 128, 4), (1024, 16, 256, 2), (2048, 6, 128, 1), (2048, 6, 256, 2), (10, 16, 128, 1), (0, 8, 64, 1)],
)
def test_heads_that_a_warp_of_stage_2_merges(merges: int, heads: int, head_dim: int, expected: int) -> None:
    assert stages.stage2_heads(merges, heads, head_dim, 132) == expected


@pytest.mark.parametrize(
    ("phase", "group", "kv_heads", "expected"),
    [
        (Phase(7, 256, 4, 500), 16, 1, (7, 256, 1, 1, 256)),  # rows that fill a block
        (Phase(0, 10, 65, 16), 2, 3, (0, 10, 3, 1, 90)),  # ... or three
        (Phase(0, 192, 1, 128), 16, 1, (0, 192, 1, 1, 192)),  # few and long
        (Phase(0, 192, 1, 64), 16, 1, (0, 192, 0, 1, 48)),  # few and short
        (Phase(0, 1001, 1, 128), 16, 1, (0, 1001, 0, 1, 251)),  # many
        (Phase(0, 1024, 16, 32), 1, 32, (0, 1024, 0, 8, 1024)),  # so many that a warp takes several heads
        (Phase(0, 10000, 4, 32), 4, 6, (0, 10000, 0, 2, 7500)),
        (Phase(0, 10**6, 1, 2**31 - 1), 1, 8, (0, 10**6, 0, 1, 2 * 10**6)),
    ],
)
def test_blocks_of_stage_1_for_hopper(
    phase: Phase, group: int, kv_heads: int, expected: tuple[int, int, int, int, int]
) -> None:
    assert stages.stage1_grid(phase, group, kv_heads, 132) == expected


def test_gpus_get_the_kernels_that_they_can_run() -> None:
    ampere = {"stage1_plain", "stage1_mma", "stage2", "merge_states", "tree_decode"}
    assert {config.name for config in all_configs(75)} == {"stage1_plain", "stage2", "merge_states"}
    assert {config.name for config in all_configs(80)} == ampere
    assert {config.name for config in all_configs(90)} == ampere | {"stage1_sm90", "tree_decode_sm90", "edit_plan"}
    assert {config.name for config in all_configs(100)} == ampere


@pytest.mark.parametrize(
    ("capability", "group", "head_dim", "problem"),
    [(89, 4, 128, "8.9"), (100, 4, 128, "10.0"), (90, 4, 256, "head_dim is 256"), (90, 129, 64, "129 query heads")],
)
def test_the_worker_kernel_says_what_it_cannot_serve(capability: int, group: int, head_dim: int, problem: str) -> None:
    assert problem in str(kernels.worker_problem(capability, group, head_dim))
    assert kernels.worker_problem(90, 128, 128) is None


def test_the_digest_covers_headers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "include").mkdir()
    (tmp_path / "kernel.cu").write_text("// kernel")
    header = tmp_path / "include" / "part.cuh"
    monkeypatch.setattr(kernels, "cuda_src", lambda: tmp_path)
    texts = []
    for body in ("// one", "// two"):
        header.write_text(body)
        kernels.source_digest.cache_clear()
        kernels.source_text.cache_clear()
        texts.append(kernels.source_text("kernel"))
    kernels.source_digest.cache_clear()
    kernels.source_text.cache_clear()
    assert texts[0] != texts[1]


def test_a_variant_compiles_for_ampere_and_reports_its_resources() -> None:
    pytest.importorskip("cupy", reason="no CuPy, hence no NVRTC")
    from tests.compile_kernels import compile_one, covering_choice

    try:
        from cupy.cuda import nvrtc

        nvrtc.getVersion()
    except Exception as error:
        pytest.skip(f"no NVRTC: {error}")
    config = covering_choice(all_configs(80))[0]
    report = compile_one((80, config))
    assert report.ok, report.log
    assert report.registers > 0
    broken = KernelConfig(config.name, "float16", 24)
    assert not compile_one((80, broken)).ok


@pytest.mark.parametrize(
    "fields",
    [
        stages.STAGE1_PARAMS,
        stages.STAGE2_PARAMS,
        plan_kernels.TREE_DECODE_PARAMS,
        plan_kernels.WORK_PARAMS,
        merge_kernel.MERGE_STATES_PARAMS,
    ],
    ids=["stage1", "stage2", "tree_decode", "work", "merge_states"],
)
def test_packed_parameters_are_those_of_numpy(fields: np.dtype[Any]) -> None:
    rng = np.random.default_rng(4)
    draw = {"u": lambda: int(rng.integers(2**62)), "i": lambda: int(rng.integers(-(2**31), 2**31)), "f": rng.random}
    values = [draw[fields[name].kind]() for name in fields.names or ()]
    made = launch.packed(values, fields)
    assert made.shape == ()
    assert made.dtype.names is None
    assert made.tobytes() == np.array(tuple(values), fields).tobytes()
