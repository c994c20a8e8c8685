"""The suite itself: a list of checks, run by pytest or into a report."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import pytest

from fap_testing.cases import select
from fap_testing.cases_kvcache import select_kvcache
from fap_testing.cases_varlen import select_varlen
from fap_testing.conformance.bad_input import MISTAKES, check_mistake
from fap_testing.conformance.behaviours import BEHAVIOURS
from fap_testing.conformance.dense import check_case
from fap_testing.conformance.dropout import DROPOUT_BEHAVIOURS
from fap_testing.conformance.kvcache import check_kvcache_case
from fap_testing.conformance.kvcache_bad_input import KVCACHE_MISTAKES, check_kvcache_mistake
from fap_testing.conformance.kvcache_behaviours import KVCACHE_BEHAVIOURS
from fap_testing.conformance.subject import KVCacheSubject, Subject, UnsupportedError, VarlenSubject
from fap_testing.conformance.varlen import check_varlen_case
from fap_testing.conformance.varlen_bad_input import VARLEN_MISTAKES, check_varlen_mistake
from fap_testing.conformance.varlen_behaviours import VARLEN_BEHAVIOURS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from fap_testing.conformance.subject import AnyCase

__all__ = [
    "AttentionConformance",
    "Check",
    "KVCacheConformance",
    "Outcome",
    "Report",
    "VarlenConformance",
    "conformance_checks",
    "run_conformance",
]


@dataclass(frozen=True, slots=True)
class Check:
    """One thing to check about a subject; ``run`` raises AssertionError or UnsupportedError, or passes."""

    name: str
    run: Callable[[], None]

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one check ended; ``message`` is empty for a pass."""

    name: str
    status: Literal["passed", "failed", "unsupported"]
    message: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """How every check of a suite ended."""

    outcomes: tuple[Outcome, ...]

    def of(self, status: Literal["passed", "failed", "unsupported"]) -> tuple[Outcome, ...]:
        """Return the outcomes of one status."""
        return tuple(outcome for outcome in self.outcomes if outcome.status == status)

    @property
    def failures(self) -> tuple[Outcome, ...]:
        """The checks that failed."""
        return self.of("failed")

    def __str__(self) -> str:
        counts = {status: len(self.of(status)) for status in ("passed", "failed", "unsupported")}
        lines = [", ".join(f"{count} {status}" for status, count in counts.items())]
        lines += [f"FAILED {outcome.name}: {outcome.message}" for outcome in self.failures]
        lines += [f"unsupported {outcome.name}: {outcome.message}" for outcome in self.of("unsupported")]
        return "\n".join(lines)

    def raise_for_failures(self) -> None:
        """Raise AssertionError with the whole report if any check failed."""
        if self.failures:
            raise AssertionError(str(self))


@dataclass(frozen=True, slots=True)
class _Suite:
    """What there is to check about one kind of subject."""

    quick: Callable[[], Iterable[Any]]
    check_case: Callable[[Any, Any, Any], None]
    behaviours: Mapping[str, Callable[[Any, Any], None]]
    check_mistake: Callable[[Any, Any, Any], None]
    mistakes: Mapping[str, Any]


_SUITES: dict[type[Subject], _Suite] = {
    Subject: _Suite(
        quick=partial(select, "quick"),
        check_case=check_case,
        behaviours=BEHAVIOURS | DROPOUT_BEHAVIOURS,
        check_mistake=check_mistake,
        mistakes=MISTAKES,
    ),
    VarlenSubject: _Suite(
        quick=partial(select_varlen, "quick"),
        check_case=check_varlen_case,
        behaviours=VARLEN_BEHAVIOURS,
        check_mistake=check_varlen_mistake,
        mistakes=VARLEN_MISTAKES,
    ),
    KVCacheSubject: _Suite(
        quick=partial(select_kvcache, "quick"),
        check_case=check_kvcache_case,
        behaviours=KVCACHE_BEHAVIOURS,
        check_mistake=check_kvcache_mistake,
        mistakes=KVCACHE_MISTAKES,
    ),
}


