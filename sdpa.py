"""PyTorch's attention over packed sequences: what runs where there is no GPU, and what the kernels are held against.

Sequences of one length are a dense batch; short ragged neighbours are padded and masked; the rest goes one by one.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

# Below this many keys a sequence is cheaper as a padded row of one batched call than as a call of its own (CPU).
PAD_BELOW = 512
# Neighbours are padded to one length as long as that adds at most this share of scores, or so few that a call costs more.
PAD_SHARE, PAD_SCORES = 0.25, 16384


def attention(q, k, v, sq, sk, causal, scale, k_lengths):
    """As kernels.attention, with Segments and checked shapes."""
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
