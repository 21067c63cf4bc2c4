"""What AUTOMATIC1111's WebUI and its relatives have in common.

A generation is a ``p`` (StableDiffusionProcessing).  Each batch ends in ``p.sample(...)``, the only
place whose exceptions reach the user; so that is where the source is made ready and where a fault
comes out.  The samplers' callbacks in between find the run on their ``p``.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import json
import math
import sys
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modules import (
    extra_networks,
    paths_internal,
    processing,
    prompt_parser,
    script_callbacks,
    sd_models,
    sd_samplers,
    shared,
)

from lib_delta.errors import DeltaError, SettingError, near, shown
from lib_delta.hosts import heatmap, tags
from lib_delta.hosts.cell import claim_in_grid, is_cell, picture_of
from lib_delta.hosts.encoded import Encoder
from lib_delta.hosts.settings import bases_kept, device_wanted, one_of, option, room_for_bases, warn_once
from lib_delta.hosts.units import AXES as UNIT_AXES
from lib_delta.hosts.units import HASHES as UNIT_HASHES
from lib_delta.hosts.units import MAPS, Units, with_axes
from lib_delta.options import FORMS, FP8, ON_ERROR, PLACEMENTS, PRECISIONS, STOP, STREAMED
from lib_delta.picked import Card
from lib_delta.presets import Presets
from lib_delta.recipe import Pick, format_picks
from lib_delta.request import HASHES, MAIN_PROMPT, NONE, SKIPPED, Active, Passes, Request, infotext_labels

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from lib_delta.families import Family
    from lib_delta.hosts.prompts import Padding
    from lib_delta.hosts.run import Run
    from lib_delta.models.merging import TokenMerging
    from lib_delta.models.text import TextEncoder
    from lib_delta.sidemodel import SideModel, SideModels
    from lib_delta.source import Source

PIXELS = 8  # of a picture, along one side, to a pixel of a latent
REQUEST, RUN, AXES = "delta_sampling_request", "delta_sampling_run", "delta_sampling_axes"
Texts = Sequence[str]


@dataclass(frozen=True)
class Told:
    """Prompts of one pass, a row for each image, without tags."""

    prompts: Texts
    negative: Texts
    steps: int
    hires_steps: int | None


@dataclass(frozen=True)
class Target:
    """The main checkpoint: its family, the largest noise level of its schedule, and whether it is one of flow matching.

    Samplers of such a model hold ``(1 - t) * x0 + t * noise`` and call t sigma; its largest level is infinite.
    ``merging`` is the token merging that it runs with now.
    """

    family: Family
    sigma_max: float
    flow: bool = False
    merging: TokenMerging | None = None


class Host(ABC):
    """A WebUI: its lists and options, its hooks, its prompt grammar and its memory."""

    name = "WebUI"

    def __init__(self) -> None:
        self.units = Units()
        self._models: SideModels | None = None
        self._last = "Nothing has run yet"
        self._sampling = 0  # generations, one within another, that work with side models now
        # The job of the last XYZ cell, and the cell's values.
        self._cell: tuple[float | None, dict[str, Any]] = None, {}

    # What differs from WebUI to WebUI.

    @abstractmethod
    def install(self) -> None:
        """Register the callbacks that samplers call at every step."""

    @abstractmethod
    def target(self) -> Target:
        """Tell what checkpoint is loaded now."""

    @abstractmethod
    def place(self) -> tuple[torch.device, torch.dtype]:
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
        """Take the side model away after a batch, where memory is short."""

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

    # Lists.

    def checkpoints(self) -> list[str]:
        """Return the names of the WebUI's checkpoints."""
        return sorted(self._checkpoint_names().values(), key=str.lower)

    def bases(self) -> list[str]:
        """Return the names of those checkpoints that can be a base, as far as their headers tell."""
        from lib_delta.sidemodel import can_be_base

        names = self._checkpoint_names()
        return sorted((name for file, name in names.items() if can_be_base(Path(file))), key=str.lower)

    def _checkpoint_names(self) -> dict[str, str]:
        """Return the names by which checkpoints are chosen, by their files: with folder where two have the same."""
        infos = list(sd_models.checkpoints_list.values())
        short = [_checkpoint_name(info) for info in infos]
        return {info.filename: info.name if short.count(name) > 1 else name for info, name in zip(infos, short)}

    def refresh_checkpoints(self) -> None:
        """Look for new checkpoints."""
        sd_models.list_models()

    def loras(self) -> list[str]:
        """Return the names of the WebUI's LoRAs."""
        return sorted(self._networks(), key=str.lower)

    def card(self, name: str) -> Card:
        """Return what the user has noted in the WebUI for a LoRA (a ``.json`` beside its file)."""
        try:
            network = self.lora(name)
        except SettingError as error:
            return Card(name, fault=str(error))
        listed = next((own for own, known in self._networks().items() if known is network), name)
        try:
            noted = json.loads(Path(network.filename).with_suffix(".json").read_text("utf-8"))
            weight = float(noted.get("preferred weight") or 1)
            words, negative = (str(noted.get(f"{key} text") or "").strip() for key in ("activation", "negative"))
        except (OSError, ValueError, TypeError, AttributeError):  # none there, or one that is not the WebUI's
            return Card(listed)
        return Card(listed, weight if math.isfinite(weight) else 1.0, words, negative)

    def presets(self) -> Presets:
        """Return the user's presets, which are in a file beside the WebUI's own settings of widgets."""
        return Presets(Path(shared.cmd_opts.ui_config_file).with_name("delta-sampling-presets.json"))

    def refresh_loras(self) -> None:
        """Look for new LoRAs."""
        module = _lora_module()
        if module is not None:
            module.list_available_networks()

    def _networks(self) -> Mapping[str, Any]:
        module = _lora_module()
        return {} if module is None else module.available_networks

    def checkpoint(self, name: str) -> Any:
        """Find a checkpoint as the WebUI does, by title, name, file or hash; raises :class:`SettingError`."""
        by_name = {own: file for file, own in self._checkpoint_names().items()}
        found = next((i for i in sd_models.checkpoints_list.values() if i.filename == by_name.get(name)), None)
        if found is None and name:
            found = sd_models.get_closet_checkpoint_match(name)
        if found is None:
            raise SettingError(
                f"there is no checkpoint {shown(name)} for Delta Sampling{near(name, self.checkpoints())}"
            )
        return found

    def lora(self, name: str) -> Any:
        """Find a LoRA by its name, alias or file; raises :class:`SettingError`."""
        networks = self._networks()
        module = _lora_module()
        aliases = {} if module is None else getattr(module, "available_network_aliases", {})
        found = networks.get(name) or aliases.get(name) or networks.get(Path(name).stem)
        if found is None:
            by_case = {key.lower(): network for key, network in networks.items()}
            found = by_case.get(name.lower())
        if found is None:
            raise SettingError(f"there is no LoRA {shown(name)} for Delta Sampling{near(name, self.loras())}")
        return found

    # A generation.

    def start(self) -> None:
        """Register the callbacks and the prompt tag; once, when the script is loaded."""
        self.install()
        script_callbacks.on_before_ui(_register_tag)

    def process(self, p: Any, arguments: Sequence[Any]) -> None:
        """Read what a generation asks for; what is wrong with it is raised when it samples."""
        _claim_nothing(p)
        self._last = "Last run: no delta was asked for"
        try:
            setattr(p, REQUEST, Request.from_arguments(arguments, **_fields_of(self._axes_of(p))))
        except Exception as error:  # the WebUI would swallow it, and make a plain picture
            setattr(p, REQUEST, _fault_of(error))

    def _axes_of(self, p: Any) -> dict[str, Any]:
        """Return an XYZ cell's values; a generation within the cell's, as that of a face, has them as well."""
        job = getattr(shared.state, "time_start", None)
        own: dict[str, Any] | None = getattr(p, AXES, None)
        if own is not None:
            self._cell = job, own
        elif job is not None and self._cell[0] == job:
            setattr(p, AXES, self._cell[1])
        return getattr(p, AXES, {})

    def process_batch(self, p: Any) -> None:
        """Prepare a batch: its tags are known now, and ``params.txt`` is written next."""
        _claim_nothing(p)  # what the batch before it had
        try:
            self._process_batch(p)
        except Exception as error:  # as in process
            _claim_nothing(p)
            self._wrap_sample(p, _fault_of(error))

    def _process_batch(self, p: Any) -> None:
        request: Request | DeltaError | None = getattr(p, REQUEST, None)
        if request is None:
            return
        for sentence in tags.drop_unfollowed(p, getattr(p, "iteration", 0)):
            p.comment(f"Delta Sampling: {sentence}.")
        asked = request if isinstance(request, DeltaError) else self._of_batch(p, request)
        if isinstance(asked, Passes) and isinstance(request, Request):
            self._claim(p, asked, request)
            if not asked.wanted:
                return
        self._wrap_sample(p, asked)

    def _claim(self, p: Any, asked: Passes, accordion: Request) -> None:
        if asked.wanted:
            claims = self._claims(asked.claimed(accordion))
            p.extra_generation_params.update(claims)
            said = accordion.overruled(asked.first) if accordion.enabled and not getattr(p, AXES, {}) else ""
            if said:
                p.comment(f"Delta Sampling: the prompt's <delta:...> asks for {said}, and that counts.")
        elif asked.first.enabled and is_cell(p):
            claim_in_grid(p, self._claims(asked.first))

    def _claims(self, request: Request) -> dict[str, str]:
        """Return what a picture says of a request, with names by which the WebUI finds the same files."""
        names = self._checkpoint_names()

        def named(name: str) -> str:
            info = self.checkpoint(name) if name else None
            return "" if info is None else names.get(info.filename, _checkpoint_name(info))

        try:
            request = replace(request, base=named(request.base), adapted=named(request.adapted))
            request = self.units.named(request)
            of_units = self.units.hashes(request, sd_models.model_hash)
        except SettingError:
            return request.infotext()  # the same error comes out when the batch samples
        return request.infotext(self._hashes(request)) | of_units

    def _of_batch(self, p: Any, accordion: Request) -> Passes | DeltaError:
        axes = getattr(p, AXES, {})

        def read(of_prompt: list[list[str]]) -> Request:
            if axes.get("strength") == 0:
                return accordion
            asked = _with_axes(accordion.with_tags(of_prompt), axes)
            if asked.wanted and not asked.base:
                asked = replace(asked, base=_named(option("base", NONE)))
            if isinstance(p, processing.StableDiffusionProcessingImg2Img):
                asked = replace(asked, hires="both")  # there is but one pass, whatever was sent over from txt2img
            return asked

        try:
            return tags.passes_of(p, read)
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
                self._last = f"Last run: no delta: {error}"
                if not is_cell(p):
                    raise
                # The plot would leave the cell black, and tell the console alone.
                _not_applied(p, error)
                if isinstance(asked, Passes):
                    claim_in_grid(p, self._claims(asked.first))
                return picture_of(p, str(error))
            except BaseException:
                undo()
                raise

        p.sample = with_delta

    def _sample(self, p: Any, asked: Passes | DeltaError, sample: Callable[[], Tensor]) -> Tensor:
        from lib_delta.hosts.run import Stop

        if isinstance(asked, DeltaError):
            raise asked
        if {"loras", "adapted", *UNIT_AXES} & getattr(p, AXES, {}).keys() and not _adds(asked):
            _claim_nothing(p)  # such a cell of a plot is the plain picture
            claim_in_grid(p, self._claims(asked.first))
            return sample()
        self._sampling += 1
        try:
            run = self._prepared(p, asked)
            if run is None:
                return sample()
            setattr(p, RUN, run)
            try:
                return sample()
            except Stop as stop:
                raise stop.error from stop.error.__cause__
            finally:
                delattr(p, RUN)
                self._finish(p, run)
        finally:
            self._sampling -= 1

    def _finish(self, p: Any, run: Run) -> None:
        run.interrupted = bool(shared.state.interrupted or shared.state.skipped)
        self._last = run.summary()
        if run.applied and run.heat is not None and run.heat.steps:
            heatmap.keep(p, run.heat)
        if not run.applied:
            _claim_nothing(p)
            if run.fault is None and run.reason():
                p.comment(f"Delta Sampling: {run.reason()}: the picture is as it would be without it.")
        if run.fault is not None and one_of("on_error", ON_ERROR) != STOP:
            p.extra_generation_params[SKIPPED] = str(run.fault)
        if run.fault is not None:
            self._give_back()
        else:
            self.leave(run.model)

    def postprocess(self, p: Any, processed: Any) -> None:
        """Show what was kept of a generation beside what it has made, and clean up."""
        heatmap.show(p, processed)
        for name in (REQUEST, AXES):
            p.__dict__.pop(name, None)
        if bases_kept() == 0 and not self._sampling:
            self._give_back()

    def _prepared(self, p: Any, asked: Passes) -> Run | None:
        """Load and tell the source; None where that failed and the user wants to go on without."""
        from lib_delta.sidemodel import sentence

        shared.state.textinfo = "Delta Sampling: loading the side model"
        try:
            return self._prepare(p, asked)
        except Exception as error:  # whatever it is, the user hears of it
            fault = sentence(error, "loading the side model of Delta Sampling")
            self._give_back()
            self._last = f"Last run: no step had the delta: {fault}"
            if isinstance(fault, SettingError) or one_of("on_error", ON_ERROR) == STOP:
                raise fault from None if fault is error else error
            _not_applied(p, fault)
            _go_on_without(p, fault, error)
            return None
        finally:
            shared.state.textinfo = None

    def _prepare(self, p: Any, asked: Passes) -> Run:
        from lib_delta.compiling import compile_unet
        from lib_delta.fork import tile
        from lib_delta.heatmap import HeatMap
        from lib_delta.hosts.run import Run
        from lib_delta.sidemodel import AdapterPick

        request = asked.first if asked.first.wanted else asked.hires
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
        picks = [self._file_of(pick) for pick in asked.picks()]
        base = self._file_named(p, request.base)
        adapted = self._file_named(p, request.adapted) if request.adapted else base
        if adapted != base:
            picks.append(AdapterPick(adapted))
        model = self._load(base)
        form = one_of("form", FORMS)
        model.adapt(picks, "bypass" if form == FORMS[-1] else form)  # type: ignore[arg-type]
        compile_unet(model.unet, option("compile", False) is True, warn_once)
        for file in model.adapters:
            if file.unmatched:
                p.comment(f"Delta Sampling: {file.report()}")
        self._steer(p, asked, model)
        tiled = bool(getattr(p, "tiling", False))
        tile(model.network, tiled)
        sources = self._tell(p, asked, model)
        run = Run(
            asked,
            model,
            sources,
            lambda fault: self._fault(p, fault),
            heat=HeatMap() if option("show", False) else None,
            tiled=tiled,
            autoencoders=self.tiny_autoencoders(),
        )
        run.bridge(self.target())
        self.enter(p, model)
        return run

    def _steer(self, p: Any, asked: Passes, model: SideModel) -> None:
        """Give the side model what the units ask for, and have the picture tell which maps these were."""
        from lib_delta.bridges import choose

        request, family = asked.first if asked.first.wanted else asked.hires, self.target().family

        def sized(height: int, width: int) -> tuple[int, int]:
            bridge = choose(
                model.report.family,
                family,
                form=request.bridge,  # type: ignore[arg-type]
                size=request.side_size,
                autoencoders=self.tiny_autoencoders(),
            )
            rows, columns = bridge.source_size(-(-height // PIXELS), -(-width // PIXELS))
            return PIXELS * rows, PIXELS * columns

        picks, said = self.units.picks(p, asked, sized)
        model.steer(picks)
        p.extra_generation_params.update(said)

    def _load(self, path: Path) -> SideModel:
        from lib_delta.sidemodel import SideModels

        if self._models is None:
            self._models = SideModels()
        device, dtype = self.wanted_place()
        storage = _fp8(device, dtype) if one_of("precision", PRECISIONS) == FP8 else None
        return self._models.get(path, dtype, max(1, bases_kept()), room_for_bases(), storage)

    def streamed(self) -> bool:
        """Tell whether the user wants the side model on its device block by block."""
        return self.wanted_place()[0].type != "cpu" and one_of("placement", PLACEMENTS) == STREAMED

    def _file_of(self, pick: Pick) -> Any:
        from lib_delta.sidemodel import AdapterPick

        return AdapterPick(Path(self.lora(pick.name).filename), pick.weight, pick.text_weight, pick.blocks, pick.rank)

    def wanted_place(self) -> tuple[torch.device, torch.dtype]:
        """Return where the side model computes and in which type, by the WebUI or by the settings."""
        import torch

        device, dtype = self.place()
        wanted = device_wanted(_is_device)
        if wanted == "CPU":
            device, dtype = torch.device("cpu"), torch.float32
        elif wanted != "Automatic":
            device = torch.device(wanted)
        types = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
        dtype = types.get(one_of("precision", PRECISIONS), dtype)
        if device.type == "cpu" and dtype == torch.float16:
            warn_once("a CPU does not compute in fp16: the side models run in fp32")
            dtype = torch.float32
        return device, dtype

    def _file_named(self, p: Any, name: str) -> Path:
        """Return a checkpoint's file, and say so where the name does not tell which one it is."""
        found = self.checkpoint(name)
        same = [info for info in sd_models.checkpoints_list.values() if _checkpoint_name(info) == name]
        if name not in _names_of(found) or len(same) > 1:
            p.comment(f"Delta Sampling: for {shown(name)}, {shown(found.name)} was taken.")
        return Path(found.filename)

    def _fault(self, p: Any, fault: DeltaError) -> None:
        from lib_delta.hosts.run import Stop

        if one_of("on_error", ON_ERROR) == STOP:
            raise Stop(fault)
        _go_on_without(p, fault, fault.__cause__ or fault)

    # Prompts.

    def _tell(self, p: Any, asked: Passes, model: SideModel) -> dict[tuple[bool, Active], Source]:
        """Encode the prompts for each pass and for each set of LoRAs that counts at some point of it."""
        from lib_delta.source import Source

        sources = {}
        with Encoder(model, self.text_engine(model), self.text_device()) as encode:
            for hires, told in _passes(p, asked):
                request = asked.of(hires)
                base_told = encode(None, told.prompts, told)
                own = _own(request.adapted_prompt, told.prompts)
                prompts = _cleaned(own, len(own)) if own else None
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
                        guides=model.steering.guides,
                    )
        return sources

    # What the user sees.

    def _hashes(self, request: Request) -> dict[str, str]:
        """Return short hashes of the side files, as far as the WebUI knows them."""
        hashes: dict[str, str] = {}
        try:
            for name in filter(None, (request.base, request.adapted)):
                hashes[name] = getattr(self.checkpoint(name), "shorthash", None) or ""
            for pick in request.picks():
                hashes[pick.name] = getattr(self.lora(pick.name), "shorthash", None) or ""
        except SettingError:
            return {}  # the same error comes out when the batch samples
        return {name: value for name, value in hashes.items() if value}

    def status(self) -> str:
        """Return what is loaded, where, how large, what did not match, and what the last run cost; a line each."""
        lines = []
        for model in self._models or ():
            lines.append(
                f"{model.name}: on {model.device}, {model.memory / 2**20:.0f} MB"
                f" ({str(model.dtype).removeprefix('torch.')})"
            )
            lines += [file.report() for file in model.adapters]
            lines += [f"{file.name}: {file.kind}" for file in model.steering.files]
        return "\n".join([*(lines or ["No side model is loaded"]), self._last])

    def unload(self) -> str:
        """Give back the side models' memory, unless a generation works with them; say which in a sentence."""
        if self._sampling:
            return "A generation is running with the side model: unload when it has ended"
        return self._give_back()

    def _give_back(self) -> str:
        from lib_delta.devices import give_back

        count = len(list(self._models or ()))
        self.units.clear()
        if self._models is not None:
            self.forget()
            self._models.clear()
            gc.collect()  # text encoder and prompt code refer to each other
            self.free_memory()
            give_back()
        return f"Unloaded {count} side model{'' if count == 1 else 's'}"

    @abstractmethod
    def forget(self) -> None:
        """Let go of what else refers to side models."""


class TextEngine(ABC):
    """A WebUI's prompt code around our text encoder, in the role of a model for its prompt parser."""

    def encode(self, tower: TextEncoder, prompts: Texts, told: Told) -> Any:
        """Return what a model with this text encoder is told over a run."""
        from lib_delta.hosts.prompts import Schedules

        self.tower = tower
        limits = _limits(told)
        cond = prompt_parser.get_multicond_learned_conditioning(self, list(prompts), *limits)
        uncond = prompt_parser.get_learned_conditioning(self, list(told.negative), *limits)
        return Schedules(cond.batch, uncond, self.padding())

    @abstractmethod
    def hold(self, embeddings: Mapping[str, Tensor]) -> None:
        """Let prompts name these embeddings, ``(vectors, width)`` each, besides the user's own, and no others."""

    @abstractmethod
    def padding(self) -> Padding | None:
        """Return how the WebUI brings prompt and negative prompt to one length, None where it does not."""

    @abstractmethod
    def get_learned_conditioning(self, texts: Texts) -> Tensor:
        """Encode texts without AND and prompt editing, as the prompt parser asks for it."""


def _limits(told: Told) -> tuple[Any, ...]:
    """Return what the WebUI's prompt parser takes besides model and prompts; Forge Neo has no old scheduling."""
    limits = told.steps, told.hires_steps
    if "use_old_scheduling" not in inspect.signature(prompt_parser.get_learned_conditioning).parameters:
        return limits
    return *limits, getattr(shared.opts, "use_old_scheduling", False)


def _adds(asked: Passes) -> bool:
    return any(r.wanted and (r.picks() or r.always or r.steered) for r in (asked.first, asked.hires))


def _is_device(name: str) -> bool:
    """Tell whether a name is that of a device which is there."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError):  # the latter of a torch that was built without CUDA
        return False
    return True


def _fp8(device: torch.device, dtype: torch.dtype) -> torch.dtype | None:
    """Return the type that weights are stored in as fp8; None, and one warning, where there is none."""
    import torch

    fp8 = getattr(torch, "float8_e4m3fn", None)
    try:
        torch.zeros(1, device=device).to(fp8).to(dtype)
    except (RuntimeError, TypeError):  # MPS, DirectML, torch before 2.1
        warn_once(f"{device} knows no fp8: the side models' weights are stored in {str(dtype).removeprefix('torch.')}")
        return None
    return fp8


def _passes(p: Any, asked: Passes) -> list[tuple[bool, Told]]:
    """Return the prompts of the first pass and, if there is one, of the hires pass."""
    config = sd_samplers.find_sampler_config(p.sampler_name)
    steps = config.total_steps(p.steps) if config else p.steps
    passes = [(False, _told(asked.first, p.prompts, p.negative_prompts, steps, None))]
    if getattr(p, "enable_hr", False):
        config = sd_samplers.find_sampler_config(p.hr_sampler_name or p.sampler_name)
        wanted = p.hr_second_pass_steps or p.steps
        hires_steps = config.total_steps(wanted) if config else wanted
        passes.append((True, _told(asked.hires, p.hr_prompts, p.hr_negative_prompts, steps, hires_steps)))
    return passes


def _told(request: Request, prompts: Texts, negative: Texts, steps: int, hires_steps: int | None) -> Told:
    count = len(prompts)
    return Told(
        _cleaned(_own(request.prompt, prompts) or prompts, count),
        _cleaned(_own(request.negative_prompt, negative) or negative, count),
        steps,
        hires_steps,
    )


def _own(prompt: str, main: Texts) -> Texts:
    """Return what a prompt of the side model is for each image, whose main one may stand in it; nothing if empty."""
    own = without_comments(prompt)
    return [own.replace(MAIN_PROMPT, text) for text in main] if own else ()


def without_comments(prompt: str) -> str:
    """Take out comments, as the WebUI does in its own prompts where its settings say so."""
    try:
        module = importlib.import_module("modules.processing_scripts.comments")
    except ImportError:  # an older WebUI knows none
        return prompt
    return str(module.strip_comments(prompt)) if getattr(shared.opts, "enable_prompt_comments", False) else prompt


def _cleaned(prompts: Texts, count: int) -> Texts:
    """Return ``count`` prompts without extra-network tags; one is for all images."""
    cleaned: list[str] = extra_networks.parse_prompts(list(prompts))[0]
    return cleaned * count if len(cleaned) < count else cleaned


def _with_axes(request: Request, axes: Mapping[str, Any]) -> Request:
    """Apply an XYZ cell's values, which switch the delta on."""
    if not axes:
        return request
    request = with_axes(replace(request, **{"enabled": True, **_fields_of(axes)}), axes)
    weight = axes.get("lora_weight")
    if weight is None or not request.wanted:
        return request
    return replace(request, loras=format_picks([replace(pick, weight=float(weight)) for pick in request.picks()]))


def _fault_of(error: Exception) -> DeltaError:
    from lib_delta.sidemodel import sentence

    fault = sentence(error, "reading what is asked of Delta Sampling")
    if fault is not error:
        fault.__cause__ = error
    return fault


def _fields_of(axes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if name not in ("lora_weight", *UNIT_AXES)}


def _claim_nothing(p: Any) -> None:
    for label in (*infotext_labels().values(), HASHES, UNIT_HASHES, MAPS, SKIPPED):
        p.extra_generation_params.pop(label, None)


def _not_applied(p: Any, fault: DeltaError) -> None:
    """Have the picture say why it got no delta, for callers of the API see no comments."""
    _claim_nothing(p)
    p.extra_generation_params[SKIPPED] = str(fault)


def _go_on_without(p: Any, fault: DeltaError, error: BaseException) -> None:
    print(f"Delta Sampling: {fault}; going on without it", file=sys.stderr)
    traceback.print_exception(type(error), error, error.__traceback__)
    p.comment(f"Delta Sampling: {fault}. The picture was made without it.")


def _register_tag() -> None:
    class DeltaTag(extra_networks.ExtraNetwork):  # type: ignore[misc]
        """Makes the tag known to the WebUI; each batch reads its own tags (:meth:`Host.process_batch`)."""

        def __init__(self) -> None:
            super().__init__(tags.TAG)

        def activate(self, p: Any, params_list: Any) -> None:
            pass

        def deactivate(self, p: Any) -> None:
            pass

    extra_networks.register_extra_network(DeltaTag())


def _named(choice: str | None) -> str:
    return "" if choice in (None, NONE) else str(choice)


def _lora_module() -> ModuleType | None:
    # Built-in extensions put it there when they are loaded, which may be later than this file.
    return sys.modules.get("networks")


def _checkpoint_name(info: Any) -> str:
    return str(getattr(info, "name_for_extra", None) or info.name)


def _names_of(info: Any) -> set[str]:
    """Return all names of a checkpoint that tell it from others, but for its folder."""
    ids = (getattr(info, name, None) for name in ("title", "short_title", "name", "shorthash", "filename", "sha256"))
    return {_checkpoint_name(info), *filter(None, (*ids, *getattr(info, "ids", ())))}
