"""Attention to a cache: every sequence as if it were alone, and nothing written but the new rows."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from conformance import keep_masks

from fap_kernels import (
    apply_rotary,
    attention_kvcache_forward,
    attention_varlen_forward,
    kvcache_append,
    target,
)
from fap_kernels.decode.launch import choose_splits
from fap_testing.cases_kvcache import KVCacheCase, find_kvcache, select_kvcache
from fap_testing.cases_varlen import VarlenCase, select_varlen
from fap_testing.expectation import expect_varlen
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import KVCacheInputs, make_kvcache_inputs
from fap_testing.inputs_varlen import make_varlen_inputs
from fap_testing.reference_rotary import rotary_reference

# NumPy warns where a GPU's exp2 overflows to inf as the kernels intend.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")

HALF = [torch.bfloat16, torch.float16]


def check_case(case: KVCacheCase, dtype: torch.dtype, device: str, num_splits: int = 0) -> None:
    inputs = make_kvcache_inputs(case, dtype=dtype, device=device)
    expected = expect_kvcache(inputs)
    out, softmax_lse = run(inputs, num_splits)
    expected.check(out=out, softmax_lse=softmax_lse, k_cache=inputs.k_cache, v_cache=inputs.v_cache)
    inputs.assert_untouched()


def run(inputs: KVCacheInputs, num_splits: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """What flash_attn_with_kvcache does, from this package's functions."""
    case, q = inputs.case, inputs.q
    lengths = inputs.cache_seqlens
    if isinstance(lengths, int):
        lengths = torch.full((case.batch,), lengths, dtype=torch.int32, device=q.device)
    places = {"cache_batch_idx": inputs.cache_batch_idx, "block_table": inputs.block_table}
    if inputs.k is not None:
        assert inputs.v is not None
        assert lengths is not None
        kvcache_append(
            inputs.k_cache, inputs.v_cache, inputs.k, inputs.v, lengths, **places,
            rotary_cos=inputs.rotary_cos, rotary_sin=inputs.rotary_sin,
            rotary_interleaved=case.rotary_interleaved,
        )  # fmt: skip
        if inputs.rotary_cos is not None:
            assert inputs.rotary_sin is not None
            # Without a mask that moves with the query, all queries have the first one's position.
            turned = q if case.causal or case.is_local else q.flatten(1, 2)[:, None]
            q = apply_rotary(
                turned, inputs.rotary_cos, inputs.rotary_sin, interleaved=case.rotary_interleaved,
                seqlen_offsets=lengths,
            ).view(q.shape)  # fmt: skip
    return attention_kvcache_forward(
        q, inputs.k_cache, inputs.v_cache, lengths, seqlen_new=case.seqlen_new, **places,
        cache_leftpad=inputs.cache_leftpad, softmax_scale=case.softmax_scale, causal=case.causal,
        window_size=case.window_size, softcap=case.softcap, alibi_slopes=inputs.alibi_slopes,
        num_splits=num_splits,
    )  # fmt: skip


@pytest.mark.interpreter
@pytest.mark.parametrize("case", select_kvcache("quick"), ids=str)
def test_float32(case: KVCacheCase) -> None:
    check_case(case, torch.float32, "cpu")


@pytest.mark.interpreter
@pytest.mark.parametrize("num_splits", [1, 3, 16])
@pytest.mark.parametrize("case", select_kvcache("quick")[::12], ids=str)
def test_any_number_of_splits(case: KVCacheCase, num_splits: int) -> None:
    check_case(case, torch.float32, "cpu", num_splits)


@pytest.mark.interpreter
def test_as_many_splits_as_there_may_be() -> None:
    """Most of which have no key; interpreted, each takes as long as one that has."""
    check_case(find_kvcache("lengths_single"), torch.float32, "cpu", 128)


