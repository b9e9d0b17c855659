"""Pretrain the miniature's backbones on the sketchbook corpus: the small sisters of what full size downloads.

    python -m sketchbook.pretrain vae     pictures to latents of 1/8 size and back        (full size: Wan2.1's VAE)
    python -m sketchbook.pretrain mllm    text, and first questions about pictures        (full size: Qwen2.5-VL, Qwen3-VL)
    python -m sketchbook.pretrain eye     its vision tower learns what lies where         (full size: that of these)
    python -m sketchbook.pretrain dit     short clips of drawings that grow, move, change (full size: Cosmos-Predict2.5, Wan2.1)
    python -m sketchbook.pretrain bundle  the parts of finished runs into one checkpoint folder

Each run resumes when its command is given again; `--help` after a name lists its settings. `make tiny` runs all of them in
order. The two stages of the paper, train_stage1.py and train_stage2.py, start from
what this script leaves.
"""

if __name__ == "__main__":  # Ctrl-C has to be quiet during the imports below, too
    import interrupt

    interrupt.quiet()

import dataclasses
import math
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from checkpoint import InputError, part_folder
from data import Document, batches, byte_picture, normalised, pack_documents, to_float, tokenize
from distributed import Ranks
from dit import Painter
from families.registry import family_of, load_language_model, load_model, preset
from flow import CONDITION_TIME, FlowLoss, Samples, denoise, shift_schedule, train_times
from model import ImageProcessor, LanguageModel
from pipeline import Settings, pixels_per_patch, write_manifest
from records.stream import Stream, pick_workers
from sketchbook import dialogues as sketchbook
from sketchbook import looking
from sketchbook.checker import judge
from sketchbook.eye import SeeingLoss, lesson
from sketchbook.scenes import BACKGROUNDS, COLOURS, SUBJECTS
from tokenizer import Tokenizer, render, train_bpe
from training import LanguageLoss, Run, TrainConfig, autocast, check_step0, compile_blocks, encode_pictures, flow_statistics
from training import generator, language_statistics, mllm_features, model_flops, parse_config, print_trained, run_script, sheet
from vae import VAE, to_image, to_tensor


def stream(item, c: TrainConfig, ranks: Ranks, position: list | int | None, documents: int) -> Iterator[tuple[list, dict]]:
    """Lists of procedural items, item(seed), prepared by background processes, from where the run stopped."""
    source = Stream(
        item, seed=c.seed, rank=ranks.rank, world_size=ranks.size, workers=pick_workers(c.workers), ahead=max(16, documents)
    )
    if position is not None:
        source.resume(position if isinstance(position, list) else [position])
    return batches(source, documents=documents)


# ---------------------------------------------------------------------------------------------------------------- VAE


@dataclass
class VAEConfig(TrainConfig):
    # ---- data
    batch: int = 32  # pictures per step and rank
    size: int = 64  # pixels along a side
    # ---- model
    # Weight of the KL divergence. Wan's published latents are nearly deterministic. The miniature takes a real KL: its decoder
    # then bears the error that a small DiT leaves, and latent numbers that the pictures do not need fall silent.
    kl: float = 2e-3
    # ---- other defaults than those of every run
    out: str = "runs/tiny/vae"
    steps: int = 3500
    lr: float = 2e-3
    weight_decay: float = 0.0
    beta2: float = 0.99
    ema: float = 0.998


def picture(size: int, seed: int) -> tuple[str, Tensor]:
    return f"seed:{seed}", byte_picture(sketchbook.pictures(seed, 1, size)[0])


