"""The results file: read, written whole after every case, and looked things up in."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.workloads import Case

__all__ = ["add_published", "amortised_us", "best_variant", "is_complete", "key", "load", "median_us", "save"]

Row = dict[str, Any]

KEY = ("suite", "name", "head_dim", "dtype")


def load(path: Path) -> dict[str, Any]:
    """Read a results file.

    Raises
    ------
    ValueError
        If the file holds no results.
    """
    document = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not isinstance(document.get("cases"), list):
        raise ValueError(f"{path} holds no results, expected a JSON object with a list 'cases'")
    return document


def save(path: Path, document: dict[str, Any]) -> None:
    """Write a results file; a reader, or a run that is cut short, never sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def key(case: Case | Row) -> tuple[Any, ...]:
    """What tells cases apart."""
    if isinstance(case, Case):
        return case.suite, case.name, case.head_dim, case.dtype, case.kv_dtype or case.dtype
    return *(case[name] for name in KEY), case.get("kv_dtype", case["dtype"])  # older files have no kv_dtype


def is_complete(row: Row, contestants: Iterable[str]) -> bool:
    """Whether a case needs no other run: each contestant was timed, or does not suit the case."""
    results = row["results"]
    return all(name in results and not {"wrong", "failed"} & results[name].keys() for name in contestants)


def best_variant(row: Row, contestant: str) -> Row | None:
    """Figures of a contestant's best variant; None where it was not timed."""
    result = row["results"].get(contestant, {})
    variant: Row | None = result["variants"][result["best"]] if "best" in result else None
    return variant


def median_us(row: Row, contestant: str) -> float | None:
    """Time of a contestant: its best variant's; what was published for one that did not run; else None."""
    if contestant not in row["results"]:
        published: float | None = row.get("published_us", {}).get(contestant)
        return published
    variant = best_variant(row, contestant)
    return None if variant is None else float(variant["median_us"])


def amortised_us(variant: Row, decodes: int) -> float:
    """Time of one of several decodes on one plan, its share of the planning included."""
    return float(variant["median_us"] + 1000 * (variant["plan_ms"] or 0.0) / decodes)


def add_published(rows: Iterable[Row], figures: dict[str, Any]) -> None:
    """Set each row's ``published_us``, by peer.

    Parameters
    ----------
    rows : iterable of dict
        Rows of a results file.
    figures : dict
        Published figures of the same GPU: ``cases``, each with the fields of a `Case` (its tokens are called
        ``context_per_level``) and ``<peer>_us`` for each of the keys of ``peers``.
    """
    fields = ("suite", "nodes_per_level", "num_qo_heads", "num_kv_heads", "head_dim", "dtype")
    known = {(*(case[name] for name in fields), case["context_per_level"]): case for case in figures["cases"]}
    for row in rows:
        found = known.get((*(row[name] for name in fields), row["tokens_per_level"]), {})
        times = {peer: found.get(f"{peer}_us") for peer in figures["peers"]}
        row["published_us"] = {peer: time for peer, time in times.items() if time is not None}
