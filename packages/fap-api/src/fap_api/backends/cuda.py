"""The original flash-attn package as a back end: its CUDA kernels, forward and backward."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from fap_api.backends._support import padded_head_dim, unit_last_stride
from fap_kernels.installed import importable

if TYPE_CHECKING:
    from fap_api.backends.base import NewKeys, Places, Score
    from fap_kernels.packing import Packing
    from fap_kernels.problem import AttentionProblem

__all__ = ["CudaBackend"]


_NO_LSE_GRADIENT = (
    "softmax_lse was differentiated on the back end 'cuda', accepted: gradients of out only "
    "(flash-attn's gradient of softmax_lse is zero)"
)


class CudaBackend:
    """Calls flash-attn 2.8: its forward and backward, dense and varlen, and ``flash_attn_with_kvcache``.

    Where that package deviates from its documentation, the deviation is corrected here if that is exact, and
    a reason not to run otherwise.
    """

    name = "cuda"

    def available(self) -> list[str]:
        """Return why flash-attn cannot run here: not installed, or its extension does not load."""
        missing = self.missing_package()
        if missing is not None:
            return [missing]
        try:
            _interface()
        except Exception as error:  # noqa: BLE001 - a broken binary extension raises ImportError, OSError or worse
            return [f"flash_attn is installed, but importing it failed: {type(error).__name__}: {error}"]
        return []

    def missing_package(self) -> str | None:
        """Return how to install flash-attn where it is missing."""
        if hasattr(sys.modules.get("flash_attn"), "__fap_shim__"):
            return (
                "the name flash_attn is that of fap_api.integrations.flash_attn_shim at present "
                "(its uninstall() gives it back)"
            )
        if importable("flash_attn"):
            return None
        return "the package flash_attn is not installed (pip install 'fap-api[cuda]' --no-build-isolation)"

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Return what flash-attn lacks for ``problem``."""
        seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
        left, right = problem.window_left, problem.window_right
        taken = _right_bound_as_taken(left, right, seqlen_k)
        reasons = []
        if problem.device.type != "cuda":
            reasons.append(f"it runs on CUDA tensors, got tensors on {problem.device}")
        if problem.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"it has float16 and bfloat16 only, got {problem.dtype}")
        if problem.batch == 0 or seqlen_q == 0:
            reasons.append(f"it has no empty calls, got batch {problem.batch} and seqlen_q {seqlen_q}")
        if seqlen_k > 0 and taken != right and (0 <= taken < seqlen_q - 1 or 0 <= right < seqlen_q - 1):
            reasons.append(
                f"it takes window_size ({left}, {right}) for ({left}, {taken}), which hides other keys "
                f"with seqlen_q {seqlen_q} and seqlen_k {seqlen_k}"
            )
        if problem.softcap > 0.0 and problem.dropout_p > 0.0:
            reasons.append(f"it has no softcap with dropout, got {problem.softcap} and {problem.dropout_p}")
        if problem.return_attn_probs and problem.needs_grad:
            reasons.append("its gradient of softmax_lse is zero, and return_attn_probs hands softmax_lse out")
        if problem.return_attn_probs and problem.dropout_p > 0.0:
            reasons.append("its S_dmask is not normalised, and return_attn_probs with dropout hands it out")
        reasons += _reasons_against_cache(problem) if problem.cached else []
        return reasons + (_reasons_against_packing(problem) if problem.packed else [])

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run flash-attn's forward; the LSE under causal ALiBi is shifted to the true one."""
        head_dim = q.shape[3]
        held = -(-head_dim // 8) * 8
        out, lse, _, rng_state = _interface()._flash_attn_forward(
            *(padded_head_dim(x, held) for x in (q, k, v)), *_options(score), return_softmax=False
        )
        shift = _alibi_shift(score, q, k)
        if shift is not None:
            lse = lse - shift
        return out[..., :head_dim].contiguous(), lse, rng_state if score.dropout_p else None

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
        """Run flash-attn's backward, which has no gradient of the LSE."""
        if dlse is not None:
            raise RuntimeError(_NO_LSE_GRADIENT)
        if k.shape[1] == 0:
            return _no_gradients(q, k, v)
        head_dim = q.shape[3]
        shift = _alibi_shift(score, q, k)
        if shift is not None:
            softmax_lse = softmax_lse + shift
        held = -(-head_dim // 8) * 8
        dout, q, k, v, out = (padded_head_dim(x, held) for x in (dout, q, k, v, out))
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _interface()._flash_attn_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            *gradients,
            *_options(score),
            deterministic=deterministic,
            rng_state=rng_state,
        )
        dq, dk, dv = (dx[..., :head_dim].contiguous() for dx in gradients)
        return dq, dk, dv

    def probabilities(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every such call away."""
        raise NotImplementedError(
            "flash-attn's S_dmask is not normalised, accepted: calls that do not ask for it"
        )

    def varlen_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Run flash-attn's forward over packed sequences; the LSE under causal ALiBi is shifted."""
        head_dim = q.shape[2]
        held = -(-head_dim // 8) * 8
        longest_q = packing.max_seqlen_q
        if longest_q == 1 and q.shape[1] != k.shape[-2]:
            # With one query each it takes heads for queries; an empty sequence crashes that (its issue 1537).
            longest_q = 2
        out, lse, _, rng_state = _interface()._flash_attn_varlen_forward(
            *(padded_head_dim(x, held) for x in (q, k, v)),
            packing.cu_seqlens_q.contiguous(),
            packing.cu_seqlens_k.contiguous(),
            longest_q,
            packing.max_seqlen_k,
            *_options(score),
            return_softmax=False,
            block_table=packing.block_table,
            seqused_k=None if packing.seqused_k is None else packing.seqused_k.contiguous(),
        )
        shift = _packed_alibi_shift(score, q, packing)
        if shift is not None:
            lse = lse - shift
        return out[..., :head_dim].contiguous(), lse, rng_state if score.dropout_p else None

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
        """Run flash-attn's backward over packed sequences, which has no gradient of the LSE."""
        if dlse is not None:
            raise RuntimeError(_NO_LSE_GRADIENT)
        if packing.max_seqlen_k == 0:
            return _no_gradients(q, k, v)
        head_dim = q.shape[2]
        shift = _packed_alibi_shift(score, q, packing)
        if shift is not None:
            softmax_lse = softmax_lse + shift
        held = -(-head_dim // 8) * 8
        dout, q, k, v, out = (padded_head_dim(x, held) for x in (dout, q, k, v, out))
        gradients = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
        _interface()._flash_attn_varlen_backward(
            dout,
            q,
            k,
            v,
            out,
            softmax_lse,
            *gradients,
            packing.cu_seqlens_q.contiguous(),
            packing.cu_seqlens_k.contiguous(),
            packing.max_seqlen_q,
            packing.max_seqlen_k,
            *_options(score),
            deterministic=deterministic,
            rng_state=rng_state,
        )
        dq, dk, dv = (dx[..., :head_dim].contiguous() for dx in gradients)
        return dq, dk, dv

    def varlen_probabilities(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every such call away."""
        self.probabilities()

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
        """Run flash-attn's function, which appends and rotates as well."""
        _, scale, causal, left, right, softcap, slopes = _options(score)
        cos, sin = (None, None) if new is None or new.angles is None else new.angles
        out, lse = _interface().flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k=None if new is None else new.k,
            v=None if new is None else new.v,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=places.seqlens,
            cache_batch_idx=places.batch_idx,
            cache_leftpad=places.leftpad,
            block_table=places.block_table,
            softmax_scale=scale,
            causal=causal,
            window_size=(left, right),
            softcap=softcap,
            rotary_interleaved=True if new is None else new.interleaved,
            alibi_slopes=slopes,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        return out, lse


def _reasons_against_cache(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.head_dim % 8 != 0:
        reasons.append(f"over a KV cache it needs a head dimension divisible by 8, got {problem.head_dim}")
    if problem.page_size % 256 != 0:
        reasons.append(f"it needs a page size divisible by 256, got {problem.page_size}")
    if problem.alibi is not None and problem.window_right == 0 and problem.return_attn_probs:
        reasons.append("over a KV cache its softmax_lse under causal ALiBi leaves out the rows' share")
    return reasons


def _reasons_against_packing(problem: AttentionProblem) -> list[str]:
    reasons = []
    if problem.seqused_q:
        reasons.append("it has no seqused_q")
    if problem.seqused_k and problem.needs_grad:
        reasons.append("its backward has no seqused_k, and q, k or v requires a gradient")
    if problem.paged and problem.page_size % 256 != 0:
        reasons.append(f"it needs a page size divisible by 256, got {problem.page_size}")
    if problem.paged and problem.head_dim % 8 != 0:
        reasons.append(f"over pages it needs a head dimension divisible by 8, got {problem.head_dim}")
    if problem.paged and problem.dropout_p > 0.0:
        reasons.append(f"its kernels for pages leave dropout out, got dropout_p {problem.dropout_p}")
    return reasons


def _no_gradients(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of a call without keys, over which flash-attn's grid would be empty."""
    return q.new_zeros(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)


def _interface() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")


def _options(score: Score) -> tuple[float, float, bool, int, int, float, torch.Tensor | None]:
    """Return the options that flash-attn's forward and backward share, in their order."""
    causal = (score.window_left, score.window_right) == (-1, 0)
    slopes = None if score.alibi_slopes is None else unit_last_stride(score.alibi_slopes)
    window = score.window_left, score.window_right
    return (score.dropout_p, score.softmax_scale, causal, *window, score.softcap, slopes)


def _right_bound_as_taken(left: int, right: int, seqlen_k: int) -> int:
    """Return what flash-attn makes of ``window_size[1]``; its left bound it takes as documented."""
    if right >= seqlen_k:
        right = -1
    return seqlen_k if right < 0 and 0 <= left < seqlen_k else right


def _alibi_shift(score: Score, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return by how much flash-attn's LSE is off: under causal ALiBi it adds ``slope * j`` alone.

    The true bias of a visible key is ``-slope * (i + seqlen_k - seqlen_q - j)``.
    """
    seqlen_q, seqlen_k = q.shape[1], k.shape[1]
    if score.alibi_slopes is None or not _takes_for_causal(score, seqlen_k):
        return None
    diagonal = torch.arange(seqlen_k - seqlen_q, seqlen_k, device=q.device, dtype=torch.float32)
    return score.alibi_slopes.expand(q.shape[0], q.shape[2])[..., None] * diagonal


def _packed_alibi_shift(score: Score, q: torch.Tensor, packing: Packing) -> torch.Tensor | None:
    """Return the same for packed sequences, ``(nheads, total_q)``, without a look at the lengths."""
    if score.alibi_slopes is None or not _takes_for_causal(score, packing.max_seqlen_k):
        return None
    row = torch.arange(len(q), device=q.device, dtype=torch.int32)
    starts, ends = packing.cu_seqlens_q[:-1], packing.cu_seqlens_q[1:].contiguous()
    # Rows behind the last sequence count as its own.
    sequence = torch.searchsorted(ends, row, right=True).clamp(max=packing.batch - 1)
    used = packing.seqused_k
    seqlens_k = packing.cu_seqlens_k.diff() if used is None else used
    first = starts - (seqlens_k - packing.cu_seqlens_q.diff())
    diagonal = (row - first[sequence]).to(torch.float32)
    return score.alibi_slopes.expand(packing.batch, q.shape[1])[sequence].t() * diagonal


def _takes_for_causal(score: Score, seqlen_k: int) -> bool:
    return score.window_right == 0 and (score.window_left < 0 or score.window_left >= seqlen_k)
