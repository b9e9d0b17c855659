"""The report of a comparison: what every judge and all people found of two or more systems, as tables, JSON and a page.

`python -m evaluate report --out runs/p` comes here when runs/p holds systems side by side (contest.py). Ratings, intervals and
the like are bradley_terry.py's. Where people have voted, each judge is held against them: how often both said the same.
"""

import json
import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from checkpoint import InputError, read_json
from evaluate.answers import address
from evaluate.benchmark import JUDGED, MISSING, REFUSED, UNPARSABLE, Request, content_of
from evaluate.bradley_terry import MEAN, Met, Outcome, Ranked, meet, rank
from evaluate.contest import BOTH, FIRST, IN_ORDER, SECOND, TURNED, Contest, pair_name, read_votes, reopen
from evaluate.pairs import prompt_hash
from evaluate.tables import Table, markdown
from pages.answer import harmless_json, write_text
from pages.template import render

# A judge that answers by probabilities never finds two answers exactly equal: of a scale from -1 to 1, so little is a tie.
MARGIN = 0.1
WHYS = (JUDGED, REFUSED, UNPARSABLE, MISSING)
PEOPLE = "people"


@dataclass
class Jury:
    """A judge, or all people together."""

    name: str
    outcomes: list[Outcome] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    counts: dict[str, Counter] = field(default_factory=dict)  # of a judge's questions, by pair: how each came about
    words: dict[str, list[dict]] = field(default_factory=dict)  # what was said, by item, for the page


def report(out: Path, draws: int, seed: int) -> None:
    contest = reopen(out)
    juries = [jury for folder in sorted((out / "judged").glob("*/")) if (jury := judge_of(folder, contest))]
    people = people_of(contest)
    if people:
        juries.append(people)
    if not juries:
        raise InputError(f"{out}: nothing is compared there: `python -m evaluate pairs` does it, or people by `vote`")

    tables = []
    results = []
    for jury in juries:
        ranked = rank(list(contest.systems), jury.outcomes, draws, seed)
        there = {(outcome.a, outcome.b) for outcome in jury.outcomes}
        met = [meet(a, b, jury.outcomes, draws, seed) for a, b in contest.pairs if (a, b) in there]
        tables += tables_of(jury, ranked, met)
        counts = {pair: {why: count[why] for why in WHYS} for pair, count in jury.counts.items()}
        about = {"judge": jury.name, "notes": dict(jury.notes), "counts": counts}
        results.append(about | {"ratings": [plain(r) for r in ranked], "pairs": [plain(m) for m in met]})
    if people and len(juries) > 1:
        tables.append(beside_people(people, juries[:-1]))

    notes = [(name, str(answers.place)) for name, answers in contest.systems.items()]
    notes.append(("items", f"{len(contest.requests)} of {contest.module.NAME}"))
    notes.append(("bootstrap", f"{draws} draws, seed {seed}"))
    about = {"benchmark": contest.module.NAME, "title": contest.module.TITLE, "source": contest.module.SOURCE}
    about |= {"items": len(contest.requests), "systems": {n: str(a.place) for n, a in contest.systems.items()}}
    write_text(out / "report.json", harmless_json(about | {"seeds": {"bootstrap": seed, "draws": draws}, "juries": results}))
    title = f"{', '.join(contest.systems)}: {contest.module.TITLE}"
    text = f"# {title}\n\n" + "\n\n".join([*map(markdown, tables), "\n".join(f"* {k}: {v}" for k, v in notes)]) + "\n"
    write_text(out / "report.md", text)
    cards = [card(request, contest, juries) for request in contest.requests]
    cards.sort(key=lambda c: c["goodness"])
    notes.append(("report of", time.strftime("%Y-%m-%d", time.gmtime())))
    first = next(iter(contest.systems))
    orders = (f"{first} worst first", f"{first} best first")
    page = render("benchmark.html", title=title, tables=tables, facts=notes, cards=cards, orders=orders)
    write_text(out / "report.html", page)
    print(text, end="")
    print(out / "report.html")


