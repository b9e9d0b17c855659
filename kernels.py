"""Attention over packed sequences, by hand: the one entry that every model in this repository calls, and how it is computed.

Sequences of different lengths lie one behind the other without padding; Segments holds where they begin, as in FlashAttention's
varlen interface (Dao, arXiv 2307.08691). No token ever attends outside its own sequence.

    attention(q, k, v, segments)                                     bidirectional: vision tower, DiT
    attention(q, k, v, segments, causal=True)                        the MLLM, training and prompt
    attention(q, k, v, queries, keys)                                cross-attention
    attention(q, k, v, queries, buffers, k_lengths=lengths)          one token against a static KV cache

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

dK and dV sum over queries, dQ sums over keys. Two kernels, each of which owns what it sums, compute s and dp twice (7 products
instead of 5) but add in a fixed order: equal bits every time. With deterministic=False one kernel does all 5 and adds its share
of dQ to memory in whatever order programs finish.

Decoding has one query per sequence: there is nothing to tile but the query heads of one KV head, which read the same keys. One
program per KV head would leave the GPU idle, so each takes a share of the keys and a second kernel joins the shares by their L.

Why the numbers in HOPPER. tests/aot_sm90.json lists what each of them compiles to; `make aot` shows what a change does.
* Tensor cores there take their operands from warp groups (4 warps, 64 rows each): 8 warps share a tile of 128 rows. In 4 warps
  the same accumulators would take twice the registers of each thread, and the 255 there are would spill to memory.
* forward: k and v are read once per query tile, so many queries; 128 keys make each product long enough to hide the 2^x.
  Two stages (three for D = 64) of k and v beside q stay under the 227 KiB of shared memory.
* dkv: two accumulators of (BN, D) instead of one, hence 64 queries, and one stage: a second would spill. One loop whose mask is
  a compare, for a loop without and one with a mask inside the loop over heads would spill too.
* dq: s and dp are alive at once, hence 64 keys for D = 128. onepass: holds dq as well, and for D = 128 spills a few registers.
* decode: 16 rows are the smallest product there is, and 7 heads fit; the memory is the limit, three stages keep it busy.
* Causal changes no size, it shortens walks. D = 80 runs in the tiles of 128: its zero columns are multiplied but never read.

Whole tiles of k and v are copied by Hopper's TMA unit, which saves the loop its address arithmetic; edges go by pointers, since
a box would reach into the next sequence, and a NaN there times p = 0 is NaN. Not used: warp specialisation, which Triton 3.6
compiles for some of these loops and breaks for others, and Gluon, which has no interpreter to test with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import sdpa
from checkpoint import InputError

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # no wheels for macOS and Windows: there the PyTorch path is the only one
    triton = None

INTERPRETED = bool(triton and triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 as this file is read: kernels run on the CPU
NEVER = tl.constexpr(-1e30) if triton else None  # below every score; finite, so that NEVER - NEVER is 0 and not NaN
BACKENDS = ("auto", "triton", "sdpa")

class Segments:
    """Lengths of packed sequences, known on both sides, so that no call reads them back from the device.

    Built once per batch and handed to every layer. lengths: tokens of each sequence, on the host.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = tuple(int(n) for n in lengths)
        bounds = [0]
        for n in self.lengths:
            bounds.append(bounds[-1] + n)
        self.bounds = tuple(bounds)
        self.longest = max(self.lengths, default=0)
        # non_blocking: the host need not wait for what the device has queued before.
        self.cu = torch.tensor(bounds, dtype=torch.int32).to(device, non_blocking=True)  # (S + 1,)

        self._tiles = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return self.bounds[-1]

    def tiles(self, other: Segments, causal: bool, block: int, side: str) -> Tensor:
        """(T, 2) int32 on the device: sequence and first row of every tile of `block` of these rows, which are `side`.

        Those with the most rows of `other` to visit come first, so that short ones fill the gaps at the end. Kept for the next
        layer.
        """
        key = id(other), causal, block, side
        kept = self._tiles.get(key)
        if kept is None or kept[0] is not other:  # an id can be used again
            work = []
            for s, (n, across) in enumerate(zip(self.lengths, other.lengths, strict=True)):
                for row in range(0, n, block):
                    # Causal, bottom-right: query i reads keys up to i + keys - queries.
                    seen = min(across, row + block + across - n if side == "queries" else n - row)
                    work.append((max(0, seen if causal else across), s, row))
            work.sort(key=lambda tile: -tile[0])
            tiles = torch.tensor([tile[1:] for tile in work], dtype=torch.int32).view(-1, 2)
            kept = self._tiles[key] = other, tiles.to(self.cu.device, non_blocking=True)
        return kept[1]

    @classmethod
    def of(cls, cu: Segments | Tensor, device: torch.device | str = "cpu") -> Segments:
        """From boundaries (S+1,). A tensor is read back, which on a GPU waits for all work queued before it."""
        if isinstance(cu, Segments):
            return cu
        bounds = cu.tolist()
        return cls([b - a for a, b in zip(bounds, bounds[1:], strict=False)], device)


