"""Fixtures: each public set in the form in which it is published, with the sketchbook's words and pictures, and with rows that
are broken on purpose.

    python tests/curate/public_sets.py FOLDER 40          all sets of JSON, 40 good rows each, and the commands that import them
"""

import io
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

from sketchbook.dialogues import dialogue

BROKEN_PICTURE = b"\xff\xd8\xff\xe0 and then nothing"


def dialogues(kind: str, n: int) -> Iterator[tuple[str, list]]:
    """(request, the parts of user and assistant in turns) of the sketchbook's dialogues of one exchange."""
    seed = 0
    while n:
        record = dialogue(seed, "train", {kind: 1.0})
        seed += 1
        messages = record["messages"]
        if len(messages) == 2:
            n -= 1
            asked = " ".join(part["text"] for part in messages[0]["content"] if part["type"] == "text")
            yield asked, [[part.get("text", part.get("image")) for part in message["content"]] for message in messages]


def png(picture) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def pictures_in(parts: list) -> list:
    return [part for part in parts if not isinstance(part, str)]


def write_lines(path: Path, rows: list, after: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + after, encoding="utf-8")
    return path


def store(folder: Path, name: str, data: bytes) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return name


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))
    return path


# Every function writes the files of a set: n good rows, then the broken ones. -> (files, places of pictures, what is refused)


def sharegpt(folder: Path, n: int):
    rows = []
    members = {}
    for k, (asked, parts) in enumerate(dialogues("recolour", n)):
        members[f"image/in_{k}.png"] = png(pictures_in(parts[0])[0])
        members[f"image/out_{k}.png"] = png(pictures_in(parts[1])[0])
        row = {"input_prompt": asked, "output_image": f"image/out_{k}.png", "output_image_resolution": [64, 64]}
        rows.append(row | {"input_image": [f"image/in_{k}.png"]} if k % 2 else row)
    members["image/broken.png"] = BROKEN_PICTURE
    rows += [
        {"input_prompt": "", "output_image": "image/out_0.png"},
        {"input_prompt": "Draw a red house."},
        {"input_prompt": "Draw a red house.", "output_image": "image/nowhere.png"},
        {"input_prompt": "Make it blue.", "input_image": ["image/nowhere.png"], "output_image": "image/out_0.png"},
        {"input_prompt": "Draw a red house.", "output_image": "image/broken.png"},
    ]
    (folder / "text_and_image_to_image.json").write_text(json.dumps(rows))
    tar = write_tar(folder / "text_and_image_to_image_part_0.tar", members)
    refused = {"input_prompt": 1, "output_image": 1, "no such picture": 2}
    refused["picture that cannot be used"] = 1
    return [folder / "text_and_image_to_image.json"], [tar], refused


def x2i(folder: Path, n: int):
    rows = []
    for k, (asked, parts) in enumerate(dialogues("recolour", n)):
        given = store(folder, f"images/{k}_source.png", png(pictures_in(parts[0])[0]))
        made = store(folder, f"images/{k}_target.png", png(pictures_in(parts[1])[0]))
        row = {"task_type": "image_edit", "instruction": f"<img><|image_1|></img> {asked}", "input_images": [given]}
        row["output_image"] = made
        if k % 3 == 1:
            row |= {"task_type": "text_to_image", "instruction": asked, "input_images": []}
        if k % 3 == 2:
            row |= {"instruction": f"{asked} Begin with <img><|image_2|></img>.", "input_images": [made, given]}
        rows.append(row)
    edit = {"task_type": "image_edit", "input_images": ["images/0_source.png"], "output_image": "images/0_target.png"}
    rows += [
        edit | {"instruction": "<img><|image_3|></img> Make it red."},
        edit | {"instruction": "<img><|image_1|></img>"},
        edit | {"instruction": "Make it red.", "input_images": "../secret.png"},
        edit | {"instruction": "Make it red.", "output_image": None},
    ]
    file = write_lines(folder / "edits.jsonl", rows, after='{"task_type": "image_edit", "instru')
    refused = {"mark without a picture": 1, "instruction": 1, "no such picture": 1, "output_image": 1, "not valid JSON": 1}
    return [file], [], refused


def echo(folder: Path, n: int):
    rows = []
    members = {}
    at = "/Echo-4o-Image/Surrel-Fantasy-Image/images"
    for k, (asked, parts) in enumerate(dialogues("two", n)):
        members[f"images/{k:05d}.png"] = png(pictures_in(parts[1])[0])
        rows.append({"task_type": "t2i", "instruction": asked, "output_image": f"{at}/{k:05d}.png", "type": "T1"})
    rows += [
        {"task_type": "t2i", "instruction": "A house.", "output_image": f"{at}/99999.png", "type": "T1"},
        {"task_type": "t2i", "instruction": None, "output_image": f"{at}/00000.png", "type": "T1"},
        ["no", "object"],
    ]
    file = write_lines(folder / "conflict.jsonl", rows)
    return [file], [write_tar(folder / "0-5000.tar", members)], {"no such picture": 1, "instruction": 1, "not an object": 1}


