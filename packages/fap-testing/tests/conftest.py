"""An attention written apart from the oracle, for the suite to judge: right, or with one named bug."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch


@dataclass(frozen=True)
class EagerAttention:
    """flash_attn_func in plain PyTorch, in float32 at least; ``bug`` breaks it in one way."""

    bug: str = ""

    def __call__(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        if self.bug != "accepts_anything":
            check_arguments(q, k, v, dropout_p, softmax_scale, window_size, softcap, alibi_slopes)
        tensors = [self._mangle(x) for x in (q, k, v)]
        if self.bug == "slopes_must_be_contiguous" and alibi_slopes is not None:
            contiguous = torch.empty(alibi_slopes.shape, device="meta").stride()
            alibi_slopes = alibi_slopes.as_strided(alibi_slopes.shape, contiguous)
        scores = self._scores(*tensors[:2], softmax_scale, softcap, alibi_slopes, causal)
        keep = self._keep(q, k, [int(bound) for bound in window_size], causal)
        p, lse = self._softmax(scores, keep)
        weights, dropped = self._dropout(p, dropout_p)
        if self.bug == "lse_after_dropout" and dropout_p:
            lse = lse + torch.log(1e-6 + weights.sum(-1))
        value = self._heads(tensors[2], q.shape[2])
        out = (weights @ value).transpose(1, 2).to(q.dtype).contiguous()
        if self.bug == "lse_gradient_zero":
            lse = lse.detach() + 0.0 * p.sum(-1)
        if self.bug == "random_noise":
            out = out * (1.0 + 1e-6 * torch.rand(()))
        if self.bug == "writes_inputs_without_gradients" and not out.requires_grad:
            q.mul_(0.5)
        if self.bug == "writes_inputs_without_lse" and not (return_attn_probs or out.requires_grad):
            q.mul_(0.5)
        if self.bug == "gradients_off_by_a_thousandth" or (
            self.bug == "deterministic_gradients_off" and deterministic
        ):
            out = out.detach() + 1.001 * (out - out.detach())
        if self.bug == "dout_must_be_contiguous":
            out = _ReadsContiguousGradient.apply(out)
        if not return_attn_probs and self.bug != "always_returns_lse":
            return out
        return (
            out,
            lse.to(torch.float64 if self.bug == "lse_float64" else torch.float32),
            self._s_dmask(p.to(q.dtype), dropped),
        )

    def _mangle(self, x):
        wide = torch.promote_types(x.dtype, torch.float32)
        if self.bug == "assumes_contiguous":
            x = x.as_strided(x.shape, torch.empty(x.shape, device="meta").stride())
        if self.bug == "reads_past_the_end" and x.numel():
            following = x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel())
            x = x + 0.0 * following
        if self.bug == "writes_past_the_end" and x.numel():
            x.detach().as_strided((1,), (1,), x.storage_offset() + x.numel()).fill_(0.0)
        if self.bug == "writes_inputs":
            x.detach().mul_(0.5)
        if self.bug == "bfloat16_inside":
            return x.to(torch.bfloat16).to(wide)
        return x.to(wide)

    def _heads(self, x, nheads):
        heads = torch.arange(nheads)
        source = heads % x.shape[2] if self.bug == "gqa_interleaved" else heads // (nheads // x.shape[2])
        x = x.transpose(1, 2)[:, source]
        if self.bug == "gqa_gradient_of_one_head":
            first = (heads % (nheads // (int(source.max()) + 1)) == 0)[:, None, None]
            return torch.where(first, x, x.detach())
        return x

    def _scores(self, q, k, softmax_scale, softcap, alibi_slopes, causal):
        head_dim = q.shape[-1]
        if softmax_scale is None or self.bug == "softmax_scale_ignored":
            padded = (
                2 ** math.ceil(math.log2(head_dim)) if self.bug == "scale_of_padded_head_dim" else head_dim
            )
            softmax_scale = 1.0 / math.sqrt(padded)
        if self.bug == "scale_missing":
            softmax_scale = 1.0
        if self.bug == "scale_0_is_default":
            softmax_scale = softmax_scale or 1.0 / math.sqrt(head_dim)
        scores = torch.einsum("bihd,bhjd->bhij", q, self._heads(k, q.shape[2])) * softmax_scale
        bias = 0.0
        if alibi_slopes is not None:
            i = torch.arange(q.shape[1])[:, None] + k.shape[1] - q.shape[1]
            j = torch.arange(k.shape[1])[None, :]
            distance = (
                (j - i).abs()
                if self.bug != "alibi_from_top_left"
                else (j - torch.arange(q.shape[1])[:, None]).abs()
            )
            if self.bug == "alibi_causal_shortcut" and causal:
                distance = -j
            bias = (
                alibi_slopes.reshape(-1, q.shape[2], 1, 1)
                * distance
                * (1.0 if self.bug == "alibi_sign" else -1.0)
            )
        if self.bug == "softcap_after_alibi":
            scores, bias = scores + bias, 0.0
        if softcap and self.bug != "softcap_ignored":
            x = scores / softcap
            # The textbook formula: inf / inf for large x.
            overflowing = self.bug == "softcap_overflows"
            scores = softcap * (
                (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()) if overflowing else torch.tanh(x)
            )
        return scores + bias

    def _keep(self, q, k, window, causal):
        (_, seqlen_q, _, _), (_, seqlen_k, _, _) = q.shape, k.shape
        left, right = window
        if causal:
            right = right if self.bug == "causal_keeps_right" and right >= 0 else 0
        if self.bug == "window_clamped":
            left, right = (-1 if left >= seqlen_k else left), (-1 if right >= seqlen_k else right)
        offset = 0 if self.bug == "causal_top_left" else seqlen_k - seqlen_q
        left += (self.bug == "window_left_off_by_one") * (left >= 0)
        right -= (self.bug == "window_right_off_by_one") * (right > 0)
        keep = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool)
        if left >= 0:
            keep = keep.triu(offset - left)
        if right >= 0:
            keep = keep.tril(offset + right)
        return keep

    def _softmax(self, scores, keep):
        wide = scores.masked_fill(~keep, -1e30 if self.bug == "keyless_rows_average" else -math.inf)
        if self.bug == "keyless_rows_nan":
            return torch.softmax(wide, -1), torch.logsumexp(wide, -1)
        top = wide.detach().amax(-1, keepdim=True) if wide.shape[-1] else wide.new_zeros(*wide.shape[:-1], 1)
        top = torch.where(top.isinf(), 0.0, torch.zeros_like(top) if self.bug == "no_maximum" else top)
        e = torch.exp(wide - top)
        total = e.sum(-1, keepdim=True)
        found = total > 0.0
        total = torch.where(found, total, 1.0)
        empty = -math.inf if self.bug == "lse_minus_inf" else math.inf
        lse = torch.where(found, top + torch.log(total), empty)[..., 0]
        return e / total, lse / math.log(2.0) if self.bug == "lse_base_2" else lse

    def _dropout(self, p, dropout_p):
        if not dropout_p:
            return p, None
        shape = (1, *p.shape[1:]) if self.bug == "dropout_same_in_batch" else p.shape
        fixed = torch.Generator().manual_seed(0) if self.bug == "dropout_fixed_seed" else None
        drop_p = dropout_p / 2 if self.bug == "dropout_too_little" else dropout_p
        dropped = (torch.rand(shape, generator=fixed) < drop_p).expand(p.shape)
        rescale = 1.0 if self.bug == "dropout_not_rescaled" else 1.0 / (1.0 - dropout_p)
        if self.bug == "dropout_unreported":
            return p, dropped
        return (p * rescale).masked_fill(dropped, 0.0), dropped

    def _s_dmask(self, p, dropped):
        if dropped is None:
            return p if self.bug == "s_dmask_without_dropout" else p.new_empty(0)
        if self.bug == "s_dmask_sign_swapped":
            dropped = ~dropped
        i, j = p.shape[2:]
        rows, columns = (
            (i, j) if self.bug == "s_dmask_not_padded" else (-(-i // 128) * 128, -(-j // 128) * 128)
        )
        padded = p.new_zeros(*p.shape[:2], rows, columns)
        # Not by `pad`, which PyTorch 2.8 refuses where a side is 0.
        padded[..., :i, :j] = torch.where(dropped, -p, p).detach()
        return padded


class _ReadsContiguousGradient(torch.autograd.Function):
    """Reads the incoming gradient's memory as if it were contiguous."""

    @staticmethod
    def forward(ctx: Any, x):
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dx):
        contiguous = torch.empty(dx.shape, device="meta").stride()
        if dx.untyped_storage().nbytes() // dx.element_size() < dx.numel():
            return torch.zeros_like(dx)
        return dx.as_strided(dx.shape, contiguous)


