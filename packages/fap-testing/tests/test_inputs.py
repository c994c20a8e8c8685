"""Inputs are reproducible, lie in memory as asked, and show every stray access."""

from __future__ import annotations

import math
from itertools import product

import pytest
import torch

from fap_testing.cases import HUGE_LAYOUTS, LAYOUTS, Case, find
from fap_testing.inputs import make_inputs, make_keep_mask
from fap_testing.layouts import place_qkv

PACKED = {"qkv_packed", "kv_packed"}


def case_of(layout):
    return Case(
        name="layout", batch=2, seqlen_q=5, seqlen_k=5, nheads=4, nheads_k=2, head_dim=8, layout=layout
    )


def test_values_depend_on_name_and_seed_and_nothing_else():
    plain = make_inputs(case_of("contiguous"))
    for other in (make_inputs(case_of("gapped")), make_inputs(case_of("contiguous"), poison=False)):
        for name in ("q", "k", "v", "dout", "dlse"):
            assert torch.equal(getattr(plain, name), getattr(other, name))
    assert torch.equal(make_inputs(case_of("contiguous"), dtype=torch.bfloat16).k, plain.k.bfloat16())
    assert not torch.equal(make_inputs(case_of("contiguous"), seed=1).q, plain.q)
    assert not torch.equal(
        make_inputs(Case(name="other", batch=2, seqlen_q=5, nheads=4, head_dim=8)).q, plain.q
    )
    assert not torch.equal(plain.k, plain.v)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_its_strides(layout):
    inputs = make_inputs(case_of(layout))
    batch, seqlen, head, dim = inputs.q.stride()
    assert dim == (2 if layout == "last_stride_2" else 1)
    assert inputs.q.is_contiguous() == (layout in {"contiguous", "kv_packed"})
    assert inputs.k.is_contiguous() == (layout == "contiguous")
    if layout == "heads_first":
        assert head > seqlen
    if layout == "sequence_first":
        assert seqlen > batch
    if layout == "unaligned":
        assert seqlen % 2 == 0
        assert inputs.q.storage_offset() % 2 == head % 2 == 1
    else:
        assert inputs.q.storage_offset() * inputs.q.element_size() % 16 == 0
    shared = inputs.k.untyped_storage().data_ptr() == inputs.v.untyped_storage().data_ptr()
    assert shared == (layout in PACKED)
    assert all(
        x.stride() == y.stride() for x, y in zip(inputs.leaves(), (inputs.q, inputs.k, inputs.v), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_everything_around_the_tensors_is_poisoned(layout, dtype):
    inputs = make_inputs(case_of(layout), dtype=dtype)
    for buffer in inputs.buffers:
        view = next(iter(buffer.views.values()))
        memory = torch.empty(0, dtype=dtype).set_(view.untyped_storage())
        inside = sum(x.numel() for x in buffer.views.values())
        assert int((~memory.isnan()).sum()) == inside
        row = view.stride(1)
        assert view.storage_offset() >= 128 * row
        assert memory[: 128 * row].isnan().all()
        assert memory[-128 * row :].isnan().all()
    inputs.assert_untouched()


@pytest.mark.parametrize("layout", HUGE_LAYOUTS)
def test_huge_layouts_reach_past_two_to_the_31_without_overlap(layout):
    case = find(f"layout_{layout}")
    (group,) = place_qkv(case)
    assert set(group) == {"q", "k", "v", "dout"}
    taken = set()
    for placement in group.values():
        assert placement.end > 2**31
        ranges = [
            range(0, n * stride, stride) for n, stride in zip(placement.shape, placement.strides, strict=True)
        ]
        places = {placement.offset + sum(steps) for steps in product(*ranges)}
        assert len(places) == math.prod(placement.shape)
        assert not taken & places
        taken |= places
    assert max(taken) < 2**31 + 2**24
    assert "huge" in case.tags
    assert "full" not in case.tags


def test_a_write_to_the_tensors_or_around_them_is_found():
    inputs = make_inputs(case_of("gapped"))
    inputs.k[1, 2, 0, 3] = 5.0
    with pytest.raises(
        AssertionError, match=r"memory of k was written to: 1 elements changed, the first one inside"
    ):
        inputs.assert_untouched()
    inputs = make_inputs(case_of("gapped"))
    inputs.v.as_strided((1,), (1,), inputs.v.storage_offset() + 8).fill_(7.0)
    with pytest.raises(AssertionError, match=r"memory of v .* outside the tensors, .*: nan became 7.0"):
        inputs.assert_untouched()


def test_a_negative_zero_is_a_change():
    inputs = make_inputs(case_of("contiguous"), poison=False)
    inputs.q.zero_()
    changed = make_inputs(case_of("contiguous"), poison=False)
    changed.q.mul_(1.0)
    changed.assert_untouched()
    with pytest.raises(AssertionError, match="memory of q"):
        inputs.assert_untouched()


@pytest.mark.parametrize(("alibi", "shape"), [("head", (4,)), ("batch_head", (2, 4))])
def test_slopes_are_positive_float32_and_poisoned_around(alibi, shape):
    inputs = make_inputs(Case(name="slopes", batch=2, nheads=4, alibi=alibi), dtype=torch.float16)
    slopes = inputs.alibi_slopes
    assert (tuple(slopes.shape), slopes.dtype) == (shape, torch.float32)
    assert ((slopes > 0) & (slopes < 1)).all()
    assert slopes.as_strided((1,), (1,), slopes.storage_offset() + slopes.numel()).isnan()
    assert set(inputs.options) == {"alibi_slopes"}


def test_the_gradient_of_the_lse_has_its_dtype():
    assert make_inputs(case_of("contiguous"), dtype=torch.bfloat16).dlse.dtype == torch.float32
    assert make_inputs(case_of("contiguous"), dtype=torch.float64).dlse.dtype == torch.float64


def test_a_keep_mask_keeps_its_share():
    case = Case(name="mask", batch=2, seqlen_q=100, seqlen_k=100, dropout_p=0.25)
    mask = make_keep_mask(case)
    assert (mask.dtype, tuple(mask.shape)) == (torch.bool, (2, 2, 100, 100))
    assert abs(mask.double().mean().item() - 0.75) < 0.02
    assert torch.equal(mask, make_keep_mask(case))
    assert make_keep_mask(Case(name="none")) is None
