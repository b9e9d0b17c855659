"""families/wan.py: equal to diffusers on its checkpoints, in packs, and with a connector where its text was read."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

import flow
import ops
from checkpoint import InputError, read_json
from dit import Targets, pack_images, patchify, unpatchify
from families.registry import load_model, read_config
from families.wan import PRESETS, Wan, WanConfig
from ops import Segments

SHAPES = {
    "heads of 128, shards": {"num_attention_heads": 2, "attention_head_dim": 128, "ffn_dim": 96, "num_layers": 2},
    "heads of 32, deep": {"num_attention_heads": 3, "attention_head_dim": 32, "ffn_dim": 200, "num_layers": 5},
}
TEXT = {"text_dim": 40, "freq_dim": 32}


def randomise(module):
    """Every parameter away from its initial value, zeros and ones included, at a size that keeps activations near 1."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            gain = p.ndim == 1 and "norm" in name and name.endswith("weight")
            width = p[0].numel() ** -0.5 if "table" not in name and p.ndim > 1 else 0.3
            p.normal_(float(gain), width)
    return module.eval()


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request, tmp_path_factory):
    """(theirs, ours): a random checkpoint that diffusers wrote, read by both."""
    torch.manual_seed(0)
    theirs = randomise(WanTransformer3DModel(**SHAPES[request.param], **TEXT))
    folder = tmp_path_factory.mktemp("wan")
    theirs.save_pretrained(folder, max_shard_size="1MB" if "shards" in request.param else "1GB")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == ("shards" in request.param)
    return theirs, load_model("dit", folder)


@torch.no_grad()
def velocity_of(theirs, x, t, text):
    """x (B, C, T, H, W), a time for each frame (B, T), UMT5's states (B, M, 40)."""
    patches = x.shape[3] // 2 * (x.shape[4] // 2)
    return theirs(x, (1000 * t).repeat_interleave(patches, 1), text).sample


@torch.no_grad()
def velocity_of_ours(ours, x, t, text):
    """The same dense batch through the packed forward."""
    b, _, frames, h, w = x.shape
    grid = (h // 2, w // 2)
    pack = pack_images([[grid] * frames] * b)
    packed = torch.cat([patchify(x[i, :, f]) for i in range(b) for f in range(frames)])
    cu = torch.arange(b + 1, dtype=torch.int32) * text.shape[1]
    context = ours.read_text(text.flatten(0, 1))
    v = ours(packed, t.flatten(), torch.zeros(b * frames), pack, context, cu)
    v = torch.stack([unpatchify(image, grid) for image in v.split(grid[0] * grid[1])])
    return v.unflatten(0, (b, frames)).transpose(1, 2)


@pytest.mark.parametrize(
    "frames, h, w, batch, text",
    [(1, 6, 10, 2, 512), (3, 10, 6, 2, 512), (2, 14, 2, 1, 7), (5, 2, 18, 1, 512), (4, 8, 8, 2, 33), (1, 2, 2, 3, 1)],
    ids=["T1", "T3", "T2-column", "T5-row", "T4-square", "one patch"],
)
def test_velocity_equals_diffusers(pair, frames, h, w, batch, text):
    """Odd patch grids, a time of its own for each frame, clean ones among them, any number of text tokens."""
    theirs, ours = pair
    x = torch.randn(batch, 16, frames, h, w)
    t = torch.rand(batch, frames)
    t[:, :-1] = 1e-4
    args = x, t, torch.randn(batch, text, 40)
    reference = velocity_of(theirs, *args)
    assert reference.std() > 0.3  # something is compared
    assert (velocity_of_ours(ours, *args) - reference).abs().max() <= 5e-5


def test_one_time_for_all_frames_as_published(pair):
    """Wan2.1 itself knows one time of the whole video."""
    theirs, ours = pair
    x, t, text = torch.randn(2, 16, 3, 4, 6), torch.rand(2), torch.randn(2, 9, 40)
    with torch.no_grad():
        reference = theirs(x, 1000 * t, text).sample
    assert (velocity_of_ours(ours, x, t[:, None].expand(2, 3), text) - reference).abs().max() <= 5e-5


def test_diffusers_loads_what_we_save(pair, tmp_path):
    """Every key, no other, and the same velocity; and we load it again, bit for bit."""
    theirs, ours = pair
    ours.save_pretrained(tmp_path, shard_bytes=1_000_000)
    again = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(tmp_path))
    tensors = {n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}
    again.load_state_dict(tensors, strict=True)
    args = torch.randn(1, 16, 2, 4, 4), torch.rand(1, 2), torch.randn(1, 5, 40)
    assert torch.equal(velocity_of(again.eval(), *args), velocity_of(theirs, *args))
    own = load_model("dit", tmp_path)
    assert own.config == ours.config and torch.equal(velocity_of_ours(own, *args), velocity_of_ours(ours, *args))


