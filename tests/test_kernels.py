"""Attention over packs against a written-out softmax, over every kind of mask, with gradients."""

import pytest
import torch
from torch import Tensor

import ops
from checkpoint import InputError
from ops import Segments, attention


def reference(q, k, v, bounds_q, bounds_k, causal):
    """One sequence and one head at a time, in plain sight."""
    out, group = torch.zeros_like(q), q.shape[1] // k.shape[1]
    for a, b, c, d in zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False):
        for h in range(q.shape[1]):
            scores = q[a:b, h] @ k[c:d, h // group].T * q.shape[-1] ** -0.5
            if causal:
                scores = scores.masked_fill(~torch.ones(b - a, d - c, dtype=torch.bool).tril((d - c) - (b - a)), -torch.inf)
            out[a:b, h] = scores.softmax(-1).nan_to_num() @ v[c:d, h // group]
    return out


LENGTHS = [
    ([3, 5, 0, 7], [3, 5, 0, 7]),  # ragged, with an empty sequence
    ([4, 4], [4, 4]),  # equal: seen as a dense batch
    ([2, 3, 4], [9, 1, 4]),  # cross-attention
    ([2, 3], [0, 4]),  # queries without any key
    ([1], [20]),  # decoding one token
    ([5], [20]),  # a prompt's second half on a cache
    ([4, 4], [2, 6]),
    ([5, 5], [2, 2]),  # causal: queries before the first key
    ([0, 2], [600, 3]),  # keys that nothing reads
    ([3, 0], [0, 4]),
    ([0, 0, 3], [5, 5, 0]),
    ([2, 2, 3], [600, 600, 4]),
    ([600, 3], [600, 3]),  # beyond what PyTorch's kernel takes for one block
]


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("group", [1, 7])
def test_equals_softmax(lengths, causal, group):
    bounds = [torch.tensor([0, *n]).cumsum(0).int() for n in lengths]
    nq, nk = (int(b[-1]) for b in bounds)
    q, k, v = (torch.randn(n, h, 16, dtype=torch.float64, requires_grad=True) for n, h in ((nq, 2 * group), (nk, 2), (nk, 2)))
    out = attention(q, k, v, *bounds, causal=causal)
    assert torch.allclose(out, reference(q, k, v, *(b.tolist() for b in bounds), causal), atol=1e-12)
    for gradient in torch.autograd.grad(out.square().sum(), (q, k, v)):
        assert gradient.isfinite().all()


def test_training_in_bf16_on_a_cpu_computes_in_fp32():
    lengths = [16, 16, 40]
    narrow = [torch.randn(72, heads, 64).bfloat16().requires_grad_() for heads in (4, 2, 2)]
    wide = [x.detach().float().requires_grad_() for x in narrow]
    expected = attention(*wide, Segments(lengths), causal=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention(*narrow, Segments(lengths), causal=True)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected.bfloat16())
    upstream = torch.randn_like(found)
    gradients = torch.autograd.grad(found, narrow, upstream)
    for a, b in zip(gradients, torch.autograd.grad(expected, wide, upstream.float()), strict=True):
        assert torch.equal(a, b.bfloat16())


def test_segments_stand_for_boundaries_and_read_nothing_back(monkeypatch):
    lengths = [3, 5, 0, 7]
    segments, cu = Segments(lengths), torch.tensor([0, 3, 8, 8, 15])
    assert segments.cu.tolist() == list(segments.bounds) == cu.tolist() and segments.cu.dtype == torch.int32
    assert (len(segments), segments.total, segments.longest, segments.lengths) == (4, 15, 7, tuple(lengths))
    assert Segments.of(cu).lengths == segments.lengths and Segments.of(segments) is segments
    assert (len(Segments([])), Segments([]).total, Segments([]).longest) == (0, 0, 0)
    q, k, v = (torch.randn(15, 2, 16) for _ in range(3))
    expected = attention(q, k, v, cu, causal=True)
    monkeypatch.setattr(Tensor, "tolist", None)
    assert torch.equal(attention(q, k, v, segments, causal=True), expected)


@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("capacity", [24, 600])
def test_a_static_cache_reads_the_first_rows_alone(capacity, on_device, monkeypatch):
    used = torch.tensor([1, 17, 0, 24], dtype=torch.int32)
    q, k, v = torch.randn(4, 14, 16), torch.randn(4 * capacity, 2, 16), torch.randn(4 * capacity, 2, 16)
    rows = torch.cat([torch.arange(capacity * s, capacity * s + n) for s, n in enumerate(used.tolist())])
    expected = attention(q, k[rows], v[rows], Segments([1] * 4), Segments(used.tolist()))
    if on_device:  # what a GPU without the kernels computes
        monkeypatch.setattr(ops, "_attention_to_known_rows", ops._attention_to_masked_rows)
    for x in (k, v):  # a buffer is not initialised
        x[torch.ones(len(x), dtype=torch.bool).index_fill(0, rows, False)] = torch.nan
    out = attention(q, k, v, Segments([1] * 4), Segments([capacity] * 4), causal=True, k_lengths=used)
    assert torch.allclose(out, expected, atol=1e-6) and (out[2] == 0).all()


def test_the_choice_is_process_wide_and_checked():
    assert ops.get_backend() == "auto"
    with pytest.raises(InputError, match="flash"):
        ops.set_backend("flash")
    ops.set_backend("sdpa")
    assert ops.get_backend() == "sdpa"
    ops.set_backend("auto")


def test_a_pack_without_queries_is_empty():
    k = torch.randn(8, 2, 16)
    assert attention(k[:0], k, k, torch.tensor([0, 0, 0]), torch.tensor([0, 3, 8])).shape == (0, 2, 16)


def test_neighbours_never_mix():
    cu = torch.tensor([0, 5, 12, 20], dtype=torch.int32)
    q, k, v = (torch.randn(20, 2, 16) for _ in range(3))
    before = attention(q, k, v, cu)
    k[5:12], v[5:12] = 1e3, float("nan")
    after = attention(q, k, v, cu)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[12:], after[12:])


@pytest.mark.parametrize("kind", ["boundaries", "heads", "sequences", "lengths"])
def test_wrong_shapes_raise(kind):
    q, k = torch.randn(6, 3 if kind == "heads" else 4, 8), torch.randn(6, 2, 8)
    cu_q = torch.tensor([0, 2, 5 if kind == "boundaries" else 6], dtype=torch.int32)
    cu_k = torch.tensor([0, 6], dtype=torch.int32) if kind == "sequences" else None
    with pytest.raises(ValueError, match="attention"):
        attention(q, k, k, cu_q, cu_k, k_lengths=cu_q if kind == "lengths" else None)

