"""Scores of answers by a judge.

    python -m evaluate judge geneval --out runs/e --judge self                                    the bundled miniature's MLLM
    python -m evaluate judge geneval --out runs/e --judge self --mllm Qwen/Qwen2.5-VL-7B-Instruct
    python -m evaluate judge geneval --out runs/e --judge http://localhost:8000/v1 --judge-model Qwen/Qwen3-VL-32B-Instruct
    python -m evaluate judge geneval --out runs/x --judge self --answers theirs/                  answers of another system

A server's key is read from JUDGE_API_KEY. Every item is a file as soon as it is judged, and every answer of the judge before
that: the same command again goes on where it ended, and asks nothing twice. Several judges may judge the same answers, each in
a folder of its own.
"""

import argparse
import contextlib
import hashlib
import inspect
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path
from types import ModuleType

from tqdm import tqdm

from checkpoint import InputError, read_json
from evaluate import judges
from evaluate.answers import Answers, alone, claim, first_of, items_of, parse_shard
from evaluate.benchmark import FOLDER, Answer, Request, find
from evaluate.judges import Asker, Backend
from flags import Parser
from pages.answer import harmless_json, write_text

PATIENCE = 5  # items in a row that a judge leaves unanswered before it is taken to be gone


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m evaluate judge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("benchmark", help="name of a benchmark, or a .py file that is one")
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--judge", required=True, metavar="self|URL", help="self, or the address of an OpenAI-compatible server")
    p.add_argument("--answers", metavar="PATH", help="answers of another system: see evaluate/answers.py")
    p.add_argument("--items", metavar="PATH", help="with --answers: folder or file of items, or hub:OWNER/NAME@REVISION")
    p.add_argument("--n", type=int, help="with --answers: only the first so many items")
    p.add_argument("--absent", action="store_true", help="answers that are not there are judged as empty ones")
    p.add_argument("--shard", metavar="i/n", help="only every n-th item, from item i (default: this rank's under torchrun)")
    add_judge_flags(p)
    args = p.parse_flags(argv)
    check_judge_flags(args, ["n"])
    return args


def add_judge_flags(p: Parser) -> None:
    """How the judge is asked that --judge names."""
    p.add_argument("--judge-model", metavar="NAME", help="what the server calls its model")
    p.add_argument("--at-once", type=int, default=8, help="items judged at the same time by a server (8)")
    p.add_argument("--timeout", type=float, default=120.0, help="seconds until a silent server is asked again (120)")
    p.add_argument("--tries", type=int, default=6, help="how often a question is asked of a failing server (6)")
    p.add_argument("--max-tokens", type=int, default=1024, help="that a server's judge may write (1024)")
    p.add_argument("--price", metavar="IN,OUT", help="of a million tokens read and written, to show the cost")
    p.add_argument("--ckpt", help="of self: checkpoint (default: the bundled miniature)")
    p.add_argument("--mllm", help="of self: the language model alone, from a run, a folder or a Hub name")
    p.add_argument("--dtype", default="auto", help="of self: auto, bf16, fp32, fp16")
    p.add_argument("--device", default="auto", help="of self: auto, cpu, cuda, cuda:N, mps")


