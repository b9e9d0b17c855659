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
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import InputError, check_bounds, config_from_json, load_weights, read_json, resolve, save_weights
from connector import Connector
from ops import Segments, attention, gate_add, gate_add_modulate, join, joint, modulate, norm_rope, on_triton

STEM = "diffusion_pytorch_model"
# Fields of diffusers' config that mean nothing without the parts which DiTConfig.from_json refuses.
UNREAD = ("encoder_hidden_states_channels", "controlnet_block_every_n", "img_context_num_tokens", "img_context_dim_out")


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

    def __post_init__(self):
        counts = {"num_layers": (1, 256), "num_attention_heads": (1, 1024), "attention_head_dim": (12, 2**12)}
        widths = {"adaln_lora_dim": (1, 2**16), "text_embed_dim": (1, 2**18), "crossattn_proj_in_channels": (1, 2**24)}
        channels = {"in_channels": (1, 2**12), "out_channels": (1, 2**12), "patch_size": (1, 64), "max_size": (1, 2**20)}
        numbers = {"mlp_ratio": (1 / self.width if self.width > 0 else 0, 64), "rope_scale": (1e-3, 1e3), "qk_norm_eps": (0, 1)}
        check_bounds(self, "config.json of the DiT", counts | widths | channels | numbers)
        if self.attention_head_dim % 2:
            raise InputError(f"config.json of the DiT: attention_head_dim is {self.attention_head_dim}, it must be even")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, config: dict) -> "DiTConfig":
        """From diffusers' config.json; what this implementation has no code for is refused by name."""
        where = "config.json of the DiT"
        fixed = {"extra_pos_embed_type": ("learnable", None), "img_context_dim_in": (None, None)}  # diffusers' default, ours
        fixed["use_crossattn_projection"] = (False, True)
        for key, (default, needed) in fixed.items():
            if config.get(key, default) != needed:
                raise InputError(f"{where}: {key} must be {json.dumps(needed)}, not {json.dumps(config.get(key, default))}")
        values = {"qk_norm_eps": config.get("_qk_norm_eps", cls.qk_norm_eps), **config}
        self = config_from_json(cls, values, where, ignore=(*fixed, *UNREAD))
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise InputError(f"{where}: patch_size must be [1, p, p], not {list(self.patch_size)}")
        if config.get("encoder_hidden_states_channels", self.text_embed_dim) != self.text_embed_dim:
            raise InputError(f"{where}: encoder_hidden_states_channels must equal text_embed_dim")
        return self

    def to_json(self) -> dict:
        """diffusers' config.json. Its loader drops keys with an underscore without a word: the eps can travel as one."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "qk_norm_eps"}
        return {
            "_class_name": "CosmosTransformer3DModel",
            "_diffusers_version": "0.42.1",
            "_qk_norm_eps": self.qk_norm_eps,
            **{k: list(v) if isinstance(v, tuple) else v for k, v in values.items()},
            "encoder_hidden_states_channels": self.text_embed_dim,
            "extra_pos_embed_type": None,
            "use_crossattn_projection": True,
        }


PRESETS = {
    "tiny": DiTConfig(6, 4, 64, adaln_lora_dim=32, text_embed_dim=256, crossattn_proj_in_channels=4 * 256),
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
    if not shapes or not all(sizes) or min(min(s) for s in shapes) < 1:
        raise InputError(f"a pack needs samples of at least one image of at least 1x1 patches, got {sizes}")
    h, w = torch.tensor(shapes).T                                                      # (I,)
    patches = h * w
    images = torch.arange(len(shapes)).repeat_interleave(patches)                      # (N,)
    within = torch.arange(len(images)) - (patches.cumsum(0) - patches)[images]         # (N,) number of the patch in its image
    index = torch.cat([torch.arange(len(sample)) for sample in sizes])                 # (I,)
    positions = torch.stack((index[images], within // w[images], within % w[images]), 1)
    lengths = [sum(h * w for h, w in sample) for sample in sizes]
    chunk = math.gcd(*patches.tolist())
    return Pack(positions.to(device), images.to(device), Segments(lengths, device), shapes, chunk)


class Targets:
    """Which patches of a pack are painted: the last layers need not compute the others."""

    def __init__(self, pack: Pack, given: list[bool]):
        """given: which images (I) are conditions."""
        device = pack.positions.device
        patches = torch.tensor([h * w for h, w in pack.shapes])
        wanted = ~torch.tensor(given).repeat_interleave(patches)                       # (N,)
        self.rows = wanted.nonzero()[:, 0].to(device)  # (P,) their places in the pack
        self.chunks = wanted[:: pack.chunk].nonzero()[:, 0].to(device)  # (P / chunk,) the same for whole chunks
        self.segments = Segments([int(part.sum()) for part in wanted.split(pack.segments.lengths)], device)


def patchify(latent: Tensor, patch: int = 2) -> Tensor:
    """(C, H, W) -> (H/p * W/p, C * p * p), feature (c * p + ph) * p + pw: the layout of noise, x_t and velocity everywhere."""
    c, h, w = latent.shape
    if h % patch or w % patch:
        raise InputError(f"a latent of {h}x{w} is no grid of {patch}x{patch} patches: picture sides must be multiples of 16")
    x = latent.reshape(c, h // patch, patch, w // patch, patch)
    return x.permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)


def unpatchify(x: Tensor, size: tuple[int, int], patch: int = 2) -> Tensor:
    """Inverse of patchify; size: (rows, columns) in patches."""
    h, w = size
    x = x.reshape(h, w, -1, patch, patch)                                              # (h, w, C, p, p)
    return x.permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2)                           # (C, h p, w p)


# ---------------------------------------------------------------------------------------------------------------- network


class Modulation(nn.Module):
    """adaLN-LoRA: from the time embedding to (shift, scale[, gate]) of one sub-layer; `lora` is what all of them share."""

    def __init__(self, width: int, rank: int, parts: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, rank, bias=False)
        self.linear_2 = nn.Linear(rank, parts * width, bias=False)

    def forward(self, emb: Tensor, lora: Tensor) -> Tensor:
        return linear32(linear32(emb, self.linear_1), self.linear_2) + lora[:, : self.linear_2.out_features]


class TimeEmbedder(nn.Module):
    """Time -> the RMSNorm of its sinusoid (cosines first), and an MLP of it whose output is added to every modulation."""

    def __init__(self, width: int):
        super().__init__()
        self.t_embedder = nn.Module()
        self.t_embedder.linear_1 = nn.Linear(width, width, bias=False)
        self.t_embedder.linear_2 = nn.Linear(width, 3 * width, bias=False)
        self.norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        half = self.norm.normalized_shape[0] // 2
        frequencies = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
        angles = t.float()[:, None] * frequencies                                      # (I, D/2)
        e = torch.cat((angles.cos(), angles.sin()), 1)                                 # (I, D)
        lora = linear32(F.silu(linear32(e, self.t_embedder.linear_1)), self.t_embedder.linear_2)
        return F.rms_norm(e, e.shape[1:], self.norm.weight.float(), self.norm.eps), lora


class Attention(nn.Module):
    def __init__(self, width: int, context_width: int, heads: int, eps: float):
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q = nn.RMSNorm(width // heads, eps=eps)
        self.norm_k = nn.RMSNorm(width // heads, eps=eps)

    def heads_of(self, y: Tensor) -> Tensor:
        return y.view(len(y), -1, self.head_dim)                                       # (N, heads, head_dim)

    def query(self, x: Tensor, *rope: Tensor) -> Tensor:
        return norm_rope(self.heads_of(self.to_q(x)), self.norm_q.weight, self.norm_q.eps, *rope)

    def kv(self, x: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor]:
        parts = joint(x, self.to_k, self.to_v)
        k, v = map(self.heads_of, parts) if len(parts) > 1 else self.heads_of(*parts).chunk(2, 1)
        return norm_rope(k, self.norm_k.weight, self.norm_k.eps, *rope), v             # 2 x (N, heads, head_dim)

    def qkv(self, x: Tensor, *rope: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """query and kv of the same tokens: where their projections are joint, so is their norm."""
        parts = joint(x, self.to_q, self.to_k, self.to_v)
        if len(parts) == 1:
            qk, v = self.heads_of(*parts).split((2 * self.heads, self.heads), 1)
            gains = torch.stack((self.norm_q.weight, self.norm_k.weight))              # (2, head_dim)
            return *norm_rope(qk, gains, self.norm_q.eps, *rope).chunk(2, 1), v
        q, k, v = map(self.heads_of, parts)                                            # 3 x (N, heads, head_dim)
        q, k = (norm_rope(y, norm.weight, norm.eps, *rope) for y, norm in ((q, self.norm_q), (k, self.norm_k)))
        return q, k, v

    def out(self, y: Tensor) -> Tensor:
        return self.to_out[0](y.flatten(1))                                            # (N, D)


class FeedForward(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        first = nn.Module()
        first.proj = nn.Linear(width, hidden, bias=False)
        self.net = nn.ModuleList([first, nn.GELU(), nn.Linear(hidden, width, bias=False)])

    def forward(self, x: Tensor) -> Tensor:
        return self.net[2](self.net[1](self.net[0].proj(x)))


class Block(nn.Module):
    """Self-attention over the sample's images, cross-attention to the context, MLP; each modulated before and gated after."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        width, eps = config.width, config.qk_norm_eps
        self.norm1 = Modulation(width, config.adaln_lora_dim, 3)
        self.attn1 = Attention(width, width, config.num_attention_heads, eps)
        self.norm2 = Modulation(width, config.adaln_lora_dim, 3)
        self.attn2 = Attention(width, config.text_embed_dim, config.num_attention_heads, eps)
        self.norm3 = Modulation(width, config.adaln_lora_dim, 3)
        self.ff = FeedForward(width, int(width * config.mlp_ratio))

    def forward(self, x, table, rows, rope, segments, context, kv, keys, targets=None) -> Tensor:
        """x (G, n, D): chunks of n patches, chunk g modulated by row rows[g] of table (T, 9D); the rest as in DiT.forward.

        With targets, the other patches only give keys and values, and are left out of what is returned.
        """
        dtype = working_dtype(self.attn1.to_q.weight)
        shift1, scale1, gate1, *others, index = modulation(table, rows, x)

        h = modulate(x, shift1, scale1, index, dtype)                                  # (N, D)
        if targets is None:
            q, k, v = self.attn1.qkv(h, *rope)                                         # (N, heads, head_dim)
            y = attention(q, k, v, segments)
        else:
            q = self.attn1.query(h.index_select(0, targets.rows), *(r.index_select(0, targets.rows) for r in rope))
            y = attention(q, *self.attn1.kv(h, *rope), targets.segments, segments)     # (P, heads, head_dim)
            x, rows, segments = x.index_select(0, targets.chunks), rows.index_select(0, targets.chunks), targets.segments
            _, _, gate1, *others, index = modulation(table, rows, x)
        shift2, scale2, gate2, shift3, scale3, gate3 = others
        x, h = gate_add_modulate(x, gate1, self.attn1.out(y), shift2, scale2, index, dtype)              # (G, n, D), (N, D)

        k, v = self.attn2.kv(context) if kv is None else kv                            # (M, heads, head_dim)
        y = attention(self.attn2.query(h), k, v, segments, keys)
        x, h = gate_add_modulate(x, gate2, self.attn2.out(y), shift3, scale3, index, dtype)
        return gate_add(x, gate3, self.ff(h), index)


