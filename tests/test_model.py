"""Qwen2.5-VL against `transformers` in fp32 on random checkpoints, and everything else `model.py` promises."""

import copy
import io
import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import ops
from checkpoint import InputError
from launches import Launches
from model import MLLM, PRESETS, ImageProcessor, KVCache, MLLMConfig, VisionConfig, mrope_positions, smart_resize, to_rgb
from tokenizer import Tokenizer, render

PAD, BOV, EOV = 190, 188, 189  # token ids in the small test models


def small(heads, kv_heads, *, tied, depth=3, full=(1,), window=32, patch=8, head_dim=32) -> MLLMConfig:
    vision = VisionConfig(
        48, heads * head_dim, depth=depth, num_heads=2, intermediate_size=72, patch_size=patch, window_size=window,
        fullatt_block_indexes=full,
    )  # fmt: skip
    return MLLMConfig(
        heads * head_dim, 96, 3, heads, kv_heads, 200, 1e-6, vision, mrope_section=(4, 6, head_dim // 2 - 10),
        max_position_embeddings=512, tie_word_embeddings=tied, image_token_id=PAD, video_token_id=191,
        vision_start_token_id=BOV, vision_end_token_id=EOV, vision_token_id=192, eos_token_id=193, pad_token_id=194,
    )  # fmt: skip


SHAPES = {
    "7:1 untied": small(7, 1, tied=False),
    "2:1 tied": small(4, 2, tied=True, depth=4, full=(1, 3), window=16),
    "1:1 untied": small(3, 3, tied=False, full=(), window=56, patch=14),
}


def roughen(module: torch.nn.Module, seed: int = 0) -> None:
    """Weights that leave no term at a trivial 0 or 1, and activations of order 1."""
    g = torch.Generator().manual_seed(seed)
    for name, p in module.named_parameters():
        z = torch.randn(p.shape, generator=g)
        with torch.no_grad():
            if p.ndim == 1:
                p.copy_(1 + 0.3 * z if "norm" in name or "ln_q" in name else 0.3 * z)
            else:
                p.copy_(z * (0.5 if "embed_tokens" in name else p[0].numel() ** -0.5))


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(ours, theirs): a checkpoint that transformers wrote, read by both; one of the three in shards."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config, folder = SHAPES[request.param], tmp_path_factory.mktemp("reference")
    theirs = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config.to_json())).float().eval()
    roughen(theirs)
    theirs.save_pretrained(folder, max_shard_size="200KB" if "7:1" in request.param else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == ("7:1" in request.param)
    assert "text_config" in json.loads((folder / "config.json").read_text())
    ours = MLLM.from_pretrained(folder).eval()
    assert replace(ours.config, max_position_embeddings=512, vision_token_id=192) == config
    return ours, theirs


def document(grids: list[tuple[int, int]], seed: int = 0, merge: int = 2) -> tuple[Tensor, list[tuple[int, int]]]:
    """Random text with a picture of each grid (in patches) in it, two of them side by side at the end; and the merged grids."""
    g = torch.Generator().manual_seed(seed)
    merged = [(h // merge, w // merge) for h, w in grids]
    ids = torch.randint(0, 180, (7,), generator=g).tolist()
    for i, (h, w) in enumerate(merged):
        ids += [BOV] + [PAD] * (h * w) + [EOV] + torch.randint(0, 180, (5 * (i != len(merged) - 2),), generator=g).tolist()
    return torch.tensor(ids), merged


def pixels_for(config: MLLMConfig, grids: list[tuple[int, int]], seed: int = 0) -> Tensor:
    c = config.vision
    size = c.in_channels * c.temporal_patch_size * c.patch_size**2
    return torch.randn(sum(h * w for h, w in grids), size, generator=torch.Generator().manual_seed(seed))


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)


def run_ours(mllm: MLLM, ids: Tensor, grids=(), pixels=None, cache=None) -> list[Tensor]:
    merged = [(h // 2, w // 2) for h, w in grids]
    positions, _ = mrope_positions(ids, merged, PAD)
    return mllm(ids, positions, bounds(len(ids)), pixels, list(grids) or None, cache=cache)


def run_theirs(theirs, ids: Tensor, grids=(), pixels=None):
    """Hidden states of layers 1..L and logits. Without mm_token_type_ids, transformers places pictures like text, silently."""
    theirs.model.rope_deltas = None
    extra = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids])} if grids else {}
    out = theirs(
        input_ids=ids[None], mm_token_type_ids=(ids == PAD).int()[None], output_hidden_states=True, use_cache=False, **extra
    )
    return [h[0] for h in out.hidden_states[1:]], out.logits[0]


def worst(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert [a.shape for a in ours] == [b.shape for b in theirs]
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------ against transformers

GRIDS = [[], [(6, 10)], [(12, 20)], [(16, 16)], [(2, 2)], [(10, 6), (4, 18)], [(8, 8), (14, 6), (2, 30)]]


@torch.no_grad()
def test_hidden_states_and_logits_equal(pair):
    ours, theirs = pair
    differences = []
    for grids in GRIDS:
        ids, _ = document(grids)
        pixels = pixels_for(ours.config, grids) if grids else None
        hidden = run_ours(ours, ids, grids, pixels)
        reference, logits = run_theirs(theirs, ids, grids, pixels)
        assert 0.3 < reference[-2].std() < 30 and logits.std() > 0.3
        differences.append(max(worst(hidden, reference), worst([ours.logits(hidden[-1])], [logits])))
    print("worst difference by document:", [f"{d:.1e}" for d in differences])
    assert max(differences) <= 5e-5


@torch.no_grad()
def test_greedy_tokens_equal(pair):
    ours, theirs = pair
    for grids in ([], [(6, 10)], [(4, 4), (8, 6)]):
        ids, merged = document(grids, seed=3)
        pixels = pixels_for(ours.config, grids) if grids else None
        extra = {"pixel_values": pixels, "image_grid_thw": torch.tensor([[1, h, w] for h, w in grids])} if grids else {}
        theirs.model.rope_deltas = None
        allowed = [i for i in range(200) if not BOV <= i <= 194]
        expected = theirs.generate(  # no token twice: a random model would soon repeat one for ever
            input_ids=ids[None], mm_token_type_ids=(ids == PAD).int()[None], max_new_tokens=40, do_sample=False, **extra,
            prefix_allowed_tokens_fn=lambda *_, a=allowed: a, no_repeat_ngram_size=1,
        )[0, len(ids) :].tolist()  # fmt: skip
        cache, banned = KVCache(ours.config, len(ids) + 40), sorted({*ids.tolist(), *range(BOV, 195)})
        positions, position = mrope_positions(ids, merged, PAD)
        last = ours(ids, positions, bounds(len(ids)), pixels, grids or None, cache)[-1][-1:]
        tokens = []
        for _ in range(40):
            logits = ours.logits(last)[0]
            logits[banned + tokens] = -math.inf
            tokens.append(logits.argmax().item())
            last = ours(torch.tensor(tokens[-1:]), torch.full((3, 1), position), bounds(1), cache=cache)[-1]
            position += 1
        assert tokens == expected


@torch.no_grad()
def test_transformers_reads_what_we_write(pair, tmp_path):
    from transformers import AutoConfig, GenerationConfig, Qwen2_5_VLForConditionalGeneration

    ours, _ = pair
    ours.save_pretrained(tmp_path)
    theirs, info = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    grids = [(6, 10), (4, 4)]
    ids, _ = document(grids)
    pixels = pixels_for(ours.config, grids)
    hidden = run_ours(ours, ids, grids, pixels)
    reference, logits = run_theirs(theirs.eval(), ids, grids, pixels)
    assert max(worst(hidden, reference), worst([ours.logits(hidden[-1])], [logits])) <= 5e-5
    assert AutoConfig.from_pretrained(tmp_path).text_config.eos_token_id == 193
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [193, 194]
    again = MLLM.from_pretrained(tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_positions_equal(pair):
    ours, theirs = pair
    for seed, grids in enumerate(GRIDS + [[(4, 4)] * 5]):
        ids, merged = document(grids, seed)
        positions, following = mrope_positions(ids, merged, PAD)
        thw = torch.tensor([[1, h, w] for h, w in grids]) if grids else None
        expected, delta = theirs.model.get_rope_index(ids[None], (ids == PAD).int()[None], thw)
        assert torch.equal(positions, expected[:, 0])
        assert following == len(ids) + delta.item()


def test_positions_by_hand_and_errors():
    positions, following = mrope_positions([5, BOV, PAD, PAD, PAD, PAD, PAD, PAD, EOV, 6], [(2, 3)], PAD)
    assert positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ] and following == 7  # fmt: skip
    assert mrope_positions([PAD] * 5, [(2, 2), (1, 1)], PAD)[0].tolist()[0] == [0, 0, 0, 0, 2]  # neighbours without a border
    for ids, grids in (([PAD] * 3, [(2, 2)]), ([PAD] * 4, []), ([1], [(1, 1)]), ([PAD, 1, PAD, PAD, PAD], [(2, 2)])):
        with pytest.raises(InputError, match="image_pad"):
            mrope_positions(ids, grids, PAD)


# ----------------------------------------------------------------------------------------------------- packs and caches


@pytest.fixture(scope="module")
def mllm() -> MLLM:
    mllm = MLLM.from_config(SHAPES["2:1 tied"]).eval()
    roughen(mllm)
    return mllm


def pack(mllm: MLLM, documents: list[list[tuple[int, int]]]):
    """Arguments of one forward over documents given by their pictures' grids."""
    ids, positions = [], []
    for n, grids in enumerate(documents):
        one, merged = document(grids, seed=n)
        ids.append(one)
        positions.append(mrope_positions(one, merged, PAD)[0])
    grids = sum(documents, [])
    cu = bounds(*map(len, ids))
    return torch.cat(ids), torch.cat(positions, 1), cu, pixels_for(mllm.config, grids) if grids else None, grids or None


@torch.no_grad()
def test_packed_documents_equal_each_alone(mllm):
    documents = [[(6, 10)], [], [(4, 4), (8, 12)], [(16, 16)]]
    ids, positions, cu, pixels, _ = pack(mllm, documents)
    together = mllm(ids, positions, cu, pixels, sum(documents, []))
    used = 0
    for n, grids in enumerate(documents):
        a, b = cu[n].item(), cu[n + 1].item()
        size = sum(h * w for h, w in grids)
        alone = run_ours(mllm, ids[a:b], grids, pixels[used : used + size] if grids else None)
        assert worst([h[a:b] for h in together], alone) <= 2e-5
        used += size


@torch.no_grad()
def test_decoding_with_a_cache_equals_the_full_pass(mllm):
    """Text token by token, then a picture in one step, then text again: what the sampling loop does around every picture."""
    grids = [(6, 10), (4, 6)]
    ids, merged = document(grids)
    positions, _ = mrope_positions(ids, merged, PAD)
    pixels = pixels_for(mllm.config, grids)
    full = mllm(ids, positions, bounds(len(ids)), pixels, grids)
    cache, steps, at = KVCache(mllm.config, len(ids)), [], 0
    pads = (ids == PAD).nonzero()[:, 0].tolist()
    chunks = [1] * pads[0] + [15, 1, 1, 8, *[1] * (len(ids) - pads[-1])]  # first picture alone; the second with BOV and its end
    chunks = chunks[: len(chunks) - (sum(chunks) - len(ids))] if sum(chunks) > len(ids) else chunks
    for n in chunks:
        part = ids[at : at + n]
        patches = {15: (pixels[:60], grids[:1]), 8: (pixels[60:], grids[1:])}.get(n, (None, None))
        steps.append(mllm(part, positions[:, at : at + n], bounds(n), *patches, cache=cache))
        at += n
    assert at == len(ids) == cache.length
    assert worst([torch.cat(parts) for parts in zip(*steps, strict=True)], full) <= 2e-5
    with pytest.raises(InputError, match="outgrows"):
        mllm(ids[:1], positions[:, :1], bounds(1), cache=cache)
    cache.length = 3  # forget all but three tokens, then go another way
    other = torch.cat((ids[:3], torch.tensor([7, 8])))
    continued = mllm(other[3:], mrope_positions(other, [], PAD)[0][:, 3:], bounds(2), cache=cache)
    assert worst(continued, [h[3:] for h in run_ours(mllm, other)]) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("backend, joined", [("sdpa", False), ("sdpa", True), ("triton", True)])
def test_decoding_several_documents_at_once_equals_each_full_pass(backend, joined, monkeypatch):
    """A picture in the middle of one, a document that waits, and one that takes the place of another."""
    config, documents = SHAPES["2:1 tied"], [[(4, 4)], [], [(4, 6)]]
    mllm = MLLM.from_config(replace(config, num_hidden_layers=2, vision=replace(config.vision, hidden_size=64))).eval()
    roughen(mllm)
    if joined:
        mllm.fuse_for_inference()
    ids, positions, pixels, full = [], [], [], []
    for n, grids in enumerate(documents):
        one, merged = document(grids, seed=n)
        ids.append(torch.cat((one, torch.arange(20, 26) + n)))
        positions.append(mrope_positions(ids[n], merged, PAD)[0])
        pixels.append(pixels_for(mllm.config, grids) if grids else None)
        full.append(run_ours(mllm, ids[n], grids, pixels[n]))
    cache, got, place = KVCache(mllm.config, 30, documents=2), [[] for _ in documents], {0: 0, 1: 1}  # document -> buffer
    cache.k.fill_(math.nan), cache.v.fill_(math.nan)

    def read(d, n):
        at = sum(len(h[0]) for h in got[d])
        picture = (pixels[d], documents[d]) if PAD in ids[d][at : at + n] else ()
        where = positions[d][:, at : at + n]
        got[d].append(mllm(ids[d][at : at + n], where, ops.Segments([n]), *picture, cache=cache, document=place[d]))

    def step(*growing):
        at = {place[d]: (sum(len(h[0]) for h in got[d]), d) for d in growing}
        cache.advance(list(at))
        rows = [(ids[at[b][1]][at[b][0]], positions[at[b][1]][0, at[b][0]]) if b in at else (0, 0) for b in range(2)]
        with Launches() as count, monkeypatch.context() as patch:
            patch.setattr(ops, "_backend", backend)
            hidden = mllm.decode(*(torch.tensor(x) for x in zip(*rows, strict=True)), cache)
        assert backend == "sdpa" or count.reads == 0  # where the device is the host, the lengths may be looked at
        for b, (_, d) in at.items():
            got[d].append([h[b : b + 1] for h in hidden])

    read(0, 5), read(1, 4)
    step(0, 1), step(0), step(1)
    read(0, 6)  # BOV, the picture, EOV
    for _ in range(2):
        step(1, 0)
    cache.truncate(1, 0)
    place[2] = 1
    read(2, 20)
    step(2), step(0, 2), step(0, 2), step(0)
    for states, parts in zip(full, got, strict=True):
        states, n = [h[: sum(len(p[0]) for p in parts)] for h in states], len(parts)
        assert n >= 4 and worst([torch.cat(layer) for layer in zip(*parts, strict=True)], states) <= 2e-5
    with pytest.raises(InputError, match="outgrows"):
        for _ in range(30):
            cache.advance([0, 1])


def test_joined_projections_are_the_same_parameters_and_stored_once(mllm, tmp_path):
    joined, one = copy.deepcopy(mllm).fuse_for_inference(), torch.tensor([7])
    sizes = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in joined.parameters()}
    assert len(sizes) < len(list(joined.parameters())) and sum(sizes.values()) == sum(p.nbytes for p in joined.parameters())
    joined.save_pretrained(tmp_path)
    for other in (joined, MLLM.from_pretrained(tmp_path)):
        assert [n for n, _ in other.named_parameters()] == [n for n, _ in mllm.named_parameters()]
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), mllm.parameters(), strict=True))
    layer = joined.model.layers[0]
    layer.mlp.up_proj = copy.deepcopy(layer.mlp.up_proj)  # parted again, as by a move to another device
    with torch.no_grad(), Launches() as count:
        hidden = run_ours(joined, one)
    products = sum(count.by_name[name] for name in ("mm", "addmm", "addmm_"))
    assert products == 4 * len(joined.model.layers) + 1  # q k v, output, gate with up, down
    with torch.no_grad():
        assert worst(hidden, run_ours(mllm, one)) <= 1e-5
    run_ours(joined, one)[-1].sum().backward()
    assert layer.self_attn.k_proj.weight.grad is not None and layer.mlp.gate_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_no_token_sees_what_follows(mllm):
    ids, _ = document([(6, 10)])
    pixels = pixels_for(mllm.config, [(6, 10)])
    changed = ids.clone()
    changed[-1] = (changed[-1] + 1) % 180
    a, b = (run_ours(mllm, x, [(6, 10)], pixels) for x in (ids, changed))
    assert worst([h[:-1] for h in a], [h[:-1] for h in b]) == 0 and worst(a, b) > 0


