"""The varlen oracle agrees with hand computation and with a formulation without a loop over sequences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from fap_testing.cases_varlen import VarlenCase, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.inputs_varlen import make_varlen_inputs, make_varlen_keep_mask
from fap_testing.reference_varlen import (
    attention_varlen_baseline,
    attention_varlen_baseline_gradients,
    attention_varlen_reference,
    attention_varlen_reference_gradients,
)

QUICK = select_varlen("quick")


@dataclass(frozen=True)
class PackedAttention:
    """flash_attn_varlen_func as one masked attention over all packed rows; ``bug`` breaks it in one way."""

    bug: str = ""

    def __call__(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **options):
        block_table, keep_mask = options.pop("block_table", None), options.pop("keep_mask", None)
        used = [options.pop(name, None) for name in ("seqused_q", "seqused_k")]
        queries = self._tokens("q", cu_seqlens_q, used[0])
        keys = self._tokens("k", cu_seqlens_k, used[1])
        if block_table is None:
            places = [start + position for _, start, position, _ in keys]
        else:
            places = [self._page(block_table[b].tolist(), position, k.shape[1]) for b, _, position, _ in keys]
        rows = [start + position for _, start, position, _ in queries]
        x, y, z = q[rows], k.reshape(-1, *k.shape[-2:])[places], v.reshape(-1, *v.shape[-2:])[places]
        if self.bug == "gradient_off":
            y = y.detach() + 1.001 * (y - y.detach())
        heads = torch.arange(q.shape[1])
        group = q.shape[1] // k.shape[-2]
        crossed = self.bug == "one_query_swaps_heads" and max_seqlen_q == 1
        heads = heads % k.shape[-2] if crossed else heads // group
        scale = options.pop("softmax_scale", None)
        scores = torch.einsum("ihd,jhd->hij", x, y[:, heads]) * (
            q.shape[-1] ** -0.5 if scale is None else scale
        )
        out, lse = self._softmax(scores, z[:, heads], queries, keys, keep_mask, **options)
        return self._unpack(q, rows, out, lse)

    def _tokens(self, side, cu_seqlens, seqused):
        """For each row in use: its sequence, where that starts, its position, and the sequence's length."""
        bounds = cu_seqlens.tolist()
        tokens = []
        for b in range(len(bounds) - 1):
            length = bounds[b + 1] - bounds[b]
            used = length if seqused is None or self.bug == f"ignores_seqused_{side}" else int(seqused[b])
            counted = length if self.bug == "aligns_to_allocated" else used
            if self.bug == "drops_last_key" and side == "k" and used > 1:
                used -= 1
            if self.bug == "stops_at_empty" and used == 0:
                break
            start = bounds[b] + (1 if self.bug == "starts_one_late" and b else 0)
            start = min(start, bounds[-1] - used)
            tokens += [(b, start, position, counted) for position in range(used)]
        return tokens

    def _page(self, table, position, page_size):
        page = (
            table[0] + position // page_size if self.bug == "pages_in_order" else table[position // page_size]
        )
        if self.bug == "next_page":
            page = table[position // page_size + 1]
        return page * page_size + position % page_size

    def _softmax(
        self, scores, value, queries, keys, keep_mask,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, dropout_p=0.0,
    ):  # fmt: skip
        b, start, i, length = torch.tensor(queries, dtype=torch.long).reshape(-1, 4).unbind(1)
        c, start_k, j, _ = torch.tensor(keys, dtype=torch.long).reshape(-1, 4).unbind(1)
        lengths_k = {sequence: length for sequence, _, _, length in keys}
        length_k = torch.tensor([lengths_k.get(int(n), 0) for n in b], dtype=torch.long)
        diagonal = i if self.bug == "top_left" else i + length_k - length
        if self.bug == "packed_positions":
            diagonal, j = diagonal + start, j + start_k
        offset = j[None] - diagonal[:, None]
        left, right = window_size[0], 0 if causal else window_size[1]
        visible = torch.ones_like(offset, dtype=torch.bool) if self.bug == "leaks" else b[:, None] == c[None]
        visible = visible & ((offset >= -left) | (left < 0)) & ((offset <= right) | (right < 0))
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi_slopes is not None:
            slopes = alibi_slopes.to(scores)
            if slopes.dim() == 2:
                slopes = slopes[0 * b if self.bug == "slopes_of_sequence_0" else b].T[:, :, None]
            else:
                slopes = slopes[:, None, None]
            scores = scores - slopes * offset.abs()
        scores = scores.masked_fill(~visible, -1e30)
        keyless = ~visible.any(-1)
        if scores.shape[-1] == 0:
            return torch.zeros(scores.shape[1], *value.shape[1:]).to(value), scores.sum(-1) + math.inf
        p = torch.softmax(scores, -1) * visible
        lse = torch.logsumexp(scores, -1).masked_fill(
            keyless, -math.inf if self.bug == "lse_-inf" else math.inf
        )
        if keep_mask is not None:
            of = 0 * b if self.bug == "mask_of_sequence_0" else b
            kept = keep_mask[of[:, None], :, i[:, None], j[None]].permute(2, 0, 1)
            p = p * kept / (1.0 - dropout_p)
        return torch.einsum("hij,jhd->ihd", p, value), lse

    def _unpack(self, q, rows, out, lse):
        everywhere = torch.zeros_like(q).index_put((torch.tensor(rows, dtype=torch.long),), out)
        stats = torch.full((q.shape[1], q.shape[0]), math.inf, dtype=lse.dtype)
        stats = stats.index_put(
            (torch.arange(q.shape[1])[:, None], torch.tensor(rows, dtype=torch.long)), lse
        )
        if self.bug == "writes_unused_rows":
            unused = [row for row in range(q.shape[0]) if row not in set(rows)]
            everywhere = everywhere.index_fill(0, torch.tensor(unused, dtype=torch.long), 1e-4)
        return everywhere, stats


def run(attention, inputs, keep_mask=None):
    """Call it forward and backward, as tensors that an Expectation checks."""
    leaves = inputs.leaves()
    extra: dict[str, Any] = {} if keep_mask is None else {"keep_mask": keep_mask}
    out, lse = attention(*leaves, **inputs.lengths, **inputs.options, **extra)
    # Rows not in use have poison for a gradient, and no part in either output.
    used = ~lse.isinf()
    loss = (lse * inputs.dlse)[used].sum() + (out * inputs.dout).transpose(0, 1)[used].sum()
    dq, dk, dv = torch.autograd.grad(loss, leaves, materialize_grads=True)
    return {"out": out.detach(), "softmax_lse": lse.detach(), "dq": dq, "dk": dk, "dv": dv}


def column(*values):
    """One head of width 1: (len(values), 1, 1)."""
    return torch.tensor(values, dtype=torch.float64).reshape(-1, 1, 1)


def bounds(*values):
    return torch.tensor(values, dtype=torch.int32)


def test_two_sequences_by_hand():
    # The first has weights 1/4 and 3/4; the second sees one key; the third has none.
    k, v = column(0.0, math.log(3.0), 5.0), column(0.0, 8.0, 7.0)
    result = attention_varlen_reference(
        column(1.0, 1.0, 1.0), k, v, bounds(0, 1, 2, 3), bounds(0, 2, 3, 3), softmax_scale=1.0
    )
    assert result.out.flatten().tolist() == pytest.approx([6.0, 7.0, 0.0])
    assert result.softmax_lse.flatten().tolist() == pytest.approx([math.log(4.0), 5.0, math.inf])


def test_causality_counts_from_the_rows_in_use_by_hand():
    # Two of four keys in use, one of two queries: the query sits at the second key.
    k = column(0.0, 0.0, math.nan, math.nan)
    v = column(1.0, 3.0, math.nan, math.nan)
    used = {"seqused_q": bounds(1), "seqused_k": bounds(2)}
    q = column(1.0, math.nan)
    out, lse = attention_varlen_reference(q, k, v, bounds(0, 2), bounds(0, 4), causal=True, **used)
    assert out.flatten().tolist() == pytest.approx([2.0, 0.0])
    assert lse.flatten().tolist() == pytest.approx([math.log(2.0), math.inf])


def test_pages_by_hand():
    # Keys 0 and 1 lie in page 2, key 2 in page 0; the query is the same for all.
    v = column(4.0, math.nan, math.nan, math.nan, 1.0, 1.0).reshape(3, 2, 1, 1)
    table = torch.tensor([[2, 0, 1]], dtype=torch.int32)
    out, lse = attention_varlen_reference(
        column(0.0), torch.zeros_like(v), v, bounds(0, 1), bounds(0, 3), block_table=table
    )
    assert out.item() == pytest.approx(2.0)
    assert lse.item() == pytest.approx(math.log(3.0))


@pytest.mark.parametrize("case", QUICK, ids=str)
def test_it_agrees_with_one_masked_attention_over_all_rows(case):
    inputs = make_varlen_inputs(case, dtype=torch.float64)
    keep_mask = make_varlen_keep_mask(case)
    ours = attention_varlen_reference_gradients(
        *(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, inputs.dout, inputs.dlse),
        **inputs.options,
        keep_mask=keep_mask,
    )
    for name, actual in run(PackedAttention(), inputs, keep_mask).items():
        torch.testing.assert_close(actual, getattr(ours, name), rtol=1e-9, atol=1e-9, msg=name)
    inputs.assert_untouched()


# PyTorch takes no empty tensors here.
@pytest.mark.parametrize(
    "case",
    [c for c in select_varlen("quick", "lengths") if sum(c.seqlens_q) and sum(c.seqlens_k)],
    ids=str,
)
def test_it_agrees_with_pytorchs_attention(case):
    inputs = make_varlen_inputs(case, dtype=torch.float64, poison=False)
    mask = torch.block_diag(
        *(
            torch.ones(n, m).tril(m - n) if case.causal else torch.ones(n, m)
            for n, m in zip(case.seqlens_q, case.seqlens_k, strict=True)
        )
    ).bool()
    keyless = ~mask.any(-1)[:, None]
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(
            *(x[None].transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)), attn_mask=mask | keyless
        )
    ours = attention_varlen_reference(inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k,
                                      **inputs.options)  # fmt: skip
    torch.testing.assert_close(
        ours.out, out.masked_fill(keyless, 0.0)[0].transpose(0, 1), rtol=1e-9, atol=1e-10
    )


