"""Ulysses attention: each device trades its part of the sequence for its part of the heads, and back."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fap_api.attention import flash_attn_func

__all__ = ["attention"]


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    group: dist.ProcessGroup,
    causal: bool,
    softmax_scale: float | None,
    deterministic: bool,
) -> torch.Tensor:
    """Attend from q to the keys of all devices; see :func:`fap_api.integrations.context_parallel`."""
    n = group.size()
    _check_heads(q.shape[2], k.shape[2], n)
    if k.shape[2] < n:
        # Several devices need the same head.
        k, v = (x.repeat_interleave(n // k.shape[2], dim=2) for x in (k, v))
    q, k, v = (_gather_sequence(x, group) for x in (q, k, v))
    out: Any = flash_attn_func(
        q, k, v, softmax_scale=softmax_scale, causal=causal, deterministic=deterministic
    )
    return _gather_heads(out, group)


def _check_heads(nheads: int, nheads_k: int, n: int) -> None:
    if nheads % n or (nheads_k % n and n % nheads_k):
        raise ValueError(
            f"q must have a multiple of {n} heads (the mesh's devices) for method 'ulysses', and k and v a "
            f"multiple or a divisor of {n}, got {nheads} and {nheads_k}; method 'ring' takes any"
        )


def _gather_sequence(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Turn (b, s / n, h, d) into (b, s, h / n, d), the sequence in its own order."""
    n = group.size()
    b, _, h, d = x.shape
    by_device = x.view(b, -1, n, h // n, d).permute(2, 0, 1, 3, 4)
    parts = _exchange(by_device, group)
    # (n, b, 2, chunk, h / n, d): front chunks in order, back chunks in reverse, as shard_sequence cut them.
    heads, tails = parts.unflatten(2, (2, -1)).unbind(2)
    whole = torch.cat((heads, tails.flip(0)))
    return whole.transpose(0, 1).flatten(1, 2)


def _gather_heads(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Undo :func:`_gather_sequence`."""
    n = group.size()
    heads, tails = x.unflatten(1, (2, n, -1)).unbind(1)
    by_device = torch.stack((heads, tails.flip(1)), dim=2).flatten(2, 3).transpose(0, 1)
    parts = _exchange(by_device, group)
    return parts.permute(1, 2, 0, 3, 4).flatten(2, 3)


def _exchange(by_device: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    received: torch.Tensor = _AllToAll.apply(by_device, group)  # type: ignore[no-untyped-call]
    return received


class _AllToAll(torch.autograd.Function):
    """Send ``x[i]`` to device i; what device i sent is ``result[i]``. It is its own derivative."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    def backward(ctx: Any, dx: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_to_all(dx, ctx.group), None


def _all_to_all(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    x = x.contiguous()
    received = torch.empty_like(x)
    dist.all_to_all_single(received, x, group=group)
    return received
