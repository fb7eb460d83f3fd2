"""The planning benchmark, and the report on results that were made up."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from bench import bench_preparation, records, report
from bench.names import readable_size
from bench.workloads import Case


def row(
    suite: str, levels: tuple[str, str], times_us: dict[str, float], floor_us: float = 8.0, summed_tokens: int = 200
) -> dict[str, Any]:
    """A row of a results file, 32/8 heads."""
    case = Case(suite, *levels, 32, 8)
    variants = {name: {"only": {"median_us": us, "plan_ms": 0.1}} for name, us in times_us.items()}
    return {
        "suite": suite, "name": case.name, "tree": case.tree_name, "nodes_per_level": levels[0],
        "tokens_per_level": levels[1], "num_qo_heads": 32, "num_kv_heads": 8, "head_dim": 128, "dtype": "float16",
        "unique_tokens": 100, "summed_tokens": summed_tokens, "floor_us": floor_us, "published_us": {"pat": 40.0},
        "checked_requests": 8,
        "results": {name: {"best": "only", "variants": v} for name, v in variants.items()},
    }  # fmt: skip


@pytest.fixture
def decode_file(tmp_path: Path) -> Path:
    cases = [
        row("one", ("1,2", "3,4"), {"fasttree_cupy": 10.0, "slow": 40.0}),
        row("one", ("1,4", "3,4"), {"fasttree_cupy": 20.0, "slow": 20.0}),
        row("two", ("1,8", "3,4"), {"fasttree_cupy": 80.0, "slow": 90.0}, 40.0, summed_tokens=100),
    ]
    about = {"gpu": "Fake 1", "bandwidth": 1e12, "matrix_rate": 1e14, "commit": "0123456789abcdef", "date": "today"}
    about["versions"] = {"triton": "3.6", "torch": "2.11"}
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
    assert "- two: 1,8 x 3,4 (32/8): 80.0 us, PAT (published) 40.0 us (0.500x)" in printed
    assert (
        "A peer is faster than FastTree's interface in 1 of 3 cases: PAT (published) in 1. The worst is 0.50x, at two: "
        in printed
    )
    assert "1 of these are among the 1 case in which requests share no token." in printed
    assert "times published by PAT (ASPLOS'26) for an H200, not run here" in printed
    assert "- peers: Triton 3.6, torch 2.11." in printed
    assert "In brackets" not in printed  # every peer has a time in every case
    assert "| one: 1,2 x 3,4 (32/8) | 8.0 | 10.0 | 40.0 | 40.0 | 4.00x |" in printed
    assert "commit 0123456789, today" in printed
    assert "FastTree's interface: planning a tree takes 0.10 to 0.10 ms" in printed


def test_each_of_ours_has_its_losses_and_means_say_what_they_cover(
    decode_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = records.load(decode_file)
    document["contestants"] = {"fasttree_cupy_plan": {"own": True, "problem": None}} | document["contestants"]
    for case in document["cases"]:
        variant = {"median_us": 30.0, "plan_ms": 0.1}
        case["results"]["fasttree_cupy_plan"] = {"best": "only", "variants": {"only": variant}}
    document["cases"][0]["results"]["slow"] = {"absent": "it cannot"}
    records.save(decode_file, document)
    assert report.main([str(decode_file)]) == 0
    printed = capsys.readouterr().out
    assert "| plan_decode | one | 32/8 | 2 | 0.67x (1) | 1.33x |" in printed
    assert "| FastTree's interface | one | 32/8 | 2 | 1.00x (1) | 2.83x |" in printed
    assert "In brackets: the number of cases in which the peer has a time" in printed
    assert (
        "A peer is faster than plan_decode in 1 of 3 cases: slow in 1. The worst is 0.67x, at one: 1,4 x 3,4" in printed
    )
    assert "A peer is faster than FastTree's interface in 1 of 3 cases: PAT (published) in 1." in printed


def test_tables_go_between_the_markers(decode_file: Path, tmp_path: Path) -> None:
    markdown = tmp_path / "README.md"
    markdown.write_text(f"before\n{report.BEGIN}\nlast week's\n{report.END}\nafter\n", encoding="utf-8")
    for _ in range(2):
        assert report.main([str(decode_file), "--markdown", str(markdown)]) == 0
        text = markdown.read_text(encoding="utf-8")
        assert text.startswith(f"before\n{report.BEGIN}\nHow many times as fast")
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
        assert (
            r["plan_bytes"] == metadata_bytes(bench_preparation.TREES[r["kind"]](r["nodes"])) > 4 * r["unique_tokens"]
        )
    capsys.readouterr()
    assert report.main([str(planning_file)]) == 0
    printed = capsys.readouterr().out
    assert "| random | 100 |" in printed
    assert f"| {readable_size(rows[-4]['plan_bytes'])} |" in printed


def metadata_bytes(tree: ft.KVTree) -> int:
    """Bytes of all arrays that `fasttree_preparation` returns, but for the work space."""
    gpu, params = ft.preset("H100"), ft.FastTreeParams.for_gpu("H100", 4)
    metadata, _ = ft.fasttree_preparation(
        tree, tree.kv_ptrs, tree.batch_size, 32, 8, 128,
        gpu.kv_split_sizes, gpu.para_threshs1, gpu.para_threshs2, params, device="cpu", verbose=False,
    )  # fmt: skip
    arrays = [part for part in metadata if isinstance(part, np.ndarray)]
    return sum(array.nbytes for array in arrays) - metadata.mid_o.nbytes - metadata.mid_lse.nbytes


def test_sizes_for_people() -> None:
    sizes = (0, 999, 1396, 9_940, 19_100, 1_941_000, 18_128_600)
    assert [*map(readable_size, sizes)] == ["0 bytes", "999 bytes", "1.4 kB", "9.9 kB", "19 kB", "1.9 MB", "18 MB"]


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
    text = markdown.read_text(encoding="utf-8")
    assert (
        "![one: speed of FastTree's interface and of each peer on every tree, the best peer's being 1](figures/" in text
    )
    assert set(re.findall(r"\]\(figures/(.*?)\)", text)) == set(drawn)
    report.main(arguments)
    assert drawn == {path.name: path.read_text(encoding="utf-8") for path in folder.iterdir()}  # the same, byte by byte


def test_figures_leave_out_what_is_far_off_and_say_so(decode_file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # whatever the import of matplotlib warns of
        pytest.importorskip("matplotlib")
        from bench import figures
    document = records.load(decode_file)
    for case in document["cases"]:
        case["results"]["slow"]["variants"]["only"]["median_us"] = 4e6
    document["cases"][0]["published_us"] = {}
    figure = figures.speed_figure(document, "one", "fasttree_cupy")
    title = " ".join(figure.get_suptitle().split())
    assert "Not drawn: slow, " in title
    assert "No marker: a peer that could not run" in title
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["PAT (published)", "FastTree's interface (ours)"]
    drawn = {each.get_label(): each for each in figure.axes[0].collections}
    assert len(drawn["FastTree's interface (ours)"].get_facecolors()) == 0  # hollow: what lies below can be seen
