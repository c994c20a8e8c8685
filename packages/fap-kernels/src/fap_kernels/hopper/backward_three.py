"""The backward pass on Hopper for narrow heads: two warpgroups hold 64 keys each, a third one makes dQ.

All is held transposed, as in :mod:`fap_kernels.hopper.backward`. But there the two warpgroups meet in every
step, to make dQ of each other's dS. Here they hand dS on, and never wait for each other.

    fetcher      K  Q0     V  dO0      Q1 dO1     Q2 dO2 ... K Q0 V dO0 ...
                 |  |      |  |        |  |                       a stage is fetched again once
                 |  |      |  |        |  |                       both warpgroups have given it back
    warpgroup    S=KQ0 ────┘──┘        |  |
                 P=exp(S-LSE)          |  |
                 ┌ dP=V dO0, -delta    |  |    asynchronous       starts at -delta, so that it is dP-delta
                 │ dV+=P dO0           |  |    asynchronous
                 └ dS=P dP             |  |    beside dV
                 ┌ dK+=dS Q0           |  |    asynchronous
                 │ dS to slot 0 ───────│──│──┐                    waits until the third has given it back
                 │ give dO0 back       |  |  |
                 └ give Q0 back        |  |  |
                 S=KQ1 ────────────────┘  |  |
                 ...                         |
                 dV, dK * softmax_scale through the tile of V to memory
                 S=K Q0 of the program's next key tile
                 ...
    third        dQ=dS^T K, 64 queries each; give slot 0 back with the last
                 dQ to staging, and from there to memory
                 ...

The third warpgroup (``fap_kernels.hopper.backward_third``) waits for a step of the other two, and they for a
slot, or a stage, of two steps ago. The fetcher waits for what was given back with earlier steps, and with the
key tile before the last. So no circle can close within a program.

A program stays for one key tile after the other. The fetcher draws their numbers and announces the tiles
(``fap_kernels.hopper.announcements``). There is room for two of them, so that the next one, and its first
queries, come while this one's last queries are worked on and its gradients leave. Steps, stages and slots
are counted through.

Where all programs add to dQ in a fixed order (``fap_kernels.hopper.order``) two more warps send its tiles,
each from a place of its own, so that only they wait for the turn. The first key tile has the last turn
everywhere: there the third warpgroup itself waits, goes on from the sum, and writes dQ to its place.

S is there before dP starts, or both would need registers at once. While one warpgroup weighs, the other two
multiply. For want of registers, too, the weights wait for dP as float16, ``2**LIFT`` times as large. That is
exact enough for gradients in bfloat16, of which it changes the last bit now and then; in float16 their error
would grow by a quarter, so those are left to :mod:`fap_kernels.hopper.backward`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..language import grid, scores
from ..launch import UNSPECIALIZED
from . import announcements, backward_tiles, backward_work, barriers, pairs, ring, work
from .backward_third import ALL, SLOTS, make_dq_of_all, make_handover, send_dq
from .backward_tiles import KEY_TILES, LOWER, ROWS, THREADS, WITH_ANOTHER


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_backward_three_kernel(
    q_part0, k_part0, v_part0, dout_part0, dk_part0, dv_part0, lse_part0, delta_part0,
    dq_part0, dq_acc_part0, dq_acc, additions, tickets, heads_beside, rows_padded, alibi_slopes, alibi_stride,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, items, window_left, window_right, softmax_scale, softcap,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, FOLD_SCALE: gl.constexpr,
):  # fmt: skip
    """Write ``dk`` and ``dv`` of a key tile and add what it contributes to ``dq_acc``.

    ``dq_acc`` and ``additions`` are as in :mod:`fap_kernels.hopper.backward`. Only where all add in the same
    order may there be ``dq``: then whoever is last to add to a tile writes it there instead, finished.

    ``items`` key tiles are numbered as :func:`fap_kernels.hopper.backward_work.key_tile_of` says. Programs
    draw their numbers from ``tickets``, which is 0 then, or is None where there are no more than programs.

    Grid: any number of programs; without ``tickets`` one for each key tile.
    """
    call = work.Call(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots, nheads, group, seqlen_q, seqlen_k,
        window_left, window_right, items, heads_beside, tickets, None,
    )  # fmt: skip
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, alibi_slopes)
    queries = ring.make_numbered_tiles(q_part0, lse_part0, STAGES)
    douts = ring.make_numbered_tiles(dout_part0, delta_part0, STAGES)
    k = gl.allocate_shared_memory(k_part0.dtype, [KEY_TILES] + k_part0.block_shape, k_part0.layout)
    v = gl.allocate_shared_memory(v_part0.dtype, [KEY_TILES] + v_part0.block_shape, v_part0.layout)
    k_full, keys_free = ring.make_barriers(KEY_TILES, 3)  # by all three warpgroups
    v_full = ring.make_full(KEY_TILES)  # they are given back with the keys
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    exchange = gl.allocate_shared_memory(dk_part0.dtype, [SLOTS, BLOCK_N, BLOCK_M], SWIZZLED)
    staging = gl.allocate_shared_memory(dk_part0.dtype, [2, 2 * ROWS, ROWS], SWIZZLED)
    handover = None
    if additions is None:
        board = announcements.make_board(3)  # the warpgroups listen
    else:
        board = announcements.make_board(5)  # and the warps that send
        handover = make_handover(2)
    fence_async_shared()
    operands = backward_tiles.Operands(
        call, score, None, None, alibi_stride, queries, douts, k, v, k_full, v_full, keys_free, board,
        exchange, staging, dk_part0, dv_part0, dq_part0, dq_acc_part0, handover, dq_acc, additions,
        None, None, None, None, None, rows_padded,
    )  # fmt: skip
    parts = (q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0)
    # As in fap_kernels.hopper.forward: warps of the other functions, and registers of their threads.
    if additions is None:
        gl.warp_specialize(
            [
                (_make_dk_dv, (0, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_make_dk_dv, (1, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (make_dq_of_all, (operands, 2, LOWER, WIDTH, BLOCK_M, BLOCK_N, STAGES, PADDING)),
                (_fetch, (operands, parts, BLOCK_M, BLOCK_N, STAGES, PADDING)),
            ],
            [4, 4, 1],
            [208, 72, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_make_dk_dv, (0, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_make_dk_dv, (1, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (make_dq_of_all, (operands, 2, LOWER, WIDTH, BLOCK_M, BLOCK_N, STAGES, PADDING)),
                (_fetch, (operands, parts, BLOCK_M, BLOCK_N, STAGES, PADDING)),
                (send_dq, (0, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
                (send_dq, (1, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
            ],
            [4, 4, 1, 1, 1],
            [208, 72, 24, 24, 24],
        )


@gluon.jit
def _fetch(
    operands, parts, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr,
):  # fmt: skip
    """Draw key tiles, announce them, and fetch them and the query tiles that see them."""
    call = operands.call
    item, number, steps_before = _first_item(operands), 0, 0
    tile = backward_tiles.key_tile_of(operands, gl.minimum(item, call.items - 1), BLOCK_N)
    while item < call.items:
        announcements.announce_keys(operands.board, number, True, tile)
        sweep = backward_work.sweep_of(call, tile, number, steps_before, BLOCK_M, BLOCK_N)
        steps = call.group * sweep.count
        place = number % KEY_TILES
        k_full, v_full = operands.k_full.index(place), operands.v_full.index(place)
        mbarrier.wait(operands.keys_free.index(place), (number // KEY_TILES & 1) ^ 1)
        if steps > 0:
            backward_tiles.fill_keys(operands, k_full, operands.k.index(place), parts[1], tile)
        else:  # Nobody reads them. What is stored then, no kernel before this one reads or writes.
            mbarrier.arrive(k_full)
            mbarrier.arrive(v_full)
        if number == 0:
            grid.wait_for_previous()
        for step in range(steps):
            at = steps_before + step
            if at >= STAGES:
                barriers.meet(barriers.QUERIES_FREE + at % STAGES, WITH_ANOTHER)
            backward_tiles.fill(
                operands, operands.queries, parts[0], parts[4], tile, sweep, step, BLOCK_M, STAGES, PADDING
            )
            if step == 0:
                backward_tiles.fill_keys(operands, v_full, operands.v.index(place), parts[2], tile)
            if at >= STAGES:
                barriers.meet(barriers.DOUTS_FREE + at % STAGES, WITH_ANOTHER)
            backward_tiles.fill(
                operands, operands.douts, parts[3], parts[5], tile, sweep, step, BLOCK_M, STAGES, PADDING
            )
        number += 1
        steps_before += steps
        # To draw a ticket takes a microsecond: it is done while two query tiles are still to be worked on.
        item = _draw(operands) if call.tickets is not None else call.items
        tile = backward_tiles.key_tile_of(operands, gl.minimum(item, call.items - 1), BLOCK_N)
    announcements.announce_keys(operands.board, number, False, tile)


@gluon.jit
def _first_item(operands):
    """The number of a program's first key tile.

    In a fixed order it is drawn like all others. For what it waits for are smaller numbers, and those must
    have been drawn by programs that run; whether a program of smaller number runs is not known.
    """
    if operands.additions is not None and operands.call.tickets is not None:
        grid.wait_for_previous()
        return _draw(operands)
    else:
        return gl.program_id(0)


@gluon.jit
def _draw(operands):
    """Draw the number of a key tile."""
    drawn = work.draw(operands.call)
    if operands.additions is None:  # the first ones are the programs' own
        drawn += gl.num_programs(0)
    return drawn


@gluon.jit
def _make_dk_dv(
    WARPGROUP: gl.constexpr, operands, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of 64 keys and values of each key tile, and hand dS on."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    call = operands.call
    number, steps_before = 0, 0
    there, tile = announcements.keys_at(operands.board, 0, 4)
    while there:
        sweep = backward_work.sweep_of(call, tile, number, steps_before, BLOCK_M, BLOCK_N)
        place = number % KEY_TILES
        dk = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
        dv = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
        mbarrier.wait(operands.k_full.index(place), number // KEY_TILES & 1)
        mbarrier.wait(operands.v_full.index(place), number // KEY_TILES & 1)
        dk, dv = backward_tiles.sweep_queries(
            _step, None, WARPGROUP, operands, tile, sweep, (dk, dv), WIDTH, BLOCK_M, BLOCK_N, STAGES
        )
        # Nobody else reads the warpgroup's own 64 values, while the third may still need the keys.
        v = operands.v.index(place)
        backward_tiles.store(operands, v, WARPGROUP, dv * LOWER, operands.dv, tile, WIDTH, BLOCK_N)
        dk = dk * (operands.score.scale * LOWER)
        tma.store_wait(0)
        backward_tiles.store(operands, v, WARPGROUP, dk, operands.dk, tile, WIDTH, BLOCK_N)
        number += 1
        steps_before += call.group * sweep.count
        there, tile = announcements.keys_at(operands.board, number, 4)
        tma.store_wait(0)
        mbarrier.arrive(operands.keys_free.index(place))


@gluon.jit
def _wait_for_slot(WARPGROUP: gl.constexpr, step):
    """Wait until the third warpgroup has read what was in the slot of ``step``."""
    OWN: gl.constexpr = barriers.SLOT_FREE if WARPGROUP == 0 else barriers.SLOT_FREE_TOO
    barriers.meet(OWN + step % SLOTS, THREADS)


@gluon.jit
def _step(
    WARPGROUP: gl.constexpr, operands, tile, sweep, member, number, gradients,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Take in query tile ``number`` of a head, the ``member``-th of its group; see the module's docstring."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dk, dv = gradients
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    queries, douts = operands.queries, operands.douts
    call = operands.call
    step = sweep.steps_before + member * sweep.count + number
    stage, phase = step % STAGES, step // STAGES & 1
    head = tile.head_k * call.group + member
    first_query = backward_tiles.first_query_of(operands, sweep, number, BLOCK_M)
    place = sweep.tiles_before % KEY_TILES
    k = ring.matrix(operands.k.index(place), BLOCK_N, WIDTH).slice(WARPGROUP * ROWS, ROWS, 0)
    v = ring.matrix(operands.v.index(place), BLOCK_N, WIDTH).slice(WARPGROUP * ROWS, ROWS, 0)
    q = ring.matrix(queries.tiles.index(stage), BLOCK_M, WIDTH)
    dout = ring.matrix(douts.tiles.index(stage), BLOCK_M, WIDTH)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, S)

    mbarrier.wait(queries.full.index(stage), phase)
    row_lse = queries.numbers.index(stage).load(COLUMN)
    s = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    first_key = tile.first_key + WARPGROUP * ROWS
    weights = backward_tiles.weigh(operands, tile, head, first_query, first_key, s, row_lse, BLOCK_M, MASKED)
    rounded = pairs.rounded(weights, douts)
    # There is no room for them as they are until dP is there.
    share = pairs.as_float16(scores.logits_grad(operands.score, s, weights))

    mbarrier.wait(douts.full.index(stage), phase)
    less_delta, _ = gl.broadcast(douts.numbers.index(stage).load(COLUMN)[None, :], zeros)
    zero = (call.seqlen_q >> 31).to(gl.float32)  # it is never negative
    less_delta = pairs.no_sooner_than(rounded, less_delta, zero)
    dp = warpgroup_mma(v, dout.permute([1, 0]), less_delta, is_async=True)
    p = pairs.matrix(rounded, douts, dv)
    dv = warpgroup_mma(p, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, [dp])
    ds = (pairs.from_float16(share, S) * dp).to(operands.dk.dtype)
    left = gl.convert_layout(ds, WEIGHTS, assert_trivial=True)
    dk = warpgroup_mma(left, q, dk, is_async=True)
    if step >= SLOTS:
        _wait_for_slot(WARPGROUP, step)
    operands.exchange.index(step % SLOTS).slice(WARPGROUP * ROWS, ROWS, 0).store(ds)
    fence_async_shared()
    barriers.arrive(barriers.GRADIENTS_THERE + step % SLOTS, ALL)
    dv, p = warpgroup_mma_wait(1, [dv, p])
    barriers.arrive(barriers.DOUTS_FREE + stage, WITH_ANOTHER)
    dk, left = warpgroup_mma_wait(0, [dk, left])
    barriers.arrive(barriers.QUERIES_FREE + stage, WITH_ANOTHER)
    return dk, dv
