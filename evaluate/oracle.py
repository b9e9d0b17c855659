"""The judge `oracle`: the rules of sketchbook/checker.py as a judges.Backend, for answers of the sketchbook alone.

It is told no more than any judge: it reads the request and the answer out of the question. A picture is right that shows what
the words before it say, with what was there before kept; so is a picture that the last words speak of. An answer is as good as
the share of its pictures that are right. Words alone are as good as the share of their steps that stand in their place. Where a
question shows pictures without words there is nothing to hold them against: the middle of the scale.
"""

import hashlib
import inspect
import json
import re

from PIL import Image

from evaluate.judges import Question, Reply, described
from evaluate.rubrics import rubric
from sketchbook import checker, scenes, words
from sketchbook.scenes import SUBJECTS

HEADINGS = ("Request:", "Answer:", "First answer:", "Second answer:")
NUMBER = re.compile(r"\[picture \d+\]")  # what stands before a picture (rubrics.document)
UNKNOWN = 0.5


class Oracle:
    """A judges.Backend."""

    name = "oracle"

    def __init__(self):
        rules = "".join(map(inspect.getsource, (checker, scenes, words, inspect.getmodule(Oracle))))
        self.identity = {"rules": hashlib.sha256(rules.encode()).hexdigest()[:16]}
        self.seen: dict[str, float] = {}  # an answer comes in many questions

    def ask(self, question: Question) -> Reply:
        said = laid_out(question.parts)
        asked = said.get("Request:", [])
        if question.kind == "yes":
            return Reply("nothing that can be checked", value={"yes": UNKNOWN}, model=self.name)
        if "Second answer:" in said:
            first = self.pictures_right(asked, said["First answer:"])
            second = self.pictures_right(asked, said["Second answer:"])
            # The scale goes from the first to the second (prompts/pairs.md).
            share = 0.5 + 0.5 * (first < second) - 0.5 * (first > second)
            found = f"{first:.0%} is right of the first, {second:.0%} of the second"
        else:
            share = self.share(question.parts[0], asked, said.get("Answer:"))
            found = f"{share:.0%} is right"
        value = {key: low + share * (high - low) for key, (low, high) in question.keys.items()}
        return Reply(found, value=value, model=self.name)

    def share(self, asking: str, asked: list, answer: list | None) -> float:
        """What of an answer is right."""
        if answer is None:
            return UNKNOWN
        if asking == rubric("howto", "T-Com"):
            return steps_in_place(asked, answer)
        return self.pictures_right(asked, answer)

    def pictures_right(self, asked: list, answer: list) -> float:
        key = json.dumps(described(Question("", [*asked, "Answer:", *answer], {})))
        if key not in self.seen:
            self.seen[key] = pictures_right(asked, answer)
        return self.seen[key]


def laid_out(parts: list[str | Image.Image]) -> dict[str, list[str | Image.Image]]:
    """{heading: what stands under it}; what the judge is to do comes first or last and is under none."""
    found: dict[str, list] = {}
    under = None
    for part in parts[:-1]:
        if isinstance(part, str) and part in HEADINGS:
            under = found.setdefault(part, [])
        elif under is not None and not (isinstance(part, str) and NUMBER.fullmatch(part)):
            under.append(part)
    return found


def pictures_right(asked: list, answer: list) -> float:
    """The share of an answer's pictures that are right; 0 if it has none."""
    said = " ".join(part for part in asked if isinstance(part, str))
    given = [part for part in asked if not isinstance(part, str)]
    before = given[-1] if given else None
    right = []
    text = ""
    for part in answer:
        if isinstance(part, str):
            text = f"{text} {part}".strip()
            continue
        if before is not None and before.size != part.size:
            before = before.resize(part.size)
        right.append(checker.judge_text(part, text, before, said).ok)
        said += f" {text}"
        before = part
        text = ""
    # The last words may sum up what is there. If they tell of more, a picture is missing.
    if right and checker.claims(text, said):
        right.append(checker.judge_text(before, text, before, said).ok)
    return sum(right) / len(right) if right else 0.0


def steps_in_place(asked: list, answer: list) -> float:
    """The share of the steps told that are the ones due there; 1 where none are told."""
    context = " ".join(part for part in asked if isinstance(part, str))
    stated = [claim for part in answer if isinstance(part, str) for claim in checker.claims(part, context)]
    steps = [claim for claim in stated if claim["op"] in ("start", "part") and claim["subject"]]
    if not steps:
        return 1.0
    due = [part.name for part in SUBJECTS[steps[0]["subject"]].parts]
    told = [step["part"] for step in steps]
    return sum(a == b for a, b in zip(told, due, strict=False)) / len(told)
