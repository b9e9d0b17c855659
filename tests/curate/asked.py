"""What the model steps of `curate web` ask on the real pages of ../shared, and what 300,000 such pages take of one GPU.

    python tests/curate/asked.py [PAGES]           for that many pages (300,000)

The calls, their words and pictures are counted: every page goes through all steps, and a script answers as a model would, with
a caption of two sentences, the page's own text, a question. Reorder asks once where the page is found right, eight times at
most; counted is once. Hours are computed, as `python -m evaluate cost` does: reading takes the FLOPs of flops.py at 38 % of the
data sheet, writing takes the weights once for each token of 16 answers that are written together, at 60 % of its bandwidth.
"""

import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))

from curate.models import Asked, Model, prompt_file  # noqa: E402
from curate.page import Dropped, Picture  # noqa: E402
from curate.pictures import Fill, look  # noqa: E402
from curate.read import Files, inputs  # noqa: E402
from curate.web import steps_of  # noqa: E402
from evaluate.cost import CHARACTERS, TURN, parameters  # noqa: E402
from flops import DEVICES, Batch, flops  # noqa: E402
from model import PRESETS, smart_resize  # noqa: E402

MLLM = "7B"
GPU = "H200"
MFU = 0.38
BANDWIDTH = 0.6
AT_ONCE = Model().at_once
HAN = 1.5  # Chinese characters of a token
SIDE = Model().side  # pixels of a picture as it is sent
SENTENCE = "Two hands fold the upper left corner of a white sheet down to its middle."
CAPTION = f'{{"kind": "photo", "caption": "{SENTENCE} {SENTENCE}"}}'
QUESTION = "I have a sheet of paper and half an hour. Could you show me how to fold a boat that really swims?"
PLACED = '{"places": [%s]}'


def tokens_of(text: str) -> float:
    han = sum("\u4e00" <= c <= "\u9fff" for c in text)
    return (len(text) - han) / CHARACTERS + han / HAN


class Counting:
    """Stands where a curate.models.Model does, and counts by step."""

    where = "counting"
    at_once = 1

    def __init__(self):
        self.calls: dict[str, int] = defaultdict(int)
        self.read: dict[str, float] = defaultdict(float)  # tokens
        self.written: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def write_all(self, questions: list[Asked], max_tokens: int = 0) -> list[str]:
        return [self.write(asked) for asked in questions]

    def write(self, asked: Asked, max_tokens: int = 0) -> str:
        words = "\n".join(part for part in asked if isinstance(part, str))
        pictures = [part for part in asked if isinstance(part, Picture)]
        name = next(n for n in ("caption", "rewrite", "reorder", "question") if prompt_file(n)[:40].split("{")[0] in words)
        answer = self.answer(name, words, pictures)
        self.count(name, tokens_of(words), pictures, tokens_of(answer))
        return answer

    def answer(self, name: str, words: str, pictures: list[Picture]) -> str:
        if name == "caption":
            return CAPTION
        if name == "rewrite":
            return words[len(prompt_file("rewrite").replace("{page}", "")) :]
        if name == "reorder":
            return PLACED % ", ".join(f'["{letter}", 10]' for letter in "ABCDEFGHIJKLMNOPQRST"[: len(pictures)])
        return QUESTION

    def count(self, name: str, text: float, pictures: list[Picture], written: float) -> None:
        config = PRESETS[MLLM]
        patch = config.vision.patch_size
        grids = []
        for picture in pictures:
            image = look(picture.data).image
            scale = min(1, SIDE / max(image.size))
            height, width = smart_resize(round(image.height * scale), round(image.width * scale), 28, 3136, 12845056)
            grids.append((height // patch, width // patch))
        read = round(TURN + text + sum(h * w for h, w in grids) / 4)
        forward = sum(f for f, _ in flops(1, config, Batch.of(config, [read], grids, supervised=1)).values())
        peak, bandwidth = DEVICES[GPU]
        weights = 2 * parameters(MLLM) / (bandwidth * BANDWIDTH)
        self.calls[name] += 1
        self.read[name] += read
        self.written[name] += written
        self.seconds[name] += forward / (peak * MFU) + written * weights / AT_ONCE


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 300_000
    howto = ROOT.parent / "shared" / "data" / "howto"
    found, roots = inputs([str(howto / "html")], str(howto))
    source = Files(roots)
    model = Counting()
    for item, _ in found:
        page = next(source.read(item))
        for step in steps_of(Fill(roots), model):
            page = step(page, {}) if hasattr(step, "observe") else step(page)
            if isinstance(page, Dropped):
                break
    more = n / len(found)
    print(f"{len(found)} pages measured; for {n:,} pages, {MLLM} on one {GPU}:\n")
    print("| step | calls a page | M tokens read | M written | hours |\n|---|---|---|---|---|")
    for name in model.calls:
        sums = [more * model.read[name] / 1e6, more * model.written[name] / 1e6, more * model.seconds[name] / 3600]
        print(f"| {name} | {model.calls[name] / len(found):.2f} | {sums[0]:,.0f} | {sums[1]:,.0f} | {sums[2]:,.1f} |")
    totals = [sum(model.calls.values()) / len(found)]
    totals += [more * sum(each.values()) / 1e6 for each in (model.read, model.written)]
    print(f"| all | {totals[0]:.2f} | {totals[1]:,.0f} | {totals[2]:,.0f} | {more * sum(model.seconds.values()) / 3600:,.1f} |")


if __name__ == "__main__":
    main()
