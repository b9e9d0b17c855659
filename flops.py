"""What a micro-batch computes, in FLOPs by formulas of its sizes: for the MFU in a status line, and for tools/plan.py.

MFU is the sum of `flops` of a `Batch`, over the seconds and `peak_flops` of the device. tests/tools/test_plan.py holds the
formulas against PyTorch's FlopCounterMode.
"""

import math
from dataclasses import dataclass, field

from dit import DiTConfig
from model import MLLMConfig
from vae import VAEConfig

# Dense bf16 FLOP/s of the data sheets, by what torch.cuda.get_device_name() contains, and bytes/s of their memory.
DEVICES = {"H200": (989e12, 4.8e12), "H100 PCIe": (756e12, 2.0e12), "H100": (989e12, 3.35e12), "A100": (312e12, 2.0e12)}


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown, and then there is no MFU."""
    return next((peak for name, (peak, _) in DEVICES.items() if name in device), None)


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
        w, b = c.vision.window_size // c.vision.patch_size, cls()
        b.tokens, b.token_pairs = sum(lengths), sum(n * (n + 1) // 2 for n in lengths)
        b.supervised, b.pictures = supervised, list(pictures)
        for rows, columns in grids:
            b.patches, b.image_pairs = b.patches + rows * columns, b.image_pairs + (rows * columns) ** 2
            b.window_pairs += math.prod(n // w * w * w + (n % w) ** 2 for n in (rows, columns))  # a side: w, ..., w, rest
        for images, context in samples:
            n = sum(images)
            b.latents, b.images, b.context = b.latents + n, b.images + len(images), b.context + context
            b.latent_pairs, b.context_pairs = b.latent_pairs + n * n, b.context_pairs + n * context
        return b


# A matrix product m x k x n is 2 m k n, its backward pass twice that: once for the input, once for the weights; only once where
# the input needs no gradient. Attention is 4 D per head and pair. Norms, activations and rotations are left out: under 1 %.
def flops(stage: int, mllm: MLLMConfig, b: Batch, dit: DiTConfig | None = None, vae: VAEConfig | None = None) -> dict:
    """Part -> (forward, backward) FLOPs of a micro-batch. What MFU counts: nothing twice, so no recomputation."""
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
    parts = {"vision tower": (embed + tower, trained * tower + trained // 2 * embed), "decoder": (decoder, trained * decoder)}
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


def encoder_flops(c: VAEConfig, h: int, w: int) -> int:
    """Of one picture: 3 x 3 convolutions in residual blocks, halving convolutions between, one attention over all positions."""
    dims = [c.base_dim * m for m in (1, *c.dim_mult)]
    total = 9 * h * w * c.in_channels * dims[0]
    for i, (a, b) in enumerate(zip(dims, dims[1:], strict=False)):
        total += h * w * (9 * b * (a + b) + (a != b) * a * b + (c.num_res_blocks - 1) * 18 * b * b)
        if i < len(c.dim_mult) - 1:
            h, w = h // 2, w // 2
            total += 9 * h * w * b * b
    d, z = dims[-1], 2 * c.z_dim
    return 2 * (total + h * w * (2 * 18 * d * d + 4 * d * d + 2 * d * h * w + 9 * d * z + z * z))
