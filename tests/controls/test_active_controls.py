"""The controls of a generation: read once while they stay, with the fitting encoder, and counted as memory."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.tiny_unet import randn, tiny_unet

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from lib_delta.controls import active_controls
from lib_delta.controls.active_controls import ActiveControls, ControlPick
from lib_delta.controls.control_map import ControlMap
from lib_delta.controls.guides import ControlNetGuide, ImageGuide
from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.parameterization import Parameterization
from lib_delta.errors import AdapterError, SettingError
from lib_delta.files.weight_file import WeightFile
from lib_delta.models.unet import UNet
from tests.support.controls import PICTURE, SIGMA, TOLD, X, image_tensors, save, their_encoder, tiny_control


@pytest.fixture
def unet() -> UNet:
    return tiny_unet()


@pytest.fixture
def edges(tmp_path: Path, unet: UNet) -> ControlPick:
    return ControlPick(save(tmp_path / "edges.safetensors", tiny_control(unet).state_dict()), [PICTURE], 0.8, end=0.6)


@pytest.fixture
def image(tmp_path: Path, unet: UNet) -> ControlPick:
    path = save(tmp_path / "ip.safetensors", image_tensors("base", unet, 16))
    other, encoder = tmp_path / "other", tmp_path / "own"
    other.mkdir()
    encoder.mkdir()
    files = their_encoder(other, projection=48)[1], their_encoder(encoder)[1]
    return ControlPick(path, [PICTURE, 1 - PICTURE], 0.7, weight_type="ease in", encoders=[path, *files])


def test_picks_become_the_guides_they_ask_for(unet: UNet, edges: ControlPick, image: ControlPick) -> None:
    kept = ActiveControls(unet)
    kept.set_picks([edges, image])
    assert [(guide.start, guide.end) for guide in kept.guides] == [(0.0, 0.6), (0.0, 1.0)]
    first, second = (guide.guide for guide in kept.guides)
    assert isinstance(first, ControlNetGuide) and isinstance(second, ImageGuide)
    assert second.weight_type == "ease in" and second.weight == 0.7 and second.tokens[0].shape == (8, 16)
    expected = ControlNetGuide(tiny_control(unet), ControlMap(PICTURE, "crop and resize"), 0.8)
    deltas = [
        Source(unet, Parameterization("eps"), TOLD, guides=[guide]).delta(SourceStep(X, SIGMA, 5.0))
        for guide in (expected, first)
    ]
    torch.testing.assert_close(*deltas)
    assert len(kept.networks) == 2


def test_files_and_pictures_that_stay_are_not_looked_at_again(
    unet: UNet, edges: ControlPick, image: ControlPick, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ActiveControls(unet)
    kept.set_picks([edges, image])
    networks, tokens = kept.networks, kept.guides[1].guide.tokens  # type: ignore[attr-defined]
    for name in ("load_control", "load_image_encoder"):
        monkeypatch.setattr(active_controls, name, lambda *_, **__: pytest.fail("read again"))
    kept.set_picks([image, edges])
    assert set(map(id, kept.networks)) == set(map(id, networks))
    assert kept.guides[0].guide.tokens is tokens  # type: ignore[attr-defined]
    kept.set_picks([edges])
    assert len(kept.networks) == 1
    kept.set_picks([])
    assert kept.networks == [] and kept.guides == ()


def test_another_picture_is_looked_at(unet: UNet, image: ControlPick) -> None:
    kept = ActiveControls(unet)
    seen = []
    for pictures in ([PICTURE], [1 - PICTURE]):
        kept.set_picks([ControlPick(image.path, pictures, encoders=image.encoders)])
        seen.append(kept.guides[0].guide.tokens[0])  # type: ignore[attr-defined]
    assert (seen[0] - seen[1]).abs().max() > 0.01


def test_another_image_encoder_in_the_place_of_the_first_is_looked_through(unet: UNet, image: ControlPick) -> None:
    kept = ActiveControls(unet)
    kept.set_picks([image])
    before = kept.guides[0].guide.tokens[0]  # type: ignore[attr-defined]
    encoder = image.encoders[-1]
    with WeightFile.open(encoder) as file:
        weights = {key: 0.5 * file.tensor(key) for key in file.keys}
    save_file(weights, str(encoder), {"delta.vision_heads": "4"})
    os.utime(encoder, ns=(0, 0))
    kept.set_picks([image])
    assert (kept.guides[0].guide.tokens[0] - before).abs().max() > 0.01  # type: ignore[attr-defined]


def test_what_cannot_be_used_leaves_nothing_behind(
    unet: UNet, edges: ControlPick, image: ControlPick, tmp_path: Path
) -> None:
    lora = tmp_path / "lora.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(4, 4)}, str(lora))
    cases = {
        "is a LoRA": [ControlPick(lora, [PICTURE])],
        "has no map to follow": [ControlPick(edges.path, [])],
        "has no picture to look at": [ControlPick(image.path, [], encoders=image.encoders)],
        "no image encoder is there whose pictures are 40 wide": [ControlPick(image.path, [PICTURE])],
        "are of several sizes": [ControlPick(edges.path, [PICTURE, randn(1, 3, 32, 32)])],
    }
    kept = ActiveControls(unet)
    for sentence, picks in cases.items():
        kept.set_picks([edges])
        with pytest.raises((AdapterError, SettingError), match=sentence):
            kept.set_picks([edges, *picks])
        assert kept.networks == [] and kept.guides == ()


def test_the_mask_of_img2img_is_for_the_controlnet_for_inpainting_alone(unet: UNet, tmp_path: Path) -> None:
    mask = torch.ones(1, 1, 64, 64)
    seen = {}
    for name in ("inpaint", "edges"):
        path = save(tmp_path / f"{name}.safetensors", tiny_control(unet).state_dict())
        kept = ActiveControls(unet)
        kept.set_picks([ControlPick(path, [PICTURE], mask=mask)])
        seen[name] = kept.guides[0].guide.map.at(64, 64, 3)  # type: ignore[attr-defined]
    assert (seen["inpaint"] == -1).all() and torch.equal(seen["edges"], PICTURE)


@pytest.mark.parametrize(
    ("path", "beside", "pooled", "fills"),
    [
        ("control_v11e_sd15_shuffle.safetensors", {}, True, False),
        ("control_v11p_sd15_inpaint.safetensors", {}, False, True),
        ("reshuffled_canny.safetensors", {}, False, False),
        ("inpainted_edges.safetensors", {}, False, False),
        ("control_sd15_inpaint_depth_hand.safetensors", {}, False, False),
        ("shuffle/canny.safetensors", {}, False, False),
        ("control_v11e_sd15_shuffle/diffusion_pytorch_model.safetensors", {}, True, False),
        ("control_v11p_sd15_inpaint/diffusion_pytorch_model.fp16.safetensors", {}, False, True),
        ("mine/diffusion_pytorch_model.safetensors", {"config.json": '{"global_pool_conditions": true}'}, True, False),
        (
            "shuffle/diffusion_pytorch_model.safetensors",
            {"config.json": '{"global_pool_conditions": false}'},
            False,
            False,
        ),
        ("shuffle/diffusion_pytorch_model.safetensors", {"config.json": "{}"}, True, False),
        ("mine/canny.safetensors", {"config.json": '{"global_pool_conditions": true}'}, False, False),
        ("mine.safetensors", {"mine.yaml": "model: {params: {global_average_pooling: True}}"}, True, False),
        ("shuffle.safetensors", {"shuffle.yaml": "model: {params: {control_key: hint}}"}, True, False),
    ],
)
def test_what_a_controlnet_was_made_for_is_told_by_its_name_and_what_lies_beside_it(
    path: str, beside: dict[str, str], pooled: bool, fills: bool, unet: UNet, tmp_path: Path
) -> None:
    file = tmp_path / path
    file.parent.mkdir(exist_ok=True)
    save(file, tiny_control(unet).state_dict())
    for name, text in beside.items():
        (file.parent / name).write_text(text)
    kept = ActiveControls(unet)
    kept.set_picks([ControlPick(file, [PICTURE])])
    assert [(found.pooled, found.fills) for found in kept.files] == [(pooled, fills)]
    assert kept.guides[0].guide.pooled == pooled  # type: ignore[attr-defined]


def test_another_configuration_beside_a_controlnet_is_followed(unet: UNet, tmp_path: Path) -> None:
    file = save(tmp_path / "diffusion_pytorch_model.safetensors", tiny_control(unet).state_dict())
    kept, pooled = ActiveControls(unet), []
    for stated in ("true", "false"):
        (tmp_path / "config.json").write_text(f'{{"global_pool_conditions": {stated}, "more": "{stated}"}}')
        kept.set_picks([ControlPick(file, [PICTURE])])
        pooled.append(kept.files[0].pooled)
    assert pooled == [True, False]
    assert kept.files[0].name == f"{tmp_path.name}/{file.name}"  # all files of diffusers have the same


@pytest.mark.parametrize("kind", ["difference", "Control-LoRA"])
def test_whole_numbers_are_no_difference_to_the_base(kind: str, unet: UNet, tmp_path: Path) -> None:
    tensors = tiny_control(unet).state_dict()
    layer = "input_blocks.1.1.proj_in" if "input_blocks.1.1.proj_in.weight" in tensors else "time_embed.0"
    weight = tensors.pop(f"{layer}.weight")
    if kind == "difference":
        quantised = {f"{layer}.weight": weight.to(torch.int8), "difference": torch.zeros(())}
    else:
        factors = {"up": torch.ones(len(weight), 2), "down": torch.ones(2, *weight.shape[1:])}
        quantised = {f"{layer}.{side}": factor.to(torch.int8) for side, factor in factors.items()}
        quantised["lora_controlnet"] = torch.zeros(())
    with pytest.raises(AdapterError, match=rf"{layer}\.(weight|up) of type torch.int8"):
        ActiveControls(unet).set_picks(
            [ControlPick(save(tmp_path / "x.safetensors", {**tensors, **quantised}), [PICTURE])]
        )
