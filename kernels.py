"""The steps of ops.py once more, by hand in Triton. Everything works without this file: it is what a GPU runs, and comes last.

First attention over packed sequences, then the steps between the matrix products. Each part begins with why it is written as it
is. The public functions have the names that they have in ops.py, which calls them and describes what they take.

                                                  1. Attention

What is computed. With c = scale * log2(e), since the hardware has 2^x and not e^x, for query i over the keys j it may read:

    s_ij = c q_i . k_j        L_i = log2 sum_j 2^s_ij        p_ij = 2^(s_ij - L_i)        o_i = sum_j p_ij v_j

The matrices s and p have as many entries as there are pairs. Written to memory they cost far more time than the products, so
they never are: a program holds a tile of BM queries, walks over the keys BN at a time, and keeps what it has so far right.

            keys  0     BN    2 BN   3 BN            q      (BM, D)   read once, stays in shared memory
    queries +-----+-----+-----+-----+                k, v   (BN, D)   read tile by tile, the next ones already on their way
         m0 | all | all | cut |     |                s, p   (BM, BN)  in registers, never written
    m0 + BM +-----+-----+-----+-----+                acc    (BM, D)   in registers, in fp32
              no mask    mask  never visited (causal)

Forward (Milakov and Gimelshein, arXiv 1805.02867; Dao et al., arXiv 2205.14135). A maximum m keeps 2^(s - m) in range. It is
only known at the end, so what was summed under an older m is shrunk by `a` whenever a tile raises it:

    (1)  s   = c q k^T                                (3)  a = 2^(m - m'),  p = 2^(s - m'),  l' = a l + sum_j p
    (2)  m'  = max(m, max_j s)                        (4)  acc' = a acc + p v           at the end o = acc / l, L = m + log2 l

Backward. Of the forward pass it needs o and L alone, because (5) gives every p back. From dO, the chain rule through o = p v:

    (5)  p_ij  = 2^(s_ij - L_i)                       (6)  dV_j = sum_i p_ij dO_i,        dp_ij = dO_i . v_j

and through the softmax of x_ij = scale q_i . k_j: the derivative of p_ij by x_ik is p_ij (1[j = k] - p_ik). The second part,
summed over j, is one number per query, and needs no walk over the keys:

    (7)  delta_i = sum_k p_ik dp_ik = dO_i . sum_k p_ik v_k = dO_i . o_i
    (8)  ds_ij   = p_ij (dp_ij - delta_i),            dK_j = scale sum_i ds_ij q_i
    (9)                                               dQ_i = scale sum_j ds_ij k_j

dK and dV sum over queries, dQ sums over keys. Two kernels, each of which owns what it sums, compute s and dp twice: 7 products
instead of 5. In return they add in a fixed order, with equal bits every time. One kernel for all would add its shares of dQ to
memory one by one; on an H200 these additions take longer than the two products.

Decoding has one query per sequence: there is nothing to tile but the query heads of one KV head, which read the same keys. One
program per KV head would leave the GPU idle, so each takes a share of the keys and a second kernel joins the shares by their L.

Why the numbers in HOPPER. They are what an H200 ran fastest (docs/bench/tune_h200.json, which bench/tune.py makes), and what
they compile to is in tests/aot_sm90.json. How many programs fit on a processor decides more than anything inside one:
* Of two programs one multiplies while the other one exponentiates or waits for memory. Each may have half of the registers and
  of the 228 KiB of shared memory: 4 warps, and two stages of 64 keys. Of 64 x 64, a third stage leaves room for one program
  alone, and mostly costs a tenth to a third.
* forward: 128 queries for 4 warps, so that every key read serves twice as many. They spill registers and are still the fastest,
  mostly by a tenth or more before 8 warps with four stages.
* dq keeps q and dO beside the tiles of k and v: 128 queries need 8 warps, and fill a processor. That is best on long walks. On
  short ones nobody works while a program begins and ends, which is `pause`; 64 queries, two programs, are quicker there.
* dkv: two accumulators of (BN, D) instead of one. 64 x 64 leaves room for two programs, at the price of spilled registers.
* D = 64 needs half of everything, so a third or fourth stage fits, and the sizes of tiles differ by little.
* decode, not measured: 16 rows are the smallest product there is, and 7 heads fit; the memory is the limit, which three stages
  should keep busy.
* Short sequences have few tiles. 133 programs on 132 processors take as long as 264, so `quickest` looks at how many there are.
* Causal changes no size, it shortens walks. D = 80 runs in the tiles of 128: its zero columns are multiplied but never read.

Whole tiles are copied by Hopper's TMA unit, which saves the loop its address arithmetic. Edges go by pointers: a box would
reach into the next sequence, and a NaN there times p = 0 is NaN. Not used: warp specialisation, which Triton 3.6 compiles for
some of these loops and breaks for others. hopper.py does it by hand for the forward pass in 16 bits and 128 channels, and is
faster there; everything that it declines is done here, and so is every gradient.

                                   2. The steps between the matrix products

A GPU reads 4 TB/s and multiplies 800 TFLOP/s: a number must take part in some 400 operations before arithmetic is what one
waits for. Norms, rotations, gates and activations do about ten, so their time is the bytes they move, and a chain of separate
operations moves them again and again. Every kernel here reads its inputs once, computes in fp32 in registers and writes its
results once. Bytes per element of a bf16 stream, forward, operation by operation against fused:

    add_rms_norm          sum 6, norm 4                                              10 -> 8
    norm_rope             cast 6, rms 4, norm 8, gain 8, rotation 28, cast 6         60 -> 4, straight out of the projection
    gate_add_modulate     gated sum 6, LayerNorm 4, modulation 4                     14 -> 8
    swiglu                silu 4, product 6                                          10 -> 6, backward keeps only its input
    rope_append           cat, rotation in three, two copies into the cache          6 launches -> 1: decoding waits on them
    standardise_into      cast 6, std and mean 4, difference 8, quotient 8, copy 6   32 -> 4, into its slice of a wide buffer
    softmax_gradient      the same in fp32, log-softmax, its gradient                two reads and one write of the logits
"""

from __future__ import annotations

import math
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

import hopper

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no wheels for macOS and Windows: there the PyTorch path is the only one
    triton = tl = None

