"""Synthetic dialogues: seeds beside the benchmarks, growing, painting by script, the miniature's world, servers."""

import base64
import json
import random
import threading
from collections import Counter
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("datatrove", reason="curate/requirements.txt is not installed")
from test_pipeline import same

import data
from checkpoint import InputError, read_json
from curate import painter as painters
from curate import synth, world
from curate.engine import record_of
from curate.page import Dropped, Page
from curate.painter import Painter, png
from curate.requests import SEEDS, Known, check_seeds, examined, grow, requests_in, seeds
from curate.synth import main, read_answer
from curate.world import Checked, Drawn, Requested, choose_seeds, image_of
from evaluate.benchmarks import howto500
from evaluate.judges import Unanswered
from pipeline import DuoGen
from sketchbook.dialogues import pictures

# ------------------------------------------------------------------------------------------------------------------ requests


def test_the_taxonomy_is_the_benchmarks_and_its_requests_are_not():
    own = read_json(SEEDS)["domains"]
    theirs = read_json(howto500.ITEMS)["domains"]
    assert {domain: list(subs) for domain, subs in own.items()} == {domain: list(subs) for domain, subs in theirs.items()}
    assert (len(own), sum(map(len, own.values()))) == (8, 151)
    assert min(len(texts) for subs in own.values() for texts in subs.values()) >= 2
    check_seeds(seeds())


def test_a_benchmark_request_is_found_however_it_is_worded():
    forbidden = Known(examined())
    assert len(forbidden.texts) == 700
    ways = ("{}", "please: {}", "Explain with pictures: {}", "{} Show me every step.", "I would like to know, {}")
    for k, text in enumerate(forbidden.texts):
        again = ways[k % len(ways)].format(text.lower())
        assert forbidden.like(again) is not None, again
    assert forbidden.like("How do I fold the fitted sheets?") == "How do I fold a fitted sheet?"
    assert forbidden.like("How do I knit a jumper for a hedgehog?") is None
    with pytest.raises(InputError, match="near to a benchmark's"):
        check_seeds([seeds()[0]._replace(text="Show me how a fitted sheet is folded")])
    with pytest.raises(InputError, match="repeated"):
        check_seeds([seeds()[0], seeds()[0]])


class Scripted:
    """A model that answers by a function of the question."""

    def __init__(self, answer):
        self.answer = answer
        self.asked = []

    def write_all(self, questions, max_tokens=1024):
        self.asked += [question for [question] in questions]
        return [self.answer(question) for [question] in questions]


def inventive(question: str) -> str | Unanswered:
    """New requests, an old one, one of the benchmark's, and some that are none; now and then nothing."""
    rng = random.Random(question)
    if rng.random() < 0.05:
        return Unanswered("it is silent")
    new = [f"How do I {rng.randrange(10**9):x} the {rng.randrange(10**9):x} with {rng.randrange(10**9):x}?" for _ in range(4)]
    old = question.partition("- ")[2].partition("\n")[0]
    return "\n".join([f"1. {new[0]}", f'- "{new[1]}"', old, "How do I fold a fitted sheet?", "ok", "", *new[2:]])


def test_growing_refuses_repetitions_and_benchmarks_and_fills_every_subcategory():
    begun = seeds()
    model = Scripted(inventive)
    grown, refused = grow(begun, 1000, model)
    assert len(grown) == 1000
    assert grown[: len(begun)] == begun
    sizes = Counter(wish.subcategory for wish in grown)
    assert len(sizes) == 151 and max(sizes.values()) == 7
    assert min(refused[kind] for kind in ("repeated", "near to a benchmark's", "no request", "model without an answer")) > 0
    check_seeds(grown)
    # The same answers, the same requests; and no question twice, since the same question has the same answer.
    assert grow(begun, 1000, Scripted(inventive)) == (grown, refused)
    assert len(set(model.asked)) == len(model.asked)


def test_growing_ends_where_nothing_new_comes():
    grown, refused = grow(seeds(), 600, Scripted(lambda question: "How do I fold a fitted sheet?"))
    assert len(grown) == len(seeds())
    assert refused == {"near to a benchmark's": 302}


def test_few_requests_are_spread_over_the_subcategories():
    few, _ = grow(seeds(), 151, None)
    assert len({wish.subcategory for wish in few}) == 151


def test_lines_of_a_model_become_requests():
    assert requests_in('1. One thing\n - "Two things"\n\n* Three\n10) Four') == ["One thing", "Two things", "Three", "Four"]


# ------------------------------------------------------------------------------------------------------------------- answers


def steps_json(n: int, **more) -> str:
    return json.dumps({"steps": [{"text": f"Step {k}.", "picture": f"A thing, {k}."} for k in range(n)]} | more)


