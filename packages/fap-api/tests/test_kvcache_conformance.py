"""The contract of flash_attn_with_kvcache, corner by corner, on the back ends that run here."""

from __future__ import annotations

from unittest import mock

import hypothesis
import pytest
import torch

import fap_api
from fap_testing.cases_kvcache import select_kvcache
from fap_testing.conformance import KVCacheConformance, KVCacheSubject
from fap_testing.conformance.kvcache import check_kvcache_case
from fap_testing.strategies_kvcache import kvcache_cases

ON_A_DEVICE = {"overflow_check"}  # lengths on a device are not read


def on(backend):
    """flash_attn_with_kvcache on one back end."""

    def attention(*args, **options):
        with fap_api.use_backend(backend):
            return fap_api.flash_attn_with_kvcache(*args, **options)

    return attention


def few(*prefixes):
    return [case for case in select_kvcache("quick") if case.name.startswith(prefixes)]


class TestTorch(KVCacheConformance):
    subject = KVCacheSubject(attention=on("torch"), dtypes=(torch.float32, torch.bfloat16))


class TestTorchOtherDtypes(KVCacheConformance):
    subject = KVCacheSubject(attention=on("torch"), dtypes=(torch.float16, torch.float64))
    cases = few("combined", "window", "rotary_halves_q5")


@pytest.mark.gpu
class TestTriton(KVCacheConformance):
    subject = KVCacheSubject(
        attention=on("triton"), dtypes=(torch.bfloat16, torch.float16), device="cuda", unsupported=ON_A_DEVICE
    )
    cases = select_kvcache("quick")


@pytest.mark.gpu
class TestTritonFloat32(KVCacheConformance):
    subject = KVCacheSubject(
        attention=on("triton"), dtypes=(torch.float32,), device="cuda", unsupported=ON_A_DEVICE
    )
    cases = few("combined", "paged", "leftpad")


@pytest.mark.gpu
class TestTorchOnGpu(KVCacheConformance):
    subject = KVCacheSubject(
        attention=on("torch"),
        dtypes=(torch.bfloat16, torch.float64),
        device="cuda",
        unsupported=ON_A_DEVICE | {"batch_invariant"},
    )
    cases = few("combined", "paged", "leftpad", "batch_idx")


def settings(examples):
    # A busy machine takes its time.
    return hypothesis.settings(max_examples=examples, deadline=None, derandomize=True)


def check_drawn(backend, case, dtype, device):
    check_kvcache_case(KVCacheSubject(attention=on(backend), dtypes=(dtype,), device=device), case, dtype)


@settings(60)
@hypothesis.given(case=kvcache_cases())
def test_drawn_cases(case):
    check_drawn("torch", case, torch.float32, "cpu")


@settings(60)
@hypothesis.given(case=kvcache_cases())
def test_drawn_cases_without_reading_lengths(case):
    """As on a device, where the whole capacity is visited under a mask."""
    with mock.patch("fap_api.backends.torch_.known_to_the_host", return_value=False):
        check_drawn("torch", case, torch.float32, "cpu")


@pytest.mark.gpu
@settings(150)
@hypothesis.given(case=kvcache_cases(max_capacity=700, max_head_dim=128))
def test_drawn_cases_on_gpu(case):
    check_drawn("triton", case, torch.bfloat16, "cuda")
