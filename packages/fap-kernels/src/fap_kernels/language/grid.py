"""Kernels that follow one another: programmatic dependent launch, NVIDIA sm_90 and later."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def release_next():
    """Let the next kernel, if it is launched to overlap, take its place on the chip."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, 0; griddepcontrol.launch_dependents;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def wait_for_previous():
    """Wait until the kernel before has ended and all that it stored can be read."""
    tl.inline_asm_elementwise(
        "mov.b32 $0, 0; griddepcontrol.wait;", "=r", [], dtype=tl.int32, is_pure=False, pack=1
    )
