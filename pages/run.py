"""The page of a training run, index.html in its folder: curves, newest samples, settings. One file, no scripts, no network.

    write_page(Path("runs/x"), {"step": 500, "seconds": 840.0, "config": {...}})  from its metrics.jsonl and samples/
"""

import json
import math
import os
import re
import time
from pathlib import Path

from markupsafe import Markup
from PIL import Image

from pages.template import data_url, render

HEIGHT, LEFT, BOTTOM = 200, 64, 24  # of a curve, in the units of its own drawing
POINTS = 400  # a curve shows at most so many means of neighbouring values
HIDDEN = ("step", "seconds", "eta_s", "skipped")
# What is logged, in the order of the page, as its reader would call it.
NAMES = {
    "loss": "loss",
    "text": "loss on the words of answers",
    "bov": "loss on saying that a picture is due",
    "end": "loss on ending the answer",
    "l1": "difference of pixels, mean",
    "edges": "difference of edges, mean",
    "kl": "KL divergence from unit noise",
    "psnr": "signal to noise (PSNR), dB",
    "t<.6": "loss at noise 0 to 0.6: near data",
    "t<.85": "loss at noise 0.6 to 0.85: midway",
    "t<1": "loss at noise 0.85 to 1: near noise",
    "grad": "length of the gradient",
    "lr": "learning rate",
    "images_per_s": "pictures a second",
    "documents_per_s": "documents a second",
    "tokens_per_s": "tokens a second",
    "flops_per_s": "computing, {}FLOP/s",
    "mfu": "share of the device's peak (MFU), %",
    "fill": "how full a micro-batch is, %",
    "memory_gb": "memory held at most, GB",
}
TENTHS = {f"t{k}": f"noise {k / 10:.1f} to {(k + 1) / 10:.1f}" for k in range(10)}
TENTHS |= {"t0": f"{TENTHS['t0']}: near data", "t9": f"{TENTHS['t9']}: near noise"}


