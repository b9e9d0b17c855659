"""bench/measure.py: every row runs and is right, the README's table is the committed result file's, mistakes are one line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import measure
from checkpoint import InputError
from training import run_script

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "docs" / "bench" / "cpu.jsonl"


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, "-m", "bench", "--suite", "smoke", "--device", "cpu", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return done.stdout, [json.loads(line) for line in (folder / "bench.jsonl").read_text().splitlines()]


def test_every_row_of_the_smoke_run_is_equal_to_its_reference(smoke):
    _, (environment, *rows) = smoke
    assert environment["torch"] == torch.__version__ and environment["diffusers"] != "not installed"
    assert len(rows) > 30 and not [r for r in rows if "failed" in r or any("failed" in p for p in r["peers"].values())]
    for row in rows:
        if "ceiling" not in row["what"] and "memory" not in row["what"]:
            assert row["error"] <= 5e-5, row
    assert {"attention", "fused", "system", "check"} == {row["suite"] for row in rows}
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
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    assert not [r for r in rows if "failed" in r] and "threads" in rows[0]["device"]


def runner(tmp_path, monkeypatch) -> measure.Bench:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return measure.Bench("cpu", "smoke", tmp_path)


def test_a_wrong_result_has_no_time(tmp_path, monkeypatch):
    b, x = runner(tmp_path, monkeypatch), torch.randn(8)
    b.row("fused", "wrong", "8", lambda: lambda: x * 1.01, {"right": lambda: lambda: x}, reference=x.double(), limit=1e-3)
    b.row("fused", "not a number", "8", lambda: lambda: x * torch.nan, {}, reference=x, limit=1e-3)
    b.row("fused", "another shape", "8", lambda: lambda: x[:4], {}, reference=x, limit=1e-3)
    for row in b.rows:
        assert "failed" in row and "ms" not in row and row["failed"].startswith("wrong")
    b.row("fused", "wrong peer", "8", lambda: lambda: x, {"wrong": lambda: lambda: -x}, reference=x, limit=1e-3)
    assert "ms" in b.rows[-1] and "ratio" not in b.rows[-1]["peers"]["wrong"]


def test_a_peer_that_is_missing_is_named_and_the_rest_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)  # import transformers now fails
    b = runner(tmp_path, monkeypatch)
    measure.vision(b)
    (row,) = b.rows
    assert "ms" in row and "import" in row["peers"]["transformers"]["failed"].lower()
    assert json.loads((tmp_path / "bench.jsonl").read_text().splitlines()[-1]) == row  # written before the run has ended


def test_a_check_that_finds_a_wrong_kernel_says_which(tmp_path, monkeypatch):
    right = measure.attention
    monkeypatch.setattr(
        measure, "attention", lambda *a, **k: right(*a, **k) * (1.01 if k.get("deterministic") is False else 1.0)
    )
    b = runner(tmp_path, monkeypatch)
    measure.check(b)
    assert len(b.rows) == 6 and all("backward in one pass" in row["failed"] for row in b.rows)


@pytest.mark.parametrize(
    "args, says",
    [
        (["--sweet", "all"], "--sweet"),
        (["--suite", "everything"], "everything"),
        (["--device", "tpu"], "tpu"),
        (["--readme", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--readme", "ruff.toml"], "ruff.toml"),
    ],
)
def test_a_mistake_is_one_line(args, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench/measure.py", *args])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        run_script(measure.command)
    printed, complaint = capsys.readouterr()
    assert stop.value.code == 2 and complaint.startswith("error: ") and says in complaint
    assert len(complaint.splitlines()) == 1 and not printed


def test_a_file_without_a_machine_is_no_result_file(tmp_path):
    (tmp_path / "x.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="machine"):
        measure.markdown(tmp_path / "x.jsonl")
