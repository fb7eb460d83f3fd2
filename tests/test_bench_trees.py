"""The benchmark of finding trees: its inputs share what they say they do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from bench import bench_trees


def test_rows_share_what_their_groups_say() -> None:
    assert len(np.unique(bench_trees.keys("private", 8, 6))) == 48
    shared = bench_trees.keys("shared", 256, 8)
    assert [len(np.unique(shared[:, column])) for column in range(0, 8, 2)] == [1, 16, 128, 256]


def test_results_are_written(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "trees.json"
    sizes = ["--requests", "4", "--pages", "3", "--page-sizes", "2", "--tokens", "5"]
    assert bench_trees.main([*sizes, "--output", str(path)]) == 0
    rows = json.loads(path.read_text())["cases"]
    assert [(row["from"], row["kind"]) for row in rows] == [
        (source, kind) for source in ("block tables", "token ids") for kind in ("shared", "private")
    ]
    assert all(row["median_ms"] > 0 and row["requests"] == 4 for row in rows)
    assert rows[1]["unique_tokens"] == 4 * 3 * 2
    assert "median_ms" in capsys.readouterr().out
