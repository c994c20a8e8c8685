"""Every mistake in a call over a KV cache must raise, say what excludes what, and leave the cache alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from fap_testing.cases_kvcache import KVCacheCase
from fap_testing.conformance.bad_input import Mistake, other_float, require_refusal
from fap_testing.conformance.kvcache import require_nothing_written
from fap_testing.inputs_kvcache import make_kvcache_inputs

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from fap_testing.conformance.subject import KVCacheSubject

__all__ = ["KVCACHE_MISTAKES", "check_kvcache_mistake"]

# A plain call, an appending one, and a paged one, for mistakes to be made in.
_SIZES: dict[str, Any] = {"cache_seqlens": (5, 40), "seqlen_q": 3, "nheads": 4, "head_dim": 32}
_PLAIN = KVCacheCase(name="bad_input", **_SIZES)
_APPEND = KVCacheCase(name="bad_input_append", seqlen_new=3, **_SIZES)
_ROTARY = KVCacheCase(name="bad_input_rotary", seqlen_new=3, rotary_dim=16, **_SIZES)
_PAGED = KVCacheCase(name="bad_input_paged", seqlen_new=3, page_size=16, **_SIZES)
_CASES: dict[str, KVCacheCase] = {"plain": _PLAIN, "append": _APPEND, "rotary": _ROTARY, "paged": _PAGED}
_NEEDS = {"plain": (), "append": ("append",), "rotary": ("append", "rotary"), "paged": ("append", "paged")}


def check_kvcache_mistake(subject: KVCacheSubject, dtype: torch.dtype, mistake: KVCacheMistake) -> None:
    """Check that a subject refuses a call with an error that says what is wrong, before it writes."""
    subject.require("error_messages", *_NEEDS[mistake.call])
    if mistake.call == "paged":
        subject.require("small_pages")
    if mistake.option is not None:
        subject.require(mistake.option)
    inputs = make_kvcache_inputs(_CASES[mistake.call], dtype=dtype, device=subject.device, poison=False)
    arguments = {"q": inputs.q, "k_cache": inputs.k_cache, "v_cache": inputs.v_cache, **inputs.options}
    arguments |= mistake.spoil(arguments)
    arguments = {name: x for name, x in arguments.items() if x is not None}
    tensors = [arguments.pop(name) for name in ("q", "k_cache", "v_cache")]
    require_refusal(partial(subject.attention, *tensors, **arguments), mistake.says)
    require_nothing_written(inputs)


@dataclass(frozen=True, slots=True)
class KVCacheMistake(Mistake):
    """A call over a KV cache that must be refused; an argument that is spoiled to None is left out.

    Attributes:
        call: which good call is spoiled.
    """

    call: str = "plain"


def _mistake(
    call: str, spoil: Callable[[Mapping[str, Any]], dict[str, Any]], *says: str, option: str | None = None
) -> KVCacheMistake:
    return KVCacheMistake(spoil, says, option, call)


def _without(call: str, *names: str, says: tuple[str, ...]) -> KVCacheMistake:
    return _mistake(call, lambda _: dict.fromkeys(names), *says)


def _value(
    name: str, value: Any, *says: str, option: str | None = None, call: str = "plain"
) -> KVCacheMistake:
    return _mistake(call, lambda _: {name: value}, rf"\b{name}\b", *says, option=option)


def _change(call: str, names: str, change: Callable[[torch.Tensor], Any], *says: str) -> KVCacheMistake:
    """Spoil every one of some tensors that the call has."""
    return _mistake(call, lambda good: {name: change(good[name]) for name in names.split()}, *says)


def _integers(
    name: str, values: Any, *says: str, call: str, dtype: torch.dtype = torch.int32, option: str | None = None
) -> KVCacheMistake:
    def spoil(good: Mapping[str, Any]) -> dict[str, Any]:
        return {name: torch.tensor(values, dtype=dtype, device=good["q"].device)}

    return _mistake(call, spoil, rf"\b{name}\b", *says, option=option)


def _pages_of(size: int) -> KVCacheMistake:
    """Pages of a size that is no power of two, or below 16."""

    def spoil(good: Mapping[str, Any]) -> dict[str, Any]:
        pages = {name: good[name].new_zeros(12, size, 2, 32) for name in ("k_cache", "v_cache")}
        table = torch.arange(12, dtype=torch.int32, device=good["q"].device).reshape(2, 6)
        return {**pages, "block_table": table}

    return _mistake("paged", spoil, "page", rf"\b{size}\b")


def _last_stride_2(x: torch.Tensor) -> torch.Tensor:
    return x.repeat_interleave(2, dim=-1)[..., ::2]


def _options() -> dict[str, KVCacheMistake]:
    return {
        "window_of_length_3": _value("window_size", (3, 4, 5), "3, 4, 5", option="window"),
        "window_of_text": _value("window_size", "wide", "wide", option="window"),
        "softcap_negative": _value("softcap", -2.0, "-2", option="softcap"),
        "softcap_nan": _value("softcap", math.nan, "nan", option="softcap"),
        "softmax_scale_nan": _value("softmax_scale", math.nan, "nan", option="softmax_scale"),
        "softmax_scale_no_number": _value("softmax_scale", "small", "small", option="softmax_scale"),
        "num_splits_negative": _value("num_splits", -1, "-1", option="num_splits"),
        "num_splits_129": _value("num_splits", 129, r"\b129\b", r"\b128\b", option="num_splits"),
        "num_splits_no_integer": _value("num_splits", 1.5, r"1\.5", option="num_splits"),
        "alibi_wrong_heads": _mistake(
            "plain", lambda good: {"alibi_slopes": torch.ones(3, device=good["q"].device)},
            "alibi_slopes", r"\b3\b", r"\b4\b", option="alibi",
        ),
        "alibi_no_tensor": _value("alibi_slopes", [0.5] * 4, "list", option="alibi"),
    }  # fmt: skip


def _tensors() -> dict[str, KVCacheMistake]:
    return {
        "q_of_rank_3": _change("plain", "q", lambda x: x[0], r"\bq\b", "3, 4, 32"),
        "q_no_tensor": _change("plain", "q", lambda x: x.tolist(), r"\bq\b", "list"),
        "k_cache_of_rank_3": _change("plain", "k_cache", lambda x: x[0], r"\bk_cache\b", "64, 2, 32"),
        "v_cache_of_another_shape": _change("plain", "v_cache", lambda x: x[:, :7], r"\bv_cache\b", r"\b7\b"),
        "head_dim_of_caches": _change(
            "plain", "k_cache v_cache", lambda x: x[..., :16], "head.?dim", r"\b16\b"
        ),
        "head_dim_257": _change(
            "plain", "q k_cache v_cache", lambda x: x[..., :1].repeat(1, 1, 1, 257), "head.?dim", r"\b257\b"
        ),
        "heads_not_divisible": _change(
            "plain", "k_cache v_cache", lambda x: x.repeat(1, 1, 2, 1)[:, :, :3], "heads", r"\b3\b", r"\b4\b"
        ),
        "batch_of_caches": _change(
            "plain", "k_cache v_cache", lambda x: x[:1], "batch", r"_cache\b", r"\b1\b"
        ),
        "integer_dtype": _change("plain", "q k_cache v_cache", lambda x: x.to(torch.int32), "int32"),
        "mixed_dtype_of_cache": _change(
            "plain", "k_cache v_cache", lambda x: x.to(other_float(x.dtype)), "dtype", "_cache", "float16"
        ),
        "mixed_devices": _change(
            "plain", "k_cache v_cache", lambda x: x.to("meta"), "device", "_cache", "meta"
        ),
        "last_stride_of_k_cache": _change("plain", "k_cache", _last_stride_2, r"\bk_cache\b", "stride"),
        "last_stride_of_v_cache": _change("append", "v_cache", _last_stride_2, r"\bv_cache\b", "stride"),
        "dtype_of_k": _change(
            "append", "k", lambda x: x.to(other_float(x.dtype)), "dtype", r"\bk\b", "float16"
        ),
        "batch_of_k_and_v": _change("append", "k v", lambda x: x[:1], r"\b[kv]\b", r"\b1\b"),
        "heads_of_k_and_v": _change("append", "k v", lambda x: x[:, :, :1], r"\b[kv]\b", r"\b1\b"),
        "head_dim_of_k_and_v": _change("append", "k v", lambda x: x[..., :16], r"\b[kv]\b", r"\b16\b"),
        "seqlen_of_v": _change("append", "v", lambda x: x[:, :2], r"\bv\b", r"\b2\b"),
        "k_longer_than_the_cache": _change(
            "append", "k v", lambda x: x[:, :1].repeat(1, 65, 1, 1), r"\b65\b", r"\b64\b"
        ),
    }


def _combinations() -> dict[str, KVCacheMistake]:
    tables = "rotary_cos rotary_sin"
    return {
        "k_without_v": _without("append", "v", says=(r"\bk\b", r"\bv\b")),
        "v_without_k": _without("append", "k", says=(r"\bk\b", r"\bv\b")),
        "k_without_cache_seqlens": _without("append", "cache_seqlens", says=(r"\bk\b", "cache_seqlens")),
        "rotary_without_k": _without("rotary", "k", "v", says=("rotary", r"\bk\b")),
        "rotary_cos_without_sin": _without("rotary", "rotary_sin", says=("rotary_cos", "rotary_sin")),
        "rotary_sin_without_cos": _without("rotary", "rotary_cos", says=("rotary_cos", "rotary_sin")),
        "paged_with_leftpad": _integers(
            "cache_leftpad", [1, 2], "block_table", call="paged", option="leftpad"
        ),
        "paged_with_batch_idx": _integers(
            "cache_batch_idx", [0, 1], "block_table", call="paged", option="batch_idx"
        ),
        "rotary_dim_8": _change("rotary", tables, lambda x: x[:, :4], "rotary", r"\b16\b", r"\b8\b"),
        "rotary_dim_above_head_dim": _change(
            "rotary", tables, lambda x: x.repeat(1, 3), "rotary", r"\b48\b", r"\b32\b"
        ),
        "rotary_of_two_shapes": _change("rotary", "rotary_sin", lambda x: x[:9], "rotary_sin", r"\b9\b"),
        "rotary_of_rank_3": _change("rotary", tables, lambda x: x[None], "rotary", "1, 64, 8"),
        "dtype_of_rotary": _change(
            "rotary", tables, lambda x: x.to(other_float(x.dtype)), "rotary", "dtype", "float16"
        ),
        "page_size_8": _pages_of(8),
        "page_size_24": _pages_of(24),
    }  # fmt: skip


def _tables() -> dict[str, KVCacheMistake]:
    wide: dict[str, Any] = {"dtype": torch.int64}
    return {
        "cache_seqlens_int64": _integers("cache_seqlens", [5, 40], "int64", "int32", call="plain", **wide),
        "cache_seqlens_float": _value("cache_seqlens", 1.5, r"1\.5"),
        "cache_seqlens_of_batch_3": _integers("cache_seqlens", [5, 40, 1], r"\b3\b", r"\b2\b", call="append"),
        "cache_seqlens_of_rank_2": _integers("cache_seqlens", [[5, 40]], "1, 2", call="plain"),
        "cache_seqlens_negative": _value("cache_seqlens", -1, "-1", call="append"),
        "leftpad_int64": _integers("cache_leftpad", [1, 2], "int64", call="plain", option="leftpad", **wide),
        "leftpad_of_batch_3": _integers("cache_leftpad", [1, 2, 3], r"\b3\b", call="plain", option="leftpad"),
        "batch_idx_int64": _integers(
            "cache_batch_idx", [1, 0], "int64", call="plain", option="batch_idx", **wide
        ),
        "batch_idx_of_batch_1": _integers("cache_batch_idx", [1], r"\b1\b", call="plain", option="batch_idx"),
        "block_table_int64": _integers("block_table", [[0, 1, 2], [3, 4, 5]], "int64", call="paged", **wide),
        "block_table_of_rank_1": _integers("block_table", [0, 1], r"\b2,", call="paged"),
        "block_table_of_batch_1": _integers("block_table", [[0, 1, 2]], r"\b1, 3\b", call="paged"),
    }


KVCACHE_MISTAKES: dict[str, KVCacheMistake] = {**_tensors(), **_combinations(), **_tables(), **_options()}
