"""Transfers of a step in a WebUI's callbacks: it waits once for the device, at its start, and moves nothing there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from tests.support.stand_in_device import DEVICE, OnDevice, stand_in_device
from tests.support.stand_in_webui import WebUI, relative

DELTA = {"base": "base", "loras": "ink"}
STEPS = 5
# By host, the callbacks of one step in their order.
CALLBACKS = {"a1111": ("cfg_denoiser", "cfg_denoised"), "forge": ("cfg_denoiser", "post_cfg")}
ONCE = {"from the device": 1}


HOSTS = CALLBACKS


@pytest.fixture
def webui(started: WebUI, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebUI]:
    monkeypatch.setattr(type(started.host), "compute_device", lambda _host: (DEVICE, torch.float32))
    yield started
    monkeypatch.undo()
    started.host.unload()
    started.reset()


class Watch:
    """Moves the callbacks' arguments to the device while they run, and counts their transfers in each step."""

    def __init__(self, webui: WebUI, transfers: Counter[str]) -> None:
        self.webui, self.transfers = webui, transfers
        self.steps: list[Counter[str]] = []
        self.tables: dict[int, Any] = {}
        self.evaluated: Any = None

    def on_device(self, value: Any) -> Any:
        return value.to(DEVICE) if isinstance(value, torch.Tensor) and not isinstance(value, OnDevice) else value

    @contextmanager
    def table_there(self) -> Iterator[None]:
        """Move the model's schedule to the device, as in the WebUIs; the same tensor while the schedule is the same."""
        model = self.webui.shared.sd_model
        holder, name = model, "alphas_cumprod"
        if self.webui.name != "a1111":
            holder, name = model.forge_objects.unet.model.predictor, "sigmas"
        table = getattr(holder, name)
        if id(table) not in self.tables:
            self.tables[id(table)] = table, self.on_device(table)
        setattr(holder, name, self.tables[id(table)][1])
        try:
            yield
        finally:
            setattr(holder, name, table)

    def around(self, call: Callable[[Any], Any], begins: bool, names: tuple[str, ...]) -> Callable[[Any], Any]:
        """Return a watched callback, whose changes are written back."""

        def watched(params: Any) -> Any:
            given = params if isinstance(params, dict) else vars(params)
            before = {name: given[name] for name in names if given.get(name) is not None}
            given.update({name: self.on_device(tensor) for name, tensor in before.items()})
            if begins:
                self.steps.append(Counter())
                self.evaluated = params
            asked_for = self.evaluated.x  # AUTOMATIC1111's second callback reads it too
            self.evaluated.x = self.on_device(asked_for)
            with self.table_there():
                counted = Counter(self.transfers)
                result = call(params)
                self.steps[-1] += self.transfers - counted
            self.evaluated.x = asked_for
            for name, tensor in before.items():
                tensor.copy_(given[name].cpu())
            given.update(before)
            return result.cpu() if isinstance(result, torch.Tensor) else result

        return watched


def counted(webui: WebUI, delta: dict[str, Any] | None = None, **changes: Any) -> tuple[list[Counter[str]], Any]:
    """Generate; return the transfers of each step in our callbacks, and the latents."""
    with stand_in_device() as transfers, pytest.MonkeyPatch.context() as patch:
        watch = Watch(webui, transfers)
        before, after = CALLBACKS[webui.name]
        registered = webui.callbacks.registered
        patch.setitem(registered, before, [watch.around(c, True, ("x", "sigma")) for c in registered[before]])
        if after in registered:
            patch.setitem(registered, after, [watch.around(c, False, ("x",)) for c in registered[after]])
        else:
            names = ("denoised", "uncond_denoised", "input", "sigma")
            functions = webui.host._functions
            post_cfg = watch.around(functions["sampler_post_cfg_function"], False, names)
            patch.setitem(functions, "sampler_post_cfg_function", post_cfg)
        latents = webui.latents({**DELTA, **(delta or {})}, steps=STEPS, **changes)
        assert webui.side_model.device == webui.host.compute_device()[0]
        webui.host.unload()
    assert webui.callbacks.swallowed == []
    return watch.steps, latents


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "timesteps": {"sampler_name": "DDIM"},
    "two calls a step": {"sampler_name": "Heun"},
    "AND": {"prompt": "a cat AND a dog :0.5"},
    "batch": {"batch_size": 2},
    "CFG 1": {"cfg_scale": 1.0},
    "NGMS at all steps": {"s_min_uncond": 100.0, "options": {"s_min_uncond_all": True}},
    "balanced": {"delta": {"quality": "balanced"}},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_waits_for_the_device_once_and_brings_nothing_to_it(webui: WebUI, case: str) -> None:
    changes = dict(CASES[case])
    vars(webui.shared.opts).update(changes.pop("options", {}))
    steps, latents = counted(webui, **changes)
    assert len(steps) >= STEPS - 1
    for step in steps[1:]:  # the first step moves tensors that stay
        assert step == ONCE
    changes.pop("delta", None)
    assert relative(latents, webui.latents(steps=STEPS, **changes)) > 1e-3


@pytest.mark.parametrize("quality", ["exact", "balanced"])
def test_a_side_model_on_the_cpu_serves_a_main_model_on_a_device(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, quality: str
) -> None:
    """A step that evaluates it moves the state and its noise level there, and the changes back."""
    monkeypatch.setattr(type(webui.host), "compute_device", lambda _host: (torch.device("cpu"), torch.float32))
    delta = {"quality": quality}
    steps, latents = counted(webui, delta)
    wanted = webui.latents({**DELTA, **delta}, steps=STEPS)
    assert relative(latents, wanted) < 1e-5
    asked = [step for step in steps[1:] if step != ONCE]
    assert asked == [{"from the device": 3, "to the device": 2}] * (len(steps) - 1 if quality == "exact" else 2)
