"""bench/: every row runs and is right, what kills a group costs no other, the README shows the committed results."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from bench import attention, groups, measure, system
from bench.__main__ import command
from bench.measure import Row, Way
from checkpoint import InputError
from training import run_script

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "bench" / "cpu.jsonl"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    file = folder / "smoke.jsonl"
    args = [sys.executable, "-m", "bench", "--smoke", "--device", "cpu", "--out", str(file)]
    done = subprocess.run(args, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout, records(file)


def records(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_every_row_of_the_smoke_run_is_equal_to_its_reference(smoke):
    _, (environment, *rows) = smoke
    assert environment["torch"] == torch.__version__ and environment["diffusers"] != "not installed"
    assert len(rows) > 30 and not [r for r in rows if "failed" in r or any("failed" in p for p in r["peers"].values())]
    for row in rows:
        if not any(word in row["what"] for word in ("ceiling", "memory", "a picture", "resizes")):
            assert row["error"] <= 5e-5, row
    assert [row["shape"][-11:] for row in rows if "a picture" in row["what"]] == [f"{n} before it" for n in (0, 1, 2, 4, 8)]
    plans = {row["what"]: row["peers"]["plan"]["ratio"] for row in rows if row["group"] == "memory"}
    assert len(plans) == 4 and all(0.97 < ratio < 1.03 for what, ratio in plans.items() if "VAE" not in what)
    assert all(row["samples"] > 0 for row in rows if row["what"].startswith("training step"))
    # Of a GPU alone: fp16, other lengths, and a peer that is compiled.
    assert {row["group"] for row in rows} == set(groups.ORDER) - {"check-fp16", "lengths", "flex"}
    keys = [groups.row_key(row) for row in rows]
    assert len(keys) == len(set(keys))  # by which a group that goes on, and files that are merged, know their rows
    wanted = {"guided DiT step", "decode token", "vision tower", "a document of the miniature", "training step, stage 2"}
    assert all({*row["peers"]} for row in rows if row["what"] in wanted) and wanted <= {row["what"] for row in rows}


def test_the_printed_table_has_every_row(smoke):
    printed, (_, *rows) = smoke
    for row in rows:
        assert any(line.startswith(row["what"]) and row["shape"] in line for line in printed.splitlines()), row
        for name, peer in row["peers"].items():
            assert name in printed
            if "ms" in peer:
                assert peer["ratio"] == pytest.approx(peer["ms"] / row["ms"])


def test_the_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    shown = text.split(measure.MARKS[0])[1].split(measure.MARKS[1])[0]
    tables = "\n\n".join(measure.markdown(file) for file in groups.committed())
    assert shown == f"\n{tables}\n" and groups.committed()[-1] == RESULTS
    rows = records(RESULTS)
    assert not [r for r in rows if "failed" in r] and "threads" in rows[0]["device"]


def test_a_cpu_shows_one_row_a_subject():
    _, *rows = records(RESULTS)
    subjects = [row["what"] for row in rows]
    assert len(subjects) == len(set(subjects)) and 12 <= len(subjects) <= 15
    assert [row["group"] for row in rows] == sorted((row["group"] for row in rows), key=groups.ORDER.index)


def runner(tmp_path, monkeypatch) -> measure.Bench:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return measure.Bench("cpu", "smoke", tmp_path / "bench.jsonl", "some")


def giving(x: torch.Tensor):
    """What builds a way to compute x."""
    return lambda: Way(lambda: x)


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch):
    b, x = runner(tmp_path, monkeypatch), torch.randn(8)
    b.measure(Row("wrong", "8", giving(x * 1.01), {"right": giving(x)}, limit=1e-3, reference=x.double()))
    b.measure(Row("not a number", "8", giving(x * torch.nan), {}, limit=1e-3, reference=x))
    b.measure(Row("another shape", "8", giving(x[:4]), {}, limit=1e-3, reference=x))
    b.measure(Row("not its peer", "8", giving(x * 1.01), {"right": giving(x)}, limit=1e-3))
    for row in b.rows:
        assert "failed" in row and "ms" not in row and row["failed"].startswith("wrong")
    b.measure(Row("wrong peer", "8", giving(x), {"wrong": giving(-x)}, limit=1e-3, reference=x))
    assert "ms" in b.rows[-1] and "ratio" not in b.rows[-1]["peers"]["wrong"]
    assert records(tmp_path / "bench.jsonl") == b.rows and len(b.rows) == 5


def test_a_peer_that_is_missing_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # import transformers now fails
    b = runner(tmp_path, monkeypatch)
    system.vision(b)
    (row,) = b.rows
    assert "ms" in row and "import" in row["peers"]["transformers"]["failed"].lower()
    assert json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[-1]) == row  # written before the run has ended


def test_libraries_that_break_on_import_cost_their_cells_alone(tmp_path):
    """As an installation without its dependencies does: the error is none of a missing module."""
    for name in ("transformers", "diffusers"):
        (tmp_path / f"{name}.py").write_text("raise RuntimeError('no such dependency')")
    file = tmp_path / "bench.jsonl"
    args = ["--smoke", "--device", "cpu", "--group", "guided", "--group", "decode", "--out", str(file)]
    run = [sys.executable, "-m", "bench", *args]
    done = subprocess.run(run, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)}, timeout=100)
    assert done.returncode == 0
    _, *rows = records(file)
    assert len(rows) == 3 and all(row["ms"] > 0 for row in rows)
    assert all("no such dependency" in row["peers"][name]["failed"] for row in rows for name in row["peers"])


def test_a_check_that_finds_a_wrong_kernel_says_which(tmp_path, monkeypatch):
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, *a, **k: right(q, *a, **k) * (1.01 if len(q) == 3 else 1.0))
    b = runner(tmp_path, monkeypatch)
    attention.check(b)  # of three sequences: their last queries are what decoding has
    assert len(b.rows) == 6 and all(row["failed"] == "wrong: decode" for row in b.rows)


# ------------------------------------------------------------------------------------------------------------------ groups


def falls(b: measure.Bench) -> None:
    """A group that takes its process with it outside of all rows."""
    b.write(b.record("its first row", ""))
    os.abort()


def stumbles(b: measure.Bench) -> None:
    raise ValueError("no such shape")


def hangs(b: measure.Bench) -> None:
    time.sleep(600)


def lasts(b: measure.Bench) -> None:
    """Tells who it is, and does not end."""
    b.write(b.record("pid", str(os.getpid())))
    time.sleep(600)


def stands(b: measure.Bench) -> None:
    b.measure(Row("one", "8", giving(torch.ones(8)), {}, limit=0))


def raises() -> Way:
    raise ValueError("not this shape")


def kills() -> Way:
    return Way(lambda: os.kill(os.getpid(), signal.SIGKILL))


def falls_silent() -> Way:
    return Way(lambda: time.sleep(600))


def kills_when_timed() -> Way:
    """Right when it is compared, deadly afterwards."""
    calls = []

    def call():
        calls.append(1)
        if len(calls) > 1:
            os.abort()
        return torch.ones(8)

    return Way(call)


def has_bad_peers(b: measure.Bench) -> None:
    """Rows between which nothing may be lost."""
    right = giving(torch.ones(8))
    bad = {
        "raises": raises,
        "wrong": giving(2 * torch.ones(8)),
        "kills": kills,
        "hangs": falls_silent,
        "kills when timed": kills_when_timed,
        "right": right,
    }
    b.measure(Row("first", "8", right, {}, limit=1e-3))
    b.measure(Row("with peers", "8", right, bad, limit=1e-3, reference=torch.ones(8)))
    b.measure(Row("our own fault", "8", kills, {"right": right}, limit=1e-3))
    b.measure(Row("last", "8", right, {"right": right}, limit=1e-3))


def run_group(job, file: Path, **place) -> None:
    groups.run_apart(job, groups.Place("cpu", "smoke", file, **place), job.__name__)


def test_a_peer_that_raises_is_wrong_kills_or_hangs_costs_its_own_cell(tmp_path, monkeypatch):
    run_group(stands, tmp_path / "other.jsonl")  # from here on a process starts at once
    monkeypatch.setitem(groups.PATIENCE, "cpu", 4)
    file = tmp_path / "bench.jsonl"
    run_group(has_bad_peers, file)
    rows = {row["what"]: row for row in records(file)}
    assert list(rows) == ["first", "with peers", "our own fault", "last"] and len(records(file)) == 4
    peers = rows["with peers"]["peers"]
    assert rows["with peers"]["ms"] > 0 and peers["right"]["ratio"] > 0
    reasons = {name: peer["failed"] for name, peer in peers.items() if name != "right"}
    assert "not this shape" in reasons["raises"] and "another result" in reasons["wrong"]
    assert "SIGKILL" in reasons["kills"] and "hung" in reasons["hangs"] and "SIGABRT" in reasons["kills when timed"]
    assert "SIGKILL" in rows["our own fault"]["failed"]
    assert rows["first"]["ms"] > 0 and rows["last"]["peers"]["right"]["ms"] > 0


def test_a_gpu_that_no_longer_answers_costs_the_cell_of_its_peer(tmp_path, monkeypatch):
    """After an illegal access every call fails: the process ends, and tells why before."""
    b = runner(tmp_path, monkeypatch)
    heard, b.tell, b.cuda = [], lambda cell, why: heard.append((cell[2], why)), True

    answers = [None]  # behind our own call; behind that of the peer there is none

    def synchronize():
        if not answers:
            raise RuntimeError("an illegal memory access was encountered")
        answers.pop()

    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr(os, "_exit", lambda status: sys.exit(status))
    with pytest.raises(SystemExit) as stop:
        b.right_calls(Row("row", "8", giving(torch.ones(8)), {"bad": giving(torch.ones(8))}, limit=0), {"peers": {}})
    assert stop.value.code == measure.BROKEN
    assert heard[-1][0] == "bad" and "illegal memory access" in heard[-1][1]


def test_what_kills_a_group_costs_no_other(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(groups, "JOBS", {"falls": falls, "stumbles": stumbles, "stands": stands})
    file = tmp_path / "bench.jsonl"
    assert groups.run(["falls", "stumbles", "stands"], "cpu", "smoke", file, 5) == 2
    machine, *rows = records(file)
    assert machine["torch"] == torch.__version__
    by_group = {row["group"]: row for row in rows if "failed" in row or row["group"] == "stands"}
    assert "SIGABRT" in by_group["falls"]["failed"] and "no such shape" in by_group["stumbles"]["failed"]
    assert by_group["stands"]["ms"] > 0 and [row["what"] for row in rows].count("its first row") == 1
    assert "SIGABRT" in capfd.readouterr().out


def test_a_group_that_hangs_is_stopped_when_its_time_is_over(tmp_path):
    file = tmp_path / "bench.jsonl"
    run_group(hangs, file, end=time.time() + 0.5)
    (row,) = records(file)
    assert row["group"] == "hangs" and row["failed"] == groups.STOPPED


def compiles(b: measure.Bench) -> None:
    """Leaves a mark for every call of ours."""
    for i in range(5):
        way = Way(partial((b.file.parent / f"{i}").touch))
        b.measure(Row(f"row {i}", "8", lambda way=way: way, {"a peer": kills}, limit=0, reference=kills))


def test_all_rows_are_compiled_first_by_several_processes(tmp_path, monkeypatch):
    """Our calls alone, no reference, no peer; nothing is written."""
    monkeypatch.setattr(groups, "JOBS", {"compiles": compiles, "falls": falls, "hangs": hangs})
    monkeypatch.setattr(groups, "SHARES", {"compiles": 3})
    file = tmp_path / "bench.jsonl"
    place = groups.Place("cpu", "smoke", file)
    groups.compile_first(["compiles", "falls"], place, seconds=60)
    groups.compile_first(["hangs"], place, seconds=1)  # and comes back
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0", "1", "2", "3", "4"]


def test_a_group_ends_with_its_run_however_that_ends(tmp_path):
    file = tmp_path / "bench.jsonl"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_bench
from bench import groups
test_bench.run_group(test_bench.lasts, Path({str(file)!r}))
"""
    run = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    wait_for(file.exists)
    wait_for(file.read_text)
    pid = int(records(file)[0]["shape"])
    run.kill()
    run.wait()
    wait_for(lambda: not alive(pid))
    assert records(file)[0]["what"] == "pid"  # what was known is kept


