"""The training scripts on small random parts: what is trained, resuming, two processes, loss positions, overfitting."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import dit
import model
import replay
import train_stage1
import train_stage2
import training
from checkpoint import InputError, newest_sound
from data import tokenize
from distributed import Ranks
from dit import PRESETS as DIT_PRESETS
from dit import DiT, DiTConfig
from evaluate import report
from flow import FlowLoss, Samples, denoise, shift_schedule
from model import MLLM, ImageProcessor
from sketchbook import dialogues
from tokenizer import Tokenizer
from training import LanguageLoss, Run, TrainConfig, generator
from vae import VAE

ROOT = Path(__file__).parent.parent


def config(stage, parts, out, **options):
    cls = {1: train_stage1.Stage1Config, 2: train_stage2.Stage2Config}[stage]
    quiet = {"sheet_every": 0, "save_every": 0, "log_every": 1}
    common = {"out": str(out), "mllm": str(parts), "device": "cpu", "dtype": "fp32", **quiet}
    own = {"tokens": 400} if stage == 1 else {"dit": str(parts), "vae": str(parts), "documents": 3}
    return cls(**{**common, **own, **options})


# The counter does not know the product that adds into its result.
ADDED = {torch.ops.aten.addmm_: lambda out, a, b, out_val=None, **_: 2 * a[0] * a[1] * b[1]}
STAGES = {1: train_stage1.train, 2: train_stage2.train}


def weights(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(newest_sound(run) / "trainer.safetensors")


def logged(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in logged(run)]


@pytest.mark.parametrize("stage", [1, 2])
def test_resumed_run_equals_the_straight_one(stage, parts, tmp_path):
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    STAGES[stage](config(stage, parts, straight, steps=4, decay=0.0, warmup=2))
    interrupted = config(stage, parts, halves, steps=4, decay=0.0, warmup=2, save_every=2)
    save_if_due = Run.save_if_due

    def die_after_saving(self, *args):
        save_if_due(self, *args)
        if self.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "save_if_due", die_after_saving)
        with pytest.raises(KeyboardInterrupt):
            STAGES[stage](interrupted)
    STAGES[stage](interrupted)
    a, b = weights(straight), weights(halves)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)

    told = report.trained(SimpleNamespace(sources={"dit": str(newest_sound(halves) / "dit")}))  # an evaluation names its run
    assert told["step"] == 4 and 0 < told["hours"] < 1


@pytest.mark.parametrize("stage", [1, 2])
def test_two_processes_take_the_step_of_one(stage, parts, tmp_path):
    """Two ranks with one micro-batch each see the documents of one rank that accumulates two."""
    options = {"steps": 2, "decay": 0.0, "warmup": 1, "ema": 0.0}
    options |= {"documents": 1, "kinds": "text" if stage == 1 else "one"}
    options |= {"tokens": 4000} if stage == 1 else {"targets": 1, "replay_mb": 0.0}
    values = vars(config(stage, parts, tmp_path / "two", **options))
    flags = [f"--{k}={v}" for k, v in values.items() if not isinstance(v, bool)]
    script = ROOT / f"train_stage{stage}.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script), *flags]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    STAGES[stage](config(stage, parts, tmp_path / "one", accumulate=2, **options))
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    a, b = weights(tmp_path / "two"), weights(tmp_path / "one")
    assert all((a[k] - b[k]).abs().max() < 2e-5 for k in a if k.startswith("live."))


def test_frozen_parts_stay_bit_identical(parts, tmp_path, monkeypatch):
    """Also where the MLLM is held in bf16: what is learnt stays fp32, and the loss is the same but for rounding."""
    loaded = {}
    for cls in (MLLM, VAE):
        original = cls.from_pretrained.__func__

        def keep(c, *args, original=original, **kwargs):
            loaded[c.__name__] = original(c, *args, **kwargs)
            return loaded[c.__name__]

        monkeypatch.setattr(cls, "from_pretrained", classmethod(keep))
    for name, dtype in (("auto", torch.float32), ("bf16", torch.bfloat16)):
        STAGES[2](config(2, parts, tmp_path / name, steps=2, weight_decay=0.5, warmup=1, frozen_dtype=name))
        for cls, part, held in ((MLLM, "mllm", dtype), (VAE, "vae", torch.float32)):
            now = loaded[cls.__name__]
            before = cls.from_pretrained(parts / part, dtype=held)
            assert now is not before and not any(p.requires_grad for p in now.parameters())
            now, before = now.state_dict(), before.state_dict()
            assert all(now[k].dtype == v.dtype and torch.equal(now[k], v) for k, v in before.items())
        assert {v.dtype for k, v in weights(tmp_path / name).items() if k.startswith("live.")} == {torch.float32}
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "auto"), rel=0.01)


def test_a_tower_from_elsewhere_is_taken_and_kept(parts, tmp_path, monkeypatch):
    other = MLLM.from_pretrained(parts / "mllm")
    with torch.no_grad():
        for p in other.visual.parameters():
            p.add_(0.1)
    other.save_pretrained(tmp_path / "eye" / "mllm")
    STAGES[1](config(1, parts, tmp_path / "run", steps=2, warmup=1, weight_decay=0.5, tower=str(tmp_path / "eye")))
    made = MLLM.from_pretrained(tmp_path / "run" / "step_000002" / "mllm")
    before = MLLM.from_pretrained(parts / "mllm")
    assert all(torch.equal(a, b) for a, b in zip(made.visual.parameters(), other.visual.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(made.model.parameters(), before.model.parameters(), strict=True))

    wider = dataclasses.replace(other.config, vision=dataclasses.replace(other.config.vision, intermediate_size=512))
    MLLM.from_config(wider).save_pretrained(tmp_path / "wider" / "mllm")
    with pytest.raises(InputError, match="--tower .*wider: its vision tower is not of the form"):
        STAGES[1](config(1, parts, tmp_path / "no", steps=1, tower=str(tmp_path / "wider")))


def test_loss_positions_of_a_document(parts):
    """Hand-written: which tokens the language model answers for."""
    from tokenizer import Tokenizer, render

    tokenizer = Tokenizer.from_pretrained(parts / "mllm")
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Draw"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}, {"type": "image"}, {"type": "text", "text": "B"}]},
    ]
    r = render(tokenizer, messages, [(1, 1)])
    supervised = [tokenizer.decode([i], skip_special=False) for i, l in zip(r.ids, r.loss, strict=True) if l]
    assert supervised == ["A", "<|vision_start|>", "B", "<|im_end|>"]


def test_language_model_overfits_one_batch(parts):
    torch.manual_seed(0)
    Ranks("cpu")
    from data import pack_documents
    from tokenizer import Tokenizer

    mllm = MLLM.from_pretrained(parts / "mllm")
    tokenizer, processor = Tokenizer.from_pretrained(parts / "mllm"), ImageProcessor.from_pretrained(parts / "mllm")
    documents = [tokenize(dialogues.dialogue(s, kinds={"one": 1}), tokenizer, processor, pictures=False) for s in range(3)]
    batch = pack_documents(documents).to("cpu", processor)
    loss_of, optimizer = LanguageLoss(mllm), torch.optim.AdamW(mllm.parameters(), lr=2e-3)
    history = []
    for _ in range(60):
        loss = loss_of(batch)[0] / (batch.labels >= 0).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert history[-1] < history[0] / 10
    # and the words come back: greedy tokens under teacher forcing are the labels
    with torch.no_grad():
        hidden = mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids)[-1]
        target = batch.labels >= 0
        assert (mllm.logits(hidden[target]).argmax(1) == batch.labels[target]).float().mean() > 0.95


def test_painter_overfits_one_batch_and_sampling_returns_it():
    """Covers the loss, the optimizer, the flow convention and the sampler in one go."""
    torch.manual_seed(0)
    Ranks("cpu")
    dit = DiT.from_config(DiTConfig(2, 2, 64, adaln_lora_dim=16, text_embed_dim=32, crossattn_proj_in_channels=64))
    features = torch.randn(10, 64)
    pictures = [torch.randn(16, 4, 4) for _ in range(3)]
    samples = Samples(features, [range(0, 4), range(4, 10)], [pictures[:1], pictures[1:]], [0, 1])
    loss_of, optimizer = FlowLoss(dit, 1e-4), torch.optim.AdamW(dit.parameters(), lr=3e-3)
    history, steps = [], 600
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (steps - step) / (steps / 2))
        g = generator(step)
        many = Samples(features, samples.rows * 8, samples.latents * 8, samples.clean * 8)
        t = torch.rand(16, generator=g)
        error, count = loss_of(many, t, g)
        loss = error.sum() / count.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item())
    assert sum(history[-20:]) / 20 < history[0] / 10
    context = dit.crossattn_proj(features).detach()
    contexts, sigmas = [context[:4], context[4:]], shift_schedule(30, 1.0)
    painted = denoise(dit, [[], [pictures[1]]], [(4, 4)] * 2, contexts, None, [0, 1], sigmas=sigmas)
    for z, truth in zip(painted, (pictures[0], pictures[2]), strict=True):
        assert (z - truth).square().mean() < 0.1 * truth.square().mean()


def test_flow_loss_is_known_at_the_start():
    """A fresh DiT answers 0, so the loss is E|eps - x0|^2, counted over target tokens alone."""
    torch.manual_seed(0)
    dit = DiT.from_config(DIT_PRESETS["tiny"])
    pictures = [[torch.randn(16, 8, 8) * 2 for _ in range(3)] for _ in range(8)]
    samples = Samples(torch.randn(8, 1024), [range(i, i + 1) for i in range(8)], pictures, [2] * 8)
    error, count = FlowLoss(dit, 1e-4)(samples, torch.rand(8), generator(1))
    assert count.tolist() == [16.0] * 8
    assert (error.sum() / count.sum()).item() == pytest.approx(1 + 4, rel=0.05)


def test_loss_by_kind_of_token_adds_up(parts):
    """Against the logits: text, BOV and end of turn, each with its own mean, together the loss."""
    from data import pack_documents
    from tokenizer import Tokenizer

    mllm, tokenizer = MLLM.from_pretrained(parts / "mllm"), Tokenizer.from_pretrained(parts / "mllm")
    processor = ImageProcessor.from_pretrained(parts / "mllm")
    batch = pack_documents([tokenize(dialogues.dialogue(s), tokenizer, processor, pictures=False) for s in range(3)])
    batch = batch.to("cpu", processor)
    total, by_kind = LanguageLoss(mllm)(batch)
    target = batch.labels >= 0
    with torch.no_grad():
        hidden = mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids)[-1][target]
        each = torch.nn.functional.cross_entropy(mllm.logits(hidden), batch.labels[target], reduction="none")
    bov, end = (batch.labels[target] == token for token in (tokenizer.vision_start, tokenizer.im_end))
    for (loss, n), mask in zip(by_kind.tolist(), (~bov & ~end, bov, end), strict=True):
        assert n == mask.sum() > 2 and loss == pytest.approx(each[mask].sum().item(), rel=1e-5)
    assert not by_kind.requires_grad and by_kind[:, 0].sum().item() == pytest.approx(total.item(), rel=1e-6)


@pytest.mark.parametrize("stage", [1, 2])
def test_flops_in_the_log_are_those_that_pytorch_counts(stage, parts):
    """Of a whole micro-batch: the frozen parts' forward pass too."""
    from torch.utils.flop_counter import FlopCounterMode

    from tokenizer import Tokenizer

    mllm, tokenizer = MLLM.from_pretrained(parts / "mllm"), Tokenizer.from_pretrained(parts / "mllm")
    processor = ImageProcessor.from_pretrained(parts / "mllm")
    dit, vae = DiT.from_pretrained(parts / "dit"), VAE.from_pretrained(parts / "vae").requires_grad_(False)
    documents = [tokenize(dialogues.dialogue(s, kinds={"one": 1}), tokenizer, processor) for s in range(3)]
    with FlopCounterMode(display=False, custom_mapping=ADDED) as counter:
        if stage == 1:
            from data import pack_documents

            LanguageLoss(mllm)(pack_documents(documents).to("cpu", processor))[0].backward()
            expected = training.model_flops(documents, mllm)
        else:
            encoded = replay.encode(documents, mllm, vae, processor, torch.device("cpu"))
            targets = [target for document in encoded for target in document.targets]
            samples = train_stage2.draw_samples(targets, 0.0, generator(0))
            FlowLoss(dit, 1e-4)(samples, torch.rand(len(samples.rows)), generator(1))[0].sum().backward()
            expected = training.model_flops(documents, mllm, samples, dit, vae)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)  # the CPU pads, and computes what a mask hides


