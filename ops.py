"""What the models compute with, each step in plain PyTorch: attention over packed sequences, norms, rotation, gates, SwiGLU,
the loss over a vocabulary, and a step recorded as a CUDA graph.

Sequences of different lengths lie one behind the other without padding; Segments holds where they begin, as in FlashAttention's
varlen interface (Dao, arXiv 2307.08691). No token ever attends outside its own sequence.

    attention(q, k, v, segments)                                     bidirectional: vision tower, DiT
    attention(q, k, v, segments, causal=True)                        the MLLM, training and prompt
    attention(q, k, v, queries, keys)                                cross-attention
    attention(q, k, v, queries, buffers, k_lengths=lengths)          one token against a static KV cache

A GPU has each of these steps a second time, by hand in Triton and in one pass over memory. The line that begins with
`if on_triton(x)` hands over to it; `set_backend` chooses for the whole process. Nothing here needs kernels.py to be understood:
what is written below is what every other device computes and what the kernels are tested against. Results differ by rounding
alone.

The last section holds what is written for speed and not for reading: one gradient that autograd would find by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import groupby, pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from checkpoint import InputError

EPS = 1e-6  # of the DiT's LayerNorm

# Logits that linear_cross_entropy holds at a time. A chunk of tokens must be large enough that reading the weights (V, H) for
# it costs less than multiplying with them: about 1000 tokens on a GPU, 200 on a CPU at a vocabulary of 152064.
CHUNK_LOGITS = {"cuda": 160_000_000, "cpu": 32_000_000}


# ---------------------------------------------------------------------------------------------------- packed sequences


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
        # What the attention kernels found out for the first layer and use in all others: kernels.tile_list and quickest.
        self.kept: dict[tuple, object] = {}

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def total(self) -> int:
        return self.bounds[-1]

    @classmethod
    def of(cls, cu: Segments | Tensor, device: torch.device | str = "cpu") -> Segments:
        """From boundaries (S + 1,). A tensor is read back, which on a GPU waits for all work queued before it."""
        if isinstance(cu, Segments):
            return cu
        lengths = [end - start for start, end in pairwise(cu.tolist())]
        return cls(lengths, device)


# ----------------------------------------------------------------------------------------------- PyTorch or the kernels

BACKENDS = ("auto", "triton", "sdpa")
_backend = "auto"


def set_backend(name: str, device: torch.device | None = None) -> None:
    """What the whole process computes with: "triton" (an error where the kernels cannot), "sdpa" (PyTorch's), or "auto".

    auto: the kernels on a GPU; PyTorch for all else. Attention there gets 16-bit tensors of a supported head dim, unless no
    gradients are wanted and kernels.SDPA_FROM says that PyTorch's is faster. Given the device of the models, what cannot work
    there is told before they are loaded.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"attention {name!r} is none of {', '.join(BACKENDS)}")
    if name == "triton":
        if kernels.triton is None:
            raise InputError("attention 'triton': the package triton is not installed; choose sdpa")
        if device is not None and not kernels.run_on(device):
            needs = f"its kernels need an NVIDIA GPU, and the device is {device}"
            raise InputError(f"attention 'triton': {needs}: choose auto or sdpa")
    _backend = name


def get_backend() -> str:
    return _backend


def on_triton(x: Tensor) -> bool:
    """Whether the kernels serve x: on a GPU unless `set_backend` says otherwise, elsewhere only in Triton's interpreter."""
    known = x.dtype in kernels.DTYPES
    if _backend == "sdpa":
        return False
    # auto may decline without a word; who asks for the kernels by name is told why he does not get them.
    if _backend == "auto":
        there = x.is_cuda and kernels.triton is not None
        return there and kernels.run_on(x.device) and known
    if not known:
        raise InputError(f"the kernels compute in fp32, bf16 and fp16, not in {x.dtype}: choose another back end")
    if not kernels.run_on(x.device):
        raise InputError(f"no kernels for {x.device.type} tensors (TRITON_INTERPRET=1 runs them on the CPU, for tests)")
    return True


