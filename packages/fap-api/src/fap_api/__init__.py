"""Exact attention behind the flash-attn functions: autograd, torch.compile and exchangeable back ends."""

from fap_api._explain import Explanation, explain, explain_varlen, explain_with_kvcache
from fap_api.attention import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from fap_api.backends.select import available_backends, use_backend
from fap_api.kvcache import flash_attn_with_kvcache
from fap_api.rotary import apply_rotary_emb
from fap_api.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "Explanation",
    "apply_rotary_emb",
    "available_backends",
    "explain",
    "explain_varlen",
    "explain_with_kvcache",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "use_backend",
]
__version__ = "0.1.0"
