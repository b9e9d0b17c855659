"""What sampling takes of a GPU's memory, before anything is downloaded: with all parts on it, and with --offload.

    python sample.py --plan --mllm 7B --dit 2B --vae wan2.1 --height 704 --width 1280 --batch 1
    python -m tools.fit                                      the table of docs/fit.md, in Markdown

Parameters and KV caches are counted on the modules themselves, built on the meta device. Activations follow from shapes by the
formulas below, which tests/tools/test_fit.py holds against PyTorch's own record of allocations. It is the worst case of the
settings: all tokens written, all pictures painted, each looking at all before it. Nothing of it has been run on a GPU.
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from checkpoint import parse_dtype
from dit import PRESETS as DITS
from dit import DiT, DiTConfig
from model import MLLM, ImageProcessor, KVCache, MLLMConfig, smart_resize
from model import PRESETS as MLLMS
from pipeline import BUNDLED, PACK, PARTS, SIDE, SIZE, Settings, override, read_manifest
from tools.plan import GB, config_of, count
from vae import PRESETS as VAES
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
        with torch.device("meta"):
            dit = replace(dit, crossattn_proj_in_channels=mllm.num_hidden_layers * mllm.hidden_size)
            self.mllm, self.dit, self.vae = MLLM(mllm), DiT(dit), VAE(vae)
        self.dtype, self.e = dtype, dtype.itemsize
        self.ask(load)

    def ask(self, load: Load) -> "Fit":
        """The same models for another load."""
        self.load, mllm = load, self.mllm.config
        p = ImageProcessor(mllm.vision.patch_size, merge_size=mllm.vision.spatial_merge_size)
        h, w = smart_resize(*load.size, p.patch_size * p.merge_size, p.min_pixels, p.max_pixels)
        self.vision_patches = h * w // p.patch_size**2  # of one picture
        self.picture = self.vision_patches // p.merge_size**2 + 2  # tokens
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
        cache = KVCache(self.mllm.config, self.capacity, self.dtype, "meta", self.load.batch)
        rows = self.load.batch * self.capacity * self.dit.config.text_embed_dim * self.e
        return cache.k.nbytes + cache.v.nbytes + 2 * rows

    def moments(self) -> dict[str, int]:
        """Activations while the language model reads, while a picture is painted, and while the VAE is at work."""
        s, size = self.load.settings, self.load.size
        n = max(self.prompt, self.picture)
        reading = reading_bytes(self.mllm.config, n, self.vision_patches * max(1, self.load.given), self.e)
        logits = self.load.batch * self.mllm.config.vocab_size * (self.e + 3 * 4)
        pictures = [size] * (self.load.given + s.max_images)
        each = len(pictures) * (size[0] // SIDE) * (size[1] // SIDE) if s.use_condition_images else size[0] * size[1] // SIDE**2
        branches = 1 if s.scale == 1 else 2
        patches = min(self.load.batch * each * branches, max(PACK, each * branches))
        context = max(1, patches // (each * branches)) * branches * self.capacity
        return {
            "reading": reading + logits,
            "painting": painting_bytes(self.dit.config, patches, context, s.steps, self.e),
            "VAE": vae_bytes(self.vae.config, *size),
        }

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
# Highest moments of the forward passes without gradients, with attention that keeps no scores and the fused steps of ops.py.
# They are upper bounds: a few percent of small tensors are counted as if all were alive at once.


def reading_bytes(c: MLLMConfig, n: int, patches: int, e: int) -> int:
    """n tokens of a document: the states of all layers stay for the connector, a layer works on gate, up and their product."""
    h, v = c.hidden_size, c.vision
    pixels = v.in_channels * v.temporal_patch_size * v.patch_size**2
    vision = patches * (pixels * (4 + e) + e * (3 * v.intermediate_size + 4 * v.hidden_size))
    states = c.num_hidden_layers * n * h * e
    connector = min(n, 512) * (c.num_hidden_layers * h * e + 3 * 4 * h)
    return max(vision, states + n * e * (3 * c.intermediate_size + 8 * h), states + connector)


def painting_bytes(c: DiTConfig, n: int, context: int, steps: int, e: int) -> int:
    """n patches of both branches reading `context` tokens: keys and values of all blocks, modulations of all steps, one block,
    whose MLP is four times as wide twice over."""
    d, patch = c.width, c.out_channels * c.patch_size[1] ** 2
    kept = 2 * c.num_layers * context * d * e + (steps + 1) * (9 * c.num_layers + 2) * d * 4
    return kept + n * (int(5 + 2 * c.mlp_ratio) * d * e + 2 * 4 * c.attention_head_dim + 8 * 4 * patch)


def vae_bytes(c: VAEConfig, h: int, w: int) -> int:
    """One picture: so many maps of the widest resolution, in fp32, alive at once in the encoder and in the decoder."""
    return int(h * w * 4 * max(4.25 * c.base_dim, 5.25 * (c.decoder_base_dim or c.base_dim)))


def planned(ckpt: str | None, parts: dict, values: dict, batch: int, given: int, dtype: str) -> Fit:
    """For the flags of sample.py. Only config.json of each part is read, and for a preset (7B, 2B, wan2.1) not even that."""
    sampling = {}
    if ckpt is not None or not all(parts.values()):
        base = Path(ckpt) if ckpt else Path(__file__).parent.parent / BUNDLED
        parts = {p: source or (str(base / p) if base.exists() else f"{ckpt}/{p}") for p, source in parts.items()}
        if (base / "duogen.json").exists():
            sampling = read_manifest(base / "duogen.json")["sampling"]
    presets = {"mllm": MLLMS, "dit": DITS, "vae": VAES}
    configs = [config_of(parts[p], p, presets[p], kind.from_json) for p, kind in PARTS.items()]
    s = override(Settings(), sampling | values, "settings")
    load = Load(s, (s.height or SIZE[0], s.width or SIZE[1]), batch, given)
    return Fit(*configs, load, parse_dtype("bf16" if dtype == "auto" else dtype))


def markdown() -> str:
    """7B + 2B by size of pictures and answers at a time: GB of all moments, and which GPUs hold it."""
    head = ["pictures", "at a time", "weights", "caches", "reading", "painting", "VAE", "on the GPU", "with --offload"]
    rows = [[*head, *(f"{size} GB" for size in GPUS)], ["---"] * (len(head) + len(GPUS))]
    f = Fit(MLLMS["7B"], DITS["2B"], VAES["wan2.1"], Load(Settings(), SIZE))
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
