"""AUTOMATIC1111's WebUI, 1.9 and 1.10.

``CFGDenoiser`` calls back before the model, with the rows that it evaluates next, and after it, with the model's
estimates.  The second callback edits these in place.  Guidance then combines them into the target's estimate with the
delta, before the WebUI blends in masks and draws previews.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from modules import devices, lowvram, script_callbacks, shared
from modules.sd_samplers_timesteps import CFGDenoiserTimesteps
from torch import Tensor

from lib_delta.core.deltas import PromptWeights, map_changes, select_images
from lib_delta.core.steps import DenoiseStep
from lib_delta.devices import free_memory, indexed
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import denoised_of, from_timestep_space, per_image
from lib_delta.errors import SettingError
from lib_delta.hosts.a1111.rows import RowLayout
from lib_delta.hosts.base import Host
from lib_delta.hosts.compute_device import ACTIVATION_BYTES
from lib_delta.hosts.generation.foreign_patches import patched_forwards, replaced
from lib_delta.hosts.generation.lifecycle import OFFLOADING
from lib_delta.hosts.generation.main_model import MainModel, tiles
from lib_delta.hosts.generation.progress import once_per_pass, pass_progress, schedule_of
from lib_delta.hosts.generation.skipped_guidance import RowCounter
from lib_delta.hosts.generation.state import run_of
from lib_delta.hosts.prompts.text_engine import TextEngine

if TYPE_CHECKING:
    from lib_delta.hosts.generation.run import Run
    from lib_delta.models.token_merging import TokenMerging
    from lib_delta.runtime.side_model import SideModel


# If less is free on its device, in bytes, the side model waits in CPU memory between generations: decoding large
# pictures takes as much, and the WebUI may load other models.
ROOM = 4 * 2**30
# Values that decoding holds at once for each pixel of a picture, by ComfyUI's estimate (2178 * 64 for each of the
# latent).
DECODED = 2178
# The methods that start a sampler: with noise, and with a picture.
STARTS = ("sample", "sample_img2img")


@dataclass(frozen=True)
class DenoiserCall:
    """One call of ``CFGDenoiser.forward``, as its first callback sees it.

    ``params`` is the callback's argument.  Its ``x`` are the rows that the model evaluates once all callbacks have
    run, in the order of ``layout``.  ``eps`` tells that the model's estimates are noise.
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


