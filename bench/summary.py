"""What the results say: geometric means, the worst case, and every case where a peer is faster, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.records import amortised_us, best_variant, median_us

__all__ = [
    "Speedups",
    "against",
    "against_best",
    "best_peer",
    "best_time",
    "floor_share",
    "geometric_mean",
    "own_names",
    "peer_names",
    "summary",
]

Row = dict[str, Any]
Time = Callable[[Row], float | None]

DECODES_PER_PLAN = (1, 32, 1000)


def geometric_mean(values: Iterable[float]) -> float:
    """Geometric mean; NaN of no values."""
    logs = [math.log(value) for value in values]
    return math.exp(sum(logs) / len(logs)) if logs else math.nan


def own_names(document: dict[str, Any]) -> list[str]:
    """Our contestants in a results file."""
    return [name for name, entry in document["contestants"].items() if entry["own"]]


def peer_names(document: dict[str, Any]) -> list[str]:
    """Peers that have a time in some case, measured or published."""
    names = dict.fromkeys(name for name, entry in document["contestants"].items() if not entry["own"])
    names |= dict.fromkeys(name for row in document["cases"] for name in row.get("published_us", {}))
    return [name for name in names if any(median_us(row, name) is not None for row in document["cases"])]


def best_peer(row: Row, peers: Iterable[str]) -> tuple[str, float] | None:
    """The fastest of the peers in a case, and its time; None where none has one."""
    times = {peer: time for peer in peers if (time := median_us(row, peer)) is not None}
    return min(times.items(), key=lambda item: item[1]) if times else None


def floor_share(row: Row, time_us: float) -> float:
    """Share of the floor in a time: 1 is as fast as the GPU allows."""
    return float(row["floor_us"] / time_us)


class Speedups:
    """How many times as fast one contestant is as another, over the rows in which both have a time."""

    def __init__(self, rows: Iterable[Row], own: Time, other: Time) -> None:
        times = [(own(row), other(row), row) for row in rows]
        self.ratios = [(b / a, row) for a, b, row in times if a is not None and b is not None]

    @property
    def mean(self) -> float:
        """Geometric mean."""
        return geometric_mean(ratio for ratio, _ in self.ratios)

    @property
    def worst(self) -> tuple[float, Row]:
        """The lowest ratio and its row."""
        return min(self.ratios, key=lambda item: item[0])

    @property
    def lost(self) -> list[tuple[float, Row]]:
        """The rows in which the other is faster, the clearest first."""
        return sorted((item for item in self.ratios if item[0] < 1), key=lambda item: item[0])


def against(rows: Iterable[Row], own: str, peer: str) -> Speedups:
    """Speedups over one peer."""
    return Speedups(rows, lambda row: median_us(row, own), lambda row: median_us(row, peer))


def against_best(rows: Iterable[Row], own: str, peers: Sequence[str]) -> Speedups:
    """Speedups over the best peer of each case."""
    return Speedups(rows, lambda row: median_us(row, own), lambda row: best_time(row, peers))


def best_time(row: Row, peers: Iterable[str]) -> float | None:
    """Time of the best peer; None where none has one."""
    found = best_peer(row, peers)
    return None if found is None else found[1]


def full_name(row: Row) -> str:
    """A case's name with its suite."""
    return f"{row['suite']}: {row['name']}"


def summary(document: dict[str, Any]) -> list[str]:
    """The lines that end a run."""
    rows = document["cases"]
    lines = []
    for own in own_names(document):
        lines += ["", *_summary_of(document, own)]
    lines += ["", *_agreement(document)]
    for name, entry in document["contestants"].items():
        if entry["problem"] is not None:
            lines.append(f"absent: {name}: {entry['problem']}")
    for outcome in ("wrong", "failed"):
        for row in rows:
            for name, result in row["results"].items():
                if outcome in result:
                    lines.append(f"{outcome.upper()}: {name} in {full_name(row)}: {result[outcome]}")
    return lines


