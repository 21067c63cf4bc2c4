"""The side model's device between generations in AUTOMATIC1111's WebUI, on a card with its own memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("k_diffusion", reason="k-diffusion is not installed, whose samplers the stand-ins run")
pytest.importorskip("transformers", reason="transformers is not installed, whose text encoder the stand-ins run")

from lib_delta.runtime.placement import Stream, Visit
from tests.support.small_files import Files, checkpoint, lora_factors, make_files, write_lora
from tests.support.stand_in_device import DEVICE, stand_in_device
from tests.support.stand_in_webui import WebUI, relative, running

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
        from lib_delta.hosts.a1111 import host as a1111

        monkeypatch.setattr(webui.module("devices"), "device", DEVICE)
        monkeypatch.setattr(type(webui.host), "compute_device", lambda _host: (DEVICE, torch.float32))
        monkeypatch.setattr(type(webui.host), "text_device", lambda _host: torch.device("cpu"))
        monkeypatch.setattr(a1111, "waits_in_memory", lambda device: device == DEVICE)
        yield webui


def with_free(webui: WebUI, free: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lib_delta.hosts.a1111 import host as a1111

    def free_memory(device: torch.device) -> int | None:
        if device.index is None:  # as torch 2.1 asks CUDA
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        return free

    monkeypatch.setattr(a1111, "free_memory", free_memory)


def generated(webui: WebUI, transfers: Counter[str], **delta: Any) -> tuple[torch.Tensor, int]:
    """Generate; return the latents and the number of tensors moved to the device."""
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
        placed = model._copy
        assert isinstance(placed, Visit)
        # Nothing remains of LoRAs that were removed.
        adaptations = [module for module in model.unet.modules() if hasattr(module, "made_of")]
        factors = len([part for part in adaptations if hasattr(part, "adapters")])
        assert len(placed._originals) <= parameters + len(list(model.unet.buffers())) + factors
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
        places = {model.name: model.device for model in webui.host.side_models()}
        assert places == {"base.safetensors": torch.device("cpu"), "copy.safetensors": DEVICE}
        webui.host.unload()


HIRES = {"enable_hr": True, "hr_second_pass_steps": 2}


@pytest.mark.parametrize(("free", "stays"), [(MUCH, True), (LITTLE, False)])
def test_the_side_model_is_away_where_hires_fix_needs_room_to_decode(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, free: int, stays: bool
) -> None:
    """Hires fix decodes within ``p.sample``, after each of its two passes."""
    places: list[torch.device] = []

    def decoded(samples: torch.Tensor) -> torch.Tensor:
        places.append(webui.side_model.device)
        return samples

    wanted = webui.native(**HIRES)
    monkeypatch.setattr(webui.processing, "decoded", decoded)
    with_free(webui, free, monkeypatch)
    with stand_in_device():
        assert relative(webui.latents(DELTA, **HIRES), wanted) < 1e-4
        assert places == [DEVICE if stays else torch.device("cpu")] * 2
        webui.host.unload()


def test_what_decoding_takes_grows_with_the_picture(webui: WebUI, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hires pass's size counts in both passes: its picture is encoded before the second."""
    from lib_delta.hosts.a1111 import host as a1111

    with_free(webui, MUCH, monkeypatch)
    with stand_in_device():
        for factor, place in ((0.9, DEVICE), (1.1, torch.device("cpu"))):
            monkeypatch.setattr(a1111, "DECODED", factor * MUCH / (128 * 128 * 4))
            webui.generate(DELTA, **HIRES)
            assert webui.side_model.device == place
        webui.generate(DELTA)
        assert webui.side_model.device == DEVICE
        webui.host.unload()


def test_what_does_not_fit_beside_the_main_model_runs_block_by_block(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[Any] = []
    webui.callbacks.registered["cfg_after_cfg"].append(lambda _params: placed.append(webui.side_model._copy))
    with stand_in_device() as transfers:
        with_free(webui, MUCH, monkeypatch)
        wanted, _ = generated(webui, transfers)
        weights = webui.side_model.elsewhere(torch.device("cpu"))
        webui.host.unload()
        # The main model is in CPU memory, as with --medvram; its forward pass takes two rows of 8x8, 32 KB for each.
        main = webui.shared.sd_model.model
        waiting = sum(weight.nbytes for weight in (*main.parameters(), *main.buffers()))
        needed = weights + waiting + 2 * 64 * 32 * 1024
        for free, kind in ((needed + 2**16, Visit), (needed - 2**16, Stream)):
            with_free(webui, free, monkeypatch)
            webui.host.unload()
            placed.clear()
            made = webui.generate(DELTA, steps=2)
            assert [type(each) for each in placed] == [kind] * 2
            assert torch.equal(made.images, wanted) and webui.side_model.device == torch.device("cpu")
            said = "the side model ran block by block, which is slower: 0.0 GB are free on cpu:0"
            for text in (webui.host.status(), " ".join(made.comments)):
                assert (said in text) is (kind is Stream)
        webui.host.unload()


class Card:
    """CUDA's runtime, as far as a card's memory; the rest is torch's."""

    def __init__(self, free: int) -> None:
        self.free = free

    def cudaMemGetInfo(self, index: int) -> tuple[int, int]:  # noqa: N802
        assert isinstance(index, int)
        return self.free, 2**33


@pytest.mark.parametrize(("free", "stays"), [(MUCH, True), (LITTLE, False)])
def test_a_card_that_the_webui_calls_cuda_is_asked_for_its_memory(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch, free: int, stays: bool
) -> None:
    """AUTOMATIC1111's device is "cuda" without an index, which torch 2.1 rejects."""
    monkeypatch.setattr(torch.cuda, "cudart", lambda: Card(free))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    with stand_in_device():
        webui.generate(DELTA)
        model = webui.side_model
        assert model.device == DEVICE
        monkeypatch.setattr(type(webui.host), "compute_device", lambda _host: (torch.device("cuda"), torch.float16))
        webui.host.leave(model)
        assert (model.device == DEVICE) is stays
        webui.host.unload()


def test_what_fails_after_the_picture_is_made_is_told_and_costs_no_picture(
    webui: WebUI, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lib_delta.hosts.a1111 import host as a1111

    def free_memory(_device: torch.device) -> int:
        if taken:
            raise RuntimeError("the driver has gone")
        return MUCH

    taken: list[bool] = []
    wanted = webui.latents(DELTA)
    webui.callbacks.registered["cfg_after_cfg"].append(lambda _params: taken.append(True))
    monkeypatch.setattr(a1111, "free_memory", free_memory)
    monkeypatch.setattr(type(webui.host), "compute_device", lambda _host: (torch.device("cpu"), torch.float32))
    made = webui.generate(DELTA)
    assert relative(made.images, wanted) < 1e-5 and "Delta lambda" in made.infotexts[0]
    assert webui.host.status().count("the driver has gone") == 1
    assert "the driver has gone" in " ".join(made.comments)
