"""fasttree_decode against float64 dense attention: every case of `cases.py` on every backend.

Inputs are fresh in every run; `FASTTREE_TEST_SEED`, which a failure prints, repeats them.
"""

from __future__ import annotations

import itertools
import os
import time
from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.execution import stages
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.plan import plan_decode
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree
from tests import cases
from tests.cases import Case, Tree
from tests.reference import dense_attention
from tests.tolerances import BOUNDS, assert_close

SEED = int(os.environ.get("FASTTREE_TEST_SEED", time.time_ns() % 2**32))
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
BACKENDS = [
    pytest.param("cpu", id="cpu"),
    pytest.param("mma", id="mma", marks=pytest.mark.gpu),
    pytest.param("plain", id="plain", marks=pytest.mark.gpu),
]
AMPERE_DIMS = (64, 128)
"""Head dims for which a GPU of compute capability 9.0 has a kernel of its own."""
NAN_BITS = 0x7FFF  # a NaN in float16 and in bfloat16
BASIC = Case(cases.TREES[4], "float16", 64, 4, 2, (16, 4), (32, 32), "contiguous", -1.0)

backends = pytest.mark.parametrize("backend", BACKENDS)


def namespace(backend: str) -> Any:
    if backend == "cpu":
        return np
    import cupy

    return cupy


@dataclass
class Inputs:
    """Values on the host, contiguous, and the arrays in the case's layout on the backend's device."""

    values: tuple[Any, Any, Any]
    q: Any
    k: Any
    v: Any
    o: Any
    o_base: Any


def place(shapes: dict[str, tuple[int, int, int]], layout: str, xp: Any) -> tuple[dict[str, Any], Any]:
    """uint16 views of the shapes, and what `o` is a view of; all memory holds NaN."""

    def full(*shape: int) -> Any:
        return xp.full(shape, NAN_BITS, xp.uint16)

    views = {name: full(*shape) for name, shape in shapes.items()}
    o_base = views["o"]
    (batch, heads, dim), (tokens, kv_heads, _) = shapes["q"], shapes["k"]
    if layout == "wide_heads":
        o_base = full(batch, heads + 3, dim)
        views |= {"q": full(batch, heads + 5, dim)[:, 2 : 2 + heads], "o": o_base[:, 3:]}
    elif layout == "interleaved":
        both = full(tokens, 2, kv_heads, dim)
        views |= {"k": both[:, 0], "v": both[:, 1]}
    elif layout == "head_major":
        views |= {name: full(kv_heads, tokens, dim).transpose(1, 0, 2) for name in "kv"}
    elif layout == "odd_strides":
        bases = {name: full(n, h, d + 3) for name, (n, h, d) in shapes.items()}
        views = {name: base[:, :, :dim] for name, base in bases.items()}
        o_base = bases["o"]
    return views, o_base


def make_inputs(case: Case, xp: Any, amplitude: float) -> Inputs:
    rng = np.random.default_rng([SEED, *case.id.encode()])
    q_shape = (len(case.tree.request_node), case.group * case.num_kv_heads, case.head_dim)
    kv_shape = (sum(case.tree.seqlen), case.num_kv_heads, case.head_dim)
    shapes = {"q": q_shape, "k": kv_shape, "v": kv_shape, "o": q_shape}
    views, o_base = place(shapes, case.layout, xp)
    dtype = DTYPES[case.dtype]
    values = []
    for name in "qkv":
        value = rng.standard_normal(shapes[name], np.float32)
        if name == "q":
            value *= amplitude
        values.append(value.astype(dtype))
        views[name][...] = xp.asarray(values[-1].view(np.uint16))
    q, k, v, o = (views[name].view(dtype) for name in "qkvo")
    return Inputs((values[0], values[1], values[2]), q, k, v, o, o_base)


def result_bits(inputs: Inputs, backend: str) -> Any:
    """The output on the host, as uint16."""
    bits = inputs.o.view(np.uint16)
    return bits.copy() if backend == "cpu" else bits.get()


