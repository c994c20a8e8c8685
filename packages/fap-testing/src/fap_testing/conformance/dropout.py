"""Is a subject's dropout random in the right way: how much it drops, where, and from which seed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fap_testing.cases import Case
from fap_testing.conformance.calls import forward, keep_mask_of, require_that, seeded
from fap_testing.inputs import make_inputs

if TYPE_CHECKING:
    from collections.abc import Callable

    from fap_testing.conformance.subject import Subject

__all__ = ["DROPOUT_BEHAVIOURS"]

# flash-attn compares a random byte, so the fraction kept is a multiple of 1/256, up to 1/256 above 1 - p.
_QUANTISATION = 0.01
_SIGMAS = 5.0


def _case(dropout_p: float) -> Case:
    return Case(
        name="dropout_behaviour", batch=2, seqlen_q=96, seqlen_k=96, nheads=2, nheads_k=2, dropout_p=dropout_p
    )


def _draw_masks(
    subject: Subject, dtype: torch.dtype, dropout_p: float, *, seed: int, calls: int
) -> list[torch.Tensor]:
    inputs = make_inputs(_case(dropout_p), dtype=dtype, device=subject.device, seed=subject.seed)
    masks = []
    with seeded(subject.device, seed):
        for _ in range(calls):
            s_dmask = forward(subject, inputs, inputs.q, inputs.k, inputs.v).s_dmask
            require_that(
                s_dmask is not None, "S_dmask is missing although dropout_p > 0 and return_attn_probs=True"
            )
            if s_dmask is not None:
                masks.append(keep_mask_of(s_dmask, inputs.case))
    return masks


def _assert_fraction(kept: float, count: int, dropout_p: float, what: str) -> None:
    allowed = _QUANTISATION + _SIGMAS * math.sqrt(dropout_p * (1.0 - dropout_p) / count)
    require_that(
        abs(kept - (1.0 - dropout_p)) <= allowed,
        f"{what}: {kept:.4f} of {count} weights are kept with dropout_p={dropout_p}, "
        f"expected {1.0 - dropout_p:.4f} within {allowed:.4f}",
    )


def check_mask_fraction(subject: Subject, dtype: torch.dtype) -> None:
    """S_dmask drops the fraction dropout_p of the weights, in every head, and never a whole row or column."""
    for dropout_p in (0.1, 0.5, 0.83):
        (mask,) = _draw_masks(subject, dtype, dropout_p, seed=1, calls=1)
        _assert_fraction(float(mask.double().mean()), mask.numel(), dropout_p, "S_dmask")
        for index, head in enumerate(mask.flatten(0, 1)):
            what = f"S_dmask of batch and head number {index}"
            _assert_fraction(float(head.double().mean()), head.numel(), dropout_p, what)
        for dim, what in ((-1, "row"), (-2, "column")):
            uniform = mask.all(dim) | ~mask.any(dim)
            require_that(
                not uniform.any(),
                f"S_dmask treats all weights of some {what} alike with dropout_p={dropout_p}",
            )


def check_mask_varies(subject: Subject, dtype: torch.dtype) -> None:
    """Different calls, batch elements, heads, rows and columns drop different weights."""
    first, second = _draw_masks(subject, dtype, 0.5, seed=2, calls=2)
    require_that(not torch.equal(first, second), "two calls in a row draw the same dropout mask")
    pairs = {
        "batch elements 0 and 1": (first[0], first[1]),
        "heads 0 and 1": (first[:, 0], first[:, 1]),
        "rows 0 and 1": (first[:, :, 0], first[:, :, 1]),
        "rows 0 and 64": (first[:, :, 0], first[:, :, 64]),
        "columns 0 and 1": (first[..., 0], first[..., 1]),
        "columns 0 and 64": (first[..., 0], first[..., 64]),
    }
    for what, (one, other) in pairs.items():
        agreement = float((one == other).double().mean())
        allowed = 0.5 + _QUANTISATION + _SIGMAS * math.sqrt(0.25 / one.numel())
        require_that(
            agreement <= allowed,
            f"{what} share {agreement:.0%} of their dropout mask, at most {allowed:.0%} expected",
        )


def check_reproducible(subject: Subject, dtype: torch.dtype) -> None:
    """The mask is drawn from torch's generator: one seed gives one mask, another seed another."""
    masks = [_draw_masks(subject, dtype, 0.5, seed=seed, calls=1)[0] for seed in (3, 3, 4)]
    require_that(
        torch.equal(masks[0], masks[1]), "the dropout mask differs although torch.manual_seed was the same"
    )
    require_that(not torch.equal(masks[0], masks[2]), "the dropout mask does not depend on torch.manual_seed")


def check_expectation(subject: Subject, dtype: torch.dtype) -> None:
    """Dropout keeps out's expectation: with uniform weights and v = 1, out averages to 1 and varies."""
    subject.require("dropout")
    dropout_p = 0.3
    case = _case(dropout_p)
    inputs = make_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed)
    with seeded(subject.device, 5):
        out = forward(subject, inputs, torch.zeros_like(inputs.q), inputs.k, torch.ones_like(inputs.v)).out
    kept = out[..., 0].double() * (1.0 - dropout_p)
    _assert_fraction(
        float(kept.mean()), kept.numel() * case.seqlen_k, dropout_p, "out, for v = 1 and equal weights"
    )
    spread, expected = float(kept.std()), math.sqrt(dropout_p * (1.0 - dropout_p) / case.seqlen_k)
    require_that(
        spread > 0.5 * expected,
        f"out varies too little under dropout_p={dropout_p}: for v = 1 and equal weights, the standard "
        f"deviation of out * (1 - p) is {spread:.1e}, expected {expected:.1e}",
    )


def _needing_mask(check: Callable[[Subject, torch.dtype], None]) -> Callable[[Subject, torch.dtype], None]:
    def checked(subject: Subject, dtype: torch.dtype) -> None:
        subject.require("dropout", "lse", "dropout_mask")
        check(subject, dtype)

    checked.__doc__ = check.__doc__
    return checked


DROPOUT_BEHAVIOURS: dict[str, Callable[[Subject, torch.dtype], None]] = {
    "dropout_mask_fraction": _needing_mask(check_mask_fraction),
    "dropout_mask_varies": _needing_mask(check_mask_varies),
    "dropout_reproducible": _needing_mask(check_reproducible),
    "dropout_expectation": check_expectation,
}
