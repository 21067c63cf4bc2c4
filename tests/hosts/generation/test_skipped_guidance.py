"""Steps in which the WebUI skips guidance to save time, by whatever rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from tests.support.generations import assert_exact
from tests.support.stand_in_webui import FORGES, WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")


WITHOUT_GUIDANCE: dict[str, tuple[dict[str, Any], float]] = {
    "cfg 1": ({"cfg_scale": 1.0}, 0.0),
    "NGMS": ({"s_min_uncond": 4.0}, 0.0),
    "skip early": ({}, 0.4),
}


@pytest.mark.parametrize(("changes", "early"), WITHOUT_GUIDANCE.values(), ids=WITHOUT_GUIDANCE)
def test_and_where_guidance_is_left_out(webui: WebUI, changes: dict[str, Any], early: float) -> None:
    webui.shared.opts.skip_early_cond = early
    assert_exact(webui, prompt="a cat AND a dog :0.6", batch_size=2, **changes)


# Steps in which WebUIs skip guidance, by rules that no setting shows.
RULES: dict[str, Callable[[int], bool]] = {
    "in the first step": lambda step: step == 0,
    "at even steps": lambda step: step % 2 == 0,
    "at odd steps": lambda step: step % 2 == 1,
    "in the last steps": lambda step: step >= 1,
}


def by_rule(webui: WebUI, monkeypatch: pytest.MonkeyPatch, rule: Callable[[int], bool]) -> Any:
    """Make the stand-in skip guidance by a rule that no setting shows."""
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
    """Its functions before guidance get estimates, and those after it no skipped negative prompt."""
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
    """In AUTOMATIC1111 the number of evaluated rows does not show it then, and rows are compared."""
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