class Automatic1111(Host):
    """The original WebUI."""

    name = "AUTOMATIC1111"

    def __init__(self) -> None:
        super().__init__()
        # Set by the first callback of a call for the second, which gets no reference to it.
        self._call: DenoiserCall | None = None
        self._counter: RowCounter | None = None

    def install(self) -> None:
        script_callbacks.on_cfg_denoiser(self._before_model)
        script_callbacks.on_cfg_denoised(self._after_model)

    def main_model(self) -> MainModel:
        family = main_family(shared.sd_model)
        if family is Family.SD3:  # flow matching, although its ``parameterization`` says otherwise
            return MainModel(family, math.inf, flow=True)
        unet = getattr(shared.sd_model.model, "diffusion_model", None)
        sigma_max = schedule_of(shared.sd_model.alphas_cumprod).sigma_max
        return MainModel(family, sigma_max, merging=_token_merging(shared.sd_model), tiled=tiles(unet))

    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = devices.device
        return device, torch.float32 if device.type == "cpu" else devices.dtype_unet

    def make_text_engine(self, model: SideModel) -> TextEngine:
        from lib_delta.hosts.a1111.text_engine import A1111TextEngine

        return A1111TextEngine(model)

    def text_device(self) -> torch.device:
        return self.side_device()

    def forget(self, dropped: Sequence[SideModel]) -> None:
        super().forget(dropped)
        self._call = None  # of a step that did not end

    # Memory.

    def enter(self, p: Any, model: SideModel) -> None:
        """Offload the other bases.  The first step with a delta moves this one, and the end of the sampler ends it."""
        for other in self.side_models():
            if other is not model:
                other.offload()

    def leave(self, model: SideModel) -> None:
        self._make_room(model, ROOM)

    def free_memory(self) -> None:
        devices.torch_gc()

    def before_sampling(self, p: Any) -> None:
        """Take the side model away when the sampler of this pass ends: decoding then needs the room.

        If a hires pass follows, ``p.sample`` decodes, enlarges and encodes in between.  WebUIs before 1.10 do not
        call this; there the side model leaves after ``p.sample``.
        """
        sampler = getattr(p, "sampler", None)
        if run_of(p) is not None and sampler is not None:
            # Without the run: the traceback of an error in it would keep the side model in memory.
            _call_at_end(sampler, partial(self._sampler_ended, p))

    def _sampler_ended(self, p: Any) -> None:
        run = run_of(p)
        if run is not None:
            run.afterwards(OFFLOADING, partial(self._end_pass, run, p))

    def _move_to_device(self, run: Run, latents: Tensor) -> None:
        """Move the side model to its device, whole or block by block; ``latents`` are the main model's."""
        model, device = run.model, self.side_device()
        low_memory = _low_memory() and device == indexed(devices.device)
        if low_memory:
            lowvram.send_everything_to_cpu()
        if self.streams_blocks() or self._must_stream(run, latents, device):
            model.stream_to(device)
        elif low_memory or waits_in_memory(device):
            model.copy_to(device)
        else:
            model.move_to(device)
        run.placed = True

    def _must_stream(self, run: Run, latents: Tensor, device: torch.device) -> bool:
        """Return whether the side model does not fit next to the main model, and remark on it.

        This counts the side model's smallest forward pass, which is cut into parts if memory is short, and the main
        model's whole one.
        """
        free = free_memory(device)
        if free is None:
            return False
        count, _, height, width = latents.shape
        rows, columns = run.bridge(self.main_model()).source_size(height, width)
        shared_device = device == indexed(devices.device)
        pixels = max(rows * columns, 2 * count * height * width if shared_device else 0)
        main_bytes = _main_bytes_to_load(shared.sd_model, device) if shared_device else 0
        needed = run.model.elsewhere(device) + main_bytes + ACTIVATION_BYTES * pixels
        if free >= needed:
            return False
        run.remark(
            f"the side model ran block by block, which is slower: {free / 2**30:.1f} GB are free on {device}, and it "
            f"would have needed {needed / 2**30:.1f} GB"
        )
        return True

    def _make_room(self, model: SideModel, needed: int) -> None:
        """Offload the side model if less than ``needed`` bytes are free on its device."""
        free = free_memory(self.side_device())
        if model.streamed_bytes or _low_memory() or (free is not None and free < needed):
            model.offload()
            self.free_memory()

    def _end_pass(self, run: Run, p: Any) -> None:
        """Make room for decoding the pass's pictures, which the WebUI does one at a time."""
        if not run.placed:
            return
        run.placed = False
        width, height = p.width, p.height
        if getattr(p, "enable_hr", False):  # the WebUI encodes this size before the hires pass, and decodes it after
            width, height = p.hr_upscale_to_x or width, p.hr_upscale_to_y or height
        self._make_room(run.model, max(ROOM, width * height * DECODED * devices.dtype_vae.itemsize))

    # Callbacks of a step.

    def _before_model(self, params: Any) -> None:
        self._end_call()
        run = run_of(params.denoiser.p)
        if run is None:
            return
        with run.guarded("reading a step's state for Delta Sampling"):
            hires = bool(getattr(params.denoiser.p, "is_hr_pass", False))
            call = _denoiser_call(run, hires, params)
            if hires not in run.levels:
                # Extensions patch the model to sample in tiles, add ControlNets, or give prompts regions.
                run.foreign_patches |= _main_model_patches(params.denoiser.inner_model)
            run.levels[hires] = pass_progress(params.denoiser).levels
            if run.strength(call.progress, hires):
                if not run.placed:
                    self._move_to_device(run, call.x)
                self._call, self._counter = call, RowCounter(params.denoiser.inner_model)

    def _after_model(self, params: Any) -> None:
        call, evaluated = self._end_call()
        if call is not None:
            with call.run.guarded("adding the delta of Delta Sampling"):
                self._add_delta(call, params, evaluated)

    def _end_call(self) -> tuple[DenoiserCall | None, int]:
        """Forget the call, even if it failed in between; return it and the number of rows that the model evaluated."""
        call, counter = self._call, self._counter
        self._call = self._counter = None
        if counter is not None:
            counter.close()
        return call, 0 if counter is None else counter.rows

    def _add_delta(self, call: DenoiserCall, params: Any, evaluated: int) -> None:
        """Edit the model's estimates so that guidance combines them into the target's estimate with the delta."""
        layout = call.layout
        positions = layout.positions(call.params.x)
        out = params.x[positions].float()
        estimates = denoised_of(out, call.x[layout.images], call.sigma[layout.images]) if call.eps else out
        skipped = layout.uncond_skipped(params.x, evaluated)
        scale = 1.0 if skipped else call.cfg_scale
        step = DenoiseStep(
            x=call.x,
            sigma=call.sigma,
            denoised=layout.guided(estimates, scale),
            cfg_scale=call.cfg_scale,
            progress=call.progress,
            step=call.step,
            uncond_skipped=skipped,
        )
        changes = call.run.changes(step, self.main_model, call.hires)
        if changes is None:
            return
        if call.eps:
            changes = map_changes(
                lambda images, change: -change / per_image(select_images(call.sigma, images), change), changes
            )
        params.x[positions] += layout.row_changes(changes, scale).to(params.x)


