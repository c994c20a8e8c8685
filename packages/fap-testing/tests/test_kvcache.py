"""The KV-cache and rotary oracles agree with hand computation, and refuse what contradicts itself."""

from __future__ import annotations

import math

import pytest
import torch

from fap_testing.cases_kvcache import KVCacheCase
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import make_kvcache_inputs
from fap_testing.reference import attention_reference
from fap_testing.reference_kvcache import kvcache_reference, rotary_baseline, rotary_reference

INF, NAN = math.inf, math.nan
CASE = KVCacheCase(name="x", cache_seqlens=(3, 20), capacity=32, seqlen_q=4, seqlen_new=2, nheads=4)


def integers(*values):
    return torch.tensor(values, dtype=torch.int32)


def column(*values):
    """One sequence of one head of width 1."""
    return torch.tensor(values, dtype=torch.float64).reshape(1, -1, 1, 1)


def decode(q, k_cache, v_cache, **options):
    result = kvcache_reference(q, k_cache, v_cache, **options)
    return result.out.flatten().tolist(), result.softmax_lse.flatten().tolist()


def test_a_query_averages_the_keys_in_use():
    # Scores of 0: every visible key weighs the same, and the LSE is the logarithm of their number.
    q, k_cache, v_cache = column(0.0), column(1.0, 1.0, NAN), column(2.0, 4.0, NAN)
    out, lse = decode(q, k_cache, v_cache, cache_seqlens=2)
    assert (out, lse) == ([3.0], pytest.approx([math.log(2)]))


def test_new_keys_are_appended_and_seen():
    q, k_cache, v_cache = column(0.0, 0.0), column(1.0, NAN, NAN, NAN), column(2.0, NAN, NAN, NAN)
    new = {"k": column(5.0, 6.0), "v": column(4.0, 9.0), "cache_seqlens": integers(1)}
    result = kvcache_reference(q, k_cache, v_cache, causal=True, **new)
    assert result.out.flatten().tolist() == [3.0, 5.0]
    torch.testing.assert_close(result.k_cache, column(1.0, 5.0, 6.0, NAN), equal_nan=True)
    torch.testing.assert_close(result.v_cache, column(2.0, 4.0, 9.0, NAN), equal_nan=True)
    assert k_cache.isnan().sum() == v_cache.isnan().sum() == 3


def test_a_causal_query_is_aligned_to_the_last_key_and_rows_without_keys_are_empty():
    q, k_cache, v_cache = column(0.0, 0.0, 0.0), column(1.0, 1.0, NAN), column(2.0, 4.0, NAN)
    out, lse = decode(q, k_cache, v_cache, cache_seqlens=integers(2), causal=True)
    assert (out, lse) == ([0.0, 2.0, 3.0], [INF, 0.0, pytest.approx(math.log(2))])
    out, lse = decode(q, k_cache, v_cache, cache_seqlens=integers(0))
    assert (out, lse) == ([0.0] * 3, [INF] * 3)


def test_left_padding_is_not_read_and_moves_nothing_else():
    q, k_cache, v_cache = column(0.0, 0.0), column(NAN, 1.0, 1.0), column(NAN, 4.0, 8.0)
    for causal, expected in ((False, [6.0, 6.0]), (True, [4.0, 6.0])):
        assert decode(q, k_cache, v_cache, cache_leftpad=integers(1), causal=causal)[0] == expected
    # The new key still goes behind the length, padding included.
    new = {"k": column(1.0), "v": column(3.0), "cache_seqlens": integers(2), "cache_leftpad": integers(1)}
    result = kvcache_reference(q[:, :1], k_cache, v_cache, **new)
    assert result.v_cache.flatten().tolist()[1:] == [4.0, 3.0]
    assert result.out.item() == 3.5


def test_pages_and_rows_are_looked_up():
    v = torch.arange(48.0).reshape(3, 16, 1, 1)
    k, q = torch.zeros_like(v), torch.zeros(1, 1, 1, 1)
    options = {"cache_seqlens": integers(18), "block_table": integers(2, 0).reshape(1, 2)}
    (average,), _ = decode(q, k, v, **options)
    assert average == pytest.approx((sum(range(32, 48)) + 0 + 1) / 18)
    result = kvcache_reference(q, k, v, k[:1, :1] + 1.0, v[:1, :1] - 7.0, **options)
    assert result.v_cache[0, 2].item() == -7.0
    assert (result.v_cache != v).sum() == 1
    (average,), _ = decode(q, k, v, cache_seqlens=integers(2), cache_batch_idx=integers(1))
    assert average == pytest.approx(16.5)


