"""What the models are held against: transformers and diffusers.

They are imported in the functions that need them: without them those rows say so. Their models share the weights of ours.
Where a peer would pad, it gets padded tensors from the start, and what its own loop would add (512 padded text tokens, the
bookkeeping of `generate`) is left out: what remains is the same task.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from connector import Connector, features
from dit import patchify, unpatchify
from flow import noise_like
from flow import sample_flow, shift_schedule

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
    """transformers' model of the same family on the weights of ours, which are stored once."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folders = {"visual": "model.visual", "model": "model.language_model"}

    def their_name(name: str) -> str:
        part, _, rest = name.partition(".")
        return f"{folders.get(part, part)}.{rest}"

    weight = mllm.model.norm.weight
    config = AutoConfig.for_model(**mllm.config.to_json())
    with torch.device(weight.device):
        theirs = AutoModelForImageTextToText.from_config(config, dtype=weight.dtype)
    # assign: their parameters become ours, and nothing is copied.
    renamed = {their_name(name): tensor for name, tensor in mllm.state_dict().items()}
    theirs.load_state_dict(renamed, assign=True)
    # Where embeddings and the last layer are one matrix, assigning has made two parameters of it.
    theirs.tie_weights()
    return theirs.eval().requires_grad_(weight.requires_grad)


def _zeros_of_size(x: Tensor, size, interpolation) -> Tensor:
    """What torchvision's resize makes of the padding mask, which is zero: zeros stay zeros at any size."""
    return x.new_zeros(*x.shape[:-2], *size)


def diffusers_dit(dit: nn.Module):
    """diffusers' model of the same family on the weights of ours."""
    config = dit.config.to_json()
    make, _ = PAINTERS[config["_class_name"]]
    options = {key: value for key, value in config.items() if not key.startswith("_")}
    weight = dit.proj_out.weight
    with torch.device(weight.device):
        theirs = make(dit, options)
    return theirs.eval().requires_grad_(weight.requires_grad)


def diffusers_cosmos(dit: nn.Module, options: dict):
    """It asks torchvision for one function, which need not be installed for that."""
    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        functional = SimpleNamespace(resize=_zeros_of_size)
        modes = SimpleNamespace(NEAREST="nearest")
        transformer_cosmos.transforms = SimpleNamespace(functional=functional, InterpolationMode=modes)
    theirs = CosmosTransformer3DModel(**options)
    theirs.load_state_dict(dit.state_dict(), assign=True)
    # Its config has no field for this eps.
    for block in theirs.transformer_blocks:
        for part in (block.attn1, block.attn2):
            part.norm_q.eps = dit.config.qk_norm_eps
            part.norm_k.eps = dit.config.qk_norm_eps
    return theirs


def diffusers_wan(dit: nn.Module, options: dict):
    """With the connector in the place of its text embedder, as in ours."""
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(**options)
    place = "condition_embedder.text_embedder"
    theirs.set_submodule(place, Connector(dit.config.crossattn_proj_in_channels, dit.config.width))
    renamed = {name.replace("crossattn_proj", place): tensor for name, tensor in dit.state_dict().items()}
    theirs.load_state_dict(renamed, assign=True)
    return theirs


def diffusers_vae(vae: nn.Module):
    from diffusers import AutoencoderKLWan

    # By way of a folder: theirs are 3-D kernels, of which ours are a slice.
    with tempfile.TemporaryDirectory() as folder:
        vae.save_pretrained(folder)
        theirs = AutoencoderKLWan.from_pretrained(folder, torch_dtype=torch.float32)
    return theirs.to(vae.quant_conv.weight.device).eval()


def there_and_back(theirs, x: Tensor) -> Callable:
    def run() -> Tensor:
        z = theirs.encode(x[:, :, None]).latent_dist.mode()
        return theirs.decode(z).sample[:, :, 0]

    return run


