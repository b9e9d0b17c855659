"""What a training run will cost, before it is paid for: parameters, bytes per GPU, FLOPs, days. No weights, no GPU.

    python train_stage1.py --plan --mllm 7B --world 8 --zero --checkpointing
    python train_stage2.py --plan --mllm 7B --dit 2B --vae wan2.1 --world 8 --zero --documents 1 --checkpointing
    python -m tools.plan                                            the table of docs/plan.md and of the README, in Markdown

The real modules run a real step on fake tensors: these have a shape, a type and a device, but no bytes. A mode of PyTorch's
dispatcher sees every operation, adds up the FLOPs and notes when memory comes and goes, that of the backward pass, of
recomputation and of autocast's copies, too. tests/tools/test_plan.py holds that against PyTorch's own record of the allocations
of a miniature. Times are computed, by the formulas of flops.py, which the same test holds against what is counted here.
"""

import math
import weakref
from copy import copy
from dataclasses import dataclass, make_dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import errors, hf_hub_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

import dit
import lora
import model
import ops
import vae
from checkpoint import HUB_NAME, InputError, is_run, looks_local, no_folder, part_folder, read_json
from data import Document, pack_documents
from dit import DiT, DiTConfig
from flops import DEVICES, Batch, count, flops, peak_flops
from flow import FlowLoss, Samples
from model import MLLM, MLLMConfig, mrope_positions
from pipeline import PARTS, pixels_per_patch
from tokenizer import Rendered
from training import LanguageLoss, encode_pictures, mllm_features, parse_config
from vae import VAE, VAEConfig

GB = 1e9  # as on the data sheets: an H200 has 141
# Photographs of 480 x 480 (JPEG) that one data worker decodes and prepares in a second, in dialogues of 5 with 7B's tokenizer,
# by stage: the VAE of stage 2 wants them too. Measured on one core of an AMD EPYC; a larger one takes longer by its area.
PHOTOS = {1: 105.0, 2: 90.0}
PRESETS = {"mllm": model.PRESETS, "dit": dit.PRESETS, "vae": vae.PRESETS}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}

# ------------------------------------------------------------------------------------------------ running without memory

# Indices stay real: what a step reads back from them, such as how many tokens are targets, must be known.
FAKE = FakeTensorMode(allow_non_fake_inputs=True)


class Tally(TorchDispatchMode):
    """FLOPs of what runs inside, and the bytes it holds, now and at the highest moment, beside those of `known` tensors.

    live: bytes of now; gradients: of those that are finished, which are given to `take` and then no longer live; passing: live
    at its highest moment; top: both together at theirs. Attention is a stand-in that keeps what fused attention keeps: no
    scores.
    """

    def __init__(self, *known: nn.Module | Tensor):
        super().__init__()
        self.flops = self.live = self.gradients = self.passing = self.top = 0
        self.sizes = weakref.WeakKeyDictionary()
        for part in known:
            for tensor in part.parameters() if isinstance(part, nn.Module) else [part]:
                self.sizes[tensor.untyped_storage()] = 0

    def __enter__(self) -> "Tally":
        self.attention, ops._packed_attention = ops._packed_attention, self.attend
        return super().__enter__()

    def __exit__(self, *error) -> None:
        ops._packed_attention = self.attention
        super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # asked for so often that the way through the dispatcher would be most of the time
        if func is torch.ops.prim.device.default:
            return args[0].fake_device
        out = func(*args, **(kwargs or {}))
        formula = FLOPS.get(func.overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.hold(tensor.untyped_storage())
        return out

    def hold(self, storage: torch.UntypedStorage) -> None:
        """Count a storage from now on until nothing refers to it any more. Views have that of their base."""
        if storage in self.sizes:
            return
        size = self.sizes[storage] = storage.nbytes()
        self.live += size
        self.passing = max(self.passing, self.live)
        self.top = max(self.top, self.live + self.gradients)
        weakref.finalize(storage, self.release, size)

    def release(self, size: int) -> None:
        self.live -= size

    def take(self, parameter: Tensor) -> None:
        self.gradients += parameter.grad.nbytes
        parameter.grad = None

    def attend(self, q, k, v, sq, sk, causal, scale, k_lengths) -> Tensor:
        """In place of ops._packed_attention."""
        pairs = 0
        for lq, lk in zip(sq.lengths, sk.lengths, strict=True):
            pairs += lq * lk - (lq * (lq - 1) // 2 if causal else 0)
        return Attention.apply(q, k, v, self, 4 * q.shape[1] * q.shape[2] * pairs)


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, tally, flops):
        ctx.tally, ctx.flops = tally, flops
        tally.flops += flops
        out = q.new_empty(q.shape)
        # the logarithm of the sum of a query's weights, with which the backward pass finds them again
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:2], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, grad):
        # the scores, which are multiplied once more, are no work of the model's
        ctx.tally.flops += 2 * ctx.flops
        return *(x.new_empty(x.shape) for x in ctx.saved_tensors[:3]), None, None


