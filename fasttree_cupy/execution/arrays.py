"""Any framework's array in, zero copy, and the caller's kind of array out. No framework is imported here.

NumPy, CuPy and torch arrays are read by their own attributes, which is fastest and works for every dtype;
all others, JAX's among them, by their DLPack capsule.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from fasttree_cupy.execution import dlpack, streams

__all__ = [
    "DTYPES",
    "ArrayView",
    "address_of_alike",
    "aligned_empty",
    "as_numpy",
    "device_of",
    "empty",
    "framework_of",
    "hand_back",
    "view",
]

# The dtypes an array may have, by name. Which of them an argument takes is for its function to check.
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "int32": np.dtype(np.int32),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
}

_CPU = ("cpu", 0)

# (top-level module, class name) -> framework; a type belongs to the first of its bases found here.
_ARRAY_CLASSES = {
    ("numpy", "ndarray"): "numpy",
    ("cupy", "ndarray"): "cupy",
    ("torch", "Tensor"): "torch",
    ("jaxlib", "ArrayImpl"): "jax",
}

# What a look at an array may raise: RuntimeError comes from torch for a nested tensor, from JAX for a deleted array.
_REFUSALS = (TypeError, ValueError, BufferError, AttributeError, RuntimeError)

# JAX takes over CPU memory without a copy from this alignment on.
_ALIGNMENT = 64


class ArrayView(NamedTuple):
    """Where an array lies, whoever made it."""

    pointer: int
    """Address of the first element."""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """In elements; may be negative or 0."""
    dtype: str
    """A key of DTYPES."""
    device: tuple[str, int]
    """("cpu", 0) or ("cuda", n)."""
    writable: bool
    framework: str
    """"numpy", "cupy", "torch", "jax" or "other"."""
    owner: object
    """The array or its DLPack capsule: keeps the memory alive."""


def view(name: str, array: Any, stream: streams.WorkStream | None = None) -> ArrayView:
    """Look at an array without copying it.

    Parameters
    ----------
    name : str
        The argument's name, for errors.
    array : NumPy, CuPy, torch or JAX array, or any object with ``__dlpack__``
    stream : WorkStream, optional
        CUDA stream on which the array will be used: it then waits for what the array's framework has queued on its
        own. Without effect for arrays on the CPU.

    Raises
    ------
    TypeError
        If `array` is no array or one that gives no memory away (it requires grad, is traced, or was deleted), or has a
        dtype not in DTYPES.
    ValueError
        If its memory is not aligned to elements or lies on a device other than CPU and CUDA.
    """
    framework = framework_of(array)
    try:
        if framework == "torch":
            seen = _view_torch(array)
        elif framework == "numpy":
            return _view_numpy(array)
        elif framework == "cupy":
            seen = _view_cupy(array)
        else:
            return _view_dlpack(array, framework, stream)
    except _REFUSALS as error:
        raise _refusal(name, array, error) from error
    if stream is not None and seen.device is not _CPU:
        stream.follow(framework)  # whose errors are CUDA's, not the array's
    return seen


def device_of(name: str, array: Any) -> tuple[str, int]:
    """The device of an array, ("cpu", 0) or ("cuda", n); raises what :func:`view` raises for no arrays."""
    framework = framework_of(array)
    try:
        if framework == "torch":
            return _torch_device(array)
        if framework == "numpy":
            return _CPU
        if framework == "cupy":
            return ("cuda", array.data.device_id)
        if framework == "other":
            _require_dlpack(array)
        return dlpack.device_of(array)
    except _REFUSALS as error:
        raise _refusal(name, array, error) from error


def framework_of(array: Any) -> str:
    """The framework an array comes from: "numpy", "cupy", "torch", "jax" or "other"."""
    return _framework_of_type(type(array))  # type: ignore[arg-type]  # mypy takes no type for hashable


@lru_cache(maxsize=256)
def _framework_of_type(array_type: type) -> str:
    for base in array_type.__mro__:
        framework = _ARRAY_CLASSES.get((base.__module__.partition(".")[0], base.__name__))
        if framework is not None:
            return framework
    return "other"


def _refusal(name: str, array: Any, error: Exception) -> Exception:
    """What a caller gets for an error in a look at `array`."""
    if isinstance(error, ValueError):
        return ValueError(f"{name}: {error}")
    if framework_of(array) == "jax" and array.is_deleted():
        return TypeError(f"{name}: the array was deleted or donated, expected a live one")
    if isinstance(error, (AttributeError, RuntimeError)):
        return TypeError(f"{name}: expected an array that shows its memory, got {type(array).__name__}: {error}")
    return TypeError(f"{name}: {error}")


def _view_numpy(array: Any) -> ArrayView:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError("a masked array is not supported: its mask would be ignored")
    dtype = _dtype_name(array.dtype)
    pointer = array.ctypes.data
    strides = _strides_in_elements(array, pointer)
    return ArrayView(pointer, array.shape, strides, dtype, _CPU, array.flags.writeable, "numpy", array)


def _view_cupy(array: Any) -> ArrayView:
    dtype = _dtype_name(array.dtype)
    memory = array.data
    pointer, index = memory.ptr, memory.device_id
    strides = _strides_in_elements(array, pointer)
    return ArrayView(pointer, array.shape, strides, dtype, ("cuda", index), True, "cupy", array)


def _view_torch(tensor: Any) -> ArrayView:
    if tensor.requires_grad:
        raise TypeError("the tensor requires grad, detach it first: no gradient flows through this call")
    if tensor.layout is not sys.modules["torch"].strided:
        raise TypeError(f"a dense tensor is needed, got layout {tensor.layout}")
    if tensor.is_neg():  # a lazily negated view, as .imag of a conjugate is
        raise TypeError("the tensor is negated lazily, resolve it first: its memory holds the negative")
    dtype, device = _dtype_name(tensor.dtype), _torch_device(tensor)
    pointer, size = tensor.data_ptr(), tensor.element_size()
    if pointer % size:
        raise _misaligned(size, pointer)
    return ArrayView(pointer, tuple(tensor.shape), tensor.stride(), dtype, device, True, "torch", tensor)


def _view_dlpack(array: Any, framework: str, stream: streams.WorkStream | None) -> ArrayView:
    if framework == "other":
        _require_dlpack(array)
    capsule = dlpack.ask(array, None if stream is None else stream.handle)
    pointer, shape, strides, dtype, device, read_only = dlpack.read(capsule)
    known = DTYPES.get(dtype)
    if known is None:
        raise _unsupported(dtype)
    if pointer % known.itemsize:
        raise _misaligned(known.itemsize, pointer)
    # JAX's arrays never change, and its capsules are too old to say so.
    writable = framework != "jax" and not read_only
    return ArrayView(pointer, shape, strides, dtype, device, writable, framework, capsule)


def address_of_alike(array: Any) -> Callable[[Any], int | None] | None:
    """How to look again at arrays that may be like one that `view` took.

    Returns
    -------
    callable or None
        Gives the address of an array of which `view` would say all else that it said of `array`, and None for any
        other. Both are asked anew in each call: arrays change in place. None for what only a capsule tells about.
    """
    make = {"torch": _address_of_alike_tensor, "cupy": _address_of_alike_cupy}.get(framework_of(array))
    return None if make is None else make(array)


def _address_of_alike_tensor(like: Any) -> Callable[[Any], int | None]:
    kind, layout, dtype, device, shape, strides = (
        type(like), like.layout, like.dtype, like.device, like.shape, like.stride(),
    )  # fmt: skip

    def address(tensor: Any) -> int | None:
        try:
            if (
                type(tensor) is kind
                and tensor.layout is layout
                and tensor.dtype is dtype
                and tensor.shape == shape
                and tensor.stride() == strides
                and tensor.device == device
                and not tensor.requires_grad
                and not tensor.is_neg()
            ):
                return tensor.data_ptr()  # type: ignore[no-any-return]
        except RuntimeError:  # a nested tensor has no shape, one of torch.vmap no memory
            pass
        return None

    return address


def _address_of_alike_cupy(like: Any) -> Callable[[Any], int | None]:
    kind, dtype, device, shape, strides = type(like), like.dtype, like.data.device_id, like.shape, like.strides

    def address(array: Any) -> int | None:
        if type(array) is kind and array.dtype == dtype and array.shape == shape and array.strides == strides:
            memory = array.data
            if memory.device_id == device:
                return memory.ptr  # type: ignore[no-any-return]
        return None

    return address


def _require_dlpack(array: Any) -> None:
    if isinstance(array, type) or not (hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")):
        raise TypeError(
            "expected an array (NumPy, CuPy, torch, JAX or another with __dlpack__ and __dlpack_device__), "
            f"got {array if isinstance(array, type) else type(array).__name__}"
        )


def _torch_device(tensor: Any) -> tuple[str, int]:
    if tensor.is_cuda:
        return ("cuda", tensor.get_device())
    if tensor.is_cpu:
        return _CPU
    raise ValueError(f"device {tensor.device} is not supported, expected a CPU or CUDA tensor")


@lru_cache(maxsize=64)
def _dtype_name(dtype: Any) -> str:
    """The name in DTYPES of a NumPy, CuPy or torch dtype."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise _unsupported(name)
    return name


