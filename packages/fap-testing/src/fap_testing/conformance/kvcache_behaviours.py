"""What a subject must do besides computing KV-cache cases rightly: splits, invariance, full caches."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases import Case
from fap_testing.cases_kvcache import KVCacheCase
from fap_testing.conformance.calls import NonconformityError, require_that, rows_apart
from fap_testing.conformance.kvcache import KVCacheCallResult, call_kvcache, require_nothing_written
from fap_testing.conformance.subject import UnsupportedError
from fap_testing.expectation import expect
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs import make_inputs
from fap_testing.inputs_kvcache import KVCacheInputs, make_kvcache_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from fap_testing.conformance.subject import KVCacheSubject

__all__ = ["KVCACHE_BEHAVIOURS", "check_replay"]

_REFUSALS = (RuntimeError, ValueError, TypeError, AssertionError)
_SPLITS = (0, 1, 3, 128)


def _inputs(subject: KVCacheSubject, dtype: torch.dtype, case: KVCacheCase, seed: int = 0) -> KVCacheInputs:
    return make_kvcache_inputs(case, dtype=dtype, device=subject.device, seed=subject.seed ^ seed)


def _long_cases(subject: KVCacheSubject) -> Iterator[KVCacheCase]:
    """Sequences of several tiles and of none, as many features as any subject is likely to have."""
    heads: dict[str, Any] = {"nheads": 8, "nheads_k": 2} if subject.supports("gqa") else {}
    causal = subject.supports("causal")
    new = 3 if subject.supports("append") else 0
    lengths = (300, 17, 0, 129) if subject.supports("zero_length") else (300, 17, 1, 129)
    for queries, appended in ((1, 0), (1, 1 if new else 0), (3, new)):
        sizes: dict[str, Any] = {"seqlen_q": queries, "seqlen_new": appended, "capacity": 320, **heads}
        name = f"long_q{queries}_append_{appended}"
        yield KVCacheCase(name=name, cache_seqlens=lengths, causal=causal, head_dim=32, **sizes)
        if subject.supports("paged", "small_pages"):
            yield KVCacheCase(
                name=f"{name}_paged", cache_seqlens=lengths, page_size=16, causal=causal, head_dim=32, **sizes
            )


def check_num_splits(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """Any number of splits gives a right result, also where some of them have no keys."""
    subject.require("num_splits")
    for case in _long_cases(subject):
        expected = expect_kvcache(_inputs(subject, dtype, case))
        for num_splits in _SPLITS:
            inputs = _inputs(subject, dtype, case)
            result = call_kvcache(subject, inputs, num_splits=num_splits)
            try:
                expected.check(**result.tensors())
                inputs.assert_untouched()
            except AssertionError as wrong:
                raise NonconformityError(f"with num_splits={num_splits}: {wrong}") from None


def check_batch_invariance(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """With a fixed num_splits, a sequence alone gives bitwise what it gives beside others."""
    subject.require("num_splits", "batch_invariant")
    for case, num_splits in product(_long_cases(subject), (1, 3)):
        together = call_kvcache(subject, _inputs(subject, dtype, case), num_splits=num_splits).tensors()
        for b in range(case.batch):
            inputs = _inputs(subject, dtype, case)
            alone = call_kvcache(subject, _alone(inputs, b), num_splits=num_splits).tensors()
            for name in ("out", "softmax_lse"):
                if name not in together:
                    continue
                differing = int((alone[name][0] != together[name][b]).sum())
                require_that(
                    differing == 0,
                    f"{name} of case {case} with num_splits={num_splits}: sequence {b} alone differs from "
                    f"the same one in its batch in {differing} of {alone[name].numel()} elements",
                )


def _alone(inputs: KVCacheInputs, b: int) -> KVCacheInputs:
    """Cut a batch down to one sequence; pages stay, as they belong to nobody in particular."""
    caches = ("k_cache", "v_cache") if inputs.block_table is None else ()
    names = ("q", "k", "v", "cache_seqlens", "block_table", *caches)
    own: dict[str, Any] = {name: x[b : b + 1] for name in names if (x := getattr(inputs, name)) is not None}
    return replace(inputs, **own)


def check_return_softmax_lse(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """return_softmax_lse changes what is returned, never the result: out is bitwise the same."""
    subject.require("lse")
    case = KVCacheCase(name="return_softmax_lse", cache_seqlens=(5, 60), head_dim=32)
    with_lse = call_kvcache(subject, _inputs(subject, dtype, case))
    without = call_kvcache(subject, _inputs(subject, dtype, case), return_softmax_lse=False)
    require_that(
        torch.equal(with_lse.out, without.out),
        "out differs between return_softmax_lse=True and return_softmax_lse=False",
    )


def check_generation(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """A prefill and then one token at a time give what one causal call over the whole sequence gives."""
    subject.require("append", "causal")
    dense = make_inputs(
        Case(name="generation", batch=2, seqlen_q=23, seqlen_k=23, head_dim=32, causal=True),
        dtype=dtype, device=subject.device, seed=subject.seed,
    )  # fmt: skip
    k_cache, v_cache = (torch.full_like(x, torch.nan) for x in (dense.k, dense.v))
    steps = []
    for start, end in ((0, 17), *((n, n + 1) for n in range(17, 23))):
        q, k, v = (x[:, start:end] for x in (dense.q, dense.k, dense.v))
        lengths = torch.full((2,), start, dtype=torch.int32, device=q.device)
        steps.append(subject.attention(q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True))
    expect(dense, use_dlse=False).check(out=torch.cat(steps, dim=1))
    for name, cache, x in (("k_cache", k_cache, dense.k), ("v_cache", v_cache, dense.v)):
        require_that(torch.equal(cache, x), f"{name} does not hold the tokens that were appended one by one")


def check_rewritten_rows(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """What an earlier call appended at the same lengths is overwritten before it is read."""
    subject.require("append")
    case = KVCacheCase(name="rewritten", cache_seqlens=(5, 58), seqlen_new=6, seqlen_q=6, head_dim=32)
    inputs = _inputs(subject, dtype, case)
    other = _inputs(subject, dtype, case, seed=1)
    call_kvcache(subject, replace(inputs, k=other.k, v=other.v))
    expect_kvcache(inputs).check(**call_kvcache(subject, inputs).tensors())
    inputs.assert_untouched()


def check_shared_pages(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """Sequences may share the pages of a common beginning, and append to pages of their own."""
    subject.require("append", "paged", "small_pages", "causal")
    lengths: dict[str, Any] = {"cache_seqlens": (20, 37, 16), "seqlen_new": 2, "seqlen_q": 2}
    case = KVCacheCase(name="shared_pages", page_size=16, causal=True, head_dim=32, **lengths)
    inputs = _inputs(subject, dtype, case)
    if inputs.block_table is None:
        raise RuntimeError("a paged case has a block_table")
    table = inputs.block_table.clone()
    table[:, 0] = table[1, 0]
    inputs = replace(inputs, block_table=table, integers={**inputs.integers, "block_table": table.clone()})
    expect_kvcache(inputs).check(**call_kvcache(subject, inputs).tensors())
    inputs.assert_untouched()


def check_table_strides(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """The rows of block_table may lie apart, as in a slice of a table for longer sequences."""
    subject.require("paged")
    new = 3 if subject.supports("append") else 0
    sizes: dict[str, Any] = {
        "cache_seqlens": (300, 16, 509),
        "seqlen_q": 3,
        "seqlen_new": new,
        "head_dim": 32,
    }
    inputs = _inputs(subject, dtype, KVCacheCase(name="table", capacity=512, page_size=256, **sizes))
    if inputs.block_table is None:
        raise TypeError("a case with pages must have a table")
    strided = replace(inputs, block_table=rows_apart(inputs.block_table))
    expect_kvcache(inputs).check(**call_kvcache(subject, strided).tensors())
    strided.assert_untouched()


def check_full_cache_is_refused(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """New keys that one number of cache_seqlens leaves no room for raise, and nothing is written."""
    subject.require("append")
    for page_size in (None, 16) if subject.supports("paged", "small_pages") else (None,):
        lengths: dict[str, Any] = {"cache_seqlens": (62, 62), "lengths_as": "number", "seqlen_new": 2}
        case = KVCacheCase(name="full_cache", page_size=page_size, head_dim=32, **lengths)
        inputs = replace(_inputs(subject, dtype, case), cache_seqlens=63)
        _require_overflow_error(subject, inputs)


def check_full_cache_in_a_tensor(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """The same for a tensor of lengths; without the check, nothing beyond the sequence's rows is written."""
    subject.require("append")
    for page_size in (None, 16) if subject.supports("paged", "small_pages") else (None,):
        case = KVCacheCase(
            name="full_cache", cache_seqlens=(10, 62), seqlen_new=2, page_size=page_size, head_dim=32
        )
        inputs = _inputs(subject, dtype, case)
        lengths = torch.tensor([10, 63], dtype=torch.int32, device=inputs.q.device)
        inputs = replace(inputs, cache_seqlens=lengths, integers={"cache_seqlens": lengths.clone()})
        if subject.supports("overflow_check"):
            _require_overflow_error(subject, inputs)
            continue
        try:
            call_kvcache(subject, inputs)
        except NonconformityError:
            raise
        except _REFUSALS:
            require_nothing_written(inputs)
        inputs.assert_untouched()


