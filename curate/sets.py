"""Public sets, a function each: from a row as it is published to a record (data.py), or an InputError "kind: details".

A picture of such a record is what the row has: the name of a file, an address, or the bytes of a file. `importing.py` finds
them. Under "refused" a record may say of some that they are not wanted, {name: why}, and under "notes" what else is worth
keeping. Where each form was read stands beside the set (SETS); the
sets themselves were not at hand, so the tests build rows in these forms with words and pictures of their own.

    sharegpt-4o-image  {"input_prompt", "input_image": [name, ..] (edits alone), "output_image": name}
    x2i                {"instruction": "<img><|image_1|></img> ..", "input_images": [name, ..], "output_image": name}
    echo-4o            the same; its names begin with /Echo-4o-Image/, its text-to-image rows have no input_images
    uniworld           {"image": [name, ..], "conversations": [{"from": "human", "value": "<image>.."},
                       {"from": "gpt", "value": "<gen_image>"}]}: the k-th mark of either kind is the k-th picture
    obelics            {"images": [address or null, ..], "texts": [text or null, ..], "general_metadata": JSON, with the url}
    mmc4               {"text_list": [sentence, ..], "image_info": [{"image_name", "raw_url", "matched_text_index",
                       "matched_sim"}, ..], "url"}
    comm               {"title", "summary_info": [part, ..], "step_info": [[part, ..], ..]}, a part is
                       {"type": "text", "content"} or {"type": "image", "image_path", "url"}
    zebra-cot          {"Question", "Text Reasoning Trace", "Final Answer", "problem_image_1", .., "reasoning_image_1", ..};
                       in the texts <image_start>[reasoning_image_1]<image_end> marks a picture's place
    intersyn           {"human", "gpt", "image"} or {"human1", "gpt1", "image1", .., "human5", "gpt5", "image5"}; as its own
                       program writes it {"conversations": [{"from": "human", "value"}, {"from": "gpt", "value", "image"}, ..]}

Text-to-image: the user's prompt, the assistant's picture. Edits and compositions: the user's pictures where his words name
them (first of all where they do not), the assistant's picture. Web pages have no request; theirs is records/formats.py's.
"""

import json
import re
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from checkpoint import InputError
from records.formats import IMAGE, REQUEST, TITLE, from_chat, from_obelics, text_part

SIMILARITY = 0.15  # least CLIP similarity of a picture of MMC4's and its sentence
X2I_MARK = re.compile(r"<img>\s*<\|image_(\d+)\|>\s*</img>")
ZEBRA_MARK = re.compile(r"<image_start>\[([^\]]+)\]<image_end>")
GENERATED = "<gen_image>"
TURNS = 5  # exchanges that a row of InterSyn's may have

Row = dict[str, Any]


# ------------------------------------------------------------------------------------------------------------- what is read


def words(row: Row, key: str) -> str:
    """A text that has to be there."""
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{key}: missing or empty")
    return text.strip()


def image_part(picture: object, key: str) -> dict:
    """A picture that has to be there: a name, bytes, or what parquet files have, {"bytes", "path"}."""
    if isinstance(picture, dict):
        picture = picture.get("bytes") or picture.get("path")
    if not isinstance(picture, str | bytes) or not picture:
        raise InputError(f"{key}: no picture")
    return {"type": "image", "image": picture}


def image_parts(row: Row, key: str) -> list[dict]:
    """All pictures under a key that may be missing."""
    pictures = row.get(key) or []
    if isinstance(pictures, str | dict):
        pictures = [pictures]
    if not isinstance(pictures, list):
        raise InputError(f"{key}: not a list of pictures")
    return [image_part(picture, key) for picture in pictures]


def exchange(asked: list[dict], answer: list[dict]) -> dict:
    return {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]}


def request_for(title: str) -> list[dict]:
    """What a user asks of a page that has no request."""
    return text_part(REQUEST.format(textwrap.shorten(title, TITLE, placeholder=" ...")))


def marked(text: str, mark: re.Pattern, picture: Callable[[str], dict]) -> list[dict]:
    """Text and pictures in their order. picture(what the mark's group says) -> a part."""
    # What a pattern with one group splits is text, group, text, group, ..., text.
    pieces = mark.split(text)
    parts = text_part(pieces[0])
    for name, piece in zip(pieces[1::2], pieces[2::2], strict=True):
        parts += [picture(name), *text_part(piece)]
    return parts


def web_page(texts: list[str | None], pictures: list[object]) -> dict:
    """A page from parallel lists; its pictures may be bytes, so they wait aside while the words are arranged."""
    if len(pictures) != len(texts):
        raise InputError(f"lists of different lengths: {len(pictures)} images, {len(texts)} texts")
    names = [None if picture is None else str(k) for k, picture in enumerate(pictures)]
    record = from_obelics({"images": names, "texts": texts})
    for part in record["messages"][1]["content"]:
        if part["type"] == "image":
            part["image"] = image_part(pictures[int(part["image"])], "images")["image"]
    return record


# ------------------------------------------------------------------------------------------------------------------ the sets


