"""FlagGems's attention as a back end: forward only, on the accelerators of FlagGems's vendors."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, NoReturn

import torch

from fap_api.backends._support import padded_head_dim
from fap_kernels.installed import importable

if TYPE_CHECKING:
    from fap_api.backends.base import Score
    from fap_kernels.problem import AttentionProblem

__all__ = ["FlagGemsBackend"]

# Sizes that its kernels hold; 16 is in its own list, but its rounding to 32 refuses it.
_HEAD_DIMS = (32, 64, 96, 128, 192, 256)
# Its causal and windowed kernels place the diagonal by whole query blocks, of at most this many rows.
_QUERY_BLOCK = 128


class FlagGemsBackend:
    """Calls ``flag_gems.ops.attention.flash_attention_forward``, as of FlagGems 5.0.2.

    The reasons below were read from that release's source; each names what would be wrong or missing.
    """

    name = "flag_gems"

    def available(self) -> list[str]:
        """Return why FlagGems cannot run here: not installed, or it refuses to be imported."""
        missing = self.missing_package()
        if missing is not None:
            return [missing]
        try:
            importlib.import_module("flag_gems")
        except Exception as error:  # noqa: BLE001 - without a supported device it raises whatever its vendor code does
            return [f"flag_gems is installed, but importing it failed: {type(error).__name__}: {error}"]
        return []

    def missing_package(self) -> str | None:
        """Return how to install FlagGems where it is missing."""
        if importable("flag_gems"):
            return None
        return "the package flag_gems is not installed (pip install 'fap-api[flaggems]')"

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Return what FlagGems lacks for ``problem``."""
        seqlen_q, seqlen_k = problem.seqlen_q, problem.seqlen_k
        reasons = []
        if problem.packed:
            reasons.append("it is used for dense calls, and this one is over packed sequences (cu_seqlens)")
        if problem.cached:
            reasons.append("it is used for dense calls, and this one is over a KV cache")
        if problem.device.type in ("cpu", "meta"):
            reasons.append(f"it runs on accelerators, got tensors on {problem.device}")
        if problem.dtype not in (torch.float16, torch.bfloat16):
            reasons.append(f"it has float16 and bfloat16 only, got {problem.dtype}")
        if problem.needs_grad:
            reasons.append("it has no backward, and q, k or v requires a gradient")
        if problem.dropout_p > 0.0:
            reasons.append(f"its dropout reads the seed on the host, got dropout_p {problem.dropout_p}")
        if problem.alibi is not None:
            reasons.append("its ALiBi leaves the rows' share out of softmax_lse, got alibi_slopes")
        if problem.softmax_scale == 0.0:
            reasons.append("it takes a softmax_scale of 0.0 for None")
        if problem.batch == 0 or seqlen_q == 0 or seqlen_k == 0:
            reasons.append(
                "it has no empty calls, "
                f"got (batch, seqlen_q, seqlen_k) {(problem.batch, seqlen_q, seqlen_k)}"
            )
        if hiding_window(problem.window_left, problem.window_right, seqlen_q, seqlen_k) != (-1, -1):
            if seqlen_q % _QUERY_BLOCK != 0:
                reasons.append(
                    f"its causal and windowed calls need seqlen_q to be a multiple of {_QUERY_BLOCK}, "
                    f"got {seqlen_q}"
                )
            if seqlen_q > seqlen_k:
                reasons.append(
                    "its causal and windowed calls need seqlen_q <= seqlen_k, "
                    f"got seqlen_q {seqlen_q} and seqlen_k {seqlen_k}"
                )
        return reasons

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, None]:
        """Run FlagGems's forward."""
        attention = importlib.import_module("flag_gems.ops.attention")
        seqlen_q, seqlen_k, head_dim = q.shape[1], k.shape[1], q.shape[3]
        held = next(size for size in _HEAD_DIMS if size >= head_dim)
        left, right = hiding_window(score.window_left, score.window_right, seqlen_q, seqlen_k)
        if (left, right) not in ((-1, -1), (-1, 0)):
            # It ignores a window with one bound. A row sees at most seqlen_k - 1 keys either way.
            left, right = (bound if bound >= 0 else seqlen_k - 1 for bound in (left, right))
        # Contiguous: its kernels read v with k's strides.
        q, k, v = (padded_head_dim(x, held).contiguous() for x in (q, k, v))
        out, lse, *_ = attention.flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            seqlen_q,
            seqlen_k,
            0.0,
            (left, right) == (-1, 0),
            False,
            scale=score.softmax_scale,
            softcap=score.softcap,
            window_size_left=left,
            window_size_right=right,
            alibi_slopes=None,
            # Its split-KV kernel, taken for few programs without a window, gives wrong results (5.0.2).
            disable_splitkv=True,
        )
        return out[..., :head_dim].contiguous(), lse, None

    def backward(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call that needs a gradient away."""
        raise NotImplementedError("FlagGems has no backward, accepted: calls that need no gradient")

    def probabilities(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call with dropout away."""
        raise NotImplementedError("FlagGems gives no probabilities, accepted: calls without dropout")

    def varlen_forward(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call over packed sequences away.

        FlagGems has a function for them, with another order of arguments. It has not been held to the oracle.
        """
        raise NotImplementedError("FlagGems is used for dense calls, accepted: calls without cu_seqlens")

    def varlen_backward(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call that needs a gradient away."""
        raise NotImplementedError("FlagGems has no backward, accepted: calls that need no gradient")

    def varlen_probabilities(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call with dropout away."""
        raise NotImplementedError("FlagGems gives no probabilities, accepted: calls without dropout")

    def cached_forward(self, *_: object) -> NoReturn:
        """Refuse: ``unsupported_reasons`` keeps every call over a KV cache away."""
        raise NotImplementedError("FlagGems is used for dense calls, accepted: calls without a KV cache")


def hiding_window(left: int, right: int, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Return the window with -1 for each bound that hides no key of any query."""
    return left if left < seqlen_k - 1 else -1, right if right < seqlen_q - 1 else -1
