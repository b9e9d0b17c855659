"""Qwen3-VL, dense (2B, 4B, 8B, 32B): the second language model.

Against Qwen2.5-VL (model.py), of which it keeps the rest (Bai et al., arXiv 2511.21631; names and layout of transformers'
`Qwen3VLForConditionalGeneration`):

* queries and keys of every head are normed before they turn, and their projections have no bias;
* mRoPE is interleaved: time, row and column take the frequencies in turn, so that each of them has fast ones and slow ones;
* every block of the vision tower looks at the whole picture, patches have 16 pixels, and a patch learns where it is from a grid
  of embeddings, stretched to the picture's size, beside the rotation;
* DeepStack (Meng et al., arXiv 2406.04334): what the tower knows at three depths is added to the decoder's stream, in the
  places of the picture, behind the first three layers.

The published chat template has no default system turn, and leaves out pictures of an answer. Here a dialogue always begins
with a system turn (tokenizer.SYSTEM), since that is what guidance leaves to the painter where nothing else has been said, and
pictures of an answer stand in it as a user's do. Otherwise the form is the same.

Why not a newer one: of the later Qwen models with vision, Qwen3.5 has linear attention with a recurrent state in three of four
layers, and Qwen4-Exp experts as well. Qwen3-VL is the newest of which every layer is softmax attention, which is what packs
and caches here hold.
"""

from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import model
from checkpoint import InputError, check_bounds
from model import MLLM, ImageProcessor, MLLMConfig, Rows, VisionAttention, frequencies, maybe_checkpoint, rope_tables
from model import vision_plan
from ops import Segments, attention, joint, norm_rope

WHOLE = 2**20  # merge units along a window's side: no picture is larger, so it is one window, in raster order

# -------------------------------------------------------------------------------------------------------------- configs


@dataclass
class VisionConfig:
    """The vision tower; sizes in pixels where they say so, in patches elsewhere. The defaults are those of the 2B and 4B."""

    out_hidden_size: int  # the decoder's width
    hidden_size: int = 1024
    depth: int = 24
    num_heads: int = 16
    intermediate_size: int = 4096
    patch_size: int = 16  # pixels
    temporal_patch_size: int = 2  # frames; a still picture is shown that many times
    spatial_merge_size: int = 2  # patches along a side of what becomes one token
    num_position_embeddings: int = 2304  # of a square grid, stretched to every picture
    deepstack_visual_indexes: tuple[int, ...] = (5, 11, 17)  # blocks behind which the decoder's first layers listen, too
    in_channels: int = 3

    # No fields: what all towers of this family have.
    ACTIVATION = "gelu_pytorch_tanh"
    mlp_matrices = 2  # of a block's MLP
    window = WHOLE

    def __post_init__(self):
        bounds = {
            "out_hidden_size": (1, 2**18),
            "hidden_size": (1, 2**18),
            "intermediate_size": (1, 2**18),
            "depth": (1, 256),
            "num_heads": (1, 1024),
            "in_channels": (1, 64),
            "patch_size": (1, 256),
            "temporal_patch_size": (1, 16),
            "spatial_merge_size": (1, 16),
            "num_position_embeddings": (1, 2**20),
            "deepstack_visual_indexes": (0, self.depth - 1),
        }
        check_bounds(self, "vision_config", bounds)
        # Half of a head's channels turn with the row, half with the column, and channels turn in pairs.
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(f"vision_config: {self.num_heads} heads need a hidden_size that is a multiple of 4 per head")
        if self.side**2 != self.num_position_embeddings:
            raise InputError(f"vision_config: {self.num_position_embeddings} position embeddings are no square grid")
        if any(a >= b for a, b in pairwise(self.deepstack_visual_indexes)):
            raise InputError("vision_config: deepstack_visual_indexes must rise")

    @property
    def side(self) -> int:
        """Embeddings along a side of the learnt grid."""
        return int(self.num_position_embeddings**0.5)

    @property
    def full_layers(self) -> int:
        """Blocks that look at the whole picture."""
        return self.depth

    @property
    def mergers(self) -> int:
        """How often patches become tokens."""
        return 1 + len(self.deepstack_visual_indexes)


