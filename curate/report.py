"""What a run of the engine has done, step by step: counts and seconds from datatrove's statistics, and examples as a page."""

import base64
import io
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from PIL import Image

from checkpoint import InputError
from curate.page import Page, Picture
from pages.template import render
from records.validate import load_image

WORDS = 420  # characters of a text that an example shows
SHOWN = 12  # parts of a page that it shows
SIDE = 144  # pixels of its pictures
KEPT = 2  # examples of each kind, of all tasks together


# -------------------------------------------------------------------------------------------------------------- examples


def thumbnail(picture: Picture) -> str:
    """A small JPEG as a data URL; empty where there is no picture to be seen."""
    if not picture.data:
        return ""
    try:
        image = load_image(picture.data)
    except InputError:
        return ""
    image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(data.getvalue()).decode()


def around(text: str, at: int) -> str:
    """What stands in a text around a place, with dots where something is left out."""
    start = max(0, min(at - WORDS // 3, len(text) - WORDS))
    end = start + WORDS
    return "... " * (start > 0) + text[start:end] + " ..." * (end < len(text))


def first_difference(a: str, b: str) -> int:
    """The first place where two texts differ; 0 where they do not."""
    if a == b:
        return 0
    # Not strict: where one text is the beginning of the other, they differ where it ends.
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def shown(page: Page, at: int) -> list[dict]:
    """The parts of a page around character `at` of its text."""
    out = []
    passed = 0
    for part in page.parts:
        if isinstance(part, Picture):
            # Of a page that was read this far already, nothing stands before the place that is looked at.
            if passed >= at - WORDS:
                out.append({"picture": thumbnail(part), "words": part.caption or part.alt or part.address})
        elif passed + len(part) >= at:
            out.append({"text": around(part, max(0, at - passed))})
            at = min(at, passed)
        passed += 0 if isinstance(part, Picture) else len(part) + 2
        if len(out) == SHOWN:
            break
    return out


def example(kind: str, before: Page, after: Page | None, reason: str) -> dict:
    """One page before and after a step, as JSON: texts shortened around the first difference, pictures small."""
    at = first_difference(before.text, after.text) if after else 0
    lost = []
    if after and kind.startswith("refused"):
        kept = after.pictures
        gone = [picture for picture in before.pictures if picture not in kept]
        reasons = {address: why for address, why in after.refused[len(before.refused) :]}
        wanted = kind.partition(": ")[2]
        for picture in gone:
            why = reasons.get(picture.address, "")
            if why.partition(":")[0] == wanted:
                lost.append({"picture": thumbnail(picture), "words": f"{picture.address}: {why}"})
        lost = lost or [{"picture": "", "words": f"{a}: {why}"} for a, why in reasons.items() if why.startswith(wanted)]
    told = []
    if after and after.messages != before.messages:
        told = [{"role": message["role"], "text": told_by(message)} for message in after.messages]
    return {
        "kind": kind,
        "id": before.id,
        "title": before.title or (after.title if after else "") or before.url,
        "reason": reason,
        "before": [] if lost else shown(before, at),
        "after": shown(after, at) if after and not lost and not told else [],
        "refused": lost[:SHOWN],
        "messages": told,
    }


def told_by(message: dict) -> str:
    """A message in one text, pictures by their numbers."""
    content = message["content"]
    if isinstance(content, str):
        return around(content, 0)
    return around("\n".join(part.get("text") or f"[picture {part['image'] + 1}]" for part in content), 0)


def examples(work: Path) -> dict[str, list[dict]]:
    """Of all tasks those that are shown, by step: for each kind the few whose hash is lowest, whoever had them."""
    kinds = defaultdict(list)
    for path in sorted(work.glob("stage-*/examples/*.json")):
        for each in json.loads(path.read_text(encoding="utf-8", errors="surrogatepass")):
            kept = kinds[each["step"], each["kind"]]
            kept.append(each)
            kept.sort(key=lambda e: (e["order"], e["id"]))
            del kept[KEPT:]
    out = defaultdict(list)
    for (step, _), kept in sorted(kinds.items()):
        out[step] += kept
    return dict(out)


# ---------------------------------------------------------------------------------------------------------------- counts


def statistics(work: Path) -> tuple[dict[str, dict[str, int]], dict[str, float]]:
    """(counts, seconds) by step, of all tasks, from the files that datatrove writes before it marks a task as completed."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    seconds: dict[str, float] = defaultdict(float)
    for path in sorted([*work.glob("stage-*/stats/*.json"), *work.glob("found-*/stats/*.json")]):
        for block in json.loads(path.read_text(encoding="utf-8")):
            name = block["name"].partition(": ")[2]
            seconds[name] += total(block["time_stats"])
            for label, value in block["stats"].items():
                counts[name][label] += int(total(value))
    ordered = {name: dict(sorted(counts[name].items())) for name in sorted(counts)}
    return ordered, {name: round(seconds[name], 3) for name in sorted(seconds)}


def total(value: Any) -> float:
    """Of a metric as datatrove writes it: a number, or an object where it has more than one value."""
    return value["total"] if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------------------------ page


def rows(manifest: dict, seconds: dict[str, float]) -> list[dict]:
    """The steps of the report, in order: name, thresholds, counts by kind."""
    thresholds = {f"{n:02d} {step['name']}": step for n, step in enumerate(manifest["steps"], 1)}
    out = []
    for name, counts in manifest["counts"].items():
        if "in" not in counts:
            continue
        kinds = {label: n for label, n in counts.items() if label.startswith(("dropped: ", "refused: ", "pictures lost"))}
        step = thresholds.get(name, {})
        took = seconds.get(name, 0.0)
        out.append(
            {
                "name": name,
                "in": counts["in"],
                "out": counts.get("out", 0),
                "changed": counts.get("changed", 0),
                "pictures": (counts.get("pictures in", 0), counts.get("pictures out", 0)),
                "seconds": took,
                "rate": f"{counts['in'] / took:,.0f}" if took > 0.0005 else "",
                "kinds": sorted(kinds.items(), key=lambda kind: -kind[1]),
                "thresholds": {key: value for key, value in step.items() if key != "name"},
            }
        )
    return out


def page(manifest: dict, seconds: dict[str, float], shown: dict[str, list[dict]]) -> str:
    """The report, one HTML file."""
    title = f"curate {manifest['command']}"
    return render("curate.html", title=title, manifest=manifest, steps=rows(manifest, seconds), shown=shown)


def in_words(manifest: dict) -> str:
    """What came of a run, in one line for the terminal: records, and what was dropped or refused by kind."""
    lost: dict[str, int] = defaultdict(int)
    for counts in manifest["counts"].values():
        for kind, n in counts.items():
            if kind.startswith(("dropped: ", "refused: ")):
                lost[kind] += n
    reasons = [f"{n:,} {kind}" for kind, n in sorted(lost.items(), key=lambda each: -each[1])]
    return "; ".join([f"{manifest['records']:,} records", *reasons])
