"""A card that says how far a judge can be trusted.

    python -m evaluate trust --judge self --out runs/trust                         the bundled miniature's own language model
    python -m evaluate trust --judge oracle --out runs/oracle                      the rules of the sketchbook's checker
    python -m evaluate trust --judge http://localhost:8000/v1 --judge-model NAME --out runs/trust
    python -m evaluate trust ... --human genai_image.json --pictures GenAI-Image-527

Answers of the sketchbook, whose truth is known (spoiled.py), are judged beside copies with one thing wrong. By scores: the mean
of the five criteria of howto500, criterion by criterion asked about each answer alone. By pairs: the judge is asked, in both
orders, whether the first answer is better than the second. A tie counts half. A judge that knows nothing ranks half of them
right.

Then its habits: whether it goes by the place of an answer, by its length, by pictures whatever they show; and whether it says
the same when it is asked again. With --human, how well it agrees with people about the pictures of GenAI-Bench (raters.py),
beside how well one of these people agrees with the others; that alone needs no pictures.

Beside every number stands its 95 % interval, by bootstrap over items. It writes trust.json, trust.md and trust.html. What the
judge was asked is kept in calls/ and calls-again/: the same command goes on where it ended. An item takes about 60 questions.
"""

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections import Counter
from pathlib import Path

from checkpoint import InputError
from evaluate import raters
from evaluate.answers import alone
from evaluate.benchmark import JUDGED, REFUSED, UNPARSABLE, Answer, Figure, average
from evaluate.benchmarks import howto500
from evaluate.figures import WHYS, bootstrap, finite
from evaluate.judges import Asker, Backend
from evaluate.judging import add_judge_flags, check_judge_flags, each, introduce, load_judge, prompt_hash, told
from evaluate.raters import Rated
from evaluate.rubrics import asked, document, rubric
from evaluate.spoiled import BARE, BLANK, PADDED, SPOILINGS, STRANGE, Item, items
from evaluate.tables import Table, markdown
from flags import Parser
from pages.answer import harmless_json, write_text
from pages.template import render
from records.validate import load_image

CLEAN = "clean"
# Whom each copy is held against.
AGAINST = {**dict.fromkeys((*SPOILINGS, PADDED), CLEAN), BLANK: BARE, STRANGE: BARE}
AGAIN = "wrong colour"  # the pair that is asked a second time; every item has it
EQUAL = 1e-9  # scores that are as near as this are the same
EVEN = 0.5  # what a judge says that finds both as good, and what one gets right that knows nothing
WORST = 40  # rankings that the page shows


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m evaluate trust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--judge", required=True, metavar="self|oracle|URL", help="self, oracle, or the address of a server")
    p.add_argument("--out", required=True, help="folder of the card; each judge needs its own")
    p.add_argument("--n", type=int, default=100, help="answers of the sketchbook (100)")
    p.add_argument("--seed", type=int, default=0, help="of these answers and of the bootstrap (0)")
    p.add_argument("--size", type=int, help="side of their pictures in pixels (64, which self knows; for a server 256)")
    p.add_argument("--human", metavar="FILE", help="GenAI-Bench's genai_image.json: ratings by people")
    p.add_argument("--pictures", metavar="DIR", help="its pictures, as DIR/MODEL/ID.jpeg")
    p.add_argument("--prompts", type=int, help="of its prompts only the first so many")
    p.add_argument("--draws", type=int, default=1000, help="of the bootstrap (1000)")
    add_judge_flags(p)
    args = p.parse_flags(argv)
    check_judge_flags(args, ["n", "prompts", "draws"])
    if args.size is None:
        args.size = 256 if args.judge.startswith("http") else 64
    if args.size < 64:
        raise InputError(f"--size {args.size}: must be 64 or more")
    if args.pictures and not args.human:
        raise InputError("--pictures: the ratings are needed as well, give --human FILE")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    # All that can be wrong without a judge is told before one is loaded.
    rated, left_out, pictures = people(args)
    out = Path(args.out)
    with contextlib.redirect_stdout(sys.stderr):
        backend = load(args)
    judge = Asker(backend, out / "calls")
    again = Asker(backend, out / "calls-again")
    # What is asked a second time is counted with the rest.
    again.tally = judge.tally
    again.lock = judge.lock
    about = {"judge": backend.name, "identity": backend.identity, "prompts": prompt_hash(howto500)}
    out.mkdir(parents=True, exist_ok=True)
    introduce(out, about)

    with alone(out, "trust", (0, 1)):
        found = items(args.n, args.seed, args.size)
        rows, values, problem = ask_all(found, rated, pictures, judge, again, args)
        if not rows:
            raise problem
        human = People(rated, left_out, pictures, values, args)
        write_card(Card(about, rows, human, judge, args), found, out)
    print(f"{out / 'trust.html'}; {told(judge, args.price)}")
    if problem:
        raise problem


