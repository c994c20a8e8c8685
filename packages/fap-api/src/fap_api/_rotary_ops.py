"""The operators ``fap::rotary`` and, in place, ``fap::rotary_``; the gradient of turning is turning back."""

from __future__ import annotations

from typing import Any

import torch

from fap_api.backends._torch_rotary import packed_positions, positions_from, rotate

__all__ = ["TurnInPlace", "check_on_host", "rotary", "rotary_"]

_REST = (
    "Tensor cos, Tensor sin, bool interleaved, SymInt offset, Tensor? offsets, Tensor? cu_seqlens,"
    " SymInt? max_seqlen, bool conjugate, str backend)"
)
_LIBRARY = torch.library.Library("fap", "FRAGMENT")
_LIBRARY.define(f"rotary(Tensor x, {_REST} -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
_LIBRARY.define(f"rotary_(Tensor(a!) x, {_REST} -> ()", tags=(torch.Tag.pt2_compliant_tag,))


def _turn(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
    offset: int,
    offsets: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    max_seqlen: int | None,
    conjugate: bool,
    backend: str,
    *,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    start = offset if offsets is None else offsets
    if x.device.type == "cpu":
        check_on_host(x, cos, start, cu_seqlens, max_seqlen)
    if backend == "triton":
        from fap_kernels import apply_rotary

        return apply_rotary(
            x,
            cos,
            sin,
            interleaved=interleaved,
            seqlen_offsets=start,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            conjugate=conjugate,
            out=out,
        )
    if cu_seqlens is None or max_seqlen is None:
        positions = positions_from(start, x.shape[1], x.device).expand(x.shape[:2])
    else:
        positions = packed_positions(start, cu_seqlens, max_seqlen, x.shape[0])
    turned = rotate(x, cos, sin, positions, interleaved=interleaved, conjugate=conjugate)
    return turned if out is None else out.copy_(turned)


def _turn_in_place(x: torch.Tensor, *rest: Any) -> None:
    _turn(x, *rest, out=x)
    # Kernels write behind PyTorch's back, and autograd has to find out if it saved x.
    if not x.is_inference():
        torch.autograd.graph.increment_version([x])


def check_on_host(
    x: torch.Tensor,
    cos: torch.Tensor,
    start: int | torch.Tensor,
    cu_seqlens: torch.Tensor | None = None,
    max_seqlen: int | None = None,
) -> None:
    """Raise where a row's position, which the host can read, has no angle.

    Raises:
        RuntimeError: a position beyond the tables or below 0; bounds of sequences that are none.
    """
    seqlens = torch.tensor([x.shape[1] if cu_seqlens is None else 0])
    if cu_seqlens is not None:
        seqlens = cu_seqlens.diff()
        bounds = cu_seqlens.tolist()
        if (seqlens < 0).any() or bounds[0] < 0 or bounds[-1] > x.shape[0]:
            raise RuntimeError(
                f"cu_seqlens must never fall and end within x's {x.shape[0]} rows, got {bounds}"
            )
        if max_seqlen is not None and (seqlens > max_seqlen).any():
            raise RuntimeError(f"max_seqlen must be at least {int(seqlens.max())}, got {max_seqlen}")
    offsets = start if isinstance(start, torch.Tensor) else torch.tensor([start])
    if (offsets < 0).any():
        raise RuntimeError(f"seqlen_offsets must be at least 0, got {offsets.tolist()}")
    ends = (seqlens + offsets)[seqlens.expand_as(seqlens + offsets) > 0]
    if ends.numel() and int(ends.max()) > cos.shape[0]:
        raise RuntimeError(
            f"cos and sin must have an angle for every position, got {cos.shape[0]} rows "
            f"and positions up to {int(ends.max()) - 1} (seqlen_offsets included)"
        )


_LIBRARY.impl("rotary", _turn, "CompositeExplicitAutograd")
_LIBRARY.impl("rotary_", _turn_in_place, "CompositeExplicitAutograd")

rotary = torch.ops.fap.rotary.default
rotary_ = torch.ops.fap.rotary_.default


@torch.library.register_fake("fap::rotary", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake(x: torch.Tensor, *rest: Any) -> torch.Tensor:  # noqa: ARG001
    return x.new_empty(x.shape)


@torch.library.register_fake("fap::rotary_", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _fake_in_place(x: torch.Tensor, *rest: Any) -> None:
    pass


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG001
    _, cos, sin, ctx.interleaved, ctx.offset, offsets, cu_seqlens, ctx.max_seqlen, ctx.conjugate, backend = (
        inputs
    )
    ctx.backend = backend
    ctx.save_for_backward(cos, sin, offsets, cu_seqlens)


def _turn_back(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    cos, sin, offsets, cu_seqlens = ctx.saved_tensors
    dx = rotary(
        dout, cos, sin, ctx.interleaved, ctx.offset, offsets, cu_seqlens, ctx.max_seqlen, not ctx.conjugate,
        ctx.backend,
    )  # fmt: skip
    return (dx, *(None,) * 9)


torch.library.register_autograd("fap::rotary", _turn_back, setup_context=_save, lib=_LIBRARY)


class TurnInPlace(torch.autograd.Function):
    """``fap::rotary_`` on a tensor that autograd follows: operators that write cannot have a gradient."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        """Turn ``x``, in place, and return it."""
        _save(ctx, (x, *rest), None)
        rotary_(x, *rest)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Return the gradient of ``x`` alone."""
        return _turn_back(ctx, dout)
