"""Adapters and their base become one checkpoint, which needs neither of them.

    python -m tools.merge runs/stage1 merged/mllm            the newest checkpoint of a run trained with --lora
    python -m tools.merge runs/stage2/step_004000/dit merged/dit --dtype bf16

Reading a checkpoint adds its adapters already (lora.py), so merging is reading and writing.
"""

import argparse
import sys
from pathlib import Path

from checkpoint import InputError, make_out, parse_dtype, part_folder, parts_in
from dit import DiT
from flags import Parser
from lora import CONFIG
from model import MLLM, ImageProcessor
from tokenizer import Tokenizer
from training import run_script


def adapters_in(source: str) -> tuple[str, Path]:
    """(part, its folder) of a run, a checkpoint or a part's own folder; InputError where there are no adapters."""
    path = Path(source)
    held = [part for part in ("mllm", "dit") if part in parts_in(path)]
    part = held[0] if held else path.name
    if part not in ("mllm", "dit"):
        raise InputError(f"{source}: holds neither mllm nor dit: name a run trained with --lora, or the folder of a part")
    folder = part_folder(source, part)
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder}: holds no {CONFIG}: these weights are whole already")
    return part, folder


def main(argv: list[str]) -> None:
    p = Parser("python -m tools.merge", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("source", help="a run trained with --lora, one of its checkpoints, or the folder of a part")
    p.add_argument("out", help="folder of the merged part")
    p.add_argument("--dtype", default="fp32", help="of the file: fp32, bf16, fp16 (fp32)")
    args = p.parse_flags(argv)
    part, folder = adapters_in(args.source)
    out = Path(args.out)
    make_out(out)
    model = {"mllm": MLLM, "dit": DiT}[part].from_pretrained(folder)
    model.to(parse_dtype(args.dtype)).save_pretrained(out)
    if part == "mllm":
        Tokenizer.from_pretrained(folder).save_pretrained(out)
        ImageProcessor.from_pretrained(folder).save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
