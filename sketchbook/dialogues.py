"""Sketchbook: dialogues about drawing in a procedural world, whose every picture the program itself can check.

    python -m sketchbook show --out sheet.png --n 12                 a contact sheet of dialogues, captions under the pictures
    python -m sketchbook write --out corpus --n 1000 --split train   records.jsonl and PNGs, the record format of data.py
    python -m sketchbook check --n 150                               error rates of the checker itself (checker.py)

A record is {"messages": [{"role", "content": [{"type": "text", "text"} | {"type": "image", "image": PIL image}]}], "kind",
"held_out", "truth"}. Everything follows from a seed; nothing is stored and nothing runs out.

Three splits have disjoint random streams. `train` and `seen` share one distribution; neither ever shows what is held out: a
subject in a colour, an arrangement of two subjects, a phrasing. Each `held_out` dialogue has at least one of them, named in
"held_out_by".

"truth" serves checker.py alone. truth["images"] has an entry per picture in reading order: {"role", "scene", "check"}, where
check is None for a user's picture and otherwise says what the picture has to show, relative to the picture before it:
    {"op": "scene", "objects": [{"subject", "colour", "count", "parts": {name: colour}}], "relations": [[i, word, j]],
     "background"}                                a picture on its own; what is None or absent is free
    {"op": "start" | "part", "subject", "part", "colour", "background"}           a step of a lesson
    {"op": "recolour", "subject", "was", "part", "colour"}   {"op": "remove", "subject", "colour"}
    {"op": "add", "subject", "colour", "relation", "anchor"}   {"op": "move", "subject", "to"}
    {"op": "background", "background"}
truth["turns"] has an entry per answer: {"kind", "images": [least, most], "need": [checks that its text must state], "words"
that it must have (a list among them: any of it), words to "avoid", and "named", every detail that the request names
(grammar.py); without that list its details are what it needs}.
"""

from __future__ import annotations

import json
import random
import re
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from checkpoint import InputError
from sketchbook.grammar import Wanted, request
from sketchbook.scenes import (
    BACKGROUNDS,
    COLOURS,
    FIGURES,
    OPPOSITE,
    PLACES,
    RELATIONS,
    SHAPES,
    SUBJECTS,
    Scene,
    Thing,
    cells,
    colours_for,
    fit,
    large,
    main_part,
    random_scene,
    relation_cells,
    render,
    small,
    touching,
    usual_colours,
)
from sketchbook.words import (
    ASK,
    MOVES,
    NUMBERS,
    RELATION_WORDS,
    SAY,
    TALK,
    TALK_ITEMS,
    a,
    articles,
    is_are,
    listing,
    noun_phrase,
    part_phrase,
    plural,
    sentence,
    ways,
    with_parts,
)

SPLITS = ("train", "seen", "held_out")

# ---------------------------------------------------------------------------------------------------------------------------
# What training never shows. Phrasings that are held out have a ~ before them (words.py).

HELD_OUT_COLOURS = {
    "house": "purple", "tree": "blue", "boat": "black", "car": "pink", "snowman": "brown", "robot": "yellow",
    "flower": "orange", "rocket": "green", "fish": "red", "mushroom": "blue", "cake": "black", "lamp": "green", "cat": "purple",
    "train": "orange", "castle": "yellow", "butterfly": "red", "cup": "brown", "duck": "pink", "sun": "blue",
    "ice cream": "green", "circle": "brown", "square": "pink", "triangle": "orange", "star": "purple", "heart": "black",
    "diamond": "red",
}
# (relation, first, second): the first is never left of, or above, the second.
HELD_OUT_RELATIONS = frozenset(
    (relation, a, list(SUBJECTS)[(i + step) % len(SUBJECTS)])
    for i, a in enumerate(SUBJECTS) for relation, step in (("left", 5), ("left", 16), ("above", 9), ("above", 20)))


def arrangement(a: Thing, b: Thing) -> tuple[str, str, str]:
    """(left | above, subject, subject) of two things in a picture, along the axis on which they lie further apart."""
    (ax, ay), (bx, by) = a.centre, b.centre
    word, swap = ("left", ax > bx) if abs(ax - bx) >= abs(ay - by) else ("above", ay > by)
    return (word, b.subject, a.subject) if swap else (word, a.subject, b.subject)


def held_out_in(scene: Scene) -> set[str]:
    """Which kinds of held-out content ("colour", "relation") a scene has."""
    found = {"colour" for t in scene.things if HELD_OUT_COLOURS[t.subject] == t.main}
    pairs = ((a, b) for i, a in enumerate(scene.things) for b in scene.things[i + 1:])
    return found | {"relation" for a, b in pairs if arrangement(a, b) in HELD_OUT_RELATIONS}


# ---------------------------------------------------------------------------------------------------------------------------
# A dialogue in the making


