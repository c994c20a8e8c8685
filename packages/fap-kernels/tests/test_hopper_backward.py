"""The Hopper backward without a GPU: compiled ahead of time, and how it is chosen."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from ahead_of_time import (
    Compiled,
    barriers_of_shared_rings,
    compile_launch,
    disassemble,
    exponentials_between,
    left_unset,
    places,
    unknown_maps,
)
from test_hopper import PROCESSORS, describe, gluon_is_here

from fap_kernels import explain_schedule, use_schedule
from fap_kernels.backward.config import padded_rows
from fap_kernels.backward.launch import BackwardInputs
from fap_kernels.direct import is_descriptor
from fap_kernels.hopper.backward_launch import empty_dq_acc, plan_hopper_backward
from fap_kernels.hopper.conditions import backward_reasons_against
from fap_kernels.hopper.config import (
    BACKWARD,
    BACKWARD_64,
    BACKWARD_128,
    BACKWARD_256,
    CLUSTERED_128,
    FOUNDED_128,
    ORDERED_128,
    BackwardConfig,
)
from fap_kernels.launch import Launch
from fap_kernels.target import SM_80, SM_90


def inputs_of(**call: Any) -> BackwardInputs:
    problem, (q, k, v), slopes, packing = describe(**call)
    rows = padded_rows(q.shape[1], problem.batch if problem.packed else 0)
    lse, delta = (torch.empty(1, problem.nheads, rows) for _ in range(2))
    return BackwardInputs(q, k, v, q, lse, delta, slopes, None, packing)


def launches_of(
    config: BackwardConfig | None = None, processors: int = PROCESSORS, **call: Any
) -> list[Launch]:
    """The launches of a call: delta, the gradients and, but where those finish it, dQ."""
    problem, inputs = describe(**call)[0], inputs_of(**call)
    q, dk, dv = inputs.q, torch.empty_like(inputs.k), torch.empty_like(inputs.v)
    lse = torch.empty(1, problem.nheads, q.shape[1])
    launches, _ = plan_hopper_backward(
        problem, processors, inputs, q, lse, None, torch.empty_like(q), dk, dv, config
    )
    return launches


def compile_backward(config: BackwardConfig | None = None, **call: Any) -> Compiled:
    return compile_launch(launches_of(config, **call)[1], "sm_90")


CALLS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "float16": {"causal": True, "dtype": torch.float16},
    "packed": {"packed": True},
    "packed, ordered": {"packed": True, "causal": True, "deterministic": True},
    "ordered": {"deterministic": True},
    "window": {"window_size": (90, 5)},
    "softcap and ALiBi": {"softcap": 30.0, "alibi": True, "causal": True},
}
# Bytes a thread that a program may spill, all partitions and loops together: what the assemblers of Triton
# 3.6 to 3.9 were seen to spill, and a margin.
SPILLS = {
    "full": 1280, "ordered": 1280, "causal": 1280, "float16": 1280, "packed": 1280, "packed, ordered": 1280,
    "window": 3072, "softcap and ALiBi": 4608,
}  # fmt: skip
MANY = 1000
"""Processors, so that every key tile has a program."""
CONFIGS = {64: BACKWARD_64, 128: BACKWARD_128, 256: BACKWARD_256}

needs_gluon = pytest.mark.skipif(not gluon_is_here(), reason="Gluon for Hopper comes with Triton 3.6")


def check_bounds(backward: Compiled, kind: str) -> None:
    assert backward.shared <= SM_90.shared_memory
    assert backward.spills <= SPILLS[kind], "it spills more than was recorded"
    assert not backward.warnings, "ptxas serialises the products, or takes registers from a partition"
    assert not left_unset(backward), "a path leaves a register unset that is read later"


KINDS: dict[BackwardConfig, tuple[str, ...]] = {
    BACKWARD_64: (
        "float16", "causal", "ordered", "window", "packed", "packed, ordered", "softcap and ALiBi",
    ),
    BACKWARD_128: ("full", "float16", "window", "softcap and ALiBi", "ordered"),
    FOUNDED_128: ("full", "causal", "float16", "packed", "window", "softcap and ALiBi"),
    BACKWARD_256: ("full", "float16", "packed", "window", "softcap and ALiBi"),
}  # fmt: skip


@needs_gluon
@pytest.mark.parametrize(
    ("config", "kind"), [(config, kind) for config, kinds in KINDS.items() for kind in kinds]
)
def test_a_configuration_compiles_within_its_bounds(config: BackwardConfig, kind: str) -> None:
    backward = compile_backward(config, head_dim=config.width, **CALLS[kind])
    check_bounds(backward, kind)
    assert "wgmma.mma_async" in backward.assembly
    assert "cp.reduce.async.bulk.tensor" in backward.assembly


@needs_gluon
@pytest.mark.parametrize(("config", "deterministic"), [(FOUNDED_128, False), (BACKWARD_128, True)])
def test_what_was_stored_is_in_memory_before_others_add(config: BackwardConfig, deterministic: bool) -> None:
    """Of each of the two senders: no mistake here would be sure to show on a GPU."""
    code = compile_backward(config, head_dim=128, causal=True, deterministic=deterministic).assembly
    found = re.findall(
        r"cp\.reduce\.async\.bulk\.tensor\.2d|cp\.async\.bulk\.tensor\.2d\.global|\bred\.\S+|\bld\.acquire\.gpu"
        r"|fence\.proxy\.async\.global|cp\.async\.bulk\.wait_group(?:\.read)?\s+0",
        code,
    )
    found = [re.sub(r"\s+", " ", line) for line in found]
    counts = Counter(found)
    assert counts["cp.reduce.async.bulk.tensor.2d"] == counts["cp.async.bulk.tensor.2d.global"] == 2
    assert counts["ld.acquire.gpu"] == counts["fence.proxy.async.global"] == 2
    assert {line for line in found if line.startswith("red.")} == {"red.release.gpu.global.add.u32"}
    before = {
        found[number - 1]
        for number, line in enumerate(found)
        if line in ("red.release.gpu.global.add.u32", "fence.proxy.async.global")
    }
    assert before == {"cp.async.bulk.wait_group 0", "ld.acquire.gpu"}, "arrived is more than read"
    # dK and dV of both warpgroups leave, and what is added but not counted; that may still be on its way.
    assert counts["cp.async.bulk.wait_group.read 0"] == (2 if deterministic else 4)


@needs_gluon
def test_where_the_first_one_stores_nothing_is_zeroed_but_counters() -> None:
    delta, gradients, query_grads = launches_of(FOUNDED_128, head_dim=128, causal=True)
    assert gradients.arguments["FOUNDED"]
    assert delta.arguments["dq_acc"] is None
    assert delta.arguments["additions"] is gradients.arguments["additions"] is not None
    assert query_grads.arguments["additions"] is gradients.arguments["additions"]
    assert not launches_of(FOUNDED_128, head_dim=128, deterministic=True)[1].arguments["FOUNDED"]
    for config in (ORDERED_128, BACKWARD_64, BACKWARD_256):
        with pytest.raises(ValueError, match="founded is for two warpgroups"):
            replace(config, founded=True)


@needs_gluon
@pytest.mark.parametrize(
    ("config", "deterministic"),
    [(None, False), (None, True), (FOUNDED_128, False), (FOUNDED_128, True), (CLUSTERED_128, False),
     (BACKWARD_256, False)],
)  # fmt: skip
def test_a_repeated_call_knows_all_tensors_by_name(
    config: BackwardConfig | None, deterministic: bool
) -> None:
    """Kernels take what a plan makes by the name that it has there, or calls are not kept."""
    width = 64 if config is None else config.width
    call = {"head_dim": width, "seqlen_q": 1024, "seqlen_k": 1024, "deterministic": deterministic}
    problem, inputs = describe(**call)[0], inputs_of(**call)
    dout, out, dq, dk, dv = (torch.empty_like(x) for x in (inputs.q, *inputs[:3], inputs.v))
    inputs = inputs._replace(dout=dout)
    softmax_lse, dlse = (torch.empty(1, problem.nheads, 1024) for _ in range(2))
    launches, workspaces = plan_hopper_backward(
        problem, 2, inputs, out, softmax_lse, dlse, dq, dk, dv, config
    )
    named = {
        **inputs._asdict(), "out": out, "softmax_lse": softmax_lse, "dlse": dlse,
        "dq": dq, "dk": dk, "dv": dv, **workspaces,
    }  # fmt: skip
    for launch in launches:
        for name, value in launch.arguments.items():
            tensor = value.base if is_descriptor(value) else value
            if isinstance(tensor, torch.Tensor):
                assert tensor is named[name.removesuffix("_part0")], f"{name} of {launch.kernel}"


@needs_gluon
@pytest.mark.parametrize("kind", ["causal", "ordered", "packed, ordered"])
def test_programs_that_draw_no_key_tiles_compile_as_well(kind: str) -> None:
    gradients = launches_of(processors=MANY, head_dim=64, **CALLS[kind])[1]
    assert gradients.arguments["tickets"] is None
    check_bounds(compile_launch(gradients, "sm_90"), kind)


@needs_gluon
@pytest.mark.parametrize(
    ("config", "kind"),
    [(BACKWARD_64, "packed, ordered"), (BACKWARD_128, "ordered"), (FOUNDED_128, "causal"),
     (BACKWARD_256, "full")],
)  # fmt: skip
def test_triton_itself_uses_no_barrier_of_ours(config: BackwardConfig, kind: str) -> None:
    from fap_kernels.hopper import barriers

    code = compile_backward(config, head_dim=config.width, **CALLS[kind]).assembly
    # Its numbers stand in the instruction, and ours come in a register.
    numbers = {int(number) for number in re.findall(r"\bbar(?:rier)?\.\S+\s+(\d+)\b", code)}
    assert 0 in numbers
    assert max(numbers) < min(barriers.SLOT_FREE_TOO.value, barriers.WEIGHTS_THERE.value)


@needs_gluon
@pytest.mark.parametrize("deterministic", [False, True])
def test_programs_draw_key_tiles_where_there_are_more(deterministic: bool) -> None:
    delta, gradients, *_ = launches_of(processors=3, head_dim=64, deterministic=deterministic)
    assert gradients.programs == 3
    assert gradients.arguments["items"] == 8
    assert gradients.arguments["tickets"] is delta.arguments["tickets"]
    assert launches_of(processors=8, head_dim=64)[1].programs == 8
    assert launches_of(processors=3, head_dim=128)[1].programs == 8, "these do not stay"


@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128])
def test_grouped_heads_under_a_causal_mask_add_in_any_order(head_dim: int) -> None:
    """Unless they are asked for the same bits on every run."""
    call = {"head_dim": head_dim, "seqlen_q": 2048, "seqlen_k": 2048}
    for options, ordered in (
        ({"causal": True}, True),
        ({"causal": True, "nheads_k": 2}, False),
        ({"causal": True, "nheads_k": 2, "deterministic": True}, True),
        ({"nheads_k": 2}, True),
    ):
        gradients = launches_of(**call, **options)[1]
        assert (gradients.arguments["additions"] is not None) is ordered, options


@needs_gluon
def test_short_calls_of_128_columns_are_founded_and_long_ones_without_a_mask_in_clusters() -> None:
    call: dict[str, Any] = {"head_dim": 128, "seqlen_q": 2048, "seqlen_k": 2048}
    for options in ({}, {"causal": True}, {"causal": True, "seqlen_k": 4096}):
        assert launches_of(**(call | options))[1].arguments["FOUNDED"], options
    for options in (
        {"nheads_k": 2}, {"window_size": (90, 0)}, {"softcap": 3.0}, {"packed": True},
        {"deterministic": True}, {"seqlen_k": 4096}, {"seqlen_k": 8192, "causal": True},
    ):  # fmt: skip
        assert not launches_of(**(call | options))[1].arguments["FOUNDED"], options
    assert launches_of(**(call | {"seqlen_q": 8192, "seqlen_k": 8192}))[1].cluster == 2


def test_the_table_has_no_other_configurations() -> None:
    configs = {row.config and replace(row.config, ordered=False, founded=False) for row in BACKWARD}
    assert configs <= {None, *CONFIGS.values(), CLUSTERED_128}


@needs_gluon
@pytest.mark.parametrize("kind", ["full", "causal", "float16", "window", "softcap and ALiBi"])
def test_a_cluster_compiles_and_addresses_what_is_where_its_assembly_has_it(kind: str) -> None:
    backward = compile_backward(CLUSTERED_128, head_dim=128, **CALLS[kind])
    check_bounds(backward, kind)
    # Keys and values are fetched by Gluon, into the first tiles of the allocation that holds all of them.
    assert places(backward, r"complete_tx::bytes \[(%r\d+)\]")[:4:2] == [0, 32 << 10]
    numbers = 224 << 10
    found = places(backward, r"mbarrier\.init\.shared::cta\.b64 \[(%r\d+)\]")
    assert barriers_of_shared_rings(numbers + 1024, 2) <= set(found)
    # The warpgroups read the numbers of rows, LSE and delta, by a register and a place.
    read = {int(place) for place in re.findall(r"ld\.shared\.\S+\s.*\[%r\d+\+(\d+)\]", backward.assembly)}
    assert {numbers, numbers + 512} <= read
    assert not unknown_maps(backward)


def test_a_cluster_has_programs_that_can_be_made() -> None:
    for config in (ORDERED_128, FOUNDED_128):
        with pytest.raises(ValueError, match="two stages, neither order nor founding"):
            replace(config, cluster=True)
    with pytest.raises(ValueError, match="take 128 columns"):
        replace(BACKWARD_64, cluster=True)


@needs_gluon
def test_programs_of_a_cluster_come_in_pairs() -> None:
    _, gradients, *_ = launches_of(CLUSTERED_128, head_dim=128, seqlen_k=300)
    assert (gradients.programs, gradients.cluster, gradients.arguments["items"]) == (16, 2, 8)
    for call in ({"deterministic": True}, {"packed": True}):
        _, gradients, *_ = launches_of(CLUSTERED_128, head_dim=128, **call)
        assert gradients.cluster == 1, "the order is fixed, or sequences have no pairs of key tiles"


@needs_gluon
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_exponentials_run_beside_the_product_with_the_values(head_dim: int) -> None:
    config = CONFIGS[head_dim]
    code = disassemble(compile_backward(head_dim=head_dim, dtype=torch.float16))
    # From S being there, beside dP, to dP being there, beside dV.
    beside = exponentials_between(code, 1, 1)
    # Each of the 128 threads of a warpgroup has this many of the 64 x BLOCK_N weights.
    exponentials = config.block_m // 2
    assert len(beside) == 2, "a step without a mask, of both warpgroups"
    assert min(beside) >= exponentials, "the wait for dP was moved above the exponentials"


@needs_gluon
def test_where_a_third_warpgroup_makes_dq_the_others_hardly_wait() -> None:
    backward = compile_backward(head_dim=64, seqlen_k=4096)
    # A step has 64 numbers of S and 64 of dP. There is room for both only one after the other.
    assert backward.spills <= 64, "dP starts before all exponentials are done"
    steps = _steps(disassemble(backward), "0110")
    # With a mask and without, of both warpgroups.
    assert len(steps) == 4
    for step in steps:
        between = next(n for n, line in enumerate(step) if "WARPGROUP.DEPBAR" in line and n > 0)
        assert sum("MUFU.EX2" in line for line in step[:between]) == BACKWARD_64.block_m // 2
        # For a slot alone, and there mostly not; that a slot is full, and a stage empty, is only told.
        assert sum("BAR.SYNC" in line for line in step) == 1
        assert sum("BAR.ARV" in line for line in step) == 2, "the third comes behind the last wait"


@needs_gluon
@pytest.mark.parametrize(
    ("config", "deterministic"), [(BACKWARD_128, False), (BACKWARD_128, True), (FOUNDED_128, False)]
)
def test_a_step_has_few_barriers(config: BackwardConfig, deterministic: bool) -> None:
    """One hand-over of dS with a barrier behind it; dQ, and the stages, are only told of.

    The barrier at the start of a step stands before those that are looked at.
    """
    code = disassemble(compile_backward(config, deterministic=deterministic))
    # From dP being there to the end of the step, with waits for dV and dQ between.
    steps = _steps(code, "1210")
    assert len(steps) == 4, "two loops of two warpgroups"
    for step in steps:
        assert sum("BAR.SYNC" in line for line in step) == 2
        assert sum("BAR.ARV" in line for line in step) == 2
    assert sum("UTMAREDG" in line for line in code) == 2, "other warps have dQ added"
    # dK and dV of two warpgroups, and dQ where a first addition is known.
    assert sum("UTMASTG" in line for line in code) == (6 if deterministic or config.founded else 4)


def _steps(code: list[str], outstanding: str) -> list[list[str]]:
    """The instructions from the first to the last of waits that leave so many products under way."""
    waits = [
        (number, match[1])
        for number, line in enumerate(code)
        if (match := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\d)", line))
    ]
    rows = [waits[n : n + len(outstanding)] for n in range(len(waits))]
    return [code[row[0][0] : row[-1][0]] for row in rows if "".join(left for _, left in row) == outstanding]


@needs_gluon
def test_what_surrounds_it_compiles() -> None:
    for width, config in CONFIGS.items():
        delta, _, query_grads = launches_of(config, head_dim=width)
        assert compile_launch(delta, "sm_90").spills == 0
        assert compile_launch(query_grads, "sm_90").spills == 0
        if config.relay:
            continue
        delta, _, query_grads = launches_of(config, head_dim=width, deterministic=True, window_size=(9, 0))
        assert compile_launch(delta, "sm_90").spills == 0
        assert compile_launch(query_grads, "sm_90").spills == 0


@pytest.mark.parametrize(
    ("call", "launches"),
    [
        ({}, 2),
        ({"causal": True, "seqlen_q": 100}, 2),
        ({"causal": True, "seqlen_q": 257}, 3),  # the first query sees no key
        ({"window_size": (-1, 200), "seqlen_q": 257}, 2),
        ({"window_size": (-1, 1), "seqlen_q": 257}, 2),
        ({"window_size": (-1, 1), "seqlen_q": 258}, 3),
        ({"window_size": (9, 0)}, 3),  # the first key tile is not the last one for all query tiles
        ({"packed": True}, 3),
        ({"dtype": torch.float16}, 3),
        ({"head_dim": 128}, 3),
    ],
    ids=str,
)
@needs_gluon
def test_the_last_to_add_to_dq_finishes_it_where_one_is_the_last_for_all(
    call: dict[str, Any], launches: int
) -> None:
    assert len(launches_of(**{"head_dim": 64, "deterministic": True} | call)) == launches
    assert len(launches_of(**{"head_dim": 64, "seqlen_k": 4096} | call)) == 3, (
        "in no order nobody is the last"
    )


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        ({"packed": True, "causal": True, "seqlen_k": 512}, "portable kernels are faster"),
        ({"alibi": True}, "ALiBi"),
        ({"dtype": torch.float32}, "float16 and bfloat16"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"head_dim": 60}, "multiple of 8"),
        ({"head_dim": 256, "deterministic": True}, "no fixed order"),
    ],
    ids=str,
)
def test_what_it_is_not_for_is_said(call: dict[str, Any], reason: str) -> None:
    reasons = backward_reasons_against(describe(**call)[0], SM_90)
    assert any(reason in given for given in reasons)


@needs_gluon
@pytest.mark.parametrize(
    "call",
    [
        {"head_dim": 64, "window_size": (9, 0), "dtype": torch.float16},
        {"head_dim": 64, "softcap": 3.0, "dtype": torch.float16},
        {"head_dim": 64, "packed": True, "causal": True, "dtype": torch.float16},
        {"head_dim": 64, "alibi": True},
        {"head_dim": 16},
        {"head_dim": 32, "causal": True},
        {"alibi": True},
        {"packed": True, "causal": True},
    ],
    ids=str,
)
def test_what_the_portable_kernels_do_faster_runs_where_it_is_asked_for(call: dict[str, Any]) -> None:
    problem = describe(**call)[0]
    assert "portable kernels are faster" in backward_reasons_against(problem, SM_90)[0]
    assert backward_reasons_against(problem, SM_90, asked_for=True) == []
    assert empty_dq_acc(problem, inputs_of(**call)).shape[-1] == (64 if "head_dim" in call else 128)


@needs_gluon
@pytest.mark.parametrize(
    "call",
    [
        {},
        {"head_dim": 32},
        {"head_dim": 32, "causal": True, "seqlen_k": 16384},
        {"head_dim": 40},
        {"head_dim": 64, "window_size": (9, 0)},
        {"head_dim": 64, "softcap": 3.0},
        {"head_dim": 64, "packed": True, "causal": True},
        {"head_dim": 64, "causal": True, "seqlen_k": 1024},
        {"head_dim": 72},
        {"head_dim": 96, "causal": True, "seqlen_k": 1024},
        {"packed": True},
        {"softcap": 3.0},
        {"window_size": (9, 0)},
        {"head_dim": 192, "causal": True},
        {"head_dim": 256, "packed": True, "softcap": 3.0},
    ],
    ids=str,
)
def test_what_is_measured_to_be_faster_runs(call: dict[str, Any]) -> None:
    assert backward_reasons_against(describe(**call)[0], SM_90) == []


def test_it_is_for_one_chip() -> None:
    (reason,) = backward_reasons_against(describe()[0], SM_80)
    assert "sm_90" in reason
    assert "sm_80" in reason


def test_a_call_is_told_which_schedule_computes_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    target = "fap_kernels.target.target_of"
    monkeypatch.setattr(target, lambda _: SM_90)
    dropped = describe(dropout_p=0.1)[0]
    assert "the portable backward, since" in explain_schedule(dropped, backward=True)
    assert "dropout" in explain_schedule(dropped, backward=True)
    with use_schedule("portable"):
        assert explain_schedule(dropped, backward=True) == "the portable backward, chosen by use_schedule"
    with use_schedule("hopper"):
        refusal = "the schedule 'hopper' was chosen by use_schedule and does not compute this call: "
        assert explain_schedule(dropped, backward=True).startswith(refusal)
    if gluon_is_here():
        for deterministic in (False, True):
            problem = describe(deterministic=deterministic)[0]
            assert explain_schedule(problem, backward=True) == "the Hopper backward"
    monkeypatch.setattr(target, lambda _: SM_80)
    assert explain_schedule(dropped, backward=True) == "the portable backward (sm_80)"
