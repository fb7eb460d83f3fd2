"""``merge_states``: fills its parameter struct and launches it."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from .cuda import MERGING_WARPS
from .kernels import KernelConfig
from .launch import Launch, packed, prepare

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .arrays import ArrayView
    from .streams import WorkStream

__all__ = ["merge_states"]

# Field by field the struct of merge_states.cu under cuda_src.
MERGE_STATES_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("o_a", "o_b", "lse_a", "lse_b", "o", "lse")]
    + [(name, np.int64) for name in ("a_row", "a_head", "b_row", "b_head", "outputs")]
    + [("heads", np.int32), ("padding", np.int32)]
)


def merge_states(states: Sequence[ArrayView], o: ArrayView, lse: ArrayView, stream: WorkStream) -> None:
    """Launch ``merge_states`` on the current device.

    Parameters
    ----------
    states : sequence of 4 ArrayView
        The two outputs, then their LSE, row-major.
    o, lse : ArrayView
        Where the merged state goes, row-major.
    stream : WorkStream
        CUDA stream to launch on.
    """
    rows, heads, head_dim = o.shape
    if rows * heads == 0:
        return
    pointers = [view.pointer for view in (*states, o, lse)]
    strides = (*states[0].strides[:2], *states[1].strides[:2])
    params = packed((*pointers, *strides, rows * heads, heads, 0), MERGE_STATES_PARAMS)
    launch = merge_states_launch(o.dtype, head_dim, o.device[1])
    with stream.launches():
        launch((-(-rows * heads // MERGING_WARPS), 1, 1), params)


@functools.cache
def merge_states_launch(dtype: str, head_dim: int, _device: int) -> Launch:
    """``merge_states``, ready to launch."""
    return prepare(KernelConfig("merge_states", dtype, head_dim))
