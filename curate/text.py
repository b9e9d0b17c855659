"""What rules say of a page's words: its language, how many there are, how often they repeat, what must not be among them.

    Language()              language by py3langid; other languages are dropped
    Lengths()               too few words, too many, words of a strange length
    WordsPerPicture()       many pictures, hardly a word
    Repetition()            special characters, or the same again and again
    Boilerplate()           lines that a site has on many of its pages are taken out
    Personal()              e-mail addresses, telephone numbers and card numbers become marks
    Adult()                 adult pages by a list of words, adult.txt

Chinese is written without spaces: there a character is a part of a word (CHARACTERS_PER_WORD). Each threshold names its source:
OBELICS (obelics/configs/*.yaml at 0fca7ba), OmniCorpus (its paper, and filters.py at ce4a012), or this project's own choice.
"""

import hashlib
import math
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from py3langid.langid import MODEL_FILE, LanguageIdentifier

from checkpoint import read_text
from curate.page import Dropped, Page, Picture, joined

# Own choice: words of modern Chinese have one or two characters, and in running text about as many of either.
CHARACTERS_PER_WORD = 1.5
# Han and kana, of which every character counts; not hangul, which has spaces.
HAN = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
TOKEN = re.compile(rf"[{HAN}]|[^\W\d_{HAN}]+(?:['’-][^\W\d_{HAN}]+)*|\d+(?:[.,]\d+)*")
LETTERS = re.compile(rf"[^\W\d_{HAN}]+")
# None may look far ahead from many places: a hostile page would take its square in time.
FENCED = re.compile(r"^[ \t]*(```|~~~).*?(?:^[ \t]*\1[ \t]*$|\Z)", re.M | re.S)
LINK = re.compile(r"!?\[([^\[\]\n]{0,500})\]\([^()\n]{0,2000}\)")
ADDRESS = re.compile(r"https?://\S+")
MARKS = re.compile(r"^[ \t]*(?:#{1,6}|[-*+>]|\d+[.)、])[ \t]+|[`*|_]+", re.M)
LIST_ITEM = re.compile(r"\s*(?:[-*+]|\d+[.)、])\s+")


def noted(page: Page, step: object, value: object) -> Page:
    """The page with a note of a step, under the name of its class."""
    return replace(page, notes=page.notes | {type(step).__name__: value})


def with_texts(page: Page, change: Callable[[str], str]) -> Page:
    """The page with each of its texts changed; one that becomes empty vanishes."""
    parts = [change(part) if isinstance(part, str) else part for part in page.parts]
    return replace(page, parts=joined(parts))


def plain(text: str) -> str:
    """Markdown's words alone: without code, addresses and marks. A link keeps its words."""
    text = FENCED.sub("\n", text)
    text = LINK.sub(r"\1", text)
    text = ADDRESS.sub(" ", text)
    return MARKS.sub(" ", text)


def tokens(text: str) -> list[str]:
    """Words and numbers; of Chinese and Japanese, characters."""
    return TOKEN.findall(text)


def is_han(token: str) -> bool:
    return re.match(f"[{HAN}]", token) is not None


def count_words(text: str) -> float:
    """Words as a reader counts them; CHARACTERS_PER_WORD Chinese characters are one."""
    found = tokens(text)
    han = sum(map(is_han, found))
    return len(found) - han + han / CHARACTERS_PER_WORD


# ---------------------------------------------------------------------------------------------------------------- language


@cache
def identifier() -> LanguageIdentifier:
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def language_of(text: str) -> tuple[str, float]:
    """(ISO 639-1, probability among all languages that py3langid knows)."""
    # Code is English to a classifier whatever language the page has, so only prose is shown to it if there is any.
    prose = plain(text)
    language, probability = identifier().classify(prose if len(tokens(prose)) >= 5 else text)
    return language, float(probability)


@dataclass(frozen=True)
class Language:
    """Says in which language a page is, and drops those in others."""

    languages: str = "en,zh"  # ISO 639-1; a page in another one is dropped
    sure: float = 0.8  # least probability of the language; OBELICS

    def __call__(self, page: Page) -> Page | Dropped:
        language, probability = language_of(page.text)
        if language not in self.languages.split(","):
            return Dropped(f"language: {language}")
        if probability < self.sure:
            return Dropped(f"language unsure: {language} {probability:.2f}")
        return replace(page, language=language)


# ----------------------------------------------------------------------------------------------------------------- lengths


