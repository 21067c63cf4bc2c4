"""Where the side model is between generations in AUTOMATIC1111's WebUI, on a card with memory of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from small_files import Files, checkpoint, lora_factors, make_files, write_lora
from stand_in_device import DEVICE, stand_in_device
from stand_in_webui import WebUI, relative, running

from lib_delta.placement import Visit

DELTA = {"base": "base", "loras": "ink"}
MUCH, LITTLE = 2**34, 2**30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    files = make_files(tmp_path_factory.mktemp("a1111"))
    write_lora(lora_factors(checkpoint(), seed=7), files.lora_file("other"))
    return files


@pytest.fixture
def webui(files: Files, monkeypatch: pytest.MonkeyPatch) -> Iterator[WebUI]:
    with running("a1111", files) as webui:
        from lib_delta.hosts import a1111

        monkeypatch.setattr(type(webui.host), "place", lambda _host: (DEVICE, torch.float32))
        monkeypatch.setattr(type(webui.host), "text_device", lambda _host: torch.device("cpu"))
        monkeypatch.setattr(a1111, "waits_in_memory", lambda device: device == DEVICE)
        yield webui


def with_free(webui: WebUI, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_delta.hosts import a1111

    monkeypatch.setattr(a1111, "free_memory", lambda _device: free)


def generated(webui: WebUI, transfers: Counter[str], **delta: Any) -> tuple[torch.Tensor, int]:
    """Generate, and return the latents and how many tensors came to the device."""
    before = transfers["to the device"]
    latents = webui.latents({**DELTA, **delta}, steps=2)
    return latents, transfers["to the device"] - before


@pytest.mark.parametrize("form", ["low-rank factors", "merged"])
def test_weights_stay_while_there_is_room_and_what_came_since_follows(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    webui.shared.opts.delta_sampling_form = form
    wanted = webui.native(steps=2)
    with_free(webui, MUCH, monkeypatch)
    with stand_in_device() as transfers:
        first, brought = generated(webui, transfers)
        parameters = len(list(webui.side_model.unet.parameters()))
        assert webui.side_model.device == DEVICE and brought >= parameters
        again, more = generated(webui, transfers)
        assert torch.equal(again, first) and more < parameters / 4
        other, _ = generated(webui, transfers, loras="other")
        back, _ = generated(webui, transfers)
        assert relative(other, first) > 1e-3 and relative(back, first) < 1e-5
        assert relative(first, wanted) < 1e-4
        model = webui.side_model
        placed = model._placed
        assert isinstance(placed, Visit)
        # Nothing of LoRAs that have gone is kept.
        adaptations = [module for module in model.unet.modules() if hasattr(module, "made_of")]
        factors = len([part for part in adaptations if hasattr(part, "adapters")])
        assert len(placed._home) <= parameters + len(list(model.unet.buffers())) + factors
        webui.host.unload()


def test_weights_wait_in_cpu_memory_where_room_is_short(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    with stand_in_device() as transfers:
        with_free(webui, MUCH, monkeypatch)
        first, brought = generated(webui, transfers)
        assert webui.side_model.device == DEVICE
        with_free(webui, LITTLE, monkeypatch)
        second, _ = generated(webui, transfers)
        assert webui.side_model.device == torch.device("cpu")
        third, again = generated(webui, transfers)
        assert webui.side_model.device == torch.device("cpu") and again >= brought / 2
        assert torch.equal(second, first) and torch.equal(third, first)
        webui.host.unload()


def test_a_base_that_is_kept_makes_room_for_the_one_in_use(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    webui.shared.opts.delta_sampling_cache = 2
    with_free(webui, MUCH, monkeypatch)
    with stand_in_device() as transfers:
        generated(webui, transfers)
        generated(webui, transfers, base="copy")
        places = {model.name: model.device for model in webui.host._models}
        assert places == {"base.safetensors": torch.device("cpu"), "copy.safetensors": DEVICE}
        webui.host.unload()
