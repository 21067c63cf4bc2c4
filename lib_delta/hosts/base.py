"""What AUTOMATIC1111's WebUI and its relatives have in common.

A generation is a ``p`` (StableDiffusionProcessing).  Each batch ends in ``p.sample(...)``, the only
place whose exceptions reach the user; so that is where the source is made ready and where a fault
comes out.  The samplers' callbacks in between find the run on their ``p``.
"""

from __future__ import annotations

import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import (
    extra_networks,
    paths_internal,
    processing,
    script_callbacks,
    sd_models,
    shared,
)

from lib_delta.diffusion.latent_spaces import LATENT_STRIDE
from lib_delta.errors import AdapterError, DeltaError, SettingError, clear_frames
from lib_delta.hosts.compute_device import fp8_storage, side_device
from lib_delta.hosts.control_units.units import MAP_HASHES, UNIT_AXES, UNIT_HASHES, Units, plotted, with_unit_axes
from lib_delta.hosts.files.catalog import Catalog
from lib_delta.hosts.generation import heatmap_picture, nested_runs, prompt_tags
from lib_delta.hosts.generation.main_model import MainModel
from lib_delta.hosts.generation.nested_runs import LastRun
from lib_delta.hosts.generation.xyz_cell import error_images, is_xyz_cell, write_infotext_of_grid
from lib_delta.hosts.prompts.encoder import CachedEncoder
from lib_delta.hosts.prompts.pass_prompts import prompts_per_pass, side_prompts, without_networks
from lib_delta.hosts.prompts.text_engine import TextEngine
from lib_delta.hosts.settings import base_cache_bytes, max_cached_bases, one_of, option, warn_once
from lib_delta.request.control_unit import format_units
from lib_delta.request.lora_recipe import Pick, format_picks
from lib_delta.request.passes import Passes
from lib_delta.request.presets import Presets
from lib_delta.request.request import LORA_HASHES, NONE, NOT_APPLIED, Active, Request, infotext_labels
from lib_delta.request.setting_choices import ADAPTER_FORMS, FP8, ON_ERROR, PLACEMENTS, PRECISIONS, STOP, STREAMED

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lib_delta.core.source import Source
    from lib_delta.hosts.generation.run import Run
    from lib_delta.runtime.side_model import SideModel, SideModels

TAKING_AWAY = "taking the side model of Delta Sampling away"
REQUEST_ATTRIBUTE, RUN_ATTRIBUTE, AXES_ATTRIBUTE = "delta_sampling_request", "delta_sampling_run", "delta_sampling_axes"


