"""The painter: Cosmos-Predict2.5's diffusion transformer over packed still images.

Source: NVIDIA Cosmos-Predict2.5 (arXiv 2511.00062); parameter names and config.json are those of diffusers'
`CosmosTransformer3DModel`, so either library loads the other's checkpoints. A sample is a row of images on the time axis: the
clean condition images first, the image to be painted last. Images may differ in size: the patches of all images of all samples
lie in one packed sequence without padding, a patch knows its position (image, row, column), and attention stays inside its
sample.

    dit = DiT.from_pretrained(folder)
    context = dit.crossattn_proj(features(hidden))          # what the language model says, see connector.py
    v = dit(x, t, given, pack, context, keys)               # the velocity at every patch; flow.py trains and samples with it
"""

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from checkpoint import InputError, check_bounds, config_from_json, load_weights, read_json, resolve, save_weights
from connector import Connector
from ops import Segments, attention, gate_add, gate_add_modulate, join, joint, modulate, norm_rope, on_triton, stacked

STEM = "diffusion_pytorch_model"
# Fields of diffusers' config that mean nothing without the parts which DiTConfig.from_json refuses.
UNREAD = (
    "encoder_hidden_states_channels",
    "controlnet_block_every_n",
    "img_context_num_tokens",
    "img_context_dim_out",
)


class Painter(Protocol):
    """All that the rest of the system asks of a painter. `DiT` is the first, others are in families/.

    Pictures come as packs: `pack_images` of their sizes, `patchify` of their latents. What the language model says comes by the
    painter's connector, and `context_kv`, `modulations` and `rope` give a sampler what stays the same from step to step.
    """

    config: "DiTConfig"  # sizes: patch_size, latent channels out and in, mask_channels, width, context_width
    crossattn_proj: Connector  # features of tokens -> their context (N, context_width)
    proj_out: nn.Linear
    gradient_checkpointing: bool

    # The velocity at every patch of a pack, and what of it can be made before the first step.
    def forward(self, x, t, condition, pack: "Pack", context, keys, **made_before) -> Tensor: ...
    def context_kv(self, context: Tensor) -> list[tuple[Tensor, Tensor]]: ...
    def modulations(self, t: Tensor) -> list[Tensor]: ...
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]: ...

    # How it is kept and made fast, and how it begins with another language model.
    def save_pretrained(self, folder: Path) -> None: ...
    def fuse_for_inference(self) -> "Painter": ...
    def connect(self, features: int) -> None: ...
    def repeated(self) -> list[nn.Module]: ...  # the blocks, which are compiled one by one


