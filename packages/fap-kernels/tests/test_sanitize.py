"""What is set aside of racecheck's reports, from texts of its own, without a GPU."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import sanitize
from sanitize import NONE_FAILED, SEEN, Board, Places, board_of, judge, places_of_triton
from test_hopper import compile_forward, needs_gluon
from test_hopper_backward import compile_backward

# Where the recorded reports were made, the kernels stood on these lines.
MODULES = {
    "forward.py": {
        78: "@gluon.jit(do_not_specialize=UNSPECIALIZED)",
        79: "def hopper_forward_kernel(",
        80: "    q_part0, WARPGROUPS: gl.constexpr,",
        81: "):",
        109: "    operands = (q_part0,)",
        118: "    if WARPGROUPS == 1:",
        119: "        gl.warp_specialize(",
        120: "            [(_multiply, (0, operands)), (_fetch, (operands,))], [1], [24],",
        121: "        )",
        128: "    elif WARPGROUPS == 2:",
        129: "        gl.warp_specialize([(_multiply, (0, operands)), (_fetch, (operands,))], [4], [24])",
        156: "@gluon.jit",
        157: "def _fetch(operands):",
        158: "    pass",
    },
    "backward.py": {
        60: "@gluon.jit(do_not_specialize=UNSPECIALIZED)",
        61: "def hopper_backward_kernel(q_part0):",
        92: "    gl.warp_specialize(",
        93: "        [(_multiply, (0, q_part0)), (_fetch, (q_part0,))], [4], [24],",
        94: "    )",
    },
    "barriers.py": {1: "@gluon.jit", 2: "def wait(barrier):", 3: "    warp_specialize = barrier"},
}

FORWARD = """\
========= Error: Race reported between Read access at hopper_forward_kernel+0x250 in forward.py:79
=========     and Write access at hopper_forward_kernel+0x128a0 in forward.py:79 [19 hazards]
=========     and Write access at hopper_forward_kernel+0x1ad10 in forward.py:118 [1 hazards]
========= 
"""  # noqa: W291 - as it is printed
BACKWARD = """\
========= Error: Race reported between Read access at hopper_backward_kernel+0x2e0 in backward.py:61
=========     and Write access at hopper_backward_kernel+0x9c40 in backward.py:61 [13 hazards]
=========     and Write access at hopper_backward_kernel+0xf2f0 in backward.py:92 [29 hazards]
========= 
"""  # noqa: W291 - as it is printed
ANNOUNCED = """\
========= Error: Race reported between Read access at hopper_forward_kernel+0x3ac0 in announcements.py:128
=========     and Write access at hopper_forward_kernel+0x14f0 in announcements.py:122 [48 hazards]
=========     and Write access at hopper_forward_kernel+0x1520 in announcements.py:122 [48 hazards]
========= 
========= Error: Race reported between Write access at hopper_forward_kernel+0x2f10 in announcements.py:122
=========     and Read access at hopper_forward_kernel+0x9ee0 in announcements.py:128 [4 hazards]
========= 
"""  # noqa: W291 - as it is printed
BOARD = Board("announcements.py", frozenset({122}), frozenset({128}))  # where those were made
# What compute-sanitizer says where it leaves some out.
LEFT_OUT = "========= ERROR SUMMARY: 2 errors were not printed. Use --print-limit option to adjust\n"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Places]:
    for name, lines in MODULES.items():
        text = "".join(f"{lines.get(number, '')}\n" for number in range(1, max(lines) + 1))
        (tmp_path / name).write_text(text)
    return places_of_triton(tmp_path)


def output(*reports: str, errors: int | None = None, warnings: int = 0, last: str = NONE_FAILED) -> str:
    """What a share under racecheck says that has these reports, and counts so many."""
    errors = len(reports) if errors is None else errors
    kinds = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    hazards = f"{errors + warnings} hazard{'s' * (errors + warnings != 1)}"
    return (
        "========= COMPUTE-SANITIZER\n" + "".join(reports) + f"ran d64-causal\n{last}\n"
        f"========= RACECHECK SUMMARY: {hazards} displayed ({kinds})\n"
    )


def test_places_are_found_in_the_source(places: dict[str, Places]) -> None:
    assert places == {
        "hopper_forward_kernel": Places("forward.py", frozenset({78, 79}), frozenset({118, 119, 129})),
        "hopper_backward_kernel": Places("backward.py", frozenset({60, 61}), frozenset({92})),
    }


def test_every_kernel_with_partitions_is_found_and_its_lines_are_no_others() -> None:
    from fap_kernels import hopper

    folder = Path(hopper.__path__[0])
    found = places_of_triton()
    calling = {path.name for path in folder.glob("*.py") if "gl.warp_specialize(" in path.read_text()}
    assert {known.file for known in found.values()} == calling
    for name, known in found.items():
        lines = ["", *(folder / known.file).read_text().splitlines()]
        first, *_, last = sorted(known.entry)
        assert lines[first].startswith("@gluon.jit")
        assert lines[last].startswith(f"def {name}(")
        for number in known.partitions:
            assert re.fullmatch(r" +gl\.warp_specialize\(| {4}if .*:", lines[number])


@needs_gluon
@pytest.mark.parametrize("width", [0, 64, 128, 256])
def test_triton_gives_its_own_accesses_these_lines(width: int) -> None:
    """Width 0 is the forward, whose call is below an ``if``; of the backward each width has a kernel."""
    if width:
        compiled = compile_backward(head_dim=width, seqlen_k=4096)
    else:
        compiled = compile_forward(head_dim=64, seqlen_k=512)
    match = re.search(r"\.entry (\w+)\(", compiled.assembly)
    assert match is not None
    known = places_of_triton()[match[1]]
    reads, writes = set(), set()
    line = 0
    for text in compiled.assembly.splitlines():
        if match := re.match(r"\s*\.loc\s+\d+ (\d+)", text):
            line = int(match[1])
        elif re.match(r"\s*ld\.shared\.[bsu]8\s", text):
            reads.add(line)
        elif re.match(r"\s*st\.shared\.\S+\s+\[global_smem\+\d+\], [{\d]", text):
            writes.add(line)
    assert reads
    assert writes
    assert reads <= known.entry
    assert writes <= known.entry | known.partitions


def test_what_is_tritons_own_is_set_aside_and_counted(
    places: dict[str, Places], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(FORWARD, BACKWARD, FORWARD)
    verdict = judge("racecheck", SEEN, text, places, BOARD)
    assert verdict.clean
    assert verdict.set_aside == {"hopper_forward_kernel": 2, "hopper_backward_kernel": 1}
    assert verdict.rest == output(errors=3).strip()
    assert judge("racecheck", SEEN, output(FORWARD), places, BOARD).clean, "in the singular"

    assert sanitize.report("racecheck", [(SEEN, text), (0, output()), (SEEN, text)], 7.0, places, BOARD) == 0
    assert capsys.readouterr().out.splitlines() == [
        "racecheck: 3 calls, 0 shares not clean, 7 s",
        (
            "racecheck: 6 reports set aside as Triton's own"
            ", 2 in hopper_backward_kernel, 4 in hopper_forward_kernel"
        ),
        "racecheck: 0 reports set aside as handed on by mbarriers",
    ]


def test_lines_of_the_share_may_stand_within_a_report(places: dict[str, Places]) -> None:
    first, *others = FORWARD.splitlines(keepends=True)
    verdict = judge("racecheck", SEEN, output(f"{first}ran d64-full\n{''.join(others)}"), places, BOARD)
    assert verdict.clean
    assert "ran d64-full" in verdict.rest


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("forward.py:118", "forward.py:300"),  # a write in a partition
        ("forward.py:118", "forward.py:109"),  # in the kernel, before its partitions
        ("forward.py:118", "ring.py:118"),
        ("forward.py:118", "announcements.py:111"),  # neither of the board nor of the call
        ("forward.py:118", "announcements.py:122"),  # a write of the board
        ("forward_kernel+0x1ad10 in forward.py:118", "backward_kernel+0x1ad10 in backward.py:92"),
        ("+0x250 in forward.py:79", "+0x250 in forward.py:118"),  # not read at the entry
        ("+0x250 in forward.py:79", "+0x250 in forward.py:215"),
        ("+0x250 in forward.py:79", "+0x250"),  # no line is known
        ("hopper_forward_kernel", "hopper_redo_kernel"),
        ("Read access", "Write access"),
        ("Write access at hopper_forward_kernel+0x1ad10", "Read access at hopper_forward_kernel+0x1ad10"),
        ("Error: Race", "Warning: Race"),
        ("[1 hazards]", "[1 hazards] and more"),
    ],
)
def test_another_report_is_a_finding(
    places: dict[str, Places], capsys: pytest.CaptureFixture[str], before: str, after: str
) -> None:
    other = FORWARD.replace(before, after)
    assert other != FORWARD
    text = output(FORWARD, other, BACKWARD)
    verdict = judge("racecheck", SEEN, text, places, BOARD)
    assert not verdict.clean
    assert verdict.set_aside.total() == 2
    assert verdict.rest == output(other, errors=3).replace("= \n", "=\n").strip()
    assert not judge("racecheck", SEEN, output(other), places, BOARD).clean

    assert sanitize.report("racecheck", [(SEEN, text), (SEEN, output(FORWARD))], 7.0, places, BOARD) == 1
    out = capsys.readouterr().out
    assert "1 shares not clean" in out
    assert "racecheck: 3 reports set aside" in out
    assert f"exit code {SEEN}, less 2 reports set aside\n" in out
    assert other.strip() in out


def test_what_follows_an_inlined_line_may_bear_its_file(places: dict[str, Places]) -> None:
    text = output(FORWARD.replace("forward.py:118", "announcements.py:118"))
    assert judge("racecheck", SEEN, text, places, BOARD).clean


def test_the_boards_lines_are_found_in_the_source() -> None:
    from fap_kernels.hopper import announcements

    board = board_of()
    lines = ["", *Path(announcements.__file__).read_text().splitlines()]
    assert [lines[number].strip() for number in (*board.writes, *board.reads)] == [
        "numbers.index(place).store(gl.full([1], value, gl.int32, LAYOUT))",
        "return gl.max(numbers.index(place).load(LAYOUT), 0)",
    ]


def test_numbers_that_are_handed_on_are_set_aside_and_counted(
    places: dict[str, Places], capsys: pytest.CaptureFixture[str]
) -> None:
    text = output(ANNOUNCED, FORWARD, errors=3)
    verdict = judge("racecheck", SEEN, text, places, BOARD)
    assert verdict.clean
    assert verdict.announced == {"hopper_forward_kernel": 2}
    assert verdict.set_aside == {"hopper_forward_kernel": 1}
    assert sanitize.report("racecheck", [(SEEN, text)], 7.0, places, BOARD) == 0
    out = capsys.readouterr().out
    assert "racecheck: 2 reports set aside as handed on by mbarriers, 2 in hopper_forward_kernel\n" in out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("announcements.py:128", "announcements.py:127"),
        ("announcements.py:128", "ring.py:128"),
        ("announcements.py:122 [48", "announcements.py:121 [48"),
        ("and Write access", "and Read access"),  # two reads do not race: another line is meant
        (
            "Read access at hopper_forward_kernel+0x3ac0 in announcements.py:128",
            "Write access at hopper_forward_kernel+0x3ac0 in announcements.py:122",
        ),
        ("hopper_forward_kernel+0x1520", "hopper_redo_kernel+0x1520"),
        ("hopper_forward_kernel", "hopper_redo_kernel"),
        ("Error: Race", "Warning: Race"),
    ],
)
def test_another_report_of_the_board_is_a_finding(places: dict[str, Places], before: str, after: str) -> None:
    other = ANNOUNCED.replace(before, after, 1)
    assert other != ANNOUNCED
    assert not judge("racecheck", SEEN, output(other, errors=2), places, BOARD).clean


@needs_gluon
@pytest.mark.parametrize(
    ("kind", "heard"),
    [
        ("forward", [None] * 6),
        ("backward", ["bar.sync"] * 6),
        ("backward in a fixed order", ["bar.sync"] * 6 + ["bar.warp.sync"] * 4),
        ("backward, packed", ["bar.sync"] * 6),
    ],
)
def test_numbers_are_handed_on_between_barriers(kind: str, heard: list[str | None]) -> None:
    """Racecheck does not follow them. So: wait, access, a barrier of the partition's warps, arrive.

    Three warpgroups hear, before their loop and in it, and in a fixed order two warps that send do as well.
    In the forward each warp arrives by itself, once it has read all: ``given_back_while_read`` of
    ``test_hopper.py`` looks for that.
    """
    if kind == "forward":
        compiled = compile_forward(head_dim=64, packed=True)
    else:
        call = {"deterministic": "order" in kind, "packed": "packed" in kind}
        compiled = compile_backward(head_dim=64, seqlen_k=4096, **call)
    announcements = list(announcements_in(compiled.assembly))
    # Both ends of a branch say something after one wait before it.
    assert sum(not announcement.waited for announcement in announcements) <= 1
    said = [each.barrier for each in announcements if each.kind == "st"]
    assert said == ["bar.warp.sync"] * 2, "that there is a tile, and that there is none"
    listened = [each.barrier for each in announcements if each.kind == "ld"]
    assert sorted(listened, key=str) == heard


@dataclass
class Announcement:
    """What an assembly does from one arrival to the next, if that is an access to the board."""

    kind: str
    waited: bool
    barrier: str | None = None


def announcements_in(assembly: str) -> Iterator[Announcement]:
    board = board_of()
    files = re.findall(rf'\.file\s+(\d+) ".*{board.file}"', assembly)
    assert files
    place, waited, latest = ("", 0), False, None
    for text in assembly.splitlines():
        if match := re.match(r"\s*\.loc\s+(\d+) (\d+)", text):
            place = match[1], int(match[2])
        if "mbarrier.try_wait" in text:
            waited = True
        elif place[0] in files and (match := re.search(r"\b(ld|st)\.shared", text)):
            assert place[1] in (board.reads if match[1] == "ld" else board.writes)
            latest = latest or Announcement(match[1], waited)
            assert latest.kind == match[1]
            latest.barrier = None
        elif match := re.search(r"\bbar\.(warp\.)?sync\b", text):
            if latest is not None:
                latest.barrier = match[0]
        elif "mbarrier.arrive" in text:
            if latest is not None:
                yield latest
            waited, latest = False, None


def test_a_report_without_its_writes_is_a_finding(places: dict[str, Places]) -> None:
    assert not judge("racecheck", SEEN, output(FORWARD.splitlines(keepends=True)[0]), places, BOARD).clean


@pytest.mark.parametrize(
    "text",
    [
        output(FORWARD, BACKWARD, errors=4),
        output(FORWARD, BACKWARD, errors=1),
        output(FORWARD, BACKWARD, warnings=1),
        output(FORWARD, BACKWARD) + LEFT_OUT,
        output(FORWARD).replace("displayed (1", "displayed (2"),
        output(FORWARD).split("========= RACECHECK SUMMARY")[0],
        output(FORWARD) + output(FORWARD),
        output(),
    ],
    ids=["more", "fewer", "a warning", "said so", "two numbers", "none", "twice", "no report"],
)
def test_reports_that_are_not_as_many_as_are_counted_are_not_clean(
    places: dict[str, Places], text: str
) -> None:
    assert not judge("racecheck", SEEN, text, places, BOARD).clean


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (SEEN, output(FORWARD, last="FAILED d64-full: AssertionError: wrong")),
        (SEEN, output(FORWARD, last="")),  # it has died
        (SEEN, output(FORWARD) + "========= Error: process didn't terminate successfully\n"),
        (SEEN, output(FORWARD) + "ran d64-full========= Target application returned an error\n"),
        (1, output(FORWARD)),
        (None, output(FORWARD)),
        (0, output(FORWARD.replace("forward.py:118", "forward.py:300"))),
    ],
)
def test_nothing_else_that_goes_wrong_is_hidden(
    places: dict[str, Places], code: int | None, text: str
) -> None:
    assert not judge("racecheck", code, text, places, BOARD).clean


@pytest.mark.parametrize("tool", ["memcheck", "synccheck", "none"])
def test_another_tools_errors_are_never_set_aside(
    places: dict[str, Places], capsys: pytest.CaptureFixture[str], tool: str
) -> None:
    verdict = judge(tool, SEEN, output(FORWARD), places, BOARD)
    assert not verdict.clean
    assert not verdict.set_aside
    assert verdict.rest == output(FORWARD)
    assert judge(tool, 0, "ran d64-full\n", places, BOARD).clean
    assert sanitize.report(tool, [(SEEN, output(FORWARD))], 7.0, places, BOARD) == 1
    assert FORWARD in capsys.readouterr().out


def test_memchecks_errors_at_the_same_lines_are_findings(places: dict[str, Places]) -> None:
    text = """\
