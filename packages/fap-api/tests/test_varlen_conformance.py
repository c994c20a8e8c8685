"""flash_attn_varlen_func's contract, corner by corner, on the back ends that run here."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

import fap_api
from fap_testing.cases_varlen import select_varlen
from fap_testing.conformance import VarlenConformance, VarlenSubject, check_varlen_case
from fap_testing.strategies_varlen import varlen_cases


def on(backend):
    """flash_attn_varlen_func on one back end."""

    def attention(*args, **options):
        with fap_api.use_backend(backend):
            return fap_api.flash_attn_varlen_func(*args, **options)

    return attention


SAMPLES = ("combined", "window", "seqused", "paged_16", "dropout_0.5")


class TestTorch(VarlenConformance):
    subject = VarlenSubject(attention=on("torch"), dtypes=(torch.float32, torch.bfloat16), repeats=2)


class TestTorchOtherDtypes(VarlenConformance):
    subject = VarlenSubject(attention=on("torch"), dtypes=(torch.float16, torch.float64), repeats=2)
    cases = [case for case in select_varlen("quick") if case.name.startswith(("combined", "seqused"))]


# The fixture that undoes the choice of a back end has nothing to undo between examples.
@settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=varlen_cases())
def test_drawn_cases(case):
    check_varlen_case(TestTorch.subject, case, torch.float32)


@pytest.mark.gpu
class TestTriton(VarlenConformance):
    subject = VarlenSubject(attention=on("triton"), dtypes=(torch.bfloat16, torch.float16), device="cuda")
    cases = select_varlen("quick")


@pytest.mark.gpu
class TestTritonFloat32(VarlenConformance):
    subject = VarlenSubject(attention=on("triton"), dtypes=(torch.float32,), device="cuda", repeats=5)
    cases = [case for case in select_varlen("quick") if case.name.startswith(SAMPLES)]


@pytest.mark.gpu
class TestTorchOnGpu(VarlenConformance):
    subject = VarlenSubject(attention=on("torch"), dtypes=(torch.bfloat16,), device="cuda", repeats=3)
    cases = [case for case in select_varlen("quick") if case.name.startswith(SAMPLES)]
