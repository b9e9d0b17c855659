"""The models at work: a guided step, a token, pictures seen and brought back, a whole document; and the machine's ceilings.

The peers are transformers' and diffusers' models on the same weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from bench import peers as theirs
from bench.measure import Bench, Row, Way
from dit import DiTConfig
from families.registry import family_of, preset
from flow import CONDITION_TIME, denoise, shift_schedule
from model import KVCache, MLLMConfig, VisionConfig
from ops import Graph, Segments, pays_to_record
from flops import count
from vae import VAEConfig

# ------------------------------------------------------------------------------------------------------------------- models

# What is added to the residual stream.
ADDS = (
    "o_proj.weight",
    "attn.proj.weight",
    "down_proj.weight",
    "mlp.linear_fc2.weight",
    "to_out.0.weight",
    "net.2.weight",
)
FEWEST = 3  # layers with which a language model has all of its kernels; as many listen to DeepStack


def build(b: Bench, config, dtype: torch.dtype | None = None) -> nn.Module:
    """The model of a config, of whatever family, with random weights at which activations stay near 1. Nothing is zero: gates
    and outputs say something."""
    with torch.device("meta"):
        module = family_of(config).Model(config)
    module = module.to(dtype or b.dtype).to_empty(device=b.device)
    # Each of two names of one matrix got a tensor of its own.
    for name, source in getattr(module, "tied", {}).items():
        module.get_submodule(name.rpartition(".")[0]).weight = module.get_parameter(source)
    generator = torch.Generator(b.device).manual_seed(0)
    with torch.no_grad():
        for name, p in module.named_parameters():
            # Variance 1 / inputs keeps the size of what goes through. What is added to the stream is made smaller: dozens of
            # layers add to it.
            gain = p.ndim == 1 and not name.endswith("bias")
            fan_in = p[0].numel() if p.ndim > 1 else 100
            if name.endswith(ADDS):
                fan_in *= 20
            mean = 1.0 if gain else 0.0
            p.normal_(mean, fan_in**-0.5, generator=generator)
    return module.eval()


def mllm_config(b: Bench, layers: int | None = None) -> MLLMConfig:
    """Of the language model that the run is about. layers: no more of them than that."""
    name = b.preset("mllm")
    if name:
        config = preset("mllm", name)
        # All layers share their kernels: to compile these, a few will do.
        most = FEWEST if b.compiling else layers or config.num_hidden_layers
        return replace(config, num_hidden_layers=min(most, config.num_hidden_layers))
    # On a CPU a model of the 7B's proportions whose row takes seconds.
    vision = VisionConfig(
        640,
        1024,
        depth=4,
        num_heads=8,
        intermediate_size=1708,
        fullatt_block_indexes=(1, 3),
    )
    names = ("image", "video", "vision_start", "vision_end", "vision", "eos", "pad")
    ids = {f"{name}_token_id": 8191 - i for i, name in enumerate(names)}
    return MLLMConfig(1024, 2816, 4, 8, 2, 8192, 1e-6, vision, **ids)


def dit_config(b: Bench):
    """Of the painter that the run is about, with a connector to its language model."""
    tiny = dict(
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=32,
        adaln_lora_dim=8,
        text_embed_dim=24,
    )
    small = dict(num_layers=2, num_attention_heads=8)
    name = b.preset("dit")
    if name:
        config = preset("dit", name)
    else:
        config = DiTConfig(**b.pick(gpu={}, cpu=small, smoke=tiny))
    changes = {"crossattn_proj_in_channels": mllm_config(b).features}
    # The last block is another one than those before it: two layers have all kernels.
    if b.compiling:
        changes["num_layers"] = 2
    # As in diffusers, which has no other.
    if isinstance(config, DiTConfig):
        changes["qk_norm_eps"] = 1e-5
    return replace(config, **changes)


def packed(b: Bench, c: MLLMConfig, lengths: list[int]) -> tuple[list[Tensor], Segments, Tensor]:
    """Documents of these lengths: token ids of each, where they lie in a pack, positions (3, N)."""
    # Any tokens but those at the end of the vocabulary, which stand for pictures.
    ids = []
    for s, n in enumerate(lengths):
        places = torch.arange(n, device=b.device)
        ids.append(places * (37 + s) % (c.vocab_size - 30))
    positions = torch.cat([torch.arange(n, device=b.device) for n in lengths])
    return ids, Segments(lengths, b.device), positions.expand(3, -1)


def latent(b: Bench, height: int, width: int, seed: int) -> Tensor:
    """Of a picture of height x width pixels: (16, height / 8, width / 8)."""
    return b.randn(16, height // 8, width // 8, seed=seed).float()


def size_of(module: nn.Module) -> str:
    n = count(module)
    if n >= 1e8:
        return f"{n / 1e9:.2g}B"
    return f"{n / 1e6:.2g}M"


def called(b: Bench, part: str, module: nn.Module) -> str:
    """What a row calls its model: the preset's name, or its size where that is the bench's own."""
    return b.preset(part) or size_of(module)


# --------------------------------------------------------------------------------------------------------------------- rows


def ceilings(b: Bench) -> None:
    """What the machine can do: a copy, and one large product of random numbers. On a CPU others share it: no ceiling."""
    if b.size == "cpu":
        return
    n = b.pick(gpu=2**32, cpu=0, smoke=2**20)
    source = torch.ones(n, dtype=torch.int8, device=b.device)
    target = torch.empty_like(source)

    def copy() -> Way:
        return Way(partial(target.copy_, source))

    b.measure(Row("ceiling: copy", f"{n / 1e9:.2g} GB", copy, {}, limit=0, moved=2 * n))
    # Random numbers: of zeros a GPU computes more, since switching bits takes power, which is what limits its clock.
    m = b.pick(gpu=8192, cpu=0, smoke=128)
    x = b.randn(m, m)
    y = b.randn(m, m, seed=1)

    def product() -> Way:
        return Way(partial(torch.matmul, x, y))

    b.measure(Row("ceiling: matrix product", f"{m} x {m} x {m}", product, {}, limit=0, flops=2 * m**3))


def decode(b: Bench) -> None:
    """A token of one document on a static cache; on a GPU also as a recorded graph."""
    prompts = b.pick(gpu=(2048,), cpu=(512,), smoke=(20,))
    new = b.pick(gpu=32, cpu=24, smoke=3)
    mllm = build(b, mllm_config(b)).fuse_for_inference()
    c = mllm.config
    library = theirs.once(partial(theirs.transformers_mllm, mllm))

    def ours(ids: Tensor, where: Tensor, prompt: int, graph: bool = False) -> Way:
        # The prompt is read before anything is timed.
        cache = KVCache(c, prompt + new, b.dtype, b.device)
        mllm(ids[:prompt], where[:, :prompt], Segments([prompt], b.device), cache=cache)

        def logits(ids, positions):
            return mllm.logits(mllm.decode(ids, positions, cache)[-1])

        decode = Graph(logits) if graph else logits

        def step(i: int) -> Tensor:
            cache.advance([0])
            out = decode(ids[i : i + 1], where[0, i : i + 1])
            return out[0].clone()  # a graph writes its next result to the same place

        def run():
            cache.length = prompt
            return theirs.tokens(step, range(prompt, prompt + new), b.device)

        return Way(run)

    def peer(ids: Tensor, prompt: int) -> Way:
        return Way(theirs.decode(library(), ids, prompt, new))

    # A token reads every weight once, but of the embeddings one row.
    moved = 0
    for module in (mllm.model.layers, mllm.lm_head):
        moved += sum(p.nbytes for p in module.parameters())
    for prompt in prompts:
        (ids,), _, where = packed(b, c, [prompt + new])
        peers = {"transformers": partial(peer, ids, prompt)}
        if b.cuda:
            peers["ours, as a CUDA graph"] = partial(ours, ids, where, prompt, graph=True)
        b.measure(Row(
            what="decode token",
            shape=f"{called(b, 'mllm', mllm)}, {prompt} tokens before",
            ours=partial(ours, ids, where, prompt),
            peers=peers,
            limit=b.limit(1e-1, 1e-4),
            own_clock=True,
            moved=moved,
        ))  # fmt: skip


def guided_samples(b: Bench) -> dict[str, list[list[tuple[int, int]]]]:
    """Samples as their pictures' (height, width) in pixels, the last one to be painted."""
    return b.pick(
        gpu={
            "480 px alone": [[(480, 480)]],
            "480 px, 1 + 4": [[(480, 480)] * 5],
            "1024 px, 1 + 4": [[(1024, 1024)] * 5],
            "ragged samples": [[(480, 480)] * 3, [(1024, 1024)], [(512, 768)] * 2, [(640, 640)] * 4],
        },
        cpu={"192 px, 1 + 2": [[(192, 192)] * 3]},
        smoke={"32 px, 1 + 1": [[(32, 32)] * 2], "ragged samples": [[(32, 48)] * 2, [(64, 32)]]},
    )


