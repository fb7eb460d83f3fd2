"""The figures: speed against the best peer, share of the floor, planning time. Matplotlib; white cards, SVG or PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench.floor import LAUNCH_US
from bench.names import display_name
from bench.records import median_us
from bench.summary import against_best, best_peer, best_time, floor_share, geometric_mean, peer_names

__all__ = ["floor_figure", "planning_figure", "save_figure", "speed_figure"]

Row = dict[str, Any]
Series = tuple[str, dict[str, Any], Callable[[Row], float | None]]
"""Label, style, and the value to draw in a row."""

STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",  # a white card: legible on dark pages too
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "svg.hashsalt": "fasttree-cupy",  # the same data give the same file
}
# Okabe and Ito's palette, which colour-blind readers can tell apart; the shapes say the same without colour.
# Ours is hollow: a peer's marker in the same place shows inside it.
OURS = {"facecolors": "none", "edgecolors": "#D55E00", "marker": "D", "s": 44, "linewidths": 1.3, "zorder": 4}
PEER_STYLES = (
    {"color": "#0072B2", "marker": "o"},
    {"color": "#009E73", "marker": "^"},
    {"color": "#56B4E9", "marker": "s"},
    {"color": "#CC79A7", "marker": "v"},
    {"color": "#E69F00", "marker": "P"},
    {"color": "#666666", "marker": "X"},
)
BEST_PEER = {"color": "#0072B2", "marker": "o", "s": 18, "linewidths": 0, "zorder": 3}
SLOWEST_SHOWN = 0.1
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


def speed_figure(document: dict[str, Any], suite: str, own: str) -> Figure:
    """Speed of everyone on each tree of a suite, where the best peer's is 1; one panel a head layout."""
    rows, peers = _rows(document, suite), peer_names(document)
    speedups = against_best(rows, own, peers)
    won = len(speedups.ratios) - len(speedups.lost)
    name = display_name(own, document)

    def speed(contestant: str) -> Callable[[Row], float | None]:
        def value(row: Row) -> float | None:
            time, best = median_us(row, contestant), best_time(row, peers)
            return None if time is None or best is None else best / time

        return value

    speeds = {peer: [x for row in rows if (x := speed(peer)(row)) is not None] for peer in peers}
    shown = [peer for peer in peers if geometric_mean(speeds[peer]) >= SLOWEST_SHOWN]  # NaN, of no times, is not
    notes = ["Trees: nodes a level above tokens of each."]
    if any(x < SLOWEST_SHOWN for peer in shown for x in speeds[peer]):
        notes.append(f"At the left edge: slower than {SLOWEST_SHOWN:g}.")
    if any(len(speeds[peer]) < len(rows) for peer in shown):
        notes.append("No marker: a peer that could not run, or has no published time.")
    notes += [
        f"Not drawn: {display_name(peer, document)}, {geometric_mean(speeds[peer]):.2g} in the mean."
        for peer in peers
        if speeds[peer] and peer not in shown
    ]
    title = (
        f"{suite}: {name} (ours) is {speedups.mean:.2f} times as fast as the best peer of each case (geometric mean), "
        f"and ahead of it in {won} of {len(speedups.ratios)}.\n{' '.join(notes)}"
    )
    styles = dict(zip(peers, _cycled(len(peers)), strict=True))
    series = [
        (display_name(peer, document), {"s": 16, "zorder": 3, "linewidths": 0, **styles[peer]}, speed(peer))
        for peer in shown
    ]
    series.append((f"{name} (ours)", OURS, speed(own)))
    figure, axes = _tree_panels(rows, series, title, "speed, best peer = 1")
    highest = max([ratio for ratio, _ in speedups.ratios] + [1.2])
    for axis in axes:
        axis.set_xscale("log")
        axis.set_xlim(SLOWEST_SHOWN * 0.9, highest * 1.15)
        axis.xaxis.set_major_locator(FixedLocator(TICKS))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axis.axvspan(1, highest * 1.15, color="#D55E00", alpha=0.07, lw=0)
        axis.axvline(1, color="#333333", lw=0.8, zorder=2)
    return figure


def floor_figure(document: dict[str, Any], suite: str, own: str) -> Figure:
    """Share of the floor that we and the best peer reach on each tree of a suite; one panel a head layout."""
    rows, peers = _rows(document, suite), peer_names(document)

    def own_share(row: Row) -> float | None:
        time = median_us(row, own)
        return None if time is None else floor_share(row, time)

    def peer_share(row: Row) -> float | None:
        found = best_peer(row, peers)
        return None if found is None else floor_share(row, found[1])

    means = [geometric_mean(x for row in rows if (x := share(row)) is not None) for share in (own_share, peer_share)]
    name = display_name(own, document)
    title = (
        f"{suite}: {name} (ours) reaches {means[0]:.2f} of the floor, the best peer of each case {means[1]:.2f}.\n"
        "Trees: nodes a level above tokens of each. The floor is an estimate: the longer of two times, reading each "
        "byte of K, V, Q and O once at the bandwidth that a plain read reached on this GPU, and the products at the "
        f"rate of a large matrix product, plus {LAUNCH_US:g} us for a launch."
    )
    series: list[Series] = [("best peer", BEST_PEER, peer_share), (f"{name} (ours)", OURS, own_share)]
    figure, axes = _tree_panels(rows, series, title, "share of the floor")
    for axis in axes:
        axis.set_xlim(0, 1.03)
        axis.axvline(1, color="#333333", lw=0.8, zorder=2)
    return figure


