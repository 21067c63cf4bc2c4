"""One step of Delta Sampling: strength, bridge, source, bridge, add."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from lib_delta.bridges import Composed, Crossing, IdentityBridge, NoiseLimitBridge, ScaleBridge
from lib_delta.core.deltas import Deltas, PromptParts
from lib_delta.core.guidance import DeltaDenoiser, DeltaGuidance, side_cfg
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.families import Family
from lib_delta.errors import DeltaError
from tests.support.tiny_unet import randn

X, DENOISED = 3 * randn(2, 4, 8, 8), randn(2, 4, 8, 8, seed=1)
SIGMA = torch.tensor([2.0, 2.0])
ALWAYS = Strength()


class RecordingSource:
    """Gives one fixed delta and keeps what it was asked."""

    def __init__(self, delta: float | Tensor = 0.25) -> None:
        self.value = delta
        self.asked: list[SourceStep] = []

    def at_progress(self, progress: float) -> RecordingSource:
        return self

    def deltas(self, step: SourceStep) -> Deltas:
        self.asked.append(step)
        delta = torch.zeros_like(step.x, dtype=torch.float32) + self.value
        return Deltas(delta, delta / 2)


def step(progress: float = 0.5, x: Tensor = X, denoised: Tensor = DENOISED) -> DenoiseStep:
    return DenoiseStep(x, SIGMA, denoised, cfg_scale=7.0, progress=progress, step=3)


def test_the_negative_prompts_own_delta_is_there_for_samplers_that_ask() -> None:
    changes = DeltaGuidance(Strength(2.0), ScaleBridge(0.5), RecordingSource(0.25)).changes(step())
    assert changes is not None
    assert torch.equal(changes[0], torch.full_like(X, 1.0)) and torch.equal(changes[1], torch.full_like(X, 0.5))
    assert DeltaGuidance(Strength(0.0), IdentityBridge(), RecordingSource()).changes(step()) is None


def test_each_part_of_and_crosses_the_bridge_as_its_image_does() -> None:
    class Parted(RecordingSource):
        def deltas(self, step: SourceStep) -> Deltas:
            parts = PromptParts(small, ((1.0, 0.5), (1.0,)), torch.tensor([0, 0, 1]))
            return super().deltas(step)._replace(parts=parts)

    @dataclass(frozen=True)
    class Curved(IdentityBridge):
        """As a bridge by way of a decoder: what a delta comes to depends on where it is."""

        def delta_to_target(self, delta: Tensor, crossing: Crossing) -> Tensor:
            return delta * crossing.denoised

    small = randn(3, 4, 8, 8, seed=5)
    changes = DeltaGuidance(Strength(2.0), Composed((Curved(), ScaleBridge(0.5))), Parted()).changes(step())
    assert changes is not None and changes.parts is not None
    torch.testing.assert_close(changes.parts.change, 2 * small / 0.5 * DENOISED[[0, 0, 1]])
    torch.testing.assert_close(changes.guided, 2 * 0.25 / 0.5 * DENOISED)


def test_the_delta_is_added_with_its_strength() -> None:
    source = RecordingSource()
    guided = DeltaGuidance(Strength(2.0), IdentityBridge(), source)(step())
    torch.testing.assert_close(guided, DENOISED + 0.5)
    (asked,) = source.asked
    assert asked.x is X
    assert asked.sigma is SIGMA
    assert asked.cfg_scale == 7.0


@pytest.mark.parametrize("strength", [Strength(0.0), Strength(1.0, start=0.6), Strength(1.0, end=0.4)])
def test_at_strength_zero_or_out_of_range_no_side_model_is_called(strength: Strength) -> None:
    source = RecordingSource()
    assert DeltaGuidance(strength, IdentityBridge(), source)(step()) is DENOISED
    assert not source.asked


def test_the_source_sees_its_own_latent_and_the_delta_comes_back_in_the_targets() -> None:
    source = RecordingSource()
    guided = DeltaGuidance(Strength(1.0), ScaleBridge(1.4), source)(step())
    torch.testing.assert_close(source.asked[0].x, 1.4 * X)
    torch.testing.assert_close(source.asked[0].sigma, 1.4 * SIGMA)
    torch.testing.assert_close(guided, DENOISED + 0.25 / 1.4)


def test_a_zero_terminal_snr_target_does_not_break_the_sources_start() -> None:
    source = RecordingSource()
    sigma, noise = torch.tensor([4518.0, 4518.0]), randn(2, 4, 8, 8, seed=2)
    start = DenoiseStep(DENOISED + 4518 * noise, sigma, DENOISED, 7.0, 0.0)
    DeltaGuidance(Strength(1.0), NoiseLimitBridge(14.6), source)(start)
    torch.testing.assert_close(source.asked[0].x, DENOISED + 14.6 * noise, atol=1e-2, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_result_has_the_targets_type_and_is_added_in_float32(dtype: torch.dtype) -> None:
    denoised = DENOISED.to(dtype)
    tiny = 1e-3 * randn(2, 4, 8, 8, seed=3)
    guided = DeltaGuidance(Strength(1.0), IdentityBridge(), RecordingSource(tiny))(step(denoised=denoised))
    assert guided.dtype == dtype
    assert torch.equal(guided, (denoised.float() + tiny).to(dtype))


def test_an_exactly_zero_delta_changes_nothing() -> None:
    guided = DeltaGuidance(Strength(5.0), IdentityBridge(), RecordingSource(0.0))(step())
    assert torch.equal(guided, DENOISED)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_delta_that_is_not_a_number_stops_the_generation(bad: float) -> None:
    with pytest.raises(DeltaError, match=r"not a number at step 4 \(sigma 2\)"):
        DeltaGuidance(Strength(1.0), IdentityBridge(), RecordingSource(bad))(step())


def denoiser_for(sigmas: list[float], strength: Strength = ALWAYS) -> DeltaDenoiser:
    guidance = DeltaGuidance(strength, IdentityBridge(), RecordingSource())
    return DeltaDenoiser(lambda x, sigma: x / 2, guidance, torch.tensor(sigmas))


def test_progress_runs_from_the_first_level_to_the_last() -> None:
    model = denoiser_for([16.0, 4.0, 1.0, 0.25, 0.0])
    at = [model.progress(torch.tensor([sigma])) for sigma in (20.0, 16.0, 8.0, 4.0, 1.0, 0.25, 0.1)]
    assert at == pytest.approx([0, 0, 1 / 6, 1 / 3, 2 / 3, 1, 1])


def test_a_run_of_one_step_is_its_beginning() -> None:
    assert denoiser_for([14.6, 0.0]).progress(torch.tensor([14.6])) == 0


def test_the_range_holds_over_a_run() -> None:
    model = denoiser_for([16.0, 4.0, 1.0, 0.25, 0.0], Strength(1.0, start=0.3, end=0.7))
    changed = [bool((model(X, torch.full((2,), s)) != X / 2).any()) for s in (16.0, 4.0, 1.0, 0.25)]
    assert changed == [False, True, True, False]
    assert model.steps == 4


def test_the_side_model_has_a_scale_of_its_own_where_the_main_one_says_little() -> None:
    assert side_cfg(7.0, Family.SD1, Family.SDXL) == 7.0
    assert side_cfg(1.0, Family.SD1, Family.SDXL) == side_cfg(2.9, Family.SD1, Family.FLUX) == 3.0
    assert side_cfg(1.0, Family.SD1, Family.SD1) == 1.0
    assert side_cfg(1.0, Family.SD1, Family.SD1, user_scale=2.5) == 2.5
