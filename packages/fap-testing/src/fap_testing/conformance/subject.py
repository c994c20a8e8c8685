"""What is under test, and what it openly does not do."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fap_testing.cases import FEATURES

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    import torch

    from fap_testing.cases import Case

__all__ = ["Subject", "UnsupportedError"]


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
            name for names in self.unsupported for name in names.split("+") if name not in FEATURES
        )
        if unknown:
            raise ValueError(f"unsupported has unknown features {unknown}, accepted: {', '.join(FEATURES)}")
        if not self.dtypes:
            raise ValueError("dtypes must name at least one dtype to test with, got none")

    def supports(self, *features: str) -> bool:
        """Whether a call that asks for all of these features together must work."""
        return not self._declared(frozenset(features))

    def provides(self, output: str, case: Case) -> bool:
        """Whether a case's call must give an output, ``"backward"`` or ``"lse"`` for instance.

        Unlike :meth:`supports`, a gap in the case's own features says nothing about its outputs.
        """
        return not any(output in names.split("+") for names in self._declared(case.features | {output}))

    def require(self, *features: str) -> None:
        """Raise UnsupportedError unless :meth:`supports` holds."""
        declared = self._declared(frozenset(features))
        if declared:
            raise UnsupportedError(f"declared unsupported: {', '.join(declared)}")

    def unsupported_in(self, case: Case) -> list[str]:
        """Return the declarations that excuse the subject from a case; empty if it has to work."""
        return self._declared(case.features)

    def _declared(self, features: frozenset[str]) -> list[str]:
        return sorted(names for names in self.unsupported if features.issuperset(names.split("+")))
