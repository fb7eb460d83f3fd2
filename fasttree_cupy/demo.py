"""The demo: prepare and decode a tree in both ways, and compare time and result with dense attention."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from fasttree_cupy.decode import fasttree_decode
from fasttree_cupy.execution import cuda, streams
from fasttree_cupy.execution.arrays import DTYPES
from fasttree_cupy.execution.device import resolve_device
from fasttree_cupy.execution.kernels import MMA_COMPUTE_CAPABILITY
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.params import PRESETS, FastTreeParams, GpuPreset
from fasttree_cupy.plan import plan_decode
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree

__all__ = ["ERROR_BOUNDS", "DemoResult", "Timing", "device_index", "device_name", "run_demo", "stage1_kernel"]

ERROR_BOUNDS = {"float16": 5e-4, "bfloat16": 4e-3}
"""Relative Frobenius errors that a right result stays below; rounding it costs about half of them."""
MOST_SECONDS = 2.0
"""Repetitions on the CPU stop after this time."""
CHECKED_PRODUCTS = 2**29
"""Products of Q with K that the float64 check makes at most: a few seconds' work on a core."""
FLUSH_BYTES, FLUSHES = 2**29, 4
"""Written before each timed run on a GPU: several times the largest L2, and so often that the host, which meanwhile
queues the run, is done first: the time between the events is the GPU's."""

Array = npt.NDArray[Any]


class Timing(NamedTuple):
    """Seconds of the first call, and the median of the `runs` calls after it."""

    first: float
    median: float
    runs: int


@dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes
    ----------
    device : str
        Where it ran, in words.
    kernel : str
        Stage-1 kernel of `fasttree_decode`: "cpu", "mma" or "plain".
    num_nodes, num_requests : int
    unique_tokens, summed_tokens : int
        Tokens stored, and the sum over requests of the tokens that each attends to.
    vnodes : list of 2 int
        Vnodes of each phase.
    q_tile_sizes, kv_tile_sizes : list of 2 int
        Tile sizes that preparation adopted.
    preparation, decode : Timing
        Of `fasttree_preparation` and `fasttree_decode`.
    planning, run : Timing
        Of `plan_decode` and of its plan's `run`.
    dense : Timing
        Of dense attention: `fasttree_decode` of a plan in which every request reads its whole path by itself.
    checked_requests : int
        Requests compared with dense attention in float64.
    error, error_bound : float
        Relative Frobenius error of those requests, the larger of decode's and run's, and what it has to stay below.
    """

    device: str
    kernel: str
    num_nodes: int
    num_requests: int
    unique_tokens: int
    summed_tokens: int
    vnodes: list[int]
    q_tile_sizes: list[int]
    kv_tile_sizes: list[int]
    preparation: Timing
    decode: Timing
    planning: Timing
    run: Timing
    dense: Timing
    checked_requests: int
    error: float
    error_bound: float

    @property
    def sharing_factor(self) -> float:
        """How often a stored token is used, on average; 1 where there is none."""
        return self.summed_tokens / self.unique_tokens if self.unique_tokens else 1.0

    @property
    def speed_ups(self) -> list[float]:
        """Time of dense attention over that of decode, and over that of run."""
        return [self.dense.median / timing.median for timing in (self.decode, self.run)]

    @property
    def passed(self) -> bool:
        """Whether the error is below its bound; NaN is not."""
        return self.error < self.error_bound


def run_demo(
    tree: KVTree,
    *,
    num_qo_heads: int = 32,
    num_kv_heads: int = 8,
    head_dim: int = 128,
    dtype: str = "float16",
    device: str | None = None,
    kernel: str = "auto",
    seed: int = 0,
    repeat: int = 5,
) -> DemoResult:
    """Prepare and decode a tree in both ways, with random Q, K and V; compare time and result with dense attention.

    Parameters
    ----------
    tree : KVTree
    num_qo_heads, num_kv_heads, head_dim : int
        As for `fasttree_preparation`.
    dtype : {"float16", "bfloat16"}
    device : str, optional
        "cpu", "cuda" or "cuda:<n>"; by default the GPU where one is usable.
    kernel : {"auto", "mma", "plain"}
        Stage-1 kernel on a GPU; "auto" on the CPU.
    seed : int
        Seed of Q, K and V.
    repeat : int
        Timed runs.

    Raises
    ------
    ValueError
        An argument is wrong, or no GPU is usable where one was asked for.
    """
    place = resolve_device(device)
    if place == "cpu" and kernel != "auto":
        raise ValueError(f"kernel is {kernel!r}, but the work runs on the CPU, which has a kernel of its own")
    heads = num_qo_heads, num_kv_heads, head_dim
    with current_device(place):
        (metadata, params), preparation = time_on_cpu(lambda: prepare(tree, heads, place), repeat)
        plan, planning = time_on_cpu(lambda: plan_decode(tree, *heads, device=place), repeat)
        unshared = prepare(tree, heads, place, shared=False)
        q, k, v = random_inputs(tree, heads, DTYPES[dtype], seed)
        nothing = np.full_like(q, np.nan)  # what a decode does not write is seen
        *inputs, o, o_run, o_dense = (placed(array, place) for array in (q, k, v, nothing, nothing.copy(), q.copy()))
        _, decode = clock(place)(lambda: decode_into([*inputs, o], metadata, params, kernel), repeat)
        _, run = clock(place)(lambda: plan.run(*inputs, o_run), repeat)
        _, dense = clock(place)(lambda: decode_into([*inputs, o_dense], *unshared, kernel), repeat)
        outputs = [on_host(array) for array in (o, o_run)]
    checked = checked_requests(tree, num_qo_heads * head_dim)
    return DemoResult(
        device=device_name(place),
        kernel=stage1_kernel(place, kernel),
        num_nodes=tree.num_nodes,
        num_requests=tree.batch_size,
        unique_tokens=tree.unique_tokens,
        summed_tokens=int(tree.path_tokens.sum()),
        vnodes=list(metadata.phase_node_nums),
        q_tile_sizes=params.TSQs,
        kv_tile_sizes=params.TSKs,
        preparation=preparation,
        decode=decode,
        planning=planning,
        run=run,
        dense=dense,
        checked_requests=len(checked),
        error=relative_error(outputs, (q, k, v), tree, checked),
        error_bound=ERROR_BOUNDS[dtype],
    )


def prepare(
    tree: KVTree, heads: tuple[int, int, int], place: str, shared: bool = True
) -> tuple[MetadataTuple, FastTreeParams]:
    """Metadata and adopted tile sizes; with `shared` False every request reads its whole path by itself."""
    num_qo_heads, num_kv_heads, _ = heads
    preset = preset_for(place)
    # Too few KV heads are for preparation to refuse, which names them.
    params = FastTreeParams.for_gpu(preset.name, max(1, num_qo_heads // max(1, num_kv_heads)))
    if not shared:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "gamma is 10", UserWarning)
            params.set_values(alpha=0, beta=0, gamma=10)
    metadata, _ = fasttree_preparation(
        tree,
        tree.kv_ptrs,
        tree.batch_size,
        *heads,
        preset.kv_split_sizes,
        preset.para_threshs1,
        preset.para_threshs2,
        params,
        device=place,
        verbose=False,
    )
    return metadata, params


def preset_for(place: str) -> GpuPreset:
    """The preset of the GPU's generation; on the CPU that of the newest."""
    capability = 90 if place == "cpu" else cuda.compute_capability(device_index(place))
    return PRESETS["H100" if capability >= 90 else "A100" if capability >= 80 else "V100"]


