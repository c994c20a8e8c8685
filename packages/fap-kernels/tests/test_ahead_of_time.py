"""Every row of the configuration tables compiles for its chip, within bounds, without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ahead_of_time import TRITON, Compiled, compile_launch, specialize

from fap_kernels import target as targets
from fap_kernels.backward.config import DKDV, DQ, padded_rows
from fap_kernels.backward.launch import BackwardInputs, plan_delta, plan_dkdv, plan_dq
from fap_kernels.cache import Cache
from fap_kernels.config import Row, choose
from fap_kernels.decode.config import DECODE, DECODE_MANY
from fap_kernels.decode.launch import plan_append, plan_decode
from fap_kernels.forward.config import FORWARD
from fap_kernels.forward.launch import plan_forward, plan_probabilities
from fap_kernels.launch import Launch
from fap_kernels.packing import Packing
from fap_kernels.problem import AttentionProblem
from fap_kernels.rotary.launch import plan_rotary

TABLES = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ}
TARGETS = {"sm_80": targets.SM_80, "sm_90": targets.SM_90, "sm_100": targets.SM_100, "gfx942": targets.GFX9}
EVERY_OPTION = {"window_size": (100, 50), "softcap": 30.0, "dropout_p": 0.1}
# The head dimension that a row is for, where it is not the largest that it holds.
HEAD_DIMS = {48: 40}

# Bytes a thread that a row may spill, stores and loads together: what assemblers from Triton 3.6 to 3.9 were
# seen to spill, and a margin. 16-bit rows for plain calls must not spill at all but for those named.
# What a row may spill is recorded where it was measured to be faster than the rows that spill less.
PLAIN_SPILLS = {
    ("dkdv", "sm_90", 160): 768,
    ("dkdv", "sm_90", 192): 768,
    ("dkdv", "sm_90", 256): 1024,
}
ALL_OPTIONS_SPILLS = 1024
ALL_OPTIONS_SPILLS_OF = {
    ("forward", "sm_80", 128): 1088,  # Triton 3.4: 1048
    ("forward", "sm_100", 64): 6144,  # Triton 3.5: 5624
    ("forward", "gfx9", 128): 2048,  # Triton 3.4: 1656
    ("dkdv", "sm_80", 256): 4096,  # Triton 3.4: 3236
}
SERIALISED = {(3, 5): {"forward-sm_90-64-plain-unbounded"}}
"""What a release of Triton hands to its assembler such that the products are serialised (C7515)."""
SLACK = 32  # a register or two, as assemblers happen to differ
FLOAT32_SPILLS = {64: SLACK, 128: 2048, 256: 24576}


def rows() -> list[Any]:
    return [
        pytest.param(kernel, row, id=f"{kernel}-{row.family}-{row.head_dim}-{_kind(row)}")
        for kernel, table in TABLES.items()
        for row in table
        if row.family != "interpreter"
    ]


def _kind(row: Row) -> str:
    if row.float32:
        return "float32"
    bounds = {None: "", True: "-bounded", False: "-unbounded"}[row.bounded]
    return (
        ("plain" if row.plain else "options")
        + bounds
        + (f"-from{row.seqlen_from}" if row.seqlen_from else "")
    )


@pytest.mark.parametrize(("kernel", "row"), rows())
def test_a_row_compiles_within_its_bounds(kernel: str, row: Row) -> None:
    chip = {"gfx9": "gfx942"}.get(row.family, row.family)
    compiled = compile_launch(_plan(kernel, chip, **_call_for(row), expected=row), chip)
    assert compiled.shared <= TARGETS[chip].shared_memory
    assert compiled.spills <= _spills_allowed(kernel, row), "a row spills more than was recorded for it"
    name = f"{kernel}-{row.family}-{row.head_dim}-{_kind(row)}"
    if row.plain and row.family == "sm_90" and name not in SERIALISED.get(TRITON, ()):
        assert_asynchronous(compiled)


def assert_asynchronous(compiled: Compiled) -> None:
    """Tiles come by TMA, products run on Hopper's asynchronous tensor cores, and nothing serialises them."""
    assert "wgmma.mma_async" in compiled.assembly
    assert "cp.async.bulk.tensor" in compiled.assembly
    serialised = [warning for warning in compiled.warnings if "serialized" in warning]
    assert not serialised, serialised


