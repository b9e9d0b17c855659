"""What a training run will cost, before it is paid for: parameters, bytes per GPU, FLOPs, days. No weights, no GPU.

    python train_stage1.py --plan --mllm 7B --world 8 --zero --checkpointing
    python train_stage2.py --plan --mllm 7B --dit 2B --vae wan2.1 --world 8 --documents 1
    python plan.py                                            the tables of the README, in Markdown

Parameters are counted on the modules, built on the meta device. FLOPs and bytes follow from shapes by the formulas below;
tests/test_plan.py holds them against PyTorch's own FlopCounterMode, saved tensors and allocations. Times are computed, not measured.
The training scripts take the FLOPs of a batch for their MFU from here: `flops` of a `Batch`, and `peak_flops` of the device.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from torch import nn

from checkpoint import HUB_NAME, InputError, read_json
from dit import PRESETS as DITS
from dit import DiT, DiTConfig
from model import MLLM, MLLMConfig
from model import PRESETS as MLLMS
from vae import PRESETS as VAES
from vae import VAE, Attention, Down, VAEConfig

# Dense bf16 FLOP/s of the data sheets, by what torch.cuda.get_device_name() contains, and bytes/s of their memory.
DEVICES = {"H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}
GB = 1e9  # as on the data sheets: an H200 has 141
ADAM = 8  # bytes a parameter: two fp32 moments


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown, and then there is no MFU."""
    return next((peak for name, (peak, _) in DEVICES.items() if name in device), None)


@dataclass
class PlanConfig:
    """What --plan asks beyond the flags of the stage. Where the paper is silent the comment says what is assumed."""

    world: int = 1  # GPUs
    gpu: str = "H200"
    gpu_memory: float = 141.0  # GB
    mfu: float = 0.38  # of the data sheet's FLOP/s, recomputation included: torchtitan's 8B reaches 33-39 % on H100
    link: float = 300.0  # GB/s of an all-reduce, per GPU; assumed, near what NCCL reports inside and between 8-GPU nodes
    picture: int = 480  # pixels along a side; assumed
    pictures: int = 5  # of a dialogue; assumed
    text: int = 600  # tokens of a dialogue beside its pictures, half of them supervised; assumed
    dialogues: int = 298_000  # stage-1 data, the size that summaries of the paper give
    pairs: int = 5_000_000  # video clips (two pictures, a caption) that stage 2 reads as well, by the same sources
    caption: int = 128  # tokens of a clip's dialogue; assumed
    epochs: float = 1.0  # passes over the data; assumed
    frozen: str = "fp32"  # type of the frozen weights, as stage 2 loads them
    logit_chunk: int = 0  # supervised tokens whose logits exist at a time; 0: all of them
    fused_norm: bool = True  # CUDA's RMSNorm keeps no normalised copy of its input, the CPU's does
    norm_free_zero: bool = False


# ------------------------------------------------------------------------------------------------------------------ batch


