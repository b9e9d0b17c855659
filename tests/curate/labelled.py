"""How well the picture rules agree with labels that were given by looking at contact sheets.

    python tests/curate/labelled.py      precision and recall of refusing, for other published thresholds as well

labels.json has 616 pictures of ../shared/data/howto, drawn at random, and all of ../shared/data/photos that open: "keep", or
why not. Thresholds were settled with the set called "seen" in sight; "unseen" was labelled afterwards.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.page import Page, Picture  # noqa: E402
from curate.pictures import Blurred, Codes, Plain, Sides, Sound  # noqa: E402

LABELS = json.loads((Path(__file__).parent / "labels.json").read_text())
DATA = ROOT.parent / "shared" / "data"
OURS = (Sound(), Sides(), Plain(), Blurred(), Codes())
OTHERS = {
    "ours": OURS,
    "sides of 150, aspect 2 (OBELICS)": (Sound(), Sides(150, 20_000, 2.0), Plain(), Blurred(), Codes()),
    "sides of 150, aspect 2.2": (Sound(), Sides(150, 20_000, 2.2), Plain(), Blurred(), Codes()),
    "blur below 100 (NeMo Curator)": (Sound(), Sides(), Plain(), Blurred(100.0), Codes()),
}


def reason_of(data: bytes, steps: tuple) -> str:
    """Why a picture is refused; empty where it is not."""
    page = Page("1", parts=("Words.", Picture("picture").filled(data)))
    for step in steps:
        page = step(page)
    return page.refused[0].reason if page.refused else ""


def main() -> None:
    print("| thresholds | set | pictures | to refuse | refused | precision | recall |\n|---|---|---|---|---|---|---|")
    for name, steps in OTHERS.items():
        for half in ("seen", "unseen"):
            rows = [row for row in LABELS.values() if row["set"] == half]
            found = [(row, reason_of((DATA / row["file"]).read_bytes(), steps)) for row in rows]
            wanted = sum(row["label"] != "keep" for row, _ in found)
            refused = sum(bool(reason) for _, reason in found)
            right = sum(row["label"] != "keep" and bool(reason) for row, reason in found)
            print(f"| {name} | {half} | {len(rows)} | {wanted} | {refused} | {right / refused:.3f} | {right / wanted:.3f} |")
            if steps is OURS:
                for row, reason in found:
                    if bool(reason) != (row["label"] != "keep"):
                        print(f"  {row['file']}: labelled {row['label']}, {reason or 'kept'}", file=sys.stderr)


if __name__ == "__main__":
    main()
