"""Judges: how words are read, what a misbehaving server costs, what is kept, and what the own language model says."""

import base64
import io
import json
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import server as server_module
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE
from evaluate.judges import Asker, Question, Unanswered, read_fields
from evaluate.own import Own
from evaluate.server import Server
from unruly import Unruly

PICTURE = Image.new("RGB", (30, 10), "red")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST", 0.01)


def asker(url: str, folder: Path, **options) -> Asker:
    return Asker(Server(url, "judge-1", **{"timeout": 0.5, "tries": 3} | options), folder)


def of_kind(body: dict, kind: str) -> list[dict]:
    return [part for message in body["messages"] for part in message["content"] if part["type"] == kind]


KEYS = {"a": (0, 10), "b": (1, 5)}


@pytest.mark.parametrize(
    "words",
    ['{"a": 3, "b": 4.5}', '```json\n{"reason": "x", "a": 3, "b": 4.5}\n```',
     'Well. {"a": 3, "b": 4.5} That is all.', '<think>{"a": 9}</think>{"a": 3, "b": 4.5}'],
)  # fmt: skip
def test_numbers_are_read(words):
    assert read_fields(words, KEYS) == {"a": 3, "b": 4.5}


@pytest.mark.parametrize(
    "words",
    ["", "3 and 4", "[3, 4]", '{"a": 3', '{"a": 3}',
     '{"a": "3", "b": 4}', '{"a": true, "b": 4}', '{"a": 11, "b": 4}', '{"a": NaN, "b": 4}',
     '{"a": null, "b": 4}', '{"a": 3, "b": 4} {"a": 5, "b": 4}', "{" * 5000],
)  # fmt: skip
def test_nothing_is_guessed(words):
    assert read_fields(words, KEYS) is None


def test_yes_is_a_probability_where_the_server_gives_one(tmp_path):
    tops = [{"token": "Yes", "logprob": -0.5}, {"token": " no", "logprob": -1.5}, {"token": "Maybe", "logprob": -2.0}]
    logprobs = {"content": [{"token": "Yes", "logprob": -0.5, "top_logprobs": tops}]}
    with Unruly(lambda body, n: {"content": "Yes", "choice": {"logprobs": logprobs}}) as unruly:
        verdict = asker(unruly.url, tmp_path).yes("Is it red?", PICTURE)
    assert verdict.value == pytest.approx(1 / (1 + 2.718281828**-1)) and verdict.why == JUDGED


@pytest.mark.parametrize("words, value, why", [
    ("Yes, it is.", 1.0, JUDGED), ("no", 0.0, JUDGED), ("Perhaps", None, UNPARSABLE), ("", None, UNPARSABLE),
    ({"content": None}, None, UNPARSABLE), ({"content": 7}, None, UNPARSABLE), ({"content": ["yes"]}, None, UNPARSABLE),
    ("I'm sorry, but I can't help with that.", None, REFUSED), ("I cannot judge this.", None, REFUSED),
    ({"content": "", "choice": {"finish_reason": "content_filter"}}, None, REFUSED),
    ({"content": None, "refusal": "No."}, None, REFUSED),
    ((400, '{"error": {"code": "content_filter"}}'), None, REFUSED),
    ("x" * 5_000_000, None, UNPARSABLE),
])  # fmt: skip
def test_words_of_a_server(tmp_path, words, value, why):
    with Unruly(lambda body, n: dict(words) if isinstance(words, dict) else words) as unruly:
        verdict = asker(unruly.url, tmp_path, timeout=10).yes("Is it red?", PICTURE)
    assert (verdict.value, verdict.why) == (value, why)
    assert len(verdict.words) <= 20_000


@pytest.mark.parametrize(
    "trouble", [429, 500, 503, "hang", b'{"choices": [{"mess', b"[]", b'{"choices": []}', b'{"choices": 5}', b"\xff"]
)
def test_what_fails_once_is_asked_again(tmp_path, trouble):
    with Unruly(lambda body, n: trouble if n == 1 else "yes") as unruly:
        assert asker(unruly.url, tmp_path).yes("Is it red?", PICTURE).value == 1.0
        assert len(unruly.asked) == 2


def test_what_fails_always_is_unanswered_and_nothing_is_kept(tmp_path):
    with Unruly(lambda body, n: 500) as unruly, pytest.raises(Unanswered, match="500"):
        asker(unruly.url, tmp_path).yes("Is it red?", PICTURE)
    assert len(unruly.asked) == 3 and not list(tmp_path.rglob("*.json"))


def test_a_server_without_schemas_and_probabilities_is_asked_without_them(tmp_path):
    def answer(body, n):
        if "response_format" in body or "logprobs" in body:
            return 400, '{"error": "unknown field"}'
        return '{"score": 4}' if "JSON" in json.dumps(body) else "yes"

    with Unruly(answer) as unruly:
        judge = asker(unruly.url, tmp_path)
        assert judge.yes("Is it red?", PICTURE).value == 1.0
        assert [judge.rating(f"How {how}?", PICTURE, low=1, high=5).value for how in ("red", "sharp")] == [4, 4]
        assert len(unruly.asked) == 5


