"""Every fused step, in PyTorch and as a kernel in Triton's interpreter, against its formula in float64; gradients too."""

import ast
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kernels
import ops
from bench.measure import peak
from checkpoint import InputError

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton 3.6's interpreter

SIZES = [(1, 80), (5, 256), (3, 3584)]  # (rows, width): one row, a width that is no power of two, the width of the 7B model


@pytest.fixture(params=["sdpa", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    ops.set_backend(request.param)
    torch.use_deterministic_algorithms(True)  # fills new memory with NaN: what a kernel leaves out shows
    yield request.param
    torch.use_deterministic_algorithms(False)
    ops.set_backend("auto")


def check(function, formula, *inputs, dtype=torch.float32, tolerance=1e-6):
    """`function` on inputs rounded to dtype, and its gradients, against `formula` on the same numbers in float64."""
    ours = [x.to(dtype).detach().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in ours]
    results = [f(*x) for f, x in ((function, ours), (formula, exact))]
    results = [r if isinstance(r, tuple) else (r,) for r in results]
    weights = [torch.randn(r.shape, dtype=torch.float64) for r in results[1]]
    grads = [
        torch.autograd.grad(sum((r * w.to(r.dtype)).sum() for r, w in zip(rs, weights, strict=True)), xs)
        for rs, xs in zip(results, (ours, exact), strict=True)
    ]
    for got, expected in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert got.shape == expected.shape
        error = (got.double() - expected).norm() / expected.norm()
        assert error < tolerance, error


def norm(x, w):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w


def turn(x, cos, sin):
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def tables(n, dim):
    angle = torch.randn(n, 1, dim // 2)
    return torch.cat((angle.cos(),) * 2, -1), torch.cat((-angle.sin(), angle.sin()), -1)


@pytest.mark.parametrize("n,width", SIZES)
def test_rms_norm(backend, n, width):
    x, delta, w = torch.randn(n, width), torch.randn(n, width), torch.randn(width)
    check(lambda x, w: ops.rms_norm(x, w, 1e-6), norm, x, w)
    check(lambda x, d, w: ops.add_rms_norm(x, d, w, 1e-6), lambda x, d, w: (x + d, norm(x + d, w)), x, delta, w)


def test_a_narrow_delta_enters_a_wide_stream(backend):
    """Under autocast the stream is fp32 and what a sub-layer adds is bf16."""
    x, delta, w = torch.randn(4, 96, requires_grad=True), torch.randn(4, 96).bfloat16().requires_grad_(), torch.randn(96)
    s, h = ops.add_rms_norm(x, delta, w, 1e-6)
    assert s.dtype == h.dtype == torch.float32 and torch.equal(s, x + delta)
    for got, like in zip(torch.autograd.grad(s.sum() + h.sum(), (x, delta)), (x, delta), strict=True):
        assert got.dtype == like.dtype


@pytest.mark.parametrize("n,heads,dim", [(1, 4, 80), (5, 6, 64), (3, 16, 128)])
@pytest.mark.parametrize("groups", [0, 1, 2])
def test_norm_rope_of_a_slice(backend, n, heads, dim, groups):
    """q and k of a fused projection: never copied, gains of their own, and the gradient reaches the projection."""
    qkv, (cos, sin) = torch.randn(n, heads + 3, dim), tables(n, dim)
    w = [torch.randn(groups, dim) if groups == 2 else torch.randn(dim)][:groups]

    def gain(w):
        return w.repeat_interleave(heads // 2, 0) if groups == 2 else w

    def formula(x, *w):
        x = norm(x[:, 1 : heads + 1], gain(w[0])) if w else x[:, 1 : heads + 1]
        return turn(x, cos.double(), sin.double())

    check(lambda x, *w: ops.norm_rope(x[:, 1 : heads + 1], *(w or [None]), 1e-6, cos, sin), formula, qkv, *w)
    if groups:
        check(lambda x, w: ops.norm_rope(x, w, 1e-6), lambda x, w: norm(x, gain(w)), qkv[:, :heads].contiguous(), *w)


@pytest.mark.parametrize("heads,kv_heads,dim", [(7, 1, 64), (2, 2, 80)])
def test_rope_append(backend, heads, kv_heads, dim):
    """Tokens of two documents go where `slots` says; other rows of the cache, poisoned here, stay as they are."""
    qkv, (cos, sin) = torch.randn(2, (heads + 2 * kv_heads) * dim), tables(2, dim)
    k, v = (torch.full((9, kv_heads, dim), torch.nan) for _ in range(2))
    q = ops.rope_append(qkv, cos, sin, k, v, torch.tensor([3, 8]), heads)
    parts = qkv.view(2, -1, dim).double().split((heads, kv_heads, kv_heads), 1)
    for got, part in zip((q, k[[3, 8]]), parts, strict=False):
        assert (got - turn(part, cos, sin)).norm() < 1e-6 * part.norm()
    assert torch.equal(v[[3, 8]].double(), parts[2])
    assert k[[0, 1, 2, 4, 5, 6, 7]].isnan().all() and v[[0, 1, 2, 4, 5, 6, 7]].isnan().all()


@pytest.mark.parametrize("chunks,n,width", [(1, 1, 80), (3, 9, 64), (2, 2, 2048)])
@pytest.mark.parametrize("shared", [False, True])
def test_adaln(backend, chunks, n, width, shared):
    """Two of three chunks may use one row of the table, which then gets both gradients; the rows are slices of a wide table."""
    rows = torch.tensor([1, 0, 1][:chunks]) if shared else None
    table = torch.randn(2 if shared else chunks, 3, width)
    x, y = torch.randn(chunks, n, width), torch.randn(chunks * n, width)

    def formula(x, y, table):
        gate, shift, scale = (table if rows is None else table[rows]).split(1, 1)
        x = x + gate * y.view_as(x)
        mean = x.mean(-1, keepdim=True)
        h = (x - mean) / ((x - mean).square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return x, (h * scale + shift).flatten(0, 1)

    def once(x, y, table):
        gate, shift, scale = table.split(1, 1)
        return ops.gate_add_modulate(x, gate, y, shift, scale, rows)

    def apart(x, y, table):
        gate, shift, scale = table.split(1, 1)
        x = ops.gate_add(x, gate, y, rows)
        return x, ops.modulate(x, shift, scale, rows)

    for function in (once, apart):
        check(function, formula, x, y, table)


def test_modulate_writes_the_dtype_of_the_product_that_follows(backend):
    x, m = torch.randn(2, 3, 32), torch.randn(2, 1, 32)
    assert ops.modulate(x, m, m, dtype=torch.bfloat16).dtype == torch.bfloat16
    stream, h = ops.gate_add_modulate(x, m, torch.randn(6, 32).bfloat16(), m, m, dtype=torch.bfloat16)
    assert (stream.dtype, h.dtype) == (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("n,width", [(1, 80), (3, 640), (2, 18944)])
def test_swiglu(backend, n, width):
    x = torch.randn(n, 2 * width) * 3
    check(ops.swiglu, lambda x: x[:, :width] * x[:, :width].sigmoid() * x[:, width:], x)
    check(ops.swiglu, lambda g, u: g * g.sigmoid() * u, *(part.contiguous() for part in x.chunk(2, 1)))


@pytest.mark.parametrize("n,width,inner", [(1, 80, 48), (3, 300, 100), (16, 64, 33), (17, 64, 33)])
@torch.no_grad()
@pytest.mark.parametrize("at_once", [False, True])
def test_norm_and_swiglu_of_a_few_tokens(backend, monkeypatch, n, width, inner, at_once):
    """In one kernel up to 16 of them; sizes that are no multiple of its tiles. Also in fp16, which no model gives it."""
    monkeypatch.setattr(kernels, "FEW_AT_ONCE", at_once)
    gate, up = (torch.nn.Linear(width, inner, bias=False) for _ in range(2))
    ops.join(gate, up)
    x, delta, w = torch.randn(n, width), torch.randn(n, width), torch.rand(width) + 0.5
    s, y = ops.add_norm_swiglu(x, delta, w, 1e-6, gate, up)
    h = norm((x + delta).double(), w.double())
    expected = F.silu(h @ gate.weight.double().T) * (h @ up.weight.double().T)
    assert torch.equal(s, x + delta) and (y - expected).norm() < 1e-6 * expected.norm()
    if backend == "triton" and n <= kernels.FEW:
        weight = torch.cat((gate.weight, up.weight)).half()
        _, y = kernels.add_norm_swiglu(x.half(), delta.half(), w.half(), 1e-6, weight)
        assert y.dtype == torch.float16 and (y - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("n,width", SIZES)
def test_standardise_into_a_slice(backend, n, width):
    h, out = torch.randn(n, width) + 2, torch.full((n, 3 * width), torch.nan)
    ops.standardise_into(out[:, width : 2 * width], h)
    std, mean = torch.std_mean(h.double(), -1, keepdim=True)
    expected = (h - mean) / (std + 1e-8)
    assert (out[:, width : 2 * width] - expected).norm() < 1e-6 * expected.norm()
    assert out[:, :width].isnan().all() and out[:, 2 * width :].isnan().all()


@pytest.mark.parametrize("dtype,tolerance", [(torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_half_precision(backend, dtype, tolerance):
    """Computed in fp32: the error is that of the roundings to the stream's dtype."""
    def both(x, d, w, qk, g, gate, shift, scale):
        s, h = ops.add_rms_norm(x, d, w, 1e-6)
        ada = ops.gate_add_modulate(x[None], gate, d, shift, scale)
        return s, h, ops.norm_rope(qk, w[:64], 1e-6, *tables_64), ops.swiglu(g), ada[0], ada[1]

    def formula(x, d, w, qk, g, gate, shift, scale):
        stream = x + gate[0] * d
        h = F.layer_norm(stream, (256,), eps=1e-6)
        qk = turn(norm(qk, w[:64]), *(t.double() for t in tables_64))
        return x + d, norm(x + d, w), qk, F.silu(g[:, :128]) * g[:, 128:], stream[None], h * scale[0] + shift[0]

    tables_64 = tables(4, 64)
    rows = [torch.randn(4, 256) for _ in range(2)]
    table = [torch.randn(1, 1, 256) for _ in range(3)]
    inputs = (*rows, torch.randn(256), torch.randn(4, 3, 64), torch.randn(4, 256), *table)
    check(both, formula, *inputs, dtype=dtype, tolerance=tolerance)


def test_no_tokens(backend):
    x, w = torch.zeros(0, 64, requires_grad=True), torch.ones(64, requires_grad=True)
    s, h = ops.add_rms_norm(x, x, w, 1e-6)
    assert torch.equal(torch.autograd.grad(h.sum() + s.sum(), w)[0], torch.zeros(64))
    assert ops.swiglu(x).shape == (0, 32)


# ------------------------------------------------------------------------------------------------ linear + cross-entropy


@pytest.mark.parametrize("tokens,vocab,chunk", [(1, 7, None), (13, 5003, 4), (12, 300, 4), (12, 300, None)])
def test_linear_cross_entropy(backend, tokens, vocab, chunk):
    hidden, weight, labels = torch.randn(tokens, 48), torch.randn(vocab, 48), torch.randint(vocab, (tokens,))
    labels[1::5] = -100
    labels[-1] = vocab - 1

    def formula(h, w):
        return F.cross_entropy(h @ w.T, labels, reduction="sum") * 3

    check(lambda h, w: 3 * ops.linear_cross_entropy(h, w, labels, chunk), formula, hidden, weight, tolerance=2e-6)
    with torch.no_grad():
        loss = ops.linear_cross_entropy(hidden, weight, labels, chunk)
    assert abs(3 * loss.item() / formula(hidden.double(), weight.double()).item() - 1) < 1e-6


def test_one_needed_gradient_suffices(backend):
    h, w, labels = torch.randn(5, 8), torch.randn(11, 8), torch.randint(11, (5,))
    for frozen in (h, w):
        live = (w if frozen is h else h).clone().requires_grad_()
        pair = (frozen, live) if frozen is h else (live, frozen)
        exact, = torch.autograd.grad(F.cross_entropy(pair[0] @ pair[1].T, labels, reduction="sum"), live)
        got, = torch.autograd.grad(ops.linear_cross_entropy(*pair, labels), live)
        assert torch.allclose(got, exact, atol=1e-6)


def test_tied_embeddings_get_both_gradients():
    table, ids = torch.randn(20, 8, requires_grad=True), torch.randint(20, (6,))

    def loss(head):
        return head(F.embedding(ids, table).tanh(), table)

    exact, = torch.autograd.grad(loss(lambda h, w: F.cross_entropy(h @ w.T, ids, reduction="sum")), table)
    got, = torch.autograd.grad(loss(lambda h, w: ops.linear_cross_entropy(h, w, ids, 4)), table)
    assert torch.allclose(got, exact, atol=1e-5)


def test_nothing_to_learn_from_is_zero(backend):
    h, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    for rows in (0, 3):
        loss = ops.linear_cross_entropy(h[:rows], w, torch.full((rows,), -100))
        assert loss.item() == 0
        assert all((g == 0).all() for g in torch.autograd.grad(loss, (h, w)))


def test_autocast_as_the_plain_loss():
    """bf16 products, fp32 softmax, gradients in the parameters' dtype: no further from float64 than the plain loss is."""
    h, w, labels = torch.randn(40, 64), torch.randn(500, 64) / 8, torch.randint(500, (40,))
    losses = {
        "ours": lambda h, w: ops.linear_cross_entropy(h, w, labels, 16),
        "plain": lambda h, w: F.cross_entropy(F.linear(h, w).float(), labels, reduction="sum"),
    }
    results = {}
    for name, dtype in (("exact", torch.float64), ("plain", torch.float32), ("ours", torch.float32)):
        x = [t.to(dtype).requires_grad_() for t in (h, w)]
        with torch.autocast("cpu", torch.bfloat16, enabled=name != "exact"):
            loss = losses.get(name, losses["plain"])(*x) if name != "exact" else F.cross_entropy(
                x[0] @ x[1].T, labels, reduction="sum")
        results[name] = [loss, *torch.autograd.grad(loss, x)]
    for ours, plain, exact in zip(results["ours"], results["plain"], results["exact"], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact).norm() <= 1.2 * (plain - exact).norm() + 1e-3 * exact.norm()


def test_a_second_backward_pass_raises():
    h, w = torch.randn(3, 8, requires_grad=True), torch.randn(5, 8)
    loss = ops.linear_cross_entropy(h, w, torch.tensor([0, 1, 2]))
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="given away"):
        loss.backward()


def test_logits_are_never_whole():
    """New memory beyond the gradients stays within the two tensors of one chunk; the plain loss takes many times that."""
    tokens, vocab, width, chunk = 128, 10000, 16, 4
    h, w = torch.randn(tokens, width, requires_grad=True), torch.randn(vocab, width, requires_grad=True)
    labels = torch.randint(vocab, (tokens,))
    grads = 4 * (vocab + tokens) * width

    def run(loss):
        return peak(lambda: torch.autograd.grad(loss(), (h, w)), h.device) - grads

    ours = run(lambda: ops.linear_cross_entropy(h, w, labels, chunk))
    plain = run(lambda: F.cross_entropy(h @ w.T, labels, reduction="sum"))
    assert plain > 2 * 4 * tokens * vocab  # else the measure is wrong
    assert ours < 2.2 * 4 * chunk * vocab
    assert ours < 0.15 * plain


# ------------------------------------------------------------------------------------------------------------ dispatch


def test_what_the_kernels_cannot_do_raises(monkeypatch):
    pytest.importorskip("triton")
    x, w = torch.randn(4, 64), torch.ones(64)
    ops.set_backend("triton")
    try:
        with pytest.raises(InputError, match="float64"):
            ops.rms_norm(x.double(), w.double(), 1e-6)
        with pytest.raises(ValueError, match="contiguous"):
            ops.rms_norm(x.T, torch.ones(4), 1e-6)
        monkeypatch.setattr(kernels, "INTERPRETED", False)
        with pytest.raises(InputError, match="cpu"):
            ops.rms_norm(x, w, 1e-6)
    finally:
        ops.set_backend("auto")
    assert ops.rms_norm(x, w, 1e-6).shape == x.shape


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.partition(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.partition(".")[0])
    return found


def test_triton_stays_in_two_files():
    """They stand at the bottom, and of the models and scripts only ops.py hands over to them."""
    files = {path.stem: imports(path) for path in Path(kernels.__file__).parent.glob("*.py")}
    assert not files["hopper"] & files.keys()
    assert files["kernels"] & files.keys() == {"hopper"}
    assert files["ops"] & files.keys() == {"kernels", "checkpoint"}
    assert [name for name, found in files.items() if "kernels" in found] == ["ops"]
    assert sorted(name for name, found in files.items() if "triton" in found) == ["hopper", "kernels"]


@pytest.mark.skipif(sys.platform != "linux", reason="Triton has wheels for Linux alone")
def test_every_launch_compiles_for_hopper(compiled_for_hopper):
    """At the models' sizes: no spills beyond a pair of registers that ptxas parks, and rows are read 16 bytes at a time."""
    rows = json.loads(compiled_for_hopper("aot_fused.py"))
    kernels_met = {label.split("(")[0] for label in rows}
    assert kernels_met == {name for name in vars(kernels) if name.endswith("_kernel")}
    for label, row in rows.items():
        assert row["spill"] <= 8, label
        # A label and its logit; the number of a table's row.
        scalar = {"_softmax_gradient_kernel": 2, "_add_norm_kernel": 1, "_add_norm_backward_kernel": 1}
        if "_rope_append" not in label:  # one head per warp: 4 bytes for each thread
            assert row["loads"] - row["wide"] <= scalar.get(label.split("(")[0], 0), label
