"""Ask, and get a document of text and pictures: streamed to the terminal, saved as a page.

    python sample.py --prompt "How do I draw a house?"
    python sample.py --prompt "Make the roof green." --image house.png --seed 3
    python sample.py --chat                                                      a conversation in the terminal
    python sample.py --continue out/how-do-i-draw-a-house --prompt "Make the roof green."     any answer goes on later
    python sample.py --prompts prompts.jsonl --steps 20                          many, with an overview page
    python sample.py --ckpt owner/name --dtype bf16 --device cuda --prompt "..."   a folder or a Hub name
    python sample.py --mllm Qwen/Qwen2.5-VL-7B-Instruct --dit DIT --vae VAE ...    parts from elsewhere, see pipeline.py
    python sample.py --dit runs/x --prompt "..."                                   the newest DiT of a training run
    python sample.py --plan --mllm 7B --dit 2B --vae wan2.1                        what it takes of a GPU, nothing is loaded

The answer appears on stdout as it is written; bars and notices are on stderr. What remains is a folder (pages/answer.py):

    out/how-do-i-draw-a-house/index.html     the answer as one self-contained page
                              answer.md      the same as Markdown, with image_01.png, image_02.png, ...
                              answer.json    the parts in order, every setting, seed and model source, timings
                              film.webp      with --film: the pictures taking shape, step by step

A line of --prompts is {"prompt": "...", "images": ["a.png"], "name": "...", and any setting}, or a record as in data.py, of
which answers at the end are left off; data.py's rules for pictures hold for both. --prompts - reads such lines from standard
input, with pictures relative to the working directory. --batch of them are written and painted together, and each appears when
it is finished; it is what it would be if asked for alone. The folders lie in out/prompts/, beside an overview. A line that
cannot be answered is reported as FILE:LINE, and the others are answered. The same command again continues: what is there as a
whole is kept if prompt, settings, name, model and dtype are the same. --fresh, or a --name of its own, begins anew.

Ctrl-C and SIGTERM end the answers that are being written and save what is there.

Exit status: 0 all is well, 1 some lines were not answered or stdout took no more, 2 a mistake or a full disk, 130 Ctrl-C,
143 SIGTERM.
"""

import interrupt

if __name__ == "__main__":
    interrupt.quiet()  # until main is reached: importing PyTorch takes a second or two

import argparse
import contextlib
import re
import sys
import time
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from itertools import count
from pathlib import Path

from tqdm import tqdm

from checkpoint import InputError, abandon_stdout, make_out, parse_dtype, pick_device
from flags import Parser, add_flags
from ops import set_backend
from pages.answer import asked_for, card, dialogue_of, overview, prompt_of, run_folder, save, saved, saving, write_text
from pages.film import Film
from pages.template import printable
from pipeline import STOPS, Answer, DuoGen, Paint, Picture, Settings, Text, check_device, override
from records.validate import BLANK, Problem, load_image, normalise, parse_line, picture_path, picture_problems, read_records
from records.validate import validate

PROMPT = "How do I draw a house?"  # when nothing is asked
BATCH = 8
ALIASES = {"steps": ["--num-steps", "--num-inference-steps"], "guidance": ["--guidance-scale"]}
# Windows cannot have files of these names, whatever their ending; and index.html is the overview's.
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?|index\.html", re.IGNORECASE)
LOST: list[OSError] = []  # why stdout takes no more

# ----------------------------------------------------------------------------------------------------------- command line


