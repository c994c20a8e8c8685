"""The demo succeeds where it should, and says so in its exit status where it does not."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

import fap_api


@pytest.fixture
def demo():
    spec = importlib.util.spec_from_file_location("demo", Path(__file__).parents[1] / "examples" / "demo.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_demo_succeeds(demo, capsys, dtype):
    assert demo.main(["--device", "cpu", "--steps", "50", "--dtype", dtype]) == 0
    printed = capsys.readouterr().out
    assert "attention would run on 'torch'" in printed
    assert "  triton: tensors must be on a CUDA or ROCm device" in printed
    assert "WRONG" not in printed


def test_demo_fails_if_attention_is_wrong(demo, capsys, monkeypatch):
    right = fap_api.flash_attn_func
    monkeypatch.setattr(fap_api, "flash_attn_func", lambda *qkv, **options: right(*qkv, **options) * 1.001)
    assert demo.main(["--device", "cpu", "--steps", "50"]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_demo_fails_if_nothing_is_learnt(demo):
    assert demo.main(["--device", "cpu", "--steps", "0"]) == 1
