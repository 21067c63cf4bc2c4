"""Latents of every sampler and feature, compared with those of a checkpoint that has the LoRA merged into it.

The main checkpoint and the base are the same model here, so lambda 1 adds all that the adaptation changes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from tests.support.generations import DELTA, HIRES, assert_exact, init_latents
from tests.support.stand_in_webui import FORGES, WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
WORD = "thing, " * 40  # more than one chunk of tokens


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
    """Conditioning for another number of steps is cached, and not used here."""
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


@pytest.mark.parametrize(
    ("sampler", "fixed"),
    [("Euler a", False), ("Euler a", True), ("Heun", False), ("DPM++ SDE", False), ("DDIM", False), ("DDIM", True)],
)
def test_img2img(webui: WebUI, sampler: str, fixed: bool) -> None:
    webui.shared.opts.img2img_fix_steps = fixed
    assert_exact(webui, init_latent=init_latents(), sampler_name=sampler, steps=6, denoising_strength=0.7)


def test_img2img_has_its_delta_whatever_txt2img_said_of_hires_fix(webui: WebUI) -> None:
    for hires in ("first pass", "hires pass"):
        assert_exact(webui, {"hires": hires}, init_latent=init_latents(), denoising_strength=0.7)


@pytest.mark.parametrize("sampler", ["Euler a", "DDIM"])
def test_inpainting_leaves_what_is_outside_the_mask(webui: WebUI, sampler: str) -> None:
    mask = torch.zeros(4, 8, 8)
    mask[:, :, :4] = 1
    changes = {
        "init_latent": init_latents(2),
        "mask": mask,
        "nmask": 1 - mask,
        "batch_size": 2,
        "sampler_name": sampler,
    }
    assert_exact(webui, denoising_strength=0.8, steps=5, **changes)
    previews: list[torch.Tensor] = []
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(lambda params: previews.append(params.x))
    try:
        made = webui.latents(DELTA, **changes)
    finally:
        registered.pop()
    assert torch.equal(made[..., :4], init_latents(2)[..., :4])
    if sampler == "Euler a":  # with timestep samplers, only Forge blends estimates, not noise
        assert previews and all(torch.equal(seen[..., :4], init_latents(2)[..., :4]) for seen in previews)
