"""The soak and the run under the sanitizer, without a GPU: what they reach and what they see."""

from __future__ import annotations

import dataclasses
import sys
import textwrap
from pathlib import Path

import pytest
import sanitize
import soak
import soak_problems
import torch
from soak_problems import check, draw, variants

from fap_kernels.hopper.config import BACKWARD, FORWARD, choose
from fap_kernels.schedule import explicit_schedule

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
    for number in range(3000):
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


@pytest.mark.interpreter
class TestCheck:
    def test_what_is_right_passes(self, small: soak_problems.Problem) -> None:
        verdict = check(small, "cpu")
        assert verdict.wrong == []
        assert verdict.handed_back == ["forward", "backward"]
        assert set(verdict.errors) == {"out", "dq", "dk", "dv"}

    def test_one_wrong_row_is_seen(
        self, small: soak_problems.Problem, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        right = soak_problems.attention_varlen_forward

        def wrong(*arguments, **options):
            out, lse, rng_state = right(*arguments, **options)
            if explicit_schedule() != "portable":
                out[int(out.float().norm(dim=(1, 2)).argmax())] *= 1.1
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
        result = {"problems": len(numbers), "passes": {"forward": 2}, "errors": {"out": 0.5}, "wrong": []}
        print(json.dumps(result))
        """,
    )
    result = soak.Result()
    soak.run_batches(command, [range(n, n + 10) for n in (0, 10, 20, 30)], 4, 3.0, result)
    assert result.problems == 20
    assert result.passes == {"forward": 4}
    assert result.errors == {"out": 0.5}
    assert [(number, text.splitlines()[0]) for number, text in sorted(result.wrong)] == [
        (12, "its process did not end in time"),
        (25, "its process ended with code 3"),
    ]


def test_every_problem_is_in_one_batch() -> None:
    compiling, rest = soak.split(1000, 42, 16, 150)
    assert len(compiling) == 16
    assert sorted(n for batch in compiling for n in batch) == list(range(42))
    assert sorted(n for batch in (*compiling, *rest) for n in batch) == list(range(1000))


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


def test_calls_for_the_sanitizer_reach_every_row() -> None:
    names = sanitize.calls("cpu")
    assert {str(variant) for variant in variants()} <= set(names)
    assert sum(name.startswith("portable") for name in names) > 30
    assert sum(name.startswith("cache") for name in names) == 18
