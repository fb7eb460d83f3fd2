"""Constants of a GPU that the cost models of our planners weigh."""

from __future__ import annotations

import re
from typing import NamedTuple

__all__ = ["COST_MODEL", "H200", "H200_WORKERS", "Constants", "Machine", "WorkerMachine", "WorkerRates", "built_in"]

COST_MODEL = 3
"""Version of the cost models and of the kernels that they describe. Constants that were fitted to another one are not
used: count it up where a formula, or what a kernel does in a step, an item or a merge, changes."""


class Machine(NamedTuple):
    """What the time of a plan of ``subtree`` depends on.

    Attributes
    ----------
    multiprocessors : float
        Multiprocessors of the GPU.
    hbm : float
        Bytes that device memory delivers in a microsecond.
    l2 : float
        Bytes that the L2 cache delivers in a microsecond.
    own_step, shared_step : float
        Microseconds that a multiprocessor with enough warps spends on one step of one warp (16 rows, 16 tokens,
        head_dim 128), whose tokens the warp gathers for itself, or with other row warps.
    warp_start : float
        The same for what a warp does once an item: fetch queries, merge, write.
    step_latency : float
        Microseconds from one step of a warp to its next when the multiprocessor is otherwise idle.
    start : float
        Microseconds of a launch and of filling the first pipeline.
    merge : float
        Microseconds that launching the merge adds.
    """

    multiprocessors: float
    hbm: float
    l2: float
    own_step: float
    shared_step: float
    warp_start: float
    step_latency: float
    start: float
    merge: float


H200 = Machine(132, 5.4e6, 7.6e6, 0.091, 0.10, 0.60, 0.93, 9.8, 4.3)
"""Fitted to the times of every tile shape over FastTree's 45 cases on an H200, so that the cheapest estimate is the
fastest shape (bench/NOTES.md): effective rates, which make up for what the model leaves out."""


class WorkerRates(NamedTuple):
    """What a worker of ``balanced`` spends, in microseconds, at head_dim 128.

    Attributes
    ----------
    step : float
        On a step (64 tokens with one row group, 128 with two) whose tokens most of its rows see.
    apart_step : float
        On a step whose tokens few rows see.
    item : float
        On what it does once an item: fetch queries, merge its warpgroups, write.
    """

    step: float
    apart_step: float
    item: float


class WorkerMachine(NamedTuple):
    """What the time of a plan of ``balanced`` depends on.

    Attributes
    ----------
    hbm : float
        Bytes that device memory delivers in a microsecond.
    start : float
        Microseconds of a launch and of filling the first pipeline.
    one_group, two_groups : WorkerRates
        What a worker spends whose items have one row group, or two.
    merge, merge_piece : float
        Microseconds for merging the pieces of a tile: once, and for each of them.
    merge_together, merge_together_piece : float
        The same when the pieces' workers merge together.
    """

    hbm: float
    start: float
    one_group: WorkerRates
    two_groups: WorkerRates
    merge: float
    merge_piece: float
    merge_together: float
    merge_together_piece: float


H200_WORKERS = WorkerMachine(
    hbm=4.4e6,
    start=8.2,
    one_group=WorkerRates(step=0.62, apart_step=0.70, item=1.20),
    two_groups=WorkerRates(step=1.75, apart_step=1.58, item=1.90),
    merge=0.01,
    merge_piece=1.72,
    merge_together=5.5,
    merge_together_piece=0.12,
)
"""Fitted to 411 runs of plans of FastTree's 45 and PAT's 80 cases on an H200, to 10%. Then set by hand (see NOTES.md):
merging together so that a tile in 44 pieces is taken for slower than one in 22, as was measured; the start, to later
kernels' times of 27 cases; memory and steps, to those of 113 cases, which are met to 5%; items of two row groups, which
have become shorter since, so that choosing between one and two loses 0.3% in 99 cases."""


class Constants(NamedTuple):
    """The constants of one GPU.

    Attributes
    ----------
    items : Machine
        For `subtree`, whose items ``tree_decode`` runs.
    workers : WorkerMachine
        For `balanced`, whose workers ``tree_decode_sm90`` runs.
    """

    items: Machine
    workers: WorkerMachine


_BANDWIDTHS = {
    "H200": 4.8,
    "H100 NVL": 3.9,
    "H100 PCIe": 2.0,
    "H100": 3.35,
    "A100 80GB PCIe": 1.935,
    "A100-SXM4-80GB": 2.039,
    "A100": 1.555,
}
"""Part of a GPU's name -> TB/s of its memory, by NVIDIA's data sheets; the first that fits counts."""


def built_in(name: str, multiprocessors: int) -> tuple[Constants, str]:
    """Constants for a GPU that was not tuned.

    Only the H200's were measured. Those of an H100 or A100 are the H200's, scaled: bytes of device memory by the
    published bandwidths, bytes of the L2 cache by the multiprocessors; times are taken for the same, though an A100's
    clock is lower. Any other GPU's bandwidth is scaled by its multiprocessors too.

    Parameters
    ----------
    name : str
        The GPU's name, as CUDA says it: "NVIDIA H200".
    multiprocessors : int
        Its multiprocessors.

    Returns
    -------
    constants : Constants
    origin : str
        What they are, in words.
    """
    whole = "MIG" not in name  # a slice has a part of the bandwidth
    part = next((part for part in _BANDWIDTHS if whole and re.search(rf"\b{part}\b", name)), None)
    size = multiprocessors / H200.multiprocessors
    memory = size if part is None else _BANDWIDTHS[part] / _BANDWIDTHS["H200"]
    items = H200._replace(multiprocessors=float(multiprocessors), hbm=H200.hbm * memory, l2=H200.l2 * size)
    constants = Constants(items, H200_WORKERS._replace(hbm=H200_WORKERS.hbm * memory))
    if part == "H200":
        return constants, "built-in, measured on an H200"
    scaled = "multiprocessors" if part is None else f"the published bandwidth of {part}"
    return constants, f"built-in, the H200's scaled by {scaled}; not measured"
