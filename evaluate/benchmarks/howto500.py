"""500 how-to requests of everyday life in 8 domains and 151 subcategories, written for this project.

In the manner of How-to-500 of the DuoGen paper (arXiv 2602.00508), whose requests, list of subcategories and wording of the
criteria are not public: the criteria have its names, everything else is this project's own. Figures of the paper are therefore
not comparable with these, whatever the judge.

    T-Com    text completeness         the words alone
    I-Com    image completeness        request, words and pictures
    I-Co     image consistency         the pictures alone
    I-Q      image quality             the pictures alone
    IT-Co    image-text consistency    words and pictures

Each is a rubric from 1 to 5 in prompts/howto.md. Where an answer has no picture, or no text, the scale's lowest is its score.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Answer, Figure, Judge, Request, Verdict, average, floor, grouped, known, mean, valued
from evaluate.rubrics import asked, document, has_text, message, read, rubric

NAME = "howto500"
TITLE = "How-to, 500 requests of this project's own"
SOURCE = {"id": "this repository", "revision": "as checked out", "file": "evaluate/benchmarks/howto500.json",
          "licence": "as the repository"}  # fmt: skip
# The paper has not published its requests; ours are written in its manner.
PAPER = {"judge": "GPT-5", "items": "the paper's own requests", "source": "arXiv 2602.00508, second-hand"}
PUBLISHED = [
    {"system": "DuoGen", "figures": {"T-Com": 3.39}, **PAPER},
    {"system": "Nano Banana", "figures": {"T-Com": 3.95}, **PAPER},
    {"system": "Zebra-CoT", "figures": {"T-Com": 2.04}, **PAPER},
]
CRITERIA = ("T-Com", "I-Com", "I-Co", "I-Q", "IT-Co")
ITEMS = Path(__file__).parent / "howto500.json"


def requests(items: Path | None = None) -> Iterator[Request]:
    """items: another file in the form of howto500.json, {"domains": {domain: {subcategory: [request]}}}."""
    for domain, subcategories in read(items or ITEMS)["domains"].items():
        for subcategory, texts in subcategories.items():
            for n, text in enumerate(texts, 1):
                name = f"{domain}-{subcategory}-{n}".replace(" ", "_")
                yield Request(name, message(text), {"domain": domain, "subcategory": subcategory})


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    given, written = asked(request), document(answer)
    content = {
        "T-Com": ("Request:", *given, "Answer:", *(text for text in answer.texts if text.strip())),
        "I-Com": ("Request:", *given, "Answer:", *written),
        "I-Co": answer.pictures,
        "I-Q": answer.pictures,
        "IT-Co": ("Answer:", *written),
    }
    scores = {}
    for name in CRITERIA:
        if name in ("T-Com", "IT-Co") and not has_text(answer):
            scores[name] = floor(1.0, "text")
        elif name != "T-Com" and not answer.pictures:
            scores[name] = floor(1.0)
        else:
            scores[name] = judge.rating(rubric("howto", name), *content[name], low=1, high=5)
    return scores


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    """The five means, their mean, and the same mean in every domain."""

    def overall(some: list[dict]) -> Figure:
        means = [sum(values) / len(values) for name in CRITERIA if (values := known(some, name))]
        return average(means)._replace(n=valued(some))

    domains = grouped(rows, lambda row: row["meta"]["domain"])
    found = {name: mean(rows, name) for name in CRITERIA}
    return {"mean": overall(rows), **found, **{name: overall(group) for name, group in domains.items()}}
