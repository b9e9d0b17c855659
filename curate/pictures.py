"""The pictures of a page: where their bytes come from, and which of them are refused.

Adverts()       before anything is fetched: addresses of adverts, counters, logos, avatars
Fill(...)       bytes, from the archive of the page, from beside its file, or over HTTP
Sound()         what is broken, hostile or animated; width and height from here on
Sides() Codes() Plain() Blurred()       small ones, strips; QR codes; near-uniform ones; blurred ones
Repeated()      what stands on many pages, by PDQ (facebook/ThreatExchange), over all pages
Balance()       pages without pictures: a share of them is kept
"""

import hashlib
import io
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np
import pdqhash
import zxingcpp
from PIL import Image

from checkpoint import InputError
from curate.fetch import Fetcher
from curate.page import Dropped, Page, Picture
from curate.read import Archives
from records.validate import FORMATS, load_image

SIDE = 768  # pixels of the longer side at which pictures are looked at


class Look(NamedTuple):
    """What the steps see of a picture."""

    image: Image.Image  # RGB, at most SIDE pixels wide and high
    width: int  # of the picture itself, as shown
    height: int
    moves: bool  # more than one frame


@lru_cache(maxsize=32)  # a page's pictures are looked at by several steps, one after the other
def look(data: bytes) -> Look:
    """A picture's file, decoded. InputError where it cannot be, or would be too large."""
    image = load_image(data)
    width, height = image.size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about broken metadata
        with Image.open(io.BytesIO(data), formats=FORMATS_HERE) as file:
            # Of the two frames that a phone puts into a JPEG one is for a second screen.
            moves = getattr(file, "n_frames", 1) > 1 and file.format != "MPO"
    image.thumbnail((SIDE, SIDE), Image.Resampling.BILINEAR, reducing_gap=2.0)
    return Look(image, width, height, moves)


Image.init()
FORMATS_HERE = [name for name in FORMATS if name in Image.OPEN]


def refusing(page: Page, why: Callable[[Picture], str]) -> Page:
    """Without the pictures of which why(picture) is a reason and not empty."""
    reasons = {k: reason for k, picture in enumerate(page.pictures) if (reason := why(picture))}
    return page.without(reasons) if reasons else page


def changing(page: Page, change: Callable[[Picture], Picture]) -> Page:
    """With each picture as change(picture) is; without those for which it raises an InputError, whose words are the reason."""
    parts = []
    reasons = {}
    number = -1
    for part in page.parts:
        if isinstance(part, Picture):
            number += 1
            try:
                part = change(part)
            except InputError as e:
                reasons[number] = str(e)
        parts.append(part)
    page = replace(page, parts=tuple(parts))
    return page.without(reasons) if reasons else page


# ------------------------------------------------------------------------------------------------------------- addresses


@dataclass(frozen=True)
class Adverts:
    """Refuses pictures by words of their address, before they are fetched: whole words of hosts, folders and file names."""

    hosts: str = "ad ads adserver adservice adsystem doubleclick googlesyndication taboola outbrain criteo gravatar"
    folders: str = "ad ads advert adverts advertisement banners sponsors sponsored avatar avatars icons emoji smilies badges"
    names: str = "ad ads advert advertisement sponsor logo favicon avatar icon sprite gravatar emoji badge captcha"

    def __call__(self, page: Page) -> Page:
        return refusing(page, self._why)

    def _why(self, picture: Picture) -> str:
        split = urlsplit(picture.address)
        folder, _, name = split.path.rpartition("/")
        for text, words in ((split.hostname or "", self.hosts), (folder, self.folders), (name, self.names)):
            # Whole words, but for numbers behind them: "ad" does not stand in 6704ad69.jpg, nor "logo" in logon.jpg.
            found = {word.rstrip("0123456789") for word in re.split(r"[^a-z0-9]+", text.lower())} & set(words.split())
            if found:
                return f"advertising address: {min(found)}"
        return ""


# ----------------------------------------------------------------------------------------------------------------- bytes


