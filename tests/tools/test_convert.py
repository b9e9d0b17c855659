"""Original pickles to our layout: every name, hostile and damaged files, and one line for each mistake."""

import argparse
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import dit
import vae
from checkpoint import InputError
from tools import convert
from tools.convert import COSMOS_NAMES, cosmos_names, main, read_original, translate, wan_names

ROOT = Path(__file__).parent.parent.parent
WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = dit.DiTConfig(2, 2, 16, adaln_lora_dim=8, text_embed_dim=24, crossattn_proj_in_channels=40)
SMALL = vae.VAEConfig(base_dim=4, num_res_blocks=1)
Q = "blocks.1.self_attn.q_proj.weight"


class Evil:
    """Runs a command when it is unpickled by anything that calls what a pickle names."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


class Listlike(list):
    """A pickle appends to it and sets its state."""


@pytest.fixture(autouse=True)
def presets(monkeypatch):
    monkeypatch.setitem(dit.PRESETS, "2B", TINY)
    monkeypatch.setitem(vae.PRESETS, "wan2.1", SMALL)


def weights(names: dict, dtype=torch.float32) -> dict[str, torch.Tensor]:
    return {original: torch.randn(shape).to(dtype) for original, (_, shape) in names.items()}


def cosmos(prefix: str = "net.", dtype=torch.bfloat16) -> OrderedDict:
    """A file as NVIDIA's training leaves it, extras and all."""
    state = OrderedDict((prefix + name, value) for name, value in weights(cosmos_names(TINY), dtype).items())
    for name in ("accum_video_sample_counter", "accum_image_sample_counter", "accum_iteration", "accum_train_in_hours"):
        state[prefix + name] = torch.tensor(7)
    for name, n in (("seq", 128), ("dim_spatial_range", 21), ("dim_temporal_range", 22)):
        state[f"{prefix}pos_embedder.{name}"] = torch.arange(n).float()
    for block in range(2):
        for norm in ("self_attn.q_norm", "self_attn.k_norm", "cross_attn.q_norm"):
            state[f"{prefix}blocks.{block}.{norm}._extra_state"] = io.BytesIO(b"\x80\x02pickled inside")
    state[f"{prefix}blocks.0.cross_attn.k_norm._extra_state"] = torch.zeros(8, dtype=torch.uint8)
    state._metadata = OrderedDict(version=1)  # what nn.Module.state_dict leaves on the dictionary
    return state


def read(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / WEIGHTS, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}


