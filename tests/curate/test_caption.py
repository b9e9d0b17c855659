"""Captions and classes: by rules on drawn and real pictures, and by a model that may say anything."""

import io
import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
from PIL import Image, ImageDraw, ImageFilter
from scripted import Scripted, picture

from curate.caption import Caption, caption_by_rules, kind_by_rules
from curate.page import Page
from evaluate.judges import Unanswered
from records.validate import load_image


def file(image: Image.Image) -> bytes:
    data = io.BytesIO()
    image.save(data, "PNG")
    return data.getvalue()


def photo() -> Image.Image:
    noise = np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC)


def document() -> Image.Image:
    image = Image.new("RGB", (300, 400), "white")
    draw = ImageDraw.Draw(image)
    for y in range(20, 380, 14):
        draw.text((20, y), "Lorem ipsum dolor sit amet, consectetur", fill="black")
    return image.filter(ImageFilter.GaussianBlur(0.5))


def screen() -> Image.Image:
    image = Image.new("RGB", (400, 300), (40, 44, 52))
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, 0, 400, 30), fill=(33, 110, 220))
    draw.rectangle((20, 60, 180, 280), fill=(90, 95, 105))
    draw.text((30, 70), "File  Edit  View", fill="white")
    return image


def test_kinds_by_rules():
    assert [kind_by_rules(image) for image in (photo(), screen(), document())] == ["photo", "screen", "document"]


def test_kinds_of_real_pictures(shared):
    """Of 72 pictures that were classed by looking at them, and on none of which the thresholds were found, 68 are right."""
    labelled = json.loads(Path(__file__).with_name("kinds.json").read_text())
    right = 0
    for kind, names in labelled.items():
        for name in names:
            found = kind_by_rules(load_image(shared / "howto" / "images" / f"{name}.jpg"))
            right += (found == "photo") == (kind == "photo")
    assert sum(map(len, labelled.values())) == 72
    assert right >= 67


@pytest.mark.parametrize(
    "alt, caption",
    [("A red pan on the stove", "A red pan on the stove"), ("image", ""), ("IMG_2034", ""), ("photo1.jpg", ""), ("", ""),
     ("图片", ""), ("红烧肉成品", "红烧肉成品"), ("  two \n lines ", "two lines")],
)  # fmt: skip
def test_alternative_text_counts_where_it_says_something(alt, caption):
    assert caption_by_rules(picture("a.jpg", alt=alt)) == caption


PAGE = Page("a", title="Tea", language="en", parts=("Boil water.", picture("1.png", file(photo()), alt="A kettle"), "Pour.",
                                                    picture("2.png", file(screen()))))  # fmt: skip


def test_without_a_model():
    page = Caption()(PAGE)
    assert [(each.kind, each.caption) for each in page.pictures] == [("photo", "A kettle"), ("screen", "")]
    assert page.notes == {"Caption": {"by rules": 2}}
    assert page.texts == PAGE.texts


def test_by_a_model():
    answers = iter([{"kind": "photo", "caption": "A kettle\n on a stove."}, {"kind": "document", "caption": "A table."}])
    model = Scripted(lambda asked: json.dumps(next(answers)))
    page = Caption(model)(PAGE)
    said = [(each.kind, each.caption) for each in page.pictures]
    assert said == [("photo", "A kettle on a stove."), ("document", "A table.")]
    assert page.notes == {"Caption": {"by the model": 2}}
    assert [asked[0] for asked in model.asked] == PAGE.pictures
    assert 'the title "Tea"' in model.asked[0][1] and "Write in English" in model.asked[0][1]


@pytest.mark.parametrize(
    "answer, why",
    [("A kettle.", "unreadable"), ('{"kind": "painting", "caption": "x"}', "unreadable"), ('{"kind": "photo"}', "unreadable"),
     ('{"kind": "photo", "caption": ""}', "unreadable"), ('{"kind": "photo", "caption": 7}', "unreadable"),
     ('["photo"]', "unreadable"), (json.dumps({"kind": "photo", "caption": "long " * 200}), "unreadable"),
     (Unanswered("gone"), "unanswered")],
)  # fmt: skip
def test_what_cannot_be_read_falls_back_on_rules(answer, why):
    page = Caption(Scripted(lambda asked: answer))(PAGE)
    assert [(each.kind, each.caption) for each in page.pictures] == [("photo", "A kettle"), ("screen", "")]
    assert page.notes == {"Caption": {"by rules": 2, why: 2}}


def test_pages_without_pictures_and_broken_pictures():
    empty = Page("a", parts=("Text.",))
    assert Caption()(empty) == empty
    assert Caption()(Page("a", parts=(picture("a.png", b"none"),))).pictures[0].kind == ""
