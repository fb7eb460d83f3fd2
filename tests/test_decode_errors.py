"""fasttree_decode refuses wrong arguments: the error names the argument, and nothing was written."""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from fasttree_cupy.checks import overlaps
from fasttree_cupy.decode import check_metadata, check_phases, fasttree_decode
from fasttree_cupy.execution.arrays import view
from fasttree_cupy.metadata import MetadataTuple
from fasttree_cupy.params import FastTreeParams
from fasttree_cupy.preparation import fasttree_preparation
from fasttree_cupy.tree import KVTree

TREE = KVTree.from_levels([1, 2, 4], [8, 16, 32])
BATCH, HEADS, KV_HEADS, DIM = 4, 8, 2, 64
INDICES = MetadataTuple._fields[:9]
PAIRS = ("phase_node_nums", "phase_node_offsets", "phase_q_tile_sizes", "phase_kv_tile_sizes")
SENTINEL = 0x5A  # in every byte that a decode may write
NUMBERS = ("sm_scale", "logit_cap")

Arguments = dict[str, Any]
Change = Callable[[Arguments], Arguments]


def cpu_arguments() -> Arguments:
    """A right call's arguments by their names, in order; o, mid_o and mid_lse hold the sentinel."""
    params = FastTreeParams.for_gpu("H100", HEADS // KV_HEADS)
    metadata, _ = fasttree_preparation(
        TREE, TREE.kv_ptrs, BATCH, HEADS, KV_HEADS, DIM, [1024, 128], [132, 528], [132, 132], params,
        device="cpu", verbose=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = [(BATCH, HEADS, DIM), *[(TREE.unique_tokens, KV_HEADS, DIM)] * 2]
    q, k, v = (rng.standard_normal(shape, np.float32).astype(np.float16) for shape in shapes)
    arguments = {"q": q, "k_buffer": k, "v_buffer": v, "o": np.empty_like(q), **metadata._asdict()}
    for name in ("o", "mid_o", "mid_lse"):
        arguments[name].view(np.uint8)[...] = SENTINEL
    return arguments | {
        "phase_q_tile_sizes": params.TSQs,
        "phase_kv_tile_sizes": params.TSKs,
        "sm_scale": DIM**-0.5,
        "logit_cap": -1.0,
    }


@pytest.fixture
def arguments() -> Arguments:
    return cpu_arguments()


def host_bytes(value: Any) -> bytes:
    return (value.get() if hasattr(value, "get") else value).tobytes()


def refused(error: type[Exception], message: str, before: Arguments, call: Callable[[], object]) -> None:
    """`call` raises, the message matches from its start, and every array in `before` is as it was."""
    arrays = {name: value for name, value in before.items() if type(value).__name__ == "ndarray"}  # NumPy's and CuPy's
    bytes_before = {name: host_bytes(value) for name, value in arrays.items()}
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert re.match(message, str(caught.value)), f"{caught.value} does not start with {message}"
    for name, value in arrays.items():
        assert host_bytes(value) == bytes_before[name], f"{name} was written"


def check(arguments: Arguments, change: Change | Arguments, error: type[Exception], message: str) -> None:
    changes = change(arguments) if callable(change) else change
    changed = arguments | changes
    before = arguments | {f"changed {name}": value for name, value in changes.items()}
    refused(error, message, before, lambda: fasttree_decode(**changed))


def replaced(name: str, make: Callable[[Any], Any]) -> Change:
    """The argument, made from its right value."""
    return lambda arguments: {name: make(arguments[name])}


def filled(name: str, index: int, value: int) -> Change:
    """An index array with one wrong entry."""

    def change(array: Any) -> Any:
        wrong = array.copy()
        wrong[index] = value
        return wrong

    return replaced(name, change)


def spread(array: Any) -> Any:
    """The same values, every second element of its memory along the last axis."""
    wide = np.zeros((*array.shape[:-1], 2 * array.shape[-1]), array.dtype)
    wide[..., ::2] = array
    return wide[..., ::2]


def read_only(array: Any) -> Any:
    copied = array.copy()
    copied.flags.writeable = False
    return copied


def test_the_unchanged_call_is_right(arguments: Arguments) -> None:
    """Else the tests below would pass for any reason."""
    fasttree_decode(**arguments)
    assert np.isfinite(arguments["o"].astype(np.float32)).all()
    assert not (arguments["o"].view(np.uint8) == SENTINEL).all(axis=(1, 2)).any()


@pytest.mark.parametrize("name", ["o", "mid_o", "mid_lse"])
def test_a_write_before_the_error_would_be_seen(arguments: Arguments, name: str) -> None:
    def writes_and_raises() -> None:
        arguments[name][-1] = 0
        raise ValueError("q is wrong")

    with pytest.raises(AssertionError, match=f"{name} was written"):
        refused(ValueError, "q is wrong", arguments, writes_and_raises)


# Every array, given as something else

ARRAYS = ("q", "k_buffer", "v_buffer", "o", *MetadataTuple._fields[:11])


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("value", [3, 2.0, "array", None, np.ndarray, [1, 2], ()], ids=repr)
def test_no_array(arguments: Arguments, name: str, value: Any) -> None:
    if name == "o" and value is None:
        assert fasttree_decode(**arguments | {"o": None}).shape == (BATCH, HEADS, DIM)
        return
    check(arguments, {name: value}, TypeError, rf"{name}: expected an array \(")


@pytest.mark.parametrize("name", ARRAYS)
def test_list_of_the_right_numbers(arguments: Arguments, name: str) -> None:
    check(arguments, replaced(name, lambda a: a.tolist()), TypeError, f"{name}: expected an array .* got list")


@pytest.mark.parametrize("name", ARRAYS)
@pytest.mark.parametrize("dtype", ["float64", "int64", "uint16", "bool", "complex64", "O", "int16", ">i4", ">f2"])
def test_unknown_dtype(arguments: Arguments, name: str, dtype: str) -> None:
    check(
        arguments, replaced(name, lambda a: np.zeros(a.shape, dtype)), TypeError, f"{name}: dtype .* is not supported"
    )


KNOWN_DTYPES = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
    "int32": np.int32,
    "int8": np.int8,
    "uint8": np.uint8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
RIGHT_DTYPES = {"mid_o": "float32", "mid_lse": "float32"} | dict.fromkeys(INDICES, "int32")
WRONG_DTYPES = [(name, d) for name in ARRAYS for d in KNOWN_DTYPES if d != RIGHT_DTYPES.get(name, "float16")]


@pytest.mark.parametrize(("name", "dtype"), WRONG_DTYPES)
def test_dtype_of_another_argument(arguments: Arguments, name: str, dtype: str) -> None:
    # Where q is bfloat16, k_buffer is the first that disagrees.
    named = "k_buffer" if (name, dtype) == ("q", "bfloat16") else name
    change = replaced(name, lambda a: np.zeros(a.shape, KNOWN_DTYPES[dtype]))
    check(arguments, change, TypeError, f"{named} has dtype .*, expected ")


@pytest.mark.parametrize("name", ARRAYS)
def test_elements_off_their_alignment(arguments: Arguments, name: str) -> None:
    def shifted(array: Any) -> Any:
        memory = np.zeros(array.nbytes + 1, np.uint8)
        return memory[1:].view(array.dtype).reshape(array.shape)

    check(arguments, replaced(name, shifted), ValueError, f"{name}: elements must lie at multiples of their size")


# Q, K, V and O


@pytest.mark.parametrize("name", ARRAYS[:4])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda a: a[0], id="2d"),
        pytest.param(lambda a: a[None], id="4d"),
        pytest.param(lambda a: a.reshape(-1), id="1d"),
        pytest.param(lambda a: a.reshape(-1)[:1].reshape(()), id="0d"),
    ],
)
def test_number_of_dimensions(arguments: Arguments, name: str, make: Callable[[Any], Any]) -> None:
    check(arguments, replaced(name, make), ValueError, rf"{name} has shape \(.*\), expected three dimensions")