def people(args: argparse.Namespace) -> tuple[list[Rated], list[str], dict[tuple[str, str], Path]]:
    """Ratings, pictures left out of them, and where the others are; nothing of what was not given."""
    if not args.human:
        return [], [], {}
    raters.scipy_stats()
    rated, left_out = raters.read_ratings(Path(args.human))
    rated = rated[: args.prompts]
    return rated, left_out, raters.find_pictures(Path(args.pictures), rated) if args.pictures else {}


def load(args: argparse.Namespace) -> Backend:
    if args.judge == "oracle":
        from evaluate.oracle import Oracle

        return Oracle()
    return load_judge(args)


# ------------------------------------------------------------------------------------------------------------------ asking


def ask_all(found, rated, pictures, judge: Asker, again: Asker, args) -> tuple[list[dict], dict, InputError | None]:
    """Rows of the items, what the judge says of the rated pictures, and what stood in the way of the rest."""
    rows = {}
    values = {}
    problem = None

    def one(item: Item) -> None:
        rows[item.id] = ask(item, judge, again)

    def match(one: Rated) -> None:
        asking = rubric("trust", "Match")
        for model in one.ratings:
            if (one.id, model) in pictures:
                picture = load_image(pictures[one.id, model])
                values[one.id, model] = judge.rating(asking, "Text:", one.prompt, picture, low=raters.LOW, high=raters.HIGH)

    try:
        each(one, found, judge, args, len(found))
        if pictures:
            each(match, rated, judge, args, len(rated))
    except InputError as e:
        problem = e
    # Threads finish in any order; the card must not depend on it.
    return [rows[item.id] for item in found if item.id in rows], values, problem


def ask(item: Item, judge: Asker, again: Asker) -> dict:
    """All that is asked about one item.

    -> {"scores": {copy: {criterion: value}}, "pairs": {copy: [what is said of (reference, copy), of (copy, reference)]},
    "again": the same of the clean answer and one pair, "whys": {"scores" | "pairs": {why: how many}}}
    """
    whys = {"scores": Counter(), "pairs": Counter()}
    answers = {CLEAN: item.clean, **item.copies}

    def scored(answer: Answer, judge: Asker) -> dict:
        verdicts = howto500.score(item.request, answer, judge)
        whys["scores"].update(verdict.why for verdict in verdicts.values())
        return {name: verdict.value for name, verdict in verdicts.items()}

    def preferred(first: str, second: str, judge: Asker) -> float | None:
        """How sure the judge is that the first is better."""
        content = ["First answer:", *document(answers[first]), "Second answer:", *document(answers[second])]
        verdict = judge.yes(rubric("trust", "Better"), "Request:", *asked(item.request), *content)
        whys["pairs"][verdict.why] += 1
        return verdict.value

    scores = {name: scored(answer, judge) for name, answer in answers.items() if name not in (BARE, BLANK, STRANGE)}
    pairs = {}
    for copy, reference in AGAINST.items():
        if copy in answers:
            pairs[copy] = [preferred(reference, copy, judge), preferred(copy, reference, judge)]
    repeated = {"scores": scored(item.clean, again), "pair": preferred(CLEAN, AGAIN, again)}
    whys = {what: dict(count) for what, count in whys.items()}
    return {"id": item.id, "kind": item.kind, "scores": scores, "pairs": pairs, "again": repeated, "whys": whys}


