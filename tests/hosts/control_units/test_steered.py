"""ControlNets and IP-Adapters as units: in stand-ins for the WebUIs, and what is wrong with them before anything runs.

Where the main checkpoint and the base are the same model, lambda 1 gives the picture that the model makes
when it is itself steered: the reference hands the main model's UNet the same additions.
"""

from __future__ import annotations

import base64
import io
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from PIL import Image
from torch import Tensor

from lib_delta.controls.active_controls import ActiveControls, ControlPick
from lib_delta.controls.control_file import load_control
from lib_delta.controls.control_map import ControlMap, scaled
from lib_delta.core.guides import GuideInputs
from lib_delta.errors import AdapterError, DeltaError, SettingError
from lib_delta.models.controlnet import ControlNet
from lib_delta.models.injection import Injection
from lib_delta.request.control_unit import Unit
from tests.support.small_controls import HINTS, as_tensor, make_controls, picture, save
from tests.support.small_files import UNET, Files
from tests.support.stand_in_webui import WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
PICTURE = picture()
EDGES = {"model": "edges", "image": PICTURE}
LOOK = {"model": "look", "image": PICTURE, "weight": 0.7}
HIRES = {"enable_hr": True, "hr_second_pass_steps": 3, "hr_cfg": 4.0}


HOSTS = ("a1111", "forge", "neo")


def add_files(files: Files) -> None:
    make_controls(files)


def units(*given: Any, **more: Any) -> dict[str, Any]:
    return {"base": "base", "units": list(given), **more}


def folder(webui: WebUI) -> Path:
    return webui.files.folder / "models" / "ControlNet"


def encode(image: Image.Image) -> str:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def steered(webui: WebUI, weight: float = 0.8, shown: Image.Image = PICTURE, hidden: Tensor | None = None) -> Call:
    """The main checkpoint's UNet, steered by the ControlNet in the plain way: all of one map."""
    unet = webui.shared.sd_model.networks.unet
    control = load_control(folder(webui) / "edges.safetensors", unet).model
    assert isinstance(control, ControlNet)
    whole = ControlMap(as_tensor(shown), "crop and resize", hidden)

    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        hint = control.hint(whole.at(8 * x.shape[2], 8 * x.shape[3], 3)).expand(len(x), -1, -1, -1)
        residuals = [weight * residual for residual in control(x, t, context, hint)]
        injection = Injection(decoder=dict(enumerate(residuals)), single_branch=True)
        return unet(x[None], t, context[None], None, injection)[0]

    return call


def native(webui: WebUI, call: Call, **changes: Any) -> Tensor:
    """Generate without the extension, with the main checkpoint's UNet replaced."""
    networks = type(webui.shared.sd_model.networks)
    original = networks.__call__
    networks.__call__ = lambda self, x, t, context: call(x, t, context)
    try:
        return webui.latents(**changes)
    finally:
        networks.__call__ = original


def assert_steered(webui: WebUI, call: Call, delta: dict[str, Any], **changes: Any) -> Any:
    plain, wanted = webui.latents(**changes), native(webui, call, **changes)
    made = webui.generate(delta, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(plain, wanted) > 1e-3, "the unit changes nothing here"
    assert float((made.images - wanted).norm() / (plain - wanted).norm()) < 1e-3
    return made


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "a timestep sampler": {"sampler_name": "DDIM"},
    "cfg 1": {"cfg_scale": 1.0},
    "and": {"prompt": "a cat AND a dog :0.6 AND a red mat :-0.3"},
    "batch": {"batch_size": 2, "n_iter": 2},
    "hires": HIRES,
    "not square": {"width": 72, "height": 104},
}


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_a_controlnet_steers_as_if_it_were_the_main_models_own(webui: WebUI, changes: dict[str, Any]) -> None:
    made = assert_steered(webui, steered(webui), units({**EDGES, "weight": 0.8}), **changes)
    assert all("Delta units: edges:0.8" in text for text in made.infotexts)