@dataclass(frozen=True)
class Lengths:
    """Drops pages with too few words or too many, and pages whose words are none."""

    fewest: int = 10  # words; OBELICS, of a document. Its 4 words a paragraph would cost steps such as "Stir."
    most: int = 100_000  # words; OmniCorpus. OBELICS' 2,000 would cost long guides
    shortest: float = 3.0  # mean letters of words outside Chinese; OmniCorpus
    longest: float = 10.0  # likewise

    def __call__(self, page: Page) -> Page | Dropped:
        words = count_words(page.text)
        if words < self.fewest:
            return Dropped(f"too few words: {words:.0f}")
        if words > self.most:
            return Dropped(f"too many words: {words:.0f}")
        letters = LETTERS.findall(plain(page.text))
        # In a Chinese text the few other words are units and names.
        if len(letters) > words / 2:
            mean = sum(map(len, letters)) / len(letters)
            if not self.shortest <= mean <= self.longest:
                return Dropped(f"mean word length: {mean:.1f}")
        return page


@dataclass(frozen=True)
class WordsPerPicture:
    """Drops pages that are rows of pictures."""

    pictures: int = 2  # a page with no more of them is not looked at; OmniCorpus
    # Of each picture, at least. OmniCorpus has 50, but guides with a photo and a sentence a step have 18 to 43.
    words: float = 15.0

    def __call__(self, page: Page) -> Page | Dropped:
        pictures = len(page.pictures)
        if pictures <= self.pictures:
            return page
        each = count_words(page.text) / pictures
        return Dropped(f"words per picture: {each:.0f}") if each < self.words else page


# -------------------------------------------------------------------------------------------------------------- repetition


def special_share(text: str) -> float:
    """Share of characters that are neither letters nor spaces."""
    special = sum(not (c.isalpha() or c.isspace()) for c in text)
    return special / max(1, len(text))


def character_repetition(text: str, n: int = 10) -> float:
    """Share of the commonest runs of n characters among all runs.

    The commonest are the square root of the number of different ones, but none that occurs once: so a long text is not held
    against itself (the rule of the ROOTS corpus, which OBELICS took over).
    """
    runs = Counter(text[i : i + n] for i in range(len(text) - n + 1))
    if not runs:
        return 0.0
    counts = sorted(runs.values(), reverse=True)
    repeated = sum(count > 1 for count in counts)
    return sum(counts[: min(math.isqrt(len(counts)), repeated)]) / sum(counts)


def word_repetition(text: str, n: int = 5) -> float:
    """Share of the runs of n words that occur more than once."""
    found = [token.lower() for token in tokens(text)]
    # Not strict: each copy begins a word later, and the last full run ends with the shortest.
    runs = Counter(zip(*(found[k:] for k in range(n)), strict=False))
    repeated = sum(count for count in runs.values() if count > 1)
    return repeated / max(1, runs.total())


@dataclass(frozen=True)
class Repetition:
    """Drops pages that are mostly signs, or that say the same again and again. Code is left out of the measure."""

    special: float = 0.275  # most of special_share; OBELICS, of a document
    # Most of character_repetition and word_repetition. OBELICS has 0.1 and 0.2 for a document: one guide in ten is beyond
    # them, for steps are worded alike; beyond these are quizzes and rows of links.
    characters: float = 0.15
    words: float = 0.3

    def __call__(self, page: Page) -> Page | Dropped:
        # Indentation and rulers would be runs of the same character.
        text = " ".join(plain(page.text).split())
        measured = {
            "special characters": (special_share(text), self.special),
            "repeated characters": (character_repetition(text), self.characters),
            "repeated words": (word_repetition(text), self.words),
        }
        for name, (share, most) in measured.items():
            if share > most:
                return Dropped(f"{name}: {share:.2f}")
        return page


# ------------------------------------------------------------------------------------------------------------- boilerplate


def site_of(page: Page) -> str:
    return (urlsplit(page.url).hostname or "").removeprefix("www.")


def countable(line: str, words: int) -> bool:
    """Whether a line can be boilerplate. Headings and short lines are what pages of a kind have in common by right."""
    return not line.lstrip().startswith("#") and count_words(line) >= words


def line_key(site: str, line: str) -> int:
    """64 bits that stand for a line of a site."""
    text = f"{site}\n{' '.join(line.split())}"
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8], "big")


