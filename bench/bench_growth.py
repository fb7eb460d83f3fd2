"""A decode loop on a tree that grows: what updates of the plan cost beside the kernels. Needs a GPU.

::

    python -m bench.bench_growth --output bench/results/growth_h200.json

The paper's tree of 1, 16 and 64 nodes with 1024, 256 and 32 tokens, heads 32/8, head_dim 128, float16. Each step runs
the plan once for each of 32 layers, which have K and V of their own, and appends one token to each of the 64 requests
for the next step: queued right behind the runs, while the GPU is at them. Tokens lie in pages of 16 rows, dealt out in
the order in which requests need them.

Two measurements. *Loop*: nothing but runs and updates, and the wait for the GPU at each step's end; the host's time in
each `append`, and in `plan_decode` once. By how much it takes longer than its kernels, less the same of a loop with no
updates, is what updates cost where the host works while the GPU does. *Steps*: the GPU's time between events around a
step's runs and around an update, queued behind work that keeps the GPU busy until the host is done; and the host's in
`append` among all that, which is recorded as `disturbed`: it takes two to three times as long as in the loop.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bench import machine, records
from fasttree_cupy import Capacity, KVTree, plan_decode
from fasttree_cupy.execution.device import gpu_problem
from fasttree_cupy.execution.growing import GrowingSchedule

__all__ = ["main"]

TREE = KVTree.from_levels([1, 16, 64], [1024, 256, 32])
NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
STEPS, LAYERS, PAGE_SIZE = 256, 32, 16
BUSY_BYTES, BUSY_FILLS = 2**29, 8
"""What keeps the GPU busy for a millisecond or more while the host queues a step."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(prog="bench_growth", description="Updates of a plan in a decode loop.")
    parser.add_argument("--steps", type=int, default=STEPS, help="tokens appended to each request")
    parser.add_argument("--layers", type=int, default=LAYERS, help="runs after each update")
    parser.add_argument("--output", type=Path, metavar="JSON", help="written at the end")
    parser.add_argument("--commit", help="what to record instead of what git says")
    args = parser.parse_args(arguments)
    problem = gpu_problem()
    if problem is not None:
        print(f"bench_growth needs a GPU: {problem}", file=sys.stderr)
        return 2

    Loop(2, args.layers).timed_loop(grows=True)  # compiles
    row = measure(args.steps, args.layers)
    plans = "no plan anew" if not row["plans"] else f"{row['plans']} plans anew of {row['plan_median_us']:.0f} us"
    print(
        f"{row['steps']} steps of {row['layers']} layers: update {row['host_median_us']:.1f} us on the host (median), "
        f"{plans}\n"
        f"planning and updates {row['host_total_us'] / 1000:.1f} ms on the host, "
        f"{row['update_gpu_total_us'] / 1000:.2f} ms on the GPU, kernels {row['kernel_total_us'] / 1000:.1f} ms: "
        f"{100 * row['share']:.2f}%\n"
        f"with other work between the runs: update {row['disturbed']['host_median_us']:.1f} us on the host (median), "
        f"{100 * row['disturbed']['share']:.2f}%\n"
        f"updates make the loop {100 * row['loop_overhead_share']:.2f}% longer"
    )
    if args.output is not None:
        described = machine.describe("bench.bench_growth", arguments, args.commit) | machine.describe_gpu()
        records.save(args.output, {"machine": described, "cases": [row]})
    return 0


def new_rows(steps: int) -> npt.NDArray[np.int32]:
    """Rows of the pool for each step's tokens, (steps, requests): pages of each request's own."""
    step, request = np.arange(steps)[:, None], np.arange(TREE.batch_size)
    page = step // PAGE_SIZE * TREE.batch_size + request
    rows: npt.NDArray[np.int32] = (TREE.unique_tokens + page * PAGE_SIZE + step % PAGE_SIZE).astype(np.int32)
    return rows