@dataclass
class DiTConfig:
    """Size of the network; names and meaning as in diffusers' config.json. The defaults are Cosmos-Predict2.5-2B."""

    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 128
    mlp_ratio: float = 4.0
    adaln_lora_dim: int = 256  # width of the bottleneck in every modulation
    in_channels: int = 17  # 16 latent channels and the condition mask
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (image, height, width), in latent pixels
    concat_padding_mask: bool = True  # one more input channel, zero everywhere unless a caller says otherwise
    rope_scale: tuple[float, float, float] = (1.0, 3.0, 3.0)  # NTK factor per axis
    max_size: tuple[int, int, int] = (128, 240, 240)  # largest latents in Cosmos' training; no limit here
    text_embed_dim: int = 1024  # width of the context
    crossattn_proj_in_channels: int = 100352  # language model layers x width
    qk_norm_eps: float = 1e-6  # NVIDIA's; diffusers runs 1e-5, for which its own config has no field

    mask_channels = 1  # no field: of in_channels, those that say which pictures are given

    def __post_init__(self):
        # An MLP has at least one unit. Without a width there is no ratio; the bounds of the heads then say what is wrong.
        smallest_ratio = 0
        if self.width > 0:
            smallest_ratio = 1 / self.width
        bounds = {
            "num_layers": (1, 256),
            "num_attention_heads": (1, 1024),
            "attention_head_dim": (12, 2**12),
            "adaln_lora_dim": (1, 2**16),
            "text_embed_dim": (1, 2**18),
            "crossattn_proj_in_channels": (1, 2**24),
            "in_channels": (1, 2**12),
            "out_channels": (1, 2**12),
            "patch_size": (1, 64),
            "max_size": (1, 2**20),
            "mlp_ratio": (smallest_ratio, 64),
            "rope_scale": (1e-3, 1e3),
            "qk_norm_eps": (0, 1),
        }
        check_bounds(self, "config.json of the DiT", bounds)
        # The rotary embedding turns channels in pairs.
        if self.attention_head_dim % 2:
            raise InputError(f"config.json of the DiT: attention_head_dim is {self.attention_head_dim}, it must be even")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_width(self) -> int:
        return self.text_embed_dim

    @property
    def mlp_width(self) -> int:
        return int(self.width * self.mlp_ratio)

    @property
    def patch_features(self) -> int:
        """Numbers of a patch that the first layer reads, masks included."""
        return (self.in_channels + self.concat_padding_mask) * self.patch_size[1] ** 2

    @property
    def time_weights(self) -> int:
        """Weights that every time is multiplied with: each modulation through its bottleneck, and the time's own MLP."""
        d = self.width
        down_up = 3 * (d * self.adaln_lora_dim + self.adaln_lora_dim * 3 * d)
        last = d * self.adaln_lora_dim + self.adaln_lora_dim * 2 * d
        return self.num_layers * down_up + d * d + d * 3 * d + last

    @classmethod
    def from_json(cls, config: dict) -> "DiTConfig":
        """From diffusers' config.json; what this implementation has no code for is refused by name."""
        where = "config.json of the DiT"

        # Parts that other Cosmos models have. A field that the file leaves out has diffusers' default, which may ask for one.
        fixed = {  # diffusers' default, ours
            "extra_pos_embed_type": ("learnable", None),
            "img_context_dim_in": (None, None),
            "use_crossattn_projection": (False, True),
        }
        for key, (default, needed) in fixed.items():
            found = config.get(key, default)
            if found != needed:
                raise InputError(f"{where}: {key} must be {json.dumps(needed)}, not {json.dumps(found)}")

        # The eps travels under a name that diffusers passes over, see to_json; a plain one goes before it.
        eps = config.get("_qk_norm_eps", cls.qk_norm_eps)
        values = {"qk_norm_eps": eps, **config}
        self = config_from_json(cls, values, where, ignore=(*fixed, *UNREAD))

        # A patch is a square of one image: the geometry below knows rows and columns of patches, and no depth.
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise InputError(f"{where}: patch_size must be [1, p, p], not {list(self.patch_size)}")
        if config.get("encoder_hidden_states_channels", self.text_embed_dim) != self.text_embed_dim:
            raise InputError(f"{where}: encoder_hidden_states_channels must equal text_embed_dim")
        return self

    def to_json(self) -> dict:
        """diffusers' config.json. Its loader drops keys with an underscore without a word: the eps can travel as one."""
        values = {}
        for f in fields(self):
            value = getattr(self, f.name)
            # JSON has no tuples: what is written should be what is read back.
            if isinstance(value, tuple):
                value = list(value)
            if f.name != "qk_norm_eps":
                values[f.name] = value
        return {
            "_class_name": "CosmosTransformer3DModel",
            "_diffusers_version": "0.42.1",
            "_qk_norm_eps": self.qk_norm_eps,
            **values,
            "encoder_hidden_states_channels": self.text_embed_dim,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
        }


PRESETS = {
    "tiny": DiTConfig(
        num_layers=6,
        num_attention_heads=4,
        attention_head_dim=64,
        adaln_lora_dim=32,
        text_embed_dim=256,
        crossattn_proj_in_channels=4 * 256,
    ),
    "2B": DiTConfig(),
    "14B": DiTConfig(num_layers=36, num_attention_heads=40),
}


# ---------------------------------------------------------------------------------------------------------------- packing


@dataclass
class Pack:
    """The geometry of a batch: S samples, I images, N patches, one behind the other."""

    positions: Tensor  # (N, 3) long: index of the image in its sample, row, column
    image_ids: Tensor  # (N,) long: image in the batch
    segments: Segments  # of the samples
    shapes: list[tuple[int, int]]  # (rows, columns) of each image, in patches
    chunk: int  # greatest common divisor of the images' patch counts: so many neighbours surely share an image


