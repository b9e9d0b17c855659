"""The bundled miniature: small enough, loaded by the reference libraries with equal outputs, and able to answer."""

from pathlib import Path

import pytest
import torch

from dit import DiT, pack_images, patchify
from model import MLLM, ImageProcessor, mrope_positions
from pipeline import DuoGen
from tokenizer import Tokenizer, render
from vae import VAE

TINY = Path(__file__).parent.parent / "checkpoints" / "tiny"


def test_fits_into_48_megabytes():
    assert sum(f.stat().st_size for f in TINY.rglob("*") if f.is_file()) <= 48e6


def test_transformers_loads_the_language_model():
    from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration

    theirs, report = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        TINY / "mllm", dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours, tokenizer = MLLM.from_pretrained(TINY / "mllm"), Tokenizer.from_pretrained(TINY / "mllm")
    processor = ImageProcessor.from_pretrained(TINY / "mllm")
    picture = torch.randint(0, 255, (64, 64, 3), dtype=torch.uint8).numpy()
    from PIL import Image

    pixels, grid = processor(Image.fromarray(picture))
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the house?"}]}]
    ids = render(tokenizer, messages, [processor.merged(grid)], generation_prompt=True).ids
    positions, _ = mrope_positions(ids, [processor.merged(grid)], tokenizer.image_pad)
    with torch.no_grad():
        hidden = ours(torch.tensor(ids), positions, torch.tensor([0, len(ids)], dtype=torch.int32), pixels, [grid])
        x = torch.tensor([ids])
        kinds = (x == tokenizer.image_pad).int()
        out = theirs(
            input_ids=x, pixel_values=pixels, image_grid_thw=torch.tensor([[1, *grid]]), mm_token_type_ids=kinds,
            output_hidden_states=True,
        )  # fmt: skip
    assert (ours.logits(hidden[-1]) - out.logits[0]).abs().max() < 2e-4 * out.logits.abs().max()
    assert AutoTokenizer.from_pretrained(TINY / "mllm").encode("Draw a red house.") == tokenizer.encode("Draw a red house.")


def test_diffusers_loads_the_painter(monkeypatch):
    from types import SimpleNamespace

    from diffusers import CosmosTransformer3DModel
    from diffusers.models.transformers import transformer_cosmos

    # diffusers resizes the padding mask by torchvision, which is not installed here; zeros stay zeros at any size
    functional = SimpleNamespace(resize=lambda x, size, interpolation: torch.zeros(*x.shape[:-2], *size))
    stub = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    monkeypatch.setattr(transformer_cosmos, "transforms", stub, raising=False)
    theirs, report = CosmosTransformer3DModel.from_pretrained(TINY / "dit", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = DiT.from_pretrained(TINY / "dit")
    for block in ours.transformer_blocks:  # diffusers' own eps, for which its config has no field
        for attention in (block.attn1, block.attn2):
            attention.norm_q.eps = attention.norm_k.eps = 1e-5
    torch.manual_seed(0)
    x, text = torch.randn(1, 16, 2, 8, 8), torch.randn(1, 7, ours.config.crossattn_proj_in_channels)
    mask, t = torch.zeros(1, 1, 2, 8, 8), torch.tensor([0.5])
    with torch.no_grad():
        v = theirs(x, t, text, condition_mask=mask, padding_mask=torch.zeros(1, 1, 64, 64), return_dict=False)[0]
        pack = pack_images([[(4, 4), (4, 4)]])
        tokens = torch.cat([patchify(x[0, :, k]) for k in range(2)])
        cu = torch.tensor([0, 7], dtype=torch.int32)
        mine = ours(tokens, t.repeat(2), torch.zeros(2), pack, ours.crossattn_proj(text[0]), cu)
    expected = torch.cat([patchify(v[0, :, k]) for k in range(2)])
    assert (mine - expected).abs().max() < 5e-5 * max(1, expected.abs().max().item())


def test_diffusers_loads_the_vae():
    from diffusers import AutoencoderKLWan

    theirs, report = AutoencoderKLWan.from_pretrained(TINY / "vae", torch_dtype=torch.float32, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ours = VAE.from_pretrained(TINY / "vae")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        z = theirs.encode(x[:, :, None]).latent_dist.mode()
        assert (ours.encode(x)[0] - z[:, :, 0]).abs().max() < 5e-5
        assert (ours.decode(z[:, :, 0]).clamp(-1, 1) - theirs.decode(z).sample[:, :, 0]).abs().max() < 5e-5


@pytest.fixture(scope="module")
def duo():
    return DuoGen.from_pretrained()


def test_a_lesson_has_steps_and_pictures(duo):
    answer = duo.generate("How do I draw a red house with a blue door?", duo.settings(steps=2))
    assert answer.stop == "end"
    assert len(answer.pictures) >= 3
    assert all(word in answer.text.lower() for word in ("red", "blue", "door", "walls"))


def test_talk_needs_no_picture(duo):
    answer = duo.generate("Thank you!", duo.settings(steps=2))
    assert answer.stop == "end" and answer.text and not answer.pictures