def uniworld(folder: Path, n: int):
    rows = []
    for k, (asked, parts) in enumerate(dialogues("recolour", n)):
        names = [store(folder, f"edit/{k}_{side}.png", png(pictures_in(parts[side])[0])) for side in (0, 1)]
        turns = [{"from": "human", "value": f"<image>\n{asked}"}, {"from": "gpt", "value": "<gen_image>"}]
        rows.append({"id": k, "image": names, "conversations": turns})
    turns = [{"from": "human", "value": "<image>\nMake it red."}, {"from": "gpt", "value": "<gen_image>"}]
    rows += [
        {"image": ["edit/0_0.png"], "conversations": turns},
        {"image": ["edit/0_0.png", "edit/none.png"], "conversations": turns},
        {"image": ["edit/0_0.png"], "conversations": [turns[0], {"from": "gpt", "value": ""}]},
        {"image": ["edit/0_0.png", "edit/0_1.png"], "conversations": [turns[0], {"from": "robot", "value": "<gen_image>"}]},
        {"image": ["edit/0_0.png", "edit/0_1.png"], "conversations": "none"},
    ]
    file = folder / "edit.json"
    file.write_text(json.dumps(rows))
    refused = {"# <image> in the text, but # pictures": 1, "no such picture": 1, "empty answer": 1, "turn #": 1}
    refused["conversations"] = 1
    return [file], [], refused


def web(n: int) -> Iterator[tuple[int, list]]:
    """(number, texts and pictures in their order) of pages."""
    for k, (asked, parts) in enumerate(dialogues("lesson", n)):
        yield k, [f"A page: {asked}", *parts[1]]


def obelics(folder: Path, n: int):
    rows = []
    members = {}
    for k, parts in web(n):
        texts = []
        images = []
        for j, part in enumerate(parts):
            texts.append(part if isinstance(part, str) else None)
            images.append(None if isinstance(part, str) else f"https://example.org/{k}/{j}.png")
            if not isinstance(part, str):
                # img2dataset's own names, and its note of the address beside each picture.
                key = f"{len(members):09d}"
                members[f"{key}.png"] = png(part)
                members[f"{key}.json"] = json.dumps({"url": images[-1], "key": key, "status": "success"}).encode()
        about = json.dumps({"url": f"https://example.org/{k}"})
        rows.append({"images": images, "texts": texts, "metadata": "[]", "general_metadata": about})
    first = rows[0]
    # A page without one of its pictures is still a page.
    rows.append(first | {"images": [*first["images"], "https://example.org/gone.png"], "texts": [*first["texts"], None]})
    rows += [
        first | {"images": first["images"][:-1]},
        {"images": ["https://example.org/gone.png", None], "texts": [None, "A page about nothing."]},
        {"images": ["https://example.org/0/1.png", None], "texts": ["both", None]},
        {"images": [None], "texts": "A page."},
    ]
    file = write_lines(folder / "train.jsonl", rows)
    refused = {"lists of different lengths": 1, "no picture left": 1, "place #": 1, "texts": 1}
    return [file], [write_tar(folder / "00000.tar", members)], refused


def mmc4(folder: Path, n: int):
    rows = []
    for k, parts in web(n):
        sentences = [part for part in parts if isinstance(part, str)]
        pictures = pictures_in(parts)
        info = []
        for j, picture in enumerate(pictures):
            name = store(folder, f"images/{k:04x}{j:04x}.png", png(picture)).removeprefix("images/")
            address = f"http://example.org/{k}/{j}.png"
            at = min(j + 1, len(sentences) - 1)
            info.append({"image_name": name, "raw_url": address, "matched_text_index": at, "matched_sim": 0.3})
        random.Random(k).shuffle(info)  # their places are given by the sentences alone
        row = {"text_list": sentences, "image_info": info, "url": f"http://example.org/{k}", "could_have_url_duplicate": 0}
        rows.append(row | {"similarity_matrix": [[0.3] * len(sentences) for _ in info]})
    first = rows[0]
    one = first["image_info"][0]
    unlike = {"matched_sim": 0.1}
    rows += [
        first | {"image_info": [*first["image_info"], one | {"image_name": "gone.png"}, one | {"image_name": "a"} | unlike]},
        first | {"image_info": [one | {"matched_text_index": 99}]},
        first | {"image_info": [one | {"matched_sim": 0.05}]},
        first | {"image_info": [one | {"image_name": "gone.png"}]},
        first | {"text_list": []},
    ]
    file = write_lines(folder / "docs_shard_0_v3.jsonl", rows)
    return [file], [], {"matched_text_index": 2, "no picture left": 2}


