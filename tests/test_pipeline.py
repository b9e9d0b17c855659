"""The loop on small random parts, the language model's choices written by hand: what is read, painted, kept and said."""

import copy
import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import dit as dit_module
import model as model_module
import pipeline
import sample
import vae as vae_module
from checkpoint import InputError, write_checksums, write_json
from connector import features
from dit import DiT, DiTConfig
from families.registry import PARTS
from model import MLLM, ImageProcessor, MLLMConfig, VisionConfig, mrope_positions
from pipeline import Answer, DuoGen, Paint, Picture, Settings, Stop, Text, derive, override
from tokenizer import render, train_bpe
from vae import VAE, VAEConfig, to_image, to_tensor

BOV, END = "<|vision_start|>", "<|im_end|>"
TWO = ["Step 1: a wall.", BOV, "Step 2: a roof. é", BOV, "Done.", END]
PLAIN = ["Just words.", END]


def make_duo(**settings) -> DuoGen:
    torch.manual_seed(1)
    tokenizer = train_bpe(["Step one: draw a wall. Step two: draw a roof. system user assistant helpful"] * 4, 330)
    vision = VisionConfig(32, 64, 2, 2, 48, patch_size=8, window_size=32, fullatt_block_indexes=(1,))
    config = MLLMConfig(64, 96, 3, 2, 1, 340, 1e-6, vision, mrope_section=(4, 6, 6), max_position_embeddings=600)
    mllm = MLLM.from_config(config.for_tokenizer(tokenizer))
    dit = DiT.from_config(DiTConfig(2, 2, 32, 2.0, 8, text_embed_dim=24, crossattn_proj_in_channels=3 * 64))
    for p in (*mllm.parameters(), *dit.parameters()):  # fresh parts hardly listen: gates are closed, embeddings faint
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=2 * p.shape[1] ** -0.5)
    vae = VAE.from_config(VAEConfig(8, num_res_blocks=1))
    processor = ImageProcessor(8, min_pixels=16 * 16, max_pixels=64 * 64)
    defaults = Settings(steps=3, guidance=3.0, max_tokens=60, max_images=4, **settings)
    return DuoGen(mllm, tokenizer, processor, dit, vae, defaults, (32, 48))


@pytest.fixture(scope="module")
def parts():
    return make_duo()


@pytest.fixture
def duo(parts, monkeypatch):
    """`duo.say(script, ...)`: what the language model says in document 0, 1, ..., whatever its logits are."""
    scripts = {}

    def say(*texts, seed=0):
        for i, script in enumerate(texts):
            scripts[derive(seed, i, "text")] = [t for x in script for t in parts.tokenizer.encode_with_control(x)]

    def choose(logits, settings, generator):
        assert logits.shape == (340,) and logits.isfinite().all()
        return scripts[generator.initial_seed()].pop(0)

    monkeypatch.setattr(parts, "choose", choose)
    monkeypatch.setattr(parts, "say", say, raising=False)
    return parts


def picture(seed=0, size=(32, 32)) -> Image.Image:
    return to_image(torch.randn(3, *size, generator=torch.Generator().manual_seed(seed)).clamp(-1, 1))


