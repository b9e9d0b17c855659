"""Stage 2: connector and DiT learn to paint the picture that is due, looking at every picture so far. MLLM and VAE are frozen.

    python train_stage2.py                                    the bundled miniature goes on learning, on the sketchbook
    torchrun --nproc_per_node=2 train_stage2.py               the same in two processes, the same loss
    torchrun --nproc_per_node=8 train_stage2.py --mllm runs/s1 --dit DIT --vae VAE --data a.jsonl --lr 3e-5 --shift 5

Any picture of the assistant's can be the target; all earlier pictures, the user's too, are given clean (paper, stage 2). The
MLLM is causal, so one frozen pass over a document serves several of its targets, and each picture is encoded once; what was
read stays on the device for several draws of each target, as far as --replay-mb goes (replay.py). A target is conditioned on
the states of everything before BOV; in a share of the samples the chunk that asks for the picture is cut away, which trains the
negative branch of guidance. The sum of the loss over latent tokens is divided by their number over all ranks and micro-batches,
so that any number of processes takes the step of one with the same samples.
"""

if __name__ == "__main__":  # Ctrl-C has to be quiet during the imports below, too
    import interrupt

    interrupt.quiet()

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

import lora
from checkpoint import BUNDLED, InputError, part_folder
from data import Document, fill, loader, to_float
from distributed import Ranks
from dit import Painter
from families.registry import load_language_model, load_model
from flow import CONDITION_TIME, FlowLoss, Samples, denoise, shift_schedule, train_times
from model import ImageProcessor, LanguageModel
from pipeline import pixels_per_patch
from replay import Encoded, EncodedDocuments, encode
from records.stream import Quarantine, open_source, pick_workers
from tokenizer import Tokenizer
from training import Run, TrainConfig, add_statistics, asked_and_told, autocast, check_step0, compile_blocks
from training import encode_pictures, flow_statistics, generator, mllm_features, model_flops, parse_config, pick_frozen_dtype
from training import print_trained, run_script, sheet
from vae import VAE, to_image


@dataclass
class Stage2Config(TrainConfig):
    # ---- data
    data: str = "sketchbook"  # JSONL files, shards, modules with a function record, mixed: "a.jsonl=2,s/{00..99}.tar=1"
    kinds: str = ""  # of such a module's records, with weights: "lesson=2,one=1" of the sketchbook; empty: the module's own
    documents: int = 32  # per micro-batch and rank, at most; 0: as many as the budgets allow
    tokens: int = 0  # budget of the MLLM in a micro-batch; 0: no limit
    patches: int = 0  # budget of its vision tower in a micro-batch; 0: no limit
    latents: int = 0  # budget of the DiT: its patches, once for each target that sees them; 0: no limit
    lookahead: int = 16  # documents that may wait for a micro-batch with room for them
    targets: int = 2  # pictures trained per document, at most
    # MB on each device for documents that are kept encoded, so that each target trains 8 times from one frozen pass; where they
    # do not suffice for 8 micro-batches, and at 0, every step reads new ones: enough for the miniature, far from it for the 7B
    replay_mb: float = 256.0
    drop: float = 0.15  # share of samples that lose their last chunk of text: guidance needs what is learnt there
    # ---- model
    mllm: str = BUNDLED  # run, folder or Hub id; frozen
    dit: str = BUNDLED  # run, folder or Hub id; trained, and with it the connector that it holds
    vae: str = BUNDLED  # run, folder or Hub id; frozen
    # of the weights of the MLLM, and of the DiT under adapters: bf16 on a GPU, else fp32. The VAE stays fp32: it is small
    frozen_dtype: str = "auto"
    lora: int = 0  # rank of adapters of the DiT; they and the connector are then all that is trained and saved; 0: all of it
    checkpointing: bool = False  # recompute activations in the backward pass: less memory, a third more time
    shift: float = 1.75  # of the training times towards noise: the miniature's, whose shapes are decided midway; 5, Cosmos' own
    condition_time: float = CONDITION_TIME  # time the DiT is told for clean pictures, that of the post-trained Cosmos
    # ---- other defaults than those of every run
    out: str = "runs/stage2"
    steps: int = 60_000
    lr: float = 1e-5  # learning rate: the miniature's, which a higher one spoils within a hundred steps; 3e-5 for the 2B
    beta2: float = 0.99
    ema: float = 0.9995

    def check(self) -> None:
        super().check()
        if not (self.documents or self.tokens or self.patches or self.latents):
            raise InputError("--documents 0: needs a budget: --tokens, --patches or --latents")


