"""GenEval (arXiv 2310.11513): 553 short prompts of six sorts; are the things, counts, colours and places there?

GenEval lets a detector answer. Here the judge answers, one question for every thing, count, colour and place ("atom"), so that
the figures are not GenEval's own: the rule is its (all atoms right; mean over the six sorts), who answers is not. Of the
published four pictures a prompt one is asked for; of several pictures in an answer the first counts.

Beside it stands the soft form that GenEval 2 uses: the mean of the probabilities of yes over atoms (arithmetic), and over
prompts the geometric mean, which a single no brings down.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Answer, Figure, Judge, Request, Verdict, average, floor, grouped
from evaluate.rubrics import at_hand, message, read, rubric

NAME = "geneval"
TITLE = "GenEval: things, counts, colours and places"
SOURCE = {"id": "github.com/djghosh13/geneval", "revision": "af4902f24d3c", "file": "prompts/evaluation_metadata.jsonl",
          "licence": "MIT"}  # fmt: skip
THEIRS = {"judge": "not said", "rule": "GenEval's own has a detector answer"}
PUBLISHED = [
    {"system": "DuoGen", "figures": {"overall": 0.88}, **THEIRS, "source": "arXiv 2602.00508, by a note"},
    {"system": "Wan-Weaver", "figures": {"overall": 0.89}, **THEIRS, "source": "arXiv 2603.25706"},
    {"system": "SenseNova-U1", "figures": {"overall": 0.91}, **THEIRS, "source": "arXiv 2605.12500"},
]
PLACES = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}


def requests(items: Path | None = None) -> Iterator[Request]:
    for n, item in enumerate(read(at_hand(items, SOURCE))):
        yield Request(f"{n:05d}", message(item["prompt"]), {"tag": item["tag"], "include": item["include"]})


def questions(meta: dict) -> dict[str, str]:
    """{name of the atom: what the judge is asked}. A name is the same in all items, so that its counts can be summed."""
    asked = {}
    for n, thing in enumerate(meta["include"], 1):
        name = thing["class"]
        if meta["tag"] == "counting":
            asked[f"count {n}"] = rubric("geneval", "count", thing=name, count=str(thing["count"]))
        else:
            asked[f"thing {n}"] = rubric("geneval", "thing", thing=name)
        if "color" in thing:
            asked[f"colour {n}"] = rubric("geneval", "colour", thing=name, colour=thing["color"])
        if "position" in thing:
            place, other = thing["position"]
            anchor = meta["include"][other]["class"]
            asked[f"place {n}"] = rubric("geneval", "place", thing=name, place=PLACES[place], anchor=anchor)
    return asked


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    asked = questions(request.meta)
    if not answer.pictures:
        return {name: floor(0.0) for name in asked}
    return {name: judge.yes(question, answer.pictures[0]) for name, question in asked.items()}


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    """A prompt with an atom that the judge did not answer is neither right nor wrong: it is in the counts alone."""
    judged = [row for row in rows if None not in atoms(row)]
    tags = grouped(judged, lambda row: row["meta"]["tag"])
    right = {tag: average([right_in(row) for row in group]) for tag, group in tags.items()}
    overall = average([figure.value for figure in right.values()])
    geometric = [math.prod(atoms(row)) ** (1 / len(atoms(row))) for row in judged]
    return {
        "overall": overall._replace(n=len(judged)),
        **right,
        "soft, atoms": average([p for row in judged for p in atoms(row)]),
        "soft, prompts": average(geometric),
    }


def atoms(row: dict) -> list[float | None]:
    return [score["value"] for score in row["scores"].values()]


def right_in(row: dict) -> float:
    return float(min(atoms(row)) >= 0.5)
