"""The Hopper backward on a GPU: against the float64 oracle, at adversarial scales, and on odd shapes.

Each case runs twice in no fixed order of additions, or after a first one that stores, and twice in a fixed
one.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from fap_kernels import (
    attention_backward,
    attention_forward,
    attention_varlen_backward,
    use_schedule,
)
from fap_kernels.hopper import backward_launch, conditions
from fap_kernels.hopper.config import BACKWARD
from fap_kernels.replay import Replays
from fap_testing.reference import attention_baseline_gradients, attention_reference_gradients
from fap_testing.reference_varlen import attention_varlen_reference_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
# Norm of the error over that of the gradient, as rounding the weights and their gradients to 16 bits leaves
# it; where PyTorch's own attention in the same dtype errs more, twice its error.
ERRORS = {torch.bfloat16: 8e-3, torch.float16: 1.2e-3}


@pytest.fixture(autouse=True)
def free_order_unless_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short calls take a fixed order, or found dQ, by themselves, and the free order would go untested."""
    found_dq(monkeypatch, False)


def found_dq(monkeypatch: pytest.MonkeyPatch, founded: bool) -> None:
    """Have no order asked for by the table, and let two warpgroups of 128 columns found dQ, or not."""
    rows = []
    for row in BACKWARD:
        config = row.config and replace(row.config, ordered=False, founded=False)
        if config is not None and founded and config.width == 128:
            config = replace(config, cluster=False, founded=True)
        rows.append(replace(row, config=config))
    for module in (backward_launch, conditions):
        monkeypatch.setattr(module, "BACKWARD", tuple(rows))
    keep_no_launches(monkeypatch)


