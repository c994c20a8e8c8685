"""Attention of transformers models: ``attn_implementation="fap"``.

    import fap_api.integrations.transformers

    fap_api.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="fap")

Two functions are registered under that name, one that attends and one that hands padding masks on to it as
they are: without the second, transformers would forget padding without a word.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from fap_api.attention import flash_attn_func
from fap_api.integrations import _unpadding
from fap_api.integrations._transformers_masks import padding_mask
from fap_api.varlen import flash_attn_varlen_func

if TYPE_CHECKING:
    from fap_api.integrations._unpadding import Unpadding

__all__ = ["NAME", "register", "unregister"]

# transformers takes every name with "flash" in it for a package of its own list.
NAME = "fap"

# What models hand on to the attention function although it is not about attention.
_NOT_ABOUT_ATTENTION = ("encoder_hidden_states", "num_items_in_batch", "output_hidden_states", "use_cache")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def register() -> None:
    """Make ``attn_implementation="fap"`` known to transformers, for models made before or after.

    Raises:
        ImportError: transformers is missing, or older than 5.
    """
    attention_functions, mask_functions = _registries()
    attention_functions.register(NAME, attention)
    mask_functions.register(NAME, padding_mask)


def unregister() -> None:
    """Make "fap" unknown to transformers again; models that were made with it raise from then on."""
    for functions in _registries():
        functions._global_mapping.pop(NAME, None)


def _registries() -> tuple[Any, Any]:
    try:
        from transformers import AttentionInterface, AttentionMaskInterface, __version__
    except ImportError as error:
        raise ImportError(
            "attn_implementation='fap' needs transformers 5 or newer (pip install 'transformers>=5'), "
            f"but {error}"
        ) from error
    # Late releases of transformers 4 have both registries, and call what is registered with other arguments.
    if int(__version__.partition(".")[0]) < 5:
        raise ImportError(
            "attn_implementation='fap' needs transformers 5 or newer (pip install 'transformers>=5'), "
            f"got {__version__}"
        )
    return AttentionInterface, AttentionMaskInterface


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    deterministic: bool | None = None,
    position_ids: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attend as transformers' attention functions do; the arguments are theirs.

    Args:
        module: the layer; where ``is_causal`` is None, ``module.is_causal`` holds, or True.
        query: ``(batch, nheads, seqlen_q, headdim)``.
        key, value: ``(batch, nheads_k, seqlen_k, headdim)``; value may have a smaller headdim.
        attention_mask: what :func:`padding_mask` returned: None, bool ``(batch, seqlen)`` that is False at
            padding, or integers, 0 at padding and otherwise equal within a sequence.
        sliding_window: a query sees the last so many keys, itself included; without a causal mask as many
            to either side.
        deterministic: None follows ``torch.use_deterministic_algorithms``.
        position_ids: int ``(batch, seqlen)`` or ``(1, seqlen)``, looked at only where other software has put
            itself in this function's place, since the mask may have been lost on the way.
        others: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q`` and ``max_length_k`` of a packed batch,
            all or none of them. Any other keyword that is set is refused.

    Returns:
        ``(batch, seqlen_q, nheads, headdim of value)``, 0 at the padding of causal attention; and None.

    Raises:
        ValueError: a keyword or a mask that these kernels cannot honour.
    """
    packed = {name: others.pop(name, None) for name in _PACKED}
    _refuse(others)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    head_dim = v.shape[-1]
    if head_dim != q.shape[-1]:
        v = pad(v, (0, q.shape[-1] - head_dim))
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    window = (-1, -1)
    if sliding_window is not None and k.shape[1] > sliding_window:
        window = (sliding_window - 1, sliding_window - 1)
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    options: dict[str, Any] = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": causal,
        "window_size": window,
        "softcap": softcap or 0.0,
        "deterministic": deterministic,
    }
    if attention_mask is None and position_ids is not None and _is_called_by_another():
        attention_mask = _numbers_of(position_ids, q, k)
    unpadding = _unpadding_of(q, k, attention_mask, packed, whole_queries=not causal and window == (-1, -1))
    out: Any = (
        flash_attn_func(q, k, v, **options)
        if unpadding is None
        else _attend_packed(q, k, v, unpadding, options)
    )
    return out[..., :head_dim], None


