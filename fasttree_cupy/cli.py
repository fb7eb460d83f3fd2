"""Command line: ``fasttree-cupy demo`` decodes a tree and compares with dense attention, ``plan`` shows how
FastTree's heuristic plans it, ``tune`` fits the planners' constants to the GPU, ``info`` shows the machine.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numba
import numpy as np

from fasttree_cupy import __version__
from fasttree_cupy.demo import (
    ERROR_BOUNDS,
    DemoResult,
    Timing,
    device_index,
    device_name,
    run_demo,
    stage1_kernel,
)
from fasttree_cupy.execution import cuda
from fasttree_cupy.execution.device import gpu_problem, resolve_device
from fasttree_cupy.execution.kernels import HEAD_DIMS
from fasttree_cupy.explain import ExplainedPlan, explain_plan
from fasttree_cupy.params import PRESETS
from fasttree_cupy.planning.machine import Constants, built_in
from fasttree_cupy.plot import plan_svg
from fasttree_cupy.tree import KVTree
from fasttree_cupy.tuning.chosen import Chosen, chosen
from fasttree_cupy.tuning.fit import Fit
from fasttree_cupy.tuning.gpu import gpu_of
from fasttree_cupy.tuning.measure import tune
from fasttree_cupy.tuning.numbers import numbers_of
from fasttree_cupy.tuning.store import tuned_file, write

__all__ = ["demo_rows", "format_table", "info_rows", "main", "plan_rows", "show_rows", "tune_rows"]

LEVELS, TOKENS = [1, 16, 64], [1024, 256, 32]
OPTIONS = {
    "num_qo_heads": "--qo-heads",
    "num_kv_heads": "--kv-heads",
    "nodes_per_level": "--levels",
    "tokens_per_level": "--tokens",
    "kernel is": "--kernel is",
    "device is": "--device is",
}
"""What messages call an argument -> its option here."""

Row = tuple[str, ...]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments after the program's name; by default those of the process.

    Returns
    -------
    int
        Exit status: 1 where the demo's error is not below its bound, else 0.

    Raises
    ------
    SystemExit
        With status 2 after wrong input, which gets one line on stderr.
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        rows, status = COMMANDS[args.command](args)
    except (ValueError, OSError, MemoryError) as error:
        parser.error(with_options(str(error)))
    print(format_table(rows))
    return status


def demo_command(args: argparse.Namespace) -> tuple[list[Row], int]:
    """The demo's table, and the exit status."""
    result = run_demo(
        chosen_tree(args),
        num_qo_heads=args.qo_heads,
        num_kv_heads=args.kv_heads,
        head_dim=args.head_dim,
        dtype=args.dtype,
        device=None if args.device == "auto" else args.device,
        kernel=args.kernel,
        seed=args.seed,
        repeat=args.repeat,
    )
    return demo_rows(result), 0 if result.passed else 1


def plan_command(args: argparse.Namespace) -> tuple[list[Row], int]:
    """The plan's table, and the exit status; writes the picture where one is wanted."""
    explained = explain_plan(chosen_tree(args), args.qo_heads, args.kv_heads, args.gpu)
    rows = plan_rows(explained, args.head_dim)
    if args.plot is not None:
        picture = plan_svg(explained, tree_name(args))
        Path(args.plot).write_text(picture, encoding="utf-8", newline="\n")
    return rows, 0


def tune_command(args: argparse.Namespace) -> tuple[list[Row], int]:
    """The table of constants, fitted or in use, and the exit status; writes the file of fitted ones."""
    device = device_index(resolve_device("cuda"))
    gpu = gpu_of(device)
    if args.show:
        if args.quick or args.output is not None:
            raise ValueError("--show is given with --quick or --output, expected it alone: it measures nothing")
        return show_rows(gpu.name, chosen(device)), 0
    path = tuned_file(gpu) if args.output is None else Path(args.output)
    check_writable(path)
    # From built-in constants, so that a second run does not depend on the first.
    start, _ = built_in(gpu.name, gpu.multiprocessors)
    fits = tune(device, start, args.quick)
    accepted = any(fit.accepted for fit in fits.values())
    if accepted:
        write(path, gpu, fits, {"version": __version__, "cuda_driver": driver_version()})
        chosen.cache_clear()
    return tune_rows(gpu.name, start, fits, path if accepted else None), 0


