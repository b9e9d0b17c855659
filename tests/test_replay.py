"""Encoded documents that are kept: which are held when, what is drawn of them, and how a resumed run has them again."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import replay
from replay import DRAWS, Encoded, EncodedDocuments
from training import generator

SIDE = 4  # of a latent: 4 patches of the DiT in a picture


def encoded(name: str, targets: int = 2, tokens: int = 5) -> Encoded:
    """25 features of 4 bytes for each 5 tokens, and a picture of 64 bytes for each target."""
    lengths = {j: (tokens - j, 1) for j in range(targets)}
    patches = {j: 4 * (j + 1) for j in range(targets)}
    return Encoded(name, torch.zeros(tokens, 5), [torch.zeros(1, SIDE, SIDE)] * targets, lengths, patches)


def ranks(size: int = 1, rank: int = 0) -> SimpleNamespace:
    return SimpleNamespace(size=size, rank=rank)


def turn(kept: EncodedDocuments, position: dict) -> list[str]:
    """A micro-batch: which documents it trains. Fill n is documents "n.0" and "n.1", behind which the data are at n + 1."""
    if kept.due:
        n = position["next"]
        position["next"] += 1
        kept.add([encoded(f"{n}.{d}") for d in range(2)], dict(position))
    return [document.name for document, _ in kept.draw(generator(3, kept.turn))]


SIZE = 2 * (100 + 2 * 64) / 1e6  # MB of a fill


def test_every_target_is_drawn_several_times_and_the_oldest_go():
    kept, position, drawn, held = EncodedDocuments(20.5 * SIZE, None, ranks()), {"next": 0}, Counter(), []
    for _ in range(100 * DRAWS):
        drawn.update(turn(kept, position))
        held.append((kept.fills[0].targets[0][0].name, len(kept.fills)))
    assert [n for _, n in held[: DRAWS + 1]] == [*range(1, DRAWS + 1), DRAWS + 1]  # at first each micro-batch reads its own
    assert held[2 * DRAWS - 1][1] == DRAWS + 1 and held[2 * DRAWS][1] == DRAWS + 2  # then every 8th
    assert held[-1] == (f"{position['next'] - 20}.0", 20) and position["next"] == DRAWS + 99
    late = [drawn[f"{n}.{d}"] for n in range(30, 70) for d in range(2)]
    assert sum(late) / len(late) == pytest.approx(2 * DRAWS, rel=0.1) and min(late) > 0  # two targets each
    assert len({tuple(turn(kept, position)) for _ in range(5)}) == 5


@pytest.mark.parametrize("megabytes", [0.0, 1.5 * SIZE, (DRAWS - 0.5) * SIZE])
def test_a_budget_that_is_too_small_reads_new_documents_every_time(megabytes):
    kept, position = EncodedDocuments(megabytes, None, ranks()), {"next": 0}
    for n in range(2 * DRAWS):
        names = turn(kept, position)
        assert position["next"] == n + 1
        if megabytes < 2 * SIZE:  # a training that keeps nothing: the new ones, in their order
            assert names == [f"{n}.0", f"{n}.0", f"{n}.1", f"{n}.1"]


def test_draws_stay_in_the_budget_of_the_dit():
    kept = EncodedDocuments(100.0, None, ranks(), latents=20)
    for n in range(3):
        kept.add([encoded(f"{n}.{d}", targets=5) for d in range(2)], {"next": n})
    sizes = []
    for n in range(50):
        sizes.append(sum(4 * (j + 1) for _, j in kept.draw(generator(n))))
        assert 0 < sizes[-1] <= 20
    assert sum(sizes) / 50 > 12


@pytest.mark.parametrize("stop", [1, 5, DRAWS, 3 * DRAWS + 3, 30 * DRAWS])
def test_a_resumed_run_holds_and_draws_the_same(stop):
    """From a position that has been through JSON: the fills are read again, from where the oldest begins."""
    straight, position = EncodedDocuments(20.5 * SIZE, None, ranks(2, 1)), {"next": 0}
    for _ in range(stop):
        turn(straight, position)
    saved = json.loads(json.dumps([{"next": 77}, straight.place]))
    assert saved[1]["next"] == position["next"]  # where a run without this store would go on
    again = EncodedDocuments(20.5 * SIZE, saved, ranks(2, 1))
    start = again.position and again.position[1]
    there = dict(start or {"next": 0})
    for _ in range(again.missing):
        n = there["next"]
        there["next"] += 1
        again.add([encoded(f"{n}.{d}") for d in range(2)], dict(there))
    assert there == position and again.place == straight.place
    for _ in range(3 * DRAWS):
        assert turn(again, there) == turn(straight, position)


def test_another_number_of_ranks_begins_with_none_behind_what_was_read():
    kept, position = EncodedDocuments(20.5 * SIZE, None, ranks()), {"next": 0}
    for _ in range(12):
        turn(kept, position)
    for size in (2, 3):
        other = EncodedDocuments(20.5 * SIZE, [kept.place], ranks(size, 1))
        assert other.missing == 0 and other.turn == 0 and other.position == [position]
    assert EncodedDocuments(1.0, [5, 7], ranks()).position == [5, 7]  # of a checkpoint of an older form
    assert EncodedDocuments(1.0, [{"next": 4}], ranks()).position == [{"next": 4}]  # or of a run that kept none


def test_features_are_kept_as_the_connector_takes_them(parts):
    from data import tokenize
    from model import MLLM, ImageProcessor
    from sketchbook import dialogues
    from tokenizer import Tokenizer
    from vae import VAE

    mllm, vae = MLLM.from_pretrained(parts / "mllm"), VAE.from_pretrained(parts / "vae")
    tokenizer, processor = Tokenizer.from_pretrained(parts / "mllm"), ImageProcessor.from_pretrained(parts / "mllm")
    documents = [tokenize(dialogues.dialogue(s, kinds={"lesson": 1}), tokenizer, processor) for s in range(2)]
    for enabled, dtype in ((False, torch.float32), (True, torch.bfloat16)):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            got = replay.encode(documents, mllm, vae, processor, torch.device("cpu"))
        assert [len(e.features) for e in got] == list(map(len, documents)) and {e.features.dtype for e in got} == {dtype}
        assert [[j for _, j in e.targets] for e in got] == [d.targets for d in documents]
        assert all(len(e.pictures) == len(d.pictures) for e, d in zip(got, documents, strict=True))
