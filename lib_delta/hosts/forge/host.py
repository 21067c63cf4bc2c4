"""Forge, and its relatives as far as they share its interfaces.

Before each evaluation Forge calls back with the images' own rows; what was denoised passes through the
UNet patcher's post-CFG functions, before masks are blended in and previews are taken.  The patcher is
given our function, and the side model to load beside the main one, before each pass; and once more where
a refiner replaces it in mid-run.
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

from lib_delta.core.guidance import DenoiseStep
from lib_delta.devices import indexed
from lib_delta.diffusion.families import Family
from lib_delta.errors import DeltaError, SettingError
from lib_delta.hosts.base import RUN_ATTRIBUTE, Host
from lib_delta.hosts.compute_device import ACTIVATION_BYTES, side_device
from lib_delta.hosts.forge.regions import WRAPPER, in_regions
from lib_delta.hosts.forge.whole_patcher import whole
from lib_delta.hosts.generation.foreign_patches import extension_names, patched_forwards
from lib_delta.hosts.generation.main_model import MainModel, tiles
from lib_delta.hosts.generation.progress import largest_sigma, pass_progress
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
# Where extensions put what they change in the main model and its guidance.
PATCHED_OPTIONS = ("transformer_options", WRAPPER, "sampler_cfg_function", PRE_CFG, POST_CFG)
NO_ROOM = "the side model computed on the CPU, for the WebUI found no room for it on its device"
# What a tiny autoencoder needs for each pixel of a picture, which are drawn one at a time: three maps of 64 channels.
PICTURE_BYTES = 3 * 64 * 4


@dataclass(frozen=True)
class Evaluation:
    """One evaluation, as the callback before it sees it.

    ``uncond_used`` tells that the sampler (CFG++) works with the estimate for the negative prompt as well.
    """

    run: Run
    hires: bool
    progress: float
    step: int
    cfg_scale: float
    uncond_used: bool
    merging: TokenMerging | None


class Forge(Host):
    """Stable Diffusion WebUI Forge and Forge Neo; reForge and Forge Classic where there is no package ``backend``."""

    name = {"neo": "Forge Neo", "classic": "Forge Classic"}.get(VERSION, "Forge" if BACKEND else "reForge")

    def __init__(self) -> None:
        super().__init__()
        self._engine: tuple[SideModel, TextEngine] | None = None
        self._patcher: Any = None
        # Between the callback and the functions, which are told nothing of it: the call, and whether the model is not
        # shown the negative prompt in it, if that was seen.
        self._call: Evaluation | None = None
        self._uncond_left_out: bool | None = None

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
        if _flow(schedule):
            return MainModel(family, math.inf, flow=True, tiled=tiled)
        return MainModel(family, largest_sigma(schedule.sigmas), tiled=tiled)

    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        device: torch.device = memory.get_torch_device()
        if device.type == "cpu":
            return device, torch.float32
        return device, torch.float16 if memory.should_use_fp16(device) else torch.float32

    def text_engine(self, model: SideModel) -> TextEngine:
        if self._engine is None or self._engine[0] is not model:
            self._engine = model, _text_engine(model)
        return self._engine[1]

    def text_device(self) -> torch.device:
        device: torch.device = memory.text_encoder_device()
        return device

    def enter(self, p: Any, model: SideModel) -> None:
        device = side_device(*self.compute_device())[0]
        streamed = self.streams_blocks()
        own = memory.get_torch_device()  # as the memory manager calls it, which compares it with others
        managed = device == indexed(own) and not streamed
        if self._patcher is not None and not (managed and self._patcher.model is model.network):
            self._drop_patcher()
        if not managed:
            # Where the user wants it elsewhere, it is none of the memory manager's business.
            model.stream_to(device) if streamed else model.move_to(device)
        elif self._patcher is None:
            model.offload()
            self._patcher = whole(patching.ModelPatcher)(
                model.network, load_device=own, offload_device=memory.unet_offload_device()
            )

    def before_sampling(self, p: Any) -> None:
        """Put our functions in place, and tell the memory manager to load the side model beside the main one."""
        if getattr(p, RUN_ATTRIBUTE, None) is not None:
            self._join(p, shared.sd_model.forge_objects)

    def _join(self, p: Any, forge_objects: Any) -> None:
        """Give the main model's patcher what it lacks of ours.

        On a clone, for the next generation starts from the original; and before the clone is loaded, for
        the memory manager loses sight of a model whose loaded patcher is not the one in use.
        """
        unet = forge_objects.unet
        lacking = [name for name, ours in self._functions.items() if ours not in unet.model_options.get(name, [])]
        lacks_model = self._patcher is not None and self._patcher not in unet.extra_model_patchers_during_sampling
        if not (lacking or lacks_model):
            return
        unet = unet.clone()
        for name in lacking:
            unet.model_options[name] = [*unet.model_options.get(name, []), self._functions[name]]
        if lacks_model:
            unet.add_extra_model_patcher_during_sampling(self._patcher)
        if lacks_model or self._patcher is None:
            unet.add_extra_preserved_memory_during_sampling(self._room_for(p))
        forge_objects.unet = unet

    def _room_for(self, p: Any) -> int:
        """Return the bytes that the main model must leave to us, making room where there is too little.

        The memory manager can leave a part of the main model in the CPU's memory, but not of a side model; and
        it leaves a main model that is loaded already where it is.
        """
        run: Run = getattr(p, RUN_ATTRIBUTE)
        target, own = self.main_model(), memory.get_torch_device()
        width, height = p.width, p.height
        if getattr(p, "is_hr_pass", False):
            width, height = p.hr_upscale_to_x or width, p.hr_upscale_to_y or height
        # What is in place is missing from what is free already.
        waiting = 0 if self._patcher is None else run.model.elsewhere(own)
        room = waiting + run.model.streamed_bytes
        if self._patcher is not None or run.model.streamed_bytes:
            rows, columns = run.bridge(target).source_size(height // 8, width // 8)
            # Both branches, each with and without the prompt.
            room += 4 * p.batch_size * rows * columns * ACTIVATION_BYTES
        if run.passes.first.bridge == "taesd" and target.family.space is not run.model.report.family.space:
            room += width * height * PICTURE_BYTES
        needed = room + memory.minimum_inference_memory()
        if own != CPU and waiting and memory.get_free_memory(own) < needed:
            memory.unload_all_models()
        return room

    def leave(self, model: SideModel) -> None:
        """End what is no business of the memory manager, which takes models away when it needs their room."""
        model.offload()

    def keep_schedule(self, p: Any) -> Callable[[], None]:
        """Return what takes the rescale to zero terminal SNR back: the WebUI does it for pictures that succeed only."""
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

    def forget(self, dropped: Sequence[SideModel]) -> None:
        self._call = None  # of a step that was broken off
        if self._engine is not None and any(self._engine[0] is model for model in dropped):
            self._engine = None
        if self._patcher is not None and any(self._patcher.model is model.network for model in dropped):
            self._drop_patcher()

    def _drop_patcher(self) -> None:
        """Have the memory manager and the main model's patchers let go of a side model."""
        loaded = memory.current_loaded_models
        for entry in [entry for entry in loaded if self._patcher.is_clone(entry.model)]:
            loaded.remove(entry)
            entry.model_unload()
        # The last generation's clones of the main model's patcher are there until the next one.
        main = getattr(shared.sd_model, "forge_objects", None)  # there is none where a checkpoint could not be loaded
        for patcher in (getattr(main, "unet", None), *(entry.model for entry in loaded)):
            extra = getattr(patcher, "extra_model_patchers_during_sampling", [])
            extra[:] = [other for other in extra if other is not self._patcher]
        self._patcher = None

    def free_memory(self) -> None:
        memory.soft_empty_cache()

    def _before_model(self, params: Any) -> None:
        missed, self._call, self._uncond_left_out = self._call, None, None
        denoiser = params.denoiser
        run: Run | None = getattr(denoiser.p, RUN_ATTRIBUTE, None)
        if run is not None:
            with run.guarded("reading a step's state for Delta Sampling"):
                if missed is not None and missed.run is run:
                    raise DeltaError(
                        f"the sampler {denoiser.p.sampler_name} or another extension leaves out what is added after "
                        "guidance, and the delta with it: choose another sampler"
                    )
                self._call_of(run, denoiser, params.x, params.sigma)

    def _call_of(self, run: Run, denoiser: Any, x: Tensor, sigma: Tensor) -> None:
        """Note what the post-CFG function has to know, if there is a delta to add."""
        hires = bool(getattr(denoiser.p, "is_hr_pass", False))
        if hires not in run.levels:
            run.foreign_patches |= patched_forwards(denoiser.inner_model.inner_model.forge_objects.unet.model)
        run.levels[hires] = pass_progress(denoiser).levels
        (noise,) = run.read(sigma.max())
        progress = pass_progress(denoiser).at(noise)
        # Without noise every model's estimate is what it is shown, and no two differ.
        if not noise or not run.strength(progress, hires):
            return
        extra = denoiser.sampler.sampler_extra_args
        scale = extra["cond_scale"]
        if hires:
            scale = getattr(denoiser.p, "hr_cfg", scale)
        uncond_used = bool(getattr(denoiser, "need_last_noise_uncond", False))
        # In reForge, samplers that want the estimate for the negative prompt put functions of theirs in place of all.
        functions = (extra.get("model_options") or {}).get(POST_CFG)
        if functions:
            uncond_used = True
            if self._functions[POST_CFG] not in functions:
                functions.append(self._functions[POST_CFG])
        merging = _token_merging_of_pass(denoiser.p, hires)
        unet = denoiser.inner_model.inner_model.forge_objects.unet
        self._call = Evaluation(run, hires, progress, denoiser.step, float(scale), uncond_used, merging)
        run.foreign_patches |= extension_names([unet.model_options.get(name) for name in PATCHED_OPTIONS])
        self._put_in_place(run, denoiser.p, denoiser.inner_model.inner_model.forge_objects, x)

    def _put_in_place(self, run: Run, p: Any, forge_objects: Any, x: Tensor) -> None:
        """Make our functions the last of those before and after guidance, and have the side model where it computes."""
        known = forge_objects.unet.model_options
        if self._functions[POST_CFG] not in known.get(POST_CFG, []):
            # A refiner: all models were unloaded, ours as well, and the main one alone is back.
            self._join(p, forge_objects)
            sampling.sampling_prepare(forge_objects.unet, x=x)
        else:
            for name, ours in self._functions.items():
                functions = known.setdefault(name, [])
                if not functions or functions[-1] is not ours:
                    functions[:] = [*(other for other in functions if other is not ours), ours]
        if self._patcher is not None:
            self._bring_back(run, forge_objects, x)

    def _bring_back(self, run: Run, forge_objects: Any, x: Tensor) -> None:
        """Have the memory manager load what it has unloaded in mid-run, as for a preview; or say that it did not.

        It does so where it loads the main model as well, between two evaluations of it, and for both at once.
        """
        device = memory.get_torch_device()
        if not run.model.elsewhere(device):
            return
        if NO_ROOM not in run.remarks:
            sampling.sampling_prepare(forge_objects.unet, x=x)
        if run.model.elsewhere(device):
            run.model.move_to(CPU)  # and not in two places
            run.remark(NO_ROOM)

    def _before_guidance(self, given: tuple[Any, ...]) -> Any:
        """See whether the model is not shown the negative prompt, and hand on what is given.

        Each WebUI leaves it out by rules of its own, and other extensions do.  Functions are given the model, the
        prompt, the negative prompt and more, to be evaluated then; in reForge what was evaluated, as a dictionary.
        """
        if len(given) == 1:
            self._uncond_left_out = given[0]["conds"][1] is None
            return given[0]["conds_out"]
        self._uncond_left_out = given[2] is None
        return given

    def _was_left_out(self, uncond: Tensor, before_guidance: list[Any] | None) -> bool:
        """Tell whether an estimate for the negative prompt is none, of which ours is to be the last to know."""
        ours = self._functions[PRE_CFG]
        if self._uncond_left_out is not None and before_guidance and before_guidance[-1] is ours:
            return self._uncond_left_out
        # Another extension has put in a function since, or taken ours away.  To look is to wait for the device.
        return not bool(uncond.any())

    def _after_guidance(self, args: dict[str, Any]) -> Tensor:
        call, self._call = self._call, None
        denoised: Tensor = args["denoised"]
        if call is None:
            return denoised
        # At CFG 1, and where guidance is left out to save time, there is no estimate for the negative prompt:
        # zeros or nothing, to which the parts of a prompt joined by AND are then added.
        uncond: Tensor | None = args["uncond_denoised"]
        skipped = uncond is None or self._was_left_out(uncond, args["model_options"].get(PRE_CFG))
        x, sigma = args["input"].float(), args["sigma"].float()
        step = DenoiseStep(x, sigma, denoised.float(), call.cfg_scale, call.progress, call.step, skipped, True)
        changes = call.run.changes(step, lambda: replace(self.main_model(), merging=call.merging), call.hires)
        if changes is None:
            return denoised
        if BACKEND:
            with call.run.guarded("giving AND's parts their regions"):
                changes = in_regions(changes, args, call.cfg_scale, skipped, sampling.calc_cond_uncond_batch)
        if call.uncond_used and uncond is not None and not skipped:
            # In place, for what a function returns is the guided estimate alone.
            uncond += changes.uncond.to(uncond)
        return (denoised + changes.guided).to(denoised)


