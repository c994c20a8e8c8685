"""From checked tensors to a kernel launch: what the kernels of this package have in common as arguments.

A launch is a value. Running it is the last step, so that tests can compile what would run, for a GPU
that is not there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from .head_dim import split_head_dim
from .packing import slot_count

if TYPE_CHECKING:
    from collections.abc import Iterator

    from .cache import Cache
    from .packing import Packing
    from .problem import AttentionProblem
    from .target import Target

__all__ = [
    "UNSPECIALIZED",
    "Launch",
    "descriptor_fields",
    "descriptors_fit",
    "key_arguments",
    "option_arguments",
    "packing_arguments",
    "page_arguments",
    "part_arguments",
    "row_arguments",
    "score_arguments",
    "strides_of",
]

MOST_ROWS = 1 << 30
"""Of a tensor whose packed rows are fetched by descriptor: ``fap_kernels.language.rows.WRAPPING_ROWS``."""

UNSPECIALIZED = (
    "nheads",
    "nheads_k",
    "entries",
    "slots",
    "group",
    "seqlen_q",
    "seqlen_k",
    "rows_stored",
    "rows_swept",
    "columns_stored",
    "window_left",
    "window_right",
    "alibi_stride",
    "keep_threshold",
    "cache_rows",
    "rows_added",
    "table_stride",
    "page_bits",
    "splits",
    "table_rows",
    "capacity",
    "offset",
    "seqlen",
    "seqlen_new",
    "lse_rows",
    "tile_count",
    "items",
    "heads_beside",
    "lag",
    "lead",
    "first_tile",
    "progress_count",
)
"""Numbers whose value must never make Triton compile again."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch that has not happened yet.

    Attributes:
        kernel: a ``@triton.jit`` function.
        programs: size of the one-dimensional grid; 0 means that there is nothing to do.
        arguments: the kernel's arguments by name, constexprs included.
        num_warps: warps of one program.
        maxnreg: registers of a thread at most, so that several programs fit a multiprocessor; None for what
            the compiler takes.
        overlap: start while the kernel before it still runs. The kernel must wait for it by itself before it
            reads a result; only chips whose target says so can do it.
        cluster: so many programs, of numbers side by side, run at the same time on multiprocessors that reach
            each other's shared memory; ``programs`` is a multiple of it.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    overlap: bool = False
    maxnreg: int | None = None
    cluster: int = 1

    @property
    def values(self) -> list[Any]:
        """The arguments in the kernel's order."""
        return [self.arguments[parameter.name] for parameter in self.kernel.params]

    @property
    def grid(self) -> tuple[int, int, int]:
        """What Triton's launcher is told, to which those of a cluster are one program."""
        return self.programs // self.cluster, 1, 1

    def options(self) -> dict[str, Any]:
        """What the compiler is told besides the arguments."""
        # Said outright, since Triton 3.9 warns that its default is about to change: a * b + c rounded once.
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if self.overlap:
            options["launch_pdl"] = True
        if self.maxnreg is not None:
            options["maxnreg"] = self.maxnreg
        return options

    def run(self, device: torch.device) -> Any:
        """Launch on the current stream of ``device``; return what Triton compiled, None if nothing ran."""
        if self.programs == 0:
            return None
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):
                return self._run()
        return self._run()

    def _run(self) -> Any:
        options = self.options()
        if self.cluster == 1:
            return self.kernel[self.grid](**self.arguments, **options)
        compiled = self.kernel.warmup(grid=self.grid, **self.arguments, **options)
        if hasattr(compiled, "result"):  # Triton compiles in the background
            compiled = compiled.result()
        # What Triton calls num_ctas forms clusters too, but in what it compiles for them the programs of a
        # cluster are one. So it compiles for one, and its launcher alone is told of more.
        num_warps, _, *others = compiled.packed_metadata
        compiled.packed_metadata = (num_warps, self.cluster, *others)
        # This very one: another thread may have compiled it as well, and put its own in the kernel's cache.
        compiled[self.grid](*self.values)
        return compiled

    def compile(self, device: torch.device) -> None:
        """Have Triton compile it for a GPU, and keep that for :meth:`run`. Any thread may do it."""
        with torch.cuda.device(device):
            self.kernel.warmup(grid=self.grid, **self.arguments, **self.options())


