"""Stage 1 and stage 2 on CUDA: picks the kernels, fills their parameter structs, launches them."""

from __future__ import annotations

import functools
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .arrays import DTYPES
from .dependent_launch import launch_dependent
from .kernels import (
    MMA_COMPUTE_CAPABILITY,
    STAGE1_SM90_ROWS,
    KernelConfig,
    MmaTile,
    choose_tile,
    load_kernel,
    tree_decode_config,
    worker_config,
    worker_problem,
)
from .tensor_map import TENSOR_MAP_BYTES, tensor_maps

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from fasttree_cupy.metadata import Phase

    from .arrays import ArrayView
    from .operands import Operands
    from .streams import WorkStream

__all__ = [
    "KERNELS",
    "VECTOR_BYTES",
    "Launch",
    "Relaunch",
    "check_kernel",
    "compute_capability",
    "decode",
    "merge_states",
    "mma_problem",
    "multiprocessors",
    "prepare",
    "run_items",
    "run_workers",
]

KERNELS = ("auto", "mma", "plain")
VECTOR_BYTES = 16
"""stage1_mma copies rows of K and V in pieces of this size, so every row must start at a multiple of it."""
MAX_ROW_STRIDE = 2**30
"""The tensor-core kernels count the bytes from one row of K or V to the next in 32 bits."""
PLAIN_ROWS = 4
MERGING_WARPS = 4
"""Warps of a block of ``stage2`` and ``merge_states``."""
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
STAGE2_HEADS, STAGE2_FEW = 4, 64
"""Heads that a warp of ``stage2`` merges at most, and rows a multiprocessor up to which it merges one."""

NO_FIELDS, NO_STAGE1_FIELDS = (0,) * 13, (0,) * 8
"""What fills `WORK_PARAMS` and `STAGE1_SM90_PARAMS` up to the tensor maps, which begin at a multiple of 64 bytes."""

