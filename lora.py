"""LoRA (Hu et al., arXiv 2106.09685): beside a frozen matrix W two thin ones are trained, and y = W x + scale * B (A x).

    adapt(dit, rank=16)                      every matrix that DiT.LORA names gets A and B; only these are trained from here on
    save(dit, folder, base="nvidia/...")     A and B alone, in the layout of the library peft, and where the rest lies
    load(dit, folder)                        the base's weights, and A and B added to them for good

A (rank, in) begins as kaiming_uniform with a = sqrt(5), as nn.Linear's own weights do, and B (out, rank) as zero: adapted and
not yet trained, a model computes what it did before. scale is 2: peft's lora_alpha is twice its r.

A model says what there is to adapt: `LORA` is a regular expression over the names that its modules have in transformers or
diffusers, `LORA_PREFIX` what stands there before our names, and `LORA_WHOLE` names modules that are trained as they are.
"""

import math
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoint import InputError, load_weights, part_folder, read_json, save_weights, write_json

CONFIG = "adapter_config.json"  # of a folder with adapters alone
STEM = "adapter_model"
OUTER = "base_model.model."  # what peft writes before every name
SCALE = 2.0


class Adapted(nn.Linear):
    """A linear layer with its A and B: lora_A (rank, in), lora_B (out, rank), both fp32."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)                                                              # (N, out)
        low = F.linear(x.to(working_dtype(x, self.lora_A)), self.lora_A)                    # (N, rank)
        return y + SCALE * F.linear(low, self.lora_B).to(y.dtype)                           # (N, out)


def working_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Autocast converts by itself; without it the thin products are computed in the type of their own weights."""
    return x.dtype if torch.is_autocast_enabled(x.device.type) else weight.dtype


def layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that LoRA adapts, by the names that they have in the model's own library."""
    found = {}
    for name, module in model.named_modules():
        name = outside(model, name)
        if isinstance(module, nn.Linear) and re.fullmatch(model.LORA, name):
            found[name] = module
    return found


def outside(model: nn.Module, name: str) -> str:
    """Our name of a module or parameter -> its name in the model's own library."""
    for own, theirs in model.LORA_PREFIX.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name


def adapt(model: nn.Module, rank: int) -> nn.Module:
    """Adapters of this rank on all layers that LoRA adapts, and gradients for them and for `LORA_WHOLE` alone. 0: none."""
    if rank == 0:
        return model
    model.requires_grad_(False)
    for layer in layers(model).values():
        layer.__class__ = Adapted
        device = layer.weight.device
        # On the CPU, so that a seed means the same on every device.
        a = torch.empty(rank, layer.in_features, device="meta" if device.type == "meta" else "cpu")
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        layer.lora_A = nn.Parameter(a.to(device))
        layer.lora_B = nn.Parameter(torch.zeros(layer.out_features, rank, device=device))
    for name in model.LORA_WHOLE:
        for owner in model.get_submodule(name).modules():
            for key, p in owner.named_parameters(recurse=False):
                setattr(owner, key, nn.Parameter(p.detach().float()))
    return model


def parts(model: nn.Module) -> tuple[nn.ParameterList, nn.ParameterList]:
    """(what is trained, what is not) of an adapted model."""
    trained = [p for p in model.parameters() if p.requires_grad]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    return nn.ParameterList(trained), nn.ParameterList(frozen)


# --------------------------------------------------------------------------------------------------------------- on the disk


