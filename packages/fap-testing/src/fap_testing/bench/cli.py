"""The subcommands of ``fap-bench`` that measure; those that read records are in ``cli_records``."""

from __future__ import annotations

from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fap_testing.bench import cli_records, options
from fap_testing.bench.decode import Decode
from fap_testing.bench.measure import measure_point
from fap_testing.bench.memory import measure_memory
from fap_testing.bench.options import Choice
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.run import run
from fap_testing.bench.timing import CpuTimer, CudaTimer, GraphTimer, HostTimer
from fap_testing.bench.varlen import Varlen, lognormal_lengths

if TYPE_CHECKING:
    from fap_testing.bench.run import Measure
    from fap_testing.bench.timing import Timer

__all__ = ["app"]

_GPU_TOKENS, _CPU_TOKENS, _CPU_QUICK_TOKENS = 16384, 2048, 1024
_GPU_WIDTH, _CPU_WIDTH, _CPU_QUICK_WIDTH = 2048, 512, 256  # nheads * head_dim
_PACKED_TOKENS = 65536
_LONGEST_SEQUENCE = 16384

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Measure attention implementations side by side. Every result is checked before it is timed.",
)


@app.command()
def prefill(
    head_dims: options.HeadDims = "",
    seqlens: options.Seqlens = "",
    causal: options.Causal = None,
    window: options.Window = "",
    direction: options.Directions = "fwd,bwd",
    group: options.Group = 1,
    dtype: options.Dtype = "",
    peers: options.Peers = "",
    backend: options.Backend = "auto",
    device: options.Device = "",
    quick: options.Quick = False,
    jobs: options.Jobs = 0,
    commit: options.Commit = "",
    json: options.Json = None,
    csv: options.Csv = None,
    plot: options.Plot = None,
) -> None:
    """Dense self-attention: TFLOP/s over sequences of one length, the number of tokens held constant."""
    choice = _choice("prefill", peers, backend, dtype, device, quick, jobs, commit, json, csv, plot)
    default_dims = choice.pick(gpu="64,128,256", gpu_quick="64,128", cpu="64,128", cpu_quick="64")
    default_lengths = choice.pick(
        gpu="512,1024,2048,4096,8192,16384", gpu_quick="2048,16384", cpu="128,512,2048", cpu_quick="128,512"
    )
    tokens, width = _scale(choice)
    points = [
        Prefill.of_tokens(head_dim, seqlen, tokens=tokens, width=width, group=group, **mask)
        for head_dim in options.numbers(head_dims or default_dims, "--head-dims")
        for mask in _masks(choice, causal, window)
        for seqlen in options.numbers(seqlens or default_lengths, "--seqlens")
    ]
    run(choice, points, options.directions(direction), _timed(choice), tokens=tokens, width=width)


@app.command()
def varlen(
    head_dims: options.HeadDims = "",
    seqlens: Annotated[
        str,
        typer.Option(
            help="Lengths, separated by commas: a number packs sequences of that length, "
            "mixed packs lengths of a log-normal distribution.",
            show_default="by device",
        ),
    ] = "",
    causal: options.Causal = None,
    window: options.Window = "",
    direction: options.Directions = "fwd,bwd",
    group: options.Group = 1,
    dtype: options.Dtype = "",
    peers: options.Peers = "",
    backend: options.Backend = "auto",
    device: options.Device = "",
    quick: options.Quick = False,
    jobs: options.Jobs = 0,
    commit: options.Commit = "",
    json: options.Json = None,
    csv: options.Csv = None,
    plot: options.Plot = None,
) -> None:
    """Packed sequences without padding: TFLOP/s of the pairs that count."""
    choice = _choice("varlen", peers, backend, dtype, device, quick, jobs, commit, json, csv, plot)
    default_dims = choice.pick(gpu="64,128,256", gpu_quick="128", cpu="64", cpu_quick="64")
    default_lengths = choice.pick(
        gpu="512,2048,mixed", gpu_quick="mixed", cpu="128,mixed", cpu_quick="128,mixed"
    )
    tokens, width = _scale(choice, gpu=_PACKED_TOKENS)
    points = [
        Varlen.of_lengths(lengths, head_dim, width=width, group=group, **mask)
        for head_dim in options.numbers(head_dims or default_dims, "--head-dims")
        for mask in _masks(choice, causal, window)
        for lengths in _packed_lengths(seqlens or default_lengths, tokens)
    ]
    run(choice, points, options.directions(direction), _timed(choice), tokens=tokens, width=width)