def test_an_answer_is_read_strictly():
    steps, end = read_answer(f"Here you are:\n{steps_json(3, end=' Done. ')}\nBye")
    assert steps[2] == {"text": "Step 2.", "picture": "A thing, 2."} and end == "Done."
    long = json.dumps({"steps": [{"text": "a" * 9999, "picture": "b"}] * 3})
    half = '{"steps": [{"text": "a"}, 3]}'
    for wrong in ("", "no JSON", "[]", "{}", '{"steps": 3}', steps_json(1), steps_json(9), half, long):
        with pytest.raises(InputError):
            read_answer(wrong)


# ------------------------------------------------------------------------------------------------------------------ painting


@pytest.fixture(scope="module")
def duo() -> DuoGen:
    return DuoGen.from_pretrained()


def test_a_script_paints_what_the_system_paints_when_it_writes_the_same_words(duo):
    request = "How do I draw a red house with a blue door?"
    settings = {"steps": 2, "seed": 5, "max_images": 2, "guidance": 3.0}
    free = duo.generate(request, duo.settings(**settings))
    words = [part for part in free.parts if isinstance(part, str)][:2]
    drawn = painters.scripted(duo, request, words, settings)
    # Words that are read at once are summed in another order than words that come one by one: a value may round the other way.
    assert all(same(image, picture.image, levels=1) for image, picture in zip(drawn, free.pictures, strict=True))


def test_what_was_painted_is_kept_by_content(duo, tmp_path, monkeypatch):
    monkeypatch.setattr(painters, "system", lambda painter, process: duo)
    painter = Painter(kept=str(tmp_path), steps=1, device="cpu")
    first = painter.paint("Draw a red house.", ["A red house.", "A blue door on it."])
    # The system is not asked again, nor for words that only come later; other words, seeds and steps are other pictures.
    keys = painter.keys("Draw a red house.", ["A red house.", "A green door on it."])
    assert keys[0] == painter.keys("Draw a red house.", ["A red house."])[0]
    assert len({*keys, *replace(painter, seed=1).keys("Draw a red house.", ["A red house."])}) == 3
    monkeypatch.setattr(painters, "scripted", None)
    assert painter.paint("Draw a red house.", ["A red house.", "A blue door on it."]) == first
    assert painter.paint("Draw a red house.", ["A red house."]) == first[:1]
    assert Painter("http://a/v1", "x").keys("a", ["b"]) == Painter("http://b/v1", "x").keys("a", ["b"])


def test_a_script_that_is_too_long_is_one_clear_line(duo):
    with pytest.raises(InputError, match="context"):
        painters.scripted(duo, "Draw.", ["word " * 3000], {"steps": 1})


# ------------------------------------------------------------------------------------------------------------------ the world


def held(seed: int, **kinds) -> Page:
    [page] = Requested().read(str(seed))
    return Drawn(Painter(), renderer=True)(page)


def first_seed(kind: str) -> int:
    return next(seed for seed in range(10**6) if world.drawn_record(seed)["kind"] == kind)


def test_the_renderers_dialogues_pass_the_checker_and_worse_ones_do_not():
    page = held(first_seed("lesson"))
    assert isinstance(Checked()(page), Page)
    assert Checked()(page).notes == {"seed": page.notes["seed"], "kind": "lesson"}
    # A picture of something else.
    parts = list(page.parts)
    at = max(k for k, part in enumerate(parts) if not isinstance(part, str))
    parts[at] = parts[at].filled(png(pictures(7, 1)[0]))
    assert Checked()(replace(page, parts=tuple(parts))).reason == "details that the user named and that are lost"
    # Words that answer something else.
    message = page.messages[-1]
    content = [part | {"text": "I like boats."} if part["type"] == "text" else part for part in message["content"]]
    wrong = replace(page, messages=(*page.messages[:-1], message | {"content": content}))
    assert Checked()(wrong) == Dropped("words that do not say what was asked for")
    # One that was cut off.
    stops = ["max_tokens" for _ in page.notes["stops"]]
    assert Checked()(replace(page, notes=page.notes | {"stops": stops})).reason.startswith("answer that stopped: max_tokens")


def test_requests_are_different_and_none_is_an_exams(monkeypatch):
    chosen, _ = choose_seeds(40)
    assert len({world.words_of_user(world.drawn_record(seed)) for seed in chosen}) >= 38
    assert not any(world.drawn_record(seed)["held_out"] for seed in chosen)
    monkeypatch.setattr(world, "free_requests", lambda: [world.drawn_record(chosen[3])])
    others, refused = choose_seeds(40)
    assert chosen[3] not in others and refused["near to an exam's"] >= 1


def run_world(out, *more) -> dict:
    main(["--out", str(out), "--n", "8", "--painter", "renderer", *more])
    return json.loads((out / "manifest.json").read_text())


def test_the_whole_path_without_a_model(tmp_path, capsys):
    manifest = run_world(tmp_path / "a")
    assert manifest["records"] >= 7
    assert data.main(["check", str(tmp_path / "a" / "records.jsonl")]) == 0
    assert data.main(["check", str(tmp_path / "a" / "shards" / "synth-000000.tar")]) == 0
    assert run_world(tmp_path / "b")["files"] == manifest["files"]
    assert "8 requests; " in capsys.readouterr().out


