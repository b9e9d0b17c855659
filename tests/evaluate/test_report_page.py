"""The report of 500 answers in a real browser, on a desk and on a phone."""

import random
import time
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from evaluate import figures, judging
from evaluate.answers import Answers, claim, items_of
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE, Verdict, find
from pages.answer import harmless_json

SECONDS = 5  # until 500 answers are there and can be filtered
COLOURS = ("red", "blue", "green", "yellow")


class Moody:
    """A judge by chance, which now and then refuses."""

    def __init__(self):
        self.chance = random.Random(0)

    def rating(self, rubric, *content, low, high):
        chance = self.chance
        why = chance.choices((JUDGED, REFUSED, UNPARSABLE), (90, 5, 5))[0]
        value = round(chance.uniform(low, high), 2) if why == JUDGED else None
        return Verdict(value, why, "It says what to do, but the third picture shows another cup. " * chance.randint(1, 4))


def picture(number: int) -> Image.Image:
    image = Image.new("RGB", ((256, 256), (384, 216), (216, 384))[number % 3], "white")
    ImageDraw.Draw(image).ellipse((20, 20, 190, 190), COLOURS[number % 4])
    return image


def answer(folder: Path, number: int, files: list[bytes]) -> None:
    """Some have no picture, and one holds what no line can be broken in."""
    folder.mkdir(parents=True)
    parts = []
    for k in range(number % 5):
        text = f"Step {k + 1}: put the {COLOURS[k % 4]} part where the last one ends, then press."
        parts.append({"type": "text", "text": text})
        parts.append({"type": "image", "image": f"image_{k + 1:02d}.png"})
        (folder / f"image_{k + 1:02d}.png").write_bytes(files[(number + k) % len(files)])
    parts.append({"type": "text", "text": "x" * 400 if number == 7 else "Now it is done."})
    (folder / "answer.json").write_text(harmless_json({"parts": parts}))


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("report")
    module = find("howto500")
    requests, items = items_of(module, None, None)
    system = {"mllm": "somebody/" + "m" * 80}
    claim(out, {"benchmark": "howto500", "items": items, "items from": None, "n": None, "system": system})
    files = []
    for number in range(12):
        picture(number).save(out / "picture.png")
        files.append((out / "picture.png").read_bytes())
    for number, request in enumerate(requests):
        answer(out / "answers" / request.id, number, files)
    folder = out / "judged" / "moody"
    folder.mkdir(parents=True)
    judging.introduce(folder, {"judge": "moody", "identity": {}, "prompts": judging.prompt_hash(module)})
    answers = Answers(out / "answers", requests)
    judge = Moody()
    for request in requests:
        scores = {name: v._asdict() for name, v in module.score(request, answers.read(request.id), judge).items()}
        row = {"id": request.id, "meta": request.meta, "answer": answers.fingerprint(request.id), "scores": scores}
        (folder / f"{request.id}.json").write_text(harmless_json(row))
    figures.main(["--out", str(out), "--draws", "20"])
    return out / "report.html"


def shown(page) -> int:
    return page.locator("article:not([hidden])").count()


@pytest.mark.parametrize("width", [1280, 390])
def test_500_answers_are_soon_there_and_nothing_is_asked_of_others(report, visit, width):
    page = visit(width, 844)
    began = time.monotonic()
    page.goto(report.as_uri())
    assert shown(page) == 500
    page.fill("[name=words]", "Step 4")
    page.wait_for_function("document.querySelector('output').textContent.startsWith('100 ')")
    assert time.monotonic() - began < SECONDS
    page.fill("[name=words]", "")
    # Further down pictures are fetched, from this folder alone.
    page.locator("article img").nth(60).scroll_into_view_if_needed()
    page.wait_for_function("[...document.images].some(image => image.complete && image.naturalWidth)")
    assert len(page.requests) > 1 and all(url.startswith(report.parent.as_uri() + "/") for url in page.requests)
    assert not page.errors
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_filters_and_order(report, visit):
    page = visit()
    page.goto(report.as_uri())
    goodness = [float(value) for value in page.locator("article").evaluate_all("all => all.map(a => a.dataset.goodness)")]
    assert goodness == sorted(goodness) and goodness[0] < goodness[-1]
    page.select_option("[name=order]", "-1")
    turned = page.locator("article").evaluate_all("all => all.map(a => Number(a.dataset.goodness))")
    assert turned == goodness[::-1]

    words = page.locator("article").evaluate_all("all => all.map(a => a.dataset.why)")
    whys = Counter(" ".join(words).split())
    assert set(whys) == {"judged", "refused", "unparsable", "missing"}
    for why, number in whys.items():
        page.select_option("[name=why]", why)
        assert shown(page) == number
        assert page.locator("output").inner_text() == f"{number} of 500 answers"
    # Both filters at once, whatever the case of letters.
    page.fill("[name=words]", "STEP 4")
    page.select_option("[name=why]", "refused")
    assert 0 < shown(page) < whys["refused"]
    page.fill("[name=words]", "no such words")
    assert shown(page) == 0
    assert not page.errors


def test_a_judgement_is_unfolded(report, visit):
    page = visit(390, 844)
    page.goto(report.as_uri())
    score = page.locator("details", has=page.locator("summary", has_text="T-Com")).first
    words = score.locator(".text")
    assert not words.is_visible()
    score.locator("summary").click()
    assert words.is_visible() and "third picture" in words.inner_text()
