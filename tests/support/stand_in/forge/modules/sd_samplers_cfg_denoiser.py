"""Forge's guidance: all samplers' states in one scale, functions after guidance, then the mask."""

import math

import torch
from backend.sampling.sampling_function import calc_cond_uncond_batch, compiled, sampling_prepare
from k_diffusion.external import DiscreteSchedule
from modules import prompt_parser, script_callbacks, shared
from modules.sd_samplers_common import InterruptedException


class Linked(DiscreteSchedule):
    """The model's schedule, where denoisers look for it."""

    def __init__(self, sd_model):
        super().__init__(sd_model.forge_objects.unet.model.predictor.sigmas, quantize=False)
        self.inner_model = sd_model


def model_for_sigmas(sd_model):
    return Linked(sd_model)


def model_for_timesteps(sd_model):
    sd_model.alphas_cumprod = 1 / (sd_model.forge_objects.unet.model.predictor.sigmas**2 + 1)
    return Linked(sd_model)


class CFGDenoiser(torch.nn.Module):
    """The denoiser that samplers call."""

    timesteps = False

    def __init__(self, sampler):
        super().__init__()
        self.sampler, self.p = sampler, None
        self.model_wrap = None
        self.step, self.steps, self.total_steps = 0, None, None
        self.mask = self.nmask = self.init_latent = None
        self.image_cfg_scale = None
        self.need_last_noise_uncond, self.last_noise_uncond = False, None

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = self.make_inner_model(shared.sd_model)
        return self.model_wrap

    def forward(self, x, sigma, cond, uncond, cond_scale, s_min_uncond, image_cond, model_options=None):
        if shared.state.interrupted:
            raise InterruptedException
        if self.step == 0:
            sampling_prepare(self.inner_model.inner_model.forge_objects.unet, x=x)
        if self.timesteps:
            sigma = self.inner_model.sigmas[sigma.round().long()]
            x = x * (1 + sigma**2).sqrt()[:, None, None, None]
        s = sigma[:, None, None, None]
        numbered, text_cond = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        text_uncond = None if uncond is None else prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask is not None:
            x = x * self.nmask + shared.sd_model.noised(self.init_latent, torch.randn_like(x), s) * self.mask
        self._call("cfg_denoiser", x=x, sigma=sigma, text_cond=text_cond, text_uncond=text_uncond, denoiser=self)
        if self.p.is_hr_pass:
            cond_scale = self.p.hr_cfg
        if self._guidance_is_left_out(float(sigma[0]), s_min_uncond):
            cond_scale = 1.0
        options = model_options or {}  # set by samplers of reForge
        denoised, negative = self._guided(x, sigma, text_cond, text_uncond, numbered, cond_scale, options)
        if self.need_last_noise_uncond:
            self.last_noise_uncond = (x - negative) / s
        if self.mask is not None:
            denoised = denoised * self.nmask + self.init_latent * self.mask
        self.sampler.last_latent = shared.state.current_latent = denoised
        denoised = self._call("cfg_after_cfg", x=denoised).x
        self.step += 1
        return (x - denoised) / s if self.timesteps else denoised

    def _call(self, kind, **fields):
        state = shared.state
        return script_callbacks.call(
            kind, sampling_step=state.sampling_step, total_sampling_steps=state.sampling_steps, **fields
        )

    def _guidance_is_left_out(self, sigma, s_min_uncond):
        early = shared.opts.skip_early_cond
        if early and self.step / self.total_steps <= early:
            return True
        return bool((self.step % 2 or shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma < s_min_uncond)

    def _guided(self, x, sigma, text_cond, text_uncond, numbered, scale, options):
        unet = self.inner_model.inner_model.forge_objects.unet
        options = {**unet.model_options, **options}
        # As many parts as every image has; all images get the weights of the last one.
        parts = list(zip(*numbered))
        weights = [part[-1][1] for part in parts]
        cond = [compiled(text_cond[[row for row, _ in part]], weight) for part, weight in zip(parts, weights)]
        uncond = None if text_uncond is None else [compiled(text_uncond)]
        asked = None if math.isclose(scale, 1.0) else uncond
        positive, negative, uncond = self._evaluated(unet.model, cond, asked, uncond, x, sigma, options)
        denoised = negative + (positive - negative) * scale * sum(weights)
        for function in options.get("sampler_post_cfg_function", []):
            denoised = function(
                {
                    "denoised": denoised,
                    "cond": cond,
                    "uncond": uncond,
                    "cond_denoised": positive,
                    "uncond_denoised": negative,
                    "model": unet.model,
                    "model_options": options,
                    "sigma": sigma,
                    "input": x,
                }
            )
        return denoised, negative

    def _evaluated(self, model, cond, asked, uncond, x, sigma, options):
        """Return both estimates, and the negative prompt for functions after guidance.

        Functions before guidance may skip the negative prompt.
        """
        for function in options.get("sampler_pre_cfg_function", []):
            model, cond, asked, x, sigma, options = function(model, cond, asked, x, sigma, options)
        return *calc_cond_uncond_batch(model, cond, asked, x, sigma, options), uncond


def evaluated_in_reforge(self, model, cond, asked, _uncond, x, sigma, options):
    """As :meth:`CFGDenoiser._evaluated`; functions get the estimates, and the negative prompt as evaluated."""
    estimates = calc_cond_uncond_batch(model, cond, asked, x, sigma, options)
    for function in options.get("sampler_pre_cfg_function", []):
        estimates = function({"conds": [cond, asked], "conds_out": estimates, "input": x, "sigma": sigma})
    return *estimates, asked