@dataclass
class Qwen3VLConfig(MLLMConfig):
    """The decoder, the ids of the tokens that the model itself must know, and the vision tower."""

    vision: VisionConfig
    head_dim: int = 128  # given, and not what the heads' number makes of hidden_size
    rope_theta: float = 5e6
    mrope_section: tuple[int, ...] = (24, 20, 20)  # frequencies that turn with time, row, column
    max_position_embeddings: int = 262144

    # No fields: what all models of this family have.
    MODEL_TYPE = "qwen3_vl"
    Vision = VisionConfig
    qkv_bias = False

    def __post_init__(self):
        check_bounds(self, "config.json", {"head_dim": (2, 2**12)})
        super().__post_init__()
        # Row and column take every third frequency, from the first third on: there must be so many.
        if 3 * max(self.mrope_section[1:]) > sum(self.mrope_section) + 2:
            raise InputError(f"config.json: mrope_section {self.mrope_section} leaves time too few frequencies to interleave")
        if len(self.vision.deepstack_visual_indexes) > self.num_hidden_layers:
            raise InputError("config.json: deepstack_visual_indexes are more than there are layers to listen")

    @staticmethod
    def demands(text: dict, rope: dict) -> list[tuple]:
        return [
            ("mrope_interleaved", rope.get("mrope_interleaved", True), (True,)),
            ("attention_bias", text.get("attention_bias", False), (False,)),
        ]

    def to_json(self) -> dict:
        """The published layout, with an object for the decoder and one for the tower."""
        outer = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id", "vision_token_id")
        values = asdict(self)
        vision = values.pop("vision")
        section = values.pop("mrope_section")
        out = {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": self.MODEL_TYPE}
        for name in (*outer, "tie_word_embeddings"):
            out[name] = values.pop(name)

        text = {"model_type": "qwen3_vl_text", "hidden_act": "silu", "attention_bias": False, **values}
        text["bos_token_id"] = self.pad_token_id
        text["tie_word_embeddings"] = self.tie_word_embeddings
        text["rope_scaling"] = {"rope_type": "default", "mrope_section": list(section), "mrope_interleaved": True}
        out["text_config"] = text

        vision["deepstack_visual_indexes"] = list(vision["deepstack_visual_indexes"])
        out["vision_config"] = {"model_type": "qwen3_vl", "hidden_act": VisionConfig.ACTIVATION, **vision}
        return out


def tower_27(width: int) -> VisionConfig:
    """The larger tower, of the 8B and the 32B."""
    return VisionConfig(width, 1152, depth=27, intermediate_size=4304, deepstack_visual_indexes=(8, 16, 24))


PRESETS = {
    "tiny-qwen3-vl": Qwen3VLConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        vision=VisionConfig(
            256,
            hidden_size=128,
            depth=4,
            num_heads=2,
            intermediate_size=384,
            patch_size=8,
            num_position_embeddings=64,
            deepstack_visual_indexes=(1, 2),
        ),
        head_dim=64,
        mrope_section=(12, 10, 10),
        max_position_embeddings=8192,
        # The ids are those of a full vocabulary of 1024 with the 22 added tokens at its end; see for_tokenizer.
        image_token_id=1014,
        video_token_id=1015,
        vision_start_token_id=1011,
        vision_end_token_id=1012,
        vision_token_id=1013,
        eos_token_id=1004,
        pad_token_id=1002,
    ),
    # In the order of the fields: width, MLP, layers, heads, KV heads, vocabulary, eps, tower.
    "qwen3-vl-2B": Qwen3VLConfig(2048, 6144, 28, 16, 8, 151936, 1e-6, VisionConfig(2048), tie_word_embeddings=True),
    "qwen3-vl-4B": Qwen3VLConfig(2560, 9728, 36, 32, 8, 151936, 1e-6, VisionConfig(2560), tie_word_embeddings=True),
    "qwen3-vl-8B": Qwen3VLConfig(4096, 12288, 36, 32, 8, 151936, 1e-6, tower_27(4096)),
    "qwen3-vl-32B": Qwen3VLConfig(5120, 25600, 64, 64, 8, 151936, 1e-6, tower_27(5120)),
}

# --------------------------------------------------------------------------------------------------------- vision tower


