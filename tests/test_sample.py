"""The command line from prompt to files, what a page holds, and how every mistake is told in one line."""

import base64
import io
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_pipeline import BOV, END, PLAIN, TWO, make_duo, picture, same

import distributed
import kernels
import ops
import pages.answer
import sample
import training
from checkpoint import InputError
from evaluate import report
from pages.answer import escape_markdown
from pipeline import STOPS, derive
from sample import main, printable, slug

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    duo = make_duo()
    duo.folder = tmp_path_factory.mktemp("checkpoint")
    duo.save_pretrained(duo.folder)
    return duo


@pytest.fixture
def duo(parts, monkeypatch):
    """Loaded in place of any checkpoint; `duo.say(script, ...)` are its answers in the order in which they begin."""
    scripts, begun, loaded = [], [], []

    def say(*texts):
        scripts[:] = [[t for x in script for t in parts.tokenizer.encode_with_control(x)] for script in texts]
        begun.clear()

    def choose(logits, settings, generator):
        if not any(g is generator for g in begun):
            begun.append(generator)
        return scripts[next(i for i, g in enumerate(begun) if g is generator)].pop(0)

    def load(ckpt, **options):
        loaded.append((ckpt, options))
        print("Part: 3/3 tensors")
        return parts

    monkeypatch.setattr(sample.DuoGen, "from_pretrained", load)
    monkeypatch.setattr(parts, "choose", choose)
    monkeypatch.setattr(parts, "say", say, raising=False)
    monkeypatch.setattr(parts, "loaded", loaded, raising=False)
    monkeypatch.setattr(parts, "sources", {"ckpt": "here", "dit": "nvidia/x@abc"})
    return parts


