"""Functions of the CUDA driver: the first library that has one counts, and none is no error."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest

from fasttree_cupy.execution import dependent_launch
from fasttree_cupy.execution.driver import driver_function


def test_the_driver_that_has_it_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def library(name: str) -> SimpleNamespace:
        if name == "libcuda.so.1":
            raise OSError(name)
        return SimpleNamespace(cuOfATest=len)

    monkeypatch.setattr(ctypes, "CDLL", library)
    assert driver_function("cuOfATest") is len
    assert driver_function("cuOfNoDriver") is None


@pytest.mark.parametrize(("version", "expected"), [(12020, None), (12030, "cuLaunchKernelEx")])
def test_drivers_whose_graphs_lack_early_launches_are_passed_over(
    version: int, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = pytest.importorskip("cupy.cuda.runtime", reason="no CuPy")
    monkeypatch.setattr(runtime, "driverGetVersion", lambda: version)
    monkeypatch.setattr(dependent_launch, "driver_function", lambda name: name)
    assert dependent_launch._launcher.__wrapped__() == expected
