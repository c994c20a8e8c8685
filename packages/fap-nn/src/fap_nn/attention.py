"""FlashAttention: exact attention over q, k and v as a module without parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from fap_api import flash_attn_func
from fap_nn._settings import check_flags, check_integers, check_numbers, check_tensors, check_window

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Self

MAX_HEAD_DIM = 256


class FlashAttention(nn.Module):
    """Exact scaled dot-product attention as a module, with dropout in training only.

    Args:
        num_heads: heads of q. k and v may have any number of heads that divides it (GQA, MQA).
        head_dim: size of each head, 1 to 256.
        dropout: probability in [0, 1) of dropping an attention weight; nothing is dropped in ``eval()``.
        causal: query i sees keys up to ``i + seqlen_k - seqlen_q`` (bottom-right aligned).
        window_size: ``(left, right)``, how many keys a query sees on each side; -1 is no bound.
        alibi_slopes: ``(num_heads,)`` or ``(batch, num_heads)``, as a tensor or nested sequences. Kept as a
            float32 buffer that follows the module's device but not its dtype, and left out of the
            state dict: slopes are configuration, and flash-attn's checkpoints do not hold them.
        softmax_scale: factor on ``q @ k^T``; None stands for ``1 / sqrt(head_dim)``.
        softcap: bound c of ``c * tanh(score / c)``; 0.0 is off.
        deterministic: make gradients bitwise equal on every run.

    Raises:
        ValueError: a size or probability outside its range, or a window or slopes of another shape.
        TypeError: a setting of the wrong type.
    """

    alibi_slopes: torch.Tensor | None

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        causal: bool = False,
        window_size: Sequence[int] = (-1, -1),
        alibi_slopes: torch.Tensor | Sequence[float] | Sequence[Sequence[float]] | None = None,
        *,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        check_integers(num_heads=num_heads, head_dim=head_dim)
        check_numbers(dropout=dropout, softcap=softcap)
        if softmax_scale is not None:
            check_numbers(softmax_scale=softmax_scale)
        check_flags(causal=causal, deterministic=deterministic)
        check_window(window_size)
        if num_heads < 1:
            raise ValueError(f"num_heads must be at least 1, got {num_heads}")
        if not 1 <= head_dim <= MAX_HEAD_DIM:
            raise ValueError(f"head_dim must be 1 to {MAX_HEAD_DIM}, got {head_dim}")
        if not 0.0 <= dropout < 1.0:
            raise ValueError(f"dropout must be in [0, 1), got {dropout}")
        self.num_heads = num_heads
        self.head_dim = head_dim
        self.dropout = dropout
        self.causal = causal
        self.window_size = window_size
        self.softmax_scale = softmax_scale
        self.softcap = softcap
        self.deterministic = deterministic
        self._slopes = _slope_values(alibi_slopes, num_heads)
        device = alibi_slopes.device if isinstance(alibi_slopes, torch.Tensor) else None
        slopes = (
            None if self._slopes is None else torch.tensor(self._slopes, dtype=torch.float32, device=device)
        )
        self.register_buffer("alibi_slopes", slopes, persistent=False)

    def reset_parameters(self) -> None:
        """Write the ALiBi slopes given at construction again, for instance after ``to_empty()``.

        There are no parameters to draw; without slopes this does nothing.
        """
        if self.alibi_slopes is not None:
            with torch.no_grad():
                self.alibi_slopes.copy_(torch.tensor(self._slopes, dtype=torch.float32, device="cpu"))

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Attend from q to k and v.

        Args:
            q: ``(batch, seqlen_q, num_heads, head_dim)``.
            k, v: ``(batch, seqlen_k, num_heads_kv, head_dim)``, where num_heads_kv divides num_heads.

        Returns:
            ``(batch, seqlen_q, num_heads, head_dim)`` in q's dtype; 0 for a query that sees no key.

        Raises:
            RuntimeError: shapes, dtypes or devices that do not fit the module or each other.
            TypeError: no tensors.
        """
        self._check(q=q, k=k, v=v)
        out = flash_attn_func(
            q,
            k,
            v,
            dropout_p=self.dropout if self.training else 0.0,
            softmax_scale=self.softmax_scale,
            causal=self.causal,
            window_size=self.window_size,
            softcap=self.softcap,
            alibi_slopes=self.alibi_slopes,
            deterministic=self.deterministic,
        )
        return cast("torch.Tensor", out)  # a tuple only with return_attn_probs

    def extra_repr(self) -> str:
        """Name the settings that differ from their defaults, after the two sizes."""
        settings = [f"num_heads={self.num_heads}, head_dim={self.head_dim}"]
        defaults: dict[str, Any] = {
            "dropout": 0.0,
            "causal": False,
            "window_size": (-1, -1),
            "softmax_scale": None,
            "softcap": 0.0,
            "deterministic": False,
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            value = tuple(value) if name == "window_size" else value
            if value != default:
                settings.append(f"{name}={value}")
        if self.alibi_slopes is not None:
            settings.append(f"alibi_slopes={tuple(self.alibi_slopes.shape)}")
        return ", ".join(settings)

    def _check(self, **tensors: torch.Tensor) -> None:
        check_tensors(**tensors)
        for name, x in tensors.items():
            if x.dim() != 4 or x.shape[-1] != self.head_dim:
                raise RuntimeError(
                    f"{name} must have shape (batch, seqlen, heads, head_dim) with this module's head_dim "
                    f"{self.head_dim}, got {tuple(x.shape)}"
                )
        if tensors["q"].shape[2] != self.num_heads:
            raise RuntimeError(
                f"q must have this module's num_heads {self.num_heads} at dimension 2, "
                f"got shape {tuple(tensors['q'].shape)}"
            )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # `.to(torch.bfloat16)` casts every floating-point buffer, but slopes rounded to 8 bits are others.
        exact = self.alibi_slopes
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if exact is not None and self.alibi_slopes is not None and self.alibi_slopes.dtype != torch.float32:
            self.alibi_slopes = exact.to(self.alibi_slopes.device)
        return self


def _slope_values(slopes: Any, num_heads: int) -> Any:
    """Return slopes as plain numbers, checked: a module must be able to write them again."""
    if slopes is None:
        return None
    # The device is said: under `torch.device("meta")` values would be lost.
    tensor = slopes if isinstance(slopes, torch.Tensor) else torch.tensor(slopes, device="cpu")
    if tensor.is_meta:
        raise ValueError("alibi_slopes must hold values, got a tensor on the meta device")
    if tensor.dim() not in (1, 2) or tensor.shape[-1] != num_heads:
        raise ValueError(
            f"alibi_slopes must have shape (num_heads,) = ({num_heads},) or (batch, num_heads), "
            f"got {tuple(tensor.shape)}"
        )
    return tensor.float().tolist()