@pytest.fixture(autouse=True)
def attention():
    """--attention is a choice for the whole process: undone here."""
    yield
    ops.set_backend("auto")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working directory with two pictures."""
    monkeypatch.chdir(tmp_path)
    picture(1).save("a.png")
    picture(2, (48, 32)).save("b.jpg")
    return tmp_path


class Page(HTMLParser):
    """The text, tags and attributes of a page as a browser would have them."""

    def __init__(self, source: str):
        super().__init__()
        self.tags, self.texts, self.images = [], [], []
        self.feed(source)
        self.text = "".join(self.texts)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data):
        self.texts.append(data)


# -------------------------------------------------------------------------------------------------------------- one answer


def test_an_answer_becomes_a_folder(duo, here, capsys):
    duo.say(TWO)
    flags = "--image a.png --image b.jpg --seed 7 --steps 2".split()
    assert main(["--prompt", "How do I draw a House?!", *flags]) == 0
    out, err = capsys.readouterr()
    folder = here / "out" / "how-do-i-draw-a-house"
    names = ["answer.json", "answer.md", "image_01.png", "image_02.png", "index.html", "input_01.png", "input_02.png"]
    assert sorted(f.name for f in folder.iterdir()) == names
    assert os.listdir(here / "out") == [folder.name]
    lines = out.strip().split("\n")
    assert lines[0] == TWO[0] and lines[1].startswith("[picture 1: 32 x 48, ") and lines[2] == TWO[2]
    assert lines[-1] == "out/how-do-i-draw-a-house/index.html"
    assert "tensors" not in out and err == "Part: 3/3 tensors\n"  # and no bar, for nobody looks

    answer = json.loads((folder / "answer.json").read_text())
    assert answer["format"] == 1 and answer["prompt"] == "How do I draw a House?!" and answer["stop"] == "end"
    assert answer["user_images"] == ["input_01.png", "input_02.png"]
    assert [p["type"] for p in answer["messages"][0]["content"]] == ["image", "image", "text"]
    assert [p.get("text", p.get("image")) for p in answer["parts"]] == [TWO[0], "image_01.png", TWO[2], "image_02.png", TWO[4]]
    first = answer["parts"][1]
    assert (first["width"], first["height"], first["seed"]) == (32, 48, derive(7, 0, 0))
    assert first["context_tokens"]["positive"] > first["context_tokens"]["negative"] > 0
    assert set(answer["settings"]) == set(sample.Settings.__dataclass_fields__)
    assert (answer["settings"]["steps"], answer["settings"]["guidance"], answer["settings"]["height"]) == (2, 3.0, 48)
    assert answer["seed"] == 7 and answer["sources"] == {"ckpt": "here", "dit": "nvidia/x@abc"}
    assert answer["tokens"]["written"] > 20 and answer["tokens"]["prompt"] > 20
    assert set(answer["seconds"]) == {"load", "text", "paint", "total"} and answer["versions"]["torch"] == torch.__version__
    assert answer["device"] == "cpu" and answer["dtype"] == "float32"

    saved = Image.open(folder / "image_01.png")
    assert saved.size == (32, 48) and saved.mode == "RGB"
    assert Image.open(folder / "input_02.png").size == (32, 48)
    text = (folder / "answer.md").read_text()
    assert [m for m in re.findall(r"\]\((.*?)\)", text)] == ["input_01.png", "input_02.png", "image_01.png", "image_02.png"]
    assert all((folder / m).exists() for m in re.findall(r"\]\((.*?)\)", text))


def test_the_page_is_whole_and_in_order(duo, here):
    duo.say(TWO)
    main(["--prompt", "How?", "--image", "a.png"])
    source = (here / "out/how/index.html").read_text()
    found = Page(source)
    assert [tag for tag, _ in found.tags if tag in ("script", "link", "iframe")] == []
    assert not re.search(r"(src|href)=.?(?!data:)", source.replace('src="data:', "")) and "http" not in source
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in found.tags
    assert "prefers-color-scheme: dark" in source
    assert [i["alt"] for i in found.images] == ["user's picture 1", "picture 1", "picture 2"]
    for attrs in found.images:
        with Image.open(io.BytesIO(base64.b64decode(attrs["src"].partition(",")[2]))) as image:
            image.load()
            assert image.width / image.height == int(attrs["width"]) / int(attrs["height"])
    order = [source.index(x) for x in ("How?</p>", TWO[0], 'alt="picture 1"', TWO[2], 'alt="picture 2"', TWO[4], "Seed 0")]
    assert order == sorted(order)
    assert "guidance" in found.text and "nvidia/x@abc" in found.text


NASTY = '<script>alert("1 & 2")</script> <img src=x onerror=y> </style> &amp; *b* _i_ `c` [l](http://e) # h\n# no title\n1. one'


def test_text_stays_text(duo, here, capsys):
    duo.say([NASTY + "\x1b[31m", BOV, NASTY, END])
    assert main(["--prompt", NASTY, "--name", "nasty", "--max-tokens", "900"]) == 0
    folder = here / "out/nasty"
    found = Page((folder / "index.html").read_text())
    assert not {"script", "a"} & {tag for tag, _ in found.tags} and len(found.images) == 1
    assert all(set(attrs) <= {"src", "width", "height", "alt"} for attrs in found.images)
    assert found.text.count('<script>alert("1 & 2")</script>') == 4  # title, question, twice in the answer
    markdown = (folder / "answer.md").read_text()
    theirs = markdown.replace("**user:**", "").replace("![picture 1](image_01.png)", "")
    assert not re.search(r"(?<!\\)[<`*_\[&]|(?m:^(> )?#)", theirs), theirs
    assert "\x1b" not in capsys.readouterr().out
    assert json.loads((folder / "answer.json").read_text())["prompt"] == NASTY


def test_escaped_markdown_shows_the_same_text():
    undo = re.compile(r"\\([\\`*_\[\]<>~|$&#+=.)-])")
    for text in ("a*b", "1. x", "- y\n- z", "# t", "a\nb", "1) q", "-1 is 5-6=-1", "a\\b", "==", "x <b> & y"):
        escaped = escape_markdown(text)
        assert undo.sub(r"\1", escaped.replace("\\\n", "\n")) == text
    assert escape_markdown("plain text, 3-4. ok") == "plain text, 3-4. ok"
    assert escape_markdown("a\nb\n\nc") == "a\\\nb\n\nc"


def test_terminal_text_is_harmless():
    assert printable("a\x1b[2J\x07\r\nb\tc\x9b é 漢") == "a[2J\nb\tc é 漢"
    assert printable("\u202eevil\u202c \u2066x\u2069 a\u200db") == "evil x a\u200db"


def test_control_characters_reach_no_terminal_page_or_file(duo, here, capsys):
    """In the JSON file they are spelt out, and read back as they were."""
    evil = "a\x1b[31m\x00\x07\x9b\u202eb\u2066c\u2069"
    duo.say([evil, END], [evil, END])
    assert main(["--prompt", evil, "--system", evil, "--name", "one", "--max-tokens", "900"]) == 0
    assert main(["--prompts", write("p.jsonl", {"prompt": evil, "name": "two", "system": evil}), "--max-tokens", "900"]) == 0
    files = [f for f in (here / "out").rglob("*") if f.suffix in (".html", ".md", ".json")]
    assert len(files) == 7
    for text in (*capsys.readouterr(), *(f.read_text() for f in files)):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)
    for folder in ("one", "p/two"):
        answer = json.loads((here / "out" / folder / "answer.json").read_text())
        assert answer["prompt"] == answer["settings"]["system"] == answer["parts"][0]["text"] == evil


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("How do I draw a house?", "how-do-i-draw-a-house"), ("../../etc/passwd", "etc-passwd"), ("...", "answer"),
        ("漢字 ok", "漢字-ok"), ("word " * 40, "word-word-word-word-word-word-word-word-word"), ("a" * 300, "answer"),
        ("Con", "con-answer"), ("NUL?", "nul-answer"), ("index.html", "index-html"), ("console", "console"),
    ],
)  # fmt: skip
def test_names_from_prompts(prompt, name):
    assert slug(prompt) == name


def test_an_existing_folder_is_never_touched(duo, here):
    for expected in ("how", "how-2", "how-3"):
        duo.say(PLAIN)
        assert main(["--prompt", "How?"]) == 0
        assert (here / "out" / expected / "index.html").exists()
    assert sorted(os.listdir(here / "out")) == ["how", "how-2", "how-3"]


def test_the_text_streams(duo, here, capsys):
    """Before a picture is painted, the words in front of it are out."""
    duo.say(TWO)
    answer = duo.answer("x")
    seen = []
    paint = duo.paint
    duo.paint = lambda *a: seen.append(capsys.readouterr().out) or paint(*a)
    try:
        sample.show(duo, answer)
    finally:
        del duo.paint
    assert seen[0] == TWO[0] + "\n" and TWO[2] in seen[1]


def test_limits_are_told(duo, here, capsys):
    duo.say(TWO)
    assert main(["--prompt", "How?", "--max-images", "1"]) == 0
    assert f"[ends here: {STOPS['max_images']}]" in capsys.readouterr().out
    assert STOPS["max_images"] in Page((here / "out/how/index.html").read_text()).text
    assert json.loads((here / "out/how/answer.json").read_text())["stop"] == "max_images"


def test_ctrl_c_keeps_what_is_there(duo, here, monkeypatch, capsys):
    duo.say(TWO)
    paint = duo.paint

    def interrupted(requests, progress):
        if requests[0].number == 1:
            raise KeyboardInterrupt
        return paint(requests, progress)

    monkeypatch.setattr(duo, "paint", interrupted)
    assert main(["--prompt", "How?"]) == 130
    answer = json.loads((here / "out/how/answer.json").read_text())
    assert answer["stop"] == "interrupted" and len(answer["parts"]) == 3
    assert "interrupted" in (here / "out/how/index.html").read_text() and "Traceback" not in capsys.readouterr().err


def test_ctrl_c_before_the_first_word_leaves_no_page(duo, here, monkeypatch, capsys):
    monkeypatch.setattr(duo, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--prompt", "How?"]) == 130
    assert os.listdir(here / "out") == [] and err_line(capsys) == "interrupted"


def test_a_full_disk_leaves_nothing_half(duo, here, monkeypatch, capsys):
    duo.say(TWO)
    monkeypatch.setattr(pages.answer, "markdown", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert main(["--prompt", "How?"]) == 2
    assert "No space left" in capsys.readouterr().err and os.listdir(here / "out") == []


def test_flags_reach_the_settings(duo, here):
    duo.say(["x", BOV, END])
    argv = "--num_inference_steps 1 --guidance_scale=2 --sampler euler --height 32 --width=64 --max_tokens 50 --top-p 0.9"
    argv += " --seed 3 --temperature 0.5 --negative empty --no_use-condition-images --system Hm"
    argv += " --revision v1 --ckpt o/n --dit o/d/t@r"
    assert main(["--prompt", "x", *argv.split()]) == 0
    s = json.loads((here / "out/x/answer.json").read_text())["settings"]
    expected = dict(steps=1, guidance=2.0, sampler="euler", height=32, width=64, max_tokens=50, top_p=0.9, seed=3)
    expected |= dict(temperature=0.5, negative="empty", use_condition_images=False, system="Hm")
    expected |= dict(max_images=4)  # the checkpoint's
    assert {k: s[k] for k in expected} == expected
    ckpt, options = duo.loaded[0]
    assert ckpt == "o/n" and options["dit"] == "o/d/t@r" and options["mllm"] is None and options["revision"] == "v1"
    assert Image.open(here / "out/x/image_01.png").size == (64, 32)


def test_the_choice_of_attention_changes_no_result(duo, here, monkeypatch):
    """--attention reaches every call of it, and logits and picture stay what they were."""
    seen, ran = [], {"triton": 0, "sdpa": 0}
    for name, module, function in (("triton", kernels, "attention"), ("sdpa", ops, "_packed_attention")):
        real = getattr(module, function)
        monkeypatch.setattr(module, function, lambda *a, n=name, f=real: ran.update({n: ran[n] + 1}) or f(*a))
    choose = duo.choose
    monkeypatch.setattr(duo, "choose", lambda logits, *rest: seen.append(logits) or choose(logits, *rest))
    small = "--steps 1 --height 16 --width 16 --guidance 1".split()
    for name in ("sdpa", "triton"):
        duo.say(["", BOV, END])
        assert main(["--prompt", "x", "--name", name, "--system", "", "--attention", name, *small]) == 0
        assert ops.get_backend() == name
    assert ran["triton"] > 10 and ran["sdpa"] == ran["triton"] + 2  # the VAE has one of its own, and always PyTorch's
    one, other = torch.stack(seen[: len(seen) // 2]), torch.stack(seen[len(seen) // 2 :])
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    images = [Image.open(here / "out" / name / "image_01.png") for name in ("sdpa", "triton")]
    assert same(*images, levels=1)


def test_an_attention_that_cannot_be_is_told_before_anything_is_loaded(here, monkeypatch, capsys):
    monkeypatch.setattr(sample.DuoGen, "from_pretrained", None)
    monkeypatch.setattr(kernels, "INTERPRETED", False)  # as it is outside the tests
    check_one_line(main(["--prompt", "x", "--attention", "triton", "--device", "cpu"]), capsys, "need an NVIDIA GPU")
    with pytest.raises(InputError, match="'flash' is none of"):
        report.main(["sketchbook", "--attention", "flash"])
    with pytest.raises(InputError, match="'flash' is none of"):
        training.Run(training.TrainConfig(attention="flash"), distributed.Ranks("cpu"), torch.nn.Linear(2, 2), None)


def test_without_a_prompt_there_is_a_house(duo, here):
    duo.say(PLAIN)
    assert main([]) == 0 and (here / "out" / slug(sample.PROMPT)).is_dir()


# ------------------------------------------------------------------------------------------------------------ many answers


def write(name: str, *records) -> str:
    Path(name).write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records), encoding="utf-8")
    return name


def test_a_file_of_prompts(duo, here, capsys):
    (here / "sub").mkdir()
    picture(5, (32, 64)).save("sub/c.png")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    write(
        "sub/my prompts.jsonl",
        {"prompt": "One <b>", "seed": 5},
        "",
        {"prompt": "Two", "images": ["c.png"], "name": "second", "max_images": 1},
        {"messages": [*talk, {"role": "user", "content": "One <b>"}, *talk[1:]], "steps": 1, "kind": "one"},
    )
    duo.say(TWO, TWO[:4], PLAIN)
    assert main(["--prompts", "sub/my prompts.jsonl", "--steps", "2"]) == 0
    out = here / "out/my-prompts"
    assert sorted(os.listdir(out)) == ["index.html", "one-b", "one-b-2", "second"]
    answers = [json.loads((out / n / "answer.json").read_text()) for n in ("one-b", "second", "one-b-2")]
    assert [a["seed"] for a in answers] == [5, 0, 0] and [a["settings"]["steps"] for a in answers] == [2, 2, 1]
    assert [a["stop"] for a in answers] == ["end", "max_images", "end"]
    assert len(answers[2]["messages"]) == 3 and answers[1]["user_images"] == ["input_01.png"]
    assert answers[1]["parts"][1]["width"] == 64
    overview = Page((out / "index.html").read_text())
    links = [a["href"] for tag, a in overview.tags if tag == "a"]
    assert links == ["one-b/index.html", "second/index.html", "one-b-2/index.html"]
    assert all((out / i["src"]).exists() for i in overview.images) and len(overview.images) == 3
    assert "One <b>" in overview.text and "Just words." in overview.text and "3 of 3" in overview.text
    text = capsys.readouterr().out
    assert "[2/3] Two" in text and text.strip().endswith("3 answers: out/my-prompts/index.html")


def test_an_answer_of_a_file_is_that_of_its_prompt_alone(parts, here, monkeypatch):
    monkeypatch.setattr(sample.DuoGen, "from_pretrained", lambda *_, **__: parts)
    hot = ["--temperature", "1", "--max-tokens", "12", "--max-images", "1", "--seed", "4"]
    write("p.jsonl", {"prompt": "First"}, {"prompt": "Draw it"})
    assert main(["--prompts", "p.jsonl", *hot]) == 0
    assert main(["--prompt", "Draw it", *hot]) == 0
    assert main(["--prompt", "Draw it", *hot[:-1], "5"]) == 0
    a, b, c = (json.loads((here / "out" / f / "answer.json").read_text()) for f in ("p/draw-it", "draw-it", "draw-it-2"))
    texts = [[p.get("text") for p in x["parts"]] for x in (a, b, c)]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("batch, saved", [("1", ["one", "two"]), ("2", ["one", "three", "two"])])
def test_ctrl_c_ends_a_file_of_prompts(duo, here, monkeypatch, capsys, batch, saved):
    """Finished ones stay, those at work are saved as far as they are, others have not begun."""
    write("p.jsonl", *({"prompt": p} for p in ("One", "Two", "Three", "Four")))
    duo.say(PLAIN, TWO, TWO, TWO)
    monkeypatch.setattr(duo, "paint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--prompts", "p.jsonl", "--batch", batch]) == 130
    assert sorted(os.listdir(here / "out/p")) == ["index.html", *saved]
    assert f"{len(saved)} of 4" in Page((here / "out/p/index.html").read_text()).text
    stops = [json.loads((here / "out/p" / name / "answer.json").read_text())["stop"] for name in saved]
    assert stops == ["end", *["interrupted"] * (len(saved) - 1)]
    out, err = capsys.readouterr()
    assert "Traceback" not in err and out.count("[ends here: it was interrupted]") == len(saved) - 1


def test_ctrl_c_before_the_first_word_leaves_nothing(duo, here, monkeypatch):
    monkeypatch.setattr(duo, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert main(["--prompts", write("p.jsonl", {"prompt": "One"}, {"prompt": "Two"})]) == 130
    assert os.listdir(here / "out") == []


def test_answers_of_a_file_appear_as_they_are_finished(duo, here, capsys):
    """A short one overtakes a long one; names, numbers and the overview follow the file."""
    write("p.jsonl", {"prompt": "Draw"}, {"prompt": "Draw", "name": "draw-2"}, {"prompt": "Draw"})
    duo.say(TWO, PLAIN, ["", BOV, END])
    assert main(["--prompts", "p.jsonl", "--batch", "3"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"\[(\d)/3\] Draw|out/p/(.*)/index", out) == [
        ("2", ""), ("", "draw-2"), ("3", ""), ("", "draw-3"), ("1", ""), ("", "draw")
    ]  # fmt: skip
    lines = out[out.index("[1/3]") :].split("\n")
    assert lines[2] == TWO[0] and lines[3].startswith("[picture 1: 48 x 32, ") and lines[4] == TWO[2]
    overview = Page((here / "out/p/index.html").read_text())
    assert [a["href"].split("/")[0] for tag, a in overview.tags if tag == "a"] == ["draw", "draw-2", "draw-3"]


def test_pictures_of_a_prompt_obey_the_rules_of_records(duo, here):
    """Relative to the file; links are followed, and a data URL is a picture. On the command line any path will do."""
    (here / "sub").mkdir()
    (here / "elsewhere").mkdir()
    picture(5, (32, 64)).save("elsewhere/c.png")
    (here / "sub/linked").symlink_to(here / "elsewhere")
    url = "data:image/png;base64," + base64.b64encode(Path("a.png").read_bytes()).decode()
    write("sub/p.jsonl", {"prompt": "One", "images": ["linked/c.png", url, "x/../linked/c.png"]})
    duo.say(PLAIN, PLAIN)
    assert main(["--prompts", "sub/p.jsonl"]) == 0
    sizes = [Image.open(here / f"out/p/one/input_0{k}.png").size for k in (1, 2, 3)]
    assert sizes == [(64, 32), Image.open("a.png").size, (64, 32)]
    assert main(["--prompt", "Two", "--image", "sub/../a.png", "--image", str(here / "b.jpg"), "--image", url]) == 0
    assert len(list((here / "out/two").glob("input_*"))) == 3


def test_prompts_from_standard_input(duo, here, monkeypatch, capsys):
    lines = ['{"prompt": "One", "images": ["a.png"]}', "", "a red house", '{"prompt": "Two"}']
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(lines).encode())))
    duo.say(PLAIN, PLAIN)
    assert main(["--prompts", "-"]) == 1
    assert sorted(os.listdir(here / "out/prompts")) == ["index.html", "one", "two"]
    assert (here / "out/prompts/one/input_01.png").exists()
    assert 'error: stdin:3: not valid JSON' in (err := capsys.readouterr().err) and '; a line is {"prompt": "..."}' in err
    monkeypatch.setattr(sys, "stdin", None)  # as after <&-
    assert main(["--prompts", "-"]) == 2 and err_line(capsys) == "error: stdin: no prompt in it"


# ---------------------------------------------------------------------------------------------------------- continued


def times(folder: Path) -> dict[str, int]:
    return {f.parent.name: f.stat().st_mtime_ns for f in folder.glob("*/answer.json")}


def test_the_same_command_again_makes_only_what_is_missing(duo, here, monkeypatch, capsys):
    lines = [{"prompt": "One"}, {"prompt": "Two", "images": ["a.png"]}, {"prompt": "One"}, {"prompt": "Three"}]
    command = ["--prompts", write("p.jsonl", *lines[:3])]
    duo.say(PLAIN, TWO, PLAIN)
    assert main(command) == 0
    before = times(here / "out/p")
    assert set(before) == {"one", "two", "one-2"} and "already" not in capsys.readouterr().err
    # All are there: nothing is read, nothing is touched.
    with monkeypatch.context() as patch:
        patch.setattr(duo, "read", None)
        assert main(command) == 0
    out, err = capsys.readouterr()
    assert times(here / "out/p") == before and "3 of 3 are there already: out/p\n" in err
    assert out == "3 answers: out/p/index.html\n"
    # One more, one that lost a picture, and what a killed run left half-written.
    write("p.jsonl", *lines)
    (here / "out/p/two/image_01.png").unlink()
    (here / "out/p/.three-1").mkdir()
    (here / "out/p/.three-1/answer.json").write_text("{}")
    duo.say(TWO, PLAIN)
    assert main(command) == 0
    after = times(here / "out/p")
    assert "2 of 4 are there already" in capsys.readouterr().err and os.listdir(here / "out") == ["p"]
    assert {k: after[k] for k in before} == before and set(after) - set(before) == {"two-2", "three", ".three-1"}
    overview = Page((here / "out/p/index.html").read_text())
    assert [a["href"].split("/")[0] for tag, a in overview.tags if tag == "a"] == ["one", "two-2", "one-2", "three"]
    assert "4 of 4 answers" in overview.text and all((here / "out/p" / i["src"]).exists() for i in overview.images)


def test_what_has_changed_is_made_anew(duo, here, monkeypatch, capsys):
    """A line, a picture's content, the weights: whatever the answer depends on. Nothing that is there is overwritten."""
    (here / "here").mkdir()
    weights = here / "here/model.safetensors"
    weights.write_bytes(b"1")
    lines = [{"prompt": "One", "images": ["a.png"]}, {"prompt": "Two"}, {"prompt": "Three"}]

    def again(kept: int, made: int, *flags: str) -> str:
        write("p.jsonl", *lines)
        duo.say(*[PLAIN] * made)
        capsys.readouterr()
        assert main(["--prompts", "p.jsonl", *flags]) == 0
        out, err = capsys.readouterr()
        assert (f"{kept} of 3 are there already" in err) if kept else "already" not in err
        assert len(re.findall(r"^\[\d/3\]", out, re.MULTILINE)) == made
        return str(Path(out.strip().split("answers: ")[-1]).parent)

    assert again(0, 3) == "out/p"
    lines[1]["seed"] = 5
    assert again(2, 1) == "out/p"
    lines[2]["name"] = "third"
    assert again(2, 1) == "out/p"
    picture(9).save("a.png")
    assert again(2, 1) == "out/p"
    assert sorted(times(here / "out/p")) == ["one", "one-2", "third", "three", "two", "two-2"]
    assert again(0, 3, "--steps", "2") == "out/p-2"
    assert again(3, 0, "--steps", "2") == "out/p-2" and again(3, 0) == "out/p"
    weights.write_bytes(b"22")
    assert again(0, 3) == "out/p-3"
    assert again(0, 3, "--fresh") == "out/p-4" and again(3, 0) == "out/p-4"
    assert again(0, 3, "--name", "mine") == "out/mine"
    monkeypatch.setattr(duo, "sources", {"ckpt": "here", "dit": "nvidia/x@def"})
    assert again(0, 3, "--name", "mine") == "out/mine-2"


