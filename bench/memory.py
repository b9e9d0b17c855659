"""Memory as measured beside memory as planned: tools/fit.py says what sampling takes, tools/plan.py what training takes.

A ratio above 1: the plan allowed for more than was needed. Weights are left out on both sides, since they are no surprise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from bench.measure import Bench, peak, reason
from bench.system import build, called, dit_config, latent, mllm_config
from data import Document, pack_documents
from flow import CONDITION_TIME, FlowLoss, Samples, denoise, shift_schedule
from model import LanguageModel
from tools import fit, plan
from training import LanguageLoss, encode_pictures, mllm_features
from vae import VAEConfig


def memory(b: Bench) -> None:
    if b.size == "cpu" or b.compiling:
        return
    sampling(b)
    training(b)


def beside_plan(b: Bench, what: str, shape: str, step: Callable, planned: Callable[[], int]) -> None:
    """One line of the file: the most bytes of a step, and what they were planned to be."""
    if b.passed(what, shape):
        return
    record = b.record(what, shape)
    try:
        own = peak(step, b.device)
        said = planned()
        record["bytes"] = own
        record["peers"] = {"plan": {"bytes": said, "ratio": said / own}}
    except Exception as e:
        record["failed"] = reason(e)
    b.write(record)
    if "failed" in record:
        b.end_if_broken()


# ---------------------------------------------------------------------------------------------------------------- sampling


def sampling(b: Bench) -> None:
    """The last picture of a dialogue is painted, and brought to pixels."""
    side = b.pick(gpu=480, cpu=0, smoke=32)
    pictures = b.pick(gpu=5, cpu=0, smoke=2)
    text = b.pick(gpu=2048, cpu=0, smoke=12)
    config = dit_config(b)
    dit = build(b, config).fuse_for_inference()
    size = side // 8, side // 8
    clean = [latent(b, side, side, k) for k in range(pictures - 1)]
    context = b.randn(text, config.context_width)

    def paint():
        sigmas = shift_schedule(3)
        denoise(dit, [clean], [size], [context], [context], [0], sigmas=sigmas, guidance=2.0)

    fake = plan.pretend_part(config, b.dtype)
    said = partial(fit.painting_bytes, fake, size, 1, pictures, 2, text, 3)
    beside_plan(b, "memory of painting", f"{called(b, 'dit', dit)}, {side} px, 1 + {pictures - 1}", paint, said)

    config = b.pick(gpu=VAEConfig(), cpu=None, smoke=VAEConfig(base_dim=8))
    vae = build(b, config, torch.float32).to(memory_format=torch.channels_last)
    x = b.randn(1, 3, side, side).float()

    @torch.no_grad()
    def there_and_back():
        vae.decode_latents(vae.encode_latents(x))

    said = partial(fit.vae_bytes, plan.pretend_part(config), (side, side))
    beside_plan(b, "memory of the VAE", f"{side} px there and back", there_and_back, said)


# ---------------------------------------------------------------------------------------------------------------- training


def training(b: Bench) -> None:
    """Forward and backward pass of both stages, without the optimizer: activations, casts and gradients."""
    text = b.pick(gpu=2048, cpu=0, smoke=20)
    config = mllm_config(b, layers=b.pick(gpu=8, cpu=None, smoke=None))
    mllm = build(b, config, torch.float32)
    documents = [plan.pretend_document(config, text, [], text // 2)]

    said = partial(planned, b, {"mllm": plan.pretend_part(config)}, documents, [])
    what = "memory of a training step, stage 1"
    step = partial(language_step, b, mllm, documents)
    beside_plan(b, what, f"{called(b, 'mllm', mllm)}, {config.num_hidden_layers} layers, {text} tokens", step, said)
    del mllm, step

    # A document of pictures, of which the last is learned.
    text = b.pick(gpu=512, cpu=0, smoke=12)
    pictures = b.pick(gpu=5, cpu=0, smoke=2)
    side = b.pick(gpu=480, cpu=0, smoke=32)
    grid = b.pick(gpu=(34, 34), cpu=None, smoke=(4, 4))
    config = mllm_config(b)
    kinds = {
        "mllm": (config, b.dtype),
        "dit": (dit_config(b), torch.float32),
        "vae": (b.pick(gpu=VAEConfig(), cpu=None, smoke=VAEConfig(base_dim=8)), torch.float32),
    }
    documents = [plan.pretend_document(config, text, [grid] * pictures, text // 2, [side] * pictures)]
    samples = [(0, pictures, len(documents[0]))]
    real = {}
    fake = {}
    for name, (c, dtype) in kinds.items():
        learns = name == "dit"
        real[name] = build(b, c, dtype).requires_grad_(learns)
        fake[name] = plan.pretend_part(c, dtype).requires_grad_(learns)
    real["vae"] = real["vae"].to(memory_format=torch.channels_last)
    said = partial(planned, b, fake, documents, samples)
    names = called(b, "mllm", real["mllm"]), called(b, "dit", real["dit"])
    shape = f"{names[0]} reads, {names[1]} learns, {side} px, 1 + {pictures - 1}"
    step = partial(flow_step, b, real, [filled(d) for d in documents], samples)
    beside_plan(b, "memory of a training step, stage 2", shape, step, said)


def planned(b: Bench, modules: dict, documents: list[Document], samples: list) -> int:
    return plan.tally_step(modules, documents, samples, b.dtype).top


def filled(document: Document) -> Document:
    """The same document with bytes in its pictures."""
    pictures = [torch.zeros(p.shape) for p in document.pictures]
    return replace(document, pixels=torch.zeros(document.pixels.shape), pictures=pictures)


def language_step(b: Bench, mllm: LanguageModel, documents: list[Document]) -> None:
    with torch.autocast(b.device.type, torch.bfloat16, enabled=b.cuda):
        loss, _ = LanguageLoss(mllm)(pack_documents(documents).to(b.device))
    loss.backward()


def flow_step(b: Bench, modules: dict, documents: list[Document], samples: list[tuple[int, int, int]]) -> None:
    """As plan.run_step does it, on this device."""
    with torch.autocast(b.device.type, torch.bfloat16, enabled=b.cuda):
        states, first = mllm_features(documents, modules["mllm"], b.device)
        latents = encode_pictures(documents, modules["vae"], b.device)
        rows = [range(first[d], first[d] + tokens) for d, _, tokens in samples]
        seen = [latents[d][:n] for d, n, _ in samples]
        drawn = Samples(states, rows, seen, [n - 1 for _, n, _ in samples])
        error, _ = FlowLoss(modules["dit"], CONDITION_TIME)(drawn, torch.rand(len(samples)), torch.Generator())
    error.sum().backward()


GROUPS = {"memory": memory}