========= COMPUTE-SANITIZER
========= Invalid __shared__ write of size 4 bytes
=========     at hopper_forward_kernel+0x1ad10 in forward.py:118
=========     by thread (0,0,0) in block (0,0,0)
========= ERROR SUMMARY: 1 error
"""
    assert not judge("memcheck", SEEN, text, places, BOARD).clean
    assert not judge("racecheck", SEEN, output(text, errors=1), places, BOARD).clean


def test_without_errors_it_is_clean(places: dict[str, Places]) -> None:
    assert judge("racecheck", 0, output(), places, BOARD).clean


NAMELESS = """\
========= Error: Race reported between Read access at
=========     and Write access at  [16 hazards]
=========
"""


@pytest.mark.parametrize("last", ["right", "wrong"])
@pytest.mark.parametrize(
    ("code", "text", "why"),
    [
        (SEEN, output(NAMELESS), "a report names no place"),
        (-11, "========= COMPUTE-SANITIZER\n", "the sanitizer ended by signal 11 before any call did"),
    ],
)
def test_a_share_in_which_the_sanitizer_itself_has_failed_runs_once_more(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    code: int, text: str, why: str, last: str,
) -> None:  # fmt: skip
    outcomes = {"right": (0, output()), "wrong": (code, text)}
    asked = []

    def run_all(command: list[str], jobs: int, timeout: float, numbers: object = None) -> list[object]:
        if "racecheck" not in command:
            return [(0, "ran d64-full\n")] * jobs
        asked.append(numbers if numbers is None else list(numbers))
        return [outcomes[last]] if numbers else [(0, output()), (code, text), (0, output())]

    monkeypatch.setattr(sanitize, "run_all", run_all)
    monkeypatch.setattr("sys.argv", ["sanitize.py", "racecheck", "--jobs", "3"])
    assert sanitize.main() == (last == "wrong")
    assert asked == [None, [1]]
    assert f"racecheck: share 1 runs again, since {why}\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (SEEN, output(FORWARD)),
        (0, output()),
        (None, ""),  # it took too long
        (-11, "========= COMPUTE-SANITIZER\nran d64-full\n"),  # a call may have done it
        (1, "========= COMPUTE-SANITIZER\n"),
    ],
)
def test_what_a_call_may_have_done_is_not_run_again(code: int | None, text: str) -> None:
    assert sanitize.failed_itself(code, text) is None


@pytest.mark.parametrize(("tool", "limit"), [("memcheck", sanitize.PRINT_LIMIT), ("racecheck", "0")])
def test_racecheck_is_to_print_all(monkeypatch: pytest.MonkeyPatch, tool: str, limit: str) -> None:
    commands = []

    def run_all(command: list[str], jobs: int, timeout: float) -> list[tuple[int | None, str]]:
        commands.append(command)
        return [(0, "ran d64-full\n")]

    monkeypatch.setattr(sanitize, "run_all", run_all)
    monkeypatch.setattr("sys.argv", ["sanitize.py", tool])
    assert sanitize.main() == 0
    plain, under = commands
    assert sanitize.sys.executable == plain[0]
    assert under[: under.index("--print-limit") + 2] == [
        "compute-sanitizer", "--tool", tool, "--print-limit", limit,
    ]  # fmt: skip
    assert under[-len(plain) :] == plain
