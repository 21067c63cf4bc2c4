"""The run of one batch: its requests and sources, its faults, and the report."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lib_delta.bridges import Bridge, choose_bridge, describe_bridge, may_enlarge
from lib_delta.core.delta_reuse import DeltaReuse, reuse_plan
from lib_delta.core.deltas import Deltas
from lib_delta.core.guidance import not_finite_error
from lib_delta.core.heatmap import HeatMap
from lib_delta.core.pass_delta import PassDelta
from lib_delta.core.source import Source
from lib_delta.core.step_stats import PendingStats, StepStats, Stopwatch
from lib_delta.core.steps import DenoiseStep
from lib_delta.core.strength import covers
from lib_delta.devices import without_autocast
from lib_delta.diffusion.families import Family
from lib_delta.errors import DeltaError, NotFiniteError
from lib_delta.hosts.generation.main_model import MainModel
from lib_delta.models.forked_layers import set_tiling
from lib_delta.models.unet import merge_tokens
from lib_delta.request.lora_recipe import Active
from lib_delta.request.passes import Passes
from lib_delta.runtime.side_model import SideModel, user_error

# The settings page's name of each precision, and the precisions with a wider range.
WIDER = {torch.float16: ("fp16", "bf16 or fp32"), torch.bfloat16: ("bf16", "fp32")}


class StopSampling(BaseException):
    """Ends sampling from a WebUI's callback, which swallows ordinary exceptions."""

    def __init__(self, error: DeltaError) -> None:
        super().__init__(str(error))
        self.error = error


