"""The WebUI's checkpoints and LoRAs: their names, files, and the user's notes on them."""

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
    """Lists the names of the WebUI's files, and finds files by these names."""

    def __init__(self, controls: ControlFiles) -> None:
        """Take the list of ``controls``, which explains a control's name in place of a LoRA's."""
        self._controls = controls

    def checkpoints(self) -> list[str]:
        """Return the names of the WebUI's checkpoints."""
        return sorted(self._checkpoint_names().values(), key=str.lower)

    def bases(self) -> list[str]:
        """Return the names of the checkpoints that can be a base, judged by their headers."""
        names = self._checkpoint_names()
        return sorted((name for file, name in names.items() if not why_not_side_model(Path(file))), key=str.lower)

    def _checkpoint_names(self) -> dict[str, str]:
        """Return the checkpoints' names by file; a name includes the folder if two files share it."""
        infos = list(sd_models.checkpoints_list.values())
        short = [_checkpoint_name(info) for info in infos]
        return {info.filename: info.name if short.count(name) > 1 else name for info, name in zip(infos, short)}

    def refresh_checkpoints(self) -> None:
        """Search for new checkpoints."""
        sd_models.list_models()

    def loras(self) -> list[str]:
        """Return the names of the WebUI's LoRAs."""
        return sorted(self._networks(), key=str.lower)

    def card(self, name: str) -> LoraCard:
        """Return the user's notes on a LoRA, which the WebUI stores in a ``.json`` next to its file."""
        network = self._network(name)
        if network is None:
            return LoraCard(name, fault=str(self._no_lora(name)))
        listed = next((key for key, known in self._networks().items() if known is network), name)
        try:
            notes = json.loads(Path(network.filename).with_suffix(".json").read_text("utf-8"))
            weight = float(notes.get("preferred weight") or 1)
            words, negative = (str(notes.get(f"{key} text") or "").strip() for key in ("activation", "negative"))
        except (OSError, ValueError, TypeError, AttributeError):  # no file, or not in the WebUI's format
            return LoraCard(listed)
        return LoraCard(listed, weight if math.isfinite(weight) else 1.0, words, negative)

    def refresh_loras(self) -> None:
        """Search for new LoRAs."""
        module = _lora_module()
        if module is not None:
            module.list_available_networks()

    def _networks(self) -> Mapping[str, Any]:
        module = _lora_module()
        return {} if module is None else module.available_networks

    def checkpoint(self, name: str) -> Any:
        """Find a checkpoint by title, name, file or hash, as the WebUI does; raises :class:`SettingError`."""
        by_name = {key: file for file, key in self._checkpoint_names().items()}
        infos = sd_models.checkpoints_list.values()
        info = next((info for info in infos if info.filename == by_name.get(name)), None)
        if info is None and name:
            info = sd_models.get_closet_checkpoint_match(name)
        if info is None:
            raise SettingError(
                f"there is no checkpoint {shown(name)} for Delta Sampling{near(name, self.checkpoints())}"
            )
        return info

    def lora(self, name: str) -> Any:
        """Find a LoRA by name, alias or file, after a new search if necessary; raises :class:`SettingError`."""
        network = self._network(name)
        if network is None:  # the WebUI's LoRA tags search once more, too
            self.refresh_loras()
            network = self._network(name)
        if network is None:
            raise self._no_lora(name)
        return network

    def _no_lora(self, name: str) -> SettingError:
        if self._controls.known(name.rpartition("@")[2]):
            return SettingError(
                f"{shown(name)} is a ControlNet or IP-Adapter, which needs a picture: choose it in one of Delta"
                " Sampling's units; tags and the list of LoRAs only take LoRAs"
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
        """Return a checkpoint's unambiguous name, for infotexts, or "" for ""; raises :class:`SettingError`."""
        info = self.checkpoint(name) if name else None
        return "" if info is None else self._checkpoint_names().get(info.filename, _checkpoint_name(info))

    def file_named(self, name: str, warn: Callable[[str], None]) -> Path:
        """Return a checkpoint's file; ``warn`` with a sentence if the name is ambiguous."""
        chosen = self.checkpoint(name)
        same = [info for info in sd_models.checkpoints_list.values() if _checkpoint_name(info) == name]
        if name not in _names_of(chosen) or len(same) > 1:
            warn(f"for {shown(name)}, {shown(chosen.name)} was taken.")
        return Path(chosen.filename)

    def hashes(self, request: Request) -> dict[str, str]:
        """Return short hashes of the side files, unless the WebUI's settings disable hashing."""
        hashes: dict[str, str] = {}
        try:
            for name in filter(None, (request.base, request.adapted)):
                hashes[name] = _short_hash(self.checkpoint(name))
            for pick in request.picks():
                hashes[pick.name] = _short_hash(self.lora(pick.name))
        except SettingError:
            return {}  # sampling the batch raises the same error
        return {name: value for name, value in hashes.items() if value}


def _short_hash(entry: Any) -> str:
    """Return a file's short hash, which the WebUI computes at the first load and caches."""
    known = getattr(entry, "shorthash", None)
    # A checkpoint's method and a LoRA's; both store the hash in ``shorthash``.
    compute = getattr(entry, "calculate_shorthash", None) or getattr(entry, "read_hash", None)
    if not known and compute is not None:
        try:
            compute()
        except OSError:  # the file is gone, which reading it reports
            return ""
        known = getattr(entry, "shorthash", None)
    return known or ""


def _lora_module() -> ModuleType | None:
    # A built-in extension provides it, which may load later than this file.
    return sys.modules.get("networks")


def _checkpoint_name(info: Any) -> str:
    return str(getattr(info, "name_for_extra", None) or info.name)


def _names_of(info: Any) -> set[str]:
    """Return all of a checkpoint's names that identify it apart from its folder."""
    ids = (getattr(info, name, None) for name in ("title", "short_title", "name", "shorthash", "filename", "sha256"))
    return {_checkpoint_name(info), *filter(None, (*ids, *getattr(info, "ids", ())))}


def why_not_side_model(path: Path) -> str:
    """Return why a checkpoint cannot be the side model in a WebUI, in a sentence; empty if it can.

    The WebUIs' prompt code is set up for the text encoder of SD 1.x.
    """
    from lib_delta.diffusion.families import Family
    from lib_delta.files.checkpoint import describe, why_not_base

    if fault := why_not_base(path):
        return fault
    family = describe(path).family
    if family is Family.SD1:
        return ""
    return f"{path.name} is a model of {family.label}, and in a WebUI the base has to be an SD 1.x checkpoint"
