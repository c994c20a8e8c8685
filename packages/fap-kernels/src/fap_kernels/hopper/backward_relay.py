"""The backward pass on Hopper for wide heads: three warpgroups, a gradient each, hand the weights on.

dK and dV of 128 keys and 256 columns would fill all registers that there are. So a program holds 64 keys,
and no warpgroup both: the first makes dV, the second dK, and the third dQ, which leaves them at once. What
they are made of goes from one to the next in a slot of shared memory, one of two: weights P come into it, dS
out of it.

    fetcher      K  Q0    V  dO0     Q1 dO1      Q2 dO2 ...    a stage is fetched again once the first and
                 |  |     |  |       |  |                      the second have given it back
    first        S=KQ0    |  |       |  |
                 P=exp(S-LSE)        |  |
                 P to slot 0 ────────│──│──┐                   waits until the third has given the slot back
                 dV+=P dO0 ──┘       |  |  |
                 S=KQ1 ──────────────┘  |  |
                 ...                    |  |
    second       ┌ dP=V dO0, -delta ────│──│──  asynchronous   starts at -delta, so that it is dP-delta
                 └ dS=P dP              |  |
                 dS to slot 0, in place ┘  ├─┐
                 dK+=dS Q0                   |
                 ...                         |
    third        dQ=dS^T K, 64 columns each; give slot 0 back with the last
                 dQ to staging, and from there to memory
                 ...

None waits for one behind it but for a slot, or a stage, of two steps ago, and of that step nothing waits for
this one: so no circle can close. While one waits the other two multiply, which is all the overlap that there
is; within a warpgroup products follow each other.

All features are the first warpgroup's: it masks, and what it hands on holds the derivative of the softcap
already, since dS is linear in dP. It hands it on as float16, in bfloat16 calls ``2**LIFT`` times as large, as
in :mod:`fap_kernels.hopper.backward_three`: rounded to bfloat16, and its gradient once more, dQ and dK would
err by a quarter more. dQ is summed up as in :mod:`fap_kernels.hopper.backward`.
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

from ..language import scores
from ..launch import UNSPECIALIZED
from . import backward_tiles, barriers, cluster, mbarriers, ring, work
from .backward_third import ALL, SLOTS, make_dq
from .backward_tiles import BARRIERS, LOWER, ROWS, THREADS
from .compat import reinterpret

GIVEN_BACK = gl.constexpr(2 * 2 * mbarriers.WARPS.value)
"""Warps that give a shared stage back: those of two warpgroups, of each program."""


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_backward_relay_kernel(
    q_part0, k_part0, v_part0, dout_part0, dk_part0, dv_part0, lse_part0, delta_part0, dq_acc_part0,
    heads_beside, rows_padded, alibi_slopes, alibi_stride,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, items, window_left, window_right, softmax_scale, softcap,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, FOLD_SCALE: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Write ``dk`` and ``dv`` of a key tile and add what it contributes to ``dq_acc``.

    Grid: one program a key tile, numbered as :func:`fap_kernels.hopper.backward_work.key_tile_of` says. With
    ``CLUSTER`` two of neighbouring numbers have neighbouring key tiles, and sweep the same queries.
    """
    call = work.Call(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots, nheads, group, seqlen_q, seqlen_k,
        window_left, window_right, items, heads_beside, None, True if CLUSTER else None,
    )  # fmt: skip
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, alibi_slopes)
    gl.static_assert(BLOCK_M == ROWS and BLOCK_N == ROWS, "a warpgroup holds 64 keys by 64 queries")
    q_shared, dout_shared = None, None
    if CLUSTER:
        room = backward_tiles.make_shared_tiles(q_part0, k_part0, lse_part0, STAGES, GIVEN_BACK)
        TILE: gl.constexpr = k_part0.block_type.nbytes
        q_shared = cluster.Shared(0, 2 * TILE, BARRIERS, BARRIERS + cluster.EMPTY, 0)
        SECOND: gl.constexpr = BARRIERS + cluster.BARRIERS[0]
        dout_shared = cluster.Shared(0, (2 + STAGES) * TILE, SECOND, SECOND + cluster.EMPTY, 1)
    else:
        room = backward_tiles.make_tiles(
            q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0, STAGES
        )
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    exchange = gl.allocate_shared_memory(dk_part0.dtype, [SLOTS, BLOCK_N, BLOCK_M], SWIZZLED)
    staging = gl.allocate_shared_memory(dk_part0.dtype, [1, 2 * ROWS, ROWS], SWIZZLED)
    fence_async_shared()
    operands = backward_tiles.Operands(
        call, score, q_shared, dout_shared, alibi_stride, room.queries, room.douts, room.k, room.v, room.k_full,
        room.v_full, None, None, exchange, staging, dk_part0, dv_part0, None, dq_acc_part0, None, None, None,
        None, rows_padded,
    )  # fmt: skip
    parts = (q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0)
    LOWERED: gl.constexpr = LOWER if q_part0.dtype == gl.bfloat16 else 1.0
    # As in fap_kernels.hopper.forward: warps of the other functions, and registers of their threads.
    gl.warp_specialize(
        [
            (_make_dv, (operands, LOWERED, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            (_make_dk, (operands, LOWERED, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
            (make_dq, (operands, parts, 1, LOWERED, WIDTH, BLOCK_M, BLOCK_N, STAGES, PADDING)),
        ],
        [4, 4],
        [200, 96],
    )


@gluon.jit
def _make_dv(
    operands, LOWERED: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The first warpgroup: weigh each query tile, hand the weights on, and sum up dV."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    call = operands.call
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    backward_tiles.begin(operands, False)
    dv = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    mbarrier.wait(operands.k_full, 0, pred=sweep.count > 0)
    dv = backward_tiles.sweep_queries(
        _weigh_step, None, 0, operands, tile, sweep, dv, WIDTH, BLOCK_M, BLOCK_N, STAGES
    )
    steps = call.group * sweep.count
    if steps > 0:
        # With the last slot the second warpgroup has given back the values.
        barriers.meet(barriers.SLOT_FREE + (steps - 1) % SLOTS, THREADS)
    place = backward_tiles.values_of(operands, 0)
    backward_tiles.store(operands, place, 0, dv * LOWERED, operands.dv, tile, WIDTH, BLOCK_N)
    tma.store_wait(0)


@gluon.jit
def _weigh_step(
    _WARPGROUP: gl.constexpr, operands, tile, sweep, member, number, dv,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Take in query tile ``number`` of a head, the ``member``-th of its group."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, dv.type.layout, 2)
    call = operands.call
    queries, douts = operands.queries, operands.douts
    step, steps = member * sweep.count + number, call.group * sweep.count
    stage, phase, slot = step % STAGES, step // STAGES & 1, step % SLOTS
    head = tile.head_k * call.group + member
    first_query = backward_tiles.first_query_of(operands, sweep, number, BLOCK_M)
    k = ring.matrix(backward_tiles.keys_of(operands, step), BLOCK_N, WIDTH)
    q = ring.matrix(queries.tiles.index(stage), BLOCK_M, WIDTH)
    dout = ring.matrix(douts.tiles.index(stage), BLOCK_M, WIDTH)

    mbarrier.wait(queries.full.index(stage), phase)
    row_lse = queries.numbers.index(stage).load(gl.SliceLayout(0, S))
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, S)
    s = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, [s])
    _give_back(operands.q_shared, barriers.QUERIES_FREE, step, steps, STAGES)
    weights = backward_tiles.weigh(
        operands, tile, head, first_query, tile.first_key, s, row_lse, BLOCK_M, MASKED
    )
    if step >= SLOTS:
        barriers.meet(barriers.SLOT_FREE + slot, THREADS)
    share = scores.logits_grad(operands.score, s, weights)
    _as_float16(operands.exchange.index(slot)).store(share.to(gl.float16))
    barriers.arrive(barriers.WEIGHTS_THERE + slot, THREADS)
    p = gl.convert_layout(weights.to(operands.dk.dtype), WEIGHTS, assert_trivial=True)
    mbarrier.wait(douts.full.index(stage), phase)
    dv = warpgroup_mma(p, dout, dv, is_async=True)
    dv, p = warpgroup_mma_wait(0, [dv, p])
    _give_back(operands.dout_shared, barriers.DOUTS_FREE, step, steps, STAGES)
    return dv


@gluon.jit
def _make_dk(
    operands, LOWERED: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The second warpgroup: turn weights into their gradients in place, and sum up dK."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, ACC, 2)
    call = operands.call
    queries, douts = operands.queries, operands.douts
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    backward_tiles.begin(operands, False)
    steps = call.group * sweep.count
    dk = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    mbarrier.wait(operands.v_full, 0, pred=steps > 0)
    for step in range(steps):
        stage, phase, slot = step % STAGES, step // STAGES & 1, step % SLOTS
        v = ring.matrix(backward_tiles.values_of(operands, step), BLOCK_N, WIDTH)
        q = ring.matrix(queries.tiles.index(stage), BLOCK_M, WIDTH)
        dout = ring.matrix(douts.tiles.index(stage), BLOCK_M, WIDTH)
        mbarrier.wait(douts.full.index(stage), phase)
        row_numbers = douts.numbers.index(stage).load(gl.SliceLayout(0, S))
        less_delta, _ = gl.broadcast(row_numbers[None, :], gl.zeros([ROWS, BLOCK_M], gl.float32, S))
        dp = warpgroup_mma(v, dout.permute([1, 0]), less_delta, is_async=True)
        barriers.meet(barriers.WEIGHTS_THERE + slot, THREADS)
        share = _as_float16(operands.exchange.index(slot)).load(S).to(gl.float32)
        dp = warpgroup_mma_wait(0, [dp])
        _give_back(operands.dout_shared, barriers.DOUTS_FREE, step, steps, STAGES)
        ds = (share * dp).to(operands.dk.dtype)
        operands.exchange.index(slot).store(ds)
        fence_async_shared()
        barriers.arrive(barriers.GRADIENTS_THERE + slot, THREADS)
        mbarrier.wait(queries.full.index(stage), phase)
        ds = gl.convert_layout(ds, WEIGHTS, assert_trivial=True)
        dk = warpgroup_mma(ds, q, dk, is_async=True)
        dk, ds = warpgroup_mma_wait(0, [dk, ds])
        _give_back(operands.q_shared, barriers.QUERIES_FREE, step, steps, STAGES)
    # It was the last to read the last queries, which the first had to read for their weights.
    place = queries.tiles.index(gl.maximum(steps - 1, 0) % STAGES)
    dk = dk * (operands.score.scale * LOWERED)
    backward_tiles.store(operands, place, 0, dk, operands.dk, tile, WIDTH, BLOCK_M)
    tma.store_wait(0)


@gluon.jit
def _give_back(shared, FREE: gl.constexpr, step, steps, STAGES: gl.constexpr):
    """Let the stage of a step be filled again, as far as this warpgroup is concerned.

    In a cluster each warp tells the program that fetches, but of the last ones, which are not fetched again:
    it might have ended.
    """
    if shared is None:
        barriers.arrive(FREE + step % STAGES, ALL)
    else:
        cluster.give_back(shared, step % STAGES, step + STAGES < steps)


@gluon.jit
def _as_float16(slot):
    """A slot of the exchange as what the first warpgroup hands on."""
    return reinterpret(slot, gl.float16, slot.shape, slot.layout)
