"""Mistakes that the conformance suite does not know of: packed shapes, gradients that do not exist."""

from __future__ import annotations

import pytest
import torch

import fap_api
from fap_api import _ops


@pytest.fixture
def qkv():
    return tuple(torch.randn(2, 5, 2, 8) for _ in range(3))


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 5, 2, 8), r"kv must have shape .*2, nheads.*got \(2, 5, 2, 8\)"),
        ((2, 5, 3, 2, 8), r"got \(2, 5, 3,"),
    ],
)
def test_kv_of_another_shape(shape, says):
    with pytest.raises(RuntimeError, match=says):
        fap_api.flash_attn_kvpacked_func(torch.randn(2, 5, 2, 8), torch.randn(shape))


def test_qkv_of_another_shape():
    with pytest.raises(RuntimeError, match=r"qkv must have shape .*3, nheads.*got \(2, 5, 2, 2, 8\)"):
        fap_api.flash_attn_qkvpacked_func(torch.randn(2, 5, 2, 2, 8))


def test_packed_arguments_that_are_no_tensors():
    with pytest.raises(TypeError, match="qkv must be a torch.Tensor, got list"):
        fap_api.flash_attn_qkvpacked_func([1.0])


def test_slopes_that_want_a_gradient(qkv):
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="alibi_slopes must not require a gradient"):
        fap_api.flash_attn_func(*qkv, alibi_slopes=slopes)
    with torch.no_grad():
        fap_api.flash_attn_func(*qkv, alibi_slopes=slopes)


def test_a_second_derivative(qkv):
    q, k, v = (x.requires_grad_() for x in qkv)
    (dq,) = torch.autograd.grad(fap_api.flash_attn_func(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated twice"):
        dq.sum().backward()


@pytest.mark.parametrize("spoil", [{"dropout_p": 1.5}, {"window_size": (1, 2, 3)}, {"softcap": -1.0}])
def test_no_mistake_is_remembered_as_right(qkv, spoil, monkeypatch):
    """Plans are kept by their arguments: a good call before or after must not let a bad one through."""
    monkeypatch.setattr(_ops, "attention_forward", None)
    for _ in range(2):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=next(iter(spoil))):
            fap_api.flash_attn_func(*qkv, **spoil)


@pytest.mark.parametrize("name", ["dropout_p", "softmax_scale", "softcap"])
def test_a_bool_is_no_number_even_after_its_equal(qkv, name):
    fap_api.flash_attn_func(*qkv, **{name: 0})
    with pytest.raises(TypeError, match=f"{name} must be a number, got bool"):
        fap_api.flash_attn_func(*qkv, **{name: False})


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ({"window_size": (4, 0)}, {"window_size": (4.0, 0.0)}),
        ({"window_size": (1, 0)}, {"window_size": (True, False)}),
        ({"causal": True}, {"causal": (-1, -1)}),
        ({"causal": True}, {"causal": "False"}),
        ({"deterministic": True}, {"deterministic": 1.0}),
        ({"return_attn_probs": True}, {"return_attn_probs": None}),
    ],
)
def test_another_type_is_refused_even_after_its_equal(qkv, right, wrong):
    fap_api.flash_attn_func(*qkv, **right)
    with pytest.raises(TypeError, match=f"^{next(iter(wrong))} must be"):
        fap_api.flash_attn_func(*qkv, **wrong)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage:UserWarning")
def test_another_layout_is_refused_even_after_its_equal(qkv):
    slopes = torch.rand(2)
    fap_api.flash_attn_func(*qkv, alibi_slopes=slopes)
    q, k, v = qkv
    for spoiled, says in (
        ((q.to_sparse(), k, v), "^q must be a dense tensor"),
        ((q, k, v.to_mkldnn()), "^v must be a dense tensor"),
        ((torch.nested.nested_tensor([*q]), k, v), "^q must be a dense tensor"),
    ):
        with pytest.raises(RuntimeError, match=says):
            fap_api.flash_attn_func(*spoiled, alibi_slopes=slopes)
    with pytest.raises(RuntimeError, match="^alibi_slopes must be a dense tensor"):
        fap_api.flash_attn_func(q, k, v, alibi_slopes=slopes.to_sparse())


def test_a_window_wider_than_any_integer_type_is_no_bound(qkv):
    wide = fap_api.flash_attn_func(*qkv, window_size=(2**70, 2**63))
    assert torch.equal(wide, fap_api.flash_attn_func(*qkv))


def test_a_changed_window_tensor_is_read_again(qkv):
    window = torch.tensor([0, 0])
    narrow = fap_api.flash_attn_func(*qkv, window_size=window)
    torch.testing.assert_close(narrow, qkv[2])
    window.fill_(-1)
    assert torch.equal(fap_api.flash_attn_func(*qkv, window_size=window), fap_api.flash_attn_func(*qkv))


def test_unknown_keywords_are_refused(qkv):
    with pytest.raises(TypeError, match="sinks"):
        fap_api.flash_attn_func(*qkv, sinks=None)


# PyTorch's forward mode compiles some of itself with its own deprecated compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_forward_mode_tangents_are_refused_rather_than_lost(qkv, name):
    position = "qkv".index(name)

    def attention(x):
        tensors = [*qkv]
        tensors[position] = x
        return fap_api.flash_attn_func(*tensors)

    x = qkv[position]
    with pytest.raises(RuntimeError, match=f"^{name} must not carry a forward-mode tangent"):
        torch.func.jvp(attention, (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        attention(x)
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(RuntimeError, match=f"^{name} must not carry"):
            attention(dual)


@pytest.mark.parametrize(
    "wrong", [{"causal": "yes"}, {"dropout_p": 1.5}, {"window_size": (1,)}, {"softcap": -1.0}]
)
def test_what_flash_attn_asserts_is_an_assertion_error_too(wrong):
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(AssertionError, match=f"^{next(iter(wrong))} must be") as caught:
        fap_api.flash_attn_func(q, q, q, **wrong)
    assert isinstance(caught.value, (TypeError, ValueError))