def _text_engine(model: SideModel) -> TextEngine:
    if BACKEND:
        from lib_delta.hosts.forge.text_engine import ForgeTextEngine

        return ForgeTextEngine(model)
    from lib_delta.hosts.forge.text_engine_reforge import ReForgeTextEngine

    return ReForgeTextEngine(model)


def _token_merging_of_pass(p: Any, hires: bool) -> TokenMerging | None:
    """Return the main model's token merging in a pass, with the random choice that it is about to make."""
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


# By channels and scale factor of their latents: a model's class says less, for some pretend to be SDXL.
FAMILIES = {
    (4, 0.18215): Family.SD1,
    (4, 0.13025): Family.SDXL,
    (16, 1.5305): Family.SD3,
    (16, 0.3611): Family.FLUX,
    (16, 1.0): Family.WAN,
    (128, 1.0): Family.FLUX2,
}
FLAGS = {"is_sdxl": Family.SDXL, "is_sd3": Family.SD3, "is_sd2": Family.SD2, "is_sd1": Family.SD1}


def family_by_latents(model: Any) -> Family:
    """Tell the family of the WebUI's checkpoint by its latents; raises :class:`SettingError` for those not known."""
    latents = getattr(getattr(model, "model_config", None), "latent_format", None)
    flagged = next((family for flag, family in FLAGS.items() if getattr(model, flag, False)), None)
    if latents is None:
        found, kind = flagged, "a family"
    else:
        found = FAMILIES.get((latents.latent_channels, latents.scale_factor))
        kind = f"latents ({type(latents).__name__})"
    if found is None:
        raise SettingError(
            f"the main checkpoint ({type(model).__name__}) is of {kind} that Delta Sampling does not know: "
            "SD 1.x, SD 2.x, SDXL, SD 3 or one with FLUX.1's latents is needed"
        )
    # SD 2.x has the latents of SD 1.x.
    return Family.SD2 if found is Family.SD1 and flagged is Family.SD2 else found


def _flow(schedule: Any) -> bool:
    """Tell whether a model is one of flow matching; what says so has no name of its own in reForge."""
    by_name = any(kind.__name__ == "CONST" for kind in type(schedule).__mro__)
    return by_name or getattr(schedule, "prediction_type", None) == "const"


def running() -> Forge:
    """Return the WebUI that is running."""
    return Forge()
