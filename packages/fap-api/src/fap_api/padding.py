"""From padded batches to packed sequences and back: flash-attn's ``bert_padding``, with gradients.

``unpad_input`` and ``unpad_input_for_concatenated_sequences`` look at the mask to find how many tokens there
are, so on a device they wait for it.
"""

from __future__ import annotations

from typing import Any

import torch

from fap_kernels.errors import WrongType
from fap_kernels.packing import check_length

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def unpad_input(
    hidden_states: torch.Tensor, attention_mask: torch.Tensor, unused_mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int, torch.Tensor]:
    """Take the tokens out of a padded batch, one sequence behind the other.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask: bool or integer ``(batch, seqlen)``: true, or not 0, where there is a token.
        unused_mask: of the same shape: true, or not 0, where room is kept for a token that is not in use.
            Such tokens are taken out as well; they lie behind those in use if they do so in each row.

    Returns:
        x: ``(total, ...)``, the tokens of both masks.
        indices: int64 ``(total,)``, where each was in ``hidden_states`` flattened to
            ``(batch * seqlen, ...)``.
        cu_seqlens: int32 ``(batch + 1,)``, where in x each sequence starts and ends.
        max_seqlen: an int, tokens of the longest sequence; 0 for an empty batch.
        seqused: int32 ``(batch,)``, how many tokens of each sequence are those of ``attention_mask``.

    Raises:
        RuntimeError: shapes or devices that do not fit together.
        TypeError: not tensors, or a mask that is neither bool nor integers.
    """
    _check_batch(hidden_states)
    used = _as_mask("attention_mask", attention_mask, hidden_states)
    room = used
    if unused_mask is not None:
        room = used | _as_mask("unused_mask", unused_mask, hidden_states)
    indices = room.flatten().nonzero().flatten()
    seqlens = room.sum(dim=1, dtype=torch.int32)
    x = index_first_axis(hidden_states.flatten(0, 1), indices)
    return x, indices, _cumulated(seqlens), _longest(seqlens), used.sum(dim=1, dtype=torch.int32)


def pad_input(hidden_states: torch.Tensor, indices: torch.Tensor, batch: int, seqlen: int) -> torch.Tensor:
    """Put packed tokens back where :func:`unpad_input` took them from, with zeros everywhere else.

    Args:
        hidden_states: ``(total, ...)``.
        indices: int64 ``(total,)`` as :func:`unpad_input` returned it.
        batch, seqlen: sizes of the padded batch.

    Returns:
        ``(batch, seqlen, ...)``.

    Raises:
        RuntimeError, TypeError, ValueError, IndexError: as :func:`index_put_first_axis`.
    """
    batch, seqlen = check_length("batch", batch), check_length("seqlen", seqlen)
    _check_rows("hidden_states", hidden_states, indices, as_many=True)
    return _put(hidden_states, indices, batch * seqlen).view(batch, seqlen, *hidden_states.shape[1:])


def unpad_input_for_concatenated_sequences(
    hidden_states: torch.Tensor, attention_mask_in_length: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """Take the tokens out of a padded batch whose rows hold several sequences each.

    Args:
        hidden_states: ``(batch, seqlen, ...)``.
        attention_mask_in_length: integers ``(batch, seqlen)``: the lengths of the row's sequences, which lie
            one behind the other from the row's start on, and zeros. With ``[2, 3, 0, 0, 0, 0]`` the first two
            tokens of a row are one sequence, the next three another, and the last one is padding.

    Returns:
        x: ``(total, ...)``; the sequences in the order of the rows and, within one, of their lengths.
        indices: int64 ``(total,)``, where each token was in ``hidden_states`` flattened to
            ``(batch * seqlen, ...)``.
        cu_seqlens: int32 ``(sequences + 1,)``, where in x each sequence starts and ends.
        max_seqlen: an int, tokens of the longest sequence; 0 if there is none.

    Raises:
        RuntimeError: shapes or devices that do not fit together, or lengths that are negative or exceed
            a row.
        TypeError: not tensors, or lengths that are no integers.
    """
    _check_batch(hidden_states)
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states, "integers")
    if attention_mask_in_length.dtype == torch.bool:
        raise WrongType("attention_mask_in_length must hold integers, got torch.bool")
    lengths = attention_mask_in_length.long()
    seqlen = hidden_states.shape[1]
    tokens = lengths.sum(dim=1, keepdim=True)
    if ((lengths < 0).any() | (tokens > seqlen).any()).item():
        raise RuntimeError(
            "attention_mask_in_length must hold lengths of at least 0 that add up to at most the row's "
            f"{seqlen} tokens, got {attention_mask_in_length.tolist()}"
        )
    taken = torch.arange(seqlen, device=lengths.device) < tokens
    indices = taken.flatten().nonzero().flatten()
    seqlens = lengths[lengths > 0].to(torch.int32)
    x = index_first_axis(hidden_states.flatten(0, 1), indices)
    return x, indices, _cumulated(seqlens), _longest(seqlens)


