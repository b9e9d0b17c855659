"""A source and steps for the tests of the engine: small coloured pages, and what can happen to them."""

import io
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from checkpoint import InputError
from curate.page import Dropped, Page, Picture


def coloured(k: int) -> bytes:
    """A picture of its own for each number."""
    data = io.BytesIO()
    Image.new("RGB", (160, 140 + k % 20), (k * 7 % 256, k * 31 % 256, k % 256)).save(data, "PNG")
    return data.getvalue()


@dataclass(frozen=True)
class Coloured:
    """Three pages of each input; every seventh is broken."""

    def read(self, item: str) -> Iterator[Page | Dropped]:
        k = int(item)
        for j in range(3):
            if (k + j) % 7 == 0:
                yield Dropped(f"broken: {k}")
                continue
            picture = Picture(f"http://a/{k}.png", alt="a colour").filled(coloured(3 * k + j))
            yield Page(f"{k}-{j}", title=f"Page {k}", parts=(f"Words of {k}.", picture, "The end."))


@dataclass(frozen=True)
class Picky:
    """One of everything that a step may do."""

    def __call__(self, page: Page) -> Page | Dropped:
        if page.id.startswith("5"):
            return Dropped("five: begins so")
        if page.id.endswith("2"):
            return page.without({0: "two: ends so"})
        if page.id.startswith("8"):
            raise ValueError("never seen an eight")
        return replace(page, parts=(f"Look: {page.parts[0]}", *page.parts[1:]))


@dataclass(frozen=True)
class Rare:
    """A survey: drops pages whose first words stand on more pages than it allows."""

    most: int = 2

    def observe(self, page: Page) -> str:
        return page.parts[0]

    def conclude(self, observed: Iterator[tuple[str, str]]) -> dict[str, int]:
        return dict(Counter(words for _, words in observed))

    def __call__(self, page: Page, found: dict[str, int]) -> Page | Dropped:
        return page if found[page.parts[0]] <= self.most else Dropped("often: its words")


@dataclass(frozen=True)
class Told:
    """The dialogue."""

    at_once: int = 1

    def __call__(self, page: Page) -> Page:
        content, k = [], 0
        for part in page.parts:
            if isinstance(part, Picture):
                content.append({"type": "image", "image": k})
                k += 1
            else:
                content.append({"type": "text", "text": part})
        asked = {"role": "user", "content": f"Tell me of {page.title}."}
        return replace(page, messages=(asked, {"role": "assistant", "content": content}))


@dataclass(frozen=True)
class Server:
    """A server that is dead while a file is missing; it writes down what it was asked."""

    folder: str
    fails_at: str = "22-1"

    def __call__(self, page: Page) -> Page:
        with open(Path(self.folder, "asked"), "a") as file:
            file.write(f"{page.id}\n")
        if page.id == self.fails_at and not Path(self.folder, "alive").exists():
            raise InputError("the server does not answer: start it, and give the same command again")
        return page

    def manifest(self) -> dict:
        return {"folder": ""}


@dataclass(frozen=True)
class Slow:
    """The first pages take longest."""

    at_once: int = 8

    def __call__(self, page: Page) -> Page:
        time.sleep(0.05 if page.id.startswith("1-") else 0.01)
        return page
