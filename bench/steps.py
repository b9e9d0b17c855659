"""The steps between the products that are fused, the loss over the vocabulary, and a training step of both stages."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
import ops
from bench import peers as theirs
from bench.attention import Case
from bench.measure import Bench, Row, Way, peak, reason, tensors
from bench.system import build, called, dit_config, latent, mllm_config, packed
from flow import CONDITION_TIME, FlowLoss, Samples
from flops import count
from training import LanguageLoss

# -------------------------------------------------------------------------------------------- fused steps, as others write them


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _normed(x: Tensor) -> Tensor:
    """RMSNorm without a gain, in fp32 at least, as transformers writes it."""
    f = _up(x)
    mean = f.pow(2).mean(-1, keepdim=True)
    return f * torch.rsqrt(mean + 1e-6)


def add_rms_norm(x, delta, weight):
    x = x + delta
    n = _normed(x).to(x.dtype)
    return x, weight * n


def norm_rope(x, weight, cos, sin):
    n = _normed(x) * _up(weight)
    a, b = n.chunk(2, -1)
    swapped = torch.cat((b, a), -1)
    return (n * cos + swapped * sin).to(x.dtype)  # the sign of the rotation is in sin


def gate_add_modulate(x, gate, y, shift, scale):
    x = x + gate.to(x.dtype) * y.view_as(x)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x, (h * scale.to(x.dtype) + shift.to(x.dtype)).flatten(0, 1)


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# -------------------------------------------------------------------------------------------------------------- fused steps


def fused(b: Bench) -> None:
    """A CPU is shown one of them."""
    n, w, f, d = b.pick(gpu=(20480, 2048, 18944, 128), cpu=(900, 1024, 2816, 128), smoke=(12, 64, 96, 32))
    x = b.randn(n, w)
    y = b.randn(n, w, seed=1)
    gain = b.randn(w, seed=2)
    # The residual stream in four samples, each with its own tables.
    stream = x.view(4, -1, w)
    gate = b.randn(4, 1, w, seed=6).float()
    shift = b.randn(4, 1, w, seed=7).float()
    scale = b.randn(4, 1, w, seed=8).float()
    args = stream, gate, y, shift, scale
    # Read twice, x and y, and written twice, the stream and what the next product reads.
    fused_step(b, "gate, add, modulate", ops.gate_add_modulate, gate_add_modulate, args, moved=4 * x.nbytes)
    if b.size == "cpu":
        return

    def add(x, delta, weight):
        return ops.add_rms_norm(x, delta, weight, 1e-6)

    fused_step(b, "add, RMSNorm", add, add_rms_norm, (x, y, gain), moved=4 * x.nbytes)

    # A slice of a joint projection, as in the models.
    def queries(qkv):
        return qkv[:, :w].unflatten(1, (w // d, d))

    def turn(qkv, gain, cos, sin):
        return ops.norm_rope(queries(qkv), gain, 1e-6, cos, sin)

    def turn_eager(qkv, gain, cos, sin):
        return norm_rope(queries(qkv), gain, cos, sin)

    # The angles are given, not learned: only the first two arguments have gradients.
    angles = torch.rand(n, 1, d // 2, device=b.device) * 6
    cos = torch.cat((angles.cos(), angles.cos()), -1)
    sin = torch.cat((-angles.sin(), angles.sin()), -1)
    args = b.randn(n, 3 * w, seed=4), b.randn(d, seed=5), cos, sin
    fused_step(b, "norm of heads, rotation", turn, turn_eager, args, moved=2 * x.nbytes, learned=2)

    # Two numbers in, one out: three for two.
    wide = b.randn(n // 4, 2 * f, seed=9)
    fused_step(b, "SwiGLU", ops.swiglu, swiglu, (wide,), moved=wide.nbytes * 3 // 2)
    one_token(b)


def one_token(b: Bench) -> None:
    """The half of a decoding step's MLP that reads two thirds of a layer's weights, beside the same in separate steps."""
    width, inner = b.pick(gpu=(3584, 18944), cpu=(), smoke=(64, 96))
    gate = torch.nn.Linear(width, inner, bias=False, device=b.device, dtype=b.dtype)
    up = torch.nn.Linear(width, inner, bias=False, device=b.device, dtype=b.dtype)
    ops.join(gate, up)
    both = torch.cat((gate.weight.detach(), up.weight.detach()))
    x = b.randn(1, width)
    delta = b.randn(1, width, seed=1)
    gain = b.randn(width, seed=2)

    def together() -> Way:
        if not ops.on_triton(x):
            return Way(partial(ops.add_norm_swiglu, x, delta, gain, 1e-6, gate, up))
        # By name, whether decoding takes it or not.
        return Way(partial(kernels.add_norm_swiglu, x, delta, gain, 1e-6, both))

    def apart() -> Way:
        def call() -> tuple[Tensor, Tensor]:
            s, h = ops.add_rms_norm(x, delta, gain, 1e-6)
            return s, ops.swiglu(*ops.joint(h, gate, up))

        return Way(call)

    def expected() -> tuple[Tensor, Tensor]:
        s = (x + delta).double()
        h = _normed(s) * gain.double()
        return s, F.silu(h @ gate.weight.double().T) * (h @ up.weight.double().T)

    b.measure(Row(
        what="norm, projection, SwiGLU of a token",
        shape=f"1 x {width} on 2 x {inner}",
        ours=together,
        peers={"ours, in separate steps": apart},
        limit=b.limit(1e-2, 5e-6),
        reference=expected,
        moved=2 * gate.weight.nbytes,
    ))  # fmt: skip


def fused_step(
    b: Bench, name: str, ours: Callable, eager: Callable, args: tuple[Tensor, ...], moved: int, learned: int | None = None
) -> None:
    """Forward alone, then forward and backward. moved: bytes; learned: how many arguments have a gradient, None: all."""
    shape = " x ".join(map(str, args[0].shape))
    doubles = [t.double() for t in args]

    def expected():
        return eager(*doubles)

    def expected_gradients():
        return backward(plain, doubles).call()

    # What the gradients of the results are: something other than ones.
    weights = []
    for i, o in enumerate(tensors(eager(*args))):
        weights.append(b.randn(*o.shape, seed=20 + i))

    def compiled():
        return torch.compile(eager, dynamic=False)

    def forward(way: Callable) -> Way:
        return Way(partial(way(), *args))

    def backward(way: Callable, args=args) -> Way:
        function = way()
        leaves = [t.detach() for t in args]
        for leaf in leaves[:learned]:
            leaf.requires_grad_()

        def call():
            out = function(*leaves)
            if not isinstance(out, tuple):
                out = (out,)
            given = [g.to(o.dtype).view_as(o) for g, o in zip(weights, out, strict=True)]
            return torch.autograd.grad(out, leaves[:learned], given)

        return Way(call)

    def mine():
        return ours

    def plain():
        return eager

    ways = {"eager": plain}
    if b.cuda:
        ways["torch.compile"] = compiled
    b.measure(Row(
        what=name,
        shape=shape,
        ours=partial(forward, mine),
        peers={peer: partial(forward, way) for peer, way in ways.items()},
        limit=b.limit(6e-3, 5e-6),
        reference=expected,
        moved=moved,
    ))  # fmt: skip
    if b.size == "cpu":
        return
    b.measure(Row(
        what=f"and backward: {name}",
        shape=shape,
        ours=partial(backward, mine),
        peers={peer: partial(backward, way) for peer, way in ways.items()},
        limit=b.limit(1e-2, 1e-5),
        reference=expected_gradients,
        gradients=True,
    ))  # fmt: skip


# ---------------------------------------------------------------------------------------------------- loss over the vocabulary


def unfused(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def unfused_double(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(hidden.double() @ weight.double().T, labels, reduction="sum")


def loss_and_gradients(loss: Callable, hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    value = loss(hidden, weight, labels)
    return value, *torch.autograd.grad(value, (hidden, weight))


def cross_entropy(b: Bench) -> None:
    """Loss and gradients of the last layer over the vocabulary; time, and the most memory that it needs."""
    t, h, v = b.pick(gpu=(8192, 3584, 152064), cpu=(512, 256, 152064), smoke=(32, 16, 500))
    # Small weights: logits of a few units, as a model has them, and no softmax that is all on one word.
    hidden = b.randn(t, h).requires_grad_()
    weight = (b.randn(v, h, seed=1) * 0.02).requires_grad_()
    labels = torch.arange(t, device=b.device) * 7 % v
    fused = ops.linear_cross_entropy
    if b.size == "smoke":
        fused = partial(fused, chunk=8)  # more than one of so few tokens

    def way(loss: Callable) -> Way:
        return Way(partial(loss_and_gradients, loss, hidden, weight, labels))

    expected = None
    if b.size != "gpu":  # 10 GB of float64 logits are no reference there: the unfused loss is
        expected = partial(loss_and_gradients, unfused_double, hidden, weight, labels)
    b.measure(Row(
        what="training: linear + cross-entropy",
        shape=f"{t} tokens x {h} on {v}",
        ours=partial(way, fused),
        peers={"unfused": partial(way, unfused)},
        limit=b.limit(1e-2, 1e-5),
        reference=expected,
        gradients=True,
    ))  # fmt: skip

    # Memory needs one call and no reference: on a CPU there is time for more tokens.
    longer = b.pick(gpu=1, cpu=4, smoke=1)
    what = "its memory beside the gradients"
    shape = f"{t * longer} tokens x {h} on {v}"
    if b.passed(what, shape) or b.compiling:
        return
    record = b.record(what, shape)
    hidden = hidden.detach().repeat_interleave(longer, 0).requires_grad_()
    labels = labels.repeat_interleave(longer, 0)
    gradients = hidden.nbytes + weight.nbytes
    # Both have to hold the gradients: what is compared is the memory beside them.
    try:
        own = peak(partial(loss_and_gradients, fused, hidden, weight, labels), b.device)
        own = max(1, own - gradients)
        other = peak(partial(loss_and_gradients, unfused, hidden, weight, labels), b.device)
        other = max(1, other - gradients)
        record["bytes"] = own
        record["peers"] = {"unfused": {"bytes": other, "ratio": other / own}}
    except Exception as e:
        record["failed"] = reason(e)
    b.write(record)


# ------------------------------------------------------------------------------------------------------------ training steps


def stage1(b: Bench) -> None:
    """Forward and backward over packed documents, without the optimizer, which is the same for both."""
    lengths = b.pick(
        gpu=[2048, 300, 1210, 97, 620, 1500, 64, 905],
        cpu=[256, 40, 151, 12],
        smoke=[20, 5, 9],
    )
    mllm = build(b, mllm_config(b, layers=b.pick(gpu=8, cpu=None, smoke=None)), torch.float32)
    c = mllm.config
    loss_of = LanguageLoss(mllm)
    ids, segments, where = packed(b, c, lengths)
    # Each token is to foretell the next one of its document; the last has none.
    labels = torch.cat([F.pad(x[1:], (0, 1), value=-100) for x in ids])
    batch = SimpleNamespace(
        ids=torch.cat(ids),
        positions=where,
        cu_seqlens=segments,
        pixels=None,
        grids=None,
        labels=labels,
    )
    targets = (labels >= 0).sum()
    watched = mllm.model.layers[0].mlp.down_proj.weight

    def loss():
        return loss_of(batch)[0] / targets

    def ours() -> Way:
        return Way(partial(theirs.train, b.device, mllm, loss, watched))

    def peer() -> Way:
        return Way(theirs.language_step(mllm, ids, b.device))

    # Two per weight and token, three times as much with the backward pass; attention three and a half times.
    linear = 6 * count(mllm.model.layers, mllm.lm_head) * sum(lengths)
    b.measure(Row(
        what="training step, stage 1",
        shape=f"{called(b, 'mllm', mllm)}, {c.num_hidden_layers} layers, {len(lengths)} documents, {sum(lengths)} tokens",
        ours=ours,
        peers={"transformers, padded": peer},
        limit=b.limit(1e-1, 1e-3),
        gradients=True,
        flops=linear + 3.5 * reading_flops(c, lengths),
        samples=len(lengths),
    ))  # fmt: skip


def reading_flops(c, lengths: list[int]) -> float:
    """Of causal attention in all layers of a language model, forward."""
    case = Case("", lengths, lengths, c.num_attention_heads, c.num_key_value_heads, c.head_dim, causal=True)
    return case.flops * c.num_hidden_layers


def stage2(b: Bench) -> None:
    """Forward of the frozen language model, forward and backward of the painter, without the optimizer."""
    roomy = b.cuda and torch.cuda.get_device_properties(b.device).total_memory > 100e9
    sizes = b.pick(
        gpu=[[(480, 480)] * (5 if roomy else 3), [(480, 480)] * 2, [(480, 480)]],
        cpu=[[(128, 128)] * 3, [(192, 96)] * 2, [(64, 64)]],
        smoke=[[(32, 32)] * 2, [(32, 48)]],
    )
    reads = b.pick(gpu=[2048, 700, 300], cpu=[160, 60, 24], smoke=[12, 5])
    # What is frozen is in the bench's type. What learns is in fp32, since small steps would be lost in bf16.
    mllm = build(b, mllm_config(b)).requires_grad_(False)
    c = mllm.config
    dit = build(b, dit_config(b), torch.float32)
    ids, segments, where = packed(b, c, reads)
    # A document each: its pictures but the last are clean, and the DiT reads the hidden states of its own rows.
    latents = []
    for s, pictures in enumerate(sizes):
        latents.append([latent(b, *size, 9 * s + k) for k, size in enumerate(pictures)])
    clean = [len(pictures) - 1 for pictures in latents]
    t = torch.linspace(0.3, 0.9, len(latents))
    loss_of = FlowLoss(dit, CONDITION_TIME)
    rows = [range(a, z) for a, z in pairwise(segments.bounds)]

    def loss():
        with torch.no_grad():
            states = theirs.features(mllm(torch.cat(ids), where, segments))
        samples = Samples(states, rows, latents, clean)
        error, n = loss_of(samples, t, torch.Generator().manual_seed(5))
        return error.sum() / n.sum()

    # Of the first block, and the peer's has the same name.
    watched = next(name for name, _ in dit.named_parameters() if name.endswith("net.2.weight"))

    def ours() -> Way:
        return Way(partial(theirs.train, b.device, dit, loss, dit.get_parameter(watched)))

    def peer() -> Way:
        return Way(theirs.flow_step(mllm, dit, ids, latents, clean, t, CONDITION_TIME, 5, watched))

    reading = 2 * count(mllm.model.layers) * sum(reads) + reading_flops(c, reads)
    b.measure(Row(
        what="training step, stage 2",
        shape=f"{called(b, 'mllm', mllm)} reads, {called(b, 'dit', dit)} learns, {len(sizes)} samples",
        ours=ours,
        peers={"both, sample by sample": peer},
        limit=b.limit(1e-1, 1e-3),
        gradients=True,
        flops=reading + learning_flops(dit, latents, reads),
        samples=len(latents),
    ))  # fmt: skip


def learning_flops(dit, latents: list[list[Tensor]], reads: list[int]) -> float:
    """Of the DiT, forward and backward, counted as in `stage1`."""
    c = dit.config
    heads = c.num_attention_heads
    d = c.attention_head_dim
    patches = []
    for pictures in latents:
        patches.append(sum(z.shape[1] * z.shape[2] // 4 for z in pictures))
    block = dit.repeated()[0]
    # Keys and values of the text are made anew in every layer, what goes into them once.
    per_text = count(block.attn2.to_k, block.attn2.to_v) * c.num_layers
    per_text += count(dit.crossattn_proj)
    per_patch = (count(block.attn1, block.attn2.to_q, block.attn2.to_out) + 2 * c.width * c.mlp_width) * c.num_layers
    among = Case("", patches, patches, heads, heads, d).flops
    across = Case("", patches, reads, heads, heads, d).flops
    linear = per_text * sum(reads) + per_patch * sum(patches)
    return 6 * linear + 3.5 * (among + across) * c.num_layers


GROUPS = {
    "fused": fused,
    "linear-cross-entropy": cross_entropy,
    "stage1": stage1,
    "stage2": stage2,
}