def prepare(case: Case, backend: str) -> tuple[Any, FastTreeParams]:
    """Metadata with work spaces full of NaN, and the parameters as preparation left them."""
    tree = KVTree(case.tree.parent, case.tree.seqlen, case.tree.request_node)
    params = FastTreeParams()
    params.set_kv_group_num(case.group)
    params.set_q_tile_sizes(list(case.TSQs))
    params.set_kv_tile_sizes(list(case.TSKs))
    metadata, _ = fasttree_preparation(
        tree,
        tree.kv_ptrs,
        tree.batch_size,
        case.group * case.num_kv_heads,
        case.num_kv_heads,
        case.head_dim,
        list(case.tree.kv_split_sizes),
        [132, 528],
        [132, 132],
        params,
        device="cpu" if backend == "cpu" else "cuda",
        verbose=False,
    )
    metadata.mid_o.fill(np.nan)
    metadata.mid_lse.fill(np.nan)
    return metadata, params


def check(
    case: Case,
    backend: str,
    *,
    amplitude: float = 1.0,
    sm_scale: float | None = None,
    tiles: tuple[list[int], list[int]] | None = None,
) -> Any:
    """Decode, then compare with the reference; returns the result as float64."""
    print(f"FASTTREE_TEST_SEED={SEED}")
    xp = namespace(backend)
    metadata, params = prepare(case, backend)
    inputs = make_inputs(case, xp, amplitude)
    scale = case.head_dim**-0.5 if sm_scale is None else sm_scale
    q_tiles, kv_tiles = tiles or (params.TSQs, params.TSKs)
    # The tensor-core kernel takes rows at multiples of 16 bytes; "auto" has to find another one.
    kernel = "auto" if backend == "cpu" or case.layout == "odd_strides" else backend
    # Before the reference, whose result a recycled buffer could otherwise hold.
    fasttree_decode(
        inputs.q,
        inputs.k,
        inputs.v,
        inputs.o,
        *metadata,
        q_tiles,
        kv_tiles,
        scale,
        case.logit_cap,
        kernel=kernel,
    )
    actual = result_bits(inputs, backend).view(DTYPES[case.dtype]).astype(np.float64)
    expected, _ = reference(case, inputs.values, scale, xp)
    assert_close(actual, expected, DTYPES[case.dtype])
    inputs.o.view(np.uint16)[...] = NAN_BITS
    assert bool((inputs.o_base == NAN_BITS).all()), "memory around o was written"
    return actual


def reference(case: Case, values: tuple[Any, Any, Any], sm_scale: float, xp: Any) -> tuple[Any, Any]:
    tree = case.tree
    # float32 holds both dtypes exactly, and CuPy can index it.
    q, k, v = (xp.asarray(value.astype(np.float32)) for value in values)
    return dense_attention(tree.parent, tree.seqlen, tree.request_node, q, k, v, sm_scale, case.logit_cap, xp)


@backends
@pytest.mark.parametrize("case", cases.CASES, ids=[case.id for case in cases.CASES])
def test_case(case: Case, backend: str) -> None:
    # Scores of a few units hardly feel a cap of 30.
    check(case, backend, amplitude=10.0 if case.logit_cap == 30 else 1.0)


AMPERE_CASES = [case for case in cases.CASES if case.head_dim in AMPERE_DIMS and case.layout != "odd_strides"]


@pytest.mark.gpu
@pytest.mark.parametrize("case", AMPERE_CASES[::3], ids=[case.id for case in AMPERE_CASES[::3]])
def test_case_as_on_ampere(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "stage1_sm90_serves", lambda _: False)
    check(case, "mma", amplitude=10.0 if case.logit_cap == 30 else 1.0)


def test_every_tree_meets_every_value() -> None:
    assert len(cases.TREES) == 220
    for tree in cases.TREES:
        own = [case for case in cases.CASES if case.tree is tree]
        for factor, values in cases.FACTORS.items():
            assert {getattr(case, factor) for case in own} == set(values), (tree.name, factor)


def test_every_pair_of_values_is_met() -> None:
    for (one, values), (other, others) in itertools.combinations(cases.FACTORS.items(), 2):
        met = {(getattr(case, one), getattr(case, other)) for case in cases.CASES}
        assert met == set(itertools.product(values, others)), (one, other)


