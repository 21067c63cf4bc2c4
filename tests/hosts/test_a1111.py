"""What AUTOMATIC1111 has of its own: previews, padding, InstructPix2Pix, faults that it would swallow."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from small_files import make_files
from stand_in_webui import WebUI, relative, running

DELTA = {"base": "base", "loras": "ink"}


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    with running("a1111", make_files(tmp_path_factory.mktemp("a1111"))) as webui:
        yield webui


@pytest.fixture
def webui(started: WebUI) -> Iterator[WebUI]:
    yield started
    started.reset()


def previews(webui: WebUI, made_by: Any, **changes: Any) -> list[torch.Tensor]:
    seen: list[torch.Tensor] = []
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(lambda _params: seen.append(webui.shared.state.current_latent.clone()))
    try:
        made_by(**changes)
    finally:
        registered.pop()
    return seen


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_previews_have_the_delta(webui: WebUI, sampler: str) -> None:
    wanted = previews(webui, webui.native, sampler_name=sampler)
    got = previews(webui, lambda **changes: webui.latents(DELTA, **changes), sampler_name=sampler)
    assert [relative(a, b) < 1e-4 for a, b in zip(got, wanted)] == [True] * len(wanted)


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_an_editing_model_has_two_rows_without_the_prompt(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Here both are the same, and the picture's own scale cancels out of what the LoRA changes."""
    model = type(webui.shared.sd_model)
    monkeypatch.setattr(model, "cond_stage_key", "edit")
    changes = {"sampler_name": sampler, "init_latent": torch.zeros(2, 4, 8, 8), "batch_size": 2, "steps": 5}
    process = webui.processing.StableDiffusionProcessingImg2Img
    monkeypatch.setattr(process, "image_cfg_scale", 1.7, raising=False)
    plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_weights_of_and_that_cancel_leave_cfg_plus_plus_a_delta(webui: WebUI) -> None:
    """There is no estimate for the prompts from which the rest could be told, so all rows get the same."""
    changes = {"sampler_name": "DDIM CFG++", "prompt": "a cat :1 AND a dog :-1"}
    got = webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == [] and got.isfinite().all()
    assert relative(got, webui.latents(**changes)) > 1e-4


@pytest.mark.parametrize(("flag", "family"), [("is_sd2", "SD2"), ("is_sdxl", "SDXL"), ("is_sd3", "SD3"), ("", "SD1")])
def test_the_family_of_the_main_checkpoint(webui: WebUI, flag: str, family: str) -> None:
    from lib_delta.hosts.a1111 import family_of

    assert family_of(SimpleNamespace(**{flag: True} if flag else {})).name == family


def test_an_sdxl_target_has_its_latents_scaled(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a single Euler step: the source sees ``k * x`` at ``k * sigma``, and its delta is divided by k."""
    monkeypatch.setattr(type(webui.shared.sd_model), "is_sdxl", True)
    got = webui.latents(DELTA, steps=1) - webui.latents(steps=1)
    k = 0.18215 / 0.13025
    seen = []
    for checkpoint in ("tuned", "base"):
        webui.use(checkpoint)
        seen.append(denoised_once(webui, k))
    assert relative(got, (seen[0] - seen[1]) / k) < 1e-3


def denoised_once(webui: WebUI, k: float) -> torch.Tensor:
    """Return the main model's guided estimate of the first step's state, seen k times as large."""
    p = webui.p(steps=1)
    p.all_prompts = [p.prompt]
    p.setup_prompts(0)
    sampler = webui.module("sd_samplers").create_sampler("Euler")
    sigma = sampler.get_sigmas(p, 1)[0] * k
    x = p.noise(p.latent_size()) * sigma
    cond, uncond = (c[0] for c in encoded(webui, p))
    halves = [sampler.model_wrap(x, sigma[None], cond={"c_crossattn": [c[None]]}) for c in (cond, uncond)]
    estimate: torch.Tensor = halves[1] + p.cfg_scale * (halves[0] - halves[1])
    return estimate


def encoded(webui: WebUI, p: Any) -> tuple[torch.Tensor, torch.Tensor]:
    model = webui.shared.sd_model
    return model.get_learned_conditioning(p.prompts), model.get_learned_conditioning(p.negative_prompts)


def test_unloading_returns_cached_memory_to_the_system(webui: WebUI) -> None:
    webui.generate(DELTA)
    collected = webui.module("devices").collected
    collected.clear()
    webui.host.unload()
    assert collected == [True]
