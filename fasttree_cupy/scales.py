"""The factors of float8 K and V."""

from __future__ import annotations

import numbers
from typing import Any

import numpy as np

from fasttree_cupy.checks import FLOAT8_DTYPES, FLOAT32_TINY, check_contiguous, check_same, checked_float
from fasttree_cupy.execution import arrays, streams
from fasttree_cupy.execution.arrays import ArrayView

__all__ = ["checked_scale", "largest"]


def checked_scale(
    name: str, scale: Any, quantised: ArrayView, stream: streams.WorkStream | None = None
) -> float | ArrayView:
    """What K or V must be multiplied by.

    Parameters
    ----------
    name : str
        The argument's name, for errors.
    scale : float, float32 array of shape (num_kv_heads,), or None
        One positive factor, or one for each KV head; None stands for 1.
    quantised : ArrayView
        K or V.
    stream : WorkStream, optional
        CUDA stream on which the factors will be read.

    Returns
    -------
    float or ArrayView

    Raises
    ------
    TypeError
        If `scale` is neither a number nor an array, or the array is not float32.
    ValueError
        If it is given for 16-bit K and V, is not positive, or is an array of another shape or device. Arrays on a GPU
        are not looked into, which would need a device synchronisation.
    """
    if scale is None:
        return 1.0
    if quantised.dtype not in FLOAT8_DTYPES:
        raise ValueError(f"{name} is given, but k and v are {quantised.dtype}, expected {name} left out")
    if isinstance(scale, numbers.Real):
        number = checked_float(scale, name)
        if number < FLOAT32_TINY:
            raise ValueError(f"{name} is {scale!r}, expected a positive number, {FLOAT32_TINY} at least")
        return number
    view = arrays.view(name, scale, stream)
    check_same(name, "dtype", view.dtype, "float32")
    check_same(name, "device", view.device, quantised.device)
    check_same(name, "shape", view.shape, quantised.shape[1:2])
    check_contiguous(name, view)
    if view.device[0] == "cpu":
        factors = arrays.as_numpy(view)
        if not np.all(np.isfinite(factors) & (factors >= FLOAT32_TINY)):
            raise ValueError(f"{name} holds {factors}, expected positive finite factors")
    return view


def largest(factor: float | arrays.ArrayView) -> float:
    """The largest of factors that `checked_scale` returned; 0 where that would need a device synchronisation."""
    if isinstance(factor, float):
        return factor
    return float(arrays.as_numpy(factor).max(initial=0)) if factor.device[0] == "cpu" else 0.0
