"""The host's ambient state does not affect results: another device, inference mode, autocast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lib_delta.adapters.adapter_file import load_adapter
from lib_delta.adapters.attach import AdapterForm, attach
from lib_delta.bridges import ScaleBridge
from lib_delta.core.conditioning import Conditioning
from lib_delta.core.guidance import DeltaGuidance
from lib_delta.core.progress import Progress
from lib_delta.core.source import Source
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.parameterization import Parameterization, Schedule
from lib_delta.models.forked_layers import ForkedLayer
from lib_delta.models.unet import UNet
from tests.support.adapters import CONV, LINEAR, every_algorithm, make_unet
from tests.support.stand_in_device import DEVICE, OnDevice, stand_in_device
from tests.support.tiny_unet import randn, tiny_unet

FILES = every_algorithm()
X, SIGMA = 5 * randn(2, 4, 8, 8), torch.tensor([0.7, 6.0])
TOLD = Conditioning(randn(1, 7, 24, seed=1), randn(1, 14, 24, seed=2))


def adapted_unet(name: str, folder: Path, form: AdapterForm, weight: float = 1.0) -> UNet:
    path = folder / "adapter.safetensors"
    save_file(FILES[name], path)
    unet = make_unet()
    attach(unet, [(load_adapter(path, unet, []), weight)], form)
    return unet


# The stand-in itself.


def test_the_stand_in_refuses_what_a_device_does() -> None:
    with stand_in_device() as transfers:
        there = torch.ones(3).to(DEVICE)
        assert isinstance(there + 1, OnDevice) and not isinstance(there.cpu(), OnDevice)
        assert float(there.sum()) == 3 and transfers == {"to the device": 1, "from the device": 2}
        with pytest.raises(RuntimeError, match="same device"):
            there + torch.ones(3)
        with pytest.raises(TypeError, match="no float64"):
            there.double()
        with torch.inference_mode():
            moved = torch.ones(3).to(DEVICE)
            moved += 1
        with pytest.raises(RuntimeError, match="Inplace update to inference tensor"):
            moved += 1
        assert torch.equal((there * moved).cpu(), torch.full((3,), 2.0))


# Another device.


@pytest.mark.parametrize("form", ["merged", "bypass"])
@pytest.mark.parametrize("name", FILES)
def test_every_algorithm_on_another_device(tmp_path: Path, name: str, form: AdapterForm) -> None:
    def deltas(unet: UNet) -> Tensor:
        return Source(unet, Parameterization(), TOLD).deltas(SourceStep(X, SIGMA, 3.0))[0]

    wanted = deltas(adapted_unet(name, tmp_path, form))
    assert wanted.norm() > 0
    with stand_in_device():
        moved = adapted_unet(name, tmp_path, form)
        moved.to(DEVICE)
        assert torch.equal(deltas(moved), wanted)
        attached_there = make_unet().to(DEVICE)
        attach(attached_there, [(load_adapter(tmp_path / "adapter.safetensors", attached_there, []), 1.0)], form)
        torch.testing.assert_close(deltas(attached_there), wanted, atol=1e-5, rtol=1e-4)
        attached_there.to("cpu")
        torch.testing.assert_close(deltas(attached_there), wanted, atol=1e-5, rtol=1e-4)


JOINED = Conditioning(randn(3, 7, 24, seed=5), randn(1, 7, 24, seed=6), weights=((1.0, 0.5), (0.7,)))


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize("told", [TOLD, JOINED])
@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_a_step_where_target_and_source_are_on_devices_of_their_own(
    tmp_path: Path, prediction: str, told: Conditioning, skipped: bool
) -> None:
    def change(unet: UNet, x: Tensor, quantize: bool) -> Tensor:
        source = Source(unet, Parameterization(prediction), told, TOLD, quantize)
        guidance = DeltaGuidance(Strength(), ScaleBridge(1.4), source)
        step = DenoiseStep(x, SIGMA.to(x.device), 0.9 * x, 3.0, 0.5, uncond_skipped=skipped, uncond_zero=True)
        return guidance(step)

    unet = adapted_unet("LoRA", tmp_path, "merged")
    wanted = [change(unet, X, quantize) for quantize in (False, True)]
    with stand_in_device():
        for side, target in ((DEVICE, DEVICE), (DEVICE, "cpu"), ("cpu", DEVICE)):
            unet = unet.to(side)
            for quantize in (False, True):
                got = change(unet, X.to(target), quantize)
                assert isinstance(got, OnDevice) == (target == DEVICE)
                torch.testing.assert_close(got.cpu(), wanted[quantize])


def test_a_schedule_is_read_from_a_device_without_float64() -> None:
    alphas = Schedule.stable_diffusion().alphas_cumprod.float()
    with stand_in_device():
        schedule = Schedule(alphas.to(DEVICE))
        progress = Progress(torch.tensor([14.0, 3.0, 0.5, 0.0]).to(DEVICE))
        assert progress(torch.tensor([3.0]).to(DEVICE)) == 0.5
        t = schedule.sigma_to_t(SIGMA.to(DEVICE))
        torch.testing.assert_close(schedule.t_to_sigma(t).cpu(), SIGMA)
    assert torch.equal(schedule.alphas_cumprod, alphas.double())


# Inference mode.


@pytest.mark.parametrize("form", ["merged", "bypass"])
def test_adapters_change_after_a_host_has_moved_the_model_in_inference_mode(tmp_path: Path, form: AdapterForm) -> None:
    wanted = attached(adapted_unet("LoHa", tmp_path, "merged", 0.5))
    with stand_in_device():
        unet = adapted_unet("LoHa", tmp_path, form)
        file = load_adapter(tmp_path / "adapter.safetensors", unet, [])
        for weight in (0.75, 0.5):
            with torch.inference_mode():
                unet.to(DEVICE)
            attach(unet, [(file, weight)], form)
        if form == "merged":
            torch.testing.assert_close([w.cpu() for w in attached(unet)], wanted)
        with torch.inference_mode():
            unet.to("cpu")
        attach(unet, [(file, 1.0)], form)


def test_memory_of_merged_weights_is_used_again_where_it_can_be(tmp_path: Path) -> None:
    unet = adapted_unet("LoRA", tmp_path, "merged")
    before = [weight.data_ptr() for weight in attached(unet)]
    attach(unet, [(load_adapter(tmp_path / "adapter.safetensors", unet, []), 0.5)], "merged")
    assert [weight.data_ptr() for weight in attached(unet)] == before


def attached(unet: UNet) -> list[Tensor]:
    """Return the second branch's weights."""
    return [unet.get_submodule(path).adaptation.weight for path in (LINEAR, CONV)]


