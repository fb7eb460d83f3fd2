"""Trees of token sequences and of block tables, against a trie of plain dictionaries."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from fasttree_cupy.tree import KVTree

Rng = np.random.Generator
INT32_MAX = 2**31 - 1


# The oracle: a trie of one token a vertex, vertices numbered as they are made; vertex v > 0 is row v - 1.


class Expected(NamedTuple):
    parent: list[int]
    seqlen: list[int]
    request_node: list[int]
    request_rows: list[list[int]]
    tokens: list[Any]
    """The token of each row."""


def trie(requests: Sequence[Sequence[Hashable]]) -> Expected:
    children: list[dict[Hashable, int]] = [{}]
    above, tokens, paths = [-1], [], []
    for request in requests:
        path = [0]
        for token in request:
            if token not in children[path[-1]]:
                children[path[-1]][token] = len(children)
                children.append({})
                above.append(path[-1])
                tokens.append(token)
            path.append(children[path[-1]][token])
        paths.append(path)

    # A node begins where paths part or one ends; where neither is at vertex 0, the root begins at vertex 1.
    ends = {path[-1] for path in paths}
    starts = [0] if 0 in ends or len(children[0]) > 1 else [1]
    starts += [v for v in range(starts[0] + 1, len(children)) if above[v] in ends or len(children[above[v]]) > 1]
    node_of: dict[int, int] = {}
    for v in range(starts[0], len(children)):
        node_of[v] = starts.index(v) if v in starts else node_of[above[v]]
    return Expected(
        parent=[node_of.get(above[v], -1) for v in starts],
        seqlen=[sum(node == i and v > 0 for v, node in node_of.items()) for i in range(len(starts))],
        request_node=[node_of[path[-1]] for path in paths],
        request_rows=[[v - 1 for v in path[1:]] for path in paths],
        tokens=tokens,
    )


def check(tree: KVTree, expected: Expected) -> None:
    assert tree.parent.tolist() == expected.parent
    assert tree.seqlen.tolist() == expected.seqlen
    assert tree.request_node.tolist() == expected.request_node
    assert [tree.request_rows(r).tolist() for r in range(tree.batch_size)] == expected.request_rows


def related(rng: Rng, batch_size: int, alphabet: int, longest: int) -> list[list[int]]:
    """Sequences of which many begin as an earlier one does, or end inside one, or are one."""
    made: list[list[int]] = []
    for _ in range(batch_size):
        old = made[rng.integers(len(made))] if made and rng.random() < 0.8 else []
        kept = old[: int(rng.integers(len(old) + 1))] if rng.random() < 0.8 else old
        new = rng.integers(alphabet, size=int(rng.integers(longest // 2 + 1)) if rng.random() < 0.8 else 0)
        made.append([*kept, *map(int, new)][:longest])
    return made


# Sequences.


@pytest.mark.parametrize("seed", range(100))
def test_random_sequences(seed: int) -> None:
    rng = np.random.default_rng(seed)
    sequences = related(rng, int(rng.integers(1, 20)), int(rng.choice([1, 2, 3, 50])), int(rng.choice([3, 12, 40])))
    expected = trie(sequences)
    tree = KVTree.from_sequences(sequences)
    check(tree, expected)
    rows = np.array(expected.tokens, np.int64)
    for r, sequence in enumerate(sequences):
        assert rows[tree.request_rows(r)].tolist() == sequence


@pytest.mark.parametrize(
    ("sequences", "parent", "seqlen", "request_node"),
    [
        ([[5, 6, 7]], [-1], [3], [0]),
        ([[5, 6, 7, 8], [5, 6, 9]], [-1, 0, 0], [2, 2, 1], [1, 2]),
        ([[5, 6, 7, 8], [5, 6]], [-1, 0], [2, 2], [1, 0]),
        ([[5, 6], [5, 6, 7, 8]], [-1, 0], [2, 2], [0, 1]),
        ([[5, 6], [5, 6]], [-1], [2], [0, 0]),
        ([[5, 6], [7]], [-1, 0, 0], [0, 2, 1], [1, 2]),
        ([[], [7, 8]], [-1, 0], [0, 2], [0, 1]),
        ([[7, 8], []], [-1, 0], [0, 2], [1, 0]),
        ([[], []], [-1], [0], [0, 0]),
        ([[1, 2, 3, 4], [1, 2, 3, 5], [1, 6]], [-1, 0, 1, 1, 0], [1, 2, 1, 1, 1], [2, 3, 4]),
    ],
)
def test_sequences_by_hand(
    sequences: list[list[int]], parent: list[int], seqlen: list[int], request_node: list[int]
) -> None:
    tree = KVTree.from_sequences(sequences)
    assert (tree.parent.tolist(), tree.seqlen.tolist(), tree.request_node.tolist()) == (parent, seqlen, request_node)


def test_rows_are_in_the_order_of_the_requests() -> None:
    tree = KVTree.from_sequences([[1, 2, 3], [1, 2, 9, 9], [1, 2, 3, 4]])
    assert [tree.request_rows(r).tolist() for r in range(3)] == [[0, 1, 2], [0, 1, 3, 4], [0, 1, 2, 5]]
    assert tree.request_rows(np.int32(1)).dtype == np.int64  # type: ignore[arg-type]


@pytest.mark.parametrize("step", [1, -1, 2**20, 2**40, 2**62 // 700])
def test_many_children(step: int) -> None:
    """Children of one node are told apart by their tokens, however these are spread."""
    sequences = [[9, k * step] for k in range(700)] * 2
    tree = KVTree.from_sequences(np.array(sequences))
    assert tree.num_nodes == 701
    assert tree.request_node.tolist() == [*range(1, 701)] * 2


class Foreign:
    """An array of another framework, on the host or not."""

    def __init__(self, values: Any, on_host: bool = True) -> None:
        self.values, self.on_host = np.array(values), on_host

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if not self.on_host:
            raise TypeError("implicit conversion is not allowed")
        return self.values


def test_kinds_of_sequences() -> None:
    expected = trie([[1, 2], [1, 3], [1]])
    kinds: tuple[Any, ...] = (
        ((1, 2), np.array([1, 3], np.uint8), np.array([1], np.int32)),
        [Foreign([1, 2]), range(1, 4, 2), [np.int64(1)]],
        iter([[1, 2], [1, 3], [1]]),
    )
    for sequences in kinds:
        check(KVTree.from_sequences(sequences), expected)


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ([], ValueError, "token_ids is empty, expected a sequence a request"),
        (None, TypeError, "token_ids is NoneType, expected a sequence of integer sequences"),
        ("text", TypeError, "token_ids is str, expected"),
        (["text"], TypeError, r"token_ids\[0\] is str, expected a sequence of integers"),
        ([[1], 2], TypeError, r"token_ids\[1\] is int, expected a sequence of integers"),
        (np.array(5), ValueError, r"token_ids has shape \(\), expected a row of integers a request"),
        (np.array([1, 2]), ValueError, r"token_ids\[0\] has shape \(\), expected one dimension"),
        ([[1], [2, 3.0]], TypeError, r"token_ids\[1\]\[1\] is 3\.0, expected an integer"),
        ([[True]], TypeError, r"token_ids\[0\]\[0\] is True, expected an integer"),
        ([[1], np.zeros(2)], TypeError, r"token_ids\[1\] is float64, expected integers"),
        ([np.zeros((2, 2), int)], ValueError, r"token_ids\[0\] has shape \(2, 2\), expected one dimension"),
        ([[2**63]], ValueError, r"token_ids\[0\]\[0\] is 9223372036854775808, which does not fit .*, expected "),
        ([np.array([2**63], np.uint64)], ValueError, r"token_ids\[0\] holds 9223372036854775808, .*, expected "),
        ([np.ma.array([1, 2], mask=[0, 1])], TypeError, r"token_ids\[0\] is masked, expected an array without a mask"),
        ([Foreign([1], on_host=False)], TypeError, r"token_ids\[0\] is Foreign, expected an array in host memory"),
    ],
)
def test_wrong_sequences(token_ids: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVTree.from_sequences(token_ids)


@pytest.mark.parametrize(
    ("request_id", "error", "message"),
    [
        (2, ValueError, "request is 2, expected 0 to 1"),
        (-1, ValueError, "request is -1"),
        (0.0, TypeError, r"request is 0\.0, expected an integer"),
    ],
)
def test_wrong_request(request_id: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVTree.from_sequences([[1], [2]]).request_rows(request_id)


def test_request_rows_of_any_tree() -> None:
    """Ids in any order, and nodes without tokens."""
    tree = KVTree([3, 0, 0, -1, 3], [1, 2, 0, 3, 1], [1, 2, 3, 4])
    assert [tree.request_rows(r).tolist() for r in range(4)] == [
        [3, 4, 5, 0, 1, 2],
        [3, 4, 5, 0],
        [3, 4, 5],
        [3, 4, 5, 6],
    ]


# Block tables.


def pool_rows(pages: Sequence[int], length: int, page_size: int) -> list[int]:
    return [pages[t // page_size] * page_size + t % page_size for t in range(length)]


def check_block_tables(tables: npt.NDArray[Any], seq_lens: Sequence[int], page_size: int) -> KVTree:
    tree, kv_indices = KVTree.from_block_tables(tables, seq_lens, page_size)
    requests = [pool_rows(pages, n, page_size) for pages, n in zip(tables.tolist(), seq_lens, strict=True)]
    expected = trie(requests)
    check(tree, expected)
    assert kv_indices.dtype == np.int32
    assert kv_indices.tolist() == expected.tokens
    for r, rows in enumerate(requests):
        assert kv_indices[tree.request_rows(r)].tolist() == rows
    return tree


@pytest.mark.parametrize("page_size", [1, 2, 3, 16])
@pytest.mark.parametrize("seed", range(30))
def test_random_block_tables(seed: int, page_size: int) -> None:
    """Rows of related pages; lengths end on and inside pages, padding is whatever the memory held."""
    rng = np.random.default_rng([seed, page_size])
    pages = related(rng, int(rng.integers(1, 20)), int(rng.choice([1, 2, 40])), 8)
    tables = rng.integers(-(2**31), 2**31, (len(pages), 9)).astype(f"int{rng.choice([32, 64])}")
    seq_lens = []
    for row, own in zip(tables, pages, strict=True):
        row[: len(own)] = own
        last = 0 if rng.random() < 0.4 else int(rng.integers(page_size))
        seq_lens.append(max(len(own) * page_size - last, 0))
    check_block_tables(tables, seq_lens, page_size)


@pytest.mark.parametrize(
    ("tables", "seq_lens", "seqlen", "request_node"),
    [
        # Both fill page 7 in part, one further: the shorter ends at an inner node.
        ([[3, 7], [3, 7]], [6, 7], [6, 1], [0, 1]),
        ([[3, 7], [3, 7]], [7, 6], [6, 1], [1, 0]),
        ([[3, 7], [3, 7]], [6, 6], [6], [0, 0]),
        # The one goes on after the page.
        ([[3, 7, 0], [3, 7, 5]], [6, 10], [6, 4], [0, 1]),
        # Three lengths inside one page, then a fork after it.
        ([[7, 0], [7, 0], [7, 1], [7, 2]], [1, 3, 5, 6], [1, 2, 1, 1, 2], [0, 1, 3, 4]),
        # Pages differ where both are partly filled.
        ([[3, 7], [3, 8]], [6, 6], [4, 2, 2], [1, 2]),
        # One page after different pages is no shared prefix.
        ([[3, 7], [4, 7]], [8, 8], [0, 8, 8], [1, 2]),
        # A page twice in one table.
        ([[3, 3, 3]], [10], [10], [0]),
        ([[3, 3], [3, 4]], [0, 8], [0, 8], [0, 1]),
    ],
)
def test_block_tables_by_hand(
    tables: list[list[int]], seq_lens: list[int], seqlen: list[int], request_node: list[int]
) -> None:
    tree = check_block_tables(np.array(tables), seq_lens, 4)
    assert (tree.seqlen.tolist(), tree.request_node.tolist()) == (seqlen, request_node)


def test_block_tables_of_a_large_batch() -> None:
    """1,024 requests of 128 pages on three levels, 64 + 56 + 8 pages, ids in no order."""
    nodes = np.split(np.random.default_rng(0).permutation(64 + 16 * 56 + 1024 * 8), [64, 64 + 16 * 56])
    request = np.arange(1024)
    levels = [nodes[0].reshape(1, 64), nodes[1].reshape(16, 56), nodes[2].reshape(1024, 8)]
    tables = np.hstack([level[request * len(level) // 1024] for level in levels]).astype(np.int32)
    tree, kv_indices = KVTree.from_block_tables(tables, np.full(1024, 128 * 16), 16)
    assert tree.num_nodes == 1 + 16 + 1024
    assert sorted(tree.seqlen.tolist()) == [8 * 16] * 1024 + [56 * 16] * 16 + [64 * 16]
    assert tree.unique_tokens == len(set(kv_indices.tolist())) == 16 * sum(map(len, nodes))
    tokens = (tables[:, :, None] * 16 + np.arange(16)).reshape(1024, -1)
    for r in (0, 1, 63, 64, 500, 1023):
        assert np.array_equal(kv_indices[tree.request_rows(r)], tokens[r])


def test_kinds_of_block_tables() -> None:
    expected = KVTree.from_block_tables([[3, 7], [3, 8]], [6, 6], 4)
    columns = np.array([[3, 0, 7, 0], [3, 0, 8, 0]], np.int16)[:, ::2]
    for tables in (columns, np.asfortranarray(columns, np.uint64), Foreign(columns), ((3, 7), (3, 8))):
        tree, kv_indices = KVTree.from_block_tables(tables, Foreign([6, 6]), np.int64(4))  # type: ignore[arg-type]
        assert tree.parent.tolist() == expected[0].parent.tolist()
        assert kv_indices.tolist() == expected[1].tolist()


def test_block_tables_are_left_alone() -> None:
    tables = np.arange(6).reshape(2, 3)
    tables.flags.writeable = False
    _, kv_indices = KVTree.from_block_tables(tables, [3, 3], 1)
    kv_indices[:] = -1
    assert tables.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_no_tokens() -> None:
    for tables in (np.zeros((2, 0), int), [[], []]):
        for lengths in (np.array([0, 0]), [0, 0]):
            tree, kv_indices = KVTree.from_block_tables(tables, lengths, 16)
            assert (tree.seqlen.tolist(), tree.request_node.tolist(), kv_indices.tolist()) == ([0], [0, 0], [])
    assert KVTree.from_sequences([np.array([]), []]).seqlen.tolist() == [0]


def test_last_pool_row() -> None:
    _, kv_indices = KVTree.from_block_tables([[2**27 - 1]], [16], 16)
    assert kv_indices.tolist() == list(range(2**31 - 16, 2**31))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([[1, -1]], [5], 4), ValueError, r"block_tables\[0, 1\] is -1, expected a page number from 0 to 536870911"),
        (([[0, 1, 9], [0, 1, -3]], [4, 12], 4), ValueError, r"block_tables\[1, 2\] is -3"),
        (([[2**27]], [1], 16), ValueError, r"block_tables\[0, 0\] is 134217728, expected .* 0 to 134217727"),
        ((np.array([[2**64 - 1]], np.uint64), [1], 1), ValueError, r"block_tables\[0, 0\] is 18446744073709551615"),
        (([[0, 1]], [9], 4), ValueError, r"seq_lens\[0\] is 9, expected 0 to 8: 2 pages of 4 tokens a row"),
        (([[0], [1]], [4, -1], 4), ValueError, r"seq_lens\[1\] is -1, expected 0 to 4"),
        (([[0], [1]], [4], 4), ValueError, "seq_lens has 1 entries, expected one a row of block_tables: 2"),
        (([[0]], 4, 4), TypeError, "seq_lens is int, expected a sequence of integers"),
        (([[0]], [4.0], 4), TypeError, r"seq_lens\[0\] is 4\.0, expected an integer"),
        (([[0]], np.array([[4]]), 4), ValueError, r"seq_lens has shape \(1, 1\), expected one dimension"),
        (([0, 1], [4, 4], 4), ValueError, r"block_tables has shape \(2,\), expected two dimensions"),
        (([], [], 4), ValueError, r"block_tables has shape \(0,\), expected two dimensions"),
        ((np.zeros((0, 4), int), [], 4), ValueError, "block_tables is empty, expected a row a request"),
        (([[0, 1], [0]], [4, 4], 4), ValueError, "block_tables has rows of different lengths"),
        (([[0.0]], [4], 4), TypeError, "block_tables is float64, expected integers"),
        (([[True]], [1], 4), TypeError, "block_tables is bool, expected integers"),
        (([[True, 5]], [2], 4), TypeError, "block_tables holds a bool, expected integers"),
        (((np.array([True]), [5]), [1, 1], 4), TypeError, "block_tables holds a bool, expected integers"),
        ((np.ma.array([[0, 5]], mask=[[0, 1]]), [2], 4), TypeError, "block_tables is masked, expected an array"),
        (([np.ma.array([0, 5], mask=[0, 1])], [2], 4), TypeError, "block_tables is masked, expected an array"),
        (([[None]], [1], 4), TypeError, "block_tables is object, expected integers"),
        ((Foreign([[0]], on_host=False), [4], 4), TypeError, "block_tables is Foreign, expected an array in host"),
        (([[0]], [4], 0), ValueError, f"page_size is 0, expected 1 to {INT32_MAX}"),
        (([[0]], [4], 4.0), TypeError, r"page_size is 4\.0, expected an integer"),
        (([[0]], [4], 2**31), ValueError, f"page_size is 2147483648, expected 1 to {INT32_MAX}"),
    ],
)
def test_wrong_block_tables(arguments: tuple[Any, Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KVTree.from_block_tables(*arguments)


@pytest.mark.parametrize("problem", ["requires grad", "negative bit", "BFloat16"])
def test_tensors_that_numpy_cannot_read_are_refused(problem: str, torch: Any) -> None:
    tensor = torch.ones(1, 2, dtype=torch.bfloat16 if problem == "BFloat16" else torch.float32)
    if problem == "requires grad":
        tensor.requires_grad = True
    elif problem == "negative bit":
        tensor = torch._neg_view(tensor)
    calls = {
        "token_ids": lambda: KVTree.from_sequences(tensor),
        r"token_ids\[0\]": lambda: KVTree.from_sequences([tensor[0]]),
        "block_tables": lambda: KVTree.from_block_tables(tensor, [2], 1),
        "seqlen": lambda: KVTree([-1], tensor[0]),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} is Tensor, expected an array in host memory .*{problem}"):
            call()
