"""The planning benchmark, and the report on results that were made up."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from bench import bench_preparation, records, report
from bench.workloads import Case


def row(suite: str, levels: tuple[str, str], times_us: dict[str, float], floor_us: float = 8.0) -> dict[str, Any]:
    """A row of a results file, 32/8 heads."""
    case = Case(suite, *levels, 32, 8)
    variants = {name: {"only": {"median_us": us, "plan_ms": 0.1}} for name, us in times_us.items()}
    return {
        "suite": suite, "name": case.name, "tree": case.tree_name, "nodes_per_level": levels[0],
        "tokens_per_level": levels[1], "num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "float16",
        "floor_us": floor_us, "published_us": {"pat": 40.0}, "checked_requests": 8,
        "results": {name: {"best": "only", "variants": v} for name, v in variants.items()},
    }  # fmt: skip


@pytest.fixture
def decode_file(tmp_path: Path) -> Path:
    cases = [
        row("one", ("1,2", "3,4"), {"fasttree_cupy": 10.0, "slow": 40.0}),
        row("one", ("1,4", "3,4"), {"fasttree_cupy": 20.0, "slow": 20.0}),
        row("two", ("1,8", "3,4"), {"fasttree_cupy": 80.0, "slow": 90.0}, 40.0),
    ]
    about = {"gpu": "Fake 1", "bandwidth": 1e12, "matrix_rate": 1e14, "commit": "0123456789abcdef", "date": "today"}
    contestants = {"fasttree_cupy": {"own": True, "problem": None}, "slow": {"own": False, "problem": None}}
    path = tmp_path / "decode.json"
    records.save(path, {"machine": about, "contestants": contestants, "cases": cases})
    return path


@pytest.fixture
def planning_file(tmp_path: Path) -> Path:
    path = tmp_path / "planning.json"
    assert bench_preparation.main(["--most-nodes", "300", "--output", str(path)]) == 0
    return path


def test_tables_of_decode(decode_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report.main([str(decode_file), "--full"]) == 0
    printed = capsys.readouterr().out
    assert "| ours | trees | heads | cases | slow | PAT (published) | best peer of each case |" in printed
    # sqrt(40/10 * 20/20), sqrt(40/10 * 40/20); the best peer's: 40 and 20; shares of the floor: 0.8, 0.4 and 0.2, 0.4.
    assert "| one | 32/8 | 2 | 2.00x | 2.83x | **2.00x** | 1.00x | 0.57 | 0.28 | 0 of 2 |" in printed
    assert "| two | 32/8 | 1 | 1.12x | 0.50x | **0.50x** | 0.50x | 0.50 | 1.00 | 1 of 1 |" in printed
    assert "- two: 1,8 x 3,4 (32/8): 80.0 us, pat 40.0 us (0.50x)" in printed
    assert "| one: 1,2 x 3,4 (32/8) | 8.0 | 10.0 | 40.0 | 40.0 | 4.00x |" in printed
    assert "commit 0123456789, today" in printed
    assert "fasttree-cupy, documented: planning a tree takes 0.10 to 0.10 ms" in printed


def test_tables_go_between_the_markers(decode_file: Path, tmp_path: Path) -> None:
    markdown = tmp_path / "README.md"
    markdown.write_text(f"before\n{report.BEGIN}\nlast week's\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert report.main([str(decode_file), "--markdown", str(markdown)]) == 0
        text = markdown.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{report.BEGIN}\nSpeed over each peer")
        assert text.endswith(f"</details>\n{report.END}\nafter\n")
        assert "last week" not in text
    markdown.write_text("no markers", encoding="utf-8")
    with pytest.raises(ValueError, match="expected one <!-- bench:begin -->"):
        report.main([str(decode_file), "--markdown", str(markdown)])


def test_planning_rows(planning_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = records.load(planning_file)["cases"]
    paper = rows.pop(0)
    assert (paper["kind"], paper["nodes"]) == ("paper", 1365)
    assert paper["nodes_ms"] > paper["arrays_ms"] > 0
    assert [(r["kind"], r["nodes"]) for r in rows] == [
        (kind, nodes) for nodes in (10, 30, 100, 300) for kind in ("random", "levels")
    ]
    for r in rows:
        assert r["oracle_ms"] > r["arrays_ms"] > 0
        assert r["vnodes"] > 0
        assert r["plan_decode_ms"] > 0
    capsys.readouterr()
    assert report.main([str(planning_file)]) == 0
    assert "| random | 100 |" in capsys.readouterr().out


def test_planning_stops_at_its_limit(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench_preparation.main(["--most-nodes", "1000000", "--limit-seconds", "0"]) == 0
    assert capsys.readouterr().out.count("\n") == 3  # header, one tree, the stop


def test_figures(decode_file: Path, planning_file: Path, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the import of matplotlib warns of
        pytest.importorskip("matplotlib")
    folder = tmp_path / "figures"
    markdown = tmp_path / "README.md"
    markdown.write_text(f"{report.BEGIN}\n{report.END}\n", encoding="utf-8")
    arguments = [str(decode_file), str(planning_file), "--markdown", str(markdown), "--figures", str(folder)]
    report.main(arguments)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}
    assert sorted(drawn) == ["floor_one.svg", "floor_two.svg", "planning.svg", "speed_one.svg", "speed_two.svg"]
    assert "![speed_one](figures/speed_one.svg)" in markdown.read_text(encoding="utf-8")
    report.main(arguments)
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}  # the same, byte by byte
