"""How people word what they want drawn: requests put together from parts, and what each of them names.

A whole sentence ("Show me how to draw {x}."), an opening and a verb, or a fragment ("{x}, step by step") are the frame; the
thing is worded ("a pink house", "a house in pink", "a pair of ducks"); what else is wanted is attached, behind the noun
("whose door is black"), behind the sentence (", and make its door black") or before it; and some talk of other things first,
or of the thing itself ("My son loves trains. Can you draw a blue one?").
The parts stand in grammar.json, {category: {"train": [...], "held_out": [...]}}, with the placeholders of words.GRAMMAR. The
two lists of each category were written by two people who never saw the other's: with the held-out ones an exam asks whether a
model understands a detail however it is attached.

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

from sketchbook.words import ASK, GRAMMAR_WAYS, NUMBERS, RELATION_WORDS, a, is_are, listing, noun_phrase, part_phrase, plural

FRAMES = {"whole": 0.35, "composed": 0.35, "fragment": 0.3}  # shares of requests.json, of opening and verb, of the other forms


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


def request(d, kind: str, wanted: list[Wanted], *, relation: str | None = None, page: str | None = None,
            pictures: int | None = None, company: Wanted | None = None) -> tuple[str, list[dict]]:
    """The words of a request, and every detail that they name.

    relation: of the first of two things to the second. pictures: steps of a lesson, pictures of a story.
    """
    around = Around()
    single = len(wanted) == 1 and wanted[0].count == 1
    talked = single and d.chance(0.12)                          # "I love houses. Draw a pink one."
    alone = len(wanted) == 1 and not company
    x = both(d, [worded(d, one, around, alone, "one" if talked else one.subject) for one in wanted], relation)
    y = noun_phrase(company.subject, company.colour) if company else None
    met = y and not talked and d.chance(0.35)                   # a frame of its own for two
    if y and not met:
        x += way(d, "company", y=y)

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

    if met:
        text = way(d, "story_met", x=x, y=y)
    elif talked:
        form = kind if kind in ("lesson", "story") else "one"
        text = way(d, f"talked_{form}", xs=plural(wanted[0].subject), one=x)
    else:
        text = framed(d, kind, x, bare=single)
    for tail in around.after:
        text = joined(text, tail)
    if d.chance(0.12):
        text = joined(text, d.pick(GRAMMAR_WAYS["closing"]))
    if around.before:
        text = around.before + lowered(text, around.before)

    # Many tell first, or last, for whom it is and how they are.
    if d.chance(0.12):
        text = f"{d.pick(GRAMMAR_WAYS['chatter_before'])} {capital(text)}"
    if d.chance(0.08):
        text = f"{text if text[-1] in '.?!' else text + '.'} {capital(d.pick(GRAMMAR_WAYS['chatter_after']))}"
    return text, named(wanted, relation, page, pictures, company)


def both(d, things: list[str], relation: str | None) -> str:
    """One thing, or two with the words that join them: "a cat left of a cup" is also "a cup and to the left of it a cat"."""
    if len(things) == 1:
        return things[0]
    x, y = things
    if not relation:
        return way(d, "together", x=x, y=y) if d.chance(0.4) else f"{x} and {y}"
    how = d.rng.random()
    if how < 0.25:
        return way(d, "beside", x=y, y=x, r=d.rng.choice(RELATION_WORDS[relation]))
    r = d.rng.choice(RELATION_WORDS[relation])
    return way(d, "stands", x=x, y=y, r=r) if how < 0.5 else f"{x} {r} {y}"


def framed(d, kind: str, x: str, bare: bool) -> str:
    """The sentence about a thing. bare: it is a single one, whose article may be left out."""
    form = d.rng.choices(list(FRAMES), list(FRAMES.values()))[0]
    kind = kind if kind in ("lesson", "story") else "one"
    if form == "whole":
        return d.pick(ASK[kind]).format(x=x)
    if form == "fragment":
        if bare and kind != "story" and d.chance(0.25):
            return d.pick(GRAMMAR_WAYS[f"{kind}_bare"]).format(bare=x.split(" ", 1)[1])
        return d.pick(GRAMMAR_WAYS[f"{kind}_frame"]).format(x=x)

    text = d.pick(GRAMMAR_WAYS[f"{kind}_verb"]).format(x=x)
    if d.chance(0.5):
        text = f"{d.pick(GRAMMAR_WAYS['opening'])} {text}"
    return text + ("?" if text.startswith(("can ", "could ", "would ", "will ")) and d.chance(0.7) else ".")


def capital(text: str) -> str:
    return text[0].upper() + text[1:]


def joined(text: str, tail: str) -> str:
    """A request and what is said behind it: a clause takes the place of its full stop, a sentence comes after it."""
    if tail.startswith(". "):
        return f"{text if text[-1] in '.?!' else text + '.'} {capital(tail[2:])}"
    end = text[-1] if text[-1] in ".?!" else ""
    return text.rstrip(".?!") + tail + ("" if tail[-1] in ".?!" else end)


def lowered(text: str, before: str) -> str:
    """A request behind "with a blue door: " begins small, unless with "I" or after a full stop."""
    if before.rstrip().endswith((".", "!", "?")):
        return capital(text)
    return text if text.startswith(("I ", "I'")) else text[0].lower() + text[1:]


def worded(d, one: Wanted, around: Around, alone: bool, word: str) -> str:
    """A thing with what stands behind its noun, `word`; what is said elsewhere goes to `around`, if the thing is alone."""
    x = noun(d, one, around, alone, word)
    parts = list(one.parts.items())
    d.rng.shuffle(parts)

    # Two parts of one colour have ways of their own.
    pairs = [(p, q, c) for k, (p, c) in enumerate(parts) for q, other in parts[k + 1:] if c == other]
    if pairs and d.chance(0.7):
        p, q, c = pairs[0]
        parts = [part for part in parts if part[0] not in (p, q)]
        if alone and d.chance(0.5):
            around.after.append(way(d, "tail_alike", p=p, q=q, c=c))
        else:
            x += way(d, "attach_alike", p=p, q=q, c=c)
    if not parts:
        return x

    # All of them in one phrase, behind the noun or before everything; or one by one, the first at the noun.
    phrases = listed(d, parts)
    how = d.rng.random()
    if how < 0.4:
        return x + way(d, "attach_all", parts=phrases)
    if how < 0.48 and alone and word != "one":
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


def listed(d, parts: list[tuple[str, str]]) -> str:
    """'a blue door and black wheels', or as in notes: 'door blue, black wheels'."""
    if d.chance(0.75):
        return listing([part_phrase(name, colour) for name, colour in parts])
    first = d.chance(0.5)
    said = [f"{colour} {name}" if first else f"{name} {colour}" for name, colour in parts]
    return listing(said) if d.chance(0.4) else d.rng.choice((", ", ", ", " ", " and ")).join(said)


def noun(d, one: Wanted, around: Around, alone: bool, word: str) -> str:
    """The thing itself, its number and its colour."""
    if one.count > 1:
        painted, colour = "", f"{one.colour} " if one.colour else ""
        if one.colour and d.chance(0.2):
            painted, colour = way(d, "paint_all", c=one.colour), ""
        elif one.colour and alone and d.chance(0.15):
            around.after.append(way(d, "paint_all_tail", c=one.colour))
            colour = ""
        xs = colour + plural(one.subject)
        if one.count == 2 and d.chance(0.4):
            return way(d, "pair", xs=xs) + painted
        if d.chance(0.5):
            return way(d, "several", xs=xs, n=NUMBERS[one.count], d=one.count) + painted
        return f"{NUMBERS[one.count]} {xs}{painted}"
    plain = word if word == "one" else a(word)
    if one.colour and d.chance(0.2):
        # "A cat and a dog, and it's red": which of them? Where there are two, the colour stands at its noun.
        ways = GRAMMAR_WAYS["paint"] if alone else [w for w in GRAMMAR_WAYS["paint"] if not w.lstrip("~").startswith(",")]
        return plain + d.pick(ways, "attached").format(c=one.colour)
    if one.colour and alone and d.chance(0.12):
        around.after.append(way(d, "paint_tail", c=one.colour))
        return plain
    return a(f"{one.colour} {word}") if one.colour else plain


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
