"""The steps between the matrix products, each as one pass over memory.

A GPU reads 4 TB/s and multiplies 800 TFLOP/s: a number must take part in some 400 operations before arithmetic is what one
waits for. Norms, rotations, gates and activations do about ten, so their time is the bytes they move, and a chain of separate
operations moves them again and again. Every function here reads its inputs once, computes in fp32 in registers and writes its
results once. Bytes per element of a bf16 stream, forward, operation by operation against fused:

    add_rms_norm          sum 6, norm 4                                              10 -> 8
    norm_rope             cast 6, rms 4, norm 8, gain 8, rotation 28, cast 6         60 -> 4, straight out of the projection
    gate_add_modulate     gated sum 6, LayerNorm 4, modulation 4                     14 -> 8
    swiglu                silu 4, product 6                                          10 -> 6, backward keeps only its input
    rope_append           cat, rotation in three, two copies into the cache          6 launches -> 1: decoding waits on them
    standardise_into      cast 6, std and mean 4, difference 8, quotient 8, copy 6   32 -> 4, into its slice of a wide buffer
    linear_cross_entropy  logits, the same in fp32, log-softmax, its gradient        never whole: a chunk of tokens at a time

Beside each kernel stands the same step in PyTorch. It is the path of every other device and what the kernel is tested against;
`kernels.set_backend` chooses for the whole process, as for attention. Results differ by rounding alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoint import InputError
from kernels import INTERPRETED, get_backend

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheels for macOS and Windows: there the PyTorch path is the only one
    triton = tl = None

jit = (lambda kernel: kernel) if triton is None else triton.jit

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of what the kernels read
EPS = 1e-6  # of the DiT's LayerNorm

# The gradient of a gain or a modulation is a sum over tokens: a program sums up to TOKENS of them, PyTorch the programs' sums,
# always in one order. More would be fewer sums to write, but too few programs for the 132 processors of an H100 at 1000 tokens.
TOKENS = 8

# Logits that linear_cross_entropy holds at a time. A chunk of tokens must be large enough that reading the weights (V, H) for
# it costs less than multiplying with them: about 1000 tokens on a GPU, 200 on a CPU at a vocabulary of 152064.
CHUNK_LOGITS = {"cuda": 160_000_000, "cpu": 32_000_000}


def on_triton(x: Tensor) -> bool:
    """Whether the kernels serve x: on a GPU unless `set_backend` says otherwise, elsewhere only in Triton's interpreter."""
    backend = get_backend()
    if backend != "triton":
        return x.is_cuda and backend == "auto" and triton is not None and not INTERPRETED and x.dtype in DTYPES
    if x.dtype not in DTYPES:
        raise InputError(f"the kernels compute in fp32, bf16 and fp16, not in {x.dtype}: choose another back end")
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        raise InputError(f"no kernels for {x.device.type} tensors (TRITON_INTERPRET=1 runs them on the CPU, for tests)")
    return True


