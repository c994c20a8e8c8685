"""The random problems of soak.py: which kernels they are to reach, their sizes, and what is checked."""

from __future__ import annotations

import contextlib
import itertools
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from fap_kernels import (
    AttentionProblem,
    attention,
    attention_backward,
    attention_forward,
    attention_varlen_backward,
    attention_varlen_forward,
    target,
    use_schedule,
    varlen,
)
from fap_kernels.hopper.conditions import backward_reasons_against, forward_reasons_against
from fap_kernels.hopper.config import BACKWARD, FORWARD, choose
from fap_kernels.packing import Packing
from fap_kernels.replay import Replays
from fap_kernels.target import SM_90
from fap_testing.reference import attention_baseline, attention_baseline_gradients
from fap_testing.reference_varlen import attention_varlen_baseline, attention_varlen_baseline_gradients

if TYPE_CHECKING:
    from collections.abc import Iterator

LONGEST = 16384
# Between two of these every table gives one configuration, so that problems share compiled kernels.
LENGTHS = sorted(
    {row.seqlen_from for table in (FORWARD, BACKWARD) for row in table}
    | {row.seqlen_below for table in (FORWARD, BACKWARD) for row in table if row.seqlen_below is not None}
)
FEWEST = sorted({row.queries_from for row in FORWARD})
QUERIES = range(65, 1501)
"""With fewer no schedule of Hopper is asked."""
# Full tiles, and tiles that zeros fill up; most are multiples of 16, for which Triton compiles alike.
HEAD_DIMS = {True: (64, 128, 256, 80, 40, 160, 192, 32), False: (48, 96, 192, 80, 32, 160, 64, 16, 24)}
FEATURES = {"full": ("softcap", "alibi"), "causal": ("softcap",), "window": ("alibi",), "left": ("alibi",)}
PROPERTIES = ("packed", "seqused", "deterministic", "grouped", "forward", "backward")
FULL_TILES = 1000
"""Problems before this one have queries for every schedule, so that they compile all that the others need."""
PAIRS = 1 << 25
"""Queries times keys of a problem at most: PyTorch then holds some matrices of 128 MB."""
TAIL = 9
"""Rows of NaN behind packed sequences."""
# Of a row's error, over its norm and over that of all rows.
ERRORS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class Variant:
    """What kernels are compiled for. Problems of a variant differ in what they are not.

    Attributes:
        mask: "full", "causal", "window" (both bounds) or "left" (that one alone).
        seqlens_k: the longest key sequence's length is in this range.
        queries: the same of the length of its queries.
        grouped: query heads share key heads; of others they may as well.
        forward, backward: what to run by the Hopper schedule.
    """

    head_dim: int
    mask: str
    seqlens_k: range
    queries: range = QUERIES
    features: tuple[str, ...] = ()
    packed: bool = False
    seqused: bool = False
    dtype: torch.dtype = torch.bfloat16
    deterministic: bool = False
    grouped: bool = False
    forward: bool = False
    backward: bool = False

    def __str__(self) -> str:
        flags = [name for name in PROPERTIES if getattr(self, name)]
        dtype = str(self.dtype).removeprefix("torch.")
        many = ("many",) if self.queries[0] > QUERIES[0] else ()
        return "-".join(
            (f"d{self.head_dim}", self.mask, f"{self.seqlens_k[0]}", *many, dtype, *self.features, *flags)
        )

    def describe(self) -> AttentionProblem:
        """One of its calls, with so many queries that no schedule leaves them to others."""
        seqlen_q, seqlen_k = max(self.queries[0], 128), self.seqlens_k[0]
        q, k, v = (
            torch.empty(1, n, nheads, self.head_dim, dtype=self.dtype)
            for n, nheads in ((seqlen_q, 2 if self.grouped else 1), (seqlen_k, 1), (seqlen_k, 1))
        )
        packing = None
        if self.packed:
            bounds = torch.zeros(2, dtype=torch.int32)
            q, k, v = q[0], k[0], v[0]
            packing = Packing.describe(q, k, bounds, bounds, seqlen_q, seqlen_k)
        return AttentionProblem.describe(
            q, k, v, causal=self.mask == "causal",
            window_size={"window": (90, 30), "left": (90, -1)}.get(self.mask, (-1, -1)),
            softcap=20.0 if "softcap" in self.features else 0.0,
            alibi_slopes=torch.ones(q.shape[-2]) if "alibi" in self.features else None,
            packing=packing, deterministic=self.deterministic,
        )  # fmt: skip


