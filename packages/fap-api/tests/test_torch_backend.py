"""What the torch back end promises beyond the contract: bounded memory, and the kernels' dropout mask."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch

import fap_api
from fap_api.backends._dropout import keep_mask
from fap_testing.reference import attention_reference

WORD = 2**32 - 1


def philox_4x32_7(key, counter):
    """Philox on Python's integers: nothing wraps unless it is told to."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(7):
        product_0, product_2 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product_2 >> 32) ^ c1 ^ k0,
            product_2 & WORD,
            (product_0 >> 32) ^ c3 ^ k1,
            product_0 & WORD,
        )
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def kept(seed, offset, dropout_p, head, i, j):
    counter = (j // 64) * 4 + (j % 8) // 2, i, head, offset & WORD
    words = philox_4x32_7((seed & WORD, (seed >> 32) & WORD), counter)
    n = ((j % 64) // 8) * 2 + j % 2
    byte = (words[n // 4] >> (8 * (n % 4))) & 255
    return byte <= math.floor(255 * (1 - dropout_p))


@pytest.mark.smoke
@pytest.mark.parametrize("state", [(0, 0), (2**63 - 1, 2**62 + 12345), (0x0123456789ABCDEF, 0xFFFFFFFF)])
@pytest.mark.parametrize("keys", [(0, 70), (65, 66), (1000, 1129)])
def test_the_keep_mask_is_philox_by_position(state, keys):
    heads, queries, dropout_p = torch.tensor([[0, 3], [70000, 1]]), (5, 9), 0.3
    mask = keep_mask(torch.tensor(state), dropout_p, heads, queries, keys)
    expected = [
        [
            [[kept(*state, dropout_p, head, i, j) for j in range(*keys)] for i in range(*queries)]
            for head in row
        ]
        for row in heads.tolist()
    ]
    assert torch.equal(mask, torch.tensor(expected))


def test_the_mask_does_not_depend_on_the_chunks(monkeypatch):
    from fap_api.backends import _chunks

    def run():
        torch.manual_seed(1)
        q, k, v = (torch.randn(2, 50, 4, 8, requires_grad=True) for _ in range(3))
        out, lse, s_dmask = fap_api.flash_attn_func(q, k, v, 0.4, causal=True, return_attn_probs=True)
        return out, lse, s_dmask, *torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    whole = run()
    monkeypatch.setattr(_chunks, "_ROWS", 28)
    monkeypatch.setattr(_chunks, "_KEYS", 19)
    monkeypatch.setattr(_chunks, "_TILE_CPU", 1000)
    for mine, right in zip(run(), whole, strict=True):
        torch.testing.assert_close(mine, right)
    assert torch.equal(torch.signbit(run()[2]), torch.signbit(whole[2]))


def test_s_dmask_holds_the_probabilities():
    q, k, v = (torch.randn(1, 20, 2, 8) for _ in range(3))
    out, _, s_dmask = fap_api.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
    weights = s_dmask[:, :, :20, :20]
    right = attention_reference(q, k, v, causal=True).probabilities
    torch.testing.assert_close(weights.abs(), right.float())
    kept_weights = torch.where(torch.signbit(weights), 0.0, weights) / 0.7
    torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", kept_weights, v), out)
    outside = s_dmask.clone()
    outside[:, :, :20, :20] = 0.0
    future = torch.ones(20, 20).triu(1).bool()
    assert not torch.signbit(outside).any()
    assert not outside.any()
    assert not torch.signbit(weights[:, :, future]).any()
    assert not weights[:, :, future].any()


def test_saturated_softcap_and_huge_scores_stay_finite():
    q, k, v = (torch.full((1, 4, 1, 8), 1e4, requires_grad=True) for _ in range(3))
    for options in ({"softcap": 1e-3}, {"softcap": 50.0}, {"softmax_scale": 1e3}):
        out = fap_api.flash_attn_func(q, k, v, **options)
        torch.testing.assert_close(out, v)
        assert all(dx.isfinite().all() for dx in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_gradient_of_inf_for_a_row_without_keys_is_harmless():
    q, k, v = (torch.randn(1, n, 1, 8, requires_grad=True) for n in (6, 4, 4))
    out, lse, _ = fap_api.flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    dlse = torch.where(lse.isinf(), torch.nan, 1.0)
    assert all(
        dx.isfinite().all() for dx in torch.autograd.grad((out, lse), (q, k, v), (torch.ones_like(out), dlse))
    )


PROGRAM = """
import resource, sys
import torch
import fap_api

# One thread: on a busy machine, threads that wait for each other take longer than the work.
torch.set_num_threads(1)
fap_api.use_backend("torch")
q, k, v = (torch.randn(1, {seqlen}, {heads}, {head_dim}, requires_grad=True) for _ in range(3))

def run(seqlen):
    part = (x[:, :seqlen] for x in (q, k, v))
    fap_api.flash_attn_func(*part, window_size={window}, softcap=20.0).sum().backward()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

run(64)
before = peak()
run({seqlen})
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="peak memory is read from the resource module")
@pytest.mark.parametrize(
    ("call", "limit"),
    [
        # One head's score matrix alone would take 4 GiB.
        pytest.param({"seqlen": 32768, "heads": 4, "head_dim": 64, "window": (256, 0)}, 1.5e9, id="windowed"),
        # And here 1 GiB.
        pytest.param({"seqlen": 16384, "heads": 1, "head_dim": 8, "window": (-1, -1)}, 0.5e9, id="whole"),
    ],
)
def test_forward_and_backward_never_hold_the_score_matrix(call, limit):
    program = PROGRAM.format(**call)
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert int(run.stdout) < limit
