"""Features of AUTOMATIC1111: previews, padding, InstructPix2Pix, and faults that it would swallow."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.runtime.side_model import SideModel
from tests.support.stand_in_webui import WebUI, relative

DELTA = {"base": "base", "loras": "ink"}


HOSTS = ("a1111",)


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
    plain, wanted = (previews(webui, made_by, sampler_name=sampler) for made_by in (webui.latents, webui.native))
    got = previews(webui, lambda **changes: webui.latents(DELTA, **changes), sampler_name=sampler)
    assert len(got) == len(wanted) == len(plain) > 1
    assert all(relative(a, b) < 1e-4 for a, b in zip(got, wanted))
    assert all(relative(a, b) > 1e-3 for a, b in zip(plain, wanted))


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_what_is_made_of_the_prompt_alone_is_the_loras(webui: WebUI, sampler: str) -> None:
    """Previews show it by default, and so does the picture of an interrupted run."""

    def rows(made_by: Any) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        registered = webui.callbacks.registered["cfg_denoised"]
        registered.append(lambda params: seen.append(params.x.clone()))
        try:
            made_by(sampler_name=sampler)
        finally:
            registered.pop()
        return torch.stack(seen)

    plain, wanted = rows(webui.latents), rows(webui.native)
    got = rows(lambda **changes: webui.latents(DELTA, **changes))
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


@pytest.mark.parametrize("sampler", ["Euler", "DDIM"])
def test_an_editing_model_has_two_rows_without_the_prompt(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    """Both are the same here, and the picture's scale cancels out of the LoRA's change."""
    model = type(webui.shared.sd_model)
    monkeypatch.setattr(model, "cond_stage_key", "edit")
    changes = {"sampler_name": sampler, "init_latent": torch.zeros(2, 4, 8, 8), "batch_size": 2, "steps": 5}
    process = webui.processing.StableDiffusionProcessingImg2Img
    monkeypatch.setattr(process, "image_cfg_scale", 1.7, raising=False)
    plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


class Regions:
    """Regional Prompter's mode *Latent* in the two callbacks: each of AND's parts has a region.

    In between it has the rows of batches in another order, so that each pass through the model is of one part.
    """

    def __init__(self, images: int, parts: int) -> None:
        self.masks = torch.zeros(parts, 1, 8, 8)
        for i, mask in enumerate(self.masks):
            mask[..., i * 8 // parts : (i + 1) * 8 // parts] = 0.9
        self.images, self.parts = images, parts
        self.moved = torch.arange(images * parts).reshape(images, parts).T.flatten()

    def before_model(self, params: Any) -> None:
        count = len(self.moved)
        for rows in (params.x, params.sigma, params.text_cond):
            rows[:count] = rows[:count][self.moved]

    def after_model(self, params: Any) -> None:
        rows, count = params.x.clone(), len(self.moved)
        rows[self.moved] = params.x[:count]
        uncond = rows[count:].repeat_interleave(self.parts, 0)
        masks = self.masks.repeat(self.images, 1, 1, 1)
        params.x[:count] = rows[:count] * masks + uncond * (1 - masks)


@pytest.fixture
def with_regions(webui: WebUI) -> Iterator[Any]:
    """Yield the callbacks of such an extension, which registers them at its first use, after ours."""
    before, after = (webui.callbacks.registered[kind] for kind in ("cfg_denoiser", "cfg_denoised"))
    counts = len(before), len(after)

    def start(images: int, parts: int) -> None:
        regions = Regions(images, parts)
        before.append(regions.before_model)
        after.append(regions.after_model)

    yield start
    del before[counts[0] :], after[counts[1] :]


REGIONS: dict[str, dict[str, Any]] = {
    "one image": {"prompt": "a cat AND a dog :0.6 AND a red mat :0.8"},
    "DDIM": {"prompt": "a cat AND a red mat", "sampler_name": "DDIM"},
    "two images": {"prompt": ["a cat AND a dog", "a mat AND a"], "batch_size": 2, "sampler_name": "Heun"},
    "without guidance": {"prompt": "a cat AND a dog", "cfg_scale": 1.0},
    "CFG++": {"prompt": "a cat AND a dog", "sampler_name": "DDIM CFG++"},
}


@pytest.mark.parametrize("changes", REGIONS.values(), ids=REGIONS)
def test_regions_that_an_extension_gives_to_the_parts_of_and(
    webui: WebUI, with_regions: Any, changes: dict[str, Any]
) -> None:
    prompts = changes["prompt"]
    first = prompts if isinstance(prompts, str) else prompts[0]
    without = webui.latents(DELTA, **changes)
    with_regions(changes.get("batch_size", 1), first.count("AND") + 1)
    plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(without, wanted) > 1e-3, "the regions change nothing here"
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_parts_of_and_that_the_side_model_is_not_told_share_one_change(webui: WebUI) -> None:
    """The picture's guidance returns the change for the side model's prompts."""
    changes = {"steps": 1, "prompt": "a cat AND a dog :0.6"}
    got = webui.latents({**DELTA, "prompt": "a red mat"}, **changes) - webui.latents(**changes)
    alone = {**changes, "prompt": "a red mat"}
    assert relative(got, webui.native(**alone) - webui.latents(**alone)) < 1e-3


def test_weights_of_and_that_cancel_leave_cfg_plus_plus_a_delta(webui: WebUI) -> None:
    """No prompt's rows can be divided by the scale, so all rows get the same change."""
    changes = {"sampler_name": "DDIM CFG++", "prompt": "a cat :1 AND a dog :-1"}
    got = webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == [] and got.isfinite().all()
    assert relative(got, webui.latents(**changes)) > 1e-4


