"""fap-bench as a user runs it, on a CPU: what it prints, what it writes, and when it exits with an error."""

from __future__ import annotations

import csv
import json
import sys
import time

import pytest
import torch

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from fap_testing.bench import __main__ as entry
from fap_testing.bench.cli import app
from fap_testing.bench.peers.base import AutogradCalls, Peer
from fap_testing.reference import attention_baseline

TINY = ["--head-dims", "16", "--seqlens", "32", "--quick", "--device", "cpu"]


class Right(Peer):
    """A peer as one would write it elsewhere."""

    name = "right"
    devices = ("cpu",)
    dtypes = ("fp32", "bf16")

    def prefill(self, problem, tensors):
        return AutogradCalls(lambda q, k, v: self.attend(problem, q, k, v), tensors)

    def attend(self, problem, q, k, v):
        return attention_baseline(q, k, v, causal=problem.causal, window_size=problem.window_size).out


class WrongWhenCausal(Right):
    name = "wrong"

    def attend(self, problem, q, k, v):
        return attention_baseline(q, k, v).out


class Failing(Right):
    name = "failing"
    ours = True

    def attend(self, problem, q, k, v):
        raise RuntimeError("no kernel image is available")


@pytest.fixture(autouse=True)
def quickly(monkeypatch):
    """Measure for milliseconds: what is tested here is not the figures."""
    from fap_testing.bench import options
    from fap_testing.bench.timing import Effort

    brief = Effort(rounds=2, milliseconds=4, warmup_ms=1, preheat_s=0)
    monkeypatch.setattr(options.Choice, "effort", property(lambda self: brief))


def bench(*arguments, code=0):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def peer(kind):
    sys.modules.setdefault("test_bench_cli", sys.modules[__name__])
    return f"test_bench_cli:{kind.__name__}"


def test_prefill_quick_runs_on_a_laptop_in_under_a_minute(monkeypatch):
    monkeypatch.undo()  # with the effort that users get
    pytest.importorskip("fap_api")
    begin = time.perf_counter()
    output = bench("prefill", "--quick", "--device", "cpu")
    assert time.perf_counter() - begin < 60
    assert "prefill fwd: TFLOP/s" in output
    assert "prefill bwd: TFLOP/s" in output
    assert "d64 causal 2x512" in output
    assert "fap:auto: geometric mean" in output
    assert "x the best peer over 8 points; worst" in output
    assert "absent: fap-triton, fap-hopper, sdpa-flash, sdpa-cudnn, flex, flash-attn-2" in output


def test_a_record_tells_what_figures_depend_on(tmp_path):
    files = {kind: tmp_path / "run" / f"out.{kind}" for kind in ("json", "csv", "png")}
    written = ["--json", files["json"], "--csv", files["csv"], "--plot", files["png"]]
    bench("prefill", *TINY, "--peers", f"sdpa,{peer(Right)}", "--full", "--commit", "abc123", *written)
    record = json.loads(files["json"].read_text())
    assert record["machine"].keys() >= {"device", "cpu", "python", "torch", "triton", "commit", "time"}
    assert record["machine"]["torch"] == torch.__version__
    assert record["machine"]["commit"]
    assert record["peers"]["sdpa"] == torch.__version__
    assert [(row["peer"], row["direction"]) for row in record["rows"]] == [
        ("sdpa", "fwd"), ("right", "fwd"), ("sdpa", "bwd"), ("right", "bwd"),
    ]  # fmt: skip
    for row in record["rows"]:
        assert row["status"] == "ok"
        assert row["measures"]["ms_lower"] <= row["measures"]["ms"] <= row["measures"]["ms_upper"]
        assert row["measures"]["tflops"] > 0
        assert row["error"] < 1e-5
    with files["csv"].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["peer"] for row in rows] == ["sdpa", "right", "sdpa", "right"]
    assert float(rows[0]["ms"]) == record["rows"][0]["measures"]["ms"]
    assert files["png"].read_bytes().startswith(b"\x89PNG")


def test_a_wrong_result_is_no_number_and_an_error(tmp_path):
    path = tmp_path / "wrong.json"
    output = bench("prefill", *TINY, "--peers", f"sdpa,{peer(WrongWhenCausal)}", "--json", path, code=1)
    assert "WRONG: wrong at d16 causal 32x32 fwd" in output
    assert "WRONG [" in output
    rows = [row for row in json.loads(path.read_text())["rows"] if row["peer"] == "wrong"]
    assert {row["point"]: row["status"] for row in rows} == {
        "d16 full 32x32": "ok",
        "d16 causal 32x32": "wrong",
    }
    assert all(not row["measures"] for row in rows if row["status"] == "wrong")


def test_a_failure_of_ours_is_an_error_and_anothers_is_its_result():
    output = bench("prefill", *TINY, "--peers", f"sdpa,{peer(Failing)}", "--causal", code=1)
    assert "failed: failing at d16 causal 32x32 fwd: RuntimeError: no kernel image" in output
    assert "failing: nothing to compare with" in output


def test_what_cannot_be_measured_here_is_no_success():
    output = bench("prefill", *TINY, "--peers", "flash-attn-3,xformers", code=1)
    assert "absent: flash-attn-3, xformers: it runs on cuda" in output
    assert "nothing was measured" in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peers", "fa5"], "got fa5"),
        (["--peers", "nowhere:Peer"], "cannot be imported"),
        (["--peers", "json:dumps"], "must be a subclass"),
        (["--head-dims", "big"], "--head-dims takes numbers"),
        (["--seqlens", "0"], "--seqlens takes numbers"),
        (["--direction", "up"], "fwd, bwd, both"),
        (["--dtype", "fp8"], "bf16, fp16, fp32"),
        (["--window", "3"], "LEFT,RIGHT"),
        (["--device", "tpu"], "cuda, cpu"),
    ],
)
def test_a_mistaken_option_says_what_is_accepted(arguments, message):
    output = bench("prefill", *arguments, code=2)
    assert message in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize("option", ["--json", "--csv", "--plot"])
