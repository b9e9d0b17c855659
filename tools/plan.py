"""What a training run will cost, before it is paid for: parameters, bytes per GPU, FLOPs, days. No weights, no GPU.

    python train_stage1.py --plan --mllm 7B --world 8 --zero --checkpointing
    python train_stage2.py --plan --mllm 7B --dit 2B --vae wan2.1 --world 8 --zero --documents 1 --checkpointing
    python -m tools.plan                                      the table of docs/plan.md and of the README, in Markdown

Parameters are counted on the modules, built on the meta device. FLOPs and bytes follow from shapes by the formulas of flops.py
and those below; tests/tools/test_plan.py holds them against PyTorch's FlopCounterMode, saved tensors and allocations. Times are
computed too.
"""

import math
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import errors, hf_hub_download
from torch import nn

from checkpoint import HUB_NAME, InputError, is_run, looks_local, no_folder, part_folder, read_json
from dit import PRESETS as DITS
from dit import DiT, DiTConfig
from flops import DEVICES, Batch, flops, peak_flops
from model import MLLM, MLLMConfig
from model import PRESETS as MLLMS
from vae import PRESETS as VAES
from vae import VAE, VAEConfig

GB = 1e9  # as on the data sheets: an H200 has 141
BYTES = {"bf16": 2, "fp32": 4}


@dataclass
class PlanConfig:
    """What --plan asks beyond the flags of the stage. Where the paper is silent the comment says what is assumed."""

    # ---- of --plan alone
    world: int = 1  # GPUs
    gpu: str = "H200"  # whose FLOP/s the data sheet gives
    gpu_memory: float = 141.0  # GB of it
    mfu: float = 0.38  # of the data sheet's FLOP/s, recomputation included: torchtitan's 8B reaches 33-39 % on H100
    link: float = 300.0  # GB/s of an all-reduce, per GPU; assumed, near what NCCL reports inside and between 8-GPU nodes
    picture: int = 480  # pixels along a side; assumed
    pictures: int = 5  # of a dialogue; assumed
    text: int = 600  # tokens of a dialogue beside its pictures, half of them supervised; assumed
    dialogues: int = 298_000  # stage-1 data, the size that summaries of the paper give
    pairs: int = 5_000_000  # video clips (two pictures, a caption) that stage 2 reads as well, by the same sources
    caption: int = 128  # tokens of a clip's dialogue; assumed
    epochs: float = 1.0  # passes over the data; assumed
    zero: bool = False  # AdamW's moments sharded over the GPUs (ZeroRedundancyOptimizer)
    logit_chunk: int = 0  # supervised tokens whose logits exist at a time; 0: all of them


# ----------------------------------------------------------------------------------------------------------------- memory
# What autograd keeps, tensor by tensor, of the plain PyTorch operations with fused attention. e: bytes of the autocast type.
# In bf16 each Linear keeps a cast of its own input unless that is bf16 already, and a cast of its weight.


@dataclass
class Segment:
    """A stretch of the forward pass: bytes it leaves for the backward pass, and what it needs while it runs."""

    saved: int
    parameters: int = 0
    cast: int = 0  # bytes of its weights' casts
    input: int = 0  # bytes: all that checkpointing keeps
    backward: int = 0  # bytes for the while of its backward pass
    forward: int = 0  # and of its forward pass


def layer_bytes(n: int, e: int, width: int, inner: int, heads: int, qkv: int, casts: int):
    """(saved, stream, widest temporary) of a decoder layer or vision block on n tokens. qkv: numbers kept of q, k, v. casts:
    linear layers behind the two norms, which keep one tensor of the stream's size and 1 / rms each."""
    norms = 2 * (4 * width + 4)
    linears = (2 if e == 4 else casts) * width * e
    attention = (qkv + width) * e + 4 * heads  # with the result and its log-sum-exp
    mlp = 4 * inner * e  # gate, silu(gate), up, their product
    return n * (norms + linears + attention + mlp), n * 4 * width, n * (2 * inner * e + 4 * width)