@pytest.mark.parametrize("name", ARRAYS[:4])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(spread, id="every_second"),
        pytest.param(lambda a: a[..., ::-1], id="backwards"),
        pytest.param(lambda a: np.asfortranarray(a), id="column_major"),
    ],
)
def test_last_axis_not_contiguous(arguments: Arguments, name: str, make: Callable[[Any], Any]) -> None:
    check(arguments, replaced(name, make), ValueError, f"{name} has strides .*, expected a contiguous last axis")


def zeros(*shape: int) -> Any:
    return np.zeros(shape, np.float16)


TOKENS = TREE.unique_tokens
SHAPES = [
    ({"q": zeros(BATCH, HEADS, 48)}, "q has head_dim 48, expected one of 16, 32, 64, 128, 256"),
    ({"q": zeros(BATCH, HEADS, 1)}, "q has head_dim 1, expected one of"),
    ({"q": zeros(BATCH, HEADS, 0)}, "q has head_dim 0, expected one of"),
    ({"q": zeros(BATCH, HEADS, 512)}, "q has head_dim 512, expected one of"),
    ({"q": zeros(BATCH, HEADS, 32)}, "k_buffer has head_dim 64, expected 32 as q has"),
    ({"k_buffer": zeros(TOKENS, KV_HEADS, 32)}, "k_buffer has head_dim 32, expected 64 as q has"),
    ({"v_buffer": zeros(TOKENS, KV_HEADS, 32)}, "v_buffer has shape .*, expected .* as k_buffer has"),
    ({"v_buffer": zeros(TOKENS - 1, KV_HEADS, DIM)}, "v_buffer has shape .*, expected .* as k_buffer has"),
    ({"v_buffer": zeros(TOKENS, 1, DIM)}, "v_buffer has shape .*, expected .* as k_buffer has"),
    ({"q": zeros(BATCH, 9, DIM)}, "q has 9 heads, expected a multiple of k_buffer's, 2"),
    ({"q": zeros(BATCH, 1, DIM)}, "q has 1 heads, expected a multiple of k_buffer's, 2"),
    ({"q": zeros(BATCH, 0, DIM)}, "q has 0 heads, expected a multiple"),
    ({"k_buffer": zeros(TOKENS, 0, DIM), "v_buffer": zeros(TOKENS, 0, DIM)}, "q has 8 heads, expected .* 0"),
    ({"k_buffer": zeros(TOKENS - 1, KV_HEADS, DIM), "v_buffer": zeros(TOKENS - 1, KV_HEADS, DIM)},
     f"k_buffer has {TOKENS - 1} tokens, expected {TOKENS} as the tree"),
    ({"k_buffer": zeros(TOKENS + 1, KV_HEADS, DIM), "v_buffer": zeros(TOKENS + 1, KV_HEADS, DIM)},
     f"k_buffer has {TOKENS + 1} tokens, expected {TOKENS} as the tree"),
    ({"k_buffer": zeros(0, KV_HEADS, DIM), "v_buffer": zeros(0, KV_HEADS, DIM)}, "k_buffer has 0 tokens"),
    # Preparation was for another number of requests or heads: the metadata is what does not fit.
    ({"q": zeros(BATCH + 1, HEADS, DIM)}, r"req_to_vnode_offs has shape \(4,\), expected \(5,\)"),
    ({"q": zeros(0, HEADS, DIM)}, r"req_to_vnode_offs has shape \(4,\), expected \(0,\)"),
    ({"q": zeros(BATCH, 2 * HEADS, DIM)}, r"mid_o has shape \(.*, 8, 64\), expected \(.*, 16, 64\)"),
    ({"o": zeros(BATCH, HEADS, 32)}, r"o has shape .*, expected \(4, 8, 64\)"),
    ({"o": zeros(BATCH, HEADS + 1, DIM)}, r"o has shape .*, expected \(4, 8, 64\)"),
    ({"o": zeros(BATCH - 1, HEADS, DIM)}, r"o has shape .*, expected \(4, 8, 64\)"),
    ({"o": zeros(0, HEADS, DIM)}, r"o has shape .*, expected \(4, 8, 64\)"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), SHAPES)
