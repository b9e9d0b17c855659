"""Who judges: what a judge is asked, how its words are read, and where both are kept.

    judge = Asker(backend, Path("runs/e/calls"))
    judge.yes("Is there a red house?", picture)                 Verdict(0.93, "judged", "Yes")
    judge.rating("Rate how sharp it is.", picture, low=1, high=5)
    judge.fields("Rate both.", a, b, keys={"style": (0, 10), "content": (0, 10)})

A backend answers one `Question` by a `Reply`: server.py has that of any OpenAI-compatible server, own.py that of this
repository's language model. What was asked and answered lies in a file by the hash of its content, of a picture its pixels: the
same question to the same judge is answered from the disk.

A reader is strict: a number of the wrong type, outside its scale or missing makes the words unparsable. Nothing is guessed.
"""

import hashlib
import json
import math
import re
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image

from checkpoint import InputError, read_json
from distributed import take_lock
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE, Verdict
from model import to_rgb
from pages.answer import harmless_json, write_text

FORMAT = 1  # of a question: a change of the sentences below makes another one
LONGEST = 20_000  # characters of a judge's words that are read and kept
SORRY = re.compile(r"\W*((i['’]m|i am)? ?(sorry|afraid|unable)|i (can['’]t|cannot|won['’]t|will not))\b", re.I)
YES = re.compile(r"\W*(yes|no)\b", re.I)
FENCE = re.compile(r"\s*```(?:json)?\s*(.*?)\s*```\s*", re.S)
THOUGHT = re.compile(r"\s*<think>.*?</think>", re.S)  # what a reasoning model says to itself


class Question(NamedTuple):
    """What a backend is asked. parts: texts and pictures in order, the instruction among them."""

    kind: str  # "yes" or "fields"
    parts: list[str | Image.Image]
    keys: dict[str, tuple[float, float]]  # the numbers that are wanted, {} for yes

    @property
    def pictures(self) -> list[Image.Image]:
        return [p for p in self.parts if not isinstance(p, str)]

    def schema(self) -> dict:
        """The JSON schema of an answer to "fields"."""
        scale = {key: {"type": "number", "minimum": low, "maximum": high} for key, (low, high) in self.keys.items()}
        properties = {"reason": {"type": "string"}} | scale
        return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


class Unanswered(Exception):
    """The judge did not answer one question, though it was asked again and again."""


@dataclass
class Reply:
    """What a backend answered. value: where it measured probabilities, {"yes": p} or {key: number}; else words are read."""

    words: str
    refused: bool = False
    value: dict[str, float] | None = None
    tokens: tuple[int, int] = (0, 0)  # read, written
    model: str = ""  # as it calls itself


class Backend(Protocol):
    """A judge's own part. identity: all that its answers depend on beside the question."""

    name: str
    identity: dict

    def ask(self, question: Question) -> Reply: ...


@dataclass
class Tally:
    """What asking took so far."""

    asked: int = 0
    kept: int = 0  # answered from the disk
    read: int = 0  # tokens
    written: int = 0
    models: set[str] = field(default_factory=set)  # what the server says that it is

    def told(self, price: tuple[float, float] | None = None) -> str:
        """It in words. price: of a million tokens read and written."""
        text = f"{self.asked:,} calls, {self.kept:,} from disk, {self.read:,} + {self.written:,} tokens"
        if price:
            text += f", cost {(self.read * price[0] + self.written * price[1]) / 1e6:.2f}"
        return text


