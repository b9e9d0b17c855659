"""The report of a run: tables with intervals, JSON, and a page to look at.

    python -m evaluate report --out runs/e

It writes report.json, report.md and report.html into the folder, for every judge that has judged there. An interval is that of
the bootstrap over items: again and again as many items are drawn with repetition, and the benchmark makes its figures of them;
the middle 95 percent are the interval. Of every score three counts say how it came about: judged, refused, unparsable; a
fourth, missing, counts answers that lacked what was to be judged: their score is the scale's lowest. Published figures stand
beside ours with what differs.

The folder of a comparison (`pairs`, `vote`) has a report of its own, see comparison.py.
"""

import argparse
import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from tqdm import tqdm

from checkpoint import InputError, read_json
from evaluate import comparison
from evaluate.answers import Answers, address, items_of, read_run
from evaluate.benchmark import JUDGED, MISSING, REFUSED, UNPARSABLE, Figure, Request, content_of, find
from evaluate.judging import prompt_hash
from evaluate.tables import Table, markdown
from flags import Parser
from pages.answer import harmless_json, write_text
from pages.template import render

WHYS = (JUDGED, REFUSED, UNPARSABLE, MISSING)
BINS = 10
BARS = "·▁▂▃▄▅▆▇█"


def main(argv: list[str]) -> None:
    p = Parser("python -m evaluate report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--draws", type=int, default=1000, help="of the bootstrap (1000)")
    p.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    args = p.parse_flags(argv)
    if args.draws < 1:
        raise InputError(f"--draws {args.draws}: must be 1 or more")
    out = Path(args.out)
    run = read_run(out)
    if "systems" in run:
        comparison.report(out, args.draws, args.seed)
        return
    module = find(run["benchmark"])
    requests, items = items_of(module, run.get("items from"), run.get("n"))
    if items != run["items"]:
        raise InputError(f"{out}: its items were others ({run['items']}, now {items}): take the benchmark's file of then")
    answers = Answers(Path(run["answers"]) if "answers" in run else out / "answers", requests)
    judged = []
    for folder in sorted((out / "judged").glob("*/")):
        rows = [read_json(folder / f"{r.id}.json") for r in requests if (folder / f"{r.id}.json").is_file()]
        if rows:
            judged.append(Judged(module, folder, rows, len(requests), args.draws, args.seed))
    if not judged:
        raise InputError(f"{out}: nothing is judged there: `python -m evaluate judge` does it")

    absent = [r.id for r in requests if not answers.has(r.id)]
    about = {
        "benchmark": module.NAME,
        "title": module.TITLE,
        "source": module.SOURCE,
        "items": {"of": len(requests), "hash": items, "from": run.get("items from") or "the benchmark", "n": run.get("n")},
        "answers absent": absent,
        "system": run.get("system") or {"answers": run.get("answers")},
        "settings": run.get("settings"),
        "seeds": {"sampling": (run.get("settings") or {}).get("seed"), "bootstrap": args.seed, "draws": args.draws},
    }
    tables = [t for j in judged for t in j.tables(module)]
    notes = facts(about)
    results = about | {"judges": [j.to_json() for j in judged], "published": module.PUBLISHED}
    write_text(out / "report.json", harmless_json(results))
    text = f"# {module.TITLE}\n\n" + "\n\n".join([*map(markdown, tables), "\n".join(f"* {k}: {v}" for k, v in notes)]) + "\n"
    write_text(out / "report.md", text)
    made = time.strftime("%Y-%m-%d", time.gmtime())
    ranges = spans(judged)
    cards = [card(request, judged, answers, out, ranges) for request in requests]
    cards.sort(key=lambda c: c["goodness"])
    notes.append(("report of", made))
    orders = ("worst first", "best first")
    page = render("benchmark.html", title=module.TITLE, tables=tables, facts=notes, cards=cards, orders=orders)
    write_text(out / "report.html", page)
    print(text, end="")
    print(out / "report.html")


