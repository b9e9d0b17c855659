"""The plan against PyTorch: FLOPs by FlopCounterMode, kept bytes by saved-tensor hooks, memory by recorded allocations."""

import dataclasses
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

import dit
import flops
import model
import vae
from checkpoint import InputError
from data import MLLMBatch
from flops import Batch
from flow import FlowLoss, Samples
from ops import Segments
from tools import plan
from train_stage1 import Stage1Config
from train_stage2 import Stage2Config
from training import LanguageLoss, parse_config

ROOT = Path(__file__).parent.parent.parent
TINY = dataclasses.replace(model.PRESETS["tiny"], vocab_size=2048)
BYTES = {"fp32": 4, "bf16": 2}


def autocast(dtype):
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16")


def stage1(documents, text, grid, checkpointing=False, dtype="fp32"):
    """A stage-1 step of the miniature on equal documents of one picture: module, step, sizes."""
    merged = (grid[0] // 2, grid[1] // 2)
    ids = torch.cat((torch.randint(0, 900, (text - 5,)), torch.full((merged[0] * merged[1],), TINY.image_token_id)))
    ids = torch.cat((ids, torch.randint(0, 900, (5,))))
    positions, _ = model.mrope_positions(ids, [merged], TINY.image_token_id)
    n, supervised = len(ids), len(ids) * documents // 3
    labels = torch.full((n * documents,), -100)
    labels[:supervised] = 7
    pixels = torch.randn(documents * grid[0] * grid[1], 3 * 2 * 8 * 8)
    cu = torch.arange(0, n * documents + 1, n, dtype=torch.int32)
    batch = MLLMBatch(ids.repeat(documents), positions.repeat(1, documents), cu, pixels, [grid] * documents, labels)
    mllm = model.MLLM.from_config(TINY)
    mllm.set_checkpointing(checkpointing)
    loss_of = LanguageLoss(mllm)

    def step():
        with autocast(dtype):
            loss = loss_of(batch)[0] / supervised
        loss.backward()

    return mllm, step, Batch.of(TINY, [n] * documents, [grid] * documents, supervised)


def stage2(samples, images, side, context, checkpointing=False, dtype="fp32"):
    """A stage-2 step of the miniature's connector and DiT."""
    c = dit.PRESETS["tiny"]
    painter = dit.DiT.from_config(c)
    painter.gradient_checkpointing = checkpointing
    loss_of = FlowLoss(painter, 1e-4)

    def step():
        features = torch.randn(samples * context, c.crossattn_proj_in_channels)
        rows = [range(i * context, (i + 1) * context) for i in range(samples)]
        latents = [[torch.randn(16, 2 * side, 2 * side) for _ in range(images)] for _ in rows]
        with autocast(dtype):
            g = torch.Generator().manual_seed(0)
            error, _ = loss_of(Samples(features, rows, latents, [images - 1] * samples), torch.rand(samples), g)
        error.sum().backward()

    return painter, step, Batch.of(TINY, [context] * samples, samples=[([side * side] * images, context)] * samples)


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


@pytest.mark.parametrize("documents, text, grid", [(1, 30, (8, 8)), (3, 90, (8, 12)), (2, 150, (10, 6))])
def test_flops_of_stage_1(documents, text, grid):
    _, step, b = stage1(documents, text, grid)
    assert counted(step) == pytest.approx(sum(map(sum, flops.flops(1, TINY, b).values())), rel=0.01)


@pytest.mark.parametrize("samples, images, side, context", [(1, 1, 4, 20), (3, 4, 8, 50), (2, 2, 12, 200)])
def test_flops_of_stage_2(samples, images, side, context):
    _, step, b = stage2(samples, images, side, context)
    parts = flops.flops(2, TINY, b, dit.PRESETS["tiny"], vae.PRESETS["tiny"])
    assert counted(step) == pytest.approx(sum(parts["DiT"]) + sum(parts["connector"]), rel=0.01)


@pytest.mark.parametrize("name", ["tiny", "wan2.1"])
def test_flops_of_the_vae_encoder(name):
    c = vae.PRESETS[name]
    with torch.device("meta"):
        module, x = vae.VAE(c), torch.empty(1, 3, 96, 64)
    with torch.no_grad():
        assert counted(lambda: module.encode(x)) == pytest.approx(flops.encoder_flops(c, 96, 64), rel=0.01)


def test_full_size_flops_are_those_of_the_literature():
    """Known figures: one pass of the 2B DiT over 480 px and 1024 px, 1 + 4 pictures, 512 tokens; of the 7B over 2048 tokens."""
    for patches, expected in ((900, 19.97e12), (4096, 165.96e12)):
        b = Batch.of(TINY, [], samples=[([patches] * 5, 512)])
        forward, _ = flops.flops(2, TINY, b, dit.PRESETS["2B"], vae.PRESETS["wan2.1"])["DiT"]
        assert forward == pytest.approx(expected, rel=0.01)
    seven = model.PRESETS["7B"]
    assert flops.flops(1, seven, Batch.of(seven, [2048]))["decoder"][0] == pytest.approx(27.6e12, rel=0.01)


def kept(module: nn.Module, dtype: str, *args) -> int:
    """Bytes of the storages that autograd keeps, each once, without the parameters and the tensors of `args` that need none."""
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype):
        module(*args)
    return sum(s.nbytes() for s in seen.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_kept_bytes_of_every_kind_of_block(dtype):
    n, m, e, cast = 48, 20, BYTES[dtype], dtype == "bf16"
    c, v, d = TINY, TINY.vision, dit.PRESETS["tiny"]
    cu = torch.tensor([0, n], dtype=torch.int32)

    def matrices(module):
        return sum(2 * cast * x.weight.numel() for x in module.modules() if isinstance(x, nn.Linear))

    layer, tables = model.Layer(c, 0), [torch.randn(n, 1, c.head_dim) for _ in range(2)]
    qkv = c.hidden_size + 2 * c.num_key_value_heads * c.head_dim
    expected = plan.layer_bytes(n, e, c.hidden_size, c.intermediate_size, c.num_attention_heads, qkv, 5)[0]
    expected += matrices(layer) + n * 2 * 4 * c.head_dim
    x = torch.randn(n, c.hidden_size, requires_grad=True)
    assert kept(layer, dtype, x, cu, *tables) == expected

    block, width = model.VisionBlock(v), v.hidden_size
    tables = [torch.randn(n, 1, width // v.num_heads) for _ in range(2)]
    expected = plan.layer_bytes(n, e, width, v.intermediate_size, v.num_heads, 5 * width, 3)[0]
    expected += matrices(block) + n * 2 * 4 * width // v.num_heads
    assert kept(block, dtype, torch.randn(n, width, requires_grad=True), cu, *tables) == expected

    block, rope = dit.Block(d), tuple(torch.randn(n, 1, d.attention_head_dim) for _ in range(2))
    x, table = torch.randn(2, n // 2, d.width, requires_grad=True), torch.randn(2, 9 * d.width, requires_grad=True)
    context = torch.randn(m, d.text_embed_dim, dtype=torch.bfloat16 if cast else None, requires_grad=True)
    expected = plan.block_bytes(d, n, m, 2, e)[0] + matrices(block.attn1) + matrices(block.attn2) + matrices(block.ff)
    expected += n * 2 * 4 * d.attention_head_dim + m * d.text_embed_dim * e
    got = kept(block, dtype, x, table, torch.arange(2), rope, Segments([n]), context, None, Segments([m]))
    assert got == pytest.approx(expected, rel=1e-3)  # but for indices and modulations of a few bytes


def measured(module, step) -> int:
    """Bytes at the highest moment of a step, by PyTorch's own record of every allocation and release."""
    gc.collect()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
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
    events = [(e.start_ns(), e.nbytes()) for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 4 * plan.count(module)
    for _, size in sorted(events, key=lambda event: event[0]):
        live += size
        top = max(top, live)
    return top


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", [1, 2])
def test_memory_of_a_step(stage, dtype, checkpointing):
    """Weights, gradients, moments, EMA, activations and casts together, alive at one moment."""
    n, side = (300, 10) if dtype == "bf16" else (600, 24)  # emulated bf16 is slow on most CPUs
    options = {"checkpointing": checkpointing, "dtype": dtype}
    if stage == 1:
        module, step, b = stage1(1, n, (side, side), **options)
        segments = plan.stage1_segments(module, b, BYTES[dtype])
    else:
        module, step, b = stage2(1, 3, side // 2, 100, **options)
        segments = plan.stage2_segments(module, b, BYTES[dtype], 4)
    states, rest, got = 16 * plan.count(module), plan.peak(segments, checkpointing), measured(module, step)
    assert states + rest == pytest.approx(got, rel=0.1)  # weights, two moments and EMA are certain:
    assert rest == pytest.approx(got - states, rel=0.15)  # what stands beside them must be right too


def test_gradients_of_a_plan_are_those_of_its_parameters():
    for flags in (plan.STAGE1, plan.STAGE2):
        p = plan.example(flags)
        b, _ = p.batch()
        segments = plan.stage2_segments(p.dit, b, 2, 4) if p.dit else plan.stage1_segments(p.mllm, b, 2)
        assert sum(s.parameters for s in segments) == p.trained


def test_what_does_not_fit_is_said_with_its_remedy():
    """fp32 AdamW for all of the 7B is 133 GB of weights and states, without gradients and EMA: one H200 cannot train it."""
    one = plan.example(plan.STAGE1)
    sizes = one.memory()
    assert (sizes["weights"] + sizes["gradients"] + sizes["AdamW"]) / 1e9 == pytest.approx(133, abs=0.5)
    assert "does not fit" in one.advice() and "--zero --world" in one.advice()
    world = int(one.advice().split()[-1])
    totals = [plan.example(plan.STAGE1, zero=True, world=n).total for n in (world // 2, world)]
    assert totals[0] > 141 > totals[1]
    assert "not at all under DDP" in plan.example(plan.STAGE1, mllm="32B", world=64, zero=True).advice()
    assert plan.example(plan.STAGE1, mllm="3B").advice().startswith("fits")
    held = {d: plan.example(plan.STAGE2, frozen_dtype=d).memory()["frozen weights"] for d in ("fp32", "bf16", "auto")}
    assert held["auto"] == held["bf16"] == held["fp32"] - 2 * plan.count(one.mllm)  # the VAE stays fp32
    wide = plan.example(plan.STAGE2, documents=4)
    assert "does not fit" in wide.advice() and wide.advice().endswith("--checkpointing")
    assert plan.example(plan.STAGE2, documents=4, checkpointing=True).advice().startswith("fits")


def test_more_gpus_and_checkpointing_cost_what_they_must():
    plain, again = (plan.example(plan.STAGE2, checkpointing=on) for on in (False, True))
    b, _ = plain.batch()
    parts = plain.flops(b)
    extra = again.seconds(b) - plain.seconds(b)
    assert extra == pytest.approx(parts["DiT"][0] / 989e12 / 0.38)
    hours = {world: plan.example(plan.STAGE1, world=world, zero=True).schedule()[2] for world in (8, 64)}
    assert hours[8] == pytest.approx(8 * hours[64], rel=0.02)


@pytest.mark.parametrize("cls, words", [(Stage1Config, "logits"), (Stage2Config, "VAE encoder")])
def test_plan_flag_of_the_scripts(cls, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model_flag = ["--mllm", "3B"] if cls is Stage1Config else ["--mllm=7B", "--dit=2B", "--vae=wan2.1", "--documents=1"]
    with pytest.raises(SystemExit) as done:
        parse_config(cls, ["--plan", "--world", "8", *model_flag])
    out = capsys.readouterr().out
    assert not done.value.code and words in out and "GPU-hours" in out and "8 x H200" in out
    assert not list(tmp_path.iterdir())  # a plan leaves nothing behind
    with pytest.raises(InputError, match="unknown flag --world"):
        parse_config(cls, ["--world", "8"])  # without --plan these flags do not exist


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
        planned = dataclasses.make_dataclass("Planned", [], bases=(plan.PlanConfig, cls))
        p = plan.Plan(parse_config(planned, [*flags, *presets]))
        assert all(p.but(world=world).advice().startswith("fits") for world in worlds)


def test_mfu_is_known_for_known_devices_only():
    assert flops.peak_flops("NVIDIA H200") == flops.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert flops.peak_flops("NVIDIA H100 PCIe") < 989e12
    assert flops.peak_flops("cpu") is None


def test_tables_in_the_documents_are_the_plan():
    """`python -m tools.plan` makes them; the README repeats that of docs/plan.md."""
    rows = plan.markdown().splitlines()
    assert [line for line in (ROOT / "docs/plan.md").read_text().splitlines() if line.startswith("|")] == rows
    quoted = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("| ") and line.count("|") == 13]
    assert quoted in ([], rows)
