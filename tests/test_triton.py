"""The Triton kernels against float64, interpreted on the CPU: conftest.py switches the interpreter on before they are read."""

import sys

import pytest
import torch
from torch import Tensor

import kernels
import ops
from checkpoint import InputError
from ops import Segments, attention

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:triton", "ignore::RuntimeWarning:triton"),
]


def leaves(sq, sk, heads, kv_heads, dim, dtype=torch.float32):
    """q, k, v as a fused projection leaves them: slices of wider rows, last dimension contiguous."""
    rows_q = torch.randn(sq.total, heads + 3, dim, dtype=dtype)
    rows_k = torch.randn(sk.total, 2 * kv_heads + 1, dim, dtype=dtype)
    return [x.requires_grad_() for x in (rows_q[:, :heads], *rows_k[:, : 2 * kv_heads].chunk(2, 1))]


def with_gradients(leaves, sq, sk, causal, backend, upstream, **options):
    o = attention(*leaves, sq, sk, causal=causal, backend=backend, **options)
    return o.detach(), *torch.autograd.grad(o, leaves, upstream.to(o.dtype))


def distance(a, b):
    return ((a.double() - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.fixture
def poisoned(monkeypatch):
    """What a kernel does not write stays NaN."""
    for name in ("empty_like", "Tensor.new_empty"):
        owner = Tensor if "." in name else torch
        real = getattr(owner, name.split(".")[-1])

        def poison(*args, real=real, **kwargs):
            x = real(*args, **kwargs)
            return x.fill_(torch.nan) if x.is_floating_point() else x

        monkeypatch.setattr(owner, name.split(".")[-1], poison)


@pytest.mark.parametrize(
    "queries, keys, heads, kv_heads, dim, causal",
    [
        ([1, 17, 0, 33], None, 2, 2, 16, False),
        ([63, 64, 65], None, 1, 1, 16, True),
        ([129, 1], None, 1, 1, 32, True),
        ([5, 40, 3], [70, 17, 0], 2, 1, 16, False),  # cross-attention; the last has no key
        ([5, 33, 40], [64, 65, 7], 2, 1, 16, True),  # bottom-right; in the last 33 queries come before the first key
        ([33, 7], None, 7, 1, 16, True),
        ([64, 32], None, 7, 1, 16, False),  # whole tiles alone
        ([34], None, 1, 1, 64, True),
        ([34], [37], 1, 1, 80, True),
        ([34], [37], 1, 1, 128, False),
    ],
)
def test_kernels_equal_float64(poisoned, queries, keys, heads, kv_heads, dim, causal):
    assert_equal_float64(queries, keys, heads, kv_heads, dim, causal)


def assert_equal_float64(queries, keys, heads, kv_heads, dim, causal):
    sq, sk = Segments(queries), Segments(keys or queries)
    small = leaves(sq, sk, heads, kv_heads, dim)
    exact = [x.detach().double().requires_grad_() for x in small]
    upstream = torch.randn(sq.total, heads, dim)
    new = with_gradients(small, sq, sk, causal, "triton", upstream)
    for a, b in zip(new, with_gradients(exact, sq, sk, causal, "sdpa", upstream), strict=True):
        assert a.shape == b.shape and distance(a, b) <= 1e-6


@pytest.mark.parametrize("m, n", [(16, 32), (32, 16), (64, 16)])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("causal", [False, True])
def test_tiles_of_any_proportion(poisoned, monkeypatch, m, n, dim, causal):
    """Whole tiles and a ragged one, which the TMA unit does not copy, of grouped heads, in sequences behind each other."""
    monkeypatch.setattr(kernels, "EXACT", kernels.Tiles(m, n, 4, 1))
    assert_equal_float64([50, 3, 64], [55, 20, 64], 2, 1, dim, causal)


def test_half_precision_kernels(poisoned):
    s = Segments([33, 20])
    half = leaves(s, s, 2, 1, 64, torch.float16)
    exact, upstream = [x.detach().double().requires_grad_() for x in half], torch.randn(53, 2, 64).half()
    new, old = (with_gradients(half, s, s, True, backend, upstream) for backend in ("triton", "sdpa"))
    for a, b, c in zip(new, old, with_gradients(exact, s, s, True, "sdpa", upstream), strict=True):
        assert a.dtype == torch.float16 and distance(a, c) <= max(5e-4, 1.2 * distance(b, c))


def test_kernels_take_extreme_scores_and_plain_boundaries():
    q = torch.tensor([[[300.0] * 16], [[-300.0] * 16], [[0.0] * 16]])
    k, v = torch.randn(3, 1, 16), torch.randn(3, 1, 16)
    cu, s = torch.tensor([0, 3]), Segments([3])
    o = attention(q, k, v, cu, causal=True, scale=2.0, backend="triton")
    assert distance(o, attention(*(x.double() for x in (q, k, v)), s, causal=True, scale=2.0)) <= 1e-6


def test_kernels_take_what_the_tma_unit_cannot():
    s = Segments([40])
    # Odd strides, off by four bytes.
    odd = [torch.randn(40 * 17 + 1)[1:].view(40, 1, 17)[..., :16].requires_grad_() for _ in range(3)]
    exact = [x.detach().double().requires_grad_() for x in odd]
    upstream = torch.randn(40, 1, 16)
    new, old = (with_gradients(x, s, s, True, name, upstream) for x, name in ((odd, "triton"), (exact, "sdpa")))
    for a, b in zip(new, old, strict=True):
        assert distance(a, b) <= 1e-6


def test_dkv_by_addresses_equals_dkv_by_descriptors():
    s = Segments([40, 70])
    q, k, v = (x.detach() for x in leaves(s, s, 2, 1, 16))
    call, do = kernels.Call(s, s, True, 0.25), torch.randn(110, 2, 16)
    o, lse = kernels.forward(q, k, v, call)
    rest = q, k, v, do, lse, kernels.output_sums(o, do), call
    for a, b in zip(kernels.backward_dkv(*rest), kernels.backward_dkv(*rest, by_tma=False), strict=True):
        assert distance(a, b.double()) <= 1e-6


def test_kernels_keep_neighbours_apart_and_repeat_themselves(poisoned):
    s = Segments([20, 40, 35])
    one, upstream = leaves(s, s, 2, 1, 16), torch.randn(95, 2, 16)
    two = [x.detach().clone() for x in one]
    for x in two:
        x[20:60] = torch.nan
    two = [x.requires_grad_() for x in two]
    upstream_two = upstream.index_fill(0, torch.arange(20, 60), torch.nan)
    first, again = (with_gradients(one, s, s, True, "triton", upstream) for _ in range(2))
    other = with_gradients(two, s, s, True, "triton", upstream_two)
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a[:20], c[:20]) and torch.equal(a[60:], c[60:]) and c[20:60].isnan().all()


@pytest.mark.parametrize("lengths, heads, kv_heads", [([300, 0, 65], 14, 2), ([64] * 3, 2, 2), ([600], 20, 1)])
@pytest.mark.parametrize("static", [False, True])
def test_decode_kernels(poisoned, monkeypatch, lengths, heads, kv_heads, static):
    """One query per sequence: 1, 2 and 3 splits; with `static` the buffers are larger than what they hold and full of NaN."""
    launches, real = [], kernels._merge
    spy = type("Spy", (), {"__getitem__": lambda _, grid: launches.append(grid) or real[grid]})
    monkeypatch.setattr(kernels, "_merge", spy())
    sq, sk, capacity = Segments([1] * len(lengths)), Segments(lengths), max(lengths) + 5
    q, k, v = (x.detach() for x in leaves(sq, sk, heads, kv_heads, 16))
    expected = attention(q.double(), k.double(), v.double(), sq, sk)
    if static:
        rows = torch.cat([torch.arange(capacity * s, capacity * s + n) for s, n in enumerate(lengths)])
        k, v = (torch.full((len(lengths) * capacity, *x.shape[1:]), torch.nan).index_copy(0, rows, x) for x in (k, v))
        sk = Segments([capacity] * len(lengths))
    used = torch.tensor(lengths, dtype=torch.int32) if static else None
    o = attention(q, k, v, sq, sk, causal=True, k_lengths=used, backend="triton")
    assert distance(o, expected) <= 1e-6 and bool(launches) == (max(lengths) > 256)


def test_twenty_steps_with_either_backend(monkeypatch):
    s, losses = Segments([9, 14]), {}
    monkeypatch.setattr(ops, "_backend", "auto")  # what is set here is undone after the test
    for backend in ("triton", "sdpa"):
        torch.manual_seed(1)
        ops.set_backend(backend)
        embed, qkv, head = torch.nn.Embedding(11, 32), torch.nn.Linear(32, 64), torch.nn.Linear(32, 11)
        # AdamW divides by the size of the gradients, and so makes whole steps of what is rounding in the smallest.
        optimizer = torch.optim.SGD([*embed.parameters(), *qkv.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
        ids, losses[backend] = torch.randint(11, (24,)), []
        for _ in range(20):
            x = embed(ids[:-1])
            q, k, v = qkv(x).unflatten(1, (4, 16)).split((2, 1, 1), 1)
            loss = torch.nn.functional.cross_entropy(head(x + attention(q, k, v, s, causal=True).flatten(1)), ids[1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[backend].append(loss.item())
    assert losses["triton"] == pytest.approx(losses["sdpa"], rel=2e-6) and losses["sdpa"][-1] < 0.5 * losses["sdpa"][0]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"dim": 24}, "head dim 24"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.bfloat16}, "bf16"),
        ({"scale": -1.0}, "positive"),
        ({"interpret": False}, "TRITON_INTERPRET"),
    ],
)
def test_what_the_kernels_cannot_do_is_an_error(monkeypatch, change, message):
    monkeypatch.setattr(kernels, "INTERPRETED", change.get("interpret", True))
    x, s = torch.randn(4, 1, change.get("dim", 16), dtype=change.get("dtype")), Segments([4])
    with pytest.raises(InputError, match=message):
        attention(x, x, x, s, scale=change.get("scale"), backend="triton")
    assert attention(x, x, x, s).shape == x.shape  # auto: on the CPU always PyTorch's


