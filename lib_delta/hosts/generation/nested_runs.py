"""Generations within generations.

ADetailer and similar extensions generate before the outer run has written its infotext.  They call the run's scripts
again on shallow copies of its ``p``, which share its dictionaries.  The outer run must not change by this.
"""

from __future__ import annotations

import weakref
from typing import Any

from modules import shared

OWNER = "delta_sampling_owner"


def begin(p: Any) -> None:
    """Mark a generation as running; shallow copies made until it ends carry the same mark."""
    setattr(p, OWNER, weakref.ref(p))


def end(p: Any) -> None:
    """Remove the mark of a generation that has ended."""
    vars(p).pop(OWNER, None)


def is_copy(p: Any) -> bool:
    """Return whether this is a shallow copy of a running generation."""
    reference = getattr(p, OWNER, None)
    owner = None if reference is None else reference()
    return owner is not None and owner is not p


def job() -> float | None:
    """Return the start of the WebUI's job: all generations of one click, or of one API call, share it."""
    return getattr(shared.state, "time_start", None)


class LastRun:
    """The last run's outcome, and that of the last generation within it, as the status shows them."""

    def __init__(self) -> None:
        self._lines = ["Nothing has run yet"]
        # The running generation and its job.  If an error of the WebUI ends it, the next job differs.
        self._run: tuple[weakref.ref[Any], float | None] | None = None

    def begin(self, p: Any) -> None:
        """Begin a run; one within another leaves the outer run's lines as they are."""
        if not self._within(p):
            self._run = weakref.ref(p), job()
            self._lines = ["Last run: no delta was requested"]

    def report(self, p: Any, outcome: str) -> None:
        """Note a generation's outcome."""
        if self._within(p):
            self._lines[1:] = [f"The last generation within it: {outcome}"]
        else:
            self._lines = [f"Last run: {outcome}"]

    def end(self, p: Any) -> None:
        """End a run."""
        if self._run is not None and self._run[0]() is p:
            self._run = None

    def _within(self, p: Any) -> bool:
        """Return whether ``p`` is generated within another run."""
        if self._run is None:
            return False
        outer, outer_job = self._run[0](), self._run[1]
        return outer is not None and outer is not p and outer_job == job()

    def lines(self) -> list[str]:
        """Return the outcomes, a line each."""
        return self._lines
