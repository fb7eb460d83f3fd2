"""A plan's memory: sized before it is allocated, a caller's buffer checked and written within its bounds only."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.alignment import TRANSACTION_BYTES
from fasttree_cupy.execution.plan_memory import MemoryNeeds
from tests.plans import KERNELS, choose_kernel
from tests.test_arrays import Producer
from tests.test_plan import DTYPES
from tests.test_repeat import FakeCuda
from tests.test_serving import BACKENDS, LAYOUTS, TREES, device_of, expected, host, namespace, random_arrays
from tests.tolerances import assert_close

GUARD = 4096
"""Bytes on either side of a workspace."""
LONG = ft.KVTree.from_levels([1, 2], [6000, 3])
"""So few requests that their prefix is cut on any GPU."""
POISON = 0xFF
"""Each byte of a buffer: NaN as a float, -1 as a counter."""


def planned(tree: ft.KVTree, backend: str, layout: tuple[int, int, int, str] = LAYOUTS[1]) -> ft.DecodePlan:
    return ft.plan_decode(tree, *layout[:3], device=device_of(backend), place=False)


def aligned_bytes(size: int, xp: Any, start: int = 0) -> Any:
    """`size` poisoned bytes from `start` bytes after a multiple of 256 on."""
    memory = xp.full(size + 512, POISON, np.uint8)
    address = memory.ctypes.data if xp is np else memory.data.ptr
    first = -address % 256 + start
    return memory[first : first + size]


@BACKENDS
@KERNELS
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("tree", TREES, ids=["levels", "prefix", "empty"])
def test_nothing_around_the_workspace_is_written(
    tree: ft.KVTree, layout: tuple[int, int, int, str], kernel: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernel(kernel, monkeypatch)
    xp = namespace(backend)
    plan = planned(tree, backend, layout)
    assert plan.memory is None
    buffer = aligned_bytes(GUARD + plan.workspace_bytes + GUARD, xp)
    plan.place(buffer[GUARD : GUARD + plan.workspace_bytes])
    arrays = random_arrays(tree, layout, tree.unique_tokens)
    right, _ = expected(tree, *arrays)
    own = ft.plan_decode(tree, *layout[:3], device=device_of(backend))
    q, k, v = (xp.asarray(array) for array in arrays)
    for _ in range(3):
        out = plan.run(q, k, v)
        assert_close(host(out), right, DTYPES[layout[3]])
        np.testing.assert_array_equal(host(out).view(np.uint16), host(own.run(q, k, v)).view(np.uint16))
    after = host(buffer)
    assert (after[:GUARD] == POISON).all()
    assert (after[GUARD + plan.workspace_bytes :] == POISON).all()


@BACKENDS
def test_all_of_the_workspace_is_needed(backend: str) -> None:
    """Its last element is written: the number of bytes is not a bound from above."""
    xp = namespace(backend)
    tree, layout = LONG, (8, 2, 64, "float16")
    plan = planned(tree, backend, layout)
    assert plan.workspace_bytes > 0
    assert plan.schedule_bytes > 0
    workspace = aligned_bytes(plan.workspace_bytes, xp)
    plan.place(workspace)
    plan.run(*(xp.asarray(array) for array in random_arrays(tree, layout, tree.unique_tokens)))
    assert (host(workspace)[-4:] != POISON).any()


def test_a_plan_runs_once_it_is_placed() -> None:
    plan = planned(TREES[0], "cpu")
    arrays = random_arrays(TREES[0], LAYOUTS[1], TREES[0].unique_tokens)
    out = np.full(arrays[0].shape, 7, arrays[0].dtype)
    with pytest.raises(RuntimeError, match="made with place=False"):
        plan.run(*arrays, out)
    assert (out == 7).all()
    plan.place()
    assert_close(plan.run(*arrays), expected(TREES[0], *arrays)[0], DTYPES[LAYOUTS[1][3]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int32, np.float32, np.float16, ml_dtypes.bfloat16])
def test_any_kind_of_buffer_serves(dtype: Any) -> None:
    plan = planned(TREES[0], "cpu")
    memory = aligned_bytes(plan.workspace_bytes + 64, np)
    plan.place(memory[: memory.size // 4 * 4].view(dtype).reshape(2, -1))
    arrays = random_arrays(TREES[0], LAYOUTS[1], TREES[0].unique_tokens)
    assert_close(plan.run(*arrays), expected(TREES[0], *arrays)[0], DTYPES[LAYOUTS[1][3]])


@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_a_buffer_comes_by_dlpack(dtype: Any) -> None:
    plan = planned(TREES[0], "cpu")
    plan.place(Producer(aligned_bytes(plan.workspace_bytes, np).view(dtype)))
    arrays = random_arrays(TREES[0], LAYOUTS[1], TREES[0].unique_tokens)
    assert_close(plan.run(*arrays), expected(TREES[0], *arrays)[0], DTYPES[LAYOUTS[1][3]])


def test_one_buffer_serves_plan_after_plan() -> None:
    plans = [planned(tree, "cpu") for tree in TREES]
    buffer = aligned_bytes(max(plan.workspace_bytes for plan in plans), np)
    for tree, plan in zip(TREES, plans, strict=True):
        plan.place(buffer)
        arrays = random_arrays(tree, LAYOUTS[1], tree.unique_tokens)
        assert_close(plan.run(*arrays), expected(tree, *arrays)[0], DTYPES[LAYOUTS[1][3]])


def read_only(memory: Any) -> Any:
    memory.flags.writeable = False
    return memory


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda b: b[:-1], ValueError, r"workspace has \d+ bytes, expected \d+ at least, the plan's workspace_bytes"),
        (lambda b: aligned_bytes(b.size, np, 4), ValueError, "workspace starts at address .* multiple of 16 bytes"),
        (lambda b: aligned_bytes(2 * b.size, np)[::2], ValueError, "workspace has strides"),
        (read_only, ValueError, "workspace is read-only"),
        (lambda b: b.tolist(), TypeError, "workspace: expected an array"),
        (lambda b: np.zeros(b.size, np.float64), TypeError, "workspace: dtype float64 is not supported"),
    ],
)
def test_a_buffer_that_does_not_serve_is_refused(change: Any, error: type[Exception], message: str) -> None:
    plan = planned(TREES[0], "cpu")
    buffer = aligned_bytes(plan.workspace_bytes, np)
    with pytest.raises(error, match=message):
        plan.place(change(buffer))
    assert (buffer == POISON).all()
    assert plan.memory is None


def test_parts_of_a_workspace_begin_at_transactions() -> None:
    needs = MemoryNeeds([], (3, 5, 7), "cpu", 9)
    offsets = [offset for offset, _, _ in needs._parts]
    assert offsets == sorted(set(offsets))
    assert not any(offset % TRANSACTION_BYTES for offset in offsets)
    assert needs.workspace_bytes == offsets[-1] + 4 * 9


def test_a_buffer_on_another_gpu_is_refused(cupy: Any, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(cupy, monkeypatch)
    plan = ft.plan_decode(LONG, 8, 2, 64, place=False)
    with pytest.raises(ValueError, match=r"workspace has device \('cuda', 1\), expected \('cuda', 0\)"):
        plan.place(torch.empty(plan.workspace_bytes, dtype=torch.uint8, device="meta"))
    assert plan.memory is None


@pytest.mark.gpu
def test_a_buffer_elsewhere_is_refused(cupy: Any) -> None:
    plan = planned(LONG, "gpu")
    with pytest.raises(ValueError, match=r"workspace has device \('cpu', 0\), expected \('cuda', 0\)"):
        plan.place(np.empty(plan.workspace_bytes, np.uint8))
    with pytest.raises(ValueError, match=r"workspace has device \('cuda', 0\), expected \('cpu', 0\)"):
        planned(LONG, "cpu").place(cupy.empty(1 << 20, np.uint8))
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        plan.place(aligned_bytes(plan.workspace_bytes, cupy, 4))