def wait_for(condition, seconds: float = 60) -> None:
    end = time.time() + seconds
    while not condition():
        assert time.time() < end
        time.sleep(0.1)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_no_time_is_left_for_is_said_to_be_skipped_and_is_no_failure(tmp_path, monkeypatch):
    file = tmp_path / "bench.jsonl"
    assert groups.run(["guided", "vae"], "cpu", "smoke", file, 0) == 0
    _, *rows = records(file)
    assert [(row["group"], row["failed"]) for row in rows] == [("guided", measure.SKIPPED), ("vae", measure.SKIPPED)]
    late = measure.Bench("cpu", "smoke", file, "late", deadline=time.time() - 1)
    stands(late)
    assert late.rows[-1]["failed"] == measure.SKIPPED


def test_a_group_by_itself_leaves_the_rows_of_others(tmp_path):
    file = tmp_path / "bench.jsonl"
    machine = groups.environment(torch.device("cpu"))
    old = [{"group": "vae", "what": "a"}, {"group": "decode", "what": "b"}]
    file.write_text("".join(json.dumps(r) + "\n" for r in [machine, *old]))
    assert groups.begin(file, machine, ["vae"]) == [old[0]]
    assert records(file) == [machine, old[1]]
    assert groups.begin(file, machine | {"torch": "another"}, ["vae"]) == []  # rows of two versions are not of one table
    assert records(file) == [machine | {"torch": "another"}]


