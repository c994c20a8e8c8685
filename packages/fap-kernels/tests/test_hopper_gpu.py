"""The Hopper forward on a GPU: against the float64 oracle, where its softmax has to start over, and repeated.

The conformance of test_gpu.py covers it too, since it is what runs there; here it is held to run itself.
"""

from __future__ import annotations

import random
from itertools import accumulate
from typing import Any

import pytest
import torch

from fap_kernels import AttentionProblem, attention_forward, attention_varlen_forward, use_schedule
from fap_kernels.hopper.config import FORWARD, HopperRow, choose
from fap_kernels.replay import Replays
from fap_testing.reference import attention_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
        reason="needs a GPU of compute capability 9.0",
    ),
]
# Norm of the error over that of the result, as rounding the weights to 16 bits leaves it.
ERRORS = {torch.bfloat16: 3e-3, torch.float16: 5e-4}


def draw(
    batch: int, seqlen_q: int, seqlen_k: int, nheads: int, nheads_k: int, head_dim: int,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    sizes = ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k))
    return tuple(torch.randn(batch, n, h, head_dim, device="cuda", dtype=dtype) for n, h in sizes)


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> None:
    """Both results are right, and the same on a second run."""
    with use_schedule("hopper"):
        out, lse, _ = attention_forward(q, k, v, **options)
        again, lse_again, _ = attention_forward(q, k, v, **options)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    right, right_lse, _ = attention_reference(q.double(), k.double(), v.double(), **options)
    assert (out.double() - right).norm() <= ERRORS[q.dtype] * right.norm()
    # Logits of some hundreds are sums of up to 256 products in the tensor cores' float32.
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-4, rtol=4e-6)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 96, 128, 192, 256])
@pytest.mark.parametrize(
    "options", [{}, {"causal": True}, {"window_size": (90, 30)}, {"softcap": 4.0, "causal": True}], ids=str
)
def test_against_the_oracle(head_dim: int, options: dict[str, Any], dtype: torch.dtype) -> None:
    # Long enough that no row of the table hands the call back.
    check(*draw(1, 1100, 4200, 4, 2, head_dim, dtype), **options)


def rows() -> list[Any]:
    """Every row for sequences that are not packed, with the masks that it is for."""
    return [
        pytest.param(row, mask, id=f"d{row.head_dim}-{number}-{mask}")
        for number, row in enumerate(FORWARD)
        if row.config is not None and not row.packed
        for mask, bounded, windowed in (
            ("full", False, False), ("causal", True, False), ("window", True, True)
        )
        if row.bounded in (None, bounded) and row.windowed in (None, windowed)
    ]  # fmt: skip


