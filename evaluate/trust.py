"""A card that says how far a judge can be trusted.

    python -m evaluate trust --judge self --out runs/trust                         the bundled miniature's own language model
    python -m evaluate trust --judge oracle --out runs/oracle                      the rules of the sketchbook's checker
    python -m evaluate trust --judge http://localhost:8000/v1 --judge-model NAME --out runs/trust
    python -m evaluate trust ... --human genai_image.json --pictures GenAI-Image-527

Answers of the sketchbook, whose truth is known, are judged beside copies with one thing wrong (spoiled.py): how many does the
judge rank right, by the scores that it gives, and asked which of two is better (rankings.py)? Then its habits: whether it goes
by the place of an answer, by its length, by pictures whatever they show; and whether it says the same when it is asked again.
With --human, how well it agrees with people about the pictures of GenAI-Bench, beside how well one of them agrees with the
others (raters.py); the latter needs no pictures.

Beside every number stands its 95 % interval, by bootstrap over items. The folder gets trust.json, trust.md and trust.html.
What the judge said is kept in calls/ and calls-again/: the same command goes on where it ended, and nothing is asked twice. An
item takes about 50 questions.
"""

import argparse
import contextlib
import sys
from pathlib import Path

from checkpoint import InputError
from evaluate import raters
from evaluate.answers import alone
from evaluate.benchmark import Verdict
from evaluate.benchmarks import howto500
from evaluate.card import Card, People
from evaluate.judges import Asker, Backend
from evaluate.judging import add_judge_flags, check_judge_flags, each, introduce, load_judge, prompt_hash
from evaluate.raters import Rated
from evaluate.rankings import ask
from evaluate.rubrics import rubric
from evaluate.spoiled import Item, items
from flags import Parser
from records.validate import load_image

SMALLEST = 64  # pixels; the sketchbook's own size


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m evaluate trust", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--judge", required=True, metavar="self|oracle|URL", help="self, oracle, or the address of a server")
    p.add_argument("--out", required=True, help="folder of the card; each judge has its own")
    p.add_argument("--n", type=int, default=100, help="answers of the sketchbook (100)")
    p.add_argument("--seed", type=int, default=0, help="of these answers and of the bootstrap (0)")
    p.add_argument("--size", type=int, help="side of their pictures in pixels (64, which self knows; for a server 256)")
    p.add_argument("--human", metavar="FILE", help="genai_image.json of GenAI-Bench: ratings by people")
    p.add_argument("--pictures", metavar="DIR", help="its pictures, as DIR/MODEL/ID.jpeg")
    p.add_argument("--prompts", type=int, help="of its prompts only the first so many")
    p.add_argument("--draws", type=int, default=1000, help="of the bootstrap (1000)")
    add_judge_flags(p)
    args = p.parse_flags(argv)
    check_judge_flags(args, ["n", "prompts", "draws"])
    if args.size is None:
        args.size = 4 * SMALLEST if args.judge.startswith("http") else SMALLEST
    if args.size < SMALLEST:
        raise InputError(f"--size {args.size}: must be {SMALLEST} or more")
    if args.pictures and not args.human:
        raise InputError("--pictures: what people say of them is needed as well, give --human FILE")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    # All that can be wrong without a judge is told before one is loaded.
    rated, left_out, files = read_human(args)
    with contextlib.redirect_stdout(sys.stderr):
        backend = load(args)
    out = Path(args.out)
    judge = Asker(backend, out / "calls")
    again = Asker(backend, out / "calls-again")
    # What is asked a second time is counted with the rest, under one lock.
    again.tally = judge.tally
    again.lock = judge.lock
    about = {"judge": backend.name, "identity": backend.identity, "prompts": prompt_hash(howto500)}

    with alone(out, "trust", (0, 1)):
        introduce(out, about)
        found = items(args.n, args.seed, args.size)
        rows, verdicts, problem = ask_all(found, rated, files, judge, again, args)
        if rows:
            card = Card(about, rows, People(rated, left_out, verdicts, args), judge, args)
            print(card.write(found, out))
            print(f"{out / 'trust.html'}; {judge.tally.told(args.price)}")
    if problem:
        raise problem


def read_human(args: argparse.Namespace) -> tuple[list[Rated], list[str], dict[tuple[str, str], Path]]:
    """Ratings, the pictures left out of them, and where the others are; nothing of what was not given."""
    if not args.human:
        return [], [], {}
    raters.scipy_stats()
    rated, left_out = raters.read_ratings(Path(args.human), args.prompts)
    files = raters.find_pictures(Path(args.pictures), rated) if args.pictures else {}
    return rated, left_out, files


def load(args: argparse.Namespace) -> Backend:
    if args.judge == "oracle":
        from evaluate.oracle import Oracle

        return Oracle()
    return load_judge(args)


def ask_all(
    found: list[Item], rated: list[Rated], files: dict[tuple[str, str], Path], judge: Asker, again: Asker, args
) -> tuple[list[dict], dict[tuple[str, str], Verdict], InputError | None]:
    """Rows of the items, what is said of the pictures that people rated, and what stood in the way of the rest."""
    rows = {}
    verdicts = {}

    def rank(item: Item) -> None:
        rows[item.id] = ask(item, judge, again)

    def match(one: Rated) -> None:
        for model in one.ratings:
            if (one.id, model) in files:
                content = ("Text:", one.prompt, load_image(files[one.id, model]))
                verdicts[one.id, model] = judge.rating(rubric("trust", "Match"), *content, low=raters.LOW, high=raters.HIGH)

    problem = None
    try:
        each(rank, found, judge, args, len(found))
        if files:
            each(match, rated, judge, args, len(rated))
    except InputError as e:
        problem = e
    # Threads finish in any order; the card must not depend on it.
    return [rows[item.id] for item in found if item.id in rows], verdicts, problem
