"""Turn original checkpoints into the layout this repository reads: once, offline, and without running what is inside them.

    python -m tools.convert dit 81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.pt checkpoints/cosmos-2b/dit
    python -m tools.convert dit e21d2a49-4747-44c8-ba44-9f6f9243715f_ema_bf16.pt checkpoints/cosmos-14b/dit --config 14B
    python -m tools.convert vae tokenizer.pth checkpoints/cosmos-2b/vae                 (the same file as Wan2.1_VAE.pth)

NVIDIA publishes Cosmos-Predict2.5, and Wan its VAE, as pickles. A pickle is a program: loading one may run any code, and
torch's own guard refuses these files because of the TransformerEngine states among the weights. So they are read here by an
unpickler that knows tensors and nothing else. Every other object becomes an inert placeholder which carries its name and
never runs; it may stand under a key that is dropped anyway, and is refused under any other.

The result has diffusers' names, in the dtype of the original, as safetensors with a config.json. Names and shapes must be
exactly those that the network of the chosen config has.
"""

import argparse
import io
import math
import mmap
import pickle
import re
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import dit
import vae
from checkpoint import InputError, save_weights

# ------------------------------------------------------------------------------------------------- reading a torch file


class Storage(NamedTuple):
    """A block of bytes in the file, not yet read."""

    key: str
    dtype: torch.dtype
    numel: int


