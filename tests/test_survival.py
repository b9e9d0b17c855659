"""What a run survives: kills at any moment, a full disk, damaged checkpoints, lost and hung ranks, losses that are no numbers.

    python tests/test_survival.py [KILLS [RANKS]]     the kill test's long form: 50 kills, 1 rank if not told otherwise
"""

import errno
import json
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import make_parts  # its import puts the repository on the path, also where this file is a script
from safetensors.torch import load_file
from test_resume import assert_same

import checkpoint
import distributed
import runs
from checkpoint import InputError


def newest(run: Path) -> int:
    return max((int(f.name[5:]) for f in run.glob("step_*")), default=0)


def announce_saves(rank: int, file: str) -> None:
    """The file says whether rank 0 is in a save."""
    from training import Run

    save = Run._write, Run._drop

    def write(self, *args):
        Path(file).write_text("in")
        save[0](self, *args)

    def drop(self):
        save[1](self)
        Path(file).write_text("out")

    Run._write, Run._drop = write, drop


def kill_and_restart(parts: Path, folder: Path, kinds: list[str], kills: int, ranks: int = 1) -> tuple[int, int]:
    """Kill runs with SIGKILL, every second time during a save, until there have been so many; then compare the final weights.

    Of several ranks all are killed or one of them, at random. Returns (kills, kills during a save).
    """
    chance, done, in_saves = random.Random(0), 0, 0
    for k, kind in enumerate(kinds):
        c = runs.config(kind, parts, folder / f"{kind}_straight", steps=12)
        runs.run(kind, c, folder / f"{kind}_straight.log", ranks)
        c = runs.config(kind, parts, folder / kind, steps=12, save_every=1)
        share, before, marker = kills * (k + 1) // len(kinds), 0, folder / f"{kind}_saving"
        while True:
            marker.write_text("out")
            log = folder / f"{kind}_{done}.log"
            log.write_text("")
            c_folder = Path(c.out)
            processes = runs.start(kind, c, log, ranks, (announce_saves, str(marker)))
            if done < share and before < 11:
                target = before + 1 if done % 2 else before
                while all(p.exitcode is None for p in processes):
                    saving = marker.read_text() == "in"
                    if done % 2 and saving and newest(c_folder) >= target - 1:
                        time.sleep(chance.uniform(0, 0.08))
                        break
                    if not done % 2 and newest(c_folder) >= target and "x cpu" in log.read_text():
                        time.sleep(chance.uniform(0, 0.6))
                        break
                    time.sleep(0.002)
                for process in chance.choice((processes, [chance.choice(processes)])):
                    process.kill()
                saving = marker.read_text() == "in"
                if -signal.SIGKILL in runs.finish(processes):  # else the run was over before
                    done, in_saves = done + 1, in_saves + saving
            else:
                assert runs.finish(processes) == [0] * ranks, log.read_text()[-3000:]
            printed = log.read_text()
            if before and "x cpu" in printed:
                assert f"resumed {c.out}/step_{before:06d}" in printed, printed[-3000:]
            before = newest(c_folder)
            if before == 12:
                if done >= share:
                    break
                assert_same(folder / f"{kind}_straight", c_folder)
                shutil.rmtree(c_folder)  # anew, until enough kills have fallen
                before = 0
        assert_same(folder / f"{kind}_straight", c_folder)
        assert not list(c_folder.glob("damaged_*"))
    return done, in_saves


def test_kills_at_any_moment_cost_nothing(parts, tmp_path):
    kills, in_saves = kill_and_restart(parts, tmp_path, ["stage1", "stage2"], 8)
    assert kills == 8 and in_saves >= 2


