"""HTML or Markdown becomes texts and pictures in order: the first step of every page.

    <p>Cut it. <img src="data:..." data-src="a.jpg"></p>      ->      "Cut it.", Picture("https://site/a.jpg")

trafilatura finds the main text, but it loses most pictures that are loaded late, and those whose address has no known ending.
So the true address of each <img> is put aside, and the <img> gets a plain numbered one; where that one stands in the main text,
there stands the picture. A picture that is in the page and not in its main text (a menu, an advert, a comment) is refused as
such, so that always: pictures in = pictures kept + pictures refused.
"""

import posixpath
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from urllib.parse import quote, unquote, urljoin, urlsplit

import lxml.html
import trafilatura
from lxml import etree
from trafilatura.settings import DEFAULT_CONFIG

from curate.page import Dropped, Page, Part, Picture, Refused, joined

# Attributes in which scripts that load pictures late keep the true address.
LAZY = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-full-src", "data-hi-res-src", "data-url", "data-image")
LAZY_SETS = ("data-srcset", "data-lazy-srcset", "srcset")
# Names of files that stand in a picture's place until it is loaded, or count visitors; google-pixel.jpg is none.
PLACEHOLDER = re.compile(
    r"(?:.*[^a-z])?placeholder(?:[^a-z].*)?|1x1"
    r"|(?:blank|spacer|transparent|trans|pixel|lazy|loading|loader|gr[ae]y|empty|clear|dot)(?:[-_.]?(?:\d+|\d+x\d+|image|img|gif|bg))*"
)
NUMBER = "\ue000"  # a character for private use, before the number of a list's item
SENTINEL = "https://picture.invalid/{}.jpg"
LOCAL = "http://page.invalid/"  # where pages that came from files seem to lie, while addresses are resolved


# ------------------------------------------------------------------------------------------------------------- addresses


def largest(srcset: str) -> str:
    """The address in a srcset whose picture is widest; the first where none says how wide it is."""
    best, most = "", -1.0
    # Addresses may hold commas: one ends where a blank follows, or a blank and a size.
    for address, size in re.findall(r"([^\s,]\S*[^\s,]|[^\s,])(?:\s+([\d.]+)[wx])?\s*(?:,|$)", srcset):
        if float(size or 0) > most:
            best, most = address, float(size or 0)
    return best


def stands_in(address: str) -> bool:
    """Whether something is no picture but keeps its place."""
    if not address or address.startswith("data:"):
        return True
    name = re.split("[?#]", address)[0].rpartition("/")[2]
    return bool(PLACEHOLDER.fullmatch(name.partition(".")[0].lower()))


def candidates(image: etree._Element) -> Iterator[str]:
    """Where the picture of an <img> may lie, best first."""
    for name in LAZY_SETS:
        yield largest(image.get(name, ""))
    for name in LAZY:
        yield image.get(name, "").strip()
    yield image.get("src", "").strip()
    # The parser does not know that <source> is empty: the <img> behind it stands in it.
    for parent in image.iterancestors("picture"):
        for source in parent.iter("source"):
            for name in LAZY_SETS:
                yield largest(source.get(name, ""))


def true_address(image: etree._Element) -> str:
    """The first candidate that may be a picture; where there is none, what the page had in its place."""
    found = next((address for address in candidates(image) if not stands_in(address)), "")
    return found or image.get("src", "")


