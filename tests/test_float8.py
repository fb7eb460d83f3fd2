"""Float8 K and V with their scales, on every backend and kernel, against the float64 reference.

The reference gets what the float8 numbers stand for: what quantising loses is not looked at here.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution.arrays import DTYPES
from fasttree_cupy.execution.schedule import BalancedSchedule, HeuristicSchedule, SubtreeSchedule
from tests.reference import dense_attention
from tests.test_balanced import CUT_TREES, ROW_GROUPS, force
from tests.tolerances import assert_close

FORMATS = ("float8_e4m3fn", "float8_e5m2")
SCALES = ("none", "number", "array")
TREE = ft.KVTree.from_levels([1, 3, 7], [70, 33, 9])
NAN_BYTES = (0x7F, 0xFF)
"""NaN in both formats."""


class Inputs(NamedTuple):
    """Arrays in host memory; scales as `DecodePlan.run` takes them."""

    q: Any
    k: Any
    v: Any
    k_scale: Any
    v_scale: Any


def make_inputs(
    tree: ft.KVTree, heads: int, kv_heads: int, head_dim: int, dtype: str, kv_dtype: str, scales: str
) -> Inputs:
    rng = np.random.default_rng(11)
    shape = (tree.unique_tokens, kv_heads, head_dim)
    q = rng.standard_normal((tree.batch_size, heads, head_dim)).astype(DTYPES[dtype])
    # The spread of magnitudes reaches the formats' subnormal numbers.
    k, v = (
        (rng.standard_normal(shape) * 2.0 ** rng.integers(-12, 2, shape)).astype(DTYPES[kv_dtype]) for _ in range(2)
    )
    chosen = {
        "none": (None, None),
        "number": (2.5, 0.3),
        "array": tuple(rng.uniform(0.2, 3, (2, kv_heads)).astype(np.float32)),
    }
    return Inputs(q, k, v, *chosen[scales])


def scaled(array: Any, scale: Any) -> Any:
    """What float8 numbers stand for, as float64."""
    return array.astype(np.float64) * (1.0 if scale is None else np.reshape(scale, (-1, 1)))


def expected(tree: ft.KVTree, inputs: Inputs, cap: float) -> tuple[Any, Any]:
    q, k, v, k_scale, v_scale = inputs
    sizes = (tree.parent, tree.seqlen, tree.request_node)
    return dense_attention(*sizes, q, scaled(k, k_scale), scaled(v, v_scale), q.shape[2] ** -0.5, cap)


def pooled(tree: ft.KVTree, array: Any, rows: Any) -> Any:
    """A pool that holds the rows of `array` at `rows`, and NaN between them."""
    pool = np.resize(np.array(NAN_BYTES, np.uint8), (3 * len(array) + 1, *array.shape[1:]))
    pool[rows] = array.view(np.uint8)
    return pool.view(array.dtype)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_right_on_the_cpu(dtype: str, kv_dtype: str, scales: str) -> None:
    inputs = make_inputs(TREE, 6, 2, 32, dtype, kv_dtype, scales)
    rows = np.random.default_rng(3).permutation(3 * TREE.unique_tokens)[: TREE.unique_tokens]
    pool = inputs._replace(k=pooled(TREE, inputs.k, rows), v=pooled(TREE, inputs.v, rows))
    for cap in (-1.0, 1.5):
        o, lse = expected(TREE, inputs, cap)
        for kv_indices, given in ((None, inputs), (rows, pool)):
            plan = ft.plan_decode(TREE, 6, 2, 32, kv_indices=kv_indices, device="cpu")
            out, out_lse = plan.run(*given[:3], logit_cap=cap, return_lse=True, **scales_of(given))
            assert_close(out, o, DTYPES[dtype])
            assert_close(out_lse, lse, np.float32, "lse")


def scales_of(inputs: Inputs) -> dict[str, Any]:
    return {"k_scale": inputs.k_scale, "v_scale": inputs.v_scale}


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_every_value_is_widened_exactly_on_the_cpu(kv_dtype: str) -> None:
    """A request that attends to one token gets its value."""
    v = np.arange(256, dtype=np.uint8).view(DTYPES[kv_dtype]).reshape(16, 1, 16)
    tree = ft.KVTree([-1, *[0] * 16], [0, *[1] * 16], list(range(1, 17)))
    q = np.zeros((16, 1, 16), np.float16)
    k = np.zeros(v.shape, v.dtype)
    out = ft.plan_decode(tree, 1, 1, 16, device="cpu").run(q, k, v)
    np.testing.assert_array_equal(out, v.astype(np.float16))


@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_torch_and_jax_arrays_are_taken_as_they_are(kv_dtype: str, torch: Any, jax: Any) -> None:
    inputs = make_inputs(TREE, 6, 2, 32, "float16", kv_dtype, "array")
    o, _ = expected(TREE, inputs, -1)
    plan = ft.plan_decode(TREE, 6, 2, 32, device="cpu")

    def as_torch(array: Any) -> Any:
        if array.dtype.itemsize == 1:
            return torch.from_numpy(array.view(np.uint8)).view(getattr(torch, kv_dtype))
        return torch.from_numpy(array)

    for convert in (as_torch, jax.numpy.asarray):
        q, k, v, k_scale, v_scale = (convert(array) for array in inputs)
        out = plan.run(q, k, v, k_scale=k_scale, v_scale=v_scale)
        assert type(out) is type(q)
        assert_close(np.asarray(out), o, np.float16)


def run_with(**changes: Any) -> Any:
    inputs = make_inputs(TREE, 6, 2, 32, "float16", "float8_e4m3fn", "array")
    arguments = inputs._asdict() | {"out": np.full(inputs.q.shape, 7, np.float16)} | changes
    try:
        return ft.plan_decode(TREE, 6, 2, 32, device="cpu").run(**arguments)
    finally:
        assert np.all(arguments["out"] == 7)


KV_SHAPE = (TREE.unique_tokens, 2, 32)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("k", np.zeros(KV_SHAPE, np.float16), TypeError, "v has dtype float8_e4m3fn, expected float16"),
        ("v", np.zeros(KV_SHAPE, np.float16), TypeError, "v has dtype float16, expected float8_e4m3fn"),
        ("v", np.zeros(KV_SHAPE, ml_dtypes.float8_e5m2), TypeError, "v has dtype float8_e5m2, expected float8_e4m3fn"),
        ("v", np.zeros(KV_SHAPE, np.int32), TypeError, "v has dtype int32, expected float16 or bfloat16 or float8"),
        ("q", np.zeros((21, 6, 32), ml_dtypes.float8_e4m3fn), TypeError, "q has dtype float8_e4m3fn, expected float16"),
        ("k_scale", 0.0, ValueError, "k_scale is 0.0, expected a positive number"),
        ("v_scale", -1, ValueError, "v_scale is -1, expected a positive number"),
        ("k_scale", float("nan"), ValueError, "k_scale is nan, expected a finite number"),
        ("k_scale", True, TypeError, "k_scale is True, expected a number"),
        ("k_scale", "1", TypeError, "k_scale: expected an array"),
        ("v_scale", np.ones(2), TypeError, "v_scale: dtype float64 is not supported"),
        ("v_scale", np.ones(2, np.float16), TypeError, "v_scale has dtype float16, expected float32"),
        ("k_scale", np.ones(3, np.float32), ValueError, r"k_scale has shape \(3,\), expected \(2,\)"),
        ("k_scale", np.ones((2, 1), np.float32), ValueError, r"k_scale has shape \(2, 1\), expected \(2,\)"),
        ("k_scale", np.ones(4, np.float32)[::2], ValueError, r"k_scale has strides \(2,\)"),
        ("v_scale", np.array([1, 0], np.float32), ValueError, "v_scale holds .* expected positive"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        run_with(**{name: value})


def test_a_product_of_scales_that_float32_cannot_hold_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sm_scale times k_scale is 6e\+38"):
        run_with(sm_scale=3e38, k_scale=2.0)


def test_scales_of_16_bit_arrays_are_refused() -> None:
    kv = np.zeros(KV_SHAPE, np.float16)
    plan = ft.plan_decode(TREE, 6, 2, 32, device="cpu")
    for name in ("k_scale", "v_scale"):
        with pytest.raises(ValueError, match=f"{name} is given, but k and v are float16"):
            plan.run(np.zeros((TREE.batch_size, 6, 32), np.float16), kv, kv, **{name: 1.0})


def on_gpu(cupy: Any, array: Any) -> Any:
    """A CuPy array of any dtype: it makes none of float8, but views bytes as such."""
    return cupy.asarray(np.ascontiguousarray(array).view(np.uint8)).view(array.dtype)


def only(kernel: str, monkeypatch: pytest.MonkeyPatch) -> type[Any]:
    """Make plan_decode choose a kernel; returns the schedule that it then makes."""
    if kernel in ("one_row_group", "two_row_groups"):
        force(monkeypatch, ROW_GROUPS[1 if kernel == "one_row_group" else 2], 132)
        return BalancedSchedule
    off = [BalancedSchedule] if kernel == "tiles" else [BalancedSchedule, SubtreeSchedule]
    for schedule in off:
        monkeypatch.setattr(schedule, "problem", staticmethod(lambda *_: "switched off"))
    return SubtreeSchedule if kernel == "tiles" else HeuristicSchedule


@cache
def cut_case(index: int, heads: int, kv_heads: int, head_dim: int, dtype: str, kv_dtype: str) -> tuple[Inputs, Any]:
    """Inputs for a tree of CUT_TREES, and what comes out without and with a soft cap: the same for every kernel."""
    tree = CUT_TREES[index]
    inputs = make_inputs(tree, heads, kv_heads, head_dim, dtype, kv_dtype, SCALES[index % len(SCALES)])
    return inputs, {cap: expected(tree, inputs, cap) for cap in (-1.0, 1.5)}


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["one_row_group", "two_row_groups", "tiles", "plain"])
@pytest.mark.parametrize(("group", "kv_heads", "head_dim"), [(1, 3, 128), (3, 2, 64), (16, 1, 128), (5, 2, 64)])
@pytest.mark.parametrize("kv_dtype", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_right_on_the_gpu(
    dtype: str,
    kv_dtype: str,
    group: int,
    kv_heads: int,
    head_dim: int,
    kernel: str,
    cupy: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    schedule = only(kernel, monkeypatch)
    for index, tree in enumerate(CUT_TREES):
        inputs, outcomes = cut_case(index, group * kv_heads, kv_heads, head_dim, dtype, kv_dtype)
        rows = np.random.default_rng(3).permutation(3 * tree.unique_tokens)[: tree.unique_tokens]
        pool = inputs._replace(k=pooled(tree, inputs.k, rows), v=pooled(tree, inputs.v, rows))
        for kv_indices, given in ((None, inputs), (rows, pool)):
            plan = ft.plan_decode(tree, group * kv_heads, kv_heads, head_dim, kv_indices=kv_indices, device="cuda")
            if not isinstance(plan.schedule, schedule):
                pytest.skip("this GPU has no such kernel")
            q, k, v = (on_gpu(cupy, array) for array in given[:3])
            factors = {
                name: cupy.asarray(scale) if isinstance(scale, np.ndarray) else scale
                for name, scale in scales_of(given).items()
            }
            for cap, (o, lse) in outcomes.items():
                out = cupy.full(q.shape, np.nan, np.float32).astype(q.dtype)
                _, out_lse = plan.run(q, k, v, out, logit_cap=cap, return_lse=True, **factors)
                assert_close(out.get(), o, DTYPES[dtype])
                assert_close(out_lse.get(), lse, np.float32, "lse")


MIXED_TREES = (
    ft.KVTree.from_levels([1, 16, 32, 64, 256], [256, 128, 64, 16, 48]),
    ft.KVTree.from_levels([1, 8, 64], [40, 20, 300]),
)
"""Tokens that most rows of a tile see, in turn with such as few see: tiles that are widened, and such as are not."""


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [1, 7])
@pytest.mark.parametrize("row_groups", [1, 2])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_many_tiles_of_both_kinds_are_right_on_the_gpu(
    dtype: str, head_dim: int, row_groups: int, workers: int, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that the rings hold is used again and again, in an order that the trees decide."""
    force(monkeypatch, ROW_GROUPS[row_groups], workers)
    for tree in MIXED_TREES:
        inputs = make_inputs(tree, 4, 2, head_dim, dtype, "float8_e4m3fn", "none")
        plan = ft.plan_decode(tree, 4, 2, head_dim, device="cuda")
        if not isinstance(plan.schedule, BalancedSchedule):
            pytest.skip("this GPU has no such kernel")
        q, k, v = (on_gpu(cupy, array) for array in inputs[:3])
        out, again = (cupy.full(q.shape, np.nan, np.float32).astype(q.dtype) for _ in range(2))
        plan.run(q, k, v, out)
        plan.run(q, k, v, again)
        assert_close(out.get(), expected(tree, inputs, -1)[0], DTYPES[dtype])
        np.testing.assert_array_equal(out.get().view(np.uint16), again.get().view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["one_row_group", "two_row_groups"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_bfloat16_queries_beyond_float16_count_as_its_largest(
    head_dim: int, kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    schedule = only(kernel, monkeypatch)
    inputs = make_inputs(TREE, 4, 2, head_dim, "bfloat16", "float8_e4m3fn", "none")
    k, v = on_gpu(cupy, inputs.k), on_gpu(cupy, inputs.v)
    plan = ft.plan_decode(TREE, 4, 2, head_dim, device="cuda")
    if not isinstance(plan.schedule, schedule):
        pytest.skip("this GPU has no such kernel")
    outputs = []
    for largest in (65536.0, 1e6):
        q = np.copysign(largest, inputs.q.astype(np.float32)).astype(inputs.q.dtype)
        outputs.append(plan.run(on_gpu(cupy, q), k, v).get())
    assert np.isfinite(outputs[0].astype(np.float32)).all()
    np.testing.assert_array_equal(outputs[0].view(np.uint16), outputs[1].view(np.uint16))


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", [16, 32, 256])
@pytest.mark.parametrize("kernel", ["tiles", "plain"])
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_other_head_dims_are_right_on_the_gpu(
    kv_dtype: str, kernel: str, head_dim: int, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(kernel, monkeypatch)
    for dtype, heads in (("float16", 2), ("bfloat16", 32)):
        inputs = make_inputs(TREE, heads, 2, head_dim, dtype, kv_dtype, "number")
        q, k, v = (on_gpu(cupy, array) for array in inputs[:3])
        out = ft.plan_decode(TREE, heads, 2, head_dim, device="cuda").run(q, k, v, **scales_of(inputs))
        assert_close(out.get(), expected(TREE, inputs, -1)[0], DTYPES[dtype])


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["one_row_group", "two_row_groups", "tiles", "plain"])
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_every_value_is_widened_exactly_on_the_gpu(
    kv_dtype: str, kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """NaN stays NaN, infinity infinity, and subnormal numbers are none that are lost."""
    only(kernel, monkeypatch)
    v = np.resize(np.arange(256, dtype=np.uint8), (4, 1, 64)).view(DTYPES[kv_dtype])
    for dtype in ("float16", "bfloat16"):
        for token in range(4):  # apart: a request's NaN may reach the others of its tile
            tree = ft.KVTree([-1], [1], [0])
            q = cupy.zeros((1, 1, 64), DTYPES[dtype])
            k = on_gpu(cupy, np.zeros((1, 1, 64), v.dtype))
            out = ft.plan_decode(tree, 1, 1, 64, device="cuda").run(q, k, on_gpu(cupy, v[token : token + 1]))
            np.testing.assert_array_equal(out.get()[0].astype(np.float32), v[token].astype(np.float32))


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["one_row_group", "two_row_groups", "tiles", "plain"])
@pytest.mark.parametrize("layout", ["wide_heads", "head_major", "interleaved", "backwards"])
def test_any_aligned_strides_do_on_the_gpu(
    layout: str, kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    only(kernel, monkeypatch)
    tokens, heads, head_dim = TREE.unique_tokens, 2, 64
    inputs = make_inputs(TREE, 4, heads, head_dim, "bfloat16", "float8_e4m3fn", "array")
    buffer = cupy.full((2, tokens, heads, 2, head_dim + 16), NAN_BYTES[0], np.uint8)
    if layout == "wide_heads":
        buffers = [buffer[i, :, :, 0, :head_dim] for i in range(2)]
    elif layout == "head_major":
        buffers = [cupy.zeros((heads, tokens, head_dim), np.uint8).transpose(1, 0, 2) for _ in range(2)]
    elif layout == "interleaved":
        buffers = [buffer[0, :, :, i, :head_dim] for i in range(2)]
    else:
        buffers = [buffer[i, ::-1, :, 0, :head_dim] for i in range(2)]
    for to, array in zip(buffers, inputs[1:3], strict=True):
        to[...] = cupy.asarray(array.view(np.uint8))
    k, v = (array.view(inputs.k.dtype) for array in buffers)
    plan = ft.plan_decode(TREE, 4, heads, head_dim, device="cuda")
    scales = [cupy.asarray(scale) for scale in inputs[3:]]
    out = plan.run(on_gpu(cupy, inputs.q), k, v, k_scale=scales[0], v_scale=scales[1])
    assert_close(out.get(), expected(TREE, inputs, -1)[0], DTYPES["bfloat16"])


@pytest.mark.gpu
def test_rows_off_16_bytes_are_refused_on_the_gpu(cupy: Any) -> None:
    k = cupy.zeros((TREE.unique_tokens, 2, 72), np.uint8)[:, :, :64].view(ml_dtypes.float8_e4m3fn)
    q = cupy.zeros((TREE.batch_size, 2, 64), np.float16)
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        ft.plan_decode(TREE, 2, 2, 64, device="cuda").run(q, k, k)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", FORMATS)
def test_torch_and_jax_arrays_are_taken_on_the_gpu(kv_dtype: str, torch: Any, jax: Any) -> None:
    inputs = make_inputs(TREE, 6, 2, 64, "bfloat16", kv_dtype, "array")
    o, _ = expected(TREE, inputs, -1)
    plan = ft.plan_decode(TREE, 6, 2, 64, device="cuda")

    def as_torch(array: Any) -> Any:
        names = {"bfloat16": torch.bfloat16, "float32": torch.float32}
        dtype = names.get(str(array.dtype)) or getattr(torch, kv_dtype)
        return torch.from_numpy(array.view(np.uint8)).cuda().view(dtype)

    for convert in (as_torch, lambda array: jax.device_put(array, jax.devices("gpu")[0])):
        q, k, v, k_scale, v_scale = (convert(array) for array in inputs)
        out = plan.run(q, k, v, k_scale=k_scale, v_scale=v_scale)
        assert type(out) is type(q)
        host = out.float().cpu().numpy() if isinstance(out, torch.Tensor) else np.asarray(out)
        assert_close(host, o, DTYPES["bfloat16"])