class Dialogue:
    """Collects messages and truth. `want` names the held-out content that a held-out dialogue is steered towards."""

    def __init__(self, rng: random.Random, want: str | None = None):
        self.rng, self.want = rng, want
        self.messages, self.images, self.turns, self.held = [], [], [], set()
        self.scene = None            # the last picture
        self.asked = False           # the last picture has been asked about

    # -- choices

    def pick(self, options: list[str], kind: str = "phrasing") -> str:
        """One of the options; a held-out one, marked by ~, only where the dialogue wants that kind of held-out content."""
        new = [t[1:] for t in options if t[0] == "~"]
        if new and self.want == kind and self.rng.random() < 0.7:
            self.held.add(kind)
            return self.rng.choice(new)
        return self.rng.choice([t for t in options if t[0] != "~"])

    def chance(self, p: float) -> bool:
        return self.rng.random() < p

    def colour(self, subject: str, besides=()) -> str:
        held = HELD_OUT_COLOURS[subject]
        if self.want == "colour" and held not in besides and self.chance(0.5):
            return held
        return self.rng.choice([c for c in COLOURS if c != held and c not in besides])

    def subject(self, besides=(), shapes: float = 0.3) -> str:
        return self.rng.choice([s for s in (SHAPES if self.chance(shapes) else FIGURES) if s not in besides])

    def couple(self) -> tuple[str, str, str]:
        """(subject, relation, subject), two different subjects."""
        if self.want == "relation" and self.chance(0.8):
            word, x, y = self.rng.choice(sorted(HELD_OUT_RELATIONS))
            return (x, word, y) if self.chance(0.5) else (y, OPPOSITE[word], x)
        x = self.subject()
        y = self.subject(besides=(x,))
        return x, self.relation(x, y), y

    def relation(self, x: str, y: str) -> str:
        """Any relation that x may have to y."""
        held = HELD_OUT_RELATIONS if self.want != "relation" else ()
        return self.rng.choice([r for r in RELATIONS if (r, x, y) not in held and (OPPOSITE[r], y, x) not in held])

    def page(self, white: float = 0.5) -> str:
        return "white" if self.chance(white) else self.rng.choice(list(BACKGROUNDS))

    def on(self, background: str) -> str:
        """A page other than white is always said; a white one sometimes."""
        if background == "white" and self.chance(0.8):
            return ""
        return self.rng.choice([" on a {} background", " on {} paper", " on a {} page"]).format(background)

    # -- the record

    def ask(self, text: str, *scenes: Scene) -> None:
        text = sentence(text) if text[-1] in ".!?" else articles(text)
        # Habits of typing.
        text = text[:-1] if text[-1] in ".?!" and self.chance(0.2) else text
        text = text.lower() if self.chance(0.2) else text
        # Later requests are read anew by the exam, for the picture that was really drawn: they keep all their words.
        if not self.turns:
            text = hurried(self.rng, text) if self.chance(0.1) else text
            text = shortened(self.rng, text) if self.chance(0.07) else text
            text = mistyped(self.rng, text) if self.chance(0.12) else text
        text = text.upper() if self.chance(0.04) else text
        pictures = [{"type": "image", "image": scene} for scene in scenes]
        words = [{"type": "text", "text": text}]
        self.messages.append({"role": "user", "content": pictures + words if self.chance(0.7) else words + pictures})
        for scene in scenes:
            self.images.append({"role": "user", "scene": scene, "check": None})
            self.scene, self.asked = scene, False

    def answer(self, kind: str, least: int = 0, most: int | None = None, need=(), words=(), avoid=(), named=None) -> None:
        self.messages.append({"role": "assistant", "content": []})
        turn = {"kind": kind, "images": [least, least if most is None else most], "need": list(need), "words": list(words),
                "avoid": list(avoid)}
        self.turns.append(turn | ({"named": named} if named is not None else {}))

    def say(self, text: str) -> None:
        content, text = self.messages[-1]["content"], sentence(text)
        if content and content[-1]["type"] == "text":
            content[-1]["text"] += " " + text
        else:
            content.append({"type": "text", "text": text})

    def draw(self, scene: Scene, **check) -> None:
        self.messages[-1]["content"].append({"type": "image", "image": scene})
        self.images.append({"role": "assistant", "scene": scene, "check": check})
        self.scene, self.asked = scene, False

    # -- words for the scene at hand

    def ref(self, thing: Thing) -> str:
        """'the car', or 'the red car' where there are two, and sometimes where there is one."""
        alone = sum(t.subject == thing.subject for t in self.scene.things) == 1
        return f"the {thing.subject}" if alone and self.chance(0.5) else f"the {thing.main} {thing.subject}"


SMALL_WORDS = re.compile(r"\b(?:an?|the|to|of|is|are|be|it|its|please|i|me|that|should|would) ", re.IGNORECASE)


def hurried(rng: random.Random, text: str) -> str:
    """Without some of its small words: "want learn draw house with blue door"."""
    return SMALL_WORDS.sub(lambda match: match[0] if rng.random() < 0.4 else "", text)


SHORT = {"with": ("w", "w/"), "you": ("u",), "are": ("r",), "and": ("n", "&", "+"), "please": ("pls", "plz"), "your": ("ur",),
         "for": ("4",), "to": ("2",), "two": ("2",), "three": ("3",), "four": ("4",), "five": ("5",), "thanks": ("thx",),
         "picture": ("pic",), "pictures": ("pics",), "want to": ("wanna",), "going to": ("gonna",), "because": ("cuz",),
         "the": ("da",), "it's": ("its",), "i'd": ("id",), "don't": ("dont",), "can't": ("cant",)}
SHORT_WORDS = re.compile(rf"\b(?:{'|'.join(sorted(SHORT, key=len, reverse=True))})\b", re.IGNORECASE)


def shortened(rng: random.Random, text: str) -> str:
    """As people write on a telephone: "can u draw a house w 2 windows pls"."""
    return SHORT_WORDS.sub(lambda match: rng.choice(SHORT[match[0].lower()]) if rng.random() < 0.7 else match[0], text)


def mistyped(rng: random.Random, text: str) -> str:
    """One slip of the fingers, inside a word of four letters or more: two letters swapped, one left out, one doubled."""
    places = [m.start() + i for m in re.finditer(r"[a-zA-Z]{4,}", text) for i in range(1, len(m[0]) - 2)]
    if not places:
        return text
    at = rng.choice(places)
    slip = rng.choice(("swap", "drop", "double"))
    if slip == "swap":
        return text[:at] + text[at + 1] + text[at] + text[at + 2:]
    if slip == "drop":
        return text[:at] + text[at + 1:]
    return text[:at] + text[at] + text[at:]


def objects_of(*things: Thing, named=()) -> list[dict]:
    """The objects fact of a scene: equal things counted together, parts only where their names are in `named`."""
    facts = {}
    for t in things:
        parts = {p.name: c for p, c in zip(SUBJECTS[t.subject].parts[:t.drawn], t.colours, strict=False) if p.name in named}
        fact = {"subject": t.subject, "colour": t.main, "count": 0, "parts": parts}
        facts.setdefault((t.subject, t.main), fact)["count"] += 1
    return list(facts.values())


# ---------------------------------------------------------------------------------------------------------------------------
# Kinds of dialogue. Each function adds one exchange or more.

LEADS = ("First,", "Next,", "Then", "Now", "Finally,")