def resolved(address: str, page: Page, base: str) -> tuple[str, str]:
    """(absolute address, "") or (address, why it is refused). base: what the page says that addresses are relative to."""
    # One that is longer holds a picture, or nonsense.
    shown = address if len(address) <= 2000 else f"{address[:60]}..."
    if not address:
        return "", "no address"
    if address.startswith("data:"):
        return address[:40], "placeholder: a data: address"
    if stands_in(address):
        return shown, "placeholder: by its name"
    try:
        scheme = urlsplit(address).scheme
        if scheme not in ("", "http", "https"):
            return shown, f"address: {scheme} is neither http nor https"
        start = page.url or LOCAL + quote(page.notes.get("file", ""))
        absolute = urljoin(urljoin(start, base), address)
        if not absolute.startswith(LOCAL):
            return (absolute, "") if urlsplit(absolute).hostname else (shown, "address: without a host")
        path = unquote(urlsplit(address).path)
    except ValueError:
        return shown, "address: malformed"
    # A page that came from a file: its pictures lie beside it, under the folder that was named on the command line.
    folder = posixpath.dirname(page.notes.get("file", "")) if not path.startswith("/") else ""
    path = posixpath.normpath(posixpath.join(folder, path.lstrip("/")))
    if path.startswith("..") or "\0" in path:
        return path, "address: leads out of the folder"
    return path, ""


# ------------------------------------------------------------------------------------------------------------------ HTML


def too_much(tree: etree._Element, depth: int, elements: int) -> str:
    """Why a tree is no page but a bomb; empty where it is one."""
    deep = 0
    n = 0
    for event, _ in etree.iterwalk(tree, events=("start", "end")):
        if event == "end":
            deep -= 1
            continue
        deep += 1
        n += 1
        if deep > depth:
            return f"bomb: more than {depth} elements in one another"
        if n > elements:
            return f"bomb: more than {elements} elements"
    return ""


@dataclass(frozen=True)
class Extract:
    """The main text of an HTML or Markdown page, its pictures in place."""

    size: int = 5_000_000  # characters of a page, at most
    depth: int = 250  # of elements in one another
    elements: int = 50_000
    least: int = 16  # pixels of a side as the page shows it: below stand counters and bullets

    def __call__(self, page: Page) -> Page | Dropped:
        source = page.text
        if len(source) > self.size:
            return Dropped(f"bomb: more than {self.size} characters")
        if page.notes.get("format") == "markdown":
            return from_markdown(page, source)
        if not source.strip():
            return Dropped("no page: it is empty")
        try:
            text = source.replace("\0", "").encode("utf-8", "replace")
            tree = lxml.html.document_fromstring(text, parser=lxml.html.HTMLParser(encoding="utf-8"))
        except (etree.LxmlError, ValueError, AssertionError) as e:
            return Dropped(f"no page: {type(e).__name__}")
        if reason := too_much(tree, self.depth, self.elements):
            return Dropped(reason)
        return self._extracted(page, tree)

    def _extracted(self, page: Page, tree: etree._Element) -> Page | Dropped:
        title = title_of(tree)
        base = next(iter(tree.xpath("//base/@href")), "")
        canonical = next(iter(tree.xpath("//link[@rel='canonical']/@href")), "")
        unwrap(tree)
        pictures, refused = self._pictures(page, tree, base)
        for element in [*tree.iter("picture", "source")]:
            element.drop_tag()
        body = main_text(tree)
        if body is None:
            return Dropped("no main text")
        writer = Writer(pictures)
        writer.write(body)
        parts = joined(writer.finished())
        kept = {id(part) for part in parts if isinstance(part, Picture)}
        refused += [Refused(p.address, "not in the main text") for p in pictures if id(p) not in kept]
        if not any(isinstance(part, str) for part in parts):
            return Dropped("no main text")
        url = page.url or (canonical if re.match(r"https?://[^/]", canonical) else "")
        return replace(page, url=url, title=page.title or title, parts=parts, refused=(*page.refused, *refused))

    def _pictures(self, page: Page, tree: etree._Element, base: str) -> tuple[list[Picture], list[Refused]]:
        """Every <img> becomes a numbered one or is refused, and removed."""
        pictures: list[Picture] = []
        refused: list[Refused] = []
        last = None  # the <img> before, where it stands next to this one, and its address
        for image in [*tree.iter("img", "amp-img")]:
            late = image.get("data-in-noscript") is not None
            address, reason = resolved(true_address(image), page, base)
            width, height = (number(image.get(name)) for name in ("width", "height"))
            if not reason and 0 < min(width or self.least, height or self.least) < self.least:
                reason = "placeholder: by its size on the page"
            if not reason and late and last == address:
                reason = "placeholder: the same again for browsers without scripts"
            if reason:
                refused.append(Refused(address, reason))
                image.drop_tree()
                continue
            last = address
            alt = " ".join((image.get("alt") or image.get("title") or "").split())
            image.tag = "img"
            image.attrib.clear()
            image.set("src", SENTINEL.format(len(pictures)))
            pictures.append(Picture(address, alt=alt))
        return pictures, refused


