"""A page's text without the litter of the web: by rules, and by a model whose rewrite is checked by rules.

Clean()             HTML, links and broken spacing go
Rewrite(model)      a model's cleaning, where it keeps what the page says; else the page stays as it was, with the reason
"""

import html
import re
from collections import Counter
from dataclasses import dataclass, replace

from curate.models import Model, asking, at_once, prompt
from curate.page import Dropped, Page, Picture, joined
from curate.reorder import blocks_of
from curate.text import ADDRESS, FENCED, LINK, LIST_ITEM, count_words, language_of, noted, plain, tokens, with_texts
from evaluate.judges import Unanswered

MARK = re.compile(r"\[\[picture (\d+)\]\]")
TAG = re.compile(r"</?[A-Za-z][^<>]{0,2000}>|<!--.{0,5000}?-->", re.S)
NUMBER = re.compile(r"\d+(?:[.,/:]\d+)*|[½⅓⅔¼¾⅛]")
ORDINAL = re.compile(r"^\s*\d+[.)、](?=\s)", re.M)
HEADING = re.compile(r"^#{1,6} ", re.M)


# ------------------------------------------------------------------------------------------------------------------- rules


def cleaned(text: str) -> str:
    """Markdown without HTML, with the words of links alone, and no more than one empty line; code stays as it is."""
    out = []
    end = 0
    for fence in FENCED.finditer(text):
        out += [without_markup(text[end : fence.start()]), fence[0]]
        end = fence.end()
    out.append(without_markup(text[end:]))
    return re.sub(r"\n{3,}", "\n\n", "".join(out)).strip()


def without_markup(text: str) -> str:
    text = TAG.sub("", text)
    text = html.unescape(text)
    text = LINK.sub(r"\1", text)
    text = ADDRESS.sub("", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.M)


@dataclass(frozen=True)
class Clean:
    """Takes HTML and links out of the text."""

    def __call__(self, page: Page) -> Page | Dropped:
        return with_texts(page, cleaned)


# ------------------------------------------------------------------------------------------------------------------ guards


def with_marks(page: Page) -> str:
    """The page as one text; [[picture 1]] stands for its first picture."""
    out = []
    number = 0
    for part in page.parts:
        if isinstance(part, Picture):
            number += 1
            part = f"[[picture {number}]]"
        out.append(part)
    return "\n\n".join(out)


def numbers_of(text: str) -> Counter:
    """The numbers in a text; those that only count the items of a list are left out, and 1,000 is 1000."""
    return Counter(number.replace(",", "") for number in NUMBER.findall(plain(ORDINAL.sub("", text))))


def content_of(text: str) -> set[str]:
    """Words that carry meaning: long ones, and Chinese characters."""
    return {token.lower() for token in tokens(plain(text)) if len(token) >= 4 or not token.isascii()}


def ordinals_of(text: str) -> int:
    return len(ORDINAL.findall(FENCED.sub("", text)))


@dataclass(frozen=True)
class Rewrite:
    """Has a model clean the text. A rewrite that fails one of the checks is refused and the page stays; nothing is dropped."""

    model: Model = Model()  # none: the page stays
    shortest: float = 0.6  # words of the rewrite for each of the page, at least; own choice
    longest: float = 1.25  # likewise at most; own choice
    kept: float = 0.6  # share of the meaningful words of a step that the rewrite has, at least; own choice
    most: int = 4000  # words; a longer page is left as it is; own choice: a model loses steps of long texts

    @property
    def at_once(self) -> int:
        return at_once(self.model)

    def manifest(self) -> dict:
        return asking(self.model, "rewrite")

    def __call__(self, page: Page) -> Page | Dropped:
        if not self.model or not page.texts:
            return page
        before = with_marks(page)
        words = count_words(before)
        if words > self.most:
            return noted(page, self, "left: too long")
        try:
            # Twice as many tokens as words would do for English; Chinese and code take more.
            answer = self.model.write([prompt("rewrite", page=before)], max_tokens=256 + 4 * int(words))
        except Unanswered as e:
            return noted(page, self, f"unanswered: {e}")
        why = self.objection(before, answer)
        if why:
            return noted(page, self, f"refused: {why}")
        return noted(replace(page, parts=parts_of(answer, page)), self, "rewritten")

    def objection(self, before: str, after: str) -> str:
        """What the rewrite did that it may not; empty: nothing."""
        marks = MARK.findall(before)
        if MARK.findall(after) != marks:
            return f"pictures: {len(marks)} became {len(MARK.findall(after))}, or changed places"
        checks = (self.length, self.numbers, self.language, self.steps, self.inventions)
        return next((why for check in checks if (why := check(before, after))), "")

    def length(self, before: str, after: str) -> str:
        ratio = count_words(plain(after)) / max(1.0, count_words(plain(before)))
        return "" if self.shortest <= ratio <= self.longest else f"length: {ratio:.2f} of what it was"

    def numbers(self, before: str, after: str) -> str:
        was = numbers_of(before)
        now = numbers_of(after)
        lost = sorted((was - now).elements())
        new = sorted((now - was).elements())
        return f"numbers: lost {', '.join(lost[:5]) or 'none'}; new {', '.join(new[:5]) or 'none'}" if lost or new else ""

    def language(self, before: str, after: str) -> str:
        was = language_of(before)[0]
        now = language_of(after)[0]
        return "" if was == now else f"language: {was} became {now}"

    def steps(self, before: str, after: str) -> str:
        if ordinals_of(after) < ordinals_of(before):
            return f"steps: {ordinals_of(before)} became {ordinals_of(after)}"
        there = content_of(after)
        for block in blocks_of(before):
            if MARK.fullmatch(block) or not LIST_ITEM.match(block):
                continue
            words = content_of(block)
            if words and len(words & there) < self.kept * len(words):
                return f"steps: lost {' '.join(block.split())[:60]!r}"
        return ""

    def inventions(self, before: str, after: str) -> str:
        addresses = set(ADDRESS.findall(after)) - set(ADDRESS.findall(before))
        if addresses:
            return f"address: {sorted(addresses)[0][:60]}"
        if re.search(r"!\[[^\]]*\]\(", FENCED.sub("", after)) and not re.search(r"!\[[^\]]*\]\(", before):
            return "pictures: one is invented"
        if len(HEADING.findall(after)) > len(HEADING.findall(before)) + 2:
            return "headings: invented"
        return ""


def parts_of(text: str, page: Page) -> tuple:
    """A text with marks as parts, with the page's pictures in the places of the marks."""
    parts = []
    for k, piece in enumerate(MARK.split(text)):
        # Numbers stand at the odd places of what the split gives.
        parts.append(page.pictures[int(piece) - 1] if k % 2 else piece)
    return joined(parts)