def run(capsys, *argv) -> str:
    """The one line of an error that the command line must end with."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in argv])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ----------------------------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(("layers", "heads", "count"), [(28, 16, 569), (36, 40, 729)])
def test_cosmos_names_are_one_to_one(layers, heads, count):
    names = cosmos_names(dit.DiTConfig(num_layers=layers, num_attention_heads=heads))
    ours = [name for name, _ in names.values()]
    assert len(names) == len(set(ours)) == count
    for original, (name, _) in names.items():
        assert translate(original, COSMOS_NAMES, back=True) == name
    assert layers != 28 or sum(torch.Size(shape).numel() for _, shape in names.values()) == 2_059_174_912


def test_published_names(shared):
    folder = shared / "cosmos-predict2.5-2b-derived"
    for part, names in (("transformer", cosmos_names(dit.DiTConfig())), ("vae", wan_names(vae.VAEConfig()))):
        published = json.loads((folder / part / "tensor_shapes.json").read_text())
        assert {name: list(shape) for name, shape in names.values()} == published, part
        assert len(names) == len(published) == {"transformer": 569, "vae": 194}[part]


def test_a_few_names_by_hand():
    cosmos, wan = cosmos_names(dit.DiTConfig()), wan_names(vae.VAEConfig())
    for original, name in {
        "x_embedder.proj.1.weight": "patch_embed.proj.weight",
        "t_embedder.1.linear_2.weight": "time_embed.t_embedder.linear_2.weight",
        "blocks.27.adaln_modulation_cross_attn.2.weight": "transformer_blocks.27.norm2.linear_2.weight",
        "blocks.3.cross_attn.output_proj.weight": "transformer_blocks.3.attn2.to_out.0.weight",
        "blocks.3.self_attn.k_norm.weight": "transformer_blocks.3.attn1.norm_k.weight",
        "blocks.0.mlp.layer2.weight": "transformer_blocks.0.ff.net.2.weight",
        "final_layer.adaln_modulation.1.weight": "norm_out.linear_1.weight",
    }.items():
        assert cosmos[original][0] == name
    for original, name in {
        "conv1.weight": "quant_conv.weight",
        "encoder.conv1.weight": "encoder.conv_in.weight",
        "encoder.middle.2.residual.3.gamma": "encoder.mid_block.resnets.1.norm2.gamma",
        "encoder.downsamples.5.time_conv.bias": "encoder.down_blocks.5.time_conv.bias",
        "decoder.middle.1.to_qkv.weight": "decoder.mid_block.attentions.0.to_qkv.weight",
        "decoder.upsamples.3.resample.1.weight": "decoder.up_blocks.0.upsamplers.0.resample.1.weight",
        "decoder.upsamples.4.shortcut.weight": "decoder.up_blocks.1.resnets.0.conv_shortcut.weight",
        "decoder.upsamples.14.residual.6.bias": "decoder.up_blocks.3.resnets.2.conv2.bias",
        "decoder.head.2.weight": "decoder.conv_out.weight",
    }.items():
        assert wan[original][0] == name
    with pytest.raises(LookupError):
        translate("blocks.0.self_attn.q_proj.weight.", COSMOS_NAMES, back=True)


# ------------------------------------------------------------------------------------------------------------ round trips


def test_dit(tmp_path, capsys):
    state = cosmos()
    torch.save(state, tmp_path / "model.pt")
    main(["dit", str(tmp_path / "model.pt"), str(tmp_path / "dit")])
    out = capsys.readouterr().out
    assert "49/49 tensors" in out and "14 entries" in out
    tensors = read(tmp_path / "dit")
    for original, (name, _) in cosmos_names(TINY).items():
        assert tensors.pop(name).dtype == torch.bfloat16
        assert torch.equal(read(tmp_path / "dit")[name], state["net." + original])
    assert not tensors
    loaded = dit.DiT.from_pretrained(tmp_path / "dit")
    assert loaded.config == TINY
    assert torch.equal(loaded.transformer_blocks[1].attn1.to_q.weight, state["net." + Q].float())


@pytest.mark.parametrize(("flags", "prefix"), [([], "net_ema."), (["--live"], "net.")])
def test_averaged_and_live_weights(tmp_path, flags, prefix):
    state = cosmos("net.") | cosmos("net_ema.", torch.float32)
    torch.save(state, tmp_path / "model.pt")
    main(["dit", str(tmp_path / "model.pt"), str(tmp_path / "dit"), *flags])
    assert torch.equal(read(tmp_path / "dit")["transformer_blocks.1.attn1.to_q.weight"], state[prefix + Q])


def test_vae_equals_diffusers_from_the_same_weights(tmp_path):
    from diffusers import AutoencoderKLWan

    state = {k: 0.3 * v for k, v in weights(wan_names(SMALL)).items()}
    torch.save(state, tmp_path / "Wan2.1_VAE.pth")
    main(["vae", str(tmp_path / "Wan2.1_VAE.pth"), str(tmp_path / "vae")])
    ref, report = AutoencoderKLWan.from_pretrained(tmp_path / "vae", output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(ref.decoder.up_blocks[1].upsamplers[0].time_conv.weight, state["decoder.upsamples.5.time_conv.weight"])
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        ours = vae.VAE.from_pretrained(tmp_path / "vae").encode(x)[0]
        torch.testing.assert_close(ref.encode(x[:, :, None]).latent_dist.mode()[:, :, 0], ours, atol=1e-4, rtol=1e-4)


def test_views_and_shared_storages(tmp_path):
    state = cosmos()
    w, k = "net." + Q, "net.blocks.0.self_attn.k_proj.weight"
    base = torch.randn(3, *state[w].shape)
    state[w], state[k] = base[1].T, base[1]  # transposed, a slice of something larger, and one storage twice
    state["net.blocks.0.self_attn.v_proj.weight"] = state[k]
    state["net.blocks.1.self_attn.v_proj.weight"] = torch.nn.Parameter(base[2])
    state["net.blocks.1.self_attn.k_proj.weight"] = torch.randn(1, state[w].shape[1]).expand(state[w].shape)
    torch.save(state, tmp_path / "model.pt")
    main(["dit", str(tmp_path / "model.pt"), str(tmp_path / "dit")])
    tensors = read(tmp_path / "dit")
    for original, (name, _) in cosmos_names(TINY).items():
        assert torch.equal(tensors[name], state["net." + original]), name


def test_tensors_are_views_of_the_file(tmp_path):
    torch.save({"a": torch.arange(6.0), "empty": torch.zeros(0, 3), "i": torch.tensor([True])}, tmp_path / "x.pt")
    entries = read_original(tmp_path / "x.pt")
    assert entries["a"].tolist() == [0, 1, 2, 3, 4, 5]
    mapped = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("/x.pt")]
    assert any(int(start, 16) <= entries["a"].data_ptr() < int(end, 16) for start, end in mapped)
    assert entries["empty"].shape == (0, 3) and entries["i"].item() is True


# ---------------------------------------------------------------------------------------------------------- hostile files


DROPPED = "net.blocks.0.self_attn.q_norm._extra_state"


@pytest.mark.parametrize("key", [DROPPED, "net." + Q, "net.surprise", "surprise"])
@pytest.mark.parametrize("deep", [False, True])
def test_code_in_a_pickle_never_runs(tmp_path, capsys, key, deep):
    trace = tmp_path / "trace"
    torch.save(cosmos() | {key: [{"deep": Evil(trace)}] if deep else Evil(trace)}, tmp_path / "model.pt")
    err = run(capsys, "dit", tmp_path / "model.pt", tmp_path / "dit")
    assert f"asks for {os.system.__module__}.system, which is no part of a tensor; nothing of it was run" in err
    assert not trace.exists() and not (tmp_path / "dit").exists()
    torch.load(tmp_path / "model.pt", weights_only=False)  # the trap itself works
    assert trace.exists()


def test_what_is_refused_even_under_a_key_that_is_dropped(tmp_path, capsys):
    """Harmless objects of other classes, and a pickle protocol that torch.save does not write by itself."""
    path, out = tmp_path / "x.pt", tmp_path / "dit"
    torch.save(cosmos() | {DROPPED: [argparse.Namespace(a=1), Listlike([1, 2])]}, path)
    assert "asks for argparse.Namespace, test_convert.Listlike, which" in run(capsys, "dit", path, out)
    torch.save(cosmos(), path, pickle_protocol=4)
    assert "no sound file of torch.save (Unsupported operand 149)" in run(capsys, "dit", path, out)


@pytest.mark.parametrize("kind", ["sparse", "meta", "wrapper"])
def test_tensors_without_bytes_of_their_own_are_no_weights(tmp_path, capsys, kind):
    tensor = torch.ones(32, 32).to_sparse() if kind == "sparse" else torch.ones(32, 32, device="meta")
    torch.save(cosmos() | {"net." + Q: tensor if kind != "wrapper" else {"a": tensor}}, tmp_path / "x.pt")
    assert f"key net.{Q} is a " in run(capsys, "dit", tmp_path / "x.pt", tmp_path / "dit")


def with_pickle(path: Path, program: bytes) -> Path:
    """A file of torch.save with another data.pkl."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", program)
        archive.writestr("x/data/0", b"\0" * 8)
        archive.writestr("x/version", "3\n")
    return path


