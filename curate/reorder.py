"""Each picture after the text that it shows: a model says where pictures belong, and a guard decides whether it is believed.

    Reorder(Asked(model))           a server's model places all pictures in one answer
    Reorder(Measured(model))        this project's MLLM: the likeliest place of each picture
    Reorder()                       the order stays

The pictures of most pages stand right already, and models that order pictures make mistakes on every third page or more
(COHERENCE, Qwen3-VL-8B to Qwen3.5-397B: 30 to 70 % of pages in exact order), most of them swaps of neighbours. So a new order
counts only if several passes over differently shuffled pictures give the same and none finds the page right as it is, if no
picture moves far, and if pictures that are numbered in their addresses stay in the order of their numbers. The first pass that
finds the page right ends the asking: mostly one is enough. What the guard saves and costs: `python tests/curate/shuffled.py`.
"""

import math
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import ClassVar, NamedTuple, Protocol
from urllib.parse import urlsplit

from curate.models import Model, asking, at_once, parsed, prompt
from curate.page import Dropped, Page, Part, Picture, joined
from curate.text import LIST_ITEM, noted
from evaluate.judges import Unanswered

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LONGEST = 300  # characters of a piece that a model is shown

# Where the pictures of a page stand: (number of the picture, pieces of text before it), in reading order.
Order = tuple[tuple[int, int], ...]


# ------------------------------------------------------------------------------------------------------------------ layout


def blocks_of(text: str) -> list[str]:
    """A text in pieces between which a picture may stand: paragraphs and items of lists. Together they are the text.

    Code is not cut.
    """
    blocks: list[list[str]] = [[]]
    code = False
    for line in text.splitlines(keepends=True):
        blank = not line.strip()
        begins = LIST_ITEM.match(line) or (blocks[-1] and not blocks[-1][-1].strip())
        if begins and not code and not blank and any(map(str.strip, blocks[-1])):
            blocks.append([])
        blocks[-1].append(line)
        if line.lstrip().startswith(("```", "~~~")):
            code = not code
    return ["".join(lines) for lines in blocks if lines]


class Layout(NamedTuple):
    """A page as pieces of text and places of pictures."""

    blocks: list[str]
    order: Order


def layout(page: Page) -> Layout:
    blocks: list[str] = []
    order = []
    for part in page.parts:
        if isinstance(part, Picture):
            order.append((len(order), len(blocks)))
            continue
        blocks += blocks_of(part)
        # Should the picture behind it go, the next text begins a paragraph.
        blocks[-1] = f"{blocks[-1].rstrip()}\n\n"
    return Layout(blocks, tuple(order))


def arranged(page: Page, order: Order) -> Page:
    """The page with its pictures in another order and in other places."""
    blocks = layout(page).blocks
    pictures = page.pictures
    parts: list[Part] = []
    done = 0
    for number, place in order:
        parts += ["".join(blocks[done:place]), pictures[number]]
        done = place
    parts.append("".join(blocks[done:]))
    return replace(page, parts=joined(parts))


def in_sequence(pictures: Sequence[Picture]) -> bool:
    """Whether pictures whose addresses differ in one number alone stand in its order, as step-1.jpg and step-2.jpg do."""
    last: dict[str, int] = {}
    for picture in pictures:
        name = PurePosixPath(urlsplit(picture.address).path).stem
        numbers = re.findall(r"\d+", name)
        if not numbers or len(numbers[-1]) > 3:  # longer ones are dates and counters of cameras
            continue
        number = int(numbers[-1])
        series = re.sub(r"\d+(?=\D*$)", "#", name)
        if number < last.get(series, 0):
            return False
        last[series] = number
    return True


# ----------------------------------------------------------------------------------------------------------------- placers


class Placer(Protocol):
    """Says where pictures belong."""

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        """Pictures are numbered as they are given; turn: chance of this pass. A str is the reason why there is no order."""


@dataclass(frozen=True)
class Stay:
    """The placer where there is no model: Reorder then leaves every page as it is."""

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        return "no model"


def shown(blocks: list[str]) -> str:
    """Numbered pieces, as a prompt has them."""
    short = (" ".join(block.split())[:LONGEST] for block in blocks)
    return "\n".join(f"{number}. {block}" for number, block in enumerate(short, 1))


def lettered(pictures: list[Picture], letters: list[str]) -> list[str | Picture]:
    parts: list[str | Picture] = []
    for letter, picture in zip(letters, pictures, strict=True):
        parts += [f"Picture {letter}:", picture]
    return parts


@dataclass(frozen=True)
class Asked:
    """A model that writes down the places of all pictures at once."""

    model: Model
    prompt: ClassVar[str] = "reorder"

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        letters = turn.sample(LETTERS, len(pictures))
        words = prompt(self.prompt, count=str(len(pictures)), pieces=shown(blocks))
        try:
            answer = self.model.write([words, *lettered(pictures, letters)], max_tokens=512)
        except Unanswered as e:
            return f"unanswered: {e}"
        return read_places(answer, letters, len(blocks)) or "unreadable"


