"""Reads DLPack capsules: where an array lies in memory, without taking the capsule over.

Array libraries import a subset of each other's dtypes (NumPy knows no bfloat16 in DLPack, CuPy no float8).
So the C structures are read here, by their layout in ``dlpack.h``: major version 1 and the unversioned form
before it.
"""

from __future__ import annotations

import ctypes
import struct
from itertools import accumulate
from operator import mul
from typing import Any, NamedTuple

__all__ = ["DLTensor", "ask", "device_of", "read"]

MAX_VERSION = (1, 0)
FLAG_READ_ONLY = 1

# (type code, bits) -> the dtype's name, for the dtypes that this package knows.
_DTYPES = {
    (0, 8): "int8",
    (0, 32): "int32",
    (1, 8): "uint8",
    (2, 16): "float16",
    (2, 32): "float32",
    (4, 16): "bfloat16",
    (10, 8): "float8_e4m3fn",
    (12, 8): "float8_e5m2",
}
_OTHER_TYPE_CODES = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}

# kDLCUDAHost is pinned memory, which the CPU reads like its own; kDLCUDAManaged counts as its GPU's.
_DEVICES = {1: "cpu", 2: "cuda", 3: "cpu", 13: "cuda"}

# DLManagedTensorVersioned before its tensor: version major, minor, manager_ctx, deleter, flags.
_VERSIONED_HEADER = struct.Struct("=IIQQQ")
# DLTensor: data, device type, device id, ndim, dtype code, bits, lanes, shape, strides, byte_offset.
_TENSOR = struct.Struct("=QiiiBBHQQQ")
_VERSIONED_SIZE = _VERSIONED_HEADER.size + _TENSOR.size

# Own function objects: types set on ctypes.pythonapi's shared ones would change them for other libraries.
_capsule_name = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", ctypes.pythonapi))
_capsule_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


class DLTensor(NamedTuple):
    """What a capsule says: the first element's address, shape, strides in elements, dtype, device.

    ``read_only`` is None for unversioned capsules, which cannot say.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    device: tuple[str, int]
    read_only: bool | None


def ask(array: Any, stream: int | None = None) -> Any:
    """Ask `array` for its capsule; the memory lives as long as the capsule does.

    Parameters
    ----------
    array : object with ``__dlpack__`` and ``__dlpack_device__``
    stream : int, optional
        Handle of the CUDA stream on which the memory will be used; the producer makes it wait for its own
        work. Without effect for arrays on the CPU.
    """
    arguments: dict[str, Any] = {}
    if stream is not None and device_of(array)[0] == "cuda":
        arguments["stream"] = stream or 1  # DLPack calls the legacy default stream 1 and forbids 0
    try:
        return array.__dlpack__(max_version=MAX_VERSION, **arguments)
    except TypeError:  # a producer from before DLPack 1.0 knows no max_version
        return array.__dlpack__(**arguments)


def device_of(array: Any) -> tuple[str, int]:
    """The device of an object with ``__dlpack_device__``: ("cpu", 0) or ("cuda", n), else ValueError."""
    kind, index = array.__dlpack_device__()
    return _device(int(kind), index)


def read(capsule: Any) -> DLTensor:
    """Read a capsule named "dltensor" or "dltensor_versioned"; it is not consumed.

    Raises
    ------
    TypeError
        If it is no such capsule or one consumed before.
    ValueError
        If its major version is unknown, or the memory lies on a device other than CPU and CUDA.
    """
    name = _capsule_name(capsule)
    if name == b"dltensor_versioned":
        memory = ctypes.string_at(_capsule_pointer(capsule, name), _VERSIONED_SIZE)
        major, _, _, _, flags = _VERSIONED_HEADER.unpack_from(memory)
        if major != MAX_VERSION[0]:
            raise ValueError(f"DLPack version {major} is not supported, expected {MAX_VERSION[0]}")
        read_only: bool | None = bool(flags & FLAG_READ_ONLY)
        fields = _TENSOR.unpack_from(memory, _VERSIONED_HEADER.size)
    elif name == b"dltensor":
        read_only = None
        fields = _TENSOR.unpack(ctypes.string_at(_capsule_pointer(capsule, name), _TENSOR.size))
    else:
        raise TypeError(f"expected an unused DLPack capsule, got one named {name!r}")

    data, kind, index, ndim, code, bits, lanes, shape_at, strides_at, byte_offset = fields
    shape = _integers(shape_at, ndim)
    # No strides mean row-major order (allowed before DLPack 1.2).
    strides = _integers(strides_at, ndim) if strides_at else _row_major(shape)
    return DLTensor(data + byte_offset, shape, strides, _dtype_name(code, bits, lanes), _device(kind, index), read_only)


def _device(kind: int, index: int) -> tuple[str, int]:
    name = _DEVICES.get(kind)
    if name is None:
        raise ValueError(f"DLPack device type {kind} is not supported, expected CPU or CUDA memory")
    return (name, index if name == "cuda" else 0)


def _dtype_name(code: int, bits: int, lanes: int) -> str:
    known = _DTYPES.get((code, bits))
    if known is not None and lanes == 1:
        return known
    name = f"{_OTHER_TYPE_CODES.get(code, f'DLPack type {code} of bits ')}{bits}"
    return name if lanes == 1 else f"{name} x {lanes} lanes"


def _integers(address: int, count: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int64 * count).from_address(address)) if count else ()


def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(accumulate(reversed(shape[1:]), mul, initial=1))[::-1] if shape else ()
