"""PyTorch's scaled_dot_product_attention, as it chooses and with one back end at a time.

It wants (batch, nheads, seqlen, head_dim) and gets transposed views of the common inputs, without a copy; out
and the gradients come back as views likewise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fap_testing.bench.decode import Decode
from fap_testing.bench.peers.base import EVERY_DTYPE, AutogradCalls, KernelCalls, Peer
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.varlen import Varlen

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from fap_testing.bench.peers.base import Calls, Gradients
    from fap_testing.bench.problem import Direction, Problem, Tensors

__all__ = ["Sdpa", "SdpaCudnn", "SdpaFlash"]


class Sdpa(Peer):
    """scaled_dot_product_attention as PyTorch runs it on a CPU."""

    name = "sdpa"
    kinds = ("prefill", "varlen", "decode")
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    dtypes: ClassVar[tuple[str, ...]] = EVERY_DTYPE

    def version(self) -> str | None:
        """Return PyTorch's version."""
        return str(torch.__version__)

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what the interface cannot say without a mask in memory."""
        reasons = super().unsupported_reasons(problem, direction)
        if problem.windowed:
            reasons.append(f"it has no windows, got window_size {problem.window_size}")
        if isinstance(problem, Varlen) and not problem.equal:
            reasons.append("it takes sequences of one length")
        if isinstance(problem, Decode) and problem.page_size:
            reasons.append("it has no pages")
        elif isinstance(problem, Decode) and not problem.equal:
            reasons.append("it takes caches of one length")
        lengths = _lengths(problem)
        if problem.mask == "causal" and lengths[0] != lengths[1]:
            reasons.append("its causal mask is aligned top-left, so it needs equal lengths")
        return reasons

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls of the function."""
        causal, grouped = problem.causal, problem.group > 1

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return _attend(q, k, v, is_causal=causal, enable_gqa=grouped)

        return AutogradCalls(function, tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of the function on sequences of one length, as a dense batch."""
        batch, causal, grouped = len(problem.lengths), problem.causal, problem.group > 1

        def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            dense = (x.unflatten(0, (batch, -1)) for x in (q, k, v))
            return _attend(*dense, is_causal=causal, enable_gqa=grouped).flatten(0, 1)

        return AutogradCalls(function, tensors)

    def decode(self, problem: Decode, tensors: Tensors) -> Calls:
        """Return calls of the function on the whole cache."""
        causal, grouped = problem.mask == "causal", problem.group > 1

        def forward() -> tuple[Any, ...]:
            with torch.no_grad():
                return (_attend(*tensors[:3], is_causal=causal, enable_gqa=grouped),)

        return KernelCalls(forward)


class _OneBackend(Sdpa):
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    dtypes: ClassVar[tuple[str, ...]] = ("bf16", "fp16")
    backend: ClassVar[SDPBackend]

    def scope(self) -> AbstractContextManager[Any]:
        """Allow one back end, so that a call it cannot run fails."""
        chosen: AbstractContextManager[Any] = sdpa_kernel(self.backend)
        return chosen


class SdpaFlash(_OneBackend):
    """FlashAttention-2 as PyTorch ships it; packed sequences by the operator below the public function."""

    name = "sdpa-flash"
    backend = SDPBackend.FLASH_ATTENTION

    def unsupported_reasons(self, problem: Problem, direction: Direction) -> list[str]:
        """Return what it lacks: on packed sequences only a graph, and a window."""
        if not isinstance(problem, Varlen):
            return super().unsupported_reasons(problem, direction)
        reasons = Peer.unsupported_reasons(self, problem, direction)
        if direction == "fwd+grad":
            reasons.append("its packed operator records no graph")
        if problem.windowed:
            reasons.append("its windows are not measured on packed sequences")
        if problem.group > 1:
            reasons.append("its packed operator is measured with as many heads of k as of q")
        return reasons

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls of aten's packed FlashAttention-2, without autograd."""
        q, k, v, dout = tensors[:4]
        longest, starts = max(problem.lengths), tensors.cu_seqlens
        lengths = (starts, starts, longest, longest)

        def forward() -> tuple[Any, ...]:
            results = torch.ops.aten._flash_attention_forward(
                q, k, v, *lengths, 0.0, problem.causal, False, scale=problem.head_dim**-0.5
            )
            return tuple(results)

        def backward(saved: tuple[Any, ...]) -> Gradients:
            out, lse, state, unused = saved[:4]
            dq, dk, dv = torch.ops.aten._flash_attention_backward(
                *(dout, q, k, v, out, lse, *lengths, 0.0, problem.causal, state, unused),
                scale=problem.head_dim**-0.5,
            )
            return dq, dk, dv

        return KernelCalls(forward, backward)


class SdpaCudnn(_OneBackend):
    """cuDNN's attention as PyTorch calls it."""

    name = "sdpa-cudnn"
    backend = SDPBackend.CUDNN_ATTENTION


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, **options).transpose(1, 2)


def _lengths(problem: Problem) -> tuple[int, int]:
    if isinstance(problem, Prefill):
        return problem.seqlen_q, problem.seqlen_k
    if isinstance(problem, Decode):
        return problem.seqlen_q, problem.capacity
    return 1, 1
