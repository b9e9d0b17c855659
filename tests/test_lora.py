"""Adapters: beside frozen weights, in peft's files, merged, and resumed."""

import json
import signal
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import lora
import runs
from checkpoint import BUNDLED, InputError, newest_sound, part_folder, read_json
from conftest import make_parts
from connector import features
from dit import DiT
from flow import FlowLoss, Samples
from model import MLLM, mrope_positions
from ops import Segments
from test_resume import assert_same
from tools import merge, plan
from train_stage1 import Stage1Config
from train_stage2 import Stage2Config

IDS = torch.arange(40, 75)


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The small system, with a DiT that paints something: behind the closed gates of a fresh one adapters learn nothing."""
    folder = make_parts(tmp_path_factory.mktemp("parts"))
    dit = DiT.from_pretrained(folder / "dit")
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in dit.parameters():
            p += 0.05 * torch.randn(p.shape, generator=g)
    dit.save_pretrained(folder / "dit")
    return folder


def hidden(mllm: MLLM, gradients: bool = True) -> torch.Tensor:
    """As in a training; without gradients a product adds into its result, and rounds otherwise."""
    positions = mrope_positions(IDS, [], mllm.config.image_token_id)[0]
    with torch.set_grad_enabled(gradients):
        return torch.stack(mllm(IDS, positions, Segments([len(IDS)]))).detach()


def painted(dit: DiT) -> torch.Tensor:
    """The flow loss of each token: every weight has a say in it."""
    g = torch.Generator().manual_seed(1)
    sizes = dit.config.crossattn_proj_in_channels, dit.config.out_channels
    text = torch.randn(9, sizes[0], generator=g)
    latents = [torch.randn(sizes[1], 8, 8, generator=g) for _ in range(2)]
    samples = Samples(features=text, rows=[range(9)], latents=[latents], clean=[1])
    with torch.no_grad():
        return FlowLoss(dit, 0.0)(samples, torch.tensor([0.7]), g)[0]


def trained(model: nn.Module, rank: int = 3) -> nn.Module:
    """With adapters, and what is trained whole, that a training might have left."""
    lora.adapt(model, rank)
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.02 * torch.randn(p.shape, generator=g)
    return model


MODELS = {"mllm": (MLLM, hidden), "dit": (DiT, painted)}


@pytest.fixture(params=MODELS)
def part(request, parts):
    """(name, class, what it computes, its folder) of a small model."""
    kind, compute = MODELS[request.param]
    return request.param, kind, compute, parts / request.param


def test_rank_zero_is_the_model_itself(part):
    _, kind, compute, folder = part
    model = kind.from_pretrained(folder)
    before = compute(model)
    assert lora.adapt(model, 0) is model
    assert torch.equal(compute(model), before)
    assert all(p.requires_grad for p in model.parameters())


def test_fresh_adapters_change_no_bit(part):
    _, kind, compute, folder = part
    model = kind.from_pretrained(folder)
    before = compute(model)
    assert torch.equal(compute(lora.adapt(model, 4)), before)


def test_adapters_and_what_is_trained_whole_get_gradients_and_nothing_else_does(parts):
    dit = lora.adapt(DiT.from_pretrained(parts / "dit"), 4)
    open_to_training = {name for name, p in dit.named_parameters() if p.requires_grad}
    adapters = {name for name in open_to_training if name.endswith(("lora_A", "lora_B"))}
    assert open_to_training - adapters == {"crossattn_proj.0.weight", "crossattn_proj.0.bias"}
    # Ten matrices of a block: q, k, v, out of both attentions, and two of the MLP.
    assert len(adapters) == 2 * 10 * dit.config.num_layers
    mllm = lora.adapt(MLLM.from_pretrained(parts / "mllm"), 4)
    names = [name for name, p in mllm.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 7 * mllm.config.num_hidden_layers
    assert not [name for name in names if name.startswith("visual.")]


def test_a_seed_gives_the_same_adapters(parts):
    first, second = (lora.adapt(MLLM.from_pretrained(parts / "mllm"), 2) for _ in range(2) if torch.manual_seed(5))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_saved_and_read_again_they_are_merged_to_rounding(part, tmp_path):
    name, kind, compute, folder = part
    model = trained(kind.from_pretrained(folder))
    lora.save(model, tmp_path, str(folder))
    again = kind.from_pretrained(tmp_path)
    assert not any(isinstance(m, lora.Adapted) for m in again.modules())
    own, merged, base = compute(model), compute(again), compute(kind.from_pretrained(folder))
    rounding = (own - merged).abs().max()
    assert rounding <= 1e-5 * base.abs().max()
    assert (own - base).abs().max() > 50 * rounding  # they do something


def test_adapters_of_adapters_are_added_to_them(part, tmp_path):
    name, kind, compute, folder = part
    lora.save(trained(kind.from_pretrained(folder)), tmp_path / "one" / name, str(folder))
    second = trained(kind.from_pretrained(tmp_path / "one" / name), rank=2)
    lora.save(second, tmp_path / "two" / name, str(tmp_path / "one"))
    expected = compute(second)
    assert (compute(kind.from_pretrained(tmp_path / "two" / name)) - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_peft_loads_those_of_the_language_model(parts, tmp_path):
    peft = pytest.importorskip("peft", reason="peft is the reference here")
    from transformers import Qwen2_5_VLForConditionalGeneration

    mllm = trained(MLLM.from_pretrained(parts / "mllm"))
    lora.save(mllm, tmp_path, str(parts / "mllm"))
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(parts / "mllm", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path).eval()
    with torch.no_grad():
        out = theirs(input_ids=IDS[None], attention_mask=torch.ones(1, len(IDS)), output_hidden_states=True)
        ours = mllm.logits(hidden(mllm)[-1])
    assert (out.logits[0] - ours).abs().max() <= 5e-5


def test_peft_loads_those_of_the_dit(parts, tmp_path):
    """peft's own layers give the weights; both merged, every matrix is the same."""
    peft = pytest.importorskip("peft", reason="peft is the reference here")
    from diffusers import CosmosTransformer3DModel

    dit = trained(DiT.from_pretrained(parts / "dit"))
    lora.save(dit, tmp_path, str(parts / "dit"))
    theirs = CosmosTransformer3DModel.from_config(CosmosTransformer3DModel.load_config(parts / "dit"))
    theirs.load_state_dict(load_file(parts / "dit" / "diffusion_pytorch_model.safetensors"), strict=True)
    merged = peft.PeftModel.from_pretrained(theirs, tmp_path).merge_and_unload().state_dict()
    ours = DiT.from_pretrained(tmp_path).state_dict()
    assert merged.keys() == ours.keys()
    assert max((merged[name] - ours[name]).abs().max().item() for name in ours) <= 1e-6


