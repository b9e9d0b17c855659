"""Other people's formats into the record of data.py. Each function takes one record and gives one, or says why it cannot.

    llava          {"image": "a.jpg" or [..], "conversations": [{"from": "human" | "gpt" | "system", "value": "<image>\ntext"}]}
    llama-factory  {"messages": [{"role", "content": "..<image>.."}], "images": [..], "system": ".."}, or conversations as above
                   (the "sharegpt" columns of its dataset_info.json under their default names; ms-swift's too); or alpaca
    alpaca         {"instruction": "..", "input": ".." or null, "output": "..", "system": "..", "images": [..] or "image": "..",
                   "history": [["earlier request", "earlier answer"], ..]}; only instruction and output must be there
    obelics        {"images": [path or null, ..], "texts": [text or null, ..]}, exactly one of the two at each place

The k-th <image> of a dialogue is its k-th picture, and their numbers must agree; a record of alpaca's with pictures and no
<image> at all has them before its first request, history included. Its request is instruction, line break, input.

Blanks (spaces, tabs, line breaks, whatever str.strip takes): of each text part those at its two ends go, for they stand where
the format had <image> or a quotation mark, and a model that learns them writes them; those inside it stay, indentation and
empty lines included. A part with nothing else vanishes, as do an empty system prompt and the empty half of a pair of history.

OBELICS holds web pages and has no instruction. Its first line of text, as a rule the title, becomes the user's request, and the
whole page, that line included, the assistant's answer. Texts with no picture between them are one part, an empty line apart.
"""

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

from tqdm import tqdm

from checkpoint import InputError
from records.validate import BadRecord, Problem, decode, one_line, open_lines, read_records, validate

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
IMAGE = "<image>"  # where a picture stands in a text
REQUEST = "Write an illustrated page: {}"
TITLE = 200  # longest title in characters


def refuse(record: dict) -> None:
    """An InputError where a record has what ours cannot hold, or no answer that is meant to be learnt."""
    for key in ("video", "videos", "audio", "audios"):
        if record.get(key):
            raise InputError(f"it has {key}, which a record cannot hold")
    if record.get("chosen") or record.get("rejected"):
        raise InputError("chosen, rejected: a record has one answer: put the better one last among the turns, or under output")
    if record.get("kto_tag") is False:
        raise InputError("kto_tag is false: its answer is an example of a bad one")


def pictures_of(record: dict) -> list[str]:
    """What is under images or image, as a list."""
    pictures = record.get("images", record.get("image")) or []
    pictures = [pictures] if isinstance(pictures, str) else pictures
    if not isinstance(pictures, list) or not all(isinstance(p, str) and p for p in pictures):
        raise InputError("image: not a path or a list of paths")
    return pictures


def text_part(text: str) -> list[dict]:
    """One part without blanks at its ends; none where nothing is left."""
    return [{"type": "text", "text": text.strip()}] if text.strip() else []


def dialogue(turns: list[tuple[str, str]], pictures: list[str], system: object = None) -> dict:
    """The record of turns (role, text with <image>), the pictures in their order, and a system prompt."""
    wanted = sum(text.count(IMAGE) for _, text in turns)
    if wanted != len(pictures):
        raise InputError(f"{wanted} <image> in the text, but {len(pictures)} pictures")
    rest, messages = iter(pictures), []
    if isinstance(system, str):
        system = system.strip()
    if system:
        messages.append({"role": "system", "content": system})
    for role, text in turns:
        before, *behind = text.split(IMAGE)
        content = text_part(before)
        for piece in behind:
            content += [{"type": "image", "image": next(rest)}, *text_part(piece)]
        messages.append({"role": role, "content": content})
    return {"messages": messages}


