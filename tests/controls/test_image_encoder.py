"""Pictures are encoded as by transformers' CLIP, and become an IP-Adapter's tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.controls.control_file import load_control
from lib_delta.controls.image_encoder import DEVIATION, MEAN, ImageEncoder, image_tokens, load_image_encoder
from lib_delta.controls.picture_file import pixels
from lib_delta.errors import AdapterError, CheckpointError, SettingError
from tests.support.controls import image_tensors, save, their_encoder, transformers
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.tiny_unet import randn, tiny_unet


@pytest.mark.parametrize(("projection", "activation"), [(40, "gelu"), (768, "quick_gelu")])
@pytest.mark.parametrize("size", [(40, 60), (64, 28), (17, 19)])
def test_pictures_are_seen_as_transformers_sees_them(
    size: tuple[int, int], projection: int, activation: str, tmp_path: Path
) -> None:
    theirs, path = their_encoder(tmp_path, projection, activation)
    picture = (np.random.default_rng(0).random((*size, 3)) * 255).astype(np.uint8)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    prepared: Tensor = processor(Image.fromarray(picture), return_tensors="pt")["pixel_values"]
    ours = load_image_encoder(path)
    seen = ours.prepare(pixels(picture))
    # PIL rounds to 8 bits between its two directions as well: one pixel in three is 1 of 255 off, of 0.27.
    assert (seen - prepared).abs().mean() < 0.3 / 255 / 0.27
    in_bytes = (seen * torch.tensor(DEVIATION)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255
    assert (in_bytes - in_bytes.round()).abs().max() < 1e-2
    expected = theirs(prepared, output_hidden_states=True)
    assert (ours(prepared, False) - expected.image_embeds).abs().max() < 1e-5
    assert (ours(prepared, True) - expected.hidden_states[-2]).abs().max() < 1e-5


def test_the_image_encoder_has_no_layers_that_webuis_patch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_image_encoder(their_encoder(tmp_path)[1])
    prepared = encoder.prepare(randn(1, 3, 40, 40).sigmoid())
    wanted = encoder(prepared, of_patches=True)

    def patched(self: torch.nn.Module, x: Tensor) -> Tensor:
        raise AssertionError(f"{type(self).__name__} is patched")

    for kind in (torch.nn.Linear, torch.nn.LayerNorm, torch.nn.Conv2d):
        monkeypatch.setattr(kind, "forward", patched)
    assert torch.equal(encoder(prepared, of_patches=True), wanted)


def test_a_layer_is_in_memory_while_it_runs_and_no_longer(tmp_path: Path) -> None:
    theirs, path = their_encoder(tmp_path)
    encoder = load_image_encoder(path)
    filled: list[int] = []

    def here() -> int:
        return sum(weight.numel() for weight in encoder.parameters() if not weight.is_meta)

    for layer in encoder.transformer.vision_model.encoder.layers:
        layer.mlp.register_forward_hook(lambda *_: filled.append(here()))
    prepared = encoder.prepare(randn(1, 3, 40, 40).sigmoid())
    for _ in range(2):
        assert (encoder(prepared, of_patches=False) - theirs(prepared).image_embeds).abs().max() < 1e-5
        of_layer = sum(weight.numel() for weight in theirs.vision_model.encoder.layers[0].parameters())
        assert set(filled) == {of_layer} and here() == 0
    with pytest.raises(RuntimeError):
        encoder(prepared[:, :1], of_patches=False)
    assert here() == 0


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_with_in_float32(stored: torch.dtype, tmp_path: Path) -> None:
    theirs, path = their_encoder(tmp_path)
    theirs = theirs.to(stored)
    save_file({k: v.contiguous() for k, v in theirs.state_dict().items()}, str(path), {"delta.vision_heads": "4"})
    encoder = load_image_encoder(path)
    prepared = encoder.prepare(randn(1, 3, 40, 40).sigmoid())
    assert (encoder(prepared, of_patches=False) - theirs.float()(prepared).image_embeds).abs().max() < 1e-5


@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_tokens_of_pictures_and_of_none(form: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    _, path = their_encoder(tmp_path)
    encoder = load_image_encoder(path)
    file = load_control(save(tmp_path / "ip.safetensors", image_tensors(form, unet, 16)), unet)
    pictures = [randn(1, 3, 30, 40, seed=i).sigmoid() for i in (1, 2)]
    one, none = image_tokens(file, encoder, pictures[:1])
    two, none_twice = image_tokens(file, encoder, pictures)
    assert one.shape == none.shape == ({"base": 4, "plus": 5, "full": 17}[form], 16)
    torch.testing.assert_close(two[: len(one)], one, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(none_twice, torch.cat((none, none)))
    assert (one - none).abs().max() > 0.01


@pytest.mark.parametrize("form", ["base", "plus", "full"])
def test_a_projection_in_half_precision_gives_tokens_on_the_cpu(form: str, tmp_path: Path) -> None:
    unet = tiny_unet()
    _, path = their_encoder(tmp_path)
    stored = save(tmp_path / "ip.safetensors", image_tensors(form, unet, 16))
    exact, half = load_control(stored, unet), load_control(stored, unet, torch.float16)
    picture = [randn(1, 3, 30, 40).sigmoid()]
    for wanted, made in zip(*(image_tokens(file, load_image_encoder(path), picture) for file in (exact, half))):
        assert made.dtype == torch.float16
        torch.testing.assert_close(made.float(), wanted, atol=2e-2, rtol=2e-2)


def test_a_picture_is_seen_alike_once_the_adapter_is_on_a_device_with_autocast(tmp_path: Path) -> None:
    """From the second picture on it is, and AUTOMATIC1111 may have autocast on there."""
    unet = tiny_unet()
    _, path = their_encoder(tmp_path)
    file = load_control(save(tmp_path / "ip.safetensors", image_tensors("plus", unet, 16)), unet)
    picture = [randn(1, 3, 30, 40).sigmoid()]
    wanted = image_tokens(file, load_image_encoder(path), picture)
    with stand_in_device():
        file.model.to(DEVICE)
        with torch.autocast("cpu", torch.bfloat16):
            looked = [tokens.cpu() for tokens in image_tokens(file, RoundedByNone(load_image_encoder(path)), picture)]
    for found, expected in zip(looked, wanted):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


class RoundedByNone(torch.nn.Module):
    """An image encoder on the CPU, whose autocast is another device's than the adapter's."""

    def __init__(self, encoder: ImageEncoder) -> None:
        super().__init__()
        self.prepare, self.encoder = encoder.prepare, encoder

    def forward(self, *given: Any) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.encoder(*given)


def test_what_does_not_fit_is_said_in_one_sentence(tmp_path: Path) -> None:
    unet = tiny_unet()
    _, path = their_encoder(tmp_path, projection=768, activation="quick_gelu")
    encoder = load_image_encoder(path)
    file = load_control(save(tmp_path / "ip.safetensors", image_tensors("base", unet, 16)), unet)
    with pytest.raises(AdapterError, match="another image encoder than this one, whose pictures are 768 wide"):
        image_tokens(file, encoder, [randn(1, 3, 30, 40)])
    with pytest.raises(SettingError, match="has no picture to look at"):
        image_tokens(file, encoder, [])
    with pytest.raises(CheckpointError, match="no CLIP image encoder"):
        load_image_encoder(tmp_path / "ip.safetensors")
