"""Everyday use of the host layer: settings without effect, tags and axes, and pictures without a delta."""

from __future__ import annotations

import importlib
import sys
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.errors import CheckpointError, DeltaError, SettingError
from lib_delta.request.request import Request
from tests.support.stand_in_webui import WebUI, relative

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:torchsde", "ignore:To copy construct from a tensor")
DELTA = {"base": "base", "loras": "ink"}
HIRES = {"enable_hr": True, "hr_second_pass_steps": 3, "hr_cfg": 5.0}


HOSTS = ("a1111", "forge")


def said(made: Any) -> str:
    return " ".join(made.comments)


# Nothing is checked that does not count.

UNCHECKED: dict[str, dict[str, Any]] = {
    "a range the wrong way round": {"start": 0.8, "end": 0.2},
    "a half-typed LoRA": {"loras": "moxin:"},
    "a half-typed LoRA in a list": {"loras": ["moxin:"]},
    "a lambda beyond its limit": {"lambda": 15},
    "an unknown key": {"lamda": 1},
    "an unknown curve": {"curve": "zigzag"},
}


@pytest.mark.parametrize("off", [{"enabled": False}, {"lambda": 0}], ids=["off", "lambda 0"])
@pytest.mark.parametrize("wrong", UNCHECKED.values(), ids=UNCHECKED)
def test_what_does_not_count_is_not_checked(webui: WebUI, wrong: dict[str, Any], off: dict[str, Any]) -> None:
    made = webui.generate({**DELTA, **wrong, **off})
    assert torch.equal(made.images, webui.latents()) and "Delta" not in made.infotexts[0]


def test_an_axis_mends_what_the_accordion_has_wrong(webui: WebUI) -> None:
    p = webui.p({**DELTA, "start": 0.8, "end": 0.2})
    p.delta_sampling_axes = {"enabled": True, "start": 0.0, "end": 1.0}
    assert relative(webui.processing.process_images(p).images, webui.native()) < 1e-5


# Axes before tags, tags before the accordion.


def cell(webui: WebUI, axes: dict[str, Any], delta: dict[str, Any] | None = None, **changes: Any) -> Any:
    p = webui.p(delta or DELTA, **changes)
    p.delta_sampling_axes = {"enabled": True, **axes}
    p.scripts.selectable_scripts = [SimpleNamespace(title=lambda: "X/Y/Z plot")]
    process = p.scripts.scripts[0].process
    p.scripts.scripts[0].process = lambda p, _chosen, *arguments: process(p, *arguments)
    p.script_args = [1, *p.script_args]
    return webui.processing.process_images(p)


def test_an_axis_wins_over_a_tag(webui: WebUI) -> None:
    prompt = "a cat on a mat<delta:ink:2:weight=0.7>"
    assert relative(cell(webui, {"strength": 1.0, "lora_weight": 1.0}, prompt=prompt).images, webui.native()) < 1e-5
    assert (
        relative(cell(webui, {"strength": 1.0, "lora_weight": 0.5}, prompt=prompt).images, webui.native("half")) < 1e-5
    )
    assert torch.equal(cell(webui, {"strength": 0.0}, prompt=prompt).images, webui.latents())
    assert torch.equal(cell(webui, {"loras": ""}, prompt=prompt).images, webui.latents())


def test_a_tag_wins_over_the_accordion_and_says_so(webui: WebUI) -> None:
    made = webui.generate({**DELTA, "loras": "ink:0.5"}, prompt="a cat on a mat<delta:ink:1.5:weight=0.8>")
    assert "lambda 1.5 (here 1) and weight 0.8 of 'ink' (here 0.5)" in said(made)
    assert webui.generate(DELTA, prompt="a cat on a mat<delta:ink:1>").comments == []
    assert webui.generate({**DELTA, "enabled": False}, prompt="a cat on a mat<delta:ink:1.5>").comments == []


def test_the_weight_axis_keeps_the_text_encoders_weight(webui: WebUI) -> None:
    made = cell(webui, {"lora_weight": 1.0}, {"base": "base", "loras": "ink:0.3:te=0"})
    assert relative(made.images, webui.native("unet-only")) < 1e-5


def test_a_cell_without_anything_to_add_is_the_plain_picture(webui: WebUI) -> None:
    for axes, delta in (({"loras": ""}, DELTA), ({"adapted": ""}, {"base": "base"})):
        made = cell(webui, axes, delta)
        assert torch.equal(made.images, webui.latents()) and "Delta" not in made.infotexts[0]


