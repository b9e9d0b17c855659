"""Qwen2.5-VL: the language model that reads text and pictures, writes text, and says with BOV when a picture is due.

A vision tower turns every picture into one vector per 2 x 2 patches; they take the place of the `<|image_pad|>` embeddings, and
a causal decoder reads all of it (Bai et al., arXiv 2502.13923). Documents of different lengths lie packed behind each other.
Every layer's output is returned: the DiT's connector reads them all, `logits` the last one.

    mllm = MLLM.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct", dtype=torch.bfloat16, device="cuda")
    patches, grid = ImageProcessor.from_pretrained("Qwen/Qwen2.5-VL-7B-Instruct")(image)
    positions, _ = mrope_positions(ids, [processor.merged(grid)], mllm.config.image_token_id)
    hidden = mllm(ids, positions, Segments([len(ids)]), patches, [grid])    # one (N, H) per layer, the last one normed

Parameters carry the names of the published files; `transformers` loads what `save_pretrained` writes, and the reverse.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageCms
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import lora
from checkpoint import InputError, check_bounds, config_from_json, read_json, resolve, save_weights, write_json
from ops import Segments, add_norm_swiglu, add_rms_norm, attention, join, joint, rms_norm, rope, rope_append, swiglu

# -------------------------------------------------------------------------------------------------------------- configs


@dataclass
class VisionConfig:
    """The vision tower; sizes in pixels where they say so, in patches elsewhere."""

    hidden_size: int
    out_hidden_size: int  # the decoder's width
    depth: int = 32
    num_heads: int = 16
    intermediate_size: int = 3420
    patch_size: int = 14  # pixels
    temporal_patch_size: int = 2  # frames; a still picture is shown that many times
    spatial_merge_size: int = 2  # patches along a side of what becomes one token
    window_size: int = 112  # pixels
    fullatt_block_indexes: tuple[int, ...] = (7, 15, 23, 31)  # the other blocks attend within windows
    in_channels: int = 3

    def __post_init__(self):
        bounds = {
            "hidden_size": (1, 2**18),
            "out_hidden_size": (1, 2**18),
            "intermediate_size": (1, 2**18),
            "window_size": (1, 2**18),
            "depth": (1, 256),
            "num_heads": (1, 1024),
            "in_channels": (1, 64),
            "fullatt_block_indexes": (0, 1024),
            "patch_size": (1, 256),
            "temporal_patch_size": (1, 16),
            "spatial_merge_size": (1, 16),
        }
        check_bounds(self, "vision_config", bounds)
        # Half of a head's channels turn with the row, half with the column, and channels turn in pairs.
        if self.hidden_size % (4 * self.num_heads):
            raise InputError(f"vision_config: {self.num_heads} heads need a hidden_size that is a multiple of 4 per head")
        if self.window_size < self.patch_size * self.spatial_merge_size:
            raise InputError("vision_config: window_size is smaller than one merged patch")


@dataclass
class MLLMConfig:
    """The decoder, the ids of the tokens that the model itself must know, and the vision tower."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int  # rows of the embedding; the tokenizer may use fewer
    rms_norm_eps: float
    vision: VisionConfig
    rope_theta: float = 1e6
    mrope_section: tuple[int, ...] = (16, 24, 24)  # frequencies that turn with time, row, column
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 128000
    image_token_id: int = 151655
    video_token_id: int = 151656
    vision_start_token_id: int = 151652
    vision_end_token_id: int = 151653
    vision_token_id: int = 151654
    eos_token_id: int = 151645
    pad_token_id: int = 151643

    def __post_init__(self):
        bounds = {
            "num_hidden_layers": (1, 256),
            "num_attention_heads": (1, 1024),
            "num_key_value_heads": (1, 1024),
            "hidden_size": (1, 2**18),
            "intermediate_size": (1, 2**20),
            "vocab_size": (1, 2**24),
            "mrope_section": (0, 2**16),
            "max_position_embeddings": (1, 2**30),
            "rms_norm_eps": (0.0, 1.0),
            "rope_theta": (1.0, 1e12),
        }
        for name in self.__dataclass_fields__:
            if name.endswith("_token_id"):
                bounds[name] = (0, 2**31)
        check_bounds(self, "config.json", bounds)
        # Each holds for itself; these say whether they fit together.
        if self.hidden_size % self.num_attention_heads or self.num_attention_heads % self.num_key_value_heads:
            raise InputError("config.json: hidden_size must divide into the heads, and these into num_key_value_heads groups")
        if len(self.mrope_section) != 3 or 2 * sum(self.mrope_section) != self.head_dim:
            raise InputError(f"config.json: mrope_section {self.mrope_section} must be 3 numbers with sum {self.head_dim // 2}")
        if self.vision.out_hidden_size != self.hidden_size:
            raise InputError("config.json: vision_config.out_hidden_size must be the decoder's hidden_size")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, values: dict, where: str | Path = "config.json") -> "MLLMConfig":
        """Read a published config.json (flat) or the one transformers 5 writes (with a text_config).

        Both carry many keys without effect here (dropout, caching, versions), so unknown ones pass; whatever would change the
        result and is not done here is refused.
        """
        # In the nested form the decoder's fields stand in an object of their own; they go before those around it.
        text = dict(values)
        if isinstance(values.get("text_config"), dict):
            text |= values["text_config"]
        objects = {
            "text_config": values,
            "vision_config": values,
            "rope_parameters": text,
            "rope_scaling": text,
        }
        for name, owner in objects.items():
            if not isinstance(owner.get(name), dict | None):
                raise InputError(f"{where}: field {name} is {owner[name]!r:.60}, but an object {{...}} is expected")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        tower = values.get("vision_config") or {}
        vision = {
            "in_channels": tower.get("in_chans", 3),  # its name in the published files
            "out_hidden_size": text.get("hidden_size"),
            **tower,
        }

        # What would change the result: the field, its value in the file, the values that mean what is done here.
        demands = [
            ("model_type", values.get("model_type", "qwen2_5_vl"), ("qwen2_5_vl",)),
            ("quantization_config", values.get("quantization_config"), (None,)),
            ("hidden_act", text.get("hidden_act", "silu"), ("silu",)),
            ("vision_config.hidden_act", vision.get("hidden_act", "silu"), ("silu",)),
            ("use_sliding_window", text.get("use_sliding_window", False), (False, None)),
            ("rope type", rope.get("rope_type", rope.get("type", "default")), ("default", "mrope")),
        ]
        for name, value, allowed in demands:
            if value not in allowed:
                needs = f"only {allowed[0]!r} is read: use an unquantised Qwen2.5-VL"
                raise InputError(f"{where}: {name} is {value!r:.60}, {needs}")

        # Fields that go by our names, and over them those that lie elsewhere in the file.
        known = {}
        for name, value in text.items():
            if name in cls.__dataclass_fields__ and value is not None:
                known[name] = value
        known["rope_theta"] = rope.get("rope_theta", text.get("rope_theta", cls.rope_theta))
        known["mrope_section"] = rope.get("mrope_section", cls.mrope_section)
        # The nested form has it inside, outside, or in both places.
        tied = values.get("tie_word_embeddings", False)
        known["tie_word_embeddings"] = tied or text.get("tie_word_embeddings", False)
        known["vision"] = {k: v for k, v in vision.items() if k in VisionConfig.__dataclass_fields__}
        return config_from_json(cls, known, where)

    def to_json(self) -> dict:
        """The published flat layout."""
        out = {
            "architectures": ["Qwen2_5_VLForConditionalGeneration"],
            "model_type": "qwen2_5_vl",
            "hidden_act": "silu",
        }
        for name, value in asdict(self).items():
            if name not in ("vision", "mrope_section"):
                out[name] = value
        out["bos_token_id"] = self.pad_token_id  # <|endoftext|> is both; transformers would assume 151643
        out["rope_scaling"] = {"type": "mrope", "mrope_section": list(self.mrope_section)}

        # The tower's object has its own kind and activation, too.
        vision = {"model_type": "qwen2_5_vl", "hidden_act": "silu"}
        vision |= asdict(self.vision)
        vision["fullatt_block_indexes"] = list(self.vision.fullatt_block_indexes)
        vision["in_chans"] = vision["in_channels"]  # the name in the published files, and the one transformers reads
        out["vision_config"] = vision
        return out

    def for_tokenizer(self, tokenizer) -> "MLLMConfig":
        """This configuration with the token ids of `tokenizer`, whose vocabulary must fit into the embedding."""
        if tokenizer.vocab_size > self.vocab_size:
            raise InputError(f"the tokenizer has {tokenizer.vocab_size} tokens, the embedding only {self.vocab_size} rows")
        return replace(
            self,
            image_token_id=tokenizer.image_pad,
            video_token_id=tokenizer.video_pad,
            vision_start_token_id=tokenizer.vision_start,
            vision_end_token_id=tokenizer.vision_end,
            vision_token_id=tokenizer.added["<|vision_pad|>"],
            eos_token_id=tokenizer.im_end,
            pad_token_id=tokenizer.endoftext,
        )