def check_arguments(q, k, v, dropout_p, softmax_scale, window_size, softcap, alibi_slopes):
    """Refuse every mistake with a message that names the argument and what was given."""
    check_tensors(q, k, v)
    check_options(dropout_p, softmax_scale, window_size, softcap)
    if alibi_slopes is not None:
        check_slopes(alibi_slopes, q)


def check_tensors(q, k, v):
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise RuntimeError(f"{name} must have 4 dimensions, got shape {tuple(x.shape)}")
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise RuntimeError(f"dtype of {name} must be floating and q's {q.dtype}, got {x.dtype}")
        if x.device != q.device:
            raise RuntimeError(f"device of {name} must be q's {q.device}, got {x.device}")
        if x.shape[0] != q.shape[0] or x.shape[3] != q.shape[3]:
            raise RuntimeError(
                f"batch and head dim of {name} must be q's {tuple(q.shape)}, got {tuple(x.shape)}"
            )
    if not 1 <= q.shape[3] <= 256:
        raise RuntimeError(f"head dim must be in 1..256, got {q.shape[3]}")
    if k.shape != v.shape:
        raise RuntimeError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise RuntimeError(f"heads of k and v must divide q's {q.shape[2]}, got {k.shape[2]}")


def check_options(dropout_p, softmax_scale, window_size, softcap):
    for name, x in (("dropout_p", dropout_p), ("softcap", softcap), ("softmax_scale", softmax_scale or 0.0)):
        if not isinstance(x, (int, float)) or not math.isfinite(x):
            raise TypeError(f"{name} must be a finite number, got {x!r}")
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be in [0, 1), got {dropout_p}")
    if softcap < 0.0:
        raise ValueError(f"softcap must be at least 0, got {softcap}")
    bounds = window_size.tolist() if isinstance(window_size, torch.Tensor) else window_size
    if (
        not isinstance(bounds, (list, tuple))
        or len(bounds) != 2
        or not all(isinstance(n, int) for n in bounds)
    ):
        raise ValueError(f"window_size must be two integers, got {window_size!r}")


def check_slopes(alibi_slopes, q):
    if not isinstance(alibi_slopes, torch.Tensor):
        raise TypeError(f"alibi_slopes must be a tensor, got {type(alibi_slopes).__name__}")
    if (alibi_slopes.dtype, alibi_slopes.device) != (torch.float32, q.device):
        raise RuntimeError(
            f"alibi_slopes must be float32 on {q.device}, got {alibi_slopes.dtype} on {alibi_slopes.device}"
        )
    shape = tuple(alibi_slopes.shape)
    if shape not in (q.shape[2:3], (q.shape[0], q.shape[2])):
        raise RuntimeError(
            f"alibi_slopes must be (nheads,) or (batch, nheads) of q {tuple(q.shape)}, got {shape}"
        )


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Tensors this small lose time to threads: on a busy machine, a factor of twenty."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def eager_attention():
    return EagerAttention
