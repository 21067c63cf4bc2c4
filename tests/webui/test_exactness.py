"""A running WebUI gives with the delta just what it gives with the adaptation itself.

Where the main checkpoint and the base are the same model, lambda 1 adds all that the adaptation changes:
the picture must be that of the WebUI's own LoRA code, for every sampler and every feature that meets
the denoiser.  Without a delta it must be the WebUI's own, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.webui.client import RefusedError, Result, WebUI, decode, encode
from tests.support.webui.files import Files
from tests.support.webui.results import NEAR, assert_same

# Its step sizes follow the estimates and magnify their rounding: changing CFG by a 100,000th moves pixels of the
# WebUI's own picture by 17 to 39 of 255. So its picture need only be much nearer to the LoRA's than to the plain one.
UNSTABLE = ("DPM adaptive",)


def native(webui: WebUI, files: Files, **changes: Any) -> Result:
    """The WebUI's own LoRA."""
    for key in ("prompt", "hr_prompt"):
        if key in changes or key == "prompt":
            changes[key] = f"{changes.get(key, webui.defaults['prompt'])} <lora:{files.lora}:1>"
    return webui.generate(**changes)


def delta(files: Files, **changes: Any) -> dict[str, Any]:
    """The same LoRA as a delta on the same model."""
    return {"lambda": 1.0, "base": files.sd1, "loras": files.lora, **changes}


def distance(a: Result, b: Result) -> float:
    return float(np.abs(a.pictures - b.pictures).mean())


def assert_exact(webui: WebUI, files: Files, **changes: Any) -> None:
    """With the delta as with the LoRA itself; and both far from the picture without."""
    plain, wanted = webui.generate(**changes), native(webui, files, **changes)
    if not plain.pictures.any():
        pytest.skip("the WebUI's own picture is black")  # a sampler for flow matching, in Forge Neo
    got = webui.generate(delta(files), **changes)
    assert np.abs(plain.pictures - wanted.pictures).max() > 10 * NEAR, "the LoRA changes nothing here"
    if changes.get("sampler_name") in UNSTABLE:
        assert distance(got, wanted) < 0.25 * distance(plain, wanted)
    else:
        assert_same(got, wanted)
    assert all("Delta lambda: 1" in text for text in got.infotexts)


def same(a: Result, b: Result) -> bool:
    return np.array_equal(a.pictures, b.pictures)


def say_what_changes_nothing(webui: WebUI, what: str) -> None:
    """End a test whose feature this WebUI has and ignores, once all has been compared that can be."""
    host = webui.get("/delta-sampling/status")["host"]
    pytest.skip(f"{what} changes nothing in {host}'s own picture; the delta is as exact with it as without")


def test_every_sampler(webui: WebUI, files: Files, subtests_of_samplers: str) -> None:
    assert_exact(webui, files, sampler_name=subtests_of_samplers)


def test_every_scheduler(webui: WebUI, files: Files, subtests_of_schedulers: str) -> None:
    assert_exact(webui, files, sampler_name="Euler", scheduler=subtests_of_schedulers)