def test_shape(arguments: Arguments, changes: Arguments, message: str) -> None:
    check(arguments, changes, ValueError, message)


@pytest.mark.parametrize("name", ["q", "k_buffer", "v_buffer", "o"])
def test_mixed_dtypes(arguments: Arguments, name: str) -> None:
    bfloat16 = {other: arguments[other].astype(ml_dtypes.bfloat16) for other in ("q", "k_buffer", "v_buffer", "o")}
    changes = {other: array for other, array in bfloat16.items() if other != name}
    named = "k_buffer" if name == "q" else name
    check(arguments, changes, TypeError, f"{named} has dtype (b?float16), expected (?!\\1)b?float16")


@pytest.mark.parametrize("name", ["o", "mid_o", "mid_lse"])
def test_read_only(arguments: Arguments, name: str) -> None:
    check(
        arguments, replaced(name, read_only), ValueError, f"{name} is read-only, expected an array that can be written"
    )


def test_output_with_elements_in_one_place(arguments: Arguments) -> None:
    one = zeros(1, HEADS, DIM)
    for shape, strides in (((BATCH, HEADS, DIM), (0, 2 * DIM, 2)), ((BATCH, HEADS, DIM), (2 * DIM, 0, 2))):
        same = np.lib.stride_tricks.as_strided(one, shape, strides, writeable=True)
        check(arguments, {"o": same}, ValueError, "o has strides .*, expected no two elements in one place")


