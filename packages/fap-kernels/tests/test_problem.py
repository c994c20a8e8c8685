"""AttentionProblem: what it makes of good arguments, and what it says to bad ones."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from fap_kernels.problem import AttentionProblem, normalize_window

CPU = torch.device("cpu")


class Unfloatable:
    """Something that says it is a number and is none, as an array of two is."""

    def __float__(self):
        raise ValueError("only one of two")


def draw(batch=2, seqlen_q=5, seqlen_k=7, nheads=4, nheads_k=2, head_dim=8, **options):
    q = torch.empty(batch, seqlen_q, nheads, head_dim, **options)
    k, v = (torch.empty(batch, seqlen_k, nheads_k, head_dim, **options) for _ in range(2))
    return q, k, v


def test_a_plain_call():
    problem = AttentionProblem.describe(*draw())
    assert dataclasses.asdict(problem) == {
        "batch": 2,
        "seqlen_q": 5,
        "seqlen_k": 7,
        "nheads": 4,
        "nheads_k": 2,
        "head_dim": 8,
        "dtype": torch.float32,
        "device": CPU,
        "softmax_scale": 1 / math.sqrt(8),
        "window_left": -1,
        "window_right": -1,
        "causal": False,
        "softcap": 0.0,
        "alibi": None,
        "dropout_p": 0.0,
        "deterministic": False,
        "needs_grad": False,
        "return_attn_probs": False,
        "packed": False,
        "paged": False,
        "cached": False,
        "page_size": 0,
        "seqused_q": False,
        "seqused_k": False,
    }


def test_every_option():
    problem = AttentionProblem.describe(
        *draw(dtype=torch.bfloat16),
        softmax_scale=2,
        causal=True,
        window_size=[3, 9],
        softcap=5,
        alibi_slopes=torch.ones(2, 4),
        dropout_p=0.25,
        deterministic=True,
        needs_grad=True,
        return_attn_probs=True,
    )
    assert (problem.dtype, problem.softmax_scale, problem.softcap) == (torch.bfloat16, 2.0, 5.0)
    assert (problem.causal, problem.window_left, problem.window_right) == (True, 3, 0)
    assert (problem.alibi, problem.dropout_p) == ("batch_head", 0.25)
    assert problem.deterministic
    assert problem.needs_grad
    assert problem.return_attn_probs


def test_it_is_a_value():
    first, second = (AttentionProblem.describe(*draw(), causal=True) for _ in range(2))
    assert first == second
    assert hash(first) == hash(second)
    with pytest.raises(dataclasses.FrozenInstanceError):
        first.causal = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("window", "causal", "expected"),
    [
        ((-1, -1), False, (-1, -1)),
        ((-7, -2), False, (-1, -1)),
        ((-1, -1), True, (-1, 0)),
        ((4, 9), True, (4, 0)),
        ([4, 9], False, (4, 9)),
        (torch.tensor([4, 9]), False, (4, 9)),
        (torch.tensor([4, 9], dtype=torch.int32), True, (4, 0)),
        (torch.Size([4, 9]), False, (4, 9)),
        ((torch.tensor(4), 9), False, (4, 9)),
        (range(4, 6), False, (4, 5)),
        ((2**31, 2**70), False, (2**31 - 1, 2**31 - 1)),
    ],
)
def test_windows(window, causal, expected):
    bounds = normalize_window(window, causal)
    assert bounds == expected
    assert all(type(bound) is int for bound in bounds)


@pytest.mark.parametrize("name", ["causal", "deterministic", "return_attn_probs"])
@pytest.mark.parametrize("value", [0, 1, False, True])
def test_flags(name, value):
    assert getattr(AttentionProblem.describe(*draw(), **{name: value}), name) is bool(value)


@pytest.mark.parametrize(
    "sizes", [{"batch": 0}, {"seqlen_q": 0}, {"seqlen_k": 0}, {"head_dim": 256}, {"nheads_k": 4}]
)
def test_sizes_at_the_edge_are_accepted(sizes):
    problem = AttentionProblem.describe(*draw(**sizes))
    assert all(getattr(problem, name) == size for name, size in sizes.items())


def test_slopes_for_one_batch_element_are_told_by_their_rank():
    assert AttentionProblem.describe(*draw(), alibi_slopes=torch.ones(4)).alibi == "head"
    assert AttentionProblem.describe(*draw(batch=1), alibi_slopes=torch.ones(1, 4)).alibi == "batch_head"


def check_refused(error, says, tensors=None, **options):
    with pytest.raises(error) as refusal:
        AttentionProblem.describe(*(draw() if tensors is None else tensors), **options)
    for pattern in says:
        assert re.search(pattern, str(refusal.value)), f"{pattern!r} is not in {refusal.value}"


Q, K, V = draw()


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ((Q[0], K, V), [r"^q must have 4 dimensions", r"\(5, 4, 8\)"]),
        ((Q, K[None], V), [r"^k must have 4", r"\(1, 2, 7, 2, 8\)"]),
        ((Q, K[:1], V[:1]), ["^k must have q's batch size 2, got 1"]),
        ((Q, K, V[:1]), ["^v must have q's batch size 2, got 1"]),
        ((Q, K[..., :4], V[..., :4]), ["^k must have q's head dimension 8, got 4"]),
        ((Q, K, V[:, :3]), ["k and v must have the same shape", r"\(2, 7, 2, 8\)", r"\(2, 3, 2, 8\)"]),
        (draw(nheads_k=3), ["Number of heads in key/value must divide", "3 heads in k", "4 heads in q"]),
        (draw(nheads_k=0), ["must divide", "0 heads in k"]),
        (draw(nheads=0, nheads_k=1), ["must divide", "0 heads in q"]),
        (draw(head_dim=0), ["at least 1", "head dimension 0"]),
        (draw(head_dim=257), ["at most 256", "head dimension 257"]),
        (draw(dtype=torch.int64), ["only support fp16 and bf16", "int64"]),
        (draw(dtype=torch.float8_e4m3fn), ["only support fp16 and bf16", "float8_e4m3fn"]),
        ((Q, K.half(), V), ["same dtype", "q of torch.float32 and k of torch.float16"]),
        ((Q, K, V.to("meta")), ["same device", "q on cpu and v on meta"]),
        ((Q.to_sparse(), K, V), ["^q must be a dense tensor", "sparse"]),
    ],
)
def test_tensors_that_do_not_fit(tensors, says):
    check_refused(RuntimeError, says, tensors)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_something_else_than_a_tensor(position):
    tensors = [*draw()]
    tensors[position] = [1.0]
    check_refused(TypeError, [f"^{'qkv'[position]} must be a torch.Tensor, got list"], tensors)


@pytest.mark.parametrize(
    ("error", "options", "says"),
    [
        (ValueError, {"dropout_p": 1.0}, [r"dropout_p must be in \[0, 1\), got 1.0"]),
        (ValueError, {"dropout_p": -0.1}, ["dropout_p", "-0.1"]),
        (ValueError, {"dropout_p": math.nan}, ["dropout_p", "nan"]),
        (TypeError, {"dropout_p": "0.1"}, ["dropout_p must be a number, got str: '0.1'"]),
        (TypeError, {"dropout_p": True}, ["dropout_p must be a number, got bool"]),
        (ValueError, {"softcap": -1}, ["softcap must be finite and at least 0.0", "-1"]),
        (ValueError, {"softcap": math.inf}, ["softcap", "inf"]),
        (ValueError, {"softmax_scale": math.nan}, ["softmax_scale must be finite, got nan"]),
        (ValueError, {"softmax_scale": 1e30}, ["softmax_scale must be 0.0 or of a size from", "1e\\+30"]),
        (ValueError, {"softmax_scale": -1e-30}, ["softmax_scale must be 0.0 or of a size from", "-1e-30"]),
        (ValueError, {"softmax_scale": 10**400}, ["softmax_scale must be finite, got an integer"]),
        (TypeError, {"softmax_scale": Unfloatable()}, ["softmax_scale must be a number, got Unfloatable"]),
        (ValueError, {"softcap": 1e300}, [r"softcap must be 0.0 \(off\) or from", "1e\\+300"]),
        (ValueError, {"softcap": 1e-300}, [r"softcap must be 0.0 \(off\) or from", "1e-300"]),
        (TypeError, {"softmax_scale": torch.ones((), requires_grad=True)}, ["softmax_scale", "no gradient"]),
        (
            ValueError,
            {"window_size": (1,)},
            [r"window_size must be two integers \(left, right\), got 1: \(1,\)"],
        ),
        (ValueError, {"window_size": torch.ones(3, dtype=torch.int64)}, ["window_size", "got 3"]),
        (TypeError, {"window_size": 5}, ["window_size must be two integers", "int: 5"]),
        (TypeError, {"window_size": "ab"}, ["window_size", "str: 'ab'"]),
        (TypeError, {"window_size": (1.0, 2.0)}, ["window_size", r"\(1.0, 2.0\)"]),
        (TypeError, {"window_size": (True, 2)}, ["window_size", r"\(True, 2\)"]),
        (TypeError, {"window_size": {4, 9}}, ["window_size", "set: "]),
        (TypeError, {"window_size": {4: 0, 9: 0}}, ["window_size", "dict: "]),
        (TypeError, {"window_size": (torch.tensor(1.5), 2)}, ["window_size", "1.5"]),
        (TypeError, {"dropout_p": torch.zeros(2)}, [r"dropout_p must be a number, got .*\(2,\) on cpu"]),
        (TypeError, {"softcap": torch.zeros((), device="meta")}, ["softcap must be a number", "meta"]),
        (TypeError, {"causal": (-1, -1)}, [r"causal must be True or False, got tuple: \(-1, -1\)"]),
        (TypeError, {"causal": "False"}, ["causal must be True or False, got str: 'False'"]),
        (TypeError, {"causal": 2}, ["causal must be True or False, got int: 2"]),
        (TypeError, {"deterministic": None}, ["deterministic must be True or False, got NoneType"]),
        (TypeError, {"return_attn_probs": 0.5}, ["return_attn_probs must be True or False, got float"]),
        (RuntimeError, {"alibi_slopes": torch.ones(4).to_sparse()}, ["alibi_slopes must be a dense tensor"]),
        (TypeError, {"window_size": torch.ones(2)}, ["window_size", r"\[1.0, 1.0\]"]),
        (TypeError, {"window_size": torch.ones(2, device="meta")}, ["window_size", "CPU tensor", "meta"]),
        (TypeError, {"alibi_slopes": [0.5] * 4}, ["alibi_slopes must be a torch.Tensor or None, got list"]),
        (
            RuntimeError,
            {"alibi_slopes": torch.ones(4).half()},
            ["alibi_slopes", "float32, got torch.float16"],
        ),
        (RuntimeError, {"alibi_slopes": torch.ones(4, device="meta")}, ["alibi_slopes", "cpu, got meta"]),
        (
            RuntimeError,
            {"alibi_slopes": torch.ones(2)},
            ["alibi_slopes", r"\(nheads,\) = \(4,\)", r"got \(2,\)"],
        ),
        (RuntimeError, {"alibi_slopes": torch.ones(3, 4)}, ["alibi_slopes", r"\(2, 4\)", r"got \(3, 4\)"]),
    ],
)
def test_options_that_are_not_accepted(error, options, says):
    check_refused(error, says, **options)
