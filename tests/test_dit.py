"""dit.py and connector.py: equal to diffusers on its checkpoints, packed pictures equal single ones, training reaches all."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from diffusers import CosmosTransformer3DModel
from diffusers.models.transformers import transformer_cosmos
from safetensors.torch import load_file

import ops
from checkpoint import InputError, read_json
from connector import Connector, features
from dit import PRESETS, DiT, DiTConfig, Targets, pack_images, patchify, unpatchify
from launches import Launches
from model import MLLM, mrope_positions
from ops import Segments
from sketchbook import dialogues
from tokenizer import Tokenizer, render
from vae import VAE, to_tensor

TINY = Path(__file__).parent.parent / "checkpoints" / "tiny"
SMALL = DiTConfig(2, 3, 32, adaln_lora_dim=8, text_embed_dim=24, crossattn_proj_in_channels=40, qk_norm_eps=1e-5)


def randomise(module):
    """Every parameter away from its initial value, zeros and ones included, at a size that keeps activations near 1."""
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(1.0 if p.ndim == 1 and p.mean() == 1 else 0.0, 0.3 if p.ndim == 1 else p.shape[1] ** -0.5)
    return module.eval()


@pytest.fixture(scope="module")
def small():
    return randomise(DiT.from_config(SMALL))


def inputs(dit, sizes, lengths):
    """A random batch: (x, t, condition, pack, context, cu_context), the last image of every sample noisy."""
    pack = pack_images(sizes)
    condition = torch.tensor([k < len(s) - 1 for s in sizes for k in range(len(s))])
    t = torch.where(condition, 1e-4, torch.rand(len(condition)))
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    return torch.randn(len(pack.image_ids), 64), t, condition, pack, torch.randn(sum(lengths), dit.config.text_embed_dim), cu


# ---------------------------------------------------------------------------------------------------------- vs diffusers


@pytest.fixture
def no_torchvision(monkeypatch):
    """diffusers resizes the padding mask by torchvision, which is not installed here: by nearest neighbour, as this does."""

    def resize(x, size, interpolation):
        return F.interpolate(x, size, mode=interpolation)

    stub = SimpleNamespace(functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", stub, raising=False)


def published(tmp_path_factory, name, **options):
    """A random checkpoint that diffusers wrote, and both models that read it. qk eps 1e-5 is what diffusers computes with."""
    theirs = randomise(
        CosmosTransformer3DModel(
            in_channels=17, rope_scale=(1.0, 3.0, 3.0), extra_pos_embed_type=None, use_crossattn_projection=True, **options
        )
    )
    folder = tmp_path_factory.mktemp(name)
    theirs.save_pretrained(folder, max_shard_size="200MB")
    config = read_json(folder / "config.json") | {"_qk_norm_eps": 1e-5}
    (folder / "config.json").write_text(json.dumps(config))
    return theirs, DiT.from_pretrained(folder), folder


@pytest.fixture(scope="module")
def split_2b(tmp_path_factory):
    """The head split, modulation rank and patch of the 2B model; shallow, thin MLP, short text features. In two shards."""
    return published(
        tmp_path_factory, "split", num_attention_heads=16, attention_head_dim=128, num_layers=2, mlp_ratio=1.0,
        adaln_lora_dim=256, text_embed_dim=128, encoder_hidden_states_channels=128, crossattn_proj_in_channels=192,
    )  # fmt: skip


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """Heads of 64 as in the miniature, full MLP, more layers."""
    return published(
        tmp_path_factory, "deep", num_attention_heads=2, attention_head_dim=64, num_layers=5, adaln_lora_dim=16,
        text_embed_dim=48, encoder_hidden_states_channels=48, crossattn_proj_in_channels=96,
    )  # fmt: skip


def velocity_of(theirs, x, t, text, condition, padding):
    with torch.no_grad():
        return theirs(x, t, text, condition_mask=condition, padding_mask=padding).sample


def velocity_of_ours(ours, x, t, text, condition, padding):
    """The same dense batch (B, C, T, H, W) through the packed forward."""
    b, _, frames, h, w = x.shape
    grid = (h // 2, w // 2)
    pack = pack_images([[grid] * frames] * b)
    pad = patchify(F.interpolate(padding, (h, w), mode="nearest")[0]).repeat(b * frames, 1)
    packed = torch.cat([patchify(x[i, :, f]) for i in range(b) for f in range(frames)])
    times = t.flatten() if t.ndim == 5 else t.repeat_interleave(frames)
    cu = torch.arange(b + 1, dtype=torch.int32) * text.shape[1]
    with torch.no_grad():
        context = ours.crossattn_proj(text.flatten(0, 1))
        v = ours(packed, times, condition[:, 0, :, 0, 0].flatten(), pack, context, cu, padding=pad)
    v = torch.stack([unpatchify(image, grid) for image in v.split(grid[0] * grid[1])])
    return v.unflatten(0, (b, frames)).transpose(1, 2)


@pytest.mark.parametrize("model", ["split_2b", "deep"])
@pytest.mark.parametrize(
    "frames, h, w, batch, clean, text",
    [(1, 6, 10, 2, 0, 512), (3, 10, 6, 2, 2, 512), (2, 14, 2, 1, 1, 7), (5, 2, 18, 1, 4, 512)],
    ids=["T1", "T3", "T2-column", "T5-row"],
)
def test_velocity_equals_diffusers(model, frames, h, w, batch, clean, text, request, no_torchvision):
    """Odd patch grids, time by frame, clean frames, a padding mask that is not zero, 512 text tokens through the projection."""
    theirs, ours, _ = request.getfixturevalue(model)
    x = torch.randn(batch, 16, frames, h, w)
    t = torch.rand(batch, 1, frames, 1, 1) if frames > 1 else torch.rand(batch)
    condition = (torch.arange(frames) < clean).float().view(1, 1, -1, 1, 1).repeat(batch, 1, 1, h, w)
    padding = (torch.rand(1, 1, 8 * h, 8 * w) > 0.5).float()
    args = x, t, torch.randn(batch, text, ours.config.crossattn_proj_in_channels), condition, padding
    reference, v = velocity_of(theirs, *args), velocity_of_ours(ours, *args)
    assert reference.std() > 0.3  # something is compared
    assert (v - reference).abs().max() <= 5e-5


def test_padding_and_condition_masks_matter(deep, no_torchvision):
    theirs, ours, _ = deep
    x, t, text = torch.randn(1, 16, 2, 4, 6), torch.rand(1, 1, 2, 1, 1), torch.randn(1, 9, 96)
    zero, one = torch.zeros(1, 1, 2, 4, 6), torch.ones(1, 1, 32, 48)
    plain = velocity_of_ours(ours, x, t, text, zero, one * 0)
    assert (velocity_of_ours(ours, x, t, text, zero, one) - plain).abs().max() > 1e-2
    assert (velocity_of_ours(ours, x, t, text, zero + 1, one * 0) - plain).abs().max() > 1e-2


def test_a_checkpoint_in_shards_was_read(split_2b):
    assert len(list(split_2b[2].glob("*.safetensors"))) > 1


def test_diffusers_loads_what_we_save(small, tmp_path, no_torchvision):
    """Every key, no other, and the same velocity; in shards too."""
    small.save_pretrained(tmp_path, shard_bytes=100_000)
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 1
    theirs = CosmosTransformer3DModel.from_config(CosmosTransformer3DModel.load_config(tmp_path))
    theirs.load_state_dict({n: t for file in tmp_path.glob("*.safetensors") for n, t in load_file(file).items()}, strict=True)
    again = DiT.from_pretrained(tmp_path)
    assert again.config == small.config  # qk_norm_eps travelled
    x, t, text = torch.randn(2, 16, 3, 6, 4), torch.rand(2, 1, 3, 1, 1), torch.randn(2, 11, 40)
    args = x, t, text, torch.zeros(2, 1, 3, 6, 4), torch.zeros(1, 1, 48, 32)
    ours = velocity_of_ours(small, *args)
    assert (velocity_of(theirs.eval(), *args) - ours).abs().max() <= 5e-5
    assert torch.equal(velocity_of_ours(again, *args), ours)


def test_diffusers_from_pretrained_finds_nothing_missing_and_nothing_left(small, tmp_path):
    pytest.importorskip("accelerate", reason="diffusers' from_pretrained needs it for this class")
    small.save_pretrained(tmp_path)
    theirs, info = CosmosTransformer3DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values()), info
    ours = small.state_dict()
    assert all(torch.equal(p, ours[n]) for n, p in theirs.state_dict().items())


def test_the_eps_that_diffusers_has_no_field_for_moves_the_miniatures_velocity_little(no_torchvision):
    """The bundled DiT is trained with 1e-6 in the norms of q and k; diffusers always runs 1e-5. Real text, real pictures."""
    theirs = CosmosTransformer3DModel.from_config(CosmosTransformer3DModel.load_config(TINY / "dit"))
    theirs.load_state_dict(load_file(TINY / "dit" / "diffusion_pytorch_model.safetensors"), strict=True)
    ours, mllm = DiT.from_pretrained(TINY / "dit"), MLLM.from_pretrained(TINY / "mllm")
    vae, tokenizer = VAE.from_pretrained(TINY / "vae"), Tokenizer.from_pretrained(TINY / "mllm")
    norms = [n for b in ours.transformer_blocks for a in (b.attn1, b.attn2) for n in (a.norm_q, a.norm_k)]
    assert {n.eps for n in norms} == {1e-6} and {b.attn1.norm_q.eps for b in theirs.transformer_blocks} == {1e-5}
    moved, same = [], []
    for seed, t in enumerate((0.02, 0.3, 0.6, 0.9, 0.999)):
        ask = ("Draw a red house.", "Make the roof green.", "Draw two stars.", "Move the tree.", "Add a blue door.")[seed]
        ids = torch.tensor(render(tokenizer, [{"role": "user", "content": ask}], [], generation_prompt=True).ids)
        with torch.no_grad():
            text = features(mllm(ids, mrope_positions(ids, [], tokenizer.image_pad)[0], Segments([len(ids)])))[None]
            clean = vae.encode_latents(torch.stack([to_tensor(picture) for picture in dialogues.pictures(seed, 2)]))
        x = torch.stack((clean[0], (1 - t) * clean[1] + t * torch.randn(clean[1].shape)), 1)[None]
        condition = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 8, 8)
        args = x, torch.tensor([1e-4, t]).view(1, 1, 2, 1, 1), text, condition, torch.zeros(1, 1, 64, 64)
        reference = velocity_of(theirs.eval(), *args)[:, :, 1]
        for eps, differences in ((1e-6, moved), (1e-5, same)):
            for norm in norms:
                norm.eps = eps
            differences.append((velocity_of_ours(ours, *args)[:, :, 1] - reference).abs().max().item())
    print("largest difference of the velocity:", [f"{d:.1e}" for d in moved], "with equal eps:", [f"{d:.1e}" for d in same])
    assert 2 * max(same) < max(moved) < 5e-3  # 3.0e-3 at most over 840 cases, the velocity itself has a deviation of 1.1
    assert max(same) < 1e-4


def test_size_of_the_published_models(shared):
    with torch.device("meta"):
        dit = DiT(PRESETS["2B"])
        DiT(PRESETS["14B"])
    folder = shared / "cosmos-predict2.5-2b-derived" / "transformer"
    ours = {name: list(p.shape) for name, p in dit.named_parameters()}
    assert ours == json.loads((folder / "tensor_shapes.json").read_text())
    assert DiTConfig.from_json(read_json(folder / "config.json")) == PRESETS["2B"]


def test_parameter_counts():
    with torch.device("meta"):
        small, large = DiT(PRESETS["2B"]), DiT(PRESETS["14B"])
    assert len(small.state_dict()) == 569 and sum(p.numel() for p in small.parameters()) == 2_059_174_912
    assert large.config.width == 5120 and len(large.transformer_blocks) == 36
    assert sum(p.numel() for p in large.parameters()) == 14_368_047_104


def test_the_14b_by_configuration():
    """It differs from the 2B in heads and layers alone. Every name and shape is diffusers' under that config, and no other."""
    published = PRESETS["2B"].to_json() | {"num_layers": 36, "num_attention_heads": 40}
    config = DiTConfig.from_json(json.loads(json.dumps(published)))
    assert config == PRESETS["14B"]
    with torch.device("meta"):
        ours = DiT(config)
        theirs = CosmosTransformer3DModel.from_config(published)
    assert {n: p.shape for n, p in ours.state_dict().items()} == {n: p.shape for n, p in theirs.state_dict().items()}


