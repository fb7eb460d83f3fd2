"""Index arrays to a GPU: one transfer for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["pack", "upload"]

ALIGNMENT = 32
"""Elements: each array starts at a multiple of 128 bytes, a full memory transaction on every GPU."""


def pack(arrays: Sequence[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """All arrays in one, and where each starts: at a multiple of `ALIGNMENT`."""
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += -(-array.size // ALIGNMENT) * ALIGNMENT
    packed = np.zeros(total, np.int32)
    for start, array in zip(starts, arrays, strict=True):
        packed[start : start + array.size] = array.ravel()
    return packed, starts


def upload(arrays: Sequence[npt.NDArray[np.int32]], device: int) -> list[Any]:
    """Copy int32 arrays to a GPU, packed into one buffer.

    Returns
    -------
    list of cupy.ndarray
        Views of the buffer, of the arrays' shapes. The transfer is over: any stream may use them.
    """
    import cupy

    packed, starts = pack(arrays)
    with cupy.cuda.Device(device):
        buffer = cupy.asarray(packed)
        cupy.cuda.get_current_stream().synchronize()
    return [
        buffer[start : start + array.size].reshape(array.shape) for start, array in zip(starts, arrays, strict=True)
    ]
