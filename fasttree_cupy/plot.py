"""A picture of what the documented heuristic did with a tree: an SVG of folded nodes beside their vnodes.

A line a box: on the left the tree, indented; on the right a bar, as long as the tokens that one node's vnodes
cover, cut into those vnodes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from fasttree_cupy.captions import Captions, captions_of, plan_captions
from fasttree_cupy.explain import ExplainedPlan, VnodeGrid
from fasttree_cupy.fold import Box, fold
from fasttree_cupy.svg import element, escaped, label, shorten, text_width

__all__ = ["plan_svg"]

# Okabe and Ito's palette, which colour-blind readers can tell apart; words say the same.
SPLIT_K, SPLIT_Q, MIXED = ("#0072B2", "#CFE5F1"), ("#D55E00", "#FADFC9"), ("#666666", "#F4F4F4")
"""Line and fill of a box."""
PHASES = ("#009E73", "#CC79A7")
FADED = 0.4
INK, GREY, PAPER = "#1A1A1A", "#8C8C8C", "#FFFFFF"

SIZE, TITLE_SIZE, LINE = 12, 16, 18
MARGIN, PAD, GAP = 20, 10, 16
BOX, PITCH, LINE_IN_BOX = 40, 50, 16
INDENT, MOST_INDENT = 24, 480
BAR_WIDTH, BAR_HEIGHT, LEAST_BAR = 240, 26, 1.5
LEAST_CELL = 4
"""Cuts closer than this would paint a bar white."""
SWATCH = 24

LEGEND = (
    ("Split-K: on its own", "node", SPLIT_K),
    ("Split-Q: with its parent's tokens", "node", SPLIT_Q),
    ("vnodes of phase 0", "bar", (PHASES[0], 1)),
    ("of phase 1", "bar", (PHASES[1], 1)),
    ("tokens taken along", "bar", (PHASES[0], FADED)),
)
BAR_NOTE = ("the vnodes of one node: KV splits across,", "query tiles down; uncut where too fine to draw")


class Line(NamedTuple):
    """A box in its place; `left` and `top` are its corner's."""

    box: Box
    captions: Captions
    parent: int | None  # line of the parent
    left: float
    top: float

    @property
    def middle(self) -> float:
        return self.top + BOX / 2


class Columns(NamedTuple):
    """Where the boxes end, where bars and the words beside them begin, and the picture's width."""

    box_end: float
    bar: float
    words: float
    width: float


def plan_svg(explained: ExplainedPlan, name: str) -> str:
    """Draw a planned tree.

    Parameters
    ----------
    explained : ExplainedPlan
    name : str
        What the title calls the tree.

    Returns
    -------
    str
        An SVG document. A large tree is folded, see ``fold``.
    """
    folded = list(walk(fold(explained)))
    indent = min(INDENT, MOST_INDENT / max(1, max(depth for _, _, depth in folded)))
    captions = [captions_of(box, explained) for box, _, _ in folded]
    lefts = [MARGIN + indent * depth for _, _, depth in folded]
    head = plan_captions(explained)
    columns = columns_for(captions, lefts, head)
    legend, top = draw_legend(columns, MARGIN + TITLE_SIZE + LINE * len(head) + GAP)
    top += 2 * GAP + LINE  # for the scale
    lines = [
        Line(box, said, parent, left, top + PITCH * i)
        for i, ((box, parent, _), said, left) in enumerate(zip(folded, captions, lefts, strict=True))
    ]
    longest = max([int(explained.covered[box.node]) for box, _, _ in folded if box.alike], default=0)
    parts = [
        *draw_head(name, head, columns),
        *legend,
        *draw_scale(longest, columns, top - GAP),
        *(draw_connector(line, lines[line.parent], indent) for line in lines if line.parent is not None),
        *(draw_box(line, columns) for line in lines),
        *(draw_vnodes(line, columns, longest, explained) for line in lines),
    ]
    return document(parts, f"Plan of {name}", columns.width, lines[-1].top + BOX + MARGIN)


