"""Named details: whether an answer keeps everything that the user named, in its words and in its pictures.

    kept(turn, texts, pictures, before, context)   -> [{"of": "part", ..., "told": True, "shown": False}, ...]

A detail is what sketchbook/grammar.py says a request names: a thing, its colour, the colour of a part, a number, a place, the
page, the number of pictures. It is kept if the words state it and a picture shows it. Requests that change a picture name what
their check demands, as one detail ("edit"); a question names what its answer must have ("answer"); talk names nothing.

Both sides are reduced to the same facts first: what things there are in each picture, as told and as shown. So a picture is
measured against the user's words here, and not against the model's own, as in image-text.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from PIL import Image

from sketchbook.checker import MATCH, Seen, claims, judge, recognise, see, stands, states
from sketchbook.scenes import OPPOSITE, SUBJECTS, main_part

SORTS = {
    "thing": "a thing is there", "colour": "it has this colour", "part": "a part of it has this colour", "count": "so many",
    "place": "left of, right of, above or below the other", "page": "the colour of the page",
    "pictures": "as many steps or pictures as asked for", "edit": "what had to change", "answer": "the answer to a question",
}  # fmt: skip


@dataclass
class Object:
    subject: str
    colour: str | None
    parts: dict[str, str]
    count: int = 1


@dataclass
class Facts:
    """What there is: the objects of each picture, (first, relation, second) by subject, and pages."""

    scenes: list[list[Object]] = field(default_factory=list)
    places: set[tuple[str, str, str]] = field(default_factory=set)
    pages: set[str | None] = field(default_factory=set)

    def all(self, subject: str) -> list[Object]:
        return [o for scene in self.scenes for o in scene if o.subject == subject]


def told(turn: dict, texts: list[str], context: str) -> Facts:
    """The facts that an answer states."""
    facts = Facts()
    if turn["kind"] == "lesson":
        subject = turn["need"][0]["subject"]
        steps = {}
        for text in texts:
            for claim in claims(text, f"{context} {subject}"):
                if claim["op"] in ("start", "part"):
                    steps[claim["part"]] = claim["colour"]
                facts.pages.add(claim.get("background"))
        # A house is what has the parts of a house, in their order.
        if steps and list(steps) == [part.name for part in SUBJECTS[subject].parts[: len(steps)]]:
            facts.scenes.append([Object(subject, steps.get(SUBJECTS[subject].main), steps)])
        return facts

    for text in texts:
        for claim in claims(text, context):
            facts.pages.add(claim.get("background"))
            if claim["op"] != "scene":
                continue
            objects = claim["objects"]
            facts.scenes.append([Object(o["subject"], o["colour"], o["parts"], o["count"]) for o in objects])
            facts.places |= {(objects[i]["subject"], word, objects[j]["subject"]) for i, word, j in claim["relations"]}
    return facts


def shown(turn: dict, pictures: list[Image.Image]) -> Facts:
    """The facts that the pictures show; of a lesson the last one, read as the stage that it must be."""
    facts = Facts()
    lesson = turn["kind"] == "lesson"
    for picture in pictures[-1:] if lesson else pictures:
        view = see(picture)
        facts.pages.add(view.background)
        things = [thing for thing in view.things if thing.score >= MATCH]
        if lesson:
            subject = turn["need"][0]["subject"]
            stage = (subject, min(len(pictures), len(SUBJECTS[subject].parts)))
            stages = [recognise(view.labels, Seen(thing.mask, thing.box), [stage]) for thing in view.things]
            things = [thing for thing in stages if thing.score >= MATCH]
        facts.scenes.append([object_of(thing, things) for thing in things])
        unit = picture.width / 64
        for a in things:
            for b in things:
                facts.places |= {(a.subject, word, b.subject) for word in OPPOSITE if a is not b and stands(a, word, b, unit)}
    return facts


def object_of(thing: Seen, things: list[Seen]) -> Object:
    names = [part.name for part in SUBJECTS[thing.subject].parts]
    colour = thing.colours[main_part(thing.subject)] if main_part(thing.subject) < thing.drawn else None
    alike = sum(other.subject == thing.subject for other in things)
    # Not strict: of an unfinished drawing only the parts so far have colours.
    return Object(thing.subject, colour, dict(zip(names, thing.colours, strict=False)), alike)


def has(facts: Facts, detail: dict, story: bool) -> bool:
    """Whether the facts have a detail. In a story a figure must not change its colour on the way."""
    of = detail["of"]
    if of == "page":
        return detail["background"] in facts.pages
    objects = facts.all(detail["subject"])
    if of == "thing":
        return bool(objects)
    if of == "colour":
        right = [o.colour == detail["colour"] for o in objects if o.colour]
        return bool(right) and (all(right) if story else any(right))
    if of == "part":
        # A thing has the colour of its main part, so whoever tells the one has told the other.
        main = detail["part"] == SUBJECTS[detail["subject"]].main
        return any(detail["colour"] == (o.colour if main else o.parts.get(detail["part"])) for o in objects)
    if of == "count":
        return any(o.count == detail["count"] for o in objects)
    first, word, second = detail["subject"], detail["relation"], detail["other"]
    return bool(facts.places & {(first, word, second), (second, OPPOSITE[word], first)})


def kept(turn: dict, texts: list[str], pictures: list[Image.Image], before: Image.Image | None, context: str) -> list[dict]:
    """Every detail that the request of truth["turns"] names, with what became of it: "told" and "shown".

    texts: what the answer says before each picture, and after the last; before: the picture before the answer, for edits;
    context: all that was said before the answer.
    """
    if "named" in turn:
        words, drawn = told(turn, texts, context), shown(turn, pictures)
        story = turn["kind"] == "story"
        rows = []
        for detail in turn["named"]:
            if detail["of"] == "pictures":
                right = len(pictures) == detail["count"]
                rows.append(detail | {"told": right, "shown": right})
            else:
                rows.append(detail | {"told": has(words, detail, story), "shown": has(drawn, detail, story)})
        return rows

    rows = []
    stated = [claim for text in texts for claim in claims(text, context)]
    for need in turn["need"]:
        picture = pictures[0] if pictures else None
        possible = picture and (before or need["op"] == "scene")
        right = bool(possible) and judge(picture, need, before).ok
        rows.append({"of": "edit", "told": any(states(claim, need) for claim in stated), "shown": right})
    return rows
