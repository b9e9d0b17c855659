"""Wan2.1 T2V (1.3B, 14B): the second painter, over the VAE that Cosmos-Predict2.5 has, too (Wan team, arXiv 2503.20314).

Parameter names and config.json are those of diffusers' `WanTransformer3DModel`; packs, the flow's convention and the way over
the blocks are those of dit.py. What is different:

* there is no mask that says which pictures are given: a clean picture is known by its own time, as the first frame of Wan2.2's
  image-to-video is. A time is handed to the network as 0..1000;
* a block's modulation is a table of its own plus one projection of the time that all blocks share; cross-attention has a learnt
  norm before it, and no gate behind it;
* queries and keys are normed over all heads together, and neighbouring channels turn as a pair, not those half a head apart;
* linear layers have biases, the MLP's GELU is the approximate one;
* the network was told of the text by two linear layers over UMT5's states. The connector stands in their place: a painter with
  a connector has no `text_embedder`, the published one has no connector. Without one it still reads text as published:

    wan = Wan.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer")
    v = wan(x, t, given, pack, wan.read_text(states), keys)                # UMT5's states (M, 4096)

    wan = Wan.from_pretrained("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "transformer", features=mllm.config.features)
    v = wan(x, t, given, pack, wan.crossattn_proj(features(hidden)), keys)  # a new connector, to be trained
"""

import json
import math
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from checkpoint import InputError, check_bounds, config_from_json
from connector import Connector
from dit import DiT, FeedForward, Pack, axial_rope, draw_weights, linear32, modulation, working_dtype
from ops import attention, gate_add, modulate, rms_norm, rope

EPS = 1e-6  # of all norms