# ----------------------------------------------------------------------------------------------------------------- figures


def means(row: dict, copy: str) -> tuple[float, float] | None:
    """The scores of the clean answer and of a copy: the mean of the criteria that the judge could tell of both."""
    both = [(row["scores"][CLEAN][name], row["scores"][copy][name]) for name in howto500.CRITERIA]
    both = [pair for pair in both if None not in pair]
    if not both:
        return None
    return statistics.fmean(pair[0] for pair in both), statistics.fmean(pair[1] for pair in both)


def rank(better: float, worse: float) -> float:
    """1 if they stand as they should, 0 if not, a half if they are equal."""
    if abs(better - worse) <= EQUAL:
        return EVEN
    return float(better > worse)


def by_scores(row: dict, copy: str) -> float | None:
    """Whether the clean answer has the higher score."""
    found = means(row, copy) if copy in row["scores"] else None
    return None if found is None else rank(*found)


def by_pairs(row: dict, copy: str) -> float | None:
    """Whether both orders together speak for the reference; who goes by the place alone has said nothing."""
    if copy not in row["pairs"] or None in row["pairs"][copy]:
        return None
    first, second = row["pairs"][copy]
    return rank(first, second)


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    """All figures of the card but those of people, {name: share}; "score differs by" is in points of the scale."""
    figures = {}
    every = {"by scores": [], "by pairs": []}
    for name in SPOILINGS:
        for how, ranked in (("by scores", by_scores), ("by pairs", by_pairs)):
            marks = known(ranked(row, name) for row in rows)
            every[how] += marks
            figures |= shares(f"{name}, {how}", marks)
    for how, marks in every.items():
        figures |= shares(f"all, {how}", marks)
    return figures | habits(rows) | repeats(rows)


def known(values) -> list[float]:
    return [value for value in values if value is not None]


def shares(name: str, marks: list[float]) -> dict[str, Figure]:
    """How many stand as they should, and how many ties are in it."""
    return {name: average(marks), f"{name}: ties": average([float(mark == EVEN) for mark in marks])}


def habits(rows: list[dict]) -> dict[str, Figure]:
    """What a judge goes by that it should not."""
    both = [said for row in rows for said in row["pairs"].values() if None not in said]
    firsts = [rank(p, EVEN) for said in both for p in said]
    figures = {
        "takes the first": average(firsts),
        "goes by the place": average([follows(*said) for said in both]),
        "prefers the longer, by scores": average([1 - mark for mark in known(by_scores(row, PADDED) for row in rows)]),
    }
    for name, copy in {"the longer": PADDED, "blank pictures": BLANK, "strange pictures": STRANGE}.items():
        marks = known(by_pairs(row, copy) for row in rows)
        figures[f"prefers {name}, by pairs"] = average([1 - mark for mark in marks])
    return figures


def follows(first: float, second: float) -> float:
    """Of a pair asked in both orders: 1 if the answers name the same place, 0 if the same answer, a half if one is undecided."""
    a = rank(first, EVEN)
    b = rank(second, EVEN)
    return EVEN if EVEN in (a, b) else float(a == b)


def repeats(rows: list[dict]) -> dict[str, Figure]:
    """The same question asked again."""
    differs = []
    same = []
    for row in rows:
        for name, value in row["again"]["scores"].items():
            if value is not None and row["scores"][CLEAN][name] is not None:
                differs.append(abs(value - row["scores"][CLEAN][name]))
        first = row["pairs"][AGAIN][0]
        second = row["again"]["pair"]
        if None not in (first, second):
            same.append(float(rank(first, EVEN) == rank(second, EVEN)))
    return {
        "same score": average([float(value <= EQUAL) for value in differs]),
        "score differs by": average(differs),
        "same choice": average(same),
    }