def check_writable(path: Path) -> None:
    """Raise ValueError where no file can be written, before anything is measured for it."""
    folder = next(each for each in path.absolute().parents if each.exists())
    if not path.name or path.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        raise ValueError(f"--output is {str(path)!r}, expected a file in a folder that can be written to")


def info_command(args: argparse.Namespace) -> tuple[list[Row], int]:
    """The table of ``info``, and the exit status."""
    return info_rows(), 0


COMMANDS: dict[str, Callable[[argparse.Namespace], tuple[list[Row], int]]] = {
    "demo": demo_command,
    "plan": plan_command,
    "tune": tune_command,
    "info": info_command,
}


class OneLineParser(argparse.ArgumentParser):
    """A parser whose errors are one line, without the usage in front."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {one_line(message)}\n")


def make_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="fasttree-cupy", description="Attention over tree-shaped KV caches.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="demo | plan | tune | info")
    demo = commands.add_parser("demo", help="decode a tree and compare with dense attention")
    add_problem(demo)
    demo.add_argument("--dtype", default="float16", choices=ERROR_BOUNDS, help="of Q, K, V and O (float16)")
    demo.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="auto: a GPU where usable")
    demo.add_argument("--kernel", default="auto", choices=cuda.KERNELS, help="stage-1 kernel on a GPU (auto)")
    demo.add_argument("--seed", type=non_negative, default=0, metavar="N", help="of the random Q, K and V (0)")
    demo.add_argument("--repeat", type=positive, default=5, metavar="N", help="timed runs, the median counts (5)")
    plan = commands.add_parser("plan", help="show how FastTree's heuristic plans a tree; needs no GPU")
    add_problem(plan)
    plan.add_argument(
        "--gpu", default="H100", type=gpu_name, metavar="NAME",
        help=f"whose tile sizes and thresholds: {', '.join(PRESETS)} (H100, which an H200 takes too)",
    )  # fmt: skip
    plan.add_argument("--plot", metavar="FILE", help="draw the tree and its vnodes into this SVG file")
    tuning = commands.add_parser("tune", help="measure the GPU and fit the planners' constants to it")
    tuning.add_argument("--output", metavar="FILE", help="write here, not to the cache folder, where plans look")
    tuning.add_argument("--quick", action="store_true", help="measure less")
    tuning.add_argument("--show", action="store_true", help="only show the constants in use and where they come from")
    commands.add_parser("info", help="show versions, the GPU, and which kernel would be used")
    return parser


def add_problem(command: argparse.ArgumentParser) -> None:
    """The tree and the heads, which `demo` and `plan` share."""
    tree = command.add_mutually_exclusive_group()
    tree.add_argument("--tree", metavar="FILE", help="tree file, see docs/TREE_FORMAT.md")
    tree.add_argument("--levels", type=integers, metavar="N,N,...", help="nodes of each level (default: 1,16,64)")
    command.add_argument("--tokens", type=integers, metavar="N,N,...", help="tokens of a level's nodes (1024,256,32)")
    command.add_argument("--qo-heads", type=int, default=32, metavar="N", help="query heads (32)")
    command.add_argument("--kv-heads", type=int, default=8, metavar="N", help="KV heads (8)")
    command.add_argument("--head-dim", type=int, default=128, choices=HEAD_DIMS, help="elements of a head (128)")


def integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"is {text}, expected 1 or more")
    return int(text)


def non_negative(text: str) -> int:
    if int(text) < 0:
        raise argparse.ArgumentTypeError(f"is {text}, expected 0 or more")
    return int(text)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def with_options(message: str) -> str:
    """A message in which arguments are called by the options that set them."""
    return re.sub("|".join(rf"\b{name}\b" for name in OPTIONS), lambda found: OPTIONS[found[0]], message)


def gpu_name(text: str) -> str:
    if text.upper() not in PRESETS:
        raise argparse.ArgumentTypeError(f"is {text!r}, expected {', '.join(PRESETS)}; an H200 takes H100")
    return text.upper()


def chosen_tree(args: argparse.Namespace) -> KVTree:
    """The tree that the arguments name; ValueError or OSError where there is none."""
    if args.tree is not None:
        if args.tokens is not None:
            raise ValueError("--tokens goes with --levels, not with --tree")
        return KVTree.from_file(args.tree)
    if (args.levels is None) != (args.tokens is None):
        raise ValueError("--levels and --tokens go together, and one of them is missing")
    return KVTree.from_levels(args.levels or LEVELS, args.tokens or TOKENS)


def tree_name(args: argparse.Namespace) -> str:
    """What a picture calls the tree."""
    if args.tree is not None:
        return Path(args.tree).name
    nodes, tokens = (",".join(map(str, numbers)) for numbers in (args.levels or LEVELS, args.tokens or TOKENS))
    return f"levels {nodes} of {tokens} tokens"


# What is printed.


def demo_rows(result: DemoResult) -> list[Row]:
    """The rows of the demo's table: what, how much, and a note."""
    r = result
    checked = "all" if r.checked_requests == r.num_requests else f"{r.checked_requests} of {r.num_requests}"
    verdict = "below" if r.passed else "NOT below"
    return [
        ("device", r.device, f"stage-1 kernel: {r.kernel}"),
        ("nodes", f"{r.num_nodes:,}"),
        ("requests", f"{r.num_requests:,}"),
        ("unique tokens", f"{r.unique_tokens:,}"),
        ("summed tokens", f"{r.summed_tokens:,}", "over the requests' paths"),
        ("sharing factor", f"{r.sharing_factor:.2f}", "summed / unique"),
        ("vnodes", *phase_cells(r.vnodes, " + ", "phase 0 + phase 1")),
        ("query tile sizes", *phase_cells(r.q_tile_sizes, ", ", "adopted, in requests")),
        ("KV tile sizes", *phase_cells(r.kv_tile_sizes, ", ", "adopted, in tokens")),
        ("preparation", *time_cells(r.preparation)),
        ("decode", *time_cells(r.decode)),
        ("plan_decode", *time_cells(r.planning)),
        ("its run", *time_cells(r.run)),
        ("dense attention", duration(r.dense.median), f"{runs(r.dense)}; the same as decode, but nothing is shared"),
        ("speed-up", ", ".join(map(two_digits, r.speed_ups)), "dense attention / decode, / run: an indication only"),
        (
            "relative error",
            f"{r.error:.2e}",
            f"{verdict} the bound of {r.error_bound:.0e}, against float64 dense attention, {checked} requests",
        ),
    ]