def planning_figure(document: dict[str, Any]) -> Figure:
    """Planning time against the number of nodes: the heuristic in three ways, and the planner of `plan_decode`."""
    rows = document["cases"]
    styles = {
        "oracle_ms": ("plain Python", "#666666", "s", 4),
        "nodes_ms": ("from node objects", "#0072B2", "o", 4),
        "arrays_ms": ("from arrays", "#D55E00", "D", 0),
        "plan_decode_ms": ("plan_decode", "#009E73", "v", -8),
    }
    most_nodes = max(row["nodes"] for row in rows)
    seconds = [
        row[field] / 1000
        for row in rows
        for field in ("arrays_ms", "nodes_ms", "plan_decode_ms")
        if row["nodes"] == most_nodes
    ]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axis = figure.subplots()
        for field, (label, color, marker, rise) in styles.items():
            for kind, line_style in (("random", "-"), ("levels", ":")):
                points = [(row["nodes"], row[field]) for row in rows if row["kind"] == kind and field in row]
                if points:
                    axis.plot(*zip(*points, strict=True), line_style, color=color, marker=marker, ms=3.5, lw=1.2)
                if points and kind == "random":
                    axis.annotate(label, points[-1], (6, rise), textcoords="offset points", color=color)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlim(right=axis.get_xlim()[1] * 9)  # room for the labels
        axis.set_ylim(top=axis.get_ylim()[1] * 2)
        axis.xaxis.set_major_locator(FixedLocator([10**k for k in range(1, len(str(most_nodes)))]))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ms, _: f"{ms:g}"))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda nodes, _: f"{nodes:,.0f}"))
        axis.grid(color="#DDDDDD", lw=0.6)
        axis.set_xlabel("nodes of the tree (solid: random trees; dotted: four children a node)")
        axis.set_ylabel("planning time, ms")
        axis.set_title(
            f"Planning {most_nodes:,} nodes takes {min(seconds):.2g} to {max(seconds):.2g} s on one core",
            loc="left",
            fontsize=9,
        )
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as SVG or PNG, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with matplotlib.rc_context(STYLE):
        figure.savefig(path, dpi=150, metadata=metadata)


def _rows(document: dict[str, Any], suite: str) -> list[Row]:
    return [row for row in document["cases"] if row["suite"] == suite]


def _cycled(count: int) -> list[dict[str, str]]:
    return [PEER_STYLES[i % len(PEER_STYLES)] for i in range(count)]


def _tree_panels(rows: list[Row], series: list[Series], title: str, unit: str) -> tuple[Figure, list[Any]]:
    """Panels side by side, one a head layout; a line a tree, a marker a series."""
    trees = list(dict.fromkeys(row["tree"] for row in rows))
    layouts = list(dict.fromkeys((row["num_qo_heads"], row["num_kv_heads"]) for row in rows))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.4 + 2.1 * max(2, len(layouts)), 1.9 + 0.33 * len(trees)), layout="constrained")
        axes = list(figure.subplots(1, len(layouts), sharey=True, squeeze=False)[0])
        for axis, (q, kv) in zip(axes, layouts, strict=True):
            shown = [row for row in rows if (row["num_qo_heads"], row["num_kv_heads"]) == (q, kv)]
            for label, style, value in series:
                points = [(x, trees.index(row["tree"])) for row in shown if (x := value(row)) is not None]
                xs = [max(x, SLOWEST_SHOWN) if math.isfinite(x) else math.nan for x, _ in points]
                axis.scatter(xs, [y for _, y in points], label=label, clip_on=False, **style)
            axis.set_title(f"heads {q}/{kv}", fontsize=8)
            axis.set_xlabel(unit)
            axis.grid(axis="x", color="#DDDDDD", lw=0.6)
            for y in range(len(trees)):
                axis.axhline(y, color="#EEEEEE", lw=0.6, zorder=0)
            axis.tick_params(axis="y", length=0)
        axes[0].set_yticks(range(len(trees)), [tree.replace(" x ", "\n") for tree in trees], fontsize=6)
        axes[0].set_ylim(len(trees) - 0.4, -0.6)
        width = int(13 * figure.get_figwidth())  # characters of this font size
        lines = [textwrap.fill(line, width) for line in title.split("\n")]
        figure.suptitle("\n".join(lines), fontsize=9, x=0.01, ha="left")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=1 + len(layouts), frameon=False)
    return figure, axes