def pack_images(sizes: list[list[tuple[int, int]]], device: str | torch.device = "cpu") -> Pack:
    """sizes: per sample its images' (rows, columns) in patches, in time order."""
    shapes = [shape for sample in sizes for shape in sample]
    smallest = min((min(shape) for shape in shapes), default=0)
    if not all(sizes) or smallest < 1:
        raise InputError(f"a pack needs samples of at least one image of at least 1x1 patches, got {sizes}")
    h, w = torch.tensor(shapes).T                                                      # (I,)
    patches = h * w                                                                    # (I,)

    # The number of a patch in its image is its place in the pack less the place where its image begins.
    images = torch.arange(len(shapes)).repeat_interleave(patches)                      # (N,)
    begins = patches.cumsum(0) - patches                                               # (I,)
    within = torch.arange(len(images)) - begins[images]                                # (N,)

    # Each sample has a time of its own that counts its images from 0; rows and columns count from 0 in each image.
    index = torch.tensor([k for sample in sizes for k in range(len(sample))])          # (I,)
    row = within // w[images]                                                          # (N,)
    column = within % w[images]                                                        # (N,)
    positions = torch.stack((index[images], row, column), 1)                           # (N, 3)

    # Attention asks for samples, not images: the images of one sample see each other.
    lengths = []
    for sample in sizes:
        lengths.append(sum(rows * columns for rows, columns in sample))
    segments = Segments(lengths, device)
    chunk = math.gcd(*patches.tolist())
    return Pack(positions.to(device), images.to(device), segments, shapes, chunk)


class Targets:
    """Which patches of a pack are painted: the last layers need not compute the others."""

    def __init__(self, pack: Pack, given: list[bool]):
        """given: which images (I) are conditions."""
        device = pack.positions.device
        patches = torch.tensor([h * w for h, w in pack.shapes])                        # (I,)
        wanted = ~torch.tensor(given).repeat_interleave(patches)                       # (N,)
        self.rows = wanted.nonzero()[:, 0].to(device)  # (P,) their places in the pack
        # A chunk lies in one image, so its first patch speaks for all.
        first = wanted[:: pack.chunk]
        self.chunks = first.nonzero()[:, 0].to(device)  # (P / chunk,) the same for whole chunks
        # The painted patches are a pack of their own, in which the samples are shorter.
        samples = wanted.split(pack.segments.lengths)
        self.segments = Segments([int(part.sum()) for part in samples], device)


def patchify(latent: Tensor, patch: int = 2) -> Tensor:
    """(C, H, W) -> (H/p * W/p, C * p * p), feature (c * p + ph) * p + pw: the layout of noise, x_t and velocity everywhere.

    Several of one size, (K, C, H, W), follow one another.
    """
    h, w = latent.shape[-2:]
    if h % patch or w % patch:
        raise InputError(f"a latent of {h}x{w} is no grid of {patch}x{patch}: sides must be whole numbers of patches")
    pictures = latent.reshape(-1, *latent.shape[-3:])                                     # (K, C, H, W)
    return rearrange(pictures, "k c (h ph) (w pw) -> (k h w) (c ph pw)", ph=patch, pw=patch)


def unpatchify(x: Tensor, size: tuple[int, int], patch: int = 2) -> Tensor:
    """Inverse of patchify; size: (rows, columns) in patches."""
    h, w = size
    return rearrange(x, "(h w) (c ph pw) -> c (h ph) (w pw)", h=h, w=w, ph=patch, pw=patch)


