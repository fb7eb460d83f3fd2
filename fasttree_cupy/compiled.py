"""Functions that Numba compiles, cached on disk where there is a place for that: what all modules declare them with.

A cache is compared with its function's own file alone. Two things follow for whoever edits compiled functions:

- One that calls a function, or reads a number, of another file keeps the old one when that file changes. Remove the
  caches then: ``find fasttree_cupy -name "*.nb?" -delete``.
- A cache is unpickled before it is compared, so a NamedTuple that compiled functions take must be found under its old
  module and name, or old caches raise AttributeError in every call. One that moves leaves its name behind, as
  ``_Layout`` of ``planning/subtree.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar, overload

import numba

__all__ = ["cached", "njit"]

Function = TypeVar("Function", bound=Callable[..., Any])


def cached(compiler: Callable[..., Any], function: Callable[..., Any]) -> Any:
    """What one of Numba's decorators makes of a function, cached where that can be.

    Numba refuses to cache where neither the folder of the function's file nor one of the user can be written.

    Parameters
    ----------
    compiler : callable
        Takes ``cache``, and returns a decorator.
    function : callable
        What to compile.
    """
    try:
        return compiler(cache=True)(function)
    except RuntimeError:
        return compiler(cache=False)(function)


@overload
def njit(function: Function) -> Function: ...
@overload
def njit(**options: Any) -> Callable[[Function], Function]: ...
def njit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``numba.njit`` with a cache where that can be."""
    if function is None:
        return partial(njit, **options)
    return cached(partial(numba.njit, **options), function)
