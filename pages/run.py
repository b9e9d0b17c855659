"""The page of a training run, index.html in its folder: curves, newest samples, settings. One file, no scripts, no network.

    write(Path("runs/x"), {"step": 500, "seconds": 840.0, "config": {...}})     from metrics.jsonl and samples/ of that folder
"""

import base64
import html
import io
import json
import math
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

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
CSS = """
:root { color-scheme: light dark; --paper: #fbfaf8; --ink: #1f2328; --quiet: #6b7078; --line: #e3e0da; --curve: #2b6cb0; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181c; --ink: #e4e6ea; --quiet: #9298a2; --line: #2c3038; --curve: #7db4f0; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1.25rem 3rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; -webkit-text-size-adjust: 100%; }
h1 { font-size: 1.35rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .75rem; border-top: 1px solid var(--line); padding-top: 1.25rem; }
.state { color: var(--quiet); margin: .25rem 0 0; }
.bar { height: .4rem; margin: .75rem 0 0; background: var(--line); border-radius: .2rem; overflow: hidden; }
.bar div { height: 100%; background: var(--curve); }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 1.25rem; }
figure { margin: 0; }
figcaption { font-size: .85rem; color: var(--quiet); }
figcaption b { color: var(--ink); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--quiet); font-size: 13px; }
svg line { stroke: var(--line); }
svg circle { fill: var(--curve); }
svg polyline { fill: none; stroke: var(--curve); stroke-width: 1.8; stroke-linejoin: round; }
.now { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: 1.25rem 2.5rem; }
.now figure { grid-row: span 2; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: 1rem; }
article { border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .75rem .75rem;
  display: flex; flex-direction: column; }
article p { margin: 0 0 .35rem; font-size: .9rem; line-height: 1.4; overflow-wrap: anywhere; }
article p b { display: block; font-size: .75rem; color: var(--quiet); }
.asked { border-left: 3px solid var(--curve); padding-left: .6rem; font-weight: 600; }
.told { border-left: 3px solid var(--line); padding-left: .6rem; }
.pictures { display: flex; gap: .5rem; margin-top: auto; padding-top: .25rem; }
.pictures figure { flex: 1; max-width: 9rem; } .pictures figcaption { font-size: .75rem; }
.pictures img { display: block; width: 100%; border-radius: .25rem; }
.painted img { outline: 2px solid var(--curve); } .painted figcaption { color: var(--curve); font-weight: 600; }
.none { aspect-ratio: 1; border: 1px dashed var(--line); border-radius: .25rem; color: var(--quiet); font-size: .75rem;
  display: grid; place-items: center; }
summary { cursor: pointer; color: var(--quiet); margin: 1rem 0 .75rem; }
img { max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: .4rem; background: #fff; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; }
table { border-collapse: collapse; font-size: .85rem; width: 100%; }
td { padding: .15rem .75rem .15rem 0; vertical-align: top; overflow-wrap: anywhere; }
td:first-child { color: var(--quiet); white-space: nowrap; width: 1%; }
"""


def write(folder: Path, about: dict, sheets: int = 2) -> None:
    """Rewrite folder/index.html from its log and its newest sheets of samples; about: training.Run.about."""
    log = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    config, step = about["config"], about["step"]
    steps, last = config["steps"], rows[-1] if rows else {}
    state = f"step {step:,} of {steps:,}, {hours(about['seconds'])} of training"
    state += f", {hours(last['eta_s'])} to go" if last and step < steps else ""
    state += f", {last['skipped']} steps skipped" if last.get("skipped") else ""
    keys = dict.fromkeys(key for row in rows for key in row if key not in HIDDEN)
    known = [k for k in dict.fromkeys((*NAMES, *keys)) if k in keys and k not in TENTHS]
    tenths = [k for k in TENTHS if k in keys]
    drawn = {key: curve(key, [(row["step"], row[key]) for row in rows if key in row], 480 if key == "loss" else 400)
             for key in (*known, *tenths)}  # fmt: skip
    newest = sorted((f for f in (folder / "samples").glob("step_*")), key=lambda f: (len(f.name), f.name))[-sheets:]
    samples = [sample(f) for f in reversed(newest)]
    facts = {k: v for k, v in about.items() if k not in ("config", "step", "seconds", "unlogged_seconds")}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    body = f'<h1>{html.escape(folder.name)}</h1>\n<p class="state">{state}; written {time.strftime("%Y-%m-%d %H:%M")}</p>\n'
    body += f'<div class="bar"><div style="width:{100 * step / max(1, steps):.1f}%"></div></div>\n'
    if drawn.get("loss"):
        values = {title(key, value): number(scaled(key, value)) for key in known[1:] for value in [last_value(rows, key)]}
        body += f'<h2>Loss</h2>\n<div class="now">{drawn.pop("loss")}{table(values)}</div>\n'
    body += f"<h2>Samples after step {number_of(newest[-1]):,}</h2>\n{samples[0]}" if samples else ""
    for file, older in zip(reversed(newest[:-1]), samples[1:], strict=True):
        body += f"<details><summary>after step {number_of(file):,}</summary>\n{older}</details>\n"
    groups = [("Loss by tenths of the noise, 0 being the finished picture and 1 noise alone", tenths), ("Other curves", known)]
    for heading, names in reversed(groups):
        curves = "".join(drawn.get(key, "") for key in names)
        body += f'<h2>{heading}</h2>\n<div class="curves">\n{curves}</div>\n' if curves else ""
    body += f"<h2>Settings</h2>\n{table(config)}\n<h2>Made by</h2>\n{table(facts)}\n"
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f"<title>{html.escape(folder.name)}: step {step:,}</title>\n<style>{CSS}</style>"
    temporary = folder / "index.html.tmp"
    temporary.write_text(f"<!doctype html>\n<html lang=\"en\">\n<head>{head}</head>\n<body>\n{body}</body>\n</html>\n", "utf-8")
    os.replace(temporary, folder / "index.html")


