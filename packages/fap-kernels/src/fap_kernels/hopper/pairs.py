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
    HEIGHT: gl.constexpr = weights.shape[0]
    WIDTH: gl.constexpr = weights.shape[1]
    KIND: gl.constexpr = "bf16x2" if values.tiles.dtype == gl.bfloat16 else "f16x2"
    even, odd = gl.split(weights.reshape([HEIGHT, WIDTH // 2, 2]))
    # Not pure: what is pure may be moved to where it is used, among products that are under way.
    return gl.inline_asm_elementwise(
        "cvt.rn." + KIND + ".f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, is_pure=False, pack=1
    )


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