@pytest.mark.parametrize(("row", "mask"), rows())
def test_a_row_has_the_portable_kernels_results(row: HopperRow[Any], mask: str) -> None:
    """With more query tiles than a chip runs at a time, so that programs that stay have several."""
    seqlen = max(row.seqlen_from, 700) + 3
    options: dict[str, Any] = {"causal": mask == "causal"}
    if mask == "window":
        options["window_size"] = (300, 20)
    if row.plain is False:
        options["softcap"] = 30.0
    seqlen_q = seqlen if row.queries_below is None else row.queries_below - 60
    q, k, v = draw(-(-16384 // seqlen), seqlen_q, seqlen, 16, 8, row.head_dim)
    assert choose(FORWARD, AttentionProblem.describe(q, k, v, **options)) is row
    results = []
    for schedule in ("hopper", "portable"):
        with use_schedule(schedule):
            results.append(attention_forward(q, k, v, **options)[:2])
    (out, lse), (right, right_lse) = results
    assert (out.float() - right.float()).norm() <= 2 * ERRORS[q.dtype] * right.float().norm()
    torch.testing.assert_close(lse, right_lse, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("processors", [1, 3, 7])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((1, 1100, 4200, 4, 2, 128), {}),
        ((2, 4230, 4500, 2, 2, 128), {"causal": True}),
        ((1, 4097, 5000, 3, 1, 128), {"window_size": (-1, 70)}),
        ((2, 1030, 2100, 2, 1, 256), {}),
    ],
    ids=str,
)
def test_clusters_take_one_item_after_the_other(
    sizes: tuple[int, ...], options: dict[str, Any], processors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the last ones the second program has no query, or few."""
    # Kept launches do not know of what is pretended here: none are taken, and none are left.
    monkeypatch.setattr("fap_kernels.target._processors_of_index", lambda index: processors)
    monkeypatch.setattr("fap_kernels.attention._forward_replays", Replays())
    q, k, v = draw(*sizes)
    config = choose(FORWARD, AttentionProblem.describe(q, k, v, **options)).config
    assert config is not None
    assert config.cluster
    check(q, k, v, **options)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_of_a_triton_that_is_not_known(head_dim: int, causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Warps wait by Gluon's own operations, and form no clusters."""
    monkeypatch.setattr("fap_kernels.hopper.launch.places_are_known", lambda: False)
    monkeypatch.setattr("fap_kernels.attention._forward_replays", Replays())
    check(*draw(1, 1500, 4300, 4, 2, head_dim), causal=causal)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("factor", [2.0, 10.0, 40.0, 300.0])
def test_a_late_key_may_tower_over_all_before_it(head_dim: int, factor: float, dtype: torch.dtype) -> None:
    """Keys are swept from the last on: the first comes last, and outgrows the reference of rows."""
    q, k, v = draw(1, 1100, 2000, 4, 4, head_dim, dtype)
    if factor == 300.0:
        q[..., 0] = 4.0
        k[:, 0] = 0.0
        k[:, 0, :, 0] = factor
    else:
        k[:, 0] = (q[:, 5].float() * factor).to(dtype)
    check(q, k, v)


@pytest.mark.parametrize("processors", [1, 3, 7, 132])
@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ((2, 700, 700, 4, 2, 64), {"causal": True}),  # three programs a multiprocessor
        ((1, 1100, 1200, 3, 3, 64), {}),
        ((1, 2100, 2100, 3, 1, 64), {"causal": True}),
        ((2, 700, 700, 4, 4, 128), {}),
        ((1, 1500, 1500, 3, 1, 128), {"causal": True}),
        ((1, 2100, 2100, 3, 3, 128), {"causal": True}),  # clusters, as far as there are pairs for them
        ((1, 1100, 4200, 2, 2, 128), {}),
        ((1, 1100, 2100, 2, 2, 256), {}),
        ((1, 1300, 1300, 2, 1, 256), {"causal": True}),
        ((1, 700, 700, 2, 2, 256), {}),
        ((1, 1500, 2500, 4, 2, 128), {"window_size": (700, 60)}),
        ((2, 1100, 1200, 4, 2, 64), {"window_size": (600, -1)}),
    ],
    ids=str,
)
@pytest.mark.parametrize("row", [200, 300, -1])
def test_a_single_row_that_outgrows_its_reference_is_found(
    sizes: tuple[int, ...], options: dict[str, Any], row: int, processors: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """In a program's first query tile, in its last one, or in the other program's of a cluster."""
    monkeypatch.setattr("fap_kernels.target._processors_of_index", lambda index: processors)
    monkeypatch.setattr("fap_kernels.attention._forward_replays", Replays())
    q, k, v = draw(*sizes)
    q[..., 0] = k[..., 0] = 0.0
    # The first key that the row sees comes last.
    left = options.get("window_size", (-1, -1))[0]
    key = max(row % sizes[1] + sizes[2] - sizes[1] - left, 0) if left >= 0 else 0
    q[0, row, -1, 0], k[0, key, :, 0] = 20.0, 300.0
    check(q, k, v, **options)


def test_what_is_not_finite_stays_where_the_portable_kernel_has_it() -> None:
    q, k, v = draw(1, 300, 1500, 2, 2, 128)
    q[0, 5, 0, 3] = torch.nan
    q[0, 250, 0, 7] = torch.inf  # all of its logits are -inf, which is not to be without keys
    k[0, :, 0, 7] = -1.0
    k[0, 100, 1, 0] = torch.inf
    v[0, 600, 0, 0] = torch.inf
    v[0, 3, 0, 1] = torch.nan
    results = []
    for schedule in ("hopper", "portable"):
        with use_schedule(schedule):
            results.append(attention_forward(q, k, v, causal=True)[:2])
    for mine, portable in zip(*results, strict=True):
        torch.testing.assert_close(mine, portable, equal_nan=True, atol=2e-2, rtol=2e-2)


def test_a_graph_finds_new_marks_when_it_is_replayed() -> None:
    q, k, v = draw(1, 1100, 2000, 4, 4, 128)
    with use_schedule("hopper"):
        attention_forward(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse, _ = attention_forward(q, k, v)
    q[..., 0] = 4.0
    k[:, 0] = 0.0
    k[:, 0, :, 0] = 300.0
    graph.replay()
    right, right_lse, _ = attention_reference(q.double(), k.double(), v.double())
    assert (out.double() - right).norm() <= ERRORS[q.dtype] * right.norm()
    # Logits of some hundreds are sums of up to 256 products in the tensor cores' float32.
    torch.testing.assert_close(lse.double(), right_lse.double(), atol=1e-4, rtol=4e-6)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_random_shapes(head_dim: int) -> None:
    rng = random.Random(head_dim)
    for _ in range(40):
        nheads_k, group = rng.randint(1, 3), rng.choice([1, 2, 4])
        q, k, v = draw(
            rng.randint(1, 3),
            rng.randint(65, 1300),
            rng.randint(1, 1500),
            nheads_k * group,
            nheads_k,
            head_dim,
        )
        left, right = rng.choice(
            [(-1, -1), (rng.randint(0, 400), rng.randint(0, 300)), (rng.randint(0, 600), -1)]
        )
        if left == -1 or head_dim == 256:  # short sequences with a bound run on the portable kernel elsewhere
            check(q, k, v, window_size=(left, right))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (200, 30)}], ids=str)
