"""The plan against PyTorch: FLOPs by FlopCounterMode on real modules, memory by its record of allocations."""

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import dit
import flops
import model
import ops
import train_stage1
import train_stage2
import vae
from bench.measure import peak
from checkpoint import InputError
from flops import Batch
from tools import plan
from train_stage1 import Stage1Config
from train_stage2 import Stage2Config
from training import parse_config

ROOT = Path(__file__).parent.parent.parent
TINY = dataclasses.replace(model.PRESETS["tiny"], vocab_size=2048)
PAINTER, CODER = dit.PRESETS["tiny"], vae.PRESETS["tiny"]


def tiny(stage: int, make) -> dict[str, nn.Module]:
    modules = {"mllm": make(model.MLLM, TINY)}
    if stage == 2:
        modules["mllm"].requires_grad_(False)
        modules |= {"dit": make(dit.DiT, PAINTER), "vae": make(vae.VAE, CODER).requires_grad_(False)}
    return modules


def real(kind: type, config) -> nn.Module:
    return kind.from_config(config)


def batch_of(stage: int, documents: int, text: int, grid: tuple[int, int], pictures: int = 1, side: int = 32):
    """Fake documents, of each the last picture as the target, and their sizes."""
    supervised = text // 3
    sides = [side] * pictures if stage == 2 else []
    fake = [plan.pretend_document(TINY, text, [grid] * pictures, supervised, sides) for _ in range(documents)]
    tokens = len(fake[0])
    sizes = {"grids": [grid] * pictures * documents}
    if stage == 1:
        return fake, [], Batch.of(TINY, [tokens] * documents, supervised=supervised * documents, **sizes)
    samples = [(d, pictures, tokens - 3) for d in range(documents)]
    sizes["samples"] = [([(side // 16) ** 2] * pictures, tokens - 3)] * documents
    return fake, samples, Batch.of(TINY, [tokens] * documents, pictures=[(side, side)] * pictures * documents, **sizes)


def filled(document):
    """The same document with bytes."""
    pictures = [torch.rand(p.shape) for p in document.pictures]
    return dataclasses.replace(document, pixels=torch.randn(document.pixels.shape), pictures=pictures)


def attention_flops(q, k, causal: bool) -> int:
    """Two products over the pairs that are read. Shapes (S, heads, L, D); causal: L is the same on both sides."""
    pairs = q[2] * (q[2] + 1) // 2 if causal else q[2] * k[2]
    return 4 * q[0] * q[1] * q[3] * pairs


def counted(step) -> int:
    # The counter knows neither the product that adds into its result nor attention on the CPU, whose backward pass has four
    # products, without the fifth that repeats the scores.
    aten = torch.ops.aten
    more = {
        aten.addmm_: lambda out, a, b, out_val=None, **_: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, dropout=0, causal=False, **_: attention_flops(
            q, k, causal
        ),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda do, q, k, v, o, lse, dropout, causal, **_: (
            2 * attention_flops(q, k, causal)
        ),
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "case",
    [(1, 1, 30, (8, 8)), (1, 3, 90, (8, 12)), (1, 2, 150, (10, 6)), (2, 1, 20, (4, 4)), (2, 3, 50, (8, 4), 4, 96)],
)
def test_flops(case):
    """Of a real step, of the same without its bytes, and by the formulas."""
    fake, samples, b = batch_of(*case)
    expected = sum(map(sum, flops.flops(case[0], TINY, b, PAINTER, CODER).values()))
    modules, documents = tiny(case[0], real), [filled(d) for d in fake]
    assert counted(lambda: plan.run_step(modules, documents, samples, torch.float32)) == pytest.approx(expected, rel=0.01)
    for dtype in (torch.float32, torch.bfloat16):
        tally = plan.tally_step(tiny(case[0], plan.pretend), fake, samples, dtype)
        assert tally.flops == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "wan2.1"])
def test_flops_of_the_vae_encoder(name):
    c = vae.PRESETS[name]
    module, x = plan.pretend(vae.VAE, c), plan.pretend_tensor(1, 3, 96, 64)
    with plan.Tally(module, x) as tally, torch.no_grad():
        module.encode(x)
    assert tally.flops == pytest.approx(flops.encoder_flops(c, 96, 64), rel=0.01)


def test_how_many_data_workers_a_gpu_needs(one, two):
    """What is trained in a second against what a worker prepares; a small picture is prepared faster by its area."""
    for p, documents in ((one, 2), (two, 1)):
        trained, prepared = p.reading()
        assert trained == pytest.approx(documents / p.schedule()[0]) and prepared == plan.PHOTOS[p.stage] / 5
        assert p.but(picture=240).reading()[1] == 4 * prepared
        assert f"data: {trained:.1f} documents/s on each GPU" in p.report() and "so --workers 1 for each" in p.report()


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_at_full_size(stage, one, two):
    p = one if stage == 1 else two
    b, _ = p.batch(worst=True)
    counted = p.but(checkpointing=False).step().flops
    assert counted == pytest.approx(sum(map(sum, p.flops(b).values())), rel=0.01)


@pytest.fixture(scope="module")
def one():
    """Stage 1 with the 7B on one H200."""
    return plan.example(plan.STAGE1)


@pytest.fixture(scope="module")
def two():
    return plan.example(plan.STAGE2)


def test_full_size_flops_are_those_of_the_literature():
    """Known figures: one pass of the 2B DiT over 480 px and 1024 px, 1 + 4 pictures, 512 tokens; of the 7B over 2048 tokens."""
    for patches, expected in ((900, 19.97e12), (4096, 165.96e12)):
        b = Batch.of(TINY, [], samples=[([patches] * 5, 512)])
        forward, _ = flops.flops(2, TINY, b, dit.PRESETS["2B"], vae.PRESETS["wan2.1"])["DiT"]
        assert forward == pytest.approx(expected, rel=0.01)
    seven = model.PRESETS["7B"]
    assert flops.flops(1, seven, Batch.of(seven, [2048]))["decoder"][0] == pytest.approx(27.6e12, rel=0.01)


def measured(module, step) -> int:
    """Bytes at the highest moment of a step, by PyTorch's own record of every allocation and release."""

    def training() -> None:
        average = [p.detach().clone() for p in module.parameters()]
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        for p in module.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # from here on there are moments
        optimizer.zero_grad()
        step()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in module.parameters()], 0.1)

    return 4 * flops.count(module) + peak(training, torch.device("cpu"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stage", [1, 2])
def test_memory_of_a_step(stage, dtype, checkpointing, monkeypatch):
    """Weights, gradients, moments, EMA, activations and casts together, alive at one moment."""
    # The plan is a GPU's, where attention stays in bf16.
    monkeypatch.setattr(ops, "slow_in_bf16", lambda q: False)
    n, side = (300, 10) if dtype == torch.bfloat16 else (600, 24)  # emulated bf16 is slow on most CPUs
    case = (1, 1, n, (side, side)) if stage == 1 else (2, 1, 100, (4, 4), 3, 8 * side)
    fake, samples, _ = batch_of(*case)
    modules, documents = tiny(stage, real), [filled(d) for d in fake]
    trained = modules.get("dit", modules["mllm"])
    got = measured(trained, lambda: plan.run_step(modules, documents, samples, dtype, checkpointing))
    rest = plan.tally_step(tiny(stage, plan.pretend), fake, samples, dtype, checkpointing).top
    states = 16 * flops.count(trained)
    assert states + rest == pytest.approx(got, rel=0.05)  # weights, two moments and EMA are certain:
    assert rest == pytest.approx(got - states, rel=0.08)  # what stands beside them must be right too


def test_a_tally_counts_what_is_alive():
    x = plan.pretend_tensor(1000)
    attend = ops._packed_attention
    with plan.Tally(x) as tally:
        y = x * 2  # 4,000 bytes
        view = y.view(10, 100)
        del y
        assert (tally.live, tally.top) == (4000, 4000)  # its view keeps it
        z = view.bfloat16()
        del view
        assert (tally.live, tally.top) == (2000, 6000)
        z.add_(1)
        x.mul_(2)
        assert (tally.live, tally.top) == (2000, 6000)
    del z
    assert tally.live == 0 and ops._packed_attention is attend


def test_gradients_stay_or_come_in_their_turn():
    """All of them are there at the end, and nothing else."""
    fake, _, _ = batch_of(1, 1, 60, (8, 8))
    modules = tiny(1, plan.pretend)
    tally = plan.tally_step(modules, fake)
    p = 4 * flops.count(modules["mllm"])
    assert tally.gradients == p and tally.live == pytest.approx(0, abs=1e5)
    assert max(p, tally.passing) <= tally.top < tally.passing + p


def test_what_does_not_fit_is_said_with_its_remedy(one, two):
    """fp32 AdamW for all of the 7B is 133 GB of weights and states, without gradients and EMA: one H200 cannot train it."""
    sizes = one.memory()
    assert (sizes["weights"] + sizes["gradients"] + sizes["AdamW"]) / 1e9 == pytest.approx(133, abs=0.5)
    assert "does not fit" in one.advice() and "--zero --world" in one.advice()
    world = int(one.advice().split()[-1])
    totals = [one.but(zero=True, world=n).total for n in (world // 2, world)]
    assert totals[0] > 141 > totals[1]
    assert "not at all under DDP, which keeps 100 GB" in one.but(gpu_memory=90).advice()
    whole = plan.example(plan.STAGE1, mllm="32B", world=64, zero=True).states()
    assert (whole["weights"] + whole["gradients"] + whole["EMA"]) / 1e9 == pytest.approx(401, abs=0.5)
    assert plan.example(plan.STAGE1, mllm="3B").advice() == "fits: 77.6 of 141 GB"
    held = {d: plan.example(plan.STAGE2, frozen_dtype=d).states()["frozen weights"] for d in ("fp32", "bf16", "auto")}
    assert held["auto"] == held["bf16"] == held["fp32"] - 2 * flops.count(one.mllm)  # the VAE stays fp32
    small = two.but(gpu_memory=70)
    assert "does not fit" in small.advice() and small.advice().endswith("--checkpointing")
    assert small.but(checkpointing=True).advice().startswith("fits")


def test_weights_that_are_tied_are_counted_once():
    three = plan.pretend(model.MLLM, model.PRESETS["3B"])
    assert three.lm_head.weight is three.model.embed_tokens.weight and flops.count(three) == 3_754_622_976


def test_more_gpus_and_checkpointing_cost_what_they_must(one, two):
    again = two.but(checkpointing=True)
    b, _ = two.batch()
    parts = two.flops(b)
    extra = again.seconds(b) - two.seconds(b)
    assert extra == pytest.approx(parts["DiT"][0] / 989e12 / 0.38)
    hours = {world: one.but(world=world, zero=True).schedule()[2] for world in (8, 64)}
    assert hours[8] == pytest.approx(8 * hours[64], rel=0.02)


@pytest.mark.parametrize("script, words", [(train_stage1, "logits"), (train_stage2, "VAE encoder")])
def test_plan_flag_of_the_scripts(script, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = ["--mllm", "tiny"] if script is train_stage1 else ["--mllm=tiny", "--dit=tiny", "--vae=tiny", "--documents=1"]
    script.main(["--plan", "--world", "8", *parts])
    out = capsys.readouterr().out
    assert words in out and "GPU-hours" in out and "8 x H200" in out
    assert not list(tmp_path.iterdir())  # a plan leaves nothing behind
    with pytest.raises(InputError, match="unknown flag --world"):
        script.main(["--world", "8"])  # without --plan these flags do not exist


def test_help_names_the_flag_where_it_is_obeyed(capsys):
    with pytest.raises(SystemExit):
        train_stage2.main(["--help"])
    assert "--plan" in capsys.readouterr().out
    with pytest.raises(InputError, match="unknown flag --plan"):
        parse_config(Stage2Config, ["--plan"])


def test_plan_reads_a_folder_and_refuses_what_is_none(tmp_path):
    (tmp_path / "mllm").mkdir()
    model.MLLM.from_config(dataclasses.replace(TINY, num_hidden_layers=1)).save_pretrained(tmp_path / "mllm")
    assert len(plan.example(plan.STAGE1, mllm=str(tmp_path)).mllm.model.layers) == 1
    assert plan.example(plan.STAGE1, mllm="runs/tiny/none").mllm.config.hidden_size == TINY.hidden_size
    for flag, value, word in (("mllm", "8B", "7B"), ("gpu", "abacus", "H200"), ("world", 0, "world"), ("dtype", "fp8", "bf16")):
        with pytest.raises(InputError, match=word):
            plan.example(plan.STAGE1, **{flag: value})
    command = [sys.executable, ROOT / "train_stage1.py", "--plan", "--mllm", "8B"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.startswith("error: --mllm 8B") and done.stderr.count("\n") == 1


def test_a_plan_whose_reader_has_seen_enough_ends_in_silence():
    """As under `| head -2`: no traceback, neither at once nor when the buffer is emptied at the end."""
    command = [sys.executable, ROOT / "train_stage1.py", "--plan", "--mllm", "tiny"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        process.stdout.close()
        assert (process.stderr.read(), process.wait(60)) == ("", 1)


def test_the_commands_of_the_readme_fit():
    """Their flags, with the presets in place of what they load, on as many H200s as they say."""
    text = (ROOT / "README.md").read_text().replace("\\\n", "")
    for name, cls, presets, worlds in (
        ("S1", Stage1Config, ["--mllm=7B"], (8, 32)),
        ("S2", Stage2Config, ["--mllm=7B", "--dit=2B", "--vae=wan2.1"], (1, 8, 32)),
    ):
        script, *flags = re.search(rf'{name}="(.+?)"', text)[1].split()
        assert script == f"train_stage{name[1]}.py"
        p = plan.planned(cls, [*flags, *presets])
        assert all(p.but(world=world).advice().startswith("fits") for world in worlds)


def test_mfu_is_known_for_known_devices_only():
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA H100 PCIe") < 989e12
    assert flops.peak_flops("cpu") is None


def test_tables_in_the_documents_are_the_plan(one, two):
    """`python -m tools.plan` makes them; the README repeats that of docs/plan.md."""
    rows = plan.markdown(one, two).splitlines()
    assert [line for line in (ROOT / "docs/plan.md").read_text().splitlines() if line.startswith("|")] == rows
    quoted = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and line.count("|") == 13]
    assert quoted in ([], rows)