@pytest.mark.parametrize("stage", [1, 2])
def test_the_log_has_parts_and_rates_in_aligned_columns(stage, parts, tmp_path, capsys):
    """Also where a step has no token of a kind, or no target at some time."""
    STAGES[stage](config(stage, parts, tmp_path, steps=3, kinds="text=2,one=1" if stage == 1 else "one", documents=1))
    rows, lines = logged(tmp_path), [line for line in capsys.readouterr().out.splitlines() if line.startswith("step  ")]
    parts = ("text", "bov", "end") if stage == 1 else ("t<.6", "t<.85", "t<1")
    assert len(rows) == 3 and not all(part in row for row in rows for part in parts)
    assert len({tuple(i for i, x in enumerate(line) if x == "|") for line in lines}) == 1
    for row, line in zip(rows, lines, strict=True):
        assert all(part in line for part in (*parts, "loss", "grad", "GFLOP/s", "eta")) and "mfu" not in row
        assert row["flops_per_s"] > 0 and row["tokens_per_s" if stage == 1 else "images_per_s"] > 0


def steps_of(stage, parts, folder, monkeypatch, **options) -> tuple[list[float], list[torch.Tensor]]:
    """Losses and gradients of two steps."""
    gradients, clip = [], Run.clip

    def keep(self):
        gradients.extend(p.new_zeros(p.shape) if p.grad is None else p.grad.clone() for p in self.params)
        return clip(self)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "clip", keep)
        STAGES[stage](config(stage, parts, folder, steps=2, **options))
    return losses(folder), gradients