def test_the_second_time_costs_nothing(tmp_path):
    with Unruly(lambda body, n: '{"score": 2}') as unruly:
        first = asker(unruly.url, tmp_path).rating("How red?", PICTURE, low=1, high=5)
        again = asker(unruly.url, tmp_path)
        assert again.rating("How red?", PICTURE, low=1, high=5) == first
        assert (len(unruly.asked), again.tally.kept, again.tally.asked) == (1, 1, 0)
        # A file that the disk has spoilt is none, and the question is asked again.
        (file,) = tmp_path.rglob("*.json")
        for text in ("", '{"reply": {"words": 3', '{"reply": {}}', "[]"):
            file.write_text(text)
            unruly.asked.clear()
            assert asker(unruly.url, tmp_path).rating("How red?", PICTURE, low=1, high=5) == first
            assert len(unruly.asked) == 1
        # Another picture, scale or prompt is another question.
        again.rating("How red?", Image.new("RGB", (30, 10), "blue"), low=1, high=5)
        again.rating("How red?", PICTURE, low=0, high=5)
        again.rating("How red is it?", PICTURE, low=1, high=5)
        assert len(unruly.asked) == 4


def test_pictures_are_sent_as_they_are_and_a_call_of_text_holds_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with Unruly(lambda body, n: '{"score": 2}') as unruly:
        judge = asker(unruly.url, tmp_path)
        judge.rating("How clear?", "Some text.", low=1, high=5)
        judge.rating("How red?", "before", PICTURE, "after", low=1, high=5)
        text, both = unruly.asked
    assert not of_kind(text, "image_url")
    (sent,) = of_kind(both, "image_url")
    with Image.open(io.BytesIO(base64.b64decode(sent["image_url"]["url"].partition(",")[2]))) as image:
        assert image.size == PICTURE.size and image.getpixel((0, 0)) == (255, 0, 0)
    kinds = [part["type"] for part in both["messages"][0]["content"]]
    assert kinds == ["text", "text", "image_url", "text", "text"]
    assert unruly.keys == {"Bearer none"}  # the Hub's token is not for others


def test_a_judge_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match="nobody answers there"):
        asker("http://127.0.0.1:9/v1", tmp_path)
    with Unruly(lambda body, n: "yes") as unruly, pytest.raises(InputError, match="the server has judge-1"):
        Server(unruly.url, "judge-2")


@pytest.fixture(scope="module")
def own() -> Own:
    return Own.from_pretrained(None, None, "cpu", "fp32")


def test_the_own_model_says_yes_by_its_logits(own, tmp_path):
    judge = Asker(own, tmp_path)
    verdict = judge.yes("Is there a house?", PICTURE)
    assert 0 < verdict.value < 1 and verdict.why == JUDGED
    assert judge.yes("Is there a house?", PICTURE) == verdict and judge.tally.kept == 1


def test_probabilities_of_numbers_are_those_of_a_full_pass(own):
    """Each candidate behind the cached question, against the question and the candidate read at once."""
    import torch

    from model import mrope_positions
    from tokenizer import render

    found, _ = own.probabilities([PICTURE, "How red? "], ["yes", "Yes", "10", "1"])
    patches, grid = own.processor(PICTURE)
    merged = [own.processor.merged(grid)]
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "How red? \n"}]}]
    ids = render(own.tokenizer, messages, merged, generation_prompt=True).ids
    likely = {}
    for word in ("10", "1"):
        tokens = own.tokenizer.encode(word)
        positions, _ = mrope_positions(ids + tokens, merged, own.tokenizer.image_pad)
        all_ids = torch.tensor(ids + tokens)
        hidden = own.mllm(all_ids, positions, torch.tensor([0, len(all_ids)], dtype=torch.int32), patches, [grid])[-1]
        logs = own.mllm.logits(hidden).log_softmax(-1)[len(ids) - 1 : -1]
        likely[word] = logs[torch.arange(len(tokens)), torch.tensor(tokens)].sum().exp().item()
    assert found["10"] == pytest.approx(likely["10"], rel=1e-3)
    longer = own.tokenizer.encode("10")[:1] == own.tokenizer.encode("1")
    assert found["1"] == pytest.approx(likely["1"] - likely["10"] * longer, rel=1e-3)


def test_numbers_asked_for_together_are_those_asked_for_one_by_one(own):
    """What is to be judged is read once for all of them."""
    keys = {"style": (0, 10), "sharpness": (1, 5), "x": (0, 3)}
    parts = ["Rate it.", PICTURE, "It is", PICTURE, "Answer with JSON alone."]
    together = own.ask(Question("fields", parts, keys))
    for key, scale in keys.items():
        alone = own.ask(Question("fields", parts, {key: scale}))
        assert together.value[key] == pytest.approx(alone.value[key], rel=1e-4)
    assert together.tokens[0] < 2 * alone.tokens[0]


def test_a_named_gpu_is_taken_and_each_rank_has_its_own(monkeypatch):
    import torch

    import distributed

    monkeypatch.setattr(distributed, "pick_device", torch.device)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert [str(distributed.local_device(name)) for name in ("cuda", "cuda:3", "cpu")] == ["cuda:0", "cuda:3", "cpu"]
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert [str(distributed.local_device(name)) for name in ("cuda", "cuda:0", "cpu")] == ["cuda:2", "cuda:2", "cpu"]


def test_a_question_longer_than_the_context_is_refused(own):
    own_reply = own.ask(Question("yes", ["word " * own.mllm.config.max_position_embeddings, "?"], {}))
    assert own_reply.refused and "tokens" in own_reply.words