def save(model: nn.Module, folder: str | Path, base: str) -> None:
    """Adapters as peft writes them, with the model's own config.json beside them. base: where the frozen weights come from."""
    folder = Path(folder)
    tensors = {}
    for name, layer in layers(model).items():
        tensors[f"{OUTER}{name}.lora_A.weight"] = layer.lora_A
        tensors[f"{OUTER}{name}.lora_B.weight"] = layer.lora_B
    for name in model.LORA_WHOLE:
        for key, value in model.get_submodule(name).state_dict().items():
            tensors[f"{OUTER}{outside(model, name)}.{key}"] = value

    rank = next(iter(layers(model).values())).lora_A.shape[0]
    save_weights(tensors, folder, model.config.to_json(), stem=STEM)
    # Without it the folder is no checkpoint to us, and with it it must be whole: so it comes last.
    write_json(folder / CONFIG, {
        "peft_type": "LORA",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": SCALE * rank,
        "target_modules": model.LORA,
        "modules_to_save": list(model.LORA_WHOLE) or None,
        "bias": "none",
        "inference_mode": True,
    })  # fmt: skip


def place(source: str, folder: Path) -> str:
    """What `save` writes as base. folder: what a source meant when it was read, such as a run's newest checkpoint; a Hub name
    stays one, so that the adapters are of use elsewhere."""
    return str(folder.resolve()) if Path(source).exists() else source


def load(model: nn.Module, folder: str | Path, part: str, **options) -> nn.Module:
    """Weights of a model that was built on the meta device: those in a folder, or those of a base with its adapters added.

    part: the model's name among the parts of a checkpoint; options: those of `load_weights`.
    """
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return load_weights(model, folder, **options)
    config = read_json(folder / CONFIG)
    check(config, folder)
    base = part_folder(config["base_model_name_or_path"], part)
    if base.resolve() == folder.resolve():
        raise InputError(f"{folder / CONFIG}: names itself as its base: write there where the frozen weights lie")
    load(model, base, part, **options)
    return merge(model, folder, config)


def check(config: dict, folder: Path) -> None:
    """InputError for adapters that are more than A and B beside W."""
    where = folder / CONFIG
    if config.get("peft_type") != "LORA" or not isinstance(config.get("base_model_name_or_path"), str):
        raise InputError(f"{where}: no LoRA of a base_model_name_or_path, and other adapters are not read")
    for name in ("use_dora", "use_rslora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern"):
        if config.get(name):
            raise InputError(f"{where}: {name} is {config[name]!r:.40}, which is not read here: merge it with peft first")
    if config.get("bias", "none") != "none":
        raise InputError(f"{where}: bias is {config['bias']!r:.40}, only none is read")


@torch.no_grad()
def merge(model: nn.Module, folder: Path, config: dict) -> nn.Module:
    """Add the adapters in a folder to the weights, in fp32, and put the modules that were trained whole in their places."""
    file = folder / f"{STEM}.safetensors"
    if not file.is_file():
        raise InputError(f"{file}: is missing, but {CONFIG} is there: copy it, too")
    tensors = {name.removeprefix(OUTER): tensor for name, tensor in load_file(file).items()}
    scale = config["lora_alpha"] / config["r"]
    used = set()

    for name, layer in layers(model).items():
        a = f"{name}.lora_A.weight"
        b = f"{name}.lora_B.weight"
        # peft may have adapted fewer layers than we do.
        if a not in tensors or b not in tensors:
            continue
        change = scale * (tensors[b].float() @ tensors[a].float())                          # (out, in)
        if change.shape != layer.weight.shape:
            raise InputError(f"{file}: {name} is of shape {tuple(change.shape)}, its base of {tuple(layer.weight.shape)}")
        layer.weight.copy_(layer.weight.float() + change.to(layer.weight.device))
        used |= {a, b}
    for name in model.LORA_WHOLE:
        module = model.get_submodule(name)
        for key, value in module.state_dict().items():
            there = f"{outside(model, name)}.{key}"
            if there in tensors:
                value.copy_(tensors[there])
                used.add(there)

    # What is not used would be missed silently: the model would be another one.
    if left := sorted(tensors.keys() - used):
        raise InputError(f"{file}: {len(left)} tensors have no place in {type(model).__name__}, the first is {left[0]}")
    print(f"{type(model).__name__}: {len(used)} tensors of adapters added from {folder}")
    return model
