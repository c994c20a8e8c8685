"""Masks as :mod:`fap_kernels.language.masks` defines them, put on a tile of scores by assembly.

LLVM packs the results of 64 comparisons into the bits of one number, to unpack them again where they are
needed. Thus a masked tile took three times as long as another one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..language import masks


@gluon.jit
def hide(window, x, queries, keys):
    """Put -inf where a query may not see a key; one of the two is a column, the other one a row."""
    if window.left is None and window.right is None:
        return gl.where(keys < window.seqlen_k, x, float("-inf"))
    elif keys.shape[1] > 1:
        x = _keep_up_to(x, keys, masks.last_key(window, queries))
        if window.left is not None:
            x = _keep_from(x, keys, masks.first_key(window, queries))
        return x
    elif window.right is not None:
        x = _keep_from(x, queries, masks.first_query(window, keys))
        if window.left is not None:
            x = _keep_up_to(x, queries, masks.last_query(window, keys))
        return x
    else:
        return _keep_up_to(x, queries, masks.last_query(window, keys))


@gluon.jit
def _keep_up_to(x, positions, last):
    return gl.inline_asm_elementwise(
        "{ .reg .pred seen; setp.le.s32 seen, $2, $3; selp.f32 $0, $1, 0fFF800000, seen; }", "=f,f,r,r",
        [x, positions, last], gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _keep_from(x, positions, first):
    return gl.inline_asm_elementwise(
        "{ .reg .pred seen; setp.ge.s32 seen, $2, $3; selp.f32 $0, $1, 0fFF800000, seen; }", "=f,f,r,r",
        [x, positions, first], gl.float32, is_pure=True, pack=1,
    )  # fmt: skip