@app.command()
def decode(
    head_dims: options.HeadDims = "",
    seqlens: options.Seqlens = "",
    batches: Annotated[
        str,
        typer.Option(
            help="Batch sizes, separated by commas; or BATCHxSEQLEN of each point, without --seqlens.",
            show_default="by device",
        ),
    ] = "",
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    group: options.Group = 8,
    queries: Annotated[int, typer.Option(min=1, help="New queries of each sequence.")] = 1,
    page_sizes: Annotated[
        str, typer.Option(help="Keys in a page of the cache, separated by commas; 0 for no pages.")
    ] = "0",
    ragged: Annotated[
        bool, typer.Option("--ragged", help="Lengths from a quarter of --seqlens up to it.")
    ] = False,
    graph: Annotated[
        bool,
        typer.Option("--graph", help="Replay calls from a CUDA graph, as servers do. Needs a GPU."),
    ] = False,
    dtype: options.Dtype = "",
    peers: options.Peers = "",
    backend: options.Backend = "auto",
    device: options.Device = "",
    quick: options.Quick = False,
    jobs: options.Jobs = 0,
    commit: options.Commit = "",
    json: options.Json = None,
    csv: options.Csv = None,
    plot: options.Plot = None,
) -> None:
    """A few new queries against a KV cache, causal: microseconds, and GB/s of the keys and values read."""
    choice = _choice("decode", peers, backend, dtype, device, quick, jobs, commit, json, csv, plot)
    if graph and not choice.on_gpu:
        raise typer.BadParameter("--graph needs a GPU, and this run is on the CPU")
    default_dims = choice.pick(gpu="64,128", gpu_quick="128", cpu="64", cpu_quick="64")
    default_lengths = choice.pick(gpu="1024,8192,65536", gpu_quick="8192", cpu="512,2048", cpu_quick="512")
    default_batches = choice.pick(gpu="1,16,64", gpu_quick="1,16", cpu="4", cpu_quick="2")
    points = [
        Decode(
            lengths=_cache_lengths(seqlen, batch, ragged=ragged),
            seqlen_q=queries,
            page_size=page_size,
            nheads=kv_heads * group,
            nheads_k=kv_heads,
            head_dim=head_dim,
            causal=True,
            dtype=choice.dtype,
            device=choice.device,
        )
        for head_dim in options.numbers(head_dims or default_dims, "--head-dims")
        for batch, seqlen in _cache_sizes(batches or default_batches, seqlens, default_lengths)
        for page_size in options.numbers(page_sizes, "--page-sizes", least=0)
    ]
    timer = GraphTimer() if graph else None
    run(choice, points, ["fwd"], _timed(choice, timer), graph=graph)


@app.command()
def overhead(
    causal: Annotated[bool, typer.Option("--causal/--full", help="With or without a causal mask.")] = False,
    dtype: options.Dtype = "",
    peers: options.Peers = "",
    backend: options.Backend = "auto",
    device: options.Device = "",
    quick: options.Quick = False,
    jobs: options.Jobs = 0,
    commit: options.Commit = "",
    json: options.Json = None,
    csv: options.Csv = None,
    plot: options.Plot = None,
) -> None:
    """Host microseconds per call for a tiny problem, 1 x 128 x 8 x 64, at each layer.

    fwd is a forward call without a graph, fwd+grad one that records it, bwd a backward call.
    """
    choice = _choice("overhead", peers, backend, dtype, device, quick, jobs, commit, json, csv, plot)
    point = Prefill(
        batch=1,
        seqlen_q=128,
        seqlen_k=128,
        nheads=8,
        nheads_k=8,
        head_dim=64,
        causal=causal,
        dtype=choice.dtype,
        device=choice.device,
    )
    run(choice, [point], ["fwd", "fwd+grad", "bwd"], _timed(choice, HostTimer(choice.device)))


