"""Every language model with every painter: sampling, offloading, both stages with a resume, and the plan."""

import inspect
import json
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import lora
import pipeline
import runs
from checkpoint import InputError, newest_sound, read_json
from conftest import make_parts
from dit import Painter
from families.registry import FAMILIES, PRESETS, family, family_of, load_model, preset, read_config
from families.wan import Wan, WanConfig
from model import LanguageModel
from pipeline import DuoGen, write_manifest
from tools import fit, plan
from train_stage1 import Stage1Config
from train_stage2 import Stage2Config

PAIRS = [(mllm.name, dit.name) for mllm in FAMILIES["mllm"] for dit in FAMILIES["dit"]]


@pytest.fixture(scope="module", params=PAIRS, ids=[f"{m}-{d[:3]}" for m, d in PAIRS])
def parts(request, tmp_path_factory) -> Path:
    folder = make_parts(tmp_path_factory.mktemp("pair"), *request.param)
    write_manifest(folder, pipeline.Settings(steps=2, guidance=3.0), (32, 48))
    return folder


@pytest.fixture
def duo(parts, monkeypatch):
    """Writes word, picture, word, picture, and ends. Gates that training opens are opened."""
    duo = DuoGen.from_pretrained(parts)
    g = torch.Generator().manual_seed(0)
    for p in duo.dit.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=g) * 0.1)
    script(duo, monkeypatch)
    return duo


def script(duo: DuoGen, monkeypatch) -> None:
    tokenizer = duo.tokenizer
    tokens = [*tokenizer.encode("a"), tokenizer.vision_start, *tokenizer.encode("b"), tokenizer.vision_start, tokenizer.im_end]
    written = Counter()

    def choose(logits, settings, generator):
        assert logits.isfinite().all()
        written[generator] += 1
        return tokens[written[generator] - 1]

    monkeypatch.setattr(duo, "choose", choose)


def difference(a: Image.Image, b: Image.Image) -> int:
    assert a.size == b.size
    return max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True))


def question(seed: int = 0) -> list[dict]:
    noise = torch.Generator().manual_seed(seed)
    pixels = (torch.rand(48, 64, 3, generator=noise) * 255).byte().numpy()
    parts = [{"type": "text", "text": "a red house"}, {"type": "image", "image": Image.fromarray(pixels)}]
    return [{"role": "user", "content": parts}]


def test_it_writes_and_paints(duo):
    """Alone and in a batch, and each picture hangs on what was said and shown before it."""
    asked = [question(), "a blue house"]
    alone = [duo.generate(m, index=i) for i, m in enumerate(asked)]
    together = duo.generate_many(asked)
    for a, b in zip(alone, together, strict=True):
        assert [len(x.pictures) for x in (a, b)] == [2, 2] and a.stop == b.stop == "end"
        assert all(difference(x.image, y.image) <= 1 for x, y in zip(a.pictures, b.pictures, strict=True))
    assert alone[0].pictures[0].image.size == (64, 48) and alone[1].pictures[0].image.size == (48, 32)
    again = duo.generate(question(), index=0)
    assert difference(again.pictures[1].image, alone[0].pictures[1].image) == 0
    for other in (duo.generate(question(seed=1), index=0), duo.generate(question(), duo.settings(use_condition_images=False))):
        assert difference(other.pictures[0].image, alone[0].pictures[0].image) > 1


class Strict(pipeline.Offload):
    """The CPU in place of a GPU. Weights that are away are NaN: who uses them without a call gets nonsense."""

    def leave(self, name):
        super().leave(name)
        for _, views in self.home[name]:
            for t, *_ in views:
                t.data = torch.full_like(t, torch.nan)


def test_offload_changes_nothing(duo, parts, monkeypatch):
    expected = duo.generate(question())
    monkeypatch.setattr(pipeline, "Offload", Strict)
    mllm, dit, vae = duo.mllm, duo.dit, duo.vae
    other = DuoGen(mllm, duo.tokenizer, duo.processor, dit, vae, duo.defaults, duo.size, offload=torch.device("cpu"))
    assert all(t.isnan().all() for part in (mllm, dit, vae) for t in pipeline.tensors_of(part))
    script(other, monkeypatch)
    answer = other.generate(question())
    assert all(difference(x.image, y.image) == 0 for x, y in zip(answer.pictures, expected.pictures, strict=True))