def test_an_interrupted_answer_is_finished_in_its_place(duo, here, monkeypatch, capsys):
    write("p.jsonl", {"prompt": "One"}, {"prompt": "Two"}, {"prompt": "Three"})
    duo.say(PLAIN, TWO, TWO)
    with monkeypatch.context() as patch:
        patch.setattr(duo, "paint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(["--prompts", "p.jsonl", "--batch", "2"]) == 130
    assert json.loads((here / "out/p/two/answer.json").read_text())["stop"] == "interrupted"
    duo.say(TWO, TWO)
    assert main(["--prompts", "p.jsonl"]) == 0
    assert "1 of 3 are there already" in capsys.readouterr().err
    assert sorted(os.listdir(here / "out/p")) == ["index.html", "one", "three", "two"]
    assert json.loads((here / "out/p/two/answer.json").read_text())["stop"] == "end"


def test_a_folder_that_is_no_run_is_never_written_to(duo, here):
    """Of that name there may be a page, files of the user's, or strange ones."""
    for name, files in (("p", {"answer.json": "{}", "index.html": "mine"}), ("p-2", {"x/answer.json": '{"asked": [1]}'})):
        for file, text in files.items():
            (here / "out" / name / file).parent.mkdir(parents=True, exist_ok=True)
            (here / "out" / name / file).write_text(text)
    duo.say(PLAIN)
    assert main(["--prompts", write("p.jsonl", {"prompt": "One"})]) == 0
    assert (here / "out/p/index.html").read_text() == "mine" and os.listdir(here / "out/p-2") == ["x"]
    assert sorted(os.listdir(here / "out/p-3")) == ["index.html", "one"]


def test_a_disk_that_is_full_for_the_overview_is_one_line(duo, here, monkeypatch, capsys):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sample, "write_text", full)
    duo.say(PLAIN)
    assert main(["--prompts", write("p.jsonl", {"prompt": "One"})]) == 2
    assert err_line(capsys).startswith("error: out/p: it cannot be saved there (No space left on device): make room")
    assert os.listdir(here / "out/p") == ["one"]