def part_arguments(head_dim: int) -> dict[str, int]:
    """The constexprs that describe the head dimension."""
    part0, part1 = split_head_dim(head_dim)
    return {"HEAD_DIM": head_dim, "PART0": part0, "PART1": part1}


def strides_of(x: torch.Tensor) -> tuple[int, int, int]:
    """Strides of (batch, seqlen, nheads) in elements.

    Of a single batch entry, as packed sequences are, the first is never used, and would make Triton compile
    again for totals that it is not a multiple of 16 for.
    """
    return 0 if x.shape[0] == 1 else x.stride(0), x.stride(1), x.stride(2)


def descriptors_fit(target: Target, *tensors: torch.Tensor) -> bool:
    """Whether the TMA unit can fetch tiles of all these ``(batch, seqlen, nheads, head_dim)`` tensors.

    It needs 16-byte aligned addresses and strides, and no empty or repeated (stride 0) dimension.
    """
    return target.descriptors and all(_descriptor_fits(x) for x in tensors)


def _descriptor_fits(x: torch.Tensor) -> bool:
    size = x.element_size()
    return (
        x.numel() > 0
        and x.shape[1] <= MOST_ROWS
        and x.data_ptr() % 16 == 0
        and all(
            count == 1 or (stride > 0 and stride * size % 16 == 0)
            for count, stride in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
    )


def row_arguments(
    name: str, x: torch.Tensor, rows: int, parts: tuple[int, int], use_descriptors: bool, packed: bool
) -> dict[str, Any]:
    """The arguments by which a kernel loads tiles of ``rows`` rows of ``x``: by descriptor or by address."""
    part0 = _descriptor(x, rows, parts[0], packed) if use_descriptors else None
    part1 = _descriptor(x, rows, parts[1], packed) if use_descriptors and parts[1] else None
    return {
        name: None if use_descriptors else x,
        f"{name}_strides": None if use_descriptors else strides_of(x),
        f"{name}_part0": part0,
        f"{name}_part1": part1,
    }


def packing_arguments(packing: Packing | None) -> dict[str, torch.Tensor | None]:
    """The arguments by which a kernel finds packed sequences."""
    if packing is None:
        return dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k"))
    return dict(packing.arguments())


def tiles_of(
    packing: Packing | None, x: torch.Tensor, batch: int, seqlen: int, rows: int
) -> tuple[int, dict[str, int | None]]:
    """How many tiles of ``rows`` rows a head of ``x`` has in all entries, and what tells which is whose.

    Where entries lie packed, these are the slots of :class:`fap_kernels.language.spans.Slots`.

    Args:
        x: q, or k, as the kernel takes it: packed sequences are one batch entry.
        seqlen: of each of its entries, if they are not packed.
    """
    if packing is None:
        return batch * -(-seqlen // rows), {"entries": None, "slots": None}
    slots = slot_count(x.shape[1], packing.batch, rows)
    return slots, {"entries": packing.batch, "slots": slots}


def key_arguments(
    k: torch.Tensor, v: torch.Tensor, rows: int, parts: tuple[int, int], target: Target,
    packing: Packing | None, cache: Cache | None,
) -> dict[str, Any]:  # fmt: skip
    """The arguments by which a kernel loads tiles of ``rows`` keys and values, wherever they lie."""
    pages = cache or packing
    paged = pages is not None and pages.block_table is not None
    cache_rows = None if cache is None or paged else _rows_between_entries(k, v)
    use_descriptors = (
        descriptors_fit(target, k, v) and not paged and (cache is None or cache_rows is not None)
    )
    packed = packing is not None or cache is not None
    arguments = {
        **row_arguments("k", k, rows, parts, use_descriptors, packed),
        **row_arguments("v", v, rows, parts, use_descriptors, packed),
        "cu_seqlens_k": None if packing is None else packing.cu_seqlens_k,
        "seqused_k": None if packing is None else packing.seqused_k,
        "cache_rows": cache_rows if use_descriptors else None,
        **dict.fromkeys(("cache_batch_idx", "cache_leftpad", "rows_added")),
        **page_arguments(pages),
    }
    if cache is not None:
        arguments["seqused_k"] = cache.seqlens
        arguments["cache_batch_idx"] = cache.batch_idx
        arguments["cache_leftpad"] = cache.leftpad
        arguments["rows_added"] = cache.seqlen_new if cache.seqlens is not None else 0
    return arguments


def page_arguments(pages: Packing | Cache | None) -> dict[str, Any]:
    """The arguments by which a kernel finds the page of a key."""
    if pages is None or pages.block_table is None:
        return dict.fromkeys(("block_table", "table_stride", "page_bits"))
    return {
        "block_table": pages.block_table,
        "table_stride": pages.block_table.stride(0),
        "page_bits": pages.page_size.bit_length() - 1,
    }


def _rows_between_entries(k: torch.Tensor, v: torch.Tensor) -> int | None:
    """How many rows after an entry of a cache the next one starts, if k and v agree on a whole number."""
    distances = {
        x.stride(0) // x.stride(1)
        if x.shape[1] > 1 and x.stride(1) > 0 and x.stride(0) % x.stride(1) == 0
        else None
        for x in (k, v)
    }
    return distances.pop() if len(distances) == 1 else None


def _descriptor(x: torch.Tensor, rows: int, columns: int, packed: bool) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(x, *descriptor_fields(x, rows, columns, packed))


def descriptor_fields(
    x: torch.Tensor, rows: int, columns: int, packed: bool
) -> tuple[list[int], list[int], list[int]]:
    """Shape, strides and block of the descriptor that fetches tiles of ``x``.

    The tile's two sides come last, so that loading a tile drops the leading dimensions for free.
    """
    batch, seqlen, nheads, head_dim = x.shape
    stride_b, stride_s, stride_h = _descriptor_strides(x)
    if not packed:
        return [batch, nheads, seqlen, head_dim], [stride_b, stride_h, stride_s, 1], [1, 1, rows, columns]
    # fap_kernels.language.rows says how it works.
    wrap = 2**34 // x.element_size() - stride_s
    anything = 2**31 - 1
    return (
        [anything, anything, nheads, MOST_ROWS, head_dim],
        [wrap, stride_s, stride_h, stride_s, 1],
        [1, 1, 1, rows, columns],
    )


def _descriptor_strides(x: torch.Tensor) -> Iterator[int]:
    aligned = 16  # elements, since Triton 3.4's interpreter counts in them what a GPU counts in bytes
    for count, stride in zip(x.shape[:3], x.stride()[:3], strict=True):
        yield stride if count > 1 else aligned


def option_arguments(
    problem: AttentionProblem, alibi_slopes: torch.Tensor | None, rng_state: torch.Tensor | None
) -> dict[str, Any]:
    """The arguments by which a kernel knows the call's options; what is off is None."""
    dropout = problem.dropout_p > 0.0
    return {
        **score_arguments(problem, alibi_slopes),
        "rng_state": rng_state if dropout else None,
        "keep_threshold": math.floor(255 * (1.0 - problem.dropout_p)) if dropout else None,
        "keep_scale": 1.0 / (1.0 - problem.dropout_p) if dropout else None,
    }


def score_arguments(problem: AttentionProblem, alibi_slopes: torch.Tensor | None) -> dict[str, Any]:
    """Those of them that a kernel without dropout takes."""
    if alibi_slopes is not None:
        alibi_slopes = alibi_slopes.contiguous()
    return {
        "alibi_slopes": alibi_slopes,
        "alibi_stride": problem.nheads if problem.alibi == "batch_head" else 0,
        "group": problem.nheads // problem.nheads_k,
        "seqlen_q": problem.seqlen_q,
        "seqlen_k": problem.seqlen_k,
        "window_left": _bound(problem, problem.window_left),
        "window_right": _bound(problem, problem.window_right),
        "softmax_scale": problem.softmax_scale,
        "softcap": problem.softcap or None,
        "FOLD_SCALE": problem.softcap == 0.0 and problem.alibi is None and problem.softmax_scale > 0.0,
    }


def _bound(problem: AttentionProblem, window: int) -> int | None:
    # No distance exceeds the sum of the lengths; a larger bound would overflow the kernels' 32-bit positions.
    return None if window < 0 else min(window, problem.seqlen_q + problem.seqlen_k)
