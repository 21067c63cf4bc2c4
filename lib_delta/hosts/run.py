"""One batch's run: what is asked for, the source that is ready for it, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from lib_delta.bridges import Bridge, choose
from lib_delta.errors import DeltaError
from lib_delta.families import Family
from lib_delta.guidance import DeltaGuidance, DenoiseStep
from lib_delta.request import Active, Request
from lib_delta.sidemodel import SideModel, sentence
from lib_delta.source import Source


class Stop(BaseException):
    """Ends sampling from within a WebUI's callback, where ordinary exceptions are swallowed."""

    def __init__(self, error: DeltaError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Run:
    """The delta of one batch.

    ``sources`` are the source as the first and as the hires pass tell it its prompts, for each set of
    LoRAs that counts at some point.  ``fault`` is what ended the delta, where the user wants to go on
    without it.
    """

    request: Request
    model: SideModel
    sources: dict[tuple[bool, Active], Source]
    on_fault: Callable[[DeltaError], None]
    fault: DeltaError | None = None
    steps: int = 0
    seconds: float = 0.0
    _bridges: dict[tuple[Family, float | None], Bridge] = field(default_factory=dict)

    def strength(self, progress: float, hires: bool) -> float:
        """Return lambda at a step; 0 where nothing is to be done."""
        if self.fault is not None or not self.request.in_pass(hires):
            return 0.0
        if not (self.request.always or any(self.request.active(progress))):
            return 0.0
        return self.request.lambda_over_run().at(progress)

    def bridge(self, target: Family, sigma_max: float) -> Bridge:
        """Return the way to the source from a target, which a refiner or hires pass may change in mid-run.

        ``sigma_max`` is that of the target's own schedule.  Only where it is of another kind, as after
        the rescale to zero terminal SNR, is the source kept within its own: samplers with churn go a
        little above any schedule, and models follow.
        """
        known = self.model.parameterization.schedule.sigma_max
        limit = known if sigma_max > 2 * known else None
        if (target, limit) not in self._bridges:
            self._bridges[target, limit] = choose(self.model.report.family, target, limit)
        return self._bridges[target, limit]

    def changes(
        self, step: DenoiseStep, target: Callable[[], tuple[Family, float]], hires: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return what the delta changes in the target's guided and negative estimates; None for nothing.

        ``target`` tells what :meth:`bridge` takes.  A fault, be it that no bridge leads to what the
        target has become, goes to ``on_fault``, which raises it, or lets the target's own estimates stand.
        """
        started, changes = time.perf_counter(), None
        with self.watched(f"step {step.step + 1} of Delta Sampling"):
            active = self.request.active(step.progress)
            self.model.activate(active)
            source = self.sources[hires, active]
            guidance = DeltaGuidance(self.request.lambda_over_run(), self.bridge(*target()), source)
            changes = guidance.changes(step)
            self.steps += 1
            self.seconds += time.perf_counter() - started
        return changes

    @contextmanager
    def watched(self, doing: str) -> Iterator[None]:
        """Let no fault in a WebUI's callback get lost: it ends the delta, and goes to ``on_fault``."""
        try:
            yield
        except Exception as error:  # whatever it is, the user hears of it
            self.fault = sentence(error, doing)
            if self.fault is not error:
                self.fault.__cause__ = error
            self.on_fault(self.fault)

    @property
    def applied(self) -> bool:
        """Whether the picture is what was asked for, and not the target's own."""
        return self.fault is None and self.steps > 0

    def summary(self) -> str:
        """Return what the run cost, in one line."""
        reason = "" if self.fault is None else f": {self.fault}"
        if not self.steps:
            return f"Last run: no step had the delta{reason}"
        passes = sum(source.evaluations for source in self.sources.values())
        cost = f"{passes} passes of the side model, {self.seconds:.1f} s"
        return f"Last run: delta in {self.steps} steps, {cost}{reason}"
