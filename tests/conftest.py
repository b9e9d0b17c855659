"""What every test shares: the repository root on the import path, one thread per core, fixed seeds, no network, real data."""

import os
import random
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
# A shell's background jobs ignore SIGINT, and so does what they start: Ctrl-C would not be tested there.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported; test_hub.py starts processes of its own
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the shapes are small: a second thread costs more than it brings
os.environ.setdefault("TRITON_INTERPRET", "1")  # as kernels.py is imported: its kernels then run here, if asked for by name

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


SLOWEST = ("test_nodes", "test_survival", "test_resume", "test_interrupt", "test_plan")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first: the last one of a run in two processes would else leave a core idle."""
    items.sort(key=lambda item: item.path.stem not in SLOWEST)


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data kept beside the repository; a clone has none, and the tests that read it are then skipped."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"no real data: {folder} does not exist")
    return folder


@pytest.fixture(scope="session")
def browser():
    """A Chromium that belongs to this system: the one which playwright would download is not needed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: requirements-dev.txt")
    executable = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if executable is None:
        pytest.skip("no browser: neither chromium nor google-chrome is installed")
    with playwright.sync_playwright() as p:
        # A container's root has no sandbox to run it in.
        started = p.chromium.launch(executable_path=executable, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser):
    """visit(width, height) -> a page of a new visitor; its complaints are in .errors, what it asks for is in .requests."""
    visitors = []

    def new(width: int = 1280, height: int = 800):
        context = browser.new_context(viewport={"width": width, "height": height})
        context.set_default_timeout(10_000)
        visitors.append(context)
        page = context.new_page()
        page.errors = []
        page.requests = []
        page.on("console", lambda message: message.type in ("error", "warning") and page.errors.append(message.text))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.on("request", lambda request: page.requests.append(request.url))
        return page

    yield new
    for context in visitors:
        context.close()


@pytest.fixture(scope="session")
def compiled_for_hopper():
    """A function: name of a script in tests/ -> what it prints about the machine code of the pinned Triton, or of another one.

    folder: where that Triton lies; None: it is the installed one.
    """
    pinned = ROOT / ".venv-aot"
    env = os.environ | {"TRITON_CACHE_DIR": str(pinned / "cache")}
    env.pop("TRITON_INTERPRET", None)

    def run(script: str, folder: Path | None = pinned) -> str:
        if folder == pinned and not (folder / "triton").is_dir():
            pytest.fail("the pinned compiler is missing: run `make .venv-aot/triton`")
        paths = {} if folder is None else {"PYTHONPATH": str(folder)}
        command = [sys.executable, f"tests/{script}"]
        done = subprocess.run(command, cwd=ROOT, env=env | paths, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


def make_parts(folder: Path, mllm: str = "qwen2_5_vl", dit: str = "CosmosTransformer3DModel") -> Path:
    """mllm/, dit/ and vae/ folders of a system far smaller than the miniature, of these families."""
    from dit import DiTConfig
    from families.registry import family_of, preset
    from families.wan import WanConfig
    from sketchbook import dialogues
    from tokenizer import train_bpe
    from vae import VAE

    torch.manual_seed(0)
    texts = [p["text"] for s in range(60) for m in dialogues.dialogue(s)["messages"] for p in m["content"] if "text" in p]
    tokenizer = train_bpe(texts, 600)
    config = preset("mllm", {"qwen2_5_vl": "tiny", "qwen3_vl": "tiny-qwen3-vl"}[mllm]).for_tokenizer(tokenizer)
    special = {"qwen2_5_vl": {"fullatt_block_indexes": (1,)}, "qwen3_vl": {"deepstack_visual_indexes": (0, 1)}}[mllm]
    config = replace(config, num_hidden_layers=2, vision=replace(config.vision, depth=2, **special))
    family = family_of(config)
    processor = family.Processor(patch_size=8, merge_size=2, min_pixels=256, max_pixels=4096)
    for part in (family.Model.from_config(config), tokenizer, processor):
        part.save_pretrained(folder / "mllm")
    painter = DiTConfig(2, 2, 32, adaln_lora_dim=8, text_embed_dim=32, crossattn_proj_in_channels=config.features)
    if dit == "WanTransformer3DModel":
        painter = WanConfig(2, 2, 32, ffn_dim=64, freq_dim=16, crossattn_proj_in_channels=config.features)
    family_of(painter).Model.from_config(painter).save_pretrained(folder / "dit")
    VAE.from_config(preset("vae", "tiny")).save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def parts(tmp_path_factory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))
