"""Arrays in without a copy: NumPy, the DLPack protocol byte by byte, and the choice of a stream."""

from __future__ import annotations

import ctypes
import gc
import struct
import subprocess
import sys
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.execution import dlpack
from fasttree_cupy.execution.arrays import DTYPES, as_numpy, device_of, empty, hand_back, view
from fasttree_cupy.execution.streams import WorkStream, stream_handle

CPU = ("cpu", 0)


class Producer:
    """An array of a framework nobody knows: DLPack 1.0 around a NumPy array, or a capsule of one's own."""

    def __init__(self, array: Any = None, capsule: Any = None, device: tuple[int, int] = (1, 0)) -> None:
        self.array, self.capsule, self.device = array, capsule, device
        self.asked: dict[str, Any] = {}

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.device

    def __dlpack__(self, **arguments: Any) -> Any:
        self.asked = arguments
        return self.capsule if self.array is None else self.array.__dlpack__(**arguments)


class OldProducer(Producer):
    """From before DLPack 1.0: no `max_version`, an unversioned capsule."""

    def __dlpack__(self, stream: int | None = None) -> Any:
        self.asked = {"stream": stream}
        return self.capsule if self.array is None else self.array.__dlpack__()


_new_capsule = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)(
    ("PyCapsule_New", ctypes.pythonapi)
)
_kept: list[Any] = []  # what handmade capsules point into


def handmade_capsule(
    dtype: tuple[int, int, int] = (2, 16, 1),
    device: tuple[int, int] = (1, 0),
    strides: tuple[int, ...] | None = (4, 1),
    byte_offset: int = 0,
    version: tuple[int, int] | None = None,
    flags: int = 0,
    name: bytes | None = None,
) -> Any:
    """A capsule over address 4096 of shape (3, 4), the structure written out field by field."""
    name = name or (b"dltensor" if version is None else b"dltensor_versioned")
    shape = (ctypes.c_int64 * 2)(3, 4)
    step = (ctypes.c_int64 * 2)(*strides) if strides else None
    tensor = struct.pack(
        "=QiiiBBHQQQ",
        4096,
        *device,
        2,
        *dtype,
        ctypes.addressof(shape),
        ctypes.addressof(step) if step else 0,
        byte_offset,
    )
    if version is None:
        memory = tensor + struct.pack("=QQ", 0, 0)
    else:
        memory = struct.pack("=IIQQQ", *version, 0, 0, flags) + tensor
    buffer = ctypes.create_string_buffer(memory)
    _kept.extend([shape, step, buffer, name])
    return _new_capsule(ctypes.addressof(buffer), name, None)


def numbers(dtype: str, shape: tuple[int, ...] = (3, 4, 8)) -> np.ndarray[Any, Any]:
    return np.arange(np.prod(shape)).reshape(shape).astype(DTYPES[dtype])


# NumPy


@pytest.mark.parametrize("dtype", DTYPES)
def test_numpy_is_read_in_place(dtype: str) -> None:
    array = numbers(dtype)
    seen = view("q", array)
    assert seen == (array.ctypes.data, (3, 4, 8), (32, 8, 1), dtype, CPU, True, "numpy", array)
    assert as_numpy(seen) is array
    assert device_of("q", array) == CPU


@pytest.mark.parametrize(
    ("index", "strides", "offset"),
    [
        (np.s_[:, 1:3, ::2], (32, 8, 2), 8),
        (np.s_[::-1], (-32, 8, 1), 64),
        (np.s_[1], (8, 1), 32),
    ],
)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_numpy_strides_are_in_elements(dtype: str, index: Any, strides: tuple[int, ...], offset: int) -> None:
    array = numbers(dtype)
    seen = view("q", array[index])
    assert seen.strides == strides
    assert seen.shape == array[index].shape
    assert seen.pointer == array.ctypes.data + offset * array.itemsize


def test_numpy_transposed_broadcast_and_scalar() -> None:
    array = numbers("float16")
    assert view("q", array.transpose(2, 0, 1)).strides == (1, 32, 8)
    assert view("q", np.broadcast_to(array[0], (5, 4, 8))).strides == (0, 8, 1)
    assert view("q", np.zeros((), np.float32))[1:3] == ((), ())
    assert view("q", array[2:2]).shape == (0, 4, 8)