def plan_rows(explained: ExplainedPlan, head_dim: int) -> list[Row]:
    """The rows of the plan's table."""
    tree, made = explained.tree, explained.plan
    partials = len(made.vnode_to_q_entries)
    work_space = partials * explained.num_qo_heads * (head_dim + 1) * 4
    return [
        ("nodes", f"{tree.num_nodes:,}"),
        ("requests", f"{tree.batch_size:,}"),
        ("unique tokens", f"{tree.unique_tokens:,}"),
        ("Split-K", f"{tree.num_nodes - explained.num_split_q:,}", "nodes attended to on their own"),
        ("Split-Q", f"{explained.num_split_q:,}", "nodes that take their parents' tokens along"),
        ("vnodes", *phase_cells(made.phase_node_nums, " + ", "phase 0 + phase 1")),
        ("query tile sizes", *phase_cells(made.q_tile_sizes, ", ", f"adopted, in requests; {explained.gpu}")),
        ("KV tile sizes", *phase_cells(made.kv_tile_sizes, ", ", "adopted, in tokens")),
        ("KV split sizes", *phase_cells(made.kv_split_sizes, ", ", "adopted, in tokens")),
        ("partial outputs", f"{partials:,}", f"{work_space / 2**20:,.1f} MiB of work space"),
    ]


