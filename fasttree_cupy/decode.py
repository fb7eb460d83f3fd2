"""Decoding: check the arguments, choose the backend by where the arrays lie, run stage 1 and stage 2."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

from fasttree_cupy.checks import (
    check_contiguous,
    check_inputs,
    check_output,
    check_same,
    check_writable,
    checked_cap,
    checked_float,
)
from fasttree_cupy.execution import arrays, cpu, cuda, stages, streams
from fasttree_cupy.execution.arrays import ArrayView
from fasttree_cupy.execution.operands import Operands
from fasttree_cupy.integers import checked_pair
from fasttree_cupy.metadata import UNKNOWN_LENGTHS, MetadataTuple, Phase, PhaseNodeNums

__all__ = ["fasttree_decode"]

INPUT_NAMES = ("q", "k_buffer", "v_buffer")
GAPS = (*INPUT_NAMES, "o")
"""What may be named although positional arguments follow."""
ARRAY_NAMES = MetadataTuple._fields[:11]
MID_NAMES = ("mid_o", "mid_lse")
MOST_KV_HEADS = 65535
"""Second dimension of a CUDA grid."""
MID_ALIGNMENT = 16
"""Bytes: the kernels read partial outputs in pieces of this size."""


def fills_gaps(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let positional arguments leave out those of q, k_buffer, v_buffer and o that keywords name.

    The API reference calls ``fasttree_decode(q=q, ..., o=o, *metadata, phase_q_tile_sizes=...)``. Python hands the 13
    metadata values over as the first positional arguments, where they would clash with these four.
    """
    code = function.__code__
    names = code.co_varnames[: code.co_argcount]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        free = [name for name in names if name not in kwargs or name not in GAPS]
        if len(args) > len(free):
            raise TypeError(
                f"{function.__name__}() takes {len(names)} positional arguments, "
                f"got {len(args)} and {len(names) - len(free)} of them by keyword as well"
            )
        return function(**dict(zip(free, args, strict=False)), **kwargs)

    return call


