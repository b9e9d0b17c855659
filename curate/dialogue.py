"""A page becomes a dialogue: a user asks what the page answers, and the assistant answers in the page's steps and pictures.

    Dialogue(model)         page.messages; pictures in it are numbers
    record_of(page)         the record of data.py, and its pictures' files

The question comes from a model, in a tone drawn for the page, or without one from questions.json, filled in with the title. The
answer is the page itself, cut at headings and numbered steps; what is drawn follows from the page's id and a seed alone.
"""

import hashlib
import json
import re
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from urllib.parse import urlsplit

from checkpoint import InputError, read_json
from curate.caption import LANGUAGES
from curate.models import Model, asking, at_once, prompt
from curate.page import Dropped, Page, Picture
from curate.reorder import blocks_of
from curate.text import LIST_ITEM, count_words, language_of, noted, plain
from evaluate.judges import Unanswered

TITLE = re.compile(r"#\s+(.+)\n*")
HEADING = re.compile(r"#{1,6}\s")
HOW_TO = re.compile(r"(?:how to|如何|怎么|怎样)\s*", re.I)
RECIPE = re.compile(r"(.+?)\s*(?:的做法|recipe)", re.I)
COOKING = re.compile(r"^#+\s*(?:ingredients|必备原料和工具|食材|用料)\s*$", re.I | re.M)
HEADINGS = re.compile(r"^#{1,6}\s+(.+)$", re.M)
# What stands over a page that is a part of something, and says nothing by itself.
GENERIC = re.compile(
    r"(?:activity|introduction|make|build|build guide|code|connect|challenges?|projects?|review|overview|home|index|welcome"
    r"|getting started|setup(?: and procedure)?|steps?|materials|untitled|简介|介绍|首页|前言|概述|说明)?|[\W\d_]*|~.*",
    re.I,
)
# Words that say "this page": a user cannot know of it.
OF_THE_PAGE = re.compile(r"\b(?:this|the) (?:guide|page|article|recipe|tutorial|text|picture)\b|本文|这篇|本页|上文|文中", re.I)
KINDS = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@cache
def questions() -> dict:
    return read_json(Path(__file__).with_name("questions.json"))


def drawn(count: int, *key: object) -> int:
    """A number below count that follows from the key alone, the same on every machine."""
    digest = hashlib.sha256(json.dumps([str(each) for each in key]).encode()).digest()
    return int.from_bytes(digest[:8], "big") * count >> 64


# ---------------------------------------------------------------------------------------------------------------- question


def subject(page: Page) -> tuple[str, str]:
    """(how the page's title is to be asked about, what is put in); the first heading where the title says nothing.

    "dish": what is to be made; "how": what is to be done; "thing": anything else; "": no heading says anything.
    """
    titles = (" ".join(plain(title).split()).strip("# .:?!。？！：") for title in (page.title, *HEADINGS.findall(page.text)))
    title = next((title for title in titles if not GENERIC.fullmatch(title)), "")
    if not title:
        return "", ""
    if match := HOW_TO.match(title):
        what = title[match.end() :]
        return "how", what[:1].lower() + what[1:]
    if match := RECIPE.fullmatch(title):
        return "dish", match[1]
    if COOKING.search(page.text):
        return "dish", title
    return "thing", title


def question_by_rules(page: Page, tone: str, seed: int) -> str | Dropped:
    """From questions.json; in English where the page's language has none there."""
    sentences = questions().get(page.language, questions()["en"])
    kind, what = subject(page)
    if not kind:
        return Dropped("no question: the title says nothing")
    forms = sentences[kind][tone]
    question = forms[drawn(len(forms), "form", seed, page.id)].replace("{what}", what)
    # Whether the user asks for pictures says nothing about whether the answer has them, but must not promise what is not there.
    if page.pictures:
        wishes = sentences["pictures"]
        wish = wishes[drawn(len(wishes), "pictures", seed, page.id)]
        question = f"{question}{wish}" if question.endswith((".", "?", "。", "？")) else question
    return question


# ------------------------------------------------------------------------------------------------------------------ answer


def steps_of(text: str) -> list[str]:
    """A text cut before its headings and the items of its numbered lists; together they are the text."""
    steps = [""]
    for block in blocks_of(text):
        numbered = re.match(r"\s*\d+[.)、]", block)
        # A heading belongs to what stands under it, so nothing is cut right behind one.
        alone = HEADING.match(steps[-1].lstrip()) and len(steps[-1].strip().splitlines()) == 1
        if steps[-1].strip() and not alone and (HEADING.match(block) or (numbered and LIST_ITEM.match(block))):
            steps.append("")
        steps[-1] += block
    return [step for step in steps if step.strip()]