def tune_rows(name: str, start: Constants, fits: Mapping[str, Fit[Any]], path: Path | None) -> list[Row]:
    """The rows of the table of ``tune``: constants built in and fitted, errors, and where the file is."""
    rows: list[Row] = [("GPU", name), ("", "built-in", "fitted")]
    for field, fit in fits.items():
        before, after = numbers_of(getattr(start, field)), numbers_of(fit.machine)
        rows += [(f"{field}: {each}", number(before[each]), number(after[each])) for each in before]
        rows.append((f"{field}: error", *map(percent, fit.errors), f"root mean square, of {fit.samples} times"))
        verdict = "accepted" if fit.accepted else "not better than the built-in constants"
        rows.append((f"{field}: loss by choice", *map(percent, fit.losses), verdict))
    return [
        *rows,
        ("written to", "no file, as nothing is better; the constants in use stay" if path is None else str(path)),
    ]


def show_rows(name: str, used: Chosen) -> list[Row]:
    """The rows of the table of ``tune --show``: the constants in use, and where they come from."""
    rows: list[Row] = [("GPU", name), ("constants", used.origin), ("tuned file", str(used.path))]
    for field, machine in used.constants._asdict().items():
        rows += [(f"{field}: {each}", number(value)) for each, value in numbers_of(machine).items()]
    return rows


def number(value: float) -> str:
    return f"{value:.3g}"


def two_digits(value: float) -> str:
    return f"{float(f'{value:.1e}'):,g}"


def percent(part: float) -> str:
    return f"{100 * part:.1f}%"


def phase_cells(numbers: Sequence[int], separator: str, note: str) -> Row:
    return separator.join(f"{number:,}" for number in numbers), note


def time_cells(timing: Timing) -> Row:
    return duration(timing.median), f"{runs(timing)}; first call, compiles or loads: {duration(timing.first)}"


def runs(timing: Timing) -> str:
    return "one run" if timing.runs == 1 else f"median of {timing.runs} runs"


def duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.{1 if seconds >= 0.01 else 3}f} ms"


def format_table(rows: Sequence[Row]) -> str:
    """Rows of cells as lines, every column as wide as its widest cell but the last, which no padding follows."""
    columns = max(map(len, rows))
    full = [(*row, *[""] * (columns - len(row))) for row in rows]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in full]
    return "\n".join(line.rstrip() for line in lines)


def info_rows() -> list[Row]:
    """The rows of the table of ``info``: versions, GPUs, and the kernel that ``auto`` would use."""
    rows: list[Row] = [
        ("fasttree-cupy", __version__),
        ("Python", platform.python_version()),
        ("NumPy", np.__version__),
        ("Numba", numba.__version__),
        ("CPU threads", str(numba.get_num_threads())),
        *cupy_rows(),
    ]
    problem = gpu_problem()
    if problem is not None:
        return [*rows, ("GPU", one_line(f"none can be used: {problem}")), ("stage-1 kernel", "cpu")]
    return [*rows, *gpu_rows()]


def cupy_rows() -> list[Row]:
    """Versions of CuPy and of the CUDA libraries that it found."""
    try:
        import cupy
    except ImportError as error:
        return [("CuPy", f"cannot be imported: {one_line(error)}")]
    runtime = cupy.cuda.runtime
    return [
        ("CuPy", cupy.__version__),
        ("CUDA driver", version_of(driver_version)),
        ("CUDA runtime", version_of(lambda: cuda_version(runtime.runtimeGetVersion()))),
        ("NVRTC", version_of(lambda: "{}.{}".format(*cupy.cuda.nvrtc.getVersion()))),
    ]


def version_of(look: Callable[[], str]) -> str:
    try:
        return look()
    except Exception as error:  # each library raises what it likes
        return f"not available: {one_line(error)}"


def driver_version() -> str:
    """The CUDA version that the driver serves."""
    import cupy

    return cuda_version(cupy.cuda.runtime.driverGetVersion())


def cuda_version(number: int) -> str:
    """12080 is 12.8; 0 is what CUDA says where there is no driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else "none"


def gpu_rows() -> list[Row]:
    """The GPU that is CuPy's current one, which is where work goes by default."""
    place = resolve_device("cuda")
    kernel = stage1_kernel(place)
    reason = "tensor cores" if kernel == "mma" else "no tensor cores that mma can use"
    return [
        ("GPU", device_name(place)),
        ("compute capability", f"{cuda.compute_capability(device_index(place)) / 10}"),
        ("stage-1 kernel", f"{kernel} ({reason})"),
        ("planners' constants", chosen(device_index(place)).origin),
    ]