def _is_called_by_another() -> bool:
    """Return whether "fap" stands for another function than ours by now.

    DeepSpeed's UlyssesSPAttentionHF calls ours with the whole sequences that it has gathered and without the
    mask, which was made for a part of them: only position_ids tell packed sequences then.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS.get(NAME) is not attention


def _numbers_of(position_ids: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor | None:
    """Return the mask that numbers packed sequences, or None if no row has more than one."""
    if q.shape[1] != k.shape[1]:
        return None
    if position_ids.dim() != 2 or position_ids.shape[1] != q.shape[1]:
        raise ValueError(
            f"position_ids must be (batch, seqlen) = ({q.shape[0]}, {q.shape[1]}) where another function has "
            f"taken the place of attn_implementation='fap', got shape {tuple(position_ids.shape)}"
        )
    numbers = _unpadding.number_sequences(position_ids).expand(q.shape[0], -1)
    if not torch.compiler.is_compiling() and (numbers == 1).all():
        return None
    return numbers


def _attend_packed(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    unpadding: tuple[Unpadding, Unpadding],
    options: dict[str, Any],
) -> torch.Tensor:
    """Take the tokens of each sequence out of the padded tensors, attend, and put them back."""
    queries, keys = unpadding
    # A static cache is longer than what has been written into it.
    k, v = (x[:, : keys.seqlen] if keys.seqlen else x for x in (k, v))
    out: Any = flash_attn_varlen_func(
        queries.take(q),
        keys.take(k),
        keys.take(v),
        queries.cu_seqlens,
        keys.cu_seqlens,
        queries.max_seqlen,
        keys.max_seqlen,
        **options,
    )
    return queries.put_back(out, q.shape[0], q.shape[1])


def _unpadding_of(
    q: torch.Tensor,
    k: torch.Tensor,
    mask: torch.Tensor | None,
    packed: dict[str, Any],
    whole_queries: bool,
) -> tuple[Unpadding, Unpadding] | None:
    """Return where the sequences lie in q and in k, or None if each row is one whole sequence.

    Args:
        whole_queries: a query at padding may be computed like any other, since no position counts.
    """
    given = [name for name in _PACKED if packed[name] is not None]
    if given:
        if len(given) < len(_PACKED):
            raise ValueError(f"{', '.join(_PACKED)} must be given together, got only {', '.join(given)}")
        if mask is not None and mask.dtype == torch.bool:
            raise ValueError("attention_mask must be None beside cu_seq_lens_q, got a mask with padding")
        return (
            _unpadding.whole(packed["cu_seq_lens_q"], packed["max_length_q"]),
            _unpadding.whole(packed["cu_seq_lens_k"], packed["max_length_k"]),
        )
    if mask is None:
        return None
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask must be (batch, seqlen), 0 at padding, got shape {tuple(mask.shape)}; other "
            "masks need attn_implementation='sdpa', 'eager' or 'flex_attention'"
        )
    if mask.dtype != torch.bool and q.shape[1] == k.shape[1]:
        if torch.compiler.is_compiling():
            _assert_whole_rows(mask)
            return None
        sequences = _unpadding.of_numbered_sequences(mask)
        return sequences, sequences
    keys = _unpadding.of_padded_rows(mask)
    if whole_queries:
        return _unpadding.of_whole_rows(q), keys
    if q.shape[1] == mask.shape[1]:
        return keys, keys
    return _unpadding.of_padded_rows(mask[:, mask.shape[1] - q.shape[1] :]), keys


def _assert_whole_rows(mask: torch.Tensor) -> None:
    """Have compiled code raise for rows of several sequences: only its tensors know where they begin."""
    torch._assert_async(
        (mask == 1).all(),
        "position_ids must not restart within a row under torch.compile with attn_implementation='fap', nor "
        "may masks be other than causal, windows or none; accepted: packed sequences told by cu_seq_lens_q, "
        "cu_seq_lens_k, max_length_q and max_length_k",
    )


def _refuse(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name in _NOT_ABOUT_ATTENTION or value is None or value is False:
            continue
        given = f"a tensor {tuple(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
        known = {
            "s_aux": "attention sinks are not implemented",
            "output_attentions": "attention weights are never computed as a whole",
            "cache": "paged caches are not implemented",
        }
        reason = known.get(name, "it does not know this keyword")
        raise ValueError(
            f"{name} must not be set with attn_implementation='fap', got {given}: {reason}; "
            "attn_implementation='eager' may know it"
        )
