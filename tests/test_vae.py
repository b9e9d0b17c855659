"""The VAE against diffusers' AutoencoderKLWan: latents, pixels, files in both directions, and what must be refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import vae as vae_module
from checkpoint import InputError
from vae import PRESETS, VAE, ChannelNorm, VAEConfig, published_shapes, to_image, to_tensor

WEIGHTS = "diffusion_pytorch_model.safetensors"
OTHER = {
    "dim_mult": [1, 2, 3],
    "temperal_downsample": [True, False],
    "num_res_blocks": 3,
    "z_dim": 4,
    "decoder_base_dim": 16,
    "latents_mean": [0.1, -0.2, 0.3, 0.0],
    "latents_std": [2.0, 1.0, 0.5, 1.5],
}


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Weights, gains and biases that all matter, in a scale that keeps the signal; also in what one frame must not meet."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_()
            if name.endswith("gamma"):
                p.mul_(0.3).add_(1.0)
            elif p.ndim == 1:
                p.mul_(0.2)
            else:
                p.mul_((p[0].numel() / (p.shape[2] if p.ndim == 5 else 1)) ** -0.5)
    return model


def reference(folder, **config):
    from diffusers import AutoencoderKLWan

    model = fill(AutoencoderKLWan(**config))
    model.save_pretrained(folder)
    return model


def small(**changes) -> VAE:
    return fill(VAE(VAEConfig(**{"base_dim": 8, "num_res_blocks": 1} | changes)))


def rewrite(folder, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


# ------------------------------------------------------------------------------------------------- equality with diffusers


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({"base_dim": 8}, (2, 3, 64, 48)),
        ({"base_dim": 8}, (1, 3, 50, 70)),  # odd halves on the way: 25 -> 12 rows, 35 -> 17 columns
        ({"base_dim": 16, "num_res_blocks": 1}, (2, 3, 64, 64)),
        ({"base_dim": 8} | OTHER, (3, 3, 40, 24)),
        ({}, (1, 3, 64, 80)),  # the published size
    ],
)
def test_latents_and_pixels_equal_diffusers(tmp_path, config, shape):
    ref = reference(tmp_path, **config)
    ours = VAE.from_pretrained(tmp_path)
    x = torch.rand(shape) * 2 - 1
    with torch.no_grad():
        posterior = ref.encode(x[:, :, None]).latent_dist
        mean, logvar = ours.encode(x)
        assert mean.shape == (shape[0], ours.config.z_dim, *(side // ours.config.factor for side in shape[2:]))
        assert (mean - posterior.mode()[:, :, 0]).abs().max() <= 5e-5
        assert (logvar - posterior.logvar[:, :, 0]).abs().max() <= 5e-5
        pixels = ref.decode(posterior.mode()).sample[:, :, 0]
        assert (ours.decode(mean).clamp(-1, 1) - pixels).abs().max() <= 5e-5

        m, s = (torch.tensor(v)[:, None, None] for v in (ref.config.latents_mean, ref.config.latents_std))
        latents = ours.encode_latents(x)
        assert (latents * s + m - posterior.mode()[:, :, 0]).abs().max() <= 5e-5
        assert (ours.decode_latents(latents) - pixels).abs().max() <= 5e-5


@pytest.mark.parametrize("config", [{"base_dim": 8}, {"base_dim": 8} | OTHER])
def test_diffusers_loads_what_is_saved(tmp_path, config):
    from diffusers import AutoencoderKLWan

    ours = fill(VAE(VAEConfig(**config)))
    ours.set_latent_statistics([0.5] * ours.config.z_dim, [3.0] * ours.config.z_dim)
    ours.save_pretrained(tmp_path)
    ref, report = AutoencoderKLWan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert ref.config.latents_mean == [0.5] * ours.config.z_dim and ref.config.latents_std == [3.0] * ours.config.z_dim
    assert not [k for k in json.loads((tmp_path / "config.json").read_text()) if k[0] != "_" and k not in ref.config]

    x = torch.rand(2, 3, 48, 32) * 2 - 1
    with torch.no_grad():
        mean, _ = ours.encode(x)
        assert (ref.encode(x[:, :, None]).latent_dist.mode()[:, :, 0] - mean).abs().max() <= 5e-5
        assert (ref.decode(mean[:, :, None]).sample[:, :, 0] - ours.decode(mean).clamp(-1, 1)).abs().max() <= 5e-5
        again = VAE.from_pretrained(tmp_path)
        assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


# ------------------------------------------------------------------------------------------------------ files and shapes


def test_published_size_on_meta():
    shapes, unused = published_shapes(PRESETS["wan2.1"])
    with torch.device("meta"):
        live = sum(p.numel() for p in VAE(PRESETS["wan2.1"]).parameters())
    assert (len(shapes), len(unused), live) == (186, 8, 44_599_603)
    assert sum(int(np.prod(s)) for s in (shapes | unused).values()) == 126_892_531


def test_published_names_and_config(shared):
    folder = shared / "cosmos-predict2.5-2b-derived" / "vae"
    published = json.loads((folder / "config.json").read_text())
    config = VAEConfig.from_json(published)
    assert config == PRESETS["wan2.1"]
    assert {k: v for k, v in published.items() if k != "_diffusers_version"} == config.to_json()
    shapes, unused = published_shapes(config)
    assert {k: list(v) for k, v in (shapes | unused).items()} == json.loads((folder / "tensor_shapes.json").read_text())


def test_half_precision_on_disk(tmp_path):
    vae = small()
    vae.save_pretrained(tmp_path, dtype=torch.float16)
    assert {t.dtype for t in load_file(tmp_path / WEIGHTS).values()} == {torch.float16}
    again = VAE.from_pretrained(tmp_path)
    assert again.dtype == torch.float32
    for a, b in zip(again.parameters(), vae.parameters(), strict=True):
        assert torch.equal(a, b.half().float())
    assert VAE.from_pretrained(tmp_path, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_slices_of_other_frames_leave_the_memory(tmp_path):
    small().save_pretrained(tmp_path)
    for p in VAE.from_pretrained(tmp_path).parameters():
        assert p.untyped_storage().nbytes() == p.nbytes


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("decoder.conv_in.bias"), "decoder.conv_in.bias"),
        (lambda t: t.update({"encoder.conv_in.scale": torch.zeros(1)}), "encoder.conv_in.scale"),
        (lambda t: t.update({"encoder.conv_in.weight": torch.zeros(8, 3, 3, 3)}), "encoder.conv_in.weight"),  # a 2-D kernel
        (lambda t: t.update({"quant_conv.weight": torch.zeros(32, 32, 1, 1, 2)}), "quant_conv.weight"),
        (lambda t: t.update({"encoder.norm_out.gamma": torch.zeros(16, 1, 1, 2)}), "encoder.norm_out.gamma"),
        (lambda t: t.update({"encoder.down_blocks.1.time_conv.weight": torch.zeros(1)}), "down_blocks.1.time_conv"),
    ],
)
def test_wrong_tensors_are_refused_by_name(tmp_path, change, message):
    small().save_pretrained(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(InputError, match=message):
        VAE.from_pretrained(tmp_path)


def test_time_conv_may_be_absent(tmp_path):
    vae = small()
    vae.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: [t.pop(name) for name in list(t) if "time_conv" in name])
    assert torch.equal(VAE.from_pretrained(tmp_path).quant_conv.weight, vae.quant_conv.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"is_residual": True}, "is_residual"),
        ({"attn_scales": [0.5]}, "attn_scales"),
        ({"patch_size": 2}, "patch_size"),
        ({"latents_std": [1.0]}, "latents_std"),
        ({"temperal_downsample": [True]}, "temperal_downsample"),
        ({"groups": 32}, "groups"),
    ],
)
def test_other_networks_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        VAEConfig.from_json(VAEConfig().to_json() | change)


def test_missing_and_truncated_files(tmp_path):
    with pytest.raises(InputError):
        VAE.from_pretrained(tmp_path)
    small().save_pretrained(tmp_path)
    data = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match=WEIGHTS):
        VAE.from_pretrained(tmp_path)


# --------------------------------------------------------------------------------------------------------------- numbers


def test_norm_has_fp32_accuracy_in_half_precision():
    norm = ChannelNorm(256).bfloat16()
    x = (torch.randn(1, 256, 2, 2) * 300).bfloat16()
    want = torch.nn.functional.normalize(x.float(), dim=1) * 16
    assert torch.equal(norm(x), want.bfloat16())
    assert not norm(torch.zeros(1, 256, 1, 1)).any()  # a pixel without signal is no division by zero


def test_log_variance_is_bounded():
    vae = small()
    with torch.no_grad():
        vae.quant_conv.bias[16:24], vae.quant_conv.bias[24:] = 100.0, -100.0
        _, logvar = vae.encode(torch.zeros(1, 3, 16, 16))
    assert (logvar[:, :8] == 20).all() and (logvar[:, 8:] == -30).all()


def test_autocast_and_channels_last():
    vae = small()
    x = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        exact = vae.encode(x)[0]
        vae = vae.to(memory_format=torch.channels_last)
        torch.testing.assert_close(vae.encode(x.to(memory_format=torch.channels_last))[0], exact, atol=2e-5, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):
        mean, _ = vae.encode(x.to(memory_format=torch.channels_last))
        assert mean.dtype == torch.bfloat16
        assert (mean - exact).norm() < 0.03 * exact.norm()
        vae.decode(mean).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for name, p in vae.named_parameters())
    with torch.no_grad():
        half = vae.bfloat16()
        assert half.encode_latents(x).dtype == half.decode_latents(mean).dtype == torch.float32


def test_fresh_weights_carry_signal():
    vae = VAE.from_config(PRESETS["tiny"])
    x = torch.rand(2, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        mean, logvar = vae.encode(x)
        y = vae.decode(torch.randn_like(mean))
    assert mean.shape == (2, 16, 8, 8) and y.shape == x.shape
    for value in (mean, logvar, y):
        assert 0.1 < value.std() < 3


def test_tiny_vae_learns_one_picture():
    vae = VAE.from_config(VAEConfig(base_dim=8, num_res_blocks=1))
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4) * 2 - 1, size=32)
    optimizer = torch.optim.Adam(vae.parameters(), 5e-3)
    losses = []
    for _ in range(80):
        loss = (vae.decode(vae.encode(x)[0]) - x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10, losses[::20]


def test_statistics_belong_to_one_vae():
    a, b = VAE.from_config(PRESETS["tiny"]), VAE.from_config(PRESETS["tiny"])
    a.set_latent_statistics([1.0] * 16, [2.0] * 16)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(a.encode_latents(x), (a.encode(x)[0] - 1) / 2)
        torch.testing.assert_close(b.encode_latents(x), b.encode(x)[0])
        assert a.decode_latents(100 * torch.randn(1, 16, 2, 2)).abs().max() <= 1
    with pytest.raises(InputError, match="z_dim"):
        a.set_latent_statistics([0.0], [1.0])


# -------------------------------------------------------------------------------------------------------------- pictures


def test_pixels_survive_the_round_trip():
    image = Image.fromarray(np.arange(3 * 16 * 32, dtype=np.uint16).reshape(16, 32, 3).astype(np.uint8))
    x = to_tensor(image)
    assert x.shape == (3, 16, 32) and x.min() == -1 and x.max() == 1
    assert np.array_equal(np.asarray(to_image(x)), np.asarray(image))
    assert np.asarray(to_image(torch.full((3, 16, 16), 7.0))).min() == 255


@pytest.mark.parametrize(
    ("size", "options", "want"),
    [
        ((64, 64), {}, (64, 64)),
        ((50, 70), {}, (48, 64)),
        ((100, 41), {}, (96, 48)),
        ((3, 200), {}, (16, 192)),  # at least one multiple; 200 is 12.5 of them, and half goes to the even number
        ((1000, 500), {"max_area": 128 * 128}, (176, 96)),
        ((100, 100), {"multiple": 8}, (96, 96)),
    ],
)
def test_picture_sizes(size, options, want):
    assert to_tensor(Image.new("RGB", size, "red"), **options).shape == (3, want[1], want[0])


def test_transparency_is_not_dropped_silently():
    with pytest.raises(ValueError, match="to_rgb"):
        to_tensor(Image.new("RGBA", (16, 16)))
    assert vae_module.to_tensor(Image.new("L", (16, 16), 255)).min() == 1
