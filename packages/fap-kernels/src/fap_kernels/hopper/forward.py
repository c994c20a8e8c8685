"""The forward pass on Hopper: one warp fetches, one to three warpgroups multiply, 64 queries each.

The algorithm is FlashAttention-3's (Shah et al., arXiv:2407.08608): tiles come by TMA into rings of shared
memory, products are asynchronous, and the softmax of one key tile runs beside a product of the one before.

    fetcher      Q        K0 V0     K1 V1     K2 V2  ...          a stage is fetched again once
                 |        |  |      |  |                          every warpgroup has given it back
    warpgroup    S0=QK0   |  |      |  |
                 softmax  |  |      |  |
                 ┌ S1=QK1 ──────────┘  |    asynchronous          K1 is given back when S1 is there,
                 │ O+=P0 V0 ┘          |    asynchronous          V0 when O is
                 │ softmax of S1 ......|..  beside O+=P0 V0
                 └ wait for O, rescale it if the maximum rose
                 ┌ S2=QK2
                 │ O+=P1 V1 ───────────┘
                 ...
                 ┌ S0=QK0 of the program's next query tile, where it stays for more than one
                 │ O+=P V of the last key tile of this one
                 └ O / sum through shared memory to memory, LSE = max + log(sum)

Where there is no room for the next tile's queries before this one has left theirs, or none is to be taken for
them, S0 follows O += P V of the last key tile instead, and runs beside the way of O through shared memory.

Of packed sequences, and where tiles are drawn, the fetcher also announces which tile comes next
(``fap_kernels.hopper.announcements``).

Keys are swept from the last one down. Those that a later warpgroup alone sees, the others give back as they
came. First come the tiles that need a mask for some row of the warpgroup; they take the online softmax, and
where they left rows without a key one more does. From there on every row has met a key, and with
``OPTIMISTIC`` its maximum so far stays the reference: no maximum, no rescaling, a third less work between
products. Should a later logit tower so far over it that something overflows, the program is marked, and with
``AGAIN`` computes all of its query tiles once more when it is done with them, by the online softmax
throughout; a cluster's two programs do so together. Without, as where it draws its tiles, the LSE of that row
becomes NaN, and ``fap_kernels.hopper.redo`` computes its tile again. Rows whose result is not finite for the
inputs' sake mark as well; nothing else does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..language import grid, masks, rows, scores
from ..launch import UNSPECIALIZED
from . import announcements, barriers, cluster, hiding, mbarriers, pairs, ring, softmax, turns, work
from .mbarriers import KEYS, QUERIES, VALUES

ROWS = softmax.ROWS
KERNEL = gl.constexpr("hopper_forward_kernel")
DESCRIPTOR = cluster.DESCRIPTOR


class Operands(NamedTuple):
    """What the warps of a program share.

    Fields:
        call, score: what to compute.
        board: where the warp that fetches announces query tiles, of packed sequences or drawn, else None.
        alibi_stride: from one batch entry's ALiBi slopes to the next one's.
        q_ring, k_ring, v_ring: the tiles; a stage of ``q_ring`` has a slot for each warpgroup.
        k_shared, v_shared: where two programs share ``k_ring`` and ``v_ring``, else None.
        assembled: True where warps wait for the rings and give back to them by assembly, else None.
        again: True where the program computes again what it has marked, None where another kernel does.
        drawn: shared memory for the tickets that it has drawn, to have the same query tiles again, else None.
        staging: shared memory through which the output leaves, a tile, or half of one, for each warpgroup;
            None where it leaves through the place of its queries, which are no longer needed.
        out, lse, lse_rows: where the results go, ``out`` by descriptor, and how many rows of LSE a head has.
    """

    call: Any
    score: Any
    board: Any
    alibi_stride: Any
    q_ring: Any
    k_ring: Any
    v_ring: Any
    k_shared: Any
    v_shared: Any
    assembled: Any
    again: Any
    drawn: Any
    staging: Any
    out: Any
    lse: Any
    lse_rows: Any


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_forward_kernel(
    q_part0, k_part0, v_part0, out_part0, lse, lse_rows, alibi_slopes, alibi_stride,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, items, heads_beside, tickets,
    window_left, window_right, softmax_scale, softcap,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    Q_STAGES: gl.constexpr, FOLD_SCALE: gl.constexpr, OVERLAP_TILES: gl.constexpr, OUT_PARTS: gl.constexpr,
    PAIRED: gl.constexpr, OPTIMISTIC: gl.constexpr, TURNS: gl.constexpr, HOLD_QUERIES: gl.constexpr,
    CLUSTER: gl.constexpr, ASSEMBLED: gl.constexpr, AGAIN: gl.constexpr,
):  # fmt: skip
    """Write ``out`` and ``lse`` of every query tile that is this program's turn; see the module's docstring.

    Grid: any number of programs; ``items`` are query tiles, or pairs of them if ``PAIRED``, and program p
    takes items p, p + programs, ... With ``CLUSTER`` two programs share an item of twice as many queries.
    """
    if OPTIMISTIC and not AGAIN:
        grid.release_next()  # what looks for marked rows, and waits by itself until there may be some
    call = work.Call(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots, nheads, group, seqlen_q, seqlen_k,
        window_left, window_right, items, heads_beside, tickets, True if CLUSTER else None,
    )  # fmt: skip
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, alibi_slopes)
    of_rings = mbarriers.make(mbarriers.ALL, mbarriers.SLOTS)
    q_tiles = ring.make_tiles(q_part0, Q_STAGES * WARPGROUPS)
    queries = ring.make_ring(q_tiles, of_rings, QUERIES, Q_STAGES * WARPGROUPS, 1)
    staging = None
    if OVERLAP_TILES or OUT_PARTS > 0:
        staging = ring.make_tiles(out_part0, WARPGROUPS)
    k_shared, v_shared = None, None
    if CLUSTER:
        room = ring.make_tiles(k_part0, 2 * STAGES)  # the values' behind the keys'
        keys = ring.make_ring(room, of_rings, KEYS, STAGES, 2 * WARPGROUPS)
        values = ring.make_ring(room, of_rings, VALUES, STAGES, 2 * WARPGROUPS)
        cluster.publish_barriers()
        TILE: gl.constexpr = k_part0.block_type.nbytes
        BARRIERS: gl.constexpr = mbarriers.behind((room, q_tiles, staging))
        k_shared = cluster.Shared(0, 0, BARRIERS, BARRIERS + mbarriers.KIND, 0)
        SECOND: gl.constexpr = BARRIERS + mbarriers.RING
        v_shared = cluster.Shared(STAGES, STAGES * TILE, SECOND, SECOND + mbarriers.KIND, 1)
    else:
        keys = ring.make_ring(ring.make_tiles(k_part0, STAGES), of_rings, KEYS, STAGES, WARPGROUPS)
        values = ring.make_ring(ring.make_tiles(v_part0, STAGES), of_rings, VALUES, STAGES, WARPGROUPS)
    board = None
    if cu_seqlens_q is not None or tickets is not None:
        board = announcements.make_board(WARPGROUPS)
    drawn = None
    if AGAIN and tickets is not None:
        drawn = announcements.make_drawn()
    fence_async_shared()
    operands = Operands(
        call, score, board, alibi_stride, queries, keys, values, k_shared, v_shared,
        True if ASSEMBLED else None, True if AGAIN else None, drawn, staging, out_part0, lse, lse_rows,
    )  # fmt: skip
    if AGAIN:
        mbarriers.clear_mark(operands)
    parts = (q_part0, k_part0, v_part0)
    # The first function runs on the kernel's own four warps. The two lists behind the functions are for the
    # others: how many warps each has, and how many registers a thread of them; the first has what is left.
    # A constexpr stays one only where it is written out in the call.
    # fmt: off
    if WARPGROUPS == 1:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_N, STAGES, 1, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_fetch, (operands, parts, BLOCK_N, STAGES, 1, Q_STAGES, PAIRED)),
            ],
            [1],
            [24],
        )
    elif CLUSTER:
        gl.static_assert(WARPGROUPS == 2)
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_N, STAGES, 2, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_multiply, (1, operands, WIDTH, BLOCK_N, STAGES, 2, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_fetch, (operands, parts, BLOCK_N, STAGES, 2, Q_STAGES, PAIRED)),
                (_attend, (operands,)),
                (_attend, (operands,)),
            ],
            [4, 1, 2, 1],
            [240, 24, 24, 24],
        )
    elif WARPGROUPS == 2:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_N, STAGES, 2, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_multiply, (1, operands, WIDTH, BLOCK_N, STAGES, 2, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_fetch, (operands, parts, BLOCK_N, STAGES, 2, Q_STAGES, PAIRED)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_N, STAGES, 3, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_multiply, (1, operands, WIDTH, BLOCK_N, STAGES, 3, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_multiply, (2, operands, WIDTH, BLOCK_N, STAGES, 3, Q_STAGES, OVERLAP_TILES, OUT_PARTS,
                             PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES)),
                (_fetch, (operands, parts, BLOCK_N, STAGES, 3, Q_STAGES, PAIRED)),
            ],
            [4, 4, 1],
            [160, 160, 32],
        )
    # fmt: on


@gluon.jit
def _attend(operands):
    """Meet as the other warps do, since a cluster waits for those too that fill up a warpgroup."""
    _meet(operands)
    if operands.again is None:
        _meet(operands)
    else:
        plain, more = 0, 1
        while more > 0:
            more = _more(operands, plain, 0)
            plain = 1


@gluon.jit
def _more(operands, plain, THREADS: gl.constexpr):
    """Whether marked rows are to be computed again, once all ``THREADS`` of the program have marked theirs.

    In a cluster all warps of both programs meet. Nothing is computed a third time.
    """
    if operands.k_shared is not None:
        _meet(operands)
    else:
        barriers.meet(barriers.ALL_DONE, THREADS)
    return mbarriers.marked(operands, plain)


@gluon.jit
def _meet(operands):
    """In a cluster, wait until all warps of both programs have come: at the start and at the end."""
    if operands.k_shared is not None:
        cluster.arrive()
        cluster.wait()


@gluon.jit
def _fetch(
    operands, parts, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    Q_STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Fill the rings, in the order in which the warpgroups empty them."""
    _meet(operands)
    none = gl.to_tensor(0)
    if operands.again is None:
        _fetch_all(
            operands, parts, None, none, none, none, none, none, BLOCK_N, STAGES, WARPGROUPS, Q_STAGES, PAIRED
        )
        _meet(operands)
    else:
        q_stage, q_phase, stage, phase, count, plain, more = none, none, none, none, none, 0, 1
        while more > 0:
            q_stage, q_phase, stage, phase, count = _fetch_all(
                operands, parts, plain, q_stage, q_phase, stage, phase, count, BLOCK_N, STAGES, WARPGROUPS,
                Q_STAGES, PAIRED,
            )  # fmt: skip
            more = _more(operands, plain, 128 * WARPGROUPS + 32)
            plain = 1


