"""flash_attn_suite.py draws from a file of tests as it says, and runs what it draws on fap_api."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import types
from pathlib import Path

import pytest

RUNNER = Path(__file__).with_name("flash_attn_suite.py")
SUITE = """
import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("d", [8, 16, 24, 32])
@pytest.mark.parametrize("seqlen_q,seqlen_k", [(1, 5), (7, 7), (9, 400)])
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_many(seqlen_q, seqlen_k, dropout_p, d, causal, dtype):
    from flash_attn import flash_attn_func

    q = torch.randn(1, seqlen_q, 2, d, device="cuda", dtype=dtype)
    k = torch.randn(1, seqlen_k, 2, d, device="cuda", dtype=dtype)
    out = flash_attn_func(q, k, k, dropout_p, causal=causal)
    assert flash_attn_func.__module__ == "fap_api.attention"
    assert out.shape == q.shape


@pytest.mark.parametrize("d", [8, 16])
def test_few(d):
    pass


@pytest.mark.skipif(torch.cuda.get_device_capability("cuda")[0] < 9, reason="old")
def test_flash_attn_generator_arg_must_be_none():
    from flash_attn.flash_attn_interface import flash_attn_gpu
"""


@pytest.fixture
def suite(tmp_path):
    file = tmp_path / "test_suite.py"
    file.write_text(SUITE)
    return file


def run(program, suite, *options):
    command = [sys.executable, *program, suite, "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=suite.parent, capture_output=True, text=True, check=False)


def ids(program, suite, *options):
    done = run(program, suite, "--collect-only", *options)
    assert done.returncode == 0, done.stdout
    return {line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line}


def draw(cases, combinations=1000, longest=1000, seed="0"):
    """Return the ids that are left to each test."""
    runner = runpy.run_path(str(RUNNER))
    module = types.ModuleType("suite")
    exec(SUITE.replace('torch.cuda.get_device_capability("cuda")[0]', "9"), vars(module))
    options = {
        "--cases": cases,
        "--combinations": combinations,
        "--longest": longest,
        "--seed": seed,
    }
    runner["draw_cases"](module, types.SimpleNamespace(getoption=options.__getitem__))
    return {name: getattr(module, name).pytestmark[-1].kwargs["ids"] for name in ("test_many", "test_few")}


def test_a_large_enough_draw_is_every_case_under_its_own_id(suite):
    everything = ids([RUNNER], suite, "--on-cpu", "--cases", "1000")
    suite.write_text(SUITE.replace('torch.cuda.get_device_capability("cuda")[0]', "9"))
    plain = ids(["-m", "pytest", "-c", os.devnull, "--rootdir=."], suite)
    assert len(plain) == 96 + 2 + 1
    assert everything == plain


def test_a_draw_has_some_of_every_function_and_can_be_repeated():
    first = draw(20, longest=300)
    # The 2 cases of one test and the only one of another fit their shares.
    assert {name: len(labels) for name, labels in first.items()} == {"test_many": 17, "test_few": 2}
    assert len(set(first["test_many"])) == 17
    assert not [label for label in first["test_many"] if "-400-" in label]
    assert draw(20, longest=300) == first
    assert draw(20, longest=300, seed="1") != first


def test_combinations_bound_what_is_compiled():
    parts = [label.split("-") for label in draw(40, combinations=3)["test_many"]]
    assert len(parts) == 3 * 3  # each with every pair of lengths
    # dropout_p, seqlen_q, seqlen_k, d, causal, dtype
    assert len({(part[0], *part[3:]) for part in parts}) == 3


def test_it_runs_on_fap_api_and_reports_what_fails(suite):
    done = run([RUNNER], suite, "--on-cpu", "--cases", "12", "--backend", "torch")
    assert done.returncode == 0, done.stdout
    outcomes = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if "test_" in line[:5]}
    assert outcomes["test_flash_attn_generator_arg_must_be_none"] == ["0", "passed", "1", "xfailed"]
    suite.write_text(SUITE.replace("out.shape ==", "out.shape !="))
    assert run([RUNNER], suite, "--on-cpu", "--cases", "12").returncode == 1


def test_an_explicit_back_end_runs_every_call_or_fails(suite):
    done = run([RUNNER], suite, "--on-cpu", "--cases", "12", "--backend", "triton")
    assert done.returncode == 1
    assert "got cpu" in done.stdout
