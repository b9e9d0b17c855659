"""The Wan2.1 VAE on still images: pictures (B, 3, H, W) in [-1, 1] to 16 x H/8 x W/8 latents and back, in 2-D convolutions.

Wan2.1's autoencoder (arXiv 2503.20314, section 4.1) is a causal 3-D network for video. Its convolutions pad with zeros in front
in time only, and its temporal up- and down-sampling skips the first frame. So on one frame every 3 x 3 x 3 kernel meets
zeros except in its last temporal slice,

    conv3d(x, W)[t = 0] = conv2d(x, W[:, :, -1])

and two thirds of the weights have nothing to do. What remains is the plain network below. Names are those of diffusers'
`AutoencoderKLWan`; a published folder is read directly, and what is written here is a folder `diffusers` reads.

    vae = VAE.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", subfolder="vae")
    latents = vae.encode_latents(to_tensor(image)[None])                               # (1, 16, H/8, W/8), unit scale
    image = to_image(vae.decode_latents(latents)[0])
"""

from dataclasses import asdict, dataclass, field
from math import sqrt
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from checkpoint import InputError, check_bounds, config_from_json, load_weights, read_json, resolve, save_weights
from ops import attention

# Per-channel statistics of Wan2.1's latents. They are part of the weights' meaning: the DiT sees (z - mean) / std.
WAN_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)  # fmt: skip
WAN_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
           3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)  # fmt: skip

# Fields of diffusers' config.json for variants that are not here, with the values that mean so.
ABSENT = {"attn_scales": [], "dropout": 0.0, "is_residual": False, "patch_size": None}


@dataclass
class VAEConfig:
    """The fields of diffusers' config.json that a still image depends on."""

    base_dim: int = 96
    decoder_base_dim: int | None = None  # None: base_dim
    z_dim: int = 16
    dim_mult: list[int] = field(default_factory=lambda: [1, 2, 4, 4])  # channels of each resolution, times base_dim
    num_res_blocks: int = 2  # per resolution in the encoder; the decoder has one more
    temperal_downsample: list[bool] = field(default_factory=lambda: [False, True, True])  # where time_conv lies in files
    in_channels: int = 3
    out_channels: int = 3
    latents_mean: list[float] = field(default_factory=lambda: list(WAN_MEAN))
    latents_std: list[float] = field(default_factory=lambda: list(WAN_STD))

    def __post_init__(self):
        where, widths = "config.json of the VAE", ("base_dim", "decoder_base_dim")
        check_bounds(self, where, {name: (1, 2**12) for name in (*widths, "z_dim", "in_channels", "out_channels")})
        check_bounds(self, where, {"dim_mult": (1, 64), "num_res_blocks": (1, 32)})
        check_bounds(self, where, {"latents_mean": (-1e6, 1e6), "latents_std": (1e-6, 1e6)})  # finite, and none is 0
        if not 1 <= len(self.dim_mult) <= 8:
            raise InputError(f"VAE config: dim_mult has {len(self.dim_mult)} entries, from 1 to 8 are possible")
        if len(self.temperal_downsample) != len(self.dim_mult) - 1:
            raise InputError(f"VAE config: temperal_downsample needs {len(self.dim_mult) - 1} entries, one a down-sampling")
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise InputError(f"VAE config: latents_mean and latents_std need {self.z_dim} numbers each (z_dim)")

    @property
    def factor(self) -> int:
        """Pixels per latent along a side."""
        return 2 ** (len(self.dim_mult) - 1)

    @classmethod
    def from_json(cls, values: dict) -> "VAEConfig":
        """Read diffusers' config.json. What this network does not do (Wan2.2's residual blocks) is refused."""
        for key, value in ABSENT.items():
            if values.get(key, value) != value:
                raise InputError(f"config.json of the VAE: {key} must be {value}, this is not a Wan2.1 VAE")
        derived = ("scale_factor_spatial", "scale_factor_temporal")  # they follow from the other fields
        return config_from_json(cls, values, "config.json of the VAE", ignore=(*ABSENT, *derived))

    def to_json(self) -> dict:
        scale = {"scale_factor_spatial": self.factor, "scale_factor_temporal": 2 ** sum(self.temperal_downsample)}
        return {"_class_name": "AutoencoderKLWan"} | asdict(self) | ABSENT | scale


PRESETS = {
    "tiny": VAEConfig(base_dim=16, num_res_blocks=1, latents_mean=[0.0] * 16, latents_std=[1.0] * 16),
    "wan2.1": VAEConfig(),
}