@pytest.mark.parametrize("longest", [900, 4500])
def test_packed_sequences_of_more_tiles_than_programs(
    head_dim: int, options: dict[str, Any], longest: int
) -> None:
    """The portable kernels' results, and the same on every run, whoever draws which tile; in a graph too."""
    rng = random.Random(longest)
    lengths_q, lengths_k = ([rng.choice([0, 1, rng.randint(1, 900)]) for _ in range(60)] for _ in "qk")
    lengths_q[7], lengths_k[7] = longest, longest - 3
    bounds_q, bounds_k = (
        torch.tensor([0, *accumulate(lengths)], device="cuda", dtype=torch.int32)
        for lengths in (lengths_q, lengths_k)
    )
    q, k, v = (
        torch.randn(sum(lengths), heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for lengths, heads in ((lengths_q, 12), (lengths_k, 4), (lengths_k, 4))
    )

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        return attention_varlen_forward(q, k, v, bounds_q, bounds_k, longest, longest, **options)[:2]

    with use_schedule("portable"):
        right, right_lse = run()
    with use_schedule("hopper"):
        out, lse = run()
        results = [run() for _ in range(20)]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = run()
    for _ in range(3):
        for x in replayed:
            x.fill_(torch.nan)
        graph.replay()
        assert torch.equal(replayed[0], out)
        assert torch.equal(replayed[1], lse)
    for again, lse_again in results:
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)
    assert (out.double() - right.double()).norm() <= 2 * ERRORS[q.dtype] * right.double().norm()
    torch.testing.assert_close(lse, right_lse, atol=1e-4, rtol=1e-5)
