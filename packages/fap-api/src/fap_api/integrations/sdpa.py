"""PyTorch's scaled_dot_product_attention on these kernels, through torch.nn.attention's registry.

    import fap_api.integrations.sdpa
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    fap_api.integrations.sdpa.register()
    activate_flash_attention_impl("FAP")   # CUDA and ROCm tensors, until restore_flash_attention_impl()

From then on the calls of ``F.scaled_dot_product_attention``, and so of ``nn.MultiheadAttention``, that
PyTorch would run on its built-in FlashAttention run here, and with them ``torch.nn.attention.varlen`` and
jagged nested tensors. Which calls of the first those are it decides as before;
``torch.nn.attention.sdpa_kernel(SDPBackend.FLASH_ATTENTION)`` makes it raise where it would take another of
its kernels, for float32 or an ``attn_mask`` say.

The functions below implement the operators of the same names; their signatures are PyTorch's.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from fap_api._call import Sequences
from fap_api._passes import backward_pass, forward_pass

__all__ = ["NAME", "register", "unregister"]

NAME = "FAP"


def register() -> None:
    """Make these kernels known to torch.nn.attention as "FAP"; nothing changes until that is activated.

    Raises:
        RuntimeError: this PyTorch has no registry of FlashAttention implementations (2.11 has the first).
    """
    _registry().register_flash_attention_impl(NAME, register_fn=_activate)


def unregister() -> None:
    """Bring the built-in kernels back where "FAP" is active, and make that name unknown again.

    PyTorch has a function for the first, ``restore_flash_attention_impl``, and none for the second, so this
    takes the name out of the private table of its registry.

    Raises:
        RuntimeError: this PyTorch has no registry, or keeps its names elsewhere.
    """
    attention = _registry()
    names = attention.register_flash_attention_impl.__globals__.get("_FLASH_ATTENTION_IMPLS")
    if names is None:
        raise RuntimeError(
            f"torch must have the table _FLASH_ATTENTION_IMPLS that names are taken out of, got torch "
            f"{torch.__version__}; restore_flash_attention_impl() brings its own kernels back all the same"
        )
    if attention.current_flash_attention_impl() == NAME:
        attention.restore_flash_attention_impl()
    names.pop(NAME, None)


def _registry() -> Any:
    """Return torch.nn.attention if it has a registry, or raise."""
    import torch.nn.attention

    if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
        raise RuntimeError(
            "torch must have torch.nn.attention.register_flash_attention_impl, as releases from 2.11 on do, "
            f"got torch {torch.__version__}; without it call fap_api.flash_attn_func"
        )
    return torch.nn.attention


class _Handle:
    """Keeps the operators overridden for as long as it is not removed."""

    def __init__(self, library: torch.library.Library) -> None:
        self._library: torch.library.Library | None = library

    def remove(self) -> None:
        """Bring back what implemented the operators before."""
        self._library = None


def _activate(dispatch_key: str = "CUDA") -> _Handle:
    """Implement PyTorch's operators for one dispatch key; "CUDA" is that of ROCm too."""
    library = torch.library.Library("aten", "IMPL", dispatch_key)
    with warnings.catch_warnings():
        # Overriding is what was asked for.
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        warnings.filterwarnings("ignore", ".*[Oo]verriding a previously registered kernel", UserWarning)
        for implementation in (
            _flash_attention_forward,
            _flash_attention_forward_no_dropout_inplace,
            _flash_attention_backward,
            _scaled_dot_product_flash_attention,
            _scaled_dot_product_flash_attention_backward,
        ):
            # Releases differ in which of these they have.
            if hasattr(torch.ops.aten, implementation.__name__):
                library.impl(implementation.__name__, implementation, dispatch_key)
    return _Handle(library)


def _flash_attention_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    seqused_k: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
    num_splits: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attend from query (b, sq, h, d) to key and value (b, sk, h_k, d), or packed from (total, h, d).

    Causal masks are aligned bottom-right, as those of the built-in operator are. The top-left ones of
    F.scaled_dot_product_attention never arrive: PyTorch sends no causal call with different lengths here.

    Args:
        cum_seq_q, cum_seq_k: None, or where packed sequences begin and end, int32 (b + 1,).
        seqused_k, block_table: for packed sequences, as for :func:`fap_api.flash_attn_varlen_func`.
        num_splits: None or 1: these kernels never split the keys of a call.

    Returns:
        ``output``, laid out as query; ``softmax_logsumexp`` float32 (b, h, sq) or (h, total_q); the two
        tensors that :func:`_as_torch_keeps_it` makes; an empty debug mask.
    """
    _refuse("_flash_attention_forward", {"num_splits": None if num_splits == 1 else num_splits, **others})
    sequences = _sequences(key, cum_seq_q, cum_seq_k, max_q, max_k, seqused_k, block_table)
    if return_debug_mask:
        raise RuntimeError(
            _refusal("_flash_attention_forward", "return_debug_mask", return_debug_mask, False)
        )
    needs_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))
    if alibi_slopes is not None and needs_grad:
        raise RuntimeError(
            "_flash_attention_forward: alibi_slopes must be None where a gradient is needed, since PyTorch's "
            "_flash_attention_backward does not get them; fap_api.flash_attn_func has their gradients"
        )
    out, softmax_lse, rng_state = forward_pass(
        query,
        key,
        value,
        sequences,
        needs_grad=needs_grad,
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        alibi_slopes=alibi_slopes,
    )
    debug_mask = query.new_empty(0)
    return _laid_out_like(query, out), softmax_lse, *_as_torch_keeps_it(rng_state), debug_mask


def _flash_attention_forward_no_dropout_inplace(out: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Do as :func:`_flash_attention_forward`, writing the output into ``out``; return softmax_logsumexp."""
    output, softmax_lse, *_ = _flash_attention_forward(*args, **kwargs)
    out.copy_(output)
    return softmax_lse