def test_published_sizes():
    """Names and shapes are diffusers' at full size, the counts those of the published files."""
    for name, count in (("wan2.1-1.3B", 1_418_996_800), ("wan2.1-14B", 14_288_491_584)):
        config = PRESETS[name]
        with torch.device("meta"):
            ours = Wan(config)
            theirs = WanTransformer3DModel.from_config(json.loads(json.dumps(config.to_json())))
        shapes = {n: p.shape for n, p in ours.state_dict().items()}
        assert shapes == {n: p.shape for n, p in theirs.state_dict().items()}
        assert sum(p.numel() for p in ours.parameters()) == count


# -------------------------------------------------------------------------------------------------------------- connector


@pytest.fixture
def small():
    """With a connector."""
    return randomise(Wan.from_config(WanConfig(3, 2, 32, 80, freq_dim=32, crossattn_proj_in_channels=24)))


def test_a_connector_takes_the_place_of_the_text_embedder(pair, tmp_path, capsys):
    _, published = pair
    published.save_pretrained(tmp_path / "published")
    wan = load_model("dit", tmp_path / "published", features=24)
    assert "connector: new, 24 numbers" in capsys.readouterr().out
    assert wan.config == replace(published.config, crossattn_proj_in_channels=24)
    assert all(p.requires_grad for p in wan.parameters()) and not any("text_embedder" in n for n in wan.state_dict())
    assert all(torch.equal(p, published.state_dict()[n]) for n, p in wan.state_dict().items() if "crossattn" not in n)

    # It is saved and read again, also for another language model.
    wan.save_pretrained(tmp_path / "joined")
    assert read_config("dit", tmp_path / "joined") == wan.config
    again = load_model("dit", tmp_path / "joined", features=24)
    assert all(torch.equal(p, wan.state_dict()[n]) for n, p in again.state_dict().items())
    other = load_model("dit", tmp_path / "joined", features=30)
    assert other.crossattn_proj[0].weight.shape == (wan.config.width, 30)
    assert torch.equal(other.proj_out.weight, wan.proj_out.weight)


MIXED = [[(3, 5), (2, 2), (4, 1)], [(6, 2)], [(2, 4), (7, 3)]]


def test_a_sample_in_a_pack_equals_it_alone(small):
    pack = pack_images(MIXED)
    t = torch.tensor([1e-4, 1e-4, 0.7, 0.3, 1e-4, 0.9])
    x, context = torch.randn(len(pack.image_ids), 64), torch.randn(15, 64)
    cu = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    given = torch.tensor([1, 1, 0, 0, 1, 0])
    with torch.no_grad():
        together = small(x, t, given, pack, context, cu).split(pack.segments.lengths)
        image = 0
        for s, sample in enumerate(MIXED):
            own = slice(*pack.segments.bounds[s : s + 2])
            images = slice(image, image := image + len(sample))
            text = context[cu[s] : cu[s + 1]]
            ends = torch.tensor([0, len(text)], dtype=torch.int32)
            alone = small(x[own], t[images], given[images], pack_images([sample]), text, ends)
            assert (alone - together[s]).abs().max() < 5e-6


def test_what_a_sampler_computes_once_changes_nothing(small):
    """Keys and values, modulations and rotation made before; only the targets' velocity computed; joint projections."""
    pack, given = pack_images(MIXED), [True, True, False, False, True, False]
    x, context = torch.randn(len(pack.image_ids), 64), torch.randn(15, 64)
    cu = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    t = torch.tensor([1e-4, 1e-4, 0.7, 0.7, 1e-4, 0.7])
    with torch.no_grad():
        plain = small(x, t, torch.tensor(given), pack, context, cu)
        small.fuse_for_inference()
        targets = Targets(pack, given)
        once = {"kv": small.context_kv(context), "rope": small.rope(pack.positions), "targets": targets}
        once["modulations"] = small.modulations(torch.tensor([0.7, 1e-4])), torch.tensor([1, 1, 0, 0, 1, 0])
        v = small(x, None, torch.tensor(given), pack, None, cu, **once)
    assert (v - plain[targets.rows]).abs().max() < 5e-6


