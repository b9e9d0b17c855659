"""What measure.py holds this repository against: PyTorch's attention in all its forms, transformers, diffusers.

transformers and diffusers are imported in the functions that need them: without them those rows say so. Their models share the
weights of ours. Where a peer would pad, it gets padded tensors from the start, and what its own loop would add (512 padded text
tokens, the bookkeeping of `generate`) is left out: what remains is the same task.
"""

from __future__ import annotations

import inspect
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from connector import features
from dit import patchify, unpatchify
from flow import sample_flow, shift_schedule

# ---------------------------------------------------------------------------------------------------------------- attention


class Layout(NamedTuple):
    """into(x (N, H, D), lengths) -> what the peer computes on; back: its inverse."""

    into: Callable
    back: Callable


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """(N, H, D) -> (S, H, L, D), zeros behind each sequence."""
    return nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)


PACKED = Layout(lambda x, n: x, lambda x, n: x)
DENSE = Layout(lambda x, n: x.unflatten(0, (len(n), -1)).transpose(1, 2), lambda x, n: x.transpose(1, 2).flatten(0, 1))
PADDED = Layout(_pad, lambda x, n: torch.cat([o[:, :m].transpose(0, 1) for o, m in zip(x, n, strict=True)]))
ONE = Layout(lambda x, n: x.transpose(0, 1)[None], lambda x, n: x[0].transpose(0, 1))  # the pack as one sequence