PROMPTS = {
    "emphasis": {"prompt": "a (cat:1.4) on [a] ((mat))", "negative_prompt": "(blue:0.5)"},
    "and": {"prompt": "a cat AND a dog :0.6 AND a red mat :-0.3"},
    "editing": {"prompt": "a [cat:dog:0.5] on [a mat::2] in [snow|rain]"},
    "break": {"prompt": "a cat BREAK on a mat"},
    "long": {"prompt": ", ".join(f"thing {i}" for i in range(60)), "negative_prompt": "blue"},
    "long negative": {"negative_prompt": ", ".join(f"thing {i}" for i in range(60))},
    "empty": {"prompt": "", "negative_prompt": ""},
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_prompts(webui: WebUI, files: Files, prompts: dict[str, str], sampler: str) -> None:
    assert_exact(webui, files, sampler_name=sampler, **prompts)


def test_a_textual_inversion(webui: WebUI, files: Files) -> None:
    assert_exact(webui, files, prompt=f"a cat, {files.embedding}, on a mat")
    with_it, without = (webui.generate(delta(files), prompt=f"a {word} on a mat") for word in (files.embedding, "cat"))
    assert np.abs(with_it.pictures - without.pictures).max() > 10 * NEAR


FEATURES: dict[str, dict[str, Any]] = {
    "cfg 1": {"cfg_scale": 1},
    "cfg 12": {"cfg_scale": 12},
    "batch size": {"batch_size": 3},
    "batch count": {"n_iter": 2},
    "clip skip": {"override_settings": {"CLIP_stop_at_last_layers": 2}},
    "NGMS": {"s_min_uncond": 4},
    "NGMS at all steps": {"s_min_uncond": 8, "override_settings": {"s_min_uncond_all": True}},
    "skip early CFG": {"override_settings": {"skip_early_cond": 0.4}},
    "noise multiplier": {"s_churn": 5, "s_noise": 1.003},
    "eta": {"eta": 0.5, "sampler_name": "DDIM"},
    "tiling": {"tiling": True},
    "a variation seed": {"subseed": 5, "subseed_strength": 0.4},
    "whole timesteps": {"override_settings": {"enable_quantization": True}, "sampler_name": "DPM2"},
    "padded prompts": {"override_settings": {"pad_cond_uncond": True}, "prompt": "cat, " * 50},
    "token merging": {"override_settings": {"token_merging_ratio": 0.5}},
}
# What a feature is a feature of: its picture is compared with one that has this alone.
ORDINARY = ("sampler_name", "prompt")
# A field of the API that reForge takes and does not read, but the setting of its name.
SETTING_TOO = "s_min_uncond"


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_features(webui: WebUI, files: Files, changes: dict[str, Any]) -> None:
    known = webui.get("/sdapi/v1/options").keys()
    unknown = changes.get("override_settings", {}).keys() - known
    if unknown:
        pytest.skip(f"this WebUI has no setting {', '.join(unknown)}")
    if SETTING_TOO in changes and SETTING_TOO in known:
        of_setting = {**changes.get("override_settings", {}), SETTING_TOO: changes[SETTING_TOO]}
        changes = {**changes, "override_settings": of_setting}
    ordinary = webui.generate(**{key: value for key, value in changes.items() if key in ORDINARY})
    assert_exact(webui, files, **changes)
    if same(webui.generate(**changes), ordinary):
        say_what_changes_nothing(webui, ", ".join(changes.get("override_settings", changes)))


def test_token_merging_in_the_hires_pass(webui: WebUI, files: Files) -> None:
    merging = {"override_settings": {"token_merging_ratio_hr": 0.5}}
    assert_exact(webui, files, **HIRES, **merging)
    if same(webui.generate(**HIRES, **merging), webui.generate(**HIRES)):
        say_what_changes_nothing(webui, "token_merging_ratio_hr")


def test_sizes_that_are_no_multiple_of_64(webui: WebUI, files: Files) -> None:
    """AUTOMATIC1111 enlarges such a latent after a convolution, Forge and diffusers (and the side model) before it."""
    if webui.get("/delta-sampling/status")["host"] != "AUTOMATIC1111":
        assert_exact(webui, files, width=72, height=88)
    with_it, without = webui.generate(delta(files), width=72, height=88), webui.generate(width=72, height=88)
    assert with_it.pictures.shape == without.pictures.shape  # 88 x 72, or what the WebUI makes of that
    assert np.abs(with_it.pictures - without.pictures).max() > 10 * NEAR


HIRES = {
    "enable_hr": True,
    "hr_scale": 2,
    "denoising_strength": 0.6,
    "hr_second_pass_steps": 3,
    # Forge's API does not do without; others do not know it.
    "hr_additional_modules": ["Use same choices"],
}


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "DDIM", "PLMS"])
def test_hires_fix(webui: WebUI, files: Files, sampler: str) -> None:
    assert_exact(webui, files, sampler_name=sampler, **HIRES)


def test_hires_fix_with_another_sampler_and_prompt(webui: WebUI, files: Files) -> None:
    other = {"hr_sampler_name": "DDIM", "hr_prompt": "a dog in the rain", "hr_negative_prompt": "red"}
    assert not np.array_equal(webui.generate(**other, **HIRES).pictures, webui.generate(**HIRES).pictures)
    assert_exact(webui, files, **other, **HIRES)


def test_hires_fix_with_another_checkpoint(webui: WebUI, files: Files) -> None:
    assert_exact(webui, files, hr_checkpoint_name=files.copy, **HIRES)


def test_hires_passes(webui: WebUI, files: Files) -> None:
    both, first, second, none = (
        webui.generate(delta(files, hires=hires, **{"lambda": strength}), **HIRES)
        for hires, strength in (("both", 1.0), ("first pass", 1.0), ("hires pass", 1.0), ("both", 0.0))
    )
    pictures = [r.pictures for r in (both, first, second, none)]
    for i, a in enumerate(pictures):
        assert all(np.abs(a - b).max() > NEAR for b in pictures[i + 1 :])
    assert "Delta hires: first pass" in first.infotexts[0]
    only_hires = webui.generate(delta(files, hires="hires pass"))
    assert np.array_equal(only_hires.pictures, webui.generate().pictures)
    assert "Delta" not in only_hires.infotexts[0]


