"""Use fap-testing alone, on PyTorch's own attention; `nox -s wheels` runs this."""

import importlib.util

import torch

from fap_testing.reference import attention_baseline, attention_reference
from fap_testing.tolerances import assert_close_to_oracle

assert not any(importlib.util.find_spec(name) for name in ("fap_kernels", "fap_api", "fap_nn", "triton"))

q, k, v = (torch.randn(1, 9, 4, 16) for _ in range(3))
heads_first = [x.transpose(1, 2) for x in (q, k, v)]
out = torch.nn.functional.scaled_dot_product_attention(*heads_first, is_causal=True).transpose(1, 2)
oracle, baseline = attention_reference(q, k, v, causal=True), attention_baseline(q, k, v, causal=True)
assert_close_to_oracle(out, oracle.out, baseline.out, name="out")
try:
    assert_close_to_oracle(out * 1.01, oracle.out, baseline.out, name="out")
except AssertionError:
    print("fap-testing works alone")
else:
    raise SystemExit("fap-testing accepted a wrong result")