@dataclass
class WanConfig:
    """Size of the network; names and meaning as in diffusers' config.json. The defaults are the 1.3B."""

    num_layers: int = 30
    num_attention_heads: int = 12
    attention_head_dim: int = 128
    ffn_dim: int = 8960
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = (1, 2, 2)  # (image, height, width), in latent pixels
    text_dim: int = 4096  # width of UMT5's states
    freq_dim: int = 256  # of the time's sinusoid
    rope_max_seq_len: int = 1024  # largest position in diffusers' table; no limit here
    crossattn_proj_in_channels: int = 0  # language model layers x width; 0: no connector, but the text embedder

    mask_channels = 0  # no field: of in_channels, those that say which pictures are given

    def __post_init__(self):
        bounds = {
            "num_layers": (1, 256),
            "num_attention_heads": (1, 1024),
            "attention_head_dim": (12, 2**12),
            "ffn_dim": (1, 2**20),
            "in_channels": (1, 2**12),
            "out_channels": (1, 2**12),
            "patch_size": (1, 64),
            "text_dim": (1, 2**18),
            "freq_dim": (2, 2**16),
            "rope_max_seq_len": (1, 2**20),
            "crossattn_proj_in_channels": (0, 2**24),
        }
        check_bounds(self, "config.json of the painter", bounds)
        # Channels turn in pairs; the sinusoid has as many cosines as sines.
        for name in ("attention_head_dim", "freq_dim"):
            if getattr(self, name) % 2:
                raise InputError(f"config.json of the painter: {name} is {getattr(self, name)}, it must be even")

    @property
    def width(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @property
    def context_width(self) -> int:
        return self.width

    @property
    def mlp_width(self) -> int:
        return self.ffn_dim

    @property
    def patch_features(self) -> int:
        """Numbers of a patch that the first layer reads."""
        return self.in_channels * self.patch_size[1] ** 2

    @property
    def time_weights(self) -> int:
        """Weights that every time is multiplied with: its MLP, and the projection to six parts that all blocks share."""
        return self.freq_dim * self.width + self.width**2 + 6 * self.width**2

    @classmethod
    def from_json(cls, config: dict) -> "WanConfig":
        """From diffusers' config.json; what this implementation has no code for is refused by name."""
        where = "config.json of the painter"
        fixed = {  # diffusers' default, ours
            "cross_attn_norm": (True, True),
            "qk_norm": ("rms_norm_across_heads", "rms_norm_across_heads"),
            "eps": (EPS, EPS),
            "image_dim": (None, None),
            "added_kv_proj_dim": (None, None),
            "pos_embed_seq_len": (None, None),
        }
        for key, (default, needed) in fixed.items():
            found = config.get(key, default)
            if found != needed:
                raise InputError(f"{where}: {key} must be {json.dumps(needed)}, not {json.dumps(found)}")

        # diffusers' own defaults are the 14B's.
        theirs = {"num_layers": 40, "num_attention_heads": 40, "ffn_dim": 13824}
        features = config.get("_crossattn_proj_in_channels", 0)
        values = {**theirs, "crossattn_proj_in_channels": features, **config}
        self = config_from_json(cls, values, where, ignore=tuple(fixed))
        if self.patch_size[0] != 1 or self.patch_size[1] != self.patch_size[2]:
            raise InputError(f"{where}: patch_size must be [1, p, p], not {list(self.patch_size)}")
        return self

    def to_json(self) -> dict:
        """diffusers' config.json. Its loader passes over keys with an underscore: the connector's width can travel as one."""
        values = asdict(self)
        features = values.pop("crossattn_proj_in_channels")
        values["patch_size"] = list(self.patch_size)
        return {
            "_class_name": "WanTransformer3DModel",
            "_diffusers_version": "0.42.1",
            "_crossattn_proj_in_channels": features,
            **values,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
            "eps": EPS,
            "image_dim": None,
            "added_kv_proj_dim": None,
        }


PRESETS = {
    "tiny-wan": WanConfig(6, 4, 64, ffn_dim=1024, text_dim=256, freq_dim=64, crossattn_proj_in_channels=4 * 256),
    "wan2.1-1.3B": WanConfig(),
    "wan2.1-14B": WanConfig(40, 40, 128, ffn_dim=13824),
}


class Attention(nn.Module):
    """Projections of self- or cross-attention, with an RMSNorm over all heads of queries and keys."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])
        self.norm_q = nn.RMSNorm(width, eps=EPS)
        self.norm_k = nn.RMSNorm(width, eps=EPS)

    def heads_of(self, y: Tensor) -> Tensor:
        return y.unflatten(1, (self.heads, -1))                                        # (N, heads, head_dim)

    def turned(self, y: Tensor, norm: nn.RMSNorm, *tables: Tensor) -> Tensor:
        """(N, D) normed, in heads, and turned where there are tables."""
        y = rms_norm(y, norm.weight, norm.eps)
        if not tables:
            return self.heads_of(y)
        # Ours turns channel i with i + half: neighbours are brought that far apart. Queries and keys alike, so no product of
        # the two sees a difference.
        y = rearrange(y, "n (h c two) -> n h (two c)", h=self.heads, two=2)
        return rope(y, *tables)                                                        # (N, heads, head_dim)

    def query(self, x: Tensor, *tables: Tensor) -> Tensor:
        return self.turned(self.to_q(x), self.norm_q, *tables)

    def kv(self, x: Tensor, *tables: Tensor) -> tuple[Tensor, Tensor]:
        k = self.turned(self.to_k(x), self.norm_k, *tables)
        return k, self.heads_of(self.to_v(x))                                          # 2 x (N, heads, head_dim)

    def out(self, y: Tensor) -> Tensor:
        return self.to_out[0](y.flatten(1))                                            # (N, D)


class Block(nn.Module):
    """Self-attention over the sample's images, cross-attention to the context, MLP; the first and the last are modulated."""

    def __init__(self, config: WanConfig):
        super().__init__()
        width = config.width
        self.attn1 = Attention(width, config.num_attention_heads)
        self.attn2 = Attention(width, config.num_attention_heads)
        self.norm2 = nn.LayerNorm(width, eps=EPS)
        self.ffn = FeedForward(width, config.ffn_dim, bias=True, approximate="tanh")
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 6, width))

    def forward(
        self, x, h, table, following, rows, rope, segments, context, kv, keys, targets=None
    ) -> tuple[Tensor, Tensor | None]:
        """As dit.Block, but that the next block's input is never made ahead: `h` and `following` are not used."""
        dtype = working_dtype(self.attn1.to_q.weight)
        shift1, scale1, gate1, shift3, scale3, gate3, index = modulation(table, rows, x)

        # Self-attention: every patch looks at all images of its sample.
        h = modulate(x, shift1, scale1, index, dtype)                                  # (N, D)
        if targets is None:
            q = self.attn1.query(h, *rope)                                             # (N, heads, head_dim)
            k, v = self.attn1.kv(h, *rope)                                             # (N, heads, head_dim)
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
            _, _, gate1, shift3, scale3, gate3, index = modulation(table, rows, x)
        x = gate_add(x, gate1, self.attn1.out(y), index)                               # (G, n, D)

        # Cross-attention: every patch looks at all that its sample has been told.
        if kv is None:
            kv = self.attn2.kv(context)
        k, v = kv                                                                      # (M, heads, head_dim)
        norm = self.norm2
        h = F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)   # (G, n, D)
        q = self.attn2.query(h.flatten(0, 1).to(dtype))                                # (N, heads, head_dim)
        y = self.attn2.out(attention(q, k, v, segments, keys))                         # (N, D)
        x = x + y.view_as(x)                                                           # (G, n, D)

        # MLP: each patch by itself, on what it has gathered.
        h = modulate(x, shift3, scale3, index, dtype)                                  # (N, D)
        return gate_add(x, gate3, self.ffn(h), index), None                            # (G, n, D)


def two_layers(inputs: int, width: int) -> nn.Module:
    """linear_1 and linear_2, as diffusers names them."""
    module = nn.Module()
    module.linear_1 = nn.Linear(inputs, width)
    module.linear_2 = nn.Linear(width, width)
    return module