# Layout.


def walk(root: Box) -> Iterator[tuple[Box, int | None, int]]:
    """Boxes from the first line to the last: box, its parent's line, depth."""
    stack: list[tuple[Box, int | None, int]] = [(root, None, 0)]
    line = 0
    while stack:
        box, parent, depth = stack.pop()
        yield box, parent, depth
        stack += [(child, line, depth + 1) for child in reversed(box.children)]
        line += 1


def columns_for(captions: list[Captions], lefts: list[float], head: list[str]) -> Columns:
    """Columns wide enough for all that is written."""
    box_end = max(left + box_width(said) for said, left in zip(captions, lefts, strict=True))
    words = box_end + GAP + BAR_WIDTH + GAP
    beside = max(text_width(text, SIZE) for said in captions for text in (said.vnodes, said.each, *BAR_NOTE))
    width = max(words + beside, MARGIN + max(text_width(text, SIZE) for text in head)) + MARGIN
    return Columns(box_end, box_end + GAP, words, width)


def box_width(said: Captions) -> float:
    first = text_width(said.name, SIZE, bold=True) + GAP + text_width(said.assignment, SIZE, bold=True)
    return PAD + max(first, text_width(said.sizes, SIZE)) + PAD


# Drawing.


def draw_head(name: str, head: list[str], columns: Columns) -> list[str]:
    title = shorten(f"Plan of {name}", columns.width - 2 * MARGIN, TITLE_SIZE, bold=True)
    first = MARGIN + TITLE_SIZE
    return [
        label(title, MARGIN, first, TITLE_SIZE, bold=True),
        *(label(text, MARGIN, first + LINE * (i + 1), SIZE) for i, text in enumerate(head)),
    ]


def draw_legend(columns: Columns, top: float) -> tuple[list[str], float]:
    """The legend, in as many rows as it takes, and where it ends."""
    parts, x = [], float(MARGIN)
    for text, kind, style in LEGEND:
        width = SWATCH + PAD + text_width(text, SIZE)
        if x > MARGIN and x + width > columns.width - MARGIN:
            x, top = MARGIN, top + LINE
        if kind == "node":
            parts.append(element("rect", x=x, y=top, width=SWATCH, height=12, rx=2, fill=style[1], stroke=style[0]))
        else:
            parts.append(element("rect", x=x, y=top, width=SWATCH, height=12, fill=style[0], fill_opacity=style[1]))
        parts.append(label(text, x + SWATCH + PAD / 2, top + 10, SIZE))
        x += width + GAP
    return parts, top + LINE


def draw_scale(longest: int, columns: Columns, y: float) -> list[str]:
    """The scale over the bars."""
    if longest == 0:
        return []
    end = columns.bar + BAR_WIDTH
    return [
        label("0", columns.bar, y - 4, SIZE),
        label(f"{longest:,} tokens", end, y - 4, SIZE, end=True),
        element("path", d=f"M{columns.bar:.2f} {y + 4}v-4H{end:.2f}v4", fill="none", stroke=GREY),
        *(label(text, columns.words, y + LINE_IN_BOX * (i - 1) + 4, SIZE) for i, text in enumerate(BAR_NOTE)),
    ]


def draw_connector(line: Line, parent: Line, indent: float) -> str:
    """From the parent down and to the right; thick where the parent's tokens come along."""
    trunk = parent.left + indent / 2
    stroke, _ = colors(line.box)
    width = 3 if stroke == SPLIT_Q[0] else 1
    down = element("path", d=f"M{trunk:.2f} {parent.top + BOX:.2f}V{line.middle:.2f}", stroke=GREY, fill="none")
    return down + element(
        "path", d=f"M{trunk:.2f} {line.middle:.2f}H{line.left:.2f}", stroke=stroke, stroke_width=width
    )


