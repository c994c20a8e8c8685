from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

import fap_api.rotary
import fap_nn
from fap_nn import RotaryEmbedding
from fap_nn.rotary import rotate


def rotate_as_complex(x, dim, base, interleaved, offset=0):
    """Rotate as multiplication by exp(i * angle), the definition of RoPE."""
    position = torch.arange(offset, offset + x.shape[1], dtype=torch.float64)
    angle = position[:, None] / base ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    pairs = x[..., :dim].double()
    if interleaved:
        real, imaginary = pairs[..., 0::2], pairs[..., 1::2]
    else:
        real, imaginary = pairs[..., : dim // 2], pairs[..., dim // 2 :]
    turned = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)[:, None, :]
    out = x.double().clone()
    if interleaved:
        out[..., 0:dim:2], out[..., 1:dim:2] = turned.real, turned.imag
    else:
        out[..., :dim] = torch.cat((turned.real, turned.imag), -1)
    return out


def test_the_names_are_those_of_fap_api():
    assert fap_nn.RotaryEmbedding is fap_api.rotary.RotaryEmbedding
    assert fap_nn.apply_rotary_emb is fap_api.rotary.apply_rotary_emb


@pytest.mark.smoke
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [8, 6, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_complex_multiplication(dtype, dim, interleaved):
    q, k = torch.randn(2, 5, 4, 8, dtype=dtype), torch.randn(2, 5, 2, 8, dtype=dtype)
    rotated = rotate(RotaryEmbedding(dim, base=100.0, interleaved=interleaved), q, k, 3, max_seqlen=8)
    for x, y in zip((q, k), rotated, strict=True):
        assert y.dtype == dtype
        expected = rotate_as_complex(x, dim, 100.0, interleaved, offset=3)
        assert_close(y, expected.to(dtype), atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("scale_base", [None, 512.0])
def test_scores_depend_on_distance_alone(interleaved, scale_base):
    rotary = RotaryEmbedding(16, interleaved=interleaved, scale_base=scale_base)
    q, k = torch.randn(1, 6, 2, 16, dtype=torch.float64), torch.randn(1, 6, 2, 16, dtype=torch.float64)
    scores = [
        torch.einsum("bihd,bjhd->bhij", *rotate(rotary, q, k, offset, max_seqlen=1006))
        for offset in (0, 1000)
    ]
    assert_close(scores[0], scores[1], atol=1e-4, rtol=0.0)


def test_q_and_k_of_different_lengths_start_together():
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 7, 2, 8)
    short, long = rotate(rotary, q, k)
    assert_close(short, rotate(rotary, q, q)[0])
    assert_close(long, rotate(rotary, k, k)[0])


def test_angles_stay_exact_in_low_precision():
    """A bfloat16 position counter cannot tell 256 from 257."""
    rotary = RotaryEmbedding(4).to(torch.bfloat16)
    x = torch.ones(1, 300, 1, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        rotated, _ = rotate(rotary, x, x)
    expected = rotate_as_complex(x, 4, 10000.0, interleaved=False)
    assert_close(rotated.double(), expected, atol=1e-2, rtol=0.0)
