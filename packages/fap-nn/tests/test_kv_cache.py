"""KVCache, and FlashMHA generating with it: a prompt and then token by token equals one pass over all."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.testing import assert_close

from fap_nn import FlashMHA, KVCache

EMBED, HEADS, MAX = 24, 4, 40
FEATURES = {
    "plain": {},
    "gqa, no bias": {"num_heads_kv": 2, "bias": False},
    "mqa, window": {"num_heads_kv": 1, "window_size": (3, 0)},
    "left window alone": {"window_size": (2, -1)},
    "softcap, scale": {"softcap": 1.5, "softmax_scale": 0.7},
    "rotary": {"rotary_emb_dim": 4},
    "rotary interleaved, gqa": {"rotary_emb_dim": 6, "rotary_emb_interleaved": True, "num_heads_kv": 2},
    "xpos": {"rotary_emb_dim": 6, "rotary_emb_scale_base": 16.0},
    "alibi": {"alibi_slopes": [0.1, 0.2, 0.3, 0.4]},
    "everything": {
        "num_heads_kv": 2,
        "window_size": (7, 0),
        "softcap": 3.0,
        "rotary_emb_dim": 4,
        "alibi_slopes": [0.1, 0.2, 0.3, 0.4],
    },
}
every_feature = pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES)
every_memory = pytest.mark.parametrize("page_size", [None, 16], ids=["dense", "paged"])
PROMPTS = {
    "right": [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]],
    "left": [[1, 1, 1, 1, 1], [0, 0, 0, 1, 1], [0, 0, 1, 1, 1]],
    "between": [[1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 1, 0, 0]],
}


def make(dtype=torch.float64, **options):
    return FlashMHA(EMBED, HEADS, causal=True, dtype=dtype, **options).eval()


def tokens(*shape, dtype=torch.float64):
    return torch.randn(*shape, EMBED, dtype=dtype)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.smoke
@every_feature
@every_memory
@pytest.mark.parametrize("batch_first", [True, False])
def test_a_prompt_and_then_token_by_token_equals_one_pass(features, page_size, batch_first):
    module, x = make(batch_first=batch_first, **features), tokens(2, 23)
    layout = (lambda t: t) if batch_first else (lambda t: t.transpose(0, 1))
    cache = module.make_cache(2, 23, page_size)  # the last token fills it
    cache.k.fill_(torch.nan)
    cache.v.fill_(torch.nan)
    cuts = [0, 9, *range(10, 21), 23]
    steps = [layout(module(layout(x[:, start:end]), cache=cache)) for start, end in itertools.pairwise(cuts)]
    # Angles are float32.
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if "rotary_emb_dim" in features else {}
    assert_close(torch.cat(steps, dim=1), layout(module(layout(x))), **tolerance)
    assert cache.seqlens.tolist() == [23, 23]


@every_feature
@pytest.mark.parametrize("mask", PROMPTS.values(), ids=PROMPTS)
def test_prompts_of_different_lengths(features, mask):
    """Each sequence goes on as if it were alone, whatever stands in the padding of its prompt."""
    module, mask = make(**features), torch.tensor(mask, dtype=torch.bool)
    prompt, rest = tokens(*mask.shape), tokens(len(mask), 4)
    cache = module.make_cache(len(mask), MAX, 16)
    poisoned = torch.where(mask[:, :, None], prompt, torch.nan)
    first = module(poisoned, key_padding_mask=mask, cache=cache)
    assert cache.seqlens.tolist() == mask.sum(1).tolist()
    assert not first[~mask].any()
    steps = [module(rest[:, n : n + 1], cache=cache) for n in range(4)]
    for b, real in enumerate(mask):
        whole = module(torch.cat((prompt[b, real], rest[b]))[None])[0]
        mine = torch.cat((first[b, real], *(step[b] for step in steps)))
        assert_close(mine, whole, rtol=1e-5, atol=1e-6)


def test_a_later_turn_may_be_padded_too():
    module, cache = make(rotary_emb_dim=4), None
    x, mask = tokens(2, 6), torch.tensor([[0, 1, 1], [1, 1, 1]], dtype=torch.bool)
    cache = module.make_cache(2, MAX)
    module(x[:, :3], cache=cache)
    second = module(x[:, 3:], key_padding_mask=mask, cache=cache)
    whole = module(torch.cat((x[:1, :3], x[:1, 4:]), dim=1))
    assert_close(second[:1, 1:], whole[:, 3:], rtol=1e-5, atol=1e-6)
    assert cache.seqlens.tolist() == [5, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype):
    module, x = make(dtype, rotary_emb_dim=4), tokens(2, 12, dtype=dtype)
    cache = module.make_cache(2, 12)
    steps = [module(x[:, n : n + 1], cache=cache) for n in range(12)]
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    assert_close(torch.cat(steps, dim=1), module(x), **tolerance)


def test_autocast_and_inference_mode():
    module, x = make(torch.float32, rotary_emb_dim=4), tokens(2, 6, dtype=torch.float32)
    cache = module.make_cache(2, 6).to(dtype=torch.bfloat16)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        steps = [module(x[:, n : n + 1], cache=cache) for n in range(6)]
        assert_close(torch.cat(steps, dim=1), module(x), rtol=2e-2, atol=2e-2)
    assert steps[0].dtype == torch.bfloat16


@every_memory
def test_growth_past_max_seqlen_is_refused_before_anything_is_written(page_size):
    module, x = make(), tokens(2, 20)
    cache = module.make_cache(2, 19, page_size)
    module(x[:, :17], cache=cache)
    before = cache.k.clone(), cache.v.clone(), cache.seqlens.clone()
    with pytest.raises(
        RuntimeError, match="max_seqlen 19 tokens .* got 3 more for one of 17.* at most 2 more"
    ):
        module(x[:, 17:], cache=cache)
    for x_, old in zip((cache.k, cache.v, cache.seqlens), before, strict=True):
        assert torch.equal(x_.nan_to_num(), old.nan_to_num())
    module(x[:, 17:19], cache=cache)


def test_reset_starts_again():
    module, x = make(), tokens(2, 8)
    cache = module.make_cache(2, 8)
    module(tokens(2, 8), cache=cache)
    cache.reset()
    assert_close(module(x, cache=cache), module(x))


@every_memory
def test_to_takes_the_tokens_along(page_size):
    module, x = make(torch.float32), tokens(2, 8, dtype=torch.float32)
    cache = module.make_cache(2, 8, page_size)
    module(x[:, :5], cache=cache)
    wide, moved = module.double(), cache.to(dtype=torch.float64)
    assert (moved.k.dtype, moved.seqlens.dtype, moved.longest) == (torch.float64, torch.int32, 5)
    assert moved.seqlens is cache.seqlens
    assert_close(wide(x[:, 5:].double(), cache=moved), wide(x.double())[:, 5:], rtol=1e-5, atol=1e-5)
    on_meta = cache.to("meta")
    assert all(t.is_meta for t in (on_meta.k, on_meta.v, on_meta.seqlens))


def test_pages_may_be_shared():
    """Two sequences with one beginning hold it once."""
    module, start, ends = make(), tokens(1, 16), tokens(2, 3)
    cache = module.make_cache(2, 32, page_size=16)
    cache.block_table[1, 0] = cache.block_table[0, 0]
    module(start.expand(2, -1, -1), cache=cache)
    mine = module(ends, cache=cache)
    whole = module(torch.cat((start.expand(2, -1, -1), ends), dim=1))
    assert_close(mine, whole[:, 16:])


def test_it_says_what_it_is():
    assert repr(KVCache(2, 40, 3, 8, page_size=16)) == (
        "KVCache(batch=2, max_seqlen=40, num_heads_kv=3, head_dim=8, page_size=16, device=cpu, "
        "dtype=torch.float32)"
    )
    assert KVCache(2, 40, 3, 8, page_size=16).k.shape == (6, 16, 3, 8)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        ({"batch": 0}, "batch must be at least 1, got 0"),
        ({"max_seqlen": 0}, "max_seqlen must be"),
        ({"head_dim": -1}, "head_dim must be"),
        ({"page_size": 8}, "page_size must be a power of two and at least 16, or None, got 8"),
        ({"page_size": 24}, "got 24"),
        ({"dtype": torch.int32}, "dtype must be floating-point, .* got torch.int32"),
    ],
)
def test_wrong_sizes_are_refused(sizes, says):
    with pytest.raises(ValueError, match=says):
        KVCache(**{"batch": 2, "max_seqlen": 40, "num_heads_kv": 2, "head_dim": 8} | sizes)


@pytest.mark.parametrize(
    ("options", "sizes", "says"),
    [
        ({"causal": False}, {}, "needs a module with causal=True"),
        ({"cross_attn": True}, {}, "x_kv must be given|cache must be None"),
        ({}, {"batch": 3}, "cache must be for batch 2, .* got one for batch 3"),
        ({}, {"num_heads_kv": 2}, "num_heads_kv 4 and head_dim 6, got .* num_heads_kv 2"),
    ],
)
def test_caches_and_modules_that_do_not_fit(options, sizes, says):
    module = FlashMHA(EMBED, HEADS, dtype=torch.float64, **{"causal": True, **options})
    cache = KVCache(
        **{"batch": 2, "max_seqlen": 9, "num_heads_kv": HEADS, "head_dim": EMBED // HEADS} | sizes,
        dtype=torch.float64,
    )
    with pytest.raises(RuntimeError, match=says):
        module(tokens(2, 3), cache=cache)


def test_what_is_no_cache_is_refused():
    with pytest.raises(TypeError, match="cache must be a KVCache or None, got dict"):
        make()(tokens(2, 3), cache={})


def test_cross_attention_has_no_cache():
    module = FlashMHA(EMBED, HEADS, cross_attn=True, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="cache must be None"):
        module(tokens(2, 3), tokens(2, 3), cache=module.make_cache(2, 9))


def test_dropout_and_gradients_are_refused():
    module = make(dropout=0.5)
    cache = module.make_cache(2, 9)
    with pytest.raises(RuntimeError, match="cache and dropout exclude each other"):
        module.train()(tokens(2, 3), cache=cache)
    with torch.enable_grad(), pytest.raises(RuntimeError, match="no backward.*no_grad"):
        module.eval()(tokens(2, 3), cache=cache)
    module(tokens(2, 3), cache=cache)
    assert cache.longest == 3


@pytest.mark.filterwarnings("default")
def test_a_step_compiles_once_for_all_lengths():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    module, x = make(torch.float32, rotary_emb_dim=4), tokens(2, 12, dtype=torch.float32)
    compiled = torch.compile(
        lambda token, cache: module(token, cache=cache), fullgraph=True, backend="aot_eager"
    )
    cache = module.make_cache(2, 12)
    module(x[:, :4], cache=cache)
    steps = [compiled(x[:, n : n + 1], cache) for n in range(4, 12)]
    assert_close(torch.cat(steps, dim=1), module(x)[:, 4:], rtol=1e-5, atol=1e-5)
    # One more where the compiler learns that the count of tokens changes.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    with pytest.raises(Exception, match="max_seqlen|RuntimeError"):
        compiled(x[:, :1], cache)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@every_memory
def test_nothing_waits_for_the_device(page_size):
    module = make(torch.float16, rotary_emb_dim=6, num_heads_kv=2).cuda()
    x, mask = tokens(2, 6, dtype=torch.float16).cuda(), torch.ones(2, 6, dtype=torch.bool, device="cuda")
    mask[0, :2] = False
    cache = module.make_cache(2, 40, page_size)
    for watched in (False, True):
        torch.cuda.set_sync_debug_mode("error" if watched else "default")
        try:
            module(x, key_padding_mask=mask, cache=cache)
            module(x[:, :1], cache=cache)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.seqlens.tolist() == [10, 14]


@pytest.mark.gpu
@every_memory
def test_a_cuda_graph_generates(page_size):
    module = make(torch.float16, rotary_emb_dim=6, num_heads_kv=2).cuda()
    x = tokens(2, 12, dtype=torch.float16).cuda()
    cache = module.make_cache(2, 12, page_size)
    module(x[:, :4], cache=cache)
    token, graph, stream = x[:, 4:5].clone(), torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        module(token, cache=cache)
    torch.cuda.current_stream().wait_stream(stream)
    cache.seqlens.fill_(4)
    with torch.cuda.graph(graph):
        out = module(token, cache=cache)
    steps = []
    for n in range(4, 12):
        token.copy_(x[:, n : n + 1])
        graph.replay()
        steps.append(out.clone())
    assert_close(torch.cat(steps, dim=1), module(x)[:, 4:], rtol=1e-2, atol=1e-2)
    assert cache.seqlens.tolist() == [12, 12]
