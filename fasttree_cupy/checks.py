"""Checks of Q, K, V, O and numbers that every way of decoding shares; the messages name the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence

from fasttree_cupy.execution.arrays import DTYPES, ArrayView
from fasttree_cupy.execution.kernels import FLOAT8_NAMES, HEAD_DIMS
from fasttree_cupy.execution.plan_memory import WORKSPACE_ALIGNMENT
from fasttree_cupy.integers import checked_int

__all__ = [
    "ELEMENT_DTYPES",
    "FLOAT8_DTYPES",
    "check_contiguous",
    "check_element_array",
    "check_head_dim",
    "check_inputs",
    "check_output",
    "check_same",
    "check_workspace",
    "check_writable",
    "checked_cap",
    "checked_float",
    "checked_head_dim",
]

ELEMENT_DTYPES = ("float16", "bfloat16")
MADE_WHERE_NONE = ("o", "out", "workspace")
"""Arguments that are written, in whose place None asks for a new array."""
FLOAT8_DTYPES = tuple(FLOAT8_NAMES)
FLOAT32_TINY, FLOAT32_MAX = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""The smallest normal number and the largest: the kernels compute in float32."""


def checked_float(value: object, name: str) -> float:
    """`value` as a float; TypeError or ValueError in the name of the argument."""
    # float first: to ask numbers.Real takes ten times as long.
    if isinstance(value, bool) or not isinstance(value, (float, int, numbers.Real)):
        raise TypeError(f"{name} is {value!r}, expected a number")
    try:
        number = float(value)
    except OverflowError:  # an integer too large
        number = math.inf
    if not abs(number) <= FLOAT32_MAX:
        raise ValueError(f"{name} is {value!r}, expected a finite number that float32 can hold")
    return number


def checked_cap(value: object) -> float:
    """The soft cap as a float: the kernels divide by it where it is positive, so float32 must tell it from 0."""
    cap = checked_float(value, "logit_cap")
    if 0 < cap < FLOAT32_TINY:
        raise ValueError(f"logit_cap is {value!r}, expected 0, a negative number, or at least {FLOAT32_TINY}")
    return cap


def checked_head_dim(value: object) -> int:
    """`value` as an integer that the kernels know as a head_dim."""
    head_dim = checked_int(value, "head_dim")
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, expected one of {', '.join(map(str, HEAD_DIMS))}")
    return head_dim


def check_head_dim(name: str, view: ArrayView) -> None:
    """Raise unless the last of an array's three dimensions is one that the kernels know as a head_dim."""
    if view.shape[2] not in HEAD_DIMS:
        raise ValueError(f"{name} has head_dim {view.shape[2]}, expected one of {', '.join(map(str, HEAD_DIMS))}")


def check_inputs(views: Mapping[str, ArrayView], float8: bool = False) -> None:
    """Check Q, K and V, given in this order by their arguments' names, against one another.

    `float8` says whether K and V may also be of a float8 type, both of the same.
    """
    (q_name, q), (k_name, k), (v_name, v) = views.items()
    check_element_array(q_name, q)
    for name, view in ((k_name, k), (v_name, v)):
        check_element_array(name, view, (*ELEMENT_DTYPES, *FLOAT8_DTYPES) if float8 else ELEMENT_DTYPES)
        check_same(name, "dtype", view.dtype, k.dtype if k.dtype in FLOAT8_DTYPES else q.dtype)
        check_same(name, "device", view.device, q.device)
    check_head_dim(q_name, q)
    if k.shape[2] != q.shape[2]:
        raise ValueError(f"{k_name} has head_dim {k.shape[2]}, expected {q.shape[2]} as {q_name} has")
    if v.shape != k.shape:
        raise ValueError(f"{v_name} has shape {v.shape}, expected {k.shape} as {k_name} has")
    if k.shape[1] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"{q_name} has {q.shape[1]} heads, expected a multiple of {k_name}'s, {k.shape[1]}")


def check_output(o: ArrayView, q: ArrayView, name: str = "o") -> None:
    """Check O against Q."""
    check_element_array(name, o)
    check_same(name, "dtype", o.dtype, q.dtype)
    check_same(name, "device", o.device, q.device)
    check_same(name, "shape", o.shape, q.shape)
    check_writable(name, o)
    if overlaps(o):
        raise ValueError(f"{name} has strides {o.strides} in elements, expected no two elements in one place")


def check_element_array(name: str, view: ArrayView, dtypes: Sequence[str] = ELEMENT_DTYPES) -> None:
    """Check what Q, K, V and O have in common."""
    if view.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {view.dtype}, expected {' or '.join(dtypes)}")
    if len(view.shape) != 3:
        raise ValueError(f"{name} has shape {view.shape}, expected three dimensions: rows, heads, head_dim")
    if view.shape[2] > 1 and view.strides[2] != 1 and 0 not in view.shape:
        raise ValueError(f"{name} has strides {view.strides} in elements, expected a contiguous last axis")


def check_same(name: str, what: str, actual: object, expected: object) -> None:
    """Raise unless an array's property is the expected one: TypeError for a dtype, else ValueError."""
    if actual != expected:
        error = TypeError if what == "dtype" else ValueError
        raise error(f"{name} has {what} {actual}, expected {expected}")


def check_writable(name: str, view: ArrayView) -> None:
    """Raise where an array that must be written cannot be."""
    if view.writable:
        return
    if view.framework == "jax":
        instead = "None to get a new one" if name in MADE_WHERE_NONE else "an array of another framework"
        raise TypeError(f"{name} is a JAX array, which cannot be written, expected {instead}")
    raise ValueError(f"{name} is read-only, expected an array that can be written")


def check_workspace(view: ArrayView, num_bytes: int) -> None:
    """Check a caller's buffer for a workspace of so many bytes."""
    check_writable("workspace", view)
    check_contiguous("workspace", view)
    size = math.prod(view.shape) * DTYPES[view.dtype].itemsize
    if size < num_bytes:
        raise ValueError(f"workspace has {size} bytes, expected {num_bytes} at least, the plan's workspace_bytes")
    if num_bytes and view.pointer % WORKSPACE_ALIGNMENT:
        raise ValueError(
            f"workspace starts at address {view.pointer:#x}, expected a multiple of {WORKSPACE_ALIGNMENT} bytes"
        )


def overlaps(view: ArrayView) -> bool:
    """Whether two elements may lie in one place: an axis' steps do not lead beyond what smaller steps span."""
    if 0 in view.shape:
        return False
    span = 0
    for step, length in sorted(zip(map(abs, view.strides), view.shape, strict=True)):
        if length > 1 and step <= span:
            return True
        span += step * (length - 1)
    return False


def check_contiguous(name: str, view: ArrayView) -> None:
    """Raise unless an array lies in row-major order without gaps."""
    if not is_contiguous(view):
        raise ValueError(f"{name} has strides {view.strides} in elements, expected a contiguous array")


def is_contiguous(view: ArrayView) -> bool:
    """Whether `check_contiguous` takes an array; strides of axes of length 1 do not matter."""
    if 0 in view.shape:
        return True
    expected = 1
    for length, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if length > 1 and stride != expected:
            return False
        expected *= length
    return True
