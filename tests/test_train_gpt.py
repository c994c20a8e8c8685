"""The training example holds what it shows: one graph, checkpoints, autocast, export, FSDP2."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def train_gpt(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    spec = importlib.util.spec_from_file_location("train_gpt", EXAMPLES / "train_gpt.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    "switches",
    [["--checkpoint", "--autocast"], ["--export"], ["--compile", "--backend", "aot_eager"]],
    ids=lambda switches: switches[0],
)
def test_it_trains(train_gpt, capsys, switches):
    torch._dynamo.utils.counters.clear()
    assert train_gpt.main(["--device", "cpu", "--steps", "40", *switches]) == 0
    assert (torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0) == ("--compile" in switches)
    printed = capsys.readouterr().out
    dtype = "bfloat16" if "--autocast" in switches else "float32"
    assert f"Attention's forward ran 2 times in one step of 2 layers, in {dtype}\n" in printed
    assert ("Exported, saved and loaded, it computes the same" in printed) == ("--export" in switches)


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_it_trains_on_a_gpu(train_gpt):
    assert train_gpt.main(["--device", "cuda", "--compile", "--checkpoint", "--autocast", "--export"]) == 0


def test_it_fails_if_attention_runs_twice(train_gpt, capsys, monkeypatch):
    monkeypatch.setattr(train_gpt, "_keep_attention", train_gpt.partial(_keep_nothing))
    assert train_gpt.main(["--device", "cpu", "--steps", "40", "--checkpoint"]) == 1
    assert "Attention's forward ran 4 times" in capsys.readouterr().out


def test_it_fails_if_autocast_does_not_reach_attention(train_gpt, capsys, monkeypatch):
    autocast = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda *arguments, enabled: autocast(*arguments, enabled=False))
    assert train_gpt.main(["--device", "cpu", "--steps", "40", "--autocast"]) == 1
    assert "in float32" in capsys.readouterr().out


def _keep_nothing():
    from torch.utils.checkpoint import noop_context_fn

    return noop_context_fn()


def test_it_trains_sharded_over_two_processes(train_gpt, capsys):
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "train_gpt.py")]
    command += ["--device", "cpu", "--steps", "40", "--checkpoint"]
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Attention's forward ran 2 times in one step of 2 layers") == 2
    kept = [(int(part), int(whole)) for part, whole in re.findall(r"keeps (\d+) of (\d+)", done.stdout)]
    assert len(kept) == 2
    assert sum(part for part, _ in kept) == kept[0][1] == kept[1][1]
    # Both draw the same batches as one process does, so the averages of their gradients are its gradients.
    assert train_gpt.main(["--device", "cpu", "--steps", "40", "--checkpoint"]) == 0
    losses = re.search("Loss from .*", capsys.readouterr().out)[0]
    assert done.stdout.count(losses) == 2


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")
def test_it_trains_sharded_over_two_gpus(train_gpt):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(EXAMPLES / "train_gpt.py"), "--device", "cuda"]
    command += ["--checkpoint", "--autocast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Attention's forward ran 2 times in one step of 2 layers") == 2
