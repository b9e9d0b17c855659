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

# Dense bf16 FLOP/s of the data sheets, by what torch.cuda.get_device_name() contains, and bytes/s of their memory. The sheets'
# larger figures are for weights of which half are zero. The first name that fits counts: the PCIe card before the plain H100.
DEVICES = {
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100": (989e12, 3.35e12),
    "A100": (312e12, 2.0e12),
}


def peak_flops(device: str) -> float | None:
    """Dense bf16 FLOP/s of a device by its name; None where it is unknown, and then there is no MFU."""
    for name, (peak, _) in DEVICES.items():
        if name in device:
            return peak
    return None


def count(*modules: nn.Module) -> int:
    """Parameters; one that two modules share counts for both."""
    total = 0
    for module in modules:
        total += sum(p.numel() for p in module.parameters())
    return total


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
        grids=(),
        supervised: int = 0,
        pictures=(),
        samples=(),
    ) -> "Batch":
        """lengths: tokens of each document; grids: vision patches (rows, columns) of the pictures; pictures: their (H, W).
        samples of stage 2: of each a list of the DiT patches of its images, and how many tokens it reads."""
        b = cls(supervised=supervised, pictures=list(pictures))

        # Causal attention: the first token reads one, the last one all n. The half above the diagonal is never computed.
        for n in lengths:
            b.tokens += n
            b.token_pairs += n * (n + 1) // 2

        # A few layers of the tower look at the whole picture, the others only inside a window.
        window = c.vision.window_size // c.vision.patch_size
        for grid in grids:
            n = math.prod(grid)
            b.patches += n
            b.image_pairs += n**2
            # Each side is cut into whole windows and a rest, so the windows at the edge are smaller. A window of h x w patches
            # has h^2 w^2 pairs, and their sum over the picture is the product of the sums along its sides.
            pairs = 1
            for side in grid:
                whole = side // window
                rest = side % window
                pairs *= whole * window**2 + rest**2
            b.window_pairs += pairs

        # In the DiT all images of a sample see each other, and every patch reads every token that the sample is told.
        for images, context in samples:
            n = sum(images)
            b.latents += n
            b.latent_pairs += n * n
            b.images += len(images)
            b.context += context
            b.context_pairs += n * context
        return b


def flops(
    stage: int, mllm: MLLMConfig, b: Batch, dit: DiTConfig | None = None, vae: VAEConfig | None = None, adapters: bool = False
) -> dict[str, tuple[int, int]]:
    """Part -> (forward, backward) FLOPs of a micro-batch. adapters: matrices are frozen, and thin ones beside them are trained,
    which are not counted: of rank 16 they cost a hundredth of those of the 7B."""
    embed, tower = tower_flops(mllm, b)
    decoder = decoder_flops(mllm, b)

    # A frozen matrix has one product in the backward pass instead of two; attention, which has no weights, keeps its two for
    # each of the forward's. What lies before the first adapters needs none at all.
    if stage == 1 and adapters:
        head = 2 * b.supervised * mllm.hidden_size * mllm.vocab_size
        return {
            "vision tower": (embed + tower, 0),
            "decoder": (decoder, decoder + decoder_attention_flops(mllm, b)),
            "logits": (head, head),
        }

    # Stage 1 trains all of the MLLM. A backward pass is two products for each of the forward's; the pixels alone need no
    # gradient, so the tower's first layer has one.
    if stage == 1:
        head = 2 * b.supervised * mllm.hidden_size * mllm.vocab_size
        return {
            "vision tower": (embed + tower, embed + 2 * tower),
            "decoder": (decoder, 2 * decoder),
            "logits": (head, 2 * head),
        }

    # Stage 2: the MLLM and the VAE stand still. What they give needs no gradient, so the connector, like the DiT's first layer,
    # has only that of its weights.
    connector = 2 * b.tokens * dit.crossattn_proj_in_channels * dit.text_embed_dim
    encoder = sum(encoder_flops(vae, *size) for size in b.pictures)
    first, body = dit_flops(dit, b)
    painting = first + 2 * body
    if adapters:
        # Without a gradient for the modulations, which depend on time alone, and for the output layer's matrix.
        attention = dit.num_layers * 4 * dit.width * (b.latent_pairs + b.context_pairs)
        painting = body + attention - dit_modulation_flops(dit, b)
    return {
        "vision tower": (embed + tower, 0),
        "decoder": (decoder, 0),
        "connector": (connector, connector),
        "VAE encoder": (encoder, 0),
        "DiT": (first + body, painting),
    }


