"""How good the system is: the exam of exam.py on a checkpoint, as tables and as a page to look at.

    python -m evaluate sketchbook --ckpt checkpoints/tiny --n 170 --seed 0           held-out and seen, 170 dialogues of each
    python -m evaluate sketchbook --split held_out --kinds lesson,one --guidance 5   some kinds only, other sampling
    python -m evaluate sketchbook --dit runs/tiny/stage2 --json-line curve.jsonl     a part of a run; one line more of a curve
    python -m evaluate sketchbook --ablations                                        also guidance and condition images

It prints the tables and writes out/eval/results.json (settings, sources, every verdict with its reasons), table.md and
index.html (the worst answers first, with what the checker objected to). A cell reads: percent right, 95 % interval, /how many.
What the columns mean stands under each table, and at length in exam.py. The same seed gives the same dialogues and, on the same
machine, the same answers.
"""

import argparse
import json
import platform
import time
from collections import Counter
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import PIL
import torch

from checkpoint import InputError, part_folder, pick_device, write_json
from evaluate.details import SORTS as DETAILS
from evaluate.exam import ASKED, CATEGORIES, GUIDANCES, IDLE, MEANS, METRICS, SORTS, SPLITS, Case, Corpus, Report, Share
from evaluate.exam import ablations, dialogues, evaluate, evaluate_single, lowest, overall, single_requests, single_shares
from evaluate.exam import free_requests, through
from evaluate.tables import Table, markdown
from families.registry import PARTS
from flags import Parser, add_flags
from ops import set_backend
from pages.template import render
from pipeline import STOPS, DuoGen, Settings, override
from sketchbook.dialogues import KINDS


CELL = ("a cell", "percent right, 95 % interval, /of how many; - where there is none")
CEILINGS = [("truth", "the corpus' own answers to the same dialogues: what is lost there is the checker's own error"),
            ("truth by VAE", "the same with their pictures encoded and decoded by the VAE")]  # fmt: skip
DRAWN = {"held_out": "dialogues whose requests have a colour, an arrangement, a phrasing or a way to attach a detail that "
         "training never shows",
         "seen": "new dialogues of what training shows"}  # fmt: skip
BY = {"colour": "a thing in a colour that training never shows on it", "phrasing": "words in which training never asks",
      "attached": "details attached in ways in which training never attaches them (sketchbook/grammar.json)",
      "relation": "an arrangement of two things that training never shows"}  # fmt: skip


def weakest(what: str, found: list[tuple[str, Share]]) -> list[tuple[str, str]]:
    """A note that names the lowest rows; none where there is no lowest."""
    return [(f"weakest in {what}", ", ".join(f"{name} {share}" for name, share in found))] if found else []


def summary_table(report: Report, truth: Report, vae: Report) -> Table:
    splits = list(report.shares())
    rows = [[name, *(str(kinds["all"][m]) for kinds in report.shares().values()), str(truth.share(m)), str(vae.share(m))]
            for m, name in METRICS.items()]  # fmt: skip
    notes = [(name, MEANS[m]) for m, name in METRICS.items()]
    if report.questions():  # these answers have no pictures, so the VAE has no part in them
        rows.append(["answers right", *(str(report.answered(s)) for s in splits), str(truth.answered()), "-"])
        notes.append(("answers right", "answers to questions about a picture that are right; of these answers, by sort below"))
    head = ["", *(SPLITS[s] for s in splits), "truth", "truth by VAE"]
    notes += [*((SPLITS[s], DRAWN[s]) for s in splits), *CEILINGS, CELL]
    return Table("Percent right, 95 % interval, of how many", head, rows, notes)


def kinds_table(report: Report, truth: Report, vae: Report) -> Table:
    shares = report.shares()
    rows = []
    for kind in list(next(iter(shares.values())))[1:]:
        for split, kinds in shares.items():
            tops = [f"{100 * r.share('shows', split, kind).share:.0f}" for r in (truth, vae) if r.share("shows", split, kind).n]
            rows.append([kind, SPLITS[split], *map(str, kinds[kind].values()), " / ".join(tops) or "-"])
    head = ["kind", "split", *METRICS.values(), "truth / VAE"]
    notes = [("kind", "of the dialogue's first request; the columns count all that follows in it, too"),
             *((name, MEANS[m]) for m, name in METRICS.items()),
             ("truth / VAE", "percent of image-text for the corpus' own pictures, and for these through the VAE")]  # fmt: skip
    if idle := [k for k in IDLE if k in next(iter(shares.values()))]:
        notes.append((f"kind {' and '.join(idle)}", "owes no picture: what stands under image-text and image consistency are "
                      "pictures of later requests; how questions are answered stands in the next table"))  # fmt: skip
    weak = [note for m in ("shows", "text") for note in weakest(f"{METRICS[m]}, splits together", report.weakest(m))]
    return Table("The same by kind of dialogue; last the ceilings of image-text", head, rows, [*notes, CELL], weak)


