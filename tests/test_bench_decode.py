"""The decode benchmark without a GPU: wrong, slow and fast peers, resuming, the time limit, suites, the floor."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench import bench_decode, records
from bench.check import Reference, sample_requests
from bench.contestants import Contestant, Documented, Planned, Run, UnsuitedError
from bench.float8 import quantise, widened
from bench.floor import H200
from bench.peers import PEERS
from bench.peers.flashinfer_cascade import level_runs
from bench.timing import summarise, time_plan
from bench.workloads import SUITES, Case, Workload, make_workload, suite
from fasttree_cupy.execution.arrays import DTYPES

ONE_CASE = ["--levels", "1,2,6", "--tokens", "8,3,5", "--heads", "4/2", "--head-dim", "16"]
TWO_CASES = [*ONE_CASE[:5], "4/2", "2/2", "--head-dim", "16"]
ABOUT = {"gpu": "Fake 1", "commit": "abc"}


class FakeDevice:
    """NumPy arrays, and a clock that reads what the test says, by contestant."""

    xp = np

    def __init__(self, times_us: Mapping[str, float]) -> None:
        self.times_us = times_us
        self.timed: list[str] = []

    def normal(self, shape: tuple[int, ...], dtype: str, seed: int) -> Any:
        return np.random.default_rng(seed).standard_normal(shape, np.float32).astype(DTYPES[dtype])

    def time_cold(self, runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, dict[str, float]]:
        self.timed += runs
        times = {name: self.times_us[name.split()[0]] for name in runs}
        return {name: summarise([time] * repeats) | {"host_us": 1.0} for name, time in times.items()}

    def time_graph(self, run: Callable[[], Any], repeats: int) -> float:
        raise RuntimeError("no graphs here")

    def synchronize(self) -> None:
        pass

    def free_bytes(self) -> int:
        return 10**9

    def release(self) -> None:
        pass


class Dense(Contestant):
    """Right, unless `spoil` changes its output."""

    def __init__(
        self, name: str, spoil: Callable[[Any], Any] = lambda o: o, own: bool = False, problem: str | None = None
    ) -> None:
        self.name, self.spoil, self.own, self._problem = name, spoil, own, problem
        self.cases: list[str] = []

    def problem(self) -> str | None:
        return self._problem

    def prepare(self, workload: Workload) -> dict[str, Run]:
        self.cases.append(workload.case.name)
        everything = Reference(workload, np.arange(workload.tree.batch_size))
        output = self.spoil(everything.expected.astype(workload.q.dtype))
        return {"only": Run(lambda: output, plan_ms=0.5)}


@pytest.mark.parametrize("kv_dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_is_quantised_by_head_and_its_error_and_floor_are_recorded(
    kv_dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fasttree_cupy.execution.device.gpu_problem", lambda: "none here")
    arguments = [*ONE_CASE, "--output", str(tmp_path / "out.json")]
    rows = []
    for chosen in ([], ["--kv-dtype", kv_dtype]):
        args = bench_decode.parse_args([*arguments, *chosen])
        assert bench_decode.run(args, [Planned()], FakeDevice({"fasttree_cupy_plan": 9.0}), H200, ABOUT) == 0
        rows += records.load(tmp_path / "out.json")["cases"]
    plain, quantised = rows
    assert [row["kv_dtype"] for row in rows] == ["float16", kv_dtype]
    assert records.key(plain) != records.key(quantised)
    assert records.key({**plain, "kv_dtype": "float16"}) == records.key(
        {name: value for name, value in plain.items() if name != "kv_dtype"}
    )
    assert plain["quantisation_error"] is None
    # Half a unit in the last place of 3 or 2 bits of mantissa is at most 1/16 or 1/8 of the number.
    assert 0.005 < quantised["quantisation_error"] < (1 / 16 if kv_dtype == "float8_e4m3fn" else 1 / 8)
    case = Case("levels", "1,2,6", "8,3,5", 4, 2, 16, kv_dtype=kv_dtype)
    saved = H200.bytes_us(replace(case, kv_dtype=""), case.tree()) - H200.bytes_us(case, case.tree())
    assert saved == pytest.approx(1e6 * 2 * 44 * 2 * 16 / H200.bandwidth)


def test_quantising_rounds_to_the_nearest_of_each_heads_scale() -> None:
    array = np.random.default_rng(5).standard_normal((50, 3, 16)).astype(DTYPES["bfloat16"]) * np.float32(3)
    array = array.astype(DTYPES["bfloat16"])
    quantised, scales = quantise(array, "float8_e4m3fn", np)
    wide = array.astype(np.float64)
    np.testing.assert_allclose(scales, np.abs(wide).max(axis=(0, 2)) / 448, rtol=1e-6)
    back = widened(quantised, np) * scales[:, None]
    assert np.all(np.abs(back - wide) <= np.maximum(np.abs(wide) / 16, 2.0**-10 * scales[:, None]) * 1.001)


def ours() -> Dense:
    return Dense("ours", own=True)


def measure(contestants: list[Contestant], times_us: dict[str, float], *options: str) -> tuple[int, dict[str, Any]]:
    """Exit status and results file of a run with fakes."""
    args = bench_decode.parse_args(list(options))
    assert args.output is not None
    status = bench_decode.run(args, contestants, FakeDevice(times_us), H200, ABOUT)
    return status, records.load(args.output)


@pytest.fixture
def output(tmp_path: Path) -> list[str]:
    return ["--output", str(tmp_path / "out.json")]


def with_nan(output: Any) -> Any:
    output[0, 0, 0] = np.nan
    return output


@pytest.mark.parametrize("spoil", [lambda o: 1.01 * o, lambda o: o[::-1], with_nan, lambda o: o[:, :1]])
def test_a_wrong_peer_fails_the_run_and_is_not_timed(
    spoil: Callable[[Any], Any], output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = measure([ours(), Dense("liar", spoil)], {"ours": 10.0}, *ONE_CASE, *output)
    result = document["cases"][0]["results"]
    assert status == 1
    assert result["liar"].keys() == {"wrong"}
    assert result["ours"]["variants"]["only"]["median_us"] == 10
    assert "WRONG: liar in levels: 1,2,6 x 8,3,5 (4/2): only: relative error" in capsys.readouterr().out


def test_our_wrong_output_fails_the_run(output: list[str]) -> None:
    # 8e-4 is within a peer's bound, not within ours.
    wrong = Dense("ours", lambda o: (o.astype(np.float64) * 1.0008).astype(np.float32), own=True)
    status, document = measure([wrong], {}, *ONE_CASE, *output)
    assert status == 1
    assert document["cases"][0]["results"]["ours"].keys() == {"wrong"}
    peer = Dense("peer", wrong.spoil)
    assert measure([peer], {"peer": 1.0}, *ONE_CASE, *output)[0] == 0


def test_a_slow_peer_is_reported_as_slower(output: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    status, _ = measure([ours(), Dense("slow")], {"ours": 10.0, "slow": 25.0}, *ONE_CASE, *output)
    printed = capsys.readouterr().out
    assert status == 0
    assert "2.50x as fast as slow (1 cases; worst 2.50x, levels: 1,2,6 x 8,3,5 (4/2))" in printed
    assert "a peer is faster in 0 of 1 cases\n" in printed


def test_a_faster_peer_is_listed_by_name(output: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    peers = [Dense("slow"), Dense("quick")]
    measure([ours(), *peers], {"ours": 10.0, "slow": 25.0, "quick": 8.0}, *ONE_CASE, *output)
    printed = capsys.readouterr().out
    assert (
        "a peer is faster in 1 of 1 cases:\n    levels: 1,2,6 x 8,3,5 (4/2): 10.0 us, quick 8.0 us (0.80x)" in printed
    )
    assert "0.80x as fast as the best peer of each case" in printed
    assert "planning included, 1 decode a plan: slow 1.03x, quick 1.00x" in printed


def test_absent_unsuited_and_failing_peers_are_named(output: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    class Unsuited(Dense):
        def prepare(self, workload: Workload) -> dict[str, Run]:
            raise UnsuitedError("too wide")

    def fail(_: Any) -> Any:
        raise RuntimeError("no kernel")

    peers = [Dense("gone", problem="not installed"), Unsuited("narrow"), Dense("broken", fail)]
    status, document = measure([ours(), *peers], {"ours": 10.0}, *ONE_CASE, *output)
    printed = capsys.readouterr().out
    assert status == 0
    assert document["contestants"]["gone"] == {"own": False, "problem": "not installed"}
    assert document["cases"][0]["results"]["narrow"] == {"absent": "too wide"}
    assert "absent: gone: not installed" in printed
    assert "FAILED: broken in levels: 1,2,6 x 8,3,5 (4/2): RuntimeError: no kernel" in printed
    assert measure([Dense("ours", fail, own=True)], {}, *ONE_CASE, *output)[0] == 1


def test_a_lost_gpu_ends_the_run(output: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any = None) -> Any:
        raise RuntimeError("illegal address")

    monkeypatch.setattr(FakeDevice, "synchronize", fail)
    with pytest.raises(SystemExit, match=r"broken lost the GPU in 1,2,6 x 8,3,5 .* leave it out with --peers"):
        measure([Dense("broken", fail)], {}, *ONE_CASE, *output)


def test_our_own_contestant_runs_where_numpy_is_the_device(monkeypatch: pytest.MonkeyPatch, output: list[str]) -> None:
    monkeypatch.setattr("fasttree_cupy.preparation.resolve_device", lambda _: "cpu")
    status, document = measure([Documented()], {"fasttree_cupy": 10.0}, *ONE_CASE, *output)
    variants = document["cases"][0]["results"]["fasttree_cupy"]["variants"]
    assert status == 0
    assert list(variants) == ["TSKs 32,128", "TSKs 32,32"]
    for figures in variants.values():
        assert figures["relative_error"] < 5e-4
        assert figures["plan_ms"] > 0
        assert figures["graph_problem"] == "RuntimeError: no graphs here"


def test_resume_measures_only_what_is_missing(output: list[str]) -> None:
    times = {"ours": 10.0, "peer": 20.0}
    measure([ours(), Dense("peer")], times, *ONE_CASE, *output)
    own, peer = ours(), Dense("peer")
    status, document = measure([own, peer], times, *TWO_CASES, *output, "--resume")
    assert status == 0
    assert own.cases == ["1,2,6 x 8,3,5 (2/2)"]
    assert [row["num_qo_heads"] for row in document["cases"]] == [4, 2]
    # A contestant that is new, or was wrong, has its cases measured again; other cases stay.
    newcomer = Dense("newcomer")
    _, document = measure([ours(), newcomer], {**times, "newcomer": 1.0}, *ONE_CASE, *output, "--resume")
    assert newcomer.cases == ["1,2,6 x 8,3,5 (4/2)"]
    assert len(document["cases"]) == 2


def test_resume_refuses_the_results_of_another_gpu(output: list[str]) -> None:
    measure([ours()], {"ours": 10.0}, *ONE_CASE, *output)
    document = json.loads(Path(output[1]).read_text(encoding="utf-8"))
    document["machine"]["gpu"] = "Fake 2"
    records.save(Path(output[1]), document)
    with pytest.raises(SystemExit, match="holds results of Fake 2, this is Fake 1"):
        measure([ours()], {"ours": 10.0}, *ONE_CASE, *output, "--resume")


def test_limit_seconds_stops_between_cases(
    output: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seconds = iter(range(0, 100, 4))
    monkeypatch.setattr("bench.bench_decode.time.monotonic", lambda: next(seconds))
    _, document = measure([ours()], {"ours": 10.0}, *TWO_CASES, *output, "--limit-seconds", "5")
    assert len(document["cases"]) == 1
    assert "stopped after 5 s, 1 cases left: go on with --resume" in capsys.readouterr().out


def test_published_figures_count_where_the_peer_did_not_run(
    tmp_path: Path, output: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    case = {
        "suite": "levels", "nodes_per_level": "1,2,6", "context_per_level": "8,3,5", "num_qo_heads": 4,
        "num_kv_heads": 2, "head_dim": 16, "dtype": "float16", "pat_us": 5.0, "peer_us": 40.0, "other_us": None,
    }  # fmt: skip
    figures = {"machine": "one Fake 1", "peers": dict.fromkeys(("pat", "peer", "other"), ""), "cases": [case]}
    path = tmp_path / "published.json"
    path.write_text(json.dumps(figures), encoding="utf-8")
    contestants = [ours(), Dense("peer")]
    times = {"ours": 10.0, "peer": 20.0}
    _, document = measure(contestants, times, *ONE_CASE, *output, "--published", str(path))
    printed = capsys.readouterr().out
    assert document["cases"][0]["published_us"] == {"pat": 5.0, "peer": 40.0}
    assert "10.0 us, pat 5.0 us (0.50x)" in printed
    assert "peer measured / published: 0.50 over 1 cases" in printed

    path.write_text(json.dumps(figures | {"machine": "another GPU"}), encoding="utf-8")
    _, document = measure(contestants, times, *ONE_CASE, *output, "--published", str(path))
    assert document["cases"][0]["published_us"] == {}
    assert "is left aside" in capsys.readouterr().out


def test_exit_status_2_without_a_gpu(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("bench.bench_decode.gpu_problem", lambda: "there is none")
    assert bench_decode.main(ONE_CASE) == 2
    assert capsys.readouterr().err == "bench_decode needs a GPU: there is none\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["--levels", "1,2"], [*ONE_CASE, "--resume"], [*ONE_CASE, "--repeats", "1"],
     ["--suite", "fasttree15", "--heads", "32/5"]],
)  # fmt: skip
def test_command_lines_that_are_refused(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        bench_decode.parse_args(arguments)


def test_suites_have_45_and_80_cases() -> None:
    cases = {name: suite(name) for name in SUITES}
    assert {name: len(found) for name, found in cases.items()} == {"fasttree15": 45, "pat20": 80}
    for found in cases.values():
        assert len({records.key(case) for case in found}) == len(found)


# suite, nodes, tokens, heads, batch, unique tokens, bytes and matrix floor in microseconds: rows of the published file.
PUBLISHED = [
    ("fasttree15", "1,2,64", "8,256,32", (16, 1), 64, 2568, 0.41, 0.23),
    ("fasttree15", "1,1024", "2048,32", (16, 1), 1024, 34816, 5.83, 26.24),
    ("fasttree15", "1,4,256", "8,256,32", (32, 8), 256, 9224, 9.33, 1.87),
    ("pat20", "1,8,512", "32,2048,256", (64, 8), 512, 147488, 137.98, 58.93),
    ("pat20", "2,8,16,256", "256,256,32,32", (32, 8), 256, 11264, 11.18, 3.63),
    ("pat20", "256", "1024", (64, 8), 256, 262144, 240.47, 12.92),
]


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[1]}")
def test_trees_and_floors_equal_the_published(row: tuple[Any, ...]) -> None:
    name, nodes, tokens, heads, batch, unique_tokens, bytes_us, matrix_us = row
    case = Case(name, nodes, tokens, *heads)
    assert case in suite(name)
    tree = case.tree()
    assert (tree.batch_size, tree.unique_tokens) == (batch, unique_tokens)
    assert H200.bytes_us(case, tree) == pytest.approx(bytes_us, abs=0.006)
    assert H200.matrix_us(case, tree) == pytest.approx(matrix_us, abs=0.006)
    assert H200.floor_us(case, tree) == pytest.approx(max(bytes_us, matrix_us) + 4, abs=0.006)


def test_a_tree_file_is_a_case(tmp_path: Path) -> None:
    path = tmp_path / "tree.txt"
    Case("levels", "1,2", "3,4", 1, 1).tree().to_file(path)
    (case,) = bench_decode.parse_args(["--tree", str(path), "--heads", "8/2"]).cases
    assert case.name == "tree.txt (8/2)"
    assert case.tree().unique_tokens == 11


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_reference_is_dense_attention(dtype: str) -> None:
    work = make_workload(Case("levels", "2,4", "3,2", 4, 2, 16, dtype), FakeDevice({}))
    reference = Reference(work, np.array([3]))
    rows = work.rows(work.paths[3])
    assert rows.tolist() == [3, 4, 5, 12, 13]  # the empty root has none; the second tree of the forest, its last leaf
    for head in range(4):
        k, v = (array[rows, head // 2].astype(np.float64) for array in (work.k, work.v))
        weights = np.exp(k @ work.q[3, head].astype(np.float64) / 4)
        np.testing.assert_allclose(reference.expected[0, head], weights @ v / weights.sum(), rtol=1e-12)
    assert np.isnan(reference.error(work.new_output().astype(np.float32)))


def test_sample_of_requests() -> None:
    assert sample_requests(5, 0).tolist() == sample_requests(5, 9).tolist() == [0, 1, 2, 3, 4]
    sample = sample_requests(1000, 64)
    assert len(set(sample.tolist())) == 64
    assert {0, 999} <= set(sample.tolist())


def test_levels_of_the_cascade() -> None:
    work = make_workload(Case("levels", "2,4,8", "3,2,1", 1, 1, 16), FakeDevice({}))
    levels = level_runs(work.paths)
    assert [(starts.tolist(), nodes.tolist()) for starts, nodes in levels] == [
        ([0, 4, 8], [1, 2]),
        ([0, 2, 4, 6, 8], [3, 4, 5, 6]),
        (list(range(9)), list(range(7, 15))),
    ]
    for paths in ([[0]], [[0, 1], [0]], [[0, 1], [0, 2], [0, 1]]):
        with pytest.raises(UnsuitedError):
            level_runs([np.array(path) for path in paths])


def test_peers_that_are_absent_say_why(tmp_path: Path) -> None:
    assert PEERS["fasttree_triton"](None).problem() == (
        "no --fasttree-artifact was given, the artifact's kernel_bench folder"
    )
    assert PEERS["fasttree_triton"](tmp_path).problem() == f"{tmp_path / 'fasttree.py'} is missing"


def test_planning_time_is_the_median_after_a_first_call() -> None:
    calls: list[int] = []
    result, ms = time_plan(lambda: calls.append(0) or len(calls), lambda: None)
    assert (result, len(calls)) == (4, 4)
    assert ms >= 0
