"""k-diffusion's samplers, which work with ``x0 + sigma * noise`` and denoised estimates."""

import inspect
from itertools import pairwise

import torch
from k_diffusion import sampling

from modules import shared
from modules.sd_samplers_cfg_denoiser import CFGDenoiser, model_for_sigmas
from modules.sd_samplers_common import Sampler, SamplerData, setup_img2img_steps


class CFGDenoiserKDiffusion(CFGDenoiser):
    """The denoiser for k-diffusion's samplers."""

    make_inner_model = staticmethod(model_for_sigmas)


@torch.no_grad()
def restart(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler steps, with noise added once to go back from the last third to the first (arXiv 2306.14878)."""
    low, high = 2 * (len(sigmas) - 1) // 3, 1
    back = [(sigmas[low], sigmas[high]), *zip(sigmas[high:low], sigmas[high + 1 : low + 1])]
    levels = list(pairwise(sigmas))
    for now, then in [*levels[:low], *back, *levels[low:]]:
        if then > now:
            x = x + torch.randn_like(x) * (then**2 - now**2) ** 0.5
        else:
            denoised = model(x, now * x.new_ones(len(x)), **extra_args)
            x = x + sampling.to_d(x, now, denoised) * (then - now)
    return x


class KDiffusionSampler(Sampler):
    """A sampler by sigmas."""

    def __init__(self, function):
        super().__init__(function, CFGDenoiserKDiffusion)

    def get_sigmas(self, p, steps):
        table = self.model_wrap.sigmas
        scheduler = (p.hr_scheduler if p.is_hr_pass else p.scheduler) or "Automatic"
        if scheduler == "Automatic":
            scheduler = self.config.options.get("scheduler")
        if scheduler == "karras":
            return sampling.get_sigmas_karras(steps, float(table[0]), float(table[-1]))
        return self.model_wrap.get_sigmas(steps).cpu()

    def arguments(self, p, sigmas, x):
        """Return the function's arguments after the state."""
        arguments = {"eta": p.eta, "s_churn": p.s_churn, "n": len(sigmas) - 1, "sigmas": sigmas}
        arguments |= {"sigma_min": sigmas[-2], "sigma_max": sigmas[0]}
        taken = inspect.signature(self.func).parameters
        found = {name: value for name, value in arguments.items() if name in taken and value is not None}
        if "noise_sampler" in taken and self.config.options.get("brownian"):
            low, high = sigmas[sigmas > 0].min(), sigmas.max()
            found["noise_sampler"] = sampling.BrownianTreeNoiseSampler(x, low, high, seed=p.seeds)
        return found

    def sample(self, p, x, cond, uncond):
        sigmas = self.get_sigmas(p, p.steps)
        return self.run(p, p.steps, x * sigmas[0], (cond, uncond), **self.arguments(p, sigmas, x))

    def sample_img2img(self, p, x, noise, cond, uncond, steps=None):
        steps, encoded = setup_img2img_steps(p, steps)
        sigmas = self.get_sigmas(p, steps)[steps - encoded - 1 :]
        noisy = shared.sd_model.noised(x, noise, sigmas[0])
        return self.run(p, encoded + 1, noisy, (cond, uncond), x, **self.arguments(p, sigmas, x))


def _data(name, function, **options):
    if isinstance(function, str):
        function = getattr(sampling, f"sample_{function}")
    return SamplerData(name, lambda: KDiffusionSampler(function), **options)


samplers = [
    _data("Euler", "euler"),
    _data("Euler a", "euler_ancestral"),
    _data("LMS", "lms"),
    _data("Heun", "heun", second_order=True),
    _data("DPM2", "dpm_2", scheduler="karras", second_order=True),
    _data("DPM fast", "dpm_fast"),
    _data("DPM++ 2M", "dpmpp_2m", scheduler="karras"),
    _data("DPM++ SDE", "dpmpp_sde", scheduler="karras", second_order=True, brownian=True),
    _data("Restart", restart, second_order=True),
]