@gluon.jit
def _fetch_all(
    operands, parts, plain, q_stage, q_phase, stage, phase, done, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, Q_STAGES: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """Fetch all that the program's query tiles need, of which it has ``done`` so many the second time.

    Returns where the rings are then, and how many tiles there were.
    """
    call = operands.call
    BLOCK_M: gl.constexpr = ROWS * WARPGROUPS
    if call.tickets is not None and call.cu_seqlens_q is not None:
        grid.wait_for_previous()  # where the first item may be no tile, the first tile takes a ticket
    turn, tile = work.next_tile(call, work.first_turn(call), BLOCK_M, PAIRED)
    count = 0
    while work.there_is(call, turn, PAIRED):
        announcements.announce(operands.board, _number(count, plain, done), True, tile)
        if operands.drawn is not None:
            announcements.keep(operands.drawn, count, turn)
        q_packed = tile.q_start if call.cu_seqlens_q is not None else None
        k_packed = tile.k_start if call.cu_seqlens_k is not None else None
        q_rows = rows.Rows(None, None, parts[0], None, tile.q_batch, q_packed, tile.seqlen_q, None)
        k_rows = rows.Rows(None, None, parts[1], None, tile.k_batch, k_packed, tile.seqlen_k, None)
        v_rows = rows.Rows(None, None, parts[2], None, tile.k_batch, k_packed, tile.seqlen_k, None)
        for warpgroup in gl.static_range(WARPGROUPS):
            slot = q_stage * WARPGROUPS + warpgroup
            ring.fill(operands.q_ring, slot, q_phase, q_rows, tile.head, tile.first_query + warpgroup * ROWS)
        q_stage, q_phase = ring.advance(q_stage, q_phase, Q_STAGES)
        head_k = tile.head // call.group
        # To draw a ticket takes a microsecond: it is done while the rings are still full.
        if call.tickets is not None:
            grid.wait_for_previous()  # which sets the counter to 0
        if operands.drawn is None:
            turn = work.turn_after(call, turn)
        else:
            turn = _turn_drawn(operands, plain, done, count + 1)
        sweep = work.sweep_of(call, tile, BLOCK_M, BLOCK_N)
        for step in range(sweep.count):
            first_key = sweep.top - step * BLOCK_N
            if operands.k_shared is None:
                ring.fill(operands.k_ring, stage, phase, k_rows, head_k, first_key)
                ring.fill(operands.v_ring, stage, phase, v_rows, head_k, first_key)
            else:
                place = ring.coordinates_of(k_rows, head_k, first_key)
                cluster.fill(operands.k_shared, stage, phase, parts[1], DESCRIPTOR, KERNEL, place)
                cluster.fill(operands.v_shared, stage, phase, parts[2], 2 * DESCRIPTOR, KERNEL, place)
            stage, phase = ring.advance(stage, phase, STAGES)
        turn, tile = work.next_tile(call, turn, BLOCK_M, PAIRED)
        count += 1
    announcements.announce(operands.board, _number(count, plain, done), False, tile)
    return q_stage, q_phase, stage, phase, count


@gluon.jit
def _number(count, plain, done):
    """The number of an announcement: those of the second time follow that there are no more of the first."""
    if plain is None:
        return count
    else:
        return gl.where(plain > 0, done + 1 + count, count)


@gluon.jit
def _turn_drawn(operands, plain, done, number):
    """The turn of tile number ``number``: it is drawn, if there is room for it, or the second time known.

    Others draw what is left then.
    """
    call = operands.call
    turn = call.items + 0  # no item
    if plain == 0:
        if number < announcements.MOST:
            turn = work.turn_after(call, turn)
    elif number < done:
        turn = announcements.kept(operands.drawn, number)
    return turn


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, operands, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    WARPGROUPS: gl.constexpr, Q_STAGES: gl.constexpr, OVERLAP_TILES: gl.constexpr, OUT_PARTS: gl.constexpr,
    PAIRED: gl.constexpr, OPTIMISTIC: gl.constexpr, TURNS: gl.constexpr, HOLD_QUERIES: gl.constexpr,
):  # fmt: skip
    """Compute the 64 rows of one warpgroup of each query tile, and again where rows are marked."""
    _meet(operands)
    if TURNS:
        turns.first_turn(WARPGROUP, WARPGROUPS)
    none = gl.to_tensor(0)
    if operands.again is None:
        _multiply_all(
            WARPGROUP, operands, None, none, none, none, WIDTH, BLOCK_N, STAGES, WARPGROUPS, Q_STAGES,
            OVERLAP_TILES, OUT_PARTS, PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES,
        )  # fmt: skip
        _meet(operands)
    else:
        stage, phase, count, plain, more = none, none, none, 0, 1
        while more > 0:
            stage, phase, count = _multiply_all(
                WARPGROUP, operands, plain, stage, phase, count, WIDTH, BLOCK_N, STAGES, WARPGROUPS, Q_STAGES,
                OVERLAP_TILES, OUT_PARTS, PAIRED, OPTIMISTIC, TURNS, HOLD_QUERIES,
            )  # fmt: skip
            more = _more(operands, plain, 128 * WARPGROUPS + 32)
            plain = 1