@lru_cache(maxsize=64)
def stretched(grids: tuple[tuple[int, int], ...], merge: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which four of the side x side learnt embeddings a patch is between, (P, 4), and how much it has of each, (P, 4).

    The grid is stretched so that its corners lie on the corner patches of each picture (bilinear, corners aligned).
    """
    corners = []
    shares = []
    for rows, columns in grids:
        places = vision_plan(((rows, columns),), merge, WHOLE, torch.device("cpu")).positions      # (P, 2)
        of_axis = []
        for axis, n in enumerate((rows, columns)):
            at = places[:, axis].float() * (side - 1) / max(n - 1, 1)                         # (P,)
            low = at.floor().long()
            high = (low + 1).clamp(max=side - 1)
            share = at - low
            of_axis.append((torch.stack((low, high), 1), torch.stack((1 - share, share), 1)))
        (row, row_share), (column, column_share) = of_axis                                    # (P, 2) each
        corners.append((row[:, :, None] * side + column[:, None]).flatten(1))                 # (P, 4)
        shares.append((row_share[:, :, None] * column_share[:, None]).flatten(1))             # (P, 4)
    with torch.inference_mode(False):  # kept for later calls, which may train
        return torch.cat(corners).to(device, copy=True), torch.cat(shares).to(device, copy=True)


def layer_norm(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    """In the dtype of the stream, whatever autocast says: the products that follow round it anyway."""
    return F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps).to(x.dtype)


class PatchEmbed(model.PatchEmbed):
    """As before, with a bias."""

    def __init__(self, c: VisionConfig):
        super().__init__(c)
        self.proj.bias = nn.Parameter(torch.zeros(c.hidden_size))

    def forward(self, patches: Tensor) -> Tensor:
        return super().forward(patches) + self.proj.bias                                      # (P, width)


class VisionMLP(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.linear_fc1 = nn.Linear(c.hidden_size, c.intermediate_size)
        self.linear_fc2 = nn.Linear(c.intermediate_size, c.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate="tanh"))                # (P, width)


class VisionBlock(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.norm2 = nn.LayerNorm(c.hidden_size, eps=1e-6)
        self.attn = VisionAttention(c.hidden_size, c.num_heads)
        self.mlp = VisionMLP(c)

    def forward(self, x: Tensor, *where) -> Tensor:
        x = x + self.attn(layer_norm(x, self.norm1), *where)                                  # (P, width)
        return x + self.mlp(layer_norm(x, self.norm2))                                        # (P, width)


class PatchMerger(nn.Module):
    """The 2 x 2 patches of a merge unit become one token of the decoder's width. units_first: they are normed as one."""

    def __init__(self, c: VisionConfig, units_first: bool):
        super().__init__()
        self.unit = c.spatial_merge_size**2
        self.units_first = units_first
        inner = c.hidden_size * self.unit
        self.norm = nn.LayerNorm(inner if units_first else c.hidden_size, eps=1e-6)
        self.linear_fc1 = nn.Linear(inner, inner)
        self.linear_fc2 = nn.Linear(inner, c.out_hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        if not self.units_first:
            x = layer_norm(x, self.norm)                                                      # (P, width)
        x = rearrange(x, "(unit patch) d -> unit (patch d)", patch=self.unit)                 # (P / 4, 4 * width)
        if self.units_first:
            x = layer_norm(x, self.norm)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))                                    # (P / 4, H)


