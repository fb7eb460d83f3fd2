"""The CPU backend by itself: 16-bit conversions, metadata checks, hand-made metadata, odd arrays, threads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.execution import cpu, cpu_rows
from fasttree_cupy.metadata import MetadataTuple
from tests.reference import dense_attention
from tests.tolerances import assert_close

GOLDEN = json.loads((Path(__file__).parent / "data" / "golden_preparation.json").read_text())
DTYPES = [np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def metadata_of(vnodes: list[tuple[Any, Any]], requests: list[list[int]], heads: int, dim: int) -> MetadataTuple:
    """Metadata of (kv entries, q entries) pairs and of each request's rows of mid_o."""

    def lists(members: list[Any]) -> tuple[Any, Any, Any]:
        lens = np.array([len(part) for part in members], np.int32)
        entries = np.array([x for part in members for x in part], np.int32)
        return entries, (np.cumsum(lens) - lens).astype(np.int32), lens

    kv, q = lists([kv for kv, _ in vnodes]), lists([q for _, q in vnodes])
    mid_o = np.full((len(q[0]), heads, dim), np.nan, np.float32)
    mid_lse = np.full((len(q[0]), heads), np.nan, np.float32)
    return MetadataTuple(*kv, *q, *lists(requests), mid_o, mid_lse, [0, len(vnodes)], [0, 0])


def metadata_of_golden(case: dict[str, Any]) -> MetadataTuple:
    expected = case["expected"]
    runs = expected["vnode_to_kv_entries_runs"]
    arrays = {"vnode_to_kv_entries": np.concatenate([np.arange(a, a + n) for a, n in runs]).astype(np.int32)}
    for name in MetadataTuple._fields[1:9]:
        arrays[name] = np.array(expected[name], np.int32)
    for name in ("mid_o", "mid_lse"):
        arrays[name] = np.full(expected[f"{name}_shape"], np.nan, np.float32)
    return MetadataTuple(
        **arrays,
        phase_node_nums=expected["phase_node_nums"],
        phase_node_offsets=expected["phase_node_offsets"],
    )