@app.command()
def memory(
    head_dims: options.HeadDims = "128",
    seqlens: options.Seqlens = "",
    causal: options.Causal = None,
    direction: options.Directions = "fwd,both",
    group: options.Group = 1,
    dtype: options.Dtype = "",
    peers: options.Peers = "",
    backend: options.Backend = "auto",
    device: options.Device = "",
    quick: options.Quick = False,
    jobs: options.Jobs = 0,
    commit: options.Commit = "",
    json: options.Json = None,
    csv: options.Csv = None,
    plot: options.Plot = None,
) -> None:
    """Bytes beyond the inputs at the peak of a call, as one sequence grows."""
    choice = _choice("memory", peers, backend, dtype, device, quick, jobs, commit, json, csv, plot)
    default_lengths = choice.pick(
        gpu="1024,4096,16384,65536", gpu_quick="2048,16384", cpu="512,1024,2048,4096", cpu_quick="512,2048"
    )
    _, width = _scale(choice)
    points = [
        Prefill.of_tokens(head_dim, seqlen, tokens=seqlen, width=width, group=group, **mask)
        for head_dim in options.numbers(head_dims, "--head-dims")
        for mask in _masks(choice, causal, "")
        for seqlen in options.numbers(seqlens or default_lengths, "--seqlens")
    ]
    run(choice, points, options.directions(direction), measure_memory, width=width)


for _command in (cli_records.show, cli_records.compare, cli_records.check, cli_records.plot):
    app.command()(_command)


def _choice(
    command: str,
    peers: str,
    backend: str,
    dtype: str,
    device: str,
    quick: bool,
    jobs: int,
    commit: str,
    json: Path | None,
    csv: Path | None,
    plot: Path | None,
) -> Choice:
    files = {"json": json, "csv": csv, "plot": plot}
    rest: dict[str, Any] = {"quick": quick, "jobs": jobs, "commit": commit, **files}
    return Choice.of(command, peers=peers, backend=backend, dtype=dtype, device=device, **rest)


def _timed(choice: Choice, timer: Timer | None = None) -> Measure:
    """Return what measures a point in time, by default in that of the device."""
    used = timer or (CudaTimer() if choice.on_gpu else CpuTimer())
    return lambda problem, peers, directions: measure_point(problem, peers, directions, used, choice.effort)


def _scale(choice: Choice, *, gpu: int = _GPU_TOKENS) -> tuple[int, int]:
    """Return how many tokens in all, and nheads * head_dim."""
    if choice.on_gpu:
        return gpu, _GPU_WIDTH
    return (_CPU_QUICK_TOKENS, _CPU_QUICK_WIDTH) if choice.quick else (_CPU_TOKENS, _CPU_WIDTH)


def _masks(choice: Choice, causal: bool | None, window: str) -> list[dict[str, Any]]:
    """Return the options of each mask that is asked for."""
    shared = {"window_size": options.bounds(window), "dtype": choice.dtype, "device": choice.device}
    return [{"causal": mask, **shared} for mask in ((False, True) if causal is None else (causal,))]


def _packed_lengths(text: str, tokens: int) -> list[tuple[int, ...]]:
    lengths: list[tuple[int, ...]] = []
    for name in options.names(text, "--seqlens"):
        if name == "mixed":
            lengths.append(lognormal_lengths(tokens, min(_LONGEST_SEQUENCE, max(1, tokens // 2))))
        else:
            (seqlen,) = options.numbers(name, "--seqlens (besides mixed)")
            lengths.append((seqlen,) * max(1, tokens // seqlen))
    return lengths


def _cache_sizes(batches: str, seqlens: str, default_lengths: str) -> list[tuple[int, int]]:
    """Return batch size and length of each point."""
    if "x" not in batches:
        lengths = options.numbers(seqlens or default_lengths, "--seqlens")
        return [(batch, seqlen) for batch in options.numbers(batches, "--batches") for seqlen in lengths]
    if seqlens:
        raise typer.BadParameter(f"--batches {batches} says the lengths already, got --seqlens {seqlens}")
    pairs = [name.split("x") for name in options.names(batches, "--batches")]
    if any(len(pair) != 2 or not all(pair) for pair in pairs):
        raise typer.BadParameter(f"--batches takes BATCHxSEQLEN for all points or for none, got {batches!r}")
    found = [options.numbers(",".join(pair), "--batches") for pair in pairs]
    return [(batch, seqlen) for batch, seqlen in found]


def _cache_lengths(seqlen: int, batch: int, *, ragged: bool) -> tuple[int, ...]:
    if not ragged or batch == 1:
        return (seqlen,) * batch
    shortest = max(1, seqlen // 4)
    return tuple(shortest + (seqlen - shortest) * i // (batch - 1) for i in range(batch))
