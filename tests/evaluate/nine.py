"""All benchmarks end to end: answers of the miniature, judged by its own language model and by a real server, and reported.

    python tests/evaluate/nine.py runs/nine --n 20          a table of what came of it; the pages are runs/nine/*/report.html

tests/evaluate/test_nine.py does the same with two items each. Given again, it goes on where it ended.
"""

import argparse
import json
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent))

import published
import served

from checkpoint import InputError
from evaluate import figures, generate, judging
from evaluate.benchmark import names
from evaluate.tables import Table, markdown

WRITTEN = 64  # tokens of the server's judge: the miniature comes to no end of its own
WHYS = ["judged", "refused", "unparsable", "missing"]
HEAD = ["benchmark", "items", "pictures", "judge", "calls", "calls/s", *WHYS, "figure"]


def run(out: Path, name: str, n: int, shared: Path | None, url: str, model: str, *sampling: str) -> list[list[str]]:
    """One benchmark through the three commands -> a row of the table for each judge; its rate counts the loading of it."""
    items = out.parent / "items" / name
    if name not in published.OWN and not items.is_dir():
        published.write_items(items.parent, name, n, shared)
    given = [] if name in published.OWN else ["--items", str(items)]
    place = ["--out", str(out)]
    generate.main([name, *place, *given, "--n", str(n), *sampling])
    seconds = {}
    for judge in (["self", "--device", "cpu"], [url, "--judge-model", model, "--max-tokens", str(WRITTEN)]):
        began = time.perf_counter()
        judging.main([name, *place, "--judge", *judge])
        seconds[judge[0]] = time.perf_counter() - began
    figures.main([*place, "--draws", "200"])
    report = json.loads((out / "report.json").read_text())
    pictures = len(list(out.glob("answers/*/image_*.png")))
    rows = []
    for judged in report["judges"]:
        counts = Counter()
        for count in judged["counts"].values():
            counts.update(count)
        key, figure = next(iter(judged["figures"].items()))
        value = "-" if figure["value"] is None else f"{figure['value']:.2f} ({figure['low']:.2f}-{figure['high']:.2f})"
        own = judged["judge"].startswith("self")
        asked = calls(out, judged["identity"])
        rate = asked / seconds["self" if own else url]
        cells = [name, judged["items"], pictures, "self" if own else "server", asked, f"{rate:.1f}", *counts.values()]
        rows.append([*map(str, cells), f"{key} {value}"])
    return rows


def calls(out: Path, identity: dict) -> int:
    """Questions that this judge was asked."""
    return sum(json.loads(file.read_text())["asked"]["judge"] == identity for file in out.glob("calls/*/*.json"))


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("out", type=Path)
    p.add_argument("--n", type=int, default=20)
    p.add_argument("--only", help="names of benchmarks, separated by commas")
    args = p.parse_args()
    shared = served.ROOT.parent / "shared" / "data"
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with served.served(args.out / f"server-{int(time.time())}") as (url, model):
        for name in args.only.split(",") if args.only else names():
            try:
                rows += run(args.out / name, name, args.n, shared if shared.is_dir() else None, url, model)
            except InputError as e:
                print(f"{name}: {e}", file=sys.stderr)
    table = markdown(Table("All benchmarks, judged by the miniature's own language model and by a server", HEAD, rows))
    (args.out / "table.md").write_text(table + "\n")
    print(table)


if __name__ == "__main__":
    main()