def axial_rope(positions: Tensor, head_dim: int, scale: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """(N, 3) positions -> cos, sin (N, 1, head_dim) in fp32: frequencies of image, row, column, and the same again.

    scale: NTK factor of each axis, 1 for none.
    """
    # A third of the channels each for rows and columns, in whole pairs; what is left over goes to time.
    spatial = head_dim // 6 * 2
    dims = (head_dim - 2 * spatial, spatial, spatial)

    angles = []
    for axis, dim in enumerate(dims):
        # A larger base makes slow frequencies slower, so that larger pictures stay within the angles known (NTK-aware).
        stretch = scale[axis] ** (dim / (dim - 2))
        theta = 10000.0 * stretch
        channels = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32)
        frequencies = theta ** -(channels / dim)                                       # (dim / 2,)
        angles.append(positions[:, axis, None] * frequencies)
    angles = torch.cat(angles, 1)[:, None]                                             # (N, 1, head_dim / 2)

    # The first half of a head turns against the second, so its sine has the other sign.
    cos = angles.cos()
    sin = angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)                       # 2 x (N, 1, head_dim)


# ---------------------------------------------------------------------------------------------------------------- network


class Modulation(nn.Module):
    """adaLN-LoRA: from the time embedding to (shift, scale[, gate]) of one sub-layer; `lora` is what all of them share."""

    def __init__(self, width: int, rank: int, parts: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, rank, bias=False)
        self.linear_2 = nn.Linear(rank, parts * width, bias=False)

    def forward(self, emb: Tensor, lora: Tensor) -> Tensor:
        # Down to the rank and up again: a plain D x 3D in each of three sub-layers would be a third of all weights.
        low = linear32(emb, self.linear_1)                                             # (T, rank)
        own = linear32(low, self.linear_2)                                             # (T, parts * D)
        # The output's modulation has no gate: of what is shared it takes the shift and scale that come first.
        return own + lora[:, : self.linear_2.out_features]


class TimeEmbedder(nn.Module):
    """Time -> the RMSNorm of its sinusoid (cosines first), and an MLP of it whose output is added to every modulation."""

    def __init__(self, width: int):
        super().__init__()
        self.t_embedder = nn.Module()
        self.t_embedder.linear_1 = nn.Linear(width, width, bias=False)
        self.t_embedder.linear_2 = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        # From one radian per unit of time down to 1/10000, evenly in the exponent.
        half = self.norm.normalized_shape[0] // 2
        step = -math.log(10000.0) / half
        frequencies = torch.exp(torch.arange(half, device=t.device) * step)            # (D/2,)
        angles = t.float()[:, None] * frequencies                                      # (T, D/2)
        e = torch.cat((angles.cos(), angles.sin()), 1)                                 # (T, D)

        # The MLP reads the sinusoid as it is; each modulation has a small MLP of its own on the normed one.
        mlp = self.t_embedder
        hidden = F.silu(linear32(e, mlp.linear_1))                                     # (T, D)
        lora = linear32(hidden, mlp.linear_2)                                          # (T, 3D)
        normed = F.rms_norm(e, e.shape[1:], self.norm.weight.float(), self.norm.eps)   # (T, D)
        return normed, lora