def test_ids_and_pictures_must_fit(mllm):
    ids, merged = document([(6, 10)])
    positions, _ = mrope_positions(ids, merged, PAD)
    pixels = pixels_for(mllm.config, [(6, 10)])
    with pytest.raises(InputError, match="15 <.image_pad.> tokens"):
        mllm(ids, positions, bounds(len(ids)))
    with pytest.raises(InputError, match="15 <.image_pad.> tokens"):
        mllm(ids, positions, bounds(len(ids)), pixels_for(mllm.config, [(8, 8)]), [(8, 8)])
    with pytest.raises(InputError, match="do not fill"):
        mllm(ids, positions, bounds(len(ids)), pixels, [(8, 10)])
    with pytest.raises(InputError, match="merge units"):
        mllm(ids, positions, bounds(len(ids)), pixels, [(5, 12)])
    with pytest.raises(InputError, match="one document"):
        mllm(ids, positions, bounds(10, len(ids) - 10), pixels, [(6, 10)], KVCache(mllm.config, 100))


# ---------------------------------------------------------------------------------------------------------- training


def loss_of(mllm: MLLM, arguments) -> Tensor:
    hidden = mllm(*arguments)
    logits = mllm.logits(hidden[-1]).float()
    return torch.nn.functional.cross_entropy(logits[:-1], arguments[0][1:]) + hidden[0].float().square().mean()


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(mllm):
    mllm = copy.deepcopy(mllm)
    arguments = pack(mllm, [[(6, 10)], [], [(4, 4), (8, 12)]])
    with torch.inference_mode():  # what is cached here must still serve training below
        mllm(*arguments)
    loss_of(mllm, arguments).backward()
    grads = {n: p.grad.clone() for n, p in mllm.named_parameters()}
    assert all(g.abs().max() > 0 and g.isfinite().all() for g in grads.values())
    mllm.zero_grad()
    mllm.set_checkpointing()
    loss_of(mllm, arguments).backward()
    assert max((p.grad - grads[n]).abs().max().item() for n, p in mllm.named_parameters()) <= 1e-6


