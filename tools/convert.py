"""Turn original checkpoints into the layout this repository reads: once, offline, and without running what is inside them.

    python -m tools.convert dit 81edfebe-bd6a-4039-8c1d-737df1a790bf_ema_bf16.pt checkpoints/cosmos-2b/dit
    python -m tools.convert dit e21d2a49-4747-44c8-ba44-9f6f9243715f_ema_bf16.pt checkpoints/cosmos-14b/dit --config 14B
    python -m tools.convert vae tokenizer.pth checkpoints/cosmos-2b/vae                 (the same file as Wan2.1_VAE.pth)

NVIDIA publishes Cosmos-Predict2.5, and Wan its VAE, as pickles. A pickle is a program: loading one may run any code. So they
are read by torch's own unpickler with `weights_only=True`. It knows tensors, plain containers and what SAFE lists: the buffers
in which TransformerEngine leaves its states among NVIDIA's weights. Tensors are views of the file's memory map, so that a file
larger than the memory can be converted.

A file that names anything else is refused as a whole, even where that stands under a key which would be dropped. So is one
in a pickle protocol above 2, which torch.save does not write by itself. A storage that claims more bytes than its member of the
file has is not noticed: it goes on with what follows in the file, never with anything outside of it.

The result has diffusers' names, in the dtype of the original, as safetensors with a config.json. Names and shapes must be
exactly those that the network of the chosen config has.
"""

import argparse
import io
import re
import sys
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

import dit
import vae
from checkpoint import InputError, save_weights

# ------------------------------------------------------------------------------------------------- reading a torch file

# What a file may hold beside tensors. Whatever is added here, a stranger's file can call.
SAFE = [io.BytesIO]


def read_original(path: Path) -> dict[str, object]:
    """Key -> tensor, or what else weights_only lets through."""
    check_archive(path)
    with safe_globals(SAFE), warnings.catch_warnings():
        # torch warns of a protocol it may not know, and fails where it does not
        warnings.simplefilter("ignore")
        try:
            foreign = get_unsafe_globals_in_checkpoint(str(path))
            entries = {}
            # Only when nothing foreign is named: what is not loaded cannot act.
            if not foreign:
                entries = torch.load(str(path), "cpu", weights_only=True, mmap=True)
        # one wrong byte makes an unpickler stumble over anything: no list of errors is complete
        except Exception as e:
            raise InputError(f"{path}: no sound file of torch.save ({first_line(e)}); fetch it again") from None
    if foreign:
        names = ", ".join(plain(name) for name in sorted(foreign))
        raise InputError(f"{path}: its pickle asks for {names}, which is no part of a tensor; nothing of it was run")
    if not isinstance(entries, dict) or not all(isinstance(key, str) for key in dict.keys(entries)):
        raise InputError(f"{path}: holds {describe(entries)}, not a dictionary of named tensors")
    # a pickle may give its dictionary an `items` of its own
    return dict(dict.items(entries))


def check_archive(path: Path) -> None:
    """What torch would report in many lines, or take in silence."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    with open(path, "rb") as file:
        if file.read(2) != b"PK":
            raise InputError(f"{path}: not in the zip format of torch.save since 1.6: a legacy file must be saved anew")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    # the header of a member is as easily damaged as that of the archive
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as e:
        raise InputError(f"{path}: the file is cut off or damaged ({first_line(e)}); fetch it again") from None
    for member in members:
        # mapped into memory, compressed bytes would be taken for weights
        if member.compress_type != zipfile.ZIP_STORED:
            raise InputError(f"{path}: {plain(member.filename)} is compressed, which torch.save never does; fetch it again")


def first_line(error: Exception) -> str:
    """What is wrong, without torch's advice to load the file unsafely."""
    text = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    return plain((text or type(error).__name__).splitlines()[0])


def is_weight(value) -> bool:
    """Whether the bytes of a tensor are all there: weights_only also lets through sparse tensors and those without data."""
    kind = type(value) in (Tensor, torch.nn.Parameter)
    return kind and value.layout == torch.strided and value.device.type == "cpu"


def describe(value) -> str:
    return "a tensor" if is_weight(value) else f"a {plain(type(value).__name__)}"


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
    wildcards = {"#": r"(\d+)", "@": "([a-z]+)"}
    found = []
    for row in table:
        source, target = reversed(row) if back else row
        # A row becomes a pattern in which all but the wildcards stands for itself.
        pattern = "".join(wildcards.get(c, re.escape(c)) for c in source)
        if match := re.fullmatch(pattern, name):
            found.append(filled(target, match.groups()))
    # Two rows that fit would be two names for one tensor: an error of the table.
    if len(found) != 1:
        raise LookupError(f"{len(found)} rows of the table fit {name}")
    return found[0]


