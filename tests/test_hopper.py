"""Attention in Gluon: what it declines and how it walks, on any machine; what it computes, on a Hopper GPU."""

import math
from types import SimpleNamespace

import pytest
import torch

import hopper
import kernels
from ops import Segments
from tools import check_hopper

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


@pytest.mark.parametrize("change", ["", "gluon", "version", "fp32", "Ampere", "interpreted", "strides", "switch"])
def test_one_thing_that_is_missing_leaves_the_call_to_kernels(monkeypatch, change):
    """Of a GPU there is only a picture: what asks for one is told that it is there."""
    monkeypatch.setattr(hopper, "gluon", None if change == "gluon" else object())
    version = "3.5.1" if change == "version" else hopper.TRITON + "0"
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
    assert result == ("kernels" if change else "hopper")


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


# ---------------------------------------------------------------------------------------------------------------- results


@on_hopper
def test_forward():
    setup = check_hopper.Setup.of(rehearse=False)._replace(rounds=2)
    for record in check_hopper.check_forward(setup, math.inf):
        assert record["right"] and record["rounds"] == 2, record


@on_hopper
def test_backward():
    setup = check_hopper.Setup.of(rehearse=False)._replace(rounds=2)
    for record in check_hopper.check_backward(setup, math.inf):
        assert record["right"] and record["rounds"] == 2, record
