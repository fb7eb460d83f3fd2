"""What the examples share: the framework and the device that their command lines name, and arrays there."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

import fasttree_cupy as ft

FRAMEWORKS = ("numpy", "torch", "jax", "cupy")


def chosen(description: str, arguments: Sequence[str] | None) -> tuple[str, str]:
    """Framework and device of a command line; one line and exit status 2 where they cannot be used."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--framework", choices=FRAMEWORKS, default="numpy", help="whose arrays (numpy)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where they lie (cupy: cuda, others: cpu)")
    args = parser.parse_args(arguments)
    device = args.device or ("cuda" if args.framework == "cupy" else "cpu")
    if (args.framework, device) in (("numpy", "cuda"), ("cupy", "cpu")):
        parser.exit(2, f"{parser.prog}: error: {args.framework} has no arrays on device {device}\n")
    try:
        ft.plan_decode(ft.KVTree(parent=[-1], seqlen=[1]), 1, 1, 16, device=device)
        put(np.zeros(1, np.float16), args.framework, device)
    except (ImportError, ValueError, RuntimeError, AssertionError) as error:  # the last is torch's
        parser.exit(2, f"{parser.prog}: error: {' '.join(str(error).split())}\n")
    return args.framework, device


def put(array: npt.NDArray[np.float16], framework: str, device: str) -> Any:
    """A copy of an array as the framework's, on the device."""
    if framework == "torch":
        import torch

        return torch.from_numpy(array.copy()).to(device)
    if framework == "jax":
        import jax

        return jax.device_put(array.copy(), jax.devices("gpu" if device == "cuda" else "cpu")[0])
    if framework == "cupy":
        import cupy

        return cupy.asarray(array)
    return array.copy()


def host(array: Any) -> npt.NDArray[np.float64]:
    """An array of any framework in host memory."""
    for copy in ("cpu", "get"):  # torch's and CuPy's
        if hasattr(array, copy):
            array = getattr(array, copy)()
    return np.asarray(array).astype(np.float64)
