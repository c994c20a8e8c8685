"""What a run leaves behind: the machine, the peers and every figure, as JSON that a later run reads."""

from __future__ import annotations

import csv
import datetime as dt
import importlib.metadata
import json
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fap_testing.bench.problem import Direction

__all__ = [
    "DECISIVE",
    "METRICS",
    "SCHEMA",
    "Record",
    "Row",
    "Status",
    "describe_machine",
    "differences",
    "load",
    "merge",
    "save",
    "save_csv",
]

SCHEMA = 1
Status = Literal["ok", "wrong", "failed", "unsupported"]
# What a command measures. Less is better in all of them.
# What makes figures of two runs incomparable, or hard to compare, if it differs.
DECISIVE = ("device", "gpu", "driver", "torch", "triton", "cuda")
METRICS = {"prefill": "ms", "varlen": "ms", "decode": "ms", "overhead": "us", "memory": "bytes"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure: a call, a direction, a peer.

    Attributes:
        point: the call, in words.
        problem: the call, as :meth:`fap_testing.bench.problem.Problem.to_dict` has it.
        direction: one of :data:`fap_testing.bench.problem.DIRECTIONS`.
        peer, ours: who ran it, and whether that is a part of FlashAttention-Plus.
        status: "ok"; "wrong", "failed" or "unsupported" rows have no figures.
        note: why a row has no figures.
        measures: figures by name: the command's metric (its median), ``*_lower`` and ``*_upper`` (quartiles),
            ``samples``, and what was derived: ``tflops``, ``gbps``.
        checked: which call was judged by the oracle, in words.
        error: its largest relative error, or None.
        configuration: what the peer says of how it ran, or None.
    """

    point: str
    problem: dict[str, Any]
    direction: Direction
    peer: str
    ours: bool
    status: Status
    note: str = ""
    measures: dict[str, float] = field(default_factory=dict)
    checked: str = ""
    error: float | None = None
    configuration: str | None = None

    @property
    def key(self) -> tuple[str, str, str]:
        """What makes two rows of two runs the same measurement."""
        return json.dumps(self.problem, sort_keys=True), self.direction, self.peer


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run.

    Attributes:
        command: the subcommand, a key of :data:`METRICS`.
        machine: from :func:`describe_machine`.
        settings: what the run was asked for.
        peers: the version of each peer measured, or None where nothing tells.
        absent: why each other peer was not.
        rows: the figures.
    """

    command: str
    machine: dict[str, str]
    settings: dict[str, Any] = field(default_factory=dict)
    peers: dict[str, str | None] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @property
    def metric(self) -> str:
        """The name of the measure that this run is about."""
        return METRICS[self.command]


def save(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"schema": SCHEMA, **asdict(record)}, indent=1, allow_nan=True)
    path.write_text(text + "\n", encoding="utf-8")


def save_csv(record: Record, path: Path) -> None:
    """Write the rows as a table, one column for each size and each figure."""
    flat = [
        {**asdict(row), **{f"problem.{name}": x for name, x in row.problem.items()}, **row.measures}
        for row in record.rows
    ]
    names = dict.fromkeys(name for row in flat for name in row if name not in ("problem", "measures"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(names), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(flat)


def load(path: Path) -> Record:
    """Read a record back.

    Raises:
        ValueError: the file is no record, or one of another schema.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        schema = fields.pop("schema")
    except (ValueError, AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of fap-bench ({type(error).__name__}: {error})") from error
    if schema != SCHEMA:
        raise ValueError(
            f"{path} has schema {schema!r}, accepted: {SCHEMA}; measure it again with this version"
        )
    try:
        return Record(**{**fields, "rows": [Row(**row) for row in fields["rows"]]})
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is no record of fap-bench ({type(error).__name__}: {error})") from error


def merge(records: Sequence[Record]) -> Record:
    """Return records of one command on one machine as one; of the same measurement the last counts.

    Raises:
        ValueError: there is none, they are of several commands, or the machines differ.
    """
    if not records:
        raise ValueError("records must be one or more, got none")
    first, last = records[0], records[-1]
    rows: dict[tuple[str, str, str], Row] = {}
    for record in records:
        if record.command != first.command:
            raise ValueError(f"records must be of one command, got {first.command!r} and {record.command!r}")
        for name, one, other in differences(first, record):
            raise ValueError(f"records must be of one machine, got {name} {one!r} and {other!r}")
        rows |= {row.key: row for row in record.rows}
    peers = {name: version for record in records for name, version in record.peers.items()}
    absent = {name: why for record in records for name, why in record.absent.items() if name not in peers}
    return replace(last, peers=peers, absent=absent, rows=list(rows.values()))


def differences(old: Record, new: Record) -> list[tuple[str, str, str]]:
    """Return what differs between two records' machines and software: name, old, new."""
    pairs = ((name, old.machine.get(name, ""), new.machine.get(name, "")) for name in DECISIVE)
    return [(name, before, after) for name, before, after in pairs if before != after]


def describe_machine(device: str, commit: str = "") -> dict[str, str]:
    """Return what a figure depends on besides the sizes.

    Args:
        device: a type of device.
        commit: what is measured, if this module lies in no checkout that could tell.
    """
    now = dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds")
    machine = {
        "time": now,
        "device": device,
        "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "commit": _commit() or commit or "not in a checkout",
    }
    if device == "cuda":
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        machine |= {
            "gpu": f"{properties.name}, {properties.total_memory / (1 << 30):.0f} GiB",
            "driver": _driver(),
            "cuda": str(torch.version.cuda or torch.version.hip),
            "cudnn": str(torch.backends.cudnn.version()),
        }
    return machine


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Name the commit of the checkout that this module lies in, if any, and say if it was changed since."""
    folder = Path(__file__).parent
    # Another project's checkout, with this one installed somewhere inside, would name the wrong commit.
    if not _output("git", "-C", str(folder), "ls-files", Path(__file__).name):
        return ""
    commit = _output("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    changed = _output("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no")
    return f"{commit}, changed since" if changed else commit


def _driver() -> str:
    query = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return _output(*query).partition("\n")[0] or "unknown"


def _output(*command: str) -> str:
    """Return what a command prints, or "" where it is missing or fails."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except subprocess.TimeoutExpired:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