@pytest.mark.parametrize("cached", [False, True])
def test_bf16_stays_near_fp32(mllm, cached):
    """Weights in bf16 (sampling), and fp32 weights under autocast (training on a CPU)."""
    arguments = pack(mllm, [[(6, 10), (4, 4)]])
    half = copy.deepcopy(mllm).bfloat16()
    with torch.no_grad():
        exact = mllm(*arguments)
        caches = [KVCache(mllm.config, 80, torch.bfloat16) if cached else None for _ in range(2)]
        low = half(*arguments, cache=caches[0])
        with torch.autocast("cpu", torch.bfloat16):
            auto = mllm(*arguments, cache=caches[1])
    assert low[0].dtype == torch.bfloat16 and auto[0].dtype == torch.float32
    for a, b, c in zip(exact, low, auto, strict=True):
        assert (a - b.float()).norm() < 0.03 * a.norm() and (a - c).norm() < 0.03 * a.norm()
    if not cached:
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(mllm, arguments)
        loss.backward()
        assert all(p.grad.isfinite().all() for p in mllm.parameters())
        mllm.zero_grad()


def test_the_miniature_starts_at_ln_v_and_learns():
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], image_token_id=PAD)
    mllm = MLLM.from_config(config)
    arguments = pack(mllm, [[(8, 8)], [(8, 8), (8, 8)]])
    optimizer = torch.optim.AdamW(mllm.parameters(), lr=1e-3)

    def loss():
        logits = mllm.logits(mllm(*arguments)[-1])
        return torch.nn.functional.cross_entropy(logits[:-1], arguments[0][1:])

    first = loss()
    assert abs(first.item() - math.log(1024)) < 0.3
    for _ in range(15):
        optimizer.zero_grad()
        last = loss()
        last.backward()
        optimizer.step()
    assert last.item() < 0.4 * first.item()


