"""How fast: this repository beside what people would use instead, side by side in one process, equal results or no time.

    python -m bench                              everything: on a GPU at full size with random weights, within 8 minutes;
                                                 on a CPU one row a subject, against transformers and diffusers in fp32
    python -m bench --minutes 2                  what matters most in 2 minutes; the file keeps its rows of the rest
    python -m bench --group decode --group vae   these only; the file keeps the rows of the others
    python -m bench --mllm qwen3-vl-2B --dit wan2.1-1.3B    the groups that are about these, into a file of their own
    python -m bench --merge A B --out C          result files of one machine into one; nothing is measured
    python -m bench --smoke                      every row once at toy sizes: does it run, are the results equal
    python -m bench --readme                     the tables of docs/bench into README.md; nothing is measured

Groups of rows run in order of what matters, each in a process of its own: a peer that kills its process, hangs or computes
something else costs one cell. On a GPU all kernels are compiled first, on all cores. Rows are in docs/bench/ as soon as they
are known. measure.py says how a row is made.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch

from bench.groups import MINUTES, ORDER, PARTS, committed, merge, result_file, run
from bench.measure import write_readme
from checkpoint import InputError
from families.registry import PRESETS
from flags import Parser
from training import run_script


def command() -> None:
    parser = Parser(
        "python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--group", action="append", choices=ORDER, help="only this one; may be given several times")
    parser.add_argument("--mllm", choices=PRESETS["mllm"], help="language model (default: 7B on a GPU, else a reduced one)")
    parser.add_argument("--dit", choices=PRESETS["dit"], help="painter (default: 2B on a GPU, else a reduced one)")
    parser.add_argument("--ckpt", metavar="FOLDER", help="whose document is timed (default: the bundled miniature)")
    parser.add_argument("--minutes", type=float, help=f"of the whole run (default: {MINUTES:g} on a GPU, else no end)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument("--out", type=Path, help="result file (default: in docs/bench, cpu.jsonl or gpu_NAME.jsonl; "
                        "out/bench/smoke.jsonl of toy sizes)")  # fmt: skip
    parser.add_argument("--merge", type=Path, nargs="+", metavar="FILE", help="these into the file --out, and end")
    parser.add_argument("--readme", type=Path, metavar="FILE", nargs="*",
                        help="put these files' tables into README.md, and end (default: all of docs/bench)")  # fmt: skip
    args = parser.parse_args()
    if args.readme is not None:
        return write_readme(args.readme or committed())
    if args.merge:
        if args.out is None:
            raise InputError("--merge needs --out: the file that they go into")
        return merge(args.merge, args.out)

    # Where it runs, told before anything is built.
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    present = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    kind = device.partition(":")[0]
    if kind not in present:
        raise InputError(f"--device {args.device}: not on this machine, there is {' and '.join(present)}")

    # Other models than usual, and the groups that are about them.
    given = {"mllm": args.mllm, "dit": args.dit, "ckpt": args.ckpt}
    parts = {part: name for part, name in given.items() if name is not None}
    wanted = args.group or ORDER
    if parts and not args.group:
        wanted = [name for name in ORDER if PARTS.get(name, set()) & parts.keys()]

    # A GPU is lent by the minute; a CPU has all the time that the rows take.
    minutes = args.minutes
    if minutes is None:
        minutes = MINUTES if kind == "cuda" else math.inf
    file = args.out
    if file is None:
        file = Path("out/bench/smoke.jsonl") if args.smoke else result_file(device, parts)
    size = "gpu" if kind == "cuda" else "cpu"
    if args.smoke:
        size = "smoke"
    # In the order of what matters, whatever that of the flags: the last ones are skipped when the time is over.
    groups = [name for name in ORDER if name in wanted]
    sys.exit(1 if run(groups, device, size, file, minutes, parts) else 0)


if __name__ == "__main__":
    run_script(command)