def draw_samples(targets: list[tuple[Encoded, int]], drop: float, g: torch.Generator) -> Samples:
    """For each target the tokens it reads, the pictures up to and with it, how many of them are given."""
    drawn = []
    chances = torch.rand(len(targets), generator=g).tolist()
    for (document, j), chance in zip(targets, chances, strict=True):
        # The DiT is to paint without the request, too: guidance goes from what it paints then to what it paints with it.
        positive, negative = document.lengths[j]
        length = negative if chance < drop else positive
        drawn.append((document.patches[j], length, document, j))
    # Like lengths side by side: PyTorch's attention computes neighbours of one length as one dense batch.
    drawn.sort(key=lambda sample: sample[:2])

    # The features of each document once, up to the last token that is read.
    needed: dict[Encoded, int] = {}
    for _, length, document, _ in drawn:
        needed[document] = max(length, needed.get(document, 0))
    # Where each document begins in them; accumulate gives the end as well, which zip leaves out.
    first = dict(zip(needed, accumulate(needed.values(), initial=0), strict=False))
    features = [document.features[:length] for document, length in needed.items()]
    return Samples(
        features=features[0] if len(features) == 1 else torch.cat(features),
        rows=[range(first[document], first[document] + length) for _, length, document, _ in drawn],
        latents=[document.pictures[: j + 1] for *_, document, j in drawn],
        clean=[j for *_, j in drawn],
    )


def load_parts(c: Stage2Config, ranks: Ranks) -> tuple[Tokenizer, ImageProcessor, LanguageModel, VAE, Painter]:
    """DiT and connector, to be trained; MLLM and VAE, which are only read."""
    folder = part_folder(c.mllm, "mllm")
    frozen = pick_frozen_dtype(c.frozen_dtype, c.dtype, ranks.device)
    mllm, tokenizer, processor = load_language_model(folder, dtype=frozen, device=ranks.device)
    mllm.requires_grad_(False)
    vae = load_model("vae", part_folder(c.vae, "vae"), device=ranks.device).requires_grad_(False)
    # What the language model gives a token is what the connector has to read; for a new pair it begins anew.
    kept = frozen if c.lora else torch.float32
    options = {"dtype": kept, "device": ranks.device, "features": mllm.config.features}
    dit = lora.adapt(load_model("dit", part_folder(c.dit, "dit"), **options), c.lora)
    dit.gradient_checkpointing = c.checkpointing
    if ranks.main and c.lora:
        adapters, rest = lora.parts(dit)
        print_trained({f"adapters of rank {c.lora}": adapters}, {"dit": rest, "mllm": mllm, "vae": vae})
    elif ranks.main:
        print_trained({"dit + connector": dit}, {"mllm": mllm, "vae": vae})
    return tokenizer, processor, mllm, vae, dit


def open_data(
    c: Stage2Config, run: Run, source, tokenizer: Tokenizer, processor: ImageProcessor, patch: int, position: list | None
) -> Iterator[tuple[list[Document], dict]]:
    """New documents for one rank, and where the data stand behind them. patch: pixels along a side of a patch of the DiT."""
    return loader(
        source,
        tokenizer,
        processor,
        tokens=c.tokens,
        patches=c.patches,
        latents=c.latents,
        documents=c.documents or None,
        targets=c.targets,
        targets_only=True,
        lookahead=c.lookahead,
        position=position,
        patch=patch,
        quarantine=Quarantine(file=run.folder / "quarantine.jsonl"),
        seed=c.seed,
        rank=run.ranks.rank,
        world_size=run.ranks.size,
        workers=pick_workers(c.workers),
    )