@pytest.mark.parametrize("stage", [1, 2])
def test_a_profile_says_where_the_time_of_a_step_goes(stage, parts, tmp_path, capsys):
    """Its parts are all of the step, to a few milliseconds; and it changes nothing that is saved."""
    STAGES[stage](config(stage, parts, tmp_path / "plain", steps=3))
    STAGES[stage](config(stage, parts, tmp_path / "run", steps=3, profile=True))
    a, b = weights(tmp_path / "plain"), weights(tmp_path / "run")
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "ms_data" not in logged(tmp_path / "plain")[-1]
    for before, row in zip(logged(tmp_path / "run"), logged(tmp_path / "run")[1:], strict=False):
        parts_ = {name: row[f"ms_{name}"] for name in training.PARTS}
        assert sum(parts_.values()) == pytest.approx(1000 * (row["seconds"] - before["seconds"]), abs=110)  # in tenths
        assert (parts_["frozen"] > 0) == (stage == 2) and min(parts_[k] for k in ("forward", "backward", "optimizer")) > 0
    assert capsys.readouterr().out.count("    ms of a step: data ") == 3


@pytest.mark.parametrize("stage", [1, 2])
def test_neither_checkpointing_nor_compilation_changes_a_step(stage, parts, tmp_path, monkeypatch):
    """Recomputed activations are the same bits. Compiled are the blocks; AOTAutograd stands in for Inductor, whose C++ compiler
    would take minutes."""
    small = tmp_path / "parts"
    shutil.copytree(parts, small)
    c = DiT.from_pretrained(parts / "dit").config
    DiT.from_config(dataclasses.replace(c, num_layers=1)).save_pretrained(small / "dit")
    plain_losses, plain = steps_of(stage, small, tmp_path / "plain", monkeypatch)
    again_losses, again = steps_of(stage, small, tmp_path / "again", monkeypatch, checkpointing=True)
    assert len(plain) == len(again) > 50 and max(g.abs().max().item() for g in plain) > 1e-2
    assert again_losses == plain_losses and all(map(torch.equal, again, plain))

    compiled, original = [], torch.nn.Module.compile

    def compile(self, **options):
        compiled.append(type(self).__name__)
        original(self, backend="aot_eager", **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile)
    for home in (model, dit):
        monkeypatch.setattr(home, "attention", home.attention)  # so that it is as before afterwards
    fast_losses, fast = steps_of(stage, small, tmp_path / "fast", monkeypatch, compile=True, checkpointing=stage == 1)
    torch._dynamo.reset()
    assert compiled == (["VisionBlock"] * 2 + ["Layer"] * 2 if stage == 1 else ["Block"])
    assert fast_losses == pytest.approx(plain_losses, rel=1e-6)
    for a, b in zip(fast, plain, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-9


def test_mfu_is_logged_where_the_peak_is_known(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training, "peak_flops", lambda device: 1e12)
    module = torch.nn.Linear(2, 2)
    for dtype in ("fp32", "bf16"):
        c = TrainConfig(out=str(tmp_path / dtype), steps=1, save_every=0, dtype=dtype)
        run = Run(c, Ranks("cpu"), module, lambda folder, module: None)
        for _ in run.loop():
            module(torch.ones(1, 2)).sum().backward()
            run.log({"loss": 1.0, "flops": 2e9}, run.clip())
            run.save_if_due(0)
        row, = logged(tmp_path / dtype)
        assert run.optimizer.defaults["fused"]
        assert row.get("mfu") == (pytest.approx(row["flops_per_s"] / 1e12, rel=1e-3) if dtype == "bf16" else None)
    assert "mfu" in capsys.readouterr().out


def test_what_is_trained_and_frozen_is_checked(capsys):
    module = torch.nn.Linear(2, 2)
    training.print_trained({"a": module}, {})
    assert "trained" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="frozen"):
        training.print_trained({}, {"a": module})