@fills_gaps
def fasttree_decode(
    q: Any,
    k_buffer: Any,
    v_buffer: Any,
    o: Any,
    vnode_to_kv_entries: Any,
    vnode_to_kv_offs: Any,
    vnode_to_kv_lens: Any,
    vnode_to_q_entries: Any,
    vnode_to_q_offs: Any,
    vnode_to_q_lens: Any,
    req_to_vnode_entries: Any,
    req_to_vnode_offs: Any,
    req_to_vnode_lens: Any,
    mid_o: Any,
    mid_lse: Any,
    phase_node_nums: Any,
    phase_node_offsets: Any,
    phase_q_tile_sizes: Any,
    phase_kv_tile_sizes: Any,
    sm_scale: float,
    logit_cap: float = -1,
    *,
    stream: Any = None,
    kernel: str = "auto",
) -> Any:
    """Attend every request to the tokens on its path, and write the result to ``o``.

    That is ``softmax(cap(sm_scale * q k^T)) v`` over these tokens, where ``cap`` is that of `logit_cap`.

    All arrays lie on one device, a GPU or the CPU, and that is where the work runs. They may come from NumPy, CuPy,
    torch, JAX or any library with ``__dlpack__``; nothing is copied. On a GPU the call only queues work.

    Parameters
    ----------
    q : array, float16 or bfloat16, shape (batch_size, num_qo_heads, head_dim)
        One query a request. Any strides, the last axis contiguous; so too ``k_buffer``, ``v_buffer`` and ``o``.
    k_buffer, v_buffer : array, dtype of q, shape (total_tokens, num_kv_heads, head_dim)
        Keys and values, node i's tokens in rows ``KV_ptrs[i]`` to ``KV_ptrs[i + 1]``. Query head h uses KV head
        ``h // (num_qo_heads // num_kv_heads)``.
    o : array, dtype and shape of q, or None
        Written in place. None: a new array of q's framework is returned.
    vnode_to_kv_entries, ..., phase_node_offsets
        The 13 values of `MetadataTuple`, from `fasttree_preparation` on the same device. ``mid_o`` and ``mid_lse`` are
        written too.
    phase_q_tile_sizes, phase_kv_tile_sizes : sequence of 2 int
        ``params.TSQs`` and ``params.TSKs`` after preparation. They guide the CUDA kernels; any sizes give the same
        result. The KV tile of the CUDA kernels is their own choice.
    sm_scale : float
        Factor of the scores, usually ``head_dim ** -0.5``.
    logit_cap : float
        Soft cap where positive: a score becomes ``logit_cap * tanh(score / logit_cap)``.
    stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, optional
        CUDA stream to work on. By default the caller's current one: torch's for torch tensors, else CuPy's. Another one
        first waits for the current one; that the current one waits for it before it uses ``o`` is the caller's part.
    kernel : {"auto", "mma", "plain"}
        Stage-1 kernel on a GPU. ``"mma"``: tensor cores, from compute capability 8.0, rows that start at multiples of
        16 bytes. ``"plain"``: any GPU from 7.0, any strides, slower. ``"auto"``: the first that is possible.

    Returns
    -------
    None or array
        The new array where ``o`` is None.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it, and nothing was written. On a GPU the *contents* of the index
        arrays are not checked, which would need a device synchronisation.
    """
    metadata = {
        "vnode_to_kv_entries": vnode_to_kv_entries,
        "vnode_to_kv_offs": vnode_to_kv_offs,
        "vnode_to_kv_lens": vnode_to_kv_lens,
        "vnode_to_q_entries": vnode_to_q_entries,
        "vnode_to_q_offs": vnode_to_q_offs,
        "vnode_to_q_lens": vnode_to_q_lens,
        "req_to_vnode_entries": req_to_vnode_entries,
        "req_to_vnode_offs": req_to_vnode_offs,
        "req_to_vnode_lens": req_to_vnode_lens,
        "mid_o": mid_o,
        "mid_lse": mid_lse,
    }
    phases = check_phases(phase_node_nums, phase_node_offsets, phase_q_tile_sizes, phase_kv_tile_sizes)
    scale = checked_float(sm_scale, "sm_scale")
    cap = checked_cap(logit_cap)
    if not isinstance(kernel, str) or kernel not in cuda.KERNELS:
        raise ValueError(f"kernel is {kernel!r}, expected one of {', '.join(map(repr, cuda.KERNELS))}")
    device = arrays.device_of("q", q)
    if device[0] == "cpu" and (stream is not None or kernel != "auto"):
        name, value = ("stream", stream) if stream is not None else ("kernel", kernel)
        raise ValueError(f"{name} is {value!r}, but q lies on the CPU, expected {name} left out")

    with streams.use_device(device[1]) if device[0] == "cuda" else nullcontext():
        work = None
        if device[0] == "cuda":
            work = streams.WorkStream.of(stream, arrays.framework_of(q), device[1])
        inputs = {"q": q, "k_buffer": k_buffer, "v_buffer": v_buffer}
        views = {name: arrays.view(name, array, work) for name, array in inputs.items()}
        views |= {name: arrays.view(name, array) for name, array in metadata.items()}
        check_inputs({name: views[name] for name in INPUT_NAMES})
        check_metadata(views, phases)
        if o is not None:
            views["o"] = arrays.view("o", o, work)
            check_output(views["o"], views["q"])
        if work is None:
            cpu.check_indices(numpy_metadata(views, phases), views["k_buffer"].shape[0], views["q"].shape[0])
        else:
            kernel = cuda.check_kernel(kernel, {name: views[name] for name in INPUT_NAMES})

        # Every check has passed: from here on memory is written.
        if o is None:
            result = arrays.empty(views["q"].shape, views["q"].dtype, views["q"])
            views["o"] = arrays.view("o", result, work)
        operands = Operands(views["q"], views["k_buffer"], views["v_buffer"], views["o"], scale, cap)
        run(views, operands, phases, kernel, work)
        if o is not None:
            return None
        with nullcontext() if work is None else work.launches():
            return arrays.hand_back(result, views["q"])


def run(
    views: Mapping[str, ArrayView],
    operands: Operands,
    phases: Phases,
    kernel: str,
    stream: streams.WorkStream | None,
) -> None:
    """Run the backend: CUDA on a stream, the CPU where there is none."""
    if stream is None:
        cpu.run(operands, numpy_metadata(views, phases))
        return
    metadata = [views[name] for name in ARRAY_NAMES]
    columns = (phases.node_offsets, phases.node_nums, phases.q_tile_sizes, phases.longest_vnodes)
    stages.decode(operands, metadata, list(map(Phase, *columns)), kernel, stream)
    stream.keep_borrowed([*operands[:4], *metadata])


