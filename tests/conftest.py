"""What every test shares: the ``gpu`` marker, and the frameworks that may be absent."""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest

from fasttree_cupy.execution.device import gpu_problem


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip GPU tests, saying why, where no GPU is usable."""
    problem = gpu_problem()
    if problem is None:
        return
    skip = pytest.mark.skip(reason=f"no GPU: {problem}")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Have the kernels that emulated tests need built while other tests run: ``build_kernels`` of their module."""
    if session.config.option.collectonly:
        return
    tests = [item for item in session.items if isinstance(item, pytest.Function)]
    for module in {test.module for test in tests}:
        if hasattr(module, "build_kernels"):
            module.build_kernels([test for test in tests if test.module is module])


@pytest.fixture
def cupy() -> Any:
    """CuPy, or a skipped test."""
    return pytest.importorskip("cupy")


@pytest.fixture
def torch() -> Any:
    """PyTorch, or a skipped test."""
    with warnings.catch_warnings():
        # torch imports pynvml where it is installed, and warns about its name.
        warnings.filterwarnings("ignore", "The pynvml package is deprecated", FutureWarning)
        return pytest.importorskip("torch")


@pytest.fixture
def jax() -> Any:
    """JAX, or a skipped test."""
    # By default JAX takes three quarters of the GPU's memory for itself.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return pytest.importorskip("jax")