def lesson(d: Dialogue, subject: str | None = None, main: str | None = None) -> None:
    subject = subject or d.subject(shapes=0.0)
    parts = SUBJECTS[subject].parts
    i_main = main_part(subject)
    main = main or (d.colour(subject) if d.chance(0.7) or d.want == "colour" else usual_main(d, subject))
    colours = colours_for(d.rng, subject, main)
    told = {}
    if d.chance(0.6):
        told[parts[i_main].name] = main
    same = alike(d, subject, main) if d.chance(0.12) else {}
    if same:
        colours = colours_for(d.rng, subject, main, same)
        told.update({parts[i].name: colours[i] for i in same})
    elif d.chance(0.6):
        others = [i for i in range(len(parts)) if i != i_main]
        some = sorted(d.rng.sample(others, min(len(others), d.rng.choice((1, 1, 1, 2, 2, 3)))))
        told.update({parts[i].name: colours[i] for i in some})
    # Who says how many steps he wants gets so many, enough for all that he has named.
    steps = None
    if d.chance(0.12):
        named_last = max((i for i, part in enumerate(parts) if part.name in told), default=0)
        steps = d.rng.randint(max(2, i_main + 1, named_last + 1), len(parts))
        parts = parts[:steps]
    background = d.page(0.6)
    page = background if d.chance(0.1) else None
    details = {name: colour for name, colour in told.items() if name != SUBJECTS[subject].main}
    asked = Wanted(subject, told.get(SUBJECTS[subject].main), parts=details)
    text, named = request(d, "lesson", [by_its_part(d, asked)], page=page, pictures=steps)
    d.ask(text)
    need = {"op": "lesson", "subject": subject, "colours": told, "steps": len(parts), "background": page}
    d.answer("lesson", len(parts), need=[need], named=named)
    if d.chance(0.2):
        d.say(d.pick(SAY["open"]))
    thing = large(d.rng, subject, colours)
    count = d.chance(0.7)
    for n, (part, colour) in enumerate(zip(parts, colours, strict=False), 1):
        lead = f"Step {n}:" if count else LEADS[0] if n == 1 else LEADS[4] if n == len(parts) else LEADS[1 + n % 3]
        on = d.on(background) if n == 1 else ""
        if n == 1 and page:
            on = f" on a {page} background"
        d.say(d.pick(SAY["start" if n == 1 else "part"]).format(
            lead=lead, look=part.look.format(colour), where=part.where, p=part.name, b=on))
        check = {"op": "part", "subject": subject, "part": part.name, "colour": colour}
        if n == 1:
            check.update(op="start", background=background if on else None)
        d.draw(Scene(background, (replace(thing, drawn=n),)), **check)
    if d.chance(0.5):
        d.say(d.pick(SAY["close"]).format(p=f"{main} {subject}", x=noun_phrase(subject, main)))


def alike(d: Dialogue, subject: str, main: str) -> dict[int, str]:
    """Two parts in one colour, {index: colour}: not the main part, and they do not touch. Empty where there are none such."""
    others = [i for i in range(len(SUBJECTS[subject].parts)) if i != main_part(subject)]
    pairs = [(i, j) for i in others for j in others if i < j and j not in touching(subject)[i]]
    return dict.fromkeys(d.rng.choice(pairs), d.rng.choice([c for c in COLOURS if c != main])) if pairs else {}


def usual_main(d: Dialogue, subject: str) -> str:
    return d.rng.choice(SUBJECTS[subject].parts[main_part(subject)].usual.split())


def present(d: Dialogue, kind: str, asked: tuple[str, list[dict]], said: str, scene: Scene, check: dict, need: dict) -> None:
    """One question and one picture of a whole new scene. asked: grammar.request's; said: how the answer names what it shows."""
    on = d.on(scene.background)
    if need.get("background"):
        on = f" on a {scene.background} background"
    text, named = asked
    d.ask(text)
    d.answer(kind, 1, need=[need], named=named)
    many = check["objects"][0]["count"] > 1
    d.say(d.pick(SAY["scenes" if many else "scene"]).format(x=said, b=on))
    d.draw(scene, **{"op": "scene", "relations": [], "background": scene.background if on else None, **check})


def whole_thing(d: Dialogue, subject: str, main: str, named_parts: int) -> tuple[Thing, list[str]]:
    """A large thing with a main colour, some parts in any colour, the rest as usual; and the names of those parts."""
    parts, i_main = SUBJECTS[subject].parts, main_part(subject)
    free = colours_for(d.rng, subject, main, usual=0.3)
    fixed = alike(d, subject, main) if named_parts > 1 and d.chance(0.3) else {}
    some = sorted(fixed or d.rng.sample([i for i in range(len(parts)) if i != i_main], min(named_parts, len(parts) - 1)))
    colours = usual_colours(subject, main, fixed or {i: free[i] for i in some})
    return large(d.rng, subject, colours), [parts[i].name for i in some]


def one(d: Dialogue, kind: str = "one") -> None:
    subject = d.subject()
    main = d.colour(subject)
    thing, parts = whole_thing(d, subject, main, d.rng.choice((0, 0, 1, 1, 2, 3)))
    scene = Scene(d.page(), (thing,))
    objects = objects_of(thing, named=parts)
    free = kind == "one" and d.chance(0.25)                     # the colour is left to the assistant
    asked = {**objects[0], "colour": None if free else main, "parts": objects[0]["parts"] if d.chance(0.75) else {}}
    page = scene.background if d.chance(0.25) else None
    need = {"op": "scene", "objects": [asked], "background": page}
    words = request(d, kind, [by_its_part(d, wanted(asked))], page=page)
    said = noun_phrase(subject, main) + with_parts(thing, parts)
    present(d, kind, words, said, scene, {"objects": objects}, need)


def by_its_part(d: Dialogue, asked: Wanted) -> Wanted:
    """Some say the colour of a thing by its main part: not "a blue lamp", but a lamp whose shade is blue."""
    main = SUBJECTS[asked.subject].main
    if not asked.colour or main == asked.subject or d.chance(0.85):
        return asked
    return Wanted(asked.subject, None, asked.count, {main: asked.colour, **asked.parts})


def wanted(asked: dict) -> Wanted:
    """An object of a check, as what a user wants."""
    return Wanted(asked["subject"], asked["colour"], asked["count"], asked["parts"])


def colour(d: Dialogue) -> None:
    one(d, "colour")


def small_thing(d: Dialogue, subject: str, main: str, cell, size=None) -> Thing:
    return small(d.rng, subject, usual_colours(subject, main), cell, size)


