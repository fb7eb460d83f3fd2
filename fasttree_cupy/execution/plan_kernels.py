"""The kernels of a plan, ``tree_decode`` and ``tree_decode_sm90``: fills their parameter structs and launches them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from .cuda import is_aligned, kernel_scales, pointer_of
from .kernels import tree_decode_config, worker_config
from .launch import Launch, Relaunch, packed, prepare
from .stages import launch_stage2
from .tensor_map import TENSOR_MAP_BYTES, map_words, tensor_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .operands import Operands
    from .streams import WorkStream

__all__ = ["run_items", "run_workers"]

NO_FIELDS = (0,) * 13
"""What fills `WORK_PARAMS` up to the tensor maps, which begin at a multiple of 64 bytes."""

# Field by field the structs of plan.cuh and work.cuh under cuda_src.
TREE_DECODE_POINTERS = ("q", "k", "v", "o", "mid_o", "mid_lse", "lse", "items", "segments", "request_order")
TREE_DECODE_PARAMS = np.dtype(
    [(name, np.uint64) for name in TREE_DECODE_POINTERS]
    + [(name, np.int64) for name in ("q_request", "q_head", "k_token", "k_head", "v_token", "v_head")]
    + [(name, np.int64) for name in ("o_request", "o_head")]
    + [("kv_heads", np.int32), ("group", np.int32), ("sm_scale", np.float32), ("logit_cap", np.float32)]
    + [("o_aligned", np.int32), ("v_scale", np.float32), ("k_scales", np.uint64), ("v_scales", np.uint64)]
)
WORK_POINTERS = ("q", "k", "v", "o", "mid_o", "mid_lse", "lse", "counters", "items", "segments", "request_order")
WORK_PARAMS = np.dtype(
    [(name, np.uint64) for name in WORK_POINTERS]
    + [(name, np.int64) for name in ("q_request", "q_head", "k_token", "k_head", "v_token", "v_head")]
    + [(name, np.int64) for name in ("o_request", "o_head")]
    + [("num_segments", np.int32), ("group", np.int32), ("sm_scale", np.float32), ("logit_cap", np.float32)]
    + [("o_aligned", np.int32), ("qo_heads", np.int32), ("polls", np.int32)]
    + [("v_scale", np.float32), ("k_scales", np.uint64), ("v_scales", np.uint64), ("bulk", np.int32)]
    + [(f"padding_{i}", np.int32) for i in range(len(NO_FIELDS))]
    + [(f"{name}_map_{i}", np.uint64) for name in ("k", "v") for i in range(TENSOR_MAP_BYTES // 8)]
)
MERGE_POLLS = 128
"""How often a worker of ``tree_decode_sm90`` looks whether it may merge with others, 0.5 us or more each: workers that
end together need a few, and one that leaves costs nothing but time."""


def run_items(
    operands: Operands,
    mid: Sequence[int],
    lists: Sequence[int],
    num_items: int,
    block_warps: int,
    merge: tuple[Sequence[int], int, int],
    stream: WorkStream,
) -> None:
    """Launch ``tree_decode``, and the merge where there is something to merge, on the current device.

    Parameters
    ----------
    operands : Operands
        Arrays of one CUDA device.
    mid, lists, num_items, block_warps
        See `launch_tree_decode`.
    merge : (sequence of 3 int, int, int)
        Arguments of `launch_stage2`: pointers to its lists, number of merges, pointer to their requests.
    stream : WorkStream
        CUDA stream to launch on.
    """
    with stream.launches():
        launch_tree_decode(operands, mid, lists, num_items, block_warps)
        merge_lists, merges, requests = merge
        if merges > 0:
            launch_stage2(operands, mid, merge_lists, merges, requests)


def launch_tree_decode(
    operands: Operands, mid: Sequence[int], lists: Sequence[int], num_items: int, block_warps: int
) -> None:
    """Run the items of a plan.

    Parameters
    ----------
    operands : Operands
        Arrays of one CUDA device.
    mid : sequence of 2 int
        Pointers to ``mid_o`` and ``mid_lse``.
    lists : sequence of 3 int
        Pointers to the items, the segments and the order of the requests.
    num_items : int
        Number of items.
    block_warps : int
        Warps of a block.
    """
    q, k, v, o, _, logit_cap, lse = operands[:7]
    scales = kernel_scales(operands)
    num_qo_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    pointers = (q.pointer, k.pointer, v.pointer, o.pointer, *mid, pointer_of(lse), *lists)
    strides = (*q.strides[:2], *k.strides[:2], *v.strides[:2], *o.strides[:2])
    numbers = (num_kv_heads, num_qo_heads // num_kv_heads, scales.sm_scale, logit_cap, is_aligned(o), *scales[1:])
    params = packed((*pointers, *strides, *numbers), TREE_DECODE_PARAMS)
    launch = tree_decode_launch(q.dtype, head_dim, block_warps, logit_cap > 0, operands.kv_dtype, q.device[1])
    launch((num_items * num_kv_heads, 1, 1), params)


def run_workers(
    operands: Operands,
    mid: Sequence[int],
    lists: Sequence[int],
    num_segments: int,
    row_groups: int,
    workers: int,
    stream: WorkStream,
) -> Callable[[], Relaunch]:
    """Launch ``tree_decode_sm90`` on the current device.

    Parameters
    ----------
    operands : Operands
        Arrays of one CUDA device.
    mid : sequence of 2 int
        Pointers to the partial outputs and their LSE.
    lists : sequence of 4 int
        Pointers to the counters, the items, the segments and the order of the requests.
    num_segments, row_groups, workers : int
        See `fasttree_cupy.planning.balanced.BalancedPlan`.
    stream : WorkStream
        CUDA stream to launch on.

    Returns
    -------
    callable
        Makes a `Relaunch` of the launch.
    """
    q, k, v, o, _, logit_cap, lse = operands[:7]
    scales = kernel_scales(operands)
    num_qo_heads, head_dim = q.shape[1:]
    pointers = (q.pointer, k.pointer, v.pointer, o.pointer, *mid, pointer_of(lse), *lists)
    strides = (*q.strides[:2], *k.strides[:2], *v.strides[:2], *o.strides[:2])
    numbers = (num_segments, num_qo_heads // k.shape[1], scales.sm_scale, logit_cap, is_aligned(o), num_qo_heads)
    maps = tensor_maps(k, v)
    more = (MERGE_POLLS, *scales[1:], maps is not None, *NO_FIELDS, *map_words(maps, k, v))
    params = packed((*pointers, *strides, *numbers, *more), WORK_PARAMS)
    soft_cap = logit_cap > 0 or scales.sm_scale < 0
    launch = worker_launch(q.dtype, head_dim, row_groups, soft_cap, operands.kv_dtype, q.device[1])
    grid = (workers, 1, 1)
    with stream.launches():
        launch(grid, params)
    return functools.partial(Relaunch, launch, grid, params, maps)


@functools.cache
def worker_launch(
    dtype: str, head_dim: int, row_groups: int, soft_cap: bool, kv_dtype: str | None, _device: int
) -> Launch:
    """``tree_decode_sm90``, ready to launch."""
    return prepare(worker_config(dtype, head_dim, row_groups, soft_cap, kv_dtype))


@functools.cache
def tree_decode_launch(
    dtype: str, head_dim: int, block_warps: int, soft_cap: bool, kv_dtype: str | None, _device: int
) -> Launch:
    """``tree_decode``, ready to launch."""
    return prepare(tree_decode_config(dtype, head_dim, block_warps, soft_cap, kv_dtype))
