"""The CUDA kernels themselves on an emulated GPU: right in whatever order warps, their lanes and copies go on.

No speed is measured here, and the emulated GPU does what the PTX manual says, not what a GPU was seen to do: GPU tests
are still needed. But those see few orders, and this sees many.
"""

from __future__ import annotations

import random
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from fasttree_cupy import KVTree
from fasttree_cupy.execution import arrays, kernels, merge_kernel
from fasttree_cupy.execution.arrays import DTYPES, as_numpy, view
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.execution.plan_memory import PlanMemory
from fasttree_cupy.execution.schedule import BalancedSchedule, HeuristicSchedule, Schedule, SubtreeSchedule
from fasttree_cupy.planning import balanced, greedy, subtree
from fasttree_cupy.planning.layout import depth_first, lay_out
from fasttree_cupy.planning.machine import H200, H200_WORKERS
from tests.emulation.emulated import Edits, EmulatedStream, build_ahead, compiler_problem, emulated_gpu, needs_compiler
from tests.reference import dense_attention
from tests.tolerances import assert_close

pytestmark = needs_compiler

WORKER_TREES, OTHER_TREES = 20, 4
"""Random trees for each kernel: the barriers of workers are many, other kernels have next to none."""
ORDERS = 200
"""Seeds among which a fault must show."""
TOKENS = (0, 1, 5, 16, 31, 32, 64, 100, 200, 333)
AHEAD = 16
"""Rows of K and V behind the last token, NaN: no kernel may read so far that they count."""


class Kernel(NamedTuple):
    """What is planned for, and with which arrays."""

    name: str
    dtype: str
    head_dim: int
    row_groups: int = 0
    kv_dtype: str | None = None
    compute_capability: int = 90

    def __str__(self) -> str:
        parts = (self.name, self.row_groups or None, self.dtype, self.kv_dtype, self.head_dim)
        return "-".join(str(part) for part in parts if part is not None)


WORKERS = [
    Kernel("tree_decode_sm90", "float16", 128, 1),
    Kernel("tree_decode_sm90", "bfloat16", 128, 2),
    Kernel("tree_decode_sm90", "bfloat16", 128, 1, "float8_e4m3fn"),
    Kernel("tree_decode_sm90", "float16", 128, 2, "float8_e5m2"),
    Kernel("tree_decode_sm90", "float16", 64, 1, "float8_e4m3fn"),
]
OTHERS = [
    Kernel("tree_decode", "float16", 128),
    Kernel("tree_decode", "bfloat16", 64, kv_dtype="float8_e4m3fn"),
    Kernel("stage1_sm90", "float16", 64),
    Kernel("stage1_mma", "bfloat16", 32, compute_capability=80),
    Kernel("stage1_plain", "float16", 16, compute_capability=70),
]


class Arrays(NamedTuple):
    """What a decode reads and writes."""

    q: npt.NDArray[np.generic]
    k: npt.NDArray[np.generic]
    v: npt.NDArray[np.generic]
    o: npt.NDArray[np.generic]
    lse: npt.NDArray[np.float32]

    def operands(self) -> Operands:
        """The same as kernels take them."""
        q, k, v, o, lse = (view(name, array) for name, array in zip(self._fields, self, strict=True))
        return Operands(q, k, v, o, self.q.shape[2] ** -0.5, -1.0, lse)


def random_tree(draw: random.Random) -> KVTree:
    nodes = draw.randint(1, 10)
    parent = [-1, *(draw.randrange(node) for node in range(1, nodes))]
    requests = [node for node in range(nodes) if node not in parent] + draw.choices(range(nodes), k=draw.randint(0, 12))
    draw.shuffle(requests)
    return KVTree(parent, draw.choices(TOKENS, k=nodes), requests)