INTERPRETED = bool(triton and triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 as this file is read: kernels run on the CPU
NEVER = tl.constexpr(-1e30) if triton else None  # below every score; finite, so that NEVER - NEVER is 0 and not NaN
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what the kernels read


def run_on(device: torch.device) -> bool:
    """On NVIDIA GPUs; in the interpreter on the CPU alone."""
    return device.type == ("cpu" if INTERPRETED else "cuda")


def jit(function):
    """triton.jit, or the bare function where there is no Triton and nothing will call it."""
    if triton is None:
        return function
    # Else Triton would compile a kernel anew for packs whose length happens to be a multiple of 16.
    return triton.jit(function, do_not_specialize=["total"])


# --------------------------------------------------------------------------------------------------- attention: the kernels
#
# What the arguments of these kernels are called:
#
#     Q K V O DO LSE DELTA DQ DK DV     addresses; LSE and DELTA (query heads, total) hold L and delta of every query
#     q_box k_box v_box do_box          descriptors of Q, K, V and DO for the TMA unit, or the addresses where there is none
#     TILES CU_Q CU_K                   the list of tile_list; where the sequences begin, as Segments.cu
#     sq hq, sk hk, ...                 steps, in elements, from token to token and from head to head of Q, K, V (v), O (o),
#                                       DO (d), DQ (g), DK and DV (gk)
#     scale scale_grad                  c = scale log2(e) of the scores, and plain scale of the gradients
#     total group                       queries of the pack; query heads that share a KV head
#     D DIM                             channels of a head, and the next power of two, since blocks have no other sizes
#     BM BN                             queries and keys of a tile
#     DOT                               precision of fp32 products; 16-bit ones are exact and added in fp32
#
# A tl.constexpr is known to the compiler: an `if` on one costs nothing at run time, only one branch is compiled.


@jit
def _segment(CU, s):
    """First row of sequence s, and how many there are."""
    start = tl.load(CU + s)
    return start, tl.load(CU + s + 1) - start


@jit
def _tile(pointer, first, stride, rows, dims):
    """Addresses of (rows, dims) counted from row `first`. first * stride can pass 2**31, an offset inside a tile cannot."""
    # The 64-bit part is one number for all threads; what each of them adds is in 32 bits, which takes half of the registers.
    begin = pointer + tl.cast(first, tl.int64) * stride
    return begin + (rows[:, None] * stride + dims[None, :])


@jit
def _read(pointer, first, stride, left, rows, dims, RAGGED: tl.constexpr, D: tl.constexpr):
    """A tile; rows from `left` on (another sequence's) and columns from D on become zeros. RAGGED: there may be such rows."""
    at = _tile(pointer, first, stride, rows, dims)
    # Three loads for one: most tiles are whole, and a tile without a mask is copied without a compare for each address.
    if RAGGED:
        here = (rows < left)[:, None] & (dims < D)[None, :]
        return tl.load(at, mask=here, other=0.0)
    elif D != dims.shape[0]:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@jit
def _fetch(
    pointer, box, head, first, stride, left, rows, dims,
    RAGGED: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
):  # fmt: skip
    """A tile of one head. Whole ones are copied by the TMA unit, which needs no address from any thread."""
    if TMA and not RAGGED:
        copied = box.load([first, head, 0])  # (rows, 1, DIM)
        return copied.reshape(rows.shape[0], dims.shape[0])
    else:
        return _read(pointer, first, stride, left, rows, dims, RAGGED, D)


@jit
def _walk(m0, nq, nk, CAUSAL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):
    """How far the queries from m0 on walk: keys before `whole` are read by every query of the tile, in tiles of BN without any
    mask; keys from `end` on by none."""
    whole = nk
    end = nk
    if CAUSAL:
        # The first query of the tile reads the fewest keys, the last one the most. With more queries than keys it may be none.
        read_by_first = m0 + nk - nq + 1
        whole = tl.maximum(tl.minimum(nk, read_by_first), 0)
        read_by_last = m0 + BM + nk - nq
        end = tl.maximum(tl.minimum(nk, read_by_last), 0)
    return whole // BN * BN, end


@jit
def _forward_step(
    acc, l, m,
    q, K, V, k_box, v_box,
    kv_head, k0, n, nk, last,
    sk, sv, scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (4) for one tile of keys. last (BM,): the last key that each query reads."""
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DIM)
    k = _fetch(K, k_box, kv_head, k0 + n, sk, nk - n, cols, dims, MASKED, TMA, D)

    # (1), still without c. It enters below, where s * scale - m' is one fused multiply-add: multiplying s here would be one
    # more operation for each of BM * BN scores.
    s = tl.dot(q, tl.trans(k), input_precision=DOT)  # (BM, BN)
    # -inf, not NEVER: a row without any key keeps m = NEVER, and 2^(-inf - NEVER) is 0 where 2^(NEVER - NEVER) would be 1.
    if MASKED:
        seen = (n + cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (n + cols[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))

    # (2) and (3). The scale is positive, so the largest score is the largest scaled score, too.
    highest = tl.max(s, 1) * scale
    higher = tl.maximum(m, highest)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(m - higher)

    # (4). p is rounded for the tensor cores, at most 1 and so without loss of range. Sum and accumulator stay in fp32.
    v = _fetch(V, v_box, kv_head, k0 + n, sv, nk - n, cols, dims, MASKED, TMA, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=DOT)
    l = l * shrink + tl.sum(p, 1)
    return acc, l, higher


@jit
def _forward(
    Q, K, V, k_box, v_box, O, LSE,
    TILES, CU_Q, CU_K, total,
    sq, hq, sk, hk,
    sv, hv, so, ho,
    scale, group,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head over all keys that it sees. Grid (query heads, tiles): the heads of one tile run at
    the same time, so that a key tile comes from memory once and for the rest of its group from the L2 cache."""
    # Which tile this is was decided on the host, which knows the lengths: no program finds out that it has nothing to do.
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s = tl.load(tile)
    m0 = tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)

    rows = tl.arange(0, BM)
    dims = tl.arange(0, DIM)

    # Grouped queries: several heads read the keys of one.
    kv_head = head // group
    K += kv_head * hk
    V += kv_head * hv
    q = _read(Q + head * hq, q0 + m0, sq, nq - m0, rows, dims, True, D)

    # The last query reads the last key, also where there are more keys than queries, as with a cache.
    last = m0 + rows + (nk - nq)
    whole, end = _walk(m0, nq, nk, CAUSAL, BM, BN)

    # Two loops, so that the first has neither compares nor addresses in it: nearly all of the time is spent there.
    m = tl.full((BM,), NEVER, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DIM), tl.float32)
    for n in range(0, whole, BN):
        acc, l, m = _forward_step(
            acc, l, m,
            q, K, V, k_box, v_box,
            kv_head, k0, n, nk, last,
            sk, sv, scale,
            False, CAUSAL, TMA,
            D, DIM, BN, DOT,
        )  # fmt: skip
    for n in range(whole, end, BN):
        acc, l, m = _forward_step(
            acc, l, m,
            q, K, V, k_box, v_box,
            kv_head, k0, n, nk, last,
            sk, sv, scale,
            True, CAUSAL, TMA,
            D, DIM, BN, DOT,
        )  # fmt: skip

    # A query that read no key has l = 0 and acc = 0, and 0 / 0 would be NaN: its result is 0.
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    real = rows < nq - m0
    at = _tile(O + head * ho, q0 + m0, so, rows, dims)
    o = o.to(O.dtype.element_ty)
    tl.store(at, o, mask=real[:, None] & (dims < D)[None, :])

    # L alone goes to the backward pass, not m and l: (5) needs nothing else. +inf for a query without any key makes every p of
    # its row 0 there.
    lse_at = LSE + head * total + q0 + m0 + rows
    lse = tl.where(l == 0.0, float("inf"), m + tl.log2(l))
    tl.store(lse_at, lse, mask=real)


@jit
def _delta(
    O, DO, DELTA,
    total,
    so, ho, sd, hd,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
):  # fmt: skip
    """delta_i = dO_i . O_i, equation (7), for BM rows of one head; sequences do not matter here."""
    # A kernel of its own: _backward_dkv needs it of the same queries for every tile of keys.
    head = tl.program_id(0)
    m0 = tl.program_id(1) * BM
    rows = tl.arange(0, BM)
    dims = tl.arange(0, DIM)
    o = _read(O + head * ho, m0, so, total - m0, rows, dims, True, D).to(tl.float32)
    do = _read(DO + head * hd, m0, sd, total - m0, rows, dims, True, D).to(tl.float32)
    at = DELTA + head * total + m0 + rows
    tl.store(at, tl.sum(o * do, 1), mask=rows < total - m0)


