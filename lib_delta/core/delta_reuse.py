"""The delta of fewer evaluations: held between them, as what it changes in the velocity.

Between two evaluations of the source the delta is not held as a change of the estimate, which shrinks with
the noise, but of v (arXiv 2202.00512): ``D = x / (s^2 + 1) - v * s / (s^2 + 1)^0.5``, so that a held change of
the estimate is scaled by ``s / (s^2 + 1)^0.5`` now over then.

When the source is asked is decided by noise levels and never by a count of calls: samplers may call
several times a step, go back, or take steps of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lib_delta.core.deltas import Deltas, each, of_images
from lib_delta.diffusion.parameterization import per_image
from lib_delta.errors import SettingError

Quality = Literal["exact", "balanced", "fast"]
# Beyond its last noise level by more than this, a sampler has gone back, and what was held is of another time.
BACK = 1.1
ROUNDING = 1e-4


@dataclass(frozen=True)
class Plan:
    """How often the source is asked.

    ``every``: how many of the run's noise levels one evaluation serves (1: each call is evaluated).  ``linear``:
    the change of v goes on as it went from one evaluation to the next, linearly in log sigma.  ``moved``: the
    source is asked again, instead, when the target's estimate has moved by this share of its size.
    """

    every: float = 1.0
    linear: bool = False
    moved: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.every) and self.every >= 1):
            raise SettingError(f"quality: one evaluation serves 1 step or more, not {self.every}")
        if self.moved is not None and not 0 < self.moved <= 1:
            raise SettingError(f"quality: the share that an estimate may move lies between 0 and 1, not {self.moved}")

    @property
    def exact(self) -> bool:
        """Whether every call is evaluated."""
        return self.every == 1 and self.moved is None


def plan_of(quality: str, every: float = 0.0, between: str = "automatic", moved: float = 0.0) -> Plan:
    """Return the plan of a quality, with its details in the place of what it says of them: 0 and automatic leave it."""
    plan = PLANS[quality]
    linear = plan.linear if between == "automatic" else between == "linear"
    return Plan(every or plan.every, linear, moved or None)


PLANS: dict[str, Plan] = {"exact": Plan(), "balanced": Plan(2, linear=True), "fast": Plan(4)}


@dataclass(frozen=True)
class Moment:
    """Where a run is.

    ``sigma`` ``(N,)`` is the source's noise level, ``denoised`` the target's estimate.  ``progress`` (0 to 1) and
    ``levels``, the number of the run's noise levels, say which of them this is; where ``levels`` is 0, as it is not
    known, every call is evaluated.  ``told`` are the things that a delta is of: others force an evaluation.
    """

    sigma: Tensor
    denoised: Tensor
    progress: float
    levels: int
    told: tuple[object, ...]

    def cell(self, every: float) -> int:
        """Return which of the run's parts, of ``every`` levels each, this is in."""
        return math.floor(self.progress * (self.levels - 1) / every + ROUNDING)


@dataclass(frozen=True)
class _Kept:
    moment: Moment
    # Those of v.
    changes: Deltas


class Hold:
    """What is known of the delta in one pass of a generation."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._kept: list[_Kept] = []

    def deltas(self, evaluate: Callable[[], Deltas], moment: Moment) -> Deltas:
        """Return the source's deltas: those of ``evaluate()`` where the plan asks for it, or what is held of them."""
        if self.plan.exact or not moment.levels:
            return evaluate()
        if self._stale(moment):
            deltas = evaluate()
            self._keep(deltas, moment)
            return deltas
        return self._now(self._share(moment), moment)

    def _stale(self, moment: Moment) -> bool:
        if not self._kept:
            return True
        last = self._kept[-1].moment
        if not _same(last, moment):
            return True
        if self.plan.moved is not None:
            moved = (moment.denoised - last.denoised).norm() > self.plan.moved * last.denoised.norm()
            back = moment.sigma.max() > BACK * last.sigma.max()
            return bool(moved | back.to(moved.device))
        return moment.cell(self.plan.every) != last.cell(self.plan.every)

    def _keep(self, deltas: Deltas, moment: Moment) -> None:
        changes = each(lambda images, delta: delta / _scale(of_images(moment.sigma, images), delta), deltas)
        # Of what came before, only what leads here: of the same things, and at more noise.
        before = [k for k in self._kept[-1:] if _same(k.moment, moment) and k.moment.progress < moment.progress]
        self._kept = [*before, _Kept(moment, changes)]

    def _share(self, moment: Moment) -> Tensor | None:
        """Return how far beyond the last evaluation this is, in ways from the one before it to it, ``(N, 1, 1, 1)``."""
        if not self.plan.linear or len(self._kept) < 2:
            return None
        before, last = (kept.moment.sigma.log() for kept in self._kept)
        way, beyond = before - last, last - moment.sigma.log()
        # No further than from there to here, and not backwards.
        share = torch.where(way > ROUNDING, beyond / way.clamp(min=ROUNDING), 0.0).clamp(0, 1)
        return per_image(share, self._kept[-1].changes.guided)

    def _now(self, share: Tensor | None, moment: Moment) -> Deltas:
        def now(images: Tensor | None, change: Tensor, before: Tensor) -> Tensor:
            if share is not None:
                change = change + of_images(share, images) * (change - before)
            return change * _scale(of_images(moment.sigma, images), change)

        return each(now, self._kept[-1].changes, self._kept[0].changes)


def _same(a: Moment, b: Moment) -> bool:
    """Tell whether deltas of two moments are of the same things."""
    return len(a.told) == len(b.told) and all(
        x is y or (isinstance(x, (bool, int, float, tuple)) and x == y) for x, y in zip(a.told, b.told)
    )


def _scale(sigma: Tensor, like: Tensor) -> Tensor:
    """Return what a change of v comes to in the estimate, but for the sign, which is the same at all levels."""
    s = per_image(sigma, like)
    return s / (s**2 + 1) ** 0.5