def question(*images, text="How do I draw a house?"):
    return [{"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}]


def same(a: Image.Image, b: Image.Image, levels: int = 0) -> bool:
    """Up to so many of the 255 steps of rounding."""
    x, y = to_tensor(a), to_tensor(b)
    return x.shape == y.shape and bool(((x - y).abs() <= levels * 2 / 255 + 1e-6).all())


def drive(duo, answer):
    """All events, and the text, hidden states and rows that were kept, in one place."""
    return list(duo.stream(answer))


# --------------------------------------------------------------------------------------------------------------- the loop


def test_events_come_in_order_and_the_answer_records_them(duo):
    duo.say(TWO)
    answer = duo.answer("How do I draw a house?")
    events = drive(duo, answer)
    kinds = [type(e) for e in events]
    assert [k for i, k in enumerate(kinds) if k is not Text or kinds[i - 1] is not Text] == [
        Text, Paint, Picture, Text, Paint, Picture, Text, Stop
    ]  # fmt: skip
    assert events[-1].reason == answer.stop == "end"
    assert [p if isinstance(p, str) else "picture" for p in answer.parts] == [TWO[0], "picture", TWO[2], "picture", TWO[4]]
    assert "".join(e.text for e in events if isinstance(e, Text)) == TWO[0] + TWO[2] + TWO[4]
    assert answer.tokens == len([t for x in TWO for t in duo.tokenizer.encode_with_control(x)])
    assert answer.text_seconds > 0 and answer.paint_seconds > 0
    assert [p.image.size for p in answer.pictures] == [(48, 32)] * 2
    assert answer.pictures[0].seed == derive(0, 0, 0) != answer.pictures[1].seed


def test_an_answer_without_a_picture_never_wakes_the_painter(duo, monkeypatch):
    duo.say(PLAIN)
    monkeypatch.setattr(pipeline, "denoise", None)
    monkeypatch.setattr(duo.vae, "forward", None)
    answer = duo.generate("Hello")
    assert answer.parts == ["Just words."] and answer.stop == "end" and answer.paint_seconds == 0


def test_cache_with_appended_pictures_equals_the_full_pass(duo, monkeypatch):
    """Hidden states and connector rows of prompt, text and pictures, read piece by piece, are those of one whole pass."""
    duo.say(TWO)
    fed, seen, rows = [], [], []
    forward = duo.mllm.forward

    def spy(ids, positions, cu, pixels=None, grids=None, cache=None, document=0):
        hidden = forward(ids, positions, cu, pixels, grids, cache=cache, document=document)
        fed.append((ids, positions, pixels, grids))
        seen.append(hidden)
        return hidden

    monkeypatch.setattr(duo.mllm, "forward", spy)
    monkeypatch.setattr(duo, "connect", lambda hidden: rows.append(DuoGen.connect(duo, hidden)) or rows[-1])
    answer = duo.answer(question(picture()))
    drive(duo, answer)
    monkeypatch.setattr(duo.mllm, "forward", forward)

    ids = torch.cat([f[0] for f in fed])
    grids = [g for f in fed for g in f[3] or []]
    pixels = torch.cat([f[2] for f in fed if f[2] is not None])
    assert len(grids) == 3 and (ids == duo.tokenizer.image_pad).sum() == 3 * 2 * 2
    positions, _ = mrope_positions(ids, [duo.processor.merged(g) for g in grids], duo.tokenizer.image_pad)
    assert torch.equal(torch.cat([f[1] for f in fed], 1), positions)
    with torch.no_grad():
        whole = forward(ids, positions, torch.tensor([0, len(ids)], dtype=torch.int32), pixels, grids)
        context = duo.dit.crossattn_proj(features(whole))
    for layer in range(3):
        torch.testing.assert_close(torch.cat([h[layer] for h in seen]), whole[layer], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(rows), context, rtol=1e-4, atol=1e-4)
    # What was written is what training would render: a finished dialogue gives the same ids.
    messages = [*answer.messages, answer.message]
    rendered = render(duo.tokenizer, messages, [duo.processor.merged(g) for g in grids])
    assert rendered.ids[: len(ids)] == ids.tolist() and rendered.ids[len(ids)] == duo.tokenizer.im_end


def test_conditions_are_those_of_training(duo):
    """Positive: all rows before BOV. Negative: up to the end of the previous picture, or of the system turn."""
    duo.say(TWO)
    answer = duo.answer(question())
    requests = [e for e in drive(duo, answer) if isinstance(e, Paint)]
    rendered = render(duo.tokenizer, [*answer.messages, answer.message], [(2, 3)] * 2)
    for j, request in enumerate(requests):
        positive, negative = rendered.condition_lengths(j)
        assert request.positive.shape == (positive, 24) and request.negative.shape == (negative, 24)
        assert torch.equal(request.negative, request.positive[:negative])
        assert answer.pictures[j].context == (positive, negative)
        assert len(request.conditions) == j
    # with a picture of the user's, the first negative branch keeps it
    duo.say(TWO)
    given = duo.answer(question(picture()))
    first = next(e for e in drive(duo, given) if isinstance(e, Paint))
    rendered = render(duo.tokenizer, [*given.messages, given.message], [(2, 2)] * 3)
    assert len(first.negative) == rendered.images[0].end + 1 and len(first.conditions) == 1


def test_condition_latents_are_of_the_pictures_as_files(duo):
    duo.say(TWO)
    user = picture(size=(48, 32))
    answer = duo.answer(question(user))
    requests = [e for e in drive(duo, answer) if isinstance(e, Paint)]
    shown = [user, answer.pictures[0].image]
    for z, image in zip(requests[1].conditions, shown, strict=True):
        assert torch.equal(z, duo.vae.encode_latents(to_tensor(image)[None])[0])


@pytest.mark.parametrize("negative, length", [("chunk", 16), ("empty", 0), ("none", None)])
def test_kinds_of_negative_branch(duo, negative, length):
    duo.say(TWO)
    answer = duo.answer(question(), duo.settings(negative=negative))
    first = next(e for e in drive(duo, answer) if isinstance(e, Paint))
    assert (first.negative is None) == (length is None) and (first.answer.settings.scale == 1) == (length is None)
    assert length is None or len(first.negative) == answer.pictures[0].context[1] == length
    assert answer.pictures[0].image.size == (48, 32)


def test_condition_images_can_be_withheld_and_matter(duo):
    images = {}
    for use in (True, False):
        duo.say(TWO)
        answer = duo.answer(question(picture()), duo.settings(use_condition_images=use))
        requests = [e for e in drive(duo, answer) if isinstance(e, Paint)]
        assert [len(r.conditions) for r in requests] == ([1, 2] if use else [0, 0])
        images[use] = answer.pictures[0].image
    assert not same(images[True], images[False], 2)


def test_one_packed_call_a_step_and_context_once_a_picture(duo, monkeypatch):
    """Both guidance branches are one forward pass; the connector runs once a token, keys and values once a picture."""
    duo.say(TWO)
    calls = {"dit": [], "kv": 0, "rows": 0}
    forward, kv, connector = duo.dit.forward, duo.dit.context_kv, duo.dit.crossattn_proj.forward

    def count(name, function):
        def counted(*args, **kwargs):
            if name == "dit":
                calls["dit"].append(len(args[3].segments))
            else:
                calls[name] += 1 if name == "kv" else len(args[0])
            return function(*args, **kwargs)

        return counted

    monkeypatch.setattr(duo.dit, "forward", count("dit", forward))
    monkeypatch.setattr(duo.dit, "context_kv", count("kv", kv))
    monkeypatch.setattr(duo.dit.crossattn_proj, "forward", count("rows", connector))
    answer = duo.generate("How?", duo.settings(steps=5, sampler="euler"))
    assert calls["dit"] == [2] * 5 * 2 and calls["kv"] == 2
    assert calls["rows"] == answer.pictures[-1].context[0] + 2 * 3 + 2 + len(duo.tokenizer.encode(TWO[4]))
    duo.say(TWO)
    calls["dit"].clear()
    duo.generate("How?", duo.settings(steps=4, guidance=1))
    assert calls["dit"] == [1] * 4 * 2


# ----------------------------------------------------------------------------------------------------------------- limits


def test_limits_end_a_document_cleanly(duo):
    many = ["a", BOV] * 6 + ["end", END]
    for settings, stop, pictures in (
        ({"max_images": 2}, "max_images", 2),
        ({"max_images": 0}, "max_images", 0),
        ({"max_images": 6}, "end", 6),
        ({"max_tokens": 3}, "max_tokens", 1),
        ({"max_tokens": 4}, "max_tokens", 2),
    ):
        duo.say(many)
        answer = duo.generate("x", duo.settings(**settings))
        assert (answer.stop, len(answer.pictures)) == (stop, pictures), settings
        assert answer.tokens <= answer.settings.max_tokens


def test_the_context_is_a_limit_too(duo, monkeypatch):
    prompt = duo.answer("x").prompt_tokens
    monkeypatch.setattr(duo, "context", prompt + 5)
    duo.say(["abcdefgh", END])
    answer = duo.generate("x")
    assert answer.stop == "context" and answer.text == "abcdef" and answer.tokens == 6  # the last is said, but not read
    duo.say(["a", BOV, "b", END])
    answer = duo.generate("x")
    assert answer.stop == "context" and len(answer.pictures) == 1  # delivered, although it does not fit to be looked at
    monkeypatch.setattr(duo, "context", prompt)
    with pytest.raises(InputError, match=f"the prompt has {prompt} tokens"):
        duo.answer("x")


def test_endoftext_ends_too_and_half_a_character_is_not_lost(duo):
    e = duo.tokenizer.encode("é")
    assert len(e) == 2
    half = duo.tokenizer.bytes_of[e[0]]
    assert half == "é".encode()[:1]
    duo.say([END])
    scripts = [e[0], duo.tokenizer.vision_start, *e, duo.tokenizer.endoftext]
    duo.choose, before = (lambda *_: scripts.pop(0)), duo.choose
    try:
        answer = duo.generate("x")
    finally:
        duo.choose = before
    assert answer.stop == "end" and [p for p in answer.parts if isinstance(p, str)] == ["\N{REPLACEMENT CHARACTER}", "é"]


# ---------------------------------------------------------------------------------------------------------------- choices


def test_control_tokens_are_never_chosen(parts):
    t = parts.tokenizer
    logits = torch.zeros(340)
    logits[[t.image_pad, t.vision_end, t.im_start, t.video_pad, t.added["<tool_call>"], 339]] = 50.0
    logits[t.encode("a")[0]] = 1.0
    assert t.vocab_size <= 339  # so that 339 is a row without a token
    assert parts.choose(logits, Settings(), None) == t.encode("a")[0]
    g = torch.Generator().manual_seed(0)
    chosen = {parts.choose(logits, Settings(temperature=1.0), g) for _ in range(400)}
    forbidden = {*t.added.values(), *range(t.vocab_size, 340)} - {t.im_end, t.vision_start, t.endoftext}
    assert not chosen & forbidden and len(chosen) > 100
    for allowed in (t.im_end, t.vision_start, t.endoftext):
        assert parts.choose(torch.full((340,), -1.0).index_fill(0, torch.tensor(allowed), 9.0), Settings(), None) == allowed


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_logits_that_are_not_finite_are_told_and_not_written(parts, temperature, value):
    settings, generator = Settings(temperature=temperature), torch.Generator()
    logits = torch.randn(340)
    assert parts.choose(logits, settings, generator) in parts.tokenizer.writable
    logits[3] = value
    with pytest.raises(InputError, match="the language model's logits: NaN or infinity, computed in float32"):
        parts.choose(logits, settings, generator)
    with pytest.raises(InputError, match="the language model's logits: NaN or infinity"):
        parts.choose(torch.full((340,), -torch.inf), settings, generator)
    half = SimpleNamespace(allowed=parts.allowed, mllm=torch.nn.Linear(1, 1, dtype=torch.float16))
    with pytest.raises(InputError, match="computed in float16: try --dtype bf16 or fp32"):
        DuoGen.choose(half, logits, settings, generator)


@pytest.mark.parametrize(
    "owner, name, spoiled, words",
    [
        ("duo", "connect", lambda h: torch.full((len(h[0]), 24), torch.nan), "what the connector says of the text"),
        ("duo", "encode", lambda xs: [torch.full((16, 4, 4), torch.inf)] * len(xs), "latents of an earlier picture"),
        ("dit", "forward", lambda x, *_, targets, **__: x[targets.rows] + torch.inf, "the latents that the DiT has painted"),
        ("vae", "decode", lambda z: torch.full((1, 3, 32, 48), torch.nan), "the pixels that the VAE has decoded"),
    ],
)
def test_a_picture_that_is_not_finite_names_the_part_instead_of_being_black(duo, monkeypatch, owner, name, spoiled, words):
    duo.say(TWO)
    monkeypatch.setattr(duo if owner == "duo" else getattr(duo, owner), name, spoiled)
    with pytest.raises(InputError, match=words) as e:
        duo.generate(question(picture()))
    assert "NaN or infinity, computed in float32: its weights are damaged" in str(e.value) and "\n" not in str(e.value)


def test_sampling_follows_the_probabilities(parts):
    ids = [1, 2, 3]
    logits = torch.full((340,), -100.0)
    logits[ids] = torch.tensor([0.5, 0.3, 0.2]).log()

    def shares(**settings):
        g = torch.Generator().manual_seed(0)
        n = [0] * 340
        for _ in range(1500):
            n[parts.choose(logits, Settings(**settings), g)] += 1
        return [n[i] / 1500 for i in ids]

    assert shares(temperature=1.0) == pytest.approx([0.5, 0.3, 0.2], abs=0.05)
    assert shares(temperature=1.0, top_p=0.7) == pytest.approx([0.625, 0.375, 0], abs=0.05)
    assert shares(temperature=1.0, top_p=0.5) == [1, 0, 0]
    flat = torch.tensor([0.5, 0.3, 0.2]) ** 0.5
    assert shares(temperature=2.0) == pytest.approx((flat / flat.sum()).tolist(), abs=0.05)
    assert shares(temperature=0.0) == [1, 0, 0]


def test_a_seed_reproduces_and_another_differs(parts):
    hot = replace(parts.defaults, temperature=1.0, max_tokens=25, max_images=2, seed=5)
    a, b, c = (parts.generate("Draw.", s) for s in (hot, hot, replace(hot, seed=6)))
    assert a.text == b.text and all(same(x.image, y.image) for x, y in zip(a.pictures, b.pictures, strict=True))
    assert a.text != c.text
    assert parts.generate("Draw.", hot, index=1).text != a.text


def test_the_noise_is_seeded_by_seed_document_and_picture(duo):
    seen = set()
    for seed, index in ((0, 0), (0, 1), (1, 0)):
        duo.say(*[TWO] * (index + 1), seed=seed)
        answer = duo.generate("x", duo.settings(seed=seed), index)
        seen |= {p.seed for p in answer.pictures}
        assert not same(answer.pictures[0].image, answer.pictures[1].image, 2)
    assert len(seen) == 6


# --------------------------------------------------------------------------------------------------------------- lockstep


def test_many_in_lockstep_equal_each_alone(duo, monkeypatch):
    """Different numbers of pictures, conditions and sizes; every round is one packed call."""
    dialogues = ["Draw a house", question(picture(3)), "Talk", question(picture(4, (48, 32)), picture(5))]
    scripts = [TWO, ["Look:", BOV, END], PLAIN, ["", BOV, BOV, "ok", END]]
    settings = [duo.settings(max_images=9)] * 4
    duo.say(*scripts)
    alone = [duo.generate(m, s, i) for i, (m, s) in enumerate(zip(dialogues, settings, strict=True))]
    calls, denoise = [], pipeline.denoise

    def spy(dit, conditions, *args, **kwargs):
        calls.append(len(conditions))
        return denoise(dit, conditions, *args, **kwargs)

    monkeypatch.setattr(pipeline, "denoise", spy)
    for batch, expected in ((64, [3, 2]), (2, None)):
        calls.clear()
        duo.say(*scripts)
        finished = []
        together = duo.generate_many(dialogues, settings, batch=batch, done=finished.append)
        assert expected is None or calls == expected
        assert sorted(a.index for a in finished) == [0, 1, 2, 3] and max(calls) <= batch
        for a, b in zip(alone, together, strict=True):
            assert (a.text, a.stop, a.tokens) == (b.text, b.stop, b.tokens) and len(a.pictures) == len(b.pictures)
            for x, y in zip(a.pictures, b.pictures, strict=True):
                assert x.seed == y.seed and x.context == y.context and same(x.image, y.image, 1)


def test_text_is_written_in_one_batch_that_answers_enter_and_leave(parts, monkeypatch):
    """Five that draw their tokens, three at a time: those of each alone, from a generator of its own, in far fewer passes."""
    dialogues = ["Draw.", question(picture(3)), "Two", "Three more words", "x"]
    settings = [parts.settings(temperature=1.0, seed=s, max_tokens=12 + 6 * s, max_images=1, steps=1) for s in range(5)]
    draw, drawn = parts.choose, Counter()

    def choose(logits, settings, generator):  # every second asks for a picture after the fifth token
        drawn[generator] += 1
        token = draw(logits, settings, generator)
        return parts.tokenizer.vision_start if settings.seed % 2 and drawn[generator] == 6 else token

    monkeypatch.setattr(parts, "choose", choose)
    alone = [parts.generate(m, s, i) for i, (m, s) in enumerate(zip(dialogues, settings, strict=True))]
    decode, passes = parts.mllm.decode, []

    def spy(ids, positions, cache):
        before = cache.lengths.clone()
        hidden = decode(ids, positions, cache)
        passes.append(int((cache.lengths - before).sum()))
        return hidden

    monkeypatch.setattr(parts.mllm, "decode", spy)
    together = parts.generate_many(dialogues, settings, batch=3)
    assert len({a.text for a in alone}) == 5 and [len(a.pictures) for a in alone] == [0, 1, 0, 1, 0]
    for a, b in zip(alone, together, strict=True):
        assert (a.text, a.stop, a.tokens) == (b.text, b.stop, b.tokens) and len(a.pictures) == len(b.pictures)
        assert all(same(x.image, y.image, 1) for x, y in zip(a.pictures, b.pictures, strict=True))
    assert parts.generate_many([]) == []
    assert max(passes) == 3 and min(passes) >= 2 and len(passes) < 0.5 * sum(a.tokens for a in alone)


def test_pictures_with_other_settings_are_other_batches(duo, monkeypatch):
    duo.say(TWO, TWO, TWO)
    calls, denoise = [], pipeline.denoise

    def spy(dit, conditions, *args, **kwargs):
        calls.append((len(conditions), kwargs["guidance"]))
        return denoise(dit, conditions, *args, **kwargs)

    monkeypatch.setattr(pipeline, "denoise", spy)
    duo.generate_many(["x"] * 3, [duo.settings(), duo.settings(guidance=5.0, seed=0), duo.settings(negative="none")])
    assert sorted(calls) == [(1, 1.0)] * 2 + [(1, 3.0)] * 2 + [(1, 5.0)] * 2
    calls.clear()
    duo.say(TWO, TWO, TWO)
    monkeypatch.setattr(pipeline, "PACK", 30)  # a 32x48 picture is 6 patches, 12 with both branches; a condition doubles that
    duo.generate_many(["x"] * 3)
    assert calls == [(2, 3.0), (1, 3.0), (1, 3.0), (1, 3.0), (1, 3.0)]


def test_an_interrupted_answer_keeps_what_is_there(duo):
    duo.say(TWO)
    answer = duo.answer("x")
    assert any(isinstance(event, Paint) for event in duo.stream(answer))
    assert answer.stop == "interrupted" and answer.text == TWO[0]


# ---------------------------------------------------------------------------------------------------------------- offload


class Strict(pipeline.Offload):
    """The CPU in place of a GPU. Weights that are away are NaN: who uses them without a call gets nonsense. Notes who comes."""

    def __init__(self, *args):
        self.came = []
        super().__init__(*args)

    def leave(self, name):
        super().leave(name)
        for _, views in self.home[name]:
            for t, *_ in views:
                t.data = torch.full_like(t, torch.nan)

    def arrive(self, name):
        super().arrive(name)
        self.came.append(name)


def test_offload_moves_each_part_once_a_turn_and_changes_nothing(duo, monkeypatch):
    """Each part comes whole before it is used, and never inside a loop over tokens or steps."""
    monkeypatch.setattr(pipeline, "Offload", Strict)
    asked = [question(picture(3)), "Draw a house"]
    duo.say(TWO, TWO)
    alone = [duo.generate(m, index=i) for i, m in enumerate(asked)]
    mllm, dit, vae = (copy.deepcopy(part) for part in (duo.mllm, duo.dit, duo.vae))
    other = DuoGen(mllm, duo.tokenizer, duo.processor, dit, vae, duo.defaults, duo.size, offload=torch.device("cpu"))
    monkeypatch.setattr(other, "choose", duo.choose)
    tensors = [t for part in (mllm, dit, vae) for t in (*part.parameters(), *part.buffers())]
    assert all(t.isnan().all() for t in tensors)
    turn = ["vae", "dit", "vae", "decoder", "vision"]
    # The decoder is still there when the second begins, and with no picture before its first one there is nothing to encode.
    for i, (m, expected) in enumerate(zip(asked, (["decoder", "vision", *turn, *turn], [*turn[1:], *turn]), strict=True)):
        duo.say(TWO, TWO)
        other.offload.came.clear()
        answer = other.generate(m, index=i)
        assert other.offload.came == expected
        assert answer.text == alone[i].text
        assert all(same(x.image, y.image) for x, y in zip(answer.pictures, alone[i].pictures, strict=True))
    duo.say(TWO, TWO)
    other.offload.came.clear()
    together = other.generate_many(asked)
    assert other.offload.came == ["vision", *turn, *turn]
    for a, b in zip(alone, together, strict=True):
        assert all(same(x.image, y.image, 1) for x, y in zip(a.pictures, b.pictures, strict=True))
    storages = [layer.self_attn.q_proj.weight.untyped_storage().data_ptr() for layer in mllm.model.layers]
    assert storages == [layer.self_attn.v_proj.weight.untyped_storage().data_ptr() for layer in mllm.model.layers]


# ------------------------------------------------------------------------------------------------------------------- size


def test_size_of_pictures(duo):
    def size(messages, **settings):
        return duo.answer(messages, duo.settings(**settings)).size

    assert size("x") == (32, 48)
    assert size("x", height=64) == (64, 48)
    assert size(question(picture(0, (48, 80)))) == (48, 80)
    assert size(question(picture(0, (47, 81)))) == (48, 80)
    assert size(question(picture(0, (48, 80)), picture(0, (16, 32)))) == (16, 32)
    assert size(question(picture(0, (48, 80))), width=32) == (48, 32)
    assert size(question(picture(0, (128, 128))), max_area=64 * 64) == (64, 64)


def test_a_size_is_a_whole_number_of_patches(duo, monkeypatch):
    assert pipeline.pixels_per_patch(duo.vae.config, duo.dit.config) == duo.patch == 16
    with pytest.raises(InputError, match="height 100: must be a multiple of 16"):
        duo.answer("x", duo.settings(height=100))
    monkeypatch.setattr(pipeline, "load_model", None)  # it is told before any weights are read
    with pytest.raises(InputError, match="width 40: must be a multiple of 16"):
        DuoGen.from_pretrained(asked={"width": 40})


def test_pictures_are_packed_by_the_patches_of_the_pair(duo):
    """Patches of 4 x 4 latents are a quarter as many, and four times the pictures make a batch."""
    answer = duo.answer("x", duo.settings(guidance=1.0))
    requests = [Paint(answer, 0, (1024, 1024), 0, [torch.zeros(4, 128, 128)], [], torch.zeros(1, 4), None) for _ in range(32)]
    counts = [[len(batch) for batch in pipeline.batches_of(requests, patch, 8)] for patch in (16, 32)]
    assert counts == [[8] * 4, [32]]


def test_asked_for_size_is_painted(duo):
    duo.say(TWO)
    answer = duo.generate(question(picture(0, (48, 48))), duo.settings(height=64, width=32))
    assert [p.image.size for p in answer.pictures] == [(32, 64)] * 2


# ----------------------------------------------------------------------------------------------------------------- inputs


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("seed", -1, "whole number"), ("steps", 0, "from 1"), ("steps", 2.5, "int is expected"), ("shift", 0.0, "from 0.01"),
        ("guidance", float("nan"), "from -100 to 100"), ("guidance", 10**400, "guidance is 1000.*, but float"),
        ("sampler", "ddim", "ancestral"), ("schedule", "cosine", "shift or karras"),
        ("height", 8193, "from 1 to 8192"), ("width", 0, "from 1 to 8192"), ("max_images", -1, "from 0"),
        ("max_tokens", 0, "from 1"), ("temperature", -0.1, "0, or from 0.01"), ("top_p", 0.0, "above 0"),
        ("top_p", 1.5, "at most 1"), ("system", "x\ud800", "not Unicode text at character 1"),
        ("negative", "all", "chunk, empty"), ("condition_time", 1.0, "below 1"), ("max_area", 0, "at least 1"),
        ("stepz", 3, "did you mean steps"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused_by_name(name, value, message):
    with pytest.raises(InputError, match=message) as e:
        override(Settings(), {name: value}, "line 3")
    assert name in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "last one must be the user's"), ("   ", "prompt is empty"), ([{"role": "user", "content": []}], "prompt is empty"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "last one must be the user's"),
        ([{"role": "user"}], "each must be"), ([{"role": "user", "content": [{"type": "image"}]}], "each must be"),
        (["hello"], "each must be"), ([{"role": "bot", "content": "x"}, {"role": "user", "content": "a"}], "none of system"),
        ([{"role": "user", "content": [{"type": "image", "image": "/no/such.png"}]}], "no such file"),
    ],
)  # fmt: skip
def test_bad_dialogues_are_refused(parts, messages, message):
    with pytest.raises(InputError, match=message):
        parts.answer(messages)


