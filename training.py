"""What the training scripts share: flags, processes, schedule, optimizer, EMA, log, checkpoints. The loops stay in the scripts.

A run lives in one folder and continues by itself, bit for bit, when the same command is given again:

    runs/x/config.json              the resolved settings of the last start
    runs/x/metrics.jsonl            one line per logged step
    runs/x/index.html               the curves, the newest samples and the settings on one page
    runs/x/skipped.jsonl            steps without a finite loss or gradient, and the documents in them
    runs/x/step_000500/PART/        EMA weights in the published layout: what sample.py loads
    runs/x/step_000500/trainer.safetensors, state.json   live weights, AdamW moments, step, position in the data
    runs/x/step_000500/about.json   seed, hash of the code, package versions, settings, training time
    runs/x/step_000500/SHA256SUMS   of all its files; `sha256sum -c SHA256SUMS` checks them too
    runs/x/samples/                 sheets of samples with their prompts
    runs/x/lock                     held by the training that writes here, named in it; a second one is refused

Randomness is a function of (seed, step, rank), never of a generator's history, so a resumed run needs no generator state.
Ctrl-C, SIGTERM and SIGUSR1 to any rank: all ranks finish the step, save and exit 0; a second Ctrl-C ends at once. A rank that
hangs prints where after --timeout seconds, as does one that waits for a host that is cut off; every rank has ended --timeout +
30 s later at most (the 30 s are torchrun's own before it kills).
"""

import argparse
import contextlib
import dataclasses
import datetime
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import textwrap
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import dit
import interrupt
import model
from checkpoint import InputError, abandon_stdout, list_checkpoints, newest_sound, sync, verify
from checkpoint import write_checksums, write_json
from connector import features
from data import Document, pack_documents, to_float
from distributed import Ranks, lost_peer
from flags import Parser, add_flags
from flops import Batch, flops, peak_flops
from flow import Samples
from lora import Adapted
from model import MLLM, ImageProcessor
from ops import attention, linear_cross_entropy, set_backend
from pages.run import write_page
from threads import Crew
from tokenizer import Rendered, Tokenizer
from vae import VAE


@dataclass
class TrainConfig:
    """Settings of every run; each script adds its own. The comments are what --help says, under these titles."""

    # ---- data
    seed: int = 0  # of the order of the data and of all noise: another one gives another run
    # processes of each rank that read and prepare its data, with the same result for any number; 0: the training does it
    # itself; -1: one for each core of the rank but one, at most 16
    workers: int = -1
    # ---- model
    dtype: str = "auto"  # of the forward pass: bf16 where the hardware has it, else fp32; weights and optimizer stay fp32
    compile: bool = False  # torch.compile of each transformer block: for long runs, since the first steps compile
    # ---- optimizer
    steps: int = 10_000  # optimizer steps in all; more of them prolong a run
    lr: float = 3e-5  # learning rate between warm-up and decay; lower it where the loss jumps. Cosmos-Predict2.5 has 3e-5
    warmup: int = 100  # steps in which the learning rate rises from 0
    decay: float = 0.2  # share of the steps, at the end, in which it falls to 0; 0 for a run that is to be prolonged
    beta2: float = 0.999  # how long AdamW remembers squared gradients; lower it for short runs. Cosmos-Predict2.5 has 0.999
    weight_decay: float = 1e-3  # AdamW's, of matrices alone. Cosmos-Predict2.5 has 0.001
    clip: float = 1.0  # largest gradient norm; inf for no limit
    ema: float = 0.999  # decay of the weights' moving average, which is what sampling gets; nearer to 1 for longer runs
    accumulate: int = 1  # micro-batches per step; raise it where the batch that you want does not fit into memory
    max_skipped: int = 10  # steps in a row without finite loss and gradient that stop the run
    # ---- log and checkpoints
    out: str = "runs/run"  # folder of the run; an existing one is resumed
    log_every: int = 20  # steps between lines of the log
    save_every: int = 500  # steps between checkpoints, beside one at the end; 0 = none
    sheet_every: int = 500  # steps between sheets of samples, beside one after the first step; 0 = none
    keep: int = 2  # newest checkpoints kept, two at least: a damaged one must not be the only one
    keep_every: int = 0  # the checkpoint of every so many steps is kept for good; 0 = none
    profile: bool = False  # log what a step costs by part; a GPU is waited for after each part, which slows it a little
    # ---- machine
    device: str = "auto"  # cpu or cuda; auto is the GPU where there is one
    attention: str = "auto"  # triton or sdpa: which attention computes; auto is triton on a GPU, which repeats its bits
    zero: bool = False  # optimizer states shared out over the ranks (ZeroRedundancyOptimizer), to save memory
    minutes: float = 0.0  # stop (and save) after this many minutes of this sitting; 0 = no limit
    timeout: float = 900.0  # seconds until a rank that does not come on is ended; saves and sheets of rank 0 have to fit

    def __post_init__(self):
        self.check()

    def check(self) -> None:
        """InputError, before anything is loaded, for a value that no run could use."""
        for names, ok, what in LIMITS:
            for name in names.split():
                if hasattr(self, name) and not ok(getattr(self, name)):
                    raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be {what}")