@jit
def _dq_step(
    dq, q, do, lse, delta,
    K, V, k_box, v_box,
    kv_head, k0, n, nk, last,
    sk, sv, scale,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Equations (5), (8) and (9) for one tile of keys."""
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DIM)
    k = _fetch(K, k_box, kv_head, k0 + n, sk, nk - n, cols, dims, MASKED, TMA, D)
    v = _fetch(V, v_box, kv_head, k0 + n, sv, nk - n, cols, dims, MASKED, TMA, D)

    # (5): with L known there is no maximum to follow, and nothing to correct afterwards.
    s = tl.dot(q, tl.trans(k), input_precision=DOT)  # (BM, BN)
    p = tl.exp2(s * scale - lse[:, None])
    # Keys that are not there were read as zeros, but a score of 0 has a p: it is taken out afterwards.
    if MASKED:
        seen = (n + cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (n + cols[None, :] <= last[:, None])
        p = tl.where(seen, p, 0.0)

    # (8) and (9), without the scale, which the sum gets once at its end.
    dp = tl.dot(do, tl.trans(v), input_precision=DOT)
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)


@jit
def _backward_dq(
    Q, K, V, k_box, v_box, DO, LSE, DELTA, DQ,
    TILES, CU_Q, CU_K, total,
    sq, hq, sk, hk,
    sv, hv, sd, hd,
    sg, hg,
    scale, scale_grad, group,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries, equation (9): the same walk over the keys as in the forward pass."""
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s = tl.load(tile)
    m0 = tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    rows = tl.arange(0, BM)
    dims = tl.arange(0, DIM)
    real = rows < nq - m0
    kv_head = head // group
    K += kv_head * hk
    V += kv_head * hv

    # All that belongs to the queries is read once. Rows that are not there get L = +inf, so that their p is 0.
    q = _read(Q + head * hq, q0 + m0, sq, nq - m0, rows, dims, True, D)
    do = _read(DO + head * hd, q0 + m0, sd, nq - m0, rows, dims, True, D)
    lse = tl.load(LSE + head * total + q0 + m0 + rows, mask=real, other=float("inf"))
    delta = tl.load(DELTA + head * total + q0 + m0 + rows, mask=real, other=0.0)

    last = m0 + rows + (nk - nq)
    whole, end = _walk(m0, nq, nk, CAUSAL, BM, BN)
    dq = tl.zeros((BM, DIM), tl.float32)
    for n in range(0, whole, BN):
        dq = _dq_step(
            dq, q, do, lse, delta,
            K, V, k_box, v_box,
            kv_head, k0, n, nk, last,
            sk, sv, scale,
            False, CAUSAL, TMA,
            D, DIM, BN, DOT,
        )  # fmt: skip
    for n in range(whole, end, BN):
        dq = _dq_step(
            dq, q, do, lse, delta,
            K, V, k_box, v_box,
            kv_head, k0, n, nk, last,
            sk, sv, scale,
            True, CAUSAL, TMA,
            D, DIM, BN, DOT,
        )  # fmt: skip
    at = _tile(DQ + head * hg, q0 + m0, sg, rows, dims)
    dq = (dq * scale_grad).to(DQ.dtype.element_ty)
    tl.store(at, dq, mask=real[:, None] & (dims < D)[None, :])


@jit
def _dkv_step(
    dk, dv, k, v,
    Q, DO, q_box, do_box, LSE, DELTA,
    head, q0, m, nq, first,
    sq, hq, sd, hd, total, scale,
    RAGGED: tl.constexpr,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """Equations (5) to (8) for one tile of queries, all transposed: scores are (BN, BM), so that p and ds are left operands
    and stay in registers. first (BN,): the first query that reads each key."""
    rows = tl.arange(0, BM)
    dims = tl.arange(0, DIM)
    q = _fetch(Q + head * hq, q_box, head, q0 + m, sq, nq - m, rows, dims, RAGGED, TMA, D)
    lse_at = LSE + head * total + q0 + m + rows
    delta_at = DELTA + head * total + q0 + m + rows
    if RAGGED:
        real = rows < nq - m
        lse = tl.load(lse_at, mask=real, other=float("inf"))
        delta = tl.load(delta_at, mask=real, other=0.0)
    else:
        lse = tl.load(lse_at)
        delta = tl.load(delta_at)

    # (5). Queries that are not there have L = +inf, so p = 0 and no need of a mask; keys that are not there are not stored.
    s = tl.dot(k, tl.trans(q), input_precision=DOT)  # (BN, BM)
    p = tl.exp2(s * scale - lse[None, :])
    if CAUSAL:
        p = tl.where(m + rows[None, :] >= first[:, None], p, 0.0)

    # (6). The tensor cores get p rounded; for (8) it stays in fp32.
    do = _fetch(DO + head * hd, do_box, head, q0 + m, sd, nq - m, rows, dims, RAGGED, TMA, D)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=DOT)

    # (8).
    dp = tl.dot(v, tl.trans(do), input_precision=DOT)
    ds = (p * (dp - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=DOT)
    return dk, dv


@jit
def _backward_dkv(
    Q, K, V, q_box, do_box, DO, LSE, DELTA, DK, DV,
    TILES, CU_Q, CU_K, total,
    sq, hq, sk, hk,
    sv, hv, sd, hd,
    sgk, hgk,
    scale, scale_grad, group,
    CAUSAL: tl.constexpr,
    TMA: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one KV head, equations (6) and (8), over the queries of all heads that read it: one program
    owns its sums, so their order is fixed."""
    kv_head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s = tl.load(tile)
    n0 = tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)

    # Here the keys stay, and the queries come by.
    cols = tl.arange(0, BN)
    dims = tl.arange(0, DIM)
    k = _read(K + kv_head * hk, k0 + n0, sk, nk - n0, cols, dims, True, D)
    v = _read(V + kv_head * hv, k0 + n0, sv, nk - n0, cols, dims, True, D)
    first = n0 + cols - (nk - nq)
    start = 0
    if CAUSAL:  # no query before reads any of these keys
        start = tl.maximum(n0 - (nk - nq), 0) // BM * BM

    # Every head that read these keys sends them a gradient. Whole tiles of queries come by the TMA unit. Then what is left of
    # each head, one tile at most: copying ahead would only cost registers, of which there are too few already.
    dk = tl.zeros((BN, DIM), tl.float32)
    dv = tl.zeros((BN, DIM), tl.float32)
    rest = start
    if TMA:
        rest = nq // BM * BM
        for head in range(kv_head * group, kv_head * group + group):
            for m in range(start, rest, BM):
                dk, dv = _dkv_step(
                    dk, dv, k, v,
                    Q, DO, q_box, do_box, LSE, DELTA,
                    head, q0, m, nq, first,
                    sq, hq, sd, hd, total, scale,
                    False, CAUSAL, TMA,
                    D, DIM, BM, DOT,
                )  # fmt: skip
    for head in range(kv_head * group, kv_head * group + group):
        for m in tl.range(rest, nq, BM, num_stages=1 if TMA else None):
            dk, dv = _dkv_step(
                dk, dv, k, v,
                Q, DO, q_box, do_box, LSE, DELTA,
                head, q0, m, nq, first,
                sq, hq, sd, hd, total, scale,
                True, CAUSAL, TMA,
                D, DIM, BM, DOT,
            )  # fmt: skip
    inside = (cols < nk - n0)[:, None] & (dims < D)[None, :]
    dk_at = _tile(DK + kv_head * hgk, k0 + n0, sgk, cols, dims)
    tl.store(dk_at, (dk * scale_grad).to(DK.dtype.element_ty), mask=inside)
    dv_at = _tile(DV + kv_head * hgk, k0 + n0, sgk, cols, dims)
    tl.store(dv_at, dv.to(DV.dtype.element_ty), mask=inside)


@jit
def _decode(
    Q, K, V, O, LSE,
    CU_K, K_LENGTHS,
    sq, hq, sk, hk,
    sv, hv, so, ho,
    scale, group,
    STATIC: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """One query per sequence: a tile holds the query heads of one KV head, which read the same keys. Grid (KV heads, splits,
    sequences). Each split takes an equal share of the keys; if there are several, O is (S * splits, heads, D) in fp32."""
    kv_head = tl.program_id(0)
    split = tl.program_id(1)
    s = tl.program_id(2)
    # A static cache has room for more keys than there are yet. How many there are is on the device alone, so that a recorded
    # graph reads it anew in every replay.
    k0, nk = _segment(CU_K, s)
    if STATIC:
        nk = tl.load(K_LENGTHS + s)

    # What is a row of queries in _forward is a head here: the step from row to row is that from head to head.
    heads = tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)

    # Shares are whole tiles: only the last one of a sequence is cut.
    share = tl.cdiv(tl.cdiv(nk, SPLITS), BN) * BN
    begin = split * share
    end = tl.minimum(begin + share, nk)
    K += kv_head * hk
    V += kv_head * hv

    own = Q + tl.cast(s, tl.int64) * sq + kv_head * group * hq
    q = _read(own, 0, hq, group, heads, dims, True, D)

    # Always masked: the memory behind the last key may hold anything, and what is waited for is memory, not compares.
    m = tl.full((ROWS,), NEVER, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for n in range(begin, end, BN):
        acc, l, m = _forward_step(
            acc, l, m,
            q, K, V, K, V,
            kv_head, k0, n, end, heads,
            sk, sv, scale,
            True, False, False,
            D, DIM, BN, DOT,
        )  # fmt: skip
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out = tl.cast(s * SPLITS + split, tl.int64)
    at = _tile(O + out * so + kv_head * group * ho, 0, ho, heads, dims)
    o = o.to(O.dtype.element_ty)
    tl.store(at, o, mask=(heads < group)[:, None] & (dims < D)[None, :])

    # For _merge. -inf where this split had no key: its weight there is 2^-inf = 0.
    if SPLITS > 1:
        lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
        lse_at = LSE + out * tl.num_programs(0) * group + kv_head * group + heads
        tl.store(lse_at, lse, mask=heads < group)


@jit
def _merge(
    PARTS, LSE, O,
    so, ho, hq,
    D: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
):  # fmt: skip
    """Splits joined: softmax over their log-sums weighs their outputs. Grid (query heads, sequences)."""
    head = tl.program_id(0)
    s = tl.program_id(1)
    slots = tl.arange(0, SLOTS)
    dims = tl.arange(0, DIM)
    part = (s * SPLITS + slots) * hq + head
    lse = tl.load(LSE + part, mask=slots < SPLITS, other=float("-inf"))

    # A split's output is a mean over its keys, its 2^L the sum of their weights: the mean over all keys weighs means by sums.
    # NEVER and the 1e-30 below are for a sequence without any key, where all L are -inf and all weights 0.
    highest = tl.maximum(tl.max(lse, 0), NEVER)
    weight = tl.exp2(lse - highest)
    first = PARTS + tl.cast(s, tl.int64) * SPLITS * hq * D + head * D
    parts = _read(first, 0, hq * D, SPLITS, slots, dims, True, D)
    weighed = tl.sum(parts * weight[:, None], 0)
    o = weighed / tl.maximum(tl.sum(weight, 0), 1e-30)
    at = O + tl.cast(s, tl.int64) * so + head * ho + dims
    tl.store(at, o.to(O.dtype.element_ty), mask=dims < D)


# ---------------------------------------------------------------------------------------- attention: configurations, launches


class Tiles(NamedTuple):
    m: int  # queries of a tile
    n: int  # keys of a tile
    warps: int
    stages: int  # tiles that the loop keeps in flight
    cost: float = 1.0  # time on a GPU that is full, beside the first of the list: measured on 4 x 4096
    pause: int = 0  # a program that is alone on its processor begins and ends in the time of so many rows that it visits


# (what, padded head dim) on Hopper: `quickest` takes one of each list. tests/aot_sm90.json holds what each compiles to; the
# module docstring says why.
HOPPER = {
    ("forward", 128): [Tiles(128, 64, 4, 2), Tiles(64, 64, 4, 2, cost=1.28)],
    ("forward", 64): [Tiles(128, 64, 8, 4), Tiles(64, 64, 4, 3, cost=1.01)],
    ("dq", 128): [Tiles(128, 64, 8, 3, pause=96), Tiles(64, 64, 4, 2, cost=1.15)],
    ("dq", 64): [Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3, cost=1.02)],
    ("dkv", 128): [Tiles(64, 64, 4, 2)],
    ("dkv", 64): [Tiles(64, 64, 4, 3)],
    ("decode", 128): [Tiles(16, 64, 4, 3)],
    ("decode", 64): [Tiles(16, 64, 4, 3)],
}
OTHER = Tiles(64, 32, 4, 2)  # any other GPU: fits the 99 KiB of shared memory that every one since Ampere has
EXACT = Tiles(32, 32, 4, 1)  # fp32 has no tensor cores at full precision; also what the interpreter steps through
PROCESSORS = 132  # of an H100 and an H200
SPLIT_KEYS = 256  # a split of fewer keys costs more to merge than it saves
PROGRAMS = 2 * PROCESSORS  # splits until there are as many programs
HEAD_DIMS = (16, 32, 64, 80, 128)
LOG2E = 1.4426950408889634
GLUON = True  # hopper.py's forward pass where it can; False: always the one of this file


def config(what: str, dim: int, dtype: torch.dtype, architecture: int) -> list[Tiles]:
    """What there is to choose from. architecture: major version of the compute capability, 0 for the interpreter."""
    if architecture == 9 and dtype != torch.float32:
        return HOPPER[what, max(dim, 64)]
    tiles = OTHER
    if dtype == torch.float32 or architecture == 0:
        tiles = EXACT
    # A single query: more rows than the smallest product has would only be multiplied for nothing.
    if what == "decode":
        tiles = tiles._replace(m=16)
    return [tiles]


def _architecture(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    major, _ = torch.cuda.get_device_capability(device)
    return major


def attention_cannot(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    """Why the kernels cannot do this call, or None."""
    if triton is None:
        return "the package triton is not installed"
    if not run_on(q.device):
        return f"no kernels for {q.device.type} tensors (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    if q.shape[2] not in HEAD_DIMS:
        return f"head dim {q.shape[2]} is none of {', '.join(map(str, HEAD_DIMS))}"
    one_type = q.dtype == k.dtype == v.dtype
    if q.dtype not in DTYPES or not one_type:
        return f"types {q.dtype}, {k.dtype}, {v.dtype} are not one of bf16, fp16, fp32"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bf16 numbers: use fp16 or fp32"
    if scale is not None and scale <= 0:
        return f"scale {scale} is not positive"
    return None


# From how many operations PyTorch's attention, which is cuDNN's there, is faster than the kernels of this file; never where
# there is no entry. tests/bench/test_tune.py holds them against docs/bench/tune_h200.json. Smaller calls, too, would be faster,
# but cuDNN plans every new length for 70 ms. With these the plan is paid for within a thousand calls, which is one picture of
# the DiT. What hopper.py takes is never left to cuDNN: where that is faster, calls are so short that the plan costs more.
SDPA_FROM = {
    # architecture, head dim
    (9, 128): 150e9,  # 1 x 4500, 16 heads: 0.71 of the time. Only for calls that hopper.py declines
    (9, 80): 150e9,  # 1 x 5476, 16 heads: 0.84. The vision tower: pays where many pictures have one size
    (9, 64): 250e9,  # 4 x 4096, 16 heads: 0.86
}


def sdpa_is_faster(q: Tensor, k: Tensor, v: Tensor, queries, keys, causal: bool) -> bool:
    """Whether auto leaves this call to PyTorch. q (Nq, Hq, D), k, v (Nk, Hkv, D); queries, keys: their Segments."""
    if by_hopper(q, k, v):
        return False
    # cuDNN adds gradients in any order, and a resumed training has to repeat every bit.
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    if torch.is_grad_enabled() and wanted:
        return False
    # Prompts, which are causal, and packs of several lengths seldom come twice: cuDNN would plan each of them.
    one_length = len(set(queries.lengths)) == 1 and queries.lengths == keys.lengths
    if causal or not one_length:
        return False
    if not (torch.backends.cudnn.is_available() and torch.backends.cuda.cudnn_sdp_enabled()):
        return False
    least = SDPA_FROM.get((_architecture(q.device), q.shape[2]), math.inf)
    return operations(q, queries, keys) >= least


def operations(q: Tensor, queries, keys) -> int:
    """Of the forward pass: two products, each with a multiplication and an addition per channel."""
    pairs = sum(nq * nk for nq, nk in zip(queries.lengths, keys.lengths, strict=True))
    return 4 * q.shape[1] * q.shape[2] * pairs


def attention(q, k, v, queries, keys, causal, scale, k_lengths) -> Tensor:
    """ops.attention for what `attention_cannot` has nothing against; queries and keys are Segments that fit."""
    for segments in (queries, keys):
        if segments.cu.device != q.device:
            raise ValueError(f"attention: Segments on {segments.cu.device}, tensors on {q.device}")
    if scale is None:
        scale = q.shape[2] ** -0.5

    # Heads and tokens may lie any way, as in slices of a joint projection; only the channels of a head must be neighbours.
    q = _whole_heads(q)
    k = _whole_heads(k)
    v = _whole_heads(v)
    wanted = q.requires_grad or k.requires_grad or v.requires_grad
    gradients = torch.is_grad_enabled() and wanted
    if k_lengths is not None and gradients:
        raise ValueError("attention: k_lengths is for sampling and has no backward pass")

    # With a single query each, tiles of queries would be nearly empty. Only sampling has such sequences, so the kernel for them
    # has no backward pass.
    one_query_each = len(queries) > 0 and set(queries.lengths) == {1}
    if one_query_each and not gradients:
        return _decode_packed(q, k, v, keys, scale, k_lengths)
    return _Flash.apply(q, k, v, Call(queries, keys, causal, scale))


def _whole_heads(x: Tensor) -> Tensor:
    """x (N, heads, D) with the channels of a head next to each other."""
    if x.stride(2) == 1:
        return x
    return x.contiguous()


def work(rows, across, causal: bool, block: int, side: str) -> list[tuple[int, int, int]]:
    """(rows of the other side to visit, sequence, first row) of every tile of `block` of the rows, which are `side`.

    rows, across: the Segments of queries and keys, or of keys and queries.
    """
    tiles = []
    for s, (n, others) in enumerate(zip(rows.lengths, across.lengths, strict=True)):
        for row in range(0, n, block):
            visits = others
            # Causal, bottom-right: query i reads keys up to i + keys - queries.
            if causal and side == "queries":
                visits = min(others, row + block + others - n)
            if causal and side == "keys":
                visits = min(others, n - row)
            tiles.append((max(0, visits), s, row))
    return tiles


def tile_list(rows, across, causal: bool, block: int, side: str) -> Tensor:
    """(T, 2) int32 on the device: sequence and first row of every tile of `work`. Those with the most to visit come first, so
    that short ones fill the gaps at the end. Kept with `rows` for the next layer."""
    call = across, causal, block, side
    if call in rows.kept:
        return rows.kept[call]
    # Programs start in the order of the list. A long one that starts last would keep the GPU waiting for a single processor.
    longest_first = sorted(work(rows, across, causal, block, side), key=itemgetter(0), reverse=True)
    tiles = [(s, row) for _, s, row in longest_first]
    on_host = torch.tensor(tiles, dtype=torch.int32).view(-1, 2)
    rows.kept[call] = on_host.to(rows.cu.device, non_blocking=True)
    return rows.kept[call]


def quickest(candidates: list[Tiles], rows, across, causal: bool, heads: int, side: str) -> Tiles:
    """The tiles with which all programs of `heads` heads have ended first. Kept with `rows` for the next layer.

    The processors work in waves, and the last wave takes as long as any other, however few programs it has. Large tiles are
    quicker while the GPU is full; small ones leave less of it idle at the end, and of short sequences less of a tile empty.
    """
    if len(candidates) == 1:
        return candidates[0]
    call = across, causal, heads, side, *candidates
    if call not in rows.kept:
        times = [_time(t, rows, across, causal, heads, side) for t in candidates]
        rows.kept[call] = candidates[times.index(min(times))]
    return rows.kept[call]


def _time(t: Tiles, rows, across, causal: bool, heads: int, side: str) -> float:
    """In pairs of query and key that one processor visits, waves of programs as long as the longest."""
    block = t.m if side == "queries" else t.n
    visits = [n + t.pause for n, _, _ in work(rows, across, causal, block, side)]
    longest = max(visits, default=0)
    if longest == 0:
        return 0.0
    # Short programs share a wave with a long one: as many as fill its length. Two that run on one processor at the same time
    # share its speed, and count as two waves.
    programs = heads * sum(visits) / longest
    waves = math.ceil(programs / PROCESSORS)
    return waves * longest * block * t.cost


def _candidates(what: str, x: Tensor) -> list[Tiles]:
    return config(what, _padded(x), x.dtype, _architecture(x.device))


def _padded(x: Tensor) -> int:
    """Channels of a head, as blocks count them."""
    return max(16, triton.next_power_of_2(x.shape[2]))


def _constants(x: Tensor, t: Tiles) -> dict:
    """What a launch with these tiles gets by name."""
    # fp32 means fp32: TF32 would round the factors to ten bits.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    return {
        "D": x.shape[2],
        "DIM": _padded(x),
        "BN": t.n,
        "DOT": precision,
        "num_warps": t.warps,
        "num_stages": t.stages,
    }


def _boxes(x: Tensor, y: Tensor, rows: int) -> tuple:
    """(x, y, True) as descriptors for the TMA unit, which copies `rows` rows of one head at a time; (x, y, False) where there
    is no such unit or it cannot take these strides."""
    # 0, the interpreter, takes descriptors too: so the tests walk the same lines as a Hopper.
    if _architecture(x.device) not in (0, 9) or not _tma_takes(x) or not _tma_takes(y):
        return x, y, False
    box = [rows, 1, _padded(x)]
    x_box = TensorDescriptor(x, list(x.shape), list(x.stride()), box)
    y_box = TensorDescriptor(y, list(y.shape), list(y.stride()), box)
    return x_box, y_box, True


def _tma_takes(x: Tensor) -> bool:
    """It counts in steps of 16 bytes."""
    if len(x) == 0 or x.data_ptr() % 16:
        return False
    # A step of 0, as of an expanded tensor, is none to it.
    for step in x.stride()[:2]:
        if step == 0 or step * x.element_size() % 16:
            return False
    return True


def _strides(*tensors: Tensor) -> list[int]:
    """Of rows and heads, tensor by tensor; along D it is 1."""
    return [step for x in tensors for step in x.stride()[:2]]


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


class Call(NamedTuple):
    """What all kernels of one attention need to know beside the tensors."""

    queries: object  # Segments
    keys: object  # Segments
    causal: bool
    scale: float


def forward(q: Tensor, k: Tensor, v: Tensor, call: Call, t: Tiles | None = None) -> tuple[Tensor, Tensor]:
    """o (Nq, Hq, D) and L (Hq, Nq). t: these tiles, instead of the quickest."""
    heads = q.shape[1]
    o = _contiguous_like(q)
    lse = q.new_empty(heads, len(q), dtype=torch.float32)
    t = t or quickest(_candidates("forward", q), call.queries, call.keys, call.causal, heads, "queries")
    tiles = tile_list(call.queries, call.keys, call.causal, t.m, "queries")
    k_box, v_box, tma = _boxes(k, v, t.n)
    # No tiles where no sequence has a query: o has no rows then.
    if len(tiles):
        with torch.cuda.device_of(q):
            _forward[heads, len(tiles)](
                q, k, v, k_box, v_box, o, lse,
                tiles, call.queries.cu, call.keys.cu, len(q),
                *_strides(q, k, v, o),
                call.scale * LOG2E, heads // k.shape[1],
                CAUSAL=call.causal,
                TMA=tma,
                BM=t.m,
                **_constants(q, t),
            )  # fmt: skip
    return o, lse


def output_sums(o: Tensor, do: Tensor) -> Tensor:
    """delta (Hq, Nq), equation (7), which both kernels of the backward pass read."""
    total, heads, d = o.shape
    delta = o.new_empty(heads, total, dtype=torch.float32)
    if total:
        with torch.cuda.device_of(o):
            _delta[heads, triton.cdiv(total, 64)](
                o, do, delta,
                total,
                *_strides(o, do),
                D=d,
                DIM=_padded(o),
                BM=64,
            )  # fmt: skip
    return delta


def backward_dq(q, k, v, do, lse, delta, call: Call, t: Tiles | None = None) -> Tensor:
    heads = q.shape[1]
    dq = _contiguous_like(q)
    t = t or quickest(_candidates("dq", q), call.queries, call.keys, call.causal, heads, "queries")
    tiles = tile_list(call.queries, call.keys, call.causal, t.m, "queries")
    k_box, v_box, tma = _boxes(k, v, t.n)
    if len(tiles):
        with torch.cuda.device_of(q):
            _backward_dq[heads, len(tiles)](
                q, k, v, k_box, v_box, do, lse, delta, dq,
                tiles, call.queries.cu, call.keys.cu, len(q),
                *_strides(q, k, v, do, dq),
                call.scale * LOG2E, call.scale, heads // k.shape[1],
                CAUSAL=call.causal,
                TMA=tma,
                BM=t.m,
                **_constants(q, t),
            )  # fmt: skip
    return dq


def backward_dkv(q, k, v, do, lse, delta, call: Call, t: Tiles | None = None, by_tma: bool = True) -> tuple[Tensor, Tensor]:
    """by_tma=False: addresses also where descriptors would do."""
    kv_heads = k.shape[1]
    dk = _contiguous_like(k)
    dv = _contiguous_like(v)
    # Here the tiles are of keys.
    t = t or quickest(_candidates("dkv", q), call.keys, call.queries, call.causal, kv_heads, "keys")
    tiles = tile_list(call.keys, call.queries, call.causal, t.n, "keys")
    q_box, do_box, tma = _boxes(q, do, t.m) if by_tma else (q, do, False)
    if len(tiles):
        with torch.cuda.device_of(q):
            _backward_dkv[kv_heads, len(tiles)](
                q, k, v, q_box, do_box, do, lse, delta, dk, dv,
                tiles, call.queries.cu, call.keys.cu, len(q),
                *_strides(q, k, v, do, dk),
                call.scale * LOG2E, call.scale, q.shape[1] // kv_heads,
                CAUSAL=call.causal,
                TMA=tma,
                BM=t.m,
                **_constants(q, t),
            )  # fmt: skip
    return dk, dv


def by_hopper(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return GLUON and hopper.takes(q, k, v)


def best_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    """`forward`, or the same by hopper.py."""
    if by_hopper(q, k, v):
        tiles = tile_list(call.queries, call.keys, call.causal, hopper.QUERIES, "queries")
        return hopper.forward(q, k, v, tiles, call)
    return forward(q, k, v, call)


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, call):
        o, lse = best_forward(q, k, v, call)
        # Neither s nor p is kept: (5) finds p again from q, k and L.
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = call
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        do = _whole_heads(do)
        delta = output_sums(o, do)
        dk, dv = backward_dkv(q, k, v, do, lse, delta, ctx.call)
        dq = backward_dq(q, k, v, do, lse, delta, ctx.call)
        return dq, dk, dv, None


def _decode_packed(q, k, v, sk, scale, k_lengths) -> Tensor:
    """One query per sequence: one launch, or two where one program per KV head and sequence would leave the GPU idle."""
    count, heads, d = q.shape
    kv_heads = k.shape[1]
    group = heads // kv_heads
    (t,) = _candidates("decode", q)
    constants = _constants(q, t)

    # By the longest sequence, or by what a static cache has room for: the lengths themselves may be on the device alone.
    wanted = triton.cdiv(PROGRAMS, count * kv_heads)
    worthwhile = triton.cdiv(sk.longest, SPLIT_KEYS)
    splits = max(1, min(wanted, worthwhile))

    # With one split its result is the result, and nothing reads lse. Parts of a result stay in fp32 until they are joined.
    o = _contiguous_like(q)
    parts = o
    lse = o
    if splits > 1:
        parts = q.new_empty(count * splits, heads, d, dtype=torch.float32)
        lse = q.new_empty(count * splits, heads, dtype=torch.float32)

    # Any tensor will do where the cache is not static: STATIC then leaves out the line that reads it.
    lengths = sk.cu if k_lengths is None else k_lengths
    rows = max(t.m, triton.next_power_of_2(group))
    with torch.cuda.device_of(q):
        _decode[kv_heads, splits, count](
            q, k, v, parts, lse,
            sk.cu, lengths,
            *_strides(q, k, v, parts),
            scale * LOG2E, group,
            STATIC=k_lengths is not None,
            SPLITS=splits,
            ROWS=rows,
            **constants,
        )  # fmt: skip
        if splits > 1:
            _merge[heads, count](
                parts, lse, o,
                *_strides(o), heads,
                D=d,
                DIM=constants["DIM"],
                SPLITS=splits,
                SLOTS=triton.next_power_of_2(splits),
            )  # fmt: skip
    return o


# ------------------------------------------------------------------------------------ between the products: what all share

# The gradient of a gain or a modulation is a sum over tokens: a program sums up to TOKENS of them, PyTorch the programs' sums,
# always in one order. More would be fewer sums to write, but too few programs for the 132 processors of an H100 at 1000 tokens.
TOKENS = 8


def _launch(kernel, grid: tuple[int, ...], x: Tensor, *args, BLOCK: int | None = None, **meta) -> None:
    """Start a kernel whose first argument is x, with a warp for every 512 elements of a row."""
    # 16 elements for each of 32 threads: two loads of 16 bytes in bf16, on their way at the same time.
    if BLOCK is not None:
        meta["BLOCK"] = BLOCK
        meta["num_warps"] = min(16, max(1, BLOCK // 512))
    if 0 in grid:
        return
    # Triton takes the current device, whatever its arguments.
    with torch.cuda.device_of(x):
        kernel[grid](x, *args, **meta)


def _check_rows(*tensors: Tensor | None) -> None:
    # The kernels get the step from row to row, and none inside a row.
    for t in tensors:
        if t is not None and t.stride(-1) != 1:
            raise ValueError(f"fused: {tuple(t.shape)} with strides {t.stride()} has no contiguous rows")


def _step(table: Tensor | None) -> int:
    """From one row of a table to the next; a kernel that has no such table ignores it."""
    return 0 if table is None else table.stride(0)


def _p2(n: int) -> int:
    """Triton's blocks are powers of two."""
    return triton.next_power_of_2(n)


@jit
def _load(at, inside):
    """In fp32; zeros where there is nothing."""
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


# ------------------------------------------------------------------------------------------- the residual stream and its norms
#
# Five functions and one pair of kernels: add, gate, norm, centre and modulate are parts that each of them has or has not.
#
#                          x + y   x + gate y   RMS(.) scale   LN(.) scale + shift       autograd function
#     rms_norm                                        *                                  _Norm
#     modulate                                                          *                _Norm
#     gate_add                         *                                                 _GateAdd
#     add_rms_norm           *                        *                                  _AddNorm
#     gate_add_modulate                *                                *                _AddNorm
#
# In all of them x is a stream (G, n, W), y (G * n, W), and gate, shift, scale are tables (T, 1, W) of which chunk g uses row
# rows[g]. RMSNorm is the case of one chunk, whose table has the gain as its only row.


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _Norm.apply(x[None], None, weight[None, None], None, x.dtype, eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None, dtype: torch.dtype, eps: float) -> Tensor:
    return _Norm.apply(x, shift, scale, rows, dtype, eps)


def gate_add(x: Tensor, gate: Tensor, y: Tensor, rows: Tensor | None) -> Tensor:
    return _GateAdd.apply(x, gate, y, rows)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, delta.dtype)
    s, h = _AddNorm.apply(x[None], None, delta, None, weight[None, None], None, dtype, dtype, eps)
    return s[0], h


def gate_add_modulate(x, gate, y, shift, scale, rows, dtype, eps) -> tuple[Tensor, Tensor]:
    return _AddNorm.apply(x, gate, y, shift, scale, rows, x.dtype, dtype, eps)


class _Norm(torch.autograd.Function):
    """h = LN(x) scale + shift, or without a shift RMS(x) scale: (G * n, W) in dtype."""

    @staticmethod
    def forward(ctx, x, shift, scale, rows, dtype, eps):
        h = _new_rows(x, dtype)
        _launch_add_norm(x, None, None, shift, scale, rows, x, h, eps)
        ctx.save_for_backward(x, shift, scale, rows)
        ctx.eps = eps
        return h

    @staticmethod
    def backward(ctx, dh):
        x, shift, scale, rows = ctx.saved_tensors
        dx, _, parts = _launch_add_norm_backward(
            x, None, dh,
            None, None, shift, scale, rows,
            x.dtype, ctx.eps,
        )  # fmt: skip
        d_shift = _table_gradient(shift, parts[1], rows)
        d_scale = _table_gradient(scale, parts[2], rows)
        return dx, d_shift, d_scale, None, None, None


class _GateAdd(torch.autograd.Function):
    """s = x + gate y: (G, n, W) in x's dtype."""

    @staticmethod
    def forward(ctx, x, gate, y, rows):
        s = torch.empty_like(x)
        _launch_add_norm(x, gate, y, None, None, rows, s, None, 0.0)
        ctx.save_for_backward(s, gate, y, rows)
        return s

    @staticmethod
    def backward(ctx, ds):
        s, gate, y, rows = ctx.saved_tensors
        dx, dy, parts = _launch_add_norm_backward(
            s, ds, None,
            gate, y, None, None, rows,
            s.dtype, 0.0,
        )  # fmt: skip
        d_gate = _table_gradient(gate, parts[0], rows)
        return dx, d_gate, dy, None


class _AddNorm(torch.autograd.Function):
    """s = x + gate y, or x + y, in the type `stream`; h as _Norm makes it of s."""

    @staticmethod
    def forward(ctx, x, gate, y, shift, scale, rows, stream, dtype, eps):
        s = torch.empty_like(x, dtype=stream)
        h = _new_rows(x, dtype)
        _launch_add_norm(x, gate, y, shift, scale, rows, s, h, eps)
        # y is a factor of the gate's gradient alone. Of x and y only their sum is kept: the norm was taken of that.
        kept_y = None if gate is None else y
        ctx.save_for_backward(s, gate, kept_y, shift, scale, rows)
        ctx.eps = eps
        ctx.dtypes = x.dtype, y.dtype
        return s, h

    @staticmethod
    def backward(ctx, ds, dh):
        s, gate, y, shift, scale, rows = ctx.saved_tensors
        x_dtype, y_dtype = ctx.dtypes
        dx, dy, parts = _launch_add_norm_backward(
            s, ds, dh,
            gate, y, shift, scale, rows,
            x_dtype, ctx.eps,
        )  # fmt: skip
        # Without a gate what is added has the gradient of the stream.
        if gate is None:
            dy = dx.to(y_dtype).flatten(0, 1)
        d_gate = _table_gradient(gate, parts[0], rows)
        d_shift = _table_gradient(shift, parts[1], rows)
        d_scale = _table_gradient(scale, parts[2], rows)
        return dx, d_gate, dy, d_shift, d_scale, None, None, None, None


def _new_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Memory for a norm of the stream: (G, n, W) -> (G * n, W)."""
    chunks, n, width = x.shape
    return torch.empty(chunks * n, width, dtype=dtype, device=x.device)


def _table_gradient(table: Tensor | None, part: Tensor, rows: Tensor | None) -> Tensor | None:
    """What the programs summed, (G, splits, W) -> the gradient (T, 1, W) of the table, of which the chunks used `rows`."""
    if table is None:
        return None
    # Two sums, both in a fixed order: first over the programs of a chunk, then over the chunks that used the same row.
    part = part.sum(1)                                                                 # (G, W)
    if rows is not None:
        part = part.new_zeros(len(table), part.shape[1]).index_add_(0, rows, part)     # (T, W)
    return part[:, None].to(table.dtype)


def _launch_add_norm(x, gate, y, shift, scale, rows, s, h, eps) -> None:
    """Write s, if there is a y, and h, if there is a scale. Without a y, the stream that is normed is x itself."""
    _check_rows(gate, shift, scale)
    if not x.is_contiguous() or (y is not None and not y.is_contiguous()):
        raise ValueError("fused: the stream and what is added to it must be contiguous")
    chunks, n, width = x.shape
    # What is None is not read: each combination of parts is a kernel of its own, without a branch in it.
    _launch(
        _add_norm_kernel,
        (chunks * n,),
        x, y, gate, shift, scale, rows, s, h,
        _step(gate), _step(shift), _step(scale),
        n, width, eps,
        ADD=y is not None,
        GATE=gate is not None,
        NORM=scale is not None,
        CENTRE=shift is not None,
        ROWS=rows is not None,
        BLOCK=_p2(width),
    )  # fmt: skip


def _launch_add_norm_backward(s, ds, dh, gate, y, shift, scale, rows, dtype, eps) -> tuple[Tensor, Tensor | None, Tensor]:
    """From the gradients of s and h, where there are such: dx (G, n, W) in dtype, dy (with a gate), and the tables' sums
    (3, G, splits, W) in fp32, of gate, shift and scale."""
    # Autograd hands over gradients as they come: expanded, transposed, or none at all.
    if ds is not None:
        ds = ds.contiguous()
    if dh is not None:
        dh = dh.contiguous()
    chunks, n, width = s.shape
    splits = triton.cdiv(n, TOKENS)
    dx = torch.empty_like(s, dtype=dtype)
    dy = None if gate is None else torch.empty_like(y)
    parts = torch.empty(3, chunks, splits, width, device=s.device)
    _launch(
        _add_norm_backward_kernel,
        (chunks, splits),
        s, ds, dh, y, gate, scale, rows, dx, dy, parts,
        _step(gate), _step(scale),
        n, width, eps,
        TOKENS=TOKENS,
        ADD=ds is not None,
        GATE=gate is not None,
        NORM=dh is not None,
        CENTRE=shift is not None,
        ROWS=rows is not None,
        BLOCK=_p2(width),
    )  # fmt: skip
    return dx, dy, parts


@jit
def _add_norm_kernel(
    x, y, gate, shift, scale, rows, s, h,
    gate_row, shift_row, scale_row,
    n, width, eps,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A token per program: its row stays in registers between the sums over it and their use.

    The tables' rows are shared by the n tokens of a chunk and come out of the L2 cache.
    """
    # 64 bits: tokens times width may pass 2^31.
    token = tl.program_id(0).to(tl.int64)
    # The tables' row: that of the token's chunk.
    m = token // n
    if ROWS:
        m = tl.load(rows + m)
    c = tl.arange(0, BLOCK)
    inside = c < width
    at = token * width + c
    v = _load(x + at, inside)

    # The stream: what a sub-layer has made is added.
    if ADD:
        d = _load(y + at, inside)
        if GATE:
            d *= _load(gate + m * gate_row + c, inside)
        # Rounded as it is stored: the norm is that of what the stream will hold.
        v = (v + d).to(s.dtype.element_ty).to(tl.float32)
        tl.store(s + at, v, inside)

    # Its norm, for the next sub-layer, out of registers: to read s again would be a quarter more bytes.
    if NORM:
        # What lies beyond the row becomes zero again, since it is in the next sum.
        if CENTRE:
            v = tl.where(inside, v - tl.sum(v) / width, 0.0)
        r = tl.rsqrt(tl.sum(v * v) / width + eps)
        v *= r * _load(scale + m * scale_row + c, inside)
        if CENTRE:
            v += _load(shift + m * shift_row + c, inside)
        tl.store(h + at, v, inside)


@jit
def _add_norm_backward_kernel(
    s, ds, dh, y, gate, scale, rows, dx, dy, parts,
    gate_row, scale_row,
    n, width, eps,
    TOKENS: tl.constexpr,
    ADD: tl.constexpr,
    GATE: tl.constexpr,
    NORM: tl.constexpr,
    CENTRE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """With v the normalised row, r = 1 / rms and g = scale dh: ds += r (g - mean(g) - v mean(g v)), RMSNorm without mean(g).

    A program has up to TOKENS tokens of one chunk; what they add to gate, shift and scale it keeps, and writes once.
    """
    chunk = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    m = chunk
    if ROWS:
        m = tl.load(rows + chunk)
    c = tl.arange(0, BLOCK)
    inside = c < width

    # All tokens of a chunk share a row of the tables, so that row's gradient is a sum over them. It stays in registers while
    # the tokens come by.
    to_gate = tl.zeros((BLOCK,), tl.float32)
    to_shift = tl.zeros((BLOCK,), tl.float32)
    to_scale = tl.zeros((BLOCK,), tl.float32)
    for k in range(split * TOKENS, tl.minimum(split * TOKENS + TOKENS, n)):
        at = (chunk * n + k) * width + c
        g = tl.zeros((BLOCK,), tl.float32)
        # Through the norm. v and r are computed again, which costs less than to write and read them.
        if NORM:
            v = _load(s + at, inside)
            if CENTRE:
                v = tl.where(inside, v - tl.sum(v) / width, 0.0)
            r = tl.rsqrt(tl.sum(v * v) / width + eps)
            v *= r
            g = _load(dh + at, inside)
            to_shift += g
            to_scale += g * v
            g *= _load(scale + m * scale_row + c, inside)
            # A norm does not see what is added to all channels alike, nor (but for eps) what multiplies all of them: the
            # gradient's parts in these two directions, along 1 and along v, are taken out.
            if CENTRE:
                g -= tl.sum(g) / width
            along = tl.sum(g * v) / width
            g = r * (g - v * along)
        # What has come along the stream.
        if ADD:
            g += _load(ds + at, inside)
        # Through the product of gate and y.
        if GATE:
            to_gate += g * _load(y + at, inside)
            dy_at = dy + at
            tl.store(dy_at, g * _load(gate + m * gate_row + c, inside), inside)
        tl.store(dx + at, g, inside)

    # parts (3, G, splits, W): of gate, shift, scale. Each program has a place of its own, so nobody waits and no order differs.
    programs = tl.num_programs(0) * tl.num_programs(1)
    out = parts + (chunk * tl.num_programs(1) + split) * width + c
    if GATE:
        tl.store(out, to_gate, inside)
    if CENTRE:
        tl.store(out + programs * width, to_shift, inside)
    if NORM:
        tl.store(out + 2 * programs * width, to_scale, inside)


# --------------------------------------------------------------------------------------------------- norm of heads and rotation


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    return _NormRope.apply(x, weight, eps, cos, sin)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        _check_rows(x, weight, cos, sin)
        if cos is not None:
            cos = cos.contiguous()
            sin = sin.contiguous()
        y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        groups = _groups(weight)
        heads = x.shape[1] // groups
        # x with its own strides: the queries and keys of a joint projection lie between other columns, and are not copied out.
        _launch(
            _norm_rope_kernel,
            (len(x), groups),
            x, weight, cos, sin, y,
            x.stride(0), x.stride(1),
            heads, eps,
            NORM=weight is not None,
            ROPE=cos is not None,
            **_head_blocks(x, groups),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, cos, sin = ctx.saved_tensors
        groups = _groups(weight)
        heads = x.shape[1] // groups
        programs = triton.cdiv(len(x), TOKENS)
        dy = dy.contiguous()
        dx = torch.empty_like(dy)
        # Of the gain every program gives the sum over its tokens; the sum of those follows below.
        dw = None
        if weight is not None:
            dw = torch.empty(programs, groups, x.shape[2], device=x.device)
        _launch(
            _norm_rope_backward_kernel,
            (programs, groups),
            dy, x, weight, cos, sin, dx, dw,
            len(x),
            x.stride(0), x.stride(1),
            heads, ctx.eps,
            NORM=weight is not None,
            ROPE=cos is not None,
            TOKENS=TOKENS,
            **_head_blocks(x, groups),
        )  # fmt: skip
        if weight is not None:
            dw = dw.sum(0).view_as(weight).to(weight.dtype)
        return dx, dw, None, None, None


def _groups(weight: Tensor | None) -> int:
    """Groups of heads with a gain each."""
    if weight is not None and weight.ndim == 2:
        return len(weight)
    return 1


def _head_blocks(x: Tensor, groups: int) -> dict[str, int]:
    """A group's heads of a token, their channels in two halves, with a warp for every 256 pairs.

    HALF is a constant so that the compiler sees that rows of 80 channels, too, can be read 16 bytes at a time.
    """
    _, heads, dim = x.shape
    h = _p2(heads // groups)
    d = _p2(dim // 2)
    return {
        "HALF": dim // 2,
        "BLOCK_H": h,
        "BLOCK_D": d,
        "num_warps": min(8, max(1, h * d // 256)),
    }


@jit
def _norm_rope_kernel(
    x, w, cos, sin, y,
    x_row, x_head,
    heads, eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program has one token's heads of one group; a holds channels i, b channels i + D/2, so the swap costs nothing."""
    token = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    inside = (h < heads) & (c < HALF)
    row = c < HALF
    head = group * heads + h
    at = x + token * x_row + head * x_head + c
    a = _load(at, inside)
    b = _load(at + HALF, inside)

    # Each head has a norm of its own, over both halves of its channels; the heads of a group share the gain.
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        r = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
        gain = w + group * 2 * HALF + c
        a = a * r * _load(gain, row)
        b = b * r * _load(gain + HALF, row)

    # Channel i turns with channel i + D/2, which is at hand. The table has the sign: its first half holds -sin.
    if ROPE:
        t = token * 2 * HALF + c
        turned = a * _load(cos + t, row) + b * _load(sin + t, row)
        b = b * _load(cos + t + HALF, row) + a * _load(sin + t + HALF, row)
        a = turned

    # Contiguous, whatever x was: attention reads it next.
    out = y + (token * tl.num_programs(1) * heads + head) * 2 * HALF + c
    tl.store(out, a, inside)
    tl.store(out + HALF, b, inside)


@jit
def _norm_rope_backward_kernel(
    dy, x, w, cos, sin, dx, dw,
    tokens,
    x_row, x_head,
    heads, eps,
    NORM: tl.constexpr,
    ROPE: tl.constexpr,
    TOKENS: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rotation turned back, then the gradient of the norm as in _add_norm_backward_kernel, r computed again from x."""
    first = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1)
    h = tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_D)[None, :]
    row = c < HALF
    inside = (h < heads) & row
    head = group * heads + h
    total_a = tl.zeros((1, BLOCK_D), tl.float32)
    total_b = tl.zeros((1, BLOCK_D), tl.float32)
    for token in range(first * TOKENS, tl.minimum(first * TOKENS + TOKENS, tokens)):
        at = (token * tl.num_programs(1) * heads + head) * 2 * HALF + c
        ga = _load(dy + at, inside)
        gb = _load(dy + at + HALF, inside)
        # The transpose of the rotation: each factor of sin is that of the half which the number went to.
        if ROPE:
            t = token * 2 * HALF + c
            turned = ga * _load(cos + t, row) + gb * _load(sin + t + HALF, row)
            gb = gb * _load(cos + t + HALF, row) + ga * _load(sin + t, row)
            ga = turned
        if NORM:
            a = _load(x + token * x_row + head * x_head + c, inside)
            b = _load(x + token * x_row + head * x_head + c + HALF, inside)
            squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
            r = tl.rsqrt(squares / (2 * HALF) + eps)[:, None]
            a = a * r
            b = b * r
            # The gain's gradient: over all heads of the group at once, over the tokens one by one.
            total_a += tl.sum(ga * a, 0)[None, :]
            total_b += tl.sum(gb * b, 0)[None, :]
            ga = ga * _load(w + group * 2 * HALF + c, row)
            gb = gb * _load(w + group * 2 * HALF + c + HALF, row)
            along = tl.sum(ga * a, 1) + tl.sum(gb * b, 1)
            mean = (along / (2 * HALF))[:, None]
            ga = r * (ga - a * mean)
            gb = r * (gb - b * mean)
        tl.store(dx + at, ga, inside)
        tl.store(dx + at + HALF, gb, inside)
    if NORM:
        out = dw + (first * tl.num_programs(1) + group) * 2 * HALF + c
        tl.store(out, total_a, row)
        tl.store(out + HALF, total_b, row)


def rope_append(qkv, cos, sin, k_cache, v_cache, slots, heads) -> Tensor:
    kv_heads, dim = k_cache.shape[1:]
    _check_rows(qkv, cos, sin)
    # Rows may be far apart, as those of one layer in a cache of all; inside a row head follows head.
    rows_whole = k_cache[:1].is_contiguous() and v_cache[:1].is_contiguous()
    if not (rows_whole and k_cache.dtype == v_cache.dtype):
        raise ValueError("fused: the rows of the cache must be contiguous, keys and values of one dtype")
    q = torch.empty(len(qkv), heads, dim, dtype=k_cache.dtype, device=qkv.device)
    _launch(
        _rope_append_kernel,
        (len(qkv), heads + 2 * kv_heads),
        qkv, cos, sin, q, k_cache, v_cache, slots,
        qkv.stride(0),
        cos.stride(0),
        sin.stride(0),
        k_cache.stride(0),
        v_cache.stride(0),
        heads, kv_heads,
        HALF=dim // 2,
        BLOCK=_p2(dim // 2),
    )  # fmt: skip
    return q


@jit
def _rope_append_kernel(
    qkv, cos, sin, q, k, v, slots,
    row, cos_row, sin_row, k_row, v_row,
    heads, kv_heads,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One head per program: with a single token there is nothing else to share among the processors."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside = c < HALF
    at = qkv + token * row + head * 2 * HALF + c
    a = _load(at, inside)
    b = _load(at + HALF, inside)
    # From the device: a recorded graph then writes to a new row in every replay.
    slot = tl.load(slots + token)

    # A head of the values goes into the cache as it is, one of the keys turned; one of the queries into q.
    if head >= heads + kv_heads:
        out = v + slot * v_row + (head - heads - kv_heads) * 2 * HALF + c
        tl.store(out, a, inside)
        tl.store(out + HALF, b, inside)
    else:
        cos_at = cos + token * cos_row + c
        sin_at = sin + token * sin_row + c
        turned = a * _load(cos_at, inside) + b * _load(sin_at, inside)
        b = b * _load(cos_at + HALF, inside) + a * _load(sin_at + HALF, inside)
        out = q + (token * heads + head) * 2 * HALF + c
        if head >= heads:
            out = k + slot * k_row + (head - heads) * 2 * HALF + c
        tl.store(out, turned, inside)
        tl.store(out + HALF, b, inside)


# ----------------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate: Tensor, up: Tensor | None) -> Tensor:
    return _SwiGLU.apply(gate, up)


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input; backward computes silu again and fills one buffer, so the projection's gradient needs no cat."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        g, u = _halves(gate, up)                                                       # (N, F) each
        _check_rows(g, u)
        n, width = g.shape
        y = torch.empty(n, width, dtype=g.dtype, device=g.device)
        # No sum runs along a row here, so rows are cut into pieces of any length.
        _launch(
            _swiglu_kernel,
            (n, triton.cdiv(width, 1024)),
            g, u, y,
            g.stride(0), u.stride(0),
            width,
            BLOCK=1024,
        )  # fmt: skip
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dy = dy.contiguous()
        # Laid out as the input is: with gate and up in one buffer, both gradients are written into one, too.
        d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        d_up = None
        if up is not None:
            d_up = torch.empty(up.shape, dtype=up.dtype, device=up.device)
        g, u = _halves(gate, up)
        dg, du = _halves(d_gate, d_up)
        n, width = g.shape
        _launch(
            _swiglu_backward_kernel,
            (n, triton.cdiv(width, 1024)),
            dy, g, u, dg, du,
            g.stride(0), u.stride(0), dg.stride(0), du.stride(0),
            width,
            BLOCK=1024,
        )  # fmt: skip
        return d_gate, d_up


def _halves(gate: Tensor, up: Tensor | None) -> tuple[Tensor, Tensor]:
    """Without an up both are in gate (N, 2 F), side by side."""
    if up is None:
        return gate.chunk(2, -1)
    return gate, up


@jit
def _swiglu_kernel(
    gate, up, y,
    g_row, u_row,
    width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """y = silu(g) u for a piece of one row, with silu(g) = g sigmoid(g)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    g = _load(gate + row * g_row + c, inside)
    u = _load(up + row * u_row + c, inside)
    tl.store(y + row * width + c, g * tl.sigmoid(g) * u, inside)


@jit
def _swiglu_backward_kernel(
    dy, gate, up, dg, du,
    g_row, u_row, dg_row, du_row,
    width,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """du = dy silu(g), and dg = dy u silu'(g)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    d = _load(dy + row * width + c, inside)
    g = _load(gate + row * g_row + c, inside)
    u = _load(up + row * u_row + c, inside)
    # silu'(g) = sigma + g sigma', and the sigmoid's derivative is sigma (1 - sigma).
    sigma = tl.sigmoid(g)
    dg_at = dg + row * dg_row + c
    tl.store(dg_at, d * u * sigma * (1 + g * (1 - sigma)), inside)
    tl.store(du + row * du_row + c, d * g * sigma, inside)


# A decoding step has one token for each document. Its products read every weight once and multiply it with next to nothing:
# what they take is the time of reading, and what lies between them is the time of launching. So the norm before the MLP is
# computed anew by every program, from a few KB that stay in the L2 cache, and SwiGLU is applied to what a program has just
# summed. The product comes before 1 / rms, so fp16, which ends at 65,504, might overflow: it takes the separate steps.

FEW = 16  # tokens; the smallest side of a product on the tensor cores
FEW_AT_ONCE = False  # True: decoding takes this kernel. No GPU has run it yet; the bench's group "fused" measures it


def add_norm_swiglu(x: Tensor, delta: Tensor, gain: Tensor, eps: float, weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (2 F, W): the rows of the gate, then those of up."""
    n, width = x.shape
    inner = len(weight) // 2
    _check_rows(x, delta, weight)
    s = torch.empty(n, width, dtype=x.dtype, device=x.device)
    y = torch.empty(n, inner, dtype=x.dtype, device=x.device)
    # 16 columns of gate and up: a thousand programs for an MLP of 18,944, each with four tiles of both on their way.
    cols = 16
    grid = (triton.cdiv(inner, cols),)
    _launch(
        _add_norm_swiglu_kernel,
        grid,
        x, delta, gain, weight, s, y,
        x.stride(0), delta.stride(0), weight.stride(0),
        n, width, inner, eps,
        FEW=FEW,
        COLS=cols,
        PIECE=min(256, max(16, _p2(width))),
        DOT="ieee",
        num_warps=4,
        num_stages=4,
    )  # fmt: skip
    return s, y


@jit
def _add_norm_swiglu_kernel(
    x, delta, gain, weight, s, y,
    x_row, d_row, w_row,
    n, width, inner, eps,
    FEW: tl.constexpr,
    COLS: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
):  # fmt: skip
    """COLS channels of the MLP for all of at most FEW tokens. The first program also writes the sum.

    One walk over the width serves the norm, too: its 1 / rms is one number for a token, by which what was summed is multiplied.
    """
    rows = tl.arange(0, FEW)
    here = (rows < n)[:, None]
    c = tl.program_id(0) * COLS + tl.arange(0, COLS)
    real = (c < inner)[:, None]
    gates = weight + c.to(tl.int64)[:, None] * w_row
    ups = gates + tl.cast(inner, tl.int64) * w_row

    squares = tl.zeros((FEW, PIECE), tl.float32)
    g = tl.zeros((FEW, COLS), tl.float32)
    u = tl.zeros((FEW, COLS), tl.float32)
    for begin in range(0, width, PIECE):
        k = begin + tl.arange(0, PIECE)
        in_row = (k < width)[None, :]

        # The stream, rounded as it is stored: the norm is that of what it will hold.
        t = _load(x + rows[:, None] * x_row + k[None, :], here & in_row)
        t += _load(delta + rows[:, None] * d_row + k[None, :], here & in_row)
        t = t.to(s.dtype.element_ty)
        if tl.program_id(0) == 0:
            tl.store(s + rows[:, None] * width + k[None, :], t, here & in_row)

        f = t.to(tl.float32)
        squares += f * f
        h = (f * _load(gain + k, k < width)[None, :]).to(t.dtype)
        a = tl.load(gates + k[None, :], real & in_row, other=0.0)  # (COLS, PIECE)
        b = tl.load(ups + k[None, :], real & in_row, other=0.0)
        g = tl.dot(h, tl.trans(a), g, input_precision=DOT)
        u = tl.dot(h, tl.trans(b), u, input_precision=DOT)

    # Both are rounded where a projection of its own would round them.
    r = tl.rsqrt(tl.sum(squares, 1) / width + eps)[:, None]
    g = (g * r).to(y.dtype.element_ty).to(tl.float32)
    u = (u * r).to(y.dtype.element_ty).to(tl.float32)
    at = y + rows[:, None] * inner + c[None, :]
    tl.store(at, g * tl.sigmoid(g) * u, here & (c < inner)[None, :])


# --------------------------------------------------------------------------------------------------------- connector and loss


def standardise_into(out: Tensor, h: Tensor) -> None:
    _check_rows(out, h)
    n, width = h.shape
    # out is a slice of the connector's wide input: one layer of the MLLM among all.
    _launch(
        _standardise_kernel,
        (n,),
        h, out,
        h.stride(0), out.stride(0),
        width,
        BLOCK=_p2(width),
    )  # fmt: skip


@jit
def _standardise_kernel(h, out, h_row, out_row, width, BLOCK: tl.constexpr):
    """(h - mean) / (std + 1e-8) of one token."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    v = _load(h + row * h_row + c, c < width)
    # The mean first, then the squares of what is left: E[h^2] - E[h]^2 would lose its digits where the mean is large.
    v = tl.where(c < width, v - tl.sum(v) / width, 0.0)
    std = tl.sqrt(tl.sum(v * v) / (width - 1))
    tl.store(out + row * out_row + c, v / (std + 1e-8), c < width)


def softmax_gradient(logits: Tensor, labels: Tensor, grad: bool) -> Tensor:
    """Losses (C,) of logits (C, V); with grad, softmax - onehot in place of the logits."""
    loss = torch.empty(len(logits), device=logits.device)                              # (C,)
    # A vocabulary is far longer than a block: a program walks along its row in steps of one.
    _launch(
        _softmax_gradient_kernel,
        (len(logits),),
        logits, labels, loss,
        logits.shape[1],
        GRAD=grad,
        BLOCK=4096,
    )  # fmt: skip
    return loss


@jit
def _softmax_gradient_kernel(logits, labels, loss, vocab, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One token's loss, and in place of its logits their gradient: two reads and one write of what PyTorch moves ten times."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    label = tl.load(labels + token)
    row = logits + token * vocab
    # Read here: the sums below make all threads wait for each other, and behind them the logits are overwritten.
    own = tl.load(row + tl.maximum(label, 0)).to(tl.float32)

    # Each of BLOCK columns keeps a maximum and a sum under it, as in attention's equations (1) to (3), joined at the end.
    top = tl.full((BLOCK,), -1e30, tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        v = tl.load(row + start + c, start + c < vocab, -1e30).to(tl.float32)
        higher = tl.maximum(top, v)
        total = total * tl.exp(top - higher) + tl.exp(v - higher)
        top = higher
    highest = tl.max(top, 0)
    z = tl.sum(total * tl.exp(top - highest), 0)
    log_z = highest + tl.log(z)

    # -log softmax of the label's logit. A negative label marks a token that is no target.
    tl.store(loss + token, tl.where(label >= 0, log_z - own, 0.0))

    # The derivative of log_z by a logit is its softmax, that of own is 1 at the label.
    if GRAD:
        for start in range(0, vocab, BLOCK):
            v = tl.load(row + start + c, start + c < vocab, -1e30).to(tl.float32)
            d = tl.exp(v - log_z) - tl.where(start + c == label, 1.0, 0.0)
            tl.store(row + start + c, tl.where(label >= 0, d, 0.0), start + c < vocab)