def _require_overflow_error(subject: KVCacheSubject, inputs: KVCacheInputs) -> None:
    try:
        call_kvcache(subject, inputs)
    except NonconformityError:
        raise
    except _REFUSALS as error:
        require_nothing_written(inputs)
        require_that(
            "cache_seqlens" in str(error) and "64" in str(error),
            f"the message must name cache_seqlens and the capacity 64: {type(error).__name__}: {error}",
        )
        return
    require_that(False, "63 keys and 2 new ones do not fit a capacity of 64: the call must raise")


def check_cuda_graph(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """A call in a CUDA graph reads cache_seqlens on the device: it appends further along once they grew."""
    subject.require("cuda_graph", "append")
    if torch.device(subject.device).type != "cuda":
        raise UnsupportedError("CUDA graphs need a CUDA device")
    with torch.cuda.device(subject.device):
        check_replay(subject, dtype, capture_cuda_graph)


def check_replay(
    subject: KVCacheSubject,
    dtype: torch.dtype,
    capture: Callable[[Callable[[], KVCacheCallResult]], tuple[Callable[[], None], KVCacheCallResult]],
) -> None:
    """Check a captured call as it is replayed, before and after its lengths have changed.

    Args:
        subject: what to capture.
        dtype: of its tensors.
        capture: takes a call, and returns what replays it and the results that a replay writes.
    """
    options: dict[str, Any] = {"rotary_dim": 16} if subject.supports("rotary", "partial_rotary") else {}
    if subject.supports("gqa"):
        options |= {"nheads": 8, "nheads_k": 2}
    lengths: dict[str, Any] = {"cache_seqlens": (5, 0, 300), "seqlen_new": 1, "capacity": 320}
    inputs = _inputs(subject, dtype, KVCacheCase(name="replay", head_dim=64, **lengths, **options))
    if not isinstance(inputs.cache_seqlens, torch.Tensor):
        raise RuntimeError("the case passes its lengths in a tensor")
    replay, result = capture(lambda: call_kvcache(subject, inputs))
    replay()
    expect_kvcache(inputs).check(**result.tensors())
    inputs.assert_untouched()

    inputs.cache_seqlens.add_(1)
    further = replace(
        inputs,
        before=(inputs.k_cache.clone(), inputs.v_cache.clone()),
        written=inputs.written.roll(1, dims=1),
        integers={"cache_seqlens": inputs.cache_seqlens.clone()},
    )
    replay()
    expect_kvcache(further).check(**result.tensors())
    replace(further, written=inputs.written | further.written).assert_untouched()


def capture_cuda_graph(
    call: Callable[[], KVCacheCallResult],
) -> tuple[Callable[[], None], KVCacheCallResult]:
    """Capture a call in a CUDA graph on the current device."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    # Nothing may be compiled or set up while a graph is captured.
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph.replay, result


def check_no_graph(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """There is no backward: a call that asks for gradients raises, or returns what requires none."""
    inputs = _inputs(subject, dtype, KVCacheCase(name="no_graph", cache_seqlens=(5, 60), head_dim=32))
    asking = replace(inputs, q=inputs.q.detach().requires_grad_())
    try:
        result = call_kvcache(subject, asking)
    except NonconformityError:
        raise
    except _REFUSALS:
        require_nothing_written(inputs)
        return
    require_that(not result.out.requires_grad, "out must not require grad: the caches change under its graph")


def check_window_types(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """window_size may be a tuple, a list, or a tensor of two elements."""
    subject.require("window")
    case = KVCacheCase(name="window_types", cache_seqlens=(5, 40), seqlen_q=4, window_size=(7, 3))
    expected = expect_kvcache(_inputs(subject, dtype, case))
    for window in ([7, 3], torch.tensor([7, 3])):
        result = call_kvcache(subject, _inputs(subject, dtype, case), window_size=window)
        expected.check(out=result.out)


def check_positional_arguments(subject: KVCacheSubject, dtype: torch.dtype) -> None:
    """Positional arguments mean what they mean to flash_attn_with_kvcache: the order is in its signature."""
    subject.require(
        "append", "rotary", "batch_idx", "leftpad", "softmax_scale", "causal", "window", "softcap"
    )
    subject.require("alibi", "num_splits", "lse", "paged", "small_pages")
    shared: dict[str, Any] = {"cache_seqlens": (5, 40), "seqlen_q": 4, "seqlen_new": 4, "rotary_dim": 16}
    shared |= {"softmax_scale": 0.3, "softcap": 2.0, "alibi": "head", "rotary_interleaved": False}
    for where in ({"batch_idx": (2, 0), "leftpad": (1, 3)}, {"page_size": 16}):
        storage: dict[str, Any] = where
        case = KVCacheCase(name="positional", window_size=(9, 0), causal=True, **shared, **storage)
        x = _inputs(subject, dtype, case)
        returned = subject.attention(
            x.q, x.k_cache, x.v_cache, x.k, x.v, x.rotary_cos, x.rotary_sin, x.cache_seqlens,
            x.cache_batch_idx, x.cache_leftpad, x.block_table, 0.3, True, (9, 0), 2.0, False, x.alibi_slopes,
            2, True,
        )  # fmt: skip
        require_that(
            isinstance(returned, (tuple, list)) and len(returned) == 2,
            "the nineteenth positional argument is return_softmax_lse, so two results are due",
        )
        tensors = {"out": returned[0], "softmax_lse": returned[1]}
        expect_kvcache(x).check(**tensors, k_cache=x.k_cache, v_cache=x.v_cache)


KVCACHE_BEHAVIOURS: dict[str, Callable[[KVCacheSubject, torch.dtype], None]] = {
    "num_splits": check_num_splits,
    "batch_invariance": check_batch_invariance,
    "return_softmax_lse": check_return_softmax_lse,
    "generation": check_generation,
    "rewritten_rows": check_rewritten_rows,
    "shared_pages": check_shared_pages,
    "table_strides": check_table_strides,
    "full_cache": check_full_cache_is_refused,
    "full_cache_in_a_tensor": check_full_cache_in_a_tensor,
    "cuda_graph": check_cuda_graph,
    "no_graph": check_no_graph,
    "window_types": check_window_types,
    "positional_arguments": check_positional_arguments,
}
