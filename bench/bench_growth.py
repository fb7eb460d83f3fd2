"""A decode loop on a tree that grows: what updates of the plan cost beside the kernels. Needs a GPU.

::

    python -m bench.bench_growth --output bench/results/growth_h200.json

The paper's tree of 1, 16 and 64 nodes with 1024, 256 and 32 tokens, heads 32/8, head_dim 128, float16. Each step
appends one token to each of the 64 requests and runs the plan once for each of 32 layers, which have K and V of their
own. Tokens lie in pages of 16 rows, dealt out in the order in which requests need them. Host times are those of
`append`, and of `plan_decode` once; the GPU's are those between events around an update and around the layers' runs,
queued behind work that keeps the GPU busy until the host is done.
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
from fasttree_cupy import Capacity, DecodePlan, KVTree, plan_decode
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

    decode_loop(2, args.layers)  # compiles
    row = measure(args.steps, args.layers)
    print(
        f"{row['steps']} steps of {row['layers']} layers: update {row['host_median_us']:.1f} us on the host (median), "
        f"{row['plans']} plans anew of {row['plan_median_us']:.0f} us\n"
        f"planning and updates {row['host_total_us'] / 1000:.1f} ms on the host, "
        f"{row['update_gpu_total_us'] / 1000:.2f} ms on the GPU, kernels {row['kernel_total_us'] / 1000:.1f} ms: "
        f"{100 * row['share']:.2f}%"
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


def decode_loop(steps: int, layers: int) -> tuple[DecodePlan, float, list[dict[str, Any]]]:
    """Decode; returns the plan, its host time, and of each step that of the update, if it planned, and events."""
    import cupy

    rows = new_rows(steps)
    capacity = Capacity(TREE.batch_size, TREE.unique_tokens + rows.size)
    begun = time.perf_counter()
    plan = plan_decode(TREE, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, device="cuda", capacity=capacity)
    first_us = 1e6 * (time.perf_counter() - begun)
    schedule = plan.schedule
    if not isinstance(schedule, GrowingSchedule):
        raise RuntimeError("this GPU's plans are made anew after each step, expected compute capability 9.0")
    q, out, caches = random_arrays(int(rows.max()) + 1, layers)
    busy = cupy.empty(BUSY_BYTES, np.uint8)
    plan.run(q, *caches[0], out)
    done: list[dict[str, Any]] = []
    for step in range(steps):
        for _ in range(BUSY_FILLS):
            busy.fill(step % 251)
        events, made = [cupy.cuda.Event() for _ in range(3)], schedule.plan.made
        events[0].record()
        begun = time.perf_counter()
        plan.append(rows[step])
        host_us = 1e6 * (time.perf_counter() - begun)
        events[1].record()
        for k, v in caches:
            plan.run(q, k, v, out)
        events[2].record()
        done.append({"host_us": host_us, "planned": schedule.plan.made is not made, "events": events})
        cupy.cuda.get_current_stream().synchronize()
    return plan, first_us, done


def random_arrays(pool_rows: int, layers: int) -> tuple[Any, Any, list[tuple[Any, Any]]]:
    """Queries, room for outputs, and each layer's K and V."""
    import cupy

    rng = np.random.default_rng(0)
    shapes = ((TREE.batch_size, NUM_QO_HEADS, HEAD_DIM), *2 * ((pool_rows, NUM_KV_HEADS, HEAD_DIM),))
    q, k, v = (cupy.asarray(rng.standard_normal(shape, np.float32).astype(np.float16)) for shape in shapes)
    return q, cupy.empty_like(q), [(k.copy(), v.copy()) for _ in range(layers)]


def measure(steps: int, layers: int) -> dict[str, Any]:
    """One row: times of all steps."""
    import cupy

    plan, first_us, done = decode_loop(steps, layers)
    elapsed = cupy.cuda.get_elapsed_time
    update_us = [1000 * elapsed(*step["events"][:2]) for step in done]
    kernel_us = [1000 * elapsed(*step["events"][1:]) for step in done]
    host_us = [step["host_us"] for step in done]
    edited = [step["host_us"] for step in done if not step["planned"]]
    planned = [step["host_us"] for step in done if step["planned"]]
    total = first_us + sum(host_us)
    return {
        "tree": "1,16,64 x 1024,256,32",
        "heads": f"{NUM_QO_HEADS}/{NUM_KV_HEADS}",
        "head_dim": HEAD_DIM,
        "dtype": "float16",
        "steps": steps,
        "layers": layers,
        "plan": str(plan),
        "first_plan_us": first_us,
        "host_median_us": statistics.median(host_us),
        "edit_median_us": statistics.median(edited) if edited else None,
        "plan_median_us": statistics.median(planned) if planned else 0.0,
        "plans": len(planned),
        "host_total_us": total,
        "update_gpu_median_us": statistics.median(update_us),
        "update_gpu_total_us": sum(update_us),
        "kernel_median_us": statistics.median(kernel_us) / layers,
        "kernel_total_us": sum(kernel_us),
        "share": (total + sum(update_us)) / sum(kernel_us),
        "steps_host_us": host_us,
        "steps_kernel_us": kernel_us,
    }


if __name__ == "__main__":
    sys.exit(main())