def random_arrays(dtype: Any, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(0)
    shapes = (batch, heads, dim), (tokens, kv_heads, dim), (tokens, kv_heads, dim)
    q, k, v = (rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes)
    return q, k, v


def decode(q: Any, k: Any, v: Any, metadata: MetadataTuple, sm_scale: float = 0.25, cap: float = -1.0) -> Any:
    o = np.full(q.shape, np.nan, q.dtype)
    cpu.check_indices(metadata, len(k), len(q))
    cpu.decode(q, k, v, o, metadata, sm_scale, cap)
    return o


@pytest.mark.parametrize("case", GOLDEN, ids=[case["name"] for case in GOLDEN])
def test_golden_plans(case: dict[str, Any]) -> None:
    tree, metadata = case["tree"], metadata_of_golden(case)
    heads, kv_heads = min(case["num_qo_heads"], 4), 2
    metadata = metadata._replace(
        mid_o=np.full((len(metadata.mid_o), heads, 32), np.nan, np.float32),
        mid_lse=np.full((len(metadata.mid_o), heads), np.nan, np.float32),
    )
    q, k, v = random_arrays(np.float16, case["batch_size"], sum(tree["seqlen"]), heads, kv_heads, 32)
    actual = decode(q, k, v, metadata)
    leaves = sorted(set(range(len(tree["parent"]))) - set(tree["parent"]))
    expected, lse = dense_attention(tree["parent"], tree["seqlen"], leaves, q, k, v, 0.25)
    assert_close(actual, expected, np.float16)
    for request in range(len(q)):
        first, count = metadata.req_to_vnode_offs[request], metadata.req_to_vnode_lens[request]
        rows = metadata.req_to_vnode_entries[first : first + count]
        merged = np.logaddexp.reduce(metadata.mid_lse[rows].astype(np.float64), axis=0)
        np.testing.assert_allclose(merged, lse[request], atol=1e-5)


@dtypes
@pytest.mark.parametrize(("batch", "tokens", "group"), [(200, 700, 5), (1, 1, 1), (3, 129, 300), (2, 127, 3)])
def test_one_vnode_of_any_size(dtype: Any, batch: int, tokens: int, group: int) -> None:
    q, k, v = random_arrays(dtype, batch, tokens, 2 * group, 2, 16)
    metadata = metadata_of([(range(tokens), range(batch))], [[r] for r in range(batch)], 2 * group, 16)
    actual = decode(q, k, v, metadata, cap=1.5)
    expected, lse = dense_attention([-1], [tokens], [0] * batch, q, k, v, 0.25, 1.5)
    assert_close(actual, expected, dtype)
    assert_close(metadata.mid_o, expected, np.float32, "mid_o")
    assert_close(metadata.mid_lse, lse, np.float32, "mid_lse")


def test_no_vnode_and_empty_vnodes_give_zero() -> None:
    """Request 0 has no vnode, 1 an empty one, 2 an empty one and tokens."""
    q, k, v = random_arrays(np.float16, 3, 4, 2, 1, 16)
    metadata = metadata_of([([], [1, 2]), (range(4), [2])], [[], [0], [1, 2]], 2, 16)
    o = decode(q, k, v, metadata)
    assert (o[:2] == 0).all()
    assert (metadata.mid_lse[:2] == -np.inf).all()
    expected, _ = dense_attention([-1], [4], [0], q[2:], k, v, 0.25)
    assert_close(o[2:], expected, np.float16)


def test_no_request_and_no_token() -> None:
    q, k, v = random_arrays(np.float16, 0, 0, 2, 1, 16)
    assert decode(q, k, v, metadata_of([], [], 2, 16)).shape == (0, 2, 16)
    q, k, v = random_arrays(np.float16, 2, 0, 2, 1, 16)
    assert (decode(q, k, v, metadata_of([], [[], []], 2, 16)) == 0).all()


@dtypes
def test_any_strides_and_read_only(dtype: Any) -> None:
    q, k, v = random_arrays(dtype, 5, 33, 6, 3, 16)
    # Not all requests see all tokens: rows in another order would show.
    vnodes = [(range(20), range(5)), (range(20, 33), [1, 2, 4])]
    metadata = metadata_of(vnodes, [[0], [1, 5], [2, 6], [3], [4, 7]], 6, 16)
    expected = decode(q, k, v, metadata)
    for rows, heads in ((-1, 1), (1, -1), (-1, -1), (2, 1), (2, -2)):
        views = []
        for array in (q, k, v, expected):
            shape = array.shape[0] * abs(rows), array.shape[1] * abs(heads), 16
            view = np.zeros(shape, array.dtype)[::rows, ::heads]
            view[...] = array
            views.append(view)
        views[3][...] = np.nan
        for array in views[:3]:
            array.flags.writeable = False
        cpu.decode(views[0], views[1], views[2], views[3], metadata, 0.25)
        assert np.array_equal(views[3], expected)
    # One row, broadcast: a stride of 0.
    same = np.broadcast_to(q[:1], q.shape)
    assert np.array_equal(decode(same, k, v, metadata), decode(same.copy(), k, v, metadata))


def test_output_may_be_the_query() -> None:
    q, k, v = random_arrays(np.float16, 5, 33, 6, 3, 16)
    metadata = metadata_of([(range(33), range(5))], [[r] for r in range(5)], 6, 16)
    expected = decode(q, k, v, metadata)
    cpu.decode(q, k, v, q, metadata, 0.25)
    assert np.array_equal(q, expected)


def test_nan_reaches_only_those_who_attend_to_it() -> None:
    q, k, v = random_arrays(np.float16, 2, 8, 2, 1, 16)
    k[6] = np.nan
    o = decode(q, k, v, metadata_of([(range(6), [0, 1]), (range(6, 8), [1])], [[0], [1, 2]], 2, 16))
    assert np.isfinite(o[0]).all()
    assert np.isnan(o[1]).all()


def test_tokens_of_score_minus_infinity_do_not_count() -> None:
    """A whole tile of them first: the running maximum is -inf when the finite scores come."""
    q, k, v = random_arrays(np.float16, 1, 140, 1, 1, 16)
    q[..., 0], k[:130, :, 0], k[130:, :, 0] = 1, -np.inf, 0
    o = decode(q, k, v, metadata_of([(range(140), [0])], [[0]], 1, 16))
    expected, _ = dense_attention([-1], [10], [0], q, k[130:], v[130:], 0.25)
    assert_close(o, expected, np.float16)


def test_output_beyond_float16_rounds_to_infinity() -> None:
    q, k, v = random_arrays(np.float16, 1, 1, 1, 1, 16)
    v[:] = np.float16(65504)
    metadata = metadata_of([([0], [0])], [[0]], 1, 16)
    assert (decode(q, k, v, metadata) == np.float16(65504)).all()


def test_threads_do_not_disturb_each_other() -> None:
    metadata = metadata_of([(range(300), range(20))], [[r] for r in range(20)], 8, 64)
    arrays = [random_arrays(np.float16, 20, 300, 8, 2, 64) for _ in range(4)]
    expected = [decode(*three, metadata) for three in arrays]
    wrong: list[int] = []

    def work(i: int) -> None:
        own = metadata._replace(mid_o=np.empty_like(metadata.mid_o), mid_lse=np.empty_like(metadata.mid_lse))
        for _ in range(10):
            if not np.array_equal(decode(*arrays[i], own), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_threads_do_not_crash_the_simplest_threading_layer() -> None:
    """Numba's `workqueue` ends the process when two threads enter it; other layers do not mind."""
    test = f"{__file__}::{test_threads_do_not_disturb_each_other.__name__}"
    environment = os.environ | {"NUMBA_THREADING_LAYER": "workqueue"}
    subprocess.run([sys.executable, "-m", "pytest", "-q", test], check=True, env=environment, timeout=300)


@dtypes
def test_widening_is_exact_for_every_value(dtype: Any) -> None:
    bits = np.arange(2**16, dtype=np.uint16)
    out = np.empty(2**16, np.float32)
    cpu_rows.load_row(cpu_rows.Rows(bits, 0, 0, 0), dtype != np.float16, 0, 0, out)
    expected = bits.view(dtype).astype(np.float32)
    assert np.array_equal(np.isnan(out), np.isnan(expected))
    numbers = ~np.isnan(expected)
    assert np.array_equal(out.view(np.uint32)[numbers], expected.view(np.uint32)[numbers])  # also -0


@dtypes
def test_rounding_is_to_nearest_even(dtype: Any) -> None:
    """At and beside every value and every midpoint between two, and for a million random bit patterns."""
    wide = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32).view(np.uint32)
    half_step = np.uint32(2**12 if dtype == np.float16 else 2**15)
    near = [wide + np.uint32(d) for d in (0, 1, 2**32 - 1, half_step - 1, half_step, half_step + 1)]
    random = np.random.default_rng(0).integers(2**32, size=10**6, dtype=np.uint32)
    subnormal = (np.arange(-4097, 4098) * 2.0**-26).astype(np.float32).view(np.uint32)
    values = np.concatenate([*near, random, subnormal]).view(np.float32)
    bits = np.empty(len(values), np.uint16)
    cpu_rows.store_row(values, dtype != np.float16, cpu_rows.Rows(bits, 0, 0, 0), 0, 0)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        expected = values.astype(dtype)
    assert np.array_equal(np.isnan(bits.view(dtype)), np.isnan(values))
    numbers = ~np.isnan(values)
    assert np.array_equal(bits[numbers], expected.view(np.uint16)[numbers])


def test_exp() -> None:
    x = np.linspace(-86.9, 0, 100_001, dtype=np.float32)
    actual = np.array([cpu._exp(value) for value in x[::100]])
    expected = np.exp(x[::100].astype(np.float64))
    # Rounding x * log2(e) costs |x| * 6e-8 of the result.
    assert (np.abs(actual - expected) <= (2e-7 + np.abs(x[::100]) * 1.2e-7) * expected).all()
    assert cpu._exp(np.float32(0)) == 1
    assert cpu._exp(np.float32(-np.inf)) == 0
    assert cpu._exp(np.float32(-100)) == 0
    assert np.isnan(cpu._exp(np.float32(np.nan)))


def good_metadata() -> MetadataTuple:
    return metadata_of([(range(3), [0, 1]), ([3, 4], [1])], [[0], [1, 2]], 2, 16)


def test_good_metadata_pass() -> None:
    metadata = good_metadata()
    cpu.check_indices(metadata, 5, 2)
    # Other producers pad with -1, which no vnode reads.
    padded = np.append(metadata.vnode_to_kv_entries, np.full(32, -1, np.int32))
    cpu.check_indices(metadata._replace(vnode_to_kv_entries=padded), 5, 2)


@pytest.mark.parametrize(
    ("name", "index", "value"),
    [
        ("vnode_to_kv_entries", 4, 5),
        ("vnode_to_kv_entries", 0, -1),
        ("vnode_to_kv_offs", 1, -1),
        ("vnode_to_kv_offs", 1, 4),
        ("vnode_to_kv_lens", 1, 3),
        ("vnode_to_kv_lens", 0, -1),
        ("vnode_to_kv_lens", 0, 2**31 - 1),
        ("vnode_to_q_entries", 2, 2),
        ("vnode_to_q_entries", 2, -2),
        ("vnode_to_q_offs", 0, -1),
        ("vnode_to_q_offs", 1, 3),
        ("vnode_to_q_lens", 1, 2),
        ("req_to_vnode_entries", 1, 3),
        ("req_to_vnode_entries", 1, -1),
        ("req_to_vnode_offs", 1, 2),
        ("req_to_vnode_lens", 1, 3),
    ],
)
def test_bad_index_is_named(name: str, index: int, value: int) -> None:
    metadata = good_metadata()
    getattr(metadata, name)[index] = value
    with pytest.raises(ValueError, match=rf"{name}\[{index}\] is {value}"):
        cpu.check_indices(metadata, 5, 2)
