"""Functions that Numba compiles, cached on disk where there is a place for that: what all modules declare them with."""

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