# ------------------------------------------------------------------------------------------------------------ bad input

BAD = [
    (["--stepz", "3"], "unknown flag --stepz: did you mean --steps?"),
    (["--guidance_sclae=3"], "unknown flag --guidance-sclae: did you mean --guidance-scale?"),
    (["--qqqqqq"], "unknown flag --qqqqqq: see --help"),
    (["-n", "3"], "unknown flag -n"),
    (["a house"], "'a house' belongs to no flag"),
    (["--prompt"], "expected one argument"),
    (["--prompt", " \n"], "--prompt is empty"),
    (["--prompt", "x\udcff"], "--prompt is not Unicode text at character 1"),
    (["--steps", "0"], "--steps 0: must be from 1 to 1000"),
    (["--steps", "many"], "invalid int value: 'many'"),
    (["--steps", "2.5"], "invalid int value"),
    (["--guidance", "nan"], "--guidance nan: must be from -100 to 100, 1 for none"),
    (["--guidance", "inf"], "--guidance inf"),
    (["--sampler", "ddim"], "--sampler ddim: must be one of unipc, euler, ancestral"),
    (["--width", "0"], "--width 0: must be from 1 to 8192"),
    (["--height", "16384"], "from 1 to 8192"),
    (["--seed", "-1"], "--seed -1: must be a whole number"),
    (["--seed", "x"], "invalid int value: 'x'"),
    (["--temperature", "-0.5"], "--temperature -0.5: must be 0, or from 0.01 to 100"),
    *(([f"--{n}={v}"], f"--{n} {v}: must be") for n in ("guidance", "shift", "eta") for v in ("1e+30", "-1e+30")),
    *(([f"--{name}", "1e-300"], f"--{name} 1e-300: must be") for name in ("shift", "temperature")),
    (["--temperature", "1e30"], "--temperature 1e+30: must be 0, or from 0.01 to 100"),
    (["--system", "x\udcff"], "--system is not Unicode text at character 1"),
    (["--top-p", "0"], "--top_p 0.0: must be above 0"),
    (["--top_p", "1.01"], "at most 1"),
    (["--max-images", "-1"], "--max_images -1"),
    (["--max-tokens", "0"], "--max_tokens 0"),
    (["--negative", "all"], "--negative all: must be chunk, empty or none"),
    (["--image", "a.png"], "--image needs a --prompt"),
    (["--prompt", "x", "--image", "none.png"], "--image none.png: no such file"),
    (["--prompt", "x", "--image", "."], "--image .: not a regular file"),
    (["--prompt", "x", "--image", "broken.png"], "--image broken.png: "),
    (["--prompt", "x", "--image", "lfs.png"], "Git LFS pointer"),
    (["--prompt", "x", "--name", "../up"], "--name '../up': must be a plain folder name"),
    (["--prompt", "x", "--name", ""], "--name ''"),
    *((["--name", n], f"--name {n!r}: no file system") for n in ("index.html", "Index.HTML", "con", "nul.png", "a.")),
    (["--prompt", "x", "--name", "漢" * 70], "no file system"),
    (["--prompt", "x", "--name", "a" * 101], "must be a plain folder name"),
    (["--prompt", "x", "--name", "a\x1b[2J"], r"--name 'a\x1b[2J': must be a plain folder name"),
    (["--prompt", "x", "--name", "a\u202eb"], r"--name 'a\u202eb': must be"),
    (["--prompt", "x", "--image", "a\0.png"], r"--image a\x00.png: no such file"),
    (["--prompt", "x", "--image", "a" * 5000], "aaa: no such file"),
    (["--prompts", "a\0.jsonl"], "a.jsonl: no such file"),
    (["--prompt", "x", "--out", "a\0b"], "--out ab: cannot be written"),
    (["--prompt", "x", "--out", "a" * 300], "cannot be written (File name too long)"),
    (["--prompt", "x", "--out", "a.png"], "--out a.png: cannot be written"),
    (["--prompt", "x", "--out", "a.png/b"], "--out a.png/b: cannot be written"),
    (["--prompt", "x", "--out", "/proc/none"], "--out /proc/none: cannot be written"),
    (["--prompt", "x", "--device", "tpu"], "device tpu: unknown"),
    (["--prompt", "x", "--device", "cuda:99"], "device cuda:99"),
    (["--prompt", "x", "--dtype", "int3"], "dtype int3: unknown"),
    (["--prompt", "x", "--offload", "--device", "cpu"], "--offload is for NVIDIA GPUs, and the device is cpu: leave it out"),
    (["--prompt", "x", "--graphs", "--device", "cpu"], "--graphs is for NVIDIA GPUs, and the device is cpu"),
    (["--prompt", "x", "--attention", "flash"], "attention 'flash' is none of auto, triton, sdpa"),
    (["--prompt", "x", "--prompts", "p.jsonl"], "--prompt and --prompts exclude each other"),
    (["--image", "a.png", "--prompts", "p.jsonl"], "--image and --prompts exclude each other"),
    (["--prompts", "none.jsonl"], "none.jsonl: no such file"),
    (["--prompts", "."], ".: is a folder"),
    (["--prompts", "empty.jsonl"], "empty.jsonl: no prompt in it"),
    (["--prompts", "p.jsonl", "--batch", "0"], "--batch 0: must be 1 or more"),
]


