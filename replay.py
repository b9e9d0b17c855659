"""Stage 2 keeps documents that the frozen models have read, and trains each of their pictures several times.

What MLLM and VAE make of a document never changes while connector and DiT learn, and making it is a third of the miniature's
step. So the features and latents of many documents stay on the device, within a budget of memory, and a micro-batch draws its
targets from all of them, each time with new t, noise and dropped chunk:

    kept = EncodedDocuments(megabytes, run.position, ranks)
    data = loader(..., position=kept.position)
    ...
    if kept.due:                                  # every 8th micro-batch reads new documents
        documents, place = next(data)
        kept.add(encode(documents, mllm, vae, processor, device), place)
    targets = kept.draw(generator)                # as many as the newest documents have

The documents that are read at a time are a fill. The oldest fills go when all together would be more than the budget. Where the
budget holds fewer than DRAWS fills, every micro-batch reads a new one; where it holds the newest alone, this is a training that
keeps nothing. So the miniature draws its targets DRAWS times, and the 7B, whose features of one dialogue are 400 MB, once.

A checkpoint holds neither features nor latents, but where in the data the oldest fill begins and how many there are. A resumed
run reads these again, each as the batch that it was, which gives the same bytes. Another number of ranks begins with none.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from data import Document
from distributed import Ranks
from model import ImageProcessor, LanguageModel
from training import encode_pictures, mllm_features
from vae import VAE

DRAWS = 8  # times that a target is trained on average


@dataclass(eq=False)
class Encoded:
    """A document as the frozen models have left it, on the device."""

    name: str
    features: Tensor  # (n, L * H) MLLM states of its tokens
    pictures: list[Tensor]  # latents (C, h, w), in time order
    lengths: dict[int, tuple[int, int]]  # of each picture to train: tokens that it reads, with its last chunk and without
    patches: dict[int, int]  # of each: those of the DiT, its own and of all pictures before it

    @property
    def targets(self) -> list[tuple["Encoded", int]]:
        """Its pictures to train, each as the document and its number there."""
        return [(self, j) for j in self.lengths]


@torch.no_grad()
def encode(
    documents: list[Document], mllm: LanguageModel, vae: VAE, processor: ImageProcessor, device: torch.device
) -> list[Encoded]:
    """One frozen pass over all of them. Its features are as the connector takes them: in bf16 under autocast."""
    # The connector's product would round them to that type anyway, and in half the bytes of fp32 twice as many are kept.
    states, first = mllm_features(documents, mllm, device, processor)
    if torch.is_autocast_enabled(device.type):
        states = states.to(torch.get_autocast_dtype(device.type))
    pictures = encode_pictures(documents, vae, device)
    encoded = []
    for d, document in enumerate(documents):
        # Both branches of guidance are prefixes of the same features (the model is causal): two numbers, no second pass.
        lengths = {j: document.rendered.condition_lengths(j) for j in document.trained}
        patches = {j: document.latents_of(j) for j in document.trained}
        encoded.append(Encoded(document.name, states[first[d] : first[d + 1]], pictures[d], lengths, patches))
    return encoded


@dataclass
class Fill:
    """Documents that were read and encoded together."""

    start: dict | list | None  # where in the data it begins: a position of this rank, or of all ranks
    targets: list[tuple[Encoded, int]]
    bytes: int


class EncodedDocuments:
    """The fills that one rank keeps. position: that of a resumed run, else None; latents: the DiT's budget, 0 for no limit."""

    def __init__(self, megabytes: float, position: list | None, ranks: Ranks, latents: int = 0):
        self.bytes = megabytes * 1e6
        self.latents = latents
        self.fills: deque[Fill] = deque()
        self.turn = 0  # micro-batches that have drawn
        self.missing = 0  # fills that a resumed run has to read again
        self.start = position  # where the next fill begins
        # Of a resumed run: back to where its oldest fill began, for that is what has to be read again first. With another
        # number of ranks the fills would be other documents, so it goes on behind what was read.
        if position and isinstance(position[0], dict):  # older checkpoints hold numbers
            own = position[ranks.rank % len(position)].get("kept")
            self.start = [{k: v for k, v in p.items() if k != "kept"} for p in position]
            if own and len(position) == ranks.size:
                self.start, self.missing, self.turn = own["start"], own["fills"], own["turn"]
        # As the loader wants it: of every rank.
        self.position = [self.start] * ranks.size if isinstance(self.start, dict) else self.start

    @property
    def due(self) -> bool:
        """Whether this micro-batch reads new documents."""
        # With fewer fills, at the start or for good in a small budget, each micro-batch reads: a target in so small a pool
        # would be drawn too often.
        return self.turn % DRAWS == 0 or len(self.fills) < DRAWS

    @property
    def place(self) -> dict:
        """What a checkpoint holds: the position behind the newest fill, and what it takes to have all of them again."""
        return {**self.start, "kept": {"start": self.fills[0].start, "fills": len(self.fills), "turn": self.turn}}

    def add(self, documents: list[Encoded], place: dict) -> None:
        """Keep a new fill, and drop the oldest that are too many. place: where the data stand behind it."""
        # By bytes: documents are of all lengths and pictures of all sizes, so a number of fills would bound no memory.
        tensors = [tensor for document in documents for tensor in (document.features, *document.pictures)]
        targets = [target for document in documents for target in document.targets]
        self.fills.append(Fill(self.start, targets, sum(tensor.nbytes for tensor in tensors)))
        self.start = place
        # The newest stays, however large: a step needs something to train.
        while len(self.fills) > 1 and sum(fill.bytes for fill in self.fills) > self.bytes:
            self.fills.popleft()

    def draw(self, g: torch.Generator) -> list[tuple[Encoded, int]]:
        """Targets of a micro-batch: those of the newest fill if it is alone, else as many out of all, in the DiT's budget."""
        self.turn += 1
        newest = self.fills[-1].targets
        # Alone, it is trained as it was read: a training that keeps nothing.
        if len(self.fills) == 1:
            return newest
        # Out of all alike: what was read together is not trained together again. Target i of all is one of the fill in whose
        # range i lies; a list of all of them would be made anew for each micro-batch.
        ends = list(accumulate(len(fill.targets) for fill in self.fills))
        drawn = []
        patches = 0
        for i in torch.randperm(ends[-1], generator=g)[: len(newest)].tolist():
            k = bisect_right(ends, i)
            document, j = self.fills[k].targets[i - ends[k]]
            patches += document.patches[j]
            # The loader's budget holds for the targets it read together, not for a mixture of many; the first is always taken.
            if drawn and self.latents and patches > self.latents:
                break
            drawn.append((document, j))
        return drawn