def variants(seed: int = 0) -> list[Variant]:
    """As few as reach each row of the Hopper tables with each kind of mask that it is for.

    An odd seed has float16 where an even one has bfloat16.
    """
    dtypes = (torch.bfloat16, torch.float16)[:: -1 if seed % 2 else 1]
    found, reached = [], set()
    for variant in _candidates(dtypes):
        problem = variant.describe()
        new, backward, queries = set(), set(), QUERIES
        if not variant.deterministic and not forward_reasons_against(problem, SM_90, asked_for=True):
            row = choose(FORWARD, problem)
            new = {("forward", *_reached(row, variant))} - reached
            if new:
                fewest = max(QUERIES[0], row.queries_from)
                queries = range(fewest, min(row.queries_below or LONGEST, fewest + len(QUERIES)))
        if not backward_reasons_against(problem, SM_90, asked_for=True):
            backward = {("backward", *_reached(choose(BACKWARD, problem), variant))} - reached
        if new or backward:
            reached |= new | backward
            found.append(replace(variant, queries=queries, forward=bool(new), backward=bool(backward)))
    return found


def _candidates(dtypes: tuple[torch.dtype, ...]) -> Iterator[Variant]:
    lengths = list(itertools.pairwise([*LENGTHS, LONGEST]))
    # The other dtype comes last, for rows that are for one alone.
    flags = itertools.product((False, True), repeat=5)
    for grouped, swapped, packed, decorated, deterministic in flags:
        for number, (low, high) in enumerate(lengths):
            for mask in ("full", "causal", "left" if number % 2 else "window"):
                bounded = mask in ("window", "left")
                for head_dim, first in itertools.product(HEAD_DIMS[mask != "causal"], FEWEST):
                    yield Variant(
                        head_dim, mask, range(max(low, 1), high), range(max(first, QUERIES[0]), LONGEST),
                        features=FEATURES[mask] if decorated else (),
                        packed=packed, seqused=packed and bounded,
                        dtype=dtypes[bounded != swapped], deterministic=deterministic, grouped=grouped,
                    )  # fmt: skip


def _reached(row: Any, variant: Variant) -> tuple[Any, ...]:
    """The row, and what of a call makes another kernel of it; of the two kinds of windows one will do."""
    if variant.deterministic:
        finishes = variant.mask in ("full", "causal") and not variant.packed
        return row.config, "deterministic", variant.dtype, finishes
    return row, "bounded" if variant.mask in ("window", "left") else variant.mask


@dataclass(frozen=True)
class Problem:
    """Everything that a run is made from: the same number and seed make it again."""

    variant: Variant
    number: int
    seed: int
    nheads_k: int
    group: int
    lengths_q: tuple[int, ...]
    lengths_k: tuple[int, ...]
    max_seqlen_q: int
    max_seqlen_k: int
    window: tuple[int, int]
    layout: str
    steep: bool

    @property
    def nheads(self) -> int:
        return self.nheads_k * self.group


@contextlib.contextmanager
def processors_seen(count: int | None) -> Iterator[None]:
    """Have the GPU seem to have ``count`` multiprocessors, so that programs that stay have more to do.

    None leaves it as it is. Launches that were kept before are forgotten, and so are those of meanwhile.
    """
    real = target._processors_of_index
    if count is not None:
        target._processors_of_index = lambda index: count
    _forget_launches()
    try:
        yield
    finally:
        target._processors_of_index = real
        _forget_launches()