def comm(folder: Path, n: int):
    import torch

    rows = []
    for k, (asked, parts) in enumerate(dialogues("lesson", n)):
        steps = []
        for j, part in enumerate(parts[1]):
            if isinstance(part, str):
                steps.append([{"type": "text", "content": part}])
            else:
                name = store(folder, f"images/how/{k}_{j}.png", png(part)).removeprefix("images/")
                steps[-1].append({"type": "image", "image_path": name, "url": f"https://example.org/{name}"})
        row = {"data_id": f"how_{k}", "dataset_type": "how", "title": asked, "summary_info": [], "step_info": steps}
        rows.append(row | {"summary_info": [{"type": "text", "content": "It is easy."}]} if k % 2 else row)
    rows += [
        rows[0] | {"title": None},
        rows[0] | {"step_info": [[]]},
        rows[0] | {"step_info": [[{"type": "video", "content": "x"}]]},
        rows[0] | {"step_info": [[{"type": "image", "image_path": "how/gone.png"}]]},
        "no row",
    ]
    file = folder / "train.pth"
    torch.save(rows, file)
    return [file], [], {"title": 1, "empty answer": 1, "type": 1, "no picture left": 1, "not an object": 1}


def zebra(folder: Path, n: int):
    rows = []
    for k, (asked, parts) in enumerate(dialogues("lesson", n)):
        row = {"Question": f"{asked} Think in pictures.", "Final Answer": "That was the last part.", "problem_image_1": None}
        trace = []
        for j, part in enumerate(parts[1]):
            if isinstance(part, str):
                trace.append(f"THOUGHT {len(trace)}: {part}")
            else:
                name = f"reasoning_image_{1 + sum(key.startswith('reasoning') for key in row)}"
                trace.append(f"<image_start>[{name}]<image_end>")
                row[name] = store(folder, f"images/{k}_{j}.png", png(part))
        rows.append(row | {"Text Reasoning Trace": " ".join(trace)})
    marked = "See <image_start>[problem_image_1]<image_end>. What is it?"
    good = rows[0]["reasoning_image_1"]
    rows.append(rows[0] | {"Question": marked, "problem_image_1": good})
    rows += [
        rows[0] | {"Final Answer": " "},
        rows[0] | {"reasoning_image_1": None},
        rows[0] | {"reasoning_image_1": "images/gone.png"},
        rows[0] | {"Text Reasoning Trace": None},
    ]
    file = write_lines(folder / "train.jsonl", rows)
    refused = {"Final Answer": 1, "reasoning_image_#": 1, "no such picture": 1, "Text Reasoning Trace": 1}
    return [file], [], refused


def intersyn(folder: Path, n: int):
    rows = []
    for k, (asked, parts) in enumerate(dialogues("one", n)):
        said = " ".join(part for part in parts[1] if isinstance(part, str))
        name = store(folder, f"images/00000_{k:010d}_caption_0.png", png(pictures_in(parts[1])[0])).removeprefix("images/")
        if k % 2:
            rows.append({"id": k, "topic": "drawing", "human": asked, "gpt": said, "caption": "a drawing", "image": name})
        else:
            answer = {"from": "gpt", "value": said, "caption": "a drawing", "image": name}
            rows.append({"id": k, "topic": "drawing", "conversations": [{"from": "human", "value": asked}, answer]})
    two = {f"{key}{turn}": rows[1][key] for key in ("human", "gpt", "image") for turn in (1, 2)}
    rows.append({"id": "two"} | two | {"human3": None, "gpt3": "", "image3": None})
    rows += [
        rows[1] | {"gpt": ""},
        rows[1] | {"image": ""},
        rows[1] | {"image": "gone.png"},
        rows[0] | {"conversations": rows[0]["conversations"][::-1]},
        {"id": "nothing"},
    ]
    file = write_lines(folder / "single_turn_00000.jsonl", rows)
    refused = {"gpt": 1, "image": 1, "no such picture": 1, "conversations": 1, "empty answer": 1}
    return [file], [], refused


WRITERS = {
    "sharegpt-4o-image": sharegpt,
    "x2i": x2i,
    "uniworld": uniworld,
    "echo-4o": echo,
    "obelics": obelics,
    "mmc4": mmc4,
    "comm": comm,
    "zebra-cot": zebra,
    "intersyn": intersyn,
}
# Rows that are good beside the n: a page without one of its pictures, a problem with a picture, a dialogue of two turns.
MORE = {"obelics": 1, "mmc4": 1, "zebra-cot": 1, "intersyn": 1}


def main() -> None:
    for name, write in WRITERS.items():
        folder = Path(sys.argv[1]) / name
        folder.mkdir(parents=True, exist_ok=True)
        files, places, _ = write(folder, int(sys.argv[2]))
        images = f" --images {' '.join(map(str, places))}" if places else ""
        print(f"python -m curate import {name} {' '.join(map(str, files))}{images} --out {folder}/out")


if __name__ == "__main__":
    main()
