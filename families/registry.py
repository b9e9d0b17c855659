"""Which class reads which config.json: what stands there under `model_type` or `_class_name` chooses.

    mllm, tokenizer, processor = load_language_model(folder)
    painter = family("dit", read_json(folder / "config.json")).Model.from_pretrained(folder)

A new family is a file beside this one, whose class answers model.LanguageModel or dit.Painter, and a line in FAMILIES.
"""

from pathlib import Path
from typing import NamedTuple

import dit
import model
import vae
from checkpoint import InputError, read_json
from families import qwen3_vl, wan
from model import ImageProcessor, LanguageModel
from tokenizer import Tokenizer


class Family(NamedTuple):
    """Classes that belong together."""

    name: str  # what config.json calls it
    Config: type
    Model: type
    Processor: type | None = None  # a language model's: picture -> patches


# The first of a part is also what a config.json without a name is read as.
FAMILIES = {
    "mllm": [
        Family("qwen2_5_vl", model.MLLMConfig, model.MLLM, model.ImageProcessor),
        Family("qwen3_vl", qwen3_vl.Qwen3VLConfig, qwen3_vl.Qwen3VL, qwen3_vl.Processor),
    ],
    "dit": [
        Family("CosmosTransformer3DModel", dit.DiTConfig, dit.DiT),
        Family("WanTransformer3DModel", wan.WanConfig, wan.Wan),
    ],
    "vae": [Family("AutoencoderKLWan", vae.VAEConfig, vae.VAE)],
}
PARTS = tuple(FAMILIES)
# Sizes that can be asked for by name, by part.
PRESETS = {
    "mllm": model.PRESETS | qwen3_vl.PRESETS,
    "dit": dit.PRESETS | wan.PRESETS,
    "vae": vae.PRESETS,
}


def family(part: str, values: dict, where: str | Path = "config.json") -> Family:
    """The family of a config.json; InputError where none here has this name."""
    key = "model_type" if part == "mllm" else "_class_name"
    known = FAMILIES[part]
    name = values.get(key, known[0].name)
    for candidate in known:
        if candidate.name == name:
            return candidate
    names = ", ".join(candidate.name for candidate in known)
    raise InputError(f"{where}: {key} is {name!r:.60}, and read are {names}")


def family_of(config) -> Family:
    """The family that a config belongs to."""
    return next(f for families in FAMILIES.values() for f in families if f.Config is type(config))


def preset(part: str, name: str):
    """The config of that name; InputError where there is none."""
    if name not in PRESETS[part]:
        raise InputError(f"{name}: no {part} of that name, there are {', '.join(PRESETS[part])}")
    return PRESETS[part][name]


def read_config(part: str, folder: Path):
    """The config of the part in `folder`, of whatever family."""
    path = folder / "config.json"
    values = read_json(path)
    return family(part, values, path).Config.from_json(values)


def load_model(part: str, folder: Path, **options):
    """The model in `folder`, of whatever family. options: of its from_pretrained."""
    path = folder / "config.json"
    return family(part, read_json(path), path).Model.from_pretrained(folder, **options)


def load_processor(folder: Path) -> ImageProcessor:
    """The processor that lies beside a language model, with the defaults of its family; tokenizer and it may also lie alone."""
    path = folder / "config.json"
    values = read_json(path) if path.is_file() else {}
    return family("mllm", values, path).Processor.from_pretrained(folder)


def load_language_model(folder: Path, **options) -> tuple[LanguageModel, Tokenizer, ImageProcessor]:
    """A language model and what lies beside it: its tokenizer, and its processor."""
    tokenizer = Tokenizer.from_pretrained(folder)
    processor = load_processor(folder)
    return load_model("mllm", folder, **options), tokenizer, processor