def plain(row: NamedTuple) -> dict:
    """For JSON, which has no NaN."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row._asdict().items()}


# ------------------------------------------------------------------------------------------------------------------ juries


def share_of(row: dict) -> float | None:
    """What a judge's two answers come to, of the pair's first system; None unless both could be read.

    What speaks for a place, and not for a system, is in both answers and drops out of their difference.
    """
    in_order, turned = (row["scores"][order]["value"] for order in (IN_ORDER, TURNED))
    if in_order is None or turned is None:
        return None
    lean = (turned - in_order) / (SECOND - FIRST)
    if abs(lean) <= MARGIN:
        return 0.5
    return 1.0 if lean > 0 else 0.0


def judge_of(folder: Path, contest: Contest) -> Jury | None:
    """What a judge has found; None where it has found nothing yet."""
    about = read_json(folder / "judge.json")
    jury = Jury(about["judge"], notes=[("judge", f"{about['judge']}, {about['date']}, prompts {about['prompts']}")])
    if about["prompts"] != prompt_hash():
        jury.notes.append(("note", "the prompts have changed since"))
    places = []
    for a, b in contest.pairs:
        for request in contest.requests:
            file = folder / pair_name(a, b) / f"{request.id}.json"
            if file.is_file():
                places += hear(jury, read_json(file), a, b)
    if places:
        share = percent(sum(places) / len(places))
        jury.notes.append(("order", f"{share} of its liking went to the answer that it saw first; without a bias it is 50%"))
    return jury if jury.counts else None


def hear(jury: Jury, row: dict, a: str, b: str) -> list[float]:
    """Take in what was said of one pair of answers. -> for each question how far the first was preferred, from 0 to 1."""
    share = share_of(row)
    if share is not None:
        jury.outcomes.append(Outcome(row["id"], a, b, share))
    places = []
    for order, score in row["scores"].items():
        jury.counts.setdefault(pair_name(a, b), Counter())[score["why"]] += 1
        if score["why"] == JUDGED:
            places.append((SECOND - score["value"]) / (SECOND - FIRST))
        shown = (a, b) if order == IN_ORDER else (b, a)
        title = f"{jury.name}, {' or '.join(shown)}:"
        said = {"judge": jury.name, "name": title, "value": in_words(score["value"], *shown)}
        jury.words.setdefault(row["id"], []).append(said | {"why": score["why"], "words": score["words"]})
    return places


def in_words(value: float | None, first: str, second: str) -> str:
    """A judge's number between two names."""
    if value is None:
        return "-"
    nearest = {FIRST: f"{first} is better", BOTH: "equal", SECOND: f"{second} is better"}[round(value)]
    return nearest if value == round(value) else f"{nearest} ({value:.2f} from {FIRST} to {SECOND})"


def people_of(contest: Contest) -> Jury | None:
    """What all voters have found; None where nobody has voted on what this contest has."""
    pairs = set(contest.pairs)
    ids = {request.id for request in contest.requests}
    votes = [vote for vote in read_votes(contest.out / "votes.jsonl") if (vote.a, vote.b) in pairs and vote.item in ids]
    if not votes:
        return None
    voters = len({vote.voter for vote in votes})
    jury = Jury(PEOPLE, notes=[("votes", f"{len(votes)} by {voters} voters, blind, sides drawn by chance")])
    lefts = []
    said: dict[tuple[str, str, str], Counter] = {}
    for vote in votes:
        share = 0.5
        words = "equal"
        if vote.better is not None:
            share = 1.0 if vote.better == vote.a else 0.0
            words = f"{vote.better} is better"
            lefts.append(vote.better == vote.left)
        jury.outcomes.append(Outcome(vote.item, vote.a, vote.b, share))
        said.setdefault(vote.about, Counter())[words] += 1
    for (item, a, b), count in said.items():
        value = ", ".join(f"{words}: {n}" for words, n in count.items())
        line = {"judge": PEOPLE, "name": f"{PEOPLE}, {a} or {b}:", "value": value, "why": JUDGED, "words": ""}
        jury.words.setdefault(item, []).append(line)
    if lefts:
        share = percent(sum(lefts) / len(lefts))
        jury.notes.append(("order", f"{share} of the votes for one of the two went to the left one; without a bias it is 50%"))
    return jury


def beside_people(people: Jury, judges: list[Jury]) -> Table:
    """Of the pairs of answers on which both people and a judge have spoken."""
    theirs = merged(people.outcomes)
    rows = []
    for judge in judges:
        count = Counter()
        for about, share in merged(judge.outcomes).items():
            if about not in theirs:
                continue
            # Above a half for the first system, below for the second.
            one = share - 0.5
            other = theirs[about] - 0.5
            if one * other > 0 or one == other == 0:
                count["same"] += 1
            elif one * other < 0:
                count["opposite"] += 1
            else:
                count["one equal"] += 1
        rows.append([judge.name, str(count.total()), *(str(count[kind]) for kind in ("same", "one equal", "opposite"))])
    notes = [("one equal", "one of the two finds both answers equal"), ("people", "the majority of the votes on a pair")]
    return Table("Judges beside people", ["judge", "pairs by both", "same", "one equal", "opposite"], rows, notes)


