"""Two systems' answers to the same requests, and a judge that says which is better.

    python -m evaluate pairs howto500 --out runs/p --a runs/x --b runs/y --judge self
    python -m evaluate pairs howto500 --out runs/p --a old=runs/x --b new=runs/y --c theirs=answers.jsonl \\
        --judge http://localhost:8000/v1 --judge-model Qwen/Qwen3-VL-32B-Instruct
    python -m evaluate report --out runs/p

Every two systems are compared on every request that both have answered, and the judge is asked twice, in both orders: a liking
for what comes first cancels. It may find both equal. Requests that a system has not answered are left out, or with --absent
lost. The report has the ratings (bradley_terry.py). As with `judge`, the same command again goes on where it ended and asks
nothing twice. People compare the same systems with `python -m evaluate vote` into the same folder.
"""

import argparse
import contextlib
import hashlib
import inspect
import sys

from checkpoint import read_text
from evaluate import judges
from evaluate.answers import alone, parse_shard
from evaluate.benchmark import MISSING, Answer, Judge, Request, Verdict
from evaluate.contest import BOTH, FIRST, IN_ORDER, SECOND, TURNED, Contest, add_contest_flags, begin, pair_name
from evaluate.judges import Asker
from evaluate.judging import add_judge_flags, check_judge_flags, folder_name, introduce, judge_all, load_judge
from evaluate.rubrics import PROMPTS, asked, document, has_text, rubric
from flags import Parser


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m evaluate pairs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_contest_flags(p)
    p.add_argument("--judge", required=True, metavar="self|URL", help="self, or the address of an OpenAI-compatible server")
    p.add_argument("--absent", action="store_true", help="an answer that is not there loses (default: the request is left out)")
    p.add_argument("--shard", metavar="i/n", help="only every n-th item, from item i (default: this rank's under torchrun)")
    add_judge_flags(p)
    args = p.parse_flags(argv)
    check_judge_flags(args, [])
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    number, of = parse_shard(args.shard)
    contest = begin(args)
    with contextlib.redirect_stdout(sys.stderr):
        backend = load_judge(args)
    judge = Asker(backend, contest.out / "calls")
    card = {"judge": backend.name, "identity": backend.identity, "prompts": prompt_hash()}
    folder = contest.out / "judged" / folder_name(backend.name)
    folder.mkdir(parents=True, exist_ok=True)
    introduce(folder, card)
    done = 0
    with alone(folder, "pairs", (number, of)):
        for a, b in contest.pairs:
            mine = contest.requests if args.absent else contest.common(a, b)
            if len(mine) < len(contest.requests):
                lacking = len(contest.requests) - len(mine)
                of_all = f"{lacking} of {len(contest.requests)} requests"
                print(f"{pair_name(a, b)}: {of_all} are not answered by both: left out, see --absent", file=sys.stderr)
            mine = [r for n, r in enumerate(mine) if n % of == number]
            place = folder / pair_name(a, b)
            place.mkdir(exist_ok=True)
            judge_all(Duel, mine, Both(contest, a, b), judge, place, args)
            done += len(mine)
    print(f"{done} pairs of answers judged: {folder}; {judge.tally.told(args.price)}")


def prompt_hash() -> str:
    """Of the rubric, and of the words around it and around the answers."""
    sources = [read_text(PROMPTS / "pairs.md"), inspect.getsource(judges.Asker), inspect.getsource(compare)]
    return hashlib.sha256("".join(sources).encode()).hexdigest()[:16]


class Both:
    """The answers of two systems, read as one system's are."""

    def __init__(self, contest: Contest, a: str, b: str):
        self.contest = contest
        self.names = a, b

    def has(self, id: str) -> bool:
        """Always: an answer that is not there is an empty one, if it is judged at all."""
        return True

    def read(self, id: str) -> tuple[Answer, Answer]:
        a, b = self.names
        return self.contest.read(a, id), self.contest.read(b, id)

    def fingerprint(self, id: str) -> str:
        """Changes when either answer does."""
        systems = [self.contest.systems[name] for name in self.names]
        return " ".join(answers.fingerprint(id) if answers.has(id) else "absent" for answers in systems)


class Duel:
    """What a judge is asked about two answers, in the place of a benchmark's own questions."""

    @staticmethod
    def score(request: Request, both: tuple[Answer, Answer], judge: Judge) -> dict[str, Verdict]:
        a, b = both
        return {IN_ORDER: compare(request, a, b, judge), TURNED: compare(request, b, a, judge)}


def compare(request: Request, first: Answer, second: Answer, judge: Judge) -> Verdict:
    """From FIRST to SECOND. An answer of nothing at all loses unasked."""
    empty = [not has_text(answer) and not answer.pictures for answer in (first, second)]
    if all(empty):
        return Verdict(BOTH, MISSING, "neither answers")
    if any(empty):
        return Verdict(SECOND if empty[0] else FIRST, MISSING, "only one answers")
    request_parts = ["Request:", *asked(request)]
    answer_parts = ["First answer:", *document(first), "Second answer:", *document(second)]
    return judge.rating(rubric("pairs", "better"), *request_parts, *answer_parts, low=FIRST, high=SECOND)
