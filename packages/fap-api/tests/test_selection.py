"""Which back end runs: environment variable, use_backend, explain, and the log of what was passed over."""

from __future__ import annotations

import logging
import sys
import threading

import pytest
import torch

import fap_api
from fap_api.backends import select

VARIABLE = "FLASH_ATTENTION_USE_FLAGGEMS"


@pytest.fixture
def qkv():
    return tuple(torch.randn(1, 5, 2, 8) for _ in range(3))


@pytest.fixture
def without_flash_attn(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    monkeypatch.delitem(sys.modules, "flash_attn")
    if "cuda" in fap_api.available_backends():
        pytest.skip("flash-attn is installed here")


@pytest.mark.parametrize("value", [None, "TRUE", "true", "True", "1", "yes", "YES"])
def test_true_and_unset_choose_automatically(qkv, value, monkeypatch):
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert fap_api.explain(*qkv).backend == "torch"
    assert fap_api.flash_attn_func(*qkv).shape == qkv[0].shape


@pytest.mark.parametrize("value", ["FALSE", "false", "0", "no", "No"])
@pytest.mark.usefixtures("without_flash_attn")
def test_false_asks_for_the_original_package(qkv, value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ImportError, match=r"flash_attn.*pip install 'fap-api\[cuda\]'") as refusal:
        fap_api.flash_attn_func(*qkv)
    assert f"{VARIABLE}={value}" in str(refusal.value)


@pytest.mark.parametrize("value", ["", "maybe", "2"])
def test_other_values_are_errors_that_list_the_accepted(qkv, value, monkeypatch):
    monkeypatch.setenv(VARIABLE, value)
    with pytest.raises(ValueError, match="must be one of TRUE, 1, YES, FALSE, 0, NO") as refusal:
        fap_api.flash_attn_func(*qkv)
    assert repr(value) in str(refusal.value)


@pytest.mark.usefixtures("without_flash_attn")
def test_the_variable_is_read_on_every_call(qkv, monkeypatch):
    fap_api.flash_attn_func(*qkv)
    monkeypatch.setenv(VARIABLE, "FALSE")
    with pytest.raises(ImportError):
        fap_api.flash_attn_func(*qkv)
    monkeypatch.delenv(VARIABLE)
    fap_api.flash_attn_func(*qkv)


def test_use_backend_as_a_call_holds_until_the_next(qkv):
    fap_api.use_backend("triton")
    with pytest.raises(RuntimeError, match="triton"):
        fap_api.flash_attn_func(*qkv)
    fap_api.use_backend("torch")
    fap_api.flash_attn_func(*qkv)


def test_use_backend_as_a_context_restores_even_after_an_error(qkv):
    fap_api.use_backend("torch")
    with pytest.raises(RuntimeError, match="triton"), fap_api.use_backend("triton"):
        fap_api.flash_attn_func(*qkv)
    with fap_api.use_backend(None):
        assert select.explicit_choice() is None
    assert select.explicit_choice() == "torch"


def test_use_backend_outranks_the_variable(qkv, monkeypatch):
    monkeypatch.setenv(VARIABLE, "FALSE")
    with fap_api.use_backend("torch"):
        explanation = fap_api.explain(*qkv)
    assert (explanation.backend, explanation.chosen_by) == ("torch", "fap_api.use_backend('torch')")


def test_use_backend_knows_its_names():
    with pytest.raises(ValueError, match="one of 'triton', 'flag_gems', 'cuda', 'torch', got 'xformers'"):
        fap_api.use_backend("xformers")
    assert select.explicit_choice() is None


def test_the_choice_holds_in_other_threads(qkv):
    errors = []

    def run():
        try:
            fap_api.flash_attn_func(*qkv)
        except RuntimeError as error:
            errors.append(str(error))

    with fap_api.use_backend("triton"):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
    assert len(errors) == 1
    assert "'triton'" in errors[0]


def test_explicit_triton_without_a_gpu_says_so(qkv):
    with fap_api.use_backend("triton"), pytest.raises(RuntimeError, match="CUDA or ROCm device, got cpu"):
        fap_api.flash_attn_func(*qkv)


def test_a_refusal_gives_every_reason(qkv):
    q, k, v = (x.double() for x in qkv)
    with fap_api.use_backend("triton"), pytest.raises(RuntimeError, match="float64.*got cpu"):
        fap_api.flash_attn_func(q, k, v)


def test_available_backends_are_a_tuple_of_names():
    names = fap_api.available_backends()
    assert "torch" in names
    assert set(names) <= {"triton", "flag_gems", "cuda", "torch"}


def test_explain_reads_like_a_report(qkv):
    text = str(fap_api.explain(*qkv, causal=True))
    first, *rest = text.splitlines()
    assert first == f"attention would run on 'torch' ({VARIABLE} unset)"
    assert any(line.startswith("  triton: ") for line in rest)
    assert any(line.startswith("  cuda: ") and "got cpu" not in line for line in rest)
    assert not any(line.startswith("  torch") for line in rest)


def test_explain_runs_nothing(qkv, monkeypatch):
    from fap_api.backends.torch_ import TorchBackend

    def forward(*_):
        raise AssertionError("explain must not run attention")

    monkeypatch.setattr(TorchBackend, "forward", forward)
    fap_api.explain(*qkv)


@pytest.mark.usefixtures("without_flash_attn")
def test_explain_tells_what_a_call_would_raise(qkv):
    with fap_api.use_backend("cuda"):
        explanation = fap_api.explain(*qkv)
    assert explanation.backend is None
    assert "pip install" in explanation.error
    assert "attention would raise" in str(explanation)
    assert str(explanation).count("use_backend('cuda')") == 1
    assert "  torch: could run it too" in str(explanation)


def test_explain_sees_whether_a_gradient_is_needed(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    assert any("no backward" in reason for reason in fap_api.explain(q, k, v).reasons["flag_gems"])
    with torch.no_grad():
        assert not any("no backward" in reason for reason in fap_api.explain(q, k, v).reasons["flag_gems"])


def test_explain_sees_autocast(qkv):
    with torch.autocast("cpu", torch.bfloat16):
        reasons = fap_api.explain(*qkv).reasons["cuda"]
    assert not any("float32" in reason for reason in reasons)


def test_explain_refuses_what_a_call_refuses(qkv):
    with pytest.raises(ValueError, match="dropout_p"):
        fap_api.explain(*qkv, dropout_p=1.0)


def test_a_fallback_is_logged_once_per_reason(qkv, caplog):
    with caplog.at_level(logging.INFO, logger="fap_api"):
        for length in (5, 5, 4):
            fap_api.flash_attn_func(*(x[:, :length] for x in qkv))
        assert len(caplog.records) == 1
        fap_api.flash_attn_func(*(x.double() for x in qkv))
        assert len(caplog.records) == 2
    (first, second) = caplog.records
    assert first.levelno == logging.INFO
    assert "'torch'" in first.getMessage()
    assert "triton: " in first.getMessage()
    assert "float64" in second.getMessage()


def test_a_fallback_away_from_an_accelerator_is_a_warning(caplog):
    # No kernel runs on meta tensors either, and nobody expects the CPU's path there.
    q = torch.empty(1, 5, 2, 8, device="meta")
    with caplog.at_level(logging.INFO, logger="fap_api"):
        fap_api.flash_attn_func(q, q, q)
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


def test_an_explicit_choice_logs_nothing(qkv, caplog):
    with caplog.at_level(logging.INFO, logger="fap_api"), fap_api.use_backend("torch"):
        fap_api.flash_attn_func(*qkv)
    assert not caplog.records
