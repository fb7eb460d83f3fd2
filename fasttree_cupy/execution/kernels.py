"""From a kernel's configuration to its compiled form: -D options, source text, CuPy's RawModule."""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "HEAD_DIMS",
    "STAGE1_SM90_ROWS",
    "KernelConfig",
    "MmaTile",
    "choose_tile",
    "compile_options",
    "edit_config",
    "load_kernel",
    "source_text",
    "tree_decode_config",
    "worker_config",
    "worker_problem",
]

HEAD_DIMS = (16, 32, 64, 128, 256)
FEW_BLOCKS = 5
"""Blocks a multiprocessor up to which splitting a vnode's tokens over four warps pays (bench/NOTES.md)."""

ELEMENT_NAMES = {"float16": "Float16", "bfloat16": "BFloat16"}
FLOAT8_NAMES = {"float8_e4m3fn": "Float8E4M3", "float8_e5m2": "Float8E5M2"}
"""What K and V may be beside the type of Q."""
DEFAULT_SHARED_BYTES = 48 * 1024

MMA_COMPUTE_CAPABILITY = 80
"""Compute capability times ten from which ``stage1_mma`` runs: it needs cp.async and bfloat16 products."""

TREE_DECODE_STAGES = 2
"""Tiles in the ring of each warp of ``tree_decode``."""

WORKER_COMPUTE_CAPABILITY = 90
"""Compute capability times ten of the GPUs that have ``tree_decode_sm90``'s warpgroup products: these and no others."""
WARPGROUP_KERNELS = ("stage1_sm90", "tree_decode_sm90")
STAGE1_SM90_STAGES, STAGE1_SM90_ROWS = 2, 64
"""Places for tiles in a block of ``stage1_sm90``, and the tokens of a tile, which are as many as its rows."""
WORKER_STAGES = {(64, 1): (8, 8), (128, 1): (6, 4), (64, 2): (6, 6), (128, 2): (3, 3)}
"""Head dim, row groups -> tiles in the rings of keys and values of ``tree_decode_sm90``: what the shared memory of a
multiprocessor holds."""
WORKER_FLOAT8_STAGES = {(64, 1): (4, 8, 8), (128, 1): (2, 4, 4), (64, 2): (4, 8, 10), (128, 2): (3, 4, 3)}
"""The same where K and V are float8, and the tiles in the rings of their rows as they come, keys and values."""
RACECHECK_VARIABLE = "FASTTREE_CUPY_RACECHECK"
"""Where it is set, kernels are built so that compute-sanitizer's racecheck can follow them: see barrier.cuh."""
WORKER_HEAD_DIMS = (64, 128)
WORKER_ROW_GROUPS = (1, 2)
WORKER_GROUP_ROWS = 64
WORKER_TILE_TOKENS = {1: 64, 2: 128}
"""Row groups -> tokens of a tile: with two, longer chains of products and softmax take turns."""
WORKER_FLOAT8_TILE_TOKENS = 64
"""The same for either number where K and V are float8: it divides what plans are cut into."""
WORKER_WARPS, WORKER_FLOAT8_WARPS = 12, 16
"""Warps of a block of ``tree_decode_sm90``; float8 is widened by four more."""


def block_warps(head_dim: int) -> tuple[int, int]:
    """Warps that a block of ``tree_decode`` may have; at head_dim 256 four would need too much shared memory."""
    return (1, 4 if head_dim <= 128 else 2)


@dataclass(frozen=True)
class MmaTile:
    """Tile shape of ``stage1_mma``.

    Attributes
    ----------
    row_warps : int
        Warps that split the query rows (requests x heads of a group) of a block, 16 each.
    token_warps : int
        Warps that split the tokens of a tile.
    warp_tokens : int
        Tokens of a tile that a warp attends to, a multiple of 16.
    stages : int
        Tiles in the ring: one is worked on while the others arrive.
    """

    row_warps: int
    token_warps: int
    warp_tokens: int
    stages: int

    @property
    def rows(self) -> int:
        """Query rows a block works on."""
        return 16 * self.row_warps

    @property
    def kv_tile(self) -> int:
        """Tokens in one shared-memory tile."""
        return self.token_warps * self.warp_tokens


