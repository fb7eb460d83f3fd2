"""Integers of a caller, checked and made arrays; the messages name the argument."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["flat_int64", "host_array", "int_matrix", "int_vector"]

Int64Array = npt.NDArray[np.int64]


def int_vector(values: npt.ArrayLike, name: str) -> Int64Array:
    """A fresh int64 vector of `values`; TypeError or ValueError in the name of the argument `name`."""
    if not hasattr(values, "__array__"):
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError(f"{name} is {type(values).__name__}, expected a sequence of integers")
        return flat_int64(list(values), lambda k: f"{name}[{k}]")
    values = host_array(values, name)
    if values.ndim != 1 or values.dtype.kind not in "iu":
        raise TypeError(f"{name} is {values.dtype} of shape {values.shape}, expected integers, one dimension")
    if values.dtype == np.uint64 and values.size and values.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {values.max()}, which does not fit in 64 bits with a sign")
    return values.astype(np.int64)


def int_matrix(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer[Any]]:
    """`values` as an array of integers of two dimensions, without a copy where it is an array in host memory."""
    matrix = host_array(values, name)
    if matrix.ndim != 2:
        raise ValueError(f"{name} has shape {matrix.shape}, expected two dimensions")
    if matrix.dtype.kind not in "iu":
        raise TypeError(f"{name} is {matrix.dtype}, expected integers")
    return matrix


def host_array(values: npt.ArrayLike, name: str) -> npt.NDArray[Any]:
    """`values` as an array in host memory, of whatever type."""
    try:
        return np.asarray(values)
    except TypeError:  # an array on a GPU
        raise TypeError(f"{name} is {type(values).__name__}, expected an array in host memory") from None
    except ValueError:
        raise ValueError(f"{name} has rows of different lengths, expected a rectangle") from None


def flat_int64(values: list[Any], name: Callable[[int], str]) -> Int64Array:
    """int64 vector of a list of Python integers; ``name(k)`` is what a message calls entry k."""
    if not _all_ints(values):
        k = next(k for k, v in enumerate(values) if not _all_ints([v]))
        raise TypeError(f"{name(k)} is {values[k]!r}, expected an integer")
    try:
        return np.frombuffer(array("q", values), np.int64)  # three times as fast as np.array(values)
    except OverflowError:
        k = next(k for k, v in enumerate(values) if not -(2**63) <= v < 2**63)
        raise ValueError(f"{name(k)} is {values[k]}, which does not fit in 64 bits") from None


def _all_ints(values: Iterable[object]) -> bool:
    """Whether all are integers (NumPy's too, bool not); looks at each type once."""
    return all(issubclass(t, (int, np.integer)) and t is not bool for t in set(map(type, values)))
