"""The page of a training run, index.html in its folder: curves, newest samples, settings. One file, no scripts, no network.

    write(Path("runs/x"), {"step": 500, "seconds": 840.0, "config": {...}})     from metrics.jsonl and samples/ of that folder
"""

import base64
import html
import json
import math
import os
import time
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 520, 200, 56, 22  # of a curve, in the units of its own drawing
POINTS = 400  # a curve shows at most so many means of neighbouring values
HIDDEN = ("step", "seconds", "eta_s", "skipped")
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
svg polyline { fill: none; stroke: var(--curve); stroke-width: 1.8; stroke-linejoin: round; }
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
    curves = "".join(curve(key, [(row["step"], row[key]) for row in rows if key in row]) for key in keys)
    newest = sorted((f for f in (folder / "samples").glob("step_*")), key=lambda f: (len(f.name), f.name))[-sheets:]
    samples = "".join(sample(f) for f in reversed(newest))
    facts = {k: v for k, v in about.items() if k not in ("config", "step", "seconds", "unlogged_seconds")}
    facts["versions"] = ", ".join(f"{k} {v}" for k, v in about["versions"].items())
    body = f'<h1>{html.escape(folder.name)}</h1>\n<p class="state">{state}; written {time.strftime("%Y-%m-%d %H:%M")}</p>\n'
    body += f'<div class="bar"><div style="width:{100 * step / max(1, steps):.1f}%"></div></div>\n'
    body += f'<h2>Curves</h2>\n<div class="curves">\n{curves}</div>\n' if curves else ""
    body += f"<h2>Samples</h2>\n{samples}" if samples else ""
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


def sample(path: Path) -> str:
    caption = f"<p class=\"state\">{html.escape(path.stem.replace('_', ' '))}</p>"
    if path.suffix == ".png":
        return f'{caption}<img src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}" alt="{path.stem}">\n'
    return f"{caption}<pre>{html.escape(path.read_text())}</pre>\n"


def curve(name: str, points: list[tuple[float, float]]) -> str:
    """A line over the steps. The highest 2 % of the values do not set the scale: a start is steep, the rest is of interest."""
    points = [(x, y) for x, y in points if math.isfinite(y)]
    size = math.ceil(len(points) / POINTS) or 1
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    points = [tuple(sum(values) / len(group) for values in zip(*group, strict=True)) for group in groups]
    if not points:
        return ""
    ys = sorted(y for _, y in points)
    low, high = ys[0], ys[min(len(ys) - 1, math.floor(0.98 * len(ys)))]
    x0, x1, span = points[0][0], points[-1][0], (high - low) or abs(high) or 1.0
    place = [
        (LEFT + (WIDTH - LEFT - 8) * (x - x0) / ((x1 - x0) or 1), 8 + (HEIGHT - BOTTOM - 16) * (1 - min(1.0, (y - low) / span)))
        for x, y in points
    ]
    drawn = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    end, base = WIDTH - 8, HEIGHT - BOTTOM - 8
    lines = "".join(f'<line x1="{LEFT}" x2="{end}" y1="{y}" y2="{y}"/>' for y in (8, base))
    lines += "".join(label(LEFT - 6, y + 4, f"{value:.3g}", "end") for value, y in ((high, 8), (low, base)))
    lines += label(LEFT, HEIGHT - 4, f"{x0:,.0f}", "start") + label(end, HEIGHT - 4, f"{x1:,.0f}", "end")
    title = f"{html.escape(name.replace('_per_s', ' per s').replace('_', ' '))} <b>{points[-1][1]:.4g}</b>"
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{lines}<polyline points="{drawn}"/></svg>'
    return f"<figure><figcaption>{title}</figcaption>{svg}</figure>\n"


def label(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'
