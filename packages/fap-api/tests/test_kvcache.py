"""What PyTorch and a serving loop need of flash_attn_with_kvcache beyond its contract."""

from __future__ import annotations

import functools
import shutil

import pytest
import torch
from torch.library import opcheck

import fap_api
from fap_api import _kvcache_ops
from fap_testing.cases_kvcache import select_kvcache
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import make_kvcache_inputs

CAPACITY = 32


def draw(batch=2, new=1, device="cpu", dtype=torch.float32, rotary=False, paged=False):
    """Arguments of a decode step by name."""
    make = functools.partial(torch.randn, device=device, dtype=dtype)
    pages = (batch * 2, 16) if paged else (batch, CAPACITY)
    arguments = {
        "q": make(batch, new, 4, 16),
        "k_cache": make(*pages, 2, 16),
        "v_cache": make(*pages, 2, 16),
        "k": make(batch, new, 2, 16),
        "v": make(batch, new, 2, 16),
        "cache_seqlens": torch.tensor([5, 17][:batch], dtype=torch.int32, device=device),
    }
    if rotary:
        angles = torch.rand(CAPACITY, 8, device=device) * 6
        arguments |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
    if paged:
        table = torch.arange(batch * 2, device=device).flip(0).view(batch, 2)
        arguments["block_table"] = table.to(torch.int32)
    return arguments


def copy(arguments):
    return {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def caches(arguments):
    return arguments["k_cache"], arguments["v_cache"]


def operator_arguments(call, backend, with_new):
    new = (call["k"], call["v"], call.get("rotary_cos"), call.get("rotary_sin"), True) if with_new else ()
    slopes = torch.rand(4, device=call["q"].device)
    rest = (call["cache_seqlens"], None, None, call.get("block_table"), slopes, 0.3, 5, 0, 2.0, 0, backend)
    return (call["q"], *caches(call), *new, *rest)


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"paged": True}], ids=["plain", "rotary", "paged"])
@pytest.mark.parametrize(
    ("backend", "device", "dtype"),
    [
        ("torch", "cpu", torch.float32),
        pytest.param("triton", "cuda", torch.float16, marks=pytest.mark.gpu),
    ],
    ids=["torch", "triton"],
)
def test_opcheck(options, backend, device, dtype):
    call = draw(device=device, dtype=dtype, **options)
    opcheck(_kvcache_ops.kvcache_append_attention, operator_arguments(call, backend, with_new=True))
    opcheck(_kvcache_ops.kvcache_attention, operator_arguments(call, backend, with_new=False))


def test_only_the_appending_operator_declares_writes():
    writes = {
        operator: [a.name for a in operator._schema.arguments if a.alias_info and a.alias_info.is_write]
        for operator in (_kvcache_ops.kvcache_attention, _kvcache_ops.kvcache_append_attention)
    }
    assert [*writes.values()] == [[], ["k_cache", "v_cache"]]


@pytest.fixture
def compile_counter():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()


def step(q, k_cache, v_cache, k, v, cache_seqlens, **options):
    """One token of a model, in which something else reads the caches as well."""
    out, lse = fap_api.flash_attn_with_kvcache(
        q * 2,
        k_cache,
        v_cache,
        k,
        v,
        cache_seqlens=cache_seqlens,
        causal=True,
        return_softmax_lse=True,
        **options,
    )
    return out + 1, lse, k_cache.sum() + v_cache.sum()