def write_page(folder: Path, about: dict, sheets: int = 2) -> None:
    """Rewrite folder/index.html from its log and its newest sheets of samples; about: training.Run.about."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    config, step = about["config"], about["step"]
    facts = {k: v for k, v in about.items() if k not in ("config", "step", "seconds", "unlogged_seconds")}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in about["versions"].items())

    files = sorted((folder / "samples").glob("step_*"), key=lambda f: (len(f.name), f.name))[-sheets:]
    page = render(
        "run.html",
        title=f"{folder.name}: step {step:,}",
        name=folder.name,
        state=state(rows[-1] if rows else {}, about),
        percent=100 * step / max(1, config["steps"]),
        samples=[(int(f.stem.removeprefix("step_")), sample(f)) for f in reversed(files)],
        config=config,
        facts=facts,
        **statistics(rows),
    )
    # A browser that asks meanwhile gets the page before this one.
    temporary = folder / "index.html.tmp"
    temporary.write_text(page, "utf-8")
    os.replace(temporary, folder / "index.html")


def statistics(rows: list[dict]) -> dict:
    """What is logged: the curve of the loss, the newest values of the rest, and their curves by heading."""
    # First what the page has a name for, in its order; the tenths of the noise stand by themselves.
    keys = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
    known = [k for k in dict.fromkeys((*NAMES, *keys)) if k in keys and k not in TENTHS]
    tenths = [k for k in TENTHS if k in keys]
    curves = {}
    for key in (*known, *tenths):
        points = [(row["step"], row[key]) for row in rows if key in row]
        if drawn := curve(key, points, 480 if key == "loss" else 400):
            curves[key] = drawn
    loss = curves.pop("loss", None)  # it stands before the others
    groups = {
        "Other curves": known,
        "Loss by tenths of the noise, 0 being the finished picture and 1 noise alone": tenths,
    }
    newest = {}
    for key in known[1:]:
        value = next(row[key] for row in reversed(rows) if key in row)
        newest[title(key, value)] = number(scaled(key, value))
    return {
        "loss": loss,
        "newest": newest,
        "groups": {heading: [curves[key] for key in keys if key in curves] for heading, keys in groups.items()},
    }


def state(last: dict, about: dict) -> str:
    """How far the run is; last: the newest line of its log."""
    step, steps = about["step"], about["config"]["steps"]
    text = f"step {step:,} of {steps:,}, {hours(about['seconds'])} of training"
    if last and step < steps:
        text += f", {hours(last['eta_s'])} to go"
    if last.get("skipped"):
        text += f", {last['skipped']} steps skipped"
    return f"{text}; written {time.strftime('%Y-%m-%d %H:%M')}"


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def sample(path: Path) -> Markup:
    """The samples of one step, a card each: of a sheet (training.sheet) or of the lists that stage 1 writes."""
    if path.suffix != ".png":
        found = re.findall(r"^\* asked: (.*)\n\* wrote: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        cards = [{"asked": asked, "told": wrote, "pictures": []} for asked, wrote in found]
        return Markup(render("samples.html", cards=cards, how="wrote"))
    with Image.open(path) as image:
        image.load()
    if "sheet" not in getattr(image, "text", {}):  # a sheet of an older run is shown as it is
        return Markup('<img src="{}" alt="{}">').format(data_url(image), path.stem)
    # The pictures are cut out of the sheet, each under the name of its column.
    made, cards = json.loads(image.text["sheet"]), []
    for row in made["rows"]:
        boxes = zip(made["columns"], row["boxes"], strict=True)
        pictures = [(name, image.crop(box) if box else None) for name, box in boxes]
        cards.append({"asked": row["asked"], "told": row["told"], "pictures": pictures})
    return Markup(render("samples.html", cards=cards, how="text before the picture"))


def prefix(value: float) -> tuple[float, str]:
    """What to divide by, and the letter that says so."""
    return next(((size, letter) for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G")) if value >= size), (1e6, "M"))


def scaled(key: str, value: float, like: float | None = None) -> float:
    """A logged value in the unit that its title names; like: the value that chooses the unit, by default itself."""
    if key == "flops_per_s":
        return value / prefix(value if like is None else like)[0]
    return 100 * value if key in ("mfu", "fill") else value


def title(key: str, value: float) -> str:
    """What a curve shows, with its unit; value: the newest."""
    return (NAMES | TENTHS).get(key, key.replace("_per_s", " a second").replace("_", " ")).format(prefix(value)[1])


def number(value: float) -> str:
    """Three digits or so, in seven characters at most (eight with a sign)."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, power = f"{value:.1e}".split("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def curve(key: str, points: list[tuple[float, float]], width: int = 400) -> Markup | None:
    """A line over the steps. The highest 2 % of the values do not set the scale: a start is steep, the rest is of interest."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return None
    last = points[-1][1]
    points = [(x, scaled(key, y, last)) for x, y in points]
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    points = [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]

    ys = sorted(y for _, y in points)
    low, high = ys[0], ys[math.floor(0.98 * len(ys))]
    x0, x1 = points[0][0], points[-1][0]
    tall, wide = (high - low) or abs(high) or 1.0, (x1 - x0) or 1  # a line that is level, a single point
    top, base, right = 8, HEIGHT - BOTTOM - 8, width - 8
    placed = []
    for x, y in points:
        across, up = (x - x0) / wide, min(1.0, (y - low) / tall)
        placed.append((f"{LEFT + (right - LEFT) * across:.1f}", f"{base - (base - top) * up:.1f}"))

    labels = [(LEFT - 6, base + 4, "end", number(low)), (LEFT, HEIGHT - 6, "start", f"step {x0:,.0f}")]
    if high > low:
        labels.append((LEFT - 6, top + 6, "end", number(high)))
    if x1 > x0:
        labels.append((right, HEIGHT - 6, "end", f"{x1:,.0f}"))
    said = {"title": title(key, last), "newest": number(points[-1][1]), "labels": labels}
    drawn = {"width": width, "height": HEIGHT, "left": LEFT, "right": right, "rules": (top, base), "points": placed}
    return Markup(render("curve.html", **said, **drawn))
