"""What goes wrong around the three commands costs its own item at most, and is told in one line."""

import json
import re
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from checkpoint import InputError
from evaluate import figures, generate, judging
from evaluate import server as server_module
from evaluate.answers import Answers, items_of
from evaluate.benchmark import find
from unruly import Unruly

TOY = str(Path(__file__).parent / "toy.py")


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server_module, "FIRST", 0.01)


@pytest.fixture
def run(tmp_path) -> Path:
    """Answers to the toy benchmark by nobody: a picture of its own for each."""
    for number, request in enumerate(find(TOY).requests(None)):
        folder = tmp_path / "theirs" / request.id
        folder.mkdir(parents=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "a.png")
        parts = [{"type": "text", "text": f"{request.id}: "}, {"type": "image", "image": "a.png"}]
        (folder / "answer.json").write_text(json.dumps({"parts": parts}))
    return tmp_path / "e"


def judge(run: Path, url: str, *more: str) -> None:
    options = ["--judge", url, "--judge-model", "judge-1", "--timeout", "0.5", "--tries", "2"]
    judging.main([TOY, "--out", str(run), "--answers", str(run.parent / "theirs"), *options, *more])


def fine(body: dict, n: int) -> str:
    text = json.dumps(body)
    if '\\"style\\"' in text:
        return '{"reason": "so", "style": 4, "content": 6}'
    return '{"reason": "so", "score": 3}' if "JSON" in text else "yes"


def of_green(trouble):
    """The trouble for one item's text and fine answers for all else."""
    return lambda body, n: trouble if "green: " in json.dumps(body) else fine(body, n)


def rows(run: Path) -> dict[str, dict]:
    files = (run / "judged/judge-1").glob("[!j]*.json")
    return {file.stem: json.loads(file.read_text()) for file in files}


def report(run: Path) -> dict:
    figures.main(["--out", str(run), "--draws", "10"])
    return json.loads((run / "report.json").read_text())


HTML = (200, "<html>Good day</html>", {"Content-Type": "text/html"})
TROUBLES = {
    "busy": (429, "HTTP 429"),
    "failing": (500, "HTTP 500"),
    "hanging": ("hang", "Timeout"),
    "dripping": ("drip", "not at its end after 0.5 s"),
    "cut off": (b'{"choices": [{"mess', "no JSON"),
    "closing half way": ("half", "peer closed"),
    "a list": (b"[]", "no JSON object"),
    "wrong types": (b'{"choices": 5}', "no chat completion"),
    "wrong types within": (b'{"choices": [{"message": "yes"}]}', "no chat completion"),
    "an error that says it is none": (b'{"error": {"message": "overloaded"}}', "no chat completion.*overloaded"),
    "a page": (HTML, "no JSON.*Good day"),
    "endless": (b"x" * 17_000_000, "more than 16,000,000 bytes"),
    "redirect": ((307, "", {"Location": "http://elsewhere.example/v1"}), "HTTP 307: it sends on to http://elsewhere"),
    "gone": ((404, "no such model"), "HTTP 404: no such model: correct the address"),
    "too long": ((400, "maximum context length is 9 tokens"), "HTTP 400: maximum context"),
}


@pytest.mark.parametrize("trouble, line", TROUBLES.values(), ids=TROUBLES)
def test_a_misbehaving_server_costs_the_item_in_question_alone_and_one_line(run, trouble, line):
    with Unruly(of_green(trouble)) as unruly:
        with pytest.raises(InputError, match=f"^not judged: green: .*{line}.*; what is judged is kept") as told:
            judge(run, unruly.url)
        assert len(str(told.value).splitlines()) == 1 and len(str(told.value)) < 500
        assert rows(run).keys() == {"red", "blue", "yellow"}
        unruly.answer = fine
        judge(run, unruly.url)
    assert rows(run).keys() == {"red", "blue", "yellow", "green"}


WORDS = {
    "a number as a word": '{"reason": "so", "score": "3"}',
    "true": '{"score": true}',
    "off the scale": '{"score": 9}',
    "a list": {"content": [{"type": "text", "text": "3"}]},
    "5 MB of text": "3 " * 2_500_000,
}


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_words_without_a_score_are_counted_and_cost_nothing_else(run, words):
    with Unruly(of_green(words)) as unruly:
        judge(run, unruly.url, "--timeout", "20")
    (judged,) = report(run)["judges"]
    assert judged["counts"]["told"] == {"judged": 3, "refused": 0, "unparsable": 1, "missing": 0}
    assert judged["counts"]["colour"]["judged"] == 4 and (run / "report.html").stat().st_size < 200_000


