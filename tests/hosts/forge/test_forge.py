"""Features of Forge: patchers, its memory manager, and models that are replaced in mid-run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.core.source import Source
from lib_delta.core.steps import SourceStep
from lib_delta.diffusion.families import Family
from lib_delta.errors import DeltaError, SettingError
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.stand_in_webui import FORGES, WebUI, relative

DELTA = {"base": "base", "loras": "ink"}
BEFORE = "sampler_pre_cfg_function"
HIRES = {"enable_hr": True, "hr_second_pass_steps": 2, "hr_cfg": 4.0}


HOSTS = FORGES


@pytest.fixture
def webui(started: WebUI) -> Iterator[WebUI]:
    yield started
    started.reset()
    started.backend("memory_management").current_loaded_models.clear()


@pytest.fixture
def device(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device for the memory manager; the main model's sizes count there, but it computes on the CPU."""
    memory = webui.backend("memory_management")
    webui.host.unload()
    memory.unload_all_models()
    main = webui.shared.sd_model.forge_objects_original.unet
    monkeypatch.setattr(main, "load_device", DEVICE)
    monkeypatch.setattr(memory, "device", DEVICE)
    with stand_in_device():
        yield DEVICE
        webui.host.unload()
        memory.unload_all_models()


def test_the_function_is_put_in_place_once_however_often_a_pass_starts(webui: WebUI) -> None:
    for _ in range(3):
        webui.generate(DELTA, n_iter=2, **HIRES)
    model = webui.shared.sd_model
    for kind in (BEFORE, "sampler_post_cfg_function"):
        assert len(model.forge_objects.unet.model_options[kind]) == 1
        assert kind not in model.forge_objects_original.unet.model_options


def test_a_function_that_stays_behind_changes_nothing_without_a_run(webui: WebUI) -> None:
    plain = webui.latents()
    webui.generate(DELTA)
    model = webui.shared.sd_model
    model.forge_objects_original, kept = model.forge_objects.shallow_copy(), model.forge_objects_original
    try:
        assert torch.equal(webui.latents(), plain)
    finally:
        model.forge_objects_original = kept


def test_other_extensions_functions_come_before_and_stay(webui: WebUI) -> None:
    model, called = webui.shared.sd_model, []

    def theirs(args: dict[str, Any]) -> torch.Tensor:
        called.append(True)
        return args["denoised"]

    model.forge_objects_original.unet = model.forge_objects_original.unet.clone()
    model.forge_objects_original.unet.set_model_sampler_post_cfg_function(theirs)
    try:
        assert relative(webui.latents(DELTA), webui.native()) < 1e-5
    finally:
        webui.shared.sd_model = None
        webui.use("base")
    assert len(called) == 3
    assert webui.host.status().endswith("; test_forge changes only the main model")
    webui.generate(DELTA)
    assert "alone" not in webui.host.status()


def test_a_sampler_that_leaves_out_the_functions_is_a_fault(webui: WebUI) -> None:
    def leave_out(params: Any) -> None:
        params.denoiser.inner_model.inner_model.forge_objects.unet.model_options.pop("sampler_post_cfg_function", None)

    registered = webui.callbacks.registered["cfg_denoiser"]
    registered.append(leave_out)
    try:
        with pytest.raises(DeltaError, match="Euler or another extension leaves out"):
            webui.generate(DELTA)
    finally:
        registered.pop()


@contextmanager
def with_function_before(webui: WebUI, function: Any, late: bool) -> Iterator[None]:
    """Add another extension's function before guidance; ``late`` adds it after ours."""
    before, after = (webui.callbacks.registered[kind] for kind in ("cfg_denoiser", "cfg_after_cfg"))

    def options() -> dict[str, Any]:
        known: dict[str, Any] = webui.shared.sd_model.forge_objects.unet.model_options
        return known

    def add(_params: Any) -> None:
        options()[BEFORE] = [*options().get(BEFORE, []), function]

    def take_away(_params: Any) -> None:
        options()[BEFORE].remove(function)

    before.insert(len(before) if late else 0, add)
    after.append(take_away)
    try:
        yield
    finally:
        before.remove(add), after.remove(take_away)