@pytest.mark.parametrize("argv, message", BAD, ids=[" ".join(a).encode("ascii", "replace").decode() for a, _ in BAD])
def test_mistakes_are_one_line_before_any_model_is_loaded(here, monkeypatch, capsys, argv, message):
    monkeypatch.setattr(sample.DuoGen, "from_pretrained", None)
    Path("broken.png").write_bytes(Path("a.png").read_bytes()[:200])
    Path("lfs.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n")
    Path("empty.jsonl").write_text("\n\n")
    check_one_line(main(argv), capsys, message)
    assert not Path("out").exists() or os.listdir("out") == []


def check_one_line(code, capsys, message):
    out, err = capsys.readouterr()
    assert code == 2 and out == "", (code, out)
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err, err


LINES = [
    ("{bad", "p.jsonl:2: not valid JSON"),
    ('"a"', "p.jsonl:2: not an object"),
    ({}, "p.jsonl:2: prompt is missing"),
    ({"prompt": 3}, "p.jsonl:2: prompt is missing or no text"),
    ({"prompt": " "}, "p.jsonl:2: prompt is empty"),
    ('{"prompt": "\\ud800"}', "p.jsonl:2: prompt is not Unicode"),
    ({"prompt": "x", "stepz": 3}, "p.jsonl:2: unknown field stepz: did you mean steps?"),
    ({"prompt": "x", "steps": "3"}, 'p.jsonl:2: field steps is "3"'),
    ({"prompt": "x", "steps": 0}, "p.jsonl:2: steps 0"),
    ({"prompt": "x", "images": "a.png"}, "p.jsonl:2: images: must be a list"),
    ({"prompt": "x", "images": ["a.png", "no.png"]}, "p.jsonl:2: images[1]: "),
    ({"prompt": "x", "name": "a/b"}, "p.jsonl:2: name 'a/b'"),
    ({"messages": []}, "p.jsonl:2: messages: no user message"),
    ({"messages": 3}, "p.jsonl:2: messages: not a list"),
    ({"messages": [{"role": "bot", "content": "x"}]}, "p.jsonl:2: messages[0].role: unknown role"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]}, "[0].content[0].image: no such"),
    ({"messages": [{"role": "system", "content": "x"}]}, "p.jsonl:2: messages: no user message"),
    ({"conversations": []}, "p.jsonl:2: "),
    ("a red house", 'p.jsonl:2: not valid JSON: Expecting value: line 1 column 1 (char 0); a line is {"prompt": "..."}'),
    ({"prompt": "x", "name": "index.html"}, "p.jsonl:2: name 'index.html': no file system"),
    ({"prompt": "x", "guidance": 1e30}, "p.jsonl:2: guidance 1e+30: must be from -100 to 100"),
    ({"prompt": "x", "guidance": 10**400}, "p.jsonl:2: field guidance is 1000"),
    ({"prompt": "x", "\x1b[2J": 1}, "p.jsonl:2: unknown field '\\x1b[2J'"),
    ({"prompt": "x", "images": ["../a.png"]}, "p.jsonl:2: images[0]: path leaves the file's folder: '../a.png'"),
    ({"prompt": "x", "images": ["/etc/hostname"]}, "p.jsonl:2: images[0]: path leaves the file's folder"),
    ({"prompt": "x", "images": ["https://a.b/c.png"]}, "p.jsonl:2: images[0]: a URL"),
    ({"prompt": "x", "images": ["a\0.png"]}, r"p.jsonl:2: images[0]: no such picture: 'a\x00.png'"),
    ({"prompt": "x", "images": ["data:image/png;base64,AAAA"]}, "p.jsonl:2: images[0]: picture cannot be used: data URL"),
]


