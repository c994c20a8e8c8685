"""The back ends that call other packages, against stand-ins that record what they receive.

The stand-ins compute with the torch back end, in the way that the real packages do as far as it deviates:
so results show whether a deviation was corrected, and records show the exact call.
"""

from __future__ import annotations

import itertools
import sys
import types

import pytest
import torch

import fap_api
from fap_api.backends import registry
from fap_api.backends.base import Score
from fap_api.backends.cuda import CudaBackend
from fap_api.backends.flag_gems import FlagGemsBackend
from fap_api.backends.torch_ import TorchBackend

TORCH = TorchBackend()


def draw(seqlen_q=128, seqlen_k=128, head_dim=40, heads=(4, 2), dtype=torch.float16):
    q = torch.randn(2, seqlen_q, heads[0], head_dim, dtype=dtype)
    k, v = (torch.randn(2, seqlen_k, heads[1], head_dim, dtype=dtype) for _ in range(2))
    return q, k, v


@pytest.fixture
def on_cpu(monkeypatch):
    """Let the back ends take CPU tensors, which is all that a stand-in needs; every other reason stays."""
    for backend in (FlagGemsBackend, CudaBackend):
        real = backend.unsupported_reasons

        def unsupported_reasons(self, problem, real=real):
            return [reason for reason in real(self, problem) if "got tensors on cpu" not in reason]

        monkeypatch.setattr(backend, "unsupported_reasons", unsupported_reasons)


@pytest.fixture
def flag_gems(monkeypatch, on_cpu):
    """Stand in for flag_gems.ops.attention; returns the list of calls."""
    calls = []

    def flash_attention_forward(q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug, **options):
        calls.append(((q, k, v, cum_q, cum_k, max_q, max_k, dropout_p, is_causal, debug), options))
        window = options["window_size_left"], options["window_size_right"]
        out, lse, _ = TORCH.forward(q, k, v, Score(options["scale"], *window, options["softcap"], None, 0.0))
        return out, lse, torch.empty(0), torch.empty(0), torch.empty(0)

    modules = {
        name: types.ModuleType(name) for name in ("flag_gems", "flag_gems.ops", "flag_gems.ops.attention")
    }
    modules["flag_gems.ops.attention"].flash_attention_forward = flash_attention_forward
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return calls


@pytest.fixture
def flash_attn(monkeypatch, on_cpu):
    """Stand in for flash_attn.flash_attn_interface; returns the list of calls."""
    calls = []

    def _score(p, scale, causal, left, right, softcap, slopes, seqlen_k):
        """Take the window as the package does, which is not always as it documents it."""
        assert causal == ((left, right) == (-1, 0))
        left, right = (-1 if bound >= seqlen_k else bound for bound in (left, right))
        if left >= 0 > right:
            right = seqlen_k
        return Score(scale, left, right, softcap, slopes, p)

    def _offset(q, k, score):
        """What the package's LSE is too much: under causal ALiBi it adds slope * j alone."""
        if score.alibi_slopes is None or (score.window_left, score.window_right) != (-1, 0):
            return 0.0
        diagonal = torch.arange(q.shape[1]) + k.shape[1] - q.shape[1]
        return score.alibi_slopes.expand(q.shape[0], q.shape[2])[:, :, None] * diagonal

    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap,
        alibi_slopes, return_softmax,
    ):  # fmt: skip
        calls.append(("forward", locals()))
        window = window_size_left, window_size_right
        score = _score(dropout_p, softmax_scale, causal, *window, softcap, alibi_slopes, k.shape[1])
        out, lse, rng_state = TORCH.forward(q, k, v, score)
        rng_state = torch.empty(2, dtype=torch.int64) if rng_state is None else rng_state
        return out, lse + _offset(q, k, score), torch.empty(0), rng_state

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left,
        window_size_right, softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        calls.append(("backward", locals()))
        assert k.shape[1] > 0, "a grid without programs"
        window = window_size_left, window_size_right
        score = _score(dropout_p, softmax_scale, causal, *window, softcap, alibi_slopes, k.shape[1])
        lse = softmax_lse - _offset(q, k, score)
        results = TORCH.backward(dout, q, k, v, out, lse, None, rng_state, score, deterministic)
        for target, result in zip((dq, dk, dv), results, strict=True):
            target.copy_(result)
        return torch.empty(0)

    package, interface = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_forward, interface._flash_attn_backward = _flash_attn_forward, _flash_attn_backward
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", interface)
    return calls


