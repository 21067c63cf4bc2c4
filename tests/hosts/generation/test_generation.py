"""Generations in stand-ins for the WebUIs: passes, steps, requests, infotexts and faults."""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.errors import CheckpointError, DeltaError, SettingError
from tests.support.generations import DELTA, HIRES, assert_exact, init_latents
from tests.support.small_files import Files
from tests.support.stand_in_webui import FORGES, WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps that evaluate the source."""
    asked: list[int] = []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        asked.append(step.step)
        return original(self, step)

    monkeypatch.setattr(Source, "deltas", deltas)
    return asked


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
    # Trained models measure their accuracy: random ones' changes vary from step to step.
    pictures = [plain, exact, balanced, fast]
    assert not any(torch.equal(a, b) for i, a in enumerate(pictures) for b in pictures[:i])
    passes.clear()
    webui.latents({**DELTA, "quality": "fast"}, steps=9)
    assert len(passes) == 3, "what is held is of one generation"


def test_without_a_hires_pass_there_is_none_to_add_to(webui: WebUI, passes: list[int]) -> None:
    made = webui.generate({**DELTA, "hires": "hires pass"})
    assert torch.equal(made.images, webui.latents()) and passes == []
    assert "Delta" not in made.infotexts[0]


# Progress.


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
    webui.generate(DELTA)  # imports the module to watch
    changes = {"init_latent": init_latents(), "denoising_strength": 0.6} if image else {}
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
    made = webui.generate(DELTA, init_latent=init_latents(), steps=4, denoising_strength=0.3, sampler_name=sampler)
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
    """The delta is the LoRA's change with these prompts, whatever the main ones are."""
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
    """The bridge does not fit its latents, and the picture must not claim a delta."""
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