class VAELoss(nn.Module):
    """L1 on pixels and on their differences (edges: most of a page is blank) + KL of the posterior to N(0, 1)."""

    def __init__(self, vae: VAE, kl: float):
        super().__init__()
        self.vae, self.kl = vae, kl

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        mean, logvar = (m.float() for m in self.vae.encode(x))                         # (B, z, h, w) each
        y = self.vae.decode(mean + (0.5 * logvar).exp() * noise).float()               # (B, 3, H, W)
        d = y - x
        l1 = d.abs().mean()
        edges = d.diff(dim=-1).abs().mean() + d.diff(dim=-2).abs().mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        psnr = -10 * torch.log10((y.clamp(-1, 1) - x).square().mean() / 4)
        return l1 + edges + self.kl * kl, {"l1": l1.detach(), "edges": edges.detach(), "kl": kl.detach(), "psnr": psnr.detach()}


@torch.no_grad()
def measure_latents(vae: VAE, pictures: Tensor) -> None:
    """Set latents_mean and latents_std, the constants that normalise what the DiT sees.

    The deviation is that of posterior samples, not of means: a latent number that the pictures do not need has mean 0 and
    posterior variance 1, and must stay near 0 instead of being blown up to unit size.
    """
    moments = [vae.encode(x) for x in pictures.split(64)]
    mean = torch.cat([m for m, _ in moments]).float()
    variance = torch.cat([v for _, v in moments]).float().exp()
    std = (mean.var((0, 2, 3)) + variance.mean((0, 2, 3))).sqrt()
    vae.set_latent_statistics(mean.mean((0, 2, 3)).tolist(), std.tolist())
    relative = " ".join(f"{x:.2f}" for x in (variance.mean((0, 2, 3)).sqrt() / std).tolist())
    print(f"latents: posterior deviation / total deviation, by channel: {relative}", flush=True)


def train_vae(c: VAEConfig) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)
    vae = VAE.from_config(preset("vae", "tiny")).to(ranks.device, memory_format=torch.channels_last)
    if ranks.main:
        print_trained({"vae": vae}, {})
    fixed = to_float(torch.stack([picture(c.size, 10**12 + i)[1] for i in range(256)]).to(ranks.device))

    def save(folder: Path, vae: VAE) -> None:
        measure_latents(vae, fixed)
        vae.save_pretrained(folder / "vae", dtype=torch.float16)

    run = Run(c, ranks, vae, save)
    loss_of = VAELoss(vae, c.kl)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of)
    data = stream(partial(picture, c.size), c, ranks, run.position, c.batch)
    for step in run.loop():
        items, place = next(data)
        names, pictures = zip(*items, strict=True)
        x = to_float(torch.stack(pictures).to(ranks.device)).contiguous(memory_format=torch.channels_last)
        g = generator(c.seed, step * ranks.size + ranks.rank)
        side = c.size // vae.config.factor
        noise = torch.randn(len(x), vae.config.z_dim, side, side, generator=g)
        with autocast(c.dtype, ranks.device):
            loss, parts = loss_of(x, noise.to(ranks.device))
        stats = {"loss": ranks.backward(loss / ranks.size)}
        stats |= {name: part.item() / ranks.size for name, part in parts.items()}
        stats["images"] = len(x)
        norm = run.clip()
        stats = ranks.sum_statistics(stats)
        if run.finite(stats["loss"], norm, names):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(place)
        if run.sheet_due:
            vae_sheet(run, vae, fixed[:16])
    ranks.close()
    if run.step >= c.steps and ranks.main:
        with run.averaged():
            vae_gate(vae, c)


@torch.no_grad()
def vae_sheet(run: Run, vae: VAE, x: Tensor) -> None:
    with run.averaged():
        y = vae.decode(vae.encode(x)[0])
    pairs = [picture for a, b in zip(x, y, strict=True) for picture in (to_image(a), to_image(b))]
    rows = [("", "", pairs[i : i + 4]) for i in range(0, len(pairs), 4)]
    sheet(rows, ["true one", "decoded"] * 2, run.sample_file("png"))


