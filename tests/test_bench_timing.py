"""The timing loop, on a CuPy of paper: what is flushed, in which order the contestants run, what is counted."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from bench import timing
from bench.device import PROBES


class Stream:
    """A GPU that does what it is told at once, and a clock that counts microseconds of work."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def work(self, what: str, us: float) -> None:
        self.log.append(what)
        self.now += us

    def synchronize(self) -> None:
        self.log.append("wait")


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()

    class Event:
        time = 0.0

        def record(self) -> None:
            self.time = stream.now

        def synchronize(self) -> None:
            pass

    class Buffer:
        def fill(self, value: int) -> None:
            stream.work("flush", 100.0)

    cupy: Any = types.ModuleType("cupy")
    cupy.uint8 = "uint8"
    cupy.empty = lambda size, dtype: Buffer()
    cupy.cuda = types.SimpleNamespace(
        Event=Event,
        get_current_stream=lambda: stream,
        get_elapsed_time=lambda start, stop: (stop.time - start.time) / 1000,
    )
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    return stream


def test_every_run_is_flushed_and_rounds_are_interleaved(stream: Stream) -> None:
    runs = {"a": lambda: stream.work("a", 10.0), "b": lambda: stream.work("b", 30.0)}
    times = timing.time_cold(runs, repeats=4)
    assert times["a"]["median_us"] == pytest.approx(10)  # no flush is inside the events
    assert times["b"]["median_us"] == pytest.approx(30)
    rounds = " ".join(stream.log).split(" wait")
    order = [[what for what in part.split() if what != "flush"] for part in rounds if part]
    assert order == [["a", "b"]] * (4 + timing.WARM_UP_ROUNDS)
    for before, what in zip(stream.log, stream.log[1:], strict=False):
        assert what not in runs or before == "flush"


def test_a_run_that_is_slow_to_queue_gets_a_longer_head_start(stream: Stream, monkeypatch: pytest.MonkeyPatch) -> None:
    host = iter(i * 1e-3 for i in range(100))  # a run takes the host a millisecond, a flush the GPU 0.1
    monkeypatch.setattr("bench.timing.time.perf_counter", lambda: next(host))
    times = timing.time_cold({"a": lambda: stream.work("a", 10.0)}, repeats=3)
    assert times["a"]["host_us"] == pytest.approx(1000)
    last = stream.log[: len(stream.log) - 1]
    flushes = len(last) - 1 - max(i for i, what in enumerate(last[:-1]) if what == "wait") - 1
    assert 15 <= flushes <= 17


def test_spread() -> None:
    spread = timing.summarise([float(us) for us in range(11)])
    assert spread == {"median_us": 5, "p10_us": 1, "p90_us": 9}


@pytest.mark.parametrize("arch", ["sm_70", "sm_90"])
def test_the_probes_compile(cupy: Any, arch: str) -> None:
    nvrtc = cupy.cuda.nvrtc
    try:
        program = nvrtc.createProgram(PROBES.read_text(encoding="utf-8"), PROBES.name, [], [])
    except RuntimeError as error:
        pytest.skip(f"NVRTC is not there: {error}")
    try:
        nvrtc.compileProgram(program, [f"-arch={arch}"])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)
