"""The examples under docs/ run and agree with dense attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("framework", ["numpy", "torch", "jax"])
def test_draft_tree(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework, reason=f"no {framework}")
    assert load("draft_tree").main([framework]) == 0
    assert "10 draft tokens after 500: relative error" in capsys.readouterr().out


def test_draft_tree_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("draft_tree")
    monkeypatch.setattr(example, "causal_tree_mask", lambda prompt, parents: np.ones((10, 510), bool))
    assert example.main(["numpy"]) == 1


def test_the_trees_requests_see_what_the_mask_says() -> None:
    example = load("draft_tree")
    parents = (-1, 0, 0, 1, 3, -1, 5)
    tree, mask = example.draft_tree(20, parents), example.causal_tree_mask(20, parents)
    for request in range(len(parents)):
        np.testing.assert_array_equal(np.sort(tree.request_rows(request)), np.flatnonzero(mask[request]))