@gluon.jit
def _multiply_all(
    WARPGROUP: gl.constexpr, operands, plain, stage, phase, count, WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, Q_STAGES: gl.constexpr, OVERLAP_TILES: gl.constexpr,
    OUT_PARTS: gl.constexpr, PAIRED: gl.constexpr, OPTIMISTIC: gl.constexpr, TURNS: gl.constexpr,
    HOLD_QUERIES: gl.constexpr,
):  # fmt: skip
    """The rows of all query tiles, where ``plain`` is not 0 by the online softmax throughout.

    ``stage`` and ``phase`` are those of the keys to multiply next, ``v_stage`` and ``v_phase`` those of the
    values, which are one step behind. ``count`` is how many query tiles are done, which tells the slot and
    the phase of the queries; ``turn`` does not, since it steps over tiles that are not there. ``there`` tells
    whether there is another tile: where not, no tile is waited for or given back, and what is computed of it
    goes nowhere.
    """
    BLOCK_M: gl.constexpr = ROWS * WARPGROUPS
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    O: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    call = operands.call
    q_slot, q_phase = count % Q_STAGES * WARPGROUPS + WARPGROUP, count // Q_STAGES & 1
    # Whether the next tile's first scores are there before this one's output has left.
    AHEAD: gl.constexpr = OVERLAP_TILES or OUT_PARTS > 0
    turn, there, tile = announcements.tile_at(operands.board, _heard(count, plain), call, 0, BLOCK_M, PAIRED)
    if AHEAD:
        begun, sweep, stage, phase = _begin(
            operands, tile, there, WARPGROUP, q_slot, q_phase, stage, phase,
            BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, S,
        )  # fmt: skip
        weights, row_max, sums = _weigh_begun(begun, operands, tile, there, WARPGROUP, sweep, stage)
    while there:
        if not AHEAD:
            s, sweep, stage, phase = _begin(
                operands, tile, True, WARPGROUP, q_slot, q_phase, stage, phase,
                BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, S,
            )  # fmt: skip
            weights, row_max, sums = _weigh_begun(s, operands, tile, True, WARPGROUP, sweep, stage)
            if Q_STAGES == 2:
                # By now the output of the tile before has left the slot of its queries.
                tma.store_wait(0)
                before = (count + 1) % 2 * WARPGROUPS + WARPGROUP
                mbarriers.give_back(operands, QUERIES, before, pred=count > 0)
        acc, weights, row_max, sums, stage, phase, v_stage, v_phase = _sweep(
            q_slot, weights, row_max, sums, operands, plain, stage, phase,
            tile, WARPGROUP, sweep, BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, OPTIMISTIC, HOLD_QUERIES,
            AHEAD, OUT_PARTS, O,
        )  # fmt: skip
        done, done_max, done_sums, done_slot = tile, row_max, sums, q_slot
        count += 1
        turn, there, tile = announcements.tile_at(
            operands.board, _heard(count, plain), call, turn + 1, BLOCK_M, PAIRED
        )
        q_slot = count % Q_STAGES * WARPGROUPS + WARPGROUP
        q_phase = count // Q_STAGES & 1
        if OVERLAP_TILES:
            # S = Q K^T of the next tile's first keys runs beside O += P V of this one's last.
            sweep, stage, phase = _own_sweep(
                operands, tile, there, WARPGROUP, stage, phase, BLOCK_N, STAGES, WARPGROUPS, TURNS
            )
            q = _queries(operands, q_slot, q_phase, there, WIDTH)
            mbarriers.wait(operands, KEYS, stage, phase, pred=there)
            p = pairs.matrix(weights, operands.v_ring, acc)
            if TURNS:
                turns.take_turn(WARPGROUP)
            s = _multiply_keys(q, operands, stage, BLOCK_N, WIDTH, S)
            acc = _multiply_values(p, acc, operands, v_stage, v_phase, BLOCK_N, WIDTH)
            if TURNS:
                turns.pass_turn(WARPGROUP, WARPGROUPS)
            s = warpgroup_mma_wait(1, [s])
            mbarriers.give_back(operands, KEYS, stage, there)
            weights, row_max, sums = _weigh_first(s, operands, tile, WARPGROUP, sweep)
            # Waited for already: the branch alone keeps the assembler from moving the next wait up.
            mbarriers.wait(operands, VALUES, v_stage, v_phase)
            acc, p = warpgroup_mma_wait(0, [acc, p])
            weights = pairs.rounded(weights, operands.v_ring)
        else:
            p = pairs.matrix(weights, operands.v_ring, acc)
            acc = _multiply_values(p, acc, operands, v_stage, v_phase, BLOCK_N, WIDTH)
            acc, p = warpgroup_mma_wait(0, [acc, p])
        # The output before must have left the staging tile, and all warps must know it: Triton has them meet.
        tma.store_wait(0)
        mbarriers.give_back(operands, VALUES, v_stage)

        out = _finish(operands, plain, done, WARPGROUP, acc, done_max, done_sums, OPTIMISTIC)
        if OUT_PARTS > 0:
            # S = Q K^T of the next tile's first keys runs beside this one's last way to memory.
            place = _way_out(operands, WARPGROUP, done_slot)
            if OUT_PARTS == 2:
                first, out = gl.split(out.reshape([ROWS, 2, WIDTH // 2]).permute([0, 2, 1]))
                _drain(operands, done, WARPGROUP, first, place, 0)
            s, sweep, stage, phase = _begin(
                operands, tile, there, WARPGROUP, q_slot, q_phase, stage, phase,
                BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, S,
            )  # fmt: skip
            if OUT_PARTS == 2:
                tma.store_wait(0)  # Triton has all warps meet between this and what is stored next
            _drain(operands, done, WARPGROUP, out, place, WIDTH - WIDTH // OUT_PARTS)
            weights, row_max, sums = _weigh_begun(s, operands, tile, there, WARPGROUP, sweep, stage)
        else:
            _drain(operands, done, WARPGROUP, out, _way_out(operands, WARPGROUP, done_slot), 0)
            if Q_STAGES == 1:
                tma.store_wait(0)
                mbarriers.give_back(operands, QUERIES, done_slot)
    tma.store_wait(0)
    return stage, phase, count


@gluon.jit
def _heard(count, plain):
    """The number of the announcement of tile ``count``; between the passes one says that none is left."""
    if plain is None:
        return count
    else:
        return count + plain


@gluon.jit
def _own_sweep(
    operands, tile, there, WARPGROUP: gl.constexpr, stage, phase, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """The warpgroup's part of a query tile's sweep, and where the rings are then.

    Under a causal mask the first key tile may be seen by queries of the last warpgroup alone. The others give
    it back as it came, and leave the tensor cores to the last one; with ``TURNS``, in a turn like any other.
    """
    call = operands.call
    sweep = work.sweep_of(call, tile, ROWS * WARPGROUPS, BLOCK_N)
    CLUSTERED: gl.constexpr = call.cluster is not None
    # Rows between the first warpgroup and the last, and whether one behind this may be the last.
    APART: gl.constexpr = ROWS * (WARPGROUPS * (work.CLUSTER if CLUSTERED else 1) - 1)
    if call.window_right is not None and (CLUSTERED or WARPGROUP < WARPGROUPS - 1) and APART >= BLOCK_N:
        ENOUGH: gl.constexpr = APART <= BLOCK_N * (STAGES - 1)
        gl.static_assert(ENOUGH or CLUSTERED, "no stage would be left for the keys to begin with")
        first_row = tile.first_query + WARPGROUP * ROWS
        above = gl.where(there, work.steps_above(call, tile, sweep, first_row, ROWS, BLOCK_N), 0)
        for _ in range(above):
            if TURNS:
                turns.take_turn(WARPGROUP)
                turns.pass_turn(WARPGROUP, WARPGROUPS)
            # To give a stage back before it is filled would be taken for giving back what it held before.
            mbarriers.wait(operands, KEYS, stage, phase)
            mbarriers.give_back(operands, KEYS, stage)
            mbarriers.wait(operands, VALUES, stage, phase)
            mbarriers.give_back(operands, VALUES, stage)
            stage, phase = ring.advance(stage, phase, STAGES)
        sweep = work.Sweep(sweep.top - above * BLOCK_N, sweep.count - above)
    return sweep, stage, phase


@gluon.jit
def _queries(operands, slot, phase, there, WIDTH: gl.constexpr):
    """The warpgroup's queries, once they have arrived."""
    mbarriers.wait(operands, QUERIES, slot, phase, pred=there)
    return ring.matrix(operands.q_ring.tiles.index(slot), ROWS, WIDTH)


@gluon.jit
def _queries_again(queries, slot, held, WIDTH: gl.constexpr):
    """The queries of a slot, or those ``held`` in registers, for a loop of their own.

    Their address is made of a slot of which nobody knows that it is the same. Else the assembler of Triton
    3.6 computes parts of the address in one loop for the next one as well, which is left without them where
    the first is skipped. ``left_unset`` of ``tests/ahead_of_time.py`` finds that in the machine code.
    """
    if held is not None:
        return held
    else:
        slot = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [slot], gl.int32, is_pure=False, pack=1)
        return ring.matrix(queries.tiles.index(slot), ROWS, WIDTH)


@gluon.jit
def _multiply_keys(q, operands, stage, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """Start ``S = Q K^T`` with the keys of a stage, which have arrived."""
    k = ring.matrix(ring.tile(operands.k_ring, operands.k_shared, stage), BLOCK_N, WIDTH).permute([1, 0])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    return warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)


@gluon.jit
def _multiply_values(p, acc, operands, stage, phase, BLOCK_N: gl.constexpr, WIDTH: gl.constexpr):
    """Start ``O += P V`` with the values of a stage, once they have arrived."""
    mbarriers.wait(operands, VALUES, stage, phase)
    v = ring.matrix(ring.tile(operands.v_ring, operands.v_shared, stage), BLOCK_N, WIDTH)
    return warpgroup_mma(p, v, acc, is_async=True)


@gluon.jit
def _logits(s, operands, tile, WARPGROUP: gl.constexpr, first_key, MASKED: gl.constexpr):
    """The logits of a tile of scores, -inf where hidden, up to the factor ``scores.unit``."""
    LAYOUT: gl.constexpr = s.type.layout
    queries = tile.first_query + WARPGROUP * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    keys = first_key + gl.arange(0, s.shape[1], gl.SliceLayout(0, LAYOUT))[None, :]
    call, score, diagonal = operands.call, operands.score, tile.seqlen_k - tile.seqlen_q
    window = masks.Window(call.window_left, call.window_right, diagonal, tile.seqlen_q, tile.seqlen_k)
    distances = masks.distance(window, queries, keys)
    slopes = score.slopes + tile.batch * operands.alibi_stride if score.slopes is not None else None
    own = scores.Scores(score.scale, score.folded_scale, score.softcap, slopes)
    x = scores.logits(own, tile.head, s, distances)
    if MASKED:
        x = hiding.hide(window, x, queries, keys)
    return x


@gluon.jit
def _begin(
    operands, tile, there, WARPGROUP: gl.constexpr, q_slot, q_phase, stage, phase, BLOCK_N: gl.constexpr,
    WIDTH: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, TURNS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Start on a query tile: its first scores, not waited for, its sweep, and where the rings are then."""
    sweep, stage, phase = _own_sweep(
        operands, tile, there, WARPGROUP, stage, phase, BLOCK_N, STAGES, WARPGROUPS, TURNS
    )
    q = _queries(operands, q_slot, q_phase, there, WIDTH)
    mbarriers.wait(operands, KEYS, stage, phase, pred=there)
    s = _multiply_keys(q, operands, stage, BLOCK_N, WIDTH, LAYOUT)
    return s, sweep, stage, phase


@gluon.jit
def _weigh_begun(s, operands, tile, there, WARPGROUP: gl.constexpr, sweep, stage):
    """Wait for a query tile's first scores, give their keys back, and weigh them."""
    s = warpgroup_mma_wait(0, [s])
    mbarriers.give_back(operands, KEYS, stage, there)
    weights, row_max, sums = _weigh_first(s, operands, tile, WARPGROUP, sweep)
    return pairs.rounded(weights, operands.v_ring), row_max, sums


@gluon.jit
def _weigh_first(s, operands, tile, WARPGROUP: gl.constexpr, sweep):
    """The weights of a sweep's first key tile, with the maximum and the sums of each row."""
    x = _logits(s, operands, tile, WARPGROUP, sweep.top, True)
    no_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, s.type.layout))
    weights, _, row_max, sums = softmax.online_step(x, scores.unit(operands.score), no_max, softmax.no_sums())
    return weights, row_max, sums


@gluon.jit
def _sweep(
    q_slot, weights, row_max, sums, operands, plain, stage, phase,
    tile, WARPGROUP: gl.constexpr, sweep,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    TURNS: gl.constexpr, OPTIMISTIC: gl.constexpr, HOLD_QUERIES: gl.constexpr, AHEAD: gl.constexpr,
    OUT_PARTS: gl.constexpr, O: gl.constexpr,
):  # fmt: skip
    """All steps after the first, whose ``weights`` wait for their values.

    With ``AHEAD`` the queries' place is given back for the next tile's: where they are held, once a product
    has taken them from registers; where the output leaves elsewhere, after their last scores; at the end
    where the first step is the last one, or tiles overlap and queries are not held.
    """
    acc = gl.zeros([ROWS, WIDTH], gl.float32, O)
    call, first_row = operands.call, tile.first_query + WARPGROUP * ROWS
    phases = work.phases_of(call, tile, sweep, first_row, ROWS, BLOCK_N)
    settled = phases.settled
    if plain is not None:
        settled = gl.where(plain > 0, sweep.count, settled)
    v_stage, v_phase = stage, phase
    stage, phase = ring.advance(stage, phase, STAGES)
    mbarriers.wait(operands, KEYS, stage, phase, pred=sweep.count > 1)
    held = None
    if HOLD_QUERIES:
        LEFT: gl.constexpr = gl.DotOperandLayout(0, row_max.type.layout.parent, 2)
        held = ring.matrix(operands.q_ring.tiles.index(q_slot), ROWS, WIDTH).load(LEFT)
    # A load that has begun may come to shared memory after the next queries, if these are asked for at once.
    q_done, done_step = None, 1
    if AHEAD and (HOLD_QUERIES or OUT_PARTS > 0):
        q_done, done_step = q_slot, 1 if HOLD_QUERIES else sweep.count - 1
    # Without a bound the first step, which has its mask, settles all rows.
    if call.window_left is not None or call.window_right is not None or plain is not None:
        q = _queries_again(operands.q_ring, q_slot, held, WIDTH)
        for step in range(1, settled):
            acc, weights, row_max, sums, stage, phase, v_stage, v_phase = _step(
                q, q_done, done_step, weights, acc, row_max, sums, operands, stage, phase, v_stage, v_phase,
                tile, WARPGROUP, sweep, step, BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, True, False,
            )  # fmt: skip
    q = _queries_again(operands.q_ring, q_slot, held, WIDTH)
    for step in range(settled, phases.unmasked_end):
        acc, weights, row_max, sums, stage, phase, v_stage, v_phase = _step(
            q, q_done, done_step, weights, acc, row_max, sums, operands, stage, phase, v_stage, v_phase,
            tile, WARPGROUP, sweep, step, BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, False, OPTIMISTIC,
        )  # fmt: skip
    if call.window_left is not None:
        q = _queries_again(operands.q_ring, q_slot, held, WIDTH)
        for step in range(gl.maximum(settled, phases.unmasked_end), sweep.count):
            acc, weights, row_max, sums, stage, phase, v_stage, v_phase = _step(
                q, q_done, done_step, weights, acc, row_max, sums, operands, stage, phase, v_stage, v_phase,
                tile, WARPGROUP, sweep, step, BLOCK_N, WIDTH, STAGES, WARPGROUPS, TURNS, True, False,
            )  # fmt: skip
    if AHEAD:
        at_end = True if q_done is None else sweep.count <= 1
        mbarriers.give_back(operands, QUERIES, q_slot, pred=at_end)
    return acc, weights, row_max, sums, stage, phase, v_stage, v_phase


@gluon.jit
def _step(
    q, q_done, done_step, weights, acc, row_max, sums, operands, stage, phase, v_stage, v_phase,
    tile, WARPGROUP: gl.constexpr, sweep, step,
    BLOCK_N: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    TURNS: gl.constexpr, MASKED: gl.constexpr, OPTIMISTIC: gl.constexpr,
):  # fmt: skip
    """Multiply the step's keys beside the values of the step before, and weigh the one beside the other.

    The keys have been waited for, and those of the next step are at the end. Behind the scores of step
    ``done_step``, the queries' slot ``q_done`` is given back; None is none.
    """
    S: gl.constexpr = row_max.type.layout.parent
    p = pairs.matrix(weights, operands.v_ring, acc)
    if TURNS:
        turns.take_turn(WARPGROUP)
    s = _multiply_keys(q, operands, stage, BLOCK_N, WIDTH, S)
    acc = _multiply_values(p, acc, operands, v_stage, v_phase, BLOCK_N, WIDTH)
    if TURNS:
        turns.pass_turn(WARPGROUP, WARPGROUPS)
    s = warpgroup_mma_wait(1, [s])
    mbarriers.give_back(operands, KEYS, stage)
    if q_done is not None:
        mbarriers.give_back(operands, QUERIES, q_done, pred=step == done_step)
    x = _logits(s, operands, tile, WARPGROUP, sweep.top - step * BLOCK_N, MASKED)
    if OPTIMISTIC:
        weights, sums = softmax.optimistic_step(x, scores.unit(operands.score), row_max, sums)
    else:
        weights, rescale, row_max, sums = softmax.online_step(x, scores.unit(operands.score), row_max, sums)
    next_stage, next_phase = ring.advance(stage, phase, STAGES)
    # The next step's keys are waited for here, since the branch keeps the assembler from moving the wait for
    # O above the exponentials.
    mbarriers.wait(operands, KEYS, next_stage, next_phase, pred=step + 1 < sweep.count)
    acc, p = warpgroup_mma_wait(0, [acc, p])
    mbarriers.give_back(operands, VALUES, v_stage)
    if not OPTIMISTIC:
        acc = acc * gl.convert_layout(rescale, gl.SliceLayout(1, acc.type.layout))[:, None]
    weights = pairs.rounded(weights, operands.v_ring)
    return acc, weights, row_max, sums, next_stage, next_phase, stage, phase


@gluon.jit
def _finish(operands, plain, tile, WARPGROUP: gl.constexpr, acc, row_max, sums, OPTIMISTIC: gl.constexpr):
    """Normalise and round the output, and store the LSE."""
    factor, row_lse, row_sum = softmax.finish(row_max, sums)
    call, first_row = operands.call, tile.first_query + WARPGROUP * ROWS
    row = first_row + gl.arange(0, ROWS, row_max.type.layout)
    strides = (call.nheads * operands.lse_rows, operands.lse_rows)
    entry = rows.vector_of(operands.lse, strides, tile.q_batch, tile.head, tile.q_start)
    if OPTIMISTIC:
        doubted = softmax.mark_overflow(row_lse, row_sum, acc)
        if plain is None:
            row_lse = doubted
        else:
            mbarriers.mark(operands, doubted, plain)
            # Logits that all are -inf look like no keys to masked steps. But then there was no doubt.
            before = gl.load(entry + row, mask=(row < tile.seqlen_q) & (plain > 0), other=0.0)
            lost = gl.where((row_sum == 0.0) & (before != before), float("nan"), 0.0)
            row_lse = gl.where(plain > 0, row_lse + lost, doubted)
            factor += lost
    gl.store(entry + row, row_lse, mask=row < tile.seqlen_q)
    acc = acc * gl.convert_layout(factor, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc.to(operands.out.dtype)


@gluon.jit
def _way_out(operands, WARPGROUP: gl.constexpr, slot):
    """Where the output leaves through: staging memory, or the place of its queries, in ``slot``."""
    if operands.staging is None:
        return operands.q_ring.tiles.index(slot)
    else:
        return operands.staging.index(WARPGROUP)


@gluon.jit
def _drain(operands, tile, WARPGROUP: gl.constexpr, out, place, FIRST_COLUMN: gl.constexpr):
    """Start the way to memory of the output's columns from ``FIRST_COLUMN`` on, through ``place``."""
    q_packed = tile.q_start if operands.call.cu_seqlens_q is not None else None
    out_rows = rows.Rows(None, None, operands.out, None, tile.q_batch, q_packed, tile.seqlen_q, None)
    ring.matrix(place, ROWS, out.shape[1]).store(out)
    fence_async_shared()
    ring.drain(place, out_rows, tile.head, tile.first_query + WARPGROUP * ROWS, FIRST_COLUMN)
