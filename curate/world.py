"""The synthetic path without any model at hand: the miniature's world, in which every picture can be checked.

    Requested(...)      requests that the sketchbook's grammar grows, a seed each
    Drawn("self")       answered and painted by this project's system, or "renderer": by the sketchbook itself
    Checked()           the sketchbook's checker reads words and pictures, and keeps what is right throughout

So a system learns from those of its own answers that a judge without mercy has passed. The requests are of the split `train`:
what the exams ask (evaluate/) stays unseen, the sixty free requests included.
"""

import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace

from PIL import Image

from curate.page import Dropped, Page, Part, Picture
from curate.painter import Painter, kept_file, png, system, tally
from curate.requests import Known
from curate.store import read_pages, whole, write_page
from evaluate.exam import Case, Corpus, free_requests
from sketchbook.dialogues import dialogue

FORMAT = 1  # of a key, as in painter.py
TOKENS = 400  # of an answer at most; the corpus' own have about a hundred


# ----------------------------------------------------------------------------------------------------------------- requests


def drawn_record(seed: int) -> dict:
    """A dialogue of the sketchbook with its truth, as the exams take them."""
    return dialogue(seed, "train") | {"split": "train", "seed": seed, "held_out_by": []}


def words_of_user(record: dict) -> str:
    """What the user says in his first message."""
    return " ".join(part["text"] for part in record["messages"][0]["content"] if part["type"] == "text")


def choose_seeds(n: int, first: int = 0) -> tuple[list[int], Counter]:
    """The seeds of n different requests, and what was left out, by kind."""
    examined = Known(words_of_user(record) for record in free_requests())
    seen = set()
    seeds = []
    refused = Counter()
    seed = first
    while len(seeds) < n:
        record = drawn_record(seed)
        words = words_of_user(record)
        # The same words beside other pictures are another request.
        pictures = [part["image"].tobytes() for part in record["messages"][0]["content"] if part["type"] == "image"]
        key = hashlib.sha256(repr((words.lower(), pictures)).encode()).digest()
        if key in seen:
            refused["repeated"] += 1
        elif examined.like(words):
            refused["near to an exam's"] += 1
        else:
            seen.add(key)
            seeds.append(seed)
        seed += 1
    return seeds, refused


@dataclass(frozen=True)
class Requested:
    """A source of the engine. Its items are seeds, separated by commas."""

    def read(self, item: str) -> Iterator[Page]:
        for seed in map(int, item.split(",")):
            record = drawn_record(seed)
            notes = {"seed": seed, "kind": record["kind"]}
            yield page_of(f"sketchbook:{seed}", words_of_user(record), record["messages"][:1], notes)


def page_of(id: str, title: str, messages: list[dict], notes: dict) -> Page:
    """A dialogue whose pictures are open images, as a page."""
    parts: list[Part] = []
    out = []
    number = 0
    for message in messages:
        content = []
        for part in message["content"]:
            if part["type"] == "text":
                # Of text that a model wrote, the blanks beside a picture are nothing to learn.
                text = part["text"].strip()
                if text:
                    parts.append(text)
                    content.append({"type": "text", "text": text})
                continue
            image = part["image"]
            picture = Picture(f"{id}#{number}", width=image.width, height=image.height)
            parts.append(picture.filled(png(image)))
            content.append({"type": "image", "image": number})
            number += 1
        out.append({"role": message["role"], "content": content})
    return Page(id, title=title, parts=tuple(parts), messages=tuple(out), notes=notes)


# ------------------------------------------------------------------------------------------------------------------ answers


@dataclass(frozen=True)
class Drawn:
    """The dialogue is held: each of the user's messages is answered in words and pictures."""

    painter: Painter
    renderer: bool = False  # the sketchbook's own answers, exact in every pixel

    def manifest(self) -> dict:
        return {"painter": {} if self.renderer else self.painter.manifest()}

    def __call__(self, page: Page) -> Page:
        seed = page.notes["seed"]
        if self.renderer:
            return self.held(page, Corpus([record := drawn_record(seed)]), record)
        file = kept_file(self.painter.kept, self.key(seed), "page")
        if file and file.is_file():
            [kept] = read_pages(file)
            tally(self.painter, os.getpid())["kept"] += len(kept.pictures) - len(page.pictures)
            return kept
        duo = system(self.painter, os.getpid())
        answered = self.held(page, duo, drawn_record(seed))
        tally(self.painter, os.getpid())["painted"] += len(answered.pictures) - len(page.pictures)
        if file:
            with whole(file) as out:
                write_page(out, answered)
        return answered

    def held(self, page: Page, writer, record: dict) -> Page:
        """The dialogue as the exam holds it: it ends early where a picture gives the next request no meaning."""
        settings = None
        if not self.renderer:
            asked = self.painter.settings(page.id)
            settings = writer.settings(max_tokens=TOKENS, **asked)
        case = Case(record)
        while (messages := case.ask()) is not None:
            [answer] = writer.generate_many([messages], settings, first=len(case.turns))
            case.take(answer)
        notes = page.notes | ({"left out": case.left_out} if case.left_out else {})
        # How each answer ended is not to be seen in it, and the checker asks for it.
        notes["stops"] = [turn["stop"] for turn in case.turns]
        return page_of(page.id, page.title, case.messages, notes)

    def key(self, seed: int) -> str:
        """A hash of all that the answers depend on."""
        asked = [words_of_user(record := drawn_record(seed)), record["truth"]["turns"]]
        everything = [FORMAT, self.painter.identity(), seed, asked, self.painter.settings(f"sketchbook:{seed}"), TOKENS]
        return hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Checked:
    """Kept is a dialogue in which all is right: words, number and places of the pictures, and what they show and keep."""

    def __call__(self, page: Page) -> Page | Dropped:
        case = Case(drawn_record(page.notes["seed"]))
        pictures = iter(page.pictures)
        answers = []
        for message in page.messages:
            opened = [p["text"] if p["type"] == "text" else image_of(next(pictures)) for p in message["content"]]
            if message["role"] == "assistant":
                answers.append(opened)
        for opened, stop in zip(answers, page.notes["stops"], strict=True):
            case.ask()
            parts = [part if isinstance(part, str) else SimpleNamespace(image=part) for part in opened]
            content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in opened]
            case.take(SimpleNamespace(parts=parts, stop=stop, message={"role": "assistant", "content": content}))
        marks = case.marks()
        if marks.pop("whole")[0]:
            notes = {key: value for key, value in page.notes.items() if key != "stops"}
            return replace(page, notes=notes)
        wrong = [WRONG[name] for name, values in marks.items() if not all(values)]
        return Dropped(wrong[0] if wrong else f"answer that stopped: {', '.join(page.notes['stops'])}")


# What the exam's marks mean where they fail; the first of them is the reason.
WRONG = {
    "drawn": "pictures that are missing",
    "placed": "pictures where none are due",
    "text": "words that do not say what was asked for",
    "named": "details that the user named and that are lost",
    "shows": "pictures that do not show what the words say",
    "stays": "pictures that lose what had to stay",
}


def image_of(picture: Picture) -> Image.Image:
    return Image.open(io.BytesIO(picture.data)).convert("RGB")
