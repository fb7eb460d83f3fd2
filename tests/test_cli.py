"""The command line: the demo's numbers and exit status, the plan's table and picture, wrong input, ``info``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fasttree_cupy import cli, demo
from fasttree_cupy.demo import DemoResult, Timing, run_demo
from fasttree_cupy.execution.device import gpu_problem
from fasttree_cupy.explain import explain_plan
from fasttree_cupy.plan import DecodePlan
from fasttree_cupy.tree import KVTree
from tests.reference import dense_attention

ROOT = Path(__file__).resolve().parent.parent
TREE = KVTree.from_levels([1, 2, 6], [40, 20, 10])
HEADS: dict[str, Any] = {"num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 32}
SMALL = ["--levels", "1,2,6", "--tokens", "40,20,10", "--qo-heads", "4", "--kv-heads", "2", "--head-dim", "32"]
RESULT = DemoResult(
    device="cpu, 2 threads",
    kernel="cpu",
    num_nodes=9,
    num_requests=6,
    unique_tokens=140,
    summed_tokens=420,
    vnodes=[1, 8],
    q_tile_sizes=[64, 16],
    kv_tile_sizes=[32, 128],
    preparation=Timing(9.1, 0.0002, 5),
    decode=Timing(4.2, 0.025, 5),
    planning=Timing(1.2, 0.0001, 5),
    run=Timing(0.02, 0.0064, 5),
    dense=Timing(0.1, 0.1, 1),
    checked_requests=6,
    error=2e-4,
    error_bound=5e-4,
)


def table(text: str) -> dict[str, str]:
    """First cell -> the rest of the line."""
    return {cells[0]: "  ".join(cells[1:]) for cells in (re.split(r"\s{2,}", line) for line in text.splitlines())}


# The demo's numbers


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_demo_counts_and_passes(dtype: str) -> None:
    result = run_demo(TREE, **HEADS, dtype=dtype, device="cpu", repeat=3)
    assert (result.num_nodes, result.num_requests, result.checked_requests) == (9, 6, 6)
    assert (result.unique_tokens, result.summed_tokens) == (40 + 2 * 20 + 6 * 10, 6 * 70)
    assert result.sharing_factor == 3.0
    assert sum(result.vnodes) > 0
    assert result.kernel == "cpu"
    assert 0 < result.error < result.error_bound == {"float16": 5e-4, "bfloat16": 4e-3}[dtype]
    assert result.passed
    for timing in (result.preparation, result.decode, result.planning, result.run, result.dense):
        assert timing.runs == 3
        assert timing.first > 0
        assert timing.median > 0
    assert result.speed_ups == [result.dense.median / each.median for each in (result.decode, result.run)]


def test_demo_reports_what_preparation_adopted() -> None:
    result = run_demo(TREE, **HEADS, device="cpu", repeat=1)
    metadata, params = demo.prepare(TREE, (4, 2, 32), "cpu")
    assert result.vnodes == metadata.phase_node_nums
    assert (result.q_tile_sizes, result.kv_tile_sizes) == (params.TSQs, params.TSKs)


def test_seed_decides_the_values() -> None:
    errors = [run_demo(TREE, **HEADS, device="cpu", repeat=1, seed=seed).error for seed in (1, 1, 2)]
    assert errors[0] == errors[1] != errors[2]


@pytest.mark.parametrize(
    "tree",
    [
        KVTree([-1], [5]),
        KVTree([-1, 0, 0], [4, 2, 3], [1, 2, 0, 1]),  # an inner node's request, two at one leaf
        KVTree([-1, 0, 0], [0, 3, 0]),  # a request without tokens
        KVTree([-1], [0]),
    ],
)
def test_demo_on_odd_trees(tree: KVTree) -> None:
    result = run_demo(tree, **HEADS, device="cpu", repeat=1)
    assert result.passed
    assert result.sharing_factor >= 1


def test_dense_attention_is_the_references() -> None:
    q, k, v = demo.random_inputs(TREE, (4, 2, 32), np.dtype(np.float16), 3)
    paths = demo.request_paths(TREE, range(TREE.batch_size))
    expected, _ = dense_attention(TREE.parent, TREE.seqlen, TREE.request_node, q, k, v, 32**-0.5)
    np.testing.assert_allclose(demo.dense_attention(q, k, v, paths), expected, rtol=1e-12, atol=1e-12)
    some = demo.request_paths(TREE, [1, 4])
    np.testing.assert_allclose(demo.dense_attention(q, k, v, some), expected[[1, 4]], rtol=1e-12)


@pytest.mark.parametrize("levels", [([1, 2, 6], [40, 20, 10]), ([1, 16, 64], [1024, 256, 32]), ([1, 1, 3], [5, 0, 7])])
def test_without_sharing_each_request_reads_its_whole_path(levels: tuple[list[int], list[int]]) -> None:
    tree = KVTree.from_levels(*levels)
    metadata, _ = demo.prepare(tree, (32, 8, 128), "cpu", shared=False)
    assert metadata.vnode_to_q_lens.max() == 1
    assert metadata.vnode_to_kv_lens.sum() == tree.path_tokens.sum()


def test_large_trees_are_checked_by_a_spread_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    assert demo.checked_requests(TREE, 4 * 32) == list(range(6))
    monkeypatch.setattr(demo, "CHECKED_PRODUCTS", 3 * 70 * 4 * 32)
    assert demo.checked_requests(TREE, 4 * 32) == [0, 2, 4]
    result = run_demo(TREE, **HEADS, device="cpu", repeat=1)
    assert (result.checked_requests, result.passed) == (3, True)
    assert "3 of 6 requests" in cli.format_table(cli.demo_rows(result))
    monkeypatch.setattr(demo, "CHECKED_PRODUCTS", 1)
    assert demo.checked_requests(TREE, 4 * 32) == [0]


def test_slow_runs_are_repeated_less(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "MOST_SECONDS", 1e-9)
    calls: list[None] = []
    _, timing = demo.time_on_cpu(lambda: calls.append(None), 9)
    assert (timing.runs, len(calls)) == (1, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_demo_on_the_gpu(kernel: str) -> None:
    result = run_demo(TREE, **HEADS, device="cuda", kernel=kernel, repeat=3)
    assert result.passed
    assert result.device.startswith("cuda:")
    assert result.kernel in ("mma", "plain")
    assert result.run.median > 0
    assert result.dense.median > 0


# The table


def test_table_is_aligned() -> None:
    rows = [("a", "b"), ("long name", "2", "note"), ("c", "a wide cell", "other")]
    assert cli.format_table(rows).splitlines() == [
        "a          b",
        "long name  2            note",
        "c          a wide cell  other",
    ]


def test_demo_rows_say_everything() -> None:
    printed = table(cli.format_table(cli.demo_rows(RESULT)))
    assert printed == {
        "device": "cpu, 2 threads  stage-1 kernel: cpu",
        "nodes": "9",
        "requests": "6",
        "unique tokens": "140",
        "summed tokens": "420  over the requests' paths",
        "sharing factor": "3.00  summed / unique",
        "vnodes": "1 + 8  phase 0 + phase 1",
        "query tile sizes": "64, 16  adopted, in requests",
        "KV tile sizes": "32, 128  adopted, in tokens",
        "preparation": "0.200 ms  median of 5 runs; first call, compiles or loads: 9.1 s",
        "decode": "25.0 ms  median of 5 runs; first call, compiles or loads: 4.2 s",
        "plan_decode": "0.100 ms  median of 5 runs; first call, compiles or loads: 1.2 s",
        "its run": "6.400 ms  median of 5 runs; first call, compiles or loads: 20.0 ms",
        "dense attention": "100.0 ms  one run; the same as decode, but nothing is shared",
        "speed-up": "4, 16  dense attention / decode, / run: an indication only",
        "relative error": "2.00e-04  below the bound of 5e-04, against float64 dense attention, all requests",
    }


@pytest.mark.parametrize("error", [5e-4, 1.0, float("nan"), float("inf")])
def test_error_at_or_above_the_bound_does_not_pass(error: float) -> None:
    result = replace(RESULT, error=error)
    assert not result.passed
    assert "NOT below the bound" in cli.format_table(cli.demo_rows(result))


# The command line


def test_demo_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *SMALL, "--device", "cpu", "--repeat", "1", "--dtype", "bfloat16"]) == 0
    captured = capsys.readouterr()
    printed = table(captured.out)
    assert captured.err == ""
    assert list(printed) == [row[0] for row in cli.demo_rows(RESULT)]
    assert printed["nodes"] == "9"
    assert "below the bound of 4e-03" in printed["relative error"]


def test_demo_reads_a_tree_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TREE.to_file(tmp_path / "tree.txt")
    arguments = ["--tree", str(tmp_path / "tree.txt"), "--device", "cpu", "--repeat", "1", *SMALL[4:]]
    assert cli.main(["demo", *arguments]) == 0
    assert table(capsys.readouterr().out)["sharing factor"].startswith("3.00")


def test_demo_runs_the_documented_tree_by_default() -> None:
    tree = cli.chosen_tree(cli.make_parser().parse_args(["demo"]))
    assert (tree.num_nodes, tree.batch_size, tree.unique_tokens) == (81, 64, 1024 + 16 * 256 + 64 * 32)


@pytest.mark.parametrize("call", ["decode", "run"])
@pytest.mark.parametrize("fault", ["nan", "scaled", "unwritten"])
def test_wrong_result_is_exit_status_1(
    call: str, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(right: Callable[..., Any], o: Any, *arguments: Any, **options: Any) -> None:
        if fault == "unwritten":
            return
        right(*arguments, **options)
        if fault == "nan":
            o[0, 0, 0] = np.nan
        else:
            o *= np.float16(1.01)

    decode, run = demo.fasttree_decode, DecodePlan.run
    if call == "decode":
        monkeypatch.setattr(demo, "fasttree_decode", lambda *a, **options: faulty(decode, a[3], *a, **options))
    else:
        monkeypatch.setattr(DecodePlan, "run", lambda *a: faulty(run, a[4], *a))
    assert cli.main(["demo", *SMALL, "--device", "cpu", "--repeat", "1"]) == 1
    assert "NOT below the bound" in table(capsys.readouterr().out)["relative error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required"),
        (["nothing"], "invalid choice: 'nothing'"),
        (["info", "--more"], "unrecognized arguments: --more"),
        (["demo", "--tree", "no such file"], "No such file or directory: 'no such file'"),
        (["demo", "--tree", "a", "--levels", "1"], "not allowed with argument --tree"),
        (["demo", "--tree", "a", "--tokens", "1"], "--tokens goes with --levels"),
        (["demo", "--levels", "1,2"], "--levels and --tokens go together"),
        (["demo", "--tokens", "1,2"], "--levels and --tokens go together"),
        (["demo", "--levels", "1,x", "--tokens", "1,2"], "argument --levels: invalid integers value: '1,x'"),
        (["demo", "--levels", "", "--tokens", "1"], "argument --levels: invalid integers value: ''"),
        (["demo", "--levels", "1,2", "--tokens", "1"], "--tokens has 1 entries"),
        (["demo", "--levels", "2,2", "--tokens", "1,1"], "--levels is [2, 2], expected a first level of 1 node"),
        (["demo", "--levels", "1,2", "--tokens", "1,-1"], "expected no negative number"),
        (["demo", "--qo-heads", "9"], "--qo-heads is 9, expected a multiple of --kv-heads, 8"),
        (["demo", "--qo-heads", "0"], "--qo-heads is 0"),
        (["demo", "--kv-heads", "0"], "--kv-heads is 0"),
        (["demo", "--kv-heads", "two"], "argument --kv-heads: invalid int value: 'two'"),
        (["demo", "--head-dim", "80"], "argument --head-dim: invalid choice: "),
        (["demo", "--dtype", "float32"], "argument --dtype: invalid choice: 'float32'"),
        (["demo", "--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
        (["demo", "--kernel", "fast"], "argument --kernel: invalid choice: 'fast'"),
        (["demo", "--device", "cpu", "--kernel", "mma"], "--kernel is 'mma', but the work runs on the CPU"),
        (["demo", "--repeat", "0"], "argument --repeat: is 0, expected 1 or more"),
        (["demo", "--seed", "-1"], "argument --seed: is -1, expected 0 or more"),
        (["plan", "--tree", "no such file"], "No such file or directory: 'no such file'"),
        (["plan", "--plot", "no such folder/tree.svg"], "No such file or directory: 'no such folder/tree.svg'"),
        (["plan", "--tree", "a", "--levels", "1"], "not allowed with argument --tree"),
        (["plan", "--levels", "1,2"], "--levels and --tokens go together"),
        (["plan", "--levels", "1,2", "--tokens", "1,-1"], "expected no negative number"),
        (["plan", "--levels", "1", "--tokens", "3000000000"], "seqlen[0] is 3000000000"),
        (["plan", "--qo-heads", "9"], "--qo-heads is 9, expected a multiple of --kv-heads, 8"),
        (["plan", "--kv-heads", "0"], "--kv-heads is 0"),
        (["plan", "--head-dim", "80"], "argument --head-dim: invalid choice: "),
        (["plan", "--gpu", "P4"], "argument --gpu: is 'P4', expected H100, A100, V100"),
        (["plan", "--gpu", "H200"], "an H200 takes H100"),
        (["plan", "--device", "cpu"], "unrecognized arguments: --device cpu"),
        (["plan", "two\nlines"], "unrecognized arguments: two lines"),
    ],
)
def test_wrong_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    assert re.fullmatch(r"fasttree-cupy[a-z ]*: error: .*\n", captured.err)
    assert message in captured.err


def test_numbers_that_only_indicate_have_two_digits() -> None:
    numbers = (0.849, 2.34, 9.94, 9.96, 14.4, 117.2, 5362.0)
    assert [cli.two_digits(number) for number in numbers] == ["0.85", "2.3", "9.9", "10", "14", "120", "5,400"]


def test_malformed_tree_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for content in (b"2\n-1 0 8 1\n", b"one\n", b"", b"\xff\xfe\x00", b"1\n-1 0 99999999999999999999 0\n"):
        (tmp_path / "tree.txt").write_bytes(content)
        with pytest.raises(SystemExit) as stopped:
            cli.main(["demo", "--tree", str(tmp_path / "tree.txt")])
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_gpu_asked_for_where_none_is(capsys: pytest.CaptureFixture[str]) -> None:
    if gpu_problem() is None:
        pytest.skip("a GPU is usable here")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", "--device", "cuda"])
    assert stopped.value.code == 2
    assert "--device is 'cuda', but " in capsys.readouterr().err


def test_too_little_memory(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> None:
        raise MemoryError("Unable to allocate 8 TiB")

    monkeypatch.setattr(demo, "random_inputs", full)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["demo", *SMALL, "--device", "cpu"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "fasttree-cupy: error: Unable to allocate 8 TiB\n"


def test_bug_is_not_taken_for_wrong_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(demo, "fasttree_decode", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["demo", *SMALL, "--device", "cpu"])


# plan


def test_plan_prints_its_table(capsys: pytest.CaptureFixture[str]) -> None:
    levels = ["--levels", "1,4,16,64,256,1024", "--tokens", "256,8,256,64,32,256"]
    assert cli.main(["plan", *levels, "--head-dim", "64"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert table(captured.out) == {
        "nodes": "1,365",
        "requests": "1,024",
        "unique tokens": "278,816",
        "Split-K": "1,281  nodes attended to on their own",
        "Split-Q": "84  nodes that take their parents' tokens along",
        "vnodes": "64 + 1,280  phase 0 + phase 1",
        "query tile sizes": "16, 4  adopted, in requests; H100",
        "KV tile sizes": "32, 128  adopted, in tokens",
        "KV split sizes": "1,024, 1,024  adopted, in tokens",
        "partial outputs": "3,072  24.4 MiB of work space",
    }


def test_plan_is_the_demos(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["demo", *SMALL, "--device", "cpu", "--repeat", "1"]) == 0
    from_demo = table(capsys.readouterr().out)
    assert cli.main(["plan", *SMALL]) == 0
    planned = table(capsys.readouterr().out)
    assert planned["vnodes"] == from_demo["vnodes"]
    assert planned["query tile sizes"] == from_demo["query tile sizes"] + "; H100"
    assert planned["KV tile sizes"] == from_demo["KV tile sizes"]


def test_work_space_is_that_of_the_metadata() -> None:
    metadata, _ = demo.prepare(TREE, (4, 2, 32), "cpu")
    rows = {row[0]: row[1:] for row in cli.plan_rows(explain_plan(TREE, 4, 2), 32)}
    size = (metadata.mid_o.nbytes + metadata.mid_lse.nbytes) / 2**20
    assert rows["partial outputs"] == (str(len(metadata.mid_o)), f"{size:.1f} MiB of work space")


@pytest.mark.parametrize("gpu", ["A100", "V100"])
def test_plan_takes_a_gpus_sizes(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--levels", "1,64", "--tokens", "9,9", "--kv-heads", "32", "--gpu", gpu]) == 0
    made = explain_plan(KVTree.from_levels([1, 64], [9, 9]), 32, 32, gpu).plan
    expected = "{}, {}".format(*made.q_tile_sizes)
    assert table(capsys.readouterr().out)["query tile sizes"] == f"{expected}  adopted, in requests; {gpu}"


def test_plan_draws_a_tree_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, picture = tmp_path / "a < b & c.txt", tmp_path / "tree.svg"
    TREE.to_file(file)
    assert cli.main(["plan", "--tree", str(file), *SMALL[4:], "--plot", str(picture)]) == 0
    assert table(capsys.readouterr().out)["nodes"] == "9"
    root = ElementTree.fromstring(picture.read_text(encoding="utf-8"))
    assert root[0].text == "Plan of a < b & c.txt"


def test_plan_names_levels_in_the_picture(tmp_path: Path) -> None:
    assert cli.main(["plan", "--plot", str(tmp_path / "tree.svg")]) == 0
    root = ElementTree.fromstring((tmp_path / "tree.svg").read_text(encoding="utf-8"))
    assert root[0].text == "Plan of levels 1,16,64 of 1024,256,32 tokens"


# info


def test_info_names_versions_and_the_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    printed = table(capsys.readouterr().out)
    assert printed["NumPy"] == np.__version__
    assert printed["Python"] == sys.version.split()[0]
    assert int(printed["CPU threads"]) >= 1
    if gpu_problem() is None:
        assert printed["stage-1 kernel"].startswith(("mma", "plain"))
    else:
        assert printed["stage-1 kernel"] == "cpu"
        assert printed["GPU"].startswith("none can be used: ")


def test_info_without_cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(cli, "gpu_problem", lambda: "CuPy cannot be imported;\ninstall it")
    rows = dict(cli.info_rows())
    assert rows["CuPy"].startswith("cannot be imported: ")
    assert rows["GPU"] == "none can be used: CuPy cannot be imported; install it"
    assert all("\n" not in cell for cell in rows.values())


def test_cuda_versions() -> None:
    assert [cli.cuda_version(number) for number in (12080, 13000, 0)] == ["12.8", "13.0", "none"]

    def fails() -> str:
        raise OSError("no such\nlibrary")

    assert cli.version_of(fails) == "not available: no such library"


@pytest.mark.gpu
def test_info_names_the_gpu() -> None:
    rows = dict(cli.info_rows())
    assert rows["GPU"].startswith("cuda:")
    assert re.fullmatch(r"\d+\.\d", rows["compute capability"])
    for name in ("CUDA driver", "CUDA runtime", "NVRTC"):
        assert re.fullmatch(r"\d+\.\d+", rows[name])


def test_module_runs() -> None:
    command = [sys.executable, "-m", "fasttree_cupy", "info"]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "fasttree-cupy" in table(done.stdout)
