"""The bench's peers: found by name, absent with a reason, and called as their documentation says."""

from __future__ import annotations

import importlib
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from fap_testing.bench import peers as registry
from fap_testing.bench.decode import Decode
from fap_testing.bench.judge import judge_of
from fap_testing.bench.peers import PEERS, Peer, register, select_peers
from fap_testing.bench.peers.base import AutogradCalls, KernelCalls
from fap_testing.bench.peers.fap_kernels import FapDense, FapHopper, FapKernels, FapTriton, tile_sizes
from fap_testing.bench.peers.flash_attn_2 import FlashAttention2
from fap_testing.bench.peers.flash_attn_3 import FlashAttention3
from fap_testing.bench.peers.flash_attn_4 import FlashAttention4
from fap_testing.bench.peers.flex import FlexAttention
from fap_testing.bench.peers.sdpa import Sdpa
from fap_testing.bench.peers.xformers import Xformers
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.trial import try_peer
from fap_testing.bench.varlen import Varlen
from fap_testing.reference import attention_baseline
from fap_testing.reference_varlen import attention_varlen_baseline

SIZES = {"nheads": 2, "nheads_k": 2, "head_dim": 16, "dtype": "fp32"}
PREFILL = Prefill(batch=2, seqlen_q=24, seqlen_k=24, **SIZES)
CAUSAL = Prefill(batch=2, seqlen_q=24, seqlen_k=24, causal=True, **SIZES)
WINDOW = Prefill(batch=2, seqlen_q=24, seqlen_k=24, window_size=(5, 3), **SIZES)
LEFT_WINDOW = Prefill(batch=2, seqlen_q=24, seqlen_k=24, causal=True, window_size=(5, -1), **SIZES)
VARLEN = Varlen(lengths=(7, 24, 11), **SIZES)
VARLEN_CAUSAL = Varlen(lengths=(7, 24, 11), causal=True, **SIZES)
VARLEN_WINDOW = Varlen(lengths=(7, 24, 11), window_size=(5, 3), **SIZES)
DECODE = Decode(lengths=(24, 13), causal=True, **SIZES)
PAGED_DECODE = Decode(lengths=(24, 13), page_size=16, causal=True, **SIZES)
FULL_DECODE = Decode(lengths=(24, 24), causal=True, **SIZES)
BOTH_WAYS = ("fwd", "bwd", "both")


def test_the_peers_that_users_choose_from_are_there():
    expected = {"fap", "fap-kernels", "fap-nn", "sdpa", "sdpa-flash", "sdpa-cudnn", "flex", "flash-attn-2"}
    ours = {"fap-triton", "fap-hopper", "fap-dense", "fap-hopper-dense"}
    others = {"flash-attn-3", "flash-attn-4", "flag-gems", "xformers"}
    assert expected | ours | others == PEERS.keys()


def test_a_new_peer_is_one_class(monkeypatch):
    monkeypatch.setattr(registry, "PEERS", dict(PEERS))

    @register
    class Another(Peer):
        name = "another"

    (chosen,) = select_peers(["another"], ["auto"], command="prefill")
    assert isinstance(chosen, Another)
    with pytest.raises(ValueError, match="another"):
        register(Another)


def test_peers_are_selected_by_name_and_backend():
    chosen = select_peers(["sdpa", "fap", "sdpa"], ["auto", "torch"], command="prefill")
    assert [peer.name for peer in chosen] == ["sdpa", "fap:auto", "fap:torch"]
    by_itself = {peer.name for peer in select_peers([], ["auto"], command="prefill")}
    assert "fap:auto" in by_itself
    assert "fap-nn:auto" not in by_itself, "a module adds host time alone"
    assert "fap-nn:auto" in {peer.name for peer in select_peers([], ["auto"], command="overhead")}
    with pytest.raises(ValueError, match="got fa5"):
        select_peers(["fa5"], ["auto"], command="prefill")


