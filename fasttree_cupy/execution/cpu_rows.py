"""Rows of Q, K, V and O as the CPU backend reads and writes them: any strides, 8 or 16 bits an element, as float32."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fasttree_cupy.compiled import njit

__all__ = ["Rows", "float8_values", "load_row", "load_tokens", "rows_of", "store_row"]

Array = npt.NDArray[Any]
Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]
Bits = npt.NDArray[np.uint16] | npt.NDArray[np.uint8]


class Rows(NamedTuple):
    """Element (i, h, d) of an array is bits[start + i * row_stride + h * head_stride + d]."""

    bits: Bits
    start: int
    row_stride: int
    head_stride: int


def float8_values(dtype: np.dtype[Any]) -> Float32Array:
    """The values of all bytes as a float8 type; none for a 16-bit one."""
    if dtype.itemsize > 1:
        return np.empty(0, np.float32)
    return np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)


def rows_of(array: Array, *, writeable: bool = False) -> Rows:
    """Flatten without a copy, so that Numba compiles once and not for each combination of layouts."""
    size = array.itemsize
    row_stride, head_stride = (stride // size for stride in array.strides[:2])
    upward = array[:: -1 if row_stride < 0 else 1, :: -1 if head_stride < 0 else 1].view(f"u{size}")
    last = [(n - 1) * stride // size for n, stride in zip(upward.shape, upward.strides, strict=True)]
    extent = sum(last) + 1 if array.size else 0
    bits = np.lib.stride_tricks.as_strided(upward, (extent,), (size,), writeable=writeable)
    start = (last[0] if row_stride < 0 else 0) + (last[1] if head_stride < 0 else 0)
    return Rows(bits, start, row_stride, head_stride)


# Compiled passes.


@njit
def load_row(source: Rows, bfloat16: bool, row: int, head: int, out: Float32Array) -> None:
    """Widen a row of 16-bit elements: those of one head."""
    start = source.start + row * source.row_stride + head * source.head_stride
    bits = source.bits[start : start + len(out)]
    if bfloat16:
        for d in range(len(out)):
            out[d] = _from_bfloat16(bits[d])
    else:
        for d in range(len(out)):
            out[d] = _from_float16(bits[d])


@njit
def load_tokens(
    source: Rows, bfloat16: bool, float8: Float32Array, tokens: Int32Array, head: int, out: Float32Array
) -> None:
    """Widen rows of K or V, of the type of Q or float8."""
    if len(float8) == 0:
        for i in range(len(tokens)):
            load_row(source, bfloat16, tokens[i], head, out[i])
        return
    for i in range(len(tokens)):
        start = source.start + tokens[i] * source.row_stride + head * source.head_stride
        bits = source.bits[start : start + out.shape[1]]
        for d in range(len(bits)):
            out[i, d] = float8[bits[d]]


@njit
def store_row(values: Float32Array, bfloat16: bool, target: Rows, row: int, head: int) -> None:
    """Round to a row of 16-bit elements: those of one head."""
    start = target.start + row * target.row_stride + head * target.head_stride
    bits = target.bits[start : start + len(values)]
    if bfloat16:
        for d in range(len(values)):
            bits[d] = _to_bfloat16(values[d])
    else:
        for d in range(len(values)):
            bits[d] = _to_float16(values[d])


# Numba has no 16-bit floats. These conversions are exact, or round to nearest even, for every value there is.
# They select and do not branch, so that LLVM vectorises the loops around them.


@njit
def _from_bfloat16(bits: np.uint16) -> np.float32:
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@njit
def _to_bfloat16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = np.uint32(bits + np.uint32(0x7FFF) + odd)
    quiet = np.uint32(bits | np.uint32(0x400000))  # a NaN must not be rounded to inf
    return np.uint16((quiet if np.isnan(value) else rounded) >> np.uint32(16))


@njit
def _from_float16(bits: np.uint16) -> np.float32:
    sign = np.uint32(np.uint32(bits & np.uint16(0x8000)) << np.uint32(16))
    magnitude = np.uint32(np.uint32(bits & np.uint16(0x7FFF)) << np.uint32(13))
    # The exponent's bias becomes 127 instead of 15; the largest exponent, inf and NaN, stays the largest.
    bias = np.uint32(0x70000000) if magnitude >= np.uint32(0x0F800000) else np.uint32(0x38000000)
    normal = np.uint32(magnitude + bias)
    # A subnormal has no leading one: write it behind that of 2**-14, then take 2**-14 away.
    smallest = np.uint32(0x38800000)
    shifted = np.uint32(magnitude + smallest).view(np.float32)
    subnormal = np.float32(shifted - smallest.view(np.float32)).view(np.uint32)
    return np.uint32(sign | (subnormal if magnitude < np.uint32(0x00800000) else normal)).view(np.float32)


@njit
def _to_float16(value: np.float32) -> np.uint16:
    bits = np.float32(value).view(np.uint32)
    sign = (bits >> np.uint32(16)) & np.uint32(0x8000)
    magnitude = np.uint32(bits & np.uint32(0x7FFFFFFF))
    odd = (magnitude >> np.uint32(13)) & np.uint32(1)
    normal = np.uint32(magnitude - np.uint32(0x38000000) + np.uint32(0xFFF) + odd) >> np.uint32(13)
    # The last bit of a float32 in [0.5, 1) is worth 2**-24, float16's smallest subnormal: the adder rounds.
    half = np.float32(0.5)
    subnormal = np.float32(magnitude.view(np.float32) + half).view(np.uint32) - half.view(np.uint32)
    finite = subnormal if magnitude < np.uint32(0x38800000) else normal
    special = np.uint32(0x7E00) if magnitude > np.uint32(0x7F800000) else np.uint32(0x7C00)
    return np.uint16(sign | (special if magnitude >= np.uint32(0x477FF000) else finite))
