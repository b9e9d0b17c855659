"""What a checkpoint on disk is, and how one is read and written: safetensors + config.json, strictly, and never pickle.

Any part of the system comes from a local folder or from a Hub id. A loaded module is built on the meta device and filled
tensor by tensor, so that its weights exist once. Whatever is missing, left over or misshapen stops with its name.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STEMS = ("model", "diffusion_pytorch_model")  # transformers' and diffusers' file names


class InputError(ValueError):
    """Something a user can put right: the message is one line that names the thing and the remedy."""


def resolve(source: str | Path, subfolder: str | None = None, revision: str | None = None) -> Path:
    """The local folder of a checkpoint part; a Hub id is downloaded (or found in the cache) first."""
    folder = Path(source)
    if not folder.is_dir():
        prefix = f"{subfolder}/" if subfolder else ""
        patterns = [prefix + p for p in ("*.json", "*.safetensors", "*.txt")]
        folder = Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    folder = folder / subfolder if subfolder else folder
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    return folder


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise InputError(f"{path}: file is missing") from None
    except json.JSONDecodeError as e:
        raise InputError(f"{path}: not valid JSON ({e})") from None


def write_json(path: Path, value: dict) -> None:
    temporary = Path(f"{path}.tmp")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    os.replace(temporary, path)


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it."""
    for stem in STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        if index.exists():
            return {name: folder / file for name, file in read_json(index)["weight_map"].items()}
        single = folder / f"{stem}.safetensors"
        if single.exists():
            with safe_open(single, "pt") as f:
                return dict.fromkeys(f.keys(), single)
    raise InputError(f"{folder}: no {' or '.join(s + '.safetensors' for s in STEMS)} here")


def load_weights(
    module: nn.Module,
    folder: Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    adapt: Callable[[str, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    label: str | None = None,
) -> nn.Module:
    """Fill a module that was built on the meta device from the safetensors files in `folder`.

    rename(name in file) gives the parameter's name, or None for a tensor that is dropped on purpose. adapt(parameter name,
    tensor) may reshape what was read. `module.tied` maps parameters that share another's storage to that other's name.
    """
    expected = dict(module.named_parameters()) | {n: b for n, b in module.named_buffers() if n in module.state_dict()}
    tied = getattr(module, "tied", {})
    found, total = set(), 0
    files = weight_files(folder)
    by_file: dict[Path, list[str]] = {}
    for name, file in files.items():
        by_file.setdefault(file, []).append(name)
    for file, names in by_file.items():
        with safe_open(file, "pt") as f:
            for name in names:
                target = rename(name) if rename else name
                if target is None:
                    continue
                if target not in expected:
                    raise InputError(f"{file}: tensor {name} has no place in {type(module).__name__}")
                tensor = f.get_tensor(name)
                tensor = adapt(target, tensor) if adapt else tensor
                if tensor.shape != expected[target].shape:
                    want = tuple(expected[target].shape)
                    raise InputError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, the config asks for {want}")
                _assign(module, target, tensor.to(device=device, dtype=dtype))
                found.add(target)
                total += tensor.numel()
    missing = sorted(set(expected) - found - set(tied))
    if missing:
        raise InputError(f"{folder}: {len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    for name, source in tied.items():
        if name not in found:
            _assign(module, name, module.get_parameter(source))
    print(
        f"{label or type(module).__name__}: {len(found)}/{len(expected) - len(tied)} tensors, {total:,} parameters from {folder}"
    )
    return module


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        owner._parameters[leaf] = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
    else:
        owner._buffers[leaf] = tensor


def save_weights(
    tensors: dict[str, Tensor],
    folder: Path,
    config: dict | None = None,
    *,
    stem: str = "model",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write tensors as safetensors (one file, or shards and an index) and config.json; each file appears whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous().cpu()
        size += tensor.nbytes
    weight_map = {}
    for i, shard in enumerate(shards):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / f"{file}.tmp", metadata={"format": "pt"})
        os.replace(folder / f"{file}.tmp", folder / file)
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors.values())
        write_json(folder / f"{stem}.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    if config is not None:
        write_json(folder / "config.json", config)
