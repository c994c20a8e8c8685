"""What Gluon offers by names that differ between Triton 3.6 and 3.9, or not at all."""

from __future__ import annotations

from typing import Any

from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import _unwrap_if_constexpr as unwrap
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import tma

__all__ = ["as_int", "assemble", "barrier", "reinterpret", "tma_add", "tma_load", "tma_store"]

# Among the warps of a partition; renamed in Triton 3.7.
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
# Triton 3.9 renamed both, and keeps the old names only to say so.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@builtin
def _tma_add(descriptor: Any, coordinates: Any, tile: Any, _semantic: Any = None) -> None:
    """Add a tile of shared memory to memory, in no fixed order among those that add there."""
    from triton._C.libtriton import ir

    coordinates = _semantic._convert_to_ir_values(coordinates, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, descriptor.handle, coordinates, tile.handle)


# Up to Triton 3.7 the compiler has it, but Gluon does not offer it.
tma_add = tma.async_atomic_add if hasattr(tma, "async_atomic_add") else _tma_add


def assemble(code: str, operands: list[Any], semantic: Any, kinds: str | None = None) -> None:
    """Put assembly into a kernel that acts and returns nothing; for functions of Triton's builder.

    Args:
        code: PTX whose ``$1``, ``$2``, ... are the operands; it must write some int32 to ``$0``.
        kinds: a letter for each operand, as LLVM has them; by default all are int32, ``r``.
    """
    builder = semantic.builder
    handles = [semantic.to_tensor(unwrap(operand)).handle for operand in operands]
    constraints = ",".join(("=r", *(kinds or "r" * len(handles))))
    builder.create_inline_asm(code, constraints, handles, [gl.int32.to_ir(builder)], False, 1)


def as_int(pred: Any, semantic: Any) -> Any:
    """A condition, known to the compiler or not, as an int32 for :func:`assemble`."""
    return semantic.cast(semantic.to_tensor(unwrap(pred)), gl.int32)


@builtin
def reinterpret(tile: Any, dtype: Any, shape: Any, layout: Any, _semantic: Any = None) -> Any:
    """The same shared memory, or the beginning of it, as a tile of another kind."""
    dtype, shape, layout = unwrap(dtype), [unwrap(side) for side in shape], unwrap(layout)
    return _semantic.memdesc_reinterpret(tile, dtype, shape, layout)