@pytest.mark.parametrize("name", PRESETS)
def test_config_survives_its_json(name):
    assert DiTConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


@pytest.mark.parametrize(
    "change, message",
    [
        ({"extra_pos_embed_type": "learnable"}, "extra_pos_embed_type must be null"),
        ({"use_crossattn_projection": False}, "use_crossattn_projection must be true"),
        ({"img_context_dim_in": 1536}, "img_context_dim_in must be null"),
        ({"patch_size": [2, 2, 2]}, "patch_size must be"),
        ({"encoder_hidden_states_channels": 7}, "must equal text_embed_dim"),
        ({"num_layer": 3}, "num_layers"),
    ],
)
def test_config_refuses_what_it_cannot_run(change, message):
    with pytest.raises(InputError, match=message):
        DiTConfig.from_json(SMALL.to_json() | change)


# --------------------------------------------------------------------------------------------------------------- packing


def test_patchify_is_channel_major_and_invertible():
    z = torch.arange(3 * 4 * 6.0).view(3, 4, 6)
    x = patchify(z)
    assert x.shape == (6, 12) and torch.equal(unpatchify(x, (2, 3)), z)
    assert x[4].tolist() == z[:, 2:4, 2:4].flatten().tolist()  # patch of row 1, column 1: c * 4 + ph * 2 + pw
    with pytest.raises(InputError, match="whole numbers of patches"):
        patchify(torch.zeros(16, 5, 4))