def test_the_reference_is_differentiable():
    case = VarlenCase(
        name="gradcheck", seqlens_q=(2, 0, 3), seqlens_k=(3, 2, 2), head_dim=2, nheads_k=1, causal=True
    )
    inputs = make_varlen_inputs(case, dtype=torch.float64)

    def out_and_finite_lse(q, k, v):
        out, lse = attention_varlen_reference(q, k, v, inputs.cu_seqlens_q, inputs.cu_seqlens_k, causal=True)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(out_and_finite_lse, inputs.leaves())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_baseline_keeps_the_dtype_but_for_the_lse(dtype):
    case = VarlenCase(name="baseline", seqlens_q=(9, 0, 5), seqlens_k=(7, 3, 12), seqused_k=(7, 3, 10))
    inputs = make_varlen_inputs(case, dtype=dtype)
    arguments = (inputs.q, inputs.k, inputs.v, inputs.cu_seqlens_q, inputs.cu_seqlens_k)
    out, lse = attention_varlen_baseline(*arguments, **inputs.options)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    plain = attention_varlen_baseline_gradients(*arguments, inputs.dout, inputs.dlse, **inputs.options)
    truth = attention_varlen_reference_gradients(*arguments, inputs.dout, inputs.dlse, **inputs.options)
    assert torch.equal(plain.out, out)
    assert {x.dtype for x in (plain.dq, plain.dk, plain.dv)} == {dtype}
    assert {x.dtype for x in truth} == {torch.float64}
    assert 0.0 < (plain.dq.double() - truth.dq).abs().max() < 30 * torch.finfo(dtype).eps
    expect_varlen(inputs).check(**plain._asdict())


