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
from dit import DiT, DiTConfig
from flops import count
from flow import denoise, shift_schedule
from ops import Segments
from model import MLLM, ImageProcessor, KVCache, MLLMConfig, mrope_positions, smart_resize
from pipeline import PACK, PARTS, SIZE, Settings, check_size, override, pixels_per_patch, read_manifest
from tools.plan import FAKE, GB, PRESETS, Tally, config_of, pretend, pretend_tensor
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

    def __init__(self, mllm: MLLMConfig, dit: DiTConfig, vae: VAEConfig, load: Load, dtype: torch.dtype = torch.bfloat16):
        dit = replace(dit, crossattn_proj_in_channels=mllm.num_hidden_layers * mllm.hidden_size)
        self.mllm, self.dit, self.vae = pretend(MLLM, mllm, dtype), pretend(DiT, dit, dtype), pretend(VAE, vae)
        self.dtype, self.e = dtype, dtype.itemsize
        self.measured: dict[tuple, int] = {}  # what has been run, by all that it depends on
        self.ask(load)

    def ask(self, load: Load) -> "Fit":
        """The same models for another load."""
        self.load, mllm = load, self.mllm.config
        p = ImageProcessor(mllm.vision.patch_size, merge_size=mllm.vision.spatial_merge_size)
        h, w = smart_resize(*load.size, p.patch_size * p.merge_size, p.min_pixels, p.max_pixels)
        self.grid = (h // p.patch_size, w // p.patch_size)  # vision patches of one picture
        self.picture = h * w // p.patch_size**2 // p.merge_size**2 + 2  # tokens
        s = load.settings
        self.prompt = PROMPT + load.given * self.picture
        self.capacity = min(mllm.max_position_embeddings, self.prompt + s.max_tokens + s.max_images * self.picture)
        return self

    def weights(self) -> dict[str, int]:
        connector, vision = count(self.dit.crossattn_proj), count(self.mllm.visual)
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
        rows = self.load.batch * self.capacity * self.dit.config.text_embed_dim * self.e
        return cache.k.nbytes + cache.v.nbytes + 2 * rows

    def moments(self) -> dict[str, int]:
        """Activations while the language model reads, while a picture is painted, and while the VAE is at work."""
        s, size = self.load.settings, self.load.size
        logits = self.load.batch * self.mllm.config.vocab_size * (self.e + 3 * 4)
        # a prompt is read as a whole, and so is a picture that has been painted
        n, grids = max(self.prompt, self.picture), [self.grid] * max(1, self.load.given)
        decoder = self.once(("decoder", n), reading_bytes, self.mllm, self.dit.crossattn_proj, n)
        tower = self.once(("tower", *grids), tower_bytes, self.mllm, grids)
        pictures = max(1, self.load.given + s.max_images) if s.use_condition_images else 1
        branches = 1 if s.scale == 1 else 2
        factor, patch = self.vae.config.factor, pixels_per_patch(self.vae.config, self.dit.config)
        patches = pictures * branches * (size[0] // patch) * (size[1] // patch)
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
        w, m = self.weights(), self.moments()
        parts = {"reading": ("decoder, connector", "vision tower"), "painting": ("DiT",), "VAE": ("VAE",)}
        highest = max(m[k] + sum(w[p] for p in (parts[k] if offload else w)) for k in m)
        return (highest + self.caches()) / GB + RESERVE

    def report(self) -> str:
        """What `sample.py --plan` prints."""
        load, s = self.load, self.load.settings
        what = f"{s.max_images} pictures of {load.size[1]} x {load.size[0]} and {s.max_tokens:,} tokens"
        kind = str(self.dtype).removeprefix("torch.")
        lines = [f"{load.batch} at a time, each up to {what}, {kind}: computed, nothing was run"]
        rows = {f"weights: {k}": v for k, v in self.weights().items()}
        rows[f"caches, {self.capacity:,} tokens each"] = self.caches()
        rows |= {f"activations: {k}": v for k, v in self.moments().items()} | {"reserve (assumed)": RESERVE * GB}
        lines += ["", *(f"  {k:<36}{v / GB:>8.2f} GB" for k, v in rows.items())]
        for name, offload in (("all on the GPU", False), ("with --offload", True)):
            need = self.need(offload)
            fits = ", ".join(f"{size} GB: {'yes' if need <= size else 'no'}" for size in GPUS)
            lines.append(f"  {name:<36}{need:>8.2f} GB    fits on {fits}")
        return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------- activations
# The highest moment of a forward pass without gradients, in bytes beside weights, caches and what it is given.


def reading_bytes(mllm: MLLM, connector: nn.Module, n: int) -> int:
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


def tower_bytes(mllm: MLLM, grids: list[tuple[int, int]]) -> int:
    """Pictures of so many vision patches, all at once."""
    v = mllm.config.vision
    pixels = pretend_tensor(sum(h * w for h, w in grids), v.in_channels * v.temporal_patch_size * v.patch_size**2)
    with Tally(mllm) as tally, torch.no_grad():
        mllm.visual(pixels, grids)
    return tally.top + pixels.nbytes


class Enough(Exception):
    """All later steps are as the second, which is the first that remembers one."""


def painting_bytes(
    dit: DiT, latent: tuple[int, int], answers: int, pictures: int, branches: int, context: int, steps: int
) -> int:
    """For each answer the last of so many pictures of `latent` (h, w); every branch of guidance reads `context` tokens."""
    c, dtype = dit.config, dit.proj_out.weight.dtype
    clean = [[pretend_tensor(c.out_channels, *latent) for _ in range(pictures - 1)] for _ in range(answers)]
    contexts = [pretend_tensor(context, c.text_embed_dim, dtype=dtype) for _ in range(answers)]
    negative = contexts if branches == 2 else None
    calls = []

    def count_calls(*_) -> None:
        if len(calls) == 2:
            raise Enough
        calls.append(1)

    hook = dit.register_forward_pre_hook(count_calls)
    with Tally(dit, *contexts) as tally, torch.no_grad():
        options = {"sigmas": shift_schedule(steps), "guidance": 2.0 if negative else 1.0}
        try:
            denoise(dit, clean, [latent] * answers, contexts, negative, list(range(answers)), **options)
        except Enough:
            pass
    hook.remove()
    return tally.top


def vae_bytes(vae: VAE, size: tuple[int, int]) -> int:
    """One picture into latents and back."""
    c = vae.config
    with Tally(vae) as tally, torch.no_grad():
        vae.encode_latents(pretend_tensor(1, c.in_channels, *size))
        vae.decode_latents(pretend_tensor(1, c.z_dim, size[0] // c.factor, size[1] // c.factor))
    return tally.top


def planned(ckpt: str | None, parts: dict, values: dict, batch: int, given: int, dtype: str) -> Fit:
    """For the flags of sample.py. Only config.json of each part is read, and for a preset (7B, 2B, wan2.1) not even that."""
    sampling = {}
    if ckpt is not None or not all(parts.values()):
        base = Path(ckpt) if ckpt else Path(BUNDLED)
        parts = {p: source or (str(base / p) if base.exists() else f"{ckpt}/{p}") for p, source in parts.items()}
        if (base / "duogen.json").exists():
            sampling = read_manifest(base / "duogen.json")["sampling"]
    configs = [config_of(parts[part], part) for part in PARTS]
    s = override(Settings(), sampling | values, "settings")
    size = s.height or SIZE[0], s.width or SIZE[1]
    check_size(size, pixels_per_patch(configs[2], configs[1]))
    load = Load(s, size, batch, given)
    return Fit(*configs, load, parse_dtype("bf16" if dtype == "auto" else dtype))


def markdown() -> str:
    """7B + 2B by size of pictures and answers at a time: GB of all moments, and which GPUs hold it."""
    head = ["pictures", "at a time", "weights", "caches", "reading", "painting", "VAE", "on the GPU", "with --offload"]
    rows = [[*head, *(f"{size} GB" for size in GPUS)], ["---"] * (len(head) + len(GPUS))]
    f = Fit(PRESETS["mllm"]["7B"], PRESETS["dit"]["2B"], PRESETS["vae"]["wan2.1"], Load(Settings(), SIZE))
    for size in ((480, 480), SIZE):
        for batch in (1, 8):
            f.ask(Load(Settings(), size, batch))
            needs = {"yes": f.need(False), "--offload": f.need(True)}
            parts = [sum(f.weights().values()), f.caches(), *f.moments().values()]
            gb = [*(f"{v / GB:.1f}" for v in parts), *(f"{v:.1f}" for v in needs.values())]
            fits = [next((how for how, need in needs.items() if need <= gpu), "no") for gpu in GPUS]
            rows.append([f"{size[1]} x {size[0]}", f"{batch}", *gb, *fits])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown())
