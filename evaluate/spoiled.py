"""Answers of the sketchbook whose truth is known, and copies of them that are worse, or no better, by construction.

    for item in items(100, seed=0):
        item.clean, item.copies["wrong colour"]

No model has a part in it. Every second item is a lesson, for lessons alone have steps; the others are stories, single pictures
and edits in turn. An item depends on its number and the seed alone, so that more of them begin with the same ones.
"""

import itertools
import random
from typing import NamedTuple

from PIL import Image

from evaluate.benchmark import Answer, Request
from evaluate.exam import IDLE, dialogues
from sketchbook.checker import spoilt
from sketchbook.dialogues import KINDS, dialogue
from sketchbook.scenes import Scene, render

# What is worse, and how.
SPOILINGS = {
    "shuffled pictures": "the same pictures in another order, the words as they were",
    "swapped step": "two neighbouring steps of a lesson, words and picture, have changed places",
    "wrong colour": "in one picture a thing, or the part just drawn, has another colour",
    "missing picture": "one picture of several is left out, the words before it stay",
    "strange picture": "one picture is that of another request",
}
PADDED = "padded"
BARE = "without pictures"
BLANK = "blank pictures"
STRANGE = "strange pictures"
# Sentences that are true of every answer and say nothing of any.
PADDING = (
    "There is no hurry, so take all the time that you want.",
    "Many people like to do this at their own pace, and that is quite all right.",
    "It is worth a second look, as such things often are.",
)
OTHERS = tuple(kind for kind in KINDS if kind not in ("lesson", *IDLE))


class Item(NamedTuple):
    """A request, its answer, and copies of the answer by name: those of SPOILINGS that make sense for it, and the rest."""

    id: str
    kind: str  # of the dialogue
    request: Request
    clean: Answer
    copies: dict[str, Answer]


def items(n: int, seed: int = 0, size: int = 64) -> list[Item]:
    """n items; size: side of their pictures in pixels."""
    lessons = dialogues(n - n // 2, seed, ["seen"], ["lesson"], size)
    others = dialogues(n // 2, seed, ["seen"], OTHERS, size)
    taken = itertools.chain.from_iterable(itertools.zip_longest(lessons, others))
    return [item_of(record, size) for record in taken if record]


def item_of(record: dict, size: int) -> Item:
    """Of a dialogue its first exchange."""
    asked, told = record["messages"][:2]
    id = f"{record['kind']}-{record['seed']}"
    clean = answer_of(told["content"])
    copies = {}
    for name, spoil in SPOILERS.items():
        # Each has a chance of its own: what one of them draws does not move the others.
        spoiled = spoil(record, clean, random.Random(f"{name} {id}"))
        if spoiled:
            copies[name] = spoiled
    strangers = random.Random(f"{STRANGE} {id}")
    blank = Image.new("RGB", (size, size), "white")
    copies[PADDED] = clean._replace(texts=[" ".join([text, *PADDING]).strip() for text in clean.texts])
    copies[BARE] = Answer([" ".join(text for text in clean.texts if text)], [])
    copies[BLANK] = clean._replace(pictures=[blank] * len(clean.pictures))
    copies[STRANGE] = clean._replace(pictures=[stranger(record, strangers, size) for _ in clean.pictures])
    return Item(id, record["kind"], Request(id, [asked], {"kind": record["kind"]}), clean, copies)


def answer_of(content: list[dict]) -> Answer:
    texts = [""]
    pictures = []
    for part in content:
        if part["type"] == "text":
            texts[-1] += part["text"]
        else:
            pictures.append(part["image"])
            texts.append("")
    return Answer(texts, pictures)


# --------------------------------------------------------------------------------------------------------------- spoilings


def shuffled(record: dict, clean: Answer, chance: random.Random) -> Answer | None:
    """No two pictures of an answer are alike, so any other order is wrong."""
    numbers = list(range(len(clean.pictures)))
    if len(numbers) < 2:
        return None
    order = numbers
    while order == numbers:
        order = chance.sample(numbers, len(numbers))
    return clean._replace(pictures=[clean.pictures[k] for k in order])


def swapped(record: dict, clean: Answer, chance: random.Random) -> Answer | None:
    if record["kind"] != "lesson":
        return None
    order = list(range(len(clean.pictures)))
    k = chance.randrange(len(order) - 1)
    order[k] = k + 1
    order[k + 1] = k
    # What is said after the last picture belongs to no step.
    texts = [*(clean.texts[k] for k in order), clean.texts[-1]]
    return Answer(texts, [clean.pictures[k] for k in order])


def recoloured(record: dict, clean: Answer, chance: random.Random) -> Answer:
    """A colour that the words before the picture name, or that had to stay."""
    entries = record["truth"]["images"]
    given = sum(part["type"] == "image" for part in record["messages"][0]["content"])
    k = chance.randrange(len(clean.pictures))
    here = entries[given + k]
    before = Scene.from_json(entries[given + k - 1]["scene"]) if given + k else None
    wrong = dict(spoilt(Scene.from_json(here["scene"]), here["check"], before, chance))
    scene = wrong["colour"] if "colour" in wrong else wrong["kept colour"]
    return with_picture(clean, k, render(scene, clean.pictures[k].width))


def missing(record: dict, clean: Answer, chance: random.Random) -> Answer | None:
    """Some are left: without any picture the scores would be a matter of rule, and not of the judge."""
    if len(clean.pictures) < 2:
        return None
    k = chance.randrange(len(clean.pictures))
    texts = [*clean.texts[:k], " ".join(clean.texts[k : k + 2]).strip(), *clean.texts[k + 2 :]]
    return Answer(texts, [*clean.pictures[:k], *clean.pictures[k + 1 :]])


def replaced(record: dict, clean: Answer, chance: random.Random) -> Answer:
    k = chance.randrange(len(clean.pictures))
    return with_picture(clean, k, stranger(record, chance, clean.pictures[k].width))


SPOILERS = dict(zip(SPOILINGS, (shuffled, swapped, recoloured, missing, replaced), strict=True))


def with_picture(answer: Answer, k: int, picture: Image.Image) -> Answer:
    return answer._replace(pictures=[*answer.pictures[:k], picture, *answer.pictures[k + 1 :]])


def stranger(record: dict, chance: random.Random, size: int) -> Image.Image:
    """The last picture of another dialogue, of none of the things that this one shows."""
    own = subjects(record)
    while True:
        other = dialogue(chance.randrange(10**9), "seen", dict.fromkeys(OTHERS, 1.0), size)
        there = subjects(other)
        if there and not there & own:
            return answer_of(other["messages"][1]["content"]).pictures[-1]


def subjects(record: dict) -> set[str]:
    """Every thing in any picture of a dialogue."""
    return {thing["subject"] for image in record["truth"]["images"] for thing in image["scene"]["things"]}
