"""AUTOMATIC1111's WebUI, 1.9 and 1.10.

``CFGDenoiser`` calls back before the model, with the rows it is about to evaluate, and after it, with
what came out.  The latter is edited in place, so that guidance adds up to the target's estimate with
the delta, before masks are blended in and previews are taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, lowvram, script_callbacks, shared
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.deltas import Deltas, Weights, each, of_images
from lib_delta.devices import free_memory
from lib_delta.errors import SettingError
from lib_delta.families import Family
from lib_delta.guidance import DenoiseStep
from lib_delta.hosts.others import replaced, taken_over
from lib_delta.hosts.place import wanted_place
from lib_delta.hosts.progress import once, pass_progress, schedule_of
from lib_delta.hosts.skipping import may_skip
from lib_delta.hosts.target import Target
from lib_delta.hosts.told import TextEngine
from lib_delta.hosts.webui import RUN, Host
from lib_delta.parameterization import denoised_of, from_timestep_space, per_image

if TYPE_CHECKING:
    from lib_delta.hosts.run import Run
    from lib_delta.models.merging import TokenMerging
    from lib_delta.sidemodel import SideModel


# With less than this on its device, in bytes, the side model waits in CPU memory between generations: decoding large
# pictures takes as much, and other models want to be loaded.
ROOM = 4 * 2**30


@dataclass(frozen=True)
class Layout:
    """How a pass's rows are laid out; it is brought to the device once, and not in each step.

    ``weights`` are for each image those of its prompts joined by AND.  On the device, ``rows`` gives for every row its
    image's number, ``cond`` ``(M,)`` the weights of all prompts, ``sums`` ``(N,)`` those of each image, ``counts``
    ``(N,)`` how many prompts it has, and ``first`` ``(N,)`` the row of the first of them.
    """

    weights: Weights
    rows: Tensor
    cond: Tensor
    sums: Tensor
    counts: Tensor
    first: Tensor


@dataclass(frozen=True)
class Call:
    """One call of ``CFGDenoiser.forward``, as its first callback sees it.

    ``params`` is what that callback was given, and what the model evaluates once all callbacks are through, in the
    rows of ``layout``.  In ``eps`` the rows that come out are noise.
    """

    run: Run
    hires: bool
    params: Any
    x: Tensor
    sigma: Tensor
    progress: float
    step: int
    cfg_scale: float
    layout: Layout
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
        return Target(family, schedule_of(shared.sd_model.alphas_cumprod).sigma_max, merging=_merging(shared.sd_model))

    def place(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = devices.device
        return device, torch.float32 if device.type == "cpu" else devices.dtype_unet

    def text_engine(self, model: SideModel) -> TextEngine:
        from lib_delta.hosts.text_a1111 import Engine

        if self._engine is None or self._engine[0] is not model:
            self._engine = model, Engine(model)
        return self._engine[1]

    def forget(self, dropped: Sequence[SideModel]) -> None:
        self._call = None  # of a step that was broken off
        if self._engine is not None and any(self._engine[0] is model for model in dropped):
            self._engine = None

    def text_device(self) -> torch.device:
        return wanted_place(*self.place())[0]

    def enter(self, p: Any, model: SideModel) -> None:
        device = wanted_place(*self.place())[0]
        short = _low_memory() and device.type == devices.device.type
        if short:
            lowvram.send_everything_to_cpu()
        for other in self._models or ():
            if other is not model:
                other.wait()
        if self.streamed():
            model.stream(device)
        elif short or waits_in_memory(device):
            model.visit(device)
        else:
            model.place(device)

    def leave(self, model: SideModel) -> None:
        device = wanted_place(*self.place())[0]
        free = free_memory(device)
        if self.streamed() or _low_memory() or (free is not None and free < ROOM):
            model.wait()
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
            if hires not in run.levels:
                # So extensions cut pictures into tiles, add ControlNets, and give prompts their regions.
                run.unfollowed |= _taken_over(params.denoiser.inner_model)
            run.levels[hires] = pass_progress(params.denoiser).levels
            if run.strength(call.progress, hires):
                self._call = call

    def _after_model(self, params: Any) -> None:
        call, self._call = self._call, None
        if call is not None:
            with call.run.watched("adding the delta of Delta Sampling"):
                self._add(call, params)

    def _add(self, call: Call, params: Any) -> None:
        """Edit the rows that the model gave so that guidance gives the target's estimate with the delta."""
        places, rows = _places(call), call.layout.rows
        out = params.x[places].float()
        estimates = denoised_of(out, call.x[rows], call.sigma[rows]) if call.eps else out
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
    # An editing model (InstructPix2Pix) has two rows of each image without the prompt.
    without_prompt = (len(params.x) - sum(map(len, weights))) // images
    x, sigma = params.x[-images:].float(), params.sigma[-images:].float()
    # As the WebUI has it, a timestep for some samplers.
    asked = sigma[0]
    timesteps = isinstance(denoiser, CFGDenoiserTimesteps)
    if timesteps:
        if family_of(shared.sd_model) is Family.SD3:
            raise SettingError(
                f"the sampler {denoiser.p.sampler_name} asks for noise at timesteps, and SD 3 knows neither: "
                "choose another sampler"
            )
        x, sigma = from_timestep_space(x, sigma, schedule_of(shared.sd_model.alphas_cumprod))
    level, noise = run.read(asked, sigma.max())
    layout = weights, without_prompt
    return Call(
        run=run,
        hires=hires,
        params=params,
        x=x,
        sigma=sigma,
        progress=pass_progress(denoiser).at(noise),
        step=denoiser.step,
        cfg_scale=_cfg_scale(denoiser, float(extra["cond_scale"])),
        layout=once(denoiser, layout, lambda: _layout(*layout, params.x.device)),
        eps=timesteps,
        image_cfg_scale=denoiser.image_cfg_scale if without_prompt == 2 else None,
        may_skip=may_skip(denoiser, level),
    )