def questions_table(report: Report, truth: Report) -> Table:
    """Questions about a picture, in whatever dialogue they are asked, by what they ask for."""
    found = [s for s in SORTS if report.questions(None, s)]
    splits = list(report.shares())
    rows = [[sort or "all", *(str(report.answered(s, sort)) for s in splits), str(truth.answered(None, sort)),
             "{0.share:.0%} /{0.n}".format(truth.guessed(sort))] for sort in (None, *found)]  # fmt: skip
    notes = [("answers right", "the answer has the words that are true of the picture, and none of those that would be false"),
             *((s, SORTS[s]) for s in found), CEILINGS[0],
             ("guessing", "percent right if a sort always got its most frequent right answer, /of how many"), CELL]  # fmt: skip
    low = lowest([(s, report.answered(None, s)) for s in found], report.answered())
    weak = weakest("answers right, splits together", low)
    head = ["asked", *(SPLITS[s] for s in splits), "truth", "guessing"]
    return Table("Questions about a picture: answers right", head, rows, notes, weak)


def details_table(report: Report) -> Table:
    """What the user named, by sort: kept, and as the words and the pictures alone have it."""
    splits = list(report.shares())
    rows = []
    for sort in DETAILS:
        if not report.details(sort).n:
            continue
        kept = [str(report.details(sort, split)) for split in splits]
        rows.append([sort, *kept, *(f"{100 * report.details(sort, side=side).share:.0f}" for side in ("told", "shown"))])
    notes = [*((row[0], DETAILS[row[0]]) for row in rows),
             ("told, shown", "percent that the words alone, or the pictures alone, keep; splits together"), CELL]  # fmt: skip
    low = lowest([(row[0], report.details(row[0])) for row in rows], report.share("named"))
    head = ["the user named", *(SPLITS[s] for s in splits), "told", "shown"]
    return Table("Named details", head, rows, notes, weakest("named details, splits together", low))


def free_table(found: Report) -> Table:
    """Requests worded freely, by list and by kind."""
    groups = {"all": found.cases}
    for case in found.cases:
        groups.setdefault(f"list {case.record['list']}", []).append(case)
    for case in found.cases:
        groups.setdefault(case.record["kind"], []).append(case)
    metrics = ("named", "text", "placed", "shows")
    rows = []
    for name, cases in groups.items():
        some = Report(cases, 0.0)
        rows.append([name, str(some.followed()), *(str(some.share(m)) for m in metrics)])
    notes = [("list 1, list 2", "60 requests each, by two people; what was lost of list 1 has since told which forms the "
              "sketchbook's grammar lacks, list 2 nobody has looked at for that"),
             ("requests followed", "requests of which every named detail is in the words and in the pictures"),
             *((METRICS[m], MEANS[m]) for m in metrics), CELL]  # fmt: skip
    head = ["", "requests followed", *(METRICS[m] for m in metrics)]
    return Table("Requests that somebody worded who has not seen the sketchbook's", head, rows, notes)


def held_out_table(report: Report) -> Table:
    """The held-out dialogues by what is held out; a dialogue may be in several rows."""
    found = sorted({by for c in report.cases for by in c.record["held_out_by"]})
    rows = [[by, *(str(report.share(m, by=by)) for m in METRICS)] for by in found]
    notes = [*((by, BY[by]) for by in found), ("columns", "as in the first table; a dialogue may be in several rows"), CELL]
    return Table("Held-out dialogues by what training never shows", ["", *METRICS.values()], rows, notes)