@torch.no_grad()
def vae_gate(vae: VAE, c: VAEConfig, dialogues: int = 200) -> None:
    """Share of true pictures that the checker accepts after encoding and decoding: the ceiling of every later number."""
    passed: dict[str, list[bool]] = {}
    for seed in range(dialogues):
        record = sketchbook.dialogue(seed, split="seen", size=c.size)
        shown = [p["image"] for m in record["messages"] for p in m["content"] if p["type"] == "image"]
        for k, truth in enumerate(record["truth"]["images"]):
            if truth["check"] is None:  # a user's picture: nothing was asked of it
                continue
            again = to_image(vae.decode(vae.encode(to_tensor(shown[k])[None])[0])[0])
            passed.setdefault(record["kind"], []).append(judge(again, truth["check"], shown[k - 1] if k else None).ok)
    passed["all"] = sum(passed.values(), [])
    for kind, values in passed.items():
        print(f"checker after VAE: {kind:<12} {sum(values) / len(values):6.1%} of {len(values)}")


# --------------------------------------------------------------------------------------------------------------- MLLM


@dataclass
class MLLMConfig(TrainConfig):
    # ---- data
    batch: int = 16  # documents per step and rank
    size: int = 64  # pixels along a side
    looking: float = 0.6  # share of documents about a picture; the others are dialogues of any kind
    # ---- model
    model: str = "tiny"  # or "tiny-qwen3-vl", another family's
    vocabulary: int = 1024  # tokens at most; what the corpus does not need stays unused
    # ---- other defaults than those of every run
    out: str = "runs/tiny/mllm"
    steps: int = 1400
    lr: float = 2e-3
    weight_decay: float = 0.01
    beta2: float = 0.98


def corpus(n: int) -> Iterator[str]:
    """All text of n dialogues of each source, for the tokenizer."""
    for seed in range(n):
        for record in (sketchbook.dialogue(seed), looking.record(seed)):
            for message in record["messages"]:
                yield from (p["text"] for p in message["content"] if p["type"] == "text")
        yield sketchbook.clip(seed, frames=2)[0]


def reading(c: MLLMConfig, tokenizer: Tokenizer, processor: ImageProcessor, seed: int) -> Document:
    about_a_picture = torch.rand((), generator=generator(c.seed, 1, seed)).item() < c.looking
    record = looking.record(seed, size=c.size) if about_a_picture else sketchbook.dialogue(seed, size=c.size)
    return tokenize(record, tokenizer, processor, pictures=False)


def train_mllm(c: MLLMConfig) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)
    tokenizer = train_bpe(corpus(1500), c.vocabulary)
    config = preset("mllm", c.model).for_tokenizer(tokenizer)
    family = family_of(config)
    processor = family.Processor(patch_size=8, merge_size=2, min_pixels=16 * 16, max_pixels=c.size**2)
    mllm = family.Model.from_config(config).to(ranks.device)
    if ranks.main:
        print_trained({"vision tower": mllm.visual, "decoder": mllm.model}, {})

    def save(folder: Path, mllm: LanguageModel) -> None:
        for part in (mllm, tokenizer, processor):
            part.save_pretrained(folder / "mllm")

    run = Run(c, ranks, mllm, save)
    loss_of = LanguageLoss(mllm)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of, find_unused=True)  # a batch may have no picture
    data = stream(partial(reading, c, tokenizer, processor), c, ranks, run.position, c.batch)
    for step in run.loop():
        documents, place = next(data)
        batch = pack_documents(documents).to(ranks.device, processor)
        targets = ranks.sum((batch.labels >= 0).sum().item())
        with autocast(c.dtype, ranks.device):
            total, kinds = loss_of(batch)
        stats = {"loss": ranks.backward(total / targets), **language_statistics(kinds)}
        stats |= {"tokens": len(batch.ids), "documents": len(documents), "flops": model_flops(documents, mllm)}
        norm = run.clip()
        names = [document.name for document in documents]
        stats = ranks.sum_statistics(stats)
        if run.finite(stats["loss"], norm, names):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(place)
        if step == 0 and ranks.main:
            guess = math.log(config.vocab_size)
            check_step0("cross-entropy", stats["loss"], 0.9 * guess, 1.2 * guess)
    ranks.close()


