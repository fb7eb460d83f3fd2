"""The examples under docs/ run and agree with dense attention."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

import fasttree_cupy as ft

EXAMPLES = Path(__file__).parent.parent / "docs" / "examples"
FRAMEWORKS = ["numpy", "torch", "jax", pytest.param("cupy", marks=pytest.mark.gpu)]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))  # as where a script is run
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_draft_tree(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework, reason=f"no {framework}")
    assert load("draft_tree").main(["--framework", framework]) == 0
    assert "10 draft tokens after 500: relative error" in capsys.readouterr().out


def test_draft_tree_notices_a_wrong_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("draft_tree")
    monkeypatch.setattr(example, "causal_tree_mask", lambda prompt, parents: np.ones((10, 510), bool))
    assert example.main([]) == 1


def test_the_trees_requests_see_what_the_mask_says() -> None:
    example = load("draft_tree")
    parents = (-1, 0, 0, 1, 3, -1, 5)
    tree, mask = example.draft_tree(20, parents), example.causal_tree_mask(20, parents)
    for request in range(len(parents)):
        np.testing.assert_array_equal(np.sort(tree.request_rows(request)), np.flatnonzero(mask[request]))


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_decode_loop(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework, reason=f"no {framework}")
    assert load("decode_loop").main(["--framework", framework]) == 0
    assert "40 steps of 2 layers: 4 requests, 414 tokens stored: relative error" in capsys.readouterr().out


def test_decode_loop_notices_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    append = ft.DecodePlan.append
    monkeypatch.setattr(ft.DecodePlan, "append", lambda plan, rows: append(plan, np.roll(rows, 1)))
    assert load("decode_loop").main([]) == 1


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_beam_search(framework: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip(framework, reason=f"no {framework}")
    example = load("beam_search")
    assert example.main(["--framework", framework]) == 0
    printed = capsys.readouterr().out
    assert f"{example.STEPS} steps, 14 forks: {example.BEAMS} hypotheses" in printed


def test_beam_search_notices_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    append = ft.DecodePlan.append
    monkeypatch.setattr(ft.DecodePlan, "append", lambda plan, rows, slots: append(plan, np.roll(rows, 1), slots))
    assert load("beam_search").main([]) == 1


def test_beam_search_releases_what_nobody_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    example = load("beam_search")
    monkeypatch.setattr(example.Pool, "release", lambda pool, before, after: None)
    assert example.main([]) == 1


@pytest.mark.parametrize("name", ["draft_tree", "decode_loop", "beam_search"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--framework", "numpy", "--device", "cuda"], "numpy has no arrays on device cuda"),
        (["--framework", "cupy", "--device", "cpu"], "cupy has no arrays on device cpu"),
        (["--framework", "cupy"], "no GPU"),
        (["--framework", "torch", "--device", "cuda"], "no GPU"),
    ],
)
def test_what_cannot_be_used_is_said_in_one_line(
    name: str, arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise ValueError("no GPU,\nnone at all")

    example = load(name)
    monkeypatch.setattr(ft, "plan_decode", refused)
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error