def text(value: bytes) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def storage(kind: bytes = b"storage", numel: int = 2) -> bytes:
    """2 floats, by pickle opcodes."""
    return b"(" + text(kind) + b"ctorch\nFloatStorage\n" + text(b"0") + text(b"cpu") + number(numel) + b"tQ"


ONE, TWO = b"(" + number(1) + b"t", b"(" + number(2) + b"t"


def tensor(offset=0, shape=TWO, stride=ONE, **options) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(**options) + number(offset) + shape + stride + b"\x89NtR"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + text(b"a") + tensor(offset=1) + b"s.", "not resizable"),
        (b"}" + text(b"a") + tensor(offset=-1) + b"s.", "invalid storage offset"),
        (b"}" + text(b"a") + tensor(shape=b"(" + number(-2) + b"t") + b"s.", "no sound file"),
        (b"}" + text(b"a") + tensor(stride=b"(" + number(1) * 2 + b"t") + b"s.", "unequal size length"),
        (b"}" + text(b"a") + tensor(shape=b"N") + b"s.", "no sound file"),
        (b"}" + text(b"a") + tensor(kind=b"module") + b"s.", "no sound file"),
        (b"}" + text(b"a") + tensor(shape=b"(" + number(1 << 20) + b"t", numel=1 << 20) + b"s.", "not resizable"),
        (b"}" + text(b"a") + b"(" + number(1) + b"tR.", "unrecognized function"),  # calls a string
        (b"cos\nsystem\n(" + text(b"true") + b"tR.", "asks for os.system"),
        (b"cbuiltins\neval\n.", "asks for builtins.eval"),
        (b"c_io\nBytesIO\n.", "holds a type, not a dictionary"),
        (b"}" + number(1) + number(2) + b"s.", "not a dictionary of named tensors"),
        (b"].", "holds a list, not a dictionary"),
        (b"\x80\x02}q\x00X\xff\xff\xff\x00ab.", "no sound file"),
        (b"", "no sound file"),
        (pickle.dumps({"a": 1}, 2)[:-1], "no sound file"),
        (b"ctorch\nFloatStorage\n}" + text(b"a") + number(1) + b"sb.", "no sound file"),  # sets an attribute of a class
        (b"ccollections\nOrderedDict\n)R}" + text(b"items") + text(b"trap") + b"sb.", "missing"),  # an `items` of its own
    ],
)
def test_malformed_pickles(tmp_path, capsys, program, message):
    err = run(capsys, "vae", with_pickle(tmp_path / "x.pth", program), tmp_path / "vae")
    assert message in err and "will likely succeed" not in err, err  # torch's own advice is to run the file