def _wait(device: torch.device) -> float:
    # A GPU works behind the host: a clock that is read without waiting measures only how fast work is queued.
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def tokens(step: Callable[[int], Tensor], places: range, device: torch.device) -> tuple[Tensor, float]:
    """Logits of every place, each token chosen as greedy decoding does, though the given one is read: (logits, s per token).

    The median of all tokens: the first ones compile kernels or record a graph.
    """
    out = []
    stamps = [_wait(device)]
    for i in places:
        logits = step(i)
        int(logits.argmax())  # the host must know the token before it can go on, and waits for it
        out.append(logits)
        stamps.append(time.perf_counter())
    return torch.stack(out), statistics.median(b - a for a, b in pairwise(stamps))


def decode(theirs, ids: Tensor, prompt: int, new: int) -> Callable:
    from transformers import DynamicCache

    cache = DynamicCache(config=theirs.config.get_text_config())
    where = torch.arange(len(ids), device=ids.device).expand(3, 1, -1)
    theirs.model(
        input_ids=ids[None, :prompt],
        position_ids=where[..., :prompt],
        past_key_values=cache,
        use_cache=True,
    )

    def step(i):
        out = theirs(
            input_ids=ids[None, i : i + 1],
            position_ids=where[..., i : i + 1],
            past_key_values=cache,
            use_cache=True,
        )
        return out.logits[0, -1]

    def run():
        # Back to the prompt: each run writes the same tokens behind it.
        if extra := cache.get_seq_length() - prompt:
            cache.crop(-extra)
        return tokens(step, range(prompt, prompt + new), ids.device)

    return run


class Stamps:
    """Called after every step: `step` is the seconds of one, the median of all but the first, which also prepares the picture.

    Where a graph is recorded, the second step is the one that records it; in a mean of few steps it would count for too much.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.times = []

    def __call__(self, *_) -> None:
        self.times.append(_wait(self.device))

    @property
    def step(self) -> float:
        return statistics.median(b - a for a, b in pairwise(self.times))


def velocity(theirs, x: list[Tensor], times: list[float], states: Tensor) -> Tensor:
    """One call of diffusers' painter on one sample: pictures (C, h, w), the last one noisy -> its velocity (C, h, w)."""
    # It has one size for all pictures: that of the noisy one.
    resized = [F.interpolate(z[None], x[-1].shape[1:])[0] for z in x]
    frames = torch.stack(resized, 1)[None]                                                                # (1, C, T, h, w)
    t = torch.tensor(times, device=states.device)                                                         # (T,)
    _, call = PAINTERS[type(theirs).__name__]
    return call(theirs, frames, t, states[None])[0, :, -1].float()


def velocity_of_cosmos(theirs, frames: Tensor, t: Tensor, states: Tensor) -> Tensor:
    dtype = states.dtype
    given = torch.zeros_like(frames[:, :1])
    given[:, :, :-1] = 1
    # A time for each picture; that of a single one goes in as it is.
    if len(t) > 1:
        t = t.view(1, 1, -1, 1, 1)
    # Of the size of the picture in pixels, which it resizes to that of the latents.
    height, width = frames.shape[-2:]
    padding = given.new_zeros(1, 1, 8 * height, 8 * width)
    out = theirs(
        frames.to(dtype),
        t,
        states,
        condition_mask=given.to(dtype),
        padding_mask=padding.to(dtype),
    )
    return out.sample


def velocity_of_wan(theirs, frames: Tensor, t: Tensor, states: Tensor) -> Tensor:
    # Its times count to 1000. A time for each patch, where the pictures have times of their own.
    t = 1000 * t
    if len(t) > 1:
        patches = frames.shape[3] * frames.shape[4] // 4
        t = t.repeat_interleave(patches)[None]                                                            # (1, T h w / 4)
    return theirs(frames.to(states.dtype), t, states).sample


# Of each family: what makes diffusers' model, and a call of it.
PAINTERS = {
    "CosmosTransformer3DModel": (diffusers_cosmos, velocity_of_cosmos),
    "WanTransformer3DModel": (diffusers_wan, velocity_of_wan),
}