# ---------------------------------------------------------------------------------------------------------------- eye


@dataclass
class EyeConfig(TrainConfig):
    # ---- data
    batch: int = 96  # pictures per step and rank
    size: int = 64  # pixels along a side
    # ---- model
    mllm: str = "runs/tiny/mllm"  # run or folder whose vision tower is trained; the decoder stays as it is
    fresh: bool = True  # the tower starts from nothing
    # ---- other defaults than those of every run
    out: str = "runs/tiny/eye"
    steps: int = 3000
    lr: float = 1.5e-3
    weight_decay: float = 0.01
    beta2: float = 0.98
    ema: float = 0.998


def fresh_tower(mllm: LanguageModel) -> nn.Module:
    """A vision tower of the same form that has seen nothing."""
    return type(mllm.visual)(mllm.config.vision)


def train_eye(c: EyeConfig) -> None:
    """What it learns, and why: eye.py."""
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)
    folder = part_folder(c.mllm, "mllm")
    mllm, tokenizer, processor = load_language_model(folder, device=ranks.device)
    mllm.requires_grad_(False)
    if c.fresh:
        mllm.visual = fresh_tower(mllm).to(ranks.device)
    tower = mllm.visual.requires_grad_(True)
    if ranks.main:
        print_trained({"vision tower": tower}, {"decoder": mllm.model})

    def save(folder: Path, _: nn.Module) -> None:
        for part in (mllm, tokenizer, processor):
            part.save_pretrained(folder / "mllm")

    loss_of = SeeingLoss(tower).to(ranks.device)
    run = Run(c, ranks, loss_of, save)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of)
    data = stream(partial(lesson, processor, c.size), c, ranks, run.position, c.batch)
    for step in run.loop():
        items, place = next(data)
        names, pictures = zip(*items, strict=True)
        pixels, grids, truth = zip(*pictures, strict=True)
        with autocast(c.dtype, ranks.device):
            loss, parts = loss_of(normalised(torch.cat(pixels).to(ranks.device), processor), list(grids), list(truth))
        stats = {"loss": ranks.backward(loss / ranks.size)}
        stats |= {name: part.item() / ranks.size for name, part in parts.items()}
        stats["images"] = len(names)
        norm = run.clip()
        stats = ranks.sum_statistics(stats)
        if run.finite(stats["loss"], norm, list(names)):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(place)
        if step == 0 and ranks.main and c.fresh:
            # A guess at the subject, the colour and the page, and half a chance for every part.
            guess = sum(map(math.log, (len(SUBJECTS) + 1, len(COLOURS), len(BACKGROUNDS)))) + 20 * math.log(2)
            check_step0("loss", stats["loss"], 0.8 * guess, 1.3 * guess)
    ranks.close()


# ---------------------------------------------------------------------------------------------------------------- DiT


@dataclass
class DiTConfig(TrainConfig):
    # ---- data
    batch: int = 32  # clips per step and rank
    frames: int = 4  # of a clip, at most
    size: int = 64  # pixels along a side
    drop: float = 0.15  # share of clips whose caption is dropped
    # ---- model
    model: str = "tiny"  # or "tiny-wan", another family's
    mllm: str = "runs/tiny/mllm"  # run or folder; frozen
    vae: str = "runs/tiny/vae"  # run or folder; frozen
    shift: float = 5.0  # of the training times towards noise, Cosmos' own
    condition_time: float = CONDITION_TIME  # time the DiT is told for clean pictures, that of the post-trained Cosmos
    # ---- other defaults than those of every run
    out: str = "runs/tiny/dit"
    steps: int = 6000
    lr: float = 1e-3
    beta2: float = 0.99


