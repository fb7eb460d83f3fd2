"""Stage 1 and stage 2 of the documented functions: picks the kernels, fills their parameter structs, launches them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from .cuda import MERGING_WARPS, compute_capability, is_aligned, kernel_scales, multiprocessors, pointer_of
from .dependent_launch import launch_dependent
from .kernels import STAGE1_SM90_ROWS, KernelConfig, MmaTile, choose_tile, worker_problem
from .launch import Launch, packed, prepare
from .tensor_map import TENSOR_MAP_BYTES, map_words, tensor_maps

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fasttree_cupy.metadata import Phase

    from .arrays import ArrayView
    from .operands import Operands
    from .streams import WorkStream

__all__ = ["decode", "launch_stage2", "stage1_sm90_serves"]

PLAIN_ROWS = 4
MAX_GRID_Z = 65535
STAGE1_SM90_WARPS, STAGE1_SM90_WARP_ROWS = 4, 16
"""Warps of a block of ``stage1_sm90``, and rows that each may take for itself."""
STAGE1_SM90_SHORT, STAGE1_SM90_FEW = 64, 5
"""Where vnodes have more tokens than the first number, and are no more than the second a multiprocessor (each KV head
counted), a block takes one together, not each warp one. bench/NOTES.md has what other numbers than these cost."""
STAGE1_SM90_UNITS = 24
"""Vnodes and KV heads a multiprocessor, counted together as before, for each head that a warp takes of a vnode."""
STAGE1_SM90_SPREAD = 0.6
"""The first part of a launch, over which the blocks of its first phase are spread."""
STAGE1_SM90_READ_ONCE = 350e6
"""Bytes of K and V that vnodes read up to which those of few requests leave the L2 cache first: see `balanced`."""
STAGE2_HEADS, STAGE2_FEW = 4, 64
"""Heads that a warp of ``stage2`` merges at most, and rows a multiprocessor up to which it merges one."""

NO_FIELDS = (0,) * 7
"""What fills `STAGE1_SM90_PARAMS` up to the tensor maps, which begin at a multiple of 64 bytes."""

# Field by field the structs of stage1_params.cuh, stage1_vnode.cuh and stage2.cu under cuda_src.
STAGE1_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("q", "k", "v")]
    + [(name, np.uint64) for name in ("kv_entries", "kv_offs", "kv_lens", "q_entries", "q_offs", "q_lens")]
    + [(name, np.uint64) for name in ("mid_o", "mid_lse")]
    + [(name, np.int64) for name in ("q_request", "q_head", "k_token", "k_head", "v_token", "v_head")]
    + [("first_vnode", np.int32), ("group", np.int32), ("sm_scale", np.float32), ("logit_cap", np.float32)]
    + [("k_scales", np.uint64), ("v_scales", np.uint64), ("v_scale", np.float32), ("kv_heads", np.int32)]
)
STAGE1_SM90_PARAMS = np.dtype(
    [(name, STAGE1_PARAMS[name]) for name in STAGE1_PARAMS.names or ()]
    + [
        (f"{field}_{i}", np.int32)
        for i in range(2)
        for field in ("first_vnode", "vnodes", "row_blocks", "heads", "blocks")
    ]
    + [("stride", np.int32), ("read_once", np.int32), ("bulk", np.int32)]
    + [(f"padding_{i}", np.int32) for i in range(len(NO_FIELDS))]
    + [(f"{name}_map_{i}", np.uint64) for name in ("k", "v") for i in range(TENSOR_MAP_BYTES // 8)]
)
STAGE2_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("mid_o", "mid_lse", "entries", "offs", "lens", "requests", "o", "lse")]
    + [("o_request", np.int64), ("o_head", np.int64)]
    + [("merges", np.int32), ("qo_heads", np.int32), ("o_aligned", np.int32), ("heads", np.int32)]
)


def decode(
    operands: Operands,
    metadata: Sequence[ArrayView],
    phases: Sequence[Phase],
    kernel: str,
    stream: WorkStream,
    requests: tuple[int, int] | None = None,
) -> None:
    """Launch stage 1, once or once a phase, and stage 2, on the current device. All arguments have been checked.

    Parameters
    ----------
    operands : Operands
        Arrays of one CUDA device.
    metadata : sequence of ArrayView
        The first eleven documented metadata arrays, in order.
    phases : sequence of Phase
        Which hold each vnode once.
    kernel : {"mma", "plain"}
        From `check_kernel`: tensor cores, by ``stage1_sm90`` where it serves, or ``stage1_plain``.
    stream : WorkStream
        CUDA stream to launch on.
    requests : (int, int), optional
        Pointer to the requests of the lists of partial outputs, whose rows alone are written, and their number; by
        default all.
    """
    mid = [view.pointer for view in metadata[9:11]]
    lists = [view.pointer for view in metadata[6:9]]
    pointer, merges = (0, operands.o.shape[0]) if requests is None else requests
    most = max(1, operands.q.shape[0])  # a documented tile may be larger than any vnode
    phases = [phase._replace(q_tile_size=min(phase.q_tile_size, most)) for phase in phases if phase.vnodes > 0]
    together = kernel == "mma" and stage1_sm90_serves(operands.q) and len(phases) > 0
    with stream.launches():
        if together:
            launch_stage1_sm90(operands, metadata, phases)
        else:
            for phase in phases:
                launch_stage1(operands, metadata, phase, kernel)
        launch_stage2(operands, mid, lists, merges, pointer, stream.handle if together else None)


def stage1_sm90_serves(q: ArrayView) -> bool:
    """Whether ``stage1_sm90`` can take the place of ``stage1_mma``."""
    return worker_problem(compute_capability(q.device[1]), 1, q.shape[2]) is None


def launch_stage1_sm90(operands: Operands, metadata: Sequence[ArrayView], phases: Sequence[Phase]) -> None:
    """Attend the vnodes of one phase or two in one launch."""
    q, k, v, _, _, logit_cap = operands[:6]
    num_kv_heads = k.shape[1]
    group = q.shape[1] // num_kv_heads
    grids = [stage1_grid(phase, group, num_kv_heads, multiprocessors(q.device[1])) for phase in phases]
    grids += [(0, 0, 0, 1, 0)] * (2 - len(grids))
    total = sum(grid[-1] for grid in grids)
    stride = max(1, int(STAGE1_SM90_SPREAD * total / max(1, grids[0][-1])))
    read_once = 4 * metadata[0].shape[0] * num_kv_heads * q.shape[2] <= STAGE1_SM90_READ_ONCE
    maps = tensor_maps(k, v)
    more = (*grids[0], *grids[1], stride, read_once, maps is not None, *NO_FIELDS, *map_words(maps, k, v))
    params = packed((*stage1_values(operands, metadata, 0), *more), STAGE1_SM90_PARAMS)
    soft_cap = logit_cap > 0 or kernel_scales(operands).sm_scale < 0
    stage1_launch("stage1_sm90", q.dtype, q.shape[2], None, soft_cap, None, q.device[1])((total, 1, 1), params)


def stage1_grid(phase: Phase, group: int, num_kv_heads: int, multiprocessors: int) -> tuple[int, int, int, int, int]:
    """Struct Phase of ``stage1_vnode.cuh``: first vnode, vnodes, blocks of rows, heads a warp, and blocks in all.

    A block takes 64 rows together, or each of its warps 16 rows of some KV heads of another vnode: that where there are
    no more rows, unless vnodes are few and long. Several heads are worth it where vnodes are many and short.
    """
    rows, units = phase.q_tile_size * group, phase.vnodes * num_kv_heads
    is_short = phase.longest <= STAGE1_SM90_SHORT
    if rows > STAGE1_SM90_WARP_ROWS or (units <= STAGE1_SM90_FEW * multiprocessors and not is_short):
        row_blocks = -(-rows // STAGE1_SM90_ROWS)
        return phase.first_vnode, phase.vnodes, row_blocks, 1, units * row_blocks
    heads, most = 1, units // (STAGE1_SM90_UNITS * multiprocessors) if is_short else 1
    while num_kv_heads % (2 * heads) == 0 and 2 * heads <= most:
        heads *= 2
    return phase.first_vnode, phase.vnodes, 0, heads, -(-units // heads // STAGE1_SM90_WARPS)


def stage1_values(operands: Operands, metadata: Sequence[ArrayView], first_vnode: int) -> tuple[float, ...]:
    """What fills `STAGE1_PARAMS`."""
    q, k, v, _, _, logit_cap = operands[:6]
    scales = kernel_scales(operands)
    pointers = (q.pointer, k.pointer, v.pointer, *(view.pointer for view in (*metadata[:6], *metadata[9:11])))
    strides = (*q.strides[:2], *k.strides[:2], *v.strides[:2])
    factors = (scales.sm_scale, logit_cap, scales.k_scales, scales.v_scales, scales.v_scale)
    numbers = (first_vnode, q.shape[1] // k.shape[1], *factors, k.shape[1])
    return (*pointers, *strides, *numbers)


def launch_stage1(operands: Operands, metadata: Sequence[ArrayView], phase: Phase, kernel: str) -> None:
    """Attend the vnodes of one phase."""
    q, k, _, _, _, logit_cap = operands[:6]
    num_qo_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    rows = phase.q_tile_size * (num_qo_heads // num_kv_heads)
    if kernel == "mma":
        tile = choose_tile(rows, phase.vnodes * num_kv_heads, multiprocessors(q.device[1]), head_dim)
        launch = stage1_launch("stage1_mma", q.dtype, head_dim, tile, logit_cap > 0, None, q.device[1])
        row_blocks = -(-rows // tile.rows)
    else:
        launch = stage1_launch("stage1_plain", q.dtype, head_dim, None, logit_cap > 0, operands.kv_dtype, q.device[1])
        row_blocks = -(-rows // PLAIN_ROWS)
    params = packed(stage1_values(operands, metadata, phase.first_vnode), STAGE1_PARAMS)
    # A vnode with more rows than the grid covers is walked in steps: too small a tile size drops no query.
    launch((phase.vnodes, num_kv_heads, min(row_blocks, MAX_GRID_Z)), params)


def launch_stage2(
    operands: Operands,
    mid: Sequence[int],
    lists: Sequence[int],
    merges: int,
    requests: int = 0,
    dependent_on: int | None = None,
) -> None:
    """Merge partial outputs into ``o`` and ``lse``.

    Parameters
    ----------
    operands : Operands
        Of which these two count.
    mid : sequence of 2 int
        Pointers to ``mid_o`` and ``mid_lse``.
    lists : sequence of 3 int
        Pointers to the entries, and each merge's offset and length in them.
    merges : int
        Number of merges.
    requests : int
        Pointer to the request of each merge; 0: request i is merge i.
    dependent_on : int, optional
        Handle of CuPy's current stream where its last kernel lets this one begin before it has ended.
    """
    o = operands.o
    _, num_qo_heads, head_dim = o.shape
    pointers = (*mid, *lists, requests, o.pointer, pointer_of(operands.lse))
    heads = stage2_heads(merges, num_qo_heads, head_dim, multiprocessors(o.device[1]))
    params = packed((*pointers, *o.strides[:2], merges, num_qo_heads, is_aligned(o), heads), STAGE2_PARAMS)
    grid = (-(-merges * num_qo_heads // heads // MERGING_WARPS), 1, 1)
    launch = stage2_launch(o.dtype, head_dim, o.device[1])
    if dependent_on is None or not launch_dependent(*launch, grid, params, dependent_on):
        launch(grid, params)


def stage2_heads(merges: int, num_qo_heads: int, head_dim: int, multiprocessors: int) -> int:
    """Heads that a warp of ``stage2`` merges: kHeads of stage2.cu where there are many rows, else one."""
    heads = STAGE2_HEADS if head_dim <= 128 else STAGE2_HEADS // 2
    few = merges * num_qo_heads <= STAGE2_FEW * multiprocessors
    return 1 if few or num_qo_heads % heads else heads


@functools.cache
def stage1_launch(
    kernel: str, dtype: str, head_dim: int, tile: MmaTile | None, soft_cap: bool, kv_dtype: str | None, _device: int
) -> Launch:
    """A kernel of stage 1, ready to launch; ``stage1_mma`` alone has a tile."""
    return prepare(KernelConfig(kernel, dtype, head_dim, tile, soft_cap=soft_cap, kv_dtype=kv_dtype))


@functools.cache
def stage2_launch(dtype: str, head_dim: int, _device: int) -> Launch:
    """``stage2``, ready to launch."""
    return prepare(KernelConfig("stage2", dtype, head_dim))
