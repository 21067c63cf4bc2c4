"""One batch's run: what is asked for, the source that is ready for it, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from lib_delta.bridge import Bridge, choose
from lib_delta.errors import DeltaError
from lib_delta.families import Family
from lib_delta.guidance import DeltaGuidance, DenoiseStep
from lib_delta.request import Request
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

    ``sources`` are the source as the first and as the hires pass tell it its prompts.  ``fault`` is
    what ended the delta, where the user wants to go on without it.
    """

    request: Request
    model: SideModel
    sources: dict[bool, Source]
    on_fault: Callable[[DeltaError], None]
    fault: DeltaError | None = None
    steps: int = 0
    seconds: float = 0.0
    _bridges: dict[Family, Bridge] = field(default_factory=dict)

    def strength(self, progress: float, hires: bool) -> float:
        """Return lambda at a step; 0 where nothing is to be done."""
        if self.fault is not None or not self.request.in_pass(hires):
            return 0.0
        return self.request.lambda_over_run().at(progress)

    def bridge(self, target: Family) -> Bridge:
        """Return the way to the source from a target, which a refiner or hires pass may change in mid-run."""
        if target not in self._bridges:
            known = self.model.parameterization.schedule.sigma_max
            self._bridges[target] = choose(self.model.report.family, target, known)
        return self._bridges[target]

    def apply(self, step: DenoiseStep, target: Family, hires: bool) -> Tensor:
        """Return the target's estimate with the delta added.

        A fault goes to ``on_fault``, which raises it, or lets the target's own estimate stand.
        """
        started = time.perf_counter()
        guidance = DeltaGuidance(self.request.lambda_over_run(), self.bridge(target), self.sources[hires])
        try:
            denoised = guidance(step)
        except Exception as error:  # whatever it is, the user hears of it
            self.fault = sentence(error, f"step {step.step + 1} of Delta Sampling")
            self.fault.__cause__ = error
            self.on_fault(self.fault)
            return step.denoised
        self.steps += 1
        self.seconds += time.perf_counter() - started
        return denoised

    @property
    def applied(self) -> bool:
        """Whether the picture is what was asked for, and not the target's own."""
        return self.fault is None and self.steps > 0

    def summary(self) -> str:
        """Return what the run cost, in one line."""
        if not self.steps:
            return "Last run: no step had the delta"
        passes = sum(source.evaluations for source in self.sources.values())
        return f"Last run: delta in {self.steps} steps, {passes} passes of the side model, {self.seconds:.1f} s"
