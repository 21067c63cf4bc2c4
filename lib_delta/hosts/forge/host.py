"""Forge, and relatives with the same interfaces.

Forge calls back before each evaluation with the images' latents.  The denoised result passes through the UNet
patcher's post-CFG functions before the WebUI blends in masks and draws previews.  Before each pass, the patcher gets
the extension's functions, and the side model to load next to the main one.  A refiner replaces the patcher in mid-run;
then it gets them again.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from modules import script_callbacks, shared
from torch import Tensor

from lib_delta.core.steps import DenoiseStep
from lib_delta.devices import indexed
from lib_delta.errors import DeltaError
from lib_delta.hosts.base import Host
from lib_delta.hosts.compute_device import ACTIVATION_BYTES
from lib_delta.hosts.forge.families import family_by_latents, is_flow
from lib_delta.hosts.forge.regions import WRAPPER, combine_in_regions
from lib_delta.hosts.forge.whole_patcher import whole
from lib_delta.hosts.generation.foreign_patches import extension_names, patched_forwards
from lib_delta.hosts.generation.main_model import MainModel, tiles
from lib_delta.hosts.generation.progress import largest_sigma, pass_progress
from lib_delta.hosts.generation.state import run_of
from lib_delta.hosts.prompts.text_engine import TextEngine

if TYPE_CHECKING:
    from lib_delta.hosts.generation.run import Run
    from lib_delta.models.token_merging import TokenMerging
    from lib_delta.runtime.side_model import SideModel

BACKEND = importlib.util.find_spec("backend") is not None
memory = importlib.import_module("backend.memory_management" if BACKEND else "ldm_patched.modules.model_management")
patching = importlib.import_module("backend.patcher.base" if BACKEND else "ldm_patched.modules.model_patcher")
sampling = importlib.import_module("backend.sampling.sampling_function" if BACKEND else "modules_forge.forge_sampler")

VERSION = getattr(importlib.import_module("modules_forge.forge_version"), "version", "")

CPU = torch.device("cpu")
PRE_CFG, POST_CFG = "sampler_pre_cfg_function", "sampler_post_cfg_function"
# Options of a patcher in which extensions put changes to the main model and its guidance.
PATCHED_OPTIONS = ("transformer_options", WRAPPER, "sampler_cfg_function", PRE_CFG, POST_CFG)
NO_ROOM = "the side model computed on the CPU, for the WebUI found no room for it on its device"
# Bytes of a tiny autoencoder for each pixel of a picture, one picture at a time: three float32 maps of 64 channels.
PICTURE_BYTES = 3 * 64 * 4


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as the callback before it sees it.

    ``uncond_used`` tells that the sampler (CFG++) also uses the negative prompt's estimate.
    """

    run: Run
    hires: bool
    progress: float
    step: int
    cfg_scale: float
    uncond_used: bool
    merging: TokenMerging | None