def number(value: str | None) -> int:
    """Of an attribute, in pixels; 0 where it is none."""
    found = re.fullmatch(r"\s*(\d{1,6})(px)?\s*", value or "")
    return int(found[1]) if found else 0


def title_of(tree: etree._Element) -> str:
    """The one heading of first rank, or what the page is called."""
    heads = tree.xpath("//h1")
    found = [heads[0].text_content()] if len(heads) == 1 else []
    found += tree.xpath("//meta[@property='og:title']/@content") + [t.text_content() for t in tree.xpath("//title")]
    return next((" ".join(text.split()) for text in found if text.strip()), "")


def unwrap(tree: etree._Element) -> None:
    """What hides pictures from trafilatura, away from around them."""
    for element in [*tree.iter("noscript")]:
        for image in element.iter("img"):
            image.set("data-in-noscript", "")
        element.drop_tag()
    for element in [*tree.iter("figcaption")]:
        element.tag = "p"
    for element in [*tree.iter("blockquote")]:
        if next(element.iter("img", "amp-img"), None) is not None:
            element.tag = "div"
    for element in [*tree.iter("picture")]:
        image = next(element.iter("img"), None)
        # Where only sources are there, the first of them becomes the picture.
        if image is None and (source := next(element.iter("source"), None)) is not None:
            source.tag = "img"
    for element in [*tree.iter("ol")]:
        number_items(element)


def number_items(element: etree._Element) -> None:
    """Give the items of a list that does not begin with 1 their numbers: trafilatura forgets them."""
    if not (element.get("start") or "").isdigit():
        return
    for k, item in enumerate(element.iterchildren("li"), int(element.get("start"))):
        item.text = f"{NUMBER}{k}. {(item.text or '').lstrip()}"


def main_text(tree: etree._Element) -> etree._Element | None:
    """The main text as trafilatura's own XML; None where it finds none."""
    settings = deepcopy(DEFAULT_CONFIG)
    # Of a text that is shorter it would take all of the page, without pictures; recipes are short.
    settings.set("DEFAULT", "MIN_EXTRACTED_SIZE", "50")
    found = trafilatura.bare_extraction(
        tree,
        config=settings,
        fast=True,  # its other algorithms, which it falls back to, know no pictures
        include_images=True,
        include_formatting=True,
        include_tables=True,
        include_comments=False,
    )
    return None if found is None else found.body