@pytest.mark.parametrize("chip", TARGETS)
def test_the_other_kernels_compile(chip: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for plan in (_plan_delta, _plan_probabilities):
            compiled = compile_launch(plan(256, dtype), chip)
            assert compiled.shared <= TARGETS[chip].shared_memory


@pytest.mark.smoke
@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("kernel", TABLES)
def test_causal_attention_compiles(kernel: str, chip: str) -> None:
    compiled = compile_launch(_plan(kernel, chip, head_dim=96, dtype=torch.float16, causal=True), chip)
    assert compiled.shared <= TARGETS[chip].shared_memory


@pytest.mark.parametrize("chip", TARGETS)
@pytest.mark.parametrize("kernel", TABLES)
def test_packed_sequences_compile(kernel: str, chip: str) -> None:
    bounds = torch.zeros(3, dtype=torch.int32)
    q, k, v, dout = (torch.empty(256, 2, 64, dtype=torch.bfloat16) for _ in range(4))
    packing = Packing.describe(q, q, bounds, bounds, 256, 256)
    problem = AttentionProblem.describe(q, k, v, causal=True, packing=packing)
    launch = _launch(kernel, chip, problem, *(x[None] for x in (q, k, v, dout)), None, None, packing)
    compiled = compile_launch(launch, chip)
    assert compiled.shared <= TARGETS[chip].shared_memory
    if chip == "sm_90":
        assert_asynchronous(compiled)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("head_dim", [24, 64])
@pytest.mark.parametrize("kernel", [*TABLES, "delta"])
def test_no_length_of_packed_sequences_makes_triton_compile_again(
    kernel: str, head_dim: int, chip: str
) -> None:
    def of(total: int, longest: int, batch: int) -> Any:
        bounds = torch.zeros(batch + 1, dtype=torch.int32)
        q, k, v, dout = (torch.empty(total, 2, head_dim, dtype=torch.bfloat16) for _ in range(4))
        packing = Packing.describe(q, k, bounds, bounds, longest, longest)
        problem = AttentionProblem.describe(q, k, v, causal=True, packing=packing)
        entry = [x[None] for x in (q, k, v, dout)]
        return specialize(_launch(kernel, chip, problem, *entry, None, None, packing))

    usual = of(total=400, longest=200, batch=3)
    for total, longest, batch in ((1, 1, 1), (193, 193, 1), (399, 16, 50), (2048, 1001, 7)):
        assert of(total, longest, batch) == usual


def decode_rows() -> list[Any]:
    return [
        pytest.param(
            table,
            row,
            paged,
            id=f"{name}-{row.family}-{row.head_dim}-{_kind(row)}-{'paged' if paged else 'whole'}",
        )
        for name, table in (("few", DECODE), ("many", DECODE_MANY))
        for row in table
        for paged in (False, True)
        if row.family != "interpreter" and row.paged in (None, paged)
    ]


@pytest.mark.parametrize(("table", "row", "paged"), decode_rows())
def test_a_row_for_few_queries_compiles_within_its_bounds(
    table: tuple[Row, ...], row: Row, paged: bool
) -> None:
    chip = {"gfx9": "gfx942"}.get(row.family, row.family)
    dtype = torch.float32 if row.float32 else torch.bfloat16
    seqlen_q = 1 if table is DECODE else 10
    for launch in _plan_decode(chip, row, dtype, seqlen_q, paged):
        compiled = compile_launch(launch, chip)
        assert compiled.shared <= TARGETS[chip].shared_memory
        assert compiled.spills <= (FLOAT32_SPILLS[256] if row.float32 else SLACK)
        if row.family == "sm_90" and not row.float32:
            assert "griddepcontrol" in compiled.assembly


@pytest.mark.parametrize("chip", TARGETS)
def test_appending_and_rotating_compile(chip: str) -> None:
    cache = torch.empty(2, 64, 2, 80, dtype=torch.bfloat16)
    k = torch.empty(2, 1, 2, 80, dtype=torch.bfloat16)
    lengths = torch.zeros(2, dtype=torch.int32)
    angles = (torch.empty(64, 32, dtype=torch.bfloat16),) * 2
    table = torch.zeros(2, 2, dtype=torch.int32)
    for block_table in (None, table):
        place = Cache.describe(k, cache, lengths, block_table=block_table)
        compile_launch(plan_append(cache, cache, k, k, place, angles, True), chip)
    compile_launch(plan_rotary(k, k, *angles, lengths, None, 1, interleaved=False, conjugate=False), chip)


def _plan_decode(chip: str, row: Row, dtype: torch.dtype, seqlen_q: int, paged: bool) -> list[Launch]:
    head_dim = HEAD_DIMS.get(row.head_dim, row.head_dim)
    q = torch.empty(2, seqlen_q, 8, head_dim, dtype=dtype)
    seqlen_k = max(1024, row.seqlen_from)
    k = torch.empty(2, seqlen_k, 2, head_dim, dtype=dtype)
    keys = k.view(-1, 16, 2, head_dim) if paged else k
    table = torch.zeros(2, seqlen_k // 16, dtype=torch.int32) if paged else None
    cache = Cache.describe(q, keys, torch.zeros(2, dtype=torch.int32), block_table=table)
    problem = AttentionProblem.describe(q, keys, keys, causal=True, cache=cache)
    assert choose(DECODE if seqlen_q == 1 else DECODE_MANY, problem, TARGETS[chip]) == row.config
    lse = torch.empty(2, 8, seqlen_q)
    return plan_decode(problem, TARGETS[chip], 132, q, keys, keys, torch.empty_like(q), lse, None, cache, 4)


def test_unaligned_rows_are_fetched_by_pointer() -> None:
    compiled = compile_launch(
        _plan("forward", "sm_90", head_dim=59, dtype=torch.bfloat16, causal=True), "sm_90"
    )
    assert "cp.async.bulk.tensor" not in compiled.assembly
    assert "wgmma.mma_async" in compiled.assembly


def _spills_allowed(kernel: str, row: Row) -> int:
    if row.float32:
        return FLOAT32_SPILLS[row.head_dim] if kernel == "forward" else FLOAT32_SPILLS[256]
    if row.plain:
        return PLAIN_SPILLS.get((kernel, row.family, row.head_dim), 0)
    allowed = ALL_OPTIONS_SPILLS_OF.get((kernel, row.family, row.head_dim), ALL_OPTIONS_SPILLS)
    # With every option on at once, Triton 3.9 was seen to spill up to 2.1 times as much as earlier ones.
    return allowed * 5 // 2 if TRITON >= (3, 8) else allowed


def _call_for(row: Row) -> dict[str, Any]:
    """The call that asks most of a row among those it is for."""
    options = {"causal": row.bounded is not False} if row.plain else EVERY_OPTION
    dtype = torch.float32 if row.float32 else torch.bfloat16
    head_dim = HEAD_DIMS.get(row.head_dim, row.head_dim)
    return {"head_dim": head_dim, "dtype": dtype, "seqlen_k": max(row.seqlen_from, 256), **options}


def _plan(
    kernel: str, chip: str, *, head_dim: int, dtype: torch.dtype, seqlen_k: int = 256,
    expected: Row | None = None, **options: Any,
) -> Launch:  # fmt: skip
    q, k, v, dout = (torch.empty(1, n, 2, head_dim, dtype=dtype) for n in (256, seqlen_k, seqlen_k, 256))
    slopes = torch.ones(2) if options.get("softcap") else None
    problem = AttentionProblem.describe(q, k, v, alibi_slopes=slopes, **options)
    rng_state = torch.zeros(2, dtype=torch.int64)
    if expected is not None:
        chosen = choose(TABLES[kernel], problem, TARGETS[chip])
        assert chosen == expected.config, "an earlier row hides this one"
    return _launch(kernel, chip, problem, q, k, v, dout, slopes, rng_state, None)


def _launch(
    kernel: str, chip: str, problem: AttentionProblem,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dout: torch.Tensor,
    slopes: torch.Tensor | None, rng_state: torch.Tensor | None, packing: Packing | None,
) -> Launch:  # fmt: skip
    target = TARGETS[chip]
    if kernel == "forward":
        vector = torch.empty(1, 2, q.shape[1])
        return plan_forward(problem, target, q, k, v, torch.empty_like(q), vector, slopes, rng_state, packing)
    vector = torch.empty(1, 2, padded_rows(q.shape[1], problem.batch if problem.packed else 0))
    inputs = BackwardInputs(q, k, v, dout, vector, vector, slopes, rng_state, packing)
    if kernel == "delta":
        vector = torch.empty(1, 2, q.shape[1])
        return plan_delta(problem, torch.empty_like(q), vector, vector, inputs)
    if kernel == "dkdv":
        return plan_dkdv(problem, target, inputs, torch.empty_like(k), torch.empty_like(v))
    return plan_dq(problem, target, inputs, torch.empty_like(q))


def _plan_delta(head_dim: int, dtype: torch.dtype) -> Launch:
    x = torch.empty(1, 256, 2, head_dim, dtype=dtype)
    vector = torch.empty(1, 2, 256)
    inputs = BackwardInputs(x, x, x, x, vector, vector, None, None)
    return plan_delta(AttentionProblem.describe(x, x, x), x, vector, vector, inputs)


def _plan_probabilities(head_dim: int, dtype: torch.dtype) -> Launch:
    x = torch.empty(1, 256, 2, head_dim, dtype=dtype)
    slopes = torch.ones(2)
    problem = AttentionProblem.describe(x, x, x, alibi_slopes=slopes, **EVERY_OPTION)
    weights = torch.empty(1, 2, 256, 256, dtype=dtype)
    rng_state = torch.zeros(2, dtype=torch.int64)
    return plan_probabilities(problem, x, x, torch.empty(1, 2, 256), weights, slopes, rng_state)
