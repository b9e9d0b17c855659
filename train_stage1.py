"""Stage 1: the MLLM learns to write interleaved documents and to say when a picture is due. No DiT in sight.

    python train_stage1.py                                    the bundled miniature goes on learning, on the sketchbook
    torchrun --nproc_per_node=2 train_stage1.py               the same in two processes, the same loss
    torchrun --nproc_per_node=8 train_stage1.py --mllm Qwen/Qwen2.5-VL-7B-Instruct --data a.jsonl,b.jsonl --lr 1e-5 --out r

The loss is the cross-entropy of the assistant's text, of BOV and of the end of its turn; not of user text, picture tokens or
<|vision_end|>, which the sampler supplies (paper, stage 1; `tokenizer.render` marks the targets). Its sum is divided by the
number of targets over all ranks and micro-batches, so that any number of processes takes the step of one process with the
same documents.
"""

if __name__ == "__main__":  # Ctrl-C has to be quiet during the imports below, too
    import interrupt

    interrupt.quiet()

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from checkpoint import BUNDLED, InputError, part_folder
from data import Document, fill, loader, pack_documents
from distributed import Ranks
from model import MLLM, ImageProcessor, mrope_positions
from records.stream import Quarantine, open_source, pick_workers
from tokenizer import Rendered, Tokenizer
from training import LanguageLoss, Run, TrainConfig, add_statistics, autocast, check_step0, compile_blocks
from training import language_statistics, model_flops, parse_config, print_trained, run_script


@dataclass
class Stage1Config(TrainConfig):
    # ---- data
    data: str = "sketchbook"  # the sketchbook, or JSONL files and shards, mixed by weights: "a.jsonl=2,s/{00..99}.tar=1"
    kinds: str = ""  # sketchbook only: kinds of dialogue and their weights, e.g. "lesson=2,one=1"; empty: the corpus' own
    tokens: int = 4096  # budget of a micro-batch of one rank; lower it where memory does not suffice
    patches: int = 0  # budget of the vision tower in a micro-batch; 0: as many as come with the tokens
    documents: int = 0  # at most so many in a micro-batch; 0: as many as fit
    lookahead: int = 16  # documents that may wait for a micro-batch with room for them
    # ---- model
    mllm: str = BUNDLED  # run, folder or Hub id of the language model to start from
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    # ---- other defaults than those of every run
    out: str = "runs/stage1"
    steps: int = 4000
    lr: float = 3e-5  # learning rate: the trained miniature's, whose loss it keeps; 1e-5 suits a 7B
    beta2: float = 0.98
    weight_decay: float = 0.01

    def check(self) -> None:
        super().check()
        if not (self.documents or self.tokens or self.patches):
            raise InputError("--tokens 0: needs another budget: --patches or --documents")


def train(c: Stage1Config) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)

    # All of the MLLM is trained.
    folder = part_folder(c.mllm, "mllm")
    tokenizer = Tokenizer.from_pretrained(folder)
    processor = ImageProcessor.from_pretrained(folder)
    mllm = MLLM.from_pretrained(folder, device=ranks.device)
    mllm.set_checkpointing(c.checkpointing)
    if ranks.main:
        print_trained({"vision tower": mllm.visual, "decoder": mllm.model}, {})

    def save(folder: Path, mllm: MLLM) -> None:
        for part in (mllm, tokenizer, processor):
            part.save_pretrained(folder / "mllm")

    run = Run(c, ranks, mllm, save)
    loss_of = LanguageLoss(mllm)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of, find_unused=True)  # a batch may have no picture
    source = open_source(c.data, c.kinds)
    budget = {"tokens": c.tokens, "patches": c.patches}
    data = loader(
        source,
        tokenizer,
        processor,
        **budget,
        documents=c.documents or None,
        lookahead=c.lookahead,
        pictures=False,
        position=run.position,
        quarantine=Quarantine(file=run.folder / "quarantine.jsonl"),
        seed=c.seed,
        rank=ranks.rank,
        world_size=ranks.size,
        workers=pick_workers(c.workers),
    )

    for step in run.loop():
        # Data. The loss is a mean over the targets of all micro-batches of all ranks, so they are counted first.
        micro = []
        for _ in range(c.accumulate):
            documents, place = next(data)
            micro.append(documents)
        packs = [pack_documents(documents).to(ranks.device, processor) for documents in micro]
        targets = ranks.sum(sum((pack.labels >= 0).sum().item() for pack in packs))
        run.lap("data")

        # Loss and gradient.
        loss = 0.0
        parts = {}
        for pack in ranks.micro_batches(loss_of, packs):
            with autocast(c.dtype, ranks.device):
                total, kinds = loss_of(pack)
            run.lap("forward")
            loss += ranks.backward(total / targets)
            run.lap("backward")
            parts = add_statistics(parts, language_statistics(kinds))
        norm = run.clip()

        # What the log says of the step.
        names = [document.name for documents in micro for document in documents]
        full = [max(fill(documents, **budget).values()) for documents in micro]
        stats = {"loss": loss, **parts, "fill": (sum(full) / len(full), 1.0)}
        stats["tokens"] = sum(len(pack.ids) for pack in packs)
        stats["documents"] = len(names)
        stats["flops"] = sum(model_flops(documents, mllm) for documents in micro)
        stats = ranks.sum_statistics(stats)

        # Step, average, log. A step whose loss or gradient is no number changes no weight.
        if run.finite(stats["loss"], norm, names):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(place)

        # Look: is the first loss what it has to be, and what does the model write?
        if step == 0 and ranks.main:
            check_step0("cross-entropy", stats["loss"], 0.0, math.log(tokenizer.vocab_size))  # less than a guess
        if run.sheet_due:  # the first one is short, so that it comes soon
            sample_sheet(run, c, source, tokenizer, processor, mllm, 3 if run.step == 1 else 10)
    ranks.close()


