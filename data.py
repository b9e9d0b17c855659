"""Records in, packs out: dialogues in JSON lines or shards become the packed batches that both training stages read.

One line of a file is one dialogue, in the chat form people already have. Spread over five lines:

    {"messages": [
      {"role": "user", "content": [{"type": "text", "text": "How do I draw a house?"}]},
      {"role": "assistant", "content": [
        {"type": "text", "text": "Step 1: draw a red square for the walls."}, {"type": "image", "image": "h1.png"},
        {"type": "text", "text": "Step 2: put a blue triangle on top."},      {"type": "image", "image": "h2.png"}]}]}

A text-to-image pair, an edit, a video transition and a how-to are all this record. The rules:
    * "content" is a list of parts, or plain text. "system" may only come first and has no pictures; "user" and "assistant"
      follow in any order, two of one role in a row included. No message is empty. One at least is the assistant's: its text
      and its pictures are what is learnt.
    * "image" is a path relative to the file, or a "data:image/png;base64,..." URL; OpenAI's {"type": "image_url", "image_url":
      {"url": ...}} is read too. A path must stay in the file's folder, so that a downloaded file cannot pull in whatever else
      is on the disk; links in that folder are followed. Nothing is fetched from the network.
    * A picture is taken upright (EXIF), on white where it is transparent, of several frames the first; limits:
      records/validate.py.
    * Other keys are ignored, with a warning. Text never becomes a control token, whatever characters it has.

    python data.py check train.jsonl                     every problem as FILE:LINE: field: message, then a summary
    python data.py check train.jsonl --no-images         the same without opening the pictures
    python data.py check train.jsonl --tokenizer MLLM    counts tokens too; MLLM is a checkpoint's mllm/ folder or a Hub id
    python data.py convert --from llava in.json out.jsonl --images coco  also llama-factory, alpaca, obelics: records/formats.py
    python data.py pack train.jsonl shards/train       records and pictures into shards/train-000000.tar, ... (records/files.py)
    python data.py check shards/train-000000.tar         the same for a shard

Exit status: 0 all is well, 1 some records are not, 2 there is nothing to work with.
"""

import argparse
import json
import logging
import random
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from checkpoint import InputError, abandon_stdout, resolve
from families.registry import load_processor
from model import ImageProcessor, mrope_positions
from records.files import Files, Shard, pack_shards
from records.formats import CONVERTERS, convert
from records.stream import Mix, Stream
from records.validate import Problem, load_image, normalise, one_line, open_lines, read_records, validate
from tokenizer import Rendered, Tokenizer, render
from vae import to_tensor


def example() -> dict:
    """The record at the top of this file."""
    return json.JSONDecoder().raw_decode(__doc__, __doc__.index('{"messages"'))[0]


# ---------------------------------------------------------------------------------------------------------- documents

# Pixels along a side of a patch of the DiT where nobody says otherwise: 8 of the VAE's times 2, as in all published ones.
PATCH = 16


