"""The KV-cache suite passes right attention and fails wrong attention, each bug by a check about it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from fap_testing.cases_kvcache import find_kvcache, select_kvcache
from fap_testing.conformance import (
    KVCacheConformance,
    KVCacheSubject,
    Subject,
    UnsupportedError,
    check_kvcache_case,
    conformance_checks,
    run_conformance,
)
from fap_testing.conformance.kvcache_behaviours import check_replay
from fap_testing.strategies_kvcache import kvcache_cases

CAUGHT_BY = {
    "accepts_anything": "refuses_paged_with_batch_idx",
    "advances_cache_seqlens": "append_1_q1-float32",
    "alibi_from_top_left": "alibi_head_q5-float32",
    "always_returns_lse": "return_softmax_lse-float32",
    "appends_one_early": "append_17_q17-float32",
    "appends_one_late": "append_1_q1-float32",
    "appends_to_own_row": "batch_idx_append_5-float32",
    "batch_idx_ignored": "batch_idx_append_0-float32",
    "causal_ignored": "append_17_q17_causal-float32",
    "causal_off_by_one": "append_17_q17_causal-float32",
    "causal_top_left": "append_0_q17_causal-float32",
    "copies_strided_caches": "cache_layout_heads_first-float32",
    "depends_on_batch": "batch_invariance-float32",
    "drops_unrotated": "rotary_interleaved_16_of_32-float32",
    "empty_splits_are_nan": "num_splits-float32",
    "gqa_interleaved": "gqa_8_2_q1_append_0-float32",
    "keyless_rows_average": "append_0_q17_causal-float32",
    "leftpad_ignored": "leftpad_append_0-float32",
    "leftpad_moves_the_diagonal": "leftpad_append_5_causal-float32",
    "leftpad_shifts_rotary": "rotary_halves_leftpad-float32",
    "longest_for_all": "append_0_q1-float32",
    "lse_base_2": "append_0_q1-float32",
    "lse_minus_inf": "lengths_all_empty-float32",
    "merges_unweighted": "num_splits-float32",
    "new_keys_unseen": "append_1_q1-float32",
    "next_page_one_row_late": "paged_16_append_0-float32",
    "no_lengths_are_0": "lengths_none-float32",
    "other_rotary_convention": "rotary_halves_q5_append_5_causal-float32",
    "overflow_found_late": "full_cache-float32",
    "overflow_unchecked": "full_cache_in_a_tensor-float32",
    "pages_in_order": "paged_16_append_0-float32",
    "queries_always_advance": "rotary_interleaved_q5_append_5-float32",
    "queries_never_advance": "rotary_interleaved_q5_append_5_causal-float32",
    "queries_not_rotated": "rotary_interleaved_q1_append_1-float32",
    "reads_past_the_length": "append_0_q1-float32",
    "returns_a_graph": "no_graph-float32",
    "rotates_backwards": "rotary_interleaved_q1_append_1-float32",
    "rotates_values": "rotary_interleaved_q1_append_1-float32",
    "rounds_the_cache": "append_1_q1-float32",
    "scale_ignored": "softmax_scale_1-float32",
    "slopes_of_sequence_0": "alibi_batch_head_q1-float32",
    "softcap_ignored": "softcap_0.3-float32",
    "table_must_be_contiguous": "table_strides-float32",
    "table_of_sequence_0": "paged_16_append_0-float32",
    "values_not_appended": "generation-float32",
    "window_is_not_local": "rotary_interleaved_q5_append_5_window_left-float32",
    "window_left_off_by_one": "window_5_0_q5-float32",
    "zeroes_the_tail": "append_1_q1-float32",
}


def subject_of(attention, **options):
    return KVCacheSubject(**{"attention": attention, "dtypes": (torch.float32,)} | options)


@pytest.mark.smoke
def test_right_attention_passes_every_check(eager_kvcache):
    report = run_conformance(subject_of(eager_kvcache()))
    report.raise_for_failures()
    assert [o.name for o in report.of("unsupported")] == ["cuda_graph-float32"]
    assert len(report.of("passed")) == len(report.outcomes) - 1 > len(select_kvcache("quick"))


@pytest.mark.parametrize(
    ("dtype", "cases"),
    [(torch.float16, select_kvcache("quick")), (torch.bfloat16, select_kvcache("quick")[::3])],
    ids=["float16", "bfloat16"],
)
def test_right_attention_passes_in_16_bits(eager_kvcache, dtype, cases):
    run_conformance(subject_of(eager_kvcache(), dtypes=(dtype,)), cases=cases).raise_for_failures()


@pytest.mark.parametrize("bug", CAUGHT_BY)
def test_each_bug_is_caught_by_the_check_about_it(eager_kvcache, bug):
    checks = {check.name: check for check in conformance_checks(subject_of(eager_kvcache(bug)))}
    with pytest.raises(AssertionError):
        checks[CAUGHT_BY[bug]].run()


class TestWithPytest(KVCacheConformance):
    """The suite as a downstream project runs it, on a subject with declared gaps."""

    @staticmethod
    @torch.no_grad()
    def attention(q, k_cache, v_cache, cache_seqlens=None, causal=False):
        if causal:
            raise NotImplementedError("causal")
        lengths = [cache_seqlens] * q.shape[0] if isinstance(cache_seqlens, int) else cache_seqlens
        outs = []
        for b in range(q.shape[0]):
            n = k_cache.shape[1] if lengths is None else int(lengths[b])
            query, key, value = (x.transpose(0, 1) for x in (q[b], k_cache[b, :n], v_cache[b, :n]))
            if n == 0:
                raise NotImplementedError("no keys")
            outs.append(torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(0, 1))
        return torch.stack(outs)

    subject = KVCacheSubject(
        attention=attention,
        dtypes=(torch.float32,),
        unsupported={"softmax_scale", "causal", "window", "softcap", "alibi", "gqa", "zero_length", "append"}
        | {"leftpad", "batch_idx", "paged", "lse", "num_splits", "batch_invariant", "error_messages"},
    )
    cases = select_kvcache("quick", "lengths")


def test_the_class_wants_a_subject_of_its_own_kind(eager_kvcache):
    class Wrong(KVCacheConformance):
        subject = Subject(attention=eager_kvcache(), dtypes=(torch.float32,))

    class Metafunc:
        fixturenames = ("conformance_check",)

    with pytest.raises(TypeError, match="subject must be a KVCacheSubject, got Subject"):
        Wrong().pytest_generate_tests(Metafunc())


def test_what_is_declared_and_refused_is_unsupported(eager_kvcache):
    def without_pages(*tensors, **options):
        if "block_table" in options:
            raise AssertionError("block_table is not supported")
        return eager_kvcache()(*tensors, **options)

    subject = subject_of(without_pages, unsupported={"paged"})
    with pytest.raises(UnsupportedError, match="declared unsupported: paged; refused with AssertionError"):
        check_kvcache_case(subject, find_kvcache("paged_16_append_1"), torch.float32)


def test_what_is_declared_but_silently_wrong_fails(eager_kvcache):
    subject = subject_of(eager_kvcache("pages_in_order"), unsupported={"paged"})
    with pytest.raises(AssertionError, match="declared unsupported: paged, but the call returned a wrong"):
        check_kvcache_case(subject, find_kvcache("paged_16_append_1"), torch.float32)


def test_what_is_refused_after_writing_fails(eager_kvcache):
    def late(*tensors, **options):
        eager_kvcache()(*tensors, **options)
        if "rotary_cos" in options:
            raise NotImplementedError("rotary_cos is not supported")

    subject = subject_of(late, unsupported={"rotary", "lse"})
    with pytest.raises(AssertionError, match="a call that is refused must not write: .*memory of k_cache"):
        check_kvcache_case(subject, find_kvcache("rotary_halves_q1_append_1"), torch.float32)


def test_a_mistake_that_is_refused_after_writing_fails(eager_kvcache):
    def late(*tensors, num_splits=0, **options):
        result = eager_kvcache()(*tensors, **options)
        if num_splits > 128:
            tensors[1].zero_()
            raise RuntimeError(f"num_splits must be at most 128, got {num_splits}")
        return result

    checks = {check.name: check for check in conformance_checks(subject_of(late))}
    with pytest.raises(AssertionError, match="a call that is refused must not write"):
        checks["refuses_num_splits_129"].run()


def test_without_a_check_for_overflow_a_tensor_of_lengths_must_drop_what_does_not_fit(eager_kvcache):
    def drops(*tensors, cache_seqlens=None, **options):
        # Numbers are checked, tensors are not.
        attention = eager_kvcache("overflow_unchecked" if isinstance(cache_seqlens, torch.Tensor) else "")
        return attention(*tensors, cache_seqlens=cache_seqlens, **options)

    def overwrites(*tensors, cache_seqlens=None, **options):
        if isinstance(cache_seqlens, torch.Tensor) and int(cache_seqlens.max()) == 63:
            cache_seqlens = cache_seqlens.clamp(max=61)
        return drops(*tensors, cache_seqlens=cache_seqlens, **options)

    for attention in (drops, overwrites):
        subject = subject_of(attention, unsupported={"overflow_check"})
        checks = {check.name: check for check in conformance_checks(subject)}
        checks["full_cache-float32"].run()
        if attention is drops:
            checks["full_cache_in_a_tensor-float32"].run()
            continue
        with pytest.raises(AssertionError, match="memory of k_cache was written to"):
            checks["full_cache_in_a_tensor-float32"].run()


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=kvcache_cases(max_head_dim=32))
def test_right_attention_passes_drawn_cases(eager_kvcache, case):
    check_kvcache_case(subject_of(eager_kvcache()), case, torch.float32)


def recorded(call):
    """Stand in for a CUDA graph: a replay runs the call again, into the results of the first run."""
    result = call()

    def replay():
        again = call()
        result.out.copy_(again.out)
        result.softmax_lse.copy_(again.softmax_lse)

    return replay, result


def test_a_replay_has_to_follow_the_lengths(eager_kvcache):
    subject = subject_of(eager_kvcache())
    check_replay(subject, torch.float32, recorded)

    at_capture = []

    def remembers(*tensors, cache_seqlens, **options):
        at_capture.append(cache_seqlens.clone())
        return eager_kvcache()(*tensors, cache_seqlens=at_capture[0], **options)

    with pytest.raises(AssertionError, match="out of case replay is too far from the oracle"):
        check_replay(subject_of(remembers), torch.float32, recorded)


def test_features_of_other_suites_are_unknown(eager_kvcache):
    with pytest.raises(ValueError, match=r"unknown features \['dropout'\], accepted: .*overflow_check"):
        subject_of(eager_kvcache(), unsupported={"dropout"})
