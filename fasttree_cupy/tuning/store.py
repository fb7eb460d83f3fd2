"""The file that keeps a GPU's fitted constants."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fasttree_cupy.planning.machine import COST_MODEL, Constants
from fasttree_cupy.tuning.fit import Fit
from fasttree_cupy.tuning.gpu import Gpu
from fasttree_cupy.tuning.numbers import M, numbers_of, with_numbers

__all__ = ["CACHE_VARIABLE", "Tuned", "cache_folder", "read", "tuned_file", "write"]

CACHE_VARIABLE = "FASTTREE_CUPY_CACHE_DIR"
"""Environment variable that names another folder than the user's cache folder."""


class Tuned(NamedTuple):
    """What a file holds.

    Attributes
    ----------
    constants : Constants
        The fitted constants; what was not fitted is as built in.
    date : str
        Day of the measurement.
    """

    constants: Constants
    date: str


def cache_folder() -> Path:
    """The folder of the files: ``$FASTTREE_CUPY_CACHE_DIR``, else ``fasttree_cupy`` in the user's cache folder."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local"
    elif sys.platform == "darwin":
        base = home / "Library" / "Caches"
    else:
        base = os.environ.get("XDG_CACHE_HOME") or home / ".cache"
    return Path(base) / "fasttree_cupy"


def tuned_file(gpu: Gpu) -> Path:
    """The file of a kind of GPU, whether it is there or not."""
    name = re.sub("[^A-Za-z0-9]+", "-", gpu.name).strip("-")
    return cache_folder() / f"tuned-{name}-sm{gpu.compute_capability}.json"


def write(path: Path, gpu: Gpu, fits: Mapping[str, Fit[Any]], versions: Mapping[str, str]) -> None:
    """Write a file in one step: a reader sees the old one or the new one.

    Parameters
    ----------
    path : Path
        The file.
    gpu : Gpu
        The GPU that was measured.
    fits : mapping of str to Fit
        Field of `Constants` -> its fit. Those that were accepted are written.
    versions : mapping of str to str
        Versions to be noted.

    Raises
    ------
    OSError
        If the folder cannot be made or written to.
    """
    content = {
        **gpu._asdict(),
        **versions,
        "cost_model": COST_MODEL,
        "date": time.strftime("%Y-%m-%d"),
        "errors": {field: dict(zip(("before", "after"), fit.errors, strict=True)) for field, fit in fits.items()},
        "constants": {field: numbers_of(fit.machine) for field, fit in fits.items() if fit.accepted},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path, gpu: Gpu, built_in: Constants) -> Tuned:
    """Read a file.

    Parameters
    ----------
    path : Path
        The file.
    gpu : Gpu
        The GPU that it must be of.
    built_in : Constants
        What stands for constants that were not fitted.

    Raises
    ------
    OSError
        If it cannot be read; FileNotFoundError where there is none.
    ValueError
        If it is no such file, or is not of this GPU or cost model; the message says what was expected.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("it holds no JSON object")
    for name, expected in {"cost_model": COST_MODEL, **gpu._asdict()}.items():
        if content.get(name) != expected:
            raise ValueError(f"its {name} is {content.get(name)!r}, expected {expected!r}")
    fitted = content.get("constants")
    if not isinstance(fitted, dict) or not fitted or not fitted.keys() <= set(Constants._fields):
        raise ValueError(f"its constants are not those of {' or '.join(Constants._fields)}")
    items, workers = built_in
    if "items" in fitted:
        items = checked(items, fitted["items"])
    if "workers" in fitted:
        workers = checked(workers, fitted["workers"])
    return Tuned(Constants(items, workers), str(content.get("date", "an unknown day")))


def checked(machine: M, numbers: Any) -> M:
    """The machine with a file's constants, each of which is there and positive."""
    names = numbers_of(machine).keys()
    if not isinstance(numbers, dict) or numbers.keys() != names:
        raise ValueError(f"its constants are not {', '.join(names)}")
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= sys.float_info.max:
            raise ValueError(f"its {name} is {number!r}, expected a positive number")
    return with_numbers(machine, {name: float(number) for name, number in numbers.items()})
