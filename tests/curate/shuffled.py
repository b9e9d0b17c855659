"""What `Reorder` mends and what it spoils, on real pages whose pictures were shuffled on purpose and on the pages as they are.

    python tests/curate/shuffled.py ../shared/data                 a scripted model with known error rates
    python tests/curate/shuffled.py ../shared/data --self CALLS    also the bundled miniature, on the shortest pages

The truth is the order in which a page was published. A scripted model knows it, and errs: each picture changes places with the
next one at the error rate, in every pass anew. A stubborn model errs in the same way in every pass, so that passes agree.
"""

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import realpages
from tqdm import tqdm

from curate.models import Model
from curate.page import Page, Picture
from curate.reorder import Measured, Order, Placer, Reorder, Stay, arranged, layout

FEW = 30  # of the shortest pages, on which this project's own model is measured
RATES = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5)
OPEN = {"agree": 1, "agree_on_two": 1, "passes": 1, "furthest": 10**9}  # without the guard, but for the numbered pictures
TWO = {"agree": 2, "agree_on_two": 2, "passes": 2}


def named(page: Page) -> Page:
    """Each picture with a name of its own, by which a script knows its place: some pages show one file twice."""
    number = iter(range(len(page.parts)))
    parts = tuple(replace(p, caption=f"{next(number)}") if isinstance(p, Picture) else p for p in page.parts)
    return replace(page, parts=parts)


@dataclass(frozen=True)
class Scripted:
    """A Placer that knows a page's true order, and errs at a known rate."""

    truth: Order
    errors: float  # how often a picture changes places with the next one
    stubborn: str = ""  # the seed of errors that are the same in every pass; empty: they are not

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        chance = random.Random(self.stubborn) if self.stubborn else turn
        numbers = [number for number, _ in self.truth]
        for k in range(len(numbers) - 1):
            if chance.random() < self.errors:
                numbers[k], numbers[k + 1] = numbers[k + 1], numbers[k]
        shown = {int(picture.caption): k for k, picture in enumerate(pictures)}
        return tuple((shown[number], place) for number, (_, place) in zip(numbers, self.truth, strict=True))


@dataclass(frozen=True)
class Counted:
    """A placer, and how often it was asked."""

    placer: Placer
    asked: list[int]

    def place(self, blocks: list[str], pictures: list[Picture], turn: random.Random) -> Order | str:
        self.asked.append(len(pictures))
        return self.placer.place(blocks, pictures, turn)


def swapped(page: Page, seed: int) -> Page:
    """Two neighbouring pictures have changed places."""
    order = layout(page).order
    k = random.Random(f"{seed} {page.id}").randrange(len(order) - 1)
    numbers = list(range(len(order)))
    numbers[k], numbers[k + 1] = numbers[k + 1], numbers[k]
    return permuted(page, numbers)


def mixed(page: Page, seed: int) -> Page:
    """All pictures in random order."""
    chance = random.Random(f"{seed} {page.id}")
    numbers = list(range(len(page.pictures)))
    while numbers == sorted(numbers):
        chance.shuffle(numbers)
    return permuted(page, numbers)


def permuted(page: Page, numbers: list[int]) -> Page:
    places = [place for _, place in layout(page).order]
    return arranged(page, tuple(zip(numbers, places, strict=True)))


def misplaced(page: Page, truth: Page) -> int:
    """Pictures that do not stand where they stand in truth: the same place, the same number of pictures before them."""
    here = placed(page)
    there = placed(truth)
    return sum(here[name] != place for name, place in there.items())


def placed(page: Page) -> dict[str, tuple[int, int]]:
    pictures = page.pictures
    return {pictures[number].caption: (k, place) for k, (number, place) in enumerate(layout(page).order)}


class Row(NamedTuple):
    """Of one placer over all pages."""

    mended: float  # share of pages with two swapped neighbours that are exactly right again
    restored: float  # the same of pages in random order
    worse: float  # share of all shuffled pages that have more misplaced pictures than before
    harmed: float  # share of right pages made wrong
    asked: float  # passes that a right page took


def measure(pages: list[Page], placer: Callable[[Page], Placer], seed: int = 0, **settings) -> Row:
    """placer: the one for a page in truth."""
    counts = dict.fromkeys(Row._fields, 0)
    for truth in tqdm(pages, unit="page", disable=None, leave=False):
        counted = Counted(placer(truth), [])
        step = Reorder(counted, seed=seed, **settings)
        counts["harmed"] += misplaced(step(truth), truth) > 0
        counts["asked"] += len(counted.asked)
        for name, shuffled in (("mended", swapped(truth, seed)), ("restored", mixed(truth, seed))):
            after = misplaced(step(shuffled), truth)
            counts[name] += after == 0
            counts["worse"] += after > misplaced(shuffled, truth)
    n = len(pages)
    worse = counts["worse"] / (2 * n)
    return Row(counts["mended"] / n, counts["restored"] / n, worse, counts["harmed"] / n, counts["asked"] / n)


def scripted(errors: float, stubborn: bool = False) -> Callable[[Page], Placer]:
    return lambda page: Scripted(layout(page).order, errors, f"stubborn {page.id}" if stubborn else "")


def several(pages: list[Page]) -> list[Page]:
    """The pages on which Reorder can act: two to twenty pictures."""
    return [named(page) for page in pages if 2 <= len(page.pictures) <= Reorder().most]


def told(name: str, row: Row) -> str:
    cells = (f"{100 * value:5.1f} %" for value in row[:4])
    return f"| {name:34} | {' | '.join(cells)} | {row.asked:.2f} |"


def main(argv: list[str]) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("shared", type=Path, help="the folder of real data")
    p.add_argument("--self", dest="calls", help="also measure the bundled miniature; answers are kept in this folder")
    p.add_argument("--n", type=int, help="only the first so many pages")
    args = p.parse_args(argv)
    pages = several(realpages.read(args.shared))[: args.n]
    print(f"{len(pages)} pages of 2 to {Reorder().most} pictures")
    print(f"| {'model':34} | swap mended | all restored | shuffled made worse | right made wrong | passes |")
    print("|---|---|---|---|---|---|")
    print(told("none", measure(pages, lambda page: Stay())), flush=True)
    for errors in RATES:
        print(told(f"{errors:.0%} errors, no guard", measure(pages, scripted(errors), **OPEN)))
        print(told(f"{errors:.0%} errors, 2 of 2 agree", measure(pages, scripted(errors), **TWO)))
        print(told(f"{errors:.0%} errors, guard", measure(pages, scripted(errors))))
    print(told("10% stubborn errors, no guard", measure(pages, scripted(0.1, True), **OPEN)))
    print(told("10% stubborn errors, guard", measure(pages, scripted(0.1, True))))
    if args.calls:
        model = Model("self", calls=args.calls)
        # It reads a page once for every picture and pass: on a CPU minutes for a long one.
        few = sorted(pages, key=lambda page: len(page.pictures) * len(layout(page).blocks))[:FEW]
        print(told(f"self, no guard, {len(few)} pages", measure(few, lambda page: Measured(model), **OPEN)), flush=True)
        print(told(f"self, guard, {len(few)} pages", measure(few, lambda page: Measured(model))))


if __name__ == "__main__":
    main(sys.argv[1:])
