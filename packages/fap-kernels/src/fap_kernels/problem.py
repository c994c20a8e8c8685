"""One attention call, described once: checked, canonical, frozen.

Every layer speaks of a call through :class:`AttentionProblem`. Building one is the only place where
the tensors of a call are checked, so a user of this package alone meets the same messages as a user
of the functional API, and a back end may take every invariant below for granted.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .errors import WrongType, WrongValue

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cache import Cache
    from .packing import Packing

__all__ = ["MAX_HEAD_DIM", "AttentionProblem", "normalize_window"]

MAX_HEAD_DIM = 256
# No sequence is longer; a wider bound would overflow the 32-bit integers of kernels and of other packages.
WIDEST_WINDOW = 2**31 - 1
# Factors on scores beyond these, times a product of 16-bit vectors, leave the range of float32.
SMALLEST, LARGEST = 1e-20, 1e20
SUPPORTED_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True, slots=True)
class AttentionProblem:
    """What one dense attention call asks for, without its data.

    Attributes:
        batch, seqlen_q, seqlen_k, nheads, nheads_k, head_dim: sizes of q ``(batch, seqlen_q, nheads,
            head_dim)`` and of k and v ``(batch, seqlen_k, nheads_k, head_dim)``. Sequence lengths and
            batch may be 0; ``nheads`` is a multiple of ``nheads_k``.
        dtype, device: of q, k and v alike.
        softmax_scale: factor on ``q @ k^T``; already resolved to a number.
        window_left, window_right: key j is visible to query i iff
            ``i + seqlen_k - seqlen_q - window_left <= j <= i + seqlen_k - seqlen_q + window_right``;
            -1 means no bound on that side. ``causal`` is folded in: it makes ``window_right`` 0.
        causal: as the caller said it, for back ends whose interface has no window.
        softcap: 0.0 for none, else the bound c of ``c * tanh(score / c)``.
        alibi: None, ``"head"`` for slopes ``(nheads,)`` or ``"batch_head"`` for ``(batch, nheads)``.
        dropout_p: probability of dropping a weight, in [0, 1).
        deterministic: gradients must be bitwise equal on every run.
        needs_grad: a backward pass may follow this call.
        return_attn_probs: ``softmax_lse`` and, with dropout, the probabilities are handed to the caller.
        packed: the sequences lie one behind the other, q ``(total_q, nheads, head_dim)``, k and v
            ``(total_k, nheads_k, head_dim)``, and ``seqlen_q``, ``seqlen_k`` are what none of them exceeds.
        paged: k and v are ``(num_pages, page_size, nheads_k, head_dim)``, and a table says which pages are
            whose.
        cached: k and v are a cache of which each sequence has a length of its own, up to ``seqlen_k``.
        page_size: rows of a page, 0 without pages.
        seqused_q, seqused_k: not all of a packed sequence's queries, or keys, need count.
    """

    batch: int
    seqlen_q: int
    seqlen_k: int
    nheads: int
    nheads_k: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    softmax_scale: float
    window_left: int
    window_right: int
    causal: bool
    softcap: float
    alibi: str | None
    dropout_p: float
    deterministic: bool
    needs_grad: bool
    return_attn_probs: bool = False
    packed: bool = False
    paged: bool = False
    cached: bool = False
    page_size: int = 0
    seqused_q: bool = False
    seqused_k: bool = False

    @classmethod
    def describe(
        cls,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: Sequence[int] | torch.Tensor = (-1, -1),
        softcap: float = 0.0,
        alibi_slopes: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        deterministic: bool = False,
        needs_grad: bool = False,
        return_attn_probs: bool = False,
        packing: Packing | None = None,
        cache: Cache | None = None,
    ) -> AttentionProblem:
        """Check the tensors and options of one call and return its description.

        Args:
            q: ``(batch, seqlen_q, nheads, head_dim)``; with ``packing`` ``(total_q, nheads, head_dim)``.
            k, v: ``(batch, seqlen_k, nheads_k, head_dim)``, in q's dtype and on q's device; with ``packing``
                ``(total_k, nheads_k, head_dim)``; with pages ``(num_pages, page_size, nheads_k, head_dim)``.
            packing: where packed sequences lie.
            cache: where in k and v the sequences lie, if these are a cache.
            softmax_scale: None stands for ``1 / sqrt(head_dim)``.
            window_size: ``(left, right)``, any sequence or tensor of two integers; -1 is no bound.
            alibi_slopes: float32 ``(nheads,)`` or ``(batch, nheads)`` on q's device.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit together, or are not supported.
            ValueError: an option outside its range.
            TypeError: an argument of the wrong type.
        """
        pages = cache or packing
        paged = pages is not None and pages.block_table is not None
        _check_tensors(q, k, v, packed=packing is not None, paged=paged, cached=cache is not None)
        nheads, head_dim = q.shape[-2:]
        if cache is not None:
            batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], cache.capacity
        elif packing is None:
            batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        else:
            batch, seqlen_q, seqlen_k = packing.batch, packing.max_seqlen_q, packing.max_seqlen_k
        causal = _as_flag("causal", causal)
        left, right = normalize_window(window_size, causal)
        return cls(
            batch=batch,
            seqlen_q=seqlen_q,
            seqlen_k=seqlen_k,
            nheads=nheads,
            nheads_k=k.shape[-2],
            head_dim=head_dim,
            dtype=q.dtype,
            device=q.device,
            softmax_scale=_check_scale(softmax_scale, head_dim),
            window_left=left,
            window_right=right,
            causal=causal,
            softcap=_check_softcap(softcap),
            alibi=_check_alibi(alibi_slopes, q.device, batch, nheads),
            dropout_p=_check_dropout(dropout_p),
            deterministic=_as_flag("deterministic", deterministic),
            needs_grad=needs_grad,
            return_attn_probs=_as_flag(
                "return_attn_probs" if cache is None else "return_softmax_lse", return_attn_probs
            ),
            packed=packing is not None,
            paged=paged,
            cached=cache is not None,
            page_size=pages.page_size if paged and pages is not None else 0,
            seqused_q=packing is not None and packing.seqused_q is not None,
            seqused_k=packing is not None and packing.seqused_k is not None,
        )


def normalize_window(window_size: Sequence[int] | torch.Tensor, causal: bool) -> tuple[int, int]:
    """Return ``(left, right)`` as plain ints with causal folded in and every negative bound as -1."""
    if isinstance(window_size, torch.Tensor):
        if window_size.device.type != "cpu":
            # Reading it would make every call wait for the device.
            raise WrongType(
                "window_size must be two integers (left, right) or a CPU tensor of them, "
                f"got a tensor on {window_size.device}"
            )
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)):
        window_size = _as_pair(window_size)
    if len(window_size) != 2:
        raise WrongValue(
            f"window_size must be two integers (left, right), got {len(window_size)}: {window_size!r}"
        )
    left, right = (_as_bound(bound, window_size) for bound in window_size)
    if causal:
        right = 0
    return max(left, -1), max(right, -1)


def _as_pair(window_size: Any) -> list[Any]:
    # A set or a dict has a length too, but no left and right.
    if isinstance(window_size, (str, bytes, Mapping, Set)) or not hasattr(window_size, "__len__"):
        raise WrongType(
            "window_size must be two integers (left, right), "
            f"got {type(window_size).__name__}: {window_size!r}"
        )
    return [*window_size]


def _as_bound(value: Any, window_size: Any) -> int:
    # torch.compile follows isinstance on symbolic numbers, but not operator.index.
    if isinstance(value, int) and not isinstance(value, bool):
        return min(value, WIDEST_WINDOW)
    try:
        if isinstance(value, bool):
            raise WrongType("a bool is no number of keys")
        return min(operator.index(value), WIDEST_WINDOW)
    except TypeError as error:
        raise WrongType(f"window_size must be two integers (left, right), got {window_size!r}") from error


def _check_tensors(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, packed: bool, paged: bool, cached: bool
) -> None:
    rows = "(total, nheads, headdim)" if packed else "(batch, seqlen, nheads, headdim)"
    keys = "(num_pages, page_size, nheads, headdim)" if paged else rows
    k_name, v_name = ("k_cache", "v_cache") if cached else ("k", "v")
    for name, x, layout in (("q", q, rows), (k_name, k, keys), (v_name, v, keys)):
        _check_layout(name, x, layout)
    if q.dtype not in SUPPORTED_DTYPES:
        raise RuntimeError(
            "FlashAttention only support fp16 and bf16 data type (float32 and float64 here too, where the "
            f"back end has them), got q of {q.dtype}"
        )
    nheads, head_dim = q.shape[-2:]
    if not 1 <= head_dim <= MAX_HEAD_DIM:
        raise RuntimeError(
            f"FlashAttention only supports head dimension at most {MAX_HEAD_DIM} and at least 1, "
            f"got q with head dimension {head_dim}"
        )
    together = f"q, {k_name} and {v_name} must"
    for name, x in ((k_name, k), (v_name, v)):
        if x.dtype != q.dtype:
            raise RuntimeError(f"{together} have the same dtype, got q of {q.dtype} and {name} of {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(
                f"{together} be on the same device, got q on {q.device} and {name} on {x.device}"
            )
        if not (packed or cached) and x.shape[0] != q.shape[0]:
            raise RuntimeError(f"{name} must have q's batch size {q.shape[0]}, got {x.shape[0]}")
        if x.shape[-1] != head_dim:
            raise RuntimeError(f"{name} must have q's head dimension {head_dim}, got {x.shape[-1]}")
    if k.shape != v.shape:
        raise RuntimeError(
            f"{k_name} and {v_name} must have the same shape, "
            f"got {k_name} {tuple(k.shape)} and {v_name} {tuple(v.shape)}"
        )
    nheads_k = k.shape[-2]
    if nheads < 1 or nheads_k < 1 or nheads % nheads_k != 0:
        raise RuntimeError(
            "Number of heads in key/value must divide number of heads in query, "
            f"got {nheads_k} heads in {k_name} and {v_name} and {nheads} heads in q"
        )


def _check_layout(name: str, x: torch.Tensor, layout: str) -> None:
    rank = layout.count(",") + 1
    if not isinstance(x, torch.Tensor):
        raise WrongType(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    if x.is_nested:
        raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got a nested tensor")
    if x.layout != torch.strided:
        raise RuntimeError(f"{name} must be a dense tensor (layout torch.strided), got {x.layout}")
    if x.dim() != rank:
        raise RuntimeError(f"{name} must have {rank} dimensions {layout}, got shape {tuple(x.shape)}")


def _check_scale(softmax_scale: float | None, head_dim: int) -> float:
    if softmax_scale is None:
        return 1.0 / math.sqrt(head_dim)
    scale = _as_float("softmax_scale", softmax_scale)
    # Compared, not asked math.isfinite: torch.compile traces a symbolic float through comparisons alone.
    if not -math.inf < scale < math.inf:
        raise WrongValue(f"softmax_scale must be finite, got {scale}")
    if scale != 0.0 and not (SMALLEST <= scale <= LARGEST or -LARGEST <= scale <= -SMALLEST):
        raise WrongValue(f"softmax_scale must be 0.0 or of a size from {SMALLEST} to {LARGEST}, got {scale}")
    return scale


def _check_softcap(softcap: float) -> float:
    value = _as_float("softcap", softcap)
    if not 0.0 <= value < math.inf:
        raise WrongValue(f"softcap must be finite and at least 0.0 (0.0 is off), got {value}")
    if value != 0.0 and not SMALLEST <= value <= LARGEST:
        raise WrongValue(f"softcap must be 0.0 (off) or from {SMALLEST} to {LARGEST}, got {value}")
    return value


def _check_dropout(dropout_p: float) -> float:
    value = _as_float("dropout_p", dropout_p)
    if not 0.0 <= value < 1.0:
        raise WrongValue(f"dropout_p must be in [0, 1), got {value}")
    return value


def _as_float(name: str, value: Any) -> float:
    # torch.compile follows isinstance on symbolic numbers, but not hasattr.
    if isinstance(value, (float, int)) and not isinstance(value, bool):
        if isinstance(value, int) and not -(2**1000) < value < 2**1000:
            raise WrongValue(f"{name} must be finite, got an integer that no float holds")
        return float(value)
    if isinstance(value, bool) or not hasattr(value, "__float__"):
        raise WrongType(f"{name} must be a number, got {type(value).__name__}: {value!r}")
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            raise WrongType(f"{name} must be a number, since attention has no gradient for it, got {value!r}")
        if value.is_meta or value.numel() != 1:
            raise WrongType(
                f"{name} must be a number, got a tensor of shape {tuple(value.shape)} on {value.device}"
            )
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError) as error:
        raise WrongType(f"{name} must be a number, got {type(value).__name__}: {value!r}") from error


def _as_flag(name: str, value: Any) -> bool:
    # Whatever else is true or false here is more likely an argument in the wrong place, or the text "False".
    if isinstance(value, bool):
        return value
    if type(value).__name__ in ("bool", "bool_"):  # NumPy's, which may not be installed
        return bool(value)
    if isinstance(value, int) and value in (0, 1):
        return value == 1
    raise WrongType(f"{name} must be True or False, got {type(value).__name__}: {value!r}")


def _check_alibi(
    alibi_slopes: torch.Tensor | None, device: torch.device, batch: int, nheads: int
) -> str | None:
    if alibi_slopes is None:
        return None
    if not isinstance(alibi_slopes, torch.Tensor):
        raise WrongType(f"alibi_slopes must be a torch.Tensor or None, got {type(alibi_slopes).__name__}")
    if alibi_slopes.layout != torch.strided:
        raise RuntimeError(
            f"alibi_slopes must be a dense tensor (layout torch.strided), got {alibi_slopes.layout}"
        )
    if alibi_slopes.dtype != torch.float32:
        raise RuntimeError(f"alibi_slopes must have dtype torch.float32, got {alibi_slopes.dtype}")
    if alibi_slopes.device != device:
        raise RuntimeError(f"alibi_slopes must be on q's device {device}, got {alibi_slopes.device}")
    if tuple(alibi_slopes.shape) == (nheads,):
        return "head"
    if tuple(alibi_slopes.shape) == (batch, nheads):
        return "batch_head"
    raise RuntimeError(
        f"alibi_slopes must have shape (nheads,) = ({nheads},) or (batch, nheads) = ({batch}, {nheads}), "
        f"got {tuple(alibi_slopes.shape)}"
    )
