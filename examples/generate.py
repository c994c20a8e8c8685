"""Train the demo's tiny model, then stream what it writes, character by character, from a KV cache in pages.

Each character costs one pass over one token: the keys and values of all before it are in the cache. Past the
64 characters that the model was trained on at a time, it babbles.
"""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

import torch
from demo import TinyModel, fit, zen_of_python

from fap_nn import FlashMHA, KVCache

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE_SIZE = 16


def main(arguments: list[str] | None = None) -> int:
    """Train, stream, and return 0 if one pass over all of it finds every character the likeliest."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=150, help="of training (default: %(default)s)")
    parser.add_argument("--prompt", default="Beautiful is ", help="what to continue (default: %(default)r)")
    parser.add_argument("--length", type=int, default=50, help="characters to write (default: %(default)s)")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from threads that wait for each other

    text = zen_of_python()
    characters = sorted(set(text))
    unknown = sorted(set(options.prompt) - set(characters))
    if unknown or not options.prompt:
        parser.error(f"--prompt must have characters of the Zen of Python, and one at least, got {unknown}")
    model = TinyModel(len(characters)).to(device)
    data = torch.tensor([characters.index(c) for c in text], device=device)
    fit(model, data, options.steps, torch.autocast(device.type, enabled=False))
    model.eval()

    prompt = torch.tensor([characters.index(c) for c in options.prompt], device=device)
    print(f"\n{options.prompt}", end="", flush=True)
    start, written = time.perf_counter(), []
    for index in stream(model, prompt, options.length):
        written.append(index)
        print(characters[index], end="", flush=True)
    seconds = time.perf_counter() - start
    print(f"\n\n{len(written)} characters in {seconds:.2f} s, {len(written) / seconds:.0f} a second")
    agrees = is_likeliest(model, prompt, written)
    print("One pass without a cache", "writes the same" if agrees else "writes something else: WRONG")
    return 0 if agrees else 1


def make_caches(model: TinyModel, max_seqlen: int) -> list[KVCache]:
    """Return an empty cache for every attention layer of a model, for one sequence."""
    layers = (module for module in model.modules() if isinstance(module, FlashMHA))
    return [layer.make_cache(1, max_seqlen, PAGE_SIZE) for layer in layers]


def stream(model: TinyModel, prompt: torch.Tensor, length: int) -> Iterator[int]:
    """Yield the likeliest next character ``length`` times, each as soon as it is known."""
    caches = make_caches(model, len(prompt) + length)
    tokens = prompt
    for _ in range(length):
        with torch.no_grad():
            tokens = model(tokens[None], caches)[0, -1:].argmax(dim=-1)
        yield int(tokens)


def is_likeliest(model: TinyModel, prompt: torch.Tensor, written: list[int]) -> bool:
    """Whether one pass over prompt and text, without a cache, gives every written character the top logit.

    Two characters whose logits are equal within rounding may change places.
    """
    text = torch.cat((prompt, prompt.new_tensor(written)))
    with torch.no_grad():
        logits = model(text[None])[0, len(prompt) - 1 : -1].double()
    chosen = logits.gather(1, text[len(prompt) :, None])[:, 0]
    return bool((chosen >= logits.amax(dim=1) - 1e-2).all())


if __name__ == "__main__":
    raise SystemExit(main())
