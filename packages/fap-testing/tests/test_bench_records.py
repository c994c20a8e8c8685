"""What is done with records: written and read, merged, compared, held to promises, summed up and drawn."""

from __future__ import annotations

import json
import math

import pytest

pytest.importorskip("typer")
pytest.importorskip("rich")
pytest.importorskip("matplotlib")

from typer.testing import CliRunner

from fap_testing.bench.cli import app
from fap_testing.bench.compare import compare
from fap_testing.bench.plot import draw_plot
from fap_testing.bench.prefill import Prefill
from fap_testing.bench.promises import Promise, hold, load_promises
from fap_testing.bench.record import Record, Row, load, merge, save
from fap_testing.bench.report import faults, footnotes, summary_lines

MACHINE = {
    "device": "cuda",
    "gpu": "GPU",
    "driver": "1",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "cuda": "13.0",
}


def row(peer, ms=1.0, *, seqlen=2048, direction="fwd", head_dim=64, causal=False, status="ok", note=""):
    problem = Prefill.of_tokens(head_dim, seqlen, tokens=16384, width=2048, causal=causal)
    figures = {"ms": ms, "ms_lower": ms, "ms_upper": ms, "tflops": problem.flops(direction) / ms / 1e9}
    return Row(
        point=str(problem),
        problem=problem.to_dict(),
        direction=direction,
        peer=peer,
        ours=peer.startswith("fap"),
        status=status,
        note=note,
        measures=figures if status == "ok" else {},
    )


def record(*rows, **machine):
    return Record(command="prefill", machine={**MACHINE, **machine}, rows=list(rows))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_record_is_read_back_as_it_was_written(tmp_path):
    written = record(row("fap-triton", 1.0), row("flex", status="failed", note="out of memory"))
    save(written, tmp_path / "run.json")
    assert load(tmp_path / "run.json") == written


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99}', '{"schema": 1, "rows": [{"a": 1}]}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    path = tmp_path / "no.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"no\.json"):
        load(path)
    assert run("show", path).exit_code == 2
    assert run("show", tmp_path / "absent.json").exit_code == 2


def test_the_summary_is_the_geometric_mean_to_the_best_peer_and_the_worst_point():
    rows = [
        row("fap-triton", 1.0), row("sdpa-flash", 4.0), row("flex", 2.0),
        row("fap-triton", 2.0, seqlen=512), row("sdpa-flash", 1.0, seqlen=512),
        row("fap-triton", 1.0, seqlen=8192), row("sdpa-flash", seqlen=8192, status="wrong"),
    ]  # fmt: skip
    (line,) = summary_lines(record(*rows))
    assert line == (
        "fap-triton: geometric mean 1.00x the best peer over 2 points; "
        "worst 0.50x at d64 full 32x512 fwd, against sdpa-flash"
    )


def test_reasons_are_numbered_once_and_absent_peers_named():
    unsupported = row("flex", status="unsupported", note="it has no pages\nand more")
    measured = Record(
        command="prefill", machine=MACHINE, absent={"a": "not here", "b": "not here"}, rows=[unsupported] * 2
    )
    assert footnotes(measured) == ["[1] flex unsupported: it has no pages", "absent: a, b: not here"]
    assert faults(measured) == ["nothing was measured"]


def test_records_of_one_run_in_parts_are_one():
    first = record(row("fap-triton", 1.0), row("flex", 3.0))
    second = record(row("fap-triton", 2.0), row("fap-triton", 1.5, head_dim=128))
    merged = merge([first, second])
    assert [(r.peer, r.measures["ms"]) for r in merged.rows] == [
        ("fap-triton", 2.0), ("flex", 3.0), ("fap-triton", 1.5),
    ]  # fmt: skip
    with pytest.raises(ValueError, match="gpu 'GPU' and 'another'"):
        merge([first, record(gpu="another")])
    with pytest.raises(ValueError, match="'prefill' and 'decode'"):
        merge([first, Record(command="decode", machine=MACHINE)])


def test_what_got_slower_is_found(tmp_path):
    old = record(row("fap-triton", 1.0), row("fap-triton", 1.0, seqlen=512), row("flex", 1.0), torch="2.8.0")
    new = record(row("fap-triton", 1.2), row("fap-triton", 0.8, seqlen=512), row("flex", 9.0))
    found = compare(old, new, threshold=0.05)
    assert [(pair.ratio, pair.worse) for pair in found.pairs] == [(1.2, True), (0.8, False)]
    assert found.mean == pytest.approx(math.sqrt(1.2 * 0.8))
    assert found.machine == [("torch", "2.8.0", "2.11.0")]
    assert compare(old, new, threshold=0.05, peers=["flex"]).worse
    for name, kept in (("old", old), ("new", new)):
        save(kept, tmp_path / f"{name}.json")
    result = run("compare", tmp_path / "old.json", tmp_path / "new.json")
    assert result.exit_code == 1
    assert "another torch: 2.8.0, now 2.11.0" in result.output
    assert run("compare", tmp_path / "old.json", tmp_path / "new.json", "--threshold", "0.3").exit_code == 0
    assert run("compare", tmp_path / "old.json", tmp_path / "new.json", "--peers", "fa9").exit_code == 2


