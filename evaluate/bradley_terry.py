"""Which system is better, from verdicts on pairs of answers: ratings with intervals, wins, ties and losses.

An outcome is what a judge or a voter said of two systems' answers to one request: the first is better (1), worse (0), or both
are equal (0.5, half a win for each). Ratings are those of Bradley and Terry (1952): strengths s with

    P(i is better than j) = 1 / (1 + 10 ^ ((s_j - s_i) / 400)),

as likely as can be, by choix (I-LSR, Maystre and Grossglauser 2015), on the scale of Elo: 400 points are odds of ten to one.
Only differences mean something, so the mean of all systems is put at 1000. Every two systems get one tie that nobody has given
(PRIOR), without which a system that never loses would have no finite rating. Intervals are those of the bootstrap over
requests: with a request all that was said about it is drawn, by every voter and about every pair.
"""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np

from checkpoint import InputError

MEAN = 1000.0
SCALE = 400 / math.log(10)  # Elo's points for a factor e in the odds
PRIOR = 0.5  # of a win, for each of any two systems against the other


class Outcome(NamedTuple):
    """share: of a, 1, 0.5 or 0."""

    item: str
    a: str
    b: str
    share: float


class Ranked(NamedTuple):
    """A system's place. low and high: of the rating; NaN where no interval can be had."""

    system: str
    rating: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


class Met(NamedTuple):
    """Two systems. share: of a, ties being half; p: how likely so uneven a result is if both were equal, by the sign test."""

    a: str
    b: str
    wins: int
    ties: int
    losses: int
    share: float
    low: float
    high: float
    p: float


def ratings(wins: np.ndarray) -> np.ndarray:
    """wins: (systems, systems), how often row was better than column, ties as halves. -> (systems,), their mean is MEAN."""
    try:
        from choix import ilsr_pairwise_dense
    except ImportError as e:
        raise InputError(f"{e.name} is missing: python -m pip install -r evaluate/requirements.txt") from None

    prior = PRIOR * (1 - np.eye(len(wins)))
    strengths = ilsr_pairwise_dense(wins + prior, max_iter=10_000)
    return MEAN + SCALE * (strengths - strengths.mean())


def by_item(systems: list[str], outcomes: list[Outcome]) -> np.ndarray:
    """(items, systems, systems): how often row was better than column in what was said about each item."""
    place = {name: k for k, name in enumerate(systems)}
    items = {item: k for k, item in enumerate(dict.fromkeys(o.item for o in outcomes))}
    wins = np.zeros((len(items), len(systems), len(systems)))
    for o in outcomes:
        wins[items[o.item], place[o.a], place[o.b]] += o.share
        wins[items[o.item], place[o.b], place[o.a]] += 1 - o.share
    return wins


def drawn_again(wins: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """(draws, systems, systems): the sums over as many items, drawn with repetition."""
    chance = np.random.default_rng(seed)
    times = chance.multinomial(len(wins), np.full(len(wins), 1 / len(wins)), size=draws)   # (draws, items)
    return np.einsum("di,iab->dab", times, wins)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The middle 95 percent; NaN where all draws are the same, for then they do not show how far chance reaches."""
    if not len(values) or np.ptp(values) < 1e-6:
        return math.nan, math.nan
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def rank(systems: list[str], outcomes: list[Outcome], draws: int, seed: int) -> list[Ranked]:
    """The best first; none where nothing was said."""
    if not outcomes:
        return []
    wins = by_item(systems, outcomes)
    rated = ratings(wins.sum(0))
    again = np.array([ratings(sums) for sums in drawn_again(wins, draws, seed)])            # (draws, systems)
    found = []
    for k, name in enumerate(systems):
        shares = [o.share if o.a == name else 1 - o.share for o in outcomes if name in (o.a, o.b)]
        count = Counter(shares)
        found.append(Ranked(name, float(rated[k]), *interval(again[:, k]), count[1], count[0.5], count[0]))
    return sorted(found, key=lambda ranked: -ranked.rating)


def meet(a: str, b: str, outcomes: list[Outcome], draws: int, seed: int) -> Met:
    from scipy.stats import binomtest

    mine = [o for o in outcomes if (o.a, o.b) == (a, b)]
    count = Counter(o.share for o in mine)
    decided = count[1] + count[0]
    p = binomtest(count[1], decided).pvalue if decided else math.nan
    share = sum(o.share for o in mine) / len(mine)
    again = drawn_again(by_item([a, b], mine), draws, seed)
    shares = again[:, 0, 1] / (again[:, 0, 1] + again[:, 1, 0])
    return Met(a, b, count[1], count[0.5], count[0], share, *interval(shares), float(p))
