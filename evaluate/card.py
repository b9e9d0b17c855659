"""The trust card of a judge: tables, JSON, and a page with its worst rankings.

What is in it comes from rankings.py and raters.py.
"""

import argparse
import math
import time
from collections import Counter
from pathlib import Path

from evaluate import raters
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE, Answer, Figure, Verdict
from evaluate.figures import WHYS, bootstrap, finite
from evaluate.judges import Asker
from evaluate.raters import COEFFICIENTS, Rated
from evaluate.rankings import AGAIN, CLEAN, EVEN, aggregate, by_pairs, by_scores, known, mean_scores
from evaluate.rubrics import asked
from evaluate.spoiled import SPOILINGS, Item
from evaluate.tables import Table, markdown
from pages.answer import harmless_json, write_text
from pages.template import render

WORST = 40  # rankings that the page shows


def shares(figure: Figure) -> str:
    """As the sketchbook's exam writes it: percent, interval, of how many."""
    if not figure.n:
        return "-"
    return f"{100 * figure.value:.0f}% {100 * figure.low:.0f}-{100 * figure.high:.0f} /{figure.n}"


def decimals(figure: Figure | None) -> str:
    if figure is None or not math.isfinite(figure.value):
        return "-"
    return f"{figure.value:.2f} {figure.low:.2f} to {figure.high:.2f} /{figure.n}"


def as_json(figures: dict[str, Figure]) -> dict[str, dict]:
    return {name: {key: finite(value) for key, value in figure._asdict().items()} for name, figure in figures.items()}


# ------------------------------------------------------------------------------------------------------------------ people


class People:
    """What people say of the pictures of GenAI-Bench, and how well one of them and the judge agree with it."""

    def __init__(self, rated: list[Rated], left_out: list[str], verdicts: dict[tuple, Verdict], args: argparse.Namespace):
        self.rated = rated
        self.left_out = left_out
        self.counts = Counter(verdict.why for verdict in verdicts.values())
        self.figures = {}
        if rated:
            rows = raters.by_raters(rated)
            self.figures["a rater"] = bootstrap(raters.agreement_of_raters, rows, args.draws, args.seed)
        values = {key: verdict.value for key, verdict in verdicts.items() if verdict.value is not None}
        if values:
            rows = raters.by_judge(rated, values)
            self.figures["judge"] = bootstrap(raters.agreement, rows, args.draws, args.seed)

    @property
    def pictures(self) -> int:
        """How many the judge has seen."""
        return sum(self.counts.values())

    def to_json(self) -> dict | None:
        if not self.rated:
            return None
        about = {"prompts": len(self.rated), "left out": self.left_out, "pictures": self.pictures}
        counts = {why: self.counts[why] for why in WHYS}
        return about | {"counts": counts, "figures": {who: as_json(figures) for who, figures in self.figures.items()}}

    def notes(self) -> list[tuple[str, str]]:
        """What there is, and what is not."""
        if not self.rated:
            return [("people", "no ratings by people were given (--human): whether the judge agrees with them is not known")]
        found = [("people", f"GenAI-Bench, {len(self.rated)} prompts, three ratings of each picture")]
        if self.left_out:
            found.append(("off the scale", f"pictures left out for a rating that cannot be: {'; '.join(self.left_out)}"))
        if self.pictures:
            of = sum(len(one.ratings) for one in self.rated)
            found.append(("their pictures", f"the judge has seen {self.pictures} of {of}"))
        else:
            found.append(("their pictures", "none were given (--pictures): whether the judge agrees with people is not known"))
        return found

    def table(self) -> Table:
        head = ["pictures", *(f"{who}, {name}" for who in self.figures for name in COEFFICIENTS)]
        rows = []
        for place in dict.fromkeys(name.rpartition(", ")[0] for name in self.figures["a rater"]):
            cells = [figures.get(f"{place}, {name}") for figures in self.figures.values() for name in COEFFICIENTS]
            rows.append([place, *map(decimals, cells)])
        notes = [("a rater", "one of three people against the mean of the other two: about what one can hope for")]
        caption = "How people agree with one another"
        if "judge" in self.figures:
            notes.append(("judge", "against the mean of the three"))
            caption = "Agreement with people"
        notes += [
            ("within prompts", "over the pictures of one prompt; the mean of all prompts on whose pictures people differ"),
            ("a cell", "rank correlation, 95 % interval by bootstrap over prompts, /of how many pictures, models or prompts"),
        ]
        return Table(caption, head, rows, notes)


