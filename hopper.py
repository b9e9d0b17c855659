"""Attention's forward pass once more, by hand in Gluon for Hopper's tensor cores. Everything works without this file.

It computes what `kernels._forward` computes, equations (1) to (4) there, and gives the same o and L: the backward pass does not
know which of the two has been. It takes 16-bit heads of 128 channels; `takes` says what else it wants.

Why a second one. A processor of an H200 does 2,048 multiply-adds in a clock, but only 16 times 2^x. A tile of 128 queries and
128 keys is 2,048 clocks of products and 1,024 of 2^x, and maximum, sum and rounding come on top. In turn, the tensor
cores would idle for more than a third of the time. Triton decides by itself what overlaps, and it does not find this. Gluon is
the same compiler with the decisions handed over: who copies, who multiplies, who waits for what, and where.

Who does what. A program has nine warps. They talk through barriers in shared memory, not through the order of instructions:

    producer   1 warp     tells the TMA unit which tile of q, k, v to fetch next, into a ring of STAGES places. It needs 24
                          registers; those it does not need go to the consumers, which hold scores and sums.
    consumers  2 x 4      64 queries each: an accumulator (64, D) and scores (64, N) in fp32 are 128 registers of every thread.
                          Both read the same k and v, so a byte from memory serves 128 queries.

A loop that did both would have to know, as it is compiled, how far copies run ahead. Here the producer runs as far ahead as
there are free places, across the end of one tile of queries into the next.

What overlaps what. In step i a consumer starts two products and waits for the first alone. The softmax of the scores that it
gave runs under the second one, which is still busy:

    tensor cores     q k_i^T  |  p v_{i-1} ...................... |  q k_{i+1}^T  |  p v_i ...
    other units               |  maximum, 2^x, sum of tile i      |               |  ...
                         wait for one                       wait for both

And while one consumer is between its waits, the other one's products run.

The fence. The assembler may move a wait for products forward over arithmetic that does not need their result. It does: then
the softmax comes after the second product, and nothing overlaps. It never moves one over a write to memory, so `_keep_order`
writes the sum of the softmax to memory, if that sum is less than -1. It never is; but the assembler cannot know.

Which tile when. As many programs as there are processors run through one list of jobs, (head, tile of queries): the next job's
q is on its way while this one ends. All tiles of one head follow each other, and share its keys in the L2 cache. Causal tiles
differ in length, and there all heads of the longest tile come first, as in `kernels`: nothing long starts last.

The edge of a sequence. A box of the TMA unit does not end where a sequence does, and what it reads of the neighbour may be
NaN. Scores can be masked; a value cannot, since 0 times NaN is NaN. So the last box is moved back until it ends where the
sequence does, and of what it shares with the box before the scores are masked:

    keys of a sequence    0           128          256       300
    boxes                 [           ][           ]
    the last one                              [           ]

A sequence with fewer keys than a box leaves no room for that. There the rows behind it are made 0 in shared memory.

Gluon has no interpreter. `python3 -m tools.check_hopper` compares all of it with float64 on a GPU, and measures it beside
cuDNN, FlashAttention-2 and kernels.py. On an H200 it is right, and as fast as cuDNN, within two hundredths, or faster wherever
a call takes longer than its launch (docs/bench/hopper_h200.json).

Which Triton. Every version has another assembler, and two of Gluon's names have changed. Triton 3.6 to 3.9 compile this file;
tests/aot_hopper.jsonl holds what each makes of it: the same products, copies and waits. But a GPU has run it with 3.6 alone,
which torch 2.11 brings; 2.13 brings 3.7. With other versions than 3.6 calls stay with kernels.py, unless HOPPER_ANY_TRITON=1
asks for this file. The check above asks by itself.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch
from torch import Tensor

try:
    import triton
    from triton.experimental import gluon
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.language.nvidia.hopper import (
        fence_async_shared,
        mbarrier,
        tma,
        warpgroup_mma,
        warpgroup_mma_wait,
    )
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    # What has another name: the first one since Triton 3.7, the second one since 3.8. Both take and do what they did before.
    thread_barrier = getattr(gl, "barrier", None) or gl.thread_barrier
    copy_box = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
except (ImportError, AttributeError):  # no Triton, or one without Gluon or with other names again
    gluon = None

# Gluon is an experiment and changes with every version of Triton. With these a GPU has run it: docs/bench/hopper_*.json.
TRITON = ("3.6.",)
ANY_TRITON = os.environ.get("HOPPER_ANY_TRITON") == "1"  # also with versions that no GPU has run it with


def constant(x):
    """What kernels may read of a module's names."""
    return gl.constexpr(x) if gluon else x


