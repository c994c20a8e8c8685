"""Which back end runs a call: the setting, the choice, and the reasons for it."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from fap_api.backends._support import constant_in_graphs
from fap_api.backends.registry import BACKENDS, get_backend

if TYPE_CHECKING:
    from types import TracebackType

    from fap_kernels.problem import AttentionProblem

__all__ = [
    "ENVIRONMENT",
    "available_backends",
    "choose",
    "explicit_choice",
    "reasons_against",
    "setting",
    "use_backend",
]

ENVIRONMENT = "FLASH_ATTENTION_USE_FLAGGEMS"
_TRUE = ("TRUE", "1", "YES")
_FALSE = ("FALSE", "0", "NO")
# Unless told otherwise, the first of these without a reason not to.
_AUTOMATIC = ("triton", "flag_gems", "torch")

_logger = logging.getLogger("fap_api")
_logged: set[str] = set()
# A plain global, not a context variable: torch.compile guards on it, and recompiles when it changes.
_explicit: str | None = None


class use_backend:  # noqa: N801 - read and used as a function
    """Choose the back end that runs attention: ``use_backend("torch")``, or ``with use_backend("torch"):``.

    As a call it holds until the next call; as a context manager until the end of the block, when the earlier
    choice comes back. The choice is process-wide, and explicit: a call that this back end cannot run raises
    with every reason. It has precedence over ``FLASH_ATTENTION_USE_FLAGGEMS``.

    Args:
        name: "triton", "flag_gems", "cuda" or "torch"; None goes back to the automatic choice.

    Raises:
        ValueError: there is no back end of that name.
    """

    def __init__(self, name: str | None) -> None:
        global _explicit  # noqa: PLW0603 - see there
        if name is not None:
            get_backend(name)
        self._earlier = _explicit
        _explicit = name

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _explicit  # noqa: PLW0603
        _explicit = self._earlier


def available_backends() -> tuple[str, ...]:
    """Return the names of the back ends that are installed and load here.

    Whether one of them runs a given call is told by :func:`fap_api.explain`. Back ends that are installed are
    imported to find out.
    """
    return tuple(name for name, backend in BACKENDS.items() if not backend.available())


def explicit_choice() -> str | None:
    """Return what :class:`use_backend` last chose."""
    return _explicit


def setting() -> tuple[str | None, str]:
    """Return the explicitly chosen back end, or None for the automatic choice, and who chose it.

    Raises:
        ValueError: ``FLASH_ATTENTION_USE_FLAGGEMS`` has a value that is not one of the accepted ones.
    """
    if _explicit is not None:
        return _explicit, f"fap_api.use_backend({_explicit!r})"
    value = os.environ.get(ENVIRONMENT)
    if value is None:
        return None, f"{ENVIRONMENT} unset"
    word = value.strip().upper()
    if word in _TRUE:
        return None, f"{ENVIRONMENT}={value}"
    if word in _FALSE:
        return "cuda", f"{ENVIRONMENT}={value}"
    raise ValueError(
        f"the environment variable {ENVIRONMENT} must be one of {', '.join((*_TRUE, *_FALSE))} (in any case) "
        f"or unset, got {value!r}"
    )


def choose(problem: AttentionProblem) -> str:
    """Return the name of the back end that runs ``problem``.

    Raises:
        ImportError: the explicit choice is not installed.
        RuntimeError: the explicit choice cannot run this call.
    """
    explicit, chosen_by = setting()
    if explicit is not None:
        _require(explicit, chosen_by, problem)
        return explicit
    passed_over: list[str] = []
    for name in _AUTOMATIC:
        reasons = _first_reasons_against(name, problem)
        if not reasons:
            if passed_over:
                _log_once(name, "; ".join(passed_over), problem.device.type == "cpu")
            return name
        passed_over.append(f"{name}: {', '.join(reasons)}")
    raise RuntimeError(f"no back end can run this call: {'; '.join(passed_over)}")


def reasons_against(name: str, problem: AttentionProblem) -> list[str]:
    """Return every reason why the back end ``name`` cannot run ``problem`` here."""
    return [*BACKENDS[name].available(), *BACKENDS[name].unsupported_reasons(problem)]


def _require(name: str, chosen_by: str, problem: AttentionProblem) -> None:
    missing = _missing_package(name)
    if missing is not None:
        raise ImportError(f"the back end {name!r} was chosen by {chosen_by}, but {missing}")
    reasons = [*_not_available(name), *BACKENDS[name].unsupported_reasons(problem)]
    if reasons:
        raise RuntimeError(
            f"the back end {name!r} was chosen by {chosen_by} and cannot run this call: "
            f"{'; '.join(reasons)}. {_how_to_ask(problem)} tells which back ends can."
        )


def _how_to_ask(problem: AttentionProblem) -> str:
    if problem.cached:
        return "fap_api.explain_with_kvcache(...)"
    return "fap_api.explain_varlen(...)" if problem.packed else "fap_api.explain(q, k, v, ...)"


def _first_reasons_against(name: str, problem: AttentionProblem) -> list[str]:
    """Return reasons from the cheapest question that has any: an optional package is imported last."""
    missing = _missing_package(name)
    if missing is not None:
        return [missing]
    return BACKENDS[name].unsupported_reasons(problem) or _not_available(name)


@constant_in_graphs
def _missing_package(name: str) -> str | None:
    return BACKENDS[name].missing_package()


@constant_in_graphs
def _not_available(name: str) -> list[str]:
    return BACKENDS[name].available()


@constant_in_graphs
def _log_once(name: str, reasons: str, expected: bool) -> None:
    """Log a fallback the first time it is met; on a CPU, where nothing else was to be expected, as info."""
    message = f"attention runs on the back end {name!r}: {reasons}"
    if message not in _logged:
        _logged.add(message)
        _logger.log(logging.INFO if expected else logging.WARNING, "%s", message)
