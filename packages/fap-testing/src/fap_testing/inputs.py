"""Seeded inputs for a case: the same values on every device, in the case's memory layout, amid poison."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.layouts import Buffer, Placement, place_qkv

if TYPE_CHECKING:
    from fap_testing.cases import Case

__all__ = ["CaseInputs", "make_inputs", "make_keep_mask"]


@dataclass(frozen=True, slots=True, eq=False)
class CaseInputs:
    """The tensors of one call.

    Attributes:
        case: what they were made for.
        q, k, v, dout: in the inputs' dtype; ``dout`` is a gradient for out.
        dlse: a gradient for the LSE, float32 (float64 for float64 inputs) ``(batch, nheads, seqlen_q)``.
        alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)``, or None.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dout: torch.Tensor
    dlse: torch.Tensor
    alibi_slopes: torch.Tensor | None
    buffers: tuple[Buffer, ...]

    @property
    def options(self) -> dict[str, Any]:
        """flash_attn_func's keyword arguments for this call, less those at their default."""
        slopes = {} if self.alibi_slopes is None else {"alibi_slopes": self.alibi_slopes}
        return {**self.case.options, **slopes}

    def leaves(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return q, k and v as fresh leaves that want gradients and share the inputs' memory and strides."""
        q, k, v = (x.detach().requires_grad_() for x in (self.q, self.k, self.v))
        return q, k, v

    def assert_untouched(self) -> None:
        """Raise AssertionError if a call wrote to its inputs or to the memory around them."""
        for buffer in self.buffers:
            buffer.assert_untouched()


def make_inputs(
    case: Case,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    poison: bool = True,
) -> CaseInputs:
    """Make q, k, v, dout, dlse and alibi_slopes for a case, standard normal and reproducible.

    The values depend on the case's name, its sizes and the seed; not on dtype (but for rounding), device or
    layout. Slopes are positive and below 1, as ALiBi's are.

    Args:
        case: sizes, options and memory layout.
        dtype: of q, k, v and dout.
        device: of all tensors.
        seed: another seed gives other values.
        poison: put NaN before, between and after the tensors, so that an access outside them shows.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ seed)

    def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

    buffers = []
    values = {
        "q": draw(case.batch, case.seqlen_q, case.nheads, case.head_dim, dtype=dtype),
        "k": draw(case.batch, case.seqlen_k, case.nheads_k, case.head_dim, dtype=dtype),
        "v": draw(case.batch, case.seqlen_k, case.nheads_k, case.head_dim, dtype=dtype),
        "dout": draw(case.batch, case.seqlen_q, case.nheads, case.head_dim, dtype=dtype),
    }
    lse_dtype = torch.promote_types(dtype, torch.float32)
    dlse = draw(case.batch, case.nheads, case.seqlen_q, dtype=lse_dtype)
    buffers = [
        Buffer({name: (values[name], placement) for name, placement in group.items()}, poison=poison)
        for group in place_qkv(case)
    ]
    slopes = _draw_slopes(case, generator)
    if slopes is not None:
        placement = Placement(tuple(slopes.shape), tuple(slopes.stride()), 0)
        buffers.append(Buffer({"alibi_slopes": (slopes.to(device), placement)}, poison=poison))
    views = {name: view for buffer in buffers for name, view in buffer.views.items()}
    return CaseInputs(
        case=case,
        q=views["q"],
        k=views["k"],
        v=views["v"],
        dout=views["dout"],
        dlse=dlse,
        alibi_slopes=views.get("alibi_slopes"),
        buffers=tuple(buffers),
    )


def make_keep_mask(case: Case, *, device: torch.device | str = "cpu", seed: int = 0) -> torch.Tensor | None:
    """Draw a dropout mask for a case, True where a weight is kept; None if the case has no dropout.

    For tests of code that takes a mask. An implementation that draws its own is tested with the mask it
    reports: see :func:`fap_testing.conformance.keep_mask_of`.
    """
    if case.dropout_p == 0.0:
        return None
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()) ^ seed ^ 1)
    shape = (case.batch, case.nheads, case.seqlen_q, case.seqlen_k)
    return (torch.rand(shape, generator=generator) >= case.dropout_p).to(device)


def _draw_slopes(case: Case, generator: torch.Generator) -> torch.Tensor | None:
    if case.alibi is None:
        return None
    shape = (case.nheads,) if case.alibi == "head" else (case.batch, case.nheads)
    return torch.rand(shape, generator=generator) * 0.9 + 0.05
