"""Where arrays that lie behind one another in GPU memory begin."""

__all__ = ["TRANSACTION_BYTES", "next_start"]

TRANSACTION_BYTES = 128
"""A full memory transaction on every GPU: arrays begin at multiples of it."""


def next_start(end: int, element_bytes: int = 1) -> int:
    """Where an array begins behind one that ends at `end`, both in elements of so many bytes."""
    step = TRANSACTION_BYTES // element_bytes
    return -(-end // step) * step
