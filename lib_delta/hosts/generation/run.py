"""One batch's run: what is asked for, the source that is ready for it, and what came of it."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from lib_delta.bridges import Bridge, choose_bridge, describe_bridge
from lib_delta.core.delta_reuse import DeltaReuse, reuse_plan
from lib_delta.core.deltas import Deltas, distinct_changes, map_changes
from lib_delta.core.guidance import DeltaGuidance, DenoiseStep, not_finite_error, side_cfg
from lib_delta.core.heatmap import HeatMap
from lib_delta.core.source import Source
from lib_delta.core.step_stats import PendingStats, StepStats, stopwatch
from lib_delta.core.strength import PROGRESS_TOLERANCE
from lib_delta.devices import without_autocast
from lib_delta.diffusion.families import Family
from lib_delta.diffusion.parameterization import from_flow_space
from lib_delta.errors import DeltaError, NotFiniteError
from lib_delta.hosts.generation.main_model import MainModel
from lib_delta.models.forked_layers import set_tiling
from lib_delta.models.unet import merge_tokens
from lib_delta.request.passes import Passes
from lib_delta.request.request import Active
from lib_delta.runtime.side_model import SideModel, user_error

# Precisions as the settings page calls them, and those in which what overflows there may be finite.
WIDER = {torch.float16: ("fp16", "bf16 or fp32"), torch.bfloat16: ("bf16", "fp32")}


class StopSampling(BaseException):
    """Ends sampling from within a WebUI's callback, where ordinary exceptions are swallowed."""

    def __init__(self, error: DeltaError) -> None:
        super().__init__(str(error))
        self.error = error


