"""The backward pass on Hopper: one warp fetches, two warpgroups hold 64 keys each and sweep the queries.

All is held transposed, keys by queries, so that P and dS go from registers into the products that dV and dK
are made of. dQ is made of all keys: the two warpgroups exchange dS through shared memory, each computes half
of the tile's dQ, and adds it to memory, in float32.

    fetcher      K  Q0     V  dO0      Q1 dO1     Q2 dO2 ...      a stage is fetched again once
                 |  |      |  |        |  |                       both warpgroups have given it back
    warpgroup    ┌ S=KQ0 ──┘──┘        |  |    asynchronous
                 └ dP=V dO0, -delta    |  |    asynchronous       starts at -delta, so that it is dP-delta
                 P=exp(S-LSE)          |  |    beside dP
                 ┌ dV+=P dO0           |  |    asynchronous
                 │ dS=P dP             |  |    beside dV
                 │ dS to the exchange, wait until the other one's is there
                 │ ┌ dQ=dS^T K         |  |    asynchronous
                 │ │ ┌ dK+=dS Q0       |  |    asynchronous
                 └─│─│ give dO0 back   |  |
                   └─│ dQ to staging   |  |                       from there a warp sends it to memory
                     └ give Q0 back    |  |
                 S=KQ1 ────────────────┘  |
                 ...
                 dV, dK * softmax_scale through the tiles of V and K to memory
    sender       say that its slot is free, wait until dQ is there, have the TMA unit add it to memory

Under a causal mask the first query tile of 64 sees no key of the second warpgroup, which then puts zeros into
the exchange, and helps with dQ alone.

Two programs of neighbouring key tiles may form a cluster, in which one fetches Q, with LSE, and the other one
dO, with delta, for both (``fap_kernels.hopper.cluster``). Then a warp of its own passes on what is given
back. Both sweep all queries that see a key of either, so the first ones may see none of the second one's.

The exchange has two slots. A warpgroup writes a slot again two steps later; the other one has then come to
the meeting of the step between, and so has retired the dQ that it read the slot for. Staging has two slots
as well, and a warp for each, which comes to the meeting of its next step once the slot is free again.

dQ is summed up by the memory system; ``fap_kernels.hopper.query_grads`` brings it to its place. Its tiles lie
in memory as the registers hold them, 16 bytes a thread, since a sum does not mind. The order of additions is
free or, with counters, fixed, or free once the first one has stored: ``fap_kernels.hopper.order`` says how,
and why no program waits forever. In the last case all sweep the queries downwards: under a causal mask the
first key tile, for which the others wait, would come last to those that the last ones start with.
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

from ..backward.step import products_grad
from ..language import grid, rows, scores
from ..launch import UNSPECIALIZED
from . import backward_tiles, backward_work, barriers, cluster, order, ring, work
from .backward_tiles import BARRIERS, DELTA, DOUTS, LSE, NUMBERS, QUERIES, ROWS, THREADS, WITH_ANOTHER
from .compat import barrier, tma_add, tma_store

KERNEL = gl.constexpr("hopper_backward_kernel")


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_backward_kernel(
    q_part0, k_part0, v_part0, dout_part0, dk_part0, dv_part0, lse_part0, delta_part0, dq_acc_part0,
    additions, heads_beside, rows_padded, alibi_slopes, alibi_stride,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots,
    nheads, group, seqlen_q, seqlen_k, items, window_left, window_right, softmax_scale, softcap,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr, FOLD_SCALE: gl.constexpr, FOUNDED: gl.constexpr, CLUSTER: gl.constexpr,
):  # fmt: skip
    """Write ``dk`` and ``dv`` of a key tile and add what it contributes to ``dq_acc``.

    ``dq_acc`` is zeros at first. With ``additions``, which are zeros then, it may be anything: the first one
    stores, and all add in the same order on every run, or ``FOUNDED`` in any order once that is there.

    Grid: one program a key tile, numbered as :func:`fap_kernels.hopper.backward_work.key_tile_of` says. With
    ``CLUSTER`` two of neighbouring numbers have neighbouring key tiles, and sweep the same queries.
    """
    call = work.Call(
        cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, entries, slots, nheads, group, seqlen_q, seqlen_k,
        window_left, window_right, items, heads_beside, None, True if CLUSTER else None,
    )  # fmt: skip
    score = scores.Scores(softmax_scale, softmax_scale if FOLD_SCALE else None, softcap, alibi_slopes)
    q_shared, dout_shared = None, None
    if CLUSTER:
        # A warp of each program says what is free.
        room = backward_tiles.make_shared_tiles(q_part0, k_part0, lse_part0, STAGES, 2)
        TILE: gl.constexpr = k_part0.block_type.nbytes
        q_shared = cluster.Shared(0, 2 * TILE, BARRIERS, BARRIERS + cluster.EMPTY, 0)
        SECOND: gl.constexpr = BARRIERS + cluster.BARRIERS[0]
        dout_shared = cluster.Shared(0, 3 * TILE, SECOND, SECOND + cluster.EMPTY, 1)
    else:
        room = backward_tiles.make_tiles(
            q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0, STAGES
        )
    SWIZZLED: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    exchange = gl.allocate_shared_memory(dk_part0.dtype, [2, BLOCK_N, BLOCK_M], SWIZZLED)
    staging = gl.allocate_shared_memory(gl.float32, [2] + dq_acc_part0.block_shape, dq_acc_part0.layout)
    fence_async_shared()
    operands = backward_tiles.Operands(
        call, score, q_shared, dout_shared, alibi_stride, room.queries, room.douts, room.k, room.v,
        room.k_full, room.v_full, None, None, exchange, staging, dk_part0, dv_part0, None, dq_acc_part0,
        None, None, additions, True if FOUNDED else None, rows_padded,
    )  # fmt: skip
    parts = (q_part0, k_part0, v_part0, dout_part0, lse_part0, delta_part0)
    # As in fap_kernels.hopper.forward: warps of the other functions, and registers of their threads.
    if CLUSTER:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_multiply, (1, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_fetch, (operands, parts, BLOCK_M, BLOCK_N, STAGES, PADDING)),
                (_send, (0, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
                (_send, (1, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
                (_say_what_is_free, (operands, BLOCK_M, BLOCK_N, STAGES)),
            ],
            [4, 1, 1, 1, 1],
            [240, 24, 24, 24, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_multiply, (0, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_multiply, (1, operands, WIDTH, BLOCK_M, BLOCK_N, STAGES)),
                (_fetch, (operands, parts, BLOCK_M, BLOCK_N, STAGES, PADDING)),
                (_send, (0, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
                (_send, (1, operands, WIDTH, BLOCK_M, BLOCK_N, PADDING)),
            ],
            [4, 1, 1, 1],
            [240, 24, 24, 24],
        )


@gluon.jit
def _fetch(
    operands, parts, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    PADDING: gl.constexpr,
):  # fmt: skip
    """Fetch the key tile, and fill the rings in the order in which the warpgroups empty them."""
    call = operands.call
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    q_packed = tile.q_start if call.cu_seqlens_q is not None else None
    q_rows = rows.Rows(None, None, parts[0], None, tile.q_batch, q_packed, tile.seqlen_q, None)
    dout_rows = rows.Rows(None, None, parts[3], None, tile.q_batch, q_packed, tile.seqlen_q, None)
    steps = call.group * sweep.count
    backward_tiles.begin(operands, True)
    if steps > 0:
        backward_tiles.fill_keys(
            operands, operands.k_full, backward_tiles.keys_of(operands, 0), parts[1], tile
        )
    grid.wait_for_previous()
    for step in range(steps):
        member, number = step // sweep.count, step % sweep.count
        head = tile.head_k * call.group + member
        first_query = backward_tiles.first_query_of(operands, sweep, number, BLOCK_M)
        position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
        _fill(
            operands.queries, operands.q_shared, barriers.QUERIES_FREE, step, q_rows, head, first_query,
            cluster.Vector(parts[4], position, NUMBERS), QUERIES, LSE, STAGES,
        )  # fmt: skip
        if step == 0:
            backward_tiles.fill_keys(
                operands, operands.v_full, backward_tiles.values_of(operands, step), parts[2], tile
            )
        _fill(
            operands.douts, operands.dout_shared, barriers.DOUTS_FREE, step, dout_rows, head, first_query,
            cluster.Vector(parts[5], position, NUMBERS + STAGES * parts[4].block_type.nbytes), DOUTS, DELTA,
            STAGES,
        )  # fmt: skip


@gluon.jit
def _fill(
    numbered, shared, FREE: gl.constexpr, step, of_rows, head, first_query, vector, MAP: gl.constexpr,
    VECTOR_MAP: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Fetch a step's tile and its numbers once its stage is free; in a cluster for both programs, or neither.

    Args:
        FREE: the first of the barriers that tell of free stages, where no other program has a say.
        vector: the :class:`cluster.Vector` of its numbers.
        MAP, VECTOR_MAP: which of the kernel's parameters their tensor maps are.
    """
    stage = step % STAGES
    if shared is None:
        if step >= STAGES:
            barriers.meet(FREE + stage, WITH_ANOTHER)
        ring.fill_numbered(numbered, stage, of_rows, head, first_query, vector.descriptor, vector.position)
    else:
        place = ring.coordinates_of(of_rows, head, first_query)
        phase = step // STAGES & 1
        cluster.fill(shared, stage, phase, of_rows.part0, MAP, KERNEL, place, vector, VECTOR_MAP)