class Loop:
    """A decode loop, ready to take its steps."""

    def __init__(self, steps: int, layers: int) -> None:
        import cupy

        self.rows = new_rows(steps)
        capacity = Capacity(TREE.batch_size, TREE.unique_tokens + self.rows.size)
        begun = time.perf_counter()
        self.plan = plan_decode(TREE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, device="cuda", capacity=capacity)
        self.first_us = 1e6 * (time.perf_counter() - begun)
        """Host time of the first plan."""
        if not isinstance(self.plan.schedule, GrowingSchedule):
            raise RuntimeError("this GPU's plans are made anew after each step, expected compute capability 9.0")
        self._schedule = self.plan.schedule
        self._q, self._out, self._caches = random_arrays(int(self.rows.max()) + 1, layers)
        self._busy = cupy.empty(BUSY_BYTES, np.uint8)
        self._run()

    def _run(self) -> None:
        for k, v in self._caches:
            self.plan.run(self._q, k, v, self._out)

    def timed_step(self, step: int, grows: bool) -> dict[str, Any]:
        """Host time of a step's update, if it planned, and events before the runs, after them and after the update."""
        import cupy

        for _ in range(BUSY_FILLS):
            self._busy.fill(step % 251)
        events, made = [cupy.cuda.Event() for _ in range(3)], self._schedule.plan.made
        events[0].record()
        self._run()
        events[1].record()
        begun = time.perf_counter()
        if grows:
            self.plan.append(self.rows[step])
        host_us = 1e6 * (time.perf_counter() - begun)
        events[2].record()
        cupy.cuda.get_current_stream().synchronize()
        return {"host_us": host_us, "planned": self._schedule.plan.made is not made, "events": events}

    def timed_loop(self, grows: bool) -> tuple[float, list[float]]:
        """Time of all steps, with updates or without, and the host's of each update."""
        import cupy

        stream = cupy.cuda.get_current_stream()
        stream.synchronize()
        host_us = []
        begun = time.perf_counter()
        for rows in self.rows:
            self._run()
            if grows:
                before = time.perf_counter()
                self.plan.append(rows)
                host_us.append(1e6 * (time.perf_counter() - before))
            stream.synchronize()
        return 1e6 * (time.perf_counter() - begun), host_us


def elapsed_us(done: Sequence[dict[str, Any]], first: int) -> list[float]:
    """The GPU's time between two events of each step."""
    import cupy

    return [1000 * cupy.cuda.get_elapsed_time(*step["events"][first : first + 2]) for step in done]


def random_arrays(pool_rows: int, layers: int) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Queries, room for outputs, and each layer's K and V."""
    import cupy

    rng = np.random.default_rng(0)
    shapes = ((TREE.batch_size, NUM_QO_HEADS, HEAD_DIM), *2 * ((pool_rows, NUM_KV_HEADS, HEAD_DIM),))
    q, k, v = (cupy.asarray(rng.standard_normal(shape, np.float32).astype(np.float16)) for shape in shapes)
    return q, cupy.empty_like(q), [(k.copy(), v.copy()) for _ in range(layers)]


def measure(steps: int, layers: int) -> dict[str, Any]:
    """One row: times of all steps, and of the loop."""
    timed = Loop(steps, layers)
    done = [timed.timed_step(step, grows=True) for step in range(steps)]
    kernel_us, update_us, disturbed_us = elapsed_us(done, 0), elapsed_us(done, 1), [step["host_us"] for step in done]
    planned = [step["host_us"] for step in done if step["planned"]]
    loop = Loop(steps, layers)
    loop_us, host_us = loop.timed_loop(grows=True)
    total = loop.first_us + sum(host_us)
    updates = {"loop_us": loop_us, "kernel_us": sum(kernel_us), "overhead": loop_us / sum(kernel_us) - 1}
    no_updates = loop_without_updates(steps, layers)
    return {
        "tree": "1,16,64 x 1024,256,32",
        "heads": f"{NUM_QO_HEADS}/{NUM_KV_HEADS}",
        "head_dim": HEAD_DIM,
        "dtype": "float16",
        "steps": steps,
        "layers": layers,
        "plan": str(timed.plan),
        "first_plan_us": loop.first_us,
        "host_median_us": statistics.median(host_us),
        "plan_median_us": statistics.median(planned) if planned else None,
        "plans": len(planned),
        "host_total_us": total,
        "update_gpu_median_us": statistics.median(update_us),
        "update_gpu_total_us": sum(update_us),
        "kernel_median_us": statistics.median(kernel_us) / layers,
        "kernel_total_us": sum(kernel_us),
        "share": (total + sum(update_us)) / sum(kernel_us),
        "disturbed": {
            "first_plan_us": timed.first_us,
            "host_median_us": statistics.median(disturbed_us),
            "share": (timed.first_us + sum(disturbed_us) + sum(update_us)) / sum(kernel_us),
        },
        "loop": {"updates": updates, "no updates": no_updates},
        "loop_overhead_share": updates["overhead"] - no_updates["overhead"],
        "steps_host_us": host_us,
        "steps_disturbed_us": disturbed_us,
        "steps_kernel_us": kernel_us,
    }


def loop_without_updates(steps: int, layers: int) -> dict[str, float]:
    """Time of a loop whose tree stays, of its kernels, and by which part the loop takes longer."""
    timed = Loop(steps, layers)
    kernel_us = sum(elapsed_us([timed.timed_step(step, grows=False) for step in range(steps)], 0))
    loop_us, _ = Loop(steps, layers).timed_loop(grows=False)
    return {"loop_us": loop_us, "kernel_us": kernel_us, "overhead": loop_us / kernel_us - 1}


if __name__ == "__main__":
    sys.exit(main())
