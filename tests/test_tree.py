"""Trees as nodes, arrays and files: what they hold, and what each mistake is called."""

from __future__ import annotations

import copy
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fasttree_cupy.tree import (
    KVTree,
    KVTreeNode,
    as_tree,
    fill_requests,
    retrive_from_file,
    write_tree_to_file,
)

Nodes = list[KVTreeNode]

# The worked example of docs/TREE_FORMAT.md: node 1 is a leaf, node 2 has two leaves.
EXAMPLE_FILE = "5\n-1 0 128 2\n0 1 64 0\n0 2 32 2\n2 3 16 0\n2 4 16 0\n"


def example() -> Nodes:
    return [
        KVTreeNode(-1, 0, 128, 2, [0, 1, 2]),
        KVTreeNode(0, 1, 64, 0, [0]),
        KVTreeNode(0, 2, 32, 2, [1, 2]),
        KVTreeNode(2, 3, 16, 0, [1]),
        KVTreeNode(2, 4, 16, 0, [2]),
    ]


# Nodes.


def test_node_defaults_are_its_own() -> None:
    node, other = KVTreeNode(), KVTreeNode()
    assert (node.parent, node.id, node.seqlen, node.num_children, node.requests) == (-1, -1, 0, 0, [])
    node.requests.append(1)
    assert other.requests == []


def test_nodes_are_plain_objects() -> None:
    node, equal = example()[1], example()[1]
    assert node == equal
    assert {node: 1, equal: 2}[node] == 1
    assert weakref.ref(node)() is node
    node.text = "mine"  # type: ignore[attr-defined]
    assert copy.deepcopy(node).text == "mine"  # type: ignore[attr-defined]


def test_from_nodes() -> None:
    tree = as_tree(example())
    assert tree.parent.tolist() == [-1, 0, 0, 2, 2]
    assert tree.seqlen.tolist() == [128, 64, 32, 16, 16]
    assert tree.request_node.tolist() == [1, 3, 4]
    assert tree.num_children.tolist() == [2, 0, 2, 0, 0]
    assert (tree.parent.dtype, tree.seqlen.dtype, tree.request_node.dtype) == (np.int32, np.int64, np.int32)
    assert (tree.num_nodes, tree.batch_size, tree.unique_tokens) == (5, 3, 256)
    assert tree.kv_ptrs.tolist() == [0, 128, 192, 224, 240, 256]
    assert tree.path_tokens.tolist() == [192, 176, 176]
    assert as_tree(tree) is tree


def test_round_trip_through_nodes() -> None:
    assert as_tree(example()).to_nodes() == example()


def test_documented_example() -> None:
    """Request 1 ends at the root, an inner node."""
    root, child = KVTreeNode(), KVTreeNode()
    root.id, root.seqlen, root.num_children, root.requests = 0, 128, 1, [0, 1]
    child.parent, child.id, child.seqlen, child.requests = 0, 1, 64, [0]
    assert as_tree([root, child]).request_node.tolist() == [1, 0]


def test_other_kinds_of_node_objects_and_numbers() -> None:
    nodes = [
        SimpleNamespace(parent=-1, id=np.int64(0), seqlen=np.uint8(3), num_children=1, requests=range(1)),
        SimpleNamespace(parent=0, id=1, seqlen=5, num_children=0, requests=np.array([0])),
    ]
    assert as_tree(tuple(nodes)).path_tokens.tolist() == [8]  # type: ignore[arg-type]


def test_requests_in_any_order_and_any_place() -> None:
    tree = KVTree([1, -1, 1, 0], [1, 2, 3, 4], [3, 2, 2, 1, 0])
    nodes = tree.to_nodes()
    assert [node.requests for node in nodes] == [[0, 4], [0, 1, 2, 3, 4], [1, 2], [0]]
    nodes[1].requests.reverse()
    assert as_tree(nodes).request_node.tolist() == [3, 2, 2, 1, 0]


def changed(change: Callable[[Nodes], object]) -> Nodes:
    nodes = example()
    change(nodes)
    return nodes


def setter(i: int, name: str, value: Any) -> Callable[[Nodes], object]:
    return lambda nodes: setattr(nodes[i], name, value)