# Flags of all scripts, which values they may have, and how that is said. A comparison with nan is False.
LIMITS = (
    ("steps accumulate targets batch log_every lookahead max_skipped vocabulary", lambda x: x >= 1, "1 or more"),
    ("save_every sheet_every keep_every warmup documents tokens patches latents lora", lambda x: x >= 0, "0 or more"),
    ("lr weight_decay minutes kl replay_mb", lambda x: 0 <= x < math.inf, "a finite number, 0 or more"),
    ("beta2 ema condition_time", lambda x: 0 <= x < 1, "from 0 to below 1"),
    ("decay drop looking", lambda x: 0 <= x <= 1, "from 0 to 1"),
    ("shift", lambda x: 0 < x < math.inf, "a finite number above 0"),
    ("clip", lambda x: x > 0, "above 0; inf for no limit"),
    ("timeout", lambda x: 0 < x <= 1e7, "above 0 and at most 10000000 seconds"),
    ("seed", lambda x: 0 <= x < 2**63, "a whole number from 0 to 2^63 - 1"),
    ("workers", lambda x: x >= -1, "0 or more, or -1 for as many as the cores allow"),
    ("keep", lambda x: x >= 2, "2 or more, for the newest checkpoint may turn out damaged"),
    ("frames", lambda x: x >= 2, "2 or more"),
    ("size", lambda x: x >= 16 and x % 16 == 0, "a multiple of 16"),
    ("dtype frozen_dtype", lambda x: x in ("auto", "bf16", "fp32"), "auto, bf16 or fp32"),
    ("out", lambda x: x, "the folder of the run"),
)


