"""What the host layer gives in a generation, in stand-ins for both WebUIs.

Where the main checkpoint and the base are the same model, lambda 1 adds all that the adaptation
changes: the latents must be those of the checkpoint with the LoRA merged into it, for every sampler
and every feature that meets the denoiser.
"""

from __future__ import annotations

import contextlib
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.errors import AdapterError, CheckpointError, DeltaError, SettingError
from lib_delta.runtime.side_model import SideModel
from tests.support.small_files import Files, checkpoint, lora_factors, with_lora, write, write_lora
from tests.support.stand_in_webui import FORGES, PACKAGES, STAND_IN, WebUI, folders, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
DELTA = {"base": "base", "loras": "ink"}
WORD = "thing, " * 40  # more than one chunk of tokens


HOSTS = ("a1111", "forge", "neo")


@pytest.fixture
def files(webui: WebUI) -> Files:
    return webui.files


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which the source is asked."""
    asked: list[int] = []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        asked.append(step.step)
        return original(self, step)

    monkeypatch.setattr(Source, "deltas", deltas)
    return asked


def assert_exact(webui: WebUI, delta: dict[str, Any] | None = None, native: str | None = None, **changes: Any) -> None:
    """With the delta as with the LoRA itself, but for rounding; and both far from what there is without."""
    plain, wanted = webui.latents(**changes), webui.native(native, **changes)
    made = webui.generate({**DELTA, **(delta or {})}, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(plain, wanted) > 1e-3, "the LoRA changes nothing here"
    assert float((made.images - wanted).norm() / (plain - wanted).norm()) < 1e-3
    assert all("Delta lambda: 1" in text for text in made.infotexts)


SAMPLERS = (
    *("Euler", "Euler a", "LMS", "Heun", "DPM2", "DPM fast", "DPM++ 2M", "DPM++ SDE"),
    *("Restart", "DDIM", "DDIM CFG++", "UniPC"),
)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler(webui: WebUI, sampler: str) -> None:
    assert_exact(webui, sampler_name=sampler, steps=5)


PROMPTS: dict[str, dict[str, Any]] = {
    "and": {"prompt": "a cat AND a dog :0.6 AND a red mat :-0.3"},
    "and in two images": {"prompt": ["a cat AND a dog :0.5", "a mat AND a :0.5"], "batch_size": 2},
    "editing": {"prompt": "a [cat:dog:0.5] on a mat", "negative_prompt": "[blue:red:1]"},
    "editing after the last step": {"prompt": "a [cat:dog:9] on [a:the:2] mat"},
    "turns": {"prompt": "a [cat|dog|red mat]"},
    "long": {"prompt": f"a cat {WORD}"},
    "long negative": {"negative_prompt": f"blue {WORD}"},
    "lengths in a batch": {"prompt": [f"a cat {WORD}", "a cat"], "batch_size": 2},
    "empty": {"prompt": "", "negative_prompt": ""},
    "a textual inversion": {"prompt": "a cat, zwx, on a mat", "negative_prompt": "zwx"},
    "one of another width": {"prompt": "a cat, wide, on a mat"},
}


@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_prompts(webui: WebUI, sampler: str, prompts: dict[str, Any]) -> None:
    assert_exact(webui, sampler_name=sampler, **prompts)


def test_edited_prompts_follow_the_number_of_steps(webui: WebUI) -> None:
    """What prompts were encoded to for another number is kept, and not taken for it."""
    prompt, hires = "a [cat:dog:0.5] on a mat", {"enable_hr": True, "hr_cfg": 5.0}
    for name, changes, one, other in (("steps", {}, 2, 4), ("hr_second_pass_steps", {"steps": 1, **hires}, 2, 4)):
        webui.latents(DELTA, prompt=prompt, **{**changes, name: one})
        told = {"prompt": prompt, **changes, name: other}
        assert relative(webui.latents(DELTA, **told), webui.native(**told)) < 1e-5


FEATURES: dict[str, dict[str, Any]] = {
    "cfg 1": {"cfg_scale": 1.0},
    "cfg 12": {"cfg_scale": 12.0},
    "batch of 3": {"batch_size": 3},
    "two batches": {"n_iter": 2},
    "NGMS": {"s_min_uncond": 4.0},
    "noise on the way": {"s_churn": 3.0},
    "not square": {"width": 64, "height": 96},
}


def test_images_that_are_told_differently_by_and(webui: WebUI) -> None:
    if webui.name in FORGES:
        pytest.skip("Forge gives all images of a batch the number and weights of sub-prompts of the last")
    assert_exact(webui, prompt=["a cat AND a dog :1.2 AND a mat :-0.4", "a mat AND a :0.5"], batch_size=2)


@pytest.mark.parametrize("changes", FEATURES.values(), ids=FEATURES)
def test_features(webui: WebUI, changes: dict[str, Any]) -> None:
    assert_exact(webui, **changes)


OPTIONS: dict[str, dict[str, Any]] = {
    "clip skip": {"CLIP_stop_at_last_layers": 2},
    "skip early": {"skip_early_cond": 0.4},
    "NGMS at all steps": {"s_min_uncond_all": True},
    "low-rank": {"delta_sampling_form": "low-rank factors"},
    "low-rank, as it was called": {"delta_sampling_form": "low-rank factors (less memory)"},
    "merged": {"delta_sampling_form": "merged"},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_options(webui: WebUI, options: dict[str, Any]) -> None:
    vars(webui.shared.opts).update(options)
    assert_exact(webui, s_min_uncond=8.0 if "s_min_uncond_all" in options else 0.0)


@pytest.mark.parametrize("option", ["pad_cond_uncond", "pad_cond_uncond_v0"])
@pytest.mark.parametrize("prompts", [{"prompt": f"a cat {WORD}"}, {"negative_prompt": f"blue {WORD}"}])
def test_prompts_padded_to_one_length(webui: WebUI, option: str, prompts: dict[str, Any]) -> None:
    setattr(webui.shared.opts, option, True)
    assert_exact(webui, **prompts)


WITHOUT_GUIDANCE: dict[str, tuple[dict[str, Any], float]] = {
    "cfg 1": ({"cfg_scale": 1.0}, 0.0),
    "NGMS": ({"s_min_uncond": 4.0}, 0.0),
    "skip early": ({}, 0.4),
}


@pytest.mark.parametrize(("changes", "early"), WITHOUT_GUIDANCE.values(), ids=WITHOUT_GUIDANCE)
def test_and_where_guidance_is_left_out(webui: WebUI, changes: dict[str, Any], early: float) -> None:
    webui.shared.opts.skip_early_cond = early
    assert_exact(webui, prompt="a cat AND a dog :0.6", batch_size=2, **changes)


# When WebUIs leave guidance out, which have rules of their own for it, whatever their settings are called and say.
RULES: dict[str, Callable[[int], bool]] = {
    "in the first step": lambda step: step == 0,
    "at even steps": lambda step: step % 2 == 0,
    "at odd steps": lambda step: step % 2 == 1,
    "in the last steps": lambda step: step >= 1,
}


def by_rule(webui: WebUI, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], bool]) -> Any:
    """Have the stand-in leave out guidance by a rule of which no setting tells."""
    denoiser = webui.module("sd_samplers_cfg_denoiser").CFGDenoiser
    monkeypatch.setattr(denoiser, "_guidance_is_left_out", lambda self, _sigma, _limit: rule(self.step))
    return denoiser


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("sampler", ["Euler", "Heun", "DDIM"])
def test_guidance_that_is_left_out_by_any_rule(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], bool], sampler: str
) -> None:
    ordinary = webui.native(sampler_name=sampler)
    by_rule(webui, monkeypatch, rule)
    assert relative(webui.native(sampler_name=sampler), ordinary) > 3e-4, "nothing was left out"
    assert_exact(webui, sampler_name=sampler)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_and_where_guidance_is_left_out_by_any_rule(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], bool]
) -> None:
    by_rule(webui, monkeypatch, rule)
    assert_exact(webui, prompt="a cat AND a dog :0.6", batch_size=2)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_guidance_that_is_left_out_as_in_reforge(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], bool]
) -> None:
    """Its functions before guidance are given estimates, and those after it no negative prompt that was left out."""
    if webui.name not in FORGES:
        pytest.skip("AUTOMATIC1111 has no such functions")
    denoiser = by_rule(webui, monkeypatch, rule)
    reforge = webui.module("sd_samplers_cfg_denoiser").evaluated_in_reforge
    monkeypatch.setattr(denoiser, "_evaluated", reforge)
    assert_exact(webui)
    assert_exact(webui, cfg_scale=1.0)


def test_guidance_that_is_left_out_beside_an_extension_that_shows_the_model_more(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In AUTOMATIC1111 what the model was shown tells it no more then, and rows are compared."""
    if webui.name in FORGES:
        pytest.skip("Forge tells functions before guidance")
    by_rule(webui, monkeypatch, RULES["in the first step"])

    def ask_again(params: Any) -> None:
        model = params.denoiser.inner_model
        original = model.forward

        def twice(x: Any, sigma: Any, **cond: Any) -> Any:
            model.forward = original
            model(x[:1], sigma[:1], cond={"c_crossattn": [cond["cond"]["c_crossattn"][0][:1]]})
            return original(x, sigma, **cond)

        model.forward = twice

    registered = webui.callbacks.registered["cfg_denoiser"]
    monkeypatch.setitem(webui.callbacks.registered, "cfg_denoiser", [*registered, ask_again])
    assert_exact(webui)