def jit(function):
    return gluon.jit(function) if gluon else function


D = constant(128)  # channels of a head
M = constant(64)  # queries of a consumer: what a group of four warps multiplies at a time
CONSUMERS = constant(2)
N = constant(128)  # keys of a tile
STAGES = constant(2)  # tiles of k and of v in shared memory: with q 160 KiB of 227
REGISTERS = constant(232)  # of a consumer's thread; the multiple of 8 that two of them and the producer can have
NEVER = constant(-1e30)  # below every score; finite, so that NEVER - NEVER is 0 and not NaN
QUERIES = 128  # of a program: M * CONSUMERS
DTYPES = (torch.bfloat16, torch.float16)
LOG2E = math.log2(math.e)


# --------------------------------------------------------------------------------------------------------------- the kernel
#
# What the arguments are called:
#
#     q_box k_box v_box                 descriptors of q, k, v as matrices (tokens, heads * D), for the TMA unit
#     O LSE                             addresses; LSE (query heads, total)
#     TILES CU_Q CU_K                   the list of kernels.tile_list; where the sequences begin, as Segments.cu
#     heads tiles group total           query heads; length of the list; query heads that share a KV head; queries of the pack
#     scale                             c = scale log2(e)
#     k_smem v_smem                     the rings, STAGES tiles each
#     k_here v_here q_here              barriers: the copy has arrived
#     k_free v_free q_free              barriers: all have read it, and the producer may overwrite it
#     count                             tiles of keys so far, over all jobs: place count % STAGES of the ring, and the
#                                       barrier's phase is the parity of count // STAGES
#     w                                 which consumer


@jit
def _job(TILES, CU_Q, CU_K, job, heads, tiles, CAUSAL: gl.constexpr):
    """Head, first query and sequence of a job; how many tiles of keys it visits, and how many of those need a mask. Tiles are
    visited from the last to the first, so the masked ones come first."""
    if CAUSAL:
        head = job % heads
        tile = job // heads
    else:
        head = job // tiles
        tile = job % tiles
    s = gl.load(TILES + 2 * tile)
    m0 = gl.load(TILES + 2 * tile + 1)
    q0 = gl.load(CU_Q + s)
    nq = gl.load(CU_Q + s + 1) - q0
    k0 = gl.load(CU_K + s)
    nk = gl.load(CU_K + s + 1) - k0
    # Keys before `whole` are read by every query of the tile, keys from `end` on by none: kernels._walk.
    whole = nk
    end = nk
    if CAUSAL:
        whole = gl.maximum(gl.minimum(nk, m0 + nk - nq + 1), 0)
        end = gl.maximum(gl.minimum(nk, m0 + M * CONSUMERS + nk - nq), 0)
    # One tile at least, and the first always masked: then queries without any key need no path of their own.
    visits = gl.maximum((end + N - 1) // N, 1)
    masked = gl.maximum(visits - whole // N, 1)
    return head, m0, q0, nq, k0, nk, visits, masked


@jit
def _first_key(visits, nk):
    """Where the box of the last tile begins: so far back that it ends with the sequence, if there is room."""
    return gl.minimum((visits - 1) * N, gl.maximum(nk - N, 0))


@jit
def _producer(
    q_box, k_box, v_box, q_smem, k_smem, v_smem, q_here, k_here, v_here, q_free, k_free, v_free,
    TILES, CU_Q, CU_K, heads, tiles, group,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """Everything that the consumers will ask for, in their order, each as soon as its place is free."""
    count = 0
    turn = 0
    for job in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, m0, q0, nq, k0, nk, visits, masked = _job(TILES, CU_Q, CU_K, job, heads, tiles, CAUSAL)
        kv_head = head // group
        for w in gl.static_range(CONSUMERS):
            # The opposite phase: a wait for the end of the use before, and at first there was none.
            mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_here.index(w), q_box.block_type.nbytes)
            copy_box(q_box, [q0 + m0 + w * M, head * D], q_here.index(w), q_smem.index(w))
        row = k0 + _first_key(visits, nk)
        for i in range(visits):
            s = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(s), phase)
            mbarrier.expect(k_here.index(s), k_box.block_type.nbytes)
            copy_box(k_box, [row, kv_head * D], k_here.index(s), k_smem.index(s))
            mbarrier.wait(v_free.index(s), phase)
            mbarrier.expect(v_here.index(s), v_box.block_type.nbytes)
            copy_box(v_box, [row, kv_head * D], v_here.index(s), v_smem.index(s))
            count += 1
            row = k0 + (visits - 2 - i) * N
        turn += 1


@jit
def _softmax(s, m, l, scale, n, begin, nk, last, MASKED: gl.constexpr, CAUSAL: gl.constexpr):
    """Equations (2) and (3) for one tile, whose columns are the keys from n on. Those before `begin` belong to the next one."""
    if MASKED:
        cols = n + gl.arange(0, N, gl.SliceLayout(0, s.type.layout))
        seen = ((cols >= begin) & (cols < nk))[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= last[:, None])
        s = gl.where(seen, s, float("-inf"))
    higher = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - higher[:, None])
    shrink = gl.exp2(m - higher)
    l = l * shrink + gl.sum(p, 1)
    return p, higher, l, shrink


