"""What the training scripts share: flags, processes, schedule, optimizer, EMA, log, checkpoints. The loops stay in the scripts.

A run lives in one folder and continues by itself when the same command is given again:

    runs/x/config.json              the resolved settings of the last start
    runs/x/metrics.jsonl            one line per logged step
    runs/x/step_000500/PART/        EMA weights in the published layout: what sample.py loads
    runs/x/step_000500/trainer.safetensors, state.json   live weights, AdamW moments, step, position in the data
    runs/x/samples/                 sheets of samples with their prompts

Randomness is a function of (seed, step, rank), never of a generator's history, so a resumed run needs no generator state.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
import sys
import textwrap
import time
import types
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from checkpoint import InputError, pick_device, write_json
from connector import features
from data import Document, pack_documents
from dit import interpolate, pack_images, patchify, velocity_target
from fused import linear_cross_entropy
from model import MLLM
from plan import Plan, PlanConfig
from vae import VAE


@dataclass
class TrainConfig:
    """Settings of every run; each script adds its own. The comments give unit and default's reason."""

    out: str = "runs/run"  # folder of the run; an existing one is resumed
    steps: int = 10_000  # optimizer steps in all
    minutes: float = 0.0  # stop (and save) after this many minutes of this sitting; 0 = no limit
    lr: float = 3e-5  # Cosmos-Predict2.5's own, as are betas and weight decay
    beta2: float = 0.999
    weight_decay: float = 1e-3
    clip: float = 1.0  # largest gradient norm
    warmup: int = 100  # steps from 0 to lr
    decay: float = 0.2  # share of the steps, at the end, in which lr falls to 0
    ema: float = 0.999  # decay of the weights' moving average; what is saved for sampling
    accumulate: int = 1  # micro-batches per step
    seed: int = 0
    device: str = "auto"
    dtype: str = "bf16"  # autocast type of the forward pass; weights and optimizer stay fp32
    log_every: int = 20
    save_every: int = 500
    sheet_every: int = 500  # steps between sheets of samples; 0 = none
    keep: int = 2  # checkpoints kept


