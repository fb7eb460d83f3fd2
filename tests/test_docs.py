"""The guides under docs/: their lines run, their tables are true, and links lead somewhere, README's too."""

from __future__ import annotations

import ast
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from bench import records
from bench.summary import geometric_mean
from fasttree_cupy.params import preset
from tests.reference import dense_attention
from tests.tolerances import assert_close

DOCS = Path(__file__).parent.parent / "docs"
TEXTS = [DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))]


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), target


def test_lines_on_serving_run_and_are_right() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", text("SERVING.md"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block, names)
    check_the_grown_tree(names)
    check_the_prompt_that_joined(names)
    # The block before merged a document's tokens with each request's own: one tree holds both.
    names["rng"] = np.random.default_rng(0)  # the guide draws from this seed, in this order
    half = names["half"]
    for shape in ((112, 2, 64), (112, 2, 64), (3, 8, 64), (3, 8, 64), (80, 2, 64), (80, 2, 64), (4, 8, 64)):
        half(*shape)
    queries, *caches = half(2, 8, 64), half(500, 2, 64), half(500, 2, 64), half(50, 2, 64), half(50, 2, 64)
    k, v = np.concatenate(caches[0::2]), np.concatenate(caches[1::2])
    expected, expected_lse = dense_attention([-1, 0, 0], [500, 20, 30], [1, 2], queries, k, v, 64**-0.5)
    assert_close(names["merged"], expected, np.float16)
    np.testing.assert_allclose(names["lse"], expected_lse, rtol=0, atol=1e-4)


