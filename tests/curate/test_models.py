"""Asking models: many at once, what is kept, what a failing server costs; and the project's own MLLM."""

import base64
import io
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("py3langid", reason="curate/requirements.txt is not installed")
from PIL import Image
from scripted import picture

from checkpoint import InputError
from curate import models
from curate.caption import Caption
from curate.dialogue import Dialogue
from curate.models import Model, abreast, keep, parsed, prompt, prompt_hashes, spent
from curate.page import Dropped, Page
from curate.reorder import Asked, Reorder
from curate.rewrite import Rewrite
from evaluate import server
from evaluate.judges import Unanswered

sys.path.insert(0, str(Path(__file__).parent.parent / "evaluate"))
from unruly import Unruly


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(server, "FIRST", 0.01)


def model(unruly: Unruly, calls: Path | None = None, **fields) -> Model:
    return Model(unruly.url, "judge-1", str(calls or ""), **{"timeout": 2.0, "tries": 3} | fields)


def red(size: tuple[int, int] = (30, 10)) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, "red").save(data, "PNG")
    return data.getvalue()


def echo(body: dict, n: int) -> str:
    return "echo: " + "".join(part.get("text", "") for part in body["messages"][0]["content"])


def test_an_answer_and_what_was_sent(tmp_path, monkeypatch):
    monkeypatch.setenv("MODEL_API_KEY", "secret")
    with Unruly(echo) as unruly:
        asked = ["What is it?", picture("a.png", red((3000, 1000)))]
        assert model(unruly, side=300).write(asked, max_tokens=7) == "echo: What is it?"
    body = unruly.asked[0]
    assert (body["model"], body["max_tokens"], body["temperature"], body["seed"]) == ("judge-1", 7, 0, 0)
    url = body["messages"][0]["content"][1]["image_url"]["url"]
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert image.size == (300, 100) and image.format == "JPEG"
    assert unruly.keys == {"Bearer secret"}


def test_a_second_run_asks_nothing(tmp_path):
    with Unruly(echo) as unruly:
        questions = [[f"Question {k}", picture("a.png", red())] for k in range(5)]
        first = model(unruly, tmp_path).write_all(questions)
        # Another description, and so another connection, as in a second run.
        again = model(unruly, tmp_path, at_once=3)
        assert again.write_all(questions) == first
        assert len(unruly.asked) == 5 and again.tally.kept == 5
        for other in ({"max_tokens": 9}, {"side": 64}):
            fields = {key: value for key, value in other.items() if key == "side"}
            model(unruly, tmp_path, **fields).write(questions[0], other.get("max_tokens", 1024))
        assert len(unruly.asked) == 7
    taken = spent(tmp_path)
    assert (taken.asked, taken.read, taken.written) == (7, 70, 14)
    assert taken.told((2.0, 1e6)) == "7 calls, 0 from disk, 70 + 14 tokens, cost 14.00"
    assert not list(tmp_path.rglob(".*"))


def test_questions_are_under_way_at_the_same_time():
    """As many as are allowed, from one thread and from several."""
    together = threading.Barrier(6, timeout=20)  # nobody is answered before six have asked
    now = set()
    most = []

    def answer(body: dict, n: int) -> str:
        now.add(n)
        most.append(len(now))
        together.wait()
        now.discard(n)
        return "yes"

    with Unruly(answer) as unruly:
        ask = model(unruly, at_once=6, timeout=20.0)
        ask.write_all([[f"{k}"] for k in range(12)])
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(lambda k: ask.write([f"from thread {k}"]), range(6)))
    assert len(most) == 18 and max(most) == 6


def test_threads_that_come_first_share_one_connection(tmp_path):
    """Each asks once, and all that was asked is in one tally."""
    with Unruly(echo) as unruly:
        ask = model(unruly, tmp_path)
        with ThreadPoolExecutor(16) as pool:
            answers = list(pool.map(lambda k: ask.write([f"{k % 4}"]), range(64)))
        assert answers == [f"echo: {k % 4}" for k in range(64)]
        assert len(unruly.asked) == 4 and ask.tally.asked == 4
    assert len(list((tmp_path / "spent").iterdir())) == 1


def test_the_same_question_at_the_same_time_is_asked_once(tmp_path):
    with Unruly(lambda body, n: f"{n}") as unruly:
        assert model(unruly, tmp_path).write_all([["same"]] * 8) == ["1"] * 8
        assert len(unruly.asked) == 1


def test_the_first_answer_of_several_processes_stays(tmp_path):
    file = tmp_path / "ab" / "x.json"
    keep(file, {"reply": "first"})
    keep(file, {"reply": "second"})
    assert json.loads(file.read_text()) == {"reply": "first"}
    assert [each.name for each in file.parent.iterdir()] == ["x.json"]


@pytest.mark.parametrize("trouble", [429, 503, b"no JSON", b"{}", b'{"choices": []}'])
def test_a_server_in_trouble_is_asked_again(trouble):
    with Unruly(lambda body, n: trouble if n < 3 else "at last") as unruly:
        assert model(unruly).write(["?"]) == "at last"
        assert len(unruly.asked) == 3


@pytest.mark.parametrize(
    "words, problem",
    [({"content": "half", "choice": {"finish_reason": "length"}}, "cut off: more than 1024 tokens"),
     ({"content": None, "refusal": "No."}, "refused: No."),
     ({"content": "", "choice": {"finish_reason": "content_filter"}}, "refused: filtered"),
     ((400, '{"error": {"code": "content_filter"}}'), "refused: "), ({"content": 7}, "not text: 7")],
)  # fmt: skip
def test_an_answer_that_is_none_is_kept_as_such(tmp_path, words, problem):
    with Unruly(lambda body, n: dict(words) if isinstance(words, dict) else words) as unruly:
        for _ in range(2):
            with pytest.raises(Unanswered, match=problem):
                model(unruly, tmp_path).write(["?"])
        assert len(unruly.asked) == 1