def film(c: DiTConfig, tokenizer: Tokenizer, seed: int) -> Document:
    """A clip as a document: its caption is the user's text, its frames are the pictures."""
    g = generator(c.seed, 2, seed)
    caption, frames = sketchbook.clip(seed, frames=int(torch.randint(2, c.frames + 1, (), generator=g)), size=c.size)
    if torch.rand((), generator=g) < 0.5:
        frames = frames[-1:]  # a still, as half of Cosmos' own data
    rendered = render(tokenizer, [{"role": "user", "content": caption}], [], generation_prompt=True)
    positions = torch.arange(len(rendered.ids)).expand(3, -1)
    return Document(rendered, positions, None, [], [byte_picture(frame) for frame in frames])


def film_samples(documents: list[Document], mllm, vae: VAE, c: DiTConfig, ranks: Ranks, g: torch.Generator) -> Samples:
    """Cosmos' video training: the first 0, 1 or 2 frames are given (1/2, 1/4, 1/4), all others are painted together."""
    states, first = mllm_features(documents, mllm, ranks.device)
    rows, clean = [], []
    for d, document in enumerate(documents):
        dropped = torch.rand((), generator=g).item() < c.drop
        rows.append(range(first[d], first[d] + document.rendered.system_end if dropped else first[d + 1]))
        clean.append(min(max(0, int(torch.randint(-1, 3, (), generator=g))), len(document.pictures) - 1))
    return Samples(states, rows, encode_pictures(documents, vae, ranks.device), clean)


def train_dit(c: DiTConfig) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)
    folder = part_folder(c.mllm, "mllm")
    mllm, tokenizer, _ = load_language_model(folder, device=ranks.device)
    mllm.requires_grad_(False)
    vae = load_model("vae", part_folder(c.vae, "vae"), device=ranks.device).requires_grad_(False)
    config = dataclasses.replace(preset("dit", c.model), crossattn_proj_in_channels=mllm.config.features)
    dit = family_of(config).Model.from_config(config).to(ranks.device)
    patches = (c.size // pixels_per_patch(vae.config, config)) ** 2  # of a picture
    if ranks.main:
        print_trained({"dit + connector": dit}, {"mllm": mllm, "vae": vae})

    run = Run(c, ranks, dit, lambda folder, dit: dit.save_pretrained(folder / "dit"))
    loss_of = FlowLoss(dit, c.condition_time)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of)
    data = stream(partial(film, c, tokenizer), c, ranks, run.position, c.batch)
    for step in run.loop():
        documents, place = next(data)
        g = generator(c.seed, step * ranks.size + ranks.rank)
        with autocast(c.dtype, ranks.device):
            samples = film_samples(documents, mllm, vae, c, ranks, g)
            t = train_times(len(documents), c.shift, g)
            error, count = loss_of(samples, t, g)
        loss = ranks.backward(error.sum() / ranks.sum(count.sum().item()))
        parts = flow_statistics(t, error.detach().cpu(), count.cpu())
        stats = {"loss": loss, **parts, "images": count.sum().item() / patches}
        stats["flops"] = model_flops(documents, mllm, samples, dit, vae)
        norm = run.clip()
        names = [document.name for document in documents]
        stats = ranks.sum_statistics(stats)
        if run.finite(stats["loss"], norm, names):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(place)
        if step == 0 and ranks.main:
            guess = 1 + mean_square(samples.latents)
            check_step0("flow loss", stats["loss"], 0.9 * guess, 1.1 * guess)
        if run.sheet_due:
            film_sheet(run, c, tokenizer, mllm, dit, vae)
    ranks.close()


def mean_square(latents: list[list[Tensor]]) -> float:
    """E|x_0|^2 per channel, so that 1 + it is E|eps - x_0|^2, the loss of a DiT that answers 0."""
    return torch.cat([z.flatten() for pictures in latents for z in pictures]).square().mean().item()


