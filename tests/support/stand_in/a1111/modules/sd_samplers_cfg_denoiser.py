"""AUTOMATIC1111's guidance: the model evaluates all prompts' rows, then all negative prompts', in one batch."""

import torch
from k_diffusion.external import CompVisDenoiser
from modules import prompt_parser, script_callbacks, shared
from modules.sd_samplers_common import InterruptedException


class AskedAtTimesteps(torch.nn.Module):
    """The model as timestep samplers call it: noise at whole or fractional timesteps."""

    def __init__(self, sd_model):
        super().__init__()
        self.inner_model = sd_model

    def forward(self, x, t, cond):
        return self.inner_model.apply_model(x, t, cond=cond)


def model_for_sigmas(sd_model):
    return CompVisDenoiser(sd_model)


def model_for_timesteps(sd_model):
    return AskedAtTimesteps(sd_model)


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
        self.cond_scale_miltiplier = 1.0
        self.need_last_noise_uncond, self.last_noise_uncond = False, None
        self.mask_before_denoising = self.timesteps

    @property
    def inner_model(self):
        if self.model_wrap is None:
            self.model_wrap = self.make_inner_model(shared.sd_model)
        return self.model_wrap

    def forward(self, x, sigma, cond, uncond, cond_scale, s_min_uncond, image_cond):
        if shared.state.interrupted:
            raise InterruptedException
        numbered, text_cond = prompt_parser.reconstruct_multicond_batch(cond, self.step)
        text_uncond = prompt_parser.reconstruct_cond_batch(uncond, self.step)
        if self.mask_before_denoising:
            x = self._blended(x)
        images = len(numbered)
        edits = shared.sd_model.cond_stage_key == "edit" and self.image_cfg_scale not in (None, 1.0)
        rows = [i for i, parts in enumerate(numbered) for _ in parts]
        rows += [*range(images)] * (2 if edits else 1)
        params = self._call(
            "cfg_denoiser", x=x[rows], sigma=sigma[rows], text_cond=text_cond, text_uncond=text_uncond, denoiser=self
        )
        skipped = self._guidance_is_left_out(float(sigma[0]), s_min_uncond) and not edits
        out = self._evaluate(params, images, skipped, edits)
        first = [parts[0][0] for parts in numbered]
        if skipped:
            out = torch.cat((out, out[first]))
        self._call("cfg_denoised", x=out, inner_model=self.inner_model)
        if self.need_last_noise_uncond:
            self.last_noise_uncond = out[-images:].clone()
        scale = 1.0 if skipped else cond_scale * self.cond_scale_miltiplier
        denoised = self._combined(out, numbered, scale, edits)
        if not self.mask_before_denoising:
            denoised = self._blended(denoised)
        self.sampler.last_latent = out[first]
        shared.state.current_latent = denoised
        denoised = self._call("cfg_after_cfg", x=denoised).x
        self.step += 1
        return denoised

    def _call(self, kind, **fields):
        state = shared.state
        return script_callbacks.call(
            kind, sampling_step=state.sampling_step, total_sampling_steps=state.sampling_steps, **fields
        )

    def _blended(self, x):
        return x if self.mask is None else x * self.nmask + self.init_latent * self.mask

    def _guidance_is_left_out(self, sigma, s_min_uncond):
        early = shared.opts.skip_early_cond
        if early and self.step / self.total_steps <= early:
            return True
        return bool((self.step % 2 or shared.opts.s_min_uncond_all) and s_min_uncond > 0 and sigma < s_min_uncond)

    def _evaluate(self, params, images, skipped, edits):
        cond, uncond = params.text_cond, params.text_uncond
        if skipped:
            return self._model(params.x[:-images], params.sigma[:-images], cond)
        if edits:
            return self._model(params.x, params.sigma, torch.cat((cond, uncond, uncond)))
        missing = cond.shape[1] - uncond.shape[1]
        if missing and shared.opts.pad_cond_uncond_v0:
            uncond = torch.cat((uncond, uncond[:, -1:].repeat(1, max(missing, 0), 1)), 1)[:, : cond.shape[1]]
        elif missing and shared.opts.pad_cond_uncond:
            empty = shared.sd_model.cond_stage_model_empty_prompt
            more = empty.repeat(images, abs(missing) // empty.shape[1], 1)
            if missing > 0:
                uncond = torch.cat((uncond, more), 1)
            else:
                cond = torch.cat((cond, more[:1].expand(len(cond), -1, -1)), 1)
        if cond.shape[1] == uncond.shape[1]:
            return self._model(params.x, params.sigma, torch.cat((cond, uncond)))
        halves = (slice(0, len(cond)), cond), (slice(len(cond), None), uncond)
        return torch.cat([self._model(params.x[rows], params.sigma[rows], context) for rows, context in halves])

    def _model(self, x, sigma, context):
        return self.inner_model(x, sigma, cond={"c_crossattn": [context]})

    def _combined(self, out, numbered, scale, edits):
        if edits:
            cond, image_cond, uncond = out.chunk(3)
            return uncond + scale * (cond - image_cond) + self.image_cfg_scale * (image_cond - uncond)
        uncond = out[-len(numbered) :]
        guided = [
            base + sum(weight * scale * (out[row] - base) for row, weight in parts)
            for base, parts in zip(uncond, numbered)
        ]
        return torch.stack(guided)
