"""What sampling takes of a GPU's memory, before anything is downloaded: with all parts on it, and with --offload.

    python sample.py --plan --mllm 7B --dit 2B --vae wan2.1 --height 704 --width 1280 --batch 1
    python -m tools.fit                                            the table of docs/fit.md, in Markdown

Parameters and KV caches are counted on the modules. Activations are those of the real forward passes, which run on fake
tensors as in plan.py; tests/tools/test_fit.py holds them against PyTorch's own record of allocations. PyTorch's operations are
counted: those of kernels.py need less. It is the worst case of the settings: all tokens written, all pictures painted, each
looking at all before it. Nothing of it has been run on a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from checkpoint import BUNDLED, parse_dtype
from connector import features
from dit import DiTConfig, Painter
from families.registry import PARTS, PRESETS, family_of
from flops import count
from flow import denoise, shift_schedule
from ops import Segments
from model import KVCache, LanguageModel, MLLMConfig, mrope_positions, smart_resize
from pipeline import PACK, SIZE, Settings, check_size, override, pixels_per_patch, read_manifest
from tools.plan import FAKE, GB, Tally, config_of, pretend_part, pretend_tensor
from vae import VAE, VAEConfig

GPUS = (24, 48, 80)  # GB = 10^9 bytes. Their sheets count 2^30: the 7 % in between are left to the allocator's gaps
RESERVE = 1.5  # GB assumed for CUDA itself, compiled kernels and the workspaces of cuBLAS and cuDNN
PROMPT = 512  # tokens of a prompt beside its pictures; assumed


@dataclass
class Load:
    """What is asked of the system at a time."""

    settings: Settings
    size: tuple[int, int]  # (H, W) of the pictures in pixels
    batch: int = 1  # answers written at a time
    given: int = 0  # pictures in each prompt


class Fit:
    """Bytes by part and moment. dtype: of the language model and the DiT; the VAE computes in fp32."""

    def __init__(
        self,
        mllm: MLLMConfig,
        dit: DiTConfig,
        vae: VAEConfig,
        load: Load,
        dtype: torch.dtype = torch.bfloat16,
    ):
        # The connector reads the states of all layers side by side, whatever DiT it belongs to.
        dit = replace(dit, crossattn_proj_in_channels=mllm.features)
        self.mllm = pretend_part(mllm, dtype)
        self.dit = pretend_part(dit, dtype)
        self.vae = pretend_part(vae)
        self.dtype = dtype
        self.e = dtype.itemsize
        self.measured: dict[tuple, int] = {}  # what has been run, by all that it depends on
        self.ask(load)

    def ask(self, load: Load) -> "Fit":
        """The same models for another load."""
        self.load = load
        mllm = self.mllm.config

        # The language model sees a picture at a size of its own; four patches of it are a token, and two tokens enclose them.
        p = family_of(mllm).Processor(mllm.vision.patch_size, merge_size=mllm.vision.spatial_merge_size)
        h, w = smart_resize(*load.size, p.patch_size * p.merge_size, p.min_pixels, p.max_pixels)
        rows = h // p.patch_size
        columns = w // p.patch_size
        self.grid = (rows, columns)  # vision patches of one picture
        self.picture = rows * columns // p.merge_size**2 + 2  # tokens

        # A static cache is as large from the start as the longest answer can make it.
        s = load.settings
        self.prompt = PROMPT + load.given * self.picture
        longest = self.prompt + s.max_tokens + s.max_images * self.picture
        self.capacity = min(mllm.max_position_embeddings, longest)
        return self

    def weights(self) -> dict[str, int]:
        # The connector is part of the DiT's file, but stays with the decoder, whose states it makes small at once.
        connector = count(self.dit.crossattn_proj)
        vision = count(self.mllm.visual)
        return {
            "decoder, connector": self.e * (count(self.mllm) - vision + connector),
            "vision tower": self.e * vision,
            "DiT": self.e * (count(self.dit) - connector),
            "VAE": 4 * count(self.vae),
        }

    def caches(self) -> int:
        """Keys and values of the decoder, and what the DiT reads of every token, of all answers at work."""
        with torch.device("meta"):
            cache = KVCache(self.mllm.config, self.capacity, self.dtype, "meta", self.load.batch)
        # Twice: it grows in pieces, which are there beside the whole while a picture's context is put together.
        context = self.load.batch * self.capacity * self.dit.config.context_width * self.e
        return cache.k.nbytes + cache.v.nbytes + 2 * context

    def moments(self) -> dict[str, int]:
        """Activations while the language model reads, while a picture is painted, and while the VAE is at work."""
        s = self.load.settings
        size = self.load.size

        # Reading: a prompt is read as a whole, and so is a picture that has been painted. Of the logits sampling makes three
        # more in fp32: themselves, their softmax, and that sorted.
        logits = self.load.batch * self.mllm.config.vocab_size * (self.e + 3 * 4)
        n = max(self.prompt, self.picture)
        grids = [self.grid] * max(1, self.load.given)
        decoder = self.once(("decoder", n), reading_bytes, self.mllm, self.dit.crossattn_proj, n)
        tower = self.once(("tower", *grids), tower_bytes, self.mllm, grids)

        # Painting: the last picture looks at all others. More answers than a pack holds are painted one pack after the other.
        pictures = 1
        if s.use_condition_images:
            pictures = max(1, self.load.given + s.max_images)
        branches = 1 if s.scale == 1 else 2
        factor = self.vae.config.factor
        patch = pixels_per_patch(self.vae.config, self.dit.config)
        one_picture = (size[0] // patch) * (size[1] // patch)
        patches = pictures * branches * one_picture
        answers = min(self.load.batch, max(1, PACK // patches))
        painting = (size[0] // factor, size[1] // factor), answers, pictures, branches, self.capacity, s.steps
        return {
            "reading": max(decoder, tower) + logits,
            "painting": self.once(("painting", *painting), painting_bytes, self.dit, *painting),
            "VAE": self.once(("VAE", size), vae_bytes, self.vae, size),
        }

    def once(self, key: tuple, measure: Callable[..., int], *args) -> int:
        if key not in self.measured:
            self.measured[key] = measure(*args)
        return self.measured[key]

    def need(self, offload: bool) -> float:
        """GB at the highest moment."""
        # With --offload only the part at work is on the GPU; the caches stay there all the time.
        at_work = {
            "reading": ("decoder, connector", "vision tower"),
            "painting": ("DiT",),
            "VAE": ("VAE",),
        }
        weights = self.weights()
        highest = 0
        for moment, activations in self.moments().items():
            there = at_work[moment] if offload else weights.keys()
            total = activations + sum(weights[part] for part in there)
            highest = max(highest, total)
        return (highest + self.caches()) / GB + RESERVE

    def report(self) -> str:
        """What `sample.py --plan` prints."""
        load = self.load
        s = load.settings
        what = f"{s.max_images} pictures of {load.size[1]} x {load.size[0]} and {s.max_tokens:,} tokens"
        kind = str(self.dtype).removeprefix("torch.")
        lines = [f"{load.batch} at a time, each up to {what}, {kind}: computed, nothing was run"]
        rows = {f"weights: {k}": v for k, v in self.weights().items()}
        rows[f"caches, {self.capacity:,} tokens each"] = self.caches()
        rows |= {f"activations: {k}": v for k, v in self.moments().items()}
        rows["reserve (assumed)"] = RESERVE * GB
        lines.append("")
        for name, size in rows.items():
            lines.append(f"  {name:<36}{size / GB:>8.2f} GB")
        # The sum of all rows is needed at no time: activations of different moments are never there together.
        for name, offload in (("all on the GPU", False), ("with --offload", True)):
            need = self.need(offload)
            fits = ", ".join(f"{size} GB: {'yes' if need <= size else 'no'}" for size in GPUS)
            lines.append(f"  {name:<36}{need:>8.2f} GB    fits on {fits}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- activations
# The highest moment of a forward pass without gradients, in bytes beside weights, caches and what it is given.


def reading_bytes(mllm: LanguageModel, connector: nn.Module, n: int) -> int:
    """n tokens of a document; the states of all layers stay for the connector, which reads them in slices."""
    dtype = mllm.lm_head.weight.dtype
    ids = [0] * n
    positions, _ = mrope_positions(ids, [], mllm.config.image_token_id)
    with FAKE:
        cache = KVCache(mllm.config, n, dtype)
    with Tally(mllm, connector, cache.k, cache.v) as tally, torch.no_grad():
        hidden = mllm(torch.tensor(ids), positions, Segments([n]), cache=cache)
        slices = zip(*(h.split(512) for h in hidden), strict=True)
        torch.cat([connector(features(list(part)).to(dtype)) for part in slices])
    return tally.top


def tower_bytes(mllm: LanguageModel, grids: list[tuple[int, int]]) -> int:
    """Pictures of so many vision patches, all at once."""
    v = mllm.config.vision
    patches = sum(h * w for h, w in grids)
    pixels = pretend_tensor(patches, v.in_channels * v.temporal_patch_size * v.patch_size**2)
    with Tally(mllm) as tally, torch.no_grad():
        mllm.visual(pixels, grids)
    return tally.top + pixels.nbytes


class Enough(Exception):
    """All later steps are as the second, which is the first that remembers one."""


def painting_bytes(
    dit: Painter, latent: tuple[int, int], answers: int, pictures: int, branches: int, context: int, steps: int
) -> int:
    """For each answer the last of so many pictures of `latent` (h, w); every branch of guidance reads `context` tokens."""
    c = dit.config
    dtype = dit.proj_out.weight.dtype
    clean = []
    contexts = []
    for _ in range(answers):
        clean.append([pretend_tensor(c.out_channels, *latent) for _ in range(pictures - 1)])
        contexts.append(pretend_tensor(context, c.context_width, dtype=dtype))
    negative = contexts if branches == 2 else None
    calls = []

    def count_calls(*_) -> None:
        if len(calls) == 2:
            raise Enough
        calls.append(1)

    hook = dit.register_forward_pre_hook(count_calls)
    with Tally(dit, *contexts) as tally, torch.no_grad():
        # All steps of the schedule, since the modulations of all are made before the first.
        guidance = 2.0 if negative else 1.0
        sizes = [latent] * answers
        seeds = list(range(answers))
        sigmas = shift_schedule(steps)
        try:
            denoise(dit, clean, sizes, contexts, negative, seeds, sigmas=sigmas, guidance=guidance)
        except Enough:
            pass
    hook.remove()
    return tally.top


def vae_bytes(vae: VAE, size: tuple[int, int]) -> int:
    """One picture into latents and back."""
    c = vae.config
    with Tally(vae) as tally, torch.no_grad():
        vae.encode_latents(pretend_tensor(1, c.in_channels, *size))
        rows = size[0] // c.factor
        columns = size[1] // c.factor
        vae.decode_latents(pretend_tensor(1, c.z_dim, rows, columns))
    return tally.top


def planned(ckpt: str | None, parts: dict, values: dict, batch: int, given: int, dtype: str) -> Fit:
    """For the flags of sample.py. Only config.json of each part is read, and for a preset (7B, 2B, wan2.1) not even that."""
    # A part that is not named comes from the checkpoint, and so do the settings that no flag gives.
    sampling = {}
    if ckpt is not None or not all(parts.values()):
        base = Path(ckpt) if ckpt else Path(BUNDLED)
        parts = {p: source or (str(base / p) if base.exists() else f"{ckpt}/{p}") for p, source in parts.items()}
        if (base / "duogen.json").exists():
            sampling = read_manifest(base / "duogen.json")["sampling"]
    configs = [config_of(parts[part], part) for part in PARTS]
    s = override(Settings(), sampling | values, "settings")
    height = s.height or SIZE[0]
    width = s.width or SIZE[1]
    size = (height, width)
    check_size(size, pixels_per_patch(configs[2], configs[1]))
    load = Load(s, size, batch, given)
    # auto is what a GPU would get: the plan is for one, also where there is none.
    kind = parse_dtype("bf16" if dtype == "auto" else dtype)
    return Fit(*configs, load, kind)


def markdown() -> str:
    """7B + 2B by size of pictures and answers at a time: GB of all moments, and which GPUs hold it."""
    head = ["pictures", "at a time", "weights", "caches", "reading", "painting", "VAE", "on the GPU", "with --offload"]
    head += [f"{size} GB" for size in GPUS]
    rows = [head, ["---"] * len(head)]
    f = Fit(PRESETS["mllm"]["7B"], PRESETS["dit"]["2B"], PRESETS["vae"]["wan2.1"], Load(Settings(), SIZE))
    for size in ((480, 480), SIZE):
        for batch in (1, 8):
            f.ask(Load(Settings(), size, batch))
            parts = [sum(f.weights().values()), f.caches(), *f.moments().values()]
            row = [f"{size[1]} x {size[0]}", f"{batch}"]
            row += [f"{part / GB:.1f}" for part in parts]
            # Without --offload if it fits: weights that come and go cost time with every picture.
            needs = {"yes": f.need(False), "--offload": f.need(True)}
            row += [f"{need:.1f}" for need in needs.values()]
            for gpu in GPUS:
                enough = [how for how, need in needs.items() if need <= gpu]
                row.append(enough[0] if enough else "no")
            rows.append(row)
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown())
