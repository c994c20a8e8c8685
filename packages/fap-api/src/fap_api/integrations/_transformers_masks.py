"""The mask function of ``attn_implementation="fap"``: hands padding and packing on, refuses other masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["padding_mask"]

# The makers of what is_causal, sliding_window and padding express, by name in transformers.masking_utils.
_EXPRESSIBLE = frozenset(
    (
        "and_masks",
        "bidirectional_mask_function",
        "causal_mask_function",
        "packed_sequence_mask_function",
        "remap_positions_for_packed_sequence",
        "sliding_window_bidirectional_overlay",
        "sliding_window_overlay",
    )
)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: torch.Tensor | None = None,
    device: torch.device | None = None,
    use_vmap: bool = False,
    allow_is_bidirectional_skip: bool | None = None,
    **_: Any,
) -> torch.Tensor | None:
    """Return what the attention function must know beside ``is_causal`` and ``sliding_window``.

    The arguments are those of transformers' mask functions, which are called once per forward pass and kind
    of layer. The look at a padding mask waits for the device.

    Args:
        use_vmap: set where a model adds to the mask what transformers does not know.
        allow_is_bidirectional_skip: given for masks without causality only.

    Returns:
        None where no token is padding; else bool ``(batch, up to kv_length)``, False at padding and ending
        where a static cache is not filled yet; for rows of several packed sequences, and for any while
        compiling, int32 ``(batch, q_length)``, numbering the sequences of each row from 1.

    Raises:
        ValueError: a mask that neither a padding mask nor is_causal and sliding_window express.
    """
    compiling = torch.compiler.is_compiling()
    packed = None if compiling else _check(mask_function)
    if use_vmap:
        raise ValueError(_refusal("or_mask_function or and_mask_function"))
    if attention_mask is not None:
        attention_mask = attention_mask[:, -kv_length:]
        if not compiling and attention_mask.shape[1] == kv_length and attention_mask.all():
            return None
        return attention_mask
    filled = q_offset + q_length - kv_offset
    causal = allow_is_bidirectional_skip is None
    if causal and filled < kv_length:
        return torch.ones((batch_size, int(filled)), dtype=torch.bool, device=device)
    if packed is not None:
        return (packed + 1).to(torch.int32)
    if compiling and mask_function is not None and q_length == kv_length and q_length > 1:
        return _neighbours(mask_function, batch_size, q_length, device)
    return None


def _neighbours(
    mask_function: Callable[..., torch.Tensor], batch_size: int, seqlen: int, device: torch.device | None
) -> torch.Tensor:
    """Number packed sequences by whether each token sees the one before it.

    While compiling, transformers makes every batch a packed one, and closures are out of sight. Where some
    but not all tokens see the one after them, the mask is none of ours; a number above 1 tells that as well.
    """
    rows = torch.arange(batch_size, device=device)[:, None]
    token = torch.arange(1, seqlen, device=device)[None]
    head = token.new_zeros(())
    before = mask_function(rows, head, token, token - 1).expand(batch_size, -1)
    after = mask_function(rows, head, token - 1, token).expand(batch_size, -1)
    steps = before.logical_not() | (after != after[:, :1])
    return pad(steps, (1, 0)).cumsum(1, dtype=torch.int32) + 1


def _check(mask_function: Callable[..., Any] | None) -> torch.Tensor | None:
    """Refuse masks beyond padding, causality and windows; return the packed sequences' numbers, if any."""
    packed = None
    for ingredient in _ingredients(mask_function):
        maker = ingredient.__qualname__.split(".")[0]
        if maker not in _EXPRESSIBLE:
            raise ValueError(_refusal(ingredient.__qualname__))
        if maker == "packed_sequence_mask_function":
            (packed,) = (cell.cell_contents for cell in ingredient.__closure__)
    return packed


def _refusal(maker: str) -> str:
    return (
        f"attn_implementation='fap' cannot apply this model's mask, made by {maker}; accepted: causal masks, "
        "sliding windows, padding and packed sequences; attn_implementation='sdpa', 'eager' or "
        "'flex_attention' apply any"
    )


def _ingredients(mask_function: Callable[..., Any] | None) -> Iterator[Any]:
    """Yield a mask function and, as their closures hold them, those it is made of."""
    if mask_function is None:
        return
    yield mask_function
    for cell in getattr(mask_function, "__closure__", None) or ():
        content = cell.cell_contents
        for part in content if isinstance(content, tuple) else (content,):
            if callable(part) and not isinstance(part, torch.Tensor):
                yield from _ingredients(part)