def cycle(nodes: Nodes) -> None:
    nodes[2].parent = 4
    nodes[0].num_children, nodes[4].num_children = 1, 1


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (setter(3, "num_children", 2), ValueError, r"tree_info\[3\]\.num_children is 2, but 0 nodes name it"),
        (setter(2, "num_children", 1), ValueError, r"tree_info\[2\]\.num_children is 1, but 2 nodes name it"),
        (setter(3, "parent", 1), ValueError, r"tree_info\[1\]\.num_children is 0, but 1 node names it"),
        (setter(4, "id", 5), ValueError, r"tree_info\[4\]\.id is 5, expected 4"),
        (setter(0, "id", -1), ValueError, r"tree_info\[0\]\.id is -1, expected 0"),
        (lambda nodes: nodes.reverse(), ValueError, r"tree_info\[0\]\.id is 4, expected 0"),
        (lambda nodes: nodes.pop(1), ValueError, r"tree_info\[1\]\.id is 2, expected 1"),
        (setter(4, "parent", 5), ValueError, r"tree_info\[4\]\.parent is 5, expected -1 .* 0 to 4"),
        (setter(4, "parent", -2), ValueError, r"tree_info\[4\]\.parent is -2, expected -1"),
        (setter(0, "parent", 1), ValueError, "tree_info: no node has parent -1, expected one root"),
        (setter(2, "parent", -1), ValueError, r"tree_info\[2\]\.parent is -1, but node 0 is a root already"),
        (cycle, ValueError, r"tree_info\[[24]\]\.parent is [24]: node [24] is its own ancestor, a cycle"),
        (setter(1, "parent", 1), ValueError, r"tree_info\[1\]\.parent is 1: node 1 is its own ancestor"),
        (setter(1, "seqlen", -1), ValueError, r"tree_info\[1\]\.seqlen is -1, expected 0 to 2147483647"),
        (setter(1, "seqlen", 2**31), ValueError, r"tree_info\[1\]\.seqlen is 2147483648"),
        (setter(1, "seqlen", 2**70), ValueError, r"tree_info\[1\]\.seqlen is .* does not fit in 64 bits"),
        (setter(1, "seqlen", 64.0), TypeError, r"tree_info\[1\]\.seqlen is 64\.0, expected an integer"),
        (setter(1, "parent", None), TypeError, r"tree_info\[1\]\.parent is None, expected an integer"),
        (setter(1, "id", True), TypeError, r"tree_info\[1\]\.id is True, expected an integer"),
        (setter(2, "num_children", "2"), TypeError, r"tree_info\[2\]\.num_children is '2'"),
        (setter(1, "requests", []), ValueError, r"tree_info\[1\]\.requests: leaf 1 has no request"),
        (
            setter(2, "requests", [2]),
            ValueError,
            r"tree_info\[2\]\.requests misses request 1, which its child 3",
        ),
        (setter(0, "requests", [1, 2]), ValueError, r"tree_info\[0\]\.requests misses request 0"),
        (setter(3, "requests", [1, 1]), ValueError, r"tree_info\[3\]\.requests lists request 1 twice"),
        (setter(0, "requests", [0, 0, 1, 2]), ValueError, r"tree_info\[0\]\.requests lists request 0 twice"),
        (
            setter(4, "requests", [1, 2]),
            ValueError,
            r"tree_info\[4\]\.requests lists request 1, as does tree_info\[3\]\.requests",
        ),
        (
            setter(4, "requests", [-2]),
            ValueError,
            r"tree_info\[4\]\.requests holds -2, but request ids are 0",
        ),
        (setter(0, "requests", [0, 1, 2, 99]), ValueError, r"tree_info\[0\]\.requests holds 99"),
        (setter(0, "requests", [0, 1, 2, 5]), ValueError, r"\(the root\) misses request 3"),
        (setter(1, "requests", [0.0]), TypeError, r"an entry of tree_info\[1\]\.requests is 0\.0"),
        (setter(1, "requests", [False]), TypeError, r"an entry of tree_info\[1\]\.requests is False"),
        (setter(1, "requests", None), TypeError, r"tree_info\[1\]\.requests is NoneType, expected a list"),
        (setter(1, "requests", 5), TypeError, r"tree_info\[1\]\.requests is int, expected a list"),
    ],
)
def test_wrong_nodes(change: Callable[[Nodes], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_tree(changed(change))


def test_unfilled_requests_say_how_to_fill_them() -> None:
    nodes = example()
    for node in nodes:
        node.requests = []
    with pytest.raises(ValueError, match=r"no node lists any requests; fill_requests\(tree_info\)"):
        as_tree(nodes)


@pytest.mark.parametrize(
    ("tree_info", "error", "message"),
    [
        ([], ValueError, "tree_info is empty"),
        (None, TypeError, "tree_info is NoneType, expected a KVTree or a sequence of KVTreeNode"),
        ("tree.txt", TypeError, "tree_info is str"),
        (iter([]), TypeError, "tree_info is list_iterator"),
        ([KVTreeNode(-1, 0, 1, 0, [0]), 7], TypeError, r"tree_info\[1\] is int without parent, id"),
        (
            [SimpleNamespace(parent=-1, id=0, seqlen=1, num_children=0)],
            TypeError,
            r"tree_info\[0\] is SimpleNamespace without requests",
        ),
    ],
)
def test_no_tree(tree_info: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        as_tree(tree_info)


# fill_requests.


def test_fill_requests() -> None:
    nodes = example()
    for node in nodes:
        node.requests = []
    fill_requests(nodes)
    assert nodes == example()
    fill_requests(nodes)
    assert nodes == example()


def test_fill_requests_replaces_nothing() -> None:
    nodes = KVTree([-1, 0], [1, 1], [1, 0]).to_nodes()
    fill_requests(nodes)
    assert [node.requests for node in nodes] == [[0, 1], [0]]


def test_fill_requests_checks_first() -> None:
    nodes = [KVTreeNode(-1, 0, 1, 2), KVTreeNode(0, 1, 1, 0)]
    with pytest.raises(ValueError, match="num_children"):
        fill_requests(nodes)
    assert nodes[1].requests == []


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (KVTreeNode(-1, 0, 1, 0, None), "tree_info[0].requests is NoneType, expected a list of integers"),  # type: ignore[arg-type]
        (
            SimpleNamespace(parent=-1, id=0, seqlen=1, num_children=0),
            "[0] is SimpleNamespace without requests",
        ),
    ],
)
def test_a_node_without_a_list_of_requests_is_named(node: Any, message: str, tmp_path: Path) -> None:
    for call in (as_tree, fill_requests, lambda nodes: write_tree_to_file(nodes, tmp_path / "tree.txt")):
        with pytest.raises(TypeError, match=re.escape(message)):
            call([node])


# Arrays.


def test_copies_are_read_only() -> None:
    tree = KVTree([-1, 0], [1, 2])
    assert tree.kv_ptrs.tolist() == [0, 1, 3]  # computed, and copied along
    for copied in (copy.copy(tree), copy.deepcopy(tree), pickle.loads(pickle.dumps(tree))):
        assert copied.to_nodes() == tree.to_nodes()
        names = ("parent", "seqlen", "request_node", "breadth_first", "num_children", "kv_ptrs", "path_tokens")
        for name in names:
            with pytest.raises(ValueError, match="read-only"):
                getattr(copied, name)[0] = 3


def test_arrays_are_copied_and_read_only() -> None:
    parent = np.array([-1, 0])
    tree = KVTree(parent, [1, 2])
    parent[1] = 7
    assert tree.parent.tolist() == [-1, 0]
    for values in (tree.parent, tree.seqlen, tree.request_node, tree.kv_ptrs, tree.path_tokens):
        with pytest.raises(ValueError, match="read-only"):
            values[0] = 3
    with pytest.raises(AttributeError):
        tree.parent = parent  # type: ignore[misc]


def test_ids_in_any_order() -> None:
    tree = KVTree([3, 0, 0, -1], [1, 2, 4, 8])
    assert tree.request_node.tolist() == [1, 2]
    assert tree.breadth_first.tolist() == [3, 0, 1, 2]
    assert tree.path_tokens.tolist() == [11, 13]


def test_node_requests() -> None:
    offsets, requests = as_tree(example()).node_requests()
    assert offsets.tolist() == [0, 3, 4, 6, 7, 8]
    assert requests.tolist() == [0, 1, 2, 0, 1, 2, 1, 2]


def test_from_levels() -> None:
    tree = KVTree.from_levels([1, 2, 5], [100, 10, 1])
    assert tree.parent.tolist() == [-1, 0, 0, 1, 1, 1, 2, 2]
    assert tree.seqlen.tolist() == [100, 10, 10, 1, 1, 1, 1, 1]
    assert tree.request_node.tolist() == [3, 4, 5, 6, 7]
    assert KVTree.from_levels([1], [7]).path_tokens.tolist() == [7]


def test_from_levels_that_narrow() -> None:
    """A level may be smaller than the one above: some nodes above are leaves."""
    tree = KVTree.from_levels([1, 4, 2], [1, 1, 1])
    assert tree.parent.tolist() == [-1, 0, 0, 0, 0, 1, 3]
    assert tree.request_node.tolist() == [2, 4, 5, 6]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "parent is empty"),
        (([-1, 0], [1]), ValueError, "seqlen has 1 entries, expected .* 2"),
        (([-1, 0], [1, -5]), ValueError, r"seqlen\[1\] is -5"),
        (([-1, 2], [1, 1]), ValueError, r"parent\[1\] is 2"),
        (([-1, -1], [1, 1]), ValueError, r"parent\[1\] is -1, but node 0 is a root already"),
        (([1, 0], [1, 1]), ValueError, "parent: no node has parent -1"),
        (([-1, 2, 1], [1, 1, 1]), ValueError, r"parent\[\d\] is \d: .* a cycle"),
        (([-1, 0.0], [1, 1]), TypeError, r"parent\[1\] is 0\.0"),
        ((np.array([-1.0]), [1]), TypeError, "parent is float64"),
        (([-1], [True]), TypeError, r"seqlen\[0\] is True"),
        ((5, [1]), TypeError, "parent is int"),
        (([-1, 0], [1, 1], [2]), ValueError, r"request_node\[0\] is 2, expected a node id from 0 to 1"),
        (([-1, 0], [1, 1], [-1]), ValueError, r"request_node\[0\] is -1"),
        (([-1, 0], [1, 1], [0]), ValueError, "request_node: leaf 1 has no request"),
        (([-1, 0], [1, 1], []), ValueError, "request_node: leaf 1 has no request"),
    ],
)
def test_wrong_arrays(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVTree(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], []), ValueError, "nodes_per_level is"),
        (([2, 4], [1, 1]), ValueError, r"nodes_per_level is \[2, 4\], expected a first level of 1 node"),
        (([1, 0], [1, 1]), ValueError, r"nodes_per_level is \[1, 0\], expected at least 1 node a level"),
        (([1, 2], [1]), ValueError, "tokens_per_level has 1 entries, expected one a level: 2"),
        (([1, 2.0], [1, 1]), TypeError, r"nodes_per_level\[1\] is 2\.0"),
        (([1, 2], [1, -1]), ValueError, r"tokens_per_level is \[1, -1\], expected no negative"),
    ],
)
def test_wrong_levels(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVTree.from_levels(*arguments)


def test_from_parents_of_one_tree() -> None:
    tree, same = KVTree.from_parents([-1, 0, 0], [3, 1, 2], [1, 2, 1]), KVTree([-1, 0, 0], [3, 1, 2], [1, 2, 1])
    for name in ("parent", "seqlen", "request_node"):
        assert getattr(tree, name).tolist() == getattr(same, name).tolist()


def test_from_parents_of_a_forest() -> None:
    forest = KVTree.from_parents([-1, 0, -1, 0, 2], [3, 1, 2, 4, 5])
    assert forest.parent.tolist() == [5, 0, 5, 0, 2, -1]
    assert forest.seqlen.tolist() == [3, 1, 2, 4, 5, 0]
    assert forest.request_node.tolist() == [1, 3, 4]
    # Rows are those of the nodes as given: the one that is put above them has none.
    assert [forest.request_rows(i).tolist() for i in range(3)] == [
        [0, 1, 2, 3],
        [0, 1, 2, 6, 7, 8, 9],
        [4, 5, 10, 11, 12, 13, 14],
    ]


def test_a_forest_of_lone_requests() -> None:
    forest = KVTree.from_parents([-1] * 4, [2, 0, 3, 1], request_node=[3, 2, 1, 0, 3])
    assert [len(forest.request_rows(i)) for i in range(5)] == [1, 3, 0, 2, 1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([-1, -1, 3], [1, 1, 1]), r"parent\[2\] is 3, expected -1 \(a root\) or a node id from 0 to 2"),
        (([-1, -1, -2], [1, 1, 1]), r"parent\[2\] is -2, expected -1"),
        (([-1, -1], [1]), "seqlen has 1 entries, expected one a node as in parent: 2"),
        (([-1, -1], [1, -1]), r"seqlen\[1\] is -1"),
        (([-1, -1], [1, 1], [0, 1, 2]), r"request_node\[2\] is 2, expected a node id from 0 to 1"),
        (([-1, -1], [1, 1], [0, 7]), r"request_node\[1\] is 7, expected a node id from 0 to 1"),
        (([-1, -1], [1, 1], [-1, 0]), r"request_node\[0\] is -1, expected a node id from 0 to 1"),
        (([-1, -1], [1, 1], [0]), "request_node: leaf 1 has no request"),
        (([0, 0], [1, 1]), "expected one root"),
        (([], []), "parent is empty"),
    ],
)
def test_wrong_parents(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVTree.from_parents(*arguments)


# Files.


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tree.txt"


def test_read(path: Path) -> None:
    path.write_text(EXAMPLE_FILE)
    assert retrive_from_file(str(path)) == example()
    assert KVTree.from_file(path).to_nodes() == example()


def test_read_lines_in_any_order(path: Path) -> None:
    """Blank lines, spaces and Windows line ends do not matter either."""
    count, *lines = EXAMPLE_FILE.splitlines()
    path.write_bytes("\r\n".join([count, *reversed(lines), "", " "]).replace(" 0", "\t 0").encode())
    assert retrive_from_file(path) == example()


def test_round_trip(path: Path) -> None:
    write_tree_to_file(example(), path)
    assert path.read_bytes() == EXAMPLE_FILE.encode()
    tree = KVTree.from_levels([1, 3, 7], [10, 0, 3])
    tree.to_file(path)
    assert retrive_from_file(path) == tree.to_nodes()


def test_write_unfilled_nodes(path: Path) -> None:
    nodes = example()
    for node in nodes:
        node.requests = []
    write_tree_to_file(nodes, str(path))
    assert path.read_text() == EXAMPLE_FILE
    assert all(node.requests == [] for node in nodes)


@pytest.mark.parametrize("request_node", [[1, 0], [1, 1]])
def test_write_requests_that_a_file_cannot_hold(path: Path, request_node: list[int]) -> None:
    with pytest.raises(ValueError, match="requests: a tree file holds none"):
        write_tree_to_file(KVTree([-1, 0], [1, 1], request_node), path)
    assert not path.exists()


def test_write_checks_first(path: Path) -> None:
    with pytest.raises(ValueError, match=r"tree_info\[3\]\.num_children"):
        write_tree_to_file(changed(setter(3, "num_children", 2)), path)
    assert not path.exists()


def test_no_file(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        retrive_from_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the file is empty, expected the number of nodes"),
        (" \n\n", "line 1: the file is empty"),
        ("five\n", "line 1: 'five', expected the number of nodes"),
        ("-1 0 128 0\n", "line 1: '-1 0 128 0', expected the number of nodes"),
        ("0\n", "line 1: '0', expected the number of nodes"),
        ("2\n-1 0 128 1\n", r"line 2: the file ends after 1 nodes, line 1 promises 2"),
        ("1\n-1 0 128 0\n0 1 64 0\n", "line 3: expected the end, line 1 promises 1 nodes"),
        ("1\n-1 0 128 0\nend\n", "line 3: expected the end"),
        ("1\n-1 0 x 0\n", "line 2: '-1 0 x 0', expected 4 integers"),
        ("1\n-1 0 1.5 0\n", "line 2: '-1 0 1.5 0', expected 4 integers"),
        ("1\n-1 0 1_0 0\n", "line 2: '-1 0 1_0 0', expected 4 integers"),
        ("1\n\n-1 0 128\n", "line 3: 3 fields, expected 4 integers"),
        ("1\n-1 0 128 0 0\n", "line 2: 5 fields, expected 4 integers"),
        ("2\n-1 0 128 1\n0 0 64 0\n", "line 3: id is 0, expected each of 0 to 1 once"),
        ("2\n-1 0 128 1\n0 2 64 0\n", "line 3: id is 2, expected each of 0 to 1 once"),
        ("2\n0 1 64 0\n-1 0 128 2\n", "line 3: num_children is 2, but 1 node names it as its parent"),
        ("2\n0 1 -64 0\n-1 0 128 1\n", "line 2: seqlen is -64"),
        ("2\n-1 0 128 1\n7 1 64 0\n", "line 3: parent is 7"),
        ("2\n-1 0 128 1\n-1 1 64 0\n", "line 3: parent is -1, but node 0 is a root already"),
        ("1\n0 0 128 0\n", "no node has parent -1"),
        ("3\n-1 0 1 0\n2 1 1 1\n1 2 1 1\n", "a cycle"),
    ],
)
def test_wrong_file(path: Path, text: str, message: str) -> None:
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        retrive_from_file(path)
    assert str(caught.value).startswith(str(path))


def test_binary_file(path: Path) -> None:
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not a text file"):
        retrive_from_file(path)


def test_document_shows_this_example() -> None:
    document = Path(__file__).parents[1] / "docs" / "TREE_FORMAT.md"
    assert f"```text\n{EXAMPLE_FILE}```" in document.read_text(encoding="utf-8")


def test_unsigned_numbers_do_not_wrap() -> None:
    with pytest.raises(ValueError, match="parent holds 18446744073709551615"):
        KVTree(np.array([2**64 - 1], np.uint64), [1])
