"""A dialogue that goes on: in the terminal, from a folder, from the middle of an answer; and the film of an answer."""

import io
import json

import numpy as np
import pytest
from PIL import Image

import sample
from checkpoint import BUNDLED, InputError
from pages.answer import dialogue_of
from pages.film import FINISHED, STEP, Film
from pipeline import DuoGen

QUICK = ["--steps", "3", "--max-images", "2"]


@pytest.fixture(scope="module")
def duo():
    return DuoGen.from_pretrained(BUNDLED)


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Where answers go; the checkpoint is read once for all tests."""
    return tmp_path / "out"


@pytest.fixture(autouse=True)
def loaded_once(monkeypatch, duo):
    monkeypatch.setattr(DuoGen, "from_pretrained", lambda *args, **options: duo)


def ask(out, *flags: str) -> int:
    return sample.main([*QUICK, "--out", str(out), *flags])


def saved(folder) -> dict:
    return json.loads((folder / "answer.json").read_text())


def test_an_answer_is_continued_from_its_folder(out, duo):
    """As if it had never been left: the picture was rounded to 8 bits before it was saved, too."""
    assert ask(out, "--prompt", "Draw a red star.") == 0
    assert ask(out, "--continue", str(out / "draw-a-red-star"), "--prompt", "Make the star blue.") == 0
    settings = duo.settings(steps=3, max_images=2)
    first = duo.generate("Draw a red star.", settings)
    at_once = duo.generate([*first.messages, first.message, {"role": "user", "content": "Make the star blue."}], settings)
    folder = out / "make-the-star-blue"
    assert saved(folder)["parts"][0]["text"] == at_once.parts[0]
    assert Image.open(folder / "image_01.png").tobytes() == at_once.pictures[0].image.tobytes()
    assert [m["role"] for m in saved(folder)["messages"]] == ["user", "assistant", "user"]
    # And that one in its turn.
    assert len(dialogue_of(folder)) == 4
    assert ask(out, "--continue", str(folder), "--prompt", "What is this?") == 0


def test_chat_answers_each_question_in_the_light_of_all_before(out, monkeypatch, capsys):
    lines = iter(["Make the star blue.", "/image nowhere.png", "  ", "never asked"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    assert ask(out, "--chat", "--prompt", "Draw a red star.") == 0
    told = capsys.readouterr()
    assert "red star" in told.out and "blue" in told.out and "never" not in told.out
    assert "nowhere.png: no such file" in told.err
    messages = saved(out / "make-the-star-blue")["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "user"]
    assert [p["type"] for p in messages[1]["content"]] == ["text", "image"]


def test_chat_takes_pictures_and_ends_with_the_input(out, monkeypatch, tmp_path, capsys):
    Image.new("RGB", (64, 64), "white").save(tmp_path / "a page.png")
    lines = iter([f"/image {tmp_path / 'a page.png'}", "What is this?"])

    def read(_: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    assert ask(out, "--chat") == 0
    assert saved(out / "what-is-this")["user_images"] == ["input_01.png"]


def test_mistakes(out, tmp_path, capsys):
    for flags, told in (
        (["--continue", str(tmp_path), "--prompt", "x"], "holds no answer.json"),
        (["--continue", str(tmp_path)], "--continue needs a --prompt"),
        (["--prompts", "x.jsonl", "--chat"], "--chat and --prompts exclude each other"),
        (["--prompts", "x.jsonl", "--film"], "--film and --prompts exclude each other"),
        (["--prompts", "x.jsonl", "--continue", "y"], "--continue and --prompts exclude each other"),
    ):
        assert ask(out, *flags) == 2
        assert told in capsys.readouterr().err
    # A file from a stranger reads no other file of this disk, and one that is no answer is told as such.
    (tmp_path / "secret.png").write_bytes(b"secret")
    evil = tmp_path / "evil"
    evil.mkdir()
    parts = [{"type": "image", "image": "../secret.png"}]
    (evil / "answer.json").write_text(json.dumps({"messages": [], "parts": parts}))
    assert dialogue_of(evil)[0]["content"][0]["image"] == evil / "secret.png"
    (evil / "answer.json").write_text(json.dumps({"messages": 3}))
    with pytest.raises(InputError, match="not as sample.py writes it"):
        dialogue_of(evil)


def test_a_film_shows_every_step_and_holds_what_is_finished(out):
    assert ask(out, "--prompt", "How do I draw a house?", "--film") == 0
    folder = out / "how-do-i-draw-a-house"
    film = Image.open(folder / "film.webp")
    shown = []
    for n in range(film.n_frames):
        film.seek(n)
        film.load()  # only then does Pillow know how long it is shown
        shown.append(film.info["duration"])
    # Two pictures of three steps, whose last is the picture itself.
    assert shown == [STEP, STEP, FINISHED] * 2
    assert "data:image/webp;base64," in (folder / "index.html").read_text()
    last = np.asarray(film.convert("RGB"), dtype=float)
    finished = Image.open(folder / "image_02.png").resize(film.size, Image.Resampling.BICUBIC)
    assert np.abs(last - np.asarray(finished, dtype=float)).mean() < 8
    # Without the flag there is none.
    assert ask(out, "--prompt", "Draw a red star.") == 0
    assert not (out / "draw-a-red-star" / "film.webp").exists()
    assert "image/webp" not in (out / "draw-a-red-star" / "index.html").read_text()


def test_a_film_of_pictures_of_two_sizes_and_of_none():
    film = Film(lambda latent: latent)
    assert film.webp([]) == b""
    film.frames[0] = [Image.new("RGB", (40, 20), colour) for colour in ("white", "red")]
    data = film.webp([Image.new("RGB", (40, 20), "red"), Image.new("RGB", (20, 40), "blue")])
    moving = Image.open(io.BytesIO(data))
    assert moving.n_frames == 3 and moving.size[0] == moving.size[1]


def test_what_is_watched_are_predictions_that_end_in_the_picture(duo):
    seen = []
    duo.watch = lambda request, step, latent: seen.append((request.number, step, duo.decoded(latent)))
    try:
        answer = duo.generate("Draw a red star.", duo.settings(steps=4))
    finally:
        duo.watch = None
    assert [(number, step) for number, step, _ in seen] == [(0, k) for k in range(4)]
    assert seen[-1][2].tobytes() == answer.pictures[0].image.tobytes()
    plain = duo.generate("Draw a red star.", duo.settings(steps=4))
    assert plain.pictures[0].image.tobytes() == answer.pictures[0].image.tobytes()


def test_an_answer_that_has_begun_goes_on(duo):
    """Text and pictures that are given count as if they had been written; a picture can be asked for."""
    settings = duo.settings(steps=3)
    prompt = "How do I draw a house?"
    whole = duo.generate(prompt, settings)
    given = [whole.parts[0], whole.parts[1].image]
    rest = duo.answer(prompt, settings, begun=given)
    for _ in duo.stream(rest):
        pass
    assert rest.given == 2 and rest.text == whole.text and len(rest.pictures) == len(whole.pictures)
    for one, other in zip(rest.pictures, whole.pictures, strict=True):
        assert max(abs(a - b) for a, b in zip(one.image.tobytes(), other.image.tobytes(), strict=True)) <= 2
    drawn = duo.answer(prompt, settings, begun=["Step 1: "], drawing=True)
    for _ in duo.stream(drawn):
        pass
    assert drawn.parts[0] == "Step 1: " and not isinstance(drawn.parts[1], str)