def saved_run(parts: Path, folder: Path, kind: str = "stage2", steps: int = 4, **options):
    c = runs.config(kind, parts, folder, steps=steps, save_every=1, keep=3, **options)
    runs.run(kind, c, folder.with_suffix(".log"))
    return c


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_used(parts, tmp_path):
    c = saved_run(parts, tmp_path / "run", keep_every=1)
    shutil.copytree(tmp_path / "run", tmp_path / "whole")
    newest_file = tmp_path / "run" / "step_000004" / "trainer.safetensors"
    with open(newest_file, "r+b") as f:
        f.seek(newest_file.stat().st_size - 40)
        f.write(b"\xff" * 8)
    (tmp_path / "run" / "step_000003" / "dit" / "config.json").unlink()
    printed = runs.run("stage2", c, tmp_path / "again.log")
    assert f"{tmp_path}/run/step_000004: trainer.safetensors is damaged: its checksum differs" in printed
    assert "step_000003: dit/config.json is missing" in printed and f"resumed {tmp_path}/run/step_000002" in printed
    assert_same(tmp_path / "whole", tmp_path / "run")
    assert sorted(f.name for f in (tmp_path / "run").glob("damaged_*")) == ["damaged_step_000003", "damaged_step_000004"]
    sums = subprocess.run(["sha256sum", "-c", "--quiet", checkpoint.SUMS], cwd=checkpoint.newest_sound(tmp_path / "run"))
    assert sums.returncode == 0
    for folder in (tmp_path / "run").glob("step_*"):
        (folder / "state.json").write_text("{}")
    with pytest.raises(InputError, match="every checkpoint is damaged"):
        checkpoint.newest_sound(tmp_path / "run")


def test_the_last_and_every_mth_checkpoint_are_kept(parts, tmp_path):
    c = runs.config("stage2", parts, tmp_path / "run", steps=7, save_every=1, keep=2, keep_every=3)
    runs.run("stage2", c, tmp_path / "log")
    assert sorted(f.name for f in (tmp_path / "run").glob("step_*")) == [f"step_00000{n}" for n in (3, 6, 7)]
    c.keep = 1
    assert runs.finish(runs.start("stage2", c, tmp_path / "one.log")) == [2]
    assert "--keep 1" in (tmp_path / "one.log").read_text()


def small_files(rank: int, size: int) -> None:
    """No file may grow beyond this: writing fails as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_space(rank: int) -> None:
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "index")

    checkpoint.sync = full


@pytest.mark.parametrize("hook", [(small_files, 60_000), (no_space,)])
def test_a_full_disk_is_said_and_keeps_the_last_good_checkpoint(hook, parts, tmp_path):
    c = saved_run(parts, tmp_path / "run", steps=2)
    c.steps = 4
    assert runs.finish(runs.start("stage2", c, tmp_path / "full.log", 1, hook)) == [2]
    printed = (tmp_path / "full.log").read_text()
    last = printed.strip().splitlines()[-1]
    assert last.startswith("error: ") and "the last good one is step_000002: make room" in last and "Traceback" not in printed
    assert sorted(f.name for f in (tmp_path / "run").glob("s*")) == ["step_000001", "step_000002"]
    assert f"resumed {tmp_path}/run/step_000002" in runs.run("stage2", c, tmp_path / "again.log")


@pytest.mark.parametrize("kind", ["stage1", "stage2"])
def test_a_step_that_is_no_number_is_skipped_by_all_ranks_and_named(kind, parts, tmp_path):
    out = tmp_path / "run"
    c = runs.config(kind, parts, out, steps=5, max_skipped=2, save_every=1)
    log = tmp_path / "log"
    assert runs.finish(runs.start(kind, c, log, 2, (runs.spoil, 1, [1, 3, 4]))) != [0, 0]
    printed = log.read_text()
    rows = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 5] and all(row["documents"] for row in rows)
    names = rows[0]["documents"]
    assert all(name.startswith("seed:") for name in names)
    assert f"skipped step 2: loss nan, gradient norm nan: documents {names[0]}" in printed
    assert "error: 2 steps in a row without a finite loss and gradient; step 5" in printed
    weights = load_file(out / "step_000005" / "trainer.safetensors")
    assert all(v.isfinite().all() for v in weights.values())
    assert [json.loads(line)["skipped"] for line in (out / "metrics.jsonl").read_text().splitlines()] == [0, 1]


def test_a_signal_to_the_whole_group_saves_and_ends(parts, tmp_path):
    """As batch systems send it: the data workers get it too, and the step still needs them."""
    c = runs.config("stage1", parts, tmp_path / "run", steps=50)
    printed = runs.run("stage1", c, tmp_path / "log", 1, (runs.signal_group_at, 3))
    assert newest(tmp_path / "run") == 3 and "SIGTERM: rank 0 asks" in printed


def die(rank: int, how: str) -> None:
    from training import Run

    clip = Run.clip

    def wrapped(self):
        if rank == 1 and self.step == 2:
            if how == "raise":
                raise RuntimeError("the culprit")
            culprit_sleeps()
        return clip(self)

    Run.clip = wrapped


def culprit_sleeps() -> None:
    time.sleep(600)


def starve(rank: int) -> None:
    """The last rank's data worker reads for ever."""
    from records.stream import Stream

    if rank == 1:
        Stream.__getitem__ = lambda self, number: culprit_sleeps()