class ChannelNorm(nn.Module):
    """y = gamma * sqrt(C) * x / |x|, with the length taken over the channels of one pixel: an RMS norm without epsilon.

    Computed in fp32 when x is half precision. 1e-24 is the square of the 1e-12 that bounds |x| from below in the original.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        y = x.permute(0, 2, 3, 1).to(wide)                                                # (B, H, W, C)
        y = F.rms_norm(y, y.shape[-1:], self.gamma.to(wide), eps=1e-24)
        return y.permute(0, 3, 1, 2).to(x.dtype)                                          # (B, C, H, W)


class ResBlock(nn.Module):
    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.norm1 = ChannelNorm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = ChannelNorm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))                                             # (B, cout, H, W)
        y = self.conv2(F.silu(self.norm2(y)))                                             # (B, cout, H, W)
        return y + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    """One head as wide as the channels, over all positions of a picture."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.to_qkv(self.norm(x)).permute(0, 2, 3, 1).flatten(0, 2)                 # (B * H * W, 3C)
        q, k, v = (part.unsqueeze(1) for part in qkv.chunk(3, dim=-1))                    # (B * H * W, 1, C)
        cu = torch.arange(0, b * h * w + 1, h * w, dtype=torch.int32)  # on the CPU, where it is read
        # One head of up to 384 dimensions is too wide for the kernels.
        y = attention(q, k, v, cu, backend="sdpa").view(b, h, w, -1).permute(0, 3, 1, 2)  # (B, C, H, W)
        return x + self.proj(y)


