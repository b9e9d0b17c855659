"""What people ask for: seeds written by hand, grown by a model, without repetitions and without the benchmarks' own requests.

    seeds()                             453 requests in 8 domains and 151 subcategories (seeds.json)
    grow(wishes, 15000, model)          more of them, as many in every subcategory

The subcategories are those of evaluate/benchmarks/howto500.json, the requests are others: whoever trains on what comes of them
and is then examined by howto500 or cooking200 must not have seen its questions. So a request that is near to one of theirs is
refused, by the same measure that finds repetitions: the share of common words, small words and endings left out.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from checkpoint import InputError, read_json
from curate.models import Model, prompt
from evaluate.benchmarks import cooking200, howto500
from evaluate.judges import Unanswered

SEEDS = Path(__file__).parent / "seeds.json"
NEAR = 0.6  # share of common words from which two requests are the same
AT_A_TIME = 10  # requests that the model is asked for at a time
SHOWN = 8  # of those that there are, so that it writes others
LENGTH = 12, 300  # characters of a request, least and most
DRY = 2  # rounds in a row that bring next to nothing, until growing ends

SMALL_WORDS = frozenset(
    """a about after all an and any are as at be by can do does each every for from get go goes has have how i if in into is
    it its keep know let like make me my need of off on one or our out over please put should show so step than that the
    their them then there they this through to two up use walk want was what when where which while who why will with
    without would you your picture explain teach tell help set give""".split()
)


class Wish(NamedTuple):
    """A request and where it belongs."""

    domain: str
    subcategory: str
    text: str


def words_of(text: str) -> frozenset[str]:
    """The words that say what a request is about, each without its ending."""
    found = re.findall(r"[^\W_]+", text.lower())
    return frozenset(stem(word) for word in found if word not in SMALL_WORDS)


def stem(word: str) -> str:
    """fold, folds, folded and folding are one word; that now and then two others become one does no harm here."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) >= len(ending) + 3:
            word = word[: -len(ending)]
            break
    if len(word) > 3 and word[-1] == word[-2]:
        return word[:-1]
    return word


class Known:
    """Requests that there are, and which of them a new one is like."""

    def __init__(self, texts: Iterable[str] = ()):
        self.texts: list[str] = []
        self.sizes: list[int] = []
        self.places = defaultdict(list)  # {word: numbers of the requests that have it}
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        words = words_of(text)
        for word in words:
            self.places[word].append(len(self.texts))
        self.texts.append(text)
        self.sizes.append(len(words))

    def like(self, text: str) -> str | None:
        """The nearest one, if it is as near as NEAR; of two that have no words left the first."""
        words = words_of(text)
        common = Counter(number for word in words for number in self.places.get(word, ()))
        best = None
        nearest = NEAR
        for number, n in common.items():
            share = n / (len(words) + self.sizes[number] - n)
            if share >= nearest:
                best, nearest = self.texts[number], share
        return best


def seeds(path: Path = SEEDS) -> list[Wish]:
    """The first of every subcategory, then the second, and so on."""
    domains = read_json(path)["domains"]
    each = [[Wish(d, s, text) for text in texts] for d, subs in domains.items() for s, texts in subs.items()]
    return [wish for row in zip_longest(*each) for wish in row if wish]


def examined() -> list[str]:
    """The requests of the benchmarks that this project has written."""
    asked = [request for benchmark in (howto500, cooking200) for request in benchmark.requests()]
    return [part["text"] for request in asked for part in request.messages[0]["content"]]


def grow(wishes: list[Wish], n: int, model: Model) -> tuple[list[Wish], Counter]:
    """n requests, those that there are among them, and what was refused on the way, by kind.

    A round asks for more in every subcategory that has fewer than its share, all at once. Fewer than n come back where the
    model has nothing new to say. The same answers of the model give the same requests.
    """
    if n <= len(wishes):
        return wishes[:n], Counter()
    kept = list(wishes)
    known = Known(wish.text for wish in wishes)
    forbidden = Known(examined())
    places = list(dict.fromkeys((wish.domain, wish.subcategory) for wish in wishes))
    share = -(-n // len(places))
    refused = Counter()
    dry = 0
    for number in range(1000):
        have = Counter((wish.domain, wish.subcategory) for wish in kept)
        open_places = [place for place in places if have[place] < share]
        if not open_places or dry == DRY:
            break
        questions = [[asked_for(place, kept, number)] for place in open_places]
        fresh = 0
        for place, answer in zip(open_places, model.write_all(questions), strict=True):
            if isinstance(answer, Unanswered):
                refused["model without an answer"] += 1
                continue
            for text in requests_in(answer):
                reason = refusal(text, known, forbidden)
                if reason:
                    refused[reason] += 1
                elif have[place] < share:
                    have[place] += 1
                    known.add(text)
                    kept.append(Wish(*place, text))
                    fresh += 1
        dry = dry + 1 if fresh < len(open_places) / 10 else 0
    return kept[:n], refused


def asked_for(place: tuple[str, str], kept: list[Wish], number: int) -> str:
    """The question of a round. The examples move on from round to round, so that the model does too."""
    own = [wish.text for wish in kept if (wish.domain, wish.subcategory) == place]
    start = number * SHOWN % len(own)
    shown = (own[start:] + own[:start])[:SHOWN]
    examples = "\n".join(f"- {text}" for text in shown)
    return prompt("grow", n=str(AT_A_TIME), domain=place[0], subcategory=place[1], examples=examples, round=str(number + 1))


def requests_in(answer: str) -> list[str]:
    """One request a line, bullets, numbers and quotation marks left out."""
    lines = (re.sub(r"^\s*(?:[-*•]|\d+[.)])\s*", "", line).strip().strip('"“”').strip() for line in answer.splitlines())
    return [line for line in lines if line]


def refusal(text: str, known: Known, forbidden: Known) -> str:
    """Why a request is not taken, in a word or two; empty where it is."""
    least, most = LENGTH
    if not least <= len(text) <= most or not words_of(text):
        return "no request"
    if forbidden.like(text):
        return "near to a benchmark's"
    return "repeated" if known.like(text) else ""


def check_seeds(wishes: list[Wish]) -> None:
    """InputError where two of them are alike, or one is near to a benchmark's."""
    forbidden = Known(examined())
    known = Known()
    for wish in wishes:
        reason = refusal(wish.text, known, forbidden)
        if reason:
            raise InputError(f"{wish.subcategory}: {wish.text!r:.80}: {reason}")
        known.add(wish.text)
