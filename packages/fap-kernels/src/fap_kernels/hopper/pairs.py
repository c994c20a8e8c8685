"""Weights between their softmax and their product: rounded to 16 bits, two neighbours of a row in a register.

That is how warpgroup products take them. But from one loop over steps to the next LLVM hands a tile of 16-bit
numbers on one by one, and every step takes pairs of them apart and puts them together again: a sixth of its
instructions. A tile of pairs stays as it is.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def rounded(weights, values):
    """A float32 tile as pairs, in the dtype of the ring of ``values`` that it will be multiplied with.

    They take the registers of the pairs before. So those must have been multiplied: if a product still reads
    them, the assembler lets all products wait for each other.
    """
    KIND: gl.constexpr = "bf16x2" if values.tiles.dtype == gl.bfloat16 else "f16x2"
    return _rounded(weights, KIND)


@gluon.jit
def as_float16(numbers):
    """A float32 tile as pairs of float16, whatever the dtype of the call, to be kept for a while."""
    return _rounded(numbers, "f16x2")


@gluon.jit
def _rounded(numbers, KIND: gl.constexpr):
    even, odd = _split(numbers)
    # Not pure: what is pure may be moved to where it is used, among products that are under way.
    return gl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def from_float16(pairs, LAYOUT: gl.constexpr):
    """What was kept by :func:`as_float16`, as a float32 tile again."""
    even = _half("low", pairs)
    odd = _half("high", pairs)
    return _join(even, odd, LAYOUT)


@gluon.jit
def _half(WHICH: gl.constexpr, pairs):
    return gl.inline_asm_elementwise(
        "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, " + WHICH + "; }", "=f,r",
        [pairs], gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def no_sooner_than(pairs, numbers, zero):
    """The float32 tile ``numbers``, but not before the ``pairs`` are there, of which each goes with two.

    Without it the assembler puts off what the pairs are made of, until both that and a product that starts at
    these numbers need registers.

    Args:
        zero: 0.0, come by in such a way that no compiler knows it. The numbers become those plus 0 times the
            pairs, read as float32; so what is not finite in a pair makes both of its numbers NaN.
    """
    LAYOUT: gl.constexpr = numbers.type.layout
    even, odd = _split(numbers)
    return _join(_plus_product(even, pairs, zero), _plus_product(odd, pairs, zero), LAYOUT)


@gluon.jit
def _plus_product(numbers, pairs, zero):
    return gl.inline_asm_elementwise(
        "fma.rn.ftz.f32 $0, $2, $3, $1;", "=f,f,f,f", [numbers, pairs.to(gl.float32, bitcast=True), zero],
        gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _split(numbers):
    HEIGHT: gl.constexpr = numbers.shape[0]
    WIDTH: gl.constexpr = numbers.shape[1]
    even, odd = gl.split(numbers.reshape([HEIGHT, WIDTH // 2, 2]))
    return even, odd


@gluon.jit
def _join(even, odd, LAYOUT: gl.constexpr):
    HEIGHT: gl.constexpr = even.shape[0]
    WIDTH: gl.constexpr = 2 * even.shape[1]
    return gl.convert_layout(gl.join(even, odd).reshape([HEIGHT, WIDTH]), LAYOUT, assert_trivial=True)


@gluon.jit
def matrix(pairs, values, acc):
    """Pairs as the left operand of their product with ``values``, to be added to ``acc``."""
    HEIGHT: gl.constexpr = pairs.shape[0]
    WIDTH: gl.constexpr = 2 * pairs.shape[1]
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    # LLVM sees that these are the halves of one register. Of assembly it would not.
    even, odd = pairs.to(gl.int16), (pairs >> 16).to(gl.int16)
    tile = gl.join(even, odd).reshape([HEIGHT, WIDTH]).to(values.tiles.dtype, bitcast=True)
    return gl.convert_layout(tile, OPERAND, assert_trivial=True)
