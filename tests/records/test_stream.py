"""The order in which records are read, its position, packs to a budget, and what happens to records that cannot be used."""

import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from fractions import Fraction
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
import train_stage1
from checkpoint import InputError
from data import Document, batches, fill, loader, prepare
from model import MLLM, PRESETS, ImageProcessor
from records.files import Files
from records.stream import Mix, Quarantine, Stream, expand, open_source, permuted, pick_workers
from sketchbook import dialogues
from tokenizer import Rendered, Tokenizer
from training import run_script

ROOT = Path(__file__).parent.parent.parent
TINY = ROOT / "checkpoints" / "tiny" / "mllm"


@pytest.fixture(scope="module")
def parts() -> tuple[Tokenizer, ImageProcessor]:
    return Tokenizer.from_pretrained(TINY), ImageProcessor.from_pretrained(TINY)


def write(path: Path, n: int, bad: set[int] = frozenset(), words=lambda i: "word") -> str:
    rows = [["q", "" if i in bad else f"{path.stem} {i} {words(i)}"] for i in range(n)]
    rows = [[{"role": r, "content": c} for r, c in zip(("user", "assistant"), row, strict=True)] for row in rows]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return str(path)


def said(record: dict) -> str:
    return " ".join(record["messages"][1]["content"][0]["text"].split()[:2])


def length(n: int) -> Document:
    return Document(Rendered([0] * n, [True] * n), torch.zeros(3, n), None, [], [])


# -------------------------------------------------------------------------------------------------------------- order


def test_a_permutation_without_memory():
    for n in (*range(1, 40), 255, 256, 257, 1000):
        for key in range(3):
            assert sorted(permuted(k, n, key) for k in range(n)) == list(range(n)), n
    orders = {tuple(permuted(k, 4, key) for k in range(4)) for key in range(2000)}
    assert len(orders) == 24  # every order of four occurs
    n, taken = 2**40 + 12345, 4000
    far = [permuted(k, n, 7, 1) for k in range(taken)]
    assert len(set(far)) == taken and max(far) < n and far != [permuted(k, n, 7, 2) for k in range(taken)]
    x = torch.tensor(far, dtype=torch.float64) / n
    assert abs(x.mean() - 0.5) < 0.02 and abs(x.std() - 12**-0.5) < 0.02  # 4 standard errors
    assert abs(torch.corrcoef(torch.stack((x[:-1], x[1:])))[0, 1]) < 0.07
    assert abs(torch.corrcoef(torch.stack((x, torch.arange(taken))))[0, 1]) < 0.07


def test_the_order_is_a_function_of_seed_and_number_alone(tmp_path: Path):
    """Written down: whoever changes it changes what a checkpoint's position means."""
    source = open_source(f"{write(tmp_path / 'a.jsonl', 5)}=2,{write(tmp_path / 'b.jsonl', 3)}=1")
    got = [said(r) for r in islice(Stream(source, seed=1), 9)]
    assert got == ["a 1", "b 0", "a 2", "a 3", "b 1", "a 4", "a 0", "b 2", "a 4"]
    for workers in (0, 2):
        ranks = [iter(Stream(source, 1, rank, 3, workers=workers)) for rank in range(3)]
        assert [said(next(rank)) for _ in range(3) for rank in ranks] == got


