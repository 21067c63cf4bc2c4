"""The errors that users see: one sentence with the fault, the file, and the remedy."""

from __future__ import annotations

import difflib
import traceback
from collections.abc import Sequence


class DeltaError(Exception):
    """A request that Delta Sampling refuses or cannot carry out.

    WebUIs show the class's name before the message, so all subclasses are named "Error".  Tracebacks show the
    qualified name, which differs.
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
    """Clear the local variables in the tracebacks of an error and its causes; the tracebacks' lines stay.

    The variables may hold tensors and whole models, which live as long as the error does.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        current = waiting.pop()
        if current is not None and id(current) not in seen:
            seen.add(id(current))
            traceback.clear_frames(current.__traceback__)
            waiting += [current.__cause__, current.__context__]


def shown(value: object, limit: int = 80) -> str:
    """Return a wrong value for an error message: its ``repr``, shortened to ``limit`` characters."""
    return shortened(repr(value), limit)


def shortened(text: str, limit: int = 80) -> str:
    """Return a text, cut after ``limit`` characters and marked with "..." if it is longer."""
    return text if len(text) <= limit else f"{text[:limit]}..."


def near(name: str, known: Sequence[str]) -> str:
    """Return the end of a message that suggests the known name most like ``name``, or lists the first known names."""
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if close:
        return f": is {close[0]!r} meant?"
    return f": known are {', '.join(known[:8])}{', ...' if len(known) > 8 else ''}" if known else ": none are installed"
