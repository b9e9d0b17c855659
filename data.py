"""Records in, packs out: dialogues in JSON lines become the packed batches that both training stages read.

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
    * A picture is taken upright (EXIF), on white where it is transparent, of several frames the first; limits: records.py.
    * Other keys are ignored, with a warning. Text never becomes a control token, whatever characters it has.

    python data.py check train.jsonl                     every problem as FILE:LINE: field: message, then a summary
    python data.py check train.jsonl --no-images         the same without opening the pictures
    python data.py check train.jsonl --tokenizer MLLM    counts tokens too; MLLM is a checkpoint's mllm/ folder or a Hub id
    python data.py convert --from llava in.json out.jsonl --images coco     also llama-factory, obelics (formats.py)

Exit status: 0 all is well, 1 some records are not, 2 there is nothing to work with.
"""

import argparse
import itertools
import json
import logging
import os
import pickle
import signal
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

import sketchbook
from checkpoint import InputError
from formats import CONVERTERS, convert
from model import ImageProcessor, mrope_positions
from records import BLANK, BadRecord, Problem, load_image, normalise, one_line, open_lines, parse, read_records, validate
from tokenizer import Rendered, Tokenizer, render
from vae import to_tensor


def example() -> dict:
    """The record at the top of this file."""
    return json.JSONDecoder().raw_decode(__doc__, __doc__.index('{"messages"'))[0]


# ---------------------------------------------------------------------------------------------------------- documents


@dataclass
class Document:
    """A record as the models read it, on the CPU."""

    rendered: Rendered
    positions: Tensor  # (3, n) long, mRoPE
    pixels: Tensor | None  # (P, 3 * 2 * p * p), the patches of all pictures, None without pictures
    grids: list[tuple[int, int]]  # patches (h, w) of every picture
    pictures: list[Tensor]  # (3, H, W) in [-1, 1] for the VAE; empty if they were not asked for
    name: str = ""  # where its record stands, as FILE:LINE or "seed:NUMBER"; set by `Stream`

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
    pictures: bool = True,
    max_area: int | None = None,
    targets_only: bool = False,
) -> Document | None:
    """A valid record to a document. Its pictures are paths (relative to `folder`), data URLs, bytes or open images.

    max_tokens: a longer dialogue loses its last messages until it fits and ends with the assistant's; when nothing is left of
        it, it is refused. It is never cut inside a message: an answer that stops anywhere teaches to stop anywhere.
    pictures: also prepare the pictures for the VAE, with at most max_area pixels each.
    targets_only: None for a document without a picture of the assistant's.
    """
    messages = normalise(record, folder)
    patches, grids, tensors = [], [], []
    for part in (p for m in messages for p in m["content"] if p["type"] == "image"):
        try:
            image = load_image(part["image"])
        except InputError as e:
            raise InputError(f"picture cannot be used: {e}") from None
        pixels, grid = processor(image)
        patches.append(pixels)
        grids.append(grid)
        tensors += [to_tensor(image, max_area=max_area)] if pictures else []
    merged = [processor.merged(grid) for grid in grids]
    while True:
        n = sum(p["type"] == "image" for m in messages for p in m["content"])
        rendered = render(tokenizer, messages, merged[:n])
        if not max_tokens or len(rendered.ids) <= max_tokens:
            break
        whole = len(rendered.ids)
        messages.pop()
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if not messages:
            raise InputError(f"too long: {whole:,} tokens up to the first answer, the limit is {max_tokens:,}")
    if not any(rendered.loss):
        raise InputError("nothing to learn from: no assistant message")
    if targets_only and not any(span.role == "assistant" for span in rendered.images):
        return None
    positions, _ = mrope_positions(rendered.ids, merged[:n], tokenizer.image_pad)
    return Document(rendered, positions, torch.cat(patches[:n]) if n else None, grids[:n], tensors[:n])