def index_first_axis(x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """Return the rows ``x[indices]``, ``(n, ...)``.

    Args:
        x: ``(rows, ...)``.
        indices: int64 ``(n,)``.

    Raises:
        RuntimeError, TypeError: indices of another shape, dtype or device, or x without rows.
        IndexError: on a CPU, an index of no row; a GPU stops with an assertion of its own.
    """
    _check_rows("x", x, indices)
    # Not x[indices], whose backward sorts the indices.
    try:
        return x.index_select(0, indices)
    except IndexError as error:
        raise _out_of_range(indices, len(x)) from error


def index_put_first_axis(values: torch.Tensor, indices: torch.Tensor, first_axis_dim: int) -> torch.Tensor:
    """Return zeros ``(first_axis_dim, ...)`` with ``values`` in the rows ``indices``.

    Args:
        values: ``(n, ...)``.
        indices: int64 ``(n,)``, each row at most once.
        first_axis_dim: how many rows there are.

    Raises:
        RuntimeError, TypeError, ValueError: indices of another shape, dtype or device, values without a row
            for each, or a number of rows that is none.
        IndexError: as :func:`index_first_axis`.
    """
    _check_rows("values", values, indices, as_many=True)
    return _put(values, indices, check_length("first_axis_dim", first_axis_dim))


def index_first_axis_residual(x: torch.Tensor, indices: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows ``x[indices]``, and x for a residual connection around what is done with them.

    Args and errors as for :func:`index_first_axis`.
    """
    return index_first_axis(x, indices), x


def _put(values: torch.Tensor, indices: torch.Tensor, rows: int) -> torch.Tensor:
    zeros = values.new_zeros((rows, *values.shape[1:]))
    try:
        return zeros.index_copy(0, indices, values)
    except IndexError as error:
        raise _out_of_range(indices, rows) from error


def _out_of_range(indices: torch.Tensor, rows: int) -> IndexError:
    return IndexError(
        f"indices must be at least 0 and below the number of rows {rows}, got {int(indices.min())} to "
        f"{int(indices.max())}"
    )


def _cumulated(seqlens: torch.Tensor) -> torch.Tensor:
    """Return int32 ``(sequences + 1,)``: 0, and the running sums."""
    return torch.nn.functional.pad(seqlens.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(seqlens: torch.Tensor) -> int:
    return int(seqlens.max()) if len(seqlens) else 0


def _check_batch(hidden_states: Any) -> None:
    if not isinstance(hidden_states, torch.Tensor):
        raise WrongType(f"hidden_states must be a torch.Tensor, got {type(hidden_states).__name__}")
    if hidden_states.dim() < 2:
        raise RuntimeError(
            f"hidden_states must have shape (batch, seqlen, ...), got {tuple(hidden_states.shape)}"
        )


def _check_mask(
    name: str, mask: Any, hidden_states: torch.Tensor, accepted: str = "bool or integers"
) -> None:
    if not isinstance(mask, torch.Tensor):
        raise WrongType(f"{name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.is_floating_point() or mask.is_complex():
        # One to be added to scores, 0 where there is a token, would be taken for its opposite.
        raise WrongType(f"{name} must hold {accepted}, got {mask.dtype}")
    if mask.shape != hidden_states.shape[:2]:
        raise RuntimeError(
            f"{name} must have shape (batch, seqlen) = {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != hidden_states.device:
        raise RuntimeError(
            f"{name} must be on hidden_states' device {hidden_states.device}, got {mask.device}"
        )


def _as_mask(name: str, mask: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
    _check_mask(name, mask, hidden_states)
    return mask.bool()


def _check_rows(name: str, x: Any, indices: Any, *, as_many: bool = False) -> None:
    for argument, given in ((name, x), ("indices", indices)):
        if not isinstance(given, torch.Tensor):
            raise WrongType(f"{argument} must be a torch.Tensor, got {type(given).__name__}")
    if x.dim() < 1:
        raise RuntimeError(f"{name} must have shape (rows, ...), got ()")
    if indices.dim() != 1 or indices.dtype != torch.int64 or indices.device != x.device:
        raise RuntimeError(
            f"indices must be int64 of shape (n,) on {x.device}, "
            f"got {indices.dtype} of shape {tuple(indices.shape)} on {indices.device}"
        )
    if as_many and len(x) != len(indices):
        raise RuntimeError(
            f"{name} must have a row for each of the {len(indices)} indices, got shape {tuple(x.shape)}"
        )
