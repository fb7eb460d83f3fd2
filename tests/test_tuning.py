"""``fasttree-cupy tune``: what fits find, what files hold, which constants plans use, what the command says."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy import cli
from fasttree_cupy.execution import cuda
from fasttree_cupy.execution.device import gpu_problem
from fasttree_cupy.execution.schedule import BalancedSchedule, SubtreeSchedule
from fasttree_cupy.plan import make_schedule
from fasttree_cupy.planning import balanced
from fasttree_cupy.planning.machine import COST_MODEL, H200, H200_WORKERS, Constants, WorkerMachine, built_in
from fasttree_cupy.tuning import fit as fitting
from fasttree_cupy.tuning import measure, store
from fasttree_cupy.tuning.chosen import chosen, constants_of
from fasttree_cupy.tuning.fit import Fit, Measured, fit
from fasttree_cupy.tuning.gpu import Gpu, gpu_of
from fasttree_cupy.tuning.measure import problems
from fasttree_cupy.tuning.numbers import numbers_of, with_numbers
from fasttree_cupy.tuning.samples import Problem, item_samples, worker_samples
from tests.reference import dense_attention
from tests.tolerances import assert_close

GPU = Gpu("NVIDIA H200", 90, 132)
CONSTANTS = Constants(H200, H200_WORKERS)
START = {"items": H200, "workers": H200_WORKERS}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, and nothing remembered."""
    monkeypatch.setenv(store.CACHE_VARIABLE, str(tmp_path / "cache"))
    chosen.cache_clear()
    yield tmp_path / "cache"
    chosen.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """An H200 of paper."""
    monkeypatch.setattr(cli, "gpu_of", lambda _: GPU)
    monkeypatch.setattr("fasttree_cupy.tuning.chosen.gpu_of", lambda _: GPU)
    monkeypatch.setattr(cuda, "compute_capability", lambda _: GPU.compute_capability)
    monkeypatch.setattr(cuda, "multiprocessors", lambda _: GPU.multiprocessors)
    return GPU


def other(machine: Any, seed: int = 0) -> Any:
    """A machine of other speeds."""
    rng = np.random.default_rng(seed)
    return with_numbers(machine, {name: x * np.exp(rng.normal(0, 0.3)) for name, x in numbers_of(machine).items()})


def fit_of(machine: Any, accepted: bool = True) -> Fit[Any]:
    return Fit(machine, accepted, 100, (0.2, 0.05), (0.03, 0.01))


def save(fitted: WorkerMachine) -> Path:
    path = store.tuned_file(GPU)
    store.write(path, GPU, {"workers": fit_of(fitted)}, {"version": "0.1.0"})
    return path


# Fits


def samples_of(field: str, quick: bool = True) -> tuple[list[Any], list[int]]:
    """Forced plans, and the problem of each."""
    samples, numbers = [], []
    for number, problem in enumerate(problems(quick)):
        made = worker_samples(problem, 132, H200_WORKERS) if field == "workers" else item_samples(problem, H200)
        samples += list(made)
        numbers += [number] * (len(samples) - len(numbers))
    return samples, numbers


@pytest.mark.parametrize("field", ["items", "workers"])
def test_a_fit_finds_the_constants_that_made_the_times(field: str) -> None:
    truth = other(START[field])
    samples, numbers = samples_of(field, quick=False)
    noise = np.exp(np.random.default_rng(1).normal(0, 0.02, len(samples)))
    exact = [each.estimate_us(truth) for each in samples]
    found = fit(START[field], samples, [Measured(*each) for each in zip(numbers, exact * noise, strict=True)])
    assert found.accepted
    assert found.samples == len(samples) > 200
    assert found.errors[0] > 0.05
    assert 0.015 < found.errors[1] < 0.022
    np.testing.assert_allclose([each.estimate_us(found.machine) for each in samples], exact, rtol=0.03)
    truths, fitted = numbers_of(truth), numbers_of(found.machine)
    for name in truths.keys() - {"merge"}:  # one hundredth of a microsecond: nothing tells it
        assert fitted[name] == pytest.approx(truths[name], rel=0.15), name


