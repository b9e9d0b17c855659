"""A benchmark is one small file in `evaluate/benchmarks/`: what is asked, how an answer is scored, how scores become figures.

    NAME = "toy"                                     its name on the command line
    TITLE = "Four questions about colours"           its name on the report
    SOURCE = {"id": "owner/name", "revision": "...", "file": "items.json", "licence": "Apache-2.0"}
                                                     and "hub": "" or "datasets/" if that is a repository of the Hub
    PUBLISHED = [{"system": "X", "figures": {"overall": 0.8}, "judge": "GPT-4o", "source": "arXiv ..."}]
                                                     and what makes them incomparable: "items", "n" or "rule"

    def requests(items: Path | None) -> Iterator[Request]          items: a folder or file at hand; None: the benchmark's own
    def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]
    def aggregate(rows: list[dict]) -> dict[str, Figure]           a row: {"id", "meta", "scores": {name: {"value", "why"}}}

`requests` yields the same requests in the same order every time, and its `meta` is JSON. `score` may ask the judge as often as
it likes: an answer is kept by what was asked, so nothing is asked twice. `aggregate` is called again and again with rows drawn
at random, for the interval of every figure: it must not mind rows that come twice.

Where an answer has no picture or no text, there is nothing to ask: `floor` is then the score. It is never left out.
"""

import importlib.util
import math
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, Protocol

from PIL import Image

from checkpoint import InputError

JUDGED = "judged"
REFUSED = "refused"  # the judge would not, or its filter stood before it
UNPARSABLE = "unparsable"  # it said something, but no score can be read from it
MISSING = "missing"  # there was nothing to judge: the value is the scale's floor
NEEDED = ("NAME", "TITLE", "SOURCE", "PUBLISHED", "requests", "score", "aggregate")
FOLDER = Path(__file__).parent / "benchmarks"


class Request(NamedTuple):
    """One item of a benchmark."""

    id: str  # unique in the benchmark, usable as a folder name
    messages: list[dict]  # as in a record: role, content parts; pictures are PIL images or paths
    meta: dict  # what score needs


def content_of(message: dict) -> list[dict]:
    """The parts of a message; plain text is one."""
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Answer(NamedTuple):
    """What a system answered."""

    texts: list[str]  # before each picture, and after the last: one more than pictures
    pictures: list[Image.Image]


class Verdict(NamedTuple):
    """What came of one question to the judge."""

    value: float | dict | None  # None: refused or unparsable
    why: str = JUDGED
    words: str = ""  # the judge's own


class Judge(Protocol):
    """Whom `score` may ask. content: texts and pictures, in the order in which the judge is to see them."""

    def yes(self, question: str, *content: str | Image.Image) -> Verdict:
        """The probability of yes, 0 to 1."""

    def rating(self, rubric: str, *content: str | Image.Image, low: int, high: int) -> Verdict:
        """A number of the scale from low to high; one that is read from probabilities may lie between two steps."""

    def fields(self, prompt: str, *content: str | Image.Image, keys: dict[str, tuple[float, float]]) -> Verdict:
        """Several numbers at once, {key: number}; keys: {key: (lowest, highest)}."""


class Figure(NamedTuple):
    """A number of the report. Its interval comes from drawing the items again."""

    value: float
    n: int  # items behind it
    low: float = math.nan
    high: float = math.nan


def floor(low: float | dict, what: str = "picture") -> Verdict:
    """The score of what is not there. low: the scale's lowest, or {key: lowest} where `fields` would have been asked."""
    return Verdict(low, MISSING, f"no {what}: the lowest score")


def known(rows: Iterable[dict], name: str, unjudged: float | None = None) -> list[float]:
    """The values of one score. Where the judge gave none, `unjudged` stands; None: it is left out, and the counts say so.

    Rows that were never asked for this score are not in it.
    """
    values = (row["scores"][name]["value"] for row in rows if name in row["scores"])
    filled = (unjudged if value is None else value for value in values)
    return [value for value in filled if value is not None]


def mean(rows: Iterable[dict], name: str, unjudged: float | None = None) -> Figure:
    """The mean of one score, see `known`."""
    return average(known(rows, name, unjudged))


def valued(rows: Iterable[dict]) -> int:
    """How many items have a value in any score: what a mean over several scores is made of."""
    return sum(any(score["value"] is not None for score in row["scores"].values()) for row in rows)


def average(values: list[float]) -> Figure:
    return Figure(sum(values) / len(values) if values else math.nan, len(values))


def grouped(rows: Iterable[dict], key: Callable[[dict], str]) -> dict[str, list[dict]]:
    """{group: its rows}, groups in the order in which they appear."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


# ----------------------------------------------------------------------------------------------------------------- finding


def names() -> list[str]:
    """All benchmarks that are there."""
    return sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__")


def find(name: str) -> ModuleType:
    """The benchmark of this name; a path to a .py file is one, too, so that a benchmark need not lie in the repository."""
    file = Path(name)
    if file.suffix != ".py":
        file = FOLDER / f"{name}.py"
    if not file.is_file():
        raise InputError(f"{name}: no such benchmark; there are {', '.join(['sketchbook', *names()])}")
    if file.parent == FOLDER:
        module = importlib.import_module(f"evaluate.benchmarks.{name}")
    else:
        spec = importlib.util.spec_from_file_location(f"benchmark_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as e:  # somebody else's code fails in its own way
            line = traceback.extract_tb(e.__traceback__)[-1].lineno
            raise InputError(f"{file}: cannot be read as a benchmark ({type(e).__name__}: {e}; line {line})") from None
    lacking = [part for part in NEEDED if not hasattr(module, part)]
    if lacking:
        raise InputError(f"{file}: no benchmark, it lacks {', '.join(lacking)}")
    return module


def requests_of(module: ModuleType, items: Path | None = None, n: int | None = None) -> Iterator[Request]:
    """The first n requests, each with an id of its own that can be a folder."""
    if items is not None and not items.exists():
        raise InputError(f"--items {items}: does not exist")
    seen = set()
    for request in whole_items(module, items):
        if n is not None and len(seen) >= n:
            return
        if request.id in seen or not request.id or "/" in request.id or request.id.startswith("."):
            raise InputError(f"{module.NAME}: {request.id!r} comes twice or can be no folder")
        seen.add(request.id)
        yield request


def whole_items(module: ModuleType, items: Path | None) -> Iterator[Request]:
    """What the benchmark makes of its items; InputError where one lacks what it reads."""
    number = 1
    try:
        for request in module.requests(items):
            yield request
            number += 1
    except InputError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError) as e:
        where = f"item {number} of {items or 'its own file'}"
        raise InputError(f"{module.NAME}: {where} is not in the form that it reads ({type(e).__name__}: {e})") from None
