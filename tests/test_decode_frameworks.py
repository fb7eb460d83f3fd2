"""fasttree_decode with NumPy, CuPy, torch and JAX: right results in the caller's memory, on the caller's stream."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.execution import arrays
from fasttree_cupy.execution.streams import ForeignStream, use_stream
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree
from tests.reference import dense_attention
from tests.tolerances import assert_close

ROOT = Path(__file__).resolve().parent.parent
TREE = KVTree.from_levels([1, 3, 12], [70, 40, 20])
HEADS, KV_HEADS, DIM = 8, 2, 64
SCALE = DIM**-0.5
Q_SHAPE, KV_SHAPE = (TREE.batch_size, HEADS, DIM), (TREE.unique_tokens, KV_HEADS, DIM)
DTYPES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}

both_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def values(dtype: str, seed: int = 0) -> list[Any]:
    """Q, K and V on the host."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape, np.float32).astype(DTYPES[dtype]) for shape in (Q_SHAPE, KV_SHAPE, KV_SHAPE)]


def expected(q: Any, k: Any, v: Any) -> Any:
    return dense_attention(TREE.parent, TREE.seqlen, TREE.request_node, q, k, v, SCALE)[0]


def prepared(place: str) -> tuple[MetadataTuple, FastTreeParams]:
    params = FastTreeParams.for_gpu("H100", HEADS // KV_HEADS)
    metadata, _ = fasttree_preparation(
        TREE, TREE.kv_ptrs, TREE.batch_size, HEADS, KV_HEADS, DIM, [64, 16], [0, 0], [0, 0], params,
        device=place, verbose=False,
    )  # fmt: skip
    assert min(metadata.phase_node_nums) > 0, "both phases are to be met"
    return metadata, params


@dataclass(frozen=True)
class Kind:
    """One framework's arrays on one device."""

    framework: str
    place: str
    module: Any

    def put(self, host: Any) -> Any:
        """A 16-bit host array's values, in memory of their own."""
        if self.framework == "numpy":
            return host.copy()
        if self.framework == "cupy":
            return self.module.asarray(host)
        if self.framework == "jax":
            backend = "gpu" if self.place == "cuda" else "cpu"
            return self.module.device_put(host, self.module.local_devices(backend=backend)[0])
        bits = self.module.from_numpy(host.view(np.int16).copy())
        return bits.view(getattr(self.module, host.dtype.name)).to(self.place)

    def nans(self, dtype: str) -> Any:
        """An output that holds nothing yet."""
        return self.put(np.full(Q_SHAPE, np.nan, DTYPES[dtype]))

    def pointer(self, array: Any) -> int:
        if self.framework == "torch":
            return int(array.data_ptr())
        if self.framework == "jax":
            return int(array.unsafe_buffer_pointer())
        return int(array.data.ptr if self.framework == "cupy" else array.ctypes.data)

    def host(self, array: Any) -> Any:
        if self.framework == "torch":
            return array.float().cpu().numpy()
        return array.get() if self.framework == "cupy" else np.asarray(array)

    def place_of(self, array: Any) -> Any:
        return array.devices() if self.framework == "jax" else getattr(array, "device", None)


WRITABLE = [
    pytest.param(("numpy", "cpu"), id="numpy-cpu"),
    pytest.param(("torch", "cpu"), id="torch-cpu"),
    pytest.param(("cupy", "cuda"), id="cupy-cuda", marks=pytest.mark.gpu),
    pytest.param(("torch", "cuda"), id="torch-cuda", marks=pytest.mark.gpu),
]
IMMUTABLE = [
    pytest.param(("jax", "cpu"), id="jax-cpu"),
    pytest.param(("jax", "cuda"), id="jax-cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(params=WRITABLE + IMMUTABLE)
def kind(request: pytest.FixtureRequest) -> Kind:
    return make_kind(*request.param, request)


@pytest.fixture(params=WRITABLE)
def writable_kind(request: pytest.FixtureRequest) -> Kind:
    return make_kind(*request.param, request)


def make_kind(framework: str, place: str, request: pytest.FixtureRequest) -> Kind:
    module = np if framework == "numpy" else request.getfixturevalue(framework)
    if place == "cuda" and framework == "torch" and not module.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    if place == "cuda" and framework == "jax":
        try:
            module.local_devices(backend="gpu")
        except RuntimeError as error:
            pytest.skip(f"this JAX sees no GPU ({error})")
    return Kind(framework, place, module)


@both_dtypes
def test_o_is_written_in_place(writable_kind: Kind, dtype: str) -> None:
    kind = writable_kind
    metadata, params = prepared(kind.place)
    host = values(dtype)
    o = kind.nans(dtype)
    pointer = kind.pointer(o)
    arguments = [kind.put(value) for value in host]
    assert fasttree_decode(*arguments, o, *metadata, params.TSQs, params.TSKs, SCALE) is None
    assert kind.pointer(o) == pointer
    assert_close(kind.host(o), expected(*host), DTYPES[dtype])


@both_dtypes
def test_a_part_of_the_callers_array_is_written(writable_kind: Kind, dtype: str) -> None:
    """o as a view: the memory around it stays, what it is a view of sees the result."""
    kind = writable_kind
    metadata, params = prepared(kind.place)
    host = values(dtype)
    wide = kind.put(np.full((TREE.batch_size, HEADS + 2, DIM), 7, DTYPES[dtype]))
    arguments = [kind.put(value) for value in host]
    fasttree_decode(*arguments, wide[:, 1:-1], *metadata, params.TSQs, params.TSKs, SCALE)
    written = kind.host(wide)
    assert_close(written[:, 1:-1], expected(*host), DTYPES[dtype])
    assert (written[:, [0, -1]] == 7).all()


@both_dtypes
def test_keys_and_values_side_by_side(kind: Kind, dtype: str) -> None:
    """K and V as slices of one cache, (tokens, 2, heads, head_dim)."""
    metadata, params = prepared(kind.place)
    q, k, v = values(dtype)
    cache = kind.put(np.stack([k, v], 1))
    o = fasttree_decode(kind.put(q), cache[:, 0], cache[:, 1], None, *metadata, params.TSQs, params.TSKs, SCALE)
    assert_close(kind.host(o), expected(q, k, v), DTYPES[dtype])


@both_dtypes
def test_new_output_is_of_the_callers_kind(kind: Kind, dtype: str) -> None:
    metadata, params = prepared(kind.place)
    host = values(dtype)
    q, k, v = (kind.put(value) for value in host)
    o = fasttree_decode(q, k, v, None, *metadata, params.TSQs, params.TSKs, SCALE)
    assert type(o) is type(q)
    assert (o.dtype, tuple(o.shape), kind.place_of(o)) == (q.dtype, Q_SHAPE, kind.place_of(q))
    assert_close(kind.host(o), expected(*host), DTYPES[dtype])


@both_dtypes
def test_new_output_is_the_memory_that_was_written(kind: Kind, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []

    def spy(*arguments: Any) -> Any:
        made = empty(*arguments)
        written.append(arrays.view("o", made).pointer)
        return made

    empty = arrays.empty
    monkeypatch.setattr(arrays, "empty", spy)
    metadata, params = prepared(kind.place)
    host = values(dtype)
    o = fasttree_decode(*map(kind.put, host), None, *metadata, params.TSQs, params.TSKs, SCALE)
    assert [kind.pointer(o)] == written
    gc.collect()
    assert_close(kind.host(o), expected(*host), DTYPES[dtype])


@both_dtypes
def test_both_call_forms(kind: Kind, dtype: str) -> None:
    metadata, params = prepared(kind.place)
    q, k, v = map(kind.put, values(dtype))
    in_place = fasttree_decode(q, k, v, None, *metadata, params.TSQs, params.TSKs, SCALE, -1)
    by_name = fasttree_decode(
        q=q,
        k_buffer=k,
        v_buffer=v,
        o=None,
        *metadata,  # noqa: B026  # as the API reference writes it
        phase_q_tile_sizes=params.TSQs,
        phase_kv_tile_sizes=params.TSKs,
        sm_scale=SCALE,
        logit_cap=-1,
    )
    assert kind.host(in_place).tobytes() == kind.host(by_name).tobytes()


@both_dtypes
@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_metadata_as_torch_tensors(place: str, dtype: str, request: pytest.FixtureRequest) -> None:
    kind = make_kind("torch", place, request)
    metadata, params = prepared(place)
    metadata.mid_o.fill(np.nan)
    tensors = MetadataTuple._make([*map(kind.module.from_dlpack, metadata[:11]), *metadata[11:]])
    host = values(dtype)
    o = kind.nans(dtype)
    fasttree_decode(*map(kind.put, host), o, *tensors, params.TSQs, params.TSKs, SCALE)
    assert_close(kind.host(o), expected(*host), DTYPES[dtype])
    assert kind.module.isfinite(tensors.mid_o).all(), "the tensor's own memory was written"


@both_dtypes
@pytest.mark.parametrize(
    ("frameworks", "place"),
    [
        (("torch", "numpy", "jax"), "cpu"),
        (("jax", "torch", "numpy"), "cpu"),
        pytest.param(("torch", "cupy", "jax"), "cuda", marks=pytest.mark.gpu),
        pytest.param(("cupy", "jax", "torch"), "cuda", marks=pytest.mark.gpu),
    ],
)
def test_frameworks_mix(frameworks: tuple[str, ...], place: str, dtype: str, request: pytest.FixtureRequest) -> None:
    kinds = [make_kind(framework, place, request) for framework in frameworks]
    metadata, params = prepared(place)
    host = values(dtype)
    arguments = [each.put(value) for each, value in zip(kinds, host, strict=True)]
    o = fasttree_decode(*arguments, None, *metadata, params.TSQs, params.TSKs, SCALE)
    assert type(o) is type(arguments[0])
    assert_close(kinds[0].host(o), expected(*host), DTYPES[dtype])


NUMPY_ALONE = """
import sys
import numpy as np
import fasttree_cupy as ft

tree = ft.KVTree.from_levels([1, 2], [8, 4])
q, _, _, _, k, v, ptrs = ft.qkv_preparation(tree, 4, 2, 16, "cpu", "bfloat16")
params = ft.FastTreeParams(kv_group_num=2)
heads = (4, 2, 16, [1024, 128], [132, 528], [132, 132])
metadata, _ = ft.fasttree_preparation(tree, ptrs, 2, *heads, params, device="cpu", verbose=False)
o = np.full_like(q, np.nan)
ft.fasttree_decode(q, k, v, o, *metadata, params.TSQs, params.TSKs, 0.25)
assert np.isfinite(o.astype(np.float32)).all()
assert type(ft.fasttree_decode(q, k, v, None, *metadata, params.TSQs, params.TSKs, 0.25)) is np.ndarray
print(*sorted({"torch", "jax", "jaxlib", "cupy"} & set(sys.modules)))
"""


def test_numpy_arrays_load_no_framework() -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-W", "error", "-c", NUMPY_ALONE]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


# Streams and graphs, on GPU 0. The streams here do not wait for the default stream by themselves.

SPIN = r"""
extern "C" __global__
void spin(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""
CYCLES = 400_000_000  # about 200 ms: far longer than a call takes on the host


@cache
def spin_kernel() -> Any:
    import cupy

    kernel = cupy.RawKernel(SPIN, "spin")
    kernel((1,), (1,), (np.int64(1),))  # compiles
    return kernel


@pytest.fixture
def spin(cupy: Any) -> Callable[[int], None]:
    """Occupies a stream, given by its handle: what is queued behind comes late."""

    def occupy(handle: int) -> None:
        with use_stream(handle, 0):
            kernel((1,), (1,), (np.int64(CYCLES),))

    kernel = spin_kernel()
    return occupy


def is_done(cupy: Any, handle: int) -> bool:
    return bool(cupy.cuda.Stream.from_external(ForeignStream(handle)).done)


@dataclass
class Job:
    """A decode on the GPU whose kernels are compiled and loaded, and whose output is NaN again."""

    kind: Kind
    q: Any
    k: Any
    v: Any
    o: Any
    metadata: MetadataTuple
    params: FastTreeParams
    host: list[Any]

    def run(self, **options: Any) -> Any:
        p = self.params
        return fasttree_decode(self.q, self.k, self.v, self.o, *self.metadata, p.TSQs, p.TSKs, SCALE, **options)

    def new_queries(self, seed: int) -> tuple[Any, Any]:
        """Other contents for q, on the device, and the result they lead to."""
        q = values(self.host[0].dtype.name, seed)[0]
        return self.kind.put(q), expected(q, *self.host[1:])

    def check(self, right: Any) -> None:
        assert_close(self.kind.host(self.o), right, self.host[0].dtype)


def make_job(kind: Kind, cupy: Any, dtype: str = "float16") -> Job:
    host = values(dtype)
    metadata, params = prepared("cuda")
    o = None if kind.framework == "jax" else kind.nans(dtype)
    job = Job(kind, *map(kind.put, host), o, metadata, params, host)
    job.run()
    if o is not None:
        job.o = kind.nans(dtype)
    cupy.cuda.Device(0).synchronize()
    return job


@pytest.fixture
def torch_job(cupy: Any, request: pytest.FixtureRequest) -> Job:
    return make_job(make_kind("torch", "cuda", request), cupy)


@pytest.fixture
def cupy_job(cupy: Any) -> Job:
    return make_job(Kind("cupy", "cuda", cupy), cupy)


@pytest.mark.gpu
def test_torchs_current_stream(torch: Any, torch_job: Job, spin: Callable[[int], None]) -> None:
    """Decode comes after work queued on the stream before, and the host does not wait."""
    queries, right = torch_job.new_queries(1)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        spin(stream.cuda_stream)
        torch_job.q.copy_(queries)
        torch_job.run()
        assert not stream.query(), "the host waited"
    stream.synchronize()
    torch_job.check(right)


@pytest.mark.gpu
def test_cupys_current_stream(cupy: Any, cupy_job: Job, spin: Callable[[int], None]) -> None:
    queries, right = cupy_job.new_queries(1)
    cupy.cuda.Device(0).synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        spin(stream.ptr)
        cupy_job.q.data.copy_from_device_async(queries.data, queries.nbytes)
        cupy_job.run()
        assert not stream.done, "the host waited"
    stream.synchronize()
    cupy_job.check(right)


class Protocol:
    """A foreign stream object."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self.handle)


class OldProtocol:
    """What torch's streams were before ``__cuda_stream__``."""

    def __init__(self, handle: int) -> None:
        self.cuda_stream = handle


def bits_on_another_stream(cupy: Any, o: Any) -> Any:
    """The output as it is now."""
    now = np.empty(Q_SHAPE, np.float16)
    stream = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.runtime.memcpyAsync(now.ctypes.data, o.data.ptr, now.nbytes, 2, stream.ptr)  # 2: device to host
    stream.synchronize()
    return now


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["int", "cupy", "torch", "protocol", "old protocol"])
def test_given_stream(
    cupy: Any, cupy_job: Job, spin: Callable[[int], None], form: str, request: pytest.FixtureRequest
) -> None:
    """The work runs on the stream given, behind what is queued there."""
    stream = cupy.cuda.Stream(non_blocking=True)
    handle = stream.ptr
    given: Any = {"int": handle, "cupy": stream, "protocol": Protocol(handle), "old protocol": OldProtocol(handle)}.get(
        form
    )
    if form == "torch":
        given = make_kind("torch", "cuda", request).module.cuda.Stream()
        handle = given.cuda_stream
    spin(handle)
    cupy_job.run(stream=given)
    assert not is_done(cupy, handle), "the host waited"
    assert np.isnan(bits_on_another_stream(cupy, cupy_job.o)).all(), "the work did not run on the stream given"
    cupy.cuda.runtime.streamSynchronize(handle)
    cupy_job.check(expected(*cupy_job.host))


@pytest.mark.gpu
def test_given_stream_waits_for_the_callers(cupy: Any, cupy_job: Job, spin: Callable[[int], None]) -> None:
    """Inputs still being made on the current stream are waited for, on the GPU."""
    queries, right = cupy_job.new_queries(1)
    cupy.cuda.Device(0).synchronize()
    current, given = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    with current:
        spin(current.ptr)
        cupy_job.q.data.copy_from_device_async(queries.data, queries.nbytes)
        cupy_job.run(stream=given)
        assert not current.done, "the host waited"
    given.synchronize()
    cupy_job.check(right)


@pytest.mark.gpu
def test_jax_inputs_are_held_until_they_were_read(
    cupy: Any, spin: Callable[[int], None], request: pytest.FixtureRequest
) -> None:
    """The host does not wait; arrays dropped right after the call stay until the kernels are done with them."""
    kind = make_kind("jax", "cuda", request)
    job = make_job(kind, cupy)
    right = expected(*job.host)
    stream = cupy.cuda.Stream(non_blocking=True)
    spin(stream.ptr)
    o = job.run(stream=stream)
    waited = stream.done
    job.q = job.k = job.v = None
    gc.collect()
    others = [kind.put(np.full(shape, -1, np.float16)) + 1 for shape in (Q_SHAPE, KV_SHAPE, KV_SHAPE) * 10]
    assert_close(kind.host(o), right, np.float16)
    assert not waited, "the host waited"
    del others


@pytest.mark.gpu
@both_dtypes
def test_torch_cuda_graph(torch: Any, cupy: Any, dtype: str, request: pytest.FixtureRequest) -> None:
    job = make_job(make_kind("torch", "cuda", request), cupy, dtype)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job.run()
    assert torch.isnan(job.o).all(), "capturing runs nothing"
    for seed in (1, 2):
        queries, right = job.new_queries(seed)
        job.q.copy_(queries)
        job.o.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        job.check(right)


@pytest.mark.gpu
@both_dtypes
def test_cupy_stream_capture(cupy: Any, dtype: str) -> None:
    job = make_job(Kind("cupy", "cuda", cupy), cupy, dtype)
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        job.run()
        graph = stream.end_capture()
    for seed in (1, 2):
        queries, right = job.new_queries(seed)
        nothing = job.kind.nans(dtype)
        cupy.cuda.Device(0).synchronize()
        with stream:
            job.q.data.copy_from_device_async(queries.data, queries.nbytes)
            job.o.data.copy_from_device_async(nothing.data, nothing.nbytes)
            graph.launch(stream)
        stream.synchronize()
        job.check(right)