def test_numpy_read_only() -> None:
    array = numbers("float16")
    array.flags.writeable = False
    assert not view("o", array).writable
    assert not view("o", np.broadcast_to(numbers("float16"), (2, 3, 4, 8))).writable


def test_numpy_subclass(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "q.bin", np.float16, "w+", shape=(4, 8))
    assert view("q", array).pointer == array.ctypes.data


def test_numpy_keeps_its_memory_alive() -> None:
    array = numbers("float16")
    expected, alive = array.copy(), weakref.ref(array)
    seen = view("q", array)
    del array
    gc.collect()
    np.testing.assert_array_equal(as_numpy(seen), expected)
    del seen
    assert alive() is None


# What is refused


@pytest.mark.parametrize("thing", [None, [1.0, 2.0], (1,), 3, "q", b"q", np.float16(1), np.ndarray, memoryview(b"q")])
def test_no_array_is_refused(thing: Any) -> None:
    with pytest.raises(TypeError, match=r"^k_buffer: expected an array .*got "):
        view("k_buffer", thing)
    with pytest.raises(TypeError, match=r"^k_buffer: expected an array .*got "):
        device_of("k_buffer", thing)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint16", "bool", "complex64", ">f2", ">i4", "O"])
def test_unsupported_numpy_dtype_is_refused(dtype: str) -> None:
    with pytest.raises(TypeError, match=r"^q: dtype \S+ is not supported, expected one of float16, bfloat16, "):
        view("q", np.zeros(3, dtype))


def test_elements_off_their_grid_are_refused() -> None:
    record = np.zeros(4, np.dtype([("x", np.float16), ("flag", np.uint8)]))
    with pytest.raises(ValueError, match=r"^q: elements must lie at multiples of their size \(2 bytes\)"):
        view("q", record["x"])
    with pytest.raises(ValueError, match=r"^q: elements must lie"):
        view("q", np.zeros(9, np.uint8)[1:].view(np.float32))


class HalfProtocol:
    """Gives its memory away, but does not say where it lies."""

    def __dlpack__(self, **arguments: Any) -> Any:
        return handmade_capsule()


class Refusing(Producer):
    """Fails as the frameworks do."""

    def __init__(self, error: type[Exception]) -> None:
        self.error = error

    def __dlpack_device__(self) -> tuple[int, int]:
        raise self.error("nothing here")

    def __dlpack__(self, **arguments: Any) -> Any:
        raise self.error("nothing here")


@pytest.mark.parametrize("look", [view, device_of])
def test_half_a_protocol_is_refused(look: Any) -> None:
    with pytest.raises(TypeError, match=r"^q: expected an array .* and __dlpack_device__\), got HalfProtocol"):
        look("q", HalfProtocol())


@pytest.mark.parametrize("look", [view, device_of])
@pytest.mark.parametrize("error", [AttributeError, RuntimeError])
def test_errors_of_array_objects_name_the_argument(look: Any, error: type[Exception]) -> None:
    with pytest.raises(TypeError, match=r"^q: expected an array that shows its memory, got Refusing: nothing here"):
        look("q", Refusing(error))


# DLPack


@pytest.mark.parametrize("kind", [Producer, OldProducer])
@pytest.mark.parametrize("dtype", ["float16", "float32", "int32"])
def test_unknown_framework_is_read_in_place(kind: type[Producer], dtype: str) -> None:
    array = numbers(dtype)[:, ::2, 1:]
    seen = view("q", kind(array))
    assert seen[:7] == (array.ctypes.data, (3, 2, 7), (32, 16, 1), dtype, CPU, True, "other")
    assert device_of("q", kind(array)) == CPU
    np.testing.assert_array_equal(as_numpy(seen), array)
    assert as_numpy(seen).ctypes.data == array.ctypes.data


def test_dlpack_says_read_only() -> None:
    array = numbers("float16")
    array.flags.writeable = False
    seen = view("o", Producer(array))
    assert not seen.writable
    assert not as_numpy(seen).flags.writeable