def test_a_data_worker_that_hangs_says_where(parts, tmp_path):
    c = runs.config("stage2", parts, tmp_path / "run", timeout=8.0)
    assert 0 not in runs.finish(runs.start("stage2", c, tmp_path / "log", 2, (starve,)))
    printed = (tmp_path / "log").read_text()
    assert "error: rank 1 did not come on for 8 s" in printed and "in culprit_sleeps" in printed


@pytest.mark.parametrize(("how", "sign"), [("raise", "RuntimeError: the culprit"), ("hang", "in culprit_sleeps")])
def test_a_rank_that_dies_or_hangs_ends_all_with_its_traceback_first(how, sign, parts, tmp_path):
    c = runs.config("stage2", parts, tmp_path / "run", timeout=8.0)
    log, began = tmp_path / "log", time.monotonic()
    statuses = runs.finish(runs.start("stage2", c, log, 2, (die, how)))
    assert statuses[0] not in (0, None) and statuses[1] == 1 and time.monotonic() - began < 60
    printed = log.read_text()
    first = min(printed.find(x) for x in ("Traceback (most", "most recent call first") if x in printed)
    assert sign in printed and sign in printed[first:].split("all_reduce")[0]
    line = {"raise": "error: rank 0 has lost another rank", "hang": "error: rank 1 did not come on for 8 s"}[how]
    assert line in printed


def end_often(rank: int, port: int) -> None:
    sys.setswitchinterval(1)  # a thread of gloo's that frees a tensor has to wait for the interpreter's lock
    for n in range(10):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port + n)}
        step_and_close(distributed.Ranks("cpu"))


def step_and_close(ranks: distributed.Ranks) -> None:
    module = ranks.wrap(torch.nn.Linear(4, 4))
    module(torch.ones(2, 4)).sum().backward()
    for _ in range(20):
        ranks.sum(1.0)
    ranks.close()


def test_a_training_that_is_done_ends():
    """The group's threads may still be busy with the last sum when the group is destroyed."""
    port = random.randrange(20000, 30000)
    processes = [runs.context.Process(target=end_often, args=(rank, port)) for rank in (0, 1)]
    for process in processes:
        process.start()
    assert runs.finish(processes, 60) == [0, 0]


def hold(rank: int) -> None:
    runs.after_step(lambda run: time.sleep(600))