@pytest.mark.parametrize("axes", [{"start": 0.9, "end": 0.1}, {"loras": "inq"}, {"base": "bass"}])
def test_a_cell_that_cannot_be_made_says_why_on_its_picture(webui: WebUI, axes: dict[str, Any]) -> None:
    made = cell(webui, axes)
    (picture,) = made.images
    assert picture.shape == (3, 64, 64) and 0 < float((picture < 0).float().mean()) < 0.5
    assert "Delta not applied: " in made.infotexts[0] and "Delta lambda" not in made.infotexts[0]
    assert webui.host.status().splitlines()[-1].startswith("Last run: no delta: ")


def test_a_plots_own_text_has_the_recipe_of_a_first_cell_without_a_delta(webui: WebUI) -> None:
    shared: dict[str, Any] = {}
    made = cell(webui, {"strength": 0.0}, extra_generation_params=shared)
    assert "Delta" not in made.infotexts[0]
    p = SimpleNamespace(extra_generation_params={**shared, "Script": "X/Y/Z plot"})
    text = webui.processing.create_infotext(p)
    assert "Delta lambda: 0, Delta base: base" in text and "Delta LoRAs: ink" in text


def test_a_pass_within_a_cell_has_its_values_and_the_next_job_has_not(webui: WebUI) -> None:
    webui.shared.state.time_start = 1.0
    cell(webui, {"strength": 0.0})
    assert torch.equal(webui.latents(DELTA), webui.latents())
    webui.shared.state.time_start = 2.0
    assert relative(webui.latents(DELTA), webui.native()) < 1e-5
    del webui.shared.state.time_start


# Tags elsewhere than in the first prompt.


def test_tags_of_the_hires_prompt_count_in_the_hires_pass(webui: WebUI) -> None:
    off = {"enabled": False, "base": "base"}
    same = {**HIRES, "hr_prompt": "a cat on a mat"}
    second = webui.generate(off, **{**HIRES, "hr_prompt": "a cat on a mat<delta:ink:1>"})
    assert relative(second.images, webui.latents({**DELTA, "hires": "hires pass"}, **same)) < 1e-5
    assert "Delta hires: hires pass" in second.infotexts[0]
    first = webui.generate(off, **{**same, "prompt": "a cat on a mat<delta:ink:1>"})
    assert relative(first.images, webui.latents({**DELTA, "hires": "first pass"}, **same)) < 1e-5
    assert "Delta hires: first pass" in first.infotexts[0]


def test_each_pass_can_have_a_lambda_and_a_weight_of_its_own(webui: WebUI) -> None:
    prompts = {"prompt": "a cat on a mat<delta:ink:2>", "hr_prompt": "a cat on a mat<delta:ink:1:weight=0.5>"}
    both = webui.generate({"enabled": False, "base": "base"}, **HIRES, **prompts)
    pasted = webui.latents({"base": "base", "lambda": 1.0, "loras": ""}, **HIRES, **prompts)
    assert torch.equal(both.images, pasted) and "Delta lambda: 1," in both.infotexts[0]
    same = webui.latents(DELTA, **HIRES)
    assert relative(both.images, same) > 1e-3


def test_tags_in_a_negative_prompt_are_no_words_and_have_no_effect(webui: WebUI) -> None:
    made = webui.generate({**DELTA, "enabled": False}, negative_prompt="blue<delta:ink:1>")
    assert torch.equal(made.images, webui.latents()) and "no effect in a negative prompt" in said(made)


def test_the_first_tags_count_for_all_of_a_batch_and_the_others_are_not_claimed(webui: WebUI) -> None:
    prompts = ["a cat<delta:ink:1>", "a cat<delta:pen:3>"]
    made = webui.generate({"enabled": False, "base": "base"}, prompt=prompts, batch_size=2)
    assert relative(made.images, webui.latents(DELTA, prompt=["a cat", "a cat"], batch_size=2)) < 1e-5
    assert "<delta:ink:1>" in made.infotexts[0] and "<delta" not in made.infotexts[1]
    assert "Delta LoRAs: ink" in made.infotexts[1] and "count for all pictures of a batch" in said(made)


