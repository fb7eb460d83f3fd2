"""The barriers of the float8 kernel hold under random schedules, with its numbers of places and with no fewer."""

from __future__ import annotations

import pytest

from fasttree_cupy.execution import kernels
from tests.worker_model import GROUPS, Rings, run

SCHEDULES = 150


def rings_of(head_dim: int) -> Rings:
    """As the kernel has them with one row group."""
    keys, values, raw = kernels.worker_stages(head_dim, 1, float8=True)
    return Rings(keys, values, raw, raw + keys + 2 * GROUPS)


def faults(rings: Rings, schedules: int) -> set[str]:
    """What goes wrong under some schedules: the first word of each message."""
    found = set()
    for seed in range(schedules):
        try:
            run(rings, seed)
        except AssertionError as fault:
            found.add(str(fault).split()[0])
    return found


def test_the_kernel_has_these_places() -> None:
    header = (kernels.cuda_src() / "include" / "worker.cuh").read_text()
    assert "constexpr int kViewPlaces = kRawStages + kKeyStages + 2 * kTokenGroups;" in header


@pytest.mark.parametrize("head_dim", kernels.WORKER_HEAD_DIMS)
def test_barriers_hold(head_dim: int) -> None:
    assert faults(rings_of(head_dim), SCHEDULES) == set()


def test_fewer_views_are_overwritten() -> None:
    rings = rings_of(128)
    assert faults(rings._replace(views=rings.views - GROUPS), SCHEDULES) == {"the"}


def test_raw_places_that_warpgroups_share_are_mistaken() -> None:
    assert "phase" in faults(rings_of(128)._replace(raw=3), SCHEDULES)
