"""bench.tune: processes that crash, a run at toy sizes, and the tables of kernels.py against the measurement of an H200."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import kernels
from bench import tune
from ops import Segments

ROOT = Path(__file__).parent.parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")


def serve(pipe, device):
    """A process that dies of the way "dies", hangs at "hangs", and answers all others."""
    while True:
        way = pipe.recv().way
        if way == "dies":
            os.abort()
        if way == "hangs":
            time.sleep(60)
        pipe.send({"ms": 1.0, "ended": way == "last"})


def test_a_job_that_ends_its_process_costs_itself(monkeypatch):
    monkeypatch.setattr(tune, "PATIENCE", 5)
    workers = tune.Workers(2, "cpu", serve)
    ways = ["a", "dies", "b", "last", "hangs", "c", "d"]
    jobs = [tune.Job("way", None, way=way) for way in ways]
    results = {job.way: result for job, result in workers.run(jobs, time.time() + 60)}
    workers.close()
    assert list(results) != [] and results.keys() == set(ways)
    assert "ended with" in results["dies"]["failed"] and "no result" in results["hangs"]["failed"]
    assert all(results[way] == {"ms": 1.0} for way in ("a", "b", "last", "c", "d"))


def test_without_time_no_job_begins():
    workers = tune.Workers(1, "cpu", serve)
    assert list(workers.run([tune.Job("way", None, way="a")], 0.0)) == [(tune.Job("way", None, way="a"), {"failed": tune.LATE})]


def test_toy_sizes(tmp_path):
    """In a process of its own, as a user starts it."""
    command = [sys.executable, "-m", "bench.tune", "--smoke", "--processes", "2", "--out", str(tmp_path / "tune.json")]
    command += ["--summary", str(tmp_path / "summary.json")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    records = json.loads((tmp_path / "tune.json").read_text())["records"]
    assert not [r for r in records if "failed" in r]
    assert {r["kind"] for r in records} == {"compile", "time", "way", "fresh"} and "dq " in done.stdout
    shapes = json.loads((tmp_path / "summary.json").read_text())["shapes"]
    assert [line["shape"] for line in shapes] == [case.shape for case in tune.cases(True)]
    assert shapes[0].keys() >= {"forward", "dq", "dkv", "ways forward", "ways backward"}


def test_the_full_list_is_short_enough():
    jobs = tune.compile_jobs(tune.cases(False), tune.candidates(False))
    assert 40 < len(jobs) < 80
    assert len(set(jobs_key(job) for job in jobs)) == len(jobs)


def jobs_key(job):
    return job.candidate, tune.kind_of(job.case)


# --------------------------------------------------------------------------------- the tables against docs/bench/tune_h200.json

MEASURED = json.loads((ROOT / "docs/bench/tune_h200.json").read_text())
CASES = tune.cases(False)
CALLS = 28 * 35  # attentions of one length in a picture: layers of the DiT times steps
FASTER = 0.95  # of the time of the kernels, at most


def measured(case):
    (line,) = [x for x in MEASURED["shapes"] if (x["case"], x["shape"], x["causal"]) == (case.what, case.shape, case.causal)]
    return line


def own(case, what):
    """Milliseconds with the tiles that the kernels take today."""
    return measured(case)[what][tune.Candidate(what, case.dim, tune.taken(case, what)).name]


def timed_cases(what):
    return [pytest.param(case, what, id=f"{what}, {case.shape}") for case in CASES if what in measured(case)]


@pytest.mark.parametrize("case, what", [c for what in ("forward", "dq", "dkv") for c in timed_cases(what)])
def test_the_tiles_taken_are_nearly_the_fastest(case, what):
    """Farthest off: 1 x 2048 causal, dq by 5 % and forward by 4.5 %, then forward of 1 x 4500 by 4.2 %."""
    fastest = min(measured(case)[what].values())
    assert own(case, what) <= 1.051 * fastest


@pytest.mark.parametrize("what, dim", [key for key in kernels.HOPPER if key[0] != "decode"])
def test_costs_are_those_of_4_x_4096(what, dim):
    (full,) = [c for c in CASES if c.dim == dim and c.lq == [4096] * 4 and not c.causal]
    first, *others = kernels.HOPPER[what, dim]
    times = measured(full)[what]
    base = times[tune.Candidate(what, dim, first).name]
    for t in others:
        assert t.cost == pytest.approx(times[tune.Candidate(what, dim, t).name] / base, abs=0.006)


def for_sdpa(case):
    """Whether auto leaves this case to PyTorch."""
    sq = Segments(case.lq)
    sk = sq if case.lq == case.lk else Segments(case.lk)
    q = torch.empty(1, case.heads, case.dim)
    k = torch.empty(1, case.kv_heads, case.dim)
    return kernels.sdpa_is_faster(q, k, k, sq, sk, case.causal)


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(kernels, "_architecture", lambda device: 9)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)


def test_auto_goes_to_pytorch_only_where_that_is_measured_to_pay(hopper):
    """Faster, with equal bits in every call, and the plan of a new length is paid for within a picture."""
    # The first calls of the process start cuDNN as well.
    plan = max(ms for name, ms in MEASURED["first call"].items() if "forward" in name and ms < 500)
    gone = [case for case in CASES if for_sdpa(case)]
    for case in gone:
        line = measured(case)
        sdpa = line["ways forward"]["sdpa"]
        assert sdpa <= FASTER * own(case, "forward") and "sdpa" not in line["bits differ forward"]
        assert CALLS * (own(case, "forward") - sdpa) >= plan
    assert {(9, case.dim) for case in gone} == kernels.SDPA_FROM.keys(), "an entry that nothing has measured"


def test_the_readme_shows_the_tiles_of_now():
    shown = (ROOT / "README.md").read_text().split("<!-- tune -->\n")[1].split("\n<!-- end of tune -->")[0]
    assert shown == readme_table()


def readme_table():
    """Both passes with the tiles taken, dq and dkv together but without delta, beside PyTorch's attention."""
    lines = ["| attention, ms | forward | PyTorch | ratio | backward | PyTorch | ratio |", "|---|---|---|---|---|---|---|"]
    for case in CASES:
        if not case.backward:
            continue
        line = measured(case)
        cells = [f"{case.shape}{', causal' if case.causal else ''}"]
        sides = (own(case, "forward"), "ways forward"), (own(case, "dq") + own(case, "dkv"), "ways backward")
        for ours, ways in sides:
            peer = line[ways]["sdpa"]
            cells += [f"{ours:.3g}", f"{peer:.3g}", f"{peer / ours:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
