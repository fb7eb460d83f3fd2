"""torch, JAX and CuPy: the pointers are the frameworks' own, streams are kept in order."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.execution.arrays import (
    DTYPES,
    address_of_alike,
    as_numpy,
    device_of,
    empty,
    framework_of,
    hand_back,
    view,
)
from fasttree_cupy.execution.streams import WorkStream, keep_alive, record_event, stream_handle, use_stream

CPU = ("cpu", 0)
SHAPE = (3, 4, 8)
BOTH = pytest.mark.parametrize("dtype", ["float16", "bfloat16"])


@pytest.fixture
def jax_cpu(jax: Any) -> Any:
    return jax.local_devices(backend="cpu")[0]


def numbers(dtype: str) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(SHAPE)).reshape(SHAPE).astype(DTYPES[dtype])


def torch_numbers(torch: Any, dtype: str, device: str = "cpu") -> Any:
    return torch.arange(np.prod(SHAPE)).reshape(SHAPE).to(getattr(torch, dtype)).to(device)


# torch on the CPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_is_read_in_place(torch: Any, dtype: str) -> None:
    tensor = torch_numbers(torch, dtype)
    seen = view("q", tensor)
    assert seen[:7] == (tensor.data_ptr(), SHAPE, (32, 8, 1), dtype, CPU, True, "torch")
    assert type(seen.shape) is tuple
    assert device_of("q", tensor) == CPU
    array = as_numpy(seen)
    assert array.ctypes.data == tensor.data_ptr()
    np.testing.assert_array_equal(array, numbers(dtype))


@BOTH
def test_torch_strides(torch: Any, dtype: str) -> None:
    tensor = torch_numbers(torch, dtype)
    for part in (tensor[1:, ::2, 3:], tensor.transpose(0, 2), tensor[:, 1], tensor[None, 0].expand(5, 4, 8)):
        seen = view("q", part)
        assert (seen.pointer, seen.shape, seen.strides) == (part.data_ptr(), tuple(part.shape), part.stride())
        np.testing.assert_array_equal(as_numpy(seen).astype(np.float32), part.float().numpy())


@BOTH
def test_what_is_written_is_the_callers(torch: Any, dtype: str) -> None:
    tensor = torch.zeros(SHAPE, dtype=getattr(torch, dtype))
    as_numpy(view("o", tensor[:, 1:3]))[...] = 2
    assert tensor.sum() == 2 * 3 * 2 * 8
    assert (tensor[:, 1:3] == 2).all()


@BOTH
def test_torch_memory_lives_as_long_as_the_array(torch: Any, dtype: str) -> None:
    tensor = torch_numbers(torch, dtype)
    alive = weakref.ref(tensor)
    array = as_numpy(view("q", tensor))[1:]
    del tensor
    gc.collect()
    _ = [torch.full(SHAPE, -1, dtype=getattr(torch, dtype)) for _ in range(50)]
    np.testing.assert_array_equal(array, numbers(dtype)[1:])
    del array
    gc.collect()
    assert alive() is None


def test_torch_empty_tensor(torch: Any) -> None:
    seen = view("q", torch.zeros(0, 4, dtype=torch.bfloat16))
    assert as_numpy(seen).shape == seen.shape == (0, 4)


def test_torch_parameter_is_a_tensor(torch: Any) -> None:
    parameter = torch.nn.Parameter(torch.zeros(4, dtype=torch.float16), requires_grad=False)
    assert view("q", parameter).framework == framework_of(parameter) == "torch"


def test_torch_refusals(torch: Any) -> None:
    with pytest.raises(TypeError, match=r"^q: the tensor requires grad, detach it first"):
        view("q", torch.zeros(4, requires_grad=True))
    with pytest.raises(TypeError, match=r"^q: a dense tensor is needed, got layout torch.sparse_coo"):
        view("q", torch.zeros(4, 4).to_sparse())
    with pytest.raises(TypeError, match=r"^q: dtype float64 is not supported"):
        view("q", torch.zeros(4, dtype=torch.float64))
    for look in (view, device_of):
        with pytest.raises(ValueError, match=r"^q: device meta is not supported"):
            look("q", torch.zeros(4, device="meta"))


def nested(torch: Any) -> Any:
    """Two tensors of different lengths in one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a prototype
        return torch.nested.nested_tensor([torch.zeros(2, 4), torch.zeros(3, 4)])


