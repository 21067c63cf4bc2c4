"""How far along a pass a WebUI's sampler is, by the noise levels of its own schedule.

Counting calls would not do: second-order samplers call twice a step, DPM adaptive as often as it likes,
and Restart goes back.
"""

from __future__ import annotations

from typing import Any

from modules import sd_samplers_common, shared
from modules.processing import StableDiffusionProcessingImg2Img
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.guidance import Progress
from lib_delta.parameterization import Schedule

KNOWN = "delta_sampling_progress"


def pass_progress(denoiser: Any) -> Progress:
    """Return the progress of the pass that is running; its noise levels are those its sampler asked for."""
    known = getattr(denoiser, KNOWN, None)
    if known is None:
        known = Progress(_levels(denoiser))
        setattr(denoiser, KNOWN, known)
    return known


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
        return Schedule(shared.sd_model.alphas_cumprod).t_to_sigma(timesteps[1:] if len(timesteps) > 1 else timesteps)
    sigmas = sampler.get_sigmas(p, steps)
    return sigmas if encoded is None else sigmas[steps - encoded - 1 :]