def _forget_launches() -> None:
    for module in (attention, varlen):
        module._forward_replays, module._backward_replays = Replays(), Replays()


def draw(variant: Variant, number: int, seed: int) -> Problem:
    """Problem ``number``. All sequences of one that is not packed have the same lengths."""
    rng = random.Random(f"{seed} {number}")
    longest = _length(rng, variant.seqlens_k)
    count = rng.randint(1, 6) if variant.packed else 1
    lengths_k = [rng.choice((0, 1, rng.randint(0, 300), rng.randint(0, longest))) for _ in range(count)]
    lengths_q = [rng.choice((0, 1, n, rng.randint(0, 1500))) for n in lengths_k]
    place = rng.randrange(count)
    lengths_k[place] = longest
    queries = rng.choice((min(longest, variant.queries[-1]), _length(rng, variant.queries)))
    lengths_q[place] = min(max(queries, variant.queries[0]), variant.queries[-1])
    if number >= FULL_TILES and rng.random() < 0.1 and variant.queries[0] == QUERIES[0]:
        lengths_q[place] = rng.randint(1, 64)
    nheads_k, group = rng.randint(1, 3), rng.choice((2, 4) if variant.grouped else (1, 1, 1, 2, 4))
    pairs = sum(q * k for q, k in zip(lengths_q, lengths_k, strict=True))
    while nheads_k * group * pairs > PAIRS and nheads_k * group > 1:
        nheads_k, group = (nheads_k, group // 2) if group > 1 else (nheads_k - 1, 1)
    if not variant.packed:
        copies = rng.randint(1, max(1, min(4, PAIRS // (nheads_k * group * pairs))))
        lengths_q, lengths_k = lengths_q * copies, lengths_k * copies
    slack = rng.choice((0, rng.randint(0, variant.seqlens_k[-1] - longest))) if variant.packed else 0
    return Problem(
        variant, number, seed, nheads_k, group, tuple(lengths_q), tuple(lengths_k),
        max_seqlen_q=max(lengths_q), max_seqlen_k=longest + slack,
        window=(_bound(rng), -1 if variant.mask == "left" else _bound(rng)),
        layout=rng.choice(("plain", "heads first", "slice")),
        steep=variant.mask == "full" and not variant.backward and rng.random() < 0.3,
    )  # fmt: skip


def _length(rng: random.Random, lengths: range) -> int:
    edge = rng.choice((64, 128, 192)) * rng.randint(1, 20) + rng.choice((-1, 0, 1))
    length = rng.choice((lengths[0], lengths[0] + 1, lengths[0] + edge, rng.choice(lengths)))
    return min(length, lengths[-1])


def _bound(rng: random.Random) -> int:
    return rng.choice((0, 1, rng.randint(0, 100), rng.randint(0, 1500)))


@dataclass
class Verdict:
    """What came of a problem.

    Attributes:
        on_hopper: its passes that the Hopper schedule computed.
        handed_back: those that it refused.
        errors: of each tensor that was compared, over what is allowed.
        wrong: what must not be, as sentences.
    """

    on_hopper: list[str]
    handed_back: list[str]
    errors: dict[str, float]
    wrong: list[str]


def check(problem: Problem, device: str) -> Verdict:
    """Run a problem twice by the Hopper schedule, and once by plain PyTorch in float32, and compare."""
    variant = problem.variant
    verdict = Verdict([], [], {}, [])
    q, k, v, dout, dlse, lengths, options = make_tensors(problem, device)
    forward, backward, exact, exact_gradients = (
        (
            attention_varlen_forward,
            attention_varlen_backward,
            attention_varlen_baseline,
            attention_varlen_baseline_gradients,
        )
        if variant.packed
        else (attention_forward, attention_backward, attention_baseline, attention_baseline_gradients)
    )
    # PyTorch goes from sequence to sequence, and asks for no longest one.
    spans = {name: x for name, x in lengths.items() if isinstance(x, torch.Tensor)}
    tensors = [x.float() for x in (q, k, v)]
    with torch.no_grad():
        right = exact(*tensors, **spans, **options)
    real_q, real_k = (
        slice(sum(n) if variant.packed else None) for n in (problem.lengths_q, problem.lengths_k)
    )
    if variant.forward:
        mine, again = _twice("forward", verdict, lambda: forward(q, k, v, **lengths, **options)[:2])
        if mine:
            _compare(verdict, "out", mine[0][real_q], right.out[real_q])
            lse = mine[1][..., real_q], right.softmax_lse[..., real_q]
            if not torch.isclose(*lse, rtol=1e-5, atol=2e-4).all():
                verdict.wrong.append("softmax_lse differs")
            names = ("out", "softmax_lse")
            mine, again = ((out, lse.transpose(-1, -2)) for out, lse in (mine, again))
            _compare_runs(verdict, names, (real_q,) * 2, mine, again, variant.packed and not variant.seqused)
    if variant.backward:
        out, lse = right.out.to(q.dtype), right.softmax_lse.clone()
        if variant.packed:
            out[real_q.stop :] = lse[..., real_q.stop :] = torch.nan
        mine, again = _twice(
            "backward",
            verdict,
            lambda: backward(
                dout, q, k, v, out, lse, dlse=dlse, deterministic=variant.deterministic, **lengths, **options
            ),
        )
        if mine:
            # The gradients are those of the rounded out: dlse can say by how much its product with dout is
            # off, which is all that they depend on it by.
            off = (dout.float() * (right.out - out.float())).sum(-1).transpose(-1, -2)
            gradients = exact_gradients(
                *tensors, **spans, dout=dout.float(), dlse=off if dlse is None else off + dlse,
                **options,
            )  # fmt: skip
            # Where gradients are zero, as that of a single key's logit, there is noise of the size of dout.
            floor = 1e-4 * dout[real_q].float().square().mean().sqrt() * variant.head_dim**0.5
            names, real = ("dq", "dk", "dv"), (real_q, real_k, real_k)
            for name, rows, x in zip(names, real, mine, strict=True):
                _compare(verdict, name, x[rows], getattr(gradients, name)[rows], floor)
            # dQ is added up in the order that programs come to their end.
            same = slice(0 if variant.deterministic else 1, None)
            unused = variant.packed and not variant.seqused
            _compare_runs(verdict, names[same], real[same], mine[same], again[same], unused)
    return verdict


def _twice(name: str, verdict: Verdict, run: Any) -> tuple[Any, Any]:
    """The results of two runs, None where the schedule refuses."""
    try:
        with use_schedule("hopper"), _filled():
            results = run(), run()
    except RuntimeError as error:
        if "chosen by use_schedule and does not compute this call" not in str(error):
            raise
        verdict.handed_back.append(name)
        return None, None
    verdict.on_hopper.append(name)
    return results


@contextlib.contextmanager
def _filled() -> Iterator[None]:
    """Memory is filled with NaN when it is allocated: what no kernel writes is seen."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _compare(verdict: Verdict, name: str, mine: torch.Tensor, right: torch.Tensor, floor: Any = 0.0) -> None:
    allowed = ERRORS[mine.dtype]
    norms = right.norm(dim=-1)
    errors = (mine.float() - right).norm(dim=-1) / (allowed * (norms + norms.square().mean().sqrt()) + floor)
    # Where all is zero, as where no query sees a key, that is 0 / 0.
    errors = torch.where((mine == right).all(dim=-1), 0.0, errors)
    worst = float(errors.nan_to_num(nan=torch.inf).amax()) if errors.numel() else 0.0
    verdict.errors[name] = worst
    if worst > 1.0:
        verdict.wrong.append(f"{name} differs by {worst:.2f} of what is allowed")


def _compare_runs(verdict: Verdict, names: Any, real: Any, first: Any, second: Any, unused: bool) -> None:
    """Two runs must agree in the rows that sequences have; ``unused`` says that no others are written."""
    for name, rows, x, y in zip(names, real, first, second, strict=True):
        if not torch.equal(x[rows].nan_to_num(), y[rows].nan_to_num()):
            verdict.wrong.append(f"{name} of a second run differs")
        if unused and not x[rows.stop :].isnan().all():
            verdict.wrong.append(f"{name} is written behind its last sequence")


def make_tensors(problem: Problem, device: str) -> tuple[Any, ...]:
    """q, k, v, dout, dlse, the arguments that say where packed sequences lie, and the options."""
    variant = problem.variant
    torch.manual_seed(problem.seed * 1_000_003 + problem.number)
    d, nheads, nheads_k = variant.head_dim, problem.nheads, problem.nheads_k
    if variant.packed:
        batch, seqlen_q, seqlen_k = 1, sum(problem.lengths_q), sum(problem.lengths_k)
    else:
        batch, seqlen_q, seqlen_k = len(problem.lengths_q), problem.lengths_q[0], problem.lengths_k[0]
    sizes = ((seqlen_q, nheads), (seqlen_k, nheads_k), (seqlen_k, nheads_k), (seqlen_q, nheads))
    tail = TAIL if variant.packed else 0
    q, k, v, dout = (_random(batch, n, h, d, tail, problem.layout, variant.dtype, device) for n, h in sizes)
    if problem.steep:  # Keys are swept from the last on: rows outgrow the reference that they start with.
        k.mul_(torch.linspace(100, 1, k.shape[1], device=device)[:, None, None])
    lengths: dict[str, Any] = {}
    lse_shape: tuple[int, ...] = (batch, nheads, seqlen_q)
    if variant.packed:
        q, k, v, dout = (x[0] for x in (q, k, v, dout))
        lse_shape = (nheads, len(q))
        lengths = _lengths(problem, device)
    dlse = torch.randn(lse_shape, device=device) if variant.mask in ("window", "left") else None
    options: dict[str, Any] = {"causal": variant.mask == "causal"}
    if variant.mask in ("window", "left"):
        options["window_size"] = problem.window
    if "softcap" in variant.features:
        options["softcap"] = 5.0 + problem.number % 20
    if "alibi" in variant.features:
        each = len(problem.lengths_q) if problem.number % 2 else None
        options["alibi_slopes"] = torch.rand((nheads,) if each is None else (each, nheads), device=device) / 4
    return q, k, v, dout, dlse, lengths, options


def _random(
    batch: int, n: int, nheads: int, d: int, tail: int, layout: str, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """Random rows, and NaN wherever no kernel has anything to look for."""
    shape = {
        "plain": (batch, n + tail, nheads, d),
        "heads first": (batch, nheads, n + tail, d),
        "slice": (batch, n + tail, nheads + 1, d + 16),
    }[layout]
    x = torch.full(shape, torch.nan, dtype=dtype, device=device)
    if layout == "heads first":
        x = x.transpose(1, 2)
    elif layout == "slice":
        x = x[:, :, 1:, 8 : 8 + d]
    x[:, :n].normal_()
    return x


def _lengths(problem: Problem, device: str) -> dict[str, Any]:
    def tensor(numbers: Any) -> torch.Tensor:
        return torch.tensor(list(numbers), dtype=torch.int32, device=device)

    lengths: dict[str, Any] = {
        "cu_seqlens_q": tensor(itertools.accumulate(problem.lengths_q, initial=0)),
        "cu_seqlens_k": tensor(itertools.accumulate(problem.lengths_k, initial=0)),
        "max_seqlen_q": problem.max_seqlen_q,
        "max_seqlen_k": problem.max_seqlen_k,
    }
    if problem.variant.seqused:
        rng = random.Random(problem.number)
        for name, given in (("seqused_q", problem.lengths_q), ("seqused_k", problem.lengths_k)):
            lengths[name] = tensor(rng.choice((n, rng.randint(0, n))) for n in given)
    return lengths
