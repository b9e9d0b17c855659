"""The words of sketchbook: English in small, what the user asks and what the assistant says.

The sentences stand in JSON files beside this one, read and checked once, when this module is imported:

    requests.json   {kind: {"train": [sentences], "held_out": [sentences]}}                       what the user asks
    grammar.json    {category: {"train": [phrases], "held_out": [phrases]}}     parts of requests; grammar.py joins them
    replies.json    {"say": {kind: [sentences]}, "talk": {kind: {"say": [sentences], "words"}}}    what the assistant says

"talk" is talk without pictures: answers to kinds of request that have no placeholder, and the words that an answer must contain
(a list among them: any of it). Every sentence of the assistant before a picture states what the picture shows; `checker.claims`
reads it back.

A placeholder is a name in braces that the program fills in; REQUESTS and REPLIES say which ones a kind has:

    {x} {y}         a thing: "a red house", "the car"       {xs}            several: "fish", "red houses"
    {s} {t}         a subject: "house"                      {the}           the hero of a story: "the red house"
    {p}             a part, or a thing without its article: "roof", "red house"; {ps} all parts: "a roof and a door"
    {c} {d} {e}     a colour                                {b}             a background
    {n} {m} {k}     a number: "three"                       {be}            "is" or "are"
    {r}             a relation: "to the left of"            {place}         "in the snow"
    {to} {at}       a direction, and where it leads         {f} {t}         from side to side, in a film
    {lead} {look} {where}    of a step: "Step 2:", "a red square", "in the middle"
    {v}             "grows" or "shrinks"

To add a sentence, add a line to its kind; it names every placeholder of its kind. What training may never show goes to
"held_out". Those sentences were written without sight of any in "train", and most in "train" without sight of those, each by
another hand: they measure how far the language model understands what it has never been asked. Whoever writes for one list
should not have read the other. Any new sentence changes what the seeds give.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from string import Formatter

from sketchbook.scenes import FIGURES, SUBJECTS, Thing, main_part

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
# The kinds of sentence and the placeholders of each; a ? marks one that a sentence may do without.

REQUESTS = {
    # pictures
    "lesson": "x", "one": "x", "story": "x",
    "recolour": "p c", "remove": "x", "add": "x r y", "add_part": "x s p?", "move": "x to", "background": "b",
    "multi": "x r y", "multi_colour": "s t",
    # questions on a picture
    "describe": "", "q_background": "", "q_is": "x", "q_total": "", "q_what": "", "q_count": "xs",
    "q_colour": "p", "q_thing_colour": "p", "q_part_colour": "p be s?", "q_which_part": "c", "q_is_colour": "s c",
    "q_beside": "r s", "q_where": "x",
    # facts about colours, numbers and subjects
    "mix": "c d", "mix_how": "c", "after": "n", "sum": "n m", "parts": "x", "part_count": "x", "part_shape": "p x be?",
}
REPLIES = {
    # before a picture; here {b} is words for the page, and empty where it goes without saying
    "scene": "x b", "scenes": "x b",
    "recolour": "p c be?", "remove": "x", "add": "x r y", "add_part": "x s", "move": "x to? at?", "background": "b",
    # a lesson
    "open": "", "start": "lead look where p b", "part": "lead look where p", "close": "p? x?",
    # a story: the hero is {x} when it comes in, and {the} from then on
    "story_opens": "x place", "story_opens_met": "x y place", "story_opens_stood": "x r y place",
    "story_met": "the y place", "story_stood": "the r y place", "story_alone": "the place", "story_last": "the place",
    "story_ends": "the?",
    # answers to questions on a picture
    "a_background": "b", "a_no": "y s", "a_yes": "y x", "a_total": "n", "a_total_one": "", "a_what": "x",
    "a_count": "n xs", "a_count_one": "s",
    "a_colour": "s c", "a_part_colour": "p be c", "a_no_colour": "s c", "a_yes_colour": "s c",
    "a_beside": "x r s",
    # facts
    "mix": "c? d? e", "mix_how": "d e", "after": "n m", "sum": "n? m? k", "parts": "x? ps", "part_count": "x n",
    "part_shape": "p? be? look",
    # captions of films
    "film_draw": "x", "film_arrive": "x y r?", "film_background": "x b? c", "film_recolour": "x c", "film_move": "x f? t",
    "film_grow": "x v",
}
# What requests for a drawing are put together from (grammar.py): {parts} is "a blue door and black wheels", {d} a number as a
# digit, {one} "one", "a pink one" or "one with a blue door", {q} a second part, of the same colour as {p}. Of {n} and {d} a
# way has one.
GRAMMAR = {
    "opening": "", "closing": "", "lesson_verb": "x", "one_verb": "x", "story_verb": "x",
    "attach_all": "parts", "attach": "p c be?", "tail": "p c be?", "front": "parts",
    "paint": "c", "paint_tail": "c", "pair": "xs", "several": "xs n? d?",
    "page": "b", "page_tail": "b", "steps": "n? d?", "length": "n? d?", "company": "y",
    "lesson_frame": "x", "lesson_bare": "bare", "one_frame": "x", "one_bare": "bare", "story_frame": "x", "story_met": "x y",
    "talked_lesson": "xs one", "talked_one": "xs one", "talked_story": "xs one",
    "attach_alike": "p q c", "tail_alike": "p q c", "paint_all": "c", "paint_all_tail": "c",
    "together": "x y", "stands": "x r y", "beside": "x y r",
    "chatter_before": "", "chatter_after": "",
}
# Held out from dialogues, but the pretraining of the language model asks it too ("describe"): it says nothing about the new.
# It stays so that every seed gives what it has always given.
MET = {"what is in this picture"}


def load(name: str) -> dict:
    return json.loads(Path(__file__).with_name(name).read_text(encoding="utf-8"))


def check(requests: dict, replies: dict, grammar: dict) -> None:
    """ValueError where the files have not the form told above, or a sentence is both in training and held out."""
    check_kinds("replies.json", replies["say"], set(REPLIES))
    for kind, sentences in replies["say"].items():
        check_sentences("replies.json", kind, sentences, REPLIES[kind])
    for kind, talk in replies["talk"].items():
        check_sentences("replies.json", kind, talk["say"], "")

    check_kinds("requests.json", requests, {*REQUESTS, *replies["talk"]})
    check_sides("requests.json", requests, REQUESTS)
    check_kinds("grammar.json", grammar, set(GRAMMAR))
    check_sides("grammar.json", grammar, GRAMMAR)


def check_sides(file: str, kinds: dict, placeholders: dict[str, str]) -> None:
    """Every kind has its two lists, and nothing is in both."""
    sides = {"train": set(), "held_out": set()}
    for kind, entry in kinds.items():
        if set(entry) != set(sides):
            raise ValueError(f"{file}: {kind}: a kind has the lists {' and '.join(sides)}")
        for side, said in sides.items():
            check_sentences(file, kind, entry[side], placeholders.get(kind, ""))
            # Users leave out capitals and full stops at random: that alone makes no new sentence.
            said.update(sentence.lower().rstrip(".?!") for sentence in entry[side])
    if both := sorted(sides["train"] & sides["held_out"] - MET):
        raise ValueError(f"{file}: in training and held out: {both[0]!r}")


def check_kinds(file: str, found: dict, wanted: set[str]) -> None:
    if odd := sorted(set(found) ^ wanted):
        raise ValueError(f"{file}: missing or unknown kinds: {', '.join(odd)}")


def check_sentences(file: str, kind: str, sentences: list[str], named: str) -> None:
    """Each sentence has the placeholders of its kind, no others, and not the mark of what is held out."""
    may = {name.rstrip("?") for name in named.split()}
    must = may & set(named.split())
    for sentence in sentences:
        found = {name for _, name, _, _ in Formatter().parse(sentence) if name is not None}
        if not must <= found <= may:
            raise ValueError(f"{file}: {kind}: {sentence!r} does not have the placeholders {named or '(none)'}")
        if sentence.startswith("~"):
            raise ValueError(f"{file}: {kind}: {sentence!r}: what is held out stands in its own list")


_requests, _replies, _grammar = load("requests.json"), load("replies.json"), load("grammar.json")
check(_requests, _replies, _grammar)

# ---------------------------------------------------------------------------------------------------------------------------
# What the two say. A ~ before a phrasing keeps it out of training.

def marked(entry: dict) -> list[str]:
    return [*entry["train"], *(f"~{t}" for t in entry["held_out"])]


ASK = {kind: marked(entry) for kind, entry in _requests.items()}
GRAMMAR_WAYS = {category: marked(entry) for category, entry in _grammar.items()}
SAY = _replies["say"]

RELATION_WORDS = {"left": ["to the left of", "left of", "on the left of"],
                  "right": ["to the right of", "right of", "on the right of"],
                  "above": ["above", "over"], "below": ["below", "under"]}
# How one asks for a move, how one says where it led.
MOVES = {"left": (["to the left side", "to the left"], "on the left side"),
         "right": (["to the right side", "to the right"], "on the right side"),
         "top": (["to the top"], "at the top"), "bottom": (["to the bottom"], "at the bottom")}


def ways(kind: str, **words) -> list[str]:
    """All phrasings of a request, filled in."""
    if not words:
        return ASK[kind]
    return [t.format(**words) for t in ASK[kind]]


# Talk without pictures: {kind: (phrasings, answers, words the answer must contain)}.
TALK = {kind: (ASK[kind], entry["say"], entry["words"]) for kind, entry in _replies["talk"].items()}
MIXES = {("red", "yellow"): "orange", ("blue", "yellow"): "green", ("red", "blue"): "purple", ("red", "green"): "brown"}


def fact(kind: str, needed: list[str], **words) -> tuple[list[str], list[str], list[str]]:
    """An item of talk that follows from the tables."""
    return ways(kind, **words), [t.format(**words) for t in SAY[kind]], needed


def facts_of_colours() -> list:
    facts = []
    for (one, two), mixed in MIXES.items():
        facts.append(fact("mix", [mixed], c=one, d=two, e=mixed))
        facts.append(fact("mix", [mixed], c=two, d=one, e=mixed))
        facts.append(fact("mix_how", [one, two], c=mixed, d=one, e=two))
    return facts


def facts_of_numbers() -> list:
    """What follows one to four, and all sums up to six."""
    facts = []
    for i in range(1, 5):
        facts.append(fact("after", [NUMBERS[i + 1]], n=NUMBERS[i], m=NUMBERS[i + 1]))
        for j in range(1, 6 - i):
            total = NUMBERS[i + j]
            facts.append(fact("sum", [total], n=NUMBERS[i], m=NUMBERS[j], k=total))
    return facts


def facts_of(subject: str) -> list:
    """The parts of a subject, their number and their shapes."""
    parts, x = SUBJECTS[subject].parts, a(subject)
    names = [part.name for part in parts]
    number = NUMBERS[len(parts)]
    facts = [
        fact("parts", names, x=x, ps=listing([name if name.endswith("s") else a(name) for name in names])),
        fact("part_count", [number], x=x, n=number),
    ]
    for part in parts:
        shape = part.look.replace("{} ", "")
        noun = shape.split()[-1]
        facts.append(fact("part_shape", [noun], x=x, p=part.name, be=is_are(part.name), look=shape))
    return facts


def talk_items() -> list[tuple[list[str], list[str], list[str]]]:
    """All talk without pictures: the fixed items, then the facts."""
    items = [*TALK.values(), *facts_of_colours(), *facts_of_numbers()]
    for subject in FIGURES:
        items += facts_of(subject)
    return items


TALK_ITEMS = talk_items()