def row(group: str, what: str, **more) -> dict:
    return {"group": group, "what": what, "shape": "", "peers": {}, **more}


def test_a_row_without_time_leaves_that_of_an_earlier_run():
    before = [row("guided", "a", ms=1), row("guided", "b", ms=2), row("vae", "old name", ms=3), row("decode", "d", ms=5)]
    after = [row("guided", "a", ms=9), row("guided", "b", failed=measure.SKIPPED), row("vae", "new name", ms=4)]
    after += [row("decode", "decode", failed=measure.SKIPPED), row("stage1", "stage1", failed=groups.STOPPED)]
    rows = groups.merged(before, after)
    assert [(r["what"], r.get("ms")) for r in rows] == [("a", 9), ("b", 2), ("d", 5), ("stage1", None), ("new name", 4)]


def test_files_of_two_runs_become_one(tmp_path):
    """Of different groups, of the same one twice, and never of two machines."""
    machine = {"device": "H200", "torch": "2", "clocks": "1000"}
    files = [tmp_path / name for name in "abcd"]
    groups.rewrite(files[0], [machine, row("vae", "v", ms=1), row("decode", "d", ms=2)])
    groups.rewrite(files[1], [machine | {"clocks": "900"}, row("guided", "g", ms=3), row("decode", "d", ms=4)])
    groups.rewrite(files[2], [machine | {"device": "A100"}, row("guided", "g", ms=3)])
    done = subprocess.run([sys.executable, "-m", "bench", "--merge", *files[:2], "--out", files[3]], cwd=ROOT, timeout=100)
    assert done.returncode == 0
    merged_machine, *rows = records(files[3])
    assert merged_machine == machine and [(r["what"], r["ms"]) for r in rows] == [("g", 3), ("d", 4), ("v", 1)]
    with pytest.raises(InputError, match="another machine"):
        groups.merge([files[0], files[2]], files[3])