def test_torch_tensors_without_memory_of_their_own_are_refused(torch: Any) -> None:
    again = address_of_alike(torch.zeros(4, 8))
    assert again is not None

    def refused(tensor: Any) -> None:
        with pytest.raises(TypeError, match=r"^q: expected an array that shows its memory, got Tensor: "):
            view("q", tensor)
        assert again(tensor) is None

    def batched(tensor: Any) -> Any:
        refused(tensor)
        return tensor

    refused(nested(torch))
    torch.vmap(batched)(torch.zeros(3, 4, 8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty_for_torch(torch: Any, dtype: str) -> None:
    like = view("q", torch_numbers(torch, "float16"))
    made = empty((5, 6), dtype, like)
    assert (made.dtype, tuple(made.shape), made.device.type) == (getattr(torch, dtype), (5, 6), "cpu")
    assert made.is_contiguous()
    assert hand_back(made, like) is made


# JAX on the CPU


@pytest.mark.parametrize("dtype", DTYPES)
def test_jax_is_read_in_place_and_read_only(jax: Any, jax_cpu: Any, dtype: str) -> None:
    array = jax.device_put(numbers(dtype), jax_cpu)
    seen = view("q", array)
    assert seen[:7] == (array.unsafe_buffer_pointer(), SHAPE, (32, 8, 1), dtype, CPU, False, "jax")
    assert device_of("q", array) == CPU
    assert view("q", array, WorkStream(1234, 0)).pointer == seen.pointer  # streams are nothing to the CPU
    assert not as_numpy(seen).flags.writeable
    np.testing.assert_array_equal(as_numpy(seen), numbers(dtype))


@BOTH
def test_jax_memory_lives_as_long_as_the_array(jax: Any, jax_cpu: Any, dtype: str) -> None:
    array = jax.device_put(numbers(dtype), jax_cpu) + 1
    seen = as_numpy(view("q", array))
    del array
    gc.collect()
    _ = [jax.device_put(np.full(SHAPE, -1, DTYPES[dtype]), jax_cpu) * 1 for _ in range(50)]
    np.testing.assert_array_equal(seen, numbers(dtype) + DTYPES[dtype].type(1))


def test_jax_array_still_being_computed(jax: Any, jax_cpu: Any) -> None:
    ones = jax.device_put(np.ones((1500, 1500), np.float32), jax_cpu)
    seen = as_numpy(view("q", ones @ ones))
    np.testing.assert_array_equal(seen, np.full((1500, 1500), 1500, np.float32))


def test_jax_tracer_is_refused(jax: Any) -> None:
    def refused(x: Any) -> Any:
        for look in (view, device_of):
            with pytest.raises(TypeError, match=r"^q: .*[Tt]race"):
                look("q", x)
        return x

    for transform in (jax.jit, jax.vmap):
        transform(refused)(np.zeros((4, 8), np.float32))


@pytest.mark.parametrize("look", [view, device_of])
def test_deleted_jax_array_is_refused(jax: Any, look: Any) -> None:
    array = jax.numpy.zeros(4)
    array.delete()
    with pytest.raises(TypeError, match=r"^q: the array was deleted or donated, expected a live one"):
        look("q", array)


@pytest.mark.parametrize("dtype", DTYPES)
def test_hand_back_to_jax_copies_nothing(jax: Any, jax_cpu: Any, dtype: str) -> None:
    like = view("q", jax.device_put(numbers("float16"), jax_cpu))
    made = empty(SHAPE, dtype, like)
    made[...] = numbers(dtype)
    pointer = made.ctypes.data
    result = hand_back(made, like)
    del made
    gc.collect()
    assert isinstance(result, jax.Array)
    assert (result.unsafe_buffer_pointer(), result.dtype) == (pointer, DTYPES[dtype])
    np.testing.assert_array_equal(np.asarray(result), numbers(dtype))


# CuPy, as far as it goes without a GPU


@BOTH
def test_cupy_array_is_not_touched(cupy: Any, dtype: str) -> None:
    memory = cupy.cuda.UnownedMemory(4096, 1024, None, 0)  # an address, nothing behind it
    array = cupy.ndarray(SHAPE, DTYPES[dtype], cupy.cuda.MemoryPointer(memory, 16))
    assert view("q", array)[:7] == (4112, SHAPE, (32, 8, 1), dtype, ("cuda", 0), True, "cupy")
    assert view("q", array[1:, ::-1].transpose(2, 0, 1))[:3] == (4224, (8, 2, 4), (1, 32, -8))
    assert device_of("q", array) == ("cuda", 0)
    assert framework_of(array) == "cupy"


def test_errors_of_cuda_are_not_the_arrays(cupy: Any) -> None:
    class Broken(WorkStream):
        def follow(self, framework: str) -> None:
            raise RuntimeError(f"CUDA failed while {framework} was followed")

    memory = cupy.cuda.UnownedMemory(4096, 1024, None, 0)
    array = cupy.ndarray(SHAPE, np.float16, cupy.cuda.MemoryPointer(memory, 0))
    with pytest.raises(RuntimeError, match=r"^CUDA failed while cupy was followed"):
        view("q", array, Broken(1234, 0))


# CUDA. All on GPU 0, on streams that do not wait for the default stream by themselves.

# Occupies its stream for a while before it stores: whoever does not wait reads what was there before.
SPIN_THEN_FILL = r"""
extern "C" __global__
void spin_then_fill(unsigned short* target, int count, unsigned short bits, long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
    for (int i = 0; i < count; ++i) target[i] = bits;
}
"""
CYCLES = 100_000_000  # about 50 ms
COUNT = int(np.prod(SHAPE))
ONE = {"float16": 0x3C00, "bfloat16": 0x3F80}  # the bits of 1.0


@pytest.fixture
def worker(cupy: Any) -> Any:
    """The stream on which an array is going to be used."""
    return cupy.cuda.Stream(non_blocking=True)


@pytest.fixture
def torch_cuda(torch: Any) -> Any:
    if not torch.cuda.is_available():
        pytest.skip("this torch sees no GPU")
    return torch


@pytest.fixture
def jax_gpu(jax: Any) -> Any:
    try:
        return jax.local_devices(backend="gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX sees no GPU ({error})")


def spin_then_fill(cupy: Any, pointer: int, bits: int, stream: int, times: int = 1) -> None:
    kernel = cupy.RawKernel(SPIN_THEN_FILL, "spin_then_fill")
    arguments = (np.uint64(pointer), np.int32(COUNT), np.uint16(bits), np.int64(times * CYCLES))
    with use_stream(stream, 0):
        kernel((1,), (1,), arguments)


def bits_read_on(cupy: Any, stream: Any, pointer: int) -> list[int]:
    """The different bit patterns at `pointer`, copied on `stream`."""
    copy = np.zeros(COUNT, np.uint16)
    cupy.cuda.runtime.memcpyAsync(copy.ctypes.data, pointer, copy.nbytes, 2, stream.ptr)  # 2: device to host
    stream.synchronize()
    return np.unique(copy).tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_cupy_is_read_in_place(cupy: Any, dtype: str) -> None:
    array = cupy.asarray(numbers(dtype))
    seen = view("q", array)
    assert seen[:7] == (array.data.ptr, SHAPE, (32, 8, 1), dtype, ("cuda", 0), True, "cupy")
    assert device_of("q", array) == ("cuda", 0)
    part = array[1:, ::-1].transpose(2, 0, 1)
    seen = view("q", part)
    assert (seen.pointer, seen.shape, seen.strides) == (part.data.ptr, (8, 2, 4), (1, 32, -8))
    made = empty((5, 6), dtype, seen)
    assert isinstance(made, cupy.ndarray)
    assert (made.shape, made.dtype) == ((5, 6), DTYPES[dtype])
    assert hand_back(made, seen) is made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_torch_cuda_is_read_in_place(torch_cuda: Any, dtype: str) -> None:
    tensor = torch_numbers(torch_cuda, dtype, "cuda:0")
    seen = view("q", tensor)
    assert seen[:7] == (tensor.data_ptr(), SHAPE, (32, 8, 1), dtype, ("cuda", 0), True, "torch")
    assert device_of("q", tensor) == ("cuda", 0)
    part = tensor[:, 1::2].transpose(0, 2)
    seen = view("q", part)
    assert (seen.pointer, seen.strides) == (part.data_ptr(), part.stride())
    made = empty((5, 6), dtype, seen)
    assert (made.device, made.dtype) == (tensor.device, tensor.dtype)
    assert hand_back(made, seen) is made


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32"])
def test_jax_cuda_is_read_in_place(jax: Any, jax_gpu: Any, dtype: str) -> None:
    array = jax.device_put(numbers(dtype), jax_gpu)
    seen = view("q", array, WorkStream(0, 0))
    assert seen[:7] == (array.unsafe_buffer_pointer(), SHAPE, (32, 8, 1), dtype, ("cuda", 0), False, "jax")
    assert device_of("q", array) == ("cuda", 0)


@pytest.mark.gpu
def test_current_stream_is_the_callers(cupy: Any, worker: Any) -> None:
    assert stream_handle(None, "cupy", 0) == stream_handle(None, "jax", 0) == cupy.cuda.get_current_stream().ptr
    with worker:
        assert stream_handle(None, "cupy", 0) == stream_handle(None, "jax", 0) == worker.ptr
    assert stream_handle(worker, "cupy", 0) == stream_handle(worker.ptr, "jax", 0) == worker.ptr
    with use_stream(worker.ptr, 0):
        assert stream_handle(cupy.cuda.get_current_stream(), "cupy", 0) == worker.ptr


@pytest.mark.gpu
def test_current_stream_is_torchs_for_tensors(torch_cuda: Any, worker: Any) -> None:
    stream = torch_cuda.cuda.Stream()
    with worker:  # CuPy's current stream is nothing to torch's tensors
        assert stream_handle(None, "torch", 0) == torch_cuda.cuda.current_stream().cuda_stream
        with torch_cuda.cuda.stream(stream):
            assert stream_handle(None, "torch", 0) == stream.cuda_stream
    assert stream_handle(stream, "torch", 0) == stream_handle(stream, "cupy", 0) == stream.cuda_stream


@pytest.mark.gpu
@BOTH
def test_given_stream_waits_for_cupy(cupy: Any, worker: Any, dtype: str) -> None:
    array = cupy.asarray(np.zeros(SHAPE, DTYPES[dtype]))
    cupy.cuda.Device().synchronize()
    producer = cupy.cuda.Stream(non_blocking=True)
    with producer:
        spin_then_fill(cupy, array.data.ptr, ONE[dtype], producer.ptr)
        seen = view("q", array, WorkStream(worker.ptr, 0))
    assert bits_read_on(cupy, worker, seen.pointer) == [ONE[dtype]]


@pytest.mark.gpu
@BOTH
def test_given_stream_waits_for_torch(cupy: Any, torch_cuda: Any, worker: Any, dtype: str) -> None:
    tensor = torch_cuda.zeros(SHAPE, dtype=getattr(torch_cuda, dtype), device="cuda:0")
    torch_cuda.cuda.synchronize()
    producer = torch_cuda.cuda.Stream()
    with torch_cuda.cuda.stream(producer):
        spin_then_fill(cupy, tensor.data_ptr(), ONE[dtype], producer.cuda_stream)
        seen = view("q", tensor, WorkStream(worker.ptr, 0))
    assert bits_read_on(cupy, worker, seen.pointer) == [ONE[dtype]]


@pytest.mark.gpu
@BOTH
def test_given_stream_waits_for_jax(cupy: Any, jax: Any, jax_gpu: Any, worker: Any, dtype: str) -> None:
    def slow_ones(x: Any) -> Any:
        for _ in range(20):
            x = x @ x
        return x[0, :COUNT].reshape(SHAPE) + 1

    zeros = jax.device_put(np.zeros((8192, 8192), DTYPES[dtype]), jax_gpu)
    compute = jax.jit(slow_ones)
    compute(zeros).block_until_ready()
    seen = view("q", compute(zeros), WorkStream(worker.ptr, 0))  # the result itself lives in the view alone
    assert bits_read_on(cupy, worker, seen.pointer) == [ONE[dtype]]


@pytest.mark.gpu
@BOTH
def test_hand_back_to_jax_on_cuda(cupy: Any, jax: Any, jax_gpu: Any, worker: Any, dtype: str) -> None:
    like = view("q", jax.device_put(numbers(dtype), jax_gpu), WorkStream(worker.ptr, 0))
    made = empty(SHAPE, dtype, like)
    pointer = made.data.ptr
    spin_then_fill(cupy, pointer, ONE[dtype], worker.ptr)
    with worker:
        result = hand_back(made, like)
    del made
    gc.collect()
    assert isinstance(result, jax.Array)
    assert (result.unsafe_buffer_pointer(), result.dtype) == (pointer, DTYPES[dtype])
    np.testing.assert_array_equal(np.asarray(result), np.ones(SHAPE, DTYPES[dtype]))


@pytest.mark.gpu
def test_borrowed_memory_is_held_until_the_stream_is_done(cupy: Any, worker: Any) -> None:
    class Owner:
        pass

    array = cupy.asarray(np.zeros(SHAPE, np.float16))
    spin_then_fill(cupy, array.data.ptr, 1, worker.ptr)  # compiles
    worker.synchronize()
    owner = Owner()
    alive = weakref.ref(owner)
    spin_then_fill(cupy, array.data.ptr, 1, worker.ptr)
    keep_alive(record_event(worker.ptr), [owner])
    del owner
    assert not worker.done
    assert alive() is not None
    worker.synchronize()
    keep_alive(record_event(worker.ptr), [])
    assert alive() is None


def test_lazily_negated_tensors_are_refused(torch: Any) -> None:
    negated = torch.zeros(4, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    with pytest.raises(TypeError, match="q: the tensor is negated lazily"):
        view("q", negated)


def test_malformed_stream_protocol_is_refused() -> None:
    class Stream:
        def __cuda_stream__(self) -> int:
            return 7

    with pytest.raises(TypeError, match="stream is"):
        stream_handle(Stream(), "cupy", 0)
