"""Time decode against its peers, on a GPU.

All published cases with every peer that is there::

    python -m bench.bench_decode --suite fasttree15 pat20 --fasttree-artifact PATH/kernel_bench \\
        --published PATH/peers_h200.json --output bench/results/decode_h200.json

One tree::

    python -m bench.bench_decode --levels 1,16,64 --tokens 1024,256,32 --heads 32/8
    python -m bench.bench_decode --tree tree.txt --heads 32/8 64/8 --dtype bfloat16

Every output is compared with dense attention in float64 before it is timed. A wrong one is named, not timed, and the
exit status is 1. Where there is no GPU the exit status is 2.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import machine, records
from bench.contestants import OWN, Contestant, Planned
from bench.device import Device, Gpu
from bench.floor import Rates
from bench.measure import measure_case
from bench.peers import PEERS
from bench.summary import best_peer, floor_share, own_names, peer_names, summary
from bench.workloads import SUITES, Case, suite
from fasttree_cupy.checks import FLOAT8_DTYPES
from fasttree_cupy.execution.device import gpu_problem

__all__ = ["main"]

DEFAULT_HEADS = (32, 8)
PROGRAM = "bench.bench_decode"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(arguments)
    problem = gpu_problem()
    if problem is not None:
        print(f"bench_decode needs a GPU: {problem}", file=sys.stderr)
        return 2
    gpu = Gpu()
    rates, how = machine.measured_rates(gpu)
    gpu.release()
    about = machine.describe(PROGRAM, arguments, args.commit) | machine.describe_gpu()
    about |= {"bandwidth": rates.bandwidth, "matrix_rate": rates.matrix_rate, "matrix_rate_from": how}
    print(f"{about['gpu']}: reads {rates.bandwidth / 1e12:.2f} TB/s, {rates.matrix_rate / 1e12:.0f} TFLOP/s ({how})")
    contestants: list[Contestant] = [Planned()]
    if not args.kv_dtype:
        contestants = [make() for make in OWN] + [PEERS[name](args.fasttree_artifact) for name in args.peers]
    return run(args, contestants, gpu, rates, about)


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_decode", description="Time decode against its peers, on a GPU.")
    what = parser.add_argument_group("what to run")
    what.add_argument("--suite", nargs="+", choices=SUITES, default=[], help="published lists of trees")
    what.add_argument("--tree", nargs="+", type=Path, default=[], metavar="FILE", help="tree files")
    what.add_argument("--levels", metavar="N,N,...", help="nodes a level, with --tokens")
    what.add_argument("--tokens", metavar="N,N,...", help="tokens of each node of a level")
    what.add_argument("--heads", nargs="+", type=heads, metavar="Q/KV", help="default: the suite's own, else 32/8")
    what.add_argument("--head-dim", type=int, default=128)
    what.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    kv_help = "K and V in float8, with a scale for each KV head; DecodePlan alone takes it"
    what.add_argument("--kv-dtype", choices=FLOAT8_DTYPES, default="", help=kv_help)
    who = parser.add_argument_group("against whom")
    who.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS), help="default: all; none: no peers")
    who.add_argument("--fasttree-artifact", type=Path, metavar="FOLDER", help="the artifact's kernel_bench folder")
    who.add_argument("--published", type=Path, metavar="FILE", help="published figures of the same GPU")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=repeats, default=30, help="timed runs of each contestant")
    how.add_argument("--check-requests", type=int, default=64, help="requests to check in each case; 0: all")
    how.add_argument("--limit-seconds", type=float, help="start no further case after this time")
    how.add_argument("--output", type=Path, metavar="JSON", help="written after every case")
    how.add_argument("--resume", action="store_true", help="keep the complete cases of --output")
    how.add_argument("--commit", help="recorded instead of what git says")
    args = parser.parse_args(arguments)
    if (args.levels is None) != (args.tokens is None):
        parser.error("--levels and --tokens need each other")
    if args.resume and args.output is None:
        parser.error("--resume needs --output")
    args.cases = chosen_cases(args)
    if not args.cases:
        parser.error("nothing to run: give --suite, --tree, or --levels and --tokens")
    return args


def heads(text: str) -> tuple[int, int]:
    """``"32/8"`` as (32, 8)."""
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[0]) % int(parts[1]):
        raise argparse.ArgumentTypeError(f"{text!r}, expected query heads / KV heads, as 32/8")
    return int(parts[0]), int(parts[1])


def repeats(text: str) -> int:
    """A number of runs that has a spread."""
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text!r}, expected 2 or more")
    return int(text)


def chosen_cases(args: argparse.Namespace) -> list[Case]:
    """The cases that the command line names."""
    cases = [case for name in args.suite for case in suite(name, args.heads, args.head_dim, args.dtype, args.kv_dtype)]
    for q, kv in args.heads or [DEFAULT_HEADS]:
        if args.levels is not None:
            cases.append(Case("levels", args.levels, args.tokens, q, kv, args.head_dim, args.dtype, "", args.kv_dtype))
        cases += [
            Case("file", "", "", q, kv, args.head_dim, args.dtype, str(path), args.kv_dtype) for path in args.tree
        ]
    return cases


def run(
    args: argparse.Namespace, contestants: Sequence[Contestant], device: Device, rates: Rates, about: dict[str, Any]
) -> int:
    """Measure all cases and print the summary; returns the exit status."""
    started = time.monotonic()
    document, present = start_document(args, contestants, about)
    figures = published_figures(args.published, about)
    done = {records.key(row) for row in document["cases"]}
    todo = [case for case in args.cases if records.key(case) not in done]
    for number, case in enumerate(todo):
        case_started = time.monotonic()
        if args.limit_seconds is not None and case_started - started > args.limit_seconds:
            print(f"stopped after {args.limit_seconds:g} s, {len(todo) - number} cases left: go on with --resume")
            break
        row = measure_case(case, present, device, rates, args.repeats, args.check_requests)
        device.release()
        document["cases"].append(row | {"commit": about["commit"]})
        records.add_published([document["cases"][-1]], figures)
        if args.output is not None:
            records.save(args.output, document)
        place = f"[{len(args.cases) - len(todo) + number + 1}/{len(args.cases)}]"
        print(f"{place} {progress(document)} | {time.monotonic() - case_started:.1f} s", flush=True)
    print("\n".join(summary(document)))
    return 1 if is_failure(document) else 0


def start_document(
    args: argparse.Namespace, contestants: Sequence[Contestant], about: dict[str, Any]
) -> tuple[dict[str, Any], list[Contestant]]:
    """The document to add cases to, with what a resumed file holds, and the contestants that can run."""
    problems = {contestant.name: contestant.problem() for contestant in contestants}
    entries = {c.name: {"own": c.own, "problem": problems[c.name]} for c in contestants}
    present = [contestant for contestant in contestants if problems[contestant.name] is None]
    for name, problem in problems.items():
        if problem is not None:
            print(f"absent: {name}: {problem}")
    document: dict[str, Any] = {"machine": about, "contestants": entries, "cases": []}
    if args.resume and args.output.exists():
        old = records.load(args.output)
        if old["machine"]["gpu"] != about["gpu"]:
            raise SystemExit(f"{args.output} holds results of {old['machine']['gpu']}, this is {about['gpu']}")
        wanted, names = {records.key(case) for case in args.cases}, [contestant.name for contestant in present]
        document["contestants"] = old["contestants"] | entries
        document["cases"] = [
            row for row in old["cases"] if records.key(row) not in wanted or records.is_complete(row, names)
        ]
    return document, present


def published_figures(path: Path | None, about: dict[str, Any]) -> dict[str, Any]:
    """Published figures, where they are of this kind of GPU."""
    nothing: dict[str, Any] = {"peers": {}, "cases": []}
    if path is None:
        return nothing
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if about["gpu"].split()[-1] in figures["machine"]:
        return figures
    print(f"{path} is left aside: its figures are of {figures['machine']}, this is {about['gpu']}")
    return nothing


def progress(document: dict[str, Any]) -> str:
    """One line on the newest case."""
    row = document["cases"][-1]
    parts = [f"{row['suite']}: {row['name']}:"]
    best = best_peer(row, peer_names(document))
    for own in own_names(document):
        time_us = records.median_us(row, own)
        if time_us is None:
            parts.append(f"{own} not timed,")
            continue
        parts.append(f"{own} {time_us:.1f} us, {100 * floor_share(row, time_us):.0f}% of the floor,")
        if best is not None:
            parts.append(f"{best[1] / time_us:.2f}x")
    if best is not None:
        parts.append(f"best peer {best[0]} {best[1]:.1f} us")
    bad = [f"{name.upper()} {kind}" for name, r in row["results"].items() for kind in ("wrong", "failed") if kind in r]
    return " ".join([*parts, *bad]).rstrip(",")


def is_failure(document: dict[str, Any]) -> bool:
    """Whether an output was wrong, or a contestant of ours failed."""
    own = own_names(document)
    outcomes = [(name, result) for row in document["cases"] for name, result in row["results"].items()]
    return any("wrong" in result or ("failed" in result and name in own) for name, result in outcomes)


if __name__ == "__main__":
    sys.exit(main())
