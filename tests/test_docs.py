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


def check_the_grown_tree(names: dict[str, Any]) -> None:
    paths = [[*range(45), 60, 61, 62], [*range(45), 60, 90, 91]]
    live, rows = [0, names["child"]], np.array(paths).ravel()
    pools = (names["pool_k"][rows], names["pool_v"][rows])
    expected, _ = dense_attention([-1, 0, 0], [0, 48, 48], [1, 2], names["queries"][live], *pools, 64**-0.5)
    assert_close(names["out"][live], expected, np.float16)


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