# -------------------------------------------------------------------------------------------------- configs and files


def test_published_sizes():
    with torch.device("meta"):
        mllm = MLLM(PRESETS["7B"])
        tied = MLLM(PRESETS["3B"])
        large = MLLM(PRESETS["32B"])
    assert sum(p.numel() for p in mllm.parameters()) == 8_292_166_656 and len(mllm.state_dict()) == 729
    assert sum(p.numel() for p in mllm.visual.parameters()) == 676_550_144
    assert sum(p.numel() for p in tied.parameters()) == 3_754_622_976  # the model card's 3.75 billion
    assert sum(p.numel() for p in large.parameters()) == 33_452_718_336


def test_published_configs_are_the_presets(shared):
    for size, folder in (("3B", "3b-instruct"), ("7B", "7b-instruct"), ("32B", "32b-instruct-awq")):
        values = json.loads((shared / f"qwen2.5-vl-{folder}" / "config.json").read_text())
        if "quantization_config" in values:
            with pytest.raises(InputError, match="quantization_config"):
                MLLMConfig.from_json(values)
            del values["quantization_config"]
        assert MLLMConfig.from_json(values) == PRESETS[size]
        assert MLLMConfig.from_json(PRESETS[size].to_json()) == PRESETS[size]
    with torch.device("meta"):
        shapes = {n: list(p.shape) for n, p in MLLM(PRESETS["7B"]).state_dict().items()}
    derived = json.loads((shared / "qwen2.5-vl-7b-instruct" / "DERIVED_tensor_shapes.json").read_text())
    derived = derived.get("tensors", derived)
    assert shapes == {n: v["shape"] if isinstance(v, dict) else v for n, v in derived.items()}
    assert ImageProcessor.from_pretrained(shared / "qwen2.5-vl-7b-instruct") == ImageProcessor()


