"""The sweep of Hopper configurations: what it accepts, the builds it loads, and on a GPU one run of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import fap_kernels
from fap_kernels.hopper.config import BACKWARD_128, BackwardConfig, HopperConfig

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(autouse=True)
def scripts_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def test_a_build_has_its_own_kernels_and_tables() -> None:
    from builds import Build

    copy = Build.parse(f"copy={Path(fap_kernels.__file__).parents[1]}")
    theirs = copy.module("hopper.config")
    assert theirs.FORWARD is not Build().module("hopper.config").FORWARD
    assert Build().module() is fap_kernels
    kernel = copy.module("hopper.forward").hopper_forward_kernel
    assert kernel.fn.__module__ == "fap_kernels_copy.hopper.forward"
    others = {
        function.fn.__module__.partition(".")[0]
        for function in vars(copy.module("hopper.forward")).values()
        if hasattr(function, "fn")
    }
    assert others == {"fap_kernels_copy"}


@pytest.mark.parametrize("text", ["copy", "copy=", "here=.", "no-word=.", "copy=/nowhere"])
def test_what_is_no_build_is_refused(text: str) -> None:
    from builds import Build

    with pytest.raises(ValueError, match="build is NAME=FOLDER|must name a folder"):
        Build.parse(text)


def test_points_and_candidates_are_read() -> None:
    from builds import Build
    from hopper_points import Task

    builds = {"here": Build(), "old": Build("old", Path())}
    task = Task.parse("128 window256+softcap 2048 bwd fp16 group4: old old:ordered 128,64,2 table", builds)
    assert task[:6] == (128, "window256+softcap", "2048", "bwd", "fp16", 4)
    assert [candidate[1:] for candidate in task.candidates] == [
        ("old", "table"), ("old", "ordered"), ("here", "128,64,2"), ("here", "table"),
    ]  # fmt: skip
    assert task.options("cpu") == {"causal": False, "window_size": (255, 0), "softcap": 30.0}
    assert not task.plain
    assert Task.parse("64 causal packed2048", builds).lengths == [2048] * 32


@pytest.mark.parametrize(
    "text",
    ["128 causal", "x causal 512", "128 causal 512 up", "128 full 512: new:turns", "256 full 512 group16",
     "128 full 512 group3", "128 full 512 group0"],
)  # fmt: skip
def test_what_is_no_point_is_refused(text: str) -> None:
    from builds import Build
    from hopper_points import Task

    with pytest.raises(ValueError, match="a point is|is no direction|must begin with a build|are no groups"):
        Task.parse(text, {"here": Build()})


@pytest.mark.parametrize(
    ("text", "kind", "row", "right"),
    [
        ("table", BackwardConfig, BACKWARD_128, BACKWARD_128),
        ("ordered", BackwardConfig, BACKWARD_128, BackwardConfig(128, 64, 2, ordered=True)),
        ("no_ordered,stages=1", BackwardConfig, BACKWARD_128, BackwardConfig(128, 64, 1)),
        ("128,2,64,4,persistent,beside=1", HopperConfig, None, HopperConfig(128, 2, 64, 4, persistent=True)),
    ],
)
def test_configurations_replace_fields_or_stand_for_themselves(
    text: str, kind: Any, row: Any, right: Any
) -> None:
    from hopper_points import configure

    assert configure(text, kind, row) == right


@pytest.mark.parametrize(
    ("text", "message"), [("turn", "neither a number nor"), ("turns", "no configuration")]
)
def test_what_is_no_configuration_is_refused(text: str, message: str) -> None:
    from hopper_points import configure

    with pytest.raises(ValueError, match=message):
        configure(text, HopperConfig, None)


@pytest.mark.gpu
def test_a_sweep_of_two_builds() -> None:
    source = Path(fap_kernels.__file__).parents[1]
    command = [sys.executable, str(BENCHMARKS / "sweep_hopper.py"), "--build", f"copy={source}"]
    command += ["64 causal 512: copy stages=2"]
    command += ["128 full 1024 bwd group2: copy copy:no_founded,ordered,no_cluster"]
    command += ["64 causal packed512 bwd fp16: copy:ordered", "--rounds", "1", "--warm-ms", "1"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "WRONG" not in ran.stdout
    assert ran.stdout.count("TFLOP/s") == 4 + 4 + 3, ran.stdout
