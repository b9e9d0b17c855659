"""What is there twice: pages that say nearly the same, and pictures of a page that show nearly the same.

    DifferentPages()        of pages that nearly say the same, the first stays
    DifferentPictures()     of pictures in a row that nearly show the same, the first stays

Pages are compared by datatrove's minhash over words, of Chinese over characters: its own tokenizers are packages that its core
does without. Pictures are compared by PDQ (facebook/ThreatExchange): 256 bits, of which near-duplicates share most.
"""

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
import pdqhash
from datatrove.pipeline.dedup.minhash import MinhashConfig, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig
from datatrove.utils.word_tokenizers import WordTokenizer
from PIL import Image

from checkpoint import InputError
from curate.page import Dropped, Page, Picture
from curate.text import plain, tokens
from records.validate import load_image

# datatrove's own choice, that of FineWeb: two pages that share 80 % of their shingles are found in 92 of 100 cases, two that
# share 50 % in 5. sha1, as xxhash is a package of its own.
MINHASH = MinhashConfig(n_grams=5, num_buckets=14, hashes_per_bucket=8, hash_config=HashConfig(precision=64, hash_fc="sha1"))


class Tokens(WordTokenizer):
    """Words and Chinese characters in datatrove's form."""

    def word_tokenize(self, text: str) -> list[str]:
        return tokens(text)

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        raise NotImplementedError("minhash has no use for it")


@cache
def minhash() -> MinhashDedupSignature:
    return MinhashDedupSignature(output_folder=".", config=MINHASH, language=Tokens())


def signature(text: str) -> list[int]:
    """64 bits for each bucket: texts that share one of them are taken to be near-duplicates. [] of a text without a shingle."""
    shingles = minhash().get_shingles(plain(text))
    if not shingles.size:
        return []
    buckets = minhash().get_signature(shingles)
    # Only whether all hashes of a bucket agree matters, so one number stands for the eight.
    return [mixed(hashes) for hashes in buckets]


def mixed(hashes: list[int]) -> int:
    """One number of 64 bits for several."""
    digest = hashlib.sha1(np.array(hashes, dtype=np.uint64).tobytes()).digest()
    return int.from_bytes(digest[:8], "little")


@dataclass(frozen=True)
class DifferentPages:
    """Drops pages that nearly say what an earlier one says; an engine.Survey, for it must know them all."""

    def observe(self, page: Page) -> list[int] | None:
        return signature(page.text) or None

    def conclude(self, observed: Iterator[tuple[str, list[int]]]) -> dict[str, str]:
        """{id of a page to drop: id of the page that stays}, the first of its group. About 250 bytes of memory a page."""
        ids = []
        rows = array("Q")
        for id, buckets in observed:
            ids.append(id)
            rows.extend(buckets)
        if not ids:
            return {}
        table = np.frombuffer(rows, np.uint64).reshape(len(ids), -1)  # (pages, buckets)
        return {id: ids[first] for id, first in zip(ids, grouped(table), strict=True) if id != ids[first]}

    def __call__(self, page: Page, found: dict[str, str]) -> Page | Dropped:
        other = found.get(page.id)
        return page if other is None else Dropped(f"near-duplicate page: of {other}")


def grouped(table: np.ndarray) -> list[int]:
    """The number of the first row of each row's group: rows that agree in a column, directly or by way of others.

    table: (rows, columns)
    """
    first = list(range(len(table)))  # of each row an earlier one of its group, or itself

    def root(row: int) -> int:
        while first[row] != row:
            first[row] = first[first[row]]
            row = first[row]
        return row

    for column in table.T:
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order][1:] == column[order][:-1])
        for k in same:
            a = root(int(order[k]))
            b = root(int(order[k + 1]))
            first[max(a, b)] = min(a, b)
    return [root(row) for row in range(len(table))]


# ---------------------------------------------------------------------------------------------------------------- pictures


def pdq(data: bytes, side: int) -> tuple[np.ndarray, int]:
    """(256 bits, quality 0 to 100) of a picture's file. InputError where it is none."""
    image = load_image(data)
    # PDQ blurs by a window that follows the size: pictures are compared at one size.
    image = image.resize((side, side), Image.Resampling.BOX)
    bits, quality = pdqhash.compute(np.asarray(image))
    return bits.astype(bool), int(quality)


@dataclass(frozen=True)
class DifferentPictures:
    """Refuses a picture that nearly shows what the picture before it shows.

    Where words stand between the two, it must be the same file: a screen before and after a step differs in few bits (16 to 28
    on real guides), and that is what the step is about.
    """

    distance: int = 31  # bits of 256 in which near-duplicates differ, at most; PDQ's own advice
    quality: int = 50  # of a hash that says something, at least; PDQ's own advice
    side: int = 256  # pixels to which a picture is resized first; PDQ's advice is 512, but it looks at 64 in the end

    def __call__(self, page: Page) -> Page | Dropped:
        if len(page.pictures) < 2:
            return page
        reasons = {}
        before: Picture | None = None  # the picture that stays
        number = -1
        words = False  # since that picture
        for part in page.parts:
            if not isinstance(part, Picture):
                words = True
                continue
            number += 1
            if before is not None:
                same = self.same_file(before, part) or (not words and self.alike(before, part))
                if same:
                    reasons[number] = "near-duplicate picture: of the one before"
                    continue
            before = part
            words = False
        return page.without(reasons) if reasons else page

    def same_file(self, a: Picture, b: Picture) -> bool:
        return bool(a.data) and a.data == b.data

    def alike(self, a: Picture, b: Picture) -> bool:
        try:
            first, one = pdq(a.data, self.side)
            second, two = pdq(b.data, self.side)
        except InputError:
            return False
        return min(one, two) >= self.quality and int((first != second).sum()) <= self.distance
