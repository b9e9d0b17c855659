"""One page, and what every step of `curate web` makes of it: why it was dropped, where a picture went, which words are new.

    python -m curate show curate/example/cat.html
    python -m curate show pages/pizza.html --root pages --set Sides.least=200
    python -m curate show pages/pizza.html --model http://localhost:8000/v1 --model-name Qwen/Qwen2.5-VL-7B-Instruct

A line that a step takes out begins with -, one that it brings with +, and a picture that it refuses with !. Steps that look at
all pages see this one alone: here nothing stands on many pages.
"""

import argparse
import difflib
from collections.abc import Iterator
from functools import partial

from checkpoint import InputError
from curate.command import add_model_flags, model_of, with_thresholds
from curate.engine import Valid, attempt
from curate.page import Dropped, Page, Picture, Step
from curate.pictures import Fill
from curate.read import WARC, Files, inputs
from curate.text import count_words
from curate.web import steps_of
from flags import Parser

WIDTH = 118  # characters of a line that is shown


def stages(page: Page, steps: list[Step]) -> Iterator[tuple[str, Page, Page | Dropped]]:
    """(name of a step, the page before it, what it made of it), until one drops the page."""
    for step in steps:
        name = type(step).__name__
        call = step
        if hasattr(step, "observe"):
            observed = step.observe(page)
            found = step.conclude(iter([] if observed is None else [(page.id, observed)]))
            call = partial(step, found=found)
        after = attempt(call, page, name)
        yield name, page, after
        if isinstance(after, Dropped):
            return
        page = after


def lines_of(page: Page) -> list[str]:
    """A page as lines of text, each picture a line of its own."""
    lines = [f"title: {page.title}"] if page.title else []
    lines += [f"language: {page.language}"] if page.language else []
    for part in page.parts:
        if isinstance(part, Picture):
            words = part.caption or part.alt
            kind = f" ({part.kind})" if part.kind else ""
            lines.append(f"[{part.address}{kind}: {words}]")
        else:
            lines += [line for line in part.splitlines() if line.strip()]
    return lines


def changes(before: Page, after: Page) -> list[str]:
    """What is new and what is gone, in lines."""
    out = []
    for line in difflib.unified_diff(lines_of(before), lines_of(after), n=0, lineterm=""):
        if not line.startswith(("---", "+++", "@@")):
            out.append(f"{line[0]} {line[1:]}")
    out += [f"! {refused.address}: {refused.reason}" for refused in after.refused[len(before.refused) :]]
    if after.messages != before.messages:
        out += [line for message in after.messages for line in told(message, after.pictures)]
    return out


def told(message: dict, pictures: list[Picture]) -> list[str]:
    """A message of the dialogue, in lines."""
    out = [f"+ {message['role']}:"]
    for part in message["content"]:
        if part["type"] == "image":
            out.append(f"+     [{pictures[part['image']].address}]")
        else:
            out += [f"+     {line}" for line in part["text"].splitlines() if line.strip()]
    return out


def short(line: str) -> str:
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 4]} ..."


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "python -m curate show", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("page", metavar="PAGE", help="a file of HTML or Markdown")
    parser.add_argument("--root", default="", help="folder under which its pictures lie; default: its own")
    parser.add_argument("--set", action="append", default=[], metavar="STEP.FIELD=VALUE", help="another threshold")
    parser.add_argument("--whole", action="store_true", help="lines are not cut")
    add_model_flags(parser)
    args = parser.parse_flags(argv)
    found, roots = inputs([args.page], args.root)
    if len(found) != 1 or found[0][0].lower().endswith(WARC):
        raise InputError(f"{args.page}: must be one file of HTML or Markdown")
    page = next(Files(roots).read(found[0][0]))
    if isinstance(page, Dropped):
        raise InputError(page.reason)
    model = model_of(args)
    model.check()
    steps = [*with_thresholds(steps_of(Fill(roots), model), args.set), Valid()]
    for number, (name, before, after) in enumerate(stages(page, steps), 1):
        if isinstance(after, Dropped):
            print(f"{number:02d} {name}: dropped: {after.reason}")
            return
        lines = changes(before, after)
        # What Extract takes out is the page's whole HTML.
        if name == "Extract":
            lines = [line for line in lines if not line.startswith("- ")]
        size = f"{count_words(after.text):.0f} words, {len(after.pictures)} pictures"
        print(f"{number:02d} {name}: {size if lines else 'as it was'}")
        for line in lines:
            print(f"   {line if args.whole else short(line)}")
