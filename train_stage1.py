"""Stage 1: the MLLM learns to write interleaved documents and to say when a picture is due. No DiT in sight.

    python train_stage1.py                                    the miniature, from runs/tiny/mllm, on the sketchbook
    torchrun --nproc_per_node=2 train_stage1.py               the same in two processes, the same loss
    torchrun --nproc_per_node=8 train_stage1.py --mllm Qwen/Qwen2.5-VL-7B-Instruct --data a.jsonl,b.jsonl --lr 1e-5 --out r

The loss is the cross-entropy of the assistant's text, of BOV and of the end of its turn; not of user text, picture tokens or
<|vision_end|>, which the sampler supplies (paper, stage 1; `tokenizer.render` marks the targets). Its sum is divided by the
number of targets over all ranks and micro-batches, so that any number of processes takes the step of one process with the
same documents.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from data import loader, open_source, pack_documents
from model import MLLM, ImageProcessor
from tokenizer import Tokenizer
from training import LanguageLoss, Run, TrainConfig, World, check_step0, main, parse_config, part_folder, print_trained


@dataclass
class Stage1Config(TrainConfig):
    mllm: str = "runs/tiny/mllm"  # run, folder or Hub id of the language model to start from
    data: str = "sketchbook"  # or JSONL files of records, separated by commas
    kinds: str = ""  # sketchbook only: kinds of dialogue and their weights, e.g. "lesson=2,one=1"; empty: the corpus' own
    out: str = "runs/tiny/stage1"
    steps: int = 4000
    tokens: int = 4096  # budget of a micro-batch of one rank
    documents: int = 0  # at most so many in a micro-batch; 0: as many as fit
    lr: float = 1e-3  # the miniature's; 1e-5 suits a 7B
    weight_decay: float = 0.01
    beta2: float = 0.98
    checkpointing: bool = False  # recompute activations in the backward pass


def train(c: Stage1Config) -> None:
    world = World(c.device)
    torch.manual_seed(c.seed)
    folder = part_folder(c.mllm, "mllm")
    tokenizer, processor = Tokenizer.from_pretrained(folder), ImageProcessor.from_pretrained(folder)
    mllm = MLLM.from_pretrained(folder, device=world.device)
    mllm.set_checkpointing(c.checkpointing)
    if world.main:
        print_trained({"vision tower": mllm.visual, "decoder": mllm.model}, {})

    def save(folder: Path, mllm: MLLM) -> None:
        for part in (mllm, tokenizer, processor):
            part.save_pretrained(folder / "mllm")

    run = Run(c, world, mllm, save)
    loss_of = world.wrap(LanguageLoss(mllm))
    shard = {"seed": c.seed, "rank": world.rank, "world_size": world.size, "workers": 1}
    source = open_source(c.data, c.kinds)
    budget = {"tokens": c.tokens, "documents": c.documents or None}
    data = loader(source, tokenizer, processor, **budget, pictures=False, position=run.position, **shard)
    for step in run.loop():
        micro = [next(data) for _ in range(c.accumulate)]
        packs = [pack_documents(documents).to(world.device) for documents, _ in micro]
        targets = world.sum(sum((pack.labels >= 0).sum().item() for pack in packs))
        total = 0.0
        for a, pack in enumerate(packs):
            with world.synchronised(loss_of, a == c.accumulate - 1):
                with torch.autocast(world.device.type, torch.bfloat16, enabled=c.dtype == "bf16"):
                    loss = loss_of(pack) * (world.size / targets)  # DDP takes the mean over ranks
                loss.backward()
            total += loss.item() / world.size
        total = world.sum(total)
        if step == 0 and world.main:
            check_step0("cross-entropy", total, 0.0, math.log(tokenizer.vocab_size))  # less than a guess
        tokens, documents = sum(len(pack.ids) for pack in packs), sum(len(d) for d, _ in micro)
        stats = {"loss": total, "tokens": world.sum(tokens), "documents": world.sum(documents)}
        run.update(stats, world.gather(micro[-1][1]))
    world.close()


if __name__ == "__main__":
    main(lambda: train(parse_config(Stage1Config, doc=__doc__)))