@pytest.fixture(scope="module")
def expectations():
    """What is right for each quick case, in float32."""
    made = {}
    for case in QUICK:
        inputs = make_varlen_inputs(case)
        keep_mask = make_varlen_keep_mask(case)
        made[case] = (inputs, keep_mask, expect_varlen(inputs, keep_mask=keep_mask))
    return made


def test_right_attention_meets_the_expectation(expectations):
    for inputs, keep_mask, expectation in expectations.values():
        expectation.check(**run(PackedAttention(), inputs, keep_mask))


@pytest.mark.parametrize(
    ("bug", "topic"),
    [
        ("leaks", "lengths"),
        ("top_left", "lengths"),
        ("packed_positions", "lengths"),
        ("drops_last_key", "lengths"),
        ("stops_at_empty", "lengths"),
        ("starts_one_late", "lengths"),
        ("lse_-inf", "lengths"),
        ("gradient_off", "lengths"),
        ("one_query_swaps_heads", "gqa"),
        ("slopes_of_sequence_0", "alibi"),
        ("mask_of_sequence_0", "dropout"),
        ("ignores_seqused_q", "seqused"),
        ("ignores_seqused_k", "seqused"),
        ("aligns_to_allocated", "seqused"),
        ("writes_unused_rows", "seqused"),
        ("pages_in_order", "paged"),
        ("next_page", "paged"),
    ],
)
def test_wrong_attention_fails_in_its_topic(bug, topic, expectations):
    caught = []
    for case in select_varlen("quick", topic):
        inputs, keep_mask, expectation = expectations[case]
        try:
            expectation.check(**run(PackedAttention(bug), inputs, keep_mask))
        except (AssertionError, IndexError) as error:
            caught.append(error)
    assert any(isinstance(error, AssertionError) for error in caught)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens_q": bounds(0, 5)}, "cu_seqlens_q must end within the 4 rows there are, got 5"),
        ({"cu_seqlens_q": bounds(1, 4)}, "cu_seqlens_q must be .* begin with 0 and never fall"),
        ({"cu_seqlens_k": bounds(0, 3, 2)}, "cu_seqlens_k must be .* begin with 0 and never fall"),
        (
            {"cu_seqlens_k": bounds(0, 3, 4)},
            "cu_seqlens_q and cu_seqlens_k must have one length, got 2 and 3",
        ),
        ({"seqused_q": bounds(5)}, r"seqused_q must be at most the sequences' lengths \[4\], got \[5\]"),
        ({"seqused_k": bounds(1, 1)}, "seqused_k must be at most the sequences' lengths"),
        ({"alibi_slopes": torch.ones(3, 2)}, r"alibi_slopes must have shape .* got \(3, 2\)"),
        ({"dropout_p": 0.5}, "dropout_p > 0 and keep_mask go together"),
        ({"dropout_p": 0.5, "keep_mask": torch.ones(1, 2, 4, 3).bool()}, "keep_mask must be .*>= 4"),
        ({"q": torch.ones(1, 4, 2, 4)}, r"q must be \(total_q, nheads, head_dim\)"),
        ({"block_table": bounds(0)[None]}, r"k must be \(num_blocks, page_size, .*with a block_table"),
        ({"k": torch.ones(1, 4, 2, 4)}, r"k must be \(total_k, nheads_k, head_dim\)"),
        (
            {"k": torch.ones(2, 2, 2, 4), "v": torch.ones(2, 2, 2, 4), "block_table": bounds(1)[None]},
            "block_table has 1 pages of 2 keys, needed for 4",
        ),
    ],
)
def test_mistakes_are_refused(change, message):
    arguments: dict[str, Any] = {name: torch.ones(4, 2, 4) for name in "qkv"}
    arguments |= {"cu_seqlens_q": bounds(0, 4), "cu_seqlens_k": bounds(0, 4)} | change
    with pytest.raises(ValueError, match=message):
        attention_varlen_reference(**arguments)


def test_gradients_of_the_wrong_shape_are_refused():
    x, cu = torch.ones(4, 2, 4), bounds(0, 4)
    with pytest.raises(ValueError, match=r"dlse must have shape \(2, 4\), got \(4, 2\)"):
        attention_varlen_reference_gradients(x, x, x, cu, cu, None, torch.ones(4, 2))