@pytest.mark.parametrize("line, message", LINES, ids=range(len(LINES)))
def test_a_file_without_a_good_line_is_refused_before_any_model_is_loaded(here, monkeypatch, capsys, line, message):
    monkeypatch.setattr(sample.DuoGen, "from_pretrained", None)
    check_one_line(main(["--prompts", write("p.jsonl", "", line)]), capsys, message)


def test_a_bad_line_costs_its_own_answer_only(duo, here, monkeypatch, capsys):
    """Each is one line on stderr; the others are answered, and the overview says which are not."""
    monkeypatch.setattr(duo, "context", 200)
    long = {"prompt": "<b>" * 3000}
    write("p.jsonl", {"prompt": "One"}, *(line for line, _ in LINES), long, {"prompt": "Two", "name": "two"})
    duo.say(PLAIN, PLAIN)
    small = "--max-tokens 20 --max-images 0".split()
    assert main(["--prompts", "p.jsonl", *small]) == 1
    out, err = capsys.readouterr()
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    for number, (line, (_, message)) in enumerate(zip(told, LINES, strict=False), 2):
        assert line.startswith(f"error: p.jsonl:{number}: ") and message.replace("p.jsonl:2", f"p.jsonl:{number}") in line
    assert len(told) == len(LINES) + 1
    assert re.search(rf"p.jsonl:{len(LINES) + 2}: the prompt has [\d,]+ tokens, the limit is 199: shorten it", told[-1])
    assert sorted(os.listdir(here / "out/p")) == ["index.html", "one", "two"]
    count = len(LINES) + 3
    overview = Page((here / "out/p/index.html").read_text()).text
    assert f"2 of {count} answers" in overview and all(line.removeprefix("error: ") in overview for line in told)
    assert f"[{count}/{count}] Two" in out and f"2 of {count} answers: out/p/index.html" in out