def test_a_refiner_switch(webui: WebUI, files: Files) -> None:
    """The refiner is a copy of the main checkpoint, so that it changes nothing but the objects in use.

    Compared with the LoRA without a refiner: its own picture with one moves by up to 4 of 255.
    """
    got = webui.generate(delta(files), refiner_checkpoint=files.copy, refiner_switch_at=0.5)
    assert "Refiner: " in got.infotexts[0]
    assert_same(got, native(webui, files))


def picture(seed: int = 0) -> str:
    noise = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)
    return encode(Image.fromarray(noise).resize((64, 64)))


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ 2M", "DDIM", "PLMS"])
def test_img2img(webui: WebUI, files: Files, sampler: str) -> None:
    assert_exact(webui, files, init_images=[picture()], denoising_strength=0.6, sampler_name=sampler)


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
@pytest.mark.parametrize("soft", [False, True])
def test_inpainting(webui: WebUI, files: Files, sampler: str, soft: bool) -> None:
    mask = Image.new("L", (64, 64))
    mask.paste(255, (32, 0, 64, 64))
    changes: dict[str, Any] = {
        "init_images": [picture()],
        "mask": encode(mask),
        "mask_blur": 0,
        "inpainting_fill": 1,
        "inpaint_full_res": False,
        "denoising_strength": 0.7,
        "sampler_name": sampler,
    }
    if soft:
        if "soft inpainting" not in webui.get("/sdapi/v1/scripts")["img2img"]:
            pytest.skip("this WebUI has no soft inpainting")
        changes["alwayson_scripts"] = {"soft inpainting": {"args": [True, 1, 0.5, 4, 0, 0.5, 2]}}
        plain = webui.generate(**changes)
        if same(plain, native(webui, files, **changes)):
            assert same(plain, webui.generate(delta(files), **changes))
            pytest.skip("soft inpainting gives the original picture back: Forge's and reForge's do on up to 6 cores")
    assert_exact(webui, files, **changes)
    if not soft:
        got, plain = webui.generate(delta(files), **changes), webui.generate(**changes)
        assert np.array_equal(got.pictures[:, :, :32], plain.pictures[:, :, :32])


def test_a_fine_tuned_checkpoint(webui: WebUI, files: Files) -> None:
    wanted = webui.generate(override_settings={"sd_model_checkpoint": files.tuned})
    assert np.abs(wanted.pictures - webui.generate().pictures).max() > 10 * NEAR, "it is not tuned"
    assert_same(webui.generate(delta(files, loras="", adapted=files.tuned)), wanted)


def test_lora_weights_and_tags(webui: WebUI, files: Files) -> None:
    half = webui.generate(prompt=f"{webui.defaults['prompt']} <lora:{files.lora}:0.5>")
    for other in (native(webui, files), webui.generate()):
        assert np.abs(half.pictures - other.pictures).max() > 10 * NEAR, "the weight changes nothing here"
    assert_same(webui.generate(delta(files, loras=f"{files.lora}:0.5")), half)
    tag = f"{webui.defaults['prompt']} <delta:{files.lora}:1:weight=0.5>"
    got = webui.generate({"enabled": False, "base": files.sd1}, prompt=tag)
    assert_same(got, half)
    assert "Delta lambda: 1" in got.infotexts[0]


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE", "DDIM", "PLMS"])
def test_without_a_delta_the_picture_is_the_webuis_own(webui: WebUI, files: Files, sampler: str) -> None:
    plain = webui.generate(sampler_name=sampler)
    for nothing in (
        {"enabled": False, "base": files.sd1, "loras": files.lora},
        delta(files, **{"lambda": 0.0}),
        delta(files, curve="linear", curve_start=0.0, curve_end=0.0),
    ):
        got = webui.generate(nothing, sampler_name=sampler)
        assert np.array_equal(got.pictures, plain.pictures)
        assert "Delta" not in got.infotexts[0]


def test_the_delta_is_bounded_to_its_range_and_prompts_reach_it(webui: WebUI, files: Files) -> None:
    full, late, early = (
        webui.generate(delta(files, **limits)).pictures for limits in ({}, {"start": 0.6}, {"end": 0.4})
    )
    told = webui.generate(delta(files, prompt="a red boat", negative_prompt="green")).pictures
    adapted = webui.generate(delta(files, adapted_prompt="a red boat")).pictures
    everything = [full, late, early, told, adapted]
    for i, a in enumerate(everything):
        assert not any(np.array_equal(a, b) for b in everything[i + 1 :])