def test_in_a_later_batch_too_the_tags_of_others_are_taken_from_its_own_texts(webui: WebUI) -> None:
    prompts = ["a cat<delta:ink:1>", "a cat<delta:ink:1>", "a dog<delta:ink:1>", "a dog<delta:pen:3>"]
    made = webui.generate({"enabled": False, "base": "base"}, prompt=prompts, batch_size=2, n_iter=2)
    assert ["<delta:ink:1>" in text for text in made.infotexts] == [True, True, True, False]
    assert "<delta:pen" not in made.infotexts[3] and "count for all pictures of a batch" in said(made)


# Pictures that got nothing.

NOTHING: dict[str, dict[str, Any]] = {
    "no blocks": {"loras": "ink:1:te=0:lbw=" + ",".join(["0"] * 17)},
    "the base itself": {"loras": "", "adapted": "base"},
    "a copy of the base": {"loras": "", "adapted": "copy"},
    "the same prompt": {"loras": "", "adapted_prompt": "a cat on a mat"},
}


@pytest.mark.parametrize("delta", NOTHING.values(), ids=NOTHING)
def test_a_delta_of_zero_is_not_claimed(webui: WebUI, delta: dict[str, Any]) -> None:
    made = webui.generate({**DELTA, **delta})
    assert torch.equal(made.images, webui.latents()) and "Delta" not in made.infotexts[0]
    assert "the base and the adapted model did not differ" in said(made)
    assert "did not differ" in webui.host.status().splitlines()[-1]


ZERO: dict[str, tuple[dict[str, Any], str]] = {
    "a LoRA of weight 0": ({"loras": "ink:0"}, "no delta in 3 steps, 0 passes"),
    "two of them": ({"loras": "ink:0, ink:0:te=0"}, "no delta in 3 steps, 0 passes"),
}


@pytest.mark.parametrize(("delta", "why"), ZERO.values(), ids=ZERO)
def test_weights_of_0_are_named(webui: WebUI, delta: dict[str, Any], why: str) -> None:
    made = webui.generate({**DELTA, **delta})
    assert torch.equal(made.images, webui.latents()) and "Delta" not in made.infotexts[0]
    assert "every LoRA has a weight of 0" in said(made)
    last = webui.host.status().splitlines()[-1]
    assert last.startswith(f"Last run: {why}") and last.endswith("every LoRA has a weight of 0")


def test_a_lambda_of_0_is_named_where_all_else_is_chosen(webui: WebUI) -> None:
    made = webui.generate({**DELTA, "lambda": 0})
    assert "Delta" not in made.infotexts[0]
    assert webui.host.status().splitlines()[-1] == "Last run: no delta was requested: lambda is 0"


def test_an_accordion_that_is_on_with_nothing_chosen_says_what_is_needed(webui: WebUI) -> None:
    with pytest.raises(SettingError, match="is switched on, and nothing is chosen: choose a base checkpoint.* and the"):
        webui.generate({})