@pytest.mark.parametrize(("flag", "family"), [("is_sd2", "SD2"), ("is_sdxl", "SDXL"), ("is_sd3", "SD3"), ("", "SD1")])
def test_the_family_of_the_main_checkpoint(webui: WebUI, flag: str, family: str) -> None:
    from lib_delta.hosts.a1111.host import main_family

    assert main_family(SimpleNamespace(**{flag: True} if flag else {})).name == family


def test_an_sdxl_target_has_its_latents_scaled_where_that_is_asked_for(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a single Euler step, the source sees ``k * x`` at ``k * sigma``, and its delta is divided by k."""
    monkeypatch.setattr(type(webui.shared.sd_model), "is_sdxl", True)
    got = webui.latents({**DELTA, "bridge": "same_snr"}, steps=1) - webui.latents(steps=1)
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


@pytest.fixture
def moves(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Records the memory operations of a WebUI in a mode for little memory, on a device with an index."""
    seen: list[str] = []
    device = torch.device("cpu", 0)
    places = {device: "the WebUI's device", torch.device("cpu"): "the CPU"}
    monkeypatch.setattr(webui.module("devices"), "device", device)
    lowvram = webui.module("lowvram")
    monkeypatch.setattr(lowvram, "is_enabled", lambda _model: True)
    monkeypatch.setattr(lowvram, "send_everything_to_cpu", lambda: seen.append("the WebUI's models leave"))
    inside: list[str] = []

    def watch(method: str) -> None:
        original = getattr(SideModel, method)

        def call(model: SideModel, *place: torch.device) -> None:
            if not inside and (place or model._copy is not None):
                seen.append(f"the side model goes to {places[place[0]] if place else 'the CPU'}")
            inside.append(method)
            original(model, *place)
            inside.pop()

        monkeypatch.setattr(SideModel, method, call)

    for method in ("move_to", "copy_to", "offload"):
        watch(method)
    sampled = webui.processing.StableDiffusionProcessingTxt2Img.sample

    def sample(p: Any, *arguments: Any, **named: Any) -> torch.Tensor:
        seen.append("sampling")
        return sampled(p, *arguments, **named)

    def decoded(samples: torch.Tensor) -> torch.Tensor:
        seen.append("decoding")
        return samples

    monkeypatch.setattr(webui.processing.StableDiffusionProcessingTxt2Img, "sample", sample)
    monkeypatch.setattr(webui.processing, "decoded", decoded)
    webui.host.unload()
    return seen


PASS = ["the WebUI's models leave", "the side model goes to the WebUI's device", "the side model goes to the CPU"]


def test_with_little_memory_the_side_model_comes_and_goes_with_each_batch(webui: WebUI, moves: list[str]) -> None:
    webui.generate(DELTA, n_iter=2)
    assert moves == ["sampling", *PASS] * 2


def test_with_little_memory_the_side_model_is_away_while_hires_fix_decodes(webui: WebUI, moves: list[str]) -> None:
    hires = {"enable_hr": True, "hr_second_pass_steps": 2}
    webui.generate(DELTA, **hires)
    assert moves == ["sampling", *PASS, "decoding", *PASS, "decoding"]
    moves.clear()
    webui.generate({**DELTA, "hires": "hires pass"}, **hires)
    assert moves == ["sampling", "decoding", *PASS, "decoding"], "it comes to the pass that has the delta"


def test_with_little_memory_the_side_model_goes_when_sampling_fails(
    webui: WebUI, moves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: Any, x: torch.Tensor, extra_args: Any, **_: Any) -> None:
        model(x, torch.full((len(x),), 14.0), **extra_args)
        raise RuntimeError("the sampler broke")

    samplers = webui.module("sd_samplers")
    create = samplers.create_sampler

    def create_that_fails(name: str) -> Any:
        sampler = create(name)
        sampler.func = fail
        return sampler

    monkeypatch.setattr(samplers, "create_sampler", create_that_fails)
    with pytest.raises(RuntimeError, match="the sampler broke"):
        webui.generate(DELTA)
    assert moves == ["sampling", *PASS]


def test_a_sampler_is_left_as_it_was(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extension wraps its methods until it starts, and for one call."""
    samplers, made = webui.module("sd_samplers"), []
    create = samplers.create_sampler
    monkeypatch.setattr(samplers, "create_sampler", lambda name: made.append(create(name)) or made[-1])
    for changes in ({}, {"init_latent": torch.zeros(1, 4, 8, 8), "n_iter": 2}):
        webui.generate(DELTA, **changes)
    assert len(made) == 2 and not any({"sample", "sample_img2img"} & vars(sampler).keys() for sampler in made)


def test_a_side_model_on_the_cpu_lets_the_webuis_models_stay(
    webui: WebUI, moves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(webui.module("devices"), "device", torch.device("meta"))
    monkeypatch.setattr(webui.shared.opts, "delta_sampling_device", "CPU", raising=False)
    webui.generate(DELTA)
    assert moves == ["sampling", "the side model goes to the CPU"]


def test_unloading_returns_cached_memory_to_the_system(webui: WebUI) -> None:
    webui.generate(DELTA)
    collected = webui.module("devices").collected
    collected.clear()
    webui.host.unload()
    assert collected == [True]


def test_sd3_is_a_target_of_flow_matching(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not webui.host.main_model().flow
    monkeypatch.setattr(type(webui.shared.sd_model), "is_sd3", True)
    target = webui.host.main_model()
    assert (target.family.name, target.flow, target.sigma_max) == ("SD3", True, float("inf"))
