"""fap-kernels as a back end: NVIDIA and AMD GPUs, and CPU tensors under Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fap_api.backends._support import constant_in_graphs
from fap_kernels import (
    AttentionProblem,
    apply_rotary,
    attention_backward,
    attention_forward,
    attention_kvcache_forward,
    attention_probabilities,
    attention_varlen_backward,
    attention_varlen_forward,
    attention_varlen_probabilities,
    kvcache_append,
    unsupported_reasons,
)
from fap_kernels.installed import importable

if TYPE_CHECKING:
    from fap_api.backends.base import NewKeys, Places, Score
    from fap_kernels.packing import Packing

__all__ = ["TritonBackend"]


class TritonBackend:
    """Calls fap-kernels, which imports Triton when it first launches a kernel."""

    name = "triton"

    def available(self) -> list[str]:
        """Return why fap-kernels cannot run anything here."""
        missing = self.missing_package()
        return [] if missing is None else [missing]

    def missing_package(self) -> str | None:
        """Return how to install Triton where it is missing."""
        if importable("triton"):
            return None
        return "the package triton is not installed (pip install triton; published for Linux)"

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Return fap-kernels' own reasons."""
        if self.missing_package() is not None:
            return []
        if torch.compiler.is_compiling():
            return _reasons_at_trace_time(problem.dtype, problem.device)
        return unsupported_reasons(problem)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the forward kernel."""
        # Not _scoring, whose dictionary shows in the host time of a small call.
        scale, left, right, softcap, slopes, dropout_p = score
        return attention_forward(
            q,
            k,
            v,
            softmax_scale=scale,
            causal=right == 0,
            window_size=(left, right),
            softcap=softcap,
            alibi_slopes=slopes,
            dropout_p=dropout_p,
        )

    def backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dlse: torch.Tensor | None,
        rng_state: torch.Tensor | None,
        score: Score,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the backward kernels."""
        return attention_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            dlse=dlse,
            **_scoring(score),
            dropout_p=score.dropout_p,
            rng_state=rng_state,
            deterministic=deterministic,
        )

    def probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        """Run the kernel that writes the probabilities out."""
        return attention_probabilities(
            q,
            k,
            softmax_lse,
            **_scoring(score),
            dropout_p=score.dropout_p,
            rng_state=rng_state,
        )

    def varlen_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run the forward kernel over all sequences at once."""
        return attention_varlen_forward(
            q,
            k,
            v,
            *_lengths(packing),
            seqused_q=packing.seqused_q,
            seqused_k=packing.seqused_k,
            block_table=packing.block_table,
            **_scoring(score),
            dropout_p=score.dropout_p,
        )

    def varlen_backward(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        softmax_lse: torch.Tensor,
        dlse: torch.Tensor | None,
        rng_state: torch.Tensor | None,
        packing: Packing,
        score: Score,
        deterministic: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Run the backward kernels over all sequences at once."""
        return attention_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            *_lengths(packing),
            dlse=dlse,
            seqused_q=packing.seqused_q,
            seqused_k=packing.seqused_k,
            **_scoring(score),
            dropout_p=score.dropout_p,
            rng_state=rng_state,
            deterministic=deterministic,
        )

    def varlen_probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        packing: Packing,
        score: Score,
    ) -> torch.Tensor:
        """Run the kernel that writes the probabilities out."""
        return attention_varlen_probabilities(
            q,
            k,
            softmax_lse,
            *_lengths(packing),
            seqused_q=packing.seqused_q,
            seqused_k=packing.seqused_k,
            block_table=packing.block_table,
            **_scoring(score),
            dropout_p=score.dropout_p,
            rng_state=rng_state,
        )

    def cached_forward(
        self,
        q: torch.Tensor,
        k_cache: torch.Tensor,
        v_cache: torch.Tensor,
        new: NewKeys | None,
        places: Places,
        score: Score,
        num_splits: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append in one kernel, rotate the queries in another, and attend in the split-KV kernel."""
        if new is not None:
            q = _append(q, k_cache, v_cache, new, places, local=score.is_local)
        return attention_kvcache_forward(
            q,
            k_cache,
            v_cache,
            places.seqlens,
            seqlen_new=0 if new is None else new.k.shape[1],
            cache_batch_idx=places.batch_idx,
            cache_leftpad=places.leftpad,
            block_table=places.block_table,
            **_scoring(score),
            num_splits=num_splits,
        )


def _scoring(score: Score) -> dict[str, Any]:
    """Return how fap-kernels is told to make scores; dropout, which a cache does not have, is apart."""
    return {
        "softmax_scale": score.softmax_scale,
        "causal": score.window_right == 0,
        "window_size": (score.window_left, score.window_right),
        "softcap": score.softcap,
        "alibi_slopes": score.alibi_slopes,
    }


def _lengths(packing: Packing) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Return where packed sequences lie and how long the longest are, as fap-kernels takes them."""
    return packing.cu_seqlens_q, packing.cu_seqlens_k, packing.max_seqlen_q, packing.max_seqlen_k


def _append(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    new: NewKeys,
    places: Places,
    *,
    local: bool,
) -> torch.Tensor:
    """Append ``new`` and return the queries, rotated if there are angles."""
    cos, sin = new.angles or (None, None)
    kvcache_append(
        k_cache,
        v_cache,
        new.k,
        new.v,
        new.start,
        cache_batch_idx=places.batch_idx,
        block_table=places.block_table,
        rotary_cos=cos,
        rotary_sin=sin,
        rotary_interleaved=new.interleaved,
    )
    if cos is None or sin is None:
        return q
    # Queries that all have one position are the heads of one row.
    rows = q if local else q.flatten(1, 2)[:, None]
    turned = apply_rotary(rows, cos, sin, interleaved=new.interleaved, seqlen_offsets=new.start)
    return turned.view(q.shape)


@constant_in_graphs
def _reasons_at_trace_time(dtype: torch.dtype, device: torch.device) -> list[str]:
    """Return fap-kernels' reasons in a graph. Sizes are symbolic there, and no reason depends on them."""
    x = torch.empty((1, 1, 1, 64), dtype=dtype, device="meta")
    return unsupported_reasons(replace(AttentionProblem.describe(x, x, x), device=device))
