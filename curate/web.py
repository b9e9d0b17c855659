"""Web pages become records: HTML or Markdown files, folders of them, WARC archives.

    python -m curate web pages/ --out data/web                        what lies beside the pages is their pictures
    python -m curate web crawl.warc.gz --out data/web --workers 8     pictures from the archive itself
    python -m curate web pages/ --out data/web --fetch                pictures over HTTP, where they are not at hand
    python -m curate web pages/ --out data/web --set Sides.least=200  another threshold; index.html shows all of them
    python -m curate web pages/ --out data/web --model http://localhost:8000/v1 --model-name Qwen/Qwen2.5-VL-7B-Instruct

The same command goes on where it was ended; see engine.py for what lies in --out.
"""

import argparse
from pathlib import Path

from curate.caption import Caption
from curate.command import add_engine_flags, add_model_flags, make_room, model_of, start, versions, with_thresholds
from curate.dialogue import Dialogue
from curate.duplicates import DifferentPages, DifferentPictures
from curate.engine import Survey, claim
from curate.extract import Extract
from curate.fetch import Fetcher
from curate.models import Model
from curate.page import Step
from curate.pictures import Adverts, Balance, Blurred, Codes, Fill, Plain, Repeated, Sides, Sound
from curate.read import WARC, Archives, Files, index_archives, inputs
from curate.reorder import Asked, Measured, Reorder, Stay
from curate.rewrite import Clean, Rewrite
from curate.text import Adult, Boilerplate, Language, Lengths, Personal, Repetition, WordsPerPicture
from flags import Parser

PACKAGES = (
    "datatrove",
    "trafilatura",
    "lxml",
    "FastWARC",
    "brotli",
    "charset-normalizer",
    "pillow",
    "numpy",
    "pdqhash",
    "zxing-cpp",
)


def steps_of(fill: Fill, model: Model) -> list[Step | Survey]:
    """What a page goes through: what needs its words alone, then pictures, then all pages, and what asks a model last."""
    placers = {"none": Stay(), "self": Measured(model)}
    return [
        Extract(),
        Adverts(),
        Language(),
        Lengths(),
        Repetition(),
        Adult(),
        fill,
        Sound(),
        Sides(),
        Plain(),
        Blurred(),
        Codes(),
        # Surveys: they see all pages.
        Boilerplate(),
        DifferentPages(),
        Repeated(),
        DifferentPictures(),
        WordsPerPicture(),
        Balance(),
        Clean(),
        Personal(),
        Caption(model),
        Rewrite(model),
        Reorder(placers.get(model.where, Asked(model))),
        Dialogue(model),
    ]


def main(argv: list[str] | None = None) -> None:
    parser = Parser(
        "python -m curate web", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("pages", nargs="+", metavar="PAGES", help="files of HTML or Markdown, folders of them, WARC archives")
    parser.add_argument("--root", default="", help="folder under which pictures of local pages lie; default: that of the pages")
    parser.add_argument("--fetch", action="store_true", help="pictures that are not at hand are fetched over HTTP")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two requests to a host (%(default)s)")
    add_model_flags(parser)
    add_engine_flags(parser)
    args = parser.parse_flags(argv)
    found, roots = inputs(args.pages, args.root)
    make_room(args)
    work = Path(args.out).resolve() / "work"
    source = Files(roots)
    files = tuple(str(source.path(name)) for name, _ in found if name.lower().endswith(WARC))
    archives = Archives(files, str(work / "archives.npy")) if files else None
    fetcher = Fetcher(str(work), pause=args.pause) if args.fetch else None
    calls = str(work / "calls") if args.model != "none" else ""
    model = model_of(args, calls)
    model.check()
    steps = with_thresholds(steps_of(Fill(roots, archives, fetcher), model), args.set)
    if files:
        claim(Path(args.out))
        index_archives(files, work / "archives.npy")
    start(
        args,
        name="web",
        source=source,
        steps=tuple(steps),
        inputs=tuple(found),
        settings={"versions": versions(PACKAGES)},
        calls=calls,
        price=args.price,
    )
