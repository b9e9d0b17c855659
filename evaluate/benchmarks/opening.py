"""OpenING (arXiv 2411.18499): 56 tasks, seven criteria from 0 to 10; the overall is the mean of the seven means.

The authors' script drops an entry whose scores are null, so that a system gains by failing where it cannot be judged. Here a
null counts as 0 and "nulls" tells how many items have one; the mean without those entries stands beside as "overall, nulls
dropped". Their script also squeezes pictures to 512 x 512; here they keep their aspect.

From the authors' raw scores (gpt-score_results.json, 11 systems, 1,622 entries, none with a null) this rule gives every mean of
their model_score_summaries.csv. Their overall is a mean of means already rounded to two places: up to 0.01 off, as NExT-GPT's.

Items: OpenING-benchmark/test_data.jsonl with its pictures beside it; without a licence, so nothing of it is in this repository.
"""

from collections.abc import Iterator
from pathlib import Path

from evaluate.benchmark import JUDGED, UNPARSABLE, Answer, Figure, Judge, Request, Verdict, average, floor, grouped, known, mean
from evaluate.rubrics import MARK, asked, at_hand, document, message, read, rubric, split, woven

NAME = "opening"
TITLE = "OpenING: open-ended interleaved answers"
SOURCE = {"id": "github.com/LanceZPF/OpenING", "revision": "56b663b", "file": "OpenING-benchmark/test_data.jsonl",
          "licence": "none stated"}  # fmt: skip
CRITERIA = ("correctness", "image-text coherency", "multi-step consistency", "content quality", "human preference alignment",
            "completeness", "content richness")  # fmt: skip
BY_GPT4O = "Interleaved_Arena/model_score_summaries.csv; entries with nulls dropped"
PUBLISHED = [
    {"system": system, "figures": {"overall, nulls dropped": value}, "judge": "GPT-4o", "source": BY_GPT4O}
    for system, value in (("people", 8.57), ("GPT-4o+DALL-E3", 8.20), ("Anole", 5.75), ("SEED-LLaMA", 5.19), ("Show-o", 4.41))
] + [{"system": "Wan-Weaver", "figures": {"overall": 8.67}, "judge": "not said", "source": "arXiv 2603.25706, its own run"}]


def requests(items: Path | None = None) -> Iterator[Request]:
    file = at_hand(items, SOURCE)
    for item in read(file):
        parts: list[str | Path] = []
        for turn in item["conversations"]:
            for part in turn.get("input", []):
                text = (part.get("text") or "").replace("<BEGIN>", "")
                pictures = [file.parent / part["image"]] if part.get("image") else []
                if not pictures:
                    text = MARK.sub("", text)
                parts += woven(text, pictures)
        yield Request(str(item["total_uid"]), message(*parts), {"task": item["meta_task_name"]})


def score(request: Request, answer: Answer, judge: Judge) -> dict[str, Verdict]:
    written = document(answer)
    if not written:
        return dict.fromkeys(CRITERIA, floor(0.0, "answer"))
    content = ("Request:", *asked(request), "Answer:", *written)
    scores = split(judge, rubric("opening", "document"), *content, keys=dict.fromkeys(CRITERIA, (0, 10)))
    if not answer.pictures:  # how pictures go with the text cannot be judged by the text
        scores["image-text coherency"] = floor(0.0)
    return scores


def aggregate(rows: list[dict]) -> dict[str, Figure]:
    found = {name: mean(rows, name, unjudged=0.0) for name in CRITERIA}
    whole = [row for row in rows if all(row["scores"][name]["value"] is not None for name in CRITERIA)]
    dropped = [sum(known(whole, name)) / len(whole) for name in CRITERIA] if whole else []
    return {
        "overall": average([figure.value for figure in found.values() if figure.n])._replace(n=len(rows)),
        **found,
        "overall, nulls dropped": average(dropped)._replace(n=len(whole)),
        "nulls": average([float(row not in whole) for row in rows]),
    }


def published_rows(file: Path) -> dict[str, list[dict]]:
    """{system: rows} of the authors' own file of raw scores, gpt-score_results.json, in which nulls are left as they are."""
    rows = []
    for entry in read(file):
        raw = entry["score"] or {}
        raw = raw.get("scores", raw)  # the judge wrote it one level deeper now and then
        said = {name.lower(): (value or {}).get("Score") for name, value in raw.items() if isinstance(value, dict | None)}
        numbers = {name: said[name] if isinstance(said.get(name), int | float) else None for name in CRITERIA}
        scores = {name: {"value": v, "why": UNPARSABLE if v is None else JUDGED} for name, v in numbers.items()}
        meta = {"system": entry["model"]["name"]}
        name = entry.get("data_id") or entry["instance_id"]  # the newer of the two files has the latter
        rows.append({"id": name, "meta": meta, "scores": scores})
    return grouped(rows, lambda row: row["meta"]["system"])
