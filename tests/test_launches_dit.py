"""What a guided denoising step costs whatever the machine: launches, reads, floating-point operations and padding."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import kernels
import ops
from dit import DiT, DiTConfig
from flow import denoise, shift_schedule
from launches import Launches

DEPTH = 28  # of the 2B model
# The 2B model's, divided by 16.
WIDTHS = {"num_attention_heads": 2, "attention_head_dim": 64, "adaln_lora_dim": 16, "text_embed_dim": 64}
PROJECTION = 100352 // 16
RAGGED = [[(64, 64)] * 5, [(30, 30)] * 5, [(30, 30)], [(30, 30)] * 4, [(36, 36)], [(45, 45)] * 4]  # 20480, 4500, 900, ...


def build(depth: int = DEPTH, dtype: torch.dtype = torch.float32, **options) -> DiT:
    dit = DiT.from_config(DiTConfig(depth, crossattn_proj_in_channels=PROJECTION, **(WIDTHS | options)))
    return dit.to(dtype).requires_grad_(False).fuse_for_inference()


def paint(dit: DiT, sizes: list[list[tuple[int, int]]], texts: list[int], steps: int, progress=None):
    """Guided; sizes: of each sample's pictures in patches, the last one to be painted; texts: context tokens of each."""
    latents = [[torch.randn(16, 2 * h, 2 * w) for h, w in sample] for sample in sizes]
    contexts = [[torch.randn(n - branch, dit.config.text_embed_dim) for n in texts] for branch in (0, 1)]
    shapes = [tuple(z[-1].shape[1:]) for z in latents]
    options = {"sigmas": shift_schedule(steps), "guidance": 3.0, "progress": progress}
    return denoise(dit, [z[:-1] for z in latents], shapes, *contexts, list(range(len(sizes))), **options)


def diffusers(depth: int, dtype: torch.dtype) -> CosmosTransformer3DModel:
    fixed = {"in_channels": 17, "extra_pos_embed_type": None, "use_crossattn_projection": True}
    shape = WIDTHS | {"encoder_hidden_states_channels": WIDTHS["text_embed_dim"], "crossattn_proj_in_channels": PROJECTION}
    return CosmosTransformer3DModel(num_layers=depth, **fixed, **shape).to(dtype).requires_grad_(False)


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch):
    """diffusers resizes the padding mask by torchvision, which is not installed here."""
    functional = SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size))
    stub = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", stub, raising=False)


@torch.no_grad()
def their_step(theirs, frames: int, h: int, w: int, text: int) -> None:
    """Two forward passes, as diffusers' pipeline makes for guidance; every frame has a time of its own. h, w in patches."""
    x, given = (torch.randn(1, c, frames, 2 * h, 2 * w, dtype=theirs.dtype) for c in (16, 1))
    t, padding = torch.rand(1, 1, frames, 1, 1, dtype=theirs.dtype), torch.zeros(1, 1, 16 * h, 16 * w, dtype=theirs.dtype)
    for _ in range(2):
        context = torch.randn(1, text, theirs.config.crossattn_proj_in_channels, dtype=theirs.dtype)
        theirs(x, t, context, condition_mask=given, padding_mask=padding)


def test_launches_of_a_guided_step(monkeypatch):
    """With the kernels, in 16 bits, at the published depth; diffusers counted the same way. No step waits for the device."""
    monkeypatch.setattr(ops, "_backend", "triton")
    dit, peer, marks = build(dtype=torch.float16), diffusers(DEPTH, torch.bfloat16), []
    with Launches(run_kernels=False) as count:
        paint(dit, [[(2, 3), (2, 2)]], [5], 4, lambda i, n: marks.append((count.total, count.reads)))
    with Launches() as theirs:
        their_step(peer, 2, 2, 2, 5)
    steps = [after - before for (before, _), (after, _) in pairwise(marks)]
    assert max(steps) <= 435
    assert 10 * max(steps) <= theirs.total <= 6000
    assert len({reads for _, reads in marks}) == 1


def flops() -> FlopCounterMode:
    """Of all matrix products; the CPU's fused attention is missing in PyTorch's table."""
    name = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={name: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)})


def test_flops_of_a_guided_step():
    """At 480 pixels, 1 + 4, patches and text divided by 16 too: what the step needs and nothing else; diffusers' beside it."""
    h, w, text, depth, d, marks = 7, 8, 32, 4, 128, []
    dit, peer = build(depth), diffusers(depth, torch.float32)
    with flops() as count:
        paint(dit, [[(h, w)] * 5], [text], 2, lambda i, n: marks.append(count.get_total_flops()))
    with flops() as theirs:
        their_step(peer, 5, h, w, text)
    n, painted = 5 * h * w, h * w
    weights = n * 72 * d + (depth - 1) * n * 14 * d**2 + n * 2 * d**2 + painted * (12 * d**2 + 64 * d)
    pairs = ((depth - 1) * n + painted) * (2 * n + text + text - 1)  # of a query and a key, both branches
    needed, ours = 4 * weights + 4 * d * pairs, marks[1] - marks[0]
    assert needed <= ours <= 1.01 * needed
    assert ours <= 0.75 * theirs.get_total_flops()


def test_nothing_is_padded_on_the_ragged_batch(monkeypatch):
    """Rows of the matrix products, and what the tiles of the kernel for a GPU cover, over what is useful."""
    dit, lengths = build(2, num_attention_heads=1), [sum(h * w for h, w in sample) for sample in RAGGED]
    assert sum(lengths) == 38876
    marks = []

    monkeypatch.setattr(ops, "_backend", "triton")
    with flops() as count, Launches(run_kernels=False):
        paint(dit, RAGGED, [512] * len(RAGGED), 2, lambda i, n: marks.append(count.get_total_flops()))
    d, painted = 64, sum(h * w for *_, (h, w) in RAGGED)
    useful = 4 * (sum(lengths) * (72 * d + 16 * d**2) + painted * (12 * d**2 + 64 * d))
    assert useful <= marks[1] - marks[0] <= 1.03 * useful

    segments, candidates = ops.Segments(lengths), kernels.config("forward", 128, torch.bfloat16, 9)
    tile = kernels.quickest(candidates, segments, segments, False, 16, "queries")
    tiles = kernels.tile_list(segments, segments, False, tile.m, "queries")[:, 0].tolist()
    assert sum(lengths) <= len(tiles) * tile.m <= 1.03 * sum(lengths)
    covered = sum(tile.m * tile.n * math.ceil(lengths[s] / tile.n) for s in tiles)
    assert covered <= 1.03 * sum(n**2 for n in lengths)