class Asker:
    """The Judge that `score` gets. One for all items and threads."""

    def __init__(self, backend: Backend, calls: Path):
        self.backend = backend
        self.calls = calls
        self.tally = Tally()
        self.lock = threading.Lock()
        self.asking = defaultdict(threading.Lock)  # by question: who asks the same at the same time waits for the answer
        self.names: set[str] = set()  # of `tally.models` those that answered about one item

    def for_item(self) -> "Asker":
        """The same one, with `names` of its own."""
        other = copy(self)
        other.names = set()
        return other

    def yes(self, question: str, *content: str | Image.Image) -> Verdict:
        parts = [*content, f"{question}\nAnswer with yes or no."]
        reply = self.reply(Question("yes", parts, {}))
        if reply.value is not None:
            return Verdict(reply.value["yes"], JUDGED, reply.words)
        said = YES.match(plain(reply.words))
        return verdict(reply, None if said is None else float(said[1].lower() == "yes"))

    def rating(self, rubric: str, *content: str | Image.Image, low: int, high: int) -> Verdict:
        found = self.fields(rubric, *content, keys={"score": (low, high)})
        return found._replace(value=None if found.value is None else found.value["score"])

    def fields(self, prompt: str, *content: str | Image.Image, keys: dict[str, tuple[float, float]]) -> Verdict:
        scales = "; ".join(f'"{key}" from {low:g} to {high:g}' for key, (low, high) in keys.items())
        form = "{" + ", ".join(['"reason": "..."', *(f'"{key}": number' for key in keys)]) + "}"
        parts = [prompt, *content, f"Answer with JSON alone, {form}, with {scales}. Keep the reason to one sentence."]
        reply = self.reply(Question("fields", parts, keys))
        value = reply.value
        if value is None:
            value = read_fields(reply.words, keys)
        return verdict(reply, value)

    def reply(self, question: Question) -> Reply:
        """From the disk, or from the judge and then onto the disk."""
        asked = described(question) | {"judge": self.backend.identity}
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        file = self.calls / key[:2] / f"{key}.json"
        with self.lock:
            own = self.asking[key]
        with own, one_asks(file):
            reply = self.kept_or_new(question, asked, file)
        self.names.add(reply.model)
        with self.lock:
            self.tally.models.add(reply.model)
        return reply

    def kept_or_new(self, question: Question, asked: dict, file: Path) -> Reply:
        kept = kept_reply(file)
        if kept is not None:
            with self.lock:
                self.tally.kept += 1
            return kept
        reply = self.backend.ask(question)
        reply.words = reply.words[:LONGEST]
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_text(file, harmless_json({"asked": asked, "date": now, "reply": vars(reply)}))
        with self.lock:
            self.tally.asked += 1
            self.tally.read += reply.tokens[0]
            self.tally.written += reply.tokens[1]
        return reply


def kept_reply(file: Path) -> Reply | None:
    """What a judge said, from the disk; None if it was never asked, or if a file is not what was written (a full disk)."""
    if not file.is_file():
        return None
    try:
        kept = read_json(file)["reply"]
        return Reply(**kept | {"tokens": tuple(kept["tokens"])})
    except (InputError, LookupError, TypeError):
        return None


@contextmanager
def one_asks(file: Path) -> Iterator[None]:
    """Of several ranks with the same question one asks, and the others find its answer."""
    if kept_reply(file) is not None:
        yield
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_suffix(".lock")
    with open(lock, "w") as held:
        take_lock(held, math.inf)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def described(question: Question) -> dict:
    """A question as JSON; of a picture its size and the hash of its pixels."""
    parts = []
    for part in question.parts:
        if not isinstance(part, str):
            image = to_rgb(part)
            part = {"size": image.size, "sha256": hashlib.sha256(image.tobytes()).hexdigest()}
        parts.append(part)
    return {"format": FORMAT, "kind": question.kind, "parts": parts, "keys": question.keys}


def verdict(reply: Reply, value: float | dict | None) -> Verdict:
    """A value that could be read counts, whatever stands around it: a judge may be sorry for a low score."""
    if value is not None and not reply.refused:
        return Verdict(value, JUDGED, reply.words)
    sorry = reply.refused or SORRY.match(plain(reply.words))
    return Verdict(None, REFUSED if sorry else UNPARSABLE, reply.words)


def plain(words: str) -> str:
    """Words without the thoughts before them and the fence around them."""
    words = THOUGHT.sub("", words, count=1).strip()
    fenced = FENCE.fullmatch(words)
    return fenced[1] if fenced else words


def read_fields(words: str, keys: dict[str, tuple[float, float]]) -> dict[str, float] | None:
    """The numbers in a judge's JSON; None unless every one is there, a number, and on its scale.

    Prose may stand around the object, for some models cannot be kept from it; a second object would leave a choice.
    """
    words = plain(words)
    start = words.find("{")
    if start < 0:
        return None
    try:
        value, end = json.JSONDecoder().raw_decode(words, start)
    except (ValueError, RecursionError):
        return None
    if "{" in words[end:]:
        return None
    numbers = {}
    for key, (low, high) in keys.items():
        number = value.get(key)
        # JSON's true is an int to Python, and no score.
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            return None
        if not low <= number <= high:
            return None
        numbers[key] = number
    return numbers