def block_bytes(c: DiTConfig, n: int, m: int, groups: int, e: int) -> tuple[int, int, int]:
    """The same of a DiT block on n patches that read m context tokens; groups: chunks with a modulation of their own."""
    d, heads = c.width, 4 * c.num_attention_heads
    sub = 3 * (3 * 4 * d + 8 + d * e)  # input, its LayerNorm, what is gated, mean and 1 / std, modulated input of the linears
    attended = 3 * (4 * d + heads) + (3 + 1) * d * e + 2 * d * e + 2 * heads  # norms of q, k, q; q k v, result; q, result
    mlp = 2 * int(d * c.mlp_ratio) * e
    context = 4 * d + heads + 2 * d * e
    return n * (sub + attended + mlp) + m * context + groups * 4 * 9 * d, n * 4 * d, n * mlp // 2


def peak(segments: list[Segment], checkpointing: bool, stay: bool = False) -> int:
    """Most bytes alive in a step beside weights, EMA and moments: activations, casts of weights, gradients. Backwards
    activations go and gradients come, so the top may lie anywhere. stay: the gradients are there from the start."""
    live = 4 * sum(s.parameters for s in segments) * stay
    live += sum((s.input if checkpointing and s.input else s.saved) + s.cast for s in segments)
    top = live + segments[-1].forward
    live -= sum(s.cast for s in segments if checkpointing and s.input)  # dropped with autocast; recomputation casts again
    for s in reversed(segments):
        live += s.saved - s.input + s.cast if checkpointing and s.input else 0
        top = max(top, live + s.backward + (4 * s.parameters + s.cast) // 2)  # widest in the MLP, with half of the gradients
        live += (0 if stay else 4 * s.parameters) - s.saved - s.cast
    return max(top, live)


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


def stage1_segments(mllm: MLLM, b: Batch, e: int, chunk: int = 0) -> list[Segment]:
    c, v, h, cast = mllm.config, mllm.config.vision, mllm.config.hidden_size, e == 2
    w, pixels = v.hidden_size, v.in_channels * v.temporal_patch_size * v.patch_size**2
    out = [Segment(0, count(mllm.model.embed_tokens))]
    if b.patches:
        tables = 2 * 4 * w // v.num_heads  # cos and sin
        out.append(Segment(b.patches * (2 * cast * pixels + tables), count(mllm.visual.patch_embed)))
        saved, stream, wide = layer_bytes(b.patches, e, w, v.intermediate_size, v.num_heads, 5 * w, 3)
        out += [Segment(saved, n := count(block), 2 * cast * n, stream, wide) for block in mllm.visual.blocks]
        n = count(mllm.visual.merger)
        out.append(Segment(b.patches * (4 * w + 4 + 3 * w * e), n, 2 * cast * n, 0, b.patches * 3 * w * e))
    qkv = h + 2 * c.num_key_value_heads * c.head_dim  # rotated q | k and v; the vision tower's v holds on to all of q | k | v
    saved, stream, wide = layer_bytes(b.tokens, e, h, c.intermediate_size, c.num_attention_heads, qkv, 5)
    out += [Segment(saved, n := count(layer), 2 * cast * n, stream, wide) for layer in mllm.model.layers]
    logits = 4 * c.vocab_size * min(b.supervised, chunk or b.supervised)
    saved = b.tokens * (8 * h + 2 * 4 * c.head_dim) + b.supervised * h * (4 + 2 * cast) + (0 if chunk else logits)
    head, own = count(mllm.lm_head), 0 if mllm.tied else count(mllm.lm_head)
    return [*out, Segment(saved, own + h, 2 * cast * head, 0, 2 * logits + b.tokens * 4 * h, logits)]


def stage2_segments(dit: DiT, b: Batch, e: int, features: int) -> list[Segment]:
    """features: bytes of each number of the MLLM's states, which stay for the connector's gradient."""
    c, d, cast, n = dit.config, dit.config.width, e == 2, count(dit.crossattn_proj)
    connector = b.tokens * (c.crossattn_proj_in_channels * (features + e * (e != features)) + 2 * c.text_embed_dim * e)
    out = [Segment(connector + b.context * c.text_embed_dim * e, n, 2 * cast * n)]
    table, patch = b.images * 4 * 9 * d * c.num_layers, c.out_channels * c.patch_size[1] ** 2
    embed = b.latents * (7 * 4 * patch + 2 * 4 * c.attention_head_dim)  # x_0, noise, mix, target and inputs; cos and sin
    out.append(Segment(embed + table, count(dit.time_embed, dit.norm_out, dit.patch_embed), 0, 0, table))
    saved, stream, wide = block_bytes(c, b.latents, b.context, b.images, e)
    for block in dit.transformer_blocks:
        n = count(block)
        matrices = n - count(block.norm1, block.norm2, block.norm3)  # modulations are computed in fp32
        out.append(Segment(saved, n, 2 * cast * matrices, stream, wide))
    return [*out, Segment(b.latents * (3 * 4 * d + 3 * 4 * patch), count(dit.proj_out), 0, 0, b.latents * 2 * 4 * d)]


def config_of(source: str, part: str, presets: dict, parse: Callable):
    """A preset's name, a run, a folder with the part or its config.json, or a Hub id, of which only that file is fetched."""
    source = "tiny" if source.startswith("runs/tiny") and not Path(source).exists() else source  # a default, before any run
    if source in presets:
        return presets[source]
    runs = sorted(Path(source).glob(f"step_*/{part}/config.json"))
    file = next((f for f in (*runs[-1:], Path(source, part, "config.json"), Path(source, "config.json")) if f.is_file()), None)
    if file == Path(source, "config.json") and is_run(Path(source)):
        file = part_folder(source, part) / "config.json"  # the run has no such part, and is told so
    hub = HUB_NAME.fullmatch(source)
    if file is None and looks_local(source) and not Path(source).exists():
        raise InputError(f"--{part} {no_folder(source)}")
    if file is None and (hub is None or Path(source).exists()):
        raise InputError(f"--{part} {source}: no config.json there, nor is it one of {', '.join(presets)}")
    try:
        place = {"subfolder": hub["folder"], "revision": hub["revision"]} if hub else {}
        return parse(read_json(file or hf_hub_download(hub["repo"], "config.json", **place)))
    except (OSError, errors.HfHubHTTPError) as e:
        raise InputError(f"--{part} {source}: no config.json from the Hub ({type(e).__name__}): name a folder or preset") from e


class Plan:
    """One stage with its models on the meta device. c: the stage's own flags and those of PlanConfig."""

    def __init__(self, c):
        if c.dtype == "auto":  # what a GPU takes
            c = replace(c, dtype="bf16")
        self.c, self.stage = c, 2 if hasattr(c, "dit") else 1
        frozen = getattr(c, "frozen_dtype", "auto").replace("auto", c.dtype)
        sizes = "world mfu gpu_memory link picture pictures epochs accumulate".split()
        if wrong := [name for name in sizes if getattr(c, name) <= 0]:
            raise InputError(f"--{wrong[0]} must be positive")
        if c.gpu not in DEVICES or not {frozen, c.dtype} <= BYTES.keys():
            raise InputError(f"--gpu is one of {', '.join(DEVICES)}; --dtype and --frozen-dtype are auto, bf16 or fp32")
        self.e, self.frozen, mllm = BYTES[c.dtype], BYTES[frozen], config_of(c.mllm, "mllm", MLLMS, MLLMConfig.from_json)
        with torch.device("meta"):
            self.mllm, self.dit, self.vae = MLLM(mllm), None, None
            if self.stage == 2:
                dit = config_of(c.dit, "dit", DITS, DiTConfig.from_json)
                self.dit = DiT(replace(dit, crossattn_proj_in_channels=mllm.num_hidden_layers * mllm.hidden_size))
                self.vae = VAE(config_of(c.vae, "vae", VAES, VAEConfig.from_json))
        self.trained = count(self.dit or self.mllm)

    def but(self, **changes) -> "Plan":
        """The same models under other flags."""
        other = copy(self)
        other.c = replace(self.c, **changes)
        return other

    def batch(self, pair: bool = False, worst: bool = False) -> tuple[Batch, int]:
        """A micro-batch of dialogues (or of as much in video pairs), and how many documents are in it. The targets of stage 2
        spread evenly over the pictures of a document; worst: the last ones, which see most."""
        c, m = self.c, self.mllm.config
        pictures, text = (2, c.caption) if pair else (c.pictures, c.text)
        merged = max(1, round(c.picture / m.vision.patch_size / m.vision.spatial_merge_size))
        grid, length = (merged * m.vision.spatial_merge_size,) * 2, text + pictures * merged**2
        if self.stage == 1:
            n = min(max(1, c.tokens // length), c.documents or c.tokens)
            return Batch.of(m, [length] * n, [grid] * n * pictures, n * text // 2), n
        side = max(1, round(c.picture / 16)) * 16
        patches = (side // self.vae.config.factor // self.dit.config.patch_size[1]) ** 2
        n, t = (c.documents * max(1, c.pictures // 2), 1) if pair else (c.documents, min(c.targets, pictures))
        seen = [2] if pair else [pictures - k if worst else math.ceil((k + 0.5) * pictures / t) for k in range(t)]
        samples = [([patches] * j, length * j // pictures) for j in seen] * n
        return Batch.of(m, [length] * n, [grid] * n * pictures, 0, [(side, side)] * n * pictures, samples), n

    def flops(self, b: Batch) -> dict:
        return flops(self.stage, self.mllm.config, b, self.dit and self.dit.config, self.vae and self.vae.config)

    def memory(self) -> dict[str, int]:
        """Bytes of one GPU at the highest moment of a step, by what they are. Whole but for the moments under --zero."""
        c, p, (b, _), frozen, held = self.c, self.trained, self.batch(worst=True), 0, 0
        f = self.frozen if self.e == 2 else 4  # bytes of the states that the connector reads
        stay = c.world > 1 or c.accumulate > 1  # DDP's buckets are the gradients and never go
        if self.stage == 1:
            segments = stage1_segments(self.mllm, b, self.e, c.logit_chunk)
        else:
            segments = stage2_segments(self.dit, b, self.e, f)
            features = b.tokens * self.dit.config.crossattn_proj_in_channels * f
            m, e = self.mllm.config, min(self.frozen, self.e)  # a layer beside the states, or these beside their features, or
            layer, norm = b.tokens * (3 * m.intermediate_size * e + 8 * m.hidden_size), b.tokens * 12 * m.hidden_size
            encode = sum(h * w for h, w in b.pictures) * self.vae.config.base_dim * 17  # the VAE's 4 1/4 fp32 maps: measured
            frozen, held = features + max(layer, features + norm, encode) + 4 * p * stay, features * (c.accumulate - 1)
        step = max(peak(segments, c.checkpointing, stay), frozen, 4 * p) + held
        rows = {"weights": 4 * p, "gradients": 4 * p, "AdamW": 8 * p // (c.world if c.zero else 1), "EMA": 4 * p}
        rows["frozen weights"] = self.frozen * count(self.mllm) + 4 * count(self.vae) if self.dit else 0
        return rows | {"activations, casts": step - 4 * p}

    @property
    def total(self) -> float:  # GB of one GPU
        return sum(self.memory().values()) / GB

    def seconds(self, b: Batch) -> float:
        """Of one step: arithmetic at the stated MFU or the all-reduce behind it, then what the optimizer reads and writes."""
        c, parts, (top, bandwidth) = self.c, self.flops(b), DEVICES[self.c.gpu]
        again = sum(f for k, (f, g) in parts.items() if g and k in ("vision tower", "decoder", "DiT")) if c.checkpointing else 0
        compute = c.accumulate * (sum(map(sum, parts.values())) + again) / top / c.mfu
        send = 4 * self.trained / (c.link * GB) * (c.world - 1) / c.world  # under --zero the new weights go to everyone
        adam = 28 / (c.world if c.zero else 1) + 16  # read p g m v, write p m v; clipping reads g, EMA reads two and writes one
        return max(compute, 2 * send) + adam * self.trained / (0.85 * bandwidth) + send * c.zero

    def schedule(self) -> tuple[float, int, float]:
        """Seconds of a step of dialogues; steps and hours in all for the stated documents and epochs."""
        c, steps, hours = self.c, 0, 0.0
        for documents, pair in ((c.dialogues, False), (c.pairs * bool(self.dit), True)):
            b, n = self.batch(pair)
            need = math.ceil(documents * c.epochs / (n * c.accumulate * c.world))
            steps, hours = steps + need, hours + need * self.seconds(b) / 3600
        return self.seconds(self.batch()[0]), steps, hours

    def advice(self) -> str:
        """Whether it fits; if not, what takes the most, and the first change of flags with which it does."""
        c, room, memory = self.c, self.c.gpu_memory, self.memory()
        if self.total <= room:
            return f"fits: {self.total:.1f} of {room:g} GB"
        most = max(memory, key=memory.get)
        text = f"does not fit: {self.total:.1f} of {room:g} GB, of which {most} {memory[most] / GB:.1f}"
        whole = sum(memory[k] for k in memory if k not in ("AdamW", "activations, casts")) / GB
        if whole > room:
            return f"{text}; not at all under DDP, which keeps {whole:.0f} GB of weights, gradients, EMA whole: a smaller model"
        both = {"checkpointing": True, "zero": True}
        worlds = ({"world": n} for n in (2, 4, 8, 16, 32, 64) if n > c.world)
        for changes in ({"checkpointing": True}, {"zero": True}, both, *(both | world for world in worlds)):
            if self.but(**changes).total <= room:
                return f"{text}; fits with {' '.join(f'--{k}' if v is True else f'--{k} {v}' for k, v in changes.items())}"
        return f"{text}; fewer --{'documents or --targets' if self.dit else 'tokens'}, a smaller --picture or a smaller model"

    def report(self) -> str:
        """What --plan prints."""
        c, (b, n), memory = self.c, self.batch(), self.memory()
        parts = [("MLLM", "trained", count(self.mllm)), ("  its vision tower", "trained", count(self.mllm.visual))]
        if self.dit:
            parts = [("DiT + connector", "trained", self.trained), *((name, "frozen", size) for name, _, size in parts)]
            parts.append(("VAE", "frozen", count(self.vae)))
        lines = [f"stage {self.stage} on {c.world} x {c.gpu}, {c.dtype}: computed, nothing was run", "", "parameters"]
        lines += [f"  {name:<36}{state:<9}{size:>15,}" for name, state, size in parts]
        lines += ["", f"GB on each GPU: {self.advice()}"]
        lines += [f"  {k:<36}{v / GB:>9.2f}" for k, v in memory.items()]
        for name, flags in (("", {}), (" with checkpointing", {"checkpointing": True}), (" without", {"checkpointing": False})):
            plain, zero = self.but(**flags), self.but(zero=True, **flags)
            lines.append(f"  {'total' + name:<36}{plain.total:>9.2f}   with --zero {zero.total:>9.2f}")
        if not self.dit:
            whole, chunk = (12 * n * self.mllm.config.vocab_size / GB for n in (b.supervised, min(256, b.supervised)))
            lines.append(f"  {'logits and their gradient, whole':<36}{whole:>9.2f}   256 at a time {chunk:>7.2f}")
        lines += ["", f"TFLOP of a micro-batch: {n} documents, {b.tokens:,} tokens, {b.latents:,} latent patches"]
        lines += [f"  {k:<36}{f / 1e12:>9.3f} forward {g / 1e12:>9.3f} backward" for k, (f, g) in self.flops(b).items()]
        (step, steps, hours), clips = self.schedule(), f" and {c.pairs:,} video pairs" if self.dit else ""
        lines += ["", f"step {step:.2f} s at {c.mfu:.0%} of {peak_flops(c.gpu) / 1e12:.0f} TFLOP/s (--mfu: assumed)"]
        lines += [f"{c.dialogues:,} dialogues{clips}, {c.epochs:g} times: {steps:,} steps, in all"]
        return "\n".join([*lines, f"{hours:,.1f} hours, {hours / 24:.1f} days, {hours * c.world:,.0f} GPU-hours"])


STAGE1 = {"mllm": "7B", "tokens": 4096, "documents": 0, "accumulate": 1, "dtype": "bf16", "checkpointing": True}
STAGE2 = STAGE1 | {"dit": "2B", "vae": "wan2.1", "documents": 1, "targets": 2, "checkpointing": False, "frozen_dtype": "auto"}


def example(flags: dict, **changes) -> Plan:
    """A plan without a script: STAGE1 or STAGE2, changed."""
    return Plan(make_dataclass("Flags", [(k, type(v), v) for k, v in flags.items()], bases=(PlanConfig,))(**changes))


def markdown() -> str:
    """Both stages at 7B + 2B on 1, 8 and 64 H200s, GB on each by what they are: the table of docs/plan.md and of the README."""
    head = "stage", "H200s", "weights", "gradients", "AdamW", "EMA", "frozen", "rest", "GB of 141", "step", "days", "GPU-hours"
    rows = [head, ["---"] * len(head)]
    for flags in (STAGE1, STAGE2):
        for world in (1, 8, 64):
            plan = example(flags, world=world, zero=world > 1)
            step, _, hours = plan.schedule()
            sizes = [*(f"{v / GB:.1f}" for v in plan.memory().values()), f"{plan.total:.0f}"]
            cost = [f"{step:.2f} s", f"{hours / 24:.2f}", f"{hours * world:,.0f}"]
            rows.append([f"{plan.stage}", f"{world}", *sizes, *(cost if plan.total <= 141 else ["does not fit", "", ""])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown())
