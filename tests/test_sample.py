"""The command line from prompt to files, what a page holds, and how every mistake is told in one line."""

import base64
import io
import json
import os
import re
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

import evaluate
import kernels
import ops
import page
import sample
import training
from checkpoint import InputError
from page import escape_markdown
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


@pytest.mark.parametrize(
    "prompt, name",
    [
        ("How do I draw a house?", "how-do-i-draw-a-house"), ("../../etc/passwd", "etc-passwd"), ("...", "answer"),
        ("漢字 ok", "漢字-ok"), ("word " * 40, "word-word-word-word-word-word-word-word-word"), ("a" * 300, "answer"),
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


def test_a_full_disk_leaves_nothing_half(duo, here, monkeypatch, capsys):
    duo.say(TWO)
    monkeypatch.setattr(page, "markdown", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
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
        evaluate.main(["sketchbook", "--attention", "flash"])
    with pytest.raises(InputError, match="'flash' is none of"):
        training.Run(training.TrainConfig(attention="flash"), training.World("cpu"), torch.nn.Linear(2, 2), None)


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


def test_a_prompt_that_is_too_long_stops_a_file_before_it_begins(duo, here, monkeypatch, capsys):
    monkeypatch.setattr(duo, "context", 40)
    monkeypatch.setattr(duo, "read", None)
    assert main(["--prompts", write("p.jsonl", {"prompt": "x"}, {"prompt": "x " * 100})]) == 2
    assert err_line(capsys).startswith("error: p.jsonl:2: the prompt has") and not (here / "out/p").exists()


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
    (["--guidance", "nan"], "--guidance nan: must be a finite number"),
    (["--guidance", "inf"], "--guidance inf"),
    (["--sampler", "ddim"], "--sampler ddim: must be one of unipc, euler, ancestral"),
    (["--height", "100"], "--height 100: must be a multiple of 16"),
    (["--width", "0"], "--width 0: must be a multiple of 16"),
    (["--height", "16384"], "from 16 to 8192"),
    (["--seed", "-1"], "--seed -1: must be a whole number"),
    (["--seed", "x"], "invalid int value: 'x'"),
    (["--temperature", "-0.5"], "--temperature -0.5: must be 0 or more"),
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
    ("[1]", "p.jsonl:2: not an object"),
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
]


@pytest.mark.parametrize("line, message", LINES, ids=range(len(LINES)))
def test_a_bad_line_is_named(here, monkeypatch, capsys, line, message):
    monkeypatch.setattr(sample.DuoGen, "from_pretrained", None)
    code = main(["--prompts", write("p.jsonl", {"prompt": "fine"}, line)])
    check_one_line(code, capsys, message)


def test_bad_checkpoints_are_one_line(here, parts, capsys):
    for argv, message in (
        (["--ckpt", "no/where/at/all"], "no/where"),
        (["--ckpt", "a.png"], "a.png: a file"),
        (["--ckpt", str(parts.folder / "dit")], "no duogen.json"),
        (["--ckpt", str(parts.folder), "--revision", "v1"], "revision v1"),
        (["--ckpt", str(parts.folder), "--dit", str(parts.folder / "vae")], "config.json of the DiT"),
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
    # A shell's background jobs ignore SIGINT, and so does what they start: Ctrl-C would not be tested there.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=cwd, preexec_fn=heed, **pipes, **options)


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

    monkeypatch.setattr(page.os, "rename", late)
    about = {"load_seconds": 0.0, "total_seconds": time.perf_counter(), "dtype": "float32"}
    assert page.save(here, "n", answer, about).name == "n-2"
