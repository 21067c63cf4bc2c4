"""The interface of a WebUI: everything that differs from one WebUI to another."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules import paths_internal, script_callbacks, shared

from lib_delta.hosts.compute_device import fp8_storage, side_device_and_type
from lib_delta.hosts.control_units.units import Units
from lib_delta.hosts.files.catalog import Catalog
from lib_delta.hosts.generation.lifecycle import Lifecycle
from lib_delta.hosts.generation.main_model import MainModel
from lib_delta.hosts.generation.prompt_tags import register_tag
from lib_delta.hosts.prompts.text_engine import TextEngine
from lib_delta.hosts.settings import base_cache_bytes, max_cached_bases, one_of
from lib_delta.request.presets import Presets
from lib_delta.request.setting_choices import FP8, PLACEMENTS, PRECISIONS, STREAMED

if TYPE_CHECKING:
    import torch

    from lib_delta.runtime.side_model import SideModel, SideModels


class Host(ABC):
    """A WebUI: its memory, its prompt code, its samplers' callbacks, and the side models loaded in it."""

    name = "WebUI"

    def __init__(self) -> None:
        self.units = Units()
        self.catalog = Catalog(self.units.files)
        self.lifecycle = Lifecycle(self)
        self._models: SideModels | None = None
        self._text_engine: tuple[SideModel, TextEngine] | None = None

    # What differs from WebUI to WebUI.

    @abstractmethod
    def install(self) -> None:
        """Register the callbacks that samplers call at every step."""

    @abstractmethod
    def main_model(self) -> MainModel:
        """Describe the checkpoint that is loaded now."""

    @abstractmethod
    def compute_device(self) -> tuple[torch.device, torch.dtype]:
        """Return the WebUI's device and computing type."""

    @abstractmethod
    def make_text_engine(self, model: SideModel) -> TextEngine:
        """Wrap the side model's text encoder in the WebUI's prompt code."""

    @abstractmethod
    def text_device(self) -> torch.device:
        """Return the device that encodes prompts."""

    @abstractmethod
    def enter(self, p: Any, model: SideModel) -> None:
        """Make room for the side model on its device before a batch is sampled."""

    @abstractmethod
    def leave(self, model: SideModel) -> None:
        """Offload the side model after a batch if memory is short; errors here cost no picture."""

    @abstractmethod
    def free_memory(self) -> None:
        """Return cached memory to the system."""

    @abstractmethod
    def before_sampling(self, p: Any) -> None:
        """Prepare the sampler of a pass; called right before it starts."""

    def keep_schedule(self, p: Any) -> Callable[[], None]:
        """Return a function that restores the main model's noise schedule after an error."""
        return lambda: None

    def tiny_autoencoders(self) -> Path:
        """Return the folder of the tiny autoencoders (TAESD) that the WebUI draws previews with."""
        return Path(paths_internal.models_path) / "VAE-taesd"

    def quantized(self) -> bool:
        """Return whether the WebUI evaluates models only at whole timesteps."""
        return bool(getattr(shared.opts, "enable_quantization", False))

    def forget(self, dropped: Sequence[SideModel]) -> None:
        """Drop all references to these side models."""
        if self._text_engine is not None and any(self._text_engine[0] is model for model in dropped):
            self._text_engine = None

    # The script's hooks.

    def start(self) -> None:
        """Register the callbacks and the prompt tag when the script is loaded."""
        self.install()
        script_callbacks.on_before_ui(register_tag)

    def process(self, p: Any, arguments: Sequence[Any]) -> None:
        """Read a generation's request."""
        self.lifecycle.process(p, arguments)

    def process_batch(self, p: Any) -> None:
        """Prepare a batch."""
        self.lifecycle.process_batch(p)

    def postprocess(self, p: Any, processed: Any) -> None:
        """End a generation."""
        self.lifecycle.postprocess(p, processed)

    # What all WebUIs share.

    def presets(self) -> Presets:
        """Return the user's presets, stored next to the WebUI's ``ui-config.json``."""
        return Presets(Path(shared.cmd_opts.ui_config_file).with_name("delta-sampling-presets.json"))

    def text_engine(self, model: SideModel) -> TextEngine:
        """Return the WebUI's prompt code around the side model's text encoder, made once for each model."""
        if self._text_engine is None or self._text_engine[0] is not model:
            self._text_engine = model, self.make_text_engine(model)
        return self._text_engine[1]

    def side_device(self) -> torch.device:
        """Return the device that the side model computes on."""
        return side_device_and_type(*self.compute_device())[0]

    def streams_blocks(self) -> bool:
        """Return whether the settings stream the side model to its device block by block."""
        return self.side_device().type != "cpu" and one_of("placement", PLACEMENTS) == STREAMED

    def load_side_model(self, path: Path) -> SideModel:
        """Return the side model of a base checkpoint, from memory or its file."""
        from lib_delta.runtime.side_model import SideModels

        if self._models is None:
            self._models = SideModels(self.forget)
        device, dtype = side_device_and_type(*self.compute_device())
        storage = fp8_storage(device, dtype) if one_of("precision", PRECISIONS) == FP8 else None
        return self._models.get(path, dtype, limit=max(1, max_cached_bases()), room=base_cache_bytes(), storage=storage)

    def side_models(self) -> tuple[SideModel, ...]:
        """Return the side models in memory."""
        return tuple(self._models or ())

    def free_side_models(self) -> str:
        """Drop all side models, and return a sentence with their number."""
        count = len(self.side_models())
        self.units.clear()
        if self._models is not None:
            self._models.clear()
            self.free_memory()
        return f"Unloaded {count} side model{'' if count == 1 else 's'}"

    def unload(self) -> str:
        """Drop all side models unless a generation works with one; return the outcome in a sentence."""
        if self.lifecycle.sampling:
            return "A generation is running with the side model: unload when it has ended"
        return self.free_side_models()

    def status(self) -> str:
        """Return the side models, their devices, sizes and files, and the last run's outcome; a line each."""
        lines = []
        for model in self.side_models():
            lines.append(
                f"{model.name}: on {model.device}, {model.memory / 2**20:.0f} MB"
                f" ({str(model.dtype).removeprefix('torch.')})"
            )
            lines += [file.report() for file in model.adapters]
            lines += [f"{file.name}: {file.kind}" for file in model.controls.files]
        return "\n".join([*(lines or ["No side model is loaded"]), *self.lifecycle.last_run()])