def test_no_lengths_stand_for_the_whole_capacity():
    inputs = make_kvcache_inputs(
        KVCacheCase(name="x", cache_seqlens=(64, 64), page_size=16, lengths_as="none", seqlen_q=3)
    )
    tensors = (inputs.q, inputs.k_cache, inputs.v_cache)
    given = kvcache_reference(*tensors, cache_seqlens=64, **inputs.options)
    assert torch.equal(kvcache_reference(*tensors, **inputs.options).out, given.out)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_turns_each_pair_by_its_angle(interleaved):
    angle = torch.tensor([[0.0, 0.0], [0.5, 2.0], [1.0, -1.0]], dtype=torch.float64)
    x = torch.randn(1, 2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotary_reference(x, angle.cos(), angle.sin(), interleaved=interleaved, seqlen_offsets=1)
    pairs = ((0, 1), (2, 3)) if interleaved else ((0, 2), (1, 3))
    for i, (real, imaginary) in enumerate(pairs):
        z = torch.complex(x[..., real], x[..., imaginary]) * torch.exp(1j * angle[1:, i, None])
        torch.testing.assert_close(turned[..., real], z.real)
        torch.testing.assert_close(turned[..., imaginary], z.imag)
    assert torch.equal(turned[..., 4], x[..., 4])


def test_rotary_of_packed_sequences_is_that_of_each_alone():
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(9, 2, 4, generator=generator), torch.rand(20, 2, generator=generator)
    offsets, packed = integers(3, 0, 10), {"cu_seqlens": integers(0, 5, 5, 8), "max_seqlen": 5}
    turned = rotary_reference(x, table, 1.0 - table, seqlen_offsets=offsets, **packed)
    for start, end, offset in ((0, 5, 3), (5, 8, 10)):
        alone = rotary_reference(x[None, start:end], table, 1.0 - table, seqlen_offsets=offset)
        assert torch.equal(turned[start:end], alone[0])
    assert torch.equal(turned[8], x[8].double())


def test_the_rotary_baseline_rounds_once():
    x = torch.randn(2, 7, 3, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    angle = torch.rand(9, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    exact = rotary_reference(x, angle.cos(), angle.sin(), seqlen_offsets=2)
    plain = rotary_baseline(x, angle.cos(), angle.sin(), seqlen_offsets=2)
    assert plain.dtype == torch.bfloat16
    assert (plain.double() - exact).abs().max() <= exact.abs().max() * 2**-8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"cos": torch.zeros(3, 2), "sin": torch.zeros(3, 2)},
            "cos and sin have 3 positions, needed are those from 1 to 5",
        ),
        ({"sin": torch.zeros(9, 3)}, r"cos and sin must both be .* got \(9, 2\) and \(9, 3\)"),
        ({"cos": torch.zeros(9, 4), "sin": torch.zeros(9, 4)}, "rotary_dim <= 6"),
        ({"seqlen_offsets": integers(1, 2, 3)}, "seqlen_offsets must be a number or"),
        ({"max_seqlen": 4}, "cu_seqlens and max_seqlen go together"),
        ({"cu_seqlens": integers(0, 4), "max_seqlen": 4}, "x must be .*with cu_seqlens, got shape"),
    ],
)
def test_rotary_refuses_what_does_not_fit(change, message):
    tables = {"cos": torch.zeros(9, 2), "sin": torch.zeros(9, 2), "seqlen_offsets": 1}
    with pytest.raises(ValueError, match=message):
        rotary_reference(torch.zeros(2, 4, 1, 6), **tables | change)


@pytest.mark.parametrize("mode", ["one position", "causal", "window"])
def test_rotary_positions_of_queries_follow_the_mask(mode):
    options = {"causal": {"causal": True}, "window": {"window_size": (5, -1)}}.get(mode, {})
    sizes = {"cache_seqlens": (3, 9), "leftpad": (1, 4), "seqlen_q": 4, "seqlen_new": 2, "rotary_dim": 16}
    inputs = make_kvcache_inputs(KVCacheCase(name="x", **sizes, **options))
    result = kvcache_reference(inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options)
    tables = (inputs.rotary_cos, inputs.rotary_sin)
    for b, (n, pad) in enumerate(((3, 1), (9, 4))):
        new = rotary_reference(inputs.k[b : b + 1], *tables, interleaved=True, seqlen_offsets=n)
        keys = torch.cat((inputs.k_cache[b : b + 1, pad:n].double(), new), 1)
        values = torch.cat((inputs.v_cache[b : b + 1, pad:n], inputs.v[b : b + 1]), 1)
        positions = [n if mode == "one position" else n + i for i in range(4)]
        q = torch.cat(
            [
                rotary_reference(inputs.q[b : b + 1, i : i + 1], *tables, interleaved=True, seqlen_offsets=p)
                for i, p in enumerate(positions)
            ],
            dim=1,
        )
        expected = attention_reference(q, keys, values, **options)
        torch.testing.assert_close(result.out[b], expected.out[0])
        torch.testing.assert_close(result.softmax_lse[b], expected.softmax_lse[0])
        torch.testing.assert_close(result.k_cache[b, n : n + 2], new[0])