@dataclass
class MLLMBatch:
    """Documents one behind the other, without padding: N tokens, P patches."""

    ids: Tensor  # (N,) long
    positions: Tensor  # (3, N) long
    cu_seqlens: Tensor  # (S + 1,) int32
    pixels: Tensor | None  # (P, 3 * 2 * p * p)
    grids: list[tuple[int, int]] | None
    labels: Tensor  # (N,) long: the token to predict at each place, -100 where none is asked

    def to(self, device: str | torch.device) -> "MLLMBatch":
        moved = {k: v.to(device, non_blocking=True) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return MLLMBatch(**vars(self) | moved)


def pack_documents(documents: list[Document]) -> MLLMBatch:
    """Labels are shifted here: place i answers for token i + 1, if that one is supervised and of the same document."""
    ids = [torch.tensor(d.rendered.ids) for d in documents]
    labels = [
        torch.cat([torch.where(torch.tensor(d.rendered.loss[1:], dtype=torch.bool), x[1:], -100), x.new_tensor([-100])])
        for d, x in zip(documents, ids, strict=True)
    ]
    pixels = [d.pixels for d in documents if d.pixels is not None]
    return MLLMBatch(
        ids=torch.cat(ids),
        positions=torch.cat([d.positions for d in documents], dim=1),
        cu_seqlens=torch.tensor([0, *map(len, documents)]).cumsum(0).int(),
        pixels=torch.cat(pixels) if pixels else None,
        grids=[grid for d in documents for grid in d.grids] or None,
        labels=torch.cat(labels),
    )


# ------------------------------------------------------------------------------------------------------------ streams


class Lines:
    """The records of JSONL files by number. Opening reads the files once and keeps where each line starts."""

    def __init__(self, files: list[str | Path]):
        self.files = [Path(f) for f in files]
        places = array("q")
        for n, path in enumerate(self.files):
            with open_lines(path) as file:
                start = 0
                for number, line in enumerate(file, 1):
                    if line.strip(BLANK):
                        places.extend((n, start, number))
                    start += len(line)
        if not places:
            raise InputError(f"{', '.join(map(str, self.files)) or 'no file given'}: no record in it")
        self.places = np.array(places).reshape(-1, 3)

    def __len__(self) -> int:
        return len(self.places)

    def where(self, i: int) -> tuple[str, int]:
        """File and line of record i."""
        return str(self.files[self.places[i][0]]), int(self.places[i][2])

    def __getitem__(self, i: int) -> dict:
        """A valid record with absolute paths, or BadRecord."""
        n, start, number = self.places[i].tolist()
        path = self.files[n]
        with open_lines(path) as file:  # opened anew: processes that share an open file share its position too
            file.seek(start)
            record = parse(file.readline(), str(path), number)
        for problem in validate(record, path.parent, str(path), number, pictures=False):
            if not problem.warning:
                raise BadRecord(problem)
        return {"messages": normalise(record, path.parent)}


class Quarantine:
    """Counts records that cannot be used, by kind, and stops a run in which they are more than `share` of at least `after`."""

    def __init__(self, share: float = 0.05, after: int = 200):
        self.share, self.after = share, after
        self.seen, self.kinds, self.first = 0, Counter(), {}

    def good(self) -> None:
        self.seen += 1

    def bad(self, problem: Problem) -> None:
        self.seen += 1
        self.kinds[problem.kind] += 1
        if problem.kind not in self.first:
            self.first[problem.kind] = problem
            print(f"skipped: {problem}", file=sys.stderr)  # once a kind; the others are counted
        bad = self.kinds.total()
        if self.seen >= self.after and bad > self.share * self.seen:
            raise InputError(
                f"{bad} of {self.seen} records cannot be used, more than {self.share:.0%}: {self.summary()}; "
                f"`python data.py check` tells which, the first is {next(iter(self.first.values()))}"
            )

    def summary(self) -> str:
        """For example "no such picture (12), not valid JSON (1)"; empty when all is well."""
        return ", ".join(f"{kind} ({count})" for kind, count in self.kinds.most_common(3))


class Stream:
    """An endless, reproducible sequence of records that continues where it stopped.

    source: `Lines`, shuffled anew in every epoch, or a function seed -> record, such as sketchbook.dialogue.
    prepare: applied to every record, for example partial(tokenize, ...). It may raise InputError (the record is skipped and
        counted) or return None (passed over).
    workers: background processes that read and prepare, `ahead` items before they are due; the sequence is the same.
    epochs: only with `Lines`; None goes on for ever.

    Item number n of the whole sequence belongs to rank n % world_size. `position` counts the items of this rank that are
    done, bad ones included. It is the whole state, unless the run has gone on with another number of ranks: then what the old
    ranks had left open between them, `late`, takes the places up to `until`, and those before stand for what is done.
    """

    def __init__(
        self,
        source: Lines | Callable[[int], dict],
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        *,
        prepare: Callable[[dict], object] | None = None,
        workers: int = 0,
        ahead: int = 16,
        epochs: int | None = None,
        quarantine: Quarantine | None = None,
    ):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.prepare, self.workers, self.ahead = prepare, workers, ahead
        self.end = 2**62 if epochs is None else epochs * len(source)
        self.quarantine = quarantine or Quarantine()
        self.position, self.late, self.until = 0, [], 0
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0))

    def state_dict(self) -> dict:
        more = {"late": self.late, "until": self.until} if self.position * self.world_size + self.rank < self.until else {}
        return {"position": self.position, **more}

    @property
    def place(self) -> int | dict:
        """`state_dict` as short as it can be: mostly the position alone."""
        state = self.state_dict()
        return state if "late" in state else self.position

    def load_state_dict(self, state: dict) -> None:
        self.position, self.late, self.until = state["position"], state.get("late", []), state.get("until", 0)

    def resume(self, states: list[dict]) -> None:
        """Continue where a run stood, given the state of each of its ranks. Costs what its ranks were apart, no more."""
        if len(states) == self.world_size:
            return self.load_state_dict(states[self.rank])
        self.load_state_dict(max(states, key=lambda state: state.get("until", 0)))
        ranks, done = len(states), [state["position"] for state in states]
        until = max(self.until, *(p * ranks for p in done))
        late = [self._number(k) for k in range(min(done) * ranks, until) if k // ranks >= done[k % ranks]]
        self.position = -((self.rank - sum(done)) // self.world_size)  # the first place of this rank behind sum(done) places
        self.late, self.until = late, until

    def _number(self, place: int) -> int:
        before = place - self.until  # negative within `late`, which ends at `until`
        return self.late[before] if -len(self.late) <= before < 0 else place

    def __getitem__(self, number: int) -> object:
        """Item `number` of the whole sequence; a Problem stands for a record that cannot be used."""
        where = ("seed", (self.seed << 32) + number)
        try:
            if isinstance(self.source, Lines):
                epoch, k = divmod(number, len(self.source))
                if self._order[0] != epoch:
                    self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.source))
                i = int(self._order[1][k])
                where = self.source.where(i)
                record = self.source[i]
            else:
                record = self.source(where[1])
            item = self.prepare(record) if self.prepare else record
            if isinstance(item, Document):
                item.name = "{}:{}".format(*where)
            return item
        except BadRecord as e:
            return e.args[0]
        except InputError as e:
            return Problem(*where, "", one_line(e))

    def __iter__(self) -> Iterator[object]:
        places = itertools.count(self.position * self.world_size + self.rank, self.world_size)
        numbers = itertools.takewhile(lambda number: number < self.end, map(self._number, places))
        if self.workers:
            # Items travel pickled: as tensors each would hold a file descriptor, and a pack has thousands. The generator keeps
            # the loader from drawing from, and so moving on, the training's own random numbers.
            items = DataLoader(
                self,
                batch_size=None,
                sampler=numbers,
                num_workers=self.workers,
                prefetch_factor=max(2, self.ahead // self.workers),
                collate_fn=pickle.dumps,
                worker_init_fn=outlive_one_signal,
                generator=torch.Generator(),
            )
            items = map(pickle.loads, items)
        else:
            items = map(self.__getitem__, numbers)
        idle = 0
        for item in items:
            self.position += 1
            if isinstance(item, Problem):
                self.quarantine.bad(item)
                continue
            self.quarantine.good()
            idle = idle + 1 if item is None else 0
            if idle == 10_000:
                raise InputError("10,000 records in a row have nothing to train on (no picture in an answer?)")
            if item is not None:
                yield item


def outlive_one_signal(worker: int) -> None:
    """A SIGTERM to the whole process group asks the training to finish its step, for which it needs its workers.

    The second one, which the loader sends to a worker that is left over, ends it.
    """
    signals = itertools.count()
    signal.signal(signal.SIGTERM, lambda *_: next(signals) and os._exit(0))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)