def test_a_figure_that_is_gone_wrong_is_worse():
    old, new = record(row("fap-triton", 1.0)), record(row("fap-triton", status="wrong"))
    assert compare(old, new, threshold=9.0).worse
    assert not compare(new, old, threshold=0.0).worse


RATIO = Promise(
    peer="fap-triton", where={"head_dim": [64, 128]}, times={"peer": "sdpa-flash"}, at_least=1.5, why="so"
)


@pytest.mark.parametrize(("ms", "kept"), [(2.0, True), (1.4, False)])
def test_a_promise_is_a_multiple_of_a_peers_speed(ms, kept):
    (finding,) = hold([record(row("fap-triton", 1.0), row("sdpa-flash", ms))], [RATIO])
    assert finding.kept is kept
    assert finding.value == ms


def test_a_promise_is_a_figure():
    floor = Promise(peer="fap-triton", where={"command": "prefill"}, measure="tflops", at_least=100.0)
    ceiling = Promise(peer="fap-triton", where={"direction": "fwd"}, measure="ms", at_most=0.9)
    kept, broken = hold([record(row("fap-triton", 1.0))], [floor, ceiling])
    assert kept.kept is True
    assert broken.kept is False


def test_a_promise_can_be_about_another_point_of_the_same_peer():
    promise = Promise(
        peer="fap-triton", where={"mask": "causal"}, times={"mask": "full", "causal": False}, at_least=1.9
    )
    (finding,) = hold([record(row("fap-triton", 1.0), row("fap-triton", 0.5, causal=True))], [promise])
    assert finding.kept is True
    assert finding.value == 2.0


def test_a_wrong_result_keeps_no_promise_and_an_unmeasured_point_is_said():
    wrong = record(row("fap-triton", status="wrong"), row("sdpa-flash", 1.0))
    assert hold([wrong], [RATIO])[0].kept is False
    assert hold([record(row("fap-triton", 1.0, head_dim=256))], [RATIO])[0].kept is None
    assert hold([record(row("fap-triton", 1.0))], [RATIO])[0].kept is None, "no peer to compare with"


def test_check_exits_with_an_error_where_a_promise_is_not_kept(tmp_path):
    promise = {"peer": "fap-triton", "times": {"peer": "sdpa-flash"}, "at_least": 1.5}
    (tmp_path / "promises.json").write_text(json.dumps({"promises": [promise]}))
    save(record(row("fap-triton", 1.0), row("sdpa-flash", 1.6)), tmp_path / "good.json")
    save(record(row("fap-triton", 1.0), row("sdpa-flash", 1.4)), tmp_path / "bad.json")
    save(record(row("flex", 1.0)), tmp_path / "none.json")
    codes = {
        name: run("check", tmp_path / f"{name}.json", "--promises", tmp_path / "promises.json").exit_code
        for name in ("good", "bad", "none")
    }
    assert codes == {"good": 0, "bad": 1, "none": 1}


@pytest.mark.parametrize(
    "promise", [{"peer": "a"}, {"peer": "a", "at_least": 1}, {"at_least": 1, "measure": "ms"}, {"peers": "a"}]
)
def test_what_is_no_promise_is_refused(tmp_path, promise):
    path = tmp_path / "promises.json"
    path.write_text(json.dumps({"promises": [promise]}))
    with pytest.raises(ValueError, match=r"promises\.json"):
        load_promises(path)


def test_several_records_make_one_picture(tmp_path):
    parts = []
    for head_dim in (64, 128, 256):
        rows = [
            row(peer, ms, seqlen=seqlen, direction=direction, head_dim=head_dim)
            for peer, ms in (("fap-triton", 1.0), ("sdpa-flash", 2.0))
            for seqlen in (512, 2048)
            for direction in ("fwd", "bwd")
        ]
        parts.append(tmp_path / f"d{head_dim}.json")
        save(record(*rows), parts[-1])
    assert run("plot", *parts, "-o", tmp_path / "out.svg").exit_code == 0
    drawn = (tmp_path / "out.svg").read_text()
    assert drawn.count('id="axes_') == 6
    assert run("show", *parts).exit_code == 0
    with pytest.raises(ValueError, match="no figure"):
        draw_plot(record(), tmp_path / "none.png")
