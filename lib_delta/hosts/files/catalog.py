"""The WebUI's checkpoints and LoRAs: their names, their files, and what the user has noted of them."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from modules import sd_models

from lib_delta.errors import SettingError, near, shown
from lib_delta.files.sidecar_config import without_ending
from lib_delta.page.lora_rows import LoraCard

if TYPE_CHECKING:
    from lib_delta.hosts.files.control_files import ControlFiles
    from lib_delta.request.request import Request


class Catalog:
    """Finds files by the names that the WebUI has for them, and lists these names."""

    def __init__(self, controls: ControlFiles) -> None:
        """Make it; ``controls`` are listed elsewhere, and told apart from LoRAs here."""
        self._controls = controls

    def checkpoints(self) -> list[str]:
        """Return the names of the WebUI's checkpoints."""
        return sorted(self._checkpoint_names().values(), key=str.lower)

    def bases(self) -> list[str]:
        """Return the names of those checkpoints that can be a base, as far as their headers tell."""
        from lib_delta.runtime.side_model import can_be_base

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

    def card(self, name: str) -> LoraCard:
        """Return what the user has noted in the WebUI for a LoRA (a ``.json`` beside its file)."""
        network = self._network(name)
        if network is None:
            return LoraCard(name, fault=str(self._no_lora(name)))
        listed = next((own for own, known in self._networks().items() if known is network), name)
        try:
            noted = json.loads(Path(network.filename).with_suffix(".json").read_text("utf-8"))
            weight = float(noted.get("preferred weight") or 1)
            words, negative = (str(noted.get(f"{key} text") or "").strip() for key in ("activation", "negative"))
        except (OSError, ValueError, TypeError, AttributeError):  # none there, or one that is not the WebUI's
            return LoraCard(listed)
        return LoraCard(listed, weight if math.isfinite(weight) else 1.0, words, negative)

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
        """Find a LoRA by its name, alias or file, if need be among new ones; raises :class:`SettingError`."""
        found = self._network(name)
        if found is None:  # the WebUI's own tag looks for it once more, too
            self.refresh_loras()
            found = self._network(name)
        if found is None:
            raise self._no_lora(name)
        return found

    def _no_lora(self, name: str) -> SettingError:
        if self._controls.known(name.rpartition("@")[2]):
            return SettingError(
                f"{shown(name)} is a ControlNet or IP-Adapter, which needs a picture: choose it in one of Delta"
                " Sampling's units; tags and the list of LoRAs name LoRAs alone"
            )
        return SettingError(f"there is no LoRA {shown(name)} for Delta Sampling{near(name, self.loras())}")

    def _network(self, name: str) -> Any:
        networks = self._networks()
        module = _lora_module()
        aliases = {} if module is None else getattr(module, "available_network_aliases", {})
        found = networks.get(name) or aliases.get(name) or networks.get(without_ending(name))
        if found is None:
            by_case = {key.lower(): network for key, network in networks.items()}
            found = by_case.get(name.lower())
        return found

    def unique(self, name: str) -> str:
        """Return the name by which a picture names the same checkpoint, "" for none; raises :class:`SettingError`."""
        info = self.checkpoint(name) if name else None
        return "" if info is None else self._checkpoint_names().get(info.filename, _checkpoint_name(info))

    def file_named(self, name: str, tell: Callable[[str], None]) -> Path:
        """Return a checkpoint's file, and ``tell`` in a sentence where the name does not say which one it is."""
        found = self.checkpoint(name)
        same = [info for info in sd_models.checkpoints_list.values() if _checkpoint_name(info) == name]
        if name not in _names_of(found) or len(same) > 1:
            tell(f"for {shown(name)}, {shown(found.name)} was taken.")
        return Path(found.filename)

    def hashes(self, request: Request) -> dict[str, str]:
        """Return short hashes of the side files, unless the WebUI was told to compute none."""
        hashes: dict[str, str] = {}
        try:
            for name in filter(None, (request.base, request.adapted)):
                hashes[name] = _short_hash(self.checkpoint(name))
            for pick in request.picks():
                hashes[pick.name] = _short_hash(self.lora(pick.name))
        except SettingError:
            return {}  # the same error comes out when the batch samples
        return {name: value for name, value in hashes.items() if value}


def _short_hash(entry: Any) -> str:
    """Return a file's short hash, which the WebUI computes where it first loads that file, and keeps for later."""
    known = getattr(entry, "shorthash", None)
    # A checkpoint's and a LoRA's; the former keeps what it returns, as the latter, which returns nothing.
    compute = getattr(entry, "calculate_shorthash", None) or getattr(entry, "read_hash", None)
    if not known and compute is not None:
        try:
            compute()
        except OSError:  # it is gone, which is said where it is read
            return ""
        known = getattr(entry, "shorthash", None)
    return known or ""


def _lora_module() -> ModuleType | None:
    # Built-in extensions put it there when they are loaded, which may be later than this file.
    return sys.modules.get("networks")


def _checkpoint_name(info: Any) -> str:
    return str(getattr(info, "name_for_extra", None) or info.name)


def _names_of(info: Any) -> set[str]:
    """Return all names of a checkpoint that tell it from others, but for its folder."""
    ids = (getattr(info, name, None) for name in ("title", "short_title", "name", "shorthash", "filename", "sha256"))
    return {_checkpoint_name(info), *filter(None, (*ids, *getattr(info, "ids", ())))}