def batches(
    stream: Stream, *, tokens: int | None = None, documents: int | None = None
) -> Iterator[tuple[list[Document], int | dict]]:
    """Lists of documents within a budget of tokens, of documents or both, and the place that continues behind each.

    A document that does not fit opens the next list; one that is over the budget alone is a list of its own.
    """
    batch, size, position = [], 0, stream.place
    for document in stream:
        if batch and tokens and size + len(document) > tokens:
            yield batch, position
            batch, size = [], 0
        batch.append(document)
        size += len(document)
        position = stream.place
        if len(batch) == documents:
            yield batch, position
            batch, size = [], 0
    if batch:
        yield batch, position


def open_source(data: str, kinds: str = "", split: str = "train") -> Lines | Callable[[int], dict]:
    """JSONL files "a.jsonl,b.jsonl" (a file named twice counts double), or "sketchbook" with kinds of dialogue and their
    weights "lesson=2,one=1" (empty: the corpus' own)."""
    if data != "sketchbook":
        return Lines([name for name in data.split(",") if name])
    try:
        weights = {kind: float(weight or 1) for kind, _, weight in (item.partition("=") for item in kinds.split(",") if item)}
        if not all(0 < weight < float("inf") for weight in weights.values()):
            raise ValueError
    except ValueError:
        raise InputError(f"kinds {kinds!r}: write kinds and positive weights like lesson=2,one=1") from None
    source = partial(sketchbook.dialogue, split=split, kinds=weights or None)
    source(0)  # an unknown kind or split shows here, before a run starts
    return source


