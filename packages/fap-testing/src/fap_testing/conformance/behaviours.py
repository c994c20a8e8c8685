"""What a subject must do besides computing cases rightly: partial gradients, determinism, call styles."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases import Case
from fap_testing.conformance.calls import call, forward, require_that, rows_apart
from fap_testing.conformance.dense import check_result
from fap_testing.expectation import expect
from fap_testing.inputs import make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.conformance.subject import Subject
    from fap_testing.inputs import CaseInputs

__all__ = ["BEHAVIOURS"]

# Plain, so that any subject can run it; two tiles of most kernels at the most.
_PLAIN = Case(name="behaviour", batch=2, seqlen_q=67, seqlen_k=67, head_dim=32)


def _inputs(subject: Subject, dtype: torch.dtype, case: Case = _PLAIN) -> CaseInputs:
    return make_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)


def check_out_gradient_alone(subject: Subject, dtype: torch.dtype) -> None:
    """Gradients are right when only out is differentiated."""
    subject.require("backward")
    inputs = _inputs(subject, dtype)
    check_result(subject, inputs, call(subject, inputs, use_dlse=False), use_dlse=False)


def check_lse_gradient_alone(subject: Subject, dtype: torch.dtype) -> None:
    """Gradients are right when only softmax_lse is differentiated: dv is zero, dq and dk are not."""
    subject.require("backward", "lse", "lse_gradient")
    inputs = _inputs(subject, dtype)
    result = call(subject, inputs, use_dout=False)
    check_result(subject, inputs, result, use_dout=False)


def check_partial_gradients(subject: Subject, dtype: torch.dtype) -> None:
    """Each of q, k and v gets the same gradient when it alone requires one."""
    subject.require("backward")
    inputs = _inputs(subject, dtype)
    expected = expect(inputs, use_dlse=False)
    for name in ("q", "k", "v"):
        tensors = {"q": inputs.q, "k": inputs.k, "v": inputs.v}
        leaf = tensors[name] = tensors[name].detach().requires_grad_()
        out = forward(subject, inputs, tensors["q"], tensors["k"], tensors["v"]).out
        require_that(out.requires_grad, f"out must require grad when {name} does")
        (gradient,) = torch.autograd.grad(out, leaf, inputs.dout)
        expected.check(**{f"d{name}": gradient})


def check_gradient_strides(subject: Subject, dtype: torch.dtype) -> None:
    """The incoming gradient may have any strides: all zero, as from ``out.sum()``, or transposed."""
    subject.require("backward")
    inputs = _inputs(subject, dtype)
    one = torch.ones((), dtype=dtype, device=inputs.dout.device)
    transposed = inputs.dout.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for dout in (one.expand(inputs.dout.shape), transposed):
        strided = replace(inputs, dout=dout)
        check_result(subject, strided, call(subject, strided, use_dlse=False), use_dlse=False)


def check_backward_twice(subject: Subject, dtype: torch.dtype) -> None:
    """A second backward pass over one retained graph is as right as the first."""
    subject.require("backward")
    inputs = _inputs(subject, dtype)
    expected = expect(inputs, use_dlse=False)
    leaves = inputs.leaves()
    out = forward(subject, inputs, *leaves).out
    for _ in range(2):
        dq, dk, dv = torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)
        expected.check(out=out, dq=dq, dk=dk, dv=dv)


def check_no_graph_without_gradients(subject: Subject, dtype: torch.dtype) -> None:
    """Nothing requires grad when no input does, nor under ``torch.no_grad()``, and results are as right."""
    inputs = _inputs(subject, dtype)
    expected = expect(inputs)
    results = [forward(subject, inputs, inputs.q, inputs.k, inputs.v)]
    with torch.no_grad():
        results.append(forward(subject, inputs, *inputs.leaves()))
    for result in results:
        for name, x in result.tensors().items():
            require_that(not x.requires_grad, f"{name} must not require grad when nothing asks for gradients")
        expected.check(**result.tensors())
        inputs.assert_untouched()


def check_return_attn_probs(subject: Subject, dtype: torch.dtype) -> None:
    """return_attn_probs changes what is returned, never the result: out is bitwise the same."""
    subject.require("lse")
    inputs = _inputs(subject, dtype)
    with_lse = forward(subject, inputs, inputs.q, inputs.k, inputs.v)
    without = forward(subject, inputs, inputs.q, inputs.k, inputs.v, return_attn_probs=False)
    require_that(
        torch.equal(with_lse.out, without.out),
        "out differs between return_attn_probs=True and return_attn_probs=False",
    )
    inputs.assert_untouched()


def check_deterministic(subject: Subject, dtype: torch.dtype) -> None:
    """With deterministic=True, every run gives bitwise the same outputs and gradients, and right ones."""
    subject.require("deterministic")
    sizes: dict[str, Any] = {"batch": 2, "nheads": 4, "nheads_k": 2 if subject.supports("gqa") else 4}
    # A race needs many tiles under way at once, which only a GPU has.
    seqlen = 130 if torch.device(subject.device).type == "cpu" else 1100
    case = Case(name="deterministic", seqlen_q=seqlen, seqlen_k=seqlen, head_dim=64, **sizes)
    inputs = _inputs(subject, dtype, case)
    result = call(subject, inputs, deterministic=True)
    check_result(subject, inputs, result)
    first = result.tensors()
    for run in range(1, subject.repeats):
        again = call(subject, inputs, deterministic=True).tensors()
        for name, x in first.items():
            differing = int((again[name] != x).sum())
            require_that(
                differing == 0,
                f"with deterministic=True, {name} of run {run + 1} of {subject.repeats} differs from the "
                f"first in {differing} of {x.numel()} elements",
            )


def check_slopes_strides(subject: Subject, dtype: torch.dtype) -> None:
    """The rows of alibi_slopes may lie apart, as in a slice of a wider tensor."""
    subject.require("alibi")
    inputs = _inputs(
        subject, dtype, Case(name="slopes", batch=3, seqlen_q=40, seqlen_k=40, alibi="batch_head")
    )
    slopes = inputs.alibi_slopes
    if slopes is None:
        raise TypeError("a case with alibi must have slopes")
    strided = replace(inputs, alibi_slopes=rows_apart(slopes))
    check_result(subject, strided, call(subject, strided))


def check_window_types(subject: Subject, dtype: torch.dtype) -> None:
    """window_size may be a tuple, a list, or a tensor of two elements."""
    subject.require("window")
    inputs = _inputs(subject, dtype, Case(name="window_types", seqlen_q=40, seqlen_k=40, window_size=(7, 3)))
    expected = expect(inputs)
    for window in ([7, 3], torch.tensor([7, 3])):
        expected.check(out=forward(subject, inputs, inputs.q, inputs.k, inputs.v, window_size=window).out)


def check_positional_arguments(subject: Subject, dtype: torch.dtype) -> None:
    """Positional arguments mean what they mean to flash_attn_func: the order is part of its signature."""
    subject.require("softmax_scale", "causal", "window", "softcap", "alibi")
    subject.require("dropout", "deterministic", "lse")
    options: dict[str, Any] = {"softmax_scale": 0.3, "causal": True, "window_size": (9, 0), "softcap": 2.0}
    case = Case(name="positional", seqlen_q=40, seqlen_k=40, alibi="head", **options)
    inputs = _inputs(subject, dtype, case)
    returned = subject.attention(
        inputs.q, inputs.k, inputs.v, 0.0, 0.3, True, (9, 0), 2.0, inputs.alibi_slopes, True, True
    )
    require_that(
        len(returned) == 3, "the eleventh positional argument is return_attn_probs, so three results are due"
    )
    expect(inputs).check(out=returned[0], softmax_lse=returned[1])


BEHAVIOURS: dict[str, Callable[[Subject, torch.dtype], None]] = {
    "out_gradient_alone": check_out_gradient_alone,
    "lse_gradient_alone": check_lse_gradient_alone,
    "partial_gradients": check_partial_gradients,
    "gradient_strides": check_gradient_strides,
    "backward_twice": check_backward_twice,
    "no_graph_without_gradients": check_no_graph_without_gradients,
    "return_attn_probs": check_return_attn_probs,
    "deterministic": check_deterministic,
    "slopes_strides": check_slopes_strides,
    "window_types": check_window_types,
    "positional_arguments": check_positional_arguments,
}
