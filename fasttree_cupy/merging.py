"""Attention over two sets of tokens as attention over their union: `merge_states`."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np

from fasttree_cupy.checks import check_contiguous, check_element_array, check_head_dim, check_same
from fasttree_cupy.execution import arrays, merge_kernel, streams
from fasttree_cupy.execution.arrays import ArrayView

__all__ = ["merge_states"]


def merge_states(o_a: Any, lse_a: Any, o_b: Any, lse_b: Any, *, stream: Any = None) -> tuple[Any, Any]:
    """Merge the attention of the same queries over two disjoint sets of tokens.

    Parameters
    ----------
    o_a, o_b : array, float16 or bfloat16, shape (rows, heads, head_dim)
        Outputs, each normalised over its own tokens; the last axis contiguous. From NumPy, CuPy, torch, JAX or any
        library with ``__dlpack__``, all four on one device.
    lse_a, lse_b : array, float32, shape (rows, heads), row-major
        Natural logarithm of the sum of the exponentiated scores, as `DecodePlan.run` returns it. -inf: the state is
        empty, and its output is not looked at.
    stream : int, CuPy stream, object with ``__cuda_stream__`` or ``cuda_stream``, optional
        CUDA stream to work on, as in `DecodePlan.run`.

    Returns
    -------
    o : array, dtype and shape of `o_a`
        New, of o_a's framework: ``(exp(lse_a) o_a + exp(lse_b) o_b) / (exp(lse_a) + exp(lse_b))``, and 0 where both are
        empty.
    lse : array, float32, shape (rows, heads)
        New: ``log(exp(lse_a) + exp(lse_b))``.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong; the message names it.
    """
    kind, index = arrays.device_of("o_a", o_a)
    if kind == "cpu" and stream is not None:
        raise ValueError(f"stream is {stream!r}, but o_a lies on the CPU, expected stream left out")
    with nullcontext() if kind == "cpu" else streams.use_device(index):
        work = None
        if kind == "cuda":
            work = streams.WorkStream.of(stream, arrays.framework_of(o_a), index)
        given = {"o_a": o_a, "o_b": o_b, "lse_a": lse_a, "lse_b": lse_b}
        views = {name: arrays.view(name, array, work) for name, array in given.items()}
        check_states(views)
        like = views["o_a"]
        o, lse = arrays.empty(like.shape, like.dtype, like), arrays.empty(like.shape[:2], "float32", like)
        o_view, lse_view = arrays.view("o", o, work), arrays.view("lse", lse, work)
        if work is None:
            merge_on_cpu(list(views.values()), o_view, lse_view)
        else:
            merge_kernel.merge_states(list(views.values()), o_view, lse_view, work)
            work.keep_borrowed([*views.values(), o_view, lse_view])
        with nullcontext() if work is None else work.launches():
            return arrays.hand_back(o, like), arrays.hand_back(lse, like)


def check_states(views: dict[str, ArrayView]) -> None:
    """Check the two states against one another."""
    o_a = views["o_a"]
    for name in ("o_a", "o_b"):
        check_element_array(name, views[name])
        check_same(name, "dtype", views[name].dtype, o_a.dtype)
        check_same(name, "device", views[name].device, o_a.device)
        check_same(name, "shape", views[name].shape, o_a.shape)
    check_head_dim("o_a", o_a)
    for name in ("lse_a", "lse_b"):
        check_same(name, "dtype", views[name].dtype, "float32")
        check_same(name, "device", views[name].device, o_a.device)
        check_same(name, "shape", views[name].shape, o_a.shape[:2])
        check_contiguous(name, views[name])


@np.errstate(divide="ignore", invalid="ignore")  # the LSE of two empty states; infinities that make NaN
def merge_on_cpu(states: list[ArrayView], o: ArrayView, lse: ArrayView) -> None:
    """Merge with NumPy."""
    o_a, o_b, lse_a, lse_b = (arrays.as_numpy(view) for view in states)
    top = np.maximum(lse_a, lse_b)
    base = np.where(top == -np.inf, 0, top)  # -inf - -inf would be NaN
    weight_a, weight_b = np.exp(lse_a - base), np.exp(lse_b - base)
    total = weight_a + weight_b
    merged = np.zeros(o_a.shape, np.float32)
    for output, state, weight in ((o_a, lse_a, weight_a), (o_b, lse_b, weight_b)):
        # The share first: an output times its weight could be more than a float32 holds.
        share = weight / np.where(total == 0, 1, total)
        merged += np.where((state == -np.inf)[..., None], 0, output.astype(np.float32)) * share[..., None]
    arrays.as_numpy(o)[...] = merged.astype(o_a.dtype)
    arrays.as_numpy(lse)[...] = base + np.log(total)