def test_static_lengths_have_no_backward_pass():
    q, k = torch.randn(1, 1, 16, requires_grad=True), torch.randn(8, 1, 16)
    with pytest.raises(ValueError, match="backward"):
        attention(q, k, k, Segments([1]), Segments([8]), k_lengths=torch.tensor([3], dtype=torch.int32), backend="triton")


def test_tiles_come_once_and_the_longest_first():
    sq, sk = Segments([40, 0, 70]), Segments([40, 9, 100])
    tiles = kernels.tile_list(sq, sk, True, 32, "queries")
    assert tiles is kernels.tile_list(sq, sk, True, 32, "queries")
    assert tiles.tolist() == [[2, 64], [2, 32], [2, 0], [0, 32], [0, 0]]
    assert kernels.tile_list(sk, sq, True, 64, "keys").tolist() == [[2, 0], [0, 0], [2, 64], [1, 0]]


LARGE, SMALL = kernels.Tiles(128, 64, 4, 2), kernels.Tiles(64, 64, 4, 2, cost=1.28)


@pytest.mark.parametrize(
    "lengths, heads, causal, expected",
    [
        ([4096] * 4, 16, False, LARGE),  # 2,048 programs: the GPU is full nearly to the end
        ([20480, 4500, 900, 3600, 1296, 8100], 16, False, LARGE),
        ([4096] * 4, 28, True, LARGE),
        ([64] * 81 + [32] * 9 + [4], 16, False, SMALL),  # half of a large tile would be empty
        ([129], 132, False, SMALL),  # two large tiles or three small ones
        ([1024], 17, False, SMALL),  # 136 programs on 132 processors would take two waves
        ([], 16, False, LARGE),
    ],
)
def test_small_tiles_where_large_ones_would_leave_the_gpu_idle(lengths, heads, causal, expected):
    s = Segments(lengths)
    assert kernels.quickest([LARGE, SMALL], s, s, causal, heads, "queries") is expected
    assert kernels.quickest([LARGE, SMALL], s, s, causal, heads, "queries") is expected  # as the second layer finds it