def test_dlpack_keeps_memory_alive_until_the_view_goes() -> None:
    array = numbers("float16")
    expected, alive = array.copy(), weakref.ref(array)
    seen = as_numpy(view("q", Producer(array)))
    del array
    gc.collect()
    assert alive() is not None
    np.testing.assert_array_equal(seen, expected)
    del seen
    gc.collect()
    assert alive() is None


def test_capsule_is_not_consumed() -> None:
    array = numbers("float16")
    seen = view("q", Producer(array))
    np.testing.assert_array_equal(np.from_dlpack(Producer(capsule=seen.owner)), array)
    with pytest.raises(TypeError, match=r"^q: expected an unused DLPack capsule"):
        view("q", Producer(capsule=seen.owner))  # NumPy has consumed it now


@pytest.mark.parametrize(
    ("code_and_bits", "dtype"),
    [
        ((0, 32), "int32"),
        ((2, 16), "float16"),
        ((2, 32), "float32"),
        ((4, 16), "bfloat16"),
        ((10, 8), "float8_e4m3fn"),
        ((12, 8), "float8_e5m2"),
    ],
)
@pytest.mark.parametrize("version", [None, (1, 0), (1, 3)])
def test_capsule_dtypes(code_and_bits: tuple[int, int], dtype: str, version: tuple[int, int] | None) -> None:
    seen = view("q", Producer(capsule=handmade_capsule((*code_and_bits, 1), version=version)))
    assert (seen.dtype, seen.shape, seen.strides, seen.pointer) == (dtype, (3, 4), (4, 1), 4096)


def test_capsule_without_strides_with_offset() -> None:
    seen = view("q", Producer(capsule=handmade_capsule(strides=None, byte_offset=64)))
    assert (seen.pointer, seen.strides) == (4160, (4, 1))


@pytest.mark.parametrize(("dtype", "offset"), [((2, 16, 1), 1), ((2, 32, 1), 2)])
def test_capsule_off_its_grid_is_refused(dtype: tuple[int, int, int], offset: int) -> None:
    with pytest.raises(ValueError, match=r"^q: elements must lie at multiples .*, got address 0x100"):
        view("q", Producer(capsule=handmade_capsule(dtype, byte_offset=offset)))


def test_capsule_devices() -> None:
    def device(kind: int, index: int) -> tuple[str, int]:
        return view("q", Producer(capsule=handmade_capsule(device=(kind, index)))).device

    assert device(2, 3) == device(13, 3) == ("cuda", 3)
    assert device(3, 1) == CPU  # pinned
    with pytest.raises(ValueError, match=r"^q: DLPack device type 8 is not supported, expected CPU or CUDA"):
        device(8, 0)
    with pytest.raises(ValueError, match=r"^q: DLPack device type 10 "):
        device_of("q", Producer(device=(10, 0)))


def test_capsule_flags() -> None:
    assert view("o", Producer(capsule=handmade_capsule(version=(1, 0), flags=2))).writable
    assert not view("o", Producer(capsule=handmade_capsule(version=(1, 0), flags=3))).writable


@pytest.mark.parametrize(
    ("dtype", "message"),
    [
        ((2, 64, 1), "float64"),
        ((1, 16, 1), "uint16"),
        ((7, 8, 1), "DLPack type 7 of bits 8"),
        ((2, 16, 4), "float16 x 4 lanes"),
    ],
)
def test_capsule_with_unsupported_dtype_is_refused(dtype: tuple[int, int, int], message: str) -> None:
    with pytest.raises(TypeError, match=rf"^q: dtype {message} is not supported"):
        view("q", Producer(capsule=handmade_capsule(dtype)))


def test_strange_capsules_are_refused() -> None:
    with pytest.raises(TypeError, match=r"^q: expected an unused DLPack capsule, got one named b'used_dltensor'"):
        view("q", Producer(capsule=handmade_capsule(name=b"used_dltensor")))
    with pytest.raises(ValueError, match=r"^q: DLPack version 2 is not supported"):
        view("q", Producer(capsule=handmade_capsule(version=(2, 0))))
    with pytest.raises(ValueError, match=r"^q: .*invalid PyCapsule"):
        view("q", Producer(capsule="no capsule"))