def parser() -> Parser:
    """All flags. Those of `Settings` are derived from it; what is not given is left to the checkpoint."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    p.add_argument("--prompt", help=f"what you want (default: {PROMPT})")
    p.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture to go with it; repeat it for more")
    p.add_argument("--continue", dest="earlier", metavar="FOLDER", help="an earlier answer's folder, whose dialogue goes on")
    p.add_argument("--chat", action="store_true", help="one question after the other, each answered in the light of all before")
    p.add_argument("--film", action="store_true", help="also save film.webp: how the pictures were painted")
    p.add_argument("--prompts", metavar="FILE", help="many prompts, one JSON object a line; - is standard input")
    p.add_argument("--fresh", action="store_true", help="do not continue an earlier run of --prompts")
    p.add_argument("--batch", type=int, help=f"of --prompts, how many are answered at a time (default: {BATCH})")
    p.add_argument("--ckpt", help="checkpoint: folder or Hub name (default: the bundled miniature)")
    p.add_argument("--revision", help="branch, tag or commit of a --ckpt on the Hub")
    for part in ("mllm", "dit", "vae"):
        p.add_argument(f"--{part}", help="take this part from another folder, training run or Hub name")
    p.add_argument("--dtype", default="auto", help="auto, bf16, fp32, fp16 (auto: bf16 on an accelerator)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps")
    p.add_argument("--offload", action="store_true", help="for a small GPU: weights wait in host memory, see docs/fit.md")
    p.add_argument("--graphs", action=argparse.BooleanOptionalAction,
                   help="CUDA graphs (default: of small pictures alone, where a fast GPU waits for its host)")  # fmt: skip
    p.add_argument("--plan", action="store_true", help="print what it takes of a GPU's memory, and end; see tools/fit.py")
    p.add_argument("--attention", default="auto", help="auto, triton, sdpa (auto: triton, or sdpa where it is faster)")
    p.add_argument("--out", default="out", metavar="FOLDER", help="where the pages go (default: out)")
    p.add_argument("--name", help="name of the page's folder (default: from the prompt)")
    add_flags(p, Settings, title="settings (defaults: the checkpoint's)", aliases=ALIASES, given_only=True)
    return p


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """Flags, and the settings among them. A dash may be an underscore; an unknown flag is an error with a suggestion."""
    args = parser().parse_flags(argv, stray="put the prompt in quotes behind --prompt")
    # Only what was given is in args: a default here would hide the checkpoint's own.
    values = {f.name: vars(args).pop(f.name) for f in fields(Settings) if f.name in args}
    # Tried out on plain settings, so that a value out of range is told as the flag that it came from.
    try:
        replace(Settings(), **values)
    except InputError as e:
        raise InputError(f"--{e}") from None
    return args, values


@dataclass
class Job:
    """One answer to make."""

    messages: list[dict]
    name: str
    values: dict  # settings
    where: str = "prompt"  # for messages about it


def read_jobs(args: argparse.Namespace, values: dict) -> list[Job | InputError]:
    """What is to be answered, all of it checked before any model is loaded; a bad line of --prompts comes as its error."""
    if args.prompts is not None:
        for flag in ("prompt", "image", "earlier", "chat", "film"):
            if getattr(args, flag):
                name = "continue" if flag == "earlier" else flag
                raise InputError(f"--{name} and --prompts exclude each other")
        # An error is one of the jobs: the lines keep their numbers, and the good ones are answered all the same.
        jobs = []
        for number, record in read_lines(args.prompts):
            try:
                jobs.append(read_job(args.prompts, number, record, values))
            except InputError as e:
                jobs.append(e)
        if not jobs:
            raise InputError(f"{'stdin' if args.prompts == '-' else args.prompts}: no prompt in it")
        return jobs
    if args.prompt is None and args.image:
        raise InputError("--image needs a --prompt: say what to do with it")
    if args.earlier and args.prompt is None and not args.chat:
        raise InputError("--continue needs a --prompt, or --chat: say what comes next")
    before = dialogue_of(Path(args.earlier)) if args.earlier else []
    prompt = PROMPT if args.prompt is None else args.prompt
    check_prompt(prompt, "--prompt")
    # Opened for the sake of their errors alone: a broken picture is told before the models are loaded.
    for path in args.image:
        try:
            load_image(path)
        except InputError as e:
            raise InputError(f"--image {e}") from None
    return [Job([*before, *ask(prompt, args.image)], args.name or slug(prompt), values)]


def read_lines(file: str) -> Iterator[tuple[int, dict | Problem]]:
    """As records.validate.read_records, and of standard input if the file is "-"."""
    if file != "-":
        yield from read_records(file)
    elif sys.stdin is not None:  # it is None if it was closed
        yield from ((n, parse_line(line, "stdin", n)) for n, line in enumerate(sys.stdin.buffer, 1) if line.strip(BLANK))


def read_job(file: str, number: int, record: dict | Problem, values: dict) -> Job:
    """A line of a --prompts file. InputError says which line and field."""
    # Paths of pictures count from the file that names them; standard input lies nowhere, so there from the working directory.
    if file == "-":
        file = "stdin"
        folder = Path()
    else:
        folder = Path(file).parent
    where = f"{file}:{number}"
    if isinstance(record, Problem):
        raise InputError(f'{record}; a line is {{"prompt": "..."}}')
    if "messages" in record:
        # A record of a training file. Its other keys are somebody's own and no mistake, so only settings are picked out.
        own = {k: v for k, v in record.items() if k in Settings.__dataclass_fields__}
        messages = record["messages"]
        # The corpus' answer is left off: it is what the model is asked for.
        if isinstance(messages, list):
            while messages and isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant":
                messages = messages[:-1]
            # A valid record has something to learn from; this one does without while it is checked.
            record = record | {"messages": [*messages, {"role": "assistant", "content": "."}]}
        for problem in validate(record, folder, file, number):
            if not problem.warning:
                raise InputError(str(problem))
        messages = normalise({"messages": messages}, folder)
        if not messages or messages[-1]["role"] != "user":
            raise InputError(f"{where}: messages: no user message at the end to be answered")
        prompt = " ".join(part["text"] for part in messages[-1]["content"] if part["type"] == "text")
    else:
        # A line written for this program: whatever else it has must be a setting, so that a slip of the pen is told.
        own = {k: v for k, v in record.items() if k not in ("prompt", "images", "name")}
        prompt = record.get("prompt")
        images = record.get("images", [])
        check_prompt(prompt, f"{where}: prompt")
        if not isinstance(images, list) or not all(isinstance(i, str) for i in images):
            raise InputError(f"{where}: images: must be a list of paths")
        for i, image in enumerate(images):
            for at, problem in picture_problems(image, f"images[{i}]", folder.absolute(), True):
                raise InputError(f"{where}: {at}: {problem}")
        messages = ask(prompt, [i if i.startswith("data:") else picture_path(folder, i) for i in images])
    # The line's own settings go before those of the command line; both are tried before any model is loaded.
    name = record.get("name", slug(prompt))
    override(Settings(), values | own, where)
    return Job(messages, check_name(name, f"{where}: name"), values | own, where)


def check_prompt(prompt: object, where: str) -> None:
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(f"{where} is {'empty' if isinstance(prompt, str) else 'missing or no text'}: say what you want")
    try:
        prompt.encode()
    except UnicodeEncodeError as e:
        raise InputError(f"{where} is not Unicode text at character {e.start}: write it in UTF-8") from None


def ask(prompt: str, images: list[str | Path]) -> list[dict]:
    """The pictures first, as Qwen has it."""
    sources = [i if str(i).startswith("data:") else Path(i).absolute() for i in images]
    content = [*({"type": "image", "image": i} for i in sources), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def slug(prompt: str) -> str:
    """A folder's name from a prompt: its first words."""
    # Composed first: a letter with a loose accent would fall into two words at the accent.
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFC", prompt).lower())
    name = ""
    for word in words:
        if len(name) + len(word) >= 48:
            break
        name += f"-{word}" if name else word
    return f"{name}-answer" if RESERVED.fullmatch(name) else name or "answer"