def test_positions_restart_in_every_image_and_count_images_per_sample():
    pack = pack_images([[(1, 2), (2, 1)], [(2, 2)]])
    assert pack.positions.tolist() == [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [0, 0, 0], [0, 0, 1], [0, 1, 0], [0, 1, 1]]
    assert pack.image_ids.tolist() == [0, 0, 1, 1, 2, 2, 2, 2] and pack.segments.cu.tolist() == [0, 4, 8]
    assert pack.segments.cu.dtype == torch.int32 and pack.shapes == [(1, 2), (2, 1), (2, 2)]
    assert pack.chunk == 2
    for sizes in ([], [[]], [[(0, 3)]]):
        with pytest.raises(InputError, match="at least"):
            pack_images(sizes)


MIXED = [[(3, 5), (2, 2), (4, 1)], [(6, 2)], [(1, 1), (7, 3)]]  # chunk 1


@pytest.mark.parametrize("sizes", [MIXED, [[(2, 4), (4, 4)], [(2, 2)], [(4, 2)] * 3]], ids=["chunk1", "chunk4"])
def test_a_sample_in_a_pack_equals_it_alone(small, sizes):
    lengths = [5, 9, 1]
    x, t, condition, pack, context, cu = inputs(small, sizes, lengths)
    with torch.no_grad():
        together = small(x, t, condition, pack, context, cu).split(pack.segments.cu.diff().tolist())
        image = 0
        for s, sample in enumerate(sizes):
            own = slice(pack.segments.cu[s], pack.segments.cu[s + 1])
            images = slice(image, image := image + len(sample))
            text = context[cu[s] : cu[s + 1]]
            ends = torch.tensor([0, lengths[s]], dtype=torch.int32)
            alone = small(x[own], t[images], condition[images], pack_images([sample]), text, ends)
            assert (alone - together[s]).abs().max() < 5e-6


