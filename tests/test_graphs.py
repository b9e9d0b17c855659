"""Recorded steps without a GPU: a stand-in records every operation with its tensors and repeats them, as a CUDA graph would."""

from collections import Counter
from unittest import mock

import pytest
import torch
from launches import FREE, READS, _kernel
from test_pipeline import make_duo, picture, question, same
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import flow
import ops
from dit import DiTConfig
from flow import denoise, shift_schedule
from model import frequencies
from ops import Graph, pays_to_record


class Recording(TorchDispatchMode):
    """What a function does, as operations on fixed tensors. Reading back is an error, as it is while CUDA records.

    Recording runs the operations, which CUDA does not; what they changed in place of tensors from outside is put back.
    """

    def __init__(self):
        super().__init__()
        self.calls, self.made, self.outside, self.before = [], set(), {}, {}

    def note(self, tensors) -> None:
        for t in tensors:
            if t.untyped_storage().data_ptr() not in self.made:
                self.outside[t.untyped_storage().data_ptr()] = t

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [t for t in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        self.note(given)
        name = function._schema.name.partition("::")[2]
        asks = name in ("_local_scalar_dense", "nonzero") or name == "index" and any(t.dtype == torch.bool for t in given[1:])
        assert not asks, f"{name}: the host waits for a value"
        if function._schema.is_mutable and id(args[0]) not in self.before:
            self.before[id(args[0])] = args[0], args[0].clone()
        result = function(*args, **kwargs)
        made = [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
        view = function.is_view or name in FREE
        if not view:
            self.calls.append((function, args, kwargs, result))
        if not function._schema.is_mutable and not function.is_view:
            self.made |= {t.untyped_storage().data_ptr() for t in made}
        return result

    def launch(self, run, kernel, args, kwargs):
        with _disable_current_modes():
            self.note(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor))
            self.calls.append((run, (kernel, *args), kwargs, None))
            return run(kernel, *args, **kwargs)

    def replay(self):
        for function, args, kwargs, result in self.calls:
            again = function(*args, **kwargs)
            for old, new in zip(*map(torch.utils._pytree.tree_leaves, (result, again)), strict=True):
                if isinstance(old, Tensor) and old is not new:
                    old.copy_(new)


class NoReads(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        assert name not in READS or not isinstance(args[0], Tensor), f"{name}: the host waits for a value"
        return function(*args, **(kwargs or {}))


@pytest.fixture
def recordings(monkeypatch):
    """All that were made."""
    made = []

    def capture(function, inputs):
        recording, run = Recording(), type(_kernel).run
        patch = mock.patch.object(type(_kernel), "run", lambda kernel, *a, **k: recording.launch(run, kernel, a, k))
        with patch, NoReads(), recording:
            result = function(*inputs)
        for tensor, before in recording.before.values():
            if tensor.untyped_storage().data_ptr() not in recording.made:
                tensor.copy_(before)
        made.append(recording)
        return recording.replay, result

    monkeypatch.setattr(ops, "capture", capture)
    return made


def test_the_stand_in_finds_what_cuda_would_not_do(recordings):
    """A number of Python's is frozen, a tensor in its place is not, reading back fails, a new shape is a new recording."""
    number, tensor, out = [1.0], torch.ones(1), torch.zeros(1)

    def function(x):
        out.add_(1)
        return x * number[0] + tensor

    graph = Graph(function)
    for n in range(1, 5):
        assert graph(torch.full((2,), float(n))).tolist() == [n + 1.0] * 2 and out == n
    number[0], tensor[0] = 5.0, 7.0
    assert graph(torch.ones(2)).tolist() == [8.0, 8.0] and len(recordings) == 1
    assert graph(torch.ones(3)).tolist() == [12.0] * 3 and graph(torch.ones(3)).tolist() == [12.0] * 3 and len(recordings) == 2
    for reads in (lambda x: x * x.sum().item(), lambda x: x[x > 0], lambda x: x * x.tolist()[0]):
        graph = Graph(reads)
        graph(torch.ones(2))
        with pytest.raises(AssertionError, match="the host waits"):
            graph(torch.ones(2))


def test_a_recorded_token_is_that_of_the_written_step(recordings):
    """Several documents that grow, wait and go on: the recording takes all that changes from the cache and its inputs."""
    duo = make_duo()
    ops.set_backend("triton")  # a GPU's path: PyTorch's on the CPU may read lengths where they are
    try:
        results = []
        for graphs_on in (False, True):
            duo.graphs = graphs_on
            torch.manual_seed(0)
            cache = duo.cache(12, 2)
            cache.k.normal_(), cache.v.normal_()
            cache.truncate(0, 3), cache.truncate(1, 5)
            step, rows = duo.step(cache), []
            with torch.no_grad():
                for growing, ids in (([0, 1], [7, 8]), ([0, 1], [9, 4]), ([1], [2, 6])):
                    cache.advance(growing)
                    both = step(torch.tensor(ids), cache.lengths.long())
                    rows.append([x[growing].clone() for x in both])
            inputs = graphs_on and next(iter(step.recorded.values()))[0]
            results.append((rows, cache.lengths.tolist(), cache.counts))
    finally:
        ops.set_backend("auto")
    assert results[0][1:] == results[1][1:] == ([5, 8], [5, 8]) and len(recordings) == 1
    for written, recorded in zip(results[0][0], results[1][0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(written, recorded, strict=True))
    # What it reads beside its inputs: weights, the cache, and tables that never change.
    c = duo.mllm.config
    fixed = [*frequencies(tuple(c.mrope_section), False, c.rope_theta, duo.device), cache.queries.cu, cache.buffers.cu]
    known = [*duo.mllm.parameters(), *duo.dit.crossattn_proj.parameters(), *vars(cache).values(), *fixed]
    known = {t.untyped_storage().data_ptr() for t in known if isinstance(t, Tensor)}
    assert set(recordings[0].outside) - known == {x.untyped_storage().data_ptr() for x in inputs}


def test_a_recorded_denoising_step_is_that_of_the_written_loop(recordings):
    """All steps from one recording, for both solvers, with and without guidance."""
    duo = make_duo()
    clean, context = [torch.randn(16, 4, 4)], torch.randn(9, 24)
    for guidance, method in ((3.0, "unipc"), (1.0, "euler")):
        latents = [
            denoise(duo.dit, [clean, []], [(4, 4), (4, 6)], [context, context[:5]], [context[:3], context[:0]], [0, 1],
                    sigmas=shift_schedule(5), guidance=guidance, method=method, graphs=graphs_on)
            for graphs_on in (False, True)
        ]  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(*latents, strict=True))
    assert len(recordings) == 2


def test_a_step_is_recorded_where_the_host_is_the_limit():
    """Measured on an H200: 480 px alone pays, with four pictures before it no more, a page of 1024 px never."""
    gpu = torch.device("cuda")
    width = DiTConfig().width
    patches = {"480 alone": 2 * 900, "480, 1 + 4": 2 * 4500, "1024 alone": 2 * 4096, "1024, 1 + 4": 2 * 20480}
    assert [name for name, n in patches.items() if pays_to_record(None, gpu, n, width)] == ["480 alone"]
    assert not pays_to_record(None, torch.device("cpu"), 1, width)
    # Who says what he wants gets it.
    assert pays_to_record(True, gpu, 10**6, width) and not pays_to_record(False, gpu, 1, width)


def test_a_small_picture_is_recorded_by_itself_and_a_large_one_is_not(recordings, monkeypatch):
    """The same call, at the same sizes, beside a host that is fast and one that is slow."""
    duo = make_duo()
    context = torch.randn(9, 24)
    gpu = torch.device("cuda")
    monkeypatch.setattr(flow, "pays_to_record", lambda graphs, device, *size: pays_to_record(graphs, gpu, *size))
    painted = []
    for work in (0, 1e12):
        monkeypatch.setattr(ops, "LAUNCH_WORK", work)
        options = {"sigmas": shift_schedule(4), "graphs": None}
        painted += denoise(duo.dit, [[]], [(4, 4)], [context], None, [0], **options)
        assert len(recordings) == (work > 0)
    assert torch.equal(*painted)


def test_tokens_are_recorded_only_when_asked_for():
    duo = make_duo()
    cache = duo.cache(12)
    duo.device = torch.device("cuda")
    for graphs in (None, False, True):
        duo.graphs = graphs
        assert isinstance(duo.step(cache), Graph) == bool(graphs)


def test_answers_with_recorded_steps(recordings, monkeypatch):
    """Whole answers, several at a time: pictures come in between, places are used again, and nothing changes."""
    duo = make_duo(temperature=1.0)
    dialogues = ["Draw.", question(picture(3)), "Two"]
    settings = [duo.settings(seed=s, max_tokens=5 + s, steps=3) for s in range(3)]
    monkeypatch.setattr(ops, "_attention_to_known_rows", ops._attention_to_masked_rows)  # the host does not look at the lengths
    draw, drawn = duo.choose, Counter()

    def choose(logits, settings, generator):
        drawn[generator] += 1
        token = draw(logits, settings, generator)
        return duo.tokenizer.vision_start if drawn[generator] == 3 else token

    monkeypatch.setattr(duo, "choose", choose)
    plain = duo.generate_many(dialogues, settings, batch=2)
    duo.graphs = True
    recorded = duo.generate_many(dialogues, settings, batch=2)
    assert [a.text for a in plain] == [a.text for a in recorded] and [len(a.pictures) for a in plain] == [1, 1, 1]
    assert len(recordings) == 3  # of a token, and of two rounds of pictures
    for a, b in zip(plain, recorded, strict=True):
        assert all(same(x.image, y.image) for x, y in zip(a.pictures, b.pictures, strict=True))
