"""What is there twice: pages that say nearly the same, and pictures of a page that show nearly the same.

    rows = [signature(page) for page in pages]      first pass: a few numbers of every page
    Different(near_duplicates(rows))                second pass: the step that drops all but the first of each group

Pages are compared by datatrove's minhash over words, of Chinese over characters: its own tokenizers are packages that its core
does without. Pictures are compared by PDQ (facebook/ThreatExchange): 256 bits, of which near-duplicates share most.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

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


class Signature(NamedTuple):
    """Of a page. Two pages that share one of the buckets are taken to be near-duplicates."""

    id: str
    buckets: tuple[int, ...]  # 64 bits each; empty: the page has fewer words than a shingle


def signature(page: Page) -> Signature:
    shingles = minhash().get_shingles(plain(page.text))
    if not shingles.size:
        return Signature(page.id, ())
    buckets = minhash().get_signature(shingles)
    # Only whether all hashes of a bucket agree matters, so one number stands for the eight.
    return Signature(page.id, tuple(int(mixed(np.array(hashes, dtype=np.uint64))) for hashes in buckets))


def mixed(hashes: np.ndarray) -> np.uint64:
    """One number of several: FNV-1a over 64-bit words, modulo 2^64."""
    value = np.uint64(0xCBF29CE484222325)
    with np.errstate(over="ignore"):
        for each in hashes:
            value = (value ^ each) * np.uint64(0x100000001B3)
            value ^= value >> np.uint64(32)
    return value


def near_duplicates(rows: Iterable[Signature]) -> dict[str, str]:
    """What lies between the passes: {id of a page to drop: id of the page that stays}, the first of a group by its id.

    About 250 bytes of memory a page.
    """
    # In the order of ids, whatever order the processes came in.
    rows = sorted(row for row in rows if row.buckets)
    if not rows:
        return {}
    ids = [row.id for row in rows]
    table = np.array([row.buckets for row in rows], dtype=np.uint64)  # (pages, buckets)
    first = list(range(len(ids)))  # of each page an earlier one of its group, or itself

    def root(page: int) -> int:
        while first[page] != page:
            first[page] = first[first[page]]
            page = first[page]
        return page

    for column in table.T:
        order = np.argsort(column, kind="stable")
        same = np.flatnonzero(column[order][1:] == column[order][:-1])
        for k in same:
            a = root(int(order[k]))
            b = root(int(order[k + 1]))
            first[max(a, b)] = min(a, b)
    return {ids[page]: ids[root(page)] for page in range(len(ids)) if root(page) != page}


@dataclass(frozen=True)
class Different:
    """Drops pages that nearly say what an earlier one says."""

    same: dict[str, str] = field(default_factory=dict)  # from `near_duplicates`

    def __call__(self, page: Page) -> Page | Dropped:
        other = self.same.get(page.id)
        return page if other is None else Dropped(f"near-duplicate page: of {other}")


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
    """Refuses a picture that nearly shows what the picture before it shows."""

    distance: int = 31  # bits of 256 in which near-duplicates differ, at most; PDQ's own advice
    quality: int = 50  # of a hash that says something, at least; PDQ's own advice
    apart: int = 0  # the distance where words stand between the two
    side: int = 512  # pixels to which a picture is resized first; PDQ's own advice

    def __call__(self, page: Page) -> Page | Dropped:
        reasons = {}
        before = None  # hash and quality of the picture that stays
        number = -1
        words = False  # since that picture
        for part in page.parts:
            if not isinstance(part, Picture):
                words = True
                continue
            number += 1
            try:
                bits, quality = pdq(part.data, self.side)
            except InputError:
                continue
            if before is not None and min(quality, before[1]) >= self.quality:
                far = int((bits != before[0]).sum())
                if far <= (self.apart if words else self.distance):
                    reasons[number] = f"near-duplicate picture: {far} bits from the one before"
                    continue
            before = bits, quality
            words = False
        return page.without(reasons) if reasons else page
