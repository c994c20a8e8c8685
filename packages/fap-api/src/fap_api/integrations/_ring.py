"""Ring attention: keys and values travel around the devices, partial results stay and are merged.

PyTorch's ``context_parallel`` has such a ring too, private, which takes any operator. It is not what runs
here: how it cuts sequences and how keys travel are settings of the whole process. Either way of the first
makes some calls of ours wrong or raise, and the second gathers all keys on every device by default.
docs/integrations/context_parallel.md says more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist

from fap_api._passes import backward_pass, forward_pass

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["attention", "merge"]


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
    options = group, causal, softmax_scale, deterministic
    out: torch.Tensor = _RingAttention.apply(q, k, v, *options)  # type: ignore[no-untyped-call]
    return out


class _Block(NamedTuple):
    """What one device computes while it holds the keys and values of one other, or its own."""

    queries: slice
    keys: slice
    causal: bool


def _block(rank: int, owner: int, causal: bool, seqlen: int) -> _Block:
    """Return which of the local queries see which of ``owner``'s keys.

    Both hold a chunk from the front and one from the back of the sequence, at equal distances from its ends.
    Of two devices, the one nearer to the ends has its front chunk before and its back chunk behind all that
    the other holds.
    """
    everything, half = slice(0, seqlen), seqlen // 2
    if not causal or owner == rank:
        return _Block(everything, everything, causal)
    if owner < rank:
        return _Block(everything, slice(0, half), causal=False)
    return _Block(slice(half, seqlen), everything, causal=False)


class _RingAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        group: dist.ProcessGroup,
        causal: bool,
        softmax_scale: float | None,
        deterministic: bool,
    ) -> torch.Tensor:
        needs_grad = any(ctx.needs_input_grad)
        out = lse = None
        for block, keys, values in _visits(q, k, v, group, causal):
            part, part_lse, _ = forward_pass(
                q[:, block.queries],
                keys[:, block.keys],
                values[:, block.keys],
                needs_grad=needs_grad,
                causal=block.causal,
                softmax_scale=softmax_scale,
            )
            if out is None or lse is None:
                out, lse = part.to(part_lse.dtype), part_lse
            else:
                merge(out[:, block.queries], lse[:, :, block.queries], part, part_lse)
        assert out is not None
        assert lse is not None
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.options = group, causal, softmax_scale, deterministic
        return out

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        group, causal, softmax_scale, deterministic = ctx.options
        dq = torch.zeros_like(q, dtype=lse.dtype)
        # The gradients of keys and values follow them around, and are home after one more step.
        arriving: _Transfer | None = None
        for block, keys, values in _visits(q, k, v, group, causal):
            dq_part, dk_part, dv_part = backward_pass(
                dout[:, block.queries],
                q[:, block.queries],
                keys[:, block.keys],
                values[:, block.keys],
                out[:, block.queries],
                lse[:, :, block.queries].contiguous(),
                lse.new_empty(0, dtype=torch.int64),
                causal=block.causal,
                softmax_scale=softmax_scale,
                deterministic=deterministic,
            )
            dq[:, block.queries] += dq_part
            dkv = k.new_zeros((2, *k.shape), dtype=lse.dtype) if arriving is None else arriving.wait()
            dkv[0, :, block.keys] += dk_part
            dkv[1, :, block.keys] += dv_part
            arriving = _Transfer(dkv, group)
        assert arriving is not None
        dk, dv = arriving.wait()
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), None, None, None, None


def merge(out: torch.Tensor, softmax_lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor) -> None:
    """Merge attention to other keys into ``out`` (b, s, h, d) and ``softmax_lse`` (b, h, s), in place.

    Both halves are averages with weights ``exp(lse)``, so their union is
    ``(out * exp(lse) + part * exp(part_lse)) / (exp(lse) + exp(part_lse))``. All are of the dtype of
    ``softmax_lse``, but for ``part``.
    """
    union = torch.logaddexp(softmax_lse, part_lse)
    for x, lse in ((out, softmax_lse), (part, part_lse)):
        weight = (lse - union).exp_().transpose(1, 2)[..., None]
        if x is out:
            out.mul_(weight)
        else:
            out.addcmul_(x.to(out.dtype), weight)
    softmax_lse.copy_(union)


class _Transfer:
    """Sends a tensor to the next device of the ring while one like it arrives from the one before."""

    def __init__(self, x: torch.Tensor, group: dist.ProcessGroup) -> None:
        self._sent = x
        self._received = torch.empty_like(x)
        if group.size() == 1:
            self._received, self._works = x, []
            return
        rank, n = group.rank(), group.size()
        following = dist.get_global_rank(group, (rank + 1) % n)
        preceding = dist.get_global_rank(group, (rank - 1) % n)
        send = dist.P2POp(dist.isend, x, following, group)
        receive = dist.P2POp(dist.irecv, self._received, preceding, group)
        # Messages between two devices are paired by their order, which is the same on all.
        self._works = dist.batch_isend_irecv([send, receive])

    def wait(self) -> torch.Tensor:
        """Return what arrived."""
        for work in self._works:
            work.wait()
        return self._received


def _visits(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, group: dist.ProcessGroup, causal: bool
) -> Iterator[tuple[_Block, torch.Tensor, torch.Tensor]]:
    """Yield the keys and values of each device, own ones first, sending them on meanwhile."""
    rank, n = group.rank(), group.size()
    kv = torch.stack((k, v))
    for step in range(n):
        transfer = _Transfer(kv, group) if step < n - 1 else None
        yield _block(rank, (rank - step) % n, causal, q.shape[1]), kv[0], kv[1]
        if transfer is not None:
            kv = transfer.wait()