def _launch(kernel, grid: tuple[int, ...], x: Tensor, *args, BLOCK: int | None = None, **meta) -> None:
    """Start a kernel whose first argument is x, with a warp for every 512 elements of a row."""
    if BLOCK is not None:
        meta |= {"BLOCK": BLOCK, "num_warps": min(16, max(1, BLOCK // 512))}
    if 0 not in grid:
        with torch.cuda.device_of(x):  # Triton takes the current device, whatever its arguments
            kernel[grid](x, *args, **meta)


def _check_rows(*tensors: Tensor) -> None:
    for t in tensors:
        if t.stride(-1) != 1:
            raise ValueError(f"fused: {tuple(t.shape)} with strides {t.stride()} has no contiguous rows")


def _p2(n: int) -> int:
    """Triton's blocks are powers of two."""
    return triton.next_power_of_2(n)


def _head_blocks(heads: int, dim: int) -> dict[str, int]:
    """Some heads of a token, their channels in two halves, with a warp for every 256 pairs.

    HALF is a constant so that the compiler sees that rows of 80 channels, too, can be read 16 bytes at a time.
    """
    h, d = _p2(heads), _p2(dim // 2)
    return {"HALF": dim // 2, "BLOCK_H": h, "BLOCK_D": d, "num_warps": min(8, max(1, h * d // 256))}


# --------------------------------------------------------------------------------- the residual stream and its norms


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich, arXiv 1910.07467), in fp32. x (N, W), weight (W,) -> (N, W)."""
    if on_triton(x):
        return _AddNorm.apply(x[None], None, None, None, weight[None, None], None, x.dtype, eps)
    if torch.is_grad_enabled():
        return _NormRope.apply(x[:, None], weight, eps, None, None)[:, 0]              # half of autograd's time (CPU)
    if x.device.type != "cpu":
        return F.rms_norm(x, weight.shape, weight, eps)
    n = x.float()  # two thirds of the time of what F.rms_norm is on a CPU
    return (n * _inverse_rms(n, eps)).mul_(weight).to(x.dtype)


def add_rms_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The residual stream x (N, W) after a sub-layer has added delta (N, W), and its norm, which the next sub-layer reads.

    Returns (x + delta, rms_norm(x + delta)); the sum has the wider dtype of both and is rounded to it before the norm.
    """
    if on_triton(x):
        dtype = torch.promote_types(x.dtype, delta.dtype)
        s, h = _AddNorm.apply(x[None], None, delta, None, weight[None, None], None, dtype, eps)
        return s[0], h
    x = x + delta
    return x, rms_norm(x, weight, eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, rows: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """LN(x) scale + shift for the matrix product that follows; the 1 of adaLN's 1 + scale is in scale (arXiv 2212.09748).

    x (G, n, D) contiguous: G chunks of n tokens that share a modulation. shift, scale (T, 1, D) any dtype, which may be slices
    of one wide table; rows (G,) int64 says which of the T each chunk uses; None: T = G, each its own. Returns (G * n, D) in
    dtype (default: x's). Gradients for x, shift, scale.
    """
    if on_triton(x):
        return _AddNorm.apply(x, None, None, shift, scale, rows, dtype or x.dtype, EPS)
    shift, scale = _pick(shift, rows, x), _pick(scale, rows, x)                        # (G, 1, D)
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=EPS), scale).flatten(0, 1).to(dtype or x.dtype)


def gate_add(x: Tensor, gate: Tensor, y: Tensor, rows: Tensor | None = None) -> Tensor:
    """x + gate y: a sub-layer's part of the stream. x (G, n, D), gate (T, 1, D), y (G * n, D) any dtype -> (G, n, D)."""
    if on_triton(x):
        return _AddNorm.apply(x, gate, y, None, None, rows, None, EPS)
    return torch.addcmul(x, _pick(gate, rows, x), y.to(x.dtype).view_as(x))


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
        return _AddNorm.apply(x, gate, y, shift, scale, rows, dtype or x.dtype, EPS)
    x = gate_add(x, gate, y, rows)
    return x, modulate(x, shift, scale, rows, dtype)


def _pick(table: Tensor, rows: Tensor | None, x: Tensor) -> Tensor:
    """(T, 1, D) -> (G, 1, D) in the dtype of the stream."""
    return (table if rows is None else table.index_select(0, rows)).to(x.dtype)


class _AddNorm(torch.autograd.Function):
    """s = x + gate y, h = LN(s) scale + shift, or without a shift h = RMS(s) scale; what is None is left out.

    x (G, n, W); gate, shift, scale (T, 1, W); y (G * n, W); rows (G,). Returns s (G, n, W) if there is a y, h (G * n, W) in
    dtype if there is a scale.
    """

    @staticmethod
    def forward(ctx, x, gate, y, shift, scale, rows, dtype, eps):
        _check_rows(*(t for t in (gate, shift, scale) if t is not None))
        if not x.is_contiguous() or (y is not None and not y.is_contiguous()):
            raise ValueError("fused: the stream and what is added to it must be contiguous")
        chunks, n, width = x.shape
        s = x if y is None else torch.empty_like(x, dtype=dtype if gate is None else x.dtype)
        h = None if scale is None else torch.empty(chunks * n, width, dtype=dtype, device=x.device)
        row = [0 if t is None else t.stride(0) for t in (gate, shift, scale)]
        ctx.flags = {"ADD": y is not None, "GATE": gate is not None, "NORM": scale is not None, "CENTRE": shift is not None}
        ctx.flags |= {"ROWS": rows is not None, "BLOCK": _p2(width)}
        _launch(_add_norm_kernel, (chunks * n,), x, y, gate, shift, scale, rows, s, h, *row, n, width, eps, **ctx.flags)
        ctx.save_for_backward(s, y if gate is not None else None, gate, shift, scale, rows)
        ctx.eps, ctx.dtypes = eps, (x.dtype, None if y is None else y.dtype)
        return h if y is None else s if scale is None else (s, h)

    @staticmethod
    def backward(ctx, *grads):
        s, y, gate, shift, scale, rows = ctx.saved_tensors
        x_dtype, y_dtype = ctx.dtypes
        ds, dh = (None, *grads) if y_dtype is None else (*grads, None) if scale is None else grads
        ds, dh = (None if g is None else g.contiguous() for g in (ds, dh))
        chunks, n, width = s.shape
        splits = triton.cdiv(n, TOKENS)
        dx, dy = torch.empty_like(s, dtype=x_dtype), None if gate is None else torch.empty_like(y)
        parts = torch.empty(3, chunks, splits, width, device=s.device)                 # fp32: of gate, shift, scale
        row = [0 if t is None else t.stride(0) for t in (gate, scale)]
        _launch(
            _add_norm_backward_kernel, (chunks, splits), s, ds, dh, y, gate, scale, rows, dx, dy, parts, *row, n, width,
            ctx.eps, TOKENS=TOKENS, **ctx.flags,
        )  # fmt: skip
        tables = []  # the gradients of gate, shift, scale
        for t, part in zip((gate, shift, scale), parts, strict=True):
            if t is not None:
                part = part.sum(1)                                                     # (G, W)
                part = part if rows is None else part.new_zeros(len(t), width).index_add_(0, rows, part)
                t = part[:, None].to(t.dtype)                                          # (T, 1, W)
            tables.append(t)
        if y_dtype is not None and dy is None:
            dy = dx.to(y_dtype).flatten(0, 1)
        return dx, tables[0], dy, *tables[1:], None, None, None


@jit
def _add_norm_kernel(
    x, y, gate, shift, scale, rows, s, h, gate_row, shift_row, scale_row, n, width, eps,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A token per program: its row stays in registers between the sums over it and their use.

    The tables' rows are shared by the n tokens of a chunk and come out of the L2 cache.
    """
    token = tl.program_id(0).to(tl.int64)  # tokens times width may pass 2^31
    m = token // n
    if ROWS:
        m = tl.load(rows + m)
    c = tl.arange(0, BLOCK)
    inside, at = c < width, token * width + c
    v = tl.load(x + at, inside, 0.0).to(tl.float32)
    if ADD:
        d = tl.load(y + at, inside, 0.0).to(tl.float32)
        if GATE:
            d *= tl.load(gate + m * gate_row + c, inside, 0.0).to(tl.float32)
        v = (v + d).to(s.dtype.element_ty).to(tl.float32)  # the norm of what the stream will hold
        tl.store(s + at, v, inside)
    if NORM:
        if CENTRE:
            v = tl.where(inside, v - tl.sum(v) / width, 0.0)
        v *= tl.rsqrt(tl.sum(v * v) / width + eps) * tl.load(scale + m * scale_row + c, inside, 0.0).to(tl.float32)
        if CENTRE:
            v += tl.load(shift + m * shift_row + c, inside, 0.0).to(tl.float32)
        tl.store(h + at, v, inside)


@jit
def _add_norm_backward_kernel(
    s, ds, dh, y, gate, scale, rows, dx, dy, parts, gate_row, scale_row, n, width, eps, TOKENS: tl.constexpr,
    ADD: tl.constexpr, GATE: tl.constexpr, NORM: tl.constexpr, CENTRE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """With v the normalised row, r = 1 / rms and g = scale dh: ds += r (g - mean(g) - v mean(g v)), RMSNorm without mean(g).

    A program has up to TOKENS tokens of one chunk; what they add to gate, shift and scale it keeps, and writes once.
    """
    chunk, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    m = chunk
    if ROWS:
        m = tl.load(rows + chunk)
    c = tl.arange(0, BLOCK)
    inside = c < width
    to_gate, to_shift, to_scale = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for k in range(split * TOKENS, tl.minimum(split * TOKENS + TOKENS, n)):
        at = (chunk * n + k) * width + c
        g = tl.zeros((BLOCK,), tl.float32)
        if NORM:
            v = tl.load(s + at, inside, 0.0).to(tl.float32)
            if CENTRE:
                v = tl.where(inside, v - tl.sum(v) / width, 0.0)
            r = tl.rsqrt(tl.sum(v * v) / width + eps)
            v *= r
            g = tl.load(dh + at, inside, 0.0).to(tl.float32)
            to_shift += g
            to_scale += g * v
            g *= tl.load(scale + m * scale_row + c, inside, 0.0).to(tl.float32)
            if CENTRE:
                g -= tl.sum(g) / width
            g = r * (g - v * (tl.sum(g * v) / width))
        if ADD:
            g += tl.load(ds + at, inside, 0.0).to(tl.float32)
        if GATE:
            to_gate += g * tl.load(y + at, inside, 0.0).to(tl.float32)
            tl.store(dy + at, g * tl.load(gate + m * gate_row + c, inside, 0.0).to(tl.float32), inside)
        tl.store(dx + at, g, inside)
    programs = tl.num_programs(0) * tl.num_programs(1)
    out = parts + (chunk * tl.num_programs(1) + split) * width + c
    if GATE:
        tl.store(out, to_gate, inside)
    if CENTRE:
        tl.store(out + programs * width, to_shift, inside)
    if NORM:
        tl.store(out + 2 * programs * width, to_scale, inside)


# ------------------------------------------------------------------------------------------ norm of heads and rotation


def norm_rope(x: Tensor, weight: Tensor | None, eps: float, cos: Tensor | None = None, sin: Tensor | None = None) -> Tensor:
    """RMSNorm over each head's channels, then the rotary embedding: n = w x / rms(x), y = n cos + swap(n) sin.

    x (N, heads, D), which may be a slice of a wider projection (any strides but 1 along D). weight (D,), or (G, D) where the
    heads are G equal groups with a gain each, such as queries and keys behind each other; None: no norm. cos, sin (N, 1, D), or
    None: no rotation. Channel i pairs with i + D/2, and sin carries the sign of the rotation, as in `rope_tables`.
    Computed in fp32 (without a norm: in the tables' dtype), returned in x's dtype, contiguous.
    """
    if on_triton(x):
        return _TritonNormRope.apply(x, weight, eps, cos, sin)
    if weight is None:
        return _rotate(x, cos, sin).to(x.dtype)
    return _NormRope.apply(x, weight, eps, cos, sin) if torch.is_grad_enabled() else _norm_rope(x, weight, eps, cos, sin)[0]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation alone (Su et al., arXiv 2104.09864), as in the decoder and the vision tower: norm_rope without a norm."""
    return norm_rope(x, None, 0.0, cos, sin)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1).to(cos.dtype), sin)


def _gained(x: Tensor, weight: Tensor) -> Tensor:
    """x (N, heads, D) times weight (D,) or (G, D), in fp32."""
    weight = weight.float()
    return x * (weight if weight.ndim == 1 else weight.repeat_interleave(x.shape[1] // len(weight), 0))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    """(..., W) -> (..., 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(norm.new_full((), eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()


def _norm_rope(x, weight, eps, cos, sin):
    """The result in x's dtype; in fp32 the normalised heads and 1 / rms."""
    n = x.float()
    r = _inverse_rms(n, eps)                                                           # (N, heads, 1)
    n = n * r                                                                          # (N, heads, D)
    y = _gained(n, weight)
    return (y if cos is None else _rotate(y, cos, sin)).to(x.dtype), n, r


class _NormRope(torch.autograd.Function):
    """The PyTorch path with its gradient written out, because autograd takes twice the time for it (CPU)."""

    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        y, n, r = _norm_rope(x, weight, eps, cos, sin)
        ctx.save_for_backward(n, r, weight, cos, sin)
        return y

    @staticmethod
    def backward(ctx, grad):
        n, r, weight, cos, sin = ctx.saved_tensors
        g = grad.float()
        g = g if cos is None else _rotate(g, cos, -sin)                                # a rotation's transpose turns back
        along, grad_w = g * n, None
        if ctx.needs_input_grad[1]:
            grad_w = along.sum(0).view(*weight.shape[:-1], -1, weight.shape[-1]).sum(-2).to(weight.dtype)
        mean = along @ weight.float() if weight.ndim == 1 else _gained(along, weight).sum(-1)  # (N, heads)
        mean = mean.unsqueeze(-1) / n.shape[-1]
        return _gained(g, weight).addcmul_(n, mean, value=-1).mul_(r).to(grad.dtype), grad_w, None, None, None


class _TritonNormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, cos, sin):
        _check_rows(x, *(t for t in (weight, cos, sin) if t is not None))
        (n, heads, dim), groups = x.shape, 1 if weight is None or weight.ndim == 1 else len(weight)
        cos, sin = (None if t is None else t.contiguous() for t in (cos, sin))
        y = torch.empty(n, heads, dim, dtype=x.dtype, device=x.device)
        _launch(
            _norm_rope_kernel, (n, groups), x, weight, cos, sin, y, x.stride(0), x.stride(1), heads // groups, eps,
            NORM=weight is not None, ROPE=cos is not None, **_head_blocks(heads // groups, dim),
        )  # fmt: skip
        ctx.save_for_backward(x, weight, cos, sin)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, cos, sin = ctx.saved_tensors
        (n, heads, dim), groups = x.shape, 1 if weight is None or weight.ndim == 1 else len(weight)
        dy, programs = dy.contiguous(), triton.cdiv(n, TOKENS)
        dx = torch.empty_like(dy)
        dw = None if weight is None else torch.empty(programs, groups, dim, device=x.device)
        _launch(
            _norm_rope_backward_kernel, (programs, groups), dy, x, weight, cos, sin, dx, dw, n,
            x.stride(0), x.stride(1), heads // groups, ctx.eps, NORM=weight is not None, ROPE=cos is not None,
            TOKENS=TOKENS, **_head_blocks(heads // groups, dim),
        )  # fmt: skip
        return dx, None if weight is None else dw.sum(0).view_as(weight).to(weight.dtype), None, None, None


@jit
def _norm_rope_kernel(
    x, w, cos, sin, y, x_row, x_head, heads, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program has one token's heads of one group; a holds channels i, b channels i + D/2, so the swap costs nothing."""
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h, c = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    inside, row = (h < heads) & (c < HALF), c < HALF
    head = group * heads + h
    at = x + token * x_row + head * x_head + c
    a = tl.load(at, inside, 0.0).to(tl.float32)
    b = tl.load(at + HALF, inside, 0.0).to(tl.float32)
    if NORM:
        r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
        gain = w + group * 2 * HALF + c
        a = a * r * tl.load(gain, row, 0.0).to(tl.float32)
        b = b * r * tl.load(gain + HALF, row, 0.0).to(tl.float32)
    if ROPE:
        t = token * 2 * HALF + c
        turned = a * tl.load(cos + t, row, 0.0).to(tl.float32) + b * tl.load(sin + t, row, 0.0).to(tl.float32)
        b = b * tl.load(cos + t + HALF, row, 0.0).to(tl.float32) + a * tl.load(sin + t + HALF, row, 0.0).to(tl.float32)
        a = turned
    out = y + (token * tl.num_programs(1) * heads + head) * 2 * HALF + c
    tl.store(out, a, inside)
    tl.store(out + HALF, b, inside)


@jit
def _norm_rope_backward_kernel(
    dy, x, w, cos, sin, dx, dw, tokens, x_row, x_head, heads, eps,
    NORM: tl.constexpr, ROPE: tl.constexpr, TOKENS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The rotation turned back, then the gradient of the norm as in _add_norm_backward_kernel, r computed again from x."""
    first, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    h, c = tl.arange(0, BLOCK_H)[:, None], tl.arange(0, BLOCK_D)[None, :]
    row = c < HALF
    inside = (h < heads) & row
    head = group * heads + h
    total_a, total_b = tl.zeros((1, BLOCK_D), tl.float32), tl.zeros((1, BLOCK_D), tl.float32)
    for token in range(first * TOKENS, tl.minimum(first * TOKENS + TOKENS, tokens)):
        at = (token * tl.num_programs(1) * heads + head) * 2 * HALF + c
        ga = tl.load(dy + at, inside, 0.0).to(tl.float32)
        gb = tl.load(dy + at + HALF, inside, 0.0).to(tl.float32)
        if ROPE:
            t = token * 2 * HALF + c
            turned = ga * tl.load(cos + t, row, 0.0).to(tl.float32) + gb * tl.load(sin + t + HALF, row, 0.0).to(tl.float32)
            gb = gb * tl.load(cos + t + HALF, row, 0.0).to(tl.float32) + ga * tl.load(sin + t, row, 0.0).to(tl.float32)
            ga = turned
        if NORM:
            a = tl.load(x + token * x_row + head * x_head + c, inside, 0.0).to(tl.float32)
            b = tl.load(x + token * x_row + head * x_head + c + HALF, inside, 0.0).to(tl.float32)
            r = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF) + eps)[:, None]
            a, b = a * r, b * r
            total_a += tl.sum(ga * a, 0)[None, :]
            total_b += tl.sum(gb * b, 0)[None, :]
            ga = ga * tl.load(w + group * 2 * HALF + c, row, 0.0).to(tl.float32)
            gb = gb * tl.load(w + group * 2 * HALF + c + HALF, row, 0.0).to(tl.float32)
            mean = ((tl.sum(ga * a, 1) + tl.sum(gb * b, 1)) / (2 * HALF))[:, None]
            ga, gb = r * (ga - a * mean), r * (gb - b * mean)
        tl.store(dx + at, ga, inside)
        tl.store(dx + at + HALF, gb, inside)
    if NORM:
        out = dw + (first * tl.num_programs(1) + group) * 2 * HALF + c
        tl.store(out, total_a, row)
        tl.store(out + HALF, total_b, row)


def rope_append(
    qkv: Tensor, cos: Tensor, sin: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor, heads: int
) -> Tensor:
    """Decoding: rotate the queries and keys of a fused projection, and put keys and values into a static cache. No gradients.

    qkv (N, (heads + 2 KV heads) * D): queries, keys, values of N new tokens. cos, sin (N, 1, D). k_cache, v_cache (capacity,
    KV heads, D), rows contiguous: one layer of one document, or of several behind each other. slots (N,) int64 on the device:
    the row of each token, so that a replayed CUDA graph goes on where the device says. Returns q (N, heads, D) in the cache's
    dtype, contiguous.
    """
    kv_heads, dim = k_cache.shape[1:]
    if on_triton(qkv):
        _check_rows(qkv, cos, sin)
        if not (k_cache[:1].is_contiguous() and v_cache[:1].is_contiguous() and k_cache.dtype == v_cache.dtype):
            raise ValueError("fused: the rows of the cache must be contiguous, keys and values of one dtype")
        q = torch.empty(len(qkv), heads, dim, dtype=k_cache.dtype, device=qkv.device)
        _launch(
            _rope_append_kernel, (len(qkv), heads + 2 * kv_heads), qkv, cos, sin, q, k_cache, v_cache, slots, qkv.stride(0),
            cos.stride(0), sin.stride(0), k_cache.stride(0), v_cache.stride(0), heads, kv_heads,
            HALF=dim // 2, BLOCK=_p2(dim // 2),
        )  # fmt: skip
        return q
    qk, v = qkv.unflatten(1, (-1, dim)).split((heads + kv_heads, kv_heads), 1)         # (N, heads, D)
    q, k = _rotate(qk, cos, sin).to(k_cache.dtype).split((heads, kv_heads), 1)
    k_cache.index_copy_(0, slots, k)
    v_cache.index_copy_(0, slots, v.to(v_cache.dtype))
    return q.contiguous()


@jit
def _rope_append_kernel(
    qkv, cos, sin, q, k, v, slots, row, cos_row, sin_row, k_row, v_row, heads, kv_heads,
    HALF: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One head per program: with a single token there is nothing else to share among the processors."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    c = tl.arange(0, BLOCK)
    inside = c < HALF
    at = qkv + token * row + head * 2 * HALF + c
    a, b = tl.load(at, inside, 0.0).to(tl.float32), tl.load(at + HALF, inside, 0.0).to(tl.float32)
    slot = tl.load(slots + token)
    if head >= heads + kv_heads:
        out = v + slot * v_row + (head - heads - kv_heads) * 2 * HALF + c
        tl.store(out, a, inside)
        tl.store(out + HALF, b, inside)
    else:
        cos_at, sin_at = cos + token * cos_row + c, sin + token * sin_row + c
        turned = a * tl.load(cos_at, inside, 0.0).to(tl.float32) + b * tl.load(sin_at, inside, 0.0).to(tl.float32)
        b = b * tl.load(cos_at + HALF, inside, 0.0).to(tl.float32) + a * tl.load(sin_at + HALF, inside, 0.0).to(tl.float32)
        out = q + (token * heads + head) * 2 * HALF + c
        if head >= heads:
            out = k + slot * k_row + (head - heads) * 2 * HALF + c
        tl.store(out, turned, inside)
        tl.store(out + HALF, b, inside)


# -------------------------------------------------------------------------------------------------- joint projections


def join(*layers: nn.Linear) -> None:
    """Lay the weights and biases of layers with one input behind each other in memory, so that `joint` takes them as one.

    They become views of one tensor and keep name, shape and value: state dicts and files stay as they are, and nothing is
    stored twice. Whatever gives a module new memory, such as `.to`, parts them again.
    """
    for name in ("weight", "bias"):
        parts = [getattr(layer, name) for layer in layers]
        if parts[0] is not None:
            whole = torch.cat([p.detach() for p in parts])
            for p, part in zip(parts, whole.split([len(p) for p in parts]), strict=True):
                p.data = part


def joint(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """The outputs of linear layers for x (N, in): [all side by side], from one product, if `join` has made them neighbours and
    no gradient is asked for, else one of each layer. So too for many tokens on a CPU, which reads slices of rows slower."""
    if not torch.is_grad_enabled() and (len(x) == 1 or on_triton(x)):
        weight = _neighbours([layer.weight for layer in layers])
        if weight is not None:
            return [F.linear(x, weight, None if layers[0].bias is None else _neighbours([layer.bias for layer in layers]))]
    return [layer(x) for layer in layers]


def _neighbours(parts: list[Tensor]) -> Tensor | None:
    """Tensors that lie behind each other in one storage, as one tensor."""
    first, end, rows = parts[0], parts[0].data_ptr(), 0
    for p in parts:
        if p.data_ptr() != end:
            return None
        end, rows = end + p.nbytes, rows + p.shape[0]
    try:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    except RuntimeError:  # neighbours by chance, in storages of their own
        return None


# -------------------------------------------------------------------------------------------------------------- SwiGLU


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """silu(gate) * up (Shazeer, arXiv 2002.05202). gate, up (N, F); or gate alone (N, 2 F), gates first, of one projection."""
    if on_triton(gate):
        return _SwiGLU.apply(gate, up)
    if up is None:
        gate, up = gate.chunk(2, -1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """Keeps only its input; backward computes silu again and fills one buffer, so the projection's gradient needs no cat."""

    @staticmethod
    def forward(ctx, gate, up):
        ctx.save_for_backward(gate, up)
        g, u = gate.chunk(2, -1) if up is None else (gate, up)
        _check_rows(g, u)
        y = torch.empty(g.shape, dtype=g.dtype, device=g.device)
        n, width = y.shape
        _launch(_swiglu_kernel, (n, triton.cdiv(width, 1024)), g, u, y, g.stride(0), u.stride(0), width, BLOCK=1024)
        return y

    @staticmethod
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        d_gate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        d_up = None if up is None else torch.empty(up.shape, dtype=up.dtype, device=up.device)
        (g, u), (dg, du) = ((a, b) if b is not None else a.chunk(2, -1) for a, b in ((gate, up), (d_gate, d_up)))
        (n, width), dy = g.shape, dy.contiguous()
        _launch(
            _swiglu_backward_kernel, (n, triton.cdiv(width, 1024)), dy, g, u, dg, du, g.stride(0), u.stride(0), dg.stride(0),
            du.stride(0), width, BLOCK=1024,
        )  # fmt: skip
        return d_gate, d_up


@jit
def _swiglu_kernel(gate, up, y, g_row, u_row, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    g = tl.load(gate + row * g_row + c, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * u_row + c, inside, 0.0).to(tl.float32)
    tl.store(y + row * width + c, g * tl.sigmoid(g) * u, inside)


@jit
def _swiglu_backward_kernel(dy, gate, up, dg, du, g_row, u_row, dg_row, du_row, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    d = tl.load(dy + row * width + c, inside, 0.0).to(tl.float32)
    g = tl.load(gate + row * g_row + c, inside, 0.0).to(tl.float32)
    u = tl.load(up + row * u_row + c, inside, 0.0).to(tl.float32)
    sigma = tl.sigmoid(g)
    tl.store(dg + row * dg_row + c, d * u * sigma * (1 + g * (1 - sigma)), inside)
    tl.store(du + row * du_row + c, d * g * sigma, inside)


# ----------------------------------------------------------------------------------------------------------- connector


def standardise_into(out: Tensor, h: Tensor) -> None:
    """(h - mean) / (std + 1e-8) over the channels of each token, std unbiased, in fp32, written into out. No gradients.

    h (N, W); out (N, W) any dtype, such as one layer's slice of a buffer (N, layers * W).
    """
    if on_triton(h):
        _check_rows(out, h)
        n, width = h.shape
        _launch(_standardise_kernel, (n,), h, out, h.stride(0), out.stride(0), width, BLOCK=_p2(width))
        return
    std, mean = torch.std_mean(h.float(), -1, correction=1, keepdim=True)
    out.copy_((h - mean) / (std + 1e-8))


@jit
def _standardise_kernel(h, out, h_row, out_row, width, BLOCK: tl.constexpr):
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    v = tl.load(h + row * h_row + c, c < width, 0.0).to(tl.float32)
    v = tl.where(c < width, v - tl.sum(v) / width, 0.0)
    std = tl.sqrt(tl.sum(v * v) / (width - 1))
    tl.store(out + row * out_row + c, v / (std + 1e-8), c < width)


# ------------------------------------------------------------------------------------------------ vocabulary and loss


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, chunk: int | None = None) -> Tensor:
    """Sum over tokens of the cross-entropy of logits = hidden weight^T, which are never whole in memory.

    hidden (T, H), weight (V, H), labels (T,) int64, -100 where a token is no target. The products run in autocast's dtype
    if it is on, else in weight's; softmax and loss in fp32. chunk: tokens at a time, by default as many as CHUNK_LOGITS allows.
    Returns the sum () in fp32, 0 if there is no target. Gradients for hidden and weight.

    The gradient of the logits, softmax - onehot, is known as soon as they are, so both products with it follow while the chunk
    is there (as Hsu et al. do, arXiv 2410.10989); `backward` only multiplies by what the loss was multiplied with, once.
    """
    if chunk is None:
        chunk = max(1, CHUNK_LOGITS.get(hidden.device.type, CHUNK_LOGITS["cpu"]) // len(weight))
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    return _LinearCrossEntropy.apply(hidden, weight, labels, chunk, dtype, torch.is_grad_enabled())


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk, dtype, grads):
        need_h, need_w = (grads and needed for needed in ctx.needs_input_grad[:2])
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_h = torch.empty_like(hidden) if need_h else None
        grad_w = (torch.empty_like if len(hidden) else torch.zeros_like)(weight) if need_w else None
        with torch.autocast(hidden.device.type, enabled=False):
            w = weight.to(dtype)                                                       # once, not for every chunk
            for start in range(0, len(hidden), chunk):
                h = hidden[start : start + chunk].to(dtype)                            # (C, H)
                sums, d = _loss_and_gradient(h @ w.T, labels[start : start + chunk], need_h or need_w)
                loss += sums
                if need_h:
                    _product(grad_h[start : start + chunk], d, w)
                if need_w:
                    _product(grad_w, d.T, h, add=start > 0)
                del d  # before the next chunk's logits are allocated
        ctx.grads = grad_h, grad_w
        return loss

    @staticmethod
    def backward(ctx, grad):
        if ctx.grads is None:
            raise RuntimeError("linear_cross_entropy: its gradients were given away by the first backward pass")
        (grad_h, grad_w), ctx.grads = ctx.grads, None
        return *(None if g is None else g.mul_(grad.to(g.dtype)) for g in (grad_h, grad_w)), None, None, None, None


def _product(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b; if out has another dtype, in slabs, so that the product itself is never whole."""
    if out.dtype == a.dtype:
        out.addmm_(a, b, beta=int(add))  # beta 0: what is there is not read
        return
    for o, slab in zip(out.tensor_split(8), a.tensor_split(8), strict=True):
        o.add_(slab @ b) if add else o.copy_(slab @ b)


def _loss_and_gradient(logits: Tensor, labels: Tensor, grad: bool) -> tuple[Tensor, Tensor | None]:
    """logits (C, V) -> sum of losses in fp32, and softmax - onehot (C, V) in logits' dtype. The logits may be overwritten."""
    if on_triton(logits):
        loss = torch.empty(len(logits), device=logits.device)                          # (C,)
        _launch(_softmax_gradient_kernel, (len(logits),), logits, labels, loss, logits.shape[1], GRAD=grad, BLOCK=4096)
        return loss.sum(), logits if grad else None
    log_p = logits.float().log_softmax(-1)                                             # (C, V)
    loss = F.nll_loss(log_p, labels, ignore_index=-100, reduction="sum")
    if not grad:
        return loss, None
    index, ignored = labels.clamp(min=0)[:, None], labels < 0
    d = log_p.exp_().scatter_add_(1, index, log_p.new_full(index.shape, -1.0))
    if ignored.any():
        d[ignored] = 0
    return loss, d.to(logits.dtype)


@jit
def _softmax_gradient_kernel(logits, labels, loss, vocab, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """One token's loss, and in place of its logits their gradient: two reads and one write of what PyTorch moves ten times."""
    token, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    label = tl.load(labels + token)
    row = logits + token * vocab
    # Read here: the sums below make all threads wait for each other, and behind them the logits are overwritten.
    own = tl.load(row + tl.maximum(label, 0)).to(tl.float32)
    top, total = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        v = tl.load(row + start + c, start + c < vocab, -1e30).to(tl.float32)
        higher = tl.maximum(top, v)
        total = total * tl.exp(top - higher) + tl.exp(v - higher)
        top = higher
    highest = tl.max(top, 0)
    log_z = highest + tl.log(tl.sum(total * tl.exp(top - highest), 0))
    tl.store(loss + token, tl.where(label >= 0, log_z - own, 0.0))
    if GRAD:
        for start in range(0, vocab, BLOCK):
            v = tl.load(row + start + c, start + c < vocab, -1e30).to(tl.float32)
            d = tl.exp(v - log_z) - tl.where(start + c == label, 1.0, 0.0)
            tl.store(row + start + c, tl.where(label >= 0, d, 0.0), start + c < vocab)
