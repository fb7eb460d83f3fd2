"""The API reference's own code: its examples run with nothing but their imports changed, its signatures are ours.

The document is no part of this repository; `FASTTREE_API_REFERENCE` or its place beside a checkout names it.
"""

from __future__ import annotations

import ast
import inspect
import os
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fasttree_cupy
from fasttree_cupy import fasttree, flash_attn_wrap, kv_tree_simple
from fasttree_cupy.execution import device
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.tree import KVTree
from tests.reference import dense_attention
from tests.tolerances import assert_close

DOCUMENT = Path(
    os.environ.get("FASTTREE_API_REFERENCE")
    or Path(__file__).resolve().parents[2] / "shared" / "spec" / "API_REFERENCE.md"
)
if not DOCUMENT.is_file():
    pytest.skip(f"there is no API reference at {DOCUMENT}", allow_module_level=True)
TEXT = DOCUMENT.read_text(encoding="utf-8")

# 2,048 tokens and eight leaves, as the examples have them.
TREE = KVTree.from_levels([1, 2, 8], [1024, 256, 64])

pytestmark = pytest.mark.filterwarnings("ignore:.*the recommended range of:UserWarning")


@dataclass(frozen=True)
class Block:
    """A fenced block of Python, the heading above it, and its line."""

    heading: str
    line: int
    code: str

    @property
    def id(self) -> str:
        return f"{self.heading.replace(' ', '_')}-line{self.line}"

    @property
    def is_signature(self) -> bool:
        return self.code.startswith("def ")

    @property
    def is_class(self) -> bool:
        return self.code.startswith("class ")

    @property
    def is_complete(self) -> bool:
        return not (self.is_signature or self.is_class or "..." in self.code)


