"""checkpoint.py: what is written is read back, what is wrong stops with its name, and weights are never in memory twice."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import checkpoint
from checkpoint import InputError, config_from_json, load_weights, parse_dtype, pick_device, read_json, resolve, save_weights

from dit import PRESETS
from model import MLLMConfig

ROOT = Path(__file__).parent.parent


class Toy(nn.Module):
    """Two matrices of 2 x 3, a bias, and an integer buffer that is part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 2)
        self.second = nn.Linear(3, 2, bias=False)
        self.register_buffer("steps", torch.tensor(7))


class Tied(nn.Module):
    tied = {"head.weight": "embed.weight"}

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def meta(cls: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return cls()


def failure(call, *args, **options) -> str:
    """The one line that a user gets."""
    with pytest.raises(InputError) as caught:
        call(*args, **options)
    line = str(caught.value)
    assert line and "\n" not in line
    return line


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_weights(Toy().state_dict(), tmp_path / "toy", {"size": 3})
    return tmp_path / "toy"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards: steps and first.weight, then first.bias and second.weight."""
    save_weights(Toy().state_dict(), tmp_path / "toy", {"size": 3}, shard_bytes=32)
    assert sorted(f.name for f in (tmp_path / "toy").iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    return tmp_path / "toy"


# --- what is written is read back ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [1, 30, 10**9])
@pytest.mark.parametrize("stem", checkpoint.STEMS)
def test_round_trip_is_exact(tmp_path, shard_bytes, stem, capsys):
    toy = Toy()
    save_weights(toy.state_dict(), tmp_path, {"size": 3}, stem=stem, shard_bytes=shard_bytes)
    loaded = load_weights(meta(Toy), tmp_path)
    for name, tensor in toy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert capsys.readouterr().out == f"Toy: 4/4 tensors, 15 parameters from {tmp_path}\n"
    assert read_json(tmp_path / "config.json") == {"size": 3}


def test_floats_are_converted_and_integers_are_not(folder):
    loaded = load_weights(meta(Toy), folder, dtype=torch.bfloat16)
    assert loaded.first.weight.dtype == torch.bfloat16 and loaded.steps.dtype == torch.int64 and loaded.steps == 7


def test_rename_drop_and_adapt(tmp_path):
    toy = Toy()
    state = {f"net.{k}": v for k, v in toy.state_dict().items()} | {"net.old": torch.zeros(1)}
    state["net.second.weight"] = state["net.second.weight"].T.contiguous()
    save_weights(state, tmp_path)

    def rename(name: str) -> str | None:
        return None if name == "net.old" else name.removeprefix("net.")

    def adapt(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.T if name == "second.weight" else tensor

    loaded = load_weights(meta(Toy), tmp_path, rename=rename, adapt=adapt)
    assert torch.equal(loaded.second.weight, toy.second.weight)


def test_frozen_stays_frozen(folder):
    toy = meta(Toy)
    toy.first.requires_grad_(False)
    load_weights(toy, folder)
    assert not toy.first.weight.requires_grad and toy.second.weight.requires_grad


def test_tied_weights_are_one_tensor_and_may_be_in_the_file_if_equal(tmp_path):
    weight = torch.randn(4, 3)
    for name, more in (("once", {}), ("twice", {"head.weight": weight.clone()})):
        save_weights({"embed.weight": weight} | more, tmp_path / name)
        loaded = load_weights(meta(Tied), tmp_path / name)
        assert loaded.head.weight is loaded.embed.weight and torch.equal(loaded.embed.weight, weight)
    save_weights({"embed.weight": weight, "head.weight": weight + 1}, tmp_path / "odd")
    assert "head.weight is not embed.weight, yet config.json ties them" in failure(load_weights, meta(Tied), tmp_path / "odd")


def test_loaded_weights_do_not_hang_on_the_file(folder):
    loaded = load_weights(meta(Toy), folder)
    before = loaded.first.weight.clone()
    with open(folder / "model.safetensors", "r+b") as f:  # overwritten in place, not replaced
        f.write(bytes((folder / "model.safetensors").stat().st_size))
    assert torch.equal(loaded.first.weight, before)


def test_files_are_readable_by_whom_the_umask_says(tmp_path):
    old = os.umask(0o022)
    try:
        save_weights(Toy().state_dict(), tmp_path / "toy", {})
    finally:
        os.umask(old)
    assert {oct(f.stat().st_mode & 0o777) for f in (tmp_path / "toy").iterdir()} == {"0o644"}


# Each load has a process of its own, so that the peak is its own. Prints the growth of the peak in units of the loaded weights.
PEAK = """
import os, re, sys, torch
from pathlib import Path
from torch import nn
from checkpoint import load_weights
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
for folder, dtype in zip(sys.argv[1::2], sys.argv[2::2]):
    if os.fork():
        assert os.wait()[1] == 0
        continue
    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(1024, 1024, bias=False) for _ in range(48)))
    before = peak()
    load_weights(model, folder, dtype=getattr(torch, dtype))
    weights = sum(p.nbytes for p in model.parameters())
    print("grew by", (peak() - before) / weights, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux' /proc")
def test_weights_are_in_memory_once(tmp_path):
    """192 MiB of float32 or 96 of bfloat16. Mapped pages of the file must not come on top of them."""
    for stored in ("float32", "bfloat16"):
        state = {f"{i}.weight": torch.full((1024, 1024), float(i), dtype=getattr(torch, stored)) for i in range(48)}
        save_weights(state, tmp_path / stored, shard_bytes=64 * 2**20)
    loads = tmp_path / "float32", "float32", tmp_path / "float32", "bfloat16", tmp_path / "bfloat16", "float32"
    run = subprocess.run([sys.executable, "-c", PEAK, *loads], cwd=ROOT, capture_output=True, text=True, check=True)
    grown = [float(line.split()[-1]) for line in run.stdout.splitlines() if line.startswith("grew by")]
    assert len(grown) == 3 and all(0.9 < g < 1.35 for g in grown), grown


# --- what is wrong stops with its name ----------------------------------------------------------------------------------


def test_a_real_lfs_pointer_is_named(shared, tmp_path):
    pointer = shared / "qwen2.5-vl-32b-instruct-awq" / "tokenizer.json"
    assert failure(read_json, pointer) == (
        f"{pointer}: a Git LFS pointer, not the file itself: run `git lfs pull` there, or `hf download` it"
    )
    (tmp_path / "model.safetensors").write_bytes(pointer.read_bytes())
    assert "model.safetensors: a Git LFS pointer" in failure(load_weights, meta(Toy), tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_named(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    line = failure(load_weights, meta(Toy), folder)
    assert line.startswith(f"{file}: cut off or damaged ({file.stat().st_size} bytes;") and "download or copy it again" in line


def test_a_missing_shard_is_named_before_anything_is_read(sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    toy = meta(Toy)
    line = failure(load_weights, toy, sharded)
    assert f"{sharded}/model-00002-of-00002.safetensors: file is missing" in line
    assert toy.first.weight.is_meta


def test_index_and_shards_must_agree(sharded):
    index = sharded / "model.safetensors.index.json"
    content = read_json(index)
    content["weight_map"]["third.weight"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(content))
    line = failure(load_weights, meta(Toy), sharded)
    assert "model-00001-of-00002.safetensors: third.weight is only in the index model.safetensors.index.json" in line

    del content["weight_map"]["third.weight"], content["weight_map"]["first.bias"]
    index.write_text(json.dumps(content))
    assert "00002-of-00002.safetensors: first.bias is not in the index" in failure(load_weights, meta(Toy), sharded)

    for bad in ({}, {"weight_map": ["first.bias"]}, {"weight_map": {"first.bias": "../model.safetensors"}}):
        index.write_text(json.dumps(bad))
        assert "index.json: no weight_map from tensors to files beside it" in failure(load_weights, meta(Toy), sharded)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first.bias": None}, "1 of 4 tensors are missing, the first is first.bias: is its config.json"),
        ({"third.weight": torch.zeros(2)}, "1 have no place in it, the first is third.weight: is its config.json"),
        ({"first.bias": None, "third.weight": torch.zeros(2)}, "the first is first.bias; 1 have no place in it, the first is"),
        ({"first.weight": torch.zeros(3, 2)}, "first.weight has shape (3, 2), config.json asks for (2, 3)"),
        ({"first.bias": torch.zeros(2, dtype=torch.int8)}, "first.bias is torch.int8: quantised weights are not read"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, change, words):
    state = {k: v for k, v in (Toy().state_dict() | change).items() if v is not None}
    save_weights(state, tmp_path)
    line = failure(load_weights, meta(Toy), tmp_path)
    assert line.startswith(str(tmp_path)) and words in line


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", checkpoint.DTYPES.values())
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, dtype, value):
    state = Toy().state_dict()
    state["first.weight"][1, 2] = value
    save_weights(state, tmp_path)
    line = failure(load_weights, meta(Toy), tmp_path, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    assert line.startswith(f"{tmp_path}/model.safetensors: tensor first.weight of Toy holds NaN or infinity in {kind}: ")


def test_weights_too_large_for_fp16_say_so_and_those_whose_sum_is_too_large_load(tmp_path):
    state = Toy().state_dict()
    state["first.weight"].fill_(6e4)
    save_weights(state, tmp_path)
    assert load_weights(meta(Toy), tmp_path, dtype=torch.float16).first.weight.min() > 5.9e4
    state["first.weight"].fill_(7e4)
    save_weights(state, tmp_path)
    assert "in float16: try --dtype bf16 or fp32" in failure(load_weights, meta(Toy), tmp_path, dtype=torch.float16)
    assert load_weights(meta(Toy), tmp_path, dtype=torch.bfloat16).first.weight.min() > 6.9e4


def test_two_tensors_for_one_parameter(folder):
    line = failure(load_weights, meta(Toy), folder, rename=lambda name: name.replace("second", "first"))
    assert "tensors first.weight and second.weight are both first.weight of Toy" in line


def test_pickles_are_refused_with_a_conversion_that_works(tmp_path):
    toy = Toy()
    torch.save(toy.state_dict(), tmp_path / "pytorch_model.bin")
    line = failure(load_weights, meta(Toy), tmp_path)
    assert line.startswith(f"{tmp_path}: only safetensors is loaded, not pytorch_model.bin: convert it there with python -c ")
    code = line.split('"')[1]
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.equal(load_weights(meta(Toy), tmp_path).first.weight, toy.first.weight)
    for file in tmp_path.iterdir():
        file.rename(tmp_path / "Wan2.1_VAE.pth")
    words = f"{tmp_path}: only safetensors is loaded, not Wan2.1_VAE.pth: see `python -m tools.convert --help`"
    assert failure(load_weights, meta(Toy), tmp_path) == words


def test_no_weights_or_two_of_them(tmp_path):
    assert "no model.safetensors or diffusion_pytorch_model.safetensors here" in failure(load_weights, meta(Toy), tmp_path)
    for stem in checkpoint.STEMS:
        save_file({"a": torch.zeros(1)}, tmp_path / f"{stem}.safetensors")
    assert "holds both model.safetensors and diffusion_pytorch" in failure(load_weights, meta(Toy), tmp_path)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "file is missing"),
        (b'{"size": ', "not valid JSON"),
        (b"[1, 2]", "holds a JSON list where an object {...} is expected"),
        (b"\xff\xfe", "cannot be read as UTF-8 text"),
        (b'{"rope_theta": NaN}', "field 'rope_theta' is not a finite number"),
        (b'{"vision": {"eps": [1.0, -Infinity]}}', "field 'eps' is not a finite number"),
        (b'{"mlp_ratio": 1e999}', "field 'mlp_ratio' is not a finite number"),
        (b'{"size": 1, "layers": 2, "size": 3}', "field 'size' is there twice"),
        (b'{"size": ' + b"9" * 5000 + b"}", "not valid JSON (Exceeds the limit"),
        (b'{"size": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not valid JSON (it is nested too deeply)"),
        (b'{"a": ' * 100_000, "not valid JSON (it is nested too deeply)"),
    ],
)
def test_json_that_is_none(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    line = failure(read_json, tmp_path / "config.json")
    assert line.startswith(f"{tmp_path}/config.json: ") and words in line


# --- config.json and dataclasses ----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rope:
    theta: float
    sections: tuple[int, ...] = (8, 12, 12)


@dataclasses.dataclass
class Settings:
    layers: int
    rope: Rope
    bias: bool = False
    name: str | None = None
    patch: tuple[int, int] = (2, 2)


GOOD = {"layers": 2, "rope": {"theta": 10000, "sections": [1, 2]}, "_class_name": "Published", "torch_dtype": "bfloat16"}


def test_config_from_json():
    config = config_from_json(Settings, GOOD | {"name": None}, "config.json", ignore=("torch_dtype",))
    assert config == Settings(2, Rope(10000.0, (1, 2))) and isinstance(config.rope.theta, float)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layer": 2}, "config.json: unknown field layer: did you mean layers?"),
        ({"quantization": {}}, "config.json: unknown field quantization: remove it"),
        ({"layers": "2"}, 'config.json: field layers is "2", but int is expected'),
        ({"layers": True}, "config.json: field layers is true, but int is expected"),
        ({"layers": None}, "config.json: field layers is null, but int is expected"),
        ({"bias": 1}, "config.json: field bias is 1, but bool is expected"),
        ({"name": 3}, "config.json: field name is 3, but str is expected"),
        ({"patch": [2]}, "config.json: field patch is [2], but tuple[int, int] is expected"),
        ({"patch": [2, "2"]}, 'config.json: field patch is "2", but int is expected'),
        ({"rope": 3}, "config.json: field rope is 3, but Rope is expected"),
        ({"rope": {"theta": "x"}}, 'config.json: field rope: field theta is "x", but float is expected'),
        ({"rope": {"theta": 10**400}}, "config.json: field rope: field theta is 1" + "0" * 79 + ", but float is expected"),
        ({"lay\ners": 2}, "config.json: unknown field 'lay\\ners': did you mean layers?"),
        ({"rope": {}}, "config.json: field rope: field theta is missing: is this the config.json of a Rope?"),
    ],
)
def test_wrong_config_fields_are_named(change, words):
    assert failure(config_from_json, Settings, GOOD | change, "config.json", ignore=("torch_dtype",)) == words


MLLM_JSON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
    "vocab_size": 340, "rms_norm_eps": 1e-6, "rope_scaling": {"mrope_section": [4, 6, 6]}, "vision_config": {"hidden_size": 64},
}  # fmt: skip
IMPOSSIBLE = [
    ("mllm", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000, but it can only be from 1 to 256"),
    ("mllm", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("mllm", {"num_key_value_heads": 0}, "num_key_value_heads is 0"),
    ("mllm", {"hidden_size": 65}, "hidden_size must divide into the heads"),
    ("mllm", {"hidden_size": -64}, "hidden_size is -64"),
    ("mllm", {"vocab_size": 10**12}, "vocab_size is 1,000,000,000,000"),
    ("mllm", {"intermediate_size": 10**400}, "intermediate_size is 10,000,000,000,000,0..., but"),
    ("mllm", {"rms_norm_eps": -1.0}, "rms_norm_eps is -1"),
    ("mllm", {"rope_theta": 0.0}, "rope_theta is 0"),
    ("mllm", {"max_position_embeddings": 0}, "max_position_embeddings is 0"),
    ("mllm", {"text_config": [1]}, "field text_config is [1], but an object"),
    ("mllm", {"vision_config": 3}, "field vision_config is 3, but an object"),
    ("mllm", {"rope_scaling": "x"}, "field rope_scaling is 'x', but an object"),
    ("mllm", {"vision_config": {"hidden_size": 64, "depth": 10**9}}, "depth is 1,000,000,000"),
    ("mllm", {"vision_config": {"hidden_size": 64, "num_heads": 0}}, "num_heads is 0"),
    ("mllm", {"vision_config": {"hidden_size": 64, "spatial_merge_size": 0}}, "spatial_merge_size is 0"),
    ("dit", {"num_layers": 10**9}, "num_layers is 1,000,000,000, but it can only be from 1 to 256"),
    ("dit", {"num_attention_heads": 10**9}, "num_attention_heads is 1,000,000,000"),
    ("dit", {"num_attention_heads": 0}, "num_attention_heads is 0"),
    ("dit", {"attention_head_dim": 33}, "attention_head_dim is 33, it must be even"),
    ("dit", {"attention_head_dim": 8}, "attention_head_dim is 8"),
    ("dit", {"mlp_ratio": 1e300}, "mlp_ratio is 1e+300"),
    ("dit", {"mlp_ratio": -4.0}, "mlp_ratio is -4"),
    ("dit", {"rope_scale": [1.0, 0.0, 1.0]}, "rope_scale is 0"),
    ("dit", {"patch_size": [1, 0, 0]}, "patch_size is 0"),
    ("dit", {"_qk_norm_eps": 1e9}, "qk_norm_eps is 1e+09"),
    ("vae", {"base_dim": 10**9}, "base_dim is 1,000,000,000"),
    ("vae", {"num_res_blocks": 10**9}, "num_res_blocks is 1,000,000,000"),
    ("vae", {"dim_mult": [1] * 10_000}, "dim_mult has 10000 entries"),
    ("vae", {"dim_mult": []}, "dim_mult has 0 entries"),
    ("vae", {"latents_std": [0.0] + [1.0] * 15}, "latents_std is 0"),
    ("vae", {"latents_mean": [1e30] * 16}, "latents_mean is 1e+30"),
]
# 1 GB beside what importing takes, and 2 seconds for all of them.
REFUSE = """
import json, resource, sys, time
from checkpoint import InputError
from dit import DiTConfig
from model import MLLMConfig
from vae import VAEConfig
kinds = {"mllm": MLLMConfig, "dit": DiTConfig, "vae": VAEConfig}
pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * resource.getpagesize() + 10**9
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
began = time.process_time()
for part, values in json.load(sys.stdin):
    try:
        print("accepted:", kinds[part].from_json(values))
    except InputError as e:
        print(e)
print(time.process_time() - began)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the size of a process is read from Linux' /proc")
def test_configurations_that_cannot_be_are_one_line_at_once_and_in_little_memory():
    plain = {"mllm": MLLM_JSON, "dit": PRESETS["tiny"].to_json(), "vae": {}}
    asked = json.dumps([(part, plain[part] | change) for part, change, _ in IMPOSSIBLE])
    run = subprocess.run([sys.executable, "-c", REFUSE], cwd=ROOT, input=asked, capture_output=True, text=True, check=True)
    *lines, seconds = run.stdout.splitlines()
    assert float(seconds) < 2
    for line, (_, change, words) in zip(lines, IMPOSSIBLE, strict=True):
        assert words in line, (change, line)
    MLLMConfig.from_json(MLLM_JSON)  # without the change, they can be


# --- saving -------------------------------------------------------------------------------------------------------------


def test_a_later_save_leaves_nothing_of_the_former(sharded):
    toy = Toy()
    (sharded / "preprocessor_config.json").write_text("{}")
    save_weights(toy.state_dict(), sharded, {"size": 4})
    assert sorted(f.name for f in sharded.iterdir()) == ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert torch.equal(load_weights(meta(Toy), sharded).first.weight, toy.first.weight)
    save_weights(toy.state_dict(), sharded, shard_bytes=40)
    assert not (sharded / "model.safetensors").exists() and read_json(sharded / "config.json") == {"size": 4}
    assert torch.equal(load_weights(meta(Toy), sharded).first.weight, toy.first.weight)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before", [32, 10**9])
@pytest.mark.parametrize("after", [32, 10**9])
def test_a_save_killed_anywhere_never_mixes_old_and_new(tmp_path, monkeypatch, before, after):
    """Stop before the n-th change on disk, for every n: the folder holds the old state, the new one, or refuses to load."""
    old, new = Toy(), Toy()
    left, outcomes = 0, set()

    def stopping(change):
        def wrapped(*args, **options):
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed
            return change(*args, **options)

        return wrapped

    for n in range(100):
        folder = tmp_path / str(n)
        save_weights(old.state_dict(), folder, {"version": "old"}, shard_bytes=before)
        left = n
        try:
            with monkeypatch.context() as patch:
                for owner, name in ((os, "replace"), (Path, "unlink"), (Path, "mkdir"), (checkpoint, "save_file")):
                    patch.setattr(owner, name, stopping(getattr(owner, name)))
                save_weights(new.state_dict(), folder, {"version": "new"}, shard_bytes=after)
            finished = True
        except Killed:
            finished = False
        try:
            weight = load_weights(meta(Toy), folder).first.weight
            version = read_json(folder / "config.json")["version"]
            assert torch.equal(weight, {"old": old, "new": new}[version].first.weight)
            outcomes.add(version)
        except InputError as e:
            assert str(e) == f"{folder}: a save was interrupted here: use an earlier checkpoint, or save it again"
            outcomes.add("refused")
        if finished:
            break
        save_weights(old.state_dict(), folder)  # whatever was left does not stop the next one
        assert torch.equal(load_weights(meta(Toy), folder).first.weight, old.first.weight)
    assert finished and version == "new" and outcomes == {"old", "refused", "new"}


FILE_LIMIT = """
import resource, signal, sys, torch
from checkpoint import InputError, save_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_weights({"a": torch.ones(100_000)}, sys.argv[1])
except InputError as e:
    print(e)
"""


def test_a_full_disk_leaves_the_former_save(tmp_path):
    """A limit on the size of a file stands in for the disk."""
    save_weights({"a": torch.zeros(2)}, tmp_path)
    run = subprocess.run([sys.executable, "-c", FILE_LIMIT, tmp_path], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.startswith(f"{tmp_path}: cannot be written (") and run.stdout.count("\n") == 1
    assert [f.name for f in tmp_path.iterdir()] == ["model.safetensors"]


# --- names of folders, devices, types -----------------------------------------------------------------------------------


def test_resolve_local(folder, tmp_path, monkeypatch):
    assert resolve(folder) == resolve(str(folder)) == resolve(tmp_path, "toy") == resolve("toy", base=tmp_path) == folder
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve("~/toy") == folder
    assert failure(resolve, tmp_path, "dit") == f"{tmp_path}/dit: no such folder: {tmp_path} holds toy"
    file = folder / "model.safetensors"
    assert failure(resolve, file) == f"{file}: a file, but a checkpoint is a folder: name the folder that holds it"
    words = "nothing: no such folder, and a Hub name would have the form owner/name: check the path"
    assert failure(resolve, "nothing") == words


def test_a_path_that_is_not_there_is_not_looked_up_on_the_hub(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(checkpoint, "snapshot_download", None)  # whoever asks the Hub fails otherwise than with these words
    (tmp_path / "runs" / "stage1" / "mllm").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "runs")
    for path in (tmp_path / "nothing", "~/nothing", "../nothing/here"):
        assert failure(resolve, path) == f"{path}: no such folder: there is no nothing there: {tmp_path} holds runs, toy"
    assert failure(resolve, "./stage2") == "./stage2: no such folder: there is no stage2 there: did you mean stage1?"
    assert failure(resolve, "stage1/mlm").endswith("there is no mlm there: did you mean stage1/mllm?")
    assert failure(resolve, "stage1/mllm/deeper").endswith(f"no deeper there: {tmp_path}/runs/stage1/mllm holds no folder")
    assert "there is no runs there" in failure(resolve, "runs/nothing")  # the name of no owner on the Hub
    assert failure(resolve, "toy/dit", base=tmp_path).endswith(f"there is no dit there: {folder} holds no folder")
    monkeypatch.setattr(checkpoint, "snapshot_download", lambda repo, **_: folder / repo)
    for name in ("acme/duo", "acme/duo/mllm", "stage1/mlm@main"):  # a revision makes it the Hub's
        assert "json or safetensors files at revision main" in failure(resolve, name)


def test_pick_device(monkeypatch):
    assert pick_device("cpu") == torch.device("cpu")
    assert "device tpu: unknown, choose auto, cpu, cuda, cuda:N or mps" in failure(pick_device, "tpu")
    assert "device cuda:x: unknown" in failure(pick_device, "cuda:x")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda") and pick_device("cuda:1") == torch.device("cuda", 1)
    assert "device cuda:2: PyTorch" in failure(pick_device, "cuda:2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device() == torch.device("cpu")
    for name in ("cuda", "mps"):
        assert f"device {name}: PyTorch {torch.__version__} sees 0 of that kind here: choose auto" in failure(pick_device, name)


def test_parse_dtype():
    assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16
    assert (parse_dtype("fp32"), parse_dtype("fp16")) == (torch.float32, torch.float16)
    assert parse_dtype("auto") == torch.float32 and parse_dtype("auto", "cuda:0") == torch.bfloat16
    assert failure(parse_dtype, "int8") == "dtype int8: unknown, choose auto, bf16, fp32 or fp16"
