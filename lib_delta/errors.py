"""The errors that users see: one sentence that says what is wrong, with which file, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Sequence


class DeltaError(Exception):
    """Anything that Delta Sampling refuses or cannot do."""


class CheckpointError(DeltaError):
    """A model file that cannot be used: unreadable, not a checkpoint, or of another family."""


class AdapterError(DeltaError):
    """An adapter file that cannot be used, or that belongs to another family."""


class NotFiniteError(DeltaError):
    """A delta with values that are not numbers."""


class SettingError(DeltaError):
    """A setting outside the values allowed."""


def shown(value: object, limit: int = 80) -> str:
    """Return a wrong value as an error's sentence shows it: as Python writes it, and no longer than ``limit``."""
    return shortened(repr(value), limit)


def shortened(text: str, limit: int = 80) -> str:
    """Return a text, its end left out where it is longer than ``limit``."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def near(name: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says which of the names known may be meant."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if close:
        return f": is {close[0]!r} meant?"
    return f": known are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else ": none are installed"