def test_an_interruption_while_the_side_model_is_loaded_is_said(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.host.unload()
    sidemodel: Any = importlib.import_module("lib_delta.runtime.side_model")
    load = sidemodel.SideModel.__init__

    def interrupted(*given: Any) -> None:
        load(*given)
        webui.shared.state.interrupted = True

    monkeypatch.setattr(sidemodel.SideModel, "__init__", interrupted)
    made = webui.generate(DELTA)
    webui.shared.state.interrupted = False
    assert "Delta" not in made.infotexts[0] and made.comments == []
    last = webui.host.status().splitlines()[-1]
    assert last == "Last run: it was interrupted before any step had the delta"


def test_errors_are_shown_as_sentences(webui: WebUI) -> None:
    """WebUIs show an error as its class's name, a colon and its message."""
    for delta in ({**DELTA, "lamda": 1}, {**DELTA, "base": "bass"}, {"base": "base"}):
        with pytest.raises(DeltaError) as caught:
            webui.generate(delta)
        assert type(caught.value).__name__ == "Error"
        (line,) = traceback.format_exception_only(caught.value)
        assert "lib_delta.errors.SettingError: " in line, "who reads a traceback sees which it is"


NO_STEP: dict[str, tuple[dict[str, Any], str]] = {
    "between two steps": ({"start": 0.9, "end": 0.95}, "no step lies between start 0.9 and end 0.95"),
    "at one point": ({"start": 0.4, "end": 0.4}, "they are at 0, 0.33, 0.67, 1)"),
    "no hires pass": ({"hires": "hires pass"}, "the delta is enabled only for the hires pass, and there was none"),
    "a curve of 0": ({"curve": "linear", "curve_start": 0.0, "curve_end": 0.0}, "the curve makes lambda 0"),
    "no LoRA": ({"loras": "ink:1:start=0.4:end=0.4"}, "no LoRA and no unit is active"),
}


@pytest.mark.parametrize(("delta", "why"), NO_STEP.values(), ids=NO_STEP)
def test_where_no_step_qualifies_it_is_said(webui: WebUI, delta: dict[str, Any], why: str) -> None:
    made = webui.generate({**DELTA, **delta}, steps=4)
    assert torch.equal(made.images, webui.latents(steps=4)) and "Delta" not in made.infotexts[0]
    assert why in said(made) and why in webui.host.status().splitlines()[-1]


def test_the_status_is_that_of_the_last_run(webui: WebUI) -> None:
    def last() -> str:
        return str(webui.host.status().splitlines()[-1])

    webui.generate(DELTA)
    assert last().startswith("Last run: delta in ")
    webui.generate({**DELTA, "enabled": False})
    assert last() == "Last run: no delta was requested"
    with pytest.raises(SettingError):
        webui.generate({**DELTA, "start": 0.9, "end": 0.1})
    assert last().startswith("Last run: no delta: start (0.9) must not come after end")
    webui.generate({**DELTA, "start": 1.0})
    assert last().startswith("Last run: delta in 1 step, 1 pass of the side model")


def test_going_on_without_is_told_in_the_infotext(webui: WebUI) -> None:
    webui.shared.opts.delta_sampling_on_error = "go on without"
    webui.files.checkpoint("broken").write_bytes(b"no model")
    webui.sd_models.list_models()
    try:
        made = webui.generate({**DELTA, "base": "broken"})
    finally:
        webui.files.checkpoint("broken").unlink()
        webui.sd_models.list_models()
    assert "Delta not applied: broken.safetensors" in made.infotexts[0] and "Delta lambda" not in made.infotexts[0]
    assert "Delta" not in webui.generate({**DELTA, "enabled": False}).infotexts[0]


# Damaged settings.

DAMAGED = {
    "cache": ("many", None, -1, float("nan")),
    "on_error": (None, "panic"),
    "device": ("cuda:77", "toaster", None, 3),
    "precision": ("int3", None),
    "form": (None, 7),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in DAMAGED.items() for value in values])
def test_a_damaged_setting_is_its_default_with_one_warning(
    webui: WebUI, capsys: pytest.CaptureFixture[str], name: str, value: Any
) -> None:
    importlib.import_module("lib_delta.hosts.settings")._warned.clear()
    setattr(webui.shared.opts, f"delta_sampling_{name}", value)
    for _ in range(2):
        assert relative(webui.latents(DELTA), webui.native()) < 1e-5
    if name == "on_error":
        with pytest.raises(CheckpointError):
            broken(webui)
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("Delta Sampling: ")]
    assert len(warnings) == 1 and repr(name) in warnings[0]


def broken(webui: WebUI) -> None:
    webui.files.checkpoint("broken").write_bytes(b"no model")
    webui.sd_models.list_models()
    try:
        webui.generate({**DELTA, "base": "broken"})
    finally:
        webui.files.checkpoint("broken").unlink()
        webui.sd_models.list_models()