def test_another_model_cannot_resume(parts, tmp_path):
    STAGES[1](config(1, parts, tmp_path / "run", steps=1, kinds="text"))
    with pytest.raises(InputError, match="not those of this run"):
        Run(TrainConfig(out=str(tmp_path / "run")), Ranks("cpu"), torch.nn.Linear(2, 2), lambda folder, module: None)


def test_flags_come_from_the_dataclass(capsys):
    flags = ["--lr", "1", "--save-every=7", "--sheet_every", "3", "--checkpointing"]
    parsed = training.parse_config(train_stage2.Stage2Config, flags)
    assert (parsed.lr, parsed.save_every, parsed.sheet_every, parsed.checkpointing) == (1.0, 7, 3, True)


def one_line(capsys, *flags: str, cls=train_stage2.Stage2Config) -> str:
    """What a script says of these flags, before it loads anything."""
    with pytest.raises(SystemExit) as end:
        training.run_script(lambda: training.parse_config(cls, list(flags)))
    said = capsys.readouterr()
    assert end.value.code == 2 and not said.out and said.err.startswith("error: ") and said.err.count("\n") == 1
    return said.err.removeprefix("error: ").strip()


def test_a_flag_mistyped_is_one_line_with_the_one_that_was_meant(capsys):
    assert one_line(capsys, "--stepz", "3") == "unknown flag --stepz: did you mean --steps?"
    assert one_line(capsys, "--save_evry=3") == "unknown flag --save-evry: did you mean --save-every?"
    assert one_line(capsys, "--qqqq") == "unknown flag --qqqq: see --help"
    assert "--lr" in (said := one_line(capsys, "--lr", "abc")) and "'abc'" in said
    assert one_line(capsys, "runs/x") == "'runs/x' belongs to no flag: see --help"