@pytest.mark.parametrize("field", ["items", "workers"])
def test_times_as_the_model_says_them_change_nothing(field: str) -> None:
    samples, numbers = samples_of(field)
    start = START[field]
    found = fit(
        start, samples, [Measured(i, each.estimate_us(start)) for i, each in zip(numbers, samples, strict=True)]
    )
    assert found.errors == pytest.approx((0, 0), abs=1e-9)
    assert found.losses == pytest.approx((0, 0), abs=1e-9)
    assert numbers_of(found.machine) == pytest.approx(numbers_of(start))


class Toy:
    """A plan that takes as long as a launch, or ten microseconds."""

    def __init__(self, constant: bool) -> None:
        self.constant = constant

    def estimate_us(self, machine: WorkerMachine) -> float:
        return 10.0 if self.constant else machine.start


def test_a_fit_that_chooses_worse_is_not_accepted() -> None:
    """Most times ask for slow launches; where there is a choice, these make the slower plan look the faster one."""
    samples = [Toy(False), Toy(True), *(Toy(False) for _ in range(10))]
    times = [Measured(0, 9.0), Measured(0, 12.0), *(Measured(1 + i, 20.0) for i in range(10))]
    found = fit(H200_WORKERS, samples, times)
    assert found.errors[1] < found.errors[0]
    assert found.losses == pytest.approx((0, (12 / 9) ** (1 / 11) - 1))
    assert not found.accepted
    assert found.machine == H200_WORKERS


def test_a_fit_that_estimates_worse_is_not_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    samples, numbers = samples_of("workers")
    times = [Measured(i, each.estimate_us(H200_WORKERS)) for i, each in zip(numbers, samples, strict=True)]
    monkeypatch.setattr(fitting, "minimise", lambda _, start: start + 1)
    found = fit(H200_WORKERS, samples, times)
    assert found.errors[1] > found.errors[0]
    assert (found.accepted, found.machine) == (False, H200_WORKERS)


def test_loss_by_choice() -> None:
    times = [Measured(0, 10.0), Measured(0, 11.0), Measured(1, 20.0), Measured(1, 30.0)]
    assert fitting.loss_by_choice(np.array([1.0, 2.0, 3.0, 4.0]), times) == pytest.approx(0)
    assert fitting.loss_by_choice(np.array([2.0, 1.0, 3.0, 4.0]), times) == pytest.approx(1.1**0.5 - 1)


