"""A stand-in for one of the WebUIs in this process; its modules exist while it runs.

The stand-ins in ``stand_in/`` follow measurements of the running WebUIs, call by call, and sample with k-diffusion.
Their pictures are latents.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch import Tensor

from lib_delta.models.text import load_tokenizer
from tests.support.small_files import TOKENIZER, Files

STAND_IN = Path(__file__).parent / "stand_in"
FORGES = ("forge", "neo")
PACKAGES = ("modules", "modules_forge", "backend", "networks", "lib_delta.hosts")


class DeltaScript:
    """The hooks of scripts/delta_sampling.py, without its widgets."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def process(self, p: Any, *arguments: Any) -> None:
        self.host.process(p, arguments)

    def process_batch(self, p: Any) -> None:
        self.host.process_batch(p)

    def process_before_every_sampling(self, p: Any) -> None:
        self.host.before_sampling(p)

    def postprocess(self, p: Any, made: Any, *_arguments: Any) -> None:
        self.host.postprocess(p, made)


class WebUI:
    """A running stand-in with the extension."""

    def __init__(self, name: str, files: Files) -> None:
        self.name, self.files = name, files
        self.module("paths").models_path = str(files.folder / "models")
        self.module("paths").extensions_dir = str(files.folder / "extensions")
        self._native: dict[str, Any] = {}
        self.sd_models.folder = files.checkpoints
        self.sd_models.list_models()
        tokenizer = load_tokenizer(TOKENIZER)
        self.module("loaded_model").tokenizer = tokenizer
        if name in FORGES:
            self.backend("args").dynamic_args["embedding_dir"] = str(files.embeddings)
        else:
            self.module("sd_hijack").model_hijack.embedding_db.add_embedding_dir(str(files.embeddings))
        self.add_loras()
        self.host = importlib.import_module("lib_delta.hosts").host()
        self.host.start()
        self.callbacks.call("before_ui")
        text = "forge" if name in FORGES else name
        importlib.import_module(f"lib_delta.hosts.{text}.text_engine").load_tokenizer = lambda *_: tokenizer
        self.use(files.base)

    @staticmethod
    def module(name: str) -> ModuleType:
        return importlib.import_module(f"modules.{name}")

    @staticmethod
    def backend(name: str) -> ModuleType:
        return importlib.import_module(f"backend.{name}")

    shared = property(lambda self: self.module("shared"))
    callbacks = property(lambda self: self.module("script_callbacks"))
    sd_models = property(lambda self: self.module("sd_models"))
    processing = property(lambda self: self.module("processing"))

    def add_loras(self) -> None:
        """Import the Lora extension's module, which the WebUI does late and by a short name."""
        module: Any = ModuleType("networks")
        module.available_networks, module.available_network_aliases = {}, {}

        def list_available_networks() -> None:
            for path in self.files.lora_file().parent.glob("*.safetensors"):
                network = SimpleNamespace(filename=str(path), shorthash=f"{path.stem}-hash")
                module.available_networks[path.stem] = network

        module.list_available_networks = list_available_networks
        list_available_networks()
        sys.modules["networks"] = module

    def use(self, checkpoint: str) -> None:
        """Make a checkpoint the main one."""
        self.sd_models.reload_model_weights(self.sd_models.get_closet_checkpoint_match(checkpoint))

    def p(self, delta: Any = None, **changes: Any) -> Any:
        """Return a generation; ``delta`` are the script's arguments (a dictionary or a list), None for no script."""
        kind = "StableDiffusionProcessingImg2Img" if "init_latent" in changes else "StableDiffusionProcessingTxt2Img"
        p = getattr(self.processing, kind)(**{"prompt": "a cat on a mat", "negative_prompt": "blue", **changes})
        if delta is not None:
            p.scripts = self.processing.ScriptRunner([DeltaScript(self.host)])
            p.script_args = delta if isinstance(delta, list) else [delta]
        return p

    def generate(self, delta: Any = None, **changes: Any) -> Any:
        """Generate."""
        return self.processing.process_images(self.p(delta, **changes))

    def latents(self, delta: Any = None, **changes: Any) -> Tensor:
        """Generate, and return the latents."""
        made: Tensor = self.generate(delta, **changes).images
        return made.clone()

    def native(self, checkpoint: str | None = None, **changes: Any) -> Tensor:
        """Generate without the extension on another checkpoint (default: with the LoRA merged), loaded once."""
        before = self.shared.sd_model
        info = self.sd_models.get_closet_checkpoint_match(checkpoint or self.files.tuned)
        if info.filename not in self._native:
            self._native[info.filename] = self.sd_models.load_model(info)
        self.shared.sd_model = self._native[info.filename]
        self.shared.sd_model.cond_stage_model_empty_prompt = getattr(before, "cond_stage_model_empty_prompt", None)
        try:
            return self.latents(**changes)
        finally:
            self.shared.sd_model = before

    def reset(self) -> None:
        """Undo the changes of a test; side models stay in memory."""
        shared, options = self.shared, self.shared.opts
        vars(options).clear()
        vars(options).update(shared.DEFAULTS)
        shared.state.interrupted = False
        self.callbacks.swallowed.clear()
        self.use(self.files.base)

    @property
    def side_model(self) -> Any:
        """The loaded side model."""
        (model,) = self.host.side_models()
        return model


@contextmanager
def running(name: str, files: Files) -> Iterator[WebUI]:
    """Replace all other WebUIs' packages by the stand-in's, for a while."""
    paths = folders(name)
    others = {key: module for key, module in sys.modules.items() if _belongs(key)}
    _drop()
    sys.path[:0] = paths
    importlib.invalidate_caches()
    try:
        yield WebUI(name, files)
    finally:
        for path in paths:
            sys.path.remove(path)
        _drop()
        sys.modules.update(others)


def folders(name: str) -> list[str]:
    """Return the folders of a stand-in's packages; Forge Neo shares most of Forge's."""
    return [str(STAND_IN / folder) for folder in (name, *(["forge"] if name == "neo" else []), "common")]


def _belongs(key: str) -> bool:
    return any(key == package or key.startswith(f"{package}.") for package in PACKAGES)


def _drop() -> None:
    for key in [key for key in sys.modules if _belongs(key)]:
        del sys.modules[key]


def relative(got: Tensor, wanted: Tensor) -> float:
    """Return the norm of the difference of two latents, relative to the second's norm."""
    assert got.shape == wanted.shape
    return float((got - wanted).norm() / wanted.norm())