@gluon.jit
def _say_what_is_free(operands, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Tell the cluster's program that fetches them which stages this one's warpgroups have given back.

    The last ones are not fetched again.
    """
    backward_tiles.begin(operands, True)
    _, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    for step in range(operands.call.group * sweep.count - STAGES):
        stage = step % STAGES
        barriers.meet(barriers.DOUTS_FREE + stage, WITH_ANOTHER)
        cluster.give_back(operands.dout_shared, stage)
        barriers.meet(barriers.QUERIES_FREE + stage, WITH_ANOTHER)
        cluster.give_back(operands.q_shared, stage)


@gluon.jit
def _send(
    SLOT: gl.constexpr, operands, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    PADDING: gl.constexpr,
):  # fmt: skip
    """Have the TMA unit add every second tile of dQ to memory, from its slot of the staging memory."""
    call = operands.call
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    backward_tiles.begin(operands, False)
    place = operands.staging.index(SLOT)
    LINE: gl.constexpr = operands.dq_acc.block_shape[1]
    grid.wait_for_previous()
    for step in range(SLOT, call.group * sweep.count, 2):
        member, number = step // sweep.count, step % sweep.count
        head = tile.head_k * call.group + member
        first_query = backward_tiles.first_query_of(operands, sweep, number, BLOCK_M)
        position = backward_work.vector_position(call, tile, head, first_query, operands.rows_padded, PADDING)
        barriers.arrive(barriers.EXCHANGE + SLOT, WITH_ANOTHER)
        coordinates = [position // (LINE // WIDTH), 0]
        if operands.additions is not None:
            counter = operands.additions + position // ROWS
            if operands.founded is None:
                before = backward_work.tiles_after(call, tile, first_query, BLOCK_M, BLOCK_N)
            else:
                before = gl.minimum(backward_work.tiles_before(call, tile, first_query, BLOCK_N), 1)
            order.wait_for(counter, before)
            barriers.meet(barriers.DQ_STAGED + SLOT, WITH_ANOTHER)
            if before == 0:
                tma_store(operands.dq_acc, coordinates, place)
            else:
                tma_add(operands.dq_acc, coordinates, place)
            if operands.founded is None or before == 0:
                order.count_when_added(counter)
            else:
                tma.store_wait(0)
        else:
            barriers.meet(barriers.DQ_STAGED + SLOT, WITH_ANOTHER)
            tma_add(operands.dq_acc, coordinates, place)
            tma.store_wait(0)


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, operands, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Compute the gradients of 64 keys and values, and half of each tile of dQ."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    tile, sweep = backward_tiles.work_of(operands, BLOCK_M, BLOCK_N)
    backward_tiles.begin(operands, False)
    dk = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    dv = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    mbarrier.wait(operands.k_full, 0, pred=sweep.count > 0)
    mbarrier.wait(operands.v_full, 0, pred=sweep.count > 0)
    first_key = tile.first_key + WARPGROUP * ROWS
    sweep = backward_work.own_sweep_of(operands.call, tile, sweep, first_key, ROWS, BLOCK_M)
    # The first query tiles see keys of the first warpgroup, or they would not be visited; in a cluster, those
    # of its first program.
    FIRST: gl.constexpr = WARPGROUP == 0 and operands.q_shared is None
    HIDDEN_STEP: gl.constexpr = None if FIRST else _hidden_step
    dk, dv = backward_tiles.sweep_queries(
        _step, HIDDEN_STEP, WARPGROUP, operands, tile, sweep, (dk, dv), WIDTH, BLOCK_M, BLOCK_N, STAGES
    )
    # Both have retired all their products: the tiles are no longer needed.
    barriers.meet(barriers.EXCHANGE, THREADS)
    backward_tiles.store(
        operands, backward_tiles.values_of(operands, 0), WARPGROUP, dv, operands.dv, tile, WIDTH, BLOCK_N
    )
    dk = dk * operands.score.scale
    backward_tiles.store(
        operands, backward_tiles.keys_of(operands, 0), WARPGROUP, dk, operands.dk, tile, WIDTH, BLOCK_N
    )
    tma.store_wait(0)


@gluon.jit
def _step(
    WARPGROUP: gl.constexpr, operands, tile, sweep, member, number, gradients,
    WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    MASKED: gl.constexpr,
):  # fmt: skip
    """Take in a query tile of a head, the ``member``-th of its group; see the module's docstring.

    It is number ``number`` of those that the sweep comes to, from above if it goes downwards.
    """
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S)
    dk, dv = gradients
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    queries, douts = operands.queries, operands.douts
    call = operands.call
    step = member * sweep.count + number
    stage, phase = step % STAGES, step // STAGES & 1
    head = tile.head_k * call.group + member
    first_query = backward_tiles.first_query_of(operands, sweep, number, BLOCK_M)
    k = ring.matrix(backward_tiles.keys_of(operands, 0), BLOCK_N, WIDTH).slice(WARPGROUP * ROWS, ROWS, 0)
    v = ring.matrix(backward_tiles.values_of(operands, step), BLOCK_N, WIDTH).slice(WARPGROUP * ROWS, ROWS, 0)
    q = ring.matrix(queries.tiles.index(stage), BLOCK_M, WIDTH)
    dout = ring.matrix(douts.tiles.index(stage), BLOCK_M, WIDTH)
    zeros = gl.zeros([ROWS, BLOCK_M], gl.float32, S)

    # The vectors are loaded before the first product starts, or the assembler waits for it at once (C7517).
    mbarrier.wait(queries.full.index(stage), phase)
    row_lse = queries.numbers.index(stage).load(COLUMN)
    mbarrier.wait(douts.full.index(stage), phase)
    less_delta, _ = gl.broadcast(douts.numbers.index(stage).load(COLUMN)[None, :], zeros)
    if operands.founded is not None:
        # Downwards the loop without a mask comes first. There the assembler would copy them to where dP
        # starts after S has, and let the products wait for each other (C7517); an opaque copy keeps it here.
        less_delta = gl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=f,f", [less_delta], gl.float32, is_pure=False, pack=1
        )
    # Once a step the warps of a warpgroup meet, which Triton would have them do before they store dS. Here it
    # is better: they begin the products together.
    barrier()
    s = warpgroup_mma(k, q.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if MASKED:  # a mask needs the registers in which the products would wait for each other
        s = warpgroup_mma_wait(0, [s])
    dp = warpgroup_mma(v, dout.permute([1, 0]), less_delta, is_async=True)
    if not MASKED:
        s = warpgroup_mma_wait(1, [s])

    first_key = tile.first_key + WARPGROUP * ROWS
    weights = backward_tiles.weigh(operands, tile, head, first_query, first_key, s, row_lse, BLOCK_M, MASKED)
    p = gl.convert_layout(weights.to(operands.dk.dtype), WEIGHTS, assert_trivial=True)
    dv = warpgroup_mma(p, dout, dv, is_async=True)
    dp = warpgroup_mma_wait(1, [dp])
    # dP holds delta already, and its products are those of S.
    ds = products_grad(head, s, weights, dp, 0.0, None, None, operands.score, None).to(operands.dk.dtype)

    dq = _exchange(WARPGROUP, operands, step, ds, WIDTH, BLOCK_M, BLOCK_N)
    ds = gl.convert_layout(ds, WEIGHTS, assert_trivial=True)
    dk = warpgroup_mma(ds, q, dk, is_async=True)
    dv, p = warpgroup_mma_wait(2, [dv, p])
    barriers.arrive(barriers.DOUTS_FREE + stage, WITH_ANOTHER)
    dq = warpgroup_mma_wait(1, [dq])
    _stage(WARPGROUP, operands, step, dq)
    dk, ds = warpgroup_mma_wait(0, [dk, ds])
    barriers.arrive(barriers.QUERIES_FREE + stage, WITH_ANOTHER)
    return dk, dv


@gluon.jit
def _hidden_step(
    WARPGROUP: gl.constexpr, operands, step, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Leave a query tile that sees none of the warpgroup's keys to the other one, and help it with dQ."""
    S: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    stage, phase = step % STAGES, step // STAGES & 1
    # To give a stage back before it is filled would be taken for giving back what it held before.
    mbarrier.wait(operands.queries.full.index(stage), phase)
    mbarrier.wait(operands.douts.full.index(stage), phase)
    barriers.arrive(barriers.DOUTS_FREE + stage, WITH_ANOTHER)
    barriers.arrive(barriers.QUERIES_FREE + stage, WITH_ANOTHER)
    no_ds = gl.zeros([ROWS, BLOCK_M], operands.dk.dtype, S)
    dq = _exchange(WARPGROUP, operands, step, no_ds, WIDTH, BLOCK_M, BLOCK_N)
    dq = warpgroup_mma_wait(0, [dq])
    _stage(WARPGROUP, operands, step, dq)


@gluon.jit
def _exchange(
    WARPGROUP: gl.constexpr, operands, step, ds, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Exchange dS with the other warpgroup, and start on half of the tile's dQ."""
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    slot = operands.exchange.index(step % 2)
    slot.slice(WARPGROUP * ROWS, ROWS, 0).store(ds)
    fence_async_shared()
    barriers.meet(barriers.EXCHANGE + step % 2, WITH_ANOTHER)
    all_keys = ring.matrix(backward_tiles.keys_of(operands, 0), BLOCK_N, WIDTH)
    no_dq = gl.zeros([ROWS, ROWS], gl.float32, HALF)
    if BLOCK_M == ROWS:  # halves of the columns
        half_dot = slot.permute([1, 0])
        half_keys = all_keys.slice(WARPGROUP * ROWS, ROWS, 1)
    else:  # halves of the queries
        half_dot = slot.slice(WARPGROUP * ROWS, ROWS, 1).permute([1, 0])
        half_keys = all_keys
    return warpgroup_mma(half_dot, half_keys, no_dq, use_acc=False, is_async=True)


@gluon.jit
def _stage(WARPGROUP: gl.constexpr, operands, step, dq):
    """Leave half of a tile of dQ to the warp that sends it."""
    HEIGHT: gl.constexpr = operands.dq_acc.block_shape[0] // 2
    place = operands.staging.index(step % 2).slice(WARPGROUP * HEIGHT, HEIGHT, 0)
    place.store(backward_tiles.as_registers_hold_it(dq))
    fence_async_shared()
    barriers.arrive(barriers.DQ_STAGED + step % 2, WITH_ANOTHER)
