"""The kernels against the float64 oracle on a GPU: every named case, random ones, and bitwise repeats.

Most of the time is compilation: `pytest -m gpu -n 14` on a machine with the cores for it.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conformance import check_case, run
from hypothesis import HealthCheck, given, seed, settings

from fap_testing.cases import Case, find, select
from fap_testing.inputs import make_inputs
from fap_testing.strategies import cases

pytestmark = pytest.mark.gpu
HALF = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", select("full"), ids=str)
def test_named_cases(case: Case, dtype: torch.dtype) -> None:
    check_case(case, dtype, "cuda")


@pytest.mark.parametrize("case", select("quick"), ids=str)
def test_float32(case: Case) -> None:
    check_case(case, torch.float32, "cuda")


@pytest.mark.parametrize("case", select("huge"), ids=str)
def test_offsets_past_two_to_the_31(case: Case) -> None:
    check_case(case, torch.bfloat16, "cuda")


# In chunks, since nearly every example compiles: pytest-xdist then shares them out.
@pytest.mark.parametrize("chunk", range(16))
def test_random_combinations(chunk: int) -> None:
    @seed(chunk)
    @settings(max_examples=10, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(max_seqlen=300, max_head_dim=256))
    def check(case: Case) -> None:
        check_case(case, torch.bfloat16, "cuda")

    check()


@pytest.mark.parametrize("name", ["combined_dropout", "gqa_4_2_causal"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_bitwise_equal_on_every_run(name: str, head_dim: int) -> None:
    case = dataclasses.replace(find(name), batch=4, seqlen_q=700, seqlen_k=900, head_dim=head_dim)
    inputs = make_inputs(case, dtype=torch.bfloat16, device="cuda")
    rng_state = torch.tensor([1, 2], device="cuda")
    first = run(inputs, rng_state)
    for _ in range(20):
        for again, tensor in zip(run(inputs, rng_state), first, strict=True):
            assert torch.equal(again.view(torch.uint8), tensor.view(torch.uint8))