class VisionTower(nn.Module):
    """Patches of any number of pictures -> one vector per merge unit, in raster order, pictures behind each other."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.pos_embed = nn.Embedding.from_pretrained(torch.zeros(c.num_position_embeddings, c.hidden_size), freeze=False)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = PatchMerger(c, units_first=False)
        self.deepstack_merger_list = nn.ModuleList(PatchMerger(c, units_first=True) for _ in c.deepstack_visual_indexes)
        self.gradient_checkpointing = False
        self.close_deepstack()

    def close_deepstack(self) -> None:
        """A new tower adds nothing to the decoder's stream: the last layers of DeepStack are zero, and open in training."""
        for merger in self.deepstack_merger_list:
            nn.init.zeros_(merger.linear_fc2.weight)
            nn.init.zeros_(merger.linear_fc2.bias)

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """pixels (P, C * T * p * p) in merge-unit order; grids: patches (rows, columns) of each picture."""
        return self.levels(pixels, grids)[0]                                                  # (P / 4, H)

    def repeated(self) -> list[nn.Module]:
        return [*self.blocks]

    def levels(self, pixels: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        """What the decoder gets of the pictures, (P / 4, H) each: for their places, then for its first layers."""
        c = self.config
        merge = c.spatial_merge_size
        grids = tuple(map(tuple, grids))
        plan = vision_plan(grids, merge, WHOLE, pixels.device)
        if len(plan.positions) != len(pixels):
            raise InputError(f"{len(pixels)} patches do not fill the pictures' grids {list(grids)}")

        # What a patch shows, and where it is.
        x = self.patch_embed(pixels)                                                          # (P, width)
        corners, shares = stretched(grids, merge, c.side, x.device)                           # (P, 4) each
        places = (self.pos_embed(corners) * shares[:, :, None]).sum(1)                        # (P, width)
        x = x + places.to(x.dtype)

        # Half of a head's pairs turn with the row, half with the column, both from fast to slow.
        quarter = c.hidden_size // c.num_heads // 4
        turns = frequencies((quarter, quarter), True, 10000.0, x.device)
        cos, sin = rope_tables(plan.positions, *turns, torch.float32)                         # (P, 1, head_dim)
        deeper = []
        mergers = dict(zip(c.deepstack_visual_indexes, self.deepstack_merger_list, strict=True))
        for i, block in enumerate(self.blocks):
            x = maybe_checkpoint(self, block, x, plan.images, cos, sin)                       # (P, width)
            if i in mergers:
                deeper.append(mergers[i](x))
        return [self.merger(x), *deeper]


# -------------------------------------------------------------------------------------------------------------- decoder


class Attention(model.Attention):
    """Queries and keys of each head are normed before they turn, so that no product of the two grows without bound."""

    def __init__(self, c: Qwen3VLConfig, layer: int):
        super().__init__(c, layer)
        self.q_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)
        self.k_norm = nn.RMSNorm(c.head_dim, eps=c.rms_norm_eps)

    def forward(self, x: Tensor, segments: Segments, cos: Tensor, sin: Tensor, rows: Rows | None = None) -> Tensor:
        parts = joint(x, self.q_proj, self.k_proj, self.v_proj)
        qkv = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        heads = qkv.unflatten(1, (-1, self.head_dim))                                         # (N, all heads, head_dim)
        q, k, v = heads.split((self.heads, self.kv_heads, self.kv_heads), 1)
        q = norm_rope(q, self.q_norm.weight, self.q_norm.eps, cos, sin)                       # (N, heads, head_dim)
        k = norm_rope(k, self.k_norm.weight, self.k_norm.eps, cos, sin)                       # (N, KV heads, head_dim)
        if rows is None:
            y = attention(q, k, v, segments, causal=True)                                     # (N, heads, head_dim)
            return self.o_proj(y.flatten(1))                                                  # (N, H)

        # With a cache: new keys and values go into their rows, and queries look at all rows of their document.
        keys = rows.k[self.layer]                                                             # (rows, KV heads, head_dim)
        values = rows.v[self.layer]                                                           # (rows, KV heads, head_dim)
        keys.index_copy_(0, rows.slots, k.to(keys.dtype))
        values.index_copy_(0, rows.slots, v.to(values.dtype))
        q = q.to(keys.dtype)
        y = attention(q, keys, values, segments, rows.keys, causal=True, k_lengths=rows.lengths)
        return self.o_proj(y.flatten(1))                                                      # (N, H)


class Layer(model.Layer):
    Attention = Attention


class Qwen3VL(MLLM):
    """The whole model; packs, cache and decoding are those of MLLM."""

    Config = Qwen3VLConfig
    Tower = VisionTower
    Layer = Layer

    @staticmethod
    def name_in_file(name: str) -> str:
        """In files tower and decoder lie side by side under "model."; `model.published_name` is the reverse."""
        if name.startswith("visual."):
            return f"model.{name}"
        if name.startswith("model."):
            return "model.language_model." + name.removeprefix("model.")
        return name

    def initialise(self) -> "Qwen3VL":
        super().initialise()
        self.visual.close_deepstack()
        return self

    def _rotation(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(N, 3) positions -> cos, sin (N, 1, head_dim) in fp32, as the norms before the rotation are computed."""
        c = self.config
        half = c.head_dim // 2
        _, frequency = frequencies((half,), False, c.rope_theta, positions.device)            # (head_dim,)
        axis = interleaved(tuple(c.mrope_section), positions.device)                          # (head_dim,)
        return rope_tables(positions, axis, frequency, torch.float32)


@lru_cache(maxsize=16)
def interleaved(section: tuple[int, ...], device: torch.device) -> Tensor:
    """Which axis turns each channel (head_dim,): time, row, column in turn, and time alone where row and column have theirs."""
    with torch.inference_mode(False):  # kept for later calls, which may train
        axis = torch.zeros(sum(section), dtype=torch.long)
        for k in (1, 2):
            axis[k : 3 * section[k] : 3] = k
        return axis.repeat(2).to(device)


@dataclass
class Processor(ImageProcessor):
    """Picture -> normalised patches. The defaults are the published preprocessor_config.json of Qwen3-VL."""

    patch_size: int = 16
    min_pixels: int = 65536
    max_pixels: int = 16777216
    image_mean: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])
    image_std: list[float] = field(default_factory=lambda: [0.5, 0.5, 0.5])

    KIND = "Qwen3VLProcessor"  # no field: transformers' class