# ----------------------------------------------------------------------------------------------------------- attention


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    queries: Segments | Tensor,
    keys: Segments | Tensor | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    k_lengths: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Softmax attention inside each packed sequence: softmax(scale q k^T) v (Vaswani et al., arXiv 1706.03762).

    q: (Nq, Hq, D); k, v: (Nk, Hkv, D) with Hq a multiple of Hkv (query heads g*r .. g*r+r-1 read KV head g); queries, keys:
    their Segments, or (S + 1,) integer boundaries, which are then read back; keys defaults to queries. `causal` aligns the last
    query with the last key, which is what a KV cache needs. A query without any key gives zeros. Returns (Nq, Hq, D). `scale`
    defaults to D**-0.5.

    k_lengths (S,) int32 on the device serves a static KV cache: of each of the S equally large buffers in k and v only the
    first k_lengths[s] rows count, and each sequence has one query. Its values may change between replays of a CUDA graph.
    backend overrides `set_backend` for this call.
    """
    queries = Segments.of(queries, q.device)
    keys = queries if keys is None else Segments.of(keys, q.device)
    _check_attention(q, k, v, queries, keys, k_lengths)
    choice = backend or _backend
    own = _attention_on_triton(q, k, v, scale, choice)
    if own and choice == "auto" and k_lengths is None:
        own = not kernels.sdpa_is_faster(q, k, v, queries, keys, causal)
    if own:
        return kernels.attention(q, k, v, queries, keys, causal, scale, k_lengths)
    return _packed_attention(q, k, v, queries, keys, causal, scale, k_lengths)


def _check_attention(q, k, v, queries, keys, k_lengths) -> None:
    if len(queries) != len(keys):
        raise ValueError(f"attention: {len(queries)} query sequences but {len(keys)} key sequences")
    fit = queries.total == q.shape[0] and keys.total == k.shape[0]
    if not fit or k.shape != v.shape:
        shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}"
        raise ValueError(f"attention: boundaries {queries.total}, {keys.total} do not fit {shapes}")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"attention: {q.shape[1]} query heads are no multiple of {k.shape[1]} KV heads")
    if k_lengths is None:
        return
    one_size = keys.longest * len(keys) == keys.total
    one_query = queries.total == len(queries)
    if len(k_lengths) != len(keys) or not one_size or not one_query:
        raise ValueError("attention: k_lengths needs one length per sequence, buffers of one size and one query each")


def _attention_on_triton(q: Tensor, k: Tensor, v: Tensor, scale: float | None, choice: str) -> bool:
    """auto leaves fp32 to PyTorch, since tensor cores do not multiply at full precision."""
    if choice == "sdpa":
        return False
    why_not = kernels.attention_cannot(q, k, v, scale)
    if choice == "triton":
        if why_not:
            raise InputError(f"attention 'triton': {why_not}")
        return True
    return why_not is None and q.device.type == "cuda" and q.dtype != torch.float32


def _packed_attention(q, k, v, queries, keys, causal, scale, k_lengths) -> Tensor:
    """PyTorch's attention, over packs. Nothing is padded or copied.

    Neighbours of the same lengths are a dense batch seen from the side, and any other sequence is a batch of one. A caller that
    sorts its sequences by length gets few calls.
    """
    # A CPU may look at the lengths. Elsewhere looking would wait for the device.
    if k_lengths is not None and k.device.type == "cpu":
        return _attention_to_known_rows(q, k, v, k_lengths, scale)
    if k_lengths is not None:
        return _attention_to_masked_rows(q, k, v, k_lengths, scale)

    if slow_in_bf16(q):
        # Autocast would make bf16 of them again.
        with torch.autocast("cpu", enabled=False):
            o = _packed_attention(q.float(), k.float(), v.float(), queries, keys, causal, scale, None)
        return o.to(q.dtype)

    runs = _runs(zip(queries.lengths, keys.lengths, strict=True))
    rows_q = [count * lq for (lq, _), count in runs]
    rows_k = [count * lk for (_, lk), count in runs]

    # Split once: the backward pass of a split is one concatenation, that of a slice a full tensor of zeros each.
    qs = _split(q, rows_q)
    ks = _split(k, rows_k)
    vs = _split(v, rows_k)
    outputs = []
    for i, ((lq, lk), count) in enumerate(runs):
        batch_q = qs[i].view(count, lq, *q.shape[1:])                                   # (S, Lq, Hq, D)
        batch_k = ks[i].view(count, lk, *k.shape[1:])                                   # (S, Lk, Hkv, D)
        batch_v = vs[i].view(count, lk, *v.shape[1:])
        o = _dense_attention(batch_q, batch_k, batch_v, causal, scale)                  # (S, Lq, Hq, D)
        outputs.append(o.flatten(0, 1))
    return _cat(outputs)                                                                # (Nq, Hq, D)


def slow_in_bf16(q: Tensor) -> bool:
    """A CPU's backward pass takes bf16 sequences of a hundred tokens two to five times as long as fp32 ones."""
    return q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16


