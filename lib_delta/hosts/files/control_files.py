"""The folders in which WebUIs store ControlNets, IP-Adapters and image encoders."""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from modules import paths, shared

from lib_delta.errors import SettingError, near, shown
from lib_delta.files.sidecar_config import ENDINGS, known_as, without_ending

EXTENSION = Path(paths.extensions_dir) / "sd-webui-controlnet"


class ControlFiles:
    """The model files by name; searched once, and again when the user refreshes the list."""

    def __init__(self) -> None:
        self._paths: dict[str, Path] | None = None
        self._aliases: dict[str, Path] = {}

    def names(self) -> list[str]:
        """Return the names of all models."""
        return sorted(self._files(), key=str.lower)

    def refresh(self) -> None:
        """Search again at the next access."""
        self._paths = None

    def file(self, name: str, number: int) -> Path:
        """Find unit ``number``'s model by its name, or by the ControlNet extension's form of it, with a hash.

        Searches again for an unknown name, because callers of the API have no refresh button.  Raises
        :class:`SettingError`.
        """
        file = self.known(name)
        if file is None:
            self.refresh()
            file = self.known(name)
        if file is None:
            raise SettingError(
                f"there is no ControlNet or IP-Adapter {shown(name)} for unit {number} of Delta Sampling"
                f"{near(_without_hash(name), self.names())}"
            )
        return file

    def known(self, name: str) -> Path | None:
        """Return the file of a name among the known ones; None for an unknown name."""
        files = self._files()
        known = {**self._aliases, **files}
        by_case = {key.lower(): file for key, file in known.items()}
        keys = (name, _without_hash(name), without_ending(_without_hash(name)))
        return next((file for key in keys if (file := known.get(key) or by_case.get(key.lower()))), None)

    def name_of(self, file: Path) -> str:
        """Return the name of a file."""
        return next(name for name, other in self._files().items() if other == file)

    def _files(self) -> dict[str, Path]:
        if self._paths is None:
            files = list(_model_files_in(_model_folders()))
            self._paths, self._aliases = _by_name(files), _aliases(files)
        return self._paths


def _without_hash(name: str) -> str:
    return re.sub(r" \[\w+\]$", "", name)


def encoders() -> list[Path]:
    """Return files that may be image encoders: all files in the WebUIs' folders for them."""
    return [file for _, file in _model_files_in(_encoder_folders())]


FolderAndFile = tuple[Path, Path]  # the folder that was searched, and a file below it


def _by_name(files: Sequence[FolderAndFile]) -> dict[str, Path]:
    """Name models by their files (or by folder if diffusers saved them); by their paths if several share a name."""
    named: dict[str, Path] = {}
    for name_of in (_by_model, _by_path, _by_folder, _by_whole_path):
        names = [name_of(folder, file) for folder, file in files]
        count = Counter(names)
        named |= {name: file for name, (_, file) in zip(names, files) if count[name] == 1}
        files = [entry for name, entry in zip(names, files) if count[name] > 1]
    return named


def _aliases(files: Sequence[FolderAndFile]) -> dict[str, Path]:
    """Return other names of models, their paths and file names, unless several models share one."""
    names = [(name, file) for folder, file in files for name in {_by_path(folder, file), file.stem}]
    count = Counter(name for name, _ in names)
    return {name: file for name, file in names if count[name] == 1}


def _by_model(folder: Path, file: Path) -> str:
    return known_as(file)


def _by_path(folder: Path, file: Path) -> str:
    return file.relative_to(folder).as_posix()


def _by_folder(folder: Path, file: Path) -> str:
    return f"{folder.name}/{_by_path(folder, file)}"


def _by_whole_path(folder: Path, file: Path) -> str:
    return file.as_posix()


def _model_files_in(folders: Iterable[Path]) -> Iterator[FolderAndFile]:
    """Yield each model once under each of its names, with the folder that was searched."""
    seen = set()
    for folder in folders:
        for file in _files_in(folder):
            # A link with another name is another model.
            key = file.resolve(), known_as(file)
            if file.suffix.lower() in ENDINGS and file.is_file() and key not in seen:
                seen.add(key)
                yield folder, file


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, including linked folders as WebUIs do; each folder once."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders.sort()
        yield from (Path(path, name) for name in sorted(files))


def _model_folders() -> list[Path]:
    stated = [
        Path(paths.models_path) / "ControlNet",
        EXTENSION / "models",
        _webui_option("control_net_models_path"),
        _flag("controlnet_dir"),
        *(_flag_list("controlnet_dirs")),
        _of_forge("controlnet_dir"),
    ]
    return [Path(folder) for folder in stated if folder]


def _encoder_folders() -> list[Path]:
    models = Path(paths.models_path)
    stated = [
        models / "ControlNetPreprocessor",
        models / "clip_vision",
        EXTENSION / "annotator" / "downloads",
        _webui_option("control_net_modules_path"),
        _flag("controlnet_annotator_models_path"),
        _flag("controlnet_preprocessor_models_dir"),
        _of_forge("preprocessor_dir"),
        *_model_folders(),
    ]
    return [Path(folder) for folder in stated if folder]


def _webui_option(name: str) -> str | None:
    return getattr(shared.opts, name, None) or None


def _flag(name: str) -> str | None:
    return getattr(getattr(shared, "cmd_opts", None), name, None) or None


def _flag_list(name: str) -> list[str]:
    return list(getattr(getattr(shared, "cmd_opts", None), name, None) or [])


def _of_forge(name: str) -> str | None:
    module: Any = sys.modules.get("modules_forge.shared")
    return getattr(module, name, None)