def check_name(name: object, where: str) -> str:
    # It becomes part of a path: no slash and no dot in front, so that it can lead nowhere else.
    if not isinstance(name, str) or not re.fullmatch(r"[^\W_][\w .-]{0,99}", name) or name != name.strip():
        raise InputError(f"{where} {name!r:.40}: must be a plain folder name of letters, digits, blanks, dots, - and _")
    # In bytes, for file systems count these: a hundred characters may be three hundred.
    if RESERVED.fullmatch(name) or name.endswith(".") or len(name.encode()) > 200:
        raise InputError(f"{where} {name!r:.40}: no file system holds it beside everything else: choose another name")
    return name


# ------------------------------------------------------------------------------------------------------------------- run


def main(argv: list[str] | None = None) -> int:
    """The exit status, see the top."""
    for stream in (sys.stdout, sys.stderr):  # an answer in Chinese must not end a run in an ASCII terminal
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    LOST.clear()  # of an earlier call in the same process
    # Within `heard` Ctrl-C and SIGTERM are exceptions, so that those who write an answer can save it on their way out.
    try:
        with interrupt.heard():
            return run(sys.argv[1:] if argv is None else argv) or int(bool(LOST))
    except InputError as e:
        report(e)
        return 2
    except KeyboardInterrupt as e:
        print("interrupted", file=sys.stderr)
        return interrupt.status(e)
    except BrokenPipeError:
        abandon_stdout()
        return 1


