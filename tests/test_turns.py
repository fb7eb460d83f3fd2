"""Plans under several threads and streams: results are those of one run after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import turns
from fasttree_cupy.execution.turns import Turns
from tests.plans import KERNELS, choose_kernel
from tests.test_serving import namespace, random_arrays

THREADS = 4
TREE = ft.KVTree.from_levels([1, 4, 12], [5000, 60, 9])
"""A prefix that is cut on any GPU."""
OTHER = ft.KVTree.from_levels([1, 6], [4000, 33])
LAYOUT = (8, 2, 64, "float16")


@dataclass
class Job:
    """A plan, arrays for it, and what one run makes of them."""

    plan: ft.DecodePlan
    arrays: list[Any]
    expected: Any = field(init=False)

    def __post_init__(self) -> None:
        self.expected = self.plan.run(*self.arrays)


def jobs(plan: ft.DecodePlan, tree: ft.KVTree, xp: Any, count: int) -> list[Job]:
    _, k, v = (xp.asarray(array) for array in random_arrays(tree, LAYOUT, tree.unique_tokens))
    rng = np.random.default_rng(2)
    shape = (tree.batch_size, LAYOUT[0], LAYOUT[2])
    return [Job(plan, [xp.asarray(rng.standard_normal(shape).astype(np.float16)), k, v]) for _ in range(count)]


def same_bits(out: Any, job: Job) -> bool:
    return bool((out.view(np.uint16) == job.expected.view(np.uint16)).all())


def test_threads_share_a_plan_on_the_cpu() -> None:
    tree = ft.KVTree.from_levels([1, 3, 12], [150, 40, 9])
    made = jobs(ft.plan_decode(tree, *LAYOUT[:3], device="cpu"), tree, np, THREADS)
    made += jobs(ft.plan_decode(OTHER, *LAYOUT[:3], device="cpu"), OTHER, np, 1)
    with ThreadPoolExecutor(len(made)) as pool:
        results = pool.map(lambda job: [same_bits(job.plan.run(*job.arrays), job) for _ in range(25)], made)
        assert all(all(result) for result in results)


@dataclass
class FakeStream:
    """What `Turns` asks of a WorkStream."""

    handle: int
    is_capturing: bool = False

    @property
    def is_default(self) -> bool:
        return self.handle <= 1


@pytest.mark.parametrize(
    ("streams", "waits"),
    [
        ([0, 0, 1, 0], []),
        ([5, 5], [(5, "event behind 5")]),  # its handle may be another stream's by now
        ([5, 6, 0, 0], [(6, "event behind 5"), (0, "event behind 6")]),
        ([0, 5, 0], [(5, "event behind 0"), (0, "event behind 5")]),
        ([2, 2], [(2, "event behind 2")]),  # each thread's own
        ([5, -6, 7], [(7, "event behind 5")]),
        ([0, -6, 0, 7], [(7, "event behind 0")]),
    ],
)
def test_what_waits_for_what(streams: list[int], waits: list[tuple[int, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Handles of the streams of one run after the other; a negative one is being captured."""
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(turns, "wait_for", lambda stream, event: seen.append((stream, event)))
    monkeypatch.setattr(turns, "record_event", lambda stream, _event: f"event behind {stream}")
    order = Turns()
    for handle in streams:
        stream: Any = FakeStream(abs(handle), handle < 0)
        with order.lock:
            order.wait(stream)
            order.end(stream)
    assert seen == waits


def hammer(job: Job, stream: Any, cupy: Any, times: int) -> bool:
    """Queue many runs on a stream, then look at their outputs."""
    with cupy.cuda.Device(0), stream:
        outs = [cupy.empty_like(job.expected) for _ in range(times)]
        for out in outs:
            out.fill(np.nan)
            job.plan.run(*job.arrays, out)
        stream.synchronize()
        return all(same_bits(out, job) for out in outs)


@pytest.mark.gpu
@KERNELS
def test_threads_with_streams_of_their_own_share_a_plan(
    kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_kernel(kernel, monkeypatch)
    plan = ft.plan_decode(TREE, *LAYOUT[:3], device="cuda")
    assert plan.workspace_bytes > 0
    made = jobs(plan, TREE, namespace("gpu"), THREADS)
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in made[1:]] + [cupy.cuda.Stream.null]
    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(lambda job, stream: hammer(job, stream, cupy, 200), made, streams))


@pytest.mark.gpu
@KERNELS
def test_two_plans_run_on_two_streams_at_once(kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernel(kernel, monkeypatch)
    made = []
    for tree in (TREE, OTHER):
        made += jobs(ft.plan_decode(tree, *LAYOUT[:3], device="cuda"), tree, namespace("gpu"), 1)
    cupy.cuda.Device().synchronize()
    streams = [cupy.cuda.Stream(non_blocking=True) for _ in made]
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda job, stream: hammer(job, stream, cupy, 300), made, streams))


@pytest.mark.gpu
@KERNELS
def test_one_thread_changes_streams_that_come_and_go(kernel: str, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    choose_kernel(kernel, monkeypatch)
    plan = ft.plan_decode(TREE, *LAYOUT[:3], device="cuda")
    made = jobs(plan, TREE, namespace("gpu"), 3)
    outs = [cupy.full_like(made[0].expected, np.nan) for _ in range(150)]
    kept = cupy.cuda.Stream(non_blocking=True)
    cupy.cuda.Device().synchronize()
    for i, out in enumerate(outs):
        stream = (kept, cupy.cuda.Stream(non_blocking=True), cupy.cuda.Stream.null)[i % 3]
        plan.run(*made[i % 2].arrays, out, stream=stream)
        del stream
    cupy.cuda.Device().synchronize()
    assert all(same_bits(out, made[i % 2]) for i, out in enumerate(outs))


@pytest.mark.gpu
def test_a_graph_is_captured_between_runs_on_other_streams(cupy: Any) -> None:
    plan = ft.plan_decode(TREE, *LAYOUT[:3], device="cuda")
    (job,) = jobs(plan, TREE, namespace("gpu"), 1)
    out = cupy.full_like(job.expected, np.nan)
    stream, other = (cupy.cuda.Stream(non_blocking=True) for _ in range(2))
    plan.run(*job.arrays, out, stream=other)
    other.synchronize()
    with stream:
        stream.begin_capture()
        plan.run(*job.arrays, out)
        graph = stream.end_capture()
    plan.run(*job.arrays, out, stream=other)
    other.synchronize()
    for _ in range(20):
        out.fill(np.nan)
        cupy.cuda.Device().synchronize()
        graph.launch(stream)
        stream.synchronize()
        assert same_bits(out, job)
    plan.run(*job.arrays, out, stream=other)
    other.synchronize()
    assert same_bits(out, job)
