"""The WebUIs' environment of the delta: inference mode, autocast, and swallowed errors."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.errors import DeltaError
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.stand_in_webui import WebUI, relative

DELTA = {"base": "base", "loras": "ink"}


HOSTS = ("a1111", "forge")


@pytest.fixture
def webui(started: WebUI) -> Iterator[WebUI]:
    yield started
    started.host.unload()
    started.reset()


def at_each_step(webui: WebUI, do: Any, delta: dict[str, Any] | None = None) -> Any:
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(do)
    try:
        return webui.generate(delta or DELTA)
    finally:
        registered.remove(do)


def test_weights_change_on_another_device_from_generation_to_generation(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ranges of LoRAs also change the merged weights in mid-run."""
    deltas = [{**DELTA, "loras": recipe} for recipe in ("ink", "ink:0.5", "ink:0.5:end=0.4", "ink")]
    wanted = [webui.latents(delta) for delta in deltas]
    webui.host.unload()
    monkeypatch.setattr(type(webui.host), "compute_device", lambda _host: (DEVICE, torch.float32))
    with stand_in_device():
        for delta, latents in zip(deltas, wanted):
            assert relative(webui.latents(delta), latents) < 1e-5
            assert webui.side_model.device == DEVICE
        webui.side_model.unet.to("cpu")
    assert webui.callbacks.swallowed == []
    webui.host.unload()


def test_autocast_around_the_sampling_changes_nothing_of_the_delta(webui: WebUI) -> None:
    asked: list[torch.Tensor] = []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        x, sigma = torch.full((1, 4, 8, 8), 0.5), torch.tensor([2.0])
        asked.append(original(self, SourceStep(x, sigma, 4.0))[0])
        return original(self, step)

    recipe = {**DELTA, "loras": "ink:0.7:end=0.4"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "deltas", deltas)
        webui.generate(recipe)
        webui.host.unload()
        with torch.autocast("cpu", torch.bfloat16):
            webui.generate(recipe)
    half = len(asked) // 2
    assert any(bool(delta.any()) for delta in asked), "nothing was changed that rounding could be seen in"
    assert all(torch.equal(a, b) for a, b in zip(asked[:half], asked[half:], strict=True))


@pytest.mark.parametrize("delta", [{"lambda": 10**400}, {"loras": "ink:1:dyn=" + "9" * 5000}])
@pytest.mark.parametrize("on_error", ["stop", "go on without"])
def test_whatever_is_wrong_with_the_arguments_comes_out(webui: WebUI, on_error: str, delta: dict[str, Any]) -> None:
    webui.shared.opts.delta_sampling_on_error = on_error
    with pytest.raises(DeltaError):
        webui.generate({**DELTA, **delta})


@pytest.mark.parametrize("function", ["request_fields", "read_passes"])
def test_a_bug_in_any_hook_comes_out(webui: WebUI, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(sys.modules[type(webui.host.lifecycle).__module__], function, fail)
    p = webui.p(DELTA)
    with pytest.raises(DeltaError, match=r"ZeroDivisionError: a bug"):
        webui.processing.process_images(p)
    assert "sample" not in vars(p)
    assert not any("Delta" in key for key in p.extra_generation_params)


def test_unloading_in_mid_run_is_refused(webui: WebUI) -> None:
    wanted, said = webui.latents(DELTA), []
    made = at_each_step(webui, lambda _params: said.append(webui.host.unload()))
    assert set(said) == {"A generation is running with the side model: unload when it has ended"}
    assert torch.equal(made.images, wanted)
    assert webui.host.unload() == "Unloaded 1 side model"


def test_a_fault_lets_go_of_what_the_step_had_computed(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    left: list[weakref.ref[torch.Tensor]] = []

    def deltas(self: Source, step: SourceStep) -> Any:
        activations = torch.zeros_like(step.x)
        left.append(weakref.ref(activations))
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Source, "deltas", deltas)
    alive: list[bool] = []
    gc.disable()
    try:
        made = at_each_step(webui, lambda _params: alive.append(left[0]() is not None))
    finally:
        gc.enable()
    assert alive and not any(alive)
    assert made.comments and len(left) == 1


def test_engines_made_anew_leave_one_hook(webui: WebUI) -> None:
    webui.generate(DELTA)
    embedding = webui.side_model.towers[0].transformer.text_model.embeddings.token_embedding
    for _ in range(3):
        webui.host.forget([webui.side_model])
        webui.host.text_engine(webui.side_model)
    assert len(embedding._forward_hooks) == 1


SIDE = {"prompt": "a red boat", "negative_prompt": "green"}


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_equal_main_prompts_leave_the_side_models_guidance(webui: WebUI, sampler: str) -> None:
    """The target's two estimates are equal then, although its guidance was not skipped."""
    changes = {"prompt": "a cat", "negative_prompt": "a cat", "sampler_name": sampler, "steps": 2}
    asked: list[bool] = []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        asked.append(step.uncond_skipped)
        return original(self, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Source, "deltas", deltas)
        webui.generate({**DELTA, **SIDE}, **changes)
    assert asked and not any(asked)


def test_cfg_plus_plus_at_a_scale_of_1_has_the_negative_prompts_own_delta(webui: WebUI) -> None:
    if webui.name != "a1111":
        pytest.skip("Forge has no estimate for the negative prompt at a scale of 1")
    changes = {"sampler_name": "DDIM CFG++", "cfg_scale": 12.5, "steps": 5}
    plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3
