"""Every shipped configuration under NVIDIA's compute-sanitizer, on a tiny problem, on a GPU.

    python packages/fap-kernels/tests/sanitize.py memcheck racecheck --jobs 16

Processes share the calls, each under compute-sanitizer and a timeout: one for each row and kind of mask of
the Hopper tables, one for each row of the portable ones, and attention to a cache, with rotation and an
append before it. All run once without it, so that Triton's cache is filled. Results are checked too. What a
process that is not clean says is printed, and the exit code tells whether all were clean.

Of kernels with partitions racecheck reports the byte by which Triton tells its worker warps what to run, and
the numbers that partitions hand on by mbarriers. Such reports, and no others, are set aside, and counted;
``judge`` says how they are known, and why they are no races.

To run some of them, by a word in their names:
``python packages/fap-kernels/tests/sanitize.py racecheck --jobs 1 --only d64-causal``.
To see all that compute-sanitizer says, those reports too:
``compute-sanitizer --tool racecheck python .../sanitize.py --share 0/1 --only d64-causal``.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

SEEN = 87
"""What compute-sanitizer exits with where it has found something."""
# Ours, by their names: PyTorch's own cost time.
KERNELS = ("hopper_", "attention_", "kvcache_append", "rotary_kernel")
COMMON = (
    "--error-exitcode", str(SEEN), "--report-api-errors", "no",
    *(word for name in KERNELS for word in ("--kernel-name", f"kns={name}")),
)  # fmt: skip
PRINT_LIMIT = "20"
"""How many errors a tool prints, but for racecheck, which prints all: each must be known to be set aside."""
# Memory that is not cached, so that each tensor has an end.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
GROUPS = ("hopper", "portable", "cache")
FEW_PROCESSORS = 4
"""So many does the GPU seem to have: persistent programs then take several tiles of a tiny problem."""
NONE_FAILED = "no call of this share failed"
"""The last that a share says. compute-sanitizer's exit code may stand in for the share's own."""

MARK = "========="
"""What each line of compute-sanitizer's begins with."""
PLACE = r"(?P<kernel>\w+)\+0x[0-9a-f]+ in (?P<file>\S+):(?P<line>\d+)"
FIRST = re.compile(rf"{MARK} Error: Race reported between (?P<kind>Read|Write) access at {PLACE}")
OTHER = re.compile(rf"{MARK}     and (?P<kind>Read|Write) access at {PLACE} \[\d+ hazards?\]")
SUMMARY = re.compile(
    rf"{MARK} RACECHECK SUMMARY: (\d+) hazards? displayed \((\d+) errors?, (\d+) warnings?\)"
)
TITLES = (MARK, f"{MARK} COMPUTE-SANITIZER")


def calls(device: str, groups: Iterable[str] = GROUPS) -> dict[str, Callable[[], None]]:
    """What is to be run, by name; each raises where its result is wrong."""
    makers = {"hopper": hopper_calls, "portable": portable_calls, "cache": cache_calls}
    return {name: call for group in groups for name, call in makers[group](device).items()}


def hopper_calls(device: str) -> dict[str, Callable[[], None]]:
    from soak_problems import check, draw, variants

    def run(number: int, variant: Any) -> None:
        problem = draw(variant, number, 0)
        seqlen_k = variant.seqlens_k[0] + 290
        seqlen_q = max(variant.queries[0] + 76, 200)
        lengths = ((130, 0, 70), (seqlen_k, 33, 0)) if variant.packed else ((seqlen_q,), (seqlen_k,))
        verdict = check(
            replace(
                problem, nheads_k=2, group=2, lengths_q=lengths[0], lengths_k=lengths[1],
                max_seqlen_q=max(lengths[0]), max_seqlen_k=seqlen_k,
                window=(150, -1 if variant.mask == "left" else 40),
                # Where rows start over, a kernel of its own computes them again.
                steep=variant.mask == "full" and not variant.backward,
            ),
            device,
        )  # fmt: skip
        if verdict.handed_back or verdict.wrong:
            raise AssertionError(f"{variant}: handed back {verdict.handed_back}, wrong {verdict.wrong}")

    return {
        str(variant): lambda number=number, variant=variant: run(number, variant)
        for number, variant in enumerate(variants())
    }