def modulation(table: Tensor, rows: Tensor, x: Tensor) -> list[Tensor]:
    """A block's table (T, 9D) as nine (T, 1, D), and rows (G,) for ops.py. PyTorch picks the rows here, all nine at once."""
    if not on_triton(x):
        table, rows = table.index_select(0, rows).to(x.dtype), None
    return [*table.view(len(table), 9, 1, -1).unbind(1), rows]


class DiT(nn.Module):
    """Velocity of packed images. Built with random weights by from_config, with published ones by from_pretrained."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        patch = config.patch_size[1] ** 2
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Linear((config.in_channels + config.concat_padding_mask) * patch, config.width, bias=False)
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
    def from_pretrained(cls, source, subfolder=None, revision=None, dtype=torch.float32, device="cpu") -> "DiT":
        folder = resolve(source, subfolder, revision)
        with torch.device("meta"):
            dit = cls(DiTConfig.from_json(read_json(folder / "config.json")))
        return load_weights(dit, folder, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, **options) -> None:
        save_weights(self.state_dict(), Path(folder), self.config.to_json(), stem=STEM, **options)

    def initialise(self) -> "DiT":
        """Fresh weights. Zero: the last layer of each modulation and of the time MLP, so all gates, and the output projection.

        So each block starts as the identity and the velocity as 0 (adaLN-Zero, Peebles & Xie 2212.09748), and the first loss is
        E|eps - x_0|^2. Every other matrix is normal with variance 1 / inputs, cut at three deviations; norms are 1, biases 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                std = module.in_features**-0.5
                nn.init.trunc_normal_(module.weight, std=std, a=-3 * std, b=3 * std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        closed = [m.linear_2 for m in self.modules() if isinstance(m, Modulation)]
        for linear in (*closed, self.time_embed.t_embedder.linear_2, self.proj_out):
            nn.init.zeros_(linear.weight)
        return self

    def fuse_for_inference(self) -> "DiT":
        """Projections that read the same input become one product where no gradient is asked for. Repeat it after `.to`."""
        for block in self.transformer_blocks:
            own, context = block.attn1, block.attn2
            join(own.to_q, own.to_k, own.to_v)
            join(context.to_k, context.to_v)
        return self

    def modulations(self, t: Tensor) -> list[Tensor]:
        """t (T,) in [0, 1] -> per block (T, 9D), shift | 1 + scale | gate of three sub-layers; for the output (T, 2D). fp32.

        They depend on nothing but t: a sampler computes those of all its steps in one call. In bf16 the sinusoid alone would
        lose the difference between neighbouring steps, so neither the dtype of the weights nor autocast reaches in here.
        """
        with torch.autocast(t.device.type, enabled=False):
            emb, lora = self.time_embed(t)                                             # (T, D), (T, 3D)
            emb, (shift, scale, gate) = F.silu(emb), lora.chunk(3, 1)
            lora = torch.cat((shift, 1 + scale, gate), 1)  # the 1 enters here, once for all of them
            blocks = [[norm(emb, lora) for norm in (b.norm1, b.norm2, b.norm3)] for b in self.transformer_blocks]
            return [*(torch.cat(block, 1) for block in blocks), self.norm_out(emb, lora)]

    def context_kv(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (M, heads, head_dim) of every block's cross-attention: the same in all steps of a picture."""
        context = context.to(working_dtype(self.proj_out.weight))
        pairs = (block.attn2.kv(context) for block in self.transformer_blocks)
        return [(k, v.contiguous()) for k, v in pairs]  # as part of a joint projection v would keep the raw keys alive

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3) positions -> cos, sin (N, 1, head_dim) in fp32: frequencies of image, row, column, and the same again."""
        d = self.config.attention_head_dim
        spatial = d // 6 * 2
        angles = []
        for axis, (dim, scale) in enumerate(zip((d - 2 * spatial, spatial, spatial), self.config.rope_scale, strict=True)):
            theta = 10000.0 * scale ** (dim / (dim - 2))                               # NTK-aware stretch of the base
            frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
            angles.append(positions[:, axis, None] * frequencies)
        angles = torch.cat(angles, 1)[:, None]                                         # (N, 1, head_dim / 2)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)                   # the first half turns against the second

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
        n, images = len(pack.image_ids), len(pack.shapes)
        if x.shape[0] != n or condition.shape != (images,):
            raise ValueError(f"pack of {n} patches, {images} images: x is {tuple(x.shape)}, condition {tuple(condition.shape)}")
        patch = self.config.patch_size[1] ** 2
        mask = condition.to(x.dtype)[pack.image_ids, None].expand(-1, patch)           # (N, 4)
        inputs = [x, mask]
        if self.config.concat_padding_mask:
            inputs.append(torch.zeros_like(mask) if padding is None else padding.to(x.dtype))
        weight = self.patch_embed.proj.weight
        x = self.patch_embed.proj(torch.cat(inputs, 1).to(weight.dtype))               # (N, D)
        x = x.to(weight.dtype).unflatten(0, (-1, pack.chunk))                          # (G, n, D): fp32 stream even in autocast

        table, rows = (self.modulations(t), torch.arange(images, device=x.device)) if modulations is None else modulations
        rows = rows[pack.image_ids[:: pack.chunk]]                                     # (G,)
        rope = self.rope(pack.positions) if rope is None else rope                     # 2 x (N, 1, head_dim)
        keys = Segments.of(keys, x.device)
        context = None if context is None else context.to(working_dtype(weight))
        for i, block in enumerate(self.transformer_blocks):
            last = i + 1 == len(self.transformer_blocks)
            args = x, table[i], rows, rope, pack.segments, context, kv[i] if kv else None, keys, targets if last else None
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)

        with torch.autocast(x.device.type, enabled=False):                             # the whole last layer is fp32
            rows = rows if targets is None else rows.index_select(0, targets.chunks)
            shift, scale = table[-1][:, None].chunk(2, -1)                             # (T, 1, D)
            x = linear32(modulate(x.float(), shift, scale, rows), self.proj_out)       # (N, 4C), channel last
        return x.unflatten(1, (patch, -1)).transpose(1, 2).flatten(1)                  # (N, C4), channel first like the input


def working_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a linear layer with this weight computes: autocast's, else its own."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def linear32(x: Tensor, linear: nn.Linear) -> Tensor:
    """A bias-free linear layer in fp32, whatever its weights are stored in."""
    return F.linear(x, linear.weight.float())
