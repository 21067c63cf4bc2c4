"""The errors that users see: one sentence that says what is wrong, with which file, and what to do."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Sequence


class DeltaError(Exception):
    """Anything that Delta Sampling refuses or cannot do.

    WebUIs show a class's name before its sentence, so all have one that users read; tracebacks have their own.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.__name__ = DeltaError.__name__


DeltaError.__name__ = "Error"


class CheckpointError(DeltaError):
    """A model file that cannot be used: unreadable, not a checkpoint, or of another family."""


class AdapterError(DeltaError):
    """An adapter file that cannot be used, or that belongs to another family."""


class NotFiniteError(DeltaError):
    """A delta with values that are not numbers."""


class SettingError(DeltaError):
    """A setting outside the values allowed."""


def clear_frames(error: BaseException) -> None:
    """Drop what the functions hold that an error, and those that led to it, came out of; their lines stay to be shown.

    Tensors and whole models are among it, and an error in a variable of such a function would keep them for long.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        led = waiting.pop()
        if led is not None and id(led) not in seen:
            seen.add(id(led))
            traceback.clear_frames(led.__traceback__)
            waiting += [led.__cause__, led.__context__]


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