def tower_flops(c: MLLMConfig, b: Batch) -> tuple[int, int]:
    """Forward pass of the vision tower: its first layer, and all else."""
    v = c.vision
    w = v.hidden_size

    # The first layer reads the pixels of a patch as one vector; a still picture is its own second frame.
    pixels = v.in_channels * v.temporal_patch_size * v.patch_size**2
    embed = 2 * b.patches * pixels * w

    # A layer: q, k, v and the output are four squares of w, and SwiGLU has three matrices where a plain MLP has two.
    per_patch = w * (4 * w + 3 * v.intermediate_size)
    linear = v.depth * 2 * b.patches * per_patch

    # Two products of D for each head and pair, q k^T and p v; all heads together are w wide.
    full = len([i for i in v.fullatt_block_indexes if i < v.depth])
    pairs = full * b.image_pairs + (v.depth - full) * b.window_pairs
    attention = 4 * w * pairs

    # The merger reads a unit of patches as one vector: a matrix of (unit w)^2 for each unit is unit w^2 for each patch.
    unit = v.spatial_merge_size**2
    merger = 2 * b.patches * w * (unit * w + v.out_hidden_size)
    return embed, linear + attention + merger


def decoder_flops(c: MLLMConfig, b: Batch) -> int:
    """Forward pass of all layers."""
    # Grouped queries: several heads of q share one of k and v, whose projections are so much narrower. Each query still meets
    # every key before it, so attention costs what it would without.
    q = c.num_attention_heads * c.head_dim
    kv = c.num_key_value_heads * c.head_dim
    per_token = c.hidden_size * (2 * q + 2 * kv + 3 * c.intermediate_size)
    linear = 2 * b.tokens * per_token
    return c.num_hidden_layers * linear + decoder_attention_flops(c, b)


def decoder_attention_flops(c: MLLMConfig, b: Batch) -> int:
    """Of it, the products of queries with keys and of weights with values."""
    return c.num_hidden_layers * 4 * c.num_attention_heads * c.head_dim * b.token_pairs


def dit_flops(c: DiTConfig, b: Batch) -> tuple[int, int]:
    """Forward pass of the DiT: its first layer, and all else."""
    d = c.width
    patch = c.patch_size[1] ** 2

    # All pixels of a patch at once, each with its latent channels, the condition mask and the padding mask.
    channels = c.in_channels + c.concat_padding_mask
    first = 2 * b.latents * channels * patch * d

    # Of each patch: q, k, v, out of the self-attention; q, out of the cross-attention; the two matrices of the MLP.
    hidden = int(d * c.mlp_ratio)
    of_patches = 2 * b.latents * d * (4 * d + 2 * d + 2 * hidden)
    # Keys and values of the cross-attention come from the tokens, of which there are far fewer than patches.
    of_tokens = 2 * b.context * c.text_embed_dim * 2 * d
    attention = 4 * d * (b.latent_pairs + b.context_pairs)

    # The output has a linear layer back to the latent's channels.
    out = 2 * b.latents * d * c.out_channels * patch
    layer = of_patches + of_tokens + attention
    return first, c.num_layers * layer + dit_modulation_flops(c, b) + out


def dit_modulation_flops(c: DiTConfig, b: Batch) -> int:
    """Modulations depend on time alone: one for each image, however many patches it has."""
    d = c.width
    rank = c.adaln_lora_dim
    time = 2 * b.images * (d * d + d * 3 * d)
    # Three sub-layers, each through a bottleneck to shift, scale and gate; the output has one without a gate.
    layer = 2 * b.images * 3 * (d * rank + rank * 3 * d)
    last = 2 * b.images * (d * rank + rank * 2 * d)
    return time + c.num_layers * layer + last


def encoder_flops(c: VAEConfig, h: int, w: int) -> int:
    """Of one picture: 3 x 3 convolutions in residual blocks, halving convolutions between, one attention over all positions."""
    # Multiplications alone, of which each comes with an addition: the sum is doubled at the end.
    dims = [c.base_dim * m for m in (1, *c.dim_mult)]
    total = 9 * h * w * c.in_channels * dims[0]

    for i, (a, b) in enumerate(zip(dims, dims[1:], strict=False)):
        # The first block of a level widens the channels, and then its shortcut is a convolution of 1 x 1.
        first = 9 * b * (a + b)
        if a != b:
            first += a * b
        others = (c.num_res_blocks - 1) * 18 * b * b
        total += h * w * (first + others)
        # Half of each side: the next level has a quarter of the positions, so twice the channels cost no more.
        if i < len(c.dim_mult) - 1:
            h = h // 2
            w = w // 2
            total += 9 * h * w * b * b

    # The middle: two blocks of two convolutions; q, k, v, out; and two products of d with all h w positions for each of them.
    d = dims[-1]
    z = 2 * c.z_dim  # a mean and a log-variance for each latent channel
    middle = 2 * 18 * d * d + 4 * d * d + 2 * d * h * w
    out = 9 * d * z + z * z
    total += h * w * (middle + out)
    return 2 * total