def test_samples_are_estimated_as_the_planners_do() -> None:
    for field in ("items", "workers"):
        samples, _ = samples_of(field)
        assert len({each.plan.items.tobytes() for each in samples}) > 20
        same = [each.estimate_us(START[field]) / each.plan.estimate_us for each in samples]
        # Half of the workers' plans were cut by a machine that merges for nothing.
        assert np.isclose(same, 1, rtol=1e-9).sum() >= (len(same) if field == "items" else len(same) // 3)


def test_a_sample_whose_workers_have_other_items_too_is_estimated_as_the_planner_does() -> None:
    """Though a tile has as many pieces as would pay for merging together."""
    tree = ft.KVTree.from_levels([1, 300], [9000, 40])
    made = balanced.plan(tree, 8, 2, 128, 132, H200_WORKERS)
    assert len(made.items) > made.workers
    samples = worker_samples(Problem(tree, 16, 2), 132, H200_WORKERS)
    (same,) = [each for each in samples if np.array_equal(each.plan.items, made.items)]
    assert same.estimate_us(H200_WORKERS) == pytest.approx(made.estimate_us, rel=0.02)


# Files


def test_a_file_holds_what_was_written(folder: Path) -> None:
    machines = {field: other(machine, 3) for field, machine in START.items()}
    path = store.tuned_file(GPU)
    assert path == folder / "tuned-NVIDIA-H200-sm90.json"
    store.write(path, GPU, {field: fit_of(each) for field, each in machines.items()}, {"cuda_driver": "12.8"})
    assert store.read(path, GPU, CONSTANTS).constants == Constants(**machines)
    content = json.loads(path.read_text(encoding="utf-8"))
    assert (content["name"], content["cuda_driver"], content["cost_model"]) == ("NVIDIA H200", "12.8", COST_MODEL)
    assert content["errors"]["items"] == {"before": 0.2, "after": 0.05}
    assert [each.name for each in folder.iterdir()] == [path.name]


def test_what_was_not_accepted_is_not_written() -> None:
    path = store.tuned_file(GPU)
    store.write(path, GPU, {"items": fit_of(other(H200), False), "workers": fit_of(other(H200_WORKERS))}, {})
    assert store.read(path, GPU, CONSTANTS).constants == Constants(H200, other(H200_WORKERS))


def test_a_write_that_fails_leaves_the_old_file(monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(other(H200_WORKERS))
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="no space left"):
        save(other(H200_WORKERS, 7))
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cost_model": COST_MODEL - 1}, f"its cost_model is {COST_MODEL - 1}, expected {COST_MODEL}"),
        ({"name": "NVIDIA A100"}, "its name is 'NVIDIA A100', expected 'NVIDIA H200'"),
        ({"compute_capability": 80}, "its compute_capability is 80, expected 90"),
        ({"multiprocessors": 16}, "its multiprocessors is 16, expected 132"),
        ({"constants": {}}, "its constants are not those of items or workers"),
        ({"constants": {"threads": {}}}, "its constants are not those of items or workers"),
        ({"constants": [1]}, "its constants are not those of items or workers"),
        ({"constants": {"workers": {"hbm": 1.0}}}, "its constants are not hbm, start, one_group.step"),
        ({"constants": {"items": [1.0]}}, "its constants are not hbm, l2, own_step"),
        *(
            ({"constants": {"items": numbers_of(H200) | {"l2": wrong}}}, f"its l2 is {wrong!r}, expected a positive")
            for wrong in (0.0, -1.0, float("nan"), float("inf"), 10**400, "1", None, True)
        ),
    ],
)
def test_an_outdated_or_wrong_file_is_not_used(change: dict[str, Any], message: str, gpu: Gpu) -> None:
    path = save(other(H200_WORKERS))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | change), encoding="utf-8")
    assert_not_used(path, message)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe", b'{"cost_model": 1}'])
def test_a_corrupt_file_is_not_used(content: bytes, gpu: Gpu) -> None:
    path = save(other(H200_WORKERS))
    path.write_bytes(content)
    assert_not_used(path, "")


def test_a_folder_is_no_file(gpu: Gpu) -> None:
    path = store.tuned_file(GPU)
    path.mkdir(parents=True)
    assert_not_used(path, "")


def assert_not_used(path: Path, message: str) -> None:
    with pytest.warns(UserWarning, match="Run `fasttree-cupy tune` anew, or delete the file") as warned:
        assert constants_of(0) == built_in(GPU.name, GPU.multiprocessors)[0]
    assert len(warned) == 1
    assert str(warned[0].message).startswith(f"{path} is not used: ")
    assert message in str(warned[0].message)
    assert constants_of(0) == CONSTANTS  # read once: no second warning