def count(d: Dialogue) -> None:
    subject, n = d.subject(), d.rng.randint(2, 4)
    main = d.colour(subject)
    # Several things are small, and have their first parts alone: now and then one of these is named.
    others = [i for i in range(SUBJECTS[subject].small) if i != main_part(subject)]
    fixed = {}
    if others and d.chance(0.2):
        i = d.rng.choice(others)
        fixed[i] = colours_for(d.rng, subject, main, usual=0.3)[i]
    colours = usual_colours(subject, main, fixed)
    scene = Scene(d.page(), tuple(small(d.rng, subject, colours, cell) for cell in cells(d.rng, n)))
    parts = [SUBJECTS[subject].parts[i].name for i in fixed]
    objects = objects_of(*scene.things, named=parts)
    free = d.chance(0.15)
    asked = {**objects[0], "colour": None if free else main}
    page = scene.background if d.chance(0.2) else None
    need = {"op": "scene", "objects": [asked], "background": page}
    words = request(d, "count", [wanted(asked)], page=page)
    said = noun_phrase(subject, main, n) + with_parts(scene.things[0], parts)
    present(d, "count", words, said, scene, {"objects": objects}, need)


def placed(d: Dialogue, x: str, cx: str, word: str, y: str, cy: str, size_x=None) -> tuple[Thing, Thing]:
    """Two small things, x in the relation `word` to y, further apart along that axis than along the other."""
    while True:
        cell_x, cell_y = relation_cells(d.rng, word)
        one, other = small_thing(d, x, cx, cell_x, size_x), small_thing(d, y, cy, cell_y)
        (ax, ay), (bx, by) = one.centre, other.centre
        if (abs(ax - bx) > abs(ay - by) + 4) == (word in ("left", "right")):
            return one, other


def two_things(d: Dialogue, kind: str) -> None:
    """two: any arrangement; binding: two colours that must not be swapped; position: a stated relation."""
    x, word, y = d.couple()
    if kind == "binding" and d.chance(0.4):
        y = x
    cx = d.colour(x)
    cy = d.colour(y, besides=(cx,) if kind == "binding" else ())
    things = placed(d, x, cx, word, y, cy)
    scene = Scene(d.page(), things)
    objects = [*objects_of(things[0]), *objects_of(things[1])]
    plain = kind == "position" and d.chance(0.2)                # "a cat left of a cup": colours are left to the assistant
    asked = [{**o, "colour": None if plain else o["colour"]} for o in objects]
    relations = [[0, word, 1]] if kind == "position" else []
    r = f" {d.rng.choice(RELATION_WORDS[word])} " if relations else " and "
    page = scene.background if d.chance(0.2) else None
    need = {"op": "scene", "objects": asked, "relations": relations, "background": page}
    stated = word if relations else None
    words = request(d, kind, [wanted(o) for o in asked], relation=stated, page=page)
    said = noun_phrase(x, cx) + r + noun_phrase(y, cy)
    present(d, kind, words, said, scene, {"objects": objects, "relations": relations}, need)


def two(d: Dialogue) -> None:
    two_things(d, "two")


def binding(d: Dialogue) -> None:
    two_things(d, "binding")


def position(d: Dialogue) -> None:
    two_things(d, "position")


def any_scene(d: Dialogue, n: int | None = None) -> Scene:
    """A user's picture: one large thing, or n small ones of different subjects."""
    n = n or d.rng.choice((1, 1, 1, 2, 2, 3))
    background = d.page(0.4)
    if n == 1:
        subject = d.subject()
        return Scene(background, (large(d.rng, subject, colours_for(d.rng, subject, d.colour(subject))),))
    if n == 2:
        x, word, y = d.couple()
        return Scene(background, placed(d, x, d.colour(x), word, y, d.colour(y)))
    subjects, places = [], cells(d.rng, n)
    while len(subjects) < n:
        subjects.append(d.subject(besides=subjects))
    return Scene(background, tuple(small_thing(d, s, d.colour(s), cell) for s, cell in zip(subjects, places, strict=True)))


def recolour(d: Dialogue, scene: Scene | None = None) -> None:
    given = () if scene else (any_scene(d),)
    before = scene or given[0]
    d.scene = before
    at = d.rng.randrange(len(before.things))
    thing = before.things[at]
    i_main = main_part(thing.subject)
    whole = thing.drawn <= i_main or thing.drawn > SUBJECTS[thing.subject].small
    i = d.rng.randrange(thing.drawn) if whole and d.chance(0.6) else i_main
    taken = {thing.colours[i]} | {thing.colours[j] for j in touching(thing.subject)[i]}
    new = d.colour(thing.subject, besides=taken) if i == i_main else d.rng.choice([c for c in COLOURS if c not in taken])
    part = SUBJECTS[thing.subject].parts[i].name
    if i == i_main and (part == thing.subject or len(before.things) > 1 or d.chance(0.6)):
        name, verb = d.ref(thing).removeprefix("the "), "is"
    else:
        name, verb = part, is_are(part)
        if d.chance(0.3) and part != thing.subject:
            name = f"{part} of the {thing.subject}"
    d.ask(d.pick(ASK["recolour"]).format(p=name, c=new), *given)
    check = {"op": "recolour", "subject": thing.subject, "was": thing.main, "part": part, "colour": new}
    d.answer("recolour", 1, need=[check])
    d.say(d.pick(SAY["recolour"]).format(p=name, c=new, be=verb))
    after = replace(thing, colours=(*thing.colours[:i], new, *thing.colours[i + 1:]))
    d.draw(replace(before, things=(*before.things[:at], after, *before.things[at + 1:])), **check)


def remove(d: Dialogue, scene: Scene | None = None) -> None:
    before = scene or any_scene(d, d.rng.choice((2, 2, 3)))
    d.scene = before
    thing = d.rng.choice(before.things)
    x = d.ref(thing)
    d.ask(d.pick(ASK["remove"]).format(x=x), *(() if scene else (before,)))
    check = {"op": "remove", "subject": thing.subject, "colour": thing.main}
    d.answer("remove", 1, need=[check])
    d.say(d.pick(SAY["remove"]).format(x=x))
    d.draw(replace(before, things=tuple(t for t in before.things if t is not thing)), **check)


def add(d: Dialogue) -> None:
    """A new thing beside one that is there."""
    x, word, y = d.couple()
    cx, cy = d.colour(x), d.colour(y)
    new, old = placed(d, x, cx, word, y, cy)
    before = Scene(d.page(0.4), (old,))
    d.scene = before
    words = {"x": noun_phrase(x, cx), "r": d.rng.choice(RELATION_WORDS[word]), "y": d.ref(old)}
    d.ask(d.pick(ASK["add"]).format(**words), before)
    check = {"op": "add", "subject": x, "colour": cx, "relation": word, "anchor": y}
    d.answer("add", 1, need=[check])
    d.say(d.pick(SAY["add"]).format(**words))
    d.draw(replace(before, things=(old, new)), **check)