def portable_calls(device: str) -> dict[str, Callable[[], None]]:
    from fap_kernels import attention_backward, attention_forward, attention_probabilities, use_schedule
    from fap_kernels.backward.config import DKDV, DQ
    from fap_kernels.forward.config import FORWARD

    def run(row: Any) -> None:
        dtype = torch.float32 if row.float32 else torch.float16
        seqlen_k = max(row.seqlen_from, 150)
        q, k, v, dout = (
            torch.randn(1, n, h, row.head_dim, device=device, dtype=dtype)
            for n, h in ((140, 4), (seqlen_k, 2), (seqlen_k, 2), (140, 4))
        )
        options: dict[str, Any] = {"causal": row.bounded is not False}
        if not row.plain:
            options |= {"softcap": 20.0, "alibi_slopes": torch.rand(4, device=device), "dropout_p": 0.2}
        with use_schedule("portable"):
            out, lse, rng_state = attention_forward(q, k, v, **options)
            options["rng_state"] = rng_state
            gradients = attention_backward(dout, q, k, v, out, lse, **options)
            weights = attention_probabilities(q, k, lse, **options)
        for x in (out, lse, weights, *gradients):
            if not x.isfinite().all():
                raise AssertionError(f"{row} gives what is not finite")

    return {
        f"portable {name} {number} d{row.head_dim}": lambda row=row: run(row)
        for name, table in (("forward", FORWARD), ("dkdv", DKDV), ("dq", DQ))
        for number, row in enumerate(table)
        if row.family == "sm_90"
    }


