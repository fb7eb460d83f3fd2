"""Integers of a caller, checked, and made arrays where they are many; the messages name the argument."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["INT32_MAX", "checked_int", "checked_pair", "flat_int64", "host_array", "int_matrix", "int_vector"]

INT32_MAX = 2**31 - 1
_TOO_LARGE = "does not fit in 64 bits, expected -2**63 to 2**63 - 1"

Int64Array = npt.NDArray[np.int64]


def checked_int(value: object, name: str, least: int = 1) -> int:
    """`value` as a Python integer; TypeError or ValueError in the name of the argument `name`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} is {value!r}, expected an integer")
    if not least <= value <= INT32_MAX:
        raise ValueError(f"{name} is {value}, expected {least} to {INT32_MAX}")
    return int(value)


def checked_pair(value: object, name: str, least: int = 1) -> list[int]:
    """Two integers as a fresh list; TypeError or ValueError in the name of the argument `name`."""
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name} is {value!r}, expected two integers")
    if len(value) != 2:
        raise ValueError(f"{name} has {len(value)} entries, expected two integers")
    return [checked_int(number, f"{name}[{i}]", least) for i, number in enumerate(value)]


def int_vector(values: npt.ArrayLike, name: str) -> Int64Array:
    """A fresh int64 vector of `values`; TypeError or ValueError in the name of the argument `name`."""
    if not hasattr(values, "__array__"):
        if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
            raise TypeError(f"{name} is {type(values).__name__}, expected a sequence of integers")
        return flat_int64(list(values), lambda k: f"{name}[{k}]")
    vector = _int_array(values, name, 1, "one dimension")
    if vector.dtype == np.uint64 and vector.size and vector.max() > np.iinfo(np.int64).max:
        raise ValueError(f"{name} holds {vector.max()}, which {_TOO_LARGE}")
    return vector.astype(np.int64)


def int_matrix(values: npt.ArrayLike, name: str) -> npt.NDArray[np.integer[Any]]:
    """`values` as an array of integers of two dimensions, without a copy where it is an array in host memory."""
    return _int_array(values, name, 2, "two dimensions")


def _int_array(values: npt.ArrayLike, name: str, ndim: int, dimensions: str) -> npt.NDArray[np.integer[Any]]:
    given = host_array(values, name)
    if given.ndim != ndim:
        raise ValueError(f"{name} has shape {given.shape}, expected {dimensions}")
    if not given.size:
        return given.astype(np.int64)  # NumPy makes [] float64
    if given.dtype.kind not in "iu":
        raise TypeError(f"{name} is {given.dtype}, expected integers")
    return given


def host_array(values: Any, name: str) -> npt.NDArray[Any]:
    """`values` as an array in host memory, of whatever type; not what NumPy would take with a mask or bools lost."""
    is_list = isinstance(values, (list, tuple))
    kinds = {type(values), *map(type, values if is_list else ())}
    if any(issubclass(kind, np.ma.MaskedArray) for kind in kinds):
        raise TypeError(f"{name} is masked, expected an array without a mask, which would be ignored")
    try:
        made = np.asarray(values)
    except ValueError as error:
        problem = "has rows of different lengths, expected a rectangle" if is_list else f"cannot be read: {error}"
        raise ValueError(f"{name} {problem}") from error
    except (TypeError, RuntimeError) as error:  # say, an array on a GPU, a deleted one, or one of bfloat16
        expected = "an array in host memory that NumPy can read"
        raise TypeError(f"{name} is {type(values).__name__}, expected {expected}: {error}") from error
    if made.dtype.kind in "iu" and not hasattr(values, "__array__"):
        entries = np.asarray(values, object).ravel().tolist()
        if not {bool, np.bool_}.isdisjoint(map(type, entries)):
            raise TypeError(f"{name} holds a bool, expected integers")
    return made


def flat_int64(values: list[Any], name: Callable[[int], str]) -> Int64Array:
    """int64 vector of a list of Python integers; ``name(k)`` is what a message calls entry k."""
    if not _all_ints(values):
        k = next(k for k, v in enumerate(values) if not _all_ints([v]))
        raise TypeError(f"{name(k)} is {values[k]!r}, expected an integer")
    try:
        return np.frombuffer(array("q", values), np.int64)  # three times as fast as np.array(values)
    except OverflowError:
        k = next(k for k, v in enumerate(values) if not -(2**63) <= v < 2**63)
        raise ValueError(f"{name(k)} is {values[k]}, which {_TOO_LARGE}") from None


def _all_ints(values: Iterable[object]) -> bool:
    """Whether all are integers (NumPy's too, bool not); looks at each type once."""
    return all(issubclass(t, (int, np.integer)) and t is not bool for t in set(map(type, values)))