def _flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: torch.Tensor,
    unused: torch.Tensor | None,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate :func:`_flash_attention_forward`; gradients are laid out as query, key and value."""
    _refuse("_flash_attention_backward", others)
    gradients = backward_pass(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        _as_we_keep_it(rng_state, unused),
        _sequences(key, cum_seq_q, cum_seq_k, max_q, max_k),
        dropout_p=dropout_p,
        softmax_scale=scale,
        causal=is_causal,
        window_size=_window(window_size_left, window_size_right),
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    dq, dk, dv = (_laid_out_like(x, dx) for x, dx in zip((query, key, value), gradients, strict=True))
    return dq, dk, dv


def _scaled_dot_product_flash_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
    **others: Any,
) -> tuple[Any, ...]:
    """Attend from query (b, h, sq, d) to key and value (b, h_k, sk, d).

    Returns:
        What :func:`_flash_attention_forward` does, the output transposed as the inputs are, with
        ``cum_seq_q``, ``cum_seq_k`` (None), ``max_q`` and ``max_k`` after the logsumexp.
    """
    _refuse("_scaled_dot_product_flash_attention", others)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    max_q, max_k = q.shape[1], k.shape[1]
    out, logsumexp, *rest = _flash_attention_forward(
        q, k, v, None, None, max_q, max_k, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return out.transpose(1, 2), logsumexp, None, None, max_q, max_k, *rest


def _scaled_dot_product_flash_attention_backward(
    grad_out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    logsumexp: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: torch.Tensor,
    philox_offset: torch.Tensor | None,
    *,
    scale: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Differentiate :func:`_scaled_dot_product_flash_attention`."""
    _refuse("_scaled_dot_product_flash_attention_backward", others)
    dout, q, k, v, o = (x.transpose(1, 2) for x in (grad_out, query, key, value, out))
    sequences = cum_seq_q, cum_seq_k, max_q, max_k
    random = philox_seed, philox_offset
    gradients = _flash_attention_backward(
        dout, q, k, v, o, logsumexp, *sequences, dropout_p, is_causal, *random, scale=scale
    )
    dq, dk, dv = (dx.transpose(1, 2) for dx in gradients)
    return dq, dk, dv


def _sequences(
    key: torch.Tensor,
    cum_seq_q: torch.Tensor | None,
    cum_seq_k: torch.Tensor | None,
    max_q: int,
    max_k: int,
    seqused_k: torch.Tensor | None = None,
    block_table: torch.Tensor | None = None,
) -> Sequences | None:
    """Return where packed sequences lie, or None for dense tensors."""
    if cum_seq_q is None:
        _refuse("_flash_attention_forward", {"seqused_k": seqused_k, "block_table": block_table})
        return None
    if cum_seq_k is None:
        if seqused_k is None or block_table is None:
            raise RuntimeError(
                "_flash_attention_forward: cum_seq_k must be given beside cum_seq_q, or seqused_k and "
                "block_table, got None"
            )
        # Where keys lie in pages, it tells no more than what no sequence exceeds.
        cum_seq_k = torch.arange(cum_seq_q.numel(), dtype=torch.int32, device=key.device) * max_k
    return Sequences(cum_seq_q, cum_seq_k, max_q, max_k, None, seqused_k, block_table)


def _window(left: int | None, right: int | None) -> tuple[int, int]:
    return -1 if left is None else left, -1 if right is None else right


def _laid_out_like(x: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
    """Return ``result`` with the strides that compiled code expects of an operator's result: x's."""
    expected = torch.empty_like(x)
    return result if result.stride() == expected.stride() else expected.copy_(result)


def _as_torch_keeps_it(rng_state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 (seed, offset), or nothing without dropout, as the two tensors of PyTorch's operators.

    Those are uint64[2] and an unused scalar; on ROCm the seed and the offset, two int64 scalars.
    """
    state = rng_state if rng_state.numel() else rng_state.new_zeros(2)
    if torch.version.hip is not None:
        seed, offset = state.unbind()
        return seed, offset
    return state.view(torch.uint64), torch.zeros((), dtype=torch.uint64, device=state.device)


def _as_we_keep_it(first: torch.Tensor, second: torch.Tensor | None) -> torch.Tensor:
    """Return what :func:`_as_torch_keeps_it` was given."""
    if first.dim() == 0 and second is not None:
        return torch.stack((first, second))
    return first.view(torch.int64)


def _refuse(operator: str, others: dict[str, Any]) -> None:
    """Raise for what a later PyTorch may pass and this module does not know. Defaults are never passed."""
    for name, value in others.items():
        if value is not None:
            raise RuntimeError(_refusal(operator, name, value, None))


def _refusal(operator: str, name: str, value: object, accepted: object) -> str:
    given = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
    return f"{operator}: {name} must be {accepted} on FAP's kernels, got {given}"
