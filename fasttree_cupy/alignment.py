"""Where arrays that lie behind one another in GPU memory begin."""

__all__ = ["TRANSACTION_BYTES"]

TRANSACTION_BYTES = 128
"""A full memory transaction on every GPU: arrays begin at multiples of it."""