class Wan(DiT):
    """Velocity of packed images: the forward pass is DiT's, over other parts."""

    Config = WanConfig

    LORA = r"blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ffn\.net\.(0\.proj|2))"  # see lora.py

    def __init__(self, config: WanConfig):
        nn.Module.__init__(self)  # not DiT's, which makes its own parts
        self.config = config
        width = config.width
        self.patch_embedding = nn.Conv3d(config.in_channels, width, config.patch_size, config.patch_size)
        self.condition_embedder = nn.Module()
        self.condition_embedder.time_embedder = two_layers(config.freq_dim, width)
        self.condition_embedder.time_proj = nn.Linear(width, 6 * width)
        # One or the other says what the blocks read of the text.
        self.condition_embedder.text_embedder = None
        self.crossattn_proj = None
        if config.crossattn_proj_in_channels:
            self.crossattn_proj = Connector(config.crossattn_proj_in_channels, width)
        else:
            self.condition_embedder.text_embedder = two_layers(config.text_dim, width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.proj_out = nn.Linear(width, config.out_channels * config.patch_size[1] ** 2)
        self.scale_shift_table = nn.Parameter(torch.zeros(1, 2, width))
        self.gradient_checkpointing = False  # True: the backward pass recomputes each block

    def connect(self, features: int) -> None:
        """A new connector in place of the text embedder, or of another connector."""
        super().connect(features)
        self.condition_embedder.text_embedder = None

    def initialise(self) -> "Wan":
        """Fresh weights, as DiT's: zero is whatever opens only in training, so that each block starts as the identity and the
        velocity as 0. Where a block has no gate, that is its output layer."""
        for module in self.modules():
            draw_weights(module)
        patches = self.patch_embedding
        nn.init.trunc_normal_(patches.weight, std=patches.weight[0].numel() ** -0.5)
        nn.init.zeros_(patches.bias)
        closed = [self.condition_embedder.time_proj, self.proj_out, *(block.attn2.to_out[0] for block in self.blocks)]
        for linear in closed:
            nn.init.zeros_(linear.weight)
        return self

    def repeated(self) -> list[nn.Module]:
        return [*self.blocks]

    def fuse_for_inference(self) -> "Wan":
        """Nothing to join: a norm over all heads needs queries and keys as rows of their own, not as slices of wider ones."""
        return self

    def read_text(self, states: Tensor) -> Tensor:
        """UMT5's states (M, text_dim) -> context (M, D), by the published layers."""
        embedder = self.condition_embedder.text_embedder
        h = F.gelu(embedder.linear_1(states), approximate="tanh")
        return embedder.linear_2(h)                                                    # (M, D)

    def modulations(self, t: Tensor) -> list[Tensor]:
        """t (T,) in [0, 1] -> per block (T, 6D), shift | 1 + scale | gate of two sub-layers; for the output (T, 2D). fp32."""
        with torch.autocast(t.device.type, enabled=False):
            # From one radian per thousandth of time down to 1/10000 of it, evenly in the exponent; cosines first.
            half = self.config.freq_dim // 2
            step = -math.log(10000.0) / half
            frequencies = torch.exp(torch.arange(half, device=t.device) * step)        # (freq_dim / 2,)
            angles = 1000 * t.float()[:, None] * frequencies                           # (T, freq_dim / 2)
            e = torch.cat((angles.cos(), angles.sin()), 1)                             # (T, freq_dim)

            # One embedding of the time, which all blocks read through one projection.
            embedder = self.condition_embedder
            hidden = F.silu(linear32(e, embedder.time_embedder.linear_1))              # (T, D)
            emb = linear32(hidden, embedder.time_embedder.linear_2)                    # (T, D)
            shared = linear32(F.silu(emb), embedder.time_proj)                         # (T, 6D)

            # A scale multiplies by 1 + scale. The 1 enters here, once for all of them.
            one = torch.zeros(6, 1, device=t.device)
            one[[1, 4]] = 1
            shared = shared.unflatten(1, (6, -1)) + one                                # (T, 6, D)
            tables = [(shared + block.scale_shift_table.float()).flatten(1) for block in self.blocks]
            last = emb[:, None] + self.scale_shift_table.float() + one[:2]             # (T, 2, D)
            return [*tables, last.flatten(1)]

    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3) positions -> cos, sin (N, 1, head_dim) in fp32."""
        return axial_rope(positions, self.config.attention_head_dim, (1.0, 1.0, 1.0))

    def _embed(self, x: Tensor, condition: Tensor, pack: Pack, padding: Tensor | None) -> Tensor:
        """Patches (N, C4) -> the stream (G, n, D): G chunks of n patches. Its time alone says whether a picture is clean."""
        weight = self.patch_embedding.weight.flatten(1)                                # (D, C4)
        x = F.linear(x.to(weight.dtype), weight, self.patch_embedding.bias)            # (N, D)
        # Autocast gives 16 bits; the stream that all blocks add to stays in the dtype of the weights.
        return x.to(weight.dtype).unflatten(0, (-1, pack.chunk))                       # (G, n, D)