def _summary_of(document: dict[str, Any], own: str) -> list[str]:
    rows, peers = document["cases"], peer_names(document)
    timed = [row for row in rows if median_us(row, own) is not None]
    lines = [f"{own}, {len(timed)} of {len(rows)} cases timed"]
    if not timed:
        return lines
    lines += [_line(peer, speedups) for peer in peers if (speedups := against(timed, own, peer)).ratios]
    best = against_best(timed, own, peers)
    if best.ratios:
        lines.append(_line("the best peer of each case", best))
    lines += [line for decodes in DECODES_PER_PLAN if (line := _amortised(timed, own, peers, decodes))]
    lines += _default_variant(timed, own)
    lines.append(f"  share of the floor: {_floor_line(timed, lambda row: median_us(row, own))}")
    if best.ratios:
        lines.append(f"  the best peer's share: {_floor_line(timed, lambda row: best_time(row, peers))}")
    lines.append(f"  a peer is faster in {len(best.lost)} of {len(best.ratios)} cases" + (":" if best.lost else ""))
    for ratio, row in best.lost:
        name, time = best_peer(row, peers) or ("", math.nan)
        lines.append(f"    {full_name(row)}: {median_us(row, own):.1f} us, {name} {time:.1f} us ({ratio:.2f}x)")
    return lines


def _line(peer: str, speedups: Speedups) -> str:
    worst, row = speedups.worst
    where = f"{len(speedups.ratios)} cases; worst {worst:.2f}x, {full_name(row)}"
    return f"  {speedups.mean:6.2f}x as fast as {peer} ({where})"


def _amortised(rows: Sequence[Row], own: str, peers: Sequence[str], decodes: int) -> str:
    """Speedups with the planning shared by a number of decodes, over the peers that plan; empty where none does."""

    def time(name: str) -> Time:
        def amortised(row: Row) -> float | None:
            variant = best_variant(row, name)
            return None if variant is None else amortised_us(variant, decodes)

        return amortised

    parts = []
    for peer in peers:
        planned = [row for row in rows if (best_variant(row, peer) or {}).get("plan_ms") is not None]
        if planned:
            parts.append(f"{peer} {Speedups(planned, time(own), time(peer)).mean:.2f}x")
    calls = "decode" if decodes == 1 else "decodes"
    return f"  planning included, {decodes} {calls} a plan: {', '.join(parts)}" if parts else ""


def _default_variant(rows: Sequence[Row], own: str) -> list[str]:
    """One line where the best of several variants counts: what the default alone costs."""
    results = [row["results"][own] for row in rows]
    variants = list(results[0]["variants"])
    if len(variants) == 1:
        return []
    costs = (r["variants"][variants[0]]["median_us"] / r["variants"][r["best"]]["median_us"] for r in results)
    line = f"  the better of {len(variants)} settings counts; the default, {variants[0]}, alone takes"
    return [f"{line} {geometric_mean(costs):.3f} times as long"]


def _floor_line(rows: Sequence[Row], time: Time) -> str:
    shares = [(floor_share(row, us), row) for row in rows if (us := time(row)) is not None]
    if not shares:
        return "none"
    low, row = min(shares, key=lambda item: item[0])
    return f"{geometric_mean(share for share, _ in shares):.2f} (lowest {low:.2f}, {full_name(row)})"


def _agreement(document: dict[str, Any]) -> list[str]:
    """Our measurement of each peer over the published one."""
    lines = []
    for peer in peer_names(document):
        ratios = [
            variant["median_us"] / row["published_us"][peer]
            for row in document["cases"]
            if (variant := best_variant(row, peer)) and row.get("published_us", {}).get(peer)
        ]
        if ratios:
            lines.append(f"{peer} measured / published: {geometric_mean(ratios):.2f} over {len(ratios)} cases")
    return lines
