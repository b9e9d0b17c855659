"""The last picture of several checkpoints' answers to the same requests, side by side.

    python tests/families/sheet.py runs/tiny-tiny runs/tiny-tiny-wan ... docs/pairs.png
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from pipeline import DuoGen  # noqa: E402
from training import sheet  # noqa: E402

REQUESTS = [
    "Draw a red heart.",
    "Draw three green squares.",
    "I would like a picture of a blue boat.",
    "How do I draw a yellow house?",
    "Show me step by step how to draw a black cat.",
    "Draw a purple car to the left of a green tree.",
    "Tell me a story about a yellow duck.",
]


def main() -> None:
    *checkpoints, out = sys.argv[1:]
    pictures = []
    for checkpoint in checkpoints:
        duo = DuoGen.from_pretrained(checkpoint)
        answers = duo.generate_many(REQUESTS, duo.settings(max_tokens=400))
        pictures.append([answer.pictures[-1].image if answer.pictures else None for answer in answers])
    rows = [(request, "", list(found)) for request, found in zip(REQUESTS, zip(*pictures, strict=True), strict=True)]
    sheet(rows, [Path(checkpoint).name for checkpoint in checkpoints], out, height=128, wrap=32)


if __name__ == "__main__":
    main()
