"""DPG-Bench (arXiv 2403.05135): 1,065 long prompts, each a graph of yes/no questions, where a question hangs on others.

If there is no dog, the question for the dog's collar cannot be a yes: a child counts only if all its parents do. An item is
the mean of its questions, the benchmark the mean of its items, times 100; per category stand the answers before the rule, as in
the authors' script. That script skips the first question of the table by mistake; here it counts.

The authors' judge is mPLUG, with four pictures a prompt; here it is any judge, and one picture. The questions are
dpg_bench.csv of the authors' repository, with these columns: item_id, text, proposition_id, dependency, category_broad,
question_natural_language.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Answer, Figure, Judge, Request, Verdict, average, floor
from evaluate.rubrics import at_hand, message, read, rubric

NAME = "dpg"
TITLE = "DPG-Bench: long prompts, asked after piece by piece"
SOURCE = {"id": "github.com/TencentQQGYLab/ELLA", "revision": "025f650e9b36b9603d606042635d98da09e870de",
          "file": "dpg_bench/dpg_bench.csv", "licence": "Apache-2.0"}  # fmt: skip
PUBLISHED = [{"system": "LLaDA2.0-Uni", "figures": {"overall": 87.8}, "judge": "not said", "source": "arXiv 2604.20796",
              "rule": "the authors' own has four pictures a prompt"}]  # fmt: skip


def requests(items: Path | None = None) -> Iterator[Request]:
    prompts: dict[str, str] = {}
    graphs: dict[str, dict] = {}
    for row in read(at_hand(items, SOURCE)):
        item = row["item_id"]
        prompts.setdefault(item, row["text"])
        parents = [parent.strip() for parent in row["dependency"].split(",")]
        graphs.setdefault(item, {})[row["proposition_id"].strip()] = {
            "question": row["question_natural_language"],
            "category": row["category_broad"],
            "parents": [parent for parent in parents if parent != "0"],  # 0: hangs on nothing
        }
    for item, text in prompts.items():
        yield Request(item, message(text), {"questions": graphs[item]})


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    """Every question is asked, also below a no: the rule is applied when the scores are summed."""
    asked = request.meta["questions"]
    if not answer.pictures:
        return dict.fromkeys(asked, floor(0.0))
    return {n: judge.yes(rubric("dpg", "question", question=q["question"]), answer.pictures[0]) for n, q in asked.items()}


def counts(row: dict) -> dict[str, float]:
    """{question: 1 or 0} after the rule. A question that the judge did not answer is left out, and denies no child."""
    asked, scores = row["meta"]["questions"], row["scores"]

    def denied(n: str, seen: tuple[str, ...] = ()) -> bool:
        """Whether this question, or one above it, was answered with no."""
        value = scores[n]["value"] if n in scores else None
        above = [parent for parent in asked[n]["parents"] if parent in asked and parent not in seen]
        return (value is not None and value < 0.5) or any(denied(parent, (*seen, n)) for parent in above)

    return {n: float(not denied(n)) for n in asked if scores[n]["value"] is not None}


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    items = [list(counts(row).values()) for row in rows]
    overall = average([100 * sum(item) / len(item) for item in items if item])
    categories: dict[str, list[float]] = {}
    for row in rows:
        for n, question in row["meta"]["questions"].items():
            value = row["scores"][n]["value"]
            if value is not None:
                categories.setdefault(question["category"], []).append(100.0 * (value >= 0.5))
    return {"overall": overall, **{name: average(values) for name, values in categories.items()}}
