"""Killed at random with two ranks and eight calls at a time; the command in kills.py does it 20 times under torchrun."""

from pathlib import Path

import kills

TOY = str(Path(__file__).parent / "toy.py")


def test_killed_ranks_make_the_same_report_and_judge_nothing_twice(tmp_path):
    sampling = ["--steps", "2", "--batch", "1", "--device", "cpu"]
    found = kills.run(tmp_path, [TOY], sampling, kills=3, seed=1, start=kills.Forked, delay=0.5)
    assert found["same report"]
    alone, killed = found["alone"], found["killed"]
    assert killed["kills"] == 3 and killed["judged twice"] == []
    assert alone["calls"] == alone["questions"] == killed["questions"]
    # A question comes twice only if a kill came between its way to the server and the disk.
    assert killed["unexplained"] == 0 and killed["calls"] <= killed["questions"] + 3 * 2 * 8


def test_a_question_asked_twice_without_a_kill_is_found():
    """The test above could not fail otherwise."""
    log = kills.Log(type("Server", (), {"asked": [{"messages": "a"}] * 2, "times": [[1.0, 1.5], [4.0, 4.5]]}))
    assert log.again([], slack=1.0)["unexplained"] == 1
    assert log.again([(3.0, 3.1)], slack=1.0)["unexplained"] == 1
    assert log.again([(1.2, 1.3)], slack=1.0)["unexplained"] == 0
