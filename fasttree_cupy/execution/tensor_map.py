"""Tensor maps: how the bulk copy engine of compute capability 9.0 finds rows of K and V in device memory."""

from __future__ import annotations

import ctypes
import functools
import struct
from collections.abc import Callable

from .arrays import DTYPES, ArrayView
from .driver import driver_function

__all__ = ["TENSOR_MAP_BYTES", "map_words", "tensor_maps"]

TENSOR_MAP_BYTES = 128
"""Size of a CUtensorMap."""
_PAIR = struct.Struct(f"={2 * TENSOR_MAP_BYTES // 8}Q")
_NO_PAIR = (0,) * (2 * TENSOR_MAP_BYTES // 8)
BOX_TOKENS = 16
"""Tokens of a copy: kChunkTokens in cuda_src/include/chunk_products.cuh."""
BOX_BYTES = 128
"""Of a token in a copy: kPanelRowBytes in cuda_src/include/wgmma.cuh, which is what the swizzle is for."""
MOST_TOKENS = 2**31
"""The number of tokens is left open, so that arrays of any length at one address have the same map."""
KEPT = 4096
"""Maps that are kept: two a layer."""

# Of cuda.h: CU_TENSOR_MAP_DATA_TYPE_UINT8 and _UINT16 by their bytes; then _INTERLEAVE_NONE, _SWIZZLE_128B,
# _L2_PROMOTION_NONE and _FLOAT_OOB_FILL_NONE. With _L2_PROMOTION_L2_256B device memory delivers 5 to 7% less.
_TYPES = {1: 0, 2: 1}
_MODES = (0, 3, 0, 0)
_ALIGNMENT = 64

Layout = tuple[int, int, int, int, int]


def tensor_maps(k: ArrayView, v: ArrayView) -> Callable[[int, int], bytes] | None:
    """What makes the tensor maps of K and V, one behind the other, for arrays like these at two addresses.

    Parameters
    ----------
    k, v : ArrayView
        Shape (num_tokens, num_kv_heads, head_dim); rows of a head of `BOX_BYTES` or twice as many.

    Returns
    -------
    callable or None
        Takes the addresses of K and V, and returns bytes; raises RuntimeError where CUDA refuses one of these. None
        where rows are shorter, where CUDA has no tensor maps of such strides, or the driver none at all.
    """
    make_current(k.device[1])
    k_layout, v_layout = _layout(k), _layout(v)
    try:
        _pair(k_layout, v_layout, k.pointer, v.pointer)
    except _NoTensorMapError:
        return None
    return functools.partial(_pair, k_layout, v_layout)


def map_words(maps: Callable[[int, int], bytes] | None, k: ArrayView, v: ArrayView) -> tuple[int, ...]:
    """What a struct holds of the tensor maps of K and V, zeros where there are none."""
    return _NO_PAIR if maps is None else _PAIR.unpack(maps(k.pointer, v.pointer))


def make_current(device: int) -> None:
    """Give the calling thread a CUDA context where it has none yet, as the driver's functions ask for."""
    from cupy.cuda import driver, runtime

    if not driver.ctxGetCurrent():
        runtime.setDevice(device)


class _NoTensorMapError(RuntimeError):
    """CUDA makes no tensor map. Raised, not returned: what failed once is not kept."""


def _layout(kv: ArrayView) -> Layout:
    """Bytes of an element, KV heads, head_dim, and the bytes from one head, and one token, to the next."""
    size = DTYPES[kv.dtype].itemsize
    return size, kv.shape[1], kv.shape[2], size * kv.strides[1], size * kv.strides[0]


@functools.lru_cache(maxsize=KEPT)
def _pair(k_layout: Layout, v_layout: Layout, k: int, v: int) -> bytes:
    return _tensor_map(k, k_layout) + _tensor_map(v, v_layout)


@functools.lru_cache(maxsize=KEPT)
def _tensor_map(address: int, layout: Layout) -> bytes:
    encode = _encoder()
    size, heads, head_dim, *strides = layout
    if encode is None or min(strides) < 0 or head_dim * size < BOX_BYTES:
        raise _NoTensorMapError
    memory = (ctypes.c_char * (TENSOR_MAP_BYTES + _ALIGNMENT))()
    at = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    sizes = (ctypes.c_uint64 * 3)(head_dim, heads, MOST_TOKENS)
    box = (ctypes.c_uint32 * 3)(BOX_BYTES // size, 1, BOX_TOKENS)
    steps = (ctypes.c_uint32 * 3)(1, 1, 1)
    pointers = ctypes.c_void_p(at), ctypes.c_void_p(address)
    if encode(pointers[0], _TYPES[size], 3, pointers[1], sizes, (ctypes.c_uint64 * 2)(*strides), box, steps, *_MODES):
        raise _NoTensorMapError(f"CUDA made no tensor map for {address:#x}, {heads} heads, strides {strides}")
    return ctypes.string_at(at, TENSOR_MAP_BYTES)


def _encoder() -> Callable[..., int] | None:
    return driver_function("cuTensorMapEncodeTiled")