def test_configs_that_mean_something_else_are_refused():
    good = PRESETS["tiny"].to_json()
    for change, words in (
        ({"model_type": "qwen3_vl"}, "model_type"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn", "mrope_section": [8, 12, 12]}}, "yarn"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}}, "mrope_section"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": "256"}, "hidden_size"),
        ({"vision_config": {}}, "hidden_size is missing"),
    ):
        with pytest.raises(InputError, match=words):
            MLLMConfig.from_json(good | change)


def test_names_that_transformers_has_in_memory_are_read(mllm, tmp_path):
    from checkpoint import save_weights

    def in_memory(name: str) -> str:
        return f"model.{name}" if name.startswith("visual.") else name.replace("model.", "model.language_model.")

    renamed = {in_memory(n): t for n, t in mllm.state_dict().items() if n != "lm_head.weight"}
    save_weights(renamed, tmp_path, mllm.config.to_json())
    again = MLLM.from_pretrained(tmp_path)
    assert all(torch.equal(t, mllm.state_dict()[n]) for n, t in again.state_dict().items())
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_token_ids_come_from_the_tokenizer():
    from tokenizer import train_bpe

    tokenizer = train_bpe(["a red square on a blue square"], 400)
    config = PRESETS["tiny"].for_tokenizer(tokenizer)
    assert config.image_token_id == tokenizer.image_pad < 320 and config.eos_token_id == tokenizer.im_end
    with pytest.raises(InputError, match="rows"):
        replace(PRESETS["tiny"], vocab_size=64).for_tokenizer(tokenizer)


