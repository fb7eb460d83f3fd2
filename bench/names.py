"""How tables and figures name contestants and write numbers."""

from __future__ import annotations

from typing import Any

__all__ = ["display_name", "megabytes"]

NAMES = {
    "fasttree_cupy_plan": "fasttree-cupy, DecodePlan",
    "fasttree_cupy": "fasttree-cupy, documented",
    "fasttree_triton": "FastTree (Triton)",
    "flashinfer_cascade": "FlashInfer cascade",
    "flashinfer_decode": "FlashInfer decode",
    "torch_sdpa": "torch attention",
    "dense_cupy": "dense CuPy",
    "pat": "PAT",
}


def display_name(name: str, document: dict[str, Any]) -> str:
    """A contestant's name for people; it says where its times were published, not measured."""
    measured = any(name in row["results"] for row in document["cases"])
    return NAMES.get(name, name) + ("" if measured else " (published)")


def megabytes(size: int | None) -> str:
    """A number of bytes for people."""
    if size is None:
        return "-"
    return "under 1 MB" if size < 1e6 else f"{size / 1e6:.0f} MB"
