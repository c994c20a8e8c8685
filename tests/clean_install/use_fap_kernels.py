"""Use fap-kernels where nothing else of this repository is installed; `nox -s wheels` runs this."""

import importlib.util
import os

# Triton's interpreter stands in for the GPU, and has to be asked for before kernels are first used.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from fap_kernels import attention_backward, attention_forward

assert not any(importlib.util.find_spec(name) for name in ("fap_api", "fap_nn", "fap_testing"))

q, k, v = (torch.randn(1, 9, heads, 16) for heads in (4, 2, 2))
out, softmax_lse, _ = attention_forward(q, k, v, causal=True)
dq, dk, dv = attention_backward(torch.ones_like(out), q, k, v, out, softmax_lse, causal=True)

leaves = [x.transpose(1, 2).detach().requires_grad_() for x in (q, k, v)]
expected = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True, enable_gqa=True)
gradients = torch.autograd.grad(expected, leaves, torch.ones_like(expected))
for ours, theirs in zip((out, dq, dk, dv), (expected, *gradients), strict=True):
    torch.testing.assert_close(ours, theirs.transpose(1, 2), atol=1e-4, rtol=1e-4)
print("fap-kernels works alone")