def test_samples_never_influence_each_other(small):
    """Bit for bit: other pixels, times, masks and words in a neighbour change nothing."""
    x, t, condition, pack, context, cu = inputs(small, MIXED, [5, 9, 4])
    with torch.no_grad():
        before = small(x, t, condition, pack, context, cu)
        a, b = pack.segments.cu[1:3].tolist()
        x, t, condition, context = x.clone(), t.clone(), condition.clone(), context.clone()
        x[a:b], t[3], condition[3], context[5:14] = 7.0, 0.9, True, -3.0
        after = small(x, t, condition, pack, context, cu)
    kept = torch.ones(len(x), dtype=torch.bool)
    kept[a:b] = False
    assert torch.equal(before[kept], after[kept])
    assert not torch.isclose(before[~kept], after[~kept]).any(1).all()


def test_everything_inside_a_sample_counts(small):
    """The painted image sees every earlier image, its time, its order, its place, and every word."""
    x, t, condition, pack, context, cu = inputs(small, [[(2, 3), (3, 2), (2, 2)]], [6])
    target = slice(12, 16)
    with torch.no_grad():
        before = small(x, t, condition, pack, context, cu)[target]
        for change in ("x", "t", "condition", "order", "context"):
            x2, t2, condition2, context2, pack2 = x.clone(), t.clone(), condition.clone(), context.clone(), copy.deepcopy(pack)
            if change == "x":
                x2[0] += 1
            elif change == "t":
                t2[0] += 0.3
            elif change == "condition":
                condition2[0] = False
            elif change == "order":
                pack2.positions[:6, 0] = 5
            else:
                context2[3] += 1
            after = small(x2, t2, condition2, pack2, context2, cu)[target]
            assert (after - before).abs().max() > 1e-4, change