def check_compiled(compiled, lengths, **options):
    mine = draw(**options)
    right = copy(mine)
    for length in lengths:
        changed = {"cache_seqlens": length, "q": torch.randn_like(mine["q"])}
        results = [function(**x | changed) for function, x in ((compiled, mine), (step, right))]
        for got, expected in zip(*results, strict=True):
            torch.testing.assert_close(got, expected)
        for got, expected in zip(caches(mine), caches(right), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.filterwarnings("default")
class TestCompile:
    @pytest.mark.smoke
    @pytest.mark.parametrize("options", [{"rotary": True}, {"paged": True}], ids=["rotary", "paged"])
    def test_one_graph_for_all_lengths(self, compile_counter, options):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        lengths = [torch.tensor([5 + n, 17 - n], dtype=torch.int32) for n in range(4)]
        check_compiled(compiled, lengths, **options)
        assert compile_counter["unique_graphs"] == 1

    def test_a_number_as_length_needs_two_graphs_at_most(self, compile_counter):
        check_compiled(torch.compile(step, fullgraph=True, backend="aot_eager"), [3, 4, 5, 6, 19])
        assert compile_counter["unique_graphs"] <= 2

    def test_a_full_cache_raises_from_the_graph(self, compile_counter):
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
        call = draw()
        compiled(**call)
        before = copy(call)
        full = torch.tensor([5, CAPACITY], dtype=torch.int32)
        with pytest.raises(RuntimeError, match="cache_seqlens must leave room"):
            compiled(**call | {"cache_seqlens": full})
        for got, expected in zip(caches(call), caches(before), strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
    def test_inductor(self, compile_counter):
        lengths = [torch.tensor([5 + n, 17 - n], dtype=torch.int32) for n in range(3)]
        check_compiled(torch.compile(step, fullgraph=True), lengths, rotary=True)
        assert compile_counter["unique_graphs"] == 1

    @pytest.mark.gpu
    def test_inductor_on_gpu(self, compile_counter):
        lengths = [torch.tensor([5 + n, 17 - n], dtype=torch.int32, device="cuda") for n in range(3)]
        compiled = torch.compile(step, fullgraph=True)
        check_compiled(compiled, lengths, rotary=True, device="cuda", dtype=torch.float16)


@pytest.fixture
def masked(monkeypatch):
    """Have the torch back end visit the whole capacity under a mask, as where the host knows no length."""
    monkeypatch.setattr("fap_api.backends.torch_.known_to_the_host", lambda x: False)


@pytest.mark.parametrize("case", select_kvcache("quick")[::5], ids=str)
def test_the_torch_back_end_without_reading_lengths(masked, case):
    inputs = make_kvcache_inputs(case, dtype=torch.float32)
    out, lse = fap_api.flash_attn_with_kvcache(
        inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options, return_softmax_lse=True
    )
    expect_kvcache(inputs).check(out=out, softmax_lse=lse, k_cache=inputs.k_cache, v_cache=inputs.v_cache)
    inputs.assert_untouched()


def test_on_a_device_what_does_not_fit_stays_as_it_was(masked, monkeypatch):
    monkeypatch.setattr(_kvcache_ops, "check_on_host", lambda *_: None)
    call = draw(new=4)
    before = copy(call)
    lengths = torch.tensor([5, CAPACITY - 3], dtype=torch.int32)
    fap_api.flash_attn_with_kvcache(**call | {"cache_seqlens": lengths})
    for cache, old, new in zip(caches(call), caches(before), (call["k"], call["v"]), strict=True):
        assert torch.equal(cache[0, 5:9], new[0])
        assert torch.equal(cache[1], old[1])


class TestExplain:
    def test_it_names_the_back_end_and_writes_nothing(self):
        call = draw()
        before = copy(call)
        explanation = fap_api.explain_with_kvcache(**call)
        assert explanation.backend == "torch"
        assert "KV cache" in " ".join(explanation.reasons["flag_gems"])
        for got, expected in zip(caches(call), caches(before), strict=True):
            assert torch.equal(got, expected)

    def test_an_explicit_choice_that_cannot_run_raises(self):
        with fap_api.use_backend("triton"), pytest.raises(RuntimeError, match="chosen by .*got cpu"):
            fap_api.flash_attn_with_kvcache(**draw())

    def test_float64_pages(self):
        call = draw(dtype=torch.float64, paged=True)
        assert fap_api.explain_with_kvcache(**call).backend == "torch"


class TestArguments:
    def test_a_number_stands_for_all_lengths(self):
        call = draw()
        same = copy(call)
        call["cache_seqlens"], same["cache_seqlens"] = 7, torch.full((2,), 7, dtype=torch.int32)
        assert torch.equal(fap_api.flash_attn_with_kvcache(**call), fap_api.flash_attn_with_kvcache(**same))
        for got, expected in zip(caches(call), caches(same), strict=True):
            assert torch.equal(got, expected)

    @pytest.mark.parametrize(
        ("spoil", "says"),
        [
            ({"cache_seqlens": True}, "cache_seqlens must be an int32 tensor .* got bool"),
            ({"cache_seqlens": CAPACITY}, f"cache_seqlens .*{CAPACITY} keys and 1 new ones .*{CAPACITY}"),
            ({"cache_seqlens": torch.tensor([5, -1], dtype=torch.int32)}, "cache_seqlens must be at least 0"),
            ({"cache_batch_idx": torch.tensor([0, 2], dtype=torch.int32)}, "cache_batch_idx must name"),
            ({"cache_batch_idx": torch.tensor([1, 1], dtype=torch.int32)}, "cache_batch_idx must be another"),
            ({"cache_batch_idx": torch.tensor([0, -1], dtype=torch.int32)}, "cache_batch_idx must name"),
            ({"cache_leftpad": torch.tensor([0, -1], dtype=torch.int32)}, "cache_leftpad must be at least 0"),
            ({"rotary_interleaved": None}, "rotary_interleaved must be True or False"),
            ({"k": [1.0]}, "k must be a torch.Tensor, got list"),
            ({"v": torch.zeros(2, 1, 2, 16).to_sparse()}, "v must be a dense tensor"),
            ({"rotary_cos": [1.0], "rotary_sin": [1.0]}, "rotary_cos must be a torch.Tensor, got list"),
            (
                dict.fromkeys(("rotary_cos", "rotary_sin"), torch.zeros(31, 8)),
                "every position of the cache, 32",
            ),
        ],
    )
    def test_mistakes(self, spoil, says):
        call = draw()
        fap_api.flash_attn_with_kvcache(**copy(call))  # a good call before must not let a bad one through
        before = copy(call)
        with pytest.raises((RuntimeError, ValueError, TypeError), match=says):
            fap_api.flash_attn_with_kvcache(**call | spoil)
        for got, expected in zip(caches(call), caches(before), strict=True):
            assert torch.equal(got, expected)

    def test_a_page_that_does_not_exist(self):
        call = draw(paged=True)
        call["block_table"][1, 1] = 99
        with pytest.raises(RuntimeError, match="block_table must name some of the 4 pages"):
            fap_api.flash_attn_with_kvcache(**call)
        call["cache_seqlens"][1] = 3  # then that page is not in use
        fap_api.flash_attn_with_kvcache(**call)

    @pytest.mark.parametrize(
        "length", [31, torch.tensor([31, 5], dtype=torch.int32)], ids=["number", "tensor"]
    )
    def test_full_pages_are_called_by_their_name(self, length):
        call = draw(paged=True) | {"cache_seqlens": length}
        fap_api.flash_attn_with_kvcache(**call)
        says = "cache_seqlens .*: 32 keys and 1 new ones do not fit the pages of block_table, which hold 32"
        with pytest.raises(RuntimeError, match=says):
            fap_api.flash_attn_with_kvcache(**call | {"cache_seqlens": length + 1})

    def test_queries_beyond_the_angles(self):
        call = draw(rotary=True) | {"q": torch.randn(2, 20, 4, 16), "causal": True}
        with pytest.raises(RuntimeError, match="32 positions, and the last query .* position 36"):
            fap_api.flash_attn_with_kvcache(**call)
        fap_api.flash_attn_with_kvcache(**call | {"causal": False})  # all at one position

    @pytest.mark.parametrize("causal", [False, True])
    def test_no_query_needs_no_angle(self, causal):
        call = draw(rotary=True) | {"cache_seqlens": CAPACITY, "causal": causal}
        for name in ("q", "k", "v"):
            call[name] = call[name][:, :0]
        assert fap_api.flash_attn_with_kvcache(**call).shape == (2, 0, 4, 16)

    @pytest.mark.parametrize("name", ["q", "k", "v", "k_cache", "v_cache"])
    def test_gradients_are_refused_unless_they_are_off(self, name):
        call = draw()
        call[name].requires_grad_()
        with pytest.raises(RuntimeError, match=f"no backward.* got {name} that requires a gradient"):
            fap_api.flash_attn_with_kvcache(**call)
        with torch.no_grad():
            fap_api.flash_attn_with_kvcache(**call)
        with torch.inference_mode():
            fap_api.flash_attn_with_kvcache(**call)

    def test_autocast_casts_to_the_caches_dtype(self):
        call = draw(rotary=True)
        for name in ("k_cache", "v_cache"):
            call[name] = call[name].bfloat16()
        with pytest.raises(RuntimeError, match="same dtype"):
            fap_api.flash_attn_with_kvcache(**call)
        with torch.autocast("cpu", torch.bfloat16):
            assert fap_api.flash_attn_with_kvcache(**call).dtype == torch.bfloat16

    def test_meta_tensors_give_shapes(self):
        call = {name: x.to("meta") for name, x in draw().items()}
        out, lse = fap_api.flash_attn_with_kvcache(**call, return_softmax_lse=True)
        assert (out.shape, out.device.type) == (call["q"].shape, "meta")
        assert (lse.shape, lse.dtype) == ((2, 4, 1), torch.float32)


def test_a_write_is_counted():
    """Autograd finds out that something it saved was overwritten by the caches' version."""
    call = draw()
    versions = [x._version for x in caches(call)]
    fap_api.flash_attn_with_kvcache(**call)
    assert all(x._version > old for x, old in zip(caches(call), versions, strict=True))


INTERPRETED = """
import torch
import fap_api
from fap_testing.cases_kvcache import find_kvcache
from fap_testing.expectation_kvcache import expect_kvcache
from fap_testing.inputs_kvcache import make_kvcache_inputs

for name in names:
    inputs = make_kvcache_inputs(find_kvcache(name), dtype=torch.float32)
    before = [x._version for x in (inputs.k_cache, inputs.v_cache)]
    with fap_api.use_backend("triton"):
        out, lse = fap_api.flash_attn_with_kvcache(
            inputs.q, inputs.k_cache, inputs.v_cache, **inputs.options, return_softmax_lse=True
        )
    expect_kvcache(inputs).check(out=out, softmax_lse=lse, k_cache=inputs.k_cache, v_cache=inputs.v_cache)
    inputs.assert_untouched()
    if inputs.k is not None:
        assert all(x._version > old for x, old in zip((inputs.k_cache, inputs.v_cache), before))
"""
INTERPRETED_CASES = [
    "combined_leftpad_batch_idx",
    "combined_paged_causal",
    "rotary_halves_q5_append_5",
    "paged_lengths_number",
    "lengths_none",
    "append_17_q17_causal",
]


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU the kernels run there")
def test_triton_in_the_interpreter(interpreted):
    interpreted(INTERPRETED, names=INTERPRETED_CASES)


@pytest.mark.gpu
class TestOnGpu:
    def test_triton_is_the_first_choice(self):
        explanation = fap_api.explain_with_kvcache(**draw(device="cuda", dtype=torch.float16))
        assert explanation.backend == "triton"

    @pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
    @pytest.mark.parametrize("backend", ["triton", "torch"])
    @pytest.mark.parametrize("lengths", ["tensor", "number"])
    def test_nothing_waits_for_the_device(self, backend, lengths):
        call = draw(device="cuda", dtype=torch.float16, rotary=True, paged=True)
        if lengths == "number":
            call["cache_seqlens"] = 5
        with fap_api.use_backend(backend):
            fap_api.flash_attn_with_kvcache(**call)
            torch.cuda.set_sync_debug_mode("error")
            try:
                fap_api.flash_attn_with_kvcache(**call)
            finally:
                torch.cuda.set_sync_debug_mode("default")

    def test_a_graph_replays_right_after_the_lengths_changed(self):
        call = draw(device="cuda", dtype=torch.float16, rotary=True, paged=True)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            fap_api.flash_attn_with_kvcache(**call)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = fap_api.flash_attn_with_kvcache(**call)
        for _ in range(3):
            call["cache_seqlens"].add_(1)
            for name in ("q", "k", "v"):
                call[name].normal_()
            right = copy(call)
            graph.replay()
            assert torch.equal(captured, fap_api.flash_attn_with_kvcache(**right))
            for got, expected in zip(caches(call), caches(right), strict=True):
                assert torch.equal(got, expected)
