"""bench/: every row runs and is right, what kills a group costs no other, the README shows the committed results."""

import json
import os
import subprocess
import sys
import time
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
        if "ceiling" not in row["what"] and "memory" not in row["what"]:
            assert row["error"] <= 5e-5, row
    # Of a GPU alone: fp16, other lengths, and a peer that only cuDNN has.
    assert {row["group"] for row in rows} == set(groups.ORDER) - {"check-fp16", "lengths", "cudnn-varlen"}
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
    assert shown == f"\n{measure.markdown(RESULTS)}\n"
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


def test_a_check_that_finds_a_wrong_kernel_says_which(tmp_path, monkeypatch):
    right = attention.attention
    monkeypatch.setattr(attention, "attention", lambda q, *a, **k: right(q, *a, **k) * (1.01 if len(q) == 3 else 1.0))
    b = runner(tmp_path, monkeypatch)
    attention.check(b)  # of three sequences: their last queries are what decoding has
    assert len(b.rows) == 6 and all(row["failed"] == "wrong: decode" for row in b.rows)


# ------------------------------------------------------------------------------------------------------------------ groups


def falls(b: measure.Bench) -> None:
    """A group whose second row takes the process with it."""
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


def test_what_kills_a_group_costs_no_other(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(groups, "JOBS", {"falls": falls, "stumbles": stumbles, "stands": stands})
    file = tmp_path / "bench.jsonl"
    assert groups.run(["falls", "stumbles", "stands"], "cpu", "smoke", file, 5) == 2
    machine, first, died, stumbled, right = records(file)
    assert machine["torch"] == torch.__version__
    assert first["what"] == "its first row" and "failed" not in first
    assert died["group"] == "falls" and "SIGABRT" in died["failed"]
    assert stumbled["group"] == "stumbles" and "no such shape" in stumbled["failed"]
    assert right["group"] == "stands" and right["ms"] > 0
    printed = capfd.readouterr().out
    assert "SIGABRT" in printed and "5 rows" not in printed and "4 rows" in printed


def test_a_group_that_hangs_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(groups, "GRACE", 0)
    groups.run_apart(hangs, "cpu", "smoke", tmp_path / "bench.jsonl", "hangs", time.time() + 0.5)
    (row,) = records(tmp_path / "bench.jsonl")
    assert row["group"] == "hangs" and row["failed"].startswith("stopped")


def test_a_group_ends_with_its_run_however_that_ends(tmp_path):
    file = tmp_path / "bench.jsonl"
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_bench
from bench import groups
groups.run_apart(test_bench.lasts, "cpu", "smoke", Path({str(file)!r}), "lasts")
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
    groups.begin(file, machine, ["vae"])
    assert records(file) == [machine, old[1]]
    measure.append(file, old[0])
    measure.append(file, {"group": "guided", "what": "c"})
    groups.sort(file)
    assert [row["what"] for row in records(file)[1:]] == ["c", "b", "a"]
    groups.begin(file, machine | {"torch": "another"}, ["vae"])  # rows of two versions are not of one table
    assert records(file) == [machine | {"torch": "another"}]


def test_every_group_has_its_place_in_the_order():
    assert sorted(groups.ORDER) == sorted(groups.JOBS) and groups.ORDER[-1] == "cudnn-varlen"


def test_the_peer_that_has_killed_its_process_stands_beside_no_other():
    case = attention.Case("", [4, 3], [4, 3], 2, 2, 32, backward=True, flex=True)
    for lengths in ([4, 3], [4, 4]):
        peers = attention.Peers(case._replace(lq=lengths, lk=lengths), None, None, torch.device("cuda")).named()
        assert "varlen_attn" in peers and not [name for name in peers if name == "cuDNN varlen"]


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