def random_arrays(kernel: Kernel, tree: KVTree, heads: tuple[int, int], seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    element, kv_element = DTYPES[kernel.dtype], DTYPES[kernel.kv_dtype or kernel.dtype]
    q = rng.standard_normal((tree.batch_size, heads[0], kernel.head_dim)).astype(element)
    k, v = rng.standard_normal((2, tree.unique_tokens + AHEAD, heads[1], kernel.head_dim)).astype(kv_element)
    k[tree.unique_tokens :] = v[tree.unique_tokens :] = np.nan
    return Arrays(q, k, v, np.full_like(q, np.nan), np.full(q.shape[:2], np.nan, np.float32))


def planned(kernel: Kernel, tree: KVTree, heads: tuple[int, int], workers: int) -> Schedule:
    """A schedule that runs the kernel."""
    group = heads[0] // heads[1]
    if kernel.name == "tree_decode_sm90":
        order, begins, ends = depth_first(tree)
        layout = lay_out(tree, begins, ends, None)
        made = balanced.plan_layout(
            layout, order, group, heads[1], kernel.head_dim, workers, H200_WORKERS, kernel.row_groups
        )
        return BalancedSchedule(made, kernel.head_dim, "cpu")
    if kernel.name == "tree_decode":
        items = subtree.plan(tree, group, heads[1], kernel.head_dim, H200)
        return SubtreeSchedule(items, heads[0], kernel.head_dim, "cpu")
    tiles = ([16, 4], [32, 32])
    vnodes = greedy.plan(tree, [64, 32], [8, 8], [8, 8], heads[1], 0.66, 0.33, 0.1, *tiles, group)
    return HeuristicSchedule(vnodes, tree.unique_tokens, heads[0], kernel.head_dim, "cpu")


def placed(schedule: Schedule) -> PlanMemory:
    """Memory whose counters are 0 and whose partial outputs are NaN."""
    workspace = arrays.aligned_empty((max(1, schedule.needs.workspace_bytes),), np.dtype(np.uint8))
    workspace[:] = 0
    memory = schedule.needs.place(view("workspace", workspace), None)
    for part in (memory.mid_o, memory.mid_lse):
        as_numpy(part)[...] = np.nan
    return memory


def assert_right(of: Arrays, tree: KVTree, dtype: str) -> None:
    q, k, v, o, lse = of
    expected, expected_lse = dense_attention(tree.parent, tree.seqlen, tree.request_node, q, k, v, q.shape[2] ** -0.5)
    assert_close(o, expected, dtype)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-4, atol=1e-3)


def build_kernels(tests: list[pytest.Function]) -> None:
    """Have most kernels of these tests built while other tests run, see conftest.py."""
    if compiler_problem() is not None:
        return
    for test in tests:
        of = getattr(test, "callspec", None)
        for parameter in of.params.values() if of else ():
            if isinstance(parameter, Kernel):
                build_kernel(parameter, ())
            elif parameter in FAULTS:
                kernel, _, edits = FAULTS[parameter]
                build_kernel(kernel, edits)


def build_kernel(kernel: Kernel, edits: Edits) -> None:
    """Have what runs with a kernel built."""
    name, dtype, head_dim, row_groups, kv_dtype, _ = kernel
    if name == "tree_decode_sm90":
        build_ahead(kernels.worker_config(dtype, head_dim, row_groups, False, kv_dtype), edits)
        return
    if name == "tree_decode":
        for warps in (1, 4):  # as the trees here are planned
            build_ahead(kernels.tree_decode_config(dtype, head_dim, warps, False, kv_dtype))
    elif name != "stage1_mma":  # whose tiles the trees decide
        build_ahead(kernels.KernelConfig(name, dtype, head_dim))
    build_ahead(kernels.KernelConfig("stage2", dtype, head_dim))


@pytest.mark.parametrize("kernel", WORKERS + OTHERS, ids=str)
def test_right_in_any_order(kernel: Kernel) -> None:
    for seed in range(WORKER_TREES if kernel in WORKERS else OTHER_TREES):
        draw = random.Random(seed)
        tree, kv_heads = random_tree(draw), draw.randint(1, 3)
        heads = (kv_heads * draw.choice([1, 2, 5, 8, 16]), kv_heads)
        of = random_arrays(kernel, tree, heads, seed)
        schedule = planned(kernel, tree, heads, draw.randint(1, 6))
        with emulated_gpu(seed, compute_capability=kernel.compute_capability, boxes=draw.random() < 0.7):
            schedule.run(of.operands(), placed(schedule), EmulatedStream())  # type: ignore[arg-type]
        assert_right(of, tree, kernel.dtype)


def test_tiles_may_leave_rows_empty() -> None:
    tree, kernel, heads = KVTree.from_levels([1, 2, 64], [8, 256, 32]), WORKERS[0], (4, 4)
    made = balanced.plan(tree, 1, heads[1], 128, 16, H200_WORKERS)
    assert (made.items[:, 1] < 64).all()
    of, schedule = random_arrays(kernel, tree, heads, 0), BalancedSchedule(made, 128, "cpu")
    with emulated_gpu(0):
        schedule.run(of.operands(), placed(schedule), EmulatedStream())  # type: ignore[arg-type]
    assert_right(of, tree, kernel.dtype)


@pytest.mark.parametrize("kernel", [WORKERS[0], WORKERS[2], OTHERS[0], OTHERS[2]], ids=str)
def test_bits_depend_on_no_order_and_no_run_before(kernel: Kernel) -> None:
    tree = KVTree.from_levels([1, 2, 8], [400, 70, 37])
    of = random_arrays(kernel, tree, (8, 2), 0)
    schedule = planned(kernel, tree, (8, 2), 6)
    memory, results = placed(schedule), set()
    for seed in range(12):
        of.o.fill(np.nan)
        of.lse.fill(np.nan)
        with emulated_gpu(seed):
            schedule.run(of.operands(), memory, EmulatedStream())  # type: ignore[arg-type]
        results.add((of.o.tobytes(), of.lse.tobytes()))
    assert_right(of, tree, kernel.dtype)
    assert len(results) == 1


