"""README's code works when pasted, and its commands are the ones that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from tests.reference import dense_attention
from tests.tolerances import assert_close

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def host(array: Any) -> Any:
    return array.get() if hasattr(array, "get") else array


def test_code_works_when_pasted(capsys: Any) -> None:
    names: dict[str, Any] = {}
    outputs = []
    for block in blocks("python"):
        exec(block, names)
        outputs.append(host(names["O"]))
    assert len(outputs) == 2
    tree = names["tree"]
    inputs = [host(names[name]) for name in "QKV"]
    expected, _ = dense_attention(tree.parent, tree.seqlen, tree.request_node, *inputs, 128**-0.5)
    for output in outputs:
        assert_close(output, expected, np.float16)


def test_commands_are_one_line_each() -> None:
    commands = blocks("bash")
    assert [command.count("\n") for command in commands] == [1, 1]
    assert "fasttree-cupy demo" in commands[0]
    assert "pytest" in commands[1]


def test_every_folder_and_file_named_exists() -> None:
    for path in re.findall(r"`((?:fasttree_cupy|cuda_src|bench|tests|docs)/[\w./]*)`", README):
        assert (ROOT / path).exists(), path