def test_the_miniature_draws_once_and_then_from_the_disk(tmp_path, monkeypatch, duo):
    monkeypatch.setattr(world, "system", lambda painter, process: duo)
    painter = Painter(kept=str(tmp_path), steps=2, device="cpu")
    [page] = Requested().read(str(first_seed("recolour")))
    drawn = Drawn(painter)(page)
    assert [m["role"] for m in drawn.messages[:2]] == ["user", "assistant"]
    assert image_of(drawn.pictures[1]).size == (64, 64)
    record, files = record_of(drawn)
    assert len(files) == len({picture.sha256 for picture in drawn.pictures})
    monkeypatch.setattr(world, "system", None)
    assert Drawn(painter)(page) == drawn
    with pytest.raises(TypeError):
        Drawn(replace(painter, steps=3))(page)


# -------------------------------------------------------------------------------------------------------------------- servers


class Everything(BaseHTTPRequestHandler):
    """A language model, a painter and a judge in one."""

    calls = Counter()
    broken = False

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer({"data": [{"id": "everything"}]})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = self.path.removeprefix("/v1/")
        self.calls[kind] += 1
        if kind == "images/generations":
            picture = pictures(len(asked["prompt"]), 1)[0]
            words = base64.b64encode(b"broken" if "of 3" in asked["prompt"] else png(picture)).decode()
            return self.answer({"data": [{"b64_json": words}]})
        message = asked["messages"][0]["content"]
        text = message if isinstance(message, str) else " ".join(part.get("text", "") for part in message)
        self.answer(
            {
                "id": "1",
                "object": "chat.completion",
                "created": 1,
                "model": "everything",
                "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": self.say(text)}}],
                "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
            }
        )

    def say(self, text: str) -> str:
        if "request sheet" in text:
            return inventive(text + "x") if isinstance(inventive(text + "x"), str) else ""
        if "A user asks" in text:
            n = sum(map(ord, text)) % 5
            return "I cannot." if n == 4 else steps_json(2 + n % 3, end="Done.").replace("A thing", f"A thing of {n}")
        if "yes or no" in text:
            return "No." if "of 2" in text else "Yes."
        return '{"reason": "so", "score": 4}'

    def answer(self, value: dict):
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Everything) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        Everything.calls.clear()
        yield f"http://127.0.0.1:{http.server_port}/v1"
        http.shutdown()


def test_the_whole_path_with_servers(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(painters, "FIRST", 0.01)
    monkeypatch.setattr(synth, "seeds", lambda: seeds()[:8])
    names = ["--model-name", "everything", "--painter-name", "everything", "--judge-model", "everything"]
    everything = ["--model", server, "--painter", server, "--judge", server, *names, "--price", "1,2"]
    out = tmp_path / "out"
    main(["--out", str(out), "--n", "30", *everything])
    said = capsys.readouterr().out
    manifest = json.loads((out / "manifest.json").read_text())
    dropped = {kind for counts in manifest["counts"].values() for kind in counts if kind.startswith("dropped: ")}
    assert dropped == {
        "dropped: answer without steps",
        "dropped: painter without a picture",
        "dropped: picture that does not show its step",
    }
    assert 0 < manifest["records"] < manifest["synth"]["requests"] == 30
    assert data.main(["check", str(out / "records.jsonl")]) == 0
    assert "pictures painted" in said and "cost" in said and f"30 requests; {manifest['records']} records; " in said
    record = json.loads((out / "records.jsonl").read_text().splitlines()[0])
    assert [part["type"] for part in record["messages"][1]["content"]][-3:] == ["text", "image", "text"]
    # All of it again from what is kept: only those pictures are asked for that were never painted, the bytes are the same.
    asked = Counter(Everything.calls)
    main(["--out", str(out), "--n", "30", "--fresh", *everything])
    assert (Everything.calls - asked).keys() <= {"images/generations"}
    assert json.loads((out / "manifest.json").read_text())["files"] == manifest["files"]
    # And the same command once more has nothing to do.
    asked = Counter(Everything.calls)
    main(["--out", str(out), "--n", "30", *everything])
    assert Everything.calls == asked


def test_mistakes_are_one_line(tmp_path):
    out = ["--out", str(tmp_path / "out")]
    for wrong in (
        ["--n", "0"],
        ["--judge", "self"],
        ["--model", "self", "--painter", "renderer"],
        ["--model", "nonsense"],
        ["--model", "http://127.0.0.1:9/v1"],
        ["--model", "http://127.0.0.1:9/v1", "--model-name", "x"],
        ["--painter", "nonsense"],
        ["--painter", "http://127.0.0.1:9/v1"],
        ["--price", "cheap"],
    ):
        with pytest.raises(InputError):
            main([*out, *wrong])