@pytest.mark.parametrize(("cores", "ranks", "workers"), [(1, 1, 1), (2, 1, 1), (8, 1, 7), (64, 1, 16), (64, 8, 7), (4, 8, 1)])
def test_workers_take_the_cores_that_a_rank_has_to_spare(cores, ranks, workers, monkeypatch):
    monkeypatch.setattr("records.stream.usable_cores", lambda: set(range(cores)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    assert pick_workers(-1) == workers and pick_workers(0) == 0 and pick_workers(40) == 40


def test_no_worker_outlives_its_training(tmp_path: Path):
    """One that is not scheduled while its training ends gets several SIGTERMs as one, and must not be waited for for ever."""
    write(tmp_path / "a.jsonl", 10)
    items = iter(Stream(open_source(str(tmp_path / "a.jsonl")), 1, workers=1))
    next(items)
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGSTOP)
    items.close()
    worker.join(5)
    assert worker.exitcode == -signal.SIGKILL


def test_a_mixture_keeps_its_weights_and_every_epoch_is_whole(tmp_path: Path):
    a, b = write(tmp_path / "a.jsonl", 40), write(tmp_path / "b.jsonl", 7)
    source = open_source(f"{a}=2,{b},sketchbook=0.5", "one=1")
    assert source.counts == [4, 2, 1]
    kinds, read = Counter(), []
    for record in islice(Stream(source, seed=5), 140):
        kinds["one" if record.get("kind") == "one" else said(record)[0]] += 1
        read += [] if "kind" in record else [said(record)]
    assert kinds == {"a": 80, "b": 40, "one": 20}
    for which, n in (("a", 40), ("b", 7)):
        part = [r for r in read if r[0] == which]
        epochs = [part[i : i + n] for i in range(0, len(part) // n * n, n)]
        assert all(len(set(epoch)) == n for epoch in epochs) and epochs[0] != epochs[1]
    seeds = [k for s, k in (source.locate(n, 5) for n in range(140)) if s == 2]
    assert seeds == list(range(20))
    many = Mix([None] * 2, [Fraction("0.001"), Fraction(3)])
    assert Counter(many.locate(n, 0)[0] for n in range(3001 * 4)) == {0: 4, 1: 12_000}


def test_names_of_sources(tmp_path: Path):
    assert expand("s-{000..002}.tar") == ["s-000.tar", "s-001.tar", "s-002.tar"] and expand("{9..11}") == ["9", "10", "11"]
    assert expand("{a,b}/{1..2}.tar") == ["a/1.tar", "a/2.tar", "b/1.tar", "b/2.tar"] and expand("lr=2.jsonl") == ["lr=2.jsonl"]
    for name in ("a0", "a1", "lr=2"):
        write(tmp_path / f"{name}.jsonl", 3)
    at = f"{tmp_path}/"
    assert len(open_source(f"{at}a0.jsonl,{at}a{{0..1}}.jsonl,{at}a{{0,1}}.jsonl,{at}lr=2.jsonl")) == 18
    assert open_source(f"{at}a{{0,1}}.jsonl=1.5,{at}lr=2.jsonl=1").counts == [3, 2]
    assert len(open_source(f"{at}a0.jsonl=3")) == 3
    a = f"{at}a0.jsonl"
    mistakes = {"": "no source", f"{a}=0,{a}": "weight 0", f"{a}=-1,{a}": "weight -1", f"{a}=nan,{a}": "weight nan",
                f"{a}=1e9,{a}": "weight 1e9", f"{a},sketchbook": "needs weights", f"{at}none.jsonl": "no such file",
                f"{at}{{2..1}}.jsonl": "counts nothing", f"{a}=0.0000001": "weight",
                f"{a}=0.000001,{a}": "rounder", str(tmp_path): "is a folder"}  # fmt: skip
    for text, reason in mistakes.items():
        with pytest.raises(InputError, match=reason) as e:
            open_source(text)
        assert "\n" not in str(e.value)
    with pytest.raises(InputError, match="files have none, only procedural worlds"):
        open_source(a, "one=1")


def test_a_module_with_a_function_record_is_a_source(tmp_path: Path, monkeypatch):
    """By its name alone, in a package, too. A file of that name comes first; what is neither is one line."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "worlds").mkdir()
    (tmp_path / "worlds/tiny_world.py").write_text(WORLD)
    (tmp_path / "empty_world.py").write_text("raise_no_flag = 1")
    (tmp_path / "loud_world.py").write_text("raise SystemExit('imported')")
    assert open_source("worlds.tiny_world")(3) == {"seed": 3, "split": "train", "kinds": None}
    assert open_source("worlds.tiny_world", "a=2,b", "seen")(4) == {"seed": 4, "split": "seen", "kinds": {"a": 2.0, "b": 1.0}}
    assert open_source("worlds.tiny_world=1,sketchbook=2").counts == [1, 2]
    with pytest.raises(InputError, match="empty_world: no such file, and the module of that name has no function record"):
        open_source("empty_world")
    for name in ("no_world", "worlds.none", "no.world", "worlds", "loud_world.jsonl", "loud_world.tar", "a b", "./sketchbook"):
        with pytest.raises(InputError, match="no such file|is a folder|no function record") as e:
            open_source(name)
        assert "\n" not in str(e.value)
    write(tmp_path / "sketchbook", 2)
    assert len(open_source("sketchbook")) == 2


WORLD = """
def record(seed, split="train", kinds=None):
    return {"seed": seed, "split": split, "kinds": kinds}
"""


# ----------------------------------------------------------------------------------------------------------- position


@pytest.mark.parametrize("workers", [0, 2])
def test_two_ranks_then_one_then_three_read_an_epoch_once(tmp_path: Path, workers: int):
    """Documents of every length under a token budget, so that the ranks get out of step, and some records are bad."""
    n, chance = 300, random.Random(2)
    bad = set(chance.sample(range(n), 6))
    path = write(tmp_path / "a.jsonl", n, bad, lambda i: "x" * (1 + i * 37 % 90))

    def words(record: dict, number: int) -> Document:
        document = length(len(record["messages"][1]["content"][0]["text"]))
        document.text = said(record)
        return document

    read, positions, counted = [], None, []
    for world_size, steps in ((2, 4), (1, 6), (3, 3), (1, 2), (2, None)):
        streams = [Stream(Files([path]), 9, r, world_size, prepare=words, workers=workers, epochs=1) for r in range(world_size)]
        if positions:
            for stream in streams:
                stream.resume(json.loads(json.dumps(positions)))
        packs = [list(islice(batches(s, tokens=400, lookahead=5), steps)) for s in streams]
        read += [document.text for rank in packs for batch, _ in rank for document in batch]
        positions = [rank[-1][1] for rank in packs if rank]
        counted = [stream.position for stream in streams]
        assert all(sum(map(len, batch)) <= 400 for rank in packs for batch, _ in rank)
        if steps:
            assert len({p["next"] // world_size for p in positions}) == world_size  # out of step, or it were no test
    assert Counter(read) == Counter(f"a {i}" for i in range(n) if i not in bad)
    assert sum(p["seen"] for p in counted) == n and sum(p["bad"].get("empty message", 0) for p in counted) == 6


@pytest.mark.parametrize("workers", [0, 1])
def test_packs_continue_exactly(parts, workers: int):
    """With documents that wait, behind any list, as a position from JSON; the targets drawn are the same too."""
    make = partial(loader, open_source("sketchbook"), *parts, tokens=500, patches=600, latents=300, targets=2, seed=3, rank=1,
                   world_size=2, workers=workers, targets_only=True)  # fmt: skip
    whole = list(islice(make(), 12))
    assert any(len(position["open"]) for _, position in whole)
    for k in (1, 5, 8):
        position = json.loads(json.dumps([{}, whole[k - 1][1]]))
        again = list(islice(make(position=position), 12 - k))
        for (x, at), (y, there) in zip(whole[k:], again, strict=True):
            assert at == there
            assert [(d.name, d.rendered, d.drawn) for d in x] == [(d.name, d.rendered, d.drawn) for d in y]


# -------------------------------------------------------------------------------------------------------------- packs


def of_lengths(lengths: list[int]) -> Stream:
    stream = Stream(lambda seed: {}, prepare=lambda record, number: length(lengths[number]))
    stream.end = len(lengths)
    return stream


def test_first_fit_by_hand():
    got = list(batches(of_lengths([60, 50, 30, 70, 10, 90, 100, 5]), tokens=100, lookahead=2))
    assert [[len(d) for d in batch] for batch, _ in got] == [[60, 30], [50, 10], [70], [90, 5], [100]]
    assert [position["open"] for _, position in got] == [[1, 3], [3, 5], [5, 6], [6], []]
    assert [position["next"] for _, position in got] == [4, 6, 7, 8, 8] and got[0][1]["seen"] == 2
    alone = list(batches(of_lengths([10, 500, 10]), tokens=100, lookahead=4))
    assert [[len(d) for d in batch] for batch, _ in alone] == [[10, 10], [500]]
    few = list(batches(of_lengths([10] * 7), documents=3, lookahead=4))
    assert [len(batch) for batch, _ in few] == [3, 3, 1] and all(not position["open"] for _, position in few)
    assert fill(few[0][0], tokens=60) == {"tokens": 0.5}


def test_no_document_waits_for_ever():
    """However many small ones arrive, a large one is packed as soon as it is the oldest."""
    lengths = [60, 95, *[30] * 300]
    packed = [[len(d) for d in batch] for batch, _ in islice(batches(of_lengths(lengths), tokens=100, lookahead=8), 3)]
    assert any(95 in sizes for sizes in packed)


@pytest.mark.parametrize("budget", [{"tokens": 4096}, {"tokens": 1024}, {"latents": 1024}, {"tokens": 2048, "patches": 2500}])
def test_packs_of_the_sketchbook_are_full(parts, budget: dict):
    data = loader(open_source("sketchbook"), *parts, targets=2, **budget)
    lists = [documents for documents, _ in islice(data, max(4, 24_576 // (8 * budget.get("latents", budget.get("tokens")))))]
    rates = [fill(documents, **budget) for documents in lists]
    assert all(rate <= 1 for rates_ in rates for rate in rates_.values())
    assert sum(max(r.values()) for r in rates) / len(rates) > 0.95, rates


def test_budgets_of_one_document(parts):
    """What is too large alone loses its last messages, or targets, or is refused with the numbers."""
    record = next(r for r in map(dialogues.dialogue, range(100)) if len([t for t in r["truth"]["images"] if t["check"]]) > 3)
    options = {"tokenizer": parts[0], "processor": parts[1]}
    whole = prepare(record, 0, **options)
    assert whole.trained == whole.targets and len(whole.targets) > 3
    first, last = whole.latents_of(whole.targets[0]), whole.latents_of(whole.targets[-1])
    assert last == 16 * len(whole.pictures) and whole.latents == sum(map(whole.latents_of, whole.targets))
    for number in range(20):
        some = prepare(record, number, targets=2, max_latents=last + first, **options)
        assert 1 <= len(set(some.trained)) == len(some.trained) <= 2 and set(some.trained) <= set(whole.targets)
        assert some.latents <= last + first
        j = max(some.trained)
        assert len(some) == whole.rendered.images[j].bov and len(some.pictures) == j + 1 == len(some.grids) + 1
        assert some.pixels is None or torch.equal(some.pixels, whole.pixels[: some.patches])
        assert some.rendered.condition_lengths(j) == whole.rendered.condition_lengths(j)
    draws = {tuple(prepare(record, number, targets=1, **options).trained) for number in range(60)}
    assert draws == {(j,) for j in whole.targets}  # each is drawn, and the same again for the same number and seed
    assert prepare(record, 7, seed=1, targets=2, **options).drawn == prepare(record, 7, seed=1, targets=2, **options).drawn
    with pytest.raises(InputError, match=f"too large: {first} latent patches up to .* target, the limit is {first - 1}"):
        prepare(record, 0, targets=2, max_latents=first - 1, **options)
    cut = prepare(dialogues.dialogue(3, kinds={"question": 1}), 0, max_patches=10**6, **options)
    with pytest.raises(InputError, match=f"too long: {cut.patches} patches of pictures up to .* answer, the limit is 60"):
        prepare(dialogues.dialogue(3, kinds={"question": 1}), 0, max_patches=60, **options)


# --------------------------------------------------------------------------------------------------------- quarantine


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("workers", [0, 1])
def test_one_percent_of_bad_records_are_listed_once_each(tmp_path: Path, workers: int):
    """By two ranks that write one file, over two epochs and a new start."""
    bad = {17, 120, 255, 399}
    source, listed = Files([write(tmp_path / "a.jsonl", 400, bad)]), tmp_path / "run" / "quarantine.jsonl"
    for start in range(2):
        for rank in range(2):
            stream = Stream(source, start, rank, 2, epochs=2, workers=workers, quarantine=Quarantine(file=listed))
            assert len(list(stream)) + stream.quarantine.kinds.total() == 400
    found = rows(listed)
    assert sorted(row["line"] - 1 for row in found) == sorted(bad)
    assert found[0] == {"file": str(tmp_path / "a.jsonl"), "line": found[0]["line"], "field": "messages[1].content",
                        "reason": "empty message: write something or drop it"}  # fmt: skip


def test_the_counts_survive_a_new_start(tmp_path: Path):
    source = Files([write(tmp_path / "a.jsonl", 300, set(range(0, 300, 25)))])
    first = Stream(source, prepare=lambda record, number: length(40), epochs=1)
    *_, (_, position) = islice(batches(first, tokens=100, lookahead=4), 60)
    again = Stream(source, prepare=lambda record, number: length(40), epochs=1)
    again.resume([position])
    assert again.quarantine.seen == 120 + again.quarantine.kinds.total() > 120
    list(again)
    assert again.quarantine.seen == 300 and again.quarantine.summary() == "empty message (12)"


def test_a_run_stops_when_thirty_percent_are_broken(tmp_path: Path, capsys, parts):
    """The script itself: one line, status 2, the file that lists them, and no step more."""
    MLLM.from_config(PRESETS["tiny"].for_tokenizer(parts[0])).save_pretrained(tmp_path / "mllm")
    for part in parts:
        part.save_pretrained(tmp_path / "mllm")
    bad = {i for i in range(600) if i % 10 in (2, 5, 7)}
    path, out = write(tmp_path / "a.jsonl", 600, bad), tmp_path / "run"
    quiet = {"device": "cpu", "dtype": "fp32", "sheet_every": 0, "save_every": 0}
    config = train_stage1.Stage1Config(out=str(out), mllm=str(tmp_path / "mllm"), data=path, tokens=2000, steps=50, **quiet)
    with pytest.raises(SystemExit) as e:
        run_script(lambda: train_stage1.train(config))
    assert e.value.code == 2
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and "records cannot be used, more than 5%: empty message (" in line
    assert f"{out / 'quarantine.jsonl'} lists them" in line
    listed = rows(out / "quarantine.jsonl")
    lines = {row["line"] - 1 for row in listed}
    assert 40 < len(listed) < 90 and lines <= bad and len(lines) == len(listed)
    assert not list(out.glob("step_*"))


def test_a_program_that_stops_reading_comes_to_its_end(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", 400)
    code = (
        "from records.stream import Stream, open_source\n"
        f"items = iter(Stream(open_source({path!r}), 1, workers=2))\n"
        "next(items)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