def test_fp16_on_a_cpu_is_fp32(webui: WebUI, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module("lib_delta.hosts.settings")._warned.clear()
    webui.shared.opts.delta_sampling_precision = "fp16"
    webui.shared.opts.delta_sampling_device = "CPU"
    assert relative(webui.latents(DELTA), webui.native()) < 1e-5
    assert capsys.readouterr().err.count("does not compute in fp16") == 1


# Names.


def test_checkpoints_of_one_name_in_two_folders_are_told_apart(webui: WebUI) -> None:
    infos = webui.sd_models.checkpoints_list
    twin = SimpleNamespace(**vars(infos[next(title for title in infos if title.startswith("half."))]))
    twin.name, twin.name_for_extra, twin.title = "inks/base.safetensors", "base", "inks/base.safetensors [1]"
    infos[twin.title] = twin
    try:
        assert [n for n in webui.host.catalog.checkpoints() if "base" in n] == [
            "base.safetensors",
            "inks/base.safetensors",
        ]
        made = webui.generate({"base": "base.safetensors", "adapted": "inks/base.safetensors"})
        assert relative(made.images, webui.native("half")) < 1e-5
        assert "Delta adapted: inks/base.safetensors" in made.infotexts[0]
        assert "was taken" in said(webui.generate({"base": "base", "loras": "ink"}))
    finally:
        del infos[twin.title]


def test_comments_in_the_side_models_prompts_are_not_drawn(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(strip_comments=lambda text: text.partition("#")[0])
    monkeypatch.setitem(sys.modules, "modules.processing_scripts", SimpleNamespace(comments=module))
    monkeypatch.setitem(sys.modules, "modules.processing_scripts.comments", module)
    commented = {**DELTA, "prompt": "a red boat # a dog", "negative_prompt": "green # blue"}
    with_comments = webui.latents(commented)
    webui.shared.opts.enable_prompt_comments = True
    assert torch.equal(
        webui.latents(commented), webui.latents({**DELTA, "prompt": "a red boat ", "negative_prompt": "green "})
    )
    assert not torch.equal(webui.latents(commented), with_comments)


def test_errors_do_not_echo_without_bounds() -> None:
    for wrong in ({"curve": "x" * 5000}, {"loras": "a:" + "9x" * 5000}, {"y" * 5000: 1}):
        with pytest.raises(SettingError) as error:
            Request.from_arguments([wrong])
        assert len(str(error.value)) < 500


def test_a_picture_that_can_be_tiled_has_a_delta_that_can(webui: WebUI) -> None:
    """As the main model does: Forge accepts the setting and ignores it."""
    plain, tiled, done = webui.latents(DELTA), webui.latents(DELTA, tiling=True), webui.name != "forge"
    assert webui.side_model.unet.get_submodule("out.2").circular is done
    assert (relative(tiled, plain) > 1e-3) is done
    assert torch.equal(webui.latents(DELTA), plain)
    assert not webui.side_model.unet.get_submodule("out.2").circular


def test_tiles_are_those_of_the_lora(webui: WebUI) -> None:
    native = webui.sd_models.load_model(webui.sd_models.get_closet_checkpoint_match(webui.files.tuned))
    if webui.name != "forge":
        native.networks.apply_circular(True)
    main, webui.shared.sd_model = webui.shared.sd_model, native
    native.cond_stage_model_empty_prompt = getattr(main, "cond_stage_model_empty_prompt", None)
    try:
        wanted = webui.latents(tiling=True)
    finally:
        webui.shared.sd_model = main
    assert relative(webui.latents(DELTA, tiling=True), wanted) < 1e-5


def test_what_tiles_is_followed_where_it_changes_in_mid_run(webui: WebUI) -> None:
    """As with a refiner that is not tiled."""
    webui.generate(DELTA, tiling=True)
    seen: list[bool] = []

    def change(params: Any) -> None:
        webui.shared.sd_model.networks.apply_circular(params.denoiser.step == 1)
        if params.denoiser.step:
            seen.append(webui.side_model.unet.get_submodule("out.2").circular)

    registered = webui.callbacks.registered["cfg_denoiser"]
    registered.append(change)
    try:
        webui.generate(DELTA, steps=3)
    finally:
        registered.pop()
        webui.shared.sd_model.networks.apply_circular(False)
    assert seen == [False, True]
    assert not webui.side_model.unet.get_submodule("out.2").circular


def drawn_by_torch(_block: Any, pixels: int, cells: tuple[int, int], _device: torch.device) -> torch.Tensor:
    return torch.randint(pixels, (*cells, 1))[..., 0]


@pytest.mark.parametrize("changes", [{}, {"sampler_name": "DDIM"}, HIRES], ids=["Euler", "DDIM", "hires"])
def test_token_merging_is_followed(webui: WebUI, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]) -> None:
    merging: Any = importlib.import_module("lib_delta.models.token_merging")
    unet: Any = importlib.import_module("lib_delta.models.unet")
    plain_models = webui.latents(DELTA, **changes)
    networks, forge = webui.module("network").Networks, webui.name == "forge"
    how = merging.TokenMerging(0.5, queries=forge, choice=drawn_by_torch if forge else merging.first_of_cell)
    evaluate = networks.__call__

    def merged(self: Any, x: torch.Tensor, t: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        unet.merge_tokens(self.unet, how)
        made: torch.Tensor = evaluate(self, x, t, context)
        unet.merge_tokens(self.unet, None)
        return made

    monkeypatch.setattr(networks, "__call__", merged)
    monkeypatch.setattr(webui.shared.opts, "token_merging_ratio", 0.5)
    monkeypatch.setattr(type(webui.shared.sd_model), "applied_token_merged_ratio", 0.5, raising=False)
    plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(got, plain_models) > 1e-3, "nothing was merged"
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_token_merging_ends_with_the_option(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = webui.latents(DELTA)
    with monkeypatch.context() as while_on:
        while_on.setattr(webui.shared.opts, "token_merging_ratio", 0.5)
        while_on.setattr(type(webui.shared.sd_model), "applied_token_merged_ratio", 0.5, raising=False)
        assert not torch.equal(webui.latents(DELTA), plain)
    assert torch.equal(webui.latents(DELTA), plain)


def test_a_base_of_another_kind_is_refused_before_it_is_built(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    sidemodel: Any = importlib.import_module("lib_delta.runtime.side_model")
    webui.host.unload()
    sentence = "it is a model of Flux, and the base of Delta Sampling has to be an SD 1.x, SD 2.x or SDXL checkpoint"
    monkeypatch.setattr(sidemodel, "why_not_base", lambda _: sentence)
    monkeypatch.setattr(sidemodel, "load_unet", lambda *_: pytest.fail("it was built"))
    with pytest.raises(CheckpointError, match="is a model of Flux, and the base"):
        webui.generate(DELTA)


def test_what_can_be_a_base_is_told_by_headers_read_once(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint: Any = importlib.import_module("lib_delta.files.checkpoint")
    lora = webui.files.checkpoint("a-lora")
    lora.write_bytes(webui.files.lora_file().read_bytes())
    webui.sd_models.list_models()
    try:
        assert webui.host.catalog.bases() == [name for name in webui.host.catalog.checkpoints() if name != "a-lora"]
        monkeypatch.setattr(checkpoint, "detect_family", lambda *_: pytest.fail("it was read again"))
        assert "base" in webui.host.catalog.bases()
    finally:
        lora.unlink()
        webui.sd_models.list_models()


def test_the_status_has_the_size_of_the_delta_at_each_step(webui: WebUI) -> None:
    webui.generate(DELTA, steps=3)
    sizes = webui.host.status().splitlines()[-1].partition("; it was ")[2].partition(" of the picture")[0]
    assert len(sizes.split(", ")) == 3 and all(float(size.rstrip("%")) > 0 for size in sizes.split(", "))


REGIONS = "/webui/extensions/sd-webui-regional-prompter/scripts/attention.py"
MIXTURE = "/webui/extensions/multidiffusion-upscaler/tile_methods/mixtureofdiffusers.py"


def around(method: Any, path: str) -> Any:
    """Return a function, defined in an extension, that calls a method."""
    made: Any = eval(compile("lambda method: lambda *given, **named: method(*given, **named)", path, "eval"))
    return made(method)


@pytest.mark.parametrize("changes", [{}, HIRES], ids=["one pass", "hires"])
def test_the_status_names_who_changes_the_main_models_inside(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    model = webui.shared.sd_model
    holder = model.forge_objects.unet.model if webui.name == "forge" else model
    unet = (holder if webui.name == "forge" else model.model).diffusion_model
    attention = next(part for name, part in unet.named_modules() if name.endswith("attn2"))
    host_module: Any = sys.modules[type(webui.host).__module__]
    walked: list[Any] = []
    walk = host_module.patched_forwards
    monkeypatch.setattr(host_module, "patched_forwards", lambda model: walked.append(model) or walk(model))
    webui.generate(DELTA, **changes)
    assert "only the main model" not in webui.host.status()
    assert len(walked) == (2 if changes else 1), "once for each pass, and not for each step"
    monkeypatch.setattr(attention, "forward", around(attention.forward, REGIONS))
    monkeypatch.setattr(holder, "apply_model", around(holder.apply_model, MIXTURE))
    webui.generate(DELTA, **changes)
    said = "multidiffusion-upscaler, sd-webui-regional-prompter change only the main model"
    assert said in webui.host.status() and webui.callbacks.swallowed == []


def test_a_loras_card_has_its_weight_and_its_words(webui: WebUI) -> None:
    def noted(text: str) -> tuple[float, str, str]:
        notes.write_text(text)
        card = webui.host.catalog.card("ink")
        assert card.name == "ink" and not card.fault
        return card.weight, card.words, card.negative

    notes = webui.files.lora_file().with_suffix(".json")
    assert webui.host.catalog.card("ink").weight == 1
    assert webui.host.catalog.card("inq").fault == "there is no LoRA 'inq' for Delta Sampling: is 'ink' meant?"
    try:
        whole = '{"preferred weight": 0.7, "activation text": " moxin style ", "negative text": "photo"}'
        assert noted(whole) == (0.7, "moxin style", "photo")
        for text in ('{"preferred weight": 0, "activation text": null}', "[", "[]", '{"preferred weight": NaN}'):
            assert noted(text) == (1, "", "")
        module = importlib.import_module("networks")
        module.available_network_aliases["moxin"] = module.available_networks["ink"]
        assert webui.host.catalog.card("moxin").name == "ink", "the name by which it is listed"
    finally:
        notes.unlink()
        importlib.import_module("networks").available_network_aliases.clear()


def test_the_main_prompt_can_stand_in_the_side_models(webui: WebUI) -> None:
    written = {"prompt": "{prompt}, ink", "negative_prompt": "grey, {prompt}", "adapted_prompt": "{prompt}, brush"}
    whole = {"prompt": "a dog, ink", "negative_prompt": "grey, blue", "adapted_prompt": "a dog, ink, brush"}
    prompt = "a dog<delta:ink:1>"
    asked = {"base": "base", "enabled": False}
    made = webui.generate({**asked, **written}, prompt=prompt)
    assert torch.equal(made.images, webui.latents({**asked, **whole}, prompt=prompt))
    assert not torch.equal(made.images, webui.latents(asked, prompt=prompt))
    assert "Delta prompt: {prompt}, ink" in made.infotexts[0]
    two = webui.latents({**DELTA, "prompt": "{prompt}, ink"}, prompt=["a dog", "a cat"], batch_size=2)
    assert not torch.equal(
        two, webui.latents({**DELTA, "prompt": "a dog, ink"}, prompt=["a dog", "a cat"], batch_size=2)
    )


# The heat map.


def shown(webui: WebUI, pictures: int = 1, grids: int = 0, **changes: Any) -> tuple[Any, list[Any]]:
    """Generate; return the result, and the pictures that the extension added.

    The WebUI puts ``grids`` grids before the pictures.
    """
    beside: list[Any] = []
    p = webui.p(DELTA, **changes)
    script = p.scripts.scripts[0]
    postprocess = script.postprocess

    def with_pictures(p: Any, made: Any, *arguments: Any) -> None:
        plain = Image.new("RGB", (64, 64))
        texts = ["the grid's"] * grids + [f"text {i}" for i in range(pictures)]
        seen = SimpleNamespace(images=[plain] * len(texts), infotexts=texts[:], index_of_first_image=grids)
        postprocess(p, seen, *arguments)
        beside.extend(zip(seen.images[len(texts) :], seen.infotexts[len(texts) :]))

    script.postprocess = with_pictures
    return webui.processing.process_images(p), beside


def test_the_delta_is_shown_beside_each_picture_where_the_user_wants_it(webui: WebUI) -> None:
    without, beside = shown(webui, 2, batch_size=2)
    assert beside == []
    webui.shared.opts.delta_sampling_show = True
    made, beside = shown(webui, 2, batch_size=2)
    assert torch.equal(made.images, without.images)
    assert [(picture.size, text) for picture, text in beside] == [((64, 64), "text 0"), ((64, 64), "text 1")]
    assert [text for _, text in shown(webui, 2, 1, batch_size=2)[1]] == ["text 0", "text 1"]
    assert webui.callbacks.swallowed == []
    assert len(shown(webui, 2, n_iter=2)[1]) == 2


def test_no_map_is_shown_of_a_run_without_a_delta_or_among_a_scripts_pictures(webui: WebUI) -> None:
    webui.shared.opts.delta_sampling_show = True
    assert shown(webui, prompt="a cat")[1]
    webui.shared.opts.delta_sampling_on_error = "go on without"
    p = webui.p({**DELTA, "loras": "ink:0"})
    made = SimpleNamespace(images=[], infotexts=[])
    p.scripts.scripts[0].postprocess = lambda p, _made, *_: webui.host.postprocess(p, made)
    webui.processing.process_images(p)
    assert made.images == []
    cell(webui, {"strength": 1.0})
    assert webui.callbacks.swallowed == [], "a plot's pictures are not added to"