@dataclass
class Document:
    """A record as the models read it, on the CPU."""

    rendered: Rendered
    positions: Tensor  # (3, n) long, mRoPE
    pixels: Tensor | None  # (P, 3 * p * p) bytes, the patches of all pictures, None without pictures
    grids: list[tuple[int, int]]  # patches (h, w) of every picture
    pictures: list[Tensor]  # (3, H, W) bytes for the VAE; empty if they were not asked for
    name: str = ""  # where its record stands: FILE:LINE, SHARD:MEMBER or seed:NUMBER
    drawn: list[int] | None = None  # some of the targets, in the order of their draw; None: no choice was made
    patch: int = PATCH  # pixels along a side of a patch of the DiT, of which `pictures` are whole numbers

    def __len__(self) -> int:
        return len(self.rendered.ids)

    @property
    def roles(self) -> list[str]:
        """Whose each picture is."""
        return [span.role for span in self.rendered.images]

    @property
    def targets(self) -> list[int]:
        """Numbers of the pictures that stage 2 may learn to paint: the assistant's."""
        return [j for j, role in enumerate(self.roles) if role == "assistant"]

    @property
    def trained(self) -> list[int]:
        """The targets that stage 2 trains this time."""
        return self.targets if self.drawn is None else self.drawn

    @property
    def patches(self) -> int:
        """What the vision tower reads."""
        return sum(h * w for h, w in self.grids)

    @property
    def latents(self) -> int:
        """Patches that the DiT reads to train `trained`, each with all pictures before it."""
        return sum(map(self.latents_of, self.trained))

    def latents_of(self, target: int) -> int:
        """Those of the picture with this number and of all before it."""
        return sum(picture[0].numel() // self.patch**2 for picture in self.pictures[: target + 1])

    def __getstate__(self) -> dict:
        """Pickled as arrays, which travel between processes ten times faster than tensors."""
        return {name: _each(value, Tensor, Tensor.numpy) for name, value in vars(self).items()}

    def __setstate__(self, state: dict) -> None:
        vars(self).update({name: _each(value, np.ndarray, torch.from_numpy) for name, value in state.items()})


def _each(value: object, kind: type, change: Callable) -> object:
    if isinstance(value, list):
        return [_each(v, kind, change) for v in value]
    return change(value) if isinstance(value, kind) else value


def tokenize(
    record: dict,
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    folder: str | Path = ".",
    max_tokens: int | None = None,
    max_patches: int | None = None,
    pictures: bool = True,
    max_area: int | None = None,
    patch: int = PATCH,
    targets_only: bool = False,
) -> Document | None:
    """A valid record to a document. Its pictures are paths (relative to `folder`), data URLs, bytes or open images.

    max_tokens, max_patches: a longer dialogue loses its last messages until it fits and ends with the assistant's; when nothing
        is left of it, it is refused. It is never cut inside a message: an answer that stops anywhere teaches to stop anywhere.
    pictures: also prepare the pictures for the VAE, with at most max_area pixels each, in whole patches of the DiT.
    targets_only: None for a document without a picture of the assistant's.
    """
    messages = normalise(record, folder)

    # Every picture twice: as patches for the vision tower, and whole for the VAE.
    patches, grids, whole = [], [], []
    for part in image_parts(messages):
        try:
            image = load_image(part["image"])
        except InputError as e:
            raise InputError(f"picture cannot be used: {e}") from None
        pixels, grid = byte_patches(image, processor)
        patches.append(pixels)
        grids.append(grid)
        if pictures:
            whole.append(byte_picture(image, patch, max_area))
    merged = [processor.merged(grid) for grid in grids]

    # Rendered anew without its last exchange until it fits: only a rendering knows how long it is.
    while True:
        n = len(image_parts(messages))
        rendered = render(tokenizer, messages, merged[:n])
        length = len(rendered.ids)
        seen = sum(h * w for h, w in grids[:n])
        too_long = max_tokens and length > max_tokens
        too_many = max_patches and seen > max_patches
        if not too_long and not too_many:
            break
        messages.pop()
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages and too_long:
            raise InputError(f"too long: {length:,} tokens up to the first answer, the limit is {max_tokens:,}")
        if not messages:
            raise InputError(f"too long: {seen:,} patches of pictures up to the first answer, the limit is {max_patches:,}")

    if not any(rendered.loss):
        raise InputError("nothing to learn from: no assistant message")
    # Only now, since the pictures of the assistant's may have been in what was cut off.
    if targets_only and not any(span.role == "assistant" for span in rendered.images):
        return None
    positions, _ = mrope_positions(rendered.ids, merged[:n], tokenizer.image_pad)
    return Document(rendered, positions, torch.cat(patches[:n]) if n else None, grids[:n], whole[:n], patch=patch)


# Bytes travel between processes and to a GPU at an eighth of the cost of what the models read.


def byte_patches(image: Image.Image, processor: ImageProcessor) -> tuple[Tensor, tuple[int, int]]:
    """What the vision tower is shown, (P, 3 * p * p) bytes, and its grid. `normalised` makes of it what the tower reads."""
    plain = replace(processor, image_mean=[0.0] * 3, image_std=[1.0] * 3, temporal_patch_size=1)
    pixels, grid = plain(image)
    return (pixels * 255).round().byte(), grid


def byte_picture(image: Image.Image, patch: int = PATCH, max_area: int | None = None) -> Tensor:
    """What the VAE is shown, (3, H, W) bytes. `to_float` makes of it what the VAE reads."""
    return ((to_tensor(image, patch, max_area) + 1) * 127.5).round().byte()


def to_float(picture: Tensor) -> Tensor:
    """Bytes (..., 3, H, W) -> [-1, 1], as vae.to_tensor has it. What is no bytes is there already."""
    return picture.float() / 127.5 - 1 if picture.dtype == torch.uint8 else picture


def normalised(patches: Tensor, processor: ImageProcessor) -> Tensor:
    """Bytes (P, 3 * p * p) -> (P, 3 * T * p * p): what the processor itself makes of the picture, T times the same."""
    # A patch lies in memory colour by colour, so each colour's mean and deviation meet it by broadcasting.
    mean, std = (torch.tensor(x, device=patches.device).view(3, 1, 1) for x in (processor.image_mean, processor.image_std))
    x = (patches.unflatten(1, (3, 1, -1)).float() / 255 - mean) / std                  # (P, 3, 1, p * p)
    # The tower reads pairs of video frames; a picture is a film that stands still, and is repeated only here, on the device.
    return x.expand(-1, -1, processor.temporal_patch_size, -1).flatten(1)


def image_parts(messages: list[dict]) -> list[dict]:
    """The pictures of a dialogue, in reading order."""
    return [part for message in messages for part in message["content"] if part["type"] == "image"]


@dataclass
class MLLMBatch:
    """Documents one behind the other, without padding: N tokens, P patches."""

    ids: Tensor  # (N,) long
    positions: Tensor  # (3, N) long
    cu_seqlens: Tensor  # (S + 1,) int32
    pixels: Tensor | None  # (P, 3 * p * p) bytes, (P, 3 * T * p * p) behind `to`
    grids: list[tuple[int, int]] | None
    labels: Tensor  # (N,) long: the token to predict at each place, -100 where none is asked

    def to(self, device: str | torch.device, processor: ImageProcessor | None = None) -> "MLLMBatch":
        """On the device, where the processor makes of bytes what the vision tower reads."""
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        if self.pixels is not None and self.pixels.dtype == torch.uint8:
            moved["pixels"] = normalised(moved["pixels"], processor)
        return MLLMBatch(**vars(self) | moved)


def pack_documents(documents: list[Document]) -> MLLMBatch:
    """Labels are shifted here: place i answers for token i + 1, if that one is supervised and of the same document."""
    # By way of numpy, which reads a list of numbers five times as fast.
    ids = torch.from_numpy(np.array([i for d in documents for i in d.rendered.ids]))   # (N,)
    loss = torch.from_numpy(np.array([x for d in documents for x in d.rendered.loss]))  # (N,)
    ends = torch.tensor([0, *map(len, documents)]).cumsum(0)                           # (S + 1,)
    # The token that is learnt at a place is the next one, so whether it counts is asked of the next one, too.
    supervised = loss.roll(-1)
    # The last token of a document answers for none: what follows it is another document.
    supervised[ends[1:] - 1] = False
    pixels = [d.pixels for d in documents if d.pixels is not None]
    return MLLMBatch(
        ids=ids,
        positions=torch.cat([d.positions for d in documents], dim=1),
        cu_seqlens=ends.int(),
        pixels=torch.cat(pixels) if pixels else None,
        grids=[grid for d in documents for grid in d.grids] or None,
        labels=torch.where(supervised, ids.roll(-1), -100),
    )


# -------------------------------------------------------------------------------------------------------------- packs


def batches(
    stream: Stream, *, documents: int | None = None, lookahead: int = 1, **budget: int | None
) -> Iterator[tuple[list[Document], dict]]:
    """Lists of documents within a budget, and the position that continues behind each.

    budget: the most that the documents of a list may hold together, by names of `sizes`: tokens, patches, latents. documents:
    the most of them. One that is over the budget alone is a list of its own.

    First fit: a list takes the waiting documents that still fit, the oldest first, then new ones, until `lookahead` wait. The
    oldest always fits into an empty list, so none waits for ever. The position names those that wait; they are read again.
    """
    # 0 and None are no limit, so nothing is counted for them.
    budget = {name: most for name, most in budget.items() if most}
    items = iter(stream)
    waiting = deque()  # (number in the stream, document) of those that did not fit into earlier lists
    more = True  # whether the stream may still have documents
    while True:
        batch = []
        misfits = []  # (number, document) of those for which there was no room in this list
        left = dict(budget)
        while len(batch) != documents and (waiting or (more and len(misfits) < lookahead)):
            # The oldest of those that wait, else a new one.
            if waiting:
                number, document = waiting.popleft()
            else:
                document = next(items, None)
                if document is None:
                    more = False
                    break
                # The stream moves on, so its number and name are noted while they are this document's.
                number = stream.item
                if isinstance(document, Document):
                    document.name = stream.where

            # Into the list if there is room; the first one always fits.
            size = sizes(document, budget)
            if batch and any(size[name] > left[name] for name in left):
                misfits.append((number, document))
                continue
            batch.append(document)
            left = {name: left[name] - size[name] for name in left}
        # Only with nothing waiting and nothing to come is a list empty, since the first one always fits.
        if not batch:
            return
        # Whoever did not fit goes back to the front, oldest first.
        waiting.extendleft(reversed(misfits))
        yield batch, stream.position_with([number for number, _ in waiting])


def sizes(document: Document, names: Iterable[str] = ("tokens", "patches", "latents")) -> dict[str, int]:
    """What a document costs each tower: "tokens" of the MLLM, "patches" of its vision tower, "latents" of the DiT."""
    return {name: len(document) if name == "tokens" else getattr(document, name) for name in names}


def fill(documents: list[Document], **budget: int | None) -> dict[str, float]:
    """How full a list of `batches` is, as a share of each budget. The largest is the one that bounds the list."""
    budget = {name: most for name, most in budget.items() if most}
    return {name: sum(sizes(d, [name])[name] for d in documents) / most for name, most in budget.items()}


def prepare(
    record: dict, number: int, *, seed: int = 0, targets: int | None = None, max_latents: int | None = None, **options
) -> Document | None:
    """`tokenize`, and the pictures that the document trains: at most `targets` of the assistant's, drawn by (seed, number).

    max_latents: targets that are too large alone are not drawn, and only as many as fit together. What stands behind the last
    target is cut off, since nothing that is trained can see it.
    """
    document = tokenize(record, **options)
    if document is None or (targets is None and max_latents is None):
        return document
    # A draw that depends on nothing but seed and number is the same after a resume, with any number of ranks.
    order = random.Random(f"targets {seed} {number}").sample(document.targets, len(document.targets))
    document.drawn = []
    for j in order:
        enough = len(document.drawn) == targets
        too_large = max_latents and document.latents + document.latents_of(j) > max_latents
        if not enough and not too_large:
            document.drawn.append(j)
    # An error, so that the record is counted and told: left out in silence, nobody would know what is not trained.
    if document.targets and not document.drawn:
        least = min(map(document.latents_of, document.targets))
        raise InputError(f"too large: {least:,} latent patches up to the smallest target, the limit is {max_latents:,}")
    return before(document, max(document.drawn)) if document.drawn else document


def before(document: Document, j: int) -> Document:
    """What conditions picture j: the text up to its BOV, the patches of earlier pictures, and the pictures up to j itself."""
    # The first n tokens end before BOV; the picture itself is only a target, and its patches are not for the vision tower.
    whole = document.rendered
    n = whole.images[j].bov
    rendered = replace(whole, ids=whole.ids[:n], loss=whole.loss[:n], images=whole.images[: j + 1])
    grids = document.grids[:j]
    patches = sum(h * w for h, w in grids)
    # Copies: a view would travel between processes with all that it is a view of.
    positions = document.positions[:, :n].clone()
    pixels = document.pixels[:patches].clone() if j else None
    pictures = document.pictures[: j + 1]
    return replace(document, rendered=rendered, positions=positions, pixels=pixels, grids=grids, pictures=pictures)


def loader(
    source: Files | Mix | Callable[[int], dict],
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    tokens: int | None = None,
    patches: int | None = None,
    latents: int | None = None,
    documents: int | None = None,
    lookahead: int = 16,
    position: list[dict | int] | None = None,
    max_tokens: int | None = None,
    targets: int | None = None,
    seed: int = 0,
    pictures: bool = True,
    max_area: int | None = None,
    patch: int = PATCH,
    targets_only: bool = False,
    **options,
) -> Iterator[tuple[list[Document], dict]]:
    """What the stages read: `batches` of tokenised documents from a `Stream`, with the position to save beside a checkpoint.

    tokens, patches, latents, documents, lookahead: those of `batches`; no document alone is over the budget. position: the last
    one of every rank, in a list. max_tokens defaults to `tokens`; it, pictures, max_area, patch and targets_only are those of
    `tokenize`, targets that of `prepare`, other options those of `Stream`.
    """
    # Handed to the stream, so that its workers, where it has some, decode and tokenize while the model trains.
    ready = partial(
        prepare,
        seed=seed,
        targets=targets,
        max_latents=latents,
        tokenizer=tokenizer,
        processor=processor,
        max_tokens=max_tokens or tokens,
        max_patches=patches,
        pictures=pictures,
        max_area=max_area,
        patch=patch,
        targets_only=targets_only,
    )
    # As many are prepared ahead as a list may take at once; a dialogue rarely has under a hundred tokens.
    stream = Stream(source, seed, prepare=ready, ahead=max(16, documents or 0, (tokens or 0) // 100), **options)
    if position is not None:
        stream.resume(position)
    listed = batches(stream, documents=documents, lookahead=lookahead, tokens=tokens, patches=patches, latents=latents)
    # Like lengths side by side are one dense batch to PyTorch's attention.
    return ((sorted(batch, key=len), at) for batch, at in listed)


# ------------------------------------------------------------------------------------------------------- command line


def check(path: str, pictures: bool = True, tokenizer: Tokenizer | None = None, processor: ImageProcessor | None = None) -> int:
    """Print every problem of a file and a summary; the number of records that cannot be used."""
    # A shard has an index; the lines of a file are counted first, for the bar alone.
    if path.endswith(".tar"):
        shard = Shard(path)
        lines = len(shard)
        unit = " records"
        records = ((shard.where(i)[1], *shard.raw(i)) for i in range(lines))
    else:
        with open_lines(path) as file:
            lines = sum(1 for _ in file)
        unit = " lines"
        records = ((line, record, Path(path).parent) for line, record in read_records(path))
    total = Counter()  # of records, bad ones, pictures, those in answers, tokens, supervised ones
    kinds = Counter()  # of problems
    warned = Counter()
    for line, record, folder in tqdm(records, total=lines, unit=unit, disable=None, leave=False):
        total["records"] += 1

        # Warnings are only counted, by what they say; the place in a list says nothing about the kind.
        problems = []
        for problem in validate(record, folder, path, line, pictures=pictures):
            if not problem.warning:
                problems.append(problem)
            elif "[" in problem.field:
                warned[problem.message] += 1
            else:
                warned[f"{problem.field}: {problem.message}"] += 1

        # What validation cannot see: whether the tokenizer and the picture processor take it.
        if tokenizer and not problems:
            try:
                document = tokenize(record, tokenizer, processor, folder=folder, pictures=False)
                total["tokens"] += len(document)
                total["supervised"] += sum(document.rendered.loss)
            except InputError as e:
                problems = [Problem(path, line, "", one_line(e))]

        for problem in problems:
            tqdm.write(str(problem))
            kinds[problem.kind] += 1
        if problems:
            total["bad"] += 1
            continue
        # Counted in the normal form, where every way to write a picture is the same.
        for message in normalise(record, folder):
            pictures_here = len(image_parts([message]))
            total["images"] += pictures_here
            if message["role"] == "assistant":
                total["painted"] += pictures_here

    # Nothing in an empty file is bad, and yet no training could begin with it.
    n = total["records"]
    bad = total["bad"]
    if not n:
        raise InputError(f"{path}: no record in it")
    for what, count in (*warned.most_common(), *kinds.most_common()):
        print(f"{count:>9,} x {what}")
    summary = f"{path}: {n:,} records, {n - bad:,} ok, {bad:,} bad"
    summary += f"; {total['images']:,} pictures, {total['painted']:,} of them in answers"
    if tokenizer:
        summary += f"; {total['tokens']:,} tokens, {total['supervised']:,} supervised"
    print(summary)
    return bad


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="report every problem of JSONL files and shards")
    one.add_argument("files", nargs="+", metavar="FILE")
    one.add_argument("--images", action=argparse.BooleanOptionalAction, default=True, help="open every picture, or none")
    one.add_argument("--tokenizer", metavar="MLLM", help="an mllm/ folder or Hub id: counts tokens")
    two = commands.add_parser("convert", help="make records from another format")
    two.add_argument("--from", dest="kind", required=True, choices=sorted(CONVERTERS))
    two.add_argument("source", metavar="IN", help="JSON lines, or a file with one JSON array")
    two.add_argument("target", metavar="OUT.jsonl", help="in a folder above the pictures, since records point downwards")
    two.add_argument("--images", metavar="FOLDER", help="where IN's picture paths start (default: IN's folder)")
    three = commands.add_parser("pack", help="write the records of a JSONL file, with their pictures, as tar shards")
    three.add_argument("source", metavar="IN.jsonl")
    three.add_argument("target", metavar="OUT", help="shards are called OUT-000000.tar, OUT-000001.tar, ...")
    three.add_argument("--megabytes", type=float, default=1000, help="size of a shard (default %(default)s)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs about broken pictures, which are reported here
    try:
        if args.command == "convert":
            return int(convert(args.kind, args.source, args.target, args.images) > 0)
        if args.command == "pack":
            return int(pack_shards(args.source, args.target, args.megabytes) > 0)
        if args.tokenizer and not args.images:
            raise InputError("--tokenizer counts the pictures' tokens, so it needs --images")
        parts = []
        if args.tokenizer:
            folder = resolve(args.tokenizer)
            parts = [Tokenizer.from_pretrained(folder), load_processor(folder)]
        return int(sum([check(file, args.images, *parts) for file in args.files]) > 0)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        abandon_stdout()
        return 1
    except OSError as e:  # a full disk, a folder that may not be written
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
