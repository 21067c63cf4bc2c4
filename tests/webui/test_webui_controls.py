"""A ControlNet as a delta's unit is what it is in the WebUI's own ControlNet, where both steer the same model.

Forge has one; in AUTOMATIC1111 it is the extension sd-webui-controlnet.  Without either the tests are skipped.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.webui.client import SCRIPT, RefusedError, Result, WebUI, encode
from tests.support.webui.files import Files

UNREAD = "this WebUI's ControlNet reads none of small size: WEBUI_SIZE=full"
NEAR = 2  # of 255: two computations of the same picture may round one or two apart
HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "denoising_strength": 0.6,
    "hr_second_pass_steps": 3,
    "hr_additional_modules": ["Use same choices"],  # Forge's API does not do without; others do not know it
}


def blocks(width: int = 64, height: int = 64) -> str:
    """A picture of blocks in different colours, which has edges."""
    noise = np.random.default_rng(5).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return encode(Image.fromarray(noise.repeat(8, 0).repeat(8, 1)))


@pytest.fixture
def control(webui: WebUI, files: Files) -> str:
    """Return the name by which the WebUI's own ControlNet knows the test's file."""
    try:
        listed: list[str] = webui.get("/controlnet/model_list?update=true")["model_list"]
    except RefusedError:
        pytest.skip("this WebUI has no ControlNet of its own")
    found = next((name for name in listed if name.startswith(files.control)), None)
    assert found, f"{files.control} is not among the WebUI's ControlNets: {listed}"
    return found


def native(webui: WebUI, *units: dict[str, Any], **changes: Any) -> Result:
    """The WebUI's own ControlNet; its pictures of maps are left out."""
    silent = [{"save_detected_map": False, **unit} for unit in units]
    told = webui.generate(alwayson_scripts={"ControlNet": {"args": silent}}, **changes)
    count = changes.get("batch_size", 1) * changes.get("n_iter", 1)
    return Result(told.pictures[:count], told.infotexts[:count])


def assert_exact(webui: WebUI, files: Files, *units: dict[str, Any], lora: bool = False, **changes: Any) -> None:
    """As units of the delta as in the WebUI's ControlNet; and both far from the picture without."""
    tagged = {"prompt": f"{webui.defaults['prompt']} <lora:{files.lora}:1>"} if lora else {}
    without, wanted = webui.generate(**changes, **tagged), native(webui, *units, **changes, **tagged)
    if np.array_equal(wanted.pictures, without.pictures) and extension(webui):
        pytest.skip(UNREAD)
    assert np.abs(wanted.pictures - without.pictures).max() > 10 * NEAR, "the ControlNet changes nothing here"
    assert_same(webui.generate(delta_of(files, *units, lora=lora), **changes), wanted)


def delta_of(files: Files, *units: dict[str, Any], lora: bool = False) -> dict[str, Any]:
    return {"base": files.sd1, "loras": files.lora if lora else "", "units": list(units)}


def assert_same(got: Result, wanted: Result) -> None:
    assert got.pictures.shape == wanted.pictures.shape
    worst = np.abs(got.pictures - wanted.pictures).max()
    assert worst <= NEAR, f"pictures differ by up to {worst} of 255"
    assert all("Delta units: " in text for text in got.infotexts)


def extension(webui: WebUI) -> bool:
    """Tell whether it is the extension, which knows released widths alone, and goes on without others."""
    return bool(webui.get("/delta-sampling/status")["host"] == "AUTOMATIC1111")


UNITS: dict[str, dict[str, Any]] = {
    "whole": {"weight": 1.0},
    "half its weight": {"weight": 0.5},
    "more than whole": {"weight": 1.6},
    "prompt": {"control_mode": "My prompt is more important"},
    "control": {"control_mode": "ControlNet is more important"},
    "canny": {"module": "canny", "processor_res": 64},
    "canny by its own size": {"module": "canny", "pixel_perfect": True},
    "just resize": {"image": blocks(96, 64), "resize_mode": "Just Resize"},
    "crop and resize": {"image": blocks(96, 64), "resize_mode": "Crop and Resize"},
    "resize and fill": {"image": blocks(96, 64), "resize_mode": "Resize and Fill"},
}


def unit_of(control: str, **changes: Any) -> dict[str, Any]:
    return {"enabled": True, "model": control, "image": blocks(), "weight": 0.8, **changes}


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
@pytest.mark.parametrize("changes", UNITS.values(), ids=UNITS)
def test_units(webui: WebUI, files: Files, control: str, changes: dict[str, Any], sampler: str) -> None:
    assert_exact(webui, files, unit_of(control, **changes), sampler_name=sampler)