@pytest.mark.parametrize("length, expected", [(512, "small"), (4096, "large")])
def test_a_program_that_is_alone_on_its_processor_pays_off_on_long_walks(length, expected):
    alone, small = kernels.Tiles(128, 64, 8, 3, pause=96), kernels.Tiles(64, 64, 4, 2, cost=1.15)
    s = Segments([length] * 32)
    assert kernels.quickest([alone, small], s, s, False, 16, "queries") is {"small": small, "large": alone}[expected]


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(kernels, "_architecture", lambda device: 9)
    monkeypatch.setattr(kernels, "SDPA_FROM", {(9, 128): 150e9})
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: True)


def faster(queries, keys=None, heads=16, kv_heads=16, dim=128, causal=False, gradients=()):
    sq, sk = Segments(queries), Segments(keys or queries)
    q, k, v = (torch.empty(1, n, dim, dtype=torch.bfloat16) for n in (heads, kv_heads, kv_heads))
    for name in gradients:
        {"q": q, "k": k, "v": v}[name].requires_grad_()
    return kernels.sdpa_is_faster(q, k, v, sq, sk, causal)


def test_auto_leaves_long_dense_calls_without_gradients_to_cudnn(hopper):
    assert faster([4096] * 4) and faster([4500]) and faster([4096] * 4, heads=28, kv_heads=4)
    assert not faster([900] * 8) and not faster([64] * 256)
    assert not faster([4096] * 4, dim=64)  # has no entry here