@pytest.mark.parametrize("steps", [(DIM, DIM), (HEADS * DIM, DIM // 2), ((HEADS - 1) * DIM, DIM), (-DIM, 2 * DIM)])
def test_output_whose_rows_overlap(arguments: Arguments, steps: tuple[int, int]) -> None:
    memory = zeros(2 * BATCH, HEADS, DIM)
    strides = (*(2 * step for step in steps), 2)
    same = np.lib.stride_tricks.as_strided(memory[BATCH:], (BATCH, HEADS, DIM), strides, writeable=True)
    check(arguments, {"o": same}, ValueError, "o has strides .*, expected no two elements in one place")
    assert not memory.any()


def test_output_with_gaps_and_axes_in_any_order(arguments: Arguments) -> None:
    fasttree_decode(**arguments)
    memory = np.full((HEADS + 1, BATCH + 1, DIM + 8), 7, np.float16)
    for o in (memory[:HEADS, :BATCH, :DIM].transpose(1, 0, 2), memory[HEADS:0:-1, :BATCH, :DIM].transpose(1, 0, 2)):
        fasttree_decode(**{**arguments, "o": o})
        np.testing.assert_array_equal(o, arguments["o"])
    one_row = np.lib.stride_tricks.as_strided(memory, (1, HEADS, DIM), (0, 2 * DIM, 2))
    assert not overlaps(view("o", one_row))


# Metadata


@pytest.mark.parametrize("name", INDICES)
def test_indices_of_two_dimensions(arguments: Arguments, name: str) -> None:
    check(arguments, replaced(name, lambda a: a[None]), ValueError, rf"{name} has shape \(.*\), expected one dimension")
    check(arguments, replaced(name, lambda a: a[:1].reshape(())), ValueError, rf"{name} has shape \(\), expected one")


@pytest.mark.parametrize("name", ARRAYS[4:])
def test_metadata_not_contiguous(arguments: Arguments, name: str) -> None:
    check(arguments, replaced(name, spread), ValueError, f"{name} has strides .* in elements, expected a contiguous")
    check(arguments, replaced(name, lambda a: a[::-1]), ValueError, f"{name} has strides .*, expected a contiguous")


@pytest.mark.parametrize("name", ["mid_o", "mid_lse"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda a: np.append(a, a[:1], 0), id="longer"),
        pytest.param(lambda a: a[:-1], id="shorter"),
        pytest.param(lambda a: np.concatenate([a, a], 1), id="more_heads"),
        pytest.param(lambda a: np.ascontiguousarray(a[:, :-1]), id="fewer_heads"),
        pytest.param(lambda a: a.reshape(-1), id="1d"),
        pytest.param(lambda a: a[..., None], id="one_dimension_more"),
    ],
)
def test_work_space_of_another_shape(arguments: Arguments, name: str, make: Callable[[Any], Any]) -> None:
    check(arguments, replaced(name, make), ValueError, rf"{name} has shape \(.*\), expected \(")


@pytest.mark.parametrize("name", ["vnode_to_kv_lens", "vnode_to_q_offs", "vnode_to_q_lens", "req_to_vnode_entries",
                                  "req_to_vnode_offs", "req_to_vnode_lens"])  # fmt: skip
def test_indices_of_another_length(arguments: Arguments, name: str) -> None:
    check(arguments, replaced(name, lambda a: a[:-1]), ValueError, rf"{name} has shape \(.*\), expected \(")
    check(arguments, replaced(name, lambda a: np.append(a, a[:1])), ValueError, rf"{name} has shape .*, expected \(")


@pytest.mark.parametrize(
    ("name", "named"),
    [("vnode_to_kv_offs", "vnode_to_kv_lens"), ("vnode_to_q_entries", "req_to_vnode_entries")],
)
def test_length_that_others_are_held_against(arguments: Arguments, name: str, named: str) -> None:
    check(arguments, replaced(name, lambda a: a[:-1]), ValueError, rf"{named} has shape \(.*\), expected \(")


def test_fewer_tokens_than_vnodes_reach(arguments: Arguments) -> None:
    check(
        arguments, replaced("vnode_to_kv_entries", lambda a: a[:-1]), ValueError, r"vnode_to_kv_offs\[\d+\] is .* range"
    )


@pytest.mark.parametrize("value", [-1, 2**30, -(2**31)])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vnode_to_kv_entries", r"vnode_to_kv_entries\[3\] is {}, expected a row of k_buffer and v_buffer"),
        ("vnode_to_q_entries", r"vnode_to_q_entries\[3\] is {}, expected a row of q"),
        ("req_to_vnode_entries", r"req_to_vnode_entries\[3\] is {}, expected a row of mid_o"),
        ("vnode_to_kv_offs", r"vnode_to_kv_offs\[3\] is {} and vnode_to_kv_lens\[3\] is .* vnode_to_kv_entries"),
        ("vnode_to_kv_lens", r"vnode_to_kv_offs\[3\] is .* and vnode_to_kv_lens\[3\] is {}, .* vnode_to_kv_entries"),
        ("vnode_to_q_offs", r"vnode_to_q_offs\[3\] is {} and vnode_to_q_lens\[3\] is .* vnode_to_q_entries"),
        ("vnode_to_q_lens", r"vnode_to_q_offs\[3\] is .* and vnode_to_q_lens\[3\] is {}, .* vnode_to_q_entries"),
        ("req_to_vnode_offs", r"req_to_vnode_offs\[3\] is {} and req_to_vnode_lens\[3\] is .* req_to_vnode_entries"),
        (
            "req_to_vnode_lens",
            r"req_to_vnode_offs\[3\] is .* and req_to_vnode_lens\[3\] is {}, .* req_to_vnode_entries",
        ),
    ],
)
def test_contents_out_of_range(arguments: Arguments, name: str, message: str, value: int) -> None:
    check(arguments, filled(name, 3, value), ValueError, message.format(value))


