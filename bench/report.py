"""Turn result files into README's tables and the figures.

::

    python -m bench.report bench/results/decode_h200.json bench/results/preparation.json \\
        --markdown README.md --figures docs/figures

The tables go between the lines ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` of the Markdown file, or to stdout.
Figures need matplotlib, which ``pip install -e .[bench]`` brings.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import records
from bench.floor import LAUNCH_US
from bench.names import display_name, is_measured, readable_size
from bench.records import amortised_us, best_variant, median_us
from bench.summary import (
    DECODES_PER_PLAN,
    Speedups,
    against,
    against_best,
    best_peer,
    best_time,
    floor_share,
    full_name,
    geometric_mean,
    own_names,
    peer_names,
)

__all__ = ["decode_tables", "main", "planning_table", "put_between_markers"]

Row = dict[str, Any]

SUITE_ORIGINS = {
    "fasttree15": "fasttree15 are the 15 of FastTree's kernel benchmark.",
    "pat20": "pat20 are the 20 of PAT's (ASPLOS'26).",
}
PUBLISHED_BY = {"pat": "PAT (ASPLOS'26) for an H200"}

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the report; returns the exit status."""
    args = parse_args(sys.argv[1:] if arguments is None else arguments)
    documents = [records.load(path) for path in args.results]
    if any(not document["cases"] for document in documents):
        print("a results file holds no cases", file=sys.stderr)
        return 2
    blocks: list[str] = []
    for document in documents:
        blocks += planning_table(document) if is_planning(document) else decode_tables(document, args.own, args.full)
        if args.figures is not None:
            drawn = write_figures(document, args.own, args.figures)
            folder = args.markdown.parent if args.markdown is not None else Path()
            blocks += [f"![{shows}]({Path(os.path.relpath(path, folder)).as_posix()})" for path, shows in drawn.items()]
    text = "\n\n".join(blocks)
    if args.markdown is None:
        print(text)
    else:
        put_between_markers(args.markdown, text)
    return 0


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="report", description="Turn result files into tables and figures.")
    parser.add_argument("results", nargs="+", type=Path, help="of bench_decode and bench_preparation")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="put the tables between its markers")
    parser.add_argument("--figures", type=Path, metavar="FOLDER", help="draw the figures as SVG")
    parser.add_argument("--own", help="which of our contestants; default: the fastest")
    parser.add_argument("--full", action="store_true", help="a row for every case as well")
    return parser.parse_args(arguments)


def is_planning(document: dict[str, Any]) -> bool:
    """Whether a results file is of ``bench_preparation``."""
    return "contestants" not in document


def put_between_markers(path: Path, text: str) -> None:
    """Replace what stands between the markers of a Markdown file.

    Raises
    ------
    ValueError
        If the file does not have the two markers, in order, once each.
    """
    old = path.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{path}: expected one {BEGIN} and one {END} after it")
    before, rest = old.split(BEGIN)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}", encoding="utf-8", newline="\n")


def fastest_own(document: dict[str, Any]) -> str:
    """Our contestant with the largest share of the floor."""

    def share(own: str) -> float:
        times = [(row, median_us(row, own)) for row in document["cases"]]
        mean = geometric_mean(floor_share(row, time) for row, time in times if time is not None)
        return mean if mean == mean else 0.0

    return max(own_names(document), key=share)


def decode_tables(document: dict[str, Any], own: str | None = None, full: bool = False) -> list[str]:
    """Blocks of Markdown on decoding: where it ran, how to read it, a row a head layout, and the cases that we lose."""
    shown = [own] if own is not None else own_names(document)
    own, peers, rows = own or fastest_own(document), peer_names(document), document["cases"]
    header = ["ours", "trees", "heads", "cases", *(display_name(peer, document) for peer in peers)]
    header += ["best peer of each case", "worst case", "share of the floor", "best peer's share", "a peer is faster in"]
    layouts = dict.fromkeys((row["suite"], row["num_qo_heads"], row["num_kv_heads"]) for row in rows)
    body = [
        [
            display_name(name, document),
            *_layout_row(
                key, [r for r in rows if (r["suite"], r["num_qo_heads"], r["num_kv_heads"]) == key], name, peers
            ),
        ]
        for name in shown
        for key in layouts
    ]
    blocks = [
        _provenance(document),
        _terms(document),
        _table(header, body),
        _about_peers(document, peers),
        _planning_cost(document, own),
        _host_cost(document),
        *(_losses(document, name, peers) for name in shown),
    ]
    return [block for block in [*blocks, *([_every_case(document, own, peers)] if full else [])] if block]


def _layout_row(key: tuple[str, int, int], rows: list[Row], own: str, peers: list[str]) -> list[str]:
    best = against_best(rows, own, peers)
    return [
        key[0],
        f"{key[1]}/{key[2]}",
        str(len(rows)),
        *(_mean_and_count(against(rows, own, peer), len(rows)) for peer in peers),
        f"**{best.mean:.2f}x**" if best.ratios else "-",
        f"{best.worst[0]:.2f}x" if best.ratios else "-",
        f"{geometric_mean(floor_share(r, t) for r in rows if (t := median_us(r, own)) is not None):.2f}",
        f"{geometric_mean(floor_share(r, t) for r in rows if (t := best_time(r, peers)) is not None):.2f}",
        f"{len(best.lost)} of {len(best.ratios)}",
    ]