def _denoiser_call(run: Run, hires: bool, params: Any) -> DenoiserCall:
    """Return what the first callback reads from its ``params``."""
    denoiser = params.denoiser
    extra = denoiser.sampler.sampler_extra_args
    weights = tuple(tuple(float(part.weight) for part in image) for image in extra["cond"].batch)
    count = len(weights)
    x, sigma = params.x[-count:].float(), params.sigma[-count:].float()
    timesteps = isinstance(denoiser, CFGDenoiserTimesteps)
    if timesteps:
        if main_family(shared.sd_model) is Family.SD3:
            raise SettingError(
                f"the sampler {denoiser.p.sampler_name} asks for noise at timesteps, and SD 3 knows neither: "
                "choose another sampler"
            )
        x, sigma = from_timestep_space(x, sigma, schedule_of(shared.sd_model.alphas_cumprod))
    (level,) = run.read(sigma.max())
    return DenoiserCall(
        run=run,
        hires=hires,
        params=params,
        x=x,
        sigma=sigma,
        progress=pass_progress(denoiser).at(level),
        step=denoiser.step,
        cfg_scale=_cfg_scale(denoiser, float(extra["cond_scale"])),
        layout=_row_layout(params, weights),
        eps=timesteps,
    )


def _row_layout(params: Any, weights: PromptWeights) -> RowLayout:
    without_prompt = (len(params.x) - sum(map(len, weights))) // len(weights)
    image_cfg_scale = params.denoiser.image_cfg_scale if without_prompt == 2 else None
    key = weights, without_prompt, image_cfg_scale
    return once_per_pass(params.denoiser, key, lambda: RowLayout.of(*key, params.x.device))


def _cfg_scale(denoiser: Any, stated: float) -> float:
    """Return the scale that combines the rows; CFG++ samplers use the negative prompt's rows at any scale."""
    scale = stated * float(getattr(denoiser, "cond_scale_miltiplier", 1.0))
    # At exactly 1, the source would skip the negative prompt.
    return scale + 2**-20 if scale == 1 and getattr(denoiser, "need_last_noise_uncond", False) else scale


def waits_in_memory(device: torch.device) -> bool:
    """Return whether side models keep a copy in CPU memory, from which CUDA cards load them quickly.

    On devices that share the CPU's memory, the copy would only take twice the room.
    """
    return device.type == "cuda"


def _call_at_end(sampler: Any, do: Callable[[], None]) -> None:
    """Call ``do`` once when a sampler ends, even with an error; wraps the methods of this instance."""
    attributes = vars(sampler)
    replaced = {name: attributes[name] for name in STARTS if name in attributes}

    def wrapped(sample: Callable[..., Any]) -> Callable[..., Any]:
        def sample_and_end(*arguments: Any, **named: Any) -> Any:
            for name in STARTS:
                attributes.pop(name, None)
            attributes.update(replaced)
            try:
                return sample(*arguments, **named)
            finally:
                do()

        return sample_and_end

    for name in STARTS:
        if hasattr(sampler, name):
            setattr(sampler, name, wrapped(getattr(sampler, name)))


def _main_bytes_to_load(main: Any, device: torch.device) -> int:
    """Return the bytes of the main model's UNet that its run moves to a device: with --medvram, all of them."""
    network = getattr(main, "model", None)
    by_blocks = getattr(getattr(shared, "cmd_opts", None), "lowvram", False)
    if by_blocks or not isinstance(network, torch.nn.Module):
        return 0
    return sum(weight.nbytes for weight in network.parameters() if weight.device != device)


def main_family(model: Any) -> Family:
    """Return the family of the WebUI's checkpoint."""
    if getattr(model, "is_sdxl", False):
        return Family.SDXL
    if getattr(model, "is_sd3", False):
        return Family.SD3
    return Family.SD2 if getattr(model, "is_sd2", False) else Family.SD1


def _main_model_patches(sampled: Any) -> set[str]:
    """Return who patches the main model's UNet, or the methods that samplers call; not its text encoder or VAE."""
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
