"""AUTOMATIC1111's WebUI, 1.9 and 1.10.

``CFGDenoiser`` calls back before the model, with the rows it is about to evaluate, and after it, with
what came out.  The latter is edited in place, so that guidance adds up to the target's estimate with
the delta, before masks are blended in and previews are taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, lowvram, script_callbacks, shared
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.core.deltas import Deltas, PromptWeights, map_changes, select_images
from lib_delta.core.guidance import DenoiseStep
from lib_delta.devices import free_memory, indexed
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import denoised_of, from_timestep_space, per_image
from lib_delta.errors import SettingError
from lib_delta.hosts.base import RUN_ATTRIBUTE, TAKING_AWAY, Host
from lib_delta.hosts.compute_device import ACTIVATION_BYTES, side_device
from lib_delta.hosts.generation.foreign_patches import patched_forwards, replaced
from lib_delta.hosts.generation.main_model import MainModel, tiles
from lib_delta.hosts.generation.progress import once_per_pass, pass_progress, schedule_of
from lib_delta.hosts.generation.skipped_guidance import Shown
from lib_delta.hosts.prompts.text_engine import TextEngine

if TYPE_CHECKING:
    from lib_delta.hosts.generation.run import Run
    from lib_delta.models.token_merging import TokenMerging
    from lib_delta.runtime.side_model import SideModel


# With less than this on its device, in bytes, the side model waits in CPU memory between generations: decoding large
# pictures takes as much, and other models want to be loaded.
ROOM = 4 * 2**30
# Numbers that decoding holds at once, for each pixel of a picture: what ComfyUI reckons with (2178 for each, of 64
# that a latent's pixel has).
DECODED = 2178


@dataclass(frozen=True)
class RowLayout:
    """How a pass's rows are laid out; it is brought to the device once, and not in each step.

    ``weights`` are for each image those of its prompts joined by AND.  On the device, ``rows`` gives for every row its
    image's number, ``cond`` ``(M,)`` the weights of all prompts, ``sums`` ``(N,)`` those of each image, ``counts``
    ``(N,)`` how many prompts it has, and ``first`` ``(N,)`` the row of the first of them.
    """

    weights: PromptWeights
    rows: Tensor
    cond: Tensor
    sums: Tensor
    counts: Tensor
    first: Tensor


@dataclass(frozen=True)
class DenoiserCall:
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
    layout: RowLayout
    eps: bool
    image_cfg_scale: float | None


class Automatic1111(Host):
    """The original WebUI."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        super().__init__()
        self._engine: tuple[SideModel, TextEngine] | None = None
        # Between the two callbacks of one call: the second is told nothing of the first's.
        self._call: DenoiserCall | None = None
        self._shown: Shown | None = None

    def install(self) -> None:
        script_callbacks.on_cfg_denoiser(self._before_model)
        script_callbacks.on_cfg_denoised(self._after_model)

    def main_model(self) -> MainModel:
        family = main_family(shared.sd_model)
        if family is Family.SD3:  # of flow matching, whatever ``parameterization`` says
            return MainModel(family, math.inf, flow=True)
        unet = getattr(shared.sd_model.model, "diffusion_model", None)
        limit = schedule_of(shared.sd_model.alphas_cumprod).sigma_max
        return MainModel(family, limit, merging=_token_merging(shared.sd_model), tiled=tiles(unet))

    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = devices.device
        return device, torch.float32 if device.type == "cpu" else devices.dtype_unet

    def text_engine(self, model: SideModel) -> TextEngine:
        from lib_delta.hosts.a1111.text_engine import A1111TextEngine

        if self._engine is None or self._engine[0] is not model:
            self._engine = model, A1111TextEngine(model)
        return self._engine[1]

    def forget(self, dropped: Sequence[SideModel]) -> None:
        self._call = None  # of a step that was broken off
        if self._engine is not None and any(self._engine[0] is model for model in dropped):
            self._engine = None

    def text_device(self) -> torch.device:
        return side_device(*self.compute_device())[0]

    def enter(self, p: Any, model: SideModel) -> None:
        """Let other bases go home; this one comes with the first step that has a delta, and goes with the sampler."""
        for other in self._models or ():
            if other is not model:
                other.offload()

    def _bring(self, run: Run, images: Tensor) -> None:
        """Bring the side model where it computes, whole or block by block; ``images`` are the main model's latents."""
        model, device = run.model, side_device(*self.compute_device())[0]
        short = _low_memory() and device == indexed(devices.device)
        if short:
            lowvram.send_everything_to_cpu()
        if self.streams_blocks() or self._has_no_room(run, images, device):
            model.stream_to(device)
        elif short or waits_in_memory(device):
            model.copy_to(device)
        else:
            model.move_to(device)
        run.placed = True

    def _has_no_room(self, run: Run, images: Tensor, device: torch.device) -> bool:
        """Tell whether the side model does not fit on its device beside the main model, and have the user told.

        Of its passes the smallest parts count, for they are cut where memory is short; of the main model's, whole ones.
        """
        free = free_memory(device)
        if free is None:
            return False
        count, _, height, width = images.shape
        rows, columns = run.bridge(self.main_model()).source_size(height, width)
        beside = device == indexed(devices.device)
        pixels = max(rows * columns, 2 * count * height * width if beside else 0)
        waiting = _waiting(shared.sd_model, device) if beside else 0
        needed = run.model.elsewhere(device) + waiting + ACTIVATION_BYTES * pixels
        if free >= needed:
            return False
        run.remark(
            f"the side model ran block by block, which is slower: {free / 2**30:.1f} GB are free on {device}, and it "
            f"would have needed {needed / 2**30:.1f} GB"
        )
        return True

    def leave(self, model: SideModel) -> None:
        self._make_room(model, ROOM)

    def _make_room(self, model: SideModel, wanted: int) -> None:
        """Have the side model wait in CPU memory if less than that is free where it is."""
        free = free_memory(side_device(*self.compute_device())[0])
        if model.streamed_bytes or _low_memory() or (free is not None and free < wanted):
            model.offload()
            self.free_memory()

    def free_memory(self) -> None:
        devices.torch_gc()

    def before_sampling(self, p: Any) -> None:
        """Take the side model away when the sampler of this pass is through: what is decoded after it needs the room.

        Where a hires pass follows, ``p.sample`` decodes, enlarges and encodes itself.  WebUIs before 1.10 do not call
        this, and there it goes with ``p.sample``.
        """
        run: Run | None = getattr(p, RUN_ATTRIBUTE, None)
        sampler = getattr(p, "sampler", None)
        if run is not None and sampler is not None:
            _at_its_end(sampler, lambda: run.afterwards(TAKING_AWAY, lambda: self._end(run, p)))

    def _end(self, run: Run, p: Any) -> None:
        """End a pass: decoding its pictures needs room, one at a time."""
        if not run.placed:
            return
        run.placed = False
        width, height = p.width, p.height
        if getattr(p, "enable_hr", False):  # it is encoded before the second pass, and decoded after it
            width, height = p.hr_upscale_to_x or width, p.hr_upscale_to_y or height
        self._make_room(run.model, max(ROOM, width * height * DECODED * devices.dtype_vae.itemsize))

    def _before_model(self, params: Any) -> None:
        self._end_call()
        run: Run | None = getattr(params.denoiser.p, RUN_ATTRIBUTE, None)
        if run is None:
            return
        with run.guarded("reading a step's state for Delta Sampling"):
            hires = bool(getattr(params.denoiser.p, "is_hr_pass", False))
            call = _denoiser_call(run, hires, params)
            if hires not in run.levels:
                # So extensions cut pictures into tiles, add ControlNets, and give prompts their regions.
                run.foreign_patches |= _taken_over(params.denoiser.inner_model)
            run.levels[hires] = pass_progress(params.denoiser).levels
            if run.strength(call.progress, hires):
                if not run.placed:
                    self._bring(run, call.x)
                self._call, self._shown = call, Shown(params.denoiser.inner_model)

    def _after_model(self, params: Any) -> None:
        call, shown = self._end_call()
        if call is not None:
            with call.run.guarded("adding the delta of Delta Sampling"):
                self._add(call, params, shown)

    def _end_call(self) -> tuple[DenoiserCall | None, int]:
        """Forget a call, be it one that failed in between; returns it, and how many rows the model was shown."""
        call, shown = self._call, self._shown
        self._call = self._shown = None
        if shown is not None:
            shown.close()
        return call, 0 if shown is None else shown.rows

    def _add(self, call: DenoiserCall, params: Any, shown: int) -> None:
        """Edit the rows that the model gave so that guidance gives the target's estimate with the delta."""
        positions, rows = _row_positions(call), call.layout.rows
        out = params.x[positions].float()
        estimates = denoised_of(out, call.x[rows], call.sigma[rows]) if call.eps else out
        skipped = _uncond_skipped(params.x, call, shown)
        scale = 1.0 if skipped else call.cfg_scale
        denoised = _guided(estimates, call, scale)
        step = DenoiseStep(call.x, call.sigma, denoised, call.cfg_scale, call.progress, call.step, skipped)
        changes = call.run.changes(step, self.main_model, call.hires)
        if changes is None:
            return
        if call.eps:
            changes = map_changes(
                lambda images, change: -change / per_image(select_images(call.sigma, images), change), changes
            )
        params.x[positions] += _row_changes(changes, scale, call).to(params.x)