@torch.no_grad()
def film_sheet(run: Run, c: DiTConfig, tokenizer: Tokenizer, mllm: LanguageModel, dit: Painter, vae: VAE, n: int = 12) -> None:
    """Captions never trained on, with the still that the DiT paints for each and the true one."""
    rows = []
    clips = [sketchbook.clip(10**12 + i, size=c.size) for i in range(n)]
    rendered = [render(tokenizer, [{"role": "user", "content": text}], [], generation_prompt=True) for text, _ in clips]
    documents = [Document(r, torch.arange(len(r.ids)).expand(3, -1), None, [], []) for r in rendered]
    with run.averaged():
        states, first = mllm_features(documents, mllm, run.ranks.device)
        context = dit.crossattn_proj(states)
        positive = [context[a:b] for a, b in zip(first, first[1:], strict=False)]
        negative = [p[: r.system_end] for p, r in zip(positive, rendered, strict=True)]
        size = (c.size // vae.config.factor, c.size // vae.config.factor)
        sigmas = shift_schedule(16, c.shift)
        painted = denoise(dit, [[]] * n, [size] * n, positive, negative, list(range(n)), sigmas=sigmas, guidance=3.0)
        for (text, frames), z in zip(clips, painted, strict=True):
            rows.append((text, "", [to_image(vae.decode_latents(z[None])[0]), frames[-1]]))
    sheet(rows, ["painted", "true one"], run.sample_file("png"))


# ------------------------------------------------------------------------------------------------------------- bundle


@dataclass
class BundleConfig:
    # ---- parts
    out: str = "checkpoints/tiny"  # folder to write
    mllm: str = "runs/tiny/stage1"  # run that trained the language model
    dit: str = "runs/tiny/stage2"  # run that trained connector and DiT
    vae: str = "runs/tiny/vae"  # run that trained the VAE
    # ---- defaults of sampling from it
    size: int = 64  # pixels along a side
    steps: int = 16  # calls of the DiT for a picture
    guidance: float = 2.0  # 1 is none
    sampler: str = "ancestral"  # or unipc or euler
    eta: float = 1.5  # how much fresh noise the sampler ancestral adds
    max_tokens: int = 512  # tokens that the language model writes


def bundle(c: BundleConfig) -> None:
    """The newest parts in one folder, and their names and the defaults of sampling in its duogen.json."""
    out = Path(c.out)
    sources = {part: part_folder(getattr(c, part), part) for part in ("mllm", "dit", "vae")}
    for part in sources:
        shutil.rmtree(out / part, ignore_errors=True)
    mllm, *beside = load_language_model(sources["mllm"])
    # Half precision: the training reads the MLLM under bf16 autocast anyway, and the bundle has to stay small.
    mllm.save_pretrained(out / "mllm", dtype=torch.float16)
    for part in beside:
        part.save_pretrained(out / "mllm")
    load_model("dit", sources["dit"]).save_pretrained(out / "dit")
    VAE.from_pretrained(sources["vae"]).save_pretrained(out / "vae", dtype=torch.float16)
    defaults = Settings(steps=c.steps, guidance=c.guidance, sampler=c.sampler, eta=c.eta, max_tokens=c.max_tokens,
                        max_area=c.size**2)  # fmt: skip
    write_manifest(out, defaults, (c.size, c.size))


COMMANDS = {
    "vae": (VAEConfig, train_vae),
    "mllm": (MLLMConfig, train_mllm),
    "eye": (EyeConfig, train_eye),
    "dit": (DiTConfig, train_dit),
    "bundle": (BundleConfig, bundle),
}


def run_command() -> None:
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        raise InputError(f"say what to pretrain: python -m sketchbook.pretrain {{{','.join(COMMANDS)}}} [--help]")
    config, function = COMMANDS[sys.argv[1]]
    function(parse_config(config, sys.argv[2:], __doc__))


if __name__ == "__main__":
    run_script(run_command)