def parse_config(cls: type, argv: list[str] | None = None, doc: str = ""):
    """Command line flags derived from a dataclass: --name value, --flag / --no-flag, dash or underscore, unknown = error."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        names = list(dict.fromkeys([f"--{field.name.replace('_', '-')}", f"--{field.name}"]))
        kind = hints[field.name]
        if isinstance(kind, types.UnionType):
            kind = next(t for t in typing.get_args(kind) if t is not type(None))
        if kind is bool:
            parser.add_argument(*names, dest=field.name, action=argparse.BooleanOptionalAction, default=field.default)
        else:
            parser.add_argument(*names, dest=field.name, type=kind, default=field.default, help=f"(default {field.default})")
    parser.add_argument("--plan", action="store_true", help="print what this would cost, and end; see plan.py")
    argv = sys.argv[1:] if argv is None else argv
    if "--plan" in argv and not issubclass(cls, PlanConfig):
        planned = dataclasses.make_dataclass("Planned", [], bases=(PlanConfig, cls))
        print(Plan(parse_config(planned, argv, doc)).report())
        sys.exit()
    values = vars(parser.parse_args(argv))
    del values["plan"]
    return cls(**values)


class World:
    """This process among its peers: one plain process, or one rank under torchrun (NCCL on GPUs, gloo on CPUs)."""

    def __init__(self, device: str = "auto"):
        self.size, self.rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        local = int(os.environ.get("LOCAL_RANK", 0))
        self.device = pick_device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        cuda = self.device.type == "cuda"
        if cuda:
            self.device = torch.device("cuda", local)
        # Numbers near 1e-40 are as good as 0 and cost a CPU a hundred times as much. numpy must have looked at them before.
        np.finfo(np.float32), np.finfo(np.float64)
        torch.set_flush_denormal(True)
        if self.size > 1 and not dist.is_initialized():
            dist.init_process_group("nccl" if cuda else "gloo")
        self.main = self.rank == 0

    def autocast(self, dtype: str) -> torch.autocast:
        """Forward passes in bf16, or as the weights are (fp32)."""
        if dtype not in ("bf16", "fp32"):
            raise InputError(f"--dtype {dtype}: training runs in bf16 or fp32")
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bf16")

    def sum(self, value: float) -> float:
        """The sum of a number over all ranks."""
        if self.size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.item()

    def wrap(self, module: nn.Module) -> nn.Module:
        """DDP when there are peers. A batch without pictures leaves the vision tower unused, hence find_unused."""
        if self.size == 1:
            return module
        ids = [self.device.index] if self.device.type == "cuda" else None
        options = {"device_ids": ids, "find_unused_parameters": True, "gradient_as_bucket_view": True}
        return nn.parallel.DistributedDataParallel(module, **options)

    def gather(self, value: object) -> list:
        """That value of every rank."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def synchronised(self, module: nn.Module, last: bool) -> contextlib.AbstractContextManager:
        """Only the last micro-batch of a step exchanges gradients."""
        return contextlib.nullcontext() if last or self.size == 1 else module.no_sync()

    def close(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but these numbers."""
    seed = 0
    for k in key:  # splitmix-style mixing, so that (0, 1) and (1, 0) are unrelated
        seed = (seed + k + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
    return torch.Generator().manual_seed(seed % 2**63)


def print_trained(trained: dict[str, nn.Module], frozen: dict[str, nn.Module]) -> None:
    """The table that shows at a glance whether the right thing is about to be trained."""
    print(f"{'part':<24}{'state':<10}{'tensors':>8}{'parameters':>16}")
    for state, parts in (("trained", trained), ("frozen", frozen)):
        for name, module in parts.items():
            parameters = list(module.parameters())
            if any(p.requires_grad != (state == "trained") for p in parameters):
                raise RuntimeError(f"{name} is listed as {state}, but requires_grad disagrees")
            print(f"{name:<24}{state:<10}{len(parameters):>8}{sum(p.numel() for p in parameters):>16,}")


class Run:
    """One training run: AdamW, schedule, EMA, log and checkpoints of `module`.

    save(folder, module) writes the sampler's copy; `position` is any JSON value that tells where the data stands.

        for step in run.loop():
            ...backward...
            run.update({"loss": loss, "images": n}, position)
    """

    def __init__(self, config: TrainConfig, world: World, module: nn.Module, save: Callable[[Path, nn.Module], None]):
        self.config, self.world, self.module, self.save_part = config, world, module, save
        self.folder = Path(config.out)
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for p in module.parameters() if p.requires_grad]
        if not self.params:
            raise InputError("nothing to train: every parameter is frozen")
        # Decay only matrices: gains and biases are scales, not directions.
        groups = [
            {"params": [p for p in self.params if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in self.params if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)
        self.ema = [p.detach().clone() for p in self.params]
        self.step, self.position = 0, None
        self.seconds = 0.0  # training time of all sittings
        self.window: dict[str, float] = {}
        self._resume()
        if world.main:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / "config.json", dataclasses.asdict(config))

    def loop(self) -> Iterator[int]:
        """Yields step numbers; sets the learning rate before, and stops at the last step or after `minutes`."""
        c = self.config
        self.started = self.tick = time.monotonic()
        self.base_seconds = self.seconds
        while self.step < c.steps:
            if c.minutes and self.world.sum(time.monotonic() - self.started) > 60 * c.minutes * self.world.size:
                break
            for group in self.optimizer.param_groups:
                group["lr"] = c.lr * self.lr_factor(self.step)
            yield self.step
        self.save()

    def lr_factor(self, step: int) -> float:
        """Warm-up, plateau, linear decay: a plateau lets a run be prolonged, the decay is where the loss falls most."""
        c = self.config
        decay_steps = max(1, round(c.decay * c.steps))
        return min(1.0, (step + 1) / max(1, c.warmup), (c.steps - step) / decay_steps)

    def update(self, stats: dict[str, float], position=None) -> None:
        """Clip, step, EMA, log, save. `stats` holds this step's means ("loss", ...) and counts ("tokens", "images")."""
        c = self.config
        norm = nn.utils.clip_grad_norm_(self.params, c.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.position = position
        decay = min(c.ema, (1 + self.step) / (10 + self.step))  # the average must forget the random start
        with torch.no_grad():
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        self._log({**stats, "grad": norm.item()})
        if c.save_every and self.step % c.save_every == 0:
            self.save()

    def _log(self, stats: dict[str, float]) -> None:
        for key, value in stats.items():
            self.window[key] = self.window.get(key, 0.0) + value
        self.window["n"] = self.window.get("n", 0) + 1
        if self.step % self.config.log_every and self.step not in (1, self.config.steps):
            return
        n, now = self.window.pop("n"), time.monotonic()
        elapsed, self.tick = now - self.tick, now
        self.seconds = self.base_seconds + now - self.started
        row = {"step": self.step, "seconds": round(self.seconds, 1), "lr": self.optimizer.param_groups[0]["lr"]}
        for key, value in self.window.items():
            row[key if key not in COUNTS else f"{key}_per_s"] = value / (elapsed if key in COUNTS else n)
        self.window = {}
        if not self.world.main:
            return
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps({k: round(v, 7) for k, v in row.items()}) + "\n")
        eta = (self.config.steps - self.step) * elapsed / n
        cells = [f"{k} {v:8.4f}" for k, v in row.items() if k not in ("step", "seconds", "lr") and not k.endswith("_per_s")]
        rates = [f"{k.removesuffix('_per_s')}/s {v:7.0f}" for k, v in row.items() if k.endswith("_per_s")]
        line = [f"step {self.step:>6}/{self.config.steps}", *cells, f"lr {row['lr']:.2e}", *rates]
        print(" | ".join([*line, f"{self.seconds / 60:6.1f} min", f"eta {eta / 60:5.0f} min"]), flush=True)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside, the module has its averaged weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for p, e in zip(self.params, self.ema, strict=True):
            p.data, e.data = e.data, p.data

    @property
    def sheet_due(self) -> bool:
        """Whether this is a step after which samples are shown; one process shows them."""
        every = self.config.sheet_every
        return bool(every) and self.step % every == 0 and self.world.main

    def sample_file(self, suffix: str) -> Path:
        """Where the samples of this step go."""
        path = self.folder / "samples" / f"step_{self.step:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def save(self) -> None:
        """Write step_N as a whole (temporary name, then rename), then drop the oldest."""
        final = self.folder / f"step_{self.step:06d}"
        if not self.world.main or final.exists() or self.step == 0:
            return
        temporary = self.folder / "saving"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        with self.averaged():
            self.save_part(temporary, self.module)
        tensors = {}
        for name, p, e in zip(self.names, self.params, self.ema, strict=True):
            tensors |= {f"live.{name}": p.detach(), f"ema.{name}": e}
            tensors |= {f"{k}.{name}": v for k, v in self.optimizer.state.get(p, {}).items()}
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, temporary / "trainer.safetensors")
        write_json(temporary / "state.json", {"step": self.step, "seconds": self.seconds, "position": self.position})
        os.replace(temporary, final)
        for old in sorted(self.folder.glob("step_*"))[: -self.config.keep]:
            shutil.rmtree(old)
        print(f"saved {final}", flush=True)

    def _resume(self) -> None:
        if not whole(self.folder):
            return
        folder = latest(self.folder)
        state = json.loads((folder / "state.json").read_text())
        self.step, self.seconds, self.position = state["step"], state["seconds"], state["position"]
        with safe_open(folder / "trainer.safetensors", "pt") as f:
            keys = set(f.keys())
            if {k.removeprefix("live.") for k in keys if k.startswith("live.")} != set(self.names):
                raise InputError(f"{folder}: its trained parameters are not those of this run; choose another --out")
            for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
                p.data.copy_(f.get_tensor(f"live.{name}"))
                self.ema[i].copy_(f.get_tensor(f"ema.{name}"))
                state = {k: f.get_tensor(f"{k}.{name}") for k in ("step", "exp_avg", "exp_avg_sq") if f"{k}.{name}" in keys}
                self.optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state.items()}
        if self.world.main:
            print(f"resumed {folder} after {self.seconds / 60:.1f} min of training", flush=True)


