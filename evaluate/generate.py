"""Answers to a benchmark, in the form that sample.py writes.

    python -m evaluate generate geneval --out runs/e                             by the bundled miniature
    python -m evaluate generate geneval --out runs/e --ckpt DIR --n 20 --batch 16 --steps 20
    python -m evaluate generate imgedit --out runs/e --items shared/imgedit      items from a folder or file at hand
    python -m evaluate generate imgedit --out runs/e --items hub:OWNER/NAME@REVISION     or from the Hub (hub.py)
    torchrun --nproc-per-node 8 -m -- evaluate generate geneval --out runs/e     or --shard 0/8 by hand; without the --,
                                                                                 torchrun would take our --n for its own

The same command again goes on where it ended. Every item has a noise of its own by its number, so it does not matter how many
are written together or by how many processes. --lmms-eval also writes answers/lmms_eval.jsonl, a line {"id", "doc_id",
"response"} for each answer, whose response is the string {"text", "images"} that lmms-eval expects of a model.
"""

import argparse
import contextlib
import shutil
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

from tqdm import tqdm

import interrupt
from checkpoint import InputError, parse_dtype, read_json
from distributed import flush_denormals, local_device
from evaluate.answers import Answers, alone, claim, first_of, items_of, lmms_line, parse_shard
from evaluate.benchmark import find
from families.registry import PARTS
from flags import Parser, add_flags
from ops import set_backend
from pages.answer import asked_for, save, write_text
from pipeline import Answer, DuoGen, Settings, override


def arguments(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    p = Parser("python -m evaluate generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("benchmark", help="name of a benchmark, or a .py file that is one")
    p.add_argument("--out", required=True, help="folder of the run")
    p.add_argument("--items", metavar="PATH", help="folder, file or hub:OWNER/NAME@REVISION (default: the benchmark's own)")
    p.add_argument("--n", type=int, help="only the first so many items")
    p.add_argument("--batch", type=int, default=16, help="answers written together (16)")
    p.add_argument("--shard", metavar="i/n", help="only every n-th item, from item i (default: this rank's under torchrun)")
    p.add_argument("--lmms-eval", action="store_true", help="also write answers/lmms_eval.jsonl")
    p.add_argument("--ckpt", help="checkpoint: folder or Hub name (default: the bundled miniature)")
    p.add_argument("--revision", help="branch, tag or commit of a --ckpt on the Hub")
    for part in PARTS:
        p.add_argument(f"--{part}", help="this part from a run, a folder or a Hub name")
    p.add_argument("--dtype", default="auto", help="auto, bf16, fp32, fp16")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    p.add_argument("--attention", default="auto", help="auto, triton, sdpa")
    add_flags(p, Settings, title="sampling (defaults: the checkpoint's)", given_only=True)
    args = p.parse_flags(argv)
    for name in ("n", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be 1 or more")
    return args, {f.name: getattr(args, f.name) for f in fields(Settings) if f.name in args}


def main(argv: list[str]) -> None:
    args, given = arguments(argv)
    # All that can be wrong without a model is told before one is loaded.
    shard = parse_shard(args.shard)
    module = find(args.benchmark)
    requests, items = items_of(module, args.items, args.n)
    device = local_device(args.device)
    dtype = parse_dtype(args.dtype, device)
    set_backend(args.attention, device)
    flush_denormals()
    out = Path(args.out)
    about = {"benchmark": args.benchmark, "items": items, "items from": args.items, "n": args.n}
    claim(out, about)

    with alone(out, "generate", shard):
        began = time.perf_counter()
        with contextlib.redirect_stdout(sys.stderr):
            parts = {part: getattr(args, part) for part in PARTS}
            duo = DuoGen.from_pretrained(args.ckpt, **parts, revision=args.revision, dtype=dtype, device=device, asked=given)
        settings = override(duo.defaults, given, "settings")
        dtype = str(dtype).removeprefix("torch.")
        claim(out, about | {"system": duo.sources, "settings": asdict(settings), "dtype": dtype})
        facts = {"load_seconds": round(time.perf_counter() - began, 3), "dtype": dtype}

        # What is there is kept, if it is the same answer: a folder may have been begun with other weights of the same name.
        folder = out / "answers"
        folder.mkdir(exist_ok=True)
        waiting = {}
        problems = []
        for number, request in enumerate(requests):
            if number % shard[1] != shard[0]:
                continue
            try:
                answer = duo.answer(request.messages, settings, number)
            except InputError as e:  # a broken picture or too long a prompt: it costs no other item its answer
                problems.append(f"{request.id}: {e}")
                continue
            asked = asked_for(answer, request.id, dtype)
            file = folder / request.id / "answer.json"
            if not file.is_file():
                # A folder without it is nobody's: an answer appears as a whole.
                waiting[answer] = request.id, asked
            elif read_json(file).get("asked") != asked:
                raise InputError(f"{file}: of another run (its weights or pictures were others): choose another --out")
        mine = sum(n % shard[1] == shard[0] for n in range(len(requests)))
        fill(duo, waiting, folder, facts, args.batch, mine - len(problems))

    if args.lmms_eval:
        answers = Answers(folder, requests)
        there = [(n, r.id) for n, r in enumerate(requests) if answers.has(r.id)]
        lines = [lmms_line(id, n, *answers.files(id), folder) for n, id in there]
        write_text(folder / "lmms_eval.jsonl", "\n".join(lines) + "\n")
    done = sum((folder / r.id / "answer.json").is_file() for r in requests)
    print(f"{done} of {len(requests)} answers: {folder}")
    if problems:
        raise InputError(f"not answered: {first_of(problems)}; what is answered is kept, give the same command again")


def fill(duo: DuoGen, waiting: dict[Answer, tuple[str, str]], folder: Path, facts: dict, batch: int, total: int) -> None:
    """Write the answers that wait, and save each as soon as it is finished."""
    began = time.perf_counter()
    # An answer that this process saves has its place to itself; what a killed one left is hidden and of no use.
    mine = {id for id, _ in waiting.values()}
    for left in unfinished(folder, mine):
        shutil.rmtree(left, ignore_errors=True)
    for id in mine:
        shutil.rmtree(folder / id, ignore_errors=True)
    with tqdm(total=total, initial=total - len(waiting), unit="answer", disable=None) as bar, interrupt.heard():

        def done(answer: Answer) -> None:
            id, asked = waiting[answer]
            seconds = round(time.perf_counter() - began, 3)
            save(folder, id, answer, facts | {"asked": asked, "total_seconds": seconds})
            bar.update()

        duo.write_many(list(waiting), batch=batch, done=done)


def unfinished(folder: Path, ids: set[str]) -> list[Path]:
    """Hidden folders, .ID-PROCESS, of answers with these ids; another rank may be at ID-2 while this one is at ID."""
    found = []
    for left in folder.glob(".*"):
        id, _, process = left.name[1:].rpartition("-")
        if id in ids and process.isdecimal():
            found.append(left)
    return found