def test_every_group_has_its_place_in_the_order():
    assert sorted(groups.ORDER) == sorted(groups.JOBS)


def test_a_training_step_on_a_gpu_has_its_mfu(tmp_path, monkeypatch):
    b = runner(tmp_path, monkeypatch)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    b.cuda, record = True, {"peers": {}}
    b.note_times(Row("step", "8", None, {}, limit=0, flops=989e9, samples=4), record, {"ours": [2e-3]})
    assert record["mfu"] == pytest.approx(0.5) and record["samples"] == pytest.approx(2000)
    assert measure.rate(record | {"group": "stage1"}, None).endswith("MFU 50%, 2e+03 samples/s")


def test_shares_of_the_ceiling_stand_in_the_table(tmp_path):
    b = measure.Bench("cpu", "smoke", tmp_path / "x.jsonl")
    row = b.record("product", "8") | {"ms": 2.0, "tflops": 30.0}
    assert measure.lines(row, {"tflops": 60.0})[0][2] == "2 ms, 30 TFLOP/s (50%)"
    assert measure.lines(row)[0][2] == "2 ms, 30 TFLOP/s"


# ---------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    "args, says",
    [
        (["--sweet", "all"], "--sweet"),
        (["--group", "everything"], "everything"),
        (["--minutes", "few"], "few"),
        (["--device", "tpu"], "tpu"),
        (["--merge", "nowhere.jsonl"], "--out"),
        (["--merge", "nowhere.jsonl", "--out", "x.jsonl"], "nowhere.jsonl"),
        (["--readme", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--readme", "ruff.toml"], "ruff.toml"),
    ],
)
def test_a_mistake_is_one_line(args, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench", *args])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_script(command)
    printed, complaint = capsys.readouterr()
    assert stop.value.code == 2 and complaint.startswith("error: ") and says in complaint
    assert len(complaint.splitlines()) == 1 and not printed


def test_a_file_without_a_machine_is_no_result_file(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="machine"):
        measure.markdown(tmp_path / "x.jsonl")
