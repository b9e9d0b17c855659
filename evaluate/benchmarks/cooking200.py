"""200 requests for illustrated recipes and kitchen techniques, written for this project; judged like howto500.

In the manner of Cooking-200 of the DuoGen paper, which is not public; see howto500.py for what that means for the figures.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import Request
from evaluate.benchmarks import howto500
from evaluate.benchmarks.howto500 import aggregate, score

__all__ = ["NAME", "PUBLISHED", "SOURCE", "TITLE", "aggregate", "requests", "score"]

NAME = "cooking200"
TITLE = "Cooking, 200 requests of this project's own"
SOURCE = howto500.SOURCE | {"file": "evaluate/benchmarks/cooking200.json"}
# The paper has not published its requests; ours are written in its manner.
PAPER = {"judge": "GPT-5", "items": "the paper's own requests", "source": "arXiv 2602.00508, second-hand"}
PUBLISHED = [
    {"system": "DuoGen", "figures": {"I-Com": 4.70}, **PAPER},
    {"system": "Nano Banana", "figures": {"I-Com": 4.07}, **PAPER},
    {"system": "Zebra-CoT", "figures": {"I-Com": 2.63}, **PAPER},
]
ITEMS = Path(__file__).parent / "cooking200.json"


def requests(items: Path | None = None) -> Iterator[Request]:
    yield from howto500.requests(items or ITEMS)
