"""A picture of a recorded run: figures against the sequence length, a curve for each peer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from fap_testing.bench.problem import DIRECTIONS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from fap_testing.bench.problem import Direction
    from fap_testing.bench.record import Record, Row

__all__ = ["draw_plot"]

_PANEL = (4.2, 3.0)  # inches
# What is drawn, on which kind of axis. Decoding is bound by memory, and so is measured by it.
_FIGURES = {
    "prefill": ("tflops", "TFLOP/s"),
    "varlen": ("tflops", "TFLOP/s"),
    "decode": ("gbps", "GB/s"),
    "overhead": ("us", "host microseconds"),
    "memory": ("bytes", "bytes beyond the inputs"),
}
_LOGARITHMIC = ("memory",)


def draw_plot(record: Record, path: Path) -> None:
    """Draw a run, a row of panels for each direction and mask, a column for each head dimension.

    Raises:
        ValueError: the record has no figure that could be drawn.
    """
    rows = [row for row in record.rows if row.status == "ok"]
    if not rows:
        raise ValueError("the record has no figure to draw: every row is wrong, failed or unsupported")
    lines = sorted(
        {_line(row) for row in rows}, key=lambda line: (DIRECTIONS.index(line[0]), line[1] != "full")
    )
    columns = sorted({_column(row) for row in rows})
    peers = list(dict.fromkeys(row.peer for row in rows))
    size = (_PANEL[0] * len(columns), _PANEL[1] * len(lines) + 0.8)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(lines), len(columns), squeeze=False)
    for (direction, mask), panels in zip(lines, grid, strict=True):
        for column, axes in zip(columns, panels, strict=True):
            shown = [row for row in rows if _line(row) == (direction, mask) and _column(row) == column]
            _draw_panel(axes, shown, peers, record.command)
            head_dim, batch = column
            sizes = f"head_dim {head_dim}, batch {batch}" if batch else f"head_dim {head_dim}"
            axes.set_title(f"{direction}, {mask}, {sizes}", fontsize=10)
    handles = {
        label: handle
        for axes in grid.flat
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(6, len(handles)))
    machine = record.machine
    figure.suptitle(
        f"{machine.get('gpu', machine.get('cpu', ''))}, torch {machine.get('torch', '')}", fontsize=10
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _line(row: Row) -> tuple[Direction, str]:
    return row.direction, row.problem["mask"]


def _column(row: Row) -> tuple[int, int]:
    """Return the head dimension and, where it does not follow from the length, the batch."""
    batch = row.problem["batch"] if row.problem["kind"] == "decode" else 0
    return row.problem["head_dim"], batch


def _draw_panel(axes: Axes, rows: Sequence[Row], peers: Sequence[str], command: str) -> None:
    measure, label = _FIGURES[command]
    if command == "overhead":
        _draw_bars(axes, rows, peers)
        return
    for number, peer in enumerate(peers):
        own = sorted((row for row in rows if row.peer == peer), key=lambda row: row.problem["seqlen"])
        if not own:
            continue
        lengths = [row.problem["seqlen"] for row in own]
        values = [row.measures[measure] for row in own]
        width = 2.4 if own[0].ours else 1.2
        axes.plot(
            lengths, values, label=peer, color=f"C{number % 10}", linewidth=width, marker="o", markersize=3
        )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda length, _: f"{length / 1024:g}k" if length >= 1024 else f"{length:g}"
    )
    if command in _LOGARITHMIC:
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(bottom=0)
    axes.set_xlabel("sequence length")
    axes.set_ylabel(label)
    axes.grid(visible=True, alpha=0.3)


def _draw_bars(axes: Axes, rows: Sequence[Row], peers: Sequence[str]) -> None:
    for row in rows:
        color = f"C{peers.index(row.peer) % 10}"
        axes.barh(row.peer, row.measures["us"], label=row.peer, color=color)
    axes.set_xlabel(_FIGURES["overhead"][1])
    axes.invert_yaxis()
