"""What every backend works on."""

from __future__ import annotations

from typing import NamedTuple

from fasttree_cupy.execution.arrays import ArrayView

__all__ = ["Operands"]


class Operands(NamedTuple):
    """Checked arrays of one device, and the numbers that turn a dot product into a score.

    Attributes
    ----------
    q, o : ArrayView
        Shape (batch_size, num_qo_heads, head_dim); the last axis is contiguous, here and below.
    k, v : ArrayView
        Shape (num_tokens, num_kv_heads, head_dim). Of the dtype of q and o, or both of one float8 type.
    sm_scale : float
        Factor of the scores.
    logit_cap : float
        Soft cap where positive.
    lse : ArrayView or None
        Float32, shape (batch_size, num_qo_heads), row-major: where the natural logarithm of the sum of each row's
        exponentiated scores goes.
    k_scale, v_scale : float or ArrayView
        Factor of float8 K or V; an array holds one for each KV head: float32, shape (num_kv_heads,), contiguous.
    """

    q: ArrayView
    k: ArrayView
    v: ArrayView
    o: ArrayView
    sm_scale: float
    logit_cap: float
    lse: ArrayView | None = None
    k_scale: float | ArrayView = 1.0
    v_scale: float | ArrayView = 1.0

    @property
    def kv_dtype(self) -> str | None:
        """The dtype of K and V where it is not that of Q."""
        return None if self.k.dtype == self.q.dtype else self.k.dtype

    def views(self) -> list[ArrayView]:
        """All arrays among them."""
        return [operand for operand in self if isinstance(operand, ArrayView)]
