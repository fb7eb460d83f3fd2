"""K and V in float8 for the benchmark, with a scale for each KV head, on the device."""

from __future__ import annotations

from typing import Any

import numpy as np

from fasttree_cupy.execution.arrays import DTYPES

__all__ = ["quantise", "widened"]


def quantise(array: Any, kv_dtype: str, xp: Any) -> tuple[Any, Any]:
    """Quantise by tables of all 65,536 values: no framework's float8 arithmetic is needed, on a GPU neither.

    Parameters
    ----------
    array : float16 or bfloat16, shape (tokens, heads, head_dim)
        Finite.
    kv_dtype : str
        "float8_e4m3fn" or "float8_e5m2".
    xp : module
        numpy or cupy.

    Returns
    -------
    quantised : array of kv_dtype
    scales : float32 array, shape (heads,)
        Each head's largest magnitude over the type's largest number; ``scales * quantised`` is close to `array`.
    """
    bits = array.view(np.uint16)
    # Magnitudes of 16-bit floats are ordered as their bits are.
    largest = (bits & np.uint16(0x7FFF)).max(axis=(0, 2))
    largest = np.asarray(largest.get() if hasattr(largest, "get") else largest)
    with np.errstate(over="ignore", invalid="ignore"):  # infinities and NaN among all values
        every = np.arange(1 << 16, dtype=np.uint16).view(np.dtype(str(array.dtype))).astype(np.float32)
        scales = every[largest] / np.float32(2.0**8 * 1.75 if kv_dtype == "float8_e4m3fn" else 2.0**15 * 1.75)
        out = xp.empty(array.shape, np.uint8)
        for head, scale in enumerate(scales):
            table = (every / scale).astype(DTYPES[kv_dtype]).view(np.uint8)
            out[:, head] = xp.asarray(table)[bits[:, head]]
    return out.view(DTYPES[kv_dtype]), xp.asarray(scales)


def widened(array: Any, xp: Any) -> Any:
    """A float8 array as float64."""
    table = np.arange(256, dtype=np.uint8).view(np.dtype(str(array.dtype))).astype(np.float64)
    return xp.asarray(table)[array.view(np.uint8)]