# -------------------------------------------------------------------------------------------------------------------- card


class Card:
    """All that was found of one judge. about: who it is, by "judge", "identity" and "prompts"."""

    def __init__(self, about: dict, rows: list[dict], people: People, judge: Asker, args: argparse.Namespace):
        self.about = about | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
        others = judge.tally.models - {about["judge"], ""}
        if others:
            self.about["answered as"] = ", ".join(sorted(others))
        self.rows = rows
        self.people = people
        self.settings = {"n": args.n, "seed": args.seed, "size": args.size, "draws": args.draws}
        self.figures = bootstrap(aggregate, rows, args.draws, args.seed)
        self.counts = {"scores": Counter(), "pairs": Counter()}
        for row in rows:
            for what, count in row["whys"].items():
                self.counts[what].update(count)

    def to_json(self) -> dict:
        counts = {what: {why: count[why] for why in WHYS} for what, count in self.counts.items()}
        found = {"figures": as_json(self.figures), "counts": counts, "people": self.people.to_json(), "rows": self.rows}
        return self.about | {"settings": self.settings, "items": len(self.rows), "summary": self.summary()} | found

    def summary(self) -> str:
        """What the card comes to, a sentence for each way of asking."""
        said = []
        for how, basis in (("by scores", "By its scores"), ("by pairs", "Asked which of two is better,")):
            figure = self.figures[f"all, {how}"]
            if not figure.n:
                said.append(f"{basis} it ranks nothing: none of its answers could be used.")
                continue
            if figure.low > EVEN:
                against = "better than a coin"
            elif figure.high < EVEN:
                against = "worse than a coin"
            else:
                against = "no better than a coin"
            interval = f"95 %: {100 * figure.low:.0f} to {100 * figure.high:.0f}"
            said.append(f"{basis} it ranks {100 * figure.value:.0f} of 100 spoiled answers right ({interval}), {against}.")
        return " ".join(said)

    def tables(self) -> list[Table]:
        people = [self.people.table()] if self.people.figures else []
        return [self.rankings(), self.habits(), self.repeats(), *people, self.came_about()]

    def rankings(self) -> Table:
        rows = []
        for name in (*SPOILINGS, "all"):
            keys = (f"{name}, {how}{what}" for how in ("by scores", "by pairs") for what in ("", ", ties"))
            rows.append([name, *(shares(self.figures[key]) for key in keys)])
        notes = [
            *SPOILINGS.items(),
            ("right", "the clean answer stands above the spoiled one; a tie counts half: who knows nothing has 50 %"),
            ("by scores", "the mean of the five criteria of howto500, asked about each answer alone"),
            ("by pairs", "which of two answers is better, asked in both orders as `python -m evaluate pairs` asks"),
            ("a cell", "percent, 95 % interval by bootstrap over items, /of how many; without width it says only that all were "
             "alike: of n, up to 3 / n may still be otherwise"),
        ]  # fmt: skip
        head = ["spoiled by", "right by scores", "ties", "right by pairs", "ties"]
        return Table("Ranks an answer of the sketchbook above the same answer spoiled", head, rows, notes)

    def habits(self) -> Table:
        cells = {name: shares(figure) for name, figure in self.figures.items()}
        rows = [
            ["goes by the place", "-", cells["goes by the place"], "0%"],
            ["takes the first", "-", cells["takes the first"], "50%"],
            ["prefers the longer", cells["prefers the longer, by scores"], cells["prefers the longer, by pairs"], "50%"],
            ["prefers blank pictures", "-", cells["prefers blank pictures, by pairs"], "50% or less"],
            ["prefers strange pictures", "-", cells["prefers strange pictures, by pairs"], "50% or less"],
        ]
        notes = [
            ("goes by the place", "of pairs asked in both orders, those of which it takes the same place twice; a coin: 50 %"),
            ("takes the first", "of all answers about pairs, those that take the first"),
            ("the longer", "a copy with sentences that say nothing, beside the answer itself"),
            ("blank, strange", "the words with white pictures, or with those of other requests, beside the words alone; scores "
             "do not tell here: by rule an answer without pictures has the lowest"),
            ("fair", "what a judge has that does not go by this"),
        ]  # fmt: skip
        return Table("What it goes by", ["habit", "by scores", "by pairs", "fair"], rows, notes)

    def repeats(self) -> Table:
        identity = self.about["identity"]
        how = "deterministic: it computes, and draws no lots"
        if "temperature" in identity:
            how = f"temperature {identity['temperature']}, seed {identity.get('seed')}; a server may answer otherwise even so"
        rows = [
            ["same score", shares(self.figures["same score"])],
            ["score differs by", decimals(self.figures["score differs by"])],
            ["same choice", shares(self.figures["same choice"])],
        ]
        notes = [
            ("this judge", how),
            ("score", "one criterion of the clean answer, in points from 1 to 5"),
            ("choice", f"which is better, the clean answer or the one with a {AGAIN}"),
        ]
        return Table("Says the same when it is asked again", ["", "of all"], rows, notes)

    def came_about(self) -> Table:
        counts = dict(self.counts)
        if self.people.pictures:
            counts["people's pictures"] = self.people.counts
        rows = [[what, *(str(count[why]) for why in WHYS)] for what, count in counts.items()]
        notes = [
            (f"{REFUSED}, {UNPARSABLE}", "a criterion is then left out of both answers' means, a pair or a picture altogether"),
            (JUDGED, "as often as it was needed; the same question is not put twice"),
        ]
        return Table("How its answers came about", ["", *WHYS], rows, notes)

    def facts(self) -> list[tuple[str, str]]:
        identity = ", ".join(f"{key} {value}" for key, value in self.about["identity"].items())
        found = [("judge", f"{self.about['judge']}; {identity}")]
        if "answered as" in self.about:
            found.append(("answered as", self.about["answered as"]))
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        found.append(("items", f"{len(self.rows)} judged, first exchanges of dialogues of the sketchbook; {settings}"))
        return [*found, *self.people.notes(), ("prompts", self.about["prompts"]), ("date", self.about["date"])]

    def write(self, items: list[Item], out: Path) -> str:
        """trust.json, trust.md and trust.html. -> the text"""
        tables = self.tables()
        facts = self.facts()
        summary = self.summary()
        title = f"How far to trust {self.about['judge']}"
        lines = "\n".join(f"* {name}: {meaning}" for name, meaning in facts)
        text = f"# {title}\n\n{summary}\n\n" + "\n\n".join([*map(markdown, tables), lines]) + "\n"
        write_text(out / "trust.json", harmless_json(self.to_json()))
        write_text(out / "trust.md", text)
        worst = wrong(self.rows, items)
        page = render("trust.html", title=title, summary=summary, tables=tables, facts=facts, wrong=worst)
        write_text(out / "trust.html", page)
        return text


