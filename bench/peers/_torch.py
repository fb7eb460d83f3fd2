"""What the peers that take torch tensors share."""

from __future__ import annotations

from typing import Any

from bench.workloads import Workload

__all__ = ["int32_tensor", "paged_cache", "tensor", "torch_problem"]


def torch_problem() -> str | None:
    """Why torch cannot run on the GPU; None where it can."""
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error})"
    return None if torch.cuda.is_available() else "torch finds no GPU"


def tensor(array: Any) -> Any:
    """A CuPy array as a torch tensor, zero copy."""
    import torch

    return torch.utils.dlpack.from_dlpack(array)


def int32_tensor(values: Any, like: Any) -> Any:
    """A NumPy array as an int32 tensor on the device of the tensor `like`."""
    import torch

    return torch.as_tensor(values, dtype=torch.int32, device=like.device)


def paged_cache(workload: Workload) -> tuple[Any, Any]:
    """K and V as pages of one token each: (tokens, 1, num_kv_heads, head_dim), zero copy."""
    return tensor(workload.k).unsqueeze(1), tensor(workload.v).unsqueeze(1)