@pytest.mark.parametrize(
    ("platform", "environment", "expected"),
    [
        ("linux", {"XDG_CACHE_HOME": "caches"}, Path("caches", "fasttree_cupy")),
        ("linux", {"XDG_CACHE_HOME": ""}, Path("home", ".cache", "fasttree_cupy")),
        ("darwin", {}, Path("home", "Library", "Caches", "fasttree_cupy")),
        ("win32", {"LOCALAPPDATA": "local"}, Path("local", "fasttree_cupy")),
        ("win32", {"LOCALAPPDATA": ""}, Path("home", "AppData", "Local", "fasttree_cupy")),
        ("linux", {store.CACHE_VARIABLE: "mine", "XDG_CACHE_HOME": "caches"}, Path("mine")),
    ],
)
def test_cache_folder(
    platform: str, environment: dict[str, str], expected: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(store.CACHE_VARIABLE)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(os.path, "expanduser", lambda _: "home")
    assert store.cache_folder() == expected


# Which constants are used


def test_an_h200_has_its_own_constants() -> None:
    assert built_in("NVIDIA H200", 132) == (CONSTANTS, "built-in, measured on an H200")


@pytest.mark.parametrize(
    ("name", "multiprocessors", "memory", "part"),
    [
        ("NVIDIA H100 80GB HBM3", 132, 3.35 / 4.8, "bandwidth of H100;"),
        ("NVIDIA H100 PCIe", 114, 2.0 / 4.8, "bandwidth of H100 PCIe;"),
        ("NVIDIA H100 NVL", 132, 3.9 / 4.8, "bandwidth of H100 NVL;"),
        ("NVIDIA A100-SXM4-80GB", 108, 2.039 / 4.8, "bandwidth of A100-SXM4-80GB;"),
        ("NVIDIA A100-PCIE-40GB", 108, 1.555 / 4.8, "bandwidth of A100;"),
        ("NVIDIA L4", 58, 58 / 132, "multiprocessors;"),
        ("NVIDIA GH200 480GB", 132, 1.0, "multiprocessors;"),
        ("NVIDIA H200 MIG 1g.18gb", 16, 16 / 132, "multiprocessors;"),
    ],
)
def test_other_gpus_are_scaled(name: str, multiprocessors: int, memory: float, part: str) -> None:
    (items, workers), origin = built_in(name, multiprocessors)
    assert origin == f"built-in, the H200's scaled by {'the published ' * (part[0] == 'b')}{part} not measured"
    assert items.multiprocessors == multiprocessors
    assert items.hbm == pytest.approx(H200.hbm * memory)
    assert items.l2 == pytest.approx(H200.l2 * multiprocessors / 132)
    assert workers.hbm == pytest.approx(H200_WORKERS.hbm * memory)
    assert workers._replace(hbm=0) == H200_WORKERS._replace(hbm=0)


def test_plans_use_the_tuned_constants(gpu: Gpu) -> None:
    """Constants by which one kind of plan costs nothing like the other."""
    tree = ft.KVTree.from_levels([1, 16, 64], [256, 64, 32])
    slow = H200_WORKERS.one_group._replace(step=1e3, apart_step=1e3, item=1e3)
    for row_groups, other_one in ((1, "two_groups"), (2, "one_group")):
        save(H200_WORKERS._replace(**{other_one: slow}))
        chosen.cache_clear()
        made = make_schedule(32, 8, 128, "cuda:0", tree, None)
        assert isinstance(made, BalancedSchedule)
        assert made.row_groups == row_groups


def test_another_gpus_file_is_not_looked_at(gpu: Gpu) -> None:
    store.write(store.tuned_file(GPU._replace(name="NVIDIA H100")), GPU, {"workers": fit_of(other(H200_WORKERS))}, {})
    assert chosen(0)[:2] == (CONSTANTS, "built-in, measured on an H200")


# Measuring


class PaperTimer:
    """Times that the cost model says, of a machine of other speeds."""

    asked = 0

    def __init__(self, device: int, repeats: int) -> None:
        pass

    def times_us(self, problem: Problem, schedules: Sequence[Any]) -> list[float]:
        PaperTimer.asked += len(schedules)
        kind = (
            item_samples if isinstance(schedules[0], SubtreeSchedule) else partial(worker_samples, multiprocessors=132)
        )
        machine = H200 if kind is item_samples else H200_WORKERS
        return [each.estimate_us(other(machine)) for each in kind(problem, machine=machine)]


@pytest.mark.parametrize(("capability", "fields"), [(90, ["items", "workers"]), (80, ["items"])])
def test_tuning_fits_the_planners_that_serve_the_gpu(
    capability: int, fields: list[str], gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda _: capability)
    monkeypatch.setattr(measure.streams, "use_device", lambda _: nullcontext())
    monkeypatch.setattr(measure, "Timer", PaperTimer)
    monkeypatch.setattr(PaperTimer, "asked", 0)
    fits = measure.tune(0, CONSTANTS, quick=True)
    assert list(fits) == fields
    assert sum(each.samples for each in fits.values()) == PaperTimer.asked
    for each in fits.values():
        assert each.accepted
        assert each.errors[1] < 0.02 < each.errors[0]


def test_a_plan_is_made_where_every_estimate_is_infinite() -> None:
    machine = H200_WORKERS._replace(hbm=1e-80)
    made = balanced.plan(ft.KVTree.from_levels([1, 9], [300, 40]), 4, 2, 128, 132, machine)
    assert made.items[:, 3].sum() > 0


def test_a_gpu_without_a_cost_model_is_not_tuned(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "compute_capability", lambda _: 75)
    with pytest.raises(ValueError, match=r"there is nothing to tune: compute capability 7\.5 has no"):
        measure.tune(0, CONSTANTS)


# The command


@pytest.mark.parametrize("arguments", [[], ["--show"], ["--quick"]])
def test_without_a_gpu(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    if gpu_problem() is None:
        pytest.skip("a GPU is usable here")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["tune", *arguments])
    assert stopped.value.code == 2
    assert "device is 'cuda', but " in capsys.readouterr().err


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch, gpu: Gpu) -> dict[str, Fit[Any]]:
    """What a measurement would give."""
    fits = {"items": fit_of(H200, False), "workers": fit_of(other(H200_WORKERS))}
    monkeypatch.setattr(cli, "resolve_device", lambda _: "cuda:0")
    monkeypatch.setattr(cli, "driver_version", lambda: "12.8")
    monkeypatch.setattr(cli, "tune", lambda device, start, quick: fits)
    return fits