# PyTorch's formulas do not know the product that adds into its result.
FLOPS = {**flop_registry, torch.ops.aten.addmm_: flop_registry[torch.ops.aten.addmm]}


def pretend(kind: type, config, dtype: torch.dtype = torch.float32):
    """A module of this size without its bytes."""
    with torch.device("meta"):
        module = kind(config).to(dtype)
    with FAKE:
        module.to_empty(device="cpu")
    # each of two names got a tensor of its own
    for name, source in getattr(module, "tied", {}).items():
        module.get_submodule(name.rpartition(".")[0]).weight = module.get_parameter(source)
    return module


def pretend_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    with FAKE:
        return torch.empty(shape, dtype=dtype)


def pretend_document(c: MLLMConfig, text: int, grids: list[tuple[int, int]], supervised: int, sides=()) -> Document:
    """So much text, then pictures of so many vision patches; sides: of those that the VAE encodes."""
    v = c.vision
    merged = [(h // v.spatial_merge_size, w // v.spatial_merge_size) for h, w in grids]
    ids = [0] * text + [c.image_token_id] * sum(h * w for h, w in merged)
    loss = [False] + [True] * supervised + [False] * (len(ids) - supervised - 1)
    positions, _ = mrope_positions(ids, merged, c.image_token_id)
    pixels = pretend_tensor(sum(h * w for h, w in grids), v.in_channels * v.temporal_patch_size * v.patch_size**2)
    pictures = [pretend_tensor(3, side, side) for side in sides]
    return Document(Rendered(ids, loss), positions, pixels if grids else None, list(grids), pictures)


def run_step(
    modules: dict[str, nn.Module],
    documents: list[Document],
    samples: list[tuple[int, int, int]] = (),
    dtype: torch.dtype = torch.bfloat16,
    checkpointing: bool = False,
) -> None:
    """Forward and backward pass of a micro-batch, as the script of the stage does it.

    samples of stage 2: number of the document, pictures up to and with the target, tokens that are read.
    """
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
    if "dit" not in modules:
        modules["mllm"].set_checkpointing(checkpointing)
        with autocast:
            loss, _ = LanguageLoss(modules["mllm"])(pack_documents(documents))
    else:
        modules["dit"].gradient_checkpointing = checkpointing
        with autocast:
            drawn = draw_samples(documents, samples, modules["mllm"], modules["vae"])
        with autocast:
            error, _ = FlowLoss(modules["dit"], 1e-4)(drawn, torch.rand(len(samples)), torch.Generator())
        loss = error.sum()
    loss.backward()


def draw_samples(documents: list[Document], samples: list[tuple[int, int, int]], mllm: MLLM, vae: VAE) -> Samples:
    device = torch.device("cpu")
    states, first = mllm_features(documents, mllm, device)
    pictures = encode_pictures(documents, vae, device)
    rows = [range(first[d], first[d] + context) for d, _, context in samples]
    latents = [pictures[d][:seen] for d, seen, _ in samples]
    return Samples(states, rows, latents, [seen - 1 for _, seen, _ in samples])


def tally_step(modules: dict[str, nn.Module], documents: list[Document], *args, **options) -> Tally:
    """run_step on fake modules."""
    inputs = [x for d in documents for x in (d.pixels, *d.pictures) if x is not None]
    with Tally(*modules.values(), *inputs) as tally:
        parameters = [p for p in modules.get("dit", modules["mllm"]).parameters() if p.requires_grad]
        hooks = [p.register_post_accumulate_grad_hook(tally.take) for p in parameters]
        run_step(modules, documents, *args, **options)
    for hook in hooks:
        hook.remove()
    return tally


# -------------------------------------------------------------------------------------------------------------- the plan


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


def config_of(source: str, part: str) -> MLLMConfig | DiTConfig | VAEConfig:
    """A part's config.

    source: a preset's name, a run, a folder with the part or its config.json, or a Hub id, of which only that file is fetched.
    """
    source = "tiny" if source.startswith("runs/tiny") and not Path(source).exists() else source  # a default, before any run
    presets = PRESETS[part]
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
        return PARTS[part].from_json(read_json(file or hf_hub_download(hub["repo"], "config.json", **place)))
    except (OSError, errors.HfHubHTTPError) as e:
        raise InputError(f"--{part} {source}: no config.json from the Hub ({type(e).__name__}): name a folder or preset") from e


@dataclass(frozen=True)
class MicroBatch:
    """What a GPU reads at a time: so many equal documents."""

    documents: int
    text: int  # tokens of each beside its pictures
    pictures: int
    grid: tuple[int, int]  # vision patches of a picture
    tokens: int  # of a document, pictures included
    side: int = 0  # pixels of a picture that the VAE encodes
    seen: tuple[int, ...] = ()  # of each target of a document: pictures up to and with it

    def read(self, seen: int) -> int:
        """Tokens that a target reads which is the picture of this number."""
        return self.tokens * seen // self.pictures


class Plan:
    """One stage with its models on fake tensors. c: the stage's own flags and those of PlanConfig."""

    def __init__(self, c):
        if c.dtype == "auto":  # what a GPU takes
            c = replace(c, dtype="bf16")
        self.c, self.stage = c, 2 if hasattr(c, "dit") else 1
        frozen = getattr(c, "frozen_dtype", "auto").replace("auto", c.dtype)
        sizes = "world mfu gpu_memory link picture pictures epochs accumulate".split()
        if wrong := [name for name in sizes if getattr(c, name) <= 0]:
            raise InputError(f"--{wrong[0]} must be positive")
        if c.gpu not in DEVICES or not {frozen, c.dtype} <= DTYPES.keys():
            raise InputError(f"--gpu is one of {', '.join(DEVICES)}; --dtype and --frozen-dtype are auto, bf16 or fp32")
        self.dtype, self.frozen = DTYPES[c.dtype], DTYPES[frozen]
        mllm = config_of(c.mllm, "mllm")
        self.dit, self.vae = None, None
        self.lora = getattr(c, "lora", 0)
        kept = self.frozen if self.lora else torch.float32  # of the weights beside which others are trained
        if self.stage == 1:
            self.mllm = self.adapted(pretend(MLLM, mllm, kept))
        else:
            dit = config_of(c.dit, "dit")
            vae = config_of(c.vae, "vae")
            self.mllm = pretend(MLLM, mllm, self.frozen).requires_grad_(False)
            dit = replace(dit, crossattn_proj_in_channels=mllm.num_hidden_layers * mllm.hidden_size)
            self.dit = self.adapted(pretend(DiT, dit, kept))
            self.vae = pretend(VAE, vae).requires_grad_(False)
        self.whole = count(self.dit or self.mllm)
        self.trained = sum(p.numel() for p in (self.dit or self.mllm).parameters() if p.requires_grad)
        self.steps: dict[tuple, Tally] = {}  # shared by all `but`s, most of which ask for the same steps

    def adapted(self, model: nn.Module) -> nn.Module:
        """With --lora: what is trained are adapters."""
        with FAKE:
            return lora.adapt(model, self.lora)

    def but(self, **changes) -> "Plan":
        """The same models under other flags."""
        other = copy(self)
        other.c = replace(self.c, **changes)
        return other

    def micro(self, pair: bool = False, worst: bool = False) -> MicroBatch:
        """A micro-batch of dialogues, or of as much in video pairs. The targets of stage 2 spread evenly over the pictures of a
        document; worst: the last ones, which see most."""
        c, v = self.c, self.mllm.config.vision
        pictures, text = (2, c.caption) if pair else (c.pictures, c.text)
        merged = max(1, round(c.picture / v.patch_size / v.spatial_merge_size))
        grid = (merged * v.spatial_merge_size,) * 2
        tokens = text + pictures * merged**2
        if self.stage == 1:
            documents = min(max(1, c.tokens // tokens), c.documents or c.tokens)
            return MicroBatch(documents, text, pictures, grid, tokens)
        unit = pixels_per_patch(self.vae.config, self.dit.config)
        side = max(1, round(c.picture / unit)) * unit
        documents = c.documents or 1
        if pair:
            return MicroBatch(documents * max(1, c.pictures // 2), text, pictures, grid, tokens, side, (2,))
        targets = range(min(c.targets, pictures))
        if worst:
            seen = [pictures - k for k in targets]
        else:
            seen = [math.ceil((k + 0.5) * pictures / len(targets)) for k in targets]
        return MicroBatch(documents, text, pictures, grid, tokens, side, tuple(seen))

    def batch(self, pair: bool = False, worst: bool = False) -> tuple[Batch, int]:
        """The sizes of a micro-batch, and how many documents are in it."""
        m = self.micro(pair, worst)
        n, c = m.documents, self.mllm.config
        lengths, grids = [m.tokens] * n, [m.grid] * n * m.pictures
        if self.stage == 1:
            return Batch.of(c, lengths, grids, n * (m.text // 2)), n
        patches = (m.side // pixels_per_patch(self.vae.config, self.dit.config)) ** 2
        samples = [([patches] * seen, m.read(seen)) for seen in m.seen] * n
        return Batch.of(c, lengths, grids, 0, [(m.side, m.side)] * n * m.pictures, samples), n

    def step(self) -> Tally:
        """What a step of the largest micro-batch does to memory, and its FLOPs, those of recomputation included."""
        m = self.micro(worst=True)
        key = m, self.c.checkpointing
        if key not in self.steps:
            sides = [m.side] * m.pictures if self.stage == 2 else []
            grids = [m.grid] * m.pictures
            documents = [pretend_document(self.mllm.config, m.text, grids, m.text // 2, sides) for _ in range(m.documents)]
            samples = [(d, seen, m.read(seen)) for d in range(m.documents) for seen in m.seen]
            modules = {"mllm": self.mllm, "dit": self.dit, "vae": self.vae}
            modules = {name: module for name, module in modules.items() if module is not None}
            self.steps[key] = tally_step(modules, documents, samples, self.dtype, self.c.checkpointing)
        return self.steps[key]

    def flops(self, b: Batch) -> dict:
        sizes = self.dit and self.dit.config, self.vae and self.vae.config
        return flops(self.stage, self.mllm.config, b, *sizes, adapters=bool(self.lora))

    def states(self) -> dict[str, int]:
        """Bytes of one GPU that are there all the time. Whole but for the moments under --zero."""
        c, p = self.c, self.trained
        rows = {"weights": 4 * p, "gradients": 4 * p, "AdamW": 8 * p // (c.world if c.zero else 1), "EMA": 4 * p}
        frozen = self.frozen.itemsize * count(self.mllm) + 4 * count(self.vae) if self.dit else 0
        if self.lora:
            frozen += self.frozen.itemsize * (self.whole - p)
        return rows | {"frozen weights": frozen}

    def memory(self) -> dict[str, int]:
        """Bytes of one GPU at the highest moment of a step, by what they are."""
        c, rows, step = self.c, self.states(), self.step()
        waiting = 0
        if self.dit:
            # the states of all micro-batches are read before the first of them is learned from
            m, width = self.micro(worst=True), self.dit.config.crossattn_proj_in_channels
            size = self.frozen.itemsize if self.dtype == torch.bfloat16 else 4
            waiting = (c.accumulate - 1) * m.documents * m.tokens * width * size
        # DDP's buckets are the gradients and never go, nor do those of earlier micro-batches; else each comes in its turn
        stay = c.world > 1 or c.accumulate > 1
        rest = step.passing if stay else max(0, step.top - rows["gradients"])
        return rows | {"activations, casts": rest + waiting}

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

    def reading(self) -> tuple[float, float]:
        """Documents a second that each GPU trains, and that one data worker prepares."""
        c, (_, documents) = self.c, self.batch()
        trained = documents * c.accumulate / self.seconds(self.batch()[0])
        return trained, PHOTOS[self.stage] * (480 / c.picture) ** 2 / c.pictures

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
        state = "frozen" if self.lora else "trained"
        parts = [("MLLM", state, count(self.mllm)), ("  its vision tower", state, count(self.mllm.visual))]
        if self.dit:
            parts = [("DiT + connector", state, self.whole), *((name, "frozen", size) for name, _, size in parts)]
            parts.append(("VAE", "frozen", count(self.vae)))
        if self.lora:
            name, _, size = parts[0]
            beside = "adapters, connector" if self.dit else "adapters"
            parts = [(f"{beside}, rank {self.lora}", "trained", self.trained), (name, state, size - self.trained), *parts[1:]]
        lines = [f"stage {self.stage} on {c.world} x {c.gpu}, {c.dtype}: computed, nothing was run", "", "parameters"]
        lines += [f"  {name:<36}{state:<9}{size:>15,}" for name, state, size in parts]
        lines += ["", f"GB on each GPU: {self.advice()}"]
        lines += [f"  {k:<36}{v / GB:>9.2f}" for k, v in memory.items()]
        for name, flags in (("", {}), (" with checkpointing", {"checkpointing": True}), (" without", {"checkpointing": False})):
            plain, zero = self.but(**flags), self.but(zero=True, **flags)
            lines.append(f"  {'total' + name:<36}{plain.total:>9.2f}   with --zero {zero.total:>9.2f}")
        lines += ["", f"TFLOP of a micro-batch: {n} documents, {b.tokens:,} tokens, {b.latents:,} latent patches"]
        lines += [f"  {k:<36}{f / 1e12:>9.3f} forward {g / 1e12:>9.3f} backward" for k, (f, g) in self.flops(b).items()]
        done = self.step().flops / 1e12
        lines.append(f"  {'the largest, counted':<36}{done:>9.3f} in all, with what is computed twice")
        (step, steps, hours), clips = self.schedule(), f" and {c.pairs:,} video pairs" if self.dit else ""
        lines += ["", f"step {step:.2f} s at {c.mfu:.0%} of {peak_flops(c.gpu) / 1e12:.0f} TFLOP/s (--mfu: assumed)"]
        trained, prepared = self.reading()
        lines += [f"data: {trained:.1f} documents/s on each GPU; a data worker prepares {prepared:.0f}, so --workers "
                  f"{math.ceil(trained / prepared)} for each will do (photographs; measured on another machine)"]  # fmt: skip
        lines += [f"{c.dialogues:,} dialogues{clips}, {c.epochs:g} times: {steps:,} steps, in all"]
        return "\n".join([*lines, f"{hours:,.1f} hours, {hours / 24:.1f} days, {hours * c.world:,.0f} GPU-hours"])


def planned(cls: type, argv: list[str], doc: str = "") -> Plan:
    """The plan of a training script: its settings, a dataclass, and the command line, with the flags of PlanConfig on top."""
    both = make_dataclass("Planned", [], bases=(PlanConfig, cls))
    return Plan(parse_config(both, [arg for arg in argv if arg != "--plan"], doc, plan=True))


STAGE1 = {"mllm": "7B", "tokens": 4096, "documents": 0, "accumulate": 1, "dtype": "bf16", "checkpointing": True}
STAGE2 = STAGE1 | {"dit": "2B", "vae": "wan2.1", "documents": 1, "targets": 2, "checkpointing": False, "frozen_dtype": "auto"}


def example(flags: dict, **changes) -> Plan:
    """A plan without a script: STAGE1 or STAGE2, changed."""
    return Plan(make_dataclass("Flags", [(k, type(v), v) for k, v in flags.items()], bases=(PlanConfig,))(**changes))


def markdown(*stages: Plan) -> str:
    """Both stages at 7B + 2B on 1, 8 and 64 H200s, GB on each by what they are: the table of docs/plan.md and of the README."""
    head = "stage", "H200s", "weights", "gradients", "AdamW", "EMA", "frozen", "rest", "GB of 141", "step", "days", "GPU-hours"
    rows = [head, ["---"] * len(head)]
    for whole in stages or (example(STAGE1), example(STAGE2)):
        for world in (1, 8, 64):
            plan = whole.but(world=world, zero=world > 1)
            step, _, hours = plan.schedule()
            sizes = [*(f"{v / GB:.1f}" for v in plan.memory().values()), f"{plan.total:.0f}"]
            cost = [f"{step:.2f} s", f"{hours / 24:.2f}", f"{hours * world:,.0f}"]
            rows.append([f"{plan.stage}", f"{world}", *sizes, *(cost if plan.total <= 141 else ["does not fit", "", ""])])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


if __name__ == "__main__":
    print(markdown())