def add_part(d: Dialogue) -> None:
    """The next part of an unfinished drawing: a step of a lesson on the user's own picture."""
    subject = d.subject(shapes=0.0)
    main = d.colour(subject)
    whole = large(d.rng, subject, colours_for(d.rng, subject, main))
    k = d.rng.randint(max(1, main_part(subject) + 1), whole.drawn - 1) if whole.drawn > main_part(subject) + 1 else 1
    before = Scene(d.page(0.4), (replace(whole, drawn=k),))
    part, new = SUBJECTS[subject].parts[k], whole.colours[k]
    words = {"x": part_phrase(part.name, new), "s": subject, "p": part.name}
    d.ask(d.pick(ASK["add_part"]).format(**words), before)
    check = {"op": "part", "subject": subject, "part": part.name, "colour": new}
    d.answer("add_part", 1, need=[check])
    d.say(d.pick(SAY["add_part"]).format(**words))
    d.draw(replace(before, things=(replace(whole, drawn=k + 1),)), **check)


def shifted(thing: Thing, to: str) -> Thing:
    """The thing with its box four units from the edge named; the other coordinate stays."""
    x0, y0, x1, y1 = thing.box
    dx = {"left": 4 - x0, "right": 60 - x1}.get(to, 0.0)
    dy = {"top": 4 - y0, "bottom": 60 - y1}.get(to, 0.0)
    return replace(thing, x=round(thing.x + dx, 2), y=round(thing.y + dy, 2))


def move(d: Dialogue) -> None:
    subject = d.subject()
    main = d.colour(subject)
    length = d.rng.uniform(28.5, 32) if subject in FIGURES else d.rng.uniform(18, 32)
    thing = small_thing(d, subject, main, (0, 0, 64, 64), length)
    far = [to for to in MOVES if abs(shifted(thing, to).x - thing.x) + abs(shifted(thing, to).y - thing.y) > 10]
    to = d.rng.choice(far or ["left"])
    if not far:
        thing = shifted(thing, "right")
    before = Scene(d.page(0.4), (thing,))
    d.scene = before
    x = d.ref(thing)
    d.ask(d.pick(ASK["move"]).format(x=x, to=d.rng.choice(MOVES[to][0])), before)
    check = {"op": "move", "subject": subject, "to": to}
    d.answer("move", 1, need=[check])
    d.say(d.pick(SAY["move"]).format(x=x, to=MOVES[to][0][0], at=MOVES[to][1]))
    d.draw(replace(before, things=(shifted(thing, to),)), **check)


def background(d: Dialogue, scene: Scene | None = None) -> None:
    before = scene or any_scene(d)
    new = d.rng.choice([b for b in BACKGROUNDS if b != before.background])
    d.ask(d.pick(ASK["background"]).format(b=new), *(() if scene else (before,)))
    check = {"op": "background", "background": new}
    d.answer("background", 1, need=[check])
    d.say(d.pick(SAY["background"]).format(b=new))
    d.draw(replace(before, background=new), **check)


def multi(d: Dialogue) -> None:
    """Two pictures of the user: their things together, or one in the colour of the other."""
    x, word, y = d.couple()
    if d.chance(0.6):
        cx, cy = d.colour(x), d.colour(y)
        first, second = (Scene(d.page(0.5), (small_thing(d, s, c, (0, 0, 64, 64), d.rng.uniform(28.5, 40)),))
                         for s, c in ((x, cx), (y, cy)))
        scene = Scene(d.page(0.7), placed(d, x, cx, word, y, cy))
        r = d.rng.choice(RELATION_WORDS[word])
        objects, relations = [*objects_of(scene.things[0]), *objects_of(scene.things[1])], [[0, word, 1]]
        need = {"op": "scene", "objects": objects, "relations": relations}
        d.ask(d.pick(ASK["multi"]).format(x=f"the {x}", r=r, y=f"the {y}"), first, second)
        text = f"the {cx} {x} {r} the {cy} {y}"
    else:
        x = d.subject(shapes=0.2)
        y = d.subject(besides=(x,), shapes=0.6)
        cy = d.colour(y, besides=(HELD_OUT_COLOURS[x],) if d.want != "colour" else ())
        cx = d.colour(x, besides=(cy,))
        first = Scene(d.page(0.5), (large(d.rng, x, colours_for(d.rng, x, cx, usual=0.8)),))
        second = Scene(d.page(0.5), (small_thing(d, y, cy, (0, 0, 64, 64), d.rng.uniform(28.5, 40)),))
        scene = Scene(d.page(0.7), (large(d.rng, x, usual_colours(x, cy)),))
        objects, relations = objects_of(scene.things[0]), []
        need = {"op": "scene", "objects": objects, "relations": []}
        d.ask(d.pick(ASK["multi_colour"]).format(s=x, t=y), first, second)
        text = f"the {x} in {cy}" if d.chance(0.3) else f"the {cy} {x}"
    d.answer("multi", 1, need=[need])
    on = d.on(scene.background)
    d.say(d.pick(SAY["scene"]).format(x=text, b=on))
    d.draw(scene, op="scene", objects=objects, relations=relations, background=scene.background if on else None)