def _denoiser_call(run: Run, hires: bool, params: Any) -> DenoiserCall:
    denoiser = params.denoiser
    extra = denoiser.sampler.sampler_extra_args
    weights = tuple(tuple(float(part.weight) for part in image) for image in extra["cond"].batch)
    images = len(weights)
    # An editing model (InstructPix2Pix) has two rows of each image without the prompt.
    without_prompt = (len(params.x) - sum(map(len, weights))) // images
    x, sigma = params.x[-images:].float(), params.sigma[-images:].float()
    timesteps = isinstance(denoiser, CFGDenoiserTimesteps)
    if timesteps:
        if main_family(shared.sd_model) is Family.SD3:
            raise SettingError(
                f"the sampler {denoiser.p.sampler_name} asks for noise at timesteps, and SD 3 knows neither: "
                "choose another sampler"
            )
        x, sigma = from_timestep_space(x, sigma, schedule_of(shared.sd_model.alphas_cumprod))
    (noise,) = run.read(sigma.max())
    layout = weights, without_prompt
    return DenoiserCall(
        run=run,
        hires=hires,
        params=params,
        x=x,
        sigma=sigma,
        progress=pass_progress(denoiser).at(noise),
        step=denoiser.step,
        cfg_scale=_cfg_scale(denoiser, float(extra["cond_scale"])),
        layout=once_per_pass(denoiser, layout, lambda: _layout(*layout, params.x.device)),
        eps=timesteps,
        image_cfg_scale=denoiser.image_cfg_scale if without_prompt == 2 else None,
    )


