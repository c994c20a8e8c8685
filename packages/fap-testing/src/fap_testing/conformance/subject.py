"""What is under test, and what it openly does not do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from fap_testing.cases import FEATURES
from fap_testing.cases_kvcache import KVCACHE_FEATURES
from fap_testing.cases_varlen import VARLEN_FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    import torch

__all__ = ["KVCacheSubject", "Subject", "UnsupportedError", "VarlenSubject"]


class AnyCase(Protocol):
    """A case of any suite."""

    @property
    def features(self) -> frozenset[str]:
        """What an implementation must support to run it."""


class UnsupportedError(Exception):
    """A check needs what the subject declares it does not support. Tests report it as a skip."""


@dataclass(frozen=True, kw_only=True)
class Subject:
    """An attention implementation under test.

    Attributes:
        attention: a callable with flash_attn_func's signature: ``attention(q, k, v, dropout_p=0.0,
            softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
            deterministic=False, return_attn_probs=False)``. Options at their default are not passed, so it
            need not know those that it declares unsupported.
        dtypes: of q, k and v, to test with.
        device: where to test. Nothing touches it before the first check runs.
        unsupported: names from :data:`fap_testing.cases.FEATURES`, or several joined by ``+`` for a
            combination, as in ``"causal+cross_lengths"``. What is declared here must be refused with an error
            (or be right after all): a wrong result without an error still fails. All else must work.
        repeats: how many runs have to be bitwise equal under ``deterministic=True``.
        seed: of the inputs.

    Raises:
        ValueError: an unknown feature, or no dtype.
    """

    features: ClassVar[Mapping[str, str]] = FEATURES
    attention: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device | str = "cpu"
    unsupported: Collection[str] = field(default_factory=frozenset)
    repeats: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.unsupported, str):
            raise ValueError(f"unsupported must be a collection of names, got {self.unsupported!r}")
        unknown = sorted(
            name for names in self.unsupported for name in names.split("+") if name not in self.features
        )
        if unknown:
            accepted = ", ".join(self.features)
            raise ValueError(f"unsupported has unknown features {unknown}, accepted: {accepted}")
        if not self.dtypes:
            raise ValueError("dtypes must name at least one dtype to test with, got none")

    def supports(self, *features: str) -> bool:
        """Whether a call that asks for all of these features together must work."""
        return not self._declared(frozenset(features))

    def provides(self, output: str, case: AnyCase) -> bool:
        """Whether a case's call must give an output, ``"backward"`` or ``"lse"`` for instance.

        Unlike :meth:`supports`, a gap in the case's own features says nothing about its outputs.
        """
        return not any(output in names.split("+") for names in self._declared(case.features | {output}))

    def require(self, *features: str) -> None:
        """Raise UnsupportedError unless :meth:`supports` holds."""
        declared = self._declared(frozenset(features))
        if declared:
            raise UnsupportedError(f"declared unsupported: {', '.join(declared)}")

    def unsupported_in(self, case: AnyCase) -> list[str]:
        """Return the declarations that excuse the subject from a case; empty if it has to work."""
        return self._declared(case.features)

    def _declared(self, features: frozenset[str]) -> list[str]:
        return sorted(names for names in self.unsupported if features.issuperset(names.split("+")))


@dataclass(frozen=True, kw_only=True)
class VarlenSubject(Subject):
    """An attention over packed sequences under test: a callable with flash_attn_varlen_func's signature.

    ``attention(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, ...)`` takes the options of
    flash_attn_func and ``block_table``, and ``seqused_q`` and ``seqused_k`` unless it declares ``"seqused"``
    unsupported. Attributes are :class:`Subject`'s; the names in ``unsupported`` are from
    :data:`fap_testing.cases_varlen.VARLEN_FEATURES`.
    """

    features: ClassVar[Mapping[str, str]] = VARLEN_FEATURES


@dataclass(frozen=True, kw_only=True)
class KVCacheSubject(Subject):
    """An attention over a key/value cache under test: a callable with flash_attn_with_kvcache's signature.

    ``attention(q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None,
    cache_batch_idx=None, cache_leftpad=None, block_table=None, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, rotary_interleaved=True, alibi_slopes=None, num_splits=0,
    return_softmax_lse=False)`` writes to the caches. Attributes are :class:`Subject`'s; the names in
    ``unsupported`` are from :data:`fap_testing.cases_kvcache.KVCACHE_FEATURES`.
    """

    features: ClassVar[Mapping[str, str]] = KVCACHE_FEATURES