class People:
    """What people say of the pictures of GenAI-Bench, and how well they and the judge agree."""

    def __init__(self, rated: list[Rated], left_out: list[str], pictures: dict, verdicts: dict, args: argparse.Namespace):
        self.rated = rated
        self.left_out = left_out
        self.pictures = len(pictures)
        self.counts = Counter(verdict.why for verdict in verdicts.values())
        self.figures = {}
        if rated:
            rows = raters.by_raters(rated)
            self.figures["a rater"] = bootstrap(raters.agreement_of_raters, rows, args.draws, args.seed)
        values = {key: verdict.value for key, verdict in verdicts.items() if verdict.value is not None}
        if values:
            rows = raters.by_judge(rated, values)
            self.figures["judge"] = bootstrap(raters.agreement, rows, args.draws, args.seed)

    def to_json(self) -> dict | None:
        if not self.rated:
            return None
        figures = {who: plain(figures) for who, figures in self.figures.items()}
        about = {"prompts": len(self.rated), "left out": self.left_out, "pictures": self.pictures}
        return about | {"counts": {why: self.counts[why] for why in WHYS}, "figures": figures}

    def notes(self) -> list[tuple[str, str]]:
        """What is not there, or not as it was published."""
        if not self.rated:
            return [("people", "no ratings by people were given (--human): whether it agrees with them is not known")]
        found = [("people", f"GenAI-Bench, {len(self.rated)} prompts, three ratings of each picture")]
        if self.left_out:
            found.append(("ratings off the scale", f"these pictures are left out: {'; '.join(self.left_out)}"))
        if not self.pictures:
            found.append(("pictures", "no pictures were given (--pictures): people agree with one another as below, and whether "
                          "the judge agrees with them is not known"))  # fmt: skip
        else:
            found.append(("pictures", f"{self.pictures} of {sum(len(one.ratings) for one in self.rated)} are there"))
        return found


def plain(figures: dict[str, Figure]) -> dict[str, dict]:
    """Figures as JSON."""
    return {name: {key: finite(value) for key, value in figure._asdict().items()} for name, figure in figures.items()}


# -------------------------------------------------------------------------------------------------------------------- card


def share(figure: Figure) -> str:
    """As the sketchbook's exam writes it: percent, interval, of how many."""
    if not figure.n:
        return "-"
    return f"{100 * figure.value:.0f}% {100 * figure.low:.0f}-{100 * figure.high:.0f} /{figure.n}"


def decimal(figure: Figure | None) -> str:
    if figure is None or not figure.n or not math.isfinite(figure.value):
        return "-"
    return f"{figure.value:.2f} {figure.low:.2f} to {figure.high:.2f} /{figure.n}"


