"""Items of every benchmark in the form in which its authors publish them, written to a folder.

What is real is taken where it is at hand (prompts of GenEval, ImgEdit and GEdit in ../shared/data). Pictures, which are not at
hand, are pages of the sketchbook. The rest is this project's own: not a word of a benchmark without a licence is here.
"""

import csv
import json
from pathlib import Path

from PIL import Image

from checkpoint import read_json
from sketchbook import dialogues

OWN = ("howto500", "cooking200")  # whose items are in the repository
TASKS = ("wikihow_next_step", "vist", "activitynet", "image_editing", "subject_driven")  # of InterleavedBench
GROUPS = ("Story", "How-to", "Travel", "Brainstorming")
COLUMNS = ("item_id", "text", "keywords", "proposition_id", "dependency", "category_broad", "category_detailed", "tuple",
           "question_natural_language")  # fmt: skip


def page(seed: int) -> tuple[str, Image.Image]:
    """What a picture of the sketchbook shows, in the words before it, and the picture."""
    for number in range(seed * 20, seed * 20 + 20):
        for turn in dialogues.dialogue(number)["messages"]:
            parts = turn["content"]
            for words, picture in zip(parts, parts[1:], strict=False):
                if turn["role"] == "assistant" and words["type"] == "text" and picture["type"] == "image":
                    return words["text"], picture["image"]
    raise AssertionError(f"no picture in twenty dialogues from {seed * 20}")


def picture(file: Path, seed: int, width: int = 96) -> str:
    """A page wider than high, so that a judge that squeezes pictures would be found out."""
    file.parent.mkdir(parents=True, exist_ok=True)
    page(seed)[1].resize((width, 64)).save(file)
    return file.name


def write_items(folder: Path, name: str, n: int, shared: Path | None = None) -> Path | None:
    """The first n items of a benchmark in a folder of its own -> what --items takes; None where they are in the repository.

    shared: real data, if there is any.
    """
    if name in OWN:
        return None
    out = folder / name
    out.mkdir(parents=True)
    WRITERS[name](out, n, shared)
    return out


def geneval(out: Path, n: int, shared: Path | None) -> None:
    if shared:
        # Eight sorts of prompts stand one behind the other: every so many lines one, so that all are in.
        lines = (shared / "geneval/evaluation_metadata.jsonl").read_text().splitlines()
        lines = lines[:: max(1, len(lines) // n)][:n]
    else:
        item = {"tag": "single_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}
        lines = [json.dumps(item)] * n
    (out / "evaluation_metadata.jsonl").write_text("\n".join(lines) + "\n")


def edits(out: Path, file: str, items: dict) -> None:
    for k, item in enumerate(items.values()):
        picture(out / item["id"], k)
    (out / file).write_text(json.dumps(items))


def imgedit(out: Path, n: int, shared: Path | None) -> None:
    own = {str(k): {"id": f"animal/{k}.jpg", "prompt": "Make it blue.", "edit_type": "alter"} for k in range(n)}
    edits(out, "basic_edit.json", some(read_json(shared / "imgedit/basic_edit.json"), n) if shared else own)


def gedit(out: Path, n: int, shared: Path | None) -> None:
    own = {f"k{k}": {"id": f"color_alter/{k}.png", "prompt": "Make it blue.", "edit_type": "color_alter"} for k in range(n)}
    edits(out, "gedit_edit.json", some(read_json(shared / "gedit/gedit_edit.json"), n) if shared else own)


def some(items: dict, n: int) -> dict:
    """n of them from all over the file, whose groups stand one behind the other."""
    keys = list(items)[:: max(1, len(items) // n)][:n]
    return {key: items[key] for key in keys}


def dpg(out: Path, n: int, shared: Path | None) -> None:
    rows = []
    for k in range(n):
        words, _ = page(k)
        asked = (("0", "entity", "Is there a drawing?"), ("1", "attribute", "Has it more than one colour?"),
                 ("1,2", "relation", "Does one part touch another?"))  # fmt: skip
        for number, (dependency, category, question) in enumerate(asked, 1):
            rows.append([f"own{k}", words, "", number, dependency, category, category, category, question])
    with open(out / "dpg_bench.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([COLUMNS, *rows])


def comm(out: Path, n: int, shared: Path | None) -> None:
    for k in range(n):
        task = k % 4 + 1
        words, _ = page(k)
        folder = out / f"own{k}_task{task}"
        # Task 1 and 3 give pictures, task 2 and 4 words alone.
        given = [picture(folder / f"input_{i}.jpg", k + i) for i in (1, 2)] if task in (1, 3) else []
        asked = {
            1: "Here are pictures of a lesson: (1) <IMAGE> (2) <IMAGE> Can you write a text for each step?",
            2: f"Here are steps of a lesson: {words} Can you make a picture for each step?",
            3: f"Here is how a lesson begins: (1) {words} <IMAGE> (2) <IMAGE> Can you go on?",
            4: f"How do I draw this in steps with pictures? {words}",
        }[task]
        folder.mkdir(exist_ok=True)
        item = {"model_input": asked, "model_output": "", "input_image_list": given, "output_gt_image_list": []}
        (folder / "results.json").write_text(json.dumps(item))


def interleavedbench(out: Path, n: int, shared: Path | None) -> None:
    items = []
    for k in range(n):
        task = TASKS[k % len(TASKS)]
        # The list holds the reference's picture behind the context's.
        images = [f"images_test/{k}_{i}.png" for i in range(2)]
        for i, image in enumerate(images):
            picture(out / image, k + i)
        words, _ = page(k)
        said = [{"from": "human", "value": f"{words} <image> Go on."}, {"from": "gpt", "value": "So: <image>"}]
        items.append({"id": f"{task}_{k}", "image": images, "task_name": task, "conversations": said})
    (out / "interleaved_bench.json").write_text(json.dumps(items))


def opening(out: Path, n: int, shared: Path | None) -> None:
    lines = []
    for k in range(n):
        words, _ = page(k)
        part = {"text": f"<BEGIN> Tell this as a story with pictures: {words}", "image": None}
        if k % 2:
            picture(out / f"images/{k}-i-1.jpg", k)
            part = {"text": part["text"] + " <image>", "image": f"./images/{k}-i-1.jpg"}
        item = {"total_uid": f"{k:07d}", "meta_task_name": GROUPS[k % len(GROUPS)], "subtask_name": "own"}
        lines.append(json.dumps(item | {"conversations": [{"input": [part]}, {"output": []}]}))
    (out / "test_data.jsonl").write_text("\n".join(lines) + "\n")


WRITERS = {"geneval": geneval, "imgedit": imgedit, "gedit": gedit, "dpg": dpg, "comm": comm,
           "interleavedbench": interleavedbench, "opening": opening}  # fmt: skip
