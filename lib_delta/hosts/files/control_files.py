"""Where the WebUIs keep ControlNets and IP-Adapters, and the image encoders that the latter look through."""

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
    """The files by the names under which they are chosen; looked for once, and when the user asks for it."""

    def __init__(self) -> None:
        self._found: dict[str, Path] | None = None
        self._aliases: dict[str, Path] = {}

    def names(self) -> list[str]:
        """Return the names that can be chosen."""
        return sorted(self._files(), key=str.lower)

    def refresh(self) -> None:
        """Look for new files."""
        self._found = None

    def file(self, name: str, number: int) -> Path:
        """Find unit ``number``'s model by its name, or as the ControlNet extension writes it, with a hash.

        One that is not known is looked for once more: callers of the API have no button for it.
        """
        found = self.known(name)
        if found is None:
            self.refresh()
            found = self.known(name)
        if found is None:
            raise SettingError(
                f"there is no ControlNet or IP-Adapter {shown(name)} for unit {number} of Delta Sampling"
                f"{near(_without_hash(name), self.names())}"
            )
        return found

    def known(self, name: str) -> Path | None:
        """Return the file of a name among those that were found; None for one that is not there."""
        files = self._files()
        known = {**self._aliases, **files}
        by_case = {own.lower(): file for own, file in known.items()}
        names = (name, _without_hash(name), without_ending(_without_hash(name)))
        return next((file for each in names if (file := known.get(each) or by_case.get(each.lower()))), None)

    def name_of(self, file: Path) -> str:
        """Return the name under which a file is chosen."""
        return next(name for name, other in self._files().items() if other == file)

    def _files(self) -> dict[str, Path]:
        if self._found is None:
            found = list(_model_files_in(_model_folders()))
            self._found, self._aliases = _by_name(found), _aliases(found)
        return self._found


def _without_hash(name: str) -> str:
    return re.sub(r" \[\w+\]$", "", name)


def encoders() -> list[Path]:
    """Return files that may be image encoders: what lies where the WebUIs keep them."""
    return [file for _, file in _model_files_in(_encoder_folders())]


Found = tuple[Path, Path]  # a file, behind the folder in which it was looked for


def _by_name(found: Sequence[Found]) -> dict[str, Path]:
    """Name models by their files or, where diffusers saved them, folders; with their paths where several are alike."""
    named: dict[str, Path] = {}
    for name_of in (_by_model, _by_path, _by_folder, _by_whole_path):
        names = [name_of(*each) for each in found]
        count = Counter(names)
        named |= {name: file for name, (_, file) in zip(names, found) if count[name] == 1}
        found = [each for name, each in zip(names, found) if count[name] > 1]
    return named


def _aliases(found: Sequence[Found]) -> dict[str, Path]:
    """Return what else models are known by: their paths, and the names of their files, each where it is but one's."""
    names = [(name, file) for folder, file in found for name in {_by_path(folder, file), file.stem}]
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


def _model_files_in(folders: Iterable[Path]) -> Iterator[Found]:
    """Yield each model under each of its names once, with the folder in which it was found."""
    seen = set()
    for folder in folders:
        for file in _files_in(folder):
            # Another link to the same file is another name for it.
            key = file.resolve(), known_as(file)
            if file.suffix.lower() in ENDINGS and file.is_file() and key not in seen:
                seen.add(key)
                yield folder, file


def _files_in(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, in linked folders as well, as the WebUIs list models; each folder once."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(path)
        if real in seen:  # a link that leads back
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
