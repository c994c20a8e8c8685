"""The kernels against the float64 oracle on the CPU, in Triton's interpreter."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from ahead_of_time import TRITON
from conformance import check_case, run

from fap_kernels import attention_forward, target
from fap_kernels.config import TileConfig
from fap_kernels.forward import launch
from fap_kernels.support import LARGEST_SOFTCAP
from fap_testing.cases import Case, find, select
from fap_testing.expectation import expect
from fap_testing.inputs import make_inputs

pytestmark = [
    pytest.mark.interpreter,
    # NumPy warns where a GPU's exp2 overflows to inf as the kernels intend.
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@pytest.fixture
def large_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the weights, which are padded to 128 x 128, in 4 programs instead of 16, half a test's time."""
    monkeypatch.setattr(launch, "PROBABILITIES", TileConfig(64, 64, 4, 1))


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", select("quick"), ids=str)
def test_float32(case: Case) -> None:
    check_case(case, torch.float32, "cpu")


@pytest.mark.smoke
@pytest.mark.parametrize("case", select("quick", "combined"), ids=str)
def test_float16(case: Case) -> None:
    check_case(case, torch.float16, "cpu")


@pytest.mark.usefixtures("large_tiles")
@pytest.mark.parametrize("case", select("quick", "combined") + select("quick", "gqa"), ids=str)
def test_descriptors(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles fetched by descriptor, as on Hopper, are those fetched by pointer."""
    fetching = dataclasses.replace(target.INTERPRETER, descriptors=True)
    monkeypatch.setattr(target, "INTERPRETER", fetching)
    # The interpreters of Triton 3.4 and 3.5 ask of strides in elements what a GPU asks of strides in bytes.
    case = dataclasses.replace(case, head_dim=48)
    if TRITON < (3, 6):
        case = dataclasses.replace(case, layout="contiguous")
    check_case(case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_widest_softcap(dtype: torch.dtype) -> None:
    """Beyond it a logit's rounding would show: at a softcap of 1e7 it is about 1."""
    inputs = make_inputs(dataclasses.replace(find("softcap_15"), softcap=LARGEST_SOFTCAP), dtype=dtype)
    _, softmax_lse, _ = attention_forward(inputs.q, inputs.k, inputs.v, **inputs.options)
    torch.testing.assert_close(softmax_lse.double(), expect(inputs).oracle.softmax_lse, rtol=0.0, atol=3e-4)
    with pytest.raises(RuntimeError, match=r"softcap must be at most 1000.0, .* got 1001.0"):
        attention_forward(inputs.q, inputs.k, inputs.v, **inputs.options | {"softcap": 1001.0})


def test_dropout_does_not_depend_on_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    case = dataclasses.replace(find("dropout_0.5"), seqlen_q=40, seqlen_k=70)
    rng_state = torch.tensor([2**62 + 12345, 7])
    inputs = make_inputs(case)
    first = run(inputs, rng_state)[2]
    monkeypatch.setattr(launch, "PROBABILITIES", TileConfig(16, 64, 4, 1))
    again = run(inputs, rng_state)[2]
    torch.testing.assert_close(again, first, rtol=0.0, atol=1e-6)
    assert torch.equal(torch.signbit(again), torch.signbit(first))
    assert not torch.equal(torch.signbit(run(inputs, rng_state + 1)[2]), torch.signbit(first))