def read_places(answer: str, letters: list[str], blocks: int) -> Order | None:
    """The order in a model's words; None unless every picture is there once, in rising places that exist."""
    value = parsed(answer)
    places = value.get("places") if isinstance(value, dict) else None
    if not isinstance(places, list):
        return None
    order = []
    for entry in places:
        match entry:
            case [str(letter), int(place)] if letter in letters and type(place) is int and 0 <= place <= blocks:
                order.append((letters.index(letter), place))
            case _:
                return None
    numbers = sorted(number for number, _ in order)
    rising = sorted(place for _, place in order)
    if numbers != list(range(len(letters))) or rising != [place for _, place in order]:
        return None
    return tuple(order)


@dataclass(frozen=True)
class Measured:
    """This project's MLLM, which measures how likely each place is; pictures of one place stay in the order given."""

    model: Model
    prompt: ClassVar[str] = "place"

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        letters = turn.sample(LETTERS, len(pictures))
        count = str(len(pictures))
        behind = lettered(pictures, letters)
        questions = []
        for letter in letters:
            questions.append([prompt(self.prompt, count=count, letter=letter, pieces=shown(blocks)), *behind])
        answers = self.model.choose(questions, [str(place) for place in range(len(blocks) + 1)])
        for answer in answers:
            if isinstance(answer, Unanswered):
                return f"unanswered: {answer}"
        placed = ((number, int(answer)) for number, answer in enumerate(answers))
        return tuple(sorted(placed, key=lambda each: each[1]))


# -------------------------------------------------------------------------------------------------------------------- step


@dataclass(frozen=True)
class Reorder:
    """Moves pictures to where a placer wants them, if the guard agrees; nothing is dropped. Notes tell what came of it."""

    placer: Placer = Stay()
    # Own choices: the fewest passes with which 99 of 100 right pages stay right, however often the model errs (up to half
    # of all neighbours changed).
    agree: int = 5  # passes that must give the same order
    agree_on_two: int = 6  # the same on a page of two pictures, which have but one other order to agree on by chance
    passes: int = 8  # at most
    furthest: int = 40  # pieces of text that a picture may pass; own choice
    most: int = 20  # pictures; a page with more is left as it is, as models lose count; own choice
    seed: int = 0  # of the shuffles

    @property
    def at_once(self) -> int:
        return 1 if isinstance(self.placer, Stay) else at_once(self.placer.model)

    def manifest(self) -> dict:
        name = type(self.placer).__name__
        if isinstance(self.placer, Stay):
            return {"placer": {"name": name}}
        return {"placer": {"name": name, **asking(self.placer.model, self.placer.prompt)}}

    def __call__(self, page: Page) -> Page | Dropped:
        pictures = page.pictures
        # With one picture nothing can be shuffled, so no second pass could contradict the first.
        if isinstance(self.placer, Stay) or not 2 <= len(pictures) <= self.most:
            return page
        blocks, now = layout(page)
        needed = self.agree_on_two if len(pictures) == 2 else self.agree
        given: Counter[Order] = Counter()
        for turn, shuffle in enumerate(self.shuffles(page.id, len(pictures)), 1):
            order = self.once(blocks, pictures, shuffle, f"{self.seed} {page.id} {turn}")
            if isinstance(order, str):
                return noted(page, self, order)
            if order == now:
                return noted(page, self, "stays")
            given[order] += 1
            wanted, times = given.most_common(1)[0]
            if times == needed:
                break
            if times + self.passes - turn < needed:
                return noted(page, self, "passes differ")
        objection = self.objection(page, wanted)
        if objection:
            return noted(page, self, f"refused: {objection}")
        note = {"was": [list(each) for each in now], "is": [list(each) for each in wanted]}
        return noted(arranged(page, wanted), self, note)

    def shuffles(self, id: str, count: int) -> list[tuple[int, ...]]:
        """An order in which the pictures are shown for each pass, different ones as long as there are any."""
        chance = random.Random(f"{self.seed} {id}")
        found: list[tuple[int, ...]] = []
        for _ in range(self.passes):
            for _ in range(10):
                order = tuple(chance.sample(range(count), count))
                if order not in found[-math.factorial(count) + 1 :]:
                    break
            found.append(order)
        return found

    def once(self, blocks: list[str], pictures: list[Picture], shuffle: tuple[int, ...], seed: str) -> Order | str:
        given = [pictures[number] for number in shuffle]
        order = self.placer.place(blocks, given, random.Random(seed))
        if isinstance(order, str):
            return order
        # The placer has numbered them as they were shown to it.
        return tuple((shuffle[number], place) for number, place in order)

    def objection(self, page: Page, wanted: Order) -> str:
        """What speaks against an order on which all passes agree; empty: nothing."""
        was = dict(layout(page).order)
        far = max(abs(place - was[number]) for number, place in wanted)
        if far > self.furthest:
            return f"a picture would pass {far} pieces of text"
        pictures = page.pictures
        if in_sequence(pictures) and not in_sequence([pictures[number] for number, _ in wanted]):
            return "numbered pictures would leave their order"
        return ""
