"""The painter: Cosmos-Predict2.5's diffusion transformer over packed still images, and the flow it is trained on.

Source: NVIDIA Cosmos-Predict2.5 (arXiv 2511.00062); parameter names and config.json are those of diffusers'
`CosmosTransformer3DModel`, so either library loads the other's checkpoints. A sample is a row of images on the time axis: the
clean condition images first, the image to be painted last. Images may differ in size: the patches of all images of all samples
lie in one packed sequence without padding, a patch knows its position (image, row, column), and attention stays inside its
sample.

    dit = DiT.from_pretrained(folder)
    context = dit.crossattn_proj(features(hidden))                        # what the language model says, see connector.py
    latents = denoise(dit, [[clean]], [(88, 160)], [context], [negative], [seed], sigmas=shift_schedule(35, 5.0))

+-- The flow convention of this repository -----------------------------------------------------------------------------+
|   x_t = (1 - t) x_0 + t eps        t = 0 is data, t = 1 is noise        (Lipman et al. 2210.02747, Liu et al. 2209.03003) |
|   v   = eps - x_0                  what the network predicts; x_0 = x_t - t v                                          |
|   dx  = v dt                       sampling walks t from 1 to 0                                                        |
+-----------------------------------------------------------------------------------------------------------------------+
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from checkpoint import InputError, load_weights, read_json, resolve, save_weights
from connector import Connector
from kernels import attention

STEM = "diffusion_pytorch_model"
CONDITION_TIME = 1e-4  # t of clean images for the post-trained Cosmos checkpoint (its pipeline's default)


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

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, config: dict) -> "DiTConfig":
        """From diffusers' config.json; what this implementation has no code for is refused by name."""
        # An absent key means the default of diffusers' class.
        defaults = {"extra_pos_embed_type": "learnable", "img_context_dim_in": None, "use_crossattn_projection": False}
        for key, needed in {"extra_pos_embed_type": None, "img_context_dim_in": None, "use_crossattn_projection": True}.items():
            if config.get(key, defaults[key]) != needed:
                raise InputError(f"config.json of the DiT: {key} must be {needed}, not {config.get(key, defaults[key])}")
        names = {f.name for f in fields(cls)} - {"qk_norm_eps"}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
        self = cls(**values, qk_norm_eps=config.get("_qk_norm_eps", cls.qk_norm_eps))
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise InputError(f"config.json of the DiT: patch_size must be [1, p, p], not {list(self.patch_size)}")
        if config.get("encoder_hidden_states_channels", self.text_embed_dim) != self.text_embed_dim:
            raise InputError("config.json of the DiT: encoder_hidden_states_channels must equal text_embed_dim")
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
    cu_seqlens: Tensor  # (S + 1,) int32: boundaries of the samples
    shapes: list[tuple[int, int]]  # (rows, columns) of each image, in patches
    counts: list[int]  # images of each sample
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
    cu = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    chunk = math.gcd(*patches.tolist())
    return Pack(positions.to(device), images.to(device), cu.to(device), shapes, [len(s) for s in sizes], chunk)


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
        self.heads, self.eps = heads, eps
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width, bias=False)])
        self.norm_q = nn.RMSNorm(width // heads, eps=eps)
        self.norm_k = nn.RMSNorm(width // heads, eps=eps)

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (self.heads, -1))                                        # (N, heads, head_dim)

    def query(self, x: Tensor) -> Tensor:
        return rms_norm(self.split(self.to_q(x)), self.norm_q)

    def kv(self, context: Tensor) -> tuple[Tensor, Tensor]:
        return rms_norm(self.split(self.to_k(context)), self.norm_k), self.split(self.to_v(context))

    def out(self, y: Tensor) -> Tensor:
        return self.to_out[0](y.flatten(1))


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

    def forward(self, x, modulations, rope, cu, context, kv, cu_context):
        shift, scale, gate = modulations[0].chunk(3, -1)
        h = modulate(x, shift, scale)                                                  # (N, D)
        q, k, v = self.attn1.query(h), *self.attn1.kv(h)                               # (N, heads, head_dim)
        y = attention(rotate(q, *rope).to(v.dtype), rotate(k, *rope).to(v.dtype), v, cu)
        x = torch.addcmul(x, gate, self.attn1.out(y).view_as(x))                       # (chunks, chunk, D)

        shift, scale, gate = modulations[1].chunk(3, -1)
        q = self.attn2.query(modulate(x, shift, scale))
        k, v = kv if kv is not None else self.attn2.kv(context)                        # (M, heads, head_dim)
        y = attention(q.to(v.dtype), k.to(v.dtype), v, cu, cu_context)
        x = torch.addcmul(x, gate, self.attn2.out(y).view_as(x))

        shift, scale, gate = modulations[2].chunk(3, -1)
        return torch.addcmul(x, gate, self.ff(modulate(x, shift, scale)).view_as(x))


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
        """Fresh weights. Zero: the last layers of all modulations and of the time MLP, so every gate, and the output projection.

        So each block starts as the identity and the velocity as 0 (adaLN-Zero, Peebles & Xie 2212.09748): the first loss is
        E|eps - x_0|^2. Every other matrix is normal with variance 1 / inputs, cut at two deviations; norms are 1, biases 0.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=module.in_features**-0.5, a=-2.0, b=2.0)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.RMSNorm):
                nn.init.ones_(module.weight)
        closed = [m.linear_2 for m in self.modules() if isinstance(m, Modulation)]
        for linear in (*closed, self.time_embed.t_embedder.linear_2, self.proj_out):
            nn.init.zeros_(linear.weight)
        return self

    def modulations(self, t: Tensor) -> list[Tensor]:
        """t (I,) in [0, 1] -> per sub-layer (I, 3D) shift | scale | gate, and (I, 2D) for the output; all in fp32.

        They depend on nothing but t: a sampler computes those of all its steps in one call. In bf16 the sinusoid alone would
        lose the difference between neighbouring steps, so neither the dtype of the weights nor autocast reaches in here.
        """
        with torch.autocast(t.device.type, enabled=False):
            emb, lora = self.time_embed(t)                                             # (I, D), (I, 3D)
            emb = F.silu(emb)
            norms = [norm for block in self.transformer_blocks for norm in (block.norm1, block.norm2, block.norm3)]
            return [norm(emb, lora) for norm in (*norms, self.norm_out)]

    def context_kv(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Keys and values (M, heads, head_dim) of every block's cross-attention: the same in all steps of a picture."""
        return [block.attn2.kv(context) for block in self.transformer_blocks]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3) positions -> cos, sin (N, head_dim / 2) in fp32; first the frequencies of the image, then row, then column."""
        d = self.config.attention_head_dim
        spatial = d // 6 * 2
        angles = []
        for axis, (dim, scale) in enumerate(zip((d - 2 * spatial, spatial, spatial), self.config.rope_scale, strict=True)):
            theta = 10000.0 * scale ** (dim / (dim - 2))                               # NTK-aware stretch of the base
            frequencies = theta ** -(torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim)
            angles.append(positions[:, axis, None] * frequencies)
        angles = torch.cat(angles, 1)                                                  # (N, head_dim / 2)
        return angles.cos(), angles.sin()

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Tensor,
        pack: Pack,
        context: Tensor | None,
        cu_context: Tensor,
        *,
        kv: list[tuple[Tensor, Tensor]] | None = None,
        modulations: list[Tensor] | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """x (N, C * 4) patches of noisy and clean images -> velocity (N, C * 4) in fp32, meaningless on condition images.

        t (I,): time of each image. condition (I,): 1 for a clean image. context (M, text_embed_dim): the connector's output for
        all samples, boundaries cu_context (S + 1,); every token is read, none is padding. kv and modulations: what
        context_kv(context) and modulations(t) return, if computed before. padding (N, 4): the padding mask, default 0.
        """
        n, images = len(pack.image_ids), len(pack.shapes)
        if x.shape[0] != n or t.shape != (images,) or condition.shape != (images,):
            raise ValueError(f"the pack has {n} patches in {images} images; x {tuple(x.shape)}, t {tuple(t.shape)}, "
                             f"condition {tuple(condition.shape)}")  # fmt: skip
        dtype = self.patch_embed.proj.weight.dtype
        patch = self.config.patch_size[1] ** 2
        mask = condition.to(x.dtype)[pack.image_ids, None].expand(-1, patch)           # (N, 4)
        inputs = [x, mask]
        if self.config.concat_padding_mask:
            inputs.append(torch.zeros_like(mask) if padding is None else padding.to(x.dtype))
        x = self.patch_embed.proj(torch.cat(inputs, 1).to(dtype)).to(dtype)            # (N, D)

        modulations = self.modulations(t) if modulations is None else modulations
        rows = pack.image_ids[:: pack.chunk]                                           # (N / chunk,)
        if len(rows) != images:
            modulations = [m.index_select(0, rows) for m in modulations]
        modulations = [m[:, None] for m in modulations]                                # (N / chunk, 1, 3D)
        x = x.unflatten(0, (-1, pack.chunk))                                           # (N / chunk, chunk, D)
        rope = tuple(a[:, None] for a in self.rope(pack.positions))                    # (N, 1, head_dim / 2)
        for i, block in enumerate(self.transformer_blocks):
            own = [m.to(x.dtype) for m in modulations[3 * i : 3 * i + 3]]
            args = (x, own, rope, pack.cu_seqlens, context, kv[i] if kv else None, cu_context)
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, *args, use_reentrant=False)
            else:
                x = block(*args)

        with torch.autocast(x.device.type, enabled=False):                             # the whole last layer is fp32
            x = linear32(modulate(x.float(), *modulations[-1].chunk(2, -1)), self.proj_out)  # (N, 4C), channel last
        return x.unflatten(1, (patch, -1)).transpose(1, 2).flatten(1)                  # (N, C4), channel first like the input


def linear32(x: Tensor, linear: nn.Linear) -> Tensor:
    """A bias-free linear layer in fp32, whatever its weights are stored in."""
    return F.linear(x, linear.weight.float())


def rms_norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    return F.rms_norm(x.float(), norm.normalized_shape, norm.weight.float(), norm.eps)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LN(x) (1 + scale) + shift over chunks (G, n, D) that share a modulation (G, 1, D) -> (G * n, D)."""
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, h, 1 + scale).flatten(0, 1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, channel i paired with i + head_dim / 2, in fp32."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


# ------------------------------------------------------------------------------------------------------------------- flow


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x_0 + t eps; t broadcasts."""
    return torch.lerp(x0, noise, t)


def velocity_target(x0: Tensor, noise: Tensor) -> Tensor:
    """v = eps - x_0."""
    return noise - x0
