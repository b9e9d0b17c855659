"""How many FLOPs a step has, by formula: what the MFU in a status line is made of, at every step.

A matrix product m x k x n is 2 m k n; its backward pass is twice that, once for the input and once for the weights, and only
once where the input needs no gradient. Attention is 4 D per head and pair of a query and a key. Norms, activations and
rotations are left out: under 1 %. Nothing is counted twice, so no recomputation. tests/tools/test_plan.py holds the formulas
against the products that the modules really call.

    parts = flops(1, mllm.config, Batch.of(mllm.config, [2048]))       # part -> (forward, backward)
    mfu = sum(map(sum, parts.values())) / seconds / peak_flops(torch.cuda.get_device_name())
"""

import math
from dataclasses import dataclass, field

from torch import nn

from dit import DiTConfig
from model import MLLMConfig
from vae import VAEConfig

# Dense bf16 FLOP/s of the data sheets, by what torch.cuda.get_device_name() contains, and bytes/s of their memory.
DEVICES = {"H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown, and then there is no MFU."""
    return next((peak for name, (peak, _) in DEVICES.items() if name in device), None)


def count(*modules: nn.Module) -> int:
    """Parameters; one that two modules share counts for both."""
    return sum(p.numel() for module in modules for p in module.parameters())


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
    def of(cls, c: MLLMConfig, lengths: list[int], grids=(), supervised: int = 0, pictures=(), samples=()) -> "Batch":
        """lengths: tokens of each document; grids: vision patches (rows, columns) of the pictures; pictures: their (H, W).
        samples of stage 2: of each a list of the DiT patches of its images, and how many tokens it reads."""
        window = c.vision.window_size // c.vision.patch_size
        b = cls(supervised=supervised, pictures=list(pictures))
        for n in lengths:
            b.tokens += n
            b.token_pairs += n * (n + 1) // 2
        for grid in grids:
            b.patches += math.prod(grid)
            b.image_pairs += math.prod(grid) ** 2
            # each side is cut into whole windows and a rest
            b.window_pairs += math.prod(n // window * window**2 + (n % window) ** 2 for n in grid)
        for images, context in samples:
            n = sum(images)
            b.latents += n
            b.latent_pairs += n * n
            b.images += len(images)
            b.context += context
            b.context_pairs += n * context
        return b


def flops(stage: int, mllm: MLLMConfig, b: Batch, dit: DiTConfig | None = None, vae: VAEConfig | None = None) -> dict:
    """Part -> (forward, backward) FLOPs of a micro-batch."""
    embed, tower = tower_flops(mllm, b)
    decoder = decoder_flops(mllm, b)
    if stage == 1:
        head = 2 * b.supervised * mllm.hidden_size * mllm.vocab_size
        # pixels need no gradient
        tower_parts = (embed + tower, embed + 2 * tower)
        return {"vision tower": tower_parts, "decoder": (decoder, 2 * decoder), "logits": (head, 2 * head)}
    connector = 2 * b.tokens * dit.crossattn_proj_in_channels * dit.text_embed_dim
    encoder = sum(encoder_flops(vae, *size) for size in b.pictures)
    first, body = dit_flops(dit, b)
    return {
        "vision tower": (embed + tower, 0),
        "decoder": (decoder, 0),
        "connector": (connector, connector),
        "VAE encoder": (encoder, 0),
        "DiT": (first + body, first + 2 * body),
    }


def tower_flops(c: MLLMConfig, b: Batch) -> tuple[int, int]:
    """Forward pass of the vision tower: its first layer, and all else."""
    v = c.vision
    w = v.hidden_size
    embed = 2 * b.patches * v.in_channels * v.temporal_patch_size * v.patch_size**2 * w
    linear = v.depth * 2 * b.patches * w * (4 * w + 3 * v.intermediate_size)
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    attention = 4 * w * (full * b.image_pairs + (v.depth - full) * b.window_pairs)
    # the merger reads a unit of patches as one vector
    merger = 2 * b.patches * w * (v.spatial_merge_size**2 * w + v.out_hidden_size)
    return embed, linear + attention + merger


def decoder_flops(c: MLLMConfig, b: Batch) -> int:
    """Forward pass of all layers."""
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    linear = 2 * b.tokens * c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    return c.num_hidden_layers * (linear + 4 * q * b.token_pairs)


def dit_flops(c: DiTConfig, b: Batch) -> tuple[int, int]:
    """Forward pass of the DiT: its first layer, and all else."""
    d, rank, patch = c.width, c.adaln_lora_dim, c.patch_size[1] ** 2
    first = 2 * b.latents * (c.in_channels + c.concat_padding_mask) * patch * d
    # q, k, v, out of the patches themselves; q, out of the cross-attention, whose k and v are the context's; the MLP
    linear = 2 * b.latents * d * (4 * d + 2 * d + 2 * int(d * c.mlp_ratio)) + 2 * b.context * c.text_embed_dim * 2 * d
    attention = 4 * d * (b.latent_pairs + b.context_pairs)
    modulation = 2 * b.images * 3 * (d * rank + rank * 3 * d)
    time = 2 * b.images * (d * d + d * 3 * d)
    last = 2 * b.images * (d * rank + rank * 2 * d) + 2 * b.latents * d * c.out_channels * patch
    return first, c.num_layers * (linear + attention + modulation) + time + last


def encoder_flops(c: VAEConfig, h: int, w: int) -> int:
    """Of one picture: 3 x 3 convolutions in residual blocks, halving convolutions between, one attention over all positions."""
    dims = [c.base_dim * m for m in (1, *c.dim_mult)]
    total = 9 * h * w * c.in_channels * dims[0]
    for i, (a, b) in enumerate(zip(dims, dims[1:], strict=False)):
        first = 9 * b * (a + b) + (a != b) * a * b
        total += h * w * (first + (c.num_res_blocks - 1) * 18 * b * b)
        if i < len(c.dim_mult) - 1:
            h, w = h // 2, w // 2
            total += 9 * h * w * b * b
    d, z = dims[-1], 2 * c.z_dim
    middle = 2 * 18 * d * d + 4 * d * d + 2 * d * h * w
    return 2 * (total + h * w * (middle + 9 * d * z + z * z))
