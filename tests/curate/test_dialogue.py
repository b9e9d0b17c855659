"""Dialogues: the question, the answer in steps, and a record that the rest of the project reads."""

import io
from collections import Counter
from dataclasses import replace

import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
import realpages
from PIL import Image
from scripted import Scripted, picture

from checkpoint import InputError
from curate.dialogue import (
    Dialogue,
    answer_of,
    drawn,
    ending_of,
    question_by_rules,
    questions,
    record_of,
    steps_of,
    subject,
)
from curate.page import Dropped, Page
from curate.rewrite import Clean
from curate.text import Language
from evaluate.judges import Unanswered
from records.validate import validate


def file(kind: str) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(data, kind)
    return data.getvalue()


FIRST = picture("1", file("PNG"), alt="The finished boat")
SECOND = picture("2", file("JPEG"), caption="Both corners are folded")
THIRD = picture("3", file("WEBP"))
TEXT = "# Paper boat\n\nYou need a sheet.\n\n## Folding\n\n1. Fold it in half.\n2. Fold the corners."
PAGE = Page("page/1", title="How to fold a paper boat", language="en", parts=(FIRST, TEXT, SECOND, THIRD, "3. Done."))


# ---------------------------------------------------------------------------------------------------------------- question


@pytest.mark.parametrize(
    "title, text, found",
    [("How to fold a boat?", "", ("how", "fold a boat")), ("如何折纸船", "", ("how", "折纸船")),
     ("干煎阿根廷红虾的做法", "", ("dish", "干煎阿根廷红虾")), ("Pan pizza", "## Ingredients\n\nFlour", ("dish", "Pan pizza")),
     ("Sweet Potato Fries Recipe", "", ("dish", "Sweet Potato Fries")), ("Foil circuits", "", ("thing", "Foil circuits")),
     ("Make", "## Materials\n\n## Duct tape wallet", ("thing", "Duct tape wallet")), ("", "Text.", ("", ""))],
)  # fmt: skip
def test_how_a_title_is_asked_about(title, text, found):
    assert subject(Page("a", title=title, parts=(text,))) == found


def test_tones_differ_and_follow_from_the_page_and_the_seed():
    pages = [replace(PAGE, id=str(k)) for k in range(300)]
    asked = [Dialogue()(page) for page in pages]
    tones = Counter(page.notes["Dialogue"]["tone"] for page in asked)
    assert tones.keys() == questions()["tones"].keys() and min(tones.values()) > 30
    texts = {page.messages[0]["content"][0]["text"] for page in asked}
    assert len(texts) > 15 and all("fold a paper boat" in text for text in texts)
    assert [Dialogue()(page) for page in pages] == asked
    assert [Dialogue(seed=1)(page) for page in pages] != asked


def test_every_sentence_has_its_place_and_both_languages_have_all_tones():
    tones = questions()["tones"].keys()
    for language in ("en", "zh"):
        for kind in ("how", "thing", "dish"):
            assert questions()[language][kind].keys() == tones
            assert all(text.count("{what}") == 1 for texts in questions()[language][kind].values() for text in texts)


def test_nobody_asks_for_pictures_of_a_page_without():
    bare = replace(PAGE, parts=("1. Fold it.",))
    for k in range(200):
        question = question_by_rules(replace(bare, id=str(k)), "plain", 0)
        assert "picture" not in question.lower()


def test_a_page_whose_title_says_nothing_is_dropped():
    assert Dialogue()(Page("a", title="Introduction", parts=("Words.",))) == Dropped("no question: the title says nothing")


def test_a_model_asks():
    model = Scripted('"How does one fold a boat out of paper?"')
    page = Dialogue(model)(PAGE)
    assert page.messages[0] == {"role": "user", "content": [{"type": "text", "text": "How does one fold a boat out of paper?"}]}
    asked = model.asked[0][0]
    assert questions()["tones"][page.notes["Dialogue"]["tone"]] in asked and "in English" in asked and TEXT in asked