@dataclass(frozen=True)
class KernelConfig:
    """Everything that decides a kernel's code.

    Attributes
    ----------
    name : str
        ``"stage1_plain"``, ``"stage1_mma"``, ``"stage1_sm90"``, ``"stage2"``, ``"tree_decode"``,
        ``"tree_decode_sm90"``, ``"merge_states"`` or ``"edit_plan"``: the file under ``cuda_src/`` and the function in
        it.
    dtype : str
        Element type of Q, O and, without `kv_dtype`, K and V: ``"float16"`` or ``"bfloat16"``.
    head_dim : int
        One of `HEAD_DIMS`.
    tile : MmaTile or None
        Tile shape; only ``stage1_mma`` has one.
    block_warps, stages : int
        Warps of a block of ``tree_decode`` and ``tree_decode_sm90``, and tiles in the ring of each of the former's; the
        latter has `WORKER_STAGES`. The other kernels leave them 0.
    soft_cap : bool
        Whether scores are capped. A kernel that asks this of every score at run time spends more on the question than
        on the products.
    row_groups : int
        Warpgroups of ``tree_decode_sm90`` that split a tile's rows; the other kernels leave it 0.
    kv_dtype : str or None
        Element type of K and V where it is another one: a key of `FLOAT8_NAMES`.
    """

    name: str
    dtype: str
    head_dim: int
    tile: MmaTile | None = None
    block_warps: int = 0
    stages: int = 0
    soft_cap: bool = False
    row_groups: int = 0
    kv_dtype: str | None = None

    @property
    def threads(self) -> int:
        """Threads a block; the kernels assert the same number."""
        if self.block_warps:
            return 32 * self.block_warps
        if self.tile is None:
            return 128
        return 32 * self.tile.row_warps * self.tile.token_warps

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory a block, in bytes; the kernels assert the same number."""
        if self.name == "tree_decode":
            return self.block_warps * self.stages * 2 * 16 * self.head_dim * 2
        if self.name == "tree_decode_sm90":
            return worker_shared_bytes(self.head_dim, self.row_groups, self.kv_dtype is not None)
        if self.name == "stage1_sm90":
            # Tiles of keys and values, and barriers, up to a multiple of what tiles are aligned to.
            return STAGE1_SM90_STAGES * 2 * STAGE1_SM90_ROWS * self.head_dim * 2 + 1024
        if self.tile is None:
            return 0
        return self.tile.stages * 2 * self.tile.kv_tile * self.head_dim * 2

    def defines(self) -> dict[str, object]:
        """The -D options that carry this configuration into ``config.cuh``."""
        options: dict[str, object] = {
            "FT_ELEMENT": ELEMENT_NAMES[self.dtype],
            "FT_HEAD_DIM": self.head_dim,
            "FT_SOFT_CAP": int(self.soft_cap),
            "FT_THREADS": self.threads,
        }
        if self.kv_dtype is not None:
            options["FT_KV_ELEMENT"] = FLOAT8_NAMES[self.kv_dtype]
        if self.tile is not None:
            options |= {
                "FT_ROW_WARPS": self.tile.row_warps,
                "FT_TOKEN_WARPS": self.tile.token_warps,
                "FT_WARP_TOKENS": self.tile.warp_tokens,
                "FT_STAGES": self.tile.stages,
            }
        if self.name == "tree_decode":
            options |= {"FT_BLOCK_WARPS": self.block_warps, "FT_STAGES": self.stages}
        if self.name == "stage1_sm90":
            options["FT_TILE_TOKENS"] = STAGE1_SM90_ROWS
        if self.name == "tree_decode_sm90":
            keys, values, raw = worker_stages(self.head_dim, self.row_groups, self.kv_dtype is not None)
            if raw:
                options["FT_RAW_STAGES"] = raw
            tokens = worker_tile_tokens(self.row_groups, self.kv_dtype is not None)
            options |= {"FT_ROW_GROUPS": self.row_groups, "FT_TILE_TOKENS": tokens}
            options |= {"FT_KEY_STAGES": keys, "FT_VALUE_STAGES": values}
        if self.shared_bytes:
            options["FT_SHARED_BYTES"] = self.shared_bytes
        return options


THROUGHPUT_TILE = MmaTile(row_warps=1, token_warps=1, warp_tokens=16, stages=2)
ROW_TILES = tuple(MmaTile(row_warps, token_warps=1, warp_tokens=32, stages=2) for row_warps in (2, 4))


def latency_tile(head_dim: int) -> MmaTile:
    """Return the tile for few rows and few blocks: warps side by side along the tokens.

    At head_dim 256 four of them would need more shared memory than GPUs of compute capability 8.6, 8.9 and 12.0 have.
    """
    return MmaTile(row_warps=1, token_warps=4 if head_dim <= 128 else 2, warp_tokens=16, stages=2)


def tiles(head_dim: int) -> tuple[MmaTile, ...]:
    """Every tile that `choose_tile` may return."""
    return (latency_tile(head_dim), THROUGHPUT_TILE, *ROW_TILES)


def choose_tile(query_rows: int, blocks: int, multiprocessors: int, head_dim: int) -> MmaTile:
    """Return the tile of ``stage1_mma`` for a launch; every tile gives the same result.

    The choice was measured on an H200 over the 45 cases of FastTree's paper (bench/NOTES.md): many small blocks
    hide the latency of short vnodes, and only where there are few of them is a vnode worth several warps.

    Parameters
    ----------
    query_rows : int
        Query rows of a documented tile: its requests times the heads of a group. More than a block holds are
        split over blocks.
    blocks : int
        Blocks of the launch, were each to hold all those rows.
    multiprocessors : int
        Multiprocessors of the GPU.
    head_dim : int
        One of `HEAD_DIMS`.
    """
    if query_rows <= THROUGHPUT_TILE.rows:
        return latency_tile(head_dim) if blocks <= FEW_BLOCKS * multiprocessors else THROUGHPUT_TILE
    return next((tile for tile in ROW_TILES if tile.rows >= query_rows), ROW_TILES[-1])


def tree_decode_config(
    dtype: str, head_dim: int, warps: int, soft_cap: bool, kv_dtype: str | None = None
) -> KernelConfig:
    """Configuration of ``tree_decode`` with this many warps a block."""
    return KernelConfig("tree_decode", dtype, head_dim, None, warps, TREE_DECODE_STAGES, soft_cap, kv_dtype=kv_dtype)


def worker_stages(head_dim: int, row_groups: int, float8: bool) -> tuple[int, int, int]:
    """Tiles in ``tree_decode_sm90``'s rings of keys, of values and of float8 rows."""
    if float8:
        return WORKER_FLOAT8_STAGES[head_dim, row_groups]
    return (*WORKER_STAGES[head_dim, row_groups], 0)


