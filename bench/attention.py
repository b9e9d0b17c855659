"""Attention over packed sequences, forward, backward and on a cache, beside PyTorch's; every result against float64."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from bench.attention_peers import PACKED, Case, Layout, Peers, query_heads, reference_attention
from bench.measure import Bench, Row, Way, distance, reason, tensors
from bench.peers import once
from ops import Segments, attention

# -------------------------------------------------------------------------------------------------------------------- cases


def same(what: str, n: int, length: int, heads: int, kv_heads: int, dim: int, **options) -> Case:
    return Case(what, [length] * n, [length] * n, heads, kv_heads, dim, **options)


def packed_cases(b: Bench) -> list[Case]:
    """What packing is for: lengths as they come."""
    pictures = b.pick(
        gpu=[20480, 4500, 900, 3600, 1296, 8100],
        cpu=[1280, 288, 64, 225, 81, 512],
        smoke=[64, 15, 5, 17],
    )
    documents = b.pick(
        gpu=[4096, 64, 211, 2300, 388, 97, 1450, 640, 130, 905, 1210, 333, 1860, 520, 1204, 976],
        cpu=[512, 16, 53, 287, 48, 12, 181, 80],
        smoke=[33, 1, 17, 8],
    )
    windows = b.pick(gpu=[64] * 81 + [32] * 9 + [4], cpu=[], smoke=[16] * 3 + [8])
    texts = [b.pick(gpu=512, cpu=512, smoke=9)] * len(pictures)
    h = b.pick(gpu=16, cpu=8, smoke=2)
    d = b.pick(gpu=128, cpu=128, smoke=32)
    g = b.pick(gpu=(28, 4), cpu=(14, 2), smoke=(4, 2))
    cases = [
        Case(
            "packed samples of pictures",
            pictures,
            pictures,
            h,
            h,
            d,
            backward=True,
        ),
        Case(
            "packed causal documents",
            documents,
            documents,
            *g,
            d,
            causal=True,
            backward=b.size != "cpu",
        ),
        Case("cross-attention of the samples", pictures, texts, h, h, d),
    ]
    # The vision tower's heads are of 80 channels, which is no power of two.
    if windows:
        d = b.pick(gpu=80, cpu=80, smoke=32)
        cases.append(Case("vision windows", windows, windows, h, h, d))
    return cases


def dense_cases(b: Bench) -> list[Case]:
    """Equal lengths, where PyTorch's own need no padding."""
    if b.size == "cpu":
        return []
    if b.size == "smoke":
        return [
            same("dense", 2, 24, 2, 2, 32, backward=True),
            same("dense causal", 2, 24, 4, 2, 32, causal=True),
        ]
    return [
        same("dense", 4, 4096, 16, 16, 128, backward=True),
        same("dense causal", 4, 4096, 28, 4, 128, causal=True, backward=True),
        same("one sample of 1 + 4 pictures", 1, 4500, 16, 16, 128, backward=True),
        same("one sample of 1 + 4 pictures", 1, 20480, 16, 16, 128, backward=True),
        same("vision, whole picture", 1, 5476, 16, 16, 80),
    ]