_backend = "auto"


def set_backend(name: str, device: torch.device | None = None) -> None:
    """Which attention the whole process uses: "triton" (an error where the kernels cannot), "sdpa" (PyTorch's), or "auto".

    auto: the kernels for 16-bit tensors of a supported head dim on a GPU; sdpa for all else. Given the device of the models,
    what cannot work there is told before they are loaded.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"attention {name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" and triton is None:
        raise InputError("attention 'triton': the package triton is not installed; choose sdpa")
    if name == "triton" and device is not None and device.type != ("cpu" if INTERPRETED else "cuda"):
        raise InputError(f"attention 'triton': its kernels need an NVIDIA GPU, and the device is {device}: choose auto or sdpa")
    _backend = name


def get_backend() -> str:
    return _backend


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_q: Segments | Tensor,
    cu_k: Segments | Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    deterministic: bool = True,
    k_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention inside each packed sequence.

    q: (Nq, Hq, D); k, v: (Nk, Hkv, D) with Hq a multiple of Hkv (query heads g*r .. g*r+r-1 read KV head g); cu_q, cu_k: their
    Segments, or (S+1,) integer boundaries, which are then read back; cu_k defaults to cu_q. `causal` aligns the last query
    with the last key, which is what a KV cache needs. A query without any key gives zeros. Returns (Nq, Hq, D). `scale`
    defaults to D**-0.5.

    k_lengths (S,) int32 on the device serves a static KV cache: of each of the S equally large buffers in k and v only the
    first k_lengths[s] rows count, and each sequence has one query. Its values may change between replays of a CUDA graph.
    backend overrides `set_backend` for this call.
    """
    sq, sk = Segments.of(cu_q, q.device), Segments.of(cu_q if cu_k is None else cu_k, q.device)
    if len(sq) != len(sk):
        raise ValueError(f"attention: {len(sq)} query sequences but {len(sk)} key sequences")
    if sq.total != q.shape[0] or sk.total != k.shape[0] or k.shape != v.shape:
        raise ValueError(f"attention: boundaries {sq.total}, {sk.total} do not fit q {tuple(q.shape)}, k {tuple(k.shape)}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if k_lengths is not None and (len(k_lengths) != len(sk) or sk.longest * len(sk) != sk.total or sq.total != len(sq)):
        raise ValueError("attention: k_lengths needs one length per sequence, buffers of one size and one query each")
    choice = backend or _backend
    if choice != "sdpa":
        why_not = _unsupported(q, k, v, scale)
        if why_not and choice == "triton":
            raise InputError(f"attention 'triton': {why_not}")
        if not why_not and (choice == "triton" or q.device.type == "cuda" and q.dtype != torch.float32):
            return _triton_packed(q, k, v, sq, sk, causal, scale, deterministic, k_lengths)
    return sdpa.attention(q, k, v, sq, sk, causal, scale, k_lengths)


# ------------------------------------------------------------------------------------------------------- Triton: the kernels


def _jit(function):
    """triton.jit, or the bare function where there is no Triton and nothing will call it."""
    return triton.jit(function) if triton else function


@_jit
def _segment(CU, s):
    start = tl.load(CU + s)
    return start, tl.load(CU + s + 1) - start


@_jit
def _tile(pointer, first, stride, rows, dims):
    """Addresses of (rows, dims) counted from row `first`. first * stride can pass 2**31, an offset inside a tile cannot."""
    return pointer + tl.cast(first, tl.int64) * stride + (rows[:, None] * stride + dims[None, :])


@_jit
def _read(pointer, first, stride, left, rows, dims, RAGGED: tl.constexpr, D: tl.constexpr):
    """A tile; rows from `left` on (another sequence's) and columns from D on become zeros. RAGGED: there may be such rows."""
    at = _tile(pointer, first, stride, rows, dims)
    if RAGGED:
        return tl.load(at, mask=(rows < left)[:, None] & (dims < D)[None, :], other=0.0)
    elif D != dims.shape[0]:
        return tl.load(at, mask=(dims < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@_jit
def _keys(pointer, box, head, first, stride, left, rows, dims, RAGGED: tl.constexpr, TMA: tl.constexpr, D: tl.constexpr):
    """A tile of keys or values of one head. Whole ones are copied by the TMA unit, which needs no address from any thread."""
    if TMA and not RAGGED:
        return box.load([first, head, 0]).reshape(rows.shape[0], dims.shape[0])
    else:
        return _read(pointer, first, stride, left, rows, dims, RAGGED, D)


@_jit
def _forward_step(
    acc, l, m, q, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (4) for one tile of keys. last (BM,): the last key that each query reads."""
    cols, dims = tl.arange(0, BN), tl.arange(0, DIM)
    k = _keys(K, k_box, kv_head, k0 + n, sk, nk - n, cols, dims, MASKED, TMA, D)
    s = tl.dot(q, tl.trans(k), input_precision=DOT)  # (BM, BN)
    if MASKED:
        seen = (n + cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (n + cols[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(m - higher)
    v = _keys(V, v_box, kv_head, k0 + n, sv, nk - n, cols, dims, MASKED, TMA, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=DOT)
    return acc, l * shrink + tl.sum(p, 1), higher


@_jit
def _forward(
    Q, K, V, k_box, v_box, O, LSE, TILES, CU_Q, CU_K, total, sq, hq, sk, hk, sv, hv, so, ho, scale, group,
    CAUSAL: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head over all keys that it sees. Grid (query heads, tiles): the heads of one tile run at
    the same time, so that a key tile comes from memory once and for the rest of its group from the L2 cache."""
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s, m0 = tl.load(tile), tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    kv_head = head // group
    K += kv_head * hk
    V += kv_head * hv
    q = _read(Q + head * hq, q0 + m0, sq, nq - m0, rows, dims, True, D)
    last = m0 + rows + (nk - nq)
    # Keys before `whole` are read by every query of the tile, in tiles without any mask; keys from `end` on by none.
    whole, end = nk, nk
    if CAUSAL:
        whole = tl.maximum(tl.minimum(nk, m0 + nk - nq + 1), 0)
        end = tl.maximum(tl.minimum(nk, m0 + BM + nk - nq), 0)
    whole = whole // BN * BN
    m = tl.full((BM,), NEVER, tl.float32)
    l = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DIM), tl.float32)
    for n in range(0, whole, BN):
        acc, l, m = _forward_step(
            acc, l, m, q, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
            False, CAUSAL, TMA, D, DIM, BN, DOT)  # fmt: skip
    for n in range(whole, end, BN):
        acc, l, m = _forward_step(
            acc, l, m, q, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
            True, CAUSAL, TMA, D, DIM, BN, DOT)  # fmt: skip
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    real = rows < nq - m0
    tl.store(_tile(O + head * ho, q0 + m0, so, rows, dims), o.to(O.dtype.element_ty), mask=real[:, None] & (dims < D)[None, :])
    # +inf for a query without any key makes every p of its row 0 in the backward pass.
    tl.store(LSE + head * total + q0 + m0 + rows, tl.where(l == 0.0, float("inf"), m + tl.log2(l)), mask=real)


@_jit
def _delta(O, DO, DELTA, total, so, ho, sd, hd, D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr):
    """delta_i = dO_i . O_i, equation (7), for BM rows of one head; sequences do not matter here."""
    head, m0 = tl.program_id(0), tl.program_id(1) * BM
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    o = _read(O + head * ho, m0, so, total - m0, rows, dims, True, D).to(tl.float32)
    do = _read(DO + head * hd, m0, sd, total - m0, rows, dims, True, D).to(tl.float32)
    tl.store(DELTA + head * total + m0 + rows, tl.sum(o * do, 1), mask=rows < total - m0)


@_jit
def _dq_step(
    dq, q, do, lse, delta, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    cols, dims = tl.arange(0, BN), tl.arange(0, DIM)
    k = _keys(K, k_box, kv_head, k0 + n, sk, nk - n, cols, dims, MASKED, TMA, D)
    v = _keys(V, v_box, kv_head, k0 + n, sv, nk - n, cols, dims, MASKED, TMA, D)
    p = tl.exp2(tl.dot(q, tl.trans(k), input_precision=DOT) * scale - lse[:, None])  # (BM, BN)
    if MASKED:
        seen = (n + cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (n + cols[None, :] <= last[:, None])
        p = tl.where(seen, p, 0.0)
    ds = p * (tl.dot(do, tl.trans(v), input_precision=DOT) - delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision=DOT)


@_jit
def _backward_dq(
    Q, K, V, k_box, v_box, DO, LSE, DELTA, DQ, TILES, CU_Q, CU_K, total,
    sq, hq, sk, hk, sv, hv, sd, hd, sg, hg, scale, scale_grad, group,
    CAUSAL: tl.constexpr, TMA: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries, equation (9): the same walk over the keys as in the forward pass."""
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s, m0 = tl.load(tile), tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    real = rows < nq - m0
    kv_head = head // group
    K += kv_head * hk
    V += kv_head * hv
    q = _read(Q + head * hq, q0 + m0, sq, nq - m0, rows, dims, True, D)
    do = _read(DO + head * hd, q0 + m0, sd, nq - m0, rows, dims, True, D)
    lse = tl.load(LSE + head * total + q0 + m0 + rows, mask=real, other=float("inf"))
    delta = tl.load(DELTA + head * total + q0 + m0 + rows, mask=real, other=0.0)
    last = m0 + rows + (nk - nq)
    whole, end = nk, nk
    if CAUSAL:
        whole = tl.maximum(tl.minimum(nk, m0 + nk - nq + 1), 0)
        end = tl.maximum(tl.minimum(nk, m0 + BM + nk - nq), 0)
    whole = whole // BN * BN
    dq = tl.zeros((BM, DIM), tl.float32)
    for n in range(0, whole, BN):
        dq = _dq_step(
            dq, q, do, lse, delta, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
            False, CAUSAL, TMA, D, DIM, BN, DOT)  # fmt: skip
    for n in range(whole, end, BN):
        dq = _dq_step(
            dq, q, do, lse, delta, K, V, k_box, v_box, kv_head, k0, n, nk, last, sk, sv, scale,
            True, CAUSAL, TMA, D, DIM, BN, DOT)  # fmt: skip
    at = _tile(DQ + head * hg, q0 + m0, sg, rows, dims)
    tl.store(at, (dq * scale_grad).to(DQ.dtype.element_ty), mask=real[:, None] & (dims < D)[None, :])


@_jit
def _dkv_step(
    dk, dv, k, v, Q, DO, LSE, DELTA, DQ, q0, m, nq, first, sq, sd, sg, scale, scale_grad,
    MASKED: tl.constexpr, DQ_TOO: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Equations (5) to (8) for one tile of queries, all transposed: scores are (BN, BM), so that p and ds are left operands
    and stay in registers. first (BN,): the first query that reads each key."""
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    real = rows < nq - m
    q = _read(Q, q0 + m, sq, nq - m, rows, dims, True, D)
    lse = tl.load(LSE + q0 + m + rows, mask=real, other=float("inf"))  # p = 0 in rows that are not there
    p = tl.exp2(tl.dot(k, tl.trans(q), input_precision=DOT) * scale - lse[None, :])
    if MASKED:
        p = tl.where(m + rows[None, :] >= first[:, None], p, 0.0)
    do = _read(DO, q0 + m, sd, nq - m, rows, dims, True, D)
    dv = tl.dot(p.to(do.dtype), do, dv, input_precision=DOT)
    delta = tl.load(DELTA + q0 + m + rows, mask=real, other=0.0)
    ds = (p * (tl.dot(v, tl.trans(do), input_precision=DOT) - delta[None, :])).to(q.dtype)
    dk = tl.dot(ds, q, dk, input_precision=DOT)
    if DQ_TOO:
        dq = tl.dot(tl.trans(ds), k, input_precision=DOT) * scale_grad
        tl.atomic_add(_tile(DQ, q0 + m, sg, rows, dims), dq, mask=real[:, None] & (dims < D)[None, :], sem="relaxed")
    return dk, dv


@_jit
def _backward_dkv(
    Q, K, V, DO, LSE, DELTA, DQ, DK, DV, TILES, CU_Q, CU_K, total,
    sq, hq, sk, hk, sv, hv, sd, hd, sg, hg, sgk, hgk, scale, scale_grad, group,
    CAUSAL: tl.constexpr, DQ_TOO: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one KV head, equations (6) and (8), over the queries of all heads that read it: one program
    owns its sums, so their order is fixed. With DQ_TOO the tile's share of dQ goes to fp32 memory by atomic additions."""
    kv_head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s, n0 = tl.load(tile), tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    cols, dims = tl.arange(0, BN), tl.arange(0, DIM)
    k = _read(K + kv_head * hk, k0 + n0, sk, nk - n0, cols, dims, True, D)
    v = _read(V + kv_head * hv, k0 + n0, sv, nk - n0, cols, dims, True, D)
    first = n0 + cols - (nk - nq)
    start = 0
    if CAUSAL:  # no query before reads any of these keys
        start = tl.maximum(n0 - (nk - nq), 0) // BM * BM
    dk = tl.zeros((BN, DIM), tl.float32)
    dv = tl.zeros((BN, DIM), tl.float32)
    for head in range(kv_head * group, kv_head * group + group):
        q, do, dq = Q + head * hq, DO + head * hd, DQ + head * hg
        lse, delta = LSE + head * total, DELTA + head * total
        for m in range(start, nq, BM):
            dk, dv = _dkv_step(
                dk, dv, k, v, q, do, lse, delta, dq, q0, m, nq, first, sq, sd, sg, scale, scale_grad,
                CAUSAL, DQ_TOO, D, DIM, BM, DOT)  # fmt: skip
    inside = (cols < nk - n0)[:, None] & (dims < D)[None, :]
    tl.store(_tile(DK + kv_head * hgk, k0 + n0, sgk, cols, dims), (dk * scale_grad).to(DK.dtype.element_ty), mask=inside)
    tl.store(_tile(DV + kv_head * hgk, k0 + n0, sgk, cols, dims), dv.to(DV.dtype.element_ty), mask=inside)


@_jit
def _decode(
    Q, K, V, O, LSE, CU_K, K_LENGTHS, sq, hq, sk, hk, sv, hv, so, ho, scale, group,
    STATIC: tl.constexpr, SPLITS: tl.constexpr,
    D: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One query per sequence: a tile holds the query heads of one KV head, which read the same keys. Grid (KV heads, splits,
    sequences). Each split takes an equal share of the keys; if there are several, O is (S * splits, heads, D) in fp32."""
    kv_head, split, s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    k0, nk = _segment(CU_K, s)
    if STATIC:
        nk = tl.load(K_LENGTHS + s)
    heads, dims = tl.arange(0, ROWS), tl.arange(0, DIM)
    share = tl.cdiv(tl.cdiv(nk, SPLITS), BN) * BN
    begin = split * share
    end = tl.minimum(begin + share, nk)
    K += kv_head * hk
    V += kv_head * hv
    q = _read(Q + tl.cast(s, tl.int64) * sq + kv_head * group * hq, 0, hq, group, heads, dims, True, D)
    m = tl.full((ROWS,), NEVER, tl.float32)
    l = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, DIM), tl.float32)
    for n in range(begin, end, BN):
        acc, l, m = _forward_step(
            acc, l, m, q, K, V, K, V, kv_head, k0, n, end, heads, sk, sv, scale,
            True, False, False, D, DIM, BN, DOT)  # fmt: skip
    o = acc / tl.where(l == 0.0, 1.0, l)[:, None]
    out = tl.cast(s * SPLITS + split, tl.int64)
    at = _tile(O + out * so + kv_head * group * ho, 0, ho, heads, dims)
    tl.store(at, o.to(O.dtype.element_ty), mask=(heads < group)[:, None] & (dims < D)[None, :])
    if SPLITS > 1:
        lse = tl.where(l == 0.0, float("-inf"), m + tl.log2(l))
        tl.store(LSE + out * tl.num_programs(0) * group + kv_head * group + heads, lse, mask=heads < group)


@_jit
def _merge(PARTS, LSE, O, so, ho, hq, D: tl.constexpr, DIM: tl.constexpr, SPLITS: tl.constexpr, SLOTS: tl.constexpr):
    """Splits joined: softmax over their log-sums weighs their outputs. Grid (query heads, sequences)."""
    head, s = tl.program_id(0), tl.program_id(1)
    slots, dims = tl.arange(0, SLOTS), tl.arange(0, DIM)
    part = (s * SPLITS + slots) * hq + head
    lse = tl.load(LSE + part, mask=slots < SPLITS, other=float("-inf"))
    weight = tl.exp2(lse - tl.maximum(tl.max(lse, 0), NEVER))
    parts = _read(PARTS + tl.cast(s, tl.int64) * SPLITS * hq * D + head * D, 0, hq * D, SPLITS, slots, dims, True, D)
    o = tl.sum(parts * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
    tl.store(O + tl.cast(s, tl.int64) * so + head * ho + dims, o.to(O.dtype.element_ty), mask=dims < D)


# ------------------------------------------------------------------------------------------- Triton: configurations, launches


class Tiles(NamedTuple):
    m: int  # queries of a tile
    n: int  # keys of a tile
    warps: int
    stages: int  # tiles that the loop keeps in flight


# (what, padded head dim) on Hopper. tests/aot_sm90.json holds what each compiles to; the module docstring says why.
HOPPER = {
    ("forward", 128): Tiles(128, 128, 8, 2),
    ("forward", 64): Tiles(128, 128, 8, 3),
    ("dq", 128): Tiles(128, 64, 8, 2),
    ("dq", 64): Tiles(128, 128, 8, 2),
    ("dkv", 128): Tiles(64, 128, 8, 1),
    ("dkv", 64): Tiles(64, 128, 8, 1),
    ("onepass", 128): Tiles(64, 128, 8, 1),
    ("onepass", 64): Tiles(64, 128, 8, 1),
    ("decode", 128): Tiles(16, 64, 4, 3),
    ("decode", 64): Tiles(16, 64, 4, 3),
}
OTHER = Tiles(64, 32, 4, 2)  # any other GPU: fits the 99 KiB of shared memory that every one since Ampere has
EXACT = Tiles(32, 32, 4, 1)  # fp32 has no tensor cores at full precision; also what the interpreter steps through
SPLIT_KEYS = 256  # a split of fewer keys costs more to merge than it saves
PROGRAMS = 264  # splits until there are two programs for each of the H100's 132 processors
HEAD_DIMS = (16, 32, 64, 80, 128)
TYPES = (torch.bfloat16, torch.float16, torch.float32)
LOG2E = 1.4426950408889634


def config(what: str, dim: int, dtype: torch.dtype, architecture: int) -> Tiles:
    """architecture: major version of the compute capability, 0 for the interpreter."""
    if dtype == torch.float32 or architecture == 0:
        return EXACT._replace(m=16) if what == "decode" else EXACT
    if architecture != 9:
        return OTHER._replace(m=16) if what == "decode" else OTHER
    return HOPPER[what, max(dim, 64)]


def _architecture(device: torch.device) -> int:
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 0


def _unsupported(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> str | None:
    """Why the kernels cannot do this call, or None."""
    if triton is None:
        return "the package triton is not installed"
    if q.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"no kernels for {q.device.type} tensors (TRITON_INTERPRET=1 runs them on the CPU, for tests)"
    if q.shape[2] not in HEAD_DIMS:
        return f"head dim {q.shape[2]} is none of {', '.join(map(str, HEAD_DIMS))}"
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        return f"types {q.dtype}, {k.dtype}, {v.dtype} are not one of bf16, fp16, fp32"
    if q.device.type == "cpu" and q.dtype == torch.bfloat16:
        return "Triton's interpreter multiplies the bits of bf16 numbers: use fp16 or fp32"
    if scale is not None and scale <= 0:
        return f"scale {scale} is not positive"
    return None


def _constants(what: str, x: Tensor) -> tuple[Tiles, dict]:
    dim = max(16, triton.next_power_of_2(x.shape[2]))
    t = config(what, dim, x.dtype, _architecture(x.device))
    launch = {"num_warps": t.warps, "num_stages": t.stages}
    return t, {"D": x.shape[2], "DIM": dim, "BN": t.n, "DOT": "ieee" if x.dtype == torch.float32 else "tf32"} | launch


def _boxes(k: Tensor, v: Tensor, t: Tiles, dim: int, architecture: int) -> tuple:
    """(k, v, True) as the TMA unit's descriptors; (k, v, False) where there is no such unit or it cannot take these strides."""
    aligned = all(
        len(x) and x.data_ptr() % 16 == 0 and all(step and step * x.element_size() % 16 == 0 for step in x.stride()[:2])
        for x in (k, v)
    )
    if architecture not in (0, 9) or not aligned:
        return k, v, False
    return *(TensorDescriptor(x, list(x.shape), list(x.stride()), [t.n, 1, dim]) for x in (k, v)), True


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:2]]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sq, sk, causal, scale, deterministic):
        o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1::-1], dtype=torch.float32)
        t, constants = _constants("forward", q)
        tiles, group = sq.tiles(sk, causal, t.m, "queries"), q.shape[1] // k.shape[1]
        k_box, v_box, tma = _boxes(k, v, t, constants["DIM"], _architecture(q.device))
        if len(tiles):
            with torch.cuda.device_of(q):
                _forward[q.shape[1], len(tiles)](
                    q, k, v, k_box, v_box, o, lse, tiles, sq.cu, sk.cu, len(q), *_strides(q, k, v, o), scale * LOG2E, group,
                    CAUSAL=causal, TMA=tma, BM=t.m, **constants)  # fmt: skip
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.call = sq, sk, causal, scale, deterministic
        return o

    @staticmethod
    def backward(ctx, do):
        q, k, v, o, lse = ctx.saved_tensors
        sq, sk, causal, scale, deterministic = ctx.call
        do = do if do.stride(2) == 1 else do.contiguous()
        delta = torch.empty_like(lse)
        dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (k, v))
        dq = torch.empty_like(o) if deterministic else torch.zeros_like(o, dtype=torch.float32)
        group = q.shape[1] // k.shape[1]
        numbers = scale * LOG2E, scale, group
        with torch.cuda.device_of(q):
            t, constants = _constants("dkv" if deterministic else "onepass", q)
            if len(q):
                _delta[q.shape[1], triton.cdiv(len(q), 64)](
                    o, do, delta, len(q), *_strides(o, do), D=constants["D"], DIM=constants["DIM"], BM=64)  # fmt: skip
            tiles = sk.tiles(sq, causal, t.n, "keys")
            if len(tiles):
                _backward_dkv[k.shape[1], len(tiles)](
                    q, k, v, do, lse, delta, dq, dk, dv, tiles, sq.cu, sk.cu, len(q), *_strides(q, k, v, do, dq, dk), *numbers,
                    CAUSAL=causal, DQ_TOO=not deterministic, BM=t.m, **constants)  # fmt: skip
            if deterministic:
                t, constants = _constants("dq", q)
                tiles = sq.tiles(sk, causal, t.m, "queries")
                k_box, v_box, tma = _boxes(k, v, t, constants["DIM"], _architecture(q.device))
                if len(tiles):
                    _backward_dq[q.shape[1], len(tiles)](
                        q, k, v, k_box, v_box, do, lse, delta, dq, tiles, sq.cu, sk.cu, len(q), *_strides(q, k, v, do, dq),
                        *numbers, CAUSAL=causal, TMA=tma, BM=t.m, **constants)  # fmt: skip
        return dq.to(q.dtype), dk, dv, None, None, None, None, None


def _decode_packed(q, k, v, sk, scale, k_lengths):
    """One query per sequence: one launch, or two where one program per KV head and sequence would leave the GPU idle."""
    (count, heads, d), kv_heads = q.shape, k.shape[1]
    t, constants = _constants("decode", q)
    splits = max(1, min(triton.cdiv(PROGRAMS, count * kv_heads), triton.cdiv(sk.longest, SPLIT_KEYS)))
    o = torch.empty_like(q, memory_format=torch.contiguous_format)
    parts, lse = o, o  # with one split nothing reads lse
    if splits > 1:
        parts, lse = (q.new_empty(count * splits, heads, *rest, dtype=torch.float32) for rest in ((d,), ()))
    group, lengths = heads // kv_heads, sk.cu if k_lengths is None else k_lengths
    with torch.cuda.device_of(q):
        _decode[kv_heads, splits, count](
            q, k, v, parts, lse, sk.cu, lengths, *_strides(q, k, v, parts), scale * LOG2E, group,
            STATIC=k_lengths is not None, SPLITS=splits, ROWS=max(t.m, triton.next_power_of_2(group)), **constants)  # fmt: skip
        if splits > 1:
            _merge[heads, count](
                parts, lse, o, *_strides(o), heads, D=d, DIM=constants["DIM"], SPLITS=splits,
                SLOTS=triton.next_power_of_2(splits))  # fmt: skip
    return o


def _triton_packed(q, k, v, sq, sk, causal, scale, deterministic, k_lengths):
    for segments in (sq, sk):
        if segments.cu.device != q.device:
            raise ValueError(f"attention: Segments on {segments.cu.device}, tensors on {q.device}")
    scale = q.shape[2] ** -0.5 if scale is None else scale
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    gradients = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if k_lengths is not None and gradients:
        raise ValueError("attention: k_lengths is for sampling and has no backward pass")
    if not gradients and len(sq) and set(sq.lengths) == {1}:
        return _decode_packed(q, k, v, sk, scale, k_lengths)
    return _Flash.apply(q, k, v, sq, sk, causal, scale, deterministic)