def test_producers_refusal_names_the_argument() -> None:
    array = numbers("float16")
    array.flags.writeable = False
    with pytest.raises(TypeError, match=r"^v_buffer: .*readonly"):
        view("v_buffer", OldProducer(array))


def test_stream_goes_to_cuda_producers_only() -> None:
    on_gpu = Producer(capsule=handmade_capsule(device=(2, 0)), device=(2, 0))
    view("q", on_gpu, WorkStream(1234, 0))
    assert on_gpu.asked == {"max_version": (1, 0), "stream": 1234}
    view("q", on_gpu, WorkStream(0, 0))
    assert on_gpu.asked["stream"] == 1  # what DLPack calls the legacy default stream
    old = OldProducer(capsule=handmade_capsule(device=(2, 0)), device=(2, 0))
    view("q", old, WorkStream(1234, 0))
    assert old.asked == {"stream": 1234}
    on_cpu = Producer(numbers("float16"))
    view("q", on_cpu, WorkStream(1234, 0))
    assert on_cpu.asked == {"max_version": (1, 0)}


def test_row_major_strides_of_scalars_and_empty_shapes() -> None:
    assert dlpack._row_major(()) == ()
    assert dlpack._row_major((2, 0, 3)) == (0, 3, 1)


# Arrays out


def test_empty_is_numpy_for_numpy_and_unknown_frameworks() -> None:
    array = numbers("float16")
    for like in (view("q", array), view("q", Producer(array))):
        for dtype in DTYPES:
            made = empty((3, 5), dtype, like)
            assert (made.shape, made.dtype) == ((3, 5), DTYPES[dtype])
            assert made.flags.c_contiguous
            assert made.flags.writeable
            assert made.ctypes.data % 64 == 0
            assert hand_back(made, like) is made
    assert empty((0, 4), "float16", like).shape == (0, 4)
    assert empty((), "float32", like).shape == ()


# Streams


class StreamMethod:
    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, 77)


class StreamAttribute:
    __cuda_stream__ = (0, 78)


class TorchLikeStream:
    cuda_stream = 79


@pytest.mark.parametrize(
    ("stream", "handle"),
    [(0, 0), (2**47, 2**47), (StreamMethod(), 77), (StreamAttribute(), 78), (TorchLikeStream(), 79)],
)
def test_explicit_streams(stream: Any, handle: int) -> None:
    assert stream_handle(stream, "numpy", 0) == handle


@pytest.mark.parametrize("stream", [True, False, "0", 1.0, [0], object(), StreamMethod])
def test_no_stream_is_refused(stream: Any) -> None:
    with pytest.raises(TypeError, match=r"^stream is .*, expected None, an int, a CuPy stream"):
        stream_handle(stream, "numpy", 0)


def test_negative_stream_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^stream is -1"):
        stream_handle(-1, "numpy", 0)


def test_cupy_null_stream() -> None:
    cupy = pytest.importorskip("cupy")
    assert stream_handle(cupy.cuda.Stream.null, "numpy", 0) == 0


# What is imported


def test_no_framework_is_imported_or_needed() -> None:
    program = """
import sys
sys.modules["cupy"] = None  # importing it fails, as on a machine without it
import numpy as np, ml_dtypes
import fasttree_cupy
from fasttree_cupy.execution.arrays import as_numpy, empty, hand_back, view
from fasttree_cupy.workload import qkv_preparation
from fasttree_cupy.tree import KVTree
for dtype in (np.float16, ml_dtypes.bfloat16):
    seen = view("q", np.zeros((2, 16), dtype))
    hand_back(empty(seen.shape, seen.dtype, seen), seen)
qkv_preparation(KVTree.from_levels([1, 2], [3, 4]), 2, 1, 16)
loaded = {"torch", "jax", "jaxlib"}.intersection(sys.modules)
sys.exit(f"loaded: {loaded}" if loaded else 0)
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_ml_dtypes_bfloat16_is_the_named_one() -> None:
    assert view("q", np.zeros(2, ml_dtypes.bfloat16)).dtype == "bfloat16"


def test_masked_arrays_are_refused() -> None:
    with pytest.raises(TypeError, match="q: a masked array is not supported"):
        view("q", np.ma.masked_array(np.zeros((1, 2, 3), np.float16)))