@dataclass(frozen=True)
class Boilerplate:
    """Takes lines out that a site has on many of its pages; an engine.Survey, for it must know them all."""

    pages: int = 3  # of a site on which a line stands, at least; OBELICS
    # Of the site's pages, at least; own choice: "Preheat the oven to 180 degrees." is on three pages of every site of recipes.
    share: float = 0.2
    words: int = 6  # of a line, at least; own choice

    def observe(self, page: Page) -> list | None:
        """[site, keys of the different lines]."""
        site = site_of(page)
        if not site:
            return None
        return [site, sorted({line_key(site, line) for line in page.text.splitlines() if countable(line, self.words)})]

    def conclude(self, observed: Iterator[tuple[str, list]]) -> dict[str, int]:
        """{key of a line to take out: pages on which it stands}. About 12 bytes of memory for each line of all pages."""
        keys = array("Q")
        owners = array("I")  # the site of each, by its number
        numbers: dict[str, int] = {}
        sizes: Counter[int] = Counter()  # pages of each site
        for _, (site, lines) in observed:
            number = numbers.setdefault(site, len(numbers))
            sizes[number] += 1
            keys.extend(lines)
            owners.extend([number] * len(lines))
        if not keys:
            return {}
        found, first, counts = np.unique(np.frombuffer(keys, np.uint64), return_index=True, return_counts=True)
        repeated = counts >= self.pages
        rows = zip(found[repeated].tolist(), first[repeated].tolist(), counts[repeated].tolist(), strict=True)
        return {str(key): n for key, where, n in rows if n >= self.share * sizes[owners[where]]}

    def __call__(self, page: Page, found: dict[str, int]) -> Page | Dropped:
        site = site_of(page)
        removed = []

        def stays(line: str) -> bool:
            if countable(line, self.words) and str(line_key(site, line)) in found:
                removed.append(line.strip())
                return False
            return True

        changed = with_texts(page, lambda text: "\n".join(filter(stays, text.splitlines())))
        return noted(changed, self, removed) if removed else page


# ------------------------------------------------------------------------------------------------------ personal and adult

# Each begins where no address or longer number is under way, and cannot run far: a hostile line costs no time. Letters are
# those of ASCII: in Chinese no space stands before a number.
EMAIL = re.compile(r"(?<![\w.%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w@-])", re.A)
CARD = re.compile(r"(?<![\w./=+-])[3-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])", re.A)
PHONES = (
    re.compile(r"(?<![\w./=])\+\d{1,3}(?:[ .()-]{0,2}\d){6,12}(?![\w-])", re.A),  # with the country's number
    re.compile(r"(?<![\w./=-])(?:\([2-9]\d{2}\) ?|[2-9]\d{2}[ .-])[2-9]\d{2}[ .-]\d{4}(?![\w-])", re.A),  # North America
    re.compile(r"(?<![\w./=-])1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?![\w-])", re.A),  # mobile in China
    re.compile(r"(?<![\w./=-])\(?0\d{2,3}\)?[ -]\d{7,8}(?![\w-])", re.A),  # landline in China
)


def luhn(digits: str) -> bool:
    """Whether the check digit of a card's number is right."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit)
        if place % 2:
            value *= 2
        total += value - 9 if value > 9 else value
    return total % 10 == 0


@dataclass(frozen=True)
class Personal:
    """Puts a mark in the place of personal data, also in titles and the words of pictures; nothing is dropped."""

    email: str = "[e-mail]"  # in the place of an address
    card: str = "[card number]"  # of 13 to 19 digits with a right check digit
    phone: str = "[phone number]"  # in the forms above

    def __call__(self, page: Page) -> Page | Dropped:
        found: Counter[str] = Counter()

        def masked(text: str) -> str:
            return self.masked(text, found)

        changed = with_texts(page, masked)
        parts = tuple(replace(p, alt=masked(p.alt)) if isinstance(p, Picture) else p for p in changed.parts)
        changed = replace(changed, title=masked(page.title), parts=parts)
        return noted(changed, self, dict(sorted(found.items()))) if found else page

    def masked(self, text: str, found: Counter[str]) -> str:
        def card(match: re.Match) -> str:
            if not luhn(re.sub(r"\D", "", match[0])):
                return match[0]
            found["cards"] += 1
            return self.card

        text, n = EMAIL.subn(self.email, text)
        found["e-mails"] += n
        # Before telephone numbers, which are shorter.
        text = CARD.sub(card, text)
        for form in PHONES:
            text, n = form.subn(self.phone, text)
            found["phones"] += n
        for name in [name for name, n in found.items() if not n]:
            del found[name]
        return text


@cache
def adult_words() -> re.Pattern:
    """Latin words stand alone; Chinese ones anywhere, as it has no spaces."""
    groups = defaultdict(list)
    for word in read_text(Path(__file__).with_name("adult.txt")).split():
        groups[is_han(word)].append(re.escape(word))
    return re.compile(rf"\b(?:{'|'.join(groups[False])})\b|{'|'.join(groups[True])}", re.I | re.A)


@dataclass(frozen=True)
class Adult:
    """Drops pages with many words of adult.txt, a short list of words that hardly mean anything else."""

    share: float = 0.01  # of all words, at most; OBELICS for its flagged words
    least: int = 2  # such words that it takes in any case: a short page may have one; own choice

    def __call__(self, page: Page) -> Page | Dropped:
        found = adult_words().findall(f"{page.title}\n{page.text}")
        share = len(found) / max(1.0, count_words(page.text))
        if len(found) >= self.least and share > self.share:
            return Dropped(f"adult: {len(found)} words, {share:.1%}")
        return page