def spoiled(inputs, **changes):
    options = {**inputs.options, **changes}
    return {name: x for name, x in options.items() if x is not None}


TABLE = torch.zeros(40, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": None}, "k and v go together"),
        ({"cache_seqlens": None}, "k needs cache_seqlens"),
        ({"rotary_cos": TABLE}, "rotary_cos and rotary_sin go together"),
        ({"k": None, "v": None, "rotary_cos": TABLE, "rotary_sin": TABLE}, "rotary_cos needs k"),
        (
            {"block_table": integers(0, 1).reshape(2, 1), "cache_batch_idx": integers(0, 1)},
            "block_table excludes cache_batch_idx",
        ),
        (
            {"block_table": integers(0, 1).reshape(2, 1), "cache_leftpad": integers(0, 1)},
            "block_table excludes cache_leftpad",
        ),
        ({"cache_seqlens": integers(3, 31)}, r"cache_seqlens \[3, 31\] and 2 new keys must fit .* 32"),
        ({"cache_seqlens": integers(3)}, "cache_seqlens must be"),
        ({"cache_seqlens": -1}, "cache_seqlens must be .* not negative"),
        ({"cache_batch_idx": integers(1, 1), "cache_seqlens": 3}, "must not append to the same rows"),
        ({"cache_batch_idx": integers(0, 2)}, "cache_batch_idx must name rows of k_cache's 2"),
        ({"block_table": integers(0, 1)}, r"block_table must be \(batch, max_blocks\)"),
        ({"k": torch.zeros(2, 2, 4, 16)}, r"k must be .* \(2, 2, 2, 16\), got \(2, 2, 4, 16\)"),
        ({"v": torch.zeros(2, 1, 2, 16)}, r"v must be .* got \(2, 1, 2, 16\)"),
        ({"alibi_slopes": torch.zeros(3)}, "alibi_slopes must have one of the shapes"),
    ],
)
def test_arguments_that_exclude_each_other_are_refused(change, message):
    inputs = make_kvcache_inputs(CASE)
    with pytest.raises(ValueError, match=message):
        kvcache_reference(inputs.q, inputs.k_cache, inputs.v_cache, **spoiled(inputs, **change))


def test_caches_of_other_shapes_are_refused():
    inputs = make_kvcache_inputs(CASE)
    with pytest.raises(ValueError, match="k_cache must have q's batch 2 without cache_batch_idx, got 1"):
        kvcache_reference(inputs.q, inputs.k_cache[:1], inputs.v_cache[:1], **inputs.options)
    with pytest.raises(ValueError, match="k_cache and v_cache must have one shape"):
        kvcache_reference(inputs.q, inputs.k_cache, inputs.v_cache[:, :3], **inputs.options)
    with pytest.raises(ValueError, match="q must have 4 dimensions"):
        kvcache_reference(inputs.q[0], inputs.k_cache, inputs.v_cache, **inputs.options)


def test_the_expectation_holds_caches_to_the_bit_where_nothing_is_computed():
    case = KVCacheCase(name="x", cache_seqlens=(3, 9), capacity=32, seqlen_new=2, head_dim=32, rotary_dim=16)
    inputs = make_kvcache_inputs(case, dtype=torch.bfloat16)
    expected = expect_kvcache(inputs)
    good = {name: getattr(expected.baseline, name) for name in ("k_cache", "v_cache")}
    expected.check(**good)
    ulp = 1.0 + 2**-7
    for name, index, message in (
        ("k_cache", (0, 0, 0, 0), "k_cache of case x was changed where nothing is appended"),
        ("v_cache", (1, 8, 0, 0), "v_cache of case x was changed where nothing is appended"),
        ("k_cache", (1, 10, 1, 20), "k_cache of case x does not hold what was appended"),
        ("v_cache", (1, 10, 1, 2), "v_cache of case x does not hold what was appended"),
    ):
        wrong = good[name].clone()
        wrong[index] *= ulp
        with pytest.raises(AssertionError, match=message):
            expected.check(**{name: wrong})
    rotated = good["k_cache"].clone()
    rotated[1, 10, 1, 2] += 0.1
    with pytest.raises(AssertionError, match="k_cache of case x is too far from the oracle"):
        expected.check(k_cache=rotated)
    with pytest.raises(AssertionError, match="must stay torch.bfloat16"):
        expected.check(k_cache=good["k_cache"].float())
    with pytest.raises(TypeError, match="check takes any of out, softmax_lse, k_cache, v_cache, got dq"):
        expected.check(dq=rotated)