def single_table(found: dict[str, list[dict]]) -> Table:
    rows = []
    for who, answers in found.items():
        for split, shares in single_shares(answers).items():
            rows.append([who, SPLITS[split], *(str(shares[c]) for c in CATEGORIES), f"{100 * overall(shares):.0f}"])
    notes = [*ASKED.items(), ("overall", "the mean of the six categories"),
             ("model, truth, VAE", "who painted: the model, the corpus itself, the corpus through the VAE"), CELL]  # fmt: skip
    head = ["", "split", *CATEGORIES, "overall"]
    return Table("Single requests: percent of pictures that satisfy the request", head, rows, notes)


def ablation_tables(runs: dict[str, dict[str, Share]]) -> list[Table]:
    modes = ("chunk", "empty", "none")
    grid = [[f"{g:g}", *(str(runs[f"guidance {g:g} {m}"]["shows"]) if m != "none" or g == 1 else "as 1" for m in modes)]
            for g in GUIDANCES]  # fmt: skip
    seen = [[name, str(runs[name]["stays"]), str(runs[name]["shows"])] for name in runs if name.endswith("images")]
    notes = [("guidance", "how far each step goes beyond the negative branch; 1: not at all"),
             ("chunk", "the negative branch leaves out the words since the picture before"),
             ("empty", "it leaves out all words"), ("none", "there is no negative branch"), CELL]  # fmt: skip
    columns = [(METRICS[m], MEANS[m]) for m in ("stays", "shows")]
    head = ["", *(name for name, _ in columns)]
    return [Table("Image-text by guidance and what its negative branch leaves out", ["guidance", *modes], grid, notes),
            Table("What the earlier pictures are good for", head, seen, [*columns, CELL])]  # fmt: skip


def shown(case: Case) -> dict:
    """What the page shows of one dialogue."""
    marks = [m for metric, values in case.marks().items() if metric != "whole" for m in values]
    record = case.record
    pictures = iter(case.shown)
    turns = []
    by = f" ({', '.join(record['held_out_by'])})" if record["held_out_by"] else ""
    for k, turn in enumerate(case.turns):
        # Each picture with the words before it and what the checker objected to; first those that the user gave.
        given = [p for p in case.messages[2 * k]["content"] if p["type"] == "image"]
        figures = [(next(pictures)[1], "(the user's)", []) for _ in given]
        for j, text in enumerate(turn["texts"][:-1]):
            verdict = turn["pictures"][j] if j < len(turn["pictures"]) else {"reasons": ["one too many"], "stays": None}
            lost = ["the hero is not as before"] if turn["kind"] == "story" and verdict["stays"] is False else []
            figures.append((next(pictures)[1], text, verdict["reasons"] + lost))
        due = " to ".join(str(n) for n in sorted(set(turn["due"])))
        fine = {
            "the text does not say all that was asked for": turn["text"],
            f"{turn['drawn']} pictures, {due} due, each after a text that says what it shows": turn["placed"],
            f"the answer stopped: {STOPS.get(turn['stop'], turn['stop'])}": turn["stop"] == "end",
        }
        objections = [objection for objection, kept in fine.items() if not kept]
        turns.append({"asked": turn["asked"], "figures": figures, "rest": turn["texts"][-1], "objections": objections})
    return {
        "what": f"{record['kind']}, {SPLITS[record['split']]}{by}, seed {record['seed']}",
        "whole": case.marks()["whole"][0],
        "right": sum(marks),
        "of": len(marks),
        "turns": turns,
        "left_out": case.left_out,
    }


def page(title: str, tables: list[Table], report: Report, single: list[dict], worst: int = 60, best: int = 15) -> str:
    """The contact sheet: one HTML file with everything in it."""

    def quality(case: Case) -> float:
        marks = sum(case.marks().values(), [])
        return sum(marks) / len(marks)

    order = sorted(report.cases, key=quality)  # stable, and kinds take turns: equally bad ones show all kinds
    bad = [c for c in order if not c.marks()["whole"][0]][:worst]
    good = [c for c in reversed(order) if c.marks()["whole"][0] and any(t["drawn"] for t in c.turns)][:best]
    failed = sorted(single, key=lambda row: row["ok"])[: worst + best]
    cases = {"bad": [shown(c) for c in bad], "good": [shown(c) for c in good]}
    return render("report.html", title=title, tables=tables, single=failed, **cases)


# ------------------------------------------------------------------------------------------------------------- command line


