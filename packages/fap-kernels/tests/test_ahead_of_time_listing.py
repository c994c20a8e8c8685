"""What :func:`ahead_of_time.left_unset` finds in machine code."""

from __future__ import annotations

import ahead_of_time
import pytest

SKIPPED = [
    "UMOV UR4, 0x1", "@!P0 BRA `(.L_x_2)", "UIADD3 UR6, UR4, 0x2, URZ", ".L_x_1:",
    "HGMMA.64x64x16.F32.BF16 R24, R88, gdesc[UR4].tnspB, R24", "@P1 BRA `(.L_x_1)", ".L_x_2:",
    "UIADD3 UR7, UR6, 0x2, URZ", "EXIT",
]  # fmt: skip


@pytest.mark.parametrize(
    ("listing", "found"),
    [
        # The loop reads UR6 and UR7, of which nobody sets UR7; skipped, UR6 is not set either.
        (SKIPPED, [SKIPPED[4], SKIPPED[7]]),
        (["UMOV UR6, 0x1", "UMOV UR7, 0x1", *SKIPPED], []),
        (["UIMAD.WIDE UR6, UR2, 0x1, URZ", *SKIPPED], ["UIMAD.WIDE UR6, UR2, 0x1, URZ"]),
        (["UMOV UR2, 0x1", "UIMAD.WIDE UR6, UR2, 0x1, URZ", "EXIT"], []),
        (["UMOV UR2, 0x1", "UIMAD.WIDE UR6, UR2, 0x1, UR2", "EXIT"], ["UIMAD.WIDE UR6, UR2, 0x1, UR2"]),
        (["@P0 UMOV UR2, 0x1", "IMAD.U32 R3, RZ, RZ, UR2", "EXIT"], []),
        (["BRX R4 -0x1a0 (*\"BRANCH_TARGETS .L_x_3\"*)", "UMOV UR2, 0x1", ".L_x_3:", "MOV R3, UR2", "EXIT"],
         ["MOV R3, UR2"]),
        (["LDG.E R3, desc[UR4][R2.64]", "EXIT"], ["LDG.E R3, desc[UR4][R2.64]"]),
        (["ULDC.64 UR4, c[0x0][0x208]", "LDG.E R3, desc[UR4][R2.64]", "EXIT"], []),
        (["UMOV UR4, 0x1", "EXIT", "MOV R3, UR9"], []),
    ],
)  # fmt: skip
def test_a_register_that_a_path_leaves_unset_is_found(
    monkeypatch: pytest.MonkeyPatch, listing: list[str], found: list[str]
) -> None:
    monkeypatch.setattr(ahead_of_time, "_listing", lambda compiled: listing)
    assert ahead_of_time.left_unset(ahead_of_time.Compiled(0, 0, 0, "", ())) == found