class Attention(nn.Module):
    """Projections of self- or cross-attention, with an RMSNorm on every query and key; the attention itself is in ops.py."""

    def __init__(self, width: int, context_width: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.head_dim = width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q = nn.RMSNorm(width // heads, eps=eps)
        self.norm_k = nn.RMSNorm(width // heads, eps=eps)

    def heads_of(self, y: Tensor) -> Tensor:
        return y.view(len(y), -1, self.head_dim)                                       # (N, heads, head_dim)

    def query(self, x: Tensor, *rope: Tensor) -> Tensor:
        q = self.heads_of(self.to_q(x))
        return norm_rope(q, self.norm_q.weight, self.norm_q.eps, *rope)                # (N, heads, head_dim)

    def kv(self, x: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor]:
        parts = joint(x, self.to_k, self.to_v)
        # From one product, keys first: its heads in two halves.
        if len(parts) == 1:
            k, v = self.heads_of(parts[0]).chunk(2, 1)
        else:
            k = self.heads_of(parts[0])
            v = self.heads_of(parts[1])
        # Keys are normed like queries, so that no product of the two grows without bound in training. Values are not.
        k = norm_rope(k, self.norm_k.weight, self.norm_k.eps, *rope)
        return k, v                                                                    # 2 x (N, heads, head_dim)

    def qkv(self, x: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query and kv of the same tokens: where their projections are joint, so is their norm."""
        parts = joint(x, self.to_q, self.to_k, self.to_v)

        # Queries and keys lie side by side: one call norms both, each group of heads with its own gain.
        if len(parts) == 1:
            qk, v = self.heads_of(parts[0]).split((2 * self.heads, self.heads), 1)
            gains = stacked(self.norm_q.weight, self.norm_k.weight)                    # (2, head_dim)
            qk = norm_rope(qk, gains, self.norm_q.eps, *rope)                          # (N, 2 heads, head_dim)
            q, k = qk.chunk(2, 1)
            return q, k, v

        q, k, v = map(self.heads_of, parts)
        q = norm_rope(q, self.norm_q.weight, self.norm_q.eps, *rope)
        k = norm_rope(k, self.norm_k.weight, self.norm_k.eps, *rope)
        return q, k, v                                                                 # 3 x (N, heads, head_dim)

    def out(self, y: Tensor) -> Tensor:
        return self.to_out[0](y.flatten(1))                                            # (N, D)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them, under the names of diffusers: net.0.proj and net.2."""

    def __init__(self, width: int, hidden: int, bias: bool = False, approximate: str = "none"):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden, bias=bias)
        self.net = nn.ModuleList([first, nn.GELU(approximate), nn.Linear(hidden, width, bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.net[1](self.net[0].proj(x))                                           # (N, hidden)
        return self.net[2](h)                                                          # (N, D)


class Block(nn.Module):
    """Self-attention over the sample's images, cross-attention to the context, MLP; each modulated before and gated after."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.width
        heads = config.num_attention_heads
        eps = config.qk_norm_eps
        self.norm1 = Modulation(width, config.adaln_lora_dim, 3)
        self.attn1 = Attention(width, width, heads, eps)
        self.norm2 = Modulation(width, config.adaln_lora_dim, 3)
        self.attn2 = Attention(width, config.text_embed_dim, heads, eps)
        self.norm3 = Modulation(width, config.adaln_lora_dim, 3)
        self.ff = FeedForward(width, int(width * config.mlp_ratio))

    def forward(
        self, x, h, table, following, rows, rope, segments, context, kv, keys, targets=None
    ) -> tuple[Tensor, Tensor | None]:
        """x (G, n, D): chunks of n patches, chunk g modulated by row rows[g] of table (T, 9D); the rest as in DiT.forward.

        h (N, D) is x as this block's self-attention reads it, if the block before has made it: given the `following` block's
        table, a block returns its successor's h beside x, from the pass over memory in which it adds to x. Else both are None.
        With targets, the other patches only give keys and values, and are left out of what is returned.
        """
        # Nine rows for three sub-layers: a shift and a scale of what each reads, and a gate of what it adds.
        dtype = working_dtype(self.attn1.to_q.weight)
        shift1, scale1, gate1, *others, index = modulation(table, rows, x)

        # Self-attention: every patch looks at all images of its sample.
        if h is None:
            h = modulate(x, shift1, scale1, index, dtype)                              # (N, D)
        if targets is None:
            q, k, v = self.attn1.qkv(h, *rope)                                         # (N, heads, head_dim)
            y = attention(q, k, v, segments)
        else:
            # Painted patches ask, all answer; from here on there are only the painted ones.
            turns = [r.index_select(0, targets.rows) for r in rope]
            q = self.attn1.query(h.index_select(0, targets.rows), *turns)              # (P, heads, head_dim)
            k, v = self.attn1.kv(h, *rope)                                             # (N, heads, head_dim)
            y = attention(q, k, v, targets.segments, segments)                         # (P, heads, head_dim)
            x = x.index_select(0, targets.chunks)                                      # (P / n, n, D)
            rows = rows.index_select(0, targets.chunks)
            segments = targets.segments
            _, _, gate1, *others, index = modulation(table, rows, x)
        shift2, scale2, gate2, shift3, scale3, gate3 = others
        y = self.attn1.out(y)
        x, h = gate_add_modulate(x, gate1, y, shift2, scale2, index, dtype)            # (G, n, D), (N, D)

        # Cross-attention: every patch looks at all that its sample has been told. The context has no position to turn with.
        if kv is None:
            kv = self.attn2.kv(context)
        k, v = kv                                                                      # (M, heads, head_dim)
        q = self.attn2.query(h)                                                        # (N, heads, head_dim)
        y = self.attn2.out(attention(q, k, v, segments, keys))
        x, h = gate_add_modulate(x, gate2, y, shift3, scale3, index, dtype)            # (G, n, D), (N, D)

        # MLP: each patch by itself, on what it has gathered.
        y = self.ff(h)                                                                 # (N, D)
        if following is None:
            return gate_add(x, gate3, y, index), None                                  # (G, n, D)
        shift, scale, *_ = modulation(following, rows, x)
        return gate_add_modulate(x, gate3, y, shift, scale, index, dtype)              # (G, n, D), (N, D)


def modulation(table: Tensor, rows: Tensor, x: Tensor) -> list[Tensor]:
    """A block's table (T, 9D) as nine (T, 1, D), and rows (G,) for ops.py. PyTorch picks the rows here, all nine at once."""
    if not on_triton(x):
        table = table.index_select(0, rows).to(x.dtype)
        rows = None
    parts = table.view(len(table), -1, 1, x.shape[-1]).unbind(1)
    return [*parts, rows]


class DiT(nn.Module):
    """Velocity of packed images. Built with random weights by from_config, with published ones by from_pretrained."""

    Config = DiTConfig
    LORA = r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"  # see lora.py
    LORA_PREFIX = {}
    LORA_WHOLE = ("crossattn_proj",)  # nobody has trained it before

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_size[1] ** 2
        # Bare modules hold the linear layers whose names in the file have two parts.
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear(config.patch_features, config.width, bias=False)
        self.time_embed = TimeEmbedder(config.width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm_out = Modulation(config.width, config.adaln_lora_dim, 2)
        self.proj_out = nn.Linear(config.width, config.out_channels * patch, bias=False)
        self.crossattn_proj = Connector(config.crossattn_proj_in_channels, config.text_embed_dim)
        self.gradient_checkpointing = False  # True: the backward pass recomputes each block

    @classmethod
    def from_config(cls, config: DiTConfig) -> "DiT":
        return cls(config).initialise()

    @classmethod
    def from_pretrained(
        cls, source, subfolder=None, revision=None, dtype=torch.float32, device="cpu", features: int | None = None
    ) -> "DiT":
        """features: numbers of a token that the connector has to read. Where the file's reads others, or it has none, a new
        one is made, for training to teach."""
        folder = resolve(source, subfolder, revision)
        config = cls.Config.from_json(read_json(folder / "config.json"))
        own = config.crossattn_proj_in_channels
        new = features not in (None, own)
        base = lora.base_of(folder, "dit")
        if base is not None:
            # Adapters bring the connector that was trained with them, whatever their base has.
            dit = cls.from_pretrained(base, dtype=dtype, device=device, features=own)
            lora.merge(dit, folder)
        else:
            # On the meta device a model has shapes and no memory: the weights that are read take their places.
            with torch.device("meta"):
                dit = cls(config)
            if new:
                dit.crossattn_proj = None
            load_weights(dit, folder, rename=all_but_connector if new else None, dtype=dtype, device=device)
        if new:
            dit.connect(features)
            dit.crossattn_proj.to(device, dtype)
            print(f"connector: new, {features:,} numbers of a token -> {config.context_width:,}")
        return dit

    def connect(self, features: int) -> None:
        """A new connector, for a language model of so many features."""
        self.config = replace(self.config, crossattn_proj_in_channels=features)
        self.crossattn_proj = Connector(features, self.config.context_width)
        for module in self.crossattn_proj:
            draw_weights(module)

    def save_pretrained(self, folder: str | Path, **options) -> None:
        save_weights(self.state_dict(), Path(folder), self.config.to_json(), stem=STEM, **options)

    def initialise(self) -> "DiT":
        """Fresh weights. Zero: the last layer of each modulation and of the time MLP, so all gates, and the output projection.

        So each block starts as the identity and the velocity as 0 (adaLN-Zero, Peebles & Xie 2212.09748), and the first loss is
        E|eps - x_0|^2. Every other matrix is normal with variance 1 / inputs, cut at three deviations; norms are 1, biases 0.
        """
        for module in self.modules():
            draw_weights(module)

        # What opens only in training. Not all factors of a product may be zero: then none would ever get a gradient.
        closed = [m.linear_2 for m in self.modules() if isinstance(m, Modulation)]
        for linear in (*closed, self.time_embed.t_embedder.linear_2, self.proj_out):
            nn.init.zeros_(linear.weight)
        return self

    def repeated(self) -> list[nn.Module]:
        return [*self.transformer_blocks]

    def fuse_for_inference(self) -> "DiT":
        """Projections that read the same input become one product where no gradient is asked for. Repeat it after `.to`."""
        for block in self.transformer_blocks:
            own = block.attn1
            context = block.attn2
            join(own.to_q, own.to_k, own.to_v)
            join(own.norm_q, own.norm_k)
            join(context.to_k, context.to_v)
        return self

    def modulations(self, t: Tensor) -> list[Tensor]:
        """t (T,) in [0, 1] -> per block (T, 9D), shift | 1 + scale | gate of three sub-layers; for the output (T, 2D). fp32.

        They depend on nothing but t: a sampler computes those of all its steps in one call. In bf16 the sinusoid alone would
        lose the difference between neighbouring steps, so neither the dtype of the weights nor autocast reaches in here.
        """
        with torch.autocast(t.device.type, enabled=False):
            emb, lora = self.time_embed(t)                                             # (T, D), (T, 3D)
            emb = F.silu(emb)
            # A scale multiplies by 1 + scale. The 1 enters here, once for all of them.
            shift, scale, gate = lora.chunk(3, 1)
            lora = torch.cat((shift, 1 + scale, gate), 1)
            tables = []
            for block in self.transformer_blocks:
                norms = (block.norm1, block.norm2, block.norm3)
                parts = [norm(emb, lora) for norm in norms]
                tables.append(torch.cat(parts, 1))                                     # (T, 9D)
            tables.append(self.norm_out(emb, lora))                                    # (T, 2D)
            return tables

    def context_kv(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (M, heads, head_dim) of every block's cross-attention: the same in all steps of a picture."""
        context = context.to(working_dtype(self.proj_out.weight))
        pairs = []
        for block in self.repeated():
            k, v = block.attn2.kv(context)
            # As part of a joint projection v would keep the raw keys alive.
            pairs.append((k, v.contiguous()))
        return pairs

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3) positions -> cos, sin (N, 1, head_dim) in fp32."""
        return axial_rope(positions, self.config.attention_head_dim, self.config.rope_scale)

    def forward(
        self,
        x: Tensor,
        t: Tensor | None,
        condition: Tensor,
        pack: Pack,
        context: Tensor | None,
        keys: Segments | Tensor,
        *,
        kv: list[tuple[Tensor, Tensor]] | None = None,
        modulations: tuple[list[Tensor], Tensor] | None = None,
        rope: tuple[Tensor, Tensor] | None = None,
        targets: Targets | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """x (N, C * 4) patches of noisy and clean images -> velocity (N, C * 4) in fp32, meaningless on condition images.

        t (I,): time of each image. condition (I,): 1 for a clean image. context (M, text_embed_dim): the connector's output for
        all samples, keys: its Segments, or boundaries (S + 1,), which are read back; every token is read, none is padding.
        padding (N, 4): its mask, default 0. For a sampler that computes them once: kv = context_kv(context) instead of context,
        instead of t modulations = (self.modulations(times), which of these times each image has (I,)), and
        rope = self.rope(pack.positions). With targets only their velocity is computed to the end, and returned: (P, C * 4).
        """
        n = len(pack.image_ids)
        images = len(pack.shapes)
        if x.shape[0] != n or condition.shape != (images,):
            given = f"x is {tuple(x.shape)}, condition {tuple(condition.shape)}"
            raise ValueError(f"pack of {n} patches, {images} images: {given}")
        x = self._embed(x, condition, pack, padding)                                   # (G, n, D)

        # Modulations are computed per time, not per patch; of each chunk we note the row that it is modulated by.
        if modulations is None:
            modulations = self.modulations(t), torch.arange(images, device=x.device)
        table, rows = modulations                                                      # (T, 9D) per block, (I,)
        rows = rows[pack.image_ids[:: pack.chunk]]                                     # (G,)

        # The rest of what all blocks read, made once.
        if rope is None:
            rope = self.rope(pack.positions)                                           # 2 x (N, 1, head_dim)
        keys = Segments.of(keys, x.device)
        if context is not None:
            context = context.to(working_dtype(self.proj_out.weight))                  # (M, text_embed_dim)

        # Conditions are done with once the last block has read their keys and values.
        blocks = self.repeated()
        last = len(blocks) - 1
        # What the next block reads is made ahead by a kernel, where no backward pass asks for the stream alone to be kept.
        ahead = on_triton(x) and not torch.is_grad_enabled()
        h = None
        for i, block in enumerate(blocks):
            inputs = (
                x,
                h,
                table[i],
                table[i + 1] if ahead and i < last else None,
                rows,
                rope,
                pack.segments,
                context,
                kv[i] if kv else None,
                keys,
                targets if i == last else None,
            )
            # Of a block only its input is kept; the backward pass computes the rest again.
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, h = checkpoint(block, *inputs, use_reentrant=False)
            else:
                x, h = block(*inputs)                                                  # (G, n, D), (N, D)

        # The last block has left the conditions out: the chunks that are there still are the targets'.
        if targets is not None:
            rows = rows.index_select(0, targets.chunks)
        return self._velocity(x, table[-1], rows)                                      # (N, C4)

    def _embed(self, x: Tensor, condition: Tensor, pack: Pack, padding: Tensor | None) -> Tensor:
        """Patches (N, C4) and, as further channels, their masks -> the stream (G, n, D): G chunks of n patches."""
        # The mask tells each patch whether it is a clean picture's: pixels alone could be taken for either.
        patch = self.config.patch_size[1] ** 2
        mask = condition.to(x.dtype)[pack.image_ids, None].expand(-1, patch)           # (N, 4)
        inputs = [x, mask]
        # A pack has no padding, but the published weights expect the channel.
        if self.config.concat_padding_mask and padding is None:
            inputs.append(torch.zeros_like(mask))
        elif self.config.concat_padding_mask:
            inputs.append(padding.to(x.dtype))
        weight = self.patch_embed.proj.weight
        channels = torch.cat(inputs, 1).to(weight.dtype)                               # (N, C4 + 4 [+ 4])
        x = self.patch_embed.proj(channels)                                            # (N, D)
        # Autocast gives 16 bits; the stream that all blocks add to stays in the dtype of the weights.
        return x.to(weight.dtype).unflatten(0, (-1, pack.chunk))                       # (G, n, D)

    def _velocity(self, x: Tensor, table: Tensor, rows: Tensor) -> Tensor:
        """The stream (G, n, D) -> velocity (N, C4), all in fp32: one last modulation, without a gate, and a linear layer."""
        with torch.autocast(x.device.type, enabled=False):
            shift, scale = table[:, None].chunk(2, -1)                                 # (T, 1, D)
            h = modulate(x.float(), shift, scale, rows)                                # (N, D)
            v = linear32(h, self.proj_out)                                             # (N, 4C)
        # The layer was trained with the channel last in a patch; the input has it first.
        return rearrange(v, "n (p c) -> n (c p)", c=self.config.out_channels)          # (N, C4)


def draw_weights(module: nn.Module) -> None:
    """A matrix normal with variance 1 / inputs, cut at three deviations; norms 1, biases 0."""
    if isinstance(module, nn.Linear):
        std = module.in_features**-0.5
        nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.RMSNorm):
        nn.init.ones_(module.weight)


def all_but_connector(name: str) -> str | None:
    """Names of a file, without those of its connector."""
    return None if name.startswith("crossattn_proj.") else name


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight computes: autocast's, else its own."""
    device = weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def linear32(x: Tensor, linear: nn.Linear) -> Tensor:
    """A linear layer in fp32, whatever its weights are stored in."""
    bias = None if linear.bias is None else linear.bias.float()
    return F.linear(x, linear.weight.float(), bias)