def test_the_command_writes_what_plans_then_use(fits: dict[str, Fit[Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert constants_of(0).workers == H200_WORKERS
    assert cli.main(["tune"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"items: loss by choice +3.0% +1.0% +not better than the built-in constants", printed)
    assert re.search(r"workers: error +20.0% +5.0% +root mean square, of 100 times", printed)
    assert str(store.tuned_file(GPU)) in printed
    assert constants_of(0) == Constants(H200, fits["workers"].machine)
    assert cli.main(["tune", "--show"]) == 0
    printed = capsys.readouterr().out
    assert "tuned on 20" in printed
    assert f"{fits['workers'].machine.merge_piece:.3g}" in printed


def test_the_command_writes_elsewhere(
    fits: dict[str, Fit[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "mine.json"
    assert cli.main(["tune", "--output", str(path), "--quick"]) == 0
    assert str(path) in capsys.readouterr().out
    assert store.read(path, GPU, CONSTANTS).constants.workers == fits["workers"].machine
    assert constants_of(0).workers == H200_WORKERS


@pytest.mark.parametrize("output", ["", ".", "/dev/null/constants.json"])
def test_where_nothing_can_be_written_nothing_is_measured(
    output: str, gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "tune", lambda *_: pytest.fail("it was measured"))
    monkeypatch.setattr(cli, "resolve_device", lambda _: "cuda:0")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--output", output])
    assert "expected a file in a folder that can be written to" in capsys.readouterr().err


def test_show_stands_alone(gpu: Gpu, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cli, "resolve_device", lambda _: "cuda:0")
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", "--show", "--quick"])
    assert "expected it alone" in capsys.readouterr().err


def test_the_command_writes_nothing_where_nothing_is_better(
    fits: dict[str, Fit[Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fits["workers"] = fit_of(H200_WORKERS, False)
    assert cli.main(["tune"]) == 0
    assert "no file, as nothing is better" in capsys.readouterr().out
    assert not folder.exists()


@pytest.mark.gpu
def test_tuning_on_the_gpu(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if cuda.compute_capability(0) < 80:
        pytest.skip("no planner with a cost model serves this GPU")
    path = folder / "tuned.json"
    assert cli.main(["tune", "--quick", "--output", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "items: error" in printed
    if path.exists():  # else nothing was better than what is built in
        this = gpu_of(0)
        start, _ = built_in(this.name, this.multiprocessors)
        tuned = store.read(path, this, start).constants
        for before, after in zip(start, tuned, strict=True):
            assert 1 < numbers_of(after)["start"] < 50
            assert 0.05 < numbers_of(after)["hbm"] / numbers_of(before)["hbm"] < 20
        path.rename(store.tuned_file(this))
        assert chosen(0).origin.startswith("tuned on")
    tree = ft.KVTree.from_levels([1, 3, 40], [130, 33, 17])
    q, _, _, _, k, v, _ = ft.qkv_preparation(tree, 8, 2, 128, "cuda", "float16")
    out = ft.plan_decode(tree, 8, 2, 128, device="cuda").run(q, k, v)
    inputs = [array.get().astype(np.float32) for array in (q, k, v)]
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, 128**-0.5)
    assert_close(out.get(), expected, np.float16)
