"""A conformance suite for any callable with flash_attn_func's signature, for pytest or without it.

With pytest, one class makes one test per case, dtype and behaviour::

    class TestMyAttention(AttentionConformance):
        subject = Subject(my_attention, dtypes=(torch.float32,), unsupported={"dropout"})

Without, :func:`run_conformance` returns a report. :func:`check_case` checks a single case, for instance one
drawn by :mod:`fap_testing.strategies`.
"""

from fap_testing.conformance.calls import CallResult, call, keep_mask_of
from fap_testing.conformance.dense import check_case
from fap_testing.conformance.subject import Subject, UnsupportedError
from fap_testing.conformance.suite import (
    AttentionConformance,
    Check,
    Outcome,
    Report,
    conformance_checks,
    run_conformance,
)

__all__ = [
    "AttentionConformance",
    "CallResult",
    "Check",
    "Outcome",
    "Report",
    "Subject",
    "UnsupportedError",
    "call",
    "check_case",
    "conformance_checks",
    "keep_mask_of",
    "run_conformance",
]
