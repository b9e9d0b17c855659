"""Attention forward in Gluon for Hopper: a trial of several variants, each in a process of its own.

    python tools/gluon_trial.py compile          anywhere with Triton 3.6: registers, spills and shared memory of every variant
    python tools/gluon_trial.py run              on a Hopper GPU: errors against float64 and milliseconds beside the peers
"""

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from pathlib import Path

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma, warpgroup_mma_wait

NEVER = gl.constexpr(-1e30)


@gluon.jit
def _keep_order(x, FENCE: gl.constexpr):
    """x, unchanged. What was computed for it stays in front of what follows, and the assembler cannot tell that it need not."""
    # The assembler is free to move a wait for products in front of arithmetic that does not need it, and does. It does not
    # move it over memory writes (1) or branches (2). Neither ever happens: x is a sum of exponentials and not negative.
    if FENCE == 1:
        x = gl.inline_asm_elementwise(
            "{ .reg .pred p; .reg .b32 a; mov.u32 a, 0; setp.lt.f32 p, $2, 0fBF800000; @p st.volatile.shared.f32 [a], $2; mov.b32 $0, $2; mov.b32 $1, $3; }",
            "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2,
        )
    elif FENCE == 2:
        x = gl.inline_asm_elementwise(
            "{ .reg .pred p; setp.lt.f32 p, $2, 0fBF800000; @!p bra.uni on; trap; on: mov.b32 $0, $2; mov.b32 $1, $3; }",
            "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2,
        )
    return x


