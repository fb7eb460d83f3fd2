"""CUDA C++ to C++ for the machine of ``machine.h``: every ``asm`` statement becomes a call of instructions.h."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = ["ENTRY", "translate"]

ENTRY = "emulated_launch"
"""The C function that launches a translated kernel: see `ENTRY_TEXT`."""
ENTRY_TEXT = """
extern "C" const char* {entry}(const void* parameters, unsigned x, unsigned y, unsigned z, unsigned threads,
                               unsigned long shared_bytes, unsigned long seed) {{
    static std::string fault;
    const auto kernel = [](const void* parameters) {{ {kernel}(*static_cast<const {params}*>(parameters)); }};
    fault = gpu::launch(kernel, parameters, {{x, y, z}}, threads, shared_bytes, seed);
    return fault.c_str();
}}
"""
HERE = Path(__file__).parent
STRING = re.compile(r'\s*"((?:[^"\\]|\\.)*)"')
OPERAND = re.compile(r'\s*"([=+]?)\w"\s*\(')
INSTRUCTION = re.compile(r"(?:^|[;{}]|\\n)\s*([a-z][\w.:]+)([^;]*)")
HELPERS = ("setp", "selp", "reg")
"""What surrounds an instruction with a predicate, and is part of the function for it."""


def translate(name: str, source: Path, include: Path, defines: Mapping[str, object], architecture: int) -> str:
    """The text of a kernel's file and all its headers.

    Parameters
    ----------
    name : str
        The kernel, which takes one struct.
    source, include : Path
        Its file, and the folder of the headers.
    defines : mapping
        What ``-D`` options say.
    architecture : int
        Compute capability times ten of the GPU that the text is for.
    """
    text = subprocess.run(
        ["g++", "-E", "-P", "-x", "c++", "-std=c++17", f"-I{include}", f"-D__CUDA_ARCH__={10 * architecture}"]
        + [f"-D__{word}__=" for word in ("device", "global", "grid_constant")]
        + ["-D__forceinline__=inline", "-D__launch_bounds__(...)=", "-D__align__(bytes)=alignas(bytes)"]
        + [f"-D{key}={value}" for key, value in defines.items()]
        + [str(source)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    text = re.sub(
        r"extern __shared__ alignas\(\d+\) unsigned char (\w+)\[\]", r"unsigned char* \1 = gpu::block().shared", text
    )
    params = re.search(rf"\b{name}\(const (\w+) ", text)
    if params is None:
        raise ValueError(f"{source} has no kernel {name} of one struct")
    return (
        f'#include "{HERE / "instructions.h"}"\n'
        + "".join(_without_asm(text))
        + ENTRY_TEXT.format(entry=ENTRY, kernel=name, params=params[1])
    )


def _without_asm(text: str) -> Iterator[str]:
    """The text in parts, with calls in place of ``asm`` statements."""
    at = 0
    for begin in re.finditer(r"\basm(?:\s+volatile)?\s*\(", text):
        end = _closing(text, begin.end())
        yield text[at : begin.start()]
        yield _call(text[begin.end() : end])
        at = end + 1
    yield text[at:]


def _closing(text: str, at: int) -> int:
    """Where the parenthesis ends that has begun before `at`."""
    depth = 1
    while True:
        character = text[at]
        if character == '"':
            at = STRING.match(text, at).end()  # type: ignore[union-attr]
            continue
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth == 0:
            return at
        at += 1


def _call(statement: str) -> str:
    """The call for what stands between the parentheses of an ``asm`` statement."""
    template, at = "", 0
    while found := STRING.match(statement, at):
        template, at = template + found[1], found.end()
    operands = list(_operands(statement, at))
    arguments = [expression for is_result, expression in operands if is_result]
    values = [expression for is_result, expression in operands if not is_result]
    mnemonic, rest = next(
        (found[1], found[2]) for found in INSTRUCTION.finditer(template) if not found[1].startswith(HELPERS)
    )
    function = re.sub(r"[.:]+", "_", mnemonic)
    if function.startswith("wgmma") and arguments:
        pointers = ", ".join(f"&({argument})" for argument in arguments)
        arguments = [f"ptx::Accumulators<{len(arguments)}>{{{pointers}}}"]
    if function.startswith("wgmma_mma"):
        arguments.insert(0, rest.strip().rpartition(", ")[2])
    if function == "cp_async_cg_shared_global" or function.endswith("global_L2_cache_hint"):
        values.insert(2, "16")
    return f"ptx::{function}({', '.join(arguments + values)})"


def _operands(statement: str, at: int) -> Iterator[tuple[bool, str]]:
    """Each operand: whether it is written, and its expression. Clobbers have none."""
    while at < len(statement):
        found = OPERAND.match(statement, at)
        if found is None:
            at += 1
            continue
        end = _closing(statement, found.end())
        yield found[1] != "", statement[found.end() : end]
        at = end + 1