def _layout(weights: PromptWeights, without_prompt: int, device: torch.device) -> RowLayout:
    """Return the layout of images' prompts with such weights, and so many rows of each image without its prompt."""
    counts = torch.tensor([len(image) for image in weights])
    every = torch.arange(len(weights))
    return RowLayout(
        weights,
        torch.cat((every.repeat_interleave(counts), every.repeat(without_prompt))).to(device),
        torch.tensor([w for image in weights for w in image]).to(device),
        torch.tensor([sum(image) for image in weights]).to(device),
        counts.to(device),
        (counts.cumsum(0) - counts).to(device),
    )


def _row_positions(call: DenoiserCall) -> Tensor:
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
    found = torch.cat([positions[: len(image)] for positions, image in zip(ordered, weights)])
    told = (same.sum(1) == call.layout.counts).all()
    return torch.cat((torch.where(told, found, unmoved[:count]), unmoved[count:]))


def _cfg_scale(denoiser: Any, stated: float) -> float:
    """Return the scale at which rows are combined; CFG++ samplers work with the negative prompt's at any scale."""
    scale = stated * float(getattr(denoiser, "cond_scale_miltiplier", 1.0))
    # At 1 exactly the source would be asked for the prompt alone.
    return scale + 2**-20 if scale == 1 and getattr(denoiser, "need_last_noise_uncond", False) else scale


