"""Main checkpoints of other kinds: flow matching, other latents, and guidance too low for the side model."""

from __future__ import annotations

import importlib
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.errors import SettingError
from tests.support.stand_in_webui import FORGES, WebUI, relative

DELTA = {"base": "base", "loras": "ink"}
FLUX = SimpleNamespace(latent_channels=16, scale_factor=0.3611)


HOSTS = FORGES


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.Size, float, float]]:
    """The source's inputs: the shape of its latents, sigma, and its guidance scale."""
    seen: list[tuple[torch.Size, float, float]] = []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        seen.append((step.x.shape, float(step.sigma.max()), step.cfg_scale))
        return original(self, step)

    monkeypatch.setattr(Source, "deltas", deltas)
    return seen


def flow_matching(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """Call the main checkpoints' networks as those of flow matching: with (1 - t) * x0 + t * noise at t."""
    loaded = webui.module("loaded_model")

    def times(self: Any) -> torch.Tensor:
        return vars(self)["sigmas"] / (1 + vars(self)["sigmas"])

    def apply_model(self: Any, x: torch.Tensor, t: torch.Tensor, c_crossattn: torch.Tensor) -> torch.Tensor:
        sigma, s = t / (1 - t), (t / (1 - t))[:, None, None, None]
        table = vars(self.predictor)["sigmas"]
        step = (sigma.log() - table.log()[:, None]).abs().argmin(0).float()
        x = x * (1 + s)
        return x - s * self.networks(x / (1 + s**2).sqrt(), step, c_crossattn)

    monkeypatch.setattr(loaded.Predictor, "sigmas", property(times, lambda p, v: vars(p).update(sigmas=v)), False)
    monkeypatch.setattr(loaded.Predictor, "prediction_type", "const", raising=False)
    monkeypatch.setattr(loaded.KModel, "apply_model", apply_model)


def test_a_flow_matching_target_gets_what_the_lora_does_to_it(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    flow_matching(webui, monkeypatch)
    for changes in ({}, {"cfg_scale": 1.0}, {"sampler_name": "Heun"}):
        plain, wanted = webui.latents(**changes), webui.native(**changes)
        assert relative(plain, wanted) > 1e-3
        made = webui.generate(DELTA, **changes)
        assert float((made.images - wanted).norm() / (plain - wanted).norm()) < 1e-3
        assert "Delta lambda: 1" in made.infotexts[0] and webui.callbacks.swallowed == []


def flux(webui: WebUI, monkeypatch: pytest.MonkeyPatch, last: float = 1.0) -> None:
    """Load a main checkpoint of 16 channels whose flow starts at t = 1."""
    loaded = webui.module("loaded_model")
    times = torch.arange(1, 1001) / 1000 * last

    def apply_model(self: Any, x: torch.Tensor, t: torch.Tensor, c_crossattn: torch.Tensor) -> torch.Tensor:
        return 0.3 * torch.tanh(x) + 0.1 * c_crossattn.mean()

    monkeypatch.setattr(loaded.Predictor, "sigmas", property(lambda _: times, lambda p, v: None), False)
    monkeypatch.setattr(loaded.Predictor, "prediction_type", "const", raising=False)
    monkeypatch.setattr(loaded.KModel, "apply_model", apply_model)
    monkeypatch.setattr(loaded.LoadedModel, "latent_channels", 16)
    monkeypatch.setattr(loaded.LoadedModel, "model_config", SimpleNamespace(latent_format=FLUX), raising=False)


def test_a_target_with_latents_of_flux_gets_a_delta_over_the_learned_bridge(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    flux(webui, monkeypatch)
    plain, made = webui.latents(steps=4), webui.generate(DELTA, steps=4)
    assert made.images.isfinite().all() and 0.001 < relative(made.images, plain) < 10
    assert {shape for shape, _, _ in asked} == {(1, 4, 8, 8)}
    # It starts at t = 1, where t / (1 - t) is infinite: the source stays within its trained noise levels.
    limit = webui.side_model.parameterization.schedule.sigma_max
    assert asked[0][1] == pytest.approx(limit) and all(sigma <= limit + 1e-3 for _, sigma, _ in asked)
    assert "FLUX.1 latents: stitched bridge, 8 x 8" in webui.host.status()
    assert torch.equal(webui.latents({**DELTA, "lambda": 0}, steps=4), plain)
    for form in ("published", "same_snr"):
        with pytest.raises(SettingError, match="differ in more than scale"):
            webui.generate({**DELTA, "bridge": form})


def test_a_schedule_may_end_where_there_is_no_noise(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    """Forge Neo's automatic schedule of rectified SDXL also evaluates t = 0, where every estimate is the input."""
    flux(webui, monkeypatch)
    sampler = webui.module("sd_samplers_kdiffusion").KDiffusionSampler
    monkeypatch.setattr(sampler, "get_sigmas", lambda *_: torch.tensor([1.0, 0.6, 0.2, 0.0, 0.0]))
    sampling = importlib.import_module("k_diffusion.sampling")
    direction = sampling.to_d  # 0 / 0 at the last step, in Forge Neo too
    monkeypatch.setattr(sampling, "to_d", lambda *given: direction(*given).nan_to_num())
    made = webui.generate(DELTA, steps=4)
    assert len(asked) == 3 and "Delta lambda: 1" in made.infotexts[0]
    assert made.images.isfinite().all() and relative(made.images, webui.latents(steps=4)) > 1e-3
    assert webui.callbacks.swallowed == []


@pytest.mark.parametrize(
    ("main", "given", "expected"), [(1.0, {}, 3.0), (2.9, {}, 3.0), (4.0, {}, 4.0), (1.0, {"cfg": 7}, 7.0)]
)
def test_the_side_models_guidance_beside_a_few_step_target(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, asked: list[Any], main: float, given: Any, expected: float
) -> None:
    flux(webui, monkeypatch, last=0.9)
    made = webui.generate({**DELTA, **given}, cfg_scale=main)
    assert {scale for _, _, scale in asked} == {expected}
    assert ("Delta CFG: 7" in made.infotexts[0]) is bool(given)


def test_a_number_for_the_side_models_guidance_holds_where_the_target_leaves_it_out(
    webui: WebUI, asked: list[Any]
) -> None:
    webui.generate({**DELTA, "cfg": 6}, s_min_uncond=100.0)
    assert {scale for _, _, scale in asked} == {6}


@pytest.mark.parametrize(
    ("size", "shape"), [("automatic", (16, 16)), ("64", (8, 8)), (64, (8, 8)), ("picture", (16, 16))]
)
def test_the_size_of_the_side_model(webui: WebUI, asked: list[Any], size: Any, shape: Any) -> None:
    made = webui.generate({**DELTA, "size": size}, width=128, height=128)
    assert {seen[-2:] for seen, _, _ in asked} == {shape}
    assert ("Delta size" in made.infotexts[0]) is (size != "automatic")
    assert f"{shape[1]} x {shape[0]}" in webui.host.status()


# Models as Forge Neo has them: (channels, scale factor), flags, and what they are.
MODELS = {
    "SD 1.x": ((4, 0.18215), {"is_sd1": True}, "SD1"),
    "SD 2.x in Forge": ((4, 0.18215), {"is_sd2": True}, "SD2"),
    "SDXL": ((4, 0.13025), {"is_sdxl": True}, "SDXL"),
    "SDXL's refiner": ((4, 0.13025), {"is_sdxl": True}, "SDXL"),
    "SD 3.5 in Forge": ((16, 1.5305), {"is_sd3": True}, "SD3"),
    "Flux, Chroma, Z-Image": ((16, 0.3611), {}, "FLUX"),
    "Qwen-Image": ((16, 1.0), {"is_wan": True}, "WAN"),
    "Flux 2 Klein, Ernie": ((128, 1.0), {}, "FLUX2"),
    "Mugen, which pretends to be SDXL": ((32, 1.0), {"is_sdxl": True}, "MUGEN"),
}


@pytest.mark.parametrize(("numbers", "flags", "family"), MODELS.values(), ids=MODELS)
def test_families_are_told_by_their_latents(webui: WebUI, numbers: Any, flags: Any, family: str) -> None:
    from lib_delta.hosts.forge.families import family_by_latents

    latents = SimpleNamespace(latent_channels=numbers[0], scale_factor=numbers[1])
    assert (
        family_by_latents(SimpleNamespace(model_config=SimpleNamespace(latent_format=latents), **flags)).name == family
    )


def test_a_model_of_unknown_latents_is_refused(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = SimpleNamespace(latent_format=SimpleNamespace(latent_channels=3, scale_factor=1.0))
    monkeypatch.setattr(type(webui.shared.sd_model), "model_config", pixels, raising=False)
    monkeypatch.setattr(type(webui.shared.sd_model), "is_sdxl", True)
    with pytest.raises(SettingError, match="latents .* that Delta Sampling does not know"):
        webui.generate(DELTA)


def test_where_no_bridge_leads_one_sentence_says_where_they_do(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    qwen = SimpleNamespace(latent_format=SimpleNamespace(latent_channels=16, scale_factor=1.0))
    monkeypatch.setattr(type(webui.shared.sd_model), "model_config", qwen, raising=False)
    with pytest.raises(SettingError, match="no bridge leads .*: choose a main checkpoint with .*SDXL.*FLUX.1"):
        webui.generate(DELTA)


def test_rectified_sdxl_is_known_by_its_predictor(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webui.module("loaded_model").Predictor, "prediction_type", "const", raising=False)
    sdxl = SimpleNamespace(latent_format=SimpleNamespace(latent_channels=4, scale_factor=0.13025))
    monkeypatch.setattr(type(webui.shared.sd_model), "model_config", sdxl, raising=False)
    target = webui.host.main_model()
    assert (target.family.name, target.flow, target.sigma_max) == ("SDXL", True, math.inf)