def previews(webui: WebUI, generate: Callable[[], Result]) -> list[np.ndarray]:
    """Return the different live previews of a generation, as many of them as are caught while it runs."""
    seen: dict[bytes, np.ndarray] = {}
    with ThreadPoolExecutor(1) as pool:
        generation = pool.submit(generate)
        while not generation.done():
            encoded = webui.get("/sdapi/v1/progress")["current_image"]
            if encoded:
                preview = np.asarray(decode(encoded).convert("RGB"), int)
                seen[preview.tobytes()] = preview
    generation.result()
    return list(seen.values())


def among(preview: np.ndarray, others: list[np.ndarray]) -> bool:
    return any(preview.shape == other.shape and np.abs(preview - other).max() <= NEAR for other in others)


@pytest.mark.parametrize("content", ["Combined", "Prompt"])
@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_live_previews_are_those_of_the_lora(webui: WebUI, files: Files, sampler: str, content: str) -> None:
    """Of 20 steps enough are caught in both runs; which preview is of which step is not told."""
    options = {"live_previews_enable": True, "show_progress_every_n_steps": 1, "show_progress_type": "Approx cheap"}
    options |= {"live_preview_content": content}
    before = webui.get("/sdapi/v1/options")
    if "live_preview_content" not in before:  # Forge Neo shows what is combined
        if content != "Combined":
            pytest.skip("this WebUI has no setting live_preview_content")
        del options["live_preview_content"]
    webui.options(**options)
    try:
        changes = {"sampler_name": sampler, "steps": 20}
        plain = previews(webui, lambda: webui.generate(**changes))
        wanted = previews(webui, lambda: native(webui, files, **changes))
        got = previews(webui, lambda: webui.generate(delta(files), **changes))
    finally:
        webui.options(**{key: before[key] for key in options})
    assert min(map(len, (plain, wanted, got))) >= 10
    assert sum(among(preview, wanted) for preview in got) >= 0.7 * len(got)
    assert sum(among(preview, plain) for preview in got) <= 0.2 * len(got)


SDXL: dict[str, dict[str, Any]] = {
    **PROMPTS,
    **{name: FEATURES[name] for name in ("cfg 1", "batch size", "clip skip", "tiling", "padded prompts")},
    "crop": {"override_settings": {"sdxl_crop_top": 64, "sdxl_crop_left": 32}},
    "another sampler": {"sampler_name": "DDIM"},
    "hires": HIRES,
}


@pytest.mark.parametrize("changes", SDXL.values(), ids=SDXL)
def test_an_sdxl_lora_on_its_checkpoint(webui: WebUI, files: Files, changes: dict[str, Any]) -> None:
    of_family = replace(files, sd1=files.sdxl, lora=files.sdxl_lora)
    options = {**changes.get("override_settings", {}), "sd_model_checkpoint": files.sdxl}
    unknown = options.keys() - webui.get("/sdapi/v1/options").keys()
    if unknown:
        pytest.skip(f"this WebUI has no setting {', '.join(unknown)}")
    assert_exact(webui, of_family, **{**changes, "override_settings": options})


def test_an_sdxl_source_on_another_family(webui: WebUI, files: Files) -> None:
    of_family = replace(files, sd1=files.sdxl, lora=files.sdxl_lora)
    plain = webui.generate()
    nothing, some = (webui.generate(delta(of_family, **{"lambda": strength})) for strength in (0.0, 1.0))
    assert same(nothing, plain)
    assert np.abs(some.pictures - plain.pictures).mean() > 0


@pytest.mark.parametrize("target", ["sd2", "sdxl"])
@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_other_families_as_targets(webui: WebUI, files: Files, target: str, sampler: str) -> None:
    changes = {"sampler_name": sampler, "override_settings": {"sd_model_checkpoint": getattr(files, target)}}
    try:
        plain = webui.generate(**changes)
    except RefusedError as error:
        pytest.skip(f"this WebUI has no {target} ({error.sentence})")
    nothing, some, more = (
        webui.generate(delta(files, **{"lambda": strength}), **changes) for strength in (0.0, 0.01, 1.0)
    )
    assert np.array_equal(nothing.pictures, plain.pictures)
    near, far = (np.abs(r.pictures - plain.pictures).mean() for r in (some, more))
    assert 0 < near < far


def test_two_generations_in_a_row_and_switching_checkpoints_change_nothing(webui: WebUI, files: Files) -> None:
    first = webui.generate(delta(files))
    webui.generate(delta(files), override_settings={"sd_model_checkpoint": files.sdxl})
    again = webui.generate(delta(files))
    assert np.array_equal(first.pictures, again.pictures)
    assert np.array_equal(webui.generate().pictures, webui.generate().pictures)
