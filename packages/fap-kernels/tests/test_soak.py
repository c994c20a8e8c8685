"""The soak and the run under the sanitizer, without a GPU: what they reach and what they see."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import sanitize
import soak
import soak_problems
import torch
from soak_problems import check, draw, processors_seen, variants

from fap_kernels import attention, target
from fap_kernels.hopper.config import BACKWARD, FORWARD, choose
from fap_kernels.schedule import use_schedule

needs_gluon = pytest.mark.skipif(not variants(), reason="Gluon for Hopper comes with Triton 3.6")


@needs_gluon
@pytest.mark.parametrize("seed", [0, 1])
def test_every_row_of_the_hopper_tables_is_reached(seed: int) -> None:
    for name, table in (("forward", FORWARD), ("backward", BACKWARD)):
        reached = {
            id(choose(table, variant.describe())) for variant in variants(seed) if getattr(variant, name)
        }
        missed = [row for row in table if row.config is not None and id(row) not in reached]
        assert not missed


@needs_gluon
def test_a_number_is_a_problem_and_its_lengths_stay_in_its_variants_range() -> None:
    kinds = variants()
    lengths = set()
    for number in range(4000):
        variant = kinds[number % len(kinds)]
        problem = draw(variant, number, 5)
        assert problem == draw(variant, number, 5)
        assert max(problem.lengths_k) in variant.seqlens_k
        assert problem.max_seqlen_k in variant.seqlens_k
        assert problem.max_seqlen_q == max(problem.lengths_q)
        assert number >= soak_problems.FULL_TILES or problem.max_seqlen_q >= 65
        lengths |= {*problem.lengths_q, *problem.lengths_k}
    assert {0, 1, 64, 65, 127, 129} <= lengths


@pytest.fixture
def small() -> soak_problems.Problem:
    variant = soak_problems.Variant(
        64,
        "window",
        range(1, 1024),
        packed=True,
        seqused=True,
        dtype=torch.float16,
        forward=True,
        backward=True,
    )
    return dataclasses.replace(
        draw(variant, 3, 0), nheads_k=1, group=2, lengths_q=(5, 0, 40), lengths_k=(20, 3, 33),
        max_seqlen_q=40, max_seqlen_k=33, window=(20, 4),
    )  # fmt: skip


def without_seqused(problem: soak_problems.Problem) -> list[soak_problems.Problem]:
    """The problem with all rows of its sequences, and one sequence of it by itself."""
    packed = dataclasses.replace(problem.variant, seqused=False)
    alone = dataclasses.replace(packed, packed=False)
    return [
        dataclasses.replace(problem, variant=packed),
        dataclasses.replace(problem, variant=alone, lengths_q=(40, 40), lengths_k=(33, 33)),
    ]


@pytest.mark.interpreter
class TestCheck:
    @pytest.fixture(autouse=True)
    def portable_for_hopper(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There is no Hopper GPU here: the portable schedule computes what it is to."""
        monkeypatch.setattr(soak_problems, "use_schedule", lambda name: contextlib.nullcontext())

    def test_what_is_right_passes(self, small: soak_problems.Problem) -> None:
        for problem in (small, *without_seqused(small)):
            verdict = check(problem, "cpu")
            assert verdict.wrong == []
            assert verdict.on_hopper == ["forward", "backward"]
            assert set(verdict.errors) == {"out", "dq", "dk", "dv"}

    def test_what_is_refused_is_not_compared(
        self, small: soak_problems.Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(soak_problems, "use_schedule", use_schedule)
        verdict = check(small, "cpu")
        assert verdict == soak_problems.Verdict([], ["forward", "backward"], {}, [])

    def test_what_is_written_behind_the_last_sequence_is_seen_and_what_lies_there_is_not_compared(
        self, small: soak_problems.Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        problem = without_seqused(small)[0]
        right = soak_problems.attention_varlen_backward

        def writes(*arguments, **options):
            gradients = right(*arguments, **options)
            gradients[1][sum(problem.lengths_k) :].normal_()
            return gradients

        monkeypatch.setattr(soak_problems, "attention_varlen_backward", writes)
        assert check(problem, "cpu").wrong == ["dk is written behind its last sequence"]

    def test_a_second_run_that_differs_is_seen(
        self, small: soak_problems.Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right, runs = soak_problems.attention_varlen_backward, []

        def differs(*arguments, **options):
            gradients = right(*arguments, **options)
            runs.append(None)
            gradients[2][1] += 0.001 * len(runs)
            return gradients

        monkeypatch.setattr(soak_problems, "attention_varlen_backward", differs)
        assert "dv of a second run differs" in check(small, "cpu").wrong

    def test_one_wrong_row_is_seen(
        self, small: soak_problems.Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = soak_problems.attention_varlen_forward

        def wrong(*arguments, **options):
            out, lse, rng_state = right(*arguments, **options)
            out[int(out.float().norm(dim=(1, 2)).nan_to_num().argmax())] *= 1.1
            return out, lse, rng_state

        monkeypatch.setattr(soak_problems, "attention_varlen_forward", wrong)
        (text,) = check(small, "cpu").wrong
        assert text.startswith("out differs")


def fake(tmp_path: Path, code: str) -> list[str]:
    """A command that stands for soak.py's."""
    script = tmp_path / "fake.py"
    script.write_text(textwrap.dedent(code))
    return [sys.executable, str(script)]


def test_batches_that_hang_or_die_are_named_by_the_problem_that_they_were_at(tmp_path: Path) -> None:
    command = fake(
        tmp_path,
        """
        import json, sys, time
        numbers = range(*map(int, sys.argv[2].split(":")))
        for number in numbers:
            print(number, flush=True)
            if number == 12: time.sleep(60)
            if number == 25: sys.exit(3)
            result = {"problems": 1, "passes": {"forward": 2}, "errors": {"out": number / 100}, "wrong": []}
            with open(sys.argv[4], "a") as found: found.write(json.dumps(result) + "\\n")
        """,
    )
    result = soak.Result()
    soak.run_batches(command, [range(n, n + 10) for n in (0, 10, 20, 30)], 4, 3.0, result)
    assert result.problems == 20 + 2 + 5
    assert result.passes == {"forward": 2 * 27}
    assert result.errors == {"out": 0.39}
    assert [(number, text.splitlines()[0]) for number, text in sorted(result.wrong)] == [
        (12, "its process did not end in time"),
        (25, "its process ended with code 3"),
    ]


def test_no_batch_is_started_when_the_time_is_over(tmp_path: Path) -> None:
    command = fake(
        tmp_path,
        """
        import sys, time
        with open(sys.argv[4], "a") as found:
            found.write('{"problems": 1, "passes": {}, "errors": {}, "wrong": []}\\n')
        time.sleep(1)
        """,
    )
    result = soak.Result()
    soak.run_batches(command, [range(n, n + 1) for n in range(50)], 1, 60.0, result, seconds=5.0)
    assert 1 <= result.problems < 10
    assert result.wrong == []


@pytest.mark.parametrize(
    ("last", "wrong"),
    [
        ("", [(1, "its process told of 2 of 3 problems")]),
        ('{"problems": 1, "passes": {}, "er', [(1, "its process told of 2 of 3 problems")]),
        (
            '{"problems": 1, "passes": {}, "errors": {}, "wrong": [[2, "out differs"]]}\\n',
            [(2, "out differs")],
        ),
    ],
    ids=["a problem is missing", "a line is cut", "an error ended it"],
)
def test_a_batch_that_says_too_little_is_seen(
    tmp_path: Path, last: str, wrong: list[tuple[int, str]]
) -> None:
    command = fake(
        tmp_path,
        f"""
        import sys
        print(1)
        with open(sys.argv[4], "a") as found:
            found.write('{{"problems": 1, "passes": {{}}, "errors": {{}}, "wrong": []}}\\n' * 2)
            found.write('{last}')
        """,
    )
    result = soak.Result()
    soak.run_batches(command, [range(3)], 1, 60.0, result)
    assert [(number, text.splitlines()[0]) for number, text in result.wrong] == wrong


@pytest.mark.parametrize("stuck", [0.5, 30.0])
def test_when_the_time_is_over_what_was_done_counts_and_a_hang_still_has_a_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stuck: float
) -> None:
    monkeypatch.setattr(soak, "STUCK", stuck)
    command = fake(
        tmp_path,
        """
        import sys, time
        for number in range(*map(int, sys.argv[2].split(":"))):
            print(number, flush=True)
            if number == 4: time.sleep(60)
            with open(sys.argv[4], "a") as found:
                found.write('{"problems": 1, "passes": {}, "errors": {}, "wrong": []}\\n')
        """,
    )
    result = soak.Result()
    soak.run_batches(command, [range(10)], 1, 60.0, result, seconds=3.0)
    assert result.problems == 4
    assert [number for number, _ in result.wrong] == ([4] if stuck < 1 else [])


def test_every_problem_is_in_one_batch() -> None:
    assert sorted(n for batch in soak.split(1000, 150) for n in batch) == list(range(1000))


@needs_gluon
def test_every_pass_is_compiled_once_and_the_longest_first() -> None:
    jobs = soak.compilations(0)
    kinds = variants(0)
    assert len(set(jobs)) == len(jobs) == sum(kind.forward + kind.backward for kind in kinds)
    assert all(getattr(kinds[number], name) for number, name in jobs)
    assert [name for _, name in jobs] == sorted(name for _, name in jobs)
    widest = max(kind.head_dim for kind in kinds if kind.backward)
    assert kinds[jobs[0][0]].head_dim == widest


@needs_gluon
def test_what_does_not_compile_has_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    # There is no GPU of this name.
    monkeypatch.setattr(soak, "compilations", lambda seed: [(3, "forward"), (1, "forward")])
    wrong = dict(soak.compile_all(1, 0, "cuda:99", 120.0))
    assert set(wrong) == {1, 3}
    assert "Traceback" in wrong[3]


@needs_gluon
def test_compiling_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soak, "compilations", lambda seed: [(3, "forward")])
    ((number, text),) = soak.compile_all(1, 0, "cpu", 0.01)
    assert number == 3
    assert text == "forward is not compiled after 0 s"


@pytest.mark.parametrize(
    ("result", "code"),
    [
        (soak.Result(10, soak.Counter({"forward on Hopper": 10})), 0),
        (soak.Result(10, soak.Counter({"forward on Hopper": 10}), {}, [(3, "out differs")]), 1),
        (soak.Result(10, soak.Counter({"forward handed back": 10})), 1),
        (soak.Result(), 1),
    ],
    ids=["right", "wrong", "not on Hopper", "nothing ran"],
)
def test_the_exit_code_tells(result: soak.Result, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak.report(result, 7) == code
    for number, _ in result.wrong:
        assert f"--seed 7 --only {number}" in capsys.readouterr().out


def test_a_share_that_is_not_clean_or_hangs_has_its_exit_code(tmp_path: Path) -> None:
    command = fake(
        tmp_path,
        """
        import sys, time
        print("ran", sys.argv[2], flush=True)
        if sys.argv[2] == "1/3": sys.exit(87)
        if sys.argv[2] == "2/3": time.sleep(60)
        """,
    )
    assert sanitize.run_all(command, 3, 3.0) == [(0, "ran 0/3\n"), (87, "ran 1/3\n"), (None, "ran 2/3\n")]


def test_a_share_runs_the_calls_that_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise AssertionError("wrong")

    calls = {"d64-full": lambda: None, "d64-causal": fail, "d128-causal": lambda: None}
    monkeypatch.setattr(sanitize, "calls", lambda device, groups: calls)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr("fap_kernels.target._processors_of_index", None)  # to be put back
    assert sanitize.run_share("0/1", ("hopper",), "cpu", only="causal") == 1
    assert capsys.readouterr().out == "FAILED d64-causal: AssertionError: wrong\nran d128-causal\n"
    assert sanitize.run_share("1/2", ("hopper",), "cpu", only="causal") == 0
    assert capsys.readouterr().out == f"ran d128-causal\n{sanitize.NONE_FAILED}\n"


def test_launches_are_planned_for_as_many_processors_as_are_seen() -> None:
    real, kept = target._processors_of_index, attention._forward_replays
    with processors_seen(5):
        assert target._processors_of_index(0) == 5
        assert attention._forward_replays is not kept, "it would be launched as it was planned before"
        kept = attention._forward_replays
    assert target._processors_of_index is real
    assert attention._forward_replays is not kept
    with processors_seen(None):
        assert target._processors_of_index is real


def test_calls_for_the_sanitizer_reach_every_row() -> None:
    names = sanitize.calls("cpu")
    assert {str(variant) for variant in variants()} <= set(names)
    assert sum(name.startswith("portable") for name in names) > 30
    assert sum(name.startswith("cache") for name in names) == 18