def test_precomputed_context_and_modulations_change_nothing(small):
    x, t, condition, pack, context, cu = inputs(small, MIXED, [5, 9, 4])
    with torch.no_grad():
        v = small(x, t, condition, pack, context, cu)
        assert torch.equal(v, small(x, t, condition, pack, None, cu, kv=small.context_kv(context)))
        table = small.modulations(torch.cat([torch.rand(3), t.flip(0)]))  # the times in another order, among others
        rows = torch.arange(len(t)).flip(0) + 3
        assert torch.allclose(v, small(x, None, condition, pack, context, cu, modulations=(table, rows)), atol=1e-6)


def test_targets_alone_are_computed_to_the_end(small):
    x, t, condition, pack, context, cu = inputs(small, MIXED, [5, 9, 4])
    targets = Targets(pack, condition.tolist())
    with torch.no_grad():
        v = small(x, t, condition, pack, context, cu)
        ours = small(x, t, condition, pack, context, cu, rope=small.rope(pack.positions), targets=targets)
    assert torch.equal(targets.rows, (~condition)[pack.image_ids].nonzero()[:, 0])
    assert torch.allclose(ours, v[targets.rows], atol=2e-6)


def test_kernels_and_joint_projections_change_nothing(monkeypatch):
    """Triton's kernels read the modulations row by row, and the joint projections, whose parameters are views of them."""
    small = randomise(DiT.from_config(dataclasses.replace(SMALL, num_attention_heads=1)))
    x, t, condition, pack, context, _ = inputs(small, [[(1, 1), (1, 1)], [(1, 2)]], [3, 2])
    joined = copy.deepcopy(small).fuse_for_inference()
    assert all(torch.equal(p, q) for p, q in zip(joined.parameters(), small.parameters(), strict=True))
    memory = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in joined.parameters()}
    assert sum(memory.values()) == sum(p.nbytes for p in small.parameters())
    results = []
    for dit, backend in ((small, "sdpa"), (joined, "triton")):
        monkeypatch.setattr(ops, "_backend", backend)
        with torch.no_grad(), Launches() as count:
            v = dit(x, t, condition, pack, context, Segments([3, 2]), targets=Targets(pack, condition.tolist()))
        dit(x, t, condition, pack, context, Segments([3, 2])).square().mean().backward()
        results.append((v, {n: p.grad for n, p in dit.named_parameters() if "crossattn_proj" not in n}))
    assert count.by_name["_norm_rope_kernel"] == 3 + 4  # only the last block, with fewer queries than keys, takes them apart
    (v, gradients), (ours, ours_gradients) = results
    assert torch.allclose(ours, v, atol=5e-6)
    assert all((ours_gradients[n] - g).norm() <= 1e-5 * g.norm() for n, g in gradients.items())


def test_a_sample_without_context_gets_nothing_from_it(small):
    """Equal to a sample whose cross-attention returns zeros; the neighbour with a context is untouched."""
    x, t, condition, pack, context, cu = inputs(small, [[(2, 2)], [(2, 2)]], [0, 6])
    silent = copy.deepcopy(small)
    for block in silent.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_v.weight)
    with torch.no_grad():
        v = small(x, t, condition, pack, context, cu)
        assert torch.allclose(v[:4], silent(x, t, condition, pack, context, cu)[:4], atol=1e-6)
        assert not torch.allclose(v[4:], silent(x, t, condition, pack, context, cu)[4:], atol=1e-2)


def test_a_batch_that_does_not_fit_its_pack_is_refused(small):
    x, t, condition, pack, context, cu = inputs(small, [[(2, 2)]], [3])
    with pytest.raises(ValueError, match="pack of 4 patches, 1 images"):
        small(x[:3], t, condition, pack, context, cu)


# -------------------------------------------------------------------------------------------------------------- training


