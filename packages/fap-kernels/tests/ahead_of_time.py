"""Compile a planned launch for a GPU that is not there, and read what it costs from the assembler."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
import tempfile
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fap_kernels.launch import UNSPECIALIZED, Launch

TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
GPU_TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPE_NAMES = {
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32",
    torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What a compiled kernel needs: bytes of shared memory, registers and spilled bytes a thread."""

    shared: int
    registers: int
    spills: int
    assembly: str
    warnings: tuple[str, ...]
    cubin: bytes = b""


def compile_launch(launch: Launch, chip: str) -> Compiled:
    """Compile ``launch`` for ``chip`` as Triton's launcher would, specialisations included."""
    signature, constexprs, attributes = specialize(launch)
    source = _source_class(launch.kernel)(
        fn=launch.kernel, signature=signature, constexprs=constexprs, attrs=attributes
    )
    options = {name: value for name, value in launch.options().items() if name != "launch_pdl"}
    key = (source.hash(), chip, repr(options))
    # Tests that look at different sides of one kernel stand close to each other.
    compiled = _latest.pop(key, None) or _compile(source, chip, options)
    _latest[key] = compiled
    if len(_latest) > 64:
        del _latest[next(iter(_latest))]
    return compiled


_latest: dict[tuple[str, str, str], Compiled] = {}


def _compile(source: Any, chip: str, options: dict[str, Any]) -> Compiled:
    with pytest.MonkeyPatch.context() as environment, redirect_stdout(StringIO()) as printed:
        # AMD's code is read as assembly and need not be linked; Triton 3.4 carries no linker of its own.
        environment.setenv("TRITON_HIP_LLD_PATH", shutil.which("true") or "")
        # The assembler's report is only there where it runs, so nothing is taken from Triton's cache.
        environment.setenv("TRITON_DUMP_PTXAS_LOG", "1")
        environment.setenv("TRITON_ALWAYS_COMPILE", "1")
        compiled = triton.compile(source, target=GPU_TARGETS[chip], options=options)
    registers, spills, warnings = _resources(compiled, chip, printed.getvalue())
    assembly = compiled.asm["amdgcn"] if chip.startswith("gfx") else compiled.asm["ptx"]
    cubin = compiled.asm.get("cubin", b"")
    return Compiled(compiled.metadata.shared, registers, spills, assembly, warnings, cubin)


def places(compiled: Compiled, instruction: str) -> list[int]:
    """Where in shared memory such instructions write, in bytes from its start, as far as that is fixed.

    Args:
        instruction: a regular expression, whose first group is the register that the address is in.
    """
    starts = set(re.findall(r"mov\.b32\s+(%r\d+), global_smem;", compiled.assembly))
    known = dict.fromkeys(starts, 0)
    for register, start, offset in re.findall(r"add\.s32\s+(%r\d+), (%r\d+), (\d+);", compiled.assembly):
        if start in starts:
            known[register] = int(offset)
    written = re.findall(instruction, compiled.assembly)
    return sorted(known[register] for register in written if register in known)


def barriers_of_shared_rings(first: int, stages: int) -> set[int]:
    """Where the barriers of two rings that programs of a cluster share are to lie, from ``first`` on."""
    kinds = [start + kind for start in (first, first + 768) for kind in (0, 32)]
    return {kind + 8 * stage for kind in kinds for stage in range(stages)}


def unknown_maps(compiled: Compiled) -> set[str]:
    """Kernel parameters that the assembly takes for tensor maps, though they are none."""
    taken = set(re.findall(r"mov\.b64 map, (\w+);", compiled.assembly))
    maps = set(re.findall(r"\.param \.align 64 \.b8 (\w+)\[128\]", compiled.assembly))
    assert taken, "it takes none"
    return taken - maps


def disassemble(compiled: Compiled) -> list[str]:
    """The machine instructions of a kernel for NVIDIA, in order."""
    return [line for line in _listing(compiled) if not line.endswith(":")]


