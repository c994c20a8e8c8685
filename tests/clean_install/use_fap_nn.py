"""Use fap-nn, installed with its chain and nothing else; `nox -s wheels` runs this."""

import importlib.util

import torch

from fap_nn import FlashMHA

assert importlib.util.find_spec("fap_testing") is None

theirs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
ours = FlashMHA.from_torch(theirs)
x = torch.randn(2, 9, 64, requires_grad=True)
expected, _ = theirs(x, x, x, need_weights=False)
out = ours(x)
torch.testing.assert_close(out, expected)
(gradient,) = torch.autograd.grad(out.sum(), x)
torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), x)[0])
print("fap-nn works with fap-api and fap-kernels")