@pytest.mark.parametrize(
    "answer, why",
    [("", "it is empty"), ("How? " * 80, "it is too long"), ("What does this guide say about boats?", "it speaks of the page"),
     ("Wie falte ich ein Boot aus einem Blatt Papier?", "it is in another language"), (Unanswered("gone"), "gone")],
)  # fmt: skip
def test_a_model_that_does_not(answer, why):
    assert Dialogue(Scripted(lambda asked: answer))(PAGE) == Dropped(f"no question: {why}")


def test_a_model_is_shown_the_beginning_of_a_long_page():
    model = Scripted("How do I fold a boat?")
    long = replace(PAGE, parts=("Fold it again and again. " * 2000,))
    Dialogue(model)(long)
    assert len(model.asked[0][0].split()) < 900


# ------------------------------------------------------------------------------------------------------------------ answer


def test_steps():
    steps = steps_of(TEXT)
    assert steps == [
        "# Paper boat\n\nYou need a sheet.\n\n", "## Folding\n\n1. Fold it in half.\n", "2. Fold the corners.",
    ]  # fmt: skip
    assert "".join(steps) == TEXT
    assert steps_of("- a\n- b") == ["- a\n- b"]


def test_the_answer_has_a_text_before_each_picture_that_has_words():
    content = answer_of(PAGE)
    assert [part.get("text", part.get("image")) for part in content] == [
        "The finished boat", 0, "# Paper boat\n\nYou need a sheet.\n\n",
        "## Folding\n\n1. Fold it in half.\n", "2. Fold the corners.", 1, 2, "3. Done.",
    ]  # fmt: skip


def test_the_title_is_not_said_again():
    assert answer_of(Page("a", parts=(TEXT,)))[0]["text"] == "You need a sheet.\n\n"


def test_a_page_without_words_is_dropped():
    assert Dialogue()(Page("a", title="A title", parts=(THIRD,))) == Dropped("no text")


def test_what_is_drawn_is_the_same_everywhere():
    assert [drawn(10, "tone", 0, "a"), drawn(10, "tone", 1, "a"), drawn(10, "tone", 0, "b")] == [0, 6, 2]
    assert {drawn(3, k) for k in range(50)} == {0, 1, 2}


# ------------------------------------------------------------------------------------------------------------------ record


def test_the_record_and_its_files():
    record, files = record_of(Dialogue()(PAGE))
    assert files == {"page-1.0.png": FIRST.data, "page-1.1.jpg": SECOND.data, "page-1.2.webp": THIRD.data}
    assert [message["role"] for message in record["messages"]] == ["user", "assistant"]
    assert validate(record, files.__getitem__) == []
    assert record_of(Dialogue()(PAGE), "000017")[1].keys() == {"000017.0.png", "000017.1.jpg", "000017.2.webp"}


def test_a_page_without_messages_has_no_record():
    with pytest.raises(InputError, match="has not been through Dialogue"):
        record_of(PAGE)


@pytest.mark.parametrize(
    "kind, ending", [("PNG", "png"), ("JPEG", "jpg"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tif"), ("WEBP", "webp")]
)
def test_endings_follow_the_bytes(kind, ending):
    assert ending_of(picture("a.xyz", file(kind))) == ending


def test_real_pages_become_records_without_a_warning(shared):
    """All but two, whose titles say nothing; every picture of a page is in its record, in order."""
    pages = [Language("en,zh,ja")(page) for page in realpages.read(shared)[::3]]
    dropped = []
    for page in pages:
        page = Dialogue()(Clean()(page))
        if isinstance(page, Dropped):
            dropped.append(page.reason)
            continue
        record, files = record_of(page)
        assert validate(record, files.__getitem__, pictures=False) == []
        assert list(files.values()) == [each.data for each in page.pictures]
    assert dropped.count("no question: the title says nothing") == len(dropped) <= 2