def answer_of(page: Page) -> list[dict]:
    """The page as content parts of a message: every step a text of its own, a text before each picture where there is one."""
    content: list[dict] = []
    number = 0
    for part in page.parts:
        if isinstance(part, Picture):
            # Two pictures in a row, or one at the very beginning: the words of the second stand between them.
            lead = part.caption or part.alt
            if (not content or content[-1]["type"] == "image") and lead.strip():
                content.append({"type": "text", "text": lead.strip()})
            content.append({"type": "image", "image": number})
            number += 1
            continue
        # A dialogue has no title: it would repeat the question.
        text = TITLE.sub("", part, count=1) if not content and TITLE.match(part) else part
        steps = steps_of(text)
        for k, step in enumerate(steps, 1):
            # What stands side by side is read as one text, so the line break between two steps must be in it.
            content.append({"type": "text", "text": step if k < len(steps) else step.rstrip()})
    return content


# -------------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True)
class Dialogue:
    """Writes page.messages. A page with nothing to learn from is dropped, and one whose question a model does not give."""

    model: Model = Model()  # none: questions by rules
    seed: int = 0  # of tones and sentences
    words: int = 60  # of a model's question, at most; own choice: it is asked for 40
    shown: int = 800  # words of the page that the model is shown; own choice: enough to know what it is about

    @property
    def at_once(self) -> int:
        return at_once(self.model)

    def manifest(self) -> dict:
        return asking(self.model, "question")

    def __call__(self, page: Page) -> Page | Dropped:
        content = answer_of(page)
        if not any(part["type"] == "text" and part["text"].strip() for part in content):
            return Dropped("no text")
        tones = list(questions()["tones"])
        tone = tones[drawn(len(tones), "tone", self.seed, page.id)]
        question = self.asked(page, tone) if self.model else question_by_rules(page, tone, self.seed)
        if isinstance(question, Dropped):
            return question
        user = {"role": "user", "content": [{"type": "text", "text": question}]}
        messages = (user, {"role": "assistant", "content": content})
        return noted(replace(page, messages=messages), self, {"tone": tone})

    def asked(self, page: Page, tone: str) -> str | Dropped:
        language = LANGUAGES.get(page.language, "the language of the guide")
        words = prompt("question", tone=questions()["tones"][tone], language=language, page=self.beginning(page))
        try:
            question = self.model.write([words], max_tokens=256)
        except Unanswered as e:
            return Dropped(f"no question: {e}")
        question = " ".join(question.split()).strip('"“”')
        why = self.objection(question, page)
        return Dropped(f"no question: {why}") if why else question

    def beginning(self, page: Page) -> str:
        text = f"# {page.title}\n\n{page.text}"
        words = count_words(text)
        return text if words <= self.shown else text[: int(len(text) * self.shown / words)]

    def objection(self, question: str, page: Page) -> str:
        """What is wrong with a model's question; empty: nothing."""
        if not question:
            return "it is empty"
        if count_words(question) > self.words:
            return "it is too long"
        if OF_THE_PAGE.search(question):
            return "it speaks of the page"
        # Of very short questions py3langid cannot be sure.
        if page.language and count_words(question) >= 5 and language_of(question)[0] != page.language:
            return "it is in another language"
        return ""


# ------------------------------------------------------------------------------------------------------------------ record


def ending_of(picture: Picture) -> str:
    """jpg, png, ... by the first bytes of the file, or by its address."""
    for head, ending in KINDS.items():
        if picture.data.startswith(head):
            return ending
    if picture.data[:4] == b"RIFF" and picture.data[8:12] == b"WEBP":
        return "webp"
    if picture.data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return re.sub(r"[^a-z0-9]", "", Path(urlsplit(picture.address).path).suffix.lower())[:5] or "image"


def record_of(page: Page, key: str = "") -> tuple[dict, dict[str, bytes]]:
    """(the record of data.py, {name: file of a picture}) of a page that has messages.

    key: how names of pictures begin, without dots: in a shard the name of the record; empty: the page's id.
    """
    if not page.messages:
        raise InputError(f"{page.id}: has no messages: it has not been through Dialogue")
    key = re.sub(r"[^\w-]", "-", key or page.id)
    pictures = page.pictures
    files = {}
    messages = []
    for message in page.messages:
        content = []
        for part in message["content"]:
            if part["type"] == "image":
                picture = pictures[part["image"]]
                name = f"{key}.{part['image']}.{ending_of(picture)}"
                files[name] = picture.data
                part = {"type": "image", "image": name}
            content.append(part)
        messages.append({"role": message["role"], "content": content})
    return {"messages": messages}, files