@pytest.mark.parametrize("form", ["merged (faster)", "low-rank factors (less memory)"])
def test_beside_a_lora_both_count(webui: WebUI, form: str) -> None:
    webui.shared.opts.delta_sampling_form = form
    plain = webui.latents()
    webui.use(webui.files.tuned)
    wanted = native(webui, steered(webui))
    webui.use(webui.files.base)
    made = webui.latents(units({**EDGES, "weight": 0.8}, loras="ink"))
    assert float((made - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_inpainting_hides_what_it_paints_from_the_controlnet_for_that(webui: WebUI) -> None:
    painted = torch.zeros(4, 8, 8)
    painted[:, 2:6, 1:5] = 1
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    changes = {"init_latent": latent, "mask": 1 - painted, "nmask": painted, "denoising_strength": 0.8}
    named = folder(webui) / "control_inpaint.safetensors"
    shutil.copy(folder(webui) / "edges.safetensors", named)
    webui.host.units.files.refresh()
    try:
        hiding = steered(webui, hidden=painted[None, :1])
        assert_steered(webui, hiding, units({**EDGES, "model": "control_inpaint", "weight": 0.8}), **changes)
        assert_steered(webui, steered(webui), units({**EDGES, "weight": 0.8}), **changes)
    finally:
        named.unlink()
        webui.host.units.files.refresh()


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_an_image_prompt_is_seen_by_the_encoder_that_fits(webui: WebUI, changes: dict[str, Any]) -> None:
    unet = webui.shared.sd_model.networks.unet
    kept = ActiveControls(unet)
    models = webui.files.folder / "models"
    encoder = models / "ControlNetPreprocessor" / "seer.safetensors"
    kept.set_picks([ControlPick(folder(webui) / "look.safetensors", [as_tensor(PICTURE)], 0.7, encoders=[encoder])])
    negative = webui.shared.sd_model.get_learned_conditioning(["blue"])
    if isinstance(negative, dict):
        negative = negative["crossattn"]

    def call(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        uncond = torch.tensor([torch.equal(row, negative[0]) for row in context])
        inputs = GuideInputs(x, t, context, None, torch.zeros(len(x), dtype=torch.long), uncond)
        added = Injection(extra_attention=kept.guides[0](inputs).extra_attention, single_branch=True)
        return unet(x[None], t, context[None], None, added)[0]

    assert_steered(webui, call, units(LOOK), **changes)


def test_units_count_in_their_share_of_the_run(webui: WebUI) -> None:
    plain, whole = webui.latents(steps=4), webui.latents(units(EDGES), steps=4)
    early = webui.latents(units({**EDGES, "guidance_end": 0.4}), steps=4)
    both = webui.latents(units({**EDGES, "end": 0.4}, {**EDGES, "start": 0.5}), steps=4)
    assert relative(early, plain) > 1e-3 and relative(early, whole) > 1e-3
    assert relative(both, whole) < 1e-5


def test_a_weight_of_0_and_a_unit_that_is_off_add_nothing(webui: WebUI) -> None:
    plain = webui.latents()
    lora = webui.latents({"base": "base", "loras": "ink"})
    for none in ({**EDGES, "weight": 0}, {**EDGES, "enabled": False}):
        assert torch.equal(webui.latents(units(none, loras="ink")), lora)
        with pytest.raises(SettingError, match="nothing to add"):
            webui.generate(units(none))
    assert not torch.equal(lora, plain)


def test_pictures_are_taken_in_every_form_of_an_api_call(webui: WebUI, tmp_path: Path) -> None:
    PICTURE.save(tmp_path / "map.png")
    code = encode(PICTURE)
    wanted = webui.latents(units(EDGES))
    for image in (str(tmp_path / "map.png"), code, f"data:image/png;base64,{code}", {"image": code}, [code]):
        assert torch.equal(webui.latents(units({"model": "edges", "image": image})), wanted)
    assert torch.equal(webui.latents(units({**EDGES, "image": np.asarray(PICTURE)})), wanted)
    for image in (encode(picture(1)), [code, encode(picture(1))]):
        assert not torch.equal(webui.latents(units({**EDGES, "image": image}), batch_size=2)[1], wanted[0])


def test_images_of_a_batch_have_their_own_maps_and_image_prompts_are_seen_together(webui: WebUI) -> None:
    two = [PICTURE, picture(1)]
    made = webui.latents(units({**EDGES, "image": two}), batch_size=2)
    for i, own in enumerate(two):
        alone = webui.latents(units({**EDGES, "image": own}), batch_size=2)
        assert relative(made[i : i + 1], alone[i : i + 1]) < 1e-5
    first, both = (webui.latents(units({**LOOK, "image": shown})) for shown in (PICTURE, two))
    assert relative(first, both) > 1e-4
    assert torch.equal(webui.latents(units({**LOOK, "image": None, "images": [encode(PICTURE)]})), first)
    assert torch.equal(webui.latents(units({**LOOK, "images": [base64.b64decode(encode(two[1]))]})), both)


def test_files_are_read_once_and_given_back(webui: WebUI) -> None:
    webui.generate(units(EDGES))
    (before,) = webui.side_model.controls.files
    webui.generate(units({**EDGES, "weight": 0.5}))
    assert webui.side_model.controls.files == [before]
    assert "edges.safetensors: ControlNet" in webui.host.status()
    webui.generate({"base": "base", "loras": "ink"})
    assert not webui.side_model.controls.files
    webui.generate(units(LOOK))
    assert webui.host.unload() == "Unloaded 1 side model"


# Infotexts.


def test_a_picture_tells_models_weights_and_maps_and_not_the_picture(webui: WebUI) -> None:
    (text,) = webui.generate(units({"enabled": False}, {**EDGES, "end": 0.6}, LOOK)).infotexts
    assert "Delta units: off, edges:1:end=0.6, look:0.7," in text
    assert "Delta unit hashes: edges: 00000011, look: 00000010" in text
    found = re.search(r"Delta map hashes: 2: (\w{10}), 3: (\w{10})", text)
    assert found and found[1] == found[2]
    (other,) = webui.generate(units({**EDGES, "image": picture(1)})).infotexts
    assert found[1] not in other and "Delta map hashes: 1: " in other
    (plain,) = webui.generate({"base": "base", "loras": "ink"}).infotexts
    assert "unit" not in plain and "map" not in plain


def test_models_are_found_by_the_names_that_people_and_other_extensions_use(webui: WebUI) -> None:
    assert webui.host.units.files.names() == ["edges", "look"]
    wanted = webui.generate(units(EDGES))
    for name in ("Edges", "edges.safetensors", "edges [0123abcd]"):
        made = webui.generate(units({**EDGES, "model": name}))
        assert torch.equal(made.images, wanted.images) and made.infotexts == wanted.infotexts
    (folder(webui) / "more").mkdir()
    (folder(webui) / "more" / "edges.safetensors").write_bytes((folder(webui) / "edges.safetensors").read_bytes())
    webui.host.units.files.refresh()
    assert webui.host.units.files.names() == ["edges.safetensors", "look", "more/edges.safetensors"]
    (folder(webui) / "more" / "edges.safetensors").unlink()
    (folder(webui) / "more").rmdir()
    webui.host.units.files.refresh()


def test_a_model_that_came_after_the_list_is_found(webui: WebUI) -> None:
    wanted = webui.generate(units(EDGES))
    late = folder(webui) / "late.safetensors"
    late.write_bytes((folder(webui) / "edges.safetensors").read_bytes())
    try:
        assert torch.equal(webui.generate(units({**EDGES, "model": "late"})).images, wanted.images)
    finally:
        late.unlink()
        webui.host.units.files.refresh()


def test_models_lie_in_every_folder_that_the_webuis_know(webui: WebUI, tmp_path: Path) -> None:
    extension = webui.files.folder / "extensions" / "sd-webui-controlnet" / "models"
    stated, listed, option = (tmp_path / name for name in ("flag", "flags", "option"))
    for place in (extension, stated, listed, option):
        place.mkdir(parents=True)
        (place / f"of-{place.name}.pth").write_bytes(b"")
    (stated / "notes.txt").write_text("no model")
    webui.shared.cmd_opts = SimpleNamespace(controlnet_dir=str(stated), controlnet_dirs=[str(listed)])
    webui.shared.opts.control_net_models_path = str(option)
    webui.host.units.files.refresh()
    try:
        found = webui.host.units.files.names()
        assert found == ["edges", "look", "of-flag", "of-flags", "of-models", "of-option"]
    finally:
        del webui.shared.cmd_opts
        (extension / "of-models.pth").unlink()
        webui.shared.opts.control_net_models_path = ""
        webui.host.units.files.refresh()


# Errors in one sentence, before anything is sampled.


def large() -> str:
    return encode(Image.new("1", (9000, 8000)))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no picture": ({"model": "edges"}, r"unit 1 of Delta Sampling \(edges\) has no picture: put one in"),
    "no model": ({"image": PICTURE}, "unit 1 of Delta Sampling has no model: choose a ControlNet or IP-Adapter"),
    "neither": ({}, "unit 1 of Delta Sampling has no model"),
    "an unknown model": ({**EDGES, "model": "edge"}, "no ControlNet or IP-Adapter 'edge' for unit 1.*is 'edges' meant"),
    "an address": ({**EDGES, "image": "https://example.org/a.png"}, "an address, and addresses are not fetched"),
    "a share": ({**EDGES, "image": r"\\\\server\\share\\a.png"}, "an address, and addresses are not fetched"),
    "another share": ({**EDGES, "image": "//server/share/a.png"}, "an address, and addresses are not fetched"),
    "no base64": ({**EDGES, "image": "missing.png"}, "neither a file on this machine nor base64"),
    "no picture in it": ({**EDGES, "image": "aGVsbG8="}, "the picture of unit 1 cannot be read as a picture"),
    "of another type": ({**EDGES, "image": 7}, "the picture of unit 1 is a int"),
    "huge": ({**EDGES, "image": "large"}, "the picture of unit 1 has 9000 x 8000 pixels, and up to 64 million"),
    "an image encoder for a ControlNet": (
        {**EDGES, "module": "CLIP-ViT-H (IPAdapter)"},
        r"CLIP-ViT-H \(IPAdapter\) lets an IP-Adapter see a picture, and makes no map for a ControlNet",
    ),
    "faces": ({**EDGES, "module": "InsightFace+CLIP-H (IPAdapter)"}, "no preprocessor 'InsightFace"),
    "an unknown preprocessor": ({**EDGES, "module": "kanny"}, "no preprocessor 'kanny': is 'canny' meant"),
}


@pytest.mark.parametrize(("unit", "sentence"), WRONG.values(), ids=WRONG)
def test_a_wrong_unit_is_one_sentence_before_sampling(webui: WebUI, unit: dict[str, Any], sentence: str) -> None:
    networks, given = webui.shared.sd_model.networks, dict(unit)
    if given.get("image") == "large":
        given["image"] = large()
    before = networks.evaluations
    with pytest.raises(SettingError, match=sentence) as error:
        webui.generate(units(given))
    assert "\n" not in str(error.value) and networks.evaluations == before


def test_a_lora_a_damaged_file_and_one_of_another_family_are_refused(webui: WebUI) -> None:
    lora, other = (folder(webui) / f"{name}.safetensors" for name in ("ink", "for-sd2"))
    lora.write_bytes(webui.files.lora_file().read_bytes())
    (folder(webui) / "broken.safetensors").write_bytes(b"no model at all")
    save(ControlNet(replace(UNET, context_width=1024, linear_projection=True), HINTS), other)
    webui.host.units.files.refresh()
    before = webui.shared.sd_model.networks.evaluations
    try:
        with pytest.raises(AdapterError, match="for-sd2.safetensors is made for SD 2.x"):
            webui.generate(units({**EDGES, "model": "for-sd2"}))
        with pytest.raises(AdapterError, match="ink.safetensors is a LoRA: a ControlNet"):
            webui.generate(units({**EDGES, "model": "ink"}))
        with pytest.raises(DeltaError, match="broken.safetensors is not a model file"):
            webui.generate(units({**EDGES, "model": "broken"}))
        assert webui.shared.sd_model.networks.evaluations == before
    finally:
        lora.unlink()
        other.unlink()
        (folder(webui) / "broken.safetensors").unlink()
        webui.host.units.files.refresh()


@pytest.mark.parametrize("kind", ["16-bit", "transparent", "grey", "palette"])
def test_pictures_of_every_kind_are_read(webui: WebUI, kind: str) -> None:
    grey = PICTURE.convert("L")
    image, same = {
        "16-bit": (Image.fromarray(np.asarray(grey).astype(np.uint16) * 257), grey),
        "transparent": (Image.merge("RGBA", [*PICTURE.split(), Image.new("L", PICTURE.size, 255)]), PICTURE),
        "grey": (grey, grey.convert("RGB")),
        "palette": (grey.convert("P"), grey),
    }[kind]
    assert (
        relative(webui.latents(units({**EDGES, "image": image})), webui.latents(units({**EDGES, "image": same}))) < 1e-4
    )
    assert relative(webui.latents(units({**EDGES, "image": encode(image)})), webui.latents(units(EDGES))) < 0.9


# img2img's picture for a unit without one, cut as inpainting cuts it.


def latent(webui: WebUI) -> Tensor:
    return torch.randn(1, webui.shared.sd_model.latent_channels, 8, 8, generator=torch.Generator().manual_seed(2))


def img2img(webui: WebUI, **changes: Any) -> SimpleNamespace:
    p = webui.p(units({"model": "edges"}), init_latent=latent(webui))
    vars(p).update({"init_images": [PICTURE], "resize_mode": 0, **changes})
    return p


def test_img2imgs_own_picture_is_taken_as_it_is_sampled(webui: WebUI) -> None:
    own = webui.processing.process_images(img2img(webui))
    given = {"model": "edges", "image": PICTURE, "resize": "just resize"}
    assert torch.equal(own.images, webui.latents(units(given), init_latent=latent(webui)))
    assert "Delta map hashes: 1: " in own.infotexts[0]


def test_it_is_said_where_a_unit_looks_at_img2imgs_own_picture(webui: WebUI) -> None:
    """A picture's text, sent over from txt2img with a unit in it, does not hold the unit's picture."""
    (said,) = webui.processing.process_images(img2img(webui)).comments
    assert "unit 1 (edges) has no picture and uses img2img's" in said
    assert webui.generate(units(EDGES), init_latent=latent(webui)).comments == []


def test_inpainting_only_masked_cuts_the_map_as_it_cuts_the_picture(webui: WebUI) -> None:
    region, cut = (8, 16, 40, 40), PICTURE.crop((8, 16, 48, 56))
    masked = {"image_mask": Image.new("L", PICTURE.size), "inpaint_full_res": True, "paste_to": region}
    own = webui.processing.process_images(img2img(webui, **masked)).images
    wanted = webui.latents(units({**EDGES, "image": cut}), init_latent=latent(webui))
    assert relative(own, wanted) < 1e-5
    p = img2img(webui, **masked)
    p.script_args = [units(EDGES)]
    assert relative(webui.processing.process_images(p).images, wanted) < 1e-5


def test_a_control_among_the_loras_is_sent_to_the_units(webui: WebUI) -> None:
    sentence = "'{}' is a ControlNet or IP-Adapter, which needs a picture: choose it in one of Delta Sampling's units"
    for name in ("edges", "canny@edges"):
        with pytest.raises(SettingError, match=sentence.format(name)):
            webui.generate({"base": "base"}, prompt=f"a cat <delta:{name}:0.8:end=0.6>")
        with pytest.raises(SettingError, match=sentence.format(name)):
            webui.generate({"base": "base", "loras": f"{name}:0.8"})


# Axes of the XYZ plot.


def cell(webui: WebUI, **axes: Any) -> Any:
    p = webui.p(units({"enabled": False}, EDGES))
    p.delta_sampling_axes = {"enabled": True, **axes}
    return webui.processing.process_images(p)


def test_axes_set_the_first_unit_that_is_on(webui: WebUI) -> None:
    half = cell(webui, unit_weight=0.5, unit_end=0.4)
    wanted = webui.generate(units({"enabled": False}, {**EDGES, "weight": 0.5, "end": 0.4}))
    assert torch.equal(half.images, wanted.images) and "edges:0.5:end=0.4" in half.infotexts[0]
    look = cell(webui, unit_model="look")
    assert torch.equal(look.images, webui.latents(units({**LOOK, "weight": 1})))
    for none in ({"unit_model": ""}, {"unit_weight": 0.0}):
        assert torch.equal(cell(webui, **none).images, webui.latents())


def plotted(webui: WebUI, delta: dict[str, Any], **axes: Any) -> tuple[str, str]:
    """Return the text of a plot's first cell, and that which the plot makes of it for its own picture."""
    p = webui.p(delta)
    p.delta_sampling_axes = {"enabled": True, **axes}
    p.scripts.selectable_scripts = [SimpleNamespace(title=lambda: "X/Y/Z plot")]
    process = p.scripts.scripts[0].process
    p.scripts.scripts[0].process = lambda p, _chosen, *arguments: process(p, *arguments)
    p.script_args = [1, *p.script_args]
    (text,) = webui.processing.process_images(p).infotexts
    p.extra_generation_params = {**p.extra_generation_params, "Script": "X/Y/Z plot"}
    assert webui.callbacks.swallowed == []
    return text, webui.processing.create_infotext(p)


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "weight": ({"unit_weight": 0.0}, "off, edges:0"),
    "model": ({"unit_model": ""}, "off, edges"),
}


@pytest.mark.parametrize(("axes", "wanted"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_plots_own_text_has_the_unit_that_its_first_cell_does_without(
    webui: WebUI, axes: dict[str, Any], wanted: str
) -> None:
    of_cell, of_grid = plotted(webui, units({"enabled": False}, EDGES), **axes)
    assert "Delta" not in of_cell
    assert re.search(f"Delta units: {wanted}(,|$)", of_grid) and "Delta base: base" in of_grid
    with_lora = plotted(webui, units({"enabled": False}, EDGES, loras="ink"), **axes)
    assert "Delta lambda: 1" in with_lora[0] and "edges:" not in with_lora[0].replace("edges:0", "")
    assert re.search(f"Delta units: {wanted}(,|$)", with_lora[1]) and "Delta LoRAs: ink" in with_lora[1]


def test_a_plots_own_text_has_the_loras_whose_weight_its_first_cell_has_at_0(webui: WebUI) -> None:
    of_cell, of_grid = plotted(webui, {"base": "base", "loras": "ink"}, lora_weight=0.0)
    assert "Delta" not in of_cell and "Delta LoRAs: ink:0" in of_grid and "Delta base: base" in of_grid


def test_an_axis_without_a_unit_that_is_on_is_refused(webui: WebUI) -> None:
    p = webui.p({"base": "base", "loras": "ink"})
    p.delta_sampling_axes = {"enabled": True, "unit_weight": 1.0}
    with pytest.raises(SettingError, match="axis for a unit of Delta Sampling, but no unit is on"):
        webui.processing.process_images(p)


# Preprocessors.


def test_canny_is_there_always(webui: WebUI) -> None:
    cv2 = pytest.importorskip("cv2")
    edges = Image.fromarray(cv2.Canny(np.asarray(PICTURE), 50, 120))
    wanted = webui.latents(units({**EDGES, "image": edges}))
    made = webui.latents(
        units({**EDGES, "module": "canny", "processor_res": 64, "threshold_a": 50, "threshold_b": 120})
    )
    assert relative(made, wanted) < 1e-5
    perfect = {**EDGES, "module": "canny", "pixel_perfect": True, "threshold_a": 50, "threshold_b": 120}
    assert relative(webui.latents(units(perfect)), wanted) < 1e-5
    assert webui.host.units.preprocessors()[0] == "canny"


@pytest.mark.parametrize("name", ["CLIP-ViT-H (IPAdapter)", "clip-vit-bigg (ipadapter)", "ip-adapter_clip_sd15"])
def test_an_ip_adapters_unit_may_name_an_image_encoder_as_controlnets_api_does(webui: WebUI, name: str) -> None:
    """Which one it looks through is told by its own shape."""
    wanted, made = webui.generate(units(LOOK)), webui.generate(units({**LOOK, "module": name}))
    assert torch.equal(made.images, wanted.images)
    unit = Unit(True, PICTURE, preprocessor=name)
    assert (webui.host.units.preview(unit, 1) == np.asarray(PICTURE)).all()


def test_a_pixel_perfect_map_is_made_for_each_pass_of_hires_fix(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    class Other(Doubling):
        """Makes another map at every resolution."""

        def __call__(self, shown: Any, resolution: int, slider_1: float, slider_2: float) -> Any:
            asked.append(resolution)
            return np.asarray(picture(resolution, resolution * 5 // 4, resolution))

    own = SimpleNamespace(supported_preprocessors={"other": Other()})
    monkeypatch.setitem(sys.modules, "modules_forge.shared", own)
    first, second = (steered(webui, shown=picture(width, height, width)) for width, height in ((64, 80), (128, 160)))
    perfect = units({**EDGES, "weight": 0.8, "module": "other", "pixel_perfect": True})
    size = {"width": 64, "height": 80, **HIRES}
    assert_steered(webui, lambda x, t, context: (first if x.shape[2] == 10 else second)(x, t, context), perfect, **size)
    assert asked == [64, 128]
    webui.latents(units(*perfect["units"], hires="hires pass"), **size)
    assert webui.side_model.controls.guides[0].guide.map.pictures.shape[-2:] == (160, 128)


def test_a_source_of_another_size_than_the_picture_has_its_map_at_its_own(webui: WebUI) -> None:
    pytest.importorskip("cv2")
    given = {**EDGES, "module": "canny", "pixel_perfect": True, "image": picture(0, 160, 128)}
    plain, size = webui.latents(width=128, height=160), {"width": 128, "height": 160}
    for side, latents in (("64", (8, 8)), ("picture", (20, 16))):
        assert relative(webui.latents(units(given, size=side), **size), plain) > 1e-3
        guide = webui.side_model.controls.guides[0].guide
        assert set(guide._hints) == {latents}
        # A side model that works at a square sees the picture squeezed, and its map alike: nothing of it is cut off.
        whole = scaled(guide.map.pictures, 8 * latents[0], 8 * latents[1])
        assert torch.equal(guide.map.at(8 * latents[0], 8 * latents[1], 3), whole)
        assert guide.map.pictures.shape[-1] == 8 * latents[1]


def test_the_preview_is_the_map_that_the_generation_follows(webui: WebUI) -> None:
    cv2 = pytest.importorskip("cv2")
    unit = Unit(True, PICTURE, preprocessor="canny", resolution=64, threshold_a=50.0, threshold_b=120.0)
    edges = cv2.Canny(np.asarray(PICTURE), 50, 120)
    assert (webui.host.units.preview(unit, 2) == edges[..., None]).all()
    asis = webui.host.units.preview(Unit(image=None, images=(PICTURE, PICTURE)), 2)
    assert (asis == np.asarray(PICTURE)).all()
    with pytest.raises(SettingError, match="unit 2 has resolution 8"):
        webui.host.units.preview(Unit(image=PICTURE, resolution=8), 2)


class Doubling:
    """A preprocessor as the WebUIs have them."""

    tags, show_control_mode, do_not_need_model = (), True, False
    slider_resolution = slider_1 = slider_2 = SimpleNamespace(gradio_update_kwargs={"value": 96})

    def __call__(self, picture: Any, resolution: int, slider_1: float, slider_2: float) -> Any:
        if slider_1 == 7:
            raise OSError("no network")
        return None if slider_1 == 8 else (picture // 2 + int(resolution)).astype(np.uint8)


def test_the_webuis_own_preprocessors_are_used(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    own = SimpleNamespace(supported_preprocessors={"None": Doubling(), "double": Doubling()})
    monkeypatch.setitem(sys.modules, "modules_forge.shared", own)
    assert webui.host.units.preprocessors() == ["canny", "double"]
    wanted = webui.latents(units({**EDGES, "image": np.asarray(PICTURE) // 2 + 96}))
    assert torch.equal(webui.latents(units({**EDGES, "module": "double"})), wanted)
    with pytest.raises(DeltaError, match=r"the preprocessor double failed \(OSError: no network\)"):
        webui.generate(units({**EDGES, "module": "double", "threshold_a": 7}))
    with pytest.raises(SettingError, match="the preprocessor double makes no map"):
        webui.generate(units({**EDGES, "module": "double", "threshold_a": 8}))
