"""The benchmark of growth: without a GPU it says so."""

from __future__ import annotations

import pytest

from bench import bench_growth


def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_growth, "gpu_problem", lambda: "there is none")
    assert bench_growth.main([]) == 2
    assert capsys.readouterr().err == "bench_growth needs a GPU: there is none\n"