def test_control_tokens_in_a_prompt_are_text(parts):
    ids = parts.answer("a <|vision_start|> <|im_end|> b")._ids
    assert ids.count(parts.tokenizer.vision_start) == 0 and ids.count(parts.tokenizer.im_end) == 2


def test_system_prompt(parts):
    plain = parts.tokenizer.decode(parts.answer("x")._ids)
    assert "You are a helpful assistant." in plain
    assert "Be brief" in parts.tokenizer.decode(parts.answer("x", parts.settings(system="Be brief"))._ids)
    own = [{"role": "system", "content": "Mine"}, {"role": "user", "content": "x"}]
    text = parts.tokenizer.decode(parts.answer(own, parts.settings(system="Be brief"))._ids)
    assert "Mine" in text and "Be brief" not in text


def test_a_dialogue_goes_on(duo):
    duo.say(TWO)
    answer = duo.generate("How?")
    duo.say(PLAIN)
    more = duo.answer([*answer.messages, answer.message, {"role": "user", "content": "And now?"}])
    assert len(more.images) == 2 and more.size == (32, 48)
    assert drive(duo, more)[-1] == Stop("end")


# ------------------------------------------------------------------------------------------------------------- checkpoint


@pytest.fixture(scope="module")
def folder(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    parts.save_pretrained(folder)
    return folder


def test_a_checkpoint_comes_back_as_it_was(parts, folder, capsys):
    other = DuoGen.from_pretrained(folder)
    assert (other.defaults, other.size) == (parts.defaults, parts.size)
    settings = replace(parts.defaults, temperature=1.0, max_tokens=12, max_images=1)
    a, b = parts.generate("Draw.", settings), other.generate("Draw.", settings)
    assert a.text == b.text and a.tokens == b.tokens
    for x, y in zip(a.pictures, b.pictures, strict=True):
        assert same(x.image, y.image, 1)
    assert other.sources["dit"] == str(folder / "dit") and other.sources["ckpt"] == str(folder)
    assert json.loads((folder / "duogen.json").read_text())["format"] == 1


def test_parts_from_elsewhere(parts, folder, tmp_path):
    shutil.copytree(folder / "dit", tmp_path / "other")
    duo = DuoGen.from_pretrained(folder, dit=tmp_path / "other")
    assert duo.sources["dit"] == str(tmp_path / "other") and duo.sources["vae"] == str(folder / "vae")
    duo = DuoGen.from_pretrained(mllm=folder, dit=folder, vae=folder)  # each finds its subfolder; no checkpoint at all
    assert duo.defaults == Settings() and duo.size == (704, 1280) and "ckpt" not in duo.sources


def make_run(folder, run, *parts, steps=(1, 2)):
    """A training run's folder as training.py leaves it, with these parts of a checkpoint."""
    run.mkdir()
    write_json(run / "config.json", {"out": str(run), "steps": 2, "save_every": 1, "documents": 2})
    for step in steps:
        for part in parts:
            shutil.copytree(folder / part, run / f"step_{step:06d}" / part)
        write_json(run / f"step_{step:06d}" / "state.json", {"step": step})
        write_checksums(run / f"step_{step:06d}")
    return run


@pytest.mark.parametrize("part", PARTS)
def test_a_training_run_is_a_source_of_its_parts_wherever_one_is_asked_for(folder, tmp_path, part, capsys):
    run = make_run(folder, tmp_path / "run", part)
    newest, older = run / "step_000002", run / "step_000001"
    for source, step in ((run, newest), (str(run), newest), (older, older), (older / part, older)):
        assert DuoGen.from_pretrained(folder, **{part: source}).sources[part] == str(step / part)
    capsys.readouterr()
    (newest / part / "config.json").write_text("{}")  # its checksum differs
    assert DuoGen.from_pretrained(folder, **{part: run}).sources[part] == str(older / part)
    assert f"{newest}: {part}/config.json is damaged" in capsys.readouterr().err
    assert failure(folder, **{part: newest}).startswith(f"{newest}: {part}/config.json is damaged: its checksum differs: take")


def test_the_newest_checkpoint_that_holds_the_part_is_taken(folder, tmp_path):
    run = make_run(folder, tmp_path / "run", "dit", "vae")
    shutil.rmtree(run / "step_000002" / "vae")
    write_checksums(run / "step_000002")
    sources = DuoGen.from_pretrained(folder, dit=run, vae=run).sources
    assert sources["dit"] == str(run / "step_000002" / "dit") and sources["vae"] == str(run / "step_000001" / "vae")


def failure(*args, **options) -> str:
    with pytest.raises(InputError) as e:
        DuoGen.from_pretrained(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_a_run_without_the_part_or_without_a_checkpoint_is_said(folder, tmp_path):
    stage1, young = make_run(folder, tmp_path / "a", "mllm"), make_run(folder, tmp_path / "b", "dit", steps=())
    words = "a training run that holds mllm, no dit: take one that holds it"
    assert failure(folder, dit=stage1) == f"{stage1}: {words}"
    assert failure(folder, dit=stage1 / "step_000001") == f"{stage1}/step_000001: {words}"
    words = "this training run has not saved yet: wait for its first step_* folder, or take another"
    assert failure(folder, dit=young) == f"{young}: {words}"


def test_sampling_from_a_run_on_the_command_line_records_its_checkpoint(folder, tmp_path, capsys):
    run, stage1 = make_run(folder, tmp_path / "run", "dit"), make_run(folder, tmp_path / "stage1", "mllm")
    flags = ["--ckpt", str(folder), "--prompt", "Draw.", "--max-tokens", "3", "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert sample.main([*flags, "--dit", str(run)]) == 0
    assert json.loads((tmp_path / "out/draw/answer.json").read_text())["sources"]["dit"] == str(run / "step_000002" / "dit")
    capsys.readouterr()
    for more in ([], ["--plan"]):
        assert sample.main([*flags, "--dit", str(stage1), *more]) == 2
        words = f"error: {stage1}: a training run that holds mllm, no dit: take one that holds it"
        assert capsys.readouterr().err.splitlines()[-1] == words


def test_a_run_as_ckpt_says_which_flag_to_give(folder, tmp_path):
    stage1, young = make_run(folder, tmp_path / "a", "mllm"), make_run(folder, tmp_path / "b", "dit", steps=())
    for run in (stage1, stage1 / "step_000001"):
        assert failure(run) == f"{run}: a training run, not a whole system: give --mllm {run} instead"
    assert failure(young).endswith("a training run, not a whole system: it has not saved yet, wait for its first step_* folder")


@pytest.mark.parametrize("place", ["../other", "dit/../../other", "/etc", "~", "~/x", "C:\\x", "..\\other", "a/b/../../c@main"])
def test_a_manifest_names_nothing_outside_its_folder(folder, tmp_path, place):
    shutil.copytree(folder / "dit", tmp_path / "other")
    copy = edited(folder, tmp_path, "duogen.json", lambda v: v["parts"].update(dit=place))
    line = failure(copy)
    assert line.startswith(f"{copy}/duogen.json: part dit is {place!r}, outside its own folder: ") and "say --dit" in line
    assert DuoGen.from_pretrained(folder, dit=copy / ".." / "other").sources["dit"].endswith("other")  # a user may


def test_a_manifest_finds_no_folder_of_the_working_directory_but_follows_links_inside(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "dit", tmp_path / "here" / "dit2")
    monkeypatch.chdir(tmp_path / "here")
    copy = edited(folder, tmp_path, "duogen.json", lambda v: v["parts"].update(dit="dit2"))
    assert failure(copy).startswith("dit2: no such folder")
    (copy / "dit2").symlink_to(tmp_path / "here" / "dit2")
    assert DuoGen.from_pretrained(copy).sources["dit"] == str(copy / "dit2")


def test_sources_on_the_hub_are_named_with_their_commit():
    cache = Path("/home/u/.cache/huggingface/hub/models--nvidia--Cosmos-Predict2.5-2B/snapshots")
    assert pipeline.origin(cache / ("a" * 40) / "transformer") == f"nvidia/Cosmos-Predict2.5-2B/transformer@{'a' * 40}"
    assert pipeline.origin(Path("here/dit")) == "here/dit"


def edited(folder, tmp_path, file, change):
    copy = tmp_path / "ckpt"
    shutil.copytree(folder, copy)
    value = json.loads((copy / file).read_text())
    change(value)
    (copy / file).write_text(json.dumps(value))
    return copy


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("duogen.json", lambda v: v.update(format=2), "format 2, this version reads format 1"),
        ("duogen.json", lambda v: v.pop("format"), "format None"),
        ("duogen.json", lambda v: v.update(extra=1), "unknown key extra"),
        ("duogen.json", lambda v: v["parts"].update(lm="x"), "unknown part lm"),
        ("duogen.json", lambda v: v["parts"].update(vae=3), "part vae must be"),
        ("duogen.json", lambda v: v["parts"].pop("dit"), "names no dit"),
        ("duogen.json", lambda v: v["parts"].update(dit="nowhere"), "nowhere"),
        ("duogen.json", lambda v: v.update(sampling=[]), "sampling is missing or no object"),
        ("duogen.json", lambda v: v["sampling"].update(stpes=3), "did you mean steps"),
        ("duogen.json", lambda v: v["sampling"].update(steps=0), "steps 0"),
        ("dit/config.json", lambda v: v.update(crossattn_proj_in_channels=128), "reads 128 .* 3 layers x 64 = 192"),
        ("dit/config.json", lambda v: v.update(out_channels=8, in_channels=9), "latents of 8 channels"),
        ("dit/config.json", lambda v: v.update(patch_size=[1, 4, 4]), "width 48: must be a multiple of 32"),
        ("mllm/preprocessor_config.json", lambda v: v.update(patch_size=14), "cuts patches"),
        ("mllm/config.json", lambda v: v.update(image_token_id=5), "image_pad"),
        ("mllm/config.json", lambda v: v.update(vocab_size=300), "tokenizer has 325 tokens"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_weight_is_read(folder, tmp_path, monkeypatch, file, change, message):
    copy = edited(folder, tmp_path, file, change)
    monkeypatch.setattr(MLLM, "from_pretrained", None)
    with pytest.raises(InputError, match=message) as e:
        DuoGen.from_pretrained(copy)
    assert "\n" not in str(e.value)


def test_what_is_no_checkpoint_is_refused(folder, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="no duogen.json"):
        DuoGen.from_pretrained(folder / "dit")
    with pytest.raises(InputError, match="no such folder"):
        DuoGen.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(InputError, match="revision v1: .* folder on this machine"):
        DuoGen.from_pretrained(folder, revision="v1")
    with pytest.raises(InputError, match="revision v1"):
        DuoGen.from_pretrained(mllm=folder, dit=folder, vae=folder, revision="v1")
    monkeypatch.setattr(pipeline, "BUNDLED", "checkpoints/absent")
    with pytest.raises(InputError, match="make tiny"):
        DuoGen.from_pretrained()


def test_half_precision_runs(folder):
    duo = DuoGen.from_pretrained(folder, dtype=torch.bfloat16)
    assert duo.vae.dtype == torch.float32 and duo.dit.proj_out.weight.dtype == torch.bfloat16
    answer = duo.generate(question(picture()), duo.settings(temperature=1.0, max_tokens=8))
    assert answer.stop in ("end", "max_tokens", "max_images")


def test_answers_of_the_presets(parts):
    """The parts as the published sizes have them fit together, on paper."""
    for name, dit, vae in (("tiny", "tiny", "tiny"), ("7B", "2B", "wan2.1")):
        c = model_module.PRESETS[name]
        processor = ImageProcessor(c.vision.patch_size)
        tokenizer = SimpleNamespace(vocab_size=1024, image_pad=c.image_token_id, vision_start=c.vision_start_token_id)
        pipeline.check_fit(c, tokenizer, processor, dit_module.PRESETS[dit], vae_module.PRESETS[vae])
    assert isinstance(parts.answer("x"), Answer)