def random_inputs(tree: KVTree, heads: tuple[int, int, int], dtype: np.dtype[Any], seed: int) -> list[Array]:
    """Normal Q, K and V on the host; `qkv_preparation` would copy K and V out for each request, too."""
    num_qo_heads, num_kv_heads, head_dim = heads
    rng = np.random.default_rng(seed)
    kv_shape = (tree.unique_tokens, num_kv_heads, head_dim)
    shapes = ((tree.batch_size, num_qo_heads, head_dim), kv_shape, kv_shape)
    return [rng.standard_normal(shape, np.float32).astype(dtype) for shape in shapes]


def decode_into(arrays: Sequence[Any], metadata: MetadataTuple, params: FastTreeParams, kernel: str) -> None:
    """Decode Q, K, V, O, the four `arrays`."""
    scale = arrays[0].shape[2] ** -0.5
    fasttree_decode(*arrays, *metadata, params.TSQs, params.TSKs, scale, kernel=kernel)


# Dense attention in float64.


def request_paths(tree: KVTree, requests: Iterable[int]) -> dict[int, Array]:
    """Rows of K and V that each of the requests attends to, from the root down."""
    parent, ptrs = tree.parent.tolist(), tree.kv_ptrs.tolist()
    paths = {}
    for request in requests:
        runs, node = [np.arange(0)], int(tree.request_node[request])
        while node >= 0:
            runs.insert(0, np.arange(ptrs[node], ptrs[node + 1]))
            node = parent[node]
        paths[request] = np.concatenate(runs)
    return paths


