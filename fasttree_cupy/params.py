"""Parameters of the planning heuristic, and the tables of tile sizes and thresholds a GPU."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Any

import numpy as np

from fasttree_cupy.integers import checked_int, checked_pair

__all__ = ["PRESETS", "FastTreeParams", "GpuPreset", "checked_heads", "preset"]

# Ranges that the API reference recommends; outside them a value warns and is taken.
_RECOMMENDED = {
    "alpha": (0.0, 1.0),
    "beta": (0.0, 1.0),
    "gamma": (0.0, 0.3),
    "TSQs": (4, 128),
    "TSKs": (16, 256),
}


_CLASS_VALUE: Any = ...
"""Stands for an argument that is not given: the class, which may be a subclass, has its value."""


class _Adopted(list[int]):
    """Tile sizes that this package chose: setting them does not warn, nor does setting a copy."""


@dataclass(init=False)
class FastTreeParams:
    """Cost weights and tile sizes, checked whenever one is set.

    Attributes
    ----------
    alpha : float
        Cost of padding a query tile; recommended 0 to 1.
    beta : float
        Cost of padding a KV tile; recommended 0 to 1.
    gamma : float
        Cost of reducing one more partial output; recommended 0 to 0.3.
    TSQs : list of 2 int
        Query tile sizes ``[phase 0, phase 1]`` in requests, the first no smaller than the second. Phase 0
        takes the vnodes of more than ``TSQs[1]`` requests. Recommended for phase 0: 4 to 128.
    TSKs : list of 2 int
        KV tile sizes ``[phase 0, phase 1]`` in tokens; recommended 16 to 256.
    kv_group_num : int
        Query heads that share one KV head.

    Notes
    -----
    Setting a value that is not a finite number, or not a pair of positive integers, raises TypeError or
    ValueError; a value outside its recommended range gives a UserWarning; an unknown name raises
    AttributeError. Lists are copied. ``fasttree_preparation`` may replace ``TSQs`` and ``TSKs`` by the tile
    sizes that it adopted. Arguments left out are the attributes of the class; a subclass may have others.

    The heuristic is that of FastTree (MLSys 2025). From the root down it compares, for each child of a node, two ways
    to attend to the node's tokens, those that it took along from its ancestors among them: on their own
    (Split-K), or again by the child's requests together with its own tokens (Split-Q). With n, t the requests and
    tokens of the node and m, s those of the child, Split-Q is chosen where ::

        cost(n, t) + cost(m, s) + gamma * m  >  cost(n - m, t) + cost(m, s + t)

    and n then counts m requests fewer for the children that follow. The cost of q requests that attend to l tokens
    is that of padding them to the tiles of their phase p, 0 where ``q > TSQs[1]``, else 1::

        cost(q, l) = kv_group_num * (alpha * pad_q * l + beta * pad_l * q)
        pad_q = -q % TSQs[p]
        pad_l = max(0, TSKs[p] - l)
    """

    alpha: float = 0.66
    beta: float = 0.33
    gamma: float = 0.1
    TSQs: list[int] = (64, 16)  # type: ignore[assignment]  # an instance has a list of its own
    TSKs: list[int] = (32, 128)  # type: ignore[assignment]
    kv_group_num: int = 1

    def __init__(
        self,
        alpha: float = _CLASS_VALUE,
        beta: float = _CLASS_VALUE,
        gamma: float = _CLASS_VALUE,
        TSQs: Sequence[int] = _CLASS_VALUE,
        TSKs: Sequence[int] = _CLASS_VALUE,
        kv_group_num: int = _CLASS_VALUE,
    ) -> None:
        given = (alpha, beta, gamma, TSQs, TSKs, kv_group_num)
        for name, value in zip(_CHECKED_NAMES, given, strict=True):
            setattr(self, name, getattr(type(self), name) if value is _CLASS_VALUE else value)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in _CHECKED_NAMES:
            raise AttributeError(f"FastTreeParams has no attribute {name!r}, only {', '.join(_CHECKED_NAMES)}")
        checked = _checked(name, value)
        _warn_outside_recommended(name, checked)
        object.__setattr__(self, name, checked)

    def __setstate__(self, state: dict[str, object]) -> None:
        """Restore a copied or pickled state: about its values there was a warning when they were set."""
        for name, value in state.items():
            object.__setattr__(self, name, _checked(name, value))

    @classmethod
    def for_gpu(cls, name: str, kv_group_num: int = 1) -> FastTreeParams:
        """Parameters with the tile sizes that suit a GPU and a GQA group.

        Parameters
        ----------
        name : str
            A name in ``PRESETS``, in upper or lower case.
        kv_group_num : int
            Query heads that share one KV head.

        Raises
        ------
        TypeError, ValueError
            There is no preset of this name, or `kv_group_num` is no positive integer.
        """
        chosen = preset(name)
        params = cls(kv_group_num=kv_group_num)
        params.adopt_tile_sizes(chosen.q_tile_sizes(params.kv_group_num), chosen.kv_tile_sizes)
        return params

    def set_values(self, alpha: float, beta: float, gamma: float) -> None:
        """Set the three cost weights; none is set where one is refused.

        Parameters
        ----------
        alpha, beta, gamma : float
            See the class.

        Raises
        ------
        TypeError, ValueError
            One is no number, or not finite.

        Warns
        -----
        UserWarning
            One is outside its recommended range.
        """
        values = {"alpha": alpha, "beta": beta, "gamma": gamma}
        for name, value in values.items():
            _checked(name, value)
        for name, value in values.items():
            setattr(self, name, value)

    def set_kv_group_num(self, kv_group_num: int) -> None:
        """Set the number of query heads that share one KV head.

        Parameters
        ----------
        kv_group_num : int
            Query heads that share one KV head.

        Raises
        ------
        TypeError, ValueError
            It is no positive integer.
        """
        self.kv_group_num = kv_group_num

    def set_q_tile_sizes(self, TSQs: Sequence[int]) -> None:
        """Set the query tile sizes of both phases.

        Parameters
        ----------
        TSQs : sequence of 2 int
            ``[phase 0, phase 1]`` in requests, the first no smaller than the second.

        Raises
        ------
        TypeError, ValueError
            They are no such integers, or not positive.

        Warns
        -----
        UserWarning
            The first is outside its recommended range.
        """
        self.TSQs = TSQs  # type: ignore[assignment]  # any sequence is copied into a list

    def set_kv_tile_sizes(self, TSKs: Sequence[int]) -> None:
        """Set the KV tile sizes of both phases.

        Parameters
        ----------
        TSKs : sequence of 2 int
            ``[phase 0, phase 1]`` in tokens.

        Raises
        ------
        TypeError, ValueError
            They are not two positive integers.

        Warns
        -----
        UserWarning
            One is outside the recommended range.
        """
        self.TSKs = TSKs  # type: ignore[assignment]  # any sequence is copied into a list

    def adopt_tile_sizes(self, TSQs: Sequence[int], TSKs: Sequence[int]) -> None:
        """Set all tile sizes without a warning: for sizes that this package chose itself.

        Parameters
        ----------
        TSQs, TSKs : sequence of 2 int
            See the class.

        Raises
        ------
        TypeError, ValueError
            As setting them would; neither is set.
        """
        q_tiles, kv_tiles = _Adopted(_tile_sizes(TSQs, "TSQs")), _Adopted(_tile_sizes(TSKs, "TSKs"))
        self.TSQs, self.TSKs = q_tiles, kv_tiles

    def check(self) -> None:
        """Check all values again: the lists of tile sizes can be changed in place.

        Raises
        ------
        TypeError, ValueError
            As setting the value would.
        """
        for name in _CHECKED_NAMES:
            _checked(name, getattr(self, name))


_CHECKED_NAMES = tuple(f.name for f in fields(FastTreeParams))


def _checked(name: str, value: object) -> float | int | list[int]:
    """`value` as the attribute `name` holds it; raises TypeError or ValueError."""
    if name == "kv_group_num":
        return checked_int(value, name)
    if name in ("TSQs", "TSKs"):
        return _tile_sizes(value, name)
    return _finite_float(value, name)


def _finite_float(value: object, name: str) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer too large
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{name} is {value!r}, expected a finite number")
    return number


def checked_heads(num_qo_heads: int, num_kv_heads: int) -> tuple[int, int]:
    """Both head counts as Python integers; TypeError or ValueError where the first is no multiple of the second."""
    heads, kv_heads = checked_int(num_qo_heads, "num_qo_heads"), checked_int(num_kv_heads, "num_kv_heads")
    if heads % kv_heads:
        raise ValueError(f"num_qo_heads is {heads}, expected a multiple of num_kv_heads, {kv_heads}")
    return heads, kv_heads


def _tile_sizes(value: object, name: str) -> list[int]:
    sizes = checked_pair(value, name)
    if name == "TSQs" and sizes[0] < sizes[1]:
        raise ValueError(f"TSQs is {sizes}, expected TSQs[0] >= TSQs[1]")
    return _Adopted(sizes) if isinstance(value, _Adopted) else sizes


def _warn_outside_recommended(name: str, value: float | int | list[int]) -> None:
    if name not in _RECOMMENDED or isinstance(value, _Adopted):
        return
    low, high = _RECOMMENDED[name]
    # The second query tile size may be small: the tables recommend down to 1.
    looked_at = value[: 1 if name == "TSQs" else 2] if isinstance(value, list) else [value]
    if any(not low <= number <= high for number in looked_at):
        which = "TSQs[0]" if name == "TSQs" else name
        warnings.warn(
            f"{name} is {value}; the recommended range of {which} is {low} to {high}",
            UserWarning,
            stacklevel=_callers_stacklevel(),
        )


def _callers_stacklevel() -> int:
    """The stacklevel, seen from the function that warns, of the first frame outside this module.

    A plain assignment, a setter and the constructor are at different depths.
    """
    level = 1
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__") == __name__:
        frame = frame.f_back
        level += 1
    return level


@dataclass(frozen=True)
class GpuPreset:
    """Recommended sizes for one kind of GPU.

    Attributes
    ----------
    name : str
    q_tiles_by_group : mapping of int to (int, int)
        Query tile sizes for the GQA groups in the published table.
    q_tile_rows : (int, int)
        Rows (requests x group) of a query tile of each phase: what other groups keep constant.
    kv_tile_sizes : (int, int)
    para_threshs1, para_threshs2 : (int, int)
        Thresholds of parallelism, see ``fasttree_preparation``.
    kv_split_sizes : (int, int)
        The KV split size to begin with and the reduced one.
    """

    name: str
    q_tiles_by_group: Mapping[int, tuple[int, int]]
    q_tile_rows: tuple[int, int]
    para_threshs1: tuple[int, int]
    para_threshs2: tuple[int, int]
    kv_tile_sizes: tuple[int, int] = (32, 128)
    kv_split_sizes: tuple[int, int] = (1024, 128)

    def q_tile_sizes(self, kv_group_num: int) -> tuple[int, int]:
        """Query tile sizes ``(phase 0, phase 1)`` for a GQA group.

        Parameters
        ----------
        kv_group_num : int
            Query heads that share one KV head.

        Raises
        ------
        TypeError, ValueError
            It is no positive integer.
        """
        group = checked_int(kv_group_num, "kv_group_num")
        if group in self.q_tiles_by_group:
            return self.q_tiles_by_group[group]
        return max(1, self.q_tile_rows[0] // group), max(1, self.q_tile_rows[1] // group)


PRESETS: Mapping[str, GpuPreset] = MappingProxyType(
    {
        gpu.name: gpu
        for gpu in (
            GpuPreset("H100", {1: (64, 16), 4: (16, 4), 8: (8, 2)}, (64, 16), (132, 528), (132, 132)),
            GpuPreset("A100", {1: (48, 12), 4: (16, 4), 8: (8, 2)}, (64, 16), (100, 400), (100, 100)),
            GpuPreset("V100", {1: (32, 8), 4: (8, 2), 8: (4, 1)}, (32, 8), (80, 320), (80, 80)),
        )
    }
)


def preset(name: str) -> GpuPreset:
    """The preset of a GPU by its name.

    Parameters
    ----------
    name : str
        A name in ``PRESETS``, in upper or lower case.

    Raises
    ------
    TypeError
        `name` is no string.
    ValueError
        There is no preset of this name.
    """
    if not isinstance(name, str):
        raise TypeError(f"name is {name!r}, expected one of {', '.join(PRESETS)}")
    if name.upper() not in PRESETS:
        raise ValueError(f"name is {name!r}, expected one of {', '.join(PRESETS)}; an H200 uses H100")
    return PRESETS[name.upper()]