def test_bad_checkpoints_are_one_line(here, parts, capsys):
    for argv, message in (
        (["--ckpt", "no/where/at/all"], "no/where"),
        (["--ckpt", "a.png"], "a.png: a file"),
        (["--ckpt", str(parts.folder / "dit")], "no duogen.json"),
        (["--ckpt", str(parts.folder), "--revision", "v1"], "revision v1"),
        (["--ckpt", str(parts.folder), "--dit", str(parts.folder / "vae")], "_class_name is 'AutoencoderKLWan'"),
    ):
        check_one_line(main(["--prompt", "x", *argv]), capsys, message)


def test_a_prompt_that_is_too_long_says_which(duo, here, monkeypatch, capsys):
    monkeypatch.setattr(duo, "context", 40)
    assert main(["--prompts", write("p.jsonl", {"prompt": "x " * 100})]) == 2
    assert re.fullmatch(r"error: p.jsonl:1: the prompt has \d+ tokens, the limit is 39: shorten it", err_line(capsys))


def err_line(capsys) -> str:
    return capsys.readouterr().err.strip().split("\n")[-1]


def test_help(capsys):
    with pytest.raises(SystemExit) as e:
        main(["--help"])
    out = capsys.readouterr().out
    assert e.value.code == 0 and "--num-inference-steps" in out and "--no-use-condition-images" in out


# ------------------------------------------------------------------------------------------------------------ for real


def run(*argv, cwd, **options):
    command = [sys.executable, str(ROOT / "sample.py"), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, **pipes, **options)


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_the_program_itself(here, parts):
    """Seconds of starting Python, three times at once: a whole answer, a mistake, and Ctrl-C."""
    flags = ["--prompt", "Draw", "--ckpt", str(parts.folder), "--temperature", "1"]
    bad = run("--prompt", "Draw", "--step", "3", cwd=here)
    good = run(*flags, "--steps", "1", "--max-tokens", "4", "--max-images", "1", cwd=here)
    long = run(*flags, "--steps", "200", "--max-tokens", "500", "--max-images", "1000", "--out", "long", cwd=here)
    try:
        first = long.stdout.read(1)  # it writes: the models are loaded
        long.send_signal(signal.SIGINT)
        out, err = bad.communicate(timeout=200)
        assert bad.returncode == 2 and out == "" and err == "error: unknown flag --step: did you mean --steps?\n"
        out, err = good.communicate(timeout=200)
        assert good.returncode == 0, err
        assert out.strip().endswith("out/draw/index.html") and "%|" not in err and "Traceback" not in err
        answer = json.loads((here / "out/draw/answer.json").read_text())
        assert answer["sources"]["ckpt"] == str(parts.folder) and answer["tokens"]["written"] <= 4
        out, err = long.communicate(timeout=200)
        assert first and long.returncode == 130 and "Traceback" not in err, err
        assert json.loads((here / "long/draw/answer.json").read_text())["stop"] == "interrupted"
    finally:
        for process in (bad, good, long):
            process.kill()