def guided(theirs, given, sizes, states, seeds, sigmas: Tensor, scale: float, condition_time: float) -> Callable:
    """diffusers' loop for each sample by itself, two forward passes a step: (latents, seconds of a step of all samples)."""
    device = states[0][0].device

    def run():
        out = []
        seconds = 0.0
        for s, seed in enumerate(seeds):

            def step(x, t, s=s):
                pictures = [*given[s], x]
                times = [condition_time] * len(given[s]) + [t]
                negative = velocity(theirs, pictures, times, states[1][s])
                positive = velocity(theirs, pictures, times, states[0][s])
                return torch.lerp(negative, positive, scale)

            # The same noise as ours: drawn on the host, from the sample's own seed.
            generator = torch.Generator().manual_seed(seed)
            x = torch.randn(16, *sizes[s], generator=generator).to(device)
            stamps = Stamps(device)
            out.append(sample_flow(step, x, sigmas, "euler", stamps))
            seconds += stamps.step
        return out, seconds

    return run


def train(device: torch.device, module: nn.Module, loss: Callable, watched: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and the gradient of one weight; on a GPU under bf16 autocast, as the training scripts do."""
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        value = loss()
    value.backward()
    # One weight's gradient, deep in the network, depends on all that lies between it and the loss.
    gradient = watched.grad.clone()
    module.zero_grad(set_to_none=True)
    return value.detach(), gradient


def language_step(mllm, ids: list[Tensor], device: torch.device) -> Callable:
    """Stage 1 with transformers: documents padded to the longest."""
    theirs = transformers_mllm(mllm)
    pad = partial(nn.utils.rnn.pad_sequence, batch_first=True)
    real = [torch.ones_like(x) for x in ids]
    longest = max(map(len, ids))
    batch = {
        "input_ids": pad(ids, padding_value=0),
        "labels": pad(ids, padding_value=-100),
        "attention_mask": pad(real, padding_value=0),
        "position_ids": torch.arange(longest, device=device).expand(3, len(ids), -1),
    }

    def loss() -> Tensor:
        return theirs(**batch, use_cache=False).loss

    watched = theirs.model.language_model.layers[0].mlp.down_proj.weight
    return partial(train, device, theirs, loss, watched)


def flow_step(mllm, dit, ids, latents, clean, t: Tensor, condition_time: float, seed: int, watched: str) -> Callable:
    """Stage 2 with the libraries: each sample's hidden states from transformers, its velocity from diffusers."""
    reader = transformers_mllm(mllm)
    painter = diffusers_dit(dit)
    device = ids[0].device
    patches = []
    for pictures in latents:
        patches.append([z.shape[1] * z.shape[2] // 4 for z in pictures])
    counts = [n for sample in patches for n in sample]

    def loss() -> Tensor:
        # Our noise is drawn for all patches of the pack at once, those of clean pictures among them.
        generator = torch.Generator().manual_seed(seed)
        eps = noise_like(torch.empty(sum(counts), 64, device=device), generator)
        noise = iter(eps.split(counts))
        total = 0.0
        count = 0
        for s, pictures in enumerate(latents):
            with torch.no_grad():
                out = reader.model(input_ids=ids[s][None], output_hidden_states=True, use_cache=False)
                # The first of them are the embeddings, which the connector does not read.
                hidden = out.hidden_states[1:]
                states = features([h[0] for h in hidden])
            # The last picture is the noisy one: x = (1 - t) target + t noise, whose velocity is noise - target.
            target = pictures[-1]
            own = [next(noise) for _ in pictures][-1]
            own = unpatchify(own, (target.shape[1] // 2, target.shape[2] // 2))
            time = t[s].item()
            x = (1 - time) * target + time * own
            times = [condition_time] * clean[s] + [time]
            v = velocity(painter, [*pictures[:-1], x], times, states)
            error = (patchify(v) - patchify(own - target)).square().mean(1)
            total += error.sum()
            count += len(error)
        return total / count

    return partial(train, device, painter, loss, painter.get_parameter(watched))


# ------------------------------------------------------------------------------------------------------------- one document


def as_tensors(text: str, pictures: list) -> tuple[Tensor, ...]:
    import numpy as np

    # Text as its bytes, so that one distance serves for all of an answer.
    letters = torch.tensor([*text.encode()], dtype=torch.float32)
    pixels = [torch.from_numpy(np.array(p)).float() for p in pictures]
    return letters, *pixels


def document(duo, prompt: str, settings) -> Callable:
    """DuoGen's loop, greedy and with the same noise, over the libraries' models; pictures and tokens must come out the same."""
    from transformers import DynamicCache

    from model import mrope_positions
    from pipeline import derive, read_dialogue
    from tokenizer import render
    from vae import to_image, to_tensor

    mllm = transformers_mllm(duo.mllm)
    dit = diffusers_dit(duo.dit)
    vae = diffusers_vae(duo.vae)
    tokenizer = duo.tokenizer
    processor = duo.processor
    device = duo.device
    mean = torch.tensor(duo.vae.config.latents_mean, device=device)[:, None, None]
    std = torch.tensor(duo.vae.config.latents_std, device=device)[:, None, None]
    rendered = render(tokenizer, read_dialogue(prompt), [], generation_prompt=True, default_system=settings.system)
    size = settings.height or duo.size[0], settings.width or duo.size[1]

    def paint(states: Tensor, chunk: int, latents: list[Tensor], number: int):
        """The picture that these hidden states ask for; without those behind `chunk` in the other branch."""
        generator = torch.Generator().manual_seed(derive(settings.seed, 0, number))

        def noise(shape=(16, size[0] // 8, size[1] // 8)) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        def step(x: Tensor, t: float) -> Tensor:
            seen = [*latents, x]
            times = [settings.condition_time] * len(latents) + [t]
            negative = velocity(dit, seen, times, states[:chunk])
            positive = velocity(dit, seen, times, states)
            return torch.lerp(negative, positive, settings.scale)

        sigmas = shift_schedule(settings.steps, settings.shift)
        z = sample_flow(step, noise(), sigmas, settings.sampler, eta=settings.eta, noise=noise)
        # A video of one frame.
        z = (z * std + mean)[None, :, None]
        return to_image(vae.decode(z).sample[0, :, 0])

    def encode(image) -> Tensor:
        """As the DiT reads it beside the next picture."""
        shown = to_tensor(image, duo.patch, settings.max_area).to(device)
        z = vae.encode(shown[None, :, None]).latent_dist.mode()
        return (z[0, :, 0] - mean) / std

    def read(unread: list[int], picture, position: int, cache):
        """Tokens, and what of a picture belongs to them -> logits of the next one, hidden states, positions taken."""
        grids = []
        extra = {}
        if picture is not None:
            pixels, grid = picture
            grids = [processor.merged(grid)]
            extra = {
                "pixel_values": pixels.to(device),
                "image_grid_thw": torch.tensor([[1, *grid]], device=device),
            }
        where, taken = mrope_positions(unread, grids, tokenizer.image_pad)
        out = mllm(
            input_ids=torch.tensor([unread], device=device),
            position_ids=(where + position)[:, None].to(device),
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
            **extra,
        )
        states = features([h[0] for h in out.hidden_states[1:]])
        return out.logits[0, -1], states, taken

    def run() -> tuple[Tensor, ...]:
        cache = DynamicCache(config=mllm.config.get_text_config())
        rows = []
        latents = []
        pictures = []
        text = [[]]
        position = 0
        chunk = rendered.system_end
        unread = rendered.ids
        picture = None
        while True:
            logits, states, taken = read(unread, picture, position, cache)
            position += taken
            rows.append(states)
            token = duo.choose(logits, settings, None)
            # The end of the answer, or the beginning of a picture that is one too many.
            full = len(pictures) == settings.max_images and token == tokenizer.vision_start
            if token in (tokenizer.im_end, tokenizer.endoftext) or full:
                paragraphs = [tokenizer.decode(part).strip() for part in text if part]
                return as_tensors("\n".join(paragraphs), pictures)
            if token != tokenizer.vision_start:
                text[-1].append(token)
                unread = [token]
                picture = None
                continue
            # Paint, then read on with what was painted.
            states = torch.cat(rows)
            image = paint(states, chunk, latents, len(pictures))
            pictures.append(image)
            latents.append(encode(image))
            text.append([])
            picture = processor(image)
            h, w = processor.merged(picture[1])
            unread = [token, *[tokenizer.image_pad] * (h * w), tokenizer.vision_end]
            chunk = len(states) + len(unread)

    return run
