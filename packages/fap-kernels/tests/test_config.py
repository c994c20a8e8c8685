"""The configuration tables answer for every call, and every row of them can be reached."""

from __future__ import annotations

import pytest
import torch

from fap_kernels import target as targets
from fap_kernels.backward.config import DKDV, DQ
from fap_kernels.config import Row, choose
from fap_kernels.forward.config import FORWARD
from fap_kernels.head_dim import split_head_dim
from fap_kernels.problem import AttentionProblem

TARGETS = [targets.SM_80, targets.SM_90, targets.SM_100, targets.GFX9, targets.INTERPRETER]
TABLES = {"forward": FORWARD, "dkdv": DKDV, "dq": DQ}
OPTIONS = [{}, {"causal": True}, {"softcap": 30.0}, {"causal": True, "dropout_p": 0.1}]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def problem(head_dim: int, dtype: torch.dtype, seqlen: int = 256, **options: object) -> AttentionProblem:
    x = torch.empty(1, seqlen, 2, head_dim, dtype=dtype, device="meta")
    return AttentionProblem.describe(x, x, x, **options)


@pytest.mark.smoke
@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.family)
def test_every_call_has_a_row(table: tuple[Row, ...], target: targets.Target) -> None:
    for head_dim in range(1, 257):
        for dtype in DTYPES:
            for options in OPTIONS:
                choose(table, problem(head_dim, dtype, **options), target)


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_every_row_is_reached(table: tuple[Row, ...]) -> None:
    problems = [
        problem(head_dim, dtype, seqlen, **options)
        for head_dim in {sum(split_head_dim(d)) for d in range(1, 257)}
        for dtype in (torch.bfloat16, torch.float32)
        for options in OPTIONS
        for seqlen in (0, 1 << 20)
    ]
    fitting = [next(row for row in table if row.fits(p, target)) for p in problems for target in TARGETS]
    unreached = [row for row in table if row not in fitting]
    assert not unreached


def test_tiles_divide_what_the_vectors_are_padded_to() -> None:
    from fap_kernels.backward.config import ROW_PADDING

    for table in (DKDV, DQ):
        assert all(ROW_PADDING % row.config.block_m == 0 for row in table)


def test_no_row_is_a_reason_to_fail_loudly() -> None:
    with pytest.raises(LookupError, match="no configuration"):
        choose((), problem(64, torch.bfloat16), targets.SM_90)


@pytest.mark.parametrize("head_dim", range(1, 257))
def test_parts_hold_the_head_dim_with_least_waste(head_dim: int) -> None:
    first, second = split_head_dim(head_dim)
    powers = [16, 32, 64, 128, 256]
    sums = [*powers, *(a + b for a in powers for b in powers if b < a)]
    assert first in powers
    assert second in [0, *powers]
    assert first + second == min(s for s in sums if s >= head_dim)
