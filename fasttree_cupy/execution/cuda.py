"""What CUDA kernels need to know of a GPU and of their operands: what it can do, what they can take, their factors."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, NamedTuple

from .arrays import DTYPES
from .kernels import MMA_COMPUTE_CAPABILITY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .arrays import ArrayView
    from .operands import Operands

__all__ = [
    "KERNELS",
    "MERGING_WARPS",
    "VECTOR_BYTES",
    "KernelScales",
    "check_kernel",
    "compute_capability",
    "is_aligned",
    "kernel_scales",
    "mma_problem",
    "multiprocessors",
    "pointer_of",
]

KERNELS = ("auto", "mma", "plain")
VECTOR_BYTES = 16
"""The tensor-core kernels copy rows of K and V in pieces of this size, so every row must start at a multiple of it."""
MAX_ROW_STRIDE = 2**30
"""The tensor-core kernels count the bytes from one row of K or V to the next in 32 bits."""
MERGING_WARPS = 4
"""Warps of a block of ``stage2`` and ``merge_states``."""


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