def story(d: Dialogue) -> None:
    """A figure that keeps its colours through changing places and company. Who is asked for is met in one picture at least."""
    hero = d.subject(shapes=0.1)
    main = d.colour(hero)
    free = d.chance(0.3)
    n = d.rng.randint(2, 4)
    told = n if d.chance(0.5) else None
    friend = None
    if d.chance(0.45):
        met = d.subject(besides=(hero,), shapes=0.5)
        friend = Wanted(met, d.colour(met))
    size = d.rng.uniform(28.5, 28.8)
    text, named = request(d, "story", [Wanted(hero, None if free else main)], pictures=told, company=friend)
    d.ask(text)
    facts = [{"subject": hero, "colour": None if free else main, "count": 1, "parts": {}}]
    if friend:
        facts.append({"subject": friend.subject, "colour": friend.colour, "count": 1, "parts": {}})
    need = [{"op": "scene", "objects": [fact]} for fact in facts]
    d.answer("story", told or 2, told or 4, need=need, named=named)

    the = f"the {main} {hero}"
    meeting = d.rng.randint(0, 1) if friend else None
    for k, page in enumerate(d.rng.sample(list(BACKGROUNDS), n)):
        things, relations, r, y = [small_thing(d, hero, main, (4, 4, 60, 60), size)], [], "", ""
        company = None
        if friend and (k == meeting or k > meeting and d.chance(0.4)):
            company = friend
        elif not friend and d.chance(0.15 if k == 0 else 0.65):
            other = d.subject(besides=(hero,), shapes=0.6)
            company = Wanted(other, d.colour(other))
        if company:
            word = d.relation(hero, company.subject)
            things = placed(d, hero, main, word, company.subject, company.colour, size)
            r, y = d.rng.choice(RELATION_WORDS[word]), noun_phrase(company.subject, things[1].main)
        if company and d.chance(0.5):
            relations = [[0, word, 1]]
            text = SAY["story_opens_stood"][0] if k == 0 else d.pick(SAY["story_stood"])
        elif company:
            text = SAY["story_opens_met"][0] if k == 0 else d.pick(SAY["story_met"])
        elif k == 0:
            text = d.pick(SAY["story_opens"])
        else:
            text = d.pick(SAY["story_last" if k == n - 1 and d.chance(0.7) else "story_alone"])
        d.say(text.format(x=noun_phrase(hero, main), the=the, place=PLACES[page], r=r, y=y))
        objects = [o for t in things for o in objects_of(t)]
        d.draw(Scene(page, tuple(things)), op="scene", objects=objects, relations=relations, background=page)
    if d.chance(0.4):
        d.say(d.pick(SAY["story_ends"]).format(the=the))


class Question(NamedTuple):
    """One may ask it about a picture; the reply is true of it."""
    topic: str
    asks: list[str]              # phrasings
    reply: str
    words: list                  # that an answer must have; a list among them: any of it
    avoid: Sequence[str] = ()    # that it must not have


def questions(d: Dialogue, scene: Scene) -> list[Question]:
    """What one may ask about a picture. One of its things, drawn by lot, is the one that the questions are about.

    Every question draws from d.rng, asked or not: in another order the same seeds would give other dialogues.
    """
    thing = d.rng.choice(scene.things)
    items = [about_background(d, scene), about_something_absent(d, scene), about_the_total(d, scene)]
    if len(scene.things) == 1 and thing.drawn > 1:
        items += about_parts(d, thing)

    # What has not got its main part yet is no house so far, and has no colour of its own.
    if thing.drawn <= main_part(thing.subject):
        return items
    items += [about_something_present(d, scene, thing), about_number(d, scene, thing)]
    if len(scene.things) == 1:
        x = noun_phrase(thing.subject, thing.main)
        items.append(Question("what", ways("q_what"), reply(d, "a_what", x=x), [thing.main, thing.subject]))
    # "The fish" has a colour only where all fish have the same.
    if all(t.main == thing.main for t in scene.things if t.subject == thing.subject):
        items += about_colour(d, thing)
    if len(scene.things) == 2:
        items += about_place(d, scene, thing)
    return items


def reply(d: Dialogue, kind: str, **words) -> str:
    return d.rng.choice(SAY[kind]).format(**words)


def others(options, said: str) -> list[str]:
    """What a true answer does not contain: all options but the one it names."""
    return [option for option in options if option != said]


def about_background(d: Dialogue, scene: Scene) -> Question:
    page = scene.background
    return Question("background", ways("q_background"), reply(d, "a_background", b=page), [page], others(BACKGROUNDS, page))


def about_something_absent(d: Dialogue, scene: Scene) -> Question:
    absent = d.subject(besides={t.subject for t in scene.things})
    return Question("no", ways("q_is", x=a(absent)), reply(d, "a_no", y=in_view(scene), s=absent), ["no", absent], ["yes"])


def about_something_present(d: Dialogue, scene: Scene, thing: Thing) -> Question:
    x = noun_phrase(thing.subject, thing.main)
    said = reply(d, "a_yes", y=in_view(scene), x=x)
    return Question("yes", ways("q_is", x=a(thing.subject)), said, ["yes", thing.subject], ["no"])


def in_view(scene: Scene) -> str:
    """What there is, by name: 'two cats and a house'. Who says it first has looked before he says yes or no."""
    counts = Counter((t.subject, t.drawn > main_part(t.subject)) for t in scene.things)
    said = []
    for (subject, known), n in counts.items():
        # What has not got its main part yet is no house so far.
        said.append(noun_phrase(subject, None, n) if known else f"the beginning of {a(subject)}")
    return listing(said)


def about_the_total(d: Dialogue, scene: Scene) -> Question:
    number = NUMBERS[len(scene.things)]
    said = reply(d, "a_total_one") if number == "one" else reply(d, "a_total", n=number)
    return Question("total", ways("q_total"), said, [number], others(NUMBERS, number))


def about_number(d: Dialogue, scene: Scene, thing: Thing) -> Question:
    """How many things there are of one subject."""
    subject, several = thing.subject, plural(thing.subject)
    number = NUMBERS[sum(t.subject == subject for t in scene.things)]
    said = reply(d, "a_count_one", s=subject) if number == "one" else reply(d, "a_count", n=number, xs=several)
    return Question("count", ways("q_count", xs=several), said, [number], others(NUMBERS, number))


def about_parts(d: Dialogue, thing: Thing) -> list[Question]:
    """The colour of a part, and which part has that colour if no other has."""
    names = [part.name for part in SUBJECTS[thing.subject].parts[:thing.drawn]]
    at = d.rng.randrange(thing.drawn)
    part, colour = names[at], thing.colours[at]
    words = {"p": part, "be": is_are(part), "c": colour}
    asks = ways("q_part_colour", s=thing.subject, **words) + ways("q_colour", p=part)
    items = [Question("part", asks, reply(d, "a_part_colour", **words), [colour], others(COLOURS, colour))]
    if thing.colours[:thing.drawn].count(colour) == 1:
        said = reply(d, "a_part_colour", **words)
        items.append(Question("which", ways("q_which_part", c=colour), said, [part], others(names, part)))
    return items