PRESETS = {
    "tiny": MLLMConfig(
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=1024,
        rms_norm_eps=1e-6,
        vision=VisionConfig(
            hidden_size=128,
            out_hidden_size=256,
            depth=4,
            num_heads=2,
            intermediate_size=256,
            patch_size=8,
            window_size=32,
            fullatt_block_indexes=(1, 3),
        ),
        mrope_section=(8, 12, 12),
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
    "3B": MLLMConfig(2048, 11008, 36, 16, 2, 151936, 1e-6, VisionConfig(1280, 2048), tie_word_embeddings=True),
    "7B": MLLMConfig(3584, 18944, 28, 28, 4, 152064, 1e-6, VisionConfig(1280, 3584)),
    "32B": MLLMConfig(5120, 27648, 64, 40, 8, 152064, 1e-6, VisionConfig(1280, 5120, intermediate_size=3456)),
}

# ------------------------------------------------------------------------------------------------ what both halves share


@lru_cache(maxsize=16)
def frequencies(axes: tuple[int, ...], shared: bool, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rotary embedding (Su et al., arXiv 2104.09864): which axis of a position turns each of the D channels, and by how many
    radians per unit, negative in the first half, because channel i is paired with i + D/2.

    axes: how many frequencies turn with each axis. They run on from one axis to the next, or are the same on each (shared).
    """
    with torch.inference_mode(False):  # kept for later calls, which may train
        # How far down the exponent each frequency is, and where it would end.
        if shared:
            steps = torch.cat([torch.arange(n) for n in axes])
            end = axes[0]
        else:
            steps = torch.arange(sum(axes))
            end = sum(axes)
        f = 1.0 / theta ** (steps / end)                                                      # (D / 2,)
        axis = torch.repeat_interleave(torch.arange(len(axes)), torch.tensor(axes))           # (D / 2,)
        return axis.repeat(2).to(device), torch.cat((-f, f)).to(device)                       # 2 x (D,)


def rope_tables(positions: Tensor, axis: Tensor, frequency: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, axes) positions -> cos, sin (N, 1, D) for `ops.rope`, the sign of the rotation in sin."""
    angles = positions.index_select(1, axis).mul(frequency)[:, None]                          # (N, 1, D)
    return angles.cos().to(dtype), angles.sin().to(dtype)


class MLP(nn.Module):
    """SwiGLU (Shazeer, arXiv 2002.05202)."""

    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=bias)
        self.up_proj = nn.Linear(width, inner, bias=bias)
        self.down_proj = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(swiglu(*joint(x, self.gate_proj, self.up_proj)))                # (N, width)

    def on_stream(self, stream: Tensor, delta: Tensor, norm: nn.RMSNorm) -> Tensor:
        """The stream with delta, and with what the layer makes of the norm of their sum."""
        stream, h = add_norm_swiglu(stream, delta, norm.weight, norm.eps, self.gate_proj, self.up_proj)
        down = self.down_proj
        plain = type(down) is nn.Linear and down.bias is None
        if torch.is_grad_enabled() or not plain or h.dtype != stream.dtype:
            return stream + down(h)
        # The product adds by itself: no launch for the sum. Without gradients the stream may be overwritten.
        return stream.addmm_(h, down.weight.T)                                                # (N, width)


# --------------------------------------------------------------------------------------------------------- vision tower


@dataclass
class VisionPlan:
    """Where the patches of a list of pictures go. All of it follows from the grids."""

    order: Tensor  # (U,) merge unit at each place of the windowed order
    back: Tensor  # (U,) its inverse
    positions: Tensor  # (P, 2) row and column of each patch, in windowed order
    windows: Segments  # in patches
    images: Segments


@lru_cache(maxsize=256)
def picture_plan(rows: int, columns: int, merge: int, window: int) -> tuple[Tensor, Tensor, list[int]]:
    """Of a picture: merge units in windowed order (U,), row and column of its patches in that order (P, 2), patches of windows.

    Windows tile the picture; those at the right and lower edge are smaller. They are sorted by size: where PyTorch computes,
    equal neighbours are one dense batch.
    """
    if rows < merge or columns < merge or rows % merge or columns % merge:
        raise InputError(f"a picture of {rows}x{columns} patches does not divide into {merge}x{merge} merge units")
    h = rows // merge
    w = columns // merge

    # Windows are numbered in raster order. Sorting puts the largest first, which are the whole ones.
    i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    windows_across = math.ceil(w / window)
    of_unit = ((i // window) * windows_across + j // window).flatten()                        # (U,) window of each unit
    sizes, by_size = of_unit.bincount().sort(descending=True, stable=True)
    place = by_size.argsort()                                                                 # (windows,) inverse of by_size

    # Units in the order of their windows; stable, so in raster order within one.
    units = place[of_unit].argsort(stable=True)                                               # (U,)

    # A patch stands at its unit's corner and then one of merge x merge steps from it.
    corner = torch.stack((i.flatten(), j.flatten()), 1)[units] * merge                        # (U, 2)
    inside = torch.cartesian_prod(torch.arange(merge), torch.arange(merge))                   # (merge^2, 2)
    positions = (corner[:, None] + inside).flatten(0, 1)                                      # (P, 2)
    return units, positions, (sizes * merge**2).tolist()


@lru_cache(maxsize=64)
def vision_plan(grids: tuple[tuple[int, int], ...], merge: int, window: int, device: torch.device) -> VisionPlan:
    """grids: (rows, columns) in patches; window: merge units along a window's side.

    Patches come in merge units of merge x merge, raster order of units. Attention in a window is then attention in a run of
    neighbours, as in a packed sequence.
    """
    # Pictures of one size have one plan, which is made once: a training reads hundreds of them in a step.
    plans = [picture_plan(rows, columns, merge, window) for rows, columns in grids]
    units, positions, windows = zip(*plans, strict=True)
    counts = torch.tensor([len(u) for u in units])                                            # (pictures,)
    first = (counts.cumsum(0) - counts).repeat_interleave(counts)                             # (U,) of the unit's picture
    index = torch.cat(units) + first                                                          # (U,)
    images = [rows * columns for rows, columns in grids]
    with torch.inference_mode(False):  # kept for later calls, which may train
        return VisionPlan(
            order=index.to(device, copy=True),
            back=index.argsort().to(device, copy=True),
            positions=torch.cat(positions).to(device, copy=True),
            windows=Segments([n for sizes in windows for n in sizes], device),
            images=Segments(images, device),
        )


class VisionAttention(nn.Module):
    """Every patch looks at all patches of its window, or of its picture."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, segments: Segments, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(x).unflatten(1, (3 * self.heads, -1))                                  # (P, 3 * heads, head_dim)
        # Queries and keys turn alike: as one tensor they do it in one call.
        qk, v = qkv.split((2 * self.heads, self.heads), 1)
        q, k = rope(qk, cos, sin).chunk(2, 1)                                                 # (P, heads, head_dim) each
        y = attention(q, k, v, segments)                                                      # (P, heads, head_dim)
        return self.proj(y.flatten(1))                                                        # (P, width)


class VisionBlock(nn.Module):
    """Attention and MLP, each on the normed stream and added to it: the MLP's part by the next block."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, eps=1e-6)
        self.norm2 = nn.RMSNorm(c.hidden_size, eps=1e-6)
        self.attn = VisionAttention(c.hidden_size, c.num_heads)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=True)

    def forward(self, x: Tensor, delta: Tensor | None, *where) -> tuple[Tensor, Tensor | None]:
        """The stream, and what is still to be added to it: the sum and the norm that reads it are one pass over memory."""
        if delta is None:
            h = rms_norm(x, self.norm1.weight, self.norm1.eps)
        else:
            x, h = add_rms_norm(x, delta, self.norm1.weight, self.norm1.eps)                  # (P, width) each
        x, h = add_rms_norm(x, self.attn(h, *where), self.norm2.weight, self.norm2.eps)       # (P, width) each
        y = self.mlp(h)                                                                       # (P, width)
        # Where gradients need the stream alone, nothing is left to be added: a checkpoint would keep both.
        return (x + y, None) if torch.is_grad_enabled() else (x, y)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel: one matrix product over flattened patches."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        kernel = (c.temporal_patch_size, c.patch_size, c.patch_size)
        self.proj = nn.Conv3d(c.in_channels, c.hidden_size, kernel, kernel, bias=False)       # holds the published shape

    def forward(self, patches: Tensor) -> Tensor:
        weight = self.proj.weight.flatten(1)                                                  # (width, C * T * p * p)
        x = F.linear(patches.to(weight.dtype), weight)                                        # (P, width)
        # Autocast gives 16 bits; the stream stays in the dtype of the weights.
        return x.to(weight.dtype)


class PatchMerger(nn.Module):
    """The 2 x 2 patches of a merge unit become one token of the decoder's width."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.unit = c.spatial_merge_size**2
        self.ln_q = nn.RMSNorm(c.hidden_size, eps=1e-6)
        inner = c.hidden_size * self.unit
        self.mlp = nn.Sequential(nn.Linear(inner, inner), nn.GELU(), nn.Linear(inner, c.out_hidden_size))

    def forward(self, x: Tensor, delta: Tensor | None) -> Tensor:
        if delta is None:
            h = rms_norm(x, self.ln_q.weight, self.ln_q.eps)                                  # (P, width)
        else:
            _, h = add_rms_norm(x, delta, self.ln_q.weight, self.ln_q.eps)                    # (P, width)
        units = rearrange(h, "(unit patch) d -> unit (patch d)", patch=self.unit)             # (P / 4, 4 * width)
        return self.mlp(units)                                                                # (P / 4, H)


class VisionTower(nn.Module):
    """Patches of any number of pictures -> one vector per merge unit, in raster order, pictures behind each other."""

    def __init__(self, c: VisionConfig):
        super().__init__()
        self.config = c
        self.patch_embed = PatchEmbed(c)
        self.blocks = nn.ModuleList(VisionBlock(c) for _ in range(c.depth))
        self.merger = PatchMerger(c)
        self.gradient_checkpointing = False

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """pixels (P, C * T * p * p) in merge-unit order; grids: patches (rows, columns) of each picture."""
        c = self.config
        merge = c.spatial_merge_size
        window = c.window_size // merge // c.patch_size
        plan = vision_plan(tuple(map(tuple, grids)), merge, window, pixels.device)
        if len(plan.positions) != len(pixels):
            raise InputError(f"{len(pixels)} patches do not fill the pictures' grids {grids}")

        # Bring the units of each window together: from here on a window is a run of neighbours.
        x = self.patch_embed(pixels)                                                          # (P, width)
        x = rearrange(x, "(unit patch) d -> unit patch d", patch=merge**2)
        x = x.index_select(0, plan.order)
        x = rearrange(x, "unit patch d -> (unit patch) d")                                    # (P, width)

        # Half of a head's pairs turn with the row, half with the column, both from fast to slow.
        quarter = c.hidden_size // c.num_heads // 4
        turns = frequencies((quarter, quarter), True, 10000.0, x.device)
        cos, sin = rope_tables(plan.positions, *turns, torch.float32)                         # (P, 1, head_dim)
        delta = None  # what the last block has still to add to the stream
        for i, block in enumerate(self.blocks):
            segments = plan.images if i in c.fullatt_block_indexes else plan.windows
            x, delta = maybe_checkpoint(self, block, x, delta, segments, cos, sin)            # (P, width) each

        # The decoder reads a picture row by row.
        return self.merger(x, delta).index_select(0, plan.back)                                      # (P / 4, H)


# -------------------------------------------------------------------------------------------------------------- decoder


class KVCache:
    """Rotated keys and values of growing documents, all of one capacity, allocated once and never moved.

    `MLLM.forward` appends any number of tokens to one document, `MLLM.decode` one to each. Both sides know the lengths: the
    host in `counts`, the device in `lengths`, so that decoding reads nothing back. For sampling: no gradients.

    k, v (layers, documents * rows, KV heads, head_dim), with one row more than `capacity` for each document: there a full one
    writes while others decode.
    """

    def __init__(self, config: MLLMConfig, capacity: int, dtype=torch.float32, device="cpu", documents: int = 1):
        self.capacity = capacity
        self.rows = capacity + 1
        self.counts = [0] * documents
        heads = config.num_key_value_heads
        shape = (config.num_hidden_layers, documents * self.rows, heads, config.head_dim)
        self.k = torch.empty(shape, dtype=dtype, device=device)
        self.v = torch.empty(shape, dtype=dtype, device=device)
        self.lengths = torch.zeros(documents, dtype=torch.int32, device=device)
        # 0 where the next step leaves no trace; the host remembers what it last told the device.
        self.growing = torch.ones_like(self.lengths)
        self._growing = [1] * documents
        self.first = torch.arange(documents, device=device) * self.rows  # row where each document begins
        # What a decoding step asks attention for never changes: one query per document, and all rows set aside for it.
        self.queries = Segments([1] * documents, device)
        self.buffers = Segments([self.rows] * documents, device)

    @property
    def length(self) -> int:
        """Tokens of the first document, for a cache that has only one. Set it back to forget those behind."""
        return self.counts[0]

    @length.setter
    def length(self, n: int) -> None:
        self.truncate(0, n)

    def truncate(self, document: int, length: int) -> None:
        """Only the first `length` tokens of a document count; 0 makes room for another document."""
        self.counts[document] = length
        self.lengths[document] = length

    def advance(self, documents: Sequence[int]) -> None:
        """The host's part of a decoding step, before it: these documents grow by a token, the others wait."""
        self._reserve(documents, 1)
        growing = [int(d in documents) for d in range(len(self.counts))]
        # Mostly the same documents grow as the step before: then nothing is copied.
        if growing != self._growing:
            self.growing.copy_(torch.tensor(growing, dtype=torch.int32))
            self._growing = growing

    def append(self, document: int, n: int) -> "Rows":
        """Room for n tokens behind those of a document."""
        start = self.counts[document]
        self._reserve([document], n)
        self.lengths[document] = start + n
        # A pass over one document sees that document's rows alone, up to the last new one; slots count from its first.
        base = document * self.rows
        end = base + start + n
        slots = torch.arange(start, start + n, device=self.lengths.device)
        keys = Segments([start + n], slots.device)
        return Rows(self.k[:, base:end], self.v[:, base:end], slots, keys, None)

    def _reserve(self, documents: Sequence[int], n: int) -> None:
        # All or none: after an error no document has grown.
        if any(self.counts[d] + n > self.capacity for d in documents):
            raise InputError(f"the document outgrows the {self.capacity} tokens set aside for it: raise the limit or ask less")
        for d in documents:
            self.counts[d] += n


class Rows(NamedTuple):
    """What one pass uses of a KVCache."""

    k: Tensor  # (layers, rows, KV heads, head_dim)
    v: Tensor
    slots: Tensor  # (N,) int64 on the device: the row of each new token
    keys: Segments  # the rows that are read
    lengths: Tensor | None  # (documents,) int32 on the device: how many of each segment count, None: all


class Attention(nn.Module):
    """Every token looks at itself and at what stands before it; several query heads share a head of keys and values (GQA)."""

    def __init__(self, c: MLLMConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads = c.num_attention_heads
        self.kv_heads = c.num_key_value_heads
        self.head_dim = c.head_dim
        width = self.heads * self.head_dim
        kv_width = self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(c.hidden_size, width)
        self.k_proj = nn.Linear(c.hidden_size, kv_width)
        self.v_proj = nn.Linear(c.hidden_size, kv_width)
        self.o_proj = nn.Linear(width, c.hidden_size, bias=False)

    def forward(self, x: Tensor, segments: Segments, cos: Tensor, sin: Tensor, rows: Rows | None = None) -> Tensor:
        parts = joint(x, self.q_proj, self.k_proj, self.v_proj)
        if rows is None:
            # Without a cache: queries and keys turn in one call.
            if len(parts) == 1:
                kv_width = self.kv_heads * self.head_dim
                qk, v = parts[0].split((self.heads * self.head_dim + kv_width, kv_width), 1)
            else:
                qk = torch.cat(parts[:2], 1)
                v = parts[2]
            qk = qk.unflatten(1, (-1, self.head_dim))                                         # (N, heads + KV heads, head_dim)
            v = v.unflatten(1, (-1, self.head_dim))                                           # (N, KV heads, head_dim)
            q, k = rope(qk, cos, sin).split((self.heads, self.kv_heads), 1)                   # (N, heads, head_dim) each
            y = attention(q, k, v, segments, causal=True)                                     # (N, heads, head_dim)
        else:
            # With one: turned keys and values go into their rows, and queries look at all rows of their document.
            k = rows.k[self.layer]                                                            # (rows, KV heads, head_dim)
            v = rows.v[self.layer]                                                            # (rows, KV heads, head_dim)
            qkv = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            q = rope_append(qkv, cos, sin, k, v, rows.slots, self.heads)                      # (N, heads, head_dim)
            y = attention(q, k, v, segments, rows.keys, causal=True, k_lengths=rows.lengths)
        return self.o_proj(y.flatten(1))                                                      # (N, H)


class Layer(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    def __init__(self, c: MLLMConfig, layer: int):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.mlp = MLP(c.hidden_size, c.intermediate_size, bias=False)

    def forward(self, x: Tensor, *where) -> Tensor:
        norm = self.input_layernorm
        h = rms_norm(x, norm.weight, norm.eps)                                                # (N, H)
        return self.mlp.on_stream(x, self.self_attn(h, *where), self.post_attention_layernorm)  # (N, H)


def maybe_checkpoint(owner: nn.Module, block: nn.Module, *inputs):
    """block(*inputs); where its owner asks for it, the backward pass recomputes the inside instead of finding it in memory."""
    if owner.gradient_checkpointing and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)


class MLLM(nn.Module):
    """The whole model. `gradient_checkpointing` (set_checkpointing) trades a second forward pass for activation memory."""

    LORA = r"model\.language_model\.layers\.\d+\.(self_attn|mlp)\.[a-z]+_proj"  # see lora.py
    LORA_PREFIX = {"model.": "model.language_model.", "visual.": "model.visual."}
    LORA_WHOLE = ()

    def __init__(self, config: MLLMConfig):
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision)
        self.model = nn.Module()
        # Not drawn at random, as nn.Embedding would: on the meta device that alone imports torch._dynamo, which takes seconds.
        rows = torch.empty(config.vocab_size, config.hidden_size)
        self.model.embed_tokens = nn.Embedding.from_pretrained(rows, freeze=False)
        self.model.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.model.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Tied: one matrix under two names, of which a file holds the second.
        self.tied = {}
        if config.tie_word_embeddings:
            self.tied["lm_head.weight"] = "model.embed_tokens.weight"
            self.lm_head.weight = self.model.embed_tokens.weight
        self.gradient_checkpointing = False

    @classmethod
    def from_config(cls, config: MLLMConfig) -> "MLLM":
        return cls(config).initialise()

    @classmethod
    def from_pretrained(cls, source, subfolder=None, revision=None, dtype=torch.float32, device="cpu") -> "MLLM":
        folder = resolve(source, subfolder, revision)
        path = folder / "config.json"
        config = MLLMConfig.from_json(read_json(path), path)
        # On the meta device a model has shapes and no memory: the weights that are read take their places.
        with torch.device("meta"):
            mllm = cls(config)
        return lora.load(mllm, folder, "mllm", rename=published_name, dtype=dtype, device=device)

    def save_pretrained(self, folder: str | Path, dtype: torch.dtype | None = None, **options) -> None:
        """Weights, config.json and generation_config.json; dtype: that of the file, the parameters' own by default."""
        tensors = {}
        for name, tensor in self.state_dict().items():
            if name not in self.tied:
                tensors[name] = tensor if dtype is None else tensor.to(dtype)
        first = next(iter(tensors.values()))
        kind = str(first.dtype).removeprefix("torch.")
        save_weights(tensors, folder, self.config.to_json() | {"torch_dtype": kind}, **options)

        # transformers' generate() learns from a file of its own where to stop.
        c = self.config
        generation = {
            "bos_token_id": c.pad_token_id,
            "pad_token_id": c.pad_token_id,
            "eos_token_id": [c.eos_token_id, c.pad_token_id],
            "do_sample": False,
        }
        write_json(Path(folder) / "generation_config.json", generation)

    def initialise(self) -> "MLLM":
        """Fresh weights: matrices normal with variance 1 / inputs, and in what a block adds to the residual stream smaller by
        sqrt(2 * layers), so that the stream keeps its size with depth (Radford et al., GPT-2); norms 1, biases 0.

        Untied embeddings have unit variance: the stream then carries every word through all layers. With the customary 0.02
        the hidden states of "red" and "blue" differed by 0.4 % of their energy, and a DiT that reads them learned no colours.
        """
        depth = {"visual": self.config.vision.depth, "model": self.config.num_hidden_layers}
        for name, p in self.named_parameters():
            if p.ndim == 1:
                is_gain = name.endswith("weight") and ("norm" in name or "ln_q" in name)
                nn.init.constant_(p, float(is_gain))
            elif name == "model.embed_tokens.weight":
                nn.init.normal_(p, std=0.02 if self.config.tie_word_embeddings else 1.0)
            elif name == "lm_head.weight":
                # Small logits: the first loss is that of a guess, ln(vocabulary).
                nn.init.normal_(p, std=0.02)
            else:
                terms = p[0].numel()
                # A layer adds to the stream twice: 2 * depth sums of equal variance.
                if name.endswith(("o_proj.weight", "attn.proj.weight", "down_proj.weight")):
                    half = name.split(".")[0]
                    terms = terms * 2 * depth[half]
                nn.init.normal_(p, std=terms**-0.5)
        return self

    def fuse_for_inference(self) -> "MLLM":
        """Projections that read the same input become one product where no gradient is asked for. Repeat it after `.to`."""
        for module in self.modules():
            if isinstance(module, MLP):
                join(module.gate_proj, module.up_proj)
            elif isinstance(module, Attention):
                join(module.q_proj, module.k_proj, module.v_proj)
        return self

    def set_checkpointing(self, on: bool = True) -> None:
        self.gradient_checkpointing = self.visual.gradient_checkpointing = on

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        segments: Segments | Tensor,
        pixels: Tensor | None = None,
        grids: list[tuple[int, int]] | None = None,
        cache: KVCache | None = None,
        document: int = 0,
    ) -> list[Tensor]:
        """Hidden states (N, H) behind every layer; the last one after the final norm, the others as they are.

        ids (N,); positions (3, N) from `mrope_positions`; segments: the documents, as Segments or as boundaries (S + 1,), which
        are read back. pixels (P, C*T*p*p) and grids (rows, columns) in patches: the pictures in reading order, whose vectors
        replace the <|image_pad|> embeddings. With a cache, ids continue one of its documents, and are appended to it.
        """
        segments = Segments.of(segments, ids.device)
        if cache is not None and len(segments) != 1:
            raise InputError(f"a pass appends to one document of a cache, not to {len(segments)}")
        x = self.model.embed_tokens(ids)                                                      # (N, H)
        # A single token is one the model wrote: no picture, and no need to wait for the device to say so.
        if pixels is not None or len(ids) > 1:
            x = self._insert(x, ids, pixels, grids)
        rows = None
        if cache is not None:
            rows = cache.append(document, len(ids))
        return self._layers(x, positions, segments, rows)

    def decode(self, ids: Tensor, positions: Tensor, cache: KVCache) -> list[Tensor]:
        """One text token more in every document of the cache: hidden states (documents, H) as `forward` gives them.

            cache.advance([0, 2])                           # host: who grows; the others' rows of the result mean nothing
            hidden = mllm.decode(ids, positions, cache)     # device alone; may be the replay of a CUDA graph
            logits = mllm.logits(hidden[-1])

        ids, positions (documents,) int64. Everything that changes from step to step is read from these two and from the cache's
        tensors, on the device; shapes and addresses stay, so a graph of one call serves for all. No gradients.
        """
        # Every document writes behind its last row. Who does not grow writes where the next token will overwrite it.
        lengths = cache.lengths + 1
        slots = cache.first + cache.lengths
        rows = Rows(cache.k, cache.v, slots, cache.buffers, lengths)
        x = self.model.embed_tokens(ids)                                                      # (documents, H)
        # Text has the same position in time, row and column.
        hidden = self._layers(x, positions.expand(3, -1), cache.queries, rows)
        cache.lengths += cache.growing
        return hidden

    def _layers(self, x: Tensor, positions: Tensor, segments: Segments, rows: Rows | None) -> list[Tensor]:
        turns = frequencies(tuple(self.config.mrope_section), False, self.config.rope_theta, x.device)
        cos, sin = rope_tables(positions.T, *turns, x.dtype)                                  # (N, 1, head_dim)
        hidden = []
        for layer in self.model.layers:
            x = maybe_checkpoint(self, layer, x, segments, cos, sin, rows)                    # (N, H)
            hidden.append(x)
        # Only the last one is normed, as the logits need it; the connector norms all of them its own way.
        hidden[-1] = rms_norm(x, self.model.norm.weight, self.model.norm.eps)
        return hidden

    def _insert(self, x: Tensor, ids: Tensor, pixels: Tensor | None, grids: list[tuple[int, int]] | None) -> Tensor:
        """The embeddings (N, H) with the pictures' vectors, in reading order, in the places of <|image_pad|>."""
        slots = (ids == self.config.image_token_id).nonzero()[:, 0]                           # (M,)
        pictures = None
        found = 0
        if pixels is not None:
            pictures = self.visual(pixels, grids)                                             # (M, H)
            found = len(pictures)
        if len(slots) != found:
            raise InputError(f"{len(slots)} <|image_pad|> tokens, but the pictures give {found} vectors: do ids and grids fit?")
        if pictures is None:
            return x
        return x.index_copy(0, slots, pictures.to(x.dtype))                                   # (N, H)

    def logits(self, hidden: Tensor) -> Tensor:
        """(N, H) normed last hidden states -> (N, vocab_size). Rows behind the tokenizer's vocabulary are no tokens."""
        return self.lm_head(hidden)


def published_name(name: str) -> str:
    """A tensor's name in a file -> its published name: some files use those that transformers 5 has in memory."""
    prefixes = {"model.visual.": "visual.", "model.language_model.": "model."}
    for memory, published in prefixes.items():
        if name.startswith(memory):
            return published + name.removeprefix(memory)
    return name


def mrope_positions(ids: Tensor | list[int], merged_grids: list[tuple[int, int]], image_pad_id: int) -> tuple[Tensor, int]:
    """Positions (3, N) of one document in time, row and column, and the position of what comes next.

    Text counts on, the same in all three. A picture of h x w tokens that starts at s stands at time s, rows s .. s+h-1 and
    columns s .. s+w-1, and the text behind it goes on at s + max(h, w) (M-RoPE; Wang et al., arXiv 2409.12191).
    """
    ids = torch.as_tensor(ids)
    pads = (ids == image_pad_id).nonzero()[:, 0].tolist()
    parts = []
    at = 0  # tokens that have a position
    position = 0  # of the next one
    used = 0  # pads that are accounted for
    for h, w in merged_grids:
        # The picture's pads must be there, and one behind the other: the last is h * w - 1 behind the first.
        start = pads[used] if used < len(pads) else -1
        last = start + h * w - 1
        if start < 0 or pads[used + h * w - 1 : used + h * w] != [last]:
            raise InputError(f"the ids do not hold the {h * w} <|image_pad|> tokens of a {h}x{w} picture: is the document cut?")

        # The text before it.
        parts.append((torch.arange(start - at) + position).expand(3, -1))                     # (3, text)
        position += start - at

        # Its own tokens, all at one time.
        i, j = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        time = torch.zeros(h * w, dtype=torch.long)
        parts.append(torch.stack((time, i.flatten(), j.flatten())) + position)                # (3, h * w)
        position += max(h, w)
        at = last + 1
        used += h * w
    if used != len(pads):
        raise InputError(f"the ids hold {len(pads)} <|image_pad|> tokens, the pictures' sizes account for {used}")

    # The text behind the last picture.
    parts.append((torch.arange(len(ids) - at) + position).expand(3, -1))
    return torch.cat(parts, 1).to(ids.device), position + len(ids) - at                       # (3, N)


# ------------------------------------------------------------------------------------------------------------- pictures

# EXIF orientation -> what turns the stored pixels upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112  # EXIF's number for it
UNREADABLE = (OSError, SyntaxError, ValueError, IndexError, EOFError, Image.DecompressionBombError)  # Pillow on a broken file


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as upright 8-bit RGB: EXIF orientation applied, transparency on white, the first frame of several.

    16-bit values are scaled down; floating-point ones are taken as 0..1 unless some are larger. InputError if it is broken.
    """
    try:
        image.load()
        rgb = _colours(image)
    except UNREADABLE as e:
        raise InputError(f"picture {getattr(image, 'filename', '') or image}: cannot be decoded ({e}): replace it") from e
    try:
        turn = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except (OSError, SyntaxError, ValueError, TypeError, ZeroDivisionError):  # broken metadata beside a good picture
        turn = None
    return rgb if turn is None else rgb.transpose(turn)


def _colours(image: Image.Image) -> Image.Image:
    """A loaded picture of any mode as 8-bit RGB."""
    # Pillow would clip wide values at 255 instead of scaling them.
    if image.mode.startswith(("I", "F")):
        a = np.nan_to_num(np.asarray(image, np.float32))
        scale = 1
        if image.mode.startswith("I;16") or a.max() > 255:
            scale = 255 / 65535
        elif image.mode == "F" and a.max() <= 1:
            scale = 255
        a = (a * scale).clip(0, 255).round()
        return Image.fromarray(a.astype(np.uint8)).convert("RGB")

    # Pillow converts Lab by colour profiles alone.
    if image.mode == "LAB":
        lab = ImageCms.createProfile("LAB")
        srgb = ImageCms.createProfile("sRGB")
        return ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")

    # Convert alone would drop the alpha and show what lies under it.
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def smart_resize(height: int, width: int, factor: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) nearest in shape whose sides are multiples of `factor` and whose area is within the bounds."""
    if max(height, width) > 200 * min(height, width):
        raise InputError(f"a picture of {width}x{height} pixels is more than 200 times as long as it is wide: crop it")
    # round() takes halves to even, as the model was trained.
    h = round(height / factor) * factor
    w = round(width / factor) * factor
    # Outside the bounds both sides shrink or grow by one number, and are rounded to the side that is within.
    if h * w > max_pixels:
        beta = math.sqrt(height * width / max_pixels)
        h = max(factor, math.floor(height / beta / factor) * factor)
        w = max(factor, math.floor(width / beta / factor) * factor)
    elif h * w < min_pixels:
        beta = math.sqrt(min_pixels / (height * width))
        h = math.ceil(height * beta / factor) * factor
        w = math.ceil(width * beta / factor) * factor
    return h, w


# Settings of transformers' processor that are fixed here; resample 3 is bicubic.
PROCESSING = {
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "resample": 3,
    "rescale_factor": 1 / 255,
}


@dataclass
class ImageProcessor:
    """Picture -> normalised patches. The defaults are the published preprocessor_config.json of Qwen2.5-VL."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 12845056
    image_mean: list[float] = field(default_factory=lambda: [0.48145466, 0.4578275, 0.40821073])
    image_std: list[float] = field(default_factory=lambda: [0.26862954, 0.26130258, 0.27577711])

    def __post_init__(self):
        bounds = {
            "patch_size": (1, 256),
            "temporal_patch_size": (1, 16),
            "merge_size": (1, 16),
            "min_pixels": (1, 2**24),
            "max_pixels": (1, 2**28),
            "image_mean": (-1e3, 1e3),
            "image_std": (1e-3, 1e3),
        }
        check_bounds(self, "image processor", bounds)
        if self.min_pixels > self.max_pixels:
            raise InputError(f"image processor: min_pixels {self.min_pixels:,} is more than max_pixels {self.max_pixels:,}")
        if not len(self.image_mean) == len(self.image_std) == 3:
            raise InputError("image processor: image_mean and image_std need 3 numbers each, for red, green and blue")

    @classmethod
    def from_pretrained(cls, source: str | Path, subfolder: str | None = None, revision: str | None = None) -> "ImageProcessor":
        """From preprocessor_config.json as published, or from the processor_config.json of transformers 5, which goes first."""
        folder = resolve(source, subfolder, revision)
        path = folder / "processor_config.json"
        values = None
        if path.is_file():
            values = read_json(path).get("image_processor")
        # No such file, or that of transformers 4, which has nothing about pictures in it.
        if values is None:
            path = folder / "preprocessor_config.json"
            values = read_json(path)
        if not isinstance(values, dict) or not isinstance(values.get("size"), dict | None):
            raise InputError(f"{path}: image_processor and its size must be objects {{...}}")

        # What would give other pixels, and is not done here.
        for name, needed in PROCESSING.items():
            if values.get(name, needed) != needed:
                raise InputError(f"{path}: {name} is {values[name]!r:.40}, only {needed!r} is read, as Qwen2.5-VL has it")

        # transformers 5 has the bounds in `size`; fields of our names go before them.
        size = values.get("size") or {}
        bounds = {"min_pixels": size.get("shortest_edge"), "max_pixels": size.get("longest_edge")}
        known = {}
        for name, value in (*bounds.items(), *values.items()):
            if name in cls.__dataclass_fields__ and value is not None:
                known[name] = value
        return config_from_json(cls, known, path)

    def save_pretrained(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        kind = {"image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
        write_json(Path(folder) / "preprocessor_config.json", asdict(self) | kind)

    def merged(self, grid: tuple[int, int]) -> tuple[int, int]:
        """Patches (rows, columns) -> tokens (rows, columns)."""
        return grid[0] // self.merge_size, grid[1] // self.merge_size

    def __call__(self, image: Image.Image) -> tuple[Tensor, tuple[int, int]]:
        """PIL picture -> patches (P, C * T * p * p) in merge-unit order, each (C, T, p, p) flattened, and their grid."""
        image = to_rgb(image)
        p = self.patch_size
        merge = self.merge_size
        h, w = smart_resize(image.height, image.width, p * merge, self.min_pixels, self.max_pixels)
        image = image.resize((w, h), Image.Resampling.BICUBIC)
        x = torch.from_numpy(np.array(image)).float() / 255                                   # (H, W, C)
        x = (x - torch.tensor(self.image_mean)) / torch.tensor(self.image_std)
        # Unit by unit, in each its m x n patches, in each patch T times the same p x q pixels.
        patches = repeat(
            x,
            "(i m p) (j n q) c -> (i j m n) (c t p q)",
            m=merge,
            n=merge,
            p=p,
            q=p,
            t=self.temporal_patch_size,
        )                                                                                     # (P, C * T * p * p)
        return patches, (h // p, w // p)