COUNTS = ("tokens", "images", "documents")  # statistics that are logged per second


def whole(run: str | Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(state.parent for state in Path(run).glob("step_*/state.json"))


def latest(run: str | Path) -> Path:
    """The newest of them."""
    if not whole(run):
        raise InputError(f"{run}: no step_* checkpoint here; has the run saved yet?")
    return whole(run)[-1]


def sheet(rows: list[tuple[str, list[Image.Image]]], path: str | Path, height: int = 96, wrap: int = 60) -> None:
    """A picture of samples: one line each, the prompt beside its pictures."""
    columns = max(len(pictures) for _, pictures in rows)
    text_width = 6 * wrap + 16
    page = Image.new("RGB", (text_width + columns * (height + 6), len(rows) * (height + 6) + 6), "white")
    draw = ImageDraw.Draw(page)
    for r, (text, pictures) in enumerate(rows):
        y = r * (height + 6) + 6
        draw.multiline_text((8, y), "\n".join(textwrap.wrap(text, wrap)[: height // 13]), fill="black", spacing=2)
        for c, picture in enumerate(pictures):
            picture = picture.resize((height, height), Image.Resampling.BICUBIC)
            x = text_width + c * (height + 6)
            page.paste(picture, (x, y))
            draw.rectangle((x, y, x + height - 1, y + height - 1), outline="#999")
    page.save(path)


def check_step0(name: str, value: float, low: float, high: float) -> None:
    """The first loss has a known value when model, data and loss are wired as they should be; say whether it has."""
    verdict = "ok" if low <= value <= high else "UNEXPECTED: look at the data and the checkpoint before you go on"
    print(f"step 0: {name} {value:.4f}, expected between {low:.4f} and {high:.4f}: {verdict}", flush=True)


def main(function: Callable[[], None]) -> None:
    """Run a script's main function: a user's mistake is one line and exit status 2, not a traceback."""
    try:
        function()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


class LanguageLoss(nn.Module):
    """Cross-entropy of the MLLM on the supervised tokens of a pack (stage 1); one module with one forward, which DDP needs."""

    def __init__(self, mllm: nn.Module):
        super().__init__()
        self.mllm = mllm

    def forward(self, batch) -> Tensor:
        """batch: data.MLLMBatch with labels (N,), -100 where a token is no target. Returns the sum over targets."""
        hidden = self.mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids)[-1]   # (N, H)
        target = (batch.labels >= 0).nonzero()[:, 0]                                                   # (T,)
        return linear_cross_entropy(hidden.index_select(0, target), self.mllm.lm_head.weight, batch.labels[target])


@dataclass
class Samples:
    """What the flow loss of one micro-batch is taken on: S samples, each a row of pictures of which the first are given."""

    features: Tensor  # (M, L * H) MLLM states of all tokens of the documents
    rows: list[range]  # for each sample the tokens it reads
    latents: list[list[Tensor]]  # for each sample its pictures (C, H, W) in time order
    clean: list[int]  # how many of them are given; the others are targets


class FlowLoss(nn.Module):
    """Flow-matching error of connector and DiT on packed samples; one module with one forward, which DDP needs."""

    def __init__(self, dit: nn.Module, condition_time: float):
        super().__init__()
        self.dit, self.condition_time = dit, condition_time

    def forward(self, samples: Samples, t: Tensor, noise: torch.Generator) -> tuple[Tensor, Tensor]:
        """t (S,): time of each sample's targets. Returns (S,) sums over target tokens of |v_hat - v|^2 / channels, (S,) tokens.

        Given pictures enter clean, at the time condition_time, and carry no loss (backbone's convention, `dit.denoise`).
        """
        device = samples.features.device
        patch = self.dit.config.patch_size[1]
        grids = [[(z.shape[-2] // patch, z.shape[-1] // patch) for z in pictures] for pictures in samples.latents]
        pack = pack_images(grids, device)
        images = [(s, k < samples.clean[s]) for s, pictures in enumerate(samples.latents) for k in range(len(pictures))]
        sample = torch.tensor([s for s, _ in images], device=device)                   # (I,) sample of each picture
        given = torch.tensor([g for _, g in images], device=device)                    # (I,)
        times = torch.where(given, self.condition_time, t.to(device)[sample])          # (I,)
        given_token, t_token = given[pack.image_ids][:, None], times[pack.image_ids][:, None]          # (N, 1)

        x0 = torch.cat([patchify(z, patch) for pictures in samples.latents for z in pictures])         # (N, C4)
        eps = torch.randn(x0.shape, generator=noise).to(device)
        x = torch.where(given_token, x0, interpolate(x0, eps, t_token))                # (N, C4)
        rows = torch.cat([torch.arange(r.start, r.stop) for r in samples.rows]).to(device)
        context = self.dit.crossattn_proj(samples.features).index_select(0, rows)      # (M', D_text)
        cu_context = torch.tensor([0, *map(len, samples.rows)]).cumsum(0).int().to(device)
        v = self.dit(x, times, given, pack, context, cu_context)                       # (N, C4)
        error = (v.float() - velocity_target(x0, eps)).square().mean(1)                # (N,)

        target = (~given_token[:, 0]).float()
        per_sample = torch.zeros(2, len(samples.rows), device=device)
        return tuple(per_sample.index_add(1, sample[pack.image_ids], torch.stack((error * target, target))))


@torch.no_grad()
def read(documents: list[Document], mllm: MLLM, device: torch.device) -> tuple[Tensor, list[int]]:
    """One frozen pass of the MLLM: features (M, L * H) of all tokens, and each document's first row."""
    batch = pack_documents(documents).to(device)
    hidden = mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids)
    return features(hidden), batch.cu_seqlens.tolist()


@torch.no_grad()
def encode(documents: list[Document], vae: VAE, device: torch.device) -> list[list[Tensor]]:
    """Normalised latents of each document's pictures, every picture once, pictures of one size in one call."""
    pictures = [p for document in documents for p in document.pictures]
    latents: dict[int, Tensor] = {}
    for shape in {p.shape for p in pictures}:
        same = [i for i, p in enumerate(pictures) if p.shape == shape]
        x = torch.stack([pictures[i] for i in same]).to(device, memory_format=torch.channels_last)
        latents |= dict(zip(same, vae.encode_latents(x), strict=True))
    in_order = iter([latents[i] for i in range(len(pictures))])
    return [[next(in_order) for _ in document.pictures] for document in documents]


def flow_statistics(t: Tensor, error: Tensor, count: Tensor) -> dict[str, float]:
    """Mean loss of the steps near data, halfway and near noise: shows where on the way a model is bad (minRF's habit)."""
    edges = {"t<.6": (0.0, 0.6), "t<.85": (0.6, 0.85), "t<1": (0.85, 1.0)}
    masks = {name: (t >= low) & (t < high) for name, (low, high) in edges.items()}
    return {name: (error[m].sum() / count[m].sum()).item() for name, m in masks.items() if m.any()}


def part_folder(source: str, part: str) -> str:
    """A part given as a run (its newest checkpoint), as a folder that holds the part, or as the part's own folder or Hub id."""
    if whole(source):
        return str(latest(source) / part)
    return str(Path(source) / part) if (Path(source) / part).is_dir() else source
