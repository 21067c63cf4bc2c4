"""Lambda over the run: lambda(t) of arXiv 2512.03056, the strength at which the delta is added."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from lib_delta.errors import SettingError, shown

Curve = Literal["constant", "linear", "cosine", "sigmoid"]

MAX_LAMBDA = 10.0
SIGMOID_STEEPNESS = 10.0
# Names of the fields in errors, as the accordion and the API have them.
FIELD_LABELS = {"value": "lambda", "first": "curve start", "last": "curve end"}
# Progress is a quotient: rounding must not drop a step that lies on a limit of the range.
PROGRESS_TOLERANCE = 1e-6


def covers(start: float, end: float, progress: float) -> bool:
    """Return whether a point of the run lies in the range from ``start`` to ``end``, both included."""
    return start - PROGRESS_TOLERANCE <= progress <= end + PROGRESS_TOLERANCE


@dataclass(frozen=True)
class Strength:
    """Lambda as a function of the run's progress.

    ``value`` is lambda (0 to 10).  It applies from ``start`` to ``end``, fractions of the run, both included; lambda
    is 0 outside.  A ``curve`` other than constant leads from ``first * value`` at ``start`` to ``last * value`` at
    ``end`` (factors 0 to 1); the constant curve ignores both factors.

    Raises:
        SettingError: A value lies outside these ranges.
    """

    value: float = 1.0
    start: float = 0.0
    end: float = 1.0
    curve: Curve = "constant"
    first: float = 1.0
    last: float = 1.0

    def __post_init__(self) -> None:
        limits = {"value": MAX_LAMBDA, "start": 1.0, "end": 1.0, "first": 1.0, "last": 1.0}
        for name, maximum in limits.items():
            given = getattr(self, name)
            # `not 0 <= nan` is true: this refuses nan as well.
            if not 0 <= given <= maximum:
                raise SettingError(f"{FIELD_LABELS.get(name, name)} must be between 0 and {maximum:g}, not {given}")
        if self.start > self.end:
            raise SettingError(f"start ({self.start}) must not come after end ({self.end})")
        if self.curve not in get_args(Curve):
            raise SettingError(f"curve must be one of {', '.join(get_args(Curve))}, not {shown(self.curve)}")

    def at(self, progress: float) -> float:
        """Return lambda at ``progress`` (0: the first step, 1: the last)."""
        if not covers(self.start, self.end, progress):
            return 0.0
        if self.curve == "constant":
            return self.value
        length = self.end - self.start
        u = min(max((progress - self.start) / length, 0.0), 1.0) if length else 0.0
        return self.value * (self.first + (self.last - self.first) * _ease(self.curve, u))


def _ease(curve: Curve, u: float) -> float:
    """Return the curve's value, which rises from 0 at ``u = 0`` to 1 at ``u = 1``."""
    if curve == "cosine":
        return (1 - math.cos(math.pi * u)) / 2
    if curve == "sigmoid":
        # tanh is the logistic function centred on 0; divided by its value at the end, it reaches 0 and 1 exactly.
        half = SIGMOID_STEEPNESS / 4
        return (1 + math.tanh(half * (2 * u - 1)) / math.tanh(half)) / 2
    return u