def test_a_bad_request_is_not_repeated_and_not_kept(tmp_path):
    with Unruly(lambda body, n: (400, '{"error": "too long"}') if n == 1 else "fine") as unruly:
        with pytest.raises(Unanswered):
            model(unruly, tmp_path).write(["?"])
        assert len(unruly.asked) == 1
        assert model(unruly, tmp_path).write(["?"]) == "fine"


def test_thoughts_and_fences_are_left_out():
    with Unruly(lambda body, n: '<think>{"a": 0}</think>```json\n{"a": 1}\n```') as unruly:
        assert model(unruly).write(["?"]) == '{"a": 1}'


def test_a_dead_server_is_left_alone_for_a_while(monkeypatch):
    """Its questions cost no more tries, until it is asked again and answers."""
    dead = True
    with Unruly(lambda body, n: 503 if dead else "back") as unruly:
        asks = model(unruly, at_once=1)
        answers = asks.write_all([[f"{k}"] for k in range(50)])
        assert all(isinstance(answer, Unanswered) for answer in answers)
        assert len(unruly.asked) == 3 * models.PATIENCE
        assert "silent 5 times in a row" in str(answers[-1])
        dead = False
        monkeypatch.setattr(models, "REST", 0.0)
        assert asks.write(["again"]) == "back"
        assert asks.write(["and again"]) == "back"


def test_nobody_there():
    gone = Model("http://127.0.0.1:9/v1", "m", tries=2, timeout=1)
    with pytest.raises(Unanswered, match="127.0.0.1:9"):
        gone.write(["?"])
    with pytest.raises(InputError, match="nobody answers there"):
        gone.check()


def test_what_is_asked_of_no_model_is_a_mistake():
    assert not Model()
    Model().check()
    with pytest.raises(InputError, match="no model"):
        Model().write(["?"])
    with pytest.raises(InputError, match="only --model self can choose"):
        Model("http://127.0.0.1:9/v1", "m").choose([["?"]], ["1", "2"])


def test_check_says_in_one_line_what_is_wrong():
    with Unruly(echo) as unruly:
        model(unruly).check()
        with pytest.raises(InputError, match="the server has judge-1"):
            Model(unruly.url, "other").check()
        with pytest.raises(InputError, match="--model-name is missing"):
            Model(unruly.url).check()
    with pytest.raises(InputError, match="must be none, self, or the address"):
        Model("gpt").check()


def test_a_wrong_key_or_name_ends_the_run():
    with Unruly(lambda body, n: (401, "{}")) as unruly, pytest.raises(InputError, match="MODEL_API_KEY"):
        model(unruly).write(["?"])


@pytest.mark.parametrize(
    "words, value",
    [('{"a": 1}', {"a": 1}), ('Well: {"a": 1}. That is it.', {"a": 1}), ("", None), ("none", None), ("{", None),
     ('{"a": 1} {"a": 2}', None), ("[1, 2]", [1, 2]), ("{" * 9999, None)],
)  # fmt: skip
def test_json_is_read_strictly(words, value):
    assert parsed(words) == value


def test_a_step_says_in_the_manifest_whom_it_asks():
    """Without what is of this machine: where the server is, and where answers are kept."""
    here = Model("http://localhost:1/v1", "Qwen", calls="/somewhere", at_once=7)
    there = Model("http://elsewhere:2/v1", "Qwen", calls="/other")
    for step in (Caption, Rewrite, Dialogue, lambda model: Reorder(Asked(model))):
        assert step(here).manifest() == step(there).manifest()
        assert step(here).at_once == 7 and "Qwen" in json.dumps(step(here).manifest())
    assert Caption().at_once == Reorder().at_once == 1
    assert Reorder().manifest() == {"placer": {"name": "Stay"}}
    assert Caption().manifest() == {"model": {"model": "none"}, "prompts": {"caption": prompt_hashes()["caption"]}}
    assert Model("self", mllm="runs/x").manifest() == {"model": "self", "weights": "runs/x"}


def test_prompts_are_files_with_hashes():
    assert prompt_hashes().keys() >= {"caption", "rewrite", "reorder", "place", "question"}
    assert "{title}" not in prompt("caption", title="A {kind} title", language="English")
    assert "A {kind} title" in prompt("caption", title="A {kind} title", language="English")


def test_pages_abreast_come_out_in_their_order():
    def step(page: Page) -> Page | Dropped:
        time.sleep(0.02 * (int(page.id) % 3))
        return page if int(page.id) % 2 else Dropped("even")

    pages = [Page(str(k)) for k in range(20)]
    out = list(abreast(step, iter(pages), 4))
    assert [page for page, _ in out] == pages
    assert [result for _, result in out] == [step(page) for page in pages]


def test_self_is_the_own_language_model(tmp_path, parts):
    """It writes, it chooses, and what it said is kept, too."""
    own = Model("self", calls=str(tmp_path), mllm=str(parts / "mllm"), device="cpu")
    asked = ["What is it?", picture("a.png", red((64, 64)))]
    written = own.write(asked, max_tokens=8)
    assert isinstance(written, str)
    chosen = own.choose([asked, ["Which?"]], ["0", "1", "12"])
    assert set(chosen) <= {"0", "1", "12"}
    assert own.tally.asked == 3
    assert own.write(asked, max_tokens=8) == written and own.choose([asked], ["0", "1", "12"]) == chosen[:1]
    assert own.tally.asked == 3 and own.tally.kept == 2
    with pytest.raises(Unanswered, match="no picture of a known format"):
        own.write(["?", picture("b.png", b"none")])
