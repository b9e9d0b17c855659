"""InterleavedBench (arXiv 2406.14643): ten tasks, five aspects from 1 to 5, and 0 where there is nothing to see.

The subsets for editing and for a given subject ask for pictures alone. The authors' script writes 0 for the text there and
tells to skip it; here these aspects are not asked at all, so that no mean can hold them. The overall mean is that of the five
aspects' means.

Items: interleaved_bench.json of the Hub, its zipped pictures unpacked beside it; without --items both are fetched (1.9 GB).
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Answer, Figure, Judge, Request, Verdict, average, floor, mean, valued
from evaluate.rubrics import MARK, asked, at_hand, document, has_text, message, read, rubric, words_of, woven

NAME = "interleavedbench"
TITLE = "InterleavedBench: five aspects of interleaved answers"
SOURCE = {"id": "mqliu/InterleavedBench", "hub": "", "revision": "ce1a7c164c0e670aab674804e8b1b44fe59f55cf",
          "file": "interleaved_bench.json", "licence": "Apache-2.0"}  # fmt: skip
PUBLISHED = [
    {"system": "DuoGen", "figures": {"mean": 3.87, "text quality": 4.28}, "judge": "not said",
     "source": "arXiv 2602.00508, by a note"},
    {"system": "MiniGPT-5", "figures": {"mean": 1.82}, "judge": "GPT-4o", "source": "arXiv 2406.14643"},
    {"system": "GILL", "figures": {"mean": 1.84}, "judge": "GPT-4o", "source": "arXiv 2406.14643"},
    {"system": "EMU-2", "figures": {"mean": 1.68}, "judge": "GPT-4o", "source": "arXiv 2406.14643"},
    {"system": "EMU-2 with gold text", "figures": {"mean": 2.27}, "judge": "GPT-4o", "source": "arXiv 2406.14643"},
]  # fmt: skip
ASPECTS = ("text quality", "perceptual quality", "image coherence", "text-image coherence", "helpfulness")
TEXT = ("text quality", "text-image coherence")  # which a subset without text does not have


def requests(items: Path | None = None) -> Iterator[Request]:
    file = at_hand(items, SOURCE)
    for item in read(file):
        said = next(turn["value"] for turn in item["conversations"] if turn["from"] == "human")
        # The list holds the reference's pictures, too; those of the context come first and have a mark in the text.
        pictures = [file.parent / path for path in item["image"]][: len(MARK.findall(said))]
        yield Request(item["id"], message(*woven(said, pictures)), {"task": item["task_name"]})


def aspects(task: str) -> tuple[str, ...]:
    without_text = "edit" in task.lower() or "subject" in task.lower()
    return tuple(name for name in ASPECTS if not (without_text and name in TEXT))


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    given, written = asked(request), document(answer)
    pictures = [part for part in written if not isinstance(part, str)]
    shown = [part for part in given if not isinstance(part, str)]
    content = {
        "text quality": ("Request:", *words_of(given), "Answer:", *answer.texts),  # the only call without pictures
        "perceptual quality": pictures,
        "image coherence": ("Given:", *shown, "Answered:", *pictures),
        "text-image coherence": ("Answer:", *written),
        "helpfulness": ("Request:", *given, "Answer:", *written),
    }
    scores = {}
    for name in aspects(request.meta["task"]):
        if name in TEXT and not has_text(answer):
            scores[name] = floor(0.0, "text")
        elif name not in ("text quality", "helpfulness") and not pictures:
            scores[name] = floor(0.0)
        elif not written:
            scores[name] = floor(0.0, "answer")
        else:
            scores[name] = judge.rating(rubric("interleavedbench", name), *content[name], low=1, high=5)
    return scores


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    found = {name: mean(rows, name) for name in ASPECTS}
    overall = average([figure.value for figure in found.values() if figure.n])
    return {"mean": overall._replace(n=valued(rows)), **found}