@torch.no_grad()
def sample_sheet(run: Run, c: Stage1Config, source, tokenizer, processor, mllm: MLLM, n: int, most: int = 160) -> None:
    """Answers to fixed requests, greedily written. Where the model asks for a picture, it is shown the true one."""
    documents, _ = next(loader(source, tokenizer, processor, documents=n, seed=c.seed + 1, pictures=False))
    answers = [Answer(d, tokenizer, processor) for d in documents]
    writable = torch.tensor(tokenizer.writable, device=run.ranks.device)
    with run.averaged():
        for _ in range(most):
            open_ones = [a for a in answers if a.open]
            if not open_ones:
                break
            pack = pack_documents([a.so_far() for a in open_ones]).to(run.ranks.device, processor)
            hidden = mllm(pack.ids, pack.positions, pack.cu_seqlens, pack.pixels, pack.grids)[-1]
            logits = mllm.logits(hidden[pack.cu_seqlens[1:].long() - 1])                               # (answers, vocab)
            for a, token in zip(open_ones, writable[logits[:, writable].argmax(1)].tolist(), strict=True):
                a.push(token)
    lines = [f"# Step {run.step}\n"]
    for a in answers:
        for who, ids in (("asked", a.ids[a.system : a.start]), ("wrote", a.ids[a.start :])):
            text = PICTURE.sub(" [picture] ", tokenizer.decode(ids, skip_special=False))
            text = TURN.sub(" ", text) + (" [no end yet]" if who == "wrote" and a.open else "")
            lines.append(f"* {who}: {' '.join(text.split())}")
        lines.append("")
    run.sample_file("md").write_text("\n".join(lines))


PICTURE = re.compile(r"<\|vision_start\|>(<\|image_pad\|>)*(<\|vision_end\|>)?")
TURN = re.compile(r"<\|im_start\|>(user|assistant|$)|<\|(im_end|endoftext)\|>")


class Answer:
    """The first answer of a document, written anew token by token (all of it read again each time: samples are short)."""

    def __init__(self, document: Document, tokenizer: Tokenizer, processor: ImageProcessor):
        self.document, self.tokenizer, self.processor, self.open = document, tokenizer, processor, True
        r = document.rendered
        self.system, self.start = r.system_end, r.loss.index(True)
        self.ids = r.ids[: self.start]
        self.shown = sum(span.end < self.start for span in r.images)  # pictures of the document that have been read

    def so_far(self) -> Document:
        grids = self.document.grids[: self.shown]
        merged = [self.processor.merged(grid) for grid in grids]
        pixels = self.document.pixels[: sum(h * w for h, w in grids)] if grids else None
        positions, _ = mrope_positions(self.ids, merged, self.tokenizer.image_pad)
        return Document(Rendered(self.ids, [False] * len(self.ids)), positions, pixels, grids, [])

    def push(self, token: int) -> None:
        self.ids = [*self.ids, token]
        t = self.tokenizer
        self.open = token not in (t.im_end, t.endoftext)
        if token == t.vision_start:
            if self.shown == len(self.document.grids):
                self.open = False  # the record has no picture left to show
                return
            h, w = self.processor.merged(self.document.grids[self.shown])
            self.ids += [t.image_pad] * (h * w) + [t.vision_end]
            self.shown += 1


if __name__ == "__main__":
    run_script(lambda: train(parse_config(Stage1Config, doc=__doc__)))
