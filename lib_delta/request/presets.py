"""Named settings of the accordion, in a small JSON file of the user's.

The file holds, by name, the keys that API calls give; units by their recipes, without the pictures.  It is read
whenever it is asked for, so that it may be edited by hand; importing this module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_delta.errors import SettingError, near, shown
from lib_delta.request.control_unit import format_units
from lib_delta.request.request import NONE, SETTINGS, Request

# Whether there is to be a delta at all is the user's to say each time.
SAVED = tuple(f for f in SETTINGS if f.name != "enabled")


@dataclass(frozen=True)
class Presets:
    """The presets in a file, which need not be there yet.

    Raises :class:`SettingError` where the file cannot be read or written; it then stays as it is.
    """

    path: Path

    def names(self) -> list[str]:
        """Return the names, in the order of the alphabet; none of a file that cannot be read."""
        try:
            return sorted(self._read(), key=str.casefold)
        except SettingError:
            return []

    def load(self, name: str) -> Request:
        """Return a preset's settings: the default where it is silent, and what it says is checked.

        Raises :class:`SettingError` for a preset that is not there or that holds what is not allowed.
        """
        named = self._found(name)[name]
        if not isinstance(named, Mapping):
            raise SettingError(f"the preset {shown(name)} in {self.path} is not a list of named settings")
        return Request.from_named({**named, "enabled": True})

    def save(self, name: str, request: Request) -> str:
        """Keep settings under a name, in place of what was there, and return the name."""
        name = name.strip()
        if name in ("", NONE):
            raise SettingError("a preset needs a name: write one into the box, and save again")
        named = {f.metadata["key"]: getattr(request, f.name) for f in SAVED}
        units = {"units": format_units(request.units)} if request.has_units else {}
        self._write({**self._read(), name: named | units})
        return name

    def delete(self, name: str) -> None:
        """Forget a preset; raises :class:`SettingError` for one that is not there."""
        presets = self._found(name)
        del presets[name]
        self._write(presets)

    def _found(self, name: str) -> dict[str, Any]:
        presets = self._read()
        if name not in presets:
            raise SettingError(f"there is no preset {shown(name)}{near(name, sorted(presets)) if presets else ''}")
        return presets

    def _read(self) -> dict[str, Any]:
        try:
            presets = json.loads(self.path.read_text("utf-8-sig"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise SettingError(f"the presets in {self.path} cannot be read ({error}): mend or move the file") from error
        if not isinstance(presets, dict):
            raise SettingError(f"the presets in {self.path} cannot be read (no names in it): mend or move the file")
        return presets

    def _write(self, presets: Mapping[str, Any]) -> None:
        whole = self.path.with_name(f"{self.path.name}.new")  # or else a full disk would leave half of them
        try:
            whole.write_text(json.dumps(presets, indent=4, ensure_ascii=False), "utf-8")
            whole.replace(self.path)
        except OSError as error:
            raise SettingError(f"the presets cannot be written to {self.path} ({error.strerror})") from error