def about_colour(d: Dialogue, thing: Thing) -> list[Question]:
    """The colour of a thing, asked for or guessed."""
    subject, main = thing.subject, thing.main
    asks = ways("q_thing_colour", p=subject) + ways("q_colour", p=subject)
    items = [Question("colour", asks, reply(d, "a_colour", s=subject, c=main), [main], others(COLOURS, main))]
    wrong = d.rng.choice([c for c in COLOURS if c not in (main, HELD_OUT_COLOURS[subject])])
    asks = ways("q_is_colour", s=subject, c=wrong)
    items.append(Question("colour no", asks, reply(d, "a_no_colour", s=subject, c=main), ["no", main], ["yes"]))
    asks = ways("q_is_colour", s=subject, c=main)
    items.append(Question("colour yes", asks, reply(d, "a_yes_colour", s=subject, c=main), ["yes"], ["no"]))
    return items


def about_place(d: Dialogue, scene: Scene, thing: Thing) -> list[Question]:
    """Where one of two things is."""
    other = next(t for t in scene.things if t is not thing)
    if other.subject == thing.subject:
        return []
    # What lies across a corner is neither beside nor above.
    (x, y), (other_x, other_y) = thing.centre, other.centre
    if abs(abs(x - other_x) - abs(y - other_y)) <= 4:
        return []

    axis, first, _ = arrangement(thing, other)
    word = axis if first == thing.subject else OPPOSITE[axis]
    words = {"r": d.rng.choice(RELATION_WORDS[word]), "s": other.subject}
    one = noun_phrase(thing.subject, thing.main)
    the = f"the {thing.subject}"
    return [
        Question("relation", ways("q_beside", **words), reply(d, "a_beside", x=one, **words), [thing.main, thing.subject]),
        Question("where", ways("q_where", x=the), reply(d, "a_beside", x=the, **words), [RELATION_WORDS[word]]),
    ]


def question(d: Dialogue, scene: Scene | None = None) -> None:
    given = scene or any_scene(d)
    if scene is None and d.chance(0.2):
        n, subject = d.rng.randint(2, 4), d.subject()
        main = d.colour(subject)
        given = Scene(given.background, tuple(small_thing(d, subject, main, cell) for cell in cells(d.rng, n)))
    if scene is None and d.chance(0.25) and len(given.things) == 1:
        t = given.things[0]
        given = replace(given, things=(replace(t, drawn=d.rng.randint(main_part(t.subject) + 1, t.drawn)),))
    d.scene = given
    for k in range(2 if d.chance(0.25) else 1):
        item = d.rng.choice(questions(d, given))
        d.ask(d.pick(item.asks), *(() if scene or k else (given,)))
        d.answer("question", words=item.words, avoid=item.avoid)
        d.say(item.reply)
    d.asked = True


def text(d: Dialogue) -> None:
    for _ in range(d.rng.choice((1, 1, 2))):
        talk(d, d.rng.choice(list(TALK.values()) if d.chance(0.4) else TALK_ITEMS))


def thanks(d: Dialogue) -> None:
    talk(d, TALK["thanks"])


def talk(d: Dialogue, item: tuple[list[str], list[str], list[str]]) -> None:
    asks, replies, words = item
    d.ask(d.pick(asks))
    d.answer("text", words=words)
    d.say(d.pick(replies))


KINDS = {"lesson": (lesson, 0.26), "one": (one, 0.10), "colour": (colour, 0.03), "two": (two, 0.05), "count": (count, 0.06),
         "position": (position, 0.07), "binding": (binding, 0.05), "recolour": (recolour, 0.07), "add": (add, 0.04),
         "add_part": (add_part, 0.03), "remove": (remove, 0.04), "move": (move, 0.03), "background": (background, 0.03),
         "multi": (multi, 0.05), "story": (story, 0.06), "question": (question, 0.08), "text": (text, 0.07)}


def follow_up(d: Dialogue) -> None:
    """Maybe another exchange on the last picture."""
    options = [thanks, background, recolour]
    if not d.asked:
        options.append(question)
    if len(d.scene.things) > 1 and len({(t.subject, t.main) for t in d.scene.things}) == len(d.scene.things):
        options.append(remove)
    if len({t.subject for t in d.scene.things}) < len(d.scene.things):
        options.remove(recolour)                                # "make the fish red" would not say which
    chosen = d.rng.choice(options)
    if chosen is thanks:
        thanks(d)
    else:
        chosen(d, d.scene)


def dialogue(seed: int, split: str = "train", kinds: dict[str, float] | None = None, size: int = 64) -> dict:
    """A record, by its seed alone. kinds: {kind: weight}, default all of KINDS. InputError on an unknown split or kind."""
    if split not in SPLITS:
        raise InputError(f"no split called {split!r}; there are {', '.join(SPLITS)}")
    weights = kinds or {k: w for k, (_, w) in KINDS.items()}
    if unknown := set(weights) - set(KINDS):
        raise InputError(f"no kind called {sorted(unknown)[0]!r}; there are {', '.join(KINDS)}")
    rng = random.Random(f"sketchbook {split} {seed}")
    kind = rng.choices(list(weights), list(weights.values()))[0]
    want = None
    for attempt in range(10_000):
        if split == "held_out" and attempt % 20 == 0:           # some kinds have no relation: then wish for something else
            want = rng.choice(("colour", "colour", "relation", "relation", "phrasing", "attached", "attached"))
        d = Dialogue(rng, want)
        KINDS[kind][0](d)
        while d.scene and len(d.images) < 7 and len(d.turns) < 4 and d.chance(0.28):
            follow_up(d)
        held = set.union(d.held, *(held_out_in(i["scene"]) for i in d.images))
        if bool(held) == (split == "held_out") and (not held or want in held):
            break
    return {"messages": painted(d, size), "kind": kind, "held_out": bool(held), "held_out_by": sorted(held),
            "truth": {"images": [{**i, "scene": i["scene"].to_json()} for i in d.images], "turns": d.turns}}


# ---------------------------------------------------------------------------------------------------------------------------
# For pretraining: pictures alone, pictures in motion


def allowed(rng, make):
    """What `make(rng)` returns, the first whose scenes hold nothing held out. make returns (scenes, anything)."""
    while True:
        scenes, rest = make(rng)
        if not any(held_out_in(s) for s in scenes):
            return scenes, rest