def cache_calls(device: str) -> dict[str, Callable[[], None]]:
    """Few queries and many, split and not, contiguous and by page; rotation and appending before."""
    from fap_kernels import apply_rotary, attention_kvcache_forward, kvcache_append

    def run(head_dim: int, seqlen_q: int, page_size: int, num_splits: int) -> None:
        batch, capacity, heads = 3, 256, 2
        draw = lambda *shape: torch.randn(*shape, device=device, dtype=torch.float16)  # noqa: E731
        q, new = draw(batch, seqlen_q, 4 * heads, head_dim), draw(batch, seqlen_q, heads, head_dim)
        lengths = torch.tensor([0, 100, capacity - seqlen_q], device=device, dtype=torch.int32)
        table, shape = None, (batch, capacity)
        if page_size:
            pages = batch * capacity // page_size
            table = torch.randperm(pages, device=device).to(torch.int32).view(batch, -1)
            shape = (pages, page_size)
        k, v = (draw(*shape, heads, head_dim) for _ in "kv")
        cos, sin = (draw(capacity, head_dim // 4) for _ in "cs")
        rotated = apply_rotary(q, cos, sin, seqlen_offsets=lengths)
        kvcache_append(
            k, v, new, new, lengths, block_table=table, rotary_cos=cos, rotary_sin=sin,
            rotary_interleaved=bool(page_size),
        )  # fmt: skip
        out, lse = attention_kvcache_forward(
            rotated, k, v, lengths, seqlen_new=seqlen_q, block_table=table, causal=True, num_splits=num_splits
        )
        if not out.isfinite().all() or not lse.isfinite().all():
            raise AssertionError("attention to a cache gives what is not finite")

    return {
        f"cache d{head_dim} {seqlen_q} queries, pages of {page_size}, {num_splits} splits": (
            lambda arguments=(head_dim, seqlen_q, page_size, num_splits): run(*arguments)
        )
        for head_dim in (64, 128, 256)
        for seqlen_q in (1, 20, 100)
        for page_size, num_splits in ((0, 3), (32, 1))
    }


def run_share(share: str, groups: Iterable[str], device: str, only: str = "") -> int:
    """Run every n-th call from number i on, for a share of "i/n" of those with ``only`` in their names.

    Returns how many failed.
    """
    from fap_kernels import target

    target._processors_of_index = lambda index: FEW_PROCESSORS
    first, step = map(int, share.split("/"))
    failed = 0
    chosen = [(name, call) for name, call in calls(device, groups).items() if only in name]
    for name, call in chosen[first::step]:
        try:
            call()
            torch.cuda.synchronize()
            print(f"ran {name}", flush=True)
        except Exception as error:  # noqa: BLE001 - the others still count
            failed += 1
            print(f"FAILED {name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
    if not failed:
        print(NONE_FAILED, flush=True)
    return failed


def run_all(
    command: list[str], jobs: int, timeout: float, numbers: Iterable[int] | None = None
) -> list[tuple[int | None, str]]:
    """Exit code, None for what was killed, and output of each share, or of those with these ``numbers``."""
    shares = []
    for number in range(jobs) if numbers is None else numbers:
        output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with its share
        process = subprocess.Popen(
            [*command, "--share", f"{number}/{jobs}"],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | ENVIRONMENT,
            start_new_session=True,
        )
        shares.append((process, output))
    deadline = time.monotonic() + timeout
    results = []
    for process, output in shares:
        code = None
        try:
            code = process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the sanitizer, and what it has started
            process.wait()
        with output:
            output.seek(0)
            results.append((code, output.read()))
    return results


def failed_itself(code: int | None, text: str) -> str | None:
    """How compute-sanitizer has failed, not a call, and the share is to run again; else None.

    Seen of 2025.3.1, once each in 160 shares: it was gone by a signal before a call had come to its end, and
    it reported a race without the name or place of anything.
    """
    if code is not None and code < 0 and text.strip() in ("", f"{MARK} COMPUTE-SANITIZER"):
        return f"the sanitizer ended by signal {-code} before any call did"
    if re.search(rf"^{MARK} Error: Race reported between (Read|Write) access at *$", text, re.MULTILINE):
        return "a report names no place"
    return None


@dataclass(frozen=True)
class Places:
    """Lines of a kernel with partitions to which accesses of Triton's own are attributed.

    Attributes:
        file: the name of the kernel's file, without folders, as compute-sanitizer gives it.
        entry: from the first decorator to the line of ``def``, which worker warps have where they read what
            to run, and the kernel's first warps where they tell them.
        partitions: where a statement of the body begins that calls ``warp_specialize``, and where the call
            does. That workers are to end is told them at the kernel's end, which up to Triton 3.7 has the
            line where its last statement begins, the call or an ``if`` around it; with 3.9 that of ``def``.
    """

    file: str
    entry: frozenset[int]
    partitions: frozenset[int]


def places_of_triton(folder: Path | None = None) -> dict[str, Places]:
    """Those of each kernel with partitions, by its name, in the modules of a folder, or the Hopper ones."""
    if folder is None:
        from fap_kernels import hopper

        folder = Path(hopper.__path__[0])
    places = {}
    for path in sorted(folder.glob("*.py")):
        # They are read, since without Gluon some cannot be imported.
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(function, ast.FunctionDef):
                continue
            partitions = {line for statement in function.body for line in lines_of_partitions(statement)}
            if partitions:
                first = min([function.lineno, *(node.lineno for node in function.decorator_list)])
                entry = range(first, function.lineno + 1)
                places[function.name] = Places(path.name, frozenset(entry), frozenset(partitions))
    return places


@dataclass(frozen=True)
class Board:
    """Lines of a module that hands numbers on in shared memory: where they are written, and where read."""

    file: str
    writes: frozenset[int]
    reads: frozenset[int]


def board_of(path: Path | None = None) -> Board:
    """That of a module, or of ``fap_kernels.hopper.announcements``."""
    if path is None:
        from fap_kernels import hopper

        path = Path(hopper.__path__[0]) / "announcements.py"
    lines: dict[str, set[int]] = {"store": set(), "load": set()}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in lines:
            lines[node.func.attr].add(node.lineno)
    return Board(path.name, frozenset(lines["store"]), frozenset(lines["load"]))


def lines_of_partitions(statement: ast.stmt) -> Iterator[int]:
    """Where it begins, and where each call of ``warp_specialize`` in it does; nothing where there is none."""
    for call in ast.walk(statement):
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "warp_specialize":
            yield statement.lineno
            yield from range(call.lineno, (call.func.end_lineno or call.lineno) + 1)


@dataclass(frozen=True)
class Verdict:
    """What is to be said of a share.

    Attributes:
        clean: whether nothing was found but what is set aside.
        rest: the output, less that.
        set_aside: how many reports that is, by kernel, of Triton's own byte.
        announced: the same of numbers that are handed on.
    """

    clean: bool
    rest: str
    set_aside: Counter[str] = field(default_factory=Counter)
    announced: Counter[str] = field(default_factory=Counter)


def judge(tool: str, code: int | None, text: str, places: dict[str, Places], board: Board) -> Verdict:
    """Judge a share by its exit code and output, setting aside what racecheck is wrong about.

    Worker warps read a byte of shared memory for the number of the function that they are to run, and the
    kernel's first warps write it. Barriers of all warps keep the two apart, but racecheck reports them, of
    kernels of a few lines too. It is known by its lines: a read at the kernel's entry, and writes there or
    where the partitions are made. What partitions themselves do has other lines.

    Nor does it follow numbers from one partition to another by mbarriers, waited for and arrived at as Triton
    does: of a kernel of a few lines in which one warp writes a number, arrives, and others that waited read
    it and arrive, it reports every write and read. Such reports have the ``board``'s lines alone. So a
    mistake in how the board is used would be set aside as well: that it is waited for, and that all warps
    meet before they arrive, ``test_numbers_are_handed_on_between_barriers`` looks up in the assembly.

    A share with errors is clean only if all are of these kinds: as many as the summary counts, nothing else
    that compute-sanitizer says, and no call that failed.
    """
    if tool != "racecheck":
        return Verdict(code == 0, text)
    set_aside: Counter[str] = Counter()
    announced: Counter[str] = Counter()
    rest: list[str] = []
    for block in blocks(text):
        kernel, accesses = accesses_of(block, places)
        if kernel is not None and are_tritons_own(accesses, places[kernel], board):
            set_aside[kernel] += 1
        elif kernel is not None and are_announcements(accesses, board):
            announced[kernel] += 1
        else:
            rest += block
    said = [line for line in rest if MARK in line and line not in TITLES]
    if code == 0:
        clean = not any("Error" in line for line in said)
    else:
        own = set_aside.total() + announced.total()
        counted = [match and tuple(map(int, match.groups())) for match in map(SUMMARY.fullmatch, said)]
        # The summary alone: so many hazards, all of them errors.
        clean = code == SEEN and own > 0 and counted == [(own, own, 0)] and NONE_FAILED in rest
    return Verdict(clean, "\n".join(rest), set_aside, announced)


def blocks(text: str) -> list[list[str]]:
    """The lines of an output, those of a report together; lines of the share's own may stand among them."""
    split: list[list[str]] = []
    latest: list[str] | None = None
    for line in map(str.rstrip, text.splitlines()):
        if latest is not None and (line == MARK or line.startswith(f"{MARK}  ")):
            latest.append(line)
            continue
        split.append([line])
        if line.startswith(MARK):
            latest = split[-1] if "Race reported" in line else None
    return split


class Access(NamedTuple):
    """One of the accesses that a report names."""

    kind: str
    file: str
    line: int


def accesses_of(block: list[str], places: dict[str, Places]) -> tuple[str | None, list[Access]]:
    """The kernel with partitions that a report is of, and the accesses; None and none for anything else."""
    matches = [FIRST.fullmatch(block[0]), *(OTHER.fullmatch(line) for line in block[1:] if line != MARK)]
    accesses, kernels = [], set()
    for match in matches:
        if match is None:
            return None, []
        accesses.append(Access(match["kind"], match["file"], int(match["line"])))
        kernels.add(match["kernel"])
    if len(kernels) > 1 or len(accesses) < 2 or not kernels <= places.keys():
        return None, []
    return kernels.pop(), accesses


def are_tritons_own(accesses: list[Access], known: Places, board: Board) -> bool:
    """Whether a report has seen Triton itself, and nothing else."""
    first, *others = accesses
    # What follows an inlined line of the board is taken to stand in the board's file, with a line of its own.
    return (
        first.kind == "Read"
        and first.file == known.file
        and first.line in known.entry
        and all(
            other.kind == "Write"
            and (
                (other.file == known.file and other.line in known.entry | known.partitions)
                or (other.file == board.file and other.line in known.partitions - board.writes)
            )
            for other in others
        )
    )


def are_announcements(accesses: list[Access], board: Board) -> bool:
    """Whether a report has seen numbers of the board being written and read, and nothing else."""
    lines = {"Write": board.writes, "Read": board.reads}
    first, *others = accesses
    return all(other.kind != first.kind for other in others) and all(
        access.file == board.file and access.line in lines[access.kind] for access in accesses
    )


def report(
    tool: str,
    results: list[tuple[int | None, str]],
    seconds: float,
    places: dict[str, Places],
    board: Board,
) -> int:
    """Print what the shares have come to under a tool, and return how many are not clean."""
    ran = sum(text.count("\nran ") + text.startswith("ran ") for _, text in results)
    verdicts = [judge(tool, code, text, places, board) for code, text in results]
    codes = (code for code, _ in results)
    dirty = [(code, verdict) for code, verdict in zip(codes, verdicts, strict=True) if not verdict.clean]
    print(f"{tool}: {ran} calls, {len(dirty)} shares not clean, {seconds:.0f} s")
    if tool == "racecheck":
        print_set_aside(tool, "as Triton's own", (verdict.set_aside for verdict in verdicts))
        print_set_aside(tool, "as handed on by mbarriers", (verdict.announced for verdict in verdicts))
    for code, verdict in dirty:
        count = verdict.set_aside.total() + verdict.announced.total()
        less = f", less {count} reports set aside" if count else ""
        print(f"exit code {code}{less}\n{verdict.rest[-6000:]}", flush=True)
    return len(dirty)


def print_set_aside(tool: str, why: str, counters: Iterable[Counter[str]]) -> None:
    """Say how many reports were set aside, and of which kernels."""
    total = sum(counters, Counter[str]())
    by_kernel = "".join(f", {count} in {kernel}" for kernel, count in sorted(total.items()))
    print(f"{tool}: {total.total()} reports set aside {why}{by_kernel}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tools", nargs="*", default=["memcheck", "racecheck"], help="compute-sanitizer's")
    parser.add_argument("--groups", nargs="+", choices=GROUPS, default=GROUPS, help="of calls")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds for each tool")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the command")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", default="", help="a word in the names of the calls to run")
    parser.add_argument("--share", help="run this share of the calls here: number/count")
    options = parser.parse_args()
    if options.share is not None:
        return 1 if run_share(options.share, options.groups, options.device, options.only) else 0
    python = [sys.executable, __file__, "--device", options.device, "--groups", *options.groups]
    python += ["--only", options.only]
    places, board = places_of_triton(), board_of()
    bad = 0
    for tool in ("none", *options.tools):
        limit = "0" if tool == "racecheck" else PRINT_LIMIT  # 0: no limit
        sanitizer = [options.sanitizer, "--tool", tool, "--print-limit", limit, *COMMON]
        begin = time.monotonic()
        command = python if tool == "none" else [*sanitizer, *python]
        results = run_all(command, options.jobs, options.timeout)
        again = {number: why for number, result in enumerate(results) if (why := failed_itself(*result))}
        # What is known is said before more is asked.
        known = [result for number, result in enumerate(results) if number not in again]
        bad += report(tool, known, time.monotonic() - begin, places, board)
        for number, why in again.items():
            print(f"{tool}: share {number} runs again, since {why}", flush=True)
        if again:
            begin = time.monotonic()
            results = run_all(command, options.jobs, options.timeout, again)
            bad += report(tool, results, time.monotonic() - begin, places, board)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