def compare(backend, tensors, **options):
    """Run a call on a back end and on torch; return both results."""
    results = []
    for name in (backend, "torch"):
        with fap_api.use_backend(name):
            results.append(fap_api.flash_attn_func(*tensors, **options))
    return results


def reasons(backend, tensors, **options):
    return "; ".join(registry.BACKENDS[backend].unsupported_reasons(problem_of(tensors, options)))


def problem_of(tensors, options):
    from fap_kernels import AttentionProblem

    needs_grad = any(x.requires_grad for x in tensors)
    return AttentionProblem.describe(*tensors, needs_grad=needs_grad, **options)


class TestFlagGems:
    def test_the_exact_call(self, flag_gems):
        q, k, v = draw()
        compare("flag_gems", (q, k, v), causal=True, softcap=3.0, softmax_scale=0.2)
        ((arguments, options),) = flag_gems
        assert arguments[3:] == (None, None, 128, 128, 0.0, True, False)
        assert options == {
            "scale": 0.2,
            "softcap": 3.0,
            "window_size_left": -1,
            "window_size_right": 0,
            "alibi_slopes": None,
            "disable_splitkv": True,
        }
        for given, x in zip(arguments[:3], (q, k, v), strict=True):
            assert given.is_contiguous()
            assert given.shape == (*x.shape[:3], 64)
            assert torch.equal(given[..., :40], x)
            assert not given[..., 40:].any()

    @pytest.mark.parametrize(
        "window",
        [(-1, -1), (-1, 0), (7, 0), (7, 3), (7, -1), (-1, 3), (200, 200), (200, 3), (7, 200), (127, 127)],
    )
    @pytest.mark.parametrize("lengths", [(128, 128), (128, 200)])
    def test_every_window(self, flag_gems, window, lengths):
        (out, lse, _), (right, right_lse, _) = compare(
            "flag_gems", draw(*lengths, head_dim=64), window_size=window, return_attn_probs=True
        )
        torch.testing.assert_close(out, right)
        torch.testing.assert_close(lse, right_lse)
        (_, options) = flag_gems[0]
        given = options["window_size_left"], options["window_size_right"]
        # A window with one bound, or a bound of seqlen_k or more, is not what FlagGems takes it for.
        assert given in ((-1, -1), (-1, 0)) or all(0 <= bound < lengths[1] for bound in given)

    def test_strides(self, flag_gems):
        q, k, v = (torch.randn(2, 4, 128, 3, dtype=torch.float16).permute(0, 2, 1, 3) for _ in range(3))
        out, right = compare("flag_gems", (q, k, v))
        torch.testing.assert_close(out, right)
        assert out.is_contiguous()

    @pytest.mark.parametrize(
        ("change", "options", "says"),
        [
            ({"dtype": torch.float32}, {}, "float16 and bfloat16 only, got torch.float32"),
            ({}, {"dropout_p": 0.5}, "dropout"),
            ({}, {"alibi_slopes": torch.rand(4)}, "alibi_slopes"),
            ({}, {"softmax_scale": 0.0}, "softmax_scale of 0.0"),
            ({"seqlen_k": 0}, {}, "no empty calls"),
            ({"seqlen_q": 100}, {"causal": True}, "multiple of 128, got 100"),
            ({"seqlen_q": 256}, {"window_size": (5, 5)}, "seqlen_q <= seqlen_k"),
        ],
    )
    def test_what_it_lacks_is_said_beforehand(self, flag_gems, change, options, says):
        tensors = draw(**change)
        assert says in reasons("flag_gems", tensors, **options)
        with fap_api.use_backend("flag_gems"), pytest.raises(RuntimeError, match=says):
            fap_api.flash_attn_func(*tensors, **options)
        assert not flag_gems

    def test_it_has_no_backward(self, flag_gems):
        q, k, v = draw()
        q.requires_grad_()
        with fap_api.use_backend("flag_gems"):
            with pytest.raises(RuntimeError, match="no backward"):
                fap_api.flash_attn_func(q, k, v)
            with torch.no_grad():
                fap_api.flash_attn_func(q, k, v)

    def test_it_is_the_second_choice(self, flag_gems):
        assert fap_api.explain(*draw()).backend == "flag_gems"
        assert fap_api.explain(*draw(dtype=torch.float32)).backend == "torch"

    def test_a_failing_import_is_a_reason(self, monkeypatch, on_cpu):
        class Broken(types.ModuleType):
            def __getattr__(self, name):
                raise AttributeError(name)

        def import_module(name):
            raise RuntimeError("no supported device")

        monkeypatch.setitem(sys.modules, "flag_gems", Broken("flag_gems"))
        monkeypatch.setattr("fap_api.backends.flag_gems.importlib.import_module", import_module)
        assert "flag_gems" not in fap_api.available_backends()
        explanation = fap_api.explain(*draw())
        assert explanation.backend == "torch"
        assert "importing it failed: RuntimeError: no supported device" in explanation.reasons["flag_gems"][0]

    def test_absent(self, monkeypatch):
        monkeypatch.setattr("fap_api.backends.flag_gems.importable", lambda name: False)
        with (
            fap_api.use_backend("flag_gems"),
            pytest.raises(ImportError, match=r"flag_gems .*pip install 'fap-api\[flaggems\]'"),
        ):
            fap_api.flash_attn_func(*draw())


