"""What tells one kind of GPU from another."""

from __future__ import annotations

from typing import NamedTuple

from fasttree_cupy.execution import cuda

__all__ = ["Gpu", "gpu_of"]


class Gpu(NamedTuple):
    """A kind of GPU.

    Attributes
    ----------
    name : str
        As CUDA says it.
    compute_capability : int
        Times ten: 90 for an H100 or H200.
    multiprocessors : int
        Number of them.
    """

    name: str
    compute_capability: int
    multiprocessors: int


def gpu_of(device: int) -> Gpu:
    """The kind of a CUDA device."""
    import cupy

    name = cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()
    return Gpu(name, cuda.compute_capability(device), cuda.multiprocessors(device))