def test_a_server_that_asks_for_patience_gets_it(run):
    trouble = (429, "slowly", {"Retry-After": "0.4"})
    with Unruly(lambda body, n: trouble if n == 1 else fine(body, n)) as unruly:
        began = time.monotonic()
        judge(run, unruly.url, "--at-once", "1")
        assert time.monotonic() - began >= 0.4
    assert len(rows(run)) == 4


def test_one_refused_question_does_not_change_how_the_others_are_asked(run):
    """Else the scores would hang on the order of the items."""
    with Unruly(lambda body, n: (400, "picture too small") if "green house?" in str(body) else fine(body, n)) as unruly:
        with pytest.raises(InputError, match="green: .*picture too small"):
            judge(run, unruly.url, "--at-once", "1")
        yes = [body for body in unruly.asked if "yes or no" in str(body) and "green house?" not in str(body)]
    assert len(yes) == 3 and all("logprobs" in body for body in yes)


def test_a_server_without_options_may_be_asked_by_many_at_once(run):
    """All eight have sent their options before the first has learnt that there are none."""

    def answer(body, n):
        time.sleep(0.1)
        return (400, "unknown field") if "logprobs" in body or "response_format" in body else fine(body, n)

    with Unruly(answer) as unruly:
        judge(run, unruly.url, "--at-once", "8", "--tries", "1")
    assert len(rows(run)) == 4


def test_another_models_name_stands_in_the_report(run):
    with Unruly(fine, model="judge-1-mini") as unruly:
        judge(run, unruly.url)
    (judged,) = report(run)["judges"]
    assert judged["judge"] == "judge-1" and judged["answered as"] == ["judge-1-mini"]
    assert "* answered as: judge-1-mini" in (run / "report.md").read_text()


def test_a_server_that_does_not_list_its_model_is_asked_for_it(run):
    """`transformers serve` lists what lies in the Hub's cache, and not the folder that it serves."""
    with Unruly(fine, model="judge-7@main") as unruly:
        server_module.Server(unruly.url, "judge-7")
        with pytest.raises(InputError, match="judge-8: the server has judge-1"):
            server_module.Server(unruly.url, "judge-8")


def test_a_judge_that_dies_is_not_tried_with_every_item(run, monkeypatch):
    monkeypatch.setattr(judging, "PATIENCE", 2)
    with Unruly(lambda body, n: 500) as unruly:
        with pytest.raises(InputError, match="not judged: red: .*HTTP 500.*and 1 more"):
            judge(run, unruly.url, "--at-once", "1")
        assert len(unruly.asked) == 4


# -------------------------------------------------------------------------------------------------------------- bad input


def test_a_broken_picture_in_an_answer_is_told_in_the_report_too(run):
    """The other items have their figures."""
    (run.parent / "theirs/green/a.png").write_bytes(b"nothing")
    with Unruly(fine) as unruly, pytest.raises(InputError, match=r"not judged: green: .*a\.png"):
        judge(run, unruly.url)
    (judged,) = report(run)["judges"]
    assert (judged["items"], judged["of"]) == (3, 4)


PICTURED = '''
from pathlib import Path
from evaluate.benchmark import Request, floor, mean
NAME, TITLE, SOURCE, PUBLISHED = "pictured", "Two pictures", {"id": "here", "revision": "1", "licence": "MIT"}, []
def requests(items):
    for name in ("whole", "broken"):
        parts = [{"type": "image", "image": str(items / f"{name}.png")}, {"type": "text", "text": "Make it blue."}]
        yield Request(name, [{"role": "user", "content": parts}], {})
def score(request, answer, judge):
    return {"seen": judge.yes("Is it blue?", answer.pictures[0]) if answer.pictures else floor(0.0)}
def aggregate(rows):
    return {"seen": mean(rows, "seen")}
'''


def test_a_broken_picture_in_an_item_costs_that_item_alone(tmp_path):
    (tmp_path / "pictured.py").write_text(PICTURED)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.png")
    (tmp_path / "broken.png").write_bytes(b"nothing")
    words = [str(tmp_path / "pictured.py"), "--out", str(tmp_path / "e"), "--items", str(tmp_path), "--steps", "1"]
    with pytest.raises(InputError, match=r"^not answered: broken: .*broken\.png.*; what is answered is kept"):
        generate.main(words)
    assert [file.parent.name for file in (tmp_path / "e/answers").glob("*/answer.json")] == ["whole"]
    # The picture mended, the same command answers what is missing, and is no other run.
    Image.new("RGB", (64, 64), "green").save(tmp_path / "broken.png")
    generate.main(words)
    assert len(list((tmp_path / "e/answers").glob("*/answer.json"))) == 2


