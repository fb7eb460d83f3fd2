"""What the results say: geometric means, the worst case, and every case where a peer is faster, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.results import amortised_us, best_variant, median_us

__all__ = ["Speedups", "best_peer", "floor_share", "geometric_mean", "own_names", "peer_names", "summary"]

Row = dict[str, Any]
Time = Callable[[Row, str], float | None]

DECODES_PER_PLAN = (1, 32, 1000)
BEST_PEER = "the best peer of each case"


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
    """How many times as fast as somebody else one contestant is, over the rows in which both have a time."""

    def __init__(self, rows: Sequence[Row], own: Time, other: Time, name: str, against: str) -> None:
        times = [(own(row, name), other(row, against), row) for row in rows]
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


def against(rows: Sequence[Row], own: str, peer: str) -> Speedups:
    """Speedups over one peer."""
    return Speedups(rows, median_us, median_us, own, peer)


def against_best(rows: Sequence[Row], own: str, peers: Sequence[str]) -> Speedups:
    """Speedups over the best peer of each case."""

    def best(row: Row, _: str) -> float | None:
        found = best_peer(row, peers)
        return None if found is None else found[1]

    return Speedups(rows, median_us, best, own, BEST_PEER)


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
    lines += [_line(peer, against(timed, own, peer)) for peer in peers if against(timed, own, peer).ratios]
    best = against_best(timed, own, peers)
    if best.ratios:
        lines.append(_line(BEST_PEER, best))
    for decodes in DECODES_PER_PLAN:
        lines += _amortised(timed, own, peers, decodes)
    lines += _default_variant(timed, own)
    lines.append(f"  share of the floor: {_floor_line(timed, lambda row: median_us(row, own))}")
    peer_share = _floor_line([row for row in timed if best_peer(row, peers)], lambda row: best_time(row, peers))
    if best.ratios:
        lines.append(f"  the best peer's share: {peer_share}")
    lines.append(f"  a peer is faster in {len(best.lost)} of {len(best.ratios)} cases" + (":" if best.lost else ""))
    for ratio, row in best.lost:
        name, time = best_peer(row, peers) or ("", math.nan)
        lines.append(f"    {full_name(row)}: {median_us(row, own):.1f} us, {name} {time:.1f} us ({ratio:.2f}x)")
    return lines


def best_time(row: Row, peers: Sequence[str]) -> float:
    """Time of the best peer."""
    found = best_peer(row, peers)
    return math.nan if found is None else found[1]


def _line(peer: str, speedups: Speedups) -> str:
    worst, row = speedups.worst
    return (
        f"  {speedups.mean:6.2f}x as fast as {peer} ({len(speedups.ratios)} cases; "
        f"worst {worst:.2f}x, {full_name(row)})"
    )


def _amortised(rows: Sequence[Row], own: str, peers: Sequence[str], decodes: int) -> list[str]:
    """One line: speedups with the planning shared by a number of decodes, over the peers that plan."""
    parts = []
    for peer in peers:
        planned = [row for row in rows if (best_variant(row, peer) or {}).get("plan_ms") is not None]
        if planned:
            speedups = Speedups(
                planned,
                lambda row, name: amortised_us(row, name, decodes),
                lambda row, name: amortised_us(row, name, decodes),
                own,
                peer,
            )
            parts.append(f"{peer} {speedups.mean:.2f}x")
    calls = "decode" if decodes == 1 else "decodes"
    return [f"  planning included, {decodes} {calls} a plan: {', '.join(parts)}"] if parts else []


def _default_variant(rows: Sequence[Row], own: str) -> list[str]:
    """One line where the best of several variants counts: what the default alone costs."""
    results = [row["results"][own] for row in rows]
    label = next(iter(results[0]["variants"]))
    if len(results[0]["variants"]) == 1:
        return []
    costs = (r["variants"][label]["median_us"] / r["variants"][r["best"]]["median_us"] for r in results)
    return [f"  the better of {len(results[0]['variants'])} variants counts; {label} alone takes {_times(costs)}"]


def _times(ratios: Iterable[float]) -> str:
    return f"{geometric_mean(ratios):.3f} times as long"


def _floor_line(rows: Sequence[Row], time: Callable[[Row], float | None]) -> str:
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