def conformance_checks(subject: Subject, cases: Iterable[AnyCase] | None = None) -> Iterator[Check]:
    """Yield every check for a subject: cases and behaviours in each of its dtypes, bad inputs in the first.

    Args:
        subject: what to check; its type decides against which of flash-attn's functions.
        cases: of that function; default is all that are tagged ``"quick"``.
    """
    suite = _SUITES[_kind(subject)]
    cases = tuple(suite.quick() if cases is None else cases)
    for dtype in subject.dtypes:
        suffix = str(dtype).removeprefix("torch.")
        for case in cases:
            yield Check(f"{case}-{suffix}", partial(suite.check_case, subject, case, dtype))
        for name, behaviour in suite.behaviours.items():
            yield Check(f"{name}-{suffix}", partial(behaviour, subject, dtype))
    for name, mistake in suite.mistakes.items():
        yield Check(f"refuses_{name}", partial(suite.check_mistake, subject, subject.dtypes[0], mistake))


def _kind(subject: Subject) -> type[Subject]:
    return next(kind for kind in type(subject).__mro__ if kind in _SUITES)


def run_conformance(
    attention: Callable[..., Any] | Subject,
    *,
    cases: Iterable[AnyCase] | None = None,
    stop_at_first_failure: bool = False,
    **options: Any,
) -> Report:
    """Check an attention implementation against the oracle and flash-attn's contract; return a report.

    Args:
        attention: a callable with flash_attn_func's signature, or a :class:`Subject`; for other functions,
            its subclass for them.
        cases: default is all that are tagged ``"quick"``.
        stop_at_first_failure: return as soon as a check fails.
        options: :class:`Subject`'s other fields, such as ``dtypes``, ``device`` and ``unsupported``.

    Raises:
        TypeError: options beside a Subject, which has its own.
    """
    if isinstance(attention, Subject):
        if options:
            raise TypeError(f"a Subject has its own options, got {', '.join(options)} besides")
        subject = attention
    else:
        subject = Subject(attention=attention, **options)
    outcomes: list[Outcome] = []
    for check in conformance_checks(subject, cases):
        outcomes.append(_run(check))
        if stop_at_first_failure and outcomes[-1].status == "failed":
            break
    return Report(tuple(outcomes))


def _run(check: Check) -> Outcome:
    try:
        check.run()
    except UnsupportedError as gap:
        return Outcome(check.name, "unsupported", str(gap))
    except Exception as failure:  # noqa: BLE001 - whatever a subject raises is a finding about it
        return Outcome(check.name, "failed", f"{type(failure).__name__}: {failure}")
    return Outcome(check.name, "passed")


class AttentionConformance:
    """Base class of a pytest class that runs the whole suite: one test per case, dtype and behaviour.

    Attributes:
        subject: what to check. A subclass must set it.
        cases: the cases to run; all that are tagged ``"quick"`` unless a subclass sets others.
    """

    subject: ClassVar[Subject]
    cases: ClassVar[Iterable[AnyCase] | None] = None
    subject_type: ClassVar[type[Subject]] = Subject

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Make one test per check."""
        if "conformance_check" in metafunc.fixturenames:
            if _kind(self.subject) is not self.subject_type:
                raise TypeError(
                    f"subject must be a {self.subject_type.__name__}, got {type(self.subject).__name__}"
                )
            checks = list(conformance_checks(self.subject, self.cases))
            metafunc.parametrize("conformance_check", checks, ids=str)

    def test_conformance(self, conformance_check: Check) -> None:
        """Run one check; what the subject declares unsupported is a skip that says so."""
        try:
            conformance_check.run()
        except UnsupportedError as gap:
            pytest.skip(str(gap))


class VarlenConformance(AttentionConformance):
    """The suite for flash_attn_varlen_func; ``subject`` is a :class:`VarlenSubject`."""

    subject_type: ClassVar[type[Subject]] = VarlenSubject


class KVCacheConformance(AttentionConformance):
    """The suite for flash_attn_with_kvcache; ``subject`` is a :class:`KVCacheSubject`."""

    subject_type: ClassVar[type[Subject]] = KVCacheSubject