WRONG = """
accumulate=0 lr=nan lr=-1e-4 lr=inf beta2=1 beta2=-0.1 ema=1 ema=nan drop=1.5 shift=0 shift=nan warmup=-1
minutes=-1 minutes=nan steps=0 targets=0 decay=1.1 clip=0 weight-decay=-1 tokens=-1 patches=-1 latents=-1
documents=-1 lookahead=0 log-every=0 save-every=-1 sheet-every=-1 keep-every=-1 keep=1 timeout=0 timeout=nan
seed=-1 max-skipped=0 condition-time=1 dtype=fp8 frozen-dtype=fp8 out=
""".split()


@pytest.mark.parametrize("flag", WRONG)
def test_a_value_that_no_run_could_use_is_told_before_anything_is_loaded(flag, capsys):
    name, _, value = flag.partition("=")
    shown = value if value in ("fp8", "") else f"{float(value):g}"
    said = one_line(capsys, f"--{flag}")
    assert said.startswith(f"--{name} ") and ": must be " in said
    given = said.removeprefix(f"--{name} ").partition(":")[0]
    assert given == shown or float(given) == float(shown) or shown == "nan"


def test_values_at_the_edge_of_what_a_run_can_use_are_taken():
    edge = ["--lr=0", "--beta2=0", "--ema=0", "--drop=1", "--decay=1", "--warmup=0", "--minutes=0", "--clip=inf", "--keep=2"]
    c = training.parse_config(train_stage2.Stage2Config, [*edge, "--save-every=0", f"--seed={2**63 - 1}"])
    assert (c.lr, c.decay, c.keep, c.seed) == (0.0, 1.0, 2, 2**63 - 1)


