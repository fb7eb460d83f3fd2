"""Runs that repeat the last one: launched alike, and never where something but the addresses has changed."""

from __future__ import annotations

import ctypes
import gc
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import fasttree_cupy as ft
from fasttree_cupy.execution import arrays, cuda, plan_kernels, streams, turns
from fasttree_cupy.execution.arrays import address_of_alike
from fasttree_cupy.execution.launch import Launch, Relaunch
from fasttree_cupy.execution.plan_memory import MemoryNeeds
from fasttree_cupy.execution.schedule import BalancedSchedule
from fasttree_cupy.planning.machine import H200, H200_WORKERS, Constants
from tests.test_serving import namespace, random_arrays

LAYOUT = (8, 2, 64)
TREE = ft.KVTree.from_levels([1, 4], [40, 9])
CUT = ft.KVTree.from_levels([1, 4], [9000, 9])
"""Its plan needs a workspace."""


class FakeCuda:
    """A GPU whose kernels do nothing; torch's CPU tensors lie on it, those of its meta device on another one.

    Attributes
    ----------
    stream, context : int
        The current ones.
    launches : list of (str, int, array)
        How ("anew" or "again"), the stream and the parameters.
    waits : list of int
        Streams that waited for an event.
    """

    def __init__(self, cupy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.context = 0, 0xC0
        self.launches: list[tuple[str, int, Any]] = []
        self.waits: list[int] = []
        self.kernel = SimpleNamespace(ptr=0xF0)
        driver = cupy.cuda.driver
        fakes: list[tuple[Any, str, Any]] = [
            (driver, "ctxGetCurrent", lambda: self.context),
            (driver, "launchKernel", self.launch_again),
            (cupy.cuda.runtime, "setDevice", lambda _device: None),
            (streams, "current_stream_of", lambda _framework: lambda _device: self.stream),
            (streams, "use_device", lambda _device: nullcontext()),
            (streams, "is_capturing", lambda _stream: False),
            (streams, "record_event", lambda _stream, event=None: event or SimpleNamespace(done=True)),
            (streams, "wait_for", lambda _stream, _event: None),
            (cuda, "compute_capability", lambda _device: 90),
            (cuda, "multiprocessors", lambda _device: 132),
            (plan_kernels, "worker_launch", lambda *_: Launch(self, (384, 1, 1), 1024)),
            (arrays, "_torch_device", lambda tensor: ("cuda", int(tensor.is_meta))),
            (MemoryNeeds, "_new_workspace", lambda needs, _: np.zeros(needs.workspace_bytes + 16, np.uint8)),
        ]
        for place, name, fake in fakes:
            monkeypatch.setattr(place, name, fake)
        monkeypatch.setattr("fasttree_cupy.execution.turns.wait_for", lambda stream, _: self.waits.append(stream))
        monkeypatch.setattr("fasttree_cupy.execution.turns.record_event", streams.record_event)
        monkeypatch.setattr("fasttree_cupy.execution.plan_memory.upload", lambda made, *_: list(made))
        monkeypatch.setattr("fasttree_cupy.execution.plan_memory.clear", lambda _counters, _stream: None)
        monkeypatch.setattr("fasttree_cupy.plan.resolve_device", lambda _: "cuda:0")
        monkeypatch.setattr("fasttree_cupy.plan.constants_of", lambda _: Constants(H200, H200_WORKERS))

    def __call__(self, grid: Any, block: Any, params: Any, shared_mem: int) -> None:
        """Launch as a RawKernel."""
        assert (grid[1:], block, shared_mem) == ((1, 1), (384, 1, 1), 1024)
        self.seen("anew", self.stream, params[0].tobytes())

    def launch_again(self, function: int, *numbers: int) -> None:
        """Launch as the driver does."""
        *shape, shared_bytes, stream, parameters, extra = numbers
        assert (function, shape[1:], shared_bytes, extra) == (0xF0, [1, 1, 384, 1, 1], 1024, 0)
        (struct,) = (ctypes.c_uint64 * 1).from_address(parameters)
        self.seen("again", stream, ctypes.string_at(struct, plan_kernels.WORK_PARAMS.itemsize))

    def seen(self, how: str, stream: int, params: bytes) -> None:
        self.launches.append((how, stream, np.frombuffer(params, plan_kernels.WORK_PARAMS)[0]))

    @property
    def hows(self) -> list[str]:
        return [how for how, _, _ in self.launches]


@pytest.fixture
def gpu(cupy: Any, monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(cupy, monkeypatch)


@pytest.fixture
def pending(gpu: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The event behind all that is queued, which has not passed yet."""
    event = SimpleNamespace(done=False)
    for place in (streams, turns):
        monkeypatch.setattr(place, "record_event", lambda _stream, _event=None: event)
    return event


def passes(event: SimpleNamespace) -> None:
    """Let an event pass, and what was held for it go."""
    event.done = True
    streams.keep_alive(event, [])


def tensors(torch: Any, tree: ft.KVTree = TREE) -> dict[str, Any]:
    heads, kv_heads, head_dim = LAYOUT
    q_shape, kv_shape = (tree.batch_size, heads, head_dim), (tree.unique_tokens, kv_heads, head_dim)
    shapes = {"q": q_shape, "k": kv_shape, "v": kv_shape, "out": q_shape}
    return {name: torch.zeros(shape, dtype=torch.float16) for name, shape in shapes.items()}


@pytest.mark.parametrize("tree", [TREE, CUT], ids=["no workspace", "workspace"])
def test_other_addresses_are_all_that_changes(tree: ft.KVTree, gpu: FakeCuda, torch: Any) -> None:
    plan = ft.plan_decode(tree, *LAYOUT)
    assert (plan.workspace_bytes > 0) == (tree is CUT)
    first, second = tensors(torch, tree), tensors(torch, tree)
    plan.run(**first)
    assert plan.run(**second) is second["out"]
    plan.run(**second, stream=0)  # what names its stream is checked and launched anew
    assert gpu.hows == ["anew", "again", "anew"]
    made = [params for _, _, params in gpu.launches]
    assert made[1] == made[2] != made[0]
    assert [int(made[1][name]) for name in ("q", "k", "v", "o")] == [array.data_ptr() for array in second.values()]


def test_repeats_go_to_the_current_stream_in_turn(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    for gpu.stream in (0, 0, 6, 5, 5, 0):
        plan.run(**given)
    assert [stream for _, stream, _ in gpu.launches] == [0, 0, 6, 5, 5, 0]
    assert gpu.hows == ["anew"] + ["again"] * 5
    assert gpu.waits == [6, 5, 5, 0]


@pytest.mark.parametrize("tree", [TREE, CUT], ids=["no workspace", "workspace"])
def test_a_dropped_plans_memory_is_held_for_another_stream(
    tree: ft.KVTree, gpu: FakeCuda, pending: SimpleNamespace, torch: Any
) -> None:
    plan, given = ft.plan_decode(tree, *LAYOUT), tensors(torch, tree)
    for gpu.stream in (0, 5, 5):
        plan.run(**given)
    memory = weakref.ref(plan.memory)
    del plan
    gc.collect()
    assert memory() is not None
    passes(pending)
    assert memory() is None


def test_memory_is_held_for_another_stream_when_the_plan_is_placed_anew(
    gpu: FakeCuda, pending: SimpleNamespace, torch: Any
) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    gpu.stream = 5
    plan.run(**given)
    before = weakref.ref(plan.memory)
    plan.place()
    gc.collect()
    assert before() is not None
    passes(pending)
    assert before() is None


@pytest.mark.parametrize("captured", [False, True])
def test_arrays_are_held_for_a_stream_that_is_not_captured(
    captured: bool, gpu: FakeCuda, pending: SimpleNamespace, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "is_capturing", lambda _stream: captured)
    monkeypatch.setattr(streams, "use_stream", lambda *_: nullcontext())
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    plan.run(**given, stream=5)
    q = weakref.ref(given["q"])
    del given
    gc.collect()
    assert (q() is None) == captured
    passes(pending)
    assert q() is None


@pytest.mark.parametrize("tree", [TREE, CUT], ids=["no workspace", "workspace"])
def test_a_memory_that_another_thread_lets_go_of_before_the_launch_is_held(
    tree: ft.KVTree, gpu: FakeCuda, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, given = ft.plan_decode(tree, *LAYOUT), tensors(torch, tree)
    ready, event = plan._ready, SimpleNamespace(done=False)

    def place_meanwhile(work: Any) -> Any:
        made = ready(work)
        plan.place()
        return made

    gpu.stream = 5
    before = weakref.ref(plan.memory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "_ready", place_meanwhile)
        patch.setattr(streams, "record_event", lambda _stream, _event=None: event)
        plan.run(**given)
    plan.run(**given)
    assert plan.memory is not before()
    assert before() is not None
    passes(event)
    assert before() is None


class Recorded:
    """An event of a GPU that is always one run behind; `record` moves it on, as CUDA does."""

    def __init__(self, gpu: FakeCuda) -> None:
        self.gpu, self.runs = gpu, 0

    @property
    def done(self) -> bool:
        return self.runs < len(self.gpu.launches)

    @classmethod
    def record(cls, gpu: FakeCuda, event: Recorded | None) -> Recorded:
        event = event or cls(gpu)
        event.runs = len(gpu.launches)
        return event


@pytest.mark.parametrize("tree", [TREE, CUT], ids=["no workspace", "workspace"])
def test_memories_do_not_pile_up_where_the_gpu_is_one_run_behind(
    tree: ft.KVTree, gpu: FakeCuda, torch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for place in (streams, turns):
        monkeypatch.setattr(place, "record_event", lambda _stream, event=None: Recorded.record(gpu, event))
    monkeypatch.setattr(streams, "_in_use", deque())  # what stays in it at the end is never done
    plan, given = ft.plan_decode(tree, *LAYOUT), tensors(torch, tree)
    memories = []
    for _ in range(50):
        gpu.stream = 0
        plan.place()
        memories.append(weakref.ref(plan.memory))
        gpu.stream = 5
        plan.run(**given)
    assert sum(memory() is not None for memory in memories) <= 3


def test_a_dropped_plans_memory_is_not_held_for_its_own_stream(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    plan.run(**given)
    memory = weakref.ref(plan.memory)
    del plan
    gc.collect()
    assert memory() is None


def test_memory_is_given_back_when_the_plan_is_placed_anew(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    plan.run(**given)
    before = weakref.ref(plan.memory)
    plan.place()
    gc.collect()
    assert before() is None


def test_placing_takes_its_turn_among_runs(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    gpu.stream = 6
    plan.run(**given)
    gpu.stream = 0
    plan.place()
    gpu.stream = 6
    plan.run(**given)
    assert gpu.waits == [6, 0, 6]


def resized(array: Any, *shape: int) -> Any:
    """The same tensor, changed in place."""
    return array.resize_(shape)


Change = Callable[[Any, Any], Any]
REFUSED: list[Any] = [
    ("q", lambda q, torch: resized(q, 3, 8, 64), ValueError, r"q has shape \(3, 8, 64\)"),
    ("k", lambda k, torch: k[:-1], ValueError, "v has shape"),
    ("v", lambda v, torch: v.to(torch.bfloat16), TypeError, "v has dtype bfloat16"),
    ("v", lambda v, torch: v.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "v has strides"),
    ("k", lambda k, torch: torch.zeros(k.numel() + 1, dtype=k.dtype)[1:].view(k.shape), ValueError, "multiple of 16"),
    ("q", lambda q, torch: q.to("meta"), ValueError, r"q has device \('cuda', 1\)"),
    ("v", lambda v, torch: v.to("meta"), ValueError, r"v has device \('cuda', 1\)"),
    ("q", lambda q, torch: q.requires_grad_(), TypeError, "q: the tensor requires grad"),
    ("k", lambda k, torch: torch._neg_view(k), TypeError, "k: the tensor is negated"),
    ("out", lambda out, torch: out.to_sparse(), TypeError, "out: a dense tensor is needed"),
    ("out", lambda out, torch: out[:, :1].expand(-1, 8, -1), ValueError, "out has strides"),
    ("out", lambda out, torch: out.tolist(), TypeError, "out: expected an array"),
    ("sm_scale", lambda _, torch: True, TypeError, "sm_scale is True"),
    ("sm_scale", lambda _, torch: float("nan"), ValueError, "sm_scale is nan"),
    ("logit_cap", lambda _, torch: "2", TypeError, "logit_cap is '2'"),
    ("k_scale", lambda _, torch: 0.5, ValueError, "k_scale is given"),
]


@pytest.mark.parametrize(("name", "change", "error", "message"), REFUSED)
def test_what_does_not_fit_is_refused_after_a_run_that_did(
    name: str, change: Change, error: type[Exception], message: str, gpu: FakeCuda, torch: Any
) -> None:
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    plan.run(**given, sm_scale=1.0)
    plan.run(**given, sm_scale=1.0)
    given = {"sm_scale": 1.0, **given}
    given[name] = change(given.get(name), torch)
    with pytest.raises(error, match=message):
        plan.run(**given)
    assert gpu.hows == ["anew", "again"]


ACCEPTED: list[Any] = [
    ("q", lambda q, torch: torch.zeros(4, 8, 72, dtype=q.dtype)[..., :64], "q_head", 72),
    ("k", lambda k, torch: torch.zeros(2, len(k), 64, dtype=k.dtype).transpose(0, 1), "k_token", 64),
    ("out", lambda out, torch: torch.zeros(out.numel() + 4, dtype=out.dtype)[4:].view(out.shape), "o_aligned", 0),
    ("out", lambda out, torch: torch.nn.Parameter(out, requires_grad=False), "o_head", 64),
    ("sm_scale", lambda _, torch: 2.0, "sm_scale", 2.0),
    ("logit_cap", lambda _, torch: 30.0, "logit_cap", 30.0),
]


@pytest.mark.parametrize(("name", "change", "field", "value"), ACCEPTED)
def test_what_fits_in_another_layout_is_launched_anew(
    name: str, change: Change, field: str, value: float, gpu: FakeCuda, torch: Any
) -> None:
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    plan.run(**given)
    given[name] = change(given.get(name), torch)
    plan.run(**given)
    assert gpu.hows == ["anew", "anew"]
    assert gpu.launches[1][2][field] == value


def test_another_place_or_context_is_launched_anew(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    plan.run(**given)
    plan.place(torch.zeros(plan.workspace_bytes, dtype=torch.uint8))
    plan.run(**given)
    gpu.context = 0  # that of a thread which has not used CUDA
    plan.run(**given)
    assert gpu.hows == ["anew"] * 3
    places = [int(params["mid_o"]) for _, _, params in gpu.launches]
    assert places[0] != places[1] == places[2]


def test_a_run_of_another_thread_in_memory_of_before_is_not_repeated(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(CUT, *LAYOUT), tensors(torch, CUT)
    plan.run(**given)
    last = plan._last
    plan.place()
    plan._last = last  # as the other thread leaves it where its run was queued before
    plan.run(**given)
    assert gpu.hows == ["anew", "anew"]


def test_an_aligned_output_after_one_that_is_not(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    out = given["out"]
    plan.run(**given | {"out": torch.zeros(out.numel() + 4, dtype=out.dtype)[4:].view(out.shape)})
    plan.run(**given)
    assert [int(params["o_aligned"]) for _, _, params in gpu.launches] == [0, 1]


def test_rows_that_a_plan_came_to_need_are_asked_for(gpu: FakeCuda, torch: Any) -> None:
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    for _ in range(2):
        plan.run(**given)
    plan.num_tokens += 1  # as append does
    with pytest.raises(ValueError, match=r"k has shape \(76, 2, 64\), expected \(77, 2, 64\)"):
        plan.run(**given)
    assert gpu.hows == ["anew", "again"]


def test_rows_of_a_pool_that_are_still_enough_are_not_asked_for_anew(gpu: FakeCuda, torch: Any) -> None:
    given = tensors(torch)
    rows = len(given["k"])
    plan = ft.plan_decode(TREE, *LAYOUT, kv_indices=np.arange(TREE.unique_tokens))
    given |= {name: torch.cat([given[name], given[name][:1]]) for name in ("k", "v")}
    plan.run(**given)
    plan.num_tokens = rows + 1  # as append does, each step of a decode loop
    plan.run(**given)
    assert gpu.hows == ["anew", "again"]
    plan.num_tokens += 1
    with pytest.raises(ValueError, match=f"k has {rows + 1} rows, expected {rows + 2} at least"):
        plan.run(**given)


def test_rows_that_another_thread_came_to_need_are_asked_for_in_turn(gpu: FakeCuda, torch: Any) -> None:
    given = tensors(torch)
    rows = len(given["k"])
    plan = ft.plan_decode(TREE, *LAYOUT, kv_indices=np.arange(TREE.unique_tokens))
    plan.run(**given)

    def append_meanwhile(framework: str) -> Any:
        plan.num_tokens = rows + 1
        return current(framework)

    current = streams.current_stream_of
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "current_stream_of", append_meanwhile)
        with pytest.raises(ValueError, match=f"k has {rows} rows, expected {rows + 1} at least"):
            plan.run(**given)
    assert gpu.hows == ["anew"]


def test_what_makes_arrays_is_launched_anew(gpu: FakeCuda, torch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrays, "empty", lambda shape, dtype, _: torch.empty(shape, dtype=getattr(torch, dtype)))
    plan, given = ft.plan_decode(TREE, *LAYOUT), tensors(torch)
    plan.run(**given)
    out, lse = plan.run(**given, return_lse=True)
    assert out is given["out"]
    assert int(gpu.launches[1][2]["lse"]) == lse.data_ptr()
    plan.run(**given)
    del given["out"]
    made = plan.run(**given)
    assert [int(params["lse"]) for _, _, params in gpu.launches[2:]] == [0, 0]
    assert int(gpu.launches[3][2]["o"]) == made.data_ptr()
    assert set(gpu.hows) == {"anew"}


def test_a_capsules_array_is_looked_at_anew() -> None:
    assert address_of_alike(np.zeros((2, 3), np.float16)) is None


def test_a_tensor_alike_may_change_in_place(torch: Any) -> None:
    tensor = torch.zeros(4, 8, dtype=torch.float16)
    address = address_of_alike(tensor)
    assert address is not None
    assert address(tensor) == tensor.data_ptr()
    assert address(np.zeros((4, 8), np.float16)) is None
    tensor.data = torch.ones(4, 8, dtype=torch.float16)
    assert address(tensor) == tensor.data_ptr()
    tensor.t_()
    assert address(tensor) is None
    tensor.t_()
    tensor.resize_(2, 8)
    assert address(tensor) is None


def gpu_arrays(framework: str, count: int, request: pytest.FixtureRequest) -> list[list[Any]]:
    """Q, K and V, several of each, on the GPU."""
    cupy = namespace("gpu")
    _, k, v = random_arrays(CUT, (*LAYOUT, "float16"), CUT.unique_tokens)
    rng = np.random.default_rng(3)
    made = []
    for _ in range(count):
        q = rng.standard_normal((CUT.batch_size, LAYOUT[0], LAYOUT[2])).astype(np.float16)
        made.append([cupy.asarray(array) for array in (q, k, v)])
        v = v[::-1].copy()
    if framework == "cupy":
        return made
    torch = request.getfixturevalue("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    return [[torch.from_dlpack(array) for array in each] for each in made]


def bits(array: Any) -> Any:
    """What an array on the GPU holds, on the CPU."""
    return (array.get() if hasattr(array, "get") else array.cpu().numpy()).view(np.uint16)


@pytest.mark.gpu
@pytest.mark.parametrize("framework", ["cupy", "torch"])
@pytest.mark.parametrize("where", ["same", "new thread", "another stream"])
def test_repeats_compute_what_first_runs_do(
    where: str, framework: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    cupy = namespace("gpu")
    again: list[int] = []
    relaunch = Relaunch.__call__

    def counted(launch: Relaunch, addresses: Any, stream: streams.WorkStream) -> None:
        again.append(stream.handle)
        relaunch(launch, addresses, stream)

    monkeypatch.setattr(Relaunch, "__call__", counted)
    plan = ft.plan_decode(CUT, *LAYOUT, device="cuda")
    given = gpu_arrays(framework, 3, request)
    expected = [plan.run(*each) for each in given]  # without an output: no repeats
    like = expected[0]
    outs = [like.clone() if framework == "torch" else like.copy() for _ in range(12)]
    for out in outs:
        out.fill_(np.nan) if framework == "torch" else out.fill(np.nan)
    cupy.cuda.Device().synchronize()

    def work() -> None:
        for i, out in enumerate(outs):
            plan.run(*given[i % 3], out)

    stream = cupy.cuda.Stream(non_blocking=True)
    if where == "same":
        work()
    elif where == "new thread":
        plan.run(*given[0], outs[0])
        with ThreadPoolExecutor(1) as pool:
            pool.submit(work).result()
    elif framework == "cupy":
        with stream:
            work()
    else:
        torch = request.getfixturevalue("torch")
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            work()
    cupy.cuda.Device().synchronize()
    for i, out in enumerate(outs):
        np.testing.assert_array_equal(bits(out), bits(expected[i % 3]))
    if BalancedSchedule.problem("cuda:0", LAYOUT[0] // LAYOUT[1], LAYOUT[2]) is None:
        assert len(again) >= len(outs) - 2  # the first run is anew, and a new thread's first too


@pytest.mark.gpu
def test_a_pool_that_became_too_small_is_refused(cupy: Any) -> None:
    capacity = ft.Capacity(requests=8, tokens=TREE.unique_tokens + 64)
    plan = ft.plan_decode(TREE, *LAYOUT, device="cuda", capacity=capacity)
    pool = cupy.zeros((TREE.unique_tokens, *LAYOUT[1:]), np.float16)
    q = cupy.zeros((8, LAYOUT[0], LAYOUT[2]), np.float16)
    out = cupy.zeros_like(q)
    for _ in range(2):
        plan.run(q, pool, pool, out)
    plan.append(TREE.unique_tokens + np.arange(TREE.batch_size))
    with pytest.raises(ValueError, match=f"k has {TREE.unique_tokens} rows"):
        plan.run(q, pool, pool, out)
