"""Plans explained, folded and drawn: nothing is lost, and every label has its place."""

from __future__ import annotations

import re
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest

from fasttree_cupy.explain import ExplainedPlan, explain_plan
from fasttree_cupy.fold import MOST_BOXES, Box, fold
from fasttree_cupy.params import PRESETS, FastTreeParams
from fasttree_cupy.plot import plan_svg
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.svg import label, shorten, text_width
from fasttree_cupy.tree import KVTree
from tests.cases import PAPER_TREES, TREES

HEADS = [(32, 32), (32, 8), (16, 1)]
SVG = "{http://www.w3.org/2000/svg}"
TIMES = "\N{MULTIPLICATION SIGN}"


def explained_trees() -> Iterator[ExplainedPlan]:
    """The 220 trees, the head counts in turn."""
    for index, tree in enumerate(TREES):
        yield explain_plan(KVTree(tree.parent, tree.seqlen, tree.request_node), *HEADS[index % 3])


def ragged(num_nodes: int, seed: int = 3) -> KVTree:
    rng = np.random.default_rng(seed)
    parent = [-1, *(int(rng.integers(max(0, node // 3 - 30), node)) for node in range(1, num_nodes))]
    return KVTree(parent, rng.integers(0, 700, num_nodes))


def star(num_leaves: int) -> KVTree:
    """A root with leaves of which no two are alike."""
    return KVTree([-1] + [0] * num_leaves, range(1, num_leaves + 2))


def chain(num_nodes: int) -> KVTree:
    return KVTree(range(-1, num_nodes - 1), np.random.default_rng(0).integers(1, 700, num_nodes))


def all_boxes(root: Box) -> list[Box]:
    boxes = [root]
    for box in boxes:
        boxes.extend(box.children)
    return boxes


# What the heuristic did


def test_plan_is_the_one_of_preparation() -> None:
    for tree in PAPER_TREES:
        own = KVTree(tree.parent, tree.seqlen, tree.request_node)
        explained = explain_plan(own, 32, 8, "A100")
        gpu, params = PRESETS["A100"], FastTreeParams.for_gpu("A100", 4)
        sizes = gpu.kv_split_sizes, gpu.para_threshs1, gpu.para_threshs2
        metadata, assignments = fasttree_preparation(
            own, own.kv_ptrs, own.batch_size, 32, 8, 128, *sizes, params, device="cpu", verbose=False
        )
        assert explained.plan.phase_node_nums == metadata.phase_node_nums
        assert explained.plan.node_assignments.tolist() == assignments
        assert explained.num_split_q == sum(assignments)
        assert (explained.plan.q_tile_sizes, explained.plan.kv_tile_sizes) == (params.TSQs, params.TSKs)


def test_grids_are_the_vnodes_of_the_plan() -> None:
    for explained in explained_trees():
        made, expected = explained.plan, Counter[tuple[int, int, int]]()
        for node in range(explained.tree.num_nodes):
            grid = explained.grid(node)
            if grid is None:
                assert explained.served[node] == 0 or explained.covered[node] == 0
                continue
            covered, served = int(explained.covered[node]), int(explained.served[node])
            lengths = [min(grid.split_tokens, covered - start) for start in range(0, covered, grid.split_tokens)]
            tile = made.q_tile_sizes[0]
            tiles = [min(tile, served - start) for start in range(0, served, tile)]
            phases = [0] * grid.tiles_phase0 + [1] * grid.tiles_phase1
            assert (len(lengths), len(tiles)) == (grid.splits, grid.tiles)
            expected.update((phase, kv, q) for q, phase in zip(tiles, phases, strict=True) for kv in lengths)
        phase_of = np.repeat([0, 1], made.phase_node_nums).tolist()
        lens = made.vnode_to_kv_lens.tolist(), made.vnode_to_q_lens.tolist()
        assert expected == Counter(zip(phase_of, *lens, strict=True))


def test_every_request_is_served_its_whole_path() -> None:
    for explained in explained_trees():
        assert int((explained.served * explained.covered).sum()) == int(explained.tree.path_tokens.sum())
        assert explained.through[explained.tree.breadth_first[0]] == explained.tree.batch_size


# Folding


def assert_conserved(root: Box, explained: ExplainedPlan) -> None:
    boxes = all_boxes(root)
    sums = [sum(column) for column in zip(*(box.figures for box in boxes), strict=True)]
    tree = explained.tree
    assert sums[0] == tree.num_nodes
    assert sums[1] == tree.unique_tokens
    assert sums[3] == explained.num_split_q
    assert sums[4:] == explained.plan.phase_node_nums
    assert root.figures.requests == tree.batch_size
    for box in boxes:
        below = sum(child.figures.requests for child in box.children)
        ending = [int(np.sum(tree.request_node == box.node)) * box.figures.nodes, box.figures.requests]
        assert box.figures.requests == below + ending[not box.alike]
        assert sum(not child.alike for child in box.children) <= 1
        assert not box.children or box.alike


@pytest.mark.parametrize("most_boxes", [1, 2, 3, 5, MOST_BOXES])
def test_folding_conserves_all_figures(most_boxes: int) -> None:
    for explained in explained_trees():
        root = fold(explained, most_boxes)
        assert len(all_boxes(root)) <= most_boxes
        assert_conserved(root, explained)


def test_alike_nodes_are_alike() -> None:
    """Unfolded again, the boxes hold each node's own figures as often as the tree does."""
    for explained in explained_trees():
        facts = list(
            zip(
                explained.tree.seqlen.tolist(),
                explained.through.tolist(),
                explained.plan.node_assignments.tolist(),
                explained.covered.tolist(),
                *explained.vnodes.T.tolist(),
                strict=True,
            )
        )
        unfolded = Counter[tuple[int, ...]]()
        for box in all_boxes(fold(explained, explained.tree.num_nodes)):
            assert box.alike
            unfolded[facts[box.node]] += box.figures.nodes
        assert unfolded == Counter(facts)


def test_level_tree_is_a_box_a_level() -> None:
    tree = KVTree.from_levels([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256])
    boxes = all_boxes(fold(explain_plan(tree, 32, 8)))
    assert [box.figures.nodes for box in boxes] == [1, 4, 16, 64, 256, 1024]
    assert all(box.figures.requests == 1024 for box in boxes)


def test_children_are_those_of_their_box() -> None:
    explained = explain_plan(KVTree.from_levels([1, 3, 7, 20], [9, 9, 9, 9]), 4, 4)
    for box in all_boxes(fold(explained)):
        assert {int(explained.tree.parent[child.node]) for child in box.children} <= {box.node}
        assert [child.node for child in box.children] == sorted(child.node for child in box.children)


def test_largest_subtrees_are_opened_first() -> None:
    explained = explain_plan(KVTree([-1, 0, 0, 1, 1, 2, 2], [1, 1, 1, 9, 8, 900, 800]), 4, 4)
    assert [box.node for box in all_boxes(fold(explained))] == [0, 1, 2, 3, 4, 5, 6]
    root = fold(explained, 5)
    assert [(box.node, box.alike) for box in all_boxes(root)] == [
        (0, True),
        (2, True),
        (1, False),
        (5, True),
        (6, True),
    ]


def test_no_box_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="most_boxes is 0, expected 1 or more"):
        fold(explain_plan(KVTree([-1], [1]), 4, 4), 0)


# The picture


class Rectangle(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def overlaps(self, other: Rectangle) -> bool:
        return (
            self.left < other.right and other.left < self.right and self.top < other.bottom and other.top < self.bottom
        )

    def lies_in(self, other: Rectangle) -> bool:
        return (
            self.left >= other.left
            and self.right <= other.right
            and self.top >= other.top
            and self.bottom <= other.bottom
        )


def rectangle(element: ElementTree.Element) -> Rectangle:
    x, y = (float(element.get(name, "0")) for name in "xy")
    return Rectangle(x, y, x + float(element.attrib["width"]), y + float(element.attrib["height"]))


def text_place(element: ElementTree.Element) -> Rectangle:
    size = float(element.attrib["font-size"])
    width = text_width(element.text or "", size, element.get("font-weight") == "bold")
    x, y = float(element.attrib["x"]), float(element.attrib["y"])
    left = x - width if element.get("text-anchor") == "end" else x
    return Rectangle(left, y - 0.8 * size, left + width, y + 0.25 * size)


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def check_picture(svg: str) -> ElementTree.Element:
    """Well-formed, nothing outside, nothing over anything else."""
    root = ElementTree.fromstring(svg)
    card = Rectangle(*map(float, root.attrib["viewBox"].split()))
    assert rectangle(root) == card == rectangle(root.find(f"{SVG}rect"))
    nodes = [element for element in root.iter(f"{SVG}g") if element.get("class") == "node"]
    frames = [rectangle(node.find(f"{SVG}rect")) for node in nodes]
    bars = [rectangle(bar) for g in root.iter(f"{SVG}g") if g.get("class") == "vnodes" for bar in g.iter(f"{SVG}rect")]
    places = [text_place(element) for element in root.iter(f"{SVG}text")]
    for place in [*frames, *bars, *places]:
        assert place.lies_in(card)
    for node, frame in zip(nodes, frames, strict=True):
        assert len(node.findall(f"{SVG}text")) == 3
        for element in node.findall(f"{SVG}text"):
            assert text_place(element).lies_in(frame), element.text
    assert no_overlap(frames)
    assert no_overlap(places)
    outside = [place for place in places if not any(place.lies_in(frame) for frame in frames)]
    assert no_overlap([*frames, *outside])
    assert not any(bar.overlaps(place) for bar in bars for place in [*frames, *places] if near(bar, place))
    for x, y, end in connectors(root):
        assert any(frame.bottom == y and frame.left < x < frame.right for frame in frames)
        assert not any(frame.left < x < frame.right and y < frame.bottom and frame.top < end for frame in frames)
    return root


def connectors(root: ElementTree.Element) -> Iterator[list[float]]:
    """The downward strokes: x, beginning, end."""
    for path in root.iter(f"{SVG}path"):
        stroke = re.fullmatch(r"M(\S+) (\S+)V(\S+)", path.attrib["d"])
        if stroke:
            yield [float(number) for number in stroke.groups()]


def near(a: Rectangle, b: Rectangle) -> bool:
    return abs(a.top - b.top) < 100


def no_overlap(places: list[Rectangle]) -> bool:
    ordered = sorted(places, key=lambda place: place.top)
    return not any(a.overlaps(b) for i, a in enumerate(ordered) for b in ordered[i + 1 : i + 12])


@pytest.mark.parametrize(
    "tree",
    [
        KVTree([-1], [77]),
        KVTree([-1], [0]),
        KVTree([-1, 0, 0], [5_000_000, 2, 3], [1, 2, 0, 1]),
        KVTree.from_levels([1, 16, 64], [1024, 256, 32]),
        ragged(40),
        chain(30),
        chain(2000),
        star(3000),
        KVTree([-1], [1_000_000]),
        KVTree([-1], [1000], [0] * 5001),
    ],
    ids=["one", "empty", "unlike lengths", "levels", "ragged", "chain", "deep", "star", "long", "many requests"],
)
@pytest.mark.parametrize("heads", HEADS)
def test_picture_of_odd_trees(tree: KVTree, heads: tuple[int, int]) -> None:
    explained = explain_plan(tree, *heads)
    root = check_picture(plan_svg(explained, "a tree"))
    assert root[0].tag == f"{SVG}title"
    assert root[0].text == "Plan of a tree"
    assert texts(root)[0] == "Plan of a tree"


def test_pictures_of_all_trees() -> None:
    for explained in explained_trees():
        check_picture(plan_svg(explained, "a tree"))


def test_picture_says_what_the_heuristic_did() -> None:
    tree = KVTree.from_levels([1, 4, 16, 64, 256, 1024], [256, 8, 256, 64, 32, 256])
    said = texts(check_picture(plan_svg(explain_plan(tree, 32, 8), "paper")))
    assert f"node 21 {TIMES} 64" in said
    assert f"64 {TIMES} 64 = 4,096 tokens, 64 {TIMES} 16 = 1,024 requests" in said
    assert f"64 vnodes = 64 {TIMES} 1 split {TIMES} 1 tile; phase 0" in said
    assert "each for 16 requests, 584 tokens (520 taken along)" in said
    assert said.count("no vnodes") == said.count("all requests went to Split-Q children") == 3
    assert (said.count("Split-K"), said.count("Split-Q")) == (3, 3)
    assert any("1,365 nodes: 1,281 Split-K, 84 Split-Q; 1,024 requests; 278,816 tokens" in text for text in said)


def test_bars_are_cut_into_splits_and_tiles() -> None:
    root = check_picture(plan_svg(explain_plan(KVTree([-1], [1000], [0] * 40), 32, 8), "one"))
    bar = next(group for group in root.iter(f"{SVG}g") if group.get("class") == "vnodes")
    assert any(text.startswith(f"24 vnodes = 8 splits {TIMES} 3 tiles") for text in texts(bar))
    assert len(bar.findall(f"{SVG}rect")) == 3
    assert bar.find(f"{SVG}path").attrib["d"].count("M") == 7


def test_same_plan_gives_the_same_file() -> None:
    assert plan_svg(explain_plan(ragged(300), 32, 8), "t") == plan_svg(explain_plan(ragged(300), 32, 8), "t")


@pytest.mark.parametrize(
    "name", ["<&>\"']]>.txt", "a\nb\x00\x1b\ud800\uffff", "\N{CJK UNIFIED IDEOGRAPH-6811}" * 200, "long" * 500]
)
def test_any_name_can_be_drawn(name: str) -> None:
    root = check_picture(plan_svg(explain_plan(KVTree([-1], [77]), 32, 8), name))
    assert root[0].text.startswith("Plan of ")
    if name.startswith("<"):
        assert root[0].text == f"Plan of {name}" == texts(root)[0]
    if len(name) > 100:
        assert "…" in texts(root)[0]


@pytest.mark.parametrize("tree", [ragged(10_000), star(10_000), chain(10_000)], ids=["ragged", "star", "chain"])
def test_large_trees_take_seconds(tree: KVTree) -> None:
    plan_svg(explain_plan(KVTree([-1], [1]), 32, 8), "compiles")
    begin = time.perf_counter()
    explained = explain_plan(tree, 32, 8)
    svg = plan_svg(explained, "large")
    assert time.perf_counter() - begin < 5
    assert len(svg) < 100_000
    assert_conserved(fold(explained), explained)


# Labels


def test_labels_are_at_most_as_wide_as_estimated() -> None:
    image_font = pytest.importorskip("PIL.ImageFont")
    font_manager = pytest.importorskip("matplotlib.font_manager")
    svg = [plan_svg(explain_plan(tree, 32, 8), "a tree") for tree in (ragged(40), ragged(500), star(50))]
    said = {text for one in svg for text in texts(ElementTree.fromstring(one))}
    for weight in ("normal", "bold"):
        path = font_manager.findfont(font_manager.FontProperties(family="DejaVu Sans", weight=weight))
        font = image_font.truetype(path, 100)
        for text in said:
            assert font.getlength(text) <= text_width(text, 100, weight == "bold"), text


def test_shortening_keeps_both_ends() -> None:
    assert shorten("short", 100, 12) == "short"
    assert re.fullmatch("first.*….*last", shorten("first" + "x" * 100 + "last", 200, 12))
    assert text_width(shorten("x" * 100, 200, 12), 12) <= 200
    assert shorten("x" * 100, 1, 12) == "…"


def test_labels_are_escaped() -> None:
    assert label("a < b & c\x07", 1, 2.5, 12) == '<text x="1" y="2.5" font-size="12">a &lt; b &amp; c</text>'