def _dense_attention(q, k, v, causal, scale, mask=None) -> Tensor:
    """Sequences of one length: q (S, Lq, Hq, D) on k, v (S, Lk, Hkv, D), any strides -> (S, Lq, Hq, D)."""
    lq = q.shape[1]
    lk = k.shape[1]
    kv_heads = k.shape[2]

    # The last query reads all keys, so with fewer keys than queries the first ones read none.
    if causal and lq > lk:
        blind = lq - lk
        o = _dense_attention(q[:, blind:], k, v, True, scale)
        return F.pad(o, (0, 0, 0, 0, blind, 0))

    # PyTorch wants heads before tokens. A transposed view will do: nothing is moved.
    q = q.transpose(1, 2)                                                               # (S, Hq, Lq, D)
    k = k.transpose(1, 2)                                                               # (S, Hkv, Lk, D)
    v = v.transpose(1, 2)

    # Decoding: the r heads that share keys become r queries of one head, so that each key is read once.
    if lq == 1:
        q = q.unflatten(1, (kv_heads, -1)).squeeze(3)                                   # (S, Hkv, r, D)
        o = F.scaled_dot_product_attention(q, k, v, mask, scale=scale)
        return o.flatten(1, 2)[:, None]                                                 # (S, 1, Hq, D)

    # is_causal aligns the first query with the first key. A cache needs the last ones aligned.
    is_causal = causal and lq == lk
    if causal and lq < lk:
        mask = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)      # (Lq, Lk)
    grouped = q.shape[1] != kv_heads
    o = F.scaled_dot_product_attention(
        q,
        k,
        v,
        mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=grouped,
    )
    return o.transpose(1, 2)


def _attention_to_known_rows(q, k, v, k_lengths, scale) -> Tensor:
    """One query per buffer of which the first rows count. Their number is known here, so the others are not read."""
    # Through numpy, which reads the tensor's own memory.
    runs = _runs(np.from_dlpack(k_lengths).tolist())
    counts = [count for _, count in runs]
    qs = q.unflatten(0, (len(k_lengths), -1)).split(counts)                             # (count, 1, Hq, D)
    ks = k.unflatten(0, (len(k_lengths), -1)).split(counts)                             # (count, L, Hkv, D)
    vs = v.unflatten(0, (len(k_lengths), -1)).split(counts)
    outputs = []
    for i, (length, _) in enumerate(runs):
        o = _dense_attention(qs[i], ks[i][:, :length], vs[i][:, :length], False, scale)
        outputs.append(o.flatten(0, 1))
    return _cat(outputs)                                                                # (S, Hq, D)


def _attention_to_masked_rows(q, k, v, k_lengths, scale) -> Tensor:
    """The same without a look at the lengths: every row is read, and those that do not count are masked."""
    q = q.unflatten(0, (len(k_lengths), -1))                                            # (S, 1, Hq, D)
    k = k.unflatten(0, (len(k_lengths), -1))                                            # (S, L, Hkv, D)
    v = v.unflatten(0, (len(k_lengths), -1))
    counts = torch.arange(k.shape[1], device=k.device) < k_lengths[:, None]             # (S, L)
    # What does not count may hold anything, NaN too, and 0 * NaN is NaN: the mask of the scores does not suffice.
    k = k.masked_fill(~counts[:, :, None, None], 0.0)
    v = v.masked_fill(~counts[:, :, None, None], 0.0)
    o = _dense_attention(q, k, v, False, scale, counts[:, None, None])                  # (S, 1, Hq, D)
    return o.flatten(0, 1)                                                              # (S, Hq, D)