class Judged:
    """What one judge found."""

    def __init__(self, module: ModuleType, folder: Path, rows: list[dict], of: int, draws: int, seed: int):
        self.rows = rows
        self.by_id = {row["id"]: row for row in rows}
        self.of = of
        self.card = read_json(folder / "judge.json")
        # What the server called its model, item by item: it may have been another one by and by.
        called = {name for row in rows for name in row.get("answered as", [])}
        if called - {self.card["judge"], ""}:
            self.card["answered as"] = sorted(called)
        if self.card["prompts"] != prompt_hash(module):
            self.card["note"] = "the prompts have changed since"
        self.figures = bootstrap(module.aggregate, rows, draws, seed)
        self.counts = {}
        for row in rows:
            for name, score in row["scores"].items():
                self.counts.setdefault(name, Counter())[score["why"]] += 1

    def to_json(self) -> dict:
        figures = {name: {k: finite(v) for k, v in figure._asdict().items()} for name, figure in self.figures.items()}
        counts = {name: {why: count[why] for why in WHYS} for name, count in self.counts.items()}
        return self.card | {"items": len(self.rows), "of": self.of, "figures": figures, "counts": counts}

    def tables(self, module: ModuleType) -> list[Table]:
        judge = self.card["judge"]
        rows = [[name, number(f.value), interval(f), str(f.n)] for name, f in self.figures.items()]
        notes = [("judge", f"{judge}, {self.card['date']}, prompts {self.card['prompts']}"),
                 ("items", f"{len(self.rows)} of {self.of} judged"),
                 ("95 %", "interval by bootstrap over items")]  # fmt: skip
        if "answered as" in self.card:
            notes.append(("answered as", ", ".join(self.card["answered as"])))
        if "note" in self.card:
            notes.append(("note", self.card["note"]))
        tables = [Table(f"By {judge}", ["figure", "value", "95 %", "items"], rows, notes)]
        counts = [[name, *(str(count[why]) for why in WHYS)] for name, count in self.counts.items()]
        notes = [(REFUSED, "the judge would not answer, or its filter stood before it"),
                 (UNPARSABLE, "no score can be read from its answer"),
                 (MISSING, "there was nothing to judge: the scale's lowest score")]  # fmt: skip
        tables.append(Table(f"How the scores of {judge} came about", ["score", *WHYS], counts, notes))
        tables.append(self.distribution())
        if module.PUBLISHED:
            tables.append(self.beside(module))
        return tables

    def distribution(self) -> Table:
        """How the values of each score lie between the lowest and the highest of them."""
        values: dict[str, list[float]] = {}
        for row in self.rows:
            for name, score in row["scores"].items():
                for key, value in parts_of(score["value"]):
                    values.setdefault(f"{name} {key}".strip(), []).append(value)
        rows = []
        for name, found in values.items():
            quarters = np.percentile(found, [25, 50, 75])
            rows.append([name, f"{min(found):g}", bars(found), f"{max(found):g}", *(f"{q:.2f}" for q in quarters)])
        head = ["score", "lowest", "distribution", "highest", "25 %", "median", "75 %"]
        notes = [("distribution", f"{BINS} equal steps from the lowest to the highest value; the tallest bar is the commonest")]
        return Table(f"How the scores of {self.card['judge']} are spread", head, rows, notes)

    def beside(self, module: ModuleType) -> Table:
        """Published figures, each line with what differs from ours."""
        names = list(dict.fromkeys([*self.figures, *(n for p in module.PUBLISHED for n in p["figures"])]))
        rows = [["ours", *(number(self.figures[n].value) if n in self.figures else "-" for n in names), self.card["judge"], ""]]
        for published in module.PUBLISHED:
            differs = [] if published["judge"] == self.card["judge"] else ["judge"]
            other_number = "n" in published and published["n"] != len(self.rows)
            if published.get("items") or len(self.rows) < self.of or other_number:
                differs.append("items")
            if published.get("rule"):
                differs.append(f"rule: {published['rule']}")
            mark = f"* {', '.join(differs)}" if differs else ""
            cells = (number(published["figures"][n]) if n in published["figures"] else "-" for n in names)
            rows.append([published["system"], *cells, str(published["judge"]), mark])
        notes = [("*", "not comparable: judge, items or rule differ")]
        notes += [(p["system"], str(p["source"])) for p in module.PUBLISHED]
        return Table("Beside published figures", ["system", *names, "judge", "differs"], rows, notes)


def bootstrap(aggregate: Callable, rows: list[dict], draws: int, seed: int) -> dict[str, Figure]:
    """The figures that aggregate(rows) gives, each with the middle 95 percent of what it is for items drawn anew."""
    figures = aggregate(rows)
    chance = random.Random(seed)
    drawn = {name: [] for name in figures}
    for _ in tqdm(range(draws), desc="intervals", unit="draw", leave=False, disable=None):
        again = aggregate(chance.choices(rows, k=len(rows)))
        for name in figures:
            # A small group may be missing from a draw.
            if name in again and math.isfinite(again[name].value):
                drawn[name].append(again[name].value)
    ends = {name: (percentile(values, 2.5), percentile(values, 97.5)) for name, values in drawn.items()}
    return {name: figure._replace(low=ends[name][0], high=ends[name][1]) for name, figure in figures.items()}


