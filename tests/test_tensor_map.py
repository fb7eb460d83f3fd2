"""Tensor maps: what CUDA is asked for, when there are none, and runs that come by bulk copies or without."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import plan_kernels, tensor_map
from fasttree_cupy.execution.arrays import ArrayView
from tests.test_repeat import LAYOUT, TREE, FakeCuda, tensors
from tests.test_serving import expected, namespace
from tests.tolerances import assert_close


@pytest.fixture
def gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(cupy, monkeypatch)


@pytest.fixture(autouse=True)
def no_maps_are_kept(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(tensor_map, "make_current", lambda _device: None)
    caches = tensor_map._tensor_map, tensor_map._pair
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


class Encoder:
    """Stands for cuTensorMapEncodeTiled: fills maps with a byte of the address, and remembers what it was asked."""

    def __init__(self, error: int = 0) -> None:
        self.error = error
        self.asked: list[dict[str, Any]] = []

    def __call__(
        self, to: Any, kind: int, rank: int, at: Any, sizes: Any, strides: Any, box: Any, steps: Any, *modes: int
    ) -> int:
        assert to.value % 64 == 0
        assert rank == len(sizes) == len(box) == len(steps) == len(strides) + 1
        self.asked.append(
            {"kind": kind, "at": at.value, "sizes": [*sizes], "strides": [*strides], "box": [*box], "modes": modes}
        )
        ctypes.memset(to.value, at.value >> 8 & 0xFF, tensor_map.TENSOR_MAP_BYTES)
        return self.error


def encode_with(encoder: Encoder | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_map, "_encoder", lambda: encoder)


def rows(
    pointer: int, heads: int = 2, head_dim: int = 128, dtype: str = "float16", strides: tuple[int, int] | None = None
) -> ArrayView:
    strides = (heads * head_dim, head_dim) if strides is None else strides
    return ArrayView(pointer, (9, heads, head_dim), (*strides, 1), dtype, ("cuda", 0), False, "cupy", None)


@pytest.mark.parametrize(
    ("dtype", "kind", "box"), [("float16", 1, 64), ("bfloat16", 1, 64), ("float8_e4m3fn", 0, 128)], ids=str
)
def test_a_box_is_16_tokens_of_128_bytes(dtype: str, kind: int, box: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder()
    encode_with(encoder, monkeypatch)
    size = 2 if box == 64 else 1
    maps = tensor_map.tensor_maps(rows(0x1100, dtype=dtype), rows(0x2200, dtype=dtype, strides=(128, 4096)))
    assert maps is not None
    k, v = encoder.asked
    assert (k["at"], v["at"]) == (0x1100, 0x2200)
    assert k["kind"] == kind
    assert k["box"] == v["box"] == [box, 1, 16]
    assert k["sizes"][:2] == [128, 2]
    assert (k["strides"], v["strides"]) == ([128 * size, 256 * size], [4096 * size, 128 * size])
    assert maps(0x1100, 0x2200) == b"\x11" * 128 + b"\x22" * 128
    assert len(encoder.asked) == 2  # kept
    assert maps(0x3300, 0x2200) == b"\x33" * 128 + b"\x22" * 128
    assert len(encoder.asked) == 3


@pytest.mark.parametrize(
    ("k", "error"),
    [
        (rows(0x1000, head_dim=64, dtype="float8_e5m2"), 0),
        (rows(0x1000, strides=(256, -128)), 0),
        (rows(0x1000), 1),
    ],
    ids=["rows of 64 bytes", "heads backwards", "refused by CUDA"],
)
def test_what_has_no_tensor_map(k: ArrayView, error: int, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_with(Encoder(error), monkeypatch)
    assert tensor_map.tensor_maps(k, k) is None


def test_without_a_driver_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    encode_with(None, monkeypatch)
    assert tensor_map.tensor_maps(rows(0x1000), rows(0x1000)) is None


def test_what_was_refused_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(error=1)
    encode_with(encoder, monkeypatch)
    assert tensor_map.tensor_maps(rows(0x1100), rows(0x2200)) is None
    encoder.error = 0
    maps = tensor_map.tensor_maps(rows(0x1100), rows(0x2200))
    assert maps is not None
    encoder.error = 1
    with pytest.raises(RuntimeError, match=r"no tensor map for 0x3300, 2 heads, strides \[256, 512\]"):
        maps(0x1100, 0x3300)
    assert maps(0x1100, 0x2200) == b"\x11" * 128 + b"\x22" * 128


@pytest.mark.parametrize("context", [0, 0xC0])
def test_a_thread_without_a_context_gets_one(context: int, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.undo()
    monkeypatch.setattr(cupy.cuda.driver, "ctxGetCurrent", lambda: context)
    monkeypatch.setattr(cupy.cuda.runtime, "setDevice", made.append)
    tensor_map.make_current(3)
    assert made == ([] if context else [3])


def test_repeats_bring_maps_of_their_addresses(gpu: FakeCuda, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_with(Encoder(), monkeypatch)
    plan = ft.plan_decode(TREE, *LAYOUT)
    given = [tensors(torch) for _ in range(3)]
    for each in given:
        plan.run(**each)
    assert gpu.hows == ["anew", "again", "again"]
    for each, (_, _, params) in zip(given, gpu.launches, strict=True):
        assert params["bulk"] == 1
        for name in ("k", "v"):
            word = int.from_bytes(bytes([each[name].data_ptr() >> 8 & 0xFF]) * 8, "little")
            assert {int(params[f"{name}_map_{i}"]) for i in range(16)} == {word}


def test_runs_without_maps_say_so(gpu: FakeCuda, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_with(None, monkeypatch)
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    for _ in range(2):
        plan.run(**given)
    assert [int(params["bulk"]) for _, _, params in gpu.launches] == [0, 0]
    assert not any(gpu.launches[1][2][f"k_map_{i}"] for i in range(16))


Place = Callable[[np.random.Generator, int], np.ndarray[Any, Any]]
PLACES: dict[str, Place] = {
    "in order": lambda _, tokens: np.arange(tokens),
    "anywhere": lambda rng, tokens: rng.permutation(tokens),
    "pages of 16": lambda rng, tokens: (rng.permutation(-(-tokens // 16))[:, None] * 16 + np.arange(16)).ravel()[
        :tokens
    ],
    "pages of 24": lambda rng, tokens: (rng.permutation(-(-tokens // 24))[:, None] * 24 + np.arange(24)).ravel()[
        :tokens
    ],
    "backwards": lambda _, tokens: np.arange(tokens)[::-1],
}


@pytest.mark.gpu
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("heads", [(4, 4), (16, 1), (64, 1)], ids=str)
@pytest.mark.parametrize("kv_dtype", [None, ml_dtypes.float8_e4m3fn], ids=["float16", "float8"])
@pytest.mark.parametrize("pool", ["NHD", "HND"])
def test_bulk_copies_bring_what_other_copies_do(
    place: str, head_dim: int, heads: tuple[int, int], kv_dtype: Any, pool: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = namespace("gpu")
    rng = np.random.default_rng(7)
    tree = ft.KVTree.from_levels([1, 3, 12, 50], [300, 47, 16, 21])
    indices = PLACES[place](rng, tree.unique_tokens).astype(np.int32)
    pool_rows = int(indices.max()) + 1
    q = rng.standard_normal((tree.batch_size, heads[0], head_dim)).astype(np.float16)
    k, v = (rng.standard_normal((pool_rows, heads[1], head_dim)).astype(kv_dtype or np.float16) for _ in range(2))
    given = []
    for array in (k, v):
        placed = cupy.asarray(array.view(np.uint8) if kv_dtype else array)
        if pool == "HND":
            placed = cupy.ascontiguousarray(placed.transpose(1, 0, 2)).transpose(1, 0, 2)
        given.append(placed.view(kv_dtype) if kv_dtype else placed)
    outs, bulk = [], []
    made = plan_kernels.tensor_maps
    monkeypatch.setattr(plan_kernels, "tensor_maps", lambda *views: bulk.append(made(*views)) or bulk[-1])
    for encoder in (tensor_map._encoder, lambda: None):
        monkeypatch.setattr(tensor_map, "_encoder", encoder)
        for cache in (tensor_map._tensor_map, tensor_map._pair):
            cache.cache_clear()
        plan = ft.plan_decode(tree, *heads, head_dim, device="cuda", kv_indices=indices)
        outs.append(plan.run(cupy.asarray(q), *given, cupy.full(q.shape, np.nan, np.float16)).get())
    right = expected(tree, q, *(array[indices].astype(np.float64) for array in (k, v)))[0]
    assert_close(outs[0], right, np.float16)
    np.testing.assert_array_equal(outs[0].view(np.uint16), outs[1].view(np.uint16))
    if bulk:  # tree_decode_sm90 ran
        assert [maps is not None for maps in bulk] == [head_dim * k.itemsize >= tensor_map.BOX_BYTES, False]