class Host(ABC):
    """A WebUI: its lists and options, its hooks, its prompt grammar and its memory."""

    name = "WebUI"

    def __init__(self) -> None:
        self.units = Units()
        self.catalog = Catalog(self.units.files)
        self._models: SideModels | None = None
        self._last_run = LastRun()
        self._sampling = 0  # generations, one within another, that work with side models now
        # The job of the last XYZ cell, and the cell's values.
        self._cell: tuple[float | None, dict[str, Any]] = None, {}

    # What differs from WebUI to WebUI.

    @abstractmethod
    def install(self) -> None:
        """Register the callbacks that samplers call at every step."""

    @abstractmethod
    def main_model(self) -> MainModel:
        """Tell what checkpoint is loaded now."""

    @abstractmethod
    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        """Return where the WebUI computes and in which type."""

    @abstractmethod
    def text_engine(self, model: SideModel) -> TextEngine:
        """Return the WebUI's prompt code with the side model's text encoder."""

    @abstractmethod
    def text_device(self) -> torch.device:
        """Return where prompts are encoded."""

    @abstractmethod
    def enter(self, p: Any, model: SideModel) -> None:
        """Bring the side model where it computes, before a batch is sampled."""

    @abstractmethod
    def leave(self, model: SideModel) -> None:
        """Take the side model away after a batch, where memory is short; what it raises costs no picture."""

    @abstractmethod
    def free_memory(self) -> None:
        """Return cached memory to the system."""

    @abstractmethod
    def before_sampling(self, p: Any) -> None:
        """Do what has to be done right before the sampler starts, once for each pass."""

    def keep_schedule(self, p: Any) -> Callable[[], None]:
        """Return what gives the main model its noise schedule of now back, where an error would leave another."""
        return lambda: None

    def tiny_autoencoders(self) -> Path:
        """Return the folder where the WebUI has the tiny autoencoders (TAESD) that it shows previews by."""
        return Path(paths_internal.models_path) / "VAE-taesd"

    def quantized(self) -> bool:
        """Tell whether the WebUI asks its models at whole timesteps only, and not between them."""
        return bool(getattr(shared.opts, "enable_quantization", False))

    def presets(self) -> Presets:
        """Return the user's presets, which are in a file beside the WebUI's own settings of widgets."""
        return Presets(Path(shared.cmd_opts.ui_config_file).with_name("delta-sampling-presets.json"))

    # A generation.

    def start(self) -> None:
        """Register the callbacks and the prompt tag; once, when the script is loaded."""
        self.install()
        script_callbacks.on_before_ui(_register_tag)

    def process(self, p: Any, arguments: Sequence[Any]) -> None:
        """Read what a generation asks for; what is wrong with it is raised when it samples."""
        if not nested_runs.is_copy(p):  # or else the run that it was copied from is still to write its text
            _clear_infotext(p)
            self._last_run.begin(p)
            nested_runs.begin(p)
        try:
            setattr(p, REQUEST_ATTRIBUTE, Request.from_arguments(arguments, **_fields_of(self._axes_of(p))))
        except Exception as error:  # the WebUI would swallow it, and make a plain picture
            setattr(p, REQUEST_ATTRIBUTE, _fault_of(error))

    def _axes_of(self, p: Any) -> dict[str, Any]:
        """Return an XYZ cell's values; a generation within the cell's, as that of a face, has them as well."""
        axes: dict[str, Any] | None = getattr(p, AXES_ATTRIBUTE, None)
        if axes is not None:
            self._cell = nested_runs.job(), axes
        elif nested_runs.job() is not None and self._cell[0] == nested_runs.job():
            setattr(p, AXES_ATTRIBUTE, self._cell[1])
        return getattr(p, AXES_ATTRIBUTE, {})

    def process_batch(self, p: Any) -> None:
        """Prepare a batch: its tags are known now, and ``params.txt`` is written next."""
        if nested_runs.is_copy(p):  # that generates, and has a text of its own
            p.extra_generation_params = dict(p.extra_generation_params)
            nested_runs.begin(p)
        _clear_infotext(p)  # what the batch before it had
        try:
            self._process_batch(p)
        except Exception as error:  # as in process
            _clear_infotext(p)
            self._wrap_sample(p, _fault_of(error))

    def _process_batch(self, p: Any) -> None:
        request: Request | DeltaError | None = getattr(p, REQUEST_ATTRIBUTE, None)
        if request is None:
            return
        for sentence in prompt_tags.drop_ignored_tags(p, getattr(p, "iteration", 0)):
            p.comment(f"Delta Sampling: {sentence}.")
        asked = request if isinstance(request, DeltaError) else self._of_batch(p, request)
        if isinstance(asked, Passes) and isinstance(request, Request):
            self._write_infotext(p, asked, request)
            if not asked.wanted:
                if asked.first.enabled or asked.hires.enabled:
                    self._last_run.tell(p, "no delta was asked for: lambda is 0")
                return
        self._wrap_sample(p, asked)

    def _write_infotext(self, p: Any, asked: Passes, accordion: Request) -> None:
        if asked.wanted:
            p.extra_generation_params.update(self._infotext_for(asked.as_infotext(accordion)))
            said = (
                accordion.overridden_by(asked.first) if accordion.enabled and not getattr(p, AXES_ATTRIBUTE, {}) else ""
            )
            if said:
                p.comment(f"Delta Sampling: the prompt's <delta:...> asks for {said}, and that counts.")
        self._claim_in_grid(p, asked)

    def _claim_in_grid(self, p: Any, asked: Passes) -> None:
        """Have a plot's own text ask for all that its cells do, whatever this one leaves out."""
        accordion = getattr(p, REQUEST_ATTRIBUTE, None)
        if not (is_xyz_cell(p) and asked.first.enabled and isinstance(accordion, Request)):
            return
        request = asked.as_infotext(accordion) if asked.wanted else asked.first
        units = plotted(request.units, accordion.units)
        claims = self._infotext_for(replace(request, units=units))
        if any(unit.enabled for unit in units):  # one of weight 0 is told here, and by no picture
            claims.setdefault(infotext_labels()["units"], format_units(units))
        write_infotext_of_grid(p, claims)

    def _infotext_for(self, request: Request) -> dict[str, str]:
        """Return what a picture says of a request, with names by which the WebUI finds the same files."""
        unique = self.catalog.unique
        try:
            request = replace(request, base=unique(request.base), adapted=unique(request.adapted))
            request = self.units.with_listed_names(request)
            of_units = self.units.hashes(request, sd_models.model_hash)
        except SettingError:
            return request.infotext()  # the same error comes out when the batch samples
        return request.infotext(self.catalog.hashes(request)) | of_units

    def _of_batch(self, p: Any, accordion: Request) -> Passes | DeltaError:
        axes = getattr(p, AXES_ATTRIBUTE, {})

        def read(of_prompt: list[list[str]]) -> Request:
            if axes.get("strength") == 0:
                return accordion
            asked = _with_all_axes(accordion.with_tags(of_prompt), axes)
            if asked.wanted and not asked.base:
                asked = replace(asked, base=_name_or_empty(option("base", NONE)))
            if isinstance(p, processing.StableDiffusionProcessingImg2Img):
                asked = replace(asked, hires="both")  # there is but one pass, whatever was sent over from txt2img
            return asked

        try:
            return prompt_tags.passes_of(p, read)
        except DeltaError as error:
            return error

    def _wrap_sample(self, p: Any, asked: Passes | DeltaError) -> None:
        """Put the delta around this batch's ``p.sample``; on the instance, and only until it is called."""
        own = p.__dict__.get("sample")
        sample = p.sample

        def restore() -> None:
            if own is None:
                p.__dict__.pop("sample", None)
            else:
                p.sample = own

        undo = self.keep_schedule(p)

        def with_delta(*arguments: Any, **named: Any) -> Tensor | list[Tensor]:
            restore()
            try:
                return self._sample(p, asked, lambda: sample(*arguments, **named))
            except DeltaError as error:
                undo()
                clear_frames(error)
                self.free_memory()
                self._last_run.tell(p, f"no delta: {error}")
                if not is_xyz_cell(p):
                    self._last_run.end(p)
                    raise
                # The plot would leave the cell black, and tell the console alone.
                _not_applied(p, error)
                if isinstance(asked, Passes):
                    self._claim_in_grid(p, asked)
                return error_images(p, str(error))
            except BaseException:
                undo()
                self._last_run.end(p)
                raise

        p.sample = with_delta

    def _sample(self, p: Any, asked: Passes | DeltaError, sample: Callable[[], Tensor]) -> Tensor:
        from lib_delta.hosts.generation.run import StopSampling

        if isinstance(asked, DeltaError):
            raise asked
        if {"loras", "adapted", *UNIT_AXES} & getattr(p, AXES_ATTRIBUTE, {}).keys() and not _adds(asked):
            _clear_infotext(p)  # such a cell of a plot is the plain picture
            self._claim_in_grid(p, asked)
            return sample()
        self._sampling += 1
        try:
            run = self._prepared(p, asked)
            if run is None:
                return sample()
            setattr(p, RUN_ATTRIBUTE, run)
            try:
                made = sample()
                run.read()  # what the last step came to
                return made
            except StopSampling as stop:
                raise stop.error from stop.error.__cause__
            finally:
                delattr(p, RUN_ATTRIBUTE)
                self._finish(p, run)
        finally:
            self._sampling -= 1

    def _finish(self, p: Any, run: Run) -> None:
        run.interrupted = bool(shared.state.interrupted or shared.state.skipped)
        if run.applied and run.heat is not None and run.heat.steps:
            run.afterwards("keeping the picture of the delta", partial(heatmap_picture.keep, p, run.heat))
        if not run.applied:
            _clear_infotext(p)
            self._claim_in_grid(p, run.passes)
            if run.fault is None and run.reason():
                p.comment(f"Delta Sampling: {run.reason()}: the picture is as it would be without it.")
        if run.fault is not None and one_of("on_error", ON_ERROR) != STOP:
            p.extra_generation_params[NOT_APPLIED] = str(run.fault)
        away = self._free_side_models if run.fault is not None else partial(self.leave, run.model)
        run.afterwards(TAKING_AWAY, away)
        for remark in run.remarks:
            p.comment(f"Delta Sampling: {remark}.")
        self._last_run.tell(p, run.summary())

    def postprocess(self, p: Any, processed: Any) -> None:
        """Show what was kept of a generation beside what it has made, and clean up."""
        if nested_runs.is_copy(p):
            return
        heatmap_picture.show(p, processed)
        for name in (REQUEST_ATTRIBUTE, AXES_ATTRIBUTE):
            p.__dict__.pop(name, None)
        nested_runs.end(p)
        self._last_run.end(p)
        if max_cached_bases() == 0 and not self._sampling:
            self._free_side_models()

    def _prepared(self, p: Any, asked: Passes) -> Run | None:
        """Load and tell the source; None where that failed and the user wants to go on without."""
        from lib_delta.runtime.side_model import user_error

        shared.state.textinfo = "Delta Sampling: loading the side model"
        try:
            return self._prepare(p, asked)
        except Exception as error:  # whatever it is, the user hears of it
            fault = user_error(error, "loading the side model of Delta Sampling")
            if not (isinstance(fault, (SettingError, AdapterError)) and max_cached_bases()):
                self._free_side_models()  # else the base is not to blame, and waits for something better
            self._last_run.tell(p, f"no step had the delta: {fault}")
            if isinstance(fault, SettingError) or one_of("on_error", ON_ERROR) == STOP:
                raise fault from None if fault is error else error
            _not_applied(p, fault)
            self._claim_in_grid(p, asked)
            _go_on_without(p, fault, error)
            clear_frames(error)
            return None
        finally:
            shared.state.textinfo = None

    def _prepare(self, p: Any, asked: Passes) -> Run:
        from lib_delta.core.heatmap import HeatMap
        from lib_delta.hosts.generation.run import Run
        from lib_delta.runtime.compiling import compile_unet
        from lib_delta.runtime.side_model import AdapterPick

        request = asked.first if asked.first.wanted else asked.hires
        if not (request.base or _adds(asked)):
            raise SettingError(
                "Delta Sampling is switched on, and nothing is chosen: choose a base checkpoint, which is the SD 1.x "
                "model that your LoRA was made for, and the LoRA, or switch it off"
            )
        if not request.base:
            raise SettingError(
                "Delta Sampling needs the SD 1.x checkpoint that the LoRA was made for: choose a base checkpoint, "
                "or one for always in Settings > Delta Sampling > Default base checkpoint"
            )
        if not _adds(asked):
            raise SettingError(
                "Delta Sampling has nothing to add: choose a LoRA, an adapted checkpoint, an adapted prompt, "
                "or a unit with a ControlNet or IP-Adapter"
            )

        def tell(sentence: str) -> None:
            p.comment(f"Delta Sampling: {sentence}")

        picks = [self._adapter_pick(pick) for pick in asked.picks()]
        base = self.catalog.file_named(request.base, tell)
        adapted = self.catalog.file_named(request.adapted, tell) if request.adapted else base
        if adapted != base:
            picks.append(AdapterPick(adapted))
        model = self._load(base)
        form = one_of("form", ADAPTER_FORMS)
        model.adapt(picks, "bypass" if form == ADAPTER_FORMS[-1] else form)  # type: ignore[arg-type]
        compile_unet(model.unet, option("compile", False) is True, warn_once)
        for file in model.adapters:
            if file.unmatched:
                tell(file.report())
        self._set_controls(p, asked, model)
        sources = self._make_sources(p, asked, model)
        run = Run(
            asked,
            model,
            sources,
            lambda fault: self._fault(p, fault),
            heat=HeatMap() if option("show", False) else None,
            autoencoders=self.tiny_autoencoders(),
        )
        run.bridge(self.main_model())
        self.enter(p, model)
        return run

    def _set_controls(self, p: Any, asked: Passes, model: SideModel) -> None:
        """Give the side model what the units ask for, and have the picture tell which maps these were."""
        from lib_delta.bridges import choose_bridge

        request, family = asked.first if asked.first.wanted else asked.hires, self.main_model().family

        def sized(height: int, width: int) -> tuple[int, int]:
            bridge = choose_bridge(
                model.report.family,
                family,
                form=request.bridge,
                size=request.side_size,
                autoencoders=self.tiny_autoencoders(),
            )
            rows, columns = bridge.source_size(-(-height // LATENT_STRIDE), -(-width // LATENT_STRIDE))
            return LATENT_STRIDE * rows, LATENT_STRIDE * columns

        picks, said = self.units.picks(p, asked, sized)
        model.set_controls(picks)
        p.extra_generation_params.update(said)

    def _load(self, path: Path) -> SideModel:
        from lib_delta.runtime.side_model import SideModels

        if self._models is None:
            self._models = SideModels(self.forget)
        device, dtype = side_device(*self.compute_device())
        storage = fp8_storage(device, dtype) if one_of("precision", PRECISIONS) == FP8 else None
        return self._models.get(path, dtype, limit=max(1, max_cached_bases()), room=base_cache_bytes(), storage=storage)

    def streams_blocks(self) -> bool:
        """Tell whether the user wants the side model on its device block by block."""
        return side_device(*self.compute_device())[0].type != "cpu" and one_of("placement", PLACEMENTS) == STREAMED

    def _adapter_pick(self, pick: Pick) -> Any:
        from lib_delta.runtime.side_model import AdapterPick

        return AdapterPick(
            Path(self.catalog.lora(pick.name).filename), pick.weight, pick.text_weight, pick.blocks, pick.rank
        )

    def _fault(self, p: Any, fault: DeltaError) -> None:
        from lib_delta.hosts.generation.run import StopSampling

        if one_of("on_error", ON_ERROR) == STOP:
            raise StopSampling(fault)
        _go_on_without(p, fault, fault.__cause__ or fault)

    # Prompts.

    def _make_sources(self, p: Any, asked: Passes, model: SideModel) -> dict[tuple[bool, Active], Source]:
        """Encode the prompts for each pass and for each set of LoRAs that counts at some point of it."""
        from lib_delta.core.source import Source

        sources = {}
        with CachedEncoder(model, self.text_engine(model), self.text_device()) as encode:
            for hires, told in prompts_per_pass(p, asked):
                request = asked.of(hires)
                base_told = encode(None, told.prompts, told)
                own = side_prompts(request.adapted_prompt, told.prompts)
                prompts = without_networks(own, len(own)) if own else None
                for active in asked.stages(hires):
                    adapted_told = None
                    if model.text_state(active) or prompts:
                        adapted_told = encode(active, prompts or told.prompts, told)
                    sources[hires, active] = Source(
                        model.unet,
                        model.parameterization,
                        base_told,
                        adapted_told,
                        quantize=self.quantized(),
                        guides=model.controls.guides,
                    )
        return sources

    # What the user sees.

    def status(self) -> str:
        """Return what is loaded, where, how large, what did not match, and what the last run cost; a line each."""
        lines = []
        for model in self._models or ():
            lines.append(
                f"{model.name}: on {model.device}, {model.memory / 2**20:.0f} MB"
                f" ({str(model.dtype).removeprefix('torch.')})"
            )
            lines += [file.report() for file in model.adapters]
            lines += [f"{file.name}: {file.kind}" for file in model.controls.files]
        return "\n".join([*(lines or ["No side model is loaded"]), *self._last_run.lines()])

    def unload(self) -> str:
        """Give back the side models' memory, unless a generation works with them; say which in a sentence."""
        if self._sampling:
            return "A generation is running with the side model: unload when it has ended"
        return self._free_side_models()

    def _free_side_models(self) -> str:
        count = len(list(self._models or ()))
        self.units.clear()
        if self._models is not None:
            self._models.clear()
            self.free_memory()
        return f"Unloaded {count} side model{'' if count == 1 else 's'}"

    @abstractmethod
    def forget(self, dropped: Sequence[SideModel]) -> None:
        """Let go of what else refers to these side models."""


def _adds(asked: Passes) -> bool:
    return any(r.wanted and (r.picks() or r.always_differs or r.has_units) for r in (asked.first, asked.hires))


def _with_all_axes(request: Request, axes: Mapping[str, Any]) -> Request:
    """Apply an XYZ cell's values, which switch the delta on."""
    if not axes:
        return request
    request = with_unit_axes(replace(request, **{"enabled": True, **_fields_of(axes)}), axes)
    weight = axes.get("lora_weight")
    if weight is None or not request.wanted:
        return request
    return replace(request, loras=format_picks([replace(pick, weight=float(weight)) for pick in request.picks()]))


def _fault_of(error: Exception) -> DeltaError:
    from lib_delta.runtime.side_model import user_error

    fault = user_error(error, "reading what is asked of Delta Sampling")
    if fault is not error:
        fault.__cause__ = error
    return fault


def _fields_of(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name not in ("lora_weight", *UNIT_AXES)}


def _clear_infotext(p: Any) -> None:
    for label in (*infotext_labels().values(), LORA_HASHES, UNIT_HASHES, MAP_HASHES, NOT_APPLIED):
        p.extra_generation_params.pop(label, None)


def _not_applied(p: Any, fault: DeltaError) -> None:
    """Have the picture say why it got no delta, for callers of the API see no comments."""
    _clear_infotext(p)
    p.extra_generation_params[NOT_APPLIED] = str(fault)


def _go_on_without(p: Any, fault: DeltaError, error: BaseException) -> None:
    print(f"Delta Sampling: {fault}; going on without it", file=sys.stderr)
    traceback.print_exception(type(error), error, error.__traceback__)
    p.comment(f"Delta Sampling: {fault}. The picture was made without it.")


def _register_tag() -> None:
    class DeltaTag(extra_networks.ExtraNetwork):  # type: ignore[misc]
        """Makes the tag known to the WebUI; each batch reads its own tags (:meth:`Host.process_batch`)."""

        def __init__(self) -> None:
            super().__init__(prompt_tags.TAG)

        def activate(self, p: Any, params_list: Any) -> None:
            pass

        def deactivate(self, p: Any) -> None:
            pass

    extra_networks.register_extra_network(DeltaTag())


def _name_or_empty(choice: str | None) -> str:
    return "" if choice in (None, NONE) else str(choice)
