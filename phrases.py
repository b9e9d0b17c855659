"""The words of sketchbook: English in small, what the user asks, what the assistant says, and talk without pictures.

Every sentence of the assistant before a picture states what the picture shows; `checker.claims` reads it back. What the user
asks stands in asks.py. A ~ before a phrasing keeps it out of training.
"""

from __future__ import annotations

import re

import asks
from scenes import COLOURS, FIGURES, SUBJECTS, Thing, main_part

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
PLURALS = {"fish": "fish", "snowman": "snowmen", "butterfly": "butterflies", "ice cream": "ice creams"}


def plural(subject: str) -> str:
    return PLURALS.get(subject, subject + "s")


def a(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def articles(text: str) -> str:
    """'an orange cat' where a template said 'a orange cat'; single spaces."""
    return re.sub(r"\b([Aa]) (?=(?:orange|ice|oval|engine|eye)\b)", r"\1n ", re.sub(r"\s+", " ", text).strip())


def noun_phrase(subject: str, colour: str | None = None, count: int = 1) -> str:
    """'a red house', 'three fish'."""
    words = f"{colour} " if colour else ""
    return a(words + subject) if count == 1 else f"{NUMBERS[count]} {words}{plural(subject)}"


def part_phrase(name: str, colour: str) -> str:
    """'a blue door', 'black wheels'; names in s are plurals (or grass)."""
    return f"{colour} {name}" if name.endswith("s") else a(f"{colour} {name}")


def is_are(name: str) -> str:
    return "are" if name.endswith("s") and name != "grass" else "is"


def listing(items: list[str]) -> str:
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def with_parts(thing: Thing, names=None) -> str:
    """' with a blue roof and a yellow door': the drawn parts but the main one, or those named."""
    parts = SUBJECTS[thing.subject].parts[:thing.drawn]
    said = [part_phrase(p.name, c) for i, (p, c) in enumerate(zip(parts, thing.colours, strict=False))
            if (p.name in names if names is not None else i != main_part(thing.subject))]
    return " with " + listing(said) if said else ""


def sentence(text: str) -> str:
    """Capital and full stop."""
    text = articles(text)
    return text[0].upper() + text[1:] + ("" if text[-1] in ".!?" else ".")


# ---------------------------------------------------------------------------------------------------------------------------
# What the two say. {x} is the noun phrase asked for, {p} a part, {b} a background.


def ways(key: str, **words) -> list[str]:
    """The phrasings of something asked, the held-out ones marked as such; with words, filled in."""
    return [t.format(**words) if words else t for t in [*asks.ASK[key], *(f"~{t}" for t in asks.HELD_OUT[key])]]


ASK = {key: ways(key) for key in asks.ASK}

RELATION_WORDS = {"left": ["to the left of", "left of", "on the left of"],
                  "right": ["to the right of", "right of", "on the right of"],
                  "above": ["above", "over"], "below": ["below", "under"]}

SAY = {
    "scene": ["Here is {x}{b}.", "This is {x}{b}.", "Here you see {x}{b}.", "I drew {x}{b}.", "Look, {x}{b}.",
              "Sure, here is {x}{b}.", "Of course. This is {x}{b}."],
    "scenes": ["Here are {x}{b}.", "These are {x}{b}.", "Here you see {x}{b}.", "I drew {x}{b}.", "Look, {x}{b}.",
               "Sure, here are {x}{b}."],
    "recolour": ["Now the {p} {is} {c}.", "The {p} {is} {c} now.", "I painted the {p} {c}.", "Sure, the {p} {is} now {c}.",
                 "Here the {p} {is} {c}."],
    "remove": ["I removed {x}.", "{x} is gone.", "I took {x} away.", "Here is the picture without {x}."],
    "add": ["I added {x} {r} {y}.", "Now there is {x} {r} {y}.", "I put {x} {r} {y}."],
    "add_part": ["I added {x} to the {s}.", "Now the {s} has {x}.", "Here is the {s} with {x}."],
    "move": ["Now {x} is {at}.", "I moved {x} {to}.", "{x} is {at} now."],
    "background": ["Now the background is {b}.", "The background is {b} now.", "I painted the background {b}.",
                   "Here it is on a {b} background."],
    "open": ["Sure!", "Let us begin.", "Of course.", "Good idea!", "With pleasure.", "Here we go."],
    "close": ["Your {x} is ready.", "That is all, the {x} is done!", "The {x} is finished.", "Well done!", "And that is {ax}!",
              "Now you have {ax}."],
    "start": ["{lead} draw {look} {where} for the {p}{b}.", "{lead} start with {look} {where} for the {p}{b}.",
              "{lead} paint {look} {where}{b}, this is for the {p}."],
    "part": ["{lead} draw {look} {where} for the {p}.", "{lead} put {look} {where} as the {p}.",
             "{lead} add {look} {where} for the {p}.", "{lead} paint {look} {where} as the {p}.",
             "{lead} place {look} {where} for the {p}."],
    "story alone": ["Then {the} was {place}.", "{the} went on and was {place}.", "Later {the} was alone {place}."],
    "story last": ["At last {the} slept {place}.", "In the end {the} was {place}."],
    "story stood": ["Then {the} stood {r} {y} {place}.", "{the} sat down {r} {y} {place}.", "Soon {the} was {r} {y} {place}."],
    "story met": ["{the} met {y} {place}.", "Then {the} saw {y} {place}.", "{the} found {y} {place}.",
                  "Soon {the} played with {y} {place}."],
}
# How one asks for a move, how one says where it led.
MOVES = {"left": (["to the left side", "to the left"], "on the left side"),
         "right": (["to the right side", "to the right"], "on the right side"),
         "top": (["to the top"], "at the top"), "bottom": (["to the bottom"], "at the bottom")}

# Talk without pictures: questions, answers, words the answer must contain.
TALK = [
    (["Hello!", "Hi", "Hello there"], ["Hello! What shall we draw?", "Hi! What would you like to draw?"],
     ["what", "draw"]),
    (["Good morning", "Good evening!"], ["Good day! What shall we draw?", "Hello! What do you want to draw?"],
     ["what", "draw"]),
    (["Who are you?", "What are you?"],
     ["I am a sketchbook. I teach drawing.", "I am a sketchbook that draws simple pictures."], ["sketchbook"]),
    (["What can you do?", "How can you help me?"],
     ["I can draw pictures, change them and tell stories.", "I can teach you to draw, step by step."], ["can"]),
    (["What do I need to draw?", "What do I need for a drawing?", "Which things does one draw with?"],
     ["You need paper and a pencil.", "One draws on paper with a pencil."],
     ["paper", "pencil"]),
    (["What do I paint with?", "What does a painter use?"], ["You paint with a brush.", "A painter uses a brush and paint."],
     ["brush"]),
    (["How many colours do you know?", "How many colours have you got?"], ["I know nine colours.", "There are nine colours."],
     ["nine"]),
    (["Which colours do you know?", "Name your colours."], ["Red, orange, yellow, green, blue, purple, pink, brown and black."],
     list(COLOURS)),
    (["Thank you!", "Thanks", "Thank you very much.", "That is great, thank you."],
     ["You are welcome!", "With pleasure."], [["welcome", "pleasure"]]),
    (["Goodbye", "Bye!", "See you later."], ["Goodbye!", "Goodbye, see you soon."], ["goodbye"]),
    (["What colour is grass?", "Which colour has grass?"], ["Grass is green."], ["green"]),
    (["What colour is the sky?"], ["The sky is blue."], ["blue"]),
    (["What is a triangle?", "How many sides does a triangle have?"],
     ["A triangle is a shape with three sides.", "A triangle has three sides."], ["three"]),
    (["What is a square?", "How many sides does a square have?"],
     ["A square is a shape with four sides.", "A square has four sides."], ["four"]),
    (["What comes first in a lesson?", "How do I start a drawing?"], ["Start with a big shape.", "Draw a big shape first."],
     ["big", "shape"]),
    (["How do I clean a brush?"], ["Clean the brush with water."], ["water"]),
    (["Is drawing hard?", "Is it hard to draw?"], ["No, it is easy, step by step.", "No, drawing is easy."], ["easy"]),
]
TALK = [([*said, *(ways(said[0]) if said[0] in ASK else ())], replies, words) for said, replies, words in TALK]
MIXES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple", ("red", "green"): "brown"}


def talk_items() -> list[tuple[list[str], list[str], list[str]]]:
    """All talk without pictures, with the facts that follow from the tables: mixtures, sums, the parts of the subjects."""
    items = list(TALK)
    for (one, two), mixed in MIXES.items():
        for x, y in ((one, two), (two, one)):
            items.append(([f"What do I get when I mix {x} and {y}?", f"Which colour do {x} and {y} make?",
                           f"How do I mix {x} with {y}?", *ways("mix", a=x, b=y)],
                          [f"{x} and {y} make {mixed}.", f"You get {mixed}."], [mixed]))
        items.append(([f"How do I mix {mixed}?", f"How can I make {mixed}?", *ways("mix_how", c=mixed)],
                      [f"Mix {one} and {two}.", f"You mix {one} with {two}."], [one, two]))
    for i in range(1, 5):
        items.append(([f"What comes after {NUMBERS[i]}?", f"Which number follows {NUMBERS[i]}?",
                       *ways("after", n=NUMBERS[i])],
                      [f"After {NUMBERS[i]} comes {NUMBERS[i + 1]}."], [NUMBERS[i + 1]]))
        for j in range(1, 6 - i):
            total = NUMBERS[i + j]
            items.append(([f"What is {NUMBERS[i]} and {NUMBERS[j]}?", f"How much is {NUMBERS[i]} plus {NUMBERS[j]}?",
                           *ways("sum", n=NUMBERS[i], m=NUMBERS[j])],
                          [f"{NUMBERS[i]} and {NUMBERS[j]} make {total}.", f"That is {total}."], [total]))
    for name in FIGURES:
        parts, x = SUBJECTS[name].parts, a(name)
        names = listing([p.name if p.name.endswith("s") else a(p.name) for p in parts])
        items.append(([f"What parts does {x} have?", f"Which parts belong to {x}?", f"What is {x} made of?",
                       *ways("parts", x=x)], [f"{x} has {names}.", f"It has {names}."], [p.name for p in parts]))
        number = NUMBERS[len(parts)]
        items.append(([f"How many parts does {x} have?", f"How many steps does {x} take?", *ways("part_count", x=x)],
                      [f"{x} has {number} parts.", f"{x} takes {number} steps."], [number]))
        for part in parts:
            shape, verb = part.look.replace("{} ", ""), is_are(part.name)
            items.append(([f"What shape {verb} the {part.name} of {x}?", f"Which shape {verb} the {part.name} of {x}?",
                           *ways("part_shape", p=part.name, x=x)],
                          [f"The {part.name} {verb} {shape}.", f"Draw {shape}."], [shape.split()[-1]]))
    return items


TALK_ITEMS = talk_items()
