"""Which device the work runs on, and, where no GPU can be used, why."""

from __future__ import annotations

import functools

__all__ = ["gpu_problem", "resolve_device"]

# Volta, the oldest architecture that the kernels are compiled for.
MINIMUM_COMPUTE_CAPABILITY = 70


@functools.cache
def gpu_problem() -> str | None:
    """Say why no GPU is usable, in one sentence; None where one is."""
    try:
        import cupy
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); install fasttree-cupy[cuda12] or fasttree-cupy[cuda13]"
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        return f"the CUDA driver found no usable GPU ({error})"
    if count == 0:
        return "the CUDA driver lists no GPU"
    capability = int(cupy.cuda.Device().compute_capability)
    if capability < MINIMUM_COMPUTE_CAPABILITY:
        return f"the GPU has compute capability {capability / 10}; at least 7.0 is needed"
    try:
        cupy.cuda.nvrtc.getVersion()
    except Exception as error:  # CuPy raises whatever its loader met
        return f"NVRTC, which compiles the kernels, cannot be loaded ({error})"
    return None


def resolve_device(device: str | None) -> str:
    """Turn a caller's ``device`` argument into ``"cpu"`` or ``"cuda:<index>"``.

    Parameters
    ----------
    device : str or None
        ``"cpu"`` (or ``"cpu:0"``), ``"cuda"`` (CuPy's current device), ``"cuda:<index>"``, an object whose ``str()`` is
        one of these (a ``torch.device``), or None: the current GPU where one is usable, else the CPU.

    Raises
    ------
    ValueError
        For any other name, or when a GPU is asked for and none is usable; the message says why.
    """
    name = "auto" if device is None else str(device)
    if name in ("cpu", "cpu:0") or (name == "auto" and gpu_problem() is not None):
        return "cpu"
    kind, _, index = name.partition(":")
    if name != "auto" and (kind != "cuda" or not (index.isdecimal() or name == "cuda")):
        raise ValueError(f"device is {device!r}, expected None, 'cpu', 'cuda' or 'cuda:<index>'")
    problem = gpu_problem()
    if problem is not None:
        raise ValueError(f"device is {device!r}, but {problem}")
    import cupy

    count = cupy.cuda.runtime.getDeviceCount()
    number = int(index) if index else int(cupy.cuda.runtime.getDevice())
    if number >= count:
        raise ValueError(f"device is {device!r}, but there are {count} GPUs, numbered from 0")
    return f"cuda:{number}"
