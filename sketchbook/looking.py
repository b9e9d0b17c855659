"""Pictures described and asked about: how the miniature's language model learns to read what its vision tower sees.

    python train_stage1.py --data sketchbook=0.7,sketchbook.looking=0.3        a world of its own beside the dialogues

A record has one picture of any scene, whole or half finished, and either a description of all that it shows or several
questions in a row. In dialogues few words depend on a picture; here nearly all do.
"""

from __future__ import annotations

import random

from sketchbook.dialogues import Dialogue, allowed, painted, questions
from sketchbook.scenes import SUBJECTS, Scene, Thing, random_scene
from sketchbook.words import ASK, a, listing, noun_phrase, part_phrase, sentence, with_parts


def place_words(thing: Thing) -> str:
    """'at the top left', 'in the middle', by thirds of the picture."""
    cx, cy = thing.centre
    row = "top" if cy < 26 else "bottom" if cy > 38 else ""
    column = "left" if cx < 26 else "right" if cx > 38 else ""
    if not row and not column:
        return "in the middle"
    return f"at the {row} {column}".strip() if row else f"on the {column}"


def describe(scene: Scene, rng: random.Random | None = None) -> str:
    """What a picture shows: subjects, colours of all parts, numbers, places, background. Without rng in fixed words."""
    rng = rng or random.Random(0)
    groups = {}
    for t in scene.things:
        groups.setdefault((t.subject, t.drawn, t.colours[:t.drawn]), []).append(t)
    said = []
    for group in groups.values():
        t, where = group[0], f" {place_words(group[0])}" if len(group) == 1 else ""
        if t.drawn < SUBJECTS[t.subject].small:                 # not yet what it is going to be
            parts = zip(SUBJECTS[t.subject].parts[:t.drawn], t.colours, strict=False)
            said.append(f"{listing([part_phrase(p.name, c) for p, c in parts])} of {a(t.subject)}{where}")
        else:
            said.append(noun_phrase(t.subject, t.main, len(group)) + with_parts(t) + where)
    lead = rng.choice(["The picture shows", "I see", "There is" if len(scene.things) == 1 else "There are"])
    end = rng.choice([f" on a {scene.background} background.", f". The background is {scene.background}.",
                      f" on {scene.background} paper."])
    return sentence(f"{lead} {said[0] if len(said) == 1 else ', '.join(said[:-1]) + ', and ' + said[-1]}{end}")


def record(seed: int, split: str = "train", kinds: dict | None = None, size: int = 64) -> dict:
    """A record, by its seed alone; nothing held out is in it. It has neither splits nor kinds."""
    rng = random.Random(f"looking {seed}")
    _, d = allowed(rng, look)
    return {"messages": painted(d, size), "kind": "looking", "held_out": False, "held_out_by": [],
            "truth": {"images": [{**i, "scene": i["scene"].to_json()} for i in d.images], "turns": d.turns}}


def look(rng: random.Random) -> tuple[tuple[Scene], Dialogue]:
    d = Dialogue(rng)
    scene = random_scene(rng)
    if rng.random() < 0.5:
        d.ask(d.pick(ASK["describe"]), scene)
        d.answer("looking")
        d.say(describe(scene, rng))
        return (scene,), d
    items = questions(d, scene)
    for k, item in enumerate(rng.sample(items, min(len(items), rng.randint(2, 6)))):
        d.ask(d.pick(item.asks), *(() if k else (scene,)))
        d.answer("looking", words=item.words, avoid=item.avoid)
        d.say(item.reply)
    return (scene,), d
