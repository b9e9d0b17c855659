"""PyTorch's attention over packed sequences: what runs where there is no GPU, and what the kernels are held against.

Neighbours of the same lengths are a dense batch seen from the side, and any other sequence is a batch of one: nothing is padded
or copied. A caller that sorts its sequences by length gets few calls.
"""

from itertools import groupby

import numpy as np
import torch
import torch.nn.functional as F


def attention(q, k, v, sq, sk, causal, scale, k_lengths):
    """As kernels.attention, with Segments and checked shapes."""
    if k_lengths is not None:
        return (_host_cache if k.device.type == "cpu" else _device_cache)(q, k, v, k_lengths, scale)
    runs = _runs(zip(sq.lengths, sk.lengths, strict=True))
    qs, ks, vs = [q], [k], [v]
    if len(runs) > 1:
        # Split once: the backward pass of a split is one concatenation, that of a slice a full tensor of zeros each.
        qs = q.split([count * lq for (lq, _), count in runs])
        ks, vs = (x.split([count * lk for (_, lk), count in runs]) for x in (k, v))
    return _joined(
        _dense(*(x.view(count, n, *x.shape[1:]) for x, n in zip(pack, (lq, lk, lk), strict=True)), causal, scale)
        for ((lq, lk), count), *pack in zip(runs, qs, ks, vs, strict=True)
    )


def _runs(lengths) -> list[tuple]:
    """Neighbours of the same lengths: these, and how many they are."""
    return [(n, len(list(same))) for n, same in groupby(lengths)]


def _joined(batches):
    """(S, L, H, D), several -> (N, H, D)."""
    parts = [x.flatten(0, 1) for x in batches]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _dense(q, k, v, causal, scale, mask=None):
    """q (S, Lq, Hq, D) on k, v (S, Lk, Hkv, D), any strides -> (S, Lq, Hq, D)."""
    lq, lk, kv_heads = q.shape[1], *k.shape[1:3]
    if causal and lq > lk:  # the first queries have no key
        return F.pad(_dense(q[:, lq - lk :], k, v, True, scale), (0, 0, 0, 0, lq - lk, 0))
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))                                      # (S, H, L, D)
    if lq == 1:  # heads that share keys become queries of one head: each key is read once
        q = q.unflatten(1, (kv_heads, -1)).squeeze(3)                                     # (S, Hkv, r, D)
        return F.scaled_dot_product_attention(q, k, v, mask, scale=scale).flatten(1, 2)[:, None]
    if causal and lq < lk:  # is_causal aligns top-left; a cache needs bottom-right
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
    options = {"is_causal": causal and mask is None, "scale": scale, "enable_gqa": q.shape[1] != kv_heads}
    return F.scaled_dot_product_attention(q, k, v, mask, **options).transpose(1, 2)


def _host_cache(q, k, v, k_lengths, scale):
    """One query per buffer of which the first rows count. Their number is known here, so the others are not read."""
    runs = _runs(np.from_dlpack(k_lengths).tolist())
    sizes = [count for _, count in runs]
    q, k, v = (x.unflatten(0, (len(k_lengths), -1)).split(sizes) for x in (q, k, v))       # (count, L, H, D) each
    return _joined(_dense(x, y[:, :n], z[:, :n], False, scale) for (n, _), x, y, z in zip(runs, q, k, v, strict=True))


def _device_cache(q, k, v, k_lengths, scale):
    """The same without a look at the lengths. What does not count may hold anything, NaN too, and 0 * NaN is NaN."""
    q, k, v = (x.unflatten(0, (len(k_lengths), -1)) for x in (q, k, v))                   # (S, L, H, D)
    real = torch.arange(k.shape[1], device=k.device) < k_lengths[:, None]                 # (S, L)
    k, v = (x.masked_fill(~real[:, :, None, None], 0.0) for x in (k, v))
    return _dense(q, k, v, False, scale, real[:, None, None]).flatten(0, 1)
