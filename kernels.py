"""Attention over packed sequences: the one entry that every model in this repository calls.

Sequences of different lengths lie one behind the other without padding; `cu_seqlens` holds their boundaries
(0, n_1, n_1 + n_2, ...), as in FlashAttention's varlen interface (Dao, arXiv 2307.08691). No token ever attends outside
its own sequence.

    o_i = sum_j softmax_j(q_i . k_j * scale) v_j        over the keys j of i's sequence
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from checkpoint import InputError

try:
    import triton
except ImportError:  # no wheels for macOS and Windows: there the PyTorch path is the only one
    triton = None

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

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @classmethod
    def of(cls, cu: "Segments | Tensor", device: torch.device | str = "cpu") -> "Segments":
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
    if (backend or _backend) == "triton":
        raise InputError("attention 'triton': the kernels are not here yet; choose sdpa")
    return _sdpa_packed(q, k, v, sq, sk, causal, scale, k_lengths)


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