def dense_attention(q: Array, k: Array, v: Array, paths: dict[int, Array]) -> Array:
    """Attention of the requests in `paths`, one after the other, all heads at once; 0 where there is no token.

    By `einsum`, which takes no threads: those of BLAS, on cores that others use too, can take twenty times as long.
    """
    num_kv_heads, head_dim = k.shape[1:]
    o = np.zeros((len(paths), *q.shape[1:]))
    for out, (request, rows) in zip(o, paths.items(), strict=True):
        if len(rows) == 0:
            continue
        query = q[request].astype(np.float64).reshape(num_kv_heads, -1, head_dim) * head_dim**-0.5
        # Laid out so that sums run along rows.
        keys = np.ascontiguousarray(k[rows].transpose(1, 0, 2)).astype(np.float64)
        values = np.ascontiguousarray(v[rows].transpose(1, 2, 0)).astype(np.float64)
        weights = np.einsum("hgd,htd->hgt", query, keys)
        weights -= weights.max(axis=2, keepdims=True)
        np.exp(weights, out=weights)
        weights /= weights.sum(axis=2, keepdims=True)
        out[...] = np.einsum("hgt,hdt->hgd", weights, values).reshape(out.shape)
    return o


def checked_requests(tree: KVTree, products_per_token: int) -> list[int]:
    """Requests to compare in float64: all where that is quick, else some, spread evenly."""
    affordable = int(CHECKED_PRODUCTS / products_per_token / max(1.0, float(tree.path_tokens.mean())))
    count = min(tree.batch_size, max(1, affordable))
    return [request * tree.batch_size // count for request in range(count)]


def relative_error(outputs: Sequence[Array], host: Sequence[Array], tree: KVTree, requests: list[int]) -> float:
    """Frobenius norm of the error over that of the float64 result, over some requests; the largest of the outputs'."""
    expected = dense_attention(host[0], host[1], host[2], request_paths(tree, requests))
    norm = float(np.linalg.norm(expected)) or 1.0
    errors = [float(np.linalg.norm(o[requests].astype(np.float64) - expected)) / norm for o in outputs]
    return float(np.max(errors))  # NaN stays NaN


# Devices and clocks.


def device_index(place: str) -> int:
    return int(place.removeprefix("cuda:"))


def current_device(place: str) -> AbstractContextManager[Any]:
    return nullcontext() if place == "cpu" else streams.use_device(device_index(place))


def placed(array: Array, place: str) -> Any:
    """A host array, on the current device where that is a GPU."""
    if place == "cpu":
        return array
    import cupy

    return cupy.asarray(array)


def on_host(array: Any) -> Array:
    return array if isinstance(array, np.ndarray) else array.get()


def stage1_kernel(place: str, kernel: str = "auto") -> str:
    """The stage-1 kernel that decode runs there on contiguous arrays."""
    if place == "cpu" or kernel != "auto":
        return "cpu" if place == "cpu" else kernel
    tensor_cores = cuda.compute_capability(device_index(place)) >= MMA_COMPUTE_CAPABILITY
    return "mma" if tensor_cores else "plain"


def device_name(place: str) -> str:
    if place == "cpu":
        return f"cpu, {numba.get_num_threads()} threads"
    import cupy

    return f"{place}, {cupy.cuda.runtime.getDeviceProperties(device_index(place))['name'].decode()}"


def clock(place: str) -> Callable[[Callable[[], Any], int], tuple[Any, Timing]]:
    return time_on_cpu if place == "cpu" else time_on_gpu


def time_on_cpu(run: Callable[[], Any], repeat: int) -> tuple[Any, Timing]:
    """What the first call returned, and the times."""
    begin = time.perf_counter()
    result = run()
    first = time.perf_counter() - begin
    seconds: list[float] = []
    while len(seconds) < repeat and sum(seconds) < MOST_SECONDS:
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return result, Timing(first, statistics.median(seconds), len(seconds))


def time_on_gpu(run: Callable[[], Any], repeat: int) -> tuple[Any, Timing]:
    """What the first call returned, and the times, by CUDA events and with a cold L2."""
    import cupy

    stream = cupy.cuda.get_current_stream()
    begin = time.perf_counter()
    result = run()
    stream.synchronize()
    first = time.perf_counter() - begin
    flush, events = cupy.cuda.alloc(FLUSH_BYTES), []
    for _ in range(repeat):
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        for _ in range(FLUSHES):
            flush.memset_async(0, FLUSH_BYTES, stream)
        start.record(stream)
        run()
        stop.record(stream)
        events.append((start, stop))
    stream.synchronize()
    seconds = [cupy.cuda.get_elapsed_time(*pair) / 1000 for pair in events]
    return result, Timing(first, statistics.median(seconds), len(seconds))