# Field by field the structs of stage1_params.cuh, stage1_vnode.cuh, stage2.cu, plan.cuh and work.cuh under cuda_src.
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
    + [("stride", np.int32), ("bulk", np.int32)]
    + [(f"padding_{i}", np.int32) for i in range(len(NO_STAGE1_FIELDS))]
    + [(f"{name}_map_{i}", np.uint64) for name in ("k", "v") for i in range(TENSOR_MAP_BYTES // 8)]
)
STAGE2_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("mid_o", "mid_lse", "entries", "offs", "lens", "requests", "o", "lse")]
    + [("o_request", np.int64), ("o_head", np.int64)]
    + [("merges", np.int32), ("qo_heads", np.int32), ("o_aligned", np.int32), ("heads", np.int32)]
)
TREE_DECODE_POINTERS = ("q", "k", "v", "o", "mid_o", "mid_lse", "lse", "items", "segments", "request_order")
TREE_DECODE_PARAMS = np.dtype(
    [(name, np.uint64) for name in TREE_DECODE_POINTERS]
    + [(name, np.int64) for name in ("q_request", "q_head", "k_token", "k_head", "v_token", "v_head")]
    + [(name, np.int64) for name in ("o_request", "o_head")]
    + [("kv_heads", np.int32), ("group", np.int32), ("sm_scale", np.float32), ("logit_cap", np.float32)]
    + [("o_aligned", np.int32), ("v_scale", np.float32), ("k_scales", np.uint64), ("v_scales", np.uint64)]
)
WORK_POINTERS = ("q", "k", "v", "o", "mid_o", "mid_lse", "lse", "counters", "items", "segments", "request_order")
POINTER = struct.Struct("=Q")
OPERAND_ADDRESSES = struct.Struct("=4Q")
"""Those of Q, K, V and O, with which `WORK_PARAMS` begins."""
TENSOR_MAP_PAIR = struct.Struct(f"={2 * TENSOR_MAP_BYTES // 8}Q")
"""Those of K and V, with which `WORK_PARAMS` ends."""
NO_TENSOR_MAPS = (0,) * (2 * TENSOR_MAP_BYTES // 8)
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
MERGE_STATES_PARAMS = np.dtype(
    [(name, np.uint64) for name in ("o_a", "o_b", "lse_a", "lse_b", "o", "lse")]
    + [(name, np.int64) for name in ("a_row", "a_head", "b_row", "b_head", "outputs")]
    + [("heads", np.int32), ("padding", np.int32)]
)


@functools.cache
def compute_capability(device: int) -> int:
    """Compute capability of a device times ten: 90 for an H100 or H200."""
    import cupy

    return int(cupy.cuda.Device(device).compute_capability)


@functools.cache
def multiprocessors(device: int) -> int:
    """Multiprocessors of a device."""
    import cupy

    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class KernelScales(NamedTuple):
    """How the kernels take the factors of Q K^T and V."""

    sm_scale: float
    """With the factor of K, where that is a number."""
    v_scale: float
    k_scales: int
    """Pointer to each KV head's factor; 0: none."""
    v_scales: int


def kernel_scales(operands: Operands) -> KernelScales:
    """The factors as the kernels take them."""
    k, v = operands.k_scale, operands.v_scale
    k_number, k_pointer = (k, 0) if isinstance(k, float) else (1.0, k.pointer)
    v_number, v_pointer = (v, 0) if isinstance(v, float) else (1.0, v.pointer)
    return KernelScales(operands.sm_scale * k_number, v_number, k_pointer, v_pointer)


def check_kernel(kernel: str, inputs: Mapping[str, ArrayView]) -> str:
    """Return the stage-1 kernel to run on Q, K and V, ``"mma"`` or ``"plain"``.

    Raises
    ------
    ValueError
        If ``"mma"`` was asked for and the GPU or the strides rule it out.
    """
    if kernel == "plain":
        return kernel
    problem = mma_problem(inputs)
    if problem is None:
        return "mma"
    if kernel == "mma":
        raise ValueError(f"kernel is 'mma', which {problem}")
    return "plain"


def pointer_of(view: ArrayView | None) -> int:
    """Address of an array that may be left out; 0 stands for a null pointer."""
    return 0 if view is None else view.pointer


def is_aligned(view: ArrayView) -> bool:
    """Whether every row starts at a multiple of `VECTOR_BYTES`."""
    (rows, heads), (row, head) = view.shape[:2], view.strides[:2]
    size = DTYPES[view.dtype].itemsize
    # Where there is but one, no address depends on the stride.
    addresses = view.pointer | (size * row if rows > 1 else 0) | (size * head if heads > 1 else 0)
    return addresses % VECTOR_BYTES == 0


def mma_problem(inputs: Mapping[str, ArrayView]) -> str | None:
    """Say why the tensor-core kernels cannot run on Q, K and V, given by name; None where they can."""
    for name, view in inputs.items():
        capability = compute_capability(view.device[1])
        if capability < MMA_COMPUTE_CAPABILITY:
            return f"needs compute capability 8.0 or higher, and this GPU has {capability / 10}"
        if not is_aligned(view):
            return (
                f"needs every row to start at a multiple of {VECTOR_BYTES} bytes, and {name} has strides of "
                f"{view.strides} elements from address {view.pointer:#x}"
            )
        if view.shape[0] > 1 and abs(view.strides[0]) >= MAX_ROW_STRIDE:
            return f"needs row strides below {MAX_ROW_STRIDE} elements, and {name} has strides {view.strides}"
    return None


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
        Stage-1 kernel, from `check_kernel`.
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
    maps = tensor_maps(k, v)
    more = (*grids[0], *grids[1], stride, maps is not None, *NO_STAGE1_FIELDS, *map_words(maps, k, v))
    params = packed((*stage1_values(operands, metadata, 0), *more), STAGE1_SM90_PARAMS)
    soft_cap = logit_cap > 0 or kernel_scales(operands).sm_scale < 0
    stage1_launch("stage1_sm90", q.dtype, q.shape[2], None, soft_cap, None, q.device[1])((total, 1, 1), params)


def map_words(maps: Callable[[int, int], bytes] | None, k: ArrayView, v: ArrayView) -> tuple[int, ...]:
    """What a struct holds of the tensor maps of K and V, zeros where there are none."""
    return NO_TENSOR_MAPS if maps is None else TENSOR_MAP_PAIR.unpack(maps(k.pointer, v.pointer))


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


class Launch(NamedTuple):
    """A kernel that is ready to launch on a device, its block and its dynamic shared memory in bytes."""

    kernel: Any
    block: tuple[int, int, int]
    shared_bytes: int

    def __call__(self, grid: tuple[int, int, int], params: Any) -> None:
        """Launch on CuPy's current stream with the kernel's parameter struct, from `packed`, passed by value."""
        self.kernel(grid, self.block, (params,), shared_mem=self.shared_bytes)


class Relaunch:
    """A launch that was done, to be done again with other addresses of Q, K, V and O, with which its struct begins.

    It ends with the tensor maps of K and V, which `maps` gives for their addresses where there are any.

    `Launch` asks for the device, its kernel, the stream and the type of the parameters each time. Here these stay, and
    the struct too: the caller lets no two threads in at once.
    """

    __slots__ = ("_context", "_current_context", "_function", "_launch", "_maps", "_parameters", "_parameters_at")

    def __init__(
        self, launch: Launch, grid: tuple[int, int, int], params: Any, maps: Callable[[int, int], bytes] | None
    ) -> None:
        from cupy.cuda import driver

        self._current_context = driver.ctxGetCurrent
        self._context = driver.ctxGetCurrent()
        # What cuLaunchKernel takes: a pointer to each parameter. There is one, and it lies right behind its pointer.
        self._parameters = bytearray(POINTER.size) + params.tobytes()
        self._parameters_at = np.frombuffer(self._parameters, np.uint8).ctypes.data
        POINTER.pack_into(self._parameters, 0, self._parameters_at + POINTER.size)
        self._maps = maps
        self._function = launch.kernel.kernel  # keeps its module loaded
        self._launch = functools.partial(
            driver.launchKernel, self._function.ptr, *grid, *launch.block, launch.shared_bytes
        )

    def is_possible(self) -> bool:
        """Whether the calling thread's CUDA context is the launch's, and so its device; a new thread has none yet."""
        return self._current_context() == self._context  # type: ignore[no-any-return]

    def __call__(self, addresses: Sequence[int], stream: WorkStream) -> None:
        """Launch on a stream."""
        OPERAND_ADDRESSES.pack_into(self._parameters, POINTER.size, *addresses)
        if self._maps is not None:
            self._parameters[-2 * TENSOR_MAP_BYTES :] = self._maps(addresses[1], addresses[2])
        self._launch(stream.handle, self._parameters_at, 0)


def packed(values: Sequence[float], fields: np.dtype[Any]) -> Any:
    """A parameter struct as an array without dimensions or fields.

    CuPy asks NumPy for a description of the type, which takes longer for fields than the launch; and NumPy fills fields
    four times slower.
    """
    layout, plain = struct_of(fields)
    return np.ndarray((), plain, bytearray(layout.pack(*values)))


@functools.cache
def struct_of(fields: np.dtype[Any]) -> tuple[struct.Struct, np.dtype[Any]]:
    """The struct of these fields, which leave no gaps, and a dtype of its size without fields."""
    codes = {"u8": "Q", "i8": "q", "i4": "i", "f4": "f"}
    layout = struct.Struct("=" + "".join(codes[fields[name].str[1:]] for name in fields.names or ()))
    return layout, np.dtype((np.void, layout.size))


def prepare(config: KernelConfig) -> Launch:
    """Compile and load a kernel for the current device."""
    return Launch(load_kernel(config), (config.threads, 1, 1), config.shared_bytes)


# A configuration takes longer to build and to hash than its kernel to launch: what is launched each layer is found by
# what decides it, the device among that.


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


@functools.cache
def stage1_launch(
    kernel: str, dtype: str, head_dim: int, tile: MmaTile | None, soft_cap: bool, kv_dtype: str | None, _device: int
) -> Launch:
    """``stage1_mma`` with a tile or ``stage1_plain`` without, ready to launch."""
    return prepare(KernelConfig(kernel, dtype, head_dim, tile, soft_cap=soft_cap, kv_dtype=kv_dtype))


@functools.cache
def stage2_launch(dtype: str, head_dim: int, _device: int) -> Launch:
    """``stage2``, ready to launch."""
    return prepare(KernelConfig("stage2", dtype, head_dim))


@functools.cache
def merge_states_launch(dtype: str, head_dim: int, _device: int) -> Launch:
    """``merge_states``, ready to launch."""
    return prepare(KernelConfig("merge_states", dtype, head_dim))