def test_what_a_killed_process_left_is_found_and_nobody_elses(tmp_path):
    for name in (".a-17", ".a-2-18", ".a[1]-19", ".a", "a", ".b-20", ".a-x"):
        (tmp_path / name).mkdir()
    assert {left.name for left in generate.unfinished(tmp_path, {"a", "a[1]"})} == {".a-17", ".a[1]-19"}


def test_a_missing_benchmark_file_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"mine\.py: no such benchmark; there are sketchbook, comm"):
        find(str(tmp_path / "mine.py"))
    (tmp_path / "mine.py").write_text("NAME = 'mine'")
    with pytest.raises(InputError, match="no benchmark, it lacks TITLE, SOURCE"):
        find(str(tmp_path / "mine.py"))
    for text in ("def", "import nothing_of_this_name", "1 / 0"):
        (tmp_path / "mine.py").write_text(text)
        with pytest.raises(InputError, match=r"mine\.py: cannot be read as a benchmark \((Syntax|ModuleNotFound|ZeroDivision)"):
            find(str(tmp_path / "mine.py"))


@pytest.mark.parametrize("name, file", [("geneval", "evaluation_metadata.jsonl"), ("imgedit", "basic_edit.json"),
                                        ("dpg", "dpg_bench.csv"), ("opening", "test_data.jsonl")])  # fmt: skip
def test_missing_items_are_named_with_their_source_and_licence(name, file, tmp_path):
    with pytest.raises(InputError, match=rf"--items: .*{file} is needed, see .* at .* \("):
        items_of(find(name), None, None)
    with pytest.raises(InputError, match=rf"{file}: no such file; it comes from"):
        items_of(find(name), str(tmp_path), None)
    with pytest.raises(InputError, match="nowhere: does not exist"):
        items_of(find(name), str(tmp_path / "nowhere"), None)


@pytest.mark.parametrize("name, file, text", [
    ("geneval", "evaluation_metadata.jsonl", '{"tag": "x"}'), ("imgedit", "basic_edit.json", '{"1": {"id": "a.png"}}'),
    ("imgedit", "basic_edit.json", "[1]"), ("dpg", "dpg_bench.csv", "item_id,text\na,b\n"),
    ("opening", "test_data.jsonl", '{"total_uid": 1}'), ("interleavedbench", "interleaved_bench.json", '[{"id": "a"}]'),
    ("gedit", "gedit_edit.json", '{"1": []}'),
])  # fmt: skip
def test_items_of_another_form_are_one_line_with_the_item(name, file, text, tmp_path):
    (tmp_path / file).write_text(text)
    with pytest.raises(InputError, match=rf"{name}: item 1 of .* is not in the form that it reads \(\w+Error: "):
        items_of(find(name), str(tmp_path), None)


def test_an_answer_folder_of_another_run_is_refused_and_left_as_it_is(run, tmp_path):
    with Unruly(fine) as unruly:
        judge(run, unruly.url)
        before = {file: file.read_bytes() for file in run.rglob("*.json")}
        with pytest.raises(InputError, match="holds another run .answers .*choose another --out"):
            judge(run, unruly.url, "--answers", str(tmp_path))
        with pytest.raises(InputError, match="holds another run .benchmark"):
            judging.main(["howto500", "--out", str(run), "--judge", unruly.url, "--judge-model", "judge-1"])
    assert {file: file.read_bytes() for file in run.rglob("*.json")} == before


def test_a_broken_answer_file_is_one_line_with_the_item(run):
    (run.parent / "theirs/green/answer.json").write_text('{"parts": [')
    (run.parent / "theirs/blue/answer.json").write_text('{"parts": 3}')
    with Unruly(fine) as unruly, pytest.raises(InputError, match=r"not judged: (blue|green): .*answer\.json.*and 1 more"):
        judge(run, unruly.url)
    assert rows(run).keys() == {"red", "yellow"}


def test_answers_that_are_not_there_are_one_line(run, tmp_path):
    with pytest.raises(InputError, match="no answers there"):
        Answers(tmp_path / "nothing", [])
    shutil.rmtree(run.parent / "theirs")
    with Unruly(fine) as unruly, pytest.raises(InputError, match="theirs: no answers there"):
        judge(run, unruly.url)


def test_a_judge_that_is_not_there_costs_nothing(run):
    with pytest.raises(InputError, match=re.escape("--judge http://127.0.0.1:9/v1: nobody answers there (ConnectError")):
        judge(run, "http://127.0.0.1:9/v1")
    with Unruly(fine) as unruly:
        judge(run, unruly.url)
    assert len(rows(run)) == 4
