"""Whether a measured call's results are right: parts of them against the float64 oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from fap_testing.expectation import expect
from fap_testing.inputs import CaseInputs

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fap_testing.bench.problem import Part, Problem, Tensors
    from fap_testing.expectation import Expectation

__all__ = ["Judge", "Verdict", "judge_of", "oracle_scores"]

_CPU_SCORES = 1 << 20
_GPU_SCORES = 1 << 28  # one head of 16,384 by 16,384
# What the oracle, its gradients and the baseline hold at a time, in matrices of float64.
_LIVE_MATRICES = 20


class Verdict(NamedTuple):
    """What became of one call's results.

    Attributes:
        error: the largest relative error of any tensor, the norm of the difference over the oracle's norm.
        message: what is wrong, or "".
    """

    error: float
    message: str


class Judge:
    """The right results of some parts of one call.

    Args:
        problem: the call that is judged.
        tensors: its data.
        parts: of that call.
    """

    def __init__(self, problem: Problem, tensors: Tensors, parts: list[Part]) -> None:
        self.problem = problem
        self.tensors = tensors
        self._parts = [(part, _expectation(part, tensors)) for part in parts]

    def verdict(self, results: Mapping[str, torch.Tensor]) -> Verdict:
        """Judge results by name: out, dq, dk, dv, each in the shape of q, k or v.

        The bound is that of :func:`fap_testing.expectation.expect`: twice the error of plain PyTorch in the
        same dtype, and an allowance.
        """
        shapes = {"out": self.tensors.q, "dq": self.tensors.q, "dk": self.tensors.k, "dv": self.tensors.v}
        for name, actual in results.items():
            if actual.shape != shapes[name].shape:
                expected = tuple(shapes[name].shape)
                return Verdict(float("nan"), f"{name} must have shape {expected}, got {tuple(actual.shape)}")
        worst, message = 0.0, ""
        for part, expectation in self._parts:
            picked = {n: (part.rows if n in ("out", "dq") else part.keys)(x) for n, x in results.items()}
            for name, actual in picked.items():
                error = _relative_error(actual, getattr(expectation.oracle, name))
                # NaN, once met, stays.
                worst = error if error != error or error > worst else worst
            try:
                expectation.check(**picked)
            except AssertionError as error_found:
                message = message or str(error_found)
        return Verdict(worst, message)


def judge_of(problem: Problem, tensors: Tensors, scores: int) -> Judge:
    """Return the judge of this very call, or, if no part of it is small enough, of a smaller one like it."""
    parts = problem.parts(tensors, scores)
    if not parts:
        problem = problem.shrunk(scores)
        tensors = problem.draw()
        parts = problem.parts(tensors, scores)
    return Judge(problem, tensors, parts)


def oracle_scores(device: str) -> int:
    """Return how many scores the oracle may hold on a device, by its free memory."""
    if device != "cuda":
        return _CPU_SCORES
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    return min(_GPU_SCORES, free // (8 * _LIVE_MATRICES))


def _expectation(part: Part, tensors: Tensors) -> Expectation:
    q, dout = (part.rows(x).contiguous() for x in (tensors.q, tensors.dout))
    k, v = (part.keys(x).contiguous() for x in (tensors.k, tensors.v))
    dlse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], device=q.device)
    inputs = CaseInputs(part.case, q, k, v, dout, dlse, None, ())
    return expect(inputs, use_dlse=False)


def _relative_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    difference = (actual.to(oracle) - oracle).norm()
    return float(difference / oracle.norm().clamp_min(torch.finfo(oracle.dtype).tiny))
