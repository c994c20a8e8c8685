"""FlashMHA: multi-head attention with its projections, exact and without a score matrix in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from fap_nn._cached import attend_cached, check_cache, real_tokens_first
from fap_nn._settings import check_flags, check_integers, check_tensors
from fap_nn.attention import FlashAttention
from fap_nn.kv_cache import KVCache
from fap_nn.rotary import RotaryEmbedding, rotate

if TYPE_CHECKING:
    from collections.abc import Sequence


class FlashMHA(nn.Module):
    """Multi-head attention with input and output projections, for self- or cross-attention.

    State dict, named as in flash-attn's ``MHA``: ``Wqkv.weight`` ``((num_heads + 2 * num_heads_kv) *
    head_dim, embed_dim)``, rows of q before those of k before those of v; with ``cross_attn`` instead
    ``Wq.weight`` and ``Wkv.weight``; ``out_proj.weight``; each with its ``.bias`` unless ``bias=False``.

    Args:
        embed_dim: width of the input and output; ``head_dim = embed_dim / num_heads``.
        num_heads: query heads.
        dropout: probability in [0, 1) of dropping an attention weight, in training only.
        causal: a token sees itself and what precedes it.
        layer_idx: kept as an attribute, for code that looks layers up by number; no effect here.
        device, dtype: of the parameters.
        num_heads_kv: heads of k and v, a divisor of num_heads; None stands for num_heads (1 is MQA).
        bias: of all projections.
        window_size, alibi_slopes, softmax_scale, softcap, deterministic: as in ``FlashAttention``, except
            that slopes are per head, ``(num_heads,)``.
        rotary_emb_dim: how many features of each head are rotated by position; 0 is off.
        rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base: as in ``RotaryEmbedding``.
        cross_attn: take k and v from a second input.
        batch_first: inputs are ``(batch, seqlen, embed_dim)``; False means ``(seqlen, batch, embed_dim)``.

    Raises:
        ValueError: options outside their range or that exclude each other.
        TypeError: an option of the wrong type.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_heads_kv: int | None = None,
        bias: bool = True,
        window_size: Sequence[int] = (-1, -1),
        alibi_slopes: torch.Tensor | Sequence[float] | None = None,
        softmax_scale: float | None = None,
        softcap: float = 0.0,
        deterministic: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_interleaved: bool = False,
        rotary_emb_scale_base: float | None = None,
        cross_attn: bool = False,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        check_integers(
            embed_dim=embed_dim,
            num_heads=num_heads,
            num_heads_kv=num_heads_kv,
            rotary_emb_dim=rotary_emb_dim,
        )
        check_flags(bias=bias, cross_attn=cross_attn, batch_first=batch_first)
        _check_sizes(embed_dim, num_heads, num_heads_kv)
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads_kv
        self.head_dim = embed_dim // num_heads
        self.layer_idx = layer_idx
        self.cross_attn = cross_attn
        self.batch_first = batch_first
        self.rotary_emb = self._make_rotary(
            rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved, rotary_emb_scale_base
        )
        self.inner_attn = FlashAttention(
            num_heads,
            self.head_dim,
            dropout,
            causal,
            window_size,
            alibi_slopes,
            softmax_scale=softmax_scale,
            softcap=softcap,
            deterministic=deterministic,
        )
        slopes = self.inner_attn.alibi_slopes
        if slopes is not None and slopes.dim() != 1:
            raise ValueError(
                f"alibi_slopes must have shape (num_heads,) = ({num_heads},), got {tuple(slopes.shape)}"
            )
        if device is not None:
            self.inner_attn.to(device)
        kv_dim = 2 * num_heads_kv * self.head_dim
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias, device, dtype)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias, device, dtype)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias, device, dtype)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias, device, dtype)

    @classmethod
    def from_torch(
        cls, mha: nn.MultiheadAttention, *, causal: bool = False, cross_attn: bool = False
    ) -> FlashMHA:
        """Build a FlashMHA that computes what an ``nn.MultiheadAttention`` computes, with copied weights.

        Dropout, layout (``batch_first``), device, dtype and training mode are taken over. An
        ``nn.MultiheadAttention`` learns only in its call whether it is causal and whether k and v have a
        source of their own, so say both here. Mind that ``key_padding_mask`` is True for padding there
        and True for real tokens here.

        Args:
            mha: the module to copy.
            causal: what ``is_causal`` or the causal ``attn_mask`` said in its calls.
            cross_attn: whether it is called with key and value other than query.

        Raises:
            TypeError: mha is no ``nn.MultiheadAttention``.
            ValueError: mha was built with ``kdim``, ``vdim``, ``add_bias_kv`` or ``add_zero_attn``.
        """
        if not isinstance(mha, nn.MultiheadAttention):
            raise TypeError(f"mha must be a torch.nn.MultiheadAttention, got {type(mha).__name__}")
        _check_convertible(mha)
        parameters = dict(mha.named_parameters())
        in_proj = {name: p for name, p in parameters.items() if name.startswith("in_proj_")}
        flash = cls(
            mha.embed_dim,
            mha.num_heads,
            mha.dropout,
            causal,
            device=mha.in_proj_weight.device,
            dtype=mha.in_proj_weight.dtype,
            bias="in_proj_bias" in in_proj,
            cross_attn=cross_attn,
            batch_first=mha.batch_first,
        )
        state = {name: p for name, p in parameters.items() if name not in in_proj}
        for name, stacked in in_proj.items():
            kind = name.removeprefix("in_proj_")
            if cross_attn:
                state[f"Wq.{kind}"], state[f"Wkv.{kind}"] = stacked.split([mha.embed_dim, 2 * mha.embed_dim])
            else:
                state[f"Wqkv.{kind}"] = stacked
        flash.load_state_dict(state)
        return flash.train(mha.training)

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as ``nn.Linear`` does, and restore the ALiBi slopes."""
        for module in self.children():
            if isinstance(module, (nn.Linear, FlashAttention)):
                module.reset_parameters()

    def forward(
        self,
        x: torch.Tensor,
        x_kv: torch.Tensor | None = None,
        key_padding_mask: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Attend within x, or from x to x_kv, and project the result.

        Each sequence gives what it would give alone with its padding removed: positions (causal, window,
        ALiBi, rotary) count real tokens only. In self-attention the output at padding is 0.

        Args:
            x: ``(batch, seqlen, embed_dim)``, or ``(seqlen, batch, embed_dim)`` without ``batch_first``.
            x_kv: source of k and v in the same layout; required with ``cross_attn``, else refused.
            key_padding_mask: bool ``(batch, seqlen of the keys)`` in either layout, **True for real
                tokens**, as in flash-attn (``nn.MultiheadAttention`` has it the other way round).
                Sequences of equal length run together; reading the lengths waits for the device (not
                with a cache).
            cache: from :meth:`make_cache`. The tokens x continue its sequences: their keys and values are
                appended to it, and they attend to all before them too. A prompt and then one token at a time
                give what one pass over all gives. There is no backward: run it under ``torch.no_grad()``.

        Returns:
            A tensor of x's shape.

        Raises:
            RuntimeError: shapes that do not fit the module or each other, a mask that is not bool, x_kv
                missing or not wanted; with a cache, more tokens than it has room for, before anything is
                written, a module that is not causal or drops weights, or gradients that are not off.
            TypeError: an argument of the wrong type.
        """
        self._check_inputs(x, x_kv)
        if not self.batch_first:
            x = x.transpose(0, 1)
            x_kv = None if x_kv is None else x_kv.transpose(0, 1)
        out: torch.Tensor
        if cache is not None:
            out = self._forward_cached(x, key_padding_mask, cache)
        elif key_padding_mask is None:
            out = self.out_proj(self._attend(*self._project(x, x_kv)).flatten(-2))
        else:
            out = self._forward_padded(x, x_kv, key_padding_mask)
        return out if self.batch_first else out.transpose(0, 1)

    def make_cache(self, batch: int, max_seqlen: int, page_size: int | None = None) -> KVCache:
        """Return an empty cache for this module, on its device and in its dtype; sizes as in ``KVCache``."""
        weight = self.out_proj.weight
        return KVCache(
            batch,
            max_seqlen,
            self.num_heads_kv,
            self.head_dim,
            page_size=page_size,
            device=weight.device,
            dtype=weight.dtype,
        )

    def extra_repr(self) -> str:
        """Name the sizes and the layout."""
        return (
            f"embed_dim={self.embed_dim}, num_heads={self.num_heads}, num_heads_kv={self.num_heads_kv}, "
            f"cross_attn={self.cross_attn}, batch_first={self.batch_first}"
        )

    def _make_rotary(
        self, dim: int, base: float, interleaved: bool, scale_base: float | None
    ) -> RotaryEmbedding | None:
        if dim == 0:
            return None
        if self.cross_attn:
            raise ValueError("rotary_emb_dim must be 0 with cross_attn: q and k share no positions there")
        if dim > self.head_dim:
            raise ValueError(f"rotary_emb_dim must be at most head_dim {self.head_dim}, got {dim}")
        return RotaryEmbedding(dim, base, interleaved, scale_base)

    def _project(
        self, x: torch.Tensor, x_kv: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if x_kv is None:
            heads = self.Wqkv(x).unflatten(-1, (-1, self.head_dim))
            q, k, v = heads.split([self.num_heads, self.num_heads_kv, self.num_heads_kv], dim=2)
        else:
            q = self.Wq(x).unflatten(-1, (-1, self.head_dim))
            k, v = self.Wkv(x_kv).unflatten(-1, (2, -1, self.head_dim)).unbind(2)
        return q, k, v

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if self.rotary_emb is not None:
            q, k = rotate(self.rotary_emb, q, k)
        out: torch.Tensor = self.inner_attn(q, k, v)
        return out

    def _forward_padded(self, x: torch.Tensor, x_kv: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor:
        _check_mask(mask, x if x_kv is None else x_kv)
        padding = mask.logical_not()[:, :, None]
        # What stands in padding, NaN included, must not reach the weights' gradients as 0 * NaN.
        if x_kv is None:
            x = x.masked_fill(padding, 0.0)
        else:
            x_kv = x_kv.masked_fill(padding, 0.0)
        out: torch.Tensor = self.out_proj(self._attend_by_length(*self._project(x, x_kv), mask).flatten(-2))
        return out.masked_fill(padding, 0.0) if x_kv is None else out

    def _attend_by_length(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        lengths = mask.sum(1)
        # A stable sort on "is padding" lists the real tokens of each sequence first, in their order.
        tokens = mask.logical_not().to(torch.uint8).argsort(dim=1, stable=True)
        every_query = torch.arange(q.shape[1], device=q.device)[None]
        out = torch.zeros_like(q)
        for length in lengths.unique().tolist():
            rows = (lengths == length).nonzero()
            keys = (rows, tokens[rows[:, 0], :length])
            queries = (rows, every_query) if self.cross_attn else keys
            out = out.index_put(queries, self._attend(q[queries], k[keys], v[keys]))
        return out

    def _forward_cached(self, x: torch.Tensor, mask: torch.Tensor | None, cache: KVCache) -> torch.Tensor:
        if self.cross_attn:
            raise RuntimeError("cache must be None: this module was built with cross_attn=True")
        check_cache(cache, self.inner_attn, (self.num_heads_kv, self.head_dim), x.shape[0])
        lengths = restore = None
        if mask is not None:
            _check_mask(mask, x)
            x = x.masked_fill(mask.logical_not()[:, :, None], 0.0)
            x, restore, lengths = real_tokens_first(x, mask)
        heads = attend_cached(*self._project(x, None), self.inner_attn, self.rotary_emb, cache, lengths)
        out: torch.Tensor = self.out_proj(heads.flatten(-2))
        if mask is None or restore is None:
            return out
        out = out.gather(1, restore[:, :, None].expand_as(out))
        return out.masked_fill(mask.logical_not()[:, :, None], 0.0)

    def _check_inputs(self, x: torch.Tensor, x_kv: torch.Tensor | None) -> None:
        check_tensors(x=x, **({} if x_kv is None else {"x_kv": x_kv}))
        layout = "(batch, seqlen, embed_dim)" if self.batch_first else "(seqlen, batch, embed_dim)"
        for name, value in (("x", x), ("x_kv", x_kv)):
            if value is not None and (value.dim() != 3 or value.shape[-1] != self.embed_dim):
                raise RuntimeError(
                    f"{name} must have shape {layout} with embed_dim {self.embed_dim}, "
                    f"got {tuple(value.shape)}"
                )
        if self.cross_attn and x_kv is None:
            raise RuntimeError("x_kv must be given: this module was built with cross_attn=True")
        if not self.cross_attn and x_kv is not None:
            raise RuntimeError("x_kv must be None: this module was built with cross_attn=False")
        batch_dim = 0 if self.batch_first else 1
        if x_kv is not None and x_kv.shape[batch_dim] != x.shape[batch_dim]:
            raise RuntimeError(
                f"x_kv must have x's batch size {x.shape[batch_dim]} at dimension {batch_dim}, "
                f"got shape {tuple(x_kv.shape)}"
            )


def _check_mask(mask: torch.Tensor, keys: torch.Tensor) -> None:
    check_tensors(key_padding_mask=mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"key_padding_mask must be bool, True for real tokens, got {mask.dtype}")
    if mask.shape != keys.shape[:2]:
        raise RuntimeError(
            f"key_padding_mask must have shape (batch, seqlen of the keys) = {tuple(keys.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )
    if mask.device != keys.device:
        raise RuntimeError(f"key_padding_mask must be on the input's device {keys.device}, got {mask.device}")


def _check_sizes(embed_dim: int, num_heads: int, num_heads_kv: int) -> None:
    if num_heads < 1 or embed_dim < 1 or embed_dim % num_heads:
        raise ValueError(
            f"embed_dim must be a positive multiple of num_heads, got {embed_dim} and {num_heads}"
        )
    if num_heads_kv < 1 or num_heads % num_heads_kv:
        raise ValueError(f"num_heads_kv must divide num_heads, got {num_heads_kv} and {num_heads}")


def _check_convertible(mha: nn.MultiheadAttention) -> None:
    same_width = (mha.kdim, mha.vdim) == (mha.embed_dim, mha.embed_dim)
    refused = {
        f"kdim={mha.kdim}, vdim={mha.vdim} with embed_dim={mha.embed_dim}": not same_width,
        "add_bias_kv=True": mha.bias_k is not None or mha.bias_v is not None,
        "add_zero_attn=True": mha.add_zero_attn,
    }
    for setting, is_set in refused.items():
        if is_set:
            raise ValueError(
                "mha must be an nn.MultiheadAttention with kdim = vdim = embed_dim and without add_bias_kv "
                f"and add_zero_attn, got one with {setting}"
            )
