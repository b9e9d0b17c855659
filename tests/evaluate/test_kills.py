"""Killed at random with two ranks and eight calls at a time; the command in kills.py does it 20 times under torchrun."""

import time
from pathlib import Path

import kills

from unruly import Unruly

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


def ask(url: str, folder: Path) -> None:
    from evaluate.judges import Asker
    from evaluate.server import Server

    assert Asker(Server(url, "judge-1"), folder).yes("Is it red?").value == 1.0


def test_two_ranks_with_one_question_ask_it_once(tmp_path):
    def slowly(body, n):
        time.sleep(0.5)
        return "yes"

    with Unruly(slowly) as unruly:
        ranks = [kills.context.Process(target=ask, args=(unruly.url, tmp_path)) for _ in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join()
    assert [rank.exitcode for rank in ranks] == [0, 0] and len(unruly.asked) == 1
    assert [file.suffix for file in tmp_path.rglob("*.*")] == [".json"]