def test_a_second_training_in_a_folder_is_refused_until_the_first_has_died(parts, tmp_path):
    """Before it loads anything. A killed training leaves no lock behind."""
    c = runs.config("stage2", parts, tmp_path / "run")
    first, = runs.start("stage2", c, tmp_path / "first.log", 1, (hold,))
    while not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.05)
    assert runs.finish(runs.start("stage2", c, tmp_path / "second.log", 2)) == [2, 2]
    said = [line for line in (tmp_path / "second.log").read_text().splitlines() if not line.startswith("[")]
    assert said == [f"error: --out {c.out}: process {first.pid} on {socket.gethostname()} is training there: wait for its end, "
                    "or choose another folder"]  # fmt: skip
    first.kill()
    first.join()
    assert "x cpu" in runs.run("stage2", c, tmp_path / "third.log", 2)


def test_a_restarted_run_waits_for_the_lock_of_a_rank_that_is_still_dying(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    held, waits = [OSError(errno.EAGAIN, "held")], []
    monkeypatch.setattr(distributed.fcntl, "lockf", lambda *_: (_ for _ in ()).throw(held.pop()) if held else None)
    monkeypatch.setattr(distributed.time, "sleep", waits.append)
    ranks = distributed.Ranks("cpu")
    ranks.claim(str(tmp_path))
    assert not held and 1 in waits and f"process {os.getpid()} on " in (tmp_path / "lock").read_text()
    ranks.close()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_said_and_trained_on(number, tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(distributed.fcntl, "lockf", refuse)
    ranks = distributed.Ranks("cpu")
    ranks.claim(str(tmp_path / "run"))
    said = capsys.readouterr().err
    assert said.startswith(f"--out {tmp_path}/run: no locks on its file system") and said.count("\n") == 1
    ranks.close()


@pytest.mark.parametrize("where", ["file", "file/run", "/proc/run"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(where, parts, tmp_path):
    (tmp_path / "file").write_text("in the way")
    c = runs.config("stage1", parts, tmp_path / where)
    assert runs.finish(runs.start("stage1", c, tmp_path / "log")) == [2]
    why = "No such file or directory" if where.startswith("/proc") else "a file is in the way"
    assert (tmp_path / "log").read_text() == f"error: --out {c.out}: cannot be written ({why}): choose another folder\n"


def test_restarts_without_the_switch_they_need_are_refused(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "1")
    with pytest.raises(InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        distributed.Ranks("cpu")


def test_torchrun_heals_a_lost_rank(parts, tmp_path):
    """One rank is killed once; the run ends well without a hand, with the weights of a run that lost nobody."""
    script = tmp_path / "loses_one.py"
    script.write_text(f"""
import os, sys
sys.path[:0] = [{str(runs.ROOT)!r}]
import train_stage2, training
marker, clip = {str(tmp_path / "killed")!r}, training.Run.clip
def wrapped(self):
    if self.ranks.rank == 1 and self.step == 3 and not os.path.exists(marker):
        open(marker, "w").close()
        os.kill(os.getpid(), 9)
    return clip(self)
training.Run.clip = wrapped
training.run_script(lambda: train_stage2.train(training.parse_config(train_stage2.Stage2Config)))
""")
    c = runs.config("stage2", parts, tmp_path / "run", save_every=1)
    command = runs.torchrun("--standalone", "--nproc-per-node=2", "--max-restarts=1", str(script), *runs.flags(c))
    done = subprocess.run(command, capture_output=True, text=True, env=runs.healing(), timeout=200)
    assert done.returncode == 0 and (tmp_path / "killed").exists(), done.stderr[-3000:]
    assert f"resumed {c.out}/step_000002" in done.stdout
    runs.run("stage2", runs.config("stage2", parts, tmp_path / "straight"), tmp_path / "log", 2)
    assert_same(tmp_path / "straight", tmp_path / "run")


if __name__ == "__main__":
    number, ranks = [*map(int, sys.argv[1:]), *(50, 1)[len(sys.argv) - 1 :]]
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "parts").mkdir()
        result = kill_and_restart(make_parts(Path(name) / "parts"), Path(name), ["stage1", "stage2"], number, ranks)
    print("{} kills, {} during saves: every restart resumed, the final weights are those without kills".format(*result))
