"""How people word what they want drawn: requests put together from parts, and what each of them names.

A whole sentence ("Show me how to draw {x}.") or an opening and a verb are the frame; the thing is worded ("a pink house", "a
house in pink", "a pair of ducks"); what else is wanted is attached, behind the noun ("whose door is black"), behind the
sentence (", and make its door black") or before it. The parts stand in grammar.json, {category: {"train": [...], "held_out":
[...]}}, with the placeholders of words.GRAMMAR. The two lists of each category were written by two people who never saw the
other's: with the held-out ones an exam asks whether a model understands a detail however it is attached.

    text, named = request(d, "lesson", [Wanted("house", "pink", parts={"door": "black"})])

`named` is every detail that the user names, for the exam (evaluate/details.py):
    {"of": "thing", "subject"}                          it is there
    {"of": "colour", "subject", "colour"}               in this colour
    {"of": "part", "subject", "part", "colour"}
    {"of": "count", "subject", "count"}                 so many of it
    {"of": "place", "subject", "relation", "other"}     left of, right of, above, below
    {"of": "page", "background"}
    {"of": "pictures", "count"}                         steps of a lesson, pictures of a story
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sketchbook.words import ASK, GRAMMAR_WAYS, NUMBERS, a, is_are, listing, noun_phrase, part_phrase, plural

VERBS = {"lesson": "lesson_verb", "story": "story_verb"}  # every other kind asks for one picture
COMPOSED = 0.5     # of the frames are put together; the others are whole sentences of requests.json


@dataclass
class Wanted:
    """A thing that a user asks for, as far as he says."""
    subject: str
    colour: str | None = None
    count: int = 1
    parts: dict[str, str] = field(default_factory=dict)      # {name: colour}


@dataclass
class Around:
    """What is said about a thing away from its noun."""
    before: str = ""
    after: list[str] = field(default_factory=list)


def way(d, category: str, /, **words) -> str:
    """One way of saying something. `d` chooses; a held-out one is noted as held out by "attached"."""
    return d.pick(GRAMMAR_WAYS[category], "attached").format(**words)


def request(d, kind: str, wanted: list[Wanted], *, join: str = " and ", relation: str | None = None, page: str | None = None,
            pictures: int | None = None, company: Wanted | None = None) -> tuple[str, list[dict]]:
    """The words of a request, and every detail that they name.

    join: the words between two things, of which `relation` is the sense. pictures: steps of a lesson, pictures of a story.
    """
    around = Around()
    x = join.join(worded(d, one, around, alone=len(wanted) == 1 and not company) for one in wanted)
    if company:
        x += way(d, "company", y=noun_phrase(company.subject, company.colour))

    # The page and the number of pictures stand behind the thing, or behind the whole request.
    if page and d.chance(0.6):
        x += way(d, "page", b=page)
    elif page:
        around.after.append(way(d, "page_tail", b=page))
    if pictures:
        number = way(d, "steps" if kind == "lesson" else "length", n=NUMBERS[pictures], d=pictures)
        if number.startswith(". ") or d.chance(0.5):
            around.after.insert(0, number)
        else:
            x += number

    text = framed(d, kind, x)
    for tail in around.after:
        text = joined(text, tail)
    if d.chance(0.12):
        text = joined(text, d.pick(GRAMMAR_WAYS["closing"]))
    if around.before:
        text = around.before + lowered(text, around.before)
    return text, named(wanted, relation, page, pictures, company)


def framed(d, kind: str, x: str) -> str:
    """The sentence about a thing."""
    sentences = ASK[kind if kind in VERBS else "one"]
    if not d.chance(COMPOSED):
        return d.pick(sentences).format(x=x)
    text = d.pick(GRAMMAR_WAYS[VERBS.get(kind, "one_verb")]).format(x=x)
    if d.chance(0.5):
        text = f"{d.pick(GRAMMAR_WAYS['opening'])} {text}"
    return text + ("?" if text.startswith(("can ", "could ", "would ", "will ")) and d.chance(0.7) else ".")


def joined(text: str, tail: str) -> str:
    """A request and what is said behind it: a clause takes the place of its full stop, a sentence comes after it."""
    if tail.startswith(". "):
        return f"{text if text[-1] in '.?!' else text + '.'} {tail[2:3].upper()}{tail[3:]}"
    end = text[-1] if text[-1] in ".?!" else ""
    return text.rstrip(".?!") + tail + ("" if tail[-1] in ".?!" else end)


def lowered(text: str, before: str) -> str:
    """A request behind "with a blue door: " begins small, unless with "I" or after a full stop."""
    if before.rstrip().endswith((".", "!", "?")):
        return text[0].upper() + text[1:]
    return text if text.startswith(("I ", "I'")) else text[0].lower() + text[1:]


def worded(d, one: Wanted, around: Around, alone: bool) -> str:
    """A thing with what stands behind its noun; what is said elsewhere goes to `around`, if the thing is alone."""
    x = noun(d, one, around, alone)
    parts = list(one.parts.items())
    d.rng.shuffle(parts)
    if not parts:
        return x

    # All of them in one phrase, behind the noun or before everything; or one by one, the first at the noun.
    phrases = listing([part_phrase(name, colour) for name, colour in parts])
    how = d.rng.random()
    if how < 0.4:
        return x + way(d, "attach_all", parts=phrases)
    if how < 0.48 and alone:
        around.before = way(d, "front", parts=phrases)
        return x
    at_noun = len(parts) if not alone or d.chance(0.5) else d.rng.randint(0, min(1, len(parts) - 1))
    for k, (name, colour) in enumerate(parts):
        words = {"p": name, "c": colour, "be": is_are(name)}
        if k >= at_noun:
            around.after.append(way(d, "tail", **words))
            continue
        said = way(d, "attach", **words)
        x += said if k == 0 or said.startswith(",") else f" and{said}"
    return x


def noun(d, one: Wanted, around: Around, alone: bool) -> str:
    """The thing itself, its number and its colour."""
    if one.count > 1:
        xs = f"{one.colour} {plural(one.subject)}" if one.colour else plural(one.subject)
        if one.count == 2 and d.chance(0.4):
            return way(d, "pair", xs=xs)
        if d.chance(0.5):
            return way(d, "several", xs=xs, n=NUMBERS[one.count], d=one.count)
        return noun_phrase(one.subject, one.colour, one.count)
    if one.colour and d.chance(0.2):
        # "A cat and a dog, and it's red": which of them? Where there are two, the colour stands at its noun.
        ways = GRAMMAR_WAYS["paint"] if alone else [w for w in GRAMMAR_WAYS["paint"] if not w.lstrip("~").startswith(",")]
        return a(one.subject) + d.pick(ways, "attached").format(c=one.colour)
    if one.colour and alone and d.chance(0.12):
        around.after.append(way(d, "paint_tail", c=one.colour))
        return a(one.subject)
    return noun_phrase(one.subject, one.colour)


def named(wanted: list[Wanted], relation: str | None, page: str | None, pictures: int | None, company) -> list[dict]:
    details = []
    for one in [*wanted, *([company] if company else [])]:
        details.append({"of": "thing", "subject": one.subject})
        if one.colour:
            details.append({"of": "colour", "subject": one.subject, "colour": one.colour})
        if one.count > 1:
            details.append({"of": "count", "subject": one.subject, "count": one.count})
        details += [{"of": "part", "subject": one.subject, "part": p, "colour": c} for p, c in one.parts.items()]
    if relation:
        first, second = wanted
        details.append({"of": "place", "subject": first.subject, "relation": relation, "other": second.subject})
    if page:
        details.append({"of": "page", "background": page})
    if pictures:
        details.append({"of": "pictures", "count": pictures})
    return details
