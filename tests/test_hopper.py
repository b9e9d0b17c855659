"""Attention in Gluon: what it declines, how it walks and what an H200 found, on any machine; what it computes, on Hopper."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hopper
import kernels
from bench.attention_peers import Case
from ops import Segments
from tools import check_hopper

ROOT = Path(__file__).parent.parent
needs_gluon = pytest.mark.skipif(hopper.gluon is None, reason="Triton has no Gluon here")
GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
on_hopper = pytest.mark.skipif(not GPU or kernels.INTERPRETED, reason="needs a Hopper GPU, and TRITON_INTERPRET=0")


# ------------------------------------------------------------------------------------------------------------- the choice


def test_heads_that_lie_side_by_side_fit():
    x = torch.empty(10, 6, 128, dtype=torch.bfloat16)
    q, k, v = x.split((4, 1, 1), 1)
    assert all(map(hopper.fits, (x, q, k, v, x[3:7], x[:, :2])))
    assert not hopper.fits(x[:0])
    assert not hopper.fits(x[..., ::2]) and not hopper.fits(x[..., :64])
    assert not hopper.fits(x[:, ::2]) and hopper.fits(x[:, 1:2])
    assert not hopper.fits(torch.empty(6, 10, 128).transpose(0, 1))
    assert not hopper.fits(x[:1].expand(10, 6, 128))
    # Every second element: two bytes past an address that the copying unit would take.
    assert not hopper.fits(torch.empty(1 + 10 * 128, dtype=torch.bfloat16)[1:].view(10, 1, 128))


def test_no_gpu_no_gluon():
    x = torch.empty(10, 6, 128, dtype=torch.bfloat16)
    assert not hopper.takes(x, x, x)


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("change", ["", "gluon", "version", "fp32", "Ampere", "interpreted", "strides", "switch"])
def test_one_thing_that_is_missing_leaves_the_call_to_kernels(monkeypatch, change, asked):
    """Of a GPU there is only a picture: what asks for one is told that it is there. A version can be asked for."""
    monkeypatch.setattr(hopper, "ANY_TRITON", asked)
    monkeypatch.setattr(hopper, "gluon", None if change == "gluon" else object())
    version = "3.9.0" if change == "version" else hopper.TRITON[0] + "0"
    knobs = SimpleNamespace(runtime=SimpleNamespace(interpret=change == "interpreted"))
    monkeypatch.setattr(hopper, "triton", SimpleNamespace(__version__=version, knobs=knobs))
    monkeypatch.setattr(hopper, "_capability", lambda device: (8, 0) if change == "Ampere" else (9, 0))
    monkeypatch.setattr(hopper, "forward", lambda *call: "hopper")
    monkeypatch.setattr(kernels, "forward", lambda *call: "kernels")
    monkeypatch.setattr(kernels, "GLUON", change != "switch")

    class OnGPU(torch.Tensor):
        is_cuda = True

    dtype = torch.float32 if change == "fp32" else torch.float16
    x = torch.empty(10, 4, 128, dtype=dtype).as_subclass(OnGPU)
    if change == "strides":
        x = x[:, ::2]
    s = Segments([10])
    result = kernels.best_forward(x, x, x, kernels.Call(s, s, False, 1.0))
    declined = change != "" and not (change == "version" and asked)
    assert result == ("kernels" if declined else "hopper")


@pytest.mark.parametrize("value, asked", [(None, False), ("1", True), ("0", False)])
def test_the_environment_asks(value, asked):
    env = {name: text for name, text in os.environ.items() if name != "HOPPER_ANY_TRITON"}
    if value is not None:
        env["HOPPER_ANY_TRITON"] = value
    code = "import hopper; print(hopper.ANY_TRITON)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(asked)


# --------------------------------------------------------------------------------------------------------------- the walk


class Address:
    """What the kernel makes of a list: Address(x) + 3, loaded, is x[3]."""

    def __init__(self, values, at=0):
        self.values, self.at = values, at

    def __add__(self, n):
        return Address(self.values, self.at + n)


@pytest.fixture
def plain(monkeypatch):
    """The kernel's own lines on Python's numbers."""
    if hopper.gluon is None:
        pytest.skip("Triton has no Gluon here")
    monkeypatch.setattr(hopper, "gl", SimpleNamespace(load=lambda a: a.values[a.at], minimum=min, maximum=max))
    for name in ("M", "N", "CONSUMERS"):
        monkeypatch.setattr(hopper, name, getattr(hopper, name).value)


@pytest.mark.parametrize("causal", [False, True])
def test_every_query_meets_each_of_its_keys_once(plain, causal):
    """In boxes that stay inside the sequence, and unmasked only where the whole tile of queries reads all of the box."""
    lengths = [1, 17, 64, 127, 128, 129, 256, 257, 300, 500]
    pairs = [(a, b) for a in lengths for b in (0, *lengths)]
    queries, keys = Segments([a for a, _ in pairs]), Segments([b for _, b in pairs])
    tiles = kernels.tile_list(queries, keys, causal, hopper.QUERIES, "queries")
    heads = 3
    met = {}
    for job in range(heads * len(tiles)):
        lists = (Address(x) for x in (tiles.flatten().tolist(), queries.bounds, keys.bounds))
        head, m0, q0, nq, k0, nk, visits, masked = hopper._job.fn(*lists, job, heads, len(tiles), causal)
        s = queries.bounds.index(q0)
        assert (nq, nk, k0) == (*pairs[s], keys.bounds[s])
        met.setdefault((s, m0), []).append(head)
        if head:
            continue
        first = hopper._first_key.fn(visits, nk)
        boxes = [(first, (visits - 1) * 128)] + [((visits - 1 - i) * 128,) * 2 for i in range(1, visits)]
        for n, _ in boxes:
            assert n + 128 <= nk or (n == 0 and visits == 1)
        for i in range(m0, min(nq, m0 + hopper.QUERIES)):
            end = min(nk, max(0, i + 1 + nk - nq)) if causal else nk
            seen = []
            for at, (n, begin) in enumerate(boxes):
                cols = range(n, n + 128)
                if at < masked:
                    cols = [c for c in cols if begin <= c < end]
                seen += cols
            assert sorted(seen) == list(range(end)), (pairs[s], i)
    # Every tile of every sequence, for each head once.
    assert all(sorted(found) == list(range(heads)) for found in met.values())
    assert len(met) == sum(math.ceil(a / 128) for a, _ in pairs)


@needs_gluon
def test_a_program_is_its_consumers():
    assert hopper.M.value * hopper.CONSUMERS.value == hopper.QUERIES


# ------------------------------------------------------------------------------------------ docs/bench/hopper_h200.json

MEASURED = json.loads((ROOT / "docs/bench/hopper_h200.json").read_text())
PEERS = ("cudnn", "fa2", "triton")


def of_the_best(shape: str) -> float:
    """Speed beside the fastest of the others."""
    ms = MEASURED["ms"][shape]
    return min(ms[name] for name in PEERS if name in ms) / ms["hopper"]


@pytest.mark.parametrize("triton", hopper.TRITON)
def test_an_h200_found_it_right(triton):
    """With every Triton that has it as a default: in each configuration of the check, and as often as that asks for."""
    setup = check_hopper.Setup.of(rehearse=False)
    files = [json.loads(file.read_text()) for file in ROOT.glob("docs/bench/hopper_*.json")]
    checks = [c for file in files if file["machine"]["triton"].startswith(triton) for c in file["checks"]]
    forward = [c for c in checks if c["check"] == "forward"]
    backward = [c for c in checks if c["check"] == "backward"]
    configurations = 2 * len(check_hopper.FORMS) * len(list(setup.kinds_and_heads()))
    assert len({c["what"] for c in forward}) == configurations and len({c["what"] for c in backward}) == 6
    assert all(c["rounds"] == check_hopper.ROUNDS and c["error"] < 2.5e-3 and c["lse"] < 1e-5 for c in forward)
    assert all(c["rounds"] == 5 and c["error"] < 3.5e-3 for c in backward)


def test_the_check_shows_the_committed_times_beside_those_of_the_same_gpu():
    def table_on(device: str) -> str:
        time = {"time": "hopper", "shape": "1x4500", "ms": 1.0, "tflops": 100.0}
        return check_hopper.table([{"machine": {"device": device, "triton": "3.7.1"}}, time])

    ran = f"{check_hopper.SHAPES[2].flops / MEASURED['ms']['1x4500']['hopper'] / 1e9:.0f}"
    assert "device NVIDIA H200, triton 3.7.1" in table_on("NVIDIA H200")
    assert table_on("NVIDIA H200").splitlines()[-1].split() == ["1x4500", "100", ran]
    assert table_on("NVIDIA H100").splitlines()[-1].split() == ["1x4500", "100"]


def test_slower_than_others_only_where_a_launch_takes_longer_than_the_call():
    """A quarter of kernels.py's time is saved, and nothing is far from the best, but for calls that wait for the host."""
    assert list(MEASURED["ms"]) == [shape.name for shape in check_hopper.SHAPES]
    launch = MEASURED["launch us"]["hopper"] / 1000
    short = [shape for shape in MEASURED["ms"] if of_the_best(shape) < 0.95]
    assert short == ["2x900", "64x256", "256x64"]
    for shape, ms in MEASURED["ms"].items():
        if shape in short:
            assert ms["hopper"] < 1.25 * launch
        else:
            assert of_the_best(shape) > 0.98 and ms["triton"] > 1.32 * ms["hopper"]


