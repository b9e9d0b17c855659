"""What attention is held against: the textbook's in float64, and all forms of PyTorch's: how each wants its tensors laid out.

Where a form would pad, it gets padded tensors from the start: only the call itself is timed.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ops import Segments

# ------------------------------------------------------------------------------------------------------------------- a case


class Case(NamedTuple):
    """lq, lk: lengths of the sequences on both sides."""

    what: str
    lq: list[int]
    lk: list[int]
    heads: int
    kv_heads: int
    dim: int
    causal: bool = False
    backward: bool = False
    flex: bool = False

    @property
    def shape(self) -> str:
        n = len(self.lq)
        lengths = f"{n} of {min(self.lq)}-{max(self.lq)}, {sum(self.lq)}"
        if len(set(self.lq)) == 1:
            lengths = f"{n} x {self.lq[0]}"
        if self.lq != self.lk:
            lengths += f" on {self.lk[0]}"
        return f"{lengths}; {self.heads}:{self.kv_heads} heads of {self.dim}"

    @property
    def flops(self) -> float:
        """Four per unmasked pair, head and channel."""
        pairs = 0.0
        for a, b in zip(self.lq, self.lk, strict=True):
            # Causal: every query reads the keys before the first query, and of the others those up to its own.
            if self.causal:
                pairs += a * (b - a) + a * (a + 1) / 2
            else:
                pairs += a * b
        return 4 * self.dim * self.heads * pairs


# ---------------------------------------------------------------------------------------------------------------- reference


def reference_attention(case: Case, q, k, v, do=None, kv: tuple[int, ...] = (0,)) -> list[Tensor]:
    """o, and with do also dq, dk, dv, in float64, for the query heads of these KV heads. One head and sequence at a time."""
    group = case.heads // case.kv_heads
    scale = case.dim**-0.5
    heads = query_heads(case, kv)

    def zeros(x: Tensor, n: int) -> Tensor:
        return torch.zeros(len(x), n, case.dim, dtype=torch.float64, device=q.device)

    o = zeros(q, len(heads))
    dq = zeros(q, len(heads))
    dk = zeros(k, len(kv))
    dv = zeros(k, len(kv))
    a = 0
    b = 0
    for lq, lk in zip(case.lq, case.lk, strict=True):
        rows = slice(a, a + lq)
        cols = slice(b, b + lk)
        a += lq
        b += lk
        for i, head in enumerate(heads):
            x = q[rows, head].double()
            y = k[cols, head // group].double()
            z = v[cols, head // group].double()
            scores = x @ y.T * scale
            if case.causal:
                seen = torch.ones(lq, lk, dtype=torch.bool, device=q.device).tril(lk - lq)
                scores.masked_fill_(~seen, -math.inf)
            p = scores.softmax(1)
            o[rows, i] = p @ z
            if do is None:
                continue
            # The textbook's backward pass: dv = p^T do, ds = p (do v^T - rowsum(do o)), dq = ds k, dk = ds^T q.
            g = do[rows, head].double()
            dv[cols, i // group] += p.T @ g
            delta = (g * o[rows, i]).sum(1, keepdim=True)
            ds = p.mul_(g @ z.T - delta).mul_(scale)
            dq[rows, i] = ds @ y
            dk[cols, i // group] += ds.T @ x
    return [o] if do is None else [o, dq, dk, dv]


def query_heads(case: Case, kv: tuple[int, ...]) -> list[int]:
    """Those that read these KV heads."""
    group = case.heads // case.kv_heads
    return [h * group + r for h in kv for r in range(group)]


# ------------------------------------------------------------------------------------------------------------------ layouts


class Layout(NamedTuple):
    """into(x (N, H, D), lengths) -> what the peer computes on; back: its inverse."""

    into: Callable
    back: Callable


def _same(x: Tensor, lengths: list[int]) -> Tensor:
    return x


def _stack(x: Tensor, lengths: list[int]) -> Tensor:
    return x.unflatten(0, (len(lengths), -1)).transpose(1, 2)                                             # (S, H, L, D)


def _unstack(x: Tensor, lengths: list[int]) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def _pad(x: Tensor, lengths: list[int]) -> Tensor:
    """Zeros behind each sequence."""
    return nn.utils.rnn.pad_sequence(x.split(lengths), batch_first=True).transpose(1, 2)                  # (S, H, L, D)


def _unpad(x: Tensor, lengths: list[int]) -> Tensor:
    return torch.cat([o[:, :n].transpose(0, 1) for o, n in zip(x, lengths, strict=True)])


def _as_one(x: Tensor, lengths: list[int]) -> Tensor:
    return x.transpose(0, 1)[None]                                                                        # (1, H, N, D)


def _from_one(x: Tensor, lengths: list[int]) -> Tensor:
    return x[0].transpose(0, 1)


PACKED = Layout(_same, _same)
DENSE = Layout(_stack, _unstack)  # all sequences are of one length
PADDED = Layout(_pad, _unpad)
ONE = Layout(_as_one, _from_one)  # the pack as one sequence


# -------------------------------------------------------------------------------------------------------------------- peers


@dataclass
class Peers:
    """Builders for one case: each returns (layout, call(q, k, v)), or raises where the peer does not exist."""

    case: Case
    sq: Segments
    sk: Segments
    device: torch.device

    @property
    def gqa(self) -> bool:
        return self.case.heads != self.case.kv_heads

    @property
    def causal(self) -> bool:
        return self.case.causal and self.case.lq == self.case.lk

    def named(self) -> dict[str, Callable]:
        """Those to be raced in this case."""
        cuda = self.device.type == "cuda"
        peers = {}
        # Equal lengths need no padding: there PyTorch is at its best, and its back ends are raced one by one.
        if len(set(self.case.lq)) == 1 and len(set(self.case.lk)) == 1:
            peers["SDPA"] = self.sdpa
            if cuda:
                peers["SDPA cuDNN"] = partial(self.sdpa, SDPBackend.CUDNN_ATTENTION)
                peers["SDPA flash"] = partial(self.sdpa, SDPBackend.FLASH_ATTENTION)
                peers["SDPA efficient"] = partial(self.sdpa, SDPBackend.EFFICIENT_ATTENTION)
        else:
            peers["padded SDPA"] = self.padded
            peers["SDPA per sequence"] = self.per_sequence
        if cuda:
            peers["varlen_attn"] = self.varlen
        if cuda and self.case.flex:
            peers = {"compiled flex": self.flexible}
        return peers

    def sdpa(self, backend: SDPBackend | None = None):
        """PyTorch's choice, or this back end."""

        def call(q, k, v):
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.gqa)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=self.causal, enable_gqa=self.gqa)

        return DENSE, call

    def padded(self):
        """One dense call over the longest sequence, keys of padding masked."""
        mask = None
        if not self.causal:  # else padding stands behind, where a causal query never looks
            real = [torch.ones(n, dtype=torch.bool, device=self.device) for n in self.case.lk]
            mask = nn.utils.rnn.pad_sequence(real, batch_first=True)[:, None, None]

        def call(q, k, v):
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal, enable_gqa=self.gqa)

        return PADDED, call

    def per_sequence(self):
        """A loop: one call a sequence."""

        def call(q, k, v):
            out = []
            parts = zip(q.split(self.case.lq), k.split(self.case.lk), v.split(self.case.lk), strict=True)
            for part in parts:
                dense = (x.transpose(0, 1)[None] for x in part)
                o = F.scaled_dot_product_attention(*dense, is_causal=self.causal, enable_gqa=self.gqa)
                out.append(o[0].transpose(0, 1))
            return torch.cat(out)

        return PACKED, call

    def varlen(self):
        """FlashAttention 2 with cumulative lengths. Its options have other names in other versions of PyTorch."""
        from torch.nn.attention.varlen import varlen_attn

        known = inspect.signature(varlen_attn).parameters
        options = {}
        if self.causal and "window_size" in known:
            options["window_size"] = (-1, 0)
        elif self.causal:
            options["is_causal"] = True
        if self.gqa and "enable_gqa" in known:
            options["enable_gqa"] = True
        # A version that knows no grouped heads gets each KV head as often as it is read.
        repeats = 1
        if "enable_gqa" not in known:
            repeats = self.case.heads // self.case.kv_heads

        def call(q, k, v):
            if repeats > 1:
                k = k.repeat_interleave(repeats, 1)
                v = v.repeat_interleave(repeats, 1)
            return varlen_attn(
                q,
                k,
                v,
                self.sq.cu,
                self.sk.cu,
                self.sq.longest,
                self.sk.longest,
                **options,
            )

        return PACKED, call

    def flexible(self):
        """flex_attention over the pack as one sequence; a block mask keeps the sequences apart."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        def numbers(lengths):
            """Of the sequence that each token belongs to."""
            sequences = torch.arange(len(lengths), device=self.device)
            return sequences.repeat_interleave(torch.tensor(lengths, device=self.device))

        of_q = numbers(self.case.lq)
        of_k = numbers(self.case.lk)

        def together(b, h, i, j):
            return of_q[i] == of_k[j]

        # Blocks of pairs that are all of different sequences are left out, which is where its speed comes from.
        mask = create_block_mask(together, None, None, self.sq.total, self.sk.total, device=self.device)
        compiled = torch.compile(flex_attention, dynamic=False)
        return ONE, partial(compiled, block_mask=mask, enable_gqa=self.gqa)
