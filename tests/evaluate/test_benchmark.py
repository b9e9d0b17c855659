"""The three commands over one folder: what they write, what a kill leaves, and what bad input is told."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import figures, generate, judging
from evaluate.answers import Answers
from evaluate.benchmark import find, floor
from evaluate.figures import percentile
from unruly import Unruly

ROOT = Path(__file__).parent.parent.parent
TOY = str(Path(__file__).parent / "toy.py")


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> Path:
    """A run of the bundled miniature."""
    out = tmp_path_factory.mktemp("run") / "e"
    generate.main([TOY, "--out", str(out), "--steps", "2", "--batch", "2", "--lmms-eval"])
    return out


@pytest.fixture
def run(answered, tmp_path) -> Path:
    return Path(shutil.copytree(answered, tmp_path / "e"))


def judge(out: Path, url: str, *more: str) -> None:
    options = ["--judge", url, "--judge-model", "judge-1", "--timeout", "5", "--tries", "2"]
    judging.main([TOY, "--out", str(out), *options, *more])


def obliging(body: dict, n: int) -> str:
    """Answers by what is asked, so that order does not matter."""
    text = json.dumps(body)
    if '\\"style\\"' in text:
        return '{"reason": "as it is", "style": 4, "content": 6}'
    if "JSON" in text:
        return '{"reason": "so", "score": 3}'
    return "yes" if "red" in text or "blue" in text else "no"


def report(out: Path) -> dict:
    figures.main(["--out", str(out), "--draws", "200"])
    return json.loads((out / "report.json").read_text())


def test_three_commands(run, capsys):
    with Unruly(obliging) as unruly:
        judge(run, unruly.url)
    found = report(run)
    (judged,) = found["judges"]
    # By hand: two of four are yes, every text is a 3.
    assert judged["figures"]["overall"] | {"low": 0, "high": 0} == {"value": 0.5, "n": 4, "low": 0, "high": 0}
    assert judged["figures"]["told"] == {"value": 3.0, "n": 4, "low": 3.0, "high": 3.0}
    assert judged["figures"]["r"]["value"] == 1.0 and judged["figures"]["g"]["value"] == 0.0
    assert 0 <= judged["figures"]["overall"]["low"] < 0.5 < judged["figures"]["overall"]["high"] <= 1
    assert judged["counts"]["colour"] == {"judged": 4, "refused": 0, "unparsable": 0, "missing": 0}
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", judged["date"]) and len(judged["prompts"]) == 16
    assert found["source"]["revision"] == "1" and found["seeds"] == {"sampling": 0, "bootstrap": 0, "draws": 200}
    assert "* judge" in (run / "report.md").read_text()


def test_the_page_has_what_it_must(run):
    with Unruly(lambda body, n: "<b>never</b>" if "green" in json.dumps(body) else obliging(body, n)) as unruly:
        judge(run, unruly.url)
    report(run)
    page = (run / "report.html").read_text()
    assert not re.search(r"(src|href)=\"?(https?:)?//", page) and "<b>never" not in page and "&lt;b&gt;never" in page
    for needed in ("Draw a red house.", "as it is", "width=device-width", "<select", 'type="search"', "unparsable"):
        assert needed in page
    pictures = re.findall(r'<img loading="lazy" alt="picture \d+" src="([^"]+)"', page)
    assert pictures and all((run / file).is_file() for file in pictures)
    goodness = [float(x) for x in re.findall(r'data-goodness="([^"]+)"', page)]
    assert len(goodness) == 4 and goodness == sorted(goodness)


def test_nothing_is_judged_twice(run):
    with Unruly(obliging) as unruly:
        judge(run, unruly.url)
        calls = len(unruly.asked)
        judge(run, unruly.url)
        assert len(unruly.asked) == calls
        # The scores gone, the judge's answers are still there.
        shutil.rmtree(run / "judged")
        judge(run, unruly.url)
        assert len(unruly.asked) == calls


def test_two_shards_make_the_same_report(run, tmp_path):
    whole = tmp_path / "whole"
    shutil.copytree(run, whole)
    with Unruly(obliging) as unruly:
        judge(whole, unruly.url)
        judge(run, unruly.url, "--shard", "1/2")
        assert len(list((run / "judged/judge-1").glob("[!jm]*.json"))) == 2
        judge(run, unruly.url, "--shard", "0/2")
    assert report(run) == report(whole)


def test_shards_answer_as_one_process_does(answered, tmp_path):
    for shard in ("1/2", "0/2"):
        generate.main([TOY, "--out", str(tmp_path / "e"), "--steps", "2", "--batch", "2", "--shard", shard])
    for file in answered.glob("answers/*/*.png"):
        with Image.open(file) as a, Image.open(tmp_path / "e" / file.relative_to(answered)) as b:
            assert max(abs(x - y) for x, y in zip(a.tobytes(), b.tobytes(), strict=True)) <= 1


def test_a_mistake_on_the_command_line_is_one_line_and_status_2(tmp_path):
    words = [sys.executable, "-m", "evaluate", "judge", TOY, "--out", str(tmp_path / "none"), "--judge", "self"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and re.fullmatch(r"error: .*no run in it.*\n", done.stderr), done.stderr


def test_one_failing_item_costs_no_other(run):
    with Unruly(lambda body, n: 500 if "green" in json.dumps(body) else obliging(body, n)) as unruly:
        with pytest.raises(InputError, match="not judged: green: .*500.*same command again"):
            judge(run, unruly.url)
        assert len(list((run / "judged/judge-1").glob("[!jm]*.json"))) == 3
        unruly.answer = obliging
        judge(run, unruly.url)
    assert report(run)["judges"][0]["items"] == 4


def test_self_judges(run):
    judging.main([TOY, "--out", str(run), "--judge", "self", "--device", "cpu"])
    (judged,) = report(run)["judges"]
    assert judged["judge"].startswith("self") and 0 <= judged["figures"]["overall"]["value"] <= 1
    assert 1 <= judged["figures"]["told"]["value"] <= 5


def test_what_is_missing_has_the_lowest_score(tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    Image.new("RGB", (8, 8)).save(theirs / "a.png")
    rows = [{"id": "red", "response": json.dumps({"text": "Here: <image>", "images": ["a.png"]})},
            {"id": "blue", "response": json.dumps({"text": "No picture.", "images": []})}]  # fmt: skip
    (theirs / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with Unruly(lambda body, n: obliging(body, n)) as unruly:
        judge(tmp_path / "e", unruly.url, "--answers", str(theirs / "all.jsonl"))
        assert report(tmp_path / "e")["answers absent"] == ["green", "yellow"]
        judge(tmp_path / "e", unruly.url, "--answers", str(theirs / "all.jsonl"), "--absent")
    (judged,) = report(tmp_path / "e")["judges"]
    assert judged["counts"]["colour"] == {"judged": 1, "refused": 0, "unparsable": 0, "missing": 3}
    assert judged["figures"]["overall"]["value"] == 0.25 and judged["figures"]["overall"]["n"] == 4
    assert floor(1.0).why == "missing"


def test_what_generate_writes_for_lmms_eval_is_read_back(answered):
    requests = list(find(TOY).requests(None))
    ours = Answers(answered / "answers", requests)
    theirs = Answers(answered / "answers/lmms_eval.jsonl", requests)
    for request in requests:
        assert ours.files(request.id) == theirs.files(request.id)
        assert ours.fingerprint(request.id) == theirs.fingerprint(request.id)


def test_bad_input_is_one_line(run, tmp_path):
    with pytest.raises(InputError, match="no such benchmark; there are sketchbook"):
        find("nothing")
    with pytest.raises(InputError, match="holds another run"):
        generate.main([TOY, "--out", str(run), "--n", "2"])
    with pytest.raises(InputError, match="holds another run"):
        generate.main([TOY, "--out", str(run), "--steps", "3"])
    with pytest.raises(InputError, match="no run in it"):
        judging.main([TOY, "--out", str(tmp_path / "none"), "--judge", "self"])
    with pytest.raises(InputError, match="nothing is judged"):
        figures.main(["--out", str(run)])
    with pytest.raises(InputError, match="must be self, or the address"):
        judging.main([TOY, "--out", str(run), "--judge", "gpt"])
    with pytest.raises(InputError, match="must be i/n"):
        generate.main([TOY, "--out", str(run), "--shard", "2/2"])
    next((run / "answers/green").glob("image_*.png")).write_bytes(b"nothing")
    with Unruly(obliging) as unruly, pytest.raises(InputError, match=r"not judged: green: .*image_01.png"):
        judge(run, unruly.url)
    assert len(list((run / "judged/judge-1").glob("[!jm]*.json"))) == 3


def test_percentiles():
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0 and percentile([0.0, 10.0], 2.5) == 0.25


def test_readme_shows_a_benchmark_that_runs(answered, tmp_path):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Evaluation") :]
    code = re.search(r"```python\n(.*?)```", section, re.S)[1]
    file = tmp_path / "mine.py"
    file.write_text(code)
    assert len(code.splitlines()) <= 30
    out = tmp_path / "e"
    generate.main([str(file), "--out", str(out), "--steps", "2"])
    judging.main([str(file), "--out", str(out), "--judge", "self", "--device", "cpu"])
    assert report(out)["judges"][0]["items"] == 2
    for words in ("evaluate generate", "evaluate judge", "evaluate report"):
        assert f"python -m {words}" in section
    assert os.path.exists(out / "report.html")
