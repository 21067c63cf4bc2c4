"""Every sampler drives the engine, at strength 0 as if it were not there."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lib_delta.bridges import IdentityBridge
from lib_delta.core.deltas import Deltas
from lib_delta.core.guidance import DeltaDenoiser, DeltaGuidance
from lib_delta.core.steps import DenoiseStep, SourceStep
from lib_delta.core.strength import Strength
from lib_delta.diffusion.parameterization import eps_of, from_timestep_space
from tests.support.samplers import ADAPTED, BASE, SD, SIGMAS, TARGET, k_diffusion_samplers, run
from tests.support.tiny_unet import randn

STOCHASTIC = {"dpm_2_ancestral", "dpmpp_2m_sde", "dpmpp_2s_ancestral", "dpmpp_3m_sde", "dpmpp_sde", "euler_ancestral"}


class WatchedSource:
    """Two closed-form models, and the noisy latents they were shown."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def at_progress(self, progress: float) -> WatchedSource:
        return self

    def deltas(self, step: SourceStep) -> Deltas:
        self.seen.append(step.x.clone())
        delta = ADAPTED(step.x, step.sigma) - BASE(step.x, step.sigma)
        return Deltas(delta, delta)


class WatchedTarget:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return TARGET(x, sigma)


def with_delta(strength: float) -> tuple[DeltaDenoiser, WatchedSource, WatchedTarget]:
    source, target = WatchedSource(), WatchedTarget()
    return DeltaDenoiser(target, DeltaGuidance(Strength(strength), IdentityBridge(), source), SIGMAS), source, target


def test_k_diffusion_has_the_samplers_that_are_tested() -> None:
    pytest.importorskip("k_diffusion")
    assert len(k_diffusion_samplers()) >= 13
    assert set(k_diffusion_samplers()) >= STOCHASTIC


@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_strength_zero_is_plain_sampling_bit_for_bit(name: str) -> None:
    denoise, source, _ = with_delta(0.0)
    assert torch.equal(run(name, denoise), run(name, TARGET))
    assert not source.seen


@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_the_delta_reaches_the_picture(name: str) -> None:
    plain, changed = run(name, TARGET), run(name, with_delta(1.0)[0])
    assert changed.isfinite().all()
    assert (changed - plain).norm() > 0.05 * plain.norm()


@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_the_source_sees_the_targets_own_noise(name: str) -> None:
    """The published code noises a second latent for the source, which drifts away under a stochastic sampler."""
    denoise, source, target = with_delta(1.0)
    run(name, denoise)
    assert len(source.seen) == len(target.seen) >= len(SIGMAS) - 1
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(source.seen, target.seen, strict=True))


@pytest.mark.parametrize("name", sorted(STOCHASTIC & set(k_diffusion_samplers())))
def test_stochastic_samplers_are_stochastic_here(name: str) -> None:
    from k_diffusion import sampling

    first = run(name, TARGET)
    torch.manual_seed(6)
    second = getattr(sampling, f"sample_{name}")(TARGET, 14 * randn(2, 4, 8, 8), SIGMAS, disable=True)
    assert not torch.equal(first, second)


def run_scheduler(name: str, denoise: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
    """Sample in timestep space: x in the variance-preserving scale, eps as the model's answer."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, name)(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    if "clip_sample" in scheduler.config:
        scheduler.register_to_config(clip_sample=False)
    scheduler.set_timesteps(8)
    generator, x = torch.Generator().manual_seed(5), randn(2, 4, 8, 8)
    takes_noise = "generator" in inspect.signature(scheduler.step).parameters
    for i, t in enumerate(scheduler.timesteps):
        k_x, sigma = from_timestep_space(x, t.expand(len(x)), SD)
        eps = eps_of(denoise(k_x, sigma, i / 7), k_x, sigma)
        x = scheduler.step(eps, t, x, **({"generator": generator} if takes_noise else {})).prev_sample
    return x


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "UniPCMultistepScheduler"])
def test_timestep_samplers_drive_the_engine(name: str) -> None:
    def guided(strength: float) -> Tensor:
        guidance = DeltaGuidance(Strength(strength), IdentityBridge(), WatchedSource())
        return run_scheduler(
            name, lambda x, sigma, progress: guidance(DenoiseStep(x, sigma, TARGET(x, sigma), 1.0, progress))
        )

    plain = run_scheduler(name, lambda x, sigma, progress: TARGET(x, sigma))
    assert torch.equal(guided(0.0), plain)
    changed = guided(1.0)
    assert changed.isfinite().all()
    assert (changed - plain).norm() > 0.05 * plain.norm()


def test_ddim_in_timestep_space_is_euler_in_sigma() -> None:
    diffusers = pytest.importorskip("diffusers")
    sampling = pytest.importorskip("k_diffusion.sampling")
    scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(8)
    levels = SD.t_to_sigma(torch.cat((scheduler.timesteps, torch.tensor([0]))))
    start = randn(2, 4, 8, 8) * (levels[0] ** 2 + 1) ** 0.5
    euler = sampling.sample_euler(TARGET, start, levels, disable=True)
    ddim = run_scheduler("DDIMScheduler", lambda x, sigma, progress: TARGET(x, sigma))
    # The scheduler takes its last step to the table's last level, which "set_alpha_to_one" would make 0.
    torch.testing.assert_close(ddim * (levels[-1] ** 2 + 1) ** 0.5, euler, atol=0.03, rtol=0.03)


def asked_again(sample: Callable[[Callable[[Tensor, Tensor], Tensor]], Tensor]) -> tuple[int, int]:
    """Return how often a sampler asks, and how often for a state and a noise level that it has asked for before."""
    seen: list[tuple[bytes, bytes]] = []

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append((x.numpy().tobytes(), sigma.numpy().tobytes()))
        return TARGET(x, sigma)

    sample(denoise)
    return len(seen), len(seen) - len(set(seen))


@pytest.mark.parametrize("name", k_diffusion_samplers())
def test_no_sampler_asks_twice_for_the_same(name: str) -> None:
    """So nothing is kept of an evaluation in case it comes back: a second one of Heun or DPM2 is at another state."""
    asked, again = asked_again(lambda denoise: run(name, denoise))
    assert asked >= len(SIGMAS) - 1 and again == 0


def test_only_a_step_that_dpm_adaptive_rejects_is_asked_for_again() -> None:
    sampling = pytest.importorskip("k_diffusion.sampling")
    told: dict[str, int] = {}

    def sample(denoise: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        start = 14 * randn(2, 4, 8, 8)
        limits = {"rtol": 0.01, "h_init": 2.0, "return_info": True, "disable": True}
        x, info = sampling.sample_dpm_adaptive(denoise, start, 0.1, 14.0, **limits)
        told.update(info)
        return x

    asked, again = asked_again(sample)
    assert told["n_reject"] == again > 0 and asked == told["nfe"]
