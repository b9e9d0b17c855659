"""The number of CPU threads follows what other programs leave, is said, and is the user's if he has decided."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import threads
from threads import Crew, Watch

LARGE = 10**9
SPIN = "while True: pass"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine of four cores whose clocks stand still until they are moved: `tick(seconds, all=..., own=...)`."""
    state = {"now": 100.0, "busy": 0.0, "own": 5.0}
    monkeypatch.setattr(threads, "usable_cores", lambda: {0, 1, 2, 3})
    monkeypatch.setattr(threads, "busy_seconds", lambda: state["busy"])
    monkeypatch.setattr(threads.time, "monotonic", lambda: state["now"])
    monkeypatch.setattr(threads.time, "process_time", lambda: state["own"])
    monkeypatch.setattr(threads, "WATCH", Watch())
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)

    def tick(seconds: float, everybody: float, own: float) -> None:
        state["now"] += seconds
        state["busy"] += seconds * everybody
        state["own"] += seconds * own

    before = torch.get_num_threads()
    yield tick
    torch.set_num_threads(before)


def test_threads_give_way_to_other_programs_and_come_back(machine, capsys):
    machine(2.0, everybody=1.0, own=1.0)
    crew = Crew(LARGE, "cpu")
    assert (crew.number, torch.get_num_threads()) == (4, 4)
    assert capsys.readouterr().err == ""  # all is as one expects
    machine(1.0, everybody=4.0, own=1.5)
    crew.adapt()
    assert (crew.number, torch.get_num_threads()) == (1, 1)
    assert capsys.readouterr().err == "computing in 1 thread: other programs use 2.5 of 4 cores\n"
    machine(1.0, everybody=1.3, own=1.0)
    crew.adapt()
    assert crew.number == 4
    assert "computing in 4 threads" in capsys.readouterr().err


def test_a_machine_that_is_busy_at_the_start_is_noticed_before_the_first_picture(machine, capsys):
    machine(1.5, everybody=4.0, own=0.5)
    assert Crew(LARGE, "cpu").number == 1
    assert "other programs use 3.5 of 4 cores" in capsys.readouterr().err


def test_a_short_look_does_not_count(machine):
    machine(2.0, everybody=1.0, own=1.0)
    crew = Crew(LARGE, "cpu")
    machine(threads.INTERVAL / 2, everybody=4.0, own=0.0)
    crew.adapt()
    assert crew.number == 4
    machine(threads.INTERVAL / 2, everybody=4.0, own=0.0)
    crew.adapt()
    assert crew.number == 1


def test_small_work_takes_few_threads(machine):
    machine(2.0, everybody=1.0, own=1.0)
    assert [Crew(n, "cpu").number for n in (10**5, 7_467_008, 10**7, LARGE)] == [1, 2, 3, 4]


def test_a_decision_of_the_users_stands(machine, monkeypatch):
    before = torch.get_num_threads()
    machine(2.0, everybody=4.0, own=0.0)
    Crew(LARGE, "cuda")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    Crew(LARGE, "cpu")
    assert torch.get_num_threads() == before


def test_where_the_system_does_not_tell_the_size_of_the_work_decides(machine, monkeypatch):
    monkeypatch.setattr(threads, "busy_seconds", lambda: None)
    monkeypatch.setattr(threads, "WATCH", Watch())
    machine(2.0, everybody=4.0, own=0.0)
    assert Crew(LARGE, "cpu").number == 4


def test_only_the_cores_that_are_ours_are_looked_at(monkeypatch, tmp_path):
    file = tmp_path / "stat"
    cores = "cpu0 100 1 2 900 5 3 4 5 9 9\ncpu1 800 0 98 800 0 0 0 0 0 0\n"
    file.write_text(f"cpu  900 0 100 9000 5 0 0 0 0 0\n{cores}intr 5 0\n\nbtime 1\n")
    monkeypatch.setattr(threads, "STAT", file)
    monkeypatch.setattr(threads, "usable_cores", lambda: {0})
    assert threads.busy_seconds() == pytest.approx((100 + 1 + 2 + 3 + 4 + 5) / os.sysconf("SC_CLK_TCK"))


@pytest.mark.skipif(not threads.STAT.exists(), reason="no /proc/stat on this system: only the size of the work decides")
def test_on_a_busy_machine_sampling_says_that_it_computes_in_one_thread(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    cores = len(threads.usable_cores())
    if cores == 1:
        pytest.skip("one core: there is only one thread to begin with")
    others = [subprocess.Popen([sys.executable, "-c", SPIN]) for _ in range(cores)]
    try:
        command = [sys.executable, "sample.py", "--prompt", "a photo of a green star", "--out", tmp_path / "out"]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=Path(threads.__file__).parent, timeout=120)
    finally:
        for other in others:
            other.kill()
    assert done.returncode == 0, done.stderr
    assert "computing in 1 thread: other programs use" in done.stderr
