"""The samplers of the paper's comparison (arXiv 2512.03056, Figure 5) and other common ones, with one signature.

k-diffusion's are called directly; DDIM, DDPM and UniPC are diffusers' schedulers, driven in timestep space.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from lib_delta.diffusion.parameterization import Schedule, eps_of, from_timestep_space
from lib_delta.errors import SettingError

Denoiser = Callable[..., Tensor]
K_DIFFUSION = ("euler", "heun", "dpm_2", "dpmpp_2m", "euler_ancestral", "dpmpp_sde", "dpmpp_2m_sde", "lms")
DIFFUSERS = {"ddim": "DDIMScheduler", "ddpm": "DDPMScheduler", "unipc": "UniPCMultistepScheduler"}
NAMES = (*K_DIFFUSION, "gradient_estimation", *DIFFUSERS)


def prepare(sampler: str, schedule: Schedule) -> None:
    """Import the modules that ``sampler`` needs, which takes seconds, so that timings of pictures exclude it.

    Raises :class:`SettingError` for a sampler that is unknown or cannot follow ``schedule``.
    """
    if sampler not in NAMES:
        raise SettingError(f"sampler must be one of {', '.join(NAMES)}, not {sampler!r}")
    if sampler not in DIFFUSERS:
        import k_diffusion.sampling  # noqa: F401
    elif schedule.sigma_max > Schedule.stable_diffusion().sigma_max:
        # diffusers' schedulers are set up below for the usual schedule.
        raise SettingError(
            f"sampler {sampler} cannot run a target of zero terminal SNR: choose {', '.join(K_DIFFUSION)}"
        )
    else:
        _scheduler(sampler, 2)


def noise_levels(steps: int, schedule: Schedule) -> Tensor:
    """Return ``(steps + 1,)`` noise levels, evenly spaced in timesteps, from the schedule's highest to 0."""
    t = torch.linspace(len(schedule.log_sigmas) - 1, 0, steps)
    return torch.cat((schedule.t_to_sigma(t), torch.zeros(1)))


def run_levels(sampler: str, steps: int, schedule: Schedule) -> Tensor:
    """Return the noise levels at which ``sampler`` evaluates, highest first, with a final 0."""
    if sampler not in DIFFUSERS:
        return noise_levels(steps, schedule)
    t = _scheduler(sampler, steps).timesteps.float()
    return torch.cat((schedule.t_to_sigma(t), torch.zeros(1)))


def sample(sampler: str, denoiser: Denoiser, noise: Tensor, steps: int, schedule: Schedule, seed: int) -> Tensor:
    """Denoise unit noise ``(N, C, H, W)`` and return the latents.

    ``denoiser`` is ``(x, sigma) -> denoised``; ``seed`` governs the noise that stochastic samplers add.
    Raises :class:`SettingError` for an unknown sampler.
    """
    prepare(sampler, schedule)
    if sampler in DIFFUSERS:
        return _in_timestep_space(sampler, denoiser, noise, steps, schedule, seed)
    sigmas = noise_levels(steps, schedule).to(noise.device)
    x = noise * sigmas[0]
    if sampler == "gradient_estimation":
        return gradient_estimation(denoiser, x, sigmas)
    return denoise_from(sampler, denoiser, x, sigmas, seed)


def denoise_from(sampler: str, denoiser: Denoiser, x: Tensor, sigmas: Tensor, seed: int) -> Tensor:
    """Run a k-diffusion sampler from ``x`` at ``sigmas[0]`` along ``sigmas``."""
    import k_diffusion.sampling

    torch.manual_seed(seed)
    options: dict[str, Any] = {"disable": True}
    if "sde" in sampler:
        ends = sigmas[sigmas > 0].min(), sigmas.max()
        options["noise_sampler"] = k_diffusion.sampling.BrownianTreeNoiseSampler(x, *ends, seed=seed)
    return getattr(k_diffusion.sampling, f"sample_{sampler}")(denoiser, x, sigmas, **options)


def gradient_estimation(denoiser: Denoiser, x: Tensor, sigmas: Tensor, gamma: float = 2.0) -> Tensor:
    """Sample by gradient estimation (Permenter & Yuan 2023, arXiv 2306.04848, algorithm 2).

    The direction of each step is ``gamma`` times the new estimate of the noise less ``gamma - 1`` times the last.
    """
    last: Tensor | None = None
    for here, there in pairwise(sigmas):
        denoised = denoiser(x, here.expand(len(x)))
        if there == 0:
            return denoised
        direction = (x - denoised) / here
        estimate = direction if last is None else gamma * direction + (1 - gamma) * last
        x, last = x + (there - here) * estimate, direction
    return x


def _scheduler(sampler: str, steps: int) -> Any:
    import diffusers

    settings = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    if sampler == "ddim":
        settings["set_alpha_to_one"] = False
    if sampler != "unipc":
        settings["clip_sample"] = False
    scheduler = getattr(diffusers, DIFFUSERS[sampler])(**settings)
    scheduler.set_timesteps(steps)
    return scheduler


def _in_timestep_space(
    sampler: str, denoiser: Denoiser, noise: Tensor, steps: int, schedule: Schedule, seed: int
) -> Tensor:
    scheduler = _scheduler(sampler, steps)
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator} if sampler == "ddpm" else {}
    state = noise
    for t in scheduler.timesteps:
        x, sigma = from_timestep_space(state, t.float().to(state.device).expand(len(state)), schedule)
        eps = eps_of(denoiser(x, sigma), x, sigma)
        state = scheduler.step(eps, t, state, **options).prev_sample
    return state