class Card:
    """All that was found of one judge."""

    def __init__(self, about: dict, rows: list[dict], human: People, judge: Asker, args: argparse.Namespace):
        self.about = about | {"date": time.strftime("%Y-%m-%d", time.gmtime())}
        others = judge.tally.models - {about["judge"], ""}
        if others:
            self.about["answered as"] = ", ".join(sorted(others))
        self.rows = rows
        self.human = human
        self.settings = {"n": args.n, "seed": args.seed, "size": args.size, "draws": args.draws}
        self.figures = bootstrap(aggregate, rows, args.draws, args.seed)
        self.counts = {what: Counter() for what in ("scores", "pairs")}
        for row in rows:
            for what, count in row["whys"].items():
                self.counts[what].update(count)

    def to_json(self) -> dict:
        counts = {what: {why: count[why] for why in WHYS} for what, count in self.counts.items()}
        found = {"figures": plain(self.figures), "counts": counts, "people": self.human.to_json(), "rows": self.rows}
        return self.about | {"settings": self.settings, "items": len(self.rows), "summary": self.summary()} | found

    def summary(self) -> str:
        """What the card comes to, in two sentences."""
        said = []
        for how, basis in (("by scores", "By its scores"), ("by pairs", "Asked which of two is better,")):
            figure = self.figures[f"all, {how}"]
            if not figure.n:
                said.append(f"{basis} it could not be judged.")
                continue
            against = "better than a coin" if figure.low > EVEN else "worse than a coin"
            if figure.low <= EVEN <= figure.high:
                against = "no better than a coin"
            interval = f"{100 * figure.low:.0f} to {100 * figure.high:.0f}"
            said.append(f"{basis} it puts {100 * figure.value:.0f} of 100 spoiled answers below the clean one "
                        f"({interval}): {against}.")  # fmt: skip
        return " ".join(said)

    def tables(self) -> list[Table]:
        found = [self.ranking(), self.of_habits(), self.of_repeats()]
        if self.human.figures:
            found.append(self.agreement())
        found.append(self.came_about())
        return found

    def ranking(self) -> Table:
        head = ["spoiled by", "right by scores", "ties", "right by pairs", "ties"]
        rows = []
        for name in (*SPOILINGS, "all"):
            keys = [f"{name}, {how}{ties}" for how in ("by scores", "by pairs") for ties in ("", ": ties")]
            rows.append([name, *(share(self.figures[key]) for key in keys)])
        notes = [*SPOILINGS.items(),
                 ("right", "the clean answer is above the spoiled one; a tie counts half, so that knowing nothing gives 50 %"),
                 ("by scores", "the mean of the five criteria of howto500, asked about each answer alone"),
                 ("by pairs", "which of two is better, asked in both orders"),
                 ("a cell", "percent, 95 % interval by bootstrap over items, /of how many pairs that could be judged")]  # fmt: skip
        return Table("Ranks a clean answer of the sketchbook above the same answer spoiled", head, rows, notes)

    def of_habits(self) -> Table:
        figures = self.figures
        order = "order: goes by the place"
        rows = [
            [order, "-", share(figures["goes by the place"]), "0%"],
            ["order: takes the first", "-", share(figures["takes the first"]), "50%"],
            ["length: prefers the longer"]
            + [share(figures[f"prefers the longer, {how}"]) for how in ("by scores", "by pairs")] + ["50%"],
            ["pictures: prefers blank ones", "-", share(figures["prefers blank pictures, by pairs"]), "50% or less"],
            ["pictures: prefers strange ones", "-", share(figures["prefers strange pictures, by pairs"]), "50% or less"],
        ]  # fmt: skip
        notes = [("goes by the place", "of pairs asked in both orders, those of which it names the same place twice; a coin: 50 %"),
                 ("takes the first", "of all answers about a pair, those that name the first; half of them should"),
                 ("the longer", "a copy with sentences that say nothing, against the answer itself"),
                 ("blank, strange", "the words with white pictures, or with pictures of other requests, against the words alone; "
                  "scores are not compared here, for by rule what has no picture has the lowest"),
                 ("fair", "what a judge has that does not go by this")]  # fmt: skip
        return Table("What it goes by", ["habit", "by scores", "by pairs", "fair"], rows, notes)

    def of_repeats(self) -> Table:
        cells = {"same score": share, "score differs by": decimal, "same choice": share}
        rows = [[name, show(self.figures[name])] for name, show in cells.items()]
        identity = self.about["identity"]
        how = "it is deterministic: it computes, and no lots are drawn"
        if "temperature" in identity:
            how = f"temperature {identity['temperature']}, seed {identity.get('seed')}; a server may round otherwise each time"
        notes = [("this judge", how), ("score", "one criterion of the clean answer, from 1 to 5"),
                 ("choice", f"which of two is better, of the clean answer and the one with a {AGAIN}")]  # fmt: skip
        return Table("Says the same when it is asked again", ["", "again"], rows, notes)

    def agreement(self) -> Table:
        figures = self.human.figures
        head = ["pictures", *(f"{who}, {name}" for who in figures for name in raters.COEFFICIENTS)]
        places = dict.fromkeys(key.rpartition(", ")[0] for key in figures["a rater"])
        rows = []
        for place in places:
            names = [(who, f"{place}, {name}") for who in figures for name in raters.COEFFICIENTS]
            rows.append([place, *(decimal(figures[who].get(key)) for who, key in names)])
        notes = [("a rater", "one of the three people against the mean of the other two: about what one can hope for"),
                 ("judge", "against the mean of all three"),
                 ("within prompts", "over the pictures of one prompt, the mean of all prompts on whose pictures people differ"),
                 ("a cell", "correlation, 95 % interval by bootstrap over prompts, /of how many pictures, models or prompts")]  # fmt: skip
        return Table("Agreement with people: rank correlation", head, rows, notes)

    def came_about(self) -> Table:
        counts = {"scores": self.counts["scores"], "pairs": self.counts["pairs"]}
        if self.human.pictures:
            counts["people's pictures"] = self.human.counts
        rows = [[what, *(str(count[why]) for why in WHYS)] for what, count in counts.items()]
        notes = [(f"{REFUSED}, {UNPARSABLE}", "a score without a number is left out of both answers' means, a pair altogether"),
                 (JUDGED, "each time that it was asked for; the same question is not put twice")]  # fmt: skip
        return Table("How its answers came about", ["", *WHYS], rows, notes)

    def facts(self) -> list[tuple[str, str]]:
        identity = ", ".join(f"{key} {value}" for key, value in self.about["identity"].items())
        found = [("judge", f"{self.about['judge']}; {identity}")]
        if "answered as" in self.about:
            found.append(("answered as", self.about["answered as"]))
        settings = ", ".join(f"{key} {value}" for key, value in self.settings.items())
        found.append(("items", f"{len(self.rows)} of {self.settings['n']} judged, first exchanges of the sketchbook; {settings}"))
        return [*found, *self.human.notes(), ("prompts", self.about["prompts"]), ("date", self.about["date"])]


