"""Tables and lines for a reader: the figures, what is behind those that are missing, and the summary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from fap_testing.bench.compare import geometric_mean
from fap_testing.bench.memory import LINEAR, growth

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from fap_testing.bench.compare import Comparison
    from fap_testing.bench.promises import Finding, Promise
    from fap_testing.bench.record import Record, Row

__all__ = [
    "comparison_table",
    "faults",
    "findings_table",
    "footnotes",
    "machine_line",
    "notes",
    "summary_lines",
    "tables",
]

_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class _Style:
    """How a command's figures are shown: the heading, the text of one, and whether more is better."""

    title: str
    show: Callable[[Row], str]
    value: Callable[[Row], float]
    more_is_better: bool


def _scatter(row: Row, metric: str) -> str:
    """Return half the distance of the quartiles, in percent of the median."""
    median = row.measures[metric]
    half = (
        50.0 * (row.measures[f"{metric}_upper"] - row.measures[f"{metric}_lower"]) / median if median else 0.0
    )
    return f"±{half:.0f}%"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _tflops(row: Row) -> str:
    return f"{_three_digits(row.measures['tflops'])} {_scatter(row, 'ms')}"


_STYLES = {
    "prefill": _Style("TFLOP/s", _tflops, lambda row: row.measures["tflops"], more_is_better=True),
    "varlen": _Style("TFLOP/s", _tflops, lambda row: row.measures["tflops"], more_is_better=True),
    "decode": _Style(
        "microseconds (GB/s)",
        lambda row: f"{_three_digits(1e3 * row.measures['ms'])} ({_three_digits(row.measures['gbps'])})",
        lambda row: row.measures["ms"],
        more_is_better=False,
    ),
    "overhead": _Style(
        "host microseconds per call",
        lambda row: f"{_three_digits(row.measures['us'])} {_scatter(row, 'us')}",
        lambda row: row.measures["us"],
        more_is_better=False,
    ),
    "memory": _Style(
        "MiB beyond the inputs at the peak (times what the tensors account for)",
        lambda row: f"{row.measures['bytes'] / _MIB:.1f} ({row.measures['ratio']:.2f}x)",
        lambda row: row.measures["bytes"],
        more_is_better=False,
    ),
}


def notes(record: Record) -> dict[str, int]:
    """Number the reasons why rows have no figure, in the order in which they are met."""
    reasons = dict.fromkeys(_reason(row) for row in record.rows if row.status != "ok")
    return {reason: number for number, reason in enumerate(reasons, 1)}


def footnotes(record: Record) -> list[str]:
    """Return those reasons with their numbers, and then who is absent and why."""
    lines = [f"[{number}] {reason}" for reason, number in notes(record).items()]
    absent: dict[str, list[str]] = {}
    for name, reason in record.absent.items():
        absent.setdefault(reason, []).append(name)
    return lines + [f"absent: {', '.join(names)}: {reason}" for reason, names in absent.items()]


def tables(record: Record) -> Iterator[Table]:
    """Yield one table for each direction: points down, peers across, the best of each point in bold."""
    style, numbers = _STYLES[record.command], notes(record)
    peers = list(dict.fromkeys(row.peer for row in record.rows))
    for direction in dict.fromkeys(row.direction for row in record.rows):
        title = f"{record.command} {direction}: {style.title}"
        table = Table(title=title, title_justify="left", min_width=min(80, len(title)))
        table.add_column("point", no_wrap=True)
        for peer in peers:
            table.add_column(peer, justify="right", overflow="fold")
        for point, rows in _by_point(record, direction).items():
            by_peer = {row.peer: row for row in rows}
            best = _best(rows, style)
            cells = [
                _cell(by_peer[peer], style, numbers, best) if peer in by_peer else Text() for peer in peers
            ]
            table.add_row(point, *cells)
        yield table


def summary_lines(record: Record) -> list[str]:
    """Return for each of our peers how its figures compare with the best other one's, point by point.

    The ratio is the other's figure over ours: above 1 we are faster, or smaller. For memory the growth is
    said as well.
    """
    lines = []
    for peer in dict.fromkeys(row.peer for row in record.rows if row.ours):
        ratios = list(_ratios(record, peer))
        if not ratios:
            lines.append(f"{peer}: nothing to compare with")
            continue
        worst, row, other = min(ratios, key=lambda item: item[0])
        mean = geometric_mean([ratio for ratio, _, _ in ratios])
        lines.append(
            f"{peer}: geometric mean {mean:.2f}x the best peer over {len(ratios)} points; "
            f"worst {worst:.2f}x at {row.point} {row.direction}, against {other.peer}"
        )
    if record.command == "memory":
        lines += [
            f"{peer} {direction}: grows with seqlen^{power:.2f}"
            for peer, direction, power in _growths(record)
        ]
    return lines


