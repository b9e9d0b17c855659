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
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from operator import itemgetter
from pathlib import Path

import torch
from PIL import Image

import lora
from checkpoint import BUNDLED, InputError, part_folder
from data import fill, image_parts, loader, pack_documents, tokenize
from distributed import Ranks
from model import MLLM, ImageProcessor
from pipeline import Answer, Paint, Settings, Writer
from records.stream import Quarantine, Stream, open_source, pick_workers
from records.validate import load_image, normalise
from tokenizer import SYSTEM, Tokenizer
from training import LanguageLoss, Run, TrainConfig, add_statistics, autocast, check_step0, compile_blocks
from training import language_statistics, model_flops, parse_config, pick_frozen_dtype, print_trained, run_script


@dataclass
class Stage1Config(TrainConfig):
    # ---- data
    data: str = "sketchbook"  # JSONL files, shards, modules with a function record, mixed: "a.jsonl=2,s/{00..99}.tar=1"
    kinds: str = ""  # of such a module's records, with weights: "lesson=2,one=1" of the sketchbook; empty: the module's own
    tokens: int = 4096  # budget of a micro-batch of one rank; lower it where memory does not suffice
    patches: int = 0  # budget of the vision tower in a micro-batch; 0: as many as come with the tokens
    documents: int = 0  # at most so many in a micro-batch; 0: as many as fit
    lookahead: int = 16  # documents that may wait for a micro-batch with room for them
    # ---- model
    mllm: str = BUNDLED  # run, folder or Hub id of the language model to start from
    tower: str = ""  # run, folder or Hub id whose vision tower takes the place of mllm's own; what it has learnt to see stays
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    lora: int = 0  # rank of adapters, which then are all that is trained and saved (lora.py); 0: the whole model
    frozen_dtype: str = "auto"  # of the weights under adapters: bf16 on a GPU, else fp32
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
        if self.lora and self.tower:
            raise InputError("--tower with --lora: a tower is only saved with a whole model: leave one of them out")


def train(c: Stage1Config) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)

    # All of the MLLM is trained. A tower that comes from elsewhere is not: it sees already, and at the rates at which a small
    # decoder learns to read, the few words that depend on a picture would teach it to forget (measured: README, Results).
    folder = part_folder(c.mllm, "mllm")
    tokenizer = Tokenizer.from_pretrained(folder)
    processor = ImageProcessor.from_pretrained(folder)
    kept = pick_frozen_dtype(c.frozen_dtype, c.dtype, ranks.device) if c.lora else torch.float32
    mllm = MLLM.from_pretrained(folder, dtype=kept, device=ranks.device)
    mllm.set_checkpointing(c.checkpointing)
    if c.tower:
        seeing = MLLM.from_pretrained(part_folder(c.tower, "mllm"), device=ranks.device)
        if seeing.config.vision != mllm.config.vision:
            raise InputError(f"--tower {c.tower}: its vision tower is not of the form that {c.mllm} has")
        mllm.visual = seeing.visual.requires_grad_(False)
    lora.adapt(mllm, c.lora)
    if ranks.main and c.lora:
        adapters, rest = lora.parts(mllm)
        print_trained({f"adapters of rank {c.lora}": adapters}, {"mllm": rest})
    elif ranks.main and c.tower:
        print_trained({"decoder": mllm.model}, {"vision tower": mllm.visual})
    elif ranks.main:
        print_trained({"vision tower": mllm.visual, "decoder": mllm.model}, {})

    base = lora.place(c.mllm, folder)  # of today: a run that is named may have saved once more when this one saves

    def save(folder: Path, mllm: MLLM) -> None:
        if c.lora:
            lora.save(mllm, folder / "mllm", base)
        else:
            mllm.save_pretrained(folder / "mllm")
        tokenizer.save_pretrained(folder / "mllm")
        processor.save_pretrained(folder / "mllm")

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


class Retold(Answer):
    """The first answer of a record, to be written anew. truth: the record's own pictures, from that answer on."""

    def __init__(self, writer: Writer, messages: list[dict], most: int):
        first = [message["role"] for message in messages].index("assistant")
        self.truth = [load_image(part["image"]) for part in image_parts(messages[first:])]
        # Without a question the model begins behind the system turn, as it does in training.
        asked = messages[:first] or [{"role": "system", "content": [{"type": "text", "text": SYSTEM}]}]
        for part in image_parts(asked):
            part["image"] = load_image(part["image"])
        super().__init__(writer, asked, Settings(max_tokens=most, max_images=min(1000, len(self.truth))))

    @property
    def capacity(self) -> int:
        # The true pictures have sizes of their own.
        merged = [self._merged(image.height, image.width) for image in self.truth]
        most = self.prompt_tokens + self.settings.max_tokens + sum(h * w + 2 for h, w in merged)
        return min(self.duo.context, most)

    def told(self) -> tuple[str, str]:
        """What was asked and what was written, a line each."""
        asked = [m["content"] for m in self.messages if m["role"] != "system"]
        question = " ".join("".join(part.get("text", PICTURE) for part in content) for content in asked)
        answer = "".join(part if isinstance(part, str) else PICTURE for part in self.parts)
        if self.stop == "max_images":
            answer += PICTURE  # one more was due than the record has
        elif self.stop != "end":
            answer += " [no end yet]"
        return " ".join(question.split()), " ".join(answer.split())


PICTURE = " [picture] "


class Reteller(Writer):
    """The model in training, which is shown the true picture where it asks for one."""

    def paint(self, requests: list[Paint], progress: Callable[[int, int], None] | None = None) -> list[Image.Image]:
        return [request.answer.truth[request.number] for request in requests]


def sample_sheet(run: Run, c: Stage1Config, source, tokenizer, processor, mllm: MLLM, n: int, most: int = 160) -> None:
    """Answers to fixed requests, greedily written. Where the model asks for a picture, it is shown the true one."""

    def measured(record: dict, number: int) -> tuple[int, list[dict]]:
        """Length and messages of a record that a training can use; InputError for others."""
        return len(tokenize(record, tokenizer, processor, pictures=False)), normalise(record)

    # The same requests on every sheet, short ones first.
    records = islice(Stream(source, c.seed + 1, prepare=measured), n)
    dialogues = [messages for _, messages in sorted(records, key=itemgetter(0))]
    writer = Reteller(mllm, tokenizer, processor)
    answers = [Retold(writer, messages, most) for messages in dialogues]

    # Blocks that are compiled for training would be compiled anew for a cache.
    with run.averaged(), torch.compiler.set_stance("force_eager"):
        writer.write_many(answers, batch=n)

    lines = [f"# Step {run.step}\n"]
    for answer in answers:
        asked, wrote = answer.told()
        lines += [f"* asked: {asked}", f"* wrote: {wrote}", ""]
    run.sample_file("md").write_text("\n".join(lines))


def main(argv: list[str]) -> None:
    """Train; with --plan only say what that would cost."""
    if "--plan" in argv:
        from tools.plan import planned  # here, for a training needs nothing of it

        print(planned(Stage1Config, argv, __doc__).report())
    else:
        train(parse_config(Stage1Config, argv, __doc__, plan=True))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
