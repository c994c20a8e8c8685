"""What a user of this package alone meets before any kernel runs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fap_kernels
from fap_kernels import AttentionProblem, attention_backward, attention_forward, unsupported_reasons

README = Path(__file__).parents[1] / "README.md"


def tensors(*, device: str = "meta", dtype: torch.dtype = torch.float16) -> dict[str, torch.Tensor]:
    q = torch.empty(2, 5, 4, 16, device=device, dtype=dtype)
    k = torch.empty(2, 7, 2, 16, device=device, dtype=dtype)
    return {"q": q, "k": k, "v": k.clone()}


@pytest.mark.smoke
def test_importing_imports_no_triton_and_starts_no_cuda() -> None:
    code = (
        "import sys, torch, fap_kernels\n"
        "assert 'triton' not in sys.modules\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_all_names_are_documented() -> None:
    for name in fap_kernels.__all__:
        assert getattr(fap_kernels, name).__doc__, name


def test_cpu_tensors_are_refused_with_the_way_out() -> None:
    with pytest.raises(RuntimeError, match=r"CUDA or ROCm device, got cpu.*TRITON_INTERPRET=1"):
        attention_forward(**tensors(device="cpu"))


def test_reasons_name_what_is_asked_and_what_is_run() -> None:
    reasons = unsupported_reasons(AttentionProblem.describe(**tensors(device="cpu", dtype=torch.float64)))
    assert any("float64" in reason and "bfloat16" in reason for reason in reasons)
    assert any("cpu" in reason for reason in reasons)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dout": torch.empty(2, 5, 4, 8)}, r"dout must have q's shape \(2, 5, 4, 16\).*got \(2, 5, 4, 8\)"),
        ({"out": torch.empty(2, 5, 4, 16).half()}, r"out must have q's.*float32.*got.*float16"),
        ({"softmax_lse": torch.empty(2, 5, 4)}, r"softmax_lse must be float32 of shape.*\(2, 4, 5\).*got"),
        ({"dlse": torch.empty(2, 4, 5).double()}, r"dlse must be float32.*got torch.float64"),
        ({"dropout_p": 0.5}, r"rng_state must be what the forward pass returned"),
        (
            {"dropout_p": 0.5, "rng_state": torch.zeros(2)},
            r"rng_state must be an int64 tensor of shape \(2,\)",
        ),
        ({"k": torch.empty(2, 7, 3, 16)}, r"k and v must have the same shape|must divide"),
    ],
)
def test_backward_names_the_argument_that_does_not_fit(changes: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {
        **tensors(device="cpu", dtype=torch.float32),
        "dout": torch.empty(2, 5, 4, 16),
        "out": torch.empty(2, 5, 4, 16),
        "softmax_lse": torch.empty(2, 4, 5),
    }
    with pytest.raises((RuntimeError, ValueError), match=message):
        attention_backward(**{**arguments, **changes})


@pytest.mark.interpreter
def test_bfloat16_is_refused_in_the_interpreter() -> None:
    with pytest.raises(RuntimeError, match="interpreter computes bfloat16 wrongly"):
        attention_forward(**tensors(device="cpu", dtype=torch.bfloat16))


@pytest.mark.smoke
@pytest.mark.interpreter
def test_seeds_decide_the_dropout_mask() -> None:
    arguments = {name: torch.randn(x.shape) for name, x in tensors().items()}
    torch.manual_seed(3)
    out, _, rng_state = attention_forward(**arguments, dropout_p=0.5)
    torch.manual_seed(3)
    assert torch.equal(attention_forward(**arguments, dropout_p=0.5)[0], out)
    assert torch.equal(attention_forward(**arguments, dropout_p=0.5, rng_state=rng_state)[0], out)
    assert not torch.equal(attention_forward(**arguments, dropout_p=0.5)[0], out)


@pytest.mark.interpreter
def test_the_example_of_the_readme_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    exec(compile(example.replace('"cuda"', '"cpu"'), str(README), "exec"), {})
