"""What goes through the data engine: a page of texts and pictures in order, and the steps that it goes through.

    page.parts                            ["Cut the paper.", Picture(...), "Fold it twice.", Picture(...)]
    step = Short(words=50)                a step: a frozen dataclass, its fields are its thresholds
    step(page) -> Page                    the same page, a changed one ...
    step(page) -> Dropped                 ... or why it is of no use

What a step returns depends on the page and its thresholds alone, and it never changes the page that it was
given. So steps run in any number of processes, and the same input gives the same bytes. Cheap steps stand first.
`engine.py` runs them as blocks of datatrove.
"""

import hashlib
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from datatrove.data import Document, Media, MediaType


@dataclass(frozen=True)
class Picture:
    """A picture in its place on a page."""

    address: str  # where it was found, absolute
    data: bytes = b""  # the file as it came; b"" until it has been fetched
    sha256: str = ""  # of data
    width: int = 0  # pixels, as shown (after EXIF rotation); 0 until it has been decoded
    height: int = 0
    alt: str = ""  # the page's own words for it
    caption: str = ""  # a model's words for it
    kind: str = ""  # "photo", "screen" or "document"; empty: nobody has said

    def filled(self, data: bytes) -> "Picture":
        """The same picture with its bytes."""
        return replace(self, data=data, sha256=hashlib.sha256(data).hexdigest())


class Refused(NamedTuple):
    """A picture that a page had, and why it has it no longer."""

    address: str
    reason: str  # in the form "kind" or "kind: details"


Part = str | Picture


@dataclass(frozen=True)
class Page:
    """A page, or what a page has become. Its pictures are those in `parts` and those in `refused`, no other."""

    id: str
    url: str = ""
    title: str = ""
    language: str = ""  # ISO 639-1; empty: nobody has said
    parts: tuple[Part, ...] = ()
    refused: tuple[Refused, ...] = ()
    messages: tuple[dict, ...] = ()  # of the dialogue made of it; their pictures are numbers: the k-th picture of `parts`
    notes: dict[str, Any] = field(default_factory=dict)  # what a step wants the report to know: JSON

    @property
    def texts(self) -> list[str]:
        return [part for part in self.parts if isinstance(part, str)]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.parts if isinstance(part, Picture)]

    @property
    def text(self) -> str:
        return "\n\n".join(self.texts)

    def without(self, reasons: dict[int, str]) -> "Page":
        """Without some of its pictures. reasons: {number of a picture: why}; neighbouring texts become one."""
        parts: list[Part] = []
        refused = list(self.refused)
        number = -1
        for part in self.parts:
            if isinstance(part, Picture):
                number += 1
                if number in reasons:
                    refused.append(Refused(part.address, reasons[number]))
                    continue
            parts.append(part)
        return replace(self, parts=joined(parts), refused=tuple(refused))


class Dropped(NamedTuple):
    """What a step returns in a page's stead."""

    reason: str  # in the form "kind" or "kind: details"; kinds are counted


class Step(Protocol):
    """What a page goes through. The name of its class is its name in the report and in the manifest."""

    def __call__(self, page: Page) -> Page | Dropped: ...


def joined(parts: list[Part]) -> tuple[Part, ...]:
    """Texts with no picture between them are one, an empty line apart; empty ones vanish."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str):
            part = part.strip()
            if not part:
                continue
            if out and isinstance(out[-1], str):
                out[-1] += f"\n\n{part}"
                continue
        out.append(part)
    return tuple(out)


# ---------------------------------------------------------------------------------------------------------------- datatrove


def document_of(page: Page) -> Document:
    """The page as datatrove carries it: pictures as Media with their bytes, the rest under metadata."""
    media = []
    parts = []
    for part in page.parts:
        if isinstance(part, str):
            parts.append(part)
            continue
        rest = {key: value for key, value in asdict(part).items() if key not in ("address", "data", "alt")}
        parts.append(len(media))
        media.append(Media(str(len(media)), MediaType.IMAGE, part.address, alt=part.alt, media_bytes=part.data, metadata=rest))
    metadata = {key: getattr(page, key) for key in ("url", "title", "language", "messages", "notes")}
    metadata |= {"parts": parts, "refused": [list(each) for each in page.refused]}
    return Document(text=page.text, id=page.id, media=media, metadata=metadata)


def page_of(document: Document) -> Page:
    """The inverse of `document_of`."""
    metadata = dict(document.metadata)
    pictures = [Picture(m.url, m.media_bytes or b"", alt=m.alt or "", **m.metadata) for m in document.media]
    parts = tuple(part if isinstance(part, str) else pictures[part] for part in metadata["parts"])
    refused = tuple(Refused(*each) for each in metadata["refused"])
    rest = {key: metadata[key] for key in ("url", "title", "language", "notes")}
    return Page(document.id, parts=parts, refused=refused, messages=tuple(metadata["messages"]), **rest)
