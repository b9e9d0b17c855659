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
from einops import rearrange
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
ABSENT = {
    "attn_scales": [],
    "dropout": 0.0,
    "is_residual": False,
    "patch_size": None,
}


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
        bounds = {
            "base_dim": (1, 2**12),
            "decoder_base_dim": (1, 2**12),
            "z_dim": (1, 2**12),
            "in_channels": (1, 2**12),
            "out_channels": (1, 2**12),
            "dim_mult": (1, 64),
            "num_res_blocks": (1, 32),
            "latents_mean": (-1e6, 1e6),  # finite
            "latents_std": (1e-6, 1e6),  # and none is 0
        }
        check_bounds(self, "config.json of the VAE", bounds)

        # One down-sampling lies between two resolutions, and each latent channel has a mean and a deviation.
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
        # Those of the file that are no fields here.
        derived = ("scale_factor_spatial", "scale_factor_temporal")  # they follow from the other fields
        return config_from_json(cls, values, "config.json of the VAE", ignore=(*ABSENT, *derived))

    def to_json(self) -> dict:
        return {
            "_class_name": "AutoencoderKLWan",
            **asdict(self),
            **ABSENT,
            "scale_factor_spatial": self.factor,
            "scale_factor_temporal": 2 ** sum(self.temperal_downsample),
        }


PRESETS = {
    "tiny": VAEConfig(
        base_dim=16,
        num_res_blocks=1,
        # Its own statistics are measured when it has been trained.
        latents_mean=[0.0] * 16,
        latents_std=[1.0] * 16,
    ),
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
        # rms_norm runs over the last dimension: channels go there and back.
        y = x.permute(0, 2, 3, 1).to(wide)                                                # (B, H, W, C)
        y = F.rms_norm(y, y.shape[-1:], self.gamma.to(wide), eps=1e-24)
        return y.permute(0, 3, 1, 2).to(x.dtype)                                          # (B, C, H, W)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, added to the input; a 1 x 1 convolution fits the input where the width changes."""

    def __init__(self, cin: int, cout: int):
        super().__init__()
        self.norm1 = ChannelNorm(cin)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = ChannelNorm(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.norm1(x))                                                         # (B, cin, H, W)
        y = self.conv1(y)                                                                 # (B, cout, H, W)
        y = F.silu(self.norm2(y))                                                         # (B, cout, H, W)
        y = self.conv2(y)                                                                 # (B, cout, H, W)
        if hasattr(self, "conv_shortcut"):
            x = self.conv_shortcut(x)                                                     # (B, cout, H, W)
        return y + x


class Attention(nn.Module):
    """One head as wide as the channels, over all positions of a picture."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = ChannelNorm(dim)
        self.to_qkv = nn.Conv2d(dim, 3 * dim, 1)
        self.proj = nn.Conv2d(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape

        # Pixels become tokens; the three thirds of the channels are query, key and value.
        qkv = self.to_qkv(self.norm(x))                                                   # (B, 3C, H, W)
        qkv = rearrange(qkv, "b c h w -> (b h w) 1 c")                                    # (B * H * W, 1, 3C)
        q, k, v = qkv.chunk(3, dim=-1)                                                    # (B * H * W, 1, C) each

        # A picture is a sequence of its own. The boundaries stay on the CPU, where they are read.
        cu = torch.arange(0, b * h * w + 1, h * w, dtype=torch.int32)                     # (B + 1,)
        # One head of up to 384 dimensions is too wide for the kernels.
        y = attention(q, k, v, cu, backend="sdpa")                                        # (B * H * W, 1, C)
        y = rearrange(y, "(b h w) 1 c -> b c h w", b=b, h=h)                              # (B, C, H, W)
        return x + self.proj(y)


class MidBlock(nn.Module):
    """Where the picture is smallest, each pixel looks once at all others."""

    def __init__(self, dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([Attention(dim)])
        self.resnets = nn.ModuleList([ResBlock(dim, dim), ResBlock(dim, dim)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.resnets[0](x)                                                            # (B, C, H/8, W/8)
        x = self.attentions[0](x)                                                         # (B, C, H/8, W/8)
        return self.resnets[1](x)                                                         # (B, C, H/8, W/8)


class Down(nn.Module):
    """Halve both sides. The zero row and column stand right and below only; an odd side loses its last pixel."""

    def __init__(self, dim: int):
        super().__init__()
        pad = nn.ZeroPad2d((0, 1, 0, 1))
        conv = nn.Conv2d(dim, dim, 3, stride=2)
        self.resample = nn.Sequential(pad, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)                                                           # (B, C, H // 2, W // 2)


class Up(nn.Module):
    """Double both sides and halve the channels."""

    def __init__(self, dim: int):
        super().__init__()
        twice = nn.Upsample(scale_factor=2.0)
        conv = nn.Conv2d(dim, dim // 2, 3, padding=1)
        self.resample = nn.Sequential(twice, conv)

    def forward(self, x: Tensor) -> Tensor:
        return self.resample(x)                                                           # (B, C / 2, 2H, 2W)


class UpBlock(nn.Module):
    """One resolution of the decoder: residual blocks, then the way up to the next, if there is one."""

    def __init__(self, cin: int, cout: int, resnets: int, last: bool):
        super().__init__()
        self.resnets = nn.ModuleList()
        for _ in range(resnets):
            self.resnets.append(ResBlock(cin, cout))
            # The first block changes the width, the others find it changed.
            cin = cout
        self.upsamplers = nn.ModuleList()
        if not last:
            self.upsamplers.append(Up(cout))

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.resnets, *self.upsamplers):
            x = layer(x)
        return x


class Encoder(nn.Module):
    """Pixels -> mean and log variance: resolution after resolution, each smaller and wider than the one before."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        dims = [c.base_dim * m for m in c.dim_mult]
        last = len(dims) - 1
        width = c.base_dim
        self.conv_in = nn.Conv2d(c.in_channels, width, 3, padding=1)

        # All resolutions' layers are in one flat list, which is how the file numbers them.
        self.down_blocks = nn.ModuleList()
        for i, dim in enumerate(dims):
            for _ in range(c.num_res_blocks):
                self.down_blocks.append(ResBlock(width, dim))
                width = dim
            if i < last:
                self.down_blocks.append(Down(dim))

        self.mid_block = MidBlock(dims[-1])
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], 2 * c.z_dim, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)                                                               # (B, base, H, W)
        for block in self.down_blocks:
            x = block(x)
        x = self.mid_block(x)                                                             # (B, C, H/8, W/8)
        # Twice the latent's channels: a mean and a log variance of each.
        x = F.silu(self.norm_out(x))                                                      # (B, C, H/8, W/8)
        return self.conv_out(x)                                                           # (B, 2z, H/8, W/8)