def _drop_tracebacks(error: BaseException | None) -> None:
    """Drop the tracebacks of an error and its causes, which keep the frames' tensors alive."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


@dataclass
class Run:
    """The run of one batch: it prepares each step of the delta, handles faults, and reports.

    Attributes:
        passes: the requests of the first and of the hires pass.
        model: the side model.
        sources: the source with a pass's prompts, by pass (whether it is the hires pass) and active LoRAs.
        on_fault: called with a fault; raises it, or returns to continue without the delta.
        heat: collects the changes, if the user wants to see them.
        autoencoders: the WebUI's folder of tiny autoencoders.
        foreign_patches: the extensions that change the main model and not the side model.
        fault: the fault that ended the delta, if the run continues without it.
        steps: the number of steps with the delta.
        seconds: the time that they took, NaN if unknown.
        effective: whether the delta was not 0.
        interrupted: whether the user ended the run.
        placed: whether the side model is on its device, in hosts that move it there for a step.
        remarks: further messages to the user, each once.
        bridge_line: the last step's bridge and latent size, for the status.
        levels: the number of noise levels, by pass.
    """

    passes: Passes
    model: SideModel
    sources: dict[tuple[bool, Active], Source]
    on_fault: Callable[[DeltaError], None]
    heat: HeatMap | None = None
    autoencoders: Path | None = None
    foreign_patches: set[str] = field(default_factory=set)
    fault: DeltaError | None = None
    steps: int = 0
    seconds: float = 0.0
    effective: bool = False
    interrupted: bool = False
    placed: bool = False
    remarks: list[str] = field(default_factory=list)
    _sizes: list[float] = field(default_factory=list)
    _stats: PendingStats = field(default_factory=PendingStats)
    bridge_line: str = ""
    levels: dict[bool, int] = field(default_factory=dict)
    _pass_deltas: dict[bool, PassDelta] = field(default_factory=dict)
    _tiled: bool | None = None
    _bridges: dict[tuple[Family, float | None, bool], Bridge] = field(default_factory=dict)

    def strength(self, progress: float, hires: bool) -> float:
        """Return lambda at a step; 0 if the step gets no delta."""
        request = self.passes.of(hires)
        if self.fault is not None or not (request.wanted and request.in_pass(hires)):
            return 0.0
        pass_delta = self._pass_delta(hires)
        pass_delta.points.append(progress)
        return pass_delta.strength.at(progress) if request.differs_at(progress) else 0.0

    def _pass_delta(self, hires: bool) -> PassDelta:
        if hires not in self._pass_deltas:
            request = self.passes.of(hires)
            self._pass_deltas[hires] = PassDelta(
                request.lambda_over_run(),
                DeltaReuse(reuse_plan(request.quality, request.every, request.between, request.moved)),
                self.model.report.family,
                self._stats,
                user_cfg=self.passes.first.cfg or None,
                heat=self.heat,
            )
        return self._pass_deltas[hires]

    def bridge(self, target: MainModel) -> Bridge:
        """Return the bridge between the source and a target, which a refiner or the hires pass may change in mid-run.

        The source's noise level is limited to its schedule only if the target's schedule is of another kind, as after
        the rescale to zero terminal SNR and in flow matching, or if the source may work at twice the size and so at
        twice the noise level.  Samplers with churn go a little above any schedule, which models tolerate.
        """
        sigma_max = self.model.parameterization.schedule.sigma_max
        beyond = target.sigma_max > 2 * sigma_max or may_enlarge(self.model.report.family, target.family)
        limit = sigma_max if beyond else None
        key = target.family, limit, target.tiled
        if key not in self._bridges:
            request = self.passes.first  # the hires pass differs only in lambda and LoRAs
            self._bridges[key] = choose_bridge(
                self.model.report.family,
                target.family,
                limit,
                form=request.bridge,
                size=request.side_size,
                tiled=target.tiled,
                autoencoders=self.autoencoders,
            )
        return self._bridges[key]

    def changes(self, step: DenoiseStep, target: Callable[[], MainModel], hires: bool) -> Deltas | None:
        """Return the changes to add to the target's estimates, or None for no change.

        ``target`` returns the main model at this step.  Any fault, such as a missing bridge to a refiner, goes to
        ``on_fault``; if that returns, the target's estimates stay unchanged.  Changes that are not finite are 0 here,
        and :meth:`read` reports them later.
        """
        stopwatch, changes = Stopwatch(self.model.device), None
        # AUTOMATIC1111 calls under autocast, which would round merges and bridges to half precision.
        with self.guarded(f"step {step.step + 1} of Delta Sampling"), without_autocast(step.x.device):
            source, main = self._activate(step.progress, hires), target()
            self._follow(main)
            bridge = self.bridge(main)
            changes = self._pass_delta(hires).changes(
                replace(step, levels=self.levels.get(hires, 0)),
                main,
                source=source,
                bridge=bridge,
                stopwatch=stopwatch,
            )
            self.bridge_line = describe_bridge(bridge, main.family, *step.x.shape[-2:])
            self.steps += 1
        return changes

    def _activate(self, progress: float, hires: bool) -> Source:
        """Activate the LoRAs of a point of a pass, and return its source."""
        active = self.passes.active(progress, hires)
        self.model.activate(active)
        return self.sources[hires, active]

    def _follow(self, main: MainModel) -> None:
        """Give the side model the main model's token merging and tiling, which a refiner may change in mid-run."""
        # Models of another layout merge other layers, and the WebUIs' setting leaves SDXL unmerged.
        merging = main.merging if main.family.space is self.model.report.family.space else None
        merge_tokens(self.model.unet, merging)
        if main.tiled is not self._tiled:
            set_tiling(self.model.network, main.tiled)
            self._tiled = main.tiled

    def read(self, *values: torch.Tensor) -> list[float]:
        """Return numbers ``()`` from the device, and record the statistics of earlier steps in the same transfer.

        This is the only point at which a step waits for the device: at its beginning, for the noise level.  A step
        whose delta was not finite ends the delta.
        """
        numbers, stats = self._stats.take(*values)
        for step in stats:
            with self.guarded(f"step {step.step + 1} of Delta Sampling"):
                self._record(step)
            if self.fault is not None:
                break
        return numbers

    def _record(self, step: StepStats) -> None:
        self.seconds += step.seconds
        if not step.finite:
            self.steps -= 1
            raise NotFiniteError(f"{not_finite_error(step.step, step.sigma)}: {_remedy(self.model.dtype)}")
        self.effective = self.effective or not step.zero
        self._sizes.append(step.size)

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Catch any fault in a WebUI's callback, so that none is lost: it ends the delta and goes to ``on_fault``.

        ``doing`` names the failed action in the message.
        """
        try:
            yield
        except Exception as error:  # of any kind: the user must see it
            self.fault = user_error(error, doing)
            if self.fault is not error:
                self.fault.__cause__ = error
            self.on_fault(self.fault)
            _drop_tracebacks(error)  # otherwise the failed step's tensors would live until the run ends

    def remark(self, sentence: str) -> None:
        """Add a message about the run to the status; repeated messages appear once."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)

    def afterwards(self, doing: str, do: Callable[[], object]) -> None:
        """Call ``do`` after the images are made; a fault becomes a remark, so that no image is lost."""
        try:
            do()
        except Exception as error:  # of any kind: the user must see it
            traceback.print_exception(type(error), error, error.__traceback__)
            self.remark(str(user_error(error, doing)))

    @property
    def applied(self) -> bool:
        """Whether the images have the requested delta."""
        return self.fault is None and self.steps > 0 and self.effective

    def reason(self) -> str:
        """Return why the images lack the delta; empty if they have it, or if the user ended the run."""
        if self.fault is not None:
            return str(self.fault)
        if self.effective or self.interrupted:
            return ""
        return self._why_zero() if self.steps else self._why_no_step()

    def _why_zero(self) -> str:
        wanted = [request for request in (self.passes.first, self.passes.hires) if request.wanted]
        picks = [pick for request in wanted for pick in request.picks()]
        only_loras = not any(request.always_differs or request.has_units for request in wanted)
        if picks and only_loras and not any(pick.weight or pick.text_weight for pick in picks):
            return "every LoRA has a weight of 0"
        return "the base and the adapted model did not differ"

    def _why_no_step(self) -> str:
        passes = {hires: self.passes.of(hires) for hires in (False, True)}
        wanted = {hires: request for hires, request in passes.items() if request.wanted and request.in_pass(hires)}
        hires, request = next(((h, r) for h, r in wanted.items() if h in self._pass_deltas), (None, None))
        if hires is None or request is None:
            only = "hires" if True in wanted else "first"
            return f"the delta is enabled only for the {only} pass, and there was none"
        pass_delta = self._pass_deltas[hires]
        points = sorted(set(pass_delta.points))
        if not any(covers(request.start, request.end, point) for point in points):
            at = ", ".join(f"{point:.2g}" for point in points[:8]) + (", ..." if len(points) > 8 else "")
            return f"no step lies between start {request.start:g} and end {request.end:g} (they are at {at})"
        if not any(pass_delta.strength.at(point) for point in points):
            return "the curve makes lambda 0 at every step"
        return "no LoRA and no unit is active at any step in the range"

    def summary(self) -> str:
        """Return the run's result and cost in one line."""
        why = self.reason()
        reason = f": {why}" if why else ""
        if not self.steps:
            which = "it was interrupted before any" if self.interrupted else "no"
            return f"{which} step had the delta{self._remarked()}{reason}"
        passes = sum(source.evaluations for source in self.sources.values())
        seconds = "" if math.isnan(self.seconds) else f", {self.seconds:.1f} s"
        cost = f"{_counted(passes, 'pass', 'es')} of the side model{seconds}"
        result = "delta" if self.effective or self.fault or self.interrupted else "no delta"
        line = f"{result} in {_counted(self.steps, 'step')}, {cost} ({self.bridge_line})"
        return f"{line}{self._sizes_clause()}{self._foreign_clause()}{self._remarked()}{reason}"

    def _remarked(self) -> str:
        return "".join(f"; {remark}" for remark in self.remarks)

    def _foreign_clause(self) -> str:
        names = ", ".join(sorted(self.foreign_patches))
        verb = "change" if len(self.foreign_patches) > 1 else "changes"
        return f"; {names} {verb} only the main model" if names else ""

    def _sizes_clause(self) -> str:
        """Return the size of the delta at each step, as a share of the target's estimate."""
        if not self.effective:
            return ""
        shown = [f"{size:.0%}" if size >= 1 else f"{100 * size:.2g}%" for size in self._sizes]
        few = shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-6:]]
        return f"; it was {', '.join(few)} of the picture's estimate"


def _remedy(dtype: torch.dtype) -> str:
    """Return what may help if a side model of this precision overflows."""
    if dtype not in WIDER:
        return "give its LoRAs smaller weights"
    name, wider = WIDER[dtype]
    return (
        f"it runs in {name}: choose {wider} in Settings > Delta Sampling > Precision of the side models, "
        "or give its LoRAs smaller weights"
    )


def _counted(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{'' if number == 1 else plural}"
