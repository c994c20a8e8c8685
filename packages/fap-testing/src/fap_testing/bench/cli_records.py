"""The subcommands of ``fap-bench`` that read records instead of measuring."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fap_testing.bench import options
from fap_testing.bench.compare import compare as compare_records
from fap_testing.bench.plot import draw_plot
from fap_testing.bench.promises import hold, load_promises
from fap_testing.bench.record import load, merge
from fap_testing.bench.report import comparison_table, findings_table
from fap_testing.bench.run import console_of
from fap_testing.bench.run import show as show_record

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    from fap_testing.bench.record import Record

    Read = TypeVar("Read")

__all__ = ["check", "compare", "plot", "show"]

_Records = Annotated[
    list[Path], typer.Argument(help="Records that --json wrote; of the same point and peer, the last counts.")
]


def show(records: _Records) -> None:
    """Print records of one command again, as one."""
    show_record(_read(lambda: merge([load(path) for path in records])))


def compare(
    old: Annotated[Path, typer.Argument(help="A record that --json wrote.")],
    new: Annotated[Path, typer.Argument(help="A later one of the same command.")],
    threshold: Annotated[
        float, typer.Option(min=0.0, help="By how much a figure may grow: 0.05 is 5%.")
    ] = 0.05,
    peers: Annotated[
        str, typer.Option(help="Whose figures, by column.", show_default="FlashAttention-Plus's own")
    ] = "",
) -> None:
    """Print the ratio of each figure of two runs, and exit with 1 if one got worse."""
    chosen = options.names(peers, "--peers")
    found = _read(lambda: compare_records(load(old), load(new), threshold=threshold, peers=chosen))
    console = console_of(4)
    for name, before, after in found.machine:
        console.print(f"another {name}: {before or 'none'}, now {after or 'none'}", markup=False)
    console.print(comparison_table(found))
    counts = f"{len(found.pairs)} in common, {len(found.missing)} only old, {len(found.added)} only new"
    console.print(
        f"geometric mean {found.mean:.3f}; {counts}; {len(found.worse)} worse by more than {threshold:.0%}"
    )
    if found.worse:
        raise typer.Exit(1)


def check(
    records: _Records,
    promises: Annotated[Path, typer.Option(help="A file of promises.", dir_okay=False)],
) -> None:
    """Hold records to a file of promises, and exit with 1 if one is not kept or none could be looked up."""
    promised = _read(lambda: load_promises(promises))
    findings = _read(lambda: hold(_by_command(records), promised))
    console = console_of(5)
    console.print(findings_table(findings))
    kept, broken, absent = (sum(f.kept is state for f in findings) for state in (True, False, None))
    console.print(f"{kept} kept, {broken} not kept, {absent} not measured")
    if broken or not kept:
        raise typer.Exit(1)


def plot(
    records: _Records,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The picture, png, svg or pdf by its name.", dir_okay=False)
    ],
) -> None:
    """Draw records of one command in one picture."""
    _read(lambda: draw_plot(merge([load(path) for path in records]), out))


def _by_command(paths: list[Path]) -> list[Record]:
    loaded = [load(path) for path in paths]
    commands = dict.fromkeys(record.command for record in loaded)
    return [merge([record for record in loaded if record.command == command]) for command in commands]


def _read(action: Callable[[], Read]) -> Read:
    """Do what reads files, and refuse those that are none or do not fit as wrong arguments."""
    try:
        return action()
    except OSError as error:
        raise typer.BadParameter(f"{error.filename} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