def write_card(card: Card, found: list[Item], out: Path) -> None:
    tables = card.tables()
    title = f"How far to trust {card.about['judge']}"
    lines = "\n".join(f"* {name}: {meaning}" for name, meaning in card.facts())
    text = f"# {title}\n\n{card.summary()}\n\n" + "\n\n".join([*map(markdown, tables), lines]) + "\n"
    write_text(out / "trust.json", harmless_json(card.to_json()))
    write_text(out / "trust.md", text)
    values = {"title": title, "summary": card.summary(), "tables": tables, "facts": card.facts()}
    write_text(out / "trust.html", render("trust.html", **values, wrong=wrong(card.rows, found)))
    print(text)


def wrong(rows: list[dict], found: list[Item]) -> list[dict]:
    """The rankings that are furthest from right, for the page."""
    by_id = {item.id: item for item in found}
    cards = []
    for row in rows:
        for name in SPOILINGS:
            marks = known([by_scores(row, name), by_pairs(row, name)])
            if not marks or min(marks) > EVEN:
                continue
            item = by_id[row["id"]]
            scores = means(row, name)
            pair = row["pairs"][name]
            # How much higher the spoiled one stands, in shares of the scale, and how sure the judge is of it.
            gap = 0.0 if scores is None else (scores[1] - scores[0]) / 4
            gap += 0.0 if None in pair else (pair[1] - pair[0]) / 2
            said = ["-" if p is None else f"{p:.2f}" for p in pair]
            cards.append({
                "id": row["id"],
                "spoiling": name,
                "gap": gap,
                "asked": " ".join(part for part in asked(item.request) if isinstance(part, str)),
                "given": [part for part in asked(item.request) if not isinstance(part, str)],
                "answers": [shown(CLEAN, item.clean, scores and scores[0]), shown(name, item.copies[name], scores and scores[1])],
                "pair": f"the first is better: {said[0]} with the clean one first, {said[1]} with the spoiled one first",
            })  # fmt: skip
    return sorted(cards, key=lambda card: -card["gap"])[:WORST]


def shown(name: str, answer: Answer, score: float | None) -> dict:
    """An answer of the page; score: the mean of its criteria."""
    figures = list(zip(answer.pictures, answer.texts, strict=False))
    return {"name": name, "score": "-" if score is None else f"{score:.2f}", "figures": figures, "rest": answer.texts[-1]}