def arguments(argv: list[str] | None) -> tuple[argparse.Namespace, dict]:
    """(options, sampling settings that were given)."""
    parser = Parser(
        "python -m evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("corpus", choices=("sketchbook",))
    parser.add_argument("--ckpt", help="checkpoint: folder or Hub name; default the bundled miniature")
    for part in PARTS:
        parser.add_argument(f"--{part}", help="this part from a run, a folder or a Hub name")
    parser.add_argument("--n", type=int, default=170, help="dialogues of each split (170)")
    parser.add_argument("--seed", type=int, default=0, help="of the dialogues and of sampling (0)")
    parser.add_argument("--split", choices=(*SPLITS, "both"), default="both")
    parser.add_argument("--kinds", default=",".join(KINDS), help="kinds of dialogue, separated by commas; default all")
    parser.add_argument("--single", type=int, default=20, help="single requests of each category and split (20); 0: none")
    parser.add_argument("--free", type=int, default=120, help="requests worded freely, at most (120, which are all); 0: none")
    parser.add_argument("--ablations", action="store_true", help="also guidance and condition images, on fewer dialogues")
    parser.add_argument("--ablation-n", type=int, default=34, help="dialogues of each split for them (34)")
    parser.add_argument("--batch", type=int, default=64, help="dialogues in lockstep (64)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--attention", default="auto", help="auto, triton, sdpa; see ops.py")
    parser.add_argument("--out", default="out/eval")
    parser.add_argument("--json-line", metavar="FILE", help="append a summary to this file, one line a call")
    flags = {"use_condition_images": ["--condition-images"]}
    title = "sampling (defaults: the checkpoint's)"
    add_flags(parser, Settings, title=title, aliases=flags, leave_out=["seed"], given_only=True)
    args = parser.parse_args(argv)
    for name, least in (("n", 1), ("single", 0), ("free", 0), ("ablation_n", 1), ("batch", 1)):
        if getattr(args, name) < least:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more")
    args.kinds = list(dict.fromkeys(args.kinds.split(",")))
    for kind in args.kinds:
        if kind not in KINDS:
            raise InputError(f"--kinds: no kind called {kind!r}; there are {', '.join(KINDS)}")
    given = {f.name: getattr(args, f.name) for f in fields(Settings) if f.name in args}
    # An answer of the corpus has about 100 tokens at most; one that rambles need not be read to the checkpoint's limit.
    given = {"max_tokens": 400, **given, "seed": args.seed}
    override(Settings(), given, "sampling")  # a mistake is told before anything is loaded
    return args, given


def trained(duo: DuoGen) -> dict:
    """Step and hours of the training run that the DiT was taken from, if it was."""
    about = Path(duo.sources.get("dit", "")).parent / "about.json"
    if not about.is_file():
        return {}
    about = json.loads(about.read_text())
    return {"step": about["step"], "hours": round(about["seconds"] / 3600, 4)}


def load(args: argparse.Namespace, given: dict) -> tuple[DuoGen, Settings, int]:
    """The system, its settings, and the side of its pictures."""
    device = pick_device(args.device)
    set_backend(args.attention, device)
    try:  # what cannot be written is told now, not after the work
        Path(args.out).mkdir(parents=True, exist_ok=True)
        for path in filter(None, (Path(args.out) / "table.md", args.json_line)):
            open(path, "a").close()
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be written ({e.strerror}): choose another place") from None
    np.finfo(np.float32), np.finfo(np.float64)  # numpy must have looked before:
    torch.set_flush_denormal(True)  # as in training, numbers near 1e-40 are as good as 0 and cost a CPU a hundred times as much
    parts = {part: part_folder(getattr(args, part), part) for part in PARTS if getattr(args, part)}
    duo = DuoGen.from_pretrained(args.ckpt, **parts, device=device)
    settings = duo.settings(**given)
    height = settings.height or duo.size[0]
    width = settings.width or duo.size[1]
    if height != width:
        raise InputError(f"pictures of {width} x {height}: those of sketchbook are square, give --height and --width")
    return duo, settings, height


def numbers(shares: dict) -> dict:
    """Nested shares as JSON."""
    return {k: v.to_json() if isinstance(v, Share) else numbers(v) for k, v in shares.items()}


def main(argv: list[str] | None = None) -> None:
    args, given = arguments(argv)
    duo, settings, side = load(args, given)
    began = time.perf_counter()
    quiet = {"quiet": True}
    splits = list(SPLITS) if args.split == "both" else [args.split]
    records = dialogues(args.n, args.seed, splits, args.kinds, side)
    report = evaluate(duo, records, settings, batch=args.batch)
    truth = evaluate(Corpus(records), records, **quiet)
    vae = evaluate(Corpus(records, through(duo.vae, records)), records, **quiet)
    tables = [summary_table(report, truth, vae), kinds_table(report, truth, vae)]
    single = {}  # answers to the single requests, by who painted
    runs = {}  # of the ablations
    tables.append(details_table(report))
    if report.questions():
        tables.append(questions_table(report, truth))
    if "held_out" in splits:
        tables.append(held_out_table(report))
    free = None
    if args.free:
        free = evaluate(duo, free_requests(args.free), settings, batch=args.batch, title="free requests")
        tables.append(free_table(free))
    if args.single:
        asked = single_requests(args.single, args.seed, splits, side)
        single["model"] = evaluate_single(duo, asked, settings, batch=args.batch)
        single["truth"] = evaluate_single(Corpus(asked), asked, **quiet)
        single["VAE"] = evaluate_single(Corpus(asked, through(duo.vae, asked)), asked, **quiet)
        tables.append(single_table(single))
    if args.ablations:
        drawing = [k for k in args.kinds if k not in IDLE] or args.kinds
        runs = ablations(duo, dialogues(args.ablation_n, args.seed, splits, drawing, side), settings, batch=args.batch)
        tables += ablation_tables(runs)

    seconds = {"dialogues": round(report.seconds, 2), "all": round(time.perf_counter() - began, 2)}
    rate = report.drawn / report.seconds
    left = Counter(c.left_out.split(":")[0] for c in report.cases if c.left_out)
    notes = [
        f"{len(records)} dialogues, {report.drawn} pictures in {report.seconds:.0f} s, {rate:.2f} a second; "
        f"{seconds['all']:.0f} s in all",
        "answers ended: " + ", ".join(f"{n} {reason}" for reason, n in report.stops.items()),
        *(f"{n} dialogues left before their end: {reason}" for reason, n in left.items()),
    ]
    text = "\n\n".join([*map(markdown, tables), "\n".join(f"* {note}" for note in notes)]) + "\n"
    versions = {m.__name__: m.__version__ for m in (torch, np, PIL)} | {"python": platform.python_version()}
    results = {
        "settings": asdict(settings),
        "options": vars(args) | {"splits": splits},
        "sources": duo.sources,
        "trained": trained(duo),
        "versions": versions | {"machine": platform.platform()},
        "seconds": seconds,
        "pictures": {"drawn": report.drawn, "per second": round(rate, 3)},
        "stops": report.stops,
        "table": {who: numbers(r.shares()) for who, r in (("model", report), ("truth", truth), ("VAE", vae))},
        "details": {s: numbers({d: report.details(d, s) for d in DETAILS if report.details(d, s).n}) for s in report.shares()},
        "questions": {s: numbers({q: report.answered(s, q) for q in SORTS if report.questions(s, q)}) for s in report.shares()},
        "free": [c.to_json() for c in free.cases] if free else [],
        "single": {who: numbers(single_shares(rows)) for who, rows in single.items()},
        "overall": {who: {s: overall(c) for s, c in single_shares(rows).items()} for who, rows in single.items()},
        "ablations": numbers(runs),
        "dialogues": [c.to_json() for c in report.cases],
        "single requests": [{k: v for k, v in row.items() if k != "picture"} for row in single.get("model", [])],
    }
    out = Path(args.out)
    write_json(out / "results.json", results)
    (out / "table.md").write_text(text, encoding="utf-8")
    title = f"Evaluation on {args.corpus}: {', '.join(dict.fromkeys(duo.sources.values()))}"
    (out / "index.html").write_text(page(title, tables, report, single.get("model", [])), encoding="utf-8")
    if args.json_line:
        line = {"sources": duo.sources, **results["trained"], "n": args.n, "seed": args.seed, "seconds": seconds["dialogues"]}
        line |= report.summary() | {"single": results["overall"].get("model", {})}
        with open(args.json_line, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
    print(f"\n{text}\n{out / 'index.html'}")
