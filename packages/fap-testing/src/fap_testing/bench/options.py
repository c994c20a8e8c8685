"""The command line's options: what they are called, what they accept, what they mean by default."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer

from fap_testing.bench.problem import DTYPES
from fap_testing.bench.timing import Effort

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = [
    "Backend",
    "Causal",
    "Choice",
    "Commit",
    "Csv",
    "Device",
    "Directions",
    "Dtype",
    "Group",
    "HeadDims",
    "Jobs",
    "Json",
    "Peers",
    "Plot",
    "Quick",
    "Seqlens",
    "Window",
    "bounds",
    "names",
    "numbers",
]

_MEASURED = ("fwd", "bwd", "both")

HeadDims = Annotated[
    str, typer.Option(help="Head dimensions, separated by commas.", show_default="by device")
]
Seqlens = Annotated[
    str, typer.Option(help="Sequence lengths, separated by commas.", show_default="by device")
]
Causal = Annotated[
    bool | None,
    typer.Option("--causal/--full", help="Only with or only without a causal mask.", show_default="both"),
]
Window = Annotated[
    str,
    typer.Option(
        help="LEFT,RIGHT: a sliding window as in flash_attn_func; -1 is no bound.", show_default="none"
    ),
]
Directions = Annotated[
    str, typer.Option("--direction", help="Any of fwd, bwd and both, separated by commas.")
]
Dtype = Annotated[str, typer.Option(help="bf16, fp16 or fp32.", show_default="bf16 on a GPU, fp32 on a CPU")]
Group = Annotated[int, typer.Option(min=1, help="Query heads for each key/value head.")]
Peers = Annotated[
    str, typer.Option(help="Whom to measure, separated by commas.", show_default="all there are")
]
Backend = Annotated[
    str, typer.Option(help="Back ends of fap_api to measure, separated by commas; auto is its own choice.")
]
Device = Annotated[str, typer.Option(help="cuda or cpu.", show_default="cuda where there is one")]
Quick = Annotated[bool, typer.Option("--quick", help="Few points, less time for each.")]
Jobs = Annotated[
    int, typer.Option(min=0, help="Processes that compile kernels beforehand.", show_default="none")
]
Commit = Annotated[
    str, typer.Option(help="What is measured, where no checkout around the code tells.", show_default="none")
]


def writable(path: Path | None) -> Path | None:
    """Return a path that a file can be written to, so that nothing is measured in vain."""
    if path is None or (path.exists() and os.access(path, os.W_OK)):
        return path
    # Folders that are missing will be made.
    there = next(folder for folder in path.absolute().parents if folder.exists())
    if path.exists() or not there.is_dir() or not os.access(there, os.W_OK):
        raise typer.BadParameter(f"cannot write {path}: {there} must be a folder that may be written to")
    return path


def _output(option: str, text: str) -> Any:
    return typer.Option(option, help=text, dir_okay=False, callback=writable)


Json = Annotated[Path | None, _output("--json", "Write the record here.")]
Csv = Annotated[Path | None, _output("--csv", "Write the figures as a table here.")]
Plot = Annotated[Path | None, _output("--plot", "Draw the figures here.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the options that all measuring commands share come down to.

    Attributes:
        command: the subcommand.
        peers, backends: whom to measure.
        dtype, device: on what.
        quick: few points, less time.
        jobs: processes that compile beforehand.
        commit: what is measured, where nothing else tells.
        json, csv, plot: what to write.
    """

    command: str
    peers: list[str]
    backends: list[str]
    dtype: str
    device: str
    quick: bool
    jobs: int
    commit: str
    json: Path | None
    csv: Path | None
    plot: Path | None

    @classmethod
    def of(
        cls,
        command: str,
        *,
        peers: str,
        backend: str,
        dtype: str,
        device: str,
        **rest: Any,
    ) -> Choice:
        """Fill in what was not said, and refuse what makes no sense."""
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        names([device], "--device", ("cuda", "cpu"))
        if device == "cuda" and not torch.cuda.is_available():
            raise typer.BadParameter("--device cuda needs a GPU that PyTorch can see, and there is none")
        dtype = dtype or ("bf16" if device == "cuda" else "fp32")
        names([dtype], "--dtype", DTYPES)
        return cls(
            command=command,
            peers=names(peers, "--peers"),
            backends=names(backend, "--backend"),
            dtype=dtype,
            device=device,
            **rest,
        )

    @property
    def on_gpu(self) -> bool:
        """Whether the run is on a GPU."""
        return self.device == "cuda"

    @property
    def effort(self) -> Effort:
        """How long to measure."""
        if self.on_gpu:
            return Effort(rounds=4, milliseconds=40, warmup_ms=150, preheat_s=1) if self.quick else Effort()
        if self.quick:
            return Effort(rounds=3, milliseconds=150, warmup_ms=20, preheat_s=0.2)
        return Effort(milliseconds=500, warmup_ms=50, preheat_s=1)

    def settings(self, **points: Any) -> dict[str, Any]:
        """Return what the record says the run was asked for."""
        shared = {"peers": self.peers, "backends": self.backends, "dtype": self.dtype, "quick": self.quick}
        return {**shared, **points}

    def pick(self, *, gpu: str, gpu_quick: str, cpu: str, cpu_quick: str) -> str:
        """Return the default of an option that depends on the device and on --quick."""
        if self.on_gpu:
            return gpu_quick if self.quick else gpu
        return cpu_quick if self.quick else cpu


def names(text: str | list[str], option: str, accepted: Iterable[str] | None = None) -> list[str]:
    """Split an option's value at its commas.

    Raises:
        typer.BadParameter: one of them is not accepted.
    """
    given = text if isinstance(text, list) else [name.strip() for name in text.split(",") if name.strip()]
    if accepted is not None:
        accepted = list(accepted)
        unknown = [name for name in given if name not in accepted]
        if unknown or not given:
            raise typer.BadParameter(
                f"{option} takes any of {', '.join(accepted)}, got {', '.join(unknown) or 'nothing'}"
            )
    return given


def directions(text: str) -> list[Any]:
    """Return the directions that an option names."""
    return list(dict.fromkeys(names(text, "--direction", _MEASURED)))


def numbers(text: str, option: str, least: int = 1) -> list[int]:
    """Split an option's value into numbers of at least ``least``.

    Raises:
        typer.BadParameter: something else is among them.
    """
    try:
        found = [int(name) for name in names(text, option)]
    except ValueError:
        found = []
    if not found or min(found) < least:
        raise typer.BadParameter(
            f"{option} takes numbers of at least {least}, separated by commas, got {text!r}"
        )
    return found


def bounds(text: str) -> tuple[int, int]:
    """Return a window's two bounds, (-1, -1) for no window.

    Raises:
        typer.BadParameter: these are no two bounds.
    """
    if not text:
        return -1, -1
    try:
        left, right = (int(bound) for bound in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--window takes LEFT,RIGHT, two numbers, got {text!r}") from None
    if min(left, right) < -1:
        raise typer.BadParameter(f"--window takes bounds of at least -1, got {text!r}")
    return left, right
