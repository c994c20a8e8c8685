"""Conformance suites for callables with the signatures of flash-attn's functions, for pytest or without it.

With pytest, one class makes one test per case, dtype and behaviour::

    class TestMyAttention(AttentionConformance):
        subject = Subject(my_attention, dtypes=(torch.float32,), unsupported={"dropout"})

:class:`VarlenConformance` and :class:`VarlenSubject` do the same for flash_attn_varlen_func, and
:class:`KVCacheConformance` and :class:`KVCacheSubject` for flash_attn_with_kvcache.

Without, :func:`run_conformance` returns a report. :func:`check_case` checks a single case, for instance one
drawn by :mod:`fap_testing.strategies`; :func:`check_varlen_case` and :func:`check_kvcache_case`
are its like.
"""

from fap_testing.conformance.calls import CallResult, call, keep_mask_of
from fap_testing.conformance.dense import check_case
from fap_testing.conformance.kvcache import check_kvcache_case
from fap_testing.conformance.subject import KVCacheSubject, Subject, UnsupportedError, VarlenSubject
from fap_testing.conformance.suite import (
    AttentionConformance,
    Check,
    KVCacheConformance,
    Outcome,
    Report,
    VarlenConformance,
    conformance_checks,
    run_conformance,
)
from fap_testing.conformance.varlen import check_varlen_case

__all__ = [
    "AttentionConformance",
    "CallResult",
    "Check",
    "KVCacheConformance",
    "KVCacheSubject",
    "Outcome",
    "Report",
    "Subject",
    "UnsupportedError",
    "VarlenConformance",
    "VarlenSubject",
    "call",
    "check_case",
    "check_kvcache_case",
    "check_varlen_case",
    "conformance_checks",
    "keep_mask_of",
    "run_conformance",
]
