"""Functions of the CUDA driver that CuPy has no call for."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable

__all__ = ["driver_function"]


@functools.cache
def driver_function(name: str) -> Callable[..., int] | None:
    """A function of cuda.h, which returns a CUresult; None where there is no driver, or one that lacks it."""
    for library in ("libcuda.so.1", "nvcuda.dll"):
        try:
            found: Callable[..., int] = getattr(ctypes.CDLL(library), name)
        except (OSError, AttributeError):
            continue
        return found
    return None