def faults(record: Record) -> list[str]:
    """Return what must not be: wrong results, failures of our own, memory that bends, no figure at all."""
    wrong = [f"WRONG: {_where(row)}: {_first(row.note)}" for row in record.rows if row.status == "wrong"]
    failed = [
        f"failed: {_where(row)}: {_first(row.note)}"
        for row in record.rows
        if row.status == "failed" and row.ours
    ]
    bent = []
    if record.command == "memory":
        ours = {row.peer for row in record.rows if row.ours}
        bent = [
            f"not linear: {peer} {direction} grows with seqlen^{power:.2f}"
            for peer, direction, power in _growths(record)
            if peer in ours and power > LINEAR
        ]
    nothing = [] if any(row.status == "ok" for row in record.rows) else ["nothing was measured"]
    return wrong + failed + bent + nothing


def machine_line(record: Record) -> str:
    """Return what the figures depend on, in one line."""
    names = ("gpu", "cpu", "driver", "cuda", "torch", "triton", "commit")
    return ", ".join(f"{name} {record.machine[name]}" for name in names if record.machine.get(name))


def comparison_table(comparison: Comparison) -> Table:
    """Return the figures of two runs side by side, what got worse in bold."""
    metric = comparison.metric
    table = Table(title=f"{metric}, new over old: above 1 is worse", title_justify="left")
    for name in ("point", "direction", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("old", "new", "ratio"):
        table.add_column(name, justify="right")
    for pair in comparison.pairs:
        figures = [_figure(row, metric) for row in (pair.old, pair.new)]
        ratio = "" if pair.ratio is None else f"{pair.ratio:.3f}"
        cells = [pair.new.point, pair.new.direction, pair.new.peer, *figures, ratio]
        table.add_row(*[Text(cell) for cell in cells], style="bold red" if pair.worse else "")
    return table


def findings_table(findings: Sequence[Finding]) -> Table:
    """Return promises beside what was measured, those that are not kept in bold."""
    table = Table(title="promised, and measured", title_justify="left")
    table.add_column("point", overflow="fold")  # what was not measured is named at length, and gives way
    for name in ("direction", "peer"):
        table.add_column(name, no_wrap=True)
    for name in ("promised", "measured"):
        table.add_column(name, justify="right", no_wrap=True)
    for finding in findings:
        promise, row = finding.promise, finding.row
        where = ", ".join(f"{name} {value}" for name, value in promise.where.items())
        point, direction = (row.point, row.direction) if row else (where, "")
        measured = "-" if row is None else row.status if finding.value is None else f"{finding.value:.4g}"
        cells = [point, direction, promise.peer, _promised(promise), measured]
        style = {True: "", False: "bold red", None: "dim"}[finding.kept]
        table.add_row(*[Text(cell) for cell in cells], style=style)
    return table


def _promised(promise: Promise) -> str:
    bound = f"{promise.at_least:g}" if promise.at_least is not None else f"at most {promise.at_most:g}"
    if promise.times is None:
        return f"{bound} {promise.measure}"
    other = " ".join(str(x) if name == "peer" else f"{name} {x}" for name, x in promise.times.items())
    return f"{bound}x {other}"


def _figure(row: Row, metric: str) -> str:
    return f"{row.measures[metric]:.4g}" if row.status == "ok" else row.status


def _reason(row: Row) -> str:
    return f"{row.peer} {row.status}: {_first(row.note)}"


def _first(note: str) -> str:
    return (note.splitlines() or [""])[0]


def _where(row: Row) -> str:
    return f"{row.peer} at {row.point} {row.direction}"


def _by_point(record: Record, direction: str) -> dict[str, list[Row]]:
    points: dict[str, list[Row]] = {}
    for row in record.rows:
        if row.direction == direction:
            points.setdefault(row.point, []).append(row)
    return points


def _best(rows: Sequence[Row], style: _Style) -> float | None:
    values = [style.value(row) for row in rows if row.status == "ok"]
    if not values:
        return None
    return max(values) if style.more_is_better else min(values)


def _cell(row: Row, style: _Style, numbers: dict[str, int], best: float | None) -> Text:
    if row.status == "ok":
        return Text(style.show(row), style="bold" if style.value(row) == best else "")
    word = {"wrong": "WRONG", "failed": "failed", "unsupported": "-"}[row.status]
    return Text(f"{word} [{numbers[_reason(row)]}]", style="bold red" if row.status == "wrong" else "dim")


def _ratios(record: Record, peer: str) -> Iterator[tuple[float, Row, Row]]:
    """Yield the best other peer's figure over this one's, wherever both are right."""
    for direction in dict.fromkeys(row.direction for row in record.rows):
        for rows in _by_point(record, direction).values():
            right = [row for row in rows if row.status == "ok"]
            others = [row for row in right if not row.ours]
            for own in (row for row in right if row.peer == peer and others):
                best = min(others, key=lambda row: row.measures[record.metric])
                yield best.measures[record.metric] / own.measures[record.metric], own, best


def _growths(record: Record) -> Iterator[tuple[str, str, float]]:
    """Yield peer, direction and :func:`growth`, the worst over head dimensions and masks."""
    series: dict[tuple[str, str], dict[tuple[object, ...], list[Row]]] = {}
    for row in record.rows:
        shape = (row.problem["head_dim"], row.problem["mask"], row.problem["batch"])
        series.setdefault((row.peer, row.direction), {}).setdefault(shape, []).append(row)
    for (peer, direction), shapes in series.items():
        powers = [power for rows in shapes.values() if (power := growth(rows)) == power]
        if powers:
            yield peer, direction, max(powers)