@pytest.mark.parametrize("cap", [30.0, 2.0])
def test_the_cap_is_felt(cap: float) -> None:
    """A backend without the cap would fail `test_case`, by a factor of three at least."""
    case = replace(BASIC, logit_cap=cap)
    values = make_inputs(case, np, 10.0 if cap == 30 else 1.0).values
    capped, _ = reference(case, values, case.head_dim**-0.5, np)
    free, _ = reference(replace(case, logit_cap=-1.0), values, case.head_dim**-0.5, np)
    error = np.linalg.norm(capped - free) / np.linalg.norm(capped)
    assert error > 3 * BOUNDS["bfloat16"]


@backends
@pytest.mark.parametrize(
    "tiles", [([4, 1], [32, 32]), ([64, 16], [32, 128]), ([7, 3], [40, 24]), ([2**31 - 1, 10**9], [32, 32])]
)
def test_other_tiles_than_the_plans_drop_no_query(backend: str, tiles: tuple[list[int], list[int]]) -> None:
    case = replace(BASIC, tree=cases.levels_tree("tiles", [1, 4, 40], [150, 40, 9]), TSQs=(32, 8))
    check(case, backend, tiles=tiles)


@backends
def test_more_queries_than_a_tile(backend: str) -> None:
    star = Tree("star333", [-1] + [0] * 333, [70] + [2] * 333, list(range(1, 334)))
    check(replace(BASIC, tree=star, num_kv_heads=1), backend)


@backends
def test_requests_end_at_inner_nodes_and_share_ends(backend: str) -> None:
    tree = Tree("inner", [-1, 0, 1, 1], [20, 30, 5, 6], [1, 0, 3, 2, 1, 0, 3])
    check(replace(BASIC, tree=tree), backend)


@backends
def test_nodes_without_tokens(backend: str) -> None:
    tree = Tree("empty_nodes", [-1, 0, 0, 1, 2], [0, 0, 12, 33, 0], [3, 4, 1, 0])
    actual = check(replace(BASIC, tree=tree), backend)
    assert (actual[2:] == 0).all(), "a request without tokens gets 0"


@backends
def test_no_token_at_all(backend: str) -> None:
    check(replace(BASIC, tree=Tree("void", [-1, 0], [0, 0], [1])), backend)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cap", [-1.0, 30.0])
def test_scores_beyond_the_range_of_exp(backend: str, dtype: str, cap: float) -> None:
    """exp of these scores, thousands, would overflow float32."""
    check(replace(BASIC, dtype=dtype, logit_cap=cap), backend, amplitude=1000.0)


@backends
@pytest.mark.parametrize("cap", [1e3, 1e5, 1e9, 3e38])
def test_a_cap_far_above_the_scores_changes_nothing(backend: str, cap: float) -> None:
    check(replace(BASIC, logit_cap=cap), backend)


@backends
@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_one_requests_infinity_stays_its_own(backend: str, value: float) -> None:
    """A value that is not finite in a leaf reaches the request that ends there, and no other."""
    tree = cases.levels_tree("leaves", [1, 3, 12], [40, 17, 5])
    case = replace(BASIC, tree=tree)
    metadata, params = prepare(case, backend)
    inputs = make_inputs(case, namespace(backend), 1.0)
    inputs.v.view(np.uint16)[-1] = np.full(1, value, DTYPES[case.dtype]).view(np.uint16)[
        0
    ]  # the last leaf's last token
    kernel = "auto" if backend == "cpu" else backend
    fasttree_decode(
        inputs.q, inputs.k, inputs.v, inputs.o, *metadata, params.TSQs, params.TSKs, case.head_dim**-0.5, kernel=kernel
    )
    actual = result_bits(inputs, backend).view(DTYPES[case.dtype]).astype(np.float64)
    assert np.isfinite(actual[:-1]).all()
    expected = np.full_like(actual[-1], value)
    np.testing.assert_array_equal(actual[-1], expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["mma", "plain", "plan"])