def mixed_samples(b: Bench) -> dict[str, list[list[tuple[int, int]]]]:
    """Of one sample pictures of several sizes, which the peer does not know."""
    return b.pick(
        gpu={"mixed sizes": [[(480, 480), (512, 768), (640, 640), (512, 512), (1024, 1024)]]},
        cpu={},
        smoke={"mixed sizes": [[(32, 48), (64, 32)]]},
    )


def guided(b: Bench) -> None:
    guided_steps(b, guided_samples(b))


def mixed(b: Bench) -> None:
    guided_steps(b, mixed_samples(b))


def guided_steps(b: Bench, cases: dict[str, list[list[tuple[int, int]]]]) -> None:
    """A step of the painter, both branches of guidance."""
    if not cases:
        return
    dit = build(b, dit_config(b)).fuse_for_inference()
    library = theirs.once(partial(theirs.diffusers_dit, dit))
    sigmas = shift_schedule(b.pick(gpu=4, cpu=4, smoke=3))
    text = b.pick(gpu=512, cpu=128, smoke=7)

    def run(args: tuple, graphs: bool | None):
        stamps = theirs.Stamps(b.device)
        out = denoise(
            dit,
            *args,
            sigmas=sigmas,
            progress=stamps,
            guidance=3.0,
            method="euler",
            graphs=graphs,
        )
        return out, stamps.step

    def ours(args: tuple, graphs: bool | None = None) -> Way:
        return Way(partial(run, args, graphs))

    def peer(given, sizes, states, seeds) -> Way:
        return Way(theirs.guided(library(), given, sizes, states, seeds, sigmas, 3.0, CONDITION_TIME))

    for name, samples in cases.items():
        latents = []
        for s, pictures in enumerate(samples):
            latents.append([latent(b, *size, 10 * s + k) for k, size in enumerate(pictures)])
        given = [pictures[:-1] for pictures in latents]
        sizes = [tuple(pictures[-1].shape[1:]) for pictures in latents]
        seeds = list(range(len(samples)))
        # Hidden states of both branches: the peer projects them in every step, ours are projected once for a picture.
        wide = dit.config.crossattn_proj_in_channels
        states = []
        for branch in (1, 2):
            states.append([b.randn(text - 2 * s % 5, wide, seed=s + 50 * branch) for s in seeds])
        with torch.no_grad():
            contexts = [[dit.crossattn_proj(f) for f in branch] for branch in states]
        args = given, sizes, *contexts, seeds
        peers = {"diffusers": partial(peer, given, sizes, states, seeds)}
        # Where a recording may pay, both ways stand beside each other; ours is the one that sampling takes.
        patches = 2 * sum(h * w // 256 for pictures in samples for h, w in pictures)
        if b.cuda and patches < 10000:
            recorded = pays_to_record(None, b.device, patches, dit.config.width)
            other = "ours, launch by launch" if recorded else "ours, as a CUDA graph"
            peers[other] = partial(ours, args, graphs=not recorded)
        row = Row(
            what="guided DiT step",
            shape=f"{called(b, 'dit', dit)}, {name}",
            ours=partial(ours, args),
            peers=peers,
            limit=b.limit(1e-1, 1e-4),
            own_clock=True,
        )
        if not all(len(set(pictures)) == 1 for pictures in samples):
            row.what += " (peer resizes)"
            row.note = "the peer knows one size per sample: it reads the other pictures at the target's, results differ"
            row.limit = math.inf
        b.measure(row)


def pictures(b: Bench) -> None:
    """A whole picture, from noise to pixels, the more of them have gone before. Nobody else has this loop for a peer."""
    if b.size == "cpu":
        return
    dit = build(b, dit_config(b)).fuse_for_inference()
    vae = build(b, b.pick(gpu=VAEConfig(), cpu=None, smoke=VAEConfig(base_dim=8)), torch.float32)
    vae = vae.to(memory_format=torch.channels_last)
    c = dit.config
    steps = b.pick(gpu=35, cpu=0, smoke=2)
    side = b.pick(gpu=480, cpu=0, smoke=32)
    size = side // 8, side // 8
    for before in (0, 1, 2, 4, 8):
        # A caption for each picture, and each picture's own tokens, which the language model has read.
        text = b.pick(gpu=128 + 400 * before, cpu=0, smoke=5 + before)
        clean = [latent(b, side, side, k) for k in range(before)]
        contexts = [b.randn(n, c.context_width, seed=k) for k, n in enumerate((text, text - 3))]

        def paint(clean=clean, contexts=contexts) -> Tensor:
            positive, negative = contexts
            z = denoise(
                dit,
                [clean],
                [size],
                [positive],
                [negative],
                [0],
                sigmas=shift_schedule(2 if b.compiling else steps),
                guidance=3.0,
                graphs=None,
            )
            return vae.decode_latents(z[0][None])[0]

        def ours(call=paint) -> Way:
            return Way(call)

        b.measure(Row(
            what="a picture from noise to pixels",
            shape=f"{called(b, 'dit', dit)}, {side} px, {steps} steps, {before} before it",
            ours=ours,
            peers={},
            limit=math.inf,
        ))  # fmt: skip


def vision(b: Bench) -> None:
    grids = b.pick(gpu=[[(74, 74)], [(34, 34)] * 4], cpu=[[(36, 36)]], smoke=[[(8, 12), (4, 6)]])
    mllm = build(b, mllm_config(b, layers=FEWEST))
    c = mllm.config.vision
    library = theirs.once(partial(theirs.transformers_mllm, mllm))

    def pooled(out):
        return out.pooler_output

    def ours(pixels: Tensor, grid: list) -> Way:
        return Way(partial(mllm.visual, pixels, grid))

    def peer(pixels: Tensor, grid: list) -> Way:
        thw = torch.tensor([[1, h, w] for h, w in grid], device=b.device)
        return Way(partial(library().model.visual, pixels, grid_thw=thw), pooled)

    for grid in grids:
        patches = sum(h * w for h, w in grid)
        pixels = b.randn(patches, c.in_channels * c.temporal_patch_size * c.patch_size**2)
        sizes = ", ".join(f"{h}x{w}" for h, w in grid)
        b.measure(Row(
            what="vision tower",
            shape=f"{called(b, 'mllm', mllm.visual)}, patches {sizes}",
            ours=partial(ours, pixels, grid),
            peers={"transformers": partial(peer, pixels, grid)},
            limit=b.limit(1e-1, 1e-4),
        ))  # fmt: skip


def autoencoder(b: Bench) -> None:
    config = b.pick(gpu=VAEConfig(), cpu=VAEConfig(), smoke=VAEConfig(base_dim=8))
    vae = build(b, config, torch.float32).to(memory_format=torch.channels_last)
    library = theirs.once(partial(theirs.diffusers_vae, vae))

    # The mean of the posterior, not a sample: the peer draws other noise.
    def there_and_back(x: Tensor) -> Tensor:
        mean, _ = vae.encode(x)
        return vae.decode(mean).clamp(-1, 1)

    def ours(x: Tensor) -> Way:
        return Way(partial(there_and_back, x))

    def peer(x: Tensor) -> Way:
        return Way(theirs.there_and_back(library(), x))

    for size in b.pick(gpu=(480, 1024), cpu=(128,), smoke=(32,)):
        x = b.randn(1, 3, size, size).float().clamp(-1, 1)
        b.measure(Row(
            what="VAE, there and back",
            shape=f"{size_of(vae)}, {size} px, fp32",
            ours=partial(ours, x),
            peers={"diffusers": partial(peer, x)},
            limit=b.limit(1e-2, 1e-4),
        ))  # fmt: skip


def document(b: Bench) -> None:
    """A miniature, the bundled one, writes and paints an answer; the peer is the same loop over transformers and diffusers."""
    from pipeline import DuoGen

    duo = DuoGen.from_pretrained(b.parts.get("ckpt"), device=b.device)
    prompt = "How do I draw a red house with a blue door?"
    short = {"steps": 2, "max_images": 1} if b.size == "smoke" else {}
    settings = duo.settings(**short)
    shape = f"{settings.steps} steps a picture, fp32"
    if "ckpt" in b.parts:
        shape = f"{b.parts['ckpt']}, {shape}"

    def run():
        answer = duo.generate(prompt, settings)
        return theirs.as_tensors(answer.text, [p.image for p in answer.pictures])

    def ours() -> Way:
        return Way(run)

    def peer() -> Way:
        return Way(theirs.document(duo, prompt, settings))

    b.measure(Row(
        what="a document of the miniature",
        shape=shape,
        ours=ours,
        peers={"transformers + diffusers": peer},
        limit=5e-3,  # of the pixels, from 0 to 255
    ))  # fmt: skip


GROUPS: dict[str, Callable[[Bench], None]] = {
    "ceilings": ceilings,
    "decode": decode,
    "guided": guided,
    "mixed": mixed,
    "pictures": pictures,
    "vision": vision,
    "document": document,
    "vae": autoencoder,
}