def _uncond_skipped(out: Tensor, call: DenoiserCall, shown: int) -> bool:
    """Tell whether guidance was left out to save time: the model is not shown the rows without the prompt.

    The WebUI then repeats each image's first prompt in their place.  They are compared only where extensions show the
    model other rows than these, for rows are the same as well where the prompts are.
    """
    images = len(call.layout.weights)
    if call.image_cfg_scale is not None:
        return False
    if shown in (len(out), len(out) - images):
        return shown < len(out)
    return torch.equal(out[-images:], out[call.layout.first])


def _guided(estimates: Tensor, call: DenoiserCall, cfg_scale: float) -> Tensor:
    """Combine the estimates of all rows to one for each image, as ``CFGDenoiser`` is about to."""
    images = len(call.layout.weights)
    if call.image_cfg_scale is not None:
        cond, image_cond, uncond = estimates.chunk(3)
        return uncond + cfg_scale * (cond - image_cond) + call.image_cfg_scale * (image_cond - uncond)
    uncond, cond = estimates[-images:], estimates[:-images]
    rows = call.layout.rows[: len(cond)]
    return uncond.clone().index_add_(0, rows, (cond - uncond[rows]) * per_image(cfg_scale * call.layout.cond, cond))


def _row_changes(changes: Deltas, cfg_scale: float, call: DenoiserCall) -> Tensor:
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


# How samplers are started, with noise and with a picture.
STARTS = ("sample", "sample_img2img")


def _at_its_end(sampler: Any, do: Callable[[], None]) -> None:
    """Do something when a sampler is through, whatever comes of it; on the instance, and once."""
    own = vars(sampler)
    before = {name: own[name] for name in STARTS if name in own}

    def wrapped(sample: Callable[..., Any]) -> Callable[..., Any]:
        def with_end(*arguments: Any, **named: Any) -> Any:
            for name in STARTS:
                own.pop(name, None)
            own.update(before)
            try:
                return sample(*arguments, **named)
            finally:
                do()

        return with_end

    for name in STARTS:
        if hasattr(sampler, name):
            setattr(sampler, name, wrapped(getattr(sampler, name)))


def _waiting(main: Any, device: torch.device) -> int:
    """Return the bytes of the main model's UNet that come to a device when it runs: with --medvram all of them."""
    network = getattr(main, "model", None)
    by_blocks = getattr(getattr(shared, "cmd_opts", None), "lowvram", False)
    if by_blocks or not isinstance(network, torch.nn.Module):
        return 0
    return sum(weight.nbytes for weight in network.parameters() if weight.device != device)


def main_family(model: Any) -> Family:
    """Tell the family of the WebUI's checkpoint."""
    if getattr(model, "is_sdxl", False):
        return Family.SDXL
    if getattr(model, "is_sd3", False):
        return Family.SD3
    return Family.SD2 if getattr(model, "is_sd2", False) else Family.SD1


def _taken_over(sampled: Any) -> set[str]:
    """Return who changes how the main model is run, by what samplers call; its prompts' and pictures' parts aside."""
    model = shared.sd_model
    return patched_forwards(getattr(model, "model", None)) | replaced(model, sampled)


def _token_merging(model: Any) -> TokenMerging | None:
    from lib_delta.models.token_merging import TokenMerging

    ratio = float(getattr(model, "applied_token_merged_ratio", 0) or 0)
    return TokenMerging(ratio) if ratio > 0 else None


def _low_memory() -> bool:
    return bool(lowvram.is_enabled(shared.sd_model))


def running() -> Automatic1111:
    """Return the WebUI that is running."""
    return Automatic1111()