def test_arrays_of_more_than_2_31_elements(backend: str, cupy: Any) -> None:
    tokens, kv_heads, head_dim = 1_100_000, 8, 256
    needed = 5 * tokens * kv_heads * head_dim
    if cupy.cuda.runtime.memGetInfo()[0] < needed:
        pytest.skip(f"needs {needed} bytes of GPU memory")
    tree = KVTree([-1, 0, 0], [3, tokens, 40], [1, 2])
    rng = np.random.default_rng(SEED)
    q = cupy.asarray(rng.standard_normal((2, kv_heads, head_dim), np.float32).astype(np.float16))
    k, v = (cupy.zeros((tree.unique_tokens, kv_heads, head_dim), np.float16) for _ in range(2))
    rows = np.r_[0:3, 3 + tokens : 43 + tokens]
    seen = [rng.standard_normal((len(rows), kv_heads, head_dim), np.float32).astype(np.float16) for _ in range(2)]
    for array, values in zip((k, v), seen, strict=True):
        array[:3], array[-40:] = cupy.asarray(values[:3]), cupy.asarray(values[3:])
    out = cupy.full_like(q, np.nan)
    if backend == "plan":
        plan_decode(tree, kv_heads, kv_heads, head_dim, device="cuda").run(q, k, v, out)
    else:
        params = FastTreeParams()
        metadata, _ = fasttree_preparation(
            tree, tree.kv_ptrs, 2, kv_heads, kv_heads, head_dim,
            [1024, 128], [132, 528], [132, 132], params, device="cuda", verbose=False,
        )  # fmt: skip
        fasttree_decode(q, k, v, out, *metadata, params.TSQs, params.TSKs, head_dim**-0.5, kernel=backend)
    expected, _ = dense_attention([-1], [len(rows)], [0], q[1:].get(), *seen, head_dim**-0.5)
    assert_close(out[1:].get(), expected, np.float16)
    assert np.isfinite(out[:1].get()).all()


@backends
@pytest.mark.parametrize("sm_scale", [1.0, 0.01, 0.0, -0.2])
def test_sm_scale(backend: str, sm_scale: float) -> None:
    check(BASIC, backend, sm_scale=sm_scale)


@backends
@pytest.mark.parametrize("dtype", DTYPES)
def test_tokens_that_lie_anywhere(backend: str, dtype: str) -> None:
    """Rows of K and V that do not follow one another, or only some of them."""
    tree = cases.levels_tree("scattered", [1, 3, 30], [200, 90, 21])
    case = replace(BASIC, tree=tree, dtype=dtype, head_dim=128, TSQs=(64, 8))
    xp = namespace(backend)
    metadata, params = prepare(case, backend)
    inputs = make_inputs(case, xp, 1.0)
    rows = np.arange(len(inputs.k))
    rng = np.random.default_rng(SEED)
    rows[150:700] = 150 + rng.permutation(550)
    rows[[3, 4]] = rows[[4, 3]]
    where = xp.asarray(rows.astype(np.int32))
    for name in "kv":
        array = getattr(inputs, name)
        array.view(np.uint16)[where] = array.view(np.uint16).copy()
    metadata = metadata._replace(vnode_to_kv_entries=where[metadata.vnode_to_kv_entries])
    kernel = "auto" if backend == "cpu" else backend
    arrays = inputs.q, inputs.k, inputs.v, inputs.o
    fasttree_decode(*arrays, *metadata, params.TSQs, params.TSKs, 0.1, kernel=kernel)
    actual = result_bits(inputs, backend).view(DTYPES[dtype]).astype(np.float64)
    expected, _ = reference(case, inputs.values, 0.1, xp)
    assert_close(actual, expected, DTYPES[dtype])


@backends
def test_decode_again(backend: str) -> None:
    """The same metadata serves any number of decodes: stale partial outputs do not leak."""
    metadata, params = prepare(BASIC, backend)
    results = []
    for amplitude in (1.0, 3.0, 1.0):
        inputs = make_inputs(BASIC, namespace(backend), amplitude)
        arrays = inputs.q, inputs.k, inputs.v, inputs.o
        fasttree_decode(*arrays, *metadata, params.TSQs, params.TSKs, 0.125)
        results.append(result_bits(inputs, backend))
    assert np.array_equal(results[0], results[2])
    assert not np.array_equal(results[0], results[1])
