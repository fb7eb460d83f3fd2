"""The published FastTree Triton kernels, run on our metadata from a local copy of the artifact's ``kernel_bench``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["load", "make_run"]

PADDING = 128
"""The kernels read index arrays past their ends, up to one KV tile; the published preparation pads them as well."""


def load(folder: Path) -> Any:
    """Import ``fasttree.py`` from a local copy of the artifact.

    Raises
    ------
    FileNotFoundError
        If the folder does not hold it.
    """
    path = folder / "fasttree.py"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: copy the FastTree artifact's kernel_bench folder there")
    spec = importlib.util.spec_from_file_location("fasttree_artifact", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_run(
    module: Any,
    q: Any,
    k: Any,
    v: Any,
    o: Any,
    metadata: Any,
    tiles: tuple[list[int], list[int]],
    sm_scale: float,
) -> Callable[[], None]:
    """Return a callable that decodes the CuPy arrays with the published kernels into ``o``."""
    import cupy
    import torch

    def tensor(array: Any) -> Any:
        return torch.from_dlpack(array)

    def padded(array: Any) -> Any:
        return tensor(cupy.concatenate([array, cupy.full(PADDING, -1, cupy.int32)]))

    arrays = [padded(array) for array in metadata[:9]] + [tensor(array) for array in metadata[9:11]]
    arguments = (*map(tensor, (q, k, v, o)), *arrays, *map(list, metadata[11:]), *tiles, sm_scale)

    def run() -> None:
        module.fasttree_decode(*arguments)

    return run