def begin_with_shares(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Have programs begin with shares, as those of a chip with few multiprocessors would."""
    rows = []
    for row in BACKWARD:
        config = row.config
        if config is not None and config.width >= 128:
            own = changes if config.width == 128 else {}
            config = replace(config, **{"ordered": False, "preparing": True, "finishing": True, **own})
        rows.append(replace(row, config=config))
    for module in (backward_launch, conditions):
        monkeypatch.setattr(module, "BACKWARD", tuple(rows))
    pretend(monkeypatch, 4)


@contextlib.contextmanager
def filled_with_nan() -> Iterator[None]:
    """What is allocated is filled with NaN, so that what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def keep_no_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that were kept know nothing of what a test pretends: none are taken, and none are left."""
    for module in ("attention", "varlen"):
        monkeypatch.setattr(f"fap_kernels.{module}._backward_replays", Replays())


def draw(
    batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int, head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """q, k, v and the gradient of out."""
    sizes = ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k), (seqlen_q, nheads))
    return tuple(torch.randn(batch, n, h, head_dim, device="cuda", dtype=dtype) for n, h in sizes)


def schedule_in_order(head_dim: int) -> use_schedule:
    """What adds up dQ in a fixed order: for wide heads the portable kernels."""
    return use_schedule("hopper" if head_dim <= 128 else None)


def check(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor, dlse: torch.Tensor | None = None,
    **options: Any,
) -> None:  # fmt: skip
    """All gradients are right, of a repeated call too; only a dQ in no fixed order may differ then."""
    wide = None if dlse is None else dlse.double()
    out, lse, *right = attention_reference_gradients(q, k, v, dout.double(), wide, **options)
    plain = attention_baseline_gradients(q, k, v, dout, dlse, **options)[2:]
    call = (dout, q, k, v, out.to(q.dtype).contiguous(), lse.float().contiguous())
    with use_schedule("hopper"), filled_with_nan():
        mine = attention_backward(*call, dlse=dlse, **options)
        again = attention_backward(*call, dlse=dlse, **options)
    with schedule_in_order(q.shape[-1]), filled_with_nan():
        fixed, fixed_again = (
            attention_backward(*call, dlse=dlse, deterministic=True, **options) for _ in range(2)
        )
    assert all(torch.equal(gradient, other) for gradient, other in zip(mine[1:], again[1:], strict=True))
    assert all(torch.equal(gradient, other) for gradient, other in zip(fixed, fixed_again, strict=True))
    for name, gradient, of_replay, in_order, other, expected in zip(
        "qkv", mine, again, fixed, plain, right, strict=True
    ):
        bound = max(ERRORS[q.dtype] * expected.norm(), 2 * (other.double() - expected).norm())
        bound += 1e-5 * dout.double().norm()  # where a gradient is 0, as that of a single key's logit
        assert (gradient.double() - expected).norm() <= bound, f"d{name}"
        assert (of_replay.double() - expected).norm() <= bound, f"d{name} of a repeated call"
        assert (in_order.double() - expected).norm() <= bound, f"d{name} in a fixed order"


OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"causal": True},
    {"window_size": (90, 30)},
    {"window_size": (70, -1)},
    {"window_size": (-1, 40)},
    {"softcap": 4.0, "causal": True},
    {"alibi": True, "window_size": (200, 30), "softcap": 20.0},
)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [40, 64, 96, 128, 136, 160, 192, 224, 256])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_against_the_oracle(head_dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = dict(options)
    slopes = torch.rand(2, 4, device="cuda") if options.pop("alibi", False) else None
    for seqlen_q, seqlen_k in ((700, 900), (900, 260), (1, 1)):
        dlse = torch.randn(2, 4, seqlen_q, device="cuda")
        check(*draw(2, seqlen_q, seqlen_k, 4, 2, head_dim, dtype), dlse, alibi_slopes=slopes, **options)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_first_key_tile_stores_and_the_others_add(
    head_dim: int, options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_dq(monkeypatch, True)
    test_against_the_oracle(head_dim, options, dtype)


FREE = {"founded": False, "cluster": False}


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "changes"),
    [
        (72, {**FREE, "founded": True}),
        (128, {**FREE, "founded": True}),
        (128, FREE),
        (128, {**FREE, "cluster": True}),
        (128, {**FREE, "preparing": False}),
        (128, {**FREE, "finishing": False}),
        (160, {}),
        (256, {}),
    ],
)
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 30)}, {"softcap": 9.0}], ids=str
)
def test_programs_begin_with_shares_of_other_heads(
    head_dim: int, changes: dict[str, bool], options: dict[str, Any], dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    begin_with_shares(monkeypatch, **changes)
    for seqlen_q, seqlen_k in ((700, 700), (900, 260), (100, 1100)):
        for nheads_k in (4, 2):
            dlse = torch.randn(6, 4, seqlen_q, device="cuda") if nheads_k == 2 else None
            check(*draw(6, seqlen_q, seqlen_k, 4, nheads_k, head_dim, dtype), dlse, **options)


@pytest.mark.parametrize("head_dim", [128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_programs_begin_with_shares_on_the_whole_chip(
    head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin_with_shares(monkeypatch)
    monkeypatch.setattr("fap_kernels.target._processors_of_index", lambda index: 132)
    check(*draw(8, 1000, 1000, 16, 16, head_dim), causal=causal)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_key_tile_of_packed_sequences_stores(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found_dq(monkeypatch, True)
    check_packed(128, seed)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (300, 0)}], ids=str)
def test_more_key_tiles_than_run_at_a_time_wait_for_the_first(
    options: dict[str, Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_dq(monkeypatch, True)
    check(*draw(3, 1500, 1700, 16, 16, 128, dtype), **options)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_err_no_more_than_flash_attention_2(
    head_dim: int, dtype: torch.dtype, causal: bool
) -> None:
    q, k, v, dout = draw(2, 1000, 1000, 4, 4, head_dim, dtype)
    right = attention_reference_gradients(q, k, v, dout.double(), None, causal=causal)[2:]
    out, lse, _ = attention_forward(q, k, v, causal=causal)
    with use_schedule("hopper"):
        mine = attention_backward(dout, q, k, v, out, lse, causal=causal)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        other = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=causal)
    others = (x.transpose(1, 2) for x in torch.autograd.grad(other, leaves, dout.transpose(1, 2)))
    # Above 128 columns weights are rounded to float16 on their way, and then their gradients.
    more = 1.3 if head_dim > 128 and dtype == torch.float16 else 1.05
    for name, gradient, theirs, expected in zip("qkv", mine, others, right, strict=True):
        error, their_error = ((x.double() - expected).norm() / expected.norm() for x in (gradient, theirs))
        assert error <= more * their_error, f"d{name}: {error:.2e} and {their_error:.2e}"


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
class TestAdversarialScales:
    def test_logits_of_hundreds(self, head_dim: int, dtype: torch.dtype, causal: bool) -> None:
        q, k, v, dout = draw(1, 500, 600, 4, 2, head_dim, dtype)
        check(q * 4, k * 4, v, dout, causal=causal, softmax_scale=100 / head_dim / 3)

    def test_keys_that_do_not_exist_beside_rows_of_tiny_logits(
        self, head_dim: int, dtype: torch.dtype, causal: bool
    ) -> None:
        """The weight of such a key would be exp(320), and infinity times zero in dQ."""
        q, k, v, dout = draw(1, 500, 600, 4, 2, head_dim, dtype)
        q[..., 0], k[..., 0] = -8.0, 40.0
        check(q, k, v, dout, causal=causal, softmax_scale=1.0)

    def test_one_key_that_dominates(self, head_dim: int, dtype: torch.dtype, causal: bool) -> None:
        q, k, v, dout = draw(1, 500, 600, 4, 2, head_dim, dtype)
        k[:, 37] *= 30
        check(q, k, v, dout, causal=causal)

    @pytest.mark.parametrize("size", [1e-6, 1e4])
    def test_tiny_and_large_gradients(
        self, head_dim: int, dtype: torch.dtype, causal: bool, size: float
    ) -> None:
        if dtype == torch.float16:  # whose own range is passed
            size = min(max(size, 1e-3), 1e2)
        q, k, v, dout = draw(1, 500, 600, 4, 2, head_dim, dtype)
        check(q, k, v, dout * size, causal=causal)


@pytest.mark.parametrize("head_dim", [8, 64, 128, 136, 256])
def test_views_of_larger_tensors(head_dim: int) -> None:
    q, k, v, dout = (
        torch.randn(2, n, 3, 5, head_dim, device="cuda", dtype=torch.bfloat16)[:, :, 1, :4]
        for n in (300, 410, 410, 300)
    )
    check(q, k, v, dout, causal=True)


@pytest.mark.parametrize("head_dim", [40, 64, 128, 192, 256])
@pytest.mark.parametrize("seed", range(4))
def test_packed_sequences_beside_poison(head_dim: int, seed: int) -> None:
    check_packed(head_dim, seed)


def check_packed(head_dim: int, seed: int) -> None:
    rng = random.Random(seed)
    lengths_q, lengths_k = ([rng.choice([0, 1, rng.randint(1, 400)]) for _ in range(5)] for _ in "qk")
    lengths_q[0], lengths_k[0] = 333, 201
    bounds = [
        torch.tensor([0, *itertools.accumulate(lengths)], device="cuda", dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    ]
    q, k, v, dout = (x[0] for x in draw(1, sum(lengths_q) + 9, sum(lengths_k) + 9, 4, 2, head_dim))
    for x, lengths in ((q, lengths_q), (k, lengths_k), (v, lengths_k), (dout, lengths_q)):
        x[sum(lengths) :] = torch.nan
    real_q, real_k = sum(lengths_q), sum(lengths_k)
    for options in ({}, {"causal": True}, {"window_size": (60, 20)}):
        packing = (*bounds, max(lengths_q), max(lengths_k))
        real_out, real_lse, *right = attention_varlen_reference_gradients(
            q[:real_q], k[:real_k], v[:real_k], *bounds, dout[:real_q].double(), **options
        )
        out, lse = torch.full_like(q, torch.nan), torch.full((4, len(q)), torch.nan, device="cuda")
        out[:real_q], lse[:, :real_q] = real_out.to(q.dtype), real_lse.float()
        call = (dout, q, k, v, out, lse, *packing)
        with use_schedule("hopper"):
            mine = attention_varlen_backward(*call, **options)
        with schedule_in_order(head_dim):
            fixed, again = (attention_varlen_backward(*call, deterministic=True, **options) for _ in range(2))
        for gradient, in_order, repeated, expected in zip(mine, fixed, again, right, strict=True):
            count = len(expected)
            assert (gradient[:count].double() - expected).norm() <= ERRORS[q.dtype] * expected.norm()
            assert (in_order[:count].double() - expected).norm() <= ERRORS[q.dtype] * expected.norm()
            assert torch.equal(in_order[:count], repeated[:count])


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("chunk", range(4))
def test_random_shapes(head_dim: int, chunk: int) -> None:
    rng = random.Random(head_dim + chunk)
    for _ in range(8):
        nheads_k, group = rng.randint(1, 3), rng.choice([1, 2, 4])
        sizes = rng.randint(1, 3), rng.randint(1, 1300), rng.randint(1, 1500)
        left, right = rng.choice(
            [(-1, -1), (-1, 0), (rng.randint(0, 400), rng.randint(0, 300)), (rng.randint(0, 600), -1)]
        )
        check(*draw(*sizes, nheads_k * group, nheads_k, head_dim), window_size=(left, right))


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 331, 705, 4, 2), {}),
        ((2, 706, 453, 4, 2), {"causal": True}),
        ((1, 130, 1409, 2, 2), {"causal": True}),
        ((3, 709, 837, 2, 1), {"window_size": (90, 30)}),
        ((2, 341, 901, 3, 3), {"window_size": (-1, 40)}),
        ((2, 64, 1153, 2, 2), {"window_size": (70, 0)}),  # most key tiles have no step
    ],
    ids=str,
)
def test_programs_stay_for_one_key_tile_after_the_other(
    sizes: tuple[int, ...], options: dict[str, Any], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, processors)
    check(*draw(*sizes, 64), **options)


@pytest.mark.parametrize("processors", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_packed_sequences_of_a_few_programs(
    seed: int, processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Among the slots are empty ones, and tiles without a step."""
    pretend(monkeypatch, processors)
    check_packed(64, seed)


def test_more_programs_than_run_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 key tiles in a row wait for each other, and the last of 200 programs start when others end.

    If these had numbers of their own, as in no fixed order, all would wait for them for ever.
    """
    pretend(monkeypatch, 200)
    check(*draw(1, 300, 51200, 2, 1, 64))


def pretend(monkeypatch: pytest.MonkeyPatch, processors: int) -> None:
    """Plan for so many processors."""
    monkeypatch.setattr("fap_kernels.target._processors_of_index", lambda index: processors)
    keep_no_launches(monkeypatch)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_a_fixed_order_gives_equal_gradients_on_250_runs(head_dim: int, causal: bool) -> None:
    q, k, v, dout = draw(60, 1000, 1000, 4, 2, head_dim)
    with use_schedule("hopper"):
        out, lse, _ = attention_forward(q, k, v, causal=causal)
        call = (dout, q, k, v, out, lse)
        first = attention_backward(*call, causal=causal, deterministic=True)
        for _ in range(249):
            again = attention_backward(*call, causal=causal, deterministic=True)
            assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


@pytest.mark.parametrize("batch", [1, 30])  # with more key tiles than programs these draw them
@pytest.mark.parametrize(
    ("head_dim", "order"),
    [(64, "free"), (64, "fixed"), (128, "free"), (128, "founded"), (128, "fixed"), (128, "shares"),
     (256, "free"), (256, "shares")],
)  # fmt: skip
def test_a_graph_starts_from_zero_when_it_is_replayed(
    head_dim: int, order: str, batch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    found_dq(monkeypatch, order == "founded")
    if order == "shares":
        begin_with_shares(monkeypatch)
    deterministic = order == "fixed"
    q, k, v, dout = draw(batch, 700, 900, 4, 2, head_dim)
    out, lse, *right = attention_reference_gradients(q, k, v, dout.double())
    out, lse = out.to(q.dtype).contiguous(), lse.float().contiguous()
    with use_schedule("hopper"):
        attention_backward(dout, q, k, v, out, lse, deterministic=deterministic)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradients = attention_backward(dout, q, k, v, out, lse, deterministic=deterministic)
    for _ in range(3):
        for gradient in gradients:
            gradient.fill_(torch.nan)  # what a replay leaves out shall not be there from the one before
        graph.replay()
    for gradient, expected in zip(gradients, right, strict=True):
        assert (gradient.double() - expected).norm() <= ERRORS[q.dtype] * expected.norm()
