"""The cost of judging: sums by hand, and a table from a folder in which something was judged."""

import argparse
import json
import re
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import cost, judging
from unruly import Unruly

TOY = str(Path(__file__).parent / "toy.py")
ARGS = argparse.Namespace(mllm="7B", gpu="H200", picture=480, longer=0, mfu=0.38, bandwidth=0.6, written=60, at_once=8)


def test_a_call_by_hand():
    """370 characters and a picture: 100 tokens, 25 around them, 17 x 17 of the picture, and 7.07e9 weights for each."""
    found = cost.cost(cost.Call(370, 1, "fields", 1), ARGS)
    assert found.read == 100 + 25 + 17 * 17
    assert cost.parameters("7B") == 7_615_616_512 - 152_064 * 3584
    weights = 2 * 7.07e9 / (4.8e12 * 0.6)
    # Two FLOPs for each weight of the decoder and token; the vision tower and attention come on top, less than a third.
    reading = 2 * 6.53e9 * found.read / (989e12 * 0.38)
    assert reading < found.own - weights < 1.33 * reading
    assert found.served - (found.own - weights) == pytest.approx(60 * weights / 8, rel=0.01)


def test_a_judge_of_another_family():
    """Its tokens are 32 pixels wide, and its embeddings are also its last layer, which every token goes through."""
    args = argparse.Namespace(**vars(ARGS) | {"mllm": "qwen3-vl-2B"})
    assert cost.cost(cost.Call(370, 1, "fields", 1), args).read == 100 + 25 + 15 * 15
    assert cost.parameters("qwen3-vl-2B") == 1_720_574_976


def test_a_short_question_takes_the_weights_once():
    found = cost.cost(cost.Call(37, 0, "yes", 0), ARGS)
    assert found.own == pytest.approx(2 * 7.07e9 / (4.8e12 * 0.6), rel=0.01)


def test_a_table_from_a_folder(tmp_path, capsys):
    """Three of four answers have a picture: the fourth is taken to have one, too."""
    for name in ("red", "blue", "green", "yellow"):
        (tmp_path / "theirs" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8), name).save(tmp_path / "theirs" / name / "a.png")
        parts = [{"type": "text", "text": f"{name}: "}, {"type": "image", "image": "a.png"}]
        (tmp_path / "theirs" / name / "answer.json").write_text(json.dumps({"parts": parts[: 1 if name == "red" else 2]}))
    out = str(tmp_path / "e")
    with Unruly(lambda body, n: '{"reason": "so", "score": 3, "style": 3, "content": 3}') as unruly:
        options = ["--answers", str(tmp_path / "theirs"), "--judge", unruly.url, "--judge-model", "judge-1"]
        judging.main([TOY, "--out", out, *options])
    assert len(unruly.asked) == 4 + 2 * 3
    capsys.readouterr()
    cost.main([out, out])
    lines = capsys.readouterr().out
    (toy, *_) = re.findall(r"\| toy +\| 4 +\| 4 +\| ([\d.]+) +\| (\d+) ", lines)
    # 10 calls for 10 of 12 scores, which are 12 for all.
    assert toy == ("3.0", "12")
    assert re.search(r"\| all +\| 8 +\| +\| +\| 24 ", lines)


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(InputError, match="no run in it"):
        cost.main([str(tmp_path)])
    (tmp_path / "run.json").write_text(json.dumps({"benchmark": TOY, "items": "x"}))
    with pytest.raises(InputError, match="nothing is judged there"):
        cost.main([str(tmp_path)])
    with pytest.raises(InputError, match="--mfu 0.0: must be more than 0"):
        cost.main([str(tmp_path), "--mfu", "0"])


def test_characters_of_a_token_are_those_of_the_real_vocabulary(shared):
    from tokenizer import Tokenizer

    tokenizer = Tokenizer.from_pretrained(shared / "qwen2.5-vl-7b-instruct")
    text = "\n".join(file.read_text() for file in sorted((Path(cost.__file__).parent / "benchmarks/prompts").glob("*.md")))
    assert len(text) / len(tokenizer.encode(text)) == pytest.approx(cost.CHARACTERS, rel=0.15)
