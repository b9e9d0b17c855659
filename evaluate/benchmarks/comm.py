"""CoMM (arXiv 2406.10462): interleaved documents in four tasks, up to six scores from 0 to 10.

    task 1    pictures -> text           completeness, fidelity of the text to the pictures
    task 2    texts -> pictures          style, entity, trend, image quality, illustration relevance
    task 3    a document, continued      those, and completeness
    task 4    a question -> a document   those, and completeness

Illustration relevance hides and describes: for every picture the judge first reads the words alone and says what must be in
this place; then it compares its description with the picture. In the authors' script the first of these calls still holds the
pictures: the text without them is made and then not used. Here neither the reader of the words sees a picture, nor does the
comparison see any picture but the one in question.

Items are in the form of the authors' examples: folders NAME_task3/results.json with "model_input" (its pictures marked
<IMAGE>) and "input_image_list". The scores are the judge's means; what it did not answer is counted, not taken for 0.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

from checkpoint import InputError
from evaluate.benchmark import UNPARSABLE, Answer, Figure, Judge, Request, Verdict, floor, mean
from evaluate.rubrics import asked, at_hand, document, has_text, message, read, rubric, split, words_of, woven

NAME = "comm"
TITLE = "CoMM: coherent interleaved documents"
SOURCE = {"id": "weisuxi/CoMM", "revision": "github.com/HKUST-LongGroup/CoMM 0da05d4", "file": "results.json",
          "licence": "none stated"}  # fmt: skip
PUBLISHED = [
    {"system": "DuoGen", "figures": {"relevance": 7.76, "completeness": 9.66}, "judge": "not said",
     "source": "arXiv 2602.00508, by a note"},
]  # fmt: skip
PICTURES = ("style", "entity", "trend", "quality")  # about the pictures; without one there is nothing to score
SCALE = (0, 10)


def requests(items: Path | None = None) -> Iterator[Request]:
    files = sorted(items.glob("*/results.json")) if items is not None and items.is_dir() else [at_hand(items, SOURCE)]
    if not files:
        raise InputError(f"{items}: holds no folder with a results.json")
    for file in files:
        item = read(file)
        name, _, task = file.parent.name.rpartition("_")
        if not name or task not in ("task1", "task2", "task3", "task4"):
            raise InputError(f"{file.parent}: the name must end with _task1, _task2, _task3 or _task4")
        pictures = [file.parent / path for path in item.get("input_image_list") or []]
        yield Request(file.parent.name, message(*woven(item["model_input"], pictures)), {"task": task})


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    given = asked(request)
    task = request.meta["task"]
    content = ("The request:", *given, "The answer:", *document(answer))
    if task == "task1":
        names = ("completeness", "fidelity")
        if not has_text(answer):
            return dict.fromkeys(names, floor(0.0, "text"))
        return split(judge, rubric("comm", "text"), *content, keys=dict.fromkeys(names, SCALE))
    complete = () if task == "task2" else ("completeness",)
    scores = {}
    if answer.pictures:
        scores |= split(judge, rubric("comm", "document"), *content, keys=dict.fromkeys((*PICTURES, *complete), SCALE))
    else:
        scores |= dict.fromkeys((*PICTURES, *complete), floor(0.0))
    return scores | {"relevance": relevance(given, answer, judge)}


def relevance(given: list, answer: Answer, judge: Judge) -> Verdict:
    """The mean over all pictures; open if the judge left one open."""
    if not answer.pictures:
        return floor(0.0)
    verdicts = []
    for k, picture in enumerate(answer.pictures):
        verdict = compare(describe(given, answer, k, judge), picture, judge)
        if verdict.value is None:
            return verdict
        verdicts.append(verdict)
    value = sum(verdict.value for verdict in verdicts) / len(verdicts)
    return verdicts[0]._replace(value=value, words="\n".join(verdict.words for verdict in verdicts))


def describe(given: list, answer: Answer, k: int, judge: Judge) -> Verdict:
    """What must be shown in place k, by the words alone: this call holds no picture."""
    hidden = words_of(["The request:", *given, "The answer:", *document(answer)])
    prompt = rubric("comm", "describe", place=str(k + 1))
    return judge.fields(prompt, *hidden, keys={"certain": SCALE})


def compare(described: Verdict, picture: Image.Image, judge: Judge) -> Verdict:
    if described.value is None:
        return described
    said = reason(described.words)
    if not said:  # a judge that gives numbers alone cannot describe
        return Verdict(None, UNPARSABLE, described.words)
    return judge.rating(rubric("comm", "compare"), "Description:", said, "Picture:", picture, low=0, high=10)


def reason(words: str) -> str:
    """The description in the judge's JSON, else all that it said: the number beside it is no part of the description."""
    try:
        value = json.loads(words[words.index("{") : words.rindex("}") + 1])
        return str(value.get("reason", "")).strip()
    except (ValueError, AttributeError):
        return words.strip()


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    names = dict.fromkeys(name for row in rows for name in row["scores"])
    return {name: mean(rows, name) for name in names}