@dataclass(frozen=True)
class Fill:
    """Gives pictures their bytes, from the first place that has them."""

    roots: tuple[tuple[str, str], ...] = ()  # (name in Page.notes["root"], folder): where pictures of files lie
    archives: Archives | None = None  # of WARC files
    fetcher: Fetcher | None = None  # None: nothing is fetched
    most: int = 20_000_000  # bytes of a picture

    def __call__(self, page: Page) -> Page:
        return changing(page, lambda picture: picture.filled(self._bytes(picture.address, page)))

    def _bytes(self, address: str, page: Page) -> bytes:
        if not address.startswith(("http://", "https://")):
            return self._beside(address, page)
        data = self.archives.get(address, self.most) if self.archives else None
        if data is not None:
            return data
        if self.fetcher is None:
            raise InputError("not at hand: fetching is off" if not self.archives else "not at hand: not in the archives")
        return self.fetcher.get(address, page.url)

    def _beside(self, address: str, page: Page) -> bytes:
        """A file under the page's root; nothing else on this machine, whatever links lie there."""
        root = dict(self.roots).get(page.notes.get("root", ""))
        if root is None:
            raise InputError("not at hand: its page came from no folder")
        top = Path(root).resolve()
        try:
            path = (top / address).resolve()
        except (OSError, RuntimeError, ValueError):
            raise InputError("not at hand: no such file") from None
        if not path.is_relative_to(top):
            raise InputError("address: leads out of the folder")
        try:
            if not path.is_file():  # a pipe or a device would block, or never end
                raise InputError("not at hand: no such file")
            if path.stat().st_size > self.most:
                raise InputError(f"too many bytes: more than {self.most}")
            return path.read_bytes()
        except OSError as e:
            raise InputError(f"not at hand: {e.strerror}") from None

    def manifest(self) -> dict:
        """Without the machine's folders."""
        fetcher = self.fetcher.manifest() if self.fetcher else None
        return {"roots": [name for name, _ in self.roots], "archives": bool(self.archives), "fetcher": fetcher}


# ------------------------------------------------------------------------------------------------------------ what it shows


@dataclass(frozen=True)
class Sound:
    """Refuses what cannot be decoded, claims to be enormous, or moves; the others get their width and height."""

    def __call__(self, page: Page) -> Page:
        return changing(page, self._seen)

    def _seen(self, picture: Picture) -> Picture:
        try:
            seen = look(picture.data)
        except InputError as e:
            raise InputError(f"broken: {str(e).removeprefix('picture: ')}") from None
        if seen.moves:
            raise InputError("animated")
        return replace(picture, width=seen.width, height=seen.height)


@dataclass(frozen=True)
class Sides:
    """Refuses icons, and long strips."""

    # Their 150 and 2 refuse one in ten of the real how-to pictures that are worth keeping: screens, rows of diagrams.
    least: int = 130  # pixels of the shorter side; OBELICS and OmniCorpus have 150
    most: int = 20_000  # of the longer side
    aspect: float = 4.0  # longer by shorter side; OBELICS and OmniCorpus have 2

    def __call__(self, page: Page) -> Page:
        return refusing(page, self._why)

    def _why(self, picture: Picture) -> str:
        short, long = sorted((picture.width, picture.height))
        if short < self.least:
            return f"small: {picture.width} x {picture.height}"
        if long > self.most:
            return f"large: {picture.width} x {picture.height}"
        if long > self.aspect * short:
            return f"strip: {picture.width} x {picture.height}"
        return ""


@dataclass(frozen=True)
class Codes:
    """Refuses pictures that are QR codes; one that merely has a code in a corner stays."""

    share: float = 0.05  # of the picture's area that one code may take; NeMo Curator has 0.05

    def __call__(self, page: Page) -> Page:
        return refusing(page, self._why)

    def _why(self, picture: Picture) -> str:
        image = look(picture.data).image
        for code in zxingcpp.read_barcodes(image, formats=zxingcpp.BarcodeFormat.QRCode):
            corners = (code.position.top_left, code.position.top_right, code.position.bottom_right, code.position.bottom_left)
            share = area([(point.x, point.y) for point in corners]) / (image.width * image.height)
            if share > self.share:
                return f"QR code: {share:.0%} of the picture"
        return ""


def area(corners: list[tuple[int, int]]) -> float:
    """Of a polygon."""
    following = corners[1:] + corners[:1]
    return abs(sum(x * v - u * y for (x, y), (u, v) in zip(corners, following, strict=True))) / 2


def grey(picture: Picture, side: int) -> np.ndarray:
    """(h, w) float32 from 0 to 255; the longer side is `side` pixels, or fewer where the picture has fewer."""
    image = look(picture.data).image.convert("L")
    image.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.asarray(image, dtype=np.float32)


@dataclass(frozen=True)
class Plain:
    """Refuses pictures that are nearly of one colour."""

    deviation: float = 5.0  # of brightness, of 255
    side: int = 256  # pixels at which it is measured

    def __call__(self, page: Page) -> Page:
        return refusing(page, self._why)

    def _why(self, picture: Picture) -> str:
        deviation = float(grey(picture, self.side).std())
        return f"near-uniform: brightness deviates by {deviation:.1f}" if deviation < self.deviation else ""


@dataclass(frozen=True)
class Blurred:
    """Refuses pictures without a sharp edge in them.

    The variance of the Laplacian depends on the size, so pictures are first brought to one. NeMo Curator has 100 for pictures
    as they come, which would refuse many a photo of soft things: a cup of coffee has 27.
    """

    variance: float = 25.0
    side: int = 512  # pixels

    def __call__(self, page: Page) -> Page:
        return refusing(page, self._why)

    def _why(self, picture: Picture) -> str:
        variance = sharpness(grey(picture, self.side))
        return f"blurred: variance of the Laplacian {variance:.0f}" if variance < self.variance else ""


