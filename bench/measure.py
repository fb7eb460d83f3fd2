"""One case: prepare every contestant, check its output, then time those that are right, interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.check import Reference, sample_requests
from bench.contestants import Contestant, Run, UnsuitedError
from bench.device import Device
from bench.floor import H200, Rates
from bench.workloads import Case, Workload, make_workload

__all__ = ["measure_case"]

Result = dict[str, Any]


def measure_case(
    case: Case, contestants: Sequence[Contestant], device: Device, rates: Rates, repeats: int, checked: int
) -> Result:
    """Measure a case.

    Parameters
    ----------
    contestants : sequence of Contestant
        Those that can run on this machine.
    rates : Rates
        The device's own, for the floor.
    repeats : int
        Timed runs of each variant.
    checked : int
        Requests to compare with the reference, 0 for all.

    Returns
    -------
    dict
        A row of the results file. ``results`` holds, by contestant, ``best`` and ``variants``; or one of ``absent``,
        ``failed`` and ``wrong``, with the reason.
    """
    workload = make_workload(case, device)
    reference = Reference(workload, sample_requests(workload.tree.batch_size, checked))
    results: dict[str, Result] = {}
    runs: dict[tuple[str, str], Run] = {}
    for contestant in contestants:
        results[contestant.name], ready = _check(contestant, workload, reference)
        runs |= {(contestant.name, label): run for label, run in ready.items()}
    labels = {" ".join(key): key for key in runs}
    times = device.time_cold({text: runs[key].call for text, key in labels.items()}, repeats) if runs else {}
    for text, (name, label) in labels.items():
        run = runs[name, label]
        results[name]["variants"][label] |= times[text] | {"plan_ms": run.plan_ms} | _graph(run, device, repeats)
    for result in results.values():
        if "variants" in result:
            variants = result["variants"]
            result["best"] = min(variants, key=lambda label: float(variants[label]["median_us"]))
    described = _describe(workload, rates) | {"checked_requests": len(reference.requests)}
    return described | {"quantisation_error": reference.quantisation_error(), "results": results}


def _check(contestant: Contestant, workload: Workload, reference: Reference) -> tuple[Result, Mapping[str, Run]]:
    """A contestant's result before it is timed, and what is to be timed: nothing unless all its variants are right."""
    try:
        runs = contestant.prepare(workload)
        outcomes = {label: reference.problem(run.call(), contestant.own) for label, run in runs.items()}
    except UnsuitedError as reason:
        return {"absent": str(reason)}, {}
    except Exception as error:  # a peer's failure must not end the run, whatever its kind
        _check_device(workload, contestant.name, error)
        return {"failed": f"{type(error).__name__}: {str(error).strip() or 'no message'}"}, {}
    problems = [f"{label}: {problem}" for label, (_, problem) in outcomes.items() if problem is not None]
    if problems:
        return {"wrong": "; ".join(problems)}, {}
    return {"variants": {label: {"relative_error": error} for label, (error, _) in outcomes.items()}}, runs


def _check_device(workload: Workload, name: str, error: Exception) -> None:
    """End the run where a failure took the device along: nothing measured after it could be trusted."""
    try:
        workload.device.synchronize()
    except Exception as lost:
        advice = "leave it out with --peers, and go on with --resume"
        raise SystemExit(f"{name} lost the GPU in {workload.case.name} ({error}): {advice}") from lost
    workload.device.release()


def _graph(run: Run, device: Device, repeats: int) -> Result:
    if not run.graph:
        return {}
    try:
        return {"graph_us": device.time_graph(run.call, repeats)}
    except Exception as error:  # whatever CUDA or the contestant's framework says of the capture
        device.synchronize()
        return {"graph_problem": f"{type(error).__name__}: {error}"}


def _describe(workload: Workload, rates: Rates) -> Result:
    case, tree = workload.case, workload.tree
    return {
        "suite": case.suite,
        "name": case.name,
        "tree": case.tree_name,
        "nodes_per_level": case.nodes_per_level,
        "tokens_per_level": case.tokens_per_level,
        "num_qo_heads": case.num_qo_heads,
        "num_kv_heads": case.num_kv_heads,
        "head_dim": case.head_dim,
        "dtype": case.dtype,
        "kv_dtype": case.kv_dtype or case.dtype,
        "batch": tree.batch_size,
        "nodes": tree.num_nodes,
        "unique_tokens": tree.unique_tokens,
        "summed_tokens": int(tree.path_tokens.sum()),
        "floor_us": rates.floor_us(case, tree),
        "floor_h200_us": H200.floor_us(case, tree),
    }