def test_lines_on_tree_files_run_and_print_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text("TREE_FORMAT.md"), re.MULTILINE | re.DOTALL)
    (lines,) = (block for language, block in blocks if language == "python")
    example, printed = (block for language, block in blocks[:3] if language == "text")
    (tmp_path / "tree.txt").write_text(example, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    assert capsys.readouterr().out == printed


def check_the_grown_tree(names: dict[str, Any]) -> None:
    paths = [[*range(45), 60, 61, 62], [*range(45), 60, 90, 91]]
    live, rows = [0, names["child"]], np.array(paths).ravel()
    pools = (names["pool_k"][rows], names["pool_v"][rows])
    expected, _ = dense_attention([-1, 0, 0], [0, 48, 48], [1, 2], names["queries"][live], *pools, 64**-0.5)
    assert_close(names["out"][live], expected, np.float16)


def check_the_prompt_that_joined(names: dict[str, Any]) -> None:
    rows, live = [*range(45), *range(60, 72)], [1, names["newcomer"]]
    pools = (names["pool_k"][rows], names["pool_v"][rows])
    expected, _ = dense_attention([-1, 0, 0], [0, 45, 12], [1, 2], names["queries_then"][live], *pools, 64**-0.5)
    assert_close(names["out_then"][live], expected, np.float16)
    assert not names["out_then"][0].any()


def rows_of_table(guide: str, columns: int) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", text(guide), re.MULTILINE)
    return [cells for cells in (line.split(" | ") for line in lines) if len(cells) == columns]


def heuristic(tree_name: str, name: str, value: str) -> tuple[str, str]:
    """Vnodes of both phases, and partial outputs, at heads 32/8 with one value other than the H100's."""
    levels, tokens = (ast.literal_eval(f"[{part}]") for part in tree_name.split(" x "))
    tree = ft.KVTree.from_levels(levels, tokens)
    params, gpu = ft.FastTreeParams.for_gpu("H100", 4), preset("H100")
    sizes = {
        "KV_SPLIT_SIZES": gpu.kv_split_sizes,
        "para_threshs1": gpu.para_threshs1,
        "para_threshs2": gpu.para_threshs2,
    }
    if name in sizes:
        sizes[name] = ast.literal_eval(value)
    elif name != "-":
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # the value is a recommended one
            setattr(params, name, float(value))
    metadata, _ = ft.fasttree_preparation(
        tree, tree.kv_ptrs, tree.batch_size, 32, 8, 128, *sizes.values(), params, device="cpu", verbose=False
    )
    return " + ".join(map(str, metadata.phase_node_nums[:2])), str(metadata.mid_o.shape[0])


def test_configuration_table_says_what_the_heuristic_does() -> None:
    rows = [row for row in rows_of_table("CONFIGURATION_GUIDE.md", 5) if " x " in row[0]]
    assert len(rows) == 7
    for tree_name, name, value, vnodes, partials in rows:
        assert heuristic(tree_name, name, value) == (vnodes, partials)


def test_configuration_guide_names_values_without_effect() -> None:
    (sentence,) = re.findall(r"Without effect on either tree: (.*?)\. Times", text("CONFIGURATION_GUIDE.md"), re.DOTALL)
    values = re.findall(r"`(\w+)`\s+(\[.*?\]|[\d.]+)", sentence)
    assert len(values) == 5
    trees = {row[0] for row in rows_of_table("CONFIGURATION_GUIDE.md", 5) if " x " in row[0]}
    assert len(trees) == 2
    for tree_name in trees:
        for name, value in values:
            assert heuristic(tree_name, name, value) == heuristic(tree_name, "-", "-")


def test_configuration_guide_knows_every_parameter() -> None:
    guide = text("CONFIGURATION_GUIDE.md")
    for name in ("alpha", "beta", "gamma", "kv_group_num", "TSQs", "TSKs", "KV_SPLIT_SIZES", "para_threshs1"):
        assert f"`{name}`" in guide
    for name in ("para_threshs2", "sm_scale", "logit_cap", "kernel", "stream", "return_lse", "device", "verbose"):
        assert f"`{name}`" in guide


# Figures that stand in text by hand are those of the committed result files.


def results(name: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = records.load(DOCS.parent / "bench" / "results" / f"{name}.json")["cases"]
    return rows


def times(rows: list[dict[str, Any]], name: str = "fasttree_cupy_plan") -> list[float]:
    found = [records.median_us(row, name) for row in rows]
    return [time for time in found if time is not None]


def joined(path: Path) -> str:
    return " ".join(path.read_text(encoding="utf-8").split())


def test_figures_of_the_guides() -> None:
    rows = results("decode_h200")
    plan, interface = times(rows), times(rows, "fasttree_cupy")
    assert len(plan) == len(interface) == 125
    ratio = geometric_mean(a / b for a, b in zip(plan, interface, strict=True))
    guide, performance = joined(DOCS / "CONFIGURATION_GUIDE.md"), joined(DOCS / "PERFORMANCE_GUIDE.md")
    assert f"its times are {ratio:.2f} of those of FastTree's interface" in guide
    assert f"`fasttree_decode` | {1 / ratio:.1f} |" in performance
    edges = {"below 10": (0, 10), "10 to 30": (10, 30), "30 to 100": (30, 100), "above 100": (100, np.inf)}
    for name, (low, high) in edges.items():
        shares = [row["floor_us"] / us for row, us in zip(rows, plan, strict=True) if low <= row["floor_us"] < high]
        assert f"| {name} us | {geometric_mean(shares):.2f} |" in performance
    planned = [row["results"]["fasttree_cupy_plan"]["variants"]["auto"]["plan_ms"] for row in rows]
    assert f"planning takes {min(planned):.2f} to {max(planned):.2f} ms, upload included" in performance


def test_figures_of_readmes_limits() -> None:
    (growth,) = results("growth_h200")
    readme = joined(DOCS.parent / "README.md")
    assert f"an update takes the host {growth['host_median_us'] / 1000:.2f} ms in the median" in readme
    assert f"Over {growth['steps']} steps of {growth['layers']} layers" in readme
    assert f"were {100 * growth['share']:.1f}% of the kernels' time" in readme
    assert f"made the loop {100 * growth['loop_overhead_share']:.1f}% longer" in readme
    assert f"they took {100 * growth['disturbed']['share']:.1f}%" in readme
    eight, sixteen = results("float8_h200"), {row["name"]: row for row in results("bfloat16_h200")}
    ratios = [a / b for a, b in zip(times([sixteen[row["name"]] for row in eight]), times(eight), strict=True)]
    spread = f"({min(ratios):.2f} to {max(ratios):.2f};"
    assert f"{geometric_mean(ratios):.2f} times as fast as bfloat16 ones at 32/32 {spread}" in readme