def _mean_and_count(speedups: Speedups, cases: int) -> str:
    """A mean, and over how many cases it is where not over all."""
    if not speedups.ratios:
        return "-"
    return f"{speedups.mean:.2f}x" + ("" if len(speedups.ratios) == cases else f" ({len(speedups.ratios)})")


def _provenance(document: dict[str, Any]) -> str:
    about = document["machine"]
    first = document["cases"][0]
    return (
        f"How many times as fast ours is as each peer, geometric means; {first['dtype']}, head_dim "
        f"{first['head_dim']}. {about['gpu']}, commit {(about['commit'] or 'unknown')[:10]}, {about['date']}. Medians "
        f"with a cold L2 cache: each run is timed after a write of several times its size. Of every output, "
        f"{first['checked_requests']} requests were checked against float64 before it was timed. Of several tile "
        f"settings the best counts."
    )


def _terms(document: dict[str, Any]) -> str:
    """What the words of tables and figures mean: those of them that this file needs."""
    about, suites = document["machine"], {row["suite"] for row in document["cases"]}
    peers, example = peer_names(document), max(document["cases"], key=lambda row: row["num_kv_heads"] == 8)
    terms = {
        "ours": "`plan_decode` is a `run` of the plan that it makes; FastTree's interface is `fasttree_preparation` "
        "and `fasttree_decode`, which have the arguments and results of the FastTree artifact (MLSys 2025).",
        "peers": _versions(document),
        "trees": " ".join(SUITE_ORIGINS[suite] for suite in SUITE_ORIGINS if suite in suites)
        + f" `{example['tree']}` has levels of {example['nodes_per_level'].replace(',', ', ')} nodes with "
        f"{example['tokens_per_level'].replace(',', ', ')} tokens each.",
        "heads": f"{example['num_qo_heads']}/{example['num_kv_heads']} is {example['num_qo_heads']} query heads and "
        f"{example['num_kv_heads']} KV heads.",
        "floor": "an estimate of the least time: the longer of two, reading each byte of K, V, Q and O once at the "
        f"bandwidth that a plain read reached on this GPU ({about['bandwidth'] / 1e12:.2f} TB/s), and the products at "
        f"the rate of a large matrix product ({about['matrix_rate'] / 1e12:.0f} TFLOP/s in float16), plus "
        f"{LAUNCH_US:g} us for a launch.",
    }
    if "torch_sdpa" in peers or "dense_cupy" in peers:
        terms["peers"] += " torch attention and dense CuPy read a copy of K and V for each request, made beforehand."
    return "\n".join(f"- {name}: {meaning.strip()}" for name, meaning in terms.items() if meaning.strip())


def _versions(document: dict[str, Any]) -> str:
    names = {"flashinfer-python": "FlashInfer", "triton": "Triton", "torch": "torch", "cupy": "CuPy"}
    versions = document["machine"].get("versions", {})
    found = [f"{name} {versions[package]}" for package, name in names.items() if package in versions]
    return f"{', '.join(found)}." if found else ""


def _about_peers(document: dict[str, Any], peers: list[str]) -> str:
    """Which peers did not run in all cases, and whose times were not measured here."""
    rows = document["cases"]
    sentences = []
    if any(0 < sum(median_us(row, peer) is not None for row in rows) < len(rows) for peer in peers):
        sentences.append("In brackets: the number of cases in which the peer has a time, where it is not all.")
    for peer in peers:
        if not is_measured(peer, document):
            name, source = display_name(peer, document), PUBLISHED_BY.get(peer, "its authors")
            sentences.append(f"{name}: times published by {source}, not run here.")
    return " ".join(sentences)


def _planning_cost(document: dict[str, Any], own: str) -> str:
    """One sentence: what planning adds to a decode when several share it."""
    variants = [found for row in document["cases"] if (found := best_variant(row, own)) and found["plan_ms"]]
    if not variants:
        return ""
    parts = []
    for decodes in DECODES_PER_PLAN:
        ratio = geometric_mean(amortised_us(found, decodes) / found["median_us"] for found in variants)
        parts.append(f"{ratio:.2f} times as long with {decodes:,}")
    plans = [found["plan_ms"] for found in variants]
    return (
        f"{display_name(own, document)}: planning a tree takes {min(plans):.2f} to {max(plans):.2f} ms, upload "
        f"included, and serves any number of decodes; its share included, a decode takes {', '.join(parts)} decodes a "
        "plan."
    )


def _host_cost(document: dict[str, Any]) -> str:
    """One sentence: what a call costs the host, which a caller without a graph or a queue waits for."""
    parts = []
    for name in document["contestants"]:
        found = [best for row in document["cases"] if (best := best_variant(row, name)) and best.get("host_us")]
        if found:
            parts.append(
                f"{statistics.median(best['host_us'] for best in found):.0f} us ({display_name(name, document)})"
            )
    if not parts:
        return ""
    return (
        f"To queue one call takes the host, in the median case, {', '.join(parts)}: called one by one, without a CUDA "
        "graph or work queued ahead, shorter decodes wait for that."
    )