def _listing(compiled: Compiled) -> list[str]:
    """The machine instructions, and labels, with a colon, before those that they mark."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.cubin)
        file.flush()
        text = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        ).stdout
    return [one or other for one, other in re.findall(r"(\.L_x_\d+:)|/\*[0-9a-f]{4,}\*/\s+([^;]+);", text)]


def left_unset(compiled: Compiled) -> list[str]:
    """Machine instructions that read a uniform register which some path to them leaves unset.

    Descriptors of shared memory are held in such registers. The assembler of Triton 3.6 is known to compute
    one in a loop for a later loop as well, where the first may be skipped; the products then read what is
    not theirs. What is set under a condition counts as set.
    """
    code, places = _with_labels(_listing(compiled))
    uses, sets = zip(*map(_uniform_registers, code), strict=True)
    before: list[set[int] | None] = [None] * len(code)
    before[0] = set()
    waiting = [0]
    while waiting:
        at = waiting.pop()
        known = before[at]
        assert known is not None
        for following in _successors(code[at], at, places):
            if following == len(code):
                continue
            earlier = before[following]
            here = known | sets[at] if earlier is None else earlier & (known | sets[at])
            if here != earlier:
                before[following] = here
                waiting.append(following)
    return [
        line
        for line, used, known in zip(code, uses, before, strict=True)
        if known is not None and used - known
    ]


def _with_labels(listing: list[str]) -> tuple[list[str], dict[str, int]]:
    code: list[str] = []
    places: dict[str, int] = {}
    for line in listing:
        if line.endswith(":"):
            places[line[:-1]] = len(code)
        else:
            code.append(line)
    return code, places


def _successors(line: str, at: int, places: dict[str, int]) -> list[int]:
    """Which instructions may follow one."""
    guarded, operation, rest = _take_apart(line)
    kind = operation.split(".")[0]
    targets = [places[name] for name in re.findall(r"\.L_x_\d+", rest)]
    if kind in ("BRA", "BRX", "EXIT", "RET"):
        # A branch may name a condition of its own, too.
        on = [at + 1] if guarded or (kind == "BRA" and re.match(r"!?U?P\w", rest)) else []
        return targets + on
    return [*targets, at + 1] if kind == "CALL" else [at + 1]


def _uniform_registers(line: str) -> tuple[set[int], set[int]]:
    """Those that an instruction reads, and those that it sets."""
    _, operation, rest = _take_apart(line)
    first, *others = [part.strip() for part in re.split(r",(?![^\[]*\])", rest)]
    wide = ".64" in operation or "WIDE" in operation
    sets: set[int] = set()
    if re.fullmatch(r"UR\d+", first) and operation.startswith(("U", "R2UR", "S2UR", "VOTEU")):
        sets = _span(first, 2 if wide else 1)
    else:
        others.insert(0, first)
    uses: set[int] = set()
    for part in others:
        if part.startswith("gdesc["):
            # Descriptors of the left and the right operand; a left one in registers has none.
            pairs = _span(part, 4)
            uses |= pairs - _span(part, 2) if re.fullmatch(r"R\d+", others[1]) else pairs
        else:
            for descriptor in re.findall(r"desc\[UR\d+\]", part):
                uses |= _span(descriptor, 2)
            for register in re.findall(r"UR\d+", re.sub(r"desc\[UR\d+\]", "", part)):
                # Of a wide product only the addend is wide.
                pair = ".64" in operation or ("WIDE" in operation and part is others[-1])
                uses |= _span(register, 2 if pair and sets and not operation.startswith("ULDC") else 1)
    return uses, sets


def _span(text: str, count: int) -> set[int]:
    number = int(re.search(r"UR(\d+)", text)[1])  # type: ignore[index]
    return set(range(number, number + count))


def _take_apart(line: str) -> tuple[bool, str, str]:
    """Whether an instruction has a condition, its operation, and its operands."""
    match = re.match(r"(@\S+\s+)?(\S+)\s*(.*)", line.strip())
    assert match is not None
    return match[1] is not None, match[2], match[3]


def exponentials_between(code: list[str], outstanding: int, left: int) -> list[int]:
    """How many there are wherever a wait for warpgroup products is followed by another one.

    Args:
        code: from :func:`disassemble`.
        outstanding, left: the products that the first wait, and the second, leave under way.
    """
    waits = [
        (number, int(match[1], 0))
        for number, line in enumerate(code)
        if (match := re.search(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", line))
    ]
    return [
        sum("MUFU.EX2" in line for line in code[first:last])
        for (first, before), (last, after) in itertools.pairwise(waits)
        if (before, after) == (outstanding, left)
    ]


def specialize(
    launch: Launch,
) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """The signature, constexprs and attributes that Triton compiles a launch by."""
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        signature[parameter.name] = _describe(
            value, (index,), parameter.is_constexpr, parameter.name in UNSPECIALIZED, constexprs, attributes
        )
    return signature, constexprs, attributes


def _describe(value, path, is_constexpr, unspecialized, constexprs, attributes):
    if isinstance(value, tuple):
        return tuple(
            _describe(x, (*path, i), False, unspecialized, constexprs, attributes)
            for i, x in enumerate(value)
        )
    if is_constexpr or value is None or (not unspecialized and type(value) is int and value == 1):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, torch.Tensor):
        if value.data_ptr() % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        if not unspecialized and value % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    layout = (
        f",{value.layout!r}" if hasattr(value, "layout") else ""
    )  # Gluon's say how they lie in shared memory
    return f"tensordesc<{TYPE_NAMES[value.base.dtype]}{list(value.block_shape)}{layout}>"


def _source_class(kernel) -> Any:
    if not type(kernel).__name__.startswith("Gluon"):
        return ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _resources(compiled, chip, report) -> tuple[int, int, tuple[str, ...]]:
    if chip.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text)[1])
        return registers, 4 * int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]), ()
    # Triton 3.4 keeps the report to itself. That of 3.9 is of a run with --regAllocOptLevel=2, in which a row
    # spills half as much again as without it; what may spill was recorded without.
    if not (3, 5) <= TRITON < (3, 8):
        report = _assemble(compiled, chip)
    spills = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", report))
    return (
        int(re.search(r"Used (\d+) registers", report)[1]),
        spills,
        tuple(re.findall(r"\(C7\d+\)[^\n]*", report)),
    )


def _assemble(compiled, chip) -> str:
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    # Triton carries a second, newer assembler, and writes newer PTX where it means to use it.
    newer = tools / "ptxas-blackwell"
    ptxas = newer if newer.exists() and (chip == "sm_100" or TRITON >= (3, 8)) else tools / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernel.ptx"
        ptx.write_text(compiled.asm["ptx"])
        name = chip + ("" if chip == "sm_80" else "a")
        return subprocess.run(
            [ptxas, "-v", f"--gpu-name={name}", ptx, "-o", Path(folder) / "kernel.cubin"],
            capture_output=True, text=True, check=True,
        ).stderr  # fmt: skip
