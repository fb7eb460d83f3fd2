"""Functions that Numba compiles: cached where there is a place for that, and compiled without where there is none."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from pathlib import Path

import numba
import pytest

import fasttree_cupy
from fasttree_cupy.compiled import cached, njit

NO_PLACE = "from numba.core import caching; caching.CompileResultCacheImpl._locator_classes = []; "


def plus_one(x: int) -> int:
    return x + 1


@pytest.fixture
def no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where no folder can be written."""
    monkeypatch.setattr("numba.core.caching.CompileResultCacheImpl._locator_classes", [])
    with pytest.raises(RuntimeError, match="no locator available"):
        numba.njit(cache=True)(plus_one)


def test_without_a_place_for_a_cache(no_place: None) -> None:
    assert njit(plus_one)(1) == 2
    assert njit(inline="always")(plus_one)(1) == 2
    assert cached(partial(numba.cfunc, "int64(int64)"), plus_one).ctypes(1) == 2


def test_with_one_it_is_cached(tmp_path: Path) -> None:
    program = "from fasttree_cupy.compiled import njit; from tests.test_compiled import plus_one; njit(plus_one)(1)"
    environment = {"NUMBA_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run([sys.executable, "-c", program], env=environment, check=True)
    assert list(tmp_path.rglob("test_compiled.plus_one-*.nbi"))


def test_the_package_is_imported_without_a_place_for_a_cache() -> None:
    program = NO_PLACE + "import fasttree_cupy, fasttree_cupy.explain; fasttree_cupy.KVTree([-1], [3]).path_tokens"
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True)


def test_all_of_the_package_is_declared_so() -> None:
    for path in Path(fasttree_cupy.__file__).parent.rglob("*.py"):
        assert path.name == "compiled.py" or "cache=True" not in path.read_text(encoding="utf-8"), path
