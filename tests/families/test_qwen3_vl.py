"""families/qwen3_vl.py against transformers in fp32 on random checkpoints: packs, cache, files and pictures."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

import ops
from checkpoint import InputError
from families.qwen3_vl import PRESETS, Processor, Qwen3VL, Qwen3VLConfig, VisionConfig
from families.registry import load_language_model, load_model
from launches import Launches
from model import KVCache, mrope_positions
from test_model import BOV, GRIDS, PAD, bounds, document, photo, pixels_for, roughen, run_ours, run_theirs, worst
from tokenizer import render, train_bpe


def small(heads, kv_heads, *, tied, depth=3, deep=(0, 2), side=5, head_dim=32, layers=3) -> Qwen3VLConfig:
    """Heads are wider than the stream's share of them, as they are in the 4B and the 32B."""
    width = heads * 24
    vision = VisionConfig(
        width, 48, depth=depth, num_heads=2, intermediate_size=72, patch_size=8, num_position_embeddings=side**2,
        deepstack_visual_indexes=deep,
    )  # fmt: skip
    third = head_dim // 6
    return Qwen3VLConfig(
        width, 96, layers, heads, kv_heads, 200, 1e-6, vision, head_dim=head_dim,
        mrope_section=(head_dim // 2 - 2 * third, third, third), max_position_embeddings=512, tie_word_embeddings=tied,
        image_token_id=PAD, video_token_id=191, vision_start_token_id=BOV, vision_end_token_id=189, vision_token_id=192,
        eos_token_id=193, pad_token_id=194,
    )  # fmt: skip


SHAPES = {
    "7:1 untied": small(7, 1, tied=False),
    "2:1 tied": small(4, 2, tied=True, depth=4, deep=(1, 2, 3), side=12, layers=4),
    "1:1 no DeepStack": small(3, 3, tied=False, deep=(), side=1, head_dim=16),
}


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(ours, theirs): a checkpoint that transformers wrote, read by both; one of the three in shards."""
    from transformers import Qwen3VLConfig as Config
    from transformers import Qwen3VLForConditionalGeneration

    config, folder = SHAPES[request.param], tmp_path_factory.mktemp("reference")
    theirs = Qwen3VLForConditionalGeneration(Config(**config.to_json())).float().eval()
    roughen(theirs)
    theirs.save_pretrained(folder, max_shard_size="200KB" if "7:1" in request.param else "1GB")
    assert (folder / "model.safetensors.index.json").exists() == ("7:1" in request.param)
    ours = load_model("mllm", folder).eval()
    assert type(ours) is Qwen3VL and ours.config == config
    return ours, theirs


# ------------------------------------------------------------------------------------------------ against transformers


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
def test_deepstack_and_learnt_positions_are_read(pair):
    """Without them the same picture gives other states: the comparison above compares them."""
    ours, _ = pair
    grids = [(6, 10)]
    ids, _ = document(grids)
    pixels = pixels_for(ours.config, grids)
    plain = run_ours(ours, ids, grids, pixels)
    tower = ours.visual
    for parameters in ([tower.pos_embed.weight], [m.linear_fc2.weight for m in tower.deepstack_merger_list]):
        kept = [p.clone() for p in parameters]
        for p in parameters:
            p.zero_()
        changed = worst(run_ours(ours, ids, grids, pixels), plain)
        for p, was in zip(parameters, kept, strict=True):
            p.copy_(was)
        assert changed > 1e-2 or not parameters


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
            input_ids=ids[None], mm_token_type_ids=(ids == PAD).int()[None], max_new_tokens=20, do_sample=False, **extra,
            prefix_allowed_tokens_fn=lambda *_, a=allowed: a, no_repeat_ngram_size=1,
        )[0, len(ids) :].tolist()  # fmt: skip
        cache, banned = KVCache(ours.config, len(ids) + 20), sorted({*ids.tolist(), *range(BOV, 195)})
        positions, position = mrope_positions(ids, merged, PAD)
        last = ours(ids, positions, bounds(len(ids)), pixels, grids or None, cache)[-1][-1:]
        tokens = []
        for _ in range(20):
            logits = ours.logits(last)[0]
            logits[banned + tokens] = -math.inf
            tokens.append(logits.argmax().item())
            last = ours(torch.tensor(tokens[-1:]), torch.full((3, 1), position), bounds(1), cache=cache)[-1]
            position += 1
        assert tokens == expected


@torch.no_grad()
def test_transformers_reads_what_we_write(pair, tmp_path):
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    ours, _ = pair
    ours.save_pretrained(tmp_path)
    theirs, info = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    grids = [(6, 10), (4, 4)]
    ids, _ = document(grids)
    pixels = pixels_for(ours.config, grids)
    hidden = run_ours(ours, ids, grids, pixels)
    reference, logits = run_theirs(theirs.eval(), ids, grids, pixels)
    assert max(worst(hidden, reference), worst([ours.logits(hidden[-1])], [logits])) <= 5e-5
    assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [193, 194]
    again = load_model("mllm", tmp_path)
    assert again.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_positions_equal(pair):
    ours, theirs = pair
    for seed, grids in enumerate(GRIDS + [[(4, 4)] * 5]):
        ids, merged = document(grids, seed)
        positions, following = mrope_positions(ids, merged, PAD)
        thw = torch.tensor([[1, h, w] for h, w in grids]) if grids else None
        expected, delta = theirs.model.get_rope_index(
            input_ids=ids[None], mm_token_type_ids=(ids == PAD).int()[None], image_grid_thw=thw
        )
        assert torch.equal(positions, expected[:, 0])
        assert following == len(ids) + delta.item()


def test_published_sizes():
    """Names and shapes are those that transformers has at full size, the counts those of the published files."""
    from transformers import Qwen3VLConfig as Config
    from transformers import Qwen3VLForConditionalGeneration

    counts = {"2B": 2_127_532_032, "4B": 4_437_815_808, "8B": 8_767_123_696, "32B": 33_357_390_064}
    models = {}
    for name, count in counts.items():
        with torch.device("meta"):
            models[name] = Qwen3VL(PRESETS[f"qwen3-vl-{name}"])
        assert sum(p.numel() for p in models[name].parameters()) == count
    assert len(models["2B"].state_dict()) - len(models["2B"].tied) == 625 and len(models["32B"].state_dict()) == 1058

    with torch.device("meta"):
        theirs = Qwen3VLForConditionalGeneration(Config(**PRESETS["qwen3-vl-8B"].to_json()))
    shapes = {Qwen3VL.name_in_file(n): p.shape for n, p in models["8B"].state_dict().items()}
    assert shapes == {n: p.shape for n, p in theirs.state_dict().items()}


# ----------------------------------------------------------------------------------------------------- packs and caches


@pytest.fixture(scope="module")
def mllm() -> Qwen3VL:
    mllm = Qwen3VL.from_config(SHAPES["2:1 tied"]).eval()
    roughen(mllm)
    return mllm


@torch.no_grad()
def test_packed_documents_equal_each_alone(mllm):
    documents = [[(6, 10)], [], [(4, 4), (8, 12)], [(16, 16)]]
    ids, positions = [], []
    for n, grids in enumerate(documents):
        one, merged = document(grids, seed=n)
        ids.append(one)
        positions.append(mrope_positions(one, merged, PAD)[0])
    cu = bounds(*map(len, ids))
    pixels = pixels_for(mllm.config, sum(documents, []))
    together = mllm(torch.cat(ids), torch.cat(positions, 1), cu, pixels, sum(documents, []))
    used = 0
    for n, grids in enumerate(documents):
        a, b = cu[n].item(), cu[n + 1].item()
        size = sum(h * w for h, w in grids)
        alone = run_ours(mllm, ids[n], grids, pixels[used : used + size] if grids else None)
        assert worst([h[a:b] for h in together], alone) <= 2e-5
        used += size


@torch.no_grad()
@pytest.mark.parametrize("backend, joined", [("sdpa", False), ("sdpa", True), ("triton", True)])
def test_a_cache_with_a_picture_in_the_middle_equals_the_full_pass(backend, joined, monkeypatch):
    """Text token by token in two documents, in one of them then a picture at once, then text again; one waits meanwhile."""
    config = small(2, 1, tied=True, depth=2, deep=(0, 1), layers=2)
    mllm = Qwen3VL.from_config(config).eval()
    roughen(mllm)
    if joined:
        mllm.fuse_for_inference()
    documents = [[(4, 4)], []]
    ids, positions, pixels, full = [], [], [], []
    for n, grids in enumerate(documents):
        one, merged = document(grids, seed=n)
        ids.append(torch.cat((one, torch.arange(20, 26) + n)))
        positions.append(mrope_positions(ids[n], merged, PAD)[0])
        pixels.append(pixels_for(config, grids) if grids else None)
        full.append(run_ours(mllm, ids[n], grids, pixels[n]))
    cache, got = KVCache(config, 30, documents=2), [[], []]
    cache.k.fill_(math.nan), cache.v.fill_(math.nan)

    def read(d: int, n: int) -> None:
        at = sum(len(h[0]) for h in got[d])
        picture = (pixels[d], documents[d]) if PAD in ids[d][at : at + n] else ()
        got[d].append(
            mllm(ids[d][at : at + n], positions[d][:, at : at + n], ops.Segments([n]), *picture, cache=cache, document=d)
        )

    def step(*growing: int) -> None:
        at = {d: sum(len(h[0]) for h in got[d]) for d in growing}
        cache.advance(growing)
        rows = [(ids[d][at[d]], positions[d][0, at[d]]) if d in at else (0, 0) for d in range(2)]
        with Launches() as count, monkeypatch.context() as patch:
            patch.setattr(ops, "_backend", backend)
            hidden = mllm.decode(*(torch.tensor(x) for x in zip(*rows, strict=True)), cache)
        assert backend == "sdpa" or count.reads == 0  # nothing is read back: a graph could be recorded
        for d in growing:
            got[d].append([h[d : d + 1] for h in hidden])

    read(0, 5), read(1, 4)
    step(0, 1), step(0), step(1)
    read(0, 6)  # BOV, the picture, its end
    step(1, 0)
    for states, parts in zip(full, got, strict=True):
        n = sum(len(p[0]) for p in parts)
        together = [torch.cat(layer) for layer in zip(*parts, strict=True)]
        assert len(parts) >= 4 and worst(together, [h[:n] for h in states]) <= 2e-5


def test_gradients_reach_every_parameter_and_checkpointing_keeps_them(mllm):
    grids = [(4, 4), (6, 2)]
    ids, _ = document(grids)
    pixels = pixels_for(mllm.config, grids)
    gradients = []
    for on in (False, True):
        mllm.zero_grad()
        mllm.set_checkpointing(on)
        hidden = run_ours(mllm, ids, grids, pixels)
        mllm.logits(hidden[-1]).square().mean().backward()
        gradients.append({n: p.grad.clone() for n, p in mllm.named_parameters()})
    mllm.set_checkpointing(False)
    assert [n for n, g in gradients[0].items() if not g.abs().max() > 0] == []
    assert all(torch.allclose(g, gradients[1][n], atol=1e-6) for n, g in gradients[0].items())


@torch.no_grad()
def test_bf16_stays_near_fp32(mllm):
    grids = [(6, 10)]
    ids, _ = document(grids)
    pixels = pixels_for(mllm.config, grids)
    full = run_ours(mllm, ids, grids, pixels)[-1]
    half = run_ours(copy.deepcopy(mllm).to(torch.bfloat16), ids, grids, pixels)[-1]
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).square().mean() < 0.01 * full.square().mean()


def test_a_new_model_starts_at_ln_v_and_deepstack_adds_nothing():
    config = PRESETS["tiny-qwen3-vl"]
    mllm = Qwen3VL.from_config(config)
    ids = torch.randint(0, 1000, (200,))
    with torch.no_grad():
        hidden = mllm(ids, torch.arange(200).expand(3, -1), bounds(200))
        loss = torch.nn.functional.cross_entropy(mllm.logits(hidden[-1])[:-1], ids[1:])
        levels = mllm.visual.levels(pixels_for(config, [(8, 8)]), [(8, 8)])
    assert loss.item() == pytest.approx(math.log(1024), rel=0.05)
    assert len(levels) == 3 and levels[0].std() > 0.1 and not any(level.any() for level in levels[1:])


# --------------------------------------------------------------------------------------------------- configs and pictures


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_its_json(name):
    assert Qwen3VLConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


def changed(values: dict, place: str, change: dict) -> dict:
    return values | ({place: values[place] | change} if place else change)


@pytest.mark.parametrize(
    ("place", "change", "words"),
    [
        ("", {"model_type": "qwen3_5"}, "model_type"),
        ("", {"quantization_config": {}}, "quantization_config"),
        ("text_config", {"attention_bias": True}, "attention_bias"),
        ("text_config", {"rope_scaling": {"mrope_section": [12, 10, 10], "mrope_interleaved": False}}, "mrope_interleaved"),
        ("text_config", {"rope_scaling": {"mrope_section": [2, 15, 15]}}, "too few frequencies"),
        ("text_config", {"head_dim": 2**20}, "head_dim is 1,048,576"),
        ("text_config", {"num_hidden_layers": 1}, "more than there are layers"),
        ("vision_config", {"hidden_act": "silu"}, "hidden_act"),
        ("vision_config", {"num_position_embeddings": 60}, "no square grid"),
        ("vision_config", {"deepstack_visual_indexes": [2, 1]}, "must rise"),
        ("vision_config", {"deepstack_visual_indexes": [9]}, "deepstack_visual_indexes is 9"),
        ("vision_config", {"out_hidden_size": 128}, "out_hidden_size must be the decoder's"),
    ],
)
def test_configs_that_mean_something_else_are_refused(place, change, words):
    with pytest.raises(InputError, match=words):
        Qwen3VLConfig.from_json(changed(PRESETS["tiny-qwen3-vl"].to_json(), place, change))


def test_patches_equal_the_reference_processor(tmp_path):
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil as Reference

    ours = Processor(max_pixels=400_000)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text())["processor_class"] == "Qwen3VLProcessor"
    theirs = Reference.from_pretrained(tmp_path)
    assert Processor.from_pretrained(tmp_path) == ours
    for width, height in [(64, 64), (280, 196), (308, 644), (100, 75), (640, 480), (20, 300)]:
        patches, grid = ours(photo(width, height))
        out = theirs(photo(width, height), return_tensors="pt")
        assert [1, *grid] == out.image_grid_thw[0].tolist()
        assert (patches - out.pixel_values).abs().max() <= 1e-6


def test_the_published_settings_of_pictures_are_the_defaults(tmp_path):
    published = {
        "size": {"longest_edge": 16777216, "shortest_edge": 65536},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "processor_class": "Qwen3VLProcessor",
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(published))
    assert Processor.from_pretrained(tmp_path) == Processor()


@torch.no_grad()
def test_a_folder_with_tokenizer_and_processor_gives_ids_pixels_and_states(tmp_path):
    """What a dialogue is to it: the ids of its own tokenizer, through its own processor, and the states of all layers."""
    tokenizer = train_bpe(["Draw a red square. A blue one? Here it is."], 400)
    mllm = Qwen3VL.from_config(replace(PRESETS["tiny-qwen3-vl"], vocab_size=400).for_tokenizer(tokenizer)).eval()
    for part in (mllm, tokenizer, Processor(patch_size=8, min_pixels=256, max_pixels=4096)):
        part.save_pretrained(tmp_path)
    again, words, processor = load_language_model(tmp_path)
    assert type(processor) is Processor and type(again) is Qwen3VL
    patches, grid = processor(photo(60, 44))
    merged = [processor.merged(grid)]
    asked = [{"type": "text", "text": "Draw a red square."}, {"type": "image"}]
    ids = torch.tensor(render(words, [{"role": "user", "content": asked}], merged, generation_prompt=True).ids)
    positions, _ = mrope_positions(ids, merged, words.image_pad)
    states: list[Tensor] = again(ids, positions, bounds(len(ids)), patches, [grid])
    assert len(states) == 4 and again.config.features == sum(h.shape[1] for h in states) == 1024
    assert torch.equal(mllm(ids, positions, bounds(len(ids)), patches, [grid])[-1], states[-1])
