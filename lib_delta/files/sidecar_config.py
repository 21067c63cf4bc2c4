"""What lies beside a model's file and tells of it: a ``.yaml`` of its name, and the ``.json`` of its folder."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_delta.errors import CheckpointError

PEFT, DIFFUSERS = "adapter_config.json", "config.json"
_LARGEST = 2**20  # bytes
_LARGEST_YAML = 2**17  # bytes: its reader is slow, and a model's configuration has a few thousand
# The one name that diffusers gives to all models' weights, with a variant ("fp16") at its end.
_OF_DIFFUSERS = re.compile(r"diffusion_pytorch_model(\.\w+)?")
_SNAPSHOT = re.compile(r"[0-9a-f]{40}")
_NO_NAMES = ("", "controlnet", "models")

# How the names of models' files end.
ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")

SidecarState = tuple[tuple[int, int] | None, ...]


def yaml_of(path: Path) -> Path:
    """Return where a checkpoint's configuration lies: under its own name, as the WebUIs look for it."""
    return path.parent / f"{path.stem}.yaml"


def sidecar_state(path: Path) -> SidecarState:
    """Return time and size of each thing that may lie beside a file; None for what does not."""
    return tuple(map(_time_and_size, (yaml_of(path), path.parent / PEFT, path.parent / DIFFUSERS)))


def _time_and_size(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


def named_by_diffusers(path: Path) -> bool:
    """Tell whether a file has the name that diffusers gives to all models, so that its folder's is the model's."""
    return _OF_DIFFUSERS.fullmatch(path.stem) is not None


def known_as(path: Path) -> str:
    """Return a model's name: its file's, without the ending, or its folder's where diffusers saved it."""
    if not named_by_diffusers(path):
        return path.stem
    folder = path.absolute().parent
    if folder.name == "controlnet":  # the one model of a pipeline
        folder = folder.parent
    if _SNAPSHOT.fullmatch(folder.name):  # models--OWNER--NAME/snapshots/COMMIT
        folder = folder.parents[1] if len(folder.parents) > 1 else folder
    return path.stem if folder.name.lower() in _NO_NAMES else folder.name


def without_ending(name: str) -> str:
    """Return the last part of a model's name without a model file's ending; what else follows a dot is of the name."""
    path = Path(name)
    return path.stem if path.suffix.lower() in ENDINGS else path.name


def words_of(name: str) -> frozenset[str]:
    """Return the words of a file's name in small letters: ``control_v11e_sd15_shuffle`` has ``shuffle``."""
    return frozenset(re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()))


def json_object(text: str, where: str) -> dict[str, Any]:
    """Read settings in JSON, of which ``where`` is told; raises :class:`CheckpointError` for what is none."""
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no readable JSON ({error}): remove it, or save the model again") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds no settings: remove it, or save the model again")
    return parsed


def settings(path: Path, name: str) -> dict[str, Any]:
    """Return what the file ``name`` in a model's folder says, nothing where there is none; as :func:`json_object`."""
    config, where = path.parent / name, f"{name} beside {path.name}"
    return json_object(_text(config, where, _LARGEST), where) if config.is_file() else {}


@dataclass(frozen=True)
class ModelConfig:
    """A model's configuration as ldm and sgm have it: ``model: {params: {...}}``.

    It is looked up in the parsed text: nothing is made of it, so what it repeats or merges takes no memory.
    """

    name: str
    node: Any

    @classmethod
    def beside(cls, path: Path) -> ModelConfig | None:
        """Return a checkpoint's, None where there is none, or one of something else.

        Raises :class:`CheckpointError` for one that cannot be read: the WebUIs cannot load such a checkpoint.
        """
        config = yaml_of(path)
        if not config.is_file():
            return None
        import yaml  # transformers has it

        where = f"{config.name} beside {path.name}"
        try:
            made = cls(where, yaml.compose(_text(config, where, _LARGEST_YAML), Loader=yaml.SafeLoader))
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{where} is no readable YAML ({reason}): mend it, or remove it") from error
        return made if made._at("model", "params") is not None else None

    def text(self, *way: str) -> str:
        """Return a value below ``model.params`` as it is written; empty where there is none."""
        found = self._at("model", "params", *way)
        return found.value if isinstance(getattr(found, "value", None), str) else ""

    def _at(self, *way: str) -> Any:
        node = self.node
        for name in way:
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
