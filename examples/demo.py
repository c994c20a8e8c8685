"""Run exact attention on this machine, judge it by a float64 oracle, and train a tiny model with it.

An example rather than a module of a package, as it uses all of them and no package may import fap-testing.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import io
import platform
import sys
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import fap_api
from fap_nn import FlashMHA, KVCache
from fap_testing.reference import attention_baseline_gradients, attention_reference_gradients
from fap_testing.tolerances import error_bound

if TYPE_CHECKING:
    from collections.abc import Sequence

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CONTEXT = 64


def main(arguments: list[str] | None = None) -> int:
    """Run both parts; return 0 if the error was within its bound and the loss fell by half."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 elsewhere")
    parser.add_argument("--steps", type=int, default=150, help="of training (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    dtype = DTYPES[options.dtype or ("fp32" if device.type == "cpu" else "bf16")]
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from threads that wait for each other

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    print(f"torch {torch.__version__}, {device} ({name}), {dtype}\n")
    is_exact = check_attention(device, dtype)
    is_learning = train(device, dtype, options.steps)
    return 0 if is_exact and is_learning else 1


def check_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Run causal GQA attention forward and backward, and print its errors against the oracle."""
    batch, seqlen, nheads, nheads_k, head_dim = 2, 256, 8, 2, 64
    q = torch.randn(batch, seqlen, nheads, head_dim, device=device, dtype=dtype, requires_grad=True)
    k, v = (
        torch.randn(batch, seqlen, nheads_k, head_dim, device=device, dtype=dtype, requires_grad=True)
        for _ in range(2)
    )
    dout = torch.randn_like(q)
    print(
        f"Causal attention: {seqlen} tokens, {nheads} query heads, {nheads_k} key heads, head dim {head_dim}"
    )
    print(fap_api.explain(q, k, v, causal=True))

    out = fap_api.flash_attn_func(q, k, v, causal=True)
    assert isinstance(out, torch.Tensor), "a tuple only with return_attn_probs"
    gradients = torch.autograd.grad(out, (q, k, v), dout)

    oracle = attention_reference_gradients(q, k, v, dout, causal=True)
    baseline = attention_baseline_gradients(q, k, v, dout, causal=True)
    print(
        "Largest error against the float64 oracle, and what is allowed (twice eager PyTorch's, and rounding):"
    )
    is_exact = True
    for what, ours in zip(("out", "dq", "dk", "dv"), (out, *gradients), strict=True):
        truth = getattr(oracle, what)
        error = (ours.double() - truth).abs().max().item()
        allowed = error_bound(truth, getattr(baseline, what), dtype=dtype).max_allowed
        within = error <= allowed
        is_exact &= within
        print(
            f"  {what:>3}  {error:.1e}  {'<=' if within else '> '} {allowed:.1e}{'' if within else '  WRONG'}"
        )
    return is_exact


class TinyModel(nn.Module):
    """A character model of two transformer blocks, about 80 thousand parameters."""

    def __init__(self, vocabulary: int, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, vocabulary))

    def forward(self, characters: torch.Tensor, caches: Sequence[KVCache] | None = None) -> torch.Tensor:
        """Return logits ``(batch, seqlen, vocabulary)`` for the character after each one given.

        With caches, one a block, the characters continue those that the caches hold.
        """
        x = self.embedding(characters)
        one_each: Sequence[KVCache | None] = caches or [None] * len(self.blocks)
        for block, cache in zip(self.blocks, one_each, strict=True):
            x = block(x, cache)
        logits: torch.Tensor = self.head(x)
        return logits


class Block(nn.Module):
    """Attention and a multilayer perceptron, each normalised before and added after."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = FlashMHA(width, num_heads=4, num_heads_kv=2, causal=True, rotary_emb_dim=16)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: torch.Tensor, cache: KVCache | None = None) -> torch.Tensor:
        """Map ``(batch, seqlen, width)`` to the same shape."""
        x = x + self.attention(self.norm(x), cache=cache)
        y: torch.Tensor = x + self.mlp(x)
        return y


def train(device: torch.device, dtype: torch.dtype, steps: int) -> bool:
    """Teach a character model the Zen of Python; return whether its loss fell to less than half."""
    text = zen_of_python()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text], device=device)
    model = TinyModel(len(characters)).to(device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
    print(f"\nTraining FlashMHA on the Zen of Python, {len(text)} characters")
    losses = fit(model, data, steps, autocast)
    with torch.no_grad(), autocast:
        sample = continue_text(model, data[:CONTEXT], 80)
    print("It goes on: " + "".join(characters[i] for i in sample.tolist()).replace("\n", " / "))
    fell = len(losses) > 0 and losses[-1] < losses[0] / 2
    print(f"Loss from {losses[0]:.2f} to {losses[-1]:.2f}" if losses else "No steps taken")
    return fell


def fit(model: nn.Module, data: torch.Tensor, steps: int, autocast: torch.autocast) -> list[float]:
    """Train on windows of CONTEXT characters of ``data`` and return the loss of every step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    with tqdm(range(steps), unit="step", file=sys.stdout) as progress:
        for _ in progress:
            starts = torch.randint(len(data) - CONTEXT, (16, 1), device=data.device)
            window = data[starts + torch.arange(CONTEXT + 1, device=data.device)]
            with autocast:
                logits = model(window[:, :-1])
            loss = F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.set_postfix(loss=f"{losses[-1]:.2f}")
    return losses


def continue_text(model: nn.Module, prompt: torch.Tensor, length: int) -> torch.Tensor:
    """Append the likeliest character ``length`` times and return what was appended."""
    text = prompt
    for _ in range(length):
        logits = model(text[None, -CONTEXT:])
        text = torch.cat((text, logits[0, -1].argmax()[None]))
    return text[len(prompt) :]


def zen_of_python() -> str:
    """Return the poem that every Python carries, and prints when it is first imported."""
    with contextlib.redirect_stdout(io.StringIO()):
        import this
    return codecs.decode(this.s, "rot13")


if __name__ == "__main__":
    raise SystemExit(main())
