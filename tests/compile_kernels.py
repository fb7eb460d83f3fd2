"""Compiles the kernels with NVRTC, no GPU needed: ``python -m tests.compile_kernels [sm_80 ...]``.

Prints registers and spilled bytes of each variant. Exit status 1 if one does not compile, 2 if there is no NVRTC.
"""

from __future__ import annotations

import re
import sys
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from typing import NamedTuple

from fasttree_cupy.execution.kernels import KernelConfig, all_configs, compile_options, source_text

ARCHITECTURES = (70, 75, 80, 86, 89, 90, 100, 120)
COMPLETE = (80, 90)


class Report(NamedTuple):
    """What the compiler said of one variant."""

    ok: bool
    registers: int
    spilled: int
    log: str


def covering_choice(configs: list[KernelConfig]) -> list[KernelConfig]:
    """A choice in which every kernel, tile, dtype (of K and V too) and head_dim occurs."""
    chosen = []
    kinds = sorted({(config.name, config.tile, config.kv_dtype) for config in configs}, key=str)
    for number, kind in enumerate(kinds):
        variants = [config for config in configs if (config.name, config.tile, config.kv_dtype) == kind]
        chosen += variants[number % 2 :: 3]
    return chosen


def compile_one(job: tuple[int, KernelConfig]) -> Report:
    """Compile one variant for a real architecture, so that ptxas runs too."""
    from cupy.cuda import nvrtc

    architecture, config = job
    # CuPy adds -ftz=true to every kernel; so do we, to compile what will run.
    options = (*compile_options(config), f"-arch=sm_{architecture}", "-ftz=true", "--ptxas-options=-v")
    program = nvrtc.createProgram(source_text(config.name), f"{config.name}.cu", (), ())
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        return Report(False, 0, 0, nvrtc.getProgramLog(program))
    log = nvrtc.getProgramLog(program)
    registers = re.search(r"Used (\d+) registers", log)
    spilled = re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spilled is None:
        return Report(False, 0, 0, f"no resource report in the log:\n{log}")
    return Report(True, int(registers[1]), int(spilled[1]), log)


def main(arguments: list[str]) -> int:
    """Compile for the given architectures, or for all."""
    try:
        from cupy.cuda import nvrtc

        version = nvrtc.getVersion()
    except Exception as error:  # CuPy raises whatever its loader met
        print(f"NVRTC cannot be loaded: {error}", file=sys.stderr)
        return 2
    architectures = [int(name.removeprefix("sm_")) for name in arguments] or list(ARCHITECTURES)
    jobs = []
    for architecture in architectures:
        configs = all_configs(architecture)
        jobs += list(product([architecture], configs if architecture in COMPLETE else covering_choice(configs)))
    print(f"NVRTC {version[0]}.{version[1]}, {len(jobs)} variants")
    failures = 0
    with ProcessPoolExecutor() as pool:
        for (architecture, config), report in zip(jobs, pool.map(compile_one, jobs), strict=True):
            shape = (
                config.tile or (f"{config.row_groups} row groups" if config.row_groups else config.block_warps) or ""
            )
            shape = f"{shape} soft cap" if config.soft_cap else shape
            dtypes = f"{config.dtype} {config.kv_dtype}" if config.kv_dtype else config.dtype
            label = f"sm_{architecture} {config.name} {dtypes} head_dim {config.head_dim} {shape}"
            if report.ok:
                print(f"{label}: {report.registers} registers, {report.spilled} bytes spilled")
            else:
                failures += 1
                print(f"{label}: FAILED\n{report.log}")
    print(f"{len(jobs) - failures} compiled, {failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
