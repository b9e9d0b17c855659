"""What judging a whole benchmark costs: calls, tokens, hours on one GPU.

    python -m evaluate cost runs/e runs/f                        folders that something has been judged in, 20 items or more
    python -m evaluate cost runs/e --mllm 32B --picture 1024 --longer 600

How many calls an item takes, their words and how many pictures they hold is measured: everything that was asked lies in the
folder. The rest is computed. Answers that lacked a picture or a text cost nothing there; they are taken to be whole. Pictures
are taken to be of --picture pixels a side, for those of a miniature are smaller than a real system's, and --longer tokens of
text are put on top of every call, for its answers are short. The judge is this repository's own (`--judge self`), which reads
each question once and writes nothing, or a server, which reads the same and writes --written tokens for an answer in JSON,
--at-once of them together.

Reading takes the FLOPs of flops.py at --mfu of the data sheet, but no less than the weights take on their way from memory.
Writing takes the weights for each token, which those that are written together share; the own judge does so for numbers of two
digits. Nothing of this has been run on that GPU.
"""

import argparse
import json
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from checkpoint import InputError, read_json
from evaluate.answers import items_of, read_run
from evaluate.benchmark import MISSING, find
from evaluate.tables import Table, markdown
from families.registry import PRESETS, family_of, preset
from flags import Parser
from flops import DEVICES, Batch, count, flops
from model import smart_resize

# Items of the benchmarks whose whole is not in the repository, as their authors publish them. CoMM's do not say how many.
WHOLE = {"geneval": 553, "dpg": 1065, "imgedit": 737, "gedit": 604, "interleavedbench": 815, "opening": 2160}
CHARACTERS = 3.7  # of a token of Qwen2.5's vocabulary, measured on what judges of 20 items of each benchmark were asked
TURN = 25  # tokens around a question: the system's turn and the marks of the user's


@dataclass
class Call:
    """A question of the folder: its words, its pictures, how many numbers were wanted, and which of two digits."""

    characters: int
    pictures: int
    kind: str
    long: int


@dataclass
class Cost:
    """Of one call."""

    read: float = 0.0  # tokens
    own: float = 0.0  # seconds
    served: float = 0.0