def test_without_gradients_adapters_that_are_not_merged_count_too(parts):
    """Sheets of samples are written in the middle of a training."""
    mllm = trained(MLLM.from_pretrained(parts / "mllm"))
    assert (hidden(mllm) - hidden(mllm, gradients=False)).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["stage1", "stage2"])
def test_a_stopped_run_equals_the_straight_one(kind, parts, tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    runs.run(kind, runs.config(kind, parts, straight, lora=2), tmp_path / "a.log", 1)
    c = runs.config(kind, parts, halves, lora=2)
    runs.run(kind, c, tmp_path / "b.log", 1, (runs.signal_at, 0, 2, signal.SIGTERM))
    printed = runs.run(kind, c, tmp_path / "c.log", 1)
    assert "resumed" in printed and "adapters of rank 2" in printed
    assert_same(straight, halves)

    # What it saves is small, is read by name, and has learnt something.
    name = {"stage1": "mllm", "stage2": "dit"}[kind]
    model, compute = MODELS[name]
    folder = newest_sound(straight) / name
    assert not (folder / "model.safetensors").exists()
    learnt = compute(model.from_pretrained(part_folder(straight, name)))
    assert not torch.equal(learnt, compute(model.from_pretrained(parts / name)))

    # Merged it needs neither run nor base.
    merge.main([str(straight), str(tmp_path / "merged")])
    (folder / lora.CONFIG).unlink()
    assert torch.equal(compute(model.from_pretrained(tmp_path / "merged")), learnt)


def test_what_cannot_be_read_is_said(parts, tmp_path):
    folder = parts / "mllm"
    mllm = trained(MLLM.from_pretrained(folder))

    def spoilt(**changes) -> str:
        lora.save(mllm, tmp_path, str(folder))
        (tmp_path / lora.CONFIG).write_text(json.dumps(read_json(tmp_path / lora.CONFIG) | changes))
        with pytest.raises(InputError) as e:
            MLLM.from_pretrained(tmp_path)
        assert "\n" not in str(e.value)
        return str(e.value)

    assert "use_dora is True" in spoilt(use_dora=True)
    assert "rank_pattern" in spoilt(rank_pattern={"q_proj": 8})
    assert "bias is 'all'" in spoilt(bias="all")
    assert "no LoRA" in spoilt(peft_type="IA3")
    assert "no such folder" in spoilt(base_model_name_or_path="runs/nowhere")
    assert "names itself" in spoilt(base_model_name_or_path=str(tmp_path))

    # Files that are not what their configuration says.
    file = tmp_path / "adapter_model.safetensors"
    lora.save(mllm, tmp_path, str(folder))
    tensors = load_file(file)
    save_file(tensors | {"base_model.model.model.visual.x.lora_A.weight": torch.zeros(2, 2)}, file)
    with pytest.raises(InputError, match="1 tensors have no place in MLLM"):
        MLLM.from_pretrained(tmp_path)
    name = next(name for name in tensors if name.endswith("lora_B.weight"))
    save_file(tensors | {name: torch.zeros(5, 3)}, file)
    with pytest.raises(InputError, match="is of shape"):
        MLLM.from_pretrained(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="is missing"):
        MLLM.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="are whole already"):
        merge.main([BUNDLED, str(tmp_path / "merged")])