class TestCuda:
    def test_the_exact_calls(self, flash_attn):
        q, k, v = (x.requires_grad_() for x in draw(head_dim=36))
        with fap_api.use_backend("cuda"):
            out = fap_api.flash_attn_func(
                q, k, v, softmax_scale=0.2, causal=True, softcap=2.0, deterministic=True
            )
        out.sum().backward()
        (forward, given), (backward, given_back) = flash_attn
        assert (forward, backward) == ("forward", "backward")
        expected = {
            "dropout_p": 0.0,
            "softmax_scale": 0.2,
            "causal": True,
            "window_size_left": -1,
            "window_size_right": 0,
            "softcap": 2.0,
            "alibi_slopes": None,
        }
        assert expected.items() <= given.items()
        assert expected.items() <= given_back.items()
        assert given["return_softmax"] is False
        assert given_back["deterministic"] is True
        assert given_back["rng_state"] is None
        for name in ("q", "k", "v", "dout", "out", "dq", "dk", "dv"):
            x = given_back[name]
            assert x.shape[-1] == 40
            assert x.stride(-1) == 1
        assert all(given_back[name].is_contiguous() for name in ("dq", "dk", "dv"))

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"causal": True},
            {"causal": True, "alibi_slopes": torch.tensor([0.5, 0.1, 0.3, 0.2])},
            {"alibi_slopes": torch.rand(2, 4)},
            {"window_size": (5, 2)},
            {"window_size": (5, 0), "alibi_slopes": torch.rand(4)},
            {"softcap": 3.0},
        ],
        ids=["plain", "causal", "causal_alibi", "alibi", "window", "window_alibi", "softcap"],
    )
    @pytest.mark.parametrize("lengths", [(9, 9), (9, 14), (14, 9), (1, 14), (9, 0)])
    def test_results_and_gradients(self, flash_attn, options, lengths):
        tensors = draw(*lengths)
        got, expected = [], []
        for name, results in (("cuda", got), ("torch", expected)):
            q, k, v = (x.detach().requires_grad_() for x in tensors)
            with fap_api.use_backend(name):
                out = fap_api.flash_attn_func(q, k, v, **options)
                with torch.no_grad():
                    results.append(fap_api.flash_attn_func(q, k, v, **options, return_attn_probs=True)[1])
            results += [out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))]
        for mine, right in zip(got, expected, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-3, atol=1e-3)

    def test_dropout_keeps_its_state_for_the_backward(self, flash_attn):
        q, k, v = (x.requires_grad_() for x in draw())
        with fap_api.use_backend("cuda"):
            fap_api.flash_attn_func(q, k, v, 0.5).sum().backward()
        state = flash_attn[1][1]["rng_state"]
        assert (state.dtype, state.shape) == (torch.int64, (2,))

    @pytest.mark.parametrize(
        ("change", "options", "says"),
        [
            ({"dtype": torch.float32}, {}, "float16 and bfloat16 only, got torch.float32"),
            ({"seqlen_q": 0}, {}, "no empty calls"),
            ({"seqlen_q": 12, "seqlen_k": 5}, {"window_size": (3, -1)}, "takes window_size"),
            ({"seqlen_q": 12, "seqlen_k": 5}, {"window_size": (-1, 6)}, "takes window_size"),
            ({}, {"softcap": 1.0, "dropout_p": 0.5}, "softcap with dropout"),
            ({}, {"dropout_p": 0.5, "return_attn_probs": True}, "S_dmask"),
        ],
    )
    def test_what_it_lacks_is_said_beforehand(self, flash_attn, change, options, says):
        tensors = draw(**change)
        with fap_api.use_backend("cuda"), pytest.raises(RuntimeError, match=says):
            fap_api.flash_attn_func(*tensors, **options)
        assert not flash_attn

    @pytest.mark.parametrize("window", [(3, -1), (-1, 6), (-1, 11), (-1, 4)])
    def test_windows_that_it_takes_as_documented_are_left_to_it(self, on_cpu, window):
        assert not reasons("cuda", draw(12, 12), window_size=window)
        assert not reasons("cuda", draw(6, 5), window_size=window)

    @pytest.mark.parametrize("lengths", [(9, 9), (10, 9), (9, 14), (14, 9), (30, 9)])
    def test_no_window_is_silently_another(self, flash_attn, lengths):
        tensors = draw(*lengths, head_dim=8)
        for window in itertools.product((-1, 0, 3, 8, 9, 12, 40), repeat=2):
            if reasons("cuda", tensors, window_size=window):
                continue
            out, right = compare("cuda", tensors, window_size=window)
            torch.testing.assert_close(out, right, msg=lambda text, window=window: f"{window}: {text}")

    def test_a_gradient_of_the_lse_is_refused_beforehand(self, flash_attn):
        q, k, v = draw()
        q.requires_grad_()
        with (
            fap_api.use_backend("cuda"),
            pytest.raises(RuntimeError, match="gradient of softmax_lse is zero"),
        ):
            fap_api.flash_attn_func(q, k, v, return_attn_probs=True)

    def test_the_variable_chooses_it(self, flash_attn, monkeypatch):
        monkeypatch.setenv("FLASH_ATTENTION_USE_FLAGGEMS", "FALSE")
        fap_api.flash_attn_func(*draw())
        assert [name for name, _ in flash_attn] == ["forward"]

    def test_absent(self, monkeypatch):
        monkeypatch.setattr("fap_api.backends.cuda.importable", lambda name: False)
        with (
            fap_api.use_backend("cuda"),
            pytest.raises(ImportError, match=r"flash_attn .*pip install 'fap-api\[cuda\]'"),
        ):
            fap_api.flash_attn_func(*draw())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (100, -1)},
        {"window_size": (-1, 30)},
        {"softcap": 5.0, "causal": True},
    ],
)
@pytest.mark.parametrize("head_dim", [16, 40, 64, 96, 128, 256])
def test_the_real_flag_gems(options, head_dim):
    pytest.importorskip("flag_gems")
    tensors = tuple(x.cuda() for x in draw(256, 384, head_dim))
    (out, lse, _), (right, right_lse, _) = compare("flag_gems", tensors, **options, return_attn_probs=True)
    torch.testing.assert_close(out, right, rtol=2e-3, atol=2e-3)
    torch.testing.assert_close(lse, right_lse, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"causal": True, "alibi_slopes": [0.5, 0.1, 0.3, 0.2]}]
)
def test_the_real_flash_attn(options):
    pytest.importorskip("flash_attn")
    if "alibi_slopes" in options:
        options = {**options, "alibi_slopes": torch.tensor(options["alibi_slopes"], device="cuda")}
    q, k, v = (x.cuda().requires_grad_() for x in draw(200, 300))
    gradients = []
    for name in ("cuda", "torch"):
        with fap_api.use_backend(name):
            out = fap_api.flash_attn_func(q, k, v, **options)
        gradients.append((out, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))))
    for mine, right in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-2, atol=1e-2)
