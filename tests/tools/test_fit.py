"""What sampling is said to take, against PyTorch's own record of allocations; and that the documents repeat it."""

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import dit
import flow
import model
import vae
from bench.measure import peak
from connector import Connector, features
from ops import Segments
from pipeline import Settings
from sample import main
from tools import fit
from tools.fit import Fit, Load
from tools.plan import pretend

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def fused_attention(monkeypatch):
    """As on a GPU, attention leaves nothing but its result."""
    for module in (dit, model, vae):
        monkeypatch.setattr(module, "attention", lambda q, *_, **__: torch.empty(q.shape, dtype=q.dtype))


@torch.no_grad()
def highest(step) -> int:
    """Bytes at the highest moment, beside what there was before."""
    return peak(step, torch.device("cpu"))


def test_painting(fused_attention):
    c = dit.DiTConfig(4, 3, 128, 4.0, 16, text_embed_dim=64, crossattn_proj_in_channels=64)
    net, context = dit.DiT.from_config(c), torch.randn(300, 64)
    clean, schedule = [torch.randn(16, 24, 24) for _ in range(2)], flow.shift_schedule(4)

    def paint():
        flow.denoise(net, [clean] * 2, [(24, 24)] * 2, [context] * 2, [context] * 2, [0, 1], sigmas=schedule, guidance=3.0)

    said = fit.painting_bytes(pretend(dit.DiT, c), (24, 24), 2, 3, 2, 300, 4)
    assert said == pytest.approx(highest(paint), rel=0.03)


def test_a_painting_is_told_by_its_first_steps():
    net = pretend(dit.DiT, dit.PRESETS["tiny"])
    few, many = (fit.painting_bytes(net, (64, 64), 1, 2, 2, 40, steps) for steps in (4, 40))
    assert many - few == pytest.approx(36 * (9 * 6 + 2) * 256 * 4, rel=0.01)  # modulations of the other steps


def test_reading(fused_attention):
    vision = model.VisionConfig(128, 256, depth=2, num_heads=4, intermediate_size=344)
    c = model.MLLMConfig(256, 1024, 4, 4, 2, 500, 1e-6, vision, mrope_section=(8, 12, 12))
    mllm, ids, positions = model.MLLM.from_config(c), torch.arange(1, 301), torch.arange(300).expand(3, -1)
    cache, connector = model.KVCache(c, 300), Connector(4 * 256, 64)

    def read():
        hidden = mllm(ids, positions, Segments([300]), cache=cache)
        connector(features(hidden))

    fake = pretend(model.MLLM, c)
    said = fit.reading_bytes(fake, pretend(lambda _: Connector(4 * 256, 64), None), 300)
    assert said == pytest.approx(highest(read), rel=0.03)
    pixels = torch.randn(24 * 24, 1176)
    got = highest(lambda: mllm.visual(pixels, [(24, 24)])) + pixels.nbytes
    assert fit.tower_bytes(fake, [(24, 24)]) == pytest.approx(got, rel=0.03)


def test_vae(fused_attention):
    c = vae.VAEConfig(32)
    net, x, z = vae.VAE.from_config(c), torch.rand(1, 3, 128, 96), torch.randn(1, 16, 16, 12)
    got = max(highest(lambda: net.decode_latents(z)), highest(lambda: net.encode_latents(x)))
    assert fit.vae_bytes(pretend(vae.VAE, c), (128, 96)) == pytest.approx(got, rel=0.1)


@pytest.fixture(scope="module")
def full():
    """Qwen2.5-VL-7B and Cosmos-Predict2.5-2B."""
    return Fit(model.PRESETS["7B"], dit.PRESETS["2B"], vae.PRESETS["wan2.1"], Load(Settings(), (480, 480)))


def test_full_size_in_round_numbers(full):
    """The published parameters, and 56 KiB of keys and values for each token."""
    f = full.ask(Load(Settings(max_tokens=1000, max_images=2), (448, 448), batch=3, given=1))
    assert f.capacity == fit.PROMPT + 3 * (16 * 16 + 2) + 1000
    assert sum(f.weights().values()) == pytest.approx(2 * (8.29e9 + 2.06e9), rel=0.02)
    assert f.caches() == pytest.approx(3 * f.capacity * (56 * 1024 + 4 * 1024), rel=0.001)
    least = max(f.weights()[k] for k in f.weights()) / fit.GB
    assert least < f.need(True) < f.need(False)


def test_more_takes_more():
    long = dataclasses.replace(model.PRESETS["tiny"], max_position_embeddings=10**5)
    tiny = Fit(long, dit.PRESETS["tiny"], vae.PRESETS["tiny"], Load(Settings(), (480, 480)))

    def need(size=(480, 480), batch=1, given=0, offload=False, **settings):
        return tiny.ask(Load(Settings(**settings), size, batch, given)).need(offload)

    for more in ({"size": (704, 1280)}, {"batch": 4}, {"given": 3}, {"max_images": 9}, {"max_tokens": 4096}):
        assert need(**more) > need(), more
    assert need(guidance=1.0) < need() and need(use_condition_images=False) < need()


def test_the_table_of_the_document():
    """`python -m tools.fit` makes it."""
    text = (ROOT / "docs/fit.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("|")] == fit.markdown().splitlines()


def test_the_command(full, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.DuoGen.from_pretrained", None)
    flags = "--plan --mllm 7B --dit 2B --vae wan2.1 --height 704 --width 1280 --batch 8".split()
    assert main(flags) == 0
    out = capsys.readouterr().out
    full.ask(Load(Settings(), (704, 1280), 8))
    assert re.search(rf"with --offload +{full.need(True):.2f} GB +fits on 24 GB: no, 48 GB: yes", out) and "8 at a time" in out
    assert main(["--plan"]) == 0 and "64 x 64" in capsys.readouterr().out  # the bundled miniature's own settings
    assert main(["--plan", "--mllm", "9B"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: --mllm 9B") and err.count("\n") == 1