@pytest.mark.parametrize(("name", "limit"), [("vnode_to_kv_entries", TOKENS), ("vnode_to_q_entries", BATCH)])
def test_contents_at_the_limit(arguments: Arguments, name: str, limit: int) -> None:
    check(arguments, filled(name, 0, limit), ValueError, rf"{name}\[0\] is {limit}, expected a row")
    fasttree_decode(**arguments | filled(name, 0, limit - 1)(arguments))


# Phases and tile sizes


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ([], ValueError, " has 0 entries, expected two integers"),
        ([1], ValueError, " has 1 entries, expected two integers"),
        ([1, 2, 3], ValueError, " has 3 entries, expected two integers"),
        ([-1, 3], ValueError, r"\[0\] is -1, expected "),
        ([3, 2**31], ValueError, r"\[1\] is 2147483648, expected "),
        ([3, 1.0], TypeError, r"\[1\] is 1.0, expected an integer"),
        ([True, 3], TypeError, r"\[0\] is True, expected an integer"),
        ([3, None], TypeError, r"\[1\] is None, expected an integer"),
        ("34", TypeError, " is '34', expected two integers"),
        (3, TypeError, " is 3, expected two integers"),
        (None, TypeError, " is None, expected two integers"),
        ({3, 4}, TypeError, " is {3, 4}, expected two integers"),
        (np.array([[1, 2]]), ValueError, " has 1 entries, expected two integers"),
        (np.array(1), TypeError, " is 1, expected two integers"),
        (np.array([1.0, 2.0]), TypeError, r"\[0\] is .*, expected an integer"),
    ],
    ids=str,
)
def test_pair(arguments: Arguments, name: str, value: Any, error: type[Exception], message: str) -> None:
    check(arguments, {name: value}, error, name + message)


@pytest.mark.parametrize("name", PAIRS[2:])
@pytest.mark.parametrize("value", [[0, 4], [16, 0]])
def test_tile_of_no_size(arguments: Arguments, name: str, value: list[int]) -> None:
    check(arguments, {name: value}, ValueError, rf"{name}\[\d\] is 0, expected 1 to ")


