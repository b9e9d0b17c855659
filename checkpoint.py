"""What a checkpoint on disk is, and how one is read and written: safetensors + config.json, strictly, and never pickle.

Any part of the system comes from a local folder or from the Hub, named "owner/name", "owner/name/folder" or
"owner/name/folder@revision". A module is built on the meta device and filled tensor by tensor, so that its weights exist
once. Whatever is missing, left over or misshapen stops with its name, and every error is one line that says what to do.

    folder = resolve("Qwen/Qwen2.5-VL-7B-Instruct")
    with torch.device("meta"):
        model = Model(Config.from_json(read_json(folder / "config.json")))
    load_weights(model, folder, dtype=parse_dtype("bf16"), device=pick_device("auto"))
"""

import difflib
import errno
import hashlib
import json
import math
import os
import re
import shutil
import sys
import types
import typing
from collections.abc import Callable, Collection
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path

import torch
from huggingface_hub import constants, errors, snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

STEMS = ("model", "diffusion_pytorch_model")  # transformers' and diffusers' file names
HUB_NAME = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<folder>[^@]+))?(?:@(?P<revision>.+))?")
SUMS = "SHA256SUMS"  # of a checkpoint of a run
BUNDLED = str(Path(__file__).parent / "checkpoints" / "tiny")  # the miniature, which lies beside this file
STAGING = ".saving"  # where a save is written before it takes its place
JSON_BYTES = 2**28  # the largest file that can be meant: the tokenizer of a 7B model has 11 MB
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
DTYPES |= {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES.values()}


class InputError(ValueError):
    """Something a user can put right: the message is one line that names the thing and the remedy."""


def abandon_stdout() -> None:
    """For a BrokenPipeError: `| head` has seen enough, and the interpreter must not write to the pipe again when it ends."""
    # What is still in the buffer is flushed at the end: it then goes to the null device.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())


def pick_device(name: str = "auto") -> torch.device:
    """The device of that name ("cpu", "cuda", "cuda:1", "mps"); "auto" is the accelerator, or the CPU where there is none."""
    # What there is of each kind. torch.device takes any name, and only the first tensor on it would tell that there is none.
    mps = torch.backends.mps.is_available()
    there = {
        "cpu": 1,
        "cuda": torch.cuda.device_count(),
        "mps": int(mps),
    }
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    elif name == "auto":
        name = "mps" if mps else "cpu"
    kind, _, index = name.partition(":")
    count = there.get(kind)
    if count is None or (index and not index.isdecimal()):
        raise InputError(f"device {name}: unknown, choose auto, cpu, cuda, cuda:N or mps")
    if int(index or 0) >= count:
        raise InputError(f"device {name}: PyTorch {torch.__version__} sees {count} of that kind here: choose auto or cpu")
    return torch.device(name)


