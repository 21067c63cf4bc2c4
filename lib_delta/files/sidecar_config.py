"""Reads the configuration next to a model's file: the ``.yaml`` of its name, and its folder's ``.json``."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_delta.errors import CheckpointError

PEFT, DIFFUSERS = "adapter_config.json", "config.json"
_LARGEST = 2**20  # bytes
_LARGEST_YAML = 2**17  # bytes: YAML is slow to read, and a model's configuration has a few thousand
# diffusers gives this one name to all models' weights, with a variant ("fp16") at its end.
_OF_DIFFUSERS = re.compile(r"diffusion_pytorch_model(\.\w+)?")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_NO_NAMES = ("", "controlnet", "models")

# The extensions of model files.
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

SidecarState = tuple[tuple[int, int] | None, ...]


def yaml_of(path: Path) -> Path:
    """Return the path of a checkpoint's configuration, where the WebUIs look for it."""
    return path.parent / f"{path.stem}.yaml"


def sidecar_state(path: Path) -> SidecarState:
    """Return time and size of each possible configuration of a file; None for each that does not exist."""
    return tuple(map(_time_and_size, (yaml_of(path), path.parent / PEFT, path.parent / DIFFUSERS)))


def _time_and_size(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def named_by_diffusers(path: Path) -> bool:
    """Return whether a file has diffusers' common name, so that its folder names the model."""
    return _OF_DIFFUSERS.fullmatch(path.stem) is not None


def known_as(path: Path) -> str:
    """Return a model's name: its file's without the extension, or its folder's if diffusers saved it."""
    if not named_by_diffusers(path):
        return path.stem
    folder = path.absolute().parent
    if folder.name == "controlnet":  # the one model of a pipeline
        folder = folder.parent
    if _SNAPSHOT.fullmatch(folder.name):  # models--OWNER--NAME/snapshots/COMMIT
        folder = folder.parents[1] if len(folder.parents) > 1 else folder
    return path.stem if folder.name.lower() in _NO_NAMES else folder.name


def without_ending(name: str) -> str:
    """Return the last part of a model's name without a model file's extension; other dots belong to the name."""
    path = Path(name)
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def words_of(name: str) -> frozenset[str]:
    """Return the words of a file's name in small letters: ``control_v11e_sd15_shuffle`` has ``shuffle``."""
    return frozenset(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def json_object(text: str, where: str) -> dict[str, Any]:
    """Parse settings in JSON; ``where`` names them in errors.  Raises :class:`CheckpointError` for anything else."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no readable JSON ({error}): remove it, or save the model again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds no settings: remove it, or save the model again")
    return parsed


def settings(path: Path, name: str) -> dict[str, Any]:
    """Return the settings in a model's folder, none if there is no such file; raises as :func:`json_object`."""
    config, where = path.parent / name, f"{name} beside {path.name}"
    return json_object(_text(config, where, _LARGEST), where) if config.is_file() else {}


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration in the form of ldm and sgm: ``model: {params: {...}}``.

    Values are looked up in the parsed nodes, and no objects are built: repeated or merged parts take no memory.
    """

    name: str
    node: Any

    @classmethod
    def beside(cls, path: Path) -> ModelConfig | None:
        """Return a checkpoint's configuration; None if there is none, or it is of another form.

        Raises :class:`CheckpointError` if it cannot be read: the WebUIs cannot load such a checkpoint either.
        """
        config = yaml_of(path)
        if not config.is_file():
            return None
        import yaml  # comes with transformers

        where = f"{config.name} beside {path.name}"
        try:
            config_file = cls(where, yaml.compose(_text(config, where, _LARGEST_YAML), Loader=yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where} is no readable YAML ({reason}): mend it, or remove it") from error
        return config_file if config_file._at("model", "params") is not None else None

    def text(self, *keys: str) -> str:
        """Return a value below ``model.params`` as it is written; empty if there is none."""
        node = self._at("model", "params", *keys)
        return node.value if isinstance(getattr(node, "value", None), str) else ""

    def _at(self, *keys: str) -> Any:
        node = self.node
        for name in keys:
            pairs = node.value if getattr(node, "id", "") == "mapping" else ()
            node = next((value for key, value in pairs if key.value == name), None)
        return node


def _text(path: Path, where: str, largest: int) -> str:
    try:
        with path.open("rb") as stream:
            content = stream.read(largest + 1)
    except OSError as error:
        raise CheckpointError(f"{where} cannot be read ({error.strerror}): mend it, or remove it") from error
    if len(content) > largest:
        raise CheckpointError(f"{where} is too large to be a model's configuration: remove it")
    return content.decode("utf-8-sig", errors="replace")