class Phases(NamedTuple):
    """What decode needs of the pairs of integers: vnodes, first vnode, query tile size, longest vnode of each phase."""

    node_nums: list[int]
    node_offsets: list[int]
    q_tile_sizes: list[int]
    num_tokens: int | None
    """Rows that K and V must have; None where ``phase_node_nums`` does not say."""
    longest_vnodes: tuple[int, int]


def check_phases(node_nums: Any, node_offsets: Any, q_tile_sizes: Any, kv_tile_sizes: Any) -> Phases:
    """Check the pairs of integers by themselves."""
    checked_pair(kv_tile_sizes, "phase_kv_tile_sizes")
    known = node_nums if isinstance(node_nums, PhaseNodeNums) else None
    return Phases(
        checked_pair(node_nums, "phase_node_nums", least=0),
        checked_pair(node_offsets, "phase_node_offsets", least=0),
        checked_pair(q_tile_sizes, "phase_q_tile_sizes"),
        None if known is None else known.num_tokens,
        UNKNOWN_LENGTHS if known is None else known.longest_vnodes,
    )


def check_metadata(views: Mapping[str, ArrayView], phases: Phases) -> None:
    """Check dtypes, shapes and devices of the metadata arrays, and the phases against them."""
    q, k = views["q"], views["k_buffer"]
    for name in ARRAY_NAMES:
        view = views[name]
        check_same(name, "dtype", view.dtype, "float32" if name in MID_NAMES else "int32")
        check_same(name, "device", view.device, q.device)
        if name not in MID_NAMES and len(view.shape) != 1:
            raise ValueError(f"{name} has shape {view.shape}, expected one dimension")
        check_contiguous(name, view)
    num_vnodes = views["vnode_to_kv_offs"].shape
    for name in ("vnode_to_kv_lens", "vnode_to_q_offs", "vnode_to_q_lens"):
        check_same(name, "shape", views[name].shape, num_vnodes)
    for name in ("req_to_vnode_offs", "req_to_vnode_lens"):
        check_same(name, "shape", views[name].shape, q.shape[:1])
    partials = views["vnode_to_q_entries"].shape
    check_same("req_to_vnode_entries", "shape", views["req_to_vnode_entries"].shape, partials)
    check_same("mid_o", "shape", views["mid_o"].shape, partials + q.shape[1:])
    check_same("mid_lse", "shape", views["mid_lse"].shape, partials + q.shape[1:2])
    for name in MID_NAMES:
        check_writable(name, views[name])
    if q.device[0] == "cuda" and k.shape[1] > MOST_KV_HEADS:
        raise ValueError(f"k_buffer has {k.shape[1]} heads, expected at most {MOST_KV_HEADS} on a GPU")
    if q.device[0] == "cuda" and views["mid_o"].pointer % MID_ALIGNMENT:
        raise ValueError(
            f"mid_o starts at address {views['mid_o'].pointer:#x}, expected a multiple of {MID_ALIGNMENT} bytes"
        )
    check_ranges(phases, num_vnodes[0])
    if phases.num_tokens is not None and k.shape[0] != phases.num_tokens:
        raise ValueError(
            f"k_buffer has {k.shape[0]} tokens, expected {phases.num_tokens} as the tree of phase_node_nums has"
        )


def check_ranges(phases: Phases, num_vnodes: int) -> None:
    """Check that the phases hold each vnode once: one left out would leave in mid_o what it held before."""
    ranges = sorted((first, count) for first, count in zip(phases.node_offsets, phases.node_nums, strict=True) if count)
    ends = [first + count for first, count in ranges]
    if [*(first for first, _ in ranges), num_vnodes] != [0, *ends]:
        raise ValueError(
            f"phase_node_nums is {phases.node_nums} and phase_node_offsets is {phases.node_offsets}, "
            f"expected ranges that hold each of the {num_vnodes} vnodes once"
        )


def numpy_metadata(views: Mapping[str, ArrayView], phases: Phases) -> MetadataTuple:
    """The metadata as NumPy arrays over the caller's memory."""
    columns = [arrays.as_numpy(views[name]) for name in ARRAY_NAMES]
    return MetadataTuple._make([*columns, phases.node_nums, phases.node_offsets])