@jit
def _keep_order(x):
    """x, which is never below 0. What it was computed from stays in front of whatever is waited for next."""
    # A write that never happens, to the shared memory's first word. The assembler sees only that it might.
    return gl.inline_asm_elementwise(
        """
        {
            .reg .pred below;
            .reg .b32 at;
            mov.u32 at, 0;
            setp.lt.f32 below, $2, 0fBF800000;
            @below st.volatile.shared.f32 [at], $2;
            mov.b32 $0, $2;
            mov.b32 $1, $3;
        }
        """,
        "=f,=f,f,f",
        [x],
        dtype=gl.float32,
        is_pure=False,
        pack=2,
    )


@jit
def _step(
    acc, pb, m, l, count, n, nk, last, scale, zero, q_smem, k_smem, v_smem, k_here, v_here, k_free, v_free,
    MASKED: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """q k^T of tile `count` and p v of the one before; the softmax of this one runs under the latter."""
    b = count % STAGES
    a = (count - 1) % STAGES
    mbarrier.wait(k_here.index(b), (count // STAGES) & 1)
    s = warpgroup_mma(q_smem, k_smem.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
    mbarrier.wait(v_here.index(a), ((count - 1) // STAGES) & 1)
    acc = warpgroup_mma(pb, v_smem.index(a), acc, is_async=True)
    # At most one product on its way: the scores are there, p v may still run.
    s = warpgroup_mma_wait(1, [s])
    mbarrier.arrive(k_free.index(b))
    p, m, l, shrink = _softmax(s, m, l, scale, n, n, nk, last, MASKED, CAUSAL)
    l = _keep_order(l)
    pb_next = gl.convert_layout(p.to(pb.dtype), pb.type.layout)
    # The old p is named here, too, so that its registers stay untouched until the product has read them.
    acc, pb, pb_next = warpgroup_mma_wait(0, [acc, pb, pb_next])
    mbarrier.arrive(v_free.index(a))
    # The sum holds tiles up to the one before; its scale is now that of this one.
    acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, acc.type.layout))[:, None]
    return acc, pb_next, m, l


@jit
def _erase(v, nk):
    """Rows of a tile of values in shared memory from nk on become zeros. Both consumers do it, and write the same."""
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    rows = gl.arange(0, N, gl.SliceLayout(1, ROWS))
    kept = gl.where((rows < nk)[:, None], v.load(ROWS), 0.0)
    v.store(kept.to(v.dtype))
    # Tensor cores read by another road than threads write. Each thread opens it for what it wrote, then all wait for all.
    fence_async_shared()
    thread_barrier()


@jit
def _consumer(
    q_smem, k_smem, v_smem, q_here, k_here, v_here, q_free, k_free, v_free,
    O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale,
    w: gl.constexpr,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """M queries of every job."""
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, N, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    ROW: gl.constexpr = gl.SliceLayout(1, S)
    # Sixteen bytes of a row in one thread: whole sectors of 32 bytes are written at a time.
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    zero = gl.zeros([M, N], gl.float32, S)
    count = 0
    turn = 0
    for job in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, m0, q0, nq, k0, nk, visits, masked = _job(TILES, CU_Q, CU_K, job, heads, tiles, CAUSAL)
        first = m0 + w * M
        last = first + gl.arange(0, M, ROW) + (nk - nq)
        m = gl.full([M], NEVER, gl.float32, ROW)
        l = gl.zeros([M], gl.float32, ROW)
        acc = gl.zeros([M, D], gl.float32, A)

        # The first tile has no product to run under.
        mbarrier.wait(q_here, turn & 1)
        mbarrier.wait(k_here.index(count % STAGES), (count // STAGES) & 1)
        s = warpgroup_mma(q_smem, k_smem.index(count % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(0, [s])
        mbarrier.arrive(k_free.index(count % STAGES))
        n = (visits - 1) * N
        p, m, l, shrink = _softmax(s, m, l, scale, _first_key(visits, nk), n, nk, last, True, CAUSAL)
        pb = gl.convert_layout(p.to(q_smem.dtype), P)
        count += 1

        for i in range(1, masked):
            acc, pb, m, l = _step(
                acc, pb, m, l, count, n - i * N, nk, last, scale, zero,
                q_smem, k_smem, v_smem, k_here, v_here, k_free, v_free,
                True, CAUSAL,
            )  # fmt: skip
            count += 1
        for i in range(masked, visits):
            acc, pb, m, l = _step(
                acc, pb, m, l, count, n - i * N, nk, last, scale, zero,
                q_smem, k_smem, v_smem, k_here, v_here, k_free, v_free,
                False, CAUSAL,
            )  # fmt: skip
            count += 1
        mbarrier.arrive(q_free)

        # What is left is p v of the tile visited last, which is the only one if the sequence is shorter than a box.
        a = (count - 1) % STAGES
        mbarrier.wait(v_here.index(a), ((count - 1) // STAGES) & 1)
        if nk < N:
            _erase(v_smem.index(a), nk)
        acc = warpgroup_mma(pb, v_smem.index(a), acc, is_async=True)
        acc, pb = warpgroup_mma_wait(0, [acc, pb])
        mbarrier.arrive(v_free.index(a))
        turn += 1

        # A query that read no key has l = 0: its o is 0, its L +inf, as kernels._forward has it.
        none = l == 0.0
        share = gl.convert_layout(1.0 / gl.where(none, 1.0, l), gl.SliceLayout(1, A))
        o = gl.convert_layout((acc * share[:, None]).to(q_smem.dtype), OUT)
        rows = gl.arange(0, M, gl.SliceLayout(1, OUT))
        dims = gl.arange(0, D, gl.SliceLayout(0, OUT))
        begin = O + (q0 + first).to(gl.int64) * so + head * D
        gl.store(begin + (rows[:, None] * so + dims[None, :]), o, mask=(rows < nq - first)[:, None])
        r = gl.arange(0, M, ROW)
        lse = gl.where(none, float("inf"), m + gl.log2(l))
        gl.store(LSE + head * total + q0 + first + r, lse, mask=r < nq - first)


# How many jobs there are changes from call to call: none of these is worth a compilation of its own where it happens to be 1
# or a multiple of 16.
def _compiled_once(function):
    return gluon.jit(function, do_not_specialize=["total", "heads", "tiles", "group"]) if gluon else function


@_compiled_once
def _forward(
    q_box, k_box, v_box, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, group, scale,
    CAUSAL: gl.constexpr,
):  # fmt: skip
    """As many programs as there are processors, each of which takes every so-manieth job."""
    q_smem = gl.allocate_shared_memory(q_box.dtype, [CONSUMERS, M, D], q_box.layout)
    k_smem = gl.allocate_shared_memory(q_box.dtype, [STAGES, N, D], k_box.layout)
    v_smem = gl.allocate_shared_memory(q_box.dtype, [STAGES, N, D], v_box.layout)
    q_here = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [CONSUMERS, 1], mbarrier.MBarrierLayout())
    k_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_here = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(CONSUMERS):
        mbarrier.init(q_here.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_here.index(i), count=1)
        mbarrier.init(v_here.index(i), count=1)
        # Both consumers have to be done with a tile.
        mbarrier.init(k_free.index(i), count=CONSUMERS)
        mbarrier.init(v_free.index(i), count=CONSUMERS)
    fence_async_shared()
    gl.warp_specialize(
        [
            (_consumer, (
                q_smem.index(0), k_smem, v_smem, q_here.index(0), k_here, v_here, q_free.index(0), k_free, v_free,
                O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale,
                0, CAUSAL,
            )),
            (_consumer, (
                q_smem.index(1), k_smem, v_smem, q_here.index(1), k_here, v_here, q_free.index(1), k_free, v_free,
                O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale,
                1, CAUSAL,
            )),
            (_producer, (
                q_box, k_box, v_box, q_smem, k_smem, v_smem, q_here, k_here, v_here, q_free, k_free, v_free,
                TILES, CU_Q, CU_K, heads, tiles, group,
                CAUSAL,
            )),
        ],
        [4, 1],
        [REGISTERS, 24],
    )  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- its launch


def takes(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `forward` can do this call. Whatever it cannot do, kernels.forward can."""
    if gluon is None or triton.knobs.runtime.interpret:
        return False
    if not triton.__version__.startswith(TRITON) and not ANY_TRITON:
        return False
    if not q.is_cuda or q.dtype not in DTYPES or _capability(q.device) != (9, 0):
        return False
    return fits(q) and fits(k) and fits(v)


def fits(x: Tensor) -> bool:
    """Whether the TMA unit can read x (N, heads, 128) as a matrix (N, heads * 128): heads side by side, also as a slice of a
    joint projection. It counts in steps of 16 bytes."""
    n, heads, dim = x.shape
    row, head, channel = x.stride()
    side_by_side = channel == 1 and (heads == 1 or head == dim)
    return n > 0 and dim == 128 and side_by_side and row > 0 and row % 8 == 0 and x.data_ptr() % 16 == 0


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def layout(rows: int, dtype: torch.dtype):
    """How a tile lies in shared memory: as the tensor cores want to read it."""
    element = gl.bfloat16 if dtype == torch.bfloat16 else gl.float16
    return gl.NVMMASharedLayout.get_default_for([rows, 128], element)


def _box(x: Tensor, rows: int) -> TensorDescriptor:
    n, heads, dim = x.shape
    # Only the address, sizes and steps count: the tensor itself keeps its shape.
    return TensorDescriptor(x, [n, heads * dim], [x.stride(0), 1], [rows, dim], layout(rows, x.dtype))


def forward(q: Tensor, k: Tensor, v: Tensor, tiles: Tensor, call) -> tuple[Tensor, Tensor]:
    """o (Nq, Hq, 128) and L (Hq, Nq), for what `takes` takes. tiles: kernels.tile_list of QUERIES; call: kernels.Call."""
    total, heads, dim = q.shape
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = q.new_empty(heads, total, dtype=torch.float32)
    programs = min(heads * len(tiles), _processors(q.device))
    with torch.cuda.device_of(q):
        _forward[(programs,)](
            _box(q, M.value), _box(k, N.value), _box(v, N.value), o, lse,
            tiles, call.queries.cu, call.keys.cu,
            heads * dim, total, heads, len(tiles), heads // k.shape[1],
            call.scale * LOG2E,
            CAUSAL=call.causal,
            num_warps=4,
        )  # fmt: skip
    return o, lse