def test_nothing_that_hopper_takes_would_pay_at_cudnn():
    """Where cuDNN is faster, the 980 attentions of a picture gain less than cuDNN takes to plan its length."""
    first = json.loads((ROOT / "docs/bench/tune_h200.json").read_text())["first call"]
    # The first calls of the process start cuDNN as well.
    plan = max(ms for name, ms in first.items() if "forward" in name and ms < 500)
    for ms in MEASURED["ms"].values():
        if "cudnn" in ms:
            assert 28 * 35 * (ms["hopper"] - ms["cudnn"]) < plan


@pytest.mark.parametrize("taken", [True, False])
def test_auto_asks_cudnn_only_where_hopper_declines(monkeypatch, taken):
    monkeypatch.setattr(hopper, "takes", lambda *_: taken)
    monkeypatch.setattr(kernels, "_architecture", lambda device: 9)
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)
    x = torch.empty(1, 16, 128, dtype=torch.bfloat16)
    s = Segments([4096] * 4)
    assert kernels.sdpa_is_faster(x, x, x, s, s, False) is not taken
    monkeypatch.setattr(kernels, "GLUON", False)
    assert kernels.sdpa_is_faster(x, x, x, s, s, False)


def test_the_readme_shows_the_measurement():
    shown = (ROOT / "README.md").read_text().split("<!-- hopper -->\n")[1].split("\n<!-- end of hopper -->")[0]
    assert shown == readme_table()


