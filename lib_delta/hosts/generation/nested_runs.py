"""Generations that are under way, and what happens within them.

ADetailer and its like generate pictures of their own before a run's text is written, and call the run's scripts anew on
shallow copies of its ``p``, which share its dictionaries.  None of it may touch the run around it.
"""

from __future__ import annotations

import weakref
from typing import Any

from modules import shared

OWNER = "delta_sampling_owner"


def begin(p: Any) -> None:
    """Note that a generation begins: what bears the same note later is it, or a copy that was made while it runs."""
    setattr(p, OWNER, weakref.ref(p))


def end(p: Any) -> None:
    """Note that it has ended."""
    p.__dict__.pop(OWNER, None)


def is_copy(p: Any) -> bool:
    """Tell whether this is a shallow copy of a generation that is under way."""
    owner = getattr(p, OWNER, None)
    return owner is not None and owner() is not None and owner() is not p


def job() -> float | None:
    """Return what tells one click, or call of the API, from the next, with all that is generated for it."""
    return getattr(shared.state, "time_start", None)


class LastRun:
    """What the status says of the last run, and of the last generation within it."""

    def __init__(self) -> None:
        self._said = ["Nothing has run yet"]
        # The run, and its job: one that ended in an error of the WebUI's own is told by the next one's.
        self._run: tuple[weakref.ref[Any], float | None] | None = None

    def begin(self, p: Any) -> None:
        """Begin a run; within another it takes nothing away from what is said of that."""
        if not self._within(p):
            self._run = weakref.ref(p), job()
            self._said = ["Last run: no delta was asked for"]

    def tell(self, p: Any, sentence: str) -> None:
        """Say what came of a generation."""
        if self._within(p):
            self._said[1:] = [f"The last generation within it: {sentence}"]
        else:
            self._said = [f"Last run: {sentence}"]

    def end(self, p: Any) -> None:
        """End a run."""
        if self._run is not None and self._run[0]() is p:
            self._run = None

    def _within(self, p: Any) -> bool:
        if self._run is None:
            return False
        run, of_job = self._run[0](), self._run[1]
        return run is not None and run is not p and of_job == job()

    def lines(self) -> list[str]:
        """Return it, a line each."""
        return self._said