def test_a_batch_without_any_bound_is_told_before_anything_is_loaded(capsys):
    assert one_line(capsys, "--documents=0").startswith("--documents 0: needs a budget")
    assert one_line(capsys, "--tokens=0", cls=train_stage1.Stage1Config).startswith("--tokens 0: needs another budget")


def test_make_tiny_trains_the_miniature_from_nothing():
    """Its recipe is not that of a training that goes on from the bundled one, whose flags are the scripts' defaults."""
    lines = [line.split() for line in (ROOT / "Makefile").read_text().splitlines() if "$(PY) train_stage" in line]
    one, two = (training.parse_config(cls, line[2:]) for cls, line in
                zip((train_stage1.Stage1Config, train_stage2.Stage2Config), lines, strict=True))  # fmt: skip
    assert (one.mllm, one.out, one.lr, one.beta2, one.steps) == ("runs/tiny/mllm", "runs/tiny/stage1", 1e-3, 0.98, 4000)
    assert (two.mllm, two.dit, two.vae) == ("runs/tiny/stage1", "runs/tiny/dit", "runs/tiny/vae")
    assert (two.out, two.lr, two.beta2, two.steps) == ("runs/tiny/stage2", 1e-3, 0.99, 60_000)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_command_trains_the_bundled_miniature_and_shows_samples_after_a_step(stage, tmp_path):
    """Without a word of where anything is, from any folder; the flags here only make it short."""
    few = ["--documents=1", "--steps=1"]
    command = [sys.executable, str(ROOT / f"train_stage{stage}.py"), *few]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=200,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"from {ROOT / 'checkpoints' / 'tiny'}" in done.stdout and "UNEXPECTED" not in done.stdout
    run = tmp_path / "runs" / f"stage{stage}"
    page = (run / "index.html").read_text()
    assert "<h2>Samples after step 1</h2>" in page and list(run.glob("step_000001"))


