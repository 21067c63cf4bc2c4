"""Samplers by timesteps, with ``sqrt(a) * x0 + sqrt(1 - a) * noise`` and predicted noise."""

from itertools import pairwise

import torch

from modules import shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser, model_for_timesteps
from modules.sd_samplers_common import Sampler, SamplerData, setup_img2img_steps


class CFGDenoiserTimesteps(CFGDenoiser):
    """The denoiser for samplers by timesteps."""

    timesteps = True
    make_inner_model = staticmethod(model_for_timesteps)


def _move(x, eps, a, a_prev, noise=None):
    x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
    return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * (eps if noise is None else noise)


def _levels(timesteps):
    """Return the run's timesteps, noisiest first, each with its level and the next one's."""
    table = shared.sd_model.alphas_cumprod.double()
    falling = timesteps.flip(0)
    return [(float(t), float(table[t]), float(table[then])) for t, then in pairwise(falling)]


@torch.no_grad()
def ddim(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """Move along the predicted noise (arXiv 2010.02502)."""
    for t, a, a_prev in _levels(timesteps):
        x = _move(x, model(x, t * x.new_ones(len(x)), **extra_args), a, a_prev)
    return x


@torch.no_grad()
def ddim_cfg_pp(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """Move along the noise predicted for the negative prompt (arXiv 2406.08070)."""
    model.need_last_noise_uncond = True
    model.cond_scale_miltiplier = 1 / 12.5
    for t, a, a_prev in _levels(timesteps):
        eps = model(x, t * x.new_ones(len(x)), **extra_args)
        x = _move(x, eps, a, a_prev, model.last_noise_uncond)
    return x


@torch.no_grad()
def between(model, x, timesteps, extra_args=None, callback=None, disable=None):
    """Also evaluate half-way between timesteps, as UniPC does at fractional ones; some repeat."""
    for t, a, a_prev in _levels(timesteps):
        eps = model(x, t * x.new_ones(len(x)), **extra_args)
        middle = model(x, (t - 0.5) * x.new_ones(len(x)), **extra_args)
        again = model(x, t * x.new_ones(len(x)), **extra_args)
        x = _move(x, 0.5 * eps + 0.3 * middle + 0.2 * again, a, a_prev)
    return x


class CompVisSampler(Sampler):
    """A sampler by timesteps."""

    def __init__(self, function):
        super().__init__(function, CFGDenoiserTimesteps)

    def get_timesteps(self, p, steps):
        return (torch.arange(0, 1000, 1000 // steps) + 1).clamp(max=999)

    def sample(self, p, x, cond, uncond):
        return self.run(p, p.steps, x, (cond, uncond), timesteps=self.get_timesteps(p, p.steps))

    def sample_img2img(self, p, x, noise, cond, uncond, steps=None):
        steps, encoded = setup_img2img_steps(p, steps)
        timesteps = self.get_timesteps(p, steps)
        a = shared.sd_model.alphas_cumprod[timesteps[encoded]]
        noisy = x * a.sqrt() + noise * (1 - a).sqrt()
        return self.run(p, encoded + 1, noisy, (cond, uncond), x, timesteps=timesteps[:encoded])


samplers = [
    SamplerData("DDIM", lambda: CompVisSampler(ddim)),
    SamplerData("DDIM CFG++", lambda: CompVisSampler(ddim_cfg_pp)),
    SamplerData("UniPC", lambda: CompVisSampler(between)),
]
