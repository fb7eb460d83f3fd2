"""The module name that the API reference uses for the preparation of Q, K and V."""

from __future__ import annotations

from fasttree_cupy.workload import qkv_preparation

__all__ = ["qkv_preparation"]
