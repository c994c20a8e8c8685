"""The flash-attn contract, corner by corner, on the back ends that run here."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_testing.cases import select
from fap_testing.conformance import AttentionConformance, Subject


def on(backend):
    """flash_attn_func on one back end."""

    def attention(*args, **options):
        with fap_api.use_backend(backend):
            return fap_api.flash_attn_func(*args, **options)

    return attention


def packed(q, k, v, *args, **options):
    """The same through the packed functions: k and v always, q too where its shape allows it."""
    with fap_api.use_backend("torch"):
        if q.shape == k.shape == v.shape:
            qkv = torch.stack((q, k, v), dim=2)
            return fap_api.flash_attn_qkvpacked_func(qkv, *args, **options)
        return fap_api.flash_attn_kvpacked_func(q, torch.stack((k, v), dim=2), *args, **options)


class TestTorch(AttentionConformance):
    subject = Subject(attention=on("torch"), dtypes=(torch.float32, torch.bfloat16), repeats=3)


class TestTorchOtherDtypes(AttentionConformance):
    subject = Subject(attention=on("torch"), dtypes=(torch.float16, torch.float64), repeats=2)
    cases = [case for case in select("quick") if case.name.startswith(("combined", "window", "dropout"))]


class TestPacked(AttentionConformance):
    # Mistakes in k and v cannot be packed; the packed functions have their own in test_bad_input.py.
    subject = Subject(attention=packed, dtypes=(torch.float32,), repeats=2, unsupported={"error_messages"})
    cases = [case for case in select("quick") if case.name.startswith(("heads", "gqa", "combined", "layout"))]


@pytest.mark.gpu
class TestTriton(AttentionConformance):
    subject = Subject(attention=on("triton"), dtypes=(torch.bfloat16, torch.float16), device="cuda")
    cases = select("quick")


@pytest.mark.gpu
class TestTritonFloat32(AttentionConformance):
    subject = Subject(attention=on("triton"), dtypes=(torch.float32,), device="cuda", repeats=5)
    cases = [case for case in select("quick") if case.name.startswith(("combined", "window", "dropout"))]


@pytest.mark.gpu
class TestTorchOnGpu(AttentionConformance):
    subject = Subject(attention=on("torch"), dtypes=(torch.bfloat16, torch.float64), device="cuda", repeats=3)
    cases = [case for case in select("quick") if case.name.startswith(("combined", "window", "dropout"))]
