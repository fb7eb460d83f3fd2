"""A schedule's index arrays and work spaces onto its device: one transfer for all arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from fasttree_cupy.alignment import next_start

__all__ = ["pack", "packed_size", "place_schedule", "upload"]


def packed_size(arrays: Sequence[npt.NDArray[np.int32]]) -> int:
    """Elements of what `pack` makes of arrays."""
    return sum(next_start(array.size, array.itemsize) for array in arrays)


def pack(arrays: Sequence[npt.NDArray[np.int32]]) -> tuple[npt.NDArray[np.int32], list[int]]:
    """All arrays in one, and where each starts: see `next_start`."""
    starts = [packed_size(arrays[:i]) for i in range(len(arrays))]
    packed = np.zeros(packed_size(arrays), np.int32)
    for start, array in zip(starts, arrays, strict=True):
        packed[start : start + array.size] = array.ravel()
    return packed, starts


def upload(arrays: Sequence[npt.NDArray[np.int32]], device: int, used: int | None = None) -> list[Any]:
    """Copy int32 arrays to a GPU, packed into one buffer, or only the first `used` elements of that.

    Returns
    -------
    list of cupy.ndarray
        Views of the buffer, of the arrays' shapes. The transfer is over: any stream may use them.
    """
    import cupy

    packed, starts = pack(arrays) if len(arrays) > 1 else (arrays[0].reshape(-1), [0])
    with cupy.cuda.Device(device):
        buffer, stream = cupy.zeros(packed.size, np.int32), cupy.cuda.get_current_stream()
        if packed[:used].size:
            buffer[:used].set(packed[:used], stream)
        stream.synchronize()
    return [
        buffer[start : start + array.size].reshape(array.shape) for start, array in zip(starts, arrays, strict=True)
    ]


def place_schedule(
    arrays: Sequence[npt.NDArray[np.int32]], mid_shape: tuple[int, int, int], device: str
) -> tuple[list[Any], Any, Any]:
    """Place a schedule on ``"cpu"`` or ``"cuda:<index>"``.

    Returns
    -------
    arrays : list of array
        The index arrays on the device.
    mid_o, mid_lse : array, float32
        Work spaces for partial outputs and their LSE, of `mid_shape` and without its last axis; not initialised.
    """
    if device == "cpu":
        return list(arrays), np.empty(mid_shape, np.float32), np.empty(mid_shape[:2], np.float32)
    import cupy

    index = int(device.removeprefix("cuda:"))
    with cupy.cuda.Device(index):
        mid_o, mid_lse = cupy.empty(mid_shape, np.float32), cupy.empty(mid_shape[:2], np.float32)
    return upload(arrays, index), mid_o, mid_lse