class Writer:
    """trafilatura's XML as Markdown, with the pictures in it."""

    def __init__(self, pictures: list[Picture]):
        self.pictures = {SENTINEL.format(k): picture for k, picture in enumerate(pictures)}
        self.parts: list[Part] = []
        self.text = ""

    def finished(self) -> list[Part]:
        self.flush()
        return self.parts

    def flush(self) -> None:
        # An item has its own number, if it has one, in its list's stead.
        text = re.sub(rf"(\d+\. |- )?{NUMBER}", "", self.text)
        # Blanks at the ends of a line are the HTML's, and more than one empty line says nothing.
        text = re.sub(r"[ \t]+\n", "\n", text)
        self.parts.append(re.sub(r"\n{3,}", "\n\n", text))
        self.text = ""

    def picture(self, element: etree._Element) -> None:
        # popped: where trafilatura has a piece of the page twice, its pictures are there once.
        if picture := self.pictures.pop(element.get("src"), None):
            self.flush()
            self.parts.append(picture)

    def write(self, body: etree._Element) -> None:
        for element in body:
            self.block(element, "")
            if (element.tail or "").strip():
                self.text += f"\n\n{blanks(element.tail).strip()}\n\n"

    def block(self, element: etree._Element, indent: str) -> None:
        """An element that stands on lines of its own. indent: what these lines begin with."""
        if element.tag == "graphic":
            self.picture(element)
        elif element.tag == "list":
            self.items(element, indent)
            self.text += "\n"
        elif element.tag == "table":
            self.table(element)
        elif element.tag == "code":
            self.code(element)
        elif element.tag in ("div", "quote") and len(element) and element[0].tag in ("p", "list", "code", "head", "graphic"):
            self.write(element)
        else:
            start = "#" * int(element.get("rend", "h2")[1:] or 2) + " " if element.tag == "head" else ""
            self.text += f"\n\n{indent}{start}"
            self.inline(element)
            self.text += "\n\n"

    def items(self, element: etree._Element, indent: str) -> None:
        for k, item in enumerate(element.iterchildren("item"), 1):
            mark = f"{k}. " if element.get("rend") == "ol" else "- "
            self.text += f"\n{indent}{mark}"
            self.inline(item, indent + " " * len(mark))

    def table(self, element: etree._Element) -> None:
        self.text += "\n\n"
        for n, row in enumerate(element.iterchildren("row")):
            # Pictures of a row stand behind its words.
            cells = [Writer([]) for _ in row]
            for cell, writer in zip(row, cells, strict=True):
                writer.inline(cell)
            texts = [" ".join(writer.text.split()).replace("|", "\\|") for writer in cells]
            if any(texts):
                self.text += f"| {' | '.join(texts)} |\n"
            if n == 0:
                self.text += "|" + " --- |" * len(texts) + "\n"
            for graphic in row.iter("graphic"):
                self.picture(graphic)
        self.text += "\n"

    def code(self, element: etree._Element) -> None:
        inner = element[0] if len(element) == 1 and element[0].tag == "code" else element
        language = re.search(r"language-([\w+-]+)", inner.get("class", ""))
        lines = "".join("\n" if e.tag == "lb" else e.text or "" for e in inner.iter())
        self.text += f"\n\n```{language[1] if language else ''}\n{lines.strip(chr(10))}\n```\n\n"

    def inline(self, element: etree._Element, indent: str = "") -> None:
        """The words of an element; blocks in it begin lines."""
        self.text += blanks(element.text)
        for child in element:
            if child.tag == "graphic":
                self.picture(child)
            elif child.tag == "lb":
                self.text += f"\n{indent}"
            elif child.tag == "hi":
                self.marked(child)
            elif child.tag == "code" and "\n" not in "".join(child.itertext()):
                self.text += f"`{''.join(child.itertext())}`"
            elif child.tag in ("list", "table", "code", "quote"):
                self.block(child, indent)
            elif child.tag in ("p", "head"):
                # The first paragraph of a list's item stands behind its mark.
                self.text += "" if re.search(r"(^|\n) *(-|\d+\.) $", self.text) else f"\n{indent}"
                self.inline(child, indent)
            else:
                self.inline(child, indent)
            self.text += blanks(child.tail)

    def marked(self, element: etree._Element) -> None:
        mark = {"#b": "**", "#i": "*"}.get(element.get("rend", ""), "")
        before = self.text
        self.text = ""
        n = len(self.parts)
        self.inline(element)
        words = self.text
        # A mark must touch its words, and cannot go around a picture.
        if mark and words.strip() and len(self.parts) == n:
            inside = words.strip()
            words = words.replace(inside, f"{mark}{inside}{mark}", 1)
        if len(self.parts) > n:
            self.parts[n] = before + self.parts[n]
            before = ""
        self.text = before + words


