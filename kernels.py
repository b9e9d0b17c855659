"""Attention over packed sequences: the one entry that every model in this repository calls.

Sequences of different lengths lie one behind the other without padding; `cu_seqlens` holds their boundaries
(0, n_1, n_1 + n_2, ...), as in FlashAttention's varlen interface (Dao, arXiv 2307.08691). No token ever attends outside
its own sequence.

    o_i = sum_j softmax_j(q_i . k_j * scale) v_j        over the keys j of i's sequence
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import InputError

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for macOS and Windows: there the PyTorch path is the only one
    triton = None

INTERPRETED = bool(triton and triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 as this file is read: kernels run on the CPU
NEVER = tl.constexpr(-1e30) if triton else None  # below every score; finite, so that NEVER - NEVER is 0 and not NaN
BACKENDS = ("auto", "triton", "sdpa")

# Below this many keys a sequence is cheaper as a padded row of one batched call than as a call of its own (CPU).
PAD_BELOW = 512
# Neighbours are padded to one length as long as that adds at most this share of scores, or so few that a call costs more.
PAD_SHARE, PAD_SCORES = 0.25, 16384


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


def set_backend(name: str) -> None:
    """Which attention the whole process uses: "triton", "sdpa" (PyTorch's), or "auto": triton on a GPU, sdpa elsewhere."""
    global _backend
    if name not in BACKENDS:
        raise InputError(f"attention {name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton" and triton is None:
        raise InputError("attention 'triton': the package triton is not installed; choose sdpa")
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
    return _sdpa_packed(q, k, v, sq, sk, causal, scale, k_lengths)


# ------------------------------------------------------------------------------------------------------------ PyTorch's path


def _sdpa_packed(q, k, v, sq, sk, causal, scale, k_lengths):
    """The PyTorch path. Sequences of one length are a dense batch; short ragged neighbours are padded; the rest goes singly."""
    if k_lengths is not None:
        return _static_cache(q, k, v, k_lengths, scale)
    lens_q, lens_k, bounds_q, bounds_k = sq.lengths, sk.lengths, sq.bounds, sk.bounds
    runs, parts = _runs(lens_q, lens_k), []
    # Split once: the backward pass of a split is one concatenation, that of a slice a full tensor of zeros each.
    qs = q.split([bounds_q[e] - bounds_q[s] for s, e in runs])
    ks, vs = (x.split([bounds_k[e] - bounds_k[s] for s, e in runs]) for x in (k, v))
    for (s, e), qr, kr, vr in zip(runs, qs, ks, vs, strict=True):
        if not (len(qr) and len(kr)):
            parts.append(torch.zeros_like(qr))
        elif len(set(lens_q[s:e])) == 1 and len(set(lens_k[s:e])) == 1:
            parts.append(_equal(qr, kr, vr, e - s, causal, scale))
        else:
            parts.append(_padded(qr, kr, vr, lens_q[s:e], lens_k[s:e], causal, scale))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _runs(lens_q: Sequence[int], lens_k: Sequence[int]) -> list[tuple[int, int]]:
    """Ranges of neighbouring sequences worth one padded call. A caller that sorts by length gets few and tight ones."""
    runs, longest_q, longest_k, real = [], 0, 0, 0
    for s, (lq, lk) in enumerate(zip(lens_q, lens_k, strict=True)):
        longest_q, longest_k, real = max(longest_q, lq), max(longest_k, lk), real + lq * lk
        if runs:
            padded = longest_q * longest_k * (s + 1 - runs[-1][0]) - real
            short = max(longest_q, longest_k) <= PAD_BELOW and padded <= max(PAD_SHARE * real, PAD_SCORES)
            if padded == 0 or short:
                runs[-1][1] = s + 1
                continue
        runs.append([s, s + 1])
        longest_q, longest_k, real = lq, lk, lq * lk
    return runs


def _equal(q, k, v, batch, causal, scale):
    """All sequences have the same lengths: the pack is a dense batch seen from the side."""
    q, k, v = (x.unflatten(0, (batch, -1)).transpose(1, 2) for x in (q, k, v))  # (S, H, L, D)
    lq, lk = q.shape[2], k.shape[2]
    mask = None
    if causal and 1 < lq != lk:  # is_causal aligns top-left; a cache needs bottom-right
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    o = _sdpa(q, k, v, mask, causal and lq == lk, scale)
    if causal and lq > lk:  # the first queries have no key
        o = torch.cat((torch.zeros_like(o[:, :, : lq - lk]), o[:, :, lq - lk :]), 2)
    return o.transpose(1, 2).flatten(0, 1)  # (S * L, H, D)


def _static_cache(q, k, v, k_lengths, scale):
    """One query per buffer of which the first rows count. The others may hold anything, NaN too, and 0 * NaN is NaN."""
    k, v = (x.unflatten(0, (len(k_lengths), -1)) for x in (k, v))                         # (S, L, Hkv, D)
    real = torch.arange(k.shape[1], device=k.device) < k_lengths[:, None]                 # (S, L)
    k, v = (x.masked_fill(~real[:, :, None, None], 0.0).transpose(1, 2) for x in (k, v))  # (S, Hkv, L, D)
    return _sdpa(q[:, :, None], k, v, real[:, None, None], False, scale)[:, :, 0]


def _padded(q, k, v, lens_q, lens_k, causal, scale):
    """Short ragged sequences: one batched call with masked padding. Masked weights are exact zeros, so neighbours never mix."""
    device = q.device
    lq, lk = (torch.tensor(x, device=device)[:, None] for x in (lens_q, lens_k))  # (S, 1)
    slot_q, slot_k = (torch.arange(int(x.max()), device=device)[None] for x in (lq, lk))
    real_q, real_k = slot_q < lq, slot_k < lk  # (S, Lq), (S, Lk)
    mask = real_k[:, None, None, :]
    if causal:
        mask = mask & (slot_k[:, None, :] <= slot_q[:, :, None] + (lk - lq)[:, :, None])[:, None]
    slots_q, slots_k = (real.flatten().nonzero()[:, 0] for real in (real_q, real_k))  # (Nq,), (Nk,)
    qp = q.new_zeros(real_q.numel(), *q.shape[1:]).index_copy(0, slots_q, q).unflatten(0, real_q.shape).transpose(1, 2)
    kp, vp = (
        x.new_zeros(real_k.numel(), *x.shape[1:]).index_copy(0, slots_k, x).unflatten(0, real_k.shape).transpose(1, 2)
        for x in (k, v)
    )  # (S, H, L, D)
    o = _sdpa(qp, kp, vp, mask, False, scale).transpose(1, 2).flatten(0, 1).index_select(0, slots_q)  # (Nq, H, D)
    empty = (~mask).all(-1).expand(-1, 1, qp.shape[2])[:, 0][real_q] if causal or 0 in lens_k else None
    return o if empty is None else o.masked_fill(empty[:, None, None], 0.0)


def _sdpa(q, k, v, mask, causal, scale):
    """Dense attention of (S, Hq, Lq, D) on (S, Hkv, Lk, D); mask (S or 1, 1, Lq or 1, Lk), True where a key is read."""
    heads, (lk, d) = k.shape[1], k.shape[2:]
    if q.device.type != "cpu" or lk > PAD_BELOW:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != heads)
    # Two matrix products are 2 to 4 times as fast as the fused CPU kernel on short sequences, backward above all.
    lq = q.shape[2]
    q = (q * (scale or d**-0.5)).unflatten(1, (heads, -1)).flatten(2, 3)                   # (S, Hkv, r * Lq, D)
    s = torch.matmul(q, k.transpose(-1, -2))                                              # (S, Hkv, r * Lq, Lk)
    if causal:
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        # Finite, so that a row without any key stays finite; exp() of it is an exact 0 beside any real score.
        bias = torch.zeros(mask.shape, dtype=s.dtype, device=s.device).masked_fill_(~mask, torch.finfo(s.dtype).min / 2)
        bias = bias[:, :, None] if bias.ndim == 4 else bias
        s = (s.unflatten(2, (-1, lq)) + bias).flatten(2, 3)
    return torch.matmul(s.softmax(-1), v).unflatten(2, (-1, lq)).flatten(1, 2)            # (S, Hq, Lq, D)


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
def _forward_step(
    acc, l, m, q, K, V, k0, n, nk, last, sk, sv, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Equations (1) to (4) for one tile of keys. last (BM,): the last key that each query reads."""
    cols, dims = tl.arange(0, BN), tl.arange(0, DIM)
    k = _read(K, k0 + n, sk, nk - n, cols, dims, MASKED, D)
    s = tl.dot(q, tl.trans(k), input_precision=DOT)  # (BM, BN)
    if MASKED:
        seen = (n + cols < nk)[None, :]
        if CAUSAL:
            seen = seen & (n + cols[None, :] <= last[:, None])
        s = tl.where(seen, s, float("-inf"))
    higher = tl.maximum(m, tl.max(s, 1) * scale)
    p = tl.exp2(s * scale - higher[:, None])
    shrink = tl.exp2(m - higher)
    v = _read(V, k0 + n, sv, nk - n, cols, dims, MASKED, D)
    acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=DOT)
    return acc, l * shrink + tl.sum(p, 1), higher


@_jit
def _forward(
    Q, K, V, O, LSE, TILES, CU_Q, CU_K, total, sq, hq, sk, hk, sv, hv, so, ho, scale, group,
    CAUSAL: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head over all keys that it sees. Grid (query heads, tiles): the heads of one tile run at
    the same time, so that a key tile comes from memory once and for the rest of its group from the L2 cache."""
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s, m0 = tl.load(tile), tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    K += (head // group) * hk
    V += (head // group) * hv
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
        acc, l, m = _forward_step(acc, l, m, q, K, V, k0, n, nk, last, sk, sv, scale, False, CAUSAL, D, DIM, BN, DOT)
    for n in range(whole, end, BN):
        acc, l, m = _forward_step(acc, l, m, q, K, V, k0, n, nk, last, sk, sv, scale, True, CAUSAL, D, DIM, BN, DOT)
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
    dq, q, do, lse, delta, K, V, k0, n, nk, last, sk, sv, scale,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    cols, dims = tl.arange(0, BN), tl.arange(0, DIM)
    k = _read(K, k0 + n, sk, nk - n, cols, dims, MASKED, D)
    v = _read(V, k0 + n, sv, nk - n, cols, dims, MASKED, D)
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
    Q, K, V, DO, LSE, DELTA, DQ, TILES, CU_Q, CU_K, total, sq, hq, sk, hk, sv, hv, sd, hd, sg, hg, scale, scale_grad, group,
    CAUSAL: tl.constexpr, D: tl.constexpr, DIM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """dQ of BM queries, equation (9): the same walk over the keys as in the forward pass."""
    head = tl.program_id(0)
    tile = TILES + 2 * tl.program_id(1)
    s, m0 = tl.load(tile), tl.load(tile + 1)
    q0, nq = _segment(CU_Q, s)
    k0, nk = _segment(CU_K, s)
    rows, dims = tl.arange(0, BM), tl.arange(0, DIM)
    real = rows < nq - m0
    K += (head // group) * hk
    V += (head // group) * hv
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
        dq = _dq_step(dq, q, do, lse, delta, K, V, k0, n, nk, last, sk, sv, scale, False, CAUSAL, D, DIM, BN, DOT)
    for n in range(whole, end, BN):
        dq = _dq_step(dq, q, do, lse, delta, K, V, k0, n, nk, last, sk, sv, scale, True, CAUSAL, D, DIM, BN, DOT)
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
        acc, l, m = _forward_step(acc, l, m, q, K, V, k0, n, end, heads, sk, sv, scale, True, False, D, DIM, BN, DOT)
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


def _strides(*tensors: Tensor) -> list[int]:
    return [step for x in tensors for step in x.stride()[:2]]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sq, sk, causal, scale, deterministic):
        o, lse = torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(q.shape[1::-1], dtype=torch.float32)
        t, constants = _constants("forward", q)
        tiles, group = sq.tiles(sk, causal, t.m, "queries"), q.shape[1] // k.shape[1]
        if len(tiles):
            with torch.cuda.device_of(q):
                _forward[q.shape[1], len(tiles)](
                    q, k, v, o, lse, tiles, sq.cu, sk.cu, len(q), *_strides(q, k, v, o), scale * LOG2E, group,
                    CAUSAL=causal, BM=t.m, **constants)  # fmt: skip
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
                if len(tiles):
                    _backward_dq[q.shape[1], len(tiles)](
                        q, k, v, do, lse, delta, dq, tiles, sq.cu, sk.cu, len(q), *_strides(q, k, v, do, dq), *numbers,
                        CAUSAL=causal, BM=t.m, **constants)  # fmt: skip
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