def _runs(lengths: Iterable) -> list[tuple]:
    """Neighbours that are equal: what they are, and how many. [5, 5, 2] -> [(5, 2), (2, 1)]."""
    return [(length, len(list(same))) for length, same in groupby(lengths)]


def _split(x: Tensor, sizes: list[int]) -> Sequence[Tensor]:
    """x.split(sizes). One part is x itself, whose gradient then needs no concatenation."""
    return x.split(sizes) if len(sizes) > 1 else [x]


def _cat(parts: list[Tensor]) -> Tensor:
    """torch.cat(parts), which would copy a single part."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]


# ---------------------------------------------------------------------------------- the residual stream and its norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467), in fp32. x (N, W), weight (W,) -> (N, W)."""
    if on_triton(x):
        return kernels.rms_norm(x, weight, eps)
    # In training, the norm of N tokens of one head each, whose gradient is written out below.
    if torch.is_grad_enabled():
        return _NormRope.apply(x[:, None], weight, eps, None, None)[:, 0]
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    # Two thirds of the time that F.rms_norm takes on a CPU. In place where the tensor is our own: memory is what it waits for.
    n = x.float()
    n = n * _inverse_rms(n, eps)
    n.mul_(weight)
    return n.to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream x (N, W) after a sub-layer has added delta (N, W), and its norm, which the next sub-layer reads.

    Returns (x + delta, rms_norm(x + delta)); the sum has the wider dtype of both and is rounded to it before the norm.
    """
    if on_triton(x):
        return kernels.add_rms_norm(x, delta, weight, eps)
    x = x + delta
    return x, rms_norm(x, weight, eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) scale + shift for the matrix product that follows; the 1 of adaLN's 1 + scale is in scale (arXiv 2212.09748).

    x (G, n, D) contiguous: G chunks of n tokens that share a modulation. shift, scale (T, 1, D) any dtype, which may be slices
    of one wide table; rows (G,) int64 says which of the T each chunk uses; None: T = G, each its own. Returns (G * n, D) in
    dtype (default: x's). Gradients for x, shift, scale.
    """
    dtype = dtype or x.dtype
    if on_triton(x):
        return kernels.modulate(x, shift, scale, rows, dtype, EPS)
    shift = _pick(shift, rows, x)                                                       # (G, 1, D)
    scale = _pick(scale, rows, x)                                                       # (G, 1, D)
    n = F.layer_norm(x, x.shape[-1:], eps=EPS)                                          # (G, n, D)
    # shift + n scale without a tensor for the product: one pass over memory less.
    h = torch.addcmul(shift, n, scale)                                                  # (G, n, D)
    return h.flatten(0, 1).to(dtype)                                                    # (G * n, D)


