"""Two runs of the same command side by side."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fap_testing.bench.record import differences

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fap_testing.bench.record import Record, Row

__all__ = ["Comparison", "Pair", "compare", "geometric_mean"]


@dataclass(frozen=True, slots=True)
class Pair:
    """One measurement in both runs.

    Attributes:
        old, new: the rows.
        ratio: the new figure over the old one, above 1 where it got worse; None unless both have one.
        worse: whether it got worse by more than the threshold, or is no longer right.
    """

    old: Row
    new: Row
    ratio: float | None
    worse: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """What :func:`compare` found.

    Attributes:
        metric: what the ratios are of.
        pairs: the measurements that both runs have, in the new run's order.
        missing: measurements that only the old run has.
        added: measurements that only the new run has.
        machine: what differs between the machines: name, old, new.
    """

    metric: str
    pairs: list[Pair]
    missing: list[Row]
    added: list[Row]
    machine: list[tuple[str, str, str]]

    @property
    def worse(self) -> list[Pair]:
        """The measurements that got worse."""
        return [pair for pair in self.pairs if pair.worse]

    @property
    def mean(self) -> float:
        """The geometric mean of all ratios, NaN if there are none."""
        return geometric_mean([pair.ratio for pair in self.pairs if pair.ratio is not None])


def compare(old: Record, new: Record, *, threshold: float, peers: Sequence[str] = ()) -> Comparison:
    """Compare two runs of one command, point by point.

    Args:
        old, new: the runs.
        threshold: by how much a figure may grow, 0.05 for 5%.
        peers: whose figures, by the name in the record; without names FlashAttention-Plus's own, or all where
            neither run has any.

    Raises:
        ValueError: the runs are of different commands, or have no measurement in common.
    """
    if old.command != new.command:
        raise ValueError(f"both files must be of one command, got {old.command!r} and {new.command!r}")
    own_only = not peers and any(row.ours for row in (*old.rows, *new.rows))

    def chosen(record: Record) -> dict[tuple[str, str, str], Row]:
        return {r.key: r for r in record.rows if (r.peer in peers if peers else r.ours or not own_only)}

    before, after = chosen(old), chosen(new)
    common = [key for key in after if key in before]
    if not common:
        raise ValueError(
            "the files have no measurement in common: the same sizes, direction and peer; "
            f"peers are {_peers(old)} and {_peers(new)}"
        )
    metric = new.metric
    return Comparison(
        metric=metric,
        pairs=[_pair(before[key], after[key], metric, threshold) for key in common],
        missing=[row for key, row in before.items() if key not in after],
        added=[row for key, row in after.items() if key not in before],
        machine=differences(old, new),
    )


def geometric_mean(ratios: Sequence[float]) -> float:
    """Return the geometric mean, NaN of nothing."""
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else math.nan


def _pair(old: Row, new: Row, metric: str, threshold: float) -> Pair:
    if old.status != "ok" or new.status != "ok":
        return Pair(old, new, None, worse=old.status == "ok")
    ratio = new.measures[metric] / old.measures[metric]
    return Pair(old, new, ratio, worse=ratio > 1.0 + threshold)


def _peers(record: Record) -> str:
    return ", ".join(dict.fromkeys(row.peer for row in record.rows)) or "none"
