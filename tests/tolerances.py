"""How far a result may be from the float64 reference, and the comparison that every test uses."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["BOUNDS", "assert_close"]

# Relative Frobenius error. Rounding the result alone costs about 2e-4 in float16 and 1.7e-3 in bfloat16.
BOUNDS = {"float16": 5e-4, "bfloat16": 4e-3, "float32": 1e-5}


def assert_close(actual: Any, expected: Any, dtype: Any, what: str = "o") -> None:
    """Fail unless `actual` is within the bound of `dtype` of `expected`; NaN never passes.

    Infinities must stand at the same positions with the same signs. NumPy and CuPy arrays are taken.
    """
    a, e = _float64(actual), _float64(expected)
    name = np.dtype(dtype).name
    assert a.shape == e.shape, f"{what} has shape {a.shape}, expected {e.shape}"
    _assert_nowhere(np.isnan(e), a, e, f"the expected {what} is NaN")
    _assert_nowhere(np.isnan(a), a, e, f"{what} is NaN")
    _assert_nowhere((np.isinf(a) | np.isinf(e)) & (a != e), a, e, f"{what} and its reference differ in an inf")

    finite = np.isfinite(e)
    difference = np.where(finite, a, 0) - np.where(finite, e, 0)
    norm = np.linalg.norm(np.where(finite, e, 0))
    error = np.linalg.norm(difference) / norm if norm > 0 else np.linalg.norm(difference)
    worst = np.unravel_index(np.argmax(np.abs(difference)), e.shape) if e.size else ()
    text = f"{what}: relative Frobenius error {error:.3e}, bound {BOUNDS[name]:.1e} ({name})"
    if e.size:
        text += f"; worst at {tuple(map(int, worst))}: {a[worst]:.6g}, expected {e[worst]:.6g}"
    print(text)
    assert error <= BOUNDS[name], text


def _float64(array: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    host = array.get() if hasattr(array, "get") else np.asarray(array)
    return host.astype(np.float64)


def _assert_nowhere(bad: Any, a: Any, e: Any, text: str) -> None:
    if bad.any():
        first = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{text} at {int(bad.sum())} of {bad.size} positions, the first {first}: {a[first]}, expected {e[first]}"
        )
