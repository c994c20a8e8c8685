"""Exact attention kernels in Triton, forward and backward, as functions from tensors to tensors.

    out, softmax_lse, rng_state = attention_forward(q, k, v, causal=True)
    dq, dk, dv = attention_backward(dout, q, k, v, out, softmax_lse, causal=True)

Importing this package imports neither Triton nor CUDA; the first call does.
"""

from .attention import attention_backward, attention_forward, attention_probabilities
from .kvcache import attention_kvcache_forward, kvcache_append
from .problem import AttentionProblem
from .rotary.apply import apply_rotary
from .schedule import explain_schedule, use_schedule
from .support import unsupported_reasons
from .varlen import attention_varlen_backward, attention_varlen_forward, attention_varlen_probabilities

__all__ = [
    "AttentionProblem",
    "apply_rotary",
    "attention_backward",
    "attention_forward",
    "attention_kvcache_forward",
    "attention_probabilities",
    "attention_varlen_backward",
    "attention_varlen_forward",
    "attention_varlen_probabilities",
    "explain_schedule",
    "kvcache_append",
    "unsupported_reasons",
    "use_schedule",
]
__version__ = "0.1.0"
