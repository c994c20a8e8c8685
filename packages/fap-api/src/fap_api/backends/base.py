"""What a back end is: a name, the reasons it gives for not running a call, and three functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

    from fap_kernels.packing import Packing
    from fap_kernels.problem import AttentionProblem

__all__ = ["Backend", "NewKeys", "Places", "Score"]


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

    @property
    def is_local(self) -> bool:
        """Whether the mask moves with the query: causal, or a window."""
        return self.window_left >= 0 or self.window_right >= 0


class Places(NamedTuple):
    """Where in a cache the keys and values of each sequence lie; checked by ``fap_kernels.cache.Cache``.

    Attributes:
        seqlens: int32 ``(batch,)``, the keys of each sequence before new ones; None for the whole capacity.
        batch_idx: int32 ``(batch,)``, its index along the cache's first dimension; None for its own number.
        leftpad: int32 ``(batch,)``, how many keys at its start do not count; None for 0.
        block_table: int32 ``(batch, max_pages)``: key p lies in page ``block_table[b, p // page_size]``. None
            where the cache is not paged.
    """

    seqlens: torch.Tensor | None
    batch_idx: torch.Tensor | None
    leftpad: torch.Tensor | None
    block_table: torch.Tensor | None

    def capacity(self, k_cache: torch.Tensor) -> int:
        """Return how many keys a sequence can have."""
        pages = 1 if self.block_table is None else self.block_table.shape[1]
        return pages * k_cache.shape[1]


class NewKeys(NamedTuple):
    """Keys and values to append to a cache, and the angles by which they and the queries are rotated first.

    Attributes:
        k, v: ``(batch, seqlen_new, nheads_k, headdim)``.
        start: int32 ``(batch,)``, the position of each sequence's first new key: ``Places.seqlens``.
        angles: cosines and sines ``(positions, rotary_dim / 2)``, or None.
        interleaved: rotate features 2 i and 2 i + 1 together, else i and ``rotary_dim / 2 + i``.
    """

    k: torch.Tensor
    v: torch.Tensor
    start: torch.Tensor
    angles: tuple[torch.Tensor, torch.Tensor] | None
    interleaved: bool


class Backend(Protocol):
    """One implementation of attention, dense and over a cache.

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

    def varlen_forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, packing: Packing, score: Score
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Return ``out`` (total_q, h, d), ``softmax_lse`` (h, total_q) and ``rng_state`` of packed sequences.

        Rows of q that are not in use get out 0 and softmax_lse +inf.
        """

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
        """Return fresh, contiguous ``dq``, ``dk``, ``dv``, 0 for rows not in use. Never called with pages."""

    def varlen_probabilities(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        softmax_lse: torch.Tensor,
        rng_state: torch.Tensor,
        packing: Packing,
        score: Score,
    ) -> torch.Tensor:
        """Return ``S_dmask`` (batch, h, round_up(max_seqlen_q, 128), round_up(max_seqlen_k, 128))."""

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
        """Append ``new``, attend to every sequence's keys, and return ``out`` and ``softmax_lse``.

        With angles, new keys turn by their positions; so do queries, from position ``seqlens[b]`` on, or all
        to that one where neither causal masking nor a window gives each a position of its own. A sequence
        whose new keys do not fit stays as it was: where the lengths are on the host, it was refused before.
        """