BUNDLED = ["--ckpt", str(ROOT / "checkpoints/tiny"), "--device", "cpu"]
QUICK = {"prompt": "Draw a red house.", "name": "quick", "max_images": 0, "max_tokens": 5}
LONG = {"prompt": "How do I draw a house?", "name": "long", "steps": 1000, "max_tokens": 500}


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_sigterm_keeps_what_is_finished(here):
    """As Ctrl-C does, of one prompt and of many, and a second one in the midst of it changes nothing."""
    write("p.jsonl", QUICK, LONG)
    one = run("--prompt", LONG["prompt"], "--name", "long", "--steps", "1000", *BUNDLED, cwd=here)
    many = run("--prompts", "p.jsonl", *BUNDLED, cwd=here)
    try:
        assert one.stdout.read(1) and many.stdout.readline().startswith("[1/2]")  # both are at work
        for process in (one, many, one, many):
            process.send_signal(signal.SIGTERM)
        for process in (one, many):
            err = process.communicate(timeout=200)[1]
            assert process.returncode == 143 and err.endswith("it was interrupted; saving what is there\n"), err
            assert "Traceback" not in err
    finally:
        one.kill(), many.kill()
    stops = [json.loads((here / "out" / f / "answer.json").read_text())["stop"] for f in ("long", "p/quick", "p/long")]
    assert stops == ["interrupted", "max_tokens", "interrupted"]
    assert "2 of 2 answers" in Page((here / "out/p/index.html").read_text()).text


@pytest.mark.skipif(os.name != "posix", reason="limits of a process")
def test_a_disk_that_fills_up_keeps_what_was_saved(here):
    """The quick answer's files fit; the other's picture does not. With room, the same command makes what is missing."""
    write("p.jsonl", QUICK, QUICK | {"name": "big", "max_images": 1, "max_tokens": 200, "steps": 2})
    command = [sys.executable, str(ROOT / "sample.py"), "--prompts", "p.jsonl", "--batch", "1", *BUNDLED]
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (16000, 16000))  # noqa: E731
    done = subprocess.run(command, cwd=here, preexec_fn=full, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    assert [e for e in done.stderr.splitlines() if "error" in e] == [
        "error: out/p: it cannot be saved there (File too large): make room, or choose another folder"
    ]
    assert sorted(os.listdir(here / "out/p")) == ["index.html", "quick"]
    assert "1 of 2 answers" in Page((here / "out/p/index.html").read_text()).text
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0 and "1 of 2 are there already" in done.stderr, done.stderr
    assert sorted(os.listdir(here / "out/p")) == ["big", "index.html", "quick"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_stdout_costs_no_page(here):
    write("p.jsonl", QUICK, QUICK | {"name": "second"})
    few = ["--steps", "2", "--max-images", "1"]
    with open("/dev/full", "w") as full:
        both = [
            subprocess.Popen([sys.executable, str(ROOT / "sample.py"), *flags, *BUNDLED], cwd=here, stdout=full,
                             stderr=subprocess.PIPE, text=True)
            for flags in (["--prompt", "Draw a red house.", "--name", "one", *few], ["--prompts", "p.jsonl"])
        ]  # fmt: skip
    for process in both:
        err = process.communicate(timeout=200)[1]
        told = [line for line in err.splitlines() if "tensors" not in line]
        assert process.returncode == 1 and len(told) == 1 and told[0].startswith("error: stdout: No space left"), err
    assert json.loads((here / "out/one/answer.json").read_text())["parts"][1]["type"] == "image"
    assert sorted(os.listdir(here / "out/p")) == ["index.html", "quick", "second"]


@pytest.mark.skipif(os.name != "posix", reason="pipes")
def test_a_reader_that_goes_away_leaves_a_page(here):
    """As in `| head -1`: the answer ends there, and is saved as far as it is."""
    process = run("--prompt", LONG["prompt"], "--name", "long", "--steps", "2", *BUNDLED, cwd=here)
    assert process.stdout.read(1)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=200) == 1 and all("tensors" in line for line in err.splitlines()), err
    assert json.loads((here / "out/long/answer.json").read_text())["stop"] == "interrupted"


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_ctrl_c_while_pytorch_is_imported_is_one_line(here):
    """A module that takes the place of PyTorch presses it, and swallows the exception that it must not become."""
    press = "import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    time.sleep(60)\n"
    (here / "torch.py").write_text(press + "except BaseException:\n    pass\n")
    process = run("--prompt", "x", cwd=here, env=os.environ | {"PYTHONPATH": str(here)})
    assert process.communicate(timeout=50) == ("", "interrupted\n") and process.returncode == 130


def test_the_limits_of_the_settings_still_paint(here):
    """Neither black nor broken: values just inside give pictures with something in them."""
    duo = sample.DuoGen.from_pretrained(ROOT / "checkpoints/tiny")
    extremes = [("guidance", 100.0), ("guidance", -100.0), ("shift", 0.01), ("shift", 100.0), ("eta", 100.0)]
    extremes += [("temperature", 0.01)]
    answers = [duo.answer("Draw a red house.", duo.settings(steps=3, max_images=1, **{name: v})) for name, v in extremes]
    duo.write_many(answers)
    for (name, value), answer in zip(extremes, answers, strict=True):
        assert all(low < high for low, high in answer.pictures[0].image.getextrema()), (name, value)
        assert sum(answer.pictures[0].image.resize((1, 1)).getpixel((0, 0))) > 60, (name, value)
    hot = duo.generate("x", duo.settings(temperature=100.0, max_tokens=20, max_images=0))
    assert hot.tokens > 0
    # So small a share is that of the likeliest token.
    sure = duo.generate("Draw a red house.", duo.settings(temperature=1.0, top_p=1e-300, max_tokens=8, max_images=0))
    assert sure.text == duo.generate("Draw a red house.", duo.settings(max_tokens=8, max_images=0)).text


def test_bars_need_a_terminal(duo, here, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        duo.say(TWO)
        sample.show(duo, duo.answer("x"))
        assert ("picture 1" in stream.getvalue()) == expected


def test_saving_survives_a_race(duo, here, monkeypatch):
    """Two runs that want one name both get a folder."""
    duo.say(PLAIN)
    answer = duo.generate("x")
    rename, taken = os.rename, []

    def late(a, b):
        if not taken:
            taken.append(b)
            Path(b).mkdir()
            (Path(b) / "other").touch()
        rename(a, b)

    monkeypatch.setattr(pages.answer.os, "rename", late)
    about = {"load_seconds": 0.0, "total_seconds": time.perf_counter(), "dtype": "float32"}
    assert pages.answer.save(here, "n", answer, about).name == "n-2"