def parse_dtype(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The type named "bf16", "fp32", "fp16" or as in PyTorch; "auto" is bf16 on an accelerator and fp32 on the CPU."""
    if name == "auto":
        return torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    if name not in DTYPES:
        raise InputError(f"dtype {name}: unknown, choose auto, bf16, fp32 or fp16")
    return DTYPES[name]


def make_out(out: Path) -> None:
    """The folder for results; an InputError now and not after the work if nothing can be written there."""
    # Permissions do not tell it all (a full disk, a network's file system, a container): to write something does.
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / f".probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except (FileExistsError, NotADirectoryError):
        raise InputError(f"--out {out}: cannot be written (a file is in the way): choose another folder") from None
    except (OSError, ValueError) as e:  # the latter if there is a NUL in it
        raise InputError(f"--out {out}: cannot be written ({getattr(e, 'strerror', e)}): choose another folder") from None


def resolve(source: str | Path, subfolder: str | None = None, revision: str | None = None, *, base: Path | None = None) -> Path:
    """The local folder of a checkpoint part; what is on the Hub is downloaded first, or found in the cache.

    source: a local folder (with `base` it lies in there, and nowhere else on the disk), else a Hub name as in the module's
    docstring; subfolder and revision add to it. Only json, safetensors and txt files are fetched. The Hub is not asked for
    what looks like a path (`looks_local`).
    """
    # A folder goes before the Hub: what lies here needs no network, and cannot have changed since.
    local = base / source if base else Path(source).expanduser()
    if local.exists():
        folder = local / subfolder if subfolder else local
        if not local.is_dir():
            raise InputError(f"{local}: a file, but a checkpoint is a folder: name the folder that holds it")
        if not folder.is_dir():
            inside = ", ".join(sorted(f.name for f in local.iterdir() if f.is_dir())) or "no folder"
            raise InputError(f"{folder}: no such folder: {local} holds {inside}")
        return folder
    # A path with a typing error can have the form owner/name. The Hub would be asked for a stranger's repository.
    if looks_local(source, base):
        raise InputError(no_folder(source, base))

    hub = HUB_NAME.fullmatch(str(source))
    if hub is None:
        raise InputError(f"{source}: no such folder, and a Hub name would have the form owner/name: check the path")
    repo = hub["repo"]
    revision = revision or hub["revision"] or "main"
    subfolder = "/".join(filter(None, (hub["folder"], subfolder)))
    try:
        # Files that are complete in the cache are not fetched again, and a partial one never gets its final name.
        patterns = []
        for pattern in ("*.json", "*.safetensors", "*.txt"):
            patterns.append(f"{subfolder}/{pattern}".lstrip("/"))
        snapshot = snapshot_download(repo, revision=revision, allow_patterns=patterns)
        folder = Path(snapshot) / subfolder
    except Exception as e:  # the transports raise types of their own, without a common base
        raise InputError(hub_problem(e, repo, revision, source)) from e
    if not folder.is_dir():
        what = f"no folder {subfolder} with" if subfolder else "no"
        raise InputError(f"{repo}: {what} json or safetensors files at revision {revision}: see {constants.ENDPOINT}/{repo}")
    return folder


def looks_local(source: str | Path, base: Path | None = None) -> bool:
    """Whether a name that no folder has was meant as a folder's: it begins as paths do, or with a folder that is here.

    With a revision behind @ a relative one is the Hub's in any case.
    """
    first = str(source).split("/")[0]
    if first in ("", ".", "..") or first.startswith("~"):
        return True
    # Where a folder of the first name is, the rest was meant to be in it; runs/ is one before the first training has made it.
    here = first == "runs" or Path(first).is_dir()
    if base is not None:
        here = here or (base / first).is_dir()
    return here and "/" in str(source) and "@" not in str(source)


def no_folder(source: str | Path, base: Path | None = None) -> str:
    """What to say then: how far the path leads, and where it might have been meant to go on."""
    path = Path(source).expanduser()
    if base is not None and (base / path.parts[0]).is_dir():
        path = base / path
    # The last folder on the way that is there, and the first name that is not.
    above = next(f for f in path.parents if f.is_dir() or f == f.parent)
    missing = path.relative_to(above).parts[0]
    names = []
    if above.is_dir():
        names = sorted(f.name for f in above.iterdir() if f.is_dir() and not f.name.startswith("."))
    close = difflib.get_close_matches(missing, names, 1)
    inside = ", ".join(names[:8]) or "no folder"
    if len(names) > 8:
        inside += ", ..."
    remedy = f"did you mean {above / close[0]}?" if close else f"{above.resolve()} holds {inside}"
    return f"{source}: no such folder: there is no {missing} there: {remedy}"


def hub_problem(e: Exception, repo: str, revision: str, source: str | Path) -> str:
    """What to say when a download failed, in one line. source: the name as the user gave it."""
    page = f"{constants.ENDPOINT}/{repo}"
    cause = e
    # Nothing in the cache: that is either what was asked for, offline, or only the last thing that was tried. Then what came
    # before it is the reason.
    if isinstance(e, errors.LocalEntryNotFoundError):
        part = "complete " if isinstance(e, errors.IncompleteSnapshotError) else ""
        absent = f"{source}: no such folder, and {repo}@{revision} is not {part}in the cache"
        if constants.is_offline_mode():
            return f"{absent}: unset HF_HUB_OFFLINE to download it, or name a local folder"
        cause = e.__cause__ or e
    line = " ".join(f"{type(cause).__name__}: {cause}".split())[:200]
    if isinstance(cause, errors.HfHubHTTPError):
        line = f"HTTP {cause.response.status_code}: {cause.server_message or cause.response.reason_phrase}"
    # From the particular to the general: a gated repository is to the library a kind of missing one.
    if isinstance(cause, errors.GatedRepoError):
        return f"{repo}: access is gated: accept its licence at {page}, then run `hf auth login`"
    if isinstance(cause, errors.RepositoryNotFoundError):
        return f"{source}: no such folder, and no repository {repo} on the Hub: if it is a private one, run `hf auth login`"
    if isinstance(cause, errors.RevisionNotFoundError):
        return f"{repo}: no revision {revision}: see the branches and tags at {page}/tree/main"
    if isinstance(cause, errors.HfHubHTTPError) and cause.response.status_code in (401, 403):
        return f"{repo}: the Hub refuses access ({line}): run `hf auth login` with a token that may read it"
    if isinstance(e, errors.LocalEntryNotFoundError):
        return f"{absent}, and the Hub cannot be reached ({line}): check the network, or name a local folder"
    if isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
        return f"{repo}: {constants.HF_HUB_CACHE} cannot be written ({e.strerror}): make room, or set HF_HOME elsewhere"
    return f"{repo}: the download stopped ({line}): run it again, complete files are kept"


def read_text(path: str | Path) -> str:
    """A UTF-8 file; InputError where it is missing, unreadable, or a Git LFS pointer."""
    path = Path(path)
    _refuse_pointer(path)
    try:
        return path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as e:
        raise InputError(f"{path}: cannot be read as UTF-8 text ({e}): download or copy it again") from None


def read_json(path: str | Path) -> dict:
    """A JSON file that holds one object. A field given twice, or as NaN or Infinity, which JSON does not have, is refused."""
    # Parsed, JSON takes many times its size: a file of gigabytes would end the process, not raise an error.
    if Path(path).is_file() and Path(path).stat().st_size > JSON_BYTES:
        raise InputError(f"{path}: {Path(path).stat().st_size:,} bytes are no configuration: download or copy it again")
    text = read_text(path)
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except (ValueError, RecursionError) as e:  # beside what is no JSON: numbers of thousands of digits, brackets without end
        what = "it is nested too deeply" if isinstance(e, RecursionError) else e
        raise InputError(f"{path}: not valid JSON ({what}): download or copy it again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds a JSON {type(value).__name__} where an object {{...}} is expected")
    return value


def _object(pairs: list[tuple[str, typing.Any]]) -> dict:
    """What json.loads calls for every object."""
    out = {}
    for name, value in pairs:
        # Python would take the last one, another reader the first.
        if name in out:
            raise ValueError(f"field {name!r:.60} is there twice")
        numbers = value if isinstance(value, list) else [value]
        for number in numbers:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"field {name!r:.60} is not a finite number")
        out[name] = value
    return out


def write_json(path: str | Path, value: dict) -> None:
    """The file appears whole or not at all."""
    # A rename is whole or not at all, but it may come to the disk before the bytes of the file: fsync first.
    temporary = Path(f"{path}.tmp")
    with open(temporary, "w", encoding="utf-8") as f:
        f.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _refuse_pointer(path: Path) -> None:
    """What `git clone` without git-lfs leaves instead of a file: 130-odd bytes that name its hash."""
    if not path.is_file():
        raise InputError(f"{path}: file is missing: is the copy or download of {path.parent} complete?")
    with open(path, "rb") as f:
        if f.read(40).startswith(b"version https://git-lfs"):
            raise InputError(f"{path}: a Git LFS pointer, not the file itself: run `git lfs pull` there, or `hf download` it")


def config_from_json(cls: type, values: dict, where: str | Path, ignore: Collection[str] = ()) -> typing.Any:
    """A dataclass from a JSON object, checked field by field against its annotations; dataclasses may nest.

    A field without default must be there; an unknown one is an error unless it begins with "_" or is in `ignore`.
    A list becomes a tuple where the annotation says tuple[...], and an int a float where it says float.
    """
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}

    # An unknown field is mostly a misspelt one: passed over, its default would count, and the model would be another.
    for key in values:
        if key not in known and key not in ignore and not key.startswith("_"):
            close = difflib.get_close_matches(key, known, 1)
            name = key if key.isprintable() and len(key) < 60 else f"{key!r:.60}"
            remedy = f"did you mean {close[0]}?" if close else "remove it"
            raise InputError(f"{where}: unknown field {name}: {remedy}")
    for key, field in known.items():
        has_default = field.default is not MISSING or field.default_factory is not MISSING
        if key not in values and not has_default:
            raise InputError(f"{where}: field {key} is missing: is this the config.json of a {cls.__name__}?")

    checked = {}
    for key, value in values.items():
        if key in known:
            checked[key] = _checked(value, hints[key], f"{where}: field {key}", ignore)
    return cls(**checked)


def _checked(value: typing.Any, hint: typing.Any, where: str, ignore: Collection[str]) -> typing.Any:
    # tuple[int, ...] is of the kind tuple with arguments; a plain int is its own kind.
    kind = typing.get_origin(hint) or hint
    args = typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):  # X | None
        if value is None and type(None) in args:
            return None
        return _checked(value, args[0], where, ignore)
    if is_dataclass(kind) and isinstance(value, dict):
        return config_from_json(kind, value, where, ignore)

    # Each element against its own annotation, or all against the only one that there is.
    if kind in (tuple, list) and isinstance(value, (tuple, list)):
        kinds = args
        if kind is list or args[-1] is Ellipsis:
            kinds = args[:1] * len(value)
        if len(kinds) == len(value):
            return kind(_checked(v, k, where, ignore) for v, k in zip(value, kinds, strict=True))
    # JSON writes 1.0 as 1. An int of hundreds of digits has no float.
    elif kind is float and type(value) is int and abs(value) < 10**300:
        return float(value)
    # The very type: to isinstance, True is an int.
    elif kind is typing.Any or type(value) is kind:
        return value
    raise InputError(f"{where} is {json.dumps(value):.80}, but {hint if args else kind.__name__} is expected")


def check_bounds(config: typing.Any, where: str, bounds: dict[str, tuple[float, float]]) -> None:
    """InputError where a field, or a number in a field that is a list, is outside its bounds (both included); None passes.

    Wide enough for any model that there is: they keep a damaged or hostile config.json from asking for a million layers.
    """
    for name, (low, high) in bounds.items():
        value = getattr(config, name)
        numbers = value if isinstance(value, (list, tuple)) else [value]
        for number in numbers:
            # Written so that NaN fails, too: it is neither below nor above anything.
            if number is not None and not low <= number <= high:
                shown = f"{number:,}" if isinstance(number, int) else f"{number:g}"
                if len(shown) > 24:
                    shown = f"{shown:.20}..."
                raise InputError(f"{where}: {name} is {shown}, but it can only be from {low:,} to {high:,}")


def weight_files(folder: Path) -> dict[Path, list[str]]:
    """File -> the tensors it holds. Where there is an index of shards, it and they must agree."""
    # One file, or one index of shards; both beside each other would be two savings mixed.
    entries = []
    for stem in STEMS:
        candidates = (folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json")
        entries += [file for file in candidates if file.is_file()]
    if len(entries) > 1:
        raise InputError(f"{folder}: holds both {entries[0].name} and {entries[1].name}: remove the one that is out of date")

    # None: what lies there instead tells what to do about it.
    if not entries:
        pickled = sorted(f.name for f in folder.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if (folder / STAGING).exists():
            raise InputError(f"{folder}: a save was interrupted here: use an earlier checkpoint, or save it again")
        if pickled:
            code = f"s.save_file(torch.load('{pickled[0]}', weights_only=True), 'model.safetensors')"
            remedy = f'convert it there with python -c "import torch, safetensors.torch as s; {code}"'
            if pickled[0].endswith((".pt", ".pth")):  # as NVIDIA and Wan publish, with more in it than tensors
                remedy = "see `python -m tools.convert --help`"
            raise InputError(f"{folder}: only safetensors is loaded, not {pickled[0]}: {remedy}")
        names = " or ".join(f"{stem}.safetensors" for stem in STEMS)
        raise InputError(f"{folder}: no {names} here, nor an index of shards")
    if entries[0].suffix != ".json":
        return {entries[0]: list(_open(entries[0]).keys())}

    # An index must name just what its shards hold: a shard of another saving would else go unnoticed.
    files = {}
    index = read_json(entries[0]).get("weight_map")
    # Names of files beside it alone: a path could lead anywhere on the disk.
    sound = isinstance(index, dict) and all(isinstance(f, str) and f == Path(f).name for f in index.values())
    if not sound:
        raise InputError(f"{entries[0]}: no weight_map from tensors to files beside it: download or copy it again")
    for name, file in index.items():
        files.setdefault(folder / file, []).append(name)
    for file, names in files.items():
        odd = sorted(set(names) ^ set(_open(file).keys()))
        if odd:
            state = "only in the index" if odd[0] in names else "not in the index"
            raise InputError(f"{file}: {odd[0]} is {state} {entries[0].name}: download or copy both again")
    return files


def _open(file: Path) -> safe_open:
    _refuse_pointer(file)
    try:
        return safe_open(file, "pt")
    except (SafetensorError, OSError) as e:
        size = file.stat().st_size
        raise InputError(f"{file}: cut off or damaged ({size:,} bytes; {e}): download or copy it again") from None


def load_weights(
    module: nn.Module,
    folder: str | Path,
    *,
    rename: Callable[[str], str | None] | None = None,
    adapt: Callable[[str, Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    label: str | None = None,
) -> nn.Module:
    """Fill a module that was built on the meta device from the safetensors files in `folder`.

    rename(name in file) gives the parameter's name, or None for a tensor that is dropped on purpose. adapt(parameter name,
    tensor) may reshape what was read. `module.tied` maps parameters that share another's storage to that other's name. All
    names are checked before the first weight is read. dtype is for floating-point tensors; integer buffers keep their own.
    """
    folder = Path(folder)
    label = label or type(module).__name__
    expected = module.state_dict(keep_vars=True)
    tied = getattr(module, "tied", {})
    found = _find_tensors(expected, tied, folder, rename, label)

    # NaN and infinities survive in a sum, which takes one pass over memory while it is still in the cache.
    sums: dict[str, Tensor] = {}
    for target, (file, name) in found.items():
        # Opened anew for each tensor: the pages of a mapped file count as ours until it is closed. And copied in any case, so
        # that the module does not hang on a file that someone may overwrite.
        with _open(file) as f:
            tensor = f.get_tensor(name)
        if adapt:
            tensor = adapt(target, tensor)
        want = expected[target]
        if tensor.shape != want.shape:
            raise InputError(f"{file}: tensor {name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(want.shape)}")
        if tensor.is_floating_point() != want.is_floating_point():
            raise InputError(f"{file}: tensor {name} is {tensor.dtype}: quantised weights are not read, use the original ones")
        kept = dtype if tensor.is_floating_point() else tensor.dtype
        tensor = tensor.to(device, kept, copy=True)
        if tensor.is_floating_point():
            sums[target] = tensor.sum()
        _assign(module, target, tensor)

    for target in _not_finite(module, sums):
        file, name = found[target]
        remedy = "use another copy"
        if dtype == torch.float16:
            remedy = "try --dtype bf16 or fp32, or download or copy it again"
        raise InputError(f"{file}: tensor {name} of {label} holds NaN or infinity in {str(dtype)[6:]}: {remedy}")

    # Parameters that share storage: a file may hold both, but then the same twice.
    for name, other in tied.items():
        if name in found and not torch.equal(module.get_parameter(name), module.get_parameter(other)):
            raise InputError(f"{folder}: {name} is not {other}, yet config.json ties them: is it of the same model?")
        _assign(module, name, module.get_parameter(other))

    # Said at every load: a number that is not the model's is the first sign of a wrong folder.
    own = expected.keys() - tied.keys()
    total = sum(expected[name].numel() for name in own)
    print(f"{label}: {len(found.keys() & own)}/{len(own)} tensors, {total:,} parameters from {folder}")
    return module


def _not_finite(module: nn.Module, sums: dict[str, Tensor]) -> list[str]:
    """Which of the parameters with these sums hold NaN or infinity."""
    if not sums:
        return []
    # One read for all of them, now that all copies are on their way: a read for each would wait for the GPU each time.
    finite = torch.stack([*sums.values()]).isfinite().tolist()
    wrong = []
    for name, sound in zip(sums, finite, strict=True):
        # A sum may have merely overflowed, in fp16 above all: only then every number is looked at.
        if not sound and not _tensor(module, name).isfinite().all():
            wrong.append(name)
    return wrong


def _find_tensors(
    expected: dict[str, Tensor], tied: dict[str, str], folder: Path, rename: Callable[[str], str | None] | None, label: str
) -> dict[str, tuple[Path, str]]:
    """Parameter -> (file, name there), of all that are expected; InputError where names are missing, left over or double."""
    found: dict[str, tuple[Path, str]] = {}
    extra: list[str] = []
    # The names are in the heads of the files: nothing of the weights is read yet.
    for file, names in weight_files(folder).items():
        for name in names:
            target = rename(name) if rename else name
            if target in found:
                raise InputError(f"{file}: tensors {found[target][1]} and {name} are both {target} of {label}: remove one")
            if target in expected:
                found[target] = (file, name)
            elif target is not None:
                extra.append(name)
    missing = sorted(expected.keys() - found.keys() - tied.keys())
    problems = []
    if missing:
        problems.append(f"{len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]}")
    if extra:
        problems.append(f"{len(extra)} have no place in it, the first is {extra[0]}")
    if problems:
        raise InputError(f"{folder}: does not fit {label}: {'; '.join(problems)}: is its config.json of the same model?")
    return found


def _tensor(module: nn.Module, name: str) -> Tensor:
    """A parameter or buffer."""
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf)


def _assign(module: nn.Module, name: str, tensor: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    # Past nn.Module's own assignment, which takes no plain tensor for a parameter. To copy into a meta tensor does nothing.
    if leaf in owner._parameters:
        trained = owner._parameters[leaf].requires_grad
        # One parameter in two places stays one: its gradient is the sum of both uses.
        if not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=trained)
        owner._parameters[leaf] = tensor
    else:
        owner._buffers[leaf] = tensor


def save_weights(
    tensors: dict[str, Tensor],
    folder: str | Path,
    config: dict | None = None,
    *,
    stem: str = "model",
    shard_bytes: int = 5_000_000_000,
) -> None:
    """Write tensors as safetensors (one file, or shards and an index) and config.json, in place of an older save if any.

    All is written into a folder aside first. Then the old files go, the one that makes the folder loadable before the others,
    and the new ones come, that one last: wherever this stops, old and new are never mixed.
    """
    folder = Path(folder)
    total = sum(t.nbytes for t in tensors.values())
    files, index = _into_shards(tensors, stem, shard_bytes)
    texts = {"config.json": config} if config is not None else {}

    # The order in which they take their places: last the one without which the folder is no checkpoint.
    if len(files) == 1:
        files = {f"{stem}.safetensors": tensors}
        order = [*texts, f"{stem}.safetensors"]
    else:
        texts[f"{stem}.safetensors.index.json"] = {"metadata": {"total_size": total}, "weight_map": index}
        order = [*files, *texts]

    # All of it aside, and to the disk.
    staging = folder / STAGING
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        for file, value in texts.items():
            write_json(staging / file, value)
        for file, shard in files.items():
            # A shard at a time, and gone before the next: the host may have no room for a copy of a whole model.
            on_host = {name: t.detach().cpu().contiguous() for name, t in shard.items()}
            save_file(on_host, staging / file, metadata={"format": "pt"})
            del on_host
            (staging / file).chmod(staging.stat().st_mode & 0o666)  # save_file's are for the owner alone, whatever the umask
            with open(staging / file, "rb+") as f:
                os.fsync(f.fileno())
    except (OSError, SafetensorError) as e:
        shutil.rmtree(staging, ignore_errors=True)
        raise InputError(f"{folder}: cannot be written ({e}): it takes {total / 1e9:.1f} GB and the right to write") from e

    # Out with the old, index first: shards without one are no checkpoint either. In with the new.
    old = re.compile(rf"{re.escape(stem)}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    outdated = [f for f in folder.iterdir() if old.fullmatch(f.name)]
    outdated.sort(key=_is_shard)
    for file in outdated:
        file.unlink()
    for file in order:
        os.replace(staging / file, folder / file)
    staging.rmdir()


def _into_shards(
    tensors: dict[str, Tensor], stem: str, shard_bytes: int
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """File -> its tensors, in files of at most so many bytes; and the index, tensor -> file."""
    # Shards are filled in order; a tensor is never cut.
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in tensors.items():
        filled = sum(t.nbytes for t in shards[-1].values())
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor

    # The names say how many there are, so they are known only now.
    files = {}
    index = {}
    for i, shard in enumerate(shards, 1):
        file = f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors"
        files[file] = shard
        for name in shard:
            index[name] = file
    return files, index


def _is_shard(file: Path) -> bool:
    """Whether it is one of several files that only an index makes loadable."""
    return "-of-" in file.name


# ------------------------------------------------------------------------------------------------------- the folder of a run


def sha256(path: Path) -> str:
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def sync(path: Path) -> None:
    """What is written to this file, or which names are in this folder, survives a loss of power from here on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_checksums(folder: Path) -> None:
    """Checksums of every file, as sha256sum writes them; then all of it to the disk."""
    files = sorted(f for f in folder.rglob("*") if f.is_file())
    text = ""
    for file in files:
        text += f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n"
    (folder / SUMS).write_text(text)
    # Files, and the folders with their names: a file is lost if only the folder does not know of it.
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def verify(checkpoint: Path, part: str = "") -> str:
    """What is wrong with a checkpoint, or with the files of one part of it; empty when they are as they were written."""
    if not (checkpoint / "state.json").is_file():
        return "state.json is missing"
    if not (checkpoint / SUMS).is_file():
        return ""  # of a version without checksums
    for line in (checkpoint / SUMS).read_text(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        # That it is there costs nothing to see; its checksum means to read it all.
        if name.startswith(part) and not (checkpoint / name).is_file():
            return f"{name} is missing"
        if name.startswith(part) and sha256(checkpoint / name) != digest:
            return f"{name} is damaged: its checksum differs"
    return ""


def list_checkpoints(run: str | Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted(Path(run).glob("step_*/"), key=_step_order)


def _step_order(folder: Path) -> tuple[int, str]:
    """By number, also beyond the digits that the names were padded to: a longer number is a larger one."""
    return len(folder.name), folder.name


def newest_sound(run: str | Path, part: str = "") -> Path:
    """The newest of them that is sound, or that holds that part and its files are; newer ones that are not are named."""
    for folder in reversed(list_checkpoints(run)):
        problem = verify(folder, f"{part}/" if part else "")
        if not problem and part and not (folder / part / "config.json").is_file():
            problem = f"it holds no {part}"
        if not problem:
            return folder
        print(f"{folder}: {problem}; the checkpoint before it is used", file=sys.stderr, flush=True)
    if list_checkpoints(run):
        raise InputError(f"{run}: every checkpoint is damaged: bring one back, or choose another --out")
    raise InputError(f"{run}: no step_* checkpoint here; has the run saved yet?")


def parts_in(folder: Path) -> list[str]:
    """Names of the parts that a folder, or any checkpoint of a run, holds."""
    names = set()
    for pattern in ("*/config.json", "step_*/*/config.json"):
        names |= {f.parent.name for f in folder.glob(pattern)}
    return sorted(names)


def is_run(folder: Path) -> bool:
    """Whether it is a training run's folder or one of its checkpoints: no model, whatever a config.json in it says."""
    config = folder / "config.json"
    if list_checkpoints(folder) or (folder / "state.json").is_file() and not config.is_file():
        return True
    # A run that has not saved yet holds its own settings alone.
    return config.is_file() and {"out", "steps", "save_every"} <= read_json(config).keys()


def part_folder(source: str | Path, part: str, *, base: Path | None = None) -> Path:
    """The folder of a part, wherever it is asked for by a name: source is

    the part's own folder or Hub name; a folder or repository with a subfolder of the part's name; a training run, of which the
    newest sound checkpoint is taken; or a checkpoint of a run. base: as in `resolve`.
    """
    folder = resolve(source, base=base)
    inside = folder / part
    if not is_run(folder):
        return inside if (inside / "config.json").is_file() else folder
    held = parts_in(folder)
    if not held:
        raise InputError(f"{source}: this training run has not saved yet: wait for its first step_* folder, or take another")
    if part not in held:
        raise InputError(f"{source}: a training run that holds {', '.join(held)}, no {part}: take one that holds it")
    if list_checkpoints(folder):
        return newest_sound(folder, part) / part
    # Asked for by name, a damaged checkpoint is an error: to take another one would not be what was asked for.
    if problem := verify(folder, f"{part}/"):
        raise InputError(f"{folder}: {problem}: take another checkpoint of the run, or name the run itself")
    return inside