def _losses(document: dict[str, Any], own: str, peers: list[str]) -> str:
    """How often a peer is faster than one of ours, which and where; then each of those cases by name."""
    rows, name = document["cases"], display_name(own, document)
    against_all = against_best(rows, own, peers)
    if not against_all.lost:
        return ""
    lines, winners = [], Counter[str]()
    for ratio, row in against_all.lost:
        peer, time = best_peer(row, peers) or ("", 0.0)
        winners[display_name(peer, document)] += 1
        where = f"{full_name(row)}: {median_us(row, own):.1f} us"
        lines.append(f"- {where}, {display_name(peer, document)} {time:.1f} us ({ratio:.3f}x)")
    alone = [row for row in rows if row["unique_tokens"] == row["summed_tokens"]]
    lost_alone = sum(row["unique_tokens"] == row["summed_tokens"] for _, row in against_all.lost)
    ratio, worst = against_all.worst
    sentence = (
        f"A peer is faster than {name} in {len(lines)} of {_cases(len(against_all.ratios))}: "
        f"{', '.join(f'{peer} in {count}' for peer, count in winners.most_common())}. "
        f"The worst is {ratio:.2f}x, at {full_name(worst)}."
    )
    if lost_alone:
        sentence += f" {lost_alone} of these are among the {_cases(len(alone))} in which requests share no token."
    title = f"By name: where a peer is faster than {name}"
    return "\n".join([sentence, "", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"])


def _cases(count: int) -> str:
    return f"{count} case" + ("" if count == 1 else "s")


def _every_case(document: dict[str, Any], own: str, peers: list[str]) -> str:
    header = [
        "case",
        "floor us",
        f"{display_name(own, document)} us",
        *(f"{display_name(peer, document)} us" for peer in peers),
        "speed",
    ]
    body = []
    for row in document["cases"]:
        times = [median_us(row, name) for name in (own, *peers)]
        best, mine = best_time(row, peers), median_us(row, own)
        speed = "-" if best is None or mine is None else f"{best / mine:.2f}x"
        body.append(
            [full_name(row), f"{row['floor_us']:.1f}", *("-" if t is None else f"{t:.1f}" for t in times), speed]
        )
    return _table(header, body)


def planning_table(document: dict[str, Any]) -> list[str]:
    """Blocks of Markdown on planning: the paper's largest tree, and a row a power of ten of nodes."""
    header = ["tree", "nodes", "requests", "vnodes", "from arrays", "from node objects", "plain Python"]
    header += ["`plan_decode`", "size of the plan"]
    body = []
    for row in document["cases"]:
        if row["kind"] != "paper" and 10 ** (len(str(row["nodes"])) - 1) != row["nodes"]:
            continue
        oracle = f"{row['oracle_ms']:.1f} ms" if "oracle_ms" in row else "-"
        counts = [f"{row[name]:,}" for name in ("nodes", "requests", "vnodes")]
        times = [f"{row['arrays_ms']:.2f} ms", f"{row['nodes_ms']:.2f} ms", oracle, f"{row['plan_decode_ms']:.2f} ms"]
        body.append([row["kind"], *counts, *times, readable_size(row["plan_bytes"])])
    about = (
        f"Planning time on one core ({document['machine']['processor']}), medians: FastTree's heuristic, from arrays, "
        "from node objects and as the tests' version in plain Python (the paper's tree through the whole of "
        "`fasttree_preparation`), and the planner that `plan_decode` uses on an H200. Trees: random ones, ones of four "
        "children a node, and the largest of FastTree's paper. A vnode is a unit of work: some requests' attention to "
        "some tokens. The size is that of the heuristic's arrays, its work space not counted."
    )
    return [about, _table(header, body)]


def _table(header: list[str], body: list[list[str]]) -> str:
    rule = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, rule, *body))


def write_figures(document: dict[str, Any], own: str | None, folder: Path) -> dict[Path, str]:
    """Draw the figures of a results file; returns their paths, and what each shows."""
    from bench import figures  # matplotlib is needed only here

    drawn = {}
    if is_planning(document):
        shows = "Planning time over the number of nodes: FastTree's heuristic in three ways, and plan_decode's planner"
        drawn["planning"] = figures.planning_figure(document), shows
    else:
        own = own or fastest_own(document)
        name = display_name(own, document)
        for suite in dict.fromkeys(row["suite"] for row in document["cases"]):
            shows = f"{suite}: speed of {name} and of each peer on every tree, the best peer's being 1"
            drawn[f"speed_{suite}"] = figures.speed_figure(document, suite, own), shows
            shows = f"{suite}: share of the floor that {name} and the best peer reach on every tree"
            drawn[f"floor_{suite}"] = figures.floor_figure(document, suite, own), shows
    paths = {}
    for file, (figure, shows) in drawn.items():
        path = folder / f"{file}.svg"
        figures.save_figure(figure, path)
        paths[path] = shows
    return paths


if __name__ == "__main__":
    sys.exit(main())