def gate_add(x: Tensor, gate: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + gate y: a sub-layer's part of the stream. x (G, n, D), gate (T, 1, D), y (G * n, D) any dtype -> (G, n, D)."""
    if on_triton(x):
        return kernels.gate_add(x, gate, y, rows)
    gate = _pick(gate, rows, x)                                                         # (G, 1, D)
    return torch.addcmul(x, gate, y.to(x.dtype).view_as(x))


def gate_add_modulate(
    x: Tensor,
    gate: Tensor,
    y: Tensor,
    shift: Tensor,
    scale: Tensor,
    rows: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """gate_add and the modulate of the next sub-layer in one pass: (x + gate y (G, n, D), h (G * n, D) in dtype)."""
    if on_triton(x):
        return kernels.gate_add_modulate(x, gate, y, shift, scale, rows, dtype or x.dtype, EPS)
    x = gate_add(x, gate, y, rows)
    return x, modulate(x, shift, scale, rows, dtype)


def _pick(table: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    """(T, 1, D) -> (G, 1, D) in the dtype of the stream."""
    if rows is not None:
        table = table.index_select(0, rows)
    return table.to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x^2) + eps), (..., W) -> (..., 1). By the length of a row: one pass, and no tensor of squares."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    eps = norm.new_full((), eps)
    # The square of the length, by W, is the mean of the squares.
    mean = torch.addcmul(eps, norm, norm, value=1 / x.shape[-1])
    return mean.rsqrt_()


# ------------------------------------------------------------------------------------------ norm of heads and rotation


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """RMSNorm over each head's channels, then the rotary embedding: n = w x / rms(x), y = n cos + swap(n) sin.

    x (N, heads, D), which may be a slice of a wider projection (any strides but 1 along D). weight (D,), or (G, D) where the
    heads are G equal groups with a gain each, such as queries and keys behind each other; None: no norm. cos, sin (N, 1, D), or
    None: no rotation. Channel i pairs with i + D/2, and sin carries the sign of the rotation, as in `rope_tables`.
    Computed in fp32 (without a norm: in the tables' dtype), returned in x's dtype, contiguous.
    """
    if on_triton(x):
        return kernels.norm_rope(x, weight, eps, cos, sin)
    if weight is None:
        return _rotate(x, cos, sin).to(x.dtype)
    if torch.is_grad_enabled():
        return _NormRope.apply(x, weight, eps, cos, sin)
    y, _, _ = _norm_rope(x, weight, eps, cos, sin)
    return y


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone (Su et al., arXiv 2104.09864), as in the decoder and the vision tower: norm_rope without a norm."""
    return norm_rope(x, None, 0.0, cos, sin)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int
) -> Tensor:
    """Decoding: rotate the queries and keys of a fused projection, and put keys and values into a static cache. No gradients.

    qkv (N, (heads + 2 KV heads) * D): queries, keys, values of N new tokens. cos, sin (N, 1, D). k_cache, v_cache (capacity,
    KV heads, D), rows contiguous: one layer of one document, or of several behind each other. slots (N,) int64 on the device:
    the row of each token, so that a replayed CUDA graph goes on where the device says. Returns q (N, heads, D) in the cache's
    dtype, contiguous.
    """
    if on_triton(qkv):
        return kernels.rope_append(qkv, cos, sin, k_cache, v_cache, slots, heads)
    kv_heads, dim = k_cache.shape[1:]
    qkv = qkv.unflatten(1, (-1, dim))                                                   # (N, all heads, D)
    # Queries and keys turn in one call. Values have no position: attention finds them by their keys.
    qk, v = qkv.split((heads + kv_heads, kv_heads), 1)
    qk = _rotate(qk, cos, sin).to(k_cache.dtype)
    q, k = qk.split((heads, kv_heads), 1)
    # By index, not by a slice: where the rows are need not be known to the host.
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v.to(v_cache.dtype))
    return q.contiguous()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + swap(x) sin, where swap exchanges the two halves of the channels. x (N, heads, D), cos, sin (N, 1, D)."""
    swapped = x.roll(x.shape[-1] // 2, -1).to(cos.dtype)
    return torch.addcmul(x * cos, swapped, sin)


def _norm_rope(x, weight, eps, cos, sin) -> tuple[Tensor, Tensor, Tensor]:
    """The result in x's dtype; beside it what its gradient needs, the normalised heads and 1 / rms in fp32."""
    n = x.float()
    r = _inverse_rms(n, eps)                                                            # (N, heads, 1)
    n = n * r                                                                           # (N, heads, D)
    y = _gained(n, weight)
    if cos is not None:
        y = _rotate(y, cos, sin)
    return y.to(x.dtype), n, r


def _gained(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, heads, D) times weight (D,) or (G, D), in fp32."""
    weight = weight.float()
    if weight.ndim == 2:
        weight = weight.repeat_interleave(x.shape[1] // len(weight), 0)                 # (heads, D)
    return x * weight


# -------------------------------------------------------------------------------------------------- joint projections


def join(*layers: nn.Module) -> None:
    """Lay the weights and biases of layers with one input behind each other in memory, so that `joint` takes them as one; and
    those of norms, for `stacked`.

    They become views of one tensor and keep name, shape and value: state dicts and files stay as they are, and nothing is
    stored twice. Whatever gives a module new memory, such as `.to`, parts them again.
    """
    for name in ("weight", "bias"):
        parts = [getattr(layer, name, None) for layer in layers]
        if parts[0] is None:
            continue
        # Through .data, so that the parameters stay the same objects: optimizers and DDP hold on to them.
        whole = torch.cat([p.detach() for p in parts])
        views = whole.split([len(p) for p in parts])
        for p, view in zip(parts, views, strict=True):
            p.data = view


def joint(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """The outputs of linear layers for x (N, in): [all side by side], from one product, if `join` has made them neighbours and
    no gradient is asked for, else one of each layer. So too for many tokens on a CPU, which reads slices of rows slower."""
    weight = None
    if not torch.is_grad_enabled() and (len(x) == 1 or on_triton(x)):
        weight = _neighbours([layer.weight for layer in layers])
    if weight is None:
        return [layer(x) for layer in layers]
    bias = None
    if layers[0].bias is not None:
        bias = _neighbours([layer.bias for layer in layers])
    return [F.linear(x, weight, bias)]


def stacked(*parts: Tensor) -> Tensor:
    """torch.stack(parts), but a view if `join` has made them neighbours. No gradients."""
    whole = _neighbours(parts)
    if whole is None:
        return torch.stack(parts)
    return whole.view(len(parts), *parts[0].shape)


def _neighbours(parts: Sequence[Tensor]) -> Tensor | None:
    """Tensors that lie behind each other in one storage, as one tensor."""
    first = parts[0]
    end = first.data_ptr()
    rows = 0
    for p in parts:
        if p.data_ptr() != end:
            return None
        end += p.nbytes
        rows += p.shape[0]
    # A view over all of them, which costs nothing; PyTorch checks that it stays inside one storage.
    try:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    except RuntimeError:  # neighbours by chance, in storages of their own
        return None


# -------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202). gate, up (N, F); or gate alone (N, 2 F), gates first, of one projection."""
    if on_triton(gate):
        return kernels.swiglu(gate, up)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


def add_norm_swiglu(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, gate: nn.Linear, up: nn.Linear
) -> tuple[Tensor, Tensor]:
    """add_rms_norm, and the first half of the MLP that reads the norm: (x + delta (N, W), swiglu(gate(h), up(h)) (N, F)).

    A few tokens have no work for a GPU but reading the weights: there kernels.FEW_AT_ONCE makes the three steps one launch.
    """
    joined = None
    same = x.dtype == delta.dtype == gate.weight.dtype != torch.float16
    few = len(x) <= kernels.FEW and gate.bias is None
    if kernels.FEW_AT_ONCE and same and few and not torch.is_grad_enabled() and on_triton(x):
        joined = _neighbours([gate.weight, up.weight])                                  # (2 F, W)
    if joined is not None:
        return kernels.add_norm_swiglu(x, delta, weight, eps, joined)
    x, h = add_rms_norm(x, delta, weight, eps)                                          # (N, W) each
    return x, swiglu(*joint(h, gate, up))

# ----------------------------------------------------------------------------------------------------------- connector


def standardise_into(out: Tensor, h: Tensor) -> None:
    """(h - mean) / (std + 1e-8) over the channels of each token, std unbiased, in fp32, written into out. No gradients.

    h (N, W); out (N, W) any dtype, such as one layer's slice of a buffer (N, layers * W).
    """
    if on_triton(h):
        return kernels.standardise_into(out, h)
    std, mean = torch.std_mean(h.float(), -1, correction=1, keepdim=True)               # (N, 1) each
    out.copy_((h - mean) / (std + 1e-8))


# ------------------------------------------------------------------------------------------------ vocabulary and loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy of logits = hidden weight^T, which are never whole in memory.

    hidden (T, H), weight (V, H), labels (T,) int64, -100 where a token is no target. The products run in autocast's dtype
    if it is on, else in weight's; softmax and loss in fp32. chunk: tokens at a time, by default as many as CHUNK_LOGITS allows.
    Returns the sum () in fp32, 0 if there is no target. Gradients for hidden and weight.

    The gradient of the logits, softmax - onehot, is known as soon as they are, so both products with it follow while the chunk
    is there (as Hsu et al. do, arXiv 2410.10989); `backward` only multiplies by what the loss was multiplied with, once.
    """
    device = hidden.device.type
    if chunk is None:
        most = CHUNK_LOGITS.get(device, CHUNK_LOGITS["cpu"])
        chunk = max(1, most // len(weight))
    dtype = weight.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    """An autograd function of its own, because autograd would keep every chunk's logits until the backward pass."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, dtype, grads):
        need_h = grads and ctx.needs_input_grad[0]
        need_w = grads and ctx.needs_input_grad[1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        # What needs no gradient costs neither memory nor a product.
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = torch.empty_like(weight) if need_w else None
        # The first chunk overwrites what is there. Without any token there is none.
        if need_w and len(hidden) == 0:
            grad_w.zero_()
        with torch.autocast(hidden.device.type, enabled=False):
            # Once, not for every chunk.
            w = weight.to(dtype)                                                        # (V, H)
            for start in range(0, len(hidden), chunk):
                h = hidden[start : start + chunk].to(dtype)                             # (C, H)
                logits = h @ w.T                                                        # (C, V)
                own_labels = labels[start : start + chunk]                              # (C,)
                part, d = _loss_and_gradient(logits, own_labels, need_h or need_w)
                loss += part
                if need_h:
                    _product(grad_h[start : start + chunk], d, w)
                if need_w:
                    _product(grad_w, d.T, h, add=start > 0)
                # Before the next chunk's logits are allocated.
                del d
        ctx.grads = grad_h, grad_w
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: its gradients were given away by the first backward pass")
        # Given away and multiplied in place: of the weights there is no room for a second one.
        grad_h, grad_w = ctx.grads
        ctx.grads = None
        if grad_h is not None:
            grad_h.mul_(grad.to(grad_h.dtype))
        if grad_w is not None:
            grad_w.mul_(grad.to(grad_w.dtype))
        return grad_h, grad_w, None, None, None, None


def _loss_and_gradient(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits (C, V) -> sum of losses in fp32, and softmax - onehot (C, V) in logits' dtype. The logits may be overwritten."""
    if on_triton(logits):
        losses = kernels.softmax_gradient(logits, labels, grad)                         # (C,)
        return losses.sum(), logits if grad else None
    log_p = logits.float().log_softmax(-1)                                              # (C, V)
    loss = F.nll_loss(log_p, labels, ignore_index=-100, reduction="sum")
    if not grad:
        return loss, None

    # softmax - onehot, in the memory of log_p: exp of it is the softmax, and from the label's place 1 is taken.
    index = labels.clamp(min=0)[:, None]                                                # (C, 1)
    minus_one = log_p.new_full(index.shape, -1.0)
    d = log_p.exp_().scatter_add_(1, index, minus_one)
    # A token that is no target had -100 for a label, and 0 in its stead above: its whole row is nothing.
    ignored = labels < 0
    if ignored.any():
        d[ignored] = 0
    return loss, d.to(logits.dtype)


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b."""
    if out.dtype == a.dtype:
        # beta 0: what is there is not read.
        out.addmm_(a, b, beta=int(add))
        return
    # Of another dtype: in slabs, so that the product itself is never whole.
    for rows, slab in zip(out.tensor_split(8), a.tensor_split(8), strict=True):
        if add:
            rows.add_(slab @ b)
        else:
            rows.copy_(slab @ b)


# --------------------------------------------------------------------------------------------------------- CUDA graphs


class Graph:
    """A function of tensors whose work on the GPU is recorded once and from then on replayed with a single launch.

    A decoding step of the 7B reads its weights in 3.3 ms; at 5 us each, a host needs half of that to launch 300 kernels one by
    one. A recording holds kernels with their addresses and numbers, not what Python did. So the function

        * reads nothing back, and has the same shapes and branches every time;
        * takes what differs from call to call as tensors, or finds it in tensors that stay where they are (KVCache.lengths);
        * gives its result in the same memory every time: it is overwritten by the next call.

    Each of the shapes it is called with has a recording of its own. The first call of a shape runs as it is written: kernels
    are compiled, tile lists built. The second is recorded. Whatever else the function reads has to outlive the recording, which
    is why a Graph holds on to the function.

    Whether all that holds is tested without a GPU (tests/test_graphs.py). When it pays: `pays_to_record`.
    """

    def __init__(self, function: Callable):
        self.function = function
        self.recorded: dict[tuple, tuple | None] = {}  # shapes -> (inputs, what replays, result), None after the first call

    def __call__(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        shapes = tuple((x.shape, x.dtype) for x in inputs)
        if shapes not in self.recorded:
            self.recorded[shapes] = None
            return self.function(*inputs)
        # The recording reads from tensors of its own, which later calls fill.
        if self.recorded[shapes] is None:
            own = [x.clone() for x in inputs]
            replay, result = capture(self.function, own)
            self.recorded[shapes] = own, replay, result
        own, replay, result = self.recorded[shapes]
        # On the device, in the queue before the replay: the host does not wait.
        for mine, x in zip(own, inputs, strict=True):
            mine.copy_(x)
        replay()
        return result


# Operations that an H200 does while its host prepares one launch from Python: 70 us (33 ms for the 480 of a DiT's step) at 430
# TFLOP/s.
LAUNCH_WORK = 3e10


def pays_to_record(graphs: bool | None, device: torch.device, tokens: int, width: int) -> bool:
    """Whether the steps of a DiT of this width over so many patches are recorded: as `graphs` says; None: where it pays.

    It pays while a GPU is done with what one launch asks of it before the host comes with the next one, and by as much as it
    would have waited. Else it saves nothing, and the recording itself costs a step's launches once more. On an H200, five steps
    of the 2B DiT, the recording among them: a picture of 480 px alone took 24 ms a step instead of 34, with four before it 85
    instead of 77.
    """
    if graphs is not None:
        return graphs
    # The product of a square layer stands for all launches: some ask for four times as much, most for next to nothing.
    return device.type == "cuda" and 2 * tokens * width**2 < LAUNCH_WORK


def capture(function: Callable, inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor | tuple[Tensor, ...]]:
    """(what replays, where the result then lies). Nothing is computed yet."""
    # Inside, kernels are noted and not run; their memory is kept for this graph alone.
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function(*inputs)
    return graph.replay, result


# ------------------------------------------------------------------------------------------------------ written for speed


class _NormRope(torch.autograd.Function):
    """_norm_rope, with the gradient that autograd would find by itself, in half of its time on a CPU: training without a GPU
    spends much of itself in norms.

    With v = x / rms and g = w dv, rms_norm's gradient is (g - v mean(g v)) / rms; that of w is the sum over tokens of v dv.
    """

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        y, n, r = _norm_rope(x, weight, eps, cos, sin)
        ctx.save_for_backward(n, r, weight, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        n, r, weight, cos, sin = ctx.saved_tensors
        g = grad.float()                                                                # (N, heads, D)
        # The transpose of a rotation turns back.
        if cos is not None:
            g = _rotate(g, cos, -sin)

        # w's gradient: every token and every head adds v dv.
        along = g * n
        grad_w = None
        if ctx.needs_input_grad[1]:
            # All heads of a group have one gain: (heads, D) -> (D,), or (G, heads of each, D) -> (G, D).
            groups = along.sum(0).view(*weight.shape[:-1], -1, weight.shape[-1])
            grad_w = groups.sum(-2).to(weight.dtype)

        # x's: the part of g along v is taken out, since a norm does not see how long x is. A product with the gain and a sum
        # are one matrix product where all heads share it.
        if weight.ndim == 1:
            total = along @ weight.float()                                              # (N, heads)
        else:
            total = _gained(along, weight).sum(-1)
        mean = total.unsqueeze(-1) / n.shape[-1]                                        # (N, heads, 1)
        dx = _gained(g, weight)
        dx = dx.addcmul_(n, mean, value=-1).mul_(r)
        return dx.to(grad.dtype), grad_w, None, None, None