HIRES = {"enable_hr": True, "hr_second_pass_steps": 3, "hr_cfg": 5.0}


@pytest.mark.parametrize("sampler", ["Euler a", "DPM++ SDE", "DDIM"])
def test_hires_fix(webui: WebUI, sampler: str) -> None:
    assert_exact(webui, sampler_name=sampler, prompt="a [cat:dog:0.5] on a [mat:rug:1.5]", **HIRES)


@pytest.mark.parametrize("samplers", [("Euler", "DDIM"), ("DDIM", "Heun")], ids="-".join)
def test_hires_fix_with_another_sampler_and_prompt(webui: WebUI, samplers: tuple[str, str]) -> None:
    first, second = samplers
    assert_exact(
        webui,
        sampler_name=first,
        hr_sampler_name=second,
        hr_prompt="a dog in the rain",
        hr_negative_prompt="red",
        **HIRES,
    )


def test_hires_fix_with_guidance_in_one_pass_only(webui: WebUI) -> None:
    assert_exact(webui, cfg_scale=1.0, **HIRES)
    assert_exact(webui, **{**HIRES, "hr_cfg": 1.0})


def test_the_delta_can_be_bounded_to_a_hires_pass(webui: WebUI, passes: list[int]) -> None:
    def counted(hires: str) -> tuple[int, torch.Tensor]:
        passes.clear()
        made = webui.latents({**DELTA, "hires": hires}, steps=5, **HIRES)
        return len(passes), made

    both, first, second = counted("both"), counted("first pass"), counted("hires pass")
    plain = webui.latents(steps=5, **HIRES)
    assert [both[0], first[0], second[0]] == [8, 5, 3]
    pictures = [both[1], first[1], second[1], plain]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])


