"""Controls in the demo: what is measured of them, and that training writes what it trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from tests.support.tiny_unet import randn

pytest.importorskip("resvg_py")

from demo.colours import similarity
from demo.controls import Example, of_maps, of_references
from demo.edges import agreement, edge_maps
from demo.train import controls, export
from demo.train.denoisers import BASE, VARIANTS
from lib_delta.controls.control_file import load_control
from lib_delta.controls.image_encoder import image_tokens, load_image_encoder
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.unet import UNet


def drawing(shift: int = 0, colour: str = "red") -> Tensor:
    picture = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(picture)
    pen.ellipse((10 + shift, 12, 44 + shift, 50), fill=colour)
    pen.rectangle((30 + shift, 30, 58 + shift, 56), fill="navy")
    pen.polygon([(4 + shift, 60), (20 + shift, 6), (26 + shift, 60)], fill="green")
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None]


def as_float(pictures: Tensor) -> Tensor:
    return pictures.float() / 127.5 - 1


def test_edges_are_those_of_opencv() -> None:
    cv2 = pytest.importorskip("cv2")
    for picture in (drawing(), drawing(3, "orange")):
        wanted = torch.from_numpy(cv2.Canny(picture[0].permute(1, 2, 0).numpy(), 100, 200) / 255).float()[None]
        got = edge_maps(as_float(picture))
        assert wanted.sum() > 100 and float(agreement(got, wanted, tolerance=0)) > 0.95


def test_edges_agree_as_far_as_they_lie_on_each_other() -> None:
    maps = {shift: edge_maps(as_float(drawing(shift))) for shift in (0, 1, 4)}
    assert float(agreement(maps[0], maps[0])) == pytest.approx(1)
    assert float(agreement(maps[1], maps[0])) > 0.95 > 0.8 > float(agreement(maps[4], maps[0]))
    assert float(agreement(torch.zeros_like(maps[0]), maps[0])) == 0


def test_colours_are_compared_without_the_paper() -> None:
    red, moved, orange = (as_float(drawing(*how)) for how in ((0,), (3,), (0, "orange")))
    assert float(similarity(red, red)) == pytest.approx(1)
    assert float(similarity(moved, red)) > 0.97 > float(similarity(orange, red)) > 0.3
    assert float(similarity(torch.ones_like(red), red)) == 0


def test_no_prompt_names_what_it_is_shown(tmp_path: Path) -> None:
    prompts = [example.name for kind in ("edges", "references") for example in Example.all(kind)]
    for cases in (of_maps(tmp_path, prompts), of_references(tmp_path, prompts)):
        pairs = [(prompt, shown.name) for case in cases for prompt, shown in zip(case.prompts, case.shown, strict=True)]
        assert len(pairs) > 20 and all(prompt != shown for prompt, shown in pairs)


@pytest.fixture(scope="module")
def unet() -> UNet:
    model = UNet(BASE).requires_grad_(False)
    for i, weight in enumerate(model.parameters()):
        weight.copy_(0.1 * randn(*weight.shape, seed=i))
    return model


def moved(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for i, weight in enumerate(weight for weight in model.parameters() if weight.requires_grad):
            weight += 0.05 * randn(*weight.shape, seed=i)


X, T, CONTEXT = randn(2, 4, 16, 16), torch.tensor([100.0, 700.0]), randn(2, 7, BASE.context_width)


def test_the_controlnet_in_the_file_is_the_one_that_was_trained(unet: UNet, tmp_path: Path) -> None:
    model = controls.EdgeControl(unet)
    maps = randn(2, 3, 64, 64).sigmoid()
    with torch.no_grad():
        assert not any(residual.any() for residual in model(X, T, CONTEXT, maps)), "it starts with nothing to add"
        moved(model)
        model.half().float()  # as the file rounds it
        trained = model(X, T, CONTEXT, maps)
    export.edges(tmp_path / "edges.safetensors", model)
    read = load_control(tmp_path / "edges.safetensors", unet)
    assert read.kind == "Control-LoRA" and isinstance(read.model, ControlNet)
    for residual, expected in zip(read.model(X, T, CONTEXT, read.model.hint(maps)), trained, strict=True):
        torch.testing.assert_close(residual, expected, atol=1e-2, rtol=1e-2)
        assert expected.abs().max() > 0.1


def test_the_image_prompt_in_the_files_is_the_one_that_was_trained(unet: UNet, tmp_path: Path) -> None:
    model = controls.PicturePrompt(unet)
    moved(model)
    model.half().float()
    picture = as_float(drawing())
    with torch.no_grad():
        trained = model(picture.expand(2, -1, -1, -1), torch.tensor([1.0, 0.0]))
    export.image_prompt(tmp_path, model)
    read = load_control(tmp_path / "image-prompt.safetensors", unet)
    encoder = load_image_encoder(tmp_path / "image-encoder.safetensors")
    tokens = torch.stack(image_tokens(read, encoder, [(picture + 1) / 2]))
    for (k, v), (trained_k, trained_v) in zip(read.model.keys_and_values(tokens), trained, strict=True):
        torch.testing.assert_close(k, trained_k, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(v, trained_v, atol=1e-2, rtol=1e-2)
    assert (trained[0][0][0] - trained[0][0][1]).abs().max() > 0.1, "a picture and none"


def test_maps_are_those_of_the_pictures_that_the_latents_are_of() -> None:
    shown = controls.variants_of(torch.cat((drawing(), drawing(3))), VARIANTS // 2, seed=7)
    assert shown.shape == (2, VARIANTS, 3, 64, 64)
    maps = controls.maps_of(shown)
    assert maps.shape == (2, VARIANTS, 1, 64, 64) and set(maps.unique().tolist()) == {0, 255}
    expected = edge_maps(as_float(shown[1, 3:4]))
    assert torch.equal(maps[1, 3] / 255, expected)


def test_references_are_turned_and_put_in_disorder_without_a_change_of_colour() -> None:
    pictures = as_float(drawing()).expand(40, -1, -1, -1)
    generator = torch.Generator().manual_seed(0)
    mixed = controls.in_disorder(pictures, generator)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(mixed, pictures)) < 40
    torch.testing.assert_close(mixed.flatten(2).sort().values, pictures.flatten(2).sort().values)
    turned = controls.turned(pictures, generator)
    assert (similarity(turned, pictures) > 0.7).all() and not torch.equal(turned[0], turned[1])
