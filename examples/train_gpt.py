"""Train the demo's tiny GPT with what PyTorch has for large ones: each is one switch.

    python examples/train_gpt.py --compile --checkpoint --autocast --export
    torchrun --nproc-per-node 2 examples/train_gpt.py --checkpoint   # FSDP2

Its exit status is 1 where the loss has not halved, where attention ran more than once a layer and step or in
another dtype, where the exported model computes something else, or where a process keeps more than its part.
"""

from __future__ import annotations

import argparse
import io
import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from demo import CONTEXT, TinyModel, fit, zen_of_python
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


def main(arguments: list[str] | None = None) -> int:
    """Train, report, and return 0 if everything held."""
    options = parse(arguments)
    torch.manual_seed(0)
    torch.set_num_threads(1)  # tensors this small gain nothing from threads that wait for each other
    device = torch.device(options.device)
    sharded = "RANK" in os.environ
    if sharded:
        device = start_process(device)
    text = zen_of_python()
    characters = sorted(set(text))
    data = torch.tensor([characters.index(c) for c in text], device=device)
    model = TinyModel(len(characters)).to(device)
    if options.checkpoint:
        model.blocks = nn.ModuleList(Checkpointed(block) for block in model.blocks)
    if sharded:
        shard(model)
    run: Any = torch.compile(model, fullgraph=True, backend=options.backend) if options.compile else model

    autocast = torch.autocast(device.type, torch.bfloat16, enabled=options.autocast)
    dtype = torch.bfloat16 if options.autocast else torch.float32
    losses = fit(run, data, options.steps, autocast)
    print(f"Loss from {losses[0]:.2f} to {losses[-1]:.2f}")
    held = losses[-1] < losses[0] / 2
    held &= attends_once_a_layer(model, data[None, :CONTEXT], autocast, dtype)
    if options.export:
        held &= survives_export(model, data)
    if sharded:
        held &= keeps_its_part(model)
        dist.destroy_process_group()
    return 0 if held else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the switches."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=150, help="of training (default: %(default)s)")
    parser.add_argument("--compile", action="store_true", help="run forward and backward as one graph each")
    parser.add_argument("--backend", default="inductor", help="of torch.compile (default: %(default)s)")
    parser.add_argument("--checkpoint", action="store_true", help="recompute blocks, but for attention")
    parser.add_argument("--autocast", action="store_true", help="compute in bfloat16, keep float32 weights")
    parser.add_argument("--export", action="store_true", help="save and load the trained model's graph")
    options = parser.parse_args(arguments)
    if "RANK" in os.environ and (options.compile or options.export):
        parser.error("--compile and --export are for one process: FSDP's hooks break a graph")
    return options


class Checkpointed(nn.Module):
    """A block that keeps its input and what attention computed, and computes the rest again when needed."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *arguments: Any) -> Any:
        """Call the block."""
        if not self.training:
            return self.block(*arguments)
        return checkpoint(self.block, *arguments, use_reentrant=False, context_fn=_keep_attention)


def _policy(_context: Any, operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
    # Attention costs the most to repeat and little to keep: its output is as large as its queries.
    if operator is torch.ops.fap.attention_forward.default:
        return CheckpointPolicy.MUST_SAVE
    return CheckpointPolicy.PREFER_RECOMPUTE


_keep_attention = partial(create_selective_checkpoint_contexts, _policy)


class WatchAttention(TorchDispatchMode):
    """Notes the dtype of each forward pass of attention."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtypes: list[torch.dtype] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the operator if it is attention's, and run it."""
        if func is torch.ops.fap.attention_forward.default:
            self.dtypes.append(args[0].dtype)
        return func(*args, **(kwargs or {}))


def attends_once_a_layer(
    model: TinyModel, characters: torch.Tensor, autocast: torch.autocast, dtype: torch.dtype
) -> bool:
    """Run one step; return whether each layer ran attention's forward once, in ``dtype``."""
    with WatchAttention() as watch:
        with autocast:
            loss = model(characters).sum()
        loss.backward()
    names = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in watch.dtypes}))
    count, layers = len(watch.dtypes), len(model.blocks)
    print(f"Attention's forward ran {count} times in one step of {layers} layers, in {names}")
    return bool(watch.dtypes == [dtype] * layers)


def survives_export(model: TinyModel, data: torch.Tensor) -> bool:
    """Save the model's graph for any batch and length, load it, and return whether it computes the same."""
    model.eval()
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("seqlen", max=4096)}
    example, other = data[: 2 * CONTEXT].view(2, CONTEXT), data[:60].view(3, 20)
    exported = torch.export.export(model, (example,), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    same = torch.allclose(loaded(other), model(other), rtol=1e-4, atol=1e-4)
    print(f"Exported, saved and loaded, it computes {'the same' if same else 'something else: WRONG'}")
    return same


def start_process(device: torch.device) -> torch.device:
    """Join the processes that torchrun started; return this one's device."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type != "cuda":
        return device
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def shard(model: TinyModel) -> None:
    """Spread the parameters over all processes, block by block, with FSDP2."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(next(model.parameters()).device.type, (dist.get_world_size(),))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def keeps_its_part(model: nn.Module) -> bool:
    """Return whether this process keeps no more of any parameter than an even share, rounded up."""
    n = dist.get_world_size()
    parameters: Any = model.parameters()  # DTensors since `shard`
    parts = [(parameter.to_local(), parameter) for parameter in parameters]
    kept = sum(part.numel() for part, _ in parts)
    print(f"This process keeps {kept} of {sum(whole.numel() for _, whole in parts)} parameters")
    return all(part.shape[0] <= -(-whole.shape[0] // n) for part, whole in parts)


if __name__ == "__main__":
    raise SystemExit(main())