class Forge(Host):
    """Stable Diffusion WebUI Forge and Forge Neo; reForge and Forge Classic if there is no package ``backend``."""

    name = {"neo": "Forge Neo", "classic": "Forge Classic"}.get(VERSION, "Forge" if BACKEND else "reForge")

    def __init__(self) -> None:
        super().__init__()
        self._patcher: Any = None
        # Set by the callback for the functions, which get no reference to it.
        self._evaluation: Evaluation | None = None
        # Whether the model does not evaluate the negative prompt; None if not known.
        self._uncond_skipped: bool | None = None

        # Plain functions: patchers deep-copy their options at every clone, and methods' objects with them.
        def pre_cfg(*args: Any) -> Any:
            return self._before_guidance(args)

        def post_cfg(args: dict[str, Any]) -> Tensor:
            return self._after_guidance(args)

        self._functions: dict[str, Callable[..., Any]] = {PRE_CFG: pre_cfg, POST_CFG: post_cfg}

    def install(self) -> None:
        script_callbacks.on_cfg_denoiser(self._before_model)

    def main_model(self) -> MainModel:
        model = shared.sd_model.forge_objects.unet.model
        schedule = model.predictor if BACKEND else model.model_sampling
        family = family_by_latents(shared.sd_model)
        tiled = tiles(model.diffusion_model)
        if is_flow(schedule):
            return MainModel(family, math.inf, flow=True, tiled=tiled)
        return MainModel(family, largest_sigma(schedule.sigmas), tiled=tiled)

    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = memory.get_torch_device()
        if device.type == "cpu":
            return device, torch.float32
        return device, torch.float16 if memory.should_use_fp16(device) else torch.float32

    def make_text_engine(self, model: SideModel) -> TextEngine:
        if BACKEND:
            from lib_delta.hosts.forge.text_engine import ForgeTextEngine

            return ForgeTextEngine(model)
        from lib_delta.hosts.forge.text_engine_reforge import ReForgeTextEngine

        return ReForgeTextEngine(model)

    def text_device(self) -> torch.device:
        device: torch.device = memory.text_encoder_device()
        return device

    def keep_schedule(self, p: Any) -> Callable[[], None]:
        """Return a function that undoes the rescale to zero terminal SNR: after an error the WebUI does not."""
        predictor: Any = getattr(p.sd_model.forge_objects.unet.model, "predictor", None)
        if not hasattr(predictor, "set_sigmas"):
            return super().keep_schedule(p)
        sigmas = predictor.sigmas.clone()

        def restore() -> None:
            if not torch.equal(predictor.sigmas, sigmas.to(predictor.sigmas)):
                predictor.set_sigmas(sigmas.to(predictor.sigmas))

        return restore

    def quantized(self) -> bool:
        return True

    # Memory.

    def enter(self, p: Any, model: SideModel) -> None:
        """Give the side model to the memory manager, unless it streams or computes on another device."""
        device = self.side_device()
        streamed = self.streams_blocks()
        main_device = memory.get_torch_device()  # not indexed: the memory manager compares it with its devices
        managed = device == indexed(main_device) and not streamed
        if self._patcher is not None and not (managed and self._patcher.model is model.network):
            self._drop_patcher()
        if streamed:
            model.stream_to(device)
        elif not managed:
            model.move_to(device)
        elif self._patcher is None:
            model.offload()
            self._patcher = whole(patching.ModelPatcher)(
                model.network, load_device=main_device, offload_device=memory.unet_offload_device()
            )

    def leave(self, model: SideModel) -> None:
        """Offload the side model if the memory manager does not handle it; otherwise the manager makes room itself."""
        model.offload()

    def free_memory(self) -> None:
        memory.soft_empty_cache()

    def forget(self, dropped: Sequence[SideModel]) -> None:
        super().forget(dropped)
        self._evaluation = None  # of a step that did not end
        if self._patcher is not None and any(self._patcher.model is model.network for model in dropped):
            self._drop_patcher()

    def _drop_patcher(self) -> None:
        """Remove a side model from the memory manager and the main model's patchers."""
        loaded = memory.current_loaded_models
        for entry in [entry for entry in loaded if self._patcher.is_clone(entry.model)]:
            loaded.remove(entry)
            entry.model_unload()
        # The main model's patcher of the last generation exists until the next one.
        main = getattr(shared.sd_model, "forge_objects", None)  # missing if a checkpoint could not be loaded
        for patcher in (getattr(main, "unet", None), *(entry.model for entry in loaded)):
            extra = getattr(patcher, "extra_model_patchers_during_sampling", [])
            extra[:] = [other for other in extra if other is not self._patcher]
        self._patcher = None

    def _bytes_to_reserve(self, p: Any, run: Run) -> int:
        """Return the bytes that the main model must leave free; unload all models if there are too few.

        The memory manager can leave a part of the main model in CPU memory, but not of a side model.  It does not
        move a main model that is already loaded.
        """
        target, device = self.main_model(), memory.get_torch_device()
        width, height = p.width, p.height
        if getattr(p, "is_hr_pass", False):
            width, height = p.hr_upscale_to_x or width, p.hr_upscale_to_y or height
        # Weights on the device are not among the free bytes any more.
        to_load = 0 if self._patcher is None else run.model.elsewhere(device)
        room = to_load + run.model.streamed_bytes
        if self._patcher is not None or run.model.streamed_bytes:
            stride = target.family.latent_stride
            rows, columns = run.bridge(target).source_size(height // stride, width // stride)
            # Both branches, each with and without the prompt.
            room += 4 * p.batch_size * rows * columns * ACTIVATION_BYTES
        if run.passes.first.bridge == "taesd" and target.family.space is not run.model.report.family.space:
            room += width * height * PICTURE_BYTES
        needed = room + memory.minimum_inference_memory()
        if device != CPU and to_load and memory.get_free_memory(device) < needed:
            memory.unload_all_models()
        return room

    def _load_again(self, run: Run, forge_objects: Any, x: Tensor) -> None:
        """Make the memory manager load a side model that it unloaded in mid-run, as for a preview.

        It loads the main model in the same way, between two evaluations, and then both at once.  If it finds no room,
        the side model computes on the CPU, and a remark says so.
        """
        device = memory.get_torch_device()
        if not run.model.elsewhere(device):
            return
        if NO_ROOM not in run.remarks:
            sampling.sampling_prepare(forge_objects.unet, x=x)
        if run.model.elsewhere(device):
            run.model.move_to(CPU)  # never split over two devices
            run.remark(NO_ROOM)

    # The main model's patcher.

    def before_sampling(self, p: Any) -> None:
        """Add the extension's functions to the main model's patcher, and the side model to load next to it."""
        run = run_of(p)
        if run is not None:
            self._extend_patcher(p, run, shared.sd_model.forge_objects)

    def _extend_patcher(self, p: Any, run: Run, forge_objects: Any) -> None:
        """Replace the main model's patcher by a clone that has the extension's functions and the side model.

        A clone, because the next generation starts from the original.  Before the clone is loaded, because the memory
        manager loses track of a model whose loaded patcher is not the one in use.
        """
        unet = forge_objects.unet
        missing = [name for name, ours in self._functions.items() if ours not in unet.model_options.get(name, [])]
        lacks_model = self._patcher is not None and self._patcher not in unet.extra_model_patchers_during_sampling
        if not (missing or lacks_model):
            return
        unet = unet.clone()
        for name in missing:
            unet.model_options[name] = [*unet.model_options.get(name, []), self._functions[name]]
        if lacks_model:
            unet.add_extra_model_patcher_during_sampling(self._patcher)
        if lacks_model or self._patcher is None:
            unet.add_extra_preserved_memory_during_sampling(self._bytes_to_reserve(p, run))
        forge_objects.unet = unet

    def _update_patcher(self, run: Run, p: Any, forge_objects: Any, x: Tensor) -> None:
        """Make the extension's functions the last ones around guidance, and load the side model if it is not."""
        options = forge_objects.unet.model_options
        if self._functions[POST_CFG] not in options.get(POST_CFG, []):
            # A refiner unloaded all models, and loaded only the main one again.
            self._extend_patcher(p, run, forge_objects)
            sampling.sampling_prepare(forge_objects.unet, x=x)
        else:
            for name, ours in self._functions.items():
                functions = options.setdefault(name, [])
                if not functions or functions[-1] is not ours:
                    functions[:] = [*(other for other in functions if other is not ours), ours]
        if self._patcher is not None:
            self._load_again(run, forge_objects, x)

    # Callbacks of a step.

    def _before_model(self, params: Any) -> None:
        missed, self._evaluation, self._uncond_skipped = self._evaluation, None, None
        denoiser = params.denoiser
        run = run_of(denoiser.p)
        if run is not None:
            with run.guarded("reading a step's state for Delta Sampling"):
                if missed is not None and missed.run is run:
                    raise DeltaError(
                        f"the sampler {denoiser.p.sampler_name} or another extension leaves out what is added after "
                        "guidance, and the delta with it: choose another sampler"
                    )
                self._begin_evaluation(run, denoiser, params.x, params.sigma)

    def _begin_evaluation(self, run: Run, denoiser: Any, x: Tensor, sigma: Tensor) -> None:
        """Note the evaluation for the functions around guidance, if this step has a delta."""
        p, forge_objects = denoiser.p, denoiser.inner_model.inner_model.forge_objects
        hires = bool(getattr(p, "is_hr_pass", False))
        if hires not in run.levels:
            run.foreign_patches |= patched_forwards(forge_objects.unet.model)
        run.levels[hires] = pass_progress(denoiser).levels
        (level,) = run.read(sigma.max())
        progress = pass_progress(denoiser).at(level)
        # Without noise, every model returns its input, and all deltas are 0.
        if not level or not run.strength(progress, hires):
            return
        scale = denoiser.sampler.sampler_extra_args["cond_scale"]
        self._evaluation = Evaluation(
            run=run,
            hires=hires,
            progress=progress,
            step=denoiser.step,
            cfg_scale=float(getattr(p, "hr_cfg", scale) if hires else scale),
            uncond_used=self._uncond_used(denoiser),
            merging=_token_merging_of_pass(p, hires),
        )
        run.foreign_patches |= extension_names([forge_objects.unet.model_options.get(name) for name in PATCHED_OPTIONS])
        self._update_patcher(run, p, forge_objects, x)

    def _uncond_used(self, denoiser: Any) -> bool:
        """Return whether the sampler uses the negative prompt's estimate.

        In reForge such samplers replace all post-CFG functions with theirs; the extension's is added to these.
        """
        functions = (denoiser.sampler.sampler_extra_args.get("model_options") or {}).get(POST_CFG)
        if not functions:
            return bool(getattr(denoiser, "need_last_noise_uncond", False))
        if self._functions[POST_CFG] not in functions:
            functions.append(self._functions[POST_CFG])
        return True

    def _before_guidance(self, arguments: tuple[Any, ...]) -> Any:
        """Note whether the model does not evaluate the negative prompt, and return the arguments.

        The WebUIs and other extensions skip it by rules of their own.  Forge calls this before the model, with the
        model, the prompt, the negative prompt and more; reForge calls it after the model, with a dictionary.
        """
        if len(arguments) == 1:
            self._uncond_skipped = arguments[0]["conds"][1] is None
            return arguments[0]["conds_out"]
        self._uncond_skipped = arguments[2] is None
        return arguments

    def _is_uncond_skipped(self, uncond: Tensor | None, before_guidance: list[Any] | None) -> bool:
        """Return whether there is no estimate for the negative prompt, as at CFG 1 or if guidance is skipped.

        The WebUI then has zeros or nothing for it, to which it adds the parts of a prompt joined by AND.
        """
        if uncond is None:
            return True
        last = before_guidance and before_guidance[-1] is self._functions[PRE_CFG]
        if self._uncond_skipped is not None and last:
            return self._uncond_skipped
        # Another extension added a function after ours, or removed ours.  This waits for the device.
        return not bool(uncond.any())

    def _after_guidance(self, args: dict[str, Any]) -> Tensor:
        """Return the guided estimate with the delta."""
        call, self._evaluation = self._evaluation, None
        denoised: Tensor = args["denoised"]
        if call is None:
            return denoised
        uncond: Tensor | None = args["uncond_denoised"]
        skipped = self._is_uncond_skipped(uncond, args["model_options"].get(PRE_CFG))
        step = DenoiseStep(
            x=args["input"].float(),
            sigma=args["sigma"].float(),
            denoised=denoised.float(),
            cfg_scale=call.cfg_scale,
            progress=call.progress,
            step=call.step,
            uncond_skipped=skipped,
            uncond_zero=True,
        )
        changes = call.run.changes(step, lambda: replace(self.main_model(), merging=call.merging), call.hires)
        if changes is None:
            return denoised
        if BACKEND:
            with call.run.guarded("giving AND's parts their regions"):
                combine = sampling.calc_cond_uncond_batch
                changes = combine_in_regions(changes, args, call.cfg_scale, combine, skipped=skipped)
        if call.uncond_used and uncond is not None and not skipped:
            # In place: this function returns only the guided estimate.
            uncond += changes.uncond.to(uncond)
        return (denoised + changes.guided).to(denoised)


def _token_merging_of_pass(p: Any, hires: bool) -> TokenMerging | None:
    """Return the main model's token merging in a pass, with the random choice that it makes next."""
    ratio = float(p.get_token_merging_ratio(for_hr=hires) or 0)
    if not ratio > 0:
        return None
    from lib_delta.models.token_merging import RandomChoice, TokenMerging, first_of_cell

    same = bool(getattr(shared.opts, "token_merging_no_rand", False))
    return TokenMerging(
        ratio,
        int(getattr(shared.opts, "token_merging_stride", 2)),
        int(getattr(shared.opts, "token_merging_downsample", 1)),
        queries=True,
        choice=first_of_cell if same else RandomChoice.as_next_on(memory.get_torch_device()),
    )


def running() -> Forge:
    """Return the WebUI that is running."""
    return Forge()
