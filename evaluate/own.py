"""The judge `self`: this repository's own language model in the same process, of any size.

Nothing is written and nothing is parsed: a yes is the probability of that word against no, a rating the mean of the scale by
the probabilities of its numbers. The question is read once, and each candidate behind it from the cache.
"""

import hashlib
import json
import math
import threading
from pathlib import Path

import torch
from torch import Tensor

from checkpoint import InputError, parse_dtype, part_folder, pick_device
from distributed import local_device
from evaluate.judges import Question, Reply
from families.registry import load_language_model
from model import ImageProcessor, KVCache, LanguageModel, mrope_positions
from ops import Segments
from pipeline import find_checkpoint, origin, read_manifest
from tokenizer import Tokenizer, render

ROOM = 16  # tokens that the longest candidate may have


class Own:
    """A judges.Backend."""

    def __init__(self, mllm: LanguageModel, tokenizer: Tokenizer, processor: ImageProcessor, source="self", weights=""):
        self.mllm = mllm.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.processor = processor
        self.device = mllm.model.embed_tokens.weight.device
        self.name = f"self {source}"
        # Not where it lies: the same weights elsewhere answer the same.
        self.identity = {"weights": weights, "dtype": str(mllm.model.embed_tokens.weight.dtype)}
        self.lock = threading.Lock()  # one model, one question at a time

    @classmethod
    def from_pretrained(cls, ckpt: str | None, mllm: str | None, device: str = "auto", dtype: str = "auto") -> "Own":
        base = None
        source = mllm
        if source is None:
            base = find_checkpoint(ckpt, None)
            source = read_manifest(base / "duogen.json")["parts"]["mllm"]
        folder = part_folder(source, "mllm", base=base)
        device = pick_device(device)
        if device.type == "cuda":
            device = local_device(str(device))  # several ranks judge on a GPU each
        # A folder keeps its name when its weights are trained on, so they are part of what was asked.
        weights = hashlib.sha256()
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(json.dumps([file.name, file.stat().st_size]).encode())
            with open(file, "rb") as f:
                weights.update(hashlib.file_digest(f, "sha256").digest())
        parts = load_language_model(folder, dtype=parse_dtype(dtype, device), device=device)
        return cls(*parts, source="/".join(Path(origin(folder)).parts[-2:]), weights=weights.hexdigest())

    def ask(self, question: Question) -> Reply:
        with self.lock, torch.no_grad():
            try:
                return self.yes(question) if question.kind == "yes" else self.fields(question)
            except InputError as e:  # longer than its context
                return Reply(str(e), refused=True, model=self.name)

    def yes(self, question: Question) -> Reply:
        found, read = self.probabilities(question.parts, ["yes", "Yes", "no", "No"])
        yes = found["yes"] + found["Yes"]
        no = found["no"] + found["No"]
        # Both may be so unlikely that floats end: then it has no opinion.
        value = yes / (yes + no) if yes + no else 0.5
        return Reply(f"yes {yes:.3g}, no {no:.3g}", value={"yes": value}, tokens=(read, 0), model=self.name)

    def fields(self, question: Question) -> Reply:
        """One number after another, each asked for by itself behind what is to be judged."""
        asked = []
        for key, (low, high) in question.keys.items():
            numbers = [str(n) for n in range(math.ceil(low), math.floor(high) + 1)]
            asked.append((f"Give one number from {low:g} to {high:g} for {key}. Answer with the number alone.", numbers))
        # The instruction about JSON, which comes last, is not for this judge.
        all_found, read = self.several(question.parts[:-1], asked)
        value = {}
        words = []
        for (key, (low, high)), found in zip(question.keys.items(), all_found, strict=True):
            mass = sum(found.values())
            value[key] = sum(int(n) * p for n, p in found.items()) / mass if mass else (low + high) / 2
            words.append(f"{key} {value[key]:.2f} (" + ", ".join(f"{n}: {p:.2g}" for n, p in found.items()) + ")")
        return Reply("; ".join(words), value=value, tokens=(read, 0), model=self.name)

    def probabilities(self, parts: list, candidates: list[str]) -> tuple[dict[str, float], int]:
        """How likely the answer begins with each candidate, and no longer one; and how many tokens were read."""
        (found,), read = self.several(parts, [("", candidates)])
        return found, read

    def several(self, parts: list, asked: list[tuple[str, list[str]]]) -> tuple[list[dict[str, float]], int]:
        """The same for several last texts, each with candidates of its own: what stands before them is read once."""
        patches = [self.processor(p) for p in parts if not isinstance(p, str)]
        grids = [grid for _, grid in patches]
        merged = [self.processor.merged(grid) for grid in grids]
        pixels = torch.cat([p for p, _ in patches]).to(self.device) if patches else None
        questions = [self.rendered([*parts, last] if last else parts, merged) for last, _ in asked]
        longest = max(map(len, questions))
        room = self.mllm.config.max_position_embeddings
        if longest + ROOM > room:
            raise InputError(f"the question has {longest:,} tokens, this judge reads {room - ROOM:,}")
        cache = KVCache(self.mllm.config, longest + ROOM, self.mllm.model.embed_tokens.weight.dtype, self.device)
        shared = shared_length(questions)
        if shared:
            positions, _ = mrope_positions(questions[0], merged, self.tokenizer.image_pad)
            self.read(cache, questions[0][:shared], positions[:, :shared], pixels, grids)
            pixels, grids = None, None
        found = []
        for ids, (_, candidates) in zip(questions, asked, strict=True):
            positions, after = mrope_positions(ids, merged, self.tokenizer.image_pad)
            first = self.read(cache, ids[shared:], positions[:, shared:], pixels, grids)[-1]   # (vocab,)
            found.append(self.begins(cache, len(ids), after, first, candidates))
            cache.truncate(0, shared)
        return found, shared + sum(len(ids) - shared for ids in questions)

    def rendered(self, parts: list, merged: list[tuple[int, int]]) -> list[int]:
        typed = [{"type": "text", "text": f"{p}\n"} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        return render(self.tokenizer, [{"role": "user", "content": typed}], merged, generation_prompt=True).ids

    def begins(self, cache: KVCache, length: int, after: int, first: Tensor, candidates: list[str]) -> dict[str, float]:
        """How likely each candidate is behind the tokens that the cache holds. first: logarithms (vocab,) for the next one."""
        ids = {c: self.tokenizer.encode(c) for c in candidates}
        likely = {}
        for candidate, tokens in ids.items():
            logs = first[tokens[0]].item()
            if len(tokens) > 1:
                where = torch.arange(after, after + len(tokens) - 1).expand(3, -1)
                rows = self.read(cache, tokens[:-1], where)                                    # (tokens - 1, vocab)
                logs += sum(row[token].item() for row, token in zip(rows, tokens[1:], strict=True))
                cache.truncate(0, length)
            likely[candidate] = math.exp(logs)
        # "1" is how "10" begins where digits are tokens: what belongs to the longer one is not the shorter one's.
        longer = {a: [b for b in ids if len(ids[b]) > len(ids[a]) and ids[b][: len(ids[a])] == ids[a]] for a in ids}
        return {a: max(0.0, likely[a] - sum(likely[b] for b in longer[a])) for a in ids}

    def read(self, cache: KVCache, ids: list[int], positions: Tensor, pixels: Tensor | None = None, grids=None) -> Tensor:
        """Logarithms of the probabilities of what follows each token; of a question, its last one alone."""
        ids = torch.tensor(ids, device=self.device)
        segments = Segments([len(ids)], self.device)
        hidden = self.mllm(ids, positions.to(self.device), segments, pixels, grids or None, cache=cache)[-1]
        # A vocabulary wide: of a long question the other rows are never looked at.
        return self.mllm.logits(hidden[-ROOM:]).float().log_softmax(-1)


def shared_length(questions: list[list[int]]) -> int:
    """How many tokens all begin with, of several; of each, one at least remains to be read."""
    if len(questions) == 1:
        return 0
    same = 0
    for tokens in zip(*questions, strict=False):
        if len(set(tokens)) > 1:
            break
        same += 1
    return min(same, min(map(len, questions)) - 1)