def check_judge_flags(args: argparse.Namespace, counts: list[str]) -> None:
    """InputError on what cannot be; counts: a command's own flags that are 1 or more. The price becomes two numbers."""
    for name in (*counts, "at_once", "tries", "max_tokens"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be 1 or more")
    args.price = parse_price(args.price)


def parse_price(text: str | None) -> tuple[float, float] | None:
    """What a million tokens cost, read and written, from "IN,OUT"; InputError for anything else."""
    if text is None:
        return None
    price = text
    try:
        price = tuple(map(float, text.split(",")))
        if len(price) != 2:
            raise ValueError
    except ValueError:
        raise InputError(f"--price {price}: must be two numbers, such as 0.15,0.60") from None
    return price


def main(argv: list[str]) -> None:
    args = arguments(argv)
    shard = parse_shard(args.shard)
    module = find(args.benchmark)
    out = Path(args.out)
    about = {"benchmark": args.benchmark}
    run = {}
    if args.answers:
        about |= {"items from": args.items, "n": args.n, "answers": args.answers}
    elif not (out / "run.json").is_file():
        raise InputError(f"{out}: no run in it: `python -m evaluate generate` begins one, or give --answers")
    else:
        run = claim(out, about)
        args.items, args.n = run.get("items from"), run.get("n")
    requests, items = items_of(module, args.items, args.n)
    run = claim(out, about | {"items": items})
    answers = Answers(Path(run["answers"]) if "answers" in run else out / "answers", requests)

    with contextlib.redirect_stdout(sys.stderr):
        backend = load_judge(args)
    folder = out / "judged" / folder_name(backend.name)
    judge = Asker(backend, out / "calls")
    card = {"judge": backend.name, "identity": backend.identity, "prompts": prompt_hash(module)}
    folder.mkdir(parents=True, exist_ok=True)
    introduce(folder, card)
    with alone(folder, "judge", shard):
        mine = [r for n, r in enumerate(requests) if n % shard[1] == shard[0]]
        there = [r for r in mine if args.absent or answers.has(r.id)]
        if len(there) < len(mine):
            lacking = len(mine) - len(there)
            print(f"{lacking} of {len(mine)} answers are not there: they are not judged, see --absent", file=sys.stderr)
        judge_all(module, there, answers, judge, folder, args)
    print(f"{len(there)} answers judged: {folder}; {judge.tally.told(args.price)}")


def folder_name(judge: str) -> str:
    return re.sub(r"[^\w.-]+", "-", judge).strip("-")


def prompt_hash(module: ModuleType) -> str:
    """Of the benchmark's file, of all rubrics, and of the sentences around its questions."""
    sources = [Path(module.__file__).read_bytes(), inspect.getsource(judges.Asker).encode()]
    # Rubrics in words lie beside the benchmarks (rubrics.py), one file for each or one that several share.
    sources += [file.read_bytes() for file in sorted((FOLDER / "prompts").glob("*.md"))]
    return hashlib.sha256(b"".join(sources)).hexdigest()[:16]


def introduce(folder: Path, card: dict) -> None:
    """judge.json says who judges here; a judge with other prompts does not mix with the one before."""
    file = folder / "judge.json"
    if file.is_file():
        there = read_json(file)
        for key, value in card.items():
            if there.get(key) != value:
                differs = f"{key} {there.get(key)!r:.60}, now {value!r:.60}"
                raise InputError(f"{folder}: judged otherwise before ({differs}): remove it, or judge into another --out")
        return
    write_text(file, harmless_json(card | {"date": time.strftime("%Y-%m-%d", time.gmtime())}))


def judge_all(module: ModuleType, requests: list[Request], answers: Answers, judge: Asker, folder: Path, args) -> None:
    """Judge what is not judged yet, several at a time; an item that fails costs no other its scores."""

    def one(request: Request) -> None:
        # An answer that is not there is judged as an empty one, if that was asked for.
        absent = not answers.has(request.id)
        answer = Answer([""], []) if absent else answers.read(request.id)
        heard = judge.for_item()
        scores = module.score(request, answer, heard)
        row = {
            "id": request.id,
            "meta": request.meta,
            "answer": "" if absent else answers.fingerprint(request.id),
            "scores": {name: verdict._asdict() for name, verdict in scores.items()},
            "answered as": sorted(heard.names),
        }
        write_text(folder / f"{request.id}.json", harmless_json(row))

    waiting = [r for r in requests if not current(folder / f"{r.id}.json", answers, r.id)]
    each(one, waiting, judge, args, len(requests))


def each(one: Callable, waiting: list, judge: Asker, args: argparse.Namespace, total: int) -> None:
    """one(item) for all that wait, each with an `id`, several at a time. InputError at the end if any could not be judged."""
    problems = []
    silent = 0  # items in a row without an answer
    at_once = args.at_once if args.judge.startswith("http") else 1
    bar = tqdm(total=total, initial=total - len(waiting), unit="item", disable=None)
    with bar, ThreadPoolExecutor(at_once) as pool:
        queue = iter(waiting)
        running = {}
        try:
            while True:
                # Not all at once: when the judge is gone, those that wait must not try it one after the other.
                while len(running) < at_once and silent < PATIENCE and (item := next(queue, None)):
                    running[pool.submit(one, item)] = item
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    item = running.pop(future)
                    try:
                        future.result()
                        silent = 0
                        bar.update()
                    except judges.Unanswered as e:
                        silent += 1
                        problems.append(f"{item.id}: {e}")
                    except InputError as e:
                        problems.append(f"{item.id}: {e}")
                    bar.set_postfix_str(judge.tally.told(args.price))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if problems:
        raise InputError(f"not judged: {first_of(problems)}; what is judged is kept, give the same command again")


def current(file: Path, answers: Answers, id: str) -> bool:
    """Whether this answer, and not an earlier one of the same name, has been judged."""
    if not file.is_file():
        return False
    try:
        return read_json(file)["answer"] == (answers.fingerprint(id) if answers.has(id) else "")
    except (InputError, KeyError):
        return False


def load_judge(args) -> Backend:
    """The backend that the command line names."""
    if args.judge == "self":
        from evaluate.own import Own

        return Own.from_pretrained(args.ckpt, args.mllm, args.device, args.dtype)
    if not args.judge.startswith(("http://", "https://")):
        raise InputError(f"--judge {args.judge}: must be self, or the address of a server, such as http://localhost:8000/v1")
    if not args.judge_model:
        raise InputError("--judge-model is missing: what the server calls its model")
    from evaluate.server import Server

    return Server(args.judge, args.judge_model, args.timeout, args.tries, args.max_tokens)