class MidBlock(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([ResBlock(dim, dim), ResBlock(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    """Halve both sides. The zero row and column stand right and below only; an odd side loses its last pixel."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)                                                           # (B, C, H // 2, W // 2)


class Up(nn.Module):
    """Double both sides and halve the channels."""

    def __init__(self, dim: int):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2.0), nn.Conv2d(dim, dim // 2, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)                                                           # (B, C / 2, 2H, 2W)


class UpBlock(nn.Module):
    def __init__(self, cin: int, cout: int, resnets: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList([ResBlock(cin if i == 0 else cout, cout) for i in range(resnets)])
        self.upsamplers = nn.ModuleList([] if last else [Up(cout)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        dims = [c.base_dim * m for m in (1, *c.dim_mult)]
        self.conv_in = nn.Conv2d(c.in_channels, dims[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, (cin, cout) in enumerate(zip(dims, dims[1:], strict=False)):
            self.down_blocks.extend(ResBlock(cin if j == 0 else cout, cout) for j in range(c.num_res_blocks))
            if i < len(c.dim_mult) - 1:
                self.down_blocks.append(Down(cout))
        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * c.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                               # (B, base, H, W)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)                                                             # (B, C, H/8, W/8)
        return self.conv_out(F.silu(self.norm_out(x)))                                    # (B, 2z, H/8, W/8)


class Decoder(nn.Module):
    def __init__(self, c: VAEConfig):
        super().__init__()
        dims = [(c.decoder_base_dim or c.base_dim) * m for m in (c.dim_mult[-1], *reversed(c.dim_mult))]
        last = len(c.dim_mult) - 1
        self.conv_in = nn.Conv2d(c.z_dim, dims[0], 3, padding=1)
        self.mid_block = MidBlock(dims[0])
        self.up_blocks = nn.ModuleList(
            UpBlock(cin if i == 0 else cin // 2, cout, c.num_res_blocks + 1, i == last)
            for i, (cin, cout) in enumerate(zip(dims, dims[1:], strict=False))
        )
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.mid_block(self.conv_in(z))                                               # (B, C, h, w)
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(F.silu(self.norm_out(x)))                                    # (B, 3, 8h, 8w)


class VAE(nn.Module):
    """`encode` and `decode` are the bare network; `encode_latents` and `decode_latents` are what the system uses."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> mean and log variance (B, z, H // 8, W // 8) of the posterior, not normalised."""
        mean, logvar = self.quant_conv(self.encoder(x.to(self.dtype))).chunk(2, dim=1)    # (B, z, h, w) each
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, z, h, w), not normalised -> pixels (B, 3, 8h, 8w), not clamped."""
        return self.decoder(self.post_quant_conv(z.to(self.dtype)))

    def encode_latents(self, x: Tensor) -> Tensor:
        """Pixels -> normalised latents in fp32: the posterior's mean, never a sample, as Cosmos was trained."""
        mean, std = self._statistics(x.device)
        return (self.encode(x)[0].float() - mean) / std

    def decode_latents(self, z: Tensor) -> Tensor:
        """Normalised latents -> pixels (B, 3, 8h, 8w) in [-1, 1], fp32."""
        mean, std = self._statistics(z.device)
        return self.decode(z.float() * std + mean).float().clamp(-1.0, 1.0)

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Fix the constants of the normalisation; they are saved in config.json."""
        self.config = VAEConfig(**asdict(self.config) | {"latents_mean": list(mean), "latents_std": list(std)})

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        c = self.config
        mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (c.latents_mean, c.latents_std))
        return mean, std                                                                  # (z, 1, 1) each, fp32

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @classmethod
    def from_config(cls, config: VAEConfig) -> "VAE":
        """Fresh weights: convolutions keep the scale of their input, residual branches start at zero."""
        vae = cls(config)
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
                nn.init.zeros_(module.bias)
        for module in vae.modules():
            if isinstance(module, ResBlock | Attention):
                nn.init.zeros_((module.conv2 if isinstance(module, ResBlock) else module.proj).weight)
        return vae

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        subfolder: str | None = None,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> "VAE":
        """Load a folder or Hub id in diffusers' layout: every tensor a still image needs, and none that is unknown."""
        folder = resolve(source, subfolder, revision)
        config = VAEConfig.from_json(read_json(folder / "config.json"))
        shapes, unused = published_shapes(config)
        with torch.device("meta"):
            vae = cls(config)

        def adapt(name: str, tensor: Tensor) -> Tensor:
            if tuple(tensor.shape) != shapes[name]:
                raise InputError(f"{folder}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {shapes[name]}")
            if name.endswith("gamma"):
                return tensor.flatten()
            # contiguous() copies, so that the slices nobody reads leave the memory
            return tensor[:, :, -1].contiguous() if tensor.ndim == 5 else tensor

        def rename(name: str) -> str | None:
            return None if name in unused else name

        return load_weights(vae, folder, rename=rename, adapt=adapt, dtype=dtype, device=device, label="VAE")

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' layout. `dtype` is that of the file (float16 halves it); by default that of the weights.

        Kernels are written as 5-D with their last temporal slice filled. The other slices and the time_conv tensors, which no
        still image meets, are zeros: `diffusers` gives equal pictures from the folder, but no video.
        """
        shapes, unused = published_shapes(self.config)
        tensors = {}
        for name, value in self.state_dict().items():
            full = torch.zeros(shapes[name], dtype=dtype or self.dtype)
            (full[:, :, -1] if full.ndim == 5 else full.view(value.shape)).copy_(value)
            tensors[name] = full
        tensors |= {name: torch.zeros(shape, dtype=dtype or self.dtype) for name, shape in unused.items()}
        save_weights(tensors, Path(folder), self.config.to_json(), stem="diffusion_pytorch_model")


def published_shapes(config: VAEConfig) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Shapes in a diffusers file: of the tensors this network has, and of the time_conv tensors a still image never meets."""
    with torch.device("meta"):
        vae = VAE(config)
    shapes, unused = {}, {}
    for name, value in vae.state_dict().items():
        flat = ".attentions." in name or ".resample." in name  # per frame in the original: 2-D convolutions there too
        depth = 3 if value.shape[2:] == (3, 3) else 1
        if name.endswith("gamma"):
            shapes[name] = (*value.shape, 1, 1) if flat else (*value.shape, 1, 1, 1)
        else:
            shapes[name] = tuple(value.shape) if flat or value.ndim == 1 else (*value.shape[:2], depth, *value.shape[2:])
    layers = dict(vae.named_modules())
    downs = [name for name, layer in layers.items() if isinstance(layer, Down)]
    ups = [name for name, layer in layers.items() if isinstance(layer, Up)]
    temporal = [*config.temperal_downsample, *reversed(config.temperal_downsample)]
    for name, present in zip(downs + ups, temporal, strict=True):
        if present:
            cin = layers[name].resample[1].in_channels
            cout = cin * 2 if name in ups else cin  # going up, it makes two frames of one
            unused |= {f"{name}.time_conv.weight": (cout, cin, 3, 1, 1), f"{name}.time_conv.bias": (cout,)}
    return shapes, unused


def to_tensor(image: Image.Image, multiple: int = 16, max_area: int | None = None) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1], both sides multiples of 16 (8 of the VAE times 2 of the DiT's patches).

    Nothing is cropped. A picture of more than `max_area` pixels shrinks to that area; then each side goes to the nearest
    multiple, by bicubic resampling if it is not there already.
    """
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"to_tensor: a picture of mode {image.mode} must go through to_rgb first")
    w, h = image.size
    scale = min(1.0, sqrt(max_area / (w * h))) if max_area else 1.0
    size = tuple(max(1, round(side * scale / multiple)) * multiple for side in (w, h))
    image = image.convert("RGB")
    image = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1).contiguous()


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture; values outside are clamped."""
    pixels = ((x.detach().float().clamp(-1.0, 1.0) + 1.0) * 127.5).round().to(torch.uint8)
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())
