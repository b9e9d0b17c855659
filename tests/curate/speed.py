"""What each step of `curate web` takes of one core, on the real pages of ../shared: pages and pictures a second of CPU time.

    python tests/curate/speed.py

CPU time, since other programs may be at work on the machine. Decoding is part of Sound, which comes first; the steps behind it
find the picture decoded.
"""

import sys
import time
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.engine import Valid  # noqa: E402
from curate.models import Model  # noqa: E402
from curate.page import Dropped  # noqa: E402
from curate.pictures import Fill  # noqa: E402
from curate.read import Files, inputs  # noqa: E402
from curate.web import steps_of  # noqa: E402


def main() -> None:
    howto = ROOT.parent / "shared" / "data" / "howto"
    found, roots = inputs([str(howto / "html")], str(howto))
    source = Files(roots)
    steps = [*steps_of(Fill(roots), Model()), Valid()]
    seconds: dict[str, float] = defaultdict(float)
    pages: dict[str, int] = defaultdict(int)
    pictures: dict[str, int] = defaultdict(int)

    def timed(name: str, call, *args):
        began = time.process_time()
        result = call(*args)
        seconds[name] += time.process_time() - began
        return result

    for item, _ in found:
        page = timed("Read", lambda item=item: next(source.read(item)))
        pages["Read"] += 1
        for step in steps:
            name = type(step).__name__
            pages[name] += 1
            pictures[name] += len(page.pictures)
            if hasattr(step, "observe"):
                timed(f"{name} observes", step.observe, page)
                pages[f"{name} observes"] += 1
                pictures[f"{name} observes"] += len(page.pictures)
                page = timed(name, step, page, {})
            else:
                page = timed(name, step, page)
            if isinstance(page, Dropped):
                break
    print("| step | ms a page | pages/s | pictures/s |\n|---|---|---|---|")
    for name, took in seconds.items():
        per_page = 1000 * took / pages[name]
        shown = f"{pictures[name] / took:,.0f}" if pictures[name] else "-"
        print(f"| {name} | {per_page:.2f} | {pages[name] / took:,.0f} | {shown} |")
    total = sum(seconds.values())
    print(f"| all | {1000 * total / len(found):.2f} | {len(found) / total:,.1f} | {pictures['Sound'] / total:,.0f} |")


if __name__ == "__main__":
    main()