def colors(box: Box) -> tuple[str, str]:
    """Line and fill: those of the assignment, where all nodes have the same."""
    return {0: SPLIT_K, box.figures.nodes: SPLIT_Q}.get(box.figures.split_q, MIXED)


def draw_box(line: Line, columns: Columns) -> str:
    box, said, left, top = line.box, line.captions, line.left, line.top
    width, (stroke, fill) = columns.box_end - left, colors(box)
    frame = {"stroke_dasharray": "none" if box.alike else "5 3"}
    return element(
        "g",
        element("rect", x=left, y=top, width=width, height=BOX, rx=4, fill=fill, stroke=stroke, **frame),
        label(said.name, left + PAD, top + LINE_IN_BOX, SIZE, bold=True),
        label(said.assignment, left + width - PAD, top + LINE_IN_BOX, SIZE, bold=True, end=True),
        label(said.sizes, left + PAD, top + 2 * LINE_IN_BOX, SIZE),
        class_="node",
    )


def draw_vnodes(line: Line, columns: Columns, longest: int, explained: ExplainedPlan) -> str:
    """The bar of a box, but for a rest, whose nodes differ, and the words beside it."""
    node, said = line.box.node, line.captions
    grid = explained.grid(node) if line.box.alike else None
    parts = []
    if grid is not None:
        covered, own = int(explained.covered[node]), int(explained.tree.seqlen[node])
        parts = draw_bar(grid, covered, covered - own, columns.bar, line.middle - BAR_HEIGHT / 2, BAR_WIDTH / longest)
    parts += [
        label(text, columns.words, line.top + LINE_IN_BOX * (i + 1), SIZE)
        for i, text in enumerate(filter(None, (said.vnodes, said.each)))
    ]
    return element("g", *parts, class_="vnodes")


def draw_bar(grid: VnodeGrid, covered: int, along: int, x: float, y: float, scale: float) -> list[str]:
    """The vnodes of one node: KV splits across, at their true lengths, query tiles down."""
    width = max(LEAST_BAR, covered * scale)
    border = x + width * along / covered
    parts = []
    for phase, top, height in bands(grid):
        for start, end, opacity in ((x, border, FADED), (border, x + width, 1)):
            if end > start:
                place = {"x": start, "y": y + top, "width": end - start, "height": height}
                parts.append(element("rect", **place, fill=PHASES[phase], fill_opacity=opacity))
    if grid.splits > 1 and grid.split_tokens * scale >= LEAST_CELL:
        cuts = (x + cut * scale for cut in range(grid.split_tokens, covered, grid.split_tokens))
        path = "".join(f"M{cut:.2f} {y:.2f}v{BAR_HEIGHT}" for cut in cuts)
        parts.append(element("path", d=path, stroke=PAPER, stroke_width=1.5))
    return parts


def bands(grid: VnodeGrid) -> Iterator[tuple[int, float, float]]:
    """Phase, top and height of each query tile; of each phase where there are too many tiles to draw."""
    phases = [0] * grid.tiles_phase0 + [1] * grid.tiles_phase1
    heights = [BAR_HEIGHT / grid.tiles] * grid.tiles
    if heights[0] < LEAST_CELL:  # both phases meet where the last tile alone, which is not full, is in phase 1
        phases = sorted(set(phases))
        heights = [float(BAR_HEIGHT)] if len(phases) == 1 else [BAR_HEIGHT - LEAST_CELL, LEAST_CELL]
    top = 0.0
    for i, (phase, height) in enumerate(zip(phases, heights, strict=True)):
        yield phase, top, height - (i + 1 < len(phases))
        top += height


def document(parts: list[str], title: str, width: float, height: float) -> str:
    return element(
        "svg",
        element("title", escaped(title)),
        element("rect", width=width, height=height, rx=8, fill=PAPER),  # a card: legible on dark pages too
        element("g", *parts, font_family="Helvetica, Arial, sans-serif", fill=INK),
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width:.2f} {height:.2f}",
        role="img",
    )