# ------------------------------------------------------------------------------------------------------------ pictures


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """Smooth colours with some texture, as a photo has."""
    g = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width] / 37.0
    waves = np.stack([np.sin(x * a + b) * np.cos(y * b - a) for a, b in g.uniform(0.3, 2, (3, 2))], -1)
    return Image.fromarray((127 + 90 * waves + g.normal(0, 12, waves.shape)).clip(0, 255).astype(np.uint8))


def test_patches_equal_the_reference_processor(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Reference

    ours = ImageProcessor(min_pixels=3136, max_pixels=400_000)
    ours.save_pretrained(tmp_path)
    theirs = Reference.from_pretrained(tmp_path)
    assert ImageProcessor.from_pretrained(tmp_path) == ours
    theirs.save_pretrained(tmp_path / "theirs")
    assert ImageProcessor.from_pretrained(tmp_path / "theirs") == ours
    sizes = [(28, 112), (280, 196), (308, 644), (56, 56), (100, 75), (640, 480), (1000, 999), (33, 70), (20, 300), (1300, 900)]
    for width, height in sizes:
        patches, grid = ours(photo(width, height))
        out = theirs(photo(width, height), return_tensors="pt")
        assert [1, *grid] == out.image_grid_thw[0].tolist() and patches.is_contiguous()
        assert (patches - out.pixel_values).abs().max() <= 1e-6


@pytest.fixture(params=["published", "bundled"])
def fine_tune(request, tmp_path, monkeypatch):
    """(folder, model, processor): what transformers leaves of a fine-tune, with the published tokenizer and with our own."""
    from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    from transformers.video_processing_utils import VideoProcessorMixin

    bundled = Path(__file__).parent.parent / "checkpoints" / "tiny" / "mllm"
    start = bundled if request.param == "bundled" else request.getfixturevalue("shared") / "qwen2.5-vl-7b-instruct"
    ours = Tokenizer.from_pretrained(start)
    config = replace(small(4, 2, tied=False), vocab_size=ours.vocab_size + 7).for_tokenizer(ours)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config.to_json())).float().eval()
    roughen(model)
    # The class for videos needs torchvision, which is not installed: one that only has settings, unlike those of pictures.
    monkeypatch.setattr(Qwen2_5_VLProcessor, "check_argument_for_proper_class", lambda *_: None)
    videos = VideoProcessorMixin(size={"shortest_edge": 1, "longest_edge": 2}, patch_size=3, image_mean=[0.0] * 3)
    pictures, tokenizer = Qwen2VLImageProcessorPil.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    pictures.patch_size, pictures.size = 8, {"shortest_edge": 256, "longest_edge": 4096}
    template = json.loads((start / "chat_template.json").read_text())["chat_template"]
    processor = Qwen2_5_VLProcessor(pictures, tokenizer, videos, chat_template=template)
    processor.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    return tmp_path, model, processor


