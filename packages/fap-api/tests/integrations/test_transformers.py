"""Models of transformers compute with attn_implementation="fap" what they compute with "eager"."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

import fap_api.integrations.transformers as integration  # noqa: E402
from fap_api.integrations._transformers_masks import padding_mask  # noqa: E402

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "cls_token_id": 1,
    "sep_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2, "head_dim": 8}


def causal(name, **settings):
    config = getattr(transformers, f"{name}Config")(**GROUPED, **settings)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def encoder(name, **settings):
    config = getattr(transformers, f"{name}Config")(**SIZES, **settings)
    return getattr(transformers, f"{name}ForMaskedLM")(config)


DECODERS = {
    "llama": partial(causal, "Llama"),
    "qwen3": partial(causal, "Qwen3"),
    "mistral": partial(causal, "Mistral", sliding_window=4),
    "gemma2": partial(causal, "Gemma2", sliding_window=4, attn_logit_softcapping=2.0),
}
ENCODERS = {
    "bert": partial(encoder, "Bert"),
    "modernbert": partial(encoder, "ModernBert", local_attention=6),
}
each_decoder = pytest.mark.parametrize("name", DECODERS)
each_model = pytest.mark.parametrize("name", [*DECODERS, *ENCODERS])


@pytest.fixture(autouse=True)
def _registered():
    integration.register()
    yield
    integration.unregister()


@pytest.fixture
def without_masks(monkeypatch):
    """Have a function in our place that calls ours without the mask, as DeepSpeed Ulysses does."""

    def wrapper(module, query, key, value, attention_mask, **options):
        return integration.attention(module, query, key, value, None, **options)

    functions = transformers.modeling_utils.ALL_ATTENTION_FUNCTIONS
    monkeypatch.setitem(functions._local_mapping, "fap", wrapper)


@pytest.fixture
def calls(monkeypatch):
    """The attention functions that were called, by name."""
    called = []
    for function in ("flash_attn_func", "flash_attn_varlen_func"):
        real = getattr(integration, function)

        def spy(*arguments, _real=real, _name=function, **options):
            called.append(_name)
            return _real(*arguments, **options)

        monkeypatch.setattr(integration, function, spy)
    return called


def make(name):
    """Return two models with the same random weights, one eager and one on fap, as for evaluation."""
    torch.manual_seed(0)
    eager = (DECODERS | ENCODERS)[name]().eval()
    # Initial weights are so small that attention is nearly uniform, whatever the mask.
    with torch.no_grad():
        for parameter in eager.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8.0)
    eager.set_attn_implementation("eager")
    fap = copy.deepcopy(eager)
    fap.set_attn_implementation("fap")
    return eager, fap


def draw_ids(batch=3, seqlen=10):
    return torch.randint(3, 64, (batch, seqlen), generator=torch.Generator().manual_seed(1))


def padded(side, lengths=(10, 6, 1)):
    """Return token ids and their mask, with sequences of these lengths padded on one side."""
    ids = draw_ids(len(lengths), max(lengths))
    column = torch.arange(max(lengths))
    right = column < torch.tensor(lengths)[:, None]
    mask = right if side == "right" else right.flip(1)
    return ids.masked_fill(~mask, 0), mask.long()


def assert_same_training(eager, fap, real=None, **inputs):
    """Compare logits, at real tokens, and the gradients of all parameters."""
    logits = {}
    for model in (eager, fap):
        model.zero_grad()
        out = model(**inputs).logits
        logits[model] = out if real is None else out[real.bool()]
        logits[model].float().log_softmax(-1)[..., ::7].square().mean().backward()
    torch.testing.assert_close(logits[fap], logits[eager], rtol=1e-4, atol=1e-4)
    for (name, parameter), (_, right) in zip(fap.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(
            parameter.grad, right.grad, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@each_model
def test_whole_rows(name, calls):
    eager, fap = make(name)
    assert_same_training(eager, fap, input_ids=draw_ids())
    assert calls == ["flash_attn_func"] * 2


@each_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows(name, side, calls):
    eager, fap = make(name)
    ids, mask = padded(side)
    assert_same_training(eager, fap, real=mask, input_ids=ids, attention_mask=mask)
    assert calls == ["flash_attn_varlen_func"] * 2


@each_model
def test_a_mask_without_padding_costs_no_unpadding(name, calls):
    eager, fap = make(name)
    ids = draw_ids()
    assert_same_training(eager, fap, input_ids=ids, attention_mask=torch.ones_like(ids))
    assert calls == ["flash_attn_func"] * 2


@each_decoder
@pytest.mark.parametrize("batch", [1, 2])
def test_packed_by_position_ids(name, batch, calls):
    eager, fap = make(name)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 1, 2]])
    other = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    position_ids = torch.cat((position_ids, other))[:batch]
    inputs = {"input_ids": draw_ids(batch), "position_ids": position_ids, "use_cache": False}
    assert_same_training(eager, fap, **inputs)
    assert calls == ["flash_attn_varlen_func"] * 2


@each_decoder
def test_packed_by_cumulative_lengths(name, calls):
    eager, fap = make(name)
    ids = draw_ids(1)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 1, 2]])
    cu_seqlens = torch.tensor([0, 6, 7, 10], dtype=torch.int32)
    packed = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": 6,
        "max_length_k": 6,
    }
    expected = eager(ids, position_ids=position_ids, use_cache=False).logits
    got = fap(ids, position_ids=position_ids, use_cache=False, **packed).logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert calls == ["flash_attn_varlen_func"] * 2


@pytest.mark.parametrize("batch", [1, 2])
def test_packed_by_position_ids_where_the_mask_is_lost(without_masks, batch, calls):
    eager, fap = make("mistral")
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 1, 2]]).expand(batch, -1)
    inputs = {"input_ids": draw_ids(batch), "use_cache": False}
    assert_same_training(eager, fap, position_ids=position_ids, **inputs)
    assert calls == ["flash_attn_varlen_func"] * 2
    calls.clear()
    assert_same_training(eager, fap, position_ids=torch.arange(10)[None], **inputs)
    assert calls == ["flash_attn_func"] * 2
    q = torch.randn(1, 4, 10, 8)
    with pytest.raises(ValueError, match=r"position_ids must be .*\(1, 10\).*got shape \(3, 1, 10\)"):
        integration.attention(torch.nn.Module(), q, q, q, None, position_ids=torch.zeros(3, 1, 10))


@each_decoder
@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_generation(name, side, cache, calls):
    eager, fap = make(name)
    ids, mask = padded(side) if side else (draw_ids(), None)
    options = {"attention_mask": torch.ones_like(ids) if mask is None else mask, "max_new_tokens": 8}
    options |= {"do_sample": False, "output_scores": True, "return_dict_in_generate": True}
    options |= {"eos_token_id": None, "cache_implementation": cache, "disable_compile": True}
    expected, got = (model.generate(ids, **options) for model in (eager, fap))
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(got.scores, expected.scores, rtol=1e-3, atol=1e-3)
    if cache == "dynamic":
        # Padding that has left the window is no padding any more.
        assert ("flash_attn_varlen_func" in calls) == (side is not None)


@each_decoder
def test_a_static_cache_without_a_mask_ends_where_it_is_filled(name):
    eager, fap = make(name)
    ids = draw_ids(2)
    logits = []
    for model in (eager, fap):
        cache = transformers.StaticCache(config=model.config, max_cache_len=20)
        model(ids[:, :7], past_key_values=cache)
        logits.append(model(ids[:, 7:], past_key_values=cache).logits)
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)


def test_cross_attention_to_padded_keys():
    torch.manual_seed(0)
    widths = ("encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads")
    config = transformers.BartConfig(
        d_model=32, encoder_ffn_dim=32, decoder_ffn_dim=32, **dict.fromkeys(widths, 2), **SIZES
    )
    eager = transformers.BartModel(config).eval()
    fap = copy.deepcopy(eager)
    eager.set_attn_implementation("eager")
    fap.set_attn_implementation("fap")
    ids, mask = padded("right")
    for length in (4, 10):
        inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": draw_ids(3, length)}
        expected, got = (model(**inputs).last_hidden_state for model in (eager, fap))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_bidirectional_attention_of_a_decoder():
    eager, fap = make("llama")
    ids = draw_ids()
    expected, got = (model(ids, is_causal=False).logits for model in (eager, fap))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(got, fap(ids).logits, rtol=1e-2, atol=1e-2)


def test_half_precision():
    eager, fap = make("llama")
    ids, mask = padded("left")
    right = eager(ids, attention_mask=mask).logits[mask.bool()]
    errors = []
    for model in (eager.bfloat16(), fap.bfloat16()):
        out = model(ids, attention_mask=mask).logits[mask.bool()]
        assert out.dtype == torch.bfloat16
        errors.append((out - right).abs().max())
    assert errors[1] <= 2 * errors[0]


def test_dropout_in_training_only():
    eager, fap = make("llama")
    for model in (eager, fap):
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
    ids = draw_ids()
    torch.testing.assert_close(fap(ids).logits, eager(ids).logits, rtol=1e-4, atol=1e-4)
    fap.train()
    first, second = fap(ids).logits, fap(ids).logits
    assert not torch.allclose(first, second, rtol=1e-2, atol=1e-2)


def test_gradient_checkpointing_repeats_the_same_attention():
    _, fap = make("mistral")
    ids, mask = padded("left")
    gradients = []
    for checkpointing in (False, True):
        fap.train()
        if checkpointing:
            fap.activation_checkpointing_enable()
        fap.zero_grad()
        fap(ids, attention_mask=mask, labels=ids, use_cache=False).loss.backward()
        gradients.append(fap.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.filterwarnings("default")
class TestCompile:
    @pytest.fixture(autouse=True)
    def _reset(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", ["llama", "mistral"])
    def test_whole_graph(self, name):
        _, fap = make(name)
        compiled = torch.compile(fap, fullgraph=True, backend="aot_eager")
        ids = draw_ids()
        torch.testing.assert_close(
            compiled(ids, use_cache=False).logits, fap(ids, use_cache=False).logits, rtol=1e-4, atol=1e-4
        )

    def test_packed_positions_are_an_error_where_the_mask_is_lost(self, without_masks):
        _, fap = make("llama")
        compiled = torch.compile(fap, fullgraph=True, backend="aot_eager")
        inputs = {"input_ids": draw_ids(1), "position_ids": torch.arange(10)[None], "use_cache": False}
        torch.testing.assert_close(compiled(**inputs).logits, fap(**inputs).logits, rtol=1e-4, atol=1e-4)
        inputs["position_ids"] = torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 1, 2]])
        with pytest.raises(RuntimeError, match="position_ids must not restart"):
            compiled(**inputs)

    def test_packed_positions_are_an_error_and_cumulative_lengths_are_not(self):
        _, fap = make("llama")
        compiled = torch.compile(fap, fullgraph=True, backend="aot_eager")
        ids = draw_ids(1)
        inputs = {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 5, 0, 0, 1, 2]]), "use_cache": False}
        with pytest.raises(RuntimeError, match="position_ids must not restart"):
            compiled(ids, **inputs)
        cu_seqlens = torch.tensor([0, 6, 7, 10], dtype=torch.int32)
        inputs |= {"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens}
        inputs |= {"max_length_q": 6, "max_length_k": 6}
        torch.testing.assert_close(compiled(ids, **inputs).logits, fap(ids, **inputs).logits)


@pytest.mark.parametrize(
    ("keyword", "value", "reason"),
    [
        ("s_aux", torch.zeros(4), r"s_aux must not be set .*, got a tensor \(4,\): attention sinks"),
        ("output_attentions", True, "attention weights are never computed as a whole"),
        ("position_bias", torch.zeros(1), "it does not know this keyword"),
    ],
)
def test_what_is_not_supported_is_refused(keyword, value, reason):
    q = torch.randn(1, 4, 5, 8)
    with pytest.raises(ValueError, match=reason):
        integration.attention(torch.nn.Module(), q, q, q, None, **{keyword: value})


def test_a_model_with_sinks_is_refused():
    config = transformers.GptOssConfig(
        **(GROUPED | {"num_local_experts": 2, "num_experts_per_tok": 1, "attn_implementation": "fap"})
    )
    with pytest.raises(ValueError, match="s_aux must not be set with attn_implementation='fap'"):
        transformers.GptOssForCausalLM(config)(draw_ids())


def test_masks_that_cannot_be_expressed_are_refused():
    _, fap = make("llama")
    ids = draw_ids()
    with pytest.raises(
        ValueError, match=r"attention_mask must be \(batch, seqlen\).*got shape \(3, 1, 10, 10\)"
    ):
        fap(ids, attention_mask=torch.ones(3, 1, 10, 10, dtype=torch.bool))
    create = transformers.masking_utils.create_causal_mask
    embeds = torch.randn(3, 10, 32)
    with pytest.raises(ValueError, match="cannot apply this model's mask, made by or_masks"):
        create(fap.config, embeds, None, None, or_mask_function=lambda b, h, q, k: q == k)
    with pytest.raises(ValueError, match="made by or_masks"):
        create(fap.config, embeds, None, None, block_sequence_ids=torch.zeros(3, 10, dtype=torch.long))


def test_half_of_the_packed_keywords_is_refused():
    _, fap = make("llama")
    cu_seqlens = torch.tensor([0, 6, 10], dtype=torch.int32)
    with pytest.raises(ValueError, match="must be given together, got only cu_seq_lens_q"):
        fap(draw_ids(1), cu_seq_lens_q=cu_seqlens)


def test_unregistering_makes_the_name_unknown():
    _, fap = make("llama")
    integration.unregister()
    with pytest.raises(KeyError, match="fap"):
        fap(draw_ids())
    with pytest.raises(ValueError, match="fap"):
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED, attn_implementation="fap"))
    integration.unregister()


def test_padding_mask_keeps_the_keys_of_a_window():
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1]], dtype=torch.bool)
    assert padding_mask(2, 1, 4, attention_mask=mask) is None
    assert torch.equal(padding_mask(2, 1, 5, attention_mask=mask), mask[:, 1:])


def test_transformers_4_is_refused(monkeypatch):
    with monkeypatch.context() as patch:
        # By name, since transformers puts another module in its own place.
        patch.setattr("transformers.__version__", "4.57.1")
        with pytest.raises(ImportError, match="needs transformers 5 or newer .* got 4.57.1"):
            integration.register()
