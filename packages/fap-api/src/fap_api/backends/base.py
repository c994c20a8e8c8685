"""What a back end is: a name, the reasons it gives for not running a call, and three functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from fap_kernels.problem import AttentionProblem

__all__ = ["Backend", "Score"]


class Score(NamedTuple):
    """How scores are made from q and k: the canonical options that forward, backward and probabilities share.

    Attributes:
        softmax_scale: factor on ``q @ k^T``.
        window_left, window_right: key j is visible to query i iff
            ``i + seqlen_k - seqlen_q - window_left <= j <= i + seqlen_k - seqlen_q + window_right``; -1 is no
            bound on that side. Causal masking is ``window_right == 0``.
        softcap: 0.0 for none, else the bound c of ``c * tanh(score / c)``.
        alibi_slopes: None, or float32 ``(nheads,)`` or ``(batch, nheads)``.
        dropout_p: probability of dropping a weight, in [0, 1).
    """

    softmax_scale: float
    window_left: int
    window_right: int
    softcap: float
    alibi_slopes: torch.Tensor | None
    dropout_p: float


class Backend(Protocol):
    """One implementation of dense attention.

    Every tensor and option that arrives has passed :meth:`fap_kernels.problem.AttentionProblem.describe`, and
    ``unsupported_reasons`` was empty for it. Strides are any.
    """

    name: str

    def available(self) -> list[str]:
        """Return why this back end cannot run anything here; empty where it can."""

    def missing_package(self) -> str | None:
        """Return the message of the ImportError for a package that is not installed, or None."""

    def unsupported_reasons(self, problem: AttentionProblem) -> list[str]:
        """Return every reason why this back end cannot run ``problem`` exactly; empty where it can."""

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``out`` (b, sq, h, d) contiguous, ``softmax_lse`` (b, h, sq), and ``rng_state`` int64[2].

        ``rng_state`` is None without dropout; all tensors are fresh.
        """

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
        """Return fresh, contiguous ``dq``, ``dk``, ``dv``; ``dout`` and ``dlse`` may have any strides."""

    def probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        score: Score,
    ) -> torch.Tensor:
        """Return ``S_dmask`` (b, h, round_up(sq, 128), round_up(sk, 128)) in q's dtype."""