# Autocast.


@pytest.mark.parametrize("name", FILES)
def test_merging_is_exact_under_autocast(tmp_path: Path, name: str) -> None:
    """AUTOMATIC1111 has it around all sampling on CUDA, and so around a merge in mid-run."""

    def merged() -> list[Tensor]:
        unet = adapted_unet(name, tmp_path, "merged")
        layers = [layer for layer in unet.modules() if isinstance(layer, ForkedLayer) and layer.adaptation is not None]
        return [layer.adaptation.weight for layer in layers]

    wanted = merged()
    with stand_in_device():
        path = tmp_path / "adapter.safetensors"
        unet = make_unet()
        file = load_adapter(path, unet, [])
        with torch.autocast("cpu", torch.bfloat16):
            attach(unet, [(file, 1.0)], "merged")
        layers = [layer for layer in unet.modules() if isinstance(layer, ForkedLayer) and layer.adaptation is not None]
        assert all(torch.equal(layer.adaptation.weight, w) for layer, w in zip(layers, wanted, strict=True))


@pytest.mark.parametrize("form", ["merged", "bypass"])
def test_the_delta_is_exact_under_autocast(tmp_path: Path, form: AdapterForm) -> None:
    source = Source(adapted_unet("LoRA", tmp_path, form), Parameterization(), TOLD)
    wanted = source.deltas(SourceStep(X, SIGMA, 3.0))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(source.deltas(SourceStep(X, SIGMA, 3.0))[0], wanted)


def test_prompts_alone_on_another_device() -> None:
    told = [Conditioning(randn(1, 7, 16, seed=i), randn(1, 7, 16, seed=9)) for i in (1, 2)]
    wanted = Source(tiny_unet(), Parameterization(), *told).deltas(SourceStep(X, SIGMA, 3.0))[0]
    with stand_in_device():
        got = Source(tiny_unet().to(DEVICE), Parameterization(), *told).deltas(SourceStep(X, SIGMA, 3.0))[0]
    torch.testing.assert_close(got, wanted)