FEATURES: dict[str, dict[str, Any]] = {
    "a sampler of two evaluations": {"sampler_name": "Heun"},
    "an ancestral sampler": {"sampler_name": "Euler a"},
    "cfg 1": {"cfg_scale": 1},
    "batch size": {"batch_size": 2},
    "and": {"prompt": "a cat AND a dog :0.6"},
    "long": {"prompt": ", ".join(f"thing {i}" for i in range(60))},
    "not square": {"width": 64, "height": 128},
    "hires fix": HIRES,
    "img2img": {"init_images": [blocks()], "denoising_strength": 0.6},
}


@pytest.mark.parametrize("mode", ["Balanced", "ControlNet is more important"])
@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_features(webui: WebUI, files: Files, control: str, changes: dict[str, Any], mode: str) -> None:
    if changes is HIRES and mode != "Balanced" and extension(webui):
        pytest.skip(
            "the extension does not know in a hires pass which prompts are negative, and controls these as well"
        )
    assert_exact(webui, files, unit_of(control, control_mode=mode), **changes)


@pytest.mark.parametrize(("sampler", "third"), [("Euler", (0.6, 0.7)), ("DDIM", (0.9, 1.0))])
def test_a_part_of_the_run(webui: WebUI, files: Files, control: str, sampler: str, third: tuple[float, float]) -> None:
    """The extension counts what was done before the last step, as a share of all steps: 0, 0, 0.25, 0.5 of four.

    Forges count the training's noise levels: 0, 0.33, 0.67, 1 of Euler's four steps, 0.25, 0.5, 0.75 of DDIM's.
    ``third`` is where the third evaluation is, as a delta counts; DDIM has three.
    """
    shares = (0.2, 0.45) if extension(webui) else (0.6, 0.9)
    units = [unit_of(control, guidance_start=start, guidance_end=end) for start, end in (shares, third)]
    wanted, whole = (native(webui, unit, sampler_name=sampler) for unit in (units[0], unit_of(control)))
    if np.array_equal(wanted.pictures, webui.generate(sampler_name=sampler).pictures) and extension(webui):
        pytest.skip(UNREAD)
    assert np.abs(wanted.pictures - whole.pictures).max() > 10 * NEAR, "the range changes nothing here"
    assert_same(webui.generate(delta_of(files, units[1]), sampler_name=sampler), wanted)


def test_the_webuis_own_controlnet_goes_on_working_beside_a_delta(webui: WebUI, files: Files, control: str) -> None:
    """Of two checkpoints that are the same the delta is zero, though everything around it is done."""
    unit = unit_of(control, control_mode="ControlNet is more important")
    wanted = native(webui, unit, n_iter=2)
    both = {"ControlNet": {"args": [unit]}, SCRIPT: {"args": [{"base": files.sd1, "adapted": files.copy}]}}
    got = webui.generate(alwayson_scripts=both, n_iter=2).pictures[: len(wanted.pictures)]
    assert np.array_equal(got, wanted.pictures)


def test_two_units(webui: WebUI, files: Files, control: str) -> None:
    other = unit_of(control, image=blocks(96, 64), weight=0.4, control_mode="My prompt is more important")
    assert_exact(webui, files, unit_of(control), other)


def test_inpainting(webui: WebUI, files: Files, control: str) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    inpainting = {"mask": encode(mask), "mask_blur": 0, "inpainting_fill": 1, "inpaint_full_res": False}
    assert_exact(webui, files, unit_of(control), init_images=[blocks()], denoising_strength=0.7, **inpainting)


def test_beside_a_lora(webui: WebUI, files: Files, control: str) -> None:
    assert_exact(webui, files, unit_of(control), lora=True)


def test_img2imgs_own_picture_is_the_map_where_a_unit_has_none(webui: WebUI, files: Files, control: str) -> None:
    assert_exact(
        webui, files, unit_of(control, image=None), init_images=[blocks()], denoising_strength=0.6, resize_mode=1
    )


def test_a_weight_of_zero_is_the_plain_picture(webui: WebUI, files: Files) -> None:
    unit = unit_of(files.control, weight=0)
    got = webui.generate({"base": files.sd1, "loras": files.lora, "units": [unit]})
    assert np.array_equal(got.pictures, webui.generate(files.delta()).pictures)
    assert "Delta unit" not in got.infotexts[0]
