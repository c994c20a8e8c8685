"""Does a subject append and attend rightly: out, LSE and caches against the oracle, the rest left alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.conformance.calls import (
    NonconformityError,
    check_refusal,
    kind_of,
    require_like,
    require_that,
)
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import make_kvcache_inputs

if TYPE_CHECKING:
    from fap_testing.cases_kvcache import KVCacheCase
    from fap_testing.conformance.subject import KVCacheSubject
    from fap_testing.inputs_kvcache import KVCacheInputs

__all__ = ["KVCacheCallResult", "call_kvcache", "check_kvcache_case", "require_nothing_written"]


@dataclass(frozen=True, slots=True, eq=False)
class KVCacheCallResult:
    """What one call returned, and the caches after it.

    Attributes:
        out: ``(batch, seqlen_q, nheads, head_dim)``.
        softmax_lse: ``(batch, nheads, seqlen_q)``; None if the subject does not provide it.
        k_cache, v_cache: those of the inputs, which the call has written to.
    """

    out: torch.Tensor
    softmax_lse: torch.Tensor | None
    k_cache: torch.Tensor
    v_cache: torch.Tensor

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return the results that an oracle can check, by name."""
        names = ("out", "softmax_lse", "k_cache", "v_cache")
        return {name: x for name in names if (x := getattr(self, name)) is not None}


def call_kvcache(subject: KVCacheSubject, inputs: KVCacheInputs, **extra: Any) -> KVCacheCallResult:
    """Run a subject on a case's inputs, whose caches it writes to.

    Args:
        subject: what to run.
        inputs: from :func:`fap_testing.inputs_kvcache.make_kvcache_inputs`.
        extra: keyword arguments beyond the case's own, such as ``num_splits=3``.

    Raises:
        NonconformityError: the answer has the wrong structure, shape, dtype or device.
    """
    options = inputs.options | extra
    wants_lse = options.pop("return_softmax_lse", subject.provides("lse", inputs.case))
    if wants_lse:
        options["return_softmax_lse"] = True
    q = inputs.q
    returned = subject.attention(q, inputs.k_cache, inputs.v_cache, **options)
    if not wants_lse:
        require_like("out", returned, q.shape, q.dtype, q.device)
        return KVCacheCallResult(returned, None, inputs.k_cache, inputs.v_cache)
    require_that(
        isinstance(returned, (tuple, list)) and len(returned) == 2,
        f"return_softmax_lse=True must return (out, softmax_lse), got {kind_of(returned)}",
    )
    out, lse = returned
    require_like("out", out, q.shape, q.dtype, q.device)
    lse_dtypes = (torch.float32, torch.promote_types(q.dtype, torch.float32))
    require_like("softmax_lse", lse, (q.shape[0], q.shape[2], q.shape[1]), lse_dtypes, q.device)
    return KVCacheCallResult(out, lse, inputs.k_cache, inputs.v_cache)


def check_kvcache_case(subject: KVCacheSubject, case: KVCacheCase, dtype: torch.dtype) -> None:
    """Check that a subject computes one case rightly, on a poisoned cache, and writes nothing else.

    Raises:
        AssertionError: a wrong result, a wrong cache, or writes where there should be none.
        UnsupportedError: the subject declares that it does not support the case, and indeed refused it.
    """
    inputs = make_kvcache_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)

    def check(result: KVCacheCallResult) -> None:
        expect_kvcache(inputs).check(**result.tensors())
        inputs.assert_untouched()

    def call_or_refuse() -> KVCacheCallResult:
        try:
            return call_kvcache(subject, inputs)
        except NonconformityError:
            raise
        except Exception:
            require_nothing_written(inputs)
            raise

    declared = subject.unsupported_in(case)
    if declared:
        check_refusal(declared, call_or_refuse, check)
    else:
        check(call_kvcache(subject, inputs))


def require_nothing_written(inputs: KVCacheInputs) -> None:
    """Require that a call that was refused has left every argument as it was."""
    try:
        inputs.assert_untouched(nothing_written=True)
    except AssertionError as wrong:
        raise NonconformityError(f"a call that is refused must not write: {wrong}") from None