def test_phases_that_do_not_hold_each_vnode_once(arguments: Arguments) -> None:
    first, second = arguments["phase_node_nums"]
    count = len(arguments["vnode_to_kv_offs"])
    assert first + second == count > 2
    wrong: list[tuple[list[int], list[int]]] = [
        ([0, 0], [0, 0]),
        ([0, count - 1], [0, 0]),
        ([0, count - 1], [0, 1]),
        ([count + 1, 0], [0, 0]),
        ([count, 0], [1, 0]),
        ([count, count], [0, 0]),
        ([1, count - 1], [0, 0]),
        ([1, count - 1], [0, 2]),
        ([1, count - 2], [0, 1]),
        ([0, 2**31 - 1], [0, 2**31 - 1]),
    ]
    for nums, offsets in wrong:
        changes = {"phase_node_nums": nums, "phase_node_offsets": offsets}
        check(
            arguments,
            changes,
            ValueError,
            rf"phase_node_nums is \[.*\] and phase_node_offsets is \[.*\], expected .* {count} ",
        )
    right: list[tuple[Any, Any]] = [
        ([count, 0], [0, 0]),
        ([count, 0], (0, count)),
        (np.array([0, count]), [0, 0]),
        ([1, count - 1], [0, 1]),
        ([count - 1, 1], [1, 0]),
    ]
    for nums, offsets in right:
        fasttree_decode(**arguments | {"phase_node_nums": nums, "phase_node_offsets": offsets})


# Numbers, stream and kernel


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    ("value", "error"),
    [
        (float("nan"), ValueError),
        (float("inf"), ValueError),
        (-float("inf"), ValueError),
        (np.float32("nan"), ValueError),
        (1e39, ValueError),
        (10**400, ValueError),
        ("0.1", TypeError),
        (None, TypeError),
        (True, TypeError),
        (np.bool_(True), TypeError),
        (1j, TypeError),
        ([0.1], TypeError),
        (np.array(0.1), TypeError),
    ],
    ids=lambda value: repr(value)[:20],
)
def test_number(arguments: Arguments, name: str, value: Any, error: type[Exception]) -> None:
    check(arguments, {name: value}, error, f"{name} is .*, expected a (finite )?number")


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [1, 0, -2.5, np.float32(0.5), np.float64(0.5), np.int64(1), Fraction(1, 3)], ids=repr)
def test_numbers_of_any_kind_are_taken(arguments: Arguments, name: str, value: Any) -> None:
    fasttree_decode(**arguments | {name: value})
    assert np.isfinite(arguments["o"].astype(np.float32)).all()


def test_cap_that_float32_cannot_tell_from_zero(arguments: Arguments) -> None:
    for cap in (1e-50, 1e-40, 5e-324):
        check(arguments, {"logit_cap": cap}, ValueError, "logit_cap is .*, expected 0, a negative number, or at least")
    fasttree_decode(**arguments | {"logit_cap": 2.0**-126})
    assert np.isfinite(arguments["o"].astype(np.float32)).all()


@pytest.mark.parametrize("kernel", ["fast", "MMA", "", None, 3, ["mma"], np.array(["mma", "plain"])], ids=repr)
def test_unknown_kernel(arguments: Arguments, kernel: Any) -> None:
    check(arguments, {"kernel": kernel}, ValueError, "kernel is .*, expected one of 'auto', 'mma', 'plain'")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"kernel": "mma"}, "kernel"),
        ({"kernel": "plain"}, "kernel"),
        ({"stream": 0}, "stream"),
        ({"stream": "s"}, "stream"),
    ],
)
def test_gpu_options_for_arrays_on_the_cpu(arguments: Arguments, changes: Arguments, name: str) -> None:
    check(arguments, changes, ValueError, f"{name} is .*, but q lies on the CPU, expected {name} left out")


# The call itself


def test_too_many_positional_arguments(arguments: Arguments) -> None:
    values = list(arguments.values())
    text = r"fasttree_decode\(\) takes 21 positional arguments"
    refused(TypeError, text, arguments, lambda: fasttree_decode(*values, None))
    refused(TypeError, text, arguments, lambda: fasttree_decode(*values, q=values[0]))


NAMES = list(cpu_arguments())