@torch.no_grad()
def test_a_fine_tune_that_transformers_five_saved_gives_equal_ids_pixels_and_logits(fine_tune):
    folder, model, processor = fine_tune
    written = {f.name for f in folder.iterdir()}
    assert {"processor_config.json", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= written
    assert not {"preprocessor_config.json", "vocab.json", "merges.txt"} & written
    parts = [{"type": "image"}, {"type": "text", "text": "Make the roof gr\u00fcn, please.\n 123 <b>"}]
    messages, image = [{"role": "user", "content": parts}], photo(60, 44)
    theirs = processor(text=[processor.apply_chat_template(messages, add_generation_prompt=True)], images=[image],
                       return_tensors="pt")  # fmt: skip
    expected = model(**theirs, use_cache=False).logits[0]

    mllm, tokenizer, own = (part.from_pretrained(folder) for part in (MLLM, Tokenizer, ImageProcessor))
    patches, grid = own(image)
    ids = render(tokenizer, messages, [own.merged(grid)], generation_prompt=True).ids
    assert ids == theirs["input_ids"][0].tolist() and [1, *grid] == theirs["image_grid_thw"][0].tolist()
    assert (patches - theirs["pixel_values"]).abs().max() <= 1e-6
    positions, _ = mrope_positions(ids, [own.merged(grid)], mllm.config.image_token_id)
    hidden = mllm.eval()(torch.tensor(ids), positions, bounds(len(ids)), patches, [grid])
    assert expected.std() > 0.3 and (mllm.logits(hidden[-1]) - expected).abs().max() <= 5e-5


def test_both_layouts_of_picture_settings_are_read_and_the_newer_goes_first(tmp_path):
    with pytest.raises(InputError, match="preprocessor_config.json: file is missing"):
        ImageProcessor.from_pretrained(tmp_path)
    ImageProcessor(patch_size=10).save_pretrained(tmp_path)
    newer = tmp_path / "processor_config.json"
    newer.write_text('{"processor_class": "Qwen2_5_VLProcessor"}')  # as transformers 4 wrote it
    assert ImageProcessor.from_pretrained(tmp_path).patch_size == 10
    for settings, size in (({"patch_size": 12}, 12), ({"size": {"shortest_edge": 5, "longest_edge": 9}}, 14)):
        newer.write_text(json.dumps({"image_processor": settings}))
        assert ImageProcessor.from_pretrained(tmp_path).patch_size == size
    assert ImageProcessor.from_pretrained(tmp_path) == ImageProcessor(min_pixels=5, max_pixels=9)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"do_normalize": False}, "do_normalize is False, only True is read"),
        ({"resample": 2}, "resample is 2, only 3 is read"),
        ({"size": 5}, "must be objects"),
        ({"min_pixels": 10**15}, "min_pixels is 1,000,000,000,000,000, but it can only be from 1 to"),
        ({"max_pixels": -1}, "max_pixels is -1"),
        ({"min_pixels": 9000, "max_pixels": 4000}, "min_pixels 9,000 is more than max_pixels 4,000"),
        ({"patch_size": 0}, "patch_size is 0"),
        ({"image_std": [1.0, 0.0, 1.0]}, "image_std is 0"),
        ({"image_mean": [0.5]}, "need 3 numbers each"),
    ],
)
def test_picture_settings_that_cannot_be_are_refused_by_name(tmp_path, change, words):
    for file, content in (("preprocessor_config.json", change), ("processor_config.json", {"image_processor": change})):
        (tmp_path / file).write_text(json.dumps(content))
        with pytest.raises(InputError, match=re.escape(words)) as e:
            ImageProcessor.from_pretrained(tmp_path)
        assert "\n" not in str(e.value)