def hours(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 5400 else f"{seconds / 60:.1f} min"


def table(values: dict) -> str:
    cells = (f"<tr><td>{html.escape(str(k))}</td><td>{html.escape(str(v))}</td></tr>" for k, v in values.items())
    return f"<table>{''.join(cells)}</table>"


def number_of(path: Path) -> int:
    """The step of a file of samples."""
    return int(path.stem.removeprefix("step_"))


def sample(path: Path) -> str:
    """The samples of one step, a card each: of a sheet (training.sheet) or of the lists that stage 1 writes."""
    if path.suffix == ".png":
        with Image.open(path) as image:
            image.load()
        if "sheet" not in getattr(image, "text", {}):  # a sheet of an older run is shown as it is
            return f'<img src="{data_url(image)}" alt="{path.stem}">\n'
        made = json.loads(image.text["sheet"])
        cards = ""
        for row in made["rows"]:
            boxes = zip(made["columns"], row["boxes"], strict=True)
            cards += card(row["asked"], row["told"], "text before the picture", boxes, image)
        return f'<div class="cards">{cards}</div>\n'
    found = re.findall(r"^\* asked: (.*)\n\* wrote: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return f'<div class="cards">{"".join(card(asked, wrote, "wrote") for asked, wrote in found)}</div>\n'


def card(asked: str, told: str, how: str, boxes: Iterable[tuple[str, list[int] | None]] = (), image: Image.Image = None) -> str:
    """One sample: what was asked, what was told or written upon it, its pictures cut out of the sheet, each under its name."""
    words = f'<p class="asked"><b>asked</b>{html.escape(asked)}</p>' if asked else ""
    words += f'<p class="told"><b>{how}</b>{html.escape(told)}</p>' if told else ""
    figures = ""
    for name, box in boxes:
        shown = f'<img src="{data_url(image.crop(box))}" alt="">' if box else '<div class="none">none</div>'
        kind = ' class="painted"' if name in ("painted", "decoded") else ""
        figures += f"<figure{kind}><figcaption>{html.escape(name)}</figcaption>{shown}</figure>"
    return f'<article>{words}{f"""<div class="pictures">{figures}</div>""" if figures else ""}</article>\n'


def data_url(image: Image.Image) -> str:
    data = io.BytesIO()
    image.save(data, "PNG")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


def last_value(rows: list[dict], key: str) -> float:
    return next(row[key] for row in reversed(rows) if key in row)


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


def curve(key: str, points: list[tuple[float, float]], width: int = 400) -> str:
    """A line over the steps. The highest 2 % of the values do not set the scale: a start is steep, the rest is of interest."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if not points:
        return ""
    last = points[-1][1]
    name, points = title(key, last), [(x, scaled(key, y, last)) for x, y in points]
    size = math.ceil(len(points) / POINTS)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    points = [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]
    ys = sorted(y for _, y in points)
    low, high = ys[0], ys[min(len(ys) - 1, math.floor(0.98 * len(ys)))]
    x0, x1, span = points[0][0], points[-1][0], (high - low) or abs(high) or 1.0
    place = [
        (LEFT + (width - LEFT - 8) * (x - x0) / ((x1 - x0) or 1), 8 + (HEIGHT - BOTTOM - 16) * (1 - min(1.0, (y - low) / span)))
        for x, y in points
    ]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    end, base = width - 8, HEIGHT - BOTTOM - 8
    lines = "".join(f'<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}"/>' for y in (8, base))
    lines += label(LEFT - 6, base + 4, number(low), "end") + label(LEFT, HEIGHT - 6, f"step {x0:,.0f}", "start")
    if high > low:
        lines += label(LEFT - 6, 14, number(high), "end")
    if x1 > x0:
        lines += label(end, HEIGHT - 6, f"{x1:,.0f}", "end")
    drawing = f'<polyline points="{drawn}"/><circle cx="{place[-1][0]:.1f}" cy="{place[-1][1]:.1f}" r="3"/>'
    svg = f'<svg viewBox="0 0 {width} {HEIGHT}" role="img">{lines}{drawing}</svg>'
    return f"<figure><figcaption>{html.escape(name)} <b>{number(points[-1][1])}</b></figcaption>{svg}</figure>\n"


def label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
