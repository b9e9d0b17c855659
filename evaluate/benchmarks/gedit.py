"""GEdit-Bench (arXiv 2504.17761): edits of eleven groups, two pairs of scores from 0 to 10 after VIEScore (arXiv 2312.14867).

    SC = min(the edit is there, nothing else changed)      asked with both pictures and the instruction
    PQ = min(looks natural, free of artefacts)             asked with the edited picture alone
    O  = sqrt(SC * PQ)                                     per item; then the mean

What the judge's filter refuses (mostly pictures of people) has no score here and is counted beside; scripts that take it for 0
give a lower figure, which stands beside as "O, refused as 0". "intersection" are the items that all published systems were
scored on, where the items name them. Some publish the mean of the groups' means: "O over groups".

Items: gedit_edit.json {key: {prompt, id, edit_type}}, pictures beside it by their id. The Hub has the same as parquet.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import REFUSED, Answer, Figure, Judge, Request, Verdict, average, floor, grouped
from evaluate.rubrics import asked, at_hand, message, read, rubric, split

NAME = "gedit"
TITLE = "GEdit-Bench: edits that users asked for"
SOURCE = {"id": "github.com/PKU-YuanGroup/UniWorld-V1", "revision": "8403e86505e2", "file": "univa/eval/gedit/gedit_edit.json",
          "licence": "MIT; pictures: stepfun-ai/GEdit-Bench on the Hub at 58159f3de668, MIT"}  # fmt: skip
PUBLISHED = [
    {"system": "DuoGen", "figures": {"O": 7.35}, "judge": "not said", "source": "arXiv 2602.00508, by a note"},
    {"system": "Wan-Weaver", "figures": {"O": 7.39}, "judge": "not said", "source": "arXiv 2603.25706"},
    {"system": "SenseNova-U1", "figures": {"O": 7.47}, "judge": "not said", "source": "arXiv 2605.12500"},
]
EDIT = ("edited", "kept")
LOOK = ("natural", "clean")


def requests(items: Path | None = None) -> Iterator[Request]:
    file = at_hand(items, SOURCE)
    for key, item in read(file).items():
        meta = {"group": item["edit_type"], "prompt": item["prompt"]}
        if "Intersection_exist" in item:
            meta["intersection"] = bool(item["Intersection_exist"])
        yield Request(key, message(file.parent / item["id"], item["prompt"]), meta)


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    if not answer.pictures:
        return dict.fromkeys((*EDIT, *LOOK), floor(0.0))
    before, instruction = asked(request)
    after = answer.pictures[0]
    edit = rubric("gedit", "edit", instruction=instruction)
    first = split(judge, edit, "Before:", before, "After:", after, keys=dict.fromkeys(EDIT, (0, 10)))
    second = split(judge, rubric("gedit", "look"), after, keys=dict.fromkeys(LOOK, (0, 10)))
    return first | second


def three(row: dict) -> tuple[float, float, float] | None:
    """SC, PQ and O of an item; None where the judge left one of the four open."""
    values = {name: row["scores"][name]["value"] for name in (*EDIT, *LOOK)}
    if None in values.values():
        return None
    sc = min(values[name] for name in EDIT)
    pq = min(values[name] for name in LOOK)
    return sc, pq, math.sqrt(sc * pq)


def refused(row: dict) -> bool:
    return any(score["why"] == REFUSED for score in row["scores"].values())


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    found = {}
    both = [row for row in rows if row["meta"].get("intersection")]
    for mark, some in (("", rows), (", intersection", both)):
        if mark and not some:
            continue  # the items do not say which they are
        scored = [scores for row in some if (scores := three(row))]
        for k, name in enumerate(("SC", "PQ", "O")):
            found[name + mark] = average([scores[k] for scores in scored])
    groups = {
        name: average([scores[2] for row in group if (scores := three(row))])
        for name, group in grouped(rows, lambda row: row["meta"]["group"]).items()
    }
    heard = [figure.value for figure in groups.values() if figure.n]
    found["O over groups"] = average(heard)._replace(n=found["O"].n)
    filled = [(0.0 if refused(row) else None) if three(row) is None else three(row)[2] for row in rows]
    found["O, refused as 0"] = average([value for value in filled if value is not None])
    found["refused"] = average([float(refused(row)) for row in rows])
    return found | groups
