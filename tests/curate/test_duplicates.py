"""Near-duplicates: of pages by minhash, of pictures by PDQ."""

import io
import json
import random
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
import realpages
from PIL import Image, ImageFilter
from scripted import picture

from curate.duplicates import DifferentPages, DifferentPictures, grouped, pdq
from curate.page import Dropped, Page

WORDS = [f"w{chr(97 + k // 26)}{chr(97 + k % 26)}" for k in range(500)]
HAN = [chr(0x4E00 + k) for k in range(500)]


def text(seed: int, words: list[str], n: int = 300) -> list[str]:
    chance = random.Random(seed)
    return [chance.choice(words) for _ in range(n)]


def found(pages: list[Page]) -> dict[str, str]:
    """As the engine asks."""
    survey = DifferentPages()
    seen = ((page.id, survey.observe(page)) for page in pages)
    return json.loads(json.dumps(survey.conclude((id, each) for id, each in seen if each is not None)))


@pytest.mark.parametrize("words, joint", [(WORDS, " "), (HAN, "")], ids=["words", "characters"])
def test_pages_with_a_few_changed_words_are_found(words, joint):
    """And no others; the first of a group stays."""
    pages = []
    for k in range(20):
        original = text(k, words)
        changed = list(original)
        for place in (50, 150, 250):
            changed[place] = words[0]
        pages += [Page(f"{k:02}a", parts=(joint.join(original),)), Page(f"{k:02}b", parts=(joint.join(changed),))]
    same = found(pages)
    assert same == {f"{k:02}b": f"{k:02}a" for k in range(20)}
    assert found(pages[::-1]) == {first: second for second, first in same.items()}
    step = DifferentPages()
    assert step(pages[1], same) == Dropped("near-duplicate page: of 00a")
    assert step(pages[0], same) is pages[0]


def test_a_chain_is_one_group():
    table = np.array([[3, 9], [1, 2], [1, 9], [7, 7], [8, 2]], dtype=np.uint64)
    assert grouped(table) == [0, 0, 0, 3, 0]


def test_pages_without_a_shingle_are_nobodys_duplicate():
    short = [Page(id, parts=("Too short.",)) for id in "ab"]
    assert DifferentPages().observe(short[0]) is None
    assert found(short) == found([]) == {}


DUPLICATES = {"38002b2c4cbe", "77814fcf4d10", "ad62af146666", "b8d1294c4432", "dc64c835d0b3"}


def test_real_pages_that_say_the_same(shared):
    """Instructions for four browsers, a quiz and its answers, a manual and that of its next version."""
    pages = realpages.read(shared, pictures=False)
    same = found(sorted(pages, key=lambda page: page.id))
    assert same.keys() == DUPLICATES


# ---------------------------------------------------------------------------------------------------------------- pictures


def photo(seed: int) -> Image.Image:
    """Soft blobs: a hash of them has quality."""
    noise = np.random.default_rng(seed).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((400, 300), Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(2))


def file(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


FIRST = picture("1.png", file(photo(1)))
SMALLER = picture("1s.jpg", file(photo(1).resize((200, 150)), "JPEG", quality=70))
OTHER = picture("2.png", file(photo(2)))


def test_the_same_picture_in_another_size_and_format_is_refused():
    page = DifferentPictures()(Page("a", parts=("Text.", FIRST, SMALLER, OTHER)))
    assert page.pictures == [FIRST, OTHER]
    assert [each.address for each in page.refused] == [SMALLER.address]
    assert page.refused[0].reason == "near-duplicate picture: of the one before"


def test_with_words_between_only_the_same_file_is_refused():
    """A screen before and after a step differs in a few bits, and that is what the step is about."""
    page = Page("a", parts=(FIRST, "Press the button.", SMALLER, "Press it again.", SMALLER))
    assert DifferentPictures()(page).pictures == [FIRST, SMALLER]


def test_hashes_without_quality_say_nothing():
    flat = [picture(f"{k}.png", file(Image.new("RGB", (300, 300), (250, 250, 250 - k)))) for k in range(2)]
    assert pdq(flat[0].data, 256)[1] < 50
    page = Page("a", parts=tuple(flat))
    assert DifferentPictures()(page) == page


def test_a_broken_picture_is_nobodys_duplicate():
    broken = picture("b.png", b"no picture")
    page = Page("a", parts=(FIRST, broken, replace(FIRST, address="https://example.org/again")))
    assert DifferentPictures()(page) == page