def filled(target: str, words: tuple[str, ...]) -> str:
    """A name of the table with these words in place of its wildcards, one after the other."""
    pieces = re.split("[#@]", target)
    name = pieces[0]
    for word, piece in zip(words, pieces[1:], strict=True):
        name += word + piece
    return name


def cosmos_names(config: dit.DiTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Original name -> (diffusers' name, shape) of every tensor that the DiT of this size has."""
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in dit.DiT(config).state_dict().items()}
    return {translate(name, COSMOS_NAMES): (name, shape) for name, shape in shapes.items()}


def wan_names(config: vae.VAEConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The same for the VAE, with the time_conv tensors, which no still image meets but other programs expect."""
    shapes, unused = vae.published_shapes(config)
    per_block = config.num_res_blocks + 2  # residual blocks and the resampling layer of one resolution of the decoder

    # Wan numbers all layers of the decoder in one list, diffusers those of each resolution by themselves; the resampling layer
    # is the last of its resolution.
    def flat(match: re.Match) -> str:
        within = int(match[3]) if match[2] == "resnets" else per_block - 1
        return f"decoder.up_blocks.{int(match[1]) * per_block + within}."

    layer = re.compile(r"^decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.")
    names = {}
    for name, shape in (shapes | unused).items():
        original = translate(layer.sub(flat, name), WAN_NAMES)
        names[original] = (name, shape)
    return names


# ------------------------------------------------------------------------------------------------------------ conversion


def convert(
    path: Path,
    entries: dict[str, object],
    names: dict[str, tuple[str, tuple[int, ...]]],
    prefix: str = "",
    other: str | None = None,
    dropped: re.Pattern | None = None,
) -> dict[str, Tensor]:
    """Diffusers' name -> tensor, for exactly the names asked for.

    names: original name without `prefix` -> (diffusers' name, shape). Keys that start with `other` are a second copy of the
    network and are passed over; those that `dropped` matches are left out.
    """
    wanted: dict[str, Tensor] = {}
    left: list[str] = []
    for key, value in entries.items():
        if other is not None and key.startswith(other):
            continue
        bare = key.removeprefix(prefix)
        if dropped and dropped.fullmatch(bare):
            left.append(plain(key))
            continue
        shown = f"{path}: key {plain(key)}"
        if not key.startswith(prefix) or bare not in names:
            raise InputError(f"{shown} ({describe(value)}) has no place in this network; see --config")
        if not is_weight(value):
            raise InputError(f"{shown} is {describe(value)}, not a tensor")
        name, shape = names[bare]
        if value.shape != shape:
            raise InputError(f"{shown} has shape {tuple(value.shape)}, the config asks for {shape}; see --config")
        if not value.dtype.is_floating_point:
            raise InputError(f"{shown} is of {value.dtype}, which no weight is")
        wanted[name] = value.detach()
    missing = [original for original, (name, _) in names.items() if name not in wanted]
    if missing:
        raise InputError(f"{path}: {len(missing)} of {len(names)} tensors are missing, the first is {prefix}{missing[0]}")
    count = sum(t.numel() for t in wanted.values())
    print(f"{len(wanted)}/{len(names)} tensors, {count:,} parameters from {path}")
    if left:
        shown = ", ".join(left[:3])
        if len(left) > 3:
            shown += ", ..."
        print(f"left out on purpose, {len(left)} entries: {shown}")
    return apart(wanted)


def apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors as safetensors takes them: contiguous, no two in one storage."""
    # Slices of one buffer, as of a joint projection: each would be written with all of the buffer.
    used = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        storage = tensor.untyped_storage().data_ptr()
        result[name] = tensor.clone() if storage in used else tensor
        used.add(storage)
    return result


def convert_dit(source: Path, folder: Path, config: dit.DiTConfig, live: bool = False) -> None:
    """A training checkpoint has live weights, `net.`, and their average, `net_ema.`; a published one the average as `net.`."""
    entries = read_original(source)
    averaged = any(key.startswith("net_ema.") for key in entries)
    # The average is what paints best, and what the published files hold.
    prefix = "net."
    other = "net_ema."
    if averaged and not live:
        prefix = "net_ema."
        other = "net."
    passing = f", passing over {other}*" if averaged else ""
    print(f"reading {prefix}*{passing}")
    tensors = convert(source, entries, cosmos_names(config), prefix, other, COSMOS_DROPPED)
    save_weights(tensors, folder, config.to_json(), stem="diffusion_pytorch_model")


def convert_vae(source: Path, folder: Path, config: vae.VAEConfig) -> None:
    tensors = convert(source, read_original(source), wan_names(config))
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
