"""Hold records to what was promised: so many times a peer's speed, so many GB/s, so many microseconds.

Promises are data, a JSON file ``{"promises": [...]}`` of objects with the fields of :class:`Promise`::

    {"peer": "fap-triton", "where": {"command": "prefill", "head_dim": [64, 128], "direction": "fwd"},
     "times": {"peer": "sdpa-flash"}, "at_least": 1.35, "why": "..."}
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from fap_testing.bench.record import Record, Row

__all__ = ["Finding", "Promise", "hold", "load_promises"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """What the figures of one peer must reach at some points.

    Attributes:
        peer: whose figures, by the name in the record.
        where: a row's command, direction and the sizes in its ``problem``, each a value or a list of values.
        at_least: the least that counts: of ``measure``, or of the speed as a multiple of another row's.
        at_most: the most of ``measure``.
        measure: a name in a row's ``measures``; not with ``times``.
        times: what tells the other row: "peer", "direction" and sizes, where they are not this row's own.
        why: where the promise comes from.
    """

    peer: str
    where: dict[str, Any] = field(default_factory=dict)
    at_least: float | None = None
    at_most: float | None = None
    measure: str | None = None
    times: dict[str, Any] | None = None
    why: str = ""

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ValueError("a promise must have one of at_least and at_most")
        if (self.measure is None) == (self.times is None):
            raise ValueError("a promise must have one of measure and times")


@dataclass(frozen=True, slots=True)
class Finding:
    """A promise at one point.

    Attributes:
        promise: which.
        row: where it was looked for; None if no row is such a point.
        value: what was measured, in the promise's terms; None where there is no figure.
    """

    promise: Promise
    row: Row | None
    value: float | None

    @property
    def kept(self) -> bool | None:
        """Whether the promise is kept; None where no record has such a point."""
        if self.row is None:
            return None
        if self.value is None:
            return False
        least, most = self.promise.at_least, self.promise.at_most
        return (least is None or self.value >= least) and (most is None or self.value <= most)


def load_promises(path: Path) -> list[Promise]:
    """Read a file of promises.

    Raises:
        ValueError: it is none.
    """
    try:
        return [Promise(**fields) for fields in json.loads(path.read_text(encoding="utf-8"))["promises"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no file of promises ({type(error).__name__}: {error})") from error


def hold(records: Sequence[Record], promises: Sequence[Promise]) -> list[Finding]:
    """Look up every promise at every point of the records that it is about.

    A row that is wrong, failed or unsupported keeps no promise. Where the other row of ``times`` is missing
    or has no figure, there is nothing to compare with.
    """
    findings: list[Finding] = []
    for promise in promises:
        found = [finding for record in records for finding in _findings(record, promise)]
        findings += found or [Finding(promise, None, None)]
    return findings


def _findings(record: Record, promise: Promise) -> Iterator[Finding]:
    for row in record.rows:
        if row.peer != promise.peer or not _fits(_terms(record, row), promise.where):
            continue
        if promise.times is None:
            yield Finding(promise, row, row.measures.get(promise.measure or ""))
            continue
        other = _other(record, row, promise.times)
        if other is None or other.status != "ok":
            continue
        own = row.measures.get(record.metric)
        yield Finding(promise, row, other.measures[record.metric] / own if own else None)


def _fits(terms: dict[str, Any], where: dict[str, Any]) -> bool:
    return all(
        terms.get(name) in (value if isinstance(value, list) else [value]) for name, value in where.items()
    )


def _other(record: Record, row: Row, changes: dict[str, Any]) -> Row | None:
    wanted = {**_terms(record, row), **changes}
    return next((other for other in record.rows if _terms(record, other) == wanted), None)


def _terms(record: Record, row: Row) -> dict[str, Any]:
    return {**row.problem, "command": record.command, "direction": row.direction, "peer": row.peer}