def test_flags_that_make_no_sense():
    with pytest.raises(InputError, match="--lora -1: must be 0 or more"):
        Stage2Config(lora=-1)
    with pytest.raises(InputError, match="--tower with --lora"):
        Stage1Config(lora=4, tower=BUNDLED)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_plan_counts_adapters(stage):
    """Its formulas against what a step on fake tensors does; and memory as with gradients for adapters alone."""
    flags = {1: plan.STAGE1 | {"checkpointing": False}, 2: plan.STAGE2}[stage]
    small = flags | {"mllm": "tiny", "dit": "tiny", "vae": "tiny", "picture": 64, "text": 100, "tokens": 400}
    if stage == 1:
        small.pop("dit")
        small.pop("vae")
    adapted = plan.example(small | {"lora": 2})
    whole = plan.example(small | {"lora": 0})
    assert adapted.trained < 0.1 * whole.trained
    assert adapted.memory()["AdamW"] == 8 * adapted.trained
    assert adapted.memory()["frozen weights"] > whole.memory()["frozen weights"]
    assert adapted.step().flops < whole.step().flops
    batch = replace(adapted.batch()[0])
    assert sum(map(sum, adapted.flops(batch).values())) < sum(map(sum, whole.flops(batch).values()))


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_of_adapters_by_formula_are_those_that_are_counted(stage):
    """At a size where thin matrices are thin."""
    flags = {1: plan.STAGE1 | {"checkpointing": False}, 2: plan.STAGE2}[stage]
    p = plan.example(flags | {"lora": 8, "mllm": "7B", "tokens": 1200, "targets": 1, "pictures": 1})
    formula = sum(map(sum, p.flops(p.batch(worst=True)[0]).values()))
    assert p.step().flops == pytest.approx(formula, rel=0.02)


def test_peft_and_we_scale_alike(parts, tmp_path):
    """lora_alpha / r of the file counts, not our own scale."""
    lora.save(trained(MLLM.from_pretrained(parts / "mllm"), rank=2), tmp_path, str(parts / "mllm"))
    config = read_json(tmp_path / lora.CONFIG)
    assert config["lora_alpha"] == 4
    base = MLLM.from_pretrained(parts / "mllm").model.layers[0].mlp.up_proj.weight
    once = MLLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight - base
    (tmp_path / lora.CONFIG).write_text(json.dumps(config | {"lora_alpha": 2}))
    half = MLLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight - base
    torch.testing.assert_close(once, 2 * half, atol=1e-6, rtol=1e-4)


def test_connectors_are_saved_whole(parts, tmp_path):
    """Nobody has trained them before, so there is nothing to adapt."""
    dit = trained(DiT.from_pretrained(parts / "dit"))
    lora.save(dit, tmp_path, str(parts / "dit"))
    assert torch.equal(DiT.from_pretrained(tmp_path).crossattn_proj[0].weight, dit.crossattn_proj[0].weight)
    states = [torch.randn(3, 8) for _ in range(2)]
    assert features(states).shape == (3, 16)