def test_quality_is_how_often_the_source_is_asked(webui: WebUI, passes: list[int]) -> None:
    def counted(quality: str) -> tuple[int, torch.Tensor]:
        passes.clear()
        made = webui.latents({**DELTA, "quality": quality}, steps=9)
        return len(passes), made

    plain, (every, exact) = webui.latents(steps=9), counted("exact")
    (half, balanced), (quarter, fast) = counted("balanced"), counted("fast")
    assert every == 9 and half == 5 and quarter == 3
    # How near they come is measured on trained models: what random ones change is not steady over the steps.
    pictures = [plain, exact, balanced, fast]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    passes.clear()
    webui.latents({**DELTA, "quality": "fast"}, steps=9)
    assert len(passes) == 3, "what is held is of one generation"


def test_without_a_hires_pass_there_is_none_to_add_to(webui: WebUI, passes: list[int]) -> None:
    made = webui.generate({**DELTA, "hires": "hires pass"})
    assert torch.equal(made.images, webui.latents()) and passes == []
    assert "Delta" not in made.infotexts[0]


def latent(batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, 4, 8, 8, generator=torch.Generator().manual_seed(8))


@pytest.mark.parametrize(
    ("sampler", "fixed"),
    [("Euler a", False), ("Euler a", True), ("Heun", False), ("DPM++ SDE", False), ("DDIM", False), ("DDIM", True)],
)
def test_img2img(webui: WebUI, sampler: str, fixed: bool) -> None:
    webui.shared.opts.img2img_fix_steps = fixed
    assert_exact(webui, init_latent=latent(), sampler_name=sampler, steps=6, denoising_strength=0.7)


def test_img2img_has_its_delta_whatever_txt2img_said_of_hires_fix(webui: WebUI) -> None:
    for hires in ("first pass", "hires pass"):
        assert_exact(webui, {"hires": hires}, init_latent=latent(), denoising_strength=0.7)


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_inpainting_leaves_what_is_outside_the_mask(webui: WebUI, sampler: str) -> None:
    mask = torch.zeros(4, 8, 8)
    mask[:, :, :4] = 1
    changes = {"init_latent": latent(2), "mask": mask, "nmask": 1 - mask, "batch_size": 2, "sampler_name": sampler}
    assert_exact(webui, denoising_strength=0.8, steps=5, **changes)
    previews: list[torch.Tensor] = []
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(lambda params: previews.append(params.x))
    try:
        made = webui.latents(DELTA, **changes)
    finally:
        registered.pop()
    assert torch.equal(made[..., :4], latent(2)[..., :4])
    if sampler == "Euler a":  # timestep samplers have their estimates, not noise, blended by Forge alone
        assert previews and all(torch.equal(seen[..., :4], latent(2)[..., :4]) for seen in previews)


# How far along a step is.


