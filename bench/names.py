"""How tables and figures name contestants and write numbers."""

from __future__ import annotations

from typing import Any

__all__ = ["display_name", "is_measured", "readable_size"]

NAMES = {
    "fasttree_cupy_plan": "plan_decode",
    "fasttree_cupy": "FastTree's interface",
    "fasttree_triton": "FastTree (Triton)",
    "flashinfer_cascade": "FlashInfer cascade",
    "flashinfer_decode": "FlashInfer decode",
    "torch_sdpa": "torch attention",
    "dense_cupy": "dense CuPy",
    "pat": "PAT",
}


def display_name(name: str, document: dict[str, Any]) -> str:
    """A contestant's name for people; it says where its times were published, not measured."""
    return NAMES.get(name, name) + ("" if is_measured(name, document) else " (published)")


def is_measured(name: str, document: dict[str, Any]) -> bool:
    """Whether a contestant ran in any case."""
    return any(name in row["results"] for row in document["cases"])


def readable_size(size: int) -> str:
    """A number of bytes for people."""
    for unit, factor in (("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.{1 if size < 10 * factor else 0}f} {unit}"
    return f"{size} bytes"