def parse_config(cls: type, argv: list[str] | None = None, doc: str = "", plan: bool = False):
    """The settings that a command line gives to a script; see flags.py.

    plan: the script knows --plan, and so says its --help. Nothing here obeys it: the script looks for it beforehand.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    if plan:
        parser.add_argument("--plan", action="store_true", help="print what this would cost, and end; see tools/plan.py")
    add_flags(parser, cls)
    values = vars(parser.parse_flags(sys.argv[1:] if argv is None else argv))
    values.pop("plan", None)
    return cls(**values)


def compile_blocks(module: nn.Module) -> None:
    """torch.compile of each transformer block, once for all of a kind, or of the whole where there is none.

    What is around the blocks plans a pack in Python, and would be compiled anew for every pack; so would attention, which
    reads the lengths of the sequences.
    """
    for home in (model, dit):
        home.attention = torch.compiler.disable(attention)
    blocks = [m for m in module.modules() if isinstance(m, (model.Layer, model.VisionBlock, dit.Block))]
    for block in blocks or [module]:
        block.compile(dynamic=True)  # no two packs have the same shape


def pick_dtype(name: str, device: torch.device) -> str:
    """"bf16" or "fp32"; "auto" is bf16 on a GPU and on a CPU that computes in it. Others emulate it, ten times slower."""
    if name == "auto":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        name = "bf16" if device.type == "cuda" or native else "fp32"
    if name not in ("bf16", "fp32"):
        raise InputError(f"--dtype {name}: training runs in auto, bf16 or fp32")
    return name


def pick_frozen_dtype(name: str, dtype: str, device: torch.device) -> torch.dtype:
    """Of frozen weights. "auto" is bf16 on a GPU whose forward pass computes in it: half the memory, and no casts."""
    if name == "auto":
        name = pick_dtype(dtype, device) if device.type == "cuda" else "fp32"
    if name not in ("bf16", "fp32"):
        raise InputError(f"--frozen-dtype {name}: frozen weights are held in auto, bf16 or fp32")
    return torch.bfloat16 if name == "bf16" else torch.float32


def autocast(dtype: str, device: torch.device) -> torch.autocast:
    """Forward passes in bf16, or as the weights are (fp32)."""
    return torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(dtype, device) == "bf16")


def generator(*key: int) -> torch.Generator:
    """A CPU generator that depends on nothing but these numbers."""
    seed = 0
    # Mixed as in splitmix, so that (0, 1) and (1, 0) are unrelated.
    for k in key:
        seed = (seed + k + 0x9E3779B97F4A7C15) % 2**64
        seed = (seed ^ seed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        seed = (seed ^ seed >> 27) * 0x94D049BB133111EB % 2**64
    return torch.Generator().manual_seed(seed % 2**63)


def print_trained(trained: dict[str, nn.Module], frozen: dict[str, nn.Module]) -> None:
    """The table that shows at a glance whether the right thing is about to be trained."""
    print(f"{'part':<24}{'state':<10}{'tensors':>8}{'parameters':>16}{'GB':>9}")
    for state, parts in (("trained", trained), ("frozen", frozen)):
        for name, module in parts.items():
            parameters = list(module.parameters())
            if any(p.requires_grad != (state == "trained") for p in parameters):
                raise RuntimeError(f"{name} is listed as {state}, but requires_grad disagrees")
            size = sum(p.numel() for p in parameters)
            gb = sum(p.nbytes for p in parameters) / 1e9
            print(f"{name:<24}{state:<10}{len(parameters):>8}{size:>16,}{gb:>9.2f}")


class Run:
    """One training run: AdamW, schedule, EMA, log and checkpoints of `module`. The script's loop says what is done when:

        for step in run.loop():
            ...loss, backward...
            norm = run.clip()
            stats = ranks.sum_statistics({"loss": loss, "images": n})
            if run.finite(stats["loss"], norm, names):
                run.optimizer.step()
                run.average()
                run.log(stats, norm)
            run.optimizer.zero_grad()
            run.save_if_due(place)

    save(folder, module) writes the sampler's copy. `step` is the number of the step in progress or of the last one, from 1 on.
    After a resume `position` is every rank's place in the data, else None.
    """

    def __init__(self, config: TrainConfig, ranks: Ranks, module: nn.Module, save: Callable[[Path, nn.Module], None]):
        # Checked once more, since a script may have changed something. From here on the settings say what "auto" has become.
        config.check()
        config.dtype = pick_dtype(config.dtype, ranks.device)
        set_backend(config.attention, ranks.device)
        self.config = config
        self.ranks = ranks
        self.module = module
        self.save_part = save
        self.folder = Path(config.out)
        self.code = code_hash()
        self.device = torch.cuda.get_device_name() if ranks.device.type == "cuda" else platform.processor() or "cpu"
        self.peak = peak_flops(self.device) if config.dtype == "bf16" else None  # FLOP/s, where the device's are known

        # What is trained, by what, and its average.
        self.names = [n for n, p in module.named_parameters() if p.requires_grad]
        self.params = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.params, config, ranks)
        self.ema = [p.detach().clone() for p in self.params]
        self.crew = Crew(sum(p.numel() for p in module.parameters()), ranks.device.type)

        # How far it is: as at the start, or as the newest checkpoint says.
        self.step = 0
        self.position = None
        self.skipped = 0  # steps without a finite loss and gradient
        self.in_a_row = 0
        self.problem = ""  # what was wrong with the last of them
        self.seconds = 0.0  # training time of all sittings
        self.unlogged = 0.0  # of it, since the last line of the log
        self.window: dict[str, float | list[float]] = {}  # sums of the statistics since then
        self.asked = ""  # the signal that asks for an end
        self.laps: Laps | None = None
        self._resume()
        self.saved = self.step
        if ranks.main:
            self._prepare_folder()
            print(f"{ranks.size} x {ranks.device.type}, forward pass in {config.dtype}, code {self.code[:12]}", flush=True)

    # ------------------------------------------------------------------------------------------------ from step to step

    def loop(self) -> Iterator[int]:
        """Yields how many steps are done; sets the learning rate before. Ends at the last step, after `minutes`, or when a
        signal asks; then it saves."""
        self.started = time.monotonic()
        self.shown = self.started  # when the page was
        self.tick = self.started - self.unlogged  # of the last line of the log, were there no break between sittings
        self.base_seconds = self.seconds
        self.laps = Laps(self.ranks.device) if self.config.profile else None
        with self._signals():
            while self.step < self.config.steps and not self._ending():
                # A rank that does not come on from here is missed by the others after --timeout.
                self.ranks.alive()
                self.crew.adapt()
                for group in self.optimizer.param_groups:
                    group["lr"] = self.config.lr * self.lr_factor(self.step)
                self.step += 1
                self.lap("host")
                yield self.step - 1
                # The script has painted its sheet by now: the page shows it.
                if self.sheet_due:
                    self.show()
                self.lap("save")
            # Still inside, so that a signal during the last save does not end it.
            self.save()
            if self.step < self.config.steps and self.ranks.main:
                self._say(f"ended after step {self.step} of {self.config.steps}; the same command continues")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Inside, a signal asks for an end after the step, and a second Ctrl-C ends at once."""
        # The first one only leaves word: the step in progress is finished.
        before = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        # The second one must not wait for Python: the number of each goes down a pipe at once, where a thread reads.
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=end_at_second, args=(reading,), daemon=True).start()
        try:
            yield
        finally:
            self.ranks.unwatched()
            # After a Ctrl-C what is left is to leave, and a second one still has to end that at once.
            if self.asked != "SIGINT":
                signal.set_wakeup_fd(wakeup)
                os.close(writing)
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _ask(self, number: int, frame: types.FrameType | None) -> None:
        if number == signal.SIGINT and not self.asked and self.ranks.main:
            interrupt.say("\ninterrupted: the step is finished and saved; Ctrl-C once more ends at once")
        self.asked = signal.Signals(number).name

    def _ending(self) -> bool:
        """Whether any rank has reason to end; all ranks agree."""
        minutes = self.config.minutes
        late = bool(minutes) and time.monotonic() - self.started > 60 * minutes
        # A terminal's Ctrl-C comes to all ranks, and one of them says so.
        if self.asked and (self.ranks.main or self.asked != "SIGINT"):
            self._say(f"{self.asked}: rank {self.ranks.rank} asks to save and end after step {self.step}")
        # Clocks and signals differ from rank to rank; a rank that left alone would let the others wait.
        return self.ranks.sum(float(late or bool(self.asked))) > 0

    def _say(self, line: str) -> None:
        """Print. In `| tee log` Ctrl-C has ended the reader as well, which must not keep the run from saving."""
        try:
            print(line, flush=True)
        except BrokenPipeError:
            if not self.asked:
                raise
            abandon_stdout()

    def lap(self, part: str) -> None:
        """All since the lap before was this one of PARTS; counted with --profile only."""
        if self.laps:
            self.laps.end(part)

    def lr_factor(self, step: int) -> float:
        """Warm-up, plateau, linear decay: a plateau lets a run be prolonged, the decay is where the loss falls most."""
        c = self.config
        decay_steps = max(1, round(c.decay * c.steps))
        return min(1.0, (step + 1) / max(1, c.warmup), (c.steps - step) / decay_steps)

    def clip(self) -> float:
        """Scale the gradient down to the largest norm allowed. Returns the norm that it had."""
        self.lap("host")
        norm = nn.utils.clip_grad_norm_(self.params, self.config.clip).item()
        self.lap("optimizer")
        return norm

    def finite(self, loss: float, norm: float, names: list[str]) -> bool:
        """Whether loss and gradient are numbers; both are the same on all ranks, and so is what is done then.

        If not, the step changes no weight. names, the documents in it, are told and kept in skipped.jsonl.
        """
        self.lap("host")
        if math.isfinite(norm) and math.isfinite(loss):
            self.in_a_row = 0
            return True
        self.skipped += 1
        self.in_a_row += 1
        # Whichever rank had the bad document: all of the step are named.
        names = sum(self.ranks.gather(list(names)), [])
        more = f" and {len(names) - 8} more, see skipped.jsonl" if len(names) > 8 else ""
        self.problem = f"step {self.step}: loss {loss:.4g}, gradient norm {norm:.4g}: documents {', '.join(names[:8])}{more}"
        if self.ranks.main:
            row = {"step": self.step, "loss": str(loss), "grad": str(norm), "documents": names}
            with open(self.folder / "skipped.jsonl", "a") as f:
                f.write(json.dumps(row) + "\n")
            print(f"skipped {self.problem} ({self.skipped} skipped so far)", file=sys.stderr, flush=True)
        return False

    @torch.no_grad()
    def average(self) -> None:
        """Move the averaged weights towards the live ones; quickly at first, for they must forget the random start."""
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        self.lap("optimizer")

    # --------------------------------------------------------------------------------------------------------------- the log

    def log(self, stats: dict[str, float | list[float]], norm: float) -> None:
        """Add a step to the statistics of the log, and write and print its line if one is due.

        stats: over all ranks, the "loss" and other means, COUNTS ("tokens", "flops"), and weighted means as [sum, weight].
        """
        # Into the window: means and counts are sums until the line is due, weighted means keep their weight beside them.
        for key, value in {**stats, "grad": norm}.items():
            if isinstance(value, list):
                total, weight = self.window.get(key, [0.0, 0.0])
                self.window[key] = [total + value[0], weight + value[1]]
            else:
                self.window[key] = self.window.get(key, 0.0) + value
        self.window["n"] = self.window.get("n", 0) + 1

        # The clock goes on where the sittings before this one left it.
        now = time.monotonic()
        self.seconds = self.base_seconds + now - self.started
        self.unlogged = now - self.tick
        if self.step % self.config.log_every and self.step not in (1, self.config.steps):
            return

        # The line, and an empty window for the next one.
        parts = self.laps.take(self.window["n"]) if self.laps else {}
        row = self._row(now)
        self.window = {}
        self.tick = now
        self.unlogged = 0.0
        if self.ranks.main:
            with open(self.folder / "metrics.jsonl", "a") as f:
                f.write(json.dumps({k: round(v, 7) for k, v in (row | parts).items() if v is not None}) + "\n")
            self._say(status_line(row, self.config.steps))
            # A page takes longer than a line to write: not with each of them.
            if parts:
                self._say("    ms of a step: " + " | ".join(f"{k.removeprefix('ms_')} {v:.1f}" for k, v in parts.items()))
            if now - self.shown > PAGE_SECONDS:
                self.show()

    def _row(self, now: float) -> dict[str, float | None]:
        """Means and rates since the line before, by their names in metrics.jsonl; None: a mean of nothing."""
        n = self.window.pop("n")
        row = {"step": self.step, "seconds": round(self.seconds, 1), "lr": self.optimizer.param_groups[0]["lr"]}

        # What was summed becomes a mean: weighted, per second, or per step.
        for key, value in self.window.items():
            if isinstance(value, list):
                total, weight = value
                row[key] = total / weight if weight else None
            elif key in COUNTS:
                row[f"{key}_per_s"] = value / self.unlogged
            else:
                row[key] = value / n

        # Beside that, what the hardware had of it.
        if self.peak and "flops_per_s" in row:
            row["mfu"] = row["flops_per_s"] / self.peak / self.ranks.size
        row["memory_gb"] = peak_memory(self.ranks.device)
        row["skipped"] = self.skipped

        # As long as the steps left take at this pace; but not longer than this sitting may.
        row["eta_s"] = (self.config.steps - self.step) * self.unlogged / n
        if self.config.minutes:
            left = 60 * self.config.minutes - (now - self.started)
            row["eta_s"] = min(row["eta_s"], max(0.0, left))
        return row

    # ------------------------------------------------------------------------------------------------------- samples and page

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
        """Whether this is a step after which samples are shown; one process shows them. The first shows where a run starts."""
        every = self.config.sheet_every
        return bool(every) and (self.step == 1 or self.step % every == 0) and self.ranks.main

    def sample_file(self, suffix: str) -> Path:
        """Where the samples of this step go."""
        path = self.folder / "samples" / f"step_{self.step:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def show(self) -> None:
        """Rewrite the run's page."""
        self.shown = time.monotonic()
        if self.ranks.main:
            write_page(self.folder, self.about())

    def about(self) -> dict:
        """What a checkpoint was made by."""
        return {
            "step": self.step,
            "seed": self.config.seed,
            "code_sha256": self.code,
            "versions": {"python": platform.python_version(), **{p: importlib.metadata.version(p) for p in PACKAGES}},
            "device": self.device,
            "world_size": self.ranks.size,
            "seconds": self.seconds,
            "unlogged_seconds": self.unlogged,
            "saved": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "config": dataclasses.asdict(self.config),
        }

    # --------------------------------------------------------------------------------------------------------- checkpoints

    def save_if_due(self, place: int | dict) -> None:
        """Save every `save_every` steps; and give up, saved, where too many in a row had no finite loss and gradient.

        place: where this rank's data stands behind the step.
        """
        self.lap("host")
        self.place = place
        every = self.config.save_every
        hopeless = self.in_a_row >= self.config.max_skipped
        if hopeless or (every and self.step % every == 0):
            self.save()
        if hopeless:
            raise InputError(f"{self.in_a_row} steps in a row without a finite loss and gradient; {self.problem}")

    def save(self) -> None:
        """Write step_N as a whole or not at all, then drop what is too old. All ranks call it, rank 0 writes."""
        if self.step == self.saved:
            return
        self.saved = self.step
        self.ranks.alive()

        # What only all ranks together know.
        position = self.ranks.gather(self.place)
        moments = self._moments()

        # Written aside, with checksums, and renamed when all is on the disk: a folder of that name is a whole checkpoint.
        if self.ranks.main:
            final = self.folder / f"step_{self.step:06d}"
            temporary = self.folder / "saving"
            try:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                self._write(temporary, position, moments)
                write_checksums(temporary)
                os.replace(temporary, final)
                sync(self.folder)
                self.show()
            except (OSError, SafetensorError, InputError) as e:
                # A full disk, most likely: make the little room that there is, and say what is left to go on from.
                shutil.rmtree(temporary, ignore_errors=True)
                kept = next((f.name for f in reversed(list_checkpoints(self.folder)) if not verify(f)), "none")
                raise InputError(f"{final}: this checkpoint cannot be written ({e}); the last good one is {kept}: make room "
                                 "and give the same command again") from e  # fmt: skip
            # Only now: until the new one is there, the oldest may be the only sound one.
            self._drop()
            self._say(f"saved {final}")
        self.ranks.alive()

    def _moments(self) -> dict[str, dict[str, Tensor]]:
        """AdamW's state of each parameter. With --zero rank 0 gets them from all ranks, and the others nothing."""
        if not isinstance(self.optimizer, torch.optim.AdamW):
            self.optimizer.consolidate_state_dict(0)
            if not self.ranks.main:
                return {}
        # The optimizer numbers parameters in the order of its groups.
        name_of = {id(p): name for name, p in zip(self.names, self.params, strict=True)}
        order = [name_of[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        return {order[i]: state for i, state in self.optimizer.state_dict()["state"].items()}

    def _write(self, folder: Path, position: list, moments: dict[str, dict[str, Tensor]]) -> None:
        """All files of a checkpoint but the checksums."""
        # For sampling: the averaged weights, in the published layout.
        with self.averaged():
            self.save_part(folder, self.module)

        # For going on: live weights, average and moments of each parameter, under its name.
        tensors = {}
        for name, p, e in zip(self.names, self.params, self.ema, strict=True):
            tensors[f"live.{name}"] = p.detach()
            tensors[f"ema.{name}"] = e
            for moment, value in moments.get(name, {}).items():
                tensors[f"{moment}.{name}"] = value
        save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, folder / "trainer.safetensors")

        # And how far the run is.
        state = {k: getattr(self, k) for k in ("step", "skipped", "in_a_row", "window")}
        write_json(folder / "state.json", {**state, "position": position})
        write_json(folder / "about.json", self.about())

    def _drop(self) -> None:
        """Remove all checkpoints but the newest and those that are kept for good."""
        every = self.config.keep_every
        for old in list_checkpoints(self.folder)[: -self.config.keep]:
            if not every or int(old.name.removeprefix("step_")) % every:
                # Half of it removed, it must not look like one.
                os.replace(old, self.folder / "dropping")
                shutil.rmtree(self.folder / "dropping")

    # --------------------------------------------------------------------------------------------------------------- resuming

    def _resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        # One rank looks, so that all go on from the same one.
        name = self.ranks.first(self._newest() if self.ranks.main else "")
        if not name:
            return
        folder = Path(name)
        if not folder.is_dir():
            raise InputError(f"{folder}: rank {self.ranks.rank} does not see it: --out must be a folder that all hosts share")
        state = json.loads((folder / "state.json").read_text())
        about = {}
        if (folder / "about.json").is_file():
            about = json.loads((folder / "about.json").read_text())

        # What an older checkpoint does not know begins anew.
        self.step = state["step"]
        self.position = state["position"]
        self.skipped = state.get("skipped", 0)
        self.in_a_row = state.get("in_a_row", 0)
        self.window = state.get("window", {})
        self.seconds = about.get("seconds", state.get("seconds", 0.0))
        self.unlogged = about.get("unlogged_seconds", 0.0)
        self._load(folder)
        if self.ranks.main:
            print(f"resumed {folder} after {self.seconds / 60:.1f} min of training", flush=True)
            self._tell_changes(about)

    def _newest(self) -> str:
        """The newest sound checkpoint, empty if there is none; what is newer and damaged is named and put aside."""
        if not list_checkpoints(self.folder):
            return ""
        good = newest_sound(self.folder)
        for bad in list_checkpoints(self.folder):
            if bad > good:
                aside = self.folder / f"damaged_{bad.name}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(bad, aside)
        return str(good)

    def _load(self, folder: Path) -> None:
        """Weights, their average and AdamW's moments of a checkpoint; with --zero the moments of this rank's share."""
        # Under --zero the optimizer of this rank is inside, with its share of the parameters.
        optimizer = getattr(self.optimizer, "optim", self.optimizer)
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        with safe_open(folder / "trainer.safetensors", "pt") as f:
            keys = set(f.keys())
            if {k.removeprefix("live.") for k in keys if k.startswith("live.")} != set(self.names):
                raise InputError(f"{folder}: its trained parameters are not those of this run; choose another --out")
            for name, p, e in zip(self.names, self.params, self.ema, strict=True):
                p.data.copy_(f.get_tensor(f"live.{name}"))
                e.copy_(f.get_tensor(f"ema.{name}"))
                # A parameter that was not stepped yet has no moments, and another rank's are not wanted.
                if f"step.{name}" not in keys or id(p) not in own:
                    continue
                state = {"step": f.get_tensor(f"step.{name}").to(p.device)}
                for moment in ("exp_avg", "exp_avg_sq"):
                    # In the parameter's memory layout (channels last): the fused step reads both as they lie in memory.
                    state[moment] = torch.empty_like(p.detach()).copy_(f.get_tensor(f"{moment}.{name}"))
                optimizer.state[p] = state

    def _tell_changes(self, about: dict) -> None:
        """Which settings are not those of the checkpoint that is resumed, and whether the code is another."""
        old = about.get("config", {})
        new = dataclasses.asdict(self.config)
        changed = [f"{k} {old[k]} -> {v}" for k, v in new.items() if k in old and old[k] != v]
        if about.get("code_sha256", self.code) != self.code:
            changed.append("code")
        if changed:
            print(f"changed since then: {', '.join(changed)}", flush=True)

    def _prepare_folder(self) -> None:
        """Settings in, and out what a run left that was cut off in the middle of a save or of a line."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for aside in ("saving", "dropping"):
            shutil.rmtree(self.folder / aside, ignore_errors=True)
        write_json(self.folder / "config.json", dataclasses.asdict(self.config))

        # Lines behind the checkpoint are written anew as the steps are done again.
        for log in (self.folder / "metrics.jsonl", self.folder / "skipped.jsonl"):
            if log.is_file():
                lines = [line for line in log.read_text().splitlines() if line.endswith("}")]
                kept = [line for line in lines if json.loads(line)["step"] <= self.step]
                log.with_suffix(".tmp").write_text("".join(f"{line}\n" for line in kept))
                os.replace(log.with_suffix(".tmp"), log)


class Laps:
    """Where the time of a step goes. Its parts follow one another, so one clock is enough.

    On a GPU what a part has asked for is waited for at its end; else the next part that waits would seem to take that long.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.since = time.perf_counter()

    def end(self, part: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        self.seconds[part] += now - self.since
        self.since = now

    def take(self, steps: int) -> dict[str, float]:
        """Milliseconds of each of so many steps, by their names in metrics.jsonl. Counting begins anew."""
        means = {f"ms_{part}": 1000 * seconds / steps for part, seconds in self.seconds.items()}
        self.seconds = dict.fromkeys(PARTS, 0.0)
        return means


def make_optimizer(params: list[nn.Parameter], config: TrainConfig, ranks: Ranks) -> torch.optim.Optimizer:
    """AdamW; with --zero its moments are shared out over the ranks."""
    if not params:
        raise InputError("nothing to train: every parameter is frozen")
    # Decay only matrices: gains and biases are scales, not directions.
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    options = {"lr": config.lr, "betas": (0.9, config.beta2), "fused": True}
    # One rank has nobody to share with.
    if not config.zero or ranks.size == 1:
        return torch.optim.AdamW(groups, **options)
    # Here, for it is slow to import, and its import warns.
    from torch.distributed.optim import ZeroRedundancyOptimizer

    return ZeroRedundancyOptimizer([g for g in groups if g["params"]], torch.optim.AdamW, **options)


PAGE_SECONDS = 60  # the page of a run is rewritten with a line of the log, if it is older
COUNTS = ("tokens", "images", "documents", "flops")  # statistics that are logged per second
PACKAGES = ("torch", "numpy", "safetensors", "tiktoken", "pillow", "huggingface_hub")
# Of a step, with --profile: waiting for data, the models that are not trained, ..., what Python does besides, saves and sheets.
PARTS = ("data", "frozen", "forward", "backward", "optimizer", "host", "save")
KINDS = ("text", "bov", "end")  # of what stage 1 learns: words, BOV (a picture is due), the end of a turn
DECILES = [f"t{k}" for k in range(10)]  # loss at times from k/10 to (k + 1)/10, in metrics.jsonl only
SHEET_ASKED, SHEET_TOLD = "#1d4ed8", "#555555"  # on a sheet of samples, the user's words and what is told with the picture


def status_line(row: dict[str, float | None], steps: int) -> str:
    """One line of the log, its columns under those of the line before."""
    cells = [f"step {row['step']:>7}/{steps}"]

    # Means: the loss, its parts, what else the script counts, the gradient's norm.
    hidden = ("step", "seconds", "lr", "memory_gb", "mfu", "skipped", "eta_s", *DECILES)
    for key, value in row.items():
        if key not in hidden and not key.endswith("_per_s"):
            shown = f"{'-':>8}" if value is None else f"{value:8.4f}"
            cells.append(f"{key} {shown}")
    cells.append(f"lr {row['lr']:.2e}")

    # Speed: in what the script counts, and against the hardware's where that is known.
    for key in COUNTS:
        if key != "flops" and f"{key}_per_s" in row:
            cells.append(f"{key}/s {row[f'{key}_per_s']:8.1f}")
    if "mfu" in row:
        cells.append(f"mfu {row['mfu']:6.1%}")
    elif "flops_per_s" in row:
        cells.append(f"GFLOP/s {row['flops_per_s'] / 1e9:8.1f}")

    cells.append(f"mem {row['memory_gb']:6.2f} GB")
    cells.append(f"eta {datetime.timedelta(seconds=round(row['eta_s']))!s:>16}")
    if row["skipped"]:
        cells.append(f"skipped {row['skipped']}")
    return " | ".join(cells)


def peak_memory(device: torch.device) -> float:
    """GB that this process has held at most: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def code_hash() -> str:
    """Of all code, data and templates beside this file and in the packages beside it, names and contents."""
    # Packages alone: a folder without __init__.py may be anything, a run, say.
    root = Path(__file__).parent
    folders = [root, *(file.parent for file in root.glob("*/__init__.py"))]
    files = [file for folder in folders for file in folder.glob("*.*")]

    # The name and the size of a file stand before its bytes, so that none can be taken for the end of another.
    total = hashlib.sha256()
    for path in sorted(file for file in files if file.suffix in (".py", ".json", ".html", ".css")):
        total.update(f"{path.relative_to(root).as_posix()}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return total.hexdigest()


def asked_and_told(rendered: Rendered, j: int, tokenizer: Tokenizer) -> tuple[str, str]:
    """What the user asked last before picture j, and the assistant's words between the picture before and this one."""
    # Control tokens stay in: they tell where a turn or a picture ends.
    text = tokenizer.decode(rendered.ids[: rendered.images[j].bov], skip_special=False)
    turns = [turn.partition("\n") for turn in text.split("<|im_start|>")]
    asked = next((body for role, _, body in reversed(turns) if role == "user"), "")
    told = turns[-1][2].rpartition("<|vision_end|>")[2]
    # A line each, without those that are left.
    return tuple(" ".join(re.sub(r"<\|\w+\|>", " ", words).split()) for words in (asked, told))


def sheet(rows: list[tuple[str, str, list[Image.Image | None]]], columns: list[str], path: str | Path, height: int = 96,
          wrap: int = 60) -> None:  # fmt: skip
    """A picture of samples: one line each, (what was asked, what is told of it, pictures), under the names of its columns.

    The texts and the place of each picture are also in the file, as JSON under the name "sheet", for `pages.run.sample`. A None
    among the pictures leaves its place empty.
    """
    # The paper: a line of the sheet is as high as its pictures are wide. Without words there is no room for them.
    told_of = [any(row[k] for row in rows) for k in (0, 1)]
    line = height + 6
    top = 24
    left = 6 * wrap + 16 if any(told_of) else 8
    page = Image.new("RGB", (left + len(columns) * line, top + len(rows) * line), "white")
    draw = ImageDraw.Draw(page)

    # The names of the columns.
    if told_of[0]:
        draw.text((8, 6), "what was asked", fill=SHEET_ASKED)
    if told_of[1]:
        draw.text((108, 6), "what is told with the picture", fill=SHEET_TOLD)
    for c, name in enumerate(columns):
        draw.text((left + c * line, 6), name, fill="black")

    placed = []
    for r, (asked, told, pictures) in enumerate(rows):
        y = top + r * line
        # Words, as many lines of 13 pixels as there is room for: what was asked gets half of them and one, the rest is told.
        asked = textwrap.shorten(asked, 400, placeholder=" ...")
        told = textwrap.shorten(told, 400, placeholder=" ...")
        most = height // 13
        above = textwrap.wrap(asked, wrap)[: most // 2 + 1]
        below = textwrap.wrap(told, wrap)[: most - len(above)]
        draw.multiline_text((8, y), "\n".join(above), fill=SHEET_ASKED, spacing=2)
        draw.multiline_text((8, y + 13 * len(above)), "\n".join(below), fill=SHEET_TOLD, spacing=2)

        # Pictures, and where they are, for whoever cuts them out again.
        boxes = []
        for c, picture in enumerate(pictures):
            x = left + c * line
            boxes.append([x, y, x + height, y + height] if picture else None)
            if picture:
                page.paste(picture.resize((height, height), Image.Resampling.BICUBIC), (x, y))
                draw.rectangle((x, y, x + height - 1, y + height - 1), outline="#999")
        placed.append({"asked": asked, "told": told, "boxes": boxes})

    info = PngInfo()
    info.add_itxt("sheet", json.dumps({"columns": columns, "rows": placed}))
    page.save(path, "PNG", pnginfo=info)


def check_step0(name: str, value: float, low: float, high: float) -> None:
    """The first loss has a known value when model, data and loss are wired as they should be; say whether it has."""
    verdict = "ok" if low <= value <= high else "UNEXPECTED: look at the data and the checkpoint before you go on"
    print(f"step 0: {name} {value:.4f}, expected between {low:.4f} and {high:.4f}: {verdict}", flush=True)


def end_at_second(signals: int) -> None:
    """Reads the numbers of this process' signals from a pipe; one that comes after a Ctrl-C ends it at once.

    A thread of its own, since a Python handler has to wait until the main thread is out of PyTorch, and that may be waiting for
    a rank that is gone. SIGTERM counts as well: torchrun sends it at the second Ctrl-C.
    """
    before = None
    while number := os.read(signals, 1):
        if before and number[0] in (signal.SIGINT, signal.SIGTERM):
            interrupt.end_now("" if os.environ.get("RANK", "0") != "0" else "ended at once; the last checkpoint is kept")
        before = before or number[0] == signal.SIGINT
    os.close(signals)


def run_script(function: Callable[[], None]) -> None:
    """Run a script's main function. A user's mistake is one line and status 2, a lost rank one line of all others and 1."""
    try:
        try:
            function()
        finally:
            sys.stdout.flush()
    except InputError as e:
        print(f"error: {e}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        interrupt.end_now("interrupted")
    except BrokenPipeError:
        abandon_stdout()
        sys.exit(1)
    except RuntimeError as e:
        lost = lost_peer(e)
        if not lost:
            raise
        print(f"error: {lost}", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as e:
        if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"error: {e.filename or 'a file'} cannot be written ({e.strerror}): make room and give the same command again; "
              "the last good checkpoint is kept", file=sys.stderr, flush=True)  # fmt: skip
        sys.exit(2)


class LanguageLoss(nn.Module):
    """Cross-entropy of the MLLM on the supervised tokens of a pack (stage 1); one module with one forward, which DDP needs."""

    def __init__(self, mllm: nn.Module):
        super().__init__()
        self.mllm = mllm

    def forward(self, batch) -> tuple[Tensor, Tensor]:
        """batch: data.MLLMBatch with labels (N,), -100 where a token is no target. Returns the sum over targets, `by_kind`."""
        hidden = self.mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids)[-1]   # (N, H)
        # Logits of the targets alone: of all tokens they would be the largest tensor of the step.
        target = (batch.labels >= 0).nonzero()[:, 0]                                                   # (T,)
        hidden = hidden.index_select(0, target)                                                        # (T, H)
        labels = batch.labels[target]                                                                  # (T,)
        total = linear_cross_entropy(hidden, self.mllm.lm_head.weight, labels)
        return total, self.by_kind(hidden.detach(), labels, total.detach())

    @torch.no_grad()
    def by_kind(self, hidden: Tensor, labels: Tensor, total: Tensor) -> Tensor:
        """(3, 2): sum of the losses and number of the targets of each of KINDS. Those of control tokens are few, and are
        computed once more; text is the rest."""
        c = self.mllm.config
        kinds = []
        for token in (c.vision_start_token_id, c.eos_token_id):
            own = (labels == token).nonzero()[:, 0]
            loss = F.cross_entropy(self.mllm.logits(hidden[own]).float(), labels[own], reduction="sum")
            kinds.append(torch.stack((loss, loss.new_tensor(len(own)))))
        control = torch.stack(kinds)                                                                   # (2, 2)
        text = torch.stack((total, total.new_tensor(len(labels)))) - control.sum(0)
        return torch.cat((text[None], control))


def model_flops(documents: list[Document], mllm: MLLM, samples: Samples | None = None, dit=None, vae=None) -> float:
    """Forward and backward FLOPs of a micro-batch of stage 1, or of stage 2 where there are samples: what MFU counts.

    documents: those that were read for it. In stage 2 it may train others, of earlier ones.
    """
    adapters = any(isinstance(m, Adapted) for m in (dit or mllm).modules())
    # What the MLLM reads, in both stages.
    grids = [grid for d in documents for grid in d.grids]
    lengths = [len(d) for d in documents]

    # Stage 1 computes logits of its targets.
    if samples is None:
        supervised = sum(sum(d.rendered.loss[1:]) for d in documents)
        parts = flops(1, mllm.config, Batch.of(mllm.config, lengths, grids, supervised), adapters=adapters)
        return float(sum(map(sum, parts.values())))

    # Stage 2 encodes the pictures of what it reads, and the DiT reads rows of states and of patches. The connector reads
    # features of no more documents than the samples are of.
    pictures = [tuple(picture.shape[1:]) for d in documents for picture in d.pictures]
    frozen = flops(2, mllm.config, Batch.of(mllm.config, lengths, grids, 0, pictures), dit.config, vae.config)
    patch = dit.config.patch_size[1] ** 2
    rows = []
    for pictures, tokens in zip(samples.latents, samples.rows, strict=True):
        rows.append(([z.shape[1] * z.shape[2] // patch for z in pictures], len(tokens)))
    learnt = Batch.of(mllm.config, [len(samples.features)], samples=rows)
    trained = flops(2, mllm.config, learnt, dit.config, vae.config, adapters)
    parts = frozen | {name: trained[name] for name in ("connector", "DiT")}
    return float(sum(map(sum, parts.values())))


@torch.no_grad()
def mllm_features(
    documents: list[Document], mllm: MLLM, device: torch.device, processor: ImageProcessor | None = None
) -> tuple[Tensor, list[int]]:
    """One frozen pass of the MLLM: features (M, L * H) of all tokens, and each document's first row. Pictures that are to be
    read need their processor."""
    batch = pack_documents(documents).to(device, processor)
    states = features(mllm(batch.ids, batch.positions, batch.cu_seqlens, batch.pixels, batch.grids))
    # Without autocast the connector, whose weights are fp32, does not take those of an MLLM in bf16.
    return states if torch.is_autocast_enabled(device.type) else states.float(), batch.cu_seqlens.tolist()


@torch.no_grad()
def encode_pictures(documents: list[Document], vae: VAE, device: torch.device) -> list[list[Tensor]]:
    """Normalised latents of each document's pictures, every picture once, pictures of one size in one call."""
    pictures = [p for document in documents for p in document.pictures]
    latents: dict[int, Tensor] = {}
    for shape in {p.shape for p in pictures}:
        same = [i for i, p in enumerate(pictures) if p.shape == shape]
        x = to_float(torch.stack([pictures[i] for i in same]).to(device))              # (K, 3, H, W)
        x = x.contiguous(memory_format=torch.channels_last)
        latents |= dict(zip(same, vae.encode_latents(x), strict=True))
    # Back to the documents that they came from.
    in_order = iter([latents[i] for i in range(len(pictures))])
    return [[next(in_order) for _ in document.pictures] for document in documents]


def language_statistics(by_kind: Tensor) -> dict[str, tuple[float, float]]:
    """(sum of the loss, its tokens) of each of KINDS, from LanguageLoss.by_kind."""
    return {kind: (loss, n) for kind, (loss, n) in zip(KINDS, by_kind.tolist(), strict=True)}


def flow_statistics(t: Tensor, error: Tensor, count: Tensor) -> dict[str, tuple[float, float]]:
    """(sum of the loss, its tokens) near data, halfway and near noise, and by tenths of the way: shows where a model is bad."""
    edges = {"t<.6": (0.0, 0.6), "t<.85": (0.6, 0.85), "t<1": (0.85, 1.1)}
    edges |= {name: (k / 10, (k + 1) / 10) for k, name in enumerate(DECILES)}
    # An empty range has weight 0, and so no say in the mean over ranks and steps.
    masks = {name: (t >= low) & (t < high) for name, (low, high) in edges.items()}
    return {name: (error[m].sum().item(), count[m].sum().item()) for name, m in masks.items()}


def add_statistics(a: dict[str, tuple[float, float]], b: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
    """Those of two micro-batches together; the first may be empty."""
    return {k: (v + a.get(k, (0.0, 0.0))[0], n + a.get(k, (0.0, 0.0))[1]) for k, (v, n) in b.items()}