def run(argv: list[str]) -> int:
    # Flags first: their mistakes are told before a file is read.
    args, values = parse(argv)
    if args.name is not None:
        check_name(args.name, "--name")
    if args.batch is not None and args.batch < 1:
        raise InputError(f"--batch {args.batch}: must be 1 or more")
    # Ahead of the device: a plan is made on any machine for another.
    if args.plan:
        from tools.fit import planned

        batch = args.batch or (BATCH if args.prompts else 1)
        parts = {"mllm": args.mllm, "dit": args.dit, "vae": args.vae}
        say(planned(args.ckpt, parts, values, batch, len(args.image), args.dtype).report())
        return 0
    # What this machine cannot do is known without a checkpoint, too.
    device = pick_device(args.device)
    dtype = parse_dtype(args.dtype, device)
    set_backend(args.attention, device)
    check_device(device, args.offload, args.graphs)

    # Then what is asked, all of it, before any model is loaded. A line that cannot be answered costs no other its answer.
    jobs = read_jobs(args, values)
    for problem in jobs:
        if isinstance(problem, InputError):
            report(problem)
    if not any(isinstance(job, Job) for job in jobs):
        return 2
    out = Path(args.out)
    make_out(out)

    # The models.
    began = time.perf_counter()
    with contextlib.redirect_stdout(sys.stderr):  # what the loaders report is no part of the answer
        options = {name: getattr(args, name) for name in ("mllm", "dit", "vae", "revision", "offload", "graphs")}
        duo = DuoGen.from_pretrained(args.ckpt, **options, dtype=dtype, device=device, asked=values)
    about = {"load_seconds": round(time.perf_counter() - began, 3), "dtype": str(dtype).removeprefix("torch.")}

    # Only the models know what the checkpoint's defaults are and which prompt is too long.
    answers = {}
    for n, job in enumerate(jobs):
        if isinstance(job, Job):
            try:
                answers[n] = duo.answer(job.messages, override(duo.defaults, job.values, "settings"))
            except InputError as e:
                jobs[n] = InputError(f"{job.where}: {e}")
                report(jobs[n])
    if not answers:
        return 2
    if args.chat:
        return chat(duo, jobs[0], args.prompt is not None, out, about, args.film)
    if args.prompts is None:
        return one(duo, answers[0], out, jobs[0].name, about, args.film)

    # Many: into a folder of their own, where what is there already is kept.
    title = "prompts" if args.prompts == "-" else Path(args.prompts).name
    wanted = {n: asked_for(answer, jobs[n].name, about["dtype"]) for n, answer in answers.items()}
    folder = run_folder(out, args.name or slug(Path(title).stem), {*wanted.values()}, args.fresh)
    try:
        with saving(folder):
            folder.mkdir(exist_ok=True)
        return many(duo, jobs, answers, wanted, folder, about, args.batch or BATCH, title)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is still empty


