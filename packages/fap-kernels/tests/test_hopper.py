"""The Hopper forward without a GPU: compiled ahead of time, and how it is chosen."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from ahead_of_time import (
    Compiled,
    compile_launch,
    disassemble,
    exponentials_between,
    left_unset,
    places,
    unknown_maps,
)

from fap_kernels import AttentionProblem, explain_schedule, use_schedule
from fap_kernels.hopper.conditions import forward_reasons_against
from fap_kernels.hopper.config import FORWARD, HopperConfig, HopperRow, choose
from fap_kernels.packing import Packing
from fap_kernels.schedule import explicit_schedule
from fap_kernels.target import SM_80, SM_90

# Bytes a thread that a row may spill, stores and loads together: what the assemblers of Triton 3.6 to 3.9
# were seen to spill, and a margin. One warpgroup spills nothing, and two hardly more. Three, with 160
# registers a thread, spill up to 64 with Triton 3.6, where they were measured, and up to 2.0 KB with 3.9 (2.7
# in rows of before). With softcap and ALiBi, Triton 3.6 spills 68 and 3.9 up to 2.3 KB.
SPILLS = {1: 0, 2: 384, 3: 3072}
SPILLS_OF_DECORATED = {1: 320, 2: 2432}
PROCESSORS = 1  # so that programs have more than one tile


def gluon_is_here() -> bool:
    return not any("Triton" in reason for reason in forward_reasons_against(describe()[0], SM_90))


def describe(
    head_dim: int = 128, seqlen_k: int = 256, packed: bool = False, dtype: torch.dtype = torch.bfloat16,
    alibi: bool = False, seqlen_q: int = 256, seqused: bool = False, nheads_k: int = 4, **options: Any,
) -> tuple[AttentionProblem, tuple[torch.Tensor, ...], torch.Tensor | None, Packing | None]:  # fmt: skip
    sizes = ((seqlen_q, 4), (seqlen_k, nheads_k), (seqlen_k, nheads_k))
    q, k, v = (torch.empty(1, n, nheads, head_dim, dtype=dtype) for n, nheads in sizes)
    slopes = torch.ones(4) if alibi else None
    packing = None
    if packed:
        bounds = torch.zeros(3, dtype=torch.int32)
        used = {"seqused_q": bounds[:2], "seqused_k": bounds[:2]} if seqused else {}
        packing = Packing.describe(q[0], k[0], bounds, bounds, seqlen_q, seqlen_k, **used)
    tensors = (x[0] if packed else x for x in (q, k, v))
    problem = AttentionProblem.describe(*tensors, alibi_slopes=slopes, packing=packing, **options)
    return problem, (q, k, v), slopes, packing


def compile_forward(which: int = 0, config: HopperConfig | None = None, **call: Any) -> Compiled:
    """The forward or, as number 1, the kernel that computes marked tiles again."""
    from fap_kernels.hopper.launch import plan_hopper_forward

    problem, (q, k, v), slopes, packing = describe(**call)
    lse = torch.empty(1, 4, q.shape[1])
    launches, _ = plan_hopper_forward(
        problem, PROCESSORS, q, k, v, torch.empty_like(q), lse, slopes, packing, config
    )
    attention = [launch for launch in launches if "lse" in launch.arguments]
    return compile_launch(attention[which], "sm_90")


def calls_of(row: HopperRow) -> dict[str, dict[str, Any]]:
    """The calls that ask most of a row, by name."""
    # Rows below one for short sequences are for longer ones.
    seqlen_k = max(row.seqlen_from, 256) if row.bounded is not None else 8192
    call = {"head_dim": row.head_dim, "seqlen_k": seqlen_k, "packed": row.packed is True}
    call["seqlen_q"] = max(row.queries_from, 256)
    if row.plain is False:
        call |= {"softcap": 30.0, "alibi": True}
    if row.bounded is False:
        return {"full": call}
    masks = {"causal": call | {"causal": True}, "window": call | {"window_size": (90, 5)}}
    if row.windowed is not None:
        del masks["causal" if row.windowed else "window"]
    return masks


def rows() -> list[Any]:
    """Every row with its calls, less those whose code another row has.

    A window on the left is one loop more than a causal mask: it is compiled for one row of each shape.
    """
    codes = {}
    for number, row in enumerate(FORWARD):
        for name, call in calls_of(row).items() if row.config is not None else ():
            program: Any = row.config
            if name == "window":
                program = row.config.width, row.config.warpgroups
            code = program, name, row.packed is True, row.plain is False
            codes.setdefault(code, pytest.param(row, call, id=f"d{row.head_dim}-{number}-{name}"))
    return list(codes.values())


needs_gluon = pytest.mark.skipif(not gluon_is_here(), reason="Gluon for Hopper comes with Triton 3.6")


@needs_gluon
@pytest.mark.parametrize(("row", "call"), rows())
def test_a_row_compiles_within_its_bounds(row: HopperRow, call: dict[str, Any]) -> None:
    assert choose(FORWARD, describe(**call)[0]) is row, "an earlier row hides this one"
    forward = compile_forward(**call)
    assert forward.shared <= SM_90.shared_memory
    # Of the 228 KB that programs share, the chip takes 1 KB for each.
    assert row.config.beside * (forward.shared + 1024) <= 228 * 1024, "fewer fit beside each other"
    spills = SPILLS_OF_DECORATED if row.plain is False else SPILLS
    assert forward.spills <= spills[row.config.warpgroups], "a row spills more than was recorded"
    assert "wgmma.mma_async" in forward.assembly
    assert "cp.async.bulk.tensor" in forward.assembly
    assert not forward.warnings, "ptxas serialises the products, or takes registers from a partition"
    assert not left_unset(forward), "a path leaves a register unset that is read later"
    assert not written_while_it_leaves(disassemble(forward)), "not all warps know that an output has left"
    check_barriers(row.config, forward)


def paired_rows() -> list[Any]:
    return [
        pytest.param(row, id=f"d{row.head_dim}-{row.seqlen_from}")
        for row in FORWARD
        if row.config is not None and row.config.paired and row.config.beside == 1 and row.windowed is False
    ]


@needs_gluon
@pytest.mark.parametrize("row", paired_rows())
def test_pairs_that_leave_multiprocessors_idle_are_taken_tile_by_tile(row: HopperRow) -> None:
    from fap_kernels.hopper.launch import forward_config

    seqlen = max(row.seqlen_from, row.queries_from)
    call = {"head_dim": row.head_dim, "seqlen_q": seqlen, "seqlen_k": seqlen, "causal": True}
    problem, *_ = describe(**call)
    assert choose(FORWARD, problem).config is row.config
    assert forward_config(problem, 1) is row.config
    many = replace(problem, batch=64)
    assert forward_config(many, 132) is row.config
    few = forward_config(problem, 132)  # four heads
    assert {few.paired, few.persistent, few.cluster} == {False}
    assert (few.width, few.block_n, few.warpgroups) == (
        row.config.width, row.config.block_n, row.config.warpgroups
    )  # fmt: skip
    forward = compile_forward(config=few, **call)
    assert forward.spills <= SPILLS[few.warpgroups]
    assert not forward.warnings
    assert not left_unset(forward)
    check_barriers(few, forward)


@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_nothing_else_is_as_large_as_the_barriers(head_dim: int) -> None:
    """What is handed to partitions, and announcements, take shared memory too."""
    options = {"softcap": 30.0, "alibi": True, "window_size": (90, 5), "packed": True, "seqused": True}
    program = {"persistent": True, "tickets": True, "optimistic": False}
    for warpgroups in (1, 2, 3) if head_dim == 64 else (2,):
        config = HopperConfig(head_dim, warpgroups, 64 if head_dim == 256 else 128, 2, **program)
        check_barriers(config, compile_forward(config=config, head_dim=head_dim, **options))


def written_while_it_leaves(code: list[str]) -> list[str]:
    """Stores to shared memory behind a wait for what leaves it, which one thread did, and no meeting."""
    kinds = {"DEPBAR.LE SB": "wait", "BAR.SYNC": "meeting", "STSM": "store"}
    found = [(kind, line) for line in code for text, kind in kinds.items() if text in line]
    return [line for (before, _), (kind, line) in pairwise(found) if (before, kind) == ("wait", "store")]


def given_back_while_loaded(code: list[str], barriers: set[int]) -> list[str]:
    """Arrivals at these barriers behind loads to registers, and no product that has taken what was loaded.

    The assembler lets an arrival go before what was loaded has come, and the slot may be filled by then.
    """
    found, loading = [], False
    for line in code:
        if "LDSM" in line or "WARPGROUP.DEPBAR" in line:
            loading = "LDSM" in line
        place = re.search(r"SYNCS\.ARRIVE\S* \w+, \[U?R\d+\+(?:UR\d+\+)?0x([0-9a-f]+)\]", line)
        if loading and place is not None and int(place[1], 16) in barriers:
            found.append(line)
    return found


def check_barriers(config: HopperConfig, forward: Compiled) -> None:
    """The barriers of the rings lie where assembly has them, and warps do not meet there."""
    row = 2 * config.width
    queries = 64 * config.warpgroups * row
    slots = config.warpgroups * (2 if config.overlap_tiles or config.queries_ahead else 1)
    staging = queries if config.overlap_tiles else queries // config.out_parts if config.out_parts else 0
    first = 2 * config.stages * config.block_n * row + slots * 64 * row + staging
    counts = (config.stages, config.stages, slots)
    barriers = {
        first + 128 * ring + 64 * kind + 8 * slot
        for ring, count in enumerate(counts)
        for kind in range(2)
        for slot in range(count)
    }
    set_up = places(forward, r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]")
    assert barriers <= set(set_up), "they lie elsewhere"
    waited_for = {int(place) for place in re.findall(r"\[barrier \+ (\d+)\], %", forward.assembly)}
    assert waited_for == {first, first + 128, first + 256}
    # Keys and values that two programs share are given back to the one that fetches them.
    given_back = {int(place) for place in re.findall(r"_, \[barrier \+ (\d+)\]", forward.assembly)}
    arrivals = {first + 320 + 8 * slot for slot in range(slots)}
    assert not given_back_while_loaded(disassemble(forward), arrivals)
    # Where a program marks itself, nothing else stands.
    cleared = re.findall(r"st\.shared\.u32 \[place \+ (\d+)\], none", forward.assembly)
    set_down = re.findall(r"add\.u32 own, own, (\d+);", forward.assembly)
    looked_for = re.findall(r"ld\.volatile\.shared\.u32 \S+ \[place \+ (\d+)\]", forward.assembly)
    marks = {int(place) for place in (*cleared, *set_down, *looked_for)}
    if "setp.nan.f32 marked" in forward.assembly:
        assert cleared
        assert set_down
        assert looked_for
        assert marks == {first + 384} - set(set_up)
    else:
        assert not marks
    by_warps = {first + 320} if config.cluster else {first + 64, first + 192, first + 320}
    assert given_back == by_warps


@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_the_exponentials_run_beside_the_product_with_the_values(head_dim: int, causal: bool) -> None:
    call = {"head_dim": head_dim, "causal": causal, "seqlen_k": 16384}
    config = choose(FORWARD, describe(**call)[0]).config
    assert config is not None
    beside = exponentials_between(disassemble(compile_forward(**call)), 1, 0)
    # Each of the 128 threads of a warpgroup has this many of the 64 x BLOCK_N weights.
    exponentials = config.block_n // 2
    assert beside, "no step waits for its scores first and for its output later"
    assert min(beside) >= exponentials, "the wait for O was moved above the exponentials"


@needs_gluon
@pytest.mark.parametrize(("head_dim", "parts"), [(128, 1), (256, 2)])
def test_the_next_tiles_first_scores_run_beside_the_way_of_the_output(head_dim: int, parts: int) -> None:
    call = {"head_dim": head_dim, "seqlen_k": 16384}
    config = choose(FORWARD, describe(**call)[0]).config
    assert config is not None
    assert config.out_parts == parts
    products, at_stores, since = 0, [], []
    for line in disassemble(compile_forward(**call)):
        since += [word for word in ("DEPBAR.LE SB", "BAR.SYNC", "STSM") if word in line]
        if "HGMMA" in line:
            products += 1
        elif "WARPGROUP.DEPBAR" in line:
            products = 0
        elif "UTMASTG" in line:
            at_stores.append(products)
            # The place is written once all warps know that what was in it has left.
            assert "BAR.SYNC" in since[: since.index("STSM")][since.index("DEPBAR.LE SB") :]
            since = []
    for_scores = head_dim // 16
    assert at_stores == [0, for_scores][-parts:] * config.warpgroups


@needs_gluon
@pytest.mark.parametrize(("head_dim", "causal"), [(128, False), (128, True), (256, False)])
def test_what_a_cluster_addresses_is_where_its_assembly_has_it(head_dim: int, causal: bool) -> None:
    call = {"head_dim": head_dim, "causal": causal, "seqlen_q": 16384, "seqlen_k": 16384}
    config = choose(FORWARD, describe(**call)[0]).config
    assert config is not None
    assert config.cluster
    forward = compile_forward(**call)
    row = 2 * config.width
    queries = 2 * config.stages * config.block_n * row
    # The queries come behind all tiles of keys and values, which so begin where shared memory does.
    assert places(forward, r"complete_tx::bytes \[(%r\d+)\]")[0] == queries
    assert not unknown_maps(forward)
    assert "multicast::cluster" in forward.assembly


def test_programs_that_share_a_multiprocessor_share_its_registers() -> None:
    assert HopperConfig(64, 2, 64, 2).maxnreg is None
    assert HopperConfig(64, 1, 64, 2, beside=3).maxnreg == 80
    assert HopperConfig(64, 1, 64, 2, beside=2).maxnreg == 128
    for stages in (1, 9):
        with pytest.raises(ValueError, match=f"stages must be 2 to 8, got {stages}"):
            HopperConfig(64, 1, 64, stages)
    with pytest.raises(ValueError, match="no registers"):
        HopperConfig(64, 2, 64, 2, beside=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"out_parts": 2}, "parts of at least 64 columns, and where tiles overlap as a whole"),
        ({"out_parts": 1, "overlap_tiles": True}, "where tiles overlap as a whole"),
        ({"out_parts": 3}, "must be 0, 1 or 2, got 3"),
        ({"out_parts": -1}, "must be 0, 1 or 2, got -1"),
        ({"out_parts": 1, "persistent": False}, "needs a persistent program"),
    ],
)
def test_the_output_leaves_in_parts_that_can_be_made(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        HopperConfig(
            **{"width": 64, "warpgroups": 2, "block_n": 64, "stages": 2, "persistent": True, **options}
        )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"warpgroups": 3}, "have two warpgroups and at most four stages"),
        ({"stages": 5}, "have two warpgroups and at most four stages"),
        ({"overlap_tiles": True}, "neither overlap query tiles nor draw them"),
        ({"tickets": True}, "neither overlap query tiles nor draw them"),
        ({"queries_ahead": True}, "where the most shared memory is taken"),
    ],
)
def test_a_cluster_has_programs_that_can_be_made(options: dict[str, Any], reason: str) -> None:
    shape = {"width": 128, "warpgroups": 2, "block_n": 64, "stages": 2, "persistent": True}
    with pytest.raises(ValueError, match=reason):
        HopperConfig(**{**shape, "cluster": True, **options})


@needs_gluon
@pytest.mark.parametrize(("processors", "programs"), [(1, 2), (5, 4), (132, 40)])
def test_programs_of_a_cluster_come_in_pairs(processors: int, programs: int) -> None:
    from fap_kernels.hopper.launch import plan_hopper_forward

    problem, (q, k, v), *_ = describe(seqlen_q=1100, seqlen_k=4096)
    lse = torch.empty(1, 4, q.shape[1])
    (forward,), _ = plan_hopper_forward(problem, processors, q, k, v, torch.empty_like(q), lse, None)
    assert (forward.programs, forward.cluster, forward.grid) == (programs, 2, (programs // 2, 1, 1))
    assert forward.arguments["items"] == 20, "of 256 queries"
    packed, (q, k, v), _, packing = describe(packed=True)
    config = HopperConfig(128, 2, 128, 2, persistent=True, cluster=True)
    with pytest.raises(ValueError, match="share no packed sequences"):
        plan_hopper_forward(packed, 1, q, k, v, torch.empty_like(q), lse, None, packing, config)


@needs_gluon
def test_of_a_triton_that_is_not_known_no_places_are_taken_for_granted(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from fap_kernels.hopper import conditions
    from fap_kernels.hopper.launch import plan_hopper_forward

    problem, (q, k, v), *_ = describe(seqlen_q=1100, seqlen_k=4096)
    lse = torch.empty(1, 4, q.shape[1])
    monkeypatch.setattr(conditions, "_triton", lambda: (3, 10))
    conditions.places_are_known.cache_clear()
    try:
        for _ in range(2):
            (forward, _), _ = plan_hopper_forward(problem, 132, q, k, v, torch.empty_like(q), lse, None)
            assert (forward.programs, forward.cluster, forward.arguments["items"]) == (36, 1, 36)
            assert not forward.arguments["CLUSTER"]
            assert not forward.arguments["ASSEMBLED"]
        assert "[barrier + " not in compile_launch(forward, "sm_90").assembly
    finally:
        conditions.places_are_known.cache_clear()
    (record,) = caplog.records
    assert "programs form no clusters, and warps meet where they wait" in record.getMessage()
    assert "where Triton 3.10 puts what they share is not known" in record.getMessage()


def test_no_row_hides_another() -> None:
    for row in FORWARD:
        for call in calls_of(row).values():
            assert choose(FORWARD, describe(**call)[0]) is row


@needs_gluon
def test_marked_tiles_can_be_computed_again() -> None:
    for head_dim in (64, 128, 256):
        redo = compile_forward(
            1, HopperConfig(head_dim, 2, 64, 2), head_dim=head_dim, causal=True, packed=True
        )
        assert redo.shared <= SM_90.shared_memory


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"head_dim": 60}, "multiple of 8"),
        ({"seqlen_q": 64}, "65 queries"),
        ({"seqlen_q": 128, "seqlen_k": 128}, "two kernels"),
        ({"head_dim": 40, "packed": True}, "not measured"),
        ({"head_dim": 32, "causal": True}, "the portable kernel is faster"),
    ],
    ids=str,
)
def test_what_it_is_not_for_is_said(call: dict[str, Any], reason: str) -> None:
    reasons = forward_reasons_against(describe(**call)[0], SM_90)
    assert any(reason in given for given in reasons)


def test_it_is_for_one_chip() -> None:
    (reason,) = forward_reasons_against(describe()[0], SM_80)
    assert "sm_90" in reason
    assert "sm_80" in reason


def test_a_schedule_is_chosen_by_name() -> None:
    with use_schedule("portable"):
        assert explicit_schedule() == "portable"
        with use_schedule(None):
            assert explicit_schedule() is None
        assert explicit_schedule() == "portable"
    assert explicit_schedule() is None
    with pytest.raises(ValueError, match="'hopper', 'portable' or None, got 'fast'"):
        use_schedule("fast")
    assert explicit_schedule() is None


def test_a_call_is_told_which_schedule_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "fap_kernels.target.target_of"
    monkeypatch.setattr(target, lambda _: SM_90)
    packed = describe(head_dim=40, packed=True)[0]
    assert "not measured" in explain_schedule(packed)
    if gluon_is_here():
        assert explain_schedule(describe(seqlen_k=4096)[0]) == "the Hopper forward"
    with use_schedule("portable"):
        assert "use_schedule" in explain_schedule(describe()[0])
    monkeypatch.setattr(target, lambda _: SM_80)
    assert explain_schedule(packed) == "the portable forward (sm_80)"