class Decoder(nn.Module):
    """Latents -> pixels: the encoder's way back, with one residual block more per resolution."""

    def __init__(self, c: VAEConfig):
        super().__init__()
        base = c.decoder_base_dim or c.base_dim
        dims = [base * m for m in reversed(c.dim_mult)]
        last = len(dims) - 1
        width = dims[0]
        self.conv_in = nn.Conv2d(c.z_dim, width, 3, padding=1)
        self.mid_block = MidBlock(width)
        self.up_blocks = nn.ModuleList()
        for i, dim in enumerate(dims):
            self.up_blocks.append(UpBlock(width, dim, c.num_res_blocks + 1, i == last))
            # The way up has halved the channels.
            width = dim // 2
        self.norm_out = ChannelNorm(dims[-1])
        self.conv_out = nn.Conv2d(dims[-1], c.out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)                                                               # (B, C, h, w)
        x = self.mid_block(x)                                                             # (B, C, h, w)
        for block in self.up_blocks:
            x = block(x)
        x = F.silu(self.norm_out(x))                                                      # (B, base, 8h, 8w)
        return self.conv_out(x)                                                           # (B, 3, 8h, 8w)


class VAE(nn.Module):
    """`encode` and `decode` are the bare network; `encode_latents` and `decode_latents` are what the system uses."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        # The 1 x 1 convolutions mix the channels on both sides of the latents; they belong to neither network.
        self.quant_conv = nn.Conv2d(2 * config.z_dim, 2 * config.z_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.z_dim, config.z_dim, 1)
        self.decoder = Decoder(config)

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) in [-1, 1] -> mean and log variance (B, z, H // 8, W // 8) of the posterior, not normalised."""
        moments = self.quant_conv(self.encoder(x.to(self.dtype)))                         # (B, 2z, h, w)
        mean, logvar = moments.chunk(2, dim=1)                                            # (B, z, h, w) each
        # Bounds of the original: within them the variance is neither 0 nor infinite in fp32.
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z: Tensor) -> Tensor:
        """Latents (B, z, h, w), not normalised -> pixels (B, 3, 8h, 8w), not clamped."""
        z = self.post_quant_conv(z.to(self.dtype))                                        # (B, z, h, w)
        return self.decoder(z)                                                            # (B, 3, 8h, 8w)

    def encode_latents(self, x: Tensor) -> Tensor:
        """Pixels -> normalised latents in fp32: the posterior's mean, never a sample, as Cosmos was trained."""
        mean, std = self._statistics(x.device)
        z, _ = self.encode(x)                                                             # (B, z, h, w)
        # Each channel of unit variance: the flow mixes it with noise of variance 1, and means the same by t in all of them.
        return (z.float() - mean) / std

    def decode_latents(self, z: Tensor) -> Tensor:
        """Normalised latents -> pixels (B, 3, 8h, 8w) in [-1, 1], fp32."""
        mean, std = self._statistics(z.device)
        z = z.float() * std + mean                                                        # (B, z, h, w)
        x = self.decode(z)                                                                # (B, 3, 8h, 8w)
        return x.float().clamp(-1.0, 1.0)

    def set_latent_statistics(self, mean: list[float], std: list[float]) -> None:
        """Fix the constants of the normalisation; they are saved in config.json."""
        # A new object, because others may hold the old one; and it is checked like one that was read.
        values = asdict(self.config)
        values["latents_mean"] = list(mean)
        values["latents_std"] = list(std)
        self.config = VAEConfig(**values)

    def _statistics(self, device: torch.device) -> tuple[Tensor, Tensor]:
        mean = torch.tensor(self.config.latents_mean, device=device)                      # (z,)
        std = torch.tensor(self.config.latents_std, device=device)                        # (z,)
        return mean[:, None, None], std[:, None, None]                                    # (z, 1, 1) each, fp32

    @property
    def dtype(self) -> torch.dtype:
        return self.quant_conv.weight.dtype

    @classmethod
    def from_config(cls, config: VAEConfig) -> "VAE":
        """Fresh weights: convolutions keep the scale of their input, residual branches start at zero."""
        vae = cls(config)
        # Variance 1 / inputs: a sum over as many products is as large as one of its inputs.
        for module in vae.modules():
            if isinstance(module, nn.Conv2d):
                inputs = module.weight[0].numel()
                nn.init.normal_(module.weight, std=inputs**-0.5)
                nn.init.zeros_(module.bias)
        # The last layer of each residual branch: at the start a block adds nothing.
        for module in vae.modules():
            if isinstance(module, ResBlock):
                nn.init.zeros_(module.conv2.weight)
            elif isinstance(module, Attention):
                nn.init.zeros_(module.proj.weight)
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
        # On the meta device a model has shapes and no memory: the weights that are read take their places.
        with torch.device("meta"):
            vae = cls(config)

        def adapt(name: str, tensor: Tensor) -> Tensor:
            """A tensor of the file -> the part of it that a still image meets."""
            shape = tuple(tensor.shape)
            if shape != shapes[name]:
                raise InputError(f"{folder}: tensor {name} has shape {shape}, the config asks for {shapes[name]}")
            if name.endswith("gamma"):
                return tensor.flatten()
            # The last slice meets the one frame there is, see the module's text. contiguous() copies, so that the slices nobody
            # reads leave the memory.
            if tensor.ndim == 5:
                return tensor[:, :, -1].contiguous()
            return tensor

        def rename(name: str) -> str | None:
            """None: not read."""
            return None if name in unused else name

        return load_weights(vae, folder, rename=rename, adapt=adapt, dtype=dtype, device=device, label="VAE")

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None) -> None:
        """Write diffusers' layout. `dtype` is that of the file (float16 halves it); by default that of the weights.

        Kernels are written as 5-D with their last temporal slice filled. The other slices and the time_conv tensors, which no
        still image meets, are zeros: `diffusers` gives equal pictures from the folder, but no video.
        """
        shapes, unused = published_shapes(self.config)
        dtype = dtype or self.dtype
        tensors = {}
        for name, value in self.state_dict().items():
            full = torch.zeros(shapes[name], dtype=dtype)
            # The place of our tensor in it.
            part = full[:, :, -1] if full.ndim == 5 else full.view(value.shape)
            part.copy_(value)
            tensors[name] = full
        for name, shape in unused.items():
            tensors[name] = torch.zeros(shape, dtype=dtype)
        save_weights(tensors, Path(folder), self.config.to_json(), stem="diffusion_pytorch_model")


