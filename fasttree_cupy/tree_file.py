"""Tree files: the lines of one, read and written. ``docs/TREE_FORMAT.md`` describes the file."""

from __future__ import annotations

import os
import re

import numpy as np
import numpy.typing as npt

from fasttree_cupy.tree_checks import NODE_FIELDS, Where

__all__ = ["read_file", "write_file"]

Int64Array = npt.NDArray[np.int64]

_ID = NODE_FIELDS.index("id")


def read_file(path: str | os.PathLike[str]) -> tuple[Int64Array, Where]:
    """Nodes of a tree file in id order, (N, 4) with columns `NODE_FIELDS`, and how messages name them."""
    name = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError:
        raise ValueError(f"{name}: not a text file, expected a tree file") from None
    rows = [(k, words) for k, line in enumerate(text.split("\n"), start=1) if (words := line.split())]
    if not rows:
        raise ValueError(f"{name}, line 1: the file is empty, expected the number of nodes")
    count = _read_count(name, *rows[0])
    records = [(_read_record(name, line, words), line) for line, words in rows[1 : count + 1]]
    if len(rows) > count + 1:
        raise ValueError(
            f"{name}, line {rows[count + 1][0]}: expected the end, line {rows[0][0]} promises {count} nodes"
        )
    if len(records) < count:
        raise ValueError(
            f"{name}, line {rows[-1][0]}: the file ends after {len(records)} nodes, line {rows[0][0]} promises {count}"
        )
    records.sort(key=lambda record: record[0][_ID])
    for i, (values, line) in enumerate(records):
        if values[_ID] != i:
            raise ValueError(f"{name}, line {line}: id is {values[_ID]}, expected each of 0 to {count - 1} once")
    lines = [line for _, line in records]
    table = np.array([values for values, _ in records], np.int64)
    return table, Where(name, lambda what, i: f"{name}, line {lines[i]}: {what}")


def _read_ints(words: list[str]) -> list[int] | None:
    """The words as integers, None where one is not."""
    # int() alone would also take "1_0" and the digits of other scripts.
    if not all(re.fullmatch(r"[+-]?[0-9]{1,18}", word) for word in words):
        return None
    return [int(word) for word in words]


def _read_count(name: str, line: int, words: list[str]) -> int:
    values = _read_ints(words)
    if values is None or len(values) != 1 or values[0] < 1:
        raise ValueError(f"{name}, line {line}: {' '.join(words)!r}, expected the number of nodes")
    return values[0]


def _read_record(name: str, line: int, words: list[str]) -> list[int]:
    """The values of `NODE_FIELDS` that a line holds."""
    expected = "expected 4 integers: parent id seqlen num_children"
    if len(words) != len(NODE_FIELDS):
        raise ValueError(f"{name}, line {line}: {len(words)} fields, {expected}")
    values = _read_ints(words)
    if values is None:
        raise ValueError(f"{name}, line {line}: {' '.join(words)!r}, {expected}")
    return values


def write_file(path: str | os.PathLike[str], table: Int64Array) -> None:
    """Write a tree file of nodes, (N, 4) with columns `NODE_FIELDS`, in this order."""
    lines = [str(len(table)), *(f"{p} {i} {s} {c}" for p, i, s, c in table.tolist())]
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write("\n".join(lines) + "\n")
