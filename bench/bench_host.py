"""What one `run` costs the host beyond its launch, from CuPy and torch arrays; on a CPU, what reading arrays costs.

::

    python -m bench.bench_host --output bench/results/host_h200.json

Calls are queued back to back, in batches short enough for the GPU's queue, and the host's time is divided by their
number: the median of the batches. An empty kernel with as large a parameter struct is launched in the same way; what is
left beside it is Python's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from bench import machine, records
from bench.peers._torch import torch_problem
from fasttree_cupy import DecodePlan, KVTree, plan_decode
from fasttree_cupy.execution import arrays, plan_kernels
from fasttree_cupy.execution.device import gpu_problem

__all__ = ["main"]

NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
TREES = {"one launch": KVTree.from_levels([1], [64]), "merged": KVTree.from_levels([1, 8], [4096, 16])}
"""Without a workspace, and with one that runs take turns at."""
CALLS = 200
BATCHES = 21
EMPTY = f"""
struct Params {{ char bytes[{plan_kernels.WORK_PARAMS.itemsize}]; }};
extern "C" __global__ void empty(const __grid_constant__ Params p) {{}}
"""
"""A launch of as many parameters as a run's."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    args = parse_args(arguments)
    document: dict[str, Any] = {"machine": machine.describe("bench.bench_host", arguments, args.commit)}
    document["cases"] = [*read_rows(args.batches)]
    problem = gpu_problem()
    if problem is None:
        document["machine"] |= machine.describe_gpu()
        document["cases"] += run_rows(args.batches)
    else:
        print(f"no runs: {problem}")
    for row in document["cases"]:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    if args.output is not None:
        records.save(args.output, document)
    return 0


def parse_args(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench_host", description="What a run costs the host.")
    parser.add_argument("--batches", type=int, default=BATCHES, help=f"of {CALLS} calls each")
    parser.add_argument("--commit", help="what to record instead of what git says")
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args(arguments)


class ByDlpack:
    """An array of a framework that nobody knows."""

    def __init__(self, array: Any) -> None:
        self.__dlpack__, self.__dlpack_device__ = array.__dlpack__, array.__dlpack_device__


def read_rows(batches: int) -> Iterator[dict[str, Any]]:
    """What looking at one array in host memory costs, framework by framework."""
    array = np.zeros((4, NUM_QO_HEADS, HEAD_DIM), np.float16)
    found: dict[str, Any] = {"numpy": array, "dlpack": ByDlpack(array)}
    if torch_problem() is None or "torch" in sys.modules:
        found["torch"] = sys.modules["torch"].from_numpy(array)
    for name, each in found.items():
        read_us = host_us(lambda: arrays.view("q", each), batches)  # noqa: B023  # called at once
        yield {"what": "read an array", "framework": name, "read_us": read_us}


def run_rows(batches: int) -> Iterator[dict[str, Any]]:
    """What a run costs, framework by framework, tree by tree, on the default stream and on another."""
    import cupy

    side = cupy.cuda.Stream(non_blocking=True)
    frameworks = ["cupy"] if torch_problem() is not None else ["cupy", "torch"]
    for tree_name, tree in TREES.items():
        plan = plan_decode(tree, NUM_QO_HEADS, NUM_KV_HEADS, HEAD_DIM, device="cuda")
        for framework in frameworks:
            operands = operands_of(tree, framework)
            for stream_name, stream in (("default", None), ("another", side)):
                row = {"what": "run", "tree": tree_name, "framework": framework, "stream": stream_name}
                with current(stream, framework):
                    yield row | timed(plan, operands, batches)


def operands_of(tree: KVTree, framework: str) -> list[Any]:
    """Q, K, V and an output."""
    import cupy

    kv_shape = (tree.unique_tokens, NUM_KV_HEADS, HEAD_DIM)
    q_shape = (tree.batch_size, NUM_QO_HEADS, HEAD_DIM)
    made = [cupy.zeros(shape, np.float16) for shape in (q_shape, kv_shape, kv_shape, q_shape)]
    return made if framework == "cupy" else [sys.modules["torch"].from_dlpack(array) for array in made]


def current(stream: Any, framework: str) -> AbstractContextManager[Any]:
    """Make a CuPy stream the framework's current one; None: leave it the default one."""
    if stream is None or framework == "cupy":
        return stream or nullcontext()
    torch = sys.modules["torch"]
    return torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr))  # type: ignore[no-any-return]


def timed(plan: DecodePlan, operands: list[Any], batches: int) -> dict[str, float]:
    """Host time of a run and of an empty launch, and what is between them."""
    import cupy

    empty = cupy.RawModule(code=EMPTY, options=("-std=c++17",)).get_function("empty")
    params = np.zeros((), (np.void, plan_kernels.WORK_PARAMS.itemsize))
    wait = cupy.cuda.runtime.deviceSynchronize
    launch_us = host_us(lambda: empty((1, 1, 1), (32, 1, 1), (params,)), batches, wait)
    run_us = host_us(lambda: plan.run(*operands), batches, wait)
    return {"run_us": run_us, "launch_us": launch_us, "python_us": run_us - launch_us}


def host_us(call: Callable[[], Any], batches: int, wait: Callable[[], Any] = lambda: None) -> float:
    """Host time of one call in microseconds; the first batch warms up."""
    times = []
    for _ in range(1 + batches):
        wait()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        times.append(1e6 * (time.perf_counter() - start) / CALLS)
    wait()
    return statistics.median(times[1:])


if __name__ == "__main__":
    sys.exit(main())
