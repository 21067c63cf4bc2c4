"""The settings page's values; a damaged one gives a warning and the default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from modules import shared

from lib_delta.errors import shown
from lib_delta.request.setting_choices import RENAMED_CHOICES

UNITS, MOST_UNITS = 3, 10
_warned: set[str] = set()


def option(name: str, default: Any) -> Any:
    """Return a setting of the extension as it is stored."""
    return getattr(shared.opts, f"delta_sampling_{name}", default)


def one_of(name: str, choices: tuple[str, ...]) -> str:
    """Return a setting with fixed choices; the first is the default."""
    value = option(name, choices[0])
    value = RENAMED_CHOICES.get(value, value) if isinstance(value, str) else value
    if value in choices:
        return str(value)
    warn_once(f"the setting {name!r} is {shown(value)}, which is not a choice: {choices[0]!r} is used instead")
    return choices[0]


def max_cached_bases() -> int:
    """Return how many base models may stay in memory."""
    return int(_stored_number("cache", 1, "a whole number"))


def base_cache_bytes() -> float:
    """Return how many bytes the cached base models may take together."""
    return _stored_number("cache_size", 8.0, "a number of GB") * 2**30


def _stored_number(name: str, default: float, needed: str) -> float:
    value = option(name, default)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf"):
        return float(value)
    warn_once(f"the setting {name!r} is {shown(value)}, and {needed} is needed: {default:g} is used instead")
    return default


def units_shown() -> int:
    """Return how many units the accordion has."""
    value = option("units", UNITS)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 1 <= value <= MOST_UNITS:
        return int(value)
    warn_once(f"the setting 'units' is {shown(value)}, and 1 to {MOST_UNITS} are possible: {UNITS} is used instead")
    return UNITS


def chosen_device(exists: Callable[[str], bool]) -> str:
    """Return the chosen device: "Automatic", "CPU" or the name of a torch device that ``exists``."""
    value = option("device", "Automatic")
    if value in ("Automatic", "CPU") or (isinstance(value, str) and exists(value)):
        return str(value)
    warn_once(f"the setting 'device' is {shown(value)}, which does not exist: the WebUI's device is used instead")
    return "Automatic"


def warn_once(sentence: str) -> None:
    """Print a warning, but each one only once."""
    if sentence not in _warned:
        _warned.add(sentence)
        print(f"Delta Sampling: {sentence}", file=sys.stderr)