@pytest.mark.parametrize(("dtype", "largest"), [("float16", 1.0), ("bfloat16", 1.0), ("bfloat16", 3e38)])
def test_states_are_merged(dtype: str, largest: float) -> None:
    rng, element = np.random.default_rng(0), DTYPES[dtype]
    o_a, o_b = rng.uniform(-largest, largest, (2, 5, 3, 16)).astype(element)
    lse_a, lse_b = rng.standard_normal((2, 5, 3), np.float32)
    lse_a[0, 0] = lse_b[0, 1] = lse_a[1, 0] = lse_b[1, 0] = -np.inf
    o, lse = np.empty_like(o_a), np.empty_like(lse_a)
    views = [view(name, array) for name, array in zip("abcdol", (o_a, o_b, lse_a, lse_b, o, lse), strict=True)]
    with emulated_gpu(0):
        merge_kernel.merge_states(views[:4], *views[4:], EmulatedStream())  # type: ignore[arg-type]
    weights = np.exp(np.stack([lse_a, lse_b]).astype(np.float64))
    total = weights.sum(0)
    shares = np.divide(weights, total, where=total > 0, out=np.zeros_like(weights))[..., None]
    expected = shares[0] * o_a.astype(np.float64) + shares[1] * o_b.astype(np.float64)
    assert_close(o, expected, dtype)
    with np.errstate(divide="ignore"):
        np.testing.assert_allclose(lse, np.log(total), rtol=1e-5, atol=1e-6)


class Load(NamedTuple):
    """Work for a kernel."""

    tree: KVTree
    heads: tuple[int, int]
    workers: int


SHORT_ITEMS = Load(KVTree.from_levels([1, 4], [20, 5]), (24, 24), 1)
SEEN_BY_FEW = Load(KVTree.from_levels([1, 16], [40, 300]), (8, 2), 3)
LONG_ITEMS = Load(KVTree.from_levels([1, 2, 16], [64, 64, 48]), (2, 2), 1)
MANY_PIECES = Load(KVTree([-1, 0, 0, 1, 1], [16, 700, 0, 64, 700], [4, 3, 2, 0, 2]), (16, 1), 8)
MORE_PIECES_THAN_SLICES = Load(KVTree.from_levels([1], [1300]), (3, 3), 33)
FLOAT16, BFLOAT16, FLOAT8, *_ = WORKERS

FAULTS: dict[str, tuple[Kernel, Load, Edits]] = {
    "keys' place not waited for": (FLOAT16, LONG_ITEMS, (("barrier_wait(keys.empty, keys.parity);", ""),)),
    "values' place not waited for": (BFLOAT16, LONG_ITEMS, (("barrier_wait(values.empty, values.parity);", ""),)),
    "queries' place not waited for": (
        FLOAT16,
        SHORT_ITEMS,
        (("barrier_wait(s.q_empty[slot], turn / kQuerySlots % 2 ^ 1);", ""),),
    ),
    "scores not waited for": (BFLOAT16, MANY_PIECES, (("products_wait<1>(scores);", ""),)),
    "a word written before all lanes have read it": (
        BFLOAT16,
        MANY_PIECES,
        (("+ 1 & kLaunchMask;\n            __syncwarp();", "+ 1 & kLaunchMask;"),),
    ),
    "words looked at before all lanes know of the own one": (
        FLOAT16,
        MORE_PIECES_THAN_SLICES,
        (
            (
                "store_release(words + item.piece, own);\n        __syncwarp();",
                "store_release(words + item.piece, own);",
            ),
        ),
    ),
    "values given back by who widens no tile": (
        FLOAT8,
        SEEN_BY_FEW,
        (
            (
                "barrier_arrive_warp(s.raw_k_empty[raw.stage]);",
                "barrier_arrive_warp(s.raw_k_empty[raw.stage]); barrier_arrive_warp(s.raw_v_empty[raw.stage]);",
            ),
            (
                "barrier_arrive_warp(s.raw_v_empty[raw.stage], kRawArrivals / kRawReaders);",
                "barrier_arrive_warp(s.raw_v_empty[raw.stage]);",
            ),
        ),
    ),
    "too few views": (
        FLOAT8,
        LONG_ITEMS,
        (
            ("kViewPlaces = kRawStages + kKeyStages + 2 * kTokenGroups;", "kViewPlaces = kRawStages + kTokenGroups;"),
            ("static_assert(sizeof(Shared) == ", "static_assert(sizeof(Shared) <= "),
        ),
    ),
}
"""What was wrong once, or what a wait is for."""


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault: str) -> None:
    kernel, (tree, heads, workers), edits = FAULTS[fault]
    schedule = planned(kernel, tree, heads, workers)
    for seed in range(ORDERS):
        of = random_arrays(kernel, tree, heads, seed)
        try:
            with emulated_gpu(seed, edits):
                schedule.run(of.operands(), placed(schedule), EmulatedStream())  # type: ignore[arg-type]
            assert_right(of, tree, kernel.dtype)
        except (RuntimeError, AssertionError):
            return
    pytest.fail(f"{ORDERS} orders are right all the same")
