"""Launches and FLOPs of the language model and its vision tower, beside those of transformers, counted the same way.

Depths are those of Qwen2.5-VL-7B, widths are small, numbers have 16 bits, so that casts count as they do on a GPU.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop

import kernels
import ops
from bench import peers
from launches import Launches
from model import MLLM, KVCache, MLLMConfig, VisionConfig
from ops import Segments

CONFIG = MLLMConfig(
    64, 96, 28, 4, 2, 256, 1e-6, VisionConfig(16, 64, num_heads=1, intermediate_size=24), mrope_section=(2, 3, 3),
    image_token_id=250, eos_token_id=251, pad_token_id=252,
)  # fmt: skip
PROMPT = 20


@pytest.fixture(scope="module")
def models():
    """(ours, theirs), on one set of weights."""
    torch.manual_seed(0)
    ours = MLLM.from_config(CONFIG).bfloat16().eval()
    theirs = peers.transformers_mllm(ours)
    return ours.fuse_for_inference(), theirs


@pytest.fixture
def on_triton(monkeypatch):
    monkeypatch.setattr(ops, "_backend", "triton")
    # Kernels are counted and not run: what the interpreter cannot multiply does not matter.
    monkeypatch.setattr(kernels, "attention_cannot", lambda *_: None)


def reference_step(theirs):
    """A decoding step of transformers, after a prompt."""
    from transformers import DynamicCache

    cache, where = DynamicCache(config=theirs.config.get_text_config()), torch.arange(PROMPT + 1).expand(3, 1, -1)
    ids = torch.arange(PROMPT + 1)[None]
    options = {"past_key_values": cache, "use_cache": True}
    theirs.model(input_ids=ids[:, :PROMPT], position_ids=where[..., :PROMPT], **options)
    return lambda: theirs(input_ids=ids[:, PROMPT:], position_ids=where[..., PROMPT:], **options).logits


def our_step(ours, documents: int, capacity: int):
    cache = KVCache(ours.config, capacity, ours.lm_head.weight.dtype, documents=documents)
    where = torch.arange(PROMPT).expand(3, -1)
    for d in range(documents):
        ours(torch.arange(PROMPT), where, Segments([PROMPT]), cache=cache, document=d)

    def step():
        cache.advance(range(documents))
        return ours.logits(ours.decode(torch.full((documents,), PROMPT), torch.full((documents,), PROMPT), cache)[-1])

    return step


@torch.no_grad()
@pytest.mark.parametrize("documents, at_once, most", [(1, False, 296), (3, False, 296), (1, True, 240), (3, True, 240)])
def test_a_decoding_step_launches_few_kernels_and_waits_for_nothing(models, documents, at_once, most, request, monkeypatch):
    """at_once: the norm and the first half of the MLP in one kernel, which is not the default."""
    monkeypatch.setattr(kernels, "FEW_AT_ONCE", at_once)
    ours, theirs = models
    step = our_step(ours, documents, 2048)  # large enough that a GPU splits the keys, which takes a second kernel
    request.getfixturevalue("on_triton")
    with Launches(run_kernels=False) as count:
        step()
    assert count.by_name["_decode"] == count.by_name["_merge"] == 28
    assert count.total <= most and count.reads == 0  # independent of how many documents there are
    step = reference_step(theirs)
    with Launches() as reference:
        step()
    assert reference.total == pytest.approx(1145, rel=0.01)


@torch.no_grad()
def test_a_picture_of_1036_pixels_launches_few_kernels(models, on_triton):
    """74 x 74 patches, 100 windows in 28 of the blocks."""
    (ours, theirs), pixels = models, torch.zeros(74 * 74, 1176, dtype=torch.bfloat16)
    with Launches(run_kernels=False) as count:
        ours.visual(pixels, [(74, 74)])
    assert count.by_name["_forward"] == 32
    assert count.total <= 350
    with Launches(run_kernels=False) as again:
        ours.visual(pixels, [(74, 74)])
    assert again.total <= 300 and again.reads == 0  # where patches go is known from the first time
    with Launches() as reference:
        theirs.model.visual(pixels, grid_thw=torch.tensor([[1, 74, 74]]))
    assert reference.total == pytest.approx(4169, rel=0.01)


def test_the_counter_counts_what_computes_and_what_is_read_back():
    x = torch.ones(4, 6)
    with Launches() as count:
        y = x.view(6, 4).T[1:].unsqueeze(0)  # views
        torch.empty(3).detach()
        torch.promote_types(x.dtype, torch.float16)
        assert count.total == count.reads == 0
        y.contiguous().add_(1)
        (x @ y[0].mT.contiguous().mT[:, :1].expand(-1, 1).new_zeros(6, 2)).half()
        assert dict(count.by_name) == {"clone": 2, "add_": 1, "new_zeros": 1, "mm": 1, "_to_copy": 1}
        x[0, 0].item(), x.tolist(), x.nonzero(), bool(x[0, 0]), int(x[0, 0])
        assert count.reads == 5
    with Launches() as other:
        x.sum()
    assert other.total == 1 and count.by_name["sum"] == 0


# -------------------------------------------------------------------------------------------------------------- FLOPs


def attention_flops(q: Tensor, k: Tensor, v: Tensor, *_, out_val=None, **__) -> int:
    return sdpa_flop(q, k, v)


# Products that the counter does not know.
MORE = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten.addmm_: lambda out, a, b, out_val=None, **_: 2 * a[0] * a[1] * b[1],
}


def flops(call) -> int:
    with FlopCounterMode(display=False, custom_mapping=MORE) as count:
        call()
    return count.get_total_flops()


@pytest.fixture(scope="module")
def shallow():
    """(ours, theirs) of few layers, since each computes the same."""
    torch.manual_seed(0)
    vision = replace(CONFIG.vision, depth=3, fullatt_block_indexes=(1,))
    ours = MLLM.from_config(replace(CONFIG, num_hidden_layers=2, vision=vision)).eval()
    return ours, peers.transformers_mllm(ours)


@torch.no_grad()
def test_flops_are_those_of_transformers(shallow):
    ours, theirs = shallow
    ids, where, grid = torch.arange(100), torch.arange(100).expand(3, -1), (34, 34)
    pixels, thw = torch.zeros(34 * 34, 1176), torch.tensor([[1, *grid]])
    pairs = {
        "prompt": (
            lambda: ours(ids, where, Segments([100])),
            lambda: theirs.model(input_ids=ids[None], position_ids=where[:, None], use_cache=False),
        ),
        "token": (our_step(ours, 1, 1000), reference_step(theirs)),
        "picture": (lambda: ours.visual(pixels, [grid]), lambda: theirs.model.visual(pixels, grid_thw=thw)),
    }
    for name, (our, their) in pairs.items():
        assert flops(our) == pytest.approx(flops(their), rel=0.01), name


@torch.no_grad()
def test_a_ragged_pack_computes_useful_tokens_alone(shallow):
    """Against every document by itself, where nothing is padded; padded to one length it would be 2.8 times as much."""
    ours, lengths = shallow[0], [150, 3, 41, 17, 90, 1, 64]
    where = torch.cat([torch.arange(n) for n in lengths]).expand(3, -1)
    packed = flops(lambda: ours(torch.zeros(sum(lengths), dtype=torch.long), where, Segments(lengths)))
    alone = [flops(lambda n=n: ours(torch.zeros(n, dtype=torch.long), where[:, :n], Segments([n]))) for n in lengths]
    assert packed == pytest.approx(sum(alone), rel=0.01)
    assert max(alone) * len(lengths) > 2.8 * packed
