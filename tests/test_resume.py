"""A run that stops and goes on is the run that never stopped: byte for byte, with one rank and two, and on other ranks."""

import json
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

import runs
from checkpoint import SUMS, newest_sound

WALL_CLOCK = ("about.json", SUMS)  # what no two runs share


def files(run: Path) -> dict[str, bytes]:
    """The newest checkpoint."""
    folder = newest_sound(run)
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name not in WALL_CLOCK}


def assert_same(a: Path, b: Path) -> None:
    assert newest_sound(a).name == newest_sound(b).name
    one, other = files(a), files(b)
    assert one.keys() == other.keys() and len(one) > 2
    assert [name for name in one if one[name] != other[name]] == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kind", runs.KINDS)
def test_a_stopped_run_equals_the_straight_one(kind, ranks, parts, tmp_path):
    """With data workers. A signal to the last rank stops all of them after the step that they are in."""
    straight, halves = tmp_path / "straight", tmp_path / "halves"
    runs.run(kind, runs.config(kind, parts, straight), tmp_path / "a.log", ranks)
    c = runs.config(kind, parts, halves)
    hook = (runs.signal_at, ranks - 1, 2, signal.SIGTERM if ranks == 1 else signal.SIGUSR1)
    printed = runs.run(kind, c, tmp_path / "b.log", ranks, hook)
    assert f"rank {ranks - 1} asks to save and end after step 2" in printed
    assert [f.name for f in halves.glob("step_*")] == ["step_000002"]
    assert "resumed" in runs.run(kind, c, tmp_path / "c.log", ranks)
    assert_same(straight, halves)
    steps = [json.loads(line)["step"] for line in (halves / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]
    about = json.loads((newest_sound(halves) / "about.json").read_text())
    assert about["seed"] == 0 and len(about["code_sha256"]) == 64
    assert about["versions"]["torch"] and about["config"]["steps"] == 4


def draw_thrice(rank: int, *stop) -> None:
    """Encoded documents are drawn three times instead of eight, so that a short run has it all; and perhaps a signal."""
    import replay

    replay.DRAWS = 3
    if stop:
        runs.signal_at(rank, *stop)


@pytest.mark.parametrize(("kind", "ranks"), [("stage1", 1), ("stage2", 1), ("stage2", 2)])
def test_sittings_with_other_numbers_of_workers_equal_the_straight_run(kind, ranks, parts, tmp_path):
    """In stage 2 with encoded documents that are kept, the oldest of which have gone when the run is stopped."""
    straight, sittings = tmp_path / "straight", tmp_path / "sittings"
    options = {"steps": 13, "replay_mb": 1.0, "documents": 1, "kinds": "one=1,lesson=1"} if kind == "stage2" else {}
    runs.run(kind, runs.config(kind, parts, straight, workers=1, **options), tmp_path / "a.log", ranks, (draw_thrice,))
    for workers, step in ((3, 1), (0, options.get("steps", 4) - 3), (2, None)):
        c = runs.config(kind, parts, sittings, workers=workers, **options)
        stop = () if step is None else (ranks - 1, step, signal.SIGTERM)
        runs.run(kind, c, tmp_path / f"{workers}.log", ranks, (draw_thrice, *stop))
    assert_same(straight, sittings)
    if kind == "stage2":
        for place in json.loads((newest_sound(sittings) / "state.json").read_text())["position"]:
            kept = place["kept"]
        assert kept["turn"] == 13 and 3 <= kept["fills"] < 6 and kept["start"]["next"] > 0  # of 3 + 4 fills, some have gone


def test_sharded_optimizer_states_change_nothing_and_resume(parts, tmp_path):
    plain, sharded = tmp_path / "plain", tmp_path / "sharded"
    runs.run("stage1", runs.config("stage1", parts, plain), tmp_path / "a.log", 2)
    c = runs.config("stage1", parts, sharded, zero=True)
    runs.run("stage1", c, tmp_path / "b.log", 2, (runs.signal_at, 0, 2, signal.SIGTERM))
    runs.run("stage1", c, tmp_path / "c.log", 2)
    assert_same(plain, sharded)


def test_two_ranks_hand_over_to_one_and_one_to_three(parts, tmp_path):
    """Every record of an epoch is read once, in the order of the epoch, whoever reads it."""
    lines = tmp_path / "lines.jsonl"
    talk = "say {} {}"
    records = [[("user", "again"), ("assistant", talk.format(n, "so " * (n % 7)))] for n in range(60)]
    rows = [{"messages": [{"role": r, "content": t} for r, t in record]} for record in records]
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    c = runs.config("stage1", parts, tmp_path / "run", data=str(lines), tokens=160, save_every=1)
    read = []
    for ranks, steps in ((2, 2), (1, 4), (3, 5)):
        c.steps = steps
        runs.run("stage1", c, tmp_path / f"{ranks}.log", ranks, (runs.note_names, str(tmp_path)))
        shares = [(tmp_path / f"names_{ranks}_{r}.jsonl").read_text().splitlines() for r in range(ranks)]
        read.append([name for share in shares for line in share for name in json.loads(line)])
    from records.stream import Stream, open_source

    stream = Stream(open_source(str(lines)), seed=c.seed)
    order = ["{}:{}".format(*stream[n][0]) for n in range(60)]
    done = sum(read, [])
    assert len(done) == len(set(done)) and set(read[1]) and set(read[2])
    last = max(order.index(name) for name in done)
    missed = [name for name in order[:last] if name not in done]
    assert all(order.index(name) > order.index(read[0][-1]) for name in missed)  # only what ranks of the last run were apart
    assert [order.index(name) for name in read[1]] != [] and len(missed) <= 12


@pytest.mark.parametrize("kind", ["stage1", "stage2"])
def test_gradients_do_not_depend_on_ranks_or_accumulation(kind, parts, tmp_path):
    """Two ranks that accumulate two micro-batches, and one rank that accumulates four, of documents unlike in length."""
    kinds = {"stage1": "text=1,one=1", "stage2": "one=1,recolour=1"}[kind]
    options = {"documents": 1, "steps": 1, "kinds": kinds} | ({"tokens": 4000} if kind == "stage1" else {"replay_mb": 0.0})
    gradients = []
    for ranks, accumulate in ((2, 2), (1, 4)):
        c = runs.config(kind, parts, tmp_path / f"run_{ranks}", accumulate=accumulate, **options)
        file = tmp_path / f"gradients_{ranks}.safetensors"
        runs.run(kind, c, tmp_path / f"{ranks}.log", ranks, (runs.keep_gradients, str(file)))
        gradients.append(load_file(file))
    two, one = gradients
    assert any(g.abs().max() > 1e-3 for g in one.values())
    assert max((two[name] - one[name]).abs().max().item() for name in one) < 1e-6