def one(duo: DuoGen, answer: Answer, out: Path, name: str, about: dict, filmed: bool = False) -> int:
    """Write an answer, to the terminal as it grows, and save it."""
    began = time.perf_counter()
    status = 0
    film = Film(duo.decoded)
    duo.watch = film.see if filmed else None
    # Ended early, what is there is an answer like others, and is saved below; of nothing there is no page.
    try:
        show(duo, answer)
    except (KeyboardInterrupt, BrokenPipeError) as e:
        if not answer.parts:
            raise
        status = ended_early(e)
    if answer.stop != "end":
        say(f"[ends here: {answer.stop_meaning}]")
    facts = about | {"total_seconds": round(time.perf_counter() - began, 3)}
    moving = film.webp([p.image for p in answer.pictures]) if filmed else b""
    folder = save(out, name, answer, facts, film=moving)
    say(f"\n{folder / 'index.html'}")
    return status


def chat(duo: DuoGen, job: Job, asked: bool, out: Path, about: dict, filmed: bool) -> int:
    """One question after the other. asked: whether the first is known. An end of input ends it; Ctrl-C ends an answer first."""
    before = job.messages[:-1]
    question = job.messages[-1] if asked else None
    images: list[Path] = []
    print("An empty line or Ctrl-D ends it; /image FILE adds a picture to the next question.", file=sys.stderr)
    while True:
        if question is None:
            try:
                line = input("> ").strip()
            except EOFError:
                return 0
            if not line:
                return 0
            # A mistake costs the line, not the conversation.
            try:
                if line.startswith("/image "):
                    load_image(line.removeprefix("/image ").strip())
                    images.append(Path(line.removeprefix("/image ").strip()))
                    continue
                check_prompt(line, "the question")
            except InputError as e:
                report(e)
                continue
            question = ask(line, images)[0]
            images = []
        try:
            answer = duo.answer([*before, question], override(duo.defaults, job.values, "settings"))
        except InputError as e:
            report(e)
            question = None
            continue
        status = one(duo, answer, out, slug(prompt_of(answer.messages)), about, filmed)
        if status == interrupt.status(interrupt.Terminated()) or LOST:
            return status
        before = [*answer.messages, answer.message]
        question = None
        say("")


def many(
    duo: DuoGen,
    jobs: list[Job | InputError],
    answers: dict[int, Answer],
    wanted: dict[int, str],
    out: Path,
    about: dict,
    batch: int,
    title: str,
) -> int:
    """Write answers together, and save and print each as soon as it is finished. answers, wanted: by number in jobs.

    Those that are in the folder already as a whole, by what is `wanted`, are kept, and interrupted ones are made again.
    """
    began = time.perf_counter()
    number = {a: n for n, a in answers.items()}
    problems = [str(job) for job in jobs if not isinstance(job, Job)]
    names = dict(zip(answers, unique([jobs[n].name for n in answers]), strict=True))
    # Each saved answer serves once: of two equal lines the second takes the second answer, or is written.
    whole, interrupted = saved(out)
    cards = {n: whole[key].pop(0) for n, key in wanted.items() if whole.get(key)}
    if cards:
        print(f"{len(cards)} of {len(jobs)} are there already: {out}", file=sys.stderr)
    waiting = [answer for n, answer in answers.items() if n not in cards]

    # After every answer, so that the overview is true whenever the run ends.
    def write_overview() -> None:
        with saving(out):
            write_text(out / "index.html", overview(title, [cards[n] for n in sorted(cards)], problems, len(jobs)))

    def done(answer: Answer) -> None:
        # Saved before it is printed: a reader of stdout may go away, and the files are what counts.
        n = number[answer]
        facts = about | {"asked": wanted[n], "total_seconds": round(time.perf_counter() - began, 3)}
        earlier = interrupted.get(wanted[n])
        folder = save(out, names[n], answer, facts, instead=earlier.pop() if earlier else None)
        cards[n] = card(folder)
        write_overview()
        # The bar is on stderr, mostly in the same terminal: without clearing, the answer would begin behind it.
        bar.clear()
        say(f"[{n + 1}/{len(jobs)}] {printable(prompt_of(answer.messages))}\n")
        for k, part in enumerate(answer.parts):
            if isinstance(part, str):
                say(printable(part).strip("\n"))
            else:
                say(caption(sum(isinstance(p, Picture) for p in answer.parts[: k + 1]), part))
        if answer.stop != "end":
            say(f"[ends here: {answer.stop_meaning}]")
        say(f"\n{folder / 'index.html'}\n")
        bar.update()

    def progress(step: int, steps: int) -> None:
        bar.set_postfix_str(f"painting, step {step} of {steps}" if step < steps else "")

    with tqdm(total=len(waiting), unit="answer", leave=False, disable=None) as bar:
        try:
            duo.write_many(waiting, batch=batch, done=done, progress=progress)
        except (KeyboardInterrupt, BrokenPipeError) as e:
            # Several were being written at once; those that had not begun leave no page.
            status = ended_early(e)
            for answer in waiting:
                if answer.parts and number[answer] not in cards:
                    done(answer)
            if cards:
                write_overview()
            return status
    write_overview()
    say(f"{len(cards)} {f'of {len(jobs)} ' if problems else ''}answers: {out / 'index.html'}")
    return 1 if problems else 0


