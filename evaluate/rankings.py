"""What a judge is asked about an answer of the sketchbook and its copies (spoiled.py), and the figures that come of it.

    rows = [ask(item, judge, again) for item in items(100)]
    aggregate(rows)                   {"wrong colour, by scores": Figure, ..., "goes by the place": Figure, ...}

By scores: the mean of the five criteria of howto500, each asked about one answer alone. By pairs: which of two answers is the
better one, asked in both orders as `python -m evaluate pairs` asks; the mean of both counts. A ranking is 1 if it is right, 0
if it is wrong, a half if it is a tie.
"""

import statistics
from collections import Counter
from collections.abc import Iterable

from evaluate.benchmark import Answer, Figure, average
from evaluate.benchmarks import howto500
from evaluate.contest import FIRST, SECOND
from evaluate.judges import Asker
from evaluate.pairs import compare
from evaluate.spoiled import BARE, BLANK, PADDED, SPOILINGS, STRANGE, Item

CLEAN = "clean"
# Whom each copy is held against. Words without pictures have no score of their own: by rule it would be the lowest.
AGAINST = {**dict.fromkeys((*SPOILINGS, PADDED), CLEAN), BLANK: BARE, STRANGE: BARE}
AGAIN = "wrong colour"  # the pair that is asked a second time; every item has it
EQUAL = 1e-9  # scores that are as near as this are the same
EVEN = 0.5  # of a pair: both are as good; of all rankings: what one has right that knows nothing


# ------------------------------------------------------------------------------------------------------------------ asking


def ask(item: Item, judge: Asker, again: Asker) -> dict:
    """All that is asked about one item; again: the same judge without the answers that are kept.

    -> {"scores": {copy: {criterion: value}}, "pairs": {copy: [whether the first is better, of (reference, copy) and of (copy,
    reference)]}, "again": the same of the clean answer and of one pair, "whys": {"scores" or "pairs": {why: how many}}}
    """
    answers = {CLEAN: item.clean, **item.copies}
    whys = {"scores": Counter(), "pairs": Counter()}

    def scored(answer: Answer, judge: Asker) -> dict[str, float | None]:
        verdicts = howto500.score(item.request, answer, judge)
        whys["scores"].update(verdict.why for verdict in verdicts.values())
        return {name: verdict.value for name, verdict in verdicts.items()}

    def preferred(first: str, second: str, judge: Asker) -> float | None:
        """From 1, the first is better, to 0, the second is."""
        verdict = compare(item.request, answers[first], answers[second], judge)
        whys["pairs"][verdict.why] += 1
        return None if verdict.value is None else (SECOND - verdict.value) / (SECOND - FIRST)

    scores = {name: scored(answers[name], judge) for name in (CLEAN, *SPOILINGS, PADDED) if name in answers}
    pairs = {}
    for copy, reference in AGAINST.items():
        if copy in answers:
            pairs[copy] = [preferred(reference, copy, judge), preferred(copy, reference, judge)]
    repeated = {"scores": scored(item.clean, again), "pair": preferred(CLEAN, AGAIN, again)}
    whys = {what: dict(count) for what, count in whys.items()}
    return {"id": item.id, "kind": item.kind, "scores": scores, "pairs": pairs, "again": repeated, "whys": whys}


# ----------------------------------------------------------------------------------------------------------------- ranking


def rank(better: float, worse: float) -> float:
    """1 if they stand as they should, 0 if not, a half if they are equal."""
    if abs(better - worse) <= EQUAL:
        return EVEN
    return float(better > worse)


def mean_scores(row: dict, copy: str) -> tuple[float, float] | None:
    """Of the clean answer and of a copy: the means of the criteria of which the judge could tell both."""
    both = [(row["scores"][CLEAN][name], row["scores"][copy][name]) for name in howto500.CRITERIA]
    told = [pair for pair in both if None not in pair]
    if not told:
        return None
    return statistics.fmean(pair[0] for pair in told), statistics.fmean(pair[1] for pair in told)


def by_scores(row: dict, copy: str) -> float | None:
    """None where there is no such copy, or nothing that the judge could tell of both."""
    if copy not in row["scores"]:
        return None
    found = mean_scores(row, copy)
    return None if found is None else rank(*found)


def by_pairs(row: dict, copy: str) -> float | None:
    """Both orders together: who goes by the place alone says the same in both, and that is a tie."""
    said = row["pairs"].get(copy, [None])
    return None if None in said else rank(*said)


def known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


# ----------------------------------------------------------------------------------------------------------------- figures


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    """All are shares but "score differs by", which is in points of the scale."""
    figures = {}
    for how, ranking in (("by scores", by_scores), ("by pairs", by_pairs)):
        marks = {name: known(ranking(row, name) for row in rows) for name in SPOILINGS}
        marks["all"] = [mark for some in marks.values() for mark in some]
        for name, some in marks.items():
            figures[f"{name}, {how}"] = average(some)
            figures[f"{name}, {how}, ties"] = average([float(mark == EVEN) for mark in some])
    return figures | habits(rows) | repeats(rows)


def habits(rows: list[dict]) -> dict[str, Figure]:
    """What a judge may go by that it should not."""
    both = [said for row in rows for said in row["pairs"].values() if None not in said]
    figures = {
        "takes the first": average([rank(first, EVEN) for said in both for first in said]),
        "goes by the place": average([goes_by_place(*said) for said in both]),
    }
    longer = known(by_scores(row, PADDED) for row in rows)
    figures["prefers the longer, by scores"] = average([1 - mark for mark in longer])
    for name, copy in {"the longer": PADDED, "blank pictures": BLANK, "strange pictures": STRANGE}.items():
        marks = known(by_pairs(row, copy) for row in rows)
        figures[f"prefers {name}, by pairs"] = average([1 - mark for mark in marks])
    return figures


def goes_by_place(one_order: float, other_order: float) -> float:
    """1 if the same place is taken in both orders, 0 if not; a half if one of the two answers is undecided."""
    places = [rank(one_order, EVEN), rank(other_order, EVEN)]
    undecided = places.count(EVEN)
    if undecided == 1:
        return 0.5
    return float(undecided == 0 and places[0] == places[1])


def repeats(rows: list[dict]) -> dict[str, Figure]:
    """The same question asked again."""
    differs = []
    same = []
    for row in rows:
        for name, value in row["again"]["scores"].items():
            if value is not None and row["scores"][CLEAN][name] is not None:
                differs.append(abs(value - row["scores"][CLEAN][name]))
        pair = [row["pairs"][AGAIN][0], row["again"]["pair"]]
        if None not in pair:
            choices = {rank(first, EVEN) for first in pair}
            same.append(float(len(choices) == 1))
    return {
        "same score": average([float(value <= EQUAL) for value in differs]),
        "score differs by": average(differs),
        "same choice": average(same),
    }
