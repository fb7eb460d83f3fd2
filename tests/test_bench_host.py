"""The benchmark of the host's part: what needs no GPU runs, and its launch takes as large a struct as a run's."""

from __future__ import annotations

import json
from pathlib import Path

from bench import bench_host
from fasttree_cupy.execution import plan_kernels


def test_reading_arrays_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "host.json"
    assert bench_host.main(["--batches", "2", "--output", str(path)]) == 0
    rows = [row for row in json.loads(path.read_text())["cases"] if row["what"] == "read an array"]
    assert {"numpy", "dlpack"} <= {row["framework"] for row in rows}
    assert all(row["read_us"] > 0 for row in rows)


def test_the_empty_launch_carries_a_runs_parameters() -> None:
    assert f"bytes[{plan_kernels.WORK_PARAMS.itemsize}]" in bench_host.EMPTY


def test_a_call_takes_the_time_between_waits() -> None:
    calls: list[str] = []
    bench_host.host_us(lambda: calls.append("call"), 2, lambda: calls.append("wait"))
    assert calls == ["wait", *["call"] * bench_host.CALLS] * 3 + ["wait"]