def sharegpt(row: Row) -> dict:
    given = image_parts(row, "input_image")
    return exchange([*given, *text_part(words(row, "input_prompt"))], [image_part(row.get("output_image"), "output_image")])


def x2i(row: Row) -> dict:
    given = image_parts(row, "input_images")
    named = set()

    def picture(number: str) -> dict:
        k = int(number)
        if not 1 <= k <= len(given):
            raise InputError(f"mark without a picture: image_{k} of {len(given)}")
        named.add(k)
        return given[k - 1]

    asked = marked(words(row, "instruction"), X2I_MARK, picture)
    if not any(part["type"] == "text" for part in asked):
        raise InputError("instruction: nothing but pictures")
    unnamed = [part for k, part in enumerate(given, 1) if k not in named]
    # The documentation of the training code says output_images, its toy data and its reader say output_image.
    return exchange([*unnamed, *asked], [image_part(row.get("output_image"), "output_image")])


def uniworld(row: Row) -> dict:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and isinstance(turn.get("value"), str) for turn in turns):
        raise InputError("conversations: no list of turns with a value")
    if any(turn.get("from") == "gpt" and not turn["value"].strip() for turn in turns):
        raise InputError("empty answer: the value of a turn of gpt's")
    turns = [turn | {"value": turn["value"].replace(GENERATED, IMAGE)} for turn in turns]
    return from_chat({"image": row.get("image"), "conversations": turns})


def obelics(row: Row) -> dict:
    for key in ("texts", "images"):
        if not isinstance(row.get(key), list):
            raise InputError(f"{key}: no list")
    return web_page(row["texts"], row["images"])


def mmc4(row: Row) -> dict:
    """Each picture stands behind the sentence that it was assigned to; sentences with none between them are one text."""
    sentences = row.get("text_list")
    pictures = row.get("image_info")
    if not isinstance(sentences, list) or not all(isinstance(sentence, str) for sentence in sentences):
        raise InputError("text_list: no list of texts")
    if not isinstance(pictures, list) or not all(isinstance(picture, dict) for picture in pictures):
        raise InputError("image_info: no list of pictures")
    behind = {}  # {number of a sentence: its pictures}
    similarity = {}
    refused = {}
    for picture in pictures:
        k = picture.get("matched_text_index")
        if not isinstance(k, int) or not 0 <= k < len(sentences):
            raise InputError(f"matched_text_index: {k!r:.20} of {len(sentences)} sentences")
        name = picture.get("image_name") or picture.get("raw_url")
        behind.setdefault(k, []).append(name)
        # One whose similarity nobody has measured is kept.
        measured = picture.get("matched_sim")
        similarity[str(name)] = measured
        if isinstance(measured, int | float) and measured < SIMILARITY:
            refused[str(name)] = f"unlike its sentence: similarity {measured:.2f}, least {SIMILARITY:g}"
    texts = []
    images = []
    said = []
    for k, sentence in enumerate(sentences):
        said.append(sentence.strip())
        for image in behind.get(k, []):
            if said:
                texts += [" ".join(said), None]
                images += [None, image]
            else:
                texts.append(None)
                images.append(image)
            said = []
    if said:
        texts.append(" ".join(said))
        images.append(None)
    record = web_page(texts, images)
    # Its words come without line breaks, so the first line would be a paragraph; the first sentence is nearer to a title.
    record["messages"][0]["content"] = request_for(next(sentence for sentence in sentences if sentence.strip()))
    return record | {"refused": refused, "notes": {"similarity": similarity}}


def comm(row: Row) -> dict:
    """The title is the request, summary and steps are the answer."""
    steps = row.get("step_info")
    if not isinstance(steps, list):
        raise InputError("step_info: no list of steps")
    steps = [row.get("summary_info") or [], *steps]
    if not all(isinstance(step, list) for step in steps):
        raise InputError("step_info: a step that is no list of parts")
    answer = []
    for part in (part for step in steps for part in step):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "image":
            answer.append(image_part(part.get("image_path"), "image_path"))
        elif kind == "text":
            said = part.get("content") or ""
            if not isinstance(said, str):
                raise InputError("content: not text")
            more = text_part(said)
            if more and answer and answer[-1]["type"] == "text":
                answer[-1]["text"] += f"\n\n{more[0]['text']}"
            else:
                answer += more
        else:
            raise InputError(f"type: {kind!r:.20} is neither text nor image")
    if not answer:
        raise InputError("empty answer: no step has anything in it")
    return exchange(request_for(words(row, "title")), answer)


def zebra(row: Row) -> dict:
    """Question, then reasoning with its pictures, then the final answer; the words are left as they are."""

    def picture(name: str) -> dict:
        return image_part(row.get(name), name)

    question = words(row, "Question")
    asked = marked(question, ZEBRA_MARK, picture)
    named = set(ZEBRA_MARK.findall(question))
    given = sorted((name for name in row if name.startswith("problem_image_") and row[name]), key=number_in)
    unnamed = [picture(name) for name in given if name not in named]
    answer = marked(words(row, "Text Reasoning Trace"), ZEBRA_MARK, picture)
    return exchange([*unnamed, *asked], [*answer, *text_part(f"Final answer: {words(row, 'Final Answer')}")])