@pytest.mark.parametrize("name", NAMES[4:])
def test_an_argument_both_by_position_and_by_name(arguments: Arguments, name: str) -> None:
    values = list(arguments.values())[: NAMES.index(name) + 1]
    named = {other: arguments[other] for other in NAMES[len(values) :]} | {name: arguments[name]}
    text = f".*got multiple values for keyword argument '{name}'"
    refused(TypeError, text, arguments, lambda: fasttree_decode(*values, **named))
    first = {other: arguments[other] for other in NAMES[:4]}
    refused(TypeError, text, arguments, lambda: fasttree_decode(*values[4:], **first, **named))


@pytest.mark.parametrize("name", [*ARRAYS, *PAIRS, "sm_scale"])
def test_missing_argument(arguments: Arguments, name: str) -> None:
    del arguments[name]
    refused(TypeError, f".* missing 1 required .*'{name}'", arguments, lambda: fasttree_decode(**arguments))


def test_missing_last_positional_arguments(arguments: Arguments) -> None:
    values = list(arguments.values())[:-2]
    refused(TypeError, ".* missing 1 required .*'sm_scale'", arguments, lambda: fasttree_decode(*values))
    refused(TypeError, ".* missing 20 required", arguments, lambda: fasttree_decode())


def test_unknown_keyword(arguments: Arguments) -> None:
    refused(
        TypeError, ".* unexpected keyword argument 'scale'", arguments, lambda: fasttree_decode(**arguments, scale=1)
    )


# Other frameworks' arrays


@pytest.mark.parametrize("name", ARRAYS[:4])
def test_torch_tensor_that_requires_grad(torch: Any, arguments: Arguments, name: str) -> None:
    tensor = torch.zeros(arguments[name].shape, dtype=torch.float16, requires_grad=True)
    check(arguments, {name: tensor}, TypeError, f"{name}: the tensor requires grad, detach it first")


@pytest.mark.parametrize("name", ARRAYS)
def test_torch_tensor_elsewhere(torch: Any, arguments: Arguments, name: str) -> None:
    dtype = getattr(torch, RIGHT_DTYPES.get(name, "float16"))
    meta = torch.empty(arguments[name].shape, dtype=dtype, device="meta")
    check(arguments, {name: meta}, ValueError, f"{name}: device meta is not supported, expected a CPU or CUDA tensor")


def test_torch_output_with_elements_in_one_place(torch: Any, arguments: Arguments) -> None:
    o = torch.zeros(1, HEADS, DIM, dtype=torch.float16).expand(BATCH, HEADS, DIM)
    check(arguments, {"o": o}, ValueError, "o has strides .*, expected no two elements in one place")
    assert not o.any()


@pytest.mark.parametrize("name", ["o", "mid_o", "mid_lse"])
def test_jax_arrays_are_not_written(jax: Any, arguments: Arguments, name: str) -> None:
    array = jax.device_put(np.zeros(arguments[name].shape, arguments[name].dtype), jax.local_devices(backend="cpu")[0])
    instead = "None to get a new one" if name == "o" else "an array of another framework"
    message = f"{name} is a JAX array, which cannot be written, expected {instead}"
    check(arguments, {name: array}, TypeError, message)
    assert not np.asarray(array).any()


# On a GPU. What is checked before the arrays are looked at, and in the same code, is not repeated.


@pytest.fixture
def on_gpu(cupy: Any) -> Arguments:
    arguments = cpu_arguments()
    return {name: cupy.asarray(a) if isinstance(a, np.ndarray) else a for name, a in arguments.items()}


@pytest.mark.gpu
def test_the_unchanged_call_is_right_on_the_gpu(on_gpu: Arguments) -> None:
    fasttree_decode(**on_gpu)
    assert np.isfinite(on_gpu["o"].get().astype(np.float32)).all()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ARRAYS)
def test_mixed_devices(on_gpu: Arguments, name: str) -> None:
    # Where q is the one on the CPU, k_buffer is the first that disagrees.
    named = "k_buffer" if name == "q" else name
    devices = r"\('cuda', 0\)", r"\('cpu', 0\)"
    actual, expected = devices if name == "q" else devices[::-1]
    check(on_gpu, replaced(name, lambda a: a.get()), ValueError, f"{named} has device {actual}, expected {expected}")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["q", "k_buffer", "v_buffer"])