@gluon.jit
def _turn_wait(x, w: gl.constexpr):
    """Wait until it is group w's turn at the tensor cores. x passes through, only so that there is one call for each thread."""
    if w == 0:
        return gl.inline_asm_elementwise("bar.sync 8, 256; mov.b32 $0, $2; mov.b32 $1, $3;", "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise("bar.sync 9, 256; mov.b32 $0, $2; mov.b32 $1, $3;", "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def _turn_pass(x, w: gl.constexpr):
    """Give the turn to the other group."""
    if w == 0:
        return gl.inline_asm_elementwise("bar.arrive 9, 256; mov.b32 $0, $2; mov.b32 $1, $3;", "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)
    else:
        return gl.inline_asm_elementwise("bar.arrive 8, 256; mov.b32 $0, $2; mov.b32 $1, $3;", "=f,=f,f,f", [x], dtype=gl.float32, is_pure=False, pack=2)


@gluon.jit
def _job(TILES, CU_Q, CU_K, job, heads, tiles, QUERIES: gl.constexpr, BN: gl.constexpr, CAUSAL: gl.constexpr, HEADS_FIRST: gl.constexpr):
    """Which head and tile; how many tiles of keys it walks over, from the last to the first, and how many of those are masked."""
    if HEADS_FIRST:
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
    whole = nk
    end = nk
    if CAUSAL:
        whole = gl.maximum(gl.minimum(nk, m0 + nk - nq + 1), 0)
        end = gl.maximum(gl.minimum(nk, m0 + QUERIES + nk - nq), 0)
    # One tile at least, and the first one visited always counts as masked: a query without keys needs no other path then.
    n_tiles = gl.maximum((end + BN - 1) // BN, 1)
    n_masked = gl.maximum(n_tiles - whole // BN, 1)
    return head, m0, q0, nq, k0, nk, n_tiles, n_masked


@gluon.jit
def _producer(
    q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bar, k_bar, v_bar, q_free, k_free, v_free, TILES, CU_Q, CU_K, heads, tiles, group,
    GROUPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HEADS_FIRST: gl.constexpr,
):
    count = 0
    turn = 0
    for job in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, m0, q0, nq, k0, nk, n_tiles, n_masked = _job(TILES, CU_Q, CU_K, job, heads, tiles, GROUPS * BM, BN, CAUSAL, HEADS_FIRST)
        kv_head = head // group
        for w in gl.static_range(GROUPS):
            mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_bar.index(w), q_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(q_desc, [q0 + m0 + w * BM, head * D], q_bar.index(w), q_smem.index(w))
        for i in range(n_tiles):
            n = k0 + (n_tiles - 1 - i) * BN
            s = count % STAGES
            phase = ((count // STAGES) & 1) ^ 1
            mbarrier.wait(k_free.index(s), phase)
            mbarrier.expect(k_bar.index(s), k_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(k_desc, [n, kv_head * D], k_bar.index(s), k_smem.index(s))
            mbarrier.wait(v_free.index(s), phase)
            mbarrier.expect(v_bar.index(s), v_desc.block_type.nbytes)
            tma.async_copy_global_to_shared(v_desc, [n, kv_head * D], v_bar.index(s), v_smem.index(s))
            count += 1
        turn += 1


@gluon.jit
def _softmax(s, m, l, scale, n, nk, last, MASKED: gl.constexpr, CAUSAL: gl.constexpr, BN: gl.constexpr):
    if MASKED:
        cols = n + gl.arange(0, BN, gl.SliceLayout(0, s.type.layout))
        seen = (cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (cols[None, :] <= last[:, None])
        s = gl.where(seen, s, float("-inf"))
    higher = gl.maximum(m, gl.max(s, 1) * scale)
    p = gl.exp2(s * scale - higher[:, None])
    shrink = gl.exp2(m - higher)
    l = l * shrink + gl.sum(p, 1)
    return p, higher, l, shrink


@gluon.jit
def _step(
    acc, pb, m, l, shrink, count, n, nk, last, scale, zero, q, k_smem, v_smem, k_bar, v_bar, k_free, v_free,
    w: gl.constexpr, MASKED: gl.constexpr, CAUSAL: gl.constexpr, BN: gl.constexpr, STAGES: gl.constexpr, PINGPONG: gl.constexpr, FENCE: gl.constexpr, LATE: gl.constexpr, P: gl.constexpr, A: gl.constexpr,
):
    """q k^T of tile `count` and p v of the one before, the softmax of this one under the latter."""
    b = count % STAGES
    a = (count - 1) % STAGES
    mbarrier.wait(k_bar.index(b), (count // STAGES) & 1)
    if PINGPONG:
        l = _turn_wait(l, w)
    s_next = warpgroup_mma(q, k_smem.index(b).permute((1, 0)), zero, use_acc=False, is_async=True)
    if LATE:  # while q k^T is on its way
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    mbarrier.wait(v_bar.index(a), ((count - 1) // STAGES) & 1)
    acc_next = warpgroup_mma(pb, v_smem.index(a), acc, is_async=True)
    if PINGPONG:
        l = _turn_pass(l, w)
    s = warpgroup_mma_wait(1, [s_next])
    mbarrier.arrive(k_free.index(b))
    p, m, l, shrink = _softmax(s, m, l, scale, n, nk, last, MASKED, CAUSAL, BN)
    l = _keep_order(l, FENCE)
    pb_next = gl.convert_layout(p.to(gl.bfloat16), P)
    acc, old, pb_next = warpgroup_mma_wait(0, [acc_next, pb, pb_next])
    mbarrier.arrive(v_free.index(a))
    if not LATE:
        acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
    return acc, pb_next, m, l, shrink


@gluon.jit
def _consumer(
    q_smem, k_smem, v_smem, q_bar, k_bar, v_bar, q_free, k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale,
    w: gl.constexpr, GROUPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr,
    HEADS_FIRST: gl.constexpr, PINGPONG: gl.constexpr, FENCE: gl.constexpr, LATE: gl.constexpr,
):
    S: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, BN, 16])
    A: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    P: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=A, k_width=2)
    row: gl.constexpr = gl.SliceLayout(1, S)
    # Sixteen bytes of a row in one thread: whole sectors of 32 bytes are written at a time.
    OUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    zero = gl.zeros([BM, BN], gl.float32, S)
    if PINGPONG and w == 1:
        _turn_pass(gl.zeros([BM], gl.float32, row), w)  # the other group begins
    count = 0
    turn = 0
    for job in range(gl.program_id(0), heads * tiles, gl.num_programs(0)):
        head, m0, q0, nq, k0, nk, n_tiles, n_masked = _job(TILES, CU_Q, CU_K, job, heads, tiles, GROUPS * BM, BN, CAUSAL, HEADS_FIRST)
        first = m0 + w * BM
        last = first + gl.arange(0, BM, row) + (nk - nq)
        m = gl.full([BM], NEVER, gl.float32, row)
        l = gl.zeros([BM], gl.float32, row)
        acc = gl.zeros([BM, D], gl.float32, A)

        mbarrier.wait(q_bar, turn & 1)
        mbarrier.wait(k_bar.index(count % STAGES), (count // STAGES) & 1)
        if PINGPONG:
            l = _turn_wait(l, w)
        s_next = warpgroup_mma(q_smem, k_smem.index(count % STAGES).permute((1, 0)), zero, use_acc=False, is_async=True)
        if PINGPONG:
            l = _turn_pass(l, w)
        s = warpgroup_mma_wait(0, [s_next])
        mbarrier.arrive(k_free.index(count % STAGES))
        n = (n_tiles - 1) * BN
        p, m, l, shrink = _softmax(s, m, l, scale, n, nk, last, True, CAUSAL, BN)
        pb = gl.convert_layout(p.to(gl.bfloat16), P)
        count += 1

        for i in range(1, n_masked):
            acc, pb, m, l, shrink = _step(
                acc, pb, m, l, shrink, count, n - i * BN, nk, last, scale, zero, q_smem, k_smem, v_smem, k_bar, v_bar, k_free, v_free,
                w, True, CAUSAL, BN, STAGES, PINGPONG, FENCE, LATE, P, A,
            )
            count += 1
        for i in range(n_masked, n_tiles):
            acc, pb, m, l, shrink = _step(
                acc, pb, m, l, shrink, count, n - i * BN, nk, last, scale, zero, q_smem, k_smem, v_smem, k_bar, v_bar, k_free, v_free,
                w, False, CAUSAL, BN, STAGES, PINGPONG, FENCE, LATE, P, A,
            )
            count += 1
        mbarrier.arrive(q_free)
        if LATE:
            acc = acc * gl.convert_layout(shrink, gl.SliceLayout(1, A))[:, None]
        a = (count - 1) % STAGES
        mbarrier.wait(v_bar.index(a), ((count - 1) // STAGES) & 1)
        acc_next = warpgroup_mma(pb, v_smem.index(a), acc, is_async=True)
        acc, old = warpgroup_mma_wait(0, [acc_next, pb])
        mbarrier.arrive(v_free.index(a))
        turn += 1

        none = l == 0.0
        share = gl.convert_layout(1.0 / gl.where(none, 1.0, l), gl.SliceLayout(1, A))
        o = gl.convert_layout((acc * share[:, None]).to(gl.bfloat16), OUT)
        rows = gl.arange(0, BM, gl.SliceLayout(1, OUT))
        dims = gl.arange(0, D, gl.SliceLayout(0, OUT))
        begin = O + (q0 + first).to(gl.int64) * so + head * D
        gl.store(begin + (rows[:, None] * so + dims[None, :]), o, mask=(rows < nq - first)[:, None] & (dims < D)[None, :])
        r = gl.arange(0, BM, row)
        gl.store(LSE + head * total + q0 + first + r, gl.where(none, float("inf"), m + gl.log2(l)), mask=r < nq - first)
    if PINGPONG and w == 0:
        _turn_wait(gl.zeros([BM], gl.float32, row), w)  # takes the turn that the other group passed last


@gluon.jit(do_not_specialize=["total", "heads", "tiles", "group"])
def forward(
    q_desc, k_desc, v_desc, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, group,
    GROUPS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, CAUSAL: gl.constexpr, HEADS_FIRST: gl.constexpr,
    PINGPONG: gl.constexpr, FENCE: gl.constexpr, LATE: gl.constexpr, REGS: gl.constexpr,
):
    q_smem = gl.allocate_shared_memory(gl.bfloat16, [GROUPS, BM, D], q_desc.layout)
    k_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], k_desc.layout)
    v_smem = gl.allocate_shared_memory(gl.bfloat16, [STAGES, BN, D], v_desc.layout)
    q_bar = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    q_free = gl.allocate_shared_memory(gl.int64, [GROUPS, 1], mbarrier.MBarrierLayout())
    k_bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bar = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(GROUPS):
        mbarrier.init(q_bar.index(i), count=1)
        mbarrier.init(q_free.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_bar.index(i), count=1)
        mbarrier.init(v_bar.index(i), count=1)
        mbarrier.init(k_free.index(i), count=GROUPS)
        mbarrier.init(v_free.index(i), count=GROUPS)
    hopper.fence_async_shared()
    if GROUPS == 2:
        gl.warp_specialize([
            (_consumer, (q_smem.index(0), k_smem, v_smem, q_bar.index(0), k_bar, v_bar, q_free.index(0), k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, 0, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST, PINGPONG, FENCE, LATE)),
            (_consumer, (q_smem.index(1), k_smem, v_smem, q_bar.index(1), k_bar, v_bar, q_free.index(1), k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, 1, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST, PINGPONG, FENCE, LATE)),
            (_producer, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bar, k_bar, v_bar, q_free, k_free, v_free, TILES, CU_Q, CU_K, heads, tiles, group, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST)),
        ], [4, 1], [REGS, 24])
    else:
        gl.warp_specialize([
            (_consumer, (q_smem.index(0), k_smem, v_smem, q_bar.index(0), k_bar, v_bar, q_free.index(0), k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, 0, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST, PINGPONG, FENCE, LATE)),
            (_consumer, (q_smem.index(1), k_smem, v_smem, q_bar.index(1), k_bar, v_bar, q_free.index(1), k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, 1, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST, PINGPONG, FENCE, LATE)),
            (_consumer, (q_smem.index(2), k_smem, v_smem, q_bar.index(2), k_bar, v_bar, q_free.index(2), k_free, v_free, O, LSE, TILES, CU_Q, CU_K, so, total, heads, tiles, scale, 2, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST, PINGPONG, FENCE, LATE)),
            (_producer, (q_desc, k_desc, v_desc, q_smem, k_smem, v_smem, q_bar, k_bar, v_bar, q_free, k_free, v_free, TILES, CU_Q, CU_K, heads, tiles, group, GROUPS, BM, BN, D, STAGES, CAUSAL, HEADS_FIRST)),
        ], [4, 4, 1], [REGS, REGS, 24])


def layout(rows, dims):
    return gl.NVMMASharedLayout.get_default_for([rows, dims], gl.bfloat16)


def compile_forward(c):
    """c: the constants of a variant -> the compiled kernel, for sm_90, without a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.experimental.gluon._runtime import GluonASTSource

    box = lambda rows: f"tensordesc<bf16[{rows}, {c['D']}],{layout(rows, c['D'])!r}>"
    signature = dict(q_desc=box(c["BM"]), k_desc=box(c["BN"]), v_desc=box(c["BN"]), O="*bf16", LSE="*fp32", TILES="*i32", CU_Q="*i32", CU_K="*i32")
    signature |= dict.fromkeys(("so", "total", "heads", "tiles"), "i32") | dict(scale="fp32", group="i32")
    signature |= dict.fromkeys(c, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in ("O", "LSE", "TILES", "CU_Q", "CU_K", "so")}
    return triton.compile(GluonASTSource(forward, signature, c, aligned), target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


# ------------------------------------------------------------------------------------------------------------ variants, shapes

BASE = dict(GROUPS=2, BM=64, BN=128, D=128, STAGES=2, CAUSAL=False, HEADS_FIRST=True, PINGPONG=False, FENCE=0, LATE=False, REGS=232)
VARIANTS = {  # name: (what differs from BASE, persistent)
    "fence": (dict(FENCE=1), False),
    "plain": (dict(), False),
    "fence ping": (dict(FENCE=1, PINGPONG=True), False),
    "plain ping": (dict(PINGPONG=True), False),
    "fence ping headslast": (dict(FENCE=1, PINGPONG=True, HEADS_FIRST=False), False),
    "fence ping persist": (dict(FENCE=1, PINGPONG=True), True),
    "fence persist headslast": (dict(FENCE=1, HEADS_FIRST=False), True),
    "fence late": (dict(FENCE=1, LATE=True), False),
    "fence ping late": (dict(FENCE=1, PINGPONG=True, LATE=True), False),
    "fence ping late persist headslast": (dict(FENCE=1, PINGPONG=True, LATE=True, HEADS_FIRST=False), True),
    "fence 64 keys x4": (dict(FENCE=1, BN=64, STAGES=4), False),
    "fence ping 64 keys x4": (dict(FENCE=1, PINGPONG=True, BN=64, STAGES=4), False),
    "plain 64 keys x4": (dict(BN=64, STAGES=4), False),
    "fence 3 groups 64 keys x3": (dict(GROUPS=3, BN=64, STAGES=3, REGS=160, FENCE=1), False),
    "3 groups 64 keys x3": (dict(GROUPS=3, BN=64, STAGES=3, REGS=160), False),
    "fence 256 queries 64 keys x3": (dict(BM=128, BN=64, STAGES=3, REGS=240, FENCE=1), False),
}
PEERS = ("cudnn", "fa2", "triton", "triton 64x4")
SHAPES = {  # name: (lengths, query heads, KV heads, causal)
    "4x4096": ([4096] * 4, 16, 16, False),
    "1x16384": ([16384], 16, 16, False),
    "1x4500": ([4500], 16, 16, False),
    "8x900": ([900] * 8, 16, 16, False),
    "4x4096c": ([4096] * 4, 28, 4, True),
    "packed": ([1000, 3000, 517, 4096, 77, 2310, 1, 128], 16, 16, False),
    "packedc": ([1000, 3000, 517, 4096, 77, 2310, 1, 128], 28, 4, True),
}


def describe(name):
    change, _ = VARIANTS[name]
    c = BASE | change
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    for causal in (False, True):
        made = compile_forward(c | dict(CAUSAL=causal))
        file = Path(f"/tmp/gluon_{os.getpid()}.cubin")
        file.write_bytes(made.asm["cubin"])
        usage = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True).stdout
        sass = subprocess.run([tool, "-sass", file], capture_output=True, text=True).stdout
        file.unlink()
        print(f"{name:32} causal {causal!s:5} registers", re.search(r"REG:(\d+)", usage)[1], "spilled", re.search(r"STACK:(\d+)", usage)[1],
              "LDL", sass.count("LDL"), "STL", sass.count("STL"), "shared", made.metadata.shared, flush=True)


# ---------------------------------------------------------------------------------------------------------------- one process


def work(name):
    """Everything of one variant or peer. Compiles, says so, waits for its turn, then prints a line of JSON for each shape."""
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    sys.path.insert(0, str(Path(__file__).parent.parent))
    import kernels
    from ops import Segments

    say = lambda **fields: print(json.dumps(fields), flush=True)
    device = torch.device("cuda")
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    if name == "triton 64x4":
        kernels.HOPPER["forward", 128] = kernels.Tiles(128, 64, 8, 4)

    def data(lengths, heads, kv_heads):
        g = torch.Generator(device).manual_seed(1)
        make = lambda h: torch.randn(sum(lengths), h, 128, device=device, dtype=torch.bfloat16, generator=g)
        return make(heads), make(kv_heads), make(kv_heads)

    def prepare(q, k, v, segments, causal, warm=False):
        """A call without arguments, so that making descriptors is not timed."""
        change, persistent = VARIANTS[name]
        c = BASE | change | dict(CAUSAL=causal)
        total, heads, d = q.shape
        box = lambda x, rows: TensorDescriptor(x.view(len(x), -1), [len(x), x.shape[1] * d], [x.shape[1] * d, 1], [rows, d], layout(rows, d))
        # Whatever the kernel leaves out shows.
        o, lse = torch.full_like(q, float("nan")), torch.full((heads, total), float("nan"), device=device)
        tiles = kernels.tile_list(segments, segments, causal, c["GROUPS"] * c["BM"], "queries")
        jobs = heads * len(tiles)
        args = box(q, c["BM"]), box(k, c["BN"]), box(v, c["BN"]), o, lse, tiles, segments.cu, segments.cu, heads * d, total, heads, len(tiles), d**-0.5 * math.log2(math.e), heads // k.shape[1]
        grid = (min(jobs, processors) if persistent else jobs,)
        if warm:
            forward.warmup(*args, **c, num_warps=4, grid=grid)

        def call():
            forward[grid](*args, **c, num_warps=4)
            return o, lse

        return call

    def call_of(shape):
        lengths, heads, kv_heads, causal = SHAPES[shape]
        q, k, v = data(lengths, heads, kv_heads)
        segments = Segments(lengths, device)
        if name in VARIANTS:
            return q, k, v, prepare(q, k, v, segments, causal)
        if name.startswith("triton"):
            return q, k, v, lambda: (kernels.attention(q, k, v, segments, segments, causal, None, True, None), None)
        if len(set(lengths)) > 1:
            if name != "fa2":
                return q, k, v, None
            from torch.nn.attention.varlen import varlen_attn

            expand = lambda x: x.repeat_interleave(heads // kv_heads, 1)
            ke, ve = expand(k), expand(v)
            more = dict(window_size=(-1, 0)) if causal else {}
            return q, k, v, lambda: (varlen_attn(q, ke, ve, segments.cu, segments.cu, max(lengths), max(lengths), **more), None)
        dense = [x.view(len(lengths), lengths[0], x.shape[1], 128).transpose(1, 2) for x in (q, k, v)]
        backend = SDPBackend.CUDNN_ATTENTION if name.startswith("cudnn") else SDPBackend.FLASH_ATTENTION

        def call():
            with sdpa_kernel(backend):
                o = F.scaled_dot_product_attention(*dense, is_causal=causal, enable_gqa=heads != kv_heads)
            return o, None

        return q, k, v, call

    def errors(q, k, v, o, lse, lengths, causal):
        """Of 24 rows of every sequence, the last one among them: relative error of o, largest error of L."""
        group = q.shape[1] // k.shape[1]
        wrong, norm, off, start = 0.0, 0.0, 0.0, 0
        g = torch.Generator(device).manual_seed(2)
        for n in lengths:
            rows = torch.cat([torch.randint(0, n, (23,), device=device, generator=g), torch.tensor([n - 1], device=device)])
            ks, vs = (x[start : start + n].double().repeat_interleave(group, 1) for x in (k, v))
            s = torch.einsum("rhd,nhd->hrn", q[start + rows].double(), ks) * 128**-0.5
            if causal:
                s = s.masked_fill(torch.arange(n, device=device) > rows[:, None], float("-inf"))
            truth = torch.einsum("hrn,nhd->rhd", s.softmax(-1), vs)
            wrong += (o[start + rows].double() - truth).square().sum().item()
            norm += truth.square().sum().item()
            if lse is not None:
                off = max(off, (lse[:, start + rows].double() - s.logsumexp(-1) / math.log(2)).abs().max().item())
            start += n
        return (wrong / norm) ** 0.5, off

    def ahead(compiles):
        try:
            compiles()
        except Exception as problem:  # then its first call compiles, at the cost of the time of its turn
            print(f"not compiled ahead: {type(problem).__name__}: {problem}", file=sys.stderr)

    if name == "first":
        sys.path.insert(0, str(Path(__file__).parent))
        import gluon_trial_first as first

        real = first.forward

        class Warm:
            def __getitem__(self, grid):
                return lambda *args, **kw: real.warmup(*args, **kw, grid=grid)

        def first_call(n, bm, bn, stages):
            q, k, v = data([n], 16, 16)
            box = lambda x, rows: TensorDescriptor(x.view(n, -1), [n, 2048], [2048, 1], [rows, 128], layout(rows, 128))
            o, lse = torch.full_like(q, float("nan")), torch.empty(16, n, device=device)

            def call():
                first.forward[16, n // (2 * bm)](box(q, bm), box(k, bn), box(v, bn), o, lse, n, 2048, n, 128**-0.5 * math.log2(math.e), 1, BM=bm, BN=bn, D=128, STAGES=stages, REGS=232, num_warps=4)
                return o, lse

            return q, k, v, call

        first.forward = Warm()
        for bm, bn, d, stages in first.SHAPES[:2]:
            ahead(lambda: first_call(1024, bm, bn, stages)[3]())
        first.forward = real
    elif name in VARIANTS:
        q, k, v = data([256], 2, 2)
        for causal in (False, True):
            ahead(lambda: prepare(q, k, v, Segments([256], device), causal, warm=True))
    q, k, v = data([256], 2, 2)
    errors(q, k, v, q, None, [256], False)  # loads what it needs of cuBLAS
    torch.cuda.synchronize()
    say(ready=name)
    sys.stdin.readline()

    def one(shape, lengths, causal, q, k, v, call):
        o, lse = call()
        torch.cuda.synchronize()
        if o.dim() == 4:
            o = o.transpose(1, 2).reshape(q.shape)
        o = o.clone()
        bad = int((~o.isfinite()).sum()) + (int((~lse.isfinite()).sum()) if lse is not None else 0)
        error, off = errors(q, k, v, o, lse, lengths, causal)
        same = all(torch.equal(o, call()[0]) for _ in range(3)) if not name.startswith(("cudnn", "fa2")) else True
        ms = triton.testing.do_bench(call, warmup=10, rep=50, return_mode="median")
        pairs = sum(n * n for n in lengths) / (2 if causal else 1)
        say(name=name, shape=shape, error=error, lse=off, bad=bad, same=same, ms=ms, tflops=4 * pairs * q.shape[1] * 128 / ms / 1e9)

    if name == "first":
        for bm, bn, d, stages in first.SHAPES[:2]:
            for n in (4096, 16384):
                name = f"first {bn}x{stages}"
                one(f"1x{n}", [n], False, *first_call(n, bm, bn, stages))
        return
    for shape, (lengths, heads, kv_heads, causal) in SHAPES.items():
        try:
            q, k, v, call = call_of(shape)
            if call is not None:
                one(shape, lengths, causal, q, k, v, call)
        except Exception as problem:  # a peer that cannot do a shape; a fault of the GPU ends the process anyway
            say(name=name, shape=shape, failed=f"{type(problem).__name__}: {problem}"[:300])
            if "CUDA" in str(problem) and "error" in str(problem):
                return


# ------------------------------------------------------------------------------------------------------------------- all of it


def run(seconds=65.0, patience=14.0):
    begin = time.monotonic()
    out = Path(os.environ.get("OUT", "/tmp")) / "gluon"
    out.mkdir(parents=True, exist_ok=True)
    names = sys.argv[2:] or ["cudnn", "fence", "fence ping", "triton 64x4", "plain", "fence ping persist", "first", "fence ping late", "fence ping headslast", "fence late", "plain ping", "fa2",
             "fence 64 keys x4", "fence ping 64 keys x4", "fence persist headslast", "fence ping late persist headslast", "3 groups 64 keys x3", "fence 3 groups 64 keys x3", "fence 256 queries 64 keys x3",
             "plain 64 keys x4", "triton", "cudnn again"]
    workers, lines = {}, {}

    def start(name):
        log = open(out / (name.replace(" ", "_") + ".err"), "w")
        workers[name] = subprocess.Popen([sys.executable, __file__, "work", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                                         env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"})

    for name in names:
        start(name)
    results, notes = [], []
    # Compiling first, all in parallel; then one at a time on the GPU, once nobody else uses it.
    ready = {}
    for name in names:
        left = max(0.1, 32 - (time.monotonic() - begin))
        there, _, _ = select.select([workers[name].stdout], [], [], left)
        ready[name] = workers[name].stdout.readline() if there else ""
    print(f"all ready after {time.monotonic() - begin:.0f} s")
    for name in names:
        left = seconds - (time.monotonic() - begin)
        worker = workers[name]
        if left < 3 or '"ready"' not in ready[name]:
            worker.kill()
            tail = (out / (name.replace(" ", "_") + ".err")).read_text()[-250:].replace("\n", " | ")
            notes.append(f"{name}: no time left" if left < 3 else f"{name}: not ready ({ready[name].strip()[:100]}) {tail}")
            continue
        at = time.monotonic()
        rest = ""
        try:
            rest, _ = worker.communicate("\n", timeout=patience)
        except subprocess.TimeoutExpired:
            worker.kill()
            try:
                rest, _ = worker.communicate(timeout=6)
            except subprocess.TimeoutExpired:
                notes.append(f"{name}: could not be killed")
        except BrokenPipeError:
            pass
        took = time.monotonic() - at
        for line in rest.splitlines():
            if line.startswith("{"):
                results.append(json.loads(line))
        (out / (name.replace(" ", "_") + ".out")).write_text(rest)
        if worker.returncode:
            tail = (out / (name.replace(" ", "_") + ".err")).read_text()[-250:].replace("\n", " | ")
            notes.append(f"{name}: ended with {worker.returncode} after {took:.1f} s; {tail}")
    (out / "results.jsonl").write_text("".join(json.dumps(r) + "\n" for r in results))

    shapes = list(dict.fromkeys([*SHAPES, *(r["shape"] for r in results)]))
    print(f"TFLOP/s; worst error of o and of L; ! wrong, ~ bits differ between runs. {time.monotonic() - begin:.0f} s")
    print(f"{'':34}" + "".join(f"{s:>9}" for s in shapes) + "   error     L")
    for name in dict.fromkeys(r["name"] for r in results):
        rows = {r["shape"]: r for r in results if r["name"] == name}
        cells = ""
        for s in shapes:
            r = rows.get(s)
            if r is None:
                cells += f"{'':>9}"
            elif "failed" in r:
                cells += f"{'failed':>9}"
                notes.append(f"{name}, {s}: {r['failed'][:120]}")
            else:
                mark = ("!" if r["bad"] or r["error"] > 6e-3 or r["lse"] > 1e-2 else "") + ("" if r["same"] else "~")
                cells += f"{str(round(r['tflops'])) + mark:>9}"
        good = [r for r in rows.values() if "ms" in r]
        if good:
            cells += f"{max(r['error'] for r in good):9.1e}{max(r['lse'] for r in good):9.1e}"
        print(f"{name:34}{cells}")
    print("\n".join(note[:400] for note in notes)[:2500])


if __name__ == "__main__":
    if sys.argv[1] == "compile":
        for name in sys.argv[2:] or VARIANTS:
            describe(name)
    elif sys.argv[1] == "work":
        work(sys.argv[2])
    else:
        run()