@dataclass
class Batch:
    """The sizes of one micro-batch on which its cost depends. A pair is a query and a key that it attends to."""

    tokens: int = 0  # of the decoder
    token_pairs: int = 0  # causal: n (n + 1) / 2 of a document
    supervised: int = 0  # tokens with a logit
    patches: int = 0  # of the vision tower
    window_pairs: int = 0
    image_pairs: int = 0
    pictures: list[tuple[int, int]] = field(default_factory=list)  # pixels (H, W) that the VAE encodes
    latents: int = 0  # patches of the DiT
    latent_pairs: int = 0
    images: int = 0  # of the DiT, given ones and targets
    context: int = 0  # tokens that its samples read
    context_pairs: int = 0

    @classmethod
    def of(
        cls,
        c: MLLMConfig,
        lengths: list[int],
        grids: Iterable[tuple[int, int]] = (),
        supervised: int = 0,
        pictures: Iterable[tuple[int, int]] = (),
        samples: Iterable[tuple[list[int], int]] = (),
    ) -> "Batch":
        """lengths: tokens of each document. grids: vision patches (rows, columns) of its pictures, pictures: (H, W) in pixels.
        samples of stage 2: DiT patches of each image, the target last, and how many tokens are read."""
        window, b = c.vision.window_size // c.vision.patch_size, cls()
        b.tokens, b.token_pairs, b.supervised = sum(lengths), sum(n * (n + 1) // 2 for n in lengths), supervised
        for rows, columns in grids:
            b.patches += rows * columns
            b.image_pairs += (rows * columns) ** 2
            b.window_pairs += squares(rows, window) * squares(columns, window)
        for images, context in samples:
            n = sum(images)
            b.latents, b.images, b.context = b.latents + n, b.images + len(images), b.context + context
            b.latent_pairs, b.context_pairs = b.latent_pairs + n * n, b.context_pairs + n * context
        b.pictures = list(pictures)
        return b


def squares(n: int, w: int) -> int:
    """Sum of the squared lengths when n is cut into pieces of w and a rest: the windows of a picture along one side."""
    return n // w * w * w + (n % w) ** 2


# ------------------------------------------------------------------------------------------------------------------ FLOPs
# A matrix product m x k x n is 2 m k n, its backward pass twice that: once for the input, once for the weights; only once where
# the input needs no gradient. Attention is 4 D per head and pair. Norms, activations and rotations are left out: under 1 %.


def flops(stage: int, mllm: MLLMConfig, b: Batch, dit: DiTConfig | None = None, vae: VAEConfig | None = None) -> dict:
    """Part -> (forward, backward) FLOPs of a micro-batch. What MFU counts: nothing twice, so no recomputation.

    sum(map(sum, flops(...).values())) / seconds / peak_flops(device name) is the MFU.
    """
    v, h = mllm.vision, mllm.hidden_size
    w, unit, trained = v.hidden_size, v.spatial_merge_size**2, 2 * (stage == 1)
    embed = 2 * b.patches * v.in_channels * v.temporal_patch_size * v.patch_size**2 * w
    full = sum(i in v.fullatt_block_indexes for i in range(v.depth))
    tower = v.depth * 2 * b.patches * (4 * w * w + 3 * w * v.intermediate_size)
    tower += 4 * w * (full * b.image_pairs + (v.depth - full) * b.window_pairs)
    tower += 2 * b.patches * w * (unit * w + v.out_hidden_size)  # the merger; a unit is unit * w wide
    q, kv = mllm.num_attention_heads * mllm.head_dim, mllm.num_key_value_heads * mllm.head_dim
    decoder = 2 * b.tokens * h * (2 * q + 2 * kv + 3 * mllm.intermediate_size) + 4 * q * b.token_pairs
    decoder *= mllm.num_hidden_layers
    parts = {
        "vision tower": (embed + tower, trained * tower + trained // 2 * embed),
        "decoder": (decoder, trained * decoder),
    }
    if stage == 1:
        head = 2 * b.supervised * h * mllm.vocab_size
        return parts | {"logits": (head, 2 * head)}
    connector = 2 * b.tokens * dit.crossattn_proj_in_channels * dit.text_embed_dim
    d, r, patch = dit.width, dit.adaln_lora_dim, dit.patch_size[1] ** 2
    block = b.latents * d * (6 * d + 2 * int(d * dit.mlp_ratio)) + 2 * b.context * dit.text_embed_dim * d
    block = 2 * block + 4 * d * (b.latent_pairs + b.context_pairs) + 2 * b.images * 3 * 4 * d * r
    body = dit.num_layers * block + 2 * b.latents * d * dit.out_channels * patch + 2 * b.images * d * (4 * d + 3 * r)
    first = 2 * b.latents * (dit.in_channels + dit.concat_padding_mask) * patch * d
    parts["connector"] = (connector, connector)
    parts["VAE encoder"] = (sum(encoder_flops(vae, *size) for size in b.pictures), 0)
    return parts | {"DiT": (body + first, 2 * body + first)}


def encoder_flops(c: VAEConfig, height: int, width: int) -> int:
    """Of one picture; walks the encoder's convolutions and halves the sides where it does."""
    with torch.device("meta"):
        vae = VAE(c)
    total, h, w = 0, height, width
    for module in (*vae.encoder.modules(), vae.quant_conv):
        if isinstance(module, Down):
            h, w = h // 2, w // 2
        if isinstance(module, nn.Conv2d):
            total += 2 * h * w * module.weight.numel()
        if isinstance(module, Attention):
            total += 4 * module.to_qkv.in_channels * (h * w) ** 2
    return total


# ----------------------------------------------------------------------------------------------------------------- memory
# What autograd keeps, tensor by tensor, of the plain PyTorch operations with fused attention. e: bytes of the autocast type.
# In bf16 each Linear keeps a cast of its own input unless that is bf16 already, and a cast of its weight.


@dataclass
class Segment:
    """A stretch of the forward pass: bytes it leaves for the backward pass, and what it needs while it runs."""

    saved: int
    parameters: int = 0
    input: int = 0  # bytes: all that checkpointing keeps
    forward: int = 0  # temporary
    backward: int = 0  # temporary


def layer_bytes(c: MLLMConfig, n: int, e: int, fused_norm: bool) -> tuple[int, int, int]:
    """Saved, stream and widest temporary of a decoder layer on n tokens."""
    h, kv = c.hidden_size, c.num_key_value_heads * c.head_dim
    norms = 2 * (4 * h + 4) + (0 if fused_norm else 2 * 4 * h)  # input, 1 / rms, normalised input
    linears = (2 if e == 4 else 5) * h * e  # q, k, v | gate, up
    attention = (h + kv) * e + kv * e + h * e + 4 * c.num_attention_heads  # q and k, v, result, log-sum-exp
    mlp = 4 * c.intermediate_size * e  # gate, silu(gate), up, their product
    return n * (norms + linears + attention + mlp), n * 4 * h, n * (3 * c.intermediate_size * e + 2 * 4 * h)


def vision_bytes(c, n: int, e: int, fused_norm: bool) -> tuple[int, int, int]:
    """The same of a block of the vision tower on n patches; q and k are rotated copies, v holds on to all of q | k | v."""
    w = c.hidden_size
    norms = 2 * (4 * w + 4) + (0 if fused_norm else 2 * 4 * w)
    linears = (2 if e == 4 else 3) * w * e
    attention = 2 * w * e + 3 * w * e + w * e + 4 * c.num_heads
    return n * (norms + linears + attention + 4 * c.intermediate_size * e), n * 4 * w, n * (3 * c.intermediate_size * e + 8 * w)


def block_bytes(c: DiTConfig, n: int, m: int, groups: int, e: int) -> tuple[int, int, int]:
    """The same of a DiT block on n patches that read m context tokens; groups: chunks with a modulation of their own."""
    d, heads = c.width, 4 * c.num_attention_heads
    sub = 3 * (3 * 4 * d + 8 + d * e)  # input, its LayerNorm, what is gated, mean and 1 / std, modulated input of the linears
    attended = 3 * (4 * d + heads) + (3 + 1) * d * e + 2 * d * e + 2 * heads  # HeadNorm's, q k v and result, cross q and result
    mlp = 2 * int(d * c.mlp_ratio) * e
    context = 4 * d + heads + 2 * d * e
    return n * (sub + attended + mlp) + m * context + groups * 4 * 12 * d, n * 4 * d, n * (mlp + 3 * 4 * d)


def peak(segments: list[Segment], e: int, checkpointing: bool, accumulate: int = 1) -> int:
    """Largest number of bytes alive in a step beside weights, EMA and moments: activations, weight casts and gradients.

    Walks forward and backward once: in the backward pass activations go and gradients come, so the top may lie anywhere.
    """
    cast = e if e == 2 else 0
    grads = 4 * sum(s.parameters for s in segments)
    live = top = grads if accumulate > 1 else 0
    for s in segments:
        kept = s.input if checkpointing and s.input else s.saved
        top = max(top, live + s.saved * (1 if kept == s.saved else 0) + s.input + cast * s.parameters + s.forward)
        live += kept + cast * s.parameters
    top = max(top, live)
    if checkpointing:  # autocast drops its casts at its end, recomputation makes them again
        live -= cast * sum(s.parameters for s in segments if s.input)
    for s in reversed(segments):
        again = checkpointing and s.input
        live += s.saved + cast * s.parameters if again else 0
        top = max(top, live + s.backward + (4 + cast) * s.parameters)
        live -= (s.saved + s.input if again else s.saved) + cast * s.parameters
        live += 4 * s.parameters if accumulate == 1 else 0
    return top


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def stage1_segments(mllm: MLLM, b: Batch, e: int, chunk: int = 0, fused_norm: bool = True) -> list[Segment]:
    c, v, cast = mllm.config, mllm.config.vision, e == 2
    w, pixels = v.hidden_size, v.in_channels * v.temporal_patch_size * v.patch_size**2
    out = [Segment(0, count(mllm.model.embed_tokens))]
    if b.patches:
        tables = 2 * 4 * w // v.num_heads
        out.append(Segment(b.patches * (pixels * (e if cast else 0) + tables), count(mllm.visual.patch_embed)))
        saved, stream, wide = vision_bytes(v, b.patches, e, fused_norm)
        out += [Segment(saved, count(block), stream, 0, wide) for block in mllm.visual.blocks]
        merged = b.patches * (4 * w + 4 + 3 * w * e + (0 if fused_norm else 4 * w))
        out.append(Segment(merged, count(mllm.visual.merger), 0, 0, b.patches * 3 * w * e))
    tables = b.tokens * 2 * 4 * c.head_dim
    saved, stream, wide = layer_bytes(c, b.tokens, e, fused_norm)
    out += [Segment(saved, count(layer), stream, 0, wide) for layer in mllm.model.layers]
    rows, whole = min(b.supervised, chunk or b.supervised), b.tokens * 4 * c.hidden_size
    logits = rows * c.vocab_size * 4
    norm = b.tokens * (2 * 4 * c.hidden_size + (0 if fused_norm else 4 * c.hidden_size)) + tables
    head = 0 if mllm.tied else count(mllm.lm_head)
    keep = norm + b.supervised * c.hidden_size * (4 + (e if cast else 0))
    return [*out, Segment(keep + (0 if chunk else logits), head, 0, logits, 2 * logits + whole)]


def stage2_segments(dit: DiT, b: Batch, e: int, features: int) -> list[Segment]:
    """features: bytes of the MLLM's states per number; they stay for the connector's gradient."""
    c = dit.config
    d, wide_in, text = c.width, c.crossattn_proj_in_channels, c.text_embed_dim
    cast = e if e != features else 0
    out = [Segment(b.tokens * (wide_in * (features + cast) + 2 * text * e), count(dit.crossattn_proj))]
    out.append(Segment(b.context * text * e, 0))
    modulation = [dit.time_embed, dit.norm_out, *(m for x in dit.transformer_blocks for m in (x.norm1, x.norm2, x.norm3))]
    table = b.images * 4 * 9 * d * c.num_layers
    patch = c.out_channels * c.patch_size[1] ** 2
    embed = b.latents * (7 * 4 * patch + 2 * 4 * c.attention_head_dim)
    out.append(Segment(embed + table, sum(map(count, modulation)) + count(dit.patch_embed), 0, 0, table))
    out[-1].parameters = 0  # computed in fp32, without casts: their gradients are counted with the blocks
    saved, stream, wide = block_bytes(c, b.latents, b.context, b.images, e)
    out += [Segment(saved, count(block), stream, 0, wide) for block in dit.transformer_blocks]
    return [*out, Segment(b.latents * (3 * 4 * d + 3 * 4 * patch), count(dit.proj_out), 0, 0, b.latents * 2 * 4 * d)]