def progress_of(webui: WebUI, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> list[tuple[bool, float]]:
    run = sys.modules["lib_delta.hosts.generation.run"].Run
    seen: list[tuple[bool, float]] = []
    original = run.strength

    def strength(self: Any, progress: float, hires: bool) -> float:
        seen.append((hires, progress))
        return float(original(self, progress, hires))

    monkeypatch.setattr(run, "strength", strength)
    webui.generate(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    return seen


@pytest.mark.parametrize("sampler", ["Euler", "DPM++ 2M", "LMS", "DDIM"])
@pytest.mark.parametrize("image", [False, True])
def test_progress_leads_from_0_to_1_by_equal_steps(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, sampler: str, image: bool
) -> None:
    webui.generate(DELTA)  # so that the module is there to be watched
    changes = {"init_latent": latent(), "denoising_strength": 0.6} if image else {}
    seen = [p for _, p in progress_of(webui, monkeypatch, sampler_name=sampler, steps=10, **changes)]
    assert len(seen) > 3
    assert seen == pytest.approx(torch.linspace(0, 1, len(seen)).tolist(), abs=1e-5)


@pytest.mark.parametrize("sampler", ["Heun", "DPM++ SDE", "Restart", "UniPC", "DPM fast"])
def test_progress_stays_within_0_and_1_wherever_samplers_ask(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    webui.generate(DELTA)
    seen = [p for _, p in progress_of(webui, monkeypatch, sampler_name=sampler, steps=8)]
    assert seen[0] == 0 and max(seen) == pytest.approx(1, abs=0.06) and min(seen) >= 0
    if sampler == "Restart":
        assert any(b < a for a, b in pairwise(seen))


def test_progress_starts_anew_in_the_hires_pass(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.generate(DELTA)
    seen = progress_of(webui, monkeypatch, steps=5, **HIRES)
    assert [p for hires, p in seen if not hires] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-5)
    assert [p for hires, p in seen if hires] == pytest.approx([0, 0.5, 1], abs=1e-5)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM", "UniPC"])
def test_a_single_step_of_img2img_has_its_delta(webui: WebUI, sampler: str) -> None:
    made = webui.generate(DELTA, init_latent=latent(), steps=4, denoising_strength=0.3, sampler_name=sampler)
    assert webui.callbacks.swallowed == []
    assert made.images.isfinite().all()


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_the_last_step_alone(webui: WebUI, passes: list[int], sampler: str) -> None:
    made = webui.generate({**DELTA, "start": 1.0}, sampler_name=sampler, steps=6)
    assert len(passes) == 1
    assert not torch.equal(made.images, webui.latents(sampler_name=sampler, steps=6))


# Nothing to add.

NOTHING: dict[str, dict[str, Any]] = {
    "off": {**DELTA, "enabled": False},
    "lambda 0": {**DELTA, "lambda": 0.0},
    "a curve of 0": {**DELTA, "curve": "linear", "curve_start": 0.0, "curve_end": 0.0},
}


@pytest.mark.parametrize("delta", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_without_a_delta_the_latents_are_the_webuis_own(
    webui: WebUI, passes: list[int], sampler: str, delta: dict[str, Any]
) -> None:
    made = webui.generate(delta, sampler_name=sampler)
    assert torch.equal(made.images, webui.latents(sampler_name=sampler))
    assert passes == [] and "Delta" not in made.infotexts[0]


def test_switched_off_nothing_is_loaded(webui: WebUI) -> None:
    webui.host.unload()
    webui.generate(NOTHING["off"])
    webui.generate(NOTHING["lambda 0"])
    assert webui.host.status().startswith("No side model is loaded")


def test_steps_out_of_range_are_the_webuis_own_and_not_asked_for(webui: WebUI, passes: list[int]) -> None:
    seen: list[torch.Tensor] = []
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(lambda params: seen.append(params.x.clone()))
    try:
        webui.generate({**DELTA, "start": 0.5}, steps=5)
        late = list(seen)
        seen.clear()
        webui.generate(steps=5)
    finally:
        registered.pop()
    assert passes == [2, 3, 4]
    assert [torch.equal(a, b) for a, b in zip(late, seen)] == [True, True, False, False, False]


# What is added.


def test_a_fine_tuned_checkpoint(webui: WebUI) -> None:
    assert_exact(webui, {"loras": "", "adapted": "tuned"})


def test_a_loras_weights(webui: WebUI) -> None:
    assert_exact(webui, {"loras": "ink:0.5"}, native="half")
    assert_exact(webui, {"loras": "ink:1:te=0"}, native="unet-only")


def test_a_prompt_of_the_adapted_model_alone(webui: WebUI) -> None:
    made = webui.latents({"base": "base", "adapted_prompt": "a red boat [x|y]"})
    wanted, plain = webui.latents(prompt="a red boat [x|y]"), webui.latents()
    assert float((made - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_prompts_of_the_side_model(webui: WebUI) -> None:
    """The delta is what the LoRA changes with these prompts, whatever the main ones are."""
    told = {"prompt": "a red boat", "negative_prompt": "green"}
    changes = {"steps": 1, "sampler_name": "Euler"}
    delta = webui.native(**told, **changes) - webui.latents(**told, **changes)
    made = webui.latents({**DELTA, **told}, **changes) - webui.latents(**changes)
    assert relative(made, delta) < 1e-3


def test_lambda_scales_the_delta(webui: WebUI) -> None:
    plain, one, three = (webui.latents({**DELTA, "lambda": value}, steps=1) for value in (0.0, 1.0, 3.0))
    assert relative(three - plain, 3 * (one - plain)) < 1e-3


def test_images_of_a_batch_are_those_made_alone(webui: WebUI) -> None:
    if webui.name in FORGES:
        pytest.skip("Forge gives all images of a batch as many sub-prompts as each has")
    prompts = ["a cat", "a dog AND a mat :0.4"]
    together = webui.latents(DELTA, prompt=prompts, batch_size=2, cfg_scale=3.0)
    alone = webui.latents(DELTA, prompt=prompts, n_iter=2, cfg_scale=3.0)
    # Each batch draws its noise from its first image's seed, so only the first image is the same.
    assert relative(together[:1], alone[:1]) < 1e-4


# Tags and axes.


def test_tags_switch_the_delta_on(webui: WebUI) -> None:
    off = {"enabled": False, "base": "base"}
    tagged = webui.generate(off, prompt="a cat on a mat<delta:ink:1:weight=0.5>")
    wanted = webui.native("half")
    assert relative(tagged.images, wanted) < 1e-5
    assert "Delta lambda: 1" in tagged.infotexts[0] and "Delta LoRAs: ink:0.5" in tagged.infotexts[0]


def test_tags_take_the_base_of_the_settings(webui: WebUI) -> None:
    webui.shared.opts.delta_sampling_base = "base"
    assert relative(webui.latents({"enabled": False}, prompt="a cat on a mat<delta:ink>"), webui.native()) < 1e-5


def test_tags_join_the_loras_of_the_accordion_and_replace_those_of_their_name(webui: WebUI, files: Files) -> None:
    pen = files.lora_file("pen")
    pen.write_bytes(files.lora_file().read_bytes())
    webui.host.catalog.refresh_loras()
    try:
        delta = {**DELTA, "loras": "pen:0.25, ink:3"}
        made = webui.generate(delta, prompt="a cat on a mat<delta:ink:1:weight=0.25>")
    finally:
        pen.unlink()
        sys.modules["networks"].available_networks.pop("pen")  # type: ignore[attr-defined]
    assert relative(made.images, webui.native("half")) < 1e-5


def test_each_batch_has_its_own_tags(webui: WebUI) -> None:
    prompts = ["a cat<delta:ink:1>", "a cat"]
    made = webui.generate({"enabled": False, "base": "base"}, prompt=prompts, n_iter=2)
    plain = webui.generate(prompt=["a cat", "a cat"], n_iter=2)
    assert relative(made.images[:1], plain.images[:1]) > 1e-3
    assert torch.equal(made.images[1:], plain.images[1:])
    assert "Delta" in made.infotexts[0]
    assert "Delta" not in made.infotexts[1]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        ("<delta:ink:1><delta:ink:2>", "give lambda once"),
        ("<delta:ink:much>", "a number is needed"),
        ("<delta:inq:1>", "is 'ink' meant"),
    ],
)
def test_wrong_tags_stop_the_generation(webui: WebUI, tags: str, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        webui.generate({"enabled": False, "base": "base"}, prompt=f"a cat{tags}")


def test_axes_of_an_xyz_plot(webui: WebUI) -> None:
    def cell(**axes: Any) -> torch.Tensor:
        p = webui.p({"enabled": False, "base": "none", "loras": "ink"})
        p.delta_sampling_axes = {"base": "base", **axes}
        made: torch.Tensor = webui.processing.process_images(p).images.clone()
        assert not hasattr(p, "delta_sampling_axes")
        return made

    assert relative(cell(), webui.native()) < 1e-5
    assert relative(cell(lora_weight=0.5), webui.native("half")) < 1e-5
    assert relative(cell(loras="", adapted="half"), webui.native("half")) < 1e-5
    assert torch.equal(cell(strength=0.0), webui.latents())
    with pytest.raises(SettingError, match="lambda"):
        cell(strength=11.0)


def test_cells_of_a_plot_share_their_claims_and_each_makes_its_own(webui: WebUI) -> None:
    shared: dict[str, Any] = {}
    texts = []
    for strength in (1.0, 0.0, 0.5):
        p = webui.p({**DELTA, "lambda": strength}, extra_generation_params=shared)
        texts += webui.processing.process_images(p).infotexts
    assert "Delta lambda: 1," in texts[0] and "Delta" not in texts[1] and "Delta lambda: 0.5" in texts[2]


def test_what_the_infotext_says(webui: WebUI) -> None:
    (text,) = webui.generate({**DELTA, "loras": "ink:0.5", "start": 0.25}).infotexts
    for part in ("Delta lambda: 1", "Delta start: 0.25", "Delta LoRAs: ink:0.5", "Delta LoRA hashes: ink: ink-hash"):
        assert part in text
    info = webui.sd_models.get_closet_checkpoint_match("base")
    assert f"Delta base: base [{info.shorthash}]" in text
    assert "Delta end" not in text


# Faults.


def deltas_with(monkeypatch: pytest.MonkeyPatch, at_step: int, what: Any) -> None:
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        deltas = original(self, step)
        if step.step < at_step:
            return deltas
        if isinstance(what, BaseException):
            raise what
        return deltas._replace(guided=deltas.guided * what, uncond=deltas.uncond * what)

    monkeypatch.setattr(Source, "deltas", deltas)


FAULTS = {
    "not a number": (float("nan"), "not a number"),
    "out of memory": (torch.cuda.OutOfMemoryError("CUDA out of memory"), "out of memory"),
    "a bug": (KeyError("x"), "KeyError"),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_fault_stops_the_generation(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, fault: tuple[Any, str], at_step: int
) -> None:
    deltas_with(monkeypatch, at_step, fault[0])
    p = webui.p(DELTA)
    with pytest.raises(DeltaError, match=fault[1]):
        webui.processing.process_images(p)
    assert "sample" not in vars(p) and not hasattr(p, "delta_sampling_run")
    assert webui.callbacks.swallowed == []
    assert webui.host.status().startswith("No side model is loaded")
    monkeypatch.undo()
    assert_exact(webui)


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
@pytest.mark.parametrize("at_step", [0, 2])
def test_a_fault_leaves_the_plain_picture_where_the_user_wants_it(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, fault: tuple[Any, str], at_step: int
) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    deltas_with(monkeypatch, at_step, fault[0])
    made = webui.generate(DELTA)
    if at_step == 0:
        assert torch.equal(made.images, webui.latents())
    assert made.images.isfinite().all()
    assert "Delta lambda" not in made.infotexts[0] and "Delta not applied: " in made.infotexts[0]
    assert any(fault[1] in comment and "without" in comment for comment in made.comments)
    assert webui.callbacks.swallowed == []


def test_a_sampler_whose_schedule_cannot_be_read_is_a_fault(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(_denoiser: Any) -> Any:
        raise AttributeError("no schedule")

    monkeypatch.setattr(sys.modules[type(webui.host).__module__], "pass_progress", unreadable)
    with pytest.raises(DeltaError, match=r"reading a step's state .* failed \(AttributeError: no schedule\)"):
        webui.generate(DELTA)
    webui.shared.opts.delta_sampling_on_error = "go on without"
    made = webui.generate(DELTA)
    assert (
        torch.equal(made.images, webui.latents())
        and "Delta lambda" not in made.infotexts[0]
        and "Delta not applied: " in made.infotexts[0]
    )


def test_weights_that_overflow_are_a_fault(webui: WebUI) -> None:
    with pytest.raises(DeltaError, match=r"not a number at step 1 \(sigma [\d.]+\): give its LoRAs smaller weights$"):
        webui.generate({**DELTA, "loras": "ink:1e38"})
    webui.shared.opts.delta_sampling_precision = "bf16"
    with pytest.raises(DeltaError, match="it runs in bf16: choose fp32 in Settings > Delta Sampling > Precision"):
        webui.generate({**DELTA, "loras": "ink:1e38"})


def test_a_fault_in_the_hires_pass_takes_the_claim_back(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        if step.x.shape[-1] > 8:
            raise MemoryError
        return original(self, step)

    monkeypatch.setattr(Source, "deltas", deltas)
    made = webui.generate(DELTA, **HIRES)
    assert (
        "Delta lambda" not in made.infotexts[0]
        and "Delta not applied: " in made.infotexts[0]
        and len(made.comments) == 1
    )


WRONG: dict[str, tuple[Any, str]] = {
    "an unknown key": ({**DELTA, "lamda": 1}, "is 'lambda' meant"),
    "a text for lambda": ({**DELTA, "lambda": "much"}, "lambda"),
    "too many": ([True] * 30, "arguments"),
    "no base": ({"loras": "ink"}, "choose a base checkpoint"),
    "nothing to add": ({"base": "base"}, "nothing to add"),
    "an unknown LoRA": ({**DELTA, "loras": "inks"}, "is 'ink' meant"),
    "an unknown checkpoint": ({**DELTA, "base": "bass"}, "is 'base' meant"),
    "an unknown adapted one": ({**DELTA, "adapted": "tune"}, "is 'tuned' meant"),
    "a range the wrong way round": ({**DELTA, "start": 0.8, "end": 0.2}, "start"),
}


@pytest.mark.parametrize(("delta", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("on_error", ["stop", "go on without"])
def test_wrong_arguments_come_out_of_the_sampling(webui: WebUI, on_error: str, delta: Any, message: str) -> None:
    webui.shared.opts.delta_sampling_on_error = on_error
    p = webui.p(delta)
    with pytest.raises(SettingError, match=message):
        webui.processing.process_images(p)
    assert "sample" not in vars(p)


def test_positional_arguments_are_in_the_order_of_the_accordion(webui: WebUI) -> None:
    accordion = [True, 1, 0, 1, "constant", 1, 1, "base", "None", "ink", "", "", "", "both"]
    assert relative(webui.latents(accordion), webui.native()) < 1e-5


@pytest.mark.parametrize("on_error", ["stop", "go on without"])
def test_a_file_that_cannot_be_read(webui: WebUI, files: Files, on_error: str) -> None:
    webui.shared.opts.delta_sampling_on_error = on_error
    files.checkpoint("broken").write_bytes(b"no model")
    webui.sd_models.list_models()
    try:
        if on_error == "stop":
            with pytest.raises(CheckpointError, match="broken"):
                webui.generate({**DELTA, "base": "broken"})
        else:
            made = webui.generate({**DELTA, "base": "broken"})
            assert torch.equal(made.images, webui.latents())
            assert (
                "Delta lambda" not in made.infotexts[0]
                and "Delta not applied: " in made.infotexts[0]
                and "broken" in made.comments[0]
            )
    finally:
        files.checkpoint("broken").unlink()
        webui.sd_models.list_models()


@pytest.mark.parametrize("on_error", ["stop", "go on without"])
def test_a_checkpoint_of_an_unknown_family_in_the_hires_pass(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, on_error: str
) -> None:
    """Its latents are not what the bridge there is for: it must not end in a picture that claims what it has not."""
    webui.shared.opts.delta_sampling_on_error = on_error
    load = webui.sd_models.load_model

    def load_as_sd3(info: Any) -> Any:
        model = load(info)
        model.is_sd1, model.is_sd3 = info.name_for_extra != "copy", info.name_for_extra == "copy"
        return model

    monkeypatch.setattr(webui.sd_models, "load_model", load_as_sd3)
    if on_error == "stop":
        with pytest.raises(DeltaError, match="sd1-sd3 is for latents of 16 channels"):
            webui.generate(DELTA, hr_checkpoint_name="copy", **HIRES)
    else:
        made = webui.generate(DELTA, hr_checkpoint_name="copy", **HIRES)
        assert (
            "Delta lambda" not in made.infotexts[0]
            and "Delta not applied: " in made.infotexts[0]
            and "sd1-sd3" in made.comments[0]
        )
    assert webui.callbacks.swallowed == []


def test_an_interruption_is_no_fault(webui: WebUI) -> None:
    def interrupt(params: Any) -> None:
        webui.shared.state.interrupted = params.sampling_step >= 1

    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(interrupt)
    try:
        made = webui.generate(DELTA)
    finally:
        registered.remove(interrupt)
        webui.shared.state.interrupted = False
    assert made.images.isfinite().all() and made.comments == []
    assert_exact(webui)


# p.sample, and other generations.


def test_the_sampling_is_wrapped_for_one_batch_only(webui: WebUI) -> None:
    p = webui.p(DELTA, n_iter=2)
    webui.processing.process_images(p)
    assert "sample" not in vars(p) and not hasattr(p, "delta_sampling_run")


def test_another_extensions_sampling_is_called_and_put_back(webui: WebUI) -> None:
    p = webui.p(DELTA)
    original, called = p.sample, []

    def theirs(*arguments: Any, **named: Any) -> Any:
        called.append(True)
        return original(*arguments, **named)

    p.sample = theirs
    made = webui.processing.process_images(p)
    assert p.sample is theirs and called == [True]
    assert relative(made.images, webui.native()) < 1e-5


def test_a_generation_within_another_has_no_delta(webui: WebUI) -> None:
    inner: list[torch.Tensor] = []

    def generate_within(params: Any) -> None:
        if params.sampling_step == 1 and not inner:
            inner.append(torch.empty(0))
            state = torch.get_rng_state()
            inner[0] = webui.latents()
            torch.set_rng_state(state)

    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(generate_within)
    try:
        made = webui.latents(DELTA)
    finally:
        registered.pop()
    assert torch.equal(inner[0], webui.latents())
    assert relative(made, webui.native()) < 1e-5


def test_a_script_that_generates_with_the_same_settings_again(webui: WebUI) -> None:
    p = webui.p(DELTA)
    first = webui.processing.process_images(p).images.clone()
    assert torch.equal(first, webui.processing.process_images(p).images)


# Memory and files.


def test_unloading_gives_the_memory_back_at_once(webui: WebUI) -> None:
    webui.generate(DELTA)
    model = weakref.ref(webui.side_model)
    unet, tower = (weakref.ref(next(part.parameters())) for part in (model().unet, model().tower))
    gc.collect()
    gc.disable()
    try:
        assert webui.host.unload() == "Unloaded 1 side model"
        assert [model(), unet(), tower()] == [None, None, None]
    finally:
        gc.enable()
    assert webui.host.status().startswith("No side model is loaded")
    assert webui.host.unload() == "Unloaded 0 side models"
    assert_exact(webui)


def broken_off(webui: WebUI, base: str) -> None:
    with pytest.raises(DeltaError, match="not a number"):
        webui.generate({"base": base, "loras": "ink:1e38"})


def gone_on_without(webui: WebUI, base: str) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    webui.generate({"base": base, "loras": "ink:1e38"})


def without_a_readable_lora(webui: WebUI, base: str) -> None:
    webui.shared.opts.delta_sampling_cache = 0
    bad = webui.files.lora_file("bad")
    bad.write_bytes(b"no LoRA")
    for on_error in ("stop", "go on without"):
        webui.shared.opts.delta_sampling_on_error = on_error
        with contextlib.suppress(AdapterError):
            webui.generate({"base": base, "loras": "ink, bad"})
    bad.unlink()
    sys.modules["networks"].available_networks.pop("bad", None)  # type: ignore[attr-defined]


# What a generation does with its base, and how many bases there are after it.
DROPPING: dict[str, tuple[Any, int]] = {
    "a LoRA": (lambda webui, base: webui.generate({"base": base, "loras": "ink"}), 1),
    "hires": (lambda webui, base: webui.generate({"base": base, "loras": "ink"}, **HIRES), 1),
    "an adapted checkpoint": (lambda webui, base: webui.generate({"base": base, "adapted": "tuned"}), 1),
    "a fault": (broken_off, 0),
    "a fault that is gone on without": (gone_on_without, 0),
    "a LoRA that cannot be read": (without_a_readable_lora, 0),
}


@pytest.mark.parametrize("collector", [True, False], ids=["collected", "without the collector"])
@pytest.mark.parametrize(("generate", "left"), DROPPING.values(), ids=DROPPING)
def test_a_base_that_is_dropped_is_gone_before_the_next_is_loaded(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, generate: Any, left: int, collector: bool
) -> None:
    alive: list[tuple[weakref.ref[Any], weakref.ref[Any]]] = []
    load = SideModel.__init__

    def living() -> tuple[int, int]:
        """Return how many of the bases' UNets are in memory, and how many of their text encoders."""
        return sum(unet() is not None for unet, _ in alive), sum(tower() is not None for _, tower in alive)

    def counted(self: SideModel, *given: Any) -> None:
        assert living() == (0, 0), "one is there still"
        load(self, *given)
        alive.append((weakref.ref(self.unet), weakref.ref(self.tower)))

    webui.host.unload()
    gc.collect()
    monkeypatch.setattr(SideModel, "__init__", counted)
    gc.disable()
    try:
        if not collector:
            monkeypatch.setattr(gc, "collect", lambda *_: 0)
        for base in ("half", "base", "copy"):
            generate(webui, base)
            assert living() == (left, left)
    finally:
        gc.enable()


@pytest.mark.parametrize(("limit", "kept"), [(0, 0), (1, 1), (2, 2)])
def test_as_many_bases_are_kept_as_the_settings_say(webui: WebUI, limit: int, kept: int) -> None:
    webui.shared.opts.delta_sampling_cache = limit
    for base in ("half", "base", "copy"):
        webui.generate({**DELTA, "base": base})
    names = [model.name for model in webui.host._models or ()]
    assert names == ["base.safetensors", "copy.safetensors"][2 - kept :]


def test_a_base_that_is_kept_is_not_loaded_again(webui: WebUI) -> None:
    webui.generate(DELTA)
    model = webui.side_model
    webui.generate({**DELTA, "loras": "ink:0.5"})
    assert webui.side_model is model


@pytest.mark.parametrize("kept", [1, 0])
def test_a_lora_that_cannot_be_used_does_not_cost_the_base(webui: WebUI, files: Files, kept: int) -> None:
    before = webui.latents(DELTA)
    model = webui.side_model
    webui.shared.opts.delta_sampling_cache = kept
    bad = files.lora_file("bad")
    bad.write_bytes(b"no LoRA")
    try:
        for loras, error in (("ink, bad", AdapterError), ("inks", SettingError), ("ink:1:lbw=1,0", SettingError)):
            with pytest.raises(error):
                webui.generate({**DELTA, "loras": loras})
            assert list(webui.host._models) == [model] * kept
    finally:
        bad.unlink()
        sys.modules["networks"].available_networks.pop("bad", None)  # type: ignore[attr-defined]
    assert torch.equal(webui.latents(DELTA), before)


def test_changed_files_are_read_again(webui: WebUI, files: Files) -> None:
    kept = {path: path.with_suffix(".kept") for path in (files.lora_file(), files.checkpoint("copy"))}
    for path, aside in kept.items():
        os.link(path, aside)
    weights = checkpoint(seed=7)
    other = lora_factors(weights, seed=8)
    try:
        webui.generate({**DELTA, "base": "copy"})
        write_lora(other, files.lora_file())
        write(weights, files.checkpoint("copy"))
        write(with_lora(weights, other, 1, 1), files.checkpoint("copy-tuned"))
        later(files.lora_file(), files.checkpoint("copy"))
        webui.sd_models.list_models()
        webui.shared.sd_model = webui.sd_models.load_model(webui.sd_models.get_closet_checkpoint_match("copy"))
        assert_exact(webui, {"base": "copy"}, native="copy-tuned")
    finally:
        for path, aside in kept.items():
            aside.replace(path)
        files.checkpoint("copy-tuned").unlink(missing_ok=True)
        webui.sd_models.list_models()


def later(*paths: Path) -> None:
    """Make files look newer than a clock of whole seconds can tell."""
    for path in paths:
        moment = path.stat().st_mtime_ns + 2_000_000_000
        os.utime(path, ns=(moment, moment))


def test_the_status_says_what_is_loaded_and_what_it_cost(webui: WebUI) -> None:
    webui.generate(DELTA, steps=5)
    lines = webui.host.status().splitlines()
    assert lines[0].startswith("base.safetensors: on cpu") and "float32" in lines[0]
    assert "ink.safetensors (LoRA of rank 4) adapts" in lines[1] and "match no layer" not in lines[1]
    assert lines[2].startswith("Last run: delta in 5 steps, 5 passes")


def test_lists_follow_the_folders(webui: WebUI, files: Files) -> None:
    assert webui.host.catalog.checkpoints() == ["base", "copy", "half", "tuned", "unet-only"]
    assert webui.host.catalog.loras() == ["ink"]
    files.lora_file("pen").write_bytes(files.lora_file().read_bytes())
    files.checkpoint("new").write_bytes(b"")
    try:
        webui.host.catalog.refresh_loras()
        webui.host.catalog.refresh_checkpoints()
        assert webui.host.catalog.loras() == ["ink", "pen"] and "new" in webui.host.catalog.checkpoints()
    finally:
        files.lora_file("pen").unlink()
        files.checkpoint("new").unlink()
        sys.modules["networks"].available_networks.pop("pen")  # type: ignore[attr-defined]
        webui.sd_models.list_models()


def test_a_lora_that_came_after_the_list_is_found_as_the_webuis_own_tags_find_it(webui: WebUI, files: Files) -> None:
    pen = files.lora_file("pen")
    pen.write_bytes(files.lora_file().read_bytes())
    try:
        assert webui.host.catalog.card("pen").fault, "folders are not searched while somebody types"
        assert relative(webui.latents({**DELTA, "loras": "pen"}), webui.native()) < 1e-5
    finally:
        pen.unlink()
        sys.modules["networks"].available_networks.pop("pen", None)  # type: ignore[attr-defined]


def test_loras_are_found_by_alias_and_without_regard_to_case(webui: WebUI) -> None:
    networks: Any = sys.modules["networks"]
    networks.available_network_aliases["Tusche"] = networks.available_networks["ink"]
    assert relative(webui.latents({**DELTA, "loras": "Tusche"}), webui.native()) < 1e-5
    assert relative(webui.latents({**DELTA, "loras": "INK"}), webui.native()) < 1e-5


def test_without_the_lora_extension_there_are_no_loras(webui: WebUI) -> None:
    networks = sys.modules.pop("networks")
    try:
        webui.host.catalog.refresh_loras()
        assert webui.host.catalog.loras() == []
        with pytest.raises(SettingError, match="none are installed"):
            webui.generate(DELTA)
    finally:
        sys.modules["networks"] = networks


def test_models_are_not_imported_before_the_first_delta() -> None:
    """In a process of its own, which torch takes seconds to start: the stand-ins take turns in one."""
    code = (
        # k-diffusion is slow to import, and nothing is sampled here.
        "import sys; from unittest.mock import MagicMock\n"
        "k = MagicMock(); k.external.DiscreteSchedule = object; sys.modules['k_diffusion'] = k\n"
        "sys.modules.update({'k_diffusion.sampling': k.sampling, 'k_diffusion.external': k.external})\n"
        "path = list(sys.path)\n"
        "for folders in sys.argv[1:]:\n"
        "    sys.path[:] = [*folders.split(';'), *path]\n"
        "    from lib_delta.hosts import host; host().start(); host().status(); host().unload()\n"
        "    heavy = [m for m in sys.modules if m.startswith(('lib_delta.models', 'lib_delta.core.source'))]\n"
        "    print(host().name, *heavy)\n"
        f"    for m in [m for m in sys.modules if m.split('.')[0] in {(*PACKAGES, 'lib_delta')}]: del sys.modules[m]"
    )
    paths = [";".join(folders(name)) for name in ("a1111", "forge", "neo")]
    environment = {**os.environ, "PYTHONPATH": str(STAND_IN.parents[2])}
    command = [sys.executable, "-c", code, *paths]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines() == ["AUTOMATIC1111", "Forge", "Forge Neo"]