def _layout(weights: Weights, without_prompt: int, device: torch.device) -> Layout:
    """Return the layout of images' prompts with such weights, and so many rows of each image without its prompt."""
    counts = torch.tensor([len(image) for image in weights])
    every = torch.arange(len(weights))
    return Layout(
        weights,
        torch.cat((every.repeat_interleave(counts), every.repeat(without_prompt))).to(device),
        torch.tensor([w for image in weights for w in image]).to(device),
        torch.tensor([sum(image) for image in weights]).to(device),
        counts.to(device),
        (counts.cumsum(0) - counts).to(device),
    )


def _places(call: Call) -> Tensor:
    """Return where each row is that the model evaluated: extensions (Regional Prompter) move those of batches about.

    An image's rows are known by its latent, and keep their order.  Where that is not to be told, as of images that are
    the same, none was moved.  All of it is found on the device, without waiting for it.
    """
    x, weights = call.params.x, call.layout.weights
    unmoved = torch.arange(len(x), device=x.device)
    if len(weights) == 1 or call.image_cfg_scale is not None:
        return unmoved
    count = len(x) - len(weights)
    same = torch.stack([(x[:count] == image).flatten(1).all(1) for image in x[count:]])
    # Of each image, its own rows first, all in their order.
    ordered = (unmoved[:count] + count * ~same).float().argsort(1)
    found = torch.cat([places[: len(image)] for places, image in zip(ordered, weights)])
    told = (same.sum(1) == call.layout.counts).all()
    return torch.cat((torch.where(told, found, unmoved[:count]), unmoved[count:]))


def _cfg_scale(denoiser: Any, stated: float) -> float:
    """Return the scale at which rows are combined; CFG++ samplers work with the negative prompt's at any scale."""
    scale = stated * float(getattr(denoiser, "cond_scale_miltiplier", 1.0))
    # At 1 exactly the source would be asked for the prompt alone.
    return scale + 2**-20 if scale == 1 and getattr(denoiser, "need_last_noise_uncond", False) else scale


def _uncond_skipped(out: Tensor, call: Call) -> bool:
    """Tell whether guidance was left out to save time: the WebUI then repeats each image's first prompt.

    Where its settings leave nothing out, rows are the same because the prompts are.
    """
    if not call.may_skip:
        return False
    images = len(call.layout.weights)
    return call.image_cfg_scale is None and torch.equal(out[-images:], out[call.layout.first])


def _guided(estimates: Tensor, call: Call, cfg_scale: float) -> Tensor:
    """Combine the estimates of all rows to one for each image, as ``CFGDenoiser`` is about to."""
    images = len(call.layout.weights)
    if call.image_cfg_scale is not None:
        cond, image_cond, uncond = estimates.chunk(3)
        return uncond + cfg_scale * (cond - image_cond) + call.image_cfg_scale * (image_cond - uncond)
    uncond, cond = estimates[-images:], estimates[:-images]
    rows = call.layout.rows[: len(cond)]
    return uncond.clone().index_add_(0, rows, (cond - uncond[rows]) * per_image(cfg_scale * call.layout.cond, cond))


def _row_changes(changes: Deltas, cfg_scale: float, call: Call) -> Tensor:
    """Return what to add to each row, so that guidance adds up to ``changes.guided``.

    The same for all rows would do, but CFG++ samplers look at the negative prompt's rows by themselves, previews and
    interrupted pictures are the prompt's, and extensions give each of AND's parts a region of its own: each row gets
    what the adaptation changes in it, where the side model is told the same parts.
    """
    guided, uncond, parts = changes
    layout = call.layout
    if call.image_cfg_scale is not None:
        return guided[layout.rows]
    rows = layout.rows[: -len(layout.weights)]
    if parts is not None and parts.weights == layout.weights and abs(cfg_scale) > 0.01:
        return torch.cat((uncond[rows] + (parts.change - uncond[rows]) / cfg_scale, uncond))
    if not all(abs(cfg_scale * sum(image)) > 0.01 for image in layout.weights):
        return guided[layout.rows]
    cond = uncond + (guided - uncond) / per_image(cfg_scale * layout.sums, guided)
    return torch.cat((cond[rows], uncond))


def waits_in_memory(device: torch.device) -> bool:
    """Tell whether side models keep a copy in CPU memory: from there a CUDA card fetches them in no time.

    Where a device has the CPU's own memory it would be twice the same.
    """
    return device.type == "cuda"


def family_of(model: Any) -> Family:
    """Tell the family of the WebUI's checkpoint."""
    if getattr(model, "is_sdxl", False):
        return Family.SDXL
    if getattr(model, "is_sd3", False):
        return Family.SD3
    return Family.SD2 if getattr(model, "is_sd2", False) else Family.SD1


def _taken_over(sampled: Any) -> set[str]:
    """Return who changes how the main model is run, by what samplers call; its prompts' and pictures' parts aside."""
    model = shared.sd_model
    return taken_over(getattr(model, "model", None)) | replaced(model, sampled)


def _merging(model: Any) -> TokenMerging | None:
    from lib_delta.models.merging import TokenMerging

    ratio = float(getattr(model, "applied_token_merged_ratio", 0) or 0)
    return TokenMerging(ratio) if ratio > 0 else None


def _low_memory() -> bool:
    return bool(lowvram.is_enabled(shared.sd_model))


def running() -> Automatic1111:
    """Return the WebUI that is running."""
    return Automatic1111()