def train(c: Stage2Config) -> None:
    ranks = Ranks(c.device, c.timeout)
    ranks.claim(c.out)
    torch.manual_seed(c.seed)
    tokenizer, processor, mllm, vae, dit = load_parts(c, ranks)

    # Only what is trained is saved: the frozen parts stay where they came from.
    base = lora.place(c.dit, part_folder(c.dit, "dit"))  # of today: a run that is named may have saved once more by then

    def save(folder: Path, dit: Painter) -> None:
        if c.lora:
            lora.save(dit, folder / "dit", base)
        else:
            dit.save_pretrained(folder / "dit")

    # A resumed run takes up its weights, moments and place in the data here.
    run = Run(c, ranks, dit, save)
    loss_of = FlowLoss(dit, c.condition_time)
    if c.compile:
        compile_blocks(loss_of)
    loss_of = ranks.wrap(loss_of)

    # Documents, and those that are kept encoded. The data begin where the oldest kept ones do.
    source = open_source(c.data, c.kinds)
    budget = {"tokens": c.tokens, "patches": c.patches, "latents": c.latents}
    kept = EncodedDocuments(c.replay_mb, run.position, ranks, c.latents)
    patch = pixels_per_patch(vae.config, dit.config)
    data = open_data(c, run, source, tokenizer, processor, patch, kept.position)

    def read() -> list[Document]:
        """New documents, encoded and kept."""
        documents, place = next(data)
        run.lap("data")
        with autocast(c.dtype, ranks.device):
            kept.add(encode(documents, mllm, vae, processor, ranks.device), place)
        run.lap("frozen")
        return documents

    # After a resume: what was kept is read again, which may take longer than a step and is no sign of a stuck rank.
    for _ in range(kept.missing):
        ranks.alive()
        read()

    for step in run.loop():
        # Data. Chance hangs on step, rank and micro-batch alone, so a resumed run draws what the straight one draws.
        micro = []  # the documents that each micro-batch has read, mostly none
        drawn = []  # its targets
        samples = []  # what the DiT learns from them
        chance = []  # its generator, which goes on to times and noise
        for a in range(c.accumulate):
            g = generator(c.seed, step, a * ranks.size + ranks.rank)
            micro.append(read() if kept.due else [])
            drawn.append(kept.draw(g))
            samples.append(draw_samples(drawn[-1], c.drop, g))
            chance.append(g)
        run.lap("data")

        # The loss is a mean over the targets' tokens in all micro-batches of all ranks, so they are counted first.
        numbers = sum(z[j].numel() for s in samples for z, j in zip(s.latents, s.clean, strict=True))
        tokens = ranks.sum(numbers / dit.proj_out.out_features)

        # Loss and gradient. Every sample has a noise level of its own (t), so a step sees coarse shapes and fine details alike.
        loss = 0.0
        parts = {}
        for s, g in ranks.micro_batches(loss_of, list(zip(samples, chance, strict=True))):
            t = train_times(len(s.rows), c.shift, g)
            with autocast(c.dtype, ranks.device):
                error, count = loss_of(s, t, g)
            run.lap("forward")
            loss += ranks.backward(error.sum() / tokens)
            run.lap("backward")
            parts = add_statistics(parts, flow_statistics(t, error.detach().cpu(), count.cpu()))
        norm = run.clip()

        # What the log says of the step.
        names = list(dict.fromkeys(document.name for targets in drawn for document, _ in targets))
        stats = {"loss": loss, **parts}
        stats["images"] = sum(len(s.rows) for s in samples)
        stats["flops"] = sum(model_flops(d, mllm, s, dit, vae) for d, s in zip(micro, samples, strict=True))
        if any(budget.values()):
            full = [max(fill(documents, **budget).values()) for documents in micro if documents]
            stats["fill"] = (sum(full), float(len(full)))
        stats = ranks.sum_statistics(stats)

        # Step, average, log. A step whose loss or gradient is no number changes no weight.
        if run.finite(stats["loss"], norm, names):
            run.optimizer.step()
            run.average()
            run.log(stats, norm)
        run.optimizer.zero_grad()
        run.save_if_due(kept.place)

        # Look: is the first loss what it has to be, and what does the model paint?
        if step == 0 and ranks.main:
            check_step0("flow loss", stats["loss"], 0.0, 2.0)  # 2: a DiT that answers 0, latents being of unit size
        if run.sheet_due:  # the first one is short, so that it comes soon
            sample_sheet(run, c, source, tokenizer, processor, mllm, dit, vae, 4 if run.step == 1 else 14)
    ranks.close()


@torch.no_grad()
def sample_sheet(
    run: Run, c: Stage2Config, source, tokenizer, processor, mllm: LanguageModel, dit: Painter, vae: VAE, n: int
) -> None:
    """Fixed documents and fixed noise: the text that asks, the pictures given, the painted one, the true one."""
    patch = pixels_per_patch(vae.config, dit.config)
    wanted = loader(source, tokenizer, processor, documents=n, seed=c.seed + 1, patch=patch, targets_only=True)
    # With the averaged weights, which are those that will be used. First and last targets: with few pictures before, and many.
    documents, _ = next(wanted)
    states, first = mllm_features(documents, mllm, run.ranks.device, processor)
    with run.averaged():
        context = dit.crossattn_proj(states)
        latents = encode_pictures(documents, vae, run.ranks.device)
        chosen = [document.targets[-1] if d % 2 else document.targets[0] for d, document in enumerate(documents)]
        lengths = [document.rendered.condition_lengths(j) for document, j in zip(documents, chosen, strict=True)]
        given = [z[:j] for z, j in zip(latents, chosen, strict=True)]
        sizes = [tuple(z[j].shape[-2:]) for z, j in zip(latents, chosen, strict=True)]
        positive, negative = ([context[a : a + n[k]] for a, n in zip(first, lengths, strict=False)] for k in (0, 1))
        sigmas = shift_schedule(20)
        painted = denoise(dit, given, sizes, positive, negative, list(range(n)), sigmas=sigmas, guidance=3.0,
                          condition_time=c.condition_time)  # fmt: skip
        rows = []
        for document, j, z in zip(documents, chosen, painted, strict=True):
            shown = [document.pictures[j - 1] if j else None, vae.decode_latents(z[None])[0], document.pictures[j]]
            pictures = [None if x is None else to_image(to_float(x)) for x in shown]
            rows.append((*asked_and_told(document.rendered, j, tokenizer), pictures))
    sheet(rows, ["picture before", "painted", "true one"], run.sample_file("png"))


def main(argv: list[str]) -> None:
    """Train; with --plan only say what that would cost."""
    if "--plan" in argv:
        from tools.plan import planned  # here, for a training needs nothing of it

        print(planned(Stage2Config, argv, __doc__).report())
    else:
        train(parse_config(Stage2Config, argv, __doc__, plan=True))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1:]))