def published_shapes(config: VAEConfig) -> tuple[dict[str, tuple], dict[str, tuple]]:
    """Shapes in a diffusers file: of the tensors this network has, and of the time_conv tensors a still image never meets."""
    # Names and shapes here, from a model without memory.
    with torch.device("meta"):
        vae = VAE(config)
    shapes = {}
    for name, value in vae.state_dict().items():
        shapes[name] = _published_shape(name, tuple(value.shape))

    # The way down and the way up through time, at the same resolutions, are in the file only where time is resampled.
    layers = dict(vae.named_modules())
    downs = [name for name, layer in layers.items() if isinstance(layer, Down)]
    ups = [name for name, layer in layers.items() if isinstance(layer, Up)]
    temporal = [*config.temperal_downsample, *reversed(config.temperal_downsample)]
    unused = {}
    for name, present in zip(downs + ups, temporal, strict=True):
        if not present:
            continue
        cin = layers[name].resample[1].in_channels
        # Going up, it makes two frames of one.
        cout = cin * 2 if name in ups else cin
        unused[f"{name}.time_conv.weight"] = (cout, cin, 3, 1, 1)
        unused[f"{name}.time_conv.bias"] = (cout,)
    return shapes, unused


def _published_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in a diffusers file of a tensor that has this shape here."""
    # These work frame by frame in the original: 2-D convolutions there, too.
    flat = ".attentions." in name or ".resample." in name
    # A gain is kept in the form in which it multiplies (C, H, W) or (C, T, H, W).
    if name.endswith("gamma"):
        return (*shape, 1, 1) if flat else (*shape, 1, 1, 1)
    # What is no kernel is a bias.
    if flat or len(shape) == 1:
        return shape
    depth = 3 if shape[2:] == (3, 3) else 1
    return (*shape[:2], depth, *shape[2:])


def to_tensor(image: Image.Image, multiple: int = 16, max_area: int | None = None) -> Tensor:
    """An RGB picture as (3, H, W) in [-1, 1], both sides multiples of 16 (8 of the VAE times 2 of the DiT's patches).

    Nothing is cropped. A picture of more than `max_area` pixels shrinks to that area; then each side goes to the nearest
    multiple, by bicubic resampling if it is not there already.
    """
    if image.mode not in ("RGB", "L"):
        raise ValueError(f"to_tensor: a picture of mode {image.mode} must go through to_rgb first")
    w, h = image.size
    # A root, since both sides shrink. Never larger: pixels that are made up teach nothing.
    scale = 1.0
    if max_area:
        scale = min(1.0, sqrt(max_area / (w * h)))
    size = []
    for side in (w, h):
        steps = max(1, round(side * scale / multiple))
        size.append(steps * multiple)
    size = tuple(size)
    image = image.convert("RGB")
    # Resampling is no identity everywhere: a picture that fits keeps its pixels.
    if image.size != size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) / 127.5 - 1.0                            # (H, W, 3)
    # Channels first, as convolutions take them; contiguous, since a permuted view is still laid out channels last.
    x = torch.from_numpy(pixels).permute(2, 0, 1)                                         # (3, H, W)
    return x.contiguous()


def to_image(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] -> an RGB picture; values outside are clamped."""
    x = x.detach().float().clamp(-1.0, 1.0)
    # Rounded, for the conversion to integers cuts off: every picture would get darker by half a step.
    pixels = ((x + 1.0) * 127.5).round().to(torch.uint8)                                  # (3, H, W)
    pixels = pixels.permute(1, 2, 0)                                                      # (H, W, 3)
    return Image.fromarray(pixels.cpu().numpy())
