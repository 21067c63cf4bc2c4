"""Where the WebUIs keep ControlNets and IP-Adapters, and the image encoders that the latter look through."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from modules import paths, shared

from lib_delta.errors import SettingError, near, shown

ENDINGS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
EXTENSION = Path(paths.extensions_dir) / "sd-webui-controlnet"


class ControlFiles:
    """The files by the names under which they are chosen; looked for once, and when the user asks for it."""

    def __init__(self) -> None:
        self._found: dict[str, Path] | None = None

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
                f"{near(_plain(name), self.names())}"
            )
        return found

    def known(self, name: str) -> Path | None:
        """Return the file of a name among those that were found; None for one that is not there."""
        known = self._files()
        by_case = {own.lower(): file for own, file in known.items()}
        names = (name, _plain(name), Path(_plain(name)).stem)
        return next((file for each in names if (file := known.get(each) or by_case.get(each.lower()))), None)

    def name_of(self, file: Path) -> str:
        """Return the name under which a file is chosen."""
        return next(name for name, other in self._files().items() if other == file)

    def _files(self) -> dict[str, Path]:
        if self._found is None:
            self._found = _named(_model_folders())
        return self._found


def _plain(name: str) -> str:
    return re.sub(r" \[\w+\]$", "", name)


def encoders() -> list[Path]:
    """Return files that may be image encoders: what lies where the WebUIs keep them."""
    return [file for _, file in _below(_encoder_folders())]


def _named(folders: Iterable[Path]) -> dict[str, Path]:
    """Name files by their stems, and by their paths in their folders where several have the same."""
    found = list(_below(folders))
    count = Counter(file.stem for _, file in found)
    return {file.stem if count[file.stem] == 1 else file.relative_to(folder).as_posix(): file for folder, file in found}


def _below(folders: Iterable[Path]) -> Iterator[tuple[Path, Path]]:
    """Yield each model file once, with the folder in which it was found."""
    seen = set()
    for folder in folders:
        for file in sorted(folder.rglob("*")) if folder.is_dir() else ():
            if file.suffix.lower() in ENDINGS and file.is_file() and file.resolve() not in seen:
                seen.add(file.resolve())
                yield folder, file


def _model_folders() -> list[Path]:
    stated = [
        Path(paths.models_path) / "ControlNet",
        EXTENSION / "models",
        _option("control_net_models_path"),
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
        _option("control_net_modules_path"),
        _flag("controlnet_annotator_models_path"),
        _flag("controlnet_preprocessor_models_dir"),
        _of_forge("preprocessor_dir"),
        *_model_folders(),
    ]
    return [Path(folder) for folder in stated if folder]


def _option(name: str) -> str | None:
    return getattr(shared.opts, name, None) or None


def _flag(name: str) -> str | None:
    return getattr(getattr(shared, "cmd_opts", None), name, None) or None


def _flag_list(name: str) -> list[str]:
    return list(getattr(getattr(shared, "cmd_opts", None), name, None) or [])


def _of_forge(name: str) -> str | None:
    module: Any = sys.modules.get("modules_forge.shared")
    return getattr(module, name, None)