def length_cases(b: Bench) -> list[Case]:
    """16,384 tokens as fewer or more sequences."""
    if b.size != "gpu":
        return []
    # The shorter the sequences, the more of the time is spent at the beginning and the end of a program, beside its loop.
    cases = []
    for n in (16384, 8192, 2048, 1024, 512):
        cases.append(same("dense", 16384 // n, n, 16, 16, 128))
    for n in (16384, 8192, 2048, 1024):
        cases.append(same("dense causal", 16384 // n, n, 28, 4, 128, causal=True))
    return cases


# --------------------------------------------------------------------------------------------------------------------- rows


class Inputs:
    """Tensors of a case, and how a peer's forward and backward pass on them is built.

    The reference is of the first and the last KV head alone, and so are the results that are compared.
    """

    def __init__(self, b: Bench, case: Case):
        self.case = case
        self.sq = Segments(case.lq, b.device)
        self.sk = self.sq if case.lq == case.lk else Segments(case.lk, b.device)
        # A seed for each: with one for all, q = k, and every query would find itself.
        self.q = b.randn(sum(case.lq), case.heads, case.dim, seed=0)
        self.k = b.randn(sum(case.lk), case.kv_heads, case.dim, seed=1)
        self.v = b.randn(sum(case.lk), case.kv_heads, case.dim, seed=2)
        self.do = b.randn(sum(case.lq), case.heads, case.dim, seed=3)
        self.kv = (0, case.kv_heads - 1)

    def reference(self) -> list[Tensor]:
        do = self.do if self.case.backward else None
        return reference_attention(self.case, self.q, self.k, self.v, do, self.kv)

    def mine(self, **options) -> tuple[Layout, Callable]:
        def call(q, k, v):
            return attention(q, k, v, self.sq, self.sk, causal=self.case.causal, **options)

        return PACKED, call

    def laid_out(self, layout: Layout) -> list[Tensor]:
        q = layout.into(self.q, self.case.lq)
        k = layout.into(self.k, self.case.lk)
        v = layout.into(self.v, self.case.lk)
        return [q, k, v]

    def of_queries(self, layout: Layout, x: Tensor) -> Tensor:
        """Of a peer's o or dq: packed, and the heads that are compared."""
        return layout.back(x, self.case.lq)[:, query_heads(self.case, self.kv)]

    def of_keys(self, layout: Layout, x: Tensor) -> Tensor:
        return layout.back(x, self.case.lk)[:, list(self.kv)]

    def forward(self, peer: Callable) -> Way:
        """peer() -> (layout, call(q, k, v))."""
        layout, call = peer()

        def results(o: Tensor) -> Tensor:
            return self.of_queries(layout, o)

        return Way(partial(call, *self.laid_out(layout)), results)

    def backward(self, peer: Callable) -> Way:
        """The backward pass alone: the forward pass has been, and its graph is kept."""
        layout, call = peer()
        # Laid out first, then made leaves: what a peer needs to lay out its tensors is not part of its gradient.
        inputs = [x.detach().requires_grad_() for x in self.laid_out(layout)]
        o = call(*inputs)
        do = layout.into(self.do, self.case.lq)

        def results(grads: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            dq, dk, dv = grads
            return self.of_queries(layout, dq), self.of_keys(layout, dk), self.of_keys(layout, dv)

        return Way(partial(torch.autograd.grad, o, inputs, do, retain_graph=True), results)


def case_rows(b: Bench, case: Case) -> None:
    """Forward, and where the case says so backward."""
    x = Inputs(b, case)
    builders = Peers(case, x.sq, x.sk, b.device).named()
    # In float64 it takes longer than what it is held against: once for both rows, and not at all while kernels are compiled.
    reference = once(x.reference)

    def row(what: str, direction: Callable, expected: Callable, limit: float, flops: float, **options) -> None:
        b.measure(Row(
            what=what,
            shape=case.shape,
            ours=partial(direction, partial(x.mine, **options)),
            peers={name: partial(direction, builder) for name, builder in builders.items()},
            limit=limit,
            reference=expected,
            gradients=direction == x.backward,
            flops=flops,
            kernels=True,
        ))  # fmt: skip

    def output() -> Tensor:
        return reference()[0]

    def grads() -> list[Tensor]:
        return reference()[1:]

    # The backward pass has five products where the forward pass has two.
    backward_flops = 2.5 * case.flops
    row(case.what, x.forward, output, b.limit(6e-3, 5e-6), case.flops)
    if case.backward:
        row(f"backward, {case.what}", x.backward, grads, b.limit(1e-2, 5e-6), backward_flops)


def packed(b: Bench) -> None:
    for case in packed_cases(b):
        case_rows(b, case)


def dense(b: Bench) -> None:
    for case in dense_cases(b):
        case_rows(b, case)


def lengths(b: Bench) -> None:
    for case in length_cases(b):
        case_rows(b, case)


def flex(b: Bench) -> None:
    """By itself, since compiling it takes longer than all other peers' rows together."""
    if b.size == "gpu":
        case = packed_cases(b)[0]
        case_rows(b, case._replace(what=f"{case.what}, flex", flex=True))


def decode_attention(b: Bench) -> None:
    """One token against a static cache of equal buffers, all of it in use."""
    sizes = b.pick(gpu=[(1, 2048), (8, 8192), (32, 2048), (2, 32768)], cpu=[(1, 2048)], smoke=[(2, 40)])
    heads, kv_heads, dim = b.pick(gpu=(28, 4, 128), cpu=(28, 4, 128), smoke=(4, 2, 32))
    for batch, length in sizes:
        case = Case("decode attention", [1] * batch, [length] * batch, heads, kv_heads, dim)
        x = Inputs(b, case)
        x.kv = tuple(range(kv_heads))
        # Every key and value is read once, by one query: what counts is bytes, not operations.
        in_use = torch.full((batch,), length, dtype=torch.int32, device=b.device)
        peers = Peers(case, x.sq, x.sk, b.device).named()
        b.measure(Row(
            what=case.what,
            shape=f"{batch} x {length} keys; {heads}:{kv_heads} heads of {dim}",
            ours=partial(x.forward, partial(x.mine, k_lengths=in_use)),
            peers={name: partial(x.forward, peer) for name, peer in peers.items()},
            limit=b.limit(6e-3, 5e-6),
            reference=x.reference,
            moved=2 * x.k.nbytes + 2 * x.q.nbytes,
            kernels=True,
        ))  # fmt: skip


# ------------------------------------------------------------------------------------------- every configuration, many times


def check(b: Bench) -> None:
    """Every kernel configuration, 50 times, against float64: the assembler that comes with Triton is known to miscompile such
    loops. Results must also be the same bits each time. No times."""
    check_type(b, b.dtype)


def check_half(b: Bench) -> None:
    """The same in fp16, which no shipped model uses."""
    if b.cuda:
        check_type(b, torch.float16)


def check_type(b: Bench, dtype: torch.dtype) -> None:
    if b.size == "cpu":
        return
    # Of the order of a rounding in each type; gradients go through two more products.
    forward, backward = {
        torch.bfloat16: (6e-3, 1e-2),
        torch.float16: (1e-3, 2e-3),
        torch.float32: (5e-6, 5e-6),
    }[dtype]
    for dim in (64, 80, 128):
        for causal in (False, True):
            pairs = "causal" if causal else "all pairs"
            shape = f"{str(dtype)[6:]}, head dim {dim}, {pairs}"
            what = "attention, every configuration"
            if b.passed(what, shape):
                continue
            record = b.record(what, shape)
            try:
                repeats = 50 if b.cuda and not b.compiling else 2
                worst, equal = check_one(b, dtype, dim, causal, repeats)
                record |= {"error": max(worst.values()), "errors": worst, "text": "equal bits"}
                # Written so that NaN is off, too.
                off = []
                for name, error in worst.items():
                    limit = backward if name.startswith("backward") else forward
                    if not error <= limit:
                        off.append(name)
                if off:
                    record["failed"] = f"wrong: {', '.join(off)}"
                elif not equal:
                    record["failed"] = "other bits in another run"
            except Exception as e:
                record["failed"] = reason(e)
            b.write(record)
            if "failed" in record:
                b.end_if_broken()


def check_one(b: Bench, dtype: torch.dtype, dim: int, causal: bool, repeats: int) -> tuple[dict[str, float], bool]:
    """Largest error of each kernel, and whether all repeated their bits."""
    # A single token, whole tiles, and one token more than a tile: where masks begin and end.
    lengths = [1, 17, 64, 129, 300, 257, 900] if b.cuda else [1, 9, 20]
    case = Case("", lengths, lengths, 4, 2, dim, causal)
    segments = Segments(lengths, b.device)
    q = b.randn(sum(lengths), 4, dim, seed=0).to(dtype).requires_grad_()
    k = b.randn(sum(lengths), 2, dim, seed=1).to(dtype).requires_grad_()
    v = b.randn(sum(lengths), 2, dim, seed=2).to(dtype).requires_grad_()
    do = b.randn(sum(lengths), 4, dim, seed=3).to(dtype)
    expected = [x.detach() for x in reference_attention(case, q, k, v, do, (0, 1))]
    # Decoding's query is the last of its sequence: it reads all keys.
    last = torch.tensor(segments.bounds[1:], device=b.device) - 1
    one = Segments([1] * len(last), b.device)
    # Not whatever auto takes. A CPU checks PyTorch's.
    own = "triton" if b.cuda else None
    worst: dict[str, float] = {}
    equal = True
    first = None

    def note(name: str, got, reference) -> None:
        worst[name] = max(worst.get(name, 0.0), distance(tensors(got), tensors(reference)))

    for _ in range(repeats):
        o = attention(q, k, v, segments, causal=causal, backend=own)
        grads = torch.autograd.grad(o, (q, k, v), do)
        note("forward", o, expected[0])
        note("backward", grads, expected[1:])
        bits = tensors((o, *grads))
        first = first or bits
        equal &= all(torch.equal(x, y) for x, y in zip(first, bits, strict=True))
        with torch.no_grad():
            note("decode", attention(q[last], k, v, one, segments, backend=own), expected[0][last])
    return worst, equal


GROUPS = {
    "packed": packed,
    "decode-attention": decode_attention,
    "dense": dense,
    "lengths": lengths,
    "check": check,
    "check-fp16": check_half,
    "flex": flex,
}