# -------------------------------------------------------------------------------------------------------------------- page


def wrong(rows: list[dict], items: list[Item]) -> list[dict]:
    """What the page shows of the rankings that are furthest from right."""
    by_id = {item.id: item for item in items}
    cards = []
    for row in rows:
        for name in SPOILINGS:
            marks = known([by_scores(row, name), by_pairs(row, name)])
            if marks and min(marks) <= EVEN:
                cards.append(shown(row, name, by_id[row["id"]]))
    return sorted(cards, key=lambda card: -card["gap"])[:WORST]


def shown(row: dict, name: str, item: Item) -> dict:
    """gap: how much higher the spoiled answer stands, in shares of the scales."""
    gap = 0.0
    scores = mean_scores(row, name)
    if scores:
        gap += (scores[1] - scores[0]) / 4
    pair = row["pairs"][name]
    if None not in pair:
        gap += (pair[1] - pair[0]) / 2
    first = ["-" if value is None else f"{value:.2f}" for value in pair]
    request = asked(item.request)
    answers = {CLEAN: item.clean, name: item.copies[name]}
    means = dict(zip(answers, [f"{score:.2f}" for score in scores or ()] or ["-", "-"], strict=True))
    return {
        "what": f"{row['id']}: {name}",
        "gap": gap,
        "asked": " ".join(part for part in request if isinstance(part, str)),
        "given": [part for part in request if not isinstance(part, str)],
        "answers": [laid_out(label, means[label], answer) for label, answer in answers.items()],
        "pair": f"the first is better, 0 to 1: {first[0]} if that is the clean one, {first[1]} if it is the spoiled one",
    }


def laid_out(label: str, score: str, answer: Answer) -> dict:
    """Each picture with the words before it."""
    # Not strict: one text more than pictures, the one after the last.
    figures = list(zip(answer.pictures, answer.texts, strict=False))
    return {"label": f"{label}, score {score}", "figures": figures, "rest": answer.texts[-1]}