def _unsupported(dtype: str) -> TypeError:
    return TypeError(f"dtype {dtype} is not supported, expected one of {', '.join(DTYPES)}")


def _misaligned(size: int, pointer: int) -> ValueError:
    return ValueError(f"elements must lie at multiples of their size ({size} bytes), got address {pointer:#x}")


def _strides_in_elements(array: Any, pointer: int) -> tuple[int, ...]:
    size = array.itemsize
    if pointer % size or any([stride % size for stride in array.strides]):
        raise ValueError(
            f"elements must lie at multiples of their size ({size} bytes), "
            f"got address {pointer:#x} and strides {array.strides} in bytes"
        )
    return tuple([stride // size for stride in array.strides])


def as_numpy(view: ArrayView) -> np.ndarray[Any, Any]:
    """A NumPy array over a CPU view's memory, zero copy; it keeps the memory alive.

    bfloat16 and float8 come as ml_dtypes' dtypes. Not writable where the view is not.
    """
    if view.framework == "numpy":
        return view.owner  # type: ignore[return-value]
    dtype = DTYPES[view.dtype]
    if 0 in view.shape:  # may have no address
        return np.empty(view.shape, dtype)
    # NumPy's array interface knows its own dtypes only: the others travel as integers of their size.
    return np.asarray(_Memory(view, dtype)).view(dtype)


class _Memory:
    """What NumPy takes an array from, and keeps as the array's base."""

    def __init__(self, view: ArrayView, dtype: np.dtype[Any]) -> None:
        size = dtype.itemsize
        self.view = view
        self.__array_interface__ = {
            "version": 3,
            "data": (view.pointer, not view.writable),
            "shape": view.shape,
            "strides": tuple([stride * size for stride in view.strides]),
            "typestr": f"|u{size}" if size == 1 else f"<u{size}",
        }


def empty(shape: tuple[int, ...], dtype: str, like: ArrayView) -> Any:
    """A new row-major array to compute into, on the device of `like`; contents undefined.

    Of the kind of `like` where that kind can be written. For JAX and unknown frameworks NumPy or CuPy;
    :func:`hand_back` then makes it the caller's kind.
    """
    kind, index = like.device
    if like.framework == "torch":
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=torch.device(kind, index))
    if kind == "cpu":
        return aligned_empty(shape, DTYPES[dtype])
    import cupy

    with cupy.cuda.Device(index):
        return cupy.empty(shape, DTYPES[dtype])


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """A NumPy array whose memory JAX takes over without a copy; contents undefined."""
    size = prod(shape) * dtype.itemsize
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % _ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def hand_back(array: Any, like: ArrayView) -> Any:
    """An array from :func:`empty`, filled, as the caller's kind, zero copy.

    On CUDA the stream that writes it must be CuPy's current one: JAX then waits for it. A JAX array for JAX, else
    `array` itself.
    """
    if like.framework != "jax":
        return array
    jax = sys.modules["jax"]
    if like.device[0] == "cuda":
        return jax.dlpack.from_dlpack(array)
    # Not by DLPack, in which NumPy knows no bfloat16.
    return jax.device_put(array, jax.local_devices(backend="cpu")[0], may_alias=True)