def merged(outcomes: list[Outcome]) -> dict[tuple[str, str, str], float]:
    """{(item, a, b): the mean of all that was said}."""
    shares: dict[tuple[str, str, str], list[float]] = {}
    for outcome in outcomes:
        shares.setdefault((outcome.item, outcome.a, outcome.b), []).append(outcome.share)
    return {about: sum(values) / len(values) for about, values in shares.items()}


# ------------------------------------------------------------------------------------------------------------ tables, page


def tables_of(jury: Jury, ranked: list[Ranked], met: list[Met]) -> list[Table]:
    rows = []
    for r in ranked:
        rows.append([r.system, whole(r.rating), span(r.low, r.high, whole), str(r.wins), str(r.ties), str(r.losses)])
    notes = [*jury.notes,
             ("rating", f"Bradley-Terry on Elo's scale: the systems' mean is {MEAN:.0f}, 400 points are odds of ten to one"),
             ("ties", "half a win for each"),
             ("95 %", "bootstrap over requests; - where all that was said agrees, or nothing was")]  # fmt: skip
    tables = [Table(f"By {jury.name}", ["system", "rating", "95 %", "wins", "ties", "losses"], rows, notes)]

    rows = []
    for m in met:
        counts = [str(m.wins), str(m.ties), str(m.losses)]
        rows.append([pair_name(m.a, m.b), *counts, percent(m.share), span(m.low, m.high, percent), likely(m.p)])
    notes = [("share", "of the first system, ties being half"),
             ("p", "how likely wins and losses are at least so uneven among equals (sign test, ties left out); that several "
                   "people's votes on one request go together it does not know")]  # fmt: skip
    head = ["pair", "wins", "ties", "losses", "share", "95 %", "p"]
    tables.append(Table(f"Pair by pair, by {jury.name}", head, rows, notes))

    if jury.counts:
        rows = [[pair, *(str(count[why]) for why in WHYS)] for pair, count in jury.counts.items()]
        notes = [("counted", "questions, two for each pair of answers; the pair counts if both answers could be read"),
                 (REFUSED, "the judge would not answer, or its filter stood before it"),
                 (UNPARSABLE, "no verdict can be read from its answer"),
                 (MISSING, "one answer was empty and lost, or both were: nothing was asked")]  # fmt: skip
        tables.append(Table(f"How the verdicts of {jury.name} came about", ["pair", *WHYS], rows, notes))
    return tables


def whole(value: float) -> str:
    return f"{value:.0f}"


def percent(value: float) -> str:
    return f"{value:.0%}"


def likely(p: float) -> str:
    """NaN where all is tied."""
    return "-" if math.isnan(p) else f"{p:.2g}"


def span(low: float, high: float, form: Callable[[float], str]) -> str:
    return "-" if math.isnan(low) else f"{form(low)} to {form(high)}"


def card(request: Request, contest: Contest, juries: list[Jury]) -> dict:
    """One request of the page: the answers of all systems, and what everybody said of them."""
    asked = []
    for message in request.messages:
        for part in content_of(message):
            asked.append(part["text"] if part["type"] == "text" else "[picture]")
    answers = []
    given = []
    for name, system in contest.systems.items():
        texts, pictures = [], []
        if system.has(request.id):
            texts, files = system.files(request.id)
            pictures = [address(file, contest.out) for file in files]
            given = given or [address(file, contest.out) for file in system.given(request.id)]
        answers.append({"name": name, "texts": texts, "pictures": pictures})
    scores = [said for jury in juries for said in jury.words.get(request.id, [])]
    first = next(iter(contest.systems))
    shares = [o.share for jury in juries for o in jury.outcomes if o.item == request.id and o.a == first]
    return {
        "id": request.id,
        "asked": " ".join(asked),
        "given": given,
        "answers": answers,
        "scores": scores,
        "whys": " ".join(sorted({said["why"] for said in scores})) if scores else "unjudged",
        "meta": json.dumps(request.meta, ensure_ascii=False),
        "goodness": sum(shares) / len(shares) if shares else -1.0,
    }