def from_chat(record: dict) -> dict:
    """LLaVA, ShareGPT, LLaMA-Factory and ms-swift: a list of turns with <image> in the text, the pictures beside it."""
    turns = record.get("messages", record.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise InputError("no list of turns under conversations or messages")
    refuse(record)
    pictures, told = pictures_of(record), []
    for i, turn in enumerate(turns):
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        text = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise InputError(f"turn {i}: role {role!r:.40} has no counterpart")
        if not isinstance(text, str):
            raise InputError(f"turn {i}: its text is missing")
        told.append((ROLES[role], text))
    return dialogue(told, pictures, record.get("system"))


def from_alpaca(record: dict) -> dict:
    """Stanford Alpaca and LLaMA-Factory's alpaca: one request, one answer, and what was said before."""
    if "instruction" not in record:
        raise InputError("no instruction")
    refuse(record)
    for key in ("instruction", "input", "output"):
        if not isinstance(record.get(key) if key == "output" else record.get(key) or "", str):
            raise InputError(f"{key}: missing, or not text")
    history = record.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    if not pairs or not all(isinstance(half, str) for pair in history for half in pair):
        raise InputError("history: not a list of pairs of texts, [request, answer]")
    turns = [(role, half) for pair in history for role, half in zip(("user", "assistant"), pair, strict=True) if half.strip()]
    asked = "\n".join(text.strip() for text in (record["instruction"] or "", record.get("input") or "") if text.strip())
    if not asked:
        raise InputError("instruction: empty, and so is input")
    if not record["output"].strip():
        raise InputError("output: empty: there is nothing to learn from")
    turns += [("user", asked), ("assistant", record["output"])]
    pictures = pictures_of(record)
    if pictures and not any(IMAGE in text for _, text in turns):
        k = next(k for k, (role, _) in enumerate(turns) if role == "user")
        turns[k] = ("user", IMAGE * len(pictures) + turns[k][1])
    return dialogue(turns, pictures, record.get("system"))


def from_llama_factory(record: dict) -> dict:
    """Whichever of its two formats a record is in."""
    chat = "messages" in record or "conversations" in record
    return from_chat(record) if chat or "instruction" not in record else from_alpaca(record)


def from_obelics(record: dict) -> dict:
    """A web page: pictures and texts side by side, one of the two null at each place."""
    pictures, texts = record.get("images"), record.get("texts")
    if not isinstance(pictures, list) or not isinstance(texts, list):
        raise InputError("no lists under images and texts")
    if len(pictures) != len(texts):
        raise InputError(f"{len(pictures)} images, but {len(texts)} texts: there must be as many, with nulls")
    content = []
    for i, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
        if (picture is None) == (text is None):
            raise InputError(f"place {i}: exactly one of image and text must be null")
        if not isinstance(text if picture is None else picture, str):
            raise InputError(f"place {i}: neither text nor a path")
        if picture is not None:
            content.append({"type": "image", "image": picture})
        elif text.strip() and content and content[-1]["type"] == "text":
            content[-1]["text"] += f"\n\n{text.strip()}"
        else:
            content += text_part(text)
    words = next((part["text"] for part in content if part["type"] == "text"), "")
    if not words:
        raise InputError("no text in it")
    title = words.splitlines()[0].strip()
    title = title if len(title) <= TITLE else title[:TITLE].rsplit(" ", 1)[0] + " ..."
    request = {"role": "user", "content": REQUEST.format(title)}
    return {"messages": [request, {"role": "assistant", "content": content}]}


CONVERTERS = {"llava": from_chat, "llama-factory": from_llama_factory, "alpaca": from_alpaca, "obelics": from_obelics}


def convert(kind: str, source: str, target: str, images: str | None = None) -> int:
    """Write the records of a file as ours; the number of those that were skipped, each with its reason.

    Picture paths start at `images`, or without it at the file's folder; of a URL, the last part is looked for in `images`. The
    new paths are relative to `target`, which must therefore lie above the pictures.
    """
    out, base = Path(target), Path(images) if images else Path(source).parent
    if out.exists() and os.path.exists(source) and os.path.samefile(source, out):
        raise InputError(f"{target}: is the input itself; choose another name")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{out}.tmp")
    done, skipped = 0, Counter()
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            for line, record in tqdm(elements(source), unit=" records", disable=None, leave=False):
                try:
                    if isinstance(record, Problem):
                        raise BadRecord(record)
                    record = CONVERTERS[kind](record)
                    for part in (p for m in record["messages"] if isinstance(m["content"], list) for p in m["content"]):
                        if part["type"] == "image":
                            part["image"] = _relative(part["image"], base, out.parent, images is not None)
                    problems = validate(record, out.parent, source, line, pictures=False)
                    for problem in (p for p in problems if not p.warning):
                        raise BadRecord(problem)
                    file.write(json.dumps(record, ensure_ascii=False) + "\n")
                    done += 1
                except InputError as e:
                    problem = e.args[0] if isinstance(e, BadRecord) else Problem(source, line, "", one_line(e))
                    tqdm.write(f"skipped: {problem}")
                    skipped[problem.kind] += 1
        if not done:
            raise InputError(f"{source}: none of its {skipped.total():,} records could be converted from {kind}")
        os.replace(temporary, out)
    finally:
        temporary.unlink(missing_ok=True)
    for what, count in skipped.most_common():
        print(f"{count:>9,} x {what}")
    print(f"{out}: {done:,} records written, {skipped.total():,} skipped")
    return skipped.total()


def elements(path: str) -> Iterator[tuple[int, dict | Problem]]:
    """(line, record) of a file of JSON lines, or (place from 1, record) of one JSON array."""
    with open_lines(path, arrays=True) as file:
        if file.peek(1).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] != b"[":
            yield from read_records(path)
            return
        try:
            values = decode(file.read())
        except InputError as e:
            raise InputError(f"{path}: {e}") from None
    for n, value in enumerate(values, 1):
        yield n, value if isinstance(value, dict) else Problem(path, n, "", "not an object")


def _relative(picture: str, base: Path, folder: Path, by_name: bool) -> str:
    if picture.startswith("data:"):
        return picture
    if by_name and urlparse(picture).scheme in ("http", "https"):
        picture = unquote(urlparse(picture).path).rsplit("/", 1)[-1]
    elif "://" in picture:
        return picture  # `validate` says what to do
    return os.path.relpath(base / picture, folder)