@pytest.mark.interpreter
@pytest.mark.parametrize("case", select_kvcache("quick")[::8], ids=str)
def test_descriptors(case: KVCacheCase, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles fetched by descriptor, as on Hopper, do not read what lies beyond a sequence's keys."""
    monkeypatch.setattr(target, "INTERPRETER", dataclasses.replace(target.INTERPRETER, descriptors=True))
    check_case(case, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("case", select_kvcache("full"), ids=str)
def test_on_a_gpu(case: KVCacheCase) -> None:
    check_case(case, torch.bfloat16, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("case", select_kvcache("quick")[::2], ids=str)
def test_float16_on_a_gpu(case: KVCacheCase) -> None:
    check_case(case, torch.float16, "cuda")


def paged(*tags: str) -> list[VarlenCase]:
    return [case for case in select_varlen(*tags) if case.page_size is not None]


def check_pages(case: VarlenCase, dtype: torch.dtype, device: str) -> None:
    inputs = make_varlen_inputs(case, dtype=dtype, device=device)
    out, softmax_lse, rng_state = attention_varlen_forward(
        inputs.q, inputs.k, inputs.v, **inputs.lengths, **inputs.options
    )
    keep_mask = None if rng_state is None else keep_masks(inputs, rng_state)
    expect_varlen(inputs, keep_mask=keep_mask).check(out=out, softmax_lse=softmax_lse)
    inputs.assert_untouched()


@pytest.mark.interpreter
@pytest.mark.parametrize("case", paged("quick"), ids=str)
def test_packed_queries_to_keys_in_pages(case: VarlenCase) -> None:
    check_pages(case, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", paged("full"), ids=str)
def test_packed_queries_to_keys_in_pages_on_a_gpu(case: VarlenCase, dtype: torch.dtype) -> None:
    check_pages(case, dtype, "cuda")


@pytest.mark.interpreter
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [2, 24, 40])
def test_rotary(rotary_dim: int, interleaved: bool) -> None:
    generator = torch.Generator().manual_seed(rotary_dim)
    angles = torch.rand(50, rotary_dim // 2, generator=generator) * 6
    cos, sin = angles.cos(), angles.sin()
    x = torch.randn(3, 40, 9, 7, generator=generator).transpose(1, 3)  # strides of every kind
    offsets = torch.tensor([0, 30, 43], dtype=torch.int32)
    options = {"interleaved": interleaved, "seqlen_offsets": offsets}
    turned = apply_rotary(x, cos, sin, **options)
    torch.testing.assert_close(turned, rotary_reference(x, cos, sin, **options).float())
    torch.testing.assert_close(apply_rotary(turned, cos, sin, conjugate=True, **options), x)
    assert apply_rotary(x, cos, sin, out=x, **options) is x
    assert torch.equal(x, turned)


@pytest.mark.interpreter
def test_rotary_of_packed_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(20, 8, generator=generator) * 6
    x = torch.randn(28, 3, 16, generator=generator)  # the last three are of no sequence
    bounds = torch.tensor([0, 5, 5, 25], dtype=torch.int32)
    options = {"cu_seqlens": bounds, "max_seqlen": 20}
    turned = apply_rotary(x, angles.cos(), angles.sin(), **options)
    expected = rotary_reference(x, angles.cos(), angles.sin(), **options)
    torch.testing.assert_close(turned, expected.float())


@pytest.mark.interpreter
def test_what_does_not_fit_is_not_appended() -> None:
    k_cache, v_cache = (torch.zeros(2, 8, 1, 16) for _ in range(2))
    k = torch.ones(2, 3, 1, 16)
    kvcache_append(k_cache, v_cache, k, k, torch.tensor([6, 5], dtype=torch.int32))
    assert not k_cache[0].any()
    assert not v_cache[0].any()
    assert k_cache[1, 5:].all()
    assert v_cache[1, 5:].all()
    assert not k_cache[1, :5].any()
    kvcache_append(k_cache, v_cache, k, k, torch.tensor([-1, -2], dtype=torch.int32))
    assert not k_cache[0].any()
    assert not k_cache[1, :5].any()


@pytest.mark.interpreter
def test_a_sequence_does_not_depend_on_its_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(3, 1, 4, 16, generator=generator)
    k, v = (torch.randn(3, 64, 2, 16, generator=generator) for _ in range(2))
    lengths = torch.tensor([17, 64, 1], dtype=torch.int32)
    together, _ = attention_kvcache_forward(q, k, v, lengths, num_splits=3)
    for b in range(3):
        one = slice(b, b + 1)
        alone, _ = attention_kvcache_forward(q[one], k[one], v[one], lengths[one], num_splits=3)
        assert torch.equal(alone[0], together[b])


@pytest.mark.gpu
def test_a_graph_replays_with_other_lengths() -> None:
    inputs = make_kvcache_inputs(find_kvcache(LONG_APPEND), dtype=torch.float16, device="cuda", poison=False)
    assert isinstance(inputs.cache_seqlens, torch.Tensor)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run(inputs)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(inputs)
    for shorter in (0, 3):
        inputs.cache_seqlens.sub_(shorter).clamp_(min=0)
        graph.replay()
        for mine, right in zip(results, run(inputs), strict=True):
            assert torch.equal(mine, right)


LONG_APPEND = next(
    case.name for case in select_kvcache("quick") if case.seqlen_new and case.lengths_as == "tensor"
)


def test_splits_fill_the_chip_and_no_more() -> None:
    assert choose_splits(programs=264, places=264, tiles=64) == 1
    assert choose_splits(programs=8, places=264, tiles=1024) == 32  # 256 of 264 places, 32 tiles each
    assert choose_splits(programs=8, places=132, tiles=512) == 16
    assert choose_splits(programs=100, places=132, tiles=64) == 5  # four waves of 13 tiles, not one of 64
    assert choose_splits(programs=1, places=264, tiles=4) == 4
    assert choose_splits(programs=0, places=264, tiles=4) == 1
    assert choose_splits(programs=1, places=1000, tiles=10**6) == 122  # of at most 128


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_splits": 129}, r"num_splits must be 0.*to 128, got 129"),
        (
            {"k_cache": torch.zeros(2, 32, 16)},
            r"k_cache must have 4 dimensions \(batch_cache, seqlen_cache, ",
        ),
        ({"num_splits": True}, r"num_splits must be an integer"),
        ({"cache_seqlens": torch.zeros(2)}, r"cache_seqlens must have dtype int32"),
        (
            {"cache_batch_idx": torch.zeros(3, dtype=torch.int32)},
            r"cache_batch_idx must have shape \(batch,\)",
        ),
        (
            {"k_cache": torch.zeros(3, 32, 1, 16)},
            r"k_cache must have q's batch size 2 unless",
        ),
        ({"v_cache": torch.zeros(2, 32, 1, 8)}, r"v_cache must have q's head dimension 16, got 8"),
        (
            {"block_table": torch.zeros(2, 4, dtype=torch.int32), "cache_leftpad": torch.zeros(2).int()},
            r"block_table and cache_leftpad exclude each other",
        ),
        ({"block_table": torch.zeros(2, 4)}, r"block_table must have dtype int32"),
        (
            {"block_table": torch.zeros(2, 4, dtype=torch.int32), "k_cache": torch.zeros(9, 24, 1, 16)},
            r"page size.*power of two.*at least 16, got 24",
        ),
        ({"k_cache": torch.zeros(2, 32, 1, 32)[..., ::2]}, r"k_cache must have a last stride of 1"),
    ],
)
def test_mistakes_are_told_before_anything_runs(changes: dict[str, object], message: str) -> None:
    arguments = {
        "q": torch.zeros(2, 1, 4, 16),
        **{n: torch.zeros(2, 32, 1, 16) for n in ("k_cache", "v_cache")},
    }
    with pytest.raises((RuntimeError, ValueError, TypeError), match=message):
        attention_kvcache_forward(**arguments | changes)


def test_mistakes_in_an_append_are_told() -> None:
    cache, k = torch.zeros(2, 32, 1, 16), torch.zeros(2, 1, 1, 16)
    lengths = torch.zeros(2, dtype=torch.int32)
    angles = torch.zeros(32, 8)
    for arguments, options, message in (
        ((cache, cache, k, k[:, :, :, :8], lengths), {}, "k and v must have one shape"),
        ((cache, cache, k, k, lengths), {"rotary_cos": angles}, "rotary_cos needs rotary_sin"),
        (
            (cache, cache, k, k, lengths),
            {"rotary_cos": torch.zeros(32, 9), "rotary_sin": torch.zeros(32, 9)},
            "rotary_dim at most the head dimension 16",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            kvcache_append(*arguments, **options)
