"""A model of diffusers with the attention back end "flash" computes what it does with "native"."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

# diffusers looks for flash-attn where it is imported first.
PROGRAM = """
import torch

import fap_api.integrations.flash_attn_shim
from fap_api.backends.torch_ import TorchBackend

fap_api.integrations.flash_attn_shim.install()
from diffusers import FluxTransformer2DModel

ran = []
for name in ("forward", "backward"):
    def spy(self, *arguments, _method=getattr(TorchBackend, name), _name=name):
        ran.append(_name)
        return _method(self, *arguments)
    setattr(TorchBackend, name, spy)

torch.manual_seed(0)
sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 4, 8)}
model = FluxTransformer2DModel(**sizes, **heads, pooled_projection_dim=32).to(torch.bfloat16)
image, text, pooled = (torch.randn(1, *shape, dtype=torch.bfloat16) for shape in ((16, 4), (8, 32), (32,)))
places = {"img_ids": torch.randn(16, 3), "txt_ids": torch.zeros(8, 3)}
results = {}
for backend, passes in (("native", []), ("flash", ["forward"] * 2 + ["backward"] * 2)):
    model.set_attention_backend(backend)
    model.zero_grad()
    out = model(image, text, pooled, torch.tensor([0.5]), **places).sample
    out.float().square().sum().backward()
    results[backend] = [out, *(parameter.grad for parameter in model.parameters())]
    assert ran == passes, (backend, ran)
for x, right in zip(results["flash"], results["native"], strict=True):
    torch.testing.assert_close(x, right, rtol=5e-2, atol=2e-2 * right.abs().max().item())
"""


@pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers")
@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is not None, reason="flash-attn is really installed"
)
def test_a_flux_transformer():
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