def ended_early(e: KeyboardInterrupt | BrokenPipeError) -> int:
    """The exit status, of an end in the middle of which what is there is saved. A reader that has gone has seen enough."""
    if isinstance(e, BrokenPipeError):
        return 1
    print(f"\n{STOPS['interrupted']}; saving what is there", file=sys.stderr)
    return interrupt.status(e)


def say(text: str, end: str = "\n") -> None:
    """To stdout, at once. If that takes no more, all goes on without it: what matters is saved in files."""
    try:
        print(text, end=end, flush=True)
    except BrokenPipeError:
        abandon_stdout()
        raise
    except OSError as e:
        abandon_stdout()
        LOST.append(e)
        report(f"stdout: {e.strerror}: nothing more appears there, the answer is saved all the same")


def report(problem: InputError | str) -> None:
    """One line on stderr, whatever is in it."""
    print("error:", printable(str(problem)).replace("\n", " "), file=sys.stderr)


def unique(names: list[str]) -> list[str]:
    """The names, a second "a" as "a-2": known before anything is saved, whatever is finished first."""
    taken = []
    for name in names:
        # "a-2" may itself be a name that somebody gave, so the next free number is looked for among all.
        numbered = (name if k == 1 else f"{name}-{k}" for k in count(1))
        taken.append(next(n for n in numbered if n not in taken))
    return taken


def show(duo: DuoGen, answer: Answer) -> None:
    """Write the answer, and to the terminal as it is written; a bar runs where a picture is painted, if someone sees it."""
    number = 0  # of the picture
    new_line = True  # whether the terminal stands at the start of one
    bar = tqdm(disable=True)  # until there is a picture to paint

    # tqdm counts up by differences; the sampler says how far it is.
    def progress(done: int, _: int) -> None:
        bar.update(done - bar.n)

    try:
        for event in duo.stream(answer, progress):
            # The model puts line breaks around pictures. A caption has ended its line already, so they are not doubled.
            if isinstance(event, Text):
                text = event.text.lstrip("\n") if new_line else event.text
                text = printable(text)  # a model's words must not steer the terminal
                say(text, end="")
                new_line = text.endswith("\n") if text else new_line
            elif isinstance(event, Paint):
                number += 1
                say("" if new_line else "\n", end="")
                bar = tqdm(total=answer.settings.steps, desc=f"picture {number}", leave=False, disable=None)
            elif isinstance(event, Picture):
                bar.close()
                say(caption(number, event))
                new_line = True
    finally:
        # However it ends, the shell's prompt or an error begins on a line of its own.
        bar.close()
        say("" if new_line else "\n", end="")


def caption(number: int, picture: Picture) -> str:
    return f"[picture {number}: {picture.image.width} x {picture.image.height}, {picture.seconds:.1f} s]"


if __name__ == "__main__":
    sys.exit(main())