class Stored(NamedTuple):
    """A tensor in the file, not yet read: a view of a storage, in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Placeholder:
    """What every global becomes that is no part of a tensor. It swallows all that a pickle can do with an object."""

    origin = ""  # "module.name" in the pickle

    def __new__(cls, *args, **kwargs):
        return object.__new__(cls)

    def __init__(self, *args, **kwargs):
        pass

    def swallow(self, *args, **kwargs):
        return None

    __call__ = __setstate__ = __setitem__ = append = extend = add = swallow


def rebuild_tensor(storage, offset, shape, stride, *_):
    """Stands in for torch._utils._rebuild_tensor_v2, with its arguments checked instead of trusted."""
    if not (isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(stride, tuple)):
        raise pickle.UnpicklingError("a tensor is described in an unknown way")
    if len(shape) != len(stride) or not all(type(n) is int and n >= 0 for n in (offset, *shape, *stride)):
        raise pickle.UnpicklingError("a tensor has an impossible shape")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    if math.prod(shape) and last >= storage.numel:
        raise pickle.UnpicklingError("a tensor reaches beyond its storage")
    return Stored(storage, offset, shape, stride)


def rebuild_parameter(data, *_):
    return data


ALLOWED = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": rebuild_tensor,
    "torch._utils._rebuild_parameter": rebuild_parameter,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}


class TensorUnpickler(pickle._Unpickler):
    """Resolves no name: a global is one of ALLOWED, or a placeholder. Nothing is imported, nothing foreign is called.

    The base is the unpickler in Python, which the standard library keeps beside the one in C: one damaged byte makes that in C
    reserve gigabytes for its memo.
    """

    def __init__(self, file):
        super().__init__(file)
        self.foreign: set[str] = set()

    def find_class(self, module: str, name: str):
        origin = plain(f"{module}.{name}")
        if origin in ALLOWED:
            return ALLOWED[origin]
        self.foreign.add(origin)
        return type("Placeholder", (Placeholder,), {"origin": origin})

    def persistent_load(self, pid):
        match pid:
            case ("storage", torch.dtype() as dtype, str(key), str(), int(numel)) if numel >= 0:
                return Storage(key, dtype, numel)
        raise pickle.UnpicklingError("a storage is described in an unknown way")


# What a damaged or hostile stream of opcodes makes the unpickler stumble over.
UNREADABLE = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, ArithmeticError,
              RecursionError, MemoryError, struct.error)  # fmt: skip


class TorchFile:
    """A file of torch.save (zip format): `entries` maps keys to Stored tensors or other objects; `read` gives a tensor.

    `foreign` names what else the pickle asked for. Tensors are views of the file's memory map, so that a file larger than the
    memory can be converted.
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise InputError(f"{path}: no such file")
        with open(self.path, "rb") as file:
            if file.read(2) != b"PK":
                raise InputError(f"{path}: not in the zip format of torch.save since 1.6: a legacy file must be saved anew")
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self.members = {info.filename: info for info in archive.infolist()}
        except (zipfile.BadZipFile, ValueError, struct.error, OSError, NotImplementedError) as e:
            raise InputError(f"{path}: the file is cut off or damaged ({plain(str(e))}); fetch it again") from None
        roots = [name.removesuffix("data.pkl") for name in self.members if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise InputError(f"{path}: a zip file, but not one of torch.save (it has no data.pkl)")
        self.root = roots[0]
        order = f"{self.root}byteorder"
        if order in self.members and bytes(self._member(order)) != b"little":
            raise InputError(f"{path}: written on a big-endian machine, which is not supported")
        program = self._member(f"{self.root}data.pkl")
        try:
            unpickler = TensorUnpickler(io.BytesIO(program))
            entries = unpickler.load()
        except UNREADABLE as e:
            raise InputError(f"{path}: data.pkl is damaged or holds no weights ({plain(str(e))})") from None
        if not isinstance(entries, dict) or not all(isinstance(key, str) for key in dict.keys(entries)):
            raise InputError(f"{path}: holds {describe(entries)}, not a dictionary of named tensors")
        self.foreign = sorted(unpickler.foreign)
        self.entries = dict(dict.items(entries))  # a pickle may give its dictionary an `items` of its own

    def _member(self, name: str) -> memoryview:
        """The bytes of an uncompressed member, in place."""
        info = self.members.get(name)
        if info is None:
            raise InputError(f"{self.path}: {name} is missing from the file")
        header = self.map[info.header_offset : info.header_offset + 30]
        if info.compress_type != zipfile.ZIP_STORED or len(header) < 30 or header[:4] != b"PK\3\4":
            raise InputError(f"{self.path}: {name} is compressed or damaged; fetch the file again")
        # the local header may have a longer extra field than the directory's: torch pads there to align the data
        start = info.header_offset + 30 + sum(struct.unpack("<HH", header[26:30]))
        if start + info.file_size > len(self.map):
            raise InputError(f"{self.path}: {name} is cut off; fetch the file again")
        return memoryview(self.map)[start : start + info.file_size]

    def read(self, tensor: Stored) -> Tensor:
        (key, dtype, numel), offset, shape, stride = tensor
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        data = self._member(f"{self.root}data/{key}")
        if len(data) != numel * dtype.itemsize:
            raise InputError(f"{self.path}: data/{key} has {len(data)} bytes, {numel * dtype.itemsize} are announced")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # and nobody writes to it
            span = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
            return torch.frombuffer(data, dtype=dtype, count=span, offset=offset * dtype.itemsize).as_strided(shape, stride)


def describe(value) -> str:
    if isinstance(value, Placeholder) or (isinstance(value, type) and issubclass(value, Placeholder)):
        return f"an object of {value.origin}"
    return "a tensor" if isinstance(value, Stored) else f"a {type(value).__name__}"


def plain(text: str) -> str:
    """Text out of a file as one line that cannot command the terminal."""
    return ascii(text)[1:-1]


# ------------------------------------------------------------------------------------------------------ names, both ways

# diffusers' name, original name. "#" stands for a number, "@" for a word; those of one side return on the other in order.
COSMOS_NAMES = [
    ("patch_embed.proj.weight", "x_embedder.proj.1.weight"),
    ("time_embed.t_embedder.linear_#.weight", "t_embedder.1.linear_#.weight"),
    ("time_embed.norm.weight", "t_embedding_norm.weight"),
    ("crossattn_proj.0.@", "crossattn_proj.0.@"),
    ("norm_out.linear_#.weight", "final_layer.adaln_modulation.#.weight"),
    ("proj_out.weight", "final_layer.linear.weight"),
    ("transformer_blocks.#.norm1.linear_#.weight", "blocks.#.adaln_modulation_self_attn.#.weight"),
    ("transformer_blocks.#.norm2.linear_#.weight", "blocks.#.adaln_modulation_cross_attn.#.weight"),
    ("transformer_blocks.#.norm3.linear_#.weight", "blocks.#.adaln_modulation_mlp.#.weight"),
    ("transformer_blocks.#.ff.net.0.proj.weight", "blocks.#.mlp.layer1.weight"),
    ("transformer_blocks.#.ff.net.2.weight", "blocks.#.mlp.layer2.weight"),
]
for ours, theirs in (("attn1", "self_attn"), ("attn2", "cross_attn")):
    COSMOS_NAMES += [(f"transformer_blocks.#.{ours}.to_{x}.weight", f"blocks.#.{theirs}.{x}_proj.weight") for x in "qkv"]
    COSMOS_NAMES += [(f"transformer_blocks.#.{ours}.norm_{x}.weight", f"blocks.#.{theirs}.{x}_norm.weight") for x in "qk"]
    COSMOS_NAMES += [(f"transformer_blocks.#.{ours}.to_out.0.weight", f"blocks.#.{theirs}.output_proj.weight")]

# Buffers and counters of the training run, and the states of TransformerEngine's norms (pickled, empty for our purpose).
COSMOS_DROPPED = re.compile(
    r"(.+\.)?_extra_state"
    r"|accum_(video_sample_counter|image_sample_counter|iteration|train_in_hours)"
    r"|pos_embedder\.(seq|dim_spatial_range|dim_temporal_range)"
)

WAN_NAMES = [
    ("quant_conv.@", "conv1.@"),
    ("post_quant_conv.@", "conv2.@"),
    ("@.conv_in.@", "@.conv1.@"),
    ("@.norm_out.@", "@.head.0.@"),
    ("@.conv_out.@", "@.head.2.@"),
    ("@.mid_block.attentions.0.norm.@", "@.middle.1.norm.@"),
    ("@.mid_block.attentions.0.to_qkv.@", "@.middle.1.to_qkv.@"),
    ("@.mid_block.attentions.0.proj.@", "@.middle.1.proj.@"),
]
for ours, theirs in (
    ("@.mid_block.resnets.0", "@.middle.0"),
    ("@.mid_block.resnets.1", "@.middle.2"),
    ("encoder.down_blocks.#", "encoder.downsamples.#"),
    ("decoder.up_blocks.#", "decoder.upsamples.#"),  # numbered flat first, see wan_names
):
    WAN_NAMES += [
        (f"{ours}.norm1.@", f"{theirs}.residual.0.@"),
        (f"{ours}.conv1.@", f"{theirs}.residual.2.@"),
        (f"{ours}.norm2.@", f"{theirs}.residual.3.@"),
        (f"{ours}.conv2.@", f"{theirs}.residual.6.@"),
        (f"{ours}.conv_shortcut.@", f"{theirs}.shortcut.@"),
        (f"{ours}.resample.1.@", f"{theirs}.resample.1.@"),
        (f"{ours}.time_conv.@", f"{theirs}.time_conv.@"),
    ]


def translate(name: str, table: list[tuple[str, str]], back: bool = False) -> str:
    """A whole name through the one row of the table that fits it; `back` goes from the original name to diffusers'."""
    found = []
    for row in table:
        source, target = reversed(row) if back else row
        pattern = "".join({"#": r"(\d+)", "@": "([a-z]+)"}.get(c, re.escape(c)) for c in source)
        if match := re.fullmatch(pattern, name):
            groups = iter(match.groups())
            found.append(re.sub("[#@]", lambda _, groups=groups: next(groups), target))
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows of the table fit {name}")
    return found[0]


def cosmos_names(config: dit.DiTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Original name -> (diffusers' name, shape) of every tensor that the DiT of this size has."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in dit.DiT(config).state_dict().items()}
    return {translate(name, COSMOS_NAMES): (name, shape) for name, shape in shapes.items()}


def wan_names(config: vae.VAEConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for the VAE, with the time_conv tensors, which no still image meets but other programs expect."""
    shapes, unused = vae.published_shapes(config)
    per_block = config.num_res_blocks + 2  # residual blocks and the resampling layer of one resolution of the decoder

    def flat(match: re.Match) -> str:
        within = int(match[3]) if match[2] == "resnets" else per_block - 1
        return f"decoder.up_blocks.{int(match[1]) * per_block + within}."

    return {
        translate(re.sub(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", flat, name), WAN_NAMES): (name, shape)
        for name, shape in (shapes | unused).items()
    }


# ------------------------------------------------------------------------------------------------------------ conversion


def convert(
    file: TorchFile,
    names: dict[str, tuple[str, tuple[int, ...]]],
    prefix: str = "",
    other: str | None = None,
    dropped: re.Pattern | None = None,
) -> dict[str, Tensor]:
    """Diffusers' name -> tensor, for exactly the names asked for.

    names: original name without `prefix` -> (diffusers' name, shape). Keys that start with `other` are a second copy of the
    network and are passed over; those that `dropped` matches are left out.
    """
    wanted: dict[str, Stored] = {}
    left: list[str] = []
    for key, value in file.entries.items():
        if other is not None and key.startswith(other):
            continue
        bare = key.removeprefix(prefix)
        if dropped and dropped.fullmatch(bare):
            left.append(plain(key))
            continue
        shown = f"{file.path}: key {plain(key)}"
        if not key.startswith(prefix) or bare not in names:
            raise InputError(f"{shown} ({describe(value)}) has no place in this network; see --config")
        if not isinstance(value, Stored):
            raise InputError(f"{shown} is {describe(value)}, not a tensor; it was not run")
        name, shape = names[bare]
        if value.shape != shape:
            raise InputError(f"{shown} has shape {value.shape}, the config asks for {shape}; see --config")
        if not value.storage.dtype.is_floating_point:
            raise InputError(f"{shown} is of {value.storage.dtype}, which no weight is")
        wanted[name] = value
    missing = [original for original, (name, _) in names.items() if name not in wanted]
    if missing:
        raise InputError(f"{file.path}: {len(missing)} of {len(names)} tensors are missing, the first is {prefix}{missing[0]}")
    tensors, used = {}, set()
    for name, stored in wanted.items():
        tensor = file.read(stored).contiguous()
        # safetensors takes no two tensors of one storage: all but the first get memory of their own
        tensors[name] = tensor.clone() if stored.storage.key in used else tensor
        used.add(stored.storage.key)
    count = sum(t.numel() for t in tensors.values())
    print(f"{len(tensors)}/{len(names)} tensors, {count:,} parameters from {file.path}")
    if left:
        print(f"left out on purpose, {len(left)} entries: {', '.join(left[:3])}{', ...' if len(left) > 3 else ''}")
    if file.foreign:
        print(f"named in the pickle, not run: {', '.join(file.foreign)}")
    return tensors


def convert_dit(source: Path, folder: Path, config: dit.DiTConfig, live: bool = False) -> None:
    """A training checkpoint has live weights, `net.`, and their average, `net_ema.`; a published one the average as `net.`."""
    file = TorchFile(source)
    averaged = any(key.startswith("net_ema.") for key in file.entries)
    prefix, other = ("net_ema.", "net.") if averaged and not live else ("net.", "net_ema.")
    print(f"reading {prefix}*" + (f", passing over {other}*" if averaged else ""))
    tensors = convert(file, cosmos_names(config), prefix, other, COSMOS_DROPPED)
    save_weights(tensors, folder, config.to_json(), stem="diffusion_pytorch_model")


def convert_vae(source: Path, folder: Path, config: vae.VAEConfig) -> None:
    tensors = convert(TorchFile(source), wan_names(config))
    save_weights(tensors, folder, config.to_json(), stem="diffusion_pytorch_model")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m tools.convert", description=__doc__.splitlines()[0], allow_abbrev=False)
    parts = parser.add_subparsers(dest="part", required=True)
    for part, presets, default in (("dit", dit.PRESETS, "2B"), ("vae", vae.PRESETS, "wan2.1")):
        command = parts.add_parser(part, allow_abbrev=False)
        command.add_argument("source", type=Path, metavar="IN", help="the original .pt or .pth file")
        command.add_argument("folder", type=Path, metavar="OUT", help="folder to write, made if it does not exist")
        command.add_argument("--config", choices=list(presets), default=default, help=f"size of the network ({default})")
    parts.choices["dit"].add_argument("--live", action="store_true", help="the live weights, although averaged ones are there")
    args = parser.parse_args(argv)
    try:
        if args.part == "dit":
            convert_dit(args.source, args.folder, dit.PRESETS[args.config], args.live)
        else:
            convert_vae(args.source, args.folder, vae.PRESETS[args.config])
        print(f"wrote {args.folder}")
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
