"""How tiles of packed sequences are numbered, in Triton's interpreter."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import triton
import triton.language as tl

from fap_kernels.language import spans, tiles
from fap_kernels.packing import slot_count

pytestmark = pytest.mark.interpreter


@triton.jit
def list_places(found, cu_seqlens, entries, slots, nheads, BLOCK: tl.constexpr, LAST_FIRST: tl.constexpr):
    """Write down batch entry, head and first row of each program, ``(programs, 3)``."""
    packed = spans.Slots(cu_seqlens, entries, slots)
    batch, head, first = tiles.place(nheads, 0, packed, BLOCK, LAST_FIRST)
    tl.store(found + tl.program_id(0) * 3, batch)
    tl.store(found + tl.program_id(0) * 3 + 1, head)
    tl.store(found + tl.program_id(0) * 3 + 2, first)


@triton.jit
def list_entries(found, cu_seqlens, entries, slots, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Write down the entry and the tile of several slots at once, ``(2, COUNT)``."""
    slot = tl.minimum(tl.arange(0, COUNT), slots - 1)
    batch, tile, _ = spans.entry_of(spans.Slots(cu_seqlens, entries, slots), slot, BLOCK)
    tl.store(found + tl.arange(0, COUNT), batch)
    tl.store(found + COUNT + tl.arange(0, COUNT), tile)


def draw(seed: int) -> tuple[list[int], torch.Tensor, int, int]:
    """Lengths, their bounds, how many rows the tensor has, and the rows of a tile."""
    rng = random.Random(seed)
    lengths = [rng.choice([0, 1, rng.randint(0, 40), rng.randint(0, 400)]) for _ in range(rng.randint(1, 9))]
    before, behind = rng.choice([0, 0, 77]), rng.choice([0, 0, 130])
    bounds = torch.tensor([before, *itertools.accumulate(lengths, initial=before)][1:], dtype=torch.int32)
    return lengths, bounds, before + sum(lengths) + behind, rng.choice([16, 64, 128])


@pytest.mark.parametrize("last_first", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_tile_has_one_slot_and_few_slots_are_empty(seed: int, last_first: bool) -> None:
    lengths, bounds, rows, block = draw(seed)
    slots, nheads = slot_count(rows, len(lengths), block), 2
    found = torch.zeros(nheads * slots, 3, dtype=torch.int32)
    if slots:
        list_places[(nheads * slots,)](found, bounds, len(lengths), slots, nheads, block, last_first)
    places = [tuple(place) for place in found.tolist()]
    there = [place for place in places if 0 <= place[2] < lengths[place[0]]]
    expected = {
        (batch, head, first)
        for batch, length in enumerate(lengths)
        for head in range(nheads)
        for first in range(0, length, block)
    }
    assert len(there) == len(expected)
    assert set(there) == expected
    assert all(first >= 0 for _, _, first in places)
    assert len(places) - len(there) <= nheads * (len(lengths) + -(-rows // block) - sum(lengths) // block)
    first_of = {}
    for batch, head, first in there:
        earlier = first_of.setdefault((batch, head), first)
        assert first <= earlier if last_first else first >= earlier
        first_of[batch, head] = first


@pytest.mark.parametrize("seed", range(6))
def test_several_slots_find_their_entries_at_once(seed: int) -> None:
    lengths, bounds, rows, block = draw(seed)
    slots = slot_count(rows, len(lengths), block)
    found = torch.zeros(2, 64, dtype=torch.int32)
    list_entries[(1,)](found, bounds, len(lengths), slots, block, 64)
    starts = [(int(bound) + entry * (block - 1)) // block for entry, bound in enumerate(bounds)]
    for number, (batch, tile) in enumerate(zip(*found.tolist(), strict=True)):
        slot = min(number, slots - 1)
        inside = [entry for entry in range(len(lengths)) if starts[entry] <= slot < starts[entry + 1]]
        assert inside in ([], [batch])
        assert tile == (slot - starts[batch] if inside else starts[batch + 1] - starts[batch])


def test_no_entries_have_no_slots() -> None:
    assert slot_count(500, 0, 64) == 0
