"""How far along a pass a WebUI's sampler is, by the noise levels of its own schedule.

Counting calls would not do: second-order samplers call twice a step, DPM adaptive as often as it likes,
and Restart goes back.
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

CACHE_ATTRIBUTE = "delta_sampling_known"
Made = TypeVar("Made")


def once_per_pass(denoiser: Any, key: object, make: Callable[[], Made]) -> Made:
    """Return what ``make`` makes, which is made once in the pass that is running, of which a denoiser is."""
    known: dict[object, Made] = vars(denoiser).setdefault(CACHE_ATTRIBUTE, {})
    if key not in known:
        known[key] = make()
    return known[key]


def schedule_of(alphas_cumprod: Tensor) -> Schedule:
    """Return the schedule of a model's table, which is brought from its device only when it is another than before."""
    return _schedule(alphas_cumprod, _version(alphas_cumprod))


def largest_sigma(sigmas: Tensor) -> float:
    """Return the largest noise level of a model's table, looked for only when it is another than before."""
    return _largest(sigmas, _version(sigmas))


def _version(table: Tensor) -> int:
    """Return what tells whether a tensor was written to; those made in inference mode do not say."""
    return 0 if table.is_inference() else table._version


@functools.lru_cache(maxsize=2)
def _schedule(alphas_cumprod: Tensor, _version: int) -> Schedule:
    return Schedule(alphas_cumprod)


@functools.lru_cache(maxsize=2)
def _largest(sigmas: Tensor, _version: int) -> float:
    return float(sigmas.max())


def pass_progress(denoiser: Any) -> Progress:
    """Return the progress of the pass that is running; its noise levels are those its sampler asked for."""
    return once_per_pass(denoiser, Progress, lambda: Progress(_levels(denoiser)))


def _levels(denoiser: Any) -> Tensor:
    """Return the noise levels of the pass: its sampler's schedule, of which img2img runs the last part."""
    p, sampler = denoiser.p, denoiser.sampler
    steps, encoded = p.steps, None
    if getattr(p, "is_hr_pass", False):
        steps, encoded = sd_samplers_common.setup_img2img_steps(p, p.hr_second_pass_steps or p.steps)
    elif isinstance(p, StableDiffusionProcessingImg2Img):
        steps, encoded = sd_samplers_common.setup_img2img_steps(p)
    if isinstance(denoiser, CFGDenoiserTimesteps):
        timesteps = sampler.get_timesteps(p, steps).cpu()[:encoded]
        # The lowest is where the run ends, and no level at which a model is asked, unless there is no other.
        asked = timesteps[1:] if len(timesteps) > 1 else timesteps
        return schedule_of(shared.sd_model.alphas_cumprod).t_to_sigma(asked)
    sigmas = sampler.get_sigmas(p, steps)
    return sigmas if encoded is None else sigmas[steps - encoded - 1 :]