def percentile(values: list[float], percent: float) -> float:
    """NaN of nothing."""
    return float(np.percentile(values, percent)) if values else math.nan


def bars(values: list[float]) -> str:
    """A histogram as text; what has no value at all has no bar."""
    counts, _ = np.histogram(values, BINS)
    # Rounded up: one of 500 is to be seen.
    return "".join(BARS[math.ceil(count / counts.max() * (len(BARS) - 1))] for count in counts)


def finite(value: float) -> float | None:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def number(value: float | None) -> str:
    return "-" if value is None or not math.isfinite(value) else f"{value:.3f}"


def interval(figure: Figure) -> str:
    return "-" if math.isnan(figure.low) else f"{number(figure.low)} to {number(figure.high)}"


def facts(about: dict) -> list[tuple[str, str]]:
    """What stands under the tables: where the items and the answers come from."""
    items = about["items"]
    source = ", ".join(f"{k} {v}" for k, v in about["source"].items())
    system = ", ".join(f"{k} {v}" for k, v in about["system"].items())
    seeds = ", ".join(f"{k} {v}" for k, v in about["seeds"].items())
    found = [("items", f"{items['of']} from {items['from']}, hash {items['hash']}; {source}"), ("system", system)]
    if about["settings"]:
        found.append(("settings", ", ".join(f"{k} {v}" for k, v in about["settings"].items())))
    found.append(("seeds", seeds))
    if about["answers absent"]:
        found.append(("answers absent", f"{len(about['answers absent'])}: {', '.join(about['answers absent'][:20])}"))
    return found


# -------------------------------------------------------------------------------------------------------------------- page


def spans(judged: list["Judged"]) -> dict[tuple, tuple[float, float]]:
    """{(judge, score, key): lowest and highest value}, so that scores of all scales can be held together."""
    found = {}
    for n, j in enumerate(judged):
        for row in j.rows:
            for name, score in row["scores"].items():
                for key, value in parts_of(score["value"]):
                    low, high = found.get((n, name, key), (value, value))
                    found[n, name, key] = min(low, value), max(high, value)
    return found


def parts_of(value: float | dict | None) -> list[tuple[str, float]]:
    if value is None:
        return []
    return list(value.items()) if isinstance(value, dict) else [("", value)]


def goodness(id: str, judged: list["Judged"], ranges: dict) -> float:
    """From 0, the worst of all items in every score, to 1; what nobody could judge comes first."""
    places = []
    for n, j in enumerate(judged):
        for name, score in j.by_id.get(id, {"scores": {}})["scores"].items():
            for key, value in parts_of(score["value"]):
                low, high = ranges[n, name, key]
                # Where nobody did better than to give nothing, that is still the worst.
                alike = 0.0 if score["why"] == MISSING else 1.0
                places.append((value - low) / (high - low) if high > low else alike)
    return sum(places) / len(places) if places else -1.0


def card(request: Request, judged: list["Judged"], answers: Answers, out: Path, ranges: dict) -> dict:
    """One item of the page: what was asked, the answer, and every judge's scores and words."""
    asked = []
    for message in request.messages:
        for part in content_of(message):
            asked.append(part["text"] if part["type"] == "text" else "[picture]")
    texts, pictures = [], []
    if answers.has(request.id):
        texts, files = answers.files(request.id)
        # Addresses, not contents: a page with all pictures of 500 answers in it would be too heavy for a phone.
        pictures = [address(file, out) for file in files]
    scores = []
    for j in judged:
        for name, score in j.by_id.get(request.id, {"scores": {}})["scores"].items():
            value = score["value"]
            shown = ", ".join(f"{k} {v:.2f}".strip() for k, v in parts_of(value)) if value is not None else "-"
            said = {"why": score["why"], "words": score["words"]}
            title = name if len(judged) == 1 else f"{name}, {j.card['judge']}"
            scores.append({"judge": j.card["judge"], "name": title, "value": shown} | said)
    return {
        "id": request.id,
        "asked": " ".join(asked),
        "given": [address(file, out) for file in answers.given(request.id)],
        "answers": [{"name": "", "texts": texts, "pictures": pictures}],
        "scores": scores,
        "whys": " ".join(sorted({s["why"] for s in scores})) if scores else "unjudged",
        "meta": json.dumps(request.meta, ensure_ascii=False),
        "goodness": goodness(request.id, judged, ranges),
    }