@pytest.mark.parametrize("padding", [(0, 1), (1, 0)], ids=["stride", "address"])
def test_mma_needs_aligned_rows(cupy: Any, on_gpu: Arguments, name: str, padding: tuple[int, int]) -> None:
    before, after = padding

    def moved(array: Any) -> Any:
        rows, heads, dim = array.shape
        if after:
            wide = cupy.zeros((rows, heads, dim + after), array.dtype)
            return wide[:, :, :dim]
        flat = cupy.zeros(array.size + before, array.dtype)
        return flat[before:].reshape(array.shape)

    change = moved(on_gpu[name])
    check(on_gpu | {"kernel": "mma"}, {name: change}, ValueError, "kernel is 'mma', which needs ")
    fasttree_decode(**on_gpu | {name: change})  # "auto" takes another one


@pytest.mark.gpu
@pytest.mark.parametrize("stream", ["0", 1.0, True, object(), [0], int])
def test_stream_of_a_wrong_type(on_gpu: Arguments, stream: Any) -> None:
    check(on_gpu, {"stream": stream}, TypeError, "stream is .*, expected None, an int, a CuPy stream")


@pytest.mark.gpu
def test_negative_stream(on_gpu: Arguments) -> None:
    check(on_gpu, {"stream": -1}, ValueError, "stream is -1, expected the handle of a CUDA stream")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (replaced("q", lambda a: a[..., ::2]), ValueError, "q has strides .*, expected a contiguous last axis"),
        (replaced("k_buffer", lambda a: a[:-1]), ValueError, "v_buffer has shape"),
        (replaced("o", lambda a: a[:-1]), ValueError, "o has shape"),
        (replaced("o", lambda a: a.astype(np.float32)), TypeError, "o has dtype float32"),
        (replaced("mid_o", lambda a: a[:-1]), ValueError, "mid_o has shape"),
        (replaced("mid_lse", lambda a: a.astype(np.float16)), TypeError, "mid_lse has dtype float16"),
        (replaced("vnode_to_q_lens", lambda a: a[::-1]), ValueError, "vnode_to_q_lens has strides"),
        (replaced("vnode_to_q_lens", lambda a: a.astype(np.int64)), TypeError, "vnode_to_q_lens: dtype int64"),
        ({"phase_node_nums": [0, 0]}, ValueError, "phase_node_nums is"),
        ({"sm_scale": "1"}, TypeError, "sm_scale is"),
        ({"kernel": "fast"}, ValueError, "kernel is 'fast'"),
    ],
)  # fmt: skip
def test_refused_on_the_gpu(on_gpu: Arguments, change: Any, error: type[Exception], message: str) -> None:
    check(on_gpu, change, error, message)


@pytest.mark.gpu
def test_jax_output_on_the_gpu(jax: Any, on_gpu: Arguments) -> None:
    try:
        device = jax.local_devices(backend="gpu")[0]
    except RuntimeError as error:
        pytest.skip(f"this JAX sees no GPU ({error})")
    o = jax.device_put(zeros(BATCH, HEADS, DIM), device)
    check(on_gpu, {"o": o}, TypeError, "o is a JAX array, which cannot be written, expected None")


def test_partial_outputs_off_a_16_byte_boundary_are_refused_for_a_gpu(arguments: Arguments) -> None:
    names = [name for name in ARRAYS if name != "o"]
    views = {name: view(name, arguments[name])._replace(device=("cuda", 0)) for name in names}
    phases = check_phases(*(arguments[name] for name in PAIRS))
    views["mid_o"] = views["mid_o"]._replace(pointer=1024)
    check_metadata(views, phases)
    views["mid_o"] = views["mid_o"]._replace(pointer=1032)
    with pytest.raises(ValueError, match="mid_o starts at address 0x408, expected a multiple of 16 bytes"):
        check_metadata(views, phases)


def test_more_kv_heads_than_a_grid_has_are_refused_for_a_gpu(arguments: Arguments) -> None:
    names = [name for name in ARRAYS if name != "o"]
    views = {name: view(name, arguments[name])._replace(device=("cuda", 0)) for name in names}
    views["k_buffer"] = views["k_buffer"]._replace(shape=(views["k_buffer"].shape[0], 65536, 16))
    with pytest.raises(ValueError, match="k_buffer has 65536 heads, expected at most 65535 on a GPU"):
        check_metadata(views, check_phases(*(arguments[name] for name in PAIRS)))
