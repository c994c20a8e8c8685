"""FLOP formulas of the operators, for torch.utils.flop_counter.

That module imports Triton, so it is not imported here: the formulas are handed to it once somebody else has.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["register", "teach_active_counters", "visible_pairs"]


def visible_pairs(seqlen_q: int, seqlen_k: int, window_left: int, window_right: int) -> int:
    """Count the (query, key) pairs that the mask lets through, in closed form."""
    shift = seqlen_k - seqlen_q

    def triangle(rows: int) -> int:
        """Sum ``clamp(row, 0, seqlen_k)`` over every row below ``rows``."""
        inside = min(max(rows, 0), seqlen_k)
        return inside * (inside - 1) // 2 + max(rows - seqlen_k, 0) * seqlen_k

    def keys_below(bound: int) -> int:
        """Sum ``clamp(i + bound, 0, seqlen_k)`` over every query i."""
        return triangle(seqlen_q + bound) - triangle(bound)

    upper = keys_below(shift + window_right + 1) if window_right >= 0 else seqlen_q * seqlen_k
    return upper - (keys_below(shift - window_left) if window_left >= 0 else 0)


def register() -> None:
    """Hand the formulas to torch.utils.flop_counter if it has been imported."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    for operator, formula in _formulas().items():
        if operator not in counter.flop_registry:
            # Those of packed sequences look at the lengths, which shapes do not tell.
            raw = formula in (_varlen_forward_flops, _varlen_backward_flops)
            counter.register_flop_formula(operator, get_raw=raw)(formula)


def teach_active_counters() -> None:
    """Hand the formulas to every active FlopCounterMode, which copied the registry when it was made."""
    counter: Any = sys.modules.get("torch.utils.flop_counter")
    if counter is None:
        return
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    register()
    for mode in _get_current_dispatch_mode_stack():
        # What is active is an inner mode; the counter that the user made is behind it.
        owner = getattr(mode, "counter", None)
        if isinstance(owner, counter.FlopCounterMode):
            for operator in _formulas():
                owner.flop_registry.setdefault(operator, counter.flop_registry[operator])


def _formulas() -> dict[Any, Any]:
    return {
        torch.ops.fap.attention_forward: _forward_flops,
        torch.ops.fap.attention_backward: _backward_flops,
        torch.ops.fap.attention_varlen_forward: _varlen_forward_flops,
        torch.ops.fap.attention_varlen_backward: _varlen_backward_flops,
    }


def _product(q_shape: Sequence[int], k_shape: Sequence[int], window_left: int, window_right: int) -> int:
    """Count the operations of one matrix product of the size of ``q @ k^T``, masked pairs left out."""
    batch, seqlen_q, nheads, head_dim = q_shape
    return 2 * batch * nheads * head_dim * visible_pairs(seqlen_q, k_shape[1], window_left, window_right)


def _forward_flops(q_shape: Sequence[int], k_shape: Sequence[int], *rest: Any, **_: Any) -> int:
    # rest: v, alibi_slopes, softmax_scale, window_left, window_right, ...
    return 2 * _product(q_shape, k_shape, *rest[3:5])


def _backward_flops(*arguments: Any, **_: Any) -> int:
    # dout, q, k, v, out, softmax_lse, dlse, rng_state, alibi_slopes, softmax_scale, window_left, window_right
    # The products: the scores once more, dP, dV, dQ and dK.
    return 5 * _product(arguments[1], arguments[2], *arguments[10:12])


def _varlen_product(
    q: torch.Tensor,
    sequences: tuple[Any, ...],
    window: tuple[int, int],
) -> int:
    """Count the operations of one matrix product of the size of ``q @ k^T``, over all sequences.

    Exact where the lengths are on the host. Else, since reading them would make the call wait for the device,
    every query counts as one of the longest sequence sees keys on average: exact for equal lengths.
    """
    total_q, nheads, head_dim = q.shape
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q, seqused_k = sequences
    lengths_q, lengths_k = _lengths(cu_seqlens_q, seqused_q), _lengths(cu_seqlens_k, seqused_k)
    if lengths_q is None or lengths_k is None:
        longest = visible_pairs(max_seqlen_q, max_seqlen_k, *window)
        pairs = total_q * longest // max(max_seqlen_q, 1)
    else:
        pairs = sum(visible_pairs(*pair, *window) for pair in zip(lengths_q, lengths_k, strict=True))
    return int(2 * nheads * head_dim * pairs)


def _lengths(cu_seqlens: torch.Tensor, seqused: torch.Tensor | None) -> list[int] | None:
    known = [x for x in (cu_seqlens, seqused) if x is not None]
    if any(type(x) is not torch.Tensor or x.device.type != "cpu" for x in known):
        return None
    lengths: list[int] = (cu_seqlens.diff() if seqused is None else seqused).tolist()
    return lengths


def _varlen_forward_flops(q: torch.Tensor, k: Any, v: Any, *rest: Any, **_: Any) -> int:  # noqa: ARG001
    # rest: the sequences' six, block_table, alibi_slopes, softmax_scale, window_left, window_right, ...
    return 2 * _varlen_product(q, rest[:6], rest[9:11])


def _varlen_backward_flops(*arguments: Any, **_: Any) -> int:
    # dout, q, k, v, out, softmax_lse, dlse, rng_state, the sequences' six, alibi_slopes, softmax_scale,
    # window_left, window_right, ...
    return 5 * _varlen_product(arguments[1], arguments[8:14], arguments[16:18])