def test_nothing_is_measured_that_cannot_be_written(option, tmp_path):
    (tmp_path / "file").touch()
    output = bench("prefill", "--quick", option, tmp_path / "file" / "record", code=2)
    assert "must be a folder that may be written to" in " ".join(output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["prefill", *TINY, "--window", "8,0", "--direction", "both", "--group", "2"],
            "d16 window 8,0 32x32",
        ),
        (["varlen", *TINY, "--causal"], "d16 causal 32x32"),
        (
            ["decode", *TINY, "--batches", "3", "--kv-heads", "2", "--group", "2", "--page-sizes", "0,16"],
            "d16 full 3x1:32 h4/2",
        ),
        (["overhead", "--quick", "--device", "cpu"], "overhead fwd+grad: host microseconds per call"),
    ],
)
def test_every_command_runs_on_a_cpu(command, expected):
    assert expected in bench(*command, "--peers", f"sdpa,{peer(Right)}")


def test_decoding_takes_pairs_of_batch_and_length():
    small = ["--head-dims", "16", "--kv-heads", "1", "--group", "1", "--peers", "sdpa", "--device", "cpu"]
    output = bench("decode", *small, "--batches", "2x16,1x64")
    assert "d16 full 2x1:16 h1/1" in output
    assert "d16 full 1x1:64 h1/1" in output
    assert "2x1:64" not in output
    bench("decode", *small, "--batches", "2x16", "--seqlens", "8", code=2)
    bench("decode", *small, "--batches", "2x16,8", code=2)
    bench("decode", *small, "--batches", "2xmany", code=2)
    bench("decode", *small, "--batches", "2x", code=2)


def test_memory_grows_with_the_length_not_its_square(tmp_path):
    path = tmp_path / "memory.json"
    sizes = ["--head-dims", "64", "--seqlens", "128,512", "--full", "--quick", "--device", "cpu"]
    bench("memory", *sizes, "--direction", "fwd", "--peers", f"sdpa,{peer(Right)}", "--json", path)
    measures = {
        (row["peer"], row["problem"]["seqlen"]): row["measures"]
        for row in json.loads(path.read_text())["rows"]
    }
    row_bytes, heads = 4 * (64 + 1), 4  # out and the log-sum-exp, in float32
    for seqlen in (128, 512):
        assert measures["sdpa", seqlen]["accounted_bytes"] == seqlen * heads * row_bytes
        assert measures["sdpa", seqlen]["bytes"] >= seqlen * heads * 4 * 64
        assert measures["right", seqlen]["bytes"] >= seqlen * seqlen * heads * 4, "it writes out all scores"
    assert measures["sdpa", 512]["bytes"] < 6 * measures["sdpa", 128]["bytes"]
    assert measures["right", 512]["bytes"] > 10 * measures["right", 128]["bytes"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "command",
    [
        ["prefill", "--head-dims", "64", "--seqlens", "512", "--peers", "fap-triton,fap-hopper,sdpa-flash"],
        ["varlen", "--head-dims", "64", "--seqlens", "512", "--peers", "fap,fap-triton,fap-dense,sdpa-flash"],
        [
            "decode",
            "--batches",
            "2x1024",
            "--graph",
            "--page-sizes",
            "0,16",
            "--peers",
            "fap,fap-triton,sdpa-flash",
        ],
        ["overhead", "--peers", "fap,fap-kernels,fap-nn,sdpa-flash"],
        ["memory", "--seqlens", "1024,4096", "--peers", "fap-triton,sdpa-flash"],
    ],
    ids=lambda command: command[0],
)
def test_every_command_runs_on_a_gpu(command, tmp_path):
    pytest.importorskip("fap_nn")
    path = tmp_path / "run.json"
    bench(*command, "--quick", "--jobs", "2", "--json", path)
    rows = json.loads(path.read_text())["rows"]
    assert {row["status"] for row in rows} <= {"ok", "unsupported"}
    assert any(row["configuration"] for row in rows if row["ours"])


def test_kernels_are_compiled_by_other_processes_first():
    from fap_testing.bench.ahead import compile_ahead, tasks
    from fap_testing.bench.peers.sdpa import Sdpa
    from fap_testing.bench.prefill import Prefill

    point = Prefill(batch=1, seqlen_q=8, seqlen_k=8, nheads=1, nheads_k=1, head_dim=8, dtype="fp32")
    assert tasks([point], [Sdpa()]) == [], "nothing of it is compiled"
    assert len(list(compile_ahead([(Sdpa(), point)], ["fwd", "bwd"], 1))) == 1


def test_without_the_extra_the_command_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "fap_testing.bench.cli", None)

    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "fap_testing.bench.cli":
                raise ModuleNotFoundError("No module named 'typer'", name="typer")

    monkeypatch.delitem(sys.modules, "fap_testing.bench.cli")
    monkeypatch.setattr(sys, "meta_path", [Missing(), *sys.meta_path])
    with pytest.raises(SystemExit, match=r'pip install "fap-testing\[bench\]"'):
        entry.main()
