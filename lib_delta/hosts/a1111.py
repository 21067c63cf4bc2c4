"""AUTOMATIC1111's WebUI, 1.9 and 1.10.

``CFGDenoiser`` calls back before the model, with the rows it is about to evaluate, and after it, with
what came out.  The latter is edited in place, so that guidance adds up to the target's estimate with
the delta, before masks are blended in and previews are taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, lowvram, script_callbacks, shared
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.deltas import Deltas, Weights, each, of_images
from lib_delta.errors import SettingError
from lib_delta.families import Family
from lib_delta.guidance import DenoiseStep
from lib_delta.hosts.others import taken_over
from lib_delta.hosts.place import wanted_place
from lib_delta.hosts.progress import pass_progress
from lib_delta.hosts.target import Target
from lib_delta.hosts.told import TextEngine
from lib_delta.hosts.webui import RUN, Host
from lib_delta.parameterization import Schedule, denoised_of, from_timestep_space, per_image

if TYPE_CHECKING:
    from lib_delta.hosts.run import Run
    from lib_delta.models.merging import TokenMerging
    from lib_delta.sidemodel import SideModel


@dataclass(frozen=True)
class Call:
    """One call of ``CFGDenoiser.forward``, as its first callback sees it.

    ``params`` is what that callback was given, and what the model evaluates once all callbacks are through.  ``rows``
    gives, for every row of it, its image's number; ``weights`` for each image the weights of its prompts
    joined by AND.  In ``eps`` the rows that come out are noise.
    """

    run: Run
    hires: bool
    params: Any
    x: Tensor
    sigma: Tensor
    progress: float
    step: int
    cfg_scale: float
    weights: Weights
    rows: Tensor
    eps: bool
    image_cfg_scale: float | None
    may_skip: bool


class Automatic1111(Host):
    """The original WebUI."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        super().__init__()
        self._engine: tuple[SideModel, TextEngine] | None = None
        # Between the two callbacks of one call: the second is told nothing of the first's.
        self._call: Call | None = None

    def install(self) -> None:
        script_callbacks.on_cfg_denoiser(self._before_model)
        script_callbacks.on_cfg_denoised(self._after_model)

    def target(self) -> Target:
        family = family_of(shared.sd_model)
        if family is Family.SD3:  # of flow matching, whatever ``parameterization`` says
            return Target(family, math.inf, flow=True)
        return Target(family, Schedule(shared.sd_model.alphas_cumprod).sigma_max, merging=_merging(shared.sd_model))

    def place(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = devices.device
        return device, torch.float32 if device.type == "cpu" else devices.dtype_unet

    def text_engine(self, model: SideModel) -> TextEngine:
        from lib_delta.hosts.text_a1111 import Engine

        if self._engine is None or self._engine[0] is not model:
            self._engine = model, Engine(model)
        return self._engine[1]

    def forget(self) -> None:
        self._engine = None

    def text_device(self) -> torch.device:
        return wanted_place(*self.place())[0]

    def enter(self, p: Any, model: SideModel) -> None:
        device = wanted_place(*self.place())[0]
        short = _low_memory() and device.type == devices.device.type
        if short:
            lowvram.send_everything_to_cpu()
        if self.streamed():
            model.stream(device)
        elif short:
            model.visit(device)
        else:
            model.place(device)

    def leave(self, model: SideModel) -> None:
        model.wait()
        if _low_memory():
            self.free_memory()

    def free_memory(self) -> None:
        devices.torch_gc()

    def before_sampling(self, p: Any) -> None:
        """Do nothing: callbacks and memory serve all passes alike."""

    def _before_model(self, params: Any) -> None:
        self._call = None
        run: Run | None = getattr(params.denoiser.p, RUN, None)
        if run is None:
            return
        with run.watched("reading a step's state for Delta Sampling"):
            hires = bool(getattr(params.denoiser.p, "is_hr_pass", False))
            call = _call(run, hires, params)
            run.levels[hires] = pass_progress(params.denoiser).levels
            if run.strength(call.progress, hires):
                self._call = call
                # So extensions cut pictures into tiles and add ControlNets.
                unet = getattr(shared.sd_model.model, "diffusion_model", None)
                run.unfollowed |= taken_over(params.denoiser.inner_model, unet)

    def _after_model(self, params: Any) -> None:
        call, self._call = self._call, None
        if call is not None:
            with call.run.watched("adding the delta of Delta Sampling"):
                self._add(call, params)

    def _add(self, call: Call, params: Any) -> None:
        """Edit the rows that the model gave so that guidance gives the target's estimate with the delta."""
        places = _places(call)
        out = params.x[places].float()
        estimates = denoised_of(out, call.x[call.rows], call.sigma[call.rows]) if call.eps else out
        skipped = _uncond_skipped(params.x, call)
        scale = 1.0 if skipped else call.cfg_scale
        denoised = _guided(estimates, call, scale)
        step = DenoiseStep(call.x, call.sigma, denoised, call.cfg_scale, call.progress, call.step, skipped)
        changes = call.run.changes(step, self.target, call.hires)
        if changes is None:
            return
        if call.eps:
            changes = each(lambda images, change: -change / per_image(of_images(call.sigma, images), change), changes)
        params.x[places] += _row_changes(changes, scale, call).to(params.x)


def _call(run: Run, hires: bool, params: Any) -> Call:
    denoiser = params.denoiser
    extra = denoiser.sampler.sampler_extra_args
    weights = tuple(tuple(float(part.weight) for part in image) for image in extra["cond"].batch)
    images = len(weights)
    counts = torch.tensor([len(image) for image in weights])
    # An editing model (InstructPix2Pix) has two rows of each image without the prompt.
    without_prompt = (len(params.x) - int(counts.sum())) // images
    every = torch.arange(images)
    rows = torch.cat((every.repeat_interleave(counts), every.repeat(without_prompt))).to(params.x.device)
    x, sigma = params.x[-images:].float(), params.sigma[-images:].float()
    timesteps = isinstance(denoiser, CFGDenoiserTimesteps)
    if timesteps:
        if family_of(shared.sd_model) is Family.SD3:
            raise SettingError(
                f"the sampler {denoiser.p.sampler_name} asks for noise at timesteps, and SD 3 knows neither: "
                "choose another sampler"
            )
        x, sigma = from_timestep_space(x, sigma, Schedule(shared.sd_model.alphas_cumprod))
    return Call(
        run=run,
        hires=hires,
        params=params,
        x=x,
        sigma=sigma,
        progress=pass_progress(denoiser)(sigma),
        step=denoiser.step,
        cfg_scale=_cfg_scale(denoiser, float(extra["cond_scale"])),
        weights=weights,
        rows=rows,
        eps=timesteps,
        image_cfg_scale=denoiser.image_cfg_scale if without_prompt == 2 else None,
        may_skip=_may_skip(denoiser, float(params.sigma[0]), float(extra.get("s_min_uncond") or 0)),
    )


def _places(call: Call) -> Tensor:
    """Return where each row is that the model evaluated: extensions (Regional Prompter) move those of batches about.

    An image's rows are known by its latent, and keep their order.
    """
    x, images = call.params.x, call.params.x[-len(call.weights) :]
    count, own = len(x) - len(images), call.rows
    unmoved = torch.arange(len(x), device=x.device)
    if torch.equal(x, images[own]) or call.image_cfg_scale is not None:
        return unmoved
    found = [(x[:count] == image).flatten(1).all(1).nonzero()[:, 0] for image in images]
    if [len(places) for places in found] != [len(weights) for weights in call.weights]:
        return unmoved
    return torch.cat((*found, unmoved[count:]))


def _cfg_scale(denoiser: Any, stated: float) -> float:
    """Return the scale at which rows are combined; CFG++ samplers work with the negative prompt's at any scale."""
    scale = stated * float(getattr(denoiser, "cond_scale_miltiplier", 1.0))
    # At 1 exactly the source would be asked for the prompt alone.
    return scale + 2**-20 if scale == 1 and getattr(denoiser, "need_last_noise_uncond", False) else scale


def _may_skip(denoiser: Any, level: float, limit: float) -> bool:
    """Tell whether the WebUI's settings have it leave out guidance in this step; by its own rules (``CFGDenoiser``)."""
    early = float(getattr(shared.opts, "skip_early_cond", 0) or 0)
    if early and denoiser.step / max(denoiser.total_steps, 1) <= early:
        return True
    every = bool(denoiser.step % 2 or getattr(shared.opts, "s_min_uncond_all", False))
    return every and limit > 0 and level < limit


def _uncond_skipped(out: Tensor, call: Call) -> bool:
    """Tell whether guidance was left out to save time: the WebUI then repeats each image's first prompt.

    Where its settings leave nothing out, rows are the same because the prompts are.
    """
    if not call.may_skip:
        return False
    images = len(call.weights)
    counts = torch.tensor([len(image) for image in call.weights])
    first = counts.cumsum(0) - counts
    return call.image_cfg_scale is None and torch.equal(out[-images:], out[first.to(out.device)])


def _guided(estimates: Tensor, call: Call, cfg_scale: float) -> Tensor:
    """Combine the estimates of all rows to one for each image, as ``CFGDenoiser`` is about to."""
    images = len(call.weights)
    if call.image_cfg_scale is not None:
        cond, image_cond, uncond = estimates.chunk(3)
        return uncond + cfg_scale * (cond - image_cond) + call.image_cfg_scale * (image_cond - uncond)
    uncond, cond = estimates[-images:], estimates[:-images]
    weights = torch.tensor([w for image in call.weights for w in image]).to(estimates)
    rows = call.rows[: len(cond)]
    return uncond.clone().index_add_(0, rows, (cond - uncond[rows]) * per_image(cfg_scale * weights, cond))


def _row_changes(changes: Deltas, cfg_scale: float, call: Call) -> Tensor:
    """Return what to add to each row, so that guidance adds up to ``changes.guided``.

    The same for all rows would do, but CFG++ samplers look at the negative prompt's rows by themselves, previews and
    interrupted pictures are the prompt's, and extensions give each of AND's parts a region of its own: each row gets
    what the adaptation changes in it, where the side model is told the same parts.
    """
    guided, uncond, parts = changes
    if call.image_cfg_scale is not None:
        return guided[call.rows]
    rows = call.rows[: -len(call.weights)]
    if parts is not None and parts.weights == call.weights and abs(cfg_scale) > 0.01:
        return torch.cat((uncond[rows] + (parts.change - uncond[rows]) / cfg_scale, uncond))
    share = cfg_scale * torch.tensor([sum(image) for image in call.weights]).to(guided)
    if not bool((share.abs() > 0.01).all()):
        return guided[call.rows]
    cond = uncond + (guided - uncond) / per_image(share, guided)
    return torch.cat((cond[rows], uncond))


def family_of(model: Any) -> Family:
    """Tell the family of the WebUI's checkpoint."""
    if getattr(model, "is_sdxl", False):
        return Family.SDXL
    if getattr(model, "is_sd3", False):
        return Family.SD3
    return Family.SD2 if getattr(model, "is_sd2", False) else Family.SD1


def _merging(model: Any) -> TokenMerging | None:
    from lib_delta.models.merging import TokenMerging

    ratio = float(getattr(model, "applied_token_merged_ratio", 0) or 0)
    return TokenMerging(ratio) if ratio > 0 else None


def _low_memory() -> bool:
    return bool(lowvram.is_enabled(shared.sd_model))


def running() -> Automatic1111:
    """Return the WebUI that is running."""
    return Automatic1111()