def sharpness(values: np.ndarray) -> float:
    """The variance of the Laplacian. values: (h, w), 3 pixels wide and high at least."""
    inner = values[1:-1, 1:-1]
    around = values[:-2, 1:-1] + values[2:, 1:-1] + values[1:-1, :-2] + values[1:-1, 2:]
    return float((around - 4 * inner).var())


# ------------------------------------------------------------------------------------------------------------- all pages


@dataclass(frozen=True)
class Repeated:
    """Refuses what stands on many pages: it is of the site, or of nobody."""

    pages: int = 10  # on more it is refused; MINT-1T, OBELICS and OmniCorpus have 10
    # Of real pictures at half their size nine in ten differ by 10 bits at most; PDQ's own advice, 31, takes diagrams for one
    # another that differ in a square.
    distance: int = 10  # bits of 256 that may differ
    quality: int = 50  # of a hash that says something, PDQ's own advice

    def observe(self, page: Page) -> Any:
        """[SHA-256, PDQ in hexadecimal or empty where it says nothing] of each picture."""
        return [[picture.sha256, pdq(picture.data, self.quality)] for picture in page.pictures] or None

    def conclude(self, observed: Iterator[tuple[str, Any]]) -> dict[str, int]:
        """{SHA-256: on how many pages it, or one that looks like it, stands}, of those that stand on too many.

        Two hashes are compared where they share one of their sixteen words of 16 bits: nearly all pairs within the distance do.
        """
        pages: dict[str, int] = defaultdict(int)  # of a hash, or of a SHA-256 where there is none
        hashes: dict[str, str] = {}
        for _, pictures in observed:
            hashes |= {sha: value or sha for sha, value in pictures}
            for value in {value or sha for sha, value in pictures}:
                pages[value] += 1
        groups = near(sorted({value for sha, value in hashes.items() if value != sha}), self.distance)
        together: dict[str, int] = defaultdict(int)
        for value, n in pages.items():
            together[groups.get(value, value)] += n
        counts = {sha: together[groups.get(value, value)] for sha, value in hashes.items()}
        return {sha: n for sha, n in sorted(counts.items()) if n > self.pages}

    def __call__(self, page: Page, found: dict[str, int]) -> Page:
        return refusing(page, lambda picture: f"on many pages: {found[picture.sha256]}" if picture.sha256 in found else "")


def pdq(data: bytes, quality: int) -> str:
    """The hash in hexadecimal; empty where the picture has too little in it."""
    try:
        image = look(data).image
    except InputError:
        return ""
    # It looks at 64 x 64 in the end; larger ones cost time alone.
    small = image.resize((256, 256), Image.Resampling.BOX)
    bits, found = pdqhash.compute(np.asarray(small))
    return np.packbits(bits.astype(bool)).tobytes().hex() if found >= quality else ""


def near(hashes: list[str], distance: int) -> dict[str, str]:
    """{hash: the first of its group}: hashes within the distance of one another, directly or by way of others."""
    table = np.array([np.frombuffer(bytes.fromhex(h), np.uint8) for h in hashes], np.uint8).reshape(len(hashes), 32)
    first = list(range(len(hashes)))

    def root(k: int) -> int:
        while first[k] != k:
            first[k] = first[first[k]]
            k = first[k]
        return k

    for word in range(0, 32, 2):
        keys = table[:, word].astype(np.int32) * 256 + table[:, word + 1]
        order = np.argsort(keys, kind="stable")
        bounds = np.flatnonzero(np.diff(keys[order])) + 1
        for members in np.split(order, bounds):
            # A row of comparisons for each but the last; those that are together already are not worth one.
            for i in range(len(members) - 1):
                rest = members[i + 1 :]
                far = np.bitwise_count(table[rest] ^ table[members[i]]).sum(axis=1)
                for k in rest[far <= distance]:
                    a, b = root(int(members[i])), root(int(k))
                    first[max(a, b)] = min(a, b)
    return {value: hashes[root(k)] for k, value in enumerate(hashes)}


@dataclass(frozen=True)
class Balance:
    """Of pages without a picture a share is kept, so that a model also learns to answer in text alone; others are dropped."""

    share: float = 0.1
    most: int = 30  # pictures of a page; MINT-1T and OBELICS have 30

    def __call__(self, page: Page) -> Page | Dropped:
        n = len(page.pictures)
        if n > self.most:
            return Dropped(f"many pictures: {n}")
        if n:
            return page
        # By its id: the same pages, whatever else is among them.
        drawn = int(hashlib.sha256(page.id.encode("utf-8", "surrogatepass")).hexdigest()[:8], 16) / 16**8
        return page if drawn < self.share else Dropped("no picture left")