def loader(
    source: Lines | Callable[[int], dict],
    tokenizer: Tokenizer,
    processor: ImageProcessor,
    *,
    tokens: int | None = None,
    documents: int | None = None,
    position: list[int | dict] | None = None,
    max_tokens: int | None = None,
    pictures: bool = True,
    max_area: int | None = None,
    targets_only: bool = False,
    **options,
) -> Iterator[tuple[list[Document], int | dict]]:
    """What the stages read: `batches` of tokenised documents from a `Stream`, with the position to save beside a checkpoint.

    position: every rank's last one. Another number of ranks reads the same documents on, none twice and none left out.
    max_tokens defaults to `tokens`; it, pictures, max_area and targets_only are those of `tokenize`, other options those of
    `Stream`.
    """
    prepare = partial(
        tokenize,
        tokenizer=tokenizer,
        processor=processor,
        max_tokens=max_tokens or tokens,
        pictures=pictures,
        max_area=max_area,
        targets_only=targets_only,
    )
    stream = Stream(source, prepare=prepare, ahead=max(16, documents or 0), **options)
    if position:
        stream.resume([{"position": p} if isinstance(p, int) else p for p in position])
    listed = batches(stream, tokens=tokens, documents=documents)
    return ((sorted(batch, key=len), at) for batch, at in listed)  # like lengths side by side: attention pads least


# ------------------------------------------------------------------------------------------------------- command line


def check(path: str, pictures: bool = True, tokenizer: Tokenizer | None = None, processor: ImageProcessor | None = None) -> int:
    """Print every problem of a file and a summary; the number of records that cannot be used."""
    with open_lines(path) as file:
        lines = sum(1 for _ in file)
    bad, images, painted, tokens, supervised = 0, 0, 0, 0, 0
    kinds, warned, n = Counter(), Counter(), 0
    folder = Path(path).parent
    for line, record in tqdm(read_records(path), total=lines, unit=" lines", disable=None, leave=False):
        n += 1
        problems = validate(record, folder, path, line, pictures=pictures)
        warned.update(f"{p.field}: {p.message}" if "[" not in p.field else p.message for p in problems if p.warning)
        problems = [p for p in problems if not p.warning]
        if tokenizer and not problems:
            try:
                document = tokenize(record, tokenizer, processor, folder=folder, pictures=False)
                tokens += len(document)
                supervised += sum(document.rendered.loss)
            except InputError as e:
                problems = [Problem(path, line, "", one_line(e))]
        for problem in problems:
            tqdm.write(str(problem))
        kinds.update(p.kind for p in problems)
        bad += bool(problems)
        if not problems:
            roles = [m["role"] for m in normalise(record) for part in m["content"] if part["type"] == "image"]
            images += len(roles)
            painted += roles.count("assistant")
    if not n:
        raise InputError(f"{path}: no record in it")
    for what, count in (*warned.most_common(), *kinds.most_common()):
        print(f"{count:>9,} x {what}")
    print(f"{path}: {n:,} records, {n - bad:,} ok, {bad:,} bad; {images:,} pictures, {painted:,} of them in answers", end="")
    print(f"; {tokens:,} tokens, {supervised:,} supervised" if tokenizer else "")
    return bad


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("check", help="report every problem of JSONL files")
    one.add_argument("files", nargs="+", metavar="FILE")
    one.add_argument("--images", action=argparse.BooleanOptionalAction, default=True, help="open every picture, or none")
    one.add_argument("--tokenizer", metavar="MLLM", help="an mllm/ folder or Hub id: counts tokens")
    two = commands.add_parser("convert", help="make records from another format")
    two.add_argument("--from", dest="kind", required=True, choices=sorted(CONVERTERS))
    two.add_argument("source", metavar="IN", help="JSON lines, or a file with one JSON array")
    two.add_argument("target", metavar="OUT.jsonl", help="in a folder above the pictures, since records point downwards")
    two.add_argument("--images", metavar="FOLDER", help="where IN's picture paths start (default: IN's folder)")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    logging.getLogger("PIL").setLevel(logging.CRITICAL)  # it logs about broken pictures, which are reported here
    try:
        if args.command == "convert":
            return int(convert(args.kind, args.source, args.target, args.images) > 0)
        if args.tokenizer and not args.images:
            raise InputError("--tokenizer counts the pictures' tokens, so it needs --images")
        parts = [cls.from_pretrained(args.tokenizer) for cls in (Tokenizer, ImageProcessor)] if args.tokenizer else []
        return int(sum([check(file, args.images, *parts) for file in args.files]) > 0)
    except InputError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `| head` has seen enough; the interpreter must not write to the pipe again when it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as e:  # a full disk, a folder that may not be written
        print(f"error: {one_line(e)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
