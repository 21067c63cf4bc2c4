"""The common part of both kinds of samplers."""

import torch

from modules import shared


class InterruptedException(BaseException):
    """The user has stopped the generation."""


class SamplerData:
    """A sampler in the page's list."""

    def __init__(self, name, constructor, **options):
        self.name, self.constructor, self.options = name, constructor, options

    def total_steps(self, steps):
        return steps * 2 if self.options.get("second_order") else steps


def setup_img2img_steps(p, steps=None):
    """Return the steps of the whole schedule, and the number of its last steps that are run, minus one."""
    strength = min(p.denoising_strength, 0.999)
    if steps is not None or shared.opts.img2img_fix_steps:
        wanted = steps or p.steps
        return (int(wanted / strength) if strength > 0 else 0), wanted - 1
    return p.steps, int(strength * p.steps)


class Sampler:
    """A sampler that is about to run, with its denoiser."""

    def __init__(self, function, denoiser_class):
        self.func = function
        self.config = None
        self.last_latent = None
        self.sampler_extra_args = None
        self.model_wrap_cfg = denoiser_class(self)
        self.model_wrap = self.model_wrap_cfg.inner_model

    def run(self, p, steps, x, conds, init_latent=None, **arguments):
        denoiser = self.model_wrap_cfg
        denoiser.p, denoiser.step, denoiser.init_latent = p, 0, init_latent
        denoiser.mask, denoiser.nmask = getattr(p, "mask", None), getattr(p, "nmask", None)
        denoiser.image_cfg_scale = getattr(p, "image_cfg_scale", None)
        denoiser.steps, denoiser.total_steps = steps, self.config.total_steps(steps)
        shared.state.sampling_steps = steps
        self.last_latent = x
        cond, uncond = conds
        self.sampler_extra_args = {
            "cond": cond,
            "uncond": uncond,
            "cond_scale": p.cfg_scale,
            "s_min_uncond": p.s_min_uncond,
            "image_cond": x.new_zeros(len(x), 5, 1, 1),
        }

        def note(progress):
            shared.state.sampling_step = progress["i"]

        try:
            with torch.no_grad():
                return self.func(
                    denoiser, x, extra_args=self.sampler_extra_args, disable=True, callback=note, **arguments
                )
        except InterruptedException:
            return self.last_latent
