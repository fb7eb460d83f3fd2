"""The compiled passes of an append as one call by addresses.

Numba unpacks an array argument into its fields at each call, which for the 22 arrays of a growing tree and its plan
takes longer than the passes, most of all where the caches hold other things. Here the addresses stand in a table, once.
"""

from __future__ import annotations

import ctypes
from functools import cache, partial
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import carray, cfunc, types  # type: ignore[attr-defined]
from numba.core import cgutils
from numba.extending import intrinsic

from fasttree_cupy.compiled import cached, njit
from fasttree_cupy.planning.growing import GrowingPlan
from fasttree_cupy.planning.growing_passes import PlanState, append_and_count
from fasttree_cupy.planning.growing_tree import GrowingTree, TreeNodes, append_if_room

__all__ = ["REFUSED", "TO_PLAN", "AppendCall"]

REFUSED, TO_PLAN = -1, 2**32 - 1
"""Instead of a number of edits: rows are wrong or too many, and nothing has changed; the tree must be planned anew."""

_NODES, _STATE = len(TreeNodes._fields), len(PlanState._fields)
_SLOTS, _ROWS, _GIVEN, _EDITS = range(_NODES + _STATE, _NODES + _STATE + 4)
_MOST_TOKENS, _MOST_ROWS = range(2 * _EDITS + 2, 2 * _EDITS + 4)
_TABLE = _MOST_ROWS + 1
_EDIT_BITS = 32
"""A call returns the number of edits and, above these bits, the highest of the rows."""


class AppendCall:
    """Appends one token to each live request of a tree and to its plan, until a request forks or ends.

    Parameters
    ----------
    tree, plan
        Which hold their arrays as long as they live.
    edits : int32 (n, 2), C-contiguous
        Where the first of the plan's edits go, as many as fit.
    most_rows : int
        Rows are below this.

    Attributes
    ----------
    rows : int64 (requests,)
        The row of each request's new token, to be filled before a call.
    """

    def __init__(self, tree: GrowingTree, plan: GrowingPlan, edits: npt.NDArray[np.int32], most_rows: int) -> None:
        self.rows = np.zeros(len(tree.live), np.int64)
        arrays: list[npt.NDArray[Any]] = [
            *tree.nodes,
            *plan.state,
            tree.live,
            np.zeros((len(tree.live), 1), np.int32),
            self.rows,
            edits,
        ]
        places = [number for array in arrays for number in (array.ctypes.data, len(array))]
        self._table = np.array([*places, tree.capacity.tokens, most_rows], np.int64)
        self._arrays = arrays  # kept, as the table does not keep them
        self._table_at = self._table.ctypes.data
        self._call = ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_void_p)(_compiled().address)

    def __call__(self) -> tuple[int, int]:
        """Append; returns how many elements of the plan are edited, and the highest row.

        Instead of the former `TO_PLAN`, or `REFUSED`.
        """
        result = self._call(self._table_at)
        return (REFUSED, -1) if result < 0 else (result & TO_PLAN, result >> _EDIT_BITS)


# Compiled passes.


def _typed_pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer."""

    def codegen(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(types.int64), codegen


_pointer: Any = intrinsic(_typed_pointer)


@njit(inline="always")
def _vector(table: Any, i: int, dtype: Any) -> Any:
    return carray(_pointer(table[2 * i]), (table[2 * i + 1],), dtype)


@njit(inline="always")
def _matrix(table: Any, i: int, columns: int) -> Any:
    return carray(_pointer(table[2 * i]), (table[2 * i + 1], columns), np.int32)


def _append(pointer: Any) -> int:
    t = carray(pointer, (_TABLE,))
    given, rows, slots = _vector(t, _GIVEN, np.int64), _matrix(t, _ROWS, 1), _vector(t, _SLOTS, np.int32)
    highest = -1
    for i in range(len(given)):
        if given[i] < 0 or given[i] >= t[_MOST_ROWS]:
            return REFUSED
        highest = max(highest, given[i])
        rows[i, 0] = given[i]
    nodes = TreeNodes(
        _vector(t, 0, np.int32), _vector(t, 1, np.int32), _vector(t, 2, np.int32), _vector(t, 3, np.int32),
        _vector(t, 4, np.int32), _vector(t, 5, np.int32), _vector(t, 6, np.int32), _vector(t, 7, np.int32),
        _vector(t, 8, np.int32), _vector(t, 9, np.int32), _vector(t, 10, np.int64),
    )  # fmt: skip
    state = PlanState(
        _vector(t, 11, np.int32), _vector(t, 12, np.int32), _matrix(t, 13, 2), _vector(t, 14, np.int64),
        _vector(t, 15, np.float64), _matrix(t, 16, 4), _matrix(t, 17, 5), _matrix(t, 18, 2), _matrix(t, 19, 2),
        _vector(t, 20, np.float64), _vector(t, 21, np.int32),
    )  # fmt: skip
    if not append_if_room(nodes, slots, rows, t[_MOST_TOKENS]):
        return REFUSED
    edits, out = append_and_count(state, slots, rows), _matrix(t, _EDITS, 2)
    if edits < 0:
        edits = TO_PLAN
    else:
        first = min(edits, len(out))
        out[:first] = state.edits[:first]
    return highest << _EDIT_BITS | edits


@cache
def _compiled() -> Any:
    """`_append` as a C function. Numba compiles it, or reads it from its cache, where it is declared."""
    signature: Any = types.int64(types.CPointer(types.int64))  # type: ignore[no-untyped-call]
    return cached(partial(cfunc, signature), _append)
