"""The constants that plans use: a GPU's tuned ones where it was tuned, else built-in ones."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import NamedTuple

from fasttree_cupy.planning.machine import Constants, built_in
from fasttree_cupy.tuning.gpu import gpu_of
from fasttree_cupy.tuning.store import read, tuned_file

__all__ = ["Chosen", "chosen", "constants_of"]


class Chosen(NamedTuple):
    """The constants of a device, and where they come from.

    Attributes
    ----------
    constants : Constants
    origin : str
        In words.
    path : Path
        The file of tuned ones, whether it is there or not.
    """

    constants: Constants
    origin: str
    path: Path


@functools.cache
def chosen(device: int) -> Chosen:
    """The constants of a CUDA device, read once in a process; warns where its tuned file cannot be used."""
    gpu = gpu_of(device)
    path = tuned_file(gpu)
    constants, origin = built_in(gpu.name, gpu.multiprocessors)
    try:
        tuned = read(path, gpu, constants)
    except FileNotFoundError:
        return Chosen(constants, origin, path)
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(
            f"{path} is not used: {error}; built-in constants are. Run `fasttree-cupy tune` anew, or delete the file",
            UserWarning,
            stacklevel=2,
        )
        return Chosen(constants, origin, path)
    return Chosen(tuned.constants, f"tuned on {tuned.date}", path)


def constants_of(device: int) -> Constants:
    """The constants of a CUDA device."""
    return chosen(device).constants
