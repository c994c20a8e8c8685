"""Where the rows of one (batch, head) lie in memory, and how a tile of them is fetched."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

WRAPPING_ROWS: tl.constexpr = tl.constexpr(1 << 30)
"""Descriptors of packed rows have the shape ``(anything, anything, nheads, WRAPPING_ROWS, head_dim)``.

A descriptor reads zeros beyond its tensor's end, but beyond a packed entry's end lies the next entry. So row
p of an entry of n rows gets the coordinate ``WRAPPING_ROWS - n + p``, which is out of bounds from p = n on.
What that adds to the address is taken back by the first two coordinates: ``start + n`` on the second, with
the stride s of a row, and ``WRAPPING_ROWS`` on the first, with a stride of ``2**34 - s`` bytes. Then all adds
up to row ``start + p``, since addresses wrap at ``2**64 = WRAPPING_ROWS * 2**34``.
"""


class Pages(NamedTuple):
    """Row p of an entry lies in page ``numbers[p >> bits]`` of ``(num_pages, 2**bits, nheads, head_dim)``.

    Fields:
        numbers: address of the entry's page numbers, int32.
        bits: binary logarithm of the page size.
    """

    numbers: Any
    bits: Any


class Rows(NamedTuple):
    """The rows of one tensor that belong to one batch entry, head by head.

    Fields:
        tensor, strides: address, and strides of (batch, seqlen, nheads) in elements; None where descriptors
            alone are used.
        part0, part1: one descriptor for each part of the head dimension, over
            ``(batch, nheads, seqlen, head_dim)`` or, where packed, as :data:`WRAPPING_ROWS` says; None where
            tiles are fetched by address.
        batch: index along the first dimension.
        packed: the entry's first row where entries are packed along the second dimension, else None.
        length: rows at or beyond it do not exist. They load as zeros and are not stored.
        pages: where the rows are scattered over pages, else None.
    """

    tensor: Any
    strides: Any
    part0: Any
    part1: Any
    batch: Any
    packed: Any
    length: Any
    pages: Any


@triton.jit
def load(rows, head, first, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, PART0: tl.constexpr,
         PART1: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    """Rows ``first .. first + COUNT`` of a head, as parts. ``BOUNDED=False`` promises that all exist."""
    if PART1 == 0:
        return (_load_part(rows, rows.part0, head, first, COUNT, HEAD_DIM, 0, PART0, BOUNDED),)
    else:
        return (
            _load_part(rows, rows.part0, head, first, COUNT, HEAD_DIM, 0, PART0, BOUNDED),
            _load_part(rows, rows.part1, head, first, COUNT, HEAD_DIM, PART0, PART1, BOUNDED),
        )


@triton.jit
def _load_part(rows, descriptor, head, first, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr,
               START: tl.constexpr, WIDTH: tl.constexpr, BOUNDED: tl.constexpr):  # fmt: skip
    if rows.part0 is not None:
        if rows.packed is None:
            tile = descriptor.load([rows.batch, head, first, START])
        else:
            row = WRAPPING_ROWS - rows.length + first
            tile = descriptor.load([WRAPPING_ROWS, rows.packed + rows.length, head, row, START])
        return tile.reshape([COUNT, WIDTH])
    else:
        row = tl.arange(0, COUNT)
        column = START + tl.arange(0, WIDTH)
        address = addresses(rows, head, first, row, column)
        if START + WIDTH > HEAD_DIM:
            if BOUNDED:
                exists = (first + row < rows.length)[:, None] & (column < HEAD_DIM)[None, :]
                return tl.load(address, mask=exists, other=0.0)
            else:
                return tl.load(address, mask=(column < HEAD_DIM)[None, :], other=0.0)
        elif BOUNDED:
            return tl.load(address, mask=(first + row < rows.length)[:, None], other=0.0)
        else:
            return tl.load(address)


@triton.jit
def store(rows, head, first, tile, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, PART0: tl.constexpr,
          PART1: tl.constexpr):  # fmt: skip
    """Store a tile of parts to those rows ``first .. first + COUNT`` of a head that exist. Pointers only."""
    _store_part(rows, head, first, tile[0], COUNT, HEAD_DIM, 0, PART0)
    if PART1 > 0:
        _store_part(rows, head, first, tile[1], COUNT, HEAD_DIM, PART0, PART1)


@triton.jit
def _store_part(rows, head, first, part, COUNT: tl.constexpr, HEAD_DIM: tl.constexpr, START: tl.constexpr,
                WIDTH: tl.constexpr):  # fmt: skip
    row = tl.arange(0, COUNT)
    column = START + tl.arange(0, WIDTH)
    address = addresses(rows, head, first, row, column)
    exists = (first + row < rows.length)[:, None]
    if START + WIDTH > HEAD_DIM:
        exists = exists & (column < HEAD_DIM)[None, :]
    tl.store(address, part.to(rows.tensor.dtype.element_ty), mask=exists)


@triton.jit
def load_grouped(rows, heads, positions, HEAD_DIM: tl.constexpr, PART0: tl.constexpr, PART1: tl.constexpr):
    """The rows at ``positions``, each of a head of its own, as parts. Pointers only."""
    if PART1 == 0:
        return (_load_grouped_part(rows, heads, positions, HEAD_DIM, 0, PART0),)
    else:
        return (
            _load_grouped_part(rows, heads, positions, HEAD_DIM, 0, PART0),
            _load_grouped_part(rows, heads, positions, HEAD_DIM, PART0, PART1),
        )


@triton.jit
def _load_grouped_part(rows, heads, positions, HEAD_DIM: tl.constexpr, START: tl.constexpr,
                       WIDTH: tl.constexpr):  # fmt: skip
    column = START + tl.arange(0, WIDTH)
    address = addresses(rows, heads[:, None], 0, positions, column)
    exists = (positions < rows.length)[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(address, mask=exists, other=0.0)


@triton.jit
def store_grouped(rows, heads, positions, tile, HEAD_DIM: tl.constexpr, PART0: tl.constexpr,
                  PART1: tl.constexpr):  # fmt: skip
    """Store each row of a tile of parts at its position of its head, if that exists. Pointers only."""
    _store_grouped_part(rows, heads, positions, tile[0], HEAD_DIM, 0, PART0)
    if PART1 > 0:
        _store_grouped_part(rows, heads, positions, tile[1], HEAD_DIM, PART0, PART1)


@triton.jit
def _store_grouped_part(rows, heads, positions, part, HEAD_DIM: tl.constexpr, START: tl.constexpr,
                        WIDTH: tl.constexpr):  # fmt: skip
    column = START + tl.arange(0, WIDTH)
    address = addresses(rows, heads[:, None], 0, positions, column)
    exists = (positions < rows.length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(address, part.to(rows.tensor.dtype.element_ty), mask=exists)


@triton.jit
def addresses(rows, head, first, row, column):
    """Where ``row``, counted from ``first`` on, and ``column`` of a head lie, each of each."""
    # In 64 bits throughout: a tensor may hold more than 2**31 elements, and in a sequence-major layout
    # one row is batch * nheads * head_dim elements long.
    stride = tl.cast(rows.strides[1], tl.int64)
    corner = head * tl.cast(rows.strides[2], tl.int64)
    if rows.pages is None:
        corner += rows.batch * tl.cast(rows.strides[0], tl.int64)
        corner += (first if rows.packed is None else rows.packed + first) * stride
        return rows.tensor + corner + row[:, None] * stride + column[None, :]
    else:
        position = first + row
        index = position >> rows.pages.bits
        page = tl.load(rows.pages.numbers + index, mask=position < rows.length, other=0)
        offset = page * tl.cast(rows.strides[0], tl.int64) + (position - (index << rows.pages.bits)) * stride
        return rows.tensor + corner + offset[:, None] + column[None, :]


@triton.jit
def element_of(strides, batch, position, head):
    """Where the row of a head at a position starts, in elements; all three broadcast."""
    return (
        batch * tl.cast(strides[0], tl.int64)
        + position * tl.cast(strides[1], tl.int64)
        + head * tl.cast(strides[2], tl.int64)
    )


@triton.jit
def vector_of(vector, strides, batch, head, start):
    """Address of an entry's first number in a float32 vector; ``strides`` are those of (batch, nheads)."""
    return vector + batch * tl.cast(strides[0], tl.int64) + head * tl.cast(strides[1], tl.int64) + start


@triton.jit
def store_vector(start, first, values, length, COUNT: tl.constexpr):
    """Store one number for each row ``first .. first + COUNT`` below ``length`` to a contiguous vector."""
    row = first + tl.arange(0, COUNT)
    tl.store(start + row, values, mask=row < length)