def worker_tile_tokens(row_groups: int, float8: bool) -> int:
    """Tokens of a tile of ``tree_decode_sm90``."""
    return WORKER_FLOAT8_TILE_TOKENS if float8 else WORKER_TILE_TOKENS[row_groups]


def worker_shared_bytes(head_dim: int, row_groups: int, float8: bool) -> int:
    """Size of struct Shared in ``cuda_src/include/worker.cuh``, which asserts the same number."""
    keys, values, raw = worker_stages(head_dim, row_groups, float8)
    tokens = worker_tile_tokens(row_groups, float8)
    rings = (keys + values) * tokens * head_dim * 2 + raw * 2 * tokens * head_dim
    # As kQuerySlots in worker.cuh.
    query_slots = 1 if row_groups == 2 and not float8 else 2
    queries = query_slots * row_groups * WORKER_GROUP_ROWS * head_dim * 2
    # Accumulators and softmax states that one token group hands to the other; with two row groups one of each.
    exchange = WORKER_GROUP_ROWS * (head_dim * 4 + 8) if row_groups == 1 else 4 + 8
    # As kViewPlaces in worker.cuh.
    views = raw + keys + 2 * (2 // row_groups) if float8 else 2 * keys
    barriers = 2 * (keys + values + query_slots) + 2 + (4 * raw + query_slots + views if float8 else 0)
    rest = views * (tokens // 4 + 2 * tokens) + barriers * 8 + 2 * 4
    return -(-(-(-(rings + queries + exchange) // 16) * 16 + rest) // 1024) * 1024


def worker_config(
    dtype: str, head_dim: int, row_groups: int, soft_cap: bool, kv_dtype: str | None = None
) -> KernelConfig:
    """Configuration of ``tree_decode_sm90`` with this many row groups."""
    warps = WORKER_WARPS if kv_dtype is None else WORKER_FLOAT8_WARPS
    return KernelConfig("tree_decode_sm90", dtype, head_dim, None, warps, 0, soft_cap, row_groups, kv_dtype)


def worker_problem(compute_capability: int, group: int, head_dim: int) -> str | None:
    """Say why ``tree_decode_sm90`` cannot serve a GPU and head layout; None where it can."""
    if compute_capability != WORKER_COMPUTE_CAPABILITY:
        return f"compute capability {compute_capability / 10} has other warpgroup products than 9.0, or none"
    if head_dim not in WORKER_HEAD_DIMS:
        return f"head_dim is {head_dim}, not one of {WORKER_HEAD_DIMS}"
    if group > max(WORKER_ROW_GROUPS) * WORKER_GROUP_ROWS:
        return f"{group} query heads a KV head are more than a tile's rows"
    return None


def edit_config() -> KernelConfig:
    """Configuration of ``edit_plan``, for which dtype and head_dim mean nothing."""
    return KernelConfig("edit_plan", "float16", HEAD_DIMS[0])


def all_configs(compute_capability: int) -> list[KernelConfig]:
    """Every configuration that a GPU of this compute capability (times ten) may be asked to run."""
    configs = []
    for dtype, head_dim in itertools.product(ELEMENT_NAMES, HEAD_DIMS):
        configs += [KernelConfig(name, dtype, head_dim) for name in ("stage2", "merge_states")]
        for cap, kv in itertools.product((False, True), (None, *FLOAT8_NAMES)):
            configs.append(KernelConfig("stage1_plain", dtype, head_dim, soft_cap=cap, kv_dtype=kv))
            if compute_capability >= MMA_COMPUTE_CAPABILITY:
                if kv is None:
                    configs += [KernelConfig("stage1_mma", dtype, head_dim, t, soft_cap=cap) for t in tiles(head_dim)]
                configs += [tree_decode_config(dtype, head_dim, warps, cap, kv) for warps in block_warps(head_dim)]
            if worker_problem(compute_capability, 1, head_dim) is None:
                if kv is None:
                    configs.append(KernelConfig("stage1_sm90", dtype, head_dim, soft_cap=cap))
                configs += [worker_config(dtype, head_dim, row_groups, cap, kv) for row_groups in WORKER_ROW_GROUPS]
    if compute_capability == WORKER_COMPUTE_CAPABILITY:
        configs.append(edit_config())
    return configs


@functools.cache
def cuda_src() -> Path:
    """Folder of the CUDA sources: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "cuda_src", package.parent / "cuda_src"):
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"cuda_src was found neither in {package} nor beside it")


@functools.cache
def source_digest() -> str:
    """Digest of every CUDA source: CuPy's kernel cache does not look into the headers."""
    digest = hashlib.sha256()
    for path in sorted(cuda_src().rglob("*.cu*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def source_text(name: str) -> str:
    """Text of ``<name>.cu``, with the digest in front, so that an edited header is compiled anew."""
    text = (cuda_src() / f"{name}.cu").read_text(encoding="utf-8")
    return f'// cuda_src {source_digest()}\n#line 1 "{name}.cu"\n{text}'


def compile_options(config: KernelConfig) -> tuple[str, ...]:
    """NVRTC options for a configuration.

    The architecture is left to the caller, but for kernels with warpgroup products: what the caller, CuPy for one,
    gives before or after yields to sm_90a, which alone has them.
    """
    defines = [f"-D{key}={value}" for key, value in config.defines().items()]
    if os.environ.get(RACECHECK_VARIABLE):
        defines.append("-DFT_EVERY_LANE_ARRIVES=1")
    architecture = ("-arch=sm_90a",) if config.name in WARPGROUP_KERNELS else ()
    return ("-std=c++17", f"-I{cuda_src() / 'include'}", *defines, *architecture)


def load_kernel(config: KernelConfig) -> Any:
    """Compile (or take from CuPy's cache on disk) and load a kernel for the current device.

    Parameters
    ----------
    config : KernelConfig
        What to build.

    Returns
    -------
    cupy.RawKernel
        Ready to launch with `KernelConfig.shared_bytes` of dynamic shared memory.
    """
    import cupy

    module = cupy.RawModule(code=source_text(config.name), options=compile_options(config))
    kernel = module.get_function(config.name)
    if config.shared_bytes > DEFAULT_SHARED_BYTES:
        kernel.max_dynamic_shared_size_bytes = config.shared_bytes
    return kernel