@pytest.mark.parametrize("gradients", ["q", "k", "v", "qkv"])
def test_gradients_are_the_kernels_own(hopper, gradients):
    assert not faster([4096] * 4, gradients=gradients)
    with torch.no_grad():
        assert faster([4096] * 4, gradients=gradients)


def test_lengths_that_seldom_come_twice_are_the_kernels_own(hopper):
    assert not faster([20480, 4500, 900, 3600, 1296, 8100])
    assert not faster([4096] * 4, causal=True)
    assert not faster([20480] * 4, [8192] * 4)
    assert not faster([20480, 0]) and not faster([]) and not faster([0])


@pytest.mark.parametrize("name, module", [("is_available", torch.backends.cudnn), ("cudnn_sdp_enabled", torch.backends.cuda)])
def test_auto_does_without_cudnn(hopper, monkeypatch, name, module):
    monkeypatch.setattr(module, name, lambda: False)
    assert not faster([4096] * 4)


@pytest.mark.parametrize("architecture", [0, 8, 10])
def test_auto_is_as_before_on_other_architectures(hopper, monkeypatch, architecture):
    monkeypatch.setattr(kernels, "_architecture", lambda device: architecture)
    assert not faster([4096] * 4)


def test_auto_asks_the_table(monkeypatch):
    """Where the kernels could do a call, auto leaves it to PyTorch if that is faster; who asks for the kernels gets them."""
    x, s, asked = torch.randn(4, 1, 16), Segments([4]), []
    monkeypatch.setattr(ops, "_attention_on_triton", lambda q, k, v, scale, choice: choice != "sdpa")
    monkeypatch.setattr(kernels, "sdpa_is_faster", lambda *call: asked.append(call) or True)
    monkeypatch.setattr(kernels, "attention", lambda *call: "kernels")
    assert isinstance(attention(x, x, x, s, backend="auto"), Tensor) and len(asked) == 1
    assert attention(x, x, x, s, backend="triton") == "kernels" and len(asked) == 1
    monkeypatch.setattr(kernels, "sdpa_is_faster", lambda *call: False)
    assert attention(x, x, x, s, backend="auto") == "kernels"
