"""Fits the constants of a cost model to measured times; a sample says what a machine would take for it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from fasttree_cupy.planning.machine import Machine, WorkerMachine
from fasttree_cupy.tuning.numbers import M, numbers_of, with_numbers

__all__ = ["Fit", "Measured", "Sample", "fit"]

Float64Array = npt.NDArray[np.float64]

M_contra = TypeVar("M_contra", Machine, WorkerMachine, contravariant=True)

_PULL = 0.1
"""A constant e times its first value counts like one time that is wrong by this: what no sample tells stays."""
_MOST_ROUNDS = 25
_PRECISION = 1e-6
"""A round that lowers the sum of squares by less than this part of it is the last one."""
_STEP = 1e-4
"""Of the logarithms, for derivatives."""
_CHOICE_NOISE = 0.002
"""A loss by choice that is higher by this is not taken for worse: so much comes of plans that are as fast as others."""


class Sample(Protocol[M_contra]):
    """A plan whose time was measured."""

    def estimate_us(self, machine: M_contra) -> float:
        """What the cost model says of it for a machine."""


class Measured(NamedTuple):
    """One measured time.

    Attributes
    ----------
    problem : int
        Which tree and head layout; samples of one are plans to choose from.
    us : float
        Microseconds.
    """

    problem: int
    us: float


class Fit(NamedTuple, Generic[M]):
    """What came of a fit.

    Attributes
    ----------
    machine : Machine or WorkerMachine
        The fitted constants, or the first ones where these are no worse.
    accepted : bool
        Which of the two.
    samples : int
        Number of times.
    errors : (float, float)
        Root mean square of ln(estimate / time), with the first constants and with the fitted ones.
    losses : (float, float)
        By what part the plan with the cheapest estimate is slower than the fastest one measured, geometric mean over
        the problems, with the first constants and with the fitted ones.
    """

    machine: M
    accepted: bool
    samples: int
    errors: tuple[float, float]
    losses: tuple[float, float]


def fit(start: M, samples: Sequence[Sample[M]], times: Sequence[Measured]) -> Fit[M]:
    """Fit constants by least squares of the logarithms (Levenberg 1944, Marquardt 1963).

    Parameters
    ----------
    start : Machine or WorkerMachine
        The constants to begin with, positive.
    samples : sequence of Sample
        Plans.
    times : sequence of Measured
        The time of each.

    Returns
    -------
    Fit
        With positive constants. They are accepted where neither the error nor the loss by choice became worse.
    """
    names = list(numbers_of(start))
    logs = np.log([each.us for each in times])

    def machine_of(theta: Float64Array) -> M:
        return with_numbers(start, dict(zip(names, np.exp(theta).tolist(), strict=True)))

    def errors_of(theta: Float64Array) -> Float64Array:
        machine = machine_of(theta)
        return np.log([sample.estimate_us(machine) for sample in samples]) - logs

    first = np.log(list(numbers_of(start).values()))
    found = minimise(lambda theta: np.append(errors_of(theta), _PULL * (theta - first)), first)
    residuals = errors_of(first), errors_of(found)
    before, after = (float(np.sqrt(np.mean(each**2))) for each in residuals)
    lost, losing = (loss_by_choice(each + logs, times) for each in residuals)
    accepted = after <= before and losing <= lost + _CHOICE_NOISE
    return Fit(machine_of(found) if accepted else start, accepted, len(samples), (before, after), (lost, losing))


def minimise(residuals: Callable[[Float64Array], Float64Array], theta: Float64Array) -> Float64Array:
    """Where the sum of the squares is least, near `theta`."""
    current = residuals(theta)
    damping = 1e-2
    for _ in range(_MOST_ROUNDS):
        columns = [(residuals(theta + step) - current) / _STEP for step in _STEP * np.eye(len(theta))]
        slopes = np.stack(columns, axis=1)
        gained = 0.0
        while gained <= 0 and damping < 1e6:
            change = np.linalg.solve(slopes.T @ slopes + damping * np.eye(len(theta)), -slopes.T @ current)
            tried = residuals(theta + change)
            gained = float(current @ current - tried @ tried)
            damping = damping / 4 if gained > 0 else damping * 4
        if gained <= 0:
            break
        done = gained < _PRECISION * (current @ current)
        theta, current = theta + change, tried
        if done:
            break
    return theta


def loss_by_choice(estimates: Float64Array, times: Sequence[Measured]) -> float:
    """By what part the plan with the cheapest estimate is slower than the fastest one: see `Fit`."""
    plans: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for estimate, measured in zip(estimates.tolist(), times, strict=True):
        plans[measured.problem].append((estimate, measured.us))
    ratios = [min(each)[1] / min(us for _, us in each) for each in plans.values()]
    return float(np.exp(np.mean(np.log(ratios))) - 1)