def test_fresh_weights_predict_zero_and_blocks_are_the_identity():
    dit = DiT.from_config(SMALL)
    batch = inputs(dit, MIXED, [5, 9, 4])
    assert torch.equal(dit(*batch), torch.zeros_like(batch[0]))
    *blocks, out = dit.modulations(torch.rand(4))
    for m, parts in ((out, 2), *((block, 9) for block in blocks)):
        for k, part in enumerate(m.chunk(parts, 1)):
            assert torch.equal(part, torch.full_like(part, float(k % 3 == 1)))  # shift 0, 1 + scale 1, gate 0
    for name, p in dit.named_parameters():
        if p.ndim == 2 and p.any():
            assert p.std().item() == pytest.approx(p.shape[1] ** -0.5, rel=0.2), name


def test_training_from_fresh_weights_reaches_every_parameter():
    """The zeros open one after another: three steps of plain descent move every tensor."""
    dit = DiT.from_config(SMALL)
    x, t, condition, pack, _, cu = inputs(dit, MIXED, [5, 9, 4])
    hidden = torch.randn(18, 40)
    start = {n: p.detach().clone() for n, p in dit.named_parameters()}
    for _ in range(4):
        v = dit(x, t, condition, pack, dit.crossattn_proj(hidden), cu)
        ((v - torch.randn(v.shape)) ** 2).mean().backward()
        with torch.no_grad():
            for p in dit.parameters():
                p -= 3.0 * p.grad / (p.grad.norm() + 1e-12)
                p.grad = None
    assert not [n for n, p in dit.named_parameters() if torch.equal(p, start[n])]


def test_gradient_checkpointing_changes_no_gradient(small):
    batch = inputs(small, MIXED, [5, 9, 4])
    gradients = []
    for flag in (False, True):
        dit = copy.deepcopy(small)
        dit.gradient_checkpointing = flag
        dit(*batch).square().mean().backward()
        gradients.append({n: p.grad for n, p in dit.named_parameters() if "crossattn_proj" not in n})
    assert all(torch.equal(g, gradients[1][n]) for n, g in gradients[0].items()) and all(g.any() for g in gradients[0].values())


def test_bf16_is_close_to_fp32_in_weights_and_in_autocast(small):
    batch = inputs(small, MIXED, [5, 9, 4])
    with torch.no_grad():
        exact = small(*batch)
        low = copy.deepcopy(small).to(torch.bfloat16)(*batch)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = small(*batch)
    assert low.dtype == mixed.dtype == torch.float32
    error, error_mixed = ((v - exact).norm() / exact.norm() for v in (low, mixed))
    assert 1e-4 < error < 0.03 and 1e-4 < error_mixed < 0.02


def test_times_are_never_rounded_to_bf16(small):
    """Neighbouring steps of a sampler, equal in bf16, are told apart by bf16 weights and under autocast."""
    low = copy.deepcopy(small).to(torch.bfloat16)
    as_stored = copy.deepcopy(low).float()
    t = torch.tensor([0.9950, 0.9942])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for ours, reference in zip(low.modulations(t), as_stored.modulations(t), strict=True):
            assert ours.dtype == torch.float32 and torch.equal(ours, reference)
            assert (ours[0] - ours[1]).abs().max() > 1e-5
    assert t.bfloat16().unique().numel() == 1


# ------------------------------------------------------------------------------------------------------------- connector


def test_features_are_each_layers_state_normalised_per_token():
    hidden = [torch.randn(5, 12) * 10**k + k for k in range(3)]
    hidden[1][2] = 4.0  # a constant state has no direction: zeros, not infinity
    expected = [(h.double() - h.double().mean(1, keepdim=True)) / (h.double().std(1, keepdim=True) + 1e-8) for h in hidden]
    with torch.no_grad():
        ours = features(hidden)
    assert ours.shape == (5, 36) and torch.allclose(ours.double(), torch.cat(expected, 1), atol=1e-5)
    assert torch.equal(features([h.requires_grad_() for h in hidden]), ours)
    assert features([h.detach().bfloat16() for h in hidden]).dtype == torch.bfloat16


def test_connector_is_a_linear_layer_and_exact_gelu():
    connector = Connector(6, 4)
    assert [n for n, _ in connector.named_parameters()] == ["0.weight", "0.bias"]
    x = torch.randn(3, 6)
    assert torch.equal(connector(x), F.gelu(F.linear(x, connector[0].weight, connector[0].bias)))
    assert torch.equal(connector(torch.zeros(1, 6))[0], F.gelu(connector[0].bias))