def test_absent_peers_say_why(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    assert "cuda" in FlashAttention2().absent("cpu", "prefill")
    assert "pip install flash-attn" in FlashAttention2().absent("cuda", "prefill")
    assert "not for decode" in FlexAttention().absent("cuda", "decode")
    assert Sdpa().absent("cpu", "decode") is None


def test_a_stand_in_for_flash_attn_is_not_measured_as_the_original(monkeypatch):
    stand_in = ModuleType("flash_attn.flash_attn_interface")
    stand_in.__fap_shim__ = True
    monkeypatch.setitem(sys.modules, "flash_attn", ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in)
    assert "stand-in" in FlashAttention2().absent("cuda", "prefill")


def test_a_back_end_or_function_that_fap_api_lacks_is_named(monkeypatch):
    api = ModuleType("fap_api")
    api.flash_attn_func = None
    api.available_backends = lambda: ("torch",)
    monkeypatch.setitem(sys.modules, "fap_api", api)
    fap, elsewhere = select_peers(["fap"], ["auto", "hopper"], command="prefill")
    assert fap.absent("cpu", "prefill") is None
    assert "flash_attn_varlen_func" in fap.absent("cpu", "varlen")
    assert "hopper" in elsewhere.absent("cpu", "prefill")


@pytest.mark.parametrize(
    ("peer", "problem", "reason"),
    [
        (Sdpa(), WINDOW, "windows"),
        (Sdpa(), Prefill(batch=1, seqlen_q=5, seqlen_k=9, causal=True, **SIZES), "top-left"),
        (Sdpa(), VARLEN, "one length"),
        (Sdpa(), DECODE, "one length"),
        (Sdpa(), Decode(lengths=(16,), page_size=16, **SIZES), "pages"),
        (FlashAttention2(), PREFILL, "bf16"),
        (FlashAttention2(), Decode(lengths=(16,), page_size=16, **SIZES), "256"),
    ],
)
def test_what_a_peer_cannot_express_is_said(peer, problem, reason):
    assert reason in "; ".join(peer.unsupported_reasons(problem, "fwd"))


def test_calls_below_autograd_refuse_what_they_lack():
    calls = KernelCalls(lambda: (torch.zeros(1),))
    for refused in (calls.backward, calls.both, calls.recorded):
        with pytest.raises(NotImplementedError, match="accepted"):
            refused()


def test_the_backward_pass_is_timed_alone():
    ran = []
    tensors = PREFILL.draw()

    def function(q, k, v):
        ran.append(torch.is_grad_enabled())
        return q + k + v

    calls = AutogradCalls(function, tensors)
    for _ in range(3):
        calls.backward()
    assert ran == [True]
    calls.forward()
    assert ran == [True, False]


@pytest.mark.parametrize(
    "problem", [PREFILL, CAUSAL, WINDOW, LEFT_WINDOW, VARLEN_CAUSAL, DECODE, PAGED_DECODE], ids=str
)
def test_fap_is_right_here(problem):
    pytest.importorskip("fap_api")
    (fap,) = select_peers(["fap"], ["torch"], command="prefill")
    judged(fap, problem, ("fwd",) if isinstance(problem, Decode) else (*BOTH_WAYS, "fwd+grad"))
    assert fap.configuration(problem, problem.draw(), "fwd") == "torch"
    assert fap.version() is None or fap.version()


def test_the_module_is_right_here():
    pytest.importorskip("fap_nn")
    (module,) = select_peers(["fap-nn"], ["torch"], command="overhead")
    assert module.absent("cpu", "prefill") is None
    judged(module, CAUSAL, BOTH_WAYS)


@pytest.mark.parametrize(
    ("kind", "problem", "directions"),
    [
        (FapTriton, CAUSAL, BOTH_WAYS),
        (FapKernels, VARLEN_CAUSAL, BOTH_WAYS),
        (FapDense, Varlen(lengths=(9, 9), causal=True, **SIZES), BOTH_WAYS),
        (FapTriton, PAGED_DECODE, ("fwd",)),
    ],
    ids=str,
)
@pytest.mark.interpreter
def test_kernels_are_called_as_documented(kind, problem, directions):
    pytest.importorskip("fap_kernels")
    pytest.importorskip("triton")
    peer = kind()
    judged(peer, problem, directions)


@pytest.mark.parametrize("direction", BOTH_WAYS)
@pytest.mark.parametrize("problem", [CAUSAL, VARLEN_CAUSAL, PAGED_DECODE], ids=str)
def test_the_tile_sizes_of_a_call_on_a_gpu_are_told(monkeypatch, problem, direction):
    pytest.importorskip("triton")
    target = pytest.importorskip("fap_kernels.target")
    monkeypatch.setattr(target, "target_of", lambda device: target.SM_90)
    monkeypatch.setattr(target, "processors_of", lambda device: 132)
    on_gpu = replace(problem, device="cuda", dtype="bf16")
    told = tile_sizes(on_gpu, replace(problem, dtype="bf16").draw(), direction)
    if problem is PAGED_DECODE:
        assert re.fullmatch(r"decode \d+x\d+ warps \d+ stages \d+ splits \d+", told)
    else:
        assert ("forward" in told) == (direction != "bwd")
        assert ("dkdv" in told and "dq" in told) == (direction != "fwd")
    assert tile_sizes(problem, problem.draw(), direction) is None


@pytest.fixture
def schedules(monkeypatch):
    """fap_kernels as it is where it has more than one family."""
    kernels = pytest.importorskip("fap_kernels")
    pytest.importorskip("triton")
    held = []

    @contextmanager
    def use_schedule(name):
        held.append(name)
        yield
        held.append(None)

    def forward_reasons_against(problem, target, asked_for):
        return ["too short"] if problem.seqlen_q < 20 else []

    def backward_reasons_against(problem, target, asked_for):
        return ["not measured"] if problem.packed and not asked_for else []

    row = SimpleNamespace(config="tiles of 128")
    monkeypatch.setattr(kernels, "use_schedule", use_schedule, raising=False)
    monkeypatch.setattr("fap_kernels.target.target_of", lambda device: None)
    monkeypatch.setattr("fap_kernels.target.processors_of", lambda device: 132)
    conditions = {
        "forward_reasons_against": forward_reasons_against,
        "backward_reasons_against": backward_reasons_against,
    }
    config = {"BACKWARD": None, "choose": lambda table, problem: row}
    launch = {"forward_config": lambda problem, processors: f"tiles of {processors - 4}"}
    install_fake(monkeypatch, "fap_kernels.hopper", {})
    install_fake(monkeypatch, "fap_kernels.hopper.conditions", conditions)
    install_fake(monkeypatch, "fap_kernels.hopper.config", config)
    install_fake(monkeypatch, "fap_kernels.hopper.launch", launch)
    return held


def test_each_family_of_kernels_is_measured_by_itself(schedules):
    hopper, portable = FapHopper(), FapTriton()
    assert hopper.absent("cuda", "prefill") is None or "sm_90" in hopper.absent("cuda", "prefill")
    for peer in (hopper, portable):
        with peer.scope():
            assert schedules[-1] == peer.family
    assert schedules[-1] is None
    for problem in (PREFILL, CAUSAL, VARLEN, VARLEN_WINDOW):
        bf16 = replace(problem, dtype="bf16", device="cuda")
        assert hopper.unsupported_reasons(bf16, "fwd") == []
        assert hopper.unsupported_reasons(bf16, "bwd") == [], "held to it, what is not measured runs"
        assert portable.unsupported_reasons(bf16, "bwd") == []
    short = Prefill(batch=1, seqlen_q=16, seqlen_k=16, **{**SIZES, "dtype": "bf16"})
    for direction in ("fwd", "bwd"):  # behind a forward pass, which it does not compute
        assert hopper.unsupported_reasons(short, direction) == ["too short"]


def test_the_family_that_a_call_takes_is_recorded(schedules, monkeypatch):
    target = pytest.importorskip("fap_kernels.target")
    monkeypatch.setattr(target, "target_of", lambda device: target.SM_90)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    on_gpu, tensors = replace(CAUSAL, device="cuda"), CAUSAL.draw()
    assert FapHopper().configuration(on_gpu, tensors, "fwd") == "forward tiles of 128"
    told = FapKernels().configuration(on_gpu, tensors, "both")
    assert told == "forward tiles of 128, backward tiles of 128"
    assert "dkdv" in FapTriton().configuration(on_gpu, tensors, "both")
    packed, lengths = replace(VARLEN, device="cuda"), VARLEN.draw()
    assert FapHopper().configuration(packed, lengths, "bwd") == "backward tiles of 128"
    assert "dkdv" in FapKernels().configuration(packed, lengths, "bwd")
    assert "warps" in FapTriton().configuration(on_gpu, tensors, "fwd")


def test_hopper_kernels_are_a_peer_of_their_own():
    pytest.importorskip("fap_kernels")
    why = FapHopper().absent("cuda", "prefill")
    assert why is None or "hopper" in why
    assert "not for decode" in FapHopper().absent("cuda", "decode")
    assert FapTriton().absent("cuda", "decode") is None


@pytest.mark.parametrize(
    "problem",
    [PREFILL, CAUSAL, Varlen(lengths=(9, 9), causal=True, **SIZES), FULL_DECODE],
    ids=str,
)
def test_sdpa_is_right(problem):
    judged(Sdpa(), problem, ("fwd",) if isinstance(problem, Decode) else BOTH_WAYS)


@pytest.mark.parametrize("problem", [PREFILL, CAUSAL, WINDOW, VARLEN, VARLEN_CAUSAL, VARLEN_WINDOW], ids=str)
def test_flex_masks_are_right(monkeypatch, problem):
    from torch.nn.attention import flex_attention

    # A CPU's has no backward. The forward pass, not compiled, shows whether the masks are right.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True, raising=False)
    judged(FlexAttention(), problem, ("fwd",))


def test_flex_keeps_the_graph_that_its_backward_is_timed_on(monkeypatch):
    """Compiled for a GPU, it refuses a second backward pass where this is on."""
    settings = importlib.import_module("torch._functorch.config")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with settings.patch(donated_buffer=True):
        FlexAttention().prefill(PREFILL, PREFILL.draw())
        assert not settings.donated_buffer


@pytest.mark.parametrize("problem", [CAUSAL, WINDOW, VARLEN_CAUSAL, VARLEN_WINDOW, DECODE], ids=str)
@pytest.mark.parametrize("peer", [FlashAttention2(), FlashAttention3()], ids=lambda peer: peer.name)
def test_flash_attn_2_and_3_are_called_as_documented(monkeypatch, peer, problem):
    install_fake(
        monkeypatch, peer.module, flash_attention(paged="page" if peer.name.endswith("3") else "block")
    )
    judged(peer, problem, ("fwd",) if isinstance(problem, Decode) else BOTH_WAYS)


@pytest.mark.parametrize("problem", [CAUSAL, WINDOW, LEFT_WINDOW, VARLEN_CAUSAL, VARLEN_WINDOW], ids=str)
def test_flash_attn_4_is_called_as_documented(monkeypatch, problem):
    def bounds(window_size):
        assert all(bound is None or bound >= 0 for bound in window_size)
        return [-1 if bound is None else bound for bound in window_size]

    def dense(q, k, v, *, causal=False, window_size=(None, None)):
        result = attention_baseline(q, k, v, causal=causal, window_size=bounds(window_size))
        return result.out, result.softmax_lse

    def packed(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False, window_size):
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        options = {"causal": causal, "window_size": bounds(window_size)}
        result = attention_varlen_baseline(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        return result.out, result.softmax_lse

    functions = {"flash_attn_func": dense, "flash_attn_varlen_func": packed}
    install_fake(monkeypatch, FlashAttention4.module, functions)
    judged(FlashAttention4(), problem, BOTH_WAYS)


def test_flash_attn_4_keeps_what_is_compiled_beforehand(monkeypatch):
    setting = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
    install_fake(monkeypatch, FlashAttention4.module, {})
    monkeypatch.setenv(setting, "0")
    assert FlashAttention4().absent("cuda", "prefill") is None
    assert os.environ[setting] == "0"
    monkeypatch.delenv(setting)
    assert FlashAttention4().absent("cuda", "prefill") is None
    assert os.environ[setting] == "1"


@pytest.mark.parametrize("problem", [PREFILL, CAUSAL, VARLEN, VARLEN_CAUSAL], ids=str)
def test_xformers_is_called_as_documented(monkeypatch, problem):
    class BlockDiagonalMask:
        def __init__(self, lengths, causal=False):
            self.lengths, self.causal = lengths, causal

        @classmethod
        def from_seqlens(cls, lengths, device):
            assert isinstance(lengths, list)
            return cls(lengths)

        def make_causal(self):
            return BlockDiagonalMask(self.lengths, causal=True)

    class LowerTriangularFromBottomRightMask:
        causal = True

    def attention(q, k, v, attn_bias=None):
        causal = attn_bias is not None and attn_bias.causal
        if not isinstance(attn_bias, BlockDiagonalMask):
            return attention_baseline(q, k, v, causal=causal).out
        starts = torch.tensor([0, *attn_bias.lengths]).cumsum(0)
        return attention_varlen_baseline(q[0], k[0], v[0], starts, starts, causal=causal).out[None]

    masks = {"BlockDiagonalMask": BlockDiagonalMask}
    masks["LowerTriangularFromBottomRightMask"] = LowerTriangularFromBottomRightMask
    install_fake(monkeypatch, "xformers.ops.fmha.attn_bias", masks)
    install_fake(monkeypatch, "xformers.ops", {"memory_efficient_attention": attention})
    judged(Xformers(), problem, BOTH_WAYS)


def judged(peer, problem, directions):
    """Assert that a peer's results are right, in every direction."""
    tensors = problem.draw()
    judge = judge_of(problem, tensors, 1 << 20)
    trial = try_peer(Unlimited(peer), problem, tensors, judge, directions)
    assert {d: (o.status, o.note) for d, o in trial.outcomes.items()} == dict.fromkeys(directions, ("ok", ""))


class Unlimited(Peer):
    """A peer that may run in float32, where a mistake shows best."""

    def __init__(self, peer):
        self.name, self.inner = peer.name, peer

    def unsupported_reasons(self, problem, direction):
        return [
            reason
            for reason in self.inner.unsupported_reasons(problem, direction)
            if "it takes bf16" not in reason
        ]

    def scope(self):
        return self.inner.scope()

    def prepare(self, problem, tensors):
        return self.inner.prepare(problem, tensors)


def install_fake(monkeypatch, module, functions):
    """Put a module with these attributes where ``import`` finds it, and what it lies in."""
    fake = ModuleType(module)
    vars(fake).update(functions)
    monkeypatch.setitem(sys.modules, module, fake)


def flash_attention(*, paged):
    """Return what flash-attn offers, by the oracle's formula, under its own signatures."""

    def dense(q, k, v, *, causal=False, window_size=(-1, -1)):
        return attention_baseline(q, k, v, causal=causal, window_size=window_size).out

    def packed(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, window_size=(-1, -1)
    ):
        assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
        options = {"causal": causal, "window_size": window_size}
        return attention_varlen_baseline(q, k, v, cu_seqlens_q, cu_seqlens_k, **options).out

    def cached(q, k_cache, v_cache, *, cache_seqlens, causal=False, window_size=(-1, -1), **table):
        assert table == {f"{paged}_table": None}
        options = {"causal": causal, "window_size": window_size}
        rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
        return torch.cat(
            [attention_baseline(x[None], k[None, :n], v[None, :n], **options).out for x, k, v, n in rows]
        )

    return {"flash_attn_func": dense, "flash_attn_varlen_func": packed, "flash_attn_with_kvcache": cached}