def test_the_kernels_give_the_same(monkeypatch):
    """In Triton's interpreter, pictures of one size and of two, joint projections."""
    wan = randomise(Wan.from_config(WanConfig(2, 2, 64, 80, freq_dim=32, crossattn_proj_in_channels=24))).fuse_for_inference()
    for sizes in ([[(2, 4), (2, 4)]], [[(1, 3)], [(2, 2), (1, 1)]]):
        pack = pack_images(sizes)
        given = [k < len(sample) - 1 for sample in sizes for k in range(len(sample))]
        x, context = torch.randn(len(pack.image_ids), 64), torch.randn(3 * len(sizes), 128)
        keys = Segments([3] * len(sizes))
        with torch.no_grad():
            args = x, torch.rand(len(given)), torch.tensor(given), pack, context, keys
            plain = wan(*args, targets=Targets(pack, given))
            with monkeypatch.context() as patch:
                patch.setattr(ops, "_backend", "triton")
                ours = wan(*args, targets=Targets(pack, given))
        assert plain.std() > 0.1 and (ours - plain).abs().max() < 2e-5


def test_bf16_stays_near_fp32(small):
    pack = pack_images(MIXED)
    args = torch.randn(len(pack.image_ids), 64), torch.rand(6), torch.zeros(6), pack, torch.randn(15, 64)
    cu = torch.tensor([0, 5, 14, 15], dtype=torch.int32)
    with torch.no_grad():
        exact = small(*args, cu)
        ours = copy.deepcopy(small).to(torch.bfloat16)(*args, cu)
    assert ours.dtype == torch.float32 and (ours - exact).norm() < 0.05 * exact.norm()


def test_fresh_weights_answer_zero_and_learn_everywhere():
    """adaLN-Zero: every block starts as the identity, and once the gates open, a gradient reaches every parameter."""
    wan = Wan.from_config(WanConfig(2, 2, 32, 80, freq_dim=32, crossattn_proj_in_channels=24))
    loss_of = flow.FlowLoss(wan, 1e-4)
    latents = [[torch.randn(16, 4, 4)] * 2, [torch.randn(16, 4, 6)]]
    samples = flow.Samples(torch.randn(9, 24), [range(4), range(9)], latents, clean=[1, 0])

    def loss():
        error, tokens = loss_of(samples, torch.tensor([0.4, 0.8]), torch.Generator().manual_seed(0))
        return error.sum() / tokens.sum()

    assert loss().item() == pytest.approx(2, rel=0.1)  # E|eps - x_0|^2
    randomise(wan)
    loss().backward()
    assert [n for n, p in wan.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []
    plain = {n: p.grad.clone() for n, p in wan.named_parameters()}
    wan.zero_grad()
    wan.gradient_checkpointing = True
    loss().backward()
    assert all(torch.allclose(p.grad, plain[n], atol=1e-6) for n, p in wan.named_parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_its_json(name):
    assert WanConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image_dim": 1280}, "image_dim must be null"),
        ({"added_kv_proj_dim": 5120}, "added_kv_proj_dim must be null"),
        ({"cross_attn_norm": False}, "cross_attn_norm must be true"),
        ({"qk_norm": None}, "qk_norm must be"),
        ({"eps": 1e-5}, "eps must be 1e-06"),
        ({"patch_size": [2, 2, 2]}, "patch_size must be"),
        ({"num_layer": 3}, "num_layers"),
        ({"attention_head_dim": 33}, "must be even"),
        ({"num_layers": 10**6}, "num_layers is 1,000,000"),
    ],
)
def test_config_refuses_what_it_cannot_run(change, message):
    with pytest.raises(InputError, match=message):
        WanConfig.from_json(PRESETS["tiny-wan"].to_json() | change)


def test_what_diffusers_writes_without_saying_so_is_its_default(tmp_path):
    """A config.json that leaves fields out has the 14B's."""
    assert WanConfig.from_json({"_class_name": "WanTransformer3DModel"}) == PRESETS["wan2.1-14B"]
    theirs = WanTransformer3DModel.load_config  # its own reading of the same file
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["wan2.1-1.3B"].to_json()))
    assert theirs(tmp_path)["num_layers"] == read_json(tmp_path / "config.json")["num_layers"] == 30