def attention_peers(case, sq, sk, device: torch.device, flex: bool = False) -> dict[str, Callable]:
    """name -> function that returns (layout, call(q, k, v)); building may raise where the peer does not exist."""
    cuda, gqa = device.type == "cuda", case.heads != case.kv_heads
    causal = case.causal and case.lq == case.lk
    options = {"is_causal": causal, "enable_gqa": gqa}

    def sdpa(backend):
        def call(q, k, v):
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, **options)

        return lambda: (DENSE, call)

    def padded():
        real = nn.utils.rnn.pad_sequence([torch.ones(n, dtype=torch.bool, device=device) for n in case.lk], batch_first=True)
        mask = None if causal else real[:, None, None]  # padding stands behind, where a causal query never looks
        return PADDED, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, mask, **options)

    def per_sequence(q, k, v):
        parts = zip(q.split(case.lq), k.split(case.lk), v.split(case.lk), strict=True)
        out = (F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in part), **options) for part in parts)
        return torch.cat([o[0].transpose(0, 1) for o in out])

    def varlen():
        from torch.nn.attention.varlen import varlen_attn

        known, extra = inspect.signature(varlen_attn).parameters, {}
        if causal:
            extra |= {"window_size": (-1, 0)} if "window_size" in known else {"is_causal": True}
        if gqa and "enable_gqa" in known:
            extra["enable_gqa"] = True

        def call(q, k, v):
            if gqa and "enable_gqa" not in known:
                k, v = (x.repeat_interleave(case.heads // case.kv_heads, 1) for x in (k, v))
            return varlen_attn(q, k, v, sq.cu, sk.cu, sq.longest, sk.longest, **extra)

        return PACKED, call

    def cudnn_varlen(q, k, v):
        grads = torch.is_grad_enabled() and q.requires_grad
        sides = None, sq.cu, sk.cu, sq.longest, sk.longest
        return torch.ops.aten._cudnn_attention_forward(q, k, v, *sides, grads, 0.0, causal, False)[0]

    def flexible():
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        of_q, of_k = (
            torch.arange(len(n), device=device).repeat_interleave(torch.tensor(n, device=device)) for n in (case.lq, case.lk)
        )
        mask = create_block_mask(lambda b, h, i, j: of_q[i] == of_k[j], None, None, sq.total, sk.total, device=device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return ONE, lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=gqa)

    peers = {}
    if len(set(case.lq)) == 1 and len(set(case.lk)) == 1:
        peers["SDPA"] = lambda: (DENSE, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options))
        if cuda:
            peers["SDPA cuDNN"] = sdpa(SDPBackend.CUDNN_ATTENTION)
            peers["SDPA flash"] = sdpa(SDPBackend.FLASH_ATTENTION)
            peers["SDPA efficient"] = sdpa(SDPBackend.EFFICIENT_ATTENTION)
    else:
        peers |= {"padded SDPA": padded, "SDPA per sequence": lambda: (PACKED, per_sequence)}
    if cuda:
        peers |= {"varlen_attn": varlen, "cuDNN varlen": lambda: (PACKED, cudnn_varlen)}
    if flex:
        peers["compiled flex"] = flexible
    return peers


def prepared(pair: tuple[Layout, Callable], q: Tensor, k: Tensor, v: Tensor, case):
    """A peer's forward pass on tensors in its own layout, and the way back."""
    layout, call = pair
    xs = layout.into(q, case.lq), layout.into(k, case.lk), layout.into(v, case.lk)
    return lambda: call(*xs), lambda o: layout.back(o, case.lq)


# -------------------------------------------------------------------------------------------- fused steps, as others write them


def _up(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def add_rms_norm(x, delta, weight):
    x = x + delta
    f = _up(x)
    return x, weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def norm_rope(x, weight, cos, sin):
    f = _up(x)
    n = f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + 1e-6) * _up(weight)
    a, b = n.chunk(2, -1)
    return (n * cos + torch.cat((b, a), -1) * sin).to(x.dtype)  # the sign of the rotation is in sin


def gate_add_modulate(x, gate, y, shift, scale):
    x = x + gate.to(x.dtype) * y.view_as(x)
    h = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x, (h * scale.to(x.dtype) + shift.to(x.dtype)).flatten(0, 1)


def swiglu(x):
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


# -------------------------------------------------------------------------------------------------------------- the libraries


def once(make: Callable) -> Callable:
    """make() at the first call, its result at every one. An error is raised again each time."""
    kept = []

    def get():
        if not kept:
            kept.append(make())
        return kept[0]

    return get


def transformers_mllm(mllm: nn.Module):
    """transformers' model on the weights of ours, which are stored once."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    def name(n: str) -> str:
        part, _, rest = n.partition(".")
        return {"visual": "model.visual", "model": "model.language_model"}.get(part, part) + "." + rest

    weight = mllm.model.norm.weight
    with torch.device(weight.device):
        theirs = Qwen2_5_VLForConditionalGeneration._from_config(Qwen2_5_VLConfig(**mllm.config.to_json()), dtype=weight.dtype)
    theirs.load_state_dict({name(n): t for n, t in mllm.state_dict().items()}, assign=True)
    return theirs.eval().requires_grad_(weight.requires_grad)


def diffusers_dit(dit: nn.Module):
    from types import SimpleNamespace

    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):  # torchvision resizes its padding mask; zeros stay zeros at any size
        functional = SimpleNamespace(resize=lambda x, size, interpolation: x.new_zeros(*x.shape[:-2], *size))
        modes = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    options = {k: v for k, v in dit.config.to_json().items() if not k.startswith("_")}
    weight = dit.proj_out.weight
    with torch.device(weight.device):
        theirs = CosmosTransformer3DModel(**options).to(weight.dtype)
    theirs.load_state_dict(dit.state_dict(), assign=True)
    for block in theirs.transformer_blocks:  # its config has no field for this eps
        for part in (block.attn1, block.attn2):
            part.norm_q.eps = part.norm_k.eps = dit.config.qk_norm_eps
    return theirs.eval().requires_grad_(weight.requires_grad)


def diffusers_vae(vae: nn.Module):
    from diffusers import AutoencoderKLWan

    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        return AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32).to(vae.quant_conv.weight.device).eval()


def there_and_back(theirs, x: Tensor) -> Callable:
    return lambda: theirs.decode(theirs.encode(x[:, :, None]).latent_dist.mode()).sample[:, :, 0]


def _wait(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tokens(step: Callable[[int], Tensor], places: range, device: torch.device) -> tuple[Tensor, float]:
    """Logits of every place, each token chosen as greedy decoding does, though the given one is read: (logits, s per token)."""
    out, began = [], _wait(device)
    for i in places:
        logits = step(i)
        int(logits.argmax())  # the host must know the token before it can go on
        out.append(logits)
    return torch.stack(out), (_wait(device) - began) / len(places)


def decode(theirs, ids: Tensor, prompt: int, new: int) -> Callable:
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.get_text_config())
    where = torch.arange(len(ids), device=ids.device).expand(3, 1, -1)
    theirs.model(input_ids=ids[None, :prompt], position_ids=where[..., :prompt], past_key_values=cache, use_cache=True)

    def step(i):
        here = {"input_ids": ids[None, i : i + 1], "position_ids": where[..., i : i + 1]}
        return theirs(**here, past_key_values=cache, use_cache=True).logits[0, -1]

    def run():
        if extra := cache.get_seq_length() - prompt:
            cache.crop(-extra)
        return tokens(step, range(prompt, prompt + new), ids.device)

    return run


class Stamps:
    """Called after every step: `step` is the seconds of one, without the first, which also prepares the picture."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def __call__(self, *_) -> None:
        self.times.append(_wait(self.device))

    @property
    def step(self) -> float:
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def velocity(theirs, x: list[Tensor], times: list[float], states: Tensor) -> Tensor:
    """One call of diffusers' DiT on one sample: pictures (C, h, w), the last one noisy -> its velocity (C, h, w)."""
    dtype = states.dtype
    frames = torch.stack([F.interpolate(z[None], x[-1].shape[1:])[0] for z in x], 1)[None]                 # (1, C, T, h, w)
    given = torch.zeros_like(frames[:, :1])
    given[:, :, :-1] = 1
    t = torch.tensor(times, device=states.device)
    t = t.view(1, 1, -1, 1, 1) if len(times) > 1 else t
    padding = given.new_zeros(1, 1, *(8 * side for side in frames.shape[-2:]))
    v = theirs(frames.to(dtype), t, states[None], condition_mask=given.to(dtype), padding_mask=padding.to(dtype)).sample
    return v[0, :, -1].float()


def guided(theirs, given, sizes, states, seeds, sigmas: Tensor, scale: float, condition_time: float) -> Callable:
    """diffusers' loop for each sample by itself, two forward passes a step: (latents, seconds of a step of all samples)."""
    device = states[0][0].device

    def run():
        out, seconds = [], 0.0
        for s, seed in enumerate(seeds):
            x = torch.randn(16, *sizes[s], generator=torch.Generator().manual_seed(seed)).to(device)
            stamps, branches = Stamps(device), (states[1][s], states[0][s])

            def step(x, t, s=s, branches=branches):
                times = [condition_time] * len(given[s]) + [t]
                negative, positive = (velocity(theirs, [*given[s], x], times, h) for h in branches)
                return torch.lerp(negative, positive, scale)

            out.append(sample_flow(step, x, sigmas, "euler", stamps))
            seconds += stamps.step
        return out, seconds

    return run


def train(device: torch.device, module: nn.Module, loss: Callable, watched: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of one weight; on a GPU under bf16 autocast, as the training scripts do."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = loss()
    value.backward()
    gradient = watched.grad.clone()
    module.zero_grad(set_to_none=True)
    return value.detach(), gradient


def language_step(mllm, ids: list[Tensor], device: torch.device) -> Callable:
    theirs = transformers_mllm(mllm)
    pad = lambda xs, value: nn.utils.rnn.pad_sequence(xs, batch_first=True, padding_value=value)  # noqa: E731
    batch = {"input_ids": pad(ids, 0), "labels": pad(ids, -100), "attention_mask": pad([torch.ones_like(x) for x in ids], 0)}
    batch["position_ids"] = torch.arange(max(map(len, ids)), device=device).expand(3, len(ids), -1)
    watched = theirs.model.language_model.layers[0].mlp.down_proj.weight
    return lambda: train(device, theirs, lambda: theirs(**batch, use_cache=False).loss, watched)


def flow_step(mllm, dit, ids, latents, clean, t: Tensor, condition_time: float, seed: int) -> Callable:
    """Stage 2 with the libraries: each sample's hidden states from transformers, its velocity from diffusers."""
    reader, painter = transformers_mllm(mllm), diffusers_dit(dit)
    device, sizes = ids[0].device, [[z.shape[1] * z.shape[2] // 4 for z in pictures] for pictures in latents]

    def loss():
        eps = torch.randn(sum(map(sum, sizes)), 64, generator=torch.Generator().manual_seed(seed)).to(device)
        noise = iter(eps.split([n for sample in sizes for n in sample]))
        total, count = 0.0, 0
        for s, pictures in enumerate(latents):
            with torch.no_grad():
                hidden = reader.model(input_ids=ids[s][None], output_hidden_states=True, use_cache=False).hidden_states[1:]
                states = features([h[0] for h in hidden])
            own, target = [next(noise) for _ in pictures][-1], pictures[-1]
            own = unpatchify(own, (target.shape[1] // 2, target.shape[2] // 2))
            x = (1 - t[s].item()) * target + t[s].item() * own
            v = velocity(painter, [*pictures[:-1], x], [condition_time] * clean[s] + [t[s].item()], states)
            error = (patchify(v) - patchify(own - target)).square().mean(1)
            total, count = total + error.sum(), count + len(error)
        return total / count

    return lambda: train(device, painter, loss, painter.transformer_blocks[0].ff.net[2].weight)


# ------------------------------------------------------------------------------------------------------------- one document


def as_tensors(text: str, pictures: list) -> tuple[Tensor, ...]:
    import numpy as np

    return torch.tensor([*text.encode()], dtype=torch.float32), *(torch.from_numpy(np.array(p)).float() for p in pictures)


def document(duo, prompt: str, settings) -> Callable:
    """DuoGen's loop, greedy and with the same noise, over the libraries' models; pictures and tokens must come out the same."""
    from transformers import DynamicCache

    from model import mrope_positions
    from pipeline import SIDE, derive, read_dialogue
    from tokenizer import render
    from vae import to_image, to_tensor

    mllm, dit, vae = transformers_mllm(duo.mllm), diffusers_dit(duo.dit), diffusers_vae(duo.vae)
    tokenizer, processor, device = duo.tokenizer, duo.processor, duo.device
    c = duo.vae.config
    mean, std = (torch.tensor(x, device=device)[:, None, None] for x in (c.latents_mean, c.latents_std))
    rendered = render(tokenizer, read_dialogue(prompt), [], generation_prompt=True, default_system=settings.system)
    size = settings.height or duo.size[0], settings.width or duo.size[1]

    def run():
        cache, rows, position, chunk = DynamicCache(config=mllm.config.get_text_config()), [], 0, rendered.system_end
        unread, pixels, grid, text, latents, pictures = rendered.ids, None, None, [[]], [], []
        while True:
            where, after = mrope_positions(unread, [] if grid is None else [processor.merged(grid)], tokenizer.image_pad)
            extra = {}
            if grid is not None:
                extra = {"pixel_values": pixels.to(device), "image_grid_thw": torch.tensor([[1, *grid]], device=device)}
            out = mllm(
                input_ids=torch.tensor([unread], device=device), position_ids=(where + position)[:, None].to(device),
                past_key_values=cache, use_cache=True, output_hidden_states=True, **extra,
            )  # fmt: skip
            position += after
            rows.append(features([h[0] for h in out.hidden_states[1:]]))
            token = duo.choose(out.logits[0, -1], settings, None)
            full = len(pictures) == settings.max_images and token == tokenizer.vision_start
            if token in (tokenizer.im_end, tokenizer.endoftext) or full:
                return as_tensors("\n".join(tokenizer.decode(part).strip() for part in text if part), pictures)
            unread, pixels, grid = [token], None, None
            if token != tokenizer.vision_start:
                text[-1].append(token)
                continue
            states = torch.cat(rows)
            generator = torch.Generator().manual_seed(derive(settings.seed, 0, len(pictures)))

            def noise(shape=(16, size[0] // 8, size[1] // 8), generator=generator):
                return torch.randn(shape, generator=generator).to(device)

            def step(x, t, branches=(states[:chunk], states)):
                times = [settings.condition_time] * len(latents) + [t]
                negative, positive = (velocity(dit, [*latents, x], times, h) for h in branches)
                return torch.lerp(negative, positive, settings.scale)

            sigmas = shift_schedule(settings.steps, settings.shift)
            z = sample_flow(step, noise(), sigmas, settings.sampler, eta=settings.eta, noise=noise)
            image = to_image(vae.decode((z * std + mean)[None, :, None]).sample[0, :, 0])
            pictures.append(image)
            text.append([])
            shown = to_tensor(image, SIDE, settings.max_area).to(device)
            latents.append((vae.encode(shown[None, :, None]).latent_dist.mode()[0, :, 0] - mean) / std)
            pixels, grid = processor(image)
            h, w = processor.merged(grid)
            unread = [token, *[tokenizer.image_pad] * (h * w), tokenizer.vision_end]
            chunk = len(states) + len(unread)

    return run