def read_blocks() -> list[Block]:
    blocks = []
    for match in re.finditer(r"^```python\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE):
        above = TEXT[: match.start()]
        heading = re.findall(r"^#+ (.+)$", above, re.MULTILINE)[-1]
        blocks.append(Block(heading, above.count("\n") + 1, match.group(1)))
    return blocks


BLOCKS = read_blocks()


def params(blocks: list[Block]) -> list[Any]:
    """Blocks as parameters; those that ask for CUDA need a GPU."""
    on_gpu = re.compile(r"""["']cuda["']""")
    return [pytest.param(b, id=b.id, marks=[pytest.mark.gpu] if on_gpu.search(b.code) else []) for b in blocks]


def block_under(heading: str, containing: str) -> Block:
    (block,) = (b for b in BLOCKS if b.heading == heading and containing in b.code)
    return block


def with_our_imports(code: str) -> str:
    return re.sub(
        r"^from (fasttree|kv_tree_simple|flash_attn_wrap) import", r"from fasttree_cupy.\1 import", code, flags=re.M
    )


def context() -> dict[str, Any]:
    """What the document has defined by the time it shows a fragment: its configuration, and the public names."""
    return {
        **{name: getattr(typing, name) for name in ("List", "Tuple")},
        **{
            name: getattr(module, name)
            for module in (fasttree, kv_tree_simple, flash_attn_wrap)
            for name in module.__all__
        },
        "num_qo_heads": 32,
        "num_kv_heads": 8,
        "head_dim": 128,
        "total_tokens": 2048,
        "params": fasttree.FastTreeParams(),
        "tree_info": TREE.to_nodes(),
    }


def run(code: str, namespace: dict[str, Any]) -> dict[str, Any]:
    exec(compile(with_our_imports(code), str(DOCUMENT), "exec"), namespace)
    return namespace


@pytest.fixture(autouse=True)
def tree_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples load `tree.txt` from where they run."""
    TREE.to_file(tmp_path / "tree.txt")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU: the preparation examples name no device."""
    monkeypatch.setattr(device, "gpu_problem", lambda: "this test wants none")


# Examples


def test_the_document_was_read() -> None:
    """Guards the tests below against a parser that finds nothing."""
    assert len(BLOCKS) == TEXT.count("```python") > 0
    assert sum(b.is_complete for b in BLOCKS) >= 25
    assert sum(b.is_signature for b in BLOCKS) >= 8
    assert sum(b.is_class for b in BLOCKS) == 2


@pytest.mark.parametrize("block", params([b for b in BLOCKS if b.is_complete]))
def test_complete_block_runs(block: Block, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> None:
    namespace = context()
    if "torch" in block.code:
        namespace["torch"] = request.getfixturevalue("torch")
    run(block.code, namespace)
    if "print(" in block.code:
        assert capsys.readouterr().out != ""


def test_preparation_example(capsys: pytest.CaptureFixture[str]) -> None:
    block = block_under("Usage Example", "metadata, node_assignments = fasttree_preparation(")
    namespace = run(block.code, {})
    assert len(namespace["metadata"]) == 13
    printed = capsys.readouterr().out
    assert f"Created {TREE.num_nodes} node assignments" in printed
    assert "Metadata contains 13 tensors" in printed


def check_result(torch: Any, found: dict[str, Any], names: tuple[str, str, str, str], capped: float = -1.0) -> None:
    """The example's O, by the names that it gives Q, K, V and O, against float64 dense attention."""
    q, k, v, o = (found[name].cpu().float().numpy() for name in names)
    expected, _ = dense_attention(TREE.parent, TREE.seqlen, TREE.request_node, q, k, v, found["sm_scale"], capped)
    assert found[names[3]].dtype == torch.float16
    assert_close(o, expected, np.float16)


def test_complete_workflow_on_the_cpu(torch: Any, no_gpu: None) -> None:
    code = block_under("Complete Workflow Example", "fasttree_decode(").code
    assert code.count('"cuda"') == 1
    found = run(code.replace('"cuda"', '"cpu"'), {})
    check_result(torch, found, ("Q", "K_tree", "V_tree", "O"))
    assert isinstance(found["metadata"].mid_o, np.ndarray)


@pytest.mark.gpu
def test_complete_workflow_on_the_gpu(torch: Any) -> None:
    found = run(block_under("Complete Workflow Example", "fasttree_decode(").code, {})
    check_result(torch, found, ("Q", "K_tree", "V_tree", "O"))
    assert found["O"].is_cuda


@pytest.mark.parametrize("place", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_decode_example(torch: Any, place: str, request: pytest.FixtureRequest) -> None:
    """Its `metadata` comes from "Assume preparation is done"; the rest, keywords before `*metadata`, runs as it is."""
    if place == "cpu":
        request.getfixturevalue("no_gpu")
    found = run(block_under("Usage Example", "metadata, node_assignments = fasttree_preparation(").code, {})
    code = block_under("Usage Example", "*metadata,  # Unpack 13 metadata tensors").code
    code = code.replace("metadata, _ = fasttree_preparation(...)\n", "").replace("'cuda'", f"'{place}'")
    assert "..." not in code
    run(code, found)
    check_result(torch, found, ("q", "k", "v", "o"))


# Signatures and classes


def our_function(name: str) -> Any:
    return getattr(fasttree_cupy, name, None) or getattr(fasttree_cupy.FastTreeParams, name)


@pytest.mark.parametrize("block", [pytest.param(b, id=b.id) for b in BLOCKS if b.is_signature])
def test_signature(block: Block) -> None:
    """Names in order and defaults; our own additions are keyword-only."""
    (definition,) = ast.parse(block.code.rstrip() + ":\n    pass").body
    assert isinstance(definition, ast.FunctionDef)
    arguments = definition.args
    names = [argument.arg for argument in arguments.args]
    defaults = dict(zip(reversed(names), reversed(arguments.defaults), strict=False))
    ours = inspect.signature(our_function(definition.name)).parameters.values()
    documented = [p for p in ours if p.kind is not p.KEYWORD_ONLY]
    assert [p.name for p in documented] == names
    for parameter in documented:
        assert (parameter.default is not parameter.empty) == (parameter.name in defaults), parameter.name
        # The document's defaults, "cuda" and torch.float16, need a GPU and torch: ours choose by the machine.
        if parameter.name in defaults and definition.name != "qkv_preparation":
            assert parameter.default == ast.literal_eval(defaults[parameter.name]), parameter.name
    assert all(p.default is not p.empty for p in ours if p.kind is p.KEYWORD_ONLY)


def test_params_class() -> None:
    theirs = run(block_under("Class Definition", "class FastTreeParams").code, context())["FastTreeParams"]
    ours = fasttree.FastTreeParams()
    assert list(ours.__dataclass_fields__) == list(theirs.__annotations__)
    for name in theirs.__annotations__:
        assert getattr(ours, name) == getattr(theirs, name), name


def test_node_class() -> None:
    theirs = vars(run(block_under("Class Definition", "class KVTreeNode").code, {})["KVTreeNode"]())
    ours = kv_tree_simple.KVTreeNode()
    assert list(ours.__dataclass_fields__) == list(theirs)
    for name, value in theirs.items():
        assert getattr(ours, name) == value, name


@pytest.mark.parametrize("name", ["FastTreeParams", "KVTreeNode", "retrive_from_file", "qkv_preparation"])
def test_example_modules_and_the_package_hold_the_same(name: str) -> None:
    faces = [module for module in (fasttree, kv_tree_simple, flash_attn_wrap) if hasattr(module, name)]
    assert [getattr(module, name) for module in faces] == [getattr(fasttree_cupy, name)]


# Prose


def test_thirteen_metadata() -> None:
    """The numbered list of the 13 values: names, order, dtypes and dimensions."""
    tree = KVTree.from_levels([1, 3], [8, 4])
    metadata, _ = fasttree.fasttree_preparation(
        tree, tree.kv_ptrs, 3, 4, 4, 16, [1024, 128], [132, 528], [132, 132], fasttree.FastTreeParams(),
        device="cpu", verbose=False,
    )  # fmt: skip
    assert set(re.findall(r"\b(\d+) tensors", TEXT)) == {"13"}
    assert len(metadata) == 13
    listed = re.findall(r"^\d+\. \*\*(\w+)\*\* \(`(\w+)\[(\w+), (.+)\]`\)", TEXT, re.MULTILINE)
    assert [name for name, *_ in listed] == list(MetadataTuple._fields)
    for (name, kind, item, shape), value in zip(listed, metadata, strict=True):
        if kind == "Tensor":
            assert (value.dtype.name, value.ndim) == (item, 1 + shape.count(",")), name
        else:
            assert (kind, item) == ("List", "int")
            assert isinstance(value, list), name
            assert len(value) == int(shape), name
