"""How a head dimension is held in tiles whose sides are powers of two."""

from __future__ import annotations

__all__ = ["split_head_dim"]


def split_head_dim(head_dim: int) -> tuple[int, int]:
    """Return the power-of-two parts that hold a head dimension; the second is 0 where one part does.

    A part is at least 16, the least that tensor cores multiply. Of the sums of two parts the smallest
    that holds ``head_dim`` is taken: 40 is held as 32 + 16, 96 as 64 + 32, 111 as 128.
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    head = whole // 2
    tail = 16
    while head + tail < head_dim:
        tail *= 2
    return (head, tail) if head >= 16 and head + tail < whole else (whole, 0)