def arguments(argv: list[str]) -> argparse.Namespace:
    p = Parser("python -m evaluate cost", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folders", nargs="+", metavar="RUN", help="folders of runs that were judged")
    p.add_argument("--mllm", default="7B", choices=[*PRESETS["mllm"]], help="the judge (7B)")
    p.add_argument("--gpu", default="H200", choices=[*DEVICES], help="of which there is one (H200)")
    p.add_argument("--picture", type=int, default=480, help="pixels a side of every picture (480)")
    p.add_argument("--longer", type=int, default=0, help="tokens of text more in every call (0)")
    p.add_argument("--mfu", type=float, default=0.38, help="of the data sheet's FLOP/s while it reads (0.38)")
    p.add_argument("--bandwidth", type=float, default=0.6, help="of the data sheet's bytes/s while it writes (0.6)")
    p.add_argument("--written", type=int, default=60, help="tokens that a server's judge writes for JSON (60)")
    p.add_argument("--at-once", type=int, default=8, help="questions that a server answers together (8)")
    args = p.parse_flags(argv)
    for name in ("picture", "mfu", "bandwidth", "at_once"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be more than 0")
    return args


def main(argv: list[str]) -> None:
    args = arguments(argv)
    rows = [row(Path(folder), args) for folder in args.folders]
    print(markdown(table(rows, args)))


def row(folder: Path, args: argparse.Namespace) -> list:
    """The whole of a run's benchmark -> name, items, of how many measured, calls an item, calls, million tokens read and
    written, hours of the own judge and of a server."""
    run = read_run(folder)
    judged, lacking, calls = asked(folder)
    module = find(run["benchmark"])
    # What is in the repository is counted, what is not is as its authors say, and else there is but this run.
    whole = WHOLE.get(module.NAME, judged)
    if "items from" in run and run["items from"] is None and "hub" not in module.SOURCE:
        whole = len(items_of(module, None, None)[0])
    each = len(calls) / judged / (1 - lacking)
    costs = [cost(call, args) for call in calls]
    written = sum(call.kind == "fields" for call in calls) * args.written
    sums = [sum(c.read for c in costs) / 1e6, written / 1e6]
    sums += [sum(c.own for c in costs) / 3600, sum(c.served for c in costs) / 3600]
    more = each * whole / len(calls)
    return [module.NAME, whole, judged, each, each * whole, *(more * value for value in sums)]


def asked(folder: Path) -> tuple[int, float, list[Call]]:
    """Items judged, the share of scores for which there was nothing to ask, and all that was asked.

    Of several judges that which was asked most: one whose words hold no numbers is asked less.
    """
    calls = defaultdict(list)
    for file in sorted(folder.glob("calls/*/*.json")):
        question = read_json(file)["asked"]
        words = sum(len(part) for part in question["parts"] if isinstance(part, str))
        pictures = sum(not isinstance(part, str) for part in question["parts"])
        long = sum(high >= 10 for _, high in question["keys"].values())
        calls[json.dumps(question["judge"], sort_keys=True)].append(Call(words, pictures, question["kind"], long))
    found = []
    for card in sorted(folder.glob("judged/*/judge.json")):
        rows = [read_json(file) for file in card.parent.glob("*.json") if file != card]
        whys = [score["why"] for row in rows for score in row["scores"].values()]
        theirs = calls[json.dumps(read_json(card)["identity"], sort_keys=True)]
        if theirs and rows:
            found.append((len(rows), whys.count(MISSING) / len(whys), theirs))
    if not found:
        raise InputError(f"{folder}: nothing is judged there: `python -m evaluate judge` does it, 20 items are enough")
    return max(found, key=lambda each: len(each[2]))


def cost(call: Call, args: argparse.Namespace) -> Cost:
    """Tokens and seconds of one question."""
    config = preset("mllm", args.mllm)
    # A judge sees a picture at a size of its own, and merges neighbouring patches into a token.
    patch = config.vision.patch_size
    merge = config.vision.spatial_merge_size
    processor = family_of(config).Processor(patch, merge_size=merge)
    unit = patch * merge
    height, width = smart_resize(args.picture, args.picture, unit, processor.min_pixels, processor.max_pixels)
    text = TURN + call.characters / CHARACTERS + args.longer
    tokens = round(text + call.pictures * (height // unit) * (width // unit))
    grids = [(height // patch, width // patch)] * call.pictures
    forward = sum(f for f, _ in flops(1, config, Batch.of(config, [tokens], grids, supervised=1)).values())
    peak, bandwidth = DEVICES[args.gpu]
    # A pass through the weights in bf16 takes this long, however few tokens it is for.
    weights = 2 * parameters(args.mllm) / (bandwidth * args.bandwidth)
    reading = forward / (peak * args.mfu)
    own = max(reading, weights) + call.long * weights
    written = args.written if call.kind == "fields" else 1
    return Cost(tokens, own, reading + written * weights / args.at_once)


@cache
def parameters(mllm: str) -> int:
    """Of a preset's decoder and its head, which every token goes through."""
    config = preset("mllm", mllm)
    with torch.device("meta"):
        model = family_of(config).Model(config)
    return count(model.model.layers, model.model.norm, model.lm_head)


def table(rows: list[list], args: argparse.Namespace) -> Table:
    measured = ["benchmark", "items", "measured on", "calls an item"]
    head = [*measured, "calls", "M tokens read", "M written", "hours, own", "hours, server"]
    cells = []
    for name, whole, judged, each, calls, *sums in rows:
        cells.append([name, f"{whole:,}", f"{judged:,}", f"{each:.1f}", f"{calls:,.0f}", *(f"{value:.2f}" for value in sums)])
    if len(rows) > 1:
        total = [sum(row[k] for row in rows) for k in (1, 4, 5, 6, 7, 8)]
        cells.append(["all", f"{total[0]:,}", "", "", f"{total[1]:,.0f}", *(f"{value:.2f}" for value in total[2:])])
    gpu, bytes_ = DEVICES[args.gpu]
    notes = [
        ("pictures", f"{args.picture} x {args.picture}; {args.longer} tokens of text more than measured in every call"),
        ("hours, own", f"reading at {args.mfu:.0%} of {gpu / 1e12:.0f} TFLOP/s, one question at a time, nothing written"),
        ("hours, server", f"the same, and {args.written} tokens written for JSON, {args.at_once} answers together, at "
         f"{args.bandwidth:.0%} of {bytes_ / 1e12:.1f} TB/s"),
    ]  # fmt: skip
    return Table(f"Judging by the {args.mllm} on one {args.gpu}, computed", head, cells, notes)