def test_the_page_is_rewritten_between_sheets_and_minutes_bound_the_time_to_go(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "PAGE_SECONDS", 0.0)
    pages = []
    monkeypatch.setattr(training, "write_page", lambda folder, about: pages.append(about["step"]))
    STAGES[1](config(1, parts, tmp_path, steps=100_000, minutes=0.02, documents=1))
    rows = logged(tmp_path)
    assert pages[: len(rows)] == [row["step"] for row in rows] and 1 <= len(rows) < 1000
    for row in rows:
        assert 0 <= row["eta_s"] <= 1.2


def test_generators_depend_on_every_number():
    draws = {torch.rand((), generator=generator(*key)).item() for key in [(0, 1), (1, 0), (0, 0), (0, 1, 0), (2,)]}
    assert len(draws) == 5


@pytest.mark.parametrize("stage", [1, 2])
def test_sheets_of_samples(stage, parts, tmp_path, monkeypatch):
    """Also of a model that wants to write what stands for pictures."""
    logits = MLLM.logits
    pad = Tokenizer.from_pretrained(parts / "mllm").image_pad
    monkeypatch.setattr(MLLM, "logits", lambda self, h: logits(self, h).index_fill(-1, torch.tensor(pad), 99))
    STAGES[stage](config(stage, parts, tmp_path, steps=1, sheet_every=1, kinds="recolour"))
    made = tmp_path / "samples" / f"step_000001.{'md' if stage == 1 else 'png'}"
    assert made.stat().st_size > 300
    if stage == 1:
        assert "* asked: " in made.read_text() and "<|im_" not in made.read_text()
    else:
        with Image.open(made) as image:
            told = json.loads(image.text["sheet"])
        assert told["columns"] == ["picture before", "painted", "true one"]
        assert all(r["asked"] and r["told"] and len(r["boxes"]) == 3 for r in told["rows"])
        assert not any(r["asked"].startswith(("user", "system")) for r in told["rows"])


def test_a_sheet_shows_the_true_pictures_whatever_their_sizes_and_whoever_begins(parts, monkeypatch):
    """A model that asks for a picture at once, and then always: it gets those of the record, and the next one ends it."""
    one, two = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 48), "blue")
    text, *pictures = {"type": "text", "text": "Look:"}, *({"type": "image", "image": image} for image in (one, two))
    asked = [{"role": "user", "content": [text, pictures[1]]}]
    told = [{"role": "assistant", "content": [text, *pictures]}]
    tokenizer, processor = Tokenizer.from_pretrained(parts / "mllm"), ImageProcessor.from_pretrained(parts / "mllm")
    writer = train_stage1.Reteller(MLLM.from_pretrained(parts / "mllm"), tokenizer, processor)
    monkeypatch.setattr(writer, "choose", lambda *_: tokenizer.vision_start)
    answers = [train_stage1.Retold(writer, messages, 5) for messages in (asked + told, told)]
    writer.write_many(answers)
    assert [[picture.image for picture in a.pictures] for a in answers] == [[one, two]] * 2
    assert [a.told() for a in answers] == [(question, " ".join(["[picture]"] * 3)) for question in ("Look: [picture]", "")]
    long = train_stage1.Retold(writer, asked + told, 2)
    writer.write_many([long])
    assert long.told()[1] == "[picture] [picture] [no end yet]"


CODE = ("a.py", "pages/b.py", "pages/page.html", "pages/style.css", "pages/words.json")


@pytest.mark.parametrize("name", [*CODE, "notes.md", "runs/index.html"])
def test_the_hash_of_the_code_sees_templates_and_words_but_no_results(name, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "__file__", str(tmp_path / "training.py"))
    for folder in ("pages", "runs"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pages/__init__.py").touch()
    before = training.code_hash()
    (tmp_path / name).write_text("one")
    first = training.code_hash()
    (tmp_path / name).write_text("two")
    assert (first != before, training.code_hash() != first) == (name in CODE, name in CODE)
