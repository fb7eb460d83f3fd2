"""A machine's constants by name, as fits and files take them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from fasttree_cupy.planning.machine import Machine, WorkerMachine, WorkerRates

__all__ = ["M", "numbers_of", "with_numbers"]

M = TypeVar("M", Machine, WorkerMachine)


def numbers_of(machine: Machine | WorkerMachine) -> dict[str, float]:
    """Name -> number of every constant that is the machine's speed; rates of workers as ``one_group.step``.

    The number of multiprocessors, which no fit changes, is not among them.
    """
    numbers: dict[str, float] = {}
    for name, value in machine._asdict().items():
        if isinstance(value, WorkerRates):
            numbers |= {f"{name}.{rate}": number for rate, number in value._asdict().items()}
        elif name != "multiprocessors":
            numbers[name] = value
    return numbers


def with_numbers(machine: M, numbers: Mapping[str, float]) -> M:
    """The machine with other constants, named as in `numbers_of`."""
    fields: dict[str, Any] = {}
    for name, value in machine._asdict().items():
        if isinstance(value, WorkerRates):
            fields[name] = WorkerRates(**{rate: numbers[f"{name}.{rate}"] for rate in value._fields})
        else:
            fields[name] = numbers.get(name, value)
    return machine._replace(**fields)