def blanks(text: str | None) -> str:
    """HTML's blanks: any number of them are one."""
    return re.sub(r"\s+", " ", text or "")


# -------------------------------------------------------------------------------------------------------------- Markdown

FRONT = re.compile(r"\A\ufeff?---\r?\n.*?\n---\s*\n", re.S)
COMMENT = re.compile(r"<!--.*?-->", re.S)
REFERENCE = re.compile(r"^ {0,3}\[([^\]]+)\]:\s*<?(\S+?)>?(?:\s+[\"'(].*)?$", re.M)
FENCE = re.compile(r"^ {0,3}(```+|~~~+).*?(?:^ {0,3}\1|\Z)", re.S | re.M)
INLINE = re.compile(
    r"!\[(?P<alt>[^\]]*)\]\(\s*<?(?P<address>[^\s)>]+(?:\([^\s)]*\)[^\s)>]*)*)>?(?:\s+[\"'(].*?[\"')])?\s*\)"
    r"|!\[(?P<words>[^\]]*)\]\[(?P<name>[^\]]*)\]"
    r"|(?P<html><img\s[^>]*>)",
    re.S | re.I,
)
LINK = re.compile(r"(?<!!)\[([^\[\]]*)\]\((?:[^()\s]|\([^()]*\))*(?:\s+\"[^\"]*\")?\)")


def from_markdown(page: Page, source: str) -> Page | Dropped:
    """Markdown stays what it is, but for its pictures, links and comments."""
    front = FRONT.match(source)
    title = re.search(r"^title:\s*[\"']?(.*?)[\"']?\s*$", front[0], re.M) if front else None
    source = COMMENT.sub("", source[front.end() if front else 0 :]).replace("\r\n", "\n")
    heading = re.search(r"^# +(.+?)#*$", source, re.M)
    named = {name.lower(): address for name, address in REFERENCE.findall(source)}
    parts: list[Part] = []
    refused: list[Refused] = []
    end = 0
    # Between fences there is code, and its pictures are none.
    for fence in [*FENCE.finditer(source), None]:
        markdown_parts(page, source[end : fence.start() if fence else len(source)], named, parts, refused)
        if fence:
            parts.append(f"\n{fence[0]}\n")
            end = fence.end()
    parts = fenced(parts)
    if not any(isinstance(part, str) for part in parts):
        return Dropped("no main text")
    name = title[1] if title else heading[1].strip() if heading else ""
    return replace(page, title=page.title or name, parts=tuple(parts), refused=(*page.refused, *refused))


def fenced(parts: list[Part]) -> list[Part]:
    """Texts around code are one text with it, line by line as they were."""
    out: list[Part] = []
    for part in parts:
        if isinstance(part, str) and out and isinstance(out[-1], str):
            out[-1] += part
        else:
            out.append(part)
    texts = (re.sub(r"\n{3,}", "\n\n", part).strip() if isinstance(part, str) else part for part in out)
    return [part for part in texts if part]


def markdown_parts(page: Page, text: str, named: dict[str, str], parts: list[Part], refused: list[Refused]) -> None:
    """What has no code in it: texts and pictures, added to `parts`, and what is refused, to `refused`."""
    end = 0
    for found in INLINE.finditer(text):
        parts.append(LINK.sub(r"\1", REFERENCE.sub("", text[end : found.start()])))
        end = found.end()
        if found["html"]:
            image = lxml.html.fragment_fromstring(found["html"])
            address, alt = true_address(image), image.get("alt", "")
        elif found["address"]:
            address, alt = found["address"], found["alt"]
        else:
            alt = found["words"]
            address = named.get((found["name"] or alt).lower(), "")
        address, reason = resolved(address, page, "")
        if reason:
            refused.append(Refused(address, reason))
        else:
            parts.append(Picture(address, alt=" ".join(alt.split())))
    parts.append(LINK.sub(r"\1", REFERENCE.sub("", text[end:])))