def _drop_tracebacks(error: BaseException | None) -> None:
    """Drop the frames that an error and its causes keep, and with them the tensors there."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


@dataclass
class Run:
    """The delta of one batch.

    ``sources`` are the source as the first and as the hires pass tell it its prompts, for each set of
    LoRAs that counts at some point.  ``autoencoders`` is where the WebUI has its
    tiny ones.  ``foreign_patches`` names what changes the main model and not the side model.
    ``fault`` is what ended the delta, where the user wants to go on
    without it.  ``effective`` tells that it was other than zero, ``interrupted`` that the user ended the run.
    ``heat`` is where its changes are summed up, if the user wants to see them.
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
    # Whether the side model is where it computes, in hosts that bring it when a step asks for it.
    placed: bool = False
    # What the user is told besides, each sentence once.
    remarks: list[str] = field(default_factory=list)
    _sizes: list[float] = field(default_factory=list)
    _stats: PendingStats = field(default_factory=PendingStats)
    bridge_line: str = ""
    # The number of noise levels of the first and of the hires pass, and what is held of the delta there.
    levels: dict[bool, int] = field(default_factory=dict)
    _reuse: dict[bool, DeltaReuse] = field(default_factory=dict)
    _points: dict[bool, list[float]] = field(default_factory=dict)
    _tiled: bool | None = None
    _bridges: dict[tuple[Family, float | None, bool], Bridge] = field(default_factory=dict)

    def _reuse_of(self, hires: bool) -> DeltaReuse:
        if hires not in self._reuse:
            request = self.passes.of(hires)
            self._reuse[hires] = DeltaReuse(reuse_plan(request.quality, request.every, request.between, request.moved))
        return self._reuse[hires]

    def strength(self, progress: float, hires: bool) -> float:
        """Return lambda at a step; 0 where nothing is to be done."""
        request = self.passes.of(hires)
        if self.fault is not None or not (request.wanted and request.in_pass(hires)):
            return 0.0
        self._points.setdefault(hires, []).append(progress)
        if not request.differs_at(progress):
            return 0.0
        return request.lambda_over_run().at(progress)

    def bridge(self, target: MainModel) -> Bridge:
        """Return the way to the source from a target, which a refiner or hires pass may change in mid-run.

        Only where the target's schedule is of another kind, as after the rescale to zero terminal SNR and
        in flow matching, is the source kept within its own: samplers with churn go a little above any
        schedule, and models follow.
        """
        known = self.model.parameterization.schedule.sigma_max
        limit = known if target.sigma_max > 2 * known else None
        key = target.family, limit, target.tiled
        if key not in self._bridges:
            request = self.passes.first  # of which the hires pass differs in lambda and LoRAs alone
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
        """Return what the delta changes in the target's estimates; None for nothing.

        ``step`` is as the target's sampler has it.  A fault, be it that no bridge leads to what the
        target has become, goes to ``on_fault``, which raises it, or lets the target's own estimates stand.
        Whether changes are numbers is looked at by :meth:`read`; those that are not are 0 until then.
        """
        stop, changes = stopwatch(self.model.device), None
        # AUTOMATIC1111 calls under autocast, which would round merges and bridges to half precision.
        with self.guarded(f"step {step.step + 1} of Delta Sampling"), without_autocast(step.x.device):
            active = self.passes.active(step.progress, hires)
            self.model.activate(active)
            source = self.sources[hires, active]
            main = target()
            # Models of another layout merge elsewhere, and SDXL nowhere as the WebUIs have it set.
            merge_tokens(self.model.unet, main.merging if main.family.space is self.model.report.family.space else None)
            self._tile(main.tiled)
            strength, bridge = self.passes.of(hires).lambda_over_run(), self.bridge(main)
            guidance = DeltaGuidance(strength, bridge, source, self._reuse_of(hires), checked=False)
            step = replace(step, levels=self.levels.get(hires, 0))
            changes = guidance.changes(self._in_source_terms(step, main))
            self._note_bridge(main, step)
            self.steps += 1
            if changes is not None:
                changes = self._stats_of(step, changes, stop())
                if self.heat is not None:
                    self.heat.add(changes.guided, step.denoised)
        return changes

    def _tile(self, tiled: bool) -> None:
        """Have the side model's pictures be tiles where the target's are, which a refiner may change in mid-run."""
        if tiled is not self._tiled:
            set_tiling(self.model.network, tiled)
            self._tiled = tiled

    def _stats_of(self, step: DenoiseStep, changes: Deltas, seconds: Callable[[], float]) -> Deltas:
        finite = self._stats.add(step.step, step.sigma, step.denoised, distinct_changes(changes), seconds)
        return map_changes(lambda _images, change: torch.where(finite, change, 0.0), changes)

    def read(self, *values: torch.Tensor) -> list[float]:
        """Return numbers ``()`` of the device; and look, in the same transfer, at what steps have come to so far.

        It is the one point at which a step waits for the device: where it begins, with the noise level.  A step that
        was no number ends the delta.
        """
        numbers, figures = self._stats.take(*values)
        for step in figures:
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

    def _note_bridge(self, target: MainModel, step: DenoiseStep) -> None:
        """Note for the status which bridge the last step had, and how large the side model's latents were."""
        rows, columns = step.x.shape[-2:]
        self.bridge_line = describe_bridge(self.bridge(target), target.family, rows, columns)

    def _in_source_terms(self, step: DenoiseStep, target: MainModel) -> DenoiseStep:
        """Bring a step to the terms of the source: its scale of noise, and its own guidance."""
        if target.flow:
            x, sigma = from_flow_space(step.x, step.sigma, step.denoised)
            step = replace(step, x=x, sigma=sigma)
        scale = side_cfg(step.cfg_scale, self.model.report.family, target.family, self.passes.first.cfg or None)
        # With a scale of its own it has guidance of its own, whatever the target leaves out to save time.
        return step if scale == step.cfg_scale else replace(step, cfg_scale=scale, uncond_skipped=False)

    @contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """Let no fault in a WebUI's callback get lost: it ends the delta, and goes to ``on_fault``."""
        try:
            yield
        except Exception as error:  # whatever it is, the user hears of it
            self.fault = user_error(error, doing)
            if self.fault is not error:
                self.fault.__cause__ = error
            self.on_fault(self.fault)
            _drop_tracebacks(error)  # the run goes on, and what the failed step had computed would stay to its end

    def remark(self, sentence: str) -> None:
        """Have the user told something about the run, in a clause that is a sentence of its own."""
        if sentence not in self.remarks:
            self.remarks.append(sentence)

    def afterwards(self, doing: str, do: Callable[[], object]) -> None:
        """Do what comes after a picture is made, and lose none for it: a fault is told, and that is all."""
        try:
            do()
        except Exception as error:  # whatever it is, the user hears of it
            traceback.print_exception(type(error), error, error.__traceback__)
            self.remark(str(user_error(error, doing)))

    @property
    def applied(self) -> bool:
        """Whether the picture is what was asked for, and not the target's own."""
        return self.fault is None and self.steps > 0 and self.effective

    def reason(self) -> str:
        """Return why the picture is the target's own; empty if it is not, or if the user ended the run."""
        if self.fault is not None:
            return str(self.fault)
        if self.effective or self.interrupted:
            return ""
        return self._why_zero() if self.steps else self._why_no_step()

    def _why_zero(self) -> str:
        wanted = [request for request in (self.passes.first, self.passes.hires) if request.wanted]
        picks = [pick for request in wanted for pick in request.picks()]
        others = any(request.always_differs or request.has_units for request in wanted)
        if picks and not others and not any(pick.weight or pick.text_weight for pick in picks):
            return "every LoRA has a weight of 0"
        return "nothing told the base and the adapted model apart"

    def _why_no_step(self) -> str:
        passes = {hires: self.passes.of(hires) for hires in (False, True)}
        wanted = {hires: request for hires, request in passes.items() if request.wanted and request.in_pass(hires)}
        hires, request = next(((h, r) for h, r in wanted.items() if h in self._points), (None, None))
        if hires is None or request is None:
            only = "hires" if True in wanted else "first"
            return f"the delta is wanted in the {only} pass alone, and there was none"
        points = sorted(set(self._points[hires]))
        curve = request.lambda_over_run()
        if not any(request.start - PROGRESS_TOLERANCE <= point <= request.end + PROGRESS_TOLERANCE for point in points):
            at = ", ".join(f"{point:.2g}" for point in points[:8]) + (", ..." if len(points) > 8 else "")
            return f"no step lies between start {request.start:g} and end {request.end:g} (they are at {at})"
        if not any(curve.at(point) for point in points):
            return "the curve leaves nothing of lambda at any step"
        return "no LoRA counts at any step in the range, and no unit"

    def summary(self) -> str:
        """Return what the run cost, in one line."""
        why = self.reason()
        reason = f": {why}" if why else ""
        if not self.steps:
            before = "it was interrupted before any" if self.interrupted else "no"
            return f"{before} step had the delta{self._remarked()}{reason}"
        passes = sum(source.evaluations for source in self.sources.values())
        seconds = "" if math.isnan(self.seconds) else f", {self.seconds:.1f} s"
        cost = f"{_counted(passes, 'pass', 'es')} of the side model{seconds}"
        what = "delta" if self.effective or self.fault or self.interrupted else "no delta"
        done = f"{what} in {_counted(self.steps, 'step')}, {cost} ({self.bridge_line})"
        return f"{done}{self._in_sizes()}{self._in_foreign_patches()}{self._remarked()}{reason}"

    def _remarked(self) -> str:
        return "".join(f"; {remark}" for remark in self.remarks)

    def _in_foreign_patches(self) -> str:
        named = ", ".join(sorted(self.foreign_patches))
        return (
            f"; the main model alone has what {named} {'do' if len(self.foreign_patches) > 1 else 'does'}"
            if named
            else ""
        )

    def _in_sizes(self) -> str:
        """Say how large the delta was at each step, as a share of what the target estimated."""
        if not self.effective:
            return ""
        shown = [f"{size:.0%}" if size >= 1 else f"{100 * size:.2g}%" for size in self._sizes]
        few = shown if len(shown) <= 12 else [*shown[:6], "...", *shown[-6:]]
        return f"; it was {', '.join(few)} of the picture's own estimate"


def _remedy(dtype: torch.dtype) -> str:
    """Say what may help where a side model of this precision overflows."""
    if dtype not in WIDER:
        return "give its LoRAs smaller weights"
    now, wider = WIDER[dtype]
    return (
        f"it runs in {now}: choose {wider} in Settings > Delta Sampling > Precision of the side models, "
        "or give its LoRAs smaller weights"
    )


def _counted(number: int, of_what: str, plural: str = "s") -> str:
    return f"{number} {of_what}{'' if number == 1 else plural}"
