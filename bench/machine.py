"""What a result file says of where it comes from: machine, versions, commit, command, measured rates."""

from __future__ import annotations

import importlib.metadata
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.device import Gpu
from bench.floor import H200, Rates
from bench.peers._torch import torch_problem

__all__ = ["describe", "describe_gpu", "measured_rates"]

PACKAGES = ("numpy", "numba", "cupy", "torch", "triton", "flashinfer-python", "fasttree-cupy")
MATRIX_SIZE = 8192


def describe(program: str, arguments: Sequence[str], commit: str | None = None) -> dict[str, Any]:
    """Versions, commit and command; `commit` is what to record instead of what git says of the working tree."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "-m", program, *arguments]),
        "commit": commit or _commit(),
        "versions": {"python": platform.python_version()} | {n: v for n in PACKAGES if (v := _version(n))},
        "processor": _processor(),
    }


def describe_gpu() -> dict[str, Any]:
    """Name, driver and CUDA versions of CuPy's current GPU."""
    import cupy

    properties = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.runtime.getDevice())
    return {
        "gpu": properties["name"].decode(),
        "multiprocessors": properties["multiProcessorCount"],
        "l2_bytes": properties["l2CacheSize"],
        "memory_bytes": properties["totalGlobalMem"],
        "driver": _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cuda_driver": cupy.cuda.runtime.driverGetVersion(),
        "cuda_runtime": cupy.cuda.runtime.runtimeGetVersion(),
    }


def measured_rates(gpu: Gpu) -> tuple[Rates, str]:
    """This GPU's bandwidth and float16 matrix rate, and how the latter was found."""
    bandwidth, problem = gpu.read_bandwidth(), torch_problem()
    if problem is not None:
        return Rates(bandwidth, H200.matrix_rate), f"not measured, {problem}: the constant of the H200"
    return Rates(bandwidth, _matrix_rate(gpu)), f"torch.matmul, {MATRIX_SIZE} cubed, float16"


def _matrix_rate(gpu: Gpu) -> float:
    import torch

    shape = (MATRIX_SIZE, MATRIX_SIZE)
    a, b = (torch.utils.dlpack.from_dlpack(gpu.normal(shape, "float16", seed)) for seed in (1, 2))
    product = torch.empty_like(a)
    times = gpu.time_cold({"matmul": lambda: torch.matmul(a, b, out=product)}, repeats=15)
    return 1e6 * 2 * MATRIX_SIZE**3 / times["matmul"]["median_us"]


def _version(package: str) -> str | None:
    names = [package, "cupy-cuda12x", "cupy-cuda13x"] if package == "cupy" else [package]
    for name in names:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _commit() -> str | None:
    folder = str(Path(__file__).parent)
    commit = _output_of("git", "-C", folder, "rev-parse", "HEAD")
    if commit is None:
        return None
    changed = _output_of("git", "-C", folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit} with changes" if changed else commit


def _output_of(*command: str) -> str | None:
    """The first line that a command prints, "" for none; None where it fails or is missing."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    return None if done.returncode else (lines[0] if lines else "")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
