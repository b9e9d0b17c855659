"""Ctrl-C at any moment of a training, sent as a terminal sends it: to the whole process group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_resume import assert_same

import runs
from checkpoint import list_checkpoints, newest_sound, verify

ROOT = Path(__file__).parent.parent


def wait(condition, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("kind", ["stage1", "stage2"])
def test_ctrl_c_finishes_the_step_saves_and_the_same_command_continues(kind, parts, tmp_path):
    """The data worker gets it too, and the step still needs it."""
    runs.run(kind, runs.config(kind, parts, tmp_path / "straight"), tmp_path / "straight.log")
    c = runs.config(kind, parts, tmp_path / "run")
    printed = runs.run(kind, c, tmp_path / "log", 1, (runs.signal_group_at, 2, signal.SIGINT))
    assert "interrupted: the step is finished and saved; Ctrl-C once more ends at once\n" in printed
    assert "ended after step 2 of 4; the same command continues" in printed and "Traceback" not in printed
    assert [f.name for f in list_checkpoints(c.out)] == ["step_000002"]
    assert "resumed" in runs.run(kind, c, tmp_path / "again.log")
    assert_same(tmp_path / "straight", tmp_path / "run")


def lose_reader(rank: int, step: int) -> None:
    """Ctrl-C in the middle of a step ends `| tee log` first."""
    from training import Run

    clip = Run.clip

    def wrapped(self):
        if self.step == step:
            reading, writing = os.pipe()
            os.close(reading)
            os.dup2(writing, 1)
            os.dup2(writing, 2)
            os.kill(os.getpid(), signal.SIGINT)
        return clip(self)

    Run.clip = wrapped


def test_ctrl_c_saves_though_it_has_ended_whoever_reads_the_log(parts, tmp_path):
    c = runs.config("stage2", parts, tmp_path / "run")
    printed = runs.run("stage2", c, tmp_path / "log", 1, (lose_reader, 2))
    assert "step       1/4" in printed and "step       2/4" not in printed
    assert newest_sound(c.out).name == "step_000002"


def hang(rank: int, where: str, who: int) -> None:
    """One rank does not come back from its third step, its third save or its first sheet, behind the first save."""
    import train_stage2
    from training import Run

    os.setpgrp()
    owner, name = {"step": (Run, "save_if_due"), "save": (Run, "_write"), "sheet": (train_stage2, "sheet")}[where]
    function = getattr(owner, name)

    def wrapped(*args):
        result = function(*args)
        saved = len(list_checkpoints(args[0].folder)) if where == "save" else 2
        if rank == who and saved == 2 and (where != "step" or args[0].step == 2):
            print(f"rank {rank} hangs", flush=True)
            time.sleep(600)
        return result

    setattr(owner, name, wrapped)


@pytest.mark.parametrize("where", ["step", "save", "sheet"])
def test_a_second_ctrl_c_ends_at_once(where, parts, tmp_path):
    """No checkpoint is half written, and the same command continues."""
    c = runs.config("stage2", parts, tmp_path / "run", save_every=1, sheet_every=2)
    process, = runs.start("stage2", c, log := tmp_path / "log", 1, (hang, where, 0))
    wait(lambda: "rank 0 hangs" in (log.read_text() if log.exists() else ""))
    os.killpg(process.pid, signal.SIGINT)
    wait(lambda: "Ctrl-C once more" in log.read_text())
    time.sleep(0.5)
    assert process.is_alive()
    os.killpg(process.pid, signal.SIGINT)
    process.join(5)
    printed = log.read_text()
    assert process.exitcode == 130 and "Traceback" not in printed
    assert printed.endswith("ended at once; the last checkpoint is kept\n")
    assert len(list_checkpoints(c.out)) == (1 if where == "sheet" else 2) and not any(map(verify, list_checkpoints(c.out)))
    assert f"resumed {newest_sound(c.out)}" in runs.run("stage2", c, tmp_path / "again.log")


def test_a_second_ctrl_c_ends_a_rank_that_waits_for_another(parts, tmp_path):
    """It waits inside PyTorch, where no handler of Python's gets its turn."""
    c = runs.config("stage2", parts, tmp_path / "run")
    processes = runs.start("stage2", c, log := tmp_path / "log", 2, (hang, "step", 1))
    wait(lambda: "rank 1 hangs" in (log.read_text() if log.exists() else ""))
    time.sleep(1)  # rank 0 has got to where it waits
    for _ in range(2):
        os.kill(processes[0].pid, signal.SIGINT)
        time.sleep(0.3)
    processes[0].join(5)
    assert processes[0].exitcode == 130
    processes[1].kill()
    runs.finish(processes)


in_proc = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="looks into /proc (Linux)")


def child(*command: str, log: Path) -> subprocess.Popen:
    """A command with a process group of its own, as a terminal gives one to each."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(log, "w") as file:
        return subprocess.Popen([*map(str, command)], stdout=file, stderr=file, env=environment, start_new_session=True)


@in_proc
@pytest.mark.parametrize("moment", ["imports", "loading"])
@pytest.mark.parametrize("script", ["train_stage1.py", "train_stage2.py", "sketchbook.pretrain"])
def test_ctrl_c_before_the_first_step_is_one_line(script, moment, tmp_path):
    log = tmp_path / "log"
    what = ["-m", script, "mllm"] if script == "sketchbook.pretrain" else [ROOT / script]
    process = child(sys.executable, *what, "--device=cpu", f"--out={tmp_path / 'run'}", log=log)
    if moment == "imports":
        wait(lambda: "libtorch" in Path(f"/proc/{process.pid}/maps").read_text())
    else:
        wait(lambda: (tmp_path / "run" / "lock").exists())
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(10) == 130
    assert [line for line in log.read_text().splitlines() if "tensors, " not in line] == ["interrupted"]


@in_proc
def test_ctrl_c_under_torchrun_saves_and_ends_all_ranks(parts, tmp_path):
    c = runs.config("stage2", parts, tmp_path / "run", steps=1000)
    command = runs.torchrun("--standalone", "--nproc-per-node=2", ROOT / "train_stage2.py", *runs.flags(c))
    process = child(*command, log=(log := tmp_path / "log"))
    wait(lambda: "step       2/" in log.read_text(), 120)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    printed = log.read_text()
    step = int(newest_sound(c.out).name.removeprefix("step_"))
    assert f"ended after step {step} of 1000; the same command continues" in printed
    assert "forcefully exiting" not in printed
    assert len(ranks) >= 2 and not any(Path(f"/proc/{rank}").exists() for rank in ranks)