def bytes_of(run: Path) -> dict[str, bytes]:
    folder = newest_sound(run)
    return {f.name: f.read_bytes() for f in folder.rglob("*.safetensors")}


def test_stage_2_trains_and_resumes(parts, tmp_path):
    trains_and_resumes("stage2", parts, tmp_path)


@pytest.mark.parametrize("mllm", [f.name for f in FAMILIES["mllm"]])
def test_stage_1_trains_and_resumes(mllm, tmp_path):
    """There is no painter in it."""
    trains_and_resumes("stage1", make_parts(tmp_path / "parts", mllm), tmp_path)


def trains_and_resumes(kind: str, parts: Path, tmp_path: Path) -> None:
    """Two steps at once, and one and one: the same bytes."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    runs.run(kind, runs.config(kind, parts, straight, steps=2), tmp_path / "a.log")
    c = runs.config(kind, parts, halves, steps=2)
    runs.run(kind, c, tmp_path / "b.log", hook=(runs.signal_at, 0, 1, signal.SIGTERM))
    assert [f.name for f in halves.glob("step_*")] == ["step_000001"]
    assert "resumed" in runs.run(kind, c, tmp_path / "c.log")
    one, two = bytes_of(straight), bytes_of(halves)
    assert one.keys() == two.keys() and all(one[name] == two[name] for name in one)
    part = {"stage1": "mllm", "stage2": "dit"}[kind]
    own = newest_sound(straight) / part
    assert read_config(part, own) == read_config(part, parts / part)
    assert family(part, read_json(own / "config.json")).name == family(part, read_json(parts / part / "config.json")).name
    losses = [json.loads(line)["loss"] for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def test_a_new_pair_begins_with_a_new_connector(tmp_path):
    """A published painter knows no language model: the second stage makes a connector, sampling says that there is none."""
    folder = make_parts(tmp_path / "parts", "qwen3_vl", "WanTransformer3DModel")
    c = read_config("dit", folder / "dit")
    wan = family_of(c).Model.from_config(family_of(c).Config(2, 2, 32, ffn_dim=64, text_dim=8, freq_dim=16))
    wan.save_pretrained(folder / "dit")
    write_manifest(folder, pipeline.Settings(), (32, 32))
    with pytest.raises(InputError, match="no connector to a language model yet: train one"):
        DuoGen.from_pretrained(folder)
    printed = runs.run("stage2", runs.config("stage2", folder, tmp_path / "run", steps=1), tmp_path / "a.log")
    assert "connector: new, 512 numbers of a token -> 64" in printed
    assert DuoGen.from_pretrained(folder, dit=tmp_path / "run").dit.config.crossattn_proj_in_channels == 512


# ------------------------------------------------------------------------------------------------------------- adapters


def test_adapters_bring_the_connector_that_their_base_has_not(tmp_path):
    """LoRA on a published painter: base, adapters and connector are read as one, here and for a new language model."""
    folder = make_parts(tmp_path / "parts", "qwen3_vl", "WanTransformer3DModel")
    wan = Wan.from_config(WanConfig(2, 2, 32, ffn_dim=64, text_dim=8, freq_dim=16))
    wan.save_pretrained(folder / "dit")
    runs.run("stage2", runs.config("stage2", folder, tmp_path / "run", steps=1, lora=2), tmp_path / "a.log")
    own = newest_sound(tmp_path / "run") / "dit"
    assert not (own / "diffusion_pytorch_model.safetensors").exists()
    adapters = load_file(own / "adapter_model.safetensors")
    read = load_model("dit", own)
    assert torch.equal(read.crossattn_proj[0].weight, adapters["base_model.model.crossattn_proj.0.weight"])
    assert read.condition_embedder.text_embedder is None and torch.equal(read.proj_out.weight, wan.proj_out.weight)
    assert load_model("dit", own, features=40).crossattn_proj[0].weight.shape == (64, 40)


@pytest.mark.parametrize(("name", "per_layer"), [("tiny-qwen3-vl", 7), ("tiny-wan", 10)])
def test_adapters_have_the_names_of_the_library_of_their_model(name, per_layer):
    """Seven matrices of a decoder's layer, and ten of a painter's block; peft finds each of them by its name."""
    from diffusers import WanTransformer3DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    part = "mllm" if name in PRESETS["mllm"] else "dit"
    config = preset(part, name)
    with torch.device("meta"):
        own = family_of(config).Model(config)
        if part == "mllm":
            theirs = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_json()))
            depth = config.num_hidden_layers
        else:
            theirs = WanTransformer3DModel.from_config(config.to_json())
            depth = config.num_layers
    adapted = lora.layers(own)
    assert len(adapted) == per_layer * depth
    assert adapted.keys() <= {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}


# ------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plan_counts_what_the_formulas_say(stage):
    """On modules without bytes: a step of the largest micro-batch, within a hundredth."""
    flags = ["--plan", "--mllm", "tiny-qwen3-vl", "--picture", "64", "--text", "60"]
    config = Stage1Config
    if stage == 2:
        config = Stage2Config
        flags += ["--dit", "tiny-wan", "--vae", "tiny", "--documents", "1"]
    p = plan.planned(config, flags)
    batch, _ = p.batch(worst=True)
    assert p.step().flops == pytest.approx(sum(map(sum, p.flops(batch).values())), rel=0.01)
    assert "GB on each GPU: fits" in p.report()


def test_the_plan_of_a_published_pair():
    p = plan.planned(Stage2Config, ["--plan", "--mllm", "qwen3-vl-8B", "--dit", "wan2.1-14B", "--vae", "wan2.1"])
    # The published count, a connector of 36 x 4096 to 5120, and no text embedder.
    connector = 36 * 4096 * 5120 + 5120
    embedder = 4096 * 5120 + 5120**2 + 2 * 5120
    assert p.trained == 14_288_491_584 + connector - embedder
    assert p.states()["frozen weights"] == 2 * 8_767_123_696 + 4 * sum(x.numel() for x in p.vae.parameters())


@pytest.mark.parametrize(("mllm", "dit"), [("tiny-qwen3-vl", "tiny"), ("tiny", "tiny-wan")])
def test_what_sampling_takes_is_told_for_every_pair(mllm, dit):
    asked = {"height": 64, "width": 64, "max_images": 2, "max_tokens": 60, "steps": 2}
    f = fit.planned(None, {"mllm": mllm, "dit": dit, "vae": "tiny"}, asked, 1, 0, "bf16")
    assert f.need(offload=True) < f.need(offload=False)
    assert f.weights()["vision tower"] == 2 * sum(p.numel() for p in f.mllm.visual.parameters())
    assert "fits on" in f.report()


@pytest.mark.parametrize("part", ["mllm", "dit"])
def test_every_family_answers_the_whole_protocol(part):
    """And no less: each name that the rest of the system may ask for is there, with the arguments it may be given."""
    protocol = {"mllm": LanguageModel, "dit": Painter}[part]
    methods = {n: f for n, f in vars(protocol).items() if inspect.isfunction(f) and not n.startswith("_")}
    assert len(methods) >= 7 and len(protocol.__annotations__) >= 4
    tiny = [c for name, c in PRESETS[part].items() if name.startswith("tiny")]
    assert {type(c) for c in tiny} == {f.Config for f in FAMILIES[part]}
    for config in tiny:
        with torch.device("meta"):
            own = family_of(config).Model(config)
        assert all(hasattr(own, name) for name in protocol.__annotations__)
        for name, method in methods.items():
            asked = inspect.signature(method).parameters.keys() - {"self", "made_before"}
            assert asked <= inspect.signature(getattr(own, name)).parameters.keys(), name


def test_a_family_that_is_not_here_is_named():
    with pytest.raises(InputError, match="model_type is 'llama', and read are qwen2_5_vl, qwen3_vl"):
        family("mllm", {"model_type": "llama"})
    with pytest.raises(InputError, match="_class_name is 'FluxTransformer2DModel', and read are Cosmos"):
        family("dit", {"_class_name": "FluxTransformer2DModel"})
    with pytest.raises(InputError, match="big: no dit of that name, there are tiny, 2B, 14B, tiny-wan"):
        preset("dit", "big")
