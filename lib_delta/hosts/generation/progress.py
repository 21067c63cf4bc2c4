"""The progress of a pass, read from the noise levels of the sampler's schedule.

Counting calls would not work: second-order samplers call twice a step, DPM adaptive any number of times, and Restart
goes back to earlier levels.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from modules import sd_samplers_common, shared
from modules.processing import StableDiffusionProcessingImg2Img
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.core.progress import Progress
from lib_delta.diffusion.parameterization import Schedule

CACHE_ATTRIBUTE = "delta_sampling_pass_cache"
Value = TypeVar("Value")


def once_per_pass(denoiser: Any, key: object, make: Callable[[], Value]) -> Value:
    """Return ``make()``, which is called once for each pass; every pass has its own denoiser."""
    cache: dict[object, Value] = vars(denoiser).setdefault(CACHE_ATTRIBUTE, {})
    if key not in cache:
        cache[key] = make()
    return cache[key]


def schedule_of(alphas_cumprod: Tensor) -> Schedule:
    """Return the schedule of a model's table; reads the table from its device only if it has changed."""
    return _schedule(alphas_cumprod, _version(alphas_cumprod))


def largest_sigma(sigmas: Tensor) -> float:
    """Return the largest noise level of a model's table; reads the table from its device only if it has changed."""
    return _largest(sigmas, _version(sigmas))


def _version(table: Tensor) -> int:
    """Return a number that changes when a tensor is written to; always 0 for one made in inference mode."""
    return 0 if table.is_inference() else table._version


@functools.lru_cache(maxsize=2)
def _schedule(alphas_cumprod: Tensor, _version: int) -> Schedule:
    return Schedule(alphas_cumprod)


@functools.lru_cache(maxsize=2)
def _largest(sigmas: Tensor, _version: int) -> float:
    return float(sigmas.max())


def pass_progress(denoiser: Any) -> Progress:
    """Return the progress of the running pass, by the noise levels that its sampler evaluates."""
    return once_per_pass(denoiser, Progress, lambda: Progress(_levels(denoiser)))


def _levels(denoiser: Any) -> Tensor:
    """Return the noise levels of the pass: its sampler's schedule, or the last part of it in img2img."""
    p, sampler = denoiser.p, denoiser.sampler
    steps, img2img_steps = p.steps, None
    if getattr(p, "is_hr_pass", False):
        steps, img2img_steps = sd_samplers_common.setup_img2img_steps(p, p.hr_second_pass_steps or p.steps)
    elif isinstance(p, StableDiffusionProcessingImg2Img):
        steps, img2img_steps = sd_samplers_common.setup_img2img_steps(p)
    if isinstance(denoiser, CFGDenoiserTimesteps):
        timesteps = sampler.get_timesteps(p, steps).cpu()[:img2img_steps]
        # The run ends at the lowest timestep, and evaluates no model there unless it is the only one.
        evaluated = timesteps[1:] if len(timesteps) > 1 else timesteps
        return schedule_of(shared.sd_model.alphas_cumprod).t_to_sigma(evaluated)
    sigmas = sampler.get_sigmas(p, steps)
    return sigmas if img2img_steps is None else sigmas[steps - img2img_steps - 1 :]