def readme_table():
    head = "| attention forward, TFLOP/s | hopper.py | kernels.py | cuDNN | FlashAttention-2 | beside the fastest other |"
    lines = [head, "|---|---|---|---|---|---|"]
    for shape in check_hopper.SHAPES:
        ms = MEASURED["ms"][shape.name]
        case = Case("", shape.lengths, shape.lengths, shape.heads, shape.kv_heads, 128)
        cells = [f"{case.shape}{', causal' if shape.causal else ''}"]
        for name in ("hopper", "triton", "cudnn", "fa2"):
            cells.append(f"{shape.flops / ms[name] / 1e9:.0f}" if name in ms else "-")
        lines.append(f"| {' | '.join([*cells, f'{of_the_best(shape.name):.2f}'])} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def any_triton(monkeypatch):
    monkeypatch.setattr(hopper, "ANY_TRITON", True)


@on_hopper
@pytest.mark.usefixtures("any_triton")
def test_forward():
    setup = check_hopper.Setup.of(rehearse=False)._replace(rounds=2)
    for record in check_hopper.check_forward(setup, math.inf):
        assert record["right"] and record["rounds"] == 2, record


@on_hopper
@pytest.mark.usefixtures("any_triton")
def test_backward():
    setup = check_hopper.Setup.of(rehearse=False)._replace(rounds=2)
    for record in check_hopper.check_backward(setup, math.inf):
        assert record["right"] and record["rounds"] == 2, record
