"""ImgEdit-Bench (arXiv 2505.20275): 737 edits of nine types, three scores from 1 to 5 each.

The second and third score are held to the first: what does not follow the instruction earns nothing by looking good. Judges
are told so and forget it, so it is enforced here. An item is the mean of its three; then the mean is taken in every type, and
over all items.

Published figures differ by the judge's date alone (script: gpt-4o, paper: gpt-4.1). Items: basic_edit.json, pictures beside it.
The items' type "alter" is called "adjust" in the authors' own prompts; here it has one name.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Answer, Figure, Judge, Request, Verdict, average, floor, grouped
from evaluate.rubrics import asked, at_hand, message, read, rubric, split

NAME = "imgedit"
TITLE = "ImgEdit-Bench: edits of nine types"
SOURCE = {"id": "github.com/PKU-YuanGroup/UniWorld-V1", "revision": "8403e86505e2",
          "file": "univa/eval/imgedit/eval_prompts/basic_edit.json",
          "licence": "MIT; pictures: Benchmark.tar of sysuyy/ImgEdit on the Hub"}  # fmt: skip
PUBLISHED = [
    {"system": "DuoGen", "figures": {"overall": 4.19}, "judge": "not said", "source": "arXiv 2602.00508, by a note"},
    {"system": "Wan-Weaver", "figures": {"overall": 4.31}, "judge": "not said", "source": "arXiv 2603.25706"},
    {"system": "BAGEL", "figures": {"overall": 3.28}, "judge": "gpt-4o-2024-11-20", "source": "ImgEdit's issues"},
]
SCORES = ("follows", "natural", "intact")


def requests(items: Path | None = None) -> Iterator[Request]:
    file = at_hand(items, SOURCE)
    for key, item in read(file).items():
        meta = {"type": item["edit_type"], "prompt": item["prompt"]}
        yield Request(key, message(file.parent / item["id"], item["prompt"]), meta)


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    if not answer.pictures:
        return dict.fromkeys(SCORES, floor(1.0))
    before, instruction = asked(request)
    look = rubric("imgedit", request.meta["type"])
    prompt = rubric("imgedit", "edit", instruction=instruction, look=look)
    content = ("Before:", before, "After:", answer.pictures[0])
    scores = split(judge, prompt, *content, keys=dict.fromkeys(SCORES, (1, 5)))
    first = scores["follows"].value
    if first is None:
        return scores
    return {name: verdict._replace(value=min(verdict.value, first)) for name, verdict in scores.items()}


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    def means(some: list[dict]) -> Figure:
        values = [[row["scores"][name]["value"] for name in SCORES] for row in some]
        return average([sum(three) / 3 for three in values if None not in three])

    types = grouped(rows, lambda row: row["meta"]["type"])
    return {"overall": means(rows), **{name: means(group) for name, group in types.items()}}