def pictures(seed: int, n: int, size: int = 64) -> list[Image.Image]:
    """n pictures of all kinds of scene, for the VAE; nothing held out is among them."""
    rng = random.Random(f"pictures {seed}")
    return [render(allowed(rng, lambda r: ((random_scene(r),), None))[0][0], size) for _ in range(n)]


def painted(d: Dialogue, size: int) -> list[dict]:
    """The messages with pictures in place of scenes."""
    return [{"role": m["role"], "content": [{"type": "image", "image": render(c["image"], size)} if c["type"] == "image" else c
                                            for c in m["content"]]} for m in d.messages]


def film(d: Dialogue, frames: int) -> tuple[list[Scene], str]:
    """Scenes and a caption: something is drawn part by part, moves, grows, changes its colour, or company arrives."""
    kind = d.rng.choice(("draw", "draw", "move", "grow", "recolour", "arrive", "background"))
    page = d.page()
    on = d.on(page)
    if kind == "arrive":
        x, word, y = d.couple()
        new, old = placed(d, x, d.colour(x), word, y, d.colour(y))
        text = d.pick(SAY["film_arrive"])
        text = text.format(x=noun_phrase(x, new.main), y=noun_phrase(y, old.main), r=d.rng.choice(RELATION_WORDS[word]))
        return [Scene(page, (old,) if k < frames / 2 else (old, new)) for k in range(frames)], text + on
    subject = d.subject(shapes=0.0 if kind == "draw" else 0.3)
    main = d.colour(subject)
    x = noun_phrase(subject, main)
    if kind == "draw":
        thing, named = whole_thing(d, subject, main, d.rng.choice((0, 1, 2, 6)))
        text = d.pick(SAY["film_draw"])
        steps = [max(1, round((k + 1) * thing.drawn / frames)) for k in range(frames)]
        return [Scene(page, (replace(thing, drawn=n),)) for n in steps], text.format(x=x + with_parts(thing, named)) + on
    if kind in ("recolour", "background"):
        thing, _ = whole_thing(d, subject, main, 0)
        i = main_part(subject)
        new_page = d.rng.choice([b for b in BACKGROUNDS if b != page])
        new = d.colour(subject, besides={main} | {thing.colours[j] for j in touching(subject)[i]})
        if kind == "background":
            text = d.pick(SAY["film_background"]).format(x=x, b=page, c=new_page)
            return [Scene(page if k < frames / 2 else new_page, (thing,)) for k in range(frames)], text
        after = replace(thing, colours=(*thing.colours[:i], new, *thing.colours[i + 1:]))
        text = d.pick(SAY["film_recolour"]).format(x=x, c=new)
        return [Scene(page, (thing if k < frames / 2 else after,)) for k in range(frames)], text + on
    length = d.rng.uniform(28.5, 32) if subject in FIGURES else d.rng.uniform(18, 32)
    thing = small_thing(d, subject, main, (0, 0, 64, 64), length)
    at = [k / max(1, frames - 1) for k in range(frames)]
    if kind == "move":
        start, end = d.rng.choice([("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")])
        p, q = shifted(thing, start), shifted(thing, end)
        text = d.pick(SAY["film_move"]).format(x=x, f=start, t=end)
        return [Scene(page, (replace(thing, x=p.x + (q.x - p.x) * s, y=p.y + (q.y - p.y) * s),)) for s in at], text + on
    verb, lengths = d.rng.choice([("grows", (length, 54)), ("shrinks", (54, length))])
    text = d.pick(SAY["film_grow"]).format(x=x, v=verb)
    things = [fit(subject, thing.drawn, thing.colours, lengths[0] + (lengths[1] - lengths[0]) * s, 32, 32) for s in at]
    return [Scene(page, (t,)) for t in things], text + on


def clip(seed: int, frames: int = 4, size: int = 64) -> tuple[str, list[Image.Image]]:
    """A caption and the frames of a short film, for pretraining the painter; nothing held out is in it."""
    scenes, text = allowed(random.Random(f"clip {seed}"), lambda r: film(Dialogue(r), frames))
    return sentence(text), [render(s, size) for s in scenes]


# ---------------------------------------------------------------------------------------------------------------------------
# Files


def write(folder, n: int, seed: int = 0, split: str = "train", kinds: dict[str, float] | None = None, size: int = 64) -> Path:
    """n records from `seed` on as folder/records.jsonl with PNGs in folder/images; returns the path of the JSONL."""
    folder = Path(folder)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "records.jsonl", "w", encoding="utf-8") as out:
        for i in range(seed, seed + n):
            record, k = dialogue(i, split, kinds, size), 0
            for message in record["messages"]:
                for item in message["content"]:
                    if item["type"] == "image":
                        name = f"images/{split}-{i:07d}-{k}.png"
                        item["image"].save(folder / name)
                        item["image"], k = name, k + 1
            out.write(json.dumps(record) + "\n")
    return folder / "records.jsonl"


def show(path, n: int = 12, seed: int = 0, split: str = "train", kinds: dict[str, float] | None = None, size: int = 64) -> None:
    """A contact sheet: a dialogue a row, the pictures twice as large with the words that led to them underneath."""
    rows, side, wide = [], 128, 176
    for i in range(seed, seed + n):
        strip, said = [], []
        for m in (record := dialogue(i, split, kinds, size))["messages"]:
            for c in m["content"]:
                if c["type"] == "text":
                    said.append(f"{'> ' if m['role'] == 'user' else ''}{c['text']}")
                else:
                    strip.append((c["image"].resize((side, side), Image.Resampling.NEAREST), said))
                    said = []
        rows.append((record["kind"], [*strip, (None, said)] if said else strip))
    font = ImageFont.load_default(11)
    sheet = Image.new("RGB", (wide * max(len(r) for _, r in rows) + 8, (side + 92) * len(rows)), (244, 244, 244))
    pen = ImageDraw.Draw(sheet)
    for y, (kind, strip) in enumerate(rows):
        for x, (picture, said) in enumerate(strip):
            corner = (8 + x * wide, 14 + y * (side + 92))
            if picture:
                sheet.paste(picture, corner)
            lines = [line for text in said for line in textwrap.wrap(text, 29)]
            below = (corner[0], corner[1] + (side + 3 if picture else 0))
            pen.multiline_text(below, "\n".join(lines[:5 if picture else 14]), (40, 40, 40), font)
        pen.text((8, y * (side + 92) + 1), kind, (150, 60, 60), font)
    sheet.save(path)