def number_in(name: str) -> int:
    """That at the end of problem_image_10."""
    digits = name.rpartition("_")[2]
    return int(digits) if digits.isdecimal() else 0


def intersyn(row: Row) -> dict:
    """Each answer is its text and then its picture."""
    if "conversations" in row:
        exchanges = spoken(row["conversations"])
    else:
        exchanges = in_columns(row)
    messages = []
    for question, answer, picture in exchanges:
        said = {"human": question, "gpt": answer}
        content = [*text_part(words(said, "gpt")), image_part(picture, "image")]
        messages.append({"role": "user", "content": text_part(words(said, "human"))})
        messages.append({"role": "assistant", "content": content})
    if not messages:
        raise InputError("empty answer: no turn has anything in it")
    return {"messages": messages}


def spoken(turns: object) -> list[tuple]:
    """(question, answer, picture) of turns, human and gpt by turns."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise InputError("conversations: no list of turns")
    if [turn.get("from") for turn in turns] != ["human", "gpt"] * (len(turns) // 2):
        raise InputError("conversations: human and gpt do not take turns")
    pairs = zip(turns[::2], turns[1::2], strict=True)
    return [(human.get("value"), gpt.get("value"), gpt.get("image")) for human, gpt in pairs]


def in_columns(row: Row) -> list[tuple]:
    """The same of a row of the published tables; a turn of which nothing is there does not exist."""
    exchanges = []
    for number in ("", *map(str, range(1, TURNS + 1))):
        turn = row.get(f"human{number}"), row.get(f"gpt{number}"), row.get(f"image{number}")
        if any(turn):
            exchanges.append(turn)
    return exchanges


# ----------------------------------------------------------------------------------------------------------------- the table


class Set(NamedTuple):
    """What the command knows of a set."""

    title: str
    record: Callable[[Row], dict]
    fields: str  # read of a row
    licence: str
    source: str  # where its form was read
    # Whether a row goes on without a picture that is missing: a page of the web does, an edit has then lost its sense.
    partial: bool = False


SETS = {
    "sharegpt-4o-image": Set(
        "ShareGPT-4o-Image",
        sharegpt,
        "input_prompt, input_image, output_image",
        "not seen; pictures by GPT-4o, whose terms hold",
        "readers of text_to_image.json and text_and_image_to_image.json in public code, pictures in *_part_*.tar",
    ),
    "x2i": Set(
        "X2I (OmniGen)",
        x2i,
        "instruction, input_images, output_image",
        "Apache-2.0",
        "cards of yzwang/X2I-* on the Hub; VectorSpaceLab/OmniGen: toy_data/toy_data.jsonl, OmniGen/train_helper/data.py",
    ),
    "uniworld": Set(
        "UniWorld-V1",
        uniworld,
        "image, conversations",
        "MIT",
        "card of LanguageBind/UniWorld-V1 on the Hub; PKU-YuanGroup/UniWorld-V1: univa/dataset/qwen2p5vl_dataset.py",
    ),
    "echo-4o": Set(
        "Echo-4o-Image",
        x2i,
        "instruction, input_images, output_image",
        "MIT; pictures by GPT-4o, whose terms hold",
        "card of Yejy53/Echo-4o-Image on the Hub and readers in public code; of its multi-reference part only that it follows "
        "X2I's keys is assumed, not seen",
    ),
    "obelics": Set(
        "OBELICS",
        obelics,
        "images, texts, general_metadata",
        "CC-BY-4.0, and each page's own",
        "card of HuggingFaceM4/OBELICS on the Hub",
        partial=True,
    ),
    "mmc4": Set(
        "Multimodal C4",
        mmc4,
        "text_list, image_info: image_name, raw_url, matched_text_index, matched_sim; url",
        "ODC-BY, and Common Crawl's terms",
        "allenai/mmc4: README.md",
        partial=True,
    ),
    "comm": Set(
        "CoMM",
        comm,
        "title, summary_info, step_info: type, content, image_path",
        "none found",
        "HKUST-LongGroup/CoMM: datasets/download_images.py, models/MiniGPT-5/dataloader.py",
        partial=True,
    ),
    "zebra-cot": Set(
        "Zebra-CoT",
        zebra,
        "Question, Text Reasoning Trace, Final Answer, problem_image_*, reasoning_image_*",
        "CC-BY-NC-4.0",
        "cards of multimodal-reasoning-lab/* on the Hub; Bagel-Zebra-CoT: data/interleave_datasets/think_trace_dataset.py",
    ),
    "intersyn": Set(
        "InterSyn",
        intersyn,
        "human, gpt, image (with numbers), or conversations: from, value, image",
        "not seen",
        "finyorko/InterSyn: SEIR_method/seir_method.py; a public reader of finyorko/single_turn and finyorko/multi-turn",
    ),
}


def page_address(row: Row) -> str:
    """Where a row's page stood, if it is one of the web."""
    about = row.get("general_metadata")
    if isinstance(about, str):
        try:
            about = json.loads(about)
        except ValueError:
            about = None
    address = about.get("url") if isinstance(about, dict) else row.get("url")
    return address if isinstance(address, str) else ""
