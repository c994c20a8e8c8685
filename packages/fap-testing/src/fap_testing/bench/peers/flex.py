"""PyTorch's FlexAttention, compiled.

It wants (batch, nheads, seqlen, head_dim) and gets transposed views of the common inputs, without a copy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.bench.peers.base import EVERY_DTYPE, AutogradCalls, Peer

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.bench.peers.base import Calls
    from fap_testing.bench.prefill import Prefill
    from fap_testing.bench.problem import Problem, Tensors
    from fap_testing.bench.varlen import Varlen

    MaskMod = Callable[[Any, Any, Any, Any], Any]

__all__ = ["FlexAttention"]

# The longest sequence whose mask is made with every (query, key) pair written out.
_WRITTEN_OUT = 16384


class FlexAttention(Peer):
    """torch.nn.attention.flex_attention under torch.compile, masks as block masks made beforehand.

    Measured on a GPU only: for a CPU it has no backward.
    """

    name = "flex"
    kinds = ("prefill", "varlen")
    module = "torch.nn.attention.flex_attention"
    install = "it comes with PyTorch 2.5"
    compiles = True
    dtypes = EVERY_DTYPE

    def version(self) -> str | None:
        """Return PyTorch's version."""
        return str(torch.__version__)

    def prefill(self, problem: Prefill, tensors: Tensors) -> Calls:
        """Return calls with a causal or window mask."""
        mask = None
        if problem.mask != "full":
            visible = _inside(*problem.bounds, shift=problem.seqlen_k - problem.seqlen_q)
            mask = _block_mask(visible, problem.seqlen_q, problem.seqlen_k, problem.device)
        attend = _compiled(mask, problem)
        return AutogradCalls(attend, tensors)

    def varlen(self, problem: Varlen, tensors: Tensors) -> Calls:
        """Return calls over one long sequence, with a mask that keeps the packed ones apart."""
        lengths = torch.tensor(problem.lengths, device=problem.device)
        document = torch.repeat_interleave(torch.arange(len(problem.lengths), device=problem.device), lengths)
        inside = _inside(*problem.bounds, shift=0)
        masked = problem.mask != "full"

        def visible(batch: Any, head: Any, row: Any, column: Any) -> Any:
            same = document[row] == document[column]
            return same & inside(batch, head, row, column) if masked else same

        mask = _block_mask(visible, len(document), len(document), problem.device)
        attend = _compiled(mask, problem)
        return AutogradCalls(lambda q, k, v: attend(q[None], k[None], v[None])[0], tensors)


def _inside(left: int, right: int, *, shift: int) -> MaskMod:
    """Return the predicate of a window with one bound or two."""

    def visible(_batch: Any, _head: Any, row: Any, column: Any) -> Any:
        distance = row + shift - column
        if left >= 0 and right >= 0:
            return (distance <= left) & (distance >= -right)
        return distance <= left if left >= 0 else distance >= -right

    return visible


def _block_mask(visible: MaskMod, rows: int, columns: int, device: str) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    # Compiled, which takes seconds, only where all pairs would take gigabytes.
    make: Any = create_block_mask if max(rows, columns) <= _WRITTEN_OUT else torch.compile(create_block_mask)
    return make(visible, None, None, rows, columns, device=device)


def _compiled(
    mask: Any, problem: Problem
) -> Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]:
    """Compile for this very shape: after a few shapes, PyTorch would go over to symbolic ones."""
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    # A backward pass is timed again and again on one graph: the first must not give its buffers away.
    functorch: Any = importlib.import_module("torch._functorch.config")
    functorch.donated_buffer = False
    compiled: Any = torch.compile(flex_attention, dynamic=False)
    grouped = problem.group > 1

    def function(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: torch.Tensor = compiled(q, k, v, block_mask=mask, enable_gqa=grouped)
        return out.transpose(1, 2)

    return function
