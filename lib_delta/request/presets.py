"""Presets: the accordion's settings by name, in the user's JSON file.

The file maps a preset's name to the keys of API calls; units are stored as recipes, without their pictures.  Every
access reads the file anew, so it may be edited by hand.  Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lib_delta.errors import SettingError, near, shown
from lib_delta.request.control_unit import format_units
from lib_delta.request.fields import SETTINGS
from lib_delta.request.request import Request
from lib_delta.request.setting_choices import NONE

# Loading a preset neither opens nor closes the accordion.
SAVED = tuple(field for field in SETTINGS if field.name != "enabled")


@dataclass(frozen=True)
class Presets:
    """The presets in a file, which need not exist yet.

    Raises:
        SettingError: The file cannot be read or written.  It stays as it is.
    """

    path: Path

    def names(self) -> list[str]:
        """Return the names in alphabetical order; an empty list if the file cannot be read."""
        try:
            return sorted(self._read(), key=str.casefold)
        except SettingError:
            return []

    def load(self, name: str) -> Request:
        """Return a preset's settings, checked; settings that it does not state have their defaults.

        Raises:
            SettingError: The preset does not exist, or a value is not allowed.
        """
        named = self._read_with(name)[name]
        if not isinstance(named, Mapping):
            raise SettingError(f"the preset {shown(name)} in {self.path} is not a list of named settings")
        return Request.from_named({**named, "enabled": True})

    def save(self, name: str, request: Request) -> str:
        """Save settings under a name, replacing a preset of that name, and return the name without blanks around it."""
        name = name.strip()
        if name in ("", NONE):
            raise SettingError("a preset needs a name: write one into the box, and save again")
        named = {field.key: getattr(request, field.name) for field in SAVED}
        units = {"units": format_units(request.units)} if request.has_units else {}
        self._write({**self._read(), name: named | units})
        return name

    def delete(self, name: str) -> None:
        """Delete a preset.  Raises :class:`SettingError` if it does not exist."""
        presets = self._read_with(name)
        del presets[name]
        self._write(presets)

    def _read_with(self, name: str) -> dict[str, Any]:
        """Return all presets; raise :class:`SettingError` if none has the name."""
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
        new = self.path.with_name(f"{self.path.name}.new")  # a full disk must not leave half a file
        try:
            new.write_text(json.dumps(presets, indent=4, ensure_ascii=False), "utf-8")
            new.replace(self.path)
        except OSError as error:
            raise SettingError(f"the presets cannot be written to {self.path} ({error.strerror})") from error