@pytest.mark.parametrize("code", [False, True])
def test_damage_anywhere_is_one_line(tmp_path, code):
    """Bytes flipped at random, most of them in the pickle: the file is read, or refused as a user's error, and nothing runs."""
    path, trace, rng = tmp_path / "x.pt", tmp_path / "trace", random.Random(0)
    torch.save(cosmos() | {DROPPED: [Evil(trace)] if code else []}, path)
    data, refused = path.read_bytes(), 0
    with zipfile.ZipFile(path) as archive:
        program = archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    start = data.index(program)
    for _ in range(100):
        broken = bytearray(data)
        for _ in range(3):
            at = start + rng.randrange(len(program)) if rng.random() < 0.7 else rng.randrange(len(data))
            broken[at] = rng.randrange(256)
        path.write_bytes(broken)
        try:
            convert.convert(path, read_original(path), cosmos_names(TINY), "net.", None, convert.COSMOS_DROPPED)
        except InputError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 50 and not trace.exists()


def test_names_cannot_command_the_terminal(tmp_path, capsys):
    torch.save({"net.\x1b[31m\nred": torch.zeros(1)}, tmp_path / "x.pt")
    err = run(capsys, "dit", tmp_path / "x.pt", tmp_path / "dit")
    assert "\\x1b[31m\\nred" in err and "\x1b" not in err


# ---------------------------------------------------------------------------------------------------------- user mistakes


def drop(state, key):
    return {k: v for k, v in state.items() if k != key}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s | {"net.blocks.2.mlp.layer1.weight": torch.zeros(1)}, "mlp.layer1.weight (a tensor) has no place"),
        (lambda s: drop(s, "net." + Q), f"1 of 49 tensors are missing, the first is net.{Q}"),
        (lambda s: s | {"net." + Q: torch.zeros(32, 31)}, f"key net.{Q} has shape (32, 31), the config asks for (32, 32)"),
        (lambda s: s | {"net." + Q: torch.zeros(32, 32, dtype=torch.int64)}, "torch.int64"),
        (lambda s: s | {"net." + Q: 3}, f"key net.{Q} is a int, not a tensor"),
        (lambda s: {"model": s}, "key model (a OrderedDict) has no place"),
    ],
)
def test_wrong_entries(tmp_path, capsys, change, message):
    torch.save(change(cosmos()), tmp_path / "model.pt")
    assert message in run(capsys, "dit", tmp_path / "model.pt", tmp_path / "dit")
    assert not (tmp_path / "dit").exists()


def test_wrong_files(tmp_path, capsys):
    good, bad, out = tmp_path / "good.pt", tmp_path / "bad.pt", tmp_path / "out"
    torch.save(cosmos(), good)
    data = good.read_bytes()
    for content, message in {
        data[: len(data) // 2]: "cut off or damaged",
        data[:20]: "cut off or damaged",
        b"": "not in the zip format",
        b"version https://git-lfs.github.com/spec/v1\n": "not in the zip format",
        data.replace(b"data/3", b"data/#"): "failed locating file data/3",
    }.items():
        bad.write_bytes(content)
        assert message in run(capsys, "dit", bad, out)
    torch.save(cosmos(), bad, _use_new_zipfile_serialization=False)
    assert "legacy" in run(capsys, "dit", bad, out)
    with zipfile.ZipFile(bad, "w") as archive:
        archive.writestr("readme.txt", "hello")
    assert "no sound file of torch.save" in run(capsys, "dit", bad, out)
    with zipfile.ZipFile(bad, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({}) * 9)
    assert "compressed" in run(capsys, "dit", bad, out)
    assert "no such file" in run(capsys, "dit", tmp_path / "none.pt", out)
    assert not out.exists()


def test_command_line(tmp_path, capsys):
    """The script as a user starts it: one line and status 2, no traceback; an unknown option is refused."""
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    argv = [sys.executable, "-m", "tools.convert", "dit", "x.pt", "out"]
    done = subprocess.run(argv, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: x.pt: key a (a tensor) has no place in this network; see --config\n"
    for options in (["dit", "--confg", "2B"], ["vae", "--config", "3B"], ["vae", "--live"]):
        with pytest.raises(SystemExit) as stop:
            main([*options, "x.pt", "out"])
        assert stop.value.code == 2


def test_nothing_but_tensors_and_buffers_is_allowed(tmp_path):
    """What is added to torch's own list is the security of this script: whoever extends it must come past here."""
    assert convert.SAFE == [io.BytesIO]
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    read_original(tmp_path / "x.pt")
    assert io.BytesIO not in torch.serialization.get_safe_globals()  # nothing of it stays behind