@pytest.mark.parametrize("late", [False, True], ids=["put in before ours", "put in after ours"])
@pytest.mark.parametrize("in_steps", [(0,), (1, 2)])
def test_guidance_that_another_extension_leaves_out(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, in_steps: tuple[int, ...], late: bool
) -> None:
    steps, left_out = itertools.count(), []
    original = Source.deltas

    def deltas(self: Source, step: SourceStep) -> Any:
        left_out.append(step.uncond_skipped)
        return original(self, step)

    def leave_out(model: Any, cond: Any, uncond: Any, *others: Any) -> tuple[Any, ...]:
        return model, cond, None if next(steps) % 3 in in_steps else uncond, *others

    monkeypatch.setattr(Source, "deltas", deltas)
    with with_function_before(webui, leave_out, late):
        webui.generate(DELTA)
    assert left_out == [step in in_steps for step in range(3)]


def test_guidance_that_is_left_out_is_looked_for_where_our_function_is_taken_away(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_away(params: Any) -> None:
        params.denoiser.inner_model.inner_model.forge_objects.unet.model_options[BEFORE] = []

    webui.shared.opts.skip_early_cond = 0.4
    wanted = webui.native()
    registered = webui.callbacks.registered["cfg_denoiser"]
    monkeypatch.setitem(webui.callbacks.registered, "cfg_denoiser", [*registered, take_away])
    assert relative(webui.latents(DELTA), wanted) < 1e-5


def test_a_sampler_that_puts_functions_of_its_own_in_place_of_all(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As reForge's CFG++ samplers do."""
    samplers = webui.module("sd_samplers")
    create, asked = samplers.create_sampler, []

    def own(args: dict[str, Any]) -> torch.Tensor:
        asked.append(args["uncond_denoised"])
        return args["denoised"]

    def create_with_own(name: str) -> Any:
        sampler = create(name)
        function = sampler.func

        @wraps(function)  # the WebUI reads the arguments from the signature
        def run(*positional: Any, extra_args: dict[str, Any], **arguments: Any) -> torch.Tensor:
            extra_args["model_options"] = {"sampler_post_cfg_function": [own]}
            return function(*positional, extra_args=extra_args, **arguments)

        sampler.func = run
        return sampler

    wanted = webui.native()
    monkeypatch.setattr(samplers, "create_sampler", create_with_own)
    assert relative(webui.latents(DELTA), wanted) < 1e-5
    assert len(asked) == 3


class Regions:
    """Regional Prompter's mode *Latent* around the model: each of AND's parts has a region."""

    def __init__(self, parts: int) -> None:
        self.masks = torch.zeros(parts, 1, 8, 8)
        for i, mask in enumerate(self.masks):
            mask[..., i * 8 // parts : (i + 1) * 8 // parts] = 0.9

    def __call__(self, apply: Any, asked: dict[str, Any]) -> torch.Tensor:
        kinds, told = asked["cond_or_uncond"], asked["c"]["c_crossattn"].chunk(len(asked["cond_or_uncond"]))
        states, levels = asked["input"].chunk(len(kinds)), asked["timestep"].chunk(len(kinds))
        rows = [apply(x, t, c_crossattn=text) for x, t, text in zip(states, levels, told)]
        uncond = rows[kinds.index(1)]
        parts = iter(reversed(self.masks))  # in the WebUI's order
        return torch.cat([row if kind else uncond + next(parts) * (row - uncond) for row, kind in zip(rows, kinds)])


class Tiles:
    """A wrapper of another kind, such as tiled evaluation: the model evaluates halves of the image."""

    def __call__(self, apply: Any, asked: dict[str, Any]) -> torch.Tensor:
        x, told = asked["input"], asked["c"]
        return torch.cat([apply(half, asked["timestep"], **told) for half in x.chunk(2, 3)], 3)


@contextmanager
def wrapped_in(webui: WebUI, wrapper: Any) -> Iterator[None]:
    """Wrap whichever main model is loaded, during each evaluation."""
    before, after = (webui.callbacks.registered[kind] for kind in ("cfg_denoiser", "cfg_after_cfg"))

    def options() -> dict[str, Any]:
        known: dict[str, Any] = webui.shared.sd_model.forge_objects.unet.model_options
        return known

    before.append(lambda _params: options().update(model_function_wrapper=wrapper))
    after.append(lambda _params: options().pop("model_function_wrapper"))
    try:
        yield
    finally:
        before.pop(), after.pop()


@contextmanager
def masked(webui: WebUI, masks: torch.Tensor) -> Iterator[None]:
    """Give each of AND's parts one of the masks."""
    denoiser, turn = webui.module("sd_samplers_cfg_denoiser"), itertools.cycle(masks + 0.1)
    compiled = denoiser.compiled

    def with_mask(context: torch.Tensor, *strength: float) -> dict[str, Any]:
        return {**compiled(context, *strength), **({"mask": next(turn)} if strength else {})}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoiser, "compiled", with_mask)
        yield


REGIONS: dict[str, dict[str, Any]] = {
    "one image": {"prompt": "a cat AND a dog :0.6 AND a red mat :0.8"},
    "two images": {"prompt": ["a cat AND a dog", "a mat AND a"], "batch_size": 2, "sampler_name": "Heun"},
    "DDIM CFG++": {"prompt": "a cat AND a dog", "sampler_name": "DDIM CFG++"},
}


@pytest.mark.parametrize("changes", REGIONS.values(), ids=REGIONS)
@pytest.mark.parametrize("made_by", ["a wrapper", "masks"])
def test_regions_that_the_parts_of_and_have(webui: WebUI, changes: dict[str, Any], made_by: str) -> None:
    prompts = changes["prompt"]
    count = (prompts if isinstance(prompts, str) else prompts[0]).count("AND") + 1
    regions, without = Regions(count), webui.latents(DELTA, **changes)
    with masked(webui, regions.masks) if made_by == "masks" else wrapped_in(webui, regions):
        plain, wanted, got = webui.latents(**changes), webui.native(**changes), webui.latents(DELTA, **changes)
    assert webui.callbacks.swallowed == []
    assert relative(without, wanted) > 1e-3, "the regions change nothing here"
    assert float((got - wanted).norm() / (plain - wanted).norm()) < 1e-3


def test_a_wrapper_that_shows_the_model_parts_of_the_picture_leaves_the_sums_change(webui: WebUI) -> None:
    changes = {"steps": 1, "prompt": "a cat AND a dog :0.6"}
    wanted = webui.latents(DELTA, **changes) - webui.latents(**changes)
    with wrapped_in(webui, Tiles()):
        got = webui.latents(DELTA, **changes) - webui.latents(**changes)
    # The base sees another estimate; only a single step from noise has the same state.
    assert relative(got, wanted) < 1e-3


def test_a_refiner_that_replaces_the_patcher_in_mid_run(webui: WebUI) -> None:
    def replace(params: Any) -> None:
        if params.sampling_step == 1:
            model = webui.shared.sd_model
            model.forge_objects = model.forge_objects_original.shallow_copy()

    wanted = webui.native(steps=5)
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(replace)
    try:
        got = webui.latents(DELTA, steps=5)
    finally:
        registered.pop()
    assert relative(got, wanted) < 1e-5


def test_the_memory_manager_knows_the_patchers_in_use(webui: WebUI) -> None:
    """The memory manager cannot unload a model that it does not know, when another needs the room."""
    memory, seen = webui.backend("memory_management"), []
    registered = webui.callbacks.registered["cfg_after_cfg"]

    def look(params: Any) -> None:
        model = webui.shared.sd_model
        seen.append([entry.model for entry in memory.current_loaded_models])
        assert any(patcher is model.forge_objects.unet for patcher in seen[-1])
        assert any(patcher.model is webui.side_model.unet for patcher in seen[-1])
        if params.sampling_step == 1:
            # A refiner unloads everything, and prepares the new main model.
            model.forge_objects = model.forge_objects_original.shallow_copy()
            memory.current_loaded_models[:] = []
            memory.load_models_gpu([model.forge_objects.unet])

    registered.append(look)
    try:
        webui.generate(DELTA, steps=4)
    finally:
        registered.pop()
    assert len(seen) == 4 and webui.callbacks.swallowed == []


def test_the_memory_manager_lets_go_of_a_base_that_another_replaces(webui: WebUI) -> None:
    memory = webui.backend("memory_management")
    for base in ("base", "tuned"):
        webui.generate({**DELTA, "base": base})
        main, side = webui.shared.sd_model.forge_objects.unet.model, webui.side_model.unet
        assert {id(entry.model.model) for entry in memory.current_loaded_models} == {id(main), id(side)}


def weights_of(webui: WebUI) -> int:
    """Return the size of the side model's UNet, including the adapted layers' second weights."""
    unet = webui.side_model.unet
    return sum(weight.nbytes for weight in (*unet.parameters(), *unet.buffers()))


def test_the_memory_manager_loads_the_side_model_with_the_main_one(webui: WebUI, device: torch.device) -> None:
    memory = webui.backend("memory_management")
    seen = []
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(lambda _params: seen.append(webui.shared.sd_model.forge_objects.unet))
    try:
        got = webui.latents(DELTA, n_iter=2, **HIRES)
    finally:
        registered.pop()
    assert relative(got, webui.native(n_iter=2, **HIRES)) < 1e-5
    assert {len(unet.extra_model_patchers_during_sampling) for unet in seen} == {1}
    first, second = seen[0], seen[4]
    pixels = 2 * 2  # the hires pass is twice as wide and high
    side = webui.side_model.unet
    weights = weights_of(webui)
    room = first.extra_preserved_memory_during_sampling - weights
    # The weights are loaded by then.
    assert second.extra_preserved_memory_during_sampling == pixels * room
    entries = [entry for entry in memory.current_loaded_models if entry.model.model is side]
    assert len(entries) == 1
    del side
    webui.host.unload()
    assert not entries[0].loaded and entries[0] not in memory.current_loaded_models


def test_the_batch_and_size_decide_how_much_room_is_asked_for(webui: WebUI, device: torch.device) -> None:
    asked = []
    for changes in ({}, {"batch_size": 2}, {"width": 128}):
        webui.host.unload()
        webui.generate(DELTA, **changes)
        room = webui.shared.sd_model.forge_objects.unet.extra_preserved_memory_during_sampling
        asked.append(room - weights_of(webui))
    assert asked[0] > 0 and asked[1:] == [2 * asked[0], 2 * asked[0]]


def test_what_streams_and_what_draws_pictures_is_reserved_as_well(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory manager knows neither as a model."""
    from lib_delta.hosts.forge import host as forge

    webui.generate(DELTA)
    webui.host.forget([webui.side_model])
    model = webui.side_model

    def room(bridge: str, family: Family, streams: int = 0) -> int:
        monkeypatch.setattr(type(model), "streamed_bytes", property(lambda _model: streams))
        monkeypatch.setattr(type(webui.host), "main_model", lambda _host: SimpleNamespace(family=family))
        source = SimpleNamespace(source_size=lambda height, width: (height // 2, width // 2))
        asked = SimpleNamespace(first=SimpleNamespace(bridge=bridge))
        run = SimpleNamespace(model=model, passes=asked, bridge=lambda _target: source)
        p = SimpleNamespace(width=1024, height=512, batch_size=3)
        reserved: int = webui.host._bytes_to_reserve(p, run)
        return reserved

    assert room("learned", Family.SDXL) == 0
    assert room("taesd", Family.SD2) == 0  # the same latents need no decoding
    assert room("taesd", Family.SDXL) == 1024 * 512 * forge.PICTURE_BYTES
    # At the side model's size, for both branches with and without the prompt.
    assert room("learned", Family.SDXL, 1000) == 1000 + 4 * 3 * 32 * 64 * forge.ACTIVATION_BYTES


@pytest.mark.parametrize(("free", "kept"), [(2**40, True), (2**30, False)])
def test_where_room_is_short_the_main_model_is_loaded_anew(
    webui: WebUI, device: torch.device, monkeypatch: pytest.MonkeyPatch, free: int, kept: bool
) -> None:
    memory = webui.backend("memory_management")
    monkeypatch.setattr(memory, "free", free)
    webui.generate()
    (main,) = memory.current_loaded_models
    monkeypatch.setattr(main, "model_unload", lambda *_: unloaded.append(True))
    unloaded: list[bool] = []
    webui.generate(DELTA)
    assert bool(unloaded) is not kept and len(memory.current_loaded_models) == 2


def placed(webui: WebUI) -> set[torch.device]:
    """Return all devices of the side model's weights."""
    network = webui.side_model.network
    return {weight.device for weight in (*network.parameters(), *network.buffers())}


@contextmanager
def in_each_step(webui: WebUI, do: Any) -> Iterator[None]:
    """Call ``do`` after each step, and raise its errors."""
    registered = webui.callbacks.registered["cfg_after_cfg"]
    registered.append(do)
    try:
        yield
    finally:
        registered.remove(do)
        assert webui.callbacks.swallowed == []


@pytest.mark.parametrize("form", ["merged", "low-rank factors"])
@pytest.mark.parametrize("in_order", [list, lambda patchers: list(reversed(patchers))])
def test_all_of_the_side_model_is_on_its_device_where_that_is_full(
    webui: WebUI, device: torch.device, monkeypatch: pytest.MonkeyPatch, in_order: Any, form: str
) -> None:
    """Forge Neo leaves layers that do not fit on the CPU, and casts only its own kinds of layers."""
    memory, wanted = webui.backend("memory_management"), webui.native()
    webui.shared.opts.delta_sampling_form = form
    monkeypatch.setattr(memory, "in_order", in_order, raising=False)
    monkeypatch.setattr(memory, "inference", 2**20, raising=False)
    main = webui.shared.sd_model.forge_objects_original.unet
    # Room for the side model's weights and activations, and for half of the main model.
    activations = 4 * 64 * 32 * 1024
    seen: list[set[torch.device]] = []
    with in_each_step(webui, lambda _params: seen.append(placed(webui))):
        webui.generate(DELTA)
        weights = weights_of(webui)
        webui.host.unload()
        memory.unload_all_models()
        if webui.name == "neo":
            monkeypatch.setattr(memory, "free", weights + activations + main.model_size() // 2)
        seen.clear()
        got = webui.latents(DELTA)
    assert relative(got, wanted) < 1e-5
    assert seen == [{device}] * 3
    if webui.name == "neo":
        assert main.loaded_size() < main.model_size() and (main.loaded_size() > 0 or in_order is not list)


@pytest.mark.parametrize("asked", [0.01, 0.5, 10.0])
def test_a_side_model_that_is_unloaded_in_mid_run_is_brought_back(
    webui: WebUI, device: torch.device, monkeypatch: pytest.MonkeyPatch, asked: float
) -> None:
    """A preview's autoencoder does this, if it needs a part of the memory or all of it."""
    memory, wanted = webui.backend("memory_management"), webui.native(steps=4)
    seen: list[set[torch.device]] = []
    taken: list[set[torch.device]] = []

    def take_away(_params: Any) -> None:
        seen.append(placed(webui))
        if len(seen) == 2:
            if webui.name == "neo":
                left = memory.get_free_memory(device)
                memory.free_memory(left + asked * webui.side_model.elsewhere(torch.device("cpu")), device)
            else:
                memory.unload_all_models()
            taken.append(placed(webui))

    with in_each_step(webui, take_away):
        got = webui.latents(DELTA, steps=4)
    assert relative(got, wanted) < 1e-5
    assert seen == [{device}] * 4 and all(len(places) == 1 for places in taken)
    assert "CPU" not in webui.host.status()


def test_a_side_model_that_cannot_be_brought_back_computes_on_the_cpu_and_that_is_said(
    webui: WebUI, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory, wanted = webui.backend("memory_management"), webui.native(steps=4)
    sampling = webui.backend("sampling.sampling_function")
    seen: list[set[torch.device]] = []

    def take_away(_params: Any) -> None:
        seen.append(placed(webui))
        if len(seen) == 2:
            memory.unload_all_models()
            next(iter(webui.side_model.unet.children())).to(device)  # a part of it remains
            monkeypatch.setattr(sampling, "load_models_gpu", lambda *_, **__: None)

    with in_each_step(webui, take_away):
        made = webui.generate(DELTA, steps=4)
    assert relative(made.images, wanted) < 1e-5
    assert seen == [{device}] * 2 + [{torch.device("cpu")}] * 2
    said = "the side model computed on the CPU, for the WebUI found no room for it on its device"
    assert said in webui.host.status() and made.comments.count(f"Delta Sampling: {said}.") == 1


def test_the_side_model_is_unloaded_where_no_main_checkpoint_could_be_loaded(webui: WebUI) -> None:
    """A checkpoint that cannot be read leaves Forge without one."""
    webui.generate(DELTA)
    webui.shared.sd_model = None
    assert webui.host.unload() == "Unloaded 1 side model"
    assert webui.host.status().startswith("No side model is loaded")
    webui.use("base")


def test_patchers_of_managers_that_move_whole_models_are_the_hosts_own(webui: WebUI) -> None:
    from lib_delta.hosts.forge.host import patching
    from lib_delta.hosts.forge.whole_patcher import whole

    own = patching.ModelPatcher
    assert (whole(own) is own) is (webui.name == "forge")


@pytest.mark.parametrize(("flag", "family"), [("is_sd1", "SD1"), ("is_sd2", "SD2"), ("is_sdxl", "SDXL")])
def test_the_family_of_the_main_checkpoint(webui: WebUI, flag: str, family: str) -> None:
    from lib_delta.hosts.forge.families import family_by_latents

    assert family_by_latents(SimpleNamespace(**{flag: True})).name == family


def test_a_main_checkpoint_of_an_unknown_family_is_refused(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(webui.shared.sd_model), "is_sd1", False)
    with pytest.raises(SettingError, match="does not know"):
        webui.generate(DELTA)


def test_what_the_side_model_is_told_is_not_said_of_the_next_picture(webui: WebUI) -> None:
    webui.shared.opts.emphasis = "No norm"
    webui.generate({**DELTA, "prompt": "a (cat:1.3), zwx"}, prompt="a mat", negative_prompt="")
    said = webui.generate(prompt="a dog", negative_prompt="").infotexts[0]
    assert "Emphasis" not in said and "TI" not in said
    said = webui.generate({**DELTA, "prompt": "a mat"}, prompt="a (cat:1.3), zwx", negative_prompt="").infotexts[0]
    assert "Emphasis: No norm" in said and "TI: zwx" in said


def test_an_error_leaves_the_main_models_noise_schedule_as_it_was(webui: WebUI) -> None:
    plain, predictor = webui.latents(), webui.shared.sd_model.forge_objects.unet.model.predictor
    sigmas = predictor.sigmas.clone()
    webui.shared.opts.sd_noise_schedule = "Zero Terminal SNR"
    rescaled = webui.latents()
    made = webui.generate(DELTA)
    assert "Delta lambda" in made.infotexts[0] and not torch.equal(made.images, rescaled)
    with pytest.raises(SettingError, match="there is no LoRA"):
        webui.generate({**DELTA, "loras": "nowhere"})
    assert torch.equal(predictor.sigmas, sigmas)
    webui.shared.opts.sd_noise_schedule = "Default"
    assert torch.equal(webui.latents(), plain) and not torch.equal(rescaled, plain)
