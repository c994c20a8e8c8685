"""Run one command: measure every point, keep a record, show it, and say whether anything is wrong."""

from __future__ import annotations

from concurrent.futures import BrokenExecutor
from typing import TYPE_CHECKING, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fap_testing.bench.ahead import compile_ahead, tasks
from fap_testing.bench.measure import present_peers
from fap_testing.bench.peers import select_peers
from fap_testing.bench.record import Record, describe_machine, save, save_csv
from fap_testing.bench.report import faults, footnotes, machine_line, summary_lines, tables
from fap_testing.bench.timing import preheat
from fap_testing.bench.trial import DeviceLostError, first_line, free_memory

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from fap_testing.bench.options import Choice
    from fap_testing.bench.peers import Peer
    from fap_testing.bench.problem import Direction, Problem
    from fap_testing.bench.record import Row

    Measure = Callable[[Any, Sequence[Peer], Sequence[Direction]], list[Row]]

__all__ = ["console_of", "run", "show"]

_COLUMN, _FIRST_COLUMN = 16, 34  # what a table's cells want, where nothing says how wide the page is


def run(
    choice: Choice,
    points: Sequence[Problem],
    directions: Sequence[Direction],
    measure: Measure,
    **settings: Any,
) -> None:
    """Measure points, show the record, write what was asked for, and exit with 1 if anything is wrong.

    A record that is asked for is written after every point, so that nothing is lost if the run is ended.

    Raises:
        typer.BadParameter: an unknown peer.
        typer.Exit: a result is wrong, one of ours failed, or nothing was measured.
    """
    try:
        chosen = select_peers(choice.peers, choice.backends, command=choice.command)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    peers, absent = present_peers(chosen, choice.device, points[0].kind)
    record = Record(
        command=choice.command,
        machine=describe_machine(choice.device, choice.commit),
        settings=choice.settings(directions=list(directions), **settings),
        peers={peer.name: peer.version() for peer in peers},
        absent=absent,
    )
    _compile(choice, points, peers, directions)
    troubles = _measure_all(record, choice, points, peers, lambda point: measure(point, peers, directions))
    show(record)
    _write(record, choice)
    troubles += faults(record)
    console = Console(stderr=True, highlight=False)
    for trouble in troubles:
        console.print(trouble, markup=False, soft_wrap=True)
    if troubles:
        raise typer.Exit(1)


def show(record: Record) -> None:
    """Print a record's tables, footnotes and summary."""
    console = console_of(len({row.peer for row in record.rows}))
    console.print(machine_line(record), markup=False, soft_wrap=True)
    for table in tables(record):
        console.print(table)
    for line in (*footnotes(record), *summary_lines(record)):
        console.print(line, markup=False, soft_wrap=True)


def console_of(columns: int) -> Console:
    """Return standard output, wide enough for a table where it is no terminal."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(80, _FIRST_COLUMN + _COLUMN * columns)
    return console


def _measure_all(
    record: Record,
    choice: Choice,
    points: Sequence[Problem],
    peers: Sequence[Peer],
    measure: Callable[[Problem], list[Row]],
) -> list[str]:
    """Fill a record's rows, and return what kept points out of it."""
    if not peers:
        return []
    troubles = []
    with _progress() as progress:
        console = progress.console
        task = progress.add_task("heating up", total=len(points))
        preheat(choice.device, choice.effort.preheat_s)
        for number, point in enumerate(points, 1):
            progress.update(task, description=str(point))
            if not console.is_terminal:
                console.print(f"{number}/{len(points)} {point}", markup=False)
            try:
                record.rows.extend(measure(point))
            except DeviceLostError as error:
                record.rows.extend(error.rows)
                troubles.append(f"stopped: {error}")
                break
            except torch.OutOfMemoryError as error:
                # Of the inputs or the oracle: a peer's own is its result.
                free_memory(choice.device)
                troubles.append(f"left out: {point}: {first_line(error)}")
            except KeyboardInterrupt:
                troubles.append(f"stopped: interrupted at {point}")
                break
            progress.advance(task)
            if choice.json is not None:
                save(record, choice.json)
    return troubles


def _compile(
    choice: Choice, points: Sequence[Problem], peers: Sequence[Peer], directions: Sequence[Direction]
) -> None:
    """Compile in other processes, if that is asked for and there is anything to compile."""
    work = tasks(points, peers) if choice.jobs else []
    if not work:
        return
    with _progress() as progress:
        if not progress.console.is_terminal:
            progress.console.print(f"compiling for {len(work)} points in {choice.jobs} processes")
        try:
            for _ in progress.track(
                compile_ahead(work, directions, choice.jobs), total=len(work), description="compiling"
            ):
                pass
        except BrokenExecutor as error:
            progress.console.print(f"compiling beforehand ended early: {first_line(error)}", markup=False)


def _progress() -> Progress:
    """Return a bar on a terminal's standard error."""
    console = Console(stderr=True, highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def _write(record: Record, choice: Choice) -> None:
    if choice.json is not None:
        save(record, choice.json)
    if choice.csv is not None:
        save_csv(record, choice.csv)
    if choice.plot is not None and any(row.status == "ok" for row in record.rows):
        from fap_testing.bench.plot import draw_plot

        draw_plot(record, choice.plot)