def test_smart_resize_equals_the_reference():
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as reference

    g = np.random.default_rng(0)
    for _ in range(3000):
        h, w = (int(x) for x in np.exp(g.uniform(0, 9, 2)))
        if max(h, w) <= 200 * min(h, w):
            assert smart_resize(h, w, 28, 3136, 12845056) == reference(h, w, 28, 3136, 12845056)
    assert smart_resize(70, 42, 28, 1, 10**6) == (56, 56)  # halves round to even
    with pytest.raises(InputError, match="200 times"):
        ImageProcessor()(Image.new("RGB", (2100, 10)))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Image appears to be a malformed MPO")
def test_any_picture_becomes_rgb(shared):
    processor = ImageProcessor(max_pixels=200_000)
    files = sorted((shared / "photos" / "pillow_ok").iterdir())
    modes = set()
    for file in files:
        with Image.open(file) as image:
            modes.add(image.mode)
            if file.name == "ultrahdr.jpg":  # good metadata, but the pixels are cut off
                with pytest.raises(InputError, match="ultrahdr.jpg: cannot be decoded"):
                    processor(image)
                continue
            patches, (h, w) = processor(image)
        assert patches.shape == (h * w, 1176) and patches.isfinite().all(), file.name
    assert len(files) > 40 and len(modes) >= 8
    broken = 0
    for file in sorted((shared / "photos" / "broken").iterdir()):
        try:
            image = Image.open(file)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            continue  # opening is the caller's
        try:
            to_rgb(image)
        except InputError:
            broken += 1
    assert broken >= 2  # a cut JPEG and a damaged PNG; the others cannot be opened, or only their metadata is damaged


def test_orientation(shared):
    upright = np.asarray(to_rgb(Image.open(shared / "photos" / "pillow_ok" / "hopper.jpg"))).astype(int)
    for n in range(2, 9):
        image = Image.open(shared / "photos" / "pillow_ok" / f"hopper_orientation_{n}.jpg")
        assert np.abs(np.asarray(to_rgb(image)) - upright).mean() < 8, n


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_orientation_as_pillow_has_it(kind):
    stored = photo(30, 20)
    for orientation in range(9):
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        stored.save(file, kind, exif=exif)
        upright = ImageOps.exif_transpose(Image.open(io.BytesIO(file.getvalue())))
        assert to_rgb(Image.open(file)).tobytes() == upright.convert("RGB").tobytes()


def test_modes_by_hand():
    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    half = Image.new("LA", (4, 4), (0, 128))
    palette = Image.new("P", (4, 4), 3)
    palette.info["transparency"] = 3
    deep = Image.fromarray(np.full((4, 4), 32768, np.uint16))
    cases = [
        (clear, 255), (half, 127), (palette, 255), (deep, 128),
        (Image.new("F", (4, 4), 0.5), 128), (Image.new("F", (4, 4), 200), 200),
        (Image.new("I", (4, 4), 65535), 255), (Image.new("I", (4, 4), 77), 77), (Image.new("1", (4, 4), 1), 255),
        (Image.new("CMYK", (4, 4), (0, 0, 0, 255)), 0), (Image.new("YCbCr", (4, 4), (90, 128, 128)), 90),
        (Image.new("LAB", (4, 4), (255, 128, 128)), 255), (Image.new("RGBX", (4, 4), (9, 9, 9, 0)), 9),
        (Image.new("HSV", (4, 4), (0, 0, 40)), 40),
    ]  # fmt: skip
    for image, grey in cases:
        pixel = to_rgb(image).getpixel((1, 1))
        assert all(abs(v - grey) <= 1 for v in pixel), (image.mode, pixel)


def test_merge_unit_order_by_hand():
    """Each patch filled with its number in raster order: units 2 x 2 come out raster by raster, (mh, mw) inside."""
    processor = ImageProcessor(patch_size=2, image_mean=[0.0] * 3, image_std=[1 / 255] * 3, min_pixels=1)
    raster = np.arange(24, dtype=np.uint8).reshape(4, 6)
    patches, grid = processor(Image.fromarray(raster.repeat(2, 0).repeat(2, 1)))
    assert grid == (4, 6) and processor.merged(grid) == (2, 3) and patches.shape == (24, 3 * 2 * 2 * 2)
    assert patches[:, 0].round().int().tolist() == [
        0, 1, 6, 7, 2, 3, 8, 9, 4, 5, 10, 11, 12, 13, 18, 19, 14, 15, 20, 21, 16, 17, 22, 23
    ]  # fmt: skip
    assert (patches == patches[:, :1]).all()
